"""Deep Fusion: two trained networks become one, as wide as both together. Growing in width, where stacking grows in depth.

    python deep_fusion.py out/A out/B --out out/C                          then: python train.py --config out/C/preset.toml
    python deep_fusion.py out/A out/A --out out/C --noise 0.01             a network fused with itself
    python deep_fusion.py out/A out/B --out out/C --measure                how far it is from its parents, on held-out text

Every matrix becomes [[A, 0], [0, B]], every vector and embedding [a, b]; heads and hidden neurons stand side by side, and the
logits are the mean of both parents'. The zeros (the "fusion property") keep the function of a linear stack; a norm over
the joined vector keeps it only nearly. `--split_norms` norms each parent's part by itself, which keeps it exactly, at
the price of a network that always knows two parts. `--off_diagonal fresh` (the "fusion rule") draws the zeros instead.
Two equal halves, with zeros between them, would stay equal for ever: `--noise` makes them differ.
Not here: the training before and after (train.py).

Source: Deep Fusion (Mazzawi et al., arXiv 2306.11903). No code was published. Our reading: the logits' factor 1/2 goes into
the last norm before the head, as the head's matrix may be tied to the embedding; moments are taken over unscaled.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import denoisers
import torch

import data
import model as transformer
from engine import checkpoint, options
from engine.errors import UserError
from engine.runs import load_run, own_text

ADDED = ("width", "heads", "mlp")  # of the parents' shapes; all else they share
TRAINING_ONLY = ("dropout", "init_std", "loss_chunk", "norm_parts")


def last_norm(config):
    """Name of the norm whose output goes to the head's matrix and nowhere else."""
    if config.arch == "bert":
        return "head.2"
    return f"blocks.{config.layers - 1}.norm2" if config.norm == "post" else "final_norm"


def join(name, a, b, config, between=None):
    """One tensor of the fused network from those of its parents. between: tensor of the fused shape from which the blocks
    off the diagonal are taken; None: zeros."""
    if name == "bias":  # of the logits
        return (a + b) / 2
    parts = 3 if ".qkv." in name else 2 if ".up." in name and config.gated else 1
    if a.ndim == 1:
        return torch.cat([a.view(parts, -1), b.view(parts, -1)], 1).flatten()
    if name.split(".")[0] in ("tokens", "positions", "types", "relative", "untied"):  # rows are ids or places
        return torch.cat([a, b], 1)
    (n, w), (m, v) = (len(a) // parts, a.shape[1]), (len(b) // parts, b.shape[1])
    fused = a.new_zeros(parts * (n + m), w + v) if between is None else between.clone()
    by_part = fused.view(parts, n + m, w + v)  # of queries, keys, values; of both halves of a gated MLP
    by_part[:, :n, :w], by_part[:, n:, w:] = a.view(parts, n, w), b.view(parts, m, v)
    return fused


def fuse(a, b, config, fresh=None):
    """Weights {name: tensor} of the fused network, of `config`, from its parents'. fresh: weights of the fused shape, for the
    blocks off the diagonals; None: zeros, the function is kept as far as norms allow."""
    fused = {name: join(name, a[name], b[name], config, fresh and fresh[name]) for name in a}
    for name in fused:
        if name.rpartition(".")[0] == last_norm(config):
            fused[name] = fused[name] / 2  # the head adds both parents' logits: now it takes their mean
    return fused


def fused_config(a, b, split_norms=False):
    """Config of the fusion of two networks. ValueError unless they agree in all that is not width."""
    for name in ("arch", *(field.name for field in dataclasses.fields(a))):
        if name not in (*ADDED, *TRAINING_ONLY) and getattr(a, name) != getattr(b, name):
            raise UserError(f"the parents differ in --{name}: {getattr(a, name)} and {getattr(b, name)}")
    if a.width // a.heads != b.width // b.heads:
        raise UserError(f"the parents' heads differ in width: {a.width // a.heads} and {b.width // b.heads}")
    parts = "-".join([a.norm_parts or str(a.width), b.norm_parts or str(b.width)]) if split_norms else ""
    return dataclasses.replace(a, **{name: getattr(a, name) + getattr(b, name) for name in ADDED}, norm_parts=parts)


def perturbed(weights, noise, seed):
    """Weights times 1 + noise * standard normal numbers."""
    made = {}
    for name, tensor in weights.items():
        draws = data.rng(seed, f"fusion {name}", 0).standard_normal(tuple(tensor.shape), dtype="float32")
        made[name] = tensor * (1 + noise * torch.from_numpy(draws))
    return made


def same_tokens(a, b):
    """ValueError unless two run folders have the same tokenizer."""
    found = []
    for run in (a, b):
        path = next(run / name for name in ("vocab.txt", "tokenizer.model") if (run / name).exists())
        found.append(checkpoint.sha256(path))
    if found[0] != found[1]:
        raise UserError(f"the parents have different tokenizers: {a} has {found[0][:12]}, {b} has {found[1][:12]}")


def moments(run):
    """AdamW's state in a run folder. ValueError if there is none."""
    tensors, _ = checkpoint.load(checkpoint.folders(run)[-1])
    if "optimizer" not in tensors:
        raise UserError(f"{run}: its checkpoint has no moments; leave out --moments")
    return tensors["optimizer"]


def join_moments(a, b, config):
    """The optimizer's state of the fused network: moments where the parents' weights are, none between; as many steps as the
    parent of more has taken."""
    named = {key: key.partition(".") for key in a}
    return {
        key: torch.maximum(a[key], b[key]) if kind == "step" else join(name, a[key], b[key], config)
        for key, (kind, _, name) in named.items()
    }


@torch.no_grad()
def measure(parents, fusions, args, tokens):
    """Print the held-out losses of parents, of the mean of their logits and of {name: fusion}, and how far the fusions' logits
    are from that mean: root mean square, as a share of the mean's own standard deviation over the words."""
    batch = [torch.from_numpy(part) for part in denoisers.view(args, tokens).fixed(args.eval_sequences, args.seq)]
    written = batch[2] != data.NO_TARGET
    targets = batch[2][written]
    words = {
        name: model.eval().logits(batch[0], batch[1])[written][:, : model.config.vocab]
        for name, model in parents.items()
    }
    mean = sum(words.values()) / len(words)
    words["the mean of their logits"] = mean
    words |= {
        name: model.eval().logits(batch[0], batch[1])[written][:, : model.config.vocab]
        for name, model in fusions.items()
    }
    print(f"\n  held-out loss of {len(targets):,} words, and distance from the mean of the parents' logits\n")
    for name, logits in words.items():
        centred, aim = logits - logits.mean(1, True), mean - mean.mean(1, True)
        far = "" if name in parents else f"   {(centred - aim).square().mean().sqrt() / aim.std():.4f}"
        print(f"    {name:40} {torch.nn.functional.cross_entropy(logits, targets):.4f}{far}")


def write_preset(path, given):
    """A preset of all flags in which a run differs from train.py's defaults."""
    default = vars(options.flags().parse_args([]))
    lines = ["# Made by deep_fusion.py: goes on with a fused network."]
    for name, value in given.items():
        if name in default and name not in ("config", "out") and value != default[name]:
            lines.append(f"{name} = {json.dumps(value)}")
    path.write_text("\n".join(lines) + "\n")


def flags():
    about = argparse.RawDescriptionHelpFormatter
    parser = options.Parser(prog="deep_fusion.py", allow_abbrev=False, description=__doc__, formatter_class=about)
    parser.add_argument("parents", nargs=2, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--out", required=True, help="run folder to make, which must not exist")
    parser.add_argument(
        "--off_diagonal", choices=["zero", "fresh"], default="zero", help="blocks between the parents [zero]"
    )
    parser.add_argument("--split_norms", action="store_true", help="norm each parent's part of a vector by itself")
    parser.add_argument("--moments", action="store_true", help="take over the optimizer's moments too")
    parser.add_argument(
        "--noise", type=options.nonnegative, default=0.0, help="the second parent's weights times 1 + X * noise"
    )
    parser.add_argument("--measure", action="store_true", help="losses and distances on the parents' held-out text")
    parser.add_argument("--seed", type=options.natural, default=0, help="of noise and of fresh weights")
    return parser


def parents(args):
    """(two models, flags of the first, the fusion's config) of the run folders named. ValueError if they cannot be fused."""
    a, b = map(Path, args.parents)
    if Path(args.out).exists():
        raise UserError(f"--out {args.out}: is there already")
    (one, _, given), (other, _, _) = load_run(a), load_run(b)
    if a.resolve() == b.resolve() and args.off_diagonal == "zero" and not args.noise:
        raise UserError(f"{a} fused with itself: equal halves stay equal; give --noise, or --off_diagonal fresh")
    same_tokens(a, b)
    for run, model in ((a, one), (b, other)):
        if len(model.blocks) != model.config.layers:
            raise UserError(
                f"{run}: has {len(model.blocks)} of its {model.config.layers} layers so far; let it grow first"
            )
    config = fused_config(one.config, other.config, args.split_norms)
    if args.noise:
        other.load_state_dict(perturbed(named(other), args.noise, args.seed), strict=False)
    return [one, other], given, config


def named(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def write(out, first, given, config, tensors):
    """Make a run folder of the fused network: checkpoint, flags, tokenizer, and a preset to go on with. The name appears when
    all is in it."""
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    kept = (
        vars(given)
        | {name: getattr(config, name) for name in (*ADDED, "norm_parts")}
        | {"method": "full", "stages": "auto"}
    )
    kept |= {"out": str(out), "init": str(out), "init_moments": "optimizer" in tensors}
    for name in ("tokenizer.model", "vocab.txt", "tokenizer_config.json"):
        if (first / name).exists():
            shutil.copy(first / name, unfinished)
    (unfinished / "config.json").write_text(json.dumps(kept, indent=1))
    write_preset(unfinished / "preset.toml", kept)
    checkpoint.save(unfinished, 0, tensors, {"step": 0, "flops": 0, "seconds": 0.0, "flags": kept})
    unfinished.rename(out)


def main(argv):
    parser = flags()
    args = parser.parse_args(argv)
    a, b = map(Path, args.parents)
    try:
        (one, other), given, config = parents(args)
        state = [moments(run) for run in (a, b)] if args.moments else None
        text = own_text(a, given) if args.measure else None
    except ValueError as error:
        parser.error(str(error))
    fresh = named(transformer.make(config, args.seed)) if args.off_diagonal == "fresh" else None
    tensors = {"model": fuse(named(one), named(other), config, fresh)}
    if state:
        tensors["optimizer"] = join_moments(*state, config)
    if text:
        fusions = {}
        for name, split in (("fused, norms over both", False), ("fused, norms over each (--split_norms)", True)):
            fusions[name] = transformer.make(fused_config(one.config, other.config, split))
            fusions[name].load_state_dict(tensors["model"], strict=False)
        both = {f"first parent, {a.name}": one, f"second parent, {b.name}": other}
        measure(both, fusions, given, text)
    write(Path(args.out), a, given, config, tensors)
    print(f"\n  {a}, of width {one.config.width}, and {b}, of width {other.config.width}, are now {args.out}:")
    print(f"  width {config.width}, {config.heads} heads, {config.mlp} hidden neurons")
    print(f"\n  train it:  python train.py --config {args.out}/preset.toml --out {args.out}-trained\n")


if __name__ == "__main__":
    main(sys.argv[1:])
