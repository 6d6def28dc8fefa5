import contextlib
import io
import json
from types import SimpleNamespace
from unittest import mock

import pytest

from engine.errors import UserError, guard
from evals import qa as eval_qa
from evals import qa_files as qa

QUESTIONS = [
    {"id": "1", "question": "who", "is_impossible": False,
     "answers": [{"text": "The cat", "answer_start": 0}, {"text": "cat", "answer_start": 4}]},
    {"id": "2", "question": "when", "answers": [], "is_impossible": True},
    {"id": "3", "question": "where", "answers": [{"text": "Paris", "answer_start": 15}], "is_impossible": False},
]  # fmt: skip
PARAGRAPH = {"context": "The cat sat in Paris.", "qas": QUESTIONS}
SQUAD = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [PARAGRAPH]}]}
NQ = [{"question": "q1", "answer": ["14 December 1972", "December 1972"]}, {"question": "q2", "answer": ["7"]}]
ANSWER = {"Value": "Sunset Boulevard", "Aliases": ["Sunset Blvd.", "Sunset Boulevard"],
          "NormalizedAliases": ["sunset blvd", "sunset boulevard"]}  # fmt: skip
TRIVIA = {
    "Data": [
        {"QuestionId": "t1", "Question": "q", "Answer": ANSWER,
         "EntityPages": [{"Filename": "Webber.txt"}], "SearchResults": [{"Filename": "35/35_995.txt"}]},
    ],
    "Domain": "Wikipedia", "VerifiedEval": False, "Version": 1.0,
}  # fmt: skip
FILES = {
    "squad_v2": json.dumps(SQUAD),
    "nq_open": "".join(json.dumps(line) + "\n" for line in NQ),
    "webquestions": json.dumps([{"qId": "w0", "qText": "q", "answers": ["A b", "c"]}]),
    "triviaqa": json.dumps(TRIVIA),
}


def run(tmp_path, task, content, predictions, suffix=".json"):
    (tmp_path / "data.json").write_text(content)
    (tmp_path / f"p{suffix}").write_text(predictions)
    command = ["--task", task, "--data", tmp_path / "data.json", "--score", tmp_path / f"p{suffix}"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch("sys.argv", ["evals.qa", *map(str, command)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            guard("evals.qa", eval_qa.main)  # in this process: two dozen starts of Python with torch take a minute
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_squad_with_its_two_kinds_of_questions(tmp_path):
    shown = run(tmp_path, "squad_v2", FILES["squad_v2"], json.dumps({"1": "a big cat", "2": "", "3": ""}))
    result = json.loads(shown.stdout)["squad_v2"]
    assert result["HasAns"] == {"em": 0, "f1": pytest.approx((2 / 3 + 0) / 2), "of": 2}
    assert result["NoAns"] == {"em": 1, "f1": 1, "of": 1}
    assert result["em"] == pytest.approx(1 / 3) and result["f1"] == pytest.approx((2 / 3 + 1) / 3)


@pytest.mark.parametrize(
    "task, predictions, em, f1",
    [
        ("nq_open", {"q1": "december 1972.", "q2": "seven"}, 0.5, 0.5),
        ("webquestions", {"w0": "the C"}, 1, 1),
        ("triviaqa", {"t1": "sunset-blvd"}, 1, 1),
        ("triviaqa", {"t1": "Sunset"}, 0, 2 / 3),
    ],
)
def test_any_right_answer_counts(tmp_path, task, predictions, em, f1):
    result = json.loads(run(tmp_path, task, FILES[task], json.dumps(predictions)).stdout)[task]
    assert result["em"] == em and result["f1"] == pytest.approx(f1)


def read(tmp_path, task, content):
    (tmp_path / "data.json").write_text(json.dumps(content))
    return qa.read_task(task, tmp_path / "data.json")


def test_an_answer_without_words_stays_right(tmp_path):
    """ "A+" is a blood type: the article goes, and the plus. Only SQuAD v2's script drops such answers."""
    content = '{"question": "q1", "answer": ["A+", "AB"]}\n{"question": "q2", "answer": ["7"]}\n'
    for given, em in (("A+", 0.5), ("a", 0.5), ("AB", 0.5), ("O", 0)):
        result = run(tmp_path, "nq_open", content, json.dumps({"q1": given, "q2": "8"}))
        assert json.loads(result.stdout)["nq_open"] == {"em": em, "f1": 0.5 * (given == "AB"), "of": 2}
    squad = json.loads(FILES["squad_v2"].replace('"cat"', '"A+"'))
    question = read(tmp_path, "squad_v2", squad)[:1]
    assert qa.score("squad_v2", question, {"1": "A+"})["em"] == 0 == qa.score("squad_v2", question, {"1": ""})["f1"]
    squad["data"][0]["paragraphs"][0]["qas"][0]["answers"] = [{"text": "A+", "answer_start": 0}]
    question = read(tmp_path, "squad_v2", squad)[:1]  # none left: no answer is right
    assert qa.score("squad_v2", question, {"1": ""}) | {"HasAns": 0, "NoAns": 0} == {
        "em": 1, "f1": 1, "of": 1, "HasAns": 0, "NoAns": 0}  # fmt: skip


def test_the_web_domain_is_asked_of_questions_and_documents(tmp_path):
    assert [q.id for q in read(tmp_path, "triviaqa", TRIVIA)] == ["t1"]
    web = read(tmp_path, "triviaqa", TRIVIA | {"Domain": "Web"})
    assert [q.id for q in web] == ["t1--Webber.txt", "t1--35/35_995.txt"]
    assert all(q.answers == ["sunset blvd", "sunset boulevard"] and q.shown == "Sunset Boulevard" for q in web)
    assert qa.score("triviaqa", web, {"t1--Webber.txt": "Sunset Blvd", "t1--35/35_995.txt": "no"})["em"] == 0.5


def test_a_verified_set_counts_what_people_verified(tmp_path):
    """Its verified questions, with the answers people gave; in the Web domain its verified documents."""
    first = TRIVIA["Data"][0] | {"QuestionPartOfVerifiedEval": True, "Answer": ANSWER | {"HumanAnswers": ["The Blvd!"]}}
    first |= {"EntityPages": [{"Filename": "Webber.txt", "DocPartOfVerifiedEval": False}],
              "SearchResults": [{"Filename": "35/35_995.txt", "DocPartOfVerifiedEval": True}]}  # fmt: skip
    other = TRIVIA["Data"][0] | {"QuestionId": "t2", "QuestionPartOfVerifiedEval": False}
    verified = TRIVIA | {"Data": [other, first], "VerifiedEval": True}
    questions = read(tmp_path, "triviaqa", verified)
    assert [q.id for q in questions] == ["t1"] and qa.score("triviaqa", questions, {"t1": "blvd"})["em"] == 1
    assert [q.id for q in read(tmp_path, "triviaqa", verified | {"Domain": "Web"})] == ["t1--35/35_995.txt"]
    assert [q.id for q in read(tmp_path, "triviaqa", verified | {"VerifiedEval": False})] == ["t2", "t1"]


def test_predictions_as_lines(tmp_path):
    lines = '{"question": "q1", "prediction": "December 1972"}\n{"question": "q2", "prediction": "7"}\n'
    assert json.loads(run(tmp_path, "nq_open", FILES["nq_open"], lines, ".jsonl").stdout)["nq_open"]["em"] == 1


BAD = [
    ("squad_v2", FILES["squad_v2"].replace('"is_impossible": true', '"is_impossible": false'), "question 1"),
    ("squad_v2", FILES["squad_v2"].replace('"id": "3", ', ""), "question 2"),
    ("tydiqa_goldp", FILES["squad_v2"], "no answer"),
    ("nq_open", FILES["nq_open"].replace('"answer": ["7"]', '"answers": ["7"]'), "line 2"),
    ("nq_open", FILES["nq_open"] + "{", "line 3"),
    ("webquestions", FILES["webquestions"].replace("qId", "id"), "question 0"),
    ("triviaqa", FILES["triviaqa"].replace("NormalizedAliases", "Alias"), "question 0"),
    ("triviaqa", FILES["triviaqa"].replace("Domain", "Domains"), "layout"),
    ("triviaqa", "[]", "layout"),
    ("nq_open", FILES["nq_open"].replace('["7"]', '"7"'), "line 2"),  # a string is not a list of its letters
    ("nq_open", FILES["nq_open"].replace('["7"]', "[7]"), "line 2"),
    ("nq_open", FILES["nq_open"].replace('"q2"', "null"), "line 2"),
    ("webquestions", FILES["webquestions"].replace('["A b", "c"]', '"Paris"'), "question 0"),
    ("webquestions", FILES["webquestions"].replace('"q"', "5"), "question 0"),
    ("triviaqa", FILES["triviaqa"].replace('["sunset blvd", "sunset boulevard"]', '"Paris"'), "question 0"),
    ("triviaqa", FILES["triviaqa"].replace('"Value": "Sunset Boulevard"', '"Value": 1'), "question 0"),
    ("squad_v2", FILES["squad_v2"].replace('"text": "Paris"', '"text": 5'), "question 2"),
    ("squad_v2", "{", "line 1"),
]


@pytest.mark.parametrize("task, content, word", BAD)
def test_bad_data_is_named(tmp_path, task, content, word):
    shown = run(tmp_path, task, content, "{}")
    assert shown.returncode == 2 and word in shown.stderr and "data.json" in shown.stderr, shown.stderr
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize("aliases", ['"Paris"', "[1]", "null"])
def test_the_aliases_of_a_line_are_a_list_of_strings(tmp_path, aliases):
    path = tmp_path / "data.jsonl"
    path.write_text(f'{{"question": "q", "answer": {{"value": "Paris", "aliases": {aliases}}}}}')
    with pytest.raises(UserError, match="line 1: .* list of aliases"):
        qa.read_task("triviaqa", path)


@pytest.mark.parametrize(
    "predictions, word", [("{}", "'q1'"), ("[1]", "object"), ('{"q1": 3, "q2": "a"}', "object"), ("{", "line 1")]
)
def test_bad_predictions_are_named(tmp_path, predictions, word):
    shown = run(tmp_path, "nq_open", FILES["nq_open"], predictions)
    assert shown.returncode == 2 and word in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr


def test_an_id_that_comes_again_gets_a_number(tmp_path):
    (tmp_path / "d.json").write_text(FILES["squad_v2"].replace('"id": "3"', '"id": "1"'))
    assert [q.id for q in qa.read_task("squad_v2", tmp_path / "d.json")] == ["1", "2", "1#2"]


@pytest.mark.parametrize("task", FILES)
def test_a_byte_order_mark_is_no_text(tmp_path, task):
    plain, marked = tmp_path / "plain.json", tmp_path / "marked.json"
    plain.write_text(FILES[task])
    marked.write_text("\ufeff" + FILES[task])
    assert qa.read_task(task, marked) == qa.read_task(task, plain)


def test_lone_surrogates_are_replaced(tmp_path):
    """In the data and in the predictions, so that they find each other."""
    (tmp_path / "d.json").write_text(FILES["squad_v2"].replace('"who"', r'"who \ud83d"'))
    assert qa.read_task("squad_v2", tmp_path / "d.json")[0].question == "who \ufffd"
    content, given = FILES["nq_open"].replace("q2", r"q2 \ud83d"), r'{"q1": "December 1972", "q2 \ud83d": "7 \udc00"}'
    assert json.loads(run(tmp_path, "nq_open", content, given).stdout)["nq_open"]["em"] == 0.5


def test_right_answers_score_one(tmp_path):
    for task, content in FILES.items():
        (tmp_path / "d.json").write_text(content)
        questions = qa.read_task(task, tmp_path / "d.json")
        best = {q.id: q.answers[-1] if q.answers else "" for q in questions}
        result = qa.score(task, questions, best)
        assert result["em"] == result["f1"] == 1 and result["of"] == len(questions)
