import subprocess
import sys
from collections import Counter

import pytest
import torch

from engine import ROOT
from methods import layerdrop
from model import BERT, Config
from raptr import Subnetwork, all_layers, mean_layers

T = 4000


def kept_counts(method, steps):
    full = all_layers(method.layers)
    return Counter(layer for step in steps for layer in (method.subnetwork(step) or full).layers)


def test_plds_theta_bar_for_nine_of_twelve_layers():
    assert layerdrop.theta_bar_for(9, 12) == pytest.approx(0.5385, abs=5e-5)
    method = layerdrop.pld(12, 100_000, 9)  # over the run, in whose first steps more layers are kept
    assert mean_layers(method, 100_000) == pytest.approx(9, abs=0.01)
    counts = kept_counts(method, range(5, 100_001, 10))
    assert sum(counts.values()) / 10_000 == pytest.approx(9, abs=0.06)
    assert method.expected_layers(100_000) < 9 < method.expected_layers(1)


def test_pld_follows_its_published_defaults():
    method = layerdrop.pld(12, T)
    assert method.keep(T)[-1] == pytest.approx(0.5) and method.keep(T)[0] == pytest.approx(1 - 0.5 / 12)
    assert method.keep(1)[-1] == pytest.approx(1 - 0.5 * (1 - 0.9753), abs=1e-4)  # exp(-100 / 4000) = 0.9753
    later = [method.keep(s)[5] for s in (1, 50, 500, 4000)]
    assert later == sorted(later, reverse=True)


def test_plds_kept_updates_have_the_full_mean():
    """Gate and scale must use one probability: over many draws gate * scale averages to 1 for every layer."""
    method, total = layerdrop.pld(12, T), [0.0] * 12
    for step in range(T // 2, T):
        path = method.subnetwork(step)
        for layer, scale in zip(path.layers, path.scale):
            total[layer] += scale
    assert [t / (T // 2) for t in total] == pytest.approx([1] * 12, abs=0.08)


def test_layerdrop_is_even_and_unscaled():
    assert layerdrop.layerdrop(12).expected_layers(1) == pytest.approx(0.8 * 12)  # the published rate
    method = layerdrop.layerdrop(12, mean_depth=9)
    counts = kept_counts(method, range(1, 8001))
    assert all(abs(counts[layer] / 8000 - 0.75) < 0.025 for layer in range(12))
    assert method.subnetwork(1).scale is None


def test_an_empty_path_is_possible_and_means_no_layer():
    method = layerdrop.layerdrop(2, mean_depth=0.2)
    assert any(method.subnetwork(step).layers == () for step in range(1, 50))
    model = BERT(Config(layers=2, width=16, heads=2, mlp=32, vocab=64, seq=8, dropout=0.0))
    tokens = torch.randint(5, 64, (2, 8))
    expected = model.final_norm(model.embedding_norm(model.tokens(tokens) + model.positions.weight))
    torch.testing.assert_close(model.encode(tokens, Subnetwork(())), expected)


def test_decreasing_starts_at_half_and_ends_whole():
    """At p_max 1 its mean depth runs from 6 of 12 to 12: on average the cost of 6-8-10-12."""
    method = layerdrop.decreasing(12, T)
    assert method.expected_layers(1) == pytest.approx(6) and method.expected_layers(T) == 12
    assert mean_layers(method, T) == pytest.approx(9, abs=0.01)
    assert method.subnetwork(T) is None
    assert all(0 in method.subnetwork(step).layers for step in range(1, 500))
    cost = sum((method.subnetwork(step) or all_layers(12)).cost() for step in range(1, T + 1)) / T
    assert cost == pytest.approx(9, abs=0.05)
    assert mean_layers(layerdrop.decreasing(12, T, 10.5), T) == pytest.approx(10.5, abs=0.01)


def test_decreasing_drops_deeper_layers_more_often_and_keeps_the_mean_update():
    method, steps = layerdrop.decreasing(12, T), range(1, 2001)
    counts = kept_counts(method, steps)
    kept = [counts[layer] / 2000 for layer in range(12)]  # on average 3/4 of the last layer's drops are left then
    assert kept == pytest.approx([1 - 0.75 * layer / 11 for layer in range(12)], abs=0.05)
    method, total = layerdrop.decreasing(12, T, 10), [0.0] * 12  # at most 2 of 3 are dropped, so no scale is large
    for step in steps:
        path = method.subnetwork(step)
        for layer, scale in zip(path.layers, path.scale):
            total[layer] += scale
    assert [t / 2000 for t in total] == pytest.approx([1] * 12, abs=0.08)


def test_the_ramp_brings_in_deeper_layers_later():
    ramp = layerdrop.Ramp(4, 160)  # a quarter of the steps: layer l of 1 .. 4 is whole after 10 l steps
    assert ramp.subnetwork(5).scale == pytest.approx((0.5, 0.25, 1 / 6, 0.125))
    assert ramp.subnetwork(20).scale == pytest.approx((1, 1, 2 / 3, 0.5))
    assert ramp.subnetwork(40) is None and ramp.subnetwork(1).layers == (0, 1, 2, 3)


@pytest.mark.parametrize("method", [layerdrop.pld(6, 50), layerdrop.layerdrop(6), layerdrop.decreasing(6, 50)])
def test_draws_depend_on_the_step_alone(method):
    forwards = [method.subnetwork(step) for step in range(1, 51)]
    assert [method.subnetwork(step) for step in range(50, 0, -1)] == forwards[::-1]


@pytest.mark.parametrize(
    "method, layers, depth, word",
    [
        ("decreasing", 12, 8.9, "at least 9 of 12"),
        ("decreasing", 2, None, "at least 3 layers"),
        ("pld", 12, 5.5, "at least 5.57 of 12"),
    ],
)
def test_impossible_depths_are_refused(method, layers, depth, word):
    with pytest.raises(ValueError, match=word):
        getattr(layerdrop, method)(layers, T, depth)


def test_demo():
    shown = subprocess.run(
        [sys.executable, "-m", "methods.layerdrop"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert "9.00 layers a step" in shown
