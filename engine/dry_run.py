"""What a run needs, before it runs: parameters, FLOPs, memory, disk, hours. Nothing is allocated and no text is read.

    python train.py --config configs/bert_base.toml --dry_run --gpus 8

Memory is not a formula: the model takes one training step on fake tensors, which have shapes but no contents, and
torch's own tracker counts what is alive. Hours are FLOPs / (GPUs x peak x MFU): --mfu is an assumption of yours, not
a measurement. --device says which machine is meant; on a GPU attention is fused, and a compiled block needs less than
is shown here. Not here: how much a run really takes (tools/bench.py).
"""

import dataclasses
import functools
import math
import warnings

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import data
import methods
import model as transformer
from engine import parallel
from raptr import mean_layers
from text import prepare

GB = 1e9


def step_memory(config, sequences, targets, bf16, gpu, recompute=False):
    """Bytes at the peak of one step of one process, on `sequences` sequences with `targets` positions in each for the
    head: weights, moments, activations, and the gradients that exist by then."""
    was = transformer.explicit
    transformer.explicit = lambda q: bf16 and not gpu
    try:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = transformer.make(config)
            model.recompute = recompute
            if gpu:  # fused attention with dropout keeps nothing more there; the CPU's would write attention out
                for block in model.blocks:
                    block.attention.dropout = 0.0
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            tokens = torch.zeros(sequences, config.seq, dtype=torch.long)
            asked = tokens[:, : math.ceil(targets)].clone()
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()  # now it has its state
            optimizer.zero_grad(set_to_none=True)
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    if config.arch == "bert":
                        states = model.states(tokens, asked)
                    else:
                        states = model.states(tokens, tokens[:, 0])[:, : asked.shape[1]]
                    loss = model.cross_entropy(states.flatten(0, 1), asked.flatten())
                loss.backward()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    finally:
        transformer.explicit = was


def memory_of(config, *how):
    """`step_memory`, for a deep network from two shallow ones: layers are alike, so each takes the same."""
    if config.layers <= 6:
        return step_memory(config, *how)
    two, four = (step_memory(dataclasses.replace(config, layers=layers), *how) for layers in (2, 4))
    return four + (four - two) * (config.layers - 4) // 2


def costs(args):
    """Everything that is printed, as a dict: bytes, FLOPs, hours. `args`: the flags of train.py, parsed."""
    objective = data.objective(args)
    config = transformer.Config.of(args, objective.model_vocab)
    method, targets = methods.choose(args), objective.targets_per_row()
    price = functools.partial(transformer.flops, config, args.batch, targets)
    mean, P, W = mean_layers(method, args.steps), transformer.parameters(config), args.gpus
    gpu = args.device in ("auto", "cuda")
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and gpu)
    activations = memory_of(config, args.micro_batch, targets, bf16, gpu, args.recompute) - 12 * P
    logits = 4 * config.padded_vocab * min(args.loss_chunk or math.inf, math.ceil(args.micro_batch * targets))
    accumulates = args.batch // args.micro_batch // W > 1
    share = W if args.fsdp else 1
    block = P - transformer.parameters(dataclasses.replace(config, layers=config.layers - 1))
    # FSDP2 holds gathered: the whole model, with all gradients (float32) between micro-batches; or, if it is too large,
    # embedding, head and two blocks, with the gradients of one.
    size = 2 if bf16 else 4
    if size * P <= parallel.KEPT:
        gathered = size * P + 4 * (P if accumulates else block)
    else:
        gathered = size * (P - (config.layers - 2) * block) + 4 * block
    gathered *= args.fsdp
    in_flight = 0 if args.fsdp or W == 1 else 2 * parallel.BUCKET  # gradients on their way to other ranks
    fixed = {"weights": 4 * P / share, "gradients": 4 * P / share, "moments": 8 * P / share}
    # Gradients add up in place. One process keeps the first half of the batch apart: one set more.
    sets = accumulates * (2 if W == 1 else 1)
    in_backward = fixed["weights"] + fixed["moments"] + activations + sets * fixed["gradients"] + in_flight
    total = max(in_backward, sum(fixed.values()))
    recomputed = args.recompute * (price(mean) - price(0)) / 3  # the forward pass of the layers, once more
    flops, tokens = args.steps * price(mean), args.steps * args.batch * args.seq
    return {
        "parameters": P, **fixed, "activations": activations, "logits": logits, "gathered": gathered,
        "memory": total + gathered, "flops_per_step": price(mean), "flops": flops,
        "relative_flops_layers": args.layers / mean, "relative_flops_step": price() / price(mean),
        "tokens": tokens, "corpus": tokens * np.dtype(prepare.token_dtype(args.vocab)).itemsize, "checkpoint": 12 * P,
        "checkpoints": args.keep + 1 + ((args.steps - 1) // args.keep_every if args.keep_every else 0),
        "hours": (flops + args.steps * recomputed) / (W * args.peak * 1e12 * args.mfu) / 3600,
    }  # fmt: skip


def show(args):
    c = costs(args)
    engine = ("FSDP2" if args.fsdp else "data parallel") if args.gpus > 1 else "one process"
    size = f"{c['parameters'] / 1e9:.2f}B" if c["parameters"] > 1e9 else f"{c['parameters'] / 1e6:.1f}M"
    machine = "CPU" if args.device == "cpu" else "GPU"
    parts = ", ".join(f"{name} {c[name] / GB:.1f}" for name in ("weights", "gradients", "moments", "activations"))
    parts += f" (logits {c['logits'] / GB:.1f})" + (f", gathered {c['gathered'] / GB:.1f}" if args.fsdp else "")
    relative = f"{c['relative_flops_layers']:.3f}x in layers, {c['relative_flops_step']:.3f}x in whole steps"
    memory = f"{c['memory'] / GB:.1f} GB for each {machine}: {engine} on {args.gpus}"
    memory += f", {args.micro_batch} sequences at a time"
    rows = [
        ("model", f"{args.layers} x {args.width}, {size} parameters"),
        ("run", f"{args.method}, {args.steps:,} steps of {args.batch} x {args.seq} tokens"),
        ("FLOPs", f"{c['flops_per_step']:.3e} a step, {c['flops']:.3e} in all"),
        ("relative FLOPs", relative),
        ("memory", memory),
        ("", parts),
        ("", "these are not all there at once"),
        ("tokens", f"{c['tokens'] / 1e9:.3g}B, {c['corpus'] / GB:,.0f} GB on disk if none is to come twice"),
        ("checkpoints", f"{c['checkpoint'] / GB:.1f} GB each, at most {c['checkpoints']} at a time"),
        ("time", f"{c['hours']:,.1f} hours, if each {machine} does {args.mfu:.0%} of {args.peak:g} TFLOP/s"),
    ]
    if args.device == "cpu":
        rows[-1] = ("time", "python -m tools.bench measures it on this machine")
        rows.insert(6, ("", "up to half as much again where malloc keeps what is freed, as train.py asks it to"))
    print("\n" + "\n".join(f"  {name:15} {text}" for name, text in rows) + "\n")
    return 0
