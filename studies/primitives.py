"""Does RaPTr leave a better inductive bias at equal pretraining loss? Fine-tune finished runs on reasoning primitives.

    python -m studies.primitives out/compare/length-7200               every run that has ended, on every task
    python -m studies.primitives out/compare/length-7200 --jobs 2      two fine-tunings at a time, a thread each
    python -m studies.primitives --rebuild results/primitives          table and figure from the log

A second start skips what is there. The runs are UL2 decoders in folders ARM-SEED, as studies.compare leaves them. Each
is fine-tuned on each task by itself, in all its layers. So is `untrained`, the network that `full` of the seed began
with. In one seed all arms see the same batches and get the same held-out questions. The words of a task are random:

    task          prompt                                   written            by chance
    copying       his of man to in was ...                 man to in was ...      1/24  a stretch of 17 of the 24 words
    induction     his of man to in ...                     of man  his of ...     1/8   each word, and what followed it
    variables 0   of=the, man=her ...                      man her  of the ...    0.23  5 names, the value of each
    variables 1   of=the, man=her ... to=of, by=man ...    by her  to the ...     0.23  5 more names, set to those
    variables 2   ... all=to, so=by ...                    so her  all the ...    0.28  4 names on each of three levels
    look-up       of the man her ...                       man her  of the ...    0.16  8 keys, the value of each

A model reads [S] prompt <0> in both directions and writes <0> and what is written, as under its S-denoiser. The loss is
on the answers alone: the second word of each pair, and in copying all words but the first. Accuracy is the share of the
answers that are the likeliest token, given the right ones before. By chance: a guess among the words, or the values, of
the prompt. Not here: the pretraining (studies/compare.py).

The verdict is by rule 4 of results/LOG.md. A score is the mean accuracy over the tasks. RaPTr's is compared with the
score at its loss on the line through the (loss, score) of full training with as many steps and with as many FLOPs.

Source: the reasoning primitives of MIDAS (Saunshi et al., arXiv 2409.19044): copying, and variables at depth 0 and 1
with five values, asked in words after a few examples. We know them from descriptions only. Induction, look-up, depth 2,
tokens instead of text, fine-tuning, several questions a prompt, all sizes and rates are ours. They were chosen on full
training of seed 1000, which is not reported: with one question a prompt, or names and values from all words, it stayed
at chance for 300 steps.
"""

import re
import shlex
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import model as transformer
from data import MODES, NO_TARGET
from engine import machine, options
from engine.errors import UserError, guard
from engine.log import has_ended, read_log, subplots
from engine.runs import load_run, read_config
from evals.finetune import Trainer
from studies import stats
from text.corpus import rng
from text.prepare import SPECIAL
from train import to_device

RATE, WARMUP, BATCH, HELD_OUT = 2e-3, 0.1, 32, 512
ALPHABET = 26  # so many words are names, so many others values
SHOWN, COPIED = 24, 16  # copying: words of a prompt, answers
FOLLOWED, FOLLOWED_ALPHABET = 8, 12  # induction: words of a prompt, and of how many
KEYS = 8  # look-up
NAMES = (5, 5, 4)  # variables: names on each level, by depth
LONGEST = 64  # tokens of a row
CLOSE = 0.01  # rule 4: scores within this much of each other are level
UNTRAINED = "untrained"

# ----------------------------------------------------------------------------------------------------------------
# The tasks: an instance is (prompt, [(token, whether it is an answer), ...])


class Ids(NamedTuple):
    """Token ids that instances are made of."""

    words: np.ndarray  # a space and letters, as common ones first
    equals: int
    line: int
    mode: int  # [S]
    gap: int  # <0>


def ids_of(tokenizer):
    """The Ids of a UL2's tokenizer. Raises UserError if it has too few words."""
    V = tokenizer.vocab_size()
    words = [i for i in range(SPECIAL, V) if re.fullmatch("▁[a-z]+", tokenizer.id_to_piece(i))]
    if len(words) < 2 * ALPHABET:
        raise UserError(f"a tokenizer of {V} ids has {len(words)} words; the tasks need {2 * ALPHABET}")
    equals, line = tokenizer.encode("=")[-1], tokenizer.encode("\n")[-1]
    return Ids(np.array(words), equals, line, V + MODES.index("[S]"), V + len(MODES))


def names(ids, shape, generator):
    return generator.choice(ids.words[:ALPHABET], shape, replace=False)


def values(ids, n, generator):
    """With replacement: what was answered already says nothing of the rest."""
    return generator.choice(ids.words[ALPHABET : 2 * ALPHABET], n)


def questions(answers, generator):
    """What is written where {question: answer} are asked in random order."""
    asked = generator.permutation(list(answers)).tolist()
    return [pair for question in asked for pair in ((question, False), (answers[question], True))]


def copying(ids, generator):
    words = generator.choice(ids.words, SHOWN, replace=False)
    start = generator.integers(SHOWN - COPIED)
    return words, [(word, i > 0) for i, word in enumerate(words[start : start + COPIED + 1])]


def induction(ids, generator):
    words = generator.choice(ids.words[:FOLLOWED_ALPHABET], FOLLOWED, replace=False)
    return words, questions(dict(zip(words[:-1], words[1:])), generator)


def look_up(ids, generator):
    answers = dict(zip(names(ids, KEYS, generator), values(ids, KEYS, generator)))
    return [token for pair in answers.items() for token in pair], questions(answers, generator)


def variables(depth):
    """Chains of assignments. A level names what stands right in the level before; its order is random."""

    def instance(ids, generator):
        n = NAMES[depth]
        levels, end, prompt = names(ids, (depth + 1, n), generator), values(ids, n, generator), []
        for left, right in zip(levels, [end, *levels]):
            prompt += [token for i in generator.permutation(n) for token in (left[i], ids.equals, right[i], ids.line)]
        return prompt, questions(dict(zip(levels[-1], end)), generator)

    return instance


def one_of(n):
    """Chance of a guess among n values that are drawn with replacement."""
    return 1 / n + (1 - 1 / n) / ALPHABET


TASKS = {  # name: (instance of it, share of right answers by chance)
    "copying": (copying, 1 / SHOWN),
    "induction": (induction, 1 / FOLLOWED),
    **{f"variables {depth}": (variables(depth), one_of(n)) for depth, n in enumerate(NAMES)},
    "look-up": (look_up, one_of(KEYS)),
}


def batch(task, ids, count, generator):
    """A batch of `count` instances, as data.Denoising makes them: tokens (B, T), prefix (B,), targets (B, T)."""
    instances = [TASKS[task][0](ids, generator) for _ in range(count)]
    prompts, written = (np.array(part) for part in zip(*instances))  # (B, P), (B, W, 2)
    column = lambda token: np.full((count, 1), token)  # noqa: E731
    begin = [column(ids.mode), prompts, column(ids.gap), column(ids.gap)]
    rows = np.concatenate([*begin, written[:, :, 0]], 1)
    targets = np.full_like(rows, NO_TARGET)
    targets[:, -written.shape[1] :] = np.where(written[:, :, 1], written[:, :, 0], NO_TARGET)
    return rows[:, :-1], np.full(count, prompts.shape[1] + 2), targets[:, 1:]


# ----------------------------------------------------------------------------------------------------------------
# One fine-tuning


@torch.no_grad()
def accuracy(model, held_out, device, autocast):
    """Share of the answers of a batch whose token is the likeliest."""
    right = total = 0
    for at in range(0, len(held_out[0]), 64):
        tokens, prefix, targets, places = to_device([array[at : at + 64] for array in held_out], device)
        with autocast:
            likeliest = model.predict(model.states(tokens, prefix).flatten(0, 1)[places]).argmax(-1)
        right, total = right + int((likeliest == targets.flatten()[places]).sum()), total + len(places)
    return right / total


def fine_tune(folder, arm, seed, task, settings):
    """Fine-tune one run on one task. Returns its line of the log."""
    torch.set_num_threads(1)
    machine.steady_memory()
    began, (name, dtype) = time.perf_counter(), machine.choose()
    device, autocast = torch.device(name), machine.autocast(name, dtype)
    model, tokenizer, _ = load_run(folder, device)  # dropout is off, and stays off
    if arm == UNTRAINED:
        model = transformer.make(model.config, seed).to(device).eval()
    ids = ids_of(tokenizer)
    trainer = Trainer(model, settings["rate"], settings["steps"], settings["warmup"], autocast)
    for step in range(1, settings["steps"] + 1):
        arrays = batch(task, ids, settings["batch"], rng(seed, task, step))
        answers = int((arrays[2] != NO_TARGET).sum())
        trainer.step(lambda tensors, answers=answers: model(tensors) / answers, to_device(arrays, device))
    held_out = batch(task, ids, settings["held_out"], rng(seed, f"{task}, held out"))
    loss = None if arm == UNTRAINED else read_log(folder)[-1]["loss"]
    result = {"arm": arm, "seed": seed, "task": task, "loss": loss}
    result["accuracy"] = accuracy(model, held_out, device, autocast)
    return result | {"seconds": round(time.perf_counter() - began, 1)} | settings


def ended(folder):
    """{(arm, seed): run folder} of the runs of a comparison that have ended, and of what `full` began with. Raises
    UserError if there are none, or if they are not UL2 decoders of LONGEST tokens."""
    runs = {}
    for run in sorted(Path(folder).glob("*-*")):
        name = re.fullmatch(r"(.+)-(\d+)", run.name)
        if name and has_ended(read_log(run)):
            runs[name[1], int(name[2])] = run
    if not runs:
        raise UserError(f"{folder}: holds no run ARM-SEED that has ended")
    for run in runs.values():
        config = read_config(run)
        if config["arch"] != "ul2" or config["seq"] < LONGEST:
            raise UserError(f"{run}: not a UL2 decoder of {LONGEST} tokens or more (--arch ul2 --seq {LONGEST})")
    return runs | {(UNTRAINED, seed): run for (arm, seed), run in runs.items() if arm == "full"}


def run_all(runs, settings, file, count):
    """Append to `file` a line for each run {(arm, seed): folder} and task that it does not have, `count` at a time.
    Raises UserError if it holds lines of other settings."""
    done = stats.read_done(file)
    for name, value in settings.items():
        if other := [line[name] for line in done if line[name] != value]:
            raise UserError(f"{file}: was made with {name} {other[0]}, not {value}; choose another --name")
    known = {(line["arm"], line["seed"], line["task"]) for line in done}
    missing = [(run, *key, task, settings) for key, run in runs.items() for task in TASKS if (*key, task) not in known]
    told = lambda line: f"{line['arm']}-{line['seed']}, {line['task']}: {line['accuracy']:.3f}"  # noqa: E731
    stats.append_all(fine_tune, missing, file, count, told)


# ----------------------------------------------------------------------------------------------------------------
# What the lines say


def scored(lines):
    """One run per (arm, seed) that has done all tasks: {"arm", "seed", "loss", one accuracy per task, "score"}."""
    runs = {}
    for line in lines:
        run = runs.setdefault((line["arm"], line["seed"]), {name: line[name] for name in ("arm", "seed", "loss")})
        run[line["task"]] = line["accuracy"]
    runs = [run for run in runs.values() if TASKS.keys() <= run.keys()]
    return [run | {"score": statistics.mean(run[task] for task in TASKS)} for run in runs]


def along(runs, arm):
    """[(place, advantage)] of an arm, for every seed that has it, full and full_flops. place: of its loss, between that
    of full, 0, and that of full_flops, 1. advantage: its score minus the line's at this place."""
    by_name = {(run["arm"], run["seed"]): run for run in runs}
    found = []
    for seed in sorted(seed for name, seed in by_name if name == arm):
        mine, a, b = (by_name.get((name, seed)) for name in (arm, "full", "full_flops"))
        if a and b:
            place = (mine["loss"] - a["loss"]) / (b["loss"] - a["loss"])
            found.append((place, mine["score"] - (a["score"] + place * (b["score"] - a["score"]))))
    return found


def conclusion(runs):
    """The verdict of rule 4, one sentence."""
    found = along(runs, "raptr")
    if not found:
        return "Verdict: not run; it needs full, full_flops and raptr of one seed."
    places, advantages = zip(*found)
    what = stats.signed(stats.interval(advantages))
    where = f"RaPTr's loss lies at {statistics.mean(places):.2f} from full's (0) to full_flops' (1)"
    no = lambda low, high: high < 0 or (-CLOSE < low and high < CLOSE)  # noqa: E731
    word = stats.verdict(advantages, lambda low, high: low > 0, no)
    return f"RaPTr's score minus that of full training at RaPTr's loss: {what} ({len(found)} seeds). {where}. {word}."


def write_results(folder):
    """table.md and scores.png of a results folder, from its runs.jsonl."""
    lines = stats.read_runs(folder)
    runs = scored(lines)
    if not runs:
        raise UserError(f"{folder}: no run has done all {len(TASKS)} tasks yet")
    arms = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        arms.setdefault(run["arm"], []).append(run)
    arms = dict(sorted(arms.items(), key=lambda item: -statistics.mean(run["score"] for run in item[1])))
    rows = []
    for arm, mine in arms.items():
        loss = "" if arm == UNTRAINED else stats.spread([run["loss"] for run in mine])
        cells = [arm, f"{len(mine)}", loss, *(stats.spread([run[name] for run in mine]) for name in [*TASKS, "score"])]
        differences = stats.paired(runs, arm, "full", lambda a, b: a["score"] - b["score"])
        on_line = arm in ("full", "full_flops", UNTRAINED)
        advantages = [] if on_line else [advantage for _, advantage in along(runs, arm)]
        differences = [] if arm == "full" else differences
        rows.append(cells + [stats.signed(stats.interval(d)) if d else "" for d in (differences, advantages)])
    chances = [chance for _, chance in TASKS.values()]
    rows.append(["by chance", "", "", *(f"{chance:.3f}" for chance in [*chances, statistics.mean(chances)]), "", ""])
    its = lines[0]
    command = ["python", "-m", "studies.primitives", its["runs"], "--name", Path(folder).name, "--steps", its["steps"]]
    commits = ", ".join(sorted({line["commit"] for line in lines if line["commit"]}))
    text = [f"# {Path(folder).name}: fine-tuned on reasoning primitives, {its['steps']} steps of {its['batch']}", ""]
    text += stats.made_by({"command": shlex.join(map(str, command)), "commit": commits})
    head = ["arm", "seeds", "pretraining loss", *TASKS, "score", "minus full", "minus full at equal loss"]
    text += [*stats.table(head, rows), "", *LEGEND, "", conclusion(runs)]
    stats.save_page(Path(folder, "table.md"), text)
    draw(arms, Path(folder, "scores.png"))


LEGEND = [
    "Accuracy on held-out questions, mean ± standard deviation over seeds; score: mean over the tasks. Differences of",
    "scores are paired by seed, mean ± 95% interval (Student's t); above 0 is better. At equal loss: minus the score",
    "of the line through (loss, score) of full and full_flops, at the loss of the arm.",
]


def draw(arms, path):
    """Score against pretraining loss, one point with its spread per arm."""
    figure, axes = subplots(7, 4.5)
    points = {}
    for arm, runs in arms.items():
        scores = [run["score"] for run in runs]
        if arm == UNTRAINED:
            axes.axhline(statistics.mean(scores), color="0.5", ls=":", lw=1, label=arm)
            continue
        values = [run["loss"] for run in runs], scores
        points[arm] = x, y = [statistics.mean(each) for each in values]
        spreads = [statistics.stdev(each) if len(each) > 1 else 0 for each in values]
        color = {"raptr": "tab:red", "full": "black", "full_flops": "0.4"}.get(arm)
        style = {"ms": 5, "lw": 1, "capsize": 2, "color": color, "label": arm}
        axes.errorbar(x, y, spreads[1], spreads[0], fmt="s" if arm.startswith("full") else "o", **style)
    if {"full", "full_flops"} <= points.keys():
        axes.plot(*zip(points["full"], points["full_flops"]), color="0.7", lw=1, zorder=0)
    axes.set(xlabel="pretraining loss, held out (nats)", ylabel="score: mean accuracy over the tasks")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------


def main():
    parser = options.command("studies.primitives", __doc__)
    parser.add_argument("runs", nargs="?", help="folder of a comparison, out/compare/NAME")
    parser.add_argument("--name", default="primitives", help="folder under results/")
    parser.add_argument("--steps", type=options.count, default=300, help="of each fine-tuning")
    parser.add_argument("--jobs", type=options.count, default=1, help="fine-tunings at a time, a thread each")
    parser.add_argument("--rebuild", type=Path, metavar="FOLDER", help="table and figure of a results folder, no run")
    args = parser.parse_args()
    if (args.runs is None) == (args.rebuild is None):
        raise UserError("name the folder of a comparison, like out/compare/length-7200, or --rebuild FOLDER")
    if args.rebuild:
        return write_results(args.rebuild)
    settings = {"runs": str(Path(args.runs)), "steps": args.steps, "batch": BATCH, "rate": RATE, "warmup": WARMUP}
    results = stats.RESULTS / args.name
    run_all(ended(args.runs), settings | {"held_out": HELD_OUT}, results / "runs.jsonl", args.jobs)
    write_results(results)


if __name__ == "__main__":
    guard("studies.primitives", main)
