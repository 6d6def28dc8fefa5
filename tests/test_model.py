import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as transformer
from engine import ROOT
from model import BERT, Config
from raptr import Subnetwork

SMALL = Config(layers=4, width=32, heads=4, mlp=64, seq=24, vocab=100, dropout=0.0)


def make(config=SMALL, **changes):
    torch.manual_seed(0)
    model = BERT(Config(**{**vars(config), **changes}))
    for p in model.parameters():  # biases and norms away from 0 and 1, so that a mistake in them shows
        p.data += 0.05 * torch.randn_like(p)
    return model


def batch(config=SMALL, size=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, config.vocab, (size, config.seq), generator=g)
    masked = torch.stack([torch.randperm(config.seq, generator=g)[:4] for _ in range(size)])
    return tokens, masked, tokens.gather(1, masked)


def reference_stack(model, x):
    """The same blocks by PyTorch's own TransformerEncoderLayer, with our weights."""
    c = model.config
    for block in model.blocks:
        theirs = nn.TransformerEncoderLayer(
            c.width, c.heads, c.mlp, 0.0, F.gelu, batch_first=True, norm_first=c.norm == "pre"
        )
        pairs = [
            (theirs.self_attn.in_proj_weight, block.attention.qkv.weight),
            (theirs.self_attn.in_proj_bias, block.attention.qkv.bias),
            (theirs.self_attn.out_proj, block.attention.out),
            (theirs.linear1, block.mlp.up),
            (theirs.linear2, block.mlp.down),
            (theirs.norm1, block.norm1),
            (theirs.norm2, block.norm2),
        ]
        for target, source in pairs:
            if isinstance(target, nn.Module):
                target.load_state_dict(source.state_dict())
            else:
                target.data.copy_(source)
        x = theirs(x)
    return x


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_blocks_equal_pytorchs_own(norm):
    model = make(norm=norm)
    tokens, _, _ = batch()
    x = model.embedding_norm(model.tokens(tokens) + model.positions.weight)
    torch.testing.assert_close(model.encode(tokens), model.final_norm(reference_stack(model, x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("kept", [(0, 2, 3), (1,), (), (0, 1, 2, 3)])
def test_skipping_equals_gates_of_zero_and_one(norm, positions, kept):
    """The slow twin runs every layer and multiplies its update by its gate."""
    model = make(norm=norm, positions=positions)
    gates = Subnetwork((0, 1, 2, 3), tuple(float(layer in kept) for layer in range(4)))
    losses, gradients = [], []
    for subnetwork in (Subnetwork(kept), gates):
        model.zero_grad()
        loss = model(batch(), subnetwork)
        loss.backward()
        losses.append(loss)
        gradients.append({name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-6)
    skipped, gated = gradients
    for name, gradient in gated.items():
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
        assert (skipped[name] is None) == (layer is not None and layer not in kept)
        expected = torch.zeros_like(gradient) if skipped[name] is None else skipped[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_scale_multiplies_the_whole_update_once(norm):
    block = make(norm=norm, layers=1).blocks[0]
    x = torch.randn(2, 24, 32)
    update = block(x, None, transformer.Shared()) - x
    torch.testing.assert_close(block(x, torch.tensor(1.7), transformer.Shared()), x + 1.7 * update)


def test_none_is_every_layer_in_order():
    model = make()
    a, b = model(batch()), model(batch(), Subnetwork((0, 1, 2, 3)))
    assert a.item() == b.item()


def test_head_at_masked_positions_equals_head_everywhere():
    model = make()
    tokens, masked, targets = batch()
    everywhere = model.logits(tokens, torch.arange(24).expand(3, -1))
    torch.testing.assert_close(
        model.logits(tokens, masked), everywhere.gather(1, masked[:, :, None].expand(-1, -1, 128))
    )


def test_spare_slots_cost_nothing():
    model = make()
    tokens, masked, targets = batch()
    more = (
        torch.cat([masked, torch.zeros(3, 2, dtype=torch.long)], 1),
        torch.cat([targets, torch.full((3, 2), -100)], 1),
    )
    torch.testing.assert_close(model((tokens, *more)), model((tokens, masked, targets)))


def test_padded_ids_are_never_predicted():
    model = make()
    assert model.config.padded_vocab == 128
    model.bias.data[100:] = 1e4
    tokens, masked, targets = batch()
    assert torch.isneginf(model.logits(tokens, masked)[..., 100:]).all()
    model((tokens, masked, targets)).backward()
    assert not model.tokens.weight.grad[100:].any() and not model.bias.grad[100:].any()
    assert torch.isfinite(model((tokens, masked, targets)))


def test_rotary_scores_depend_on_distance_alone():
    cos, sin = transformer.rotary(16, 8)
    q, k = torch.randn(2, 8)
    both = transformer.rotate(torch.cat([q, k]).expand(1, 16, 16), cos.repeat(1, 3), sin.repeat(1, 3), 8)
    turned_q, turned_k = both[0].split(8, -1)
    scores = turned_q @ turned_k.T
    for distance in range(-15, 16):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert scores[0].std() > 0.1  # and it does depend on distance


def test_plain_attention_equals_the_fused_kernel():
    attention = make(layers=1).blocks[0].attention
    x = torch.randn(2, 24, 32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = attention(x, transformer.Shared())
    torch.testing.assert_close(plain.float(), attention(x, transformer.Shared()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layers", [None, 6, 8, 10])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_flops_agree_with_pytorchs_counter(layers, positions, monkeypatch):
    config = Config(layers=12, width=64, heads=4, mlp=256, seq=64, vocab=500, dropout=0.0, positions=positions)
    subnetwork = layers and Subnetwork(tuple(range(layers)))
    model, counter = BERT(config), FlopCounterMode(display=False)
    with counter, torch.autocast("cpu", torch.bfloat16):  # plain attention: the counter sees every product
        model(batch(config, 2), subnetwork).backward()
    assert counter.get_total_flops() == pytest.approx(transformer.flops(config, 2, 4, layers), rel=0.01)


def test_parameters_of_bert_base_and_large():
    base = Config(vocab=30522)
    assert transformer.parameters(base) == pytest.approx(110e6, rel=0.02)
    large = Config(layers=24, width=1024, heads=16, mlp=4096, vocab=30522)
    assert transformer.parameters(large) == pytest.approx(336e6, rel=0.02)
    assert transformer.parameters(SMALL) == sum(p.numel() for p in make().parameters())


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_share_one_graph_over_all_paths():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, compiled = make(), make()
    for block in compiled.blocks:
        block.compile()
    seen = set()
    for kept, scale in [
        ((0, 3), None),
        ((1,), None),
        ((0, 1, 2, 3), None),
        ((0, 2), (0.5, 1.5)),
        ((1, 2, 3), (1.0, 2.0, 3.0)),
    ]:
        subnetwork = Subnetwork(kept, scale)
        losses = [m(batch(), subnetwork) for m in (model, compiled)]
        losses[1].backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
        seen.add(round(losses[1].item(), 4))
    assert len(seen) == 5  # every path gave its own loss: none was frozen into the graph
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_demo():
    shown = subprocess.run([sys.executable, "model.py"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "bert_base" in shown and "bert_large" in shown and "bert_toy" in shown
