"""The first hour with RaPTr: six cells, to be read beside what they print.

    python -m tools.tour                    a few minutes on two cores; figures in out/tour
    python -m tools.tour --steps 800        the same with four times as many steps

Cells 1 to 3 show what trains at a step. Cells 4 to 6 train a small UL2 by full training, by RaPTr and by stacking, with
the functions of train.py. One seed and one small model show the method; they do not measure it.
Not here: run folders and checkpoints (train.py), comparisons with several seeds (studies/compare.py).
"""

import functools
import sys
import textwrap
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import methods
import model as transformer
import train
from engine import log, machine, options, parallel
from engine.errors import UserError, guard
from raptr import Subnetwork, mean_layers, picture
from studies.figures import strip
from text.corpus import open_corpus

# The toy preset at half its width. UL2, because in few steps a BERT learns word frequencies and not much more.
SMALL = "--config configs/ul2_toy.toml --layers 12 --width 64 --mlp 160 --vocab 4096 --init_std 0.125 --lr 5e-3"
SMALL += " --lr_schedule linear --denoisers ul2 --eval_sequences 128"
COLORS = {"full": "black", "RaPTr": "tab:red", "stacking": "tab:blue"}
RANKS = parallel.Ranks("cpu")  # this process alone
AUTOCAST = machine.autocast("cpu", machine.choose("cpu")[1])
progress = functools.partial(tqdm, leave=False, disable=None, ncols=78)  # shown in a terminal only


def title(text):
    print(f"\n  {text}\n  {'─' * len(text)}\n")


def say(text):
    print(textwrap.fill(" ".join(text.split()), 78, initial_indent="  ", subsequent_indent="  ") + "\n")


def live(line):
    """Print a line above the progress bar, at once."""
    tqdm.write(line)
    sys.stdout.flush()


def bar(rise, most):
    """A bar of text: one █ for each 0.01 nats that a loss rises, and > where `most` are not enough."""
    return "█" * min(max(round(100 * rise), 0), most) + ">" * (100 * rise > most + 0.5)


# ----------------------------------------------------------------------------------------------------------------


def paths(args):
    title("1. What is a path?")
    say("""At each step RaPTr trains a random part of the layers, a path. It bypasses the others: their input is their
        output. The first and the last layer are on every path. Training runs in stages, and the paths grow until they
        hold all layers. Here a filled cell is a layer that trains; layer 0 is on the left.""")
    method = methods.choose(args)
    for number, stage in enumerate(method.plan):
        for step in range(stage.start, stage.start + 3):
            path = method.subnetwork(step)  # None: all layers
            about = f"stage {number}: {stage.length:g} layers" if step == stage.start else ""
            print(f"  {about:20}  step {step:4}  {picture(path.layers if path else range(args.layers), args.layers)}")
    mean = mean_layers(method, args.steps)
    print()
    say(f"""A path depends on the seed and the step alone, so a resumed run draws the same ones. All layers cost the
        same, so a run costs its mean number of layers, here {mean:.4g} of {args.layers}. Full training costs
        {args.layers / mean:.3f} times as many layer FLOPs.""")


def look(weight, optimizer):
    """A copy of a weight, and the norms of its two moments in AdamW."""
    moments = optimizer.state[weight]
    return weight.detach().clone(), moments["exp_avg"].norm(), moments["exp_avg_sq"].norm()


def by_hand(corpus):
    title("2. One step by hand")
    say("""A BERT of four layers takes a step with all of them, so that AdamW has moments for each. The next step trains
        the path 0, 2, 3 and skips layer 1:""")
    print("    loss = model(batch, Subnetwork((0, 2, 3))) / targets\n    loss.backward()\n    optimizer.step()\n")
    args = options.parse("--method full --layers 4 --width 32 --batch 8 --device cpu".split())
    objective = data.objective(args, corpus)
    config = transformer.Config.of(args, objective.model_vocab)
    batches = [objective.batch(args.seed, step, args.batch) for step in (1, 2)]
    print("                  gradient   weights move   1st moment   2nd moment")
    for skipped_grad in ("none", "zero"):
        model, optimizer = train.build(args, config, args.layers, RANKS)  # the same weights both times
        train.train_step(model, optimizer, batches[0], None, args, RANKS, AUTOCAST)
        targets = (batches[1][2] != data.NO_TARGET).sum()
        loss = model(train.to_device(batches[1], RANKS.device), Subnetwork((0, 2, 3))) / targets
        loss.backward()
        if skipped_grad == "zero":
            for p in model.blocks[1].parameters():
                p.grad = torch.zeros_like(p)
        watched = [block.mlp.up.weight for block in model.blocks]  # one matrix of each layer
        before = [look(weight, optimizer) for weight in watched]
        optimizer.step()
        for layer in range(args.layers) if skipped_grad == "none" else [1]:
            gradient = "None" if watched[layer].grad is None else f"{watched[layer].grad.norm():.4f}"
            (was, *moments_were), (now, *moments) = before[layer], look(watched[layer], optimizer)
            growth = "".join(f"      x {b / a:.3f}" for a, b in zip(moments_were, moments))
            cell = picture([0] * (layer != 1), 1)
            print(f"    layer {layer}  {cell}  {gradient:>8}        {(now - was).abs().mean():.5f}{growth}")
        print()
        if skipped_grad == "none":
            say("""The columns are of one matrix of each layer: the norm of its gradient, how far its weights move on
                average, and by what the size of its moments is multiplied. The gradient of the skipped layer is None,
                so AdamW passes it by: its weights and moments rest until a path holds it again. With a gradient of zero
                in place of None it moves:""")
    say("""AdamW lets the moments decay, and what is left of them moves the weights, although this step has learned
        nothing about the layer. That is another algorithm, --skipped_grad zero. The paper does not say which it uses;
        None is the default here.""")


def stages(raptr, stacking, out):
    title("3. Which layers train when")
    say("""Layers upwards, steps to the right. RaPTr has all layers from the start and trains some of them. Stacking,
        which the paper compares it with, begins with a shallow network and copies layers to make it deeper. Both end
        with all layers, and both cost three quarters of full training.""")
    figure, axes = log.subplots(8, 2.4, 1, 2, sharey=True)
    for panel, name, args in zip(axes, ("RaPTr", "stacking"), (raptr, stacking)):
        shading = {"cmap": "Greys", "vmin": 0, "vmax": 1.4, "interpolation": "nearest"}
        extent = (0, args.steps, -0.5, args.layers - 0.5)
        panel.imshow(strip(vars(args)), aspect="auto", origin="lower", extent=extent, **shading)
        panel.set(title=name, xlabel="step", yticks=[0, args.layers - 1])
    axes[0].set_ylabel("layer (filled: it trains)")
    figure.savefig(out / "stages.png", dpi=120)
    print(f"      {'RaPTr':36}stacking")
    rows = zip(*(strip(vars(args), columns=34) for args in (raptr, stacking)))
    for layer, both in reversed([*enumerate(rows)]):
        print(f"  {layer:2}  " + "  ".join("".join("█" if cell else "·" for cell in row) for row in both))
    print(f"\n  figure: {out / 'stages.png'}\n")


# ----------------------------------------------------------------------------------------------------------------


class Run:
    """A model in training. `step` does what train.loop does at a step, without log and checkpoints.

    curve: [(step, GFLOPs of the layers so far, held-out loss of all layers), ...]. changes: for each stage but the
    first, (layers before, layers now, loss before, loss now), of what trains before and after it begins.
    """

    def __init__(self, name, args, corpus):
        self.name, self.args, self.method = name, args, methods.choose(args)
        self.objective = data.objective(args, corpus)
        self.config = transformer.Config.of(args, self.objective.model_vocab)
        self.model, self.optimizer = train.build(args, self.config, self.method.depth(1), RANKS)
        self.held_out = self.objective.held_out(args.eval_sequences)
        self.gflops, self.changes, self.curve = 0.0, [], [(0, 0.0, self.loss())]

    def loss(self, *subnetworks):
        """Held-out loss, in nats, of subnetworks; by default of all layers."""
        return train.evaluate(self.model, self.held_out, subnetworks or [None], self.args.batch, AUTOCAST, RANKS)

    def loss_of_stage(self, step):
        """Held-out loss, in nats, of what trains at a step: some paths of that length, or all layers of a stack."""
        return self.loss(*self.method.examples().get(f"{self.method.expected_layers(step):g}", []))

    def step(self, step, batch):
        method, depth = self.method, self.method.depth(step)
        if step > 1 and method.stage(step) != method.stage(step - 1):
            before = self.loss_of_stage(step - 1)
            if depth != len(self.model.blocks):  # stacking: a deeper network, made of copies
                sources = method.sources(len(self.model.blocks), depth)
                grown = train.grow(self.model, self.optimizer, sources, self.args, self.config, RANKS)
                self.model, self.optimizer = grown
            lengths = [method.expected_layers(at) for at in (step - 1, step)]
            self.changes.append((*lengths, before, self.loss_of_stage(step)))
        for group in self.optimizer.param_groups:
            group["lr"] = train.learning_rate(self.args, step)
        subnetwork = method.subnetwork(step)
        train.train_step(self.model, self.optimizer, batch, subnetwork, self.args, RANKS, AUTOCAST)
        layers = subnetwork.cost() if subnetwork else depth
        self.gflops += transformer.flops(self.config, self.args.batch, 0, layers) / 1e9  # 0 targets: no head


def train_together(runs):
    """Train runs on the same batches, a step of each in turn. Print a line of their curves at each evaluation."""
    args, objective, unigram = runs[0].args, runs[0].objective, runs[0].objective.unigram_loss(runs[0].held_out[2])
    low, high, width = unigram - 1, unigram + 0.6, 72 - 17 * len(runs)
    place = lambda loss: min(max(round((width - 1) * (loss - low) / (high - low)), 0), width - 1)  # noqa: E731

    def line(step):
        """The numbers, and a letter for each run where its loss is."""
        cells, numbers = [" "] * width, ""
        cells[place(unigram)] = ":"
        for run in runs:
            _, gflops, loss = run.curve[-1]
            cells[place(loss)] = run.name[0].upper() if cells[place(loss)] in " :" else "*"
            numbers += f"{loss:10.3f}{gflops:7.0f}"
        return f"  {step:4}{numbers}  {''.join(cells)}".rstrip()

    print("  step" + "".join(f"{run.name:>10}  GFLOP" for run in runs) + f"  {low:<{width - 3}.1f}{high:.1f}")
    print(line(0))
    for step in progress(range(1, args.steps + 1), desc="  training", unit=" steps"):
        batch = objective.batch(args.seed, step, args.batch)
        for run in runs:
            run.step(step, batch)
        if step == args.steps or step % max(4, args.steps // 20) == 0:
            for run in runs:
                run.curve.append((step, run.gflops, run.loss()))
            live(line(step))
    print()


def draw_curves(axes, runs, column, label):
    """Held-out loss against the steps (column 0) or the GFLOPs (1). Leaves out the steep start."""
    for run in runs:
        xs, losses = zip(*[(point[column], point[2]) for point in run.curve[len(run.curve) // 5 :]])
        axes.plot(xs, losses, color=COLORS[run.name], marker="o", ms=3, label=run.name)
    axes.set(xlabel=label, ylabel="held-out loss (nats), all layers")
    axes.legend(frameon=False)


def side_by_side(full, raptr, out):
    title("4. Full training and RaPTr, side by side")
    args, config = full.args, full.config
    say(f"""Two models begin with the same {transformer.parameters(config):,} weights and see the same batches. F and R
        mark the held-out loss of each with all layers; * is both, further left is better. The colon is what predicting
        by word frequency gets. GFLOP is what the layers cost so far. Expect RaPTr to be behind after {args.steps}
        steps: its short paths leave half of the layers untrained at a step, and it has little time to catch up.""")
    train_together([full, raptr])
    figure, axes = log.subplots(9, 3.6, 1, 2, sharey=True)
    draw_curves(axes[0], [full, raptr], 0, "step")
    draw_curves(axes[1], [full, raptr], 1, "GFLOPs of the layers")
    figure.savefig(out / "curves.png", dpi=120)
    gap, saved = raptr.curve[-1][2] - full.curve[-1][2], 1 - raptr.gflops / full.gflops
    step, _, loss = [point for point in full.curve if point[1] <= 1.001 * raptr.gflops][-1]
    targets = full.objective.targets_per_row()
    head = transformer.flops(config, args.batch, targets, 0) / transformer.flops(config, args.batch, targets)
    say(f"""RaPTr ends {abs(gap):.3f} nats {"behind" if gap > 0 else "ahead"}, and its layers cost {saved:.0%} less.
        Full training had spent about as much by step {step} and stood at {loss:.3f}, with its learning rate still
        decaying. The head runs at every step. It takes {head:.0%} of the FLOPs of this small model, so of all FLOPs
        RaPTr saves {saved * (1 - head):.0%}.""")
    print(f"  figure: {out / 'curves.png'}\n")


def leave_one_out(runs):
    title("5. Leaving out a single layer")
    say("""How much does the held-out loss of the two trained models rise when one layer is bypassed? RaPTr's layers
        have trained without each other, so one may expect it to miss each of them less. The first and the last were on
        every path: it never learned to do without them. A bar cell is 0.01 nats; > is more than fits.""")
    print(f"  layer  {'full':30}  RaPTr")
    L, bases, rises = runs[0].args.layers, [run.loss() for run in runs], []
    for left_out in progress(range(L - 1, -1, -1), desc="  leaving out", unit=" layers"):
        path = Subnetwork(tuple(layer for layer in range(L) if layer != left_out))
        rises.append([run.loss(path) - base for run, base in zip(runs, bases)])
        cells = "".join(f"  {rise:+.3f} {bar(rise, 22):23}" for rise in rises[-1])
        live(f"  {left_out:5}{cells}".rstrip())
    full, raptr = (sum(column[1:-1]) / len(column[1:-1]) for column in zip(*rises))
    print()
    say(f"""Leaving out a layer between the first and the last costs full training {full:.3f} nats on average, RaPTr
        {raptr:.3f}. The smaller the number, the less it matters which of them a path holds. That is why the paper
        expects the loss to stay smooth where paths grow, which the next cell looks at.""")


def growth(full, raptr, stacking, out):
    title("6. Where stacking differs")
    say("""Stacking trains 6 layers, puts a copy of the upper 3 on top, trains 9, and does that once more. It sees the
        same batches, and its 6 layers begin with the weights that they have in the other two models.""")
    train_together([stacking])
    say("""What does the loss do when a stage begins, before any step is taken in it? Of RaPTr: paths of the old and of
        the new length. Of stacking: the network before and after it grows. A copied layer adds its update a second
        time, so the grown network computes what was never trained: expect a jump. RaPTr copies nothing, and its longer
        paths are made of layers that have met in many combinations. A bar cell is 0.01 nats.""")
    print("              layers     before      now    change")
    changes = [(run.name, *change) for run in (raptr, stacking) for change in run.changes]
    for name, a, b, before, now in changes:
        change = f"{before:9.3f}{now:9.3f}    {now - before:+.3f}  {bar(now - before, 26)}"
        print(f"  {name:10} {a:2g} to {b:2g}  {change}".rstrip())
    print("\n              held-out loss   GFLOP of layers")
    for run in (full, raptr, stacking):
        print(f"  {run.name:10} {run.curve[-1][2]:14.3f}   {run.gflops:15.0f}")
    print()
    say("""A jump is soon made up for. In the comparisons so far (results/README.md), which are small and short,
        stacking is ahead of RaPTr on BERTs, on a deep UL2 and in the longest runs of another, and undecided elsewhere.
        The paper reports RaPTr at least level, in large and long ones.""")
    figure, axes = log.subplots(9, 3.6, 1, 2)
    draw_curves(axes[0], [full, raptr, stacking], 0, "step")
    names = [f"{name} {a:g} to {b:g}" for name, a, b, *_ in changes]
    axes[1].barh(names, [now - before for *_, before, now in changes], color=[COLORS[change[0]] for change in changes])
    axes[1].axvline(0, color="0.5", lw=0.8)
    axes[1].invert_yaxis()
    axes[1].set(xlabel="change of the loss where a stage begins (nats)")
    figure.savefig(out / "growth.png", dpi=120)
    print(f"  figure: {out / 'growth.png'}\n")


def main():
    enough = options.number(int, "a whole number, 20 or above", lambda x: x >= 20)
    parser = options.command("tools.tour", __doc__)
    parser.add_argument("--steps", type=enough, default=200, help="steps of each of the three runs [200]")
    parser.add_argument("--out", type=Path, default=Path("out/tour"), help="folder of the figures [out/tour]")
    parser.add_argument("--data", default="", help="text or prepared corpus [the docstrings of Python and torch]")
    flags, began = parser.parse_args(), time.monotonic()
    small = [*SMALL.split(), "--device=cpu", f"--steps={flags.steps}"]
    full, raptr, stacking = (options.parse([*small, f"--method={name}"]) for name in ("full", "raptr", "stacking"))
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {flags.out}: {error.strerror}") from None
    machine.settings(threads=1)  # a model this small gains little from more
    corpus = open_corpus(flags.data)

    paths(raptr)
    by_hand(corpus)
    stages(raptr, stacking, flags.out)
    runs = [Run("full", full, corpus), Run("RaPTr", raptr, corpus)]
    side_by_side(*runs, flags.out)
    leave_one_out(runs)
    growth(*runs, Run("stacking", stacking, corpus), flags.out)
    title("Where to go from here")
    say(f"""That took {log.span(time.monotonic() - began)}. Read raptr.py next, then the loop in train.py; METHOD.md has
        the method on one page. `python train.py` trains a BERT of six layers, with a run folder. `python -m
        studies.compare --help` compares methods over several seeds, which a single run cannot. What came out so far is
        in results/README.md.""")


if __name__ == "__main__":
    guard("tools.tour", main)
