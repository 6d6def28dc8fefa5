"""What a large run meets and a toy does not, tried small: saves that fail on several ranks, checkpoints that are gone,
activations that are computed again, one graph for all paths. tools/drill.py rehearses more, in minutes."""

import shutil

import pytest
import torch

import model as transformer
import train
from engine import checkpoint, options, parallel
from model import Config
from processes import Run
from raptr import Subnetwork
from test_faults import at, close, exact, flags, limited  # noqa: F401
from test_model import batch
from test_train import events, go


@pytest.mark.parametrize("world", [2, 4])
def test_a_save_that_fails_under_fsdp2_and_then_a_signal(flags, world, tmp_path):  # noqa: F811
    """All ranks know that the state is not saved: none enters a gather that the others do not."""
    flags = [*flags, "--steps", "4000", "--save_every", "6", "--micro_batch", "2", "--fsdp"]  # noqa: F811
    run = Run(flags, world, fault=limited).reach(7)
    codes, errors = run.send("SIGTERM", world - 1).end()
    assert codes == [1] * world and "could not be saved" in errors[0], errors
    assert not checkpoint.folders(tmp_path / "run")


@pytest.mark.parametrize("steps", [12, 5])
def test_checkpoints_that_are_gone(flags, steps, tmp_path, capsys):  # noqa: F811
    """A run that had saved does not begin again without a word, finished or not. Its log stays as it was."""
    run = go([*flags, "--save_every", "3", "--steps", "12"])
    for folder in checkpoint.folders(run):
        shutil.rmtree(folder)
    log = (run / "log.jsonl").read_bytes()
    assert any(event["event"] == "save" for event in events(run))
    assert train.start(options.parse([*flags, "--save_every", "3", "--steps", "12"])) == 4
    error = capsys.readouterr().err
    assert "none is left" in error and "--out" in error and (run / "log.jsonl").read_bytes() == log


def test_a_kill_before_the_first_save_begins_anew(flags, tmp_path):  # noqa: F811
    ref = go([*at(flags, tmp_path / "ref"), "--save_every", "0"])
    run = Run([*flags, "--save_every", "0"]).reach(4).send("SIGKILL")
    run.end()
    assert exact(go([*flags, "--save_every", "0"]), ref)


@pytest.mark.parametrize("more", [[], ["--arch", "ul2", "--positions", "rotary"]])
def test_recomputing_activations_changes_no_bit(flags, more, tmp_path):  # noqa: F811
    plain = go([*at(flags, tmp_path / "plain"), *more])
    again = go([*at(flags, tmp_path / "again"), *more, "--recompute"])
    assert exact(plain, again)


def test_fsdp2_in_bfloat16(flags, tmp_path):  # noqa: F811
    """Weights are gathered in bfloat16, gradients summed in float32: near what float32 gives."""
    ref = go(at(flags, tmp_path / "ref"))
    codes, errors = Run([*at(flags, tmp_path / "half"), "--fsdp", "--dtype", "bfloat16"], world=2).end()
    assert codes == [0, 0], errors
    assert not close(tmp_path / "half", ref)
    losses = [[event["loss"] for event in events(run, "step")] for run in (ref, tmp_path / "half")]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_only_one_set_of_gradients_outlives_a_step(flags, micro_batch):  # noqa: F811
    """Nothing holds gradients once a step is over."""
    args = options.parse([*flags, "--micro_batch", str(micro_batch), "--device", "cpu"])
    ranks = parallel.Ranks("cpu")
    config = Config(4, 64, 4, 256, args.seq, 512)
    model, optimizer = train.build(args, config, 4, ranks)
    rows = [part.numpy() for part in batch(Config(seq=args.seq, vocab=512), 8)]
    train.train_step(model, optimizer, rows, None, args, ranks, torch.autocast("cpu", enabled=False))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("arch", ["bert", "ul2"])
def test_one_graph_for_all_paths(arch):
    """What torch.compile captures of a block does not depend on which block it is, nor on the path."""
    graphs = []

    def capture(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    config = Config(4, 32, 2, 64, 16, 99, dropout=0.0, arch=arch, positions="rotary")
    model = transformer.make(config)
    for block in model.blocks:
        block.compile(backend=capture)
    tokens = torch.randint(5, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    prefix = torch.tensor([4, 7])
    for kept in ((0, 3), (1,), (0, 1, 2, 3), (2, 3)):
        arguments = (tokens, Subnetwork(kept)) if arch == "bert" else (tokens, prefix, Subnetwork(kept))
        (model.encode if arch == "bert" else model.states)(*arguments).sum().backward()
    assert len(graphs) == 1


def test_what_counts_as_a_lost_process():
    """A bug whose message only sounds like the network keeps its traceback."""
    lost = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"
    assert parallel.is_lost(RuntimeError(lost)) and parallel.is_lost(torch.distributed.DistNetworkError("refused"))
    for bug in ("the state could not be restored", "experts are not all of one shape", "no connection between a and b"):
        assert not parallel.is_lost(RuntimeError(bug))
