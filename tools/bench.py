"""How fast is a training step, and does a path save what it should?

    python -m tools.bench                   everything below except growth and presets, on the CPU
    python -m tools.bench --only paths      a full step against steps on paths of 6, 8 and 10 of 12 layers
    python -m tools.bench --only width      the same in width: a share of the heads and hidden neurons of every layer
    python -m tools.bench --only ul2        the same as paths, for a UL2 decoder
    python -m tools.bench --only methods    every method over a whole short run, and one growth
    python -m tools.bench --only rivals     tokens/s against BERT of `transformers`, and nanoGPT with --nanogpt FOLDER
    python -m tools.bench --only growth     how the cost of a step grows with depth, width, length, batch, vocabulary
    python -m tools.bench --only over       what raptr.over saves in BERT and Llama of `transformers`
    python -m tools.bench --device cuda     the presets at full size: MFU, and what paths and the schedule save
    python -m tools.bench --only presets --preset bert_toy         one preset, anywhere

A step is train.train_step, on random tokens. Each round times one step of every candidate, one after another, so that
a slow moment of the machine hits all of them. A speed-up is the median, over the rounds, of the ratio within a round.
Let nothing else run meanwhile.

    efficiency of a path = speed-up / ideal, where ideal = FLOPs of a full step / FLOPs of its step; 1 is perfect
    MFU = FLOPs of the layers that ran (model.flops) / seconds / the device's peak

Not here: how much memory and time a run will need (train.py --dry_run).
"""

import argparse
import gc
import importlib.util
import itertools
import json
import platform
import sys
import time
from statistics import median

import torch

import methods
import model as transformer
import stacking
import train
from engine import ROOT, log, machine, options, parallel
from engine.errors import guard
from raptr import all_layers, mean_layers
from tools import rivals
from tools.growth import bench_growth
from tools.timing import flags_of, interleaved, make_step, product, speed_up

# ----------------------------------------------------------------------------------------------------------------
# What is timed, and how


def time_paths(step, method, rounds, **others):
    """Seconds of a full step, of a step on a path of each stage's length (a new path each time) and of other calls."""
    numbers = itertools.count()
    candidates = {"full": lambda: step(None), **others}
    for k in sorted({stage.length for stage in method.plan} - {method.layers}):
        candidates[k] = lambda k=k: step(method.path(k, f"bench {next(numbers)}"))
    return interleaved(candidates, rounds)


def show_paths(times, flops, layers):
    """Print a table of what `time_paths` measured. Returns {layers of a path: its efficiency}."""
    print("      layers          step   speed-up   ideal   efficiency")
    print(f"      {layers:6}   {median(times['full']) * 1e3:8.1f} ms")
    efficiency = {}
    for k in [name for name in times if isinstance(name, (int, float))]:
        speed, ideal = speed_up(times, k), flops(layers) / flops(k)
        efficiency[k] = speed / ideal
        print(f"      {k:6g}   {median(times[k]) * 1e3:8.1f} ms   {speed:8.3f}  {ideal:6.3f}   {efficiency[k]:10.3f}")
    return efficiency


def beside_full(step, subnetworks):
    """Take a step on each subnetwork, and a full one just before it. Returns the seconds of each kind in all."""
    seconds = [0.0, 0.0]
    for subnetwork in subnetworks:
        for kind, trained in enumerate((None, subnetwork)):
            began = time.perf_counter()
            step(trained)
            seconds[kind] += time.perf_counter() - began
    return seconds


# ----------------------------------------------------------------------------------------------------------------
# Our own steps: paths in depth and width, UL2, every method


def compare_paths(args, flags, title, key, report):
    step, flops = make_step(flags, "cpu", args.dtype)
    times = time_paths(step, methods.choose(flags), args.rounds)
    print(f"  {title}\n")
    for k, efficiency in show_paths(times, flops, args.layers).items():
        report[f"{key}_{k:g}_of_{args.layers}"] = efficiency


def bench_paths(args, report):
    compare_paths(args, flags_of(args), "BERT, paths", "efficiency", report)


def bench_width(args, report):
    """Half and three quarters of every layer's heads and hidden neurons, in place of as many layers."""
    stages = f"--stages={args.layers // 2}-{3 * args.layers // 4}-{args.layers}"
    title = "BERT, a share of every layer's width that costs as much as so many layers"
    compare_paths(args, flags_of(args, "--part=width", stages), title, "efficiency_width", report)


def bench_ul2(args, report):
    """The block of configs/ul2_1p6b.toml: gated, RMS norms, rotary positions, an MLP 2.5 times as wide."""
    block = ["--gated", "--rms", "--positions=rotary", f"--mlp={5 * args.width // 2}"]
    compare_paths(args, flags_of(args, "--arch=ul2", *block), "UL2, paths", "efficiency_ul2", report)


def bench_methods(args, report):
    """Every step of a short run of every method, each beside a full step. A method that costs 3/4 of full training on
    request (--mean_depth) is asked for that."""
    T = 3 * max(2, args.rounds)  # at least one step a stage
    step, flops = make_step(flags_of(args), "cpu", args.dtype)
    beside_full(step, [None, None])  # warm-up
    print(f"  Every method: a run of {T} steps, each beside a full step; ratios of the sums\n")
    print("      method       speed-up   ideal   efficiency")
    for name in [name for name in methods.METHODS if name != "full"]:
        cheaper = "mean_depth" in methods.METHODS[name][1] and name != "jump"  # which costs 3/4 of 12 layers by itself
        depth = [f"--mean_depth={0.75 * args.layers:g}"] * cheaper
        method = methods.choose(flags_of(args, f"--method={name}", f"--steps={T}", *depth))
        paths = [method.subnetwork(t) or all_layers(method.depth(t)) for t in range(1, T + 1)]
        full, ours = beside_full(step, paths)
        speed, ideal = full / ours, T * flops(args.layers) / sum(flops(path.cost()) for path in paths)
        print(f"      {name:11}  {speed:8.3f}  {ideal:6.3f}   {speed / ideal:10.3f}")
        report[f"efficiency_{name}"] = speed / ideal
    flags, half = flags_of(args, "--method=stacking"), args.layers // 2
    config, ranks = transformer.Config.of(flags, args.vocab), parallel.Ranks("cpu")
    model, optimizer = train.build(flags, config, half, ranks)
    began = time.perf_counter()
    train.grow(model, optimizer, stacking.stacking(half, args.layers), flags, config, ranks)
    seconds = time.perf_counter() - began
    report["growth_over_step"] = seconds * T / full
    print(f"\n      growing from {half} to {args.layers} layers: {seconds * 1e3:.0f} ms", end=", ")
    print(f"{report['growth_over_step']:.2f} of a full step")


# ----------------------------------------------------------------------------------------------------------------
# The presets at full size

MICRO_BATCH = {"bert_base": 64, "bert_large": 32, "ul2_1p6b": 4}  # meant for 80 GB; train.py --dry_run estimates
SHARE = {"ul2_1p6b": 8}  # a step has the sequences that one GPU of so many gets; elsewhere the preset's whole batch
PEAKS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312}  # dense bfloat16 TFLOP/s, of NVIDIA's data sheets


def peak_of(args):
    """The device's peak in FLOP/s: --peak, or the data sheet's; None if neither is known."""
    name = torch.cuda.get_device_name() if args.device == "cuda" else ""
    return 1e12 * (args.peak or next((peak for known, peak in PEAKS.items() if known in name), 0)) or None


def bench_preset(name, args, report):
    """Time full steps, steps on paths and a matrix product; then a short schedule, every step beside a full one."""
    gc.collect()  # of the preset before: --compile holds its network in cycles
    preset = [f"--config=configs/{name}.toml", f"--device={args.device}", "--lr=1e-5"]  # small: see flags_of
    preset += ["--compile"] * args.compile
    batch = args.sequences or options.parse(preset).batch // SHARE.get(name, 1)
    rows = args.micro_batch or MICRO_BATCH.get(name, 0)
    flags = options.parse([*preset, f"--batch={batch}", f"--micro_batch={rows}"])
    method, L = methods.choose(flags), flags.layers
    step, flops = make_step(flags, args.device, args.dtype)
    multiply, work = product(args.device, args.dtype)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = time_paths(step, method, args.rounds, product=multiply)

    seconds, tokens, peak = median(times["full"]), flags.batch * flags.seq, peak_of(args)
    rate, possible = flops(L) / seconds, work / median(times["product"])
    facts = {"tokens_per_second": tokens / seconds, "flops_per_second": rate, "of_product": rate / possible}
    facts |= {"mfu": rate / peak} if peak else {}
    print(f"  {name}: {L} x {flags.width}, {flags.batch} x {flags.seq} tokens a step", end=", ")
    print(f"{flags.micro_batch} sequences at a time{', compiled' if flags.compile else ''}")
    print(f"    {tokens / seconds:,.0f} tokens/s, {rate / 1e12:.3g} TFLOP/s, MFU", end=" ")
    print(f"{rate / peak:.1%} of {peak / 1e12:g}" if peak else "n/a", end="")
    print(f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if args.device == "cuda" else "")
    print(f"    {rate / possible:.1%} of a large matrix product's {possible / 1e12:.3g} TFLOP/s, in turn with it\n")
    facts |= {f"efficiency_{k:g}": value for k, value in show_paths(times, flops, L).items()}

    middles = [1 + (2 * i + 1) * flags.steps // (2 * args.schedule) for i in range(args.schedule)]
    paths = [method.subnetwork(t) or all_layers(L) for t in middles]
    full, ours = beside_full(step, paths)
    sampled, exact = L * len(paths) / sum(path.cost() for path in paths), L / mean_layers(method, flags.steps)
    print(f"\n    the schedule in {args.schedule} steps: {full / ours:.3f}x faster than full training", end=" ")
    print(f"(in layers: {sampled:.3f}x; by the whole plan {exact:.3f}x)\n")
    report[name] = facts | {"schedule": full / ours, "schedule_layers": exact}


def bench_presets(args, report):
    if args.device == "cuda":
        report["device"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        print(f"  {report['device']}\n")
    for name in [args.preset] if args.preset else MICRO_BATCH:
        bench_preset(name, args, report)


# ----------------------------------------------------------------------------------------------------------------

ON_CPU = {"paths": bench_paths, "width": bench_width, "ul2": bench_ul2, "methods": bench_methods}
ON_CPU |= {"rivals": rivals.bench_rivals, "over": rivals.bench_over}
BENCHES = ON_CPU | {"growth": bench_growth, "presets": bench_presets}


def read_flags():
    parser, count, natural = options.command("tools.bench", __doc__), options.count, options.natural
    enough = options.number(int, "a whole number, 4 or above", lambda x: x >= 4)
    presets, add = sorted(path.stem for path in (ROOT / "configs").glob("*.toml")), parser.add_argument
    add("--only", choices=[*BENCHES], metavar="PART", help=f"one of {', '.join(BENCHES)}")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: presets only")
    add("--layers", type=enough, default=12, help="[12]")
    add("--width", type=count, default=256, help="[256]")
    add("--heads", type=count, default=4, help="[4]")
    add("--seq", type=count, default=128, help="tokens per sequence [128]")
    add("--vocab", type=count, default=8192, help="[8192]")
    add("--batch", type=count, default=16, help="sequences per step [16]")
    add("--rounds", type=count, default=15, help="timed steps of each candidate [15]")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="as for train.py [auto]")
    add("--compile", action="store_true", help="compile the block")
    add("--preset", choices=presets, metavar="NAME", help=f"presets: only this one, of {', '.join(presets)}")
    add("--micro_batch", type=natural, default=0, help="presets: sequences at a time; 0: by preset")
    add("--sequences", type=natural, default=0, help="presets: sequences per step; 0: the preset's batch, or its share")
    add("--schedule", type=count, default=24, help="presets: steps that stand for the whole schedule [24]")
    add("--peak", type=options.nonnegative, default=0.0, help="presets: the device's dense TFLOP/s; 0: by its name")
    add("--nanogpt", default="", metavar="FOLDER", help="rivals: a checkout of nanoGPT, to be one of them")
    add("--figure", default="", metavar="FILE", help="growth: draw it into this file")
    add("--json", help="write the figures to this file too")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and args.only not in (None, "presets"):
        parser.error(f"--only {args.only} measures the CPU; --device cuda is for --only presets")
    flags_of(args)  # refuses a network that cannot be
    args.device, args.dtype = machine.choose(args.device, args.dtype)
    return args


def main():
    args = read_flags()
    torch.manual_seed(0)
    if args.worker:
        return rivals.worker(args)
    machine.settings()
    chosen = [args.only] if args.only else ["presets"] if args.device == "cuda" else [*ON_CPU]
    threads, dtype = torch.get_num_threads(), str(args.dtype).removeprefix("torch.")
    cores = f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    report = {"machine": f"{cores}, torch {torch.__version__}, {dtype}"}
    report |= {"command": " ".join(["python -m tools.bench", *sys.argv[1:]])}
    print(f"\n  {report['machine']}; medians of {args.rounds} rounds")
    if chosen != ["presets"]:
        compiled = ", compiled" if args.compile else ""
        print(f"  {args.layers} x {args.width}, {args.batch} x {args.seq} tokens a step{compiled}")
    print()
    for name in chosen:
        if name == "over" and not importlib.util.find_spec("transformers"):
            print(f"  {name}: transformers is not installed (pip install transformers); not run")
        else:
            BENCHES[name](args, report)
        print()
    if args.json:
        log.write(args.json, json.dumps(report, indent=1))


if __name__ == "__main__":
    guard("tools.bench", main)
