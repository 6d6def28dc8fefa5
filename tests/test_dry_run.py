import os
import subprocess
import sys

import pytest
import torch

from engine import ROOT, dry_run, options
from test_train import command

MEASURE = """
import sys, train
from engine import machine, options
def peak():
    return [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
machine.steady_memory = lambda: None  # so that freed memory goes back, and the peak is that of what is alive
before = peak()
assert train.start(options.parse(sys.argv[1:])) == 0
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is measured as Linux gives it")
def test_memory_is_what_a_run_takes(tiny, tmp_path):
    flags = "--layers 6 --width 256 --heads 4 --seq 256 --batch 32 --steps 2 --method full --dtype float32"
    flags = [
        *flags.split(),
        "--device",
        "cpu",
        "--eval_sequences",
        "8",
        "--data",
        tiny[tiny.index("--data") + 1],
        "--out",
        str(tmp_path / "run"),
    ]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", MEASURE, *flags], capture_output=True, text=True, env=env)
    measured = int(shown.stdout.split()[-1])
    estimated = dry_run.costs(options.parse([*flags, "--vocab", "512", "--dry_run"]))["memory"]
    print(f"estimated {estimated / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert estimated == pytest.approx(measured, rel=0.15)


def test_costs_by_hand():
    """BERT-Base on 8 GPUs: 109.5M parameters and their moments, shared out by FSDP2; FLOPs from the logs' own count."""
    flags = ["--config", "configs/bert_base.toml", "--dry_run", "--gpus", "8"]
    c = dry_run.costs(options.parse(flags))
    assert c["parameters"] == pytest.approx(110e6, rel=0.01)
    assert (c["weights"], c["gradients"], c["moments"]) == (
        4 * c["parameters"],
        4 * c["parameters"],
        8 * c["parameters"],
    )
    assert c["tokens"] == 1_000_000 * 256 * 512 and c["relative_flops_layers"] == pytest.approx(4 / 3)
    assert c["hours"] * 3600 * 8 * 989e12 * 0.4 == pytest.approx(c["flops"])
    assert c["corpus"] == 2 * c["tokens"] and c["checkpoints"] == 3
    ul2 = dry_run.costs(options.parse(["--config", "configs/ul2_1p6b.toml", "--dry_run", "--gpus", "8"]))
    assert (
        ul2["corpus"] == 4 * ul2["tokens"] and ul2["checkpoints"] == 10
    )  # 256,000 words; every 50,000th of 400,000 stays
    sharded = dry_run.costs(options.parse([*flags, "--fsdp"]))
    assert sharded["moments"] * 8 == c["moments"] and sharded["memory"] < c["memory"]
    smaller = dry_run.costs(options.parse([*flags, "--micro_batch", "8"]))
    assert smaller["activations"] < 0.4 * c["activations"] and smaller["flops"] == c["flops"]


def test_nothing_is_created_and_no_gpu_is_needed(tmp_path):
    out = tmp_path / "run"
    shown = command(
        ["--config", "configs/bert_large.toml", "--dry_run", "--gpus", "8", "--device", "cuda", "--out", str(out)]
    )
    assert shown.returncode == 0 and "335" in shown.stdout and not out.exists()
    assert not torch.cuda.is_available() or "GPU" in shown.stdout
