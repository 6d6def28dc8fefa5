"""What a run folder tells: its log, a figure, a summary.

    python report.py out/bert_toy-raptr-0           print the summary again, draw loss.png again

Not here: anything that trains. No torch, so that it answers at once.
"""

import json
import sys
from pathlib import Path


def read_log(run):
    """The events of a run, oldest first. A line that was cut off in writing is left out."""
    events = []
    for line in (run / "log.jsonl").read_text().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def has_ended(events):
    return bool(events) and events[-1]["event"] == "done"


def draw_run(run):
    """loss.png: loss over the steps, and below it which layers ran. Needs matplotlib; without it, no figure."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    events = read_log(run)
    first = next(e for e in events if e["event"] == "run")
    steps = [e for e in events if e["event"] == "step"]
    evals = [e for e in events if e["event"] == "eval"]
    L = first["flags"]["layers"]
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, strip = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([e["step"] for e in steps], [e["loss"] for e in steps], color="0.8", lw=0.7, label="training, the step's path")
    for k in sorted({k for e in evals for k in e["subnetworks"]}, key=float):
        seen = [(e["step"], e["subnetworks"][k]) for e in evals if k in e["subnetworks"]]
        top.plot(*zip(*seen), lw=1, marker=".", ms=3, label=f"held-out, paths of {k}")
    seen = [(e["step"], e["loss"]) for e in evals]
    top.plot(*zip(*seen), color="black", lw=1.8, marker="o", ms=3, label="held-out, full model")
    unigram = first["unigram_loss"]
    top.axhline(unigram, color="0.5", ls=":", lw=1)
    top.annotate("predicting by frequency", (steps[-1]["step"], unigram), ha="right", va="bottom", color="0.4", fontsize=8)
    top.set(ylabel="loss (nats)", title=f"{run.name}: held-out loss {evals[-1]['loss']:.3f}")
    top.legend(frameon=False, fontsize=8)
    columns = [steps[i * len(steps) // 160] for i in range(160)] if len(steps) > 160 else steps
    cells = [[e.get("width", 1) * (layer in e["layers"]) for e in columns] for layer in range(L)]
    strip.imshow(cells, aspect="auto", origin="lower", cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest",
                 extent=(steps[0]["step"] - 1, steps[-1]["step"], -0.5, L - 0.5))  # fmt: skip
    part = "; lighter: in part of their width" if any("width" in e for e in steps) else ""
    strip.set(xlabel="step", ylabel="layer", yticks=[0, L - 1], title=f"layers that ran (a sample of the steps{part})")
    strip.title.set_fontsize(9)
    for axes in (top, strip):
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(run / "loss.png")
    return run / "loss.png"


def span(seconds):
    """Seconds as a person says them."""
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    )


def summarize(run):
    """What a person wants to know of a finished run."""
    events = read_log(run)
    first, last = next(e for e in events if e["event"] == "run"), events[-1]
    layers, whole = first["relative_flops_layers"], first["relative_flops_step"]
    tokens = [e for e in events if e["event"] == "step"][-1]["tokens"]
    figure = draw_run(run)
    print(f"\n  {run.name}: {last['step']:,} steps, {tokens / 1e6:.1f}M tokens, {span(last['seconds'])} of training\n")
    print(f"  held-out loss   {last['loss']:.3f} nats, full model; predicting by frequency gets {first['unigram_loss']:.3f}")
    print(f"  layer FLOPs     full training costs {layers:.3f} times as many ({1 - 1 / layers:.1%} saved)")
    print(f"  all FLOPs       full training costs {whole:.3f} times as many ({1 - 1 / whole:.1%} saved): the head always runs")
    print(f"  files           {run}/: log.jsonl, {'loss.png, ' if figure else ''}{max(run.glob('step_*[0-9]')).name}\n")


def wrong(reason):
    print(f"report.py: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1], "log.jsonl").exists():
        wrong("name one run folder, like out/bert_toy-raptr-0")
    if not has_ended(read_log(Path(sys.argv[1]))):
        wrong(f"{sys.argv[1]} has not ended yet")
    summarize(Path(sys.argv[1]))
