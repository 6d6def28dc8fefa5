"""The machine of a run: its device, its precision, its memory settings. Not here: several processes
(engine/parallel.py)."""

import ctypes
import os
import signal

import torch

from engine.errors import UserError


def choose(device="auto", dtype="auto"):
    """(device, dtype of matrix products) of --device and --dtype. Raises UserError if the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch finds no MPS device here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        if device == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        dtype = "bfloat16" if fast else "float32"
    return device, getattr(torch, dtype)


def autocast(device, dtype):
    """The context in which forward passes run: matrix products in bfloat16 if `dtype` says so."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def settings(threads=0, deterministic=False):
    """Set what holds for the whole process. threads: 0 leaves torch's choice."""
    if threads:
        torch.set_num_threads(threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    steady_memory()


def steady_memory():
    """Keep freed memory instead of returning it to Linux after every large tensor: 5-10% faster steps, far less
    noise."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        # M_MMAP_THRESHOLD, of which older versions of glibc take at most 32 MiB. Refused, it stays; then setting
        # M_TRIM_THRESHOLD would do harm, as it ends the threshold's growth.
        if libc.mallopt(-3, 1 << 30) or libc.mallopt(-3, 1 << 25):
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


class BestEffort:
    """A text stream such as stderr that falls silent when it can no longer be written. A run outlives the terminal, the
    pipe or the disk that its words go to."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError:
            self.silence()

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            self.silence()

    def silence(self):
        """Send what is still in the buffer, and all that follows, to nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)


class StopSignals:
    """Catches SIGTERM and SIGINT. The first lets the step finish and the state be saved, the second ends the
    process."""

    def __init__(self):
        self.received = None
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.catch)

    def catch(self, signum, frame):
        self.received = signum
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)

    def __bool__(self):
        return self.received is not None

    def name(self):
        return signal.Signals(self.received).name if self.received else "a signal to another process"
