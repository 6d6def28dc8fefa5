"""Text of a `datasets` corpus, row by row: of the Hub, by name, or of a folder of .parquet, .csv, .json and the like.

    pip install datasets
    python data.py --input hf:allenai/c4:train:en --out corpus/c4        hf:NAME[:SPLIT[:CONFIG]]; SPLIT: train if not said
    python data.py --input hf:my_folder/ --out corpus/mine               what is in it, as `datasets` understands it

The column is "text". Rows are streamed: nothing is downloaded to be kept, memory does not grow with the corpus. Each file of a
corpus is a part of its own for prepare.py, which takes several at a time, and after an interruption only those not yet done.
Not here: tokens (prepare.py); running code that comes with a corpus, which `datasets` has not done since its version 4.
"""

import contextlib
import functools
from typing import NamedTuple

from engine.errors import UserError

COLUMN = "text"


class Rows(NamedTuple):
    """One of the files of a split."""

    name: str
    split: str
    config: str
    number: int  # of this file
    count: int  # of files
    facts: str  # what tells this state of the corpus from another: its files and their times or revisions

    def __str__(self):
        return f"hf:{self.name}"


@contextlib.contextmanager
def refusing(name):
    """What goes wrong in `datasets`, as a ValueError of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # of all these kinds; its own are among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"hf:{name}: `datasets` cannot read it ({reason})") from None


@functools.cache
def builder(name, config):
    try:
        import datasets
    except ImportError:
        raise UserError(f"hf:{name}: reading it takes the package `datasets` (pip install datasets)") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, once
    with refusing(name):
        return datasets.load_dataset_builder(name, config or None)


def rows(address):
    """[Rows, ...] of hf:NAME[:SPLIT[:CONFIG]], one for each file. ValueError if there is no such corpus, or no `datasets`."""
    name, split, config = [*address.removeprefix("hf:").split(":"), "", ""][:3]
    if not name:
        raise UserError(f"{address}: give the name of a corpus, as in hf:allenai/c4:train:en")
    split = split or "train"
    source = builder(name, config)
    with refusing(name):
        count = source.as_streaming_dataset(split).num_shards
    files = (source.config.data_files or {}).get(split, [])
    facts = repr([[str(file) for file in files], getattr(files, "origin_metadata", None), source.hash])
    return [Rows(name, split, config, number, count, facts) for number in range(count)]


def texts(part):
    """The documents of one of `rows`. ValueError if a row has no text."""
    with refusing(part.name):
        batches = (
            builder(part.name, part.config).as_streaming_dataset(part.split).shard(part.count, part.number).iter(256)
        )
    while True:
        with refusing(part.name):
            batch = next(batches, None)
        if batch is None:
            return
        if COLUMN not in batch:
            raise UserError(f'{part}: its columns are {", ".join(batch)}; none is called "{COLUMN}"')
        if not all(isinstance(text, str) for text in batch[COLUMN]):
            raise UserError(f'{part}: a row of its column "{COLUMN}" is not text')
        yield from batch[COLUMN]
