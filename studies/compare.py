"""The comparison: every method under one budget, several seeds, paired differences, a table and figures.

    python compare.py --methods full,full_flops,raptr,stacking --seeds 3            at 1.333x, the paper's budget
    python compare.py --methods all --seeds 5 --budget 1.333 --name toy --jobs 2    flags of train.py may follow
    python compare.py --budget 1.2,1.333,2,3 --lr 1e-3,2e-3,4e-3                    budgets swept, learning rates tuned

A budget is how many times the layer FLOPs of the method full training of as many steps would cost. From it every
arm's schedule follows, and is printed before anything runs. In one seed all arms start from the same weights, see the
same batches and are evaluated on the same held-out tokens, so differences between arms are paired.

    full            all layers, all steps                     shallow         fewer layers from start to end, all steps
    full_flops      all layers, fewer steps, own schedule     shallow_flops   those layers, more steps: the FLOPs of full
    ramp            costs what full costs                     raptr_width     raptr, --part width; raptr_both: --part both
    fusion          two networks of half the width, each trained as long as their fusion afterwards (deep_fusion.py)
                    all others: any name of --method at the budget

A second start skips what is finished and continues what was cut off. Runs go to out/compare/, results to results/NAME/.
"""

import argparse
import json
import math
import os
import queue
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import methods
import train
from engine import options
from engine.errors import UserError
from engine.log import has_ended, read_log
from methods import deep_fusion
from raptr import whole

PARTS = {"raptr_width": "width", "raptr_both": "both"}
ARMS = [
    "full",
    "full_flops",
    *[name for name in methods.NAMES if name != "full"],
    *PARTS,
    "fusion",
    "shallow",
    "shallow_flops",
]
PARENTS = "--init=PARENTS"  # in the flags of a run: of the fusion of two others, which are trained before it
TUNING_SEED = 1000  # seeds from here on choose a learning rate and are never reported

# ----------------------------------------------------------------------------------------------------------------
# From a budget to schedules


def having(args, **changes):
    """A copy of parsed flags with some of them changed."""
    return argparse.Namespace(**{**vars(args), **changes})


def solve_alpha(args, mean):
    """The alpha that gives the staged method of `args` `mean` layers a step. ValueError if there is none."""
    steps = 1_000_000  # many, so that rounding to whole steps does not matter
    args = having(args, steps=steps, full_warmup=round(args.full_warmup / args.steps * steps))
    methods.choose(having(args, alpha=0.0))  # ValueError if it cannot be at all

    def mean_at(alpha):
        try:
            method = methods.choose(having(args, alpha=alpha))
        except ValueError:  # a stage has become too short for a step
            return math.inf if alpha > 0 else -math.inf
        return sum((s.end - s.start + 1) * method.expected_layers(s.start) for s in method.plan) / steps

    low, high = -8.0, 8.0
    if not mean_at(low) < mean < mean_at(high):
        raise UserError(f"--stages {args.stages} cannot have {mean:g} layers a step")
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) < mean else (low, middle)
    return 0.0 if abs(low) < 1e-3 else round(low, 4)


def schedule(arm, base, budget):
    """Flags of train.py that make an arm cost 1 / budget of full training's layer FLOPs. ValueError if it cannot.
    base: the flags of full training, parsed."""
    L, T, K = base.layers, base.steps, base.layers / budget
    K = round(K) if abs(K - round(K)) < 0.01 else K  # 1.333 means 4/3
    if arm == "full":
        return ["--method=full"]
    if arm == "full_flops":
        return ["--method=full", f"--steps={round(T * K / L)}"]
    if arm in ("shallow", "shallow_flops"):
        if K != int(K):
            raise UserError(f"{K:.2f} is not a whole number of layers")
        return ["--method=full", f"--layers={K}"] + [f"--steps={round(T * L / K)}"] * (arm == "shallow_flops")
    if arm == "ramp":
        return ["--method=ramp"]
    if arm == "fusion":
        share = layer_flops(vars(base) | half(base)) / layer_flops(vars(base))
        return ["--method=full", f"--steps={round(T * K / L / (1 + 2 * share))}", PARENTS]
    method = ["--method=raptr", f"--part={PARTS[arm]}"] if arm in PARTS else [f"--method={arm}"]
    own = having(base, method=method[0].removeprefix("--method="), part=PARTS.get(arm, base.part))
    if "mean_depth" in methods.reads(own):
        methods.choose(having(own, mean_depth=K))  # ValueError if it cannot
        return [*method, f"--mean_depth={K:g}"]
    found, reason = [], None
    plans = [methods.stages(having(own, stages="auto"))]
    plans += [[round(L * s / 4) for s in (1, 2, 3, 4)] + [L] * (arm == "mslt")] * (arm != "progressive")
    for (
        lengths
    ) in plans:  # the published plan if its stages need not be the longer the earlier, else one that starts lower
        stages = "-".join(str(k) for k in lengths)
        try:
            alpha = solve_alpha(having(own, stages=stages), K)
            methods.choose(having(own, stages=stages, alpha=alpha))  # has it steps enough?
            found.append([*method, f"--stages={stages}", f"--alpha={alpha:g}"])
            if alpha >= 0:
                break
        except ValueError as error:
            reason = error
    if not found:
        raise reason
    return found[-1]


def half(args):
    """What is other in a network of half the width: its initial weights are larger by sqrt(2), as 1/sqrt(width) would be."""
    if any(getattr(args, name) % 2 for name in deep_fusion.ADDED):
        raise UserError(f"a width of {args.width}, {args.heads} heads and {args.mlp} neurons cannot be halved")
    return {name: getattr(args, name) // 2 for name in deep_fusion.ADDED} | {
        "init_std": round(args.init_std * 2**0.5, 6)
    }


def layer_flops(flags):
    """FLOPs of the layers, all of them, of one training step on one sequence."""
    config = train.transformer.Config.of(argparse.Namespace(**flags), flags["vocab"])
    return train.transformer.flops(config, 1, 0, config.layers) - train.transformer.flops(config, 1, 0, 0)


def shown(flags):
    """A schedule as a person reads it: the flags without the method's name."""
    return (
        " ".join(flag.removeprefix("--").replace("=", " ") for flag in flags if not flag.startswith("--method")) or "-"
    )


# ----------------------------------------------------------------------------------------------------------------
# Running


def run_all(jobs, text, devices, count, may_fail=False):
    """Run [(folder, flags), ...], `count` at a time, one GPU each where there are some; what is finished returns at once.
    text: fingerprint of the corpus. may_fail: a run whose loss was not finite (exit code 3) is not an error."""
    jobs = with_parents(jobs, text, devices, count, may_fail)
    free = queue.Queue()
    for slot in range(count):
        free.put(devices[slot % len(devices)] if devices else None)

    def one(job):
        folder, flags = job
        if not finished(folder, flags, text):
            device = free.get()
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": str(device)} if device is not None else {})
            command = [sys.executable, str(Path(__file__).with_name("train.py")), *flags, f"--out={folder}"]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            free.put(device)
            if done.returncode and not (done.returncode == 3 and may_fail):
                said = done.stderr.strip().splitlines() or ["it said nothing"]
                raise UserError(f"{folder}: train.py ended with {done.returncode}: {said[-1]}")
        print(f"  {folder.parent.name}/{folder.name}: {final_loss(folder):.4f}", flush=True)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, jobs))


def with_parents(jobs, text, devices, count, may_fail):
    """The same jobs, where PARENTS stands for the fusion of two runs; they are trained and fused now, unless they have been."""
    before, made = [], {}
    for folder, flags in jobs:
        if PARENTS in flags:
            own = [flag for flag in flags if flag != PARENTS]
            args = options.parse([*own, f"--out={folder}"])
            narrow = [f"--{name}={value}" for name, value in half(args).items()]
            places = [folder.with_name(f"{folder.name}-parent{i}") for i in (1, 2)]
            before += [(place, [*own, *narrow, f"--seed={args.seed + 100 * i}"]) for i, place in enumerate(places, 1)]
            made[folder] = (places, folder.with_name(f"{folder.name}-fused"))
    if before:
        run_all(before, text, devices, count, may_fail)
    for parents, fused in made.values():
        if not fused.exists() and max(map(final_loss, parents)) < math.inf:
            deep_fusion.main([*map(str, parents), f"--out={fused}"])
    there = [(folder, flags) for folder, flags in jobs if folder not in made or made[folder][1].exists()]
    return [
        (folder, [f"--init={made[folder][1]}" if flag == PARENTS else flag for flag in flags])
        for folder, flags in there
    ]


def finished(folder, flags, text):
    """Whether a run is done. ValueError if it was another run: a table must not mix settings or texts."""
    if not (folder / "log.jsonl").exists():
        return False
    now = {**vars(options.parse([*flags, f"--out={folder}"])), "data_fingerprint": text}
    different = train.changed(train.read_config(folder), now)
    for name in different:
        what = "text" if name == "data_fingerprint" else f"--{name}"
        raise UserError(f"{folder} was trained with another {what}; choose another --name")
    return has_ended(read_log(folder))


def final_loss(folder):
    events = read_log(folder) if (folder / "log.jsonl").exists() else []  # none of a fusion whose parents diverged
    return events[-1]["loss"] if has_ended(events) else math.inf


def summary(folder, arm, seed):
    """One run as one object, everything but its single steps: what results/ keeps. Of a fusion, `before` is what its parents
    took: FLOPs, layer FLOPs in layers of the fused network, seconds."""
    events, times = read_log(folder), {}
    for e in events:
        if e["event"] == "step":
            times.setdefault((len(e["layers"]), e.get("width", 1)), []).append(e["seconds"])
    seconds = math.fsum(
        len(took) * statistics.median(took) for took in times.values()
    )  # moments of a busy machine apart
    made = {"arm": arm, "seed": seed, "seconds": seconds, "events": [e for e in events if e["event"] != "step"]}
    if arm == "fusion":
        parents = [summary(folder.with_name(f"{folder.name}-parent{i}"), "parent", seed) for i in (1, 2)]
        narrow, wide = (event(run, "run")["flags"] for run in (parents[0], made))
        layers = (
            sum(event(run, "done")["step"] for run in parents)
            * wide["layers"]
            * layer_flops(narrow)
            / layer_flops(wide)
        )
        flops = sum(event(run, "done")["flops"] for run in parents)
        made["before"] = {"flops": flops, "layers": layers, "seconds": math.fsum(run["seconds"] for run in parents)}
    return made


# ----------------------------------------------------------------------------------------------------------------
# Reading the numbers

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def interval(values):
    """(mean, half width of its 95% interval by Student's t), None for fewer than two values."""
    n = len(values)
    if n < 2:
        return statistics.mean(values), None
    t = T_95[min(n - 2, len(T_95) - 1)]
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def event(run, name):
    return next(e for e in run["events"] if e["event"] == name)


def paired(runs, arm, other, value):
    """Per seed: value(run of arm, run of other), for the seeds that both have."""
    by = {(run["arm"], run["seed"]): run for run in runs}
    seeds = sorted(seed for name, seed in by if name == arm and (other, seed) in by)
    return [value(by[arm, seed], by[other, seed]) for seed in seeds]


def loss(run):
    return event(run, "done")["loss"]


def cost(run, kind):
    """What a run took, with its parents if it has any: "layers" that trained, over all its steps; "flops"; "seconds"."""
    first, last = event(run, "run"), event(run, "done")
    layers = last["step"] * first["flags"]["layers"] / first["relative_flops_layers"]
    own = {"layers": layers, "flops": last["flops"], "seconds": run["seconds"]}
    return own[kind] + run.get("before", {}).get(kind, 0)


def rows(runs, flags):
    """One row of the table per arm, best first."""
    table = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        losses = [loss(run) for run in own]
        row = {"arm": arm, "schedule": shown(flags[arm]), "n": len(own), "loss": statistics.mean(losses)}
        row["std"] = statistics.stdev(losses) if len(losses) > 1 else None
        if any(run["arm"] == "full" for run in runs):
            for name, kind in (
                ("relative_flops_layers", "layers"),
                ("relative_flops_step", "flops"),
                ("speed_up", "seconds"),
            ):
                row[name] = statistics.mean(
                    paired(runs, arm, "full", lambda a, b, kind=kind: cost(b, kind) / cost(a, kind))
                )
        for other in ("full", "full_flops"):
            differences = paired(runs, arm, other, lambda a, b: loss(a) - loss(b))
            row[f"minus_{other}"] = interval(differences) if differences and arm != other else None
        table.append(row)
    return sorted(table, key=lambda row: row["loss"])


def jumps(runs):
    """Held-out loss just before and after each stage change or growth, mean over seeds: [(arm, change, before, after, n)].
    RaPTr's weights do not change there; what changes is the length of the path they are run on."""
    found = {}
    for run in runs:
        for e in run["events"]:
            if e["event"] == "grow":
                found.setdefault((run["arm"], f"{e['depth_before']} to {e['depth']} layers"), []).append(
                    (e["loss_before"], e["loss_after"])
                )
        if run["arm"] in ("raptr", *PARTS):
            plan = methods.choose(options.complete(event(run, "run")["flags"])).plan
            for a, b in zip(plan, plan[1:]):
                at = next(e for e in run["events"] if e["event"] == "eval" and e["step"] == a.end)
                before, after = (at["subnetworks"].get(f"{stage.length:g}", at["loss"]) for stage in (a, b))
                found.setdefault((run["arm"], f"{a.length:g} to {b.length:g} layers"), []).append((before, after))
    return [(arm, change, *map(statistics.mean, zip(*pairs)), len(pairs)) for (arm, change), pairs in found.items()]


def markdown(title, table, changes, runs, jobs):
    def number(pair):
        return "" if pair is None else f"{pair[0]:+.3f}" + (f" ± {pair[1]:.3f}" if pair[1] is not None else "")

    first = event(runs[0], "run")
    text, machine = first["data"], f"torch {first['versions']['torch']}, {first['device']}, {first['dtype']}"
    lines = [
        f"# {title}",
        "",
        f"Text: {text['source']}, fingerprint {text['fingerprint']}; {machine}, {first['threads']} threads a run,",
    ]
    lines += [f"{jobs} at a time. Predicting by frequency: {first['unigram_loss']:.3f} nats.", ""]
    lines += [
        "Differences are paired by seed: mean ± 95% interval (Student's t); below 0 is better than the other.",
        "",
    ]
    lines += [
        "| arm | schedule | layer FLOPs | all FLOPs | time | held-out loss | minus full | minus full at equal FLOPs |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in table:
        ratios = [
            f"{row[key]:.3f}x" if key in row else ""
            for key in ("relative_flops_layers", "relative_flops_step", "speed_up")
        ]
        result = f"{row['loss']:.4f}" + (f" ± {row['std']:.4f}" if row["std"] is not None else "") + f" ({row['n']})"
        cells = [
            row["arm"],
            row["schedule"],
            *ratios,
            result,
            number(row["minus_full"]),
            number(row["minus_full_flops"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "FLOPs and time are factors: how many times as much full training takes; time is the sum of the median times of",
    ]
    lines += [
        "steps that run equally many layers. Held-out loss: mean ± standard deviation over seeds (number of seeds).",
        "",
    ]
    if changes:
        lines += [
            "## Loss just before and after each change",
            "",
            "| arm | change | before | after | jump | runs |",
            "|---|---|---|---|---|---|",
        ]
        lines += [f"| {arm} | {change} | {a:.3f} | {b:.3f} | {b - a:+.3f} | {n} |" for arm, change, a, b, n in changes]
    return "\n".join(lines) + "\n"


def draw_points(table, key, label, path):
    """Loss against a cost, one point with its spread per arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in table:
        baseline = row["arm"].startswith(("full", "shallow"))
        color = "black" if baseline else "tab:red" if row["arm"] == "raptr" else "tab:blue"
        axes.errorbar(
            1 / row[key], row["loss"], row["std"] or 0, fmt="s" if baseline else "o", ms=5, lw=1, capsize=2, color=color
        )
    spread(axes, [(1 / row[key], row["loss"], row["arm"]) for row in table])
    axes.set(xlabel=label, ylabel="held-out loss (nats), mean ± std over seeds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def spread(axes, points):
    """Names beside points, moved apart where they would cover each other."""
    axes.margins(x=0.18, y=0.08)
    low, high = axes.get_ylim()
    least, last = (high - low) / 26, {}
    for x, y, name in sorted(points, key=lambda point: point[1]):
        column = round(x * 8)
        at = max(y, last.get(column, -math.inf) + least)
        last[column] = at
        line = {"arrowstyle": "-", "lw": 0.4, "color": "0.6"}
        axes.annotate(name, (x, y), (x + 0.02, at), fontsize=8, va="center", arrowprops=line)


def strip(flags, columns=160):
    """Which layers run when: one row per layer, one column per sampled step. 1 is a trained layer; less is one that runs on
    some of the sequences, with a part of its width, with a smaller scale, or (0.4) without being trained."""
    method, cells = methods.choose(options.complete(flags)), []
    for step in sorted({1 + i * flags["steps"] // columns for i in range(columns)}):
        path = method.subnetwork(step) or whole(method.depth(step))
        shares = [path.width.share if path.width else 1.0] * len(path.layers)
        if path.rows is not None:
            shares = [len(rows) / flags["batch"] for rows in path.rows]
        scales = path.scale if path.scale and flags["method"] == "ramp" else shares
        column = [0.0] * flags["layers"]
        for i, layer in enumerate(path.layers):
            column[layer] = 0.4 if i < path.frozen else min(shares[i], scales[i])
        cells.append(column)
    return list(zip(*cells))


def draw_strips(runs, path):
    """Active layers over time, one strip per arm."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(run["arm"] for run in runs))
    deepest = max(event(run, "run")["flags"]["layers"] for run in runs)
    longest = max(event(run, "done")["step"] for run in runs)
    columns = 3
    figure = Figure(figsize=(9, 1.3 * -(-len(arms) // columns) + 0.5), layout="constrained")
    grid = figure.subplots(-(-len(arms) // columns), columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat:
        axes.axis("off")
    for axes, arm in zip(grid.flat, arms):
        run = next(run for run in runs if run["arm"] == arm)
        cells = strip(event(run, "run")["flags"])
        extent = (0, event(run, "done")["step"], -0.5, len(cells) - 0.5)
        axes.imshow(
            cells, aspect="auto", origin="lower", cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest", extent=extent
        )
        axes.axis("on")
        axes.set(title=arm, xlim=(0, longest), ylim=(-0.5, deepest - 0.5), yticks=[0, deepest - 1], xticks=[0, longest])
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("layer (filled: it trains; lighter: in part)", fontsize=8)
    figure.savefig(path, dpi=110)


def write_results(folder, title, runs, flags, jobs, tuning):
    """runs.jsonl, table.md, table.json and three figures. tuning: {arm: {learning rate: loss}}, where there was any."""
    folder.mkdir(parents=True, exist_ok=True)
    table, changes = rows(runs, flags), jumps(runs)
    tuning = {
        a: {rate: x if math.isfinite(x) else "did not end" for rate, x in trials.items()}
        for a, trials in tuning.items()
    }
    (folder / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    (folder / "table.json").write_text(json.dumps({"rows": table, "jumps": changes, "tuning": tuning}, indent=1))
    (folder / "table.md").write_text(markdown(title, table, changes, runs, jobs))
    draw_strips(runs, folder / "strips.png")
    if all("speed_up" in row for row in table):
        draw_points(
            table, "relative_flops_step", "FLOPs of the run, as a share of full training's", folder / "flops.png"
        )
        draw_points(table, "speed_up", "time of the run, as a share of full training's", folder / "time.png")
    print((folder / "table.md").read_text())


# ----------------------------------------------------------------------------------------------------------------


def gpus():
    """The GPUs that this process may use, by the names it may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = train.torch.cuda.device_count() if train.torch.cuda.is_available() else 0
    return named.split(",") if named and there else list(range(there))


def plan(arms, base, budget):
    """{arm: its flags}, printed as it is made; arms that cannot meet the budget say so and are left out."""
    print(f"\nbudget {budget:g}: {base.layers / budget:.2f} of {base.layers} layers a step, {base.steps} steps\n")
    flags = {}
    for arm in arms:
        try:
            flags[arm] = schedule(arm, base, budget)
            print(f"  {arm:14} {shown(flags[arm])}")
        except ValueError as error:
            print(f"  {arm:14} not possible: {error}")
    print(flush=True)
    return flags


def tune(flags, rates, seeds, common, out, text, devices, count):
    """Learning rates by trial, on seeds and held-out sequences that are not reported: ({arm: its flags with the rate of the
    lowest mean loss}, {arm: {rate: that loss}})."""
    folder = {(arm, rate, seed): out / f"{arm}-lr{rate:g}-{seed}" for arm in flags for rate in rates for seed in seeds}
    common = [*common, "--eval_on=tuning"]
    run_all([(place, [*common, *flags[a], f"--lr={r:g}", f"--seed={s}"]) for (a, r, s), place in folder.items()],
            text, devices, count, may_fail=True)  # fmt: skip
    mean = {
        a: {rate: statistics.mean(final_loss(folder[a, rate, seed]) for seed in seeds) for rate in rates} for a in flags
    }
    return {arm: [*flags[arm], f"--lr={min(mean[arm], key=mean[arm].get):g}"] for arm in flags}, mean


def main(argv):
    about = argparse.RawDescriptionHelpFormatter
    parser = options.Parser(prog="compare.py", allow_abbrev=False, formatter_class=about, description=__doc__)
    parser.add_argument("--config", default="configs/bert_toy.toml", help="preset of train.py")
    parser.add_argument("--methods", default="full,full_flops,raptr,stacking", help=f"of {', '.join(ARMS)}; or all")
    parser.add_argument("--seeds", type=options.count, default=3, help="how many")
    parser.add_argument("--first_seed", type=options.natural, default=0)
    parser.add_argument("--budget", default="1.333", help="relative layer FLOPs, one or several with commas")
    parser.add_argument("--lr", default="", help="learning rates; of several, each arm gets its best on other seeds")
    parser.add_argument("--tuning_seeds", type=options.count, default=1)
    parser.add_argument("--name", default="compare", help="folder under results/ and out/compare/")
    parser.add_argument("--jobs", type=options.count, default=0, help="runs at a time; default one, or one per GPU")
    parser.add_argument("--plan", action="store_true", help="print the schedules and stop")
    args, more = parser.parse_known_args(argv)
    for flag in more:
        if flag.split("=")[0] in ("--seed", "--method", "--out"):
            parser.error(f"{flag}: compare.py sets that itself (--seeds, --methods, --name)")
    try:
        budgets = [float(b) for b in args.budget.split(",")]
        rates = [float(rate) for rate in args.lr.split(",")] if args.lr else []
        if not all(map(math.isfinite, budgets + rates)) or min(budgets) <= 1 or min(rates, default=1) <= 0:
            raise ValueError
    except ValueError:
        parser.error("--budget takes numbers above 1, --lr numbers above 0, with commas between them")
    arms = ARMS if args.methods == "all" else args.methods.split(",")
    for arm in arms:
        if arm not in ARMS:
            parser.error(f"--methods: there is no {arm!r}{options.nearest(arm, ARMS)}")

    base = options.parse([f"--config={args.config}", *more, "--method=full"])
    devices = gpus() if base.device in ("auto", "cuda") else []
    count = args.jobs or max(1, len(devices))
    threads = [] if devices or count == 1 else [f"--threads={max(1, os.cpu_count() // count)}"]
    common = [f"--config={args.config}", *threads, *more]
    try:
        for budget in budgets:
            flags = plan(arms, base, budget)
            if args.plan or not flags:
                continue
            text = train.data.open_corpus(
                base.data, base.vocab
            ).fingerprint  # prepared once, before several runs want it
            name = args.name if len(budgets) == 1 else f"{args.name}-{budget:g}"
            out = Path("out/compare") / name
            tuning = {}
            if len(rates) == 1:
                flags = {arm: [*own, f"--lr={rates[0]:g}"] for arm, own in flags.items()}
            elif rates:
                seeds = range(TUNING_SEED, TUNING_SEED + args.tuning_seeds)
                flags, tuning = tune(flags, rates, seeds, common, out, text, devices, count)
            seeds = range(args.first_seed, args.first_seed + args.seeds)
            work = [(arm, seed, out / f"{arm}-{seed}") for seed in seeds for arm in flags]
            run_all(
                [(folder, [*common, *flags[arm], f"--seed={seed}"]) for arm, seed, folder in work], text, devices, count
            )
            runs = [summary(folder, arm, seed) for arm, seed, folder in work]
            title = (
                f"{name}: {base.layers} x {base.width}, {base.steps} steps of {base.batch} x {base.seq}, at {budget:g}x"
            )
            write_results(Path("results") / name, title, runs, flags, count, tuning)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
