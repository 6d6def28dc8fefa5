"""Checkpoints: safetensors and JSON, verified, never half-written, and no pickle anywhere.

A checkpoint is a folder RUN/step_00000100/ with tensor files, meta.json and, written last, manifest.json, which holds
the size and SHA-256 of every other file. It is built under a temporary name, flushed to disk, and renamed when
complete: a folder with the final name is complete, and a byte that changed later is found before anything is loaded.
Not here: when a run saves (engine/runs.py, train.py).
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine import log, parallel
from engine.errors import NoCheckpoint, NotFinite, UserError

# ----------------------------------------------------------------------------------------------------------------
# Models and optimizers, as tensors


def state(model, optimizer, keep=True):
    """All that a checkpoint holds, as {file: {name: tensor}}, the moments under the names of their weights.

    Sharded tensors are gathered, so all ranks must ask. keep: False on ranks that do not save: they take part in
    gathering one tensor at a time, and get empty groups. Tensors of a GPU are copied to the host.
    """
    groups = {"model": {}, "optimizer": {}}
    for name, p in model.named_parameters():
        moments = [("optimizer", f"{kind}.{name}", moment) for kind, moment in optimizer.state[p].items()]
        for group, key, tensor in [("model", name, p.detach()), *moments]:
            tensor = parallel.full(tensor)
            if keep:
                groups[group][key] = tensor.cpu()
    assert not keep or len(groups["optimizer"]) == 3 * len(groups["model"])
    return groups


def check_weights(model, tensors, where):
    """Raise UserError unless the names and shapes of `tensors` are those of the model's weights."""
    weights = dict(model.named_parameters())
    wrong = sorted(set(weights) ^ set(tensors)) or [n for n, p in weights.items() if p.shape != tensors[n].shape]
    if wrong:
        more = f"{wrong[0]} differs, and {len(wrong) - 1} more"
        raise UserError(f"{where}: its weights are not those of this model: {more}")


@torch.no_grad()
def load_weights(model, tensors, where):
    """Copy named tensors into a model. Raises UserError unless names and shapes are the model's."""
    check_weights(model, tensors, where)
    for name, p in model.named_parameters():
        parallel.copy_into(p, tensors[name])


@torch.no_grad()
def load_moments(model, optimizer, tensors):
    """Copy AdamW's state, named as in `state`, into an optimizer."""
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            parallel.copy_into(value, tensors[f"{key}.{name}"])


# ----------------------------------------------------------------------------------------------------------------
# Folders


def lock(run):
    """Create a run folder if need be, and lock it. Returns the open lock file: the lock ends when it is closed, or
    with the process. Raises UserError if another process has the lock, or the folder cannot be written."""
    try:
        Path(run).mkdir(parents=True, exist_ok=True)
        file = open(Path(run, ".lock"), "w")
        log.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise UserError(f"--out {run}: another process is training there") from None
    except OSError as error:
        raise UserError(f"--out {run}: cannot be written ({error.strerror})") from None


def sync(path):
    """Make sure a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folders(run):
    """Checkpoint folders of a run, oldest first."""
    paths = [path for path in Path(run).glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(paths, key=step_of)


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


def write_tensors(tensors, path, about=None):
    """Write a safetensors file of {name: tensor}, with the permissions of any new file: save_file's own is readable by
    its owner alone. about: its metadata. Raises OSError if the disk is full."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, about)
    except SafetensorError as error:
        raise OSError(errno.ENOSPC, str(error)) from None
    path.chmod(mode)


def save(run, step, tensors, meta):
    """Write RUN/step_XXXXXXXX/. Older checkpoints stay (`prune` deletes them).

    tensors: {file name: {tensor name: tensor}}; meta: a JSON object.
    Raises OSError (a full disk, say), which leaves everything as it was, or NotFinite before it writes anything.
    """
    final = Path(run, f"step_{step:08d}")
    folder = Path(run, f".step_{step:08d}.tmp")
    for group in tensors.values():
        for name, tensor in group.items():
            if tensor.numel() and not all(
                map(math.isfinite, torch.aminmax(tensor))
            ):  # NaN if one is; faster than isfinite
                raise NotFinite(f"{name} is not finite after step {step}: nothing was saved")
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values()) + (1 << 20)
    free = shutil.disk_usage(run).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed >> 20} MiB, and {free >> 20} MiB are free")
    for stale in Path(run).glob(".step_*.tmp"):  # of a process that was killed
        shutil.rmtree(stale)
    folder.mkdir()
    try:
        for name, group in tensors.items():
            write_tensors(group, folder / f"{name}.safetensors")
        (folder / "meta.json").write_text(json.dumps(meta))
        files = sorted(folder.iterdir())
        with ThreadPoolExecutor(1) as pool:  # hash what is still in memory, while it is flushed to the disk
            digests = pool.map(sha256, files)
            for file in files:
                sync(file)
            manifest = {f.name: {"bytes": f.stat().st_size, "sha256": d} for f, d in zip(files, digests)}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        sync(folder / "manifest.json")
        sync(folder)
        folder.rename(final)
        sync(run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prune(run, step, keep=2, keep_every=0):
    """Delete older checkpoints, all but the newest `keep` and those of every `keep_every`-th step (0: none). Before
    that, read the checkpoint of `step` back: if it is damaged, print a warning and delete nothing."""
    try:
        verify(Path(run, f"step_{step:08d}"))
    except UserError as error:
        print(f"warning: the checkpoint of step {step} is damaged, older ones are kept: {error}", file=sys.stderr)
        return
    for old in folders(run)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            stale = old.with_name(f".{old.name}.tmp")  # so that no half of it is left under its name
            old.rename(stale)
            shutil.rmtree(stale)


def verify(folder):
    """Raise UserError, with the reason, unless the folder holds exactly what its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        expected = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError("its manifest is missing or unreadable") from None
    present = {file.name for file in folder.iterdir()} - {"manifest.json"}
    if present != set(expected):
        raise UserError(f"its files are not those of the manifest ({', '.join(sorted(present ^ set(expected)))})")
    for name, (size, digest) in expected.items():
        if (folder / name).stat().st_size != size or sha256(folder / name) != digest:
            raise UserError(f"{name} has changed since it was written")


def load(folder):
    """(tensors, meta) of one checkpoint. Raises UserError, with folder and reason, if it is not good."""
    try:
        verify(folder)
        tensors = {file.stem: load_file(file) for file in folder.glob("*.safetensors")}
        return tensors, json.loads((folder / "meta.json").read_text())
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: of json
        raise UserError(f"{folder}: it cannot be read ({error})") from None


def load_newest(run):
    """(tensors, meta) of the newest good checkpoint of a run, or None if there has never been one.

    Bad ones are set aside as step_XXXXXXXX.corrupt, with a warning, and never deleted. Raises NoCheckpoint if all are
    bad, UserError if one may not be read.
    """
    reasons = [f"{path.name}: set aside earlier" for path in sorted(Path(run).glob("step_*.corrupt*"))]
    for folder in reversed(folders(run)):
        for path in (folder, *folder.glob("*")):
            if not os.access(path, os.R_OK):  # of another user, say: that is no damage
                raise UserError(f"{path}: no permission to read it")
        try:
            return load(folder)
        except UserError as error:
            aside = next(p for n in range(1_000_000) if not (p := Path(f"{folder}.corrupt{n or ''}")).exists())
            folder.rename(aside)
            reasons.append(str(error))
            print(f"warning: not a good checkpoint, set aside as {aside.name}: {error}", file=sys.stderr)
    if reasons:
        raise NoCheckpoint(f"{run}: no usable checkpoint: {'; '.join(reasons)}")
    return None
