"""RaPTr in width: a random share of each layer's attention heads and hidden neurons trains, in place of layers.

The value (`Width`), its sampler (`RandomWidth`), and the cut: for one step, the weights of every block that runs, and
their moments in the optimizer, are replaced by copies of the rows or columns that are kept. Forward pass, backward
pass, clipping, the exchange of gradients and AdamW then see a narrower network and cost as much less; what is not kept
rests. Norms, and the biases of what writes to the residual stream, stay as they are.
Not here: RaPTr in depth, which this extends (raptr.py); the block, which runs with however many heads it has
(model.py).

    python -m methods.width     the shapes of a cut block

Source: the RaPTr paper says that parts may be width-wise, not how. All of this is our reading.
"""

import math
import random
from dataclasses import dataclass

from raptr import RaPTr, Subnetwork, draw_layers, path_scale

# ----------------------------------------------------------------------------------------------------------------
# The value


@dataclass(frozen=True)
class Width:
    """Which part of their width the kept layers train. A layer is cut into as many slices as it has heads. A slice is
    one head, or the same share of the hidden neurons: of 4 heads and 512 neurons, 128 neurons that stand side by side.

    heads, neurons: for each kept layer, the slices that are kept, ascending. Every layer keeps the same number of each.
    scale: multiplies what the kept heads and neurons pass on.
    """

    slices: int
    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    scale: float

    @property
    def share(self):
        return len(self.heads[0]) / self.slices if self.heads else 0.0


# ----------------------------------------------------------------------------------------------------------------
# The sampler


def draw_width(rng, share, slices, layers):
    """Draw a share of the heads and of the hidden neurons of each of `layers` layers, or None if that is all of them.

    Every layer keeps the same number, slices * share, rounded at random so that its mean is slices * share. What n of N
    slices pass on is multiplied by sqrt(N / n), which keeps the expected size of a sum of independent parts.
    """
    exact = round(slices * share, 9)
    count = math.floor(exact) + (rng.random() < exact - math.floor(exact))
    if count == slices:
        return None
    one_layer = lambda: tuple(sorted(rng.sample(range(slices), count)))  # noqa: E731
    heads, neurons = (tuple(one_layer() for _ in range(layers)) for _ in range(2))
    return Width(slices, heads, neurons, math.sqrt(slices / count))


class RandomWidth(RaPTr):
    """RaPTr whose stages of k of L layers take away width.

    part: "width" keeps all layers, and a share k / L of each; "both" keeps a share sqrt(k / L) of the layers, and of
        the width of each. Both cost as much as k layers.
    slices: the number of attention heads.
    """

    def __init__(self, plan, layers, pinned, sampling="exact", scaling="none", seed=0, part="width", slices=1):
        self.depth_power = {"width": 0, "both": 0.5}[part]
        in_depth = [stage._replace(length=self.depth_length(stage.length, layers)) for stage in plan]
        super().__init__(in_depth, layers, pinned, sampling, scaling, seed)  # checks the lengths in depth
        self.plan, self.slices = plan, slices
        if slices * self.width_share(min(stage.length for stage in plan)) < 1:
            raise ValueError(f"a stage keeps less than one of {slices} heads (--heads, --stages)")

    def depth_length(self, k, layers):
        """Mean number of layers that run in a stage that costs as much as k."""
        return layers * (k / layers) ** self.depth_power

    def width_share(self, k):
        return (k / self.layers) ** (1 - self.depth_power)

    def path(self, k, name):
        if k == self.layers:
            return None
        rng, kept, scale = random.Random(name), tuple(range(self.layers)), None
        if self.depth_power:
            length = self.depth_length(k, self.layers)
            kept = draw_layers(rng, length, self.layers, self.pinned, self.sampling)
            scale = path_scale(kept, length, self.layers, self.pinned, self.scaling)
        width = draw_width(rng, self.width_share(k), self.slices, len(kept))
        return Subnetwork(kept, scale, width=width)


# ----------------------------------------------------------------------------------------------------------------
# The cut

ROWS = {"heads": ("attention.qkv.weight", "attention.qkv.bias"), "neurons": ("mlp.up.weight", "mlp.up.bias")}
COLUMNS = {"heads": ("attention.out.weight",), "neurons": ("mlp.down.weight",)}


def cut(model, subnetwork, optimizer=None):
    """Narrow the blocks of `subnetwork` to its width, in place, with their moments. Returns what `restore` needs: a
    list, empty if the blocks keep their whole width."""
    from model import on  # here, so that the sampler does without torch

    taken = []
    for i, layer in enumerate(subnetwork.layers if subnetwork and subnetwork.width else ()):
        weights = dict(model.blocks[layer].named_parameters())
        for kind in ("heads", "neurons"):
            kept = on(model.bias.device, getattr(subnetwork.width, kind)[i])
            for name in ROWS[kind] + COLUMNS[kind]:
                p, moments = weights[name], optimizer.state[weights[name]] if optimizer else None
                wide = in_one_tensor(p, moments) if optimizer else p.data[None]
                shape = (len(wide), len(p), -1) if name in COLUMNS[kind] else (len(wide), -1, *p.shape[1:])
                narrow = by_slice(wide, name, model.config).index_select(2, kept)
                taken.append((p, name, kept, moments, wide, narrow))
                set_data(p, moments, narrow.view(shape))
    return taken


def restore(model, taken):
    """Undo `cut`: copy the trained parts back. Gradients become as wide as their weights, zero where nothing trained.
    Empties the list, so that restoring twice does nothing."""
    import torch

    with torch.no_grad():
        while taken:
            p, name, kept, moments, wide, narrow = taken.pop()
            if moments:  # without them nothing was trained
                by_slice(wide, name, model.config).index_copy_(2, kept, narrow)
            grad, p.grad = p.grad, None
            set_data(p, moments, wide)
            if grad is not None:
                p.grad = torch.zeros_like(p)
                part = by_slice(p.grad[None], name, model.config)
                part.index_copy_(2, kept, grad.view(1, part.shape[1], len(kept), -1))


def by_slice(tensors, name, config):
    """View stacked tensors of the shape of a block's weight as (tensors, parts, slices, rest). A part holds every slice
    once: queries, keys or values; one half of a gated MLP; one row of what writes to the stream."""
    parts = {"attention.qkv": 3, "mlp.up": 2 if config.gated else 1}.get(name.rpartition(".")[0], tensors.shape[1])
    return tensors.view(len(tensors), parts, config.heads, -1)


def in_one_tensor(p, moments):
    """Keep a weight and its moments in one tensor, so that one copy moves all three. Returns that tensor."""
    import torch

    if not hasattr(p, "with_moments") or p.with_moments.data_ptr() != p.data_ptr():
        p.with_moments = torch.stack([p.data, moments["exp_avg"], moments["exp_avg_sq"]])
        p.data, moments["exp_avg"], moments["exp_avg_sq"] = p.with_moments
    return p.with_moments


def set_data(p, moments, tensors):
    p.data = tensors[0]
    if moments:
        moments["exp_avg"], moments["exp_avg_sq"] = tensors[1:]


def demo():
    from model import Config, make
    from raptr import Stage

    config = Config(layers=4, width=64, heads=8, mlp=256, seq=16, vocab=99, dropout=0.0)
    model = make(config)
    path = RandomWidth([Stage(1, 9, 2)], 4, {0, 3}, part="width", slices=8).subnetwork(1)
    shapes = {name: p.shape for name, p in model.blocks[0].named_parameters()}
    cut(model, path)
    heads, neurons = path.width.heads[0], path.width.neurons[0]
    print(f"\n  The first of 4 layers, cut to heads {heads}")
    print(f"  and the eighths {neurons} of its neurons\n")
    for name, p in model.blocks[0].named_parameters():
        narrow = tuple(p.shape) if p.shape != shapes[name] else ""
        print(f"    {name:22} {str(tuple(shapes[name])):12} {narrow}".rstrip())
    print(f"\n  What is kept passes on {path.width.scale:.3f} times as much.\n")


if __name__ == "__main__":
    demo()
