import json
import statistics

import pytest
import torch

from engine import ROOT
from processes import script
from raptr import Subnetwork, all_layers
from studies import stability, stats
from test_train import go


def test_two_layers_by_hand():
    """y2 = y1 + B n(y1), y1 = x + A n(x), n dividing by the root of the mean square."""
    torch.manual_seed(0)
    weights, x = torch.randn(2, 5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    n = lambda v: torch.stack([row / (row @ row / 5) ** 0.5 for row in v])  # noqa: E731
    first = x + n(x) @ weights[0].T
    torch.testing.assert_close(stability.run(weights, x, all_layers(2), True, True), n(first + n(first) @ weights[1].T))
    torch.testing.assert_close(stability.run(weights, x, Subnetwork((1,)), True, True), n(x + n(x) @ weights[1].T))
    plain = x @ weights[0].T @ weights[1].T
    torch.testing.assert_close(stability.run(weights, x, all_layers(2), False, False), n(plain))


def test_an_exponent_is_found():
    assert stats.slope([(L, 3 * L**-0.7) for L in (2, 4, 8, 50)]) == pytest.approx(-0.7)


def test_only_residual_networks_with_norm_become_stable():
    found = stability.initialisation(3, (4, 16, 64))
    fall = {kind: statistics.mean(values["exponent"]) for kind, values in found.items()}
    assert fall["residual and norm"] < -0.3 and all(v > -0.1 for kind, v in fall.items() if kind != "residual and norm")


def test_every_subnetwork_of_one_layer_less():
    assert [path.layers for path in stability.one_layer_less(3)] == [(1, 2), (0, 2), (0, 1)]


def run(*args):
    return script("studies.stability", *args)


def test_a_trained_model(tiny, tmp_path):
    folder = go(tiny, "--steps", 60, "--lr", "4e-3", "--init_std", 0.125, "--save_every", 20, "--keep_every", 20)
    shown = run("--run", folder, "--out", tmp_path / "out")
    assert shown.returncode == 0 and "Verdict" in shown.stdout, shown.stderr
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][-1]["loss"]
    assert len(found["layers"]) == 4 and set(found["lengths"]) == {"1", "2", "3"} and abs(found["full"] - logged) < 0.3
    assert all(change > 0 and abs(loss - found["full"]) <= bound for loss, change, bound in found["layers"])
    assert [stage[:3] for stage in found["stages"]] == [[20, 2, 3], [40, 3, 4]] and (
        tmp_path / "out" / "run.png"
    ).exists()
    assert all(0 < abs(jump) <= bound for *_, jump, bound in found["stages"])
    table = (tmp_path / "out" / "run.md").read_text()
    assert table.startswith("Made by: `python -m studies.stability --run")
    (tmp_path / "out" / "run.md").unlink()
    assert run("--rebuild", "--out", tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "run.md").read_text() == table


def test_committed_tables_come_from_committed_numbers(tmp_path):
    for file in (ROOT / "results/stability").glob("*.json"):
        (tmp_path / file.name).write_text(file.read_text())
    assert run("--rebuild", "--out", tmp_path).returncode == 0
    for name in ("initialisation.md", "stages.md"):
        assert (tmp_path / name).read_text() == (ROOT / "results/stability" / name).read_text()
    assert run("--rebuild", "--out", tmp_path / "nowhere").returncode == 2
