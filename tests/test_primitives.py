import json
import random
import re
import shutil
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import model as transformer
from data import MODES, NO_TARGET, denoise
from engine import ROOT
from engine.runs import load_run
from processes import script
from studies import primitives
from studies.primitives import TASKS, Ids
from test_train import go
from text.corpus import rng

V = 1000
EQUALS, LINE = 7, 8
IDS = Ids(np.arange(100, V), EQUALS, LINE, V + MODES.index("[S]"), V + len(MODES))


def instances(task, count=40, name="test"):
    """[(prompt, written, positions of the answers in it)], read off the rows of a batch."""
    tokens, prefix, targets = primitives.batch(task, IDS, count, rng(0, name))
    found = []
    for row, P, wanted in zip(tokens.tolist(), prefix.tolist(), targets.tolist()):
        row, answers = [*row, wanted[-1]], [i + 1 for i, token in enumerate(wanted) if token != NO_TARGET]
        assert [row[i] for i in answers] == [wanted[i - 1] for i in answers]  # the next token
        assert (row[0], row[P - 1], row[P]) == (IDS.mode, IDS.gap, IDS.gap)
        found.append((row[1 : P - 1], row[P + 1 :], [i - P - 1 for i in answers]))
    return found


def solve(task, prompt, written, at):
    """The answer at a place of what is written, found from the prompt and what is written before."""
    last = written[at - 1]
    if task in ("induction", "copying"):
        return prompt[prompt.index(last) + 1]
    if task == "look-up":
        return dict(zip(prompt[::2], prompt[1::2]))[last]
    lines = [prompt[i : i + 4] for i in range(0, len(prompt), 4)]
    assert all(line[1::2] == [EQUALS, LINE] for line in lines)
    value_of, hops = {line[0]: line[2] for line in lines}, 0
    while value_of[last] in value_of:
        last, hops = value_of[last], hops + 1
    assert hops == int(task[-1])
    return value_of[last]


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_prompt(task):
    for prompt, written, answers in instances(task):
        assert answers == list(range(1, len(written), 1 if task == "copying" else 2))
        assert [solve(task, prompt, written, at) for at in answers] == [written[at] for at in answers]
        assert len(prompt) + len(written) + 2 <= primitives.LONGEST
    assert len({tuple(written) for _, written, _ in instances(task)}) == 40  # not one instance, forty times


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_names_stand_below_what_they_name(depth):
    """Level after level, each in an order of its own, each name once."""
    orders = set()
    for prompt, written, _ in instances(f"variables {depth}"):
        left, right = prompt[::4], prompt[2::4]
        n = len(left) // (depth + 1)
        assert len(set(left)) == len(left) and set(written[::2]) == set(left[-n:])
        for level in range(1, depth + 1):
            above, here = left[(level - 1) * n : level * n], right[level * n : (level + 1) * n]
            assert sorted(above) == sorted(here)
            orders.add(above == here)
    assert (False in orders) == (depth > 0)


def test_a_row_looks_like_the_s_denoisers():
    tokens, prefix, _ = (a[0] for a in denoise(np.full((1, 64), 50), ["s"], V, 64, rng(0, "row")))
    assert (tokens[0], tokens[prefix - 1], tokens[prefix]) == (IDS.mode, IDS.gap, IDS.gap)


@pytest.mark.parametrize("task", TASKS)
def test_held_out_questions_are_new(task):
    """Batches belong to (seed, task, step), and none holds what another one asks."""
    whole = lambda *name: [(*prompt, *written) for prompt, written, _ in instances(task, 64, *name)]  # noqa: E731
    assert whole("a") == whole("a")
    training = [row for step in range(10) for row in whole(f"{task} {step}")]
    held_out = whole(f"{task}, held out")
    assert len(set(training)) == len(training) and len(set(held_out)) == 64 and not set(training) & set(held_out)


@pytest.mark.parametrize("task", TASKS)
def test_chance(task):
    """Guess among the words, or the values, that the prompt shows: as often right as docstring and table say."""
    guess, right = random.Random(0), []
    for prompt, written, answers in instances(task, 2000):
        if task == "look-up":
            shown = prompt[1::2]
        elif task.startswith("variables"):
            shown = [token for token in prompt[2::4] if token not in prompt[::4]]
        else:
            shown = prompt
        right += [guess.choice(shown) == written[at] for at in answers]
    said = re.search(rf"^    {task} .*?  (1/\d+|0\.\d+)  ", primitives.__doc__, re.MULTILINE)[1]
    said = 1 / int(said[2:]) if said.startswith("1/") else float(said)
    assert statistics.mean(right) == pytest.approx(TASKS[task][1], abs=0.012)
    assert TASKS[task][1] == pytest.approx(said, abs=0.005)


def test_accuracy_counts_answers_only():
    """A model that is right about the first 3 of 8 answers, and wrong about all that is no answer."""
    held_out = primitives.batch("look-up", IDS, 70, rng(0, "accuracy"))
    target = torch.from_numpy(held_out[2])
    wrong = (target != NO_TARGET).cumsum(1) > 3
    likeliest, seen = torch.where(wrong, 1, target.clamp(min=0)), []

    def states(tokens, prefix):
        seen.append(len(tokens))
        return likeliest[sum(seen) - len(tokens) : sum(seen), :, None]

    predict = lambda states: torch.nn.functional.one_hot(states[:, 0], V)  # noqa: E731
    model = SimpleNamespace(states=states, predict=predict)
    assert primitives.accuracy(model, held_out, torch.device("cpu"), torch.no_grad()) == 3 / 8 and sum(seen) == 70


# ----------------------------------------------------------------------------------------------------------------
# The verdict


def invented(advantages, bend=0.0):
    """Lines of three arms: full's and full_flops' score falls by 2 a nat, raptr lies above that line by an advantage
    for each seed."""
    lines = []
    for seed, advantage in enumerate(advantages):
        base = 4 + 0.3 * seed  # seeds differ much more than arms do
        at = {"full": (base, 0), "full_flops": (base + 0.1, bend), "raptr": (base + 0.02, advantage + 0.2 * bend)}
        for arm, (loss, more) in at.items():
            for i, task in enumerate(TASKS):
                accuracy = 10 - 2 * loss + seed + more + (i - 2.5) / 10
                lines.append({"arm": arm, "seed": seed, "task": task, "loss": loss, "accuracy": accuracy})
    return lines


@pytest.mark.parametrize(
    "advantages, word",
    [
        ([0.03, 0.04, 0.035], "yes"),
        ([0.004, 0.005, 0.0045], "yes"),  # above 0, however little
        ([-0.03, -0.04, -0.035], "no"),
        ([0.001, -0.001, 0.0005], "no"),  # within a point of 0
        ([0.03, -0.03, 0.01], "undecided"),
        ([0.03], "undecided"),
    ],
)
@pytest.mark.parametrize("bend", [0.0, -0.3])
def test_verdict(advantages, word, bend):
    runs = primitives.scored(invented(advantages, bend))
    places, found = zip(*primitives.along(runs, "raptr"))
    assert found == pytest.approx(advantages) and places == pytest.approx([0.2] * len(advantages))
    assert primitives.conclusion(runs).endswith(f" {word}.")


def test_what_is_missing_is_not_judged():
    lines = invented([0.03, 0.04, 0.035])
    without = [line for line in lines if (line["arm"], line["seed"]) != ("full_flops", 1)]
    assert [a for _, a in primitives.along(primitives.scored(without), "raptr")] == pytest.approx([0.03, 0.035])
    unfinished = [line for line in lines if (line["arm"], line["task"]) != ("raptr", "copying")]
    assert "not run" in primitives.conclusion(primitives.scored(unfinished))


# ----------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def comparison(corpus, tmp_path_factory):
    """Three tiny runs of one seed, one that has not ended, and a folder that is no ARM-SEED."""
    folder = tmp_path_factory.mktemp("compared")
    flags = "--arch ul2 --layers 3 --width 32 --heads 2 --seq 64 --batch 4 --steps 6 --positions rotary --dropout 0"
    flags += " --stages 2-3 --seed 3 --eval_sequences 8 --eval_every 0 --save_every 0 --threads 1"
    for arm, more in {"full": [], "full_flops": ["--steps", 4], "raptr": ["--method", "raptr"]}.items():
        go([*flags.split(), "--method", "full", "--data", str(corpus), "--out", str(folder / f"{arm}-3")], *more)
    (folder / "stacking-3").mkdir()
    (folder / "stacking-3" / "log.jsonl").write_text((folder / "raptr-3" / "log.jsonl").read_text()[:-200])
    (folder / "full-lr0.002-1000").mkdir()
    return folder


def test_what_has_ended(comparison):
    runs = primitives.ended(comparison)
    assert set(runs) == {(arm, 3) for arm in ("full", "full_flops", "raptr", "untrained")}
    assert runs["untrained", 3] == runs["full", 3] == comparison / "full-3"


def test_who_is_fine_tuned(comparison, monkeypatch):
    """The weights at the end of a run; of `untrained`, those that it began with. Every one of them is trained."""
    settings = {"steps": 1, "batch": 4, "rate": 1e-3, "warmup": 0.5, "held_out": 4}
    seen = []
    monkeypatch.setattr(primitives, "accuracy", lambda model, *_: seen.append(model) or 0.0)
    for arm in ("full", "untrained"):
        primitives.fine_tune(comparison / "full-3", arm, 3, "look-up", settings)
    end = load_run(comparison / "full-3")[0]
    start = transformer.make(end.config, 3)
    assert (end.blocks[1].mlp.up.weight - start.blocks[1].mlp.up.weight).abs().max().item() > 4e-3
    for model, before in zip(seen, (end, start)):
        for name, p in model.named_parameters():
            change = (p - before.get_parameter(name)).abs().max().item()
            assert 0 < change < 2e-3, name


def test_the_command_line(comparison, tmp_path):
    """Every run and task has a line; a second start makes only what is missing; --rebuild makes the table again."""
    run = lambda *flags: script("studies.primitives", *flags, cwd=tmp_path)  # noqa: E731
    first = run(comparison, "--name", "p", "--steps", "2")
    assert first.returncode == 0, first.stderr
    results = tmp_path / "results" / "p"
    text, table = (results / "runs.jsonl").read_text(), (results / "table.md").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    wanted = [(arm, 3, task) for arm in ("full", "full_flops", "raptr", "untrained") for task in TASKS]
    assert sorted((line["arm"], line["seed"], line["task"]) for line in lines) == sorted(wanted)
    losses = {arm: json.loads((comparison / f"{arm}-3" / "log.jsonl").read_text().splitlines()[-1])["loss"]
              for arm in ("full", "full_flops", "raptr")}  # fmt: skip
    assert all(line["loss"] == losses.get(line["arm"]) for line in lines)
    assert table in first.stdout and "undecided." in table and (results / "scores.png").stat().st_size > 10_000
    assert f"python -m studies.primitives {comparison} --name p --steps 2`" in table

    (results / "table.md").unlink()
    assert run("--rebuild", results).returncode == 0 and (results / "table.md").read_text() == table
    (results / "runs.jsonl").write_text(text[:-50])  # the last line is half there
    again = run(comparison, "--name", "p", "--steps", "2", "--jobs", "2")
    assert again.returncode == 0 and "  1/1  " in again.stdout and (results / "table.md").read_text() == table
    after = [json.loads(line) for line in (results / "runs.jsonl").read_text().splitlines()]
    keep = lambda line: {key: value for key, value in line.items() if key != "seconds"}  # noqa: E731
    assert list(map(keep, after)) == list(map(keep, lines)) and after[:-1] == lines[:-1]
    other = run(comparison, "--name", "p", "--steps", "3")
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "steps 2, not 3" in other.stderr


@pytest.mark.parametrize("what", ["nowhere", "--arch bert", "--seq 32", "nothing", "--rebuild nowhere", "--steps 0"])
def test_what_cannot_work(what, tmp_path, comparison):
    """One sentence, exit code 2, and no results."""
    flags = {"nothing": [], "--steps 0": [comparison, "--steps", "0"]}.get(what, what.split())
    if what in ("--arch bert", "--seq 32"):
        run, flags = tmp_path / "runs" / "full-3", ["runs"]
        shutil.copytree(comparison / "full-3", run)
        name, value = what[2:].split()
        config = json.loads((run / "config.json").read_text()) | {name: int(value) if value.isdecimal() else value}
        (run / "config.json").write_text(json.dumps(config))
    shown = script("studies.primitives", *flags, cwd=tmp_path)
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1, shown.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", ["primitives", "primitives-3600"])
def test_the_committed_page_comes_from_the_committed_log(name, tmp_path, monkeypatch):
    committed = ROOT / "results" / name
    monkeypatch.setattr(primitives, "draw", lambda *_: None)
    shutil.copytree(committed, tmp_path / name)
    primitives.write_results(tmp_path / name)
    assert (tmp_path / name / "table.md").read_text() == (committed / "table.md").read_text()
