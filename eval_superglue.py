"""SuperGLUE: fine-tune a model on its tasks, ask it after a few examples without training, or score given answers.

    python eval_superglue.py --finetune RUN --data SUPERGLUE --tasks RTE,CB --seeds 3
    python eval_superglue.py --shots 5 RUN --data SUPERGLUE                      UL2 only
    python eval_superglue.py --score PREDICTIONS --data SUPERGLUE                prints one JSON object
    python eval_superglue.py --baseline OUT --data SUPERGLUE                     the most frequent label, to be scored

RUN is a run folder of train.py, or one made by tools/hf.py. What is finished is not done again: the same command
continues, and one with other --tasks adds to its --out, which holds one model. A BERT gets a linear head over [CLS]
where the labels are fixed, one score a candidate otherwise; a UL2 is trained text to text and answers with the
likeliest label. The validation score after the last epoch counts, and of several seeds their median. The median seed's
answers are submission files: OUT/val/ of the validation sets, OUT/test/ and OUT/submission.zip of the test sets, where
they are there. AX-b and AX-g, test sets with public labels, are in both; the model trained on RTE answers them.
Not here: the tasks' files and rules (evals/superglue.py), the steps of a fine-tuning (evals/finetune.py).

Sources: inputs of BERT are pairs after the benchmark's baselines (arXiv 1905.00537), all read from [CLS]: theirs also
read the marked words of WiC and WSC, ask BoolQ before the passage and COPA in other words, and judge each candidate of
ReCoRD alone. Inputs of UL2 as in T5 (arXiv 1910.10683, appendix D, and its code); few-shot prompts as in EleutherAI's
evaluation harness, choices ranked by summed log-likelihood. A comment says where these differ.
"""

import copy
import json
import random
import re
import statistics
import sys
import time
from array import array
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import MODES
from engine.errors import UserError, guard
from engine.log import write
from engine.options import command, count, length, natural, positive, share
from engine.runs import provenance
from evals import superglue
from evals.finetune import batches, finished, median_run, open_run, padded, run_seeds, set_dropout, train
from evals.superglue import DIAGNOSTICS, MAIN, TASKS

EPOCHS = {"CB": 10, "COPA": 10, "WSC": 10, "RTE": 5, "WiC": 5, "BoolQ": 4, "MultiRC": 2, "ReCoRD": 2}
WORDING = 3  # version of what models read and learn, below: scores with another one are not continued

# ----------------------------------------------------------------------------------------------------------------
# What a model reads: f are the fields of an example


def pairs(task, f):
    """For a BERT: [(first text, second text)], one pair, or one per candidate."""
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
            return [(starred(f), f["span1_text"])]
        case _:
            return [(f["premise"], f["hypothesis"])]


def starred(f):
    """WSC's text with stars around the pronoun, and a blank before punctuation that sticks to it, as T5 has it."""
    words, pronoun = f["text"].split(), re.compile(rf"(\W*)({re.escape(f['span2_text'])})(\W*)")
    # `span2_index` counts words. In validation example 42 it points at the word before the pronoun.
    near = sorted(range(len(words)), key=lambda i: abs(i - f["span2_index"]))
    at = next((i for i in near if pronoun.fullmatch(words[i])), near[0])
    before, word, after = pronoun.fullmatch(words[at]).groups() if pronoun.fullmatch(words[at]) else ("", words[at], "")
    words[at] = f"{before}*{word}* {after}".rstrip()
    return " ".join(words)


def noun(f):
    """WSC's noun with the case it has in the text: T5 and the harness read the data that was mended so (wsc.fixed)."""
    text, there = f["span1_text"], f["text"].split()[f["span1_index"]]
    if text in f["text"]:
        return text
    first = text[:1].lower() if there[0].islower() else text[:1].upper()
    return (first + text[1:]).rstrip(".").replace("\n", " ")


def text_to_text(task, f):
    """For a UL2: (input, {answer: label}) in T5's wording."""
    true = {"True": "true", "False": "false"}
    match task:
        case "BoolQ":
            return f"boolq passage: {f['passage']} question: {f['question']}", true
        case "COPA":
            choices = f"choice1: {f['choice1']} choice2: {f['choice2']}"
            return f"copa {choices} premise: {f['premise']} question: {f['question']}", {"choice1": 0, "choice2": 1}
        case "MultiRC":
            asked = f"multirc question: {f['question']} answer: {f['answer']} paragraph: {f['passage']}"
            return re.sub("</?b>", "", asked.replace("<br>", " ")), {"True": 1, "False": 0}
        case "ReCoRD":
            passage = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", f["passage"]).replace("\n@highlight\n", ". ")
            entities = sorted(f["entities"])
            asked = f"record query: {f['query']} entities: {', '.join(entities)} passage: {passage}"
            return asked, {entity: entity for entity in entities}
        case "WiC":
            return f"wic sentence1: {f['sentence1']} sentence2: {f['sentence2']} word: {f['word']}", true
        case "WSC":  # T5 has the model write the noun. Here the noun is asked for, so that answers can be ranked.
            return f"wsc: {starred(f)} noun: {noun(f)}", {"True": "True", "False": "False"}
        case _:
            name, labels = "cb" if task == "CB" else "rte", TASKS[task].labels
            return f"{name} hypothesis: {f['hypothesis']} premise: {f['premise']}", {label: label for label in labels}


def prompt(task, f):
    """For few-shot questions: (prompt, {continuation: label}) in the harness's wording. The diagnostics, which it does
    not have, are asked as RTE. Its newest versions put a second blank before the choices of COPA and ReCoRD."""
    match task:
        case "BoolQ":
            return f"{f['passage']}\nQuestion: {f['question']}?\nAnswer:", {" no": "false", " yes": "true"}
        case "CB":
            choices = {" True": "entailment", " False": "contradiction", " Neither": "neutral"}
            return f"{f['premise']}\nQuestion: {f['hypothesis']}. True, False, or Neither?\nAnswer:", choices
        case "COPA":
            link = "because" if f["question"] == "cause" else "therefore"
            choices = [" " + choice[:1].lower() + choice[1:] for choice in (f["choice1"], f["choice2"])]
            return f"{f['premise'].strip()[:-1]} {link}", {choices[0]: 0, choices[1]: 1}  # without its period
        case "MultiRC":
            # The harness counts the answer and "Is the answer correct?" to both choices. Here they are read, not
            # written. And its newest versions have the two choices the wrong way round.
            asked = f"{f['passage']}\nQuestion: {f['question']}\nAnswer: {f['answer']}\nIs the answer correct?"
            return asked, {" no": 0, " yes": 1}
        case "ReCoRD":
            text, *highlights = f["passage"].strip().split("\n@highlight\n")
            asked = f"{text}\n\n" + "".join(f"  - {highlight}.\n" for highlight in highlights)
            return asked, {"  - " + f["query"].replace("@placeholder", e): e for e in sorted(f["entities"])}
        case "WiC":
            word = f["sentence1"][f["start1"] : f["end1"]]  # as it stands there; `word` is the dictionary's form
            asked = f"Is the word '{word}' used in the same way in the two sentences above?"
            both = f"Sentence 1: {f['sentence1']}\nSentence 2: {f['sentence2']}"
            return f"{both}\nQuestion: {asked}\nAnswer:", {" no": "false", " yes": "true"}
        case "WSC":
            # Blanks go as in the harness: before punctuation, and around quotes. It spoils validation example 42 ("want
            # to *it*e it"), and keeps a blank at the end of a text.
            text = re.sub(r" (?=n't|[)'.,\"])|(?<=[(\"]) ", "", starred(f))
            asked = f'In the passage above, does the pronoun "*{f["span2_text"]}*" refer to "*{noun(f)}*"?'
            return f"Passage: {text}\nQuestion: {asked}\nAnswer:", {" no": "False", " yes": "True"}
        case _:
            choices = {" True": "entailment", " False": "not_entailment"}
            return f"{f['premise']}\nQuestion: {f['hypothesis']} True or False?\nAnswer:", choices


# ----------------------------------------------------------------------------------------------------------------
# Models that answer


class Prepared(NamedTuple):
    rows: list  # of tokens
    answers: list  # that can be given
    right: list  # indices of those that are right; none in a test set, and in some examples of ReCoRD


class Answering(torch.nn.Module):
    """A model that scores the answers an example can have. A subclass has read(example, number), which makes an example
    into (rows, answers), and forward(rows), which returns the scores of all their answers in order."""

    def prepare(self, examples):
        """Examples made into rows once, for every epoch."""
        ready = []
        for number, example in enumerate(examples):
            rows, answers = self.read(example, number)
            ready.append(Prepared(rows, answers, [i for i, answer in enumerate(answers) if answer in example.right]))
        return ready

    def scores(self, ready):
        """For each prepared example the scores of its answers, as a list of tensors."""
        rows = [row for e in ready for row in e.rows]
        size = len(rows) if torch.is_grad_enabled() else 128  # rows at a time: a query can have a hundred
        parts = [self(rows[at : at + size]).flatten() for at in range(0, len(rows), size)]
        return torch.cat(parts).split([len(e.answers) for e in ready])

    @torch.no_grad()
    def answer(self, examples, ready, size, autocast):
        """{key: label} for all examples, which `ready` holds prepared."""
        self.eval()
        labels, lengths = {}, [sum(len(row[0]) for row in example.rows) for example in ready]
        for group in tqdm(batches(lengths, size), desc=f"asking {self.task}", leave=False, disable=None):
            with autocast:
                scores = self.scores([ready[i] for i in group])
            labels |= {examples[i].key: ready[i].answers[int(s.argmax())] for i, s in zip(group, scores)}
        return {example.key: labels[example.key] for example in examples}


class Classifier(Answering):
    """A BERT with a fresh head on the state of [CLS]: a logit for each label, or one score for each candidate. The
    pooler is fresh too, unless the model was imported with one."""

    def __init__(self, encoder, tokenizer, task, longest, seed):
        super().__init__()
        self.encoder, self.tokenizer, self.task, self.dropout = encoder, tokenizer, task, encoder.config.dropout
        self.longest, self.pad = min(longest, encoder.config.seq), tokenizer.pad_id()
        C, outputs = encoder.config.width, 1 if task in ("COPA", "ReCoRD") else len(TASKS[task].labels)
        self.pool, self.head = torch.nn.Linear(C, C), torch.nn.Linear(C, outputs)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.pool, self.head):
            torch.nn.init.normal_(layer.weight, std=0.02, generator=generator)
            torch.nn.init.zeros_(layer.bias)
        if encoder.pooler:
            self.pool.load_state_dict(encoder.pooler)
        encoder.recompute = task == "ReCoRD"  # all candidates of a batch are read in one pass, some 200 rows

    def read(self, example, number):
        answers = example.fields["entities"] if self.task == "ReCoRD" else TASKS[self.task].labels
        return [self.row(a, b) for a, b in pairs(self.task, example.fields)], answers

    def row(self, first, second):
        """(tokens, types): [CLS] first [SEP] second [SEP]; where it is too long, the longer text loses its end."""
        a, b = self.tokenizer.encode(first), self.tokenizer.encode(second)
        while len(a) + len(b) > self.longest - 3:
            (a if len(a) >= len(b) else b).pop()
        tokens = [self.tokenizer.bos_id(), *a, self.tokenizer.eos_id(), *b, self.tokenizer.eos_id()]
        return array("i", tokens), bytes([0] * (len(a) + 2) + [1] * (len(b) + 1))  # ReCoRD has a million rows

    def keep_words(self, rows):
        """Keep only the words of these rows in the table of embeddings, and renumber their tokens in place. The others
        would never be read, yet their part of the gradient and the update takes as long as a layer or more."""
        words = sorted({token for tokens, _ in rows for token in tokens} | {self.pad})
        place = {word: i for i, word in enumerate(words)}
        for tokens, _ in rows:
            tokens[:] = array("i", map(place.__getitem__, tokens))
        self.pad = place[self.pad]
        kept = self.encoder.tokens.weight.detach()[words]
        self.encoder.tokens = torch.nn.Embedding.from_pretrained(kept, freeze=False)

    def forward(self, rows):
        """Logits (rows, outputs)."""
        device = self.head.weight.device
        tokens, types = padded([r[0] for r in rows], self.pad, device), padded([r[1] for r in rows], 0, device)
        lengths, mask = torch.tensor([len(row) for row, _ in rows]), None
        if lengths.min() < lengths.max():
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None])[:, None, None].to(device)
        state = self.encoder.encode(tokens, mask=mask, types=types)[:, 0]
        return self.head(F.dropout(torch.tanh(self.pool(state)), self.dropout, self.training)).float()

    def loss(self, ready):
        """Cross-entropy; the probabilities of several right answers (ReCoRD) add up."""
        scores = pad_sequence(self.scores(ready), batch_first=True, padding_value=-torch.inf)  # (examples, answers)
        right = [torch.tensor([i in e.right for i in range(len(e.answers))]) for e in ready]
        right = pad_sequence(right, batch_first=True).to(scores.device)
        return (scores.logsumexp(1) - scores.masked_fill(~right, -torch.inf).logsumexp(1)).mean()


class Ranker(Answering):
    """A UL2 that scores each answer by its log-likelihood. shots: how many of the solved `examples` it reads before a
    question, in the harness's wording; None: it reads the question alone, in T5's."""

    def __init__(self, model, tokenizer, task, seed, shots=None, examples=()):
        super().__init__()
        self.model, self.tokenizer, self.task, self.seed = model, tokenizer, task, seed
        self.shots, self.examples = shots, examples

    def read(self, example, number):
        with_examples = self.shots is not None
        asked, choices = self.few_shot(example, number) if with_examples else text_to_text(self.task, example.fields)
        return [self.row(asked, text) for text in choices], list(choices.values())

    def few_shot(self, example, number):
        """The prompt behind K solved ones of the training set, a function of (seed, task, number of the example)."""
        generator, parts = random.Random(f"{self.seed} {self.task} {number}"), []
        for other in generator.sample(self.examples, min(self.shots, len(self.examples))):
            asked, choices = prompt(self.task, other.fields)
            parts += [asked + next((text for text, label in choices.items() if label in other.right), "")]
        asked, choices = prompt(self.task, example.fields)
        return "\n\n".join([*parts, asked]), choices

    def row(self, asked, choice):
        """(tokens, prefix): [S] text <0>, which is read, then <0> and the answer and [SEP], as the S-denoiser has it.
        What is too long loses its beginning."""
        answer, words = [*self.tokenizer.encode(choice), self.tokenizer.eos_id()], self.tokenizer.vocab_size()
        answer = answer[-(self.model.config.seq - 3) :]
        mode, gap = words + MODES.index("[S]"), words + len(MODES)
        room = self.model.config.seq - len(answer) - 3
        text = self.tokenizer.encode(asked)[-room:] if room > 0 else []
        return array("i", [mode, *text, gap, gap, *answer]), 2 + len(text)

    def forward(self, rows):
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

    def loss(self, ready):
        """Mean negative log-likelihood of the right answers; a query with several counts once for each, as in T5."""
        return -self([example.rows[i] for example in ready for i in example.right]).mean()


# ----------------------------------------------------------------------------------------------------------------
# Training and asking. `asked` holds the examples by (task, split); with RTE also those of the diagnostics.


def finetune(trained, tokenizer, task, asked, seed, args, autocast):
    """Train a copy of a model on a task. Returns {"epochs": validation scores, "predictions": the last on all of
    `asked`}."""
    model = copy.deepcopy(trained)
    bert = model.config.arch == "bert"
    model = Classifier(model, tokenizer, task, args.longest, seed) if bert else Ranker(model, tokenizer, task, seed)
    set_dropout(model, args.dropout)
    ready = {place: model.prepare(examples) for place, examples in asked.items()}
    if bert:
        model.keep_words([row for examples in ready.values() for example in examples for row in example.rows])
    model.to(args.device)
    learned = [example for example in ready.pop((task, "train")) if example.right]
    lengths = [sum(len(row[0]) for row in example.rows) for example in learned]
    epochs, scores, predictions = args.epochs or EPOCHS[task], [], {}
    for _ in train(model, learned, lengths, epochs, task, seed, 0.06, args, autocast):
        for place in ready if len(scores) == epochs - 1 else [(task, "val")]:
            predictions[place] = model.answer(asked[place], ready[place], 4 * args.batch, autocast)
        scores.append(superglue.score_task(task, asked[task, "val"], predictions[task, "val"]))
    return {"epochs": scores, "predictions": predictions}


def few_shot(trained, tokenizer, task, asked, seed, args, autocast):
    """The same without training: the answers of a model as it is, after `shots` solved examples."""
    solved = next((examples for (_, split), examples in asked.items() if split == "train"), [])
    model, predictions = Ranker(trained, tokenizer, task, seed, args.shots, solved), {}
    for (name, split), examples in asked.items():
        if split != "train":
            predictions[name, split] = model.answer(examples, model.prepare(examples), args.batch, autocast)
    scores = superglue.score_task(task, asked[task, "val"], predictions[task, "val"])
    return {"epochs": [scores], "predictions": predictions}


# ----------------------------------------------------------------------------------------------------------------
# The command


def files_of(task, data, shots):
    """{(task, split): file} of all that is read for a task. shots: K of --shots, or None for --finetune."""
    source = "RTE" if task in DIAGNOSTICS else task  # the diagnostics have no training set
    places = [(source, "train")] * (shots != "0") + [(task, "val"), (task, "test")]
    places += [(name, "val") for name in DIAGNOSTICS if shots is None and task == "RTE"]
    files = {place: superglue.split_file(data, *place) for place in places}
    if files.get((source, "train"), True) is None:
        raise UserError(f"{data}: there is no {source}/train.jsonl")
    return {place: path for place, path in files.items() if path}


def evaluate(args):
    there = superglue.tasks_in(args.data, MAIN if args.finetune else TASKS)
    tasks = [*there] if args.tasks == "all" else args.tasks.split(",")
    for task in tasks:
        if task not in there:
            raise UserError(f"--tasks: {task!r} is not one of {', '.join(there)}")
    files = {task: files_of(task, args.data, args.shots and args.shots[0]) for task in tasks}
    run, model, tokenizer, autocast = open_run(args, finetuned=["bert", "ul2"])
    seeds = 1 if args.shots == 0 else args.seeds  # without examples nothing is drawn
    out = Path(args.out or f"out/superglue/{Path(run).resolve().name}{'' if args.finetune else f'-{args.shots}shot'}")
    flags, results = ("epochs", "lr", "batch", "longest", "dropout", "shots"), {}
    settings = provenance(run, args, flags, {}) | {"wording": WORDING}
    finished(out / "runs", TASKS, settings)  # raises UserError if there are some of another model
    for task in tasks:
        read = provenance(run, args, (), {"/".join(place): path for place, path in files[task].items()})

        def solve(seed, task=task):
            began = time.perf_counter()
            asked = {place: superglue.read_task(place[0], path) for place, path in files[task].items()}
            result = (finetune if args.finetune else few_shot)(model, tokenizer, task, asked, seed, args, autocast)
            scores = " ".join(f"{epoch['score']:.3f}" for epoch in result["epochs"])
            print(f"  {task}, seed {seed}: {scores}  ({time.perf_counter() - began:.0f} s)", flush=True)
            kept = [[*place, [[*pair] for pair in p.items()]] for place, p in result["predictions"].items()]
            return result | {"predictions": kept}  # JSON has no tuples as keys

        results[task] = run_seeds(out / "runs" / task, settings | read, seeds, solve)
    results = finished(out / "runs", TASKS, settings) | results
    print(f"\n  {run}: median over seeds (lowest to highest; the metrics of the median seed)\n")
    summarize(out, {task: results[task] for task in TASKS if task in results})


def summarize(out, results):
    """Print the table. Write results.json, and the submission files of each task's median seed."""
    table = {}
    for task, runs in results.items():
        values, median = [run["epochs"][-1]["score"] for run in runs], median_run(runs, "score")
        low, middle, high = min(values), statistics.median(values), max(values)
        epochs = [run["epochs"] for run in runs]
        table[task] = {"median": middle, "min": low, "max": high, "seeds": len(runs), "runs": epochs}
        metrics = ", ".join(f"{name} {v:.3f}" for name, v in median["epochs"][-1].items() if name != "score")
        print(f"  {task:8} {middle:.3f}  ({low:.3f} to {high:.3f}, {len(runs)} seed{'s' * (len(runs) > 1)}; {metrics})")
        for name, split, predictions in median["predictions"]:
            for folder in {split, "test"} if name in DIAGNOSTICS else {split}:
                superglue.write_predictions(out / folder, name, {tuple(key): label for key, label in predictions})
    write(out / "results.json", json.dumps(table, indent=1))
    main = [table[task]["median"] for task in table if task in MAIN]
    if main:
        name = "SuperGLUE score" if len(main) == len(MAIN) else f"{len(main)}-task mean"
        print(f"  {name}: {statistics.mean(main):.3f}")
    print(f"  answers of the median seeds to the validation sets, which are scored above: {out / 'val'}/")
    if (out / "test").exists():
        missing = superglue.zip_predictions(out / "test", out / "submission.zip")
        left = f"; the benchmark's server also wants {', '.join(missing)}" if missing else ""
        print(f"  answers of the median seeds to the test sets: {out / 'submission.zip'}{left}")
    print()


def show_score(result):
    print(json.dumps(result, indent=1))
    left = [task for task in MAIN if task not in result["tasks"]]
    name = "SuperGLUE score" if not left else f"{result['of']}-task mean (without {', '.join(left)})"
    if result["of"]:
        print(f"{name}: {result['mean']:.4f}", file=sys.stderr)


def main():
    parser = command("eval_superglue.py", __doc__)
    parser.usage = "python %(prog)s --data DATA WHAT [options], WHAT being one of\n"
    parser.usage += "  --score FOLDER | --baseline OUT | --finetune RUN | --shots K RUN"
    parser.add_argument("--data", required=True, help="the official folder, with BoolQ/val.jsonl and so on")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--score", metavar="FOLDER", help="folder or .zip of submission files; prints one JSON object")
    what.add_argument("--baseline", metavar="OUT", help="folder to write: the most frequent label everywhere")
    what.add_argument("--finetune", metavar="RUN", help="run folder of the model to fine-tune")
    what.add_argument("--shots", nargs=2, metavar=("K", "RUN"), help="ask the UL2 of a run folder after K examples")
    parser.add_argument("--tasks", default="all", help=f"of {', '.join(TASKS)}; all: those whose files are there")
    parser.add_argument("--seeds", type=count, default=3, help="number of seeds [3]")
    parser.add_argument("--epochs", type=natural, default=0, help="0: by task, 2 for large to 10 for small ones")
    parser.add_argument("--lr", type=positive, default=3e-5, help="peak learning rate [3e-5]")
    parser.add_argument("--batch", type=count, default=16, help="examples a step [16]")
    parser.add_argument("--longest", type=length, default=256, help="tokens of a pair at most [256]")
    parser.add_argument("--dropout", type=share, default=0.1, help="dropout rate while fine-tuning [0.1]")
    parser.add_argument("--out", default="", help="folder of the results [out/superglue/NAME OF THE RUN]")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args()
    if args.baseline:
        superglue.baseline(args.data, args.baseline)
    elif args.score:
        show_score(superglue.score(args.score, args.data))
    else:
        evaluate(args)


if __name__ == "__main__":
    guard("eval_superglue.py", main)
