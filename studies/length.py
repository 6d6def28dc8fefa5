"""Does it pay, and does that change with the length of training? One comparison at several lengths, and one figure.

    python -m studies.length --data corpus/books --jobs 2                 learning rates, then every length
    python -m studies.length --data corpus/books --lengths 1200,3600      only these
    python -m studies.length --rebuild                                    table and figure from the logs in results/

A UL2 decoder of 12 x 128, one pass over a text, at 1.333x. full, raptr and stacking each try two learning rates at 3600
steps, on a seed and on held-out text that are not reported; every other arm uses the rate of the one it resembles. Each
length is one comparison of studies/compare.py, in results/length-STEPS/. What they say together is in results/length/.
The rules of its verdicts were in results/LOG.md before the first run. Flags of train.py may follow.
"""

import json
from pathlib import Path

from data import UL2
from engine import options
from engine.errors import UserError, guard
from engine.log import subplots, write
from studies import budget, compare, stats

KINDS = {  # whose learning rate an arm takes
    "full": ("full", "full_flops", "fusion"),
    "raptr": ("raptr", "constant", "pld"),
    "stacking": ("stacking", "midas"),
}
CENTRAL = ["full", "full_flops", "raptr", "constant", "stacking"]  # at every length
LENGTHS = {1200: [*CENTRAL, "pld", "midas", "fusion"], 3600: [*CENTRAL, "pld", "midas", "fusion"], 7200: CENTRAL}
BUDGET, RATES, TRIED_AT = 4 / 3, (2e-3, 4e-3), 3600
SETTING = ["--config=configs/ul2_toy.toml", "--layers=12", "--width=128", "--mlp=320", "--init_std=0.088"]
SETTING += ["--vocab=4096", f"--denoisers={UL2}", "--lr_schedule=wsd", "--save_every=0", "--eval_sequences=1024"]
OWN = ("--lr", "--steps")  # flags that it sets itself


def flags_at(steps, more):
    return [*SETTING, f"--steps={steps}", f"--eval_every={steps // 4}", *more]


def planned(arms, common):
    return budget.plan(arms, options.parse([*common, "--method=full"]), BUDGET)


def choose_rates(args, more):
    """{kind: its learning rate}, from results/NAME/rates.json or tried now."""
    file = stats.RESULTS / args.name / "rates.json"
    if not file.exists():
        common, machine = compare.prepare(flags_at(TRIED_AT, more), args.jobs)
        flags, out = planned(list(KINDS), common), Path(f"out/compare/{args.name}-rates")
        _, trials = compare.tune(flags, RATES, [compare.TUNING_SEED], common, out, *machine)
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(trials, indent=1))
    trials = json.loads(file.read_text())
    ended = {kind: {r: x for r, x in losses.items() if x != "did not end"} for kind, losses in trials.items()}
    for kind, losses in ended.items():
        if not losses:
            raise UserError(f"{kind} diverges with every learning rate: {', '.join(trials[kind])}")
    return {kind: float(min(losses, key=losses.get)) for kind, losses in ended.items()}


def train(steps, arms, args, more, made, rates=None):
    """Compare arms at one length, in results/NAME-STEPS/. Skips what is there. made: command and commit. rates: {kind:
    its learning rate}, by default the one that `choose_rates` finds; a kind without one has that of `more`."""
    rates = choose_rates(args, more) if rates is None else rates
    own = {arm: [f"--lr={rate:g}"] for kind, rate in rates.items() for arm in KINDS[kind]}
    common, machine = compare.prepare(flags_at(steps, more), args.jobs)
    flags = {arm: its + own.get(arm, []) for arm, its in planned(arms, common).items()}
    compare.compare(f"{args.name}-{steps}", flags, range(args.seeds), common, machine, made)


# ----------------------------------------------------------------------------------------------------------------
# What the lengths say together


def change(lengths, arm, other):
    """How much the difference of two arms changes from the shortest length to the longest that both have, {seed:
    nats}. None if there is only one."""
    of_length = [d for steps in sorted(lengths) if (d := stats.differences(lengths[steps], arm, other))]
    return stats.minus(of_length[-1], of_length[0]) if len(of_length) > 1 else None


def verdicts(lengths):
    """[(question, what was measured, verdict)], by the rules of results/LOG.md, which mean all of LENGTHS."""
    longest = max(lengths)
    gap, lead = change(lengths, "raptr", "full"), change(lengths, "raptr", "stacking")
    constant = stats.differences(lengths[longest], "raptr", "constant")
    falls, stays = lambda low, high: high < 0, lambda low, high: low > 0 or stats.level(low, high)
    rows = [
        ("RaPTr's gap to full training closes with length", gap, stats.verdict(gap, falls, stays)),
        ("stacking's lead over RaPTr goes with length", lead, stats.verdict(lead, falls, stays)),
        ("RaPTr is at least level with constant-p", constant,
         stats.verdict(constant, lambda low, high: high < stats.LEVEL, lambda low, high: low > 0)),
    ]  # fmt: skip
    missing = "" if longest == max(LENGTHS) else f", up to {longest} steps"
    return [(question + missing, values, word) for question, values, word in rows]


def write_page(name, lengths):
    """results/NAME/table.md and length.png, from {steps: runs}."""
    flags = {steps: stats.event(runs[0], "run")["flags"] for steps, runs in lengths.items()}
    tokens = {steps: steps * its["batch"] * its["seq"] / 1e6 for steps, its in flags.items()}
    arms = list(dict.fromkeys(run["arm"] for runs in lengths.values() for run in runs if run["arm"] != "full"))
    of_full = {n: [stats.loss(run) for run in runs if run["arm"] == "full"] for n, runs in lengths.items()}
    rows = [["full, held-out loss", *(f"{stats.spread(losses)} ({len(losses)})" for losses in of_full.values())]]
    points = {}
    for arm in arms:
        behind = {n: stats.differences(runs, arm, "full") for n, runs in lengths.items()}
        points[arm] = {n: stats.interval(values) for n, values in behind.items() if values}
        cells = [f"{stats.measured(values)} ({len(values)})" if values else "" for values in behind.values()]
        rows.append([f"{arm} minus full", *cells])
    head = ["", *(f"{tokens[n]:.1f}M tokens" for n in lengths)]
    lines = ["# Length", "", stats.rebuilt("studies.length", name), f"{stats.PAIRED} In brackets: seeds.", ""]
    answers = [[question, stats.measured(values), word] for question, values, word in verdicts(lengths)]
    lines += [*stats.table(head, rows), "", *stats.table(["question", "measured", "verdict"], answers)]
    stats.save_page(stats.RESULTS / name / "table.md", lines)
    draw(tokens, points, stats.RESULTS / name / "length.png")


def draw(tokens, points, path):
    """Difference to full training against tokens, with bands: a panel for each arm, and RaPTr in all of them."""
    others = [arm for arm in points if arm != "raptr"] or ["raptr"]
    rows = -(-len(others) // 3)
    figure, grid = subplots(9, 2.6 * rows + 0.6, rows, 3, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(others) :]:
        axes.set_visible(False)
    for axes, other in zip(grid.flat, others):
        axes.axhline(0, color="black", lw=1)
        for arm, color in ((other, "tab:blue"), ("raptr", "tab:red")):
            of_arm = points.get(arm, {})
            x, means = [tokens[n] for n in of_arm], [mean for mean, _ in of_arm.values()]
            low, high = ([m + sign * (half or 0) for m, half in of_arm.values()] for sign in (-1, 1))
            axes.plot(x, means, "o-", ms=4, color=color)
            axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
        axes.set(xscale="log", title=f"{other}, and raptr in red" if other == others[0] else other)
        axes.set_xticks(list(tokens.values()), [f"{value:.1f}" for value in tokens.values()])
        axes.minorticks_off()
    figure.supxlabel("million tokens", fontsize=10)
    figure.supylabel("held-out loss minus full training's (nats)", fontsize=10)
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------


def parser():
    parser = compare.study_parser("studies.length", __doc__)
    known = ", ".join(map(str, LENGTHS))
    whole = lambda text: [options.count(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--lengths", type=whole, default=list(LENGTHS), help=f"steps of 1024 tokens, of {known} [all]")
    parser.add_argument("--methods", type=options.several(LENGTHS[1200]), help="only these arms [all]")
    return parser


def main(argv=None):
    args, more, made = compare.parse_study(parser(), argv, OWN)
    if unknown := set(args.lengths) - set(LENGTHS):
        raise UserError(f"--lengths {min(unknown)}: must be one of {', '.join(map(str, LENGTHS))}")
    if not args.rebuild:
        for steps in args.lengths:
            arms = [arm for arm in LENGTHS[steps] if arm in (args.methods or LENGTHS[steps])]
            if arms:
                train(steps, arms, args, more, made)
    write_page(args.name, stats.read_all({steps: stats.RESULTS / f"{args.name}-{steps}" for steps in LENGTHS}))


if __name__ == "__main__":
    guard("studies.length", main)
