"""Rehearse a large run on a small machine: what would stop it on its first day, tried in minutes.

    python -m tools.drill                               300 GB of corpus, 8 processes, 1 GB of state; about ten minutes
    python -m tools.drill --processes 2 --width 64 --gigabytes 2 --layers 4         a smaller rehearsal

A corpus of hard links to one shard of real tokens is opened, and a BERT is trained under FSDP2 on gloo, with one
thread per process. The run is stopped by SIGTERM, loses a process, meets a full disk, and is resumed on fewer
processes without FSDP2. Prints what held, with times and peak memory. Run it from the root of the project; it needs
torchrun and Linux. Not here: exhaustive trials of each fault (tests/test_faults.py); whatever only a GPU can show,
which it lists at the end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from engine import ROOT, checkpoint, log, options
from engine.errors import UserError, guard
from text import prepare
from text.corpus import Corpus

UNTRIED = """\
  Untried, because only GPUs and several machines can show it: NCCL and its watchdog, flex attention, compiled blocks
  and activations at full size, the speed of gathers and of a shared file system, rendezvous of several nodes."""


def linked_corpus(folder, gigabytes):
    """A corpus folder whose training split is one shard of the manual's tokens, repeated, under many names."""
    source = Corpus(prepare.prepared())
    shutil.copytree(source.folder, folder)
    count = 1 << 24
    tokens = np.resize(source.read("train", 0, int(source.ends["train"][-1])), count)
    writer = prepare.ShardWriter(folder, "large", source.vocab)
    for chunk in np.split(tokens, 16):
        writer.write(chunk.tolist())
    writer.close()
    meta = json.loads((folder / "meta.json").read_text())
    links = max(1, gigabytes * 10**9 // (2 * count))
    names = [f"large_{number:05d}.bin" for number in range(links)]
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    meta["train"] |= {"shards": names, "sha256": writer.digests * links, "tokens": count * links}
    (folder / "meta.json").write_text(json.dumps(meta))
    return count * links * 2


class Launch:
    """torchrun with this many processes, or a plain start of one. file_limit: bytes that no file may exceed."""

    def __init__(self, flags, processes, *more, file_limit=None):
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        limit = f"ulimit -f {file_limit // 1024}; " if file_limit else ""
        command = ["bash", "-c", f'{limit}exec "$@"', "drill", *start, "train.py", *flags, *more]
        self.log = Path(flags[flags.index("--out") + 1], "log.jsonl")
        self.resumes = len(self.events("resume"))
        self.errors = open(self.log.parent.with_suffix(".err"), "w+")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=self.errors, stdout=subprocess.DEVNULL
        )

    def events(self, kind):
        return [event for event in log.read_log(self.log.parent) if event["event"] == kind] if self.log.exists() else []

    def reach(self, kind, count):
        """Wait until this launch's log has so many events of a kind. Returns the seconds since the start."""
        while self.log.exists() and checkpoint.folders(self.log.parent) and len(self.events("resume")) == self.resumes:
            self.wait(kind, count)  # until then the log holds steps that will be taken again
        while len(self.events(kind)) < count:
            self.wait(kind, count)
        return time.monotonic() - self.began

    def wait(self, kind, count):
        if self.process.poll() is not None:
            raise UserError(f"the run ended before {kind} {count}:\n{self.said()}")
        time.sleep(0.05)

    def workers(self):
        """Process ids of the training processes, by rank."""
        shown = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout
        ranks = {}
        for pid in shown.split():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks |= {int(v[5:]): int(pid) for v in variables if v.startswith(b"RANK=")}
        return ranks

    def peak(self):
        """Peak memory of the largest training process so far, in bytes."""
        pids = [*self.workers().values()] or [self.process.pid]
        lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return max(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

    def end(self, send=None, rank=None):
        """(exit code, seconds until it ended), after a signal to the launcher, or to one rank."""
        began = time.monotonic()
        if send:
            os.kill(self.process.pid if rank is None else self.workers()[rank], send)
        self.process.wait()
        return self.process.returncode, time.monotonic() - began

    def said(self):
        self.errors.seek(0)
        return "".join(line for line in self.errors if "train.py" in line or "warning" in line)[-2000:]


def report(what, held, detail):
    print(f"  {'held  ' if held else 'FAILED'}  {what:44} {detail}", flush=True)
    return held


def disk_rate(folder, size):
    """Bytes a second that the disk itself takes: one file, written and flushed."""
    block, began = os.urandom(1 << 24), time.monotonic()
    with open(folder / "rate", "wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    (folder / "rate").unlink()
    return size // len(block) * len(block) / (time.monotonic() - began)


def saving(folder, size):
    """A save beside the disk's own rate, in turn, three times: the median ratio."""
    tensors = {"model": {str(i): torch.rand(1 << 22) for i in range(size >> 24)}}
    ratios = []
    for step in range(1, 4):
        own = disk_rate(folder, size)
        began = time.monotonic()
        checkpoint.save(folder, step, tensors, {"step": step})
        ratios.append(sum(t.nbytes for t in tensors["model"].values()) / (time.monotonic() - began) / own)
        shutil.rmtree(folder / f"step_{step:08d}")
    return sorted(ratios)[1], own


def rehearse(args, folder):
    """All trials. Returns whether everything held."""
    began = time.monotonic()
    size = linked_corpus(folder / "corpus", args.gigabytes)
    wrote = time.monotonic() - began
    began = time.monotonic()
    Corpus(folder / "corpus")
    opened = time.monotonic() - began
    good = [report("a corpus opens without being read", opened < 10, f"{size / 1e9:.0f} GB in {opened:.2f} s")]
    print(f"          (written in {wrote:.0f} s)")

    flags = f"--config configs/bert_toy.toml --layers {args.layers} --width {args.width} --heads {args.width // 32}"
    flags += " --stages auto --dtype float32 --device cpu --threads 1 --timeout 60 --keep 1 --steps 400 --save_every 0"
    flags += f" --batch 24 --micro_batch 1 --seq 32 --eval_every 0 --eval_sequences {args.processes}"
    flags = [*flags.split(), "--data", str(folder / "corpus"), "--out", str(folder / "run")]

    run = Launch(flags, args.processes, "--fsdp")
    first = run.reach("step", 1)
    run.reach("step", 3)
    peak = run.peak()
    _, took = run.end(signal.SIGTERM)
    stopped, saved = run.events("step")[-1]["step"], checkpoint.folders(folder / "run")
    state = sum(file.stat().st_size for file in saved[-1].iterdir()) if saved else 0
    held = bool(saved) and checkpoint.step_of(saved[-1]) == stopped
    detail = f"{args.processes} processes, FSDP2: first step after {first:.0f} s, peak {peak / 1e9:.2f} GB a process"
    good += [report("a run starts", True, detail)]
    good += [report("SIGTERM to torchrun: saved", held, f"{state / 1e9:.2f} GB of state, ended after {took:.0f} s")]

    run = Launch(flags, args.processes, "--fsdp")
    run.reach("step", stopped + 2)
    code, took = run.end(signal.SIGKILL, rank=args.processes // 2)
    kept = checkpoint.folders(folder / "run")
    held = code != 0 and [checkpoint.step_of(f) for f in kept] == [stopped]
    good += [
        report("a killed process ends the run", held, f"after {took:.0f} s; the checkpoint of step {stopped} stays")
    ]

    run = Launch(flags, args.processes, "--fsdp", "--save_every", str(stopped + 1), file_limit=state // 8)
    run.reach("step", stopped + 2)
    code, took = run.end(signal.SIGTERM)
    held = "no checkpoint at step" in run.said() and "could not be saved" in run.said()
    held &= [checkpoint.step_of(f) for f in checkpoint.folders(folder / "run")] == [stopped]
    good += [report("a full disk, then SIGTERM: all agree", held, f"ended after {took:.0f} s; nothing lost")]

    run = Launch(flags, max(1, args.processes // 4))
    run.reach("step", stopped + 1)
    world = run.events("resume")[-1]["world_size"]
    code, took = run.end(signal.SIGTERM)
    held = run.events("step")[-1]["step"] > stopped
    good += [report("resumed on fewer processes, without FSDP2", held, f"{world} of {args.processes} processes")]

    ratio, own = saving(folder, args.save_megabytes << 20)
    detail = f"{ratio:.2f} of its {own / 1e9:.2f} GB/s, median of 3, {args.save_megabytes} MiB"
    good += [report("a save at 0.8 of the disk's rate", ratio >= 0.8, detail)]
    return all(good)


def main():
    parser = options.command("tools.drill", __doc__)
    parser.add_argument("--folder", default="out/drill", help="where to work; must not exist [out/drill]")
    parser.add_argument("--processes", type=options.count, default=8, help="processes under FSDP2 [8]")
    parser.add_argument("--gigabytes", type=options.count, default=300, help="size of the corpus [300]")
    parser.add_argument("--layers", type=options.count, default=12, help="layers of the BERT [12]")
    parser.add_argument("--width", type=options.count, default=768, help="width of the BERT [768]")
    parser.add_argument("--save_megabytes", type=options.count, default=1024, help="size of the timed save [1024]")
    args = parser.parse_args()
    folder = Path(args.folder).resolve()
    if folder.exists():
        raise UserError(f"--folder {folder} exists already")
    folder.mkdir(parents=True)
    print(f"\n  {os.cpu_count()} cores, torch {torch.__version__}\n")
    try:
        held = rehearse(args, folder)
    finally:
        shutil.rmtree(folder)
    print(f"\n{UNTRIED}\n")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    guard("tools.drill", main)
