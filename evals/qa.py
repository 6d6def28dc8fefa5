"""Question answering: ask a UL2 with a few examples, train a BERT to mark the answer, or score answers that are there.

    python -m evals.qa --task nq_open --shots 5 RUN --data NQ-open.dev.jsonl --train NQ-open.train.jsonl     UL2 only
    python -m evals.qa --task squad_v2 --finetune RUN --train train-v2.0.json --data dev-v2.0.json           BERT only
    python -m evals.qa --task squad_v2 --score predictions.json --data dev-v2.0.json             prints one JSON object

RUN is a run folder of train.py, or one made by tools/hf.py. Into --out go predictions.json, which --score takes, and
results.json. What is finished is not done again: the same command continues. With several seeds the predictions are
those of the median seed.

A UL2 reads [S], the examples, the question and <0>, as its S-denoiser does, and writes the likeliest token each time,
until the end of a line, [SEP] or --tokens. The examples are a function of (seed, task, question); they come from
--train, or from --data without the question itself. What does not fit into the model's sequence goes: first examples,
then the beginning of the question's own text. How much that was is printed.

A BERT gets two scores a token, for where an answer begins and ends, and [CLS] stands for no answer. It reads a long
context in windows that overlap. The best span over all of them competes with the lowest score of no answer, at a
difference of 0, which is not tuned. The scores of every epoch are kept; those after the last count.
Not here: the tasks' files and rules (evals/qa_files.py), the windows and the head (evals/spans.py).

Sources: BERT on SQuAD (arXiv 1810.04805, section 4.3; its settings: two epochs, 5e-5, 48 at a time); SQuAD v2 (arXiv
1806.03822). All tasks are asked as EleutherAI's evaluation harness asks WebQuestions, with SQuAD's "unanswerable" where
there is no answer; the harness itself asks NQ-open with "Q:" and "A:" below a line of instruction, and SQuAD with its
title, adds a question mark in TriviaQA and NQ-open, ranks given answers in WebQuestions, and stops at commas and
periods too.
"""

import copy
import itertools
import json
import math
import os
import random
import statistics
import sys
from pathlib import Path

from tqdm import tqdm

from data import MODES
from engine.errors import UserError, guard
from engine.log import read_jsonl, write
from engine.options import command, count, natural, number, positive, share
from engine.runs import provenance
from evals import metrics
from evals import qa_files as qa
from evals.finetune import batches, median_run, open_run, run_seeds, set_dropout, train
from evals.spans import Spans, windows
from text.prepare import CLS, MASK, PAD, SEP, UNK

NOTHING = "unanswerable"

# ----------------------------------------------------------------------------------------------------------------
# A UL2 is asked


def question_text(question):
    context = f"{question.context}\n" if question.context else ""
    return f"{context}Question: {question.question}\nAnswer:"


def example_text(question):
    answer = question.answers[0] if question.answers else NOTHING
    return f"{question_text(question)} {question.shown or answer}\n\n"


def examples(task, question, pool, shots, seed):
    """Up to `shots` questions of a pool, a function of (seed, task, question); never the asked one."""
    drawn = random.Random(f"{seed} {task} {question.id}").sample(pool, min(shots + 1, len(pool)))
    return [other for other in drawn if other.question != question.question][:shots]


def prompt(tokenizer, question, shown, room):
    """(at most `room` tokens, how many of the examples `shown` fit, whether the question's own text was cut)."""
    parts, last = [tokenizer.encode(example_text(other)) for other in shown], tokenizer.encode(question_text(question))
    while parts and sum(map(len, parts)) + len(last) > room:
        parts.pop(0)
    return [i for part in [*parts, last] for i in part][-room:], len(parts), len(last) > room


def equal_length(rows, size):
    """Lists of up to `size` indices of rows of one length: nothing is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    groups = [list(group) for _, group in itertools.groupby(order, key=lambda i: len(rows[i]))]
    return [group[at : at + size] for group in groups for at in range(0, len(group), size)]


def room_of(model, args):
    """Tokens that examples and question may have, beside [S], <0> twice and the answer."""
    room = model.config.seq - args.tokens - 3
    if room < 8:
        raise UserError(f"--tokens {args.tokens}: leaves no room for a question in the {model.config.seq} of the model")
    return room


def kept_lines(path):
    """{question id: prediction} of a file that a stopped run wrote. Takes off half a line at its end, from a kill."""
    if not path.exists():
        return {}
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return {line["id"]: line["prediction"] for line in read_jsonl(path)}


def few_shot(model, tokenizer, questions, pool, seed, args, out, autocast):
    """{"epochs": [scores], "predictions"} of a UL2 as it is. Answers are written to out/SEED.jsonl as they come."""
    V, room = tokenizer.vocab_size(), room_of(model, args)
    pool = list({(other.question, other.context): other for other in pool}.values())  # TriviaQA has one per document
    prompts = [prompt(tokenizer, q, examples(args.task, q, pool, args.shots, seed), room) for q in questions]
    gap = V + len(MODES)  # <0>
    rows = [[V + MODES.index("[S]"), *tokens, gap] for tokens, _, _ in prompts]
    stop, banned = {SEP, *tokenizer.encode("\n")}, [PAD, UNK, CLS, MASK, *range(V, model.config.vocab)]
    path = out / f"{seed}.jsonl"
    answers = kept_lines(path)
    model.eval()
    with open(path, "a", encoding="utf-8") as file:
        for group in tqdm(equal_length(rows, args.batch), desc=f"{args.task}, seed {seed}", disable=None):
            if all(questions[i].id in answers for i in group):
                continue  # else all of them: a row's last digits may depend on the others of its batch
            with autocast:
                written = model.generate([rows[i] for i in group], gap, stop, banned, args.tokens)
            texts = [tokenizer.decode(tokens).strip() for tokens in written]
            new = {questions[i].id: "" if metrics.normalise(t) == NOTHING else t for i, t in zip(group, texts)}
            answers |= new
            file.write("".join(json.dumps({"id": id, "prediction": text}) + "\n" for id, text in new.items()))
            file.flush()
    predictions = {question.id: answers[question.id] for question in questions}
    scores = qa.score(args.task, questions, predictions)
    scores |= {"shown": statistics.mean(shown for _, shown, _ in prompts), "cut": sum(cut for _, _, cut in prompts)}
    return {"epochs": [scores], "predictions": predictions}


# ----------------------------------------------------------------------------------------------------------------
# A BERT marks the answer


def mark(marker, questions, asked, args, autocast):
    """{question id: answer} from the windows `asked` of all questions."""
    marker.eval()
    span, nothing = [(-math.inf, "")] * len(questions), [math.inf] * len(questions)
    groups = batches([len(w.tokens) for w in asked], 4 * args.batch)
    for group in tqdm(groups, desc="asking", leave=False, disable=None):
        with autocast:
            best = marker.best([asked[i] for i in group], args.longest_answer)
        for w, (value, first, last, null) in zip((asked[i] for i in group), best):
            nothing[w.question] = min(nothing[w.question], null)
            if value > span[w.question][0]:
                begin, end = w.places[first - w.first][0], w.places[last - w.first][1]
                span[w.question] = (value, questions[w.question].context[begin:end].strip())
    may_decline = args.task == "squad_v2"
    return {
        q.id: "" if may_decline and null > value else text for q, (value, text), null in zip(questions, span, nothing)
    }


def finetune(model, tokenizer, questions, learned, seed, args, autocast):
    """{"epochs": scores, "predictions": of the last} of one fine-tuning on the windows `learned`. Does not change the
    model."""
    encoder = copy.deepcopy(model)
    set_dropout(encoder, args.dropout)
    marker = Spans(encoder, tokenizer, seed).to(args.device)
    asked, lengths = windows_of(model, tokenizer, questions, args), [len(w.tokens) for w in learned]
    scores = []
    for step in train(marker, learned, lengths, args.epochs, args.task, seed, 0.1, args, autocast):
        predictions = mark(marker, questions, asked, args, autocast)
        scores.append({**qa.score(args.task, questions, predictions), "step": step})
        tqdm.write(f"  seed {seed}, epoch {len(scores)}, step {step}: {in_words(scores[-1])}", file=sys.stderr)
    return {"epochs": scores, "predictions": predictions}


def windows_of(model, tokenizer, questions, args, source=None):
    return windows(tokenizer, questions, min(args.longest, model.config.seq), args.stride, source)


# ----------------------------------------------------------------------------------------------------------------
# The command


def in_words(scores):
    parts = [f"EM {scores['em']:.3f}  F1 {scores['f1']:.3f}  of {scores['of']}"]
    for name in ("HasAns", "NoAns"):
        if scores.get(name, {}).get("of"):
            parts.append(f"{name} EM {scores[name]['em']:.3f}  F1 {scores[name]['f1']:.3f}  of {scores[name]['of']}")
    return "; ".join(parts)


def some(questions, limit):
    """`limit` questions of a file, in its order, always the same; a smaller limit's are among a larger one's."""
    if not limit or limit >= len(questions):
        return questions
    return [questions[i] for i in sorted(random.Random("limit").sample(range(len(questions)), len(questions))[:limit])]


def evaluate(args):
    if args.finetune and args.task not in ("squad_v2", "tydiqa_goldp"):
        raise UserError(f"--task {args.task}: has no context in which to mark an answer (--finetune)")
    if args.finetune and not args.train:
        raise UserError("--finetune needs --train, the file to learn from")
    args.batch = args.batch or (48 if args.finetune else 16)
    everything = qa.read_task(args.task, args.data)
    questions, others = some(everything, args.limit), qa.read_task(args.task, args.train) if args.train else everything
    run, model, tokenizer, autocast = open_run(args, finetuned=["bert"])
    if args.finetune:
        learned = windows_of(model, tokenizer, others, args, args.train)
        names = ["task", "limit", "epochs", "lr", "batch", "longest", "longest_answer", "stride", "dropout"]
    else:
        room_of(model, args)
        names = ["task", "limit", "shots", "tokens", "batch"]
    files = {name: getattr(args, name) for name in ("data", "train") if getattr(args, name)}
    settings = provenance(run, args, names, files)
    kind = "" if args.finetune else f"-{args.shots}shot"
    out = Path(args.out or f"out/qa/{Path(run).resolve().name}-{args.task}{kind}")

    def solve(seed):
        if args.finetune:
            return finetune(model, tokenizer, questions, learned, seed, args, autocast)
        return few_shot(model, tokenizer, questions, others, seed, args, out / "runs", autocast)

    summarize(args, questions, run_seeds(out / "runs", settings, args.seeds, solve), out)


def summarize(args, questions, results, out):
    """Print the median seed's last scores and those of answering nothing. Write predictions.json and results.json."""
    median = median_run(results, "f1")
    scores = median["epochs"][-1]
    print(f"  {args.task}: {in_words(scores)}")
    if args.seeds > 1:
        each = ", ".join(f"{result['epochs'][-1]['f1']:.3f}" for result in results)
        print(f"  seed by seed, F1: {each}; above is the median seed")
    if args.shots is not None:
        source = "--train" if args.train else "--data, the asked question left out"
        print(f"  {scores['shown']:.2f} of {args.shots} examples (from {source}) fitted before a question in the mean; "
              f"{scores['cut']} of {len(questions)} questions lost the beginning of their own text")  # fmt: skip
    if args.task == "squad_v2":
        nothing = qa.score(args.task, questions, dict.fromkeys((q.id for q in questions), ""))
        print(f"  no answer everywhere: {in_words(nothing)}")
    write(out / "predictions.json", json.dumps(median["predictions"], indent=1))
    runs = [result["epochs"] for result in results]
    write(out / "results.json", json.dumps({"task": args.task, "median": scores, "runs": runs}, indent=1))
    print(f"  {out / 'predictions.json'}")


def show_score(args):
    questions, predictions = some(qa.read_task(args.task, args.data), args.limit), qa.read_predictions(args.score)
    missing = [question.id for question in questions if question.id not in predictions]
    if missing:
        raise UserError(f"{args.score}: no prediction for {missing[0]!r} ({len(missing)} missing)")
    unknown = set(predictions) - {question.id for question in questions}
    if unknown:
        print(f"warning: {len(unknown)} predictions are for other questions and were ignored", file=sys.stderr)
    print(json.dumps({args.task: qa.score(args.task, questions, predictions)}, indent=1))


def main():
    parser = command("evals.qa", __doc__)
    parser.add_argument("--task", required=True, choices=qa.READERS)
    parser.add_argument("--data", required=True, help="the benchmark's own file, to be answered")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--score", metavar="FILE", help="predictions; prints one JSON object")
    what.add_argument("--shots", nargs=2, metavar=("K", "RUN"), help="ask the UL2 of a run folder after K examples")
    what.add_argument("--finetune", metavar="RUN", help="train the BERT of a run folder to mark answers")
    parser.add_argument("--train", default="", help="file of the same layout: examples to show, or to learn from")
    parser.add_argument("--limit", type=natural, default=0, help="so many questions of --data, always the same; 0: all")
    parser.add_argument("--seeds", type=count, default=1, help="number of seeds [1]")
    batch = "questions, or windows, at a time; 0: 16 with --shots, 48 with --finetune"
    parser.add_argument("--batch", type=natural, default=0, help=batch)
    parser.add_argument("--tokens", type=count, default=16, help="--shots: tokens of an answer at most [16]")
    parser.add_argument("--epochs", type=count, default=2, help="--finetune: passes over --train [2]")
    parser.add_argument("--lr", type=positive, default=5e-5, help="--finetune: peak learning rate [5e-5]")
    length = number(int, "a whole number, 32 or above", lambda x: x >= 32)
    parser.add_argument("--longest", type=length, default=384, help="--finetune: tokens of a window at most [384]")
    parser.add_argument("--stride", type=count, default=128, help="--finetune: from window to window [128]")
    parser.add_argument("--longest_answer", type=count, default=30, help="--finetune: tokens of an answer at most [30]")
    parser.add_argument("--dropout", type=share, default=0.1, help="--finetune: dropout rate [0.1]")
    parser.add_argument("--out", default="", help="folder of the results [out/qa/NAME OF THE RUN-TASK]")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    args = parser.parse_args()
    show_score(args) if args.score else evaluate(args)


if __name__ == "__main__":
    guard("evals.qa", main)
