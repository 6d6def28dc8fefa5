"""Deep Fusion: what two networks said, one says; and it goes on training."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import model as transformer
from engine import ROOT, checkpoint, options
from engine.errors import UserError
from engine.runs import load_run
from methods import deep_fusion
from processes import script
from test_model import batch
from test_train import events, go
from text import prepare

BERT = transformer.Config(3, 32, 2, 64, 24, 300, 0.0, init_std=0.3)
UL2 = dataclasses.replace(BERT, arch="ul2", positions="relative", rms=True, gated=True, tied=False)
POST = dataclasses.replace(BERT, norm="post", types=2)
TIED = dataclasses.replace(UL2, tied=True, positions="rotary")
PREFIX = torch.tensor([5, 0, 12])


def parents(config, widths=(1, 1)):
    """Two networks with nothing of their initial values left; the second `widths` times as wide."""
    made = []
    for seed, times in enumerate(widths):
        shape = {name: times * getattr(config, name) for name in deep_fusion.ADDED}
        made.append(transformer.make(dataclasses.replace(config, **shape), seed))
        for i, p in enumerate(made[-1].parameters()):
            p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + i))
    return made


def named(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def fused_model(one, other, split_norms, fresh=None):
    config = deep_fusion.fused_config(one.config, other.config, split_norms)
    model = transformer.make(config)
    fresh = named(transformer.make(config, 7)) if fresh else None
    model.load_state_dict(deep_fusion.fuse(named(one), named(other), config, fresh), strict=False)
    return model


def says(model):
    tokens, masked, _ = batch(BERT, 3)
    with torch.no_grad():
        return model.logits(tokens, PREFIX if model.config.arch == "ul2" else masked)[..., : model.config.vocab]


@pytest.mark.parametrize("config", [BERT, POST, UL2, TIED], ids=["bert", "post", "ul2", "tied"])
@pytest.mark.parametrize("widths", [(1, 1), (1, 2)])
def test_with_split_norms_it_says_the_mean_of_its_parents(config, widths):
    one, other = parents(config, widths)
    mean = (says(one) + says(other)) / 2
    torch.testing.assert_close(says(fused_model(one, other, True)), mean, atol=1e-4, rtol=1e-4)
    joined, strange = says(fused_model(one, other, False)), says(parents(config, (sum(widths), 1))[0])
    assert 1e-2 < (joined - mean).std() < 0.7 * (strange - mean).std()  # only nearly, and nearer than no kin


def test_a_fusion_fused_again_keeps_all_three_parts():
    one, other = parents(BERT)
    both = fused_model(one, other, True)
    again = fused_model(both, one, True)
    assert again.config.norm_parts == "32-32-32"
    torch.testing.assert_close(says(again), (says(both) + says(one)) / 2, atol=1e-4, rtol=1e-4)


def test_a_linear_stack_is_kept_exactly():
    draws = torch.Generator().manual_seed(0)
    a = [torch.randn(4, 4, generator=draws, dtype=torch.float64) for _ in range(5)]
    b = [torch.randn(6, 6, generator=draws, dtype=torch.float64) for _ in range(5)]
    x, y = torch.randn(4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    state = torch.cat([x, y])
    for one, other in zip(a, b):
        x, y, state = one @ x, other @ y, deep_fusion.join("mlp.down.weight", one, other, BERT) @ state
    torch.testing.assert_close(state, torch.cat([x, y]), rtol=1e-12, atol=0)


def test_fresh_off_diagonals_leave_the_parents_in_place():
    one, other = parents(BERT)
    weight = fused_model(one, other, False, fresh=True).blocks[1].attention.qkv.weight.view(3, 64, 64)
    assert torch.equal(weight[:, :32, :32], one.blocks[1].attention.qkv.weight.view(3, 32, 32))
    assert torch.equal(weight[:, 32:, 32:], other.blocks[1].attention.qkv.weight.view(3, 32, 32))
    for between in (weight[:, :32, 32:], weight[:, 32:, :32]):
        assert between.std().item() == pytest.approx(0.3, rel=0.1)


def shell(*arguments):
    return script("methods.deep_fusion", *arguments)


def test_two_runs_become_one_that_goes_on(tiny, tmp_path):
    flags = [*tiny[:-1]]
    a, b = go([*flags, str(tmp_path / "a")]), go([*flags, str(tmp_path / "b"), "--seed", "1"])
    for seed, where in enumerate((a, b)):
        assert events(where, "run")[0]["seed"] == seed
    done = shell(a, b, "--out", tmp_path / "c", "--measure")
    told = {line[4:44].strip(): line[44:].split() for line in done.stdout.splitlines() if line.startswith("    ")}
    assert float(told["first parent, a"][0]) == pytest.approx(events(a, "done")[0]["loss"], abs=0.01)
    assert (
        told["fused, norms over each (--split_norms)"][1] == "0.0000"
        and float(told["fused, norms over both"][1]) > 0.001
    )
    assert done.returncode == 0 and "width 128, 8 heads, 512 hidden neurons" in done.stdout, done.stderr
    assert load_run(tmp_path / "c")[0].config.width == 128
    tokenizers = [checkpoint.load_newest(run)[1]["tokenizer_sha256"] for run in (a, tmp_path / "c")]
    assert tokenizers[0] == tokenizers[1]  # so that --init notices another corpus
    assert "threads" not in (tmp_path / "c/preset.toml").read_text()  # another machine may train it on
    preset = [f"--config={tmp_path}/c/preset.toml", "--steps", "6", "--eval_every", "1", "--out"]
    run, fresh = go([*preset, str(tmp_path / "d")]), go([*preset, str(tmp_path / "e"), "--init="])
    began = events(run, "eval")[0]["loss"]
    assert began < events(fresh, "eval")[0]["loss"] - 0.2
    assert events(run, "eval")[-1]["loss"] < began
    (b / "config.json").write_text((b / "config.json").read_text().replace(load_run(b)[2].data_fingerprint, "another"))
    other = shell(b, a, "--out", tmp_path / "f", "--measure")
    assert (
        other.returncode == 2 and "is not the text it was trained on" in other.stderr and not (tmp_path / "f").exists()
    )
    itself = shell(a, a, "--out", tmp_path / "f")
    assert itself.returncode == 2 and "equal halves stay equal" in itself.stderr and not (tmp_path / "f").exists()
    assert shell(a, a, "--out", tmp_path / "f", "--noise", "0.01").returncode == 0


@pytest.mark.parametrize(
    "more, said",
    [
        (["--layers=3", "--stages=2-3"], "--layers: 4 and 3"),
        (["--heads=2"], "heads differ in width: 16 and 32"),
        (["--rms"], "--rms: False and True"),
        (["--arch=ul2"], "--arch: bert and ul2"),
        (["--data={other}", "--vocab=400"], "different tokenizers"),
    ],
)
def test_parents_that_do_not_fit(tiny, more, said, text, tmp_path):
    if "--vocab=400" in more:
        other = tmp_path / "other"
        prepare.prepare(
            lambda: ((document, True) for document in text[:700]), other, vocab=512, source="fewer sentences"
        )
        more = [flag.format(other=other) for flag in more]
    flags = [*tiny[:-1]]
    runs = [go([*flags, str(tmp_path / name), "--steps", "3", *own]) for name, own in (("a", []), ("b", more))]
    with pytest.raises(UserError, match=said):
        deep_fusion.main([*map(str, runs), "--out", str(tmp_path / "c")])
    assert not (tmp_path / "c").exists()


def test_norm_parts_must_add_up(tiny, capsys):
    for parts in ("32-31", "a", "64-0"):
        with pytest.raises(SystemExit) as end:
            options.parse([*tiny, f"--norm_parts={parts}"])
        assert end.value.code == 2 and "--width 64" in capsys.readouterr().err


def test_its_tensors_need_no_run_folders():
    """Importing it loads nothing that trains or reads runs."""
    code = "import sys, methods.deep_fusion; print({'train', 'model', 'data', 'engine.runs'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "set()", shown.stderr
