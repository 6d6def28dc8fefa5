"""The other answers to "which layers train now?": stochastic depth, and one curriculum that drops nothing.

    python layerdrop.py             keep probabilities over depth and time, sampled paths, and the mean depth of each

    PLD          progressive layer dropping: more is dropped as training goes on, and more in deep layers
    LayerDrop    the same rate everywhere, always
    decreasing   "Don't Drop Dropout": less is dropped as training goes on, more in deep layers, each sequence its own
    ramp         ProRes: every layer always runs, its update scaled from 0 to 1, deeper layers later

Constant stochastic depth with pinned ends is RaPTr with one stage that never ends (raptr.py, `--method constant`).
`decreasing` has four switches; turned one by one they lead from it to RaPTr: time (a line or RaPTr's staircase), layers
(linear in depth or uniform with pinned ends), gate (per sequence or per batch), scale (1/p or none).

Sources: Zhang & He, NeurIPS 2020 (PLD); Fan et al., ICLR 2020 (LayerDrop); Elhoushi et al., arXiv 2609.05275
(decreasing); arXiv 2603.05369 (ProRes). Legend: L layers, T steps; layers count from 0, steps from 1.
"""

import math
import random

from raptr import Full, Subnetwork, draw, mean_layers, whole


class Dropped(Full):
    """Keeps layer l at step t with probability keep(t)[l], every layer on its own.

    gate: "batch", one draw for all sequences, or "sequence", one for each: a layer then runs on the rows that keep it.
    inverse: multiply a kept layer's update by 1 / its probability, so that the expected update is the full one.
    """

    def __init__(self, keep, layers, seed=0, gate="batch", inverse=False, batch=None):
        super().__init__(layers)
        self.keep, self.seed, self.gate, self.inverse, self.batch = keep, seed, gate, inverse, batch

    def expected_layers(self, step):
        return math.fsum(self.keep(step))

    def subnetwork(self, step):
        keep = self.keep(step)
        if min(keep) == 1:
            return None
        rng = random.Random(f"{self.seed} path {step}")
        draws = self.batch if self.gate == "sequence" else 1
        rows = [tuple(row for row in range(draws) if rng.random() < p) for p in keep]
        layers = tuple(layer for layer, kept in enumerate(rows) if kept)
        scale = tuple(1 / keep[layer] for layer in layers) if self.inverse else None
        return Subnetwork(layers, scale, tuple(rows[layer] for layer in layers) if self.gate == "sequence" else None)


def pld(layers, steps, theta_bar=0.5, gamma=0.0, **more):
    """Progressive layer dropping. theta(t) = (1 - theta_bar) exp(-gamma t) + theta_bar; layer l of 1 .. L is kept with
    probability 1 - l/L (1 - theta(t)) and its update divided by it. gamma: 0 means 100 / steps."""
    gamma = gamma or 100 / steps

    def keep(step):
        theta = (1 - theta_bar) * math.exp(-gamma * step) + theta_bar
        return [1 - (layer + 1) / layers * (1 - theta) for layer in range(layers)]

    return Dropped(keep, layers, inverse=True, **more)


def theta_bar_for(mean_depth, layers, settling=0.0):
    """PLD's theta_bar for a mean depth K: K/L = 1 - (1 - theta_bar) (1 - settling) (L + 1) / (2 L).
    settling: mean of exp(-gamma t) over the run; 0 gives the depth that theta(t) settles at."""
    return 1 - (1 - mean_depth / layers) * 2 * layers / (layers + 1) / (1 - settling)


def mean_settling(steps, gamma=0.0):
    """Mean of exp(-gamma t) over t = 1 .. steps."""
    gamma = gamma or 100 / steps
    return -math.expm1(-gamma * steps) / (steps * math.expm1(gamma))


def layerdrop(layers, rate=0.2, **more):
    """LayerDrop: every layer is dropped with the same rate, nothing is rescaled."""
    return Dropped(lambda step: [1 - rate] * layers, layers, **more)


def decreasing(layers, steps, p_max=1.0, depth="linear", staircase=None, gate="sequence", inverse=True, **more):
    """Decreasing layer dropout: layer l of 0 .. L-1 is dropped with probability p_max * l/(L-1) * (1 - t/(T-1)).

    depth: "uniform" drops all layers but the first and the last alike, at the same mean depth.
    staircase: a stage plan (raptr.py) whose lengths set the mean depth, in place of the line in time.
    """

    if layers < 3:
        raise ValueError(f"--method decreasing needs at least 3 layers, not {layers} (--layers)")

    def keep(step):
        if staircase is None:
            mean = layers - layers / 2 * p_max * (1 - (step - 1) / max(1, steps - 1))
        else:
            mean = next(stage.length for stage in staircase if step <= stage.end)
        if depth == "uniform":
            return [1.0, *[(mean - 2) / (layers - 2)] * (layers - 2), 1.0]
        return [1 - 2 * (layers - mean) / layers * layer / (layers - 1) for layer in range(layers)]

    for step in [1] + [stage.start for stage in staircase or []]:
        if min(keep(step)) < 0:
            raise ValueError(f"at step {step} so few layers are left that some would have to be kept less than never")
    return Dropped(keep, layers, gate=gate, inverse=inverse, **more)


class Ramp(Full):
    """Residual ramp: layer l of 1 .. L is scaled by min(1, t / (l * grow)), so deeper layers come in later; the last one
    is whole after a share `share` of the steps. Nothing is skipped, so it costs what full training costs."""

    def __init__(self, layers, steps, share=0.25):
        super().__init__(layers)
        self.grow = share * steps / layers

    def subnetwork(self, step):
        scale = tuple(min(1.0, step / ((layer + 1) * self.grow)) for layer in range(self.layers))
        return None if min(scale) == 1 else Subnetwork(tuple(range(self.layers)), scale)


def demo(L=12, T=1000):
    methods = {
        "PLD, theta_bar for 9 of 12": pld(L, T, theta_bar_for(9, L, mean_settling(T))),
        "LayerDrop, rate 0.25": layerdrop(L, 0.25),
        "decreasing, p_max 1": decreasing(L, T, batch=8),
    }
    print(f"\n  {L} layers, {T} steps: keep probability in percent, layer 0 to {L - 1}, and two paths")
    for name, method in methods.items():
        print(f"\n  {name}: {mean_layers(method, T):.2f} layers a step on average")
        for step in (1, T // 20, T // 2, T):
            percent = " ".join(f"{100 * p:3.0f}" for p in method.keep(step))
            paths = [method.subnetwork(step + i) or whole(L) for i in (0, -1 if step == T else 1)]
            print(f"    step {step:4}   {percent}   " + "  ".join(draw(path.layers, L) for path in paths))
    ramp = Ramp(L, T)
    print("\n  ramp: every layer runs; its update is scaled by, in percent")
    for step in (1, T // 20, T // 8, T // 4):
        scale = (ramp.subnetwork(step) or Subnetwork((), (1.0,) * L)).scale
        print(f"    step {step:4}   " + " ".join(f"{100 * s:3.0f}" for s in scale))
    print()


if __name__ == "__main__":
    demo()
