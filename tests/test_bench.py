import json

import pytest

import methods
from processes import script

SMALL = ["--rounds", 1, "--width", 32, "--vocab", 300, "--batch", 2]


def test_what_a_path_saves_of_their_models_is_measured():
    """--only over: the counted ideal is that of six layers of twelve beside a head that always runs."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    shown = script("tools.bench", "--only", "over", "--seq", 16, *SMALL)
    assert shown.returncode == 0, shown.stderr
    lines = [line for line in shown.stdout.split("\n") if "ideal 1." in line]
    assert [line.split()[0] for line in lines] == ["BERT,"] * 2 + ["Llama,"] * 2
    assert all(1.7 < float(line.split("ideal ")[1].split(",")[0]) < 2 for line in lines), shown.stdout


def test_every_method_is_measured(tmp_path):
    """--only methods: those that cost 3/4 of full training have the same ideal, and ramp saves nothing."""
    shown = script("tools.bench", "--only", "methods", "--seq", 32, *SMALL, "--json", tmp_path / "figures.json")
    assert shown.returncode == 0, shown.stderr
    rows = [line.split() for line in shown.stdout.split("\n")]
    ideal = {row[0]: float(row[2]) for row in rows if row and row[0] in methods.METHODS}
    assert len({ideal[name] for name in ("constant", "jump", "midas", "stacking")}) == 1 and ideal["ramp"] == 1
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {f"efficiency_{name}" for name in methods.METHODS if name != "full"} < set(figures)
    assert figures["growth_over_step"] > 0


NANOGPT = """
import torch
class GPTConfig(dict):
    def __init__(self, **sizes):
        super().__init__(sizes)
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config["vocab_size"], config["n_embd"])
    def forward(self, tokens, targets):
        logits = self.table(tokens) @ self.table.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_rivals_are_measured(tmp_path, monkeypatch, capsys):
    """--only rivals: ours beside the programs that are there, and beside the machine's limit. Both kinds of attention,
    memory and precision once; without the rounds and pauses that only make times good."""
    from tools import bench, rivals, timing

    monkeypatch.setattr(rivals, "TRANSFORMERS", ["BERT, sdpa", "BERT, eager, steady memory"])
    monkeypatch.setattr(rivals, "NANOGPT", ["nanoGPT, float32", "nanoGPT, bfloat16, compiled"])
    monkeypatch.setattr(rivals, "interleaved", lambda calls, rounds, pause: timing.interleaved(calls, rounds, warmup=1))
    (tmp_path / "model.py").write_text(NANOGPT)
    flags = ["--only", "rivals", "--layers", 4, "--seq", 16, *SMALL, "--json", tmp_path / "figures.json"]
    monkeypatch.setattr("sys.argv", ["tools.bench", *map(str, flags), "--nanogpt", str(tmp_path)])
    bench.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ours_over_ours"] == 1 and 0 < figures["of_product"] < 1
    assert figures["ours_over_nanoGPT_bfloat16_compiled"] > 0 and "nanoGPT, float32" in capsys.readouterr().out
    shown = script("tools.bench", *flags, "--nanogpt", tmp_path / "nowhere")
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1


def test_growth_is_measured(tmp_path, monkeypatch, capsys):
    """--only growth: every size once, in a table and a figure."""
    from tools import bench, growth

    monkeypatch.setattr(growth, "SIZES", {"layers": (4, 5), "width": (32, 64), "vocab": (300, 301)})
    figure, json_file = tmp_path / "growth.png", tmp_path / "figures.json"
    flags = ["--only", "growth", "--seq", 16, *SMALL, "--figure", figure, "--json", json_file]
    monkeypatch.setattr("sys.argv", ["tools.bench", *map(str, flags)])
    bench.main()
    rows = json.loads(json_file.read_text())
    assert [row[0] for row in rows["growth_width"]] == [32, 64] and rows["growth_vocab"][1][1] > 0
    assert figure.stat().st_size > 3000 and capsys.readouterr().out.count("%") >= 6
