"""What the studies share: intervals, differences paired by seed, exponents, the runs of a results folder, tables.

Not here: what is measured (the studies). No torch.
A run is one line of results/NAME/runs.jsonl: {"arm": its method, "seed": ..., and what was measured}.
"""

import json
import math
import shlex
import statistics
import subprocess
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import methods
from engine import ROOT, options
from engine.errors import UserError
from engine.log import read_jsonl, write

RESULTS = Path("results")  # where every study writes, in the folder that it is started from

# Student's t: 97.5% of the distribution lies below it, for 1, 2, ... 20 degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def interval(values):
    """(mean, half width of its 95% interval by Student's t) of a list or of {seed: value}. The half width of a single
    value is None."""
    values = list(values.values()) if isinstance(values, dict) else values
    n = len(values)
    if n < 2:
        return statistics.mean(values), None
    t = T_95[min(n - 1, len(T_95)) - 1]  # beyond 20 degrees of freedom t falls by 6% at most
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def paired(runs, arm, other, value):
    """{seed: value(run of arm, run of other)} for every seed that both have, in order. In one seed the arms start from
    the same weights and see the same batches, so the noise that they share is not in a difference."""
    by_name = {(run["arm"], run["seed"]): run for run in runs}
    seeds = sorted(seed for name, seed in by_name if name == arm and (other, seed) in by_name)
    return {seed: value(by_name[arm, seed], by_name[other, seed]) for seed in seeds}


def minus(a, b):
    """a[seed] - b[seed] for every seed that both have, in order."""
    return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}


def differences(runs, arm, other):
    """{seed: held-out loss of arm minus that of other} for every seed that both have, in order."""
    return paired(runs, arm, other, lambda a, b: loss(a) - loss(b))


def slope(points):
    """Exponent a of y ~ x^a, by least squares of the logarithms of [(x, y), ...]."""
    return statistics.linear_regression(*([math.log(value) for value in values] for values in zip(*points))).slope


# ----------------------------------------------------------------------------------------------------------------
# Words for intervals, by the rules of results/LOG.md

LEVEL = 0.02  # nats


def level(low, high):
    """Whether an interval of differences of losses lies within LEVEL of 0."""
    return -LEVEL < low and high < LEVEL


def word(values):
    """better, worse, level or undecided, of differences of losses."""
    mean, half = interval(values)
    if half is None:
        return "undecided"
    if abs(mean) > half:
        return "better" if mean < 0 else "worse"
    return "level" if level(mean - half, mean + half) else "undecided"


def verdict(values, yes, no):
    """yes, no or undecided, by two tests of the ends (low, high) of an interval. not run: without values."""
    if not values:
        return "not run"
    mean, half = interval(values)
    if half is None:
        return "undecided"
    low, high = mean - half, mean + half
    return "yes" if yes(low, high) else "no" if no(low, high) else "undecided"


# ----------------------------------------------------------------------------------------------------------------
# What the runs of a comparison say


def read_runs(folder):
    """The runs of a results folder. Raises UserError if it has none."""
    file = Path(folder, "runs.jsonl")
    if not file.exists():
        raise UserError(f"{folder}: there is no runs.jsonl in it")
    return read_jsonl(file)


def read_all(folders):
    """{name: its runs} of the results folders {name: path} that have runs. Raises UserError if none has."""
    found = {name: read_runs(folder) for name, folder in folders.items() if (folder / "runs.jsonl").exists()}
    if not found:
        raise UserError(f"no runs in {', '.join(map(str, folders.values()))}")
    return found


def read_done(file):
    """The results that a study has already in a JSONL file, which loses a line that was cut off in writing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    done = read_jsonl(file) if file.exists() else []
    write(file, "".join(json.dumps(result) + "\n" for result in done))
    return done


def append_all(solve, jobs, file, count, told):
    """Append solve(*job), a dict, to a JSONL file for every job, `count` at a time in processes of their own, each with
    the commit of the code, and print told(result). Returns the results. An error ends those that have not begun."""
    made_at, results = {"commit": commit()}, []
    with ProcessPoolExecutor(count) as pool, file.open("a") as lines:
        futures = [pool.submit(solve, *job) for job in jobs]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                results.append(future.result() | made_at)
                print(json.dumps(results[-1]), file=lines, flush=True)
                print(f"  {number}/{len(jobs)}  {told(results[-1])}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return results


def must_share_text(runs, name):
    """Raise UserError if runs saw different texts. name: the results folder that others are compared with."""
    if len({event(run, "run")["data"]["fingerprint"] for run in runs}) > 1:
        raise UserError(f"results/{name}: was trained on another text than what it is compared with")


def event(run, name):
    """The first event of this name."""
    return next(e for e in run["events"] if e["event"] == name)


def loss(run):
    return event(run, "done")["loss"]


def cost(run, kind):
    """What a run took, with its parents if it has any: "layers" trained, over all steps; "flops"; "seconds"."""
    first, last = event(run, "run"), event(run, "done")
    layers = last["step"] * first["flags"]["layers"] / first["relative_flops_layers"]
    costs = {"layers": layers, "flops": last["flops"], "seconds": run["seconds"]}
    return costs[kind] + run.get("before", {}).get(kind, 0)


def rows(runs, schedules):
    """One row of the table per arm, best first. schedules: {arm: text}."""
    ratios = {"relative_flops_layers": "layers", "relative_flops_step": "flops", "speed_up": "seconds"}
    result = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        losses = [loss(run) for run in runs if run["arm"] == arm]
        row = {"arm": arm, "schedule": schedules[arm], "n": len(losses), "loss": statistics.mean(losses)}
        row["std"] = statistics.stdev(losses) if len(losses) > 1 else None
        for name, kind in ratios.items():
            values = paired(runs, arm, "full", lambda a, b, kind=kind: cost(b, kind) / cost(a, kind))
            if values:
                row[name] = statistics.mean(values.values())
        for other in ("full", "full_flops"):
            behind = differences(runs, arm, other)
            row[f"minus_{other}"] = interval(behind) if behind and arm != other else None
        result.append(row)
    return sorted(result, key=lambda row: row["loss"])


def jumps(runs):
    """Held-out loss just before and after each stage change or growth: [(arm, change, before, after, n)], means over n
    seeds. RaPTr's weights do not change there, but the length of the path that they are run on does."""
    pairs = {}
    for run in runs:
        for e in run["events"]:
            if e["event"] == "grow":
                change = f"{e['depth_before']} to {e['depth']} layers"
                pairs.setdefault((run["arm"], change), []).append((e["loss_before"], e["loss_after"]))
        flags = event(run, "run")["flags"]
        if flags["method"] == "raptr":
            stages = methods.choose(options.complete(flags)).plan
            for a, b in zip(stages, stages[1:]):
                at = next(e for e in run["events"] if e["event"] == "eval" and e["step"] == a.end)
                losses = [at["subnetworks"].get(f"{stage.length:g}", at["loss"]) for stage in (a, b)]
                pairs.setdefault((run["arm"], f"{a.length:g} to {b.length:g} layers"), []).append(losses)
    return [(arm, change, *map(statistics.mean, zip(*both)), len(both)) for (arm, change), both in pairs.items()]


# ----------------------------------------------------------------------------------------------------------------
# Tables


def spread(values, digits=3):
    """Mean ± standard deviation, as text."""
    std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{std}"


def signed(pair, digits=3):
    """An interval, as text. Nothing for None."""
    if pair is None:
        return ""
    mean, half = pair
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def table(head, rows):
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["|" + "|".join(cells) + "|" if cells[0] == "---" else f"| {' | '.join(cells)} |" for cells in lines]


PAIRED = "Differences are paired by seed, mean ± 95% interval (Student's t); below 0 is better."
LEGEND = [
    "FLOPs are factors: how many times as many full training takes. Held-out loss: mean ± standard deviation over",
    f"seeds (number of seeds). {PAIRED}",
]


def markdown(about, first):
    """Lines of table.md. first: the `run` event of a run."""
    machine = f"torch {first['versions']['torch']}, {first['device']}, {first['dtype']}, {first['threads']} threads"
    head = ["arm", "schedule", "layer FLOPs", "all FLOPs", "held-out loss", "minus full", "minus full at equal FLOPs"]
    cells = []
    for row in about["rows"]:
        ratios = [f"{row[key]:.3f}x" if key in row else "" for key in ("relative_flops_layers", "relative_flops_step")]
        std = f" ± {row['std']:.4f}" if row["std"] is not None else ""
        differences = [signed(row[key]) for key in ("minus_full", "minus_full_flops")]
        cells.append([row["arm"], row["schedule"], *ratios, f"{row['loss']:.4f}{std} ({row['n']})", *differences])
    lines = [f"# {about['made']['title']}", "", *made_by(about["made"])]
    lines += [f"Text: {first['data']['source']}, fingerprint {first['data']['fingerprint']}; {machine} a run."]
    lines += [f"Predicting by frequency: {first['unigram_loss']:.3f} nats.", "", *table(head, cells), "", *LEGEND]
    if about["jumps"]:
        head = ["arm", "change", "before", "after", "jump", "runs"]
        cells = [(*of, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}", f"{n}") for *of, a, b, n in about["jumps"]]
        lines += ["", "## Loss just before and after each change", "", *table(head, cells)]
    return lines


def commit(root=ROOT):
    """The commit of the code that runs now; "" outside of a git checkout. With "-dirty" where files differ from it, but
    for results/, which studies write."""

    def git(*command):
        return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        name = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{RESULTS}")
    except FileNotFoundError:  # no git
        return ""
    return f"{name}-dirty" if changed else name


def made(module, argv):
    """{"command": ..., "commit": ...} of a study that runs now with these arguments."""
    return {"command": shlex.join(["python", "-m", module, *argv]), "commit": commit()}


def joined(starts):
    """What several starts made together: each command with its commit once. The title is the first one's."""
    pairs = [pair for made in starts for pair in zip(made["command"].split("; "), made.get("commit", "").split("; "))]
    commands, commits = map("; ".join, zip(*dict.fromkeys(pairs)))
    return starts[0] | {"command": commands, "commit": commits}


def save_page(path, lines):
    """Write lines to a page of a results folder, which is made if it is not there, and print them."""
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, text)
    print(text, end="")


def measured(values, word=None):
    """Mean and interval of values, as text, and a word for them. Nothing for none."""
    return f"{signed(interval(values))}{f', {word(values)}' if word else ''}" if values else ""


def rebuilt(module, name):
    """The line of a study's page that says how to make it again."""
    more = "" if name == module.split(".")[-1] else f" --name {name}"
    return f"Made again by `python -m {module} --rebuild{more}`, from committed logs."


def made_by(made):
    """Lines that say how a table was made. made: {"command": ..., "commit": ...}, without what is not known."""
    commit = f", commit {made['commit']}" if made.get("commit") else ""
    return [f"Made by: `{made['command']}`{commit}", ""] if made.get("command") else []
