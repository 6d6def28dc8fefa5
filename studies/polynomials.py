"""Which degrees of a polynomial does each method learn, and when?

    python -m studies.polynomials            all arms, widths and seeds: table, figure, verdict in results/polynomials/
    python -m studies.polynomials --jobs 2   two runs at a time. A second start skips finished runs and rebuilds these

The statement. For x uniform on {-1, 1}^d let
    f*(x) = sum over degrees k = 1 .. D and j = 1 .. m of c_kj chi_kj(x),   c_kj^2 = 1 / m,
where chi_kj(x) is the product of x_i over i in S_kj, and |S_kj| = k. What a network f has not learned of degree k is
    u_k = sum over j of (E[f(x) chi_kj(x)] - c_kj)^2.
(i) u_k falls for low k first. (ii) Under PLD, whose networks shrink, it stalls for high k. (iii) Under RaPTr it falls.

S_kj is random, and nested, S_1j in S_2j in ...: without lower ones beneath them even full training hardly learns high
degrees in minutes, which says nothing about the other methods. A residual network f is trained on fresh samples of x;
u_k is estimated on held-out inputs, always of the full network. All arms cost 3/4 of full training's layer FLOPs, but
`full`, which is there for reference. Each arm's learning rate is chosen on seeds 100-102, at one width, and scaled by
1 / width. Not here: the methods (raptr.py, methods/layerdrop.py, stacking.py), which are used as they are.

Source: RaPTr (Panigrahi et al., arXiv 2402.05913), its polynomial toy. We know no more of its setting than 20 residual
layers and D = 10; nesting, d, m, layers (8), widths, optimizer and steps are ours.
Legend: L layers, C width, n inputs, d variables, D degrees, m monomials of each degree.
"""

import math
import shlex
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine import options
from engine.errors import UserError, guard
from engine.log import subplots
from methods.layerdrop import pld
from raptr import Full, RaPTr, Stage, all_layers, stage_plan
from stacking import Stacking, grow, stacking
from studies import figures, stats
from text.corpus import rng

TUNING_SEED, TUNING_WIDTH, RATES = 100, 40, (3e-3, 6e-3, 12e-3, 24e-3)  # rates at that width
ARMS = {  # name: (label, color)
    "full": ("full, equal steps", "black"),
    "full_flops": ("full, equal FLOPs", "black"),
    "raptr": ("RaPTr", "tab:red"),
    "constant": ("constant-p", "tab:orange"),
    "pld": ("PLD", "tab:blue"),
    "pld_slow": ("PLD, shrinking slowly", "deepskyblue"),
    "stacking": ("gradual stacking", "tab:green"),
}


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
    """(sets of variables, low degrees first; coefficients, whose squares sum to 1 in each degree).

    Set j of degree k is the first k variables of a random order of all; orders that give the same set twice are drawn
    again. Coefficients have random signs and one size: of random sizes, a small one would hold up all that is nested in
    it, more than any method does.
    """
    generator, chains = rng(seed, "target"), []
    while len(chains) < s.monomials:
        chain = generator.permutation(s.inputs)[: s.degrees].tolist()
        if not any(set(chain[:k]) == set(other[:k]) for other in chains for k in range(1, s.degrees + 1)):
            chains.append(chain)
    sets = [tuple(sorted(chain[:k])) for k in range(1, s.degrees + 1) for chain in chains]
    return sets, signs(1, len(sets), seed, "coefficients")[0] / s.monomials**0.5


def characters(x, sets):
    """The monomials (n, number of sets) at inputs (n, d)."""
    return torch.stack([x[:, list(variables)].prod(1) for variables in sets], 1)


def unlearned(outputs, chi, coefficients, sets):
    """{degree: u_k} from outputs (n,) and monomials (n, sets) at the same inputs.

    The coefficients of f - f* are estimated, not those of f. Their mean over all inputs is the same, as the monomials
    are orthogonal, and over n inputs they have far less noise once f is close to f*: about m E[(f - f*)^2] / n in u_k.
    """
    missing = (outputs - chi @ coefficients) @ chi / len(outputs)
    by_degree = dict.fromkeys(map(len, sets), 0.0)
    for variables, value in zip(sets, missing.tolist()):
        by_degree[len(variables)] += value**2
    return by_degree


# ----------------------------------------------------------------------------------------------------------------
# The network


def initial(depth, layers, d, width, seed):
    """Weights of `depth` blocks, the lowest ones of a network of `layers`. The output is 0. A block's update has size
    1 / sqrt(layers), so that the stream does not grow with depth."""
    generator = rng(seed, "weights")
    normal = lambda *shape: torch.from_numpy(generator.standard_normal(shape)).float() / shape[-1] ** 0.5  # noqa: E731
    weights = {"in": normal(width, d), "out": torch.zeros(width)}
    for i in range(depth):
        weights[f"blocks.{i}.up"] = normal(2 * width, width)
        weights[f"blocks.{i}.bias"] = torch.zeros(2 * width)
        weights[f"blocks.{i}.down"] = normal(width, 2 * width) / layers**0.5
    return {name: tensor.requires_grad_() for name, tensor in weights.items()}


def forward(weights, x, path):
    """Outputs (n,) at inputs (n, d), over the layers of a Subnetwork. It bypasses the others."""
    y = F.linear(x, weights["in"])  # (n, C)
    for i, scale in zip(path.layers, path.scale or [1] * len(path.layers)):
        hidden = F.linear(F.rms_norm(y, y.shape[1:]), weights[f"blocks.{i}.up"], weights[f"blocks.{i}.bias"])
        y = y + scale * F.linear(F.relu(hidden), weights[f"blocks.{i}.down"])
    return F.rms_norm(y, y.shape[1:]) @ weights["out"]


def adam(weights, state=None):
    """Adam over all tensors. state: {name: its moments}."""
    optimizer = torch.optim.Adam(weights.values(), betas=(0.9, 0.98), fused=True)
    for name, moments in (state or {}).items():
        optimizer.state[weights[name]] = moments
    return optimizer


def deepen(weights, optimizer, sources):
    """A deeper network and its optimizer. Moments are copied with their layers."""
    state = {name: optimizer.state[tensor] for name, tensor in weights.items()}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    moments = {kind: grow({name: state[name][kind] for name in weights}, sources) for kind in kinds}
    grown = grow({name: tensor.detach() for name, tensor in weights.items()}, sources)
    grown = {name: tensor.requires_grad_() for name, tensor in grown.items()}
    return grown, adam(grown, {name: {kind: moments[kind][name] for kind in kinds} for name in grown})


# ----------------------------------------------------------------------------------------------------------------
# The arms, and one run


def method_of(arm, L, T, seed):
    """(method, steps) that cost 3/4 of T steps of all L layers; `full` costs all."""
    K, pinned = 3 / 4 * L, {0, L - 1}
    if arm == "full_flops":
        return Full(L), round(3 / 4 * T)
    lengths = [round(share * L) for share in (1 / 2, 2 / 3, 5 / 6, 1)]
    makers = {
        "full": lambda: Full(L),
        "raptr": lambda: RaPTr(stage_plan(lengths, T, L), L, pinned, seed=seed),
        "constant": lambda: RaPTr([Stage(1, T, K)], L, pinned, seed=seed),
        "pld": lambda: pld(L, T, K, seed),  # has settled after a twentieth of the run
        "pld_slow": lambda: pld(L, T, K, seed, gamma=3 / T),  # shrinks until the end
        "stacking": lambda: Stacking(stacking, stage_plan([L // 2, round(K), L], T, L), L),
    }
    return makers[arm](), T


def rate_at(step, steps, peak):
    """Warm-up over a fiftieth of the steps, decay to 0 over the last three tenths."""
    return peak * min(1, 50 * step / steps, (steps - step + 1) / (0.3 * steps))


def run(s, arm, width, seed, rate):
    """Train one network: {"arm", ..., "points": [[layer FLOPs, as a share of `full`'s, u_1, ..., u_D], ...]}."""
    torch.set_num_threads(1)
    (sets, coefficients), (method, steps) = target(s, seed), method_of(arm, s.layers, s.steps, seed)
    depth = method.depth(1)
    weights = initial(depth, s.layers, s.inputs, width, seed)
    optimizer, flops, points = adam(weights), 0.0, []
    held_out = signs(s.held_out, s.inputs, seed, "held out")
    held_out_chi = characters(held_out, sets)
    for step in range(1, steps + 1):
        if method.depth(step) != depth:
            weights, optimizer = deepen(weights, optimizer, method.sources(depth, method.depth(step)))
            depth = method.depth(step)
        path = method.subnetwork(step) or all_layers(depth)
        x = signs(s.batch, s.inputs, seed, "batch", step)
        loss = (forward(weights, x, path) - characters(x, sets) @ coefficients).square().mean()
        optimizer.zero_grad(set_to_none=True)  # a skipped layer has no gradient, and Adam leaves it alone
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate_at(step, steps, rate)
        optimizer.step()
        flops += path.cost() / (s.layers * s.steps)
        if step in {round(steps * i / s.evaluations) for i in range(1, s.evaluations + 1)}:
            with torch.no_grad():
                left = unlearned(forward(weights, held_out, all_layers(depth)), held_out_chi, coefficients, sets)
            points.append([round(value, 5) for value in (flops, *left.values())])
    if not all(map(math.isfinite, points[-1])):
        where = f"{arm} of width {width} diverged on seed {seed}"
        raise UserError(f"{where}: rate {rate:g} is too high (RATES in studies/polynomials.py)")
    return {**key(s, arm, width, seed, rate), "points": points}


def key(s, arm, width, seed, rate):
    """What makes two runs the same run."""
    return {"arm": arm, "width": width, "seed": seed, "rate": rate, **s._asdict()}


def run_all(s, jobs, file, count):
    """The runs of [(arm, width, seed, rate), ...]. Makes those that `file` does not have, `count` at a time, and
    appends them to it."""

    def told(new):
        left = " ".join(f"{value:.2f}" for value in new["points"][-1][1:])
        return f"{new['arm']:10} width {new['width']:3} seed {new['seed']:3}  {left}"

    done = stats.read_done(file)
    done_as = lambda job: next((run for run in done if key(s, *job).items() <= run.items()), None)  # noqa: E731
    done += stats.append_all(run, [(s, *job) for job in jobs if not done_as(job)], file, count, told)
    return [done_as(job) for job in jobs]


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
    """Layer FLOPs at which half of a group is learned, on straight lines between points. Infinite if it never is."""
    points = curve(run, group)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 <= 0.5:
            return x0 + (x1 - x0) * (y0 - 0.5) / (y0 - y1)
    return math.inf


def low_first(run):
    """Whether half of the low degrees was learned before half of the middle ones, and those before the high ones."""
    return half(run, "low") < half(run, "middle") < half(run, "high")


def last(run, group="high"):
    """What is left of a group at the end."""
    return curve(run, group)[-1][1]


def late_fall(run):
    """By how much the high degrees' u_k falls in the last quarter of a run, while the learning rate decays."""
    points = curve(run, "high")
    return points[-1 - len(points) // 4][1] - points[-1][1]


def of(runs, width, arm):
    return [run for run in runs if (run["arm"], run["width"]) == (arm, width)]


def difference(runs, width, arm, other):
    """Interval of what an arm leaves of the high degrees, minus what another leaves, paired by seed."""
    both = of(runs, width, arm) + of(runs, width, other)
    return stats.interval(stats.paired(both, arm, other, lambda a, b: last(a) - last(b)))


def falling(runs, width, arm):
    """Whether an arm's u_k of high k falls in the last quarter of training, beyond the 95% interval."""
    mean, half_width = stats.interval([late_fall(run) for run in of(runs, width, arm)])
    return mean > half_width


def stalled(runs, width, arm):
    """Whether an arm leaves more of the high degrees than RaPTr, beyond the 95% interval, and they no longer fall."""
    mean, half_width = difference(runs, width, arm, "raptr")
    return mean > half_width and not falling(runs, width, arm)


def table(runs, width):
    """Lines of a table of one width."""
    spans = {name: f"{a}-{b}" for name, (a, b) in groups(runs[0]["degrees"]).items()}
    high = spans["high"]
    head = [f"width {width}", "rate", *[f"degrees {span}" for span in spans.values()], f"{high}, minus RaPTr"]
    head += [f"{high}, fall in the last quarter", "low degrees first"]
    rows = []
    for arm, (label, _) in ARMS.items():
        mine = of(runs, width, arm)
        cells = [label, f"{mine[0]['rate']:g}", *[stats.spread([last(r, group) for r in mine]) for group in spans]]
        cells += ["" if arm == "raptr" else stats.signed(difference(runs, width, arm, "raptr"))]
        cells += ["{:.3f} ± {:.3f}".format(*stats.interval(list(map(late_fall, mine))))]
        rows.append([*cells, f"{sum(map(low_first, mine))} of {len(mine)}"])
    return [*stats.table(head, rows), ""]


def verdict(runs, widths):
    """Sentences, each computed from the runs."""
    at = lambda holds, arm: ", ".join(str(width) for width in widths if holds(runs, width, arm)) or "none"  # noqa: E731
    order = f"in {sum(map(low_first, runs))} of {len(runs)} runs half of the low degrees is learned before"
    lines = [f"- (i) Low degrees first: {order} half of the middle ones, and those before the high ones."]
    for arm in ("pld", "pld_slow"):
        stalls = f"{ARMS[arm][0]} stalls on the high degrees at widths: {at(stalled, arm)}."
        lines.append(f"- (ii) {stalls} {against(runs, widths, arm, ('raptr', 'full_flops'))}")
    falls = f"RaPTr still learns high degrees when it ends at widths: {at(falling, 'raptr')}."
    lines.append(f"- (iii) {falls} {against(runs, widths, 'raptr', ('full_flops', 'constant', 'stacking'))}")
    return ["Verdict.", "", *lines]


def against(runs, widths, arm, others):
    """What an arm leaves unlearned of the high degrees, minus what others do, at each width, in words."""
    sentences = []
    for other in others:
        words = []
        for width in widths:
            mean, half_width = difference(runs, width, arm, other)
            word = "more" if mean > half_width else "less" if mean < -half_width else "no clear difference"
            words.append(f"width {width} {word} ({stats.signed((mean, half_width))})")
        sentences.append(f"{ARMS[other][0]}: {', '.join(words)}")
    return f"At the end it leaves, against {'; against '.join(sentences)}."


def draw(runs, widths, path):
    """u_k of low, middle and high degrees against layer FLOPs: a row for each group, a column for each width."""
    spans = groups(runs[0]["degrees"])
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, grid = subplots(3.2 * len(widths) + 0.6, 8, 3, len(widths), **shared)
    for axes, (group, width) in zip(grid.flat, [(group, width) for group in spans for width in widths]):
        for arm, (label, color) in ARMS.items():
            points = list(zip(*[curve(run, group) for run in of(runs, width, arm)]))  # by evaluation, then by seed
            x = [statistics.mean(flops for flops, _ in point) for point in points]
            samples = [[left for _, left in point] for point in points]
            figures.band(axes, x, samples, ":" if arm == "full" else "-", 0.1, color=color, lw=1.5, label=label)
        axes.set(xlim=(0, 1), ylim=(0, 1.1), xticks=[0, 0.25, 0.5, 0.75])
    for axes, width in zip(grid[0], widths):
        axes.set_title(f"width {width}", fontsize=10)
    for axes, (low, high) in zip(grid[:, 0], spans.values()):
        axes.set_ylabel(f"degrees {low}-{high}, share unlearned")
    figure.supxlabel("layer FLOPs (full training with equal steps: 1)", fontsize=10)
    labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------------------------


def best_rates(runs):
    """{arm: its rate with the least unlearned, over all degrees and seeds}."""

    def left(arm, rate):
        return sum(sum(r["points"][-1][1:]) for r in runs if (r["arm"], r["rate"]) == (arm, rate))

    return {arm: min(RATES, key=lambda rate: left(arm, rate)) for arm in ARMS}


def compare_arms(s, widths, seeds, tuning_seeds, count, out, command):
    """Choose a rate for every arm, run all arms, and write runs.jsonl, table.md and curves.png to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    chosen_on = range(TUNING_SEED, TUNING_SEED + tuning_seeds)
    trials = [(arm, TUNING_WIDTH, seed, rate) for seed in chosen_on for arm in ARMS for rate in RATES]
    rates = best_rates(run_all(s, trials, out / "runs.jsonl", count))
    scaled = {(arm, width): rates[arm] * TUNING_WIDTH / width for arm in ARMS for width in widths}
    jobs = [(arm, width, seed, scaled[arm, width]) for seed in range(seeds) for width in widths for arm in ARMS]
    runs = run_all(s, jobs, out / "runs.jsonl", count)
    commits = ", ".join(sorted({run["commit"] for run in runs if run.get("commit")}))
    what = f"u_k left at the end, mean over degrees: mean ± std over {seeds} seeds"
    lines = [*stats.made_by({"command": command, "commit": commits})]
    lines += [f"{what}; differences and falls with 95% intervals", ""]
    lines += [line for width in widths for line in table(runs, width)] + verdict(runs, widths)
    stats.save_page(out / "table.md", lines)
    draw(runs, widths, out / "curves.png")


def main():
    parser = options.command("studies.polynomials", __doc__)
    number, defaults = options.number, Setting._field_defaults
    two_up = number(int, "a whole number from 2 to 100", lambda x: 2 <= x <= TUNING_SEED)
    fours = number(int, "a multiple of 4, above 0", lambda x: x > 0 and x % 4 == 0)  # 3/4 of them is a whole number
    parser.add_argument("--seeds", type=two_up, default=5, help="seeds 0, 1, ... of target, weights, samples and paths")
    parser.add_argument("--tuning_seeds", type=options.count, default=3, help="seeds 100, ... that choose the rates")
    parser.add_argument("--widths", default="24,40,64", help="with commas")
    for name, least in {"inputs": 4, "degrees": 3, "monomials": 1, "steps": 40, "batch": 1, "held_out": 1}.items():
        kind = number(int, f"a whole number, {least} or above", lambda x, least=least: x >= least)
        parser.add_argument(f"--{name}", type=kind, default=defaults[name])
    parser.add_argument("--layers", type=fours, default=defaults["layers"])
    parser.add_argument("--jobs", type=options.count, default=1, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default="results/polynomials", help="folder of runs, table and figure")
    args = parser.parse_args()
    names = args.widths.split(",")
    if not all(name.isdecimal() and int(name) for name in names) or len(set(names)) < len(names):
        raise UserError(f"--widths {args.widths}: give different whole numbers above 0, with commas")
    if args.degrees >= args.inputs:
        raise UserError(f"--degrees {args.degrees}: must be below the number of variables, {args.inputs} (--inputs)")
    if 2 * args.monomials > args.inputs:
        raise UserError(f"--monomials {args.monomials}: at most half the number of variables, {args.inputs} (--inputs)")
    s = Setting(**{name: getattr(args, name) for name in Setting._fields if hasattr(args, name)})
    command = shlex.join(["python", "-m", "studies.polynomials", *sys.argv[1:]])
    compare_arms(s, [int(name) for name in names], args.seeds, args.tuning_seeds, args.jobs, args.out, command)


if __name__ == "__main__":
    guard("studies.polynomials", main)
