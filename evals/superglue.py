"""SuperGLUE's files and scores: the eight tasks and two diagnostics, read, scored and written as the benchmark does it.

A data folder is the official one: BoolQ/train.jsonl, BoolQ/val.jsonl, BoolQ/test.jsonl and so on. Predictions are a
folder, or a .zip, in the form of a submission: BoolQ.jsonl with lines {"idx": 0, "label": "true"}, and so on; tasks
without a file are left out. The score is the mean over the main tasks; a task with two metrics counts once, by their
mean. The diagnostics AX-b and AX-g are not in it.
Not here: the metrics themselves (evals/metrics.py), a model that answers (eval_superglue.py).

Source: SuperGLUE (Wang et al., arXiv 1905.00537) and its data files, version 2.
"""

import collections
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from evals import metrics
from text.documents import without_surrogates

ENTAILMENT = ["entailment", "not_entailment"]


class Task(NamedTuple):
    labels: list | None  # as a submission writes them; None: free text
    scores: tuple  # names of its metrics
    fields: tuple = ()  # what each line of its files must have; MultiRC and ReCoRD have a layout of their own


TASKS = {
    "BoolQ": Task(["true", "false"], ("accuracy",), ("passage", "question")),
    "CB": Task(["entailment", "contradiction", "neutral"], ("accuracy", "f1"), ("premise", "hypothesis")),
    "COPA": Task([0, 1], ("accuracy",), ("premise", "choice1", "choice2", "question")),
    "MultiRC": Task([0, 1], ("f1a", "em")),
    "ReCoRD": Task(None, ("f1", "em")),
    "RTE": Task(ENTAILMENT, ("accuracy",), ("premise", "hypothesis")),
    "WiC": Task(["true", "false"], ("accuracy",), ("sentence1", "sentence2", "word", "start1", "end1")),
    "WSC": Task(["True", "False"], ("accuracy",), ("text", "span1_text", "span1_index", "span2_text", "span2_index")),
    "AX-b": Task(ENTAILMENT, ("mcc",), ("premise", "hypothesis")),
    "AX-g": Task(ENTAILMENT, ("accuracy", "gender_parity"), ("premise", "hypothesis")),
}
MAIN, DIAGNOSTICS = list(TASKS)[:8], list(TASKS)[8:]


class Example(NamedTuple):
    key: tuple  # (idx,), or (passage, question, answer) in MultiRC
    gold: object  # a label, or ReCoRD's list of right answers; None in a test set
    fields: dict  # the line it came from; of MultiRC and ReCoRD with this one question

    @property
    def right(self):
        """All right answers, as a list."""
        return self.gold if isinstance(self.gold, list) else [self.gold]


# ----------------------------------------------------------------------------------------------------------------
# Files


def split_file(data, task, split):
    """The file of a split, "train", "val" or "test", or None if it is not there. A diagnostic has one file, which is a
    test set with public labels; it counts as "val", since it can be scored here."""
    path = Path(data, task, f"{task if split == 'val' and task in DIAGNOSTICS else split}.jsonl")
    return path if path.exists() else None


def tasks_in(data, tasks):
    """{task: its validation file} of those of `tasks` that are in a folder. Raises UserError if none is."""
    files = {task: path for task in tasks if (path := split_file(data, task, "val"))}
    if not files:
        raise UserError(f"--data {data}: holds no task, such as BoolQ/val.jsonl")
    return files


def parse(text):
    """The JSON value of a text, with lone surrogates ("\\ud83d"), which are not text, replaced by U+FFFD."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(without_surrogates(json.dumps(value, ensure_ascii=False)))
    return value


def read_lines(path):
    """(line number, object) for each line of a JSONL file, a Path or zipfile.Path. Raises UserError, naming the line,
    where there is no JSON object."""
    number = 0
    try:
        with path.open("r", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    value = parse(line)
                    if not isinstance(value, dict):
                        raise ValueError
                    yield number, value
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path}, line {number}: not a JSON object in UTF-8") from None


def read_example(task, line, answered=True):
    """The examples of one line of a data file. answered: whether it has labels. Raises KeyError, TypeError or
    ValueError if it is not as it should be."""

    def label(item):
        return as_label(task, item["label"]) if answered else None

    if task == "MultiRC":
        text = line["passage"]["text"]
        return [
            Example((line["idx"], q["idx"], a["idx"]), label(a),
                    {"passage": text, "question": q["question"], "answer": a["text"]})
            for q in line["passage"]["questions"] for a in q["answers"]
        ]  # fmt: skip
    if task == "ReCoRD":
        text, examples = line["passage"]["text"], []
        spans = [(e["start"], e["end"] + 1) for e in line["passage"]["entities"]]  # `end` is inclusive
        entities = list(dict.fromkeys(text[start:end] for start, end in spans))
        for q in line["qas"]:
            answers = [a["text"] for a in q["answers"]] if answered else None
            texts = all(isinstance(answer, str) for answer in answers or ())
            if "@placeholder" not in q["query"] or answers == [] or not texts:
                raise ValueError
            examples.append(Example((q["idx"],), answers, {"passage": text, "query": q["query"], "entities": entities}))
        return examples
    fields = {**line}
    if task == "AX-b":
        fields |= {"premise": line["sentence1"], "hypothesis": line["sentence2"]}
    if task == "WSC":
        fields |= line["target"]
    for name in TASKS[task].fields:
        if not isinstance(fields[name], (str, int)):
            raise TypeError
    return [Example((int(line["idx"]),), label(line), fields)]


def as_label(task, value):
    """A label of a data file as a submission writes it. Raises ValueError if the task has no such label."""
    if isinstance(value, bool):
        value = str(value) if task == "WSC" else str(value).lower()
    if value not in TASKS[task].labels:
        raise ValueError
    return value


def read_task(task, path):
    """All examples of a data file. Raises UserError naming file and line for one that is not as it should be. A file
    named test.jsonl has no labels."""
    examples = {}
    for number, line in read_lines(path):
        try:
            new = read_example(task, line, answered=path.name != "test.jsonl")
        except KeyError as error:
            raise UserError(f"{path}, line {number}: not a line of {task}: no field {error}") from None
        except (TypeError, ValueError, AttributeError):
            raise UserError(f"{path}, line {number}: not a line of {task}: a field or label is wrong") from None
        for example in new:
            if examples.setdefault(example.key, example) is not example:
                raise UserError(f"{path}, line {number}: idx {example.key[-1]} comes twice")
    if not examples:
        raise UserError(f"{path}: there is nothing in it")
    return list(examples.values())


# ----------------------------------------------------------------------------------------------------------------
# Predictions


def read_predictions(task, path):
    """{key: label} of a submission file. Raises UserError naming file and line."""
    labels, predictions = TASKS[task].labels, {}
    for number, line in read_lines(path):
        try:
            if task == "MultiRC":
                answers = [((line["idx"], q["idx"], a["idx"]), a["label"])
                           for q in line["passage"]["questions"] for a in q["answers"]]  # fmt: skip
            else:
                answers = [((int(line["idx"]),), line["label"])]
            for key, label in answers:
                known = label in labels and not isinstance(label, bool) if labels else isinstance(label, str)
                if key in predictions or not known:
                    raise ValueError
                predictions[key] = label
        except (KeyError, TypeError, ValueError):
            kinds = " or ".join(map(json.dumps, labels or ["an entity"]))
            raise UserError(f"{path}, line {number}: expected an idx not seen before and a label, {kinds}") from None
    return predictions


def prediction_files(place):
    """{task: file} of a folder or .zip of submission files. Raises UserError if there are none."""
    if not Path(place).is_dir() and not zipfile.is_zipfile(place):
        raise UserError(f"{place}: neither a folder nor a .zip of predictions")
    root = Path(place) if Path(place).is_dir() else zipfile.Path(place)
    files = {task: root / f"{task}.jsonl" for task in TASKS if (root / f"{task}.jsonl").exists()}
    if not files:
        raise UserError(f"{place}: none of the files {', '.join(f'{task}.jsonl' for task in TASKS)} is there")
    return files


def write_predictions(folder, task, predictions):
    """Write FOLDER/TASK.jsonl, a submission file, from {key: label}."""
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
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def zip_predictions(folder, archive):
    """Zip the submission files of a folder, all at the root of the archive, where the benchmark's server looks for
    them. Returns the tasks that are missing: the server wants all ten."""
    files = prediction_files(folder)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in files.values():
            packed.write(path, path.name)
    return [task for task in TASKS if task not in files]


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
            # Lines 2k and 2k + 1 are a pair. The files' `pair_id` is no help: it differs on every line.
            values.append(metrics.parity(guesses, [e.key[0] // 2 for e in examples]))
    return {**dict(zip(TASKS[task].scores, values)), "score": sum(values) / len(values)}


def score(place, data):
    """{"tasks": {name: scores}, "mean": over the main tasks, "of": how many} of a folder or .zip of predictions."""
    results = {}
    for task, file in prediction_files(place).items():
        gold = split_file(data, task, "val")
        if gold is None:
            raise UserError(f"{data}: there is no {task}/val.jsonl to score {task}.jsonl against")
        examples, predictions = read_task(task, gold), read_predictions(task, file)
        keys = {e.key for e in examples}
        missing, unknown = sorted(keys - set(predictions)), sorted(set(predictions) - keys)
        if missing or unknown:
            which = f"no prediction for idx {missing[0][-1]}" if missing else f"no idx {unknown[0][-1]} in {gold}"
            raise UserError(f"{file}: {which} ({len(missing)} missing, {len(unknown)} unknown)")
        results[task] = score_task(task, examples, predictions)
    main = [results[task]["score"] for task in MAIN if task in results]
    return {"tasks": results, "mean": sum(main) / len(main) if main else None, "of": len(main)}


def baseline(data, out):
    """Write submission files with one label everywhere: the most frequent of train.jsonl (of the validation set where
    there is no train.jsonl); in ReCoRD the first entity. Raises UserError if there is no task in `data`."""
    for task, path in tasks_in(data, TASKS).items():
        examples = read_task(task, path)
        if task == "ReCoRD":
            predictions = {e.key: (e.fields["entities"] or [""])[0] for e in examples}
        else:
            counted = collections.Counter(e.gold for e in read_task(task, split_file(data, task, "train") or path))
            predictions = dict.fromkeys((e.key for e in examples), max(TASKS[task].labels, key=counted.__getitem__))
        write_predictions(out, task, predictions)
