"""The flags of train.py, and what a preset may set. Loads no torch, so that --help and a wrong flag answer at once.

A wrong value ends the program with one sentence and exit code 2, before anything is created.
Not here: what the flags do.
"""

import argparse
import difflib
import functools
import math
import os
import re
import shutil
import sys
import textwrap
import tomllib
from pathlib import Path

import methods
from engine import ROOT, mirror
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
portion = number(float, "a share above 0, up to 1", lambda x: 0 < x <= 1)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that refuses with one sentence, on one process, and suggests the flag that was meant."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n" if os.environ.get("RANK", "0") == "0" else "")

    def meanings(self):
        """{flag: the words of its help line}."""
        return {action.dest: action.help or "" for action in self._actions}

    def parse_args(self, args=None, namespace=None):
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0].removeprefix("--")
            self.error(f"unknown argument {unknown[0]}{nearest(name, self.meanings(), '--')}")
        return flags


def fitted(examples, width):
    """Lines `command    what it does`, the second below the first where they do not fit into the width."""
    lines = []
    for line in re.sub(r"\n {12,}", " ", examples).splitlines():  # what it does may go on in a further line
        shown, *what = re.split(r"(?<=\S) {2,}", line, maxsplit=1)
        fill = functools.partial(textwrap.fill, width=width, initial_indent=" " * 8, subsequent_indent=" " * 8)
        folded = textwrap.wrap(shown, width - 2, subsequent_indent=" " * 6, break_on_hyphens=False)
        lines += [line] if len(line) <= width else [" \\\n".join(folded), *map(fill, what)]
    return "\n".join(lines)


def command(name, about):
    """A Parser for `python -m NAME`. about: the docstring of its module, shown without its sources."""
    width = shutil.get_terminal_size().columns - 2
    kept = [text for text in about.strip().split("\n\n") if not text.startswith(("Source", "Legend"))]
    wrapped = [fitted(text, width) if text.startswith(" ") else textwrap.fill(text, width) for text in kept]
    raw = argparse.RawDescriptionHelpFormatter
    prog = name if name.endswith(".py") else f"python -m {name}"
    return Parser(prog=prog, allow_abbrev=False, description="\n\n".join(wrapped), formatter_class=raw)


def nearest(name, known, prefix=""):
    """The words "; did you mean NAME?" for the closest known name, or "" if none is close. known: names, or {name:
    words that explain it}, whose words count too, but less: "lerning_rate" is close to the "learning rate" of --lr."""
    explained = known if isinstance(known, dict) else dict.fromkeys(known, "")
    wanted = name.replace("_", " ")
    size = len(wanted.split())

    def closeness(other):
        words = explained[other].lower().split()
        phrases = [" ".join(words[i : i + size]) for i in range(len(words))]
        ratio = lambda text: difflib.SequenceMatcher(None, wanted, text).ratio()  # noqa: E731
        return max([ratio(other.replace("_", " ")), *(0.85 * ratio(phrase) for phrase in phrases)])

    best = max(explained, key=closeness)
    return f"; did you mean {prefix}{best}?" if closeness(best) >= 0.6 else ""


def several(known):
    """An argparse type: some of the `known` names, with commas, or all."""

    def names(text):
        wanted = list(known) if text == "all" else text.split(",")
        for name in wanted:
            if name not in known:
                near = nearest(name, list(known)) or f"; of {', '.join(known)}"
                raise argparse.ArgumentTypeError(f"there is no {name!r}{near}")
        return wanted

    return names


# ----------------------------------------------------------------------------------------------------------------
# The flags, group by group


class Group:
    """A labelled group of flags in --help."""

    def __init__(self, parser, title):
        self.group = parser.add_argument_group(title)

    def flag(self, name, type, default, help, choices=None):
        metavar = "|".join(choices) if choices else getattr(type, "letter", "S")
        if len(metavar) > 40:
            metavar, help = "NAME", f"{help}: {', '.join(choices)}"
        default_text = f"{default:g}" if isinstance(default, float) else default
        text = help if default in ("", None) else f"{help} [{default_text}]"
        more = {"choices": choices, "metavar": metavar, "help": text}
        self.group.add_argument(f"--{name}", type=type, default=default, **more)

    def switch(self, name, help, default=False):
        self.group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=default, help=help)


EPILOG = """\
A preset sets any of these names, and a flag overrides the preset. The
defaults in brackets apply where the preset sets nothing; the default preset
is a toy.
exit codes: 0 done; 2 bad flag or input; 3 loss or gradient not finite;
4 no usable checkpoint; 5 processes disagree, or one is lost; 1 the last save
failed; 75 stopped, state saved; 130 Ctrl-C before the first step"""


def flags():
    """The parser of train.py."""
    parser = Parser(
        prog="train.py",
        usage="python train.py [--config FILE.toml] [--flag value ...]",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26),
        description="Train a transformer, one subnetwork per step.\nThe same command continues a run that was stopped.",
        epilog=EPILOG,
    )

    add = Group(parser, "run")
    seed = number(int, "a whole number from 0 to 2^62", lambda x: 0 <= x <= 1 << 62)
    add.flag("config", str, "configs/bert_toy.toml", "preset, a TOML file of flags")
    add.flag("out", str, "", "run folder; default out/PRESET-METHOD-SEED")
    text = "prepared corpus, several (A:3,B:1), or text; default: the docstrings of Python and torch"
    add.flag("data", str, "", text)
    add.flag("init", str, "", "start from the weights of this run folder")
    add.flag("seed", seed, 0, "seed of weights, data order, masks, paths and dropout")
    add.flag("steps", count, 1_000_000, "optimizer steps")

    add = Group(parser, "method: which part of the network trains at a step")
    exponent = number(float, "a number from -20 to 20", lambda x: abs(x) <= 20)
    add.flag("method", str, "raptr", "training method", choices=[*methods.METHODS])
    text = "layers per stage; auto, of 12: 6-8-10-12 (raptr), 6-9-12 (stacking, midas), 6-9-12-12 (mslt), 3-6-12"
    add.flag("stages", str, "auto", f"{text} (progressive)")
    add.flag("alpha", exponent, 0.0, "duration of stage s is proportional to s^alpha; 0: all equal, 1: growing with s")
    add.flag("full_warmup", natural, 0, "steps of the full model before the first stage, counted in --steps")
    text = "mean layers per step of constant (3/4 of all if not given), pld, layerdrop, decreasing, jump"
    add.flag("mean_depth", positive, None, text)
    text = "gradient of a skipped layer. none: AdamW skips it; zero: its moments decay and still change it"
    add.flag("skipped_grad", str, "none", text, choices=["none", "zero"])

    add = Group(parser, "raptr, constant")
    text = "what a step leaves out: layers; heads and hidden neurons of every layer; some of both"
    add.flag("part", str, "depth", text, choices=["depth", "width", "both"])
    add.flag("fixed", str, "first,last", "pinned layers, kept at every step: numbers from 0, first, last, or none")
    add.flag("sampling", str, "exact", "layers in a step: exactly k, or k on average", choices=["exact", "bernoulli"])
    choices = ["none", "gap", "uniform", "inverse"]
    add.flag("scaling", str, "none", "scaling of the kept layers' updates", choices=choices)

    add = Group(parser, "stacking, progressive, midas, mslt, jump")
    add.flag("moments", str, "copy", "optimizer moments when the network grows", choices=["copy", "reset"])
    add.flag("growth_warmup", natural, 0, "steps of linear warm-up after each growth")

    add = Group(parser, "model")
    long_enough = number(int, "a whole number, 300 or above", lambda x: x >= 300)
    text = "encoder that fills masks, or decoder that reads a prefix and writes on"
    add.flag("arch", str, "bert", text, choices=["bert", "ul2"])
    add.flag("layers", count, 12, "transformer blocks")
    add.flag("width", count, 768, "hidden size")
    add.flag("heads", count, 12, "attention heads")
    add.flag("mlp", natural, 0, "hidden neurons of the MLP; 0: 4 times the width")
    add.flag("seq", length, 512, "tokens per sequence")
    add.flag("vocab", long_enough, 30522, "vocabulary size, if a tokenizer is made")
    add.flag("dropout", share, 0.1, "dropout rate")
    add.flag("norm", str, "pre", "layer norm before (pre) or after (post) attention and MLP", choices=["pre", "post"])
    add.flag("positions", str, "learned", "position encoding", choices=["learned", "rotary", "relative"])
    add.switch("rms", "RMS norms instead of layer norms")
    add.flag("norm_parts", str, "", "norm parts of a vector each by itself, like 64-64 (Deep Fusion)")
    add.switch("gated", "gated MLP")
    add.switch("tied", "tie the head's matrix to the token embedding [yes]", True)
    add.flag("types", natural, 0, "token types; the original BERT has 2")
    add.flag("norm_eps", positive, 1e-5, "added to the variance in norms")
    add.flag("loss_chunk", natural, 0, "compute logits for this many targets at a time; 0: all at once")
    add.flag("denoisers", str, "r3,r8,s,x3,x8,x64,x64half", "UL2's: ul2, garcia, or names with weights, as r3,s:2")
    add.flag("init_std", positive, 0.02, "standard deviation of initial weights")

    add = Group(parser, "optimizer: AdamW")
    add.flag("batch", count, 256, "sequences per step, over all processes")
    add.flag("micro_batch", natural, 0, "sequences per forward pass of a process, at most; 0: its share of the batch")
    add.flag("lr", positive, 1e-4, "peak learning rate")
    add.flag("lr_schedule", str, "linear", "learning rate decay after warm-up", choices=["linear", "cosine", "wsd"])
    add.flag("warmup", nonnegative, 0.01, "steps of linear warm-up; below 1: a share of --steps")
    add.flag("decay", portion, 0.2, "wsd: share of the steps in the last decay")
    add.flag("min_lr", share, 0.0, "final learning rate, as a share of --lr")
    add.flag("beta1", share, 0.9, "decay rate of the first moment")
    add.flag("beta2", share, 0.999, "decay rate of the second moment")
    add.flag("eps", positive, 1e-6, "added to the root of the second moment")
    add.flag("weight_decay", nonnegative, 0.01, "weight decay of matrices; biases and norms have none")
    add.flag("clip", nonnegative, 1.0, "largest gradient norm; 0: no clipping")

    add = Group(parser, "evaluation and saving")
    add.flag("eval_every", natural, 1000, "steps between evaluations; 0: only at stage ends and the end")
    add.flag("eval_sequences", count, 1024, "held-out sequences, the same for every run; all, if there are fewer")
    text = "tuning: evaluate on other held-out sequences, for choosing settings"
    add.flag("eval_on", str, "held_out", text, choices=["held_out", "tuning"])
    text = "stop at the first evaluation this many nats below predicting by frequency; 0: never early"
    add.flag("stop_below", nonnegative, 0.0, text)
    add.flag("save_every", natural, 1000, "steps between checkpoints; 0: only at the end")
    add.flag("keep", count, 2, "newest checkpoints to keep")
    add.flag("keep_every", natural, 0, "keep also those of every N-th step; 0: none")
    add.flag("log_to", str, "", "show the log there as well: tensorboard, wandb, or both with a comma")

    add = Group(parser, "machine")
    add.flag("device", str, "auto", "device to run on", choices=["auto", "cpu", "cuda", "mps"])
    text = "precision of matrix products; auto: bfloat16 where the hardware has it"
    add.flag("dtype", str, "auto", text, choices=["auto", "float32", "bfloat16"])
    add.switch("compile", "compile the block, once for all layers and paths")
    add.switch("recompute", "keep no activations inside blocks: less memory, a third more work in the layers")
    add.switch("deterministic", "use only kernels that give the same bits every time")
    add.flag("threads", natural, 0, "CPU threads; 0: torch's choice")
    add.switch("fsdp", "under torchrun: shard weights, gradients and moments (FSDP2)")
    add.flag("timeout", positive, 600.0, "under torchrun: seconds to wait for another process")

    add = Group(parser, "before a run")
    add.switch("dry_run", "print what the run needs (memory, FLOPs, hours, disk) and stop")
    add.flag("gpus", count, 1, "GPUs to plan for")
    add.flag("peak", positive, 989.0, "a GPU's dense bfloat16 TFLOP/s; the default is an H100's or H200's")
    add.flag("mfu", portion, 0.4, "share of the peak that is used")

    return parser


# Flags of earlier versions, with their defaults. A run that changed one of them cannot be continued.
REMOVED = {
    **{"drop_time": "line", "drop_depth": "linear", "drop_gate": "sequence", "drop_scale": "inverse", "p_max": 1.0},
    **{"theta_bar": 0.5, "gamma": 0.0, "drop_rate": 0.2, "ramp_share": 0.25, "width_scaling": "uniform"},
    **{"jump_from": 3, "jump_at": 1 / 3, "jump_init": "copy", "init_moments": False},
}


def complete(given):
    """All flags of a run, from its config.json or its log. Flags that it did not know yet are at their defaults, and
    flags that no longer exist are left out."""
    defaults = vars(flags().parse_args([]))
    kept = {name: value for name, value in given.items() if name in defaults or name == "data_fingerprint"}
    return argparse.Namespace(**defaults | kept)


# ----------------------------------------------------------------------------------------------------------------
# Reading and checking them


def preset_arguments(path, parser):
    """A TOML preset as command-line arguments, so that it is checked like them."""
    try:
        preset = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        parser.error(f"--config {path}: {error}")
    known = {name: text for name, text in parser.meanings().items() if name not in ("help", "config")}
    for name, value in preset.items():
        if name not in known:
            parser.error(f"{path}: unknown name {name!r}{nearest(name, known)}")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        else:
            yield f"--{name}={value}"


def parse(argv):
    """Checked flags of train.py. Exits with code 2 and one sentence if one is wrong, before anything is created."""
    parser = flags()
    config = Parser(add_help=False, allow_abbrev=False, prog="train.py")
    config.add_argument("--config", default=parser.get_default("config"))
    path = Path(config.parse_known_args(argv)[0].config)
    if not path.exists() and not path.is_absolute():
        path = ROOT / path
    preset = [] if {"-h", "--help"} & set(argv) else list(preset_arguments(path, parser))
    args = parser.parse_args(preset + argv)
    args.out = args.out or f"out/{path.stem}-{args.method}-{args.seed}"
    args.mlp = args.mlp or 4 * args.width
    world = args.gpus if args.dry_run else int(os.environ.get("WORLD_SIZE", 1))
    share_of_process = max(1, args.batch // world)
    args.micro_batch = min(args.micro_batch or share_of_process, share_of_process)
    try:
        mirror.check(args.log_to)
        check(args, world)
        methods.choose(args)
    except (UserError, ValueError, OverflowError) as error:
        parser.error(str(error))
    given = {argument.split("=")[0].removeprefix("--") for argument in argv if argument.startswith("--")}
    for name in sorted(given & (methods.READ_BY_SOME - methods.reads(args))):
        print(f"warning: --method {args.method} ignores --{name}", file=sys.stderr)
    return args


def check(args, world):
    """Raise UserError if flags do not fit together. world: how many processes."""
    if args.width % args.heads:
        raise UserError(f"--width {args.width} must be a multiple of --heads {args.heads}")
    if args.positions == "rotary" and args.width // args.heads % 2:
        raise UserError(f"--positions rotary needs an even width per head, not {args.width} / {args.heads}")
    if args.norm_parts and not add_up(args.norm_parts, args.width):
        rule = f"must be whole numbers that add up to --width {args.width}, like 64-64"
        raise UserError(f"--norm_parts {args.norm_parts}: {rule}")
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
        raise UserError(f"--seq {args.seq}: --arch ul2 needs 32 or more, for a mode, a prefix, spans and their names")


def add_up(parts, total):
    sizes = parts.split("-")
    return all(size.isdecimal() and int(size) for size in sizes) and sum(map(int, sizes)) == total
