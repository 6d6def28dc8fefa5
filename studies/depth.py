"""Does RaPTr stand differently in a network that is deep for its size?

    python -m studies.depth --data corpus/books --jobs 2 --compile     24 x 96 beside 12 x 128, three seeds
    python -m studies.depth --rebuild                                  table and figure from the logs

Two UL2 decoders, 3600 steps at 1.333x: that of studies/length.py, and one of twice as many layers that are 3/4 as wide,
with a learning rate of 2e-3 for all arms. Runs of the first are in results/length-3600/, of the second in
results/depth-3600/ (NAME-length-3600/ and NAME-3600/ with --name). What they say together is in results/depth/. The
rule of its words was in results/LOG.md before the first run. Flags of train.py may follow.
"""

from engine import options
from engine.errors import guard
from studies import budget, compare, figures, length, stats

STEPS = 3600
DEEP = ["--layers=24", "--width=96", "--mlp=240", "--init_std=0.102", "--lr=2e-3"]
OWN = (*length.OWN, "--layers", "--width", "--mlp", "--init_std")  # flags that it sets itself


def differs(low, high):
    return low > 0 or high < 0


def write_page(name, usual, deep):
    """results/NAME/table.md and depth.png, from the runs of the usual network and of the deep one."""
    stats.must_share_text(usual + deep, f"{name}-{STEPS}")
    sizes = ["{layers} x {width}".format(**stats.event(runs[0], "run")["flags"]) for runs in (usual, deep)]
    arms = [arm for arm in dict.fromkeys(run["arm"] for run in deep) if arm != "full"]
    of_arm = [(arm, *(stats.differences(runs, arm, "full") for runs in (usual, deep))) for arm in arms]
    rows = [["full, held-out loss", *(of_full(runs) for runs in (usual, deep))]]
    rows += [[f"{arm} minus full", *(stats.measured(values, stats.word) for values in both)] for arm, *both in of_arm]
    against = [stats.differences(runs, "raptr", "stacking") for runs in (usual, deep)]
    rows.append(["raptr minus stacking", *(stats.measured(values, stats.word) for values in against)])
    gaps = [stats.differences(runs, "raptr", "full") for runs in (usual, deep)]
    change = stats.minus(gaps[1], gaps[0])
    question = f"RaPTr's gap to full training differs between {sizes[0]} and {sizes[1]}"
    answer = [question, stats.measured(change), stats.verdict(change, differs, stats.level)]
    lines = ["# Depth", "", stats.rebuilt("studies.depth", name), stats.PAIRED, ""]
    lines += [*stats.table(["", *sizes], rows), "", *stats.table(["question", "by how much", "verdict"], [answer])]
    stats.save_page(stats.RESULTS / name / "table.md", lines)
    titles = [f"{size}: loss minus full training's" for size in sizes]
    figures.differences(of_arm, titles, stats.RESULTS / name / "depth.png", sharex=True)


def of_full(runs):
    return stats.spread([stats.loss(run) for run in runs if run["arm"] == "full"])


def parser():
    parser = compare.study_parser("studies.depth", __doc__)
    add = parser.add_argument
    add("--methods", type=options.several(length.CENTRAL), default=length.CENTRAL, help="only these arms [all]")
    return parser


def main(argv=None):
    args, more, made = compare.parse_study(parser(), argv, OWN)
    other = "length" if args.name == "depth" else f"{args.name}-length"
    if not args.rebuild:
        length.train(STEPS, args.methods, budget.changed(args, name=other), more, made)
        length.train(STEPS, args.methods, args, [*DEEP, *more], made, rates={})
    write_page(args.name, *(stats.read_runs(stats.RESULTS / f"{folder}-{STEPS}") for folder in (other, args.name)))


if __name__ == "__main__":
    guard("studies.depth", main)
