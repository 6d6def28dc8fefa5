"""RaPTr in width: cut the network down to the heads and hidden neurons that train, and put them back after the step.

A subnetwork's `width` (raptr.Width) names them. For one step the weights of every block that runs, and their moments in the
optimizer, are replaced by copies of the rows or columns that are kept. So forward and backward pass, clipping, the exchange
of gradients and AdamW see a narrower network and cost as much less; what is not kept rests. Norms, and the biases of what
writes to the residual stream, stay as they are.

    python width.py             the shapes of a block, cut to half of its width, and whether it says what the masked whole says

Not here: which heads and neurons (raptr.py); the block, which runs with however many it has (model.py).
"""

import torch

ROWS = {"heads": ("attention.qkv.weight", "attention.qkv.bias"), "neurons": ("mlp.up.weight", "mlp.up.bias")}
COLUMNS = {"heads": ("attention.out.weight",), "neurons": ("mlp.down.weight",)}


def slices(tensor, name, config):
    """Tensors of the form of a block's weight, one above the other, seen as (tensors, parts, slices, rest); a part (queries,
    keys or values; one half of a gated MLP; one row of what writes to the stream) holds every slice once."""
    parts = {"attention.qkv": 3, "mlp.up": 2 if config.gated else 1}.get(name.rpartition(".")[0], tensor.shape[1])
    return tensor.view(len(tensor), parts, config.heads, -1)


def together(p, moments):
    """A weight and its moments one above the other in one tensor, of which they become views: one copy then moves all."""
    if not hasattr(p, "together") or p.together.data_ptr() != p.data_ptr():
        p.together = torch.stack([p.data, moments["exp_avg"], moments["exp_avg_sq"]])
        p.data, moments["exp_avg"], moments["exp_avg_sq"] = p.together
    return p.together


def cut(model, subnetwork, optimizer=None):
    """Narrow the blocks of `subnetwork` to its width, in place, with their moments. Returns what `put` takes back: a list, empty
    if their width is whole."""
    taken = []
    for i, layer in enumerate(subnetwork.layers if subnetwork and subnetwork.width else ()):
        weights = dict(model.blocks[layer].named_parameters())
        for kind in ("heads", "neurons"):
            kept = torch.tensor(getattr(subnetwork.width, kind)[i], device=model.bias.device)
            for name in ROWS[kind] + COLUMNS[kind]:
                p, moments = weights[name], optimizer.state[weights[name]] if optimizer else None
                wide = together(p, moments) if optimizer else p.data[None]
                shape = (len(wide), len(p), -1) if name in COLUMNS[kind] else (len(wide), -1, *p.shape[1:])
                narrow = slices(wide, name, model.config).index_select(2, kept)
                taken.append((p, name, kept, moments, wide, narrow))
                point(p, moments, narrow.view(shape))
    return taken


def point(p, moments, tensors):
    """Let a weight, and its moments if there are any, be these tensors."""
    p.data = tensors[0]
    if moments:
        moments["exp_avg"], moments["exp_avg_sq"] = tensors[1:]


@torch.no_grad()
def put(model, taken):
    """Undo `cut`: what it took goes back to its place, with what became of it. Gradients become as wide as their weights, zero
    where nothing trained. The list is empty then, so that putting back twice does nothing."""
    while taken:
        p, name, kept, moments, wide, narrow = taken.pop()
        if moments:  # without them nothing was trained
            slices(wide, name, model.config).index_copy_(2, kept, narrow)
        grad, p.grad = p.grad, None
        point(p, moments, wide)
        if grad is not None:
            p.grad = torch.zeros_like(p)
            part = slices(p.grad[None], name, model.config)
            part.index_copy_(2, kept, grad.view(1, part.shape[1], len(kept), -1))


def demo():
    from model import Config, make
    from raptr import RaPTr, Stage

    config = Config(layers=4, width=64, heads=8, mlp=256, seq=16, vocab=99, dropout=0.0)
    model, tokens = make(config), torch.arange(16)[None]
    method = RaPTr([Stage(1, 9, 2)], 4, {0, 3}, part="width", slices=8, gain="uniform")
    path = method.subnetwork(1)
    shapes = {name: p.shape for name, p in model.blocks[0].named_parameters()}
    taken = cut(model, path)
    print(f"\n  Heads {path.width.heads[0]} and neurons {path.width.neurons[0]}, in eighths, of the first of 4 layers\n")
    for name, p in model.blocks[0].named_parameters():
        print(f"    {name:22} {str(tuple(shapes[name])):12} {tuple(p.shape) if p.shape != shapes[name] else ''}")
    narrow = model.encode(tokens, path)
    put(model, taken)
    for i, block in enumerate(model.blocks):
        for writer, kept in ((block.attention.out, path.width.heads[i]), (block.mlp.down, path.width.neurons[i])):
            mask = torch.zeros(8).index_fill(0, torch.tensor(kept), path.width.scale).repeat_interleave(writer.in_features // 8)
            writer.register_forward_pre_hook(lambda module, inputs, mask=mask: inputs[0] * mask)
    difference = (model.encode(tokens) - narrow).abs().max()
    print(f"\n  Largest difference of its states from those of the whole network, the rest masked: {difference:.1e}\n")


if __name__ == "__main__":
    demo()
