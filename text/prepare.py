"""Text to tokens on disk: documents, tokenizer, token shards. Done once; data.py makes batches of them.

The default corpus is this machine's own manual: the docstrings and help topics of the running Python and the installed
torch, about 5 MB of prose, so that nothing has to be downloaded. It differs between versions; its fingerprint is logged.

A prepared corpus is a folder with tokenizer.model, shards of bounded size and meta.json. It appears when it is complete; many
files are encoded on all cores, and an interrupted preparation goes on where it was. Memory does not grow with the text.
Not here: the command line (python data.py --input TEXT --out DIR).

Source: sentencepiece BPE with byte fallback (Kudo & Richardson, arXiv 1808.06226): any text survives.
"""

import ast
import collections
import fcntl
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import sys
import sysconfig
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from itertools import chain, islice
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from engine import ROOT
from engine.errors import UserError
from text import hub

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = 5  # ids below this are never masked and never predicted
PIECE = 1 << 16  # characters of a document handled at once
SAMPLE = 10_000_000  # characters the tokenizer is trained on, at most
SHARD = 1 << 28  # tokens per shard, at most
PART = 1 << 24  # bytes of files that one process takes at a time, at least
HEADER = 512  # bytes of JSON before a shard's tokens
VERSION = 1  # of everything that changes the tokens; part of a prepared corpus' name

# ----------------------------------------------------------------------------------------------------------------
# Documents. Every reader yields (text, ends): a piece of at most about PIECE characters, and whether its document ends.


def is_prose(paragraph):
    words = paragraph.split(" ")
    letters = sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph)
    plain = sum(word.strip(".,;:()\"'`").isalpha() for word in words) / len(words)
    return len(words) >= 10 and letters >= 0.85 and plain >= 0.7 and ">>>" not in paragraph


def manual():
    """The default corpus: every distinct paragraph of prose among the multi-line strings of Python's and torch's sources
    (docstrings, help topics), as one document each. The sources are parsed, never run."""
    stdlib, torch = Path(sysconfig.get_path("stdlib")), Path(importlib.util.find_spec("torch").origin).parent
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = [f for f in sorted(stdlib.rglob("*.py")) if skipped.isdisjoint(f.relative_to(stdlib).parts)]
    seen = set()
    for file in tqdm(
        files + sorted(torch.rglob("*.py")), desc="reading the manual", unit=" files", leave=False, disable=None
    ):
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a file for another version of Python
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
                for paragraph in re.split(r"\n\s*\n", node.value):
                    paragraph = " ".join(paragraph.split())
                    if paragraph and paragraph not in seen and is_prose(paragraph):
                        seen.add(paragraph)
                        yield paragraph, True


def text_pieces(file):
    """A .txt file, in the layout of BERT's own inputs: a blank line ends a document."""
    piece, size = [], 0
    for line in iter(lambda: file.readline(PIECE), ""):
        blank = not line.strip()
        if piece and (blank or size >= PIECE):
            yield ("".join(piece).rstrip("\n"), True) if blank else ("".join(piece), False)
            piece, size = [], 0
        if not blank:
            piece.append(line)
            size += len(line)
    if piece:
        yield "".join(piece).rstrip("\n"), True


def jsonl_pieces(file, name):
    """A .jsonl file: each line is an object whose "text" is one document."""
    for number, line in enumerate(file, 1):
        try:
            text = json.loads(line)["text"] if line.strip() else ""
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{name}, line {number}: expected a JSON object with a string "text"') from None
        yield from cut(text)


def cut(text):
    """One document in pieces."""
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE], start + PIECE >= len(text)


def text_files(paths):
    """The .txt, .jsonl and .json files, plain or .gz, among `paths` and in the folders among them, and what hf:NAME among them
    stands for (hub.py). ValueError if there are none."""
    files, paths = [], [*paths]
    for path in paths:
        if str(path).startswith("hf:"):
            files += hub.rows(str(path))
            continue
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: there is no such file or folder")
        inside = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        files += [f for f in inside if f.name.removesuffix(".gz").endswith((".txt", ".jsonl", ".json"))]
    if not files:
        names = ", ".join(str(path) for path in paths)
        raise UserError(f"{names}: no .txt, .jsonl or .json file there, plain or .gz")
    return files


def read_files(files):
    """Documents of a list of files, in order. Invalid UTF-8 becomes U+FFFD (counted by the caller), CRLF becomes LF."""
    for path in files:
        if isinstance(path, hub.Rows):
            yield from (piece for text in hub.texts(path) for piece in cut(text))
            continue
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8-sig", errors="replace", newline=None) as file:
                if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):  # C4's files are called .json.gz
                    yield from jsonl_pieces(file, path)
                else:
                    yield from text_pieces(file)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: cannot be read ({error})") from None


def chance(text, salt=""):
    """A number in [0, 1) that belongs to a text, another one for each salt."""
    return int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:8], "big") / 2**64


# ----------------------------------------------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(pieces, vocab):
    """A sentencepiece BPE model (bytes) of `vocab` ids, trained on a sample of bounded size that is the same each time:
    pieces whose hash lies below a threshold, which is halved whenever the sample outgrows SAMPLE."""
    sample, size, threshold = [], 0, 1.0
    for text, _ in pieces:
        for start in range(0, len(text), 1000):  # sentencepiece leaves out sentences over 4192 bytes
            part = text[start : start + 1000]
            if part.strip() and chance(part, "sample") < threshold:
                sample.append(part)
                size += len(part)
        while size > SAMPLE:
            threshold /= 2
            sample = [part for part in sample if chance(part, "sample") < threshold]
            size = sum(map(len, sample))
    if not sample:
        raise UserError("the corpus has no text in it")
    model = io.BytesIO()  # not a file, whose name would become part of the model
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample), model_writer=model, vocab_size=vocab, model_type="bpe",
            byte_fallback=True, character_coverage=0.9999, normalization_rule_name="identity",
            remove_extra_whitespaces=False, add_dummy_prefix=False, user_defined_symbols=["\n"],
            pad_id=PAD, unk_id=UNK, bos_id=CLS, eos_id=SEP, control_symbols=["[MASK]"],
            pad_piece="[PAD]", unk_piece="[UNK]", bos_piece="[CLS]", eos_piece="[SEP]", minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"no tokenizer of {vocab} ids (--vocab) can be made of this text: {reason}") from None
    return model.getvalue()


def load_tokenizer(path):
    """The sentencepiece tokenizer in a file; ValueError if it is none, or none of ours."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        specials = [tokenizer.id_to_piece(i) for i in range(SPECIAL)]
    except (OSError, RuntimeError, IndexError):
        raise UserError(f"{path}: not a readable sentencepiece model") from None
    if specials != ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]:
        raise UserError(f"{path}: its first pieces are {specials}, not [PAD] [UNK] [CLS] [SEP] [MASK]")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------
# Token shards: a JSON header of HEADER bytes (try `head -c 512`), then the tokens


def token_dtype(vocab):
    """Of a shard's tokens."""
    return "<u2" if vocab <= 1 << 16 else "<u4"


class ShardWriter:
    """Appends tokens to FOLDER/SPLIT_00000.bin, _00001.bin, ..."""

    def __init__(self, folder, split, vocab):
        self.folder, self.split, self.vocab = folder, split, vocab
        self.dtype = token_dtype(vocab)
        self.file, self.names, self.digests, self.counts = None, [], [], np.zeros(vocab, np.int64)

    def write(self, tokens):
        tokens = np.asarray(tokens, self.dtype)
        self.counts += np.bincount(tokens, minlength=self.vocab)
        while len(tokens):
            if self.file is None:
                self.names.append(f"{self.split}_{len(self.names):05d}.bin")
                self.file, self.count, self.hash = open(self.folder / self.names[-1], "wb"), 0, hashlib.sha256()
                self.file.write(b" " * HEADER)
            part, tokens = tokens[: SHARD - self.count], tokens[SHARD - self.count :]
            self.file.write(part.tobytes())
            self.hash.update(part.tobytes())
            self.count += len(part)
            if self.count == SHARD:
                self.close()

    def close(self):
        if self.file is not None:
            header = {"format": "raptr tokens", "dtype": self.dtype, "count": self.count, "vocab": self.vocab}
            self.digests.append(self.hash.hexdigest())
            self.file.seek(0)
            self.file.write(json.dumps({**header, "sha256": self.digests[-1]}).ljust(HEADER - 1).encode() + b"\n")
            self.file.close()
            self.file = None


def open_shard(path, sha256):
    """The tokens of a shard as a read-only memory map, after checking its size, its SHA-256 and its ids."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER))
            dtype, count, vocab = np.dtype(header["dtype"]), int(header["count"]), int(header["vocab"])
            said = header["sha256"]
            if header["format"] != "raptr tokens" or header["dtype"] not in ("<u2", "<u4"):
                raise ValueError
            size, expected = os.path.getsize(path), HEADER + count * dtype.itemsize
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # of what follows the header
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a token shard") from None
    if size != expected:
        raise UserError(f"{path}: {size} bytes long, not the {expected} it was written with")
    if not digest == said == sha256:
        raise UserError(f"{path}: its bytes have changed since it was written (SHA-256 differs)")
    tokens = np.memmap(path, dtype, "r", HEADER, (count,))
    if any(int(tokens[i : i + (1 << 24)].max()) >= vocab for i in range(0, count, 1 << 24)):
        raise UserError(f"{path}: holds token ids of {vocab} and above, outside its vocabulary")
    return tokens


# ----------------------------------------------------------------------------------------------------------------
# Preparing a corpus


def cleaned(pieces):
    """Pieces with what is no text, NUL and half characters, replaced."""
    for text, ends in pieces:
        plain = text.isascii() and "\0" not in text  # as most texts are; the search below is slower
        yield text if plain else re.sub("[\0\ud800-\udfff]", "\ufffd", text), ends


def batched(pieces, size=1 << 20):
    """Lists of pieces, about `size` characters each."""
    batch, length = [], 0
    for text, ends in pieces:
        batch.append((text, ends))
        length += len(text)
        if length >= size:
            yield batch
            batch, length = [], 0
    yield batch


def ahead(function, items, threads):
    """map(function, items), in order, on so many threads. At most twice as many items are read ahead: memory stays bounded."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def lines_apart(tokenizer):
    """Does a text have the tokens of its lines, one after another? Then lines are encoded by themselves, which is faster: what
    sentencepiece does per token grows with the length it is given. True of every tokenizer made here."""
    lines = [" a\n", "\n", "  B \n", "c"]
    return tokenizer.encode("".join(lines)) == [*chain(*tokenizer.encode(lines))]


def encode_pieces(tokenizer, apart, batch):
    """(a list of pieces, their tokens, [SEP] after each that ends a document, and how many tokens each has)."""
    lines, counts = [], []
    for text, _ in batch:
        own = text.split("\n") if apart else [text]
        lines += [line + "\n" for line in own[:-1]]
        lines.append(own[-1])
        counts.append(len(own))
    encoded = iter(tokenizer.encode(lines, out_type=int, num_threads=1))  # other threads run meanwhile
    tokens, ends_at = [], [0]
    for (_, ends), count in zip(batch, counts):
        for ids in islice(encoded, count):
            tokens += ids
        if ends:
            tokens.append(SEP)
        ends_at.append(len(tokens))
    return batch, np.array(tokens, np.int32), np.diff(ends_at)


def write_documents(pieces, choose, tokenizer, writers, threads=0):
    """Encode documents, each closed by [SEP], into the shards of the split that `choose(its first piece)` names.
    Returns the number of replacement characters seen: what was not valid UTF-8, a NUL, half a character."""
    split, replaced = None, 0  # the split of the document we are in
    encode = functools.partial(encode_pieces, tokenizer, lines_apart(tokenizer))
    for batch, tokens, lengths in ahead(encode, batched(pieces), threads or os.cpu_count()):
        where = []
        for (text, ends), length in zip(batch, lengths.tolist()):
            replaced += text.count("\ufffd")
            if split is None and length > ends:
                split = choose(text)
            where.append(split)  # None: a document without a token, of which not even [SEP] is kept
            split = None if ends else split
        for name, writer in writers.items():
            writer.write(tokens[np.repeat(np.array([own == name for own in where], bool), lengths)])
    return replaced


def encode_part(folder, number, pieces, share, threads=0):
    """Write the shards of one part of a corpus, a share `share` of its documents as held out, and last a file that says so.
    pieces: a function, or a list of files. What was written before is not written again."""
    done = folder / f"{number:05d}.json"
    if not done.exists():
        tokenizer = load_tokenizer(folder / "tokenizer.model")
        writers = {
            split: ShardWriter(folder, f"{split}_{number:05d}", tokenizer.vocab_size()) for split in ("train", "val")
        }
        texts = cleaned(pieces() if callable(pieces) else read_files(pieces))
        facts = {"replaced": write_documents(texts, lambda text: "val" if chance(text) < share else "train",
                                             tokenizer, writers, threads)}  # fmt: skip
        for split, writer in writers.items():
            writer.close()
            tokens, documents = int(writer.counts.sum()), int(writer.counts[SEP])
            facts[split] = {"shards": writer.names, "tokens": tokens, "documents": documents, "sha256": writer.digests}
        writers["train"].counts.tofile(folder / f"{number:05d}.counts")
        done.with_suffix(".tmp").write_text(json.dumps(facts))
        done.with_suffix(".tmp").rename(done)
    return json.loads(done.read_text()), np.fromfile(folder / f"{number:05d}.counts", np.int64)


def size_of(file):
    """Bytes of a file; of one that is streamed, a guess that makes it a part of its own."""
    return PART if isinstance(file, hub.Rows) else file.stat().st_size


def parts_of(files):
    """Files in groups of at least PART bytes (the last may be smaller), each for one process."""
    groups, size = [[]], 0
    for file in files:
        if size >= PART:
            groups, size = [*groups, []], 0
        groups[-1].append(file)
        size += size_of(file)
    return groups


def encode_parts(folder, parts, share):
    """`encode_part` of all parts, a process per core where there are several: [(facts, counts), ...] in order."""
    workers = min(len(parts), os.cpu_count() or 1)
    if workers < 2:
        return [encode_part(folder, number, part, share(number)) for number, part in enumerate(parts)]
    sizes, found = [PART if callable(part) else sum(map(size_of, part)) for part in parts], {}
    bar = tqdm(total=sum(sizes), desc="encoding", unit="B", unit_scale=True, leave=False, disable=None)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        threads = max(1, os.cpu_count() // workers)
        tasks = {pool.submit(encode_part, folder, n, part, share(n), threads): n for n, part in enumerate(parts)}
        try:
            for task in as_completed(tasks):
                found[tasks[task]] = task.result()
                bar.update(sizes[tasks[task]])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    bar.close()
    return [found[number] for number in range(len(parts))]


def sample_of(files):
    """Pieces that the tokenizer may be trained on: of a large corpus, files evenly spread over it, about a gigabyte."""
    stride = max(1, sum(map(size_of, files)) >> 30)
    size = 0
    for text, ends in read_files(files[::stride]):
        yield text, ends
        size += len(text)
        if size > 1 << 30:
            return


def facts_of(files):
    """What tells one list of files from another: names, sizes, times."""
    return [f if isinstance(f, hub.Rows) else (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def prepare(pieces, out, vocab, val_fraction=0.05, val_pieces=None, tokenizer=None, source=""):
    """Write tokenizer.model, token shards and meta.json into the folder `out`, which appears only when complete.

    pieces: a list of files, or a function that starts a fresh pass over (text, ends). val_pieces: the same for a held-out
    text; without it a share `val_fraction` of the documents is held out, chosen by a hash. tokenizer: file to use instead of
    training one. Files are encoded on all cores; if that is interrupted, the same call goes on where it was.
    Raises ValueError if there is no text, or none for one of the two splits.
    """
    out = Path(out)
    files = [] if callable(pieces) else [*pieces, *(val_pieces or [])]
    facts = facts_of(files)
    model = Path(tokenizer).read_bytes() if tokenizer and load_tokenizer(tokenizer) else b""
    key = json.dumps(
        [
            VERSION,
            PART,
            vocab,
            val_fraction,
            len(pieces) if files else os.getpid(),
            facts,
            hashlib.sha256(model).hexdigest(),
        ]
    )
    folder = out.parent / f".{out.name}.{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        lock = open(folder / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that prepares the same is waited for
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from None
    if out.exists():
        return shutil.rmtree(folder, ignore_errors=True)
    try:
        if not (folder / "tokenizer.model").exists():
            model = model or train_tokenizer(cleaned(sample_of(pieces) if files else pieces()), vocab)
            (folder / "tokenizer.tmp").write_bytes(model)
            (folder / "tokenizer.tmp").rename(folder / "tokenizer.model")
        parts = parts_of(pieces) if files else [pieces]
        held_out = (parts_of(val_pieces) if files else [val_pieces]) if val_pieces else []
        share = lambda number: 0.0 if held_out and number < len(parts) else 1.0 if held_out else val_fraction  # noqa: E731
        encoded = encode_parts(folder, [*parts, *held_out], share)
        processor = load_tokenizer(folder / "tokenizer.model")
        meta = {"version": VERSION, "source": source, "vocab": processor.vocab_size()}
        meta["replaced_characters"] = sum(facts["replaced"] for facts, _ in encoded)
        meta["tokenizer_sha256"] = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
        for split in ("train", "val"):
            own = [facts[split] for facts, _ in encoded]
            meta[split] = {name: [x for part in own for x in part[name]] for name in ("shards", "sha256")}
            meta[split] |= {name: sum(part[name] for part in own) for name in ("tokens", "documents")}
            if not meta[split]["shards"]:
                more = "; give a held-out text (--val) or hold out more (--val_fraction)" if split == "val" else ""
                raise UserError(f"no {split} documents came out of {source or 'this text'}{more}")
        meta["train_counts"] = sum(counts for _, counts in encoded).tolist()
        for number in range(len(encoded)):
            for ending in ("json", "counts"):
                (folder / f"{number:05d}.{ending}").unlink()
        (folder / "meta.json").write_text(json.dumps(meta))
        (folder / "lock").unlink()
        try:
            folder.rename(out)
        except OSError:
            if not out.exists():
                raise
            shutil.rmtree(folder)  # another process was sooner
    except ValueError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def prepared(data="", vocab=4096):
    """The folder of a prepared corpus. `data` is such a folder, or a folder or file of text, or "" for the default corpus;
    the latter two are prepared at the first call and kept in the folder corpus/. ValueError as in `prepare`."""
    if data and (Path(data) / "meta.json").exists():
        return Path(data)
    if data:
        files = text_files([data])
        name = re.sub(r"\W+", "-", Path(data).resolve().name).strip("-")
        facts = facts_of(files)
        source = str(data)
    else:
        versions = [f"python{platform.python_version()}", f"torch{importlib.metadata.version('torch')}"]
        name, facts, source = "manual", versions, "manual of " + ", ".join(versions)
    key = hashlib.sha256(json.dumps([VERSION, vocab, facts]).encode()).hexdigest()[:8]
    out = ROOT / "corpus" / f"{name}-{vocab}-{key}"
    if not out.exists():
        print(f"preparing {source} (once; kept in {out})", file=sys.stderr, flush=True)
        documents = [] if data else list(manual())
        prepare(files if data else lambda: iter(documents), out, vocab, source=source)
    return out
