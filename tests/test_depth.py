"""studies.depth: its verdict, its page, and the study itself with tiny runs."""

import json
import shutil

import pytest

from engine import options
from engine.errors import UserError
from studies import depth, length, stats


@pytest.mark.parametrize(
    "change, word",
    [
        ((0.10, 0.11, 0.12), "yes"),
        ((-0.10, -0.11, -0.12), "yes"),
        ((0.001, 0.0, -0.001), "no"),
        ((0.10, -0.10, 0.0), "undecided"),
    ],
)
def test_the_verdict_follows_the_rule(change, word):
    assert stats.verdict(change, depth.differs, stats.level) == word


def test_the_deep_network_gets_the_budget_of_the_usual_one():
    common = length.flags_at(depth.STEPS, depth.DEEP)
    arms = length.planned(length.CENTRAL, common)
    parsed = {arm: options.parse([*common, *flags]) for arm, flags in arms.items()}
    assert {(its.layers, its.width, its.lr) for its in parsed.values()} == {(24, 96, 2e-3)}
    assert parsed["raptr"].stages == "12-16-20-24" and parsed["full_flops"].steps == 2700
    assert parsed["stacking"].stages == "12-18-24" and parsed["constant"].mean_depth == 18


def test_the_committed_page_comes_from_committed_logs(tmp_path, monkeypatch):
    committed = (stats.RESULTS / "depth" / "table.md").read_text()
    for name in ("depth-3600", "length-3600"):
        shutil.copytree(stats.RESULTS / name, tmp_path / name)
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    depth.main(["--rebuild"])
    assert (tmp_path / "depth" / "table.md").read_text() == committed


def test_the_study_from_nothing_then_from_its_results(tmp_path, monkeypatch, corpus, tiny_length):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/mine-length").mkdir(parents=True)
    tried = {kind: {"0.002": 4.0} for kind in length.KINDS}
    (tmp_path / "results/mine-length/rates.json").write_text(json.dumps(tried))
    monkeypatch.setattr(depth, "STEPS", 16)
    monkeypatch.setattr(depth, "DEEP", ["--layers=8", "--width=24", "--mlp=32", "--init_std=0.1", "--lr=2e-3"])
    mine = ["--data", str(corpus), "--name", "mine", "--seeds", "2", "--methods", "full,raptr"]
    depth.main(mine)
    page = tmp_path / "results/mine/table.md"
    table = page.read_text()
    assert "|  | 4 x 32 | 8 x 24 |" in table and "| raptr minus stacking |  |  |" in table
    usual, deep = (stats.read_runs(f"results/{name}") for name in ("mine-length-16", "mine-16"))
    assert {(run["arm"], run["seed"]) for run in usual} == {(run["arm"], run["seed"]) for run in deep}
    a, b = ({(run["arm"], run["seed"]): stats.loss(run) for run in runs} for runs in (usual, deep))
    change = [b["raptr", s] - b["full", s] - a["raptr", s] + a["full", s] for s in (0, 1)]
    assert f"differs between 4 x 32 and 8 x 24 | {sum(change) / 2:+.3f} ±" in table
    assert page.with_name("depth.png").stat().st_size > 5000

    page.unlink()
    depth.main(["--rebuild", "--name", "mine"])
    assert page.read_text() == table
    stats.event(deep[0], "run")["data"]["fingerprint"] = "other"
    (tmp_path / "results/mine-16/runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in deep))
    with pytest.raises(UserError, match="another text"):
        depth.main(["--rebuild", "--name", "mine"])
    with pytest.raises(UserError, match="--layers=3: the study sets it"):
        depth.main([*mine, "--layers=3"])
