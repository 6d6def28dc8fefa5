"""Question answering: ask a UL2 with a few examples, train a BERT to mark the answer, or score answers that are there.

    python eval_qa.py --task nq_open --shots 5 RUN --data NQ-open.dev.jsonl --train NQ-open.train.jsonl        UL2 only
    python eval_qa.py --task squad_v2 --finetune RUN --train train-v2.0.json --data dev-v2.0.json              BERT only
    python eval_qa.py --task squad_v2 --score predictions.json --data dev-v2.0.json                 prints one JSON object

RUN is a run folder of train.py, or one made by hf.py. Into --out go predictions.json, which --score takes, and results.json.
What is finished is not done again: the same command continues. With several seeds the predictions are the median seed's.

A UL2 reads [S], the examples, the question and <0>, as its S-denoiser has it, and writes the likeliest token each time, until
the end of a line, [SEP] or --tokens. Examples are drawn by (seed, task, question) from --train; without it from --data, the
asked question left out. What does not fit into the model's sequence goes: first whole examples, then the beginning of the
question's own text. How much that was is printed.

A BERT gets two scores a token, for where an answer begins and ends, and [CLS] stands for no answer. A long context is read in
windows that overlap; the best span over all of them competes with no answer at its worst, at a difference of 0, which is not
tuned. The scores of every epoch are kept; the last epoch's count.
Not here: the tasks' files and rules (qa.py).

Sources: BERT on SQuAD (arXiv 1810.04805, section 4.3; its settings: two epochs, 5e-5, 48 at a time); SQuAD v2 (arXiv
1806.03822); prompts after EleutherAI's evaluation harness, which has "unanswerable" written where there is no answer.
"""

import argparse
import copy
import json
import math
import os
import random
import statistics
import sys
from pathlib import Path

import torch
from denoisers import MODES
from tqdm import tqdm

from data import rng
from engine import checkpoint
from engine.errors import UserError
from engine.runs import load_run, provenance
from evals import metrics
from evals import qa_files as qa
from evals.finetune import Trainer, set_dropout
from evals.padding import batches
from evals.spans import Spans, windows
from text import prepare
from train import choose_machine, steady_memory

NOTHING = "unanswerable"

# ----------------------------------------------------------------------------------------------------------------
# A UL2 is asked


def asked(question):
    context = f"{question.context}\n" if question.context else ""
    return f"{context}Question: {question.question}\nAnswer:"


def solved(question):
    return f"{asked(question)} {question.answers[0] if question.answers else NOTHING}\n\n"


def examples(task, question, pool, shots, seed):
    """Up to `shots` questions of a pool, a function of (seed, task, question); never the asked one."""
    drawn = random.Random(f"{seed} {task} {question.id}").sample(pool, min(shots + 1, len(pool)))
    return [other for other in drawn if other.question != question.question][:shots]


def prompt(tokenizer, question, shown, room):
    """(tokens, how many of the examples `shown` fit, whether the question's own text was cut): at most `room` tokens."""
    parts, own = [tokenizer.encode(solved(other)) for other in shown], tokenizer.encode(asked(question))
    while parts and sum(map(len, parts)) + len(own) > room:
        parts.pop(0)
    return [i for part in [*parts, own] for i in part][-room:], len(parts), len(own) > room


@torch.no_grad()
def write(model, prefixes, first, stop, banned, limit):
    """What follows each of `prefixes`, lists (B) of one length, and the token `first`: lists of token ids, the likeliest each
    time, until one of `stop` or `limit` of them. Keys and values of what was read are kept: a token costs one position."""
    device = model.bias.device
    new, past, written = torch.full((len(prefixes), 1), first, device=device), {}, []
    ends, done = (
        torch.tensor(sorted(stop), device=device),
        torch.zeros(len(prefixes), 1, dtype=torch.bool, device=device),
    )
    model.encode(torch.tensor(prefixes, device=device), past=past)  # a prefix is read in both directions: no mask
    while len(written) < limit and not done.all():
        logits = model.predict(model.encode(new, past=past)[:, -1])
        logits[:, banned] = -torch.inf
        new = logits.argmax(-1, keepdim=True)
        written.append(new)
        done |= torch.isin(new, ends)
    rows = torch.cat(written, 1).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stop), limit)] for row in rows]


def equal_length(rows, size):
    """Indices in lists of up to `size`, of rows of one length: nothing is padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found = []
    for i in order:
        if not found or len(found[-1]) == size or len(rows[found[-1][0]]) != len(rows[i]):
            found.append([])
        found[-1].append(i)
    return found


def room_of(model, args):
    """Tokens that examples and question may have, beside [S], <0> twice and the answer."""
    room = model.config.seq - args.tokens - 3
    if room < 8:
        raise UserError(
            f"--tokens {args.tokens}: leaves no room for a question in the model's {model.config.seq} (--seq)"
        )
    return room


def kept_lines(path):
    """{question id: prediction} of a file that a stopped run wrote. Half a line at its end, from a kill, is taken off."""
    if not path.exists():
        return {}
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return {line["id"]: line["prediction"] for _, line in qa.read_lines(path)}


def few_shot(model, tokenizer, questions, pool, seed, args, out, autocast):
    """{"epochs": [scores], "predictions"} of a UL2 as it is. Answers are written down as they come."""
    V, room = tokenizer.vocab_size(), room_of(model, args)
    prompts = [prompt(tokenizer, q, examples(args.task, q, pool, args.shots, seed), room) for q in questions]
    rows = [[V + MODES.index("[S]"), *tokens, V + len(MODES)] for tokens, _, _ in prompts]
    banned = [prepare.PAD, prepare.UNK, prepare.CLS, prepare.MASK, *range(V, model.config.vocab)]
    stop, path = {prepare.SEP, *tokenizer.encode("\n")}, out / "runs" / f"{seed}.jsonl"
    found = kept_lines(path)
    model.eval()
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=len(rows), desc=f"{args.task}, seed {seed}", disable=None) as bar,
    ):
        for part in equal_length(rows, args.batch):
            bar.update(len(part))
            if all(questions[i].id in found for i in part):
                continue  # else all of them: a row's last digits may depend on the others of its batch
            with autocast:
                written = write(model, [rows[i] for i in part], V + len(MODES), stop, banned, args.tokens)
            answers = [tokenizer.decode(tokens).strip() for tokens in written]
            new = {questions[i].id: "" if metrics.normalise(a) == NOTHING else a for i, a in zip(part, answers)}
            found |= new
            file.write("".join(json.dumps({"id": id, "prediction": a}) + "\n" for id, a in new.items()))
            file.flush()
    predictions = {question.id: found[question.id] for question in questions}
    scores = qa.score(args.task, questions, predictions)
    scores |= {"shown": statistics.mean(shown for _, shown, _ in prompts), "cut": sum(cut for _, _, cut in prompts)}
    return {"epochs": [scores], "predictions": predictions}


# ----------------------------------------------------------------------------------------------------------------
# A BERT marks the answer


def mark(model, questions, parts, args, autocast):
    """{question id: answer} from the windows of all questions."""
    model.eval()
    span, nothing = [(-math.inf, "")] * len(questions), [math.inf] * len(questions)
    for indices in tqdm(
        batches([len(w.tokens) for w in parts], 4 * args.batch), desc="asking", leave=False, disable=None
    ):
        with autocast:
            best = model.best([parts[i] for i in indices], args.longest_answer)
        for w, (value, first, last, null) in zip((parts[i] for i in indices), best):
            nothing[w.question] = min(nothing[w.question], null)
            if value > span[w.question][0]:
                begin, end = w.places[first - w.first][0], w.places[last - w.first][1]
                span[w.question] = (value, questions[w.question].context[begin:end].strip())
    may_decline = args.task == "squad_v2"
    return {
        q.id: "" if may_decline and null > value else text for q, (value, text), null in zip(questions, span, nothing)
    }


def windows_of(model, tokenizer, questions, args, source=None):
    return windows(tokenizer, questions, min(args.longest, model.config.seq), args.stride, source)


def finetune(model, tokenizer, questions, learned, seed, args, out, autocast):
    """{"epochs": scores, "predictions": of the last} of one fine-tuning on the windows `learned`. The model stays as it is."""
    encoder = copy.deepcopy(model)
    set_dropout(encoder, args.dropout)
    marker = Spans(encoder, tokenizer, seed).to(args.device)
    parts, lengths = windows_of(model, tokenizer, questions, args), [len(w.tokens) for w in learned]
    total, scores = args.epochs * math.ceil(len(learned) / args.batch), []
    trainer = Trainer(marker, args.lr, total, 0.1, autocast)
    bar = tqdm(total=total, desc=f"{args.task}, seed {seed}", unit=" steps", disable=None)
    for epoch in range(args.epochs):
        marker.train()
        torch.manual_seed(int(rng(seed, "finetune dropout", epoch).integers(1 << 62)))
        for part in batches(lengths, args.batch, random.Random(f"{seed} {args.task} {epoch}")):
            loss = trainer.step(marker.loss, [learned[i] for i in part])
            bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
            bar.update()
        predictions = mark(marker, questions, parts, args, autocast)
        scores.append({**qa.score(args.task, questions, predictions), "step": trainer.done})
        bar.write(f"  seed {seed}, epoch {epoch + 1}, step {trainer.done}: {line(scores[-1])}", file=sys.stderr)
    bar.close()
    return {"epochs": scores, "predictions": predictions}


# ----------------------------------------------------------------------------------------------------------------


def line(scores):
    """One result in words."""
    parts = [f"EM {scores['em']:.3f}  F1 {scores['f1']:.3f}  of {scores['of']}"]
    for name in ("HasAns", "NoAns"):
        if scores.get(name, {}).get("of"):
            parts.append(f"{name} EM {scores[name]['em']:.3f}  F1 {scores[name]['f1']:.3f}  of {scores[name]['of']}")
    return "; ".join(parts)


def some(questions, limit):
    """`limit` questions of a file, in its order, drawn once and for all; a smaller limit's are among a larger one's."""
    if not limit or limit >= len(questions):
        return questions
    return [questions[i] for i in sorted(random.Random("limit").sample(range(len(questions)), len(questions))[:limit])]


def write_json(path, value):
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=1))
    path.with_suffix(".tmp").rename(path)


def settings_of(args, run):
    """What a result depends on: a folder of results is of one such choice."""
    names = ["task", "shots", "tokens", "batch"] if args.shots is not None else [
        "task", "limit", "epochs", "lr", "batch", "longest", "longest_answer", "stride", "dropout"]  # fmt: skip
    files = {name: getattr(args, name) for name in ("data", "train") if getattr(args, name)}
    return provenance(run, args, names, files)


def evaluate(args, parser):
    if args.shots:
        if not args.shots[0].isdecimal():
            parser.error(f"--shots: must be a whole number, 0 or above, not {args.shots[0][:40]!r}")
        args.shots, run, solve, arch = int(args.shots[0]), args.shots[1], few_shot, "ul2"
    else:
        run, solve, arch = args.finetune, finetune, "bert"
        if args.task not in ("squad_v2", "tydiqa_goldp"):
            raise UserError(f"--task {args.task}: has no context in which to mark an answer (--finetune)")
        if not args.train:
            raise UserError("--finetune needs --train, the file to learn from")
    args.batch = args.batch or (16 if solve is few_shot else 48)
    everything = qa.read_task(args.task, args.data)
    questions, train = some(everything, args.limit), qa.read_task(args.task, args.train) if args.train else everything
    model, tokenizer, _ = load_run(run, args.device)
    if model.config.arch != arch:
        raise UserError(f"{run}: --shots asks a UL2, --finetune trains a BERT; this is a {model.config.arch.upper()}")
    if solve is few_shot:
        room_of(model, args)
    else:
        train = windows_of(model, tokenizer, train, args, args.train)
    steady_memory()
    device, dtype = choose_machine(argparse.Namespace(device=args.device, dtype="auto"))
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    kind = f"-{args.shots}shot" if solve is few_shot else ""
    out = Path(args.out or f"out/qa/{Path(run).resolve().name}-{args.task}{kind}")
    own, settings = settings_of(args, run), out / "settings.json"
    if settings.exists() and json.loads(settings.read_text()) != own:
        raise UserError(f"{out}: was made with other settings or files; choose another --out")
    lock = checkpoint.lock(out)
    (out / "runs").mkdir(exist_ok=True)
    write_json(settings, own)
    results = []
    for seed in range(args.seeds):
        done = out / "runs" / f"{seed}.json"
        if solve is finetune and done.exists():
            results.append(json.loads(done.read_text()))
            continue
        results.append(solve(model, tokenizer, questions, train, seed, args, out, autocast))
        if solve is finetune:
            write_json(done, results[-1])
    summarize(args, questions, results, out)
    lock.close()


def summarize(args, questions, results, out):
    """Prints the median seed's last scores and those of answering nothing; writes predictions.json and results.json."""
    last = [result["epochs"][-1] for result in results]
    middle = statistics.median_low([scores["f1"] for scores in last])
    pick = next(i for i, scores in enumerate(last) if scores["f1"] == middle)
    print(f"  {args.task}: {line(last[pick])}")
    if args.seeds > 1:
        print(
            "  seed by seed, F1: " + ", ".join(f"{scores['f1']:.3f}" for scores in last) + "; above is the median seed"
        )
    if args.shots is not None:
        source = "--train" if args.train else "--data, the asked question left out"
        print(f"  {last[pick]['shown']:.2f} of {args.shots} examples (from {source}) fitted before a question in the mean; "
              f"{last[pick]['cut']} of {len(questions)} questions lost the beginning of their own text")  # fmt: skip
    if args.task == "squad_v2":
        print(
            f"  no answer everywhere: {line(qa.score(args.task, questions, dict.fromkeys((q.id for q in questions), '')))}"
        )
    write_json(out / "predictions.json", results[pick]["predictions"])
    write_json(out / "results.json", {"task": args.task, "median": last[pick], "runs": [r["epochs"] for r in results]})
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
    from engine.options import Parser, count, natural, number, positive, share

    parser = Parser(prog="eval_qa.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--task", required=True, choices=qa.READERS)
    parser.add_argument("--data", required=True, help="the benchmark's own file, to be answered")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--score", metavar="FILE", help="predictions; prints one JSON object")
    what.add_argument(
        "--shots", nargs=2, metavar=("K", "RUN"), help="ask the UL2 of a run folder, after K solved examples"
    )
    what.add_argument("--finetune", metavar="RUN", help="train the BERT of a run folder to mark answers")
    parser.add_argument("--train", default="", help="file of the same layout: examples to show, or to learn from")
    parser.add_argument("--limit", type=natural, default=0, help="so many questions of --data, always the same; 0: all")
    parser.add_argument("--seeds", type=count, default=1, help="how many [1]")
    parser.add_argument(
        "--batch", type=natural, default=0, help="questions, or windows, at a time [asked 16, trained on 48]"
    )
    parser.add_argument("--tokens", type=count, default=16, help="--shots: tokens of an answer at most [16]")
    parser.add_argument("--epochs", type=count, default=2, help="--finetune: passes over --train [2]")
    parser.add_argument("--lr", type=positive, default=5e-5, help="--finetune: peak learning rate [5e-5]")
    length = number(int, "a whole number, 32 or above", lambda x: x >= 32)
    parser.add_argument("--longest", type=length, default=384, help="--finetune: tokens of a window at most [384]")
    parser.add_argument("--stride", type=count, default=128, help="--finetune: from window to window [128]")
    parser.add_argument("--longest_answer", type=count, default=30, help="--finetune: tokens of an answer at most [30]")
    parser.add_argument("--dropout", type=share, default=0.1, help="--finetune: dropout rate [0.1]")
    parser.add_argument("--out", default="", help="folder of the results [out/qa/NAME OF THE RUN-TASK]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    try:
        show_score(args) if args.score else evaluate(args, parser)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
