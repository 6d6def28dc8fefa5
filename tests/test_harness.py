"""EleutherAI's evaluation harness on an exported UL2, and our own few-shot scores on the same prompts."""

import json

import pytest
import torch

from data import MODES
from engine.runs import load_run
from eval_superglue import Ranker, prompt
from evals import qa_files
from evals.superglue import read_task
from processes import script
from text.prepare import CLS, MASK, PAD, SEP, UNK

pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
lm_eval = pytest.importorskip("lm_eval", reason="the evaluation harness (lm-eval) is not installed")
from lm_eval.tasks import TaskManager  # noqa: E402

from evals.harness import PrefixLM  # noqa: E402

CB = """
task: local_cb
include: {tasks}/super_glue/cb/default.yaml
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{train: {folder}/theirs.jsonl, validation: {folder}/theirs.jsonl}}}}
metric_list: [{{metric: acc}}]
"""
NQ = """
task: local_nq
include: {tasks}/nq_open/nq_open.yaml
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/nq.jsonl, validation: {folder}/nq.jsonl}}}}
generation_kwargs: {{until: ["\\n"], do_sample: false, max_gen_toks: 6}}
"""
LABELS = ["entailment", "contradiction", "neutral"]


@pytest.fixture(scope="module")
def harness(runs, text, tmp_path_factory):
    """(results of the harness on local CB and NQ-open, folder of the files)."""
    folder = tmp_path_factory.mktemp("harness")
    assert script("tools.hf", "export", runs["ul2"], "--out", folder / "exported").returncode == 0
    ours = [{"premise": a[:20], "hypothesis": b[:15], "idx": i, "label": LABELS[i % 3]}
            for i, (a, b) in enumerate(zip(text[:9], text[9:]))]  # fmt: skip
    theirs = [line | {"label": LABELS.index(line["label"])} for line in ours]
    asked = [{"question": line[:18], "answer": [line[18:24], "x"]} for line in text[20:26]]
    for name, lines in {"ours": ours, "theirs": theirs, "nq": asked}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in {"cb": CB, "nq": NQ}.items():
        tasks = lm_eval.__path__[0] + "/tasks"
        (folder / f"{name}.yaml").write_text(task.format(tasks=tasks, folder=folder))
    model = PrefixLM(str(folder / "exported"), device="cpu", batch_size=4, dtype="float32")
    tasks = TaskManager(include_path=str(folder))
    how = {"num_fewshot": 0, "log_samples": True, "bootstrap_iters": 0}
    found = lm_eval.simple_evaluate(model=model, tasks=["local_cb", "local_nq"], task_manager=tasks, **how)
    return found, folder


def arguments(sample):
    return [tuple(request) for request in sample["arguments"]]


def test_every_example_has_our_score(harness, runs):
    """The harness asks what we ask, and the log-likelihood of every answer is the same."""
    found, folder = harness
    model, tokenizer, _ = load_run(runs["ul2"])
    ranker = Ranker(model, tokenizer, "CB", 0, 0)
    examples = read_task("CB", folder / "ours.jsonl")
    samples = sorted(found["samples"]["local_cb"], key=lambda sample: sample["doc_id"])
    right = 0
    for number, (example, sample) in enumerate(zip(examples, samples)):
        asked, choices = prompt("CB", example.fields)
        assert arguments(sample) == [(asked, choice) for choice in choices]
        rows, answers = ranker.read(example, number)
        with torch.no_grad():
            ours = ranker(rows)
        theirs = torch.tensor([float(response[0][0]) for response in sample["resps"]])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        right += answers[int(ours.argmax())] in example.right
    assert len(samples) == 9 and found["results"]["local_cb"]["acc,none"] == pytest.approx(right / 9)


def test_answers_are_written_as_ours_are(harness, runs):
    found, folder = harness
    model, tokenizer, _ = load_run(runs["ul2"])
    V, predictions, written_something = tokenizer.vocab_size(), {}, False
    questions = qa_files.read_task("nq_open", folder / "nq.jsonl")
    for sample in found["samples"]["local_nq"]:
        [(context, _)] = arguments(sample)
        tokens = tokenizer.encode(context)[-(32 - 6 - 3) :]
        banned = [PAD, UNK, CLS, MASK, *range(V, V + len(MODES))]
        [row] = model.generate([[V + MODES.index("[S]"), *tokens, V + len(MODES)]],
                               V + len(MODES), {SEP}, banned, 6)  # fmt: skip
        text = tokenizer.decode([i for i in row if i < V]).split("\n")[0].strip()
        assert sample["filtered_resps"] == [text]
        predictions[sample["doc"]["question"]], written_something = text, written_something or bool(text)
    assert written_something
    exact = qa_files.score("nq_open", questions, predictions)["em"]
    assert found["results"]["local_nq"]["exact_match,remove_whitespace"] == pytest.approx(exact)
