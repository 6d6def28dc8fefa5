"""Documents: what text/prepare.py reads, from files, from the Hub, and from this machine's own manual.

A source is a file, a hub.Shard, or a function. Every reader yields (text, ends): a piece of at most about PIECE
characters, and whether its document ends with it. So memory does not grow with the length of a document.
Not here: tokens (text/prepare.py), how `datasets` is read (text/hub.py).
"""

import ast
import gzip
import importlib.util
import json
import re
import stat
import sysconfig
import zlib
from pathlib import Path

from tqdm import tqdm

from engine.errors import UserError
from text import hub

PIECE = 1 << 16  # characters of a document handled at once


def is_prose(paragraph):
    words = paragraph.split(" ")
    letters = sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph)
    plain = sum(word.strip(".,;:()\"'`").isalpha() for word in words) / len(words)
    return len(words) >= 10 and letters >= 0.85 and plain >= 0.7 and ">>>" not in paragraph


def manual():
    """The default corpus: each distinct paragraph of prose in the multi-line strings of Python's and torch's sources
    (docstrings, help topics) is a document. The sources are parsed, never run."""
    stdlib, torch = Path(sysconfig.get_path("stdlib")), Path(importlib.util.find_spec("torch").origin).parent
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
    files = [f for f in sorted(stdlib.rglob("*.py")) if skipped.isdisjoint(f.relative_to(stdlib).parts)]
    files += sorted(torch.rglob("*.py"))
    seen = set()
    for file in tqdm(files, desc="reading the manual", unit=" files", leave=False, disable=None):
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
    lines, size = [], 0
    for line in iter(lambda: file.readline(PIECE), ""):
        blank = not line.strip()
        if lines and (blank or size >= PIECE):
            yield ("".join(lines).rstrip("\n"), True) if blank else ("".join(lines), False)
            lines, size = [], 0
        if not blank:
            lines.append(line)
            size += len(line)
    if lines:
        yield "".join(lines).rstrip("\n"), True


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


def files_in(folder):
    """All files in a folder and in its folders, sorted; not those of prepared corpora, nor names that begin with a dot.
    Links are followed; a folder that several links lead to is read once, under its own name if that is inside. Raises
    UserError if a folder cannot be read, or a link leads nowhere."""
    files, waiting, seen = [], [folder], set()
    while waiting:
        folder = waiting.pop()
        if folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        try:
            entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
            if {"meta.json", "tokenizer.model"} <= {entry.name for entry in entries}:
                continue  # a prepared corpus
            for entry in entries:
                mode = entry.stat().st_mode
                if stat.S_ISREG(mode):
                    files.append(entry)
                elif stat.S_ISDIR(mode):
                    waiting.insert(0 if entry.is_symlink() else len(waiting), entry)  # links come last
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    return sorted(files)


def without_surrogates(text):
    """The text with lone surrogates, which are not text, replaced by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def kind(file):
    """The end of a file's name, .gz left out, in lower case: .txt, .jsonl, .json or another."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def text_files(paths):
    """The sources that `paths` name: the .txt, .jsonl and .json files, plain or .gz, among them and in their folders,
    and the shards of each hf:NAME. Raises UserError if there are none."""
    files, paths = [], [str(path) for path in paths]
    for path in paths:
        if path.startswith("hf:"):
            files += hub.shards(path)
            continue
        path = Path(path)
        if not path.exists():
            nor = "nor a corpus prepared there (python -m text.prepare)"
            raise UserError(f"{path}: there is no such file or folder, {nor}")
        files += [f for f in (files_in(path) if path.is_dir() else [path]) if kind(f) in (".txt", ".jsonl", ".json")]
    if not files:
        left = "prepared corpora and names that begin with a dot are left out"
        raise UserError(f"{', '.join(paths)}: no .txt, .jsonl or .json file there, plain or .gz; {left}")
    return files


def read(source):
    """The pieces of one source. In files, invalid UTF-8 becomes U+FFFD and CRLF becomes LF."""
    if callable(source):
        yield from source()
    elif isinstance(source, hub.Shard):
        for text in hub.texts(source):
            yield from cut(text)
    else:
        opener = gzip.open if source.suffix.lower() == ".gz" else open
        try:
            with opener(source, "rt", encoding="utf-8-sig", errors="replace", newline=None) as file:
                lines = kind(source) in (".jsonl", ".json")  # C4's files are called .json.gz
                yield from jsonl_pieces(file, source) if lines else text_pieces(file)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{source}: cannot be read ({error})") from None


def pieces_of(sources):
    """The pieces of all sources, in order, with NUL and lone surrogates, which are not text, replaced by U+FFFD."""
    for source in sources:
        for text, ends in read(source):
            plain = text.isascii() and "\0" not in text  # as most texts are; the search below is slower
            yield text if plain else without_surrogates(text).replace("\0", "\ufffd"), ends


def facts_of(sources):
    """What tells one list of sources from another: names, sizes, times. Of a function nothing is known."""
    return [
        None if callable(source)
        else [source.address, source.number, source.version] if isinstance(source, hub.Shard)
        else [str(source.resolve()), source.stat().st_size, source.stat().st_mtime_ns]
        for source in sources
    ]  # fmt: skip
