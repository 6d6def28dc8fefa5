import json
import math
import random
import statistics
import sys
from itertools import product

import numpy as np
import pytest
import torch

from engine import ROOT
from engine.errors import UserError, guard
from engine.log import read_jsonl
from processes import script
from raptr import Subnetwork, all_layers
from studies import polynomials, stats
from studies.polynomials import ARMS, Setting

SMALL = Setting(inputs=6, degrees=4, monomials=3, layers=4, steps=40, batch=16, held_out=64)


def cube(d):
    return torch.tensor(list(product((-1.0, 1.0), repeat=d)))


def coefficient(values, variables):
    """Of a function on the cube, given at `cube`'s points: its mean times a monomial, one point at a time."""
    total = 0.0
    for point, value in zip(product((-1, 1), repeat=int(math.log2(len(values)))), values.tolist()):
        total += value * math.prod(point[i] for i in variables)
    return total / len(values)


def test_unlearned_against_every_input():
    """At all inputs the estimate is exact, and at a sample of them it is near."""
    sets, wanted = polynomials.target(SMALL, 3)
    x = cube(6)
    near = polynomials.characters(x, sets) @ wanted + torch.randn(64, generator=torch.Generator().manual_seed(0))
    exact = {k: 0.0 for k in range(1, 5)}
    for variables, c in zip(sets, wanted.tolist()):
        exact[len(variables)] += (coefficient(near, variables) - c) ** 2
    assert polynomials.unlearned(near, polynomials.characters(x, sets), wanted, sets) == pytest.approx(exact, abs=1e-6)
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, 64, 8192))
    sample = polynomials.unlearned(near[rows], polynomials.characters(x[rows], sets), wanted, sets)
    assert sample == pytest.approx(exact, abs=0.03) and max(exact.values()) > 0.06


def test_a_target_has_what_it_says():
    sets, c = polynomials.target(SMALL, 0)
    assert [len(variables) for variables in sets] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert all(set(a) < set(b) for a, b in zip(sets, sets[3:]))  # nested
    assert len(set(sets)) == 12 and all(len(set(variables)) == len(variables) for variables in sets)
    x = cube(6)
    chi = polynomials.characters(x, sets)
    assert float((chi @ c).square().mean()) == pytest.approx(4, abs=1e-5)  # one for each degree
    nothing = polynomials.unlearned(torch.zeros(64), chi, c, sets)
    assert nothing == pytest.approx({k: 1 for k in range(1, 5)}, abs=1e-5)
    assert polynomials.target(SMALL, 0)[0] == sets != polynomials.target(SMALL, 1)[0]


def test_draws_belong_to_their_names():
    draw = lambda *name: polynomials.signs(50, 16, *name)  # noqa: E731
    assert torch.equal(draw(0, "batch", 7), draw(0, "batch", 7)) and set(draw(0, "batch", 7).unique().tolist()) == {
        -1,
        1,
    }
    others = [draw(0, "batch", 8), draw(1, "batch", 7), draw(0, "held out")]
    assert not any(torch.equal(draw(0, "batch", 7), other) for other in others)


def test_the_network_in_scalars():
    """One input, one neuron at a time: bypassed layers, scaled layers."""
    weights = polynomials.initial(3, 3, 4, 5, seed=1)
    weights = {name: tensor + 0.1 for name, tensor in weights.items()}  # biases and output are not 0
    x = polynomials.signs(1, 4, 0, "x")
    w = {name: tensor.tolist() for name, tensor in weights.items()}
    dot = lambda a, b: math.fsum(p * q for p, q in zip(a, b))  # noqa: E731
    norm = lambda y: [v / math.sqrt(dot(y, y) / len(y)) for v in y]  # noqa: E731
    y = [dot(row, x[0].tolist()) for row in w["in"]]
    for layer, scale in ((0, 2.0), (2, 0.5)):
        up, bias, down = (w[f"blocks.{layer}.{part}"] for part in ("up", "bias", "down"))
        hidden = [max(0.0, dot(row, norm(y)) + b) for row, b in zip(up, bias)]
        y = [v + scale * dot(row, hidden) for v, row in zip(y, down)]
    out = polynomials.forward(weights, x, Subnetwork((0, 2), (2.0, 0.5)))
    assert out.item() == pytest.approx(dot(norm(y), w["out"]), rel=1e-4)


def test_growth_keeps_what_was_learned():
    """The old layers compute what they did, each copy has storage and moments of its own, and all of it is trained."""
    weights = {name: t.requires_grad_() for name, t in polynomials.initial(2, 3, 4, 5, seed=0).items()}
    optimizer, x = polynomials.adam(weights), polynomials.signs(9, 4, 0, "x")
    for _ in range(2):
        (polynomials.forward(weights, x, all_layers(2)) - 1).square().mean().backward()
        optimizer.step()
    grown, after = polynomials.deepen(weights, optimizer, [0, 1, 1])
    assert torch.equal(polynomials.forward(grown, x, all_layers(2)), polynomials.forward(weights, x, all_layers(2)))
    for part in ("up", "bias", "down"):
        old, new = weights[f"blocks.1.{part}"], grown[f"blocks.2.{part}"]
        assert torch.equal(old, new) and old.data_ptr() != new.data_ptr() != grown[f"blocks.1.{part}"].data_ptr()
        assert torch.equal(optimizer.state[old]["exp_avg"], after.state[new]["exp_avg"])
    before = {name: tensor.detach().clone() for name, tensor in grown.items()}
    (polynomials.forward(grown, x, all_layers(3)) - 1).square().mean().backward()
    after.step()
    assert not any(torch.equal(before[name], grown[name]) for name in grown)


@pytest.mark.parametrize("layers", [4, 8, 12, 20])
def test_arms_cost_the_same(layers):
    """Counted path by path."""
    for arm in ARMS:
        method, steps = polynomials.method_of(arm, layers, 1200, 0)
        paths = [method.subnetwork(step) or all_layers(method.depth(step)) for step in range(1, steps + 1)]
        cost = sum(len(path.layers) for path in paths) / (1200 * layers)
        assert cost == pytest.approx(1 if arm == "full" else 0.75, abs=0.01), arm


def made_up(ends):
    """Runs of one width. ends: {arm: what is left of the high degrees (after 3/4 of the run, at its end)}."""
    runs, noise = [], random.Random(0)
    for arm in ARMS:
        for seed in range(5):
            late, end = (value + noise.uniform(-0.01, 0.01) for value in ends.get(arm, (0.4, 0.2)))
            points = [[0.25, 0.1, 0.8, 1], [0.5, 0, 0.2, 0.9], [0.75, 0, 0, late], [1, 0, 0, end]]
            runs.append({"arm": arm, "width": 8, "seed": seed, "rate": 0.1, "degrees": 3, "points": points})
    return runs


def test_a_stall_is_told_from_a_delay():
    stall, delay, both = (
        made_up({"pld": (0.6, 0.6)}),
        made_up({"pld": (0.8, 0.6)}),
        made_up(dict.fromkeys(ARMS, (0.6, 0.6))),
    )
    assert polynomials.stalled(stall, 8, "pld") and not polynomials.stalled(stall, 8, "pld_slow")
    assert not polynomials.stalled(delay, 8, "pld") and not polynomials.stalled(both, 8, "pld")
    text = " ".join(polynomials.verdict(stall, [8]))
    assert "in 35 of 35 runs" in text and "PLD stalls on the high degrees at widths: 8." in text
    assert "PLD, shrinking slowly stalls on the high degrees at widths: none." in text


def test_order_and_half():
    run = made_up({})[0]
    assert polynomials.low_first(run)
    run["points"] = [[x, high, middle, low] for x, low, middle, high in run["points"]]
    assert not polynomials.low_first(run)
    run["points"] = [[0.5, 1, 1, 1], [1.0, 1, 0.25, 1]]
    assert (
        polynomials.half(run, "middle") == pytest.approx(0.5 + 0.5 * 2 / 3)
        and polynomials.half(run, "high") == math.inf
    )


def test_the_command_line(tmp_path, monkeypatch, capsys):
    """All arms learn something; a run that was cut off is continued, to the same table."""
    flags = "--seeds 2 --tuning_seeds 1 --widths 8 --steps 40 --batch 64 --held_out 64"
    flags += " --inputs 6 --degrees 3 --monomials 1 --layers 4"
    command = ["studies.polynomials", *flags.split(), "--out", str(tmp_path)]
    first = script(*command)
    assert first.returncode == 0, first.stderr
    table, file = (tmp_path / "table.md").read_text(), tmp_path / "runs.jsonl"
    assert table in first.stdout and (tmp_path / "curves.png").stat().st_size > 10_000
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    assert {run["arm"] for run in runs} == set(ARMS)
    for run in runs:
        assert run["points"][-1][0] == pytest.approx(1 if run["arm"] == "full" else 0.75, abs=0.06)
    assert statistics.mean(run["points"][-1][1] for run in runs) < 0.3  # degree 1, of which 1 is there at first
    file.write_text(file.read_text()[:-300])  # within the last line or two
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(polynomials, "draw", lambda *_: None)
    polynomials.main()
    after_made_by = lambda text: text.split("\n", 1)[1]  # noqa: E731  (of the commit, which may be another by now)
    assert after_made_by((tmp_path / "table.md").read_text()) == after_made_by(table)
    assert len(file.read_text().splitlines()) == len(runs)
    assert 1 <= capsys.readouterr().out.count(" seed ") <= 2


@pytest.mark.parametrize(
    "flags",
    [
        "--layers 6",
        "--seeds 1",
        "--widths 8,8",
        "--widths a",
        "--degrees 30",
        "--monomials 16",
        "--steps 3",
        "--jobs 0",
        "--nonsense 1",
    ],
)
def test_bad_flags(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["studies.polynomials", *flags.split(), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        guard("studies.polynomials", polynomials.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and flags.split()[0] in said
    assert not (tmp_path / "out").exists()


def test_the_committed_table_comes_from_the_committed_runs(tmp_path, monkeypatch):
    (tmp_path / "runs.jsonl").write_text((ROOT / "results/polynomials/runs.jsonl").read_text())
    monkeypatch.setattr(polynomials, "draw", lambda *_: None)
    command = "python -m studies.polynomials"
    polynomials.compare_arms(Setting(), [24, 40, 64], 5, 3, 1, tmp_path, command)
    assert (tmp_path / "table.md").read_text() == (ROOT / "results/polynomials/table.md").read_text()
    assert (tmp_path / "runs.jsonl").read_text() == (ROOT / "results/polynomials/runs.jsonl").read_text()


def halved(number):
    if number == 3:
        raise UserError("3 is odd")
    return {"half": number // 2}


def test_what_ended_before_an_error_is_kept(tmp_path, capsys):
    file = tmp_path / "results" / "runs.jsonl"
    assert stats.read_done(file) == []
    with pytest.raises(UserError, match="odd"):
        stats.append_all(halved, [(2,), (4,), (3,), *[(8,)] * 50], file, 1, str)
    kept = [line["half"] for line in stats.read_done(file)]
    assert kept[:2] == [1, 2] and len(kept) < 10
    file.write_text(file.read_text() + '{"half": 4, "comm')
    assert [line["half"] for line in stats.read_done(file)] == kept == [line["half"] for line in read_jsonl(file)]
    assert [line["half"] for line in stats.append_all(halved, [(6,)], file, 1, lambda line: line["half"])] == [3]
    assert capsys.readouterr().out.endswith("  1/1  3\n") and len(stats.read_done(file)) == len(kept) + 1
