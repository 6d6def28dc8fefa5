"""The tokenizer of an original BERT, from its vocab.txt. Needs the package `tokenizers` (pip install tokenizers)."""

import json
from pathlib import Path

from engine.errors import UserError


class WordPiece:
    """BERT's WordPiece tokenizer, with those methods of a SentencePieceProcessor that this project uses.

    path: a vocab.txt. Text is lower-cased, as for the uncased models, unless a tokenizer_config.json beside it says
    otherwise. Raises UserError if `tokenizers` is not installed, or a special token is missing.
    """

    def __init__(self, path):
        try:
            from tokenizers import BertWordPieceTokenizer
        except ImportError:
            raise UserError("WordPiece needs the package tokenizers: pip install tokenizers") from None
        words = Path(path).read_text(encoding="utf-8").split("\n")
        settings = Path(path).with_name("tokenizer_config.json")
        lower = json.loads(settings.read_text()).get("do_lower_case", True) if settings.exists() else True
        self.words, self.ids = [w for w in words if w], {word: i for i, word in enumerate(words)}
        missing = [word for word in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if word not in self.ids]
        if missing:
            raise UserError(f"{path}: {missing[0]} is not in it")
        self.tokenizer = BertWordPieceTokenizer(str(path), lowercase=lower)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def places(self, text):
        """(token ids, [(begin, end) in the text])."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids):
        return self.tokenizer.decode(ids)

    def id_to_piece(self, i):
        word = self.words[i]
        return word[2:] if word.startswith("##") else "▁" + word

    def piece_to_id(self, piece):
        return self.ids[piece]

    def vocab_size(self):
        return len(self.words)

    def pad_id(self):
        return self.ids["[PAD]"]

    def unk_id(self):
        return self.ids["[UNK]"]

    def bos_id(self):
        return self.ids["[CLS]"]

    def eos_id(self):
        return self.ids["[SEP]"]
