"""SuperGLUE's files and scores: the eight tasks and two diagnostics, read, scored and written as the benchmark has them.

A data folder is the official one: BoolQ/val.jsonl and so on. Predictions are a folder, or a .zip, in the official form of a
submission: BoolQ.jsonl with lines {"idx": 0, "label": "true"}, and so on; tasks without a file are left out. The score is the
mean over the main tasks; a task with two metrics counts once, by their mean. The diagnostics AX-b and AX-g are not in it.
Not here: the metrics themselves (metrics.py), a model that answers (eval_superglue.py).

Source: SuperGLUE (Wang et al., arXiv 1905.00537) and its data files, version 2.
"""

import collections
import io
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from evals import metrics

ENTAILMENT = ["entailment", "not_entailment"]


class Task(NamedTuple):
    labels: list | None  # as they stand in a submission; None: free text
    scores: tuple  # names of its metrics


TASKS = {
    "BoolQ": Task(["true", "false"], ("accuracy",)),
    "CB": Task(["entailment", "contradiction", "neutral"], ("accuracy", "f1")),
    "COPA": Task([0, 1], ("accuracy",)),
    "MultiRC": Task([0, 1], ("f1a", "em")),
    "ReCoRD": Task(None, ("f1", "em")),
    "RTE": Task(ENTAILMENT, ("accuracy",)),
    "WiC": Task(["true", "false"], ("accuracy",)),
    "WSC": Task(["True", "False"], ("accuracy",)),
    "AX-b": Task(ENTAILMENT, ("mcc",)),
    "AX-g": Task(ENTAILMENT, ("accuracy", "gender_parity")),
}
MAIN = list(TASKS)[:8]


class Example(NamedTuple):
    key: tuple  # (idx,), or (passage, question, answer) in MultiRC
    gold: object  # a label, or ReCoRD's list of right answers
    fields: dict  # the line it came from; of MultiRC and ReCoRD with this one question


# ----------------------------------------------------------------------------------------------------------------
# Files


def lines(file, name):
    """(line number, object) of a JSONL file. ValueError naming the line where it is none."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise ValueError
            except ValueError:
                raise UserError(f"{name}, line {number}: not a JSON object") from None
            yield number, value


def read_line(task, line):
    """The examples of one line of a data file. KeyError, TypeError or ValueError if it is not as it should be."""
    if task == "MultiRC":
        text = line["passage"]["text"]
        return [
            Example((line["idx"], q["idx"], a["idx"]), as_label(task, a["label"]),
                    {"passage": text, "question": q["question"], "answer": a["text"]})
            for q in line["passage"]["questions"] for a in q["answers"]
        ]  # fmt: skip
    if task == "ReCoRD":
        text = line["passage"]["text"]
        entities = list(
            dict.fromkeys(text[e["start"] : e["end"] + 1] for e in line["passage"]["entities"])
        )  # end: inclusive
        found = []
        for q in line["qas"]:
            answers = [a["text"] for a in q["answers"]]
            if "@placeholder" not in q["query"] or not answers or not all(isinstance(a, str) for a in answers):
                raise ValueError
            found.append(Example((q["idx"],), answers, {"passage": text, "query": q["query"], "entities": entities}))
        return found
    fields = {**line}
    if task == "AX-b":
        fields |= {"premise": line["sentence1"], "hypothesis": line["sentence2"]}
    if task == "WSC":
        fields |= {name: line["target"][name] for name in ("span1_text", "span2_text", "span1_index", "span2_index")}
    for name in FIELDS[task]:
        if not isinstance(fields[name], (str, int)):
            raise TypeError
    return [Example((int(line["idx"]),), as_label(task, line["label"]), fields)]


FIELDS = {
    "BoolQ": ["passage", "question"], "CB": ["premise", "hypothesis"], "COPA": ["premise", "choice1", "choice2", "question"],
    "RTE": ["premise", "hypothesis"], "WiC": ["sentence1", "sentence2", "word"], "WSC": ["text", "span1_text", "span2_text"],
    "AX-b": ["premise", "hypothesis"], "AX-g": ["premise", "hypothesis", "pair_id"],
}  # fmt: skip


def as_label(task, value):
    """A label of a data file as a submission writes it. ValueError if the task has no such label."""
    if isinstance(value, bool):
        value = str(value) if task == "WSC" else str(value).lower()
    if value not in TASKS[task].labels:
        raise ValueError
    return value


def read_task(task, path):
    """All examples of a data file. ValueError naming file and line for one that is not as it should be."""
    found = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in lines(file, path):
                try:
                    examples = read_line(task, line)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    what = (
                        f"no field {error}"
                        if isinstance(error, KeyError)
                        else "a field or label is not as it should be"
                    )
                    raise UserError(f"{path}, line {number}: not a line of {task}: {what}") from None
                for example in examples:
                    if found.setdefault(example.key, example) is not example:
                        raise UserError(f"{path}, line {number}: idx {example.key[-1]} comes twice")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not found:
        raise UserError(f"{path}: there is nothing in it")
    return list(found.values())


def validation_file(data, task):
    names = [Path(data, task, name) for name in ("val.jsonl", f"{task}.jsonl")]
    return next((path for path in names if path.exists()), None)


# ----------------------------------------------------------------------------------------------------------------
# Predictions


def read_predictions(task, file, name):
    """{key: label} of an open submission file. ValueError naming file and line."""
    found = {}
    for number, line in lines(file, name):
        try:
            if task == "MultiRC":
                answers = [((line["idx"], q["idx"], a["idx"]), a["label"])
                           for q in line["passage"]["questions"] for a in q["answers"]]  # fmt: skip
            else:
                answers = [((int(line["idx"]),), line["label"])]
            for key, label in answers:
                allowed = TASKS[task].labels
                if (
                    key in found
                    or (label not in allowed if allowed else not isinstance(label, str))
                    or isinstance(label, bool)
                ):
                    raise ValueError
                found[key] = label
        except (KeyError, TypeError, ValueError):
            kinds = " or ".join(map(json.dumps, TASKS[task].labels or ["an entity"]))
            raise UserError(f"{name}, line {number}: expected an idx not seen before and a label, {kinds}") from None
    return found


def open_predictions(place):
    """{task: open file} of a folder or .zip of submission files. ValueError if there are none."""
    place = Path(place)
    if place.is_dir():
        files = {
            path.stem: open(path, encoding="utf-8") for path in sorted(place.glob("*.jsonl")) if path.stem in TASKS
        }
    elif zipfile.is_zipfile(place):
        archive = zipfile.ZipFile(place)
        inside = {
            Path(name).stem: name for name in archive.namelist() if name.endswith(".jsonl") and Path(name).stem in TASKS
        }
        files = {task: io.TextIOWrapper(archive.open(name), "utf-8") for task, name in inside.items()}
    else:
        raise UserError(f"{place}: neither a folder nor a .zip of predictions")
    if not files:
        raise UserError(f"{place}: none of the files {', '.join(f'{task}.jsonl' for task in TASKS)} is there")
    return files


def write_predictions(folder, task, predictions):
    """A submission file from {key: label}."""
    if task == "MultiRC":
        passages = collections.defaultdict(lambda: collections.defaultdict(list))
        for (p, q, a), label in predictions.items():
            passages[p][q].append({"idx": a, "label": label})
        rows = [
            {"idx": p, "passage": {"questions": [{"idx": q, "answers": answers} for q, answers in questions.items()]}}
            for p, questions in passages.items()
        ]
    else:
        rows = [{"idx": key[0], "label": label} for key, label in predictions.items()]
    Path(folder, f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ----------------------------------------------------------------------------------------------------------------
# Scores


def score_task(task, examples, predictions):
    """{metric: value, "score": their mean} of predictions {key: label} on all examples."""
    guesses, gold = [predictions[e.key] for e in examples], [e.gold for e in examples]
    if task == "ReCoRD":
        values = [
            sum(metrics.best(metric, guess, answers) for guess, answers in zip(guesses, gold)) / len(gold)
            for metric in (metrics.token_f1, metrics.exact)
        ]
    elif task == "MultiRC":
        questions = collections.defaultdict(list)
        for example, guess in zip(examples, guesses):
            questions[example.key[:2]].append(guess == example.gold)
        values = [metrics.binary_f1(guesses, gold, 1), sum(map(all, questions.values())) / len(questions)]
    elif task == "AX-b":
        values = [metrics.mcc(guesses, gold, "entailment")]
    else:
        values = [metrics.accuracy(guesses, gold)]
        if task == "CB":
            values.append(metrics.macro_f1(guesses, gold, TASKS[task].labels))
        if task == "AX-g":
            values.append(metrics.parity(guesses, [e.fields["pair_id"] for e in examples]))
    return {**dict(zip(TASKS[task].scores, values)), "score": sum(values) / len(values)}


def score(predictions, data):
    """{"tasks": {name: scores}, "mean": over the main tasks, "of": how many} of a folder or .zip of predictions."""
    results = {}
    for task, file in open_predictions(predictions).items():
        gold = validation_file(data, task)
        if gold is None:
            raise UserError(f"{data}: there is no {task}/val.jsonl to score {task}.jsonl against")
        examples, name = read_task(task, gold), f"{predictions}: {task}.jsonl"
        with file:
            found = read_predictions(task, file, name)
        keys = {e.key for e in examples}
        if keys != set(found):
            missing, unknown = sorted(keys - set(found)), sorted(set(found) - keys)
            which = (
                f"no prediction for idx {missing[0][-1]}" if missing else f"there is no idx {unknown[0][-1]} in {gold}"
            )
            raise UserError(f"{name}: {which} ({len(missing)} missing, {len(unknown)} unknown)")
        results[task] = score_task(task, examples, found)
    main = [results[task]["score"] for task in MAIN if task in results]
    return {
        "tasks": {t: results[t] for t in TASKS if t in results},
        "mean": sum(main) / len(main) if main else None,
        "of": len(main),
    }


def baseline(data, out):
    """Submission files with one label everywhere: the most frequent of train.jsonl (of the validation set where there is no
    train.jsonl); in ReCoRD the first entity."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        path = validation_file(data, task)
        if path is not None:
            train = Path(data, task, "train.jsonl")
            counted = collections.Counter(str(e.gold) for e in read_task(task, train if train.exists() else path))
            common = None if task == "ReCoRD" else max(TASKS[task].labels, key=lambda label: counted[str(label)])
            first = lambda e: (e.fields["entities"] or [""])[0]  # noqa: E731
            write_predictions(
                out, task, {e.key: common if common is not None else first(e) for e in read_task(task, path)}
            )
