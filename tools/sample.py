"""Ask a trained model: a BERT fills masks, a UL2 continues a text or fills its gaps.

    python -m tools.sample out/bert_toy-raptr-0 "If the [MASK] is empty, [MASK] is returned."
    python -m tools.sample out/ul2_toy-raptr-0 "Return the"
    python -m tools.sample out/ul2_toy-raptr-0 "Return a ___ of all elements that ___."
    python -m tools.sample RUN TEXT --layers 3          the full model, and beside it a random path of 3 layers
    python -m tools.sample RUN --held_out 3             ask about three sentences that it has not seen

Without a text it asks for one, again and again. Not here: decoding with a cache (UL2.generate in model.py).
"""

import functools
import random
import sys

import numpy as np
import torch

from data import MODES, sentinels
from engine.errors import UserError, guard
from engine.options import command, count, natural, nonnegative, portion
from engine.runs import load_run, own_text
from raptr import RaPTr, Stage, picture
from text.documents import without_surrogates
from text.prepare import CLS, MASK, PAD, SEP, SPECIAL, UNK

GAP = "___"


def parts(text, gap):
    """What stands before, between and after the gaps of a text, without the space before a gap: a tokenizer's words
    begin with theirs."""
    *before, last = text.split(gap)
    return [*(part.removesuffix(" ") for part in before), last]


# ----------------------------------------------------------------------------------------------------------------
# BERT


@torch.no_grad()
def fill(model, tokenizer, text, subnetwork=None):
    """Probabilities (M, V) of every token at each of the M places of a text that say [MASK].

    Raises UserError if there is none, or the text is longer than the model's sequences.
    """
    pieces = [tokenizer.encode(piece) for piece in parts(text, "[MASK]")]
    cls, sep, mask = tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.piece_to_id("[MASK]")
    ids = [cls, *pieces[0]]
    for piece in pieces[1:]:
        ids += [mask, *piece]
    ids.append(sep)
    if len(ids) > model.config.seq:
        raise UserError(f"the text has {len(ids)} tokens, and the model was trained on {model.config.seq} (--seq)")
    tokens = torch.tensor([ids])
    masked = (tokens == mask).nonzero()[:, 1][None]
    if not masked.numel():
        raise UserError("there is no [MASK] in the text")
    logits = model.logits(tokens, masked, subnetwork)[0, :, : tokenizer.vocab_size()]
    logits[:, [tokenizer.pad_id(), tokenizer.unk_id(), cls, sep, mask]] = -torch.inf  # a word is asked for
    return logits.float().softmax(-1)


def show_fill(model, tokenizer, text, paths, top):
    """Print the likeliest words for each mask, one column per path. paths: [(title, subnetwork)]."""
    columns = [fill(model, tokenizer, text, subnetwork) for _, subnetwork in paths]
    top = min(top, tokenizer.vocab_size() - SPECIAL)
    for mask in range(len(columns[0])):
        titles = "".join(f"  {title:32}" for title, _ in paths).rstrip()
        print(f"\n  mask {mask + 1}{titles}")
        best = [column[mask].topk(top) for column in columns]
        for rank in range(top):
            cells = []
            for chances, ids in best:
                word, chance = tokenizer.id_to_piece(int(ids[rank])), float(chances[rank])
                word = word.replace("▁", " ").strip() or "(space)"
                cells.append(f"  {word[:16]:16} {chance:5.1%} {'█' * round(8 * chance):9}")
            print(("        " + "".join(cells)).rstrip())


# ----------------------------------------------------------------------------------------------------------------
# UL2


def pick(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Draw one token id (B,) per row of logits (B, V).

    temperature: divides the logits; 0 takes the likeliest. top_k: draw among the k likeliest (0: all). top_p: draw
    among the likeliest that together have this probability (Holtzman et al., arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits.float().sort(descending=True)
    shares = (logits / temperature).softmax(-1)
    if top_k:
        shares[:, top_k:] = 0
    shares[:, 1:][shares.cumsum(-1)[:, :-1] >= top_p] = 0  # the likeliest always stays
    return order.gather(-1, torch.multinomial(shares, 1, generator=generator))[:, 0]


def write(model, tokenizer, text, limit, subnetwork=None, choose=None):
    """Fill every ___ of a text, or continue it if there is none. Returns [(piece, whether the model wrote it), ...].

    The prefix is what a denoiser shows: [X] and a sentinel per gap, or [S] and one sentinel at the end. The model then
    writes each sentinel and what belongs there. limit: tokens that it writes at most. choose: as for UL2.generate.
    Raises UserError for more gaps than there are sentinels, or a text that leaves no room in the model's sequences.
    """
    V, T = tokenizer.vocab_size(), model.config.seq
    first_sentinel, mode = V + len(MODES), V + MODES.index("[X]" if GAP in text else "[S]")
    kept = parts(text, GAP) if GAP in text else [text, ""]
    gaps = len(kept) - 1
    if gaps > sentinels(T):
        raise UserError(f"the model knows only {sentinels(T)} gaps")
    prefix = [mode]
    for i, part in enumerate(kept):
        prefix += tokenizer.encode(part) + ([first_sentinel + i] if i < gaps else [])
    room = T - len(prefix)
    if room < 2:
        raise UserError(f"the text has {len(prefix)} tokens, and the model was trained on {T} in all (--seq)")
    banned = [PAD, UNK, CLS, MASK, *range(V, V + len(MODES))]
    most = min(room - 1, limit + gaps)  # sentinels count as well; the first one is given
    [ids] = model.generate([prefix], first_sentinel, {SEP}, banned, most, subnetwork, choose)
    written, gap = {}, 0
    for token in ids:
        if token >= V:
            gap = token - first_sentinel
        elif token >= SPECIAL:
            written.setdefault(gap, []).append(token)
    pieces = [(kept[0], False)]
    for i, part in enumerate(kept[1:]):
        pieces += [(tokenizer.decode(written.get(i, [])), True), (part, False)]
    return pieces


def show_written(pieces):
    marks = ("\033[1;36m", "\033[0m") if sys.stdout.isatty() else ("«", "»")
    print("  " + "".join(f"{marks[0]}{piece}{marks[1]}" if ours else piece for piece, ours in pieces))


# ----------------------------------------------------------------------------------------------------------------
# Held-out text as questions


def sentences(corpus, tokenizer, seq, count, seed):
    """Up to `count` sentences of the held-out text, 35 to 65 characters long, drawn at random."""
    found = set()
    for window in corpus.held_out(1024, 4 * seq):
        documents = [tokenizer.decode(ids.tolist()) for ids in np.split(window, np.flatnonzero(window == SEP) + 1)]
        whole = [text.split(". ") for text in documents]
        del whole[0][0], whole[-1][-1:]  # a window begins and ends anywhere
        found |= {text.rstrip(".") + "." for texts in whole for text in texts if text[:1].isupper()}
    found = [text for text in found if 35 <= len(text) <= 65 and text[-3:-1].isalpha()]  # not "e.g."
    found = [text for text in found if len(tokenizer.encode(text)) < seq - 8]
    return random.Random(seed).sample(sorted(found), min(count, len(found)))


def question(sentence, tokenizer, arch, seed):
    """(text, answer): a sentence with a word masked, which the tokenizer knows as one piece, or for UL2 its first
    half. None if there is no such word."""
    words = sentence.split(" ")
    if arch == "ul2":
        half = len(words) // 2
        return " ".join(words[:half]), " ".join(words[half:])
    known = [i for i, word in enumerate(words) if i and word.isalpha() and len(tokenizer.encode(f" {word}")) == 1]
    long = [i for i in known if len(words[i]) > 3]
    if not long:
        return None
    place = random.Random(f"{seed} {sentence}").choice(long)
    return " ".join([*words[:place], "[MASK]", *words[place + 1 :]]), words[place]


def ask_held_out(model, tokenizer, paths, flags, args):
    """Ask --held_out questions, and print what the text says."""
    corpus = own_text(args.run, flags)
    drawn = sentences(corpus, tokenizer, flags.seq, 20 * args.held_out, args.seed)
    asked = [q for sentence in drawn if (q := question(sentence, tokenizer, flags.arch, args.seed))][: args.held_out]
    if not asked:
        raise UserError(f"{corpus.folder}: no short sentence in its held-out text")
    print("\n  From text that the model has not seen:")
    for text, right in asked:
        print(f"\n  {text}\n  the text says: {right}")
        answer(model, tokenizer, text, paths, args)


# ----------------------------------------------------------------------------------------------------------------
# The command


def paths_to_show(model, args):
    """[(title, subnetwork)]: the full model, and with --layers a random path, which is drawn."""
    L, paths = len(model.blocks), [("full model", None)]
    if 0 < args.layers < L:
        pinned = {0, L - 1} if args.layers > 1 else set()
        path = RaPTr([Stage(1, 1, args.layers)], L, pinned).path(args.layers, f"{args.seed}")
        paths.append((f"{args.layers} of {L} layers", path))
        print(f"\n  the path of {args.layers} layers: {picture(path.layers, L)}")
    return paths


def answer(model, tokenizer, text, paths, args):
    """Print what each path says."""
    text = without_surrogates(text)  # bytes of the command line that are not UTF-8
    if model.config.arch == "bert":
        return show_fill(model, tokenizer, text, paths, args.top)
    for title, path in paths:
        how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        choose = functools.partial(pick, **how, generator=torch.Generator().manual_seed(args.seed))
        print(f"\n  {title}:")
        show_written(write(model, tokenizer, text, args.tokens, path, choose))


def main():
    parser = command("tools.sample", __doc__)
    add = parser.add_argument
    add("run", help="run folder of train.py")
    add("text", nargs="?", help="BERT: with [MASK] in it; UL2: with ___ in it, or to be continued")
    add("--held_out", type=count, default=0, metavar="N", help="ask about N sentences of the run's held-out text")
    add("--layers", type=count, default=0, help="show also a random path of so many layers")
    add("--top", type=count, default=5, help="BERT: words to show for each mask [5]")
    add("--tokens", type=count, default=40, help="UL2: most tokens to write [40]")
    add("--temperature", type=nonnegative, default=0.7, help="UL2: divides the logits; 0: take the likeliest [0.7]")
    add("--top_k", type=natural, default=0, help="UL2: draw among the k likeliest; 0: all [0]")
    add("--top_p", type=portion, default=0.95, help="UL2: draw among the likeliest of this probability [0.95]")
    add("--seed", type=natural, default=random.randrange(1000), help="of path, words and sentences [random]")
    args, unknown = parser.parse_known_intermixed_args()  # flags may stand between RUN and TEXT
    if unknown:
        parser.parse_args(["run", "text", *unknown])  # refuses them
    model, tokenizer, flags = load_run(args.run)
    paths = paths_to_show(model, args)
    if args.text is not None:
        answer(model, tokenizer, args.text, paths, args)
        return print()
    if args.held_out:
        ask_held_out(model, tokenizer, paths, flags, args)
        return print()
    kind = "with [MASK] in it" if model.config.arch == "bert" else "to be continued, or with ___ in it"
    print(f"\n  A text {kind}; an empty line ends.")
    sys.stdin.reconfigure(errors="replace")
    try:
        while text := input("\n> ").strip():
            try:
                answer(model, tokenizer, text, paths, args)
            except UserError as error:  # ask again
                print(f"  {error}")
            print()
    except EOFError:
        print()


if __name__ == "__main__":
    guard("tools.sample", main)
