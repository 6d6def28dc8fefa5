"""Which degrees of a polynomial does each method learn, and when?

    python polynomials.py                       all arms, widths and seeds; a table, a figure, a verdict in results/polynomials/
    python polynomials.py --jobs 2              two runs at a time. A second start skips what is finished

The statement. For x uniform on {-1, 1}^d let
    f*(x) = sum over degrees k = 1 .. D, j = 1 .. m of c_kj chi_kj(x),    chi_kj(x) = product of x_i, i in S_kj, |S_kj| = k,
and call u_k = sum over j of (E[f(x) chi_kj(x)] - c_kj)^2, c_kj^2 = 1 / m: what f has not learned of degree k.
    (i) u_k falls for low k first;   (ii) under PLD, whose networks shrink, u_k of high k stalls;   (iii) under RaPTr it falls.

S_kj is random, and nested, S_1j in S_2j in ...: without lower ones beneath them even full training hardly learns high degrees
in minutes, which says nothing about the other methods. A residual network f is trained on fresh draws; u_k is estimated on
held-out inputs, always of the full network. All arms cost 3/4 of full training's layer FLOPs, but `full`, which is there for
reference. Each arm's learning rate is chosen on seeds 100-102, at one width, and scaled by 1 / width.
Not here: the methods (raptr.py, layerdrop.py, stacking.py), which are used as they are.

Source: RaPTr (Panigrahi et al., arXiv 2402.05913), its polynomial toy. We know no more of its setting than 20 residual layers
and D = 10; nesting, d, m, layers (8), widths, optimizer and steps are ours.
Legend: L layers, C width, n inputs, d variables, D degrees, m monomials of each degree.
"""

import argparse
import json
import math
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data import rng
from engine.errors import UserError
from methods.layerdrop import mean_settling, pld, theta_bar_for
from raptr import Full, RaPTr, Stage, stage_plan, whole
from stacking import Stacking, grow, stacking
from studies.compare import interval

TUNING_SEED, TUNING_WIDTH, RATES = 100, 40, (3e-3, 6e-3, 12e-3, 24e-3)  # rates at that width
ARMS = {
    "full": "full, equal steps", "full_flops": "full, equal FLOPs", "raptr": "RaPTr", "constant": "constant-p",
    "pld": "PLD", "pld_slow": "PLD, shrinking slowly", "stacking": "gradual stacking",
}  # fmt: skip
COLORS = ["black", "black", "tab:red", "tab:orange", "tab:blue", "deepskyblue", "tab:green"]


class Setting(NamedTuple):
    """What all runs of a comparison share."""

    inputs: int = 30  # d
    degrees: int = 10  # D
    monomials: int = 3  # m
    layers: int = 8
    steps: int = 1600
    batch: int = 256
    held_out: int = 4096
    evaluations: int = 12  # in a run


# ----------------------------------------------------------------------------------------------------------------
# The target


def signs(n, d, *name):
    """Inputs (n, d) uniform on {-1, 1}^d that belong to (seed, name, step)."""
    return torch.from_numpy(rng(*name).integers(0, 2, (n, d), dtype="int8")).float() * 2 - 1


def target(s, seed):
    """(sets of variables, low degrees first; coefficients, their squares summing to 1 in each degree). Set j of degree k is
    the first k variables of a random order of all; orders that give the same set twice are drawn again. Coefficients are of
    random sign and one size: where sizes are random a small one holds up all that is nested in it, more than any method does."""
    draws, chains = rng(seed, "target"), []
    while len(chains) < s.monomials:
        chain = draws.permutation(s.inputs)[: s.degrees].tolist()
        if not any(set(chain[:k]) == set(other[:k]) for other in chains for k in range(1, s.degrees + 1)):
            chains.append(chain)
    sets = [tuple(sorted(chain[:k])) for k in range(1, s.degrees + 1) for chain in chains]
    return sets, signs(1, len(sets), seed, "coefficients")[0] / s.monomials**0.5


def characters(x, sets):
    """The monomials (n, number of sets) at inputs (n, d)."""
    return torch.stack([x[:, list(variables)].prod(1) for variables in sets], 1)


def unlearned(outputs, chi, coefficients, sets):
    """{degree: u_k} from outputs (n,) and monomials (n, sets) at the same inputs.

    The coefficients of f - f* are estimated, not those of f: the same mean over all inputs, as the monomials are orthogonal,
    and far less noise over n of them once f is close to f*. What noise there is adds about m E[(f - f*)^2] / n to u_k."""
    missing = (outputs - chi @ coefficients) @ chi / len(outputs)
    found = dict.fromkeys(map(len, sets), 0.0)
    for variables, value in zip(sets, missing.tolist()):
        found[len(variables)] += value**2
    return found


# ----------------------------------------------------------------------------------------------------------------
# The network


def initial(depth, layers, d, width, seed):
    """Weights of `depth` blocks, those of a deeper network's lowest ones. The output is 0; a block's update is of size
    1 / sqrt(layers), so that the stream does not grow with depth."""
    draws = rng(seed, "weights")
    normal = lambda *shape: torch.from_numpy(draws.standard_normal(shape)).float() / shape[-1] ** 0.5  # noqa: E731
    weights = {"in": normal(width, d), "out": torch.zeros(width)}
    for i in range(depth):
        weights[f"blocks.{i}.up"] = normal(2 * width, width)
        weights[f"blocks.{i}.bias"] = torch.zeros(2 * width)
        weights[f"blocks.{i}.down"] = normal(width, 2 * width) / layers**0.5
    return weights


def forward(weights, x, path):
    """Outputs (n,) at inputs (n, d), over the layers of a Subnetwork; the others are bypassed."""
    y = F.linear(x, weights["in"])  # (n, C)
    for i, scale in zip(path.layers, path.scale or [1] * len(path.layers)):
        hidden = F.linear(F.rms_norm(y, y.shape[1:]), weights[f"blocks.{i}.up"], weights[f"blocks.{i}.bias"])
        y = y + scale * F.linear(F.relu(hidden), weights[f"blocks.{i}.down"])
    return F.rms_norm(y, y.shape[1:]) @ weights["out"]


def adam(weights, state=None):
    """Adam over all tensors; state: {name: its moments}."""
    optimizer = torch.optim.Adam(weights.values(), betas=(0.9, 0.98), fused=True)
    for name, moments in (state or {}).items():
        optimizer.state[weights[name]] = moments
    return optimizer


def deepen(weights, optimizer, sources):
    """A deeper network and its optimizer: moments are copied with their layers."""
    state = {name: optimizer.state[tensor] for name, tensor in weights.items()}
    parts = {
        part: grow({name: state[name][part] for name in weights}, sources) for part in ("step", "exp_avg", "exp_avg_sq")
    }
    grown = grow({name: tensor.detach() for name, tensor in weights.items()}, sources)
    grown = {name: tensor.requires_grad_() for name, tensor in grown.items()}
    return grown, adam(grown, {name: {part: parts[part][name] for part in parts} for name in grown})


# ----------------------------------------------------------------------------------------------------------------
# The arms, and one run


def method_of(arm, L, T, seed):
    """(method, steps), costing 3/4 of T steps of all L layers, but for `full`."""
    K = 3 / 4 * L
    if arm in ("full", "full_flops"):
        return Full(L), T if arm == "full" else round(3 / 4 * T)
    if arm == "raptr":
        return RaPTr(
            stage_plan([round(part * L) for part in (1 / 2, 2 / 3, 5 / 6, 1)], T, L), L, {0, L - 1}, seed=seed
        ), T
    if arm == "constant":
        return RaPTr([Stage(1, T, K)], L, {0, L - 1}, seed=seed), T
    if arm == "stacking":
        return Stacking(stacking, stage_plan([L // 2, round(K), L], T, L), L), T
    gamma = (
        100 / T if arm == "pld" else 3 / T
    )  # PLD's own has settled after a twentieth of the run; 3 / T shrinks all along
    return pld(L, T, theta_bar_for(K, L, mean_settling(T, gamma)), gamma, seed=seed), T


def rate_at(step, steps, peak):
    """Warm-up over a fiftieth of the steps, decay to 0 over the last three tenths."""
    return peak * min(1, 50 * step / steps, (steps - step + 1) / (0.3 * steps))


def run(s, arm, width, seed, rate):
    """Train one network: {"arm", ..., "points": [[layer FLOPs, whole training of `full` being 1, u_1, ..., u_D], ...]}."""
    torch.set_num_threads(1)
    (sets, coefficients), (method, steps) = target(s, seed), method_of(arm, s.layers, s.steps, seed)
    depth = method.depth(1)
    weights = initial(depth, s.layers, s.inputs, width, seed)
    weights = {name: tensor.requires_grad_() for name, tensor in weights.items()}
    optimizer, flops, points = adam(weights), 0.0, []
    held_out = signs(s.held_out, s.inputs, seed, "held out")
    held_out_chi = characters(held_out, sets)
    for step in range(1, steps + 1):
        if method.depth(step) != depth:
            weights, optimizer = deepen(weights, optimizer, method.sources(depth, method.depth(step)))
            depth = method.depth(step)
        path = method.subnetwork(step) or whole(depth)
        x = signs(s.batch, s.inputs, seed, "batch", step)
        loss = (forward(weights, x, path) - characters(x, sets) @ coefficients).square().mean()
        optimizer.zero_grad(set_to_none=True)  # a skipped layer has no gradient, and rests
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate_at(step, steps, rate)
        optimizer.step()
        flops += path.cost(s.batch) / (s.layers * s.steps)
        if step in {round(steps * i / s.evaluations) for i in range(1, s.evaluations + 1)}:
            with torch.no_grad():
                left = unlearned(forward(weights, held_out, whole(depth)), held_out_chi, coefficients, sets)
            points.append([round(value, 5) for value in (flops, *left.values())])
    if not all(map(math.isfinite, points[-1])):
        raise UserError(
            f"{arm} of width {width} diverged on seed {seed}: rate {rate:g} is too high (RATES in polynomials.py)"
        )
    return {**key(s, arm, width, seed, rate), "points": points}


def key(s, arm, width, seed, rate):
    """What makes two runs the same run."""
    return {"arm": arm, "width": width, "seed": seed, "rate": rate, **s._asdict()}


def read(file):
    """Runs of a file that may not be there, or whose last line was cut off in writing: that line is removed."""
    text = file.read_text() if file.exists() else ""
    if text and not text.endswith("\n"):
        file.write_text(text[: text.rfind("\n") + 1])
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def run_all(s, jobs, file, count):
    """Runs of [(arm, width, seed, rate), ...], those that `file` has not got yet made, `count` at a time, and appended to it."""
    done = read(file)
    known = lambda job: next((run for run in done if key(s, *job).items() <= run.items()), None)  # noqa: E731
    todo = [job for job in jobs if known(job) is None]
    with ProcessPoolExecutor(count) as pool:
        futures = [pool.submit(run, s, *job) for job in todo]
        for i, future in enumerate(as_completed(futures), 1):
            done.append(future.result())
            with file.open("a") as lines:
                lines.write(json.dumps(done[-1]) + "\n")
            last = done[-1]
            left = " ".join(f"{value:.2f}" for value in last["points"][-1][1:])
            print(
                f"  {i}/{len(todo)}  {last['arm']:10} width {last['width']:3} seed {last['seed']:3}  {left}", flush=True
            )
    return [known(job) for job in jobs]


# ----------------------------------------------------------------------------------------------------------------
# What the runs say


def groups(degrees):
    """Low, middle and high degrees: 1-3, 4-6, 7-10 of 10."""
    a, b = degrees // 3, 2 * degrees // 3
    return {"low": (1, a), "middle": (a + 1, b), "high": (b + 1, degrees)}


def curve(run, group):
    """[(layer FLOPs, mean u_k of a group of degrees), ...], from before the first step on."""
    low, high = groups(run["degrees"])[group]
    return [(0.0, 1.0)] + [(point[0], statistics.mean(point[low : high + 1])) for point in run["points"]]


def half(run, group):
    """Layer FLOPs at which half of a group is learned, on straight lines between points; infinite if it never is."""
    points = curve(run, group)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 <= 0.5:
            return x0 + (x1 - x0) * (y0 - 0.5) / (y0 - y1)
    return math.inf


def low_first(run):
    """Whether half of the low degrees was learned before half of the middle ones, and those before the high ones."""
    return half(run, "low") < half(run, "middle") < half(run, "high")


def last(run, group):
    return curve(run, group)[-1][1]


def late_fall(run):
    """By how much the high degrees' u_k falls in the last quarter of a run, with the learning rate in decay."""
    points = curve(run, "high")
    return points[-1 - len(points) // 4][1] - points[-1][1]


def difference(runs, width, arm, other, value):
    """(mean, half of the 95% interval) of value(arm) - value(other), paired by seed."""
    pick = lambda name: {r["seed"]: value(r) for r in runs if (r["arm"], r["width"]) == (name, width)}  # noqa: E731
    ours, theirs = pick(arm), pick(other)
    return interval([ours[seed] - theirs[seed] for seed in sorted(ours)])


def compared(mean, wide):
    word = "more" if mean > wide else "less" if mean < -wide else "no clear difference"
    return f"{word} ({mean:+.3f} ± {wide:.3f})"


def table(runs, width):
    """Lines of a table of one width."""
    spans = {name: f"{a}-{b}" for name, (a, b) in groups(runs[0]["degrees"]).items()}
    head = [f"degrees {span}" for span in spans.values()]
    head += [f"{spans['high']}, minus RaPTr", f"{spans['high']}, fall in the last quarter", "low degrees first"]
    lines = [f"| width {width} | rate | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for arm, name in ARMS.items():
        mine = [r for r in runs if (r["arm"], r["width"]) == (arm, width)]
        values = [[last(r, group) for r in mine] for group in spans]
        cells = [f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in values]
        gap = difference(runs, width, arm, "raptr", lambda r: last(r, "high"))
        cells += ["" if arm == "raptr" else f"{gap[0]:+.3f} ± {gap[1]:.3f}"]
        cells += ["{:.3f} ± {:.3f}".format(*interval(list(map(late_fall, mine))))]
        cells += [f"{sum(map(low_first, mine))} of {len(mine)}"]
        lines.append(f"| {name} | {mine[0]['rate']:g} | {' | '.join(cells)} |")
    return [*lines, ""]


def verdict(runs, widths):
    """Sentences, each computed from the runs."""
    order = sum(map(low_first, runs))
    lines = [
        "Verdict.",
        "",
        f"- (i) Low degrees first: in {order} of {len(runs)} runs half of the low degrees is learned before",
    ]
    lines[-1] += " half of the middle ones, and those before the high ones."
    for arm in ("pld", "pld_slow"):
        stalls = ", ".join(str(width) for width in widths if stalled(runs, width, arm))
        lines.append(
            f"- (ii) {ARMS[arm]} stalls on the high degrees at widths: {stalls or 'none'}. {against(runs, widths, arm)}"
        )
    falls = ", ".join(str(width) for width in widths if falling(runs, width, "raptr"))
    lines.append(f"- (iii) RaPTr still learns high degrees when it ends at widths: {falls or 'none'}.")
    lines[-1] += " " + against(runs, widths, "raptr", ("full_flops", "constant", "stacking"))
    return [*lines, ""]


def against(runs, widths, arm, others=("raptr", "full_flops")):
    """What an arm leaves unlearned of the high degrees, minus what others do, at each width."""
    said = []
    for other in others:
        gaps = [difference(runs, width, arm, other, lambda r: last(r, "high")) for width in widths]
        said.append(
            f"{ARMS[other]}: {', '.join(f'width {width} {compared(*gap)}' for width, gap in zip(widths, gaps))}"
        )
    return f"At the end it leaves, against {'; against '.join(said)}."


def falling(runs, width, arm):
    """Whether an arm's u_k of high k falls in the last quarter of training, beyond the 95% interval."""
    mean, wide = interval([late_fall(r) for r in runs if (r["arm"], r["width"]) == (arm, width)])
    return mean > wide


def stalled(runs, width, arm):
    """Whether an arm leaves more of the high degrees than RaPTr, beyond the 95% interval, and they no longer fall."""
    mean, wide = difference(runs, width, arm, "raptr", lambda r: last(r, "high"))
    return mean > wide and not falling(runs, width, arm)


def draw(runs, widths, path):
    """u_k of low, middle and high degrees against layer FLOPs: a row for each group, a column for each width."""
    from matplotlib.figure import Figure

    spans = groups(runs[0]["degrees"])
    figure = Figure(figsize=(3.2 * len(widths) + 0.6, 8), layout="constrained")
    grid = figure.subplots(3, len(widths), sharex=True, sharey=True, squeeze=False)
    for axes, (group, width) in zip(grid.flat, [(group, width) for group in spans for width in widths]):
        for (arm, name), color in zip(ARMS.items(), COLORS):
            curves = [curve(r, group) for r in runs if (r["arm"], r["width"]) == (arm, width)]
            x = [statistics.mean(x for x, _ in points) for points in zip(*curves)]
            mean = [statistics.mean(y for _, y in points) for points in zip(*curves)]
            std = [statistics.stdev(y for _, y in points) for points in zip(*curves)]
            axes.plot(x, mean, color=color, ls=":" if arm == "full" else "-", lw=1.5, label=name)
            axes.fill_between(
                x, [m - s for m, s in zip(mean, std)], [m + s for m, s in zip(mean, std)], color=color, alpha=0.1, lw=0
            )
        axes.set(xlim=(0, 1), ylim=(0, 1.1), xticks=[0, 0.25, 0.5, 0.75])
        axes.spines[["top", "right"]].set_visible(False)
    for axes, width in zip(grid[0], widths):
        axes.set_title(f"width {width}", fontsize=10)
    for axes, (low, high) in zip(grid[:, 0], spans.values()):
        axes.set_ylabel(f"degrees {low}-{high}, share unlearned")
    figure.supxlabel("layer FLOPs (full training with equal steps: 1)", fontsize=10)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9
    )
    figure.savefig(path, dpi=100)


def best_rates(runs):
    """{arm: its rate with the least unlearned, over all degrees and seeds}."""
    left = lambda arm, rate: sum(sum(r["points"][-1][1:]) for r in runs if (r["arm"], r["rate"]) == (arm, rate))  # noqa: E731
    return {arm: min(RATES, key=lambda rate: left(arm, rate)) for arm in ARMS}


def main():
    from engine.options import Parser, count, number

    parser = Parser(prog="polynomials.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    above = lambda least: number(int, f"a whole number, {least} or above", lambda x: x >= least)  # noqa: E731
    parser.add_argument(
        "--seeds",
        type=number(int, "a whole number from 2 to 100", lambda x: 2 <= x <= 100),
        default=5,
        help="seeds 0, 1, ... of target, weights, draws and paths",
    )
    parser.add_argument("--tuning_seeds", type=count, default=3, help="seeds 100, 101, ... choose the learning rates")
    parser.add_argument("--widths", default="24,40,64", help="with commas")
    for name, least in {"inputs": 4, "degrees": 3, "monomials": 1, "steps": 40, "batch": 1, "held_out": 1}.items():
        parser.add_argument(f"--{name}", type=above(least), default=Setting._field_defaults[name])
    fours = number(int, "a multiple of 4, above 0", lambda x: x > 0 and x % 4 == 0)  # 3/4 of them is a whole number
    parser.add_argument("--layers", type=fours, default=Setting._field_defaults["layers"])
    parser.add_argument("--jobs", type=count, default=1, help="runs at a time, a thread each")
    parser.add_argument("--out", default="results/polynomials", help="folder of runs, table and figure")
    args = parser.parse_args()
    try:
        widths = [int(width) for width in args.widths.split(",")]
        if min(widths) < 1 or len(set(widths)) < len(widths):
            raise ValueError
    except ValueError:
        parser.error(f"--widths {args.widths}: give different whole numbers above 0, with commas")
    if args.degrees >= args.inputs:
        parser.error(f"--degrees {args.degrees}: must be below the number of variables, {args.inputs} (--inputs)")
    if 2 * args.monomials > args.inputs:
        parser.error(f"--monomials {args.monomials}: at most half the number of variables, {args.inputs} (--inputs)")
    s = Setting(**{name: getattr(args, name) for name in Setting._fields if hasattr(args, name)})
    try:
        compare_arms(s, widths, args.seeds, args.tuning_seeds, args.jobs, Path(args.out))
    except ValueError as error:
        parser.error(str(error))


def compare_arms(s, widths, seeds, tuning, count, out):
    """Choose a rate for every arm, run all arms, write runs.jsonl, table.md and curves.png to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    chosen_on = range(TUNING_SEED, TUNING_SEED + tuning)
    trials = [(arm, TUNING_WIDTH, seed, rate) for seed in chosen_on for arm in ARMS for rate in RATES]
    rates = best_rates(run_all(s, trials, out / "runs.jsonl", count))
    jobs = [
        (arm, width, seed, rates[arm] * TUNING_WIDTH / width)
        for seed in range(seeds)
        for width in widths
        for arm in ARMS
    ]
    runs = run_all(s, jobs, out / "runs.jsonl", count)
    lines = [
        f"u_k left at the end, mean over degrees: mean ± std over {seeds} seeds; differences and falls with 95% intervals",
        "",
    ]
    lines += [line for width in widths for line in table(runs, width)] + verdict(runs, widths)
    (out / "table.md").write_text("\n".join(lines))
    draw(runs, widths, out / "curves.png")
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
