"""A run folder, opened again: its model, its tokenizer, its text. For whatever comes after training.

Not here: how it was written (train.py, checkpoint.py), or made from somebody else's model (hf.py).
"""

import json
from pathlib import Path

import denoisers

import data
import model as transformer
from engine import checkpoint, options
from engine.errors import UserError
from text import prepare
from text.wordpiece import WordPiece


def load_run(run, device="cpu"):
    """(model, tokenizer, flags) of a run folder, from its newest checkpoint. ValueError if it is not one, or that is bad."""
    run = Path(run)
    try:
        given = json.loads((run / "config.json").read_text())
        if not {"layers", "seed"} <= given.keys():
            raise ValueError
        args, folders = options.complete(given), checkpoint.folders(run)
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{run}: not a run folder of train.py") from None
    if not folders:
        raise UserError(f"{run}: there is no checkpoint in it yet")
    if (run / "vocab.txt").exists():  # taken over from elsewhere (hf.py)
        tokenizer = WordPiece(run / "vocab.txt")
    else:
        tokenizer = prepare.load_tokenizer(run / "tokenizer.model")
    tensors = checkpoint.load(folders[-1], device)[0]
    config = transformer.Config.of(args, denoisers.model_vocab(args, tokenizer.vocab_size()))
    model = transformer.make(config).to(device).eval()
    depth = 1 + max(int(name.split(".")[1]) for name in tensors["model"] if name.startswith("blocks."))
    model.blocks = model.blocks[:depth]
    transformer.check_weights(model, tensors["model"], folders[-1])
    model.load_state_dict(tensors["model"], strict=False)  # buffers are made, not saved
    model.pooler = tensors.get("pooler")
    return model, tokenizer, args


def own_text(run, flags):
    """The corpus that a run was trained on. ValueError if what is there now is another: its tokens would mean nothing to it."""
    corpus = data.open_corpus(flags.data, flags.vocab)
    if getattr(flags, "data_fingerprint", None) != corpus.fingerprint:
        raise UserError(f"{run}: {corpus.folder} is not the text it was trained on")
    return corpus


def provenance(run, args, names, files):
    """What a score depends on: {"run": its folder, "weights": hash of the newest checkpoint's manifest ("" if there is none),
    hashes of `files`, which is {name: path}, and the flags `names`}."""
    newest = checkpoint.folders(run)[-1:]
    kept = {
        "run": str(Path(run).resolve()),
        "weights": "".join(checkpoint.sha256(path / "manifest.json") for path in newest),
    }
    return (
        kept
        | {name: checkpoint.sha256(path) for name, path in files.items()}
        | {name: getattr(args, name) for name in names}
    )
