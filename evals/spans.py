"""Marking the answer in a text: a BERT with two scores a token, for where an answer begins and where it ends.

A context that is too long is read in windows that overlap. [CLS] stands for "the answer is not in this window".
Not here: the questions' files (evals/qa_files.py), training and choosing among windows (evals/qa.py).

Source: BERT on SQuAD (Devlin et al., arXiv 1810.04805, sections 4.2 and 4.3).
Legend: T tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from engine.errors import UserError
from evals.finetune import padded


class Window(NamedTuple):
    question: int  # index
    tokens: list  # [CLS] question [SEP] part of the context [SEP]
    first: int  # where the context begins in them
    places: list  # (begin, end) in the context's text, of each token of it here
    label: tuple  # first and last token of the answer; (0, 0), which is [CLS], where it is not in here


def places(tokenizer, text):
    """(token ids, [(begin, end) in the text])."""
    if hasattr(tokenizer, "places"):  # WordPiece (text/wordpiece.py)
        return tokenizer.places(text)
    ids, spans, end = tokenizer.encode(text), [], 0  # our pieces, one after another, are the text itself
    for i, piece in zip(ids, tokenizer.id_to_piece(ids)):
        inner = tokenizer.is_byte(i) and 0x80 <= int(piece[1:-1], 16) < 0xC0  # not the first byte of a character
        begin = end - 1 if inner else end
        end = begin + 1 if tokenizer.is_byte(i) else begin + len(piece)
        spans.append((begin, end))
    return ids, spans


def answer_tokens(question, spans, source):
    """(first, last) token of a question's first answer, or None without one. Raises UserError, naming the file
    `source`, if it is not where the file says."""
    if not question.answers:
        return None
    text, begin = question.answers[0], question.starts[0]
    if not isinstance(begin, int) or begin < 0 or not text or question.context[begin : begin + len(text)] != text:
        raise UserError(
            f"{source}, question {question.id!r}: its context does not have {text[:40]!r} at answer_start {begin}"
        )
    inside = [i for i, (b, e) in enumerate(spans) if b < begin + len(text) and e > begin]
    return (inside[0], inside[-1]) if inside else None


def windows(tokenizer, questions, longest, stride, source=None):
    """The windows of all questions, in order, of up to `longest` tokens. Each begins `stride` tokens of context after
    the one before. source: the file of the questions, where the windows are to be learned and need labels."""
    made = []
    for number, question in enumerate(questions):
        head = [tokenizer.bos_id(), *tokenizer.encode(question.question)[: min(64, longest // 2)], tokenizer.eos_id()]
        ids, spans = places(tokenizer, question.context)
        answer = answer_tokens(question, spans, source) if source else None
        size = longest - len(head) - 1
        step = min(stride, size)
        for at in range(0, max(1, len(ids) - size + step), step):
            tokens = [*head, *ids[at : at + size], tokenizer.eos_id()]
            inside = answer and at <= answer[0] and answer[1] < at + size
            label = tuple(len(head) + i - at for i in answer) if inside else (0, 0)
            made.append(Window(number, tokens, len(head), spans[at : at + size], label))
    return made


class Spans(torch.nn.Module):
    """A BERT with a fresh head of two scores a token."""

    def __init__(self, encoder, tokenizer, seed):
        super().__init__()
        self.encoder, self.pad = encoder, tokenizer.pad_id()
        self.head = torch.nn.Linear(encoder.config.width, 2)
        torch.nn.init.normal_(self.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, group):
        """Scores (windows, T, 2) of beginning and end, -inf but for the context and [CLS]."""
        device = self.head.weight.device
        tokens = padded([w.tokens for w in group], self.pad, device)
        column = lambda values: torch.tensor(values, device=device)[:, None]  # noqa: E731
        place, first = torch.arange(tokens.shape[1], device=device), column([w.first for w in group])
        inside = place < column([len(w.tokens) for w in group])
        mask = None if inside.all() else inside[:, None, None]
        states = self.encoder.encode(tokens, mask=mask, types=((place >= first) & inside).long())
        context = (place >= first) & (place < first + column([len(w.places) for w in group]))
        return self.head(states).float().masked_fill(~(context | (place == 0))[:, :, None], -torch.inf)

    def loss(self, group):
        """Mean cross-entropy, in nats, of the two ends."""
        labels = torch.tensor([w.label for w in group], device=self.head.weight.device)
        return F.cross_entropy(self(group), labels)  # classes are places: dimension 1

    @torch.no_grad()
    def best(self, group, longest):
        """For each window (score of its best span of up to `longest` tokens, first, last, score of no answer)."""
        begin, end = self(group).unbind(-1)
        nothing = begin[:, 0] + end[:, 0]
        pairs = begin[:, 1:, None] + end[:, None, 1:]  # (windows, T - 1, T - 1)
        allowed = torch.ones_like(pairs[0], dtype=torch.bool).triu().tril(longest - 1)
        value, at = pairs.masked_fill(~allowed, -torch.inf).flatten(1).max(1)
        T = pairs.shape[1]
        return list(zip(value.tolist(), (at // T + 1).tolist(), (at % T + 1).tolist(), nothing.tolist()))
