"""What is each choice of RaPTr worth? Change one at a time, and compare it with the default.

    python -m studies.choices --data corpus/books --jobs 2       every choice, with three seeds
    python -m studies.choices --data corpus/books --choices gap,zero
    python -m studies.choices --rebuild                          table and figure from the logs in results/

The setting is the shortest of studies/length.py, with its learning rates: UL2 12 x 128, 1200 steps. The default is its
RaPTr: stages 6-8-10-12 of equal length, 1.333x. Runs are in results/choices-1200/, those of the default and of full
training in results/length-1200/; what they say together is in results/choices/. A choice that changes the FLOPs is also
compared with full training of as many layer FLOPs. The rule of the words in the table was in results/LOG.md before the
first run. Flags of train.py may follow.
"""

from pathlib import Path

import methods
from engine import options
from engine.errors import guard
from engine.log import subplots, write
from raptr import mean_layers
from studies import budget, compare, length, stats

STEPS, BUDGET = 1200, 4 / 3
CHOICES = {  # name: (what the paper leaves open or varies, what is different from the default)
    "gap": ("scaling", ["--scaling=gap"]),
    "uniform": ("scaling", ["--scaling=uniform"]),
    "inverse": ("scaling", ["--scaling=inverse"]),
    "bernoulli": ("k layers on average", ["--sampling=bernoulli"]),
    "unpinned": ("no layer always kept", ["--fixed=none"]),
    "zero": ("skipped gradient zero", ["--skipped_grad=zero"]),
    "3-6-9-12_alpha1": ("stages, same FLOPs", ["--stages=3-6-9-12", "--alpha=1"]),
    "opening": ("full model for 7.5% first", [f"--full_warmup={STEPS * 3 // 40}"]),
    "alpha1": ("budget 1.2 (alpha 1)", ["--alpha=1"]),
    "3-6-9-12": ("stages", ["--stages=3-6-9-12"]),
    "9-10-11-12": ("stages", ["--stages=9-10-11-12"]),
    "budget2": ("budget 2", None),  # None: the flags follow from the budget
}
DEFAULT = "raptr"
ROOT = Path("results")  # of all pages


def flags_of(choice, base):
    """Flags of train.py for a choice, or for the default. base: the parsed flags of full training."""
    if choice == "budget2":
        return budget.schedule(DEFAULT, base, 2)
    different = [] if choice == DEFAULT else CHOICES[choice][1]
    given = {flag.split("=")[0] for flag in different}
    return [f for f in budget.schedule(DEFAULT, base, BUDGET) if f.split("=")[0] not in given] + different


def equal_flops(args):
    """(name of the arm, steps) of full training with as many layer FLOPs as a run with these parsed flags."""
    steps = round(args.steps * mean_layers(methods.choose(args), args.steps) / args.layers)
    return ("full_flops" if steps == round(args.steps / BUDGET) else f"full_{steps}"), steps


def plan(choices, common, rates):
    """{arm: its flags}: the choices, and full training with the FLOPs of each."""
    base = options.parse([*common, "--method=full"])
    arms = {choice: [*flags_of(choice, base), f"--lr={rates['raptr']:g}"] for choice in choices}
    for choice in choices:
        name, steps = equal_flops(options.parse([*common, *arms[choice]]))
        if name != "full_flops":
            arms[name] = ["--method=full", f"--steps={steps}", f"--lr={rates['full']:g}"]
    return arms


# ----------------------------------------------------------------------------------------------------------------
# What the runs say


def word(values):
    """better, worse, level or undecided, of differences of losses, by rule 5 of results/LOG.md."""
    mean, half = stats.interval(values)
    if half is None:
        return "undecided"
    if mean + half < 0 or mean - half > 0:
        return "better" if mean < 0 else "worse"
    return "level" if abs(mean) + half < length.LEVEL else "undecided"


def measured(values):
    return f"{stats.signed(stats.interval(values))}, {word(values)}" if values else ""


def rows(runs):
    """[(choice, what it changes, its loss minus the default's by seed, its loss minus that of full training with as
    many layer FLOPs by seed, its runs)], the default first."""
    found = []
    for choice in [DEFAULT, *CHOICES]:
        its = [run for run in runs if run["arm"] == choice]
        if its:
            full, _ = equal_flops(options.complete(stats.event(its[0], "run")["flags"]))
            what = CHOICES[choice][0] if choice != DEFAULT else "the default"
            of_default = length.differences(runs, choice, DEFAULT) if choice != DEFAULT else []
            found.append((choice, what, of_default, length.differences(runs, choice, full), its))
    return found


def write_page(folder, runs):
    """table.md and choices.png of a folder."""
    of_choice = rows(runs)
    lines = ["# What each choice of RaPTr is worth", ""]
    lines += [
        f"Made again by `python -m studies.choices --rebuild`, from {folder}-{STEPS}/ and results/length-{STEPS}/."
    ]
    lines += [
        "Differences of held-out losses are paired by seed, mean ± 95% interval (Student's t); below 0 is better."
    ]
    cells = []
    for choice, what, of_default, of_full, its in of_choice:
        factor = f"{stats.event(its[0], 'run')['relative_flops_layers']:.3f}x"
        losses = stats.spread([stats.loss(run) for run in its])
        cells.append([choice, what, factor, losses, measured(of_default), measured(of_full)])
    head = ["choice", "changes", "layer FLOPs", "held-out loss", "minus the default", "minus full, same layer FLOPs"]
    write(folder / "table.md", "\n".join([*lines, "", *stats.table(head, cells)]) + "\n")
    draw(of_choice, folder / "choices.png")
    print((folder / "table.md").read_text())


def draw(of_choice, path):
    """A row for each choice: its difference to the default, and to full training of its own FLOPs."""
    figure, (left, right) = subplots(9, 0.36 * len(of_choice) + 1.1, 1, 2, sharey=True)
    for y, (_, _, of_default, of_full, _) in enumerate(of_choice):
        for axes, values in ((left, of_default), (right, of_full)):
            if values:
                mean, half = stats.interval(values)
                axes.errorbar(mean, y, xerr=half or 0, fmt="o", ms=5, capsize=2, color="tab:blue")
    for axes, title in ((left, "minus the default"), (right, "minus full training of as many layer FLOPs")):
        axes.axvline(0, color="black", lw=1)
        axes.set(title=title, xlabel="held-out loss (nats), 95% interval")
    left.set_yticks(range(len(of_choice)), [choice.replace("_", ", ") for choice, *_ in of_choice])
    left.invert_yaxis()
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------


def parser():
    parser = compare.study_parser("studies.choices", __doc__)
    add = parser.add_argument
    add("--choices", type=options.several(CHOICES), default=list(CHOICES), help=f"of {', '.join(CHOICES)} [all]")
    add("--length", default="length", help="--name of the studies.length that it adds to [length]")
    return parser


def main(argv=None):
    args, more, made = compare.parse_study(parser(), argv)
    of_length = budget.changed(args, name=args.length)
    if not args.rebuild:
        length.train(STEPS, ["full", "full_flops", DEFAULT], of_length, more, made)
        common, machine = compare.prepare(length.flags_at(STEPS, more), args.jobs)
        arms = plan(args.choices, common, length.choose_rates(of_length, more))
        name = f"{args.name}-{STEPS}"
        titled = {"title": f"{name}: RaPTr with other choices, 12 x 128, {STEPS} steps of 16 x 64", **made}
        compare.compare(name, arms, range(args.seeds), common, machine, titled)
    found = stats.read_all({name: ROOT / f"{name}-{STEPS}" for name in (args.length, args.name)})
    (ROOT / args.name).mkdir(exist_ok=True)
    write_page(ROOT / args.name, [run for runs in found.values() for run in runs])


if __name__ == "__main__":
    guard("studies.choices", main)
