import importlib
import operator
import re
import shutil
import subprocess
import sys
import types
from collections import Counter

import pytest
import torch

import methods
from engine import ROOT
from methods.width import Width
from model import BERT, Config
from raptr import RaPTr, Stage, Subnetwork, mean_layers, over, stage_plan
from test_train import events, go

PINNED = {0, 11}


def bert(stages=(6, 8, 10, 12), steps=4000, alpha=0.0, warmup=0, **more):
    return RaPTr(stage_plan(stages, steps, 12, alpha, warmup), 12, PINNED, **more)


def test_a_plan_by_hand():
    assert stage_plan([6, 8, 10, 12], 800, 12) == [(1, 200, 6), (201, 400, 8), (401, 600, 10), (601, 800, 12)]
    assert stage_plan([6, 8, 10, 12], 100, 12, alpha=1) == [(1, 10, 6), (11, 30, 8), (31, 60, 10), (61, 100, 12)]
    assert stage_plan([6, 12], 100, 12, full_warmup=20) == [(1, 20, 12), (21, 60, 6), (61, 100, 12)]


@pytest.mark.parametrize("steps", [10, 11, 97, 1000])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
@pytest.mark.parametrize("warmup", [0, 3])
def test_every_step_is_in_one_stage(steps, alpha, warmup):
    plan = stage_plan([1, 2, 4], steps, 4, alpha, warmup)
    assert [step for stage in plan for step in range(stage.start, stage.end + 1)] == list(range(1, steps + 1))


@pytest.mark.parametrize(
    "stages, layers, alpha, published",
    [
        ((6, 8, 10, 12), 12, 0, 1.333),
        ((6, 8, 10, 12), 12, 1, 1.200),
        ((6, 9, 12), 12, 0, 1.333),
        ((6, 9, 12), 12, 1, 1.200),
        ((3, 6, 9, 12), 12, 0, 1.600),
        ((3, 6, 9, 12), 12, 1, 1.333),
        ((12, 16, 20, 24), 24, 0, 1.333),
        ((12, 16, 20, 24), 24, 1, 1.200),
    ],
)
def test_relative_flops_are_the_published_ones(stages, layers, alpha, published):
    for steps in (6000, 1_000_000):  # the long run is sampled
        method = RaPTr(stage_plan(stages, steps, layers, alpha), layers, {0, layers - 1})
        assert layers / mean_layers(method, steps) == pytest.approx(published, abs=6e-4)


def test_exact_paths_have_the_stage_length_and_the_pinned_layers():
    method = bert()
    for step in range(1, 3001, 7):
        kept = method.subnetwork(step).layers
        assert len(kept) == [6, 8, 10][(step - 1) // 1000]
        assert kept[0] == 0 and kept[-1] == 11 and list(kept) == sorted(set(kept))
    assert method.subnetwork(3001) is None and method.subnetwork(4000) is None
    assert method.stage(4001) == 3 and method.subnetwork(4001) is None  # a run that is longer than its plan


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
def test_each_free_layer_is_kept_equally_often(sampling):
    method = bert((6, 12), steps=40_000, sampling=sampling)
    kept = Counter(layer for step in range(1, 20_001) for layer in method.subnetwork(step).layers)
    assert kept[0] == kept[11] == 20_000
    for layer in range(1, 11):  # p = (6 - 2) / (12 - 2) = 0.4; five standard deviations
        assert abs(kept[layer] - 8000) < 5 * (20_000 * 0.4 * 0.6) ** 0.5


def test_pairs_of_layers_are_not_tied_together():
    method = bert((6, 12), steps=40_000)
    together = Counter(
        pair for s in range(1, 20_001) for k in [method.subnetwork(s).layers] for pair in zip(k[1:-1], k[2:-1])
    )
    pairs = sum(together[layer, layer + 1] for layer in range(1, 10))
    assert abs(pairs / 9 / 20_000 - 4 / 10 * 3 / 9) < 0.005


def test_bernoulli_lengths_vary_around_the_stage_length():
    method = bert((6, 12), steps=8000, sampling="bernoulli")
    lengths = [len(method.subnetwork(step).layers) for step in range(1, 4001)]
    assert abs(sum(lengths) / 4000 - 6) < 0.12 and min(lengths) < 5 and max(lengths) > 7


def test_a_fractional_length_is_met_on_average():
    method = RaPTr([Stage(1, 8000, 6.25)], 12, PINNED)
    lengths = Counter(len(method.subnetwork(step).layers) for step in range(1, 8001))
    assert set(lengths) == {6, 7} and abs(lengths[7] / 8000 - 0.25) < 0.03


def test_a_path_depends_on_seed_and_step_alone():
    one, two, other = bert(seed=1), bert(seed=1), bert(seed=2)
    backwards = {step: two.subnetwork(step) for step in reversed(range(1, 200))}
    assert all(one.subnetwork(step) == backwards[step] for step in range(1, 200))
    assert len({one.subnetwork(step) for step in range(1, 200)}) > 50
    assert any(one.subnetwork(step) != other.subnetwork(step) for step in range(1, 10))


def test_the_first_paths_never_change():  # a saved run must go on along the same paths with a later version
    assert [bert(seed=0, steps=800).subnetwork(step).layers for step in (1, 2, 201)] == [
        (0, 1, 3, 4, 7, 11),
        (0, 1, 3, 5, 10, 11),
        (0, 2, 4, 5, 6, 8, 10, 11),
    ]


def test_scaling_rules_by_hand():
    kept = {}
    for rule in ("none", "gap", "uniform", "inverse"):
        method = bert((6, 12), scaling=rule)
        kept[rule] = method.subnetwork(5)
        assert method.subnetwork(4000) is None  # the full model is never scaled
    layers = kept["none"].layers
    assert kept["none"].scale is None
    assert [round(s * s) for s in kept["gap"].scale] == [b - a for a, b in zip((-1, *layers), layers)]
    assert sum(s * s for s in kept["gap"].scale) == pytest.approx(12)
    assert kept["uniform"].scale == pytest.approx([2**0.5] * 6)
    assert kept["inverse"].scale == pytest.approx([1] + [2.5] * 4 + [1])


def test_any_set_can_be_fixed():
    assert RaPTr([Stage(1, 9, 3)], 6, {2, 4, 5}).subnetwork(1) == Subnetwork((2, 4, 5))
    assert RaPTr([Stage(1, 9, 0)], 6, set()).subnetwork(1) == Subnetwork(())


def test_examples_do_not_depend_on_the_seed():
    assert bert(seed=1).examples() == bert(seed=7).examples()
    assert {k: {len(path.layers) for path in paths} for k, paths in bert().examples().items()} == {
        "6": {6},
        "8": {8},
        "10": {10},
    }


@pytest.mark.parametrize(
    "stages, steps, warmup, word",
    [
        ((8, 6, 12), 100, 0, "fall"),
        ((6, 8), 100, 0, "12"),
        ((6, 8, 13), 100, 0, "12"),
        ((-1, 12), 100, 0, "--stages"),
        ((6, 8, 10, 12), 3, 0, "too few"),
        ((6, 12), 100, 100, "--full_warmup"),
    ],
)
def test_bad_plans_are_refused(stages, steps, warmup, word):
    with pytest.raises(ValueError, match=word):
        stage_plan(stages, steps, 12, full_warmup=warmup)


def test_bad_fixed_sets_are_refused():
    with pytest.raises(ValueError, match="--fixed"):
        RaPTr([Stage(1, 9, 12)], 12, {12})
    with pytest.raises(ValueError, match="--fixed"):
        RaPTr([Stage(1, 9, 1)], 12, {0, 11})


@pytest.mark.parametrize("name", ["raptr", "stacking", "methods", "engine.options", "engine.errors", "engine.log"])
def test_no_torch_is_loaded(name):
    code = f"import sys, {name}; assert not {{'torch', 'numpy'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_raptr_stands_alone(tmp_path):
    """Copied into another folder, it runs with nothing but Python."""
    (tmp_path / "raptr.py").write_text((ROOT / "raptr.py").read_text())
    code = "import raptr; print(raptr.RaPTr([raptr.Stage(1, 9, 2)], 4, {0, 3}).subnetwork(1).layers)"
    start = [sys.executable, "-S", "-c", code]  # -S: without installed packages
    shown = subprocess.run(start, check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert shown == "(0, 3)\n"


def test_demo():
    shown = subprocess.run([sys.executable, "raptr.py"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    assert "1.333 times" in shown and shown.count("██") > 50
    bad = subprocess.run([sys.executable, "raptr.py", "--stages", "8-6"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1


def test_the_readmes_own_method_in_twenty_lines(tiny, monkeypatch):
    """Its lines as they stand there: the method, and what makes it a choice of --method; trained, logged, resumed."""
    section = (ROOT / "README.md").read_text().split("## Add your own method")[1]
    method, function, line = (block.split("```")[0] for block in section.split("```python\n")[1:4])
    assert len([text for text in (method + function + line).splitlines() if text]) <= 20
    exec(method, vars(module := types.ModuleType("methods.window")))
    monkeypatch.setitem(sys.modules, "methods.window", module)
    window = module.Window(stage_plan([6, 9, 12], 300, 12), 12, 0)
    for step in (1, 50, 100, 101, 200):
        kept = window.subnetwork(step).layers
        assert len(kept) == (6 if step <= 100 else 9) and kept == tuple(window_of(kept)) and kept[-1] < 12
    assert window.subnetwork(201) is None and mean_layers(window, 300) == 9
    other = module.Window(window.plan, 12, 1)
    assert any(window.subnetwork(step) != other.subnetwork(step) for step in range(1, 20))
    exec(function, names := {**vars(methods)})
    for name, value in eval("{" + line + "}", names).items():
        monkeypatch.setitem(methods.METHODS, name, value)
    run = go(tiny, "--method", "window", "--save_every", 5, "--keep", 9)
    before = events(run, "step")
    assert [len(e["layers"]) for e in before] == [2] * 4 + [3] * 4 + [4] * 4
    assert all(e["layers"] == list(window_of(e["layers"])) for e in before)
    shutil.rmtree(run / "step_00000012")
    go(tiny, "--method", "window", "--save_every", 5, "--keep", 9)
    assert [e["loss"] for e in events(run, "step")] == [e["loss"] for e in before]


def test_the_functions_of_method_md_exist():
    table = (ROOT / "METHOD.md").read_text().split("| the algorithm | function |")[1].split("\n\n")[0]
    names = re.findall(r"\| `([a-z]+)\.([\w.]+)` \|", table)
    assert len(names) > 8
    for module, name in names:
        assert operator.attrgetter(name)(importlib.import_module(module)), name


def window_of(layers):
    return range(layers[0], layers[-1] + 1)


# ---- over: anybody's model


def small(layers=4, **more):
    return BERT(Config(layers, 32, 4, 64, 24, 100, 0.0, init_std=0.2, **more), seed=1)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("path", [Subnetwork((0, 2)), Subnetwork((0, 1, 3), (0.5, 2.0, 1.3)), Subnetwork(()), None])
def test_over_runs_and_trains_what_encode_does(path, norm):
    """model.py, which knows of subnetworks itself, against the same model under `over`: states, and every gradient."""
    ours, theirs, tokens = small(norm=norm), small(norm=norm), torch.arange(48).view(2, 24)
    weights = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    expected = ours.encode(tokens, path)
    with over(theirs.blocks, path):
        states = theirs.encode(tokens)
        (states * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(states, expected)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-3), name
    assert len(theirs.blocks) == 4 and torch.equal(theirs.encode(tokens), ours.encode(tokens))  # nothing stays behind


def test_over_gives_the_layers_back_whatever_happens_inside():
    model, tokens = small(), torch.arange(48).view(2, 24)
    before = model.encode(tokens)
    with pytest.raises(KeyError), over(model.blocks, Subnetwork((1,), (3.0,))):
        raise KeyError
    assert len(model.blocks) == 4 and torch.equal(model.encode(tokens), before)


def test_over_refuses_what_it_cannot_do():
    layers, width = small().blocks, Width(4, ((0,), (1,)), ((2,), (3,)), 2.0)
    for subnetwork in (Subnetwork((0, 2), width=width), Subnetwork((0, 1), frozen=1)):
        with pytest.raises(ValueError, match="cannot"), over(layers, subnetwork):
            pytest.fail("it ran")
    assert len(layers) == 4


def decoder(**more):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def encoder():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    more = {"num_attention_heads": 4, "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **more))


@pytest.mark.parametrize("make, where", [(decoder, "model.layers"), (encoder, "bert.encoder.layer")])
def test_models_of_transformers_run_over_a_subnetwork(make, where):
    model, tokens, states = make(), torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0)), []
    layers = model.get_submodule(where)
    layers[1].register_forward_hook(lambda module, args, out: states.append(out[0] if isinstance(out, tuple) else out))
    loss = lambda: model(input_ids=tokens, labels=tokens).loss  # noqa: E731
    full = loss()
    with over(layers, None):
        assert loss() == full
    with over(layers, Subnetwork((0, 2))):
        loss().backward()
        assert len(layers) == 2
    assert len(layers) == 4 and loss() == full and len(states) == 3  # layer 1 was not run over the path
    grads = {i: [p.grad is not None for p in layers[i].parameters()] for i in range(4)}
    assert all(grads[0]) and all(grads[2]) and not any(grads[1]) and not any(grads[3])
    with over(layers, Subnetwork((0, 1, 2, 3), (1.0, 1.0, 1.0, 1.0))):
        torch.testing.assert_close(loss(), full)
    with over(layers, Subnetwork((0, 1), (1.0, 0.0))):  # an update of nothing
        scaled = loss()
    with over(layers, Subnetwork((0,))):
        torch.testing.assert_close(loss(), scaled)
    assert not torch.isclose(scaled, full)


def test_the_readmes_training_loop():
    """The lines of its first screen: the model learns, and what was never on a path has not moved."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 12}
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, num_attention_heads=2))
    layers, losses, ran = model.bert.encoder.layer, [], []
    tokens = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    model.register_forward_hook(lambda module, args, out: losses.append(out.loss.item()))
    model.register_forward_pre_hook(lambda module, args: ran.append(list(layers)))
    block = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    before = {layer: [p.clone() for p in layer.parameters()] for layer in layers}
    names = {"torch": torch, "model": model, "batch": lambda: {"input_ids": tokens, "labels": tokens}, "steps": 4}
    exec(block.replace("AdamW(model.parameters())", "AdamW(model.parameters(), 1e-2)"), names)
    assert [len(path) for path in ran] == [6, 8, 10, 12] and losses[-1] < losses[0]
    ran.clear()
    fresh = {layer: [p.clone() for p in layer.parameters()] for layer in layers}
    assert all(not torch.equal(a, b) for layer in layers for a, b in zip(before[layer], fresh[layer]) if a.ndim == 2)
    exec(block.replace("[6, 8, 10, 12]", "[6, 6, 12]").replace("range(1, steps + 1)", "range(1, 2)"), names)
    (path,) = ran
    for layer in layers:
        rests = all(torch.equal(a, b) for a, b in zip(fresh[layer], layer.parameters()))
        assert rests == (layer not in path)


def test_over_refuses_layers_of_several_kinds():
    """Of Gemma 3's layers some attend to a window, and which ones is told by their place in the list."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, "Gemma3ForCausalLM"):
        pytest.skip("this transformers has no Gemma 3")
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
    config |= {"num_key_value_heads": 1, "num_hidden_layers": 3, "sliding_window": 4}
    make = lambda kinds: transformers.Gemma3ForCausalLM(  # noqa: E731
        transformers.Gemma3TextConfig(**config, layer_types=kinds)
    )
    mixed = make(["sliding_attention", "full_attention", "sliding_attention"])
    with (
        pytest.raises(ValueError, match="full_attention, sliding_attention"),
        over(mixed.model.layers, Subnetwork((1, 2))),
    ):
        pytest.fail("it ran")
    assert len(mixed.model.layers) == 3
    alike, tokens = make(["sliding_attention"] * 3), torch.arange(10)[None]
    with over(alike.model.layers, Subnetwork((1, 2))):
        alike(input_ids=tokens, labels=tokens).loss.backward()
    assert [layer.mlp.up_proj.weight.grad is None for layer in alike.model.layers] == [True, False, False]
