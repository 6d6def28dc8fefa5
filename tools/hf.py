"""Exchange models with Hugging Face `transformers`: import their BERT as a run folder, export every model of ours.

    python -m tools.hf import FOLDER --out RUN       config.json, model.safetensors and vocab.txt become a run folder
    python -m tools.hf export RUN --out FOLDER       for from_pretrained, pipeline and generate, with its tokenizer

What `transformers` calls BERT is post-LN with learned positions and layer norms (train.py --norm post --positions
learned): it is imported and exported as such. Other models are exported with their own code (tools/hf_export.py).
`pip install transformers` first; importing needs only its part `tokenizers`. Not here: training somebody else's model
over paths (raptr.over).
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import model as transformer
from engine import checkpoint, options
from engine.errors import UserError, guard
from engine.runs import load_run, make_run
from text.wordpiece import WordPiece
from tools import hf_export

# ----------------------------------------------------------------------------------------------------------------
# Weights


def names(layers):
    """{name of our weight: [names of their weights]}. Ours holds theirs stacked along the first dimension."""
    both = {
        "tokens.weight": ["embeddings.word_embeddings.weight"],
        "positions.weight": ["embeddings.position_embeddings.weight"],
        "types.weight": ["embeddings.token_type_embeddings.weight"],
    }
    pairs = {"embedding_norm": ["embeddings.LayerNorm"]}
    for i in range(layers):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        pairs |= {
            f"{ours}.attention.qkv": [f"{theirs}.attention.self.{name}" for name in ("query", "key", "value")],
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
    "head.0.weight": "cls.predictions.transform.dense.weight",
    "head.0.bias": "cls.predictions.transform.dense.bias",
    "head.2.weight": "cls.predictions.transform.LayerNorm.weight",
    "head.2.bias": "cls.predictions.transform.LayerNorm.bias",
    "bias": "cls.predictions.bias",
}


def todays(name):
    """A weight's name as `names` has it. Early checkpoints, such as bert-base-uncased, call a norm's weight gamma and
    its bias beta."""
    name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
    return name.replace("LayerNorm.beta", "LayerNorm.bias")


def load(folder):
    """(model, tokenizer) of a folder with a `transformers` BERT. The tokenizer is None without a vocab.txt.

    A missing masked-LM head is initialised afresh. A pooler, if there is one, becomes model.pooler.
    Raises UserError if the folder holds no BERT that we can run.
    """
    folder = Path(folder)
    try:
        c = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        kind = c["model_type"], c["hidden_act"], c.get("position_embedding_type", "absolute")
        if kind != ("bert", "gelu", "absolute"):
            raise UserError(f"{folder}: not a BERT with GELU and absolute positions")
        config = transformer.Config(
            layers=c["num_hidden_layers"], width=c["hidden_size"], heads=c["num_attention_heads"],
            mlp=c["intermediate_size"], seq=c["max_position_embeddings"], vocab=c["vocab_size"],
            dropout=c["hidden_dropout_prob"], norm="post", types=c["type_vocab_size"], norm_eps=c["layer_norm_eps"],
            init_std=c["initializer_range"],
        )  # fmt: skip
    except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: no config.json and model.safetensors of a BERT there ({error})") from None
    tensors = {todays(name): tensor for name, tensor in tensors.items()}
    model = transformer.BERT(config).eval()
    weights = dict(model.named_parameters())
    try:
        given = {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in names(config.layers).items()}
    except KeyError as error:
        raise UserError(f"{folder}: the weight {error} is missing") from None
    if HEAD["bias"] in tensors:
        given |= {ours: tensors[theirs] for ours, theirs in HEAD.items()}
    with torch.no_grad():
        for name, tensor in given.items():
            target = weights[name][: len(tensor)]  # our tables are padded to a multiple of 64 rows, never used
            if target.shape != tensor.shape:
                raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, not {tuple(target.shape)}")
            target.copy_(tensor)
            weights[name][len(tensor) :] = 0
    if {"pooler.dense.weight", "pooler.dense.bias"} <= tensors.keys():
        model.pooler = {kind: tensors[f"pooler.dense.{kind}"] for kind in ("weight", "bias")}
    return model, WordPiece(folder / "vocab.txt") if (folder / "vocab.txt").exists() else None


def save(model, folder):
    """Write a BERT of ours as `transformers` reads it. Raises UserError if their BERT has no such shape."""
    c, folder = model.config, Path(folder)
    shape = c.arch, c.norm, c.positions, c.rms, c.gated, c.tied, c.norm_parts
    if shape != ("bert", "post", "learned", False, False, True, ""):
        rule = "post-LN with learned positions, layer norms and a tied head"
        raise UserError(f"transformers' BERT is {rule}; this model is not (train with --norm post --positions learned)")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    weights.setdefault("types.weight", torch.zeros(2, c.width))
    weights = {name: p[: c.vocab] if name in ("tokens.weight", "bias") else p for name, p in weights.items()}
    tensors = {}
    for ours, theirs in names(len(model.blocks)).items():
        chunks = weights[ours].chunk(len(theirs))
        tensors |= {f"bert.{name}": chunk.clone() for name, chunk in zip(theirs, chunks)}
    tensors |= {theirs: weights[ours].clone() for ours, theirs in HEAD.items()}
    config = {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_act": "gelu", "pad_token_id": 0,
        "num_hidden_layers": len(model.blocks), "hidden_size": c.width, "num_attention_heads": c.heads,
        "intermediate_size": c.mlp, "max_position_embeddings": c.seq, "vocab_size": c.vocab,
        "hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.dropout, "layer_norm_eps": c.norm_eps,
        "type_vocab_size": len(weights["types.weight"]), "initializer_range": c.init_std,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_tensors(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


# ----------------------------------------------------------------------------------------------------------------
# The command


def to_run(folder, run):
    """Write a run folder, as train.py leaves one, from a `transformers` folder."""
    model, tokenizer = load(folder)
    if tokenizer is None:
        raise UserError(f"{folder}: there is no vocab.txt in it")
    if tokenizer.vocab_size() > model.config.vocab:
        words = f"{tokenizer.vocab_size()} words, the model {model.config.vocab}"
        raise UserError(f"{folder}: vocab.txt has {words}")
    flags = vars(options.parse(["--config=configs/bert_base.toml", f"--out={run}"])) | vars(model.config)
    flags |= {"init": str(folder)}
    tensors = {"model": {name: p.detach() for name, p in model.named_parameters()}}
    tensors |= {"pooler": model.pooler} if model.pooler else {}
    make_run(run, flags, [Path(folder, name) for name in ("vocab.txt", "tokenizer_config.json")], tensors)


def main():
    parser = options.command("tools.hf", __doc__)
    parser.add_argument("direction", choices=["import", "export"])
    parser.add_argument("folder", help="folder to read")
    parser.add_argument("--out", required=True, help="folder to write; must not exist")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise UserError(f"--out {args.out} exists already")
    if args.direction == "import":
        to_run(args.folder, Path(args.out))
        print(f"{args.out}: imported; next: python eval_superglue.py --finetune {args.out} --data SuperGLUE/")
    else:
        own_class = hf_export.export(load_run(args.folder), args.folder, args.out, save)
        how = "" if own_class else ", with trust_remote_code=True"
        print(f"{args.out}: exported; its README.md says how to load it{how}")


if __name__ == "__main__":
    guard("tools.hf", main)
