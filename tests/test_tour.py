import re

import pytest

from processes import script

FIGURES = {"stages.png", "curves.png", "growth.png"}


@pytest.fixture(scope="module")
def shown(corpus, tmp_path_factory):
    """(what a tour of 20 steps prints, its folder)."""
    out = tmp_path_factory.mktemp("tour") / "figures"
    tour = script("tools.tour", "--steps", 20, "--data", corpus, "--out", out)
    assert tour.returncode == 0, tour.stderr
    return tour.stdout, out


def test_all_cells_are_shown(shown):
    text, out = shown
    assert re.findall(r"^  (\d)\. ", text, re.M) == list("123456")
    assert max(map(len, text.splitlines())) <= 80
    assert {path.name for path in out.iterdir()} == FIGURES
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in FIGURES)


def test_a_skipped_layer_rests_and_with_a_zero_gradient_moves(shown):
    rows = [line.split() for line in shown[0].splitlines() if line.startswith("    layer ")]
    gradients = {(int(row[1]), row[3]): (float(row[4]), float(row[6]), float(row[8])) for row in rows}
    assert [row[1] for row in rows] == list("01231")
    assert gradients[1, "None"] == (0, 1, 1)
    moved, first, second = gradients[1, "0.0000"]
    assert moved > 0 and (first, second) == (0.9, 0.98)
    assert all(float(size) > 0 and moved > 0 for (layer, size), (moved, *_) in gradients.items() if layer != 1)


def test_curves_fall_from_the_same_start(shown):
    rows = [re.findall(r"[\d.]+", line) for line in shown[0].splitlines() if re.match(r" +\d+ +\d\.\d{3} +\d+ ", line)]
    both, alone = [row for row in rows if len(row) == 5], [row for row in rows if len(row) == 3]
    assert [int(row[0]) for row in both] == [int(row[0]) for row in alone] == [0, 4, 8, 12, 16, 20]
    assert both[0][1] == both[0][3] and all(float(both[-1][i]) < float(both[0][i]) - 1 for i in (1, 3))
    assert float(alone[-1][1]) < float(alone[0][1]) - 1
    assert float(both[-1][4]) == pytest.approx(0.75 * float(both[-1][2]), abs=2)


def test_every_layer_is_left_out_and_every_stage_change_measured(shown):
    left_out = re.findall(r"^ +(\d+)  [+-]\d\.\d{3}.*[+-]\d\.\d{3}", shown[0], re.M)
    assert [int(layer) for layer in left_out] == [*range(11, -1, -1)]
    changes = re.findall(r"^  (\w+) +(\d+) to +(\d+) ", shown[0], re.M)
    grown = [("stacking", "6", "9"), ("stacking", "9", "12")]
    assert changes == [("RaPTr", "6", "8"), ("RaPTr", "8", "10"), ("RaPTr", "10", "12"), *grown]


@pytest.mark.parametrize(
    "args, word",
    [(["--steps", "5"], "--steps"), (["--step", "40"], "--steps"), (["--data", "nowhere"], "nowhere"),
     (["--out", "README.md"], "--out")],
)  # fmt: skip
def test_bad_input_is_one_sentence(args, word, tmp_path):
    tour = script("tools.tour", "--out", tmp_path, *args)
    assert tour.returncode == 2 and word in tour.stderr and tour.stderr.count("\n") == 1, tour.stderr
