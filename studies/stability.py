"""Why growing the path hurts so little: how much a network changes when one of its layers is left out.

    python -m studies.stability                              (a) linear networks at initialisation: change against depth
    python -m studies.stability --run out/bert_toy-raptr-0   (b) a trained model: each layer bypassed, paths of every
                 length; if its checkpoints were kept (--keep_every), the jump of each stage change against its bound
    python -m studies.stability --rebuild                    tables and figures of (a) and (b), from their numbers

The statement. Let F be a network of L layers and F_l the same without layer l. When training goes from paths of L - 1
layers to all L, the loss changes by
    jump = loss(F) - mean over l of loss(F_l),     |jump| <= c * mean over l of ||F(x) - F_l(x)||,
c being the loss's Lipschitz constant. For linear layers at initialisation that mean falls as L^(-1/2) where layers are
residual *and* normalised, y <- y + W norm(y), and stays of order 1 where either is missing.
Tables, figures and numbers (JSON) are in results/stability/. Not here: how a model is trained (train.py), the jumps
that a comparison measured (its table.md).

Source: RaPTr (Panigrahi et al., arXiv 2402.05913), its theory of stage changes. Its constants are not known to us, so
exponents are compared. It also fits a trained BERT, about L^-0.88 as a public review quotes it; that is not repeated
here.
Legend: L layers, C width, n inputs or targets.
"""

import json
import math
import statistics
import sys
from pathlib import Path

import torch

import methods
from data import NO_TARGET, objective
from engine import checkpoint, options
from engine.errors import UserError, guard
from engine.log import subplots, write
from engine.runs import load_run, own_text
from raptr import RaPTr, Stage, Subnetwork, all_layers
from studies import figures, stats

KINDS = {  # of linear layers: (residual, with a norm)
    "residual and norm": (True, True),
    "residual only": (True, False),
    "norm only": (False, True),
    "neither": (False, False),
}
DEPTHS = (4, 8, 16, 32, 64, 128, 256)

# ----------------------------------------------------------------------------------------------------------------
# (a) Linear networks at initialisation


def norm(y):
    return y / y.square().mean(-1, keepdim=True).sqrt()


def run(weights, x, path, residual, normed):
    """Outputs (n, C), of mean square 1, of a linear network over the layers of a Subnetwork. It bypasses the others."""
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
    """(mean output change ||F(x) - F_l(x)|| / sqrt(C), |jump| of the squared distance to random targets)."""
    generator = torch.Generator().manual_seed(1000 * seed + layers)
    weights = torch.randn(layers, width, width, generator=generator, dtype=torch.float64) / width**0.5
    x, target = (norm(torch.randn(inputs, width, generator=generator, dtype=torch.float64)) for _ in range(2))
    full = run(weights, x, all_layers(layers), residual, normed)
    loss = lambda y: (y - target).square().mean().item()  # noqa: E731
    less = [run(weights, x, path, residual, normed) for path in one_layer_less(layers)]
    change = statistics.mean((full - y).square().mean(-1).sqrt().mean().item() for y in less)
    return change, abs(loss(full) - statistics.mean(map(loss, less)))


def initialisation(seeds, depths=DEPTHS):
    """{kind: {"change": {L: per seed}, "jump": {L: per seed}, "exponent": per seed, "last": of the last doubling}}. The
    depths are strings, as JSON has them."""
    numbers = {}
    for kind, flags in KINDS.items():
        pairs = {f"{L}": [linear(L, seed, *flags) for seed in range(seeds)] for L in depths}
        change, jump = ({L: [pair[i] for pair in values] for L, values in pairs.items()} for i in (0, 1))
        curves = [[(int(L), values[seed]) for L, values in change.items()] for seed in range(seeds)]
        exponents = {"exponent": [stats.slope(c) for c in curves], "last": [stats.slope(c[-2:]) for c in curves]}
        numbers[kind] = {"change": change, "jump": jump, **exponents}
    return numbers


def describe_initialisation(numbers):
    """Lines of a table and a verdict, in words, on what `initialisation` returns."""
    seeds, depths = len(numbers["neither"]["last"]), list(numbers["neither"]["change"])
    what = "mean change of the output when one layer is left out"
    lines = [f"Linear networks of width 64 at initialisation, {seeds} seeds: {what}", ""]
    head = ["layers are", *[f"L = {L}" for L in depths], "exponent (95%)", "of the last doubling"]
    rows = []
    for kind, values in numbers.items():
        changes = [f"{statistics.mean(change):.3f}" for change in values["change"].values()]
        rows.append([kind, *changes, *[stats.signed(stats.interval(values[name])) for name in ("exponent", "last")]])
    lines += stats.table(head, rows)
    jump = {kind: [(int(L), statistics.mean(j)) for L, j in values["jump"].items()] for kind, values in numbers.items()}
    jumps = ", ".join(f"{stats.slope(points):+.2f} ({kind})" for kind, points in jump.items())
    lines += ["", f"Exponent of |jump| of a squared loss to random targets: {jumps}", ""]
    mean, half = stats.interval(numbers["residual and norm"]["last"])
    inside = "inside" if abs(mean + 0.5) <= half else "outside"
    flat = [kind for kind, values in numbers.items() if abs(statistics.mean(values["exponent"])) < 0.1]
    verdict = f"as L^({mean:.2f} ± {half:.2f});"
    lines += [f"Verdict: with residual connections and norm the change falls, in the last doubling, {verdict}"]
    lines += [
        f"-1/2 lies {inside}. It stays (exponent within 0.1 of 0) with: {', '.join(flat) or 'none of the others'}."
    ]
    return lines


def draw_initialisation(numbers, path):
    figure, axes = subplots(7, 4.5)
    depths = [int(L) for L in numbers["neither"]["change"]]
    for kind, values in numbers.items():
        label = f"{kind}: L^{statistics.mean(values['exponent']):+.2f}"
        figures.band(axes, depths, values["change"].values(), "o-", label=label)
    start = statistics.mean(numbers["residual and norm"]["change"][f"{depths[0]}"])
    axes.plot(depths, [start * (L / depths[0]) ** -0.5 for L in depths], "k--", lw=1, label="L^-1/2")
    axes.set(xscale="log", yscale="log", xlabel="layers L", ylabel="change of the output when one layer is left out")
    axes.set_xticks(depths, depths)
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------
# (b) A trained model


class Measured:
    """A path of a model at the n targets of held-out batches.

    loss: the mean. states: F (n, C). c: length of the loss's gradient with respect to F, where it is largest.
    """

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
        """Of |jump|: c times the change. The cross-entropy is convex in F, so that on a line between two states it is
        steepest at one of them."""
        return max(self.c, other.c) * self.change(other)


def trained(run_folder, paths=8, sequences=256):
    """Measure a run's model on some of its held-out sequences. Returns {"full": loss, "targets": how many words that
    is the mean of, "layers": [(loss, relative output change, bound) without layer l], "lengths": {k: losses of random
    paths of k layers}, "stages": see `stage_changes`}. The lengths are strings, as JSON has them."""
    model, _, flags = load_run(run_folder)
    held_out = objective(flags, own_text(run_folder, flags)).held_out(min(sequences, flags.eval_sequences))
    batches = [*zip(*(torch.from_numpy(array).split(flags.micro_batch) for array in held_out))]
    L = len(model.blocks)
    full = Measured(model, batches, None)
    size = full.states.norm(dim=-1).mean().item()
    less = [Measured(model, batches, path) for path in one_layer_less(L)]
    layers = [(a.loss, a.change(full) / size, a.bound(full)) for a in less]
    lengths = {}
    for k in range(1, L):
        method = RaPTr([Stage(1, paths, k)], L, {0, L - 1} if k > 1 else set())
        drawn = [method.path(k, f"stability {i}") for i in range(paths)]
        lengths[f"{k}"] = [Measured(model, batches, path).loss for path in drawn]
    stages = stage_changes(run_folder, model, flags, batches, paths)
    return {"full": full.loss, "targets": len(full.states), "layers": layers, "lengths": lengths, "stages": stages}


def stage_changes(run_folder, model, flags, batches, paths):
    """Compare paths of the next stage with those of this one, over the weights at the end of each stage of RaPTr that
    has a checkpoint: [(step, k, next k, jump, bound)]. Of two paths drawn alike the shorter lies within the longer."""
    changes = []
    if flags.method != "raptr" or flags.part != "depth":
        return changes
    method = methods.choose(flags)
    folders = {checkpoint.step_of(folder): folder for folder in checkpoint.folders(run_folder)}
    for a, b in zip(method.plan, method.plan[1:]):
        if a.end in folders:
            model.load_state_dict(checkpoint.load(folders[a.end])[0]["model"], strict=False)
            pairs = []
            for i in range(paths):
                drawn = [method.path(stage.length, f"stability {i}") for stage in (a, b)]
                pairs.append([Measured(model, batches, path) for path in drawn])
            jump = statistics.mean(after.loss - before.loss for before, after in pairs)
            bound = statistics.mean(after.bound(before) for before, after in pairs)
            changes.append((a.end, a.length, b.length, jump, bound))
    return changes


def describe_trained(numbers, name):
    """Lines of tables and a verdict, in words, on what `trained` returns."""
    full, layers, stages = numbers["full"], numbers["layers"], numbers["stages"]
    L = len(layers)
    lines = [f"{name}: loss {full:.4f} with all {L} layers, on {numbers['targets']:,} held-out words", ""]
    head = ["without layer", "loss", "minus full", "output changes by", "bound of the jump"]
    rows = [(f"{i}", f"{a:.4f}", f"{a - full:+.4f}", f"{b:.1%}", f"{c:.2f}") for i, (a, b, c) in enumerate(layers)]
    lines += [*stats.table(head, rows), ""]
    rows = [(k, stats.spread(losses, 4)) for k, losses in numbers["lengths"].items()]
    lines += [*stats.table(["layers in a random path", "loss, mean ± std"], rows), ""]
    if stages:
        rows = [(f"{step}", f"{a:g} to {b:g}", f"{jump:+.4f}", f"{bound:.2f}") for step, a, b, jump, bound in stages]
        lines += [*stats.table(["stage change after step", "layers", "jump", "bound"], rows), ""]
    inner = layers[1:-1] or layers
    jump = full - statistics.mean(loss for loss, _, _ in inner)
    share = abs(jump) / statistics.mean(bound for _, _, bound in inner)
    worst = max(range(L), key=lambda i: layers[i][0])
    lines += [f"Verdict: from {L - 1} layers, the first and the last among them, to all {L} the loss changes by"]
    lines[-1] += f" {jump:+.4f},"
    lines += [
        f"{share:.1%} of the bound. The layer it needs most is {worst} ({layers[worst][0] - full:+.4f} without it)."
    ]
    if stages:
        shares = [abs(jump) / bound for *_, jump, bound in stages]
        lines += [f"Where a stage begins, the jump is {min(shares):.1%} to {max(shares):.1%} of the bound."]
    return lines


def draw_trained(numbers, path):
    figure, (left, right) = subplots(9, 3.5, 1, 2)
    left.bar(range(len(numbers["layers"])), [loss - numbers["full"] for loss, _, _ in numbers["layers"]])
    left.set(xlabel="layer left out", ylabel="more held-out loss, nats", xticks=range(len(numbers["layers"])))
    lengths, losses = [int(k) for k in numbers["lengths"]], numbers["lengths"].values()
    means, stds = ([of(values) for values in losses] for of in (statistics.mean, statistics.stdev))
    right.errorbar(lengths, means, stds, fmt="o-", capsize=3)
    right.axhline(numbers["full"], color="k", ls="--", lw=1, label="all layers")
    right.set(xlabel="layers in a random path", ylabel="held-out loss, nats", xticks=lengths)
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------


def show(file):
    """Write the table and the figure of a file of numbers, and print the table."""
    numbers = json.loads(file.read_text())
    made = stats.made_by(numbers.pop("made", {}))
    if file.stem == "initialisation":
        lines, draw = describe_initialisation(numbers), draw_initialisation
    else:
        lines, draw = describe_trained(numbers, file.stem), draw_trained
    stats.save_page(file.with_suffix(".md"), made + lines)
    draw(numbers, file.with_suffix(".png"))


def main():
    parser = options.command("studies.stability", __doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, help="run folder of a trained model")
    what.add_argument("--rebuild", action="store_true", help="write tables and figures again, from numbers in --out")
    parser.add_argument("--seeds", type=options.number(int, "a whole number, 2 or above", lambda x: x >= 2), default=10,
                        help="how many networks [10]")  # fmt: skip
    parser.add_argument("--out", type=Path, default="results/stability", help="folder of tables, figures and numbers")
    args = parser.parse_args()
    if args.rebuild:
        files = sorted(args.out.glob("*.json"))
        if not files:
            raise UserError(f"--out {args.out}: there are no numbers (JSON) in it")
        for file in files:
            show(file)
        return
    numbers = trained(args.run) if args.run else initialisation(args.seeds)
    file = args.out / f"{args.run.resolve().name if args.run else 'initialisation'}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps({"made": stats.made("studies.stability", sys.argv[1:]), **numbers}))
    show(file)


if __name__ == "__main__":
    guard("studies.stability", main)
