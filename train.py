"""Train a transformer, one subnetwork per step. The loop and its flags; read it from top to bottom.

    python train.py                                         a 12-layer BERT by RaPTr, minutes on a laptop
    python train.py --method full --out out/full            the same by full training
    python train.py --config configs/bert_base.toml         the paper's size

The same command continues a run that was stopped. Not here: which layers train (raptr.py), the model (model.py), the
text (data.py). Every flag: python train.py --help
"""

import argparse
import difflib
import fcntl
import functools
import json
import math
import os
import platform
import signal
import sys
import time
import tomllib
from pathlib import Path

import methods
from raptr import mean_layers

# ----------------------------------------------------------------------------------------------------------------
# Flags


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
positive = number(float, "a number above 0", lambda x: x > 0)
nonnegative = number(float, "a number, 0 or above", lambda x: x >= 0)
share = number(float, "a number from 0 up to, not including, 1", lambda x: 0 <= x < 1)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def flags():
    parser = Parser(
        prog="train.py", usage="python train.py [--config FILE.toml] [--flag value ...]", allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=118),
        description="Train a transformer, one subnetwork per step. The same command continues a stopped run.",
        epilog="A preset sets any of these names; a flag beats the preset. Where neither speaks, pre-LN BERT-Base does.\n"
        "exit codes: 0 done; 2 bad flag or input; 3 loss or gradient not finite; 4 no usable checkpoint;\n"
        "1 the last save failed; 75 stopped, state saved",
    )  # fmt: skip

    def flag(name, type, default, help, choices=None):
        names = "|".join(choices) if choices else getattr(type, "letter", "S")
        shown = f" [{default:g}]" if isinstance(default, float) else f" [{default}]" if default not in ("", None) else ""
        group.add_argument(f"--{name}", type=type, default=default, choices=choices, metavar=names, help=help + shown)

    def switch(name, help):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=False, help=help)

    group = parser.add_argument_group("run")
    flag("config", str, "configs/bert_toy.toml", "preset, a TOML file of flags")
    flag("out", str, "", "run folder; default out/PRESET-METHOD-SEED")
    flag("data", str, "", "prepared corpus (data.py), or text files or a folder of them; default: this machine's own manual")
    flag("init", str, "", "start from the weights of this run folder")
    whole = number(int, "a whole number from 0 to 2^62", lambda x: 0 <= x <= 1 << 62)
    flag("seed", whole, 0, "of weights, data order, masks, paths and dropout")
    flag("steps", count, 1_000_000, "optimizer steps")

    group = parser.add_argument_group("method: which part trains at a step")
    flag("method", str, "raptr", "who decides", choices=methods.NAMES)
    flag("stages", str, "auto", "layers per stage, like 6-8-10-12; auto: the published plan of each method")
    exponent = number(float, "a number from -20 to 20", lambda x: abs(x) <= 20)
    flag("alpha", exponent, 0.0, "stage s lasts a share s^alpha: 0 equal, 1 proportional")
    flag("full_warmup", natural, 0, "steps of the full model before the first stage, counted in --steps")
    flag("mean_depth", positive, None, "mean layers a step; settles constant, pld, layerdrop, decreasing, jump")
    flag("skipped_grad", str, "none", "gradient of a skipped layer: none leaves it alone, zero lets its moments decay and "
         "its weights follow them", choices=["none", "zero"])  # fmt: skip

    group = parser.add_argument_group("raptr, constant")
    flag("fixed", str, "first,last", "layers always kept: numbers from 0, first, last, or none")
    flag("sampling", str, "exact", "layers in a step: exactly k, or k on average", choices=["exact", "bernoulli"])
    flag("scaling", str, "none", "of the kept layers' updates", choices=["none", "gap", "uniform", "inverse"])

    group = parser.add_argument_group("pld, layerdrop, decreasing, ramp (where --mean_depth is not given)")
    flag("theta_bar", share, 0.5, "pld: keep probability that theta(t) falls to")
    flag("gamma", nonnegative, 0.0, "pld: how fast it falls, per step; 0: 100 / steps")
    flag("drop_rate", share, 0.2, "layerdrop: the rate")
    flag("p_max", number(float, "a number from 0 to 1", lambda x: 0 <= x <= 1), 1.0, "decreasing: drop rate of the last layer")
    flag("drop_time", str, "line", "decreasing: falls on a line, or with --stages", choices=["line", "staircase"])
    flag("drop_depth", str, "linear", "decreasing: rises with depth, or not, ends pinned", choices=["linear", "uniform"])
    flag("drop_gate", str, "sequence", "decreasing: one draw per", choices=["sequence", "batch"])
    flag("drop_scale", str, "inverse", "decreasing: kept updates times 1/p, or not", choices=["inverse", "none"])
    flag("ramp_share", number(float, "a share above 0, up to 1", lambda x: 0 < x <= 1), 0.25, "ramp: share of steps it takes")

    group = parser.add_argument_group("stacking, progressive, midas, mslt, jump")
    flag("moments", str, "copy", "optimizer moments at a growth", choices=["copy", "reset"])
    flag("growth_warmup", natural, 0, "steps of linear warm-up after each growth")
    flag("jump_from", count, 3, "jump: layers before it")
    flag("jump_at", share, 1 / 3, "jump: when, as a share of the steps")
    flag("jump_init", str, "copy", "jump: new layers repeat the old, or are fresh", choices=["copy", "fresh"])

    group = parser.add_argument_group("model")
    flag("layers", count, 12, "transformer blocks")
    flag("width", count, 768, "hidden size")
    flag("heads", count, 12, "attention heads")
    flag("mlp", natural, 0, "hidden neurons of the MLP; 0: 4 times the width")
    flag("seq", number(int, "a whole number, 8 or above", lambda x: x >= 8), 512, "tokens per sequence")
    flag("vocab", number(int, "a whole number, 300 or above", lambda x: x >= 300), 30522, "token ids, if a tokenizer is made")
    flag("dropout", share, 0.1, "dropout rate")
    flag("norm", str, "pre", "layer norm before or after", choices=["pre", "post"])
    flag("positions", str, "learned", "position encoding", choices=["learned", "rotary"])
    flag("init_std", positive, 0.02, "standard deviation of initial weights")

    group = parser.add_argument_group("optimizer: AdamW")
    flag("batch", count, 256, "sequences per step, in all")
    flag("micro_batch", natural, 0, "sequences per forward pass; 0: the whole batch")
    flag("lr", positive, 1e-4, "peak learning rate")
    flag("lr_schedule", str, "linear", "decay after warm-up", choices=["linear", "cosine", "wsd"])
    flag("warmup", nonnegative, 0.01, "steps of linear warm-up; below 1: a share of --steps")
    flag("decay", number(float, "a share above 0, up to 1", lambda x: 0 < x <= 1), 0.2, "wsd: share of steps in the last decay")
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

    group = parser.add_argument_group("machine")
    flag("device", str, "auto", "where to run", choices=["auto", "cpu", "cuda", "mps"])
    flag("dtype", str, "auto", "of matrix products; auto: bfloat16 where it pays", choices=["auto", "float32", "bfloat16"])
    switch("compile", "compile the block, once for all layers and paths")
    switch("deterministic", "only kernels that give the same bits every time")
    flag("threads", natural, 0, "CPU threads; 0: as many as torch chooses")
    return parser


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
    args.micro_batch = args.micro_batch or args.batch
    try:
        if args.width % args.heads:
            raise ValueError(f"--width {args.width} must be a multiple of --heads {args.heads}")
        if args.positions == "rotary" and args.width // args.heads % 2:
            raise ValueError(f"--positions rotary needs an even width per head, not {args.width} / {args.heads}")
        if args.batch % args.micro_batch:
            raise ValueError(f"--batch {args.batch} must be a multiple of --micro_batch {args.micro_batch}")
        if args.warmup >= args.steps:
            raise ValueError(f"--warmup {args.warmup:g} must be below --steps {args.steps}")
        if args.method == "mslt" and args.skipped_grad == "zero":
            raise ValueError("--skipped_grad zero would move the layers that --method mslt keeps as they are")
        methods.choose(args)
    except ValueError as error:
        parser.error(str(error))
    given = {argument.split("=")[0].removeprefix("--") for argument in argv if argument.startswith("--")}
    for name in sorted(given & (set.union(*methods.READS.values()) - methods.reads(args))):
        print(f"warning: --method {args.method} ignores --{name}", file=sys.stderr)
    return args


def learning_rate(args, step, since_growth=math.inf):
    """Learning rate of a step (from 1): linear warm-up, then the schedule, ending at --min_lr at the last step.
    since_growth: steps since the network grew, the growth's own step being 1."""
    if since_growth < args.growth_warmup:
        return since_growth / args.growth_warmup * learning_rate(args, step)
    warmup = args.warmup if args.warmup >= 1 else args.warmup * args.steps
    if step < warmup:
        return args.lr * step / warmup
    done = (step - warmup) / max(1.0, args.steps - warmup)  # 0 .. 1
    if args.lr_schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    elif args.lr_schedule == "wsd":
        left = min(1.0, (args.steps - step) / (args.decay * args.steps))
    else:
        left = 1 - done
    return args.lr * (args.min_lr + (1 - args.min_lr) * left)


ARGS = parse(sys.argv[1:]) if __name__ == "__main__" else None  # before torch: a wrong flag and --help answer at once

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import checkpoint  # noqa: E402
import data  # noqa: E402
import model as transformer  # noqa: E402
import report  # noqa: E402
import stacking  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------
# Pieces of the loop

MAY_CHANGE = {"config", "out", "data", "init", "micro_batch", "eval_every", "save_every", "keep", "device", "compile", "threads"}


def choose_machine(args):
    """(device, dtype of matrix products). ValueError if the device is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if args.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch finds no MPS device here")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = device == "cuda" or (device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()))
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if bf16 else "float32"
    return device, getattr(torch, dtype)


def steady_memory():
    """Keep freed memory instead of handing it back to Linux after every large tensor: 5-10% faster steps, far less noise."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def make_optimizer(model, args):
    """AdamW over every parameter, with its state created now: a layer may be skipped for long, and still be saved."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.lr, (args.beta1, args.beta2), args.eps, fused=True)
    for p in model.parameters():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def state(model, optimizer):
    """All that a checkpoint holds, as {file: {name: tensor}}; the moments by the names of their weights."""
    moments = {f"{key}.{name}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()}
    return {"model": {name: p.detach() for name, p in model.named_parameters()}, "optimizer": moments}


def resize(model, depth):
    """Give the model `depth` new blocks on its device; their weights are for the caller to fill."""
    with torch.device(model.bias.device):
        model.blocks = torch.nn.ModuleList(type(model.blocks[0])(model.config) for _ in range(depth))


def grow(model, optimizer, sources, initial, args):
    """Rebuild model and optimizer with one block per entry of `sources` (stacking.py). Returns the new optimizer, which holds
    every parameter of the model as it is now. initial: the weights of fresh layers."""
    tensors = state(model, optimizer)
    resize(model, len(sources))
    load_weights(model, stacking.grow(tensors["model"], sources, initial), "growth")
    optimizer = make_optimizer(model, args)
    if args.moments == "copy":
        load_moments(model, optimizer, stacking.grow(tensors["optimizer"], sources))
    return optimizer


def compile_blocks(model):
    for block in model.blocks:
        block.compile()


@torch.no_grad()
def evaluate(model, batch, subnetworks, size, autocast):
    """Mean loss (nats) on a fixed batch (tokens, masked, targets). Of several subnetworks each gets an equal share of it."""
    total, counted = 0.0, 0
    model.eval()
    with autocast:
        for i, subnetwork in enumerate(subnetworks):
            for part in zip(*(tensor[i :: len(subnetworks)].split(size) for tensor in batch)):
                total += float(model.loss(part, subnetwork))
                counted += int((part[2] != data.NO_TARGET).sum())
    model.train()
    return total / counted


def load_weights(model, tensors, where):
    """Copy named tensors into a model. ValueError unless names and shapes are the model's own."""
    own = dict(model.named_parameters())
    wrong = sorted(set(own) ^ set(tensors)) or [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        raise ValueError(f"{where}: its weights are not those of this model: {wrong[0]} differs, and {len(wrong) - 1} more")
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(tensors[name])


def load_moments(model, optimizer, tensors):
    """Copy AdamW's state, named as `state` names it, into an optimizer."""
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            value.copy_(tensors[f"{key}.{name}"])


def changed(run, flags_now):
    """{name: value then} of the flags that a run began with, may not change, and are others now."""
    try:
        then = json.loads((run / "config.json").read_text())
    except ValueError:
        raise ValueError(f"{run / 'config.json'}: not readable; choose another --out") from None
    return {name: value for name, value in then.items() if name not in MAY_CHANGE and flags_now.get(name) != value}


def open_log(run, step):
    """(log.jsonl, open for appending; its events so far). What it holds of later steps than `step` is dropped,
    as it will come again."""
    path = run / "log.jsonl"
    earlier = [e for e in report.read_log(run) if e.get("step", 0) <= step] if step and path.exists() else []
    path.with_suffix(".tmp").write_text("".join(json.dumps(e) + "\n" for e in earlier))
    path.with_suffix(".tmp").rename(path)
    return open(path, "a"), earlier


class Stop(Exception):
    """Ends the run: exit code, and one sentence for stderr."""


# ----------------------------------------------------------------------------------------------------------------
# The run


def main(args):
    # --- machine, text, method -----------------------------------------------------------------------------------
    device, dtype = choose_machine(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    steady_memory()
    torch.set_float32_matmul_precision("high")
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)
    corpus = data.Corpus(data.prepared(args.data, args.vocab))
    corpus.count("train", args.seq)
    fixed = [torch.from_numpy(part).to(device) for part in corpus.fixed(args.eval_sequences, args.seq, args.eval_on == "tuning")]
    method = methods.choose(args)
    examples = method.examples()

    # --- model -----------------------------------------------------------------------------------------------------
    names = transformer.Config.__dataclass_fields__
    config = transformer.Config(**{**{name: getattr(args, name) for name in names}, "vocab": corpus.vocab})
    model = transformer.BERT(config, args.seed).to(device)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()} if args.method == "jump" else None
    model.blocks = model.blocks[: method.depth(1)]
    run = Path(args.out)
    if args.init and not checkpoint.folders(run):
        if not checkpoint.folders(args.init):
            raise ValueError(f"--init {args.init}: there is no checkpoint in it")
        load_weights(model, checkpoint.load(checkpoint.folders(args.init)[-1], device)[0]["model"], f"--init {args.init}")

    # --- run folder, and what an earlier start left in it ----------------------------------------------------------
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {run}: another process is training there") from None
    except OSError as error:
        raise ValueError(f"--out {run}: cannot be written ({error.strerror})") from None
    flags_now = {**vars(args), "data_fingerprint": corpus.fingerprint}
    if (run / "config.json").exists():
        for name, then in changed(run, flags_now).items():
            what = "another text" if name == "data_fingerprint" else f"--{name} {then}, not {flags_now.get(name)}"
            raise ValueError(f"--out {run}: this run began with {what}; choose another --out")
    else:
        (run / "config.tmp").write_text(json.dumps(flags_now, indent=1))
        (run / "config.tmp").rename(run / "config.json")
    tensors, meta = checkpoint.load_newest(run, device) or (None, {"step": 0, "flops": 0, "seconds": 0.0})
    step, flops, seconds = meta["step"], meta["flops"], meta["seconds"]

    if step:
        resize(model, method.depth(step))
        load_weights(model, tensors["model"], "the checkpoint")
    optimizer = make_optimizer(model, args)
    if step:
        load_moments(model, optimizer, tensors["optimizer"])
    del tensors
    if args.compile:
        compile_blocks(model)

    # --- log -------------------------------------------------------------------------------------------------------
    log, earlier = open_log(run, step)
    if earlier and earlier[-1]["event"] == "done":
        return report.summarize(run)

    def record(event, **facts):
        log.write(json.dumps({"event": event, **facts}) + "\n")
        log.flush()

    def save(step):
        meta = {"step": step, "flops": flops, "seconds": seconds, "flags": flags_now}
        meta["tokenizer_sha256"] = corpus.meta["tokenizer_sha256"]
        try:
            checkpoint.save(run, step, state(model, optimizer), meta, args.keep)
        except OSError as error:  # a full disk, say: older checkpoints are as they were
            if step == args.steps or stopped:
                raise Stop(1, f"the state at step {step} could not be saved: {error}") from None
            bar.write(f"warning: no checkpoint at step {step}, training goes on: {error}", file=sys.stderr)

    slots = fixed[1].shape[1]  # masked positions per sequence
    price = functools.partial(transformer.flops, config, args.batch, slots)  # of a step, by its layers
    mean = mean_layers(method, args.steps)
    if step == 0:
        record(
            "run", params=transformer.parameters(config), relative_flops_layers=args.layers / mean,
            relative_flops_step=price() / price(mean),
            unigram_loss=corpus.unigram_loss(fixed[2].cpu().numpy()), seed=args.seed, world_size=1, device=device,
            dtype=str(dtype), threads=torch.get_num_threads(),
            data={"source": corpus.meta["source"], "fingerprint": corpus.fingerprint},
            versions={"python": platform.python_version(), "torch": torch.__version__}, flags=flags_now,
        )  # fmt: skip
    else:
        record("resume", step=step, device=device, dtype=str(dtype), threads=torch.get_num_threads())

    # --- the loop ------------------------------------------------------------------------------------------------
    stopped = []

    def stop(signum, frame):  # the first signal lets the step finish, a second one is the system's to handle
        stopped.append(signum)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    bar = tqdm(total=args.steps, initial=step, unit=" steps", disable=None, dynamic_ncols=True)
    while step < args.steps:
        step += 1
        if method.depth(step) != len(model.blocks):
            before, n, began = evaluate(model, fixed, [None], args.micro_batch, autocast), len(model.blocks), time.perf_counter()
            sources = method.sources(n, method.depth(step))
            optimizer = grow(model, optimizer, sources, initial, args)
            if args.compile:
                compile_blocks(model)
            took = time.perf_counter() - began
            after = evaluate(model, fixed, [None], args.micro_batch, autocast)
            record("grow", step=step, depth_before=n, depth=len(sources), sources=sources, loss_before=before,
                   loss_after=after, seconds=took)  # fmt: skip
            change = f"from {n} to {len(sources)} layers: held-out loss {before:.3f} to {after:.3f}"
            bar.write(f"step {step:>6}  {change}", file=sys.stderr)

        began = time.perf_counter()
        subnetwork = method.subnetwork(step)
        kept = list(range(len(model.blocks))) if subnetwork is None else list(subnetwork.layers)
        batch = corpus.batch(args.seed, step, args.batch, args.seq)
        targets = int((batch[2] != data.NO_TARGET).sum())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, method.since_growth(step))

        loss = 0.0
        for start in range(0, args.batch, args.micro_batch):
            part = [torch.from_numpy(rows[start : start + args.micro_batch]).to(device) for rows in batch]
            torch.manual_seed(int(data.rng(args.seed, "dropout", step).integers(1 << 62)) + start)
            with autocast:
                part_loss = model.loss(part, subnetwork and subnetwork.micro_batch(start, start + args.micro_batch)) / targets
            part_loss.backward()
            loss += part_loss.item()
        if args.skipped_grad == "zero":
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Stop(3, f"step {step}, layers {kept}: loss {loss}, gradient norm {norm}; nothing was updated or saved")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()

        took = time.perf_counter() - began
        cost = len(kept) if subnetwork is None else subnetwork.cost(args.batch)
        flops, seconds = flops + round(price(cost)), seconds + took
        record("step", step=step, loss=loss, grad_norm=norm, lr=optimizer.param_groups[0]["lr"], stage=method.stage(step),
               layers=kept, tokens=step * args.batch * args.seq, flops=flops, seconds=took)  # fmt: skip
        speed = args.batch * args.seq / took
        bar.set_postfix_str(f"loss {loss:.3f}, stage {method.stage(step)}, {len(kept)} layers, {speed:,.0f} tokens/s")
        bar.update()

        last = step == args.steps
        stage_ends = last or method.stage(step + 1) != method.stage(step)
        if stage_ends or (args.eval_every and step % args.eval_every == 0):
            full = evaluate(model, fixed, [None], args.micro_batch, autocast)
            parts = {k: evaluate(model, fixed, paths, args.micro_batch, autocast) for k, paths in examples.items()}
            record("eval", step=step, loss=full, flops=flops, subnetworks=parts)
            shown = "".join(f", {k} layers {value:.3f}" for k, value in parts.items())
            bar.write(f"step {step:>6}  held-out loss {full:.3f}{shown}", file=sys.stderr)
        if last or stopped or (args.save_every and step % args.save_every == 0):
            save(step)
        if stopped and not last:
            bar.close()
            raise Stop(75, f"stopped by {signal.Signals(stopped[0]).name} after step {step}; the same command continues")
    bar.close()
    full = [e for e in report.read_log(run) if e["event"] == "eval"][-1]["loss"]
    record("done", step=step, loss=full, flops=flops, seconds=seconds)
    report.summarize(run)


if __name__ == "__main__":
    try:
        main(ARGS)
    except ValueError as error:
        code, reason = 2, error
    except checkpoint.NoCheckpoint as error:
        code, reason = 4, error
    except Stop as stop:
        code, reason = stop.args
    else:
        code, reason = 0, ""
    if reason:
        print(f"train.py: {reason}", file=sys.stderr)
    sys.exit(code)
