"""--method NAME: the object that says, step by step, which part of the network trains. No torch, so that --help is
fast.

To add a method, write a class built on raptr.Full, whose docstrings say what to answer, a function here that makes it
from the flags, and its line in METHODS.
"""

from raptr import Full, RaPTr, Stage, stage_plan
from stacking import SOURCES, Stacking


def random_part(args):
    """RaPTr. With a single stage it is constant stochastic depth."""
    if args.method == "constant":
        plan = [Stage(1, args.steps, args.mean_depth or 0.75 * args.layers)]
    else:
        plan = plan_of(args)
    pinned = pinned_layers(args)
    if args.part == "depth":
        return RaPTr(plan, args.layers, pinned, args.sampling, args.scaling, args.seed)
    from methods.width import RandomWidth  # here, because `python -m methods.width` loads this file first

    return RandomWidth(plan, args.layers, pinned, args.sampling, args.scaling, args.seed, args.part, args.heads)


def dropping(args):
    from methods import layerdrop

    return getattr(layerdrop, args.method)(args.layers, args.steps, args.mean_depth, args.seed)


def ramp(args):
    from methods.layerdrop import Ramp

    return Ramp(args.layers, args.steps)


def growing(args):
    return Stacking(SOURCES[args.method], plan_of(args), args.layers, only_new=args.method == "mslt")


def jump(args):
    """From 3 layers (or the first of --stages) to all, at a third of the steps or where --mean_depth asks for it."""
    L, T, K = args.layers, args.steps, args.mean_depth
    first = 3 if args.stages == "auto" else int(stages(args)[0])
    share = (L - K) / max(1, L - first) if K else 1 / 3  # of the steps before the jump: share first + (1 - share) L = K
    at = round(T * share)
    if first >= L or not 1 <= at < T:
        raise ValueError(f"--method jump: cannot jump from {first} (--stages, one number) to {L} layers (--mean_depth)")
    return Stacking(SOURCES["jump"], [Stage(1, at, first), Stage(at + 1, T, L)], L)


# The flags that each method reads, in its object or in train.py. `options.parse` warns about a flag that another method
# reads and this one does not.
STAGED = {"stages", "alpha", "full_warmup"}
DRAWN = {"fixed", "sampling", "scaling", "part"}
GROWN = {"moments", "growth_warmup"}

METHODS = {  # name: (from the flags to the object, the flags it reads)
    "full": (lambda args: Full(args.layers), set()),
    "raptr": (random_part, STAGED | DRAWN),
    "constant": (random_part, DRAWN | {"mean_depth"}),
    "pld": (dropping, {"mean_depth"}),
    "layerdrop": (dropping, {"mean_depth"}),
    "decreasing": (dropping, {"mean_depth"}),
    "ramp": (ramp, set()),
    "stacking": (growing, STAGED | GROWN),
    "progressive": (growing, STAGED | GROWN),
    "midas": (growing, STAGED | GROWN),
    "mslt": (growing, STAGED | GROWN),
    "jump": (jump, GROWN | {"mean_depth", "stages"}),
}
READ_BY_SOME = set.union(*(reads for _, reads in METHODS.values()))


def choose(args):
    """The method that the flags name. Raises ValueError for one that cannot be."""
    if args.mean_depth is not None and args.mean_depth > args.layers:
        raise ValueError(f"--mean_depth {args.mean_depth:g}: there are only {args.layers} layers (--layers)")
    return METHODS[args.method][0](args)


def reads(args):
    """The flags that the chosen method reads."""
    in_width_only = {"fixed", "sampling", "scaling"} if args.part == "width" else set()
    return METHODS[args.method][1] - in_width_only


def plan_of(args):
    return stage_plan(stages(args), args.steps, args.layers, args.alpha, args.full_warmup)


# --stages auto, as shares of all layers. For 12 layers: RaPTr's 6-8-10-12 and stacking's 6-9-12, which cost 3/4;
# progressive's doubling from 3; and MSLT's 6-9-12, with a stage at the end that trains them all.
AUTO = {
    "progressive": (1 / 4, 1 / 2, 1),
    "stacking": (1 / 2, 3 / 4, 1),
    "midas": (1 / 2, 3 / 4, 1),
    "mslt": (1 / 2, 3 / 4, 1, 1),
}


def stages(args):
    """Layers per stage, from --stages. Raises ValueError for what is not a list of numbers."""
    if args.stages == "auto":
        return [round(share * args.layers) for share in AUTO.get(args.method, (1 / 2, 2 / 3, 5 / 6, 1))]
    try:
        lengths = [float(k) for k in args.stages.split("-")]
    except ValueError:
        raise ValueError(f"--stages {args.stages}: give layers per stage like 6-8-10-12") from None
    if args.method in ("raptr", "constant") and args.part != "depth" and lengths[-1] in (1, args.heads):
        return [k / lengths[-1] * args.layers for k in lengths]  # shares of the width, or heads
    return lengths


def pinned_layers(args):
    """The layers that --fixed names. Raises ValueError for one it does not know."""
    words = {"first": 0, "last": args.layers - 1}
    try:
        return {words[w] if w in words else int(w) for w in args.fixed.split(",") if w != "none"}
    except ValueError:
        raise ValueError(f"--fixed {args.fixed}: name layers by number, first, last, or none, with commas") from None
