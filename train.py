"""Train a transformer, one subnetwork per step. The loop; read it from top to bottom.

    python train.py                                         a 12-layer BERT by RaPTr, minutes on a laptop
    python train.py --method full --out out/full            the same by full training
    torchrun --nproc_per_node 8 train.py --config configs/bert_base.toml          the paper's size

The same command continues a run that was stopped. Not here: which layers train (raptr.py), the model (model.py), the
text (data.py), several processes (parallel.py). Every flag (options.py): python train.py --help
"""

import functools
import json
import math
import operator
import os
import platform
import signal
import sys
import time
from pathlib import Path

from engine import options

ARGS = options.parse(sys.argv[1:]) if __name__ == "__main__" else None  # before torch: a wrong flag answers at once

import denoisers  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import methods  # noqa: E402
import model as transformer  # noqa: E402
import stacking  # noqa: E402
from engine import (
    checkpoint,  # noqa: E402
    mirror,  # noqa: E402
    parallel,  # noqa: E402
)
from engine import log as report  # noqa: E402
from methods import width  # noqa: E402
from raptr import mean_layers  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------
# Pieces of the loop

MAY_CHANGE = {"config", "out", "data", "init", "init_moments", "micro_batch", "eval_every", "save_every", "keep", "keep_every",
              "log_to", "device", "compile", "threads", "fsdp", "timeout", "dry_run", "gpus", "peak", "mfu"}  # fmt: skip


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


def choose_machine(args):
    """(device, dtype of matrix products). ValueError if the device is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if args.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: torch finds no MPS device here")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = device == "cuda" or (
        device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    )
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if bf16 else "float32"
    return device, getattr(torch, dtype)


def steady_memory():
    """Keep freed memory instead of handing it back to Linux after every large tensor: 5-10% faster steps, far less noise."""
    import ctypes

    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def parameter_groups(model, weight_decay):
    """All parameters; biases and norms, which are vectors, do not decay."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model, args):
    """AdamW over every parameter, with its state created now: a layer may be skipped for long, and still be saved."""
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, (args.beta1, args.beta2), args.eps, fused=True)
    for p in model.parameters():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def build(args, config, depth, ranks):
    """A fresh model with the lowest `depth` of its blocks, on its device and sharded if asked, and its optimizer."""
    model = transformer.make(config, args.seed).to(ranks.device)
    model.blocks = model.blocks[:depth]
    if args.fsdp:
        ranks.shard(model)
    if args.compile:
        compile_blocks(model)
    return model, make_optimizer(model, args)


def compile_blocks(model):
    for block in model.blocks:
        block.compile()


def state(model, optimizer):
    """All that a checkpoint holds, as {file: {name: tensor}}, in full; the moments by the names of their weights."""
    weights = {name: parallel.whole(p.detach()) for name, p in model.named_parameters()}
    moments = {
        f"{key}.{name}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()
    }
    assert len(moments) == 3 * len(weights)
    return {"model": weights, "optimizer": {name: parallel.whole(value) for name, value in moments.items()}}


@torch.no_grad()
def load_weights(model, tensors, where):
    """Copy named tensors into a model. ValueError unless names and shapes are the model's own."""
    transformer.check_weights(model, tensors, where)
    for name, p in model.named_parameters():
        parallel.copy_into(p, tensors[name])


@torch.no_grad()
def load_moments(model, optimizer, tensors):
    """Copy AdamW's state, named as `state` names it, into an optimizer."""
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            parallel.copy_into(value, tensors[f"{key}.{name}"])


def initial_weights(args, config, depth, tokenizer):
    """What the run folder --init holds, once it is known that its weights fit: {"model": ..}, and "optimizer" if it is there and
    wanted. ValueError if they do not, or it is not, or the run had another tokenizer than the one of this hash."""
    if not checkpoint.folders(args.init):
        raise ValueError(f"--init {args.init}: there is no checkpoint in it")
    tensors, meta = checkpoint.load(checkpoint.folders(args.init)[-1])
    if meta.get("tokenizer_sha256", tokenizer) != tokenizer:
        raise ValueError(f"--init {args.init}: was trained with another tokenizer than that of --data")
    if args.init_moments and "optimizer" not in tensors:
        raise ValueError(f"--init_moments: {args.init} has none")
    with torch.device("meta"):
        model = transformer.make(config)
    model.blocks = model.blocks[:depth]
    transformer.check_weights(model, tensors["model"], f"--init {args.init}")
    return tensors if args.init_moments else {"model": tensors["model"]}


def grow(tensors, sources, args, config, ranks):
    """(model, optimizer) with one block per entry of `sources` (stacking.py), from the `state` of the ones before. Fresh
    blocks are those that the seed gives."""
    model, optimizer = build(args, config, len(sources), ranks)
    fresh = state(model, optimizer)["model"] if None in sources else None
    load_weights(model, stacking.grow(tensors["model"], sources, fresh), "growth")
    if args.moments == "copy":
        load_moments(model, optimizer, stacking.grow(tensors["optimizer"], sources))
    return model, optimizer


def head_positions(args, batch):
    """On how many positions of a sequence the head runs, in the mean of this batch: BERT's slots, UL2's targets."""
    return batch[1].shape[1] if args.arch == "bert" else (batch[2] != data.NO_TARGET).sum() / len(batch[2])


def loss_and_gradients(model, batch, subnetwork, size, dropout_seed, autocast, ranks):
    """Of this rank's share of a batch (three arrays, the last one targets), in micro-batches of `size` sequences: (its part of
    the mean loss, gradients by parameter). The model is left without gradients; None is that of what was skipped."""
    targets = int((batch[2] != data.NO_TARGET).sum())

    def one(i):  # micro-batch i of the whole batch
        start, end = i * size, (i + 1) * size
        torch.manual_seed(dropout_seed + start)
        part = [torch.from_numpy(rows[start:end]).to(ranks.device) for rows in batch]
        with autocast:
            loss = model(part, subnetwork and subnetwork.micro_batch(start, end)) / targets
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        model.zero_grad(set_to_none=True)
        return loss.detach().double(), gradients

    def add(a, b):
        return a[0] + b[0], [x if y is None else x.add_(y) for x, y in zip(a[1], b[1])]

    count = len(batch[0]) // size // ranks.size
    return parallel.pairwise(one, ranks.rank * count, (ranks.rank + 1) * count, add)


@torch.no_grad()
def evaluate(model, batch, subnetworks, size, autocast, ranks):
    """Mean loss (nats) on a fixed batch (the last of its tensors targets). Of several subnetworks each gets an equal share of it.
    The ranks take turns, `size` sequences each; all take equally many, as FSDP2 needs, and what is too many is not counted."""
    losses = []
    model.eval()
    for i, subnetwork in enumerate(subnetworks):
        parts = list(zip(*(tensor[i :: len(subnetworks)].split(size) for tensor in batch)))
        own, taken = [0.0] * len(parts), width.cut(model, subnetwork)
        for turn in range(ranks.rank, -(-len(parts) // ranks.size) * ranks.size, ranks.size):
            with autocast:
                loss = float(model(parts[turn % len(parts)], subnetwork))
            if turn < len(parts):
                own[turn] = loss
        width.put(model, taken)
        losses += own
    model.train()
    parallel.reshard(model)
    return math.fsum(ranks.add(losses)) / int((batch[2] != data.NO_TARGET).sum())


def open_log(run, step):
    """(log.jsonl, open for appending; its events so far). What it holds of later steps than `step` is dropped,
    as it will come again."""
    path = run / "log.jsonl"
    earlier = [e for e in report.read_log(run) if e.get("step", 0) <= step] if step and path.exists() else []
    path.with_suffix(".tmp").write_text("".join(json.dumps(e) + "\n" for e in earlier))
    path.with_suffix(".tmp").rename(path)
    return open(path, "a"), earlier


def open_run(run, flags_now):
    """Lock a run folder, and make sure that it is this run's: returns (lock, {flag: [then, now]} of those that may change and
    did). ValueError if it is another's."""
    lock = checkpoint.lock(run)
    if not (run / "config.json").exists():
        (run / "config.tmp").write_text(json.dumps(flags_now, indent=1))
        (run / "config.tmp").rename(run / "config.json")
    then = read_config(run)
    for name, value in changed(then, flags_now).items():
        what = "another text" if name == "data_fingerprint" else f"--{name} {value}, not {flags_now.get(name)}"
        raise ValueError(f"--out {run}: this run began with {what}; choose another --out")
    return lock, {name: [value, flags_now.get(name)] for name, value in then.items() if flags_now.get(name) != value}


def read_config(run):
    try:
        return json.loads((run / "config.json").read_text())
    except ValueError:
        raise ValueError(f"{run / 'config.json'}: not readable; choose another --out") from None


def changed(then, now):
    """{name: value then} of the flags that a run began with, may not change, and are others now."""
    return {name: value for name, value in then.items() if name not in MAY_CHANGE and now.get(name) != value}


class Stop(Exception):
    """Ends the run: exit code, and one sentence for stderr."""


# ----------------------------------------------------------------------------------------------------------------
# The run


def main(args, dtype, ranks):
    # --- machine, text, method -----------------------------------------------------------------------------------
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    steady_memory()
    torch.set_float32_matmul_precision("high")
    device, first = ranks.device, ranks.rank == 0  # only the first process writes
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
    if args.arch == "ul2":
        denoisers.mixture(args.denoisers)  # a wrong name is found before a corpus is made
    tokens = data.open_corpus(args.data, args.vocab) if first else None
    ranks.gather()  # the others wait for the text to be there
    tokens = tokens or data.open_corpus(args.data, args.vocab)
    corpus = denoisers.view(args, tokens)
    corpus.count("train", args.seq)
    fixed = [
        torch.from_numpy(part).to(device)
        for part in corpus.fixed(args.eval_sequences, args.seq, args.eval_on == "tuning")
    ]
    method = methods.choose(args)
    examples = method.examples()
    config = transformer.Config.of(args, denoisers.model_vocab(args, tokens.vocab))

    # --- run folder, and what an earlier start left in it ----------------------------------------------------------
    run = Path(args.out)
    fresh = args.init and not checkpoint.folders(run)
    initial = initial_weights(args, config, method.depth(1), corpus.meta["tokenizer_sha256"]) if fresh else None
    flags_now = {**vars(args), "data_fingerprint": corpus.fingerprint}
    newest = lock = None
    if first:
        lock, flags_changed = open_run(run, flags_now)
        (run / "tokenizer.model").write_bytes(
            (tokens.folder / "tokenizer.model").read_bytes()
        )  # for sample.py and others
        newest = checkpoint.load_newest(run)
    step = int(ranks.gather(newest[1]["step"] if newest else 0)[0][0])
    if step and not first:
        newest = checkpoint.load(run / f"step_{step:08d}")
    tensors, meta = newest or (None, {"flops": 0, "seconds": 0.0})
    flops, seconds = meta["flops"], meta["seconds"]

    # --- model -----------------------------------------------------------------------------------------------------
    model, optimizer = build(args, config, method.depth(max(1, step)), ranks)
    if step:
        load_weights(model, tensors["model"], "the checkpoint")
        load_moments(model, optimizer, tensors["optimizer"])
    elif initial:
        load_weights(model, initial["model"], f"--init {args.init}")
        if "optimizer" in initial:
            load_moments(model, optimizer, initial["optimizer"])
    del tensors, newest, initial

    # --- log -------------------------------------------------------------------------------------------------------
    log, earlier = open_log(run, step) if first else (open(os.devnull, "w"), [])
    if ranks.gather(report.has_ended(earlier))[0][0]:
        return report.summarize(run) if first else None

    def write(event, facts):
        log.write(json.dumps({"event": event, **facts}) + "\n")
        log.flush()

    seen_by = [write, *mirror.mirrors(args.log_to if first else "", run, step, flags_now)]

    def record(event, **facts):
        for show in seen_by:
            show(event, facts)

    def say(line):
        if first:
            bar.write(line, file=sys.stderr)

    def save(step, final):  # True if it worked; Stop if it did not, and there is no next time
        tensors = state(model, optimizer)  # under FSDP2 all ranks gather it
        if not first:
            return True
        meta = {"step": step, "flops": flops, "seconds": seconds, "flags": flags_now}
        meta["tokenizer_sha256"] = corpus.meta["tokenizer_sha256"]
        try:
            checkpoint.save(run, step, tensors, meta, args.keep, args.keep_every)
            return True
        except OSError as error:  # a full disk, say: older checkpoints are as they were
            if final:
                raise Stop(1, f"the state at step {step} could not be saved: {error}") from None
            say(f"warning: no checkpoint at step {step}, training goes on: {error}")
            return False
        except checkpoint.NotFinite as error:
            raise Stop(3, f"{error}: nothing was saved") from None

    price = functools.partial(transformer.flops, config, args.batch)  # of a step, by targets per sequence and layers
    targets, mean = denoisers.targets_per_row(args), mean_layers(method, args.steps)
    machine = {"world_size": ranks.size, "device": device.type, "dtype": str(dtype), "threads": torch.get_num_threads()}
    if step == 0:
        record(
            "run", params=transformer.parameters(config), relative_flops_layers=args.layers / mean,
            relative_flops_step=price(targets) / price(targets, mean),
            unigram_loss=corpus.unigram_loss(fixed[2].cpu().numpy()), seed=args.seed, **machine,
            data={"source": corpus.meta["source"], "fingerprint": corpus.fingerprint},
            versions={"python": platform.python_version(), "torch": torch.__version__}, flags=flags_now,
        )  # fmt: skip
    elif first:
        record("resume", step=step, **machine, changed=flags_changed)

    # --- the loop ------------------------------------------------------------------------------------------------
    stopped, saved = [], step

    def stop(signum, frame):  # the first signal lets the step finish, a second one is the system's to handle
        stopped.append(signum)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    batches = data.ahead(lambda i: corpus.batch(args.seed, i, args.batch, args.seq), step + 1, args.steps)
    bar = tqdm(total=args.steps, initial=step, unit=" steps", disable=None if first else True, dynamic_ncols=True)
    while step < args.steps:
        step += 1
        subnetwork = method.subnetwork(step)
        if ranks.agree(step, subnetwork, bool(stopped)):
            if saved < step - 1:
                save(step - 1, final=True)
            bar.close()
            name = signal.Signals(stopped[0]).name if stopped else "a signal to another process"
            raise Stop(75, f"stopped by {name} after step {step - 1}; the same command continues")

        if method.depth(step) != len(model.blocks):
            before, n = evaluate(model, fixed, [None], args.micro_batch, autocast, ranks), len(model.blocks)
            began, sources = time.perf_counter(), method.sources(n, method.depth(step))
            model, optimizer = grow(state(model, optimizer), sources, args, config, ranks)
            took = time.perf_counter() - began
            after = evaluate(model, fixed, [None], args.micro_batch, autocast, ranks)
            record("grow", step=step, depth_before=n, depth=len(sources), sources=sources, loss_before=before,
                   loss_after=after, seconds=took)  # fmt: skip
            say(f"step {step:>6}  from {n} to {len(sources)} layers: held-out loss {before:.3f} to {after:.3f}")

        began = time.perf_counter()
        kept = list(range(len(model.blocks))) if subnetwork is None else list(subnetwork.layers)
        batch = next(batches)
        dropout_seed = int(data.rng(args.seed, "dropout", step).integers(1 << 62))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step, method.since_growth(step))
        taken = width.cut(model, subnetwork, optimizer)
        own, gradients = loss_and_gradients(model, batch, subnetwork, args.micro_batch, dropout_seed, autocast, ranks)
        trained = [p for p, g in zip(model.parameters(), gradients) if g is not None]
        for p, g in zip(trained, ranks.reduce([g for g in gradients if g is not None])):
            p.grad = g
        sent = sum(p.numel() * p.element_size() for p in trained) if ranks.size > 1 else 0
        if args.skipped_grad == "zero":
            width.put(model, taken)
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = float(parallel.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)))
        losses = [theirs for theirs, *_ in ranks.gather(float(own))]
        loss = parallel.pairwise(losses.__getitem__, 0, ranks.size, operator.add)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            share = args.batch // ranks.size
            bad = [i for i, own in enumerate(losses) if not math.isfinite(own)] or range(ranks.size)
            ids = corpus.order(args.seed, step, args.batch, args.seq)
            ids = ", ".join(str(i) for rank in bad for i in ids[rank * share : (rank + 1) * share])
            raise Stop(3, f"step {step}, layers {kept}: loss {loss}, gradient norm {norm} on training sequences {ids}; "
                          "nothing was updated or saved")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        width.put(model, taken)
        if device.type == "cuda":
            torch.cuda.synchronize()

        took = time.perf_counter() - began
        cost = len(kept) if subnetwork is None else subnetwork.cost(args.batch)
        flops, seconds = flops + round(price(head_positions(args, batch), cost)), seconds + took
        part = (
            {"layers": kept, "width": subnetwork.width.share} if subnetwork and subnetwork.width else {"layers": kept}
        )
        record("step", step=step, loss=loss, grad_norm=norm, lr=optimizer.param_groups[0]["lr"], stage=method.stage(step),
               **part, tokens=step * args.batch * args.seq, flops=flops, seconds=took, bytes_reduced=sent)  # fmt: skip
        speed = args.batch * args.seq / took
        bar.set_postfix_str(f"loss {loss:.3f}, stage {method.stage(step)}, {len(kept)} layers, {speed:,.0f} tokens/s")
        bar.update()

        last = step == args.steps
        stage_ends = last or method.stage(step + 1) != method.stage(step)
        if stage_ends or (args.eval_every and step % args.eval_every == 0):
            full = evaluate(model, fixed, [None], args.micro_batch, autocast, ranks)
            shorter = {
                k: evaluate(model, fixed, paths, args.micro_batch, autocast, ranks) for k, paths in examples.items()
            }
            record("eval", step=step, loss=full, flops=flops, subnetworks=shorter)
            shown = "".join(f", {k} layers {value:.3f}" for k, value in shorter.items())
            say(f"step {step:>6}  held-out loss {full:.3f}{shown}")
        if last or (args.save_every and step % args.save_every == 0):
            saved = step if save(step, final=last) else saved
    bar.close()
    if first:
        full = [e for e in report.read_log(run) if e["event"] == "eval"][-1]["loss"]
        record("done", step=step, loss=full, flops=flops, seconds=seconds)
        report.summarize(run)
    del lock


def start(args):
    """The run, with everything that may end it turned into an exit code and one sentence. Returns the code."""
    code, reason, ranks = 0, "", None
    try:
        if args.dry_run:
            from engine import dry_run

            return dry_run.show(args)
        device, dtype = choose_machine(args)
        ranks = parallel.Ranks(device, args.timeout)
        main(args, dtype, ranks)
    except ValueError as error:
        code, reason = 2, str(error)
    except checkpoint.NoCheckpoint as error:
        code, reason = 4, str(error)
    except parallel.Disagreement as error:
        code, reason = 5, str(error)
    except Stop as stop:
        code, reason = stop.args
    except parallel.Left as left:
        return left.args[0]
    except RuntimeError as error:
        if ranks is None or ranks.size == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        what = str(error).strip().splitlines()[0][:120]
        print(f"train.py: rank {ranks.rank}, step {ranks.step}: {ranks.missing()} ({what})", file=sys.stderr)
        return 5
    speaks = True
    if ranks is not None:
        code, speaks = ranks.leave(code)
        ranks.close()
    if reason and speaks:
        print(f"train.py: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(start(ARGS))
