"""The transformer: a BERT encoder that runs any subset of its layers, and what that costs.

One visible place decides what a skipped layer means: the loop in `BERT.encode`. Blocks know nothing of paths.
Not here: which layers to run (raptr.py), the data (data.py), the optimizer (train.py).

    python model.py             parameters and FLOPs of every preset in configs/

Sources: BERT (Devlin et al., arXiv 1810.04805); pre-LN (Xiong et al., arXiv 2002.04745); rotary positions
(Su et al., arXiv 2104.09864). `--norm post --positions learned --dropout 0.1 --init_std 0.02` is BERT as published, but for
token types and the epsilon of its norms (1e-12 there, 1e-5 here).

Legend: B batch, T tokens, C width, H heads, L layers, V vocabulary, M masked positions per sequence.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from raptr import whole


@dataclass(frozen=True)
class Config:
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp: int = 3072  # hidden neurons
    seq: int = 512  # tokens per sequence
    vocab: int = 30522  # ids the tokenizer knows; the tables are padded up to `padded_vocab`
    dropout: float = 0.1
    norm: str = "pre"  # pre | post
    positions: str = "learned"  # learned | rotary
    init_std: float = 0.02

    @property
    def padded_vocab(self):
        return -(-self.vocab // 64) * 64  # matrix products like multiples of 64


# ----------------------------------------------------------------------------------------------------------------
# One block


def rotary(seq, dim, device=None, base=10_000.0):
    """Cosines and sines of the rotary angles, each (T, dim)."""
    frequency = base ** (-torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.outer(torch.arange(seq, device=device), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):  # (B, H, T, C/H)
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def explicit(q):
    """Whether to write attention out: on the CPU in bfloat16 the backward pass of the fused kernel is the slower one."""
    return q.is_cpu and q.dtype == torch.bfloat16


def attend(q, k, v, dropout):  # (B, H, T, C/H) each
    if explicit(q):
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1).to(q.dtype)  # (B, H, T, T)
        return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, rotation):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = attend(q, k, v, self.dropout if self.training else 0.0)
        return F.dropout(self.out(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.width, config.mlp)
        self.down = nn.Linear(config.mlp, config.width)

    def forward(self, x):
        return F.dropout(self.down(F.gelu(self.up(x))), self.dropout, self.training)


class Block(nn.Module):
    """Pre-LN block. `scale` multiplies the block's whole update once (x + scale * (y - x)); None means 1."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = MLP(config)

    def forward(self, x, scale, rotation):
        h = x + self.attention(self.norm1(x), rotation)
        y = h + self.mlp(self.norm2(h))
        return y if scale is None else torch.lerp(x, y, scale)


class PostBlock(Block):
    """Post-LN block, as in the original BERT."""

    def forward(self, x, scale, rotation):
        h = self.norm1(x + self.attention(x, rotation))
        y = self.norm2(h + self.mlp(h))
        return y if scale is None else torch.lerp(x, y, scale)


# ----------------------------------------------------------------------------------------------------------------
# The model


class BERT(nn.Module):
    """seed: of the initial weights. Models of one seed that differ in depth begin with the same draws in the layers both have."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        C, V = config.width, config.padded_vocab
        post = config.norm == "post"
        self.tokens = nn.Embedding(V, C)
        self.positions = nn.Embedding(config.seq, C) if config.positions == "learned" else None
        self.embedding_norm = nn.LayerNorm(C)
        self.final_norm = nn.Identity() if post else nn.LayerNorm(C)
        self.head = nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.LayerNorm(C))  # then the tied token embedding
        self.bias = nn.Parameter(torch.zeros(V))
        padding = torch.zeros(V).masked_fill(torch.arange(V) >= config.vocab, -torch.inf)
        self.register_buffer("padding", padding, persistent=False)  # ids of the padding are never predicted
        if config.positions == "rotary":
            cos, sin = rotary(config.seq, C // config.heads)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.blocks = nn.ModuleList((PostBlock if post else Block)(config) for _ in range(config.layers))  # drawn last
        generator = torch.Generator().manual_seed(seed)
        self.apply(lambda module: self.init(module, generator))

    def init(self, module, generator):
        """Matrices normal, biases zero, norms one. In a pre-LN stack 2L updates add up on one stream, so what writes to it
        begins smaller by sqrt(2L), as in GPT-2; the original, post-LN BERT has no such rule."""
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.init_std, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, Block) and self.config.norm == "pre":  # comes after its parts
            for writer in (module.attention.out, module.mlp.down):
                writer.weight.data /= (2 * self.config.layers) ** 0.5

    def encode(self, tokens, subnetwork=None):
        """Hidden states (B, T, C) of token ids (B, T), run over the layers of `subnetwork` (None: all of them)."""
        T = tokens.shape[1]
        x = self.tokens(tokens)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[:T]
        x = F.dropout(self.embedding_norm(x), self.config.dropout, self.training)
        rotation = (self.cos[:T], self.sin[:T]) if self.positions is None else None

        subnetwork = subnetwork or whole(len(self.blocks))
        kept, frozen, rows = subnetwork.layers, subnetwork.frozen, subnetwork.rows or [None] * len(subnetwork.layers)
        scales = [None] * len(kept)
        if subnetwork.scale is not None:
            scales = torch.tensor(subnetwork.scale, device=x.device).unbind()  # tensors: a float would recompile
        for i, layer in enumerate(kept):  # a layer not named here is bypassed: its input is its output
            with torch.set_grad_enabled(torch.is_grad_enabled() and i >= frozen):
                x = self.run(self.blocks[layer], x, scales[i], rotation, rows[i])
        return self.final_norm(x)

    def run(self, block, x, scale, rotation, rows):
        """One block, on all sequences or (rows) on some of them; the others pass by."""
        if rows is None:
            return block(x, scale, rotation)
        rows = torch.tensor(rows, dtype=torch.long, device=x.device)  # perhaps none of this micro-batch
        return x.index_copy(0, rows, block(x[rows], scale, rotation))

    def logits(self, tokens, masked, subnetwork=None):
        """Logits (B, M, V padded) at the masked positions (B, M) of token ids (B, T): the head runs nowhere else."""
        x = self.encode(tokens, subnetwork)
        x = x.gather(1, masked[:, :, None].expand(-1, -1, x.shape[-1]))  # (B, M, C)
        return F.linear(self.head(x), self.tokens.weight, self.bias + self.padding)

    def forward(self, batch, subnetwork=None):
        """Summed cross-entropy, in nats, over the targets of a batch (tokens, masked, targets); target -100 is no target."""
        tokens, masked, targets = batch
        logits = self.logits(tokens, masked, subnetwork)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum", ignore_index=-100)


# ----------------------------------------------------------------------------------------------------------------
# What it costs


def parameters(config):
    """Number of weights, counted without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in BERT(config).parameters())


def flops(config, sequences, masked, layers=None):
    """FLOPs of one training step (forward and backward) on `sequences` sequences with `masked` targets in each.

    layers: how many layers run (`Subnetwork.cost`), all by default; may be a fraction, for a mean. Counted are all
    matrix products, attention and head included, at 2 FLOPs per multiply-add; the backward pass is twice the forward.
    """
    C, T = config.width, config.seq
    layer = 2 * T * (4 * C * C + 2 * C * config.mlp) + 2 * T * T * 2 * C  # projections and MLP; scores and their use
    head = 2 * masked * (C * C + C * config.padded_vocab)
    return 3 * sequences * ((config.layers if layers is None else layers) * layer + head)


def demo():
    import tomllib
    from pathlib import Path

    print("\n  preset        layers  width  params    FLOPs/step   half the layers   of which head")
    for path in sorted((Path(__file__).parent / "configs").glob("bert*.toml")):
        flags = tomllib.loads(path.read_text())
        config = Config(**{name: flags[name] for name in Config.__dataclass_fields__ if name in flags})
        masked = round(0.15 * config.seq)
        full = flops(config, flags["batch"], masked)
        half = flops(config, flags["batch"], masked, config.layers // 2) / full
        head = flops(config, flags["batch"], masked, 0) / full
        size = f"{parameters(config) / 1e6:.1f}M"
        print(f"  {path.stem:12}  {config.layers:6}  {config.width:5}  {size:>6}  {full:12.3e}  {half:16.1%}  {head:14.1%}")
    print("\n  A step is forward and backward over the whole batch. The head always runs, so half the layers cost a bit")
    print("  more than half a step; embeddings are look-ups and cost nothing here.\n")


if __name__ == "__main__":
    demo()
