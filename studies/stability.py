"""Why growing the path hurts so little: how much a network changes when one of its layers is left out.

    python stability.py                                  linear networks at initialisation: jump against depth (a)
    python stability.py --run out/bert_toy-raptr-0       a trained model: each layer bypassed, paths of every length (b);
                             if its checkpoints were kept (--keep_every), the jump of each stage change against its bound
    python stability.py --logs results/short             measured jumps of RaPTr and of the growing methods (c)

The statement. Let F be a network of L layers and F_l the same without layer l. When training goes from paths of L - 1 layers
to all L, the loss changes by
    jump = loss(F) - mean over l of loss(F_l),     |jump| <= c * mean over l of ||F(x) - F_l(x)||,
c being the loss's Lipschitz constant. For linear layers at initialisation that mean falls as L^(-1/2) where layers are residual
*and* normalised, y <- y + W norm(y), and stays of order 1 where either is missing.
Figures and tables go to results/stability/. Not here: how a model is trained (train.py).

Source: RaPTr (Panigrahi et al., arXiv 2402.05913), its theory of stage changes. Its constants are not known to us; exponents are
compared, and the fit on BERT that it reports (about L^-0.88) is of a trained model's losses, not of this.
Legend: L layers, d width, n inputs.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from denoisers import view

import methods
from data import NO_TARGET
from engine import checkpoint
from engine.errors import UserError
from engine.runs import load_run, own_text
from raptr import RaPTr, Stage, Subnetwork, whole
from studies.compare import interval, jumps

KINDS = {
    "residual and norm": (True, True), "residual only": (True, False), "norm only": (False, True), "neither": (False, False),
}  # fmt: skip
DEPTHS = (4, 8, 16, 32, 64, 128, 256)

# ----------------------------------------------------------------------------------------------------------------
# (a) Linear networks at initialisation


def norm(y):
    return y / y.square().mean(-1, keepdim=True).sqrt()


def run(weights, x, path, residual, normed):
    """Outputs (n, d), of mean square 1, of a linear network over the layers of a Subnetwork; what is left out is bypassed."""
    y = x
    for layer in path.layers:
        update = (norm(y) if normed else y) @ weights[layer].T
        y = y + update if residual else update
        if not normed:  # the direction alone matters in the end; this keeps the numbers finite
            y = y / y.square().mean().sqrt()
    return norm(y)


def one_layer_less(layers):
    """Every subnetwork of L - 1 layers."""
    return [Subnetwork(tuple(i for i in range(layers) if i != left)) for left in range(layers)]


def linear(layers, seed, residual, normed, width=64, inputs=128):
    """(mean output change ||F(x) - F_l(x)|| / sqrt(d), |jump| of the squared distance to random targets) at initialisation."""
    generator = torch.Generator().manual_seed(1000 * seed + layers)
    weights = torch.randn(layers, width, width, generator=generator, dtype=torch.float64) / width**0.5
    x, target = (norm(torch.randn(inputs, width, generator=generator, dtype=torch.float64)) for _ in range(2))
    full = run(weights, x, whole(layers), residual, normed)
    loss = lambda y: (y - target).square().mean().item()  # noqa: E731
    less = [run(weights, x, path, residual, normed) for path in one_layer_less(layers)]
    change = statistics.mean((full - y).square().mean(-1).sqrt().mean().item() for y in less)
    return change, abs(loss(full) - statistics.mean(map(loss, less)))


def slope(points):
    """Exponent of y ~ x^a by least squares of the logarithms."""
    x, y = ([math.log(value) for value in values] for values in zip(*points))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def initialisation(seeds, depths=DEPTHS):
    """{kind: {"change": {L: per seed}, "jump": {L: per seed}, "exponent": per seed, "last": of the last doubling}}."""
    found = {}
    for kind, flags in KINDS.items():
        pairs = {L: [linear(L, seed, *flags) for seed in range(seeds)] for L in depths}
        change = {L: [change for change, _ in pairs[L]] for L in depths}
        found[kind] = {
            "change": change,
            "jump": {L: [jump for _, jump in pairs[L]] for L in depths},
            "exponent": [slope([(L, change[L][seed]) for L in depths]) for seed in range(seeds)],
            "last": [slope([(L, change[L][seed]) for L in depths[-2:]]) for seed in range(seeds)],
        }
    return found


def show_initialisation(seeds, out):
    found = initialisation(seeds)
    text = describe(found, seeds)
    out.mkdir(parents=True, exist_ok=True)
    (out / "initialisation.md").write_text(text)
    (out / "initialisation.json").write_text(json.dumps(found))
    draw(found, out / "initialisation.png")
    print("\n" + text)


def describe(found, seeds):
    """A table and a verdict, in words, of what `initialisation` found."""
    what = "mean change of the output when one layer is left out"
    lines = [f"Linear networks of width 64 at initialisation, {seeds} seeds: {what}", ""]
    lines += [f"| layers are | {' | '.join(f'L = {L}' for L in DEPTHS)} | exponent (95%) | of the last doubling |"]
    lines += ["|---" * (len(DEPTHS) + 3) + "|"]
    for kind, values in found.items():
        cells = [f"{statistics.mean(values['change'][L]):.3f}" for L in DEPTHS]
        fits = [f"{mean:+.3f} ± {half:.3f}" for mean, half in (interval(values["exponent"]), interval(values["last"]))]
        lines.append(f"| {kind} | {' | '.join(cells + fits)} |")
    jump = {kind: slope([(L, statistics.mean(values["jump"][L])) for L in DEPTHS]) for kind, values in found.items()}
    jumps = ", ".join(f"{value:+.2f} ({kind})" for kind, value in jump.items())
    lines += ["", f"Exponent of |jump| of a squared loss to random targets: {jumps}", ""]
    mean, half = interval(found["residual and norm"]["last"])
    inside = "-1/2 lies inside" if abs(mean + 0.5) <= half else "-1/2 lies outside"
    flat = [kind for kind, values in found.items() if abs(interval(values["exponent"])[0]) < 0.1]
    lines += [
        f"Verdict: with residual connections and norm the change falls, in the last doubling, as L^({mean:.2f} ± {half:.2f});"
    ]
    lines += [f"{inside}. It stays (exponent within 0.1 of 0) with: {', '.join(flat) or 'none of the others'}.", ""]
    return "\n".join(lines)


def draw(found, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, values in found.items():
        means = [statistics.mean(values["change"][L]) for L in DEPTHS]
        spread = [statistics.stdev(values["change"][L]) for L in DEPTHS]
        axes.fill_between(
            DEPTHS, [m - s for m, s in zip(means, spread)], [m + s for m, s in zip(means, spread)], alpha=0.2
        )
        axes.plot(DEPTHS, means, "o-", label=f"{kind}: L^{statistics.mean(values['exponent']):+.2f}")
    start = statistics.mean(found["residual and norm"]["change"][DEPTHS[0]])
    axes.plot(DEPTHS, [start * (L / DEPTHS[0]) ** -0.5 for L in DEPTHS], "k--", lw=1, label="L^-1/2")
    axes.set(xscale="log", yscale="log", xlabel="layers L", ylabel="change of the output when one layer is left out")
    axes.set_xticks(DEPTHS, DEPTHS)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------
# (b) A trained model


class Measured:
    """A path of a model at the n targets of held-out batches: mean loss, states F (n, C), and c, the length of the loss's
    gradient with respect to F where it is largest."""

    def __init__(self, model, batches, path):
        losses, states, lengths = zip(*(self.at_targets(model, batch, path) for batch in batches))
        self.states, self.c = torch.cat(states), max(lengths)
        self.loss = math.fsum(losses) / len(self.states)

    def at_targets(self, model, batch, path):
        at = batch[2] != NO_TARGET
        with torch.no_grad():
            states = model.states(*batch[:2], path)[at]
        loss = model.cross_entropy(states.requires_grad_(), batch[2][at])
        gradient = torch.autograd.grad(loss, states)[0]
        return loss.item(), states.detach(), gradient.norm(dim=-1).max().item()

    def change(self, other):
        """Mean of ||F - F'|| over the targets."""
        return (self.states - other.states).norm(dim=-1).mean().item()

    def bound(self, other):
        """Of |jump|: c times the change. The cross-entropy is convex in F, so that on a line between two states it is steepest
        at one of them."""
        return max(self.c, other.c) * self.change(other)


def trained(run_folder, paths=8, sequences=256):
    """Of a run's model, on so many of its held-out sequences: {"full": loss, "targets": how many words that is the mean of,
    "layers": [(loss, relative output change, bound) without layer l], "lengths": {k: losses of random paths of k layers},
    "stages": [(step, k, next k, jump, bound)] for each stage of RaPTr at whose end there is a checkpoint}."""
    model, _, flags = load_run(run_folder)
    fixed = view(flags, own_text(run_folder, flags)).fixed(min(sequences, flags.eval_sequences), flags.seq)
    batches = [*zip(*(torch.from_numpy(part).split(flags.micro_batch) for part in fixed))]
    L = len(model.blocks)
    full = Measured(model, batches, None)
    size = full.states.norm(dim=-1).mean().item()
    less = [Measured(model, batches, path) for path in one_layer_less(L)]
    layers = [(a.loss, a.change(full) / size, a.bound(full)) for a in less]
    found = {"full": full.loss, "targets": len(full.states), "layers": layers, "lengths": {}}
    for k in range(1, L):
        method = RaPTr([Stage(1, paths, k)], L, {0, L - 1} if k > 1 else set())
        found["lengths"][k] = [Measured(model, batches, method.path(k, f"stability {i}")).loss for i in range(paths)]
    return found | {"stages": stage_changes(run_folder, model, flags, batches, paths)}


def stage_changes(run_folder, model, flags, batches, paths):
    """At the end of each stage of RaPTr: paths of the next stage against those of this one, over the same weights. Of two paths
    drawn alike the shorter lies within the longer."""
    found = []
    if flags.method != "raptr" or flags.part != "depth":
        return found
    method = methods.choose(flags)
    weights = {checkpoint.step_of(folder): folder for folder in checkpoint.folders(run_folder)}
    for a, b in zip(method.plan, method.plan[1:]):
        if a.end in weights:
            model.load_state_dict(checkpoint.load(weights[a.end])[0]["model"], strict=False)
            pairs = [
                [Measured(model, batches, method.path(s.length, f"stability {i}")) for s in (a, b)]
                for i in range(paths)
            ]
            jump = statistics.mean(after.loss - before.loss for before, after in pairs)
            bound = statistics.mean(after.bound(before) for before, after in pairs)
            found.append((a.end, a.length, b.length, jump, bound))
    return found


def show_trained(run_folder, out):
    found, name = trained(run_folder), Path(run_folder).resolve().name
    text = describe_trained(found, name)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text)
    (out / f"{name}.json").write_text(json.dumps(found))
    draw_trained(found, out / f"{name}.png")
    print("\n" + text)


def describe_trained(found, name):
    """Tables and a verdict, in words, of what `trained` found."""
    full, layers, stages = found["full"], found["layers"], found["stages"]
    L = len(layers)
    lines = [f"{name}: loss {full:.4f} with all {L} layers, on {found['targets']:,} held-out words", ""]
    lines += ["| without layer | loss | minus full | output changes by | bound of the jump |", "|---|---|---|---|---|"]
    for i, (loss, change, bound) in enumerate(layers):
        lines.append(f"| {i} | {loss:.4f} | {loss - full:+.4f} | {change:.1%} | {bound:.2f} |")
    lines += ["", "| layers in a random path | loss, mean ± std |", "|---|---|"]
    lines += [f"| {k} | {statistics.mean(v):.4f} ± {statistics.stdev(v):.4f} |" for k, v in found["lengths"].items()]
    if stages:
        lines += ["", "| stage change after step | layers | jump | bound |", "|---|---|---|---|"]
        lines += [f"| {step} | {a:g} to {b:g} | {jump:+.4f} | {bound:.2f} |" for step, a, b, jump, bound in stages]
    inner = layers[1:-1] or layers
    jump = full - statistics.mean(loss for loss, _, _ in inner)
    bound = statistics.mean(bound for _, _, bound in inner)
    worst = max(range(L), key=lambda i: layers[i][0])
    lines += [
        "",
        f"Verdict: from {L - 1} layers, the first and the last among them, to all {L} the loss changes by {jump:+.4f},",
    ]
    lines += [
        f"{abs(jump) / bound:.1%} of the bound. The layer it needs most is {worst} ({layers[worst][0] - full:+.4f} without it)."
    ]
    if stages:
        shares = [abs(jump) / bound for *_, jump, bound in stages]
        lines += [f"Where a stage begins, the jump is {min(shares):.1%} to {max(shares):.1%} of the bound."]
    return "\n".join(lines) + "\n"


def draw_trained(found, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(len(found["layers"])), [loss - found["full"] for loss, _, _ in found["layers"]])
    left.set(xlabel="layer left out", ylabel="more held-out loss, nats", xticks=range(len(found["layers"])))
    lengths, losses = [*found["lengths"]], [*found["lengths"].values()]
    right.errorbar(
        lengths, [statistics.mean(v) for v in losses], [statistics.stdev(v) for v in losses], fmt="o-", capsize=3
    )
    right.axhline(found["full"], color="k", ls="--", lw=1, label="all layers")
    right.set(xlabel="layers in a random path", ylabel="held-out loss, nats", xticks=lengths)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------
# (c) Measured jumps


def show_logs(folder, out):
    runs = [json.loads(line) for line in (Path(folder) / "runs.jsonl").read_text().splitlines()]
    table = jumps(runs)
    lines = ["| method | change | before | after | jump | runs |", "|---|---|---|---|---|---|"]
    lines += [f"| {arm} | {change} | {a:.3f} | {b:.3f} | {b - a:+.3f} | {n} |" for arm, change, a, b, n in table]
    ours = [b - a for arm, _, a, b, _ in table if arm == "raptr"]
    theirs = [b - a for arm, _, a, b, _ in table if not arm.startswith("raptr")]
    if ours and theirs:
        lines += ["", f"Verdict: where a stage begins RaPTr's loss changes by {min(ours):+.3f} to {max(ours):+.3f},"]
        lines += [f"that of networks that grow by {min(theirs):+.3f} to {max(theirs):+.3f}."]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"jumps-{Path(folder).resolve().name}.md").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines) + "\n")


def main():
    from engine.options import Parser, number

    parser = Parser(prog="stability.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", help="run folder of a trained model")
    what.add_argument("--logs", help="results folder of compare.py")
    parser.add_argument("--seeds", type=number(int, "a whole number, 2 or above", lambda x: x >= 2), default=10)
    parser.add_argument("--out", default="results/stability", help="folder of tables and figures")
    args = parser.parse_args()
    out = Path(args.out)
    try:
        if args.run:
            show_trained(args.run, out)
        elif args.logs:
            if not (Path(args.logs) / "runs.jsonl").exists():
                raise UserError(f"--logs {args.logs}: there is no runs.jsonl in it")
            show_logs(args.logs, out)
        else:
            show_initialisation(args.seeds, out)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
