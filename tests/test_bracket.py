"""The expansion of two trainings as one flow, the fields of each growth, and the page of studies.bracket."""

import dataclasses
import sys

import pytest
import torch

import model as transformer
from data import NO_TARGET
from engine import ROOT
from engine.errors import guard
from studies import bracket, stats
from studies.bracket import FACTORS, GROWTHS, flat

WIDE = transformer.Config(3, 16, 4, 32, 16, 50, 0.0, init_std=0.3, arch="ul2", positions="rotary", rms=True, gated=True)
NARROW, SHALLOW = {"width": 8, "heads": 2, "mlp": 16}, {"layers": 2}


def growth_of(name):
    """A growth of fresh models, measured on one made-up batch."""
    draws = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(5, 50, (2, 3, 16), generator=draws)
    targets[:, :8] = NO_TARGET
    shapes = {"stacking": [SHALLOW], "none": [{}], "self": [NARROW]}.get(name, [NARROW, NARROW])
    parents = [transformer.make(dataclasses.replace(WIDE, **shape), seed) for seed, shape in enumerate(shapes)]
    return bracket.grow(name, parents, WIDE, 0, (tokens, torch.tensor([8, 8, 8]), targets))


def trained(growth, steps, h):
    """The parents' tensors after steps of gradient descent."""
    parents = growth.parents
    for _ in range(steps):
        slopes = [torch.func.grad(loss)(tensors) for loss, tensors in zip(growth.losses, parents)]
        parents = [{name: a[name] - h * b[name] for name in a} for a, b in zip(parents, slopes)]
    return parents


def test_orders():
    """Errors against h: order 2 without the terms, 3 with them; the bracket alone is not enough for steps."""
    sizes = [1e-3, 2.5e-4]
    errors = bracket.expansion(bracket.small_growth(1), sizes)
    orders = {name: stats.slope([*zip(sizes, each)]) for name, each in errors.items()}
    for name, order in {"flows without": 2, "flows with": 3, "steps without": 2, "steps with": 2}.items():
        assert orders[f"{name} the bracket"] == pytest.approx(order, abs=0.1)
    assert orders["steps with both terms"] == pytest.approx(3, abs=0.1)


def test_a_bracket_by_finite_differences():
    growth = bracket.small_growth()
    (g1, g2), t, e = growth.fields(), flat(growth.grown), 1e-5
    moved = lambda field, v: (field(t + e * v) - field(t - e * v)) / (2 * e)  # noqa: E731
    found = bracket.bracket(g1, g2, t)
    torch.testing.assert_close(found, moved(g2, g1(t)) - moved(g1, g2(t)), rtol=1e-6, atol=1e-6)
    assert found.norm() > 1 and torch.equal(bracket.bracket(g2, g1, t), -found)


def test_a_linear_field_by_hand():
    """Quadratic losses: the bracket is B A t - A B t."""
    a, b, t = torch.tensor([[1.0, 2.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 4.0])
    found = bracket.bracket(lambda t: a @ t, lambda t: b @ t, t)
    torch.testing.assert_close(found, b @ a @ t - a @ b @ t)


@pytest.mark.parametrize("name", ["mlp", *GROWTHS])
def test_training_and_growing_commute(name):
    """Two steps of the parents, then the growth, lead where two steps along g1 lead after the growth."""
    growth = bracket.small_growth() if name == "mlp" else growth_of(name)
    g1, t, h = growth.fields()[0], flat(growth.grown), 1e-2
    for _ in range(2):
        t = t - h * g1(t)
    before, after = growth.join(*growth.parents), growth.join(*trained(growth, 2, h))
    wanted = flat(growth.grown) + flat(after) - flat(before)
    if name in ("property", "rule"):  # two biases of the logits become one, so that which is whose is lost
        torch.testing.assert_close(t, wanted, rtol=1e-3, atol=1e-4)
    else:
        torch.testing.assert_close(t, wanted, rtol=1e-5, atol=1e-6)
    assert (t - flat(growth.grown)).norm() > 100 * (t - wanted).norm()


def test_sizes_of_growths():
    """The same field twice has no bracket; every growth has one."""
    found = {name: bracket.measure(growth_of(name)) for name in GROWTHS}
    assert found["none"]["bracket"] == 0 and found["none"]["sum"] == pytest.approx(2 * found["none"]["g1"], rel=1e-4)
    assert all(sizes["bracket"] > 1e-3 for name, sizes in found.items() if name != "none")
    assert found["property"]["g1"] == pytest.approx(found["rule"]["g1"], rel=1e-4)


def test_the_rate_after_a_growth():
    rates = [bracket.rate_after(i / 100, 0.25) for i in range(100)]
    assert rates[:25] == [0.25] * 25 and rates[25:80] == [1] * 55 and rates[80:] == sorted(rates[80:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)


def made_up(exponent, rise):
    """Runs whose best factor is k^exponent, and whose loss at factor 1 rises by `rise` where k doubles."""
    runs = []
    for seed in range(3):
        for i, name in enumerate(GROWTHS):
            best = 2.0 ** max(-2, min(1, exponent * (i - 1)))
            gain = {1.0: 0.01, best: 0.02 if best != 1 else 0.01}
            losses = [4 + rise * i + 0.01 - gain.get(factor, 0.0) for factor in FACTORS]
            runs.append({"growth": name, "seed": seed, "sum": 0.5, "bracket": 0.0 if name == "none" else 2.0**i,
                         "losses": losses})  # fmt: skip
    return runs


@pytest.mark.parametrize(
    "exponent, rise, words", [(-1, 0.1, ["yes", "yes"]), (1, -0.1, ["no", "no"]), (0, 0.0, ["no", "no"])]
)
def test_verdicts(exponent, rise, words):
    sizes = bracket.STEP_SIZES
    order = {"flows without the bracket": 2, "flows with the bracket": 3}
    order |= {"steps without the bracket": 2, "steps with both terms": 3}
    errors = {name: [h**power for h in sizes] for name, power in order.items()}
    assert [word for *_, word in bracket.verdicts(errors, made_up(exponent, rise))] == [*words, "yes"]
    errors["flows with the bracket"] = [h**2 for h in sizes]
    assert bracket.verdicts(errors, made_up(exponent, rise))[2][2] == "no"


def start(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["studies.bracket", *map(str, flags)])
    guard("studies.bracket", bracket.main)


def test_the_command_and_a_page_made_again(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bracket, "SETTING", f"{bracket.SETTING} --seq=32 --batch=4 --eval_sequences=8")
    monkeypatch.setattr(bracket, "MEASURED_ON", 4)
    monkeypatch.setattr(bracket, "STEP_SIZES", [1e-3, 5e-4])
    monkeypatch.setattr(bracket, "FACTORS", (0.5, 1.0))
    start(monkeypatch, "--seeds", 2, "--steps", 20, "--data", corpus, "--out", tmp_path / "page")
    files = {name: (tmp_path / "page" / name).read_bytes() for name in ("table.md", "figure.png")}
    assert files["table.md"].decode() in capsys.readouterr().out and len(files["figure.png"]) > 20_000
    start(monkeypatch, "--rebuild", "--out", tmp_path / "page")
    assert files == {name: (tmp_path / "page" / name).read_bytes() for name in files}


@pytest.mark.parametrize("flags", ["--seeds 1", "--steps 19", "--nonsense 1", "--rebuild", "--data nowhere"])
def test_bad_flags(flags, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        start(monkeypatch, *flags.split(), "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_committed_table_comes_from_the_committed_runs(tmp_path, monkeypatch):
    (tmp_path / "runs.jsonl").write_text((ROOT / "results/bracket/runs.jsonl").read_text())
    monkeypatch.setattr(bracket, "draw", lambda *_: None)
    start(monkeypatch, "--rebuild", "--out", tmp_path)
    assert (tmp_path / "table.md").read_text() == (ROOT / "results/bracket/table.md").read_text()
