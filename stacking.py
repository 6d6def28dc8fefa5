"""Growing in depth: train a shallow network, copy layers to make it deeper, train on. This file copies
tensors and never computes with them.

    python stacking.py          for every method, which layer each layer was copied from, stage by stage

    stacking      gradual stacking: a copy of the last block of layers goes on top
    progressive   progressive stacking: the whole stack is doubled
    mslt          grows like `stacking`, but trains only the new layers; a last stage that adds none trains all
    midas         the middle block is repeated in place
    jump          one late jump from a few layers to all of them, by repeating the stack

A growth is a list of sources: entry i is the old layer that new layer i is a copy of. Weights and optimizer moments
grow by the same list. Not here: when the loop grows the network (train.py).

Sources: Gong et al., ICML 2019 (progressive); Reddi et al., ICML 2023 (gradual); Yang et al., arXiv 2011.13635 (mslt);
Saunshi et al., NeurIPS 2024 (midas); Du et al., arXiv 2405.15319 and Bu, arXiv 2511.04981 (jump).
Legend: n layers before a growth, m after it; layers count from 0, steps from 1.
"""

import math
import re

from raptr import Staged, Subnetwork, all_layers, stage_plan

# ----------------------------------------------------------------------------------------------------------------
# Where the layers come from


def stacking(n, m):
    """Gradual: a copy of the last m - n layers on top. If m - n > n, the whole stack is repeated."""
    block = min(n, m - n)  # 6 to 9: the block is layers 3, 4, 5
    return [i if i < n else n - block + (i - n) % block for i in range(m)]


def progressive(n, m):
    """Layer i is copied to i and i + n (and i + 2n, ... where the network grows by more than twice)."""
    return [i % n for i in range(m)]


def midas(n, m):
    """The network is cut into blocks of m - n layers; the middle one, ceil(blocks / 2), is repeated in place."""
    block = m - n
    if n % block:
        rule = f"midas repeats a block of {block} layers, so {n} must be a multiple of it to become {m}"
        raise ValueError(f"--stages: {rule}")
    end = math.ceil(n // block / 2) * block  # where the middle block ends; of an even number, the first of the two
    return [*range(end), *range(end - block, n)]


SOURCES = {"stacking": stacking, "mslt": stacking, "progressive": progressive, "midas": midas, "jump": progressive}


def grow(tensors, sources):
    """Rearrange the tensors {name: tensor} of a stack of blocks ("blocks.3.mlp.up.weight") by `sources`. Every layer
    gets storage of its own. Names without a block number stay."""
    grown = {name: tensor.clone() for name, tensor in tensors.items() if "blocks." not in name}
    # "blocks.3.mlp.up.weight" is "blocks.{}.mlp.up.weight", and a moment of it "exp_avg.blocks.{}.mlp.up.weight".
    names = dict.fromkeys(re.sub(r"blocks\.\d+\.", "blocks.{}.", name) for name in tensors if "blocks." in name)
    for layer, source in enumerate(sources):
        for name in names:
            grown[name.format(layer)] = tensors[name.format(source)].clone()
    return grown


# ----------------------------------------------------------------------------------------------------------------
# When they grow


class Stacking(Staged):
    """A stage plan (raptr.py) whose lengths are depths of the network itself; `depth(step)` says how deep it is.

    kind: a value of SOURCES. only_new: train only the layers that the last growth added (MSLT).
    A full-model stage before the others (`--full_warmup`) trains the deep network first and continues with its lowest
    layers. This gives stacking the warm-up that RaPTr gets; what the upper layers learned is lost.
    Raises ValueError for a growth that is not possible.
    """

    def __init__(self, kind, plan, layers, only_new=False):
        if any(stage.length != int(stage.length) or stage.length < 1 for stage in plan):
            raise ValueError("--stages: a network grows by whole layers, from 1 up")
        super().__init__(plan, layers)
        self.kind, self.only_new, self.depths = kind, only_new, [int(stage.length) for stage in plan]
        for n, m in zip(self.depths, self.depths[1:]):
            self.sources(n, m)  # raises now, not in mid-run

    def depth(self, step):
        return self.depths[self.stage(step)]

    def steps_since_growth(self, step):
        stage = self.stage(step)
        grown = stage > 0 and self.depths[stage] > self.depths[stage - 1]
        return step - self.plan[stage].start + 1 if grown else math.inf

    def sources(self, n, m):
        """Where the layers of a network of depth m come from when it had n."""
        return list(range(m)) if m <= n else self.kind(n, m)

    def subnetwork(self, step):
        depth, stage = self.depth(step), self.stage(step)
        before = self.depths[stage - 1] if stage else 0
        # MSLT: right after a growth only the new layers train; a stage that adds none trains them all. The token
        # embeddings, below what is frozen, still learn as the head's matrix where they are tied to it.
        if self.only_new and 0 < before < depth:
            return Subnetwork(tuple(range(depth)), frozen=before)
        return None

    def expected_layers(self, step):
        return (self.subnetwork(step) or all_layers(self.depth(step))).cost()


def demo():
    cases = [("stacking", (6, 9, 12)), ("progressive", (3, 6, 12)), ("mslt", (6, 9, 12, 12)), ("midas", (6, 9, 12))]
    print("\n  Which layer of the first network each layer goes back to, stage by stage\n")
    for name, lengths in cases:
        method = Stacking(SOURCES[name], stage_plan(lengths, 1000, lengths[-1]), lengths[-1], name == "mslt")
        roots = list(range(lengths[0]))
        for i, (n, m) in enumerate(zip((lengths[0], *lengths), lengths)):
            roots = [roots[source] for source in method.sources(n, m)] if m != n else roots
            step = method.plan[i].start
            frozen = (method.subnetwork(step) or all_layers(m)).frozen
            note = f"  {frozen} frozen" if frozen else ""
            print(f"  {name if i == 0 else '':12} {m:2} layers   {' '.join(f'{root:2}' for root in roots)}{note}")
        print()


if __name__ == "__main__":
    demo()
