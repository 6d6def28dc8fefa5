"""What is promised of a GPU, where there is one: equal bits with --deterministic, engines that agree, a benchmark."""

import json
import shutil

import pytest
import torch

from engine import checkpoint
from processes import Run, script
from test_faults import at, close, exact
from test_train import go

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")


@pytest.fixture
def flags(tiny):
    return [*tiny, "--device", "cuda", "--micro_batch", "2", "--keep", "99"]


@gpu
@pytest.mark.parametrize("arch", ["bert", "ul2"])
@pytest.mark.parametrize("more", [[], ["--compile"]], ids=["eager", "compiled"])
def test_a_killed_run_goes_on_with_the_same_bits(arch, more, flags, tmp_path):
    flags = [*flags, "--arch", arch, "--deterministic", "--save_every", "1", "--dropout", "0.1", *more]
    ref, copy = go(flags), tmp_path / "copy"
    shutil.copytree(ref, copy)
    for folder in checkpoint.folders(copy)[5:]:
        shutil.rmtree(folder)
    assert exact(go(at(flags, copy)), ref)


@gpu
@pytest.mark.parametrize("engine", [[], ["--fsdp"]], ids=["data parallel", "FSDP2"])
def test_two_processes_agree_with_one(engine, flags, tmp_path):
    """Two processes on one GPU speak through gloo; with a GPU each, through NCCL."""
    flags = [*flags, "--dtype", "float32"]
    one = go(flags)
    codes, errors = Run([*at(flags, tmp_path / "two"), *engine], world=2).end()
    assert codes == [0, 0], errors
    assert close(one, tmp_path / "two")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("arch", ["bert", "ul2"])
def test_the_presets_are_measured(device, arch, tmp_path, monkeypatch):
    """tools.bench --only presets, on small ones: what it says of FLOPs and time fits together."""
    sizes = ["--sequences", 4, "--micro_batch", 2, "--rounds", 2, "--schedule", 4, "--peak", 1]
    what = ["--only", "presets", "--preset", f"{arch}_toy", "--device", device]
    shown = script("tools.bench", *what, *sizes, "--json", tmp_path / "f.json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads((tmp_path / "f.json").read_text())[f"{arch}_toy"]
    assert found["schedule_layers"] == pytest.approx(12 / 9)
    assert found["mfu"] == pytest.approx(found["flops_per_second"] / 1e12)
    assert {f"efficiency_{k}" for k in (3, 4, 5)} < set(found) and 0.2 < found["efficiency_3"] < 5
    shape = {"bert": "6 x 64", "ul2": "6 x 128"}[arch]
    assert 0.5 < found["schedule"] < 3 and f"{arch}_toy: {shape}, 4 x " in shown.stdout


def test_a_wrong_preset_is_named():
    shown = script("tools.bench", "--only", "presets", "--preset", "bert_nowhere")
    assert shown.returncode == 2 and "bert_nowhere" in shown.stderr
    shown = script("tools.bench", "--only", "paths", "--device", "cuda")
    assert shown.returncode == 2 and "--only presets" in shown.stderr
