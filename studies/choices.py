"""What is each choice of RaPTr worth? Each is compared with the default.

    python -m studies.choices --data corpus/books --jobs 2 --compile                      every choice, three seeds
    python -m studies.choices --data corpus/books --jobs 2 --compile --choices gap,zero   these, beside what is there
    python -m studies.choices --rebuild                                                   table and figure from the logs

The setting is the shortest of studies/length.py, with its learning rates: UL2 12 x 128, 1200 steps. The default is its
RaPTr, with stages 6-8-10-12 of equal duration, which takes 3/4 of the layer FLOPs. Every choice is also compared with
full training of as many layer FLOPs as its own, on fewer steps.

    gap, uniform, inverse   scaling of the kept layers
    bernoulli               k layers on average, not exactly
    unpinned                no layer is always kept
    zero                    the gradient of a skipped layer is zero, not none
    3-6-9-12_alpha1         other stages, which take as many FLOPs
    opening                 the full model trains for the first 7.5% of the steps; more FLOPs
    alpha1                  stage s lasts a share proportional to s, the budget 1.2; more FLOPs
    9-10-11-12, 3-6-9-12    other stages; more FLOPs, fewer
    budget2                 half the FLOPs of full training

Runs are in results/choices-1200/, those of the default and of full training in results/length-1200/ (NAME-1200/ and
NAME-length-1200/ with --name). What they say together is in results/choices/. The rule of the words in the table was in
results/LOG.md before the first run. Flags of train.py may follow.
"""

import json
import math

import methods
from engine import options
from engine.errors import guard
from raptr import mean_layers
from studies import budget, compare, figures, length, stats

STEPS = 1200
CHOICES = {  # {name: what differs from the default}; None: it follows from the budget
    "gap": ["--scaling=gap"],
    "uniform": ["--scaling=uniform"],
    "inverse": ["--scaling=inverse"],
    "bernoulli": ["--sampling=bernoulli"],
    "unpinned": ["--fixed=none"],
    "zero": ["--skipped_grad=zero"],
    "3-6-9-12_alpha1": ["--stages=3-6-9-12", "--alpha=1"],
    "opening": [f"--full_warmup={STEPS * 3 // 40}"],
    "alpha1": ["--alpha=1"],
    "9-10-11-12": ["--stages=9-10-11-12"],
    "3-6-9-12": ["--stages=3-6-9-12"],
    "budget2": None,
}
DEFAULT = "raptr"


def flags_of(choice, base):
    """Flags of train.py for a choice. base: the parsed flags of full training."""
    if CHOICES[choice] is None:
        return budget.schedule(DEFAULT, base, 2)
    given = {flag.split("=")[0] for flag in CHOICES[choice]}
    default = budget.schedule(DEFAULT, base, length.BUDGET)
    return [flag for flag in default if flag.split("=")[0] not in given] + CHOICES[choice]


def equal_flops(args):
    """(name of the arm, steps) of full training with as many layer FLOPs as a run with these parsed flags."""
    steps = round(args.steps * mean_layers(methods.choose(args), args.steps) / args.layers)
    return ("full_flops" if steps == round(args.steps / length.BUDGET) else f"full_{steps}"), steps


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


def costs_the_same(run):
    """Whether a run takes as many layer FLOPs as the default."""
    return math.isclose(stats.event(run, "run")["relative_flops_layers"], length.BUDGET, rel_tol=1e-3)


def rows(runs):
    """[(choice, its runs, its loss minus the default's by seed, its loss minus that of full training with as many layer
    FLOPs by seed)], the default first, then the choices that take as many FLOPs."""
    found = []
    for choice in [DEFAULT, *CHOICES]:
        its = [run for run in runs if run["arm"] == choice]
        if its:
            full, _ = equal_flops(options.complete(stats.event(its[0], "run")["flags"]))
            of_default = stats.differences(runs, choice, DEFAULT) if choice != DEFAULT else {}
            found.append((choice, its, of_default, stats.differences(runs, choice, full)))
    return sorted(found, key=lambda row: not costs_the_same(row[1][0]))


def write_page(name, runs, made):
    """results/NAME/table.md and choices.png. made: of the choices, and of what they are compared with."""
    stats.must_share_text(runs, f"{name}-{STEPS}")
    first = stats.event(runs[0], "run")["flags"]
    of_choice, cells = rows(runs), {True: [], False: []}
    for choice, its, of_default, of_full in of_choice:
        flags = stats.event(its[0], "run")["flags"]
        different = [flag[2:].split("=")[0] for flag in CHOICES.get(choice, ()) or ("--stages", "--alpha")]
        share = 1 / stats.event(its[0], "run")["relative_flops_layers"]
        losses = f"{stats.spread([stats.loss(run) for run in its])} ({len(its)})"
        compared = [stats.measured(values, stats.word) for values in (of_default, of_full)]
        text = {flag: f"{value:g}" if isinstance(value, float) else value for flag, value in flags.items()}
        changed = budget.as_text([f"--{flag}={text[flag]}" for flag in different])
        cells[costs_the_same(its[0])].append([choice, changed, f"{share:.3f}", losses, *compared])
    size = compare.size(options.complete(first))
    head = ["choice", "flags", "layer FLOPs", "held-out loss", "minus the default", "minus full of its own FLOPs"]
    lines = ["# What each choice of RaPTr is worth", "", stats.rebuilt("studies.choices", name), ""]
    lines += [line for each in made for line in stats.made_by(each)]
    lines += [f"UL2 {size}; one learning rate, {first['lr']:g}, chosen for the default. Layer FLOPs:"]
    lines += [f"as a share of full training's. Loss: mean ± std (seeds). {stats.PAIRED}"]
    lines += [f"Level: the interval lies within {stats.LEVEL}. Of so many choices some may stand out by chance."]
    lines += ["", "## As many FLOPs as the default", "", *stats.table(head, cells[True])]
    if cells[False]:
        lines += ["", "## More FLOPs, or fewer: read the last column", "", *stats.table(head, cells[False])]
    stats.save_page(stats.RESULTS / name / "table.md", lines)
    drawn = [(choice.replace("_", "\n"), *both) for choice, _, *both in of_choice]
    titles = ["minus the default", "minus full training of its own FLOPs"]
    figures.differences(drawn, titles, stats.RESULTS / name / "choices.png")


# ----------------------------------------------------------------------------------------------------------------


def parser():
    parser = compare.study_parser("studies.choices", __doc__)
    add = parser.add_argument
    add("--choices", type=options.several(CHOICES), default=list(CHOICES), help="some of the above, with commas [all]")
    return parser


def main(argv=None):
    args, more, made = compare.parse_study(parser(), argv, length.OWN)
    name, other = f"{args.name}-{STEPS}", "length" if args.name == "choices" else f"{args.name}-length"
    if not args.rebuild:
        of_length = budget.changed(args, name=other)
        common, machine = compare.prepare(length.flags_at(STEPS, more), args.jobs)
        plan(args.choices, common, {"raptr": 1, "full": 1})  # what cannot be is found before anything runs
        length.train(STEPS, ["full", "full_flops", DEFAULT], of_length, more, made)
        arms = plan(args.choices, common, length.choose_rates(of_length, more))
        compare.compare(name, arms, range(args.seeds), common, machine, made, "choices of RaPTr")
    folders = [stats.RESULTS / name, stats.RESULTS / f"{other}-{STEPS}"]
    runs = [run for folder in folders for run in stats.read_runs(folder)]
    write_page(args.name, runs, [json.loads((folder / "table.json").read_text())["made"] for folder in folders])


if __name__ == "__main__":
    guard("studies.choices", main)
