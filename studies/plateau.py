"""Does the plateau of word frequencies explain stacking's lead over full training on a small BERT?

    python -m studies.plateau --jobs 2                                            on the manual of Python and torch
    python -m studies.plateau --data corpus/books --data_small corpus/books-1024  on your text, prepared twice
    python -m studies.plateau --data corpus/books --ways as_is,past               only these ways
    python -m studies.plateau --rebuild                                           table and figure from the logs

A small BERT first learns word frequencies, and stays there for a while. Shallow networks may leave it sooner. The
setting is that of results/short (12 x 128, 1200 steps, at 1.333x), with one learning rate, 2e-3, for all arms. It is
compared in three ways:

    as_is          as it is
    past           every arm begins past the plateau
    short_plateau  with a vocabulary of 1024, which shortens the plateau

In `past` each arm first trains its own first stage, at a constant learning rate after the warm-up, until its loss on
unreported held-out text is 0.3 nats below predicting by frequency (checked every 25 steps). The arm then starts from
these weights, with a fresh optimizer, other batches and its whole schedule. What came before does not count, and is in
the table. Each way is one comparison of studies/compare.py, in results/plateau-WAY/. What they say together is in
results/plateau/. The rule of the verdict was in results/LOG.md before the first run. Flags of train.py may follow.
"""

import functools
import json
import statistics

import methods
from engine import options
from engine.errors import UserError, guard
from engine.log import read_log, subplots
from studies import budget, compare, figures, stats
from text.corpus import open_corpus

WAYS = ["as_is", "past", "short_plateau"]
ARMS = ["full", "full_flops", "raptr", "constant", "stacking"]
SETTING = ["--config=configs/bert_toy.toml", "--layers=12", "--width=128", "--init_std=0.088", "--vocab=4096"]
SETTING += ["--lr=2e-3", "--lr_schedule=wsd", "--steps=1200", "--eval_every=100", "--save_every=0"]
SETTING += ["--eval_sequences=512"]
SMALL_VOCAB = 1024
# The run before an arm: constant learning rate (a decay in the last step only), looked at often on fewer sequences.
BEFORE = ["--warmup=72", "--lr_schedule=wsd", "--decay=1e-9", "--eval_on=tuning", "--eval_every=25"]
LIMIT = 1200  # steps in which an arm must leave the plateau
BEFORE_SEED = 500  # added to the seed of the run before: other weights and batches than those of any arm


def before(flags, margin):
    """Flags of the run before an arm: its own, with a plan stretched so that its first stage lasts LIMIT steps."""
    args = options.parse(flags)
    stages = methods.choose(args).stage(args.steps) + 1
    its = {"steps": stages * LIMIT, "stop_below": margin, "seed": args.seed + BEFORE_SEED}
    its["eval_sequences"] = -(-args.eval_sequences // 2)
    return [*flags, *BEFORE, *(f"--{name}={value}" for name, value in its.items())]


def train_first(folder, flags, run, margin):
    """Train an arm past the plateau. Returns the flags that begin from there. Raises UserError if it does not get there
    within its first stage."""
    flags, first = [flag for flag in flags if flag != budget.FIRST], compare.first_of(folder)
    run(first, before(flags, margin))
    begun, *_, end = read_log(first)
    if end["step"] > LIMIT or end["loss"] > begun["unigram_loss"] - margin:
        raise UserError(f"{first}: did not get {margin:g} nats below predicting by frequency in {LIMIT} steps")
    return [*flags, f"--init={first}"]


def corpora(args):
    """{way: flags that name its text}. Raises UserError if the second text does not have the smaller vocabulary."""
    small = args.data_small or args.data
    if "short_plateau" in args.ways and (vocab := open_corpus(small, SMALL_VOCAB).vocab) > SMALL_VOCAB:
        rule = f"short_plateau needs the text prepared with --vocab {SMALL_VOCAB}, as --data_small"
        raise UserError(f"{small}: has a vocabulary of {vocab}; {rule}")
    large = [f"--data={args.data}"]
    return {"as_is": large, "past": large, "short_plateau": [f"--data={small}", f"--vocab={SMALL_VOCAB}"]}


# ----------------------------------------------------------------------------------------------------------------
# What the ways say together


def lead(runs):
    """{seed: loss of full training minus loss of stacking}."""
    return stats.differences(runs, "full", "stacking")


def verdict(as_is, past):
    """yes, no or undecided, by rule 1 of results/LOG.md, from the lead {seed: nats} as it is and past the plateau. "at
    least half" compares the means. not run: without a seed in both."""
    shared = stats.minus(as_is, past)
    if not shared:
        return "not run"
    if len(shared) < 2:
        return "undecided"
    (mean, half), (mean_past, half_past) = stats.interval(as_is), stats.interval(past)
    shrinks, half_shrinks = stats.interval(shared)
    remains = mean_past - half_past > 0
    if mean - half > 0 and shrinks - half_shrinks > 0 and not remains:
        return "yes"
    return "no" if remains and mean_past >= mean / 2 else "undecided"


def answer(ways):
    """A row of the table: the question, by how much the lead shrinks past the plateau, and the verdict."""
    as_is, past = (lead(ways.get(way, [])) for way in ("as_is", "past"))
    shrinks = stats.measured(stats.minus(as_is, past))
    return ["the plateau of word frequencies explains stacking's lead", shrinks, verdict(as_is, past)]


def first_rows(runs):
    """A row for each arm: what it took to get past the plateau."""
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        its = [run for run in runs if run["arm"] == arm]
        ends = [stats.event(run["first"], "done") for run in its]
        shares = [end["flops"] / stats.event(run, "done")["flops"] for end, run in zip(ends, its)]
        steps = ", ".join(str(end["step"]) for end in ends)
        below = [stats.event(run["first"], "run")["unigram_loss"] - end["loss"] for end, run in zip(ends, its)]
        flops = f"{statistics.mean(end['flops'] for end in ends):.2e}"
        rows.append([arm, steps, flops, f"{statistics.mean(shares):.2f}", f"{statistics.mean(below):.2f}"])
    return rows


def write_page(name, ways):
    """results/NAME/table.md and plateau.png, from {way: runs}."""
    arms = [arm for arm in ARMS if any(run["arm"] == arm for runs in ways.values() for run in runs)]
    of_full = [[stats.loss(run) for run in runs if run["arm"] == "full"] for runs in ways.values()]
    unigram = [f"{stats.event(runs[0], 'run')['unigram_loss']:.3f}" for runs in ways.values()]
    rows = [["predicting by frequency", *unigram]]
    rows.append(["full, held-out loss", *(stats.spread(losses) if losses else "" for losses in of_full)])
    for arm in arms:
        if arm != "full":
            behind = [stats.differences(runs, arm, "full") for runs in ways.values()]
            rows.append([f"{arm} minus full", *map(stats.measured, behind)])
    rows.append(["lead of stacking (full minus stacking)", *(stats.measured(lead(runs)) for runs in ways.values())])
    lines = ["# Plateau", "", stats.rebuilt("studies.plateau", name), stats.PAIRED, ""]
    for way in ways:
        made = json.loads((stats.RESULTS / f"{name}-{way}" / "table.json").read_text())["made"]
        lines += [f"- {way}: {line}" for line in stats.made_by(made) if line]
    lines += ["", *stats.table(["", *ways], rows), ""]
    lines += [*stats.table(["question", "the lead shrinks by", "verdict"], [answer(ways)]), ""]
    if "past" in ways:
        margin = stats.event(ways["past"][0]["first"], "run")["flags"]["stop_below"]
        lines += [f"## Getting {margin:g} nats below predicting by frequency", ""]
        lines += ["Not counted above. Steps of each seed; FLOPs, mean of the seeds, also as a share of the arm's own."]
        head = ["arm", "steps", "FLOPs", "share of the arm's own", "nats below"]
        lines += ["", *stats.table(head, first_rows(ways["past"]))]
    stats.save_page(stats.RESULTS / name / "table.md", lines)
    draw(ways, arms, stats.RESULTS / name / "plateau.png")


def draw(ways, arms, path):
    """Held-out loss against steps: a panel for each way, a mean and its band for each arm."""
    figure, grid = subplots(4.2 * len(ways) + 0.8, 4.2, 1, len(ways), squeeze=False)
    for axes, (way, runs) in zip(grid[0], ways.items()):
        for number, arm in enumerate(arms):
            evals = [[e for e in run["events"] if e["event"] == "eval"] for run in runs if run["arm"] == arm]
            if evals:
                steps, losses = ([[e[key] for e in its] for its in evals] for key in ("step", "loss"))
                style = {"color": f"C{number}", "lw": 2 if arm in ("full", "stacking") else 1.2, "label": arm}
                figures.band(axes, steps[0], list(zip(*losses)), alpha=0.12, **style)
        unigram = stats.event(runs[0], "run")["unigram_loss"]
        axes.axhline(unigram, color="0.5", ls=":", lw=1)
        axes.annotate("predicting by frequency", (1, unigram), xycoords=("axes fraction", "data"), ha="right",
                      va="bottom", color="0.4", fontsize=8)  # fmt: skip
        axes.set(xlabel="step", title=way.replace("_", " "))
    grid[0][0].set_ylabel("held-out loss (nats), mean ± std over seeds")
    grid[0][-1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------


def parser():
    parser = compare.study_parser("studies.plateau", __doc__)
    parser.add_argument("--data", default="", help="text or prepared corpus, vocabulary 4096 [docstrings]")
    parser.add_argument("--data_small", default="", help=f"the same text, vocabulary {SMALL_VOCAB} [--data]")
    parser.add_argument("--ways", type=options.several(WAYS), default=WAYS, help=f"of {', '.join(WAYS)}")
    parser.add_argument("--methods", type=options.several(ARMS), default=ARMS, help=f"of {', '.join(ARMS)}")
    parser.add_argument("--margin", type=options.positive, default=0.3, help="nats past the plateau [0.3]")
    return parser


def main(argv=None):
    args, more, made = compare.parse_study(parser(), argv)
    if not args.rebuild:
        text = corpora(args)
        for way in args.ways:
            common, machine = compare.prepare([*SETTING, *text[way], *more], args.jobs)
            flags = budget.plan(args.methods, options.parse([*common, "--method=full"]), 4 / 3)
            if way == "past":
                flags = {arm: [*its, budget.FIRST] for arm, its in flags.items()}
            past = functools.partial(train_first, margin=args.margin)
            compare.compare(f"{args.name}-{way}", flags, range(args.seeds), common, machine, made, train_first=past)
    write_page(args.name, stats.read_all({way: stats.RESULTS / f"{args.name}-{way}" for way in WAYS}))


if __name__ == "__main__":
    guard("studies.plateau", main)
