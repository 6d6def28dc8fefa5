"""How tools/bench.py times a step: candidates in turn, on random tokens, beside what the machine can do meanwhile."""

import functools
import time
from statistics import median

import torch
from tqdm import tqdm

import data
import model as transformer
import train
from engine import machine, options, parallel
from text.corpus import rng
from text.prepare import SPECIAL


def interleaved(candidates, rounds, warmup=3, pause=0.0):
    """Call every candidate in turn, `rounds` times. Returns the seconds of each call: {name: [one per round]}.

    warmup: rounds before that, not timed. pause: seconds before each call, in which the threads of another process
    fall asleep.
    """
    times = {name: [] for name in candidates}
    for number in tqdm(range(-warmup, rounds), unit=" rounds", leave=False, disable=None):
        for name, call in candidates.items():
            time.sleep(pause)
            began = time.perf_counter()
            call()
            if number >= 0:
                times[name].append(time.perf_counter() - began)
    return times


def speed_up(times, name):
    """How many times faster than a full step."""
    return median([full / other for full, other in zip(times["full"], times[name])])


def flags_of(args, *more):
    """Flags of train.py for the network that the flags of the bench describe. The learning rate is small because there
    is no warm-up: time does not depend on it, but losses stay finite."""
    shape = [f"--{name}={getattr(args, name)}" for name in ("layers", "width", "heads", "seq", "vocab", "batch")]
    compiled = "--compile" if args.compile else "--no-compile"
    fixed = ["--config=configs/bert_base.toml", "--dropout=0", "--warmup=0", "--lr=1e-5"]
    return options.parse([*fixed, *shape, compiled, *more])


def make_step(flags, device, dtype):
    """(step, flops). step(subnetwork) takes one training step on random tokens and a subnetwork (None: all layers), and
    returns when the device has done it. flops(k): FLOPs of a step on k layers."""
    ranks, autocast, objective = parallel.Ranks(device), machine.autocast(device, dtype), data.objective(flags)
    config = transformer.Config.of(flags, objective.model_vocab)
    model, optimizer = train.build(flags, config, flags.layers, ranks)
    generator = rng(0, "bench")
    batch = objective.rows(generator.integers(SPECIAL, objective.vocab, (flags.batch, flags.seq)), generator)

    def step(subnetwork):
        train.train_step(model, optimizer, batch, subnetwork, flags, ranks, autocast)
        if device == "cuda":
            torch.cuda.synchronize()

    return step, functools.partial(transformer.flops, config, flags.batch, objective.head_positions(batch))


def product(device, dtype):
    """(a function that multiplies large square matrices, its FLOPs): what the device can do at this moment. On the CPU
    it multiplies several times, as threads that were asleep are slow at first."""
    size, times = (8192, 1) if device == "cuda" else (1024, 16)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: [float((a @ b)[0, 0]) for _ in range(times)], times * 2 * size**3
