import json
import random
import zipfile

import pytest

from engine.errors import UserError
from evals import metrics, superglue
from processes import script

LINES = {
    "BoolQ": [{"question": "is it", "passage": "It is.", "idx": 0, "label": True},
              {"question": "is it not", "passage": "It is.", "idx": 1, "label": False}],
    "CB": [{"premise": "p", "hypothesis": "h", "label": "contradiction", "idx": 0},
           {"premise": "p", "hypothesis": "g", "label": "entailment", "idx": 1},
           {"premise": "p", "hypothesis": "f", "label": "neutral", "idx": 2}],
    "COPA": [{"premise": "p.", "choice1": "A.", "choice2": "B.", "question": "cause", "label": 1, "idx": 0},
             {"premise": "p.", "choice1": "A.", "choice2": "B.", "question": "effect", "label": 0, "idx": 1}],
    "MultiRC": [{"idx": 0, "passage": {"text": "t", "questions": [
        {"question": "q", "idx": 0,
         "answers": [{"text": "a", "idx": 0, "label": 1}, {"text": "b", "idx": 1, "label": 0}]},
        {"question": "r", "idx": 1, "answers": [{"text": "c", "idx": 2, "label": 1}]}]}}],
    "ReCoRD": [{"idx": 0, "passage": {"text": "Ann met Bob Ray.",
                                      "entities": [{"start": 0, "end": 2}, {"start": 8, "end": 14}]},
                "qas": [{"idx": 5, "query": "@placeholder was met",
                         "answers": [{"start": 8, "end": 14, "text": "Bob Ray"}]}]}],
    "RTE": [{"premise": "p", "hypothesis": "h", "label": "not_entailment", "idx": 0},
            {"premise": "p", "hypothesis": "g", "label": "entailment", "idx": 1}],
    "WiC": [{"word": "w", "sentence1": "a ws", "sentence2": "w b", "idx": 0, "label": False, "start1": 2, "start2": 0,
             "end1": 4, "end2": 1}],
    "WSC": [{"text": "Ann saw that she won .", "idx": 0, "label": True,
             "target": {"span1_index": 0, "span2_index": 3, "span1_text": "Ann", "span2_text": "she"}}],
    "AX-b": [{"sentence1": "p", "sentence2": "h", "label": "entailment", "idx": "0", "logic": ""},
             {"sentence1": "p", "sentence2": "g", "label": "not_entailment", "idx": "1", "logic": ""}],
    "AX-g": [{"premise": "p", "hypothesis": "h", "label": "entailment", "idx": 0, "pair_id": 551646},
             {"premise": "q", "hypothesis": "h", "label": "not_entailment", "idx": 1, "pair_id": 551648}],
}  # fmt: skip


@pytest.fixture
def data(tmp_path):
    for task, rows in LINES.items():
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        name = f"{task}.jsonl" if task.startswith("AX") else "val.jsonl"
        (folder / name).write_text("\n".join(json.dumps(row) for row in rows))  # no newline at the end, as in AX-g
    return tmp_path / "data"


def unlabelled(task, line):
    """A line of a data file as it stands in a test set."""
    line = json.loads(json.dumps(line))
    line.pop("label", None)
    for question in line["passage"]["questions"] if task == "MultiRC" else []:
        for answer in question["answers"]:
            del answer["label"]
    for query in line.get("qas", []):
        del query["answers"]
    return line


@pytest.fixture
def tests(data):
    """The same with the test sets of the eight tasks: other idx, no labels."""
    for task in superglue.MAIN:
        rows = [unlabelled(task, row) for row in LINES[task]]
        (data / task / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def gold(data, task):
    examples = superglue.read_task(task, superglue.split_file(data, task, "val"))
    return {e.key: e.gold[0] if task == "ReCoRD" else e.gold for e in examples}


def run(*args):
    return script("eval_superglue.py", *args)


# ---- metrics, by hand


def test_f1_of_three_labels_with_one_absent():
    """c: 1 hit, 2 predicted, 1 true: 2/3; e: 1 hit, 1 predicted, 2 true: 2/3; n: nowhere: 0."""
    value = metrics.macro_f1(["c", "c", "e"], ["c", "e", "e"], ["e", "c", "n"])
    assert value == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_matthews_by_hand():
    predicted, gold = list("aaabbbbb"), list("aabbbbba")  # tp 2, fp 1, fn 1, tn 4
    assert metrics.mcc(predicted, gold, "a") == pytest.approx((2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5)
    assert metrics.mcc(["a"] * 8, gold, "a") == 0 and metrics.mcc(gold, gold, "a") == 1
    assert metrics.mcc(["b" if g == "a" else "a" for g in gold], gold, "a") == -1


@pytest.mark.parametrize(
    "predicted, answer, em, f1",
    [
        ("The  Cat!", "cat", 1, 1),
        ("an apple a day", "apple day", 1, 1),
        ("New York City", "york", 0, 0.5),
        ("", "cat", 0, 0),
        ("cat cat dog", "cat dog dog", 0, 2 / 3),
        ("U.S.", "us", 1, 1),
    ],
)
def test_squads_normalisation(predicted, answer, em, f1):
    assert metrics.exact(predicted, answer) == em and metrics.token_f1(predicted, answer) == pytest.approx(f1)


@pytest.mark.parametrize("predicted, answer", [("", ""), ("the", ""), ("a", "A+"), ("*", ",")])
def test_two_answers_of_no_words_are_equal_and_share_none(predicted, answer):
    """F1 is 0 in the scripts of SQuAD 1.1, ReCoRD, TriviaQA and T5; SQuAD v2's counts it 1."""
    assert metrics.exact(predicted, answer) == 1 and metrics.token_f1(predicted, answer) == 0
    assert metrics.token_f1(predicted, answer, empty=1.0) == 1


def test_trivias_normalisation_puts_blanks():
    assert metrics.normalise("Rock-and_roll’s", trivia=True) == "rock and roll s"
    assert metrics.normalise("Rock-and_roll") == "rockandroll"


def test_parity_counts_pairs():
    assert metrics.parity(["e", "e", "n", "e"], [1, 1, 2, 2]) == 0.5


def test_neighbours_are_pairs_whatever_their_pair_id(tmp_path):
    """As in the real file: 2k and 2k + 1 differ in the pronoun alone, and `pair_id` on every line."""
    path, pronouns = tmp_path / "AX-g.jsonl", ("his", "her", "her", "his")
    rows = [{"hypothesis": f"The accountant {i // 2} sought help.", "idx": i, "label": "not_entailment",
             "pair_id": 551646 + 2 * i, "premise": f"The accountant {i // 2} met {word} boss."}
            for i, word in enumerate(pronouns)]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in reversed(rows)))
    examples, n = superglue.read_task("AX-g", path), "not_entailment"
    for guesses, parity in (([n, n, n, n], 1), ([n, "entailment", n, n], 0.5), (["entailment", n] * 2, 0)):
        scores = superglue.score_task("AX-g", examples, {(i,): guess for i, guess in enumerate(guesses)})
        assert scores["gender_parity"] == parity


# ---- tasks


def test_right_answers_score_one_everywhere(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for task in superglue.TASKS:
        superglue.write_predictions(out, task, gold(data, task))
    shown = run("--score", out, "--data", data)
    result = json.loads(shown.stdout)
    assert result["of"] == 8 and result["mean"] == 1 and "SuperGLUE score: 1.0000" in shown.stderr
    for task, scores in result["tasks"].items():
        assert set(scores) == {*superglue.TASKS[task].scores, "score"}
        assert all(v == 1 for name, v in scores.items() if name not in ("gender_parity", "score")), task
    assert result["tasks"]["AX-g"]["gender_parity"] == 0


def test_wrong_answers_by_hand(data):
    examples = superglue.read_task("MultiRC", data / "MultiRC" / "val.jsonl")
    scores = superglue.score_task("MultiRC", examples, {(0, 0, 0): 1, (0, 0, 1): 1, (0, 1, 2): 1})
    assert scores == {"f1a": pytest.approx(2 * 2 / (3 + 2)), "em": 0.5, "score": pytest.approx((0.8 + 0.5) / 2)}
    examples = superglue.read_task("ReCoRD", data / "ReCoRD" / "val.jsonl")
    assert examples[0].fields["entities"] == ["Ann", "Bob Ray"]  # `end` is inclusive
    assert superglue.score_task("ReCoRD", examples, {(5,): "bob"}) == {
        "f1": pytest.approx(2 / 3),
        "em": 0,
        "score": pytest.approx(1 / 3),
    }


def test_a_mean_without_a_task_is_called_so(data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for task in set(superglue.MAIN) - {"ReCoRD"}:
        superglue.write_predictions(out, task, gold(data, task))
    shown = run("--score", out, "--data", data)
    assert json.loads(shown.stdout)["of"] == 7 and "7-task mean (without ReCoRD)" in shown.stderr


def test_a_zip_is_read_like_its_folder(data, tmp_path):
    superglue.baseline(data, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        for file in (tmp_path / "out").iterdir():
            archive.write(file, file.name)
    assert superglue.score(tmp_path / "out.zip", data) == superglue.score(tmp_path / "out", data)


def test_a_test_set_is_read_without_labels(tests):
    for task in superglue.MAIN:
        labelled, bare = (superglue.read_task(task, tests / task / f"{split}.jsonl") for split in ("val", "test"))
        assert [e.key for e in bare] == [e.key for e in labelled] and not any(e.gold for e in bare)
        assert superglue.split_file(tests, task, "test") == tests / task / "test.jsonl"
    (tests / "RTE" / "val.jsonl").write_text((tests / "RTE" / "test.jsonl").read_text())
    with pytest.raises(UserError, match="no field 'label'"):  # elsewhere labels are not left out
        superglue.read_task("RTE", tests / "RTE" / "val.jsonl")


def test_a_byte_order_mark_is_no_text(data):
    path = data / "RTE" / "val.jsonl"
    before = superglue.read_task("RTE", path)
    path.write_text("\ufeff" + path.read_text())
    assert superglue.read_task("RTE", path) == before


def test_lone_surrogates_are_replaced(data):
    """A pair is one character, and stays."""
    path = data / "RTE" / "val.jsonl"
    path.write_text(path.read_text().replace('"p"', r'"\uD83D \ud83d\ude00 \\ud83d"'))
    assert superglue.read_task("RTE", path)[0].fields["premise"] == "\ufffd \U0001f600 \\ud83d"


def test_a_submission_is_a_zip_of_files_at_its_root(data, tmp_path):
    superglue.baseline(data, tmp_path / "out")
    assert superglue.zip_predictions(tmp_path / "out", tmp_path / "all.zip") == []
    assert set(zipfile.ZipFile(tmp_path / "all.zip").namelist()) == {f"{task}.jsonl" for task in superglue.TASKS}
    assert superglue.score(tmp_path / "all.zip", data) == superglue.score(tmp_path / "out", data)
    (tmp_path / "out" / "WSC.jsonl").unlink()
    assert superglue.zip_predictions(tmp_path / "out", tmp_path / "all.zip") == ["WSC"]


def test_submissions_have_the_official_form(data, tmp_path):
    superglue.baseline(data, tmp_path)
    first = {task: json.loads((tmp_path / f"{task}.jsonl").read_text().splitlines()[0]) for task in superglue.TASKS}
    assert first["BoolQ"]["label"] in ("true", "false") and first["WSC"]["label"] in ("True", "False")
    assert first["COPA"]["label"] in (0, 1) and first["ReCoRD"] == {"idx": 5, "label": "Ann"}
    questions = first["MultiRC"]["passage"]["questions"]
    assert [q["idx"] for q in questions] == [0, 1] and [a["idx"] for a in questions[0]["answers"]] == [0, 1]


# ---- what goes wrong


@pytest.mark.parametrize("task", superglue.TASKS)
@pytest.mark.parametrize("damage", ["field", "label", "json", "twice"])
def test_a_bad_line_is_named(data, tmp_path, task, damage):
    superglue.baseline(data, tmp_path / "out")
    file = superglue.split_file(data, task, "val")
    rows = file.read_text().splitlines()
    line = json.loads(rows[-1])
    place = {"MultiRC": lambda: line["passage"]["questions"][-1]["answers"][0], "ReCoRD": lambda: line["qas"][0]}
    inner = place.get(task, lambda: line)()
    if damage == "field":
        inside = {"MultiRC": "text", "ReCoRD": "query", "AX-b": "sentence1", "WSC": "target"}
        del inner[inside.get(task) or superglue.TASKS[task].fields[0]]
    elif damage == "label":
        inner["answers" if task == "ReCoRD" else "label"] = "perhaps"
    rows[-1] = rows[-1][:-2] if damage == "json" else json.dumps(line)
    if damage == "twice":
        rows.append(rows[-1])
    file.write_text("\n".join(rows))
    shown = run("--score", tmp_path / "out", "--data", data)
    assert shown.returncode == 2 and f"line {len(rows)}" in shown.stderr and str(file) in shown.stderr, shown.stderr
    assert shown.stderr.count("\n") == 1 and not shown.stdout


@pytest.mark.parametrize("task", superglue.TASKS)
def test_a_bad_prediction_is_named(data, tmp_path, task):
    superglue.baseline(data, tmp_path)
    file = tmp_path / f"{task}.jsonl"
    good, first = file.read_text(), superglue.read_predictions(task, file)[next(iter(gold(data, task)))]
    for bad, word in (
        (good + good, f"line {len(good.splitlines()) + 1}"),
        (good.replace('"label"', '"lable"'), "line 1"),
        (good.replace(json.dumps(first), "7.5"), "line 1"),
        ("", "missing"),
        ("nonsense", "line 1"),
    ):
        file.write_text(bad)
        with pytest.raises(UserError, match=word):
            superglue.score(tmp_path, data)


def test_predictions_that_are_not_there(data, tmp_path):
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        shown = run("--score", place, "--data", data)
        assert shown.returncode == 2 and str(place) in shown.stderr and shown.stderr.count("\n") == 1


def test_scores_of_random_answers_agree_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = random.Random(0)
    for _ in range(20):
        gold, predicted = ([rng.choice("abc") for _ in range(30)] for _ in range(2))
        expected = sklearn.f1_score(gold, predicted, labels=list("abc"), average="macro", zero_division=0)
        assert metrics.macro_f1(predicted, gold, "abc") == pytest.approx(expected)
        two = [["a" if x == "a" else "b" for x in values] for values in (gold, predicted)]
        assert metrics.mcc(two[1], two[0], "a") == pytest.approx(sklearn.matthews_corrcoef(*two))
