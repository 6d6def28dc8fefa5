"""From a budget to a schedule: flags with which an arm costs 1 / budget of the layer FLOPs of full training.

An arm is a method with its schedule, or full training in another size or length (studies/compare.py lists them).
Not here: running them (studies/compare.py), what a stage plan is (raptr.py).
"""

import argparse
import math

import methods
import model as transformer
from methods import deep_fusion

PARTS = {"raptr_width": "width", "raptr_both": "both"}
ARMS = [*methods.METHODS, "full_flops", *PARTS, "fusion", "shallow", "shallow_flops"]
FIRST = "--init=FIRST"  # a flag of a run that begins from the weights of others, until those are trained


def changed(args, **changes):
    """A copy of parsed flags with some of them changed."""
    return argparse.Namespace(**{**vars(args), **changes})


def schedule(arm, base, budget):
    """Flags of train.py with which an arm costs 1 / budget of the layer FLOPs of full training. Raises ValueError if it
    cannot. base: the parsed flags of full training."""
    L, T, K = base.layers, base.steps, base.layers / budget  # K: mean layers a step
    K = round(K) if abs(K - round(K)) < 0.01 else K  # 1.333 means 4/3
    if arm in ("full", "ramp"):
        return [f"--method={arm}"]
    if arm == "full_flops":
        return ["--method=full", f"--steps={round(T * K / L)}"]
    if arm in ("shallow", "shallow_flops"):
        if K != int(K):
            raise ValueError(f"{K:.2f} is not a whole number of layers")
        more_steps = [f"--steps={round(T * L / K)}"] if arm == "shallow_flops" else []
        return ["--method=full", f"--layers={K}", *more_steps]
    if arm == "fusion":
        share = layer_flops(vars(base) | half_width(base)) / layer_flops(vars(base))
        return ["--method=full", f"--steps={round(T * K / L / (1 + 2 * share))}", FIRST]
    method = ["--method=raptr", f"--part={PARTS[arm]}"] if arm in PARTS else [f"--method={arm}"]
    args = changed(base, method="raptr" if arm in PARTS else arm, part=PARTS.get(arm, base.part))
    if "mean_depth" in methods.reads(args):
        methods.choose(changed(args, mean_depth=K))  # raises ValueError if the method cannot
        return [*method, f"--mean_depth={K:g}"]
    stages, alpha = solve_stages(args, K)
    return [*method, f"--stages={stages}", f"--alpha={alpha:g}"]


def solve_stages(args, mean):
    """(stages, alpha) that give the staged method of `args` `mean` layers a step: its published stages, if they need no
    later stage to be the shorter one (alpha < 0), else stages that start at a quarter of the layers."""
    L = args.layers
    plans = [methods.stages(changed(args, stages="auto"))]
    if args.method != "progressive":  # whose published stages start there
        plans.append([round(L * s / 4) for s in (1, 2, 3, 4)] + [L] * (args.method == "mslt"))
    solution = reason = None
    for lengths in plans:
        stages = "-".join(str(k) for k in lengths)
        try:
            alpha = solve_alpha(changed(args, stages=stages), mean)
            methods.choose(changed(args, stages=stages, alpha=alpha))  # raises ValueError if a stage has no step
        except ValueError as error:
            reason = error
            continue
        solution = stages, alpha
        if alpha >= 0:
            break
    if not solution:
        raise reason
    return solution


def solve_alpha(args, mean):
    """The alpha that gives the staged method of `args` `mean` layers a step. Raises ValueError if there is none."""
    steps = 1_000_000  # many, so that rounding to whole steps does not matter
    args = changed(args, steps=steps, full_warmup=round(args.full_warmup / args.steps * steps))
    methods.choose(changed(args, alpha=0.0))  # raises ValueError if no alpha would do

    def mean_at(alpha):
        try:
            method = methods.choose(changed(args, alpha=alpha))
        except ValueError:  # a stage has become too short for a step
            return math.inf if alpha > 0 else -math.inf
        return sum((s.end - s.start + 1) * method.expected_layers(s.start) for s in method.plan) / steps

    low, high = -8.0, 8.0
    if not mean_at(low) < mean < mean_at(high):
        raise ValueError(f"--stages {args.stages} cannot have {mean:g} layers a step")
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) < mean else (low, middle)
    return 0.0 if abs(low) < 1e-3 else round(low, 4)


def half_width(args):
    """The flags that differ in a network of half the width. Initial weights grow by sqrt(2), like 1 / sqrt(width)."""
    if any(getattr(args, name) % 2 for name in deep_fusion.ADDED):
        raise ValueError(f"a width of {args.width}, {args.heads} heads and {args.mlp} neurons cannot be halved")
    halves = {name: getattr(args, name) // 2 for name in deep_fusion.ADDED}
    return halves | {"init_std": round(args.init_std * 2**0.5, 6)}


def layer_flops(flags):
    """FLOPs of all layers of one training step, on one sequence."""
    config = transformer.Config.of(argparse.Namespace(**flags), flags["vocab"])
    return transformer.flops(config, 1, 0, config.layers) - transformer.flops(config, 1, 0, 0)


def as_text(flags):
    """A schedule for people: its flags, without the method."""
    words = [flag.removeprefix("--").replace("=", " ") for flag in flags if not flag.startswith("--method")]
    return " ".join(words) or "-"


def as_flags(text):
    """The flags of a schedule that `as_text` wrote."""
    words = text.split()
    return [f"--{name}={value}" for name, value in zip(words[::2], words[1::2])]


def plan(arms, base, budget):
    """{arm: its flags}, printed. An arm that cannot meet the budget is named, with the reason, and left out."""
    print(f"\nbudget {budget:g}: {base.layers / budget:.2f} of {base.layers} layers a step, {base.steps} steps\n")
    flags = {}
    for arm in arms:
        try:
            flags[arm] = schedule(arm, base, budget)
            print(f"  {arm:14} {as_text(flags[arm])}")
        except ValueError as error:
            print(f"  {arm:14} not possible: {error}")
    print(flush=True)
    return flags
