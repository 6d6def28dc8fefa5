"""RaPTr: which layers of the network train at this step?

At each step a random subset of the layers, a *path*, is trained, and the other layers are bypassed. Training runs in
stages whose paths grow, and the last stage trains the full model. This file is the whole method, without a tensor in
it. It imports nothing but Python's standard library, so you can copy it into a project of your own and train any model
with `over`.
Not here: the model that runs a path (model.py), the training loop (train.py), RaPTr in width (methods/width.py).

    python raptr.py                                         draw the default plan, some of its paths, and their cost
    python raptr.py --stages 3-6-9-12 --alpha 1 --layers 12

Source: "Efficient Stagewise Pretraining via Progressive Subnetworks" (Panigrahi et al., arXiv 2402.05913, ICLR 2025).
The authors released no code. What their text leaves open is a flag of train.py, listed with its default in README.md.

Legend: L layers, k (mean) number of kept layers, I the layers that are always kept, T steps, S stages.
Layers count from 0, steps from 1.
"""

import contextlib
import math
import random
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Subnetwork:
    """The part of the network that trains in one step. `None` in its place means the full model.

    layers: indices of the kept layers, ascending. An empty tuple means no layer at all.
    scale: one multiplier per kept layer, applied once to the block's whole update. None means 1 for each.
    """

    layers: tuple[int, ...]
    scale: tuple[float, ...] | None = None
    # For two other methods:
    frozen: int = 0  # stacking.py, MSLT: how many of the lowest kept layers run forward only, and do not train
    width: object = None  # methods/width.py: a Width, the heads and neurons that run; not the hidden size

    def cost(self):
        """Cost of the step. One layer forward and backward costs 1; a frozen layer, which runs forward only, 1/3."""
        cost = len(self.layers) * self.width.share if self.width else len(self.layers)
        return cost - 2 / 3 * self.frozen if self.frozen else cost


def all_layers(count):
    """The subnetwork of all `count` layers: what None stands for, written out."""
    return Subnetwork(tuple(range(count)))


# ----------------------------------------------------------------------------------------------------------------
# Stages


class Stage(NamedTuple):
    """One stage of training. The paper writes it (T_s, p_s, I_s): duration, keep probability, layers always kept. Here
    the mean path length stands in place of p_s, which follows from it (`keep_probability`)."""

    start: int  # first step, counting from 1
    end: int  # last step
    length: float  # mean number of layers that train in a step


def stage_plan(lengths, steps, layers, alpha=0.0, full_warmup=0):
    """Divide `steps` steps into stages. Returns [Stage, ...], one per entry of `lengths`.

    lengths: mean number of layers per stage, ascending to `layers`. 6-8-10-12 is [6, 8, 10, 12].
    alpha: stage s of S lasts a share of the steps proportional to s^alpha. The paper uses 0 (Equal) and 1
        (Proportional).
    full_warmup: steps that train the full model before the first stage. They count as steps of the run; the paper does
        not say whether they do.
    Raises ValueError if the plan falls, does not end at `layers`, or leaves a stage without a step.
    """
    text = "-".join(f"{k:g}" for k in lengths)
    if not all(map(math.isfinite, lengths)) or any(b < a for a, b in zip(lengths, lengths[1:])):
        raise ValueError(f"--stages {text}: the number of layers must not fall from stage to stage")
    if lengths[0] < 0 or lengths[-1] != layers:
        raise ValueError(f"--stages {text}: the last stage trains the full model, so it must be {layers} (--layers)")
    if not 0 <= full_warmup < steps:
        raise ValueError(f"--full_warmup {full_warmup}: must lie in 0 .. {steps - 1} (below --steps)")
    # Round the cumulated shares, not the single ones: then the stages add up to all steps.
    shares = [s**alpha for s in range(1, len(lengths) + 1)]
    cumulated = [sum(shares[: s + 1]) / sum(shares) for s in range(len(shares))]
    ends = [full_warmup + round((steps - full_warmup) * share) for share in cumulated]
    starts = [full_warmup + 1] + [end + 1 for end in ends]
    plan = [Stage(1, full_warmup, layers)] * (full_warmup > 0)  # a stage of the full model, if there is a warm-up
    plan += [Stage(start, end, k) for start, end, k in zip(starts, ends, lengths)]
    if any(stage.end < stage.start for stage in plan):
        settings = f"--steps {steps}, --alpha {alpha:g}, --full_warmup {full_warmup}"
        raise ValueError(f"--stages {text}: too few steps, a stage would have none ({settings})")
    return plan


# ----------------------------------------------------------------------------------------------------------------
# What a training loop asks of a method. Full training answers it; every other method says only where it differs.


class Full:
    """Full training: every step trains every layer."""

    def __init__(self, layers):
        self.layers = layers

    def subnetwork(self, step):
        """What trains at `step` (from 1): a Subnetwork, or None for the full model."""
        return None

    def expected_layers(self, step):
        """Expected cost of `step`, in layers. See Subnetwork.cost."""
        return self.layers

    def stage(self, step):
        """Number of the stage that `step` belongs to, from 0. A full-model warm-up is a stage."""
        return 0

    def depth(self, step):
        """How many layers the network has. On a change, the loop calls `sources` and rebuilds the network."""
        return self.layers

    def sources(self, n, m):
        """For a growth from n to m layers, the old layer that each new layer is a copy of (stacking.py)."""
        raise NotImplementedError

    def steps_since_growth(self, step):
        """Steps since the network last grew: 1 at the first step of the grown network."""
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
        last = len(self.plan) - 1  # it goes on if a run is longer than its plan
        return next((i for i, stage in enumerate(self.plan) if step <= stage.end), last)

    def expected_layers(self, step):
        return self.plan[self.stage(step)].length


# ----------------------------------------------------------------------------------------------------------------
# RaPTr's answers: random paths


def keep_probability(k, layers, pinned):
    """p_s: keeping each layer that is not pinned with this probability gives k layers on average.

    k = |I| + p (L - |I|), solved for p. For 12 layers of which two are pinned, 6-8-10-12 is p = 0.4, 0.6, 0.8, 1.
    """
    free = layers - len(pinned)
    return (k - len(pinned)) / free if free else 1.0


def draw_layers(rng, k, layers, pinned, sampling):
    """Draw the layers of one path: the pinned ones, and a random choice of the others.

    sampling: "bernoulli" keeps each free layer independently, as the paper defines a path (zeta_l ~ Bernoulli(p) for l
        not in I, zeta_l = 1 for l in I). "exact" keeps exactly k layers, as the paper's figure shows it, so that all
        steps of a stage cost the same; a k that is not whole is rounded up or down at random, so that its mean is k.
    """
    free = [layer for layer in range(layers) if layer not in pinned]
    if sampling == "bernoulli":
        p = keep_probability(k, layers, pinned)
        kept = [layer for layer in free if rng.random() < p]
    else:
        count = math.floor(k) + (rng.random() < k - math.floor(k))  # k = 7.5: 7 or 8, equally often
        kept = rng.sample(free, count - len(pinned))
    return tuple(sorted(set(pinned) | set(kept)))


def path_scale(kept, k, layers, pinned, scaling):
    """Multipliers of the kept layers' updates, or None. All are 1 in the full model.

    The paper tries a scaling whose formula we could not read. These are the candidates; the default is "none".
    gap: sqrt(distance to the kept layer below), as a kept layer stands in for the skipped ones before it. At
        initialisation a pre-LN stack adds about independent updates, whose sum grows as the square root of their
        number.
    uniform: sqrt(L / number of layers kept in this step) for every kept layer, for the same reason.
    inverse: 1 / p for the layers that can be dropped, as in progressive layer dropping: the mean update is unchanged.
    """
    if scaling == "none":
        return None
    if scaling == "gap":
        return tuple(math.sqrt(b - a) for a, b in zip((-1, *kept), kept))
    if scaling == "uniform":
        return tuple(math.sqrt(layers / len(kept)) for _ in kept)
    if scaling == "inverse":
        p = keep_probability(k, layers, pinned)
        return tuple(1.0 if layer in pinned else 1 / p for layer in kept)
    raise ValueError(f"--scaling {scaling}: must be none, gap, uniform or inverse")


class RaPTr(Staged):
    """Random paths that follow a stage plan.

    pinned: the layers that are always kept, I. The paper's experiments pin the first and the last.
    sampling, scaling: see `draw_layers` and `path_scale`.
    Raises ValueError if a pinned layer does not exist, or a stage is shorter than the pinned layers.
    """

    def __init__(self, plan, layers, pinned, sampling="exact", scaling="none", seed=0):
        super().__init__(plan, layers)
        self.pinned, self.sampling, self.scaling, self.seed = frozenset(pinned), sampling, scaling, seed
        if any(not 0 <= layer < layers for layer in pinned):
            raise ValueError(f"--fixed {sorted(pinned)}: layers are numbered 0 .. {layers - 1} (--layers)")
        shortest = min(stage.length for stage in plan)
        if shortest < len(pinned):
            shorter = f"a stage of {shortest:g} layers is shorter than the {len(pinned)} always kept"
            raise ValueError(f"{shorter} (--stages or --mean_depth, --fixed)")

    def subnetwork(self, step):
        # Once per step, for all sequences of the batch: a layer that is skipped for all of them costs nothing. The
        # path depends on (seed, step) and nothing else: every rank draws the same one without asking, and a run that
        # resumes at this step draws it again.
        return self.path(self.expected_layers(step), f"{self.seed} path {step}")

    def path(self, k, name):
        """Draw a path of (mean) length k. name: text that seeds the draw; on every machine it draws the same path."""
        if k == self.layers:  # the last stage trains the full model
            return None
        kept = draw_layers(random.Random(name), k, self.layers, self.pinned, self.sampling)
        return Subnetwork(kept, path_scale(kept, k, self.layers, self.pinned, self.scaling))

    def examples(self, count=4):
        """Some paths of each stage's length, the same for every seed."""
        lengths = sorted({stage.length for stage in self.plan} - {self.layers})
        return {f"{k:g}": [self.path(k, f"example {i}") for i in range(count)] for k in lengths}


# ----------------------------------------------------------------------------------------------------------------
# RaPTr for anybody's model


@contextlib.contextmanager
def over(layers, subnetwork):
    """Within this context the nn.ModuleList `layers` holds only the kept layers: the model runs and trains only those.

    Run forward and backward inside the context. Build the optimizer outside, over all parameters, and let the
    gradients of skipped layers be None (`zero_grad(set_to_none=True)`).
    With gradient accumulation keep all micro-batches of a step inside one context: they share its path.
    `torch.compile(model)` makes a graph for each length of a path. With sampling="bernoulli" or a scale it may need
    more than torch's limit of 8: compile each layer instead (`layer.compile()`).
    Under DistributedDataParallel set `find_unused_parameters=True`: skipped layers rest, but zeros are sent for them.
    To send none, sum the gradients that exist yourself (engine/parallel.py does), or use FSDP2.
    Raises ValueError for layers of several kinds (some attend to a window, say): such models pick a layer's mask by its
    index, and `over` renumbers the layers. Raises ValueError for a subnetwork that cuts or freezes layers.
    """
    if subnetwork is None:
        yield
        return
    if subnetwork.width or subnetwork.frozen:
        raise ValueError("over() runs some of the layers; it cannot cut their width or freeze them")
    if len(kinds(layers)) > 1:
        found = ", ".join(sorted(kinds(layers)))
        raise ValueError(f"over() needs layers that are all alike; these are of kinds {found}")
    # nn.ModuleList keeps its layers in `_modules`, which the model walks through. Replacing that dictionary for a
    # moment changes what runs, and neither copies a weight nor tells the optimizer.
    everything, kept = dict(layers._modules), [layers[i] for i in subnetwork.layers]
    hooks = [
        layer.register_forward_hook(scale_update(scale), with_kwargs=True)
        for layer, scale in zip(kept, subnetwork.scale or ())
    ]
    layers._modules = {str(i): layer for i, layer in enumerate(kept)}
    try:
        yield
    finally:
        layers._modules = everything
        for hook in hooks:
            hook.remove()


def kinds(layers):
    """The kinds of attention in a stack of `transformers`' layers: {"full_attention"}, say; empty if it names none."""
    configs = [getattr(module, "config", None) for layer in layers for module in layer.modules()]
    return {kind for config in configs for kind in getattr(config, "layer_types", None) or ()}


def scale_update(scale):
    """A forward hook that multiplies what a layer adds to its input."""

    def hook(layer, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        y = output[0] if isinstance(output, tuple) else output
        y = x + scale * (y - x)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook


# ----------------------------------------------------------------------------------------------------------------
# What it costs


def mean_layers(method, steps, samples=20_000):
    """Mean cost of a step over a run, in layers. Long runs are sampled at evenly spaced steps.

    L divided by this is the paper's relative FLOPs: 12 / 9 = 1.333 for 6-8-10-12.
    """
    stride = max(1, steps // samples)  # a million steps need not all be asked
    sampled = range(1 + stride // 2, steps + 1, stride)
    return math.fsum(method.expected_layers(step) for step in sampled) / len(sampled)


def picture(layers, length):
    """A path as a picture: one cell per layer, filled where it trains."""
    return "".join("██" if layer in layers else "··" for layer in range(length))


def demo():
    import argparse

    about = "Draw a stage plan, sampled paths, their cost."
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=about)
    parser.add_argument("--stages", default="6-8-10-12", help="layers per stage [6-8-10-12]")
    parser.add_argument("--layers", type=int, default=12, help="layers of the network [12]")
    parser.add_argument("--alpha", type=float, default=0.0, help="0: stages of equal duration, 1: proportional [0]")
    parser.add_argument("--full_warmup", type=int, default=0, help="steps of the full model first [0]")
    parser.add_argument("--steps", type=int, default=800, help="steps of the run [800]")
    parser.add_argument("--seed", type=int, default=0, help="of the paths [0]")
    args = parser.parse_args()
    try:
        lengths = [float(k) for k in args.stages.split("-")]
        plan = stage_plan(lengths, args.steps, args.layers, args.alpha, args.full_warmup)
        method = RaPTr(plan, args.layers, {0, args.layers - 1}, seed=args.seed)
    except (ValueError, OverflowError) as error:
        parser.exit(2, f"raptr.py: {error}\n")
    print(f"\n  RaPTr {args.stages}: which of {args.layers} layers train (filled) at a step\n")
    for number, stage in enumerate(plan):
        print(f"  stage {number}: steps {stage.start} to {stage.end}, {stage.length:g} layers a step")
        for step in range(stage.start, min(stage.start + 4, stage.end + 1)):
            subnetwork = method.subnetwork(step) or all_layers(args.layers)
            print(f"    step {step:4d}  {picture(subnetwork.layers, args.layers)}")
    mean = mean_layers(method, args.steps)
    factor = args.layers / mean
    print(f"\n  {mean:.3f} of {args.layers} layers a step: full training costs {factor:.3f} times as many layer FLOPs")
    print(f"  ({1 - mean / args.layers:.1%} saved; embeddings and head, which always run, are not counted)\n")


if __name__ == "__main__":
    demo()
