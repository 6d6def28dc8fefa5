"""Files and scores of question answering: SQuAD v2, TyDi QA GoldP, NQ-open, WebQuestions, TriviaQA, by their own rules.

Predictions are one JSON object, {question id: answer}; "" answers that there is no answer. NQ-open has no ids: there
the question itself is the id, and JSONL lines {"question": .., "prediction": ..} are taken too. A file of TyDi QA is
scored as one; the benchmark's figure is the mean over its languages but English, so give a language at a time.
Not here: the metrics themselves (evals/metrics.py), a model that answers (evals/qa.py).

Sources: SQuAD v2 (arXiv 1806.03822), TyDi QA (arXiv 2003.05002), Natural Questions and its open form (arXiv
1906.00300), WebQuestions (Berant et al., EMNLP 2013), TriviaQA (arXiv 1705.03551).
"""

import collections
import json
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from evals import metrics
from evals.superglue import parse, read_lines


class Question(NamedTuple):
    id: str
    question: str
    answers: list  # all that count as right; none: there is no answer in the context
    context: str = ""
    starts: list = []  # where each answer begins in the context; None: the file does not say
    shown: str = ""  # the answer to show in an example, where it is not the first one


def checked(question):
    """The question. Raises TypeError unless its answers are a list, and they and its other texts are strings."""
    texts = [question.id, question.question, question.context, question.shown]
    if not isinstance(question.answers, list) or not all(isinstance(x, str) for x in texts + question.answers):
        raise TypeError
    return question


def fail(path, place, what):
    raise UserError(f"{path}, {place}: {what}") from None


def read_json(path):
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        fail(path, f"line {error.lineno}", "not JSON")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None


def read_squad(path):
    """SQuAD's layout, which TyDi QA GoldP shares."""
    for a, article in enumerate(read_json(path)["data"]):
        for p, paragraph in enumerate(article["paragraphs"]):
            for q, item in enumerate(paragraph["qas"]):
                where = f"article {a}, paragraph {p}, question {q}"
                try:
                    answers = [answer["text"] for answer in item["answers"]]
                    if item.get("is_impossible", False) != (not answers):
                        raise ValueError
                    starts = [answer.get("answer_start") for answer in item["answers"]]
                    yield checked(Question(str(item["id"]), item["question"], answers, paragraph["context"], starts))
                except (KeyError, TypeError, ValueError):
                    fail(path, where, "not a question of SQuAD: id, question, answers (none if is_impossible)")


def read_nq(path):
    for number, line in read_lines(Path(path)):
        try:
            yield checked(Question(line["question"], line["question"], line["answer"]))
        except (KeyError, TypeError):
            fail(path, f"line {number}", "expected a question and a list of answers, all strings")


def read_webquestions(path):
    for number, item in enumerate(read_json(path)):
        try:
            yield checked(Question(item["qId"], item["qText"], item["answers"]))
        except (KeyError, TypeError):
            fail(path, f"question {number}", "expected qId, qText and a list of answers, all strings")


def read_trivia(path):
    """The official JSON, or lines {"question": .., "answer": {"value": .., "aliases": [..]}}.

    As the official script has it: right are the normalised aliases, and what people answered where the file says so
    (HumanAnswers, in the verified sets); a verified set (VerifiedEval) counts its verified questions alone; outside the
    Wikipedia domain an answer is given to a question and a document, QUESTIONID--FILENAME.
    """
    if str(path).endswith(".jsonl"):
        for number, line in read_lines(Path(path)):
            try:
                answers = [line["answer"]["value"]] + line["answer"]["aliases"]  # refuses a string; a star would not
                yield checked(Question(line["question"], line["question"], answers))
            except (KeyError, TypeError):
                fail(path, f"line {number}", "expected a question and an answer with value and a list of aliases")
        return
    file = read_json(path)
    verified, domain = file["VerifiedEval"], file["Domain"]
    for number, item in enumerate(file["Data"]):
        try:
            if verified and not item["QuestionPartOfVerifiedEval"]:
                continue
            answers = item["Answer"]["NormalizedAliases"] + item["Answer"].get("HumanAnswers", [])
            question = checked(Question(item["QuestionId"], item["Question"], answers, shown=item["Answer"]["Value"]))
            if domain == "Wikipedia":
                yield question
                continue
            for document in [*item.get("EntityPages", []), *item.get("SearchResults", [])]:
                if not verified or domain != "Web" or document["DocPartOfVerifiedEval"]:
                    yield question._replace(id=f"{question.id}--{document['Filename']}")
        except (KeyError, TypeError):
            fail(path, f"question {number}", "expected QuestionId, Question, Answer and, of the Web domain, documents")


READERS = {
    "squad_v2": read_squad, "tydiqa_goldp": read_squad, "nq_open": read_nq, "webquestions": read_webquestions,
    "triviaqa": read_trivia,
}  # fmt: skip


def read_task(task, path):
    """All questions of a data file. An id that comes again becomes ID#2, ID#3, in the order of the file. Raises
    UserError naming file and place for what is not as it should be."""
    try:
        questions = list(READERS[task](path))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not the layout of {task}") from None
    seen = collections.Counter()
    for i, question in enumerate(questions):
        seen[question.id] += 1
        if seen[question.id] > 1:
            questions[i] = question._replace(id=f"{question.id}#{seen[question.id]}")
        if not question.answers and task != "squad_v2":
            raise UserError(f"{path}: the question {question.id!r} has no answer")
    if not questions:
        raise UserError(f"{path}: there is nothing in it")
    return questions


def read_predictions(path):
    """{question id: answer}."""
    if str(path).endswith(".jsonl"):
        predictions = {}
        for number, line in read_lines(Path(path)):
            try:
                predictions[line["question"]] = line["prediction"]
            except (KeyError, TypeError):
                fail(path, f"line {number}", "expected a question and a prediction")
    else:
        predictions = read_json(path)
    if not isinstance(predictions, dict) or not all(isinstance(answer, str) for answer in predictions.values()):
        raise UserError(f"{path}: expected one JSON object, each question's id with an answer in words")
    return predictions


# ----------------------------------------------------------------------------------------------------------------


def score(task, questions, predictions):
    """{"em", "f1", "of": questions}; of SQuAD v2 also for its questions with an answer and for those without."""
    trivia, v2 = task == "triviaqa", task == "squad_v2"
    rows = []
    for question in questions:
        predicted, answers = predictions[question.id], question.answers
        if v2:  # its script drops answers that normalise to nothing, which those of the other tasks keep
            answers = [answer for answer in answers if metrics.normalise(answer)] or [""]
        em = metrics.best(metrics.exact, predicted, answers, trivia=trivia)
        f1 = metrics.best(metrics.token_f1, predicted, answers, trivia=trivia, empty=float(v2))
        rows.append((bool(question.answers), em, f1))

    def mean(rows):
        em, f1 = (sum(row[i] for row in rows) / len(rows) if rows else None for i in (1, 2))
        return {"em": em, "f1": f1, "of": len(rows)}

    result = mean(rows)
    if v2:
        for name, has in (("HasAns", True), ("NoAns", False)):
            result[name] = mean([row for row in rows if row[0] == has])
    return result
