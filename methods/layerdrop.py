"""Layer dropping, and one curriculum that drops nothing: other answers to "which layers train now?"

    python -m methods.layerdrop     keep probabilities over depth and time, sampled paths, mean depth of each

    pld          progressive layer dropping: drops more as training goes on, and more in deep layers
    layerdrop    LayerDrop: the same rate everywhere, always
    decreasing   decreasing layer dropout: drops less as training goes on, and more in deep layers
    ramp         ProRes: every layer always runs; its update is scaled from 0 to 1, deeper layers later

Constant stochastic depth (Huang et al., ECCV 2016) with pinned ends, and without their factor at evaluation, is RaPTr
with a single stage (raptr.py, `--method constant`).

Here a factor multiplies the update of a whole block, once. The authors of PLD, `decreasing` and ProRes multiply the
updates of attention and MLP, each.

Sources: Zhang & He, NeurIPS 2020 (PLD); Fan et al., ICLR 2020 (LayerDrop); Elhoushi et al., arXiv 2609.05275
(decreasing); arXiv 2603.05369 (ProRes). Legend: L layers, T steps; layers count from 0, steps from 1.
"""

import math
import random

from raptr import Full, Subnetwork, all_layers, mean_layers, picture


class Dropped(Full):
    """Keep layer l at step t with probability keep(t)[l], each layer independently, one draw for the whole batch.

    inverse: multiply a kept layer's update by 1 / its probability, so that the expected update is the full one.
    """

    def __init__(self, keep, layers, seed=0, inverse=False):
        super().__init__(layers)
        self.keep, self.seed, self.inverse = keep, seed, inverse

    def expected_layers(self, step):
        return math.fsum(self.keep(step))

    def subnetwork(self, step):
        keep = self.keep(step)
        if min(keep) == 1:
            return None
        rng = random.Random(f"{self.seed} path {step}")
        kept = tuple([layer for layer, p in enumerate(keep) if rng.random() < p])
        return Subnetwork(kept, tuple(1 / keep[layer] for layer in kept) if self.inverse else None)


def pld(layers, steps, mean_depth=None, seed=0, gamma=None):
    """Progressive layer dropping. theta(t) = (1 - theta_bar) exp(-gamma t) + theta_bar with gamma = 100 / T. Layer l of
    1 .. L is kept with probability 1 - l/L (1 - theta(t)), and its update is divided by that probability.

    theta_bar: 0.5, the published default, or what makes the run's mean depth `mean_depth`. gamma: another one.
    Raises ValueError for a mean depth that would need theta_bar < 0.
    """
    gamma = gamma or 100 / steps
    settling = mean_settling(steps, gamma)
    theta_bar = 0.5 if mean_depth is None else theta_bar_for(mean_depth, layers, settling)
    if theta_bar < 0:
        least = f"{math.ceil(50 * (layers - 1 + (layers + 1) * settling)) / 100:g} of {layers}"
        raise ValueError(f"--mean_depth {mean_depth:g}: progressive layer dropping keeps at least {least} layers")

    def keep(step):
        theta = (1 - theta_bar) * math.exp(-gamma * step) + theta_bar
        return [1 - (layer + 1) / layers * (1 - theta) for layer in range(layers)]

    return Dropped(keep, layers, seed, inverse=True)


def theta_bar_for(mean_depth, layers, settling=0.0):
    """PLD's theta_bar for a mean depth K, from K/L = 1 - (1 - theta_bar) (1 - settling) (L + 1) / (2 L).
    settling: mean of exp(-gamma t) over the run. 0 gives the depth that theta(t) settles at."""
    return 1 - (1 - mean_depth / layers) * 2 * layers / (layers + 1) / (1 - settling)


def mean_settling(steps, gamma):
    """Mean of exp(-gamma t) over t = 1 .. steps: a geometric series."""
    return -math.expm1(-gamma * steps) / (steps * math.expm1(gamma))


def layerdrop(layers, steps=None, mean_depth=None, seed=0):
    """LayerDrop: every layer is dropped with the same rate at all steps, and nothing is rescaled. The published rate is
    0.2; `mean_depth` sets another one."""
    rate = 0.2 if mean_depth is None else 1 - mean_depth / layers
    return Dropped(lambda step: [1 - rate] * layers, layers, seed)


def decreasing(layers, steps, mean_depth=None, seed=0):
    """Decreasing layer dropout: layer l of 0 .. L-1 is dropped with probability p_max * l/(L-1) * (1 - t/(T-1)), and
    the update of a kept layer is divided by its keep probability.

    p_max: 1, a little above the published 0.6 to 0.99, or what makes the run's mean depth `mean_depth`.
    The paper draws for each sequence; this draws once for the batch, as all methods here do, so that a dropped layer
    costs nothing. Raises ValueError for fewer than 3 layers, or a mean depth below 3/4 of them.
    """
    p_max = 1.0 if mean_depth is None else 4 * (1 - mean_depth / layers)
    if layers < 3:
        raise ValueError(f"--method decreasing needs at least 3 layers, not {layers} (--layers)")
    if p_max > 1:
        least = f"{0.75 * layers:g} of {layers}"
        raise ValueError(f"--mean_depth {mean_depth:g}: decreasing dropout keeps at least {least} layers")

    def keep(step):
        drop = p_max * (1 - (step - 1) / max(1, steps - 1))  # rate of the last layer
        return [1 - drop * layer / (layers - 1) for layer in range(layers)]

    return Dropped(keep, layers, seed, inverse=True)


class Ramp(Full):
    """Residual ramp: layer l of 1 .. L is scaled by min(1, t / (l * grow)), so deeper layers come in later. The last
    layer reaches 1 after a quarter of the steps, its authors' after 12% with 12 layers, 24% with 24. Nothing is
    skipped, so it costs what full training costs."""

    def __init__(self, layers, steps):
        super().__init__(layers)
        self.grow = 0.25 * steps / layers

    def subnetwork(self, step):
        scale = tuple(min(1.0, step / ((layer + 1) * self.grow)) for layer in range(self.layers))
        return None if min(scale) == 1 else Subnetwork(tuple(range(self.layers)), scale)


def demo(L=12, T=1000):
    methods = {"PLD, 9 of 12": pld(L, T, 9), "LayerDrop, 9 of 12": layerdrop(L, T, 9)}
    methods["decreasing, p_max 1"] = decreasing(L, T)
    print(f"\n  {L} layers, {T} steps: keep probability in percent, and two paths")
    for name, method in methods.items():
        print(f"\n  {name}: {mean_layers(method, T):.2f} layers a step on average")
        for step in (1, T // 20, T // 2, T):
            percent = " ".join(f"{100 * p:3.0f}" for p in method.keep(step))
            paths = [method.subnetwork(step + i) or all_layers(L) for i in (0, -1 if step == T else 1)]
            print(f"    step {step:4}   {percent}")
            print("                " + "    ".join(picture(path.layers, L) for path in paths))
    ramp = Ramp(L, T)
    print("\n  ramp: every layer runs; its update is scaled by, in percent")
    for step in (1, T // 20, T // 8, T // 4):
        scale = (ramp.subnetwork(step) or Subnetwork((), (1.0,) * L)).scale
        print(f"    step {step:4}   " + " ".join(f"{100 * s:3.0f}" for s in scale))
    print()


if __name__ == "__main__":
    demo()
