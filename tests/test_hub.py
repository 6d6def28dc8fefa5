import json
import os
import subprocess
import sys

import numpy as np
import pytest

from engine import ROOT
from engine.errors import UserError
from text import hub, prepare
from text.corpus import Corpus
from text.prepare import prepare as write


def run(*arguments, first="0"):
    """text.prepare, after the statement `first`."""
    code = f"import sys, runpy; {first}; sys.argv = {['', *map(str, arguments)]}; "
    code += "runpy.run_module('text.prepare', None, '__main__')"
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)


def test_without_the_package(tmp_path):
    shown = run("--input", "hf:some/corpus", "--out", tmp_path / "out", first="sys.modules['datasets'] = None")
    assert shown.returncode == 2 and "pip install datasets" in shown.stderr and shown.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(tmp_path, text):
    """Three files of a split, and a held-out one of another."""
    pytest.importorskip("datasets", reason="the package `datasets` is not installed")
    from pyarrow import Table, parquet

    (tmp_path / "in").mkdir()
    for number in range(3):
        documents = text[number:-100:3]
        parquet.write_table(
            Table.from_pydict({"url": ["u"] * len(documents), "text": documents}),
            tmp_path / f"in/train-{number}.parquet",
        )
    parquet.write_table(Table.from_pydict({"text": text[-100:]}), tmp_path / "in/test-0.parquet")
    return tmp_path / "in"


def test_a_corpus_is_its_files(folder, text, tmp_path, monkeypatch):
    """As the same documents in .jsonl files, token for token; an interrupted preparation goes on."""
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 1)
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in text[number:-100:3]))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in text[-100:]))
    plain, held = (prepare.text_files(tmp_path.glob(name)) for name in ("[0-9].jsonl", "held.jsonl"))
    write(sorted(plain), tmp_path / "plain", 512, val_pieces=held)
    rows, tests = prepare.text_files([f"hf:{folder}"]), prepare.text_files([f"hf:{folder}:test"])
    assert len(rows) == 3 and len(tests) == 1
    encode, written = prepare.write_documents, []

    def interrupted(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(1)
        return encode(*arguments)

    monkeypatch.setattr(prepare, "write_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(rows, tmp_path / "streamed", 512, val_pieces=tests)
    written.append(1)
    write(rows, tmp_path / "streamed", 512, val_pieces=tests)
    assert len(written) == 5  # two, then the other two
    one, two = Corpus(tmp_path / "plain"), Corpus(tmp_path / "streamed")
    for split in ("train", "val"):
        np.testing.assert_array_equal(*(np.concatenate(corpus.shards[split]) for corpus in (one, two)))
    assert one.meta["tokenizer_sha256"] == two.meta["tokenizer_sha256"]


def test_another_state_of_a_corpus_is_another_corpus(folder):
    before = hub.shards(f"hf:{folder}")
    assert prepare.facts_of(before) == prepare.facts_of(hub.shards(f"hf:{folder}"))
    os.utime(folder / "train-1.parquet", (1, 1))
    assert prepare.facts_of(before) != prepare.facts_of(hub.shards(f"hf:{folder}"))


def test_what_is_not_there_or_not_text(folder, tmp_path):
    from pyarrow import Table, parquet

    for name, columns in {
        "no_text": {"body": ["a"], "n": [1]},
        "numbers": {"text": [1, 2]},
        "nothing": {"text": ["a", None]},
    }.items():
        (tmp_path / name).mkdir()
        parquet.write_table(Table.from_pydict(columns), tmp_path / name / "a.parquet")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.parquet").write_bytes(b"not parquet")
    words = {
        f"hf:{tmp_path}/no_text": "body, n", f"hf:{tmp_path}/numbers": "not text", f"hf:{tmp_path}/nothing": "not text",
        f"hf:{tmp_path}/bad": "cannot read", f"hf:{tmp_path}/absent": "cannot read", f"hf:{folder}:dev": "train",
        f"hf:{folder}:train:fine": "fine", "hf:": "name",
    }  # fmt: skip
    for address, word in words.items():
        with pytest.raises(UserError, match=word) as error:
            [*hub.texts(hub.shards(address)[0])]
        assert "\n" not in str(error.value)
    shown = run("--input", f"hf:{tmp_path}/no_text", "--out", tmp_path / "out", "--vocab", 512)
    assert shown.returncode == 2 and "body, n" in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))
