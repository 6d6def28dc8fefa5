"""The presets at their full size: how much of a GPU's arithmetic a step uses, and what the schedule saves of its time.

    python bench.py --device cuda                                               every preset of MICRO_BATCH
    python bench.py --device cuda --preset bert_base --micro_batch 32           one, with other sequences at a time
    python bench.py --device cpu --only presets --preset bert_toy               anywhere

A step is train.py's: micro-batches, clipping, AdamW, on random tokens, compiled as the preset says. Timed in turn, as in
bench.py: a full step, a step of each stage on a new path, and a large matrix product, which says what the device does at
this moment. Then the whole schedule in small: every step of it beside a full one.

MFU = FLOPs of the layers that ran (model.flops) / seconds / peak. Peak is the data sheet's (PEAKS), or that matrix product's.
"""

import time
from statistics import median

import denoisers
import torch

import data
import methods
import model as transformer
import train
from engine import options, parallel
from raptr import mean_layers, whole
from tools.timing import interleaved

MICRO_BATCH = {"bert_base": 64, "bert_large": 32, "ul2_1p6b": 4}  # meant for 80 GB; train.py --dry_run estimates
SHARE = {"ul2_1p6b": 8}  # a step has the sequences that one GPU of so many gets; elsewhere the preset's whole batch
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}  # dense bfloat16 TFLOP/s, of NVIDIA's data sheets


def make_batch(args, config):
    """Arrays as data.py and denoisers.py make them, of random tokens."""
    generator, words = (
        data.rng(0, "bench"),
        config.vocab - (denoisers.extra_tokens(args.seq) if args.arch == "ul2" else 0),
    )
    tokens = generator.integers(data.SPECIAL, words, (args.batch, args.seq))
    if args.arch == "bert":
        return data.mask_tokens(tokens, words, generator)
    weights = denoisers.mixture(args.denoisers)
    names = generator.choice(list(weights), args.batch, p=list(weights.values()))
    return denoisers.denoise(tokens[:, 1:], names, words, args.seq, generator)


def make_step(args, config, device, dtype):
    """A function that takes one training step on a path (None: all layers), and returns when the device has done it."""
    ranks = parallel.Ranks(device, args.timeout)
    model, optimizer = train.build(args, config, args.layers, ranks)
    batch, autocast = make_batch(args, config), torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def step(path):
        loss, gradients = train.loss_and_gradients(model, batch, path, args.micro_batch, 0, autocast, ranks)
        for p, g in zip(model.parameters(), gradients):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)  # waits

    return step, batch


def make_product(device, dtype, size):
    """(a function that takes the product of two square matrices, its FLOPs)"""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: float((a @ b)[0, 0]), 2 * size**3


def peak_of(device, given):
    """The device's peak in FLOP/s: --peak, or the data sheet's; None if neither is known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    return 1e12 * given if given else next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def schedule(method, args, step, steps):
    """The schedule shrunk to `steps` steps, each beside a full one: (seconds of full ones, seconds of its own, mean layers)."""
    full, own, layers = 0.0, 0.0, 0.0
    for i in range(steps):
        path = method.subnetwork(1 + (2 * i + 1) * args.steps // (2 * steps)) or whole(args.layers)
        for subnetwork in (None, path):
            began = time.perf_counter()
            step(subnetwork)
            took = time.perf_counter() - began
            full, own = (full + took, own) if subnetwork is None else (full, own + took)
        layers += path.cost(args.batch) / steps
    return full, own, layers


def bench_preset(name, bench, device, dtype, report):
    """One preset. bench: the flags of bench.py."""
    micro = bench.micro_batch or MICRO_BATCH.get(name, 0)
    sizes = [f"--micro_batch={micro}"] * bool(micro)
    preset = options.parse([f"--config=configs/{name}.toml", *sizes])
    batch = bench.sequences or preset.batch // SHARE.get(name, 1)
    args = options.parse([f"--config=configs/{name}.toml", *sizes, f"--batch={batch}", f"--device={device}"])
    config = transformer.Config.of(args, denoisers.model_vocab(args))
    step, rows = make_step(args, config, device, dtype)
    method, targets = methods.choose(args), float(train.head_positions(args, rows))
    stages = sorted({stage.length for stage in method.plan})
    product, work = make_product(device, dtype, 8192 if device == "cuda" else 512)
    turn = iter(range(1, 10**9))
    candidates = {"full": lambda: step(None), "product": product}
    for k in stages[:-1]:
        candidates[k] = lambda k=k: step(method.path(k, f"bench {next(turn)}"))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = interleaved(candidates, bench.rounds)
    seconds, rate = median(times["full"]), work / median(times["product"])
    cost = {k: transformer.flops(config, args.batch, targets, k) for k in stages}
    used, peak = cost[args.layers] / seconds, peak_of(device, bench.peak)
    print(
        f"  {name}: {args.layers} x {args.width}, {args.batch} x {args.seq} tokens a step, {args.micro_batch} rows at a time"
    )
    print(f"    {args.batch * args.seq / seconds:,.0f} tokens/s, {used / 1e12:.3g} TFLOP/s", end="")
    print(f", MFU {used / peak:.1%} of {peak / 1e12:g}" if peak else "", end="")
    print(f"; {used / rate:.1%} of a matrix product's {rate / 1e12:.3g} in turn with it", end="")
    print(f"; {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device == "cuda" else "")
    found = {"tokens_per_second": args.batch * args.seq / seconds, "flops_per_second": used, "of_product": used / rate}
    found |= {"mfu": used / peak} if peak else {}
    print(
        f"      layers     step         speed-up   ideal   efficiency\n      {args.layers:6}   {seconds * 1e3:8.1f} ms"
    )
    for k in stages[:-1]:
        speed, ideal = median([a / b for a, b in zip(times["full"], times[k])]), cost[args.layers] / cost[k]
        print(f"      {k:6g}   {median(times[k]) * 1e3:8.1f} ms  {speed:8.3f}  {ideal:6.3f}   {speed / ideal:10.3f}")
        found[f"efficiency_{k:g}"] = speed / ideal
    full, own, layers = schedule(method, args, step, bench.schedule)
    exact = args.layers / mean_layers(method, args.steps)
    print(f"    the schedule in {bench.schedule} steps: {full / own:.3f}x faster than full training", end="")
    print(f" (in layers: {args.layers / layers:.3f}x; by the whole plan {exact:.3f}x)")
    report[name] = found | {"schedule": full / own, "schedule_layers": exact}


def bench_presets(args, config, report):
    device, dtype = train.choose_machine(args)
    torch.set_float32_matmul_precision("high")
    if device == "cuda":
        report["device"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        print(f"  {report['device']}")
    for name in [args.preset] if args.preset else MICRO_BATCH:
        bench_preset(name, args, device, dtype, report)
        print()
