"""studies.plateau: its verdict, on invented numbers, and the study itself, of two tiny arms."""

import shutil

import pytest

from engine.errors import UserError
from engine.log import read_log
from processes import script
from studies import plateau, stats

TINY = "--layers 4 --width 32 --heads 2 --seq 32 --batch 8 --threads 1 --steps 12 --lr 8e-3"
TINY += " --eval_every 6 --eval_sequences 16"
AHEAD = [0.20, 0.21, 0.22]


@pytest.mark.parametrize(
    "as_is, past, word",
    [
        (AHEAD, [-0.01, 0.01, 0.02], "yes"),  # to an interval that contains 0
        (AHEAD, [-0.10, -0.11, -0.12], "yes"),  # to one below 0
        (AHEAD, [0.12, 0.13, 0.14], "no"),  # more than half is left
        (AHEAD, [0.30, 0.31, 0.32], "no"),  # it grows
        (AHEAD, [0.04, 0.05, 0.06], "undecided"),  # it shrinks, and is still there
        (AHEAD, [-0.30, 0.10, 0.40], "undecided"),  # whether it shrinks is not known
        ([-0.10, 0.10, 0.30], [-0.50, -0.51, -0.52], "undecided"),  # there is no lead to explain
        (AHEAD[:1], [-0.10], "undecided"),  # one seed
        (AHEAD, [], "not run"),
    ],
)
def test_the_verdict_follows_the_rule(as_is, past, word):
    assert plateau.verdict(*(dict(enumerate(leads)) for leads in (as_is, past))) == word


def test_the_lead_is_paired_by_seed():
    losses = {"full": {0: 5.0, 1: 5.5, 2: 6.0}, "stacking": {2: 5.75, 0: 4.0, 7: 1.0}}
    runs = [
        {"arm": arm, "seed": seed, "events": [{"event": "done", "loss": loss}]}
        for arm, of in losses.items()
        for seed, loss in of.items()
    ]
    assert plateau.lead(runs) == {0: 1.0, 2: 0.25}
    assert plateau.answer({"as_is": runs})[1:] == ["", "not run"]


@pytest.mark.parametrize("method, layers", [("raptr", 2), ("stacking", 2), ("constant", 3), ("full", 4)])
def test_the_run_before_is_the_arms_first_stage(method, layers):
    """At a constant learning rate, with other batches, for as long as it is allowed to take."""
    import methods
    import train
    from engine import options

    flags = [*plateau.SETTING, "--layers=4", "--steps=90", "--seed=1", f"--method={method}"]
    first, arm = options.parse(plateau.before(flags, 0.3)), options.parse(flags)
    its = methods.choose(first)
    assert {its.expected_layers(step) for step in (1, plateau.LIMIT)} == {layers}
    assert its.depth(plateau.LIMIT) == methods.choose(arm).depth(1)
    assert {train.learning_rate(first, step) for step in (72, 500, plateau.LIMIT - 1)} == {2e-3}
    assert first.seed != arm.seed and first.eval_on == "tuning" and first.stop_below == 0.3


def test_the_study_from_nothing_and_continued(tmp_path, corpus, monkeypatch, at_once):
    monkeypatch.chdir(tmp_path)
    command = ["--data", str(corpus), "--methods", "full,stacking", "--margin", "0.001", *TINY.split(), "--jobs", "2"]
    plateau.main([*command, "--seeds", "1", "--ways", "past"])
    out, page = tmp_path / "out/compare/plateau-past", tmp_path / "results/plateau/table.md"
    assert "| not run |" in page.read_text()
    first, arm = read_log(out / "stacking-0-first"), read_log(out / "stacking-0")
    *above, below = [e["loss"] for e in first if e["event"] == "eval"]
    assert below <= first[0]["unigram_loss"] - 0.001 < min(above) and first[-1]["step"] % 25 == 0
    assert len(first[-4]["layers"]) == 2 and arm[0]["flags"]["init"].endswith("stacking-0-first")
    assert arm[-1]["step"] == 12 and arm[1]["loss"] < first[1]["loss"] - 0.3  # it goes on from there

    logs = {log: log.stat().st_mtime_ns for log in out.glob("*/log.jsonl")}
    plateau.main([*command, "--seeds", "1", "--data_small", str(corpus)])
    assert all(log.stat().st_mtime_ns == time for log, time in logs.items())  # not trained again
    text = page.read_text()
    assert "| as_is | past | short_plateau |" in text and "explains stacking's lead" in text
    assert "## Getting 0.001 nats below" in text and "commit" in text
    run = next(run for run in stats.read_runs("results/plateau-past") if run["arm"] == "stacking")
    assert f"| stacking | {first[-1]['step']} | {first[-1]['flops']:.2e} |" in text
    assert stats.cost(run, "flops") == arm[-1]["flops"]  # the run before does not count
    assert (page.parent / "plateau.png").stat().st_size > 3000

    shutil.rmtree(tmp_path / "out")
    plateau.main([*command, "--seeds", "1", "--data_small", str(corpus)])
    assert not [*tmp_path.glob("out/compare/*/*/log.jsonl")]  # results/ is enough
    text = page.read_text()
    page.unlink()
    shown = script("studies.plateau", "--rebuild", cwd=tmp_path)
    assert shown.returncode == 0 and page.read_text() == text == shown.stdout


def test_an_arm_that_stays_on_the_plateau_is_said(tmp_path, corpus, monkeypatch, at_once):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plateau, "LIMIT", 80)
    command = ["--data", str(corpus), "--methods", "full", "--margin", "9", *TINY.split(), "--seeds", "1"]
    with pytest.raises(UserError, match="9 nats below"):
        plateau.main([*command, "--ways", "past"])


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--ways past,furture", "furture"),
        ("--methods full,pld", "pld"),
        ("--margin 0", "--margin"),
        ("--layres 4 --ways as_is", "--layers"),
        ("--data /nowhere", "/nowhere"),
        ("--seed 3 --ways as_is", "--seeds"),
        ("--rebuild", "results/"),
    ],
)
def test_bad_flags(flags, word, tmp_path):
    shown = script("studies.plateau", *flags.split(), cwd=tmp_path)
    assert shown.returncode == 2 and word in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr


def test_the_second_text_has_the_smaller_vocabulary(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(plateau, "SMALL_VOCAB", 300)
    with pytest.raises(UserError, match="vocabulary of 512"):
        plateau.main(["--data", str(corpus)])


def test_the_committed_page_comes_from_committed_logs(tmp_path, monkeypatch):
    committed = stats.RESULTS / "plateau" / "table.md"
    expected, ways = committed.read_text(), {}
    for folder in sorted(stats.RESULTS.glob("plateau-*")):
        ways[folder.name.removeprefix("plateau-")] = stats.read_runs(folder)
        shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    plateau.write_page("plateau", {way: ways[way] for way in plateau.WAYS if way in ways})
    assert (tmp_path / "plateau" / "table.md").read_text() == expected
