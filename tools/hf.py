"""Exchange with Hugging Face `transformers`: take over its BERT, give it ours, and run its models over a subnetwork.

    python hf.py import FOLDER --out RUN        config.json, model.safetensors, vocab.txt -> a run folder (sample.py reads it)
    python hf.py export RUN --out FOLDER        the other way; transformers.AutoModelForMaskedLM.from_pretrained(FOLDER)

Only what `transformers` calls BERT can be exchanged: post-LN, learned positions, layer norms (--norm post --positions learned).
Importing needs the `tokenizers` package (wordpiece.py); `transformers` itself is not needed.
`over` is for a training script of your own: RaPTr for any model whose layers stand in an nn.ModuleList.
"""

import argparse
import contextlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import model as transformer
from engine import checkpoint
from engine.errors import UserError
from text.wordpiece import WordPiece

# ----------------------------------------------------------------------------------------------------------------
# Somebody else's model


class Scaled(torch.nn.Module):
    """A layer whose update, what it adds to its input, is multiplied by a number."""

    def __init__(self, layer, scale):
        super().__init__()
        self.layer, self.scale = layer, scale

    def forward(self, x, *args, **more):
        out = self.layer(x, *args, **more)
        if isinstance(out, tuple):
            return (torch.lerp(x, out[0], self.scale), *out[1:])
        return torch.lerp(x, out, self.scale)


@contextlib.contextmanager
def over(layers, subnetwork):
    """Within this context the nn.ModuleList `layers` holds only the kept layers, so the model runs, and trains, only those.

    Make the optimizer outside, over all parameters, and let skipped gradients be None (zero_grad(set_to_none=True)).
    Under DistributedDataParallel this fails or hangs: it waits for the gradients of skipped layers. Sum the gradients that
    are there yourself (parallel.py), or use FSDP2. ValueError for a subnetwork that leaves out more than layers.
    """
    if subnetwork is not None and (subnetwork.width or subnetwork.rows or subnetwork.frozen):
        raise UserError("hf.over runs some of the layers; it cannot cut their width, freeze them or pick sequences")
    everything = dict(layers._modules)
    if subnetwork is not None:
        kept = [layers[i] for i in subnetwork.layers]
        if subnetwork.scale is not None:
            kept = [Scaled(layer, scale) for layer, scale in zip(kept, subnetwork.scale)]
        layers._modules = {str(i): layer for i, layer in enumerate(kept)}
    try:
        yield
    finally:
        layers._modules = everything


# ----------------------------------------------------------------------------------------------------------------
# Names and shapes


def names(layers):
    """{our weight: their weights, which ours holds one below the other}."""
    both = {
        "tokens.weight": ["embeddings.word_embeddings.weight"],
        "positions.weight": ["embeddings.position_embeddings.weight"],
        "types.weight": ["embeddings.token_type_embeddings.weight"],
    }
    pairs = {"embedding_norm": ["embeddings.LayerNorm"]}
    for i in range(layers):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        pairs |= {
            f"{ours}.attention.qkv": [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")],
            f"{ours}.attention.out": [f"{theirs}.attention.output.dense"],
            f"{ours}.norm1": [f"{theirs}.attention.output.LayerNorm"],
            f"{ours}.mlp.up": [f"{theirs}.intermediate.dense"],
            f"{ours}.mlp.down": [f"{theirs}.output.dense"],
            f"{ours}.norm2": [f"{theirs}.output.LayerNorm"],
        }
    for ours, theirs in pairs.items():
        both |= {f"{ours}.{kind}": [f"{name}.{kind}" for name in theirs] for kind in ("weight", "bias")}
    return both


HEAD = {
    "head.0.weight": "cls.predictions.transform.dense.weight", "head.0.bias": "cls.predictions.transform.dense.bias",
    "head.2.weight": "cls.predictions.transform.LayerNorm.weight", "head.2.bias": "cls.predictions.transform.LayerNorm.bias",
    "bias": "cls.predictions.bias",
}  # fmt: skip


def load(folder):
    """(model, tokenizer or None) of a folder with a `transformers` BERT. Without a masked-LM head in it, ours is fresh. A
    pooler in it becomes model.pooler. ValueError if it is not a BERT we can run."""
    folder = Path(folder)
    try:
        c = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        if (
            c["model_type"] != "bert"
            or c["hidden_act"] != "gelu"
            or c.get("position_embedding_type", "absolute") != "absolute"
        ):
            raise UserError(f"{folder}: not a BERT with GELU and absolute positions")
        config = transformer.Config(
            layers=c["num_hidden_layers"], width=c["hidden_size"], heads=c["num_attention_heads"], mlp=c["intermediate_size"],
            seq=c["max_position_embeddings"], vocab=c["vocab_size"], dropout=c["hidden_dropout_prob"], norm="post",
            types=c["type_vocab_size"], norm_eps=c["layer_norm_eps"], init_std=c["initializer_range"],
        )  # fmt: skip
    except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: no config.json and model.safetensors of a BERT there ({error})") from None
    tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    model = transformer.BERT(config).eval()
    own = dict(model.named_parameters())
    try:
        found = {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in names(config.layers).items()}
    except KeyError as error:
        raise UserError(f"{folder}: the weight {error} is missing") from None
    if HEAD["bias"] in tensors:
        found |= {ours: tensors[theirs] for ours, theirs in HEAD.items()}
    with torch.no_grad():
        for ours, tensor in found.items():
            target = own[ours][: len(tensor)]  # ours has a few more rows, for words that are never used
            if target.shape != tensor.shape:
                raise UserError(f"{folder}: {ours} has shape {tuple(tensor.shape)}, not {tuple(target.shape)}")
            target.copy_(tensor)
            if len(own[ours]) > len(tensor):
                own[ours][len(tensor) :] = 0
    if {"pooler.dense.weight", "pooler.dense.bias"} <= tensors.keys():
        model.pooler = {kind: tensors[f"pooler.dense.{kind}"] for kind in ("weight", "bias")}
    return model, WordPiece(folder / "vocab.txt") if (folder / "vocab.txt").exists() else None


def save(model, folder):
    """Write a BERT of ours as `transformers` reads it. ValueError if `transformers`' BERT cannot be it."""
    c, folder = model.config, Path(folder)
    if (c.arch, c.norm, c.positions, c.rms, c.gated, c.tied, c.norm_parts) != (
        "bert",
        "post",
        "learned",
        False,
        False,
        True,
        "",
    ):
        raise UserError("transformers' BERT is post-LN with learned positions, layer norms and a tied head; this model is not "
                         "(train with --norm post --positions learned)")  # fmt: skip
    own = {name: p.detach() for name, p in model.named_parameters()}
    own.setdefault("types.weight", torch.zeros(2, c.width))
    own = {name: p[: c.vocab] if name in ("tokens.weight", "bias") else p for name, p in own.items()}
    tensors = {}
    for ours, theirs in names(len(model.blocks)).items():
        parts = own[ours].chunk(len(theirs))
        tensors |= {f"bert.{name}": part.clone() for name, part in zip(theirs, parts)}
    tensors |= {theirs: own[ours].clone() for ours, theirs in HEAD.items()}
    config = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_act": "gelu", "num_hidden_layers": len(model.blocks),
        "hidden_size": c.width, "num_attention_heads": c.heads, "intermediate_size": c.mlp, "max_position_embeddings": c.seq,
        "vocab_size": c.vocab, "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.dropout,
        "type_vocab_size": len(own["types.weight"]), "layer_norm_eps": c.norm_eps, "initializer_range": c.init_std,
        "pad_token_id": 0,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


# ----------------------------------------------------------------------------------------------------------------


def to_run(folder, run):
    """A run folder from a `transformers` folder."""
    model, tokenizer = load(folder)
    run = Path(run)
    if run.exists():
        raise UserError(f"--out {run}: is there already")
    if tokenizer is None:
        raise UserError(f"{folder}: there is no vocab.txt in it")
    from engine.options import parse

    flags = (
        vars(parse(["--config=configs/bert_base.toml", f"--out={run}"])) | vars(model.config) | {"init": str(folder)}
    )
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(flags, indent=1))
    for name in ("vocab.txt", "tokenizer_config.json"):
        if Path(folder, name).exists():
            shutil.copy(Path(folder, name), run)
    tensors = {"model": {name: p.detach() for name, p in model.named_parameters()}}
    tensors |= {"pooler": model.pooler} if model.pooler else {}
    checkpoint.save(run, 0, tensors, {"step": 0, "flops": 0, "seconds": 0.0, "flags": flags})


def main():
    from engine.options import Parser

    parser = Parser(
        prog="hf.py", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("direction", choices=["import", "export"])
    parser.add_argument("folder", help="what to read")
    parser.add_argument("--out", required=True, help="the folder to write, which must not exist")
    args = parser.parse_args()
    try:
        if args.direction == "import":
            to_run(args.folder, args.out)
            print(f"{args.out}: taken over; next: python eval_superglue.py --finetune {args.out} --data SuperGLUE/")
        else:
            if Path(args.out).exists():
                raise UserError(f"--out {args.out}: is there already")
            from engine.runs import load_run  # here, so that `over` asks for little

            model, _, _ = load_run(args.folder)
            save(model, args.out)
            print(f"{args.out}: transformers.AutoModelForMaskedLM.from_pretrained({args.out!r})")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
