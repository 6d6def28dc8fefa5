"""Windows of tokens become batches: BERT's masks and UL2's denoisers, side by side.

    python data.py              one window of text, as BERT's masks and as each of UL2's denoisers show it

The batch of a step is a pure function of (seed, step): there is no state to save, and any step can be made at once.
Not here: where the windows come from (text/corpus.py), the models that read the batches (model.py).

A UL2 row has T + 1 tokens:   [mode] text with <0>, <1>, ... in place of the spans   |   <0> span 0 <1> span 1 ... [SEP]
The model reads the part before the bar in both directions and learns to write the part after it. Rows are full: each
takes as much text as makes it exactly T + 1 tokens long, so there is no padding.

Sources: masks, BERT (Devlin et al., arXiv 1810.04805, section 3.1); denoisers, UL2 (Tay et al., arXiv 2205.05131,
table 1); span corruption, T5 (Raffel et al., arXiv 1910.10683, section 3.1.4).
Legend: B rows, T tokens per row, M masked positions per row; n tokens of text in a UL2 row, m of them in spans, s
spans.
"""

import textwrap
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from text.corpus import Corpus, rng
from text.prepare import MASK, SEP, SPECIAL, prepared

NO_TARGET = -100  # a position that is not predicted

# ----------------------------------------------------------------------------------------------------------------
# BERT: fill masks


def mask_tokens(tokens, vocab, generator):
    """BERT's masking of windows (B, T): (inputs (B, T), masked (B, M), targets (B, M)), M = round(0.15 (T - 1)).

    15% of the tokens of each window that are not special are targets; of these 80% become [MASK], 10% a random token,
    10% stay. A window with more specials has fewer targets than M; its spare slots point at position 0 with NO_TARGET.
    """
    B, T = tokens.shape
    slots = masked_per_window(T)
    order = generator.random((B, T))
    order[tokens < SPECIAL] = np.inf  # specials come last
    masked = np.argsort(order, axis=1)[:, :slots]
    real = (tokens >= SPECIAL).sum(axis=1, keepdims=True)
    spare = np.arange(slots) >= np.minimum(real, np.maximum(1, np.rint(0.15 * real)))
    original = np.take_along_axis(tokens, masked, 1)
    targets = np.where(spare, NO_TARGET, original)
    dice, random_token = generator.random((B, slots)), generator.integers(SPECIAL, vocab, (B, slots))
    shown = np.where(dice < 0.8, MASK, np.where(dice < 0.9, random_token, original))
    # A spare slot writes back what stands at position 0. No mask is there: a window begins with [CLS].
    masked = np.where(spare, 0, masked)
    inputs = tokens.copy()
    np.put_along_axis(inputs, masked, np.where(spare, tokens[:, :1], shown), 1)
    return inputs, masked, targets


def masked_per_window(seq):
    return max(1, round(0.15 * (seq - 1)))


class MaskedLM:
    """BERT's objective: batches of a corpus with 15% of the tokens masked.

    seq: T. vocab: token ids of the tokenizer. corpus: None where only sizes are asked for.
    """

    def __init__(self, seq, vocab, corpus=None):
        self.seq, self.vocab, self.corpus = seq, vocab, corpus
        self.model_vocab = vocab  # token ids that the model needs

    def targets_per_row(self):
        """On how many positions of a row the head runs."""
        return masked_per_window(self.seq)

    def head_positions(self, batch):
        """On how many positions of a row of this batch the head runs."""
        return batch[1].shape[1]

    def rows(self, windows, generator):
        return mask_tokens(windows, self.vocab, generator)

    def batch(self, seed, step, size):
        """Training batch of a step (from 1): inputs (B, T), masked (B, M), targets (B, M), as int64 arrays."""
        windows = self.corpus.windows("train", self.seq, self.corpus.order(seed, step, size, self.seq))
        return self.rows(windows, rng(seed, "mask", step))

    def held_out(self, size, tuning=False):
        """A batch of held-out windows, masked the same way for every seed and run. tuning: see Corpus.held_out."""
        return self.rows(self.corpus.held_out(size, self.seq, tuning), rng(0, "evaluation"))

    def unigram_loss(self, targets):
        """Mean loss, in nats, of predicting each target by its frequency in the training text."""
        counts = self.corpus.train_counts[SPECIAL:] + 1
        return float(-np.log(counts / counts.sum())[targets[targets != NO_TARGET] - SPECIAL].mean())


# ----------------------------------------------------------------------------------------------------------------
# UL2: take spans out of a text and write them


class Denoiser(NamedTuple):
    mode: int  # of MODES: which mode token begins its rows
    span: float | None  # mean length of a span; None: one span, the tail, of mean length n/4; 0: all of the text
    rate: float  # share of the text in spans


MODES = ["[R]", "[S]", "[X]"]
DENOISERS = {
    "r3": Denoiser(0, 3, 0.15), "r8": Denoiser(0, 8, 0.15),  # regular
    "s": Denoiser(1, None, 0.25),  # sequential: a prefix language model
    "x3": Denoiser(2, 3, 0.5), "x8": Denoiser(2, 8, 0.5),  # extreme: much, or in long spans, or both
    "x64": Denoiser(2, 64, 0.15), "x64half": Denoiser(2, 64, 0.5),
    "x32": Denoiser(2, 32, 0.5),  # of Garcia et al. (arXiv 2302.01398); not one of UL2's seven
    "causal": Denoiser(1, 0, 1.0),  # a plain language model; not one of UL2's seven
}  # fmt: skip
UL2 = "r3,r8,s,x3,x8,x64,x64half"  # the published seven, evenly
MIXTURES = {"ul2": UL2, "garcia": "causal:6,s:2,r3:1,x32:1"}


def mixture(text):
    """{denoiser: share} of "r3,s:2,x8", names with weights (1 where none is given), or of one of MIXTURES. Raises
    UserError for a name that does not exist."""
    weights = {}
    for part in MIXTURES.get(text, text).split(","):
        name, _, weight = part.partition(":")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = -1.0
        if name not in DENOISERS or not 0 < weights[name] < 1e6:
            known = ", ".join(DENOISERS)
            raise UserError(f"--denoisers {part}: give names of {known}, each with a weight above 0, as in r3,s:2")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def sentinels(seq):
    """How many there are: enough for x3, which takes the most spans (a piece costs two tokens beside its text)."""
    return seq // 6 + 8


def extra_tokens(seq):
    """Token ids that a model of sequences of `seq` tokens needs beyond the tokenizer's: the modes, then the
    sentinels."""
    return len(MODES) + sentinels(seq)


# ----------------------------------------------------------------------------------------------------------------
# Which tokens are in spans


# The probability algebra of a span mask. A row has T + 1 tokens: a mode, the n - m tokens of text that stay, one
# sentinel per span, then the target (one sentinel per span, the m tokens of the spans), and [SEP]. So with s spans
#
#     1 + (n - m) + s + s + m + 1 = T + 1,    n = T - 1 - 2 s.    (1)
#
# T5's span mask begins with text and ends with a span, so a single long span is always the tail. Here the n tokens and
# their spans lie on a circle that is cut at a random place: every position is equally often in a span. Of the n places
# to cut, m - s lie inside a span (a span of l tokens has l - 1 of them), which then counts as two:
#
#     P(cut inside a span) = (m - s) / n,    which takes two tokens more: n = T - 1 - 2 (s + 1).    (2)
#
# We want m = rate * n, and spans of mean length `span`, so p = m / span spans in all, cut ones counted twice. With (1)
#
#     p = rate (T - 1 - 2 p) / span,    p = rate (T - 1) / (span + 2 rate),    (3)
#
# and as p = s + (m - s) / n, where s / n = rate / span: s = p - rate (1 - 1 / span) on average. What is not whole is
# rounded at random, so that its mean is right; but less than one span becomes one. In a row of 64 tokens a span of 64
# is one of 9 tokens (x64, which is then nearly r8 with another mode), or of 30 (x64half, x32).
#
# How uniform it is. The share of tokens in spans equals `rate` exactly in the mean over a row, and at its first and
# last token. In between it does not quite, because a row cut inside a span has a circle two tokens smaller. With the
# text in ten parts, a part's share differs from `rate` by 0.002 at T = 512; at T = 128 by 0.001 for spans of 3 and 8,
# 0.013 for 64; at T = 32 by 0.008 for 3 and 0.037 for 64, which is then one span.


def random_parts(total, count, generator):
    """(B, max count): each row's `total` (B,) split at random into its `count` (B,) parts of at least 1; 0 beyond."""
    longest, most = int(total.max()), int(count.max())
    key = generator.random((len(total), max(1, longest - 1)))
    key[np.arange(key.shape[1]) >= total[:, None] - 1] = 2.0  # above every random number: never a cut
    order = key.argsort(1).argsort(1)  # the places of the count - 1 smallest keys are the cuts
    cut = (order < count[:, None] - 1).cumsum(1)
    part = np.concatenate([np.zeros((len(total), 1), int), cut], 1)[:, :longest]
    inside = np.arange(longest) < total[:, None]
    lengths = np.zeros((len(total), most), int)
    np.add.at(lengths, (np.nonzero(inside)[0], part[inside]), 1)
    return lengths


def span_mask(denoiser, rows, size, generator):
    """(mask (B, size): which tokens of the text are in spans; n (B,): how many tokens of text a row holds). size: T."""
    position = np.arange(size)
    if denoiser.span == 0:  # all of the text
        return np.ones((rows, size - 1), bool), np.full(rows, size - 1)
    if denoiser.span is None:  # a tail of 1 .. n/2 tokens, all lengths equally often: n/4 on average
        n = np.full(rows, size - 3)
        m = generator.integers(1, n // 2 + 1)
        return (position >= (n - m)[:, None]) & (position < n[:, None]), n

    # How many spans, how much text, and whether the cut falls inside a span.
    spans_in_all = denoiser.rate * (size - 1) / (denoiser.span + 2 * denoiser.rate)  # (3)
    mean_spans = spans_in_all - denoiser.rate * (1 - 1 / denoiser.span)
    s = np.maximum(1, np.floor(mean_spans + generator.random(rows))).astype(int)
    n = size - 1 - 2 * s  # (1)
    rounding = generator.random(rows)  # used twice, so that m is rounded the same way for both n
    m = np.floor(denoiser.rate * n + rounding).astype(int)
    divided = generator.random(rows) < (m - s) / n  # (2)
    n = n - 2 * divided
    # Every span and every gap has a token, and if the cut falls inside a span, one span has two.
    m = np.clip(np.floor(denoiser.rate * n + rounding).astype(int), s + divided, n - s)

    # The circle: gap, span, gap, span, ... of random lengths. An odd number of ends before a position: it is in a span.
    spans, gaps = random_parts(m, s, generator), random_parts(n - m, s, generator)
    ends = np.stack([gaps, spans], 2).reshape(rows, -1).cumsum(1)
    circle = np.zeros((rows, size + 1), int)
    np.add.at(circle, (np.arange(rows)[:, None], np.minimum(ends, size)), 1)
    circle = (circle.cumsum(1) % 2 == 1)[:, :size] & (position < n[:, None])

    # Begin to read it at a random place: inside a span if `divided`, else not.
    before = np.take_along_axis(circle, (position - 1) % n[:, None], 1)
    allowed = ((circle & before) == divided[:, None]) & (position < n[:, None])
    # Of the allowed places the one with the highest random number, so that each is equally likely.
    start = np.argmax(np.where(allowed, generator.random(allowed.shape), -1.0), 1)
    return np.take_along_axis(circle, (position + start[:, None]) % n[:, None], 1) & (position < n[:, None]), n


# ----------------------------------------------------------------------------------------------------------------
# Rows


def corrupt(text, mask, n, mode, first_extra):
    """Rows (tokens (B, T), prefix (B,), targets (B, T)) from text (B, at least n) and a mask of spans.

    prefix: how many tokens are read in both directions. targets: the next token wherever the model has to write, else
    NO_TARGET. mode: index into MODES. first_extra: the id of the first mode token.
    """
    B, size = len(text), mask.shape[1]
    place = np.arange(size)
    text, inside = text[:, :size], place < n[:, None]
    kept = ~mask & inside
    everything = ~kept.any(1)  # nothing to read: no sentinel, the text itself is the target
    begins = mask & ~np.concatenate([np.zeros((B, 1), bool), mask[:, :-1]], 1) & ~everything[:, None]
    sentinel = first_extra + len(MODES) + begins.cumsum(1) - 1
    prefix = 1 + kept.sum(1) + begins.sum(1)
    length = prefix + mask.sum(1) + begins.sum(1) + 1
    T = int(length.max()) - 1
    row = np.full((B, T + 2), NO_TARGET)
    row[:, 0] = first_extra + mode
    at = np.arange(B)[:, None]
    # Where each token of text and each sentinel goes. Column T + 1 takes what goes nowhere, and is cut off below.
    read = (kept | begins).cumsum(1)
    row[at, np.where(kept | begins, read, T + 1)] = np.where(kept, text, sentinel)
    written = prefix[:, None] + (mask.astype(int) + begins).cumsum(1) - 1
    row[at, np.where(mask, written, T + 1)] = text
    row[at, np.where(begins, written - 1, T + 1)] = sentinel
    row[np.arange(B), length - 1] = SEP
    row = row[:, : T + 1]
    tokens, targets = row[:, :-1], row[:, 1:].copy()
    targets[np.arange(T) < prefix[:, None] - 1] = NO_TARGET
    return np.where(tokens == NO_TARGET, SEP, tokens), prefix, targets


def denoise(text, names, vocab, seq, generator):
    """Rows of `seq` tokens from text (B, seq - 1), windows without [CLS]. names: one denoiser per row. vocab: the
    tokenizer's."""
    tokens, prefix, targets = np.empty((len(text), seq), int), np.empty(len(text), int), np.empty((len(text), seq), int)
    for name in sorted(set(names)):
        rows = np.flatnonzero(np.asarray(names) == name)
        mask, n = span_mask(DENOISERS[name], len(rows), seq, generator)
        # The row holds n tokens of its window, from a random place on: any part of a window may be left out.
        offset = (generator.random(len(rows)) * (text.shape[1] - n + 1)).astype(int)
        places = np.minimum(offset[:, None] + np.arange(mask.shape[1]), text.shape[1] - 1)
        shifted = np.take_along_axis(text[rows], places, 1)
        tokens[rows], prefix[rows], targets[rows] = corrupt(shifted, mask, n, DENOISERS[name].mode, vocab)
    return tokens, prefix, targets


class Denoising:
    """UL2's objective: batches of a corpus in which each row has a denoiser of its own.

    seq: T. vocab: token ids of the tokenizer. weights: {denoiser: share}. corpus: None where only sizes are asked for.
    """

    def __init__(self, seq, vocab, weights, corpus=None):
        self.seq, self.vocab, self.weights, self.corpus = seq, vocab, weights, corpus
        self.model_vocab = vocab + extra_tokens(seq)

    def targets_per_row(self):
        """On how many positions of a row the head runs, on average."""
        blank = np.zeros((256, self.seq - 1), int)
        rows = {d: denoise(blank, [d] * 256, 1000, self.seq, rng(0, "count"))[2] for d in self.weights}
        return sum(share * (rows[d] != NO_TARGET).sum() / 256 for d, share in self.weights.items())

    def head_positions(self, batch):
        """On how many positions of a row of this batch the head runs."""
        return (batch[2] != NO_TARGET).sum() / len(batch[2])

    def rows(self, windows, generator):
        names = generator.choice(list(self.weights), len(windows), p=list(self.weights.values()))
        return denoise(windows[:, 1:], names, self.vocab, self.seq, generator)

    def batch(self, seed, step, size):
        """Training batch of a step (from 1): tokens (B, T), prefix (B,), targets (B, T), as int64 arrays."""
        windows = self.corpus.windows("train", self.seq, self.corpus.order(seed, step, size, self.seq))
        return self.rows(windows, rng(seed, "denoise", step))

    def held_out(self, size, tuning=False):
        """A batch of held-out rows, the same for every seed and run. tuning: see Corpus.held_out."""
        return self.rows(self.corpus.held_out(size, self.seq, tuning), rng(0, "evaluation"))

    def unigram_loss(self, targets):
        """Mean loss, in nats, of predicting each target by its frequency among the targets of some training batches."""
        seen = np.concatenate([self.batch(0, step, 64)[2].ravel() for step in range(1, 33)])
        counts = np.bincount(seen[seen != NO_TARGET], minlength=self.model_vocab) + 1.0
        return float(-np.log(counts / counts.sum())[targets[targets != NO_TARGET]].mean())


# ----------------------------------------------------------------------------------------------------------------
# Both


def objective(args, corpus=None, vocab=None):
    """The objective of --arch. vocab: token ids of the tokenizer; by default those of the corpus, or --vocab."""
    vocab = vocab or (corpus.vocab if corpus else args.vocab)
    if args.arch == "ul2":
        return Denoising(args.seq, vocab, mixture(args.denoisers), corpus)
    return MaskedLM(args.seq, vocab, corpus)


def prefetch(make, first, last):
    """make(first), make(first + 1), ... make(last), each begun in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make, first)
        for following in range(first + 1, last + 1):
            ready, coming = coming.result(), thread.submit(make, following)
            yield ready
        yield coming.result()


# ----------------------------------------------------------------------------------------------------------------


def show(ids, tokenizer):
    """Tokens in words. Modes and sentinels bear the names they have here."""
    words, V = [], tokenizer.vocab_size()
    for i in ids:
        extra = int(i) - V
        name = MODES[extra] if 0 <= extra < len(MODES) else f" <{extra - len(MODES)}>"
        words.append(tokenizer.id_to_piece(int(i)).replace("▁", " ") if extra < 0 else name)
    return "".join(words)


def demo(seq=48):
    corpus = Corpus(prepared())
    window = corpus.windows("train", 64, [77])[:, : seq + 1]
    print(f"\n  {corpus.meta['source']}, fingerprint {corpus.fingerprint}")
    print("  " + ", ".join(f"{corpus.meta[split]['tokens']:,} {split} tokens" for split in ("train", "val")))
    print_wrapped("text", show(window[0, 1:], corpus.tokenizer))
    print("\n  BERT: 15% are targets; of these 80% become [MASK], 10% another token")
    inputs, masked, targets = (part[0] for part in mask_tokens(window, corpus.vocab, rng(0, "demo")))
    print_wrapped("reads", show(inputs, corpus.tokenizer))
    asked = sorted((int(p), int(t)) for p, t in zip(masked, targets) if t != NO_TARGET)
    print_wrapped("fills", ", ".join(f"{p}:{show([t], corpus.tokenizer)}" for p, t in asked))
    for name, denoiser in DENOISERS.items():
        tokens, prefix, targets = denoise(window[:, 1:], [name], corpus.vocab, seq, rng(0, name))
        what = {None: "a tail of a quarter", 0: "everything"}.get(denoiser.span)
        print(f"\n  UL2, {name}: {what or f'spans of {denoiser.span}, {denoiser.rate:.0%}'}")
        print_wrapped("reads", show(tokens[0, : prefix[0]], corpus.tokenizer))
        print_wrapped("writes", show(targets[0, prefix[0] - 1 :], corpus.tokenizer))
    print()


def print_wrapped(sign, text):
    print(textwrap.fill(text.strip(), 78, initial_indent=f"    {sign:7}", subsequent_indent=" " * 11))


if __name__ == "__main__":
    demo()
