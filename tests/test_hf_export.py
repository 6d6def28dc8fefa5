"""Exported folders, loaded by transformers in a fresh process that cannot see the project."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from data import MODES
from engine.runs import load_run
from processes import script
from test_train import go
from text.prepare import CLS, MASK, PAD, SEP, UNK
from tools.sample import fill

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

KINDS = {
    "post-LN BERT": "--norm post --positions learned",
    "pre-LN rotary BERT": "--positions rotary --types 2",
    "gated UL2": "--arch ul2 --gated --rms --positions rotary",
    "relative UL2": "--arch ul2 --positions relative --no-tied",
}
LIMIT = 12  # tokens to write

LOADED = """
    import json, sys
    import torch, transformers
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder, bert, asked = sys.argv[1], sys.argv[2] == "bert", json.load(sys.stdin)
    assert not any("raptr" in path for path in sys.path)
    with torch.no_grad():
        auto = AutoModelForMaskedLM if bert else AutoModelForCausalLM
        model, tokenizer = auto.from_pretrained(folder, trust_remote_code=True), AutoTokenizer.from_pretrained(folder)
        tokens = torch.tensor(asked["tokens"])
        more = {} if bert else {"prefix": torch.tensor(asked["prefix"])}
        found = {"logits": model(tokens, **more).logits.tolist(), "class": type(model).__name__}
        base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        states = base(tokens, output_hidden_states=True, **more)
        found["hidden"] = [len(states.hidden_states), states.last_hidden_state.tolist()]
        found["ids"] = tokenizer(asked["lines"], add_special_tokens=False)["input_ids"]
        found["texts"] = [tokenizer.decode(ids) for ids in found["ids"]]
        if bert:
            fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
            found["filled"] = [[word["token"] for word in fill(text, top_k=3)] for text in asked["masked"]]
        else:
            write = lambda rows, **more: model.generate(
                torch.tensor(rows), do_sample=False, max_new_tokens=asked["limit"], **more)[:, len(rows[0]):].tolist()
            found["written"] = [write([prompt])[0] for prompt in asked["prompts"]]
            found["without cache"] = [write([prompt], use_cache=False)[0] for prompt in asked["prompts"][:5]]
            found["beams"] = write(asked["prompts"][:1], num_beams=3)
            longest = max(map(len, asked["prompts"]))
            pads = [longest - len(prompt) for prompt in asked["prompts"]]
            rows = [[tokenizer.pad_token_id] * pad + prompt for pad, prompt in zip(pads, asked["prompts"])]
            inside = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
            found["together"] = write(rows, attention_mask=inside)
            found["continued"] = pipeline("text-generation", model=model, tokenizer=tokenizer)(
                asked["lines"][0][:20], max_new_tokens=4, do_sample=False)[0]["generated_text"]
    if hasattr(model, "stack"):  # RaPTr goes on
        Subnetwork, over = (get_class_from_dynamic_module(f"raptr.{name}", folder) for name in ("Subnetwork", "over"))
        model.train()
        kept, losses = Subnetwork((0, 2)), []
        for inside in (False, True):
            model.zero_grad()
            if inside:
                with over(model.stack.blocks, kept):
                    losses.append(model(tokens, labels=tokens).loss)
                    losses[-1].backward()
            else:
                losses.append(model(tokens, labels=tokens, subnetwork=kept).loss)
                losses[-1].backward()
            trained = [any(p.grad is not None for p in block.parameters()) for block in model.stack.blocks]
            assert trained == [True, False, True, False], trained
        assert torch.equal(*losses)
    json.dump(found, open("found.json", "w"))
"""


def loaded(folder, arch, asked, empty):
    """What a fresh Python finds in a folder. It runs in an empty one, isolated from the project."""
    done = subprocess.run([sys.executable, "-I", "-c", textwrap.dedent(LOADED), str(folder), arch], cwd=empty,
                          env={"HF_HOME": str(empty / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
                          input=json.dumps(asked), capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((empty / "found.json").read_text())


def lines_of_code(count):
    """Lines of the standard library: real text of many kinds."""
    lines = []
    for file in sorted(Path(textwrap.__file__).parent.glob("*.py")):
        lines += file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if len(lines) > count:
            return lines[:count]


def as_ours(model, V, prompt):
    """What our own generate writes after a prompt that ends with <0> twice, up to and with [SEP]."""
    banned = [PAD, UNK, CLS, MASK, *range(V, V + len(MODES))]
    [row] = model.generate([prompt[:-1]], prompt[-1], {SEP}, banned, LIMIT)
    return row if len(row) == LIMIT else [*row, SEP]


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_computes_the_same_in_a_fresh_process(kind, tiny, text, tmp_path):
    flags = [*KINDS[kind].split(), "--init_std", 0.2, "--dropout", 0, "--lr", 3e-3, "--steps", 40]
    run = go(tiny, *flags)
    shown = script("tools.hf", "export", run, "--out", tmp_path / "theirs")
    assert shown.returncode == 0 and "held-out sequences" in shown.stdout, shown.stderr
    (tmp_path / "empty").mkdir()
    model, tokenizer, _ = load_run(run)
    arch, V, generator = model.config.arch, tokenizer.vocab_size(), torch.Generator().manual_seed(0)
    tokens = torch.randint(5, V, (3, 32), generator=generator)
    asked = {"tokens": tokens.tolist(), "prefix": [3, 20, 32], "lines": [*lines_of_code(10_000), "  日本 🎉\t", "▁ _"]}
    asked |= {"limit": LIMIT, "masked": ["A [MASK] is here.", "[MASK] and more of it."]}
    starts = [tokenizer.encode(document)[: 3 + i % 12] for i, document in enumerate(text[:50])]
    first = V + len(MODES)
    asked["prompts"] = [[V + MODES.index("[S]"), *start, first, first] for start in starts]
    found = loaded(tmp_path / "theirs", arch, asked, tmp_path / "empty")

    with torch.no_grad():
        place = torch.arange(32).expand(3, -1) if arch == "bert" else torch.tensor(asked["prefix"])
        logits, states = (
            model.logits(tokens, place),
            model.encode(tokens) if arch == "bert" else model.states(tokens, place),
        )
    torch.testing.assert_close(torch.tensor(found["logits"]), logits[..., : model.config.vocab], rtol=0, atol=1e-5)
    layers, got = found["hidden"]
    assert layers == 5
    torch.testing.assert_close(torch.tensor(got), states, rtol=0, atol=1e-5)
    assert found["class"] == (
        "BertForMaskedLM" if "post" in kind else "Raptr" + ("ForMaskedLM" if arch == "bert" else "ForCausalLM")
    )
    assert found["ids"] == [tokenizer.encode(line) for line in asked["lines"]]
    assert found["texts"] == [tokenizer.decode(ids) for ids in found["ids"]]
    if arch == "bert":
        for text_with_mask, ids in zip(asked["masked"], found["filled"]):
            best = fill(model, tokenizer, text_with_mask)[0].topk(8).indices.tolist()  # ours leaves special tokens out
            assert [i for i in ids if i > MASK] == [i for i in best if i in ids]
    else:
        ours = [as_ours(model, V, prompt) for prompt in asked["prompts"]]
        assert found["written"] == ours
        assert found["without cache"] == ours[:5]
        cut = [row[: row.index(SEP) + 1] if SEP in row else row for row in found["together"]]
        assert cut == ours
        assert len(found["beams"][0]) <= LIMIT and asked["lines"][0][:20].strip() in found["continued"]


def test_the_card_says_how_to_load_it(runs, tmp_path):
    """Its example runs as it stands, from the folder beside it."""
    assert script("tools.hf", "export", runs["bert"], "--out", tmp_path / "mine").returncode == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "method raptr, stages 2-3" in card
    assert "hf upload NAME/mine mine" in card and (tmp_path / "mine" / "loss.png").exists()
    code = card.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env={"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"})  # fmt: skip
    assert done.returncode == 0 and "score" in done.stdout, done.stderr[-2000:]


def test_word_pieces_stay_word_pieces(tmp_path):
    """An imported BERT, exported again: the same tokenizer, the same logits."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "so", "it", "is", "go", "##od", "bad", ".", "what"]
    c = transformers.BertConfig(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                intermediate_size=48, max_position_embeddings=24, initializer_range=0.2)  # fmt: skip
    before = transformers.BertForMaskedLM(c).eval()
    before.save_pretrained(tmp_path / "before")
    (tmp_path / "before" / "vocab.txt").write_text("\n".join(words) + "\n")
    assert script("tools.hf", "import", tmp_path / "before", "--out", tmp_path / "run").returncode == 0
    shown = script("tools.hf", "export", tmp_path / "run", "--out", tmp_path / "after")
    assert shown.returncode == 0 and "random tokens" in shown.stdout, shown.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "after")
    after = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "after").eval()
    rows = tokenizer("So it is good. What bad?", return_tensors="pt")
    assert rows["input_ids"].tolist() == [[2, 5, 6, 7, 8, 9, 11, 12, 10, 1, 3]]
    with torch.no_grad():
        torch.testing.assert_close(after(**rows).logits, before(**rows).logits, rtol=0, atol=1e-5)


def test_an_export_that_computes_something_else_fails(runs, tmp_path):
    from tools import hf, hf_export

    def save_wrong(model, folder):
        hf_export.save_with_code(model, folder)
        config = json.loads((folder / "config.json").read_text()) | {"norm_eps": 0.5}
        (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(hf.UserError, match="other logits"):
        hf_export.export(load_run(runs["ul2"]), runs["ul2"], tmp_path / "wrong", save_wrong)
    assert not (tmp_path / "wrong").exists()
