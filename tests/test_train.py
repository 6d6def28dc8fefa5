import json
import math
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import methods
import model as transformer
import train
from engine import ROOT, checkpoint, log, options
from processes import script
from raptr import Subnetwork
from text import prepare


def go(flags, *more):
    """Run train.py in this process."""
    assert train.start(options.parse([*flags, *map(str, more)])) == 0
    return Path(flags[flags.index("--out") + 1])


def events(run, kind=None):
    found = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [e for e in found if kind in (None, e["event"])]


def trajectory(run):
    """What must not depend on interruptions, to the last digit."""
    keep = ("step", "loss", "grad_norm", "lr", "stage", "layers", "tokens", "flops")
    return [{k: e[k] for k in keep} for e in events(run, "step")]


def weights(run):
    file = max(run.glob("step_*[0-9]")) / "model.safetensors"
    return {name: tensor.clone() for name, tensor in load_file(file).items()}  # a copy: the file may be damaged later


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def command(flags, *more):
    return script("train.py", *flags, *more)


# ---- the run


def test_it_learns_and_logs_what_was_promised(tiny):
    run = go(tiny, "--lr", "5e-3", "--init_std", 0.125, "--steps", 300, "--eval_every", 80, "--eval_sequences", 64)
    start, steps, evals = events(run, "run")[0], events(run, "step"), events(run, "eval")
    done = events(run, "done")[0]
    assert done["loss"] == evals[-1]["loss"] < start["unigram_loss"] - 0.3
    assert [e["step"] for e in steps] == list(range(1, 301))
    assert [e["step"] for e in evals] == [80, 100, 160, 200, 240, 300]
    assert [len(e["layers"]) for e in steps] == [2] * 100 + [3] * 100 + [4] * 100
    assert start["relative_flops_layers"] == pytest.approx(4 / 3) and 1 < start["relative_flops_step"] < 4 / 3
    assert steps[-1]["flops"] * start["relative_flops_step"] == pytest.approx(
        300 * (steps[-1]["flops"] - steps[-2]["flops"])
    )
    assert steps[-1]["tokens"] == 300 * 8 * 32 and set(evals[0]["subnetworks"]) == {"2", "3"}
    assert {"params", "data", "versions", "seed", "world_size"} <= set(start)
    assert (run / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["a$_$b", "日本語", *["\udcff"] * (sys.platform == "linux")])
def test_any_name_of_a_run_folder_can_be_drawn(name, tmp_path, capsys, recwarn):
    """Without its checkpoints too, which a person may have deleted."""
    (tmp_path / name).mkdir()
    lines = (ROOT / "results" / "toy.jsonl").read_text().splitlines(keepends=True)
    steps = [json.dumps({"event": "step", "step": step, "loss": 6.0, "layers": [0]}) + "\n" for step in (1, 2)]
    (tmp_path / name / "log.jsonl").write_text("".join([lines[0], *steps, *lines[1:]]))
    log.draw_run(tmp_path / name)
    assert (tmp_path / name / "loss.png").stat().st_size > 5000 and not recwarn.list
    if name.isascii():
        log.summarize(tmp_path / name)
        assert "files           " in capsys.readouterr().out


def test_the_learning_rate_warms_up_and_decays():
    flags = "--method full --steps 100 --warmup 10 --lr 1 --min_lr 0.1"
    linear, cosine, wsd = (options.parse([*flags.split(), "--lr_schedule", s]) for s in ("linear", "cosine", "wsd"))
    for args in (linear, cosine, wsd):
        assert [train.learning_rate(args, step) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
        assert train.learning_rate(args, 100) == pytest.approx(0.1)
    assert train.learning_rate(linear, 55) == pytest.approx(0.55)
    assert train.learning_rate(cosine, 55) == pytest.approx(0.55)
    assert train.learning_rate(cosine, 25) > train.learning_rate(linear, 25)
    assert [train.learning_rate(wsd, step) for step in (11, 79, 80, 90)] == pytest.approx([1, 1, 1, 0.55])


@pytest.mark.parametrize("skipped_grad", ["none", "zero"])
def test_a_skipped_layer_rests(tiny, skipped_grad):
    run = go(tiny, "--steps", 7, "--save_every", 1, "--keep", 9, "--skipped_grad", skipped_grad, "--weight_decay", 0.1)
    method = methods.choose(options.parse([*tiny, "--steps", "7"]))
    touched = 0
    for step in range(2, 7):
        before, after = (load_file(run / f"step_{s:08d}" / "model.safetensors") for s in (step - 1, step))
        before_o, after_o = (load_file(run / f"step_{s:08d}" / "optimizer.safetensors") for s in (step - 1, step))
        path = method.subnetwork(step)
        kept = set(range(4)) if path is None else set(path.layers)
        for name in before:
            layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
            if layer is None or layer in kept:
                assert not torch.equal(before[name], after[name]), name
            elif skipped_grad == "none":
                assert torch.equal(before[name], after[name])
                for moment in ("step", "exp_avg", "exp_avg_sq"):
                    assert torch.equal(before_o[f"{moment}.{name}"], after_o[f"{moment}.{name}"])
            elif name.endswith("weight") and before_o[f"exp_avg.{name}"].any():
                touched += not torch.equal(before[name], after[name])
    assert touched if skipped_grad == "zero" else not touched


def test_every_parameter_is_in_the_optimizer_once():
    model = transformer.BERT(transformer.Config(layers=2, width=16, heads=2, mlp=32, vocab=100, seq=16))
    optimizer = train.make_optimizer(model, options.parse(["--method", "full"]))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.parameters()}
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (not ("norm" in name or name.endswith("bias") or name == "head.2.weight")), name


def test_micro_batches_add_up(tiny, tmp_path):
    whole = go(tiny, "--dropout", 0, "--dtype", "float32", "--out", tmp_path / "run")
    trained = trajectory(whole)
    parts = go([*tiny[:-1], str(tmp_path / "parts")], "--dropout", 0, "--dtype", "float32", "--micro_batch", 2)
    for a, b in zip(trained, trajectory(parts)):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a["layers"] == b["layers"]


def test_constant_keeps_its_depth_to_the_end(tiny):
    run = go(tiny, "--method", "constant", "--mean_depth", 3)
    assert {len(e["layers"]) for e in events(run, "step")} == {3}
    assert events(run, "run")[0]["relative_flops_layers"] == pytest.approx(4 / 3)


def test_full_trains_everything(tiny):
    run = go(tiny, "--method", "full")
    assert all(e["layers"] == [0, 1, 2, 3] for e in events(run, "step")) and events(run, "eval")[0]["subnetworks"] == {}


def test_init_takes_over_weights(tiny, tmp_path):
    first = go(tiny)
    second = go(
        [*tiny[:-1], str(tmp_path / "second")], "--init", first, "--steps", 3, "--lr", "1e-12", "--weight_decay", 0
    )
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, atol=1e-9, rtol=0)


def test_weights_that_do_not_fit_leave_nothing_behind(tiny, tmp_path):
    first = go(tiny)
    shown = command([*tiny[:-1], str(tmp_path / "second")], "--init", first, "--width", 32)
    assert shown.returncode == 2 and "--init" in shown.stderr and not (tmp_path / "second").exists()


# ---- continuing


def test_a_run_continues_exactly_from_any_step(tiny):
    """Paths of exact lengths do in test_faults.py."""
    more = ["--sampling", "bernoulli", "--dropout", 0.1, "--save_every", 1, "--keep", 99, "--eval_every", 5]
    reference = go(tiny, *more)
    expected, final = trajectory(reference), weights(reference)
    for step in (1, 3, 4, 5, 8, 11):
        for folder in reference.glob("step_*"):
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        go(tiny, *more, "--eval_every", step)  # looking more or less often changes nothing
        assert trajectory(reference) == expected and same(weights(reference), final)
        assert [e["event"] for e in events(reference)].count("run") == 1


def test_a_finished_run_only_says_so(tiny, capsys):
    run = go(tiny)
    before = events(run)
    capsys.readouterr()
    go(tiny)
    assert events(run) == before and "held-out loss" in capsys.readouterr().out


def test_only_damaged_checkpoints_end_with_4(tiny):
    run = go(tiny)
    for file in run.glob("step_*/manifest.json"):
        file.unlink()
    for _ in range(2):  # the second start must not begin afresh either
        shown = command(tiny)
        assert shown.returncode == 4 and "step_00000012" in shown.stderr, shown.stderr


def test_checkpoints_that_are_gone_do_not_begin_a_run_afresh(tiny):
    """The log says that there were some: exit code 4, and nothing changes."""
    run = go(tiny)
    shutil.rmtree(run / "step_00000012")
    before = (run / "log.jsonl").read_bytes()
    shown = command(tiny)
    assert shown.returncode == 4 and "none is left" in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr
    assert (run / "log.jsonl").read_bytes() == before


def older(run, **changed):
    """Make a run one of an earlier version, whose config.json has flags that no longer exist. Only its first half is
    left."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**options.REMOVED, **config, **changed}))
    for folder in checkpoint.folders(run)[6:]:
        shutil.rmtree(folder)


@pytest.mark.parametrize("method", ["raptr", "pld", "layerdrop", "ramp", "jump"])
def test_a_run_of_an_earlier_version_continues(tiny, method):
    more = ["--method", method, *(["--stages", "2-4"] if method == "jump" else []), "--save_every", 1, "--keep", 99]
    run = go(tiny, *more)
    expected, final = trajectory(run), weights(run)
    older(run)
    go(tiny, *more)
    assert trajectory(run) == expected and same(weights(run), final) and events(run, "resume")[0]["changed"] == {}


@pytest.mark.parametrize("name, value", [("theta_bar", 0.4), ("jump_from", 2), ("drop_gate", "batch")])
def test_a_run_with_a_flag_that_no_longer_exists_is_refused(tiny, name, value):
    run = go(tiny, "--save_every", 1, "--keep", 99)
    older(run, **{name: value})
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    shown = command(tiny, "--save_every", 1, "--keep", 99)
    assert shown.returncode == 2 and f"--{name}" in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_an_old_run_that_drew_layers_for_each_sequence_is_refused(tiny):
    flags = [flag for flag in tiny if flag not in ("--stages", "2-3-4")] + ["--method", "decreasing"]
    run = go(flags, "--save_every", 1, "--keep", 99)
    older(run)
    shown = command(flags, "--save_every", 1, "--keep", 99)
    assert shown.returncode == 2 and "each sequence" in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr


def test_two_runs_in_one_folder(tiny, tmp_path):
    first = subprocess.Popen(
        [sys.executable, "train.py", *tiny, "--steps", "100000"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        while first.poll() is None and not (tmp_path / "run" / "log.jsonl").exists():
            time.sleep(0.02)
        shown = command([*tiny, "--steps", "100000"])
        assert shown.returncode == 2 and "another process" in shown.stderr
    finally:
        first.kill()
        first.wait()


# ---- what goes wrong


def test_a_loss_that_is_not_finite_ends_with_3(tiny, tmp_path):
    shown = command(tiny, "--lr", "1e20", "--clip", 0, "--warmup", 0, "--save_every", 1, "--keep", 99)
    assert shown.returncode == 3 and "step" in shown.stderr and "layers" in shown.stderr, shown.stderr
    saved = sorted((tmp_path / "run").glob("step_*[0-9]"))
    assert saved
    assert all(torch.isfinite(t).all() for folder in saved for t in load_file(folder / "model.safetensors").values())


BAD = """
--layers 0 | --layers
--layers x | --layers
--layers 2.5 | --layers
--steps -3 | --steps
--lr nan | --lr
--lr inf | --lr
--lr 0 | --lr
--width 65 | --heads
--heads 3 | --heads
--heads 64 --positions rotary | rotary
--batch 6 --micro_batch 4 | --micro_batch
--dropout 1 | --dropout
--clip -1 | --clip
--vocab 10 | --vocab
--seq 4 | --seq
--warmup 12 | --warmup
--stages 2-1-4 | --stages
--stages 2-3 | --stages
--stages 2-3-5 | --stages
--stages two-four | --stages
--stages 1-4 | --fixed
--fixed 0,9 | --fixed
--fixed start | --fixed
--full_warmup 12 | --full_warmup
--alpha x | --alpha
--method constant --mean_depth 9 | --mean_depth
--method raptor | raptr
--norm middle | --norm
--layres 4 | --layers
--alpha 1000 | --alpha
--steps 1e400 | --steps
--seed 99999999999999999999 | --seed
--stages 2-nan-4 | --stages
--method midas --stages 4-4-2 | --stages
--method decreasing --layers 2 | --layers
--method decreasing --mean_depth 2.9 | --mean_depth
--method jump --mean_depth 3.99 --stages 3-4 | --mean_depth
--method pld --drop_rate 0.1 | --drop_rate
--lerning_rate 1e-3 | did you mean --lr?
--weigth_decay 0 | did you mean --weight_decay?
--learning_rate 1e-3 | did you mean --lr?
--method mslt --stages 2-4 --skipped_grad zero | --skipped_grad
--unknown 4 | --unknown
--seed -1 | --seed
--keep 0 | --keep
--eval_sequences 0 | --eval_sequences
--data /nowhere | /nowhere
--config /nowhere.toml | /nowhere.toml
--init /nowhere | /nowhere
"""


@pytest.mark.parametrize(
    "flags, word", [*(line.split(" | ") for line in BAD.strip().splitlines()), (f"--lr 1{'0' * 400}", "--lr")]
)
def test_a_bad_flag_is_one_sentence_and_nothing_is_created(tiny, tmp_path, flags, word, capsys):
    if "/nowhere" in word and "toml" not in word:  # found only after torch is loaded
        shown = command(tiny, *flags.split())
        code, error = shown.returncode, shown.stderr
    else:
        with pytest.raises(SystemExit) as stopped:
            options.parse([*tiny, *flags.split()])
        code, error = stopped.value.code, capsys.readouterr().err
    assert code == 2 and word in error and error.count("\n") == 1, error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "toml, word",
    [
        ("layerz = 4", "layers"),
        ("lerning_rate = 1e-3", "did you mean lr?"),
        ("layers = 'four'", "--layers"),
        ("layers = ", "p.toml"),
        ("[model]\nlayers = 4", "model"),
    ],
)
def test_a_bad_preset_is_refused(tmp_path, toml, word, capsys):
    (tmp_path / "p.toml").write_text(toml)
    with pytest.raises(SystemExit) as stopped:
        options.parse(["--config", str(tmp_path / "p.toml")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and word in error and error.count("\n") == 1, error


def test_a_flag_beats_the_preset(tmp_path):
    (tmp_path / "p.toml").write_text('layers = 6\nmethod = "full"\ncompile = true')
    args = options.parse(["--config", str(tmp_path / "p.toml"), "--layers", "8", "--no-compile"])
    assert (args.layers, args.method, args.compile, args.mlp) == (8, "full", False, 4 * 768)


@pytest.mark.parametrize("preset", sorted(p.name for p in (ROOT / "configs").glob("*.toml")))
def test_every_preset_is_good(preset):
    flags = tomllib.loads((ROOT / "configs" / preset).read_text())
    args = options.parse(["--config", f"configs/{preset}"])
    assert all(getattr(args, name) == value for name, value in flags.items())


def test_a_setting_that_is_ignored_earns_a_warning(capsys):
    options.parse(["--method", "full", "--stages", "6-12", "--lr", "1e-3"])
    assert "--stages" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu(tiny, tmp_path):
    shown = command(tiny, "--device", "cuda")
    assert shown.returncode == 2 and "--device" in shown.stderr and not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    tmp_path.chmod(0o500)
    shown = command(tiny)
    tmp_path.chmod(0o700)
    assert shown.returncode == 2 and "--out" in shown.stderr


def test_every_method_has_its_own_published_plan():
    """Of a plain `--method NAME`, with twelve layers."""
    plans = {}
    for name in ("raptr", "stacking", "progressive", "midas", "mslt"):
        plans[name] = [stage.length for stage in methods.choose(options.parse(["--method", name, "--layers=12"])).plan]
    assert plans == {
        "raptr": [6, 8, 10, 12],
        "stacking": [6, 9, 12],
        "progressive": [3, 6, 12],
        "midas": [6, 9, 12],
        "mslt": [6, 9, 12, 12],
    }


def test_a_full_disk_does_not_end_the_training(tiny, monkeypatch, capsys):
    save, failed = checkpoint.save_file, []

    def full_disk(tensors, path, about):
        if len(failed) < 2:
            failed.append(path)
            raise checkpoint.SafetensorError("No space left on device")
        save(tensors, path, about)

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    run = go(tiny, "--save_every", 4)
    assert events(run)[-1]["event"] == "done" and len(failed) == 2 and "No space left" in capsys.readouterr().err
    assert [folder.name for folder in run.glob("step_*")] == ["step_00000012"] and not list(run.glob("*.tmp"))


def test_help_does_not_wait_for_torch():
    code = "import sys; sys.argv = ['train.py', '--help']; import runpy\n"
    code += "try: runpy.run_path('train.py', run_name='__main__')\n"
    code += "except SystemExit: assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--stages" in shown.stdout, shown.stderr


def test_auto_stages_are_the_papers():
    for layers, stages in ((12, [6, 8, 10, 12]), (24, [12, 16, 20, 24])):
        method = methods.choose(options.parse(["--layers", str(layers), "--stages", "auto", "--steps", "100"]))
        assert [stage.length for stage in method.plan] == stages
        assert isinstance(method.subnetwork(1), Subnetwork) and math.isclose(method.expected_layers(1), stages[0])


def test_weights_of_another_tokenizer_are_refused(tiny, text, tmp_path, capsys):
    run, other = go(tiny), tmp_path / "other"
    prepare.prepare(lambda: ((d[::-1], True) for d in text), other, 512)
    flags = [*tiny[: tiny.index("--data")], "--data", str(other), "--out", str(tmp_path / "next"), "--init", str(run)]
    assert train.start(options.parse(flags)) == 2 and "another tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "next").exists()


def test_a_wrong_denoiser_is_found_before_a_corpus_is_made(tmp_path, capsys):
    (tmp_path / "some.txt").write_text("Some words.\n\nSome more of them.")
    text, run = str(tmp_path / "some.txt"), str(tmp_path / "run")
    flags = ["--arch", "ul2", "--denoisers", "r3,foo", "--data", text, "--out", run]
    assert train.start(options.parse(flags)) == 2
    assert "foo" in capsys.readouterr().err and not (tmp_path / "run").exists()
