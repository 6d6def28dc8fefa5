"""Train a transformer, one subnetwork per step. Read it from top to bottom.

    python train.py                                         a small BERT by RaPTr, minutes on a laptop
    python train.py --method full --out out/full            the same by full training
    torchrun --nproc_per_node 8 train.py --config configs/bert_base.toml          the paper's size

The same command continues a run that was stopped. Every flag: python train.py --help (engine/options.py).
Not here: which layers train (raptr.py, stacking.py, methods/), the model (model.py), the batches (data.py), what
happens between several processes (engine/parallel.py) and in the run folder (engine/runs.py).
"""

import sys

from engine import options

if __name__ == "__main__":
    ARGS = options.parse(sys.argv[1:])  # before torch is loaded, so that --help and a wrong flag answer at once

import contextlib
import functools
import gc
import math
import platform
import time

import numpy as np
import torch
from tqdm import tqdm

import data
import methods
import model as transformer
import stacking
from engine import checkpoint, log, machine, parallel, runs
from engine.errors import NotFinite, Stopped, guard
from methods import width
from raptr import all_layers, mean_layers
from text.corpus import open_corpus, rng
from text.prepare import prepared

# ----------------------------------------------------------------------------------------------------------------
# Model and optimizer


def parameter_groups(model, weight_decay):
    """All parameters, in two groups. Only matrices decay; biases and norms, which are vectors, do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model, args):
    """AdamW. Create all its state up front, so that checkpoints include layers that have not been trained yet."""
    # fused: one kernel updates all weights. It leaves alone what has no gradient.
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, args.lr, (args.beta1, args.beta2), args.eps, fused=True)
    for p in model.parameters():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def build(args, config, depth, ranks):
    """(model, optimizer): a fresh model with the lowest `depth` of its blocks, on its device, sharded with --fsdp."""
    model = transformer.make(config, args.seed).to(ranks.device)
    model.blocks, model.recompute = model.blocks[:depth], args.recompute  # each drawn as a block of the whole network
    if args.fsdp:
        ranks.shard(model, machine.choose(args.device, args.dtype)[1])
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # in width, each number of heads has graphs of its own
        for block in model.blocks:
            block.compile()  # one graph serves all blocks and all paths
    return model, make_optimizer(model, args)


def grow(model, optimizer, sources, args, config, ranks):
    """(model, optimizer) with one block per entry of `sources`, each a copy of the old block it names (stacking.py)."""
    tensors = checkpoint.state(model, optimizer)
    model, optimizer = build(args, config, len(sources), ranks)
    checkpoint.load_weights(model, stacking.grow(tensors["model"], sources), "growth")
    if args.moments == "copy":
        checkpoint.load_moments(model, optimizer, stacking.grow(tensors["optimizer"], sources))
    return model, optimizer


def learning_rate(args, step, since_growth=math.inf):
    """Learning rate of a step (from 1): linear warm-up, then --lr_schedule, ending at --min_lr at the last step.
    since_growth: steps since the network grew; after a growth, --growth_warmup steps warm up again."""
    if since_growth < args.growth_warmup:
        return since_growth / args.growth_warmup * learning_rate(args, step)
    warmup = args.warmup if args.warmup >= 1 else args.warmup * args.steps
    if step < warmup:
        return args.lr * step / warmup
    progress = (step - warmup) / max(1.0, args.steps - warmup)  # 0 .. 1
    if args.lr_schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif args.lr_schedule == "wsd":  # warm-up, stable, decay
        factor = min(1.0, (args.steps - step) / (args.decay * args.steps))
    else:
        factor = 1 - progress
    return args.lr * (args.min_lr + (1 - args.min_lr) * factor)


# ----------------------------------------------------------------------------------------------------------------
# One step, and one evaluation


def to_device(arrays, device):
    """The arrays of a batch (data.py) as tensors. On a GPU the host does not wait for the copies, and UL2 gets a fourth
    tensor, the positions of its targets, as finding them there would make the host wait."""
    arrays = list(arrays)
    if arrays[1].ndim == 1:  # a prefix: UL2
        arrays.append(np.flatnonzero(arrays[2] != data.NO_TARGET))
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


def precise(tensor):
    """A loss or a norm in float64, in which the sum does not depend on the number of processes. MPS has no float64."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def forward_backward(model, batch, subnetwork, micro_batch, dropout_seed, autocast, ranks):
    """Leave in `.grad` the gradients of the batch, summed over its micro-batches and over all ranks. Those of skipped
    layers are None. Returns this rank's contribution to the mean loss over all targets.

    One process accumulates the gradients of each half of the batch separately and then adds the two, so that two
    processes, with half a batch each, get the same bits. That takes at most one more set of gradients.
    """
    parameters, targets = list(model.parameters()), int((batch[2] != data.NO_TARGET).sum())
    count = len(batch[0]) // micro_batch // ranks.size  # micro-batches of this rank
    starts = [(ranks.rank * count + i) * micro_batch for i in range(count)]
    inputs = [to_device([rows[start : start + micro_batch] for rows in batch], ranks.device) for start in starts]
    halves = [range(count // 2), range(count // 2, count)] if ranks.size == 1 and count > 1 else [range(count)]
    losses = []
    for half in halves:
        set_aside = [p.grad for p in parameters]  # of the first half when the second begins, else None
        model.zero_grad(set_to_none=True)
        total = 0.0
        for i in half:
            # Dropout, too, is a function of (seed, step): of the place in the whole batch, whichever rank runs it.
            torch.manual_seed(dropout_seed + starts[i])
            with autocast:
                loss = model(inputs[i], subnetwork) / targets
            with ranks.summing(model, last=i == count - 1):
                loss.backward()  # adds to what is in .grad
            total = total + precise(loss.detach())
        losses.append(total)
    for p, gradient in zip(parameters, set_aside):
        if gradient is not None:
            p.grad.add_(gradient)
    return sum(losses)


def train_step(model, optimizer, batch, subnetwork, args, ranks, autocast, dropout_seed=0, exchange=None):
    """Update the part of a model that `subnetwork` names (None: all of it). Returns (loss, gradient norm, bytes sent).

    batch: three arrays of the whole batch, the last one targets; every rank trains on its share. args: micro_batch,
    clip and skipped_grad are read. exchange: a function of this rank's loss that returns the losses of all ranks.
    Raises NotFinite, before anything is updated, if the loss or the norm is not finite.
    """
    cut = width.cut(model, subnetwork, optimizer)  # of RaPTr in width: empty otherwise
    rank_loss = forward_backward(model, batch, subnetwork, args.micro_batch, dropout_seed, autocast, ranks)
    trained = [p for p in model.parameters() if p.grad is not None]
    bytes_sent = sum(p.numel() * p.element_size() for p in trained) if ranks.size > 1 else 0
    # A skipped layer's gradient is None: AdamW leaves its weights and its moments alone. A gradient of zero is another
    # algorithm, which decays the moments and lets them move the weights. The paper does not say which it uses.
    if args.skipped_grad == "zero":
        width.restore(model, cut)
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    # The norm of the gradients that exist: skipped layers add nothing to it. --clip 0 measures it and clips nothing.
    norm = parallel.full(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf))
    rank_loss, norm = torch.stack([rank_loss, precise(norm)]).tolist()  # the one time that the host waits for a GPU
    losses = exchange(rank_loss) if exchange else [loss for (loss,) in ranks.gather(rank_loss)]
    loss = sum(losses)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        error = NotFinite(f"loss {loss}, gradient norm {norm}")
        error.ranks = [rank for rank, value in enumerate(losses) if not math.isfinite(value)] or [*range(ranks.size)]
        raise error
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    width.restore(model, cut)
    return loss, norm, bytes_sent


@torch.no_grad()
def evaluate(model, batch, subnetworks, micro_batch, autocast, ranks):
    """Mean loss, in nats, on the held-out batch, three arrays of which the last is targets. With n subnetworks,
    number i is evaluated on sequences i, i + n, ..., so that all of them cost one pass.

    The ranks take turns of `micro_batch` sequences. They run equally many forward passes, as FSDP2 needs; the surplus
    is ignored.
    """
    losses = []
    model.eval()
    for i, subnetwork in enumerate(subnetworks):
        rows = [array[i :: len(subnetworks)] for array in batch]
        turns = [[array[at : at + micro_batch] for array in rows] for at in range(0, len(rows[0]), micro_batch)]
        rank_losses, cut = [0.0] * len(turns), width.cut(model, subnetwork)
        for turn in range(ranks.rank, -(-len(turns) // ranks.size) * ranks.size, ranks.size):
            with autocast:
                loss = float(model(to_device(turns[turn % len(turns)], ranks.device), subnetwork))
            if turn < len(turns):
                rank_losses[turn] = loss
        width.restore(model, cut)
        losses += rank_losses
    model.train()
    parallel.reshard(model)  # FSDP2 keeps weights gathered after a forward pass without a backward pass
    return math.fsum(ranks.add(losses)) / int((batch[2] != data.NO_TARGET).sum())


# ----------------------------------------------------------------------------------------------------------------
# The run


def describe(args, config, objective, held_out, method, corpus):
    """What the log says of a run before its first step."""
    mean, targets = mean_layers(method, args.steps), objective.targets_per_row()
    full_step = transformer.flops(config, args.batch, targets)
    return {
        "params": transformer.parameters(config),
        "relative_flops_layers": args.layers / mean,
        "relative_flops_step": full_step / transformer.flops(config, args.batch, targets, mean),
        "unigram_loss": objective.unigram_loss(held_out[2]),
        "seed": args.seed,
        "data": {"source": corpus.meta["source"], "fingerprint": corpus.fingerprint},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def where(error, step, layers, args, objective, ranks):
    """The sentence that a NotFinite ends the run with: step, layers, and the training sequences of the ranks that had
    it."""
    order = np.split(objective.corpus.order(args.seed, step, args.batch, args.seq), ranks.size)
    sequences = ", ".join(str(i) for rank in error.ranks for i in order[rank])
    return f"step {step}, layers {layers}: {error} on training sequences {sequences}; nothing was updated or saved"


def main(args, ranks):
    # --- text, method, model ------------------------------------------------------------------------------------
    machine.settings(args.threads, args.deterministic)
    dtype = machine.choose(args.device, args.dtype)[1]
    autocast = machine.autocast(ranks.device, dtype)
    method, objective = methods.choose(args), data.objective(args)  # wrong flags are found before a corpus is made
    if "," not in args.data:
        ranks.first_does(lambda: str(prepared(args.data, args.vocab)))
    corpus = open_corpus(args.data, args.vocab)
    corpus.count("train", args.seq)  # raises UserError if the text is shorter than a sequence
    objective = data.objective(args, corpus)
    held_out = objective.held_out(args.eval_sequences, args.eval_on == "tuning")
    config = transformer.Config.of(args, objective.model_vocab)
    initial = None
    if args.init and not checkpoint.folders(args.out):
        initial = runs.initial_weights(args, config, method.depth(1), corpus.meta["tokenizer_sha256"])

    # --- run folder, and what an earlier start left in it ---------------------------------------------------------
    run = runs.Run(args, corpus, ranks)
    depth = method.depth(max(1, run.step))  # at the checkpoint, or at the first step
    model, optimizer = build(args, config, depth, ranks)
    run.restore(model, optimizer, initial)
    del initial
    has_begun, has_ended = run.open_log()
    if has_ended:
        return log.summarize(run.folder) if ranks.first else None
    facts = {"world_size": ranks.size, "device": ranks.device.type, "dtype": str(dtype)}
    facts["threads"] = torch.get_num_threads()
    if not has_begun:
        run.record("run", **describe(args, config, objective, held_out, method, corpus), **facts, flags=run.flags)
    if run.step:
        run.record("resume", step=run.step, **facts, changed=run.changed)
    loop(args, ranks, run, method, objective, config, model, optimizer, held_out, autocast)
    run.close()
    if ranks.first:
        log.summarize(run.folder)


def is_evaluated(args, method, step):
    """Whether the held-out loss is measured after a step: where a stage ends, and every --eval_every steps."""
    stage_ends = step == args.steps or method.stage(step + 1) != method.stage(step)
    return stage_ends or (args.eval_every and step % args.eval_every == 0)


def loop(args, ranks, run, method, objective, config, model, optimizer, held_out, autocast):
    """Train from run.step + 1 to the last step, or to the first evaluation that is good enough for --stop_below."""

    def held_out_loss(*subnetworks):
        return evaluate(model, held_out, subnetworks, args.micro_batch, autocast, ranks)

    examples, signals = method.examples(), machine.StopSignals()
    batches = data.prefetch(lambda step: objective.batch(args.seed, step, args.batch), run.step + 1, args.steps)
    bar = tqdm(total=args.steps, initial=run.step, unit=" steps", disable=not ranks.first or None, dynamic_ncols=True)
    say = lambda text: bar.write(text, file=sys.stderr) if ranks.first else None  # noqa: E731
    enough = objective.unigram_loss(held_out[2]) - args.stop_below if args.stop_below else -math.inf
    step, full_loss = run.step, math.inf
    if step and (args.stop_below or step == args.steps) and is_evaluated(args, method, step):
        full_loss = held_out_loss(None)
    last = step == args.steps or full_loss <= enough  # a resumed run may be complete and lack only its "done" event
    if not last:  # announce the first path; each step announces the next one, together with its loss
        ranks.exchange(0.0, run.step + 1, method.subnetwork(run.step + 1), signals)
    while not last:
        step += 1
        # 1. Which part of the network trains? A pure function of (seed, step), on which all ranks must agree.
        subnetwork = method.subnetwork(step)
        stop_wanted = ranks.agree(step)  # raises if their paths differ
        if stop_wanted or (ranks.size == 1 and signals):  # several ranks act only on what all have announced
            if run.saved < step - 1:
                run.save(step - 1, model, optimizer, last=True, stopping=True)  # last: none comes after it to try again
            bar.close()
            raise Stopped(f"stopped by {signals.name()} after step {step - 1}; the same command continues")

        # 2. Methods that grow only: a network of another depth, made of copied layers (and moments, by --moments).
        depth = len(model.blocks)
        if method.depth(step) != depth:
            before, began = held_out_loss(None), time.perf_counter()
            sources = method.sources(depth, method.depth(step))
            model, optimizer = grow(model, optimizer, sources, args, config, ranks)
            gc.collect()  # of the old network: --compile and FSDP2 hold it in cycles
            took, after = time.perf_counter() - began, held_out_loss(None)
            run.record("grow", step=step, depth_before=depth, depth=len(sources), sources=sources,
                       loss_before=before, loss_after=after, seconds=took)  # fmt: skip
            say(f"step {step:>6}  from {depth} to {len(sources)} layers: held-out loss {before:.3f} to {after:.3f}")

        # 3. One update of that part. The next batch is made in the meantime, in a thread.
        # The learning rate knows nothing of stages, except after a growth if --growth_warmup asks for it.
        began, batch = time.perf_counter(), next(batches)
        lr = learning_rate(args, step, method.steps_since_growth(step))
        for group in optimizer.param_groups:
            group["lr"] = lr
        part = subnetwork or all_layers(len(model.blocks))
        layers = list(part.layers)
        seed = int(rng(args.seed, "dropout", step).integers(1 << 62))
        # The next path travels with this step's loss, so that ranks compare both in one exchange.
        following = method.subnetwork(step + 1) if step < args.steps else None
        exchange = functools.partial(ranks.exchange, step=step + 1, subnetwork=following, stop=signals)
        try:
            loss, norm, sent = train_step(model, optimizer, batch, subnetwork, args, ranks, autocast, seed, exchange)
        except NotFinite as error:
            raise NotFinite(where(error, step, layers, args, objective, ranks)) from None
        took = time.perf_counter() - began

        # 4. Count what it cost, and log it. Only the layers that ran count.
        run.flops += round(transformer.flops(config, args.batch, objective.head_positions(batch), part.cost()))
        run.seconds += took
        share = {"width": part.width.share} if part.width else {}
        tokens, stage = step * args.batch * args.seq, method.stage(step)
        run.record("step", step=step, loss=loss, grad_norm=norm, lr=lr, stage=stage, layers=layers, **share,
                   tokens=tokens, flops=run.flops, seconds=took, bytes_reduced=sent)  # fmt: skip
        speed = f"{args.batch * args.seq / took:,.0f} tokens/s"
        bar.set_postfix_str(f"loss {loss:.3f}, stage {stage}, {len(layers)} layers, {speed}")
        bar.update()

        # 5. Evaluate the full model, and beside it some paths of each length; save.
        if is_evaluated(args, method, step):
            full_loss = held_out_loss(None)
            shorter = {k: held_out_loss(*paths) for k, paths in examples.items()}
            run.record("eval", step=step, loss=full_loss, flops=run.flops, subnetworks=shorter)
            paths = "".join(f", {k} layers {value:.3f}" for k, value in shorter.items())
            say(f"step {step:>6}  held-out loss {full_loss:.3f}{paths}")
        last = step == args.steps or full_loss <= enough
        if last or (args.save_every and step % args.save_every == 0):
            run.save(step, model, optimizer, last)
    bar.close()
    run.record("done", step=step, loss=full_loss, flops=run.flops, seconds=run.seconds)


def start(args):
    """Train as the flags say. Returns the exit code."""
    if args.dry_run:
        from engine import dry_run

        return guard("train.py", lambda: dry_run.show(args))
    out, err = map(machine.BestEffort, (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = parallel.run(lambda ranks: main(args, ranks), args)
        out.flush()
    return code


if __name__ == "__main__":
    sys.exit(start(ARGS))
