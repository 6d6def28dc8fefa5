"""--method NAME: the object that says, step by step, which part of the network trains.

A method of your own is a class built on raptr.Full (its docstrings say what to answer) and a line in NAMES, READS, choose.
"""

import layerdrop
from raptr import Full, RaPTr, Stage, stage_plan
from stacking import SOURCES, Stacking, fresh, progressive

GROWING = ["stacking", "progressive", "midas", "mslt", "jump"]
NAMES = ["full", "raptr", "constant", "pld", "layerdrop", "decreasing", "ramp", *GROWING]

# The flags each method reads; any other of these earns a warning.
STAGED, DRAWN, NARROWED = {"stages", "alpha"}, {"fixed", "sampling", "scaling"}, {"part", "width_scaling"}
GROWN = {"moments", "growth_warmup"}
READS = {
    "full": set(),
    "raptr": STAGED | DRAWN | NARROWED | {"full_warmup"},
    "constant": DRAWN | NARROWED | {"mean_depth"},
    "pld": {"mean_depth", "theta_bar", "gamma"},
    "layerdrop": {"mean_depth", "drop_rate"},
    "decreasing": STAGED | {"full_warmup", "mean_depth", "p_max", "drop_time", "drop_depth", "drop_gate", "drop_scale"},
    "ramp": {"ramp_share"},
    **{name: STAGED | GROWN | {"full_warmup"} for name in GROWING},
    "jump": GROWN | {"mean_depth", "jump_from", "jump_at", "jump_init"},
}


def reads(args):
    """The flags that the chosen method reads."""
    other = STAGED | {"full_warmup"} if args.drop_time == "line" else {"mean_depth", "p_max"}
    idle = {"depth": {"width_scaling"}, "width": DRAWN, "both": set()}[args.part]
    return READS[args.method] - (other if args.method == "decreasing" else idle)


# --stages auto, in parts of all layers: for 12 layers RaPTr's 6-8-10-12 and stacking's 6-9-12 (3/4 of the cost),
# progressive's doubling from 3, and mslt's 6-9-12 with a stage at the end that trains them all.
AUTO = {"progressive": (1 / 4, 1 / 2, 1), "stacking": (1 / 2, 3 / 4, 1), "midas": (1 / 2, 3 / 4, 1), "mslt": (1 / 2, 3 / 4, 1, 1)}


def stages(args):
    if args.stages == "auto":
        return [round(part * args.layers) for part in AUTO.get(args.method, (1 / 2, 2 / 3, 5 / 6, 1))]
    try:
        lengths = [float(k) for k in args.stages.split("-")]
    except ValueError:
        raise ValueError(f"--stages {args.stages}: give layers per stage like 6-8-10-12") from None
    if "part" in READS[args.method] and args.part != "depth" and lengths[-1] in (1, args.heads):
        lengths = [k / lengths[-1] * args.layers for k in lengths]  # parts of the width, or heads: as many layers' cost
    return lengths


def fixed_layers(args):
    words = {"first": 0, "last": args.layers - 1}
    try:
        return {words[w] if w in words else int(w) for w in args.fixed.split(",") if w != "none"}
    except ValueError:
        raise ValueError(f"--fixed {args.fixed}: name layers by number, first, last, or none, with commas") from None


def random_part(args, plan):
    more = {"part": args.part, "slices": args.heads, "gain": args.width_scaling}
    return RaPTr(plan, args.layers, fixed_layers(args), args.sampling, args.scaling, args.seed, **more)


def choose(args):
    """The method that the flags name. ValueError for one that cannot be."""
    L, T, K = args.layers, args.steps, args.mean_depth
    if K is not None and K > L:
        raise ValueError(f"--mean_depth {K:g}: there are only {L} layers (--layers)")
    kind = args.method
    if kind == "full":
        return Full(L)
    if kind == "ramp":
        return layerdrop.Ramp(L, T, args.ramp_share)
    if kind == "constant":
        return random_part(args, [Stage(1, T, K or 0.75 * L)])
    if kind == "pld":
        theta_bar = layerdrop.theta_bar_for(K, L, layerdrop.mean_settling(T, args.gamma)) if K else args.theta_bar
        if theta_bar < 0:
            raise ValueError(f"--mean_depth {K:g}: progressive layer dropping keeps at least {(L - 1) / 2:g} of {L} layers")
        return layerdrop.pld(L, T, theta_bar, args.gamma, seed=args.seed)
    if kind == "layerdrop":
        return layerdrop.layerdrop(L, 1 - K / L if K else args.drop_rate, seed=args.seed)
    if kind == "jump":
        at = (L - K) / max(1, L - args.jump_from) if K else args.jump_at
        if args.jump_from >= L or not 1 <= round(at * T) < T:
            raise ValueError(f"--jump_from {args.jump_from}: no jump from there to {L} layers has this cost (--mean_depth)")
        plan = [Stage(1, round(at * T), args.jump_from), Stage(round(at * T) + 1, T, L)]
        return Stacking(progressive if args.jump_init == "copy" else fresh, plan, L)
    if kind == "decreasing" and args.drop_time == "line":
        p_max, plan = 4 * (1 - K / L) if K else args.p_max, None
        if p_max > 1:
            raise ValueError(f"--mean_depth {K:g}: decreasing dropout on a line keeps at least {0.75 * L:g} of {L} layers")
    else:
        if kind == "decreasing" and K:
            raise ValueError("--mean_depth settles decreasing dropout on a line; with --drop_time staircase give --stages")
        plan, p_max = stage_plan(stages(args), T, L, args.alpha, args.full_warmup), None
    if kind == "decreasing":
        more = {"gate": args.drop_gate, "inverse": args.drop_scale == "inverse", "batch": args.batch, "seed": args.seed}
        return layerdrop.decreasing(L, T, p_max, args.drop_depth, plan, **more)
    if kind in SOURCES:
        return Stacking(SOURCES[kind], plan, L, only_new=kind == "mslt")
    return random_part(args, plan)
