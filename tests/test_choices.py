"""studies.choices: what each choice changes, the words of its rule, its page, and the study itself with tiny runs."""

import json
import math
import shutil

import pytest

import methods
from engine import options
from engine.errors import UserError
from raptr import mean_layers
from studies import choices, compare, length, stats

COMMON = length.flags_at(choices.STEPS, [])
RATES = {"full": 2e-3, "raptr": 4e-3}


@pytest.mark.parametrize(
    "values, word",
    [
        ((-0.10, -0.11, -0.12), "better"),
        ((0.10, 0.11, 0.12), "worse"),
        ((0.001, 0.0, -0.001), "level"),
        ((0.10, -0.10, 0.0), "undecided"),
        ((-0.10,), "undecided"),  # one seed
    ],
)
def test_the_word_follows_the_rule(values, word):
    assert stats.word(values) == word


def test_a_choice_differs_in_what_it_says_and_nothing_else():
    arms = choices.plan(list(choices.CHOICES), COMMON, RATES)
    parsed = {arm: vars(options.parse([*COMMON, *flags])) for arm, flags in arms.items()}
    default = vars(options.parse([*COMMON, *length.planned(["raptr"], COMMON)["raptr"]]))
    for choice, flags in choices.CHOICES.items():
        named = {flag[2:].split("=")[0] for flag in flags} if flags else {"stages", "alpha"}
        different = {name for name, value in parsed[choice].items() if value != default[name]} - {"out", "lr"}
        assert different == named, choice
        assert parsed[choice]["lr"] == RATES["raptr"]


def test_full_training_with_the_flops_of_each_choice_is_there():
    arms = choices.plan(list(choices.CHOICES), COMMON, RATES)
    layers = {}
    for arm, flags in arms.items():
        args = options.parse([*COMMON, *flags])
        layers[arm] = args.steps * mean_layers(methods.choose(args), args.steps)
    layers["full_flops"] = 900 * 12
    for choice in choices.CHOICES:
        full, steps = choices.equal_flops(options.parse([*COMMON, *arms[choice]]))
        assert math.isclose(layers[choice], layers[full], abs_tol=12), choice
        assert full == "full_flops" or f"--steps={steps}" in arms[full]
    assert {arm for arm in layers if arm.startswith("full_")} == {
        "full_flops", "full_922", "full_1000", "full_750", "full_1050", "full_600"
    }  # fmt: skip


def test_the_committed_page_comes_from_committed_logs(tmp_path, monkeypatch):
    committed = (stats.RESULTS / "choices" / "table.md").read_text()
    for name in ("choices-1200", "length-1200"):
        (tmp_path / name).mkdir()
        for file in ("runs.jsonl", "table.json"):
            shutil.copy(stats.RESULTS / name / file, tmp_path / name)
    monkeypatch.setattr(stats, "RESULTS", tmp_path)
    choices.main(["--rebuild"])
    assert (tmp_path / "choices" / "table.md").read_text() == committed


@pytest.fixture
def small(monkeypatch, tmp_path, corpus, tiny_length):
    """Flags of the study at a tiny size, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices, "STEPS", 16)
    return ["--data", str(corpus), "--name", "mine", "--seeds", "2"]


def test_the_study_from_nothing_then_further_then_from_its_results(small, tmp_path):
    choices.main([*small, "--choices", "zero"])
    page = tmp_path / "results/mine/table.md"
    assert "| zero | skipped_grad zero | 0.750 |" in page.read_text()
    choices.main([*small, "--choices", "alpha1"])
    table, figure = page.read_text(), page.with_name("choices.png")
    named = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")]
    assert named == ["| choice", "| raptr", "| zero", "| choice", "| alpha1"]
    assert "choices zero; python" in table and "--rebuild --name mine`" in table
    assert json.loads((tmp_path / "results/mine-length/rates.json").read_text()).keys() == length.KINDS.keys()
    runs = [*stats.read_runs("results/mine-length-16"), *stats.read_runs("results/mine-16")]
    assert {run["arm"] for run in runs} == {"full", "full_flops", "raptr", "zero", "alpha1", "full_13"}
    losses = {(run["arm"], run["seed"]): stats.loss(run) for run in runs}
    mean = sum(losses["zero", seed] - losses["raptr", seed] for seed in range(2)) / 2
    assert f"{mean:+.3f} ±" in table and figure.stat().st_size > 10_000

    shutil.rmtree(tmp_path / "out")
    page.unlink()
    choices.main([*small, "--choices", "zero,alpha1"])
    assert not [*tmp_path.glob("out/compare/*/*/log.jsonl")]  # results/ is enough
    assert page.read_text() == table  # a start that trains nothing is not named
    page.unlink()
    choices.main(["--rebuild", "--name", "mine"])
    assert page.read_text() == table

    file = tmp_path / "results/mine-16/runs.jsonl"  # of another text than what it is compared with
    runs = stats.read_runs(file.parent)
    stats.event(runs[0], "run")["data"]["fingerprint"] = "other"
    file.write_text("".join(json.dumps(run) + "\n" for run in runs))
    with pytest.raises(UserError, match="another text"):
        choices.main(["--rebuild", "--name", "mine"])
    with pytest.raises(UserError, match="another text; choose another --name"):
        choices.main([*small, "--choices", "gap"])


@pytest.mark.parametrize(
    "flag, words", [("--lr=1", "study sets it"), ("--seed=1", "use --seeds"), ("--layers=6", "must be 6")]
)
def test_flags_that_cannot_be(flag, words, tmp_path, monkeypatch, corpus, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UserError, SystemExit)) as stopped:
        choices.main(["--choices", "9-10-11-12", "--data", str(corpus), "--vocab=512", flag])
    assert words in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "results").exists()


def test_a_wrong_choice_is_one_sentence(capsys):
    for name, words in (("zeros", "did you mean zero?"), ("blue", "of gap, uniform, inverse")):
        with pytest.raises(SystemExit) as stopped:
            choices.main(["--choices", name])
        assert stopped.value.code == 2 and words in " ".join(capsys.readouterr().err.split())


def test_starts_are_joined_pair_by_pair():
    one, two = {"title": "t", "command": "a --choices gap", "commit": "1"}, {"command": "a", "commit": "1"}
    both = {"title": "t", "command": "a --choices gap; a", "commit": "1; 1"}
    assert stats.joined([one, two]) == both == stats.joined([both, two])  # one is a prefix of the other
    assert stats.joined([both, two | {"commit": "2"}])["commit"] == "1; 1; 2"
    assert compare.size(options.parse(["--steps=7"])).endswith("7 steps of 16 x 64")
