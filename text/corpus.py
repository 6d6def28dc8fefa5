"""A prepared corpus, opened: windows of tokens in a random order that is a pure function of (seed, step).

No shuffle buffer and nothing to save: any step of any epoch is found at once.
Not here: how text becomes token shards (text/prepare.py), how windows become batches (data.py).

Source: order by a Feistel network with cycle walking (Black & Rogaway, 2002).
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from engine.errors import UserError
from text.prepare import CLS, load_tokenizer, open_shard, prepared


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


class Corpus:
    """A prepared corpus, checked. `batch` gives training batches, `fixed` an evaluation set that never changes."""

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        try:
            self.meta = meta = json.loads((folder / "meta.json").read_text())
            self.vocab, digests = (
                meta["vocab"],
                [meta["tokenizer_sha256"], *meta["train"]["sha256"], *meta["val"]["sha256"]],
            )
            named = {split: list(zip(meta[split]["shards"], meta[split]["sha256"])) for split in ("train", "val")}
            self.train_counts = np.array(meta["train_counts"], np.float64)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder}: its meta.json cannot be read; prepare the corpus again") from None
        self.tokenizer = load_tokenizer(folder / "tokenizer.model")
        if hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest() != meta["tokenizer_sha256"]:
            raise UserError(f"{folder / 'tokenizer.model'}: not the tokenizer this corpus was prepared with")
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
            raise UserError(f"{self.folder}: its {split} text is shorter than one sequence of {seq} tokens (--seq)")
        return count

    def at(self, seed, position, seq):
        """The numbers of the training windows at places `position` (an array) of the run's own order of them: every window
        comes once per epoch, in an order of that epoch's own."""
        n = self.count("train", seq)
        index = np.empty(len(position), np.int64)
        for epoch in np.unique(position // n):
            keys = rng(seed, "order", int(epoch)).integers(1 << 63, size=4, dtype=np.uint64)
            here = position // n == epoch
            index[here] = shuffled(position[here] % n, n, keys)
        return index

    def order(self, seed, step, size, seq):
        """The numbers (size,) of the training windows of step `step` (from 1)."""
        return self.at(seed, np.arange((step - 1) * size, step * size), seq)

    def held_out(self, size, seq, tuning=False):
        """Up to `size` held-out windows, spread evenly. tuning: of those that this leaves over; ValueError if it leaves none."""
        n = self.count("val", seq)
        index = np.arange(min(size, n)) * n // min(size, n)
        if tuning:
            rest = np.setdiff1d(np.arange(n), index)
            if not len(rest):
                raise UserError(f"--eval_on tuning: all {n} held-out windows are evaluated on; lower --eval_sequences")
            index = rest[np.arange(min(size, len(rest))) * len(rest) // min(size, len(rest))]
        return self.windows("val", seq, index)


class Mixture(Corpus):
    """Several prepared corpora that share a tokenizer. Of every 1000 rows each gives its share, in an order drawn from the
    seed; each is read in an order of its own, as if it were alone. Held-out rows are shared out alike."""

    def __init__(self, folders, weights):
        self.parts = [Corpus(folder) for folder in folders]
        first = self.parts[0]
        for part in self.parts[1:]:
            if part.meta["tokenizer_sha256"] != first.meta["tokenizer_sha256"]:
                raise UserError(
                    f"--data: {part.folder} has another tokenizer than {first.folder}; see data.py --tokenizer"
                )
        exact = np.array(weights) / sum(weights) * 1000
        self.shares = np.maximum(1, np.floor(exact).astype(int))
        self.shares[exact.argmax()] += 1000 - self.shares.sum()
        self.folder, self.vocab, self.tokenizer = first.folder, first.vocab, first.tokenizer
        self.train_counts = sum(
            share * part.train_counts / part.train_counts.sum() for share, part in zip(self.shares, self.parts)
        )
        self.train_counts *= sum(part.train_counts.sum() for part in self.parts) / 1000
        self.fingerprint = hashlib.sha256(
            repr([(p.fingerprint, int(s)) for p, s in zip(self.parts, self.shares)]).encode()
        ).hexdigest()[:16]
        source = ", ".join(f"{part.meta['source']} ({share / 10:g}%)" for part, share in zip(self.parts, self.shares))
        self.meta = {"source": source, "tokenizer_sha256": first.meta["tokenizer_sha256"]}

    def count(self, split, seq):
        return sum(part.count(split, seq) for part in self.parts)

    def at(self, seed, position, seq):
        """As Corpus.at; the number of a corpus stands in the bits above the 48th."""
        pattern = np.repeat(np.arange(len(self.parts)), self.shares)
        index = np.empty(len(position), np.int64)
        for block in np.unique(position // 1000):
            drawn = rng(seed, "mixture", int(block)).permutation(pattern)
            here = np.flatnonzero(position // 1000 == block)
            for number, part in enumerate(self.parts):
                own = here[drawn[position[here] % 1000] == number]
                rank = np.cumsum(drawn == number)[position[own] % 1000] - 1
                index[own] = part.at(seed, block * self.shares[number] + rank, seq) + (number << 48)
        return index

    def windows(self, split, seq, index):
        rows = np.empty((len(index), seq), np.int64)
        for number, part in enumerate(self.parts):
            own = np.asarray(index) >> 48 == number
            if own.any():
                rows[own] = part.windows(split, seq, np.asarray(index)[own] & ((1 << 48) - 1))
        return rows

    def held_out(self, size, seq, tuning=False):
        sizes = [max(1, round(size * share / 1000)) for share in self.shares]
        return np.concatenate([part.held_out(n, seq, tuning) for part, n in zip(self.parts, sizes)])


def open_corpus(data="", vocab=4096):
    """The corpus that --data names: as in `prepared`, or several prepared folders with weights, FOLDER:3,FOLDER:1."""
    if "," not in data:
        return Corpus(prepared(data, vocab))
    folders, weights = [], []
    for part in data.split(","):
        folder, _, weight = part.rpartition(":") if re.search(r":[0-9.]+$", part) else (part, "", "1")
        if not (Path(folder) / "meta.json").exists():
            raise UserError(
                f"--data {part}: in a mixture every part is a prepared folder (data.py --out), with a weight: FOLDER:3,FOLDER:1"
            )
        folders.append(folder)
        weights.append(float(weight))
    if min(weights) <= 0:
        raise UserError(f"--data {data}: weights must be above 0")
    return Mixture(folders, weights)
