"""Others' models beside ours: `python -m tools.bench --only rivals` and `--only over`.

Each rival takes its steps in a process of its own, as memory settings hold for a process, in turn with the others.
Not here: how a step is timed (tools/timing.py).
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
from engine import ROOT, machine
from engine.errors import UserError
from raptr import RaPTr, Stage, over
from text.prepare import SPECIAL
from tools.timing import flags_of, interleaved, make_step, product, speed_up


def theirs(args, kind, attention="eager"):
    """(model, its nn.ModuleList of layers): a BERT or a Llama of `transformers`, with random weights."""
    import transformers

    shape = dict(
        vocab_size=args.vocab, hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=args.heads,
        intermediate_size=4 * args.width, max_position_embeddings=args.seq, attn_implementation=attention,
    )  # fmt: skip
    if kind == "BERT":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**shape, **dropout))
        return model, model.bert.encoder.layer
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, use_cache=False))
    return model, model.model.layers


def step_of(model, loss_of, dtype):
    """A function that takes a training step of a model with the clipping and the optimizer of ours."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def step():
        with machine.autocast("cpu", dtype):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def their_step(args, model, share=1.0):
    """`step_of` their model, called as its documentation has it. share: of the tokens, that have a label."""
    tokens = torch.randint(SPECIAL, args.vocab, (args.batch, args.seq))
    labels = torch.where(torch.rand(tokens.shape) < share, tokens, data.NO_TARGET)
    return step_of(model, lambda: model(input_ids=tokens, labels=labels).loss, args.dtype)


def load_nanogpt(folder):
    """nanoGPT's model.py as a module. Raises UserError if it is not in the folder."""
    path = Path(folder, "model.py")
    if not path.exists():
        raise UserError(f"--nanogpt {folder}: there is no model.py in it")
    spec = importlib.util.spec_from_file_location("nanogpt", path)
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_step(args, compiled, dtype):
    """`step_of` nanoGPT's GPT of the same size, called as its train.py does. Its optimizer is fused, as ours."""
    module = load_nanogpt(args.nanogpt)
    sizes = {"block_size": args.seq, "vocab_size": args.vocab, "n_layer": args.layers, "n_head": args.heads}
    with contextlib.redirect_stdout(sys.stderr):  # it counts its parameters aloud
        model = module.GPT(module.GPTConfig(**sizes, n_embd=args.width, dropout=0.0, bias=False))
    run = torch.compile(model) if compiled else model
    tokens = torch.randint(SPECIAL, args.vocab, (args.batch, args.seq + 1))
    return step_of(model, lambda: run(tokens[:, :-1], tokens[:, 1:].contiguous())[1], dtype)


OURS = ["ours", "ours, compiled"]
TRANSFORMERS = ["BERT, sdpa", "BERT, eager", "BERT, sdpa, steady memory", "BERT, eager, steady memory"]
NANOGPT = ["nanoGPT, float32", "nanoGPT, bfloat16", "nanoGPT, bfloat16, compiled"]


def worker(args):
    """One rival. Takes a step for every line it reads."""
    name = args.worker
    if name.startswith("ours") or name.endswith("steady memory"):
        machine.steady_memory()
    if name.startswith("ours"):
        args.compile = name == "ours, compiled"
        step = functools.partial(make_step(flags_of(args), "cpu", args.dtype)[0], None)
    elif name.startswith("nanoGPT"):
        step = nanogpt_step(args, "compiled" in name, torch.float32 if "float32" in name else torch.bfloat16)
    else:
        step = their_step(args, theirs(args, "BERT", attention=name.split(", ")[1])[0], share=0.15)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


def ask(process):
    """Have a worker take a step, and wait for it."""
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n", "a worker has ended; its error stands above"


def bench_rivals(args, report):
    """A full step: ours, that of transformers' BERT with both kinds of attention and both memory settings, and with
    --nanogpt that of nanoGPT. Beside them the product of two large matrices, the machine's limit."""
    names, known = list(OURS), importlib.util.find_spec("transformers")
    names += TRANSFORMERS if known else []
    if args.nanogpt:
        load_nanogpt(args.nanogpt)
        names += NANOGPT
    start = [sys.executable, "-m", "tools.bench", *sys.argv[1:], "--worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    workers = {name: subprocess.Popen([*start, name], **pipes) for name in names}
    multiply, work = product("cpu", args.dtype)
    calls = {name: functools.partial(ask, process) for name, process in workers.items()}
    times = interleaved({**calls, "product": multiply}, args.rounds, pause=0.3)
    for process in workers.values():
        process.communicate()
    flops = make_step(flags_of(args), "cpu", args.dtype)[1](args.layers)
    limit = work / median(times["product"])
    version = f"transformers {importlib.metadata.version('transformers')}" if known else "transformers is not installed"
    print(f"  A full step, each program in a process of its own, in turn ({version})")
    print("  Our head runs on the targets only, theirs on every token. `steady memory` lends")
    print("  theirs the malloc setting that train.py makes.\n")
    print(f"      {'':28}   tokens/s   ours / it")
    for name in names:
        ratio = median([b / a for a, b in zip(times["ours"], times[name])])
        print(f"      {name:28} {args.batch * args.seq / median(times[name]):10,.0f}   {ratio:9.2f}")
        report[f"ours_over_{name.replace(', ', '_').replace(' ', '_')}"] = ratio
    share = flops / median(times["ours"]) / limit
    print(f"\n      ours runs at {share:.0%} of the {limit / 1e9:,.0f} GFLOP/s of a product of large matrices")
    report["of_product"] = share


def counted(call):
    """FLOPs of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def bench_over(args, report):
    """Half of the layers of their models, a new path each time, unscaled and scaled, against all layers."""
    L, ends = args.layers, {0, args.layers - 1}
    paths = {scaling: RaPTr([Stage(1, 10**9, L // 2)], L, ends, scaling=scaling) for scaling in ("none", "uniform")}
    version = importlib.metadata.version("transformers")
    print(f"  raptr.over, in models of transformers {version}; ideal by counted FLOPs\n")
    for kind in ("BERT", "Llama"):
        (model, layers), numbers = theirs(args, kind), itertools.count(1)
        step = their_step(args, model)

        def step_over(method, step=step, layers=layers, numbers=numbers):
            with over(layers, method.subnetwork(next(numbers))):
                step()

        candidates = {"full": step, **{name: functools.partial(step_over, path) for name, path in paths.items()}}
        times = interleaved(candidates, args.rounds)
        ideal = counted(step) / counted(candidates["none"])
        print(f"      {kind + ',':6} all {L:2} layers               {median(times['full']) * 1e3:8.1f} ms")
        for name in paths:
            speed = speed_up(times, name)
            print(f"      {kind + ',':6} path of {L // 2:2}, scaling {name:7}", end=" ")
            print(f"{median(times[name]) * 1e3:8.1f} ms   {speed:.3f}x, ideal {ideal:.3f}", end=", ")
            print(f"efficiency {speed / ideal:.3f}")
            report[f"over_{kind}_{name}"] = speed / ideal
