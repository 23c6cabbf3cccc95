"""DSC and NSD against independent formulas, their properties, and the conventions for absent classes"""

import numpy as np
import pytest
import torch
from scipy import ndimage

from mednext_v2.metrics import dice, score_case, surface_dice
from mednext_v2.tasks import Task

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.9, 3.1), (5.0, 2.3, 1.1)]
# Tolerances that no sum of squared voxel distances hits: rounding decides there, and oracles may round otherwise
TOLERANCES = [0.0, 1.234, 3.456]


def blob(seed: int, shape=(19, 23, 17), smooth: float = 1.5, share: float = 0.3) -> np.ndarray:
    "A random mask with holes, islands and voxels on the border of the volume"
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), smooth)
    return noise > np.quantile(noise, 1 - share)


def task_of(labels: dict, groups="organ") -> Task:
    return Task("toy", 999, "Toy", "CT", labels, groups, (1, 1, 1), (8, 8, 8), 1.0, "finetune", "none", "none")


def surface(mask: np.ndarray) -> np.ndarray:
    "Voxels with a background neighbour across a face; outside of the volume counts as background"
    padded = np.pad(mask, 1)
    inner = padded.copy()
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)
    return (padded & ~inner)[1:-1, 1:-1, 1:-1]


def oracle_nsd(a: np.ndarray, b: np.ndarray, spacing, tolerance: float) -> float:
    "Distance transforms of the complement of each surface, on the whole volume"
    edge_a, edge_b = surface(a), surface(b)
    to_a = ndimage.distance_transform_edt(~edge_a, sampling=spacing)
    to_b = ndimage.distance_transform_edt(~edge_b, sampling=spacing)
    right = (to_b[edge_a] <= tolerance).sum() + (to_a[edge_b] <= tolerance).sum()
    return right / (edge_a.sum() + edge_b.sum())


@pytest.mark.parametrize("seed", range(4))
def test_dice_equals_the_set_formula_and_monai(seed):
    from monai.metrics import compute_dice

    a, b = blob(seed), blob(seed + 100)
    voxels_a, voxels_b = set(map(tuple, np.argwhere(a))), set(map(tuple, np.argwhere(b)))
    assert dice(a, b) == pytest.approx(2 * len(voxels_a & voxels_b) / (len(voxels_a) + len(voxels_b)), abs=1e-12)
    one_hot = [torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32)) for mask in (a, b)]
    assert dice(a, b) == pytest.approx(compute_dice(*one_hot, include_background=False).item(), abs=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_surface_dice_equals_distance_transforms(spacing, tolerance):
    for seed in range(3):
        a, b = blob(seed), blob(seed + 50, share=0.15 + 0.1 * seed)
        assert surface_dice(a, b, spacing, tolerance) == pytest.approx(
            oracle_nsd(a, b, spacing, tolerance), abs=1e-6
        )


def test_surface_dice_equals_monai_on_the_uncropped_volume():
    from monai.metrics import compute_surface_dice

    for seed in range(3):
        a, b = np.zeros((30, 28, 26), bool), np.zeros((30, 28, 26), bool)
        a[5:24, 2:25, 0:17] = blob(seed)
        b[7:26, 4:27, 0:17] = blob(seed + 1)
        whole = [torch.from_numpy(mask[None, None]) for mask in (a, b)]
        value = compute_surface_dice(*whole, [1.5], include_background=True, spacing=(1.0, 2.0, 0.5))
        assert surface_dice(a, b, (1.0, 2.0, 0.5), 1.5) == value.item()


@pytest.mark.parametrize("corner", [(0, 0, 0), (11, 7, 13), (21, 17, 23)])
def test_surface_dice_does_not_depend_on_what_lies_around(corner):
    a, b = blob(1, (9, 9, 9)), blob(2, (9, 9, 9))
    wide = []
    for mask in (a, b):
        volume = np.zeros((30, 26, 32), bool)
        volume[tuple(slice(c, c + 9) for c in corner)] = mask
        wide.append(volume)
    assert surface_dice(*wide, (1, 2, 3), 1.2) == surface_dice(a, b, (1, 2, 3), 1.2)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_symmetric_one_on_identity_and_monotone_in_tolerance(spacing):
    a, b = blob(7), blob(8)
    assert dice(a, b) == dice(b, a)
    assert dice(a, a) == surface_dice(a, a, spacing, 0) == 1
    values = [surface_dice(a, b, spacing, tolerance) for tolerance in (0, 0.5, 1, 2, 4, 8, 100)]
    assert values == sorted(values) and values[0] < values[3] < 1 and values[-1] == 1
    assert surface_dice(a, b, spacing, 1.7) == surface_dice(b, a, spacing, 1.7)


def test_surface_dice_scales_with_the_unit():
    a, b = blob(3), blob(4)
    assert surface_dice(a, b, (1, 2, 3), 1.9) == surface_dice(a, b, (10, 20, 30), 19)


@pytest.mark.parametrize("axis, millimetres", [(0, 0.8), (1, 2.5), (2, 4.0)])
def test_a_slab_shifted_by_one_voxel(axis, millimetres):
    slab = np.zeros((12, 12, 12), bool)
    slab[tuple(slice(4, 5) if a == axis else slice(None) for a in range(3))] = True
    shifted = np.roll(slab, 1, axis)
    spacing = (0.8, 2.5, 4.0)
    assert surface_dice(slab, shifted, spacing, millimetres - 0.01) == 0
    assert surface_dice(slab, shifted, spacing, millimetres + 0.01) == 1
    assert dice(slab, shifted) == 0


def test_a_thick_slab_shifted_by_one_voxel_has_a_known_surface_dice():
    # Two 10 x 10 x 6 boxes, one voxel apart along the third axis: only corners and faces differ
    a = np.zeros((16, 16, 16), bool)
    a[3:13, 3:13, 3:9] = True
    b = np.roll(a, 1, 2)
    # Surface of each: two faces of 100 voxels and four rings of 36. Both hold the rings of three layers, and in two
    # more layers the ring of one box lies in the face of the other
    right = 3 * 36 + 2 * 36
    assert surface_dice(a, b, (1, 1, 1), 0) == pytest.approx(oracle_nsd(a, b, (1, 1, 1), 0), abs=1e-7)
    assert surface_dice(a, b, (1, 1, 1), 0) == pytest.approx(2 * right / (2 * (200 + 36 * 4)), abs=1e-7)
    assert surface_dice(a, b, (1, 1, 1), 1) == 1


def test_conventions_for_empty_masks():
    empty, full = np.zeros((5, 5, 5), bool), np.ones((5, 5, 5), bool)
    assert np.isnan(dice(empty, empty)) and np.isnan(surface_dice(empty, empty, (1, 1, 1)))
    for pair in ((empty, full), (full, empty)):
        assert dice(*pair) == surface_dice(*pair, (1, 1, 1), 100) == 0


def test_a_single_voxel_and_a_single_slice():
    voxel = np.zeros((1, 1, 1), bool)
    voxel[0, 0, 0] = True
    assert dice(voxel, voxel) == surface_dice(voxel, voxel, (1, 1, 1), 0) == 1
    flat = blob(5, (20, 20, 1))
    moved = np.roll(flat, 1, 0)
    assert surface_dice(flat, moved, (1, 1, 5), 0.5) == pytest.approx(oracle_nsd(flat, moved, (1, 1, 5), 0.5), abs=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.zeros((3, 3, 3)), np.zeros((3, 3, 4)), (1, 1, 1)), r"one shape, got \(3, 3, 3\) and \(3, 3, 4\)"),
        ((np.full((3, 3, 3), 2), np.zeros((3, 3, 3)), (1, 1, 1)), "mask of 0 and 1"),
        ((np.ones((3, 3, 3)), np.ones((3, 3, 3)), (1, 1)), "spacing needs 3 positive numbers"),
        ((np.ones((3, 3, 3)), np.ones((3, 3, 3)), (1, -1, 1)), "spacing needs 3 positive numbers"),
        ((np.ones((3, 3, 3)), np.ones((3, 3, 3)), (1, np.nan, 1)), "spacing needs 3 positive numbers"),
        ((np.ones((3, 3, 3)), np.ones((3, 3, 3)), (1, 1, 1), -1), "tolerance must be 0 mm or more, got -1"),
        ((np.ones((3, 3, 3)), np.ones((3, 3, 3)), (1, 1, 1), np.nan), "tolerance must be"),
    ],
)
def test_surface_dice_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        surface_dice(*arguments)


def test_score_case_equals_class_by_class_on_the_whole_volume():
    task = task_of({"a": 1, "b": 2, "c": 3, "d": 4}, dict(a="organ", b="pathology", c="organ", d="organ"))
    generator = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(generator.normal(size=(4, 24, 22, 14)), (0, 2, 2, 2))
    truth = smooth.argmax(0).astype(np.uint8)
    prediction = (smooth + 0.6 * smooth[::-1]).argmax(0).astype(np.int64)  # The class "d" is in neither
    spacing = (1.0, 0.6, 2.2)
    scores = score_case(prediction, truth, spacing, task, 1.234)
    assert list(scores) == ["label", "group", "dsc", "nsd", "n_voxels", "n_predicted"]
    assert scores.label.tolist() == list(task.labels) and scores.group.tolist() == list(task.groups.values())
    for row in scores.itertuples():
        masks = prediction == task.labels[row.label], truth == task.labels[row.label]
        assert (row.n_predicted, row.n_voxels) == (masks[0].sum(), masks[1].sum())
        np.testing.assert_equal(row.dsc, dice(*masks))
        if row.label == "d":
            assert np.isnan(row.nsd) and row.n_voxels == 0
        else:
            assert row.nsd == pytest.approx(oracle_nsd(*masks, spacing, 1.234), abs=1e-6)


def test_score_case_takes_the_tolerance_of_the_task_and_zero_as_a_tolerance():
    task = task_of({"a": 1})
    slab = np.zeros((6, 6, 6), np.uint8)
    slab[:, :, 2] = 1
    shifted = np.roll(slab, 1, 2)
    assert score_case(shifted, slab, (1, 1, 1), task).nsd.item() == 1
    assert score_case(shifted, slab, (1, 1, 1), task, 0).nsd.item() == 0


def test_score_case_takes_whole_numbers_as_floats_and_does_not_change_its_arguments():
    task = task_of({"a": 1, "b": 2})
    truth = np.random.default_rng(0).integers(0, 3, (8, 8, 8)).astype(np.float64)
    copy = truth.copy()
    assert score_case(truth, truth.astype(np.uint8), (1, 1, 1), task).dsc.tolist() == [1, 1]
    np.testing.assert_array_equal(truth, copy)


@pytest.mark.parametrize(
    "prediction, truth, message",
    [
        (np.zeros((4, 4, 4)), np.zeros((4, 4, 5)), r"one shape, got \(4, 4, 4\) and \(4, 4, 5\)"),
        (np.zeros((4, 4)), np.zeros((4, 4)), "3D label map, got shape"),
        (np.zeros((4, 4, 4)), np.full((4, 4, 4), 3), "truth holds 3, which toy does not name; it has 0 and 1, 2"),
        (np.full((4, 4, 4), 1.5), np.zeros((4, 4, 4)), "prediction holds 1.5"),
        (np.full((4, 4, 4), -1), np.zeros((4, 4, 4)), "prediction holds -1"),
        (np.full((4, 4, 4), np.nan), np.zeros((4, 4, 4)), "prediction holds nan"),
    ],
)
def test_score_case_refuses(prediction, truth, message):
    with pytest.raises(ValueError, match=message):
        score_case(prediction, truth, (1, 1, 1), task_of({"a": 1, "b": 2}))


def test_importing_metrics_does_not_import_monai():
    import subprocess
    import sys

    code = "import sys, mednext_v2.metrics; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
