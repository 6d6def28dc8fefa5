import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import methods
import model as transformer
import stacking
import train
from engine import ROOT, checkpoint, options, parallel
from model import BERT, Config
from raptr import Subnetwork, all_layers, mean_layers, stage_plan
from stacking import Stacking
from test_train import events, go, same, trajectory, weights

ALONE = parallel.Ranks("cpu", 60)
SMALL = Config(layers=6, width=16, heads=2, mlp=32, vocab=64, seq=8, dropout=0.0)


@pytest.mark.parametrize(
    "kind, n, m, expected",
    [
        ("stacking", 6, 9, [0, 1, 2, 3, 4, 5, 3, 4, 5]),
        ("stacking", 9, 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8]),
        ("stacking", 2, 5, [0, 1, 0, 1, 0]),
        ("progressive", 3, 6, [0, 1, 2, 0, 1, 2]),
        ("progressive", 6, 12, [0, 1, 2, 3, 4, 5] * 2),
        ("midas", 3, 6, [0, 1, 2, 0, 1, 2]),
        ("midas", 6, 9, [0, 1, 2, 0, 1, 2, 3, 4, 5]),
        ("midas", 9, 12, [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8]),
        ("midas", 12, 15, [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10, 11]),
    ],
)
def test_which_layer_each_layer_comes_from(kind, n, m, expected):
    assert stacking.SOURCES[kind](n, m) == expected


def copied(tensors):
    """The tensors of a state, kept as they are now."""
    return {kind: {name: tensor.clone() for name, tensor in group.items()} for kind, group in tensors.items()}


def grown(sources, moments="copy"):
    """A model of 3 blocks that has taken a few steps, then grown; and its weights and moments by name, before and
    after."""
    args = options.parse(["--method", "full", "--moments", moments])
    model, optimizer = train.build(args, SMALL, 3, ALONE)
    tokens = torch.randint(5, 64, (4, 8), generator=torch.Generator().manual_seed(0))
    for kept in [(0, 1, 2), (0, 2), (0, 1)]:
        model((tokens, tokens[:, :3] % 8, tokens[:, :3]), Subnetwork(kept)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copied(checkpoint.state(model, optimizer))
    model, optimizer = train.grow(model, optimizer, sources, args, SMALL, ALONE)
    return model, optimizer, before, checkpoint.state(model, optimizer)


def test_weights_and_moments_follow_their_layer():
    sources = [0, 1, 2, 1, 2]
    model, optimizer, before, after = grown(sources)
    for kind in ("model", "optimizer"):
        for name, tensor in after[kind].items():
            if "blocks." in name:
                head, layer, tail = name.partition("blocks.")[0], *name.partition("blocks.")[2].split(".", 1)
                assert torch.equal(tensor, before[kind][f"{head}blocks.{sources[int(layer)]}.{tail}"]), name
            else:
                assert torch.equal(tensor, before[kind][name]), name
    assert len(after["model"]) == len(before["model"]) + 2 * len(list(model.blocks[0].parameters()))
    assert any(after["optimizer"][f"exp_avg.blocks.{i}.mlp.up.weight"].any() for i in (3, 4))


def test_moments_are_reset_on_demand():
    _, _, before, after = grown([0, 1, 2, 0, 1, 2], moments="reset")
    assert any(before["optimizer"][name].any() for name in before["optimizer"])
    assert all(torch.equal(after["model"][name], t) for name, t in before["model"].items())
    assert not any(t.any() for t in after["optimizer"].values())


def test_no_two_layers_share_storage_and_every_weight_trains():
    model, optimizer, _, after = grown([0, 1, 2, 0, 1, 2])
    pointers = [t.data_ptr() for group in after.values() for t in group.values()]
    assert len(pointers) == len(set(pointers))
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(5, 64, (4, 8))
    model((tokens, tokens[:, :3] % 8, tokens[:, :3])).backward()
    optimizer.step()
    assert all(not torch.equal(p, old[name]) for name, p in model.named_parameters() if name != "bias")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_a_grown_network_of_idle_layers_computes_the_same():
    """Where the copied block writes nothing, stacking it keeps the function: theory's one exact case."""
    torch.manual_seed(0)
    model = BERT(SMALL)
    model.blocks = model.blocks[:3]
    for writer in (model.blocks[2].attention.out, model.blocks[2].mlp.down):
        writer.weight.data.zero_()
    tokens = torch.randint(5, 64, (4, 8))
    expected = model.encode(tokens)
    args = options.parse(["--method", "full"])
    model, _ = train.grow(model, train.make_optimizer(model, args), stacking.stacking(3, 4), args, SMALL, ALONE)
    assert len(model.blocks) == 4
    torch.testing.assert_close(model.encode(tokens), expected)


def test_mslt_trains_only_what_is_new():
    method = Stacking(stacking.stacking, stage_plan([2, 3, 4, 4], 40, 4), 4, only_new=True)
    assert [method.subnetwork(step) for step in (1, 11, 31)] == [None, Subnetwork((0, 1, 2), frozen=2), None]
    torch.manual_seed(0)
    model, tokens = BERT(SMALL), torch.randint(5, 64, (4, 8))
    batch = (tokens, tokens[:, :3] % 8, tokens[:, :3])
    loss = model(batch, Subnetwork((0, 1, 2, 3, 4, 5), frozen=4))
    loss.backward()
    assert loss.item() == model(batch).item()
    for name, p in model.named_parameters():
        frozen = (
            name.startswith(tuple(f"blocks.{i}." for i in range(4))) or "positions" in name or "embedding_norm" in name
        )
        assert (p.grad is None) == frozen, name
    assert method.expected_layers(11) == pytest.approx(1 + 2 / 3)  # two layers forward only, a third of the work each


@pytest.mark.parametrize("only_new", [False, True])
def test_frozen_layers_cost_what_pytorch_counts(only_new):
    config = Config(layers=12, width=64, heads=4, mlp=256, seq=64, vocab=500, dropout=0.0)
    subnetwork = Subnetwork(tuple(range(12)), frozen=8) if only_new else all_layers(12)
    tokens = torch.randint(5, 500, (2, 64))
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        BERT(config)((tokens, tokens[:, :4] % 64, tokens[:, :4]), subnetwork).backward()
    assert counter.get_total_flops() == pytest.approx(transformer.flops(config, 2, 4, subnetwork.cost()), rel=0.01)


GROWING = {  # and "stacking" in test_faults.py, at every step
    "progressive": ["--stages", "1-2-4"],
    "midas": ["--stages", "2-4"],
    "mslt": ["--stages", "2-3-4-4"],
    "jump": ["--stages", "2-4"],
}


@pytest.mark.parametrize("name", GROWING)
def test_a_run_continues_exactly_around_a_growth(tiny, name):
    more = ["--method", name, *GROWING[name], "--dropout", 0.1, "--save_every", 1, "--keep", 99, "--growth_warmup", 2]
    run = go(tiny, *more)
    expected, final, growths = trajectory(run), weights(run), events(run, "grow")
    assert growths and growths[-1]["depth"] == 4 and len(expected[-1]["layers"]) == 4
    for step in sorted({g["step"] + d for g in growths for d in (-2, -1, 0)} - {0}):
        for folder in run.glob("step_*"):
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        go(tiny, *more)
        assert trajectory(run) == expected and same(weights(run), final)
        assert [{**g, "seconds": 0} for g in events(run, "grow")] == [{**g, "seconds": 0} for g in growths]


def test_when_a_jump_comes():
    """From 3 layers at a third of the steps, or where the mean depth is the one that was asked for."""
    jump = lambda *more: methods.choose(options.parse(["--method", "jump", "--layers=12", "--steps=900", *more]))  # noqa: E731
    assert jump().plan == [(1, 300, 3), (301, 900, 12)] and jump().sources(3, 12) == [0, 1, 2] * 4
    assert jump("--stages=6-12").plan == [(1, 300, 6), (301, 900, 12)]
    for more in ((), ("--stages=6-12",)):
        assert mean_layers(jump("--mean_depth=9", *more), 900) == pytest.approx(9, abs=0.01)


def test_a_full_warmup_trains_the_deep_network_first(tiny):
    run = go(tiny, "--method", "stacking", "--full_warmup", 3, "--stages", "2-4")
    assert [len(e["layers"]) for e in events(run, "step")] == [4] * 3 + [2] * 4 + [4] * 5
    assert [g["sources"] for g in events(run, "grow")] == [[0, 1], [0, 1, 0, 1]]


def test_a_growth_can_warm_up(tiny):
    flags = ["--method", "stacking", "--stages", "2-4", "--steps", 12, "--warmup", 0, "--lr", 1, "--lr_schedule", "wsd"]
    args = options.parse([*tiny, *map(str, flags), "--growth_warmup", "4"])
    method = methods.choose(args)
    rates = [train.learning_rate(args, step, method.steps_since_growth(step)) for step in range(5, 11)]
    assert rates == pytest.approx([1, 1, 0.25, 0.5, 0.75, train.learning_rate(args, 10)])


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--method midas --layers 5 --stages 3-5", "midas"),
        ("--method stacking --stages 2.5-4", "whole layers"),
        ("--method stacking --stages 0-4", "whole layers"),
        ("--method jump --stages 4-4", "--stages"),
        ("--method jump --mean_depth 2", "--mean_depth"),
    ],
)
def test_growths_that_cannot_be_are_refused(tiny, flags, word, capsys):
    with pytest.raises(SystemExit) as stopped:
        options.parse([*tiny, *flags.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and word in error and error.count("\n") == 1, error


def test_demo():
    shown = subprocess.run([sys.executable, "stacking.py"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "0  1  2  3  4  5  3  4  5" in shown
