"""Deep Fusion's theory: what a growth in mid-training adds to the dynamics, and whether it tells the learning rate.

    python -m studies.bracket              check the expansion, then grow small networks and train them on
    python -m studies.bracket --rebuild    table and figure again, from results/bracket/runs.jsonl

The fields. Parents with weights p have a loss l (of a fusion: the sum of both parents' losses). Growth takes p0 to t0,
all N weights of the grown network, whose loss is L. G is the linear part of the growth, G+ the pseudo-inverse of G. H1
and H2 are the Jacobians of
    g1(t) = G grad l(p0 + G+ (t - t0)),       g2(t) = grad L(t).
Growth takes a flow of p along -grad l to a flow of t along -g1. So "train the parents for a time h, grow, train for h"
is a flow along -g1 for h, then along -g2 for h. By Taylor's series it goes from t to
    t - h (g1 + g2) + h^2/2 (H1 g1 + H2 g2) + h^2 H2 g1 + O(h^3).
The flow along -(g1 + g2) for h has h^2/2 (H1 + H2)(g1 + g2) at second order, which is less by h^2/2 (H2 g1 - H1 g2). So
to second order both trainings together are one flow along
    -(g1 + g2) + h/2 (H2 g1 - H1 g2),         with the Lie bracket of -g1 and -g2.
One gradient step of each gives t - h (g1 + g2) + h^2 H2 g1: its flow has the further term -h/2 (H1 g1 + H2 g2).
Where G copies or scales weights, g1 need not be a gradient, nor H1 symmetric.

The bracket's size is k = |H2 g1 - H1 g2| / (2 |g1 + g2|): at h = 1/k the further term is as long as the field. Our
reading: the learning rate right after a growth should fall as k rises. How the authors choose it is not known to us,
nor how they extend the parents' field to where there are no parents; the nearest parents (G+) are our choice. The
theory is about gradient descent, while AdamW trains the networks, as everywhere here.
Not here: the growths themselves (methods/deep_fusion.py, stacking.py).

Source: Deep Fusion (Mazzawi et al., arXiv 2306.11903), its theory of growth by backward error analysis.
Legend: t (N,) weights of the grown network, p (P,) of its parents, v a direction, h a time or a step size.
"""

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import model as transformer
import stacking
import train
from engine import machine, options, parallel
from engine.errors import UserError, guard
from engine.log import read_jsonl, subplots
from methods import deep_fusion
from studies import figures, stats
from text.corpus import open_corpus

SETTING = "--config=configs/ul2_toy.toml --method=full --vocab=1024 --lr=4e-3 --init_std=0.125 --eval_sequences=256"
SETTING += f" --denoisers={data.UL2} --lr_schedule=linear"
SETTING += " --layers=4 --width=64 --heads=4 --mlp=160 --device=cpu --dtype=float32 --threads=1"  # of grown networks
NARROW, SHALLOW = {"width": 32, "heads": 2, "mlp": 80}, {"layers": 3}  # what differs in parents
GROWTHS = {  # name: (label, color, what differs in the parents)
    "property": ("fusion property", "tab:blue", [NARROW, NARROW]),
    "rule": ("fusion rule", "tab:orange", [NARROW, NARROW]),
    "self": ("self-fusion", "tab:green", [NARROW]),
    "stacking": ("gradual stacking", "tab:red", [SHALLOW]),
    "none": ("no growth", "black", [{}]),  # the same field twice: its bracket is 0
}
NOISE, MEASURED_ON = 0.01, 64  # of self-fusion's second half; sequences that a bracket is measured on
FACTORS = (0.25, 0.5, 1.0, 2.0)  # of the learning rate right after a growth
STEP_SIZES = [0.004 / 2**i for i in range(6)]
RANKS, AUTOCAST = parallel.Ranks("cpu"), machine.autocast("cpu", torch.float32)

# ----------------------------------------------------------------------------------------------------------------
# The fields and their bracket


def flat(tensors):
    """One vector of tensors {name: tensor}, in order of their names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def shaped(vector, like):
    """Tensors {name: tensor} of a vector, in the shapes of those in `like`."""
    parts = vector.split([like[name].numel() for name in sorted(like)])
    return {name: part.view(like[name].shape) for name, part in zip(sorted(like), parts)}


class Growth(NamedTuple):
    """Parents, and what they become. Tensors are {name: tensor}, losses are functions of them."""

    parents: list  # tensors of each parent
    losses: list  # of each parent
    join: object  # G, a linear function of the parents' tensors
    grown: dict  # tensors
    loss: object

    def fields(self):
        """(g1, g2), functions of a vector t (N,) that return (N,)."""
        sizes = [len(flat(tensors)) for tensors in self.parents]
        p0, t0 = torch.cat([flat(tensors) for tensors in self.parents]), flat(self.grown)
        split = lambda p: [shaped(part, like) for part, like in zip(p.split(sizes), self.parents)]  # noqa: E731
        both = lambda p: sum(loss(tensors) for loss, tensors in zip(self.losses, split(p)))  # noqa: E731
        join = lambda p: flat(self.join(*split(p)))  # noqa: E731
        transposed = lambda t: vjp(join, p0)[1](t)[0]  # noqa: E731
        # G mixes an entry of a parent with the same one of the other parent at most, and then by equal parts (the bias
        # of the logits). So G+ is the transpose of G, divided entry by entry by G^T G 1.
        squares = transposed(join(torch.ones_like(p0)))
        g1 = lambda t: join(grad(both)(p0 + transposed(t - t0) / squares))  # noqa: E731
        return g1, grad(lambda t: self.loss(shaped(t, self.grown)))


def along(field, t, v):
    """Jacobian of a field at t, times v (N,)."""
    return jvp(field, (t,), (v,))[1]


def bracket(g1, g2, t):
    """H2 g1 - H1 g2 (N,) at t."""
    return along(g2, t, g1(t)) - along(g1, t, g2(t))


# ----------------------------------------------------------------------------------------------------------------
# Is the expansion right?


def flow(field, t, h, steps=4):
    """Where t goes along a field in time h, by Runge-Kutta, whose error of order 5 is far below what is measured."""
    d = h / steps
    for _ in range(steps):
        a = field(t)
        b = field(t + d / 2 * a)
        c = field(t + d / 2 * b)
        t = t + d / 6 * (a + 2 * b + 2 * c + field(t + d * c))
    return t


def small_growth(seed=0):
    """A Growth in float64: two MLPs (model.py), 3 and 4 wide, become one by the fusion rule. Each parent predicts its
    part of random targets (32, 7) from its part of the inputs, the grown network all from all."""
    draws = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draws, dtype=torch.float64)  # noqa: E731
    x, targets, tensors, losses = normal(32, 7), normal(32, 7), [], []
    for part in (slice(0, 3), slice(3, 7), slice(0, 7)):
        config = transformer.Config(width=part.stop - part.start, mlp=2 * (part.stop - part.start), dropout=0.0)
        mlp = transformer.MLP(config).double()
        tensors.append({name: 0.4 * normal(*p.shape) for name, p in mlp.named_parameters()})

        def loss(tensors, mlp=mlp, part=part):
            y = functional_call(mlp, tensors, (x[:, part], transformer.Shared()))
            return (y - targets[:, part]).square().sum(1).mean()

        losses.append(loss)
    grown = deep_fusion.fuse(*tensors[:2], config, fresh=tensors[2])
    return Growth(tensors[:2], losses[:2], lambda a, b: deep_fusion.fuse(a, b, config), grown, losses[2])


def expansion(growth, sizes):
    """{what: [distance of both trainings, one after the other, from one flow, for each h of `sizes`]}."""
    (g1, g2), t = growth.fields(), flat(growth.grown)
    own = lambda t: along(g1, t, g1(t)) + along(g2, t, g2(t))  # noqa: E731
    terms = {  # that h/2 multiplies
        "without the bracket": lambda t: 0.0,
        "with the bracket": lambda t: bracket(g1, g2, t),
        "with both terms": lambda t: bracket(g1, g2, t) - own(t),
    }
    errors = {}
    for h in sizes:
        stepped = t - h * g1(t)
        ends = {"flows": flow(lambda t: -g2(t), flow(lambda t: -g1(t), t, h), h), "steps": stepped - h * g2(stepped)}
        for name, term in terms.items():
            end = flow(lambda t, h=h, term=term: -(g1(t) + g2(t)) + h / 2 * term(t), t, h)
            for kind in ends if name != "with both terms" else ["steps"]:  # the second term is of steps alone
                errors.setdefault(f"{kind} {name}", []).append((ends[kind] - end).norm().item())
    return errors


# ----------------------------------------------------------------------------------------------------------------
# Does it tell the learning rate?


def train_on(model, args, objective, seed, start, steps, rate):
    """Train for `steps` after step `start`, with a fresh AdamW. rate: of progress from 0 to 1, as a share of --lr."""
    optimizer = train.make_optimizer(model.train(), args)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate((step - 1) / steps)
        batch = objective.batch(seed, start + step, args.batch)
        train.train_step(model, optimizer, batch, None, args, RANKS, AUTOCAST)


def rate_after(progress, factor):
    """The factor in the first quarter after a growth, then 1, on a line to 0 in the last fifth."""
    return factor if progress < 0.25 else min(1.0, 5 * (1 - progress))


def trained(args, objective, seed, shape):
    """A parent: trained at a learning rate that rises in the first twentieth of --steps, and is then held."""
    model = transformer.make(dataclasses.replace(transformer.Config.of(args, objective.model_vocab), **shape), seed)
    train_on(model, args, objective, seed, 0, args.steps, lambda progress: min(1.0, 20 * progress + 0.01))
    return model


def grow(name, parents, config, seed, batch):
    """The Growth of trained models, whose losses are means over a batch."""
    made, targets = transformer.make(config, seed), (batch[2] != data.NO_TARGET).sum()
    tensors, fresh = [deep_fusion.named(parent) for parent in parents], deep_fusion.named(made)
    loss_of = lambda model: lambda tensors: functional_call(model, tensors, (batch,)) / targets  # noqa: E731
    fuse = lambda a, b: deep_fusion.fuse(a, b, config)  # noqa: E731
    join = {
        "property": fuse,
        "rule": fuse,
        "self": lambda a: fuse(a, deep_fusion.perturbed(a, NOISE, seed)),
        "stacking": lambda a: stacking.grow(a, stacking.stacking(len(parents[0].blocks), config.layers)),
        "none": lambda a: a,
    }[name]
    grown = deep_fusion.fuse(*tensors, config, fresh) if name == "rule" else join(*tensors)
    return Growth(tensors, [loss_of(parent.eval()) for parent in parents], join, grown, loss_of(made.eval()))


def measure(growth):
    """Sizes at a growth: of both fields, of their sum, and of their bracket."""
    (g1, g2), t = growth.fields(), flat(growth.grown)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivatives
        vectors = {"g1": g1(t), "g2": g2(t), "sum": g1(t) + g2(t), "bracket": bracket(g1, g2, t)}
    return {name: float(f"{vector.norm().item():.6g}") for name, vector in vectors.items()}


def run_seed(args, objective, seed):
    """Yield {"growth", "seed", sizes, "after": loss right after it, "losses": final ones, by factor} of each growth."""
    held_out = objective.held_out(args.eval_sequences)
    batch = train.to_device(objective.held_out(MEASURED_ON, tuning=True), torch.device("cpu"))
    config = transformer.Config.of(args, objective.model_vocab)
    loss = lambda model: round(train.evaluate(model, held_out, [None], args.batch, AUTOCAST, RANKS), 5)  # noqa: E731
    two = [trained(args, objective, each, NARROW) for each in (seed, seed + 100)]
    for name, (_, _, shapes) in GROWTHS.items():
        narrow = shapes[0] is NARROW
        parents = two[: len(shapes)] if narrow else [trained(args, objective, seed, shape) for shape in shapes]
        growth, model, losses = grow(name, parents, config, seed, batch), transformer.make(config, seed), []
        model.load_state_dict(growth.grown, strict=False)
        after = loss(model)
        for factor in FACTORS:
            model.load_state_dict(growth.grown, strict=False)
            train_on(model, args, objective, seed, args.steps, args.steps // 2, lambda at, f=factor: rate_after(at, f))
            losses.append(loss(model))
        yield {"growth": name, "seed": seed, **measure(growth), "after": after, "losses": losses}


# ----------------------------------------------------------------------------------------------------------------
# What the runs say


def size(run):
    """k, in 1 / h."""
    return run["bracket"] / (2 * run["sum"])


def best(run):
    return min(zip(run["losses"], FACTORS))[1]


def slopes(runs, value):
    """How value(run) changes where k doubles: by least squares over the growths, one number a seed."""
    result = []
    for seed in sorted({run["seed"] for run in runs}):
        grown = [run for run in runs if run["seed"] == seed and run["growth"] != "none"]
        points = [math.log2(size(run)) for run in grown], [value(run) for run in grown]
        result.append(statistics.linear_regression(*points).slope)
    return result


def orders(errors):
    """{what: order in h} of the errors that `expansion` returns."""
    return {name: stats.slope([*zip(STEP_SIZES, each)]) for name, each in errors.items()}


def verdicts(errors, runs):
    """[(question, what was measured, verdict)], by the rules of results/LOG.md."""
    rates = slopes(runs, lambda run: math.log2(best(run)))
    losses = slopes(runs, lambda run: run["losses"][FACTORS.index(1.0)])
    of_rates = lambda low, high: low > 0 or (-0.25 < low and high < 0.25)  # noqa: E731
    of_losses = lambda low, high: high < 0 or stats.level(low, high)  # noqa: E731
    found = orders(errors)
    wanted = {"flows without the bracket": 2, "flows with the bracket": 3}
    wanted |= {"steps without the bracket": 2, "steps with both terms": 3}
    holds = all(abs(found[name] - order) < 0.1 for name, order in wanted.items())
    said = lambda values: stats.signed(stats.interval(values))  # noqa: E731
    return [
        ("a larger bracket goes with a lower best learning rate", f"log2 of the best factor: {said(rates)}",
         stats.verdict(rates, lambda low, high: high < 0, of_rates)),
        ("a larger bracket goes with a higher final loss", f"nats at factor 1: {said(losses)}",
         stats.verdict(losses, lambda low, high: low > 0, of_losses)),
        ("the expansion holds", ", ".join(f"{found[name]:.2f}" for name in wanted), "yes" if holds else "no"),
    ]  # fmt: skip


def describe(first, runs):
    """Lines of table.md. first: the log's first line, with the expansion."""
    lines = ["# The bracket of a growth", "", *stats.made_by(first["made"]), first["text"], ""]
    head = ["distance of two trainings from one flow", *[f"h = {STEP_SIZES[i]:g}" for i in (0, -1)], "order in h"]
    found, errors = orders(first["expansion"]), first["expansion"].items()
    rows = [(name, f"{each[0]:.1e}", f"{each[-1]:.1e}", f"{found[name]:.3f}") for name, each in errors]
    lines += [*stats.table(head, rows), ""]
    lines += [
        "Mean ± std over seeds. g1, g2, bracket: lengths. k: size of the bracket. Losses are held-out, in nats: right"
    ]
    lines += ["after the growth, and final ones, by the factor x of the learning rate right after the growth.", ""]
    head = ["growth", "g1", "g2", "bracket", "k", "loss after it", *[f"x {factor:g}" for factor in FACTORS], "best x"]
    rows = []
    for name, (label, *_) in GROWTHS.items():
        mine = [run for run in runs if run["growth"] == name]
        cells = [[run["g1"], run["g2"], run["bracket"], size(run), run["after"], *run["losses"]] for run in mine]
        rows.append([label, *map(stats.spread, zip(*cells)), ", ".join(f"{best(run):g}" for run in mine)])
    lines += [*stats.table(head, rows), "", "Changes where k doubles, over the four growths, with 95% intervals:", ""]
    return [*lines, *stats.table(["question", "measured", "verdict"], verdicts(first["expansion"], runs))]


def draw(first, runs, path):
    """Errors of the expansion; what another learning rate changes; the final loss against k."""
    figure, (left, middle, right) = subplots(13, 4, 1, 3)
    for name, order in orders(first["expansion"]).items():
        kind, term = name.split(maxsplit=1)
        style = {"without the bracket": "o:", "with the bracket": "s--", "with both terms": "^-"}[term]
        color = {"flows": "tab:blue", "steps": "tab:red"}[kind]
        left.plot(STEP_SIZES, first["expansion"][name], style, color=color, ms=4, label=f"{name}: order {order:.2f}")
    left.set(xscale="log", yscale="log", xlabel="h", ylabel="distance of two trainings from one flow")
    left.set_xticks([STEP_SIZES[0], STEP_SIZES[-1]], [f"{h:g}" for h in (STEP_SIZES[0], STEP_SIZES[-1])])
    for name, (label, color, _) in GROWTHS.items():
        mine, one = [run for run in runs if run["growth"] == name], FACTORS.index(1.0)
        changes = [*zip(*[[loss - run["losses"][one] for loss in run["losses"]] for run in mine])]
        figures.band(middle, FACTORS, changes, "o-", 0.1, color=color, label=label)
        if name != "none":
            right.plot([size(run) for run in mine], [run["losses"][one] for run in mine], "o", color=color)
    middle.set(xscale="log", xlabel="factor of the learning rate right after the growth")
    middle.set_ylabel("final held-out loss minus that at factor 1 (nats)")
    middle.set_xticks(FACTORS, [f"{factor:g}" for factor in FACTORS])
    right.set(xscale="log", xlabel="k, size of the bracket (1/h)", ylabel="final held-out loss at factor 1 (nats)")
    right.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    for axes in (left, middle, right):
        axes.minorticks_off()
    for axes in (left, middle):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def show(out):
    """Write table.md and figure.png from runs.jsonl, and print the table."""
    file = out / "runs.jsonl"
    first, *runs = read_jsonl(file) if file.exists() else [None]
    if not runs:
        raise UserError(f"--out {out}: there are no runs (runs.jsonl) in it")
    stats.save_page(out / "table.md", describe(first, runs))
    draw(first, runs, out / "figure.png")


def main():
    parser = options.command("studies.bracket", __doc__)
    two_up = options.number(int, "a whole number from 2 to 100", lambda x: 2 <= x <= 100)
    parser.add_argument("--seeds", type=two_up, default=3, help="number of seeds [3]")
    twenty_up = options.number(int, "a whole number, 20 or above", lambda x: x >= 20)
    parser.add_argument("--steps", type=twenty_up, default=300, help="of a parent; half as many follow a growth")
    parser.add_argument("--data", default="", help="as of train.py")
    parser.add_argument("--out", type=Path, default="results/bracket", help="folder of runs, table and figure")
    parser.add_argument("--rebuild", action="store_true", help="table and figure from the runs; nothing is run")
    flags = parser.parse_args()
    if not flags.rebuild:
        args = options.parse([*SETTING.split(), f"--steps={flags.steps}", f"--data={flags.data}"])
        machine.settings(args.threads)
        corpus = open_corpus(args.data, args.vocab)
        objective = data.objective(args, corpus)
        made = stats.made("studies.bracket", sys.argv[1:])
        text = f"Text: {corpus.meta['source']}, fingerprint {corpus.fingerprint}; torch {torch.__version__}."
        flags.out.mkdir(parents=True, exist_ok=True)
        unfinished = flags.out / "runs.tmp"  # what was there before stays until all is done
        with unfinished.open("w") as lines:
            record = {"made": made, "text": text, "expansion": expansion(small_growth(), STEP_SIZES)}
            print(json.dumps(record), file=lines, flush=True)
            for seed in range(flags.seeds):
                for run in run_seed(args, objective, seed):
                    print(json.dumps(run), file=lines, flush=True)
                    losses = " ".join(f"{value:.3f}" for value in run["losses"])
                    print(f"  seed {seed}  {run['growth']:9} k {size(run):8.3f}  {losses}", flush=True)
        unfinished.rename(flags.out / "runs.jsonl")
    show(flags.out)


if __name__ == "__main__":
    guard("studies.bracket", main)
