"""Checkpoints: safetensors and JSON, verified, never half-written, and no pickle anywhere.

A checkpoint is a folder RUN/step_00000100/ with tensor files, meta.json and, written last, manifest.json: the size and
SHA-256 of every other file. It is built under a temporary name, flushed to disk, and renamed when whole; so a folder with
the final name is complete, and a byte that changed later is found before anything is loaded.
Not here: what is in a checkpoint (train.py).
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.errors import UserError


class NoCheckpoint(Exception):
    """There are checkpoints, and none of them can be used."""


class NotFinite(Exception):
    """A tensor to be saved holds NaN or infinity."""


def lock(run):
    """The open lock file of a run folder, which is made if need be. Keep it: the lock ends with it, or with the process.
    ValueError if another process has it, or the folder cannot be written."""
    try:
        Path(run).mkdir(parents=True, exist_ok=True)
        file = open(Path(run, ".lock"), "w")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        raise UserError(f"--out {run}: another process is at work there") from None
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
    found = [path for path in Path(run).glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of)


def step_of(folder):
    return int(folder.name.removeprefix("step_"))


def save(run, step, tensors, meta, keep=2, keep_every=0):
    """Write RUN/step_XXXXXXXX/, read it back, and only then delete older ones: all but the newest `keep`, and but those of
    every `keep_every`-th step (0: none).

    tensors: {file name: {tensor name: tensor}}; meta: a JSON object.
    OSError (a full disk, say) leaves the older ones as they were. NotFinite: nothing is written.
    """
    final = Path(run, f"step_{step:08d}")
    folder = Path(run, f".step_{step:08d}.tmp")
    for group in tensors.values():
        for name, tensor in group.items():
            if not torch.isfinite(tensor).all():
                raise NotFinite(f"{name} is not finite after step {step}")
    needed = sum(tensor.nbytes for group in tensors.values() for tensor in group.values()) + (1 << 20)
    free = shutil.disk_usage(run).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed >> 20} MiB, and {free >> 20} MiB are free")
    for stale in Path(run).glob(".step_*.tmp"):  # of a process that was killed
        shutil.rmtree(stale)
    folder.mkdir()
    try:
        for name, group in tensors.items():
            try:
                save_file(group, folder / f"{name}.safetensors")
            except SafetensorError as error:  # what it raises where the disk is full
                raise OSError(str(error)) from None
        (folder / "meta.json").write_text(json.dumps(meta))
        manifest = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in folder.iterdir():
            sync(file)
        sync(folder)
        folder.rename(final)
        sync(run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        verify(final)
    except ValueError as error:
        raise OSError(f"it was written, and reads back otherwise: {error}") from None
    for old in folders(run)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            shutil.rmtree(old)


def verify(folder):
    """ValueError, with the reason, unless the folder holds exactly what its manifest says."""
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


def load(folder, device="cpu"):
    """(tensors, meta) of one checkpoint, verified: ValueError with the reason if it is not good."""
    verify(folder)
    try:
        tensors = {file.stem: load_file(file, device=str(device)) for file in folder.glob("*.safetensors")}
        return tensors, json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"it cannot be read ({error})") from None


def load_newest(run):
    """(tensors, meta) of the newest good checkpoint of a run, or None if the run has none at all.

    Bad ones are set aside as step_XXXXXXXX.corrupt, with a warning, and never deleted.
    Raises NoCheckpoint if only bad ones are there.
    """
    reasons = [f"{path.name}: set aside earlier" for path in sorted(Path(run).glob("step_*.corrupt*"))]
    for folder in reversed(folders(run)):
        try:
            return load(folder)
        except ValueError as error:
            aside = next(p for n in range(1_000_000) if not (p := Path(f"{folder}.corrupt{n or ''}")).exists())
            folder.rename(aside)
            reasons.append(f"{folder.name}: {error}")
            print(f"warning: {folder} is not a good checkpoint: {error}; set aside as {aside.name}", file=sys.stderr)
    if reasons:
        raise NoCheckpoint(f"{run}: no usable checkpoint: {'; '.join(reasons)}")
    return None
