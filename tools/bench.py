"""How fast is a step, and does a path save what it should? All figures are ratios of things timed in turn.

    python bench.py                     everything below, on this machine
    python bench.py --only paths        a full step against paths of 6, 8, 10 of 12 layers
    python bench.py --only width        the same in width: parts of the heads and hidden neurons of all layers
    python bench.py --only ul2          the same of a UL2 decoder
    python bench.py --only methods      every method over a whole run, and a growth
    python bench.py --only rival        tokens/s against `transformers`' BertForMaskedLM, if that is installed
    python bench.py --only over         what hf.over saves of a step of `transformers`' BERT and Llama, if that is installed
    python bench.py --only data         what making a batch takes of a step
    python bench.py --only reliability  what checks, log and checkpoints take of the toy
    python bench.py --only memory       peak memory of a short toy run and of preparing the default corpus
    python bench.py --only loss         cross-entropy in chunks (--loss_chunk) against all at once, large vocabularies
    python bench.py --only encoding     text to token shards on all cores against sentencepiece alone (--input: your own text)
    python bench.py --device cuda       the presets at full size, on a GPU (bench_presets.py)

Each round times one step of every candidate, one after another, so that a slow moment of the machine hits all of them;
a ratio is the median over the rounds of that round's ratio, unless it says otherwise. Let nothing else run meanwhile.

efficiency of a path = (time of a full step / time of its step) / (FLOPs of a full step / FLOPs of its step); 1 is ideal.
"""

import argparse
import dataclasses
import gzip
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import denoisers
import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import methods
import model as transformer
import stacking
import train
from engine import checkpoint, options, parallel
from methods import width
from raptr import RaPTr, Stage, whole
from text import prepare
from tools import bench_presets, hf
from tools.timing import interleaved

HERE = Path(__file__).parent


def trainer(model, loss, dtype, optimizer=None):
    """A whole training step, as train.py takes it: forward, backward, clipping, fused AdamW."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

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
    optimizer = train.make_optimizer(model, options.parse([]))
    inside = trainer(model, lambda subnetwork: model(batch, subnetwork) / batch[2].numel(), dtype, optimizer)

    def step(subnetwork):
        taken = width.cut(model, subnetwork, optimizer)
        loss = inside(subnetwork)
        width.put(model, taken)
        return loss

    return step


def ul2_step(config, size, dtype, compile=False):
    """(a step, targets in a row of its batch, in the mean) of a UL2 decoder on rows of the published mixture."""
    words = config.vocab - denoisers.extra_tokens(config.seq)
    generator = data.rng(0, "bench")
    names = [*denoisers.UL2.split(",")] * size
    rows = denoisers.denoise(
        generator.integers(prepare.SPECIAL, words, (size, config.seq - 1)), names[:size], words, config.seq, generator
    )
    model, batch = transformer.UL2(config), [torch.from_numpy(part) for part in rows]
    count = int((batch[2] != data.NO_TARGET).sum())
    if compile:
        train.compile_blocks(model)
    return trainer(model, lambda subnetwork: model(batch, subnetwork) / count, dtype), count / size


def compare_paths(args, config, step, targets, report, name="efficiency", part="depth"):
    L = config.layers
    lengths = (
        [L // 2, 2 * L // 3, 5 * L // 6] if part == "depth" else [L // 2, 3 * L // 4]
    )  # whole numbers of layers, of heads
    paths = {k: RaPTr([Stage(1, 10**9, k)], L, {0, L - 1}, part=part, slices=config.heads) for k in lengths}
    turn = iter(range(1, 10**9))
    candidates = {"full": lambda: step(None)}
    candidates |= {k: lambda k=k: step(paths[k].subnetwork(next(turn))) for k in lengths}  # a new path each time
    times = interleaved(candidates, args.rounds)
    cost = {k: transformer.flops(config, args.batch, targets, k) for k in [*lengths, L]}
    label = f"{config.arch}, {part}, {args.dtype}{', compiled' if args.compile else ''}"
    print(f"  paths, {label:30} step    FLOPs    speed-up   ideal   efficiency")
    print(f"    full, {L} layers           {median(times['full']) * 1e3:6.1f} ms")
    for k in lengths:
        speed = median([a / b for a, b in zip(times["full"], times[k])])
        ideal = cost[L] / cost[k]
        took, share = median(times[k]) * 1e3, cost[k] / cost[L]
        own = speed / ideal
        print(
            f"    path of {k:2}                {took:6.1f} ms  {share:6.1%}   {speed:8.3f}  {ideal:6.3f}   {own:10.3f}"
        )
        report[f"{name}_{k}_of_{L}"] = own


def bench_paths(args, config, report):
    step = our_step(config, args.batch, args.dtype, args.compile)
    compare_paths(args, config, step, data.masked_per_window(config.seq), report)


def bench_width(args, config, report):
    """Half and three quarters of the heads and hidden neurons of all layers, in place of as many layers."""
    step = our_step(config, args.batch, args.dtype, args.compile)
    compare_paths(args, config, step, data.masked_per_window(config.seq), report, "efficiency_width", "width")


def bench_ul2(args, config, report):
    """The block of configs/ul2_1p6b.toml and ul2_toy.toml: gated, RMS norms, rotary positions, MLP 2.5 times the width."""
    vocab = config.vocab + denoisers.extra_tokens(config.seq)
    shape = {
        "arch": "ul2",
        "vocab": vocab,
        "mlp": 5 * config.width // 2,
        "gated": True,
        "rms": True,
        "positions": "rotary",
    }
    config = dataclasses.replace(config, **shape)
    step, targets = ul2_step(config, args.batch, args.dtype, args.compile)
    compare_paths(args, config, step, targets, report, "efficiency_ul2")


def bench_methods(args, config, report):
    """Every method over a whole short run: each of its steps beside a full one."""
    step, slots, T = (
        our_step(config, args.batch, args.dtype, args.compile),
        data.masked_per_window(config.seq),
        3 * args.rounds,
    )
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
    train.grow(
        train.state(model, optimizer), stacking.stacking(config.layers // 2, config.layers), flags, config, ranks
    )
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
    """One program of a comparison, in a process of its own: takes a step for every line it reads."""
    if args.worker.startswith("loss"):
        return loss_worker(args, config)
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


def hire(name):
    command = [sys.executable, *sys.argv, "--worker", name]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process):
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def bench_rival(args, config, report):
    if not importlib.util.find_spec("transformers"):
        return print("  rival: transformers is not installed (pip install transformers); not run")
    names = ["ours", "ours, compiled", "sdpa", "eager", "sdpa, steady memory", "eager, steady memory"]
    workers = {name: hire(name) for name in names}
    times = interleaved(
        {name: lambda process=process: ask(process) for name, process in workers.items()}, args.rounds, pause=0.3
    )
    for process in workers.values():
        process.communicate()
    per_step = args.batch * config.seq
    pairs = [(f"sdpa{memory}", f"eager{memory}") for memory in ("", ", steady memory")]
    plain, steady = (min(pair, key=lambda name: median(times[name])) for pair in pairs)
    print(
        f"  full step against transformers {importlib.metadata.version('transformers')} BertForMaskedLM, {args.dtype},"
    )
    print("  each in a process of its own, in turn; `steady memory` lends them the malloc setting that train.py makes;")
    print("  medians of tokens/s, and of each round's ratio to its faster one")
    for name in names:
        ratios = [median([b / a for a, b in zip(times[name], times[rival])]) for rival in (plain, steady)]
        speed, (ratio, lent) = per_step / median(times[name]), ratios
        print(f"    {name:20} {speed:8,.0f} tokens/s   {ratio:5.2f} times {plain}   {lent:5.2f} times {steady}")
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
    print(
        f"  hf.over, transformers {importlib.metadata.version('transformers')}, {args.dtype}; ideal: by counted FLOPs"
    )
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
    toy = transformer.Config.of(options.parse([]), corpus.vocab)
    step, turn = our_step(toy, 16, args.dtype), iter(range(1, 10**9))
    times = interleaved({"batch": lambda: corpus.batch(0, next(turn), 16, 64), "step": lambda: step(None)}, args.rounds)
    share = median([a / b for a, b in zip(times["batch"], times["step"])])
    print(f"  making a toy batch takes {median(times['batch']) * 1e3:.2f} ms, {share:.2%} of a full step")
    report["data_share"] = share


def bench_reliability(args, config, report):
    """What safety takes of the toy: checks and log at each step, a checkpoint every 400, beside a full step."""
    toy = options.parse(["--method=full"])
    toy_config = transformer.Config.of(toy, toy.vocab)
    ranks, turn = parallel.Ranks("cpu", 60), iter(range(1, 10**9))
    model, optimizer = train.build(toy, toy_config, 12, ranks)
    step = our_step(toy_config, 16, args.dtype)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log.jsonl"), "a") as log:
        line = {
            "event": "step",
            "loss": 1 / 3,
            "grad_norm": 1 / 7,
            "layers": [*range(12)],
            "tokens": 10**6,
            "flops": 10**12,
        }

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
            shown = subprocess.run(
                [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True
            ).stdout
            peak = int(shown.split()[-1]) * 1024
            print(f"  peak memory of {name:20} {peak / 2**20:6.0f} MiB")
            report[f"peak_bytes_{name.replace(' ', '_')}"] = peak


LOSS_TARGETS, LOSS_CHUNK = 1024, 128


def loss_worker(args, config):
    """Forward and backward of one cross-entropy for every line read, after a first line that asks for nothing."""
    train.steady_memory()
    _, vocab, chunk = args.worker.split(",")
    config = dataclasses.replace(config, arch="ul2", layers=0, vocab=int(vocab), loss_chunk=int(chunk))
    model, x = transformer.UL2(config), torch.randn(LOSS_TARGETS, config.width, requires_grad=True)
    targets = torch.randint(prepare.SPECIAL, config.vocab, (LOSS_TARGETS,))
    for number, _ in enumerate(sys.stdin):
        if number:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
                loss = model.cross_entropy(x, targets)
            loss.backward()
            model.zero_grad(set_to_none=True)
        print("done", flush=True)


def memory_of(pid, what):
    """Bytes of a process: what it has (VmRSS), or had at most (VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [int(line.split()[1]) for line in lines if line.startswith(what)][0] * 1024


def bench_loss(args, config, report):
    if not Path("/proc/self/status").exists():
        return print("  loss: memory is read from /proc, which this system does not have; not run")
    print(
        f"  cross-entropy of {LOSS_TARGETS} targets, width {config.width}, {args.dtype}: peak memory beside the model's own;"
    )
    print(f"    vocabulary   at once, MiB   in chunks of {LOSS_CHUNK}, MiB   of the memory   of the time")
    for vocab in (32_768, 131_072, 256_000):
        workers = {chunk: hire(f"loss,{vocab},{chunk}") for chunk in (0, LOSS_CHUNK)}
        for process in workers.values():
            ask(process)
        before = {chunk: memory_of(process.pid, "VmRSS") for chunk, process in workers.items()}
        calls = {chunk: lambda process=process: ask(process) for chunk, process in workers.items()}
        times = interleaved(calls, max(3, args.rounds // 3), warmup=1, pause=0.3)
        peak = {chunk: memory_of(process.pid, "VmHWM") - before[chunk] for chunk, process in workers.items()}
        for process in workers.values():
            process.communicate()
        memory = peak[LOSS_CHUNK] / peak[0]
        duration = median([b / a for a, b in zip(times[0], times[LOSS_CHUNK])])
        print(
            f"    {vocab:10,}   {peak[0] / 2**20:12,.0f}   {peak[LOSS_CHUNK] / 2**20:22,.0f}   {memory:13.2f}   {duration:11.2f}"
        )
        report |= {f"loss_chunk_memory_{vocab}": memory, f"loss_chunk_time_{vocab}": duration}


PREPARE = """
import json, os, sys, time
from text import prepare
if __name__ == "__main__":
    files, out, tokenizer = prepare.text_files(sys.argv[3:]), sys.argv[1], sys.argv[2]
    began, before = time.perf_counter(), sum(os.times()[:4])
    prepare.prepare(files, out, 0, tokenizer=tokenizer)
    took, worked = time.perf_counter() - began, sum(os.times()[:4]) - before
    meta = json.load(open(os.path.join(out, "meta.json")))
    print(json.dumps([sum(meta[split]["tokens"] - meta[split]["documents"] for split in ("train", "val")), took, worked]))
"""


def manual_files(folder, count):
    """`count` files of the manual, each repeated until it is a part of its own to prepare.py."""
    text = "\n\n".join(document for document, _ in prepare.manual()) + "\n\n"
    files = [folder / f"{number}.txt" for number in range(count)]
    for file in files:
        file.write_text(text * (prepare.PART // len(text) + 1))
    return files


def rates_of(call):
    """Tokens a second, and a second of processor time, of a call that gives lists of them."""
    began, before = time.perf_counter(), time.process_time()
    count = sum(map(len, call()))
    return count / (time.perf_counter() - began), count / (time.process_time() - before)


def rates_of_preparing(files, folder, tokenizer):
    """The same of prepare.py, in a process of its own, without that one's start, with the start of those it starts."""
    command = [sys.executable, "-c", PREPARE, folder / "out", tokenizer, *files]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    shown = subprocess.run([*map(str, command)], env=env, stdout=subprocess.PIPE, check=True).stdout
    shutil.rmtree(folder / "out")
    count, took, worked = json.loads(shown)
    return count / took, count / worked


def some_documents(files):
    """Pieces of the first documents, as prepare.py encodes them."""
    texts, size = [], 0
    for text, _ in prepare.cleaned(prepare.read_files(prepare.text_files(files))):
        texts.append(text)
        size += len(text)
        if size > prepare.PART // 2:
            break
    return texts


def bench_encoding(args, config, report):
    """Tokens a second of prepare.py on all cores, the tokenizer given, against sentencepiece's own of the same documents."""
    cores, tokenizer = os.cpu_count(), prepare.prepared() / "tokenizer.model"
    encoder = prepare.load_tokenizer(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.input:
            files = {"prepare.py, the given text": args.input}
        else:
            made = manual_files(folder, 4 * cores)
            with gzip.open(folder / "all.txt.gz", "wb", 1) as file:
                file.writelines(part.read_bytes() for part in made[:cores])
            files = {f"prepare.py, {len(made)} files": made, "prepare.py, one .txt.gz": [folder / "all.txt.gz"]}
        texts = some_documents([*files.values()][0])
        calls = {
            "alone": lambda: rates_of(lambda: map(encoder.encode, texts)),
            f"sentencepiece, {cores} threads": lambda: rates_of(lambda: encoder.encode(texts, num_threads=cores)),
        }  # the latter: what this machine's cores are worth to sentencepiece itself
        calls |= {
            name: lambda given=given: rates_of_preparing(given, folder, tokenizer) for name, given in files.items()
        }
        rounds = [{name: call() for name, call in calls.items()} for _ in range(max(3, args.rounds // 5))]
    version, alone = importlib.metadata.version("sentencepiece"), median([found["alone"][0] for found in rounds])
    print(f"  encoding, {cores} cores: sentencepiece {version} alone, one process {alone:11,.0f} tokens/s")
    for name in [*calls][1:]:
        rate = median([found[name][0] for found in rounds])
        ratio, worked = (median([found[name][i] / found["alone"][i] for found in rounds]) for i in (0, 1))
        print(f"    {name:28} {rate:11,.0f} tokens/s, {ratio / cores:.3f} of {cores} times that", end="")
        print(f"; {worked:.2f} times as many in a second of processor time")
        report[f"encoding_{name.replace(',', '').replace(' ', '_')}"] = ratio / cores


BENCHES = {
    "paths": bench_paths,
    "width": bench_width,
    "ul2": bench_ul2,
    "methods": bench_methods,
    "rival": bench_rival,
    "over": bench_over,
    "data": bench_data,
    "reliability": bench_reliability,
    "memory": bench_memory,
    "loss": bench_loss,
    "encoding": bench_encoding,
}
AT_FULL_SIZE = {"presets": bench_presets.bench_presets}


def main():
    parser = argparse.ArgumentParser(description="Time steps, paths, batches; measure memory.")
    parser.add_argument("--only", choices=[*BENCHES, *AT_FULL_SIZE])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: presets, the only one made for it"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--input", nargs="+", help="text for --only encoding; without it the manual, repeated")
    parser.add_argument("--preset", help="presets: one of configs/, without .toml")
    parser.add_argument("--micro_batch", type=int, default=0, help="presets: sequences at a time; 0: by preset")
    parser.add_argument(
        "--sequences", type=int, default=0, help="presets: of a step; 0: the preset's batch, or its share"
    )
    parser.add_argument("--schedule", type=int, default=24, help="presets: steps that stand for the whole schedule")
    parser.add_argument("--peak", type=float, default=0.0, help="presets: the device's dense TFLOP/s; 0: by its name")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and args.only not in (None, *AT_FULL_SIZE):
        parser.exit(2, f"bench.py: --only {args.only} measures a CPU; with --device cuda there is --only presets\n")
    try:
        _ = args.input and prepare.text_files(args.input)
    except ValueError as error:
        parser.exit(2, f"bench.py: --input {error}\n")
    torch.manual_seed(0)
    config = transformer.Config(args.layers, args.width, args.heads, 4 * args.width, args.seq, args.vocab, 0.0)
    if args.worker:
        return worker(args, config)
    train.steady_memory()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    shape = f"{config.layers} x {config.width}, sequence {config.seq}, batch {args.batch}"
    print(f"\n  {machine}; {shape}; medians of {args.rounds} rounds\n")
    report = {"machine": machine, "command": " ".join(sys.argv)}
    chosen = [args.only] if args.only else AT_FULL_SIZE if args.device == "cuda" else BENCHES
    for name in chosen:
        try:
            (BENCHES | AT_FULL_SIZE)[name](args, config, report)
        except ValueError as error:
            parser.exit(2, f"bench.py: {error}\n")
        print()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
