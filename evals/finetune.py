"""Fine-tuning, as both evaluations do it: AdamW, linear warm-up and decay, gradients clipped at norm 1."""

import torch

from train import parameter_groups


def set_dropout(model, rate):
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = rate


class Trainer:
    """Takes the `total` steps of one fine-tuning of a model that stays on its device.

    warmup: share of the steps in which the learning rate rises to `lr`; then it falls, by equal amounts, towards 0.
    """

    def __init__(self, model, lr, total, warmup, autocast):
        self.model, self.lr, self.total, self.warmup, self.autocast, self.done = model, lr, total, warmup, autocast, 0
        self.optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr, fused=True)

    def step(self, loss_of, batch):
        """One update; returns the loss of the batch."""
        self.done += 1
        rising = self.done / (self.warmup * self.total + 1)
        falling = (self.total + 1 - self.done) / ((1 - self.warmup) * self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(rising, falling, 1.0)
        with self.autocast:
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
