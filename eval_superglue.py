"""SuperGLUE: fine-tune a model on its tasks, ask it with a few examples and no training, or score answers that are there.

    python eval_superglue.py --finetune RUN --data SUPERGLUE --tasks RTE,CB --seeds 3
    python eval_superglue.py --shots 5 RUN --data SUPERGLUE                      UL2 only
    python eval_superglue.py --score PREDICTIONS --data SUPERGLUE                prints one JSON object
    python eval_superglue.py --baseline OUT --data SUPERGLUE                     the most frequent label everywhere, to score

RUN is a run folder of train.py, or one made by hf.py. What is finished is not done again: the same command continues.
A BERT gets a linear head over [CLS] where the labels are fixed, one score a candidate otherwise; a UL2 is trained text to text
and answers with the likeliest label. Every epoch's validation score is kept; the last epoch's counts, and of several seeds
their median. AX-b and AX-g are answered by the model trained on RTE.
Not here: the tasks' files and rules (superglue.py).

Sources: inputs of BERT as in the benchmark's baselines (arXiv 1905.00537), of UL2 as in T5 (arXiv 1910.10683, appendix D);
few-shot prompts as in EleutherAI's evaluation harness, candidates ranked by summed log-likelihood.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from denoisers import MODES
from tqdm import tqdm

from data import rng
from engine.errors import UserError
from engine.runs import load_run, provenance
from evals import superglue
from evals.finetune import Trainer, set_dropout
from evals.padding import batches, padded
from evals.superglue import MAIN, TASKS
from train import choose_machine, steady_memory

EPOCHS = {"CB": 10, "COPA": 10, "WSC": 10, "RTE": 5, "WiC": 5, "BoolQ": 4, "MultiRC": 2, "ReCoRD": 2}

# ----------------------------------------------------------------------------------------------------------------
# What a model reads


def pairs(task, f):
    """For a BERT, from the fields of an example: [(first text, second text)], one pair, or one per candidate."""
    match task:
        case "BoolQ":
            return [(f["passage"], f["question"])]
        case "COPA":
            asked = f"{f['premise']} What was the {'cause' if f['question'] == 'cause' else 'result'}?"
            return [(asked, f["choice1"]), (asked, f["choice2"])]
        case "MultiRC":
            return [(f["passage"], f"{f['question']} {f['answer']}")]
        case "ReCoRD":
            return [(f["passage"], f["query"].replace("@placeholder", entity)) for entity in f["entities"]]
        case "WiC":
            return [(f"{f['word']}: {f['sentence1']}", f["sentence2"])]
        case "WSC":
            return [(marked(f), f["span1_text"])]
        case _:
            return [(f["premise"], f["hypothesis"])]


def marked(f):
    """WSC's text with stars around the pronoun. Its place counts words between blanks."""
    words = f["text"].split()
    at = min(f["span2_index"], len(words) - 1)
    words[at] = f"*{words[at]}*"
    return " ".join(words)


def text_to_text(task, f):
    """For a UL2: (input, {answer: label}), T5's wording."""
    true = {"True": "true", "False": "false"}
    match task:
        case "BoolQ":
            return f"boolq passage: {f['passage']} question: {f['question']}", true
        case "COPA":
            choices = f"choice1: {f['choice1']} choice2: {f['choice2']}"
            return f"copa {choices} premise: {f['premise']} question: {f['question']}", {"choice1": 0, "choice2": 1}
        case "MultiRC":
            asked = f"multirc question: {f['question']} answer: {f['answer']} paragraph: {f['passage']}"
            return asked, {"True": 1, "False": 0}
        case "ReCoRD":
            asked = f"record query: {f['query']} entities: {', '.join(f['entities'])} passage: {f['passage']}"
            return asked, {entity: entity for entity in f["entities"]}
        case "WiC":
            return f"wic sentence1: {f['sentence1']} sentence2: {f['sentence2']} word: {f['word']}", true
        case "WSC":  # with the noun in question, where T5 has the model write it: so that it can be ranked
            return f"wsc: {marked(f)} noun: {f['span1_text']}", {"True": "True", "False": "False"}
        case _:
            name = "cb" if task == "CB" else "rte"
            return f"{name} hypothesis: {f['hypothesis']} premise: {f['premise']}", {
                label: label for label in TASKS[task].labels
            }


def prompt(task, f):
    """For few-shot questions: (prompt, {continuation: label})."""
    match task:
        case "BoolQ":
            return f"{f['passage']}\nQuestion: {f['question']}?\nAnswer:", {" no": "false", " yes": "true"}
        case "CB":
            choices = {" True": "entailment", " False": "contradiction", " Neither": "neutral"}
            return f"{f['premise']}\nQuestion: {f['hypothesis']}. True, False, or Neither?\nAnswer:", choices
        case "COPA":
            link = "because" if f["question"] == "cause" else "therefore"
            choices = [" " + choice[:1].lower() + choice[1:] for choice in (f["choice1"], f["choice2"])]
            return f"{f['premise'].rstrip('.')} {link}", {choices[0]: 0, choices[1]: 1}
        case "MultiRC":
            asked = f"{f['passage']}\nQuestion: {f['question']}\nAnswer: {f['answer']}\nIs the answer correct?"
            return asked, {" no": 0, " yes": 1}
        case "ReCoRD":
            text, *highlights = f["passage"].split("\n@highlight\n")
            asked = text + "\n" + "".join(f"  - {highlight.strip()}.\n" for highlight in highlights)
            return asked, {" " + f["query"].replace("@placeholder", entity): entity for entity in f["entities"]}
        case "WiC":
            asked = f"Is the word '{f['word']}' used in the same way in the two sentences above?"
            both = f"Sentence 1: {f['sentence1']}\nSentence 2: {f['sentence2']}"
            return f"{both}\nQuestion: {asked}\nAnswer:", {" no": "false", " yes": "true"}
        case "WSC":
            asked = f'In the passage above, does the pronoun "*{f["span2_text"]}*" refer to "{f["span1_text"]}"?'
            return f"Passage: {marked(f)}\nQuestion: {asked}\nAnswer:", {" no": "False", " yes": "True"}
        case _:
            choices = {" True": "entailment", " False": "not_entailment"}
            return f"{f['premise']}\nQuestion: {f['hypothesis']} True or False?\nAnswer:", choices


# ----------------------------------------------------------------------------------------------------------------
# Rows of tokens, answered in batches of about the same length


class Classifier(torch.nn.Module):
    """A BERT with a fresh head: `outputs` logits from the state of [CLS], or (outputs = 1) one score a candidate. The pooler is
    fresh too, unless the model was taken over with one."""

    def __init__(self, encoder, tokenizer, outputs, longest, seed):
        super().__init__()
        self.encoder, self.tokenizer, self.longest = encoder, tokenizer, min(longest, encoder.config.seq)
        self.pad, self.dropout = tokenizer.pad_id(), encoder.config.dropout
        C = encoder.config.width
        self.pool, self.head = torch.nn.Linear(C, C), torch.nn.Linear(C, outputs)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.pool, self.head):
            torch.nn.init.normal_(layer.weight, std=0.02, generator=generator)
            torch.nn.init.zeros_(layer.bias)
        if encoder.pooler:
            self.pool.load_state_dict(encoder.pooler)

    def row(self, first, second):
        """(tokens, types): [CLS] first [SEP] second [SEP]; where it is too long, the longer text loses its end."""
        a, b = self.tokenizer.encode(first), self.tokenizer.encode(second)
        while len(a) + len(b) > self.longest - 3:
            (a if len(a) >= len(b) else b).pop()
        tokens = [self.tokenizer.bos_id(), *a, self.tokenizer.eos_id(), *b, self.tokenizer.eos_id()]
        return tokens, [0] * (len(a) + 2) + [1] * (len(b) + 1)

    def keep_words(self, rows):
        """Leaves in the table of embeddings only the words of these rows, whose tokens it renumbers in place. The others would
        never be read, yet most of the table's gradient and update, which take as long as a layer or more, would be theirs."""
        words = sorted({token for tokens, _ in rows for token in tokens} | {self.pad})
        place = {word: i for i, word in enumerate(words)}
        for tokens, _ in rows:
            tokens[:] = map(place.__getitem__, tokens)
        self.pad = place[self.pad]
        self.encoder.tokens = torch.nn.Embedding.from_pretrained(
            self.encoder.tokens.weight.detach()[words], freeze=False
        )

    def forward(self, rows):
        """Logits (rows, outputs)."""
        device = self.head.weight.device
        tokens, types = padded([r[0] for r in rows], self.pad, device), padded([r[1] for r in rows], 0, device)
        inside = torch.arange(tokens.shape[1], device=device) < torch.tensor([[len(r[0])] for r in rows], device=device)
        mask = None if inside.all() else inside[:, None, None]
        state = self.encoder.encode(tokens, mask=mask, types=types)[:, 0]
        return self.head(F.dropout(torch.tanh(self.pool(state)), self.dropout, self.training)).float()


class Answers:
    """How a model of either kind is trained on a task and answers it: `prepare` makes an example into rows once, `loss` and
    `predict` take a list of prepared examples."""

    def __init__(self, model, tokenizer, task, longest, seed, shots=None, examples=()):
        self.model, self.tokenizer, self.task, self.seed = model, tokenizer, task, seed
        self.shots, self.examples = shots, examples
        self.bert = model.config.arch == "bert"
        if self.bert:
            outputs = 1 if task in ("COPA", "ReCoRD") else len(TASKS[task].labels)
            self.model = Classifier(model, tokenizer, outputs, longest, seed)

    def prepare(self, example, number=0):
        """(rows, answers they stand for, which of them are right)."""
        if self.bert:
            rows = [self.model.row(a, b) for a, b in pairs(self.task, example.fields)]
            answers = example.fields["entities"] if self.task == "ReCoRD" else TASKS[self.task].labels
        else:
            asked, choices = text_to_text(self.task, example.fields)
            if self.shots is not None:
                asked, choices = self.with_examples(example, number)
            rows, answers = [self.continuation(asked, choice) for choice in choices], list(choices.values())
        gold = example.gold if self.task == "ReCoRD" else [example.gold]
        return rows, answers, [i for i, answer in enumerate(answers) if answer in gold]

    def with_examples(self, example, number):
        """The prompt behind K solved ones of the training set, drawn by (seed, task, example)."""
        generator, parts = random.Random(f"{self.seed} {self.task} {number}"), []
        for other in generator.sample(self.examples, min(self.shots, len(self.examples))):
            asked, choices = prompt(self.task, other.fields)
            gold = other.gold if self.task == "ReCoRD" else [other.gold]
            parts += [asked + next((text for text, label in choices.items() if label in gold), "")]
        asked, choices = prompt(self.task, example.fields)
        return "\n\n".join([*parts, asked]), choices

    def continuation(self, asked, choice):
        """(tokens, prefix): [S] text <0>, which is read, then <0> and the answer and [SEP], as the S-denoiser has it. What is
        too long loses its beginning."""
        answer, words = [*self.tokenizer.encode(choice), self.tokenizer.eos_id()], self.tokenizer.vocab_size()
        answer = answer[-(self.model.config.seq - 3) :]
        mode, gap = words + MODES.index("[S]"), words + len(MODES)
        room = self.model.config.seq - len(answer) - 3
        text = self.tokenizer.encode(asked)[-room:] if room > 0 else []
        return [mode, *text, gap, gap, *answer], 2 + len(text)

    def likelihood(self, rows):
        """Log-likelihood (rows,) of each row's answer."""
        device = self.model.bias.device
        tokens = padded([tokens for tokens, _ in rows], self.tokenizer.eos_id(), device)
        prefix = torch.tensor([prefix for _, prefix in rows], device=device)
        states = self.model.states(tokens, prefix)
        place = torch.arange(1, tokens.shape[1], device=device)
        written = (place > prefix[:, None]) & (place < torch.tensor([[len(t)] for t, _ in rows], device=device))
        logits = self.model.predict(states[:, :-1][written])
        each = -F.cross_entropy(logits.float(), tokens[:, 1:][written], reduction="none")
        return torch.zeros(len(rows), device=device).index_add(0, written.nonzero()[:, 0], each)

    def scores(self, prepared):
        """Per example the scores of its answers, as a list of tensors."""
        rows = [row for example in prepared for row in example[0]]
        values = self.model(rows) if self.bert else self.likelihood(rows)
        if self.bert and values.shape[1] > 1:
            return list(values)
        return list(values.flatten().split([len(example[0]) for example in prepared]))

    def loss(self, prepared):
        if self.bert:
            each = [F.cross_entropy(s[None], s.new_tensor([right[0]], dtype=torch.long))
                    for s, (_, _, right) in zip(self.scores(prepared), prepared)]  # fmt: skip
            return torch.stack(each).mean()
        return -self.likelihood([rows[right[0]] for rows, _, right in prepared]).mean()

    @torch.no_grad()
    def predict(self, prepared):
        return [answers[int(s.argmax())] for s, (_, answers, _) in zip(self.scores(prepared), prepared)]


# ----------------------------------------------------------------------------------------------------------------
# Training and asking


def learnable(prepared):
    """Examples that have a right answer among their candidates (in ReCoRD some have none)."""
    return [example for example in prepared if example[2]]


def prepare_all(answers, examples):
    return [answers.prepare(example, i) for i, example in enumerate(examples)]


def ask(answers, examples, prepared, size, autocast):
    """{key: label} for all examples, of which `prepared` holds the rows."""
    found = {}
    answers.model.eval()
    lengths = [sum(len(row[0]) for row in example[0]) for example in prepared]
    for part in tqdm(batches(lengths, size), desc=f"asking {answers.task}", leave=False, disable=None):
        with autocast:
            labels = answers.predict([prepared[i] for i in part])
        found |= {examples[i].key: label for i, label in zip(part, labels)}
    return {example.key: found[example.key] for example in examples}


def finetune(run, task, data, seed, args, autocast):
    """One fine-tuning of a run's model; see `fit`."""
    model, tokenizer, _ = load_run(run, args.device)
    answers = Answers(model, tokenizer, task, args.longest, seed)
    set_dropout(answers.model, args.dropout)
    return fit(answers, data, args, autocast)


def to_ask(task, data):
    """{task: its validation examples}, and those of AX where the task is RTE."""
    files = {name: superglue.validation_file(data, name) for name in [task] + ["AX-b", "AX-g"] * (task == "RTE")}
    return {name: superglue.read_task(name, path) for name, path in files.items() if path}


def fit(answers, data, args, autocast, order=batches):
    """Train `answers` on its task: {"epochs": validation scores, "predictions": of the last, and of AX where the task is RTE,
    "seconds": of training, without reading and asking}. order: makes an epoch's batches, as `batches` does."""
    task, seed, seconds = answers.task, answers.seed, 0.0
    examples = learnable(prepare_all(answers, superglue.read_task(task, Path(data, task, "train.jsonl"))))
    asked = to_ask(task, data)
    prepared = {name: prepare_all(answers, own) for name, own in asked.items()}
    if answers.bert:
        answers.model.keep_words(
            [row for part in (examples, *prepared.values()) for rows, _, _ in part for row in rows]
        )
    answers.model.to(args.device)
    lengths = [sum(len(row[0]) for row in example[0]) for example in examples]
    epochs, scores = args.epochs or EPOCHS[task], []
    total = epochs * math.ceil(len(examples) / args.batch)
    trainer = Trainer(answers.model, args.lr, total, 0.06, autocast)
    bar = tqdm(total=total, desc=f"{task}, seed {seed}", unit=" steps", leave=False, disable=None)
    for epoch in range(epochs):
        began = time.perf_counter()
        answers.model.train()
        torch.manual_seed(int(rng(seed, "finetune dropout", epoch).integers(1 << 62)))
        for part in order(lengths, args.batch, random.Random(f"{seed} {task} {epoch}")):
            loss = trainer.step(answers.loss, [examples[i] for i in part])
            bar.update()
        loss.item()  # a GPU has done its work only now
        seconds += time.perf_counter() - began
        predictions = {task: ask(answers, asked[task], prepared[task], 4 * args.batch, autocast)}
        scores.append(superglue.score_task(task, asked[task], predictions[task]))
        bar.set_postfix_str(f"epoch {epoch + 1}: {scores[-1]['score']:.3f}")
    bar.close()
    for name in list(asked)[1:]:
        predictions[name] = ask(answers, asked[name], prepared[name], 4 * args.batch, autocast)
    return {"epochs": scores, "predictions": predictions, "seconds": seconds}


def few_shot(run, task, data, seed, args, autocast):
    """The same without training: the answers of the model as it is, after `shots` solved examples."""
    model, tokenizer, _ = load_run(run, args.device)
    if model.config.arch != "ul2":
        raise UserError(f"{run}: --shots asks a UL2; a BERT is fine-tuned (--finetune)")
    source = "RTE" if task.startswith("AX") else task  # the diagnostics have no training set
    train = superglue.read_task(source, Path(data, source, "train.jsonl"))
    val = superglue.read_task(task, superglue.validation_file(data, task))
    answers = Answers(model, tokenizer, task, 0, seed, args.shots, train)
    began = time.perf_counter()
    predictions = ask(answers, val, prepare_all(answers, val), args.batch, autocast)
    seconds = time.perf_counter() - began
    return {
        "epochs": [superglue.score_task(task, val, predictions)],
        "predictions": {task: predictions},
        "seconds": seconds,
    }


def summarize(out, tasks, results):
    """Prints the table, writes results.json and the submission files of each task's median seed."""
    table, main = {}, []
    for task in tasks:
        runs = results[task]
        last = [run["epochs"][-1] for run in runs]
        middle = statistics.median_low([scores["score"] for scores in last])
        pick = next(i for i, scores in enumerate(last) if scores["score"] == middle)
        values = [scores["score"] for scores in last]
        table[task] = {"median": statistics.median(values), "min": min(values), "max": max(values), "seeds": len(values),
                       "runs": [run["epochs"] for run in runs]}  # fmt: skip
        main += [table[task]["median"]] * (task in MAIN)
        for name, predictions in runs[pick]["predictions"].items():
            superglue.write_predictions(out, name, predictions)
        metrics = ", ".join(f"{name} {value:.3f}" for name, value in last[pick].items() if name != "score")
        print(
            f"  {task:8} {table[task]['median']:.3f}  ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds; {metrics})"
        )
    if main:
        name = "SuperGLUE score" if len(main) == len(MAIN) else f"{len(main)}-task mean"
        print(f"  {name}: {statistics.mean(main):.3f}")
    (out / "results.json").write_text(json.dumps(table, indent=1))


def main():
    from engine.options import Parser, count, length, natural, positive, share

    parser = Parser(prog="eval_superglue.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--data", required=True, help="the official folder, with BoolQ/val.jsonl and so on")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--score", metavar="FOLDER", help="folder or .zip of submission files; prints one JSON object")
    what.add_argument("--baseline", metavar="OUT", help="folder to write: the most frequent label everywhere")
    what.add_argument("--finetune", metavar="RUN", help="run folder of the model to fine-tune")
    what.add_argument(
        "--shots", nargs=2, metavar=("K", "RUN"), help="ask the UL2 of a run folder, after K solved examples"
    )
    parser.add_argument("--tasks", default="all", help=f"of {', '.join(TASKS)}; all: those whose files are there")
    parser.add_argument("--seeds", type=count, default=3, help="how many [3]")
    parser.add_argument("--epochs", type=natural, default=0, help="0: by task, 2 for large to 10 for small ones")
    parser.add_argument("--lr", type=positive, default=3e-5, help="peak learning rate [3e-5]")
    parser.add_argument("--batch", type=count, default=16, help="examples a step [16]")
    parser.add_argument("--longest", type=length, default=256, help="tokens of a pair at most [256]")
    parser.add_argument("--dropout", type=share, default=0.1, help="dropout rate while fine-tuning [0.1]")
    parser.add_argument("--out", default="", help="folder of the results [out/superglue/NAME OF THE RUN]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    try:
        if args.baseline:
            return superglue.baseline(args.data, args.baseline)
        if args.score:
            return show_score(superglue.score(args.score, args.data))
        evaluate(args, parser)
    except ValueError as error:
        parser.error(str(error))


def show_score(result):
    print(json.dumps(result, indent=1))
    left = [task for task in MAIN if task not in result["tasks"]]
    name = "SuperGLUE score" if not left else f"{result['of']}-task mean (without {', '.join(left)})"
    if result["of"]:
        print(f"{name}: {result['mean']:.4f}", file=sys.stderr)


def settings_of(args, run, task):
    """What a result depends on, beside the seed."""
    names = ("epochs", "lr", "batch", "longest", "dropout", "shots")
    files = [superglue.validation_file(args.data, name) for name in [task] + ["AX-b", "AX-g"] * (task == "RTE")]
    files = [Path(args.data, task, "train.jsonl"), *files]
    return provenance(run, args, names, {file.name: file for file in files if file and file.exists()})


def evaluate(args, parser):
    if args.shots:
        if not args.shots[0].isdigit():
            parser.error(f"--shots: must be a whole number, 0 or above, not {args.shots[0][:40]!r}")
        args.shots = [int(args.shots[0]), args.shots[1]]
    run, solve = (args.finetune, finetune) if args.finetune else (args.shots[1], few_shot)
    args.shots = args.shots and args.shots[0]
    there = [task for task in TASKS if superglue.validation_file(args.data, task)]
    if args.finetune:
        there = [task for task in there if not task.startswith("AX")]
    tasks = there if args.tasks == "all" else args.tasks.split(",")
    for task in tasks:
        if task not in there:
            raise UserError(f"--tasks: {task!r} is not one of {', '.join(there) or 'those in --data, which has none'}")
    name = Path(run).resolve().name + (f"-{args.shots}shot" if solve is few_shot else "")
    out = Path(args.out or f"out/superglue/{name}")
    steady_memory()
    device, dtype = choose_machine(argparse.Namespace(device=args.device, dtype="auto"))
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    results = {}
    for task in tasks:
        settings = settings_of(args, run, task)
        for seed in range(args.seeds):
            done = out / "runs" / f"{task}-{seed}.json"
            if done.exists():
                kept = json.loads(done.read_text())
                if kept["settings"] != settings:
                    raise UserError(f"{done}: was made with other settings or files; choose another --out")
                found = {"epochs": kept["epochs"], "predictions": {
                    t: {tuple(key): label for key, label in pairs} for t, pairs in kept["predictions"].items()}}  # fmt: skip
            else:
                found = solve(run, task, args.data, seed, args, autocast)
                scores = " ".join(f"{epoch['score']:.3f}" for epoch in found["epochs"])
                print(f"  {task}, seed {seed}: {scores}  ({found['seconds']:.0f} s)", flush=True)
                done.parent.mkdir(parents=True, exist_ok=True)
                kept = {t: [[list(key), label] for key, label in p.items()] for t, p in found["predictions"].items()}
                text = json.dumps({"settings": settings} | found | {"predictions": kept})
                done.with_suffix(".tmp").write_text(text)
                done.with_suffix(".tmp").rename(done)
            results.setdefault(task, []).append(found)
    print(f"\n  {run}: median over seeds (lowest to highest; the metrics of the median seed)\n")
    summarize(out, tasks, results)
    print(f"  submission files of the median seeds: {out}/\n")


if __name__ == "__main__":
    main()
