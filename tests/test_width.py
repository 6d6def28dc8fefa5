"""RaPTr in width: what is cut is what the whole network says with the rest masked, and what is not kept rests."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import methods
import model as transformer
import train
from engine import ROOT, options
from methods import width
from methods.width import RandomWidth
from raptr import RaPTr, Stage, Subnetwork, mean_layers, stage_plan
from test_model import batch
from test_train import events, go

BERT = transformer.Config(4, 64, 4, 128, 24, 300, 0.0, init_std=0.2)
UL2 = transformer.Config(
    4, 64, 4, 128, 24, 300, 0.0, arch="ul2", positions="relative", rms=True, gated=True, init_std=0.2
)


def method(k, part="width", scaling="none"):
    plan = [Stage(1, 10**6, k)]
    if part == "depth":
        return RaPTr(plan, 4, {0, 3}, scaling=scaling)
    return RandomWidth(plan, 4, {0, 3}, scaling=scaling, part=part, slices=4)


def inputs(config):
    if config.arch == "bert":
        return batch(config, 3)
    tokens = torch.randint(0, 300, (3, 24), generator=torch.Generator().manual_seed(0))
    return tokens, torch.tensor([5, 0, 12]), tokens.roll(-1, 1).masked_fill(torch.arange(24) < 12, -100)


def mask(model, path):
    """The slow twin: the whole network, where what is not kept is multiplied by 0."""
    for i, layer in enumerate(path.layers):
        block = model.blocks[layer]
        for writer, kept in ((block.attention.out, path.width.heads[i]), (block.mlp.down, path.width.neurons[i])):
            gate = torch.zeros(4).index_fill(0, torch.tensor(kept), path.width.scale)
            gate = gate.repeat_interleave(writer.in_features // 4)
            writer.register_forward_pre_hook(lambda module, x, gate=gate: x[0] * gate)


@pytest.mark.parametrize("config", [BERT, UL2], ids=["bert", "ul2"])
@pytest.mark.parametrize("part, scaling", [("width", "none"), ("both", "none"), ("both", "gap")])
def test_cut_equals_masked(config, part, scaling):
    path = method(2, part, scaling).subnetwork(3)
    narrow, dense = transformer.make(config, seed=1), transformer.make(config, seed=1)
    taken = width.cut(narrow, path)
    assert taken and narrow.blocks[0].mlp.down.weight.shape[1] < 128
    mask(dense, path)
    depth_only = Subnetwork(path.layers, path.scale)
    losses = [narrow(inputs(config), path), dense(inputs(config), depth_only)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    width.restore(narrow, taken)
    width.restore(narrow, taken)  # nothing happens
    for (name, a), b in zip(narrow.named_parameters(), dense.parameters()):
        assert torch.equal(a, b), name
        zero = torch.zeros_like(a)  # outside the kept layers neither has a gradient
        torch.testing.assert_close(
            zero if a.grad is None else a.grad, zero if b.grad is None else b.grad, atol=1e-4, rtol=1e-4
        )


def test_what_is_not_kept_rests():
    args, path = options.parse(["--lr=0.1", "--weight_decay=0.1"]), method(2).subnetwork(1)
    model = transformer.make(BERT)
    optimizer = train.make_optimizer(model, args)
    for state in optimizer.state.values():
        state["exp_avg"].fill_(1.0), state["exp_avg_sq"].fill_(1.0)  # what does not rest would move
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    taken = width.cut(model, path, optimizer)
    model(inputs(BERT), path).backward()
    optimizer.step()
    optimizer.zero_grad()
    width.restore(model, taken)
    for layer, block in enumerate(model.blocks):
        moved = {name: p.detach() != before[f"blocks.{layer}.{name}"] for name, p in block.named_parameters()}
        head = moved["attention.out.weight"].view(64, 4, 16).any(0).any(1)
        query, key, value = moved["attention.qkv.weight"].view(3, 4, 16 * 64).any(2)
        neurons = moved["mlp.up.weight"].view(4, 32 * 64).any(1)
        for slices, kept in ((head, "heads"), (query, "heads"), (key, "heads"), (value, "heads"), (neurons, "neurons")):
            assert slices.nonzero().flatten().tolist() == [*getattr(path.width, kept)[layer]]
        resting = optimizer.state[block.mlp.down.weight]["exp_avg"].view(64, 4, 32) == 1
        assert resting.all(0).all(1).tolist() == [i not in path.width.neurons[layer] for i in range(4)]


@pytest.mark.parametrize("part", ["depth", "width", "both"])
@pytest.mark.parametrize("k", [2, 2.7, 3.5])
def test_a_stage_costs_the_same_whichever_part_it_takes(part, k):
    costs = [path.cost() if (path := method(k, part).subnetwork(step)) else 4 for step in range(1, 4001)]
    assert sum(costs) / 4000 == pytest.approx(k, rel=0.01)


def test_every_head_and_neuron_is_kept_equally_often():
    paths = [method(2.5).subnetwork(step) for step in range(1, 2001)]
    for kind in ("heads", "neurons"):
        for layer in range(4):
            seen = Counter(i for path in paths for i in getattr(path.width, kind)[layer])
            assert all(abs(seen[i] / 2000 - 2.5 / 4) < 0.05 for i in range(4)), (kind, layer)
    assert any(path.width.heads[0] != path.width.heads[1] for path in paths)  # each layer draws its own
    assert any(path.width.heads[0] != path.width.neurons[0] for path in paths)
    assert {len(kept) for path in paths for kept in path.width.heads} == {2, 3}


def test_scaling_keeps_the_size_of_a_sum():
    """Of independent parts, whose sum the mean square is taken of."""
    parts = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    for k in (1, 2, 3):
        path = method(k).subnetwork(1).width
        assert (path.scale * parts[[*path.heads[0]]].sum(0)).square().mean() == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("config", [BERT, UL2], ids=["bert", "ul2"])
def test_flops_agree_with_pytorchs_counter(config):
    path, model = method(2).subnetwork(1), transformer.make(config)
    width.cut(model, path)
    targets = {"bert": 4, "ul2": 12}[config.arch]
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        model(inputs(config), path).backward()
    assert counter.get_total_flops() == pytest.approx(transformer.flops(config, 3, targets, path.cost()), rel=0.02)


def test_stages_may_be_heads_or_parts():
    flags = ["--part=width", "--layers=12", "--heads=8", "--width=64", "--steps=90"]
    plans = [methods.choose(options.parse([*flags, f"--stages={s}"])).plan for s in ("4-6-8", "0.5-0.75-1", "6-9-12")]
    assert plans[0] == plans[1] == plans[2] == stage_plan([6, 9, 12], 90, 12)
    assert mean_layers(methods.choose(options.parse([*flags, "--stages=4-6-8"])), 90) == 9


def test_a_run_with_resting_parts_and_with_zero_gradients(tiny, tmp_path):
    resting = go([*tiny, "--part", "both", "--save_every", "1", "--keep", "99"])
    steps = events(resting, "step")
    assert [e["stage"] for e in steps] == [0] * 4 + [1] * 4 + [2] * 4 and "width" not in steps[-1]
    assert {e["width"] for e in steps[:8] if "width" in e} <= {0.5, 0.75} and steps[-1]["layers"] == [0, 1, 2, 3]
    zero = go([*tiny[:-1], str(tmp_path / "zero"), "--part", "both", "--skipped_grad", "zero"])
    losses = [[e["loss"] for e in events(run, "step")] for run in (resting, zero)]
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:]  # weight decay alone sees to that


@pytest.mark.parametrize(
    "more, said",
    [
        (["--mlp=250"], "--mlp 250 must be a multiple of --heads 4"),
        (["--stages=0.1-1"], "less than one of 4 heads"),
        (["--stages=2-3"], "must be 4"),
    ],
)
def test_bad_flags(tiny, more, said, capsys):
    with pytest.raises(SystemExit) as end:
        options.parse([*tiny, "--part=width", *more])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_demo():
    shown = subprocess.run(
        [sys.executable, "-m", "methods.width"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert "(192, 64)    (96, 64)" in shown and "1.414 times" in shown
