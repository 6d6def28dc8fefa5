"""The verdicts of studies.length, on invented runs, and its page."""

import json

import pytest

from engine.errors import UserError
from processes import script
from studies import length, stats


def runs_of(losses):
    """Runs with {arm: [final loss by seed]}."""
    flags = {"batch": 16, "seq": 64, "method": "full"}
    return [
        {"arm": arm, "seed": seed, "events": [{"event": "run", "flags": flags}, {"event": "done", "loss": loss}]}
        for arm, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]


FULL = [4.0, 4.1, 4.2]


def gaps(short, long, constant=0.1):
    """Two lengths at which RaPTr is behind full training by these numbers, seed by seed, and constant-p further."""
    return {
        steps: runs_of({
            "full": FULL,
            "raptr": [loss + gap for loss, gap in zip(FULL, gap_by_seed)],
            "constant": [loss + gap + constant for loss, gap in zip(FULL, gap_by_seed)],
        })
        for steps, gap_by_seed in ((1200, short), (7200, long))
    }  # fmt: skip


@pytest.mark.parametrize(
    "short, long, word",
    [
        ((0.10, 0.11, 0.12), (0.02, 0.03, 0.05), "yes"),
        ((0.02, 0.03, 0.05), (0.10, 0.11, 0.12), "no"),
        ((0.100, 0.110, 0.120), (0.101, 0.110, 0.119), "no"),  # level is within 0.02
        ((0.10, 0.11, 0.12), (0.02, 0.20, 0.05), "undecided"),
    ],
)
def test_the_gap_closes_by_the_rule(short, long, word):
    (question, values, found), lead, constant = length.verdicts(gaps(short, long))
    assert "gap" in question and found == word
    assert values == pytest.approx({seed: b - a for seed, (a, b) in enumerate(zip(short, long))})
    assert lead[1:] == (None, "not run") and constant[2] == "yes"


@pytest.mark.parametrize("ahead, word", [(0.1, "yes"), (0.0, "yes"), (-0.1, "no")])
def test_constant_p_is_compared_at_the_longest(ahead, word):
    assert length.verdicts(gaps(FULL, FULL, constant=ahead))[2][2] == word


def test_what_was_not_run_is_said():
    one = {1200: gaps(FULL, FULL)[1200]}
    assert [row[2] for row in length.verdicts(one)] == ["not run", "not run", "yes"]
    assert all("up to 1200 steps" in row[0] for row in length.verdicts(one))


def test_rates_are_chosen_by_the_lowest_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    (tmp_path / "length").mkdir()
    trials = {"full": {"0.002": 4.1, "0.004": 4.0}, "raptr": {"0.002": 4.0, "0.004": "did not end"}}
    (tmp_path / "length" / "rates.json").write_text(json.dumps(trials))
    assert length.choose_rates(length.parser().parse_args([]), []) == {"full": 0.004, "raptr": 0.002}


def test_a_page_from_logs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    length.write_page("length", gaps((0.10, 0.11, 0.12), (0.02, 0.03, 0.05)))
    page = (tmp_path / "length" / "table.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "| raptr minus full | +0.110 ± 0.025 (3) | +0.033 ± 0.038 (3) |" in page
    assert (tmp_path / "length" / "length.png").stat().st_size > 3000
    with pytest.raises(UserError, match="no runs in .*length-1200"):
        length.main(["--rebuild"])


def test_the_committed_page_comes_from_committed_logs(tmp_path, monkeypatch):
    folders = {steps: stats.RESULTS / f"length-{steps}" for steps in length.LENGTHS}
    lengths = {steps: stats.read_runs(folder) for steps, folder in folders.items() if folder.exists()}
    committed = (stats.RESULTS / "length" / "table.md").read_text()
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    length.write_page("length", lengths)
    assert (tmp_path / "length" / "table.md").read_text() == committed


def test_bad_flags():
    shown = script("studies.length", "--lengths", "17")
    assert shown.returncode == 2 and "1200" in shown.stderr and shown.stderr.count("\n") == 1
