"""How the cost of a step grows: `python -m tools.bench --only growth`, one table and one figure.

One size of a BERT changes at a time, from the size that the flags name. For each: tokens per second, and FLOPs per
second as a share of what a product of large matrices reaches, in turn with it. Where that share falls, time does not
grow in proportion to FLOPs.
"""

import argparse
from statistics import median

from engine.log import subplots
from tools.timing import flags_of, interleaved, make_step, product

SIZES = {
    "layers": (4, 8, 12, 24, 48),
    "width": (64, 128, 256, 512, 1024),
    "seq": (64, 128, 256, 512, 1024),
    "batch": (1, 4, 16, 64, 256),
    "vocab": (1024, 8192, 32768, 262144),
}


def measure(args):
    """(tokens/s, share of the limit) of a full step."""
    step, flops = make_step(flags_of(args, f"--mlp={4 * args.width}"), "cpu", args.dtype)
    multiply, work = product("cpu", args.dtype)
    times = interleaved({"step": lambda: step(None), "product": multiply}, args.rounds, warmup=2)
    seconds = median(times["step"])
    return args.batch * args.seq / seconds, flops(args.layers) / seconds / (work / median(times["product"]))


def bench_growth(args, report):
    figure, grid = subplots(9, 4.2, 2, 3)
    grid.flat[-1].axis("off")
    print("  One size at a time; % of the limit: of a product of large matrices\n")
    for axes, (name, values) in zip(grid.flat, SIZES.items()):
        print(f"      {name:>6}    tokens/s   % of the limit")
        rows = []
        for value in values:
            heads = {"heads": max(1, value // 64)} if name == "width" else {}
            rows.append((value, *measure(argparse.Namespace(**{**vars(args), name: value, **heads}))))
            print(f"      {value:6}  {rows[-1][1]:10,.0f}   {rows[-1][2]:14.0%}", flush=True)
        print()
        report[f"growth_{name}"] = rows
        axes.plot([row[0] for row in rows], [100 * row[2] for row in rows], "o-", ms=4)
        axes.set(xscale="log", xlabel=name, ylim=(0, 100), ylabel="% of the limit")
        axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=7)
        axes.minorticks_off()
    if args.figure:
        figure.savefig(args.figure, dpi=110)
