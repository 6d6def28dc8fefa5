"""Batches of texts of about equal length, padded to the longest. For evaluation and fine-tuning; batches for pretraining have
one length (data.py)."""

import torch


def batches(lengths, size, generator=None):
    """Indices in lists of `size`, of about the same length. generator: in a random order, sorted in pools of 1 to 32 batches, so
    that a text is batched with different ones each epoch; without one, in the order of length."""
    order = list(range(len(lengths)))
    if generator:
        generator.shuffle(order)
        pool = size * max(1, min(32, len(order) // (4 * size)))
        order = [i for at in range(0, len(order), pool) for i in sorted(order[at : at + pool], key=lengths.__getitem__)]
    else:
        order.sort(key=lengths.__getitem__)
    found = [order[at : at + size] for at in range(0, len(order), size)]
    if generator:
        generator.shuffle(found)
    return found


def padded(rows, fill, device):
    """Tensor (rows, longest) of lists of token ids, filled up at their ends."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device)
