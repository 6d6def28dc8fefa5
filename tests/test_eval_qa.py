import json
import random
import sys
from pathlib import Path

import pytest
import torch

import model as transformer
from data import objective
from engine import checkpoint, options
from engine.errors import guard
from engine.runs import load_run
from evals import qa as eval_qa
from evals import qa_files as qa
from evals.spans import Spans, places, windows
from processes import script
from raptr import Subnetwork
from text import prepare


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Run folders of a BERT and a UL2 with their first, random weights."""
    made, tokenizer = {}, (corpus / "tokenizer.model").read_bytes()
    for arch in ("bert", "ul2"):
        out = tmp_path_factory.mktemp(arch) / "run"
        flags = f"--layers 2 --width 32 --heads 2 --seq 64 --dropout 0 --init_std 0.3 --arch {arch} --method full"
        flags += f" --out {out} --positions rotary" if arch == "ul2" else f" --out {out}"
        args = options.parse(flags.split())
        out.mkdir()
        (out / "tokenizer.model").write_bytes(tokenizer)
        (out / "config.json").write_text(json.dumps(vars(args)))
        vocab = prepare.load_tokenizer(out / "tokenizer.model").vocab_size()
        model = transformer.make(transformer.Config.of(args, objective(args, vocab=vocab).model_vocab), seed=1)
        checkpoint.save(out, 0, {"model": {name: p.detach() for name, p in model.named_parameters()}}, {})
        made[arch] = out
    return made


def squad(count, seed=0):
    """Contexts of small words; where one is spelled in capitals, it is the answer."""
    rng, paragraphs = random.Random(seed), []
    for i in range(count):
        words = [rng.choice(["lo", "ri", "mu", "ta"]) for _ in range(rng.randint(4, 24))]
        answers = []
        if rng.random() < 0.6:
            at, answer = rng.randrange(len(words)), rng.choice(["ABBA", "COCA"])
            answers = [{"text": answer, "answer_start": len(" ".join([*words[:at], ""]))}]
            words.insert(at, answer)
        asked = {"id": f"{seed}-{i}", "question": f"what {i}", "answers": answers, "is_impossible": not answers}
        paragraphs.append({"context": " ".join(words), "qas": [asked]})
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    for name, count, seed in (("train", 200, 1), ("dev", 60, 2)):
        (folder / f"{name}.json").write_text(json.dumps(squad(count, seed)))
    lines = [{"question": f"who is {'so ' * (i % 4)}{i}", "answer": [f"name {i}"]} for i in range(40)]
    (folder / "nq.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def main(monkeypatch, *args):
    """The command within this process: its exit code."""
    monkeypatch.setattr(sys, "argv", ["evals.qa", *map(str, args)])
    try:
        guard("evals.qa", eval_qa.main)
    except SystemExit as end:
        return end.code
    return 0


# ---- a UL2 is asked


def test_a_batch_writes_what_one_row_does_without_a_cache(runs):
    model, tokenizer, _ = load_run(runs["ul2"])
    V, rng = tokenizer.vocab_size(), random.Random(0)
    rows = [[V + 1, *rng.choices(range(5, V), k=9), V + 3] for _ in range(8)]
    stop, banned = set(range(5, 125)), list(range(V, model.config.vocab))
    together = model.generate(rows, V + 3, stop, banned, 12)
    for prefix, written in zip(rows, together):
        slow = [V + 3]
        while len(slow) < 13 and slow[-1] not in stop:
            logits = model.logits(torch.tensor([prefix + slow]), torch.tensor([len(prefix)]))[0, -1]
            logits[banned] = -torch.inf
            slow.append(int(logits.argmax()))
        assert written == [token for token in slow[1:] if token not in stop]
    assert len({len(written) for written in together}) > 2  # some stopped early, and went on in the batch without harm
    # One by one, and chosen by hand; over some of the layers: another text.
    assert [model.generate([row], V + 3, stop, banned, 12)[0] for row in rows] == together
    second = lambda logits: logits.topk(2).indices[:, 1]  # noqa: E731
    assert model.generate(rows, V + 3, stop, banned, 12, choose=lambda logits: logits.argmax(-1)) == together
    assert model.generate(rows, V + 3, stop, banned, 12, choose=second) != together
    assert model.generate(rows, V + 3, stop, banned, 12, Subnetwork((0,))) != together
    assert model.generate(rows, V + 3, set(range(V)), banned, 12) == [[]] * 8


def test_rows_of_a_batch_have_one_length():
    rows = [[0] * random.Random(i).randrange(5) for i in range(50)]
    found = eval_qa.equal_length(rows, 4)
    assert sorted(i for part in found for i in part) == list(range(50)) and max(map(len, found)) == 4
    assert all(len({len(rows[i]) for i in part}) == 1 for part in found)


def test_examples_depend_on_seed_task_and_question_and_never_are_the_question(files):
    pool = qa.read_task("nq_open", files / "nq.jsonl")
    draws = {q.id: [other.id for other in eval_qa.examples("nq_open", q, pool, 3, 0)] for q in pool}
    assert all(len(set(drawn)) == 3 and id not in drawn for id, drawn in draws.items())
    assert draws == {q.id: [other.id for other in eval_qa.examples("nq_open", q, pool, 3, 0)] for q in reversed(pool)}
    assert len(set(map(tuple, draws.values()))) > 30
    assert draws[pool[0].id] != [other.id for other in eval_qa.examples("nq_open", pool[0], pool, 3, 1)]


def test_what_does_not_fit_goes_from_the_front(runs):
    tokenizer = load_run(runs["ul2"])[1]
    asked, others = qa.Question("1", "what is it", ["x"], "a text of some words"), [
        qa.Question(str(i), "who " * i, [f"answer {i}"] if i != 2 else []) for i in (1, 2, 3)]  # fmt: skip
    whole, shown, cut = eval_qa.prompt(tokenizer, asked, others, 1000)
    assert (shown, cut) == (3, False)
    assert tokenizer.decode(whole).endswith("a text of some words\nQuestion: what is it\nAnswer:")
    assert "Answer: answer 1\n\n" in tokenizer.decode(whole) and "who who \nAnswer: unanswerable" in tokenizer.decode(
        whole
    )
    fewer, shown, cut = eval_qa.prompt(tokenizer, asked, others, len(whole) - 1)
    assert (shown, cut) == (2, False) and whole[-len(fewer) :] == fewer and "answer 1" not in tokenizer.decode(fewer)
    least, shown, cut = eval_qa.prompt(tokenizer, asked, others, 20)
    assert (shown, cut, least) == (0, True, whole[-20:])


def test_a_stopped_run_goes_on_and_its_file_can_be_scored(runs, files, tmp_path, monkeypatch, capsys):
    flags = ["--task", "nq_open", "--data", files / "nq.jsonl"]
    asking = [*flags, "--shots", 1, runs["ul2"], "--out", tmp_path / "out", "--batch", 3, "--tokens", 4]
    shown = script("evals.qa", *asking)
    assert shown.returncode == 0 and "of 1 examples (from --data" in shown.stdout, shown.stderr
    first, written = (tmp_path / "out" / "predictions.json").read_text(), tmp_path / "out" / "runs" / "0.jsonl"
    lines = written.read_bytes().splitlines(True)
    assert len(lines) == len(json.loads(first)) == 40 and len(set(json.loads(first).values())) > 5
    written.write_bytes(b"".join(lines[:17]) + lines[17][:9])  # killed while it wrote
    (tmp_path / "out" / "runs" / "0.json").unlink()
    asked, generate = [], transformer.UL2.generate
    monkeypatch.setattr(
        transformer.UL2, "generate", lambda model, rows, *how: asked.append(len(rows)) or generate(model, rows, *how)
    )
    assert main(monkeypatch, *asking) == 0 and (tmp_path / "out" / "predictions.json").read_text() == first
    assert 0 < sum(asked) < 30
    asked.clear()
    assert main(monkeypatch, *asking) == 0 and not asked
    capsys.readouterr()
    assert main(monkeypatch, *flags, "--score", tmp_path / "out" / "predictions.json") == 0
    score = json.loads(capsys.readouterr().out)["nq_open"]
    assert (
        score["of"] == 40 and score["em"] == json.loads((tmp_path / "out" / "results.json").read_text())["median"]["em"]
    )
    assert main(monkeypatch, *asking, "--tokens", 5) == 2 and "other settings" in capsys.readouterr().err


def test_a_limit_takes_the_same_questions_each_time(files):
    everything = qa.read_task("nq_open", files / "nq.jsonl")
    few, more = eval_qa.some(everything, 8), eval_qa.some(everything, 20)
    assert len(few) == 8 and set(q.id for q in few) < set(q.id for q in more) and few != everything[:8]
    assert eval_qa.some(everything, 0) == eval_qa.some(everything, 99) == everything


# ---- a BERT marks the answer


def test_tokens_know_their_places(runs):
    tokenizer = load_run(runs["bert"])[1]
    text = "Ab ☃☃ naïve 𝄞\n\n of  the “wall”, 3.5▁km"
    ids, found = places(tokenizer, text)
    assert ids == tokenizer.encode(text) and {i for b, e in found for i in range(b, e)} == set(range(len(text)))
    for at in range(len(ids)):  # a token's own text, and what ends with it
        if not tokenizer.is_byte(ids[at]):
            b, e = found[at]
            assert text[b:e].replace(" ", "▁") == tokenizer.id_to_piece(ids[at])
            assert tokenizer.decode(ids[: at + 1]) == text[:e].replace("▁", " ")


def test_wordpiece_knows_its_places(tmp_path):
    pytest.importorskip("tokenizers")
    from tools import hf

    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cafe", "##s", "open", "."])
    )
    text = "Cafés  OPEN ☃."
    ids, found = places(hf.WordPiece(tmp_path / "vocab.txt"), text)
    assert [text[b:e] for b, e in found] == ["Café", "s", "OPEN", "☃", "."] and len(ids) == 5


@pytest.mark.parametrize("longest, stride", [(64, 20), (40, 9), (32, 100)])
def test_windows_cover_the_context_and_labels_are_the_answers(runs, files, longest, stride):
    tokenizer = load_run(runs["bert"])[1]
    questions = qa.read_task("squad_v2", files / "train.json")
    found = windows(tokenizer, questions, longest, stride, "train.json")
    labelled, seen = set(), {}
    for w in found:
        question, (first, last) = questions[w.question], w.label
        assert len(w.tokens) <= longest and len(w.places) <= len(w.tokens) - w.first - 1
        seen.setdefault(w.question, set()).update(w.places)
        if w.label != (0, 0):
            begin, end = w.places[first - w.first][0], w.places[last - w.first][1]
            assert question.context[begin:end].strip() == question.answers[0]
            labelled.add(w.question)
    assert all(seen[i] == set(places(tokenizer, q.context)[1]) for i, q in enumerate(questions))
    answerable = {i for i, q in enumerate(questions) if q.answers}
    assert labelled == answerable if stride < 40 else labelled <= answerable and len(found) > len(questions)


def test_the_best_span_against_trying_all(runs, files):
    """And padding does not change it: all windows at once, one at a time."""
    model, tokenizer, _ = load_run(runs["bert"])
    part = windows(tokenizer, qa.read_task("squad_v2", files / "dev.json")[:6], 48, 16)
    marker = Spans(model, tokenizer, 0).eval()
    for w, (value, first, last, nothing) in zip(part, marker.best(part, 3), strict=True):
        begin, end = marker([w])[0].detach().unbind(-1)
        context = range(w.first, w.first + len(w.places))
        tried = {(i, j): float(begin[i] + end[j]) for i in context for j in context if i <= j < i + 3}
        assert tried[first, last] == pytest.approx(max(tried.values()), abs=1e-4) == pytest.approx(value, abs=1e-4)
        assert nothing == pytest.approx(float(begin[0] + end[0]), abs=1e-4) and nothing > -100  # [CLS] has a score


def test_fine_tuning_learns_to_mark_and_to_decline(runs, files, tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "out", ["--task", "squad_v2", "--data", files / "dev.json"]
    learning = [*flags, "--finetune", runs["bert"], "--train", files / "train.json", "--out", out, "--longest", 40]
    learning += ["--stride", 12, "--epochs", 4, "--lr", "5e-3", "--batch", 16, "--dropout", 0]
    assert main(monkeypatch, *learning) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["median"]["HasAns"]["em"] > 0.9 and results["median"]["NoAns"]["em"] > 0.9, results
    assert len(results["runs"][0]) == 4 and "no answer everywhere" in capsys.readouterr().out
    assert main(monkeypatch, *flags, "--score", out / "predictions.json") == 0
    assert json.loads(capsys.readouterr().out)["squad_v2"]["HasAns"] == results["median"]["HasAns"]
    before = (out / "runs" / "0.json").stat().st_mtime_ns
    assert main(monkeypatch, *learning, "--seeds", 1) == 0 and (out / "runs" / "0.json").stat().st_mtime_ns == before
    assert main(monkeypatch, *learning, "--lr", "1e-3") == 2 and "other settings" in capsys.readouterr().err


# ---- what is wrong is said


LEARN = ["--finetune", "bert", "--train"]
BAD = [
    (["--shots", "1", "bert"], "BERT"),
    (["--shots", "x", "ul2"], "--shots"),
    (["--shots", "1", "nowhere"], "nowhere"),
    (["--shots", "1", "ul2", "--tokens", "60"], "--tokens 60"),
    (["--shots", "1", "ul2", "--train", "bad.json"], "bad.json, article 0, paragraph 7"),
    (["--finetune", "ul2", "--train", "train.json"], "UL2"),
    (["--finetune", "bert"], "--train"),
    ([*LEARN, "train.json", "--longest", "9"], "--longest"),
    ([*LEARN, "none.json"], "none.json"),
    ([*LEARN, "moved.json"], "moved.json, question '1-"),
    ([*LEARN, "train.json", "--task", "nq_open"], "no context"),
]


@pytest.mark.parametrize("flags, word", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(runs, files, tmp_path, monkeypatch, capsys, flags, word):
    text = (files / "train.json").read_text()
    bad, moved = json.loads(text), text.replace('"answer_start": ', '"answer_start": 1')
    del bad["data"][0]["paragraphs"][7]["qas"][0]["question"]
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    (tmp_path / "moved.json").write_text(moved)
    (tmp_path / "train.json").write_text(text)
    flags = [str(runs.get(f, f)) if f in runs else str(tmp_path / f) if Path(f).suffix else f for f in flags]
    given = ["--task", "squad_v2", "--data", files / "dev.json", "--out", tmp_path / "out", *flags]
    assert main(monkeypatch, *given) == 2 and not (tmp_path / "out").exists()
    shown = capsys.readouterr().err
    assert word in shown and shown.count("\n") == 1
