"""How often a training step makes the host wait for a GPU: counted on the CPU, by the operations that would do so."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as transformer
import train
from engine import machine, options, parallel
from methods import width
from raptr import Subnetwork

WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique", "aten::equal"}
READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy"}


class Reads(TorchFunctionMode):
    """Counts what reads a tensor's values into Python."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READS:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts operations whose result's shape depends on values, and boolean indices."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function.name().startswith("aten::index") and len(args) > 1 else ()
        indices = indices if isinstance(indices, (list, tuple)) else ()
        is_boolean = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)
        if function.name() in WAITS or is_boolean:
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def count(call):
    names = []
    with Reads(names), Waits(names):
        call()
    return names


def step_of(arch, *more):
    flags = f"--arch {arch} --layers 4 --width 32 --heads 4 --seq 32 --vocab 300 --batch 8 --micro_batch 2 --device cpu"
    args = options.parse([*flags.split(), "--stages", "2-3-4", "--dtype", "float32", *more])
    objective = data.objective(args)
    config = transformer.Config.of(args, objective.model_vocab)
    ranks = parallel.Ranks("cpu")
    model, optimizer = train.build(args, config, 4, ranks)
    windows = np.random.default_rng(0).integers(5, 300, (8, 32))
    if arch == "bert":
        batch = data.mask_tokens(windows, 300, data.rng(0, "test"))
    else:
        batch = data.denoise(windows, [*data.DENOISERS][:8], 300, 32, data.rng(0, "test"))
    autocast = machine.autocast("cpu", torch.float32)
    return lambda path: train.train_step(model, optimizer, batch, path, args, ranks, autocast), model, batch


@pytest.mark.parametrize("arch", ["bert", "ul2"])
@pytest.mark.parametrize("path", [None, Subnetwork((0, 2, 3)), Subnetwork((0, 3), (1.0, 1.5))])
def test_a_step_reads_one_tensor_and_waits_for_nothing_else(arch, path):
    step, _, _ = step_of(arch)
    step(path)  # the first step creates what later steps have
    assert count(lambda: step(path)) == ["tolist"]


def test_the_counter_finds_a_boolean_index_and_a_read():
    """As an earlier version had them: targets of UL2 picked by a mask, loss and norm read one by one."""
    _, model, batch = step_of("ul2")
    tokens, prefix, targets = map(torch.from_numpy, batch)
    written = targets != data.NO_TARGET
    names = count(lambda: float(model.states(tokens, prefix)[written].sum().detach()))
    assert "aten::index.Tensor" in names and {"__float__", "aten::_local_scalar_dense"} & set(names)
    names = count(lambda: model([tokens, prefix, targets]))  # without positions from the host
    assert "aten::nonzero" in names


def test_positions_found_on_the_host_change_nothing():
    _, model, batch = step_of("ul2")
    tensors = train.to_device(batch, torch.device("cpu"))
    assert len(tensors) == 4
    assert torch.equal(model(tensors), model(tensors[:3]))


def test_width_is_cut_without_waiting():
    from methods.width import RandomWidth
    from raptr import Stage

    step, model, _ = step_of("bert", "--part", "width")
    path = RandomWidth([Stage(1, 9, 2)], 4, {0, 3}, slices=4).subnetwork(1)
    step(path)
    assert count(lambda: step(path)) == ["tolist"]
    assert width.cut(model, None) == []
