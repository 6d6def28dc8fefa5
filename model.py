"""The transformer: a BERT encoder and a UL2 decoder that run any subset of their layers, and what that costs.

The loop in `Stack.encode` is the one place that decides what a skipped layer means. Blocks know nothing of paths, and
what they share (positions, the attention mask) is made by the stack, never in a block that may be skipped.
Not here: which layers run (raptr.py), the batches (data.py), the optimizer (train.py).

    python model.py             parameters and FLOPs of every preset in configs/

Sources: BERT (Devlin et al., arXiv 1810.04805); UL2 (Tay et al., arXiv 2205.05131); pre-LN (Xiong et al., arXiv
2002.04745); rotary positions (Su et al., arXiv 2104.09864); relative positions (T5, Raffel et al., arXiv 1910.10683);
gated MLP (Shazeer, arXiv 2002.05202). BERT as published is `--norm post --positions learned --dropout 0.1 --init_std
0.02 --types 2 --norm_eps 1e-12`.

Legend: B batch, T tokens, C width, H heads, L layers, V vocabulary, M masked positions per sequence, N targets in all.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from raptr import all_layers


@dataclass(frozen=True)
class Config:
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp: int = 3072  # hidden neurons
    seq: int = 512  # tokens per sequence
    vocab: int = 30522  # the tokenizer's ids, and UL2's modes and sentinels; tables are padded up to `padded_vocab`
    dropout: float = 0.1
    norm: str = "pre"  # pre | post
    positions: str = "learned"  # learned | rotary | relative
    init_std: float = 0.02
    arch: str = "bert"  # bert | ul2
    rms: bool = False  # RMS norm instead of layer norm
    gated: bool = False  # gated MLP: a third matrix, whose product passes through the GELU
    tied: bool = True  # the head's matrix is the token embedding
    loss_chunk: int = 0  # targets whose logits exist at a time; 0: all
    norm_parts: str = ""  # "64-64": norm these parts of a vector each by itself (methods/deep_fusion.py)
    types: int = 0  # token types ("segments"), as the original BERT has two
    norm_eps: float = 1e-5

    @classmethod
    def of(cls, args, vocab):
        """From the flags of train.py, for `vocab` token ids."""
        return cls(**{**{name: getattr(args, name) for name in cls.__dataclass_fields__}, "vocab": vocab})

    @property
    def padded_vocab(self):
        return -(-self.vocab // 64) * 64  # matrix products like multiples of 64


# ----------------------------------------------------------------------------------------------------------------
# One block


class Shared(NamedTuple):
    """What the stack hands to a block beside its input. `past` differs from block to block, in width also `mask`."""

    rotation: tuple | None = None  # cosines and signed sines, each (T, 2 C): of the heads of q and k, side by side
    mask: object = None  # who may see whom: bool or additive (B or 1, H or 1, T, T), or flex attention's BlockMask
    past: dict | None = None  # keys and values of earlier tokens, of one block; this call adds its own
    gain: object = None  # of a layer cut in width: multiplies what its heads and hidden neurons hand on


def rotary(seq, dim, base=10_000.0):
    """Cosines and signed sines of the rotary angles, each (T, C/H)."""
    frequency = base ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.outer(torch.arange(seq), frequency)
    return torch.cat((angle, angle), -1).cos(), torch.cat((-angle, angle), -1).sin()


def rotate(x, cos, sin, size):
    """Turn pairs (i, i + size/2) of every `size` numbers of x (B, T, n size) by the angles of the position."""
    n = x.shape[-1]
    swapped = x.unflatten(-1, (-1, 2, size // 2)).roll(1, -2).flatten(-3)  # faster than flip on a CPU
    return x * cos[:, :n].to(x.dtype) + swapped * sin[:, :n].to(x.dtype)


def buckets(distance, count=32, far=128):
    """T5's buckets of relative positions: half for each direction; near ones one by one, farther ones by logarithm."""
    half = count // 2
    near = distance.abs()
    small = half // 2  # distances below it have a bucket each
    log = small + (near.clamp(min=1).float() / small).log() / torch.tensor(far / small).log() * small
    return half * (distance > 0) + torch.where(near < small, near, log.long().clamp(max=half - 1))


def on(device, values):
    """Numbers as a tensor on a device. The host does not wait for a GPU."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def explicit(q):
    """Whether to write attention out: on the CPU in bfloat16 the fused kernel's backward pass is slower."""
    return q.is_cpu and q.dtype == torch.bfloat16


compiled_flex = functools.cache(lambda: torch.compile(flex_attention))


def attend(q, k, v, mask, dropout):  # (B, H, T, C/H) each
    if isinstance(mask, BlockMask):  # skips what the mask hides
        alone = q.is_cuda and not torch.compiler.is_compiling()  # a compiled block compiles it along
        return (compiled_flex() if alone else flex_attention)(q, k, v, block_mask=mask)
    if explicit(q):
        scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, T, T)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return F.dropout(scores.softmax(dim=-1).to(q.dtype), dropout) @ v
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_width, self.dropout = config.width // config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x, shared):
        B, T, _ = x.shape
        heads = len(self.qkv.weight) // (3 * self.head_width)  # that are there: fewer in a layer cut in width
        qk, v = self.qkv(x).split((2 * heads * self.head_width, heads * self.head_width), -1)
        if shared.rotation is not None:  # all heads of q and k at once: one long row a token
            qk = rotate(qk, *shared.rotation, self.head_width)
        q, k = qk.view(B, T, 2, heads, self.head_width).permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        v = v.view(B, T, heads, self.head_width).transpose(1, 2)
        if shared.past is not None:
            if shared.past:
                k, v = torch.cat([shared.past["k"], k], 2), torch.cat([shared.past["v"], v], 2)
            shared.past.update(k=k, v=v)
        y = attend(q, k, v, shared.mask, self.dropout if self.training else 0.0).transpose(1, 2).flatten(2)
        return F.dropout(self.out(y if shared.gain is None else y * shared.gain), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout, self.gated = config.dropout, config.gated
        self.up = nn.Linear(config.width, (2 if config.gated else 1) * config.mlp)
        self.down = nn.Linear(config.mlp, config.width)

    def forward(self, x, shared):
        x = self.up(x)
        gate, *x = x.chunk(2, dim=-1) if self.gated else [x]
        y = F.gelu(gate) * x[0] if self.gated else F.gelu(gate)
        return F.dropout(self.down(y if shared.gain is None else y * shared.gain), self.dropout, self.training)


class PartNorm(nn.Module):
    """Norms parts of a vector each by itself: what was two networks side by side still computes what both did."""

    def __init__(self, config):
        super().__init__()
        self.parts, self.eps = [int(part) for part in config.norm_parts.split("-")], config.norm_eps
        self.norm = F.rms_norm if config.rms else F.layer_norm
        self.weight = nn.Parameter(torch.ones(config.width))
        self.bias = None if config.rms else nn.Parameter(torch.zeros(config.width))

    def forward(self, x):
        y = torch.cat([self.norm(p, p.shape[-1:], eps=self.eps) for p in x.split(self.parts, -1)], -1) * self.weight
        return y if self.bias is None else y + self.bias


class LayerNorm(nn.LayerNorm):
    """Its parameters count in float32, also where FSDP2 gathers them in bfloat16."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.float(), self.eps)


def make_norm(config):
    if config.norm_parts:
        return PartNorm(config)
    return (RMSNorm if config.rms else LayerNorm)(config.width, eps=config.norm_eps)


class Block(nn.Module):
    """Pre-LN block: x + a f(x), where f(x) is what attention and MLP add together, and a is `scale` (None: 1)."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = make_norm(config)
        self.attention = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, scale, shared):
        h = x + self.attention(self.norm1(x), shared)
        y = h + self.mlp(self.norm2(h), shared)
        return y if scale is None else torch.lerp(x, y, scale)  # x + scale (y - x), and y - x is f(x)


class PostBlock(Block):
    """Post-LN block, as in the original BERT."""

    def forward(self, x, scale, shared):
        h = self.norm1(x + self.attention(x, shared))
        y = self.norm2(h + self.mlp(h, shared))
        return y if scale is None else torch.lerp(x, y, scale)  # x + scale (y - x), and y - x is f(x)


# ----------------------------------------------------------------------------------------------------------------
# The stack of blocks


class Stack(nn.Module):
    """Embeddings and blocks. seed: of the initial weights. Models of one seed that differ in depth begin with the
    same draws in the layers both have."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config, self.dropout = config, config.dropout
        self.recompute = False  # --recompute
        self.pooler = None  # {"weight", "bias"} of the layer above [CLS], if it came with one (tools/hf.py)
        C, V, post = config.width, config.padded_vocab, config.norm == "post"
        self.tokens = nn.Embedding(V, C)
        self.positions = nn.Embedding(config.seq, C) if config.positions == "learned" else None
        self.relative = nn.Embedding(32, config.heads) if config.positions == "relative" else None
        self.types = nn.Embedding(config.types, C) if config.types else None
        self.embedding_norm = make_norm(config)
        self.final_norm = nn.Identity() if post else make_norm(config)
        self.add_head()
        self.untied = None if config.tied else nn.Linear(C, V, bias=False)
        self.bias = nn.Parameter(torch.zeros(V))
        self.make_buffers()
        self.blocks = nn.ModuleList((PostBlock if post else Block)(config) for _ in range(config.layers))  # drawn last
        generator = torch.Generator().manual_seed(seed)
        self.apply(lambda module: self.init(module, generator))

    def make_buffers(self):
        """What follows from the config, and is neither trained nor saved."""
        config, V = self.config, self.config.padded_vocab
        padding = torch.zeros(V).masked_fill(torch.arange(V) >= config.vocab, -torch.inf)
        self.register_buffer("padding", padding, persistent=False)  # ids of the padding are never predicted
        if config.positions == "rotary":
            for name, table in zip(("cos", "sin"), rotary(config.seq, config.width // config.heads)):
                self.register_buffer(name, table, persistent=False)

    def add_head(self):
        pass

    def init(self, module, generator):
        """Matrices normal, biases zero, norms one. In a pre-LN stack 2L updates add up on one stream, so what writes
        to it begins smaller by sqrt(2L), as in GPT-2; the original, post-LN BERT has no such rule."""
        if isinstance(module, (nn.Linear, nn.Embedding)) and not module.weight.is_meta:
            nn.init.normal_(module.weight, std=self.config.init_std, generator=generator)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Block) and self.config.norm == "pre":  # comes after its parts
            module.attention.out.weight.data /= (2 * self.config.layers) ** 0.5
            module.mlp.down.weight.data /= (2 * self.config.layers) ** 0.5

    def encode(self, tokens, subnetwork=None, mask=None, past=None, types=None):
        """Hidden states (B, T, C) of token ids (B, T), run over the layers of `subnetwork` (None: all of them).

        mask: which tokens each may attend to, bool (B or 1, 1, T, T) or a BlockMask; None: all.
        past: cache {layer: keys and values} of earlier tokens, which this call extends; {} starts one; None: no cache.
        types: token types (B, T), for a model with `config.types`; None: all 0.
        """
        T = tokens.shape[1]
        start = next(iter(past.values()))["k"].shape[2] if past else 0  # the position of the first new token
        x = self.tokens(tokens)  # (B, T, C)
        if self.positions is not None:
            x = x + self.positions.weight[start : start + T]
        if self.types is not None:
            x = x + self.types(torch.zeros_like(tokens) if types is None else types)
        # The residual stream is float32, also where FSDP2 gathers weights in bfloat16.
        x = F.dropout(self.embedding_norm(x.float()), self.dropout, self.training)
        rotation = None
        if self.config.positions == "rotary":
            rotation = [table[start : start + T].repeat(1, 2 * self.config.heads) for table in (self.cos, self.sin)]
        if self.relative is not None:
            place = torch.arange(start + T, device=x.device)
            bias = self.relative(buckets(place - place[start:, None])).permute(2, 0, 1)[None]  # (1, H, T, start + T)
            mask = bias if mask is None else bias.masked_fill(~mask, -torch.inf)

        subnetwork = subnetwork or all_layers(len(self.blocks))
        scales = [None] * len(subnetwork.layers)
        if subnetwork.scale is not None:
            scales = on(x.device, subnetwork.scale).unbind()  # tensors: a float would recompile
        width = subnetwork.width  # its blocks have been cut to it (methods/width.py)
        gain = None if width is None else on(x.device, width.scale)

        # y_l = y_{l-1} + a_l f_l(y_{l-1}), where a block returns y + f(y) and applies a_l itself. The loop visits
        # only the layers of the path. That is the bypass: a layer not listed never runs, and its weights get no
        # gradient.
        for i, layer in enumerate(subnetwork.layers):
            # Relative positions have one bias per head: keep those of the heads that run.
            visible = mask if width is None or self.relative is None else mask[:, width.heads[i]]
            shared = Shared(rotation, visible, None if past is None else past.setdefault(layer, {}), gain)
            trains = torch.is_grad_enabled() and i >= subnetwork.frozen  # no gradient passes below a frozen layer
            with torch.set_grad_enabled(trains):
                if self.recompute and trains:  # keep a block's input alone; run it again for gradients
                    x = checkpoint(self.blocks[layer], x, scales[i], shared, use_reentrant=False)
                else:
                    x = self.blocks[layer](x, scales[i], shared)
        return self.final_norm(x)

    def predict(self, x):
        """Logits (..., V padded) of states (..., C)."""
        weight = self.tokens.weight if self.untied is None else self.untied.weight
        return F.linear(x, weight, self.bias + self.padding)

    def logits(self, tokens, places, subnetwork=None):
        """Logits (..., V padded) of `states`. places: a BERT's masked positions (B, M), or a UL2's prefix (B,)."""
        return self.predict(self.states(tokens, places, subnetwork))

    def cross_entropy(self, x, targets):
        """Summed cross-entropy, in nats, of states (N, C) that predict targets (N,); target -100 is no target. With
        `loss_chunk`, only so many logits (of V each) exist at a time, and are made again in the backward pass."""

        def part(x, targets):
            return F.cross_entropy(self.predict(x).float(), targets, reduction="sum", ignore_index=-100)

        size = self.config.loss_chunk
        if not size or len(x) <= size:
            return part(x, targets)
        return sum(checkpoint(part, *rows, use_reentrant=False) for rows in zip(x.split(size), targets.split(size)))


class BERT(Stack):
    """An encoder that fills masks."""

    def add_head(self):
        C = self.config.width
        self.head = nn.Sequential(nn.Linear(C, C), nn.GELU(), make_norm(self.config))  # then the tied token embedding

    def states(self, tokens, masked, subnetwork=None):
        """States (B, M, C) at the masked positions (B, M) of token ids (B, T): the head runs nowhere else."""
        x = self.encode(tokens, subnetwork)
        return self.head(x.gather(1, masked[:, :, None].expand(-1, -1, x.shape[-1])))

    def forward(self, batch, subnetwork=None):
        """Summed cross-entropy, in nats, over the targets of a batch: tokens (B, T), masked (B, M), targets (B, M)."""
        tokens, masked, targets = batch
        return self.cross_entropy(self.states(tokens, masked, subnetwork).flatten(0, 1), targets.flatten())


class UL2(Stack):
    """A decoder that reads a prefix in both directions and writes on from there."""

    def mask(self, prefix, T, fused=False):
        """Whom each token may see: (B, 1, T, T), true for tokens of the prefix (B,) and for those before. fused: the
        same as a BlockMask."""
        if fused:
            sees = lambda b, h, q, k: (k <= q) | (k < prefix[b])  # noqa: E731
            return create_block_mask(sees, len(prefix), None, T, T, device=prefix.device)
        place = torch.arange(T, device=prefix.device)
        return ((place <= place[:, None]) | (place < prefix[:, None, None]))[:, None]

    def states(self, tokens, prefix, subnetwork=None):
        """States (B, T, C) of token ids (B, T), of which the first `prefix` (B,) are read in both directions."""
        # Flex attention has no dropout and no heads narrower than 16, and would be compiled again for other lengths.
        usual = tokens.shape[1] == self.config.seq and self.config.width // self.config.heads >= 16
        fused = tokens.is_cuda and usual and self.relative is None and not (self.training and self.dropout > 0)
        return self.encode(tokens, subnetwork, self.mask(prefix, tokens.shape[1], fused))

    def forward(self, batch, subnetwork=None):
        """Summed cross-entropy, in nats, over the targets of a batch: tokens (B, T), prefix (B,), targets (B, T), and
        perhaps the positions (N,) of the targets among B T. The head runs only where there is a target."""
        tokens, prefix, targets, *positions = batch
        positions = positions[0] if positions else (targets.flatten() != -100).nonzero()[:, 0]  # the host waits
        states = self.states(tokens, prefix, subnetwork).flatten(0, 1)
        return self.cross_entropy(states[positions], targets.flatten()[positions])

    @torch.no_grad()
    def generate(self, prefixes, first, stop, banned, limit, subnetwork=None, choose=None):
        """Write on after `prefixes`, lists (B) of token ids of one length, and the token `first`. Returns B lists of at
        most `limit`, cut before one of `stop`, none of `banned`. choose: logits (B, V) to ids (B,); None: argmax."""
        rows, done, past = [[] for _ in prefixes], [False] * len(prefixes), {}
        token = torch.full((len(prefixes),), first, device=self.bias.device)
        self.encode(token.new_tensor(prefixes), subnetwork, past=past)  # read in both directions: no mask
        while not all(done) and len(max(rows, key=len)) < limit:  # `past` keeps what was read: one position a token
            logits = self.predict(self.encode(token[:, None], subnetwork, past=past)[:, -1])
            logits[:, banned] = -torch.inf
            token = logits.argmax(-1) if choose is None else choose(logits)
            for i, written in enumerate(token.tolist()):  # a row that is done stays in the batch, and is not kept
                done[i] = done[i] or written in stop
                rows[i] += [] if done[i] else [written]
        return rows


def make(config, seed=0):
    return {"bert": BERT, "ul2": UL2}[config.arch](config, seed)


# ----------------------------------------------------------------------------------------------------------------
# What it costs


def parameters(config):
    """Number of weights, counted without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in make(config).parameters())


def flops(config, sequences, targets, layers=None):
    """FLOPs of one training step (forward and backward) on `sequences` sequences with `targets` positions in each
    that the head runs on (a mean may be a fraction).

    layers: how many layers run (`Subnetwork.cost`), all by default; may be a fraction, for a mean. Counted are all
    matrix products, attention (as if nothing were hidden) and head included, at 2 FLOPs per multiply-add; the
    backward pass is twice the forward. What `loss_chunk` and `--recompute` compute again is not counted.
    """
    C, T = config.width, config.seq
    products = 2 * T * (4 * C * C + (3 if config.gated else 2) * C * config.mlp)
    layer = products + 2 * T * T * 2 * C  # scores, and their use
    head = 2 * targets * (C * config.padded_vocab + (C * C if config.arch == "bert" else 0))
    return 3 * sequences * ((config.layers if layers is None else layers) * layer + head)


def demo():
    import tomllib
    from argparse import Namespace

    from data import objective
    from engine import ROOT

    print("\n  preset      layers  width   params  FLOPs/step  half the layers   head alone")
    for path in sorted((ROOT / "configs").glob("*.toml")):
        preset = tomllib.loads(path.read_text())
        preset = {"mlp": 4 * preset["width"], "arch": "bert", "denoisers": "ul2"} | preset
        task = objective(Namespace(**preset))
        fields = {name: preset[name] for name in Config.__dataclass_fields__ if name in preset}
        config, targets = Config(**fields | {"vocab": task.model_vocab}), task.targets_per_row()
        full, half, head = (flops(config, preset["batch"], targets, n) for n in (None, config.layers // 2, 0))
        print(f"  {path.stem:10}  {config.layers:6}  {config.width:5}  {parameters(config) / 1e6:7,.1f}M", end="")
        print(f"  {full:10.3e}  {half / full:15.1%}  {head / full:11.1%}")
    print("\n  A step is forward and backward over the whole batch. The head always runs,")
    print("  so half the layers cost a bit more than half a step; embeddings cost nothing.\n")


if __name__ == "__main__":
    demo()
