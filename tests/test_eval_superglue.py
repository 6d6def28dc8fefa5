import contextlib
import json
import math
import random
import shutil
import zipfile

import pytest
import torch

import eval_superglue
from engine import checkpoint
from engine.errors import UserError
from engine.runs import load_run
from evals import superglue
from evals.finetune import Trainer, batches, median_run, run_seeds, set_dropout
from model import BERT, Config
from test_superglue import LINES, data, run, tests, unlabelled  # noqa: F401


def classifier(folder, task):
    model, tokenizer, _ = load_run(folder)
    return eval_superglue.Classifier(model, tokenizer, task, 32, 0)


def ranker(folder, task, **more):
    model, tokenizer, _ = load_run(folder)
    return eval_superglue.Ranker(model, tokenizer, task, 0, **more)


def examples(task):
    return [example for line in LINES[task] for example in superglue.read_example(task, line)]


def test_prompts_are_the_published_ones():
    shown = {task: eval_superglue.prompt(task, examples(task)[0].fields) for task in superglue.TASKS}
    assert shown["BoolQ"] == ("It is.\nQuestion: is it?\nAnswer:", {" no": "false", " yes": "true"})
    assert shown["COPA"] == ("p because", {" a.": 0, " b.": 1})
    assert (
        shown["RTE"]
        == shown["AX-b"]
        == ("p\nQuestion: h True or False?\nAnswer:", {" True": "entailment", " False": "not_entailment"})
    )
    assert shown["MultiRC"][0] == "t\nQuestion: q\nAnswer: a\nIs the answer correct?"
    assert shown["ReCoRD"] == ("Ann met Bob Ray.\n\n", {"  - Ann was met": "Ann", "  - Bob Ray was met": "Bob Ray"})
    assert shown["WiC"][0].endswith("Is the word 'ws' used in the same way in the two sentences above?\nAnswer:")
    assert shown["WSC"][0] == (
        "Passage: Ann saw that *she* won.\nQuestion: In the passage above, does the pronoun "
        '"*she*" refer to "*Ann*"?\nAnswer:'
    )


def test_prompts_of_odd_lines():
    """A blank at the end of COPA's premise, highlights in ReCoRD, quotes and a capital noun in WSC."""
    premise = {"premise": "It rained. ", "choice1": "A.", "choice2": "B.", "question": "effect"}
    assert eval_superglue.prompt("COPA", premise)[0] == "It rained therefore"
    passage = {"passage": "One.\n@highlight\ntwo\n@highlight\nthree!", "query": "@placeholder", "entities": ["b", "a"]}
    assert eval_superglue.prompt("ReCoRD", passage) == ("One.\n\n  - two.\n  - three!.\n", {"  - a": "a", "  - b": "b"})
    asked = eval_superglue.text_to_text("ReCoRD", passage)[0]
    assert asked == "record query: @placeholder entities: a, b passage: One. two. three!"
    f = {"passage": "<b>Sent 1: </b>So.<br><b>Sent 2: </b>No.", "question": "q", "answer": "a"}
    asked = eval_superglue.text_to_text("MultiRC", f)[0]
    assert asked == "multirc question: q answer: a paragraph: Sent 1: So. Sent 2: No."
    f = {"text": 'The dog ( Rex ) did n\'t bark . "Good for him," she said , and  left. ', "span1_text": "the dog",
         "span1_index": 0, "span2_text": "him", "span2_index": 11}  # fmt: skip
    assert eval_superglue.starred(f) == 'The dog ( Rex ) did n\'t bark . "Good for *him* ," she said , and left.'
    passage, asked, _ = eval_superglue.prompt("WSC", f)[0].split("\n")
    assert passage == 'Passage: The dog (Rex) didn\'t bark."Good for *him*,"she said, and left.'
    assert asked.endswith('does the pronoun "*him*" refer to "*The dog*"?')


@pytest.mark.parametrize("index, place", [(5, 5), (4, 5), (2, 2), (1, 2)])
def test_stars_stand_around_the_pronoun(index, place):
    """`span2_index` may point at the word before, as in the real validation example 42."""
    words = "might want it to use it , but".split()
    f = {"text": " ".join(words), "span2_text": "it", "span2_index": index}
    assert eval_superglue.starred(f).split()[place] == "*it*"


def test_inputs_are_t5s():
    shown = {task: eval_superglue.text_to_text(task, examples(task)[0].fields) for task in superglue.TASKS}
    assert shown["RTE"] == (
        "rte hypothesis: h premise: p",
        {"entailment": "entailment", "not_entailment": "not_entailment"},
    )
    assert shown["COPA"] == ("copa choice1: A. choice2: B. premise: p. question: cause", {"choice1": 0, "choice2": 1})
    assert shown["BoolQ"][0] == "boolq passage: It is. question: is it"
    assert shown["ReCoRD"][0] == "record query: @placeholder was met entities: Ann, Bob Ray passage: Ann met Bob Ray."
    for task, (_, choices) in shown.items():
        assert task == "ReCoRD" or set(choices.values()) == set(superglue.TASKS[task].labels)


def test_a_likelihood_is_the_sum_over_the_answer(runs):
    """Against one row at a time, one token at a time."""
    own = ranker(runs["ul2"], "BoolQ")
    rows = [own.row("some words and more", choice) for choice in (" no", " yes", " it may be so")]
    with torch.no_grad():
        together = own(rows)
        for (tokens, prefix), value in zip(rows, together):
            total = 0.0
            for at in range(prefix + 1, len(tokens)):  # behind <0>
                logits = own.model.logits(torch.tensor([tokens[:at]]), torch.tensor([prefix]))[0, -1]
                total += logits.log_softmax(-1)[tokens[at]].item()
            assert value.item() == pytest.approx(total, abs=1e-3)


def test_every_right_answer_of_a_query_is_learned(runs):
    """A BERT: their probabilities add up, and none of their scores is pushed down. A UL2: each is an example."""
    example = examples("ReCoRD")[0]._replace(gold=["Ann", "Bob Ray"])
    example.fields["entities"] = ["Ann", "it", "Bob Ray"]
    own = classifier(runs["bert"], "ReCoRD").eval()
    ready = own.prepare([example])
    assert ready[0].right == [0, 2]
    scores = own.scores(ready)[0].detach().requires_grad_()
    own.scores = lambda ready: [scores]
    loss = own.loss(ready)
    loss.backward()
    chances = scores.detach().softmax(0)
    assert loss.item() == pytest.approx(-math.log(chances[0] + chances[2]), abs=1e-5)
    assert scores.grad[0] < 0 and scores.grad[2] < 0 and scores.grad[1] > 0
    own = ranker(runs["ul2"], "ReCoRD").eval()
    ready = own.prepare([example])
    with torch.no_grad():
        assert own.loss(ready).item() == pytest.approx(-own.scores(ready)[0][ready[0].right].mean().item(), abs=1e-4)


def test_a_query_with_many_candidates_is_answered_in_parts(runs):
    example = examples("ReCoRD")[0]
    example.fields["entities"] = [f"{i} {'words ' * (i % 7)}" for i in range(300)]
    own = classifier(runs["bert"], "ReCoRD").eval()
    ready, sizes = own.prepare([example]), []
    whole = own.scores(ready)[0].detach()
    own.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    with torch.no_grad():
        torch.testing.assert_close(own.scores(ready)[0], whole, rtol=1e-4, atol=1e-4)
    assert sizes == [128, 128, 44]


def test_padding_does_not_change_an_answer(runs):
    own = classifier(runs["bert"], "RTE").eval()
    rows = [own.row("one two", "three"), own.row("a longer text of many words here", "and more of it")]
    with torch.no_grad():
        both = own(rows)
        for row, together in zip(rows, both):
            torch.testing.assert_close(own([row])[0], together, rtol=1e-4, atol=1e-4)


def test_what_is_too_long_is_cut():
    class Words:
        encode = staticmethod(lambda text: [len(word) for word in text.split()])
        bos_id, eos_id, pad_id = (staticmethod(lambda i=i: i) for i in (100, 101, 0))

    config = Config(layers=1, width=8, heads=1, mlp=8, vocab=200, seq=12)
    model = eval_superglue.Classifier(BERT(config), Words, "RTE", 50, 0)
    tokens, types = model.row("a bb ccc dddd eeeee ffffff ggggggg", "a bb ccc")
    assert list(tokens) == [100, 1, 2, 3, 4, 5, 6, 101, 1, 2, 3, 101] and list(types) == [0] * 8 + [1] * 4


def test_batches_cover_everything_once():
    lengths = random.Random(1).choices(range(100), k=333)
    for generator in (None, random.Random(0)):
        found = batches(lengths, 8, generator)
        assert sorted(i for part in found for i in part) == list(range(333)) and len(found) == math.ceil(333 / 8)
    spread = [max(lengths[i] for i in part) - min(lengths[i] for i in part) for part in found]
    assert sum(spread) / len(spread) < 20  # of about the same length; of batches drawn at random about 78
    assert batches(lengths, 8, random.Random(1)) != found


def test_a_text_of_a_small_set_meets_many_others():
    lengths, met = random.Random(1).sample(range(100), 64), set()
    for seed in range(20):
        met |= next(set(part) for part in batches(lengths, 8, random.Random(seed)) if 0 in part)
    assert len(met) > 24  # sorted as a whole, the same seven every time


def test_the_median_run_is_the_first_with_the_median_score():
    runs = [{"epochs": [{"f1": 9}, {"f1": value}], "seed": seed} for seed, value in enumerate([3, 1, 2, 1])]
    assert median_run(runs, "f1")["seed"] == 1 and median_run(runs[:3], "f1")["seed"] == 2


def learnable(folder):
    """A BoolQ and an RTE whose answer is one word, and a COPA: files for a few seconds of training."""
    rng = random.Random(0)
    for task in ("BoolQ", "COPA", "RTE"):
        (folder / task).mkdir(parents=True)
        for name, count in (("train", 160), ("val", 40)):
            rows = []
            for i in range(count):
                truth = rng.random() < 0.5
                word = "yes yes yes" if truth else "no no no"
                if task == "BoolQ":
                    rows.append({"question": word, "passage": "is it so", "idx": i, "label": truth})
                elif task == "RTE":
                    label = "entailment" if truth else "not_entailment"
                    rows.append({"premise": word, "hypothesis": "so", "idx": i, "label": label})
                else:
                    choices = ["good good", "bad bad"][:: 1 if truth else -1]
                    rows.append({"premise": "so.", "choice1": choices[0], "choice2": choices[1], "question": "cause",
                                 "idx": i, "label": 0 if truth else 1})  # fmt: skip
            (folder / task / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.parametrize("arch, lr", [("bert", "2e-3"), ("ul2", "2e-3")])
def test_fine_tuning_learns_and_continues(runs, arch, lr, tmp_path):
    folder, out = learnable(tmp_path / "data"), tmp_path / "out"
    (folder / "AX-b").mkdir()
    (folder / "AX-b" / "AX-b.jsonl").write_text("\n".join(map(json.dumps, LINES["AX-b"])))
    bare = [unlabelled("RTE", json.loads(line)) for line in (folder / "RTE" / "val.jsonl").read_text().splitlines()]
    (folder / "RTE" / "test.jsonl").write_text("\n".join(json.dumps(line | {"idx": line["idx"] + 7}) for line in bare))
    flags = ["--finetune", runs[arch], "--data", folder, "--epochs", 4, "--lr", lr, "--out", out, "--dropout", 0]
    flags += ["--seeds", 2]
    tasks = "RTE,COPA" if arch == "bert" else "BoolQ,RTE"  # to compare two texts takes a better UL2 than this one
    shown = run("--tasks", tasks, *flags)
    assert shown.returncode == 0, shown.stderr
    results = json.loads((out / "results.json").read_text())
    assert all(results[task]["median"] > 0.9 for task in results) and len(results["RTE"]["runs"][0]) == 4, results
    assert f"{len(results)}-task mean" in shown.stdout and (out / "val" / "AX-b.jsonl").exists()
    scored = json.loads(run("--score", out / "val", "--data", folder).stdout)
    for task in results:
        assert scored["tasks"][task]["score"] in [epochs[-1]["score"] for epochs in results[task]["runs"]]
    # The test set, here the validation set with other idx: the same answers, in a zip beside those to AX-b.
    val, test = (superglue.read_predictions("RTE", out / split / "RTE.jsonl") for split in ("val", "test"))
    assert test == {(idx + 7,): label for (idx,), label in val.items()}
    assert zipfile.ZipFile(out / "submission.zip").namelist() == ["RTE.jsonl", "AX-b.jsonl"]
    assert f"test sets: {out / 'submission.zip'}; the benchmark's server also wants BoolQ" in shown.stdout
    (out / "runs" / "RTE" / "1.json").unlink()  # as if it had been stopped before the last one
    files = {file: file.stat().st_mtime_ns for file in (out / "runs").glob("*/[01].json")}
    assert run("--tasks", tasks, *flags).returncode == 0
    assert all(file.stat().st_mtime_ns == at for file, at in files.items())
    assert json.loads((out / "results.json").read_text()) == results
    shown = run("--tasks", "RTE", *flags, "--batch", 8)
    assert shown.returncode == 2 and " was made with batch 16, not 8;" in shown.stderr


def test_few_shots(runs, tests, tmp_path):  # noqa: F811
    for task in superglue.MAIN:
        (tests / task / "train.jsonl").write_text((tests / task / "val.jsonl").read_text())
    shown = run("--shots", 2, runs["ul2"], "--data", tests, "--seeds", 2, "--out", tmp_path / "out")
    assert shown.returncode == 0 and "SuperGLUE score" in shown.stdout, shown.stderr
    assert json.loads(run("--score", tmp_path / "out" / "val", "--data", tests).stdout)["of"] == 8
    zipped = zipfile.ZipFile(tmp_path / "out" / "submission.zip")
    assert zipped.namelist() == [f"{task}.jsonl" for task in superglue.TASKS]  # what the benchmark's server wants
    assert f"test sets: {tmp_path / 'out' / 'submission.zip'}\n" in shown.stdout
    for task in superglue.TASKS:
        keys = [set(superglue.read_predictions(task, tmp_path / "out" / s / f"{task}.jsonl")) for s in ("val", "test")]
        assert keys[0] == keys[1] == {example.key for example in examples(task)}
    shown = run("--shots", 2, runs["bert"], "--data", tests, "--out", tmp_path / "no")
    assert shown.returncode == 2 and "BERT" in shown.stderr
    (tests / "CB" / "train.jsonl").unlink()
    shown = run("--shots", 0, runs["ul2"], "--data", tests, "--tasks", "CB", "--out", tmp_path / "none")
    assert shown.returncode == 0 and "1 seed;" in shown.stdout, shown.stderr  # nothing is drawn


@pytest.mark.parametrize("what", ["--baseline", "--finetune"])
def test_data_without_a_task(what, tmp_path):
    shown = run(what, tmp_path / "out", "--data", tmp_path / "typo")
    assert shown.returncode == 2 and "typo: holds no task" in shown.stderr and shown.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_examples_before_a_question_depend_on_seed_task_and_number(runs):
    pool = examples("CB")
    own = ranker(runs["ul2"], "CB", shots=2, examples=pool)
    first = own.few_shot(pool[0], 0)[0]
    assert first == own.few_shot(pool[0], 0)[0] and first.count("\n\n") == 2
    assert len({own.few_shot(pool[0], number)[0] for number in range(20)}) > 2
    assert first.endswith("p\nQuestion: h. True, False, or Neither?\nAnswer:")


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--tasks", "RTF"], "RTF"),
        (["--lr", "0"], "--lr"),
        (["--seeds", "x"], "--seeds"),
        (["--dropout", "1"], "--dropout"),
    ],
)
def test_bad_flags(runs, tmp_path, flags, word):
    shown = run("--finetune", runs["bert"], "--data", learnable(tmp_path / "small"), *flags)
    assert shown.returncode == 2 and word in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr


def test_not_a_run(tmp_path):
    folder, out = learnable(tmp_path / "data"), tmp_path / "out"
    shown = run("--finetune", tmp_path, "--data", folder, "--out", out)
    assert shown.returncode == 2 and f"{tmp_path}: not a run folder" in shown.stderr and not out.exists()
    assert shown.stderr.count("\n") == 1
    (folder / "RTE" / "train.jsonl").unlink()
    shown = run("--finetune", tmp_path, "--data", folder, "--out", out)
    assert shown.returncode == 2 and "no RTE/train.jsonl" in shown.stderr and shown.stderr.count("\n") == 1


def test_dropout_is_everywhere_or_nowhere(runs):
    own = classifier(runs["bert"], "CB").train()
    rows = [own.row("it is so", "is it"), own.row("so it is", "it")]
    set_dropout(own, 0.0)
    assert torch.equal(own(rows), own(rows))
    set_dropout(own, 0.5)
    assert own.encoder.dropout == own.dropout == 0.5 and not torch.equal(own(rows), own(rows))


def test_a_trainer_takes_every_step_and_rises_and_falls():
    weight = torch.nn.Linear(1, 1, bias=False)
    trainer, rates = Trainer(weight, 1.0, 20, 0.25, contextlib.nullcontext()), []
    for _ in range(20):
        before = weight.weight.item()
        trainer.step(lambda batch: weight(batch).sum(), torch.ones(1, 1))
        assert weight.weight.item() < before  # the last step too
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == sorted(rates[:6]) + sorted(rates[6:], reverse=True) and 0 < rates[-1] < 0.1 and max(rates) <= 1


def test_an_answer_longer_than_the_model_keeps_its_end(runs):
    own = ranker(runs["ul2"], "ReCoRD", shots=0)
    tokens, prefix = own.row("it", "so " * 99)
    assert len(tokens) == own.model.config.seq and prefix == 2 and tokens[-1] == own.tokenizer.eos_id()
    assert torch.isfinite(own([(tokens, prefix)])).all()


def test_results_of_another_run_or_text_are_not_taken_for_this_ones(runs, tmp_path):
    """Another folder, other examples, other weights in the same folder: each is refused."""
    folder, flags = (
        learnable(tmp_path / "data"),
        ["--tasks", "RTE", "--seeds", 1, "--epochs", 1, "--out", tmp_path / "out"],
    )
    own = shutil.copytree(runs["bert"], tmp_path / "own")
    assert run("--finetune", own, "--data", folder, *flags).returncode == 0
    shown = run("--finetune", runs["bert"], "--data", folder, *flags)
    assert shown.returncode == 2 and f"RTE was made with run {own}, not {runs['bert']};" in shown.stderr
    examples = (folder / "RTE" / "train.jsonl").read_text()
    (folder / "RTE" / "train.jsonl").write_text((folder / "RTE" / "val.jsonl").read_text())
    shown = run("--finetune", own, "--data", folder, *flags)
    assert shown.returncode == 2 and "other settings or files" in shown.stderr
    (folder / "RTE" / "train.jsonl").write_text(examples)
    assert run("--finetune", own, "--data", folder, *flags).returncode == 0
    newest = checkpoint.folders(own)[-1]
    tensors, meta = checkpoint.load(newest)
    shutil.rmtree(newest)
    checkpoint.save(own, meta["step"], {"model": {name: 2 * tensor for name, tensor in tensors["model"].items()}}, meta)
    assert run("--finetune", own, "--data", folder, *flags).returncode == 2


def test_an_out_is_of_one_model_and_holds_all_its_tasks(runs, tmp_path):
    folder, out = learnable(tmp_path / "data"), tmp_path / "out"
    flags = ["--data", folder, "--epochs", 1, "--out", out]
    assert run("--finetune", runs["bert"], *flags, "--tasks", "RTE", "--seeds", 2).returncode == 0
    before = json.loads((out / "results.json").read_text())
    for other, what in (
        (["--finetune", runs["ul2"]], f"RTE was made with run {runs['bert']}, not"),
        (["--finetune", runs["bert"], "--lr", 1e-3], "RTE was made with lr 3e-05, not 0.001;"),
    ):
        shown = run(*other, *flags, "--tasks", "COPA")
        assert shown.returncode == 2 and what in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr
    assert not (out / "runs" / "COPA").exists()
    shown = run("--finetune", runs["bert"], *flags, "--tasks", "COPA", "--seeds", 1)
    assert shown.returncode == 0 and "2-task mean" in shown.stdout, shown.stderr
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"COPA", "RTE"} and results["RTE"] == before["RTE"] and results["COPA"]["seeds"] == 1
    assert {path.stem for path in (out / "val").iterdir()} == set(results)


def test_settings_are_compared_where_there_is_a_result(tmp_path):
    """Nothing was made by a command that failed at once, or that left an empty file of answers."""

    def bad(seed):
        raise UserError("bad data")

    with pytest.raises(UserError, match="bad data"):
        run_seeds(tmp_path, {"file": 1}, 1, bad)
    (tmp_path / "0.jsonl").touch()
    assert run_seeds(tmp_path, {"file": 2}, 1, lambda seed: seed) == [0]
    with pytest.raises(UserError, match="other settings"):
        run_seeds(tmp_path, {"file": 3}, 1, bad)
    (tmp_path / "0.json").unlink()
    (tmp_path / "0.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="other settings"):
        run_seeds(tmp_path, {"file": 3}, 1, bad)
