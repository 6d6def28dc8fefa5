"""Text to batches: documents, tokenizer, token shards, and BERT's masking.

The batch of step s is a pure function of (seed, s): no shuffle buffer, nothing to save, any step of any epoch at once.
Not here: the model, the loop.

    python data.py                                          one masked example from the default corpus
    python data.py --input TEXT [TEXT ...] --out DIR        prepare your own .txt, .jsonl (field "text"), plain or .gz

The default corpus is this machine's own manual: the docstrings and help topics of the running Python and the installed
torch, about 5 MB of prose, so that nothing has to be downloaded. It differs between versions; its fingerprint is logged.

Sources: masking, BERT (arXiv 1810.04805, section 3.1); tokens, sentencepiece BPE with byte fallback: any text survives.
"""

import argparse
import ast
import fcntl
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
import textwrap
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = 5  # ids below this are never masked and never predicted
NO_TARGET = -100
PIECE = 1 << 16  # characters of a document handled at once
SAMPLE = 10_000_000  # characters the tokenizer is trained on, at most
SHARD = 1 << 28  # tokens per shard, at most
PART = 1 << 26  # bytes of files that one process takes at a time, at least
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
    for file in tqdm(files + sorted(torch.rglob("*.py")), desc="reading the manual", unit=" files", leave=False, disable=None):
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
            raise ValueError(f'{name}, line {number}: expected a JSON object with a string "text"') from None
        for start in range(0, len(text), PIECE):
            yield text[start : start + PIECE], start + PIECE >= len(text)


def text_files(paths):
    """The .txt and .jsonl files, plain or .gz, among `paths` and in the folders among them. ValueError if there are none."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path}: there is no such file or folder")
        inside = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        files += [f for f in inside if f.name.removesuffix(".gz").endswith((".txt", ".jsonl", ".json"))]
    if not files:
        names = ", ".join(str(path) for path in paths)
        raise ValueError(f"{names}: no .txt, .jsonl or .json file there, plain or .gz")
    return files


def read_files(files):
    """Documents of a list of files, in order. Invalid UTF-8 becomes U+FFFD (counted by the caller), CRLF becomes LF."""
    for path in files:
        opener = gzip.open if path.suffix == ".gz" else open
        try:
            with opener(path, "rt", encoding="utf-8-sig", errors="replace", newline=None) as file:
                if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):  # C4's files are called .json.gz
                    yield from jsonl_pieces(file, path)
                else:
                    yield from text_pieces(file)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from None


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
        raise ValueError("the corpus has no text in it")
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
        raise ValueError(f"no tokenizer of {vocab} ids (--vocab) can be made of this text: {reason}") from None
    return model.getvalue()


def load_tokenizer(path):
    """The sentencepiece tokenizer in a file; ValueError if it is none, or none of ours."""
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=Path(path).read_bytes())
        specials = [tokenizer.id_to_piece(i) for i in range(SPECIAL)]
    except (OSError, RuntimeError, IndexError):
        raise ValueError(f"{path}: not a readable sentencepiece model") from None
    if specials != ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]:
        raise ValueError(f"{path}: its first pieces are {specials}, not [PAD] [UNK] [CLS] [SEP] [MASK]")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------
# Token shards: a JSON header of HEADER bytes (try `head -c 512`), then the tokens


class ShardWriter:
    """Appends tokens to FOLDER/SPLIT_00000.bin, _00001.bin, ..."""

    def __init__(self, folder, split, vocab):
        self.folder, self.split, self.vocab = folder, split, vocab
        self.dtype = "<u2" if vocab <= 1 << 16 else "<u4"
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
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a token shard") from None
    if size != expected:
        raise ValueError(f"{path}: {size} bytes long, not the {expected} it was written with")
    if not digest == said == sha256:
        raise ValueError(f"{path}: its bytes have changed since it was written (SHA-256 differs)")
    tokens = np.memmap(path, dtype, "r", HEADER, (count,))
    if any(int(tokens[i : i + (1 << 24)].max()) >= vocab for i in range(0, count, 1 << 24)):
        raise ValueError(f"{path}: holds token ids of {vocab} and above, outside its vocabulary")
    return tokens


# ----------------------------------------------------------------------------------------------------------------
# Preparing a corpus


def cleaned(pieces):
    """Pieces with what is no text, NUL and half characters, replaced."""
    for text, ends in pieces:
        yield re.sub("[\0\ud800-\udfff]", "\ufffd", text), ends


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


def write_documents(pieces, choose, tokenizer, writers, threads=0):
    """Encode documents, each closed by [SEP], into the shards of the split that `choose(its first piece)` names.
    Returns the number of replacement characters seen: what was not valid UTF-8, a NUL, half a character."""
    split, replaced = None, 0  # the split of the document we are in
    for batch in batched(pieces):
        encoded = tokenizer.encode([text for text, _ in batch], out_type=int, num_threads=threads or os.cpu_count())
        tokens = {name: [] for name in writers}
        for (text, ends), ids in zip(batch, encoded):
            replaced += text.count("\ufffd")
            if ids:
                split = split or choose(text)
                tokens[split] += ids
            if ends and split:
                tokens[split].append(SEP)
                split = None
        for name, writer in writers.items():
            writer.write(tokens[name])
    return replaced


def encode_part(folder, number, pieces, share, threads=0):
    """Write the shards of one part of a corpus, a share `share` of its documents as held out, and last a file that says so.
    pieces: a function, or a list of files. What was written before is not written again."""
    done = folder / f"{number:05d}.json"
    if not done.exists():
        tokenizer = load_tokenizer(folder / "tokenizer.model")
        writers = {split: ShardWriter(folder, f"{split}_{number:05d}", tokenizer.vocab_size()) for split in ("train", "val")}
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


def parts_of(files):
    """Files in groups of at least PART bytes (the last may be smaller), each for one process."""
    groups, size = [[]], 0
    for file in files:
        if size >= PART:
            groups, size = [*groups, []], 0
        groups[-1].append(file)
        size += file.stat().st_size
    return groups


def encode_parts(folder, parts, share):
    """`encode_part` of all parts, a process per core where there are several: [(facts, counts), ...] in order."""
    workers = min(len(parts), os.cpu_count() or 1)
    if workers < 2:
        return [encode_part(folder, number, part, share(number)) for number, part in enumerate(parts)]
    sizes, found = [sum(file.stat().st_size for file in part) for part in parts], {}
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
    stride = max(1, sum(file.stat().st_size for file in files) >> 30)
    size = 0
    for text, ends in read_files(files[::stride]):
        yield text, ends
        size += len(text)
        if size > 1 << 30:
            return


def prepare(pieces, out, vocab, val_fraction=0.05, val_pieces=None, tokenizer=None, source=""):
    """Write tokenizer.model, token shards and meta.json into the folder `out`, which appears only when complete.

    pieces: a list of files, or a function that starts a fresh pass over (text, ends). val_pieces: the same for a held-out
    text; without it a share `val_fraction` of the documents is held out, chosen by a hash. tokenizer: file to use instead of
    training one. Files are encoded on all cores; if that is interrupted, the same call goes on where it was.
    Raises ValueError if there is no text, or none for one of the two splits.
    """
    out = Path(out)
    files = [] if callable(pieces) else [*pieces, *(val_pieces or [])]
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    model = Path(tokenizer).read_bytes() if tokenizer and load_tokenizer(tokenizer) else b""
    key = json.dumps(
        [VERSION, vocab, val_fraction, len(pieces) if files else os.getpid(), facts, hashlib.sha256(model).hexdigest()]
    )
    folder = out.parent / f".{out.name}.{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        lock = open(folder / "lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process that prepares the same is waited for
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror})") from None
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
                raise ValueError(f"no {split} documents came out of {source or 'this text'}{more}")
        meta["train_counts"] = sum(counts for _, counts in encoded).tolist()
        for number in range(len(encoded)):
            for ending in ("json", "counts"):
                (folder / f"{number:05d}.{ending}").unlink()
        (folder / "meta.json").write_text(json.dumps(meta))
        (folder / "lock").unlink()
        folder.rename(out)
    except ValueError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def prepared(data="", vocab=4096, cache="corpus"):
    """The folder of a prepared corpus. `data` is such a folder, or a folder or file of text, or "" for the default corpus;
    the latter two are prepared at the first call and kept in the folder `cache`. ValueError as in `prepare`."""
    if data and (Path(data) / "meta.json").exists():
        return Path(data)
    if data:
        files = text_files([data])
        name = re.sub(r"\W+", "-", Path(data).resolve().name).strip("-")
        facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        source = str(data)
    else:
        versions = [f"python{platform.python_version()}", f"torch{importlib.metadata.version('torch')}"]
        name, facts, source = "manual", versions, "manual of " + ", ".join(versions)
    key = hashlib.sha256(json.dumps([VERSION, vocab, facts]).encode()).hexdigest()[:8]
    out = Path(__file__).parent / cache / f"{name}-{vocab}-{key}"
    if not out.exists():
        print(f"preparing {source} (once; kept in {out})", file=sys.stderr, flush=True)
        documents = [] if data else list(manual())
        prepare(files if data else lambda: iter(documents), out, vocab, source=source)
    return out


# ----------------------------------------------------------------------------------------------------------------
# Batches


def rng(seed, name, step=0):
    """The random numbers of (seed, name, step), and of nothing else."""
    return np.random.default_rng([seed, step, *name.encode()])


def shuffled(index, n, keys):
    """Entries `index` (an array) of a random order of 0 .. n-1, without making that order: a Feistel network permutes
    the next power of four, and what lands at n or above walks on (Black & Rogaway, 2002, "cycle walking")."""
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    half, x = np.uint64(half), np.asarray(index, np.uint64)
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = x >> half, x & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)  # wraps around, as a hash should
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        x = np.where(outside, (left << half) | right, x)
        outside = x >= n
    return x.astype(np.int64)


def mask_tokens(tokens, vocab, generator):
    """BERT's masking of windows (B, T): (inputs (B, T), masked (B, M), targets (B, M)), M = 15% of a window.

    15% of the tokens of each window that are not special are targets; of these 80% become [MASK], 10% a random token,
    10% stay. A window with more specials has fewer targets than M; its spare slots point at position 0 with NO_TARGET.
    """
    B, T = tokens.shape
    slots = masked_per_window(T)
    order = generator.random((B, T))
    order[tokens < SPECIAL] = np.inf  # specials come last
    masked = np.argsort(order, axis=1)[:, :slots]
    real = (tokens >= SPECIAL).sum(axis=1, keepdims=True)
    spare = np.arange(slots) >= np.maximum(1, np.rint(0.15 * real))
    spare |= np.take_along_axis(tokens, masked, 1) < SPECIAL
    targets = np.where(spare, NO_TARGET, np.take_along_axis(tokens, masked, 1))
    dice, random_token = generator.random((B, slots)), generator.integers(SPECIAL, vocab, (B, slots))
    shown = np.where(dice < 0.8, MASK, np.where(dice < 0.9, random_token, targets))
    masked = np.where(spare, 0, masked)
    inputs = tokens.copy()
    np.put_along_axis(inputs, masked, np.where(spare, tokens[:, :1], shown), 1)
    return inputs, masked, targets


def masked_per_window(seq):
    return max(1, round(0.15 * (seq - 1)))


class Corpus:
    """A prepared corpus, checked. `batch` gives training batches, `fixed` an evaluation set that never changes."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        try:
            self.meta = meta = json.loads((folder / "meta.json").read_text())
            self.vocab, digests = meta["vocab"], [meta["tokenizer_sha256"], *meta["train"]["sha256"], *meta["val"]["sha256"]]
            named = {split: list(zip(meta[split]["shards"], meta[split]["sha256"])) for split in ("train", "val")}
            self.train_counts = np.array(meta["train_counts"], np.float64)
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{folder}: its meta.json cannot be read; prepare the corpus again") from None
        self.tokenizer = load_tokenizer(folder / "tokenizer.model")
        if hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest() != meta["tokenizer_sha256"]:
            raise ValueError(f"{folder / 'tokenizer.model'}: not the tokenizer this corpus was prepared with")
        self.shards = {}
        for split, entries in named.items():
            self.shards[split] = [open_shard(folder / Path(name).name, digest) for name, digest in entries]
        self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        self.ends = {split: np.cumsum([len(s) for s in shards]) for split, shards in self.shards.items()}

    def read(self, split, start, count):
        """`count` tokens of a split from token `start` on, across shards."""
        parts = []
        shard = int(np.searchsorted(self.ends[split], start, side="right"))
        while count:
            tokens = self.shards[split][shard]
            offset = start - (int(self.ends[split][shard]) - len(tokens))
            parts.append(tokens[offset : offset + count])
            start, count, shard = start + len(parts[-1]), count - len(parts[-1]), shard + 1
        return np.concatenate(parts)

    def windows(self, split, seq, index):
        """Windows (len(index), seq): [CLS], then seq - 1 consecutive tokens; documents inside are parted by [SEP]."""
        rows = [self.read(split, int(i) * (seq - 1), seq - 1) for i in index]
        return np.column_stack([np.full(len(rows), CLS), np.stack(rows)]).astype(np.int64)

    def count(self, split, seq):
        """How many windows a split has. ValueError if none."""
        count = int(self.ends[split][-1]) // (seq - 1)
        if count == 0:
            raise ValueError(f"{self.folder}: its {split} text is shorter than one sequence of {seq} tokens (--seq)")
        return count

    def order(self, seed, step, size, seq):
        """The numbers (size,) of the training windows of step `step` (from 1). Every window of the corpus comes once per
        epoch, in an order of that epoch's own."""
        n = self.count("train", seq)
        position = np.arange((step - 1) * size, step * size)
        index = np.empty(size, np.int64)
        for epoch in np.unique(position // n):
            keys = rng(seed, "order", int(epoch)).integers(1 << 63, size=4, dtype=np.uint64)
            here = position // n == epoch
            index[here] = shuffled(position[here] % n, n, keys)
        return index

    def batch(self, seed, step, size, seq):
        """Training batch of step `step`: inputs (B, T), masked (B, M), targets (B, M), as int64 arrays."""
        windows = self.windows("train", seq, self.order(seed, step, size, seq))
        return mask_tokens(windows, self.vocab, rng(seed, "mask", step))

    def held_out(self, size, seq, tuning=False):
        """Up to `size` held-out windows, spread evenly. tuning: of those that this leaves over; ValueError if it leaves none."""
        n = self.count("val", seq)
        index = np.arange(min(size, n)) * n // min(size, n)
        if tuning:
            rest = np.setdiff1d(np.arange(n), index)
            if not len(rest):
                raise ValueError(f"--eval_on tuning: all {n} held-out windows are evaluated on; lower --eval_sequences")
            index = rest[np.arange(min(size, len(rest))) * len(rest) // min(size, len(rest))]
        return self.windows("val", seq, index)

    def fixed(self, size, seq, tuning=False):
        """`held_out` windows, masked the same for every seed and run."""
        return mask_tokens(self.held_out(size, seq, tuning), self.vocab, rng(0, "evaluation"))

    def unigram_loss(self, targets):
        """Mean loss, in nats, of predicting targets by their frequency in the training text."""
        counts = self.train_counts[SPECIAL:] + 1
        return float(-np.log(counts / counts.sum())[targets[targets != NO_TARGET] - SPECIAL].mean())


# ----------------------------------------------------------------------------------------------------------------


def demo():
    corpus = Corpus(prepared())
    inputs, masked, targets = (part[0] for part in corpus.batch(seed=0, step=1, size=1, seq=64))
    print(f"\n  {corpus.meta['source']}, fingerprint {corpus.fingerprint}")
    for split in ("train", "val"):
        print(f"  {split:5}  {corpus.meta[split]['tokens']:>9,} tokens in {corpus.meta[split]['documents']:>6,} documents")
    words = [corpus.tokenizer.id_to_piece(int(i)).replace("▁", " ") for i in inputs]
    print("\n  A training window: 15% of its tokens are hidden (80% as [MASK], 10% as another token, 10% left as they are)\n")
    print(textwrap.fill("".join(words), 100, initial_indent="    ", subsequent_indent="    "))
    print("\n  What the model is asked to say:\n")
    for position, target in sorted(zip(masked, targets)):
        if target != NO_TARGET:
            asked = corpus.tokenizer.id_to_piece(int(target)).replace("▁", " ")
            print(f"    token {position:2}   shown {words[position]!r:14}  asked for {asked!r}")
    print()


def main():
    about = "Prepare a corpus, or show one masked example of the default one."
    parser = argparse.ArgumentParser(allow_abbrev=False, usage=argparse.SUPPRESS, description=about)
    parser.add_argument("--input", nargs="+", help="files or folders of .txt, .jsonl, .json (C4), each also .gz")
    parser.add_argument("--out", help="the folder to write, which must not exist")
    parser.add_argument("--val", nargs="+", help="held-out text; without it a share of the documents is held out")
    parser.add_argument("--val_fraction", type=float, default=0.05, help="that share (default 0.05)")
    parser.add_argument("--vocab", type=int, default=4096, help="token ids (default 4096)")
    parser.add_argument("--tokenizer", help="a tokenizer.model to use instead of training one")
    args = parser.parse_args()
    try:
        if not args.input:
            return demo()
        if not args.out or Path(args.out).exists():
            raise ValueError("--out: name a folder that does not exist yet")
        if not 0 < args.val_fraction < 1 or args.vocab < 300:
            raise ValueError("--val_fraction must lie between 0 and 1, --vocab at 300 or above (256 of them are bytes)")
        files, val = text_files(args.input), args.val and text_files(args.val)
        prepare(files, args.out, args.vocab, args.val_fraction, val, args.tokenizer, " ".join(args.input))
        meta = Corpus(args.out).meta
    except ValueError as error:
        parser.exit(2, f"data.py: {error}\n")
    print(f"{args.out}: {meta['train']['tokens']:,} training tokens, {meta['val']['tokens']:,} held out", end="")
    print(f"; {meta['replaced_characters']:,} characters could not be read and were replaced" * bool(meta["replaced_characters"]))


if __name__ == "__main__":
    main()
