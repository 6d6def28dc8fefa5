"""RaPTr: which part of the network trains at this step?

The whole method, without a tensor in it. At every step a random subset of the layers, a *path*, is trained and
the others are bypassed; training runs in stages whose paths grow, and the last stage trains the full model.
In width the same: a random subset of every layer's attention heads and hidden neurons.
Not here: the model that runs a path (model.py), how its width is cut (width.py), the loop that asks for one per step
(train.py).

    python raptr.py                          draw the default plan, a few of its paths, and what they cost
    python raptr.py --stages 3-6-9-12 --alpha 1 --layers 12
    python raptr.py --part both --heads 8

Source: "Efficient Stagewise Pretraining via Progressive Subnetworks" (Panigrahi et al., arXiv 2402.05913).
The authors released no code. What their text leaves open is a flag here, and README.md lists our defaults.

Legend: L layers, k kept layers, I the layers always kept, T steps, S stages. Layers count from 0, steps from 1.
"""

import math
import random
from dataclasses import dataclass, replace
from typing import NamedTuple


@dataclass(frozen=True)
class Width:
    """The part of their width that the kept layers train. A layer is cut into as many slices as it has heads: a slice is one
    head, or the share of one in the MLP's hidden neurons (of 4 heads and 512 neurons, 128 that stand side by side).

    heads, neurons: for each kept layer the slices kept, rising; all layers keep as many of the one as of the other.
    scale: multiplies what kept heads and neurons hand on; None means 1.
    """

    slices: int
    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    scale: float | None = None

    @property
    def share(self):
        return len(self.heads[0]) / self.slices if self.heads else 0.0


@dataclass(frozen=True)
class Subnetwork:
    """The part of the network that trains in one step. `None` in its place means the full model.

    layers: indices of the kept layers, rising; an empty tuple means no layer at all.
    scale: one multiplier per kept layer, applied once to the block's whole update; None means 1 for each.
    rows: for each kept layer the sequences of the batch it runs on; None means all of them.
    frozen: how many of the kept layers, from the bottom, run without being trained nor the look-up below
        them; the token embedding still learns as the head's matrix, to which it is tied.
    width: the part of the kept layers' width; None means all of it.
    """

    layers: tuple[int, ...]
    scale: tuple[float, ...] | None = None
    rows: tuple[tuple[int, ...], ...] | None = None
    frozen: int = 0
    width: Width | None = None

    def cost(self, batch):
        """FLOPs of the layers, in units of one trained layer on a batch of `batch` sequences. A frozen layer has no
        backward pass, which is two thirds of the work."""
        ran = len(self.layers) if self.rows is None else sum(map(len, self.rows)) / batch
        return (ran - 2 / 3 * self.frozen) * (1 if self.width is None else self.width.share)

    def micro_batch(self, start, stop):
        """The same subnetwork for sequences start .. stop - 1 of the batch."""
        if self.rows is None:
            return self
        rows = tuple(tuple(row - start for row in kept if start <= row < stop) for kept in self.rows)
        return replace(self, rows=rows)


def whole(layers):
    """All of `layers` layers, written out: what None stands for."""
    return Subnetwork(tuple(range(layers)))


# ----------------------------------------------------------------------------------------------------------------
# The stage plan


class Stage(NamedTuple):
    start: int  # first step, counting from 1
    end: int  # last step
    length: float  # mean number of layers that train in it


def stage_plan(lengths, steps, layers, alpha=0.0, full_warmup=0):
    """Cut `steps` steps into stages: [Stage, ...], one per entry of `lengths`.

    lengths: mean number of active layers per stage, never falling, ending at `layers`: 6-8-10-12 is [6, 8, 10, 12].
    alpha: stage s of S lasts a share s^alpha of the steps: 0 is the paper's Equal, 1 its Proportional.
    full_warmup: steps of the full model before the first stage. They count as steps of the run (the paper does
        not say whether they do).
    Raises ValueError for a plan that falls, does not end at `layers`, or is longer than the run.
    """
    text = "-".join(f"{k:g}" for k in lengths)
    if not all(map(math.isfinite, lengths)) or any(b < a for a, b in zip(lengths, lengths[1:])):
        raise ValueError(f"--stages {text}: the number of layers must not fall from stage to stage")
    if lengths[0] < 0 or lengths[-1] != layers:
        raise ValueError(f"--stages {text}: the last stage trains the full model, so it must be {layers} (--layers)")
    if not 0 <= full_warmup < steps:
        raise ValueError(f"--full_warmup {full_warmup}: must lie in 0 .. {steps - 1} (below --steps)")
    shares = [s**alpha for s in range(1, len(lengths) + 1)]
    ends = [full_warmup + round((steps - full_warmup) * sum(shares[: s + 1]) / sum(shares)) for s in range(len(shares))]
    starts = [full_warmup + 1] + [end + 1 for end in ends]
    plan = [Stage(1, full_warmup, layers)] * (full_warmup > 0)
    plan += [Stage(a, b, k) for a, b, k in zip(starts, ends, lengths)]
    if any(stage.end < stage.start for stage in plan):
        raise ValueError(f"--stages {text}: {steps} steps are too few for it (--steps)")
    return plan


# ----------------------------------------------------------------------------------------------------------------
# A method: what a training loop asks, and full training's answers


class Full:
    """Every step trains every layer. All other methods are built on this and say only where they differ."""

    def __init__(self, layers):
        self.layers = layers

    def subnetwork(self, step):
        """What trains at `step` (from 1): a Subnetwork, or None for all of the network."""
        return None

    def expected_layers(self, step):
        """Mean cost of `step`, in layers: see Subnetwork.cost."""
        return self.layers

    def stage(self, step):
        """Number of the stage that `step` lies in, from 0."""
        return 0

    def depth(self, step):
        """How many layers the network has. The loop grows it when this changes (stacking.py)."""
        return self.layers

    def since_growth(self, step):
        """Steps since the network last grew, its first step after that being 1."""
        return math.inf

    def examples(self):
        """Subnetworks to evaluate beside the full model: {"6": [Subnetwork, ...], ...}."""
        return {}


class Staged(Full):
    """A method that follows a stage plan."""

    def __init__(self, plan, layers):
        super().__init__(layers)
        self.plan = plan

    def stage(self, step):
        return next(i for i, stage in enumerate(self.plan) if step <= stage.end)

    def expected_layers(self, step):
        return self.plan[self.stage(step)].length


# ----------------------------------------------------------------------------------------------------------------
# RaPTr's answers: random paths


def keep_probability(k, layers, fixed):
    """p such that the fixed layers and each other one with probability p make k layers on average."""
    free = layers - len(fixed)
    return (k - len(fixed)) / free if free else 1.0


def draw_layers(rng, k, layers, fixed, sampling):
    """One path of (about) k layers. `exact`: always k of them (if k is not whole, the whole number below or above
    it, k on average); `bernoulli`: each free layer independently, as in the paper's definition of zeta_l."""
    free = [layer for layer in range(layers) if layer not in fixed]
    if sampling == "bernoulli":
        p = keep_probability(k, layers, fixed)
        kept = [layer for layer in free if rng.random() < p]
    else:
        count = math.floor(k) + (rng.random() < k - math.floor(k))
        kept = rng.sample(free, count - len(fixed))
    return tuple(sorted(set(fixed) | set(kept)))


def path_scale(kept, k, layers, fixed, scaling):
    """Multipliers for the kept layers; the full model is never scaled. The paper tries a scaling whose formula we could
    not read; these are the candidates, and the default is `none`.

    gap: sqrt(distance to the kept layer below): a layer stands in for the skipped ones before it;
    uniform: sqrt(L / k); inverse: 1 / p on the layers that could have been dropped, as in PLD.
    """
    if scaling == "none":
        return None
    if scaling == "gap":
        return tuple(math.sqrt(b - a) for a, b in zip((-1, *kept), kept))
    if scaling == "uniform":
        return tuple(math.sqrt(layers / len(kept)) for _ in kept)
    p = keep_probability(k, layers, fixed)
    return tuple(1.0 if layer in fixed else 1 / p for layer in kept)


def draw_width(rng, share, slices, layers, scaling):
    """A share of the heads and of the hidden neurons of each of `layers` layers, every head and every group of neurons with
    equal probability; of all layers equally many: slices * share, or one of the two whole numbers next to it, that on
    average. None if that is all of them. The paper says of width only that it can be done: all of this is our reading.

    scaling: of what they hand on, if n of N are kept. uniform: sqrt(N / n), so that the size of a sum of independent parts
    is kept; inverse: N / n, as in dropout, so that its mean is; none.
    """
    exact = round(slices * share, 9)
    count = math.floor(exact) + (rng.random() < exact - math.floor(exact))
    if count == slices:
        return None
    heads, neurons = (tuple(tuple(sorted(rng.sample(range(slices), count))) for _ in range(layers)) for _ in range(2))
    scale = {"none": None, "uniform": math.sqrt(slices / count), "inverse": slices / count}[scaling]
    return Width(slices, heads, neurons, scale)


class RaPTr(Staged):
    """subnetwork(step) for a stage plan: a pure function of (seed, step), so any rank can ask for any step.

    fixed: the layers that are always kept, I. The paper's experiments keep the first and the last.
    part: what a stage of k of L layers takes away. depth: layers. width: heads and neurons; all layers run, and a share
        k / L of each. both: layers and width by sqrt(k / L) each. It costs the same, k layers, in all three.
    slices, gain: of the width, the number of heads, and `scaling` of draw_width.
    """

    def __init__(self, plan, layers, fixed, sampling="exact", scaling="none", seed=0, part="depth", slices=1, gain="none"):
        shortest = min(stage.length for stage in plan)
        if any(not 0 <= layer < layers for layer in fixed):
            raise ValueError(f"--fixed {sorted(fixed)}: layers are numbered 0 .. {layers - 1} (--layers)")
        super().__init__(plan, layers)
        self.depth_power, self.width_power = {"depth": (1, 0), "width": (0, 1), "both": (0.5, 0.5)}[part]
        if part != "width" and self.path_length(shortest) < len(fixed):
            raise ValueError(f"a stage of {shortest:g} layers is shorter than the {len(fixed)} always kept (--fixed)")
        if slices * (shortest / layers) ** self.width_power < 1:
            raise ValueError(f"a stage keeps less than one of {slices} heads (--heads, --stages)")
        self.fixed, self.sampling, self.scaling, self.seed = frozenset(fixed), sampling, scaling, seed
        self.slices, self.gain = slices, gain

    def path_length(self, k):
        """Mean number of layers that run in a stage that costs as much as k."""
        return k if self.depth_power == 1 else self.layers * (k / self.layers) ** self.depth_power

    def subnetwork(self, step):
        return self.path(self.expected_layers(step), f"{self.seed} path {step}")

    def path(self, k, name):
        """The subnetwork of (mean) cost k that belongs to a name. A string seed is hashed the same way on every machine."""
        if k == self.layers:
            return None
        rng, length, kept, scale, width = random.Random(name), self.path_length(k), tuple(range(self.layers)), None, None
        if self.depth_power:
            kept = draw_layers(rng, length, self.layers, self.fixed, self.sampling)
            scale = path_scale(kept, length, self.layers, self.fixed, self.scaling)
        if self.width_power:
            share = (k / self.layers) ** self.width_power
            width = draw_width(rng, share, self.slices, len(kept), self.gain)
        return Subnetwork(kept, scale, width=width)

    def examples(self, count=4):
        """A few paths of every stage's length, the same for every seed."""
        lengths = sorted({stage.length for stage in self.plan} - {self.layers})
        return {f"{k:g}": [self.path(k, f"example {i}") for i in range(count)] for k in lengths}


# ----------------------------------------------------------------------------------------------------------------
# What it costs


def mean_layers(method, steps, samples=20_000):
    """Mean number of layers that train per step over a run. Long runs are sampled at evenly spaced steps."""
    stride = max(1, steps // samples)
    seen = range(1 + stride // 2, steps + 1, stride)
    return math.fsum(method.expected_layers(step) for step in seen) / len(seen)


def draw(layers, length):
    """A path as a picture: one cell per layer, filled where it trains."""
    return "".join("██" if layer in layers else "··" for layer in range(length))


def demo():
    import argparse

    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Draw a stage plan, sampled paths, and their cost.")
    parser.add_argument("--stages", default="6-8-10-12")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--alpha", type=float, default=0.0)
    parser.add_argument("--full_warmup", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", choices=["depth", "width", "both"], default="depth")
    parser.add_argument("--heads", type=int, default=4)
    args = parser.parse_args()
    try:
        lengths = [float(k) for k in args.stages.split("-")]
        plan = stage_plan(lengths, args.steps, args.layers, args.alpha, args.full_warmup)
        method = RaPTr(plan, args.layers, {0, args.layers - 1}, seed=args.seed, part=args.part, slices=args.heads)
    except (ValueError, OverflowError) as error:
        parser.exit(2, f"raptr.py: {error}\n")
    also = "" if args.part == "depth" else "; of the first of them, and of the second, which heads"
    print(f"\n  RaPTr {args.stages}: which of {args.layers} layers train (filled) at a step{also}\n")
    for number, stage in enumerate(plan):
        print(f"  stage {number}: steps {stage.start} to {stage.end}, {stage.length:g} layers a step")
        for step in range(stage.start, min(stage.start + 4, stage.end + 1)):
            subnetwork = method.subnetwork(step) or whole(args.layers)
            heads = subnetwork.width.heads if subnetwork.width else [range(args.heads)] * 2
            shown = "" if args.part == "depth" else "".join(f"   {draw(kept, args.heads)}" for kept in heads[:2])
            print(f"    step {step:4d}  {draw(subnetwork.layers, args.layers)}{shown}")
    mean = mean_layers(method, args.steps)
    relative = args.layers / mean
    print(f"\n  {mean:.3f} of {args.layers} layers a step: full training costs {relative:.3f} times as many layer FLOPs")
    print(f"  ({1 - mean / args.layers:.1%} saved; embeddings and head, which always run, are not counted)\n")


if __name__ == "__main__":
    demo()
