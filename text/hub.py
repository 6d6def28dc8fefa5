"""Documents of a `datasets` corpus: one of the Hub, by name, or a folder of .parquet, .csv, .json and the like.

    pip install datasets
    python -m text.prepare --input hf:allenai/c4:train:en --out corpus/c4      hf:NAME[:SPLIT[:CONFIG]]; SPLIT: train
    python -m text.prepare --input hf:my_folder/ --out corpus/mine             what is in it, as `datasets` reads it

The documents are the column "text". They are streamed: no copy stays on disk, and memory does not grow with the corpus.
text/prepare.py encodes several shards of a corpus (its files, mostly) at a time.
Not here: tokens (text/prepare.py). No code that comes with a corpus runs: `datasets` has none since its version 4.
"""

import contextlib
from typing import Any, NamedTuple

from engine.errors import UserError

COLUMN = "text"


class Shard(NamedTuple):
    """One shard of a streamed corpus. It stands where text/prepare.py expects a file."""

    address: str  # hf:NAME:SPLIT:CONFIG
    number: int
    version: str  # changes when a file of the corpus does
    rows: Any  # a datasets.IterableDataset


@contextlib.contextmanager
def refusing(address):
    """Turn what `datasets` raises into a UserError of one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # its errors are of these kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{address}: `datasets` cannot read it ({reason})") from None


def shards(address):
    """[Shard, ...] of hf:NAME[:SPLIT[:CONFIG]]. Raises UserError if there is no such corpus, or no `datasets`."""
    name, split, config = [*address.removeprefix("hf:").split(":"), "", ""][:3]
    if not name:
        raise UserError(f"{address}: give the name of a corpus, as in hf:allenai/c4:train:en")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{address}: reading it takes the package `datasets` (pip install datasets)") from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are reported once, as UserErrors
    with refusing(address):
        version = datasets.load_dataset_builder(name, config or None).hash
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        count = rows.num_shards
    return [Shard(address, i, version, rows.shard(num_shards=count, index=i)) for i in range(count)]


def texts(shard):
    """The documents of a Shard. Raises UserError if a row has no text."""
    with refusing(shard.address):
        for row in shard.rows:
            if COLUMN not in row:
                raise UserError(f'{shard.address}: its columns are {", ".join(row)}; none is called "{COLUMN}"')
            if not isinstance(row[COLUMN], str):
                raise UserError(f'{shard.address}: a row of its column "{COLUMN}" is not text')
            yield row[COLUMN]
