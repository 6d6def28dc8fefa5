"""What a run folder tells: its log, a figure, a summary.

    python -m engine.log out/bert_toy-raptr-0           print the summary again, draw loss.png again

Not here: anything that trains. No torch, so that it answers at once.
"""

import contextlib
import errno
import fcntl
import json
import sys
from pathlib import Path

from engine.errors import UserError, guard


def read_jsonl(path):
    """The objects of a JSONL file, in order. Leaves out other lines, such as one that was cut off in writing."""
    values = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


def read_log(run):
    """The events of a run, oldest first; none if it has no log yet."""
    path = Path(run, "log.jsonl")
    return read_jsonl(path) if path.exists() else []


def write(path, text):
    """Write a text file under another name and rename it, so that it is never half there."""
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def flock(file, how):
    """Lock an open file, as fcntl.flock does. Where the file system has no locks, a warning is all that can be done."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        print(f"warning: no locks here; let no other process write beside {file.name}", file=sys.stderr)


def subplots(width, height, rows=1, columns=1, **more):
    """(figure, axes) of matplotlib, in the one style of this project. Needs no screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **more)
    for each in axes.flat if rows * columns > 1 or not more.get("squeeze", True) else [axes]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def has_ended(events):
    return bool(events) and events[-1]["event"] == "done"


def draw_run(run):
    """loss.png: loss over the steps, and below it which layers ran. No figure without matplotlib, where the log was
    lost, or where it cannot be written."""
    try:
        figure, (top, strip) = subplots(8, 6, 2, sharex=True, height_ratios=[3, 1])
    except ImportError:
        return None
    events = read_log(run)
    first = next(e for e in events if e["event"] == "run")
    steps = [e for e in events if e["event"] == "step"]
    evals = [e for e in events if e["event"] == "eval"]
    if not steps or not evals:
        return None
    L = first["flags"]["layers"]
    points = [(e["step"], e["loss"]) for e in steps]
    top.plot(*zip(*points), color="0.8", lw=0.7, label="training, the step's path")
    for k in sorted({k for e in evals for k in e["subnetworks"]}, key=float):
        points = [(e["step"], e["subnetworks"][k]) for e in evals if k in e["subnetworks"]]
        top.plot(*zip(*points), lw=1, marker=".", ms=3, label=f"held-out, paths of {k}")
    points = [(e["step"], e["loss"]) for e in evals]
    top.plot(*zip(*points), color="black", lw=1.8, marker="o", ms=3, label="held-out, full model")
    unigram = first["unigram_loss"]
    top.axhline(unigram, color="0.5", ls=":", lw=1)
    style = {"ha": "right", "va": "bottom", "color": "0.4", "fontsize": 8}
    top.annotate("predicting by frequency", (steps[-1]["step"], unigram), **style)
    name = run.name.encode("ascii", "replace").decode()  # the font has few other characters
    top.set_title(f"{name}: held-out loss {evals[-1]['loss']:.3f}", parse_math=False)
    top.set_ylabel("loss (nats)")
    top.legend(frameon=False, fontsize=8)
    columns = [steps[i * len(steps) // 160] for i in range(160)] if len(steps) > 160 else steps
    cells = [[e.get("width", 1) * (layer in e["layers"]) for e in columns] for layer in range(L)]
    strip.imshow(cells, aspect="auto", origin="lower", cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest",
                 extent=(steps[0]["step"] - 1, steps[-1]["step"], -0.5, L - 0.5))  # fmt: skip
    part = "; lighter: in part of their width" if any("width" in e for e in steps) else ""
    strip.set(xlabel="step", ylabel="layer", yticks=[0, L - 1], title=f"layers that ran (a sample of the steps{part})")
    strip.title.set_fontsize(9)
    try:
        figure.savefig(run / "loss.png", dpi=100)
    except OSError as error:
        return print(f"warning: loss.png cannot be written ({error.strerror})", file=sys.stderr)
    return run / "loss.png"


def span(seconds):
    """Seconds as a person says them."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def summarize(run):
    """What a person wants to know of a finished run."""
    events = read_log(run)
    first = next((e for e in events if e["event"] == "run"), None)
    if first is None or not has_ended(events):
        return print(f"{run}: its log is not complete, so there is no summary", file=sys.stderr)
    last = events[-1]
    layers, step = first["relative_flops_layers"], first["relative_flops_step"]
    tokens = last["step"] * first["flags"]["batch"] * first["flags"]["seq"]
    figure = draw_run(run)
    took, frequency = span(last["seconds"]), first["unigram_loss"]
    print(f"\n  {run.name}: {last['step']:,} steps, {tokens / 1e6:.1f}M tokens, {took} of training\n")
    print(f"  held-out loss   {last['loss']:.3f} nats, full model; predicting by frequency gets {frequency:.3f}")
    saved = [f"full training costs {x:.3f} times as many ({1 - 1 / x:.1%} saved)" for x in (layers, step)]
    print(f"  layer FLOPs     {saved[0]}")
    print(f"  with the head   {saved[1]}")
    newest = [path.name for path in sorted(run.glob("step_*[0-9]"))[-1:]]
    files = ["log.jsonl", *["loss.png"] * bool(figure), *newest]
    print(f"  files           {run}/: {', '.join(files)}\n")


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1], "log.jsonl").exists():
        raise UserError("name one run folder, like out/bert_toy-raptr-0")
    if not has_ended(read_log(sys.argv[1])):
        raise UserError(f"{sys.argv[1]} has not ended yet")
    summarize(Path(sys.argv[1]))


if __name__ == "__main__":
    guard("engine.log", main)
