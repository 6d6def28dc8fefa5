"""Deep Fusion: two trained networks become one, as wide as both together. It grows in width, stacking in depth.

    python -m methods.deep_fusion out/A out/B --out out/C
    python train.py --config out/C/preset.toml --out out/C-trained            train it
    python -m methods.deep_fusion out/A out/A --out out/C --noise 0.01           fuse a network with itself
    python -m methods.deep_fusion out/A out/B --out out/C --measure              compare it with its parents, on text

Every matrix becomes [[A, 0], [0, B]], every vector and embedding [a, b]; heads and hidden neurons stand side by side,
and the logits, with their bias, are the mean of both parents'. The zeros (the "fusion property") keep the function of a
linear stack. A norm over the joined vector keeps it only approximately; `--split_norms` norms each parent's entries
separately, which keeps it exactly. `--off_diagonal fresh` (the "fusion rule") has random numbers instead of the zeros.
Two equal halves with zeros between them would stay equal in training: `--noise` makes them differ.
Not here: the training before and after (train.py).

Source: Deep Fusion (Mazzawi et al., arXiv 2306.11903). No code was published. Our reading: the factor 1/2 of the logits
goes into the last norm before the head, as the head's matrix may be tied to the embedding.
Legend: n, m rows and w, v columns of the parents' matrices.
"""

import dataclasses
import json
from pathlib import Path

import torch

from engine.errors import UserError, guard
from text.corpus import rng

ADDED = ("width", "heads", "mlp")  # the fused network has the sum of its parents'; they must agree in all other flags
TRAINING_ONLY = ("dropout", "init_std", "loss_chunk", "norm_parts")  # but for these
MACHINE = ("device", "micro_batch", "compile", "recompute", "threads", "fsdp", "timeout", "log_to")  # not the network's
TOKENIZERS = ("vocab.txt", "tokenizer.model")  # files of a run folder; it has one of them

# ----------------------------------------------------------------------------------------------------------------
# Tensors


def last_norm(config):
    """Name of the norm whose output goes to the head's matrix and nowhere else."""
    if config.arch == "bert":
        return "head.2"
    return f"blocks.{config.layers - 1}.norm2" if config.norm == "post" else "final_norm"


def join(name, a, b, config, between=None):
    """One tensor of the fused network, from the parents' tensors of that name. between: a tensor of the fused shape
    that gives the blocks off the diagonal; None: zeros."""
    if name == "bias":  # of the logits
        return (a + b) / 2
    # A tensor may hold several parts above each other: queries, keys and values; both halves of a gated MLP.
    parts = 3 if ".qkv." in name else 2 if ".up." in name and config.gated else 1
    if a.ndim == 1:
        return torch.cat([a.view(parts, -1), b.view(parts, -1)], 1).flatten()
    if name.split(".")[0] in ("tokens", "positions", "types", "relative", "untied"):  # rows are ids or places
        return torch.cat([a, b], 1)
    (n, w), (m, v) = (len(a) // parts, a.shape[1]), (len(b) // parts, b.shape[1])
    fused = a.new_zeros(parts * (n + m), w + v) if between is None else between.clone()
    by_part = fused.view(parts, n + m, w + v)
    by_part[:, :n, :w], by_part[:, n:, w:] = a.view(parts, n, w), b.view(parts, m, v)
    return fused


def fuse(a, b, config, fresh=None):
    """Weights {name: tensor} of the fused network, from its parents'. config: of the fused network. fresh: weights of
    its shape that give the blocks off the diagonals; None: zeros, which keep the function as far as norms allow."""
    fused = {name: join(name, a[name], b[name], config, fresh and fresh[name]) for name in a}
    for name in fused:
        if name.rpartition(".")[0] == last_norm(config):
            fused[name] = fused[name] / 2  # the head adds both parents' logits, so that this gives their mean
    return fused


def fused_config(a, b, split_norms=False):
    """Config of the fusion of two networks, from theirs. Raises UserError unless they differ in width alone."""
    for name in ("arch", *(field.name for field in dataclasses.fields(a))):
        if name not in (*ADDED, *TRAINING_ONLY) and getattr(a, name) != getattr(b, name):
            raise UserError(f"the parents differ in --{name}: {getattr(a, name)} and {getattr(b, name)}")
    if a.width // a.heads != b.width // b.heads:
        raise UserError(f"the parents' heads differ in width: {a.width // a.heads} and {b.width // b.heads}")
    parts = "-".join([a.norm_parts or str(a.width), b.norm_parts or str(b.width)]) if split_norms else ""
    return dataclasses.replace(a, **{name: getattr(a, name) + getattr(b, name) for name in ADDED}, norm_parts=parts)


def perturbed(weights, noise, seed):
    """Weights times 1 + noise * standard normal numbers."""
    result = {}
    for name, tensor in weights.items():
        normal = rng(seed, f"fusion {name}").standard_normal(tuple(tensor.shape), dtype="float32")
        result[name] = tensor * (1 + noise * torch.from_numpy(normal))
    return result


def named(model):
    return {name: p.detach() for name, p in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------------------
# The command: run folders. It imports what it needs itself, so that the tensors above need nothing of train.py's.


def load_parents(args):
    """(two models, flags of the first, the fusion's config) of the run folders. Raises UserError if they do not fit."""
    from engine import checkpoint
    from engine.runs import load_run

    a, b = map(Path, args.parents)
    if Path(args.out).exists():
        raise UserError(f"--out {args.out} exists already")
    (one, _, flags), (other, _, _) = load_run(a), load_run(b)
    if a.resolve() == b.resolve() and args.off_diagonal == "zero" and not args.noise:
        raise UserError(f"{a} fused with itself: equal halves stay equal; give --noise, or --off_diagonal fresh")
    files = [next(run / name for name in TOKENIZERS if (run / name).exists()) for run in (a, b)]
    hashes = [checkpoint.sha256(file)[:12] for file in files]
    if hashes[0] != hashes[1]:
        raise UserError(f"the parents have different tokenizers: {a} has {hashes[0]}, {b} has {hashes[1]}")
    for run, model in ((a, one), (b, other)):
        depth, layers = len(model.blocks), model.config.layers
        if depth != layers:
            raise UserError(f"{run}: has {depth} of its {layers} layers so far; train it to the end first")
    config = fused_config(one.config, other.config, args.split_norms)
    if args.noise:
        other.load_state_dict(perturbed(named(other), args.noise, args.seed), strict=False)
    return [one, other], flags, config


@torch.no_grad()
def measure(parents, fusions, objective, sequences):
    """Print held-out losses of parents {name: model}, of the mean of their logits, and of fusions {name: model}, and
    how far the fusions' logits are from that mean: the root mean square, as a share of the mean's standard deviation.
    Logits are centred first, as adding a number to all of a word's changes nothing."""
    from data import NO_TARGET

    tokens, masked, targets = map(torch.from_numpy, objective.held_out(sequences))
    written = targets != NO_TARGET
    logits = lambda model: model.eval().logits(tokens, masked)[written][:, : model.config.vocab]  # noqa: E731
    said = {name: logits(model) for name, model in parents.items()}
    mean = sum(said.values()) / len(said)
    said["the mean of their logits"] = mean
    said |= {name: logits(model) for name, model in fusions.items()}
    print(f"\n  held-out loss of {written.sum():,} words, and distance from the mean of the parents' logits\n")
    for name, values in said.items():
        loss = torch.nn.functional.cross_entropy(values, targets[written])
        centred, aim = values - values.mean(1, True), mean - mean.mean(1, True)
        distance = "" if name in parents else f"   {(centred - aim).square().mean().sqrt() / aim.std():.4f}"
        print(f"    {name:40} {loss:.4f}{distance}")


def write(out, first, flags, config, tensors):
    """Write a run folder of the fused network: a checkpoint, flags, a tokenizer, and a preset to train on with. first:
    run folder of the first parent. flags: of that run."""
    from engine import options
    from engine.runs import make_run

    flags = vars(flags) | {name: getattr(config, name) for name in (*ADDED, "norm_parts")}
    flags |= {"method": "full", "stages": "auto", "out": str(out), "init": str(out)}
    default = vars(options.flags().parse_args([]))
    left_out = ("config", "out", *MACHINE)
    changed = {name: flags[name] for name in default if name not in left_out and flags[name] != default[name]}
    preset = [f"{name} = {json.dumps(value)}" for name, value in changed.items() if value is not None]
    comment = "# Made by methods.deep_fusion: trains a fused network on."
    tokenizer = [first / name for name in (*TOKENIZERS, "tokenizer_config.json")]
    make_run(out, flags, tokenizer, tensors, {"preset.toml": "\n".join([comment, *preset]) + "\n"})


def main(argv=None):
    import model as transformer
    from data import objective
    from engine import options
    from engine.runs import own_text

    parser = options.command("methods.deep_fusion", __doc__)
    parser.add_argument("parents", nargs=2, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--out", required=True, help="run folder to make, which must not exist")
    blocks = "blocks between the parents [zero]"
    parser.add_argument("--off_diagonal", choices=["zero", "fresh"], default="zero", help=blocks)
    parser.add_argument("--split_norms", action="store_true", help="norm each parent's entries separately")
    noise = "multiply the second parent's weights by 1 + X * noise"
    parser.add_argument("--noise", type=options.nonnegative, default=0.0, help=noise)
    parser.add_argument("--measure", action="store_true", help="losses and distances on the parents' held-out text")
    parser.add_argument("--seed", type=options.natural, default=0, help="of noise and of fresh weights")
    args = parser.parse_args(argv)

    a, b = map(Path, args.parents)
    (one, other), flags, config = load_parents(args)
    text = own_text(a, flags) if args.measure else None
    fresh = named(transformer.make(config, args.seed)) if args.off_diagonal == "fresh" else None
    tensors = {"model": fuse(named(one), named(other), config, fresh)}
    if text:
        fusions = {}
        for name, split in (("fused, norms over both", False), ("fused, norms over each (--split_norms)", True)):
            fusions[name] = transformer.make(fused_config(one.config, other.config, split))
            fusions[name].load_state_dict(tensors["model"], strict=False)
        both = {f"first parent, {a.name}": one, f"second parent, {b.name}": other}
        measure(both, fusions, objective(flags, text), flags.eval_sequences)
    write(Path(args.out), a, flags, config, tensors)
    print(f"\n  {a}, of width {one.config.width}, and {b}, of width {other.config.width}, are now {args.out}:")
    print(f"  width {config.width}, {config.heads} heads, {config.mlp} hidden neurons")
    print(f"\n  train it:  python train.py --config {args.out}/preset.toml --out {args.out}-trained\n")


if __name__ == "__main__":
    guard("methods.deep_fusion", main)
