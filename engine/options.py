"""The flags of train.py, and what a preset may set. Read before torch is loaded: a wrong flag and --help answer at once.

Every wrong value ends with one sentence and exit code 2, before anything is created.
"""

import argparse
import difflib
import math
import os
import sys
import tomllib
from pathlib import Path

import methods
from engine import mirror
from engine.errors import UserError


def number(kind, rule, holds):
    """An argparse type: a finite number for which `holds`, or an error that states the rule."""

    def convert(text):
        try:
            value = kind(text)
            if math.isfinite(value) and holds(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"must be {rule}, not {text[:40]!r}")

    convert.letter = "N" if kind is int else "X"
    return convert


count = number(int, "a whole number above 0", lambda x: x > 0)
natural = number(int, "a whole number, 0 or above", lambda x: x >= 0)
length = number(int, "a whole number, 8 or above", lambda x: x >= 8)
positive = number(float, "a number above 0", lambda x: x > 0)
nonnegative = number(float, "a number, 0 or above", lambda x: x >= 0)
share = number(float, "a number from 0 up to, not including, 1", lambda x: 0 <= x < 1)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("RANK", "0") == "0" else "")


def flags():
    parser = Parser(
        prog="train.py", usage="python train.py [--config FILE.toml] [--flag value ...]", allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=118),
        description="Train a transformer, one subnetwork per step. The same command continues a stopped run.",
        epilog="A preset sets any of these names; a flag beats the preset. Where neither speaks, pre-LN BERT-Base does.\n"
        "exit codes: 0 done; 2 bad flag or input; 3 loss or gradient not finite; 4 no usable checkpoint;\n"
        "5 processes disagree, or one is lost; 1 the last save failed; 75 stopped, state saved",
    )  # fmt: skip

    def flag(name, type, default, help, choices=None):
        names = "|".join(choices) if choices else getattr(type, "letter", "S")
        shown = (
            f" [{default:g}]" if isinstance(default, float) else f" [{default}]" if default not in ("", None) else ""
        )
        group.add_argument(f"--{name}", type=type, default=default, choices=choices, metavar=names, help=help + shown)

    def switch(name, help, default=False):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=help)

    group = parser.add_argument_group("run")
    flag("config", str, "configs/bert_toy.toml", "preset, a TOML file of flags")
    flag("out", str, "", "run folder; default out/PRESET-METHOD-SEED")
    flag("data", str, "", "prepared corpus (data.py), several (A:3,B:1), or text; default: this machine's own manual")
    flag("init", str, "", "start from the weights of this run folder")
    switch("init_moments", "--init: and from the optimizer's moments")
    whole = number(int, "a whole number from 0 to 2^62", lambda x: 0 <= x <= 1 << 62)
    flag("seed", whole, 0, "of weights, data order, masks, paths and dropout")
    flag("steps", count, 1_000_000, "optimizer steps")

    group = parser.add_argument_group("method: which part trains at a step")
    flag("method", str, "raptr", "who decides", choices=methods.NAMES)
    flag(
        "stages",
        str,
        "auto",
        "layers per stage, like 6-8-10-12 (of width: heads, or parts of 1); auto: as each method's paper",
    )
    exponent = number(float, "a number from -20 to 20", lambda x: abs(x) <= 20)
    flag("alpha", exponent, 0.0, "stage s lasts a share s^alpha: 0 equal, 1 proportional")
    flag("full_warmup", natural, 0, "steps of the full model before the first stage, counted in --steps")
    flag("mean_depth", positive, None, "mean layers a step; settles constant, pld, layerdrop, decreasing, jump")
    flag("skipped_grad", str, "none", "gradient of a skipped layer: none leaves it alone, zero lets its moments decay and "
         "its weights follow them", choices=["none", "zero"])  # fmt: skip

    group = parser.add_argument_group("raptr, constant")
    flag("part", str, "depth", "what a step leaves out: layers; heads and hidden neurons of every layer; half of each",
         choices=["depth", "width", "both"])  # fmt: skip
    flag("fixed", str, "first,last", "layers always kept: numbers from 0, first, last, or none")
    flag("sampling", str, "exact", "layers in a step: exactly k, or k on average", choices=["exact", "bernoulli"])
    flag("scaling", str, "none", "of the kept layers' updates", choices=["none", "gap", "uniform", "inverse"])
    flag("width_scaling", str, "uniform", "of what kept heads and neurons hand on: sqrt(N / n), N / n, or none",
         choices=["none", "uniform", "inverse"])  # fmt: skip

    group = parser.add_argument_group("pld, layerdrop, decreasing, ramp (where --mean_depth is not given)")
    flag("theta_bar", share, 0.5, "pld: keep probability that theta(t) falls to")
    flag("gamma", nonnegative, 0.0, "pld: how fast it falls, per step; 0: 100 / steps")
    flag("drop_rate", share, 0.2, "layerdrop: the rate")
    flag(
        "p_max",
        number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1),
        1.0,
        "decreasing: drop rate of the last layer",
    )
    flag("drop_time", str, "line", "decreasing: falls on a line, or with --stages", choices=["line", "staircase"])
    flag(
        "drop_depth", str, "linear", "decreasing: rises with depth, or not, ends pinned", choices=["linear", "uniform"]
    )
    flag("drop_gate", str, "sequence", "decreasing: one draw per", choices=["sequence", "batch"])
    flag("drop_scale", str, "inverse", "decreasing: kept updates times 1/p, or not", choices=["inverse", "none"])
    flag(
        "ramp_share",
        number(float, "a share above 0, up to 1", lambda x: 0 < x <= 1),
        0.25,
        "ramp: share of steps it takes",
    )

    group = parser.add_argument_group("stacking, progressive, midas, mslt, jump")
    flag("moments", str, "copy", "optimizer moments at a growth", choices=["copy", "reset"])
    flag("growth_warmup", natural, 0, "steps of linear warm-up after each growth")
    flag("jump_from", count, 3, "jump: layers before it")
    flag("jump_at", share, 1 / 3, "jump: when, as a share of the steps")
    flag("jump_init", str, "copy", "jump: new layers repeat the old, or are fresh", choices=["copy", "fresh"])

    group = parser.add_argument_group("model")
    flag(
        "arch",
        str,
        "bert",
        "encoder that fills masks, or decoder that reads a prefix and writes on",
        choices=["bert", "ul2"],
    )
    flag("layers", count, 12, "transformer blocks")
    flag("width", count, 768, "hidden size")
    flag("heads", count, 12, "attention heads")
    flag("mlp", natural, 0, "hidden neurons of the MLP; 0: 4 times the width")
    flag("seq", number(int, "a whole number, 8 or above", lambda x: x >= 8), 512, "tokens per sequence")
    flag(
        "vocab",
        number(int, "a whole number, 300 or above", lambda x: x >= 300),
        30522,
        "token ids, if a tokenizer is made",
    )
    flag("dropout", share, 0.1, "dropout rate")
    flag("norm", str, "pre", "layer norm before or after", choices=["pre", "post"])
    flag("positions", str, "learned", "position encoding", choices=["learned", "rotary", "relative"])
    switch("rms", "RMS norms instead of layer norms")
    flag("norm_parts", str, "", "norm parts of a vector each by itself, like 64-64; deep_fusion.py makes such networks")
    switch("gated", "gated MLP")
    switch("tied", "the head's matrix is the token embedding [yes]", True)
    flag("types", natural, 0, "token types; the original BERT has 2, of which one-sentence inputs use the first")
    flag("norm_eps", positive, 1e-5, "added to the variance in norms")
    flag("loss_chunk", natural, 0, "targets whose logits exist at a time; 0: all")
    flag("denoisers", str, "r3,r8,s,x3,x8,x64,x64half", "ul2: its tasks, with weights: r3,s:2; also causal")
    flag("init_std", positive, 0.02, "standard deviation of initial weights")

    group = parser.add_argument_group("optimizer: AdamW")
    flag("batch", count, 256, "sequences per step, in all")
    flag("micro_batch", natural, 0, "sequences per forward pass of a process; 0: its whole share")
    flag("lr", positive, 1e-4, "peak learning rate")
    flag("lr_schedule", str, "linear", "decay after warm-up", choices=["linear", "cosine", "wsd"])
    flag("warmup", nonnegative, 0.01, "steps of linear warm-up; below 1: a share of --steps")
    flag(
        "decay",
        number(float, "a share above 0, up to 1", lambda x: 0 < x <= 1),
        0.2,
        "wsd: share of steps in the last decay",
    )
    flag("min_lr", share, 0.0, "final learning rate, as a share of --lr")
    flag("beta1", share, 0.9, "decay of the first moment")
    flag("beta2", share, 0.999, "decay of the second moment")
    flag("eps", positive, 1e-6, "added to the root of the second moment")
    flag("weight_decay", nonnegative, 0.01, "not on biases and norms")
    flag("clip", nonnegative, 1.0, "largest gradient norm; 0: no clipping")

    group = parser.add_argument_group("looking and saving")
    flag("eval_every", natural, 1000, "steps between evaluations; 0: only at stage ends and the end")
    flag("eval_sequences", count, 1024, "held-out sequences, the same for every run")
    flag(
        "eval_on",
        str,
        "held_out",
        "tuning: the held-out sequences left over, to choose settings by",
        choices=["held_out", "tuning"],
    )
    flag("save_every", natural, 1000, "steps between checkpoints; 0: only at the end")
    flag("keep", count, 2, "newest checkpoints to keep")
    flag("log_to", str, "", "show the log's numbers there too: tensorboard, wandb, or both with a comma")
    flag("keep_every", natural, 0, "keep also those of every N-th step; 0: none")

    group = parser.add_argument_group("machine")
    flag("device", str, "auto", "where to run", choices=["auto", "cpu", "cuda", "mps"])
    flag(
        "dtype",
        str,
        "auto",
        "of matrix products; auto: bfloat16 where it pays",
        choices=["auto", "float32", "bfloat16"],
    )
    switch("compile", "compile the block, once for all layers and paths")
    switch("deterministic", "only kernels that give the same bits every time")
    flag("threads", natural, 0, "CPU threads; 0: as many as torch chooses")
    switch("fsdp", "under torchrun: shard weights, gradients and moments (FSDP2)")
    flag("timeout", positive, 600.0, "under torchrun: seconds to wait for another process")

    group = parser.add_argument_group("before a run")
    switch("dry_run", "print what the run needs (memory, FLOPs, hours, disk), and stop")
    flag("gpus", count, 1, "dry_run: processes, one GPU each")
    flag("peak", positive, 989.0, "dry_run: a GPU's dense bfloat16 TFLOP/s, by default an H100's or H200's")
    flag(
        "mfu", number(float, "a share above 0, up to 1", lambda x: 0 < x <= 1), 0.4, "dry_run: share of it that is used"
    )
    return parser


def complete(given):
    """The flags of a run, from its config.json or its log; those that it did not know yet are at their defaults."""
    return argparse.Namespace(**{**vars(flags().parse_args([])), **given})


def preset_arguments(path, parser):
    """A TOML preset as command-line arguments, so that it is checked like them."""
    try:
        preset = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--config {path}: {error}")
    known = {action.dest for action in parser._actions} - {"help", "config"}
    for name, value in preset.items():
        if name not in known:
            parser.error(f"{path}: unknown name {name!r}{nearest(name, known)}")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        else:
            yield f"--{name}={value}"


def add_up(parts, whole):
    sizes = parts.split("-")
    return all(size.isdecimal() and int(size) for size in sizes) and sum(map(int, sizes)) == whole


def nearest(name, known):
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else ""


def parse(argv):
    """Checked flags. Exits with code 2 and one sentence if something is wrong; nothing has been created by then."""
    parser = flags()
    first = Parser(add_help=False, allow_abbrev=False, prog="train.py")
    first.add_argument("--config", default=parser.get_default("config"))
    path = Path(first.parse_known_args(argv)[0].config)
    if not path.exists() and not path.is_absolute():
        path = Path(__file__).parent / path
    preset = [] if {"-h", "--help"} & set(argv) else list(preset_arguments(path, parser))
    args, unknown = parser.parse_known_args(preset + argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        parser.error(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
    args.out = args.out or f"out/{path.stem}-{args.method}-{args.seed}"
    args.mlp = args.mlp or 4 * args.width
    world = args.gpus if args.dry_run else int(os.environ.get("WORLD_SIZE", 1))
    args.micro_batch = args.micro_batch or max(1, args.batch // world)
    try:
        mirror.check(args.log_to)
        if args.width % args.heads:
            raise UserError(f"--width {args.width} must be a multiple of --heads {args.heads}")
        if args.positions == "rotary" and args.width // args.heads % 2:
            raise UserError(f"--positions rotary needs an even width per head, not {args.width} / {args.heads}")
        if args.norm_parts and not add_up(args.norm_parts, args.width):
            raise UserError(
                f"--norm_parts {args.norm_parts}: must be whole numbers that add up to --width {args.width}, like 64-64"
            )
        if args.part != "depth" and args.mlp % args.heads:
            raise UserError(f"--part {args.part}: --mlp {args.mlp} must be a multiple of --heads {args.heads}")
        if args.part != "depth" and args.fsdp:
            raise UserError(f"--part {args.part} does not work with --fsdp, which shards the rows that it would cut")
        if args.batch % (world * args.micro_batch):
            times = f"{world} processes times " if world > 1 else ""
            raise UserError(f"--batch {args.batch} must be a multiple of {times}--micro_batch {args.micro_batch}")
        if args.fsdp and world == 1:
            raise UserError("--fsdp shards over several processes: start with torchrun")
        if args.warmup >= args.steps:
            raise UserError(f"--warmup {args.warmup:g} must be below --steps {args.steps}")
        if args.method == "mslt" and args.skipped_grad == "zero":
            raise UserError("--skipped_grad zero would move the layers that --method mslt keeps as they are")
        if args.arch == "ul2" and args.seq < 32:
            raise UserError(
                f"--seq {args.seq}: --arch ul2 needs 32 or more, for a mode, a prefix, spans and their names"
            )
        methods.choose(args)
    except (ValueError, OverflowError) as error:
        parser.error(str(error))
    given = {argument.split("=")[0].removeprefix("--") for argument in argv if argument.startswith("--")}
    for name in sorted(given & (set.union(*methods.READS.values()) - methods.reads(args))):
        print(f"warning: --method {args.method} ignores --{name}", file=sys.stderr)
    return args
