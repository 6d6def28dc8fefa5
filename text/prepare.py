"""Text to tokens on disk: documents, a tokenizer, token shards.

    python -m text.prepare --input TEXT [TEXT ...] --out DIR    .txt (a blank line ends a document), .jsonl and .json
                                                                (field "text"), each also .gz; hf:NAME (text/hub.py)
    python -m text.prepare --verify DIR                         hash every shard of a prepared corpus, scan its ids

A prepared corpus is a folder with tokenizer.model, token shards and meta.json. It appears when it is complete. A pool
of processes encodes the parts of a text, and the same command continues after an interruption. Memory does not grow
with the text; it grows with the tokenizer's sample, which has about 4,000 characters for each token id.

The default corpus is this machine's own manual: the docstrings and help topics of the running Python and the installed
torch, so that nothing has to be downloaded. It differs between versions; its fingerprint is logged.
Not here: reading text (text/documents.py), opening a prepared corpus (text/corpus.py), batches (data.py).

Source: sentencepiece BPE with byte fallback (Kudo & Richardson, arXiv 1808.06226): any text survives.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from engine import ROOT, log
from engine.errors import UserError, guard
from text import hub
from text.documents import facts_of, manual, pieces_of, text_files

PAD, UNK, CLS, SEP, MASK = range(5)
SPECIAL = 5  # ids below this are never masked and never predicted
SHARD = 1 << 28  # tokens per shard, at most
PART = 1 << 24  # bytes of files that a process encodes at a time, at least
HEADER = 512  # bytes of JSON before a shard's tokens
VERSION = 1  # raised when the same text and tokenizer give other tokens; in the names of the folders of `prepared`

# ----------------------------------------------------------------------------------------------------------------
# Tokenizer


def chance(text, salt=""):
    """A number in [0, 1) that belongs to a text, another one for each salt."""
    return int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:8], "big") / 2**64


def sample_size(vocab):
    """Characters that a tokenizer of `vocab` ids is trained on, at most. In a short text BPE runs out of pairs to
    merge: 10M characters of English do not give 200,000 ids. Measured with 256,000 ids, on 1.0G characters of books in
    ten letter ciphers: 3 minutes on one core, and 6.1 GiB of memory (65,536 ids: 1 minute, 1.8 GiB)."""
    return max(10_000_000, 4_000 * vocab)


def training_pieces(sources, vocab):
    """Pieces to choose the tokenizer's sample from: those of every n-th source, about a gigabyte or more."""
    # 15/8 of a sample: it is halved when it is full, and nearly full again at the end.
    enough = max(1 << 30, sample_size(vocab) * 15 // 8)
    stride = max(1, sum(map(size_of, sources)) // enough)
    size = 0
    for text, ends in pieces_of(sources[::stride]):
        yield text, ends
        size += len(text)
        if size > enough:
            return


def train_tokenizer(pieces, vocab):
    """A sentencepiece BPE model (bytes) of `vocab` ids, trained on a sample of bounded size that is the same each time:
    parts of 1000 characters whose hash lies below a threshold, halved whenever they outgrow sample_size(vocab).
    Raises UserError if the text is too short for so many ids, or has more characters than ids."""
    sample, size, threshold = [], 0, 1.0
    for text, _ in pieces:
        for start in range(0, len(text), 1000):  # sentencepiece leaves out sentences over 4192 bytes
            part = text[start : start + 1000]
            if part.strip() and chance(part, "sample") < threshold:
                sample.append(part)
                size += len(part)
        while size > sample_size(vocab):
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
        if most := re.search(r"<= (\d+)", reason):
            reason = f"at most {most[1]}; lower it, or give more text"
        elif least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
            reason = f"its characters and bytes alone need {least[1]}; raise --vocab"
        raise UserError(f"no tokenizer of {vocab} ids (--vocab) can be made of this text: {reason}") from None
    return model.getvalue()


def load_tokenizer(path, sha256=None):
    """The sentencepiece tokenizer in a file. Raises UserError if it is none, lacks our special tokens, or has another
    SHA-256 than `sha256`, where that is given."""
    try:
        model = Path(path).read_bytes()
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
        specials = [tokenizer.id_to_piece(i) for i in range(SPECIAL)]
    except (OSError, RuntimeError, IndexError):
        raise UserError(f"{path}: not a readable sentencepiece model") from None
    if specials != ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]:
        raise UserError(f"{path}: its first pieces are {specials}, not [PAD] [UNK] [CLS] [SEP] [MASK]")
    if sha256 not in (None, hashlib.sha256(model).hexdigest()):
        raise UserError(f"{path}: not the tokenizer this corpus was prepared with")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------
# Token shards: a JSON header of HEADER bytes (try `head -c 512`), then the tokens


def token_dtype(vocab):
    """The type of a shard's tokens."""
    return "<u2" if vocab <= 1 << 16 else "<u4"


class ShardWriter:
    """Appends tokens to FOLDER/NAME_00000.bin, _00001.bin, ..., of at most SHARD tokens each."""

    def __init__(self, folder, name, vocab):
        self.folder, self.name, self.vocab, self.dtype = folder, name, vocab, token_dtype(vocab)
        self.waiting, self.file = [], None  # tokens not written yet; the shard that is open
        self.names, self.digests, self.counts = [], [], np.zeros(vocab, np.int64)

    def write(self, tokens):
        self.waiting += tokens
        if len(self.waiting) >= 1 << 18:
            self.flush()

    def flush(self):
        tokens, self.waiting = np.array(self.waiting, np.int64), []
        self.counts += np.bincount(tokens, minlength=self.vocab)  # does not fit if an id is outside the vocabulary
        while len(tokens):
            if self.file is None:
                self.names.append(f"{self.name}_{len(self.names):05d}.bin")
                self.file, self.count, self.hash = open(self.folder / self.names[-1], "wb"), 0, hashlib.sha256()
                self.file.write(b" " * HEADER)
            fitting, tokens = tokens[: SHARD - self.count].astype(self.dtype), tokens[SHARD - self.count :]
            self.file.write(fitting)
            self.hash.update(fitting)
            self.count += len(fitting)
            if self.count == SHARD:
                self.end_shard()

    def end_shard(self):
        header = {"format": "raptr tokens", "dtype": self.dtype, "count": self.count, "vocab": self.vocab}
        self.digests.append(self.hash.hexdigest())
        self.file.seek(0)
        self.file.write(json.dumps({**header, "sha256": self.digests[-1]}).ljust(HEADER - 1).encode() + b"\n")
        self.file.close()
        self.file = None

    def close(self):
        """Returns the facts that meta.json records of these shards."""
        self.flush()
        if self.file is not None:
            self.end_shard()
        tokens, documents = int(self.counts.sum()), int(self.counts[SEP])
        return {"shards": self.names, "sha256": self.digests, "tokens": tokens, "documents": documents}


def open_shard(path, sha256, vocab):
    """The tokens of a shard as a read-only memory map. Checks its header, size and recorded SHA-256, but does not read
    the tokens (Corpus.verify does). Raises UserError naming the file."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.read(HEADER))
        dtype, count, size = np.dtype(header["dtype"]), int(header["count"]), os.path.getsize(path)
        recorded = header["sha256"], header["vocab"]
        if header["format"] != "raptr tokens" or header["dtype"] not in ("<u2", "<u4") or count < 1:
            raise ValueError
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{path}: not a token shard") from None
    if size != HEADER + count * dtype.itemsize:
        raise UserError(f"{path}: {size} bytes long, not the {HEADER + count * dtype.itemsize} it was written with")
    if recorded != (sha256, vocab):
        raise UserError(f"{path}: not the shard that meta.json records (SHA-256 or vocabulary differs)")
    return np.memmap(path, dtype, "r", HEADER, (count,))


# ----------------------------------------------------------------------------------------------------------------
# Preparing a corpus


def encoder(tokenizer):
    """A function from a text to its ids. It encodes line by line, because 64K characters at once take sentencepiece 1.5
    times as long. With a tokenizer for which lines give other ids (none made here) it encodes them at once."""
    lines = [" a\n", "\n", "  B \n", "c"]
    if tokenizer.encode("".join(lines)) != [token for line in lines for token in tokenizer.encode(line)]:
        return tokenizer.encode
    return lambda text: [token for line in io.StringIO(text) for token in tokenizer.encode(line)]


def write_documents(pieces, share, tokenizer, writers):
    """Encode documents, each closed by [SEP]. A share `share` of them, chosen by a hash of their first piece, goes to
    writers["val"], the others to writers["train"]. Returns how many U+FFFD they hold."""
    encode = encoder(tokenizer)
    split, replaced = None, 0  # the split of the document we are in
    for text, ends in pieces:
        replaced += text.count("\ufffd")
        ids = encode(text)
        if split is None and ids:
            split = "val" if chance(text) < share else "train"
        if split is not None:  # a document without a token leaves no [SEP] either
            writers[split].write(ids + [SEP] * ends)
        split = None if ends else split
    return replaced


def encode_part(folder, number, sources, share):
    """Write the shards of part `number` of a corpus, a share `share` of its documents as held out. Last comes
    NUMBER.json, which says what the shards hold: a part that has it is done, and not encoded again."""
    done = folder / f"{number:05d}.json"
    if done.exists():
        return
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    vocab = tokenizer.vocab_size()
    writers = {split: ShardWriter(folder, f"{split}_{number:05d}", vocab) for split in ("train", "val")}
    replaced = write_documents(pieces_of(sources), share, tokenizer, writers)
    facts = {split: writer.close() for split, writer in writers.items()}
    log.write(done, json.dumps({"replaced": replaced, "counts": writers["train"].counts.tolist(), **facts}))


def size_of(source):
    """Bytes of a file. A shard of the Hub counts as PART, so that it becomes a part by itself."""
    return 0 if callable(source) else PART if isinstance(source, hub.Shard) else source.stat().st_size


def parts_of(sources):
    """Sources in groups of at least PART bytes (the last may be smaller), each for one process."""
    groups, size = [[]], 0
    for source in sources:
        if size >= PART:
            groups, size = [*groups, []], 0
        groups[-1].append(source)
        size += size_of(source)
    return [group for group in groups if group]


def encode_parts(folder, parts, shares):
    """encode_part for all parts, on as many processes as there are cores."""
    workers = min(len(parts), os.cpu_count() or 1)
    tasks = [repeat(folder), range(len(parts)), parts, shares]
    if workers < 2 or any(callable(source) for part in parts for source in part):  # functions stay in their process
        return [*map(encode_part, *tasks)]
    quiet = signal.SIGINT, signal.SIG_DFL  # Ctrl-C ends a worker without a traceback
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, quiet) as pool:
        encoded = pool.map(encode_part, *tasks)  # its first error cancels the parts that have not begun
        return [*tqdm(encoded, total=len(parts), desc="encoding", unit=" parts", leave=False, disable=None)]


def write_meta(folder, count, source):
    """Write meta.json of a corpus of `count` encoded parts, and remove what they left beside their shards.
    Raises UserError if a split has no document."""
    vocab = load_tokenizer(folder / "tokenizer.model").vocab_size()
    digest = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    meta = {"version": VERSION, "source": source, "vocab": vocab, "replaced_characters": 0, "tokenizer_sha256": digest}
    meta |= {split: {"shards": [], "sha256": [], "tokens": 0, "documents": 0} for split in ("train", "val")}
    counts = np.zeros(vocab, np.int64)
    for number in range(count):
        facts = json.loads((folder / f"{number:05d}.json").read_text())
        counts += np.array(facts["counts"])
        meta["replaced_characters"] += facts["replaced"]
        for split in ("train", "val"):
            for name, value in facts[split].items():
                meta[split][name] += value  # lists are joined, numbers added
    for split in ("train", "val"):
        if not meta[split]["shards"]:
            more = "; give a held-out text (--val) or hold out more (--val_fraction)" if split == "val" else ""
            raise UserError(f"no {split} documents came out of {source or 'this text'}{more}")
    log.write(folder / "meta.json", json.dumps({**meta, "train_counts": counts.tolist()}))
    for number in range(count):
        (folder / f"{number:05d}.json").unlink()


def lock(folder):
    """Make a folder and lock it: returns an open file, which holds the lock until it is closed. Waits while another
    process holds it; if that one has renamed or removed the folder, begins again."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):  # exist_ok=True raises it too, if another renames it just then
                folder.mkdir()
            with contextlib.suppress(FileNotFoundError):  # renamed or removed by another
                file = open(folder / "lock", "w")
                log.flock(file, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / "lock")):
                    return file
    except FileExistsError as error:
        raise UserError(f"{error.filename}: not a folder, or a link to one that does not exist") from None
    except OSError as error:
        raise UserError(f"{folder.parent}: cannot be written ({error.strerror})") from None


def prepare(pieces, out, vocab, val_fraction=0.05, val_pieces=None, tokenizer=None, source=""):
    """Write tokenizer.model, token shards and meta.json into the folder `out`, which appears only when complete.

    pieces: a list of sources (text_files), or a function that starts a fresh pass over (text, ends). val_pieces: the
    same for a held-out text; without it a share `val_fraction` of the documents is held out, chosen by a hash.
    tokenizer: file to use instead of training one of `vocab` ids.
    After an interruption, a full disk, or a part that cannot be read, the same call continues; what a function yields
    is encoded anew. Several processes may make the same call: one works, the others wait for it.
    Raises UserError if there is no text, or none for one of the two splits, or `out` cannot be written.
    """
    text, held_out = ([p] if callable(p) else [*(p or [])] for p in (pieces, val_pieces))
    model = Path(tokenizer).read_bytes() if tokenizer and load_tokenizer(tokenizer) else b""
    facts = [vocab, val_fraction, facts_of(text), facts_of(held_out), hashlib.sha256(model).hexdigest()]
    key = hashlib.sha256(json.dumps([VERSION, PART, *facts]).encode()).hexdigest()[:8]
    out = Path(out)
    folder = out.parent / f".{out.name}.{key}"
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f"{out}: not a folder, or a link to one that does not exist")
    with lock(folder):
        if out.exists():  # made by another process, while this one waited
            return shutil.rmtree(folder, ignore_errors=True)
        if callable(pieces):  # nobody knows whether it yields what it did before
            for file in set(folder.iterdir()) - {folder / "lock"}:
                file.unlink()
        try:
            if not (folder / "tokenizer.model").exists():
                model = model or train_tokenizer(training_pieces(text, vocab), vocab)
                (folder / "tokenizer.tmp").write_bytes(model)
                (folder / "tokenizer.tmp").rename(folder / "tokenizer.model")
            parts, val_parts = parts_of(text), parts_of(held_out)
            shares = [0.0 if held_out else val_fraction] * len(parts) + [1.0] * len(val_parts)
            encode_parts(folder, parts + val_parts, shares)
            write_meta(folder, len(shares), source)
        except (UserError, OSError) as error:
            full = isinstance(error, OSError)
            if full and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = f"{out.parent}: cannot be written ({error.strerror})" if full else str(error)
            encoded = len([*folder.glob("[0-9]*.json")])
            if encoded and (full or encoded < len(shares)) and not callable(pieces):  # perhaps only the network failed
                raise UserError(f"{reason}; what is encoded stays in {folder}, and the same command goes on") from None
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(reason) from None
        folder.rename(out)
        (out / "lock").unlink()


def prepared(data="", vocab=4096):
    """The folder of a prepared corpus. data: such a folder, or a folder or file of text, or "" for the default corpus;
    the latter two are prepared at the first call and kept in corpus/. Raises UserError as `prepare` does."""
    if data and (Path(data) / "meta.json").exists():
        return Path(data)
    if data:
        files = text_files([data])
        name, facts, source = re.sub(r"\W+", "-", Path(data).resolve().name).strip("-"), facts_of(files), str(data)
    else:
        versions = [f"python{platform.python_version()}", f"torch{importlib.metadata.version('torch')}"]
        name, facts, source = "manual", versions, "manual of " + ", ".join(versions)
    key = hashlib.sha256(json.dumps([VERSION, vocab, facts]).encode()).hexdigest()[:8]
    out = ROOT / "corpus" / f"{name}-{vocab}-{key}"
    if not out.exists():
        print(f"preparing {source}, once:\n{out}", file=sys.stderr, flush=True)
        documents = [] if data else list(manual())
        prepare(files if data else lambda: iter(documents), out, vocab, source=source)
    return out


# ----------------------------------------------------------------------------------------------------------------


def main():
    from engine.options import command, number  # only the command knows of flags, and of what is built on this file
    from text.corpus import Corpus

    ids = number(int, "a whole number, 300 or above (256 ids are bytes)", lambda x: x >= 300)
    fraction = number(float, "a number between 0 and 1", lambda x: 0 < x < 1)
    parser = command("text.prepare", __doc__)
    parser.add_argument("--input", nargs="+", metavar="TEXT", help="files or folders of text, or hf:NAME")
    parser.add_argument("--out", metavar="DIR", help="folder to write, which must not exist")
    parser.add_argument("--val", nargs="+", metavar="TEXT", help="held-out text; by default a share of the documents")
    parser.add_argument("--val_fraction", type=fraction, default=0.05, metavar="X", help="that share [0.05]")
    parser.add_argument("--vocab", type=ids, default=4096, metavar="N", help="token ids [4096]")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model to use instead of training one")
    parser.add_argument("--verify", metavar="DIR", help="prepared corpus to read and check, every byte of it")
    args = parser.parse_args()
    if args.verify:
        sizes = []
        for path, tokens in Corpus(args.verify).verify():
            print(f"{path}: SHA-256 and ids of {tokens:,} tokens checked", flush=True)
            sizes.append(tokens)
        return print(f"{args.verify}: its tokenizer, {len(sizes)} shards and {sum(sizes):,} tokens are as recorded")
    if not args.input:
        parser.error("name a text to prepare (--input), or a prepared corpus to check (--verify)")
    if not args.out or Path(args.out).exists():
        parser.error("--out: name a folder that does not exist yet")
    files, val = text_files(args.input), args.val and text_files(args.val)
    prepare(files, args.out, args.vocab, args.val_fraction, val, args.tokenizer, " ".join(args.input))
    meta = Corpus(args.out).meta
    print(f"{args.out}: {meta['train']['tokens']:,} training tokens, {meta['val']['tokens']:,} held out")
    if meta["replaced_characters"]:
        print(f"{meta['replaced_characters']:,} characters could not be read and were replaced")


if __name__ == "__main__":
    guard("text.prepare", main)
