"""Ask a trained model: a BERT fills masks, a UL2 writes on, or writes what is missing.

    python sample.py out/bert_toy-raptr-0 "If the [MASK] is empty, [MASK] is returned."
    python sample.py out/ul2_toy-raptr-0 "Return a new"
    python sample.py out/ul2_toy-raptr-0 "Return a ___ of all elements that ___."
    python sample.py RUN TEXT --layers 6          the same from 6 random layers, beside the full model

Without a text it asks for one, again and again. Not here: how the model was trained (train.py).
"""

import argparse
import random
import sys

import denoisers
import torch

from engine.errors import UserError
from engine.runs import load_run
from raptr import RaPTr, Stage, draw
from text import prepare

GAP = "___"


# ----------------------------------------------------------------------------------------------------------------
# BERT


@torch.no_grad()
def fill(model, tokenizer, text, subnetwork=None):
    """For each [MASK] of a text, the probabilities (V,) of every token there."""
    parts = [tokenizer.encode(part) for part in text.split("[MASK]")]
    cls, sep, mask = tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.piece_to_id("[MASK]")
    ids = [cls, *parts[0]]
    for part in parts[1:]:
        ids += [mask, *part]
    ids.append(sep)
    if len(ids) > model.config.seq:
        raise UserError(f"the text has {len(ids)} tokens, and the model was trained on {model.config.seq} (--seq)")
    tokens = torch.tensor([ids])
    masked = (tokens == mask).nonzero()[:, 1][None]
    if not masked.numel():
        raise UserError("there is no [MASK] in the text")
    logits = model.logits(tokens, masked, subnetwork)[0, :, : tokenizer.vocab_size()]
    logits[:, [tokenizer.pad_id(), tokenizer.unk_id(), cls, sep, mask]] = -torch.inf
    return logits.float().softmax(-1)


def show_fill(model, tokenizer, text, paths, top):
    columns = [fill(model, tokenizer, text, path) for _, path in paths]
    for number in range(len(columns[0])):
        print(
            f"\n  mask {number + 1}"
            + "".join(f"{title:>32}" if i else f"  {title:26}" for i, (title, _) in enumerate(paths))
        )
        best = [column[number].topk(top) for column in columns]
        for rank in range(top):
            cells = []
            for values, ids in best:
                word = tokenizer.id_to_piece(int(ids[rank])).replace("▁", " ").strip() or "(space)"
                cells.append(f"{word[:16]:16} {values[rank]:5.1%} {'█' * round(8 * float(values[rank])):8}")
            print("          " + "  ".join(cells).rstrip())


# ----------------------------------------------------------------------------------------------------------------
# UL2


def pick(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token id from logits (V,). temperature 0: the likeliest. top_k: among so many. top_p: among the likeliest that
    together have this probability (Holtzman et al., arXiv 1904.09751)."""
    if temperature == 0:
        return int(logits.argmax())
    logits, order = logits.float().sort(descending=True)
    shares = (logits / temperature).softmax(-1)
    if top_k:
        shares[top_k:] = 0
    shares[1:][shares.cumsum(-1)[:-1] >= top_p] = 0  # the first one always stays
    return int(order[torch.multinomial(shares, 1, generator=generator)])


@torch.no_grad()
def generate(model, prefix, first, stop, banned, limit, subnetwork=None, **how):
    """Token ids that follow `prefix`, one after another, `first` being the first, until one of `stop` or `limit` of them.

    Keys and values of what was read are kept, so each token costs one position. banned: ids that never come.
    """
    past, written = {}, [first]
    model.encode(torch.tensor([prefix]), subnetwork, past=past)  # a prefix is read in both directions: no mask
    while len(written) < limit and written[-1] not in stop:
        state = model.encode(torch.tensor([written[-1:]]), subnetwork, past=past)[0, -1]
        logits = model.predict(state)
        logits[banned] = -torch.inf
        written.append(pick(logits, **how))
    return written


def write(model, tokenizer, text, limit, subnetwork=None, **how):
    """A text with every ___ filled, or continued if there is none, as [(piece, whether the model wrote it), ...]."""
    V = tokenizer.vocab_size()
    sentinel, mode = V + len(denoisers.MODES), V + (2 if GAP in text else 1)  # [X] for gaps, [S] to go on
    parts = text.split(GAP) if GAP in text else [text, ""]
    if len(parts) - 1 > denoisers.sentinels(model.config.seq):
        raise UserError(f"the model knows only {denoisers.sentinels(model.config.seq)} gaps")
    prefix = [mode]
    for i, part in enumerate(parts):
        prefix += tokenizer.encode(part) + ([sentinel + i] if i < len(parts) - 1 else [])
    room = model.config.seq - len(prefix)
    if room < 2:
        raise UserError(
            f"the text has {len(prefix)} tokens, and the model was trained on {model.config.seq} in all (--seq)"
        )
    banned = [prepare.PAD, prepare.UNK, prepare.CLS, prepare.MASK, *range(V, V + len(denoisers.MODES))]
    written = generate(model, prefix, sentinel, {prepare.SEP}, banned, min(room, limit + len(parts)), subnetwork, **how)
    gaps, current = {}, None
    for token in written:
        if token >= V:
            current = gaps.setdefault(token - sentinel, [])
        elif current is not None and token >= prepare.SPECIAL:
            current.append(token)
    pieces = []
    for i, part in enumerate(parts):
        pieces += [(part, False)] + ([(tokenizer.decode(gaps.get(i, [])), True)] if i < len(parts) - 1 else [])
    return pieces


def show_written(pieces):
    marks = ("\033[1;36m", "\033[0m") if sys.stdout.isatty() else ("«", "»")
    print("  " + "".join(f"{marks[0]}{piece}{marks[1]}" if own else piece for piece, own in pieces))


# ----------------------------------------------------------------------------------------------------------------


def answer(model, tokenizer, text, args):
    L, paths = len(model.blocks), [("full model", None)]
    if args.layers and args.layers < L:
        fixed = {0, L - 1} if args.layers > 1 else set()
        path = RaPTr([Stage(1, 1, args.layers)], L, fixed).path(args.layers, f"{args.seed}")
        paths.append((f"{args.layers} of {L} layers", path))
        print(f"\n  the path of {args.layers} layers: {draw(path.layers, L)}")
    if model.config.arch == "bert":
        show_fill(model, tokenizer, text, paths, args.top)
        return print()
    for title, path in paths:
        how = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        generator = torch.Generator().manual_seed(args.seed)
        print(f"\n  {title}:")
        show_written(write(model, tokenizer, text, args.tokens, path, generator=generator, **how))
    print()


def main():
    from engine.options import Parser, count, natural, nonnegative, number

    parser = Parser(
        prog="sample.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="run folder of train.py")
    parser.add_argument("text", nargs="?", help="with [MASK] for a BERT, with ___ or to be continued for a UL2")
    parser.add_argument("--layers", type=count, default=0, help="show also what so many random layers say")
    parser.add_argument("--top", type=count, default=5, help="BERT: how many words for each mask [5]")
    parser.add_argument("--tokens", type=count, default=40, help="UL2: how many at most [40]")
    parser.add_argument(
        "--temperature", type=nonnegative, default=0.7, help="UL2: 0 takes the likeliest each time [0.7]"
    )
    parser.add_argument("--top_k", type=natural, default=0, help="UL2: among the k likeliest; 0: all")
    share = number(float, "a share above 0, up to 1", lambda x: 0 < x <= 1)
    parser.add_argument(
        "--top_p", type=share, default=0.95, help="UL2: among the likeliest with this probability together [0.95]"
    )
    parser.add_argument("--seed", type=natural, default=random.randrange(1000), help="of path and words")
    args = parser.parse_args()
    try:
        model, tokenizer, _ = load_run(args.run)
        if args.text is not None:
            return answer(model, tokenizer, args.text, args)
        kind = "with [MASK] in it" if model.config.arch == "bert" else "to be continued, or with ___ in it"
        print(f"\n  A text {kind}; an empty line ends.")
        while text := input("\n> ").strip():
            answer(model, tokenizer, text, args)
    except EOFError:
        print()
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
