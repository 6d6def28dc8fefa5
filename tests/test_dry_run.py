import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as transformer
import train
from engine import ROOT, dry_run, machine, options, parallel
from test_train import command
from text.corpus import rng


class Alive(TorchDispatchMode):
    """Adds up the bytes of all tensors that exist at a time, and keeps the largest sum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def forget(self, pointer, size):
        self.seen.discard(pointer)
        self.now -= size

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self.add, result)
        return result


@pytest.mark.parametrize("more", [[], ["--micro_batch", "8"], ["--micro_batch", "8", "--recompute"]])
def test_memory_is_what_a_step_takes(more):
    """Beside the peak of what is alive in a real step: at once, and in four micro-batches that add up."""
    flags = (
        "--layers 6 --width 256 --heads 4 --seq 128 --batch 32 --method full --dtype float32 --vocab 512 --device cpu"
    )
    args = options.parse([*flags.split(), *more])
    objective, ranks = data.objective(args), parallel.Ranks("cpu")
    config = transformer.Config.of(args, objective.model_vocab)
    model, optimizer = train.build(args, config, 6, ranks)
    state = sum(p.nbytes for p in model.parameters()) * 3
    batch = data.mask_tokens(rng(0, "test").integers(5, 512, (32, 128)), 512, rng(0, "mask"))
    with Alive() as alive:
        train.train_step(model, optimizer, batch, None, args, ranks, machine.autocast("cpu", torch.float32))
    measured = state + alive.peak
    estimated = dry_run.costs(options.parse([*flags.split(), *more, "--dry_run"]))["memory"]
    assert estimated == pytest.approx(measured, rel=0.1)


def test_costs_by_hand(monkeypatch):
    """BERT-Base on 8 GPUs: 109.5M parameters and their moments, shared out by FSDP2; FLOPs from the logs' own count."""
    flags = ["--config", "configs/bert_base.toml", "--dry_run", "--gpus", "8"]
    c = dry_run.costs(options.parse(flags))
    assert c["parameters"] == pytest.approx(110e6, rel=0.01)
    assert [c[name] / c["parameters"] for name in ("weights", "gradients", "moments")] == [4, 4, 8]
    assert c["tokens"] == 1_000_000 * 256 * 512 and c["relative_flops_layers"] == pytest.approx(4 / 3)
    assert c["hours"] * 3600 * 8 * 989e12 * 0.4 == pytest.approx(c["flops"])
    assert c["corpus"] == 2 * c["tokens"] and c["checkpoints"] == 3
    ul2 = dry_run.costs(options.parse(["--config", "configs/ul2_1p6b.toml", "--dry_run", "--gpus", "8"]))
    assert ul2["corpus"] == 4 * ul2["tokens"]  # 256,000 words
    assert ul2["checkpoints"] == 10  # every 50,000th of 400,000 stays
    sharded = dry_run.costs(options.parse([*flags, "--fsdp", "--dtype", "bfloat16"]))
    assert sharded["moments"] * 8 == c["moments"] and sharded["memory"] < c["memory"]
    assert sharded["gathered"] == pytest.approx(2 * c["parameters"] + 4 * 12 * 768**2, rel=0.01)
    monkeypatch.setattr(parallel, "KEPT", 0)
    freed = dry_run.costs(options.parse([*flags, "--fsdp", "--dtype", "bfloat16"]))["gathered"]
    assert sharded["gathered"] - freed == pytest.approx(2 * 10 * 12 * 768**2, rel=0.01)
    smaller = dry_run.costs(options.parse([*flags, "--micro_batch", "8"]))
    assert smaller["activations"] < 0.4 * c["activations"] and smaller["flops"] == c["flops"]


def test_readmes_commands_fit_into_80_gb():
    """Every training command of README at full size, on the machine it is written for."""
    lines = (ROOT / "README.md").read_text().splitlines()
    lines = [line for line in lines if line.startswith(("torchrun --nproc", "python train.py")) and "configs/" in line]
    commands = [line for line in lines if "toy" not in line]
    assert len(commands) >= 5
    for line in commands:
        gpus = "8" if line.startswith("torchrun") else "1"
        flags = line.split("train.py ")[1].split("  ")[0].split()
        cost = dry_run.costs(options.parse([*flags, "--dry_run", "--gpus", gpus, "--device", "cuda"]))
        assert cost["memory"] < 75e9, line


def test_a_wrong_flag_is_one_sentence():
    shown = command(["--config", "configs/ul2_toy.toml", "--denoisers", "r3:0", "--dry_run"])
    assert (
        shown.returncode == 2
        and shown.stderr.startswith("train.py: --denoisers r3:0")
        and shown.stderr.count("\n") == 1
    )


def test_nothing_is_created_and_no_gpu_is_needed(tmp_path):
    out = tmp_path / "run"
    shown = command(
        ["--config", "configs/bert_large.toml", "--dry_run", "--gpus", "8", "--device", "cuda", "--out", str(out)]
    )
    assert shown.returncode == 0 and "335" in shown.stdout and not out.exists()
    assert not torch.cuda.is_available() or "GPU" in shown.stdout
