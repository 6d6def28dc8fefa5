"""EleutherAI's evaluation harness on an exported UL2, which reads the context in both directions.

    python -m evals.harness run --model raptr --model_args pretrained=FOLDER --tasks boolq,nq_open --num_fewshot 5

Everything after `evals.harness` is the harness's own command (`pip install "lm-eval[hf]"`). FOLDER is what `python -m
tools.hf export` wrote. `lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True` works too, and reads
everything from left to right, which a UL2 has hardly learned; that is right for --denoisers garcia, mostly causal.

A context becomes [S] context <0>, read in both directions; the model writes <0>, the answer and [SEP]. The
log-likelihood of an answer includes its [SEP], as in eval_superglue.py. What is too long loses its beginning.
Not here: our own few-shot evaluation, which needs no harness (eval_superglue.py, evals/qa.py).

Source: lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).
"""

import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine.errors import UserError, guard
from evals.finetune import batches, padded

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError:
    sys.exit('evals.harness: needs the evaluation harness: pip install "lm-eval[hf]"')


@register_model("raptr")
class PrefixLM(HFLM):
    """An exported UL2. Takes what the harness's own `hf` takes."""

    def __init__(self, pretrained, **more):
        super().__init__(pretrained, trust_remote_code=True, add_bos_token=False, **more)
        if not str(self.batch_size_per_gpu).isdecimal():
            raise UserError(f"--batch_size: must be a number, not {self.batch_size_per_gpu}")
        self.mode, self.gap = self.tokenizer.convert_tokens_to_ids(["[S]", "<0>"])

    def read(self, context, room):
        """Token ids of [S] context <0> <0>, of which the context has at most `room`."""
        tokens = self.tok_encode(context, add_special_tokens=False)
        return [self.mode, *tokens[max(0, len(tokens) - room) :], self.gap, self.gap]

    @torch.no_grad()
    def loglikelihood(self, requests, disable_tqdm=False):
        """[(log-likelihood of the answer and [SEP], whether it is what greedy decoding writes), ...]."""
        eos, rows = self.tokenizer.eos_token_id, []
        for context, answer in (request.args for request in requests):
            written = [*self.tok_encode(answer, add_special_tokens=False), eos][-(self.max_length - 3) :]
            read = self.read(context, self.max_length - 3 - len(written))
            rows.append((read, written))
        groups = batches([len(read) + len(written) for read, written in rows], int(self.batch_size_per_gpu))
        found = [None] * len(rows)
        for group in tqdm(groups, desc="loglikelihood", disable=disable_tqdm or None):
            tokens = padded([[*rows[i][0], *rows[i][1]] for i in group], eos, self.device)
            prefix = torch.tensor([len(rows[i][0]) - 1 for i in group], device=self.device)
            logits = self.model(tokens, prefix=prefix).logits
            for i, of_row in zip(group, logits):
                read, written = rows[i]
                here = of_row[len(read) - 1 : len(read) - 1 + len(written)]
                target = torch.tensor(written, device=self.device)
                likelihood = -float(F.cross_entropy(here.float(), target, reduction="sum"))
                found[i] = likelihood, bool((here.argmax(-1) == target).all())
                self.cache_hook.add_partial("loglikelihood", requests[i].args, found[i])
        return found

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        """Token ids and attention mask of contexts to be continued."""
        room = (left_truncate_len or self.max_length) - 3
        rows = [{"input_ids": self.read(text, room)} for text in strings]
        batch = self.tokenizer.pad(rows, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]


if __name__ == "__main__":
    guard("evals.harness", cli_evaluate)
