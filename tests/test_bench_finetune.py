import argparse
import json
import random

import pytest
import torch
from safetensors.torch import load_file

from engine.runs import load_run
from eval_superglue import Classifier
from evals import superglue
from test_eval_superglue import learnable
from test_hf import run
from tools import bench_finetune, hf

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "so", "it", "is", "go", "##od", "bad", ".", "what"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small BERT of theirs with random weights, a pooler and a vocabulary."""
    where = tmp_path_factory.mktemp("theirs")
    c = transformers.BertConfig(vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                intermediate_size=48, max_position_embeddings=24, initializer_range=0.2)  # fmt: skip
    transformers.BertModel(c).save_pretrained(where)
    (where / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return where


def options(folder, **more):
    return argparse.Namespace(folder=folder, longest=16, batch=4, lr=1e-3, **more)


def test_both_sides_are_the_same_model(folder):
    """Equal logits, from the start, on rows of unequal length, which are what their tokenizer makes."""
    ours, theirs = (bench_finetune.side(name, options(folder), "RTE", 0) for name in ("ours", "eager"))
    texts = [("yes yes yes", "so"), ("no.", "it is good. what is it so bad"), ("is it so " * 5, "it is")]
    rows = [theirs.model.row(*pair) for pair in texts]
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    for pair, (tokens, types) in zip(texts, rows):
        expected = tokenizer(*pair, truncation="longest_first", max_length=16)
        assert tokens == expected["input_ids"] and types == expected["token_type_ids"]
    with torch.no_grad():
        ours.model.eval(), theirs.model.eval()
        expected = theirs.model(rows)
        torch.testing.assert_close(ours.model(rows), expected, rtol=1e-4, atol=1e-5)
        ours.model.keep_words(rows)
        assert len(ours.model.encoder.tokens.weight) < len(WORDS)
        torch.testing.assert_close(ours.model(rows), expected, rtol=1e-4, atol=1e-5)


def test_leaving_words_out_changes_no_gradient(folder):
    rows = [([2, 7, 3, 9, 3], [0, 0, 0, 1, 1]), ([2, 7, 12, 3, 5, 3], [0, 0, 0, 0, 1, 1])]
    grads = []
    for few in (False, True):
        model = bench_finetune.side("ours", options(folder), "RTE", 0).model.eval()
        own = [(list(tokens), types) for tokens, types in rows]
        if few:
            model.keep_words(own)
        model(own)[:, 0].sum().backward()
        table = model.encoder.tokens.weight.grad
        grads.append((table[table.any(1)], model.encoder.blocks[0].mlp.up.weight.grad))
    assert len(grads[0][0]) == 6  # 2, 3, 5, 7, 9, 12, and nothing for [PAD], which is masked
    for all_words, few_words in zip(*grads):
        torch.testing.assert_close(all_words, few_words, rtol=1e-4, atol=1e-6)


def test_a_pooler_that_is_there_is_used(folder, tmp_path):
    """As it stands in the file, or in the run that was made of it; where there is none it is drawn from the seed."""
    assert run("hf.py", "import", folder, "--out", tmp_path / "run").returncode == 0
    weight = load_file(folder / "model.safetensors")["pooler.dense.weight"]
    for model, tokenizer in (hf.load(folder), load_run(tmp_path / "run")[:2]):
        assert torch.equal(Classifier(model, tokenizer, 2, 16, seed=0).pool.weight, weight)
        model.pooler = None
        zero, one = (Classifier(model, tokenizer, 2, 16, seed).pool.weight for seed in (0, 1))
        assert not torch.equal(zero, weight) and not torch.equal(zero, one)


def test_the_command(folder, tmp_path):
    data, out = learnable(tmp_path / "data"), tmp_path / "out"
    for name in ("train", "val"):  # little of it
        file = data / "RTE" / f"{name}.jsonl"
        file.write_text("\n".join(file.read_text().split("\n")[:24]))
    flags = ["bench_finetune.py", folder, "--data", data, "--tasks", "RTE", "--seeds", 2, "--epochs", 2, "--out", out]
    shown = run(*flags)
    assert shown.returncode == 0 and "times as fast" in shown.stdout, shown.stderr
    assert len(list(out.glob("*.json"))) == 6 and shown.stdout.count("seed 1") == 3
    last = json.loads((out / "RTE-1-eager-steady.json").read_text())
    assert len(last["epochs"]) == 2 and last["seconds"] > 0
    args = options(folder, data=data, sides="eager", memory="steady", seeds=2, epochs=3)
    with pytest.raises(ValueError, match="other settings"):
        bench_finetune.train_sides("RTE", args, out, None)


def test_mixed_batches_cover_everything_once():
    found = bench_finetune.mixed([1] * 21, 4, random.Random(0))
    assert sorted(i for part in found for i in part) == list(range(21)) and [*map(len, found)] == [4] * 5 + [1]


def test_steps_are_shown(folder, tmp_path, capsys):
    args = options(folder, data=learnable(tmp_path / "data"), steps=1, dtype="float32", memory="plain")
    assert superglue.validation_file(args.data, "RTE")
    bench_finetune.show_steps("RTE", args)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("ours-all_words", "eager-mixed", "sdpa")) and "their faster" in shown
