import json
import math
import re
import shutil
import subprocess

import pytest

import methods
from engine import ROOT, options, runs
from engine.errors import UserError
from engine.log import read_log
from processes import script
from studies import compare, figures, stats
from studies.budget import ARMS, FIRST, schedule
from text import prepare
from text.corpus import Corpus

pytestmark = pytest.mark.usefixtures("at_once")


TWELVE = ["--layers=12", "--width=128", "--steps=1600"]


def base(*more):
    return options.parse(["--method=full", *TWELVE, *more])


def run_of(arm, seed, loss, steps=100, seconds=10.0, layers=12, flops=1000):
    events = [
        {
            "event": "run",
            "relative_flops_layers": 1.0 if arm.startswith("full") else 4 / 3,
            "flags": {"layers": layers},
        },
        {"event": "done", "step": steps, "loss": loss, "flops": flops},
    ]
    return {"arm": arm, "seed": seed, "seconds": seconds, "events": events}


@pytest.mark.parametrize("budget", [1.2, 1.333, 2.0, 3.0])
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm not in ("full", "ramp", "fusion", "shallow_flops")])
def test_every_schedule_costs_its_budget(arm, budget):
    """Priced by counting the layers of every step, not by the formula the schedule came from."""
    full = base("--steps", "3000", "--heads", "4")
    try:
        flags = schedule(arm, full, budget)
    except ValueError:
        assert (arm, budget) in {("pld", 3.0), ("decreasing", 2.0), ("decreasing", 3.0)}
        return
    args = options.parse([*TWELVE, "--steps=3000", "--heads=4", *flags])
    method = methods.choose(args)
    cost = 0.0
    for step in range(1, args.steps + 1):
        path = method.subnetwork(step)
        cost += method.depth(step) if path is None else path.cost()
    assert 3000 * 12 / cost == pytest.approx(4 / 3 if budget == 1.333 else budget, rel=0.012)


def test_published_schedules_come_out_of_their_budgets():
    assert schedule("raptr", base(), 1.333) == ["--method=raptr", "--stages=6-8-10-12", "--alpha=0"]
    assert schedule("stacking", base(), 1.333) == ["--method=stacking", "--stages=6-9-12", "--alpha=0"]
    alpha = schedule("raptr", base("--steps", "100000"), 1.2)[2]
    assert float(alpha.removeprefix("--alpha=")) == pytest.approx(1, abs=1e-3)


def test_full_costs_are_kept_where_they_should_be():
    assert schedule("shallow_flops", base("--steps", "900"), 1.333) == [
        "--method=full",
        "--layers=9",
        "--steps=1200",
    ]
    assert schedule("full_flops", base("--steps", "900"), 1.5) == ["--method=full", "--steps=600"]


def test_a_strip_shows_what_runs():
    def of(*more):
        return figures.strip(vars(base("--layers=4", "--heads=2", "--width=16", "--steps=40", *more)), columns=4)

    assert of("--method=full") == [(1.0,) * 4] * 4
    assert of("--method=mslt", "--stages=2-4-4-4")[0] == (1.0, 0.4, 1.0, 1.0)
    assert of("--method=mslt", "--stages=2-4-4-4")[3] == (0.0, 1.0, 1.0, 1.0)
    first, *_, last = of("--method=decreasing")
    assert first == (1.0,) * 4 and last[0] == 0 and set(last) <= {0.0, 1.0}  # dropped for the whole batch, or not
    assert of("--method=ramp")[3] == pytest.approx((0.1, 1, 1, 1))


def test_intervals_by_a_table_of_students_t():
    mean, half = stats.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))  # standard deviation 1
    assert stats.interval([1.0]) == (1.0, None)


@pytest.mark.skipif(not shutil.which("git"), reason="no git")
def test_a_commit_is_dirty_if_code_differs(tmp_path):
    def git(*command):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *command], cwd=tmp_path, check=True)

    assert stats.commit(tmp_path) == ""  # no checkout
    (tmp_path / "results").mkdir()
    for name in ("code.py", "results/table.md"):
        (tmp_path / name).write_text("before")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = stats.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (tmp_path / "results/table.md").write_text("after")  # a study wrote it
    assert stats.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("after")
    assert stats.commit(tmp_path) == f"{clean}-dirty"


def test_differences_are_paired_by_seed():
    runs = [run_of("full", s, 3 + s, seconds=12.0) for s in (0, 1, 2)] + [
        run_of("raptr", s, 3.5 + s) for s in (2, 0, 7)
    ]
    row = next(r for r in stats.rows(runs, {"full": "-", "raptr": "-"}) if r["arm"] == "raptr")
    assert row["minus_full"] == (0.5, 0.0) and row["minus_full_flops"] is None  # seed 7 has no partner
    assert row["speed_up"] == pytest.approx(1.2) and row["n"] == 3


def test_a_comparison_runs_is_skipped_and_continues(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = (
        "--layers 4 --width 32 --heads 2 --seq 32 --batch 4 --steps 12 --threads 1 --eval_sequences 16 --eval_every 0"
    )
    command = ["--methods", "full,full_flops,raptr,stacking,shallow", "--seeds", "2", "--name", "t", "--jobs", "2"]
    command += [*flags.split(), "--data", str(corpus)]
    compare.main(command)
    first = capsys.readouterr().out
    table = json.loads((tmp_path / "results/t/table.json").read_text())
    assert {row["arm"]: row["n"] for row in table["rows"]} == dict.fromkeys(
        ("full", "full_flops", "raptr", "stacking", "shallow"), 2
    )
    relative = {row["arm"]: row["relative_flops_layers"] for row in table["rows"]}
    assert relative == pytest.approx(
        {"full": 1, "full_flops": 4 / 3, "raptr": 4 / 3, "stacking": 4 / 3, "shallow": 4 / 3}, rel=0.02
    )
    assert {tuple(jump[:2]) for jump in table["jumps"]} >= {("stacking", "2 to 3 layers"), ("raptr", "3 to 4 layers")}
    for figure in ("flops.png", "strips.png"):
        assert (tmp_path / "results/t" / figure).stat().st_size > 3000
    text = (tmp_path / "results/t/table.md").read_text()
    assert f"Made by: `python -m studies.compare {' '.join(command)}`, commit " in text and "| time |" not in text
    logs = {f: f.stat().st_mtime_ns for f in tmp_path.glob("out/compare/t/*/log.jsonl")}
    lost = tmp_path / "out/compare/t/raptr-1"
    kept = (lost / "log.jsonl").read_text()
    (lost / "log.jsonl").write_text(
        "\n".join(kept.splitlines()[:-1]) + "\n"
    )  # as if it had been killed at the very end
    compare.main(command)
    assert {f.parent.name for f, t in logs.items() if f.stat().st_mtime_ns != t} == {"raptr-1"}
    same_losses = [line for line in first.splitlines() if line.startswith("| raptr")]
    assert same_losses[0].split("|")[5] in capsys.readouterr().out


def test_a_comparison_continues_from_its_results_alone(tmp_path, corpus, monkeypatch, capsys):
    """On another machine, or without the run folders: what results/ has is not trained again, and stays."""
    monkeypatch.chdir(tmp_path)
    flags = "--layers 4 --width 16 --heads 2 --seq 32 --batch 4 --steps 6 --threads 1 --eval_sequences 8 --name t"
    command = [*flags.split(), "--data", str(corpus)]
    compare.main(["--methods", "full,raptr", "--seeds", "1", *command])
    before = (tmp_path / "results/t/runs.jsonl").read_text()
    shutil.rmtree(tmp_path / "out")
    compare.main(["--methods", "full,stacking", "--seeds", "2", *command])
    trained = {folder.name for folder in (tmp_path / "out/compare/t").iterdir() if folder.is_dir()}
    assert trained == {"stacking-0", "full-1", "stacking-1"}
    after = (tmp_path / "results/t/runs.jsonl").read_text()
    assert all(line in after for line in before.splitlines())
    table = json.loads((tmp_path / "results/t/table.json").read_text())
    assert [row["n"] for row in table["rows"]].count(2) == 2
    made = table["made"]["command"]
    assert re.findall("--methods ([a-z,]+)", made) == ["full,raptr", "full,stacking"]  # both starts made the table
    compare.main(["--methods", "full,stacking", "--seeds", "1", *command])
    assert json.loads((tmp_path / "results/t/table.json").read_text())["made"]["command"] == made  # this one nothing
    for arm in ("full", "constant"):  # all must have the same flags, asked for or not
        with pytest.raises(UserError, match="full-0 was trained with another --steps"):
            compare.main(["--methods", arm, "--seeds", "1", *command, "--steps", "8"])
    with pytest.raises(UserError, match="stacking has stages .*, not stages .*; choose another --name"):
        compare.main(["--methods", "stacking", "--seeds", "1", "--first_seed", "7", *command, "--budget", "1.2"])
    assert (tmp_path / "results/t/runs.jsonl").read_text() == after


def test_all_arms_of_a_seed_share_their_start(tmp_path, corpus, monkeypatch):
    """With a learning rate of nearly zero every arm of one depth must end at the same held-out loss."""
    monkeypatch.chdir(tmp_path)
    flags = (
        "--layers 4 --width 32 --heads 2 --seq 32 --batch 4 --steps 6 --threads 1 --eval_sequences 16 --lr_schedule wsd"
    )
    compare.main(["--methods", "full,raptr,layerdrop", "--seeds", "1", "--name", "s", "--weight_decay", "0"]
                 + [*flags.split(), "--data", str(corpus), "--lr", "1e-12"])  # fmt: skip
    rows = json.loads((tmp_path / "results/s/table.json").read_text())["rows"]
    assert max(row["loss"] for row in rows) - min(row["loss"] for row in rows) < 1e-6


def test_flags_that_are_gone_stop_no_comparison():
    """The first comparisons were logged with flags that have gone, at their defaults."""
    run = stats.read_runs(ROOT / "results/short")[0]
    flags = stats.event(run, "run")["flags"]
    assert not options.REMOVED.keys().isdisjoint(flags)
    assert runs.must_match(flags, vars(options.complete(flags))) == {}
    assert runs.must_match(flags | {"theta_bar": 0.9}, vars(options.complete(flags))) == {"theta_bar": 0.9}


def test_a_fusion_pays_for_its_parents(tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--layers 2 --width 32 --heads 2 --seq 32 --batch 4 --steps 40 --threads 1 --eval_sequences 16"
    compare.main(["--methods", "full,fusion", "--seeds", "1", "--name", "f", *flags.split(), "--data", str(corpus)])
    rows = {row["arm"]: row for row in json.loads((tmp_path / "results/f/table.json").read_text())["rows"]}
    full, fusion = rows["full"], rows["fusion"]
    logs = [read_log(tmp_path / "out/compare/f" / f"fusion-0{of}") for of in ("", "-parent1", "-parent2")]
    steps = [log[-1]["step"] for log in logs]
    layer = {
        width: 24 * width**2 + 4 * 32 * width for width in (16, 32)
    }  # of a token: products, attention over 32 tokens
    spent = steps[0] * layer[32] + (steps[1] + steps[2]) * layer[16]
    assert 40 * layer[32] / spent == pytest.approx(fusion["relative_flops_layers"], rel=1e-6)
    assert fusion["relative_flops_layers"] == pytest.approx(4 / 3, rel=0.03) and full["relative_flops_layers"] == 1
    seeds = [log[0]["seed"] for log in logs]
    assert len({*seeds}) == 3 and logs[0][0]["flags"]["init"].endswith("fused") and steps[0] == steps[1] == steps[2]


def test_schedules_that_cannot_be_are_not_planned():
    with pytest.raises(ValueError):
        schedule("midas", base("--layers", "10"), 1.333)
    with pytest.raises(ValueError):
        schedule("raptr", base("--layers", "4"), 2)  # two pinned layers leave nothing to draw from
    warm = base("--full_warmup", "400")
    args = options.parse([*TWELVE, *schedule("raptr", warm, 1.333), "--full_warmup=400"])
    method = methods.choose(args)
    assert sum(method.expected_layers(step) for step in range(1, 1601)) / 1600 == pytest.approx(9, abs=0.02)


def test_a_table_does_not_mix_settings(tmp_path, corpus, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--methods full --seeds 1 --layers 2 --width 16 --heads 2 --seq 32 --batch 4 --threads 1"
    flags += " --eval_sequences 8 --data"
    compare.main([*flags.split(), str(corpus), "--steps", "3"])
    with pytest.raises(UserError, match="another --steps"):
        compare.main([*flags.split(), str(corpus), "--steps", "4"])
    shorter = tmp_path / "shorter"
    prepare.prepare(lambda: ((d, True) for d in text[:900]), shorter, 512, tokenizer=corpus / "tokenizer.model")
    with pytest.raises(UserError, match="another text"):
        compare.main([*flags.split(), str(shorter), "--steps", "3"])


def test_a_budget_that_an_arm_cannot_meet_is_said(capsys):
    compare.main(["--methods", "decreasing,raptr", "--budget", "2", "--plan"])
    assert "not possible" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--methods raptor", "raptr"),
        ("--budget 0.5", "--budget"),
        ("--layres 4", "--layers"),
        ("--budget nan", "--budget"),
        ("--seed 3", "--seeds"),
        ("--data /nowhere", "/nowhere"),
    ],
)
def test_bad_flags(flags, word):
    shown = script("studies.compare", *flags.split())
    assert shown.returncode == 2 and word in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr


def test_a_fusion_whose_parents_diverge_loses(tmp_path, corpus, monkeypatch):
    """While learning rates are tried: it counts as infinite, and the others go on."""
    monkeypatch.chdir(tmp_path)
    flags = (
        "--layers 2 --width 32 --heads 2 --seq 32 --batch 4 --steps 8 --threads 1 --eval_sequences 8 --dtype float32"
    )
    job = [*flags.split(), f"--data={corpus}", "--method=full", FIRST, "--lr=1e30", "--clip=0", "--warmup=0"]
    text = Corpus(corpus).fingerprint
    compare.run_all([(tmp_path / "out" / "fusion-0", job)], text, [], 1, may_diverge=True)
    assert compare.final_loss(tmp_path / "out" / "fusion-0") == math.inf


def test_a_learning_rate_at_which_training_diverges_is_not_chosen(tmp_path, corpus, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--layers 2 --width 32 --heads 2 --seq 32 --batch 4 --steps 8 --threads 1 --eval_sequences 8"
    flags += " --dtype float32 --clip 0"
    compare.main(["--methods", "full", "--seeds", "1", "--name", "t", "--lr", "1e30,1e-3", "--warmup", "0"]
                 + [*flags.split(), "--data", str(corpus)])  # fmt: skip
    table = json.loads(
        (tmp_path / "results/t/table.json").read_text(), parse_constant=pytest.fail
    )  # of Infinity, not JSON
    assert table["tuning"]["full"]["1e+30"] == "did not end" and table["tuning"]["full"]["0.001"] > 0
    assert table["rows"][0]["schedule"].endswith("lr 0.001")


def test_a_run_that_never_began_is_not_finished(tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    (tmp_path / "config.json").write_text("{}")
    assert not compare.finished(tmp_path, ["--method=full"], "text") and compare.final_loss(tmp_path) == math.inf


@pytest.mark.parametrize(
    "name",
    ["short", "long", "ul2", "width", "mixture_garcia", "mixture_ul2", "length-1200", "length-3600", "length-7200"]
    + ["depth-3600", "plateau-as_is", "plateau-past", "plateau-short_plateau", "choices-1200"],
)
def test_committed_tables_come_from_committed_logs(name, tmp_path):
    """Logs of older versions too, with flags that no longer exist."""
    committed, folder = ROOT / "results" / name, tmp_path / name
    folder.mkdir()
    for file in ("runs.jsonl", "table.json"):
        (folder / file).write_text((committed / file).read_text())
    compare.main(["--rebuild", str(folder)])
    for file in ("runs.jsonl", "table.json", "table.md"):
        assert (folder / file).read_text() == (committed / file).read_text()
    without_full = name == "choices-1200"  # which is compared with that of length-1200: it has no cost relative to it
    for figure in ["strips.png"] if without_full else ["strips.png", "flops.png"]:
        assert (folder / figure).stat().st_size > 3000
    (folder / "table.json").unlink()
    with pytest.raises(UserError, match="table.json"):
        compare.main(["--rebuild", str(folder)])
