"""Real processes for tests, started in a moment: a server that has loaded torch once forks each of them."""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from multiprocessing import connection
from types import SimpleNamespace

import torch

import train
from engine import ROOT, options

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["eval_superglue", "evals.qa", "studies.compare", "studies.polynomials", "studies.stability", "tools.bench"]
    + ["torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg"]  # which training loads late
)

# An exit code can be read once, and starting a process reads those of all others that have ended: not in two threads.
ONE_AT_A_TIME = threading.Lock()


def command(argv, folder, cwd):
    """The body of a process: a script of the project, as python would start it."""
    for number, name in enumerate(("in", "out", "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_RDWR | os.O_CREAT), number)
    sys.stdin, sys.argv = open(0), argv
    os.chdir(cwd)
    if argv[0].endswith(".py"):
        runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    else:
        sys.modules.pop(argv[0], None)  # runpy warns of a module that is loaded
        runpy.run_module(argv[0], run_name="__main__", alter_sys=True)


def script(*argv, text="", cwd=ROOT):
    """Run a script of the project (train.py, tools.sample) with `text` to read. Returns its returncode, stdout and
    stderr."""
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/in", "w") as file:
            file.write(text)
        process = SERVER.Process(target=command, args=([*map(str, argv)], folder, cwd))
        with ONE_AT_A_TIME:
            process.start()
        connection.wait([process.sentinel])
        with ONE_AT_A_TIME:
            process.join()
        shown = [open(f"{folder}/{name}").read() for name in ("out", "err")]
    return SimpleNamespace(returncode=process.exitcode, stdout=shown[0], stderr=shown[1])


def one(rank, world, port, flags, fault, stderr):
    """The body of a process: train.py with these flags, as torchrun would start it."""
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if fault:
        fault(rank)
    sys.exit(train.start(options.parse(flags)))


class Run:
    """One run of `world` processes. fault: a function of the rank, called in each process before it starts."""

    def __init__(self, flags, world=1, fault=None):
        run = flags[flags.index("--out") + 1]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = [str(flag) for flag in flags]
        self.log, self.files = f"{run}/log.jsonl", [f"{run}.{port}.{rank}.err" for rank in range(world)]
        self.processes = [
            SERVER.Process(target=one, args=(rank, world, port, flags, fault, self.files[rank]))
            for rank in range(world)
        ]
        for process, file in zip(self.processes, self.files):
            open(file, "w").close()  # to be read even if the process is killed at once
            process.start()

    def steps(self):
        try:
            with open(self.log) as file:
                return sum('"event": "step"' in line for line in file)
        except OSError:
            return 0

    def alive(self):
        return any(process.is_alive() for process in self.processes)

    def reach(self, step):
        """Wait until so many steps are logged, or the run has ended."""
        while self.steps() < step and self.alive():
            time.sleep(0.002)
        return self

    def send(self, name, rank=0):
        os.kill(self.processes[rank].pid, getattr(signal, name))
        return self

    def end(self, seconds=60):
        """(exit codes by rank, what they wrote to stderr by rank); killed after `seconds`."""
        limit = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, limit - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes], [open(file).read() for file in self.files]
