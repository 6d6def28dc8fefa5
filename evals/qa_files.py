"""Question answering's files and scores: SQuAD v2, TyDi QA GoldP, NQ-open, WebQuestions and TriviaQA, by their own rules.

Predictions are one JSON object, {question id: answer}; "" answers that there is no answer. NQ-open has no ids: there the
question itself is the id, and JSONL lines {"question": .., "prediction": ..} are taken too.
Not here: the metrics themselves (metrics.py), a model that answers (eval_qa.py).

Sources: SQuAD v2 (arXiv 1806.03822), TyDi QA (arXiv 2003.05002), Natural Questions and its open form (arXiv 1906.00300),
WebQuestions (Berant et al., EMNLP 2013), TriviaQA (arXiv 1705.03551).
"""

import collections
import json
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from evals import metrics


class Question(NamedTuple):
    id: str
    question: str
    answers: list  # all that count as right; none: there is no answer in the context
    context: str = ""
    starts: list = []  # where each answer begins in the context; None: the file does not say


def fail(path, number, what):
    raise UserError(f"{path}, {number}: {what}") from None


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None


def read_lines(path):
    """(line number, object) of a JSONL file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                fail(path, f"line {number}", "not JSON")


def read_squad(path):
    """SQuAD's layout, which TyDi QA GoldP shares."""
    for a, article in enumerate(read_json(path)["data"]):
        for p, paragraph in enumerate(article["paragraphs"]):
            for q, item in enumerate(paragraph["qas"]):
                where = f"article {a}, paragraph {p}, question {q}"
                try:
                    answers = [answer["text"] for answer in item["answers"]]
                    if item.get("is_impossible", False) != (not answers) or not isinstance(item["question"], str):
                        raise ValueError
                    starts = [answer.get("answer_start") for answer in item["answers"]]
                    yield Question(str(item["id"]), item["question"], answers, paragraph["context"], starts)
                except (KeyError, TypeError, ValueError):
                    fail(path, where, "not a question of SQuAD: id, question, answers (none if is_impossible)")


def read_nq(path):
    for number, line in read_lines(path):
        try:
            yield Question(line["question"], line["question"], [*map(str, line["answer"])])
        except (KeyError, TypeError):
            fail(path, f"line {number}", "expected a question and a list of answers")


def read_webquestions(path):
    for number, item in enumerate(read_json(path)):
        try:
            yield Question(item["qId"], item["qText"], [*map(str, item["answers"])])
        except (KeyError, TypeError):
            fail(path, f"question {number}", "expected qId, qText, answers")


def read_trivia(path):
    """The official JSON, or lines {"question": .., "answer": {"value": .., "aliases": [..]}}."""
    if str(path).endswith(".jsonl"):
        for number, line in read_lines(path):
            try:
                yield Question(
                    line["question"], line["question"], [line["answer"]["value"], *line["answer"]["aliases"]]
                )
            except (KeyError, TypeError):
                fail(path, f"line {number}", "expected a question and an answer with value and aliases")
        return
    for number, item in enumerate(read_json(path)["Data"]):
        try:
            yield Question(item["QuestionId"], item["Question"], [item["Answer"]["Value"], *item["Answer"]["Aliases"]])
        except (KeyError, TypeError):
            fail(path, f"question {number}", "expected QuestionId, Question, Answer")


READERS = {
    "squad_v2": read_squad, "tydiqa_goldp": read_squad, "nq_open": read_nq, "webquestions": read_webquestions,
    "triviaqa": read_trivia,
}  # fmt: skip


def read_task(task, path):
    """All questions of a data file. An id that comes again becomes ID#2, ID#3, in the order of the file. ValueError naming
    file and place for what is not as it should be."""
    try:
        found = list(READERS[task](path))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not the layout of {task}") from None
    seen = collections.Counter()
    for i, question in enumerate(found):
        seen[question.id] += 1
        if seen[question.id] > 1:
            found[i] = question._replace(id=f"{question.id}#{seen[question.id]}")
        if not question.answers and task != "squad_v2":
            raise UserError(f"{path}: the question {question.id!r} has no answer")
    if not found:
        raise UserError(f"{path}: there is nothing in it")
    return found


def read_predictions(path):
    """{question id: answer}."""
    if str(path).endswith(".jsonl"):
        found = {}
        for number, line in read_lines(path):
            try:
                found[line["question"]] = line["prediction"]
            except (KeyError, TypeError):
                fail(path, f"line {number}", "expected a question and a prediction")
    else:
        found = read_json(path)
    if not isinstance(found, dict) or not all(isinstance(answer, str) for answer in found.values()):
        raise UserError(f"{path}: expected one JSON object, each question's id with an answer in words")
    return found


# ----------------------------------------------------------------------------------------------------------------


def score(task, questions, predictions):
    """{"em", "f1", "of": questions}; with SQuAD v2's split into questions that have an answer and such that have none."""
    how = {"trivia": True} if task == "triviaqa" else {}
    rows = []
    for question in questions:
        predicted = predictions[question.id]
        answers = [a for a in question.answers if metrics.normalise(a, **how)] or [""]  # none left: "" is right
        values = [metrics.best(metric, predicted, answers, **how) for metric in (metrics.exact, metrics.token_f1)]
        rows.append((bool(question.answers), *values))

    def mean(rows):
        em, f1 = (sum(row[i] for row in rows) / len(rows) if rows else None for i in (1, 2))
        return {"em": em, "f1": f1, "of": len(rows)}

    result = mean(rows)
    if task == "squad_v2":
        result |= {
            name: mean([row for row in rows if row[0] == has]) for name, has in (("HasAns", True), ("NoAns", False))
        }
    return result
