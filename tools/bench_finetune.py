"""The same fine-tuning through this project's BERT and through `transformers`: scores and time, in turn.

    python bench_finetune.py FOLDER --data SUPERGLUE --tasks CB,RTE --seeds 3 --lr 1e-4       whole trainings of each side
    python bench_finetune.py FOLDER --data SUPERGLUE --tasks CB,RTE --steps 15                what a step's time consists of
    python bench_finetune.py FOLDER --data SUPERGLUE --tasks CB,RTE --steps 15 --memory plain

FOLDER is of `transformers`: config.json, model.safetensors, vocab.txt. Both sides have the same rows of tokens, padded to
the longest of a batch, the same batches in the same order (`-mixed`: others), optimizer, schedule, epochs, dtype and malloc
setting: both run eval_superglue.fit, which differs only in the model it is given. Theirs is
AutoModelForSequenceClassification with all words; ours has the words of the task. Poolers and heads begin with the same
weights. Dropout is drawn differently. `mixed`: on batches of any lengths, as its Trainer makes them unless told otherwise;
--sides says who is compared.

For every task and seed one side is trained after the other, and the next seed begins from the other end. What is finished is
not done again: the same command continues. Let nothing else run meanwhile.
Not here: tokens/s of pretraining against theirs (bench.py --only rival).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import random
import statistics
from pathlib import Path
from statistics import median

import torch

import eval_superglue
from engine import checkpoint
from engine.errors import UserError
from eval_superglue import Answers
from evals import superglue
from evals.padding import batches, padded
from tools import hf
from tools.bench import trainer
from tools.timing import interleaved
from train import choose_machine, steady_memory


def mixed(lengths, size, generator):
    """As `batches`, but in a random order only."""
    order = generator.sample(range(len(lengths)), len(lengths))
    return [order[at : at + size] for at in range(0, len(order), size)]


class Theirs(torch.nn.Module):
    """Their classifier over the rows that `ours` makes, with its fresh layers. kind: of attention, sdpa or eager."""

    def __init__(self, folder, kind, outputs, ours):
        import transformers

        super().__init__()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        self.model = load(folder, num_labels=outputs, attn_implementation=kind, dtype=torch.float32)
        self.row, self.pad = ours.row, ours.pad
        for own, fresh in ((self.model.bert.pooler.dense, ours.pool), (self.model.classifier, ours.head)):
            own.load_state_dict(fresh.state_dict())

    def keep_words(self, rows):
        """They keep all."""

    def forward(self, rows):
        tokens, types = padded([r[0] for r in rows], self.pad, "cpu"), padded([r[1] for r in rows], 0, "cpu")
        inside = padded([[1] * len(r[0]) for r in rows], 0, "cpu")
        return self.model(input_ids=tokens, token_type_ids=types, attention_mask=inside).logits.float()


def side(name, args, task, seed):
    """The Answers of one side: ours, or theirs, whose name begins with the kind of attention."""
    model, tokenizer = hf.load(args.folder)
    if tokenizer is None:
        raise UserError(f"{args.folder}: there is no vocab.txt in it")
    answers = Answers(model, tokenizer, task, args.longest, seed)
    if not name.startswith("ours"):
        answers.model = Theirs(args.folder, name.split("-")[0], answers.model.head.out_features, answers.model)
    return answers


# ----------------------------------------------------------------------------------------------------------------
# Whole trainings


def train_sides(task, args, out, autocast):
    """{side: [one result of eval_superglue.fit per seed]}"""
    results = {name: [] for name in args.sides.split(",")}
    settings = {key: getattr(args, key) for key in ("lr", "batch", "longest", "epochs")}
    for file in (Path(args.folder, "model.safetensors"), Path(args.data, task, "train.jsonl")):
        settings[file.name] = checkpoint.sha256(file)
    for seed in range(args.seeds):
        for name in list(results)[:: -1 if seed % 2 else 1]:
            done = out / f"{task}-{seed}-{name}-{args.memory}.json"
            if not done.exists():
                order = mixed if name.endswith("mixed") else batches
                found = eval_superglue.fit(side(name, args, task, seed), args.data, args, autocast, order)
                kept = {"settings": settings, "epochs": found["epochs"], "seconds": found["seconds"]}
                done.with_suffix(".tmp").write_text(json.dumps(kept))
                done.with_suffix(".tmp").rename(done)
                print(
                    f"    {task}, seed {seed}, {name}: {kept['epochs'][-1]['score']:.3f}, {kept['seconds']:.0f} s",
                    flush=True,
                )
            found = json.loads(done.read_text())
            if found["settings"] != settings:
                raise UserError(f"{done}: was made with other settings or files; choose another --out")
            results[name].append(found)
    return results


def show_trainings(task, results):
    for name, runs in results.items():
        scores = [run["epochs"][-1]["score"] for run in runs]
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        each, took = " ".join(f"{score:.3f}" for score in scores), median([run["seconds"] for run in runs])
        print(
            f"  {task:6} {name:11} mean {statistics.mean(scores):.3f} ± {spread:.3f}  ({each}); {took:.0f} s a training"
        )
    first, *others = results
    for name in others:
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(results[first], results[name])]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} over the seeds"
        print(f"  {task:6} {first} is {median(ratios):.2f} times as fast as {name} ({spread})")


# ----------------------------------------------------------------------------------------------------------------
# What a step's time consists of


def stepper(name, args, train, task):
    """A training step of one candidate on a batch, given as indices."""
    answers = side("ours" if name.startswith("ours") else name, args, task, 0)
    prepared = eval_superglue.prepare_all(answers, train)
    if name == "ours":
        answers.model.keep_words([row for rows, _, _ in prepared for row in rows])
    answers.model.train()
    return trainer(answers.model, lambda part: answers.loss([prepared[i] for i in part]), args.dtype), prepared


def show_steps(task, args):
    """Times of a step on the same batches, and (`mixed`) on batches of mixed lengths, as a plain DataLoader makes them."""
    train = superglue.read_task(task, Path(args.data, task, "train.jsonl"))
    candidates, draw = {}, random.Random(0)
    for name in ("ours", "ours-all_words", "eager", "sdpa"):
        step, prepared = stepper(name, args, train, task)
        lengths = [sum(len(row[0]) for row in rows) for rows, _, _ in prepared]
        parts = iter(batches(lengths, args.batch, random.Random(0)) * (args.steps + 9))
        candidates[name] = lambda step=step, parts=parts: step(next(parts))
        if name == "eager":
            candidates["eager-mixed"] = lambda step=step: step(draw.sample(range(len(train)), args.batch))
    times = interleaved(candidates, args.steps)
    fastest = min(("eager", "sdpa"), key=lambda name: sum(times[name]))
    print(f"  {task}: seconds of {args.steps} steps of {args.batch}, and how many times ours, {args.memory} memory")
    for name, values in times.items():
        ratio, note = sum(values) / sum(times["ours"]), "  (their faster)" * (name == fastest)
        print(f"    {name:16} {sum(values):7.2f} s   {ratio:5.2f}{note}")


def main():
    from engine.options import Parser, count, length, natural, positive

    parser = Parser(prog="bench_finetune.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", help="a BERT of transformers")
    parser.add_argument("--data", required=True, help="the official folder, with CB/val.jsonl and so on")
    parser.add_argument("--tasks", default="CB,RTE", help="[CB,RTE]")
    parser.add_argument("--seeds", type=count, default=3, help="[3]")
    parser.add_argument(
        "--steps", type=natural, default=0, help="time so many steps of each candidate; trains nothing else"
    )
    parser.add_argument("--epochs", type=natural, default=0, help="0: by task, as eval_superglue.py")
    parser.add_argument("--lr", type=positive, default=3e-5, help="peak learning rate [3e-5]")
    parser.add_argument("--batch", type=count, default=16, help="examples a step [16]")
    parser.add_argument("--longest", type=length, default=256, help="tokens of a pair at most [256]")
    parser.add_argument(
        "--sides", default="ours,eager,eager-mixed", help="of ours, eager, sdpa, or with -mixed [%(default)s]"
    )
    parser.add_argument(
        "--memory", choices=["steady", "plain"], default="steady", help="train.py's malloc setting, or none"
    )
    parser.add_argument("--out", default="out/bench_finetune", help="folder of the results [out/bench_finetune]")
    args = parser.parse_args()
    if not importlib.util.find_spec("transformers"):
        return print("  transformers is not installed (pip install transformers); not run")
    try:
        compare(args)
    except ValueError as error:
        parser.error(str(error))


def compare(args):
    for name in args.sides.split(","):
        if name.removesuffix("-mixed") not in ("ours", "eager", "sdpa"):
            raise UserError(f"--sides: {name!r} is none of ours, eager, sdpa, each also with -mixed")
    for task in args.tasks.split(","):
        if task not in eval_superglue.EPOCHS or not Path(args.data, task, "train.jsonl").exists():
            raise UserError(f"--tasks: {task!r} is no task with a train.jsonl in {args.data}")
    if args.memory == "steady":
        steady_memory()
    args.device, dtype = choose_machine(argparse.Namespace(device="cpu", dtype="auto"))
    args.dtype = str(dtype).removeprefix("torch.")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    version = importlib.metadata.version("transformers")
    print(f"\n  transformers {version}, torch {torch.__version__}, {args.dtype}, {torch.get_num_threads()} threads\n")
    out = Path(args.out)
    for task in args.tasks.split(","):
        if args.steps:
            show_steps(task, args)
        else:
            out.mkdir(parents=True, exist_ok=True)
            show_trainings(task, train_sides(task, args, out, autocast))
        print()


if __name__ == "__main__":
    main()
