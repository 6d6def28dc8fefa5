"""The figures that studies share: loss against cost, which layers ran when, differences, a mean in its band.

Not here: figures of one study alone, which are drawn where it is.
"""

import statistics

import methods
from engine import options
from engine.log import subplots
from raptr import all_layers
from studies import stats


def points(rows, path):
    """The loss of every arm with its spread, best first, and its FLOPs beside its name."""
    figure, axes = subplots(8, 0.28 * len(rows) + 1)
    for y, row in enumerate(rows):
        baseline = row["arm"].startswith(("full", "shallow"))
        color = "black" if baseline else "tab:red" if row["arm"] == "raptr" else "tab:blue"
        style = {"fmt": "s" if baseline else "o", "ms": 5, "lw": 1, "capsize": 2, "color": color}
        axes.errorbar(row["loss"], y, xerr=row["std"] or 0, **style)
    axes.set_yticks(range(len(rows)), [f"{row['arm']}   {1 / row['relative_flops_step']:.2f}" for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", lw=0.4, color="0.85")
    axes.set(xlabel="held-out loss (nats), mean ± std over seeds")
    title = "beside each name: FLOPs of the run, as a share of full training's; squares: no layer is skipped or grown"
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=110)


def strip(flags, columns=160):
    """Which layers run when: one row per layer, one column per sampled step. 1 is a layer that trains. Less is one that
    trains a part of its width, runs at a smaller scale (ramp), or (0.4) runs without being trained."""
    method, cells = methods.choose(options.complete(flags)), []
    for step in sorted({1 + i * flags["steps"] // columns for i in range(columns)}):
        path = method.subnetwork(step) or all_layers(method.depth(step))
        share = path.width.share if path.width else 1.0
        shades = path.scale if flags["method"] == "ramp" and path.scale else [share] * len(path.layers)
        column = [0.0] * flags["layers"]
        for i, layer in enumerate(path.layers):
            column[layer] = 0.4 if i < path.frozen else shades[i]
        cells.append(column)
    return list(zip(*cells))


def strips(runs, path):
    """Active layers over time, one strip per arm."""
    arms = {run["arm"]: (stats.event(run, "run")["flags"], stats.event(run, "done")["step"]) for run in runs}
    deepest, longest = (max(values) for values in zip(*[(flags["layers"], steps) for flags, steps in arms.values()]))
    lines = -(-len(arms) // 3)
    figure, grid = subplots(9, 1.3 * lines + 0.5, lines, 3, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(arms) :]:
        axes.axis("off")
    for axes, (arm, (flags, steps)) in zip(grid.flat, arms.items()):
        shading = {"cmap": "Greys", "vmin": 0, "vmax": 1.4, "interpolation": "nearest"}
        extent = (0, steps, -0.5, flags["layers"] - 0.5)
        axes.imshow(strip(flags), aspect="auto", origin="lower", extent=extent, **shading)
        axes.set(xlim=(0, longest), ylim=(-0.5, deepest - 0.5), yticks=[0, deepest - 1], xticks=[0, longest])
        axes.set_title(arm, fontsize=9)
        axes.tick_params(labelsize=7)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("layer (filled: it trains; lighter: in part)", fontsize=8)
    figure.savefig(path, dpi=110)


def differences(rows, titles, path, **more):
    """A row for each of [(name, differences of losses, differences of losses)], in two panels: mean and interval.
    more: arguments of `subplots`."""
    figure, panels = subplots(9, 0.36 * len(rows) + 1.1, 1, 2, sharey=True, **more)
    for axes, title, column in zip(panels, titles, (1, 2)):
        for y, row in enumerate(rows):
            if row[column]:
                mean, half = stats.interval(row[column])
                axes.errorbar(mean, y, xerr=half or 0, fmt="o", ms=5, capsize=2, color="tab:blue")
        axes.axvline(0, color="black", lw=1)
        axes.set(title=title, xlabel="held-out loss (nats), 95% interval")
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="y", lw=0.4, color="0.85")
    panels[0].set_yticks(range(len(rows)), [name for name, *_ in rows])
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=110)


def band(axes, x, samples, style="-", alpha=0.2, **more):
    """Plot the mean of samples [(values at one x), ...], in a band of one standard deviation (0 for one value)."""
    means = [statistics.mean(values) for values in samples]
    stds = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in samples]
    line = axes.plot(x, means, style, **more)[0]
    low, high = ([mean + sign * std for mean, std in zip(means, stds)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=line.get_color(), alpha=alpha, lw=0)
