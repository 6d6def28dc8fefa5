"""The log's numbers in TensorBoard and Weights & Biases, each where it is installed."""

import json
import shutil
import time

import pytest

from engine import checkpoint, mirror, options
from test_faults import at
from test_train import events, go


def test_numbers_of_an_event():
    step = {"step": 7, "loss": 2.5, "stage": 1, "layers": [0, 3], "changed": {}, "fine": True}
    assert mirror.numbers("step", step) == {"step/loss": 2.5, "step/stage": 1, "step/layers": 2}
    shown = mirror.numbers("eval", {"step": 7, "loss": 2.5, "subnetworks": {"6": 3.0, "4.5": 3.5}})
    assert shown == {"eval/loss": 2.5, "eval/loss_6_layers": 3.0, "eval/loss_4.5_layers": 3.5}


@pytest.mark.parametrize("name", ["tensorbored", "wandb,"])
def test_what_is_not_there_is_refused(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        options.parse(["--log_to", name])
    assert stopped.value.code == 2 and "--log_to" in capsys.readouterr().err


def test_what_is_not_installed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(mirror.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        options.parse(["--log_to", "wandb"])
    assert stopped.value.code == 2 and "pip install wandb" in capsys.readouterr().err


def test_a_mirror_that_fails_ends_no_run(tiny, monkeypatch, capsys):
    shown = []

    def breaks(run, step, flags):
        return lambda event, facts: shown.append(event) if len(shown) < 2 else [][event]

    monkeypatch.setitem(mirror.KINDS, "tensorboard", breaks)
    monkeypatch.setattr(mirror, "check", lambda names: None)
    run = go(tiny, "--log_to", "tensorboard")
    assert shown == ["run", "step"] and len(events(run, "step")) == 12
    assert capsys.readouterr().err.count("training goes on without it") == 1


def test_tensorboard_has_the_log_and_forgets_what_came_after_a_checkpoint(tiny, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags, copy = [*tiny, "--save_every", "4", "--keep", "9", "--log_to", "tensorboard"], tmp_path / "copy"
    shutil.copytree(go(flags), copy)
    for folder in checkpoint.folders(copy)[1:]:
        shutil.rmtree(folder)
    go(at(flags, copy))
    shown = EventAccumulator(str(copy / "tensorboard")).Reload()
    losses = [(s.step, s.value) for s in shown.Scalars("step/loss")]
    assert losses == [(e["step"], pytest.approx(e["loss"])) for e in events(copy, "step")]
    assert {"eval/loss_2_layers", "step/layers", "done/loss"} <= set(shown.Tags()["scalars"])


def test_weights_and_biases_has_the_log(tiny, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = go(tiny, "--log_to", "wandb")
    wandb.finish()
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    wanted = [b"step/layers", b"eval/loss_2_layers", b"done/loss", json.dumps(events(run)[-1]["loss"]).encode()]
    limit = time.monotonic() + 30  # another process writes it
    while not all(part in file.read_bytes() for part in wanted) and time.monotonic() < limit:
        time.sleep(0.1)
    assert all(part in file.read_bytes() for part in wanted)
