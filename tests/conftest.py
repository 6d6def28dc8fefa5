"""Shared by all tests: a small corpus of made-up sentences, the flags of a tiny model, and two trained ones."""

import fcntl
import os
import random
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

import train  # noqa: E402
from engine import options  # noqa: E402
from processes import script  # noqa: E402
from studies import compare, length  # noqa: E402
from text import prepare  # noqa: E402


def sentences(count, seed=0):
    """Documents with something to learn: each word narrows down the next one."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(120)]
    documents = []
    for _ in range(count):
        word, text = rng.randrange(120), []
        for _ in range(rng.randint(8, 40)):
            text.append(words[word])
            word = (3 * word + rng.randint(0, 4)) % 120
        documents.append(" ".join(text).capitalize() + ".")
    return documents


@pytest.fixture(scope="session")
def text():
    return sentences(1500)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, text):
    """Folder of a prepared corpus of 512 token ids."""
    out = tmp_path_factory.mktemp("corpus") / "small"
    prepare.prepare(lambda: ((document, True) for document in text), out, vocab=512, source="made-up sentences")
    return out


@pytest.fixture
def tiny(corpus, tmp_path):
    """Flags of a run that takes a second."""
    flags = "--layers 4 --width 64 --heads 4 --seq 32 --batch 8 --steps 12 --stages 2-3-4 --threads 1 --device cpu"
    flags += " --eval_sequences 16 --eval_every 0 --save_every 0"
    return [*flags.split(), "--data", str(corpus), "--out", str(tmp_path / "run")]


def learn(arch, corpus, out):
    flags = "--layers 3 --width 64 --heads 2 --seq 32 --batch 16 --steps 250 --method raptr --stages 2-3 --lr 4e-3"
    flags += " --init_std 0.125 --dropout 0 --eval_sequences 32 --eval_every 0 --save_every 0 --threads 1"
    flags += f" --arch {arch} --positions rotary --device cpu"
    assert train.start(options.parse([*flags.split(), "--data", str(corpus), "--out", str(out)])) == 0


@pytest.fixture(scope="session")
def runs(corpus, tmp_path_factory):
    """A BERT and a UL2 that have learned which made-up word follows which. Whichever worker of pytest-xdist needs them
    first trains them for all; no test writes into their folders."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    made = {arch: shared / arch / "run" for arch in ("bert", "ul2")}
    with open(shared / "runs.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arch, out in made.items():
            if not out.exists():
                learn(arch, corpus, out)
    return made


@pytest.fixture
def at_once(monkeypatch):
    """The trainings of a comparison start as the other processes of the tests do."""
    forkserver.ensure_running()  # it finds the project's modules only while this is the folder that pytest began in
    at_once = lambda command, **_: script(*command[1:], cwd=Path.cwd())  # noqa: E731
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=at_once))


@pytest.fixture
def tiny_length(monkeypatch, at_once):
    """The setting of studies.length at a tiny size, for it and for the studies that stand on it."""
    flags = "--layers=4 --width=32 --mlp=40 --heads=2 --seq=32 --batch=4 --eval_sequences=16 --threads=1 --vocab=512"
    monkeypatch.setattr(length, "SETTING", [*length.SETTING, *flags.split()])
    monkeypatch.setattr(length, "TRIED_AT", 8)
