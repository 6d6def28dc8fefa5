import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import data
from conftest import sentences
from data import NO_TARGET, MaskedLM
from engine import ROOT
from engine.errors import UserError
from processes import SERVER, script
from text import prepare
from text.corpus import Corpus, open_corpus, rng, shuffled
from text.prepare import CLS, MASK, SEP, SPECIAL


def run(*arguments):
    command = [sys.executable, "-m", "text.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def masks(corpus, seq):
    """BERT's batches of a corpus."""
    return MaskedLM(seq, corpus.vocab, corpus)


def documents_of(corpus, split):
    tokens = np.concatenate(corpus.shards[split])
    assert tokens[-1] == SEP
    parts = np.split(tokens, np.flatnonzero(tokens == SEP) + 1)[:-1]
    return [corpus.tokenizer.decode(part[:-1].tolist()) for part in parts]


# ---- text to tokens


def test_every_document_comes_out_as_it_went_in(corpus, text):
    corpus = Corpus(corpus)
    train, val = documents_of(corpus, "train"), documents_of(corpus, "val")
    assert sorted(train + val) == sorted(text) and train == [d for d in text if d in set(train)]
    assert not set(train) & set(val) and 0.02 < len(val) / len(text) < 0.09
    assert (corpus.meta["train"]["documents"], corpus.meta["val"]["documents"]) == (len(train), len(val))


def test_txt_jsonl_and_gz_hold_the_same_documents(tmp_path, text):
    strange = [
        "naïve Ærøskøbing 東京 🦖 [MASK] [SEP] </s>",
        "  two  blanks,\ttab\nand a second line",
        "x" * 200_000,
        "one line\n" * 20_000 + "end",
    ]
    documents = text[:300] + strange
    (tmp_path / "a.txt").write_text("\n\n".join(documents) + "\n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": d, "id": 1}) + "\n" for d in documents))
    (tmp_path / "c.txt.gz").write_bytes(
        gzip.compress("\r\n\r\n\r\n".join(documents).replace("\n", "\r\n").encode("utf-8-sig"))
    )
    tokenizer, held = None, ["--val", tmp_path / "b.jsonl"]
    for name in ("a.txt", "b.jsonl", "c.txt.gz"):
        out = tmp_path / f"out {name}"
        shown = run("--input", tmp_path / name, "--out", out, "--vocab", 512, *held, *(tokenizer or []))
        assert shown.returncode == 0, shown.stderr
        corpus = Corpus(out)
        assert documents_of(corpus, "train") == documents
        assert corpus.meta["replaced_characters"] == 0
        tokenizer = ["--tokenizer", out / "tokenizer.model"]


@pytest.mark.parametrize("prefixed", [False, True])
def test_lines_are_encoded_as_their_text_is(corpus, text, tmp_path, prefixed):
    """Also by a tokenizer that begins every text with a blank, whose lines must not be parted."""
    ours = Corpus(corpus).tokenizer
    if prefixed:
        model = str(tmp_path / "t")
        prepare.sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text), model_prefix=model, vocab_size=512, byte_fallback=True, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["\n"],
        )  # fmt: skip
        ours = prepare.sentencepiece.SentencePieceProcessor(model_file=model + ".model")
    encode = prepare.encoder(ours)
    assert (encode == ours.encode) == prefixed
    texts = ["", "\n", "one", "\n\n two\n", "\r\n \n\tthree \u2028 \x0b 東京\n 🦖", "\n".join(text[:50]), " \n" * 99]
    assert [encode(text) for text in texts] == ours.encode(texts)


def test_special_tokens_cannot_be_written_by_a_text(corpus):
    ids = Corpus(corpus).tokenizer.encode("[MASK] [CLS] [SEP] [PAD]")
    assert min(ids) >= SPECIAL


def test_what_is_not_utf8_is_replaced_and_counted(tmp_path, text):
    (tmp_path / "a.txt").write_bytes(("\n\n".join(text[:300]) + "\n\n").encode() + b"one \xff two \x00 three\n")
    shown = run("--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab", 512)
    assert shown.returncode == 0 and "2 characters could not be read" in shown.stdout
    corpus = Corpus(tmp_path / "out")
    assert "one \ufffd two \ufffd three" in documents_of(corpus, "train") + documents_of(corpus, "val")


def test_half_a_character_is_replaced_too(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": d}) + "\n" for d in [*text[:300], "half \ud800 here"])
    )
    assert run("--input", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--vocab", 512).returncode == 0
    assert Corpus(tmp_path / "out").meta["replaced_characters"] == 1


def test_a_folder_is_read_whole(tmp_path):
    """Links are followed and upper case is no other kind; what leads to a folder twice, or around, is read once."""
    tree, far = tmp_path / "tree", tmp_path / "far"
    for file in (tree / "b/z/BOOK.TXT", tree / "b/one.jsonl", tree / "b.txt", tree / "b-c/x.txt", far / "f.JSON.gz"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("text")
    for name, target in [("a", tree / "b"), ("m", far), ("n", far), ("up", tree), ("b.link.txt", tree / "b.txt")]:
        (tree / name).symlink_to(target)
    (far / "back").symlink_to(tmp_path)  # which holds the tree, and far, again
    names = [str(file.relative_to(tree)) for file in prepare.text_files([tree])]
    assert names == ["b/one.jsonl", "b/z/BOOK.TXT", "b-c/x.txt", "b.link.txt", "b.txt", "m/f.JSON.gz"]


def test_a_corpus_inside_its_text_is_no_text(tmp_path, text, monkeypatch):
    """Neither half done, so that the same command continues, nor whole, beside a second one."""
    files = c4(tmp_path, text)
    monkeypatch.setattr(prepare, "PART", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "write_meta", Mock(side_effect=KeyboardInterrupt))
        prepare.prepare(files, tmp_path / "out", 512)
    assert list(tmp_path.glob(".out.*/*.json")) and prepare.text_files([tmp_path]) == files
    prepare.prepare(files, tmp_path / "out", 512)
    assert (tmp_path / "out" / "meta.json").exists() and prepare.text_files([tmp_path]) == files


def test_upper_case_names_are_read_as_what_they_are(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "one"}'))
    assert [*prepare.pieces_of(prepare.text_files([tmp_path]))] == [("one", True)]


def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "sub").symlink_to(tmp_path / "nodisk")
    with pytest.raises(UserError, match="sub: cannot be read"):
        prepare.text_files([tmp_path])
    (tmp_path / "sub").unlink()
    (tmp_path / "sub").mkdir(0)
    if os.geteuid():  # root may read anything
        with pytest.raises(UserError, match="sub: cannot be read"):
            prepare.text_files([tmp_path])


def sampled(text, size, monkeypatch):
    """What the tokenizer would be trained on."""
    seen, trainer = [], prepare.sentencepiece.SentencePieceTrainer
    monkeypatch.setattr(prepare, "sample_size", lambda vocab: size)
    monkeypatch.setattr(trainer, "train", lambda sentence_iterator, **_: seen.extend(sentence_iterator))
    assert prepare.train_tokenizer(((d, True) for d in text), 512) == b""  # as nothing was trained
    return seen


def test_the_tokenizer_sample_is_not_the_held_out_text(text, monkeypatch):
    seen = sampled(text, 4_000, monkeypatch)
    assert len(seen) > 10 and sum(prepare.chance(d) < 0.05 for d in seen) < len(seen) / 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_one_huge_line_needs_little_memory(tmp_path, text):
    (tmp_path / "a.txt").write_text(" ".join(text) * 60 + "\n\nA short document, to be held out perhaps.\n")
    (tmp_path / "v.txt").write_text("\n\n".join(text[:50]))
    code = f"""if True:
        import sys
        from text import prepare
        folder = "{tmp_path}"
        texts = ["--input", folder + "/a.txt", "--val", folder + "/v.txt"]
        sys.argv = ["", *texts, "--out", folder + "/o", "--vocab", "512"]
        prepare.main()
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))"""
    # Not ru_maxrss: a process begins with that of the process which started it.
    assert (tmp_path / "a.txt").stat().st_size > 8_000_000
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert int(shown.split()[-2]) < 600_000  # kB
    assert Corpus(tmp_path / "o").meta["train"]["documents"] == 2


def test_the_tokenizer_sees_a_bounded_sample(text, monkeypatch):
    seen = sampled(text, 20_000, monkeypatch)
    assert 5_000 < sum(map(len, seen)) <= 20_000 and set(seen) <= set(text)


def test_the_tokenizer_sample_grows_with_the_vocabulary(monkeypatch):
    """10M characters are too few for 256,000 ids: sentencepiece finds no more pairs to merge."""
    trainer, sizes = prepare.sentencepiece.SentencePieceTrainer, []
    monkeypatch.setattr(trainer, "train", lambda sentence_iterator, **_: sizes.append(sum(map(len, sentence_iterator))))
    text = [f"{i:06d} " * 2000 for i in range(800)]  # 11.2M characters
    for vocab in (512, 256_000):
        prepare.train_tokenizer(((d, True) for d in text), vocab)
    assert 4_500_000 < sizes[0] <= 10_000_000 and sizes[1] == 11_200_000


def test_a_large_tokenizer_is_sampled_from_more_text(monkeypatch):
    """A gigabyte of characters suffices for a small one; for 256,000 ids nearly two are read, of more files."""
    sources, read = [*range(400)], []
    monkeypatch.setattr(prepare, "size_of", lambda source: 1 << 28)
    monkeypatch.setattr(prepare, "pieces_of", lambda sources: read.append(sources) or iter([]))
    for vocab in (512, 256_000):
        assert [*prepare.training_pieces(sources, vocab)] == []
    assert [len(some) for some in read] == [4, 8] and read[1] == sources[::55]


def test_shards_are_cut_and_read_across(tmp_path, text, corpus, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD", 777)
    prepare.prepare(lambda: ((d, True) for d in text), tmp_path / "cut", 512, tokenizer=corpus / "tokenizer.model")
    one, many = Corpus(corpus), Corpus(tmp_path / "cut")
    assert len(many.shards["train"]) > 30 and len(one.shards["train"]) == 1
    np.testing.assert_array_equal(np.concatenate(many.shards["train"]), one.shards["train"][0])
    for a, b in zip(masks(one, 100).batch(0, 5, 64), masks(many, 100).batch(0, 5, 64)):
        np.testing.assert_array_equal(a, b)


def c4(folder, text, files=5):
    """Files as C4 has them: en/c4-train.00000-of-00005.json.gz, one JSON object with a "text" a line."""
    (folder / "en").mkdir(parents=True)
    for i in range(files):
        with gzip.open(folder / "en" / f"c4-train.{i:05d}-of-{files:05d}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": d, "timestamp": "x", "url": "y"}) + "\n" for d in text[i::files])
    return prepare.text_files([folder])


def test_many_files_are_encoded_by_many_processes(tmp_path, text, monkeypatch):
    """As one process does it: the same documents, token for token."""
    files = c4(tmp_path / "c4", text)
    prepare.prepare(files, tmp_path / "one", 512)
    monkeypatch.setattr(prepare, "PART", 1)
    prepare.prepare(files, tmp_path / "many", 512)
    one, many = Corpus(tmp_path / "one"), Corpus(tmp_path / "many")
    assert len(one.shards["train"]) == 1 and len(many.shards["train"]) == 5
    for split in ("train", "val"):
        np.testing.assert_array_equal(np.concatenate(one.shards[split]), np.concatenate(many.shards[split]))
        assert all(one.meta[split][name] == many.meta[split][name] for name in ("tokens", "documents"))
    assert (one.train_counts == many.train_counts).all() and not list(tmp_path.glob(".*"))


FULL = OSError(errno.ENOSPC, "No space left on device")
LOST = UserError("c4: cannot be read (Connection reset by peer)")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LOST, FULL])
def test_preparing_goes_on_where_it_was_interrupted(tmp_path, text, monkeypatch, error):
    files = c4(tmp_path / "c4", text)
    monkeypatch.setattr(prepare, "PART", 1)
    monkeypatch.setattr(prepare.os, "cpu_count", lambda: 1)
    prepare.prepare(files, tmp_path / "whole", 512)
    encode, done = prepare.encode_part, []

    def interrupted(folder, number, *rest):
        if number == 3:
            raise error
        return encode(folder, number, *rest)

    monkeypatch.setattr(prepare, "encode_part", interrupted)
    stopped = isinstance(error, KeyboardInterrupt)
    with pytest.raises(type(error) if stopped else UserError, match=None if stopped else "(reset|No space).* goes on"):
        prepare.prepare(files, tmp_path / "out", 512)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(prepare, "encode_part", encode)
    monkeypatch.setattr(prepare, "write_documents", lambda *a, f=prepare.write_documents: (done.append(1), f(*a))[1])
    prepare.prepare(files, tmp_path / "out", 512)
    assert len(done) == 2  # of five
    whole, out = (json.loads((tmp_path / name / "meta.json").read_text()) for name in ("whole", "out"))
    assert whole == out and sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


def test_a_disk_that_is_full_at_the_end_loses_nothing(tmp_path, text, monkeypatch):
    files, bug = c4(tmp_path / "c4", text), OSError(errno.EBADF, "Bad file descriptor")
    for error, expected in ((FULL, UserError), (bug, OSError)):
        with monkeypatch.context() as patch, pytest.raises(expected):
            patch.setattr(prepare, "write_meta", Mock(side_effect=error))
            prepare.prepare(files, tmp_path / "out", 512)
        assert len([*tmp_path.glob(".out.*/00000.json")]) == 1


def preparing(files, out, barrier, ended):
    """The body of a process."""
    barrier.wait()
    try:
        prepare.prepare(files, out, 512)
        ended.put(sorted(file.name for file in out.iterdir()))
    except UserError as error:
        ended.put(str(error))


@pytest.mark.parametrize("bad", [False, True])
def test_several_processes_may_prepare_the_same(tmp_path, text, bad):
    """One does it, the others wait; of a bad text each says what is wrong with it."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in text) + "{}\n" * bad)
    barrier, ended = SERVER.Barrier(4), SERVER.Queue()
    arguments = (prepare.text_files([tmp_path / "a.jsonl"]), tmp_path / "out", barrier, ended)
    processes = [SERVER.Process(target=preparing, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [ended.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    if bad:
        assert all("line 1501" in answer for answer in answers) and not (tmp_path / "out").exists()
    else:
        assert answers == [["meta.json", "tokenizer.model", "train_00000_00000.bin", "val_00000_00000.bin"]] * 4
        assert len(documents_of(Corpus(tmp_path / "out"), "train")) > 1350
    assert not list(tmp_path.glob(".*"))


def locking(folder, barrier):
    """The body of a process."""
    barrier.wait()
    for _ in range(500):
        with prepare.lock(folder):
            shutil.rmtree(folder, ignore_errors=True)  # another makes its lock file there just then


def test_a_folder_that_others_remove_is_locked_in_turn(tmp_path):
    barrier = SERVER.Barrier(4)
    processes = [SERVER.Process(target=locking, args=(tmp_path / "a" / "b", barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare.lock(tmp_path / "file")


def test_a_shard_of_more_than_2_to_the_31_tokens(corpus, tmp_path):
    """Tokens beyond 4 GiB are read where they are (a sparse file, which takes no room)."""
    corpus, count = Corpus(corpus), (1 << 31) + 5000
    tail = np.arange(6, 4006, dtype="<u2") % 500 + 6
    with open(tmp_path / "shard", "wb") as file:
        file.truncate(prepare.HEADER + 2 * count)
        file.seek(prepare.HEADER + 2 * (count - len(tail)))
        file.write(tail.tobytes())
    sparse = np.memmap(tmp_path / "shard", "<u2", "r", prepare.HEADER, (count,))
    corpus.shards["train"], corpus.ends["train"] = [sparse, sparse], np.cumsum([count, count])
    np.testing.assert_array_equal(corpus.read("train", count - 4000, 4000), tail)
    np.testing.assert_array_equal(corpus.read("train", 2 * count - 100, 100), tail[-100:])
    n = corpus.count("train", 64)
    assert n == 2 * count // 63 and n * 63 > 1 << 32
    order = corpus.order(0, 10**9, 512, 64)  # a step far along, in a later epoch
    assert order.min() >= 0 and order.max() < n and order.max() > n // 2 and len(set(order)) == 512
    assert masks(corpus, 64).batch(0, 10**9, 8)[0].shape == (8, 64)


def test_batches_are_made_ahead_one_at_a_time():
    began = []

    def make(i):
        began.append(i)
        return i

    batches = data.prefetch(make, 3, 6)
    assert began == []
    for i in range(3, 7):
        assert next(batches) == i
        time.sleep(0.05)
        assert began == [*range(3, min(i + 1, 6) + 1)]
    assert list(batches) == []


def test_an_error_ahead_is_raised_when_its_turn_comes():
    batches = data.prefetch(lambda i: 1 // (2 - i), 1, 3)
    assert next(batches) == 1
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_a_mixture_takes_from_each_its_share(tmp_path, text, corpus):
    prepare.prepare(lambda: ((d, True) for d in text[:400]), tmp_path / "b", 512, tokenizer=corpus / "tokenizer.model")
    mixture = open_corpus(f"{corpus}:3,{tmp_path / 'b'}:1")
    a, b = Corpus(corpus), Corpus(tmp_path / "b")
    taken = np.concatenate([mixture.order(0, step, 16, 32) for step in range(1, 2001)])
    own = [taken[taken >> 48 == number] & ((1 << 48) - 1) for number in (0, 1)]
    assert len(own[0]) == 24_000 and len(own[1]) == 8_000
    for part, found in ((a, own[0]), (b, own[1])):  # each in its own order, every window once per epoch
        np.testing.assert_array_equal(found, part.at(0, np.arange(len(found)), 32))
    np.testing.assert_array_equal(mixture.order(0, 37, 16, 32), taken[36 * 16 : 37 * 16])
    shuffled = [(taken[i * 1000 : (i + 1) * 1000] >> 48).tolist() for i in range(2)]
    assert shuffled[0] != shuffled[1] and sum(shuffled[0]) == 250
    index = taken[:50]
    for row, i in zip(mixture.windows("train", 32, index), index):
        part = (a, b)[i >> 48]
        np.testing.assert_array_equal(row, part.windows("train", 32, [i & ((1 << 48) - 1)])[0])
    assert len(masks(mixture, 32).held_out(40)[0]) == 40 and mixture.fingerprint != a.fingerprint
    assert open_corpus(f"{corpus}:1,{tmp_path / 'b'}:1").fingerprint != mixture.fingerprint


def test_a_mixture_that_cannot_be(tmp_path, text, corpus):
    prepare.prepare(lambda: ((d, True) for d in text[:400]), tmp_path / "b", 600)
    with pytest.raises(UserError, match="tokenizer"):
        open_corpus(f"{corpus},{tmp_path / 'b'}")
    with pytest.raises(UserError, match="nowhere"):
        open_corpus(f"{corpus}:1,nowhere:2")
    with pytest.raises(UserError, match="above 0"):
        open_corpus(f"{corpus}:1,{corpus}:0")
    with pytest.raises(UserError, match="made of prepared folders"):
        open_corpus(f"{corpus}:1.2.3,{corpus}:1")


# ---- batches


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 1000])
def test_shuffled_is_a_permutation(n):
    keys = rng(0, "order").integers(1 << 63, size=4, dtype=np.uint64)
    order = shuffled(np.arange(n), n, keys)
    assert sorted(order) == list(range(n))
    assert n < 63 or (order != np.arange(n)).mean() > 0.9
    np.testing.assert_array_equal(shuffled(np.arange(n)[::3], n, keys), order[::3])


def test_shuffled_looks_random():
    first = []
    for seed in range(400):
        keys = rng(seed, "order").integers(1 << 63, size=4, dtype=np.uint64)
        first.append(shuffled(np.arange(2), 1000, keys))
    first = np.array(first)
    assert abs(first.mean() - 499.5) < 35 and abs(np.corrcoef(first.T)[0, 1]) < 0.2


def test_every_window_comes_once_per_epoch(corpus):
    corpus = Corpus(corpus)
    n = corpus.count("train", 32)
    tokens = np.concatenate(corpus.shards["train"])[: n * 31].reshape(n, 31)
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(epoch * n + 1, (epoch + 1) * n + 1):
            inputs, masked, targets = (part[0] for part in masks(corpus, 32).batch(3, step, 1))
            real = targets != NO_TARGET
            inputs[masked[real]] = targets[real]
            assert inputs[0] == CLS
            seen.append(inputs[1:])
        epochs.append(np.stack(seen))
        assert sorted(map(tuple, seen)) == sorted(map(tuple, tokens))
    assert (epochs[0] != epochs[1]).any(axis=1).mean() > 0.9


def test_a_batch_depends_on_seed_and_step_alone(corpus):
    one, two = masks(Corpus(corpus), 32), masks(Corpus(corpus), 32)
    late = 10**12
    later = one.batch(1, late, 4)
    for step in (1, 2, 50, late):
        for a, b in zip(one.batch(1, step, 4), two.batch(1, step, 4)):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(later[0], one.batch(1, late + 1, 4)[0])
    assert not np.array_equal(later[0], one.batch(2, late, 4)[0])


def test_masking_is_berts(corpus):
    corpus = Corpus(corpus)
    tokens = corpus.windows("train", 128, np.tile(np.arange(corpus.count("train", 128)), 20))
    inputs, masked, targets = data.mask_tokens(tokens, corpus.vocab, rng(0, "test"))
    real = targets != NO_TARGET
    rows = np.arange(len(tokens))[:, None]
    original, shown = tokens[rows, masked], inputs[rows, masked]
    np.testing.assert_array_equal(original[real], targets[real])
    assert (original[real] >= SPECIAL).all()
    changed = inputs != tokens
    assert changed.sum() == (shown != original)[real].sum()  # nothing else was touched
    assert all(len(set(m[r])) == r.sum() for m, r in zip(masked, real))  # no position twice
    share = real.sum() / (tokens >= SPECIAL).sum()
    assert abs(share - 0.15) < 0.002
    assert abs((shown == MASK)[real].mean() - 0.8) < 0.01
    kept = (shown == original)[real].mean()
    assert abs(kept - 0.1 - 0.1 / (corpus.vocab - SPECIAL)) < 0.01
    counts = np.bincount(masked[real], minlength=128)[1:]
    assert counts.std() / counts.mean() < 0.1  # every position equally often


def test_evaluation_is_fixed_and_held_out(corpus):
    one = masks(Corpus(corpus), 32).held_out(10)
    for a, b in zip(one, masks(Corpus(corpus), 32).held_out(10)):
        np.testing.assert_array_equal(a, b)
    corpus = Corpus(corpus)
    inputs, masked, targets = masks(corpus, 32).held_out(10**9)
    real = targets != NO_TARGET
    for row in range(len(inputs)):
        inputs[row, masked[row, real[row]]] = targets[row, real[row]]
    held = np.concatenate(corpus.shards["val"])
    np.testing.assert_array_equal(inputs[:, 1:].ravel(), held[: len(held) // 31 * 31])


def test_tuning_and_reporting_share_no_text(corpus):
    corpus, asked = Corpus(corpus), []
    corpus.windows = lambda split, seq, index: (
        asked.append((split, set(index))) or Corpus.windows(corpus, split, seq, index)
    )
    n = corpus.count("val", 32)
    masks(corpus, 32).held_out(n // 3), masks(corpus, 32).held_out(n // 3, tuning=True)
    (split, reported), (other_split, tuned) = asked
    assert split == other_split == "val" and len(reported) == len(tuned) == n // 3 and not reported & tuned
    with pytest.raises(UserError, match="--eval_sequences"):
        masks(corpus, 32).held_out(n, tuning=True)


def test_unigram_loss_by_hand(corpus):
    corpus = Corpus(corpus)
    corpus.train_counts = np.array([99] * 5 + [2, 5] + [0] * 505)  # plus one each: 3 and 6 of 514
    expected = -(np.log(3 / 514) + np.log(6 / 514) * 2 + np.log(1 / 514)) / 4
    assert masks(corpus, 32).unigram_loss(np.array([5, 6, 6, NO_TARGET, 7])) == pytest.approx(expected)


# ---- bad input: one sentence, exit 2, nothing left behind


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n\n\t\n", "no text"),
        ("a.txt", b"Far too short for it.", "--vocab"),
        ("a.jsonl", b'{"text": "fine"}\n{"txt": "not"}\n', "line 2"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 7}\n', "line 2"),
        ("a.jsonl", b"not json\n", "line 1"),
        ("a.jsonl", b"[1, 2]\n", "line 1"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"cut off " * 10_000)[:-20], "cannot be read"),
        ("a.txt.gz", gzip.compress(b"one bit flips " * 10_000)[:60] + b"\xff" * 300, "cannot be read"),
        ("a.pdf", b"%PDF", "no .txt"),
        (None, b"", "no such file"),
    ],
)
def test_a_bad_corpus_is_refused(tmp_path, name, content, word):
    if name:
        (tmp_path / name).write_bytes(content)
    shown = run("--input", tmp_path / (name or "nothing"), "--out", tmp_path / "out", "--vocab", 512)
    assert shown.returncode == 2 and word in shown.stderr and shown.stderr.count("\n") == 1, shown.stderr
    assert {f.name for f in tmp_path.iterdir()} <= {name}


def test_more_characters_than_ids_are_refused_with_the_number_that_suffices(tmp_path):
    text = [chr(0x4E00 + i) * 20 for i in range(700)]
    with pytest.raises(UserError, match=r"text: its characters and bytes alone need \d+; raise --vocab$") as error:
        prepare.train_tokenizer(((d, True) for d in text), 512)
    least = int(re.search(r"need (\d+)", str(error.value))[1])
    assert prepare.train_tokenizer(((d, True) for d in text), least)


def test_one_document_leaves_nothing_to_hold_out(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(sentences(400)))
    shown = run("--input", tmp_path / "a.txt", "--out", tmp_path / "out", "--vocab", 512, "--val_fraction", "1e-9")
    assert shown.returncode == 2 and "--val" in shown.stderr and not (tmp_path / "out").exists()


def copy_of(corpus, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in corpus.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def high_id(raw):
    header = json.loads(raw[: prepare.HEADER])
    tokens = np.frombuffer(raw[prepare.HEADER :], "<u2").copy()
    tokens[7] = header["vocab"]
    return raw[: prepare.HEADER] + tokens.tobytes()


def flipped(raw):
    return raw[:-100] + bytes([raw[-100] ^ 1]) + raw[-99:]


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda raw: raw[:-2], "bytes long"),
        (lambda raw: raw[:-1], "bytes long"),
        (lambda raw: raw + b"\0\0", "bytes long"),
        (lambda raw: raw[:100], "not a token shard"),
        (lambda raw: b"", "not a token shard"),
        (lambda raw: b"\x80" * len(raw), "not a token shard"),
        (lambda raw: raw.replace(b'"<u2"', b'"<i2"'), "not a token shard"),
        (lambda raw: raw.replace(b'"<u2"', b'"<u4"'), "bytes long"),
        (lambda raw: raw.replace(b'"vocab": 512', b'"vocab": 513'), "vocabulary"),
        (lambda raw: raw.replace(raw[:1], b"[", 1), "not a token shard"),
        (lambda raw: re.sub(b'"sha256": "[0-9a-f]', b'"sha256": "x', raw, count=1), "SHA-256"),
    ],
)
def test_a_damaged_shard_is_named(corpus, tmp_path, damage, word):
    shard = copy_of(corpus, tmp_path) / "train_00000_00000.bin"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(UserError, match=word) as error:
        Corpus(shard.parent)
    assert str(shard) in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("damage", [flipped, high_id])
def test_verifying_finds_what_opening_does_not_read(corpus, tmp_path, split, damage):
    shard = copy_of(corpus, tmp_path) / f"{split}_00000_00000.bin"
    shard.write_bytes(damage(shard.read_bytes()))
    Corpus(shard.parent)
    shown = run("--verify", shard.parent)
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1, shown.stderr
    assert str(shard) in shown.stderr and "SHA-256" in shown.stderr


def test_verifying_a_good_corpus_says_what_was_checked(corpus):
    shown = run("--verify", corpus)
    assert shown.returncode == 0 and not shown.stderr
    meta = Corpus(corpus).meta
    for split in ("train", "val"):
        assert f"{split}_00000_00000.bin: SHA-256 and ids of {meta[split]['tokens']:,} tokens" in shown.stdout
    assert f"2 shards and {meta['train']['tokens'] + meta['val']['tokens']:,} tokens" in shown.stdout


def test_opening_a_corpus_reads_no_tokens(corpus, tmp_path):
    """A shard of 32 GiB, a sparse file, is opened in a moment; hashing it would take half a minute."""
    folder = copy_of(corpus, tmp_path)
    shard, count = folder / "train_00000_00000.bin", 1 << 34
    header = json.loads(shard.read_bytes()[: prepare.HEADER]) | {"count": count}
    with open(shard, "r+b") as file:
        file.write(json.dumps(header).ljust(prepare.HEADER - 1).encode() + b"\n")
        file.truncate(prepare.HEADER + 2 * count)
    began = time.monotonic()
    assert Corpus(folder).count("train", 64) == count // 63
    assert time.monotonic() - began < 2


def test_ids_outside_the_vocabulary_are_found(tmp_path, corpus):
    """By every batch that has one, by --verify, and when tokens are written."""
    folder = copy_of(corpus, tmp_path)
    shard = folder / "train_00000_00000.bin"
    damaged = high_id(shard.read_bytes())
    digest = hashlib.sha256(damaged[prepare.HEADER :]).hexdigest()
    before = Corpus(corpus).meta["train"]["sha256"][0]
    shard.write_bytes(damaged.replace(before.encode(), digest.encode()))  # as if it had been written so
    (folder / "meta.json").write_text((folder / "meta.json").read_text().replace(before, digest))
    for opened, position in ((Corpus(folder), [1, 0]), (open_corpus(f"{corpus}:1,{folder}:1"), [1 << 48])):
        assert opened.windows("train", 32, [1]).max() < 512
        with pytest.raises(UserError, match="id 512, outside its vocabulary of 512") as error:
            opened.windows("train", 32, position)
        assert str(shard) in str(error.value)
    shown = run("--verify", folder)
    assert shown.returncode == 2 and f"{shard}: holds id 512" in shown.stderr and shown.stderr.count("\n") == 1
    writer = prepare.ShardWriter(tmp_path, "train", 999)
    writer.write([5, 999, 7])
    with pytest.raises(ValueError):  # nobody's mistake: a bug
        writer.close()


def test_large_vocabularies_take_four_bytes(tmp_path):
    writer = prepare.ShardWriter(tmp_path, "train", 256_000)
    writer.write([255_999, 70_000])
    facts = writer.close()
    assert facts["tokens"] == 2 and facts["shards"] == ["train_00000.bin"]
    assert prepare.open_shard(tmp_path / "train_00000.bin", facts["sha256"][0], 256_000).tolist() == [255_999, 70_000]


@pytest.mark.parametrize("content", [b"", b"random bytes", None])
def test_a_bad_tokenizer_is_refused(corpus, tmp_path, content):
    folder = copy_of(corpus, tmp_path)
    model = folder / "tokenizer.model"
    model.write_bytes(model.read_bytes()[:2000] if content is None else content)
    with pytest.raises(UserError, match="tokenizer.model"):
        Corpus(folder)


def test_another_tokenizer_is_refused(corpus, tmp_path, text):
    folder = copy_of(corpus, tmp_path)
    (folder / "tokenizer.model").write_bytes(prepare.train_tokenizer(((d, True) for d in text), 600))
    with pytest.raises(UserError, match="not the tokenizer"):
        Corpus(folder)


def test_an_existing_out_is_not_touched(corpus, tmp_path):
    (tmp_path / "out").mkdir()
    shown = run("--input", ROOT / "README.md", "--out", tmp_path / "out")
    assert shown.returncode == 2 and "--out" in shown.stderr


@pytest.mark.parametrize("out", ["link", "link/out", "link/a/out", "file/out", "/proc/out"])
def test_an_out_that_cannot_be_made_is_refused_at_once(tmp_path, out):
    (tmp_path / "link").symlink_to(tmp_path / "nodisk")
    (tmp_path / "file").write_text("")
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(400)))
    shown = run("--input", tmp_path / "a.txt", "--out", tmp_path / out, "--vocab", 512)
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1, shown.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.txt", "file", "link"]


def test_neither_a_text_nor_a_corpus():
    shown = run()
    assert shown.returncode == 2 and "--input" in shown.stderr and "--verify" in shown.stderr


def test_demo_shows_the_manual():
    shown = script("data.py")
    assert shown.returncode == 0 and "fills" in shown.stdout
    corpus = Corpus(prepare.prepared())
    assert corpus.meta["train"]["tokens"] > 800_000 and corpus.meta["val"]["tokens"] > 30_000
