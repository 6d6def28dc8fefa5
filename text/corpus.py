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
    """A generator whose numbers depend on (seed, name, step) alone."""
    return np.random.default_rng([seed, step, *name.encode()])


def shuffled(index, n, keys):
    """Entries `index` (an array) of a random order of 0 .. n-1, without making that order: a Feistel network with these
    round keys permutes the next power of four; what lands at n or above goes through it again (cycle walking)."""
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
    """A prepared corpus, opened: windows of its training and held-out text.

    folder: as text/prepare.py writes it. Opening checks the tokenizer and each shard's header, size and recorded
    SHA-256. It reads no tokens, as that would take minutes for a terabyte: `verify` does. Ids are checked in each
    window that is read. Raises UserError naming the bad file.
    """

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        try:
            self.meta = meta = json.loads((folder / "meta.json").read_text())
            self.vocab, self.train_counts = meta["vocab"], np.array(meta["train_counts"], np.float64)
            digests = [meta["tokenizer_sha256"], *meta["train"]["sha256"], *meta["val"]["sha256"]]
            self.fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
            names = {split: [folder / Path(name).name for name in meta[split]["shards"]] for split in ("train", "val")}
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{folder}: its meta.json cannot be read; prepare the corpus again") from None
        self.tokenizer = load_tokenizer(folder / "tokenizer.model", meta["tokenizer_sha256"])
        self.shards = {
            split: [open_shard(*shard, self.vocab) for shard in zip(paths, meta[split]["sha256"])]
            for split, paths in names.items()
        }
        self.ends = {split: np.cumsum([len(shard) for shard in shards]) for split, shards in self.shards.items()}

    def verify(self):
        """Read all tokens: hash every shard and scan its ids. Yields (path, number of tokens) of each. Raises UserError
        naming the first that has changed since it was written."""
        for split, shards in self.shards.items():
            for tokens, recorded in zip(shards, self.meta[split]["sha256"]):
                digest, highest = hashlib.sha256(), 0
                for start in range(0, len(tokens), 1 << 22):
                    block = np.array(tokens[start : start + (1 << 22)])  # a copy, so that the disk is read once
                    digest.update(block)
                    highest = max(highest, int(block.max()))
                if digest.hexdigest() != recorded:
                    raise UserError(f"{tokens.filename}: its bytes have changed since it was written (SHA-256 differs)")
                if highest >= self.vocab:
                    raise UserError(f"{tokens.filename}: holds id {highest}, outside its vocabulary of {self.vocab}")
                yield tokens.filename, len(tokens)

    def read(self, split, start, count):
        """`count` tokens of a split from token `start` on, across shards. Raises UserError naming the shard if an id is
        outside the vocabulary."""
        pieces = []
        shard = int(np.searchsorted(self.ends[split], start, side="right"))
        while count:
            tokens = self.shards[split][shard]
            offset = start - (int(self.ends[split][shard]) - len(tokens))
            piece = tokens[offset : offset + count]
            if piece.max() >= self.vocab:  # it would fail on the device, far from here and without a name
                raise UserError(
                    f"{tokens.filename}: holds id {piece.max()}, outside its vocabulary of {self.vocab}; its bytes have"
                    f" changed (python -m text.prepare --verify {self.folder})"
                )
            pieces.append(piece)
            start, count, shard = start + len(piece), count - len(piece), shard + 1
        return np.concatenate(pieces)

    def windows(self, split, seq, index):
        """Windows (len(index), seq): [CLS], then seq - 1 consecutive tokens; [SEP] ends each document inside."""
        rows = [self.read(split, int(i) * (seq - 1), seq - 1) for i in index]
        return np.column_stack([np.full(len(rows), CLS), np.stack(rows)]).astype(np.int64)

    def count(self, split, seq):
        """How many windows a split has. Raises UserError if none."""
        count = int(self.ends[split][-1]) // (seq - 1)
        if count == 0:
            raise UserError(f"{self.folder}: its {split} text is shorter than one sequence of {seq} tokens (--seq)")
        return count

    def at(self, seed, position, seq):
        """Numbers of the training windows at `position` (an array) of a run's order. Every window comes once per epoch,
        in another order each time."""
        n = self.count("train", seq)
        index = np.empty(len(position), np.int64)
        for epoch in np.unique(position // n):
            keys = rng(seed, "order", int(epoch)).integers(1 << 63, size=4, dtype=np.uint64)
            here = position // n == epoch
            index[here] = shuffled(position[here] % n, n, keys)
        return index

    def order(self, seed, step, size, seq):
        """Numbers (size,) of the training windows of step `step` (from 1)."""
        return self.at(seed, np.arange((step - 1) * size, step * size), seq)

    def held_out(self, size, seq, tuning=False):
        """Up to `size` held-out windows (size, seq), spread evenly. tuning: windows outside that evaluation set. Raises
        UserError if there are none."""
        n = self.count("val", seq)
        index = np.arange(min(size, n)) * n // min(size, n)
        if tuning:
            others = np.setdiff1d(np.arange(n), index)
            if not len(others):
                raise UserError(f"--eval_on tuning: all {n} held-out windows are evaluated on; lower --eval_sequences")
            index = others[np.arange(min(size, len(others))) * len(others) // min(size, len(others))]
        return self.windows("val", seq, index)


class Mixture(Corpus):
    """Several prepared corpora that share a tokenizer. Of every 1000 rows each corpus gives its share, interleaved by a
    permutation from the seed, and each corpus is read in the order it would have alone. Held-out rows are shared alike.

    Raises UserError if the tokenizers differ.
    """

    def __init__(self, folders, weights):
        self.corpora = [Corpus(folder) for folder in folders]
        first = self.corpora[0]
        for other in self.corpora[1:]:
            if other.meta["tokenizer_sha256"] != first.meta["tokenizer_sha256"]:
                both = f"--data: {other.folder} has another tokenizer than {first.folder}"
                raise UserError(f"{both}; prepare it with --tokenizer {first.folder / 'tokenizer.model'}")
        exact = np.array(weights) / sum(weights) * 1000
        self.shares = np.maximum(1, np.floor(exact).astype(int))
        self.shares[exact.argmax()] += 1000 - self.shares.sum()
        self.folder, self.vocab, self.tokenizer = first.folder, first.vocab, first.tokenizer
        pairs = list(zip(self.corpora, self.shares))
        self.train_counts = sum(share * corpus.train_counts / corpus.train_counts.sum() for corpus, share in pairs)
        self.train_counts *= sum(corpus.train_counts.sum() for corpus in self.corpora) / 1000
        facts = repr([(corpus.fingerprint, int(share)) for corpus, share in pairs])
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
        source = ", ".join(f"{corpus.meta['source']} ({share / 10:g}%)" for corpus, share in pairs)
        self.meta = {"source": source, "tokenizer_sha256": first.meta["tokenizer_sha256"]}

    def count(self, split, seq):
        return sum(corpus.count(split, seq) for corpus in self.corpora)

    def at(self, seed, position, seq):
        """As Corpus.at. The bits of a number above the 48th say which corpus it is a window of."""
        pattern = np.repeat(np.arange(len(self.corpora)), self.shares)
        index = np.empty(len(position), np.int64)
        for block in np.unique(position // 1000):
            chosen = rng(seed, "mixture", int(block)).permutation(pattern)  # (1000,): the corpus of each row
            here = np.flatnonzero(position // 1000 == block)
            for number, corpus in enumerate(self.corpora):
                rows = here[chosen[position[here] % 1000] == number]
                rank = np.cumsum(chosen == number)[position[rows] % 1000] - 1
                index[rows] = corpus.at(seed, block * self.shares[number] + rank, seq) + (number << 48)
        return index

    def windows(self, split, seq, index):
        windows = np.empty((len(index), seq), np.int64)
        for number, corpus in enumerate(self.corpora):
            rows = np.asarray(index) >> 48 == number
            if rows.any():
                windows[rows] = corpus.windows(split, seq, np.asarray(index)[rows] & ((1 << 48) - 1))
        return windows

    def held_out(self, size, seq, tuning=False):
        sizes = [max(1, round(size * share / 1000)) for share in self.shares]
        return np.concatenate([corpus.held_out(n, seq, tuning) for corpus, n in zip(self.corpora, sizes)])


def open_corpus(data="", vocab=4096):
    """The corpus that --data names: as in `prepared`, or several prepared folders with weights, FOLDER:3,FOLDER:1."""
    if "," not in data:
        return Corpus(prepared(data, vocab))
    folders, weights = [], []
    for entry in data.split(","):
        folder, _, weight = entry.rpartition(":") if re.search(r":(\d+\.?\d*|\.\d+)$", entry) else (entry, "", "1")
        if not (Path(folder) / "meta.json").exists():
            rule = "a mixture is made of prepared folders (python -m text.prepare), with weights: FOLDER:3,FOLDER:1"
            raise UserError(f"--data {entry}: {rule}")
        folders.append(folder)
        weights.append(float(weight))
    if min(weights) <= 0:
        raise UserError(f"--data {data}: weights must be above 0")
    return Mixture(folders, weights)
