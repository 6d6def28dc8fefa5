"""UL2's mixture of denoisers: a text becomes a prefix to read, with spans taken out, and what was taken out, to write.

    python denoisers.py                      one text, seen by each denoiser

A row of T + 1 tokens is   [mode] text with <0>, <1>, ... where spans were   |   <0> span 0 <1> span 1 ... [SEP]
and the model, which reads the part before the bar in both directions, learns to write the part after it. Rows are full: as
much text is taken as makes them exactly T + 1 tokens long, so there is no padding. A batch is a pure function of (seed, step).

The usual span mask begins with text and ends with a span, so that a single long span is always the tail. Here text and spans
lie on a circle that is cut at random: every position is equally often in a span. A span that the cut divides counts as two.
Not here: where the text comes from (data.py), attention over prefix and target (model.py).

Sources: UL2 (Tay et al., arXiv 2205.05131, table 1); span corruption, T5 (Raffel et al., arXiv 1910.10683).
Legend: B rows, T tokens, n tokens of text in a row, m of them in spans, s spans.
"""

from typing import NamedTuple

import numpy as np

from data import NO_TARGET, Corpus, masked_per_window, rng
from prepare import SEP, prepared


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
    "causal": Denoiser(1, 0, 1.0),  # a plain language model; not one of UL2's seven
}  # fmt: skip
UL2 = "r3,r8,s,x3,x8,x64,x64half"


def mixture(text):
    """{name: share} of "r3,s:2,x8": names with weights (1 where none is given). ValueError for what is not there."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition(":")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            weights[name] = -1.0
        if name not in DENOISERS or not 0 < weights[name] < 1e6:
            raise ValueError(
                f"--denoisers {part}: give names of {', '.join(DENOISERS)}, each with a weight above 0, as in r3,s:2"
            )
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def sentinels(seq):
    """How many there are: enough for x3, which takes the most spans (a piece costs two tokens beside its text)."""
    return seq // 6 + 8


def extra_tokens(seq):
    """Token ids that a model of sequences of `seq` tokens needs beyond the tokenizer's: the modes, then the sentinels."""
    return len(MODES) + sentinels(seq)


# ----------------------------------------------------------------------------------------------------------------
# Which tokens are in spans


def parts(total, count, generator):
    """(B, max count): each row's `total` (B,) split at random into its `count` (B,) parts of at least 1; 0 beyond."""
    longest, most = int(total.max()), int(count.max())
    key = generator.random((len(total), max(1, longest - 1)))
    key[np.arange(key.shape[1]) >= total[:, None] - 1] = 2.0
    order = key.argsort(1).argsort(1)  # the places of the count - 1 smallest keys are the cuts
    cut = (order < count[:, None] - 1).cumsum(1)
    part = np.concatenate([np.zeros((len(total), 1), int), cut], 1)[:, :longest]
    inside = np.arange(longest) < total[:, None]
    lengths = np.zeros((len(total), most), int)
    np.add.at(lengths, (np.nonzero(inside)[0], part[inside]), 1)
    return lengths


def span_mask(denoiser, rows, size, generator):
    """(mask (B, size): which tokens of the text are in spans; n (B,): how many tokens of text a row holds)."""
    place = np.arange(size)
    if denoiser.span == 0:
        return np.ones((rows, size - 1), bool), np.full(rows, size - 1)
    if denoiser.span is None:  # lengths 1 .. n/2, evenly: n/4 in the mean
        n = np.full(rows, size - 3)
        m = generator.integers(1, n // 2 + 1)
        return (place >= (n - m)[:, None]) & (place < n[:, None]), n
    # The number of spans, rounded at random so that its mean is right, cut pieces included; then what fits.
    mean = denoiser.rate * (size - 1) / (denoiser.span + 2 * denoiser.rate)
    expected = mean - denoiser.rate * (1 - 1 / denoiser.span)
    s = np.maximum(1, np.floor(expected + generator.random(rows))).astype(int)
    n = size - 1 - 2 * s
    m = np.floor(denoiser.rate * n + generator.random(rows)).astype(int)
    divided = generator.random(rows) < (m - s) / n  # does the cut of the circle fall inside a span?
    n = n - 2 * divided
    m = np.clip(m, s + divided, n - s)
    spans, gaps = parts(m, s, generator), parts(n - m, s, generator)
    ends = np.stack([gaps, spans], 2).reshape(rows, -1).cumsum(1)
    circle = np.zeros((rows, size + 1), int)
    np.add.at(circle, (np.arange(rows)[:, None], np.minimum(ends, size)), 1)
    circle = (circle.cumsum(1) % 2 == 1)[:, :size] & (place < n[:, None])  # odd segments are spans
    before = np.take_along_axis(circle, (place - 1) % n[:, None], 1)
    allowed = ((circle & before) == divided[:, None]) & (place < n[:, None])
    start = np.argmax(np.where(allowed, generator.random(allowed.shape), -1.0), 1)
    return np.take_along_axis(circle, (place + start[:, None]) % n[:, None], 1) & (place < n[:, None]), n


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
    whole = ~kept.any(1)  # nothing to read: no sentinel, the text itself is the target
    begins = mask & ~np.concatenate([np.zeros((B, 1), bool), mask[:, :-1]], 1) & ~whole[:, None]
    sentinel = first_extra + len(MODES) + begins.cumsum(1) - 1
    prefix = 1 + kept.sum(1) + begins.sum(1)
    length = prefix + mask.sum(1) + begins.sum(1) + 1
    T = int(length.max()) - 1
    row = np.full((B, T + 2), NO_TARGET)
    row[:, 0] = first_extra + mode
    at = np.arange(B)[:, None]
    # where each token of text, and each sentinel, goes: once in the prefix, once in the target; T + 1 is nowhere
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
    """Rows of `seq` tokens from text (B, seq), one denoiser by name for each; vocab: the tokenizer's."""
    tokens, prefix, targets = np.empty((len(text), seq), int), np.empty(len(text), int), np.empty((len(text), seq), int)
    for name in sorted(set(names)):
        own = np.flatnonzero(np.asarray(names) == name)
        denoiser = DENOISERS[name]
        mask, n = span_mask(denoiser, len(own), seq, generator)
        offset = (generator.random(len(own)) * (text.shape[1] - n + 1)).astype(int)  # any part of the window may be left out
        shifted = np.take_along_axis(text[own], np.minimum(offset[:, None] + np.arange(mask.shape[1]), text.shape[1] - 1), 1)
        tokens[own], prefix[own], targets[own] = corrupt(shifted, mask, n, denoiser.mode, vocab)
    return tokens, prefix, targets


class Denoised:
    """A corpus (data.py) as UL2 sees it, with the methods that train.py asks of either."""

    def __init__(self, corpus, weights):
        self.corpus, self.weights = corpus, weights
        self.meta, self.fingerprint, self.count, self.order = corpus.meta, corpus.fingerprint, corpus.count, corpus.order
        self.tokenizer_vocab = corpus.vocab

    def rows(self, windows, seq, generator):
        names = generator.choice(list(self.weights), len(windows), p=list(self.weights.values()))
        return denoise(windows[:, 1:], names, self.tokenizer_vocab, seq, generator)

    def batch(self, seed, step, size, seq):
        """Training batch of step `step`: tokens (B, T), prefix (B,), targets (B, T), as int64 arrays."""
        windows = self.corpus.windows("train", seq, self.order(seed, step, size, seq))
        return self.rows(windows, seq, rng(seed, "denoise", step))

    def fixed(self, size, seq, tuning=False):
        """Held-out rows that never change, as Corpus.fixed."""
        return self.rows(self.corpus.held_out(size, seq, tuning), seq, rng(0, "evaluation"))

    def unigram_loss(self, targets):
        """Mean loss, in nats, of predicting targets by their frequency among those of some training batches."""
        seq = targets.shape[1]
        seen = np.concatenate([self.batch(0, step, 64, seq)[2].ravel() for step in range(1, 33)])
        counts = np.bincount(seen[seen != NO_TARGET], minlength=self.tokenizer_vocab + extra_tokens(seq)) + 1.0
        return float(-np.log(counts / counts.sum())[targets[targets != NO_TARGET]].mean())


def view(args, corpus):
    """A corpus as the model of --arch sees it."""
    return Denoised(corpus, mixture(args.denoisers)) if args.arch == "ul2" else corpus


def model_vocab(args, vocab=None):
    """Token ids of the model of --arch, with a tokenizer of `vocab` ids (--vocab where there is none yet)."""
    return (vocab or args.vocab) + (extra_tokens(args.seq) if args.arch == "ul2" else 0)


def targets_per_row(args):
    """Positions of a row that the head runs on, in the mean."""
    if args.arch == "bert":
        return masked_per_window(args.seq)
    weights, blank = mixture(args.denoisers), np.zeros((256, args.seq), int)
    rows = {name: denoise(blank[:, 1:], [name] * 256, 1000, args.seq, rng(0, "count"))[2] for name in weights}
    return sum(share * (rows[name] != NO_TARGET).sum() / 256 for name, share in weights.items())


def show(ids, tokenizer):
    """Tokens in words: modes and sentinels as they are named here."""
    words, V = [], tokenizer.vocab_size()
    for i in ids:
        extra = int(i) - V
        name = MODES[extra] if 0 <= extra < len(MODES) else f" <{extra - len(MODES)}>"
        words.append(tokenizer.id_to_piece(int(i)).replace("▁", " ") if extra < 0 else name)
    return "".join(words)


def main():
    import textwrap

    corpus, seq = Corpus(prepared()), 48
    window = corpus.windows("train", 64, [77])[:, 1 : seq + 1]
    print(f"\n  {show(window[0], corpus.tokenizer).strip()}\n")
    for name, denoiser in DENOISERS.items():
        tokens, prefix, targets = denoise(window, [name], corpus.vocab, seq, rng(0, name))
        kind = {None: "a tail of a quarter", 0: "everything"}.get(denoiser.span, f"spans of {denoiser.span}, {denoiser.rate:.0%}")
        print(f"  {name}: {kind}")
        for sign, ids in (("reads ", tokens[0, : prefix[0]]), ("writes", targets[0, prefix[0] - 1 :])):
            lines = textwrap.wrap(show(ids, corpus.tokenizer).strip(), 100)
            print("\n".join(f"    {sign if i == 0 else '':6} {line}" for i, line in enumerate(lines)))
        print()


if __name__ == "__main__":
    main()
