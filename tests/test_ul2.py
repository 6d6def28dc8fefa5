import shutil

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as transformer
from model import UL2, Config
from raptr import Subnetwork
from test_train import events, go, same, trajectory, weights

SMALL = Config(layers=4, width=32, heads=4, mlp=48, vocab=100, seq=24, dropout=0.0, positions="rotary", arch="ul2",
               rms=True, gated=True, init_std=0.2)  # fmt: skip


def make(**changes):
    return UL2(Config(**{**vars(SMALL), **changes}), seed=0)


def batch(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 100, (rows, 24), generator=generator)
    prefix = torch.tensor([4, 11, 20])[:rows]
    targets = torch.where(torch.arange(24) < prefix[:, None] - 1, -100, tokens.roll(-1, 1))
    return tokens, prefix, targets


@pytest.mark.parametrize("positions", ["rotary", "relative", "learned"])
def test_who_sees_whom_by_gradients(positions):
    """A token of the prefix is reached from all of the prefix and from nothing after it; a written one from all before
    it."""
    model = make(positions=positions)
    tokens, prefix, _ = batch()
    seen = []
    model.tokens.register_forward_hook(lambda module, inputs, output: seen.append(output))
    states = model.states(tokens, prefix)
    for row, length in enumerate(prefix.tolist()):
        for at in (0, length - 1, length, 22):
            gradient = torch.autograd.grad(states[row, at].sum(), seen[0], retain_graph=True)[0]
            reached = gradient.abs().sum(-1).nonzero().tolist()
            assert reached == [[row, i] for i in range(max(length, at + 1))]


def test_the_stack_by_hand():
    """One layer with everything spelled out: RMS norm, rotation, prefix mask, gated MLP, tied head."""
    model = make(layers=1)
    tokens, prefix, _ = batch()
    b = model.blocks[0]
    rms = lambda x, norm: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight  # noqa: E731
    x = rms(model.tokens.weight[tokens], model.embedding_norm)
    h = rms(x, b.norm1)
    q, k, v = (h @ w.T for w in b.attention.qkv.weight.chunk(3))
    out = torch.zeros_like(x)
    for row in range(3):
        for head in range(4):
            own = slice(8 * head, 8 * head + 8)
            for i in range(24):
                sees = [j for j in range(24) if j <= i or j < prefix[row]]
                turned = [turn(k[row, j, own], j) for j in sees]
                scores = torch.stack([turn(q[row, i, own], i) @ t for t in turned]) / 8**0.5
                out[row, i, own] = scores.softmax(0) @ v[row, sees][:, own]
    x = x + out @ b.attention.out.weight.T
    gate, up = (rms(x, b.norm2) @ b.mlp.up.weight.T).chunk(2, -1)
    x = x + (torch.nn.functional.gelu(gate) * up) @ b.mlp.down.weight.T
    logits = rms(x, model.final_norm) @ model.tokens.weight.T
    torch.testing.assert_close(model.logits(tokens, prefix)[..., :100], logits[..., :100], rtol=1e-4, atol=1e-4)


def turn(x, place):
    """Rotary positions as complex numbers: pair (i, i + 4) turns by place / 10000^(i/4)."""
    turned = torch.complex(x[:4], x[4:]) * torch.polar(torch.ones(4), place * 10_000.0 ** (-torch.arange(4) / 4))
    return torch.cat([turned.real, turned.imag])


def test_flex_attention_sees_what_the_dense_mask_lets_it_see():
    model, prefix = make(), torch.tensor([5, 100, 128])
    q, k, v = (torch.randn(3, 4, 128, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    dense, fused = model.mask(prefix, 128), model.mask(prefix, 128, fused=True)
    torch.testing.assert_close(transformer.attend(q, k, v, dense, 0.0), transformer.attend(q, k, v, fused, 0.0))


@pytest.mark.parametrize("dense", ["bool", "additive"])
def test_both_ways_of_attention_agree(dense, monkeypatch):
    q, k, v = (torch.randn(3, 4, 24, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = make().mask(torch.tensor([4, 11, 20]), 24)
    mask = mask if dense == "bool" else torch.zeros(1, 4, 24, 24).masked_fill(~mask, -torch.inf)
    fused = transformer.attend(q, k, v, mask, 0.0)
    monkeypatch.setattr(transformer, "explicit", lambda q: True)
    torch.testing.assert_close(transformer.attend(q, k, v, mask, 0.0), fused)


def test_relative_positions_are_t5s():
    """Buckets as T5's own table gives them for a few distances (key minus query)."""
    distance = torch.tensor([-200, -128, -64, -20, -16, -9, -8, -7, -1, 0, 1, 7, 8, 9, 16, 20, 64, 128, 200])
    expected = [15, 15, 14, 10, 10, 8, 8, 7, 1, 0, 17, 23, 24, 24, 26, 26, 30, 31, 31]
    assert transformer.buckets(distance).tolist() == expected


@pytest.mark.parametrize("chunk", [1, 7, 24])
def test_chunks_of_the_loss_change_nothing(chunk):
    whole, parts = make(), make(loss_chunk=chunk)
    for model in (whole, parts):
        model(batch(), Subnetwork((0, 2))).backward()
    torch.testing.assert_close(whole(batch()), parts(batch()))
    for (name, p), q in zip(whole.named_parameters(), parts.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-5), name


def test_an_untied_head_is_its_own():
    model = make(tied=False)
    model(batch()).backward()
    assert model.untied.weight.grad.abs().sum() > 0 and transformer.parameters(model.config) > transformer.parameters(
        SMALL
    )


@pytest.mark.parametrize("layers", [4, 2])
def test_flops_agree_with_torch(layers):
    config = Config(4, 64, 2, 160, 32, 500, 0.0, positions="rotary", arch="ul2", gated=True, rms=True)
    model, counter = UL2(config), FlopCounterMode(display=False)
    tokens = torch.randint(5, 100, (2, 32))
    targets = torch.where(torch.arange(32) < 20, -100, tokens)
    with counter, torch.autocast("cpu", torch.bfloat16):  # plain attention: the counter sees every product
        model((tokens, torch.tensor([9, 9]), targets), Subnetwork(tuple(range(layers)))).backward()
    assert counter.get_total_flops() == pytest.approx(transformer.flops(config, 2, 12, layers), rel=0.01)


def test_generation_step_by_step_is_the_same_as_all_at_once():
    for positions in ("rotary", "relative", "learned"):
        model = make(positions=positions).eval()
        tokens, prefix, _ = batch(rows=1)
        expected = model.states(tokens, prefix)
        past = {}
        first = model.encode(tokens[:, :4], past=past)
        rest = [model.encode(tokens[:, i : i + 1], past=past) for i in range(4, 24)]
        torch.testing.assert_close(torch.cat([first, *rest], 1), expected, rtol=1e-4, atol=1e-5)


SETTING = {
    "raptr": ["--stages", "2-3-4"],
    "pld": ["--method", "pld", "--mean_depth", "3"],
    "stacking": ["--method", "stacking"],
    "decreasing": ["--method", "decreasing"],
    "ramp": ["--method", "ramp"],
    "mslt": ["--method", "mslt"],
}


@pytest.mark.parametrize("method", SETTING)
def test_every_kind_of_method_trains_and_resumes(tiny, method, tmp_path):
    ul2 = ["--arch", "ul2", "--rms", "--gated", "--positions", "rotary", "--loss_chunk", "50", "--dtype", "float32"]
    flags = [*[f for f in tiny if f not in ("--stages", "2-3-4")], *ul2, *SETTING[method], "--micro_batch", "4"]
    ref = go(flags, "--save_every", 5, "--keep", 9)
    copy = go([*flags[: flags.index("--out")], "--out", str(tmp_path / "copy"), *flags[flags.index("--out") + 2 :]])
    assert trajectory(copy) == trajectory(ref) and same(weights(copy), weights(ref))
    for folder in sorted(ref.glob("step_*"))[1:]:
        shutil.rmtree(folder)
    go(flags, "--save_every", 5, "--keep", 9)
    assert trajectory(copy) == trajectory(ref) and same(weights(copy), weights(ref))
    assert events(ref, "run")[0]["unigram_loss"] > 0
