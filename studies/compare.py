"""The comparison: every method at one budget, with several seeds, paired differences, a table and figures.

    python -m studies.compare --methods full,full_flops,raptr,stacking --seeds 3        at 1.333x, the paper's budget
    python -m studies.compare --methods all --seeds 5 --name toy --jobs 2 --steps 600   flags of train.py may follow
    python -m studies.compare --budget 1.2,1.333,2,3 --lr 1e-3,2e-3,4e-3                budgets swept, rates tuned
    python -m studies.compare --rebuild results/short                                   table and figures from its log

A budget of B gives a method 1 / B of the layer FLOPs of full training with as many steps. Every arm's schedule follows
from it, and is printed before anything runs. In one seed all arms start from the same weights, see the same batches and
are evaluated on the same held-out tokens, so differences between arms are paired.

    full           all layers, all steps
    full_flops     all layers, fewer steps, own decay
    shallow        fewer layers from start to end, all steps
    shallow_flops  those layers, more steps: the FLOPs of full
    ramp           all layers, scaled up from 0 to 1, deeper ones later; costs what full costs
    raptr_width    raptr, --part width
    raptr_both     raptr, --part both
    fusion         two networks of half the width (methods/deep_fusion.py)
    all others     a name of --method, at the budget

A second start skips what is finished, in out/compare/NAME/ or in results/NAME/, and continues the rest.
Not here: the training (train.py), the schedules (studies/budget.py), what the numbers say (studies/stats.py).
"""

import json
import math
import os
import queue
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from engine import ROOT, options
from engine.errors import UserError, guard
from engine.log import has_ended, read_log, write
from engine.runs import must_match, read_config
from methods import deep_fusion
from studies import figures, stats
from studies.budget import ARMS, FIRST, as_flags, as_text, half_width, layer_flops, plan
from text.corpus import open_corpus

TUNING_SEED = 1000  # seeds from here on choose a learning rate and are never reported

# ----------------------------------------------------------------------------------------------------------------
# Running


def run_all(jobs, text, devices, count, may_diverge=False, train_first=None):
    """Train [(folder, flags), ...], `count` at a time, each on one GPU where there are some. Skips finished runs.

    text: fingerprint of the corpus. may_diverge: accept a run whose loss was not finite (exit code 3).
    train_first: a function (folder, flags, run) for flags with FIRST in them, by default `train_parents`. It trains
        others by run(their folder, their flags), and returns the flags that begin from there, or None to leave it out.
    Raises UserError if a run fails, or its folder holds a run with other flags.
    """
    free = queue.Queue()
    for slot in range(count):
        free.put(devices[slot % len(devices)] if devices else None)

    def run(folder, flags):
        if FIRST in flags:
            flags = (train_first or train_parents)(folder, flags, run)
        if flags and not finished(folder, flags, text):
            device = free.get()
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": str(device)} if device is not None else {})
            command = [sys.executable, str(ROOT / "train.py"), *flags, f"--out={folder}"]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            free.put(device)
            if done.returncode and not (done.returncode == 3 and may_diverge):
                reason = done.stderr.strip().splitlines() or ["no message"]
                raise UserError(f"{folder}: train.py ended with {done.returncode}: {reason[-1]}")
        tqdm.write(f"  {folder.parent.name}/{folder.name}: {final_loss(folder):.4f}")

    with ThreadPoolExecutor(count) as pool:
        list(tqdm(pool.map(run, *zip(*jobs)), total=len(jobs), unit=" runs", disable=None))


def train_parents(folder, flags, run):
    """What `run_all` does first for a fusion: train and fuse its parents. Returns the flags that train the fusion, or
    None if the parents diverged."""
    flags, fused = [flag for flag in flags if flag != FIRST], folder.with_name(f"{folder.name}-fused")
    args = options.parse([*flags, f"--out={folder}"])
    narrow = [f"--{name}={value}" for name, value in half_width(args).items()]
    for number, parent in enumerate(parents_of(folder), 1):
        run(parent, [*flags, *narrow, f"--seed={args.seed + 100 * number}"])
    if math.inf in map(final_loss, parents_of(folder)):
        return None
    if not fused.exists():
        deep_fusion.main([*map(str, parents_of(folder)), f"--out={fused}"])
    return [*flags, f"--init={fused}"]


def parents_of(folder):
    """Run folders of the two networks that a fusion is made of."""
    return [folder.with_name(f"{folder.name}-parent{number}") for number in (1, 2)]


def first_of(folder):
    """Run folder of the run whose weights a run begins from."""
    return folder.with_name(f"{folder.name}-first")


def finished(folder, flags, text):
    """Whether a run is done. Raises UserError if it was another run: a table must not mix settings or texts."""
    if not (folder / "log.jsonl").exists():
        return False
    now = {**vars(options.parse([*flags, f"--out={folder}"])), "data_fingerprint": text}
    refuse(folder, must_match(read_config(folder), now))
    return has_ended(read_log(folder))


def in_results(results, wanted, common, text):
    """What a results folder has already: ({(arm, seed): run}, {arm: its schedule}). wanted: {(arm, seed): flags} of
    runs that are asked for; all others must have the `common` flags. Raises UserError if one has other flags."""
    if not (results / "runs.jsonl").exists():
        return {}, {}
    known = {(run["arm"], run["seed"]): run for run in stats.read_runs(results)}
    schedules = json.loads((results / "table.json").read_text())["schedules"]
    for (arm, seed), run in known.items():
        before = stats.event(run, "run")
        own = [f"--method={before['flags']['method']}", *as_flags(schedules[arm]), f"--seed={seed}"]
        flags = [flag for flag in wanted.get((arm, seed), [*common, *own]) if flag != FIRST]
        now = vars(options.parse(flags)) | {"data_fingerprint": text}
        then = before["flags"] | {"data_fingerprint": before["data"]["fingerprint"]}
        refuse(f"{results}: {arm}-{seed}", must_match(then, now))
    return known, schedules


def refuse_own(more, own=()):
    """Raise UserError if `more`, flags of train.py for all arms, has one that a comparison, or a study (`own`), sets
    itself."""
    for flag in more:
        name = flag.split("=")[0]
        if name in ("--stages", "--alpha", "--mean_depth"):
            raise UserError(f"{flag}: follows from the budget; it cannot be given")
        if name in ("--seed", "--method", "--out"):
            raise UserError(f"{flag}: each run has its own; use --seeds, --methods, --name")
        if name in own:
            raise UserError(f"{flag}: the study sets it; use studies.compare")


def refuse(run, different):
    """Raise UserError if flags of a run are different."""
    for name in different:
        what = "text" if name == "data_fingerprint" else f"--{name}"
        raise UserError(f"{run} was trained with another {what}; choose another --name")


def final_loss(folder):
    """Held-out loss at the end of a run. Infinite if it did not end, or never began."""
    events = read_log(folder) if (folder / "log.jsonl").exists() else []
    return events[-1]["loss"] if has_ended(events) else math.inf


def tune(flags, rates, seeds, common, out, *machine):
    """Try learning rates, on seeds and held-out sequences that are not reported. Returns ({arm: its flags with the rate
    of the lowest mean loss}, {arm: {rate: that loss, or "did not end"}})."""
    jobs = {(arm, rate, seed): out / f"{arm}-lr{rate:g}-{seed}" for arm in flags for rate in rates for seed in seeds}
    common = [*common, "--eval_on=tuning"]
    all_flags = [[*common, *flags[arm], f"--lr={rate:g}", f"--seed={seed}"] for arm, rate, seed in jobs]
    run_all(list(zip(jobs.values(), all_flags)), *machine, may_diverge=True)
    best, trials = {}, {}
    for arm in flags:
        losses = {rate: statistics.mean(final_loss(jobs[arm, rate, seed]) for seed in seeds) for rate in rates}
        best[arm] = [*flags[arm], f"--lr={min(losses, key=losses.get):g}"]
        trials[arm] = {rate: loss if math.isfinite(loss) else "did not end" for rate, loss in losses.items()}
    return best, trials


# ----------------------------------------------------------------------------------------------------------------
# Reading run folders


def summary(folder, arm, seed):
    """One run as one object, with all its events but the single steps. A fusion also has `before`: the FLOPs and
    seconds of its parents, and their layer FLOPs in layers of the fused network. A run that began from the
    weights of another has that one as `first`."""
    events, times = read_log(folder), {}
    for e in events:
        if e["event"] == "step":
            times.setdefault((len(e["layers"]), e.get("width", 1)), []).append(e["seconds"])
    # The median of steps of one size leaves out moments in which the machine was busy.
    seconds = math.fsum(len(of_a_size) * statistics.median(of_a_size) for of_a_size in times.values())
    run = {"arm": arm, "seed": seed, "seconds": seconds, "events": [e for e in events if e["event"] != "step"]}
    if first_of(folder).exists():
        run["first"] = summary(first_of(folder), arm, seed)
    if arm == "fusion":
        parents = [summary(parent, "parent", seed) for parent in parents_of(folder)]
        ends = [stats.event(parent, "done") for parent in parents]
        narrow, wide = (stats.event(each, "run")["flags"] for each in (parents[0], run))
        layers = sum(end["step"] for end in ends) * wide["layers"] * layer_flops(narrow) / layer_flops(wide)
        flops, seconds = sum(end["flops"] for end in ends), math.fsum(parent["seconds"] for parent in parents)
        run["before"] = {"flops": flops, "layers": layers, "seconds": seconds}
    return run


# ----------------------------------------------------------------------------------------------------------------
# Table and figures


def write_results(folder):
    """Write table.md, table.json and figures of a results folder, from its runs.jsonl and what table.json says of them:
    {"made": {title, command, commit}, "schedules": {arm: text}, "tuning": see `tune`}. Raises UserError if one of the
    two files is missing."""
    runs, file = stats.read_runs(folder), folder / "table.json"
    if not file.exists():
        raise UserError(f"{folder}: there is no table.json in it")
    about = json.loads(file.read_text())
    about |= {"rows": stats.rows(runs, about["schedules"]), "jumps": stats.jumps(runs)}
    write(file, json.dumps(about, indent=1))
    stats.save_page(folder / "table.md", stats.markdown(about, stats.event(runs[0], "run")))
    figures.strips(runs, folder / "strips.png")
    if all("speed_up" in row for row in about["rows"]):
        figures.points(about["rows"], folder / "flops.png")


# ----------------------------------------------------------------------------------------------------------------


def gpus():
    """The GPUs that this process may use, by the names it may use."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = torch.cuda.device_count()
    return visible.split(",") if visible and there else list(range(there))


def size(base):
    """Shape and length of the runs of a comparison, for its title. base: the parsed flags of full training."""
    return f"{base.layers} x {base.width}, {base.steps} steps of {base.batch} x {base.seq}"


def study_parser(module, doc):
    """A parser for a study of several comparisons, with the flags that they share."""
    parser = options.command(module, doc)
    add = parser.add_argument
    name = module.split(".")[-1]
    add("--name", default=name, help=f"its folders begin with it; another one for another text or flags [{name}]")
    add("--seeds", type=options.count, default=3, help="number of seeds [3]")
    add("--jobs", type=options.count, default=0, help="runs at a time; default one, or one per GPU")
    add("--rebuild", action="store_true", help="table and figure from the logs; nothing is run")
    return parser


def parse_study(parser, argv, own=()):
    """(flags of a study, flags of train.py for all its arms, the command and commit that run it). own: flags of
    train.py that the study sets itself."""
    argv = sys.argv[1:] if argv is None else argv
    args, more = parser.parse_known_args(argv)
    refuse_own(more, own)
    return args, more, stats.made(parser.prog.removeprefix("python -m "), argv)


def parser():
    parser = options.command("studies.compare", __doc__)
    add = parser.add_argument
    above_1 = options.number(float, "a number above 1", lambda x: x > 1)
    numbers = lambda kind: lambda text: [kind(part) for part in text.split(",")]  # noqa: E731
    add("--config", default="configs/bert_toy.toml", help="preset of train.py [configs/bert_toy.toml]")
    default = "full,full_flops,raptr,stacking"
    add("--methods", type=options.several(ARMS), default=default, help=f"of {', '.join(ARMS)}; or all [{default}]")
    add("--seeds", type=options.count, default=3, help="number of seeds [3]")
    add("--first_seed", type=options.natural, default=0, help="the first of the seeds [0]")
    add("--budget", type=numbers(above_1), default="1.333", help="relative layer FLOPs, one or several [1.333]")
    add("--lr", type=numbers(options.positive), default=[], help="one rate, or several: each arm gets its best")
    add("--tuning_seeds", type=options.count, default=1, help="number of seeds that choose a learning rate [1]")
    add("--name", default="compare", help="folder under results/ and out/compare/ [compare]")
    add("--jobs", type=options.count, default=0, help="runs at a time; default one, or one per GPU")
    add("--plan", action="store_true", help="print the schedules and stop")
    add("--rebuild", type=Path, metavar="FOLDER", help="rebuild table and figures of a results folder from its logs")
    return parser


def prepare(common, jobs):
    """What `tune` and `compare` need of this machine: the common flags, with a share of its threads, and (fingerprint
    of the corpus, GPUs, runs at a time). Prepares the corpus now, before several runs want it."""
    base = options.parse([*common, "--method=full"])
    devices = gpus() if base.device in ("auto", "cuda") else []
    if jobs > 1 and not devices:
        common = [common[0], f"--threads={max(1, os.cpu_count() // jobs)}", *common[1:]]
    return common, (open_corpus(base.data, base.vocab).fingerprint, devices, jobs or max(1, len(devices)))


def compare(name, flags, seeds, common, machine, made, what="at 1.333x", tuning=None, train_first=None):
    """Run the arms {arm: flags} with every seed, and write results/NAME/. made: command and commit. what: of the title.
    train_first: see `run_all`."""
    made = {"title": f"{name}: {size(options.parse([*common, '--method=full']))}, {what}", **made}
    out, results = Path("out/compare", name), stats.RESULTS / name
    out.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    jobs = {(arm, seed): out / f"{arm}-{seed}" for seed in seeds for arm in flags}
    wanted = {(arm, seed): [*common, *flags[arm], f"--seed={seed}"] for arm, seed in jobs}
    # Runs of an earlier start whose folders are not here, perhaps on another machine, count as they are in results/.
    alone = {job: wanted[job] for job in jobs if not jobs[job].exists()}
    known, schedules = in_results(results, alone, common, machine[0])
    for arm, its in flags.items():
        if schedules.get(arm, as_text(its)) != as_text(its):
            raise UserError(f"{results}: {arm} has {schedules[arm]}, not {as_text(its)}; choose another --name")
    here = [job for job in jobs if job not in known or jobs[job].exists()]
    table = json.loads((results / "table.json").read_text()) if known else {}
    starts = [table["made"]] if known else []
    starts += [json.loads((out / "made.json").read_text())] if (out / "made.json").exists() else []
    made = stats.joined(starts + [made] * bool(not starts or set(here) - known.keys()))
    write(out / "made.json", json.dumps(made))  # for the next start, if this one is stopped
    run_all([(jobs[job], wanted[job]) for job in here], *machine, train_first=train_first)
    known |= {job: summary(jobs[job], *job) for job in here}
    schedules |= {arm: as_text(flags[arm]) for arm in flags}
    runs = [known[job] for job in sorted(known, key=lambda job: (job[1], [*schedules].index(job[0])))]
    write(results / "runs.jsonl", "".join(json.dumps(run) + "\n" for run in runs))
    about = {"made": made, "tuning": table.get("tuning", {}) | (tuning or {}), "schedules": schedules}
    write(results / "table.json", json.dumps(about))
    write_results(results)


def main(argv=None):
    args, more, made = parse_study(parser(), argv)
    if args.rebuild:
        return write_results(args.rebuild)
    common = [f"--config={args.config}", *more]
    base = options.parse([*common, "--method=full"])
    for budget in args.budget:
        flags, tuning = plan(args.methods, base, budget), {}
        if not flags or args.plan:
            continue
        name = args.name if len(args.budget) == 1 else f"{args.name}-{budget:g}"
        threaded, machine = prepare(common, args.jobs)
        if len(args.lr) == 1:
            flags = {arm: [*flags[arm], f"--lr={args.lr[0]:g}"] for arm in flags}
        elif args.lr:
            tried = range(TUNING_SEED, TUNING_SEED + args.tuning_seeds)
            flags, tuning = tune(flags, args.lr, tried, threaded, Path("out/compare", name), *machine)
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        compare(name, flags, seeds, threaded, machine, made, f"at {budget:g}x", tuning)


if __name__ == "__main__":
    guard("studies.compare", main)
