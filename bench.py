"""How fast is a step, and does a path save what it should? All figures are ratios of things timed in turn.

    python bench.py                     everything below, on this machine
    python bench.py --only paths        a full step against paths of 6, 8, 10 of 12 layers
    python bench.py --only methods      every method over a whole run, and a growth
    python bench.py --only rival        tokens/s against `transformers`' BertForMaskedLM, if that is installed
    python bench.py --only over         what hf.over saves of a step of `transformers`' BERT and Llama, if that is installed
    python bench.py --only data         what making a batch takes of a step
    python bench.py --only reliability  what checks, log and checkpoints take of the toy
    python bench.py --only memory       peak memory of a short toy run and of preparing the default corpus

Each round times one step of every candidate, one after another, so that a slow moment of the machine hits all of them;
a ratio is the median over the rounds of that round's ratio, unless it says otherwise. Let nothing else run meanwhile.

efficiency of a path = (time of a full step / time of its step) / (FLOPs of a full step / FLOPs of its step); 1 is ideal.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import data
import hf
import methods
import model as transformer
import options
import parallel
import prepare
import stacking
import train
from raptr import RaPTr, Stage, whole

HERE = Path(__file__).parent


def median(values):
    return statistics.median(values)


def interleaved(candidates, rounds, warmup=3, pause=0.0):
    """Seconds per call of each candidate, {name: [one per round]}, called in turn. pause: seconds before each call, for
    the threads of another process to fall asleep."""
    times = {name: [] for name in candidates}
    for round in range(-warmup, rounds):
        for name, call in candidates.items():
            time.sleep(pause)
            began = time.perf_counter()
            call()
            if round >= 0:
                times[name].append(time.perf_counter() - began)
    return times


def trainer(model, loss, dtype):
    """A whole training step, as train.py takes it: forward, backward, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step(*arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            value = loss(*arguments)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def make_batch(config, size):
    tokens = torch.randint(prepare.SPECIAL, config.vocab, (size, config.seq))
    masked = torch.stack([torch.randperm(config.seq)[: data.masked_per_window(config.seq)] for _ in range(size)])
    return tokens, masked, tokens.gather(1, masked)


def our_step(config, size, dtype, compile=False):
    model, batch = transformer.BERT(config), make_batch(config, size)
    if compile:
        train.compile_blocks(model)
    return trainer(model, lambda subnetwork: model(batch, subnetwork) / batch[2].numel(), dtype)


def bench_paths(args, config, report):
    step = our_step(config, args.batch, args.dtype, args.compile)
    L = config.layers
    lengths = [L // 2, 2 * L // 3, 5 * L // 6]  # 6, 8, 10 of 12
    paths = {k: RaPTr([Stage(1, 10**9, k)], L, {0, L - 1}) for k in lengths}
    turn = iter(range(1, 10**9))
    candidates = {"full": lambda: step(None)}
    candidates |= {k: lambda k=k: step(paths[k].subnetwork(next(turn))) for k in lengths}  # a new path each time
    times = interleaved(candidates, args.rounds)
    slots = data.masked_per_window(config.seq)
    cost = {k: transformer.flops(config, args.batch, slots, k) for k in [*lengths, L]}
    print(f"  paths, {args.dtype}{', compiled' if args.compile else ''}      step    FLOPs    speed-up   ideal   efficiency")
    print(f"    full, {L} layers     {median(times['full']) * 1e3:6.1f} ms")
    for k in lengths:
        speed = median([a / b for a, b in zip(times["full"], times[k])])
        ideal = cost[L] / cost[k]
        took, share = median(times[k]) * 1e3, cost[k] / cost[L]
        print(f"    path of {k:2}          {took:6.1f} ms  {share:6.1%}   {speed:8.3f}  {ideal:6.3f}   {speed / ideal:10.3f}")
        report[f"efficiency_{k}_of_{L}"] = speed / ideal


def bench_methods(args, config, report):
    """Every method over a whole short run: each of its steps beside a full one."""
    step, slots, T = our_step(config, args.batch, args.dtype, args.compile), data.masked_per_window(config.seq), 3 * args.rounds
    for _ in range(3):
        step(None)
    print(f"  methods, {args.dtype}: all steps of a run of {T}, each beside a full one; ratios of the sums")
    for name in methods.NAMES[1:]:
        flags = [f"--method={name}", f"--steps={T}", f"--layers={config.layers}", f"--batch={args.batch}"]
        flags += [f"--mean_depth={0.75 * config.layers:g}"] * ("mean_depth" in methods.READS[name])
        method, full, own, cost = methods.choose(options.parse(flags)), 0.0, 0.0, 0.0
        for moment in range(1, T + 1):
            path = method.subnetwork(moment) or whole(method.depth(moment))
            for subnetwork in (None, path):
                began = time.perf_counter()
                step(subnetwork)
                took = time.perf_counter() - began
                full, own = (full + took, own) if subnetwork is None else (full, own + took)
            cost += transformer.flops(config, args.batch, slots, path.cost(args.batch))
        ideal = T * transformer.flops(config, args.batch, slots) / cost
        print(f"    {name:12} {full / own:6.3f}x faster, ideal {ideal:6.3f}, efficiency {full / own / ideal:6.3f}")
        report[f"efficiency_{name}"] = full / own / ideal
    flags = options.parse(["--method=stacking", f"--layers={config.layers}"])
    ranks = parallel.Ranks("cpu", 60)
    model, optimizer = train.build(flags, config, config.layers // 2, ranks)
    began = time.perf_counter()
    train.grow(train.state(model, optimizer), stacking.stacking(config.layers // 2, config.layers), flags, config, ranks)
    grew = time.perf_counter() - began
    print(f"    growing from {config.layers // 2} to {config.layers} layers takes {grew * 1e3:.0f} ms", end="")
    print(f", {grew * T / full:.2f} of a full step")
    report["growth_over_step"] = grew * T / full


def their_step(kind, config, size, dtype):
    import transformers

    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=config.padded_vocab, hidden_size=config.width, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, intermediate_size=config.mlp, max_position_embeddings=config.seq,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation=kind,
        )
    )  # fmt: skip
    tokens = torch.randint(prepare.SPECIAL, config.vocab, (size, config.seq))
    labels = torch.where(torch.rand(tokens.shape) < 0.15, tokens, -100)
    return trainer(theirs, lambda: theirs(input_ids=tokens, labels=labels).loss, dtype)


def worker(args, config):
    """One program of the comparison below, in a process of its own: takes a step for every line it reads."""
    if args.worker.startswith("ours") or args.worker.endswith("steady memory"):
        train.steady_memory()
    if args.worker.startswith("ours"):
        ours = our_step(config, args.batch, args.dtype, args.worker == "ours, compiled")
        step = lambda: ours(None)  # noqa: E731
    else:
        step = their_step(args.worker.split(",")[0], config, args.batch, args.dtype)
    for _ in sys.stdin:
        step()
        print("done", flush=True)


def bench_rival(args, config, report):
    if not importlib.util.find_spec("transformers"):
        return print("  rival: transformers is not installed (pip install transformers); not run")
    names = ["ours", "ours, compiled", "sdpa", "eager", "sdpa, steady memory", "eager, steady memory"]
    workers = {}
    for name in names:
        command = [sys.executable, *sys.argv, "--worker", name]
        workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(process):
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"

    times = interleaved({name: lambda process=process: ask(process) for name, process in workers.items()}, args.rounds, pause=0.3)
    for process in workers.values():
        process.communicate()
    per_step = args.batch * config.seq
    fastest = min(("sdpa", "eager"), key=lambda name: median(times[name]))
    print(f"  full step against transformers {importlib.metadata.version('transformers')} BertForMaskedLM, {args.dtype},")
    print("  each in a process of its own, in turn; `steady memory` lends them the malloc setting that train.py makes")
    for name in names:
        ratio = median([b / a for a, b in zip(times[name], times[fastest])])
        speed = per_step / median(times[name])
        print(f"    {name:20} {speed:8,.0f} tokens/s   {ratio:5.2f} times its fastest ({fastest})")
        report[f"times_transformers_{name.replace(', ', '_').replace(' ', '_')}"] = ratio


def somebody_elses(kind, config):
    """(model, its ModuleList): a small one of `transformers`, with random weights."""
    import transformers

    shape = dict(vocab_size=config.vocab, hidden_size=config.width, num_hidden_layers=config.layers,
                 num_attention_heads=config.heads, intermediate_size=config.mlp, max_position_embeddings=config.seq,
                 attn_implementation="eager")  # fmt: skip
    if kind == "BERT":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**shape, **dropout))
        return model, model.bert.encoder.layer
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, use_cache=False))
    return model, model.model.layers


def counted(call):
    """FLOPs of the matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def bench_over(args, config, report):
    """Half of somebody else's layers, a new path each time, beside all of them; unscaled and scaled."""
    if not importlib.util.find_spec("transformers"):
        return print("  over: transformers is not installed (pip install transformers); not run")
    L, tokens = config.layers, torch.randint(0, config.vocab, (args.batch, config.seq))
    paths = {name: RaPTr([Stage(1, 10**9, L // 2)], L, {0, L - 1}, scaling=name) for name in ("none", "uniform")}
    print(f"  hf.over, transformers {importlib.metadata.version('transformers')}, {args.dtype}; ideal: by counted FLOPs")
    for kind in ("BERT", "Llama"):
        (model, layers), turn = somebody_elses(kind, config), iter(range(1, 10**9))
        step = trainer(model, lambda model=model: model(input_ids=tokens, labels=tokens).loss, args.dtype)

        def walk(path, step=step, layers=layers, turn=turn):
            with hf.over(layers, path.subnetwork(next(turn))):
                step()

        candidates = {"full": step} | {name: lambda path=path, walk=walk: walk(path) for name, path in paths.items()}
        times = interleaved(candidates, args.rounds)
        ideal = counted(step) / counted(candidates["none"])
        print(f"    {kind + ',':6} all {L} layers              {median(times['full']) * 1e3:6.1f} ms")
        for name in paths:
            speed, took = median([a / b for a, b in zip(times["full"], times[name])]), median(times[name]) * 1e3
            print(f"    {kind + ',':6} path of {L // 2}, scaling {name:8} {took:6.1f} ms   {speed:.3f}x, ", end="")
            print(f"ideal {ideal:.3f}, efficiency {speed / ideal:.3f}")
            report[f"over_{kind}_{name}"] = speed / ideal


def bench_data(args, config, report):
    corpus = data.Corpus(prepare.prepared())
    toy = transformer.Config(12, 128, 2, 512, 64, corpus.vocab, 0.0, "pre", "rotary", 0.088)  # configs/bert_toy.toml
    step, turn = our_step(toy, 16, args.dtype), iter(range(1, 10**9))
    times = interleaved({"batch": lambda: corpus.batch(0, next(turn), 16, 64), "step": lambda: step(None)}, args.rounds)
    share = median([a / b for a, b in zip(times["batch"], times["step"])])
    print(f"  making a toy batch takes {median(times['batch']) * 1e3:.2f} ms, {share:.2%} of a full step")
    report["data_share"] = share


def bench_reliability(args, config, report):
    """What safety takes of the toy: checks and log at each step, a checkpoint every 400, beside a full step."""
    toy = options.parse(["--method=full"])
    toy_config = transformer.Config(12, 128, 2, 512, 64, 4096, 0.0, "pre", "rotary", 0.088)  # configs/bert_toy.toml
    ranks, turn = parallel.Ranks("cpu", 60), iter(range(1, 10**9))
    model, optimizer = train.build(toy, toy_config, 12, ranks)
    step = our_step(toy_config, 16, args.dtype)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log.jsonl"), "a") as log:
        line = {"event": "step", "loss": 1 / 3, "grad_norm": 1 / 7, "layers": [*range(12)], "tokens": 10**6, "flops": 10**12}

        def check():
            ranks.agree(next(turn), None, False)
            ranks.gather(0.5)
            log.write(json.dumps(line) + "\n")
            log.flush()

        def save():
            checkpoint.save(folder, next(turn), train.state(model, optimizer), {}, 1)

        times = interleaved({"step": lambda: step(None), "check": check, "save": save}, args.rounds)
    seconds = {name: median(values) for name, values in times.items()}
    share = (seconds["check"] + seconds["save"] / toy.save_every) / seconds["step"]
    print(
        f"  a toy checkpoint takes {seconds['save'] * 1e3:.0f} ms, agreeing and logging {seconds['check'] * 1e6:.0f} us a step;"
    )
    print(f"  with a checkpoint every {toy.save_every} steps that is {share:.2%} of a full step")
    report |= {"save_seconds": seconds["save"], "reliability_share": share}


def bench_memory(args, config, report):
    if not Path("/proc/self/status").exists():
        return print("  memory: read from /proc, which this system does not have; not run")
    with tempfile.TemporaryDirectory() as folder:
        toy = f"import runpy, sys; sys.argv = ['train.py', '--steps', '30', '--out', '{folder}/run']"
        commands = {
            "toy run": f"{toy}\ntry: runpy.run_path('train.py', run_name='__main__')\nexcept SystemExit: pass",
            "preparing the manual": f"import prepare; prepare.prepare(prepare.manual, '{folder}/corpus', 4096)",
        }
        for name, code in commands.items():
            code += "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
            shown = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout
            peak = int(shown.split()[-1]) * 1024
            print(f"  peak memory of {name:20} {peak / 2**20:6.0f} MiB")
            report[f"peak_bytes_{name.replace(' ', '_')}"] = peak


BENCHES = {
    "paths": bench_paths,
    "methods": bench_methods,
    "rival": bench_rival,
    "over": bench_over,
    "data": bench_data,
    "reliability": bench_reliability,
    "memory": bench_memory,
}


def main():
    parser = argparse.ArgumentParser(description="Time steps, paths, batches; measure memory.")
    parser.add_argument("--only", choices=BENCHES)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = transformer.Config(args.layers, args.width, args.heads, 4 * args.width, args.seq, args.vocab, 0.0)
    if args.worker:
        return worker(args, config)
    train.steady_memory()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    shape = f"{config.layers} x {config.width}, sequence {config.seq}, batch {args.batch}"
    print(f"\n  {machine}; {shape}; medians of {args.rounds} rounds\n")
    report = {"machine": machine, "command": " ".join(sys.argv)}
    for name in [args.only] if args.only else BENCHES:
        BENCHES[name](args, config, report)
        print()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
