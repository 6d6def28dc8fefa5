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
