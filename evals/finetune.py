"""What both evaluations share: fine-tuning, batches of texts of different lengths, and the runner of seeds.

Not here: the tasks, and what a model reads of them (eval_superglue.py, evals/qa.py). Batches for pretraining have one
length (data.py).
"""

import json
import math
import random
import statistics

import torch
from tqdm import tqdm

from engine import checkpoint, machine
from engine.errors import UserError
from engine.log import write
from engine.runs import load_run
from text.corpus import rng
from train import parameter_groups

# ----------------------------------------------------------------------------------------------------------------
# Steps


def set_dropout(model, rate):
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = rate


class Trainer:
    """Takes the `total` steps of one fine-tuning: AdamW, gradients clipped at norm 1.

    warmup: share of the steps in which the learning rate rises to `lr`; then it falls linearly towards 0.
    """

    def __init__(self, model, lr, total, warmup, autocast):
        self.model, self.lr, self.total, self.warmup, self.autocast, self.done = model, lr, total, warmup, autocast, 0
        self.optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr, fused=True)

    def step(self, loss_of, batch):
        """One update. Returns the loss of the batch."""
        self.done += 1
        rising = self.done / (self.warmup * self.total + 1)
        falling = (self.total + 1 - self.done) / ((1 - self.warmup) * self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(rising, falling, 1.0)
        with self.autocast:
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


# ----------------------------------------------------------------------------------------------------------------
# Batches


def batches(lengths, size, generator=None):
    """Lists of up to `size` indices of texts of similar length.

    generator: shuffles; texts are then sorted in pools of 1 to 32 batches, so that a text meets others each epoch.
    None: in the order of length.
    """
    order = list(range(len(lengths)))
    if generator:
        generator.shuffle(order)
        pool = size * max(1, min(32, len(order) // (4 * size)))
        order = [i for at in range(0, len(order), pool) for i in sorted(order[at : at + pool], key=lengths.__getitem__)]
    else:
        order.sort(key=lengths.__getitem__)
    groups = [order[at : at + size] for at in range(0, len(order), size)]
    if generator:
        generator.shuffle(groups)
    return groups


def padded(rows, fill, device):
    """Tensor (rows, longest) of sequences of token ids, filled up at their ends."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=device)


def train(model, examples, lengths, epochs, task, seed, warmup, args, autocast):
    """Train a model, which has loss(list of examples), for some epochs. lengths: of the examples. The order and the
    dropout are a function of (seed, task, epoch). Yields the number of steps taken, after each epoch."""
    total = epochs * math.ceil(len(examples) / args.batch)
    trainer = Trainer(model, args.lr, total, warmup, autocast)
    with tqdm(total=total, desc=f"{task}, seed {seed}", unit=" steps", leave=False, disable=None) as bar:
        for epoch in range(epochs):
            model.train()
            torch.manual_seed(int(rng(seed, "finetune dropout", epoch).integers(1 << 62)))
            for group in batches(lengths, args.batch, random.Random(f"{seed} {task} {epoch}")):
                trainer.step(model.loss, [examples[i] for i in group])
                bar.update()
            yield trainer.done


# ----------------------------------------------------------------------------------------------------------------
# Runs


def open_run(args, finetuned):
    """(run folder, model, tokenizer, autocast) for --finetune RUN or --shots K RUN. Leaves K, or None, in args.shots,
    and the device in args.device. Raises UserError unless the model is a UL2 (--shots) or of `finetuned`
    (--finetune)."""
    run = args.finetune
    if args.shots:
        shots, run = args.shots
        if not shots.isdecimal():
            raise UserError(f"--shots: must be a whole number, 0 or above, not {shots[:40]!r}")
        args.shots = int(shots)
    args.device, dtype = machine.choose(args.device)
    model, tokenizer, _ = load_run(run, args.device if args.finetune is None else "cpu")  # its copies go to the device
    if model.config.arch not in (finetuned if args.shots is None else ["ul2"]):
        kinds = f"--shots asks a UL2, --finetune trains a {' or a '.join(finetuned).upper()}"
        raise UserError(f"{run}: {kinds}; this is a {model.config.arch.upper()}")
    machine.steady_memory()
    return run, model, tokenizer, machine.autocast(args.device, dtype)


def run_seeds(folder, settings, count, solve):
    """[solve(seed) for `count` seeds]. Each result is kept in FOLDER/SEED.json, and read from there the next time.

    settings: a JSON object, what the results depend on beside the seed. Raises UserError if the folder holds results of
    other settings, or another process works in it.
    """
    with checkpoint.lock(folder):
        known = folder / "settings.json"
        begun = any(file.stat().st_size for file in folder.glob("[0-9]*.json*"))  # a result, or answers in SEED.jsonl
        if begun and known.exists() and json.loads(known.read_text()) != settings:
            raise UserError(f"{folder}: was made with other settings or files; choose another --out")
        write(known, json.dumps(settings, indent=1))
        results = []
        for seed in range(count):
            kept = folder / f"{seed}.json"
            if not kept.exists():
                write(kept, json.dumps(solve(seed)))
            results.append(json.loads(kept.read_text()))
    return results


def finished(folder, tasks, settings):
    """{task: its results, seed by seed} of the tasks for which run_seeds has kept some in FOLDER/TASK. Raises UserError
    if one was made with other `settings`: a score and a submission are of one model."""
    results = {}
    for task in tasks:
        seeds = sorted(int(path.stem) for path in (folder / task).glob("*.json") if path.stem.isdecimal())
        if seeds:
            results[task] = [json.loads((folder / task / f"{seed}.json").read_text()) for seed in seeds]
            before = json.loads((folder / task / "settings.json").read_text())
            for name in [name for name, value in settings.items() if before.get(name) != value]:
                made = f"{task} was made with {name} {before.get(name)}, not {settings[name]}"
                raise UserError(f"--out {folder.parent}: {made}; choose another --out")
    return results


def median_run(results, metric):
    """The result whose `metric` after the last epoch is the median; of an even number, the lower one in the middle."""
    values = [result["epochs"][-1][metric] for result in results]
    return results[values.index(statistics.median_low(values))]
