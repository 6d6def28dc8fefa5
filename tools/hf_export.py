"""What `python -m tools.hf export` writes: weights, remote code, tokenizer and model card, and the check of them.

A post-LN BERT becomes transformers' own BertForMaskedLM. Every other model takes its own code along: model.py, raptr.py
and tools/hf_model.py, copied with relative imports, which transformers runs with trust_remote_code=True.
Not here: the other direction, and the names of BERT's weights (tools/hf.py).
"""

import json
import math
import re
import shutil
from pathlib import Path

import torch

from data import MODES, NO_TARGET, objective, sentinels
from engine import ROOT, checkpoint
from engine.errors import UserError
from engine.log import has_ended, read_log, write
from engine.runs import own_text
from text.prepare import CLS, MASK, PAD, SEP, UNK
from text.wordpiece import WordPiece

CODE = {"model.py": "model.py", "raptr.py": "raptr.py", "tools/hf_model.py": "modeling_raptr.py"}
CLASSES = {"bert": "RaptrForMaskedLM", "ul2": "RaptrForCausalLM"}
CLOSE = 1e-5  # logits in float32 may differ by so much

# ----------------------------------------------------------------------------------------------------------------
# Weights and code


def remote_code(text):
    """Our source as a file of the folder: imports of its neighbours made relative, without its demonstration, which
    imports the rest of the project."""
    text = re.sub(r"^from (model|raptr) import", r"from .\1 import", text, flags=re.MULTILINE)
    return re.split(r"\n+(?:# -+\n+)?def (?:picture|demo)\(", text)[0] + "\n"


def save_with_code(model, folder):
    """Write weights, config.json and code of any model of ours."""
    config, arch = model.config, model.config.arch
    head = {"bert": "AutoModelForMaskedLM", "ul2": "AutoModelForCausalLM"}[arch]
    classes = {"AutoConfig": "RaptrConfig", "AutoModel": "RaptrModel", head: CLASSES[arch]}
    about = {"model_type": "raptr", "architectures": [CLASSES[arch]], "dtype": "float32", "tie_word_embeddings": False}
    about["auto_map"] = {auto: f"modeling_raptr.{name}" for auto, name in classes.items()}
    about["layers"] = len(model.blocks)  # a network that still grows has fewer than its config says
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.json", json.dumps(vars(config) | about, indent=1))
    weights = {f"stack.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    checkpoint.write_tensors(weights, folder / "model.safetensors", {"format": "pt"})
    for source, name in CODE.items():
        write(folder / name, remote_code((ROOT / source).read_text(encoding="utf-8")))
    if arch == "ul2":
        V = config.vocab - len(MODES) - sentinels(config.seq)
        never = [PAD, UNK, CLS, MASK, *range(V, V + len(MODES))]
        settings = {"eos_token_id": SEP, "pad_token_id": PAD, "suppress_tokens": never, "max_length": config.seq}
        write(folder / "generation_config.json", json.dumps(settings, indent=1))


# ----------------------------------------------------------------------------------------------------------------
# Tokenizer


def fast_tokenizer(ours, config):
    """Our tokenizer as a transformers.PreTrainedTokenizerFast, with the same ids. It also reads special tokens where a
    text spells them out ("[MASK]"), which ours takes for ordinary text.

    It puts [CLS] and [SEP] around a text for a BERT. For a UL2 it writes [S] text <0> <0>: a text to be continued.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [ours.id_to_piece(i) for i in range(ours.vocab_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    bpe = models.BPE(ids, merges(ours, pieces, ids), unk_token=pieces[UNK], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    special = [pieces[i] for i in (PAD, UNK, CLS, SEP, MASK)]
    extra = [*MODES, *(f"<{i}>" for i in range(sentinels(config.seq)))] if config.arch == "ul2" else []
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in [*special, *extra]])
    form = "[S] $A <0> <0>" if extra else "[CLS] $A [SEP]"
    used = [(name, tokenizer.token_to_id(name)) for name in form.replace("$A ", "").split()]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=sorted(set(used)))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special))
    names |= {"eos_token": special[3], "extra_special_tokens": extra} if extra else {}
    inputs = ["input_ids", "attention_mask"]
    side = "left" if extra else "right"  # where a batch is padded: generation goes on at the right
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=config.seq, model_input_names=inputs,
                                   padding_side=side, clean_up_tokenization_spaces=False, **names)  # fmt: skip


def merges(ours, pieces, ids):
    """The pairs that BPE joins, first those that sentencepiece would join first: its piece of the highest score."""
    pairs = []
    for i, piece in enumerate(pieces):
        if not (ours.is_byte(i) or ours.is_control(i) or ours.is_unknown(i) or ours.is_unused(i)):
            splits = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
            found = [(left, right) for left, right in splits if left in ids and right in ids]
            pairs += [(-ours.get_score(i), ids[left], ids[right], left, right) for left, right in found]
    return [(left, right) for _, _, _, left, right in sorted(pairs)]


def save_tokenizer(ours, run, config, folder):
    """Write the run's tokenizer for transformers.AutoTokenizer. WordPiece stays WordPiece."""
    if isinstance(ours, WordPiece):
        from transformers import BertTokenizerFast

        for name in ("vocab.txt", "tokenizer_config.json"):
            if (run / name).exists():
                shutil.copy(run / name, folder)
        BertTokenizerFast.from_pretrained(folder, model_max_length=config.seq).save_pretrained(folder)
    else:
        fast_tokenizer(ours, config).save_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------
# Check


@torch.no_grad()
def difference(model, folder, run, args, rows=8):
    """(largest difference of the logits of the model and of what transformers loads from the folder, in float32; what
    they read): rows of held-out text, or random ids where the run's corpus is not here."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    arch, V = model.config.arch, model.config.vocab
    auto = transformers.AutoModelForMaskedLM if arch == "bert" else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    try:
        task, what = objective(args, own_text(run, args)), f"{rows} held-out sequences"
        batch = [torch.as_tensor(part).long() for part in task.held_out(rows)]
    except (UserError, AttributeError):
        tokens = torch.randint(len(MODES), V, (rows, model.config.seq), generator=torch.Generator().manual_seed(0))
        place = torch.arange(model.config.seq).expand(rows, -1) if arch == "bert" else torch.full((rows,), 5)
        batch, what = (tokens, place, torch.full_like(tokens, NO_TARGET)), f"{rows} sequences of random tokens"
    tokens, place = batch[:2]
    ours = model.float().eval().logits(tokens, place)[..., :V]
    if arch == "bert":
        got = theirs(input_ids=tokens).logits
        got = got.gather(1, place[..., None].expand(-1, -1, got.shape[-1]))
    else:
        got = theirs(input_ids=tokens, prefix=place).logits
    return float((ours - got[..., :V]).abs().max()), what


# ----------------------------------------------------------------------------------------------------------------
# Model card


CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags:
- raptr
- progressive-subnetworks
---

# {name}

Trained by an implementation of [Efficient Stagewise Pretraining via Progressive
Subnetworks](https://arxiv.org/abs/2402.05913).

{facts}
{figure}
```python
from transformers import AutoModelFor{kind}, AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained("{name}"{code})
model = AutoModelFor{kind}.from_pretrained("{name}"{code})
print(pipeline("{task}", model=model, tokenizer=tokenizer)("{ask}"))
```
{notes}
To the Hub: `hf upload NAME/{name} {name}`
"""
CODE_NOTE = """
`trust_remote_code=True` runs the three Python files of this folder; read them first. `model(..., subnetwork=...)` runs
a part of the layers.
"""
UL2_NOTE = """
The tokenizer writes `[S] text <0> <0>`, and all but the last token are read in both directions. To fill gaps, ask
`[X]text <0> text <1> text<0>` with `add_special_tokens=False`.
"""


def card(model, run, args, name, own_class, checked):
    """The text of README.md, with the Hub's metadata. checked: the sentence of the check."""
    config, events = model.config, read_log(run)
    bert = config.arch == "bert"
    flags = {name: getattr(args, name, None) for name in ("method", "stages", "alpha", "fixed", "sampling", "scaling")}
    method = ", ".join(f"{name} {value}" for name, value in flags.items() if value not in (None, ""))
    weights = sum(p.numel() for p in model.parameters())
    facts = [
        f"{'BERT' if bert else 'UL2 decoder'}: {len(model.blocks)} layers of width {config.width}, {weights:,} weights",
        f"sequences of {config.seq} tokens",
        f"training: {method}; {args.steps} steps of {args.batch} x {args.seq} tokens, seed {args.seed}",
    ]
    if first := next((e for e in events if e["event"] == "run"), None):  # an imported model has no log
        losses = [e["loss"] for e in events if e["event"] in ("eval", "done")]
        facts += [
            f"layer FLOPs: full training takes {first['relative_flops_layers']:.3f} times as many",
            f"data: {first['data']['source']}, fingerprint {first['data']['fingerprint']}",
            f"held-out loss: {losses[-1] if losses else math.nan:.3f} nats{'' if has_ended(events) else ' so far'}; "
            f"predicting by frequency gets {first['unigram_loss']:.3f}",
        ]
    return CARD.format(
        name=name,
        task="fill-mask" if bert else "text-generation",
        kind="MaskedLM" if bert else "CausalLM",
        facts="\n".join(f"- {fact}" for fact in [*facts, checked]),
        figure="\n![loss, and which layers ran](loss.png)\n" if (run / "loss.png").exists() else "",
        code="" if own_class else ", trust_remote_code=True",
        ask="If the [MASK] is empty, [MASK] is returned." if bert else "Return a new",
        notes=("" if own_class else CODE_NOTE) + ("" if bert else UL2_NOTE),
    )


def export(loaded, run, folder, save_bert):
    """Write the model of a run folder. loaded: what load_run returned; save_bert: writes a post-LN BERT, and raises
    UserError for another. The folder appears when it is complete. Prints what was checked.

    Raises UserError if transformers is missing, or does not compute the same from the folder.
    """
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError("export needs the package transformers: pip install transformers") from None
    (model, tokenizer, args), run, folder = loaded, Path(run), Path(folder)
    unfinished = folder.with_name(folder.name + "-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save_bert(model, unfinished)
        own_class = True
    except UserError:
        save_with_code(model, unfinished)
        own_class = False
    save_tokenizer(tokenizer, run, model.config, unfinished)
    largest, what = difference(model, unfinished, run, args)
    if not largest <= CLOSE:
        raise UserError(f"{unfinished}: transformers computes other logits, by up to {largest:.1e}; it stays there")
    checked = f"logits in transformers differ by {largest:.1e} at most, on {what} in float32"
    if (run / "loss.png").exists():
        shutil.copy(run / "loss.png", unfinished)
    write(unfinished / "README.md", card(model, run, args, folder.name, own_class, checked))
    unfinished.rename(folder)
    print(f"  {checked}")
    return own_class
