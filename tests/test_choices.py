"""studies.choices: what each choice changes, the words of its rule, its page, and the study itself with tiny runs."""

import json
import math

import pytest

import methods
from engine import options
from raptr import mean_layers
from studies import choices, length, stats

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
    assert choices.word(values) == word


def test_a_choice_differs_in_what_it_says_and_nothing_else():
    arms = choices.plan(list(choices.CHOICES), COMMON, RATES)
    parsed = {arm: vars(options.parse([*COMMON, *flags])) for arm, flags in arms.items()}
    default = vars(options.parse([*COMMON, *choices.flags_of("raptr", options.parse([*COMMON, "--method=full"]))]))
    for choice in set(choices.CHOICES) - {"budget2"}:
        named = {flag[2:].split("=")[0] for flag in choices.CHOICES[choice][1]}
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


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A place where the study runs at a tiny size."""
    monkeypatch.chdir(tmp_path)
    small = "--layers=4 --width=32 --mlp=40 --heads=2 --seq=32 --batch=4 --eval_sequences=16 --threads=1".split()
    setting = [f"--config={choices.compare.ROOT / 'configs/ul2_toy.toml'}", *length.SETTING[1:], *small]
    monkeypatch.setattr(length, "SETTING", setting)
    monkeypatch.setattr(choices, "STEPS", 16)
    monkeypatch.setitem(choices.CHOICES, "alpha1", ("budget 1.2", ["--alpha=1"]))
    (tmp_path / "results" / "length").mkdir(parents=True)
    trials = {kind: {"0.002": 4.0, "0.004": 5.0} for kind in length.KINDS}
    (tmp_path / "results" / "length" / "rates.json").write_text(json.dumps(trials))
    return tmp_path


def test_the_study_from_nothing_and_again(tiny, capsys):
    choices.main(["--choices", "zero,alpha1", "--seeds", "2"])
    table = (tiny / "results/choices/table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")][1:] == [
        "| raptr", "| zero", "| alpha1"
    ]  # fmt: skip
    runs = [*stats.read_runs("results/length-16"), *stats.read_runs("results/choices-16")]
    assert {run["arm"] for run in runs} == {"full", "full_flops", "raptr", "zero", "alpha1", "full_13"}
    losses = {(run["arm"], run["seed"]): stats.loss(run) for run in runs}
    mean = sum(losses["zero", seed] - losses["raptr", seed] for seed in range(2)) / 2
    assert f"{mean:+.3f} ±" in table
    assert (tiny / "results/choices/choices.png").stat().st_size > 10_000
    (tiny / "results/choices/table.md").unlink()
    choices.main(["--rebuild"])
    assert (tiny / "results/choices/table.md").read_text() == table


def test_a_wrong_choice_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stopped:
        choices.main(["--choices", "zeros"])
    assert stopped.value.code == 2 and "there is no 'zeros'; did you mean" in capsys.readouterr().err.replace("\n", " ")
