"""Metrics against nnU-Net, surface-distance, MONAI and written-out formulas; conventions; folders of files"""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from mednext_v2.core import ItemsFailed
from mednext_v2.data.datasets import Dataset, write_description
from mednext_v2.data.scans import write_volume
from mednext_v2.evaluation.metrics import (
    CONVENTIONS,
    conventions,
    count_lesions,
    described_dataset,
    description_folders,
    dice,
    evaluate,
    hausdorff,
    score_case,
    surface_areas,
    surface_dice,
    surface_distances,
)

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.9, 3.1), (0.3, 0.3, 5.0)]
TOLERANCES = [0.0, 1.0, 1.234, 3.456]
COLUMNS = ("label group dsc nsd n_voxels n_predicted n_overlap hd95 volume_error volume_error_ml lesion_f1 n_lesions n_tp n_fp n_counted").split()


def blob(seed: int, shape=(19, 23, 17), smooth: float = 1.5, share: float = 0.3) -> np.ndarray:
    "A random mask with holes, islands and voxels on the border of the volume"
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), smooth)
    return noise > np.quantile(noise, 1 - share)


def task_of(labels: dict, groups="organ") -> Dataset:
    return Dataset("toy", 999, "Toy", "CT", labels, groups, (1, 1, 1), (8, 8, 8), 1.0, "finetune", "none", "none")


@pytest.fixture
def deepmind(monkeypatch):
    "DeepMind's package; NumPy 2 lacks a name that it takes for empty masks"
    package = pytest.importorskip("surface_distance")
    monkeypatch.setattr(np, "Inf", np.inf, raising=False)
    return package


def theirs(package, prediction, truth, spacing, tolerance) -> tuple[float, float]:
    "NSD and HD95 of DeepMind's package"
    found = package.compute_surface_distances(truth, prediction, spacing)
    return package.compute_surface_dice_at_tolerance(found, tolerance), package.compute_robust_hausdorff(found, 95)


@pytest.mark.parametrize("seed", range(4))
def test_dice_equals_the_set_formula_and_monai(seed):
    from monai.metrics import compute_dice

    a, b = blob(seed), blob(seed + 100)
    voxels_a, voxels_b = set(map(tuple, np.argwhere(a))), set(map(tuple, np.argwhere(b)))
    assert dice(a, b) == pytest.approx(2 * len(voxels_a & voxels_b) / (len(voxels_a) + len(voxels_b)), abs=1e-12)
    one_hot = [torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32)) for mask in (a, b)]
    assert dice(a, b) == pytest.approx(compute_dice(*one_hot, include_background=False).item(), abs=1e-6)


def test_areas_equal_both_published_tables():
    tables = pytest.importorskip("surface_distance").lookup_tables
    from monai.metrics.utils import create_table_neighbour_code_to_surface_area

    for spacing in [*SPACINGS, (2.0, 7.0, 0.11)]:
        ours = surface_areas(spacing)
        np.testing.assert_allclose(ours, tables.create_table_neighbour_code_to_surface_area(spacing), rtol=1e-12)
        np.testing.assert_allclose(ours, create_table_neighbour_code_to_surface_area(spacing)[0], rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("tolerance", TOLERANCES)
def test_surfaces_equal_deepmind_on_random_masks(deepmind, spacing, tolerance):
    for seed in range(4):
        a, b = blob(seed), blob(seed + 50, share=0.15 + 0.1 * seed)
        if seed == 3:  # No structure at all
            a, b = (np.random.default_rng(s).random((9, 12, 7)) > 0.5 for s in (1, 2))
        nsd, hd95 = theirs(deepmind, a, b, spacing, tolerance)
        assert surface_dice(a, b, spacing, tolerance) == pytest.approx(nsd, abs=1e-9)
        assert hausdorff(a, b, spacing) == pytest.approx(hd95, abs=1e-9)


def box(*bounds: tuple[int, int], shape=(12, 12, 12)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*pair) for pair in bounds)] = True
    return mask


CHECKER = np.indices((12, 12, 12)).sum(0) % 2 == 0
ADVERSARIAL = {
    "single voxels": (box((5, 6), (5, 6), (5, 6)), box((5, 6), (5, 6), (6, 7))),
    "a voxel in each corner": (box((0, 1), (0, 1), (0, 1)), box((11, 12), (11, 12), (11, 12))),
    "touching the border": (box((0, 12), (0, 5), (7, 12)), box((0, 11), (0, 6), (6, 12))),
    "the whole volume": (box((0, 12), (0, 12), (0, 12)), box((1, 12), (0, 12), (0, 12))),
    "planes": (box((3, 4), (0, 12), (0, 12)), box((5, 6), (0, 12), (0, 12))),
    "a plane and a rod": (box((3, 4), (0, 12), (0, 12)), box((0, 12), (6, 7), (6, 7))),
    "checkerboards": (CHECKER, ~CHECKER),
    "checkerboard and box": (CHECKER, box((2, 9), (2, 9), (2, 9))),
    "disjoint": (box((0, 3), (0, 3), (0, 3)), box((8, 12), (8, 12), (8, 12))),
    "identical": (blob(3, (12, 12, 12)), blob(3, (12, 12, 12))),
    "one inside another": (box((1, 11), (1, 11), (1, 11)), box((4, 7), (4, 7), (4, 7))),
    "a shell": (box((1, 11), (1, 11), (1, 11)) & ~box((2, 10), (2, 10), (2, 10)), box((1, 11), (1, 11), (1, 11))),
    "touching by a corner": (box((2, 5), (2, 5), (2, 5)), box((5, 8), (5, 8), (5, 8))),
    "missed": (box((0, 0), (0, 0), (0, 0)), box((2, 5), (2, 5), (2, 5))),
    "invented": (box((2, 5), (2, 5), (2, 5)), box((0, 0), (0, 0), (0, 0))),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_surfaces_equal_deepmind_on_adversarial_masks(deepmind, name, spacing):
    pair = ADVERSARIAL[name]
    steps = [step * size for size in spacing for step in (1, 2, 3)]  # Exactly as far as voxels lie apart
    ties = np.unique(np.concatenate(surface_distances(*pair, spacing).distances))[:8]
    for tolerance in [0.0, *steps, *ties[np.isfinite(ties)], 1e9]:
        nsd, hd95 = theirs(deepmind, *pair, spacing, tolerance)
        assert surface_dice(*pair, spacing, tolerance) == pytest.approx(nsd, abs=1e-9), tolerance
        if np.isfinite(hd95):
            assert hausdorff(*pair, spacing) == pytest.approx(hd95, abs=1e-9)
        else:
            assert np.isnan(hausdorff(*pair, spacing)), "ours: not available"


def test_surface_dice_equals_monai_with_subvoxels():
    from monai.metrics import compute_surface_dice

    for seed in range(3):
        a, b = np.zeros((30, 28, 26), bool), np.zeros((30, 28, 26), bool)
        a[5:24, 2:25, 3:20] = blob(seed)
        b[7:26, 4:27, 3:20] = blob(seed + 1)
        whole = [torch.from_numpy(mask[None, None]) for mask in (a, b)]
        value = compute_surface_dice(*whole, [1.3], include_background=True, spacing=(1.0, 2.0, 0.5), use_subvoxels=True)
        assert surface_dice(a, b, (1.0, 2.0, 0.5), 1.3) == pytest.approx(value.item(), abs=1e-6)


@pytest.mark.parametrize("corner", [(0, 0, 0), (11, 7, 13), (21, 17, 23)])
def test_surface_dice_does_not_depend_on_what_lies_around(corner):
    a, b = blob(1, (9, 9, 9)), blob(2, (9, 9, 9))
    wide = []
    for mask in (a, b):
        volume = np.zeros((30, 26, 32), bool)
        volume[tuple(slice(c, c + 9) for c in corner)] = mask
        wide.append(volume)
    assert surface_dice(*wide, (1, 2, 3), 1.2) == surface_dice(a, b, (1, 2, 3), 1.2)
    assert hausdorff(*wide, (1, 2, 3)) == hausdorff(a, b, (1, 2, 3))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_symmetric_one_on_identity_and_monotone_in_tolerance(spacing):
    a, b = blob(7), blob(8)
    assert dice(a, b) == dice(b, a)
    assert dice(a, a) == surface_dice(a, a, spacing, 0) == 1
    values = [surface_dice(a, b, spacing, tolerance) for tolerance in (0, 0.5, 1, 2, 4, 8, 100)]
    assert values == sorted(values) and values[0] < values[3] < 1 and values[-1] == pytest.approx(1)
    assert surface_dice(a, b, spacing, 1.7) == pytest.approx(surface_dice(b, a, spacing, 1.7), abs=1e-12)
    assert hausdorff(a, b, spacing) == hausdorff(b, a, spacing) > 0


def test_surface_dice_scales_with_the_unit():
    a, b = blob(3), blob(4)
    assert surface_dice(a, b, (1, 2, 3), 1.9) == pytest.approx(surface_dice(a, b, (10, 20, 30), 19), abs=1e-12)
    assert hausdorff(a, b, (10, 20, 30)) == pytest.approx(10 * hausdorff(a, b, (1, 2, 3)))


@pytest.mark.parametrize("axis, millimetres", [(0, 0.8), (1, 2.5), (2, 4.0)])
def test_a_slab_shifted_by_one_voxel(axis, millimetres):
    slab = np.zeros((12, 12, 12), bool)
    slab[tuple(slice(4, 5) if a == axis else slice(None) for a in range(3))] = True
    shifted = np.roll(slab, 1, axis)
    spacing = (0.8, 2.5, 4.0)
    # The slabs share one of the two faces that each has
    assert surface_dice(slab, shifted, spacing, millimetres - 0.01) == pytest.approx(0.5, abs=0.05)
    assert surface_dice(slab, np.roll(slab, 2, axis), spacing, millimetres - 0.01) == 0
    assert surface_dice(slab, shifted, spacing, millimetres + 0.01) == pytest.approx(1)
    assert dice(slab, shifted) == 0


def test_area_of_a_box_is_its_surface_without_the_cut_off_edges():
    # Flat corners hold a face each, corners along an edge two pieces at 45 degrees, the eight tips a triangle
    spacing, sizes = (0.5, 2.0, 3.0), (6, 5, 4)
    area = surface_distances(*2 * [box(*[(2, 2 + size) for size in sizes])], spacing).areas[0].sum()
    faces, expected = np.prod(spacing) / np.array(spacing), 0.0
    for axis in range(3):
        one, two = (a for a in range(3) if a != axis)
        expected += 2 * (sizes[one] - 1) * (sizes[two] - 1) * faces[axis]
        expected += 4 * (sizes[axis] - 1) * 0.5 * np.hypot(faces[one], faces[two])
    expected += 8 * np.linalg.norm(faces) / 8
    assert area == pytest.approx(expected)


def test_conventions_for_empty_masks():
    empty, full = np.zeros((5, 5, 5), bool), np.ones((5, 5, 5), bool)
    assert np.isnan(dice(empty, empty)) and np.isnan(surface_dice(empty, empty, (1, 1, 1)))
    for pair in ((empty, full), (full, empty)):
        assert dice(*pair) == surface_dice(*pair, (1, 1, 1), 100) == 0
        assert np.isnan(hausdorff(*pair, (1, 1, 1)))


def test_volumes_of_two_dimensions_are_refused():
    with pytest.raises(ValueError, match="must be 3D masks"):
        surface_dice(np.ones((3, 3)), np.ones((3, 3)), (1, 1), 1)


def test_a_single_voxel_and_a_single_slice():
    voxel = np.zeros((1, 1, 1), bool)
    voxel[0, 0, 0] = True
    assert dice(voxel, voxel) == surface_dice(voxel, voxel, (1, 1, 1), 0) == 1
    flat = np.pad(blob(5, (20, 20, 1)), ((1, 1), (1, 1), (0, 0)))
    moved = np.roll(flat, 1, 0)
    assert 0 < surface_dice(flat, moved, (1, 1, 5), 0.5) < surface_dice(flat, moved, (1, 1, 5), 1) == pytest.approx(1)


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


def test_score_case_equals_class_by_class_on_the_whole_volume(deepmind):
    dataset = task_of({"a": 1, "b": 2, "c": 3, "d": 4}, dict(a="organ", b="pathology", c="organ", d="organ"))
    generator = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(generator.normal(size=(4, 24, 22, 14)), (0, 2, 2, 2))
    truth = smooth.argmax(0).astype(np.uint8)
    prediction = (smooth + 0.6 * smooth[::-1]).argmax(0).astype(np.int64)  # The class "d" is in neither
    spacing = (1.0, 0.6, 2.2)
    scores = score_case(prediction, truth, spacing, dataset, 1.234)
    assert list(scores) == COLUMNS
    assert scores.label.tolist() == list(dataset.labels) and scores.group.tolist() == list(dataset.groups.values())
    for row in scores.itertuples():
        masks = prediction == dataset.labels[row.label], truth == dataset.labels[row.label]
        assert (row.n_predicted, row.n_voxels) == (masks[0].sum(), masks[1].sum())
        np.testing.assert_equal(row.dsc, dice(*masks))
        if row.label == "d":
            assert np.isnan([row.nsd, row.hd95, row.volume_error, row.volume_error_ml]).all() and row.n_voxels == 0
        else:
            nsd, hd95 = theirs(deepmind, *masks, spacing, 1.234)
            assert (row.nsd, row.hd95) == pytest.approx((nsd, hd95), abs=1e-6)
            assert row.volume_error == pytest.approx(masks[0].sum() / masks[1].sum() - 1)
            assert row.volume_error_ml == pytest.approx((masks[0].sum() - masks[1].sum()) * 1.0 * 0.6 * 2.2 / 1000)
        assert pd.isna(row.n_lesions) == (row.group == "organ")


def test_score_case_takes_the_tolerance_of_the_task_and_zero_as_a_tolerance():
    dataset = task_of({"a": 1})
    slab = np.zeros((6, 6, 6), np.uint8)
    slab[:, :, 2] = 1
    shifted = np.roll(slab, 1, 2)
    assert score_case(shifted, slab, (1, 1, 1), dataset).nsd.item() == pytest.approx(1)
    assert score_case(shifted, slab, (1, 1, 1), dataset, 0).nsd.item() < 0.6


def test_score_case_takes_whole_numbers_as_floats_and_does_not_change_its_arguments():
    dataset = task_of({"a": 1, "b": 2})
    truth = np.random.default_rng(0).integers(0, 3, (8, 8, 8)).astype(np.float64)
    copy = truth.copy()
    assert score_case(truth, truth.astype(np.uint8), (1, 1, 1), dataset).dsc.tolist() == [1, 1]
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

    code = "import sys, mednext_v2.evaluation.metrics; sys.exit('monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- Regions, ignored voxels, nnU-Net

REGIONS = dict(
    labels={"edema": 1, "core": 2, "enhancing": 3},
    groups=dict.fromkeys(("edema", "core", "enhancing", "whole", "inner", "tip"), "pathology"),
    regions={"whole": (1, 2, 3), "inner": (2, 3), "tip": (3,)},
    ignore=4,
)


def make_task(**fields) -> Dataset:
    given = dict(labels={"a": 1, "b": 2, "c": 3}, groups="organ") | fields
    return Dataset("toy", 999, "Toy", "CT", spacing=(1, 1, 1), patch=(8, 8, 8), nsd_tolerance=1.0, role="finetune", licence="none", citation="none", **given)


def label_maps(seed: int, classes: int = 4, shape=(16, 14, 12)) -> tuple[np.ndarray, np.ndarray]:
    "Prediction and truth that resemble each other"
    noise = np.random.default_rng(seed).normal(size=(classes, *shape))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2, 2))
    truth = smooth.argmax(0).astype(np.uint8)
    return (smooth + 0.7 * smooth[::-1]).argmax(0).astype(np.uint8), truth


AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def write_pairs(folder, pairs: dict, affine=AFFINE) -> None:
    for case, maps in pairs.items():
        for name, labels in zip(("predictions", "truths"), maps):
            if labels is not None:
                write_volume(folder / name / f"{case}.nii.gz", labels, affine)


@pytest.mark.parametrize("fields", [{}, {"ignore": 4}, REGIONS], ids=["labels", "ignore", "regions and ignore"])
def test_summary_equals_nnunet(tmp_path, fields):
    module = pytest.importorskip("nnunetv2.evaluation.evaluate_predictions")
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    dataset, pairs = make_task(**fields), {}
    for seed in range(3):
        prediction, truth = label_maps(seed)
        if dataset.ignore:
            truth[np.random.default_rng(seed).random(truth.shape) < 0.2] = dataset.ignore
        pairs[f"case {seed}"] = prediction, truth
    pairs["empty"] = tuple(np.where(labels == 2, 0, labels) for labels in pairs["case 0"])
    write_pairs(tmp_path, pairs)
    evaluate(tmp_path / "predictions", tmp_path / "truths", dataset, out=tmp_path / "ours")
    regions = [v if len(v) > 1 else v[0] for v in dataset.regions.values()] or list(dataset.labels.values())
    cases = [
        module.compute_metrics(str(tmp_path / f"truths/{case}.nii.gz"), str(tmp_path / f"predictions/{case}.nii.gz"), SimpleITKIO(), regions, dataset.ignore)
        for case in sorted(pairs)
    ]
    ours = json.loads((tmp_path / "ours/summary.json").read_text())
    for mine, other in zip(ours["metric_per_case"], cases, strict=True):
        assert mine["reference_file"] == other["reference_file"] and mine["prediction_file"] == other["prediction_file"]
        assert list(mine["metrics"]) == [module.label_or_region_to_key(r) for r in regions]
        for region in regions:
            for key, value in other["metrics"][region].items():
                np.testing.assert_equal(mine["metrics"][str(region)][key], float(value))
    for region in regions:  # As nnU-Net's compute_metrics_on_folder averages
        for key in ("Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref"):
            mean = np.nanmean([case["metrics"][region][key] for case in cases])
            assert ours["mean"][str(region)][key] == pytest.approx(mean, rel=1e-12)
    dices = [ours["mean"][str(region)]["Dice"] for region in regions]
    assert ours["foreground_mean"]["Dice"] == pytest.approx(np.mean(dices), rel=1e-12)
    loaded = module.load_summary_json(str(tmp_path / "ours/summary.json"))
    assert list(loaded["mean"]) == regions and ours["conventions"] == conventions(dataset)


def test_ignored_voxels_change_nothing_else():
    dataset = make_task(ignore=4)
    prediction, truth = label_maps(5)
    ignored = np.random.default_rng(1).random(truth.shape) < 0.3
    with_ignored = score_case(prediction, np.where(ignored, 4, truth), (1, 1, 1), dataset)
    cleared = score_case(np.where(ignored, 0, prediction), np.where(ignored, 0, truth), (1, 1, 1), dataset)
    pd.testing.assert_frame_equal(with_ignored.drop(columns="n_counted"), cleared.drop(columns="n_counted"))
    assert (with_ignored.n_counted == truth.size - ignored.sum()).all() and (cleared.n_counted == truth.size).all()
    with pytest.raises(ValueError, match="prediction holds 4"):
        score_case(np.where(ignored, 4, truth), truth, (1, 1, 1), dataset)


def test_regions_are_unions():
    dataset = make_task(**REGIONS | {"ignore": None})
    prediction, truth = label_maps(6)
    scores = score_case(prediction, truth, (1, 2, 3), dataset).set_index("label")
    assert list(scores.index) == ["whole", "inner", "tip"]
    for name, values in dataset.regions.items():
        masks = np.isin(prediction, values), np.isin(truth, values)
        assert scores.dsc[name] == dice(*masks)
        assert scores.nsd[name] == pytest.approx(surface_dice(*masks, (1, 2, 3), 1), abs=1e-12)


# ---- Lesions


def matched_by_hand(prediction, truth, iou: float) -> tuple[int, int, int]:
    "Lesions, found and invented ones, by scipy's components and a loop over all pairs"
    (true, n), (guess, m) = (ndimage.label(mask, np.ones((3, 3, 3))) for mask in (truth, prediction))
    pairs = []
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            value = ((true == i) & (guess == j)).sum() / ((true == i) | (guess == j)).sum()
            if value >= iou and value > 0:
                pairs.append((-value, i, j))
    used = set()
    for _, i, j in sorted(pairs):
        if not {("t", i), ("p", j)} & used:
            used |= {("t", i), ("p", j)}
    return n, len(used) // 2, m - len(used) // 2


@pytest.mark.parametrize("iou", [0.0, 0.1, 0.5])
def test_lesions_equal_a_loop_over_all_pairs(iou):
    for seed in range(5):
        a, b = blob(seed, smooth=1.0, share=0.12), blob(seed, smooth=1.2, share=0.1)
        n, found, invented = matched_by_hand(a, b, iou)
        counted = count_lesions(a, b, iou)
        assert (counted["n_lesions"], counted["n_tp"], counted["n_fp"]) == (n, found, invented)
        assert n > 3 and counted["lesion_f1"] == pytest.approx(2 * found / (n + found + invented))


@pytest.mark.parametrize("iou", [0.1, 0.5])
def test_lesions_equal_panoptica(iou):
    panoptica = pytest.importorskip("panoptica")
    theirs = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(),
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=iou),
    )
    for seed in range(3):
        a, b = blob(seed, smooth=1.0, share=0.12), blob(seed, smooth=1.2, share=0.1)
        (result,) = theirs.evaluate(a.astype(np.uint8), b.astype(np.uint8), verbose=False).values()
        counted = count_lesions(a, b, iou)
        found = (counted["n_tp"], counted["n_fp"], counted["n_lesions"] - counted["n_tp"])
        assert found == (result.tp, result.fp, result.fn) and min(found) > 0
        assert counted["lesion_f1"] == pytest.approx(result.rq, abs=1e-12)


def test_one_large_prediction_finds_one_lesion_only():
    truth = box((1, 4), (1, 4), (1, 4)) | box((6, 9), (1, 4), (1, 4))
    counted = count_lesions(box((1, 9), (1, 4), (1, 4)), truth)
    assert counted == dict(lesion_f1=2 / 3, n_lesions=2, n_tp=1, n_fp=0)
    missed, invented = count_lesions(truth & False, truth), count_lesions(truth, truth & False)
    assert missed == dict(lesion_f1=0, n_lesions=2, n_tp=0, n_fp=0)
    assert invented == dict(lesion_f1=0, n_lesions=0, n_tp=0, n_fp=2)


# ---- Folders


def test_evaluate_scores_as_score_case_in_any_orientation(tmp_path):
    prediction, truth = label_maps(0)
    affine = np.array([[0, -2.0, 0, 5], [1.0, 0, 0, -3], [0, 0, 1.5, 0], [0, 0, 0, 1]])
    write_pairs(tmp_path, {"001": (prediction, truth)}, affine)
    table = evaluate(tmp_path / "predictions", tmp_path / "truths", make_task(), 1.7, out=tmp_path / "out")
    expected = score_case(prediction, truth, (1.0, 2.0, 1.5), make_task(), 1.7)
    assert list(table)[:2] == ["task", "case"]
    pd.testing.assert_frame_equal(table.drop(columns=["task", "case"]), expected, rtol=1e-9)
    written = pd.read_csv(tmp_path / "out/scores.csv", dtype={"case": str})
    assert list(written) == list(table) and written.case.tolist() == ["001"] * 3
    np.testing.assert_allclose(written.nsd, table.nsd, rtol=1e-5)
    one = evaluate(tmp_path / "predictions/001.nii.gz", tmp_path / "truths/001.nii.gz", make_task(), 1.7)
    pd.testing.assert_frame_equal(one, table)


def test_evaluate_names_what_it_cannot_score_and_scores_the_rest(tmp_path):
    good = label_maps(0)
    pairs = {"good": good, "no-truth": (good[0], None), "no-prediction": (None, good[1])}
    pairs |= {"shape": (good[0][1:], good[1]), "value": (np.full_like(good[0], 9), good[1]), "broken": good}
    write_pairs(tmp_path, pairs)
    write_volume(tmp_path / "predictions/moved.nii.gz", good[0], np.diag([1.0, 1.5, 2.1, 1.0]))
    write_volume(tmp_path / "truths/moved.nii.gz", good[1], np.diag([1.0, 1.5, 2.0, 1.0]))
    (tmp_path / "predictions/broken.nii.gz").write_bytes(b"no image")
    (tmp_path / "predictions/notes.txt").write_text("not a volume")
    with pytest.raises(ItemsFailed) as caught:
        evaluate(tmp_path / "predictions", tmp_path / "truths", make_task(), out=tmp_path / "out")
    reasons = caught.value.failures
    assert set(reasons) == {"no-truth", "no-prediction", "shape", "value", "broken", "moved"}
    assert "truths has no file of that name" in reasons["no-truth"]
    assert "predictions has no file of that name" in reasons["no-prediction"]
    assert "has the shape" in reasons["shape"] and "on another grid" in reasons["moved"]
    assert "value.nii.gz: prediction holds 9" in reasons["value"] and "is not NIfTI" in reasons["broken"]
    assert all("\n" not in reason for reason in reasons.values())
    assert pd.read_csv(tmp_path / "out/scores.csv").case.unique().tolist() == ["good"]
    assert len(json.loads((tmp_path / "out/summary.json").read_text())["metric_per_case"]) == 1


def test_evaluate_writes_nothing_if_no_case_can_be_scored(tmp_path):
    good = label_maps(0)
    write_pairs(tmp_path, {"a": (good[0], None), "b": (None, good[1])})
    with pytest.raises(ItemsFailed, match="2 of 2 failed"):
        evaluate(tmp_path / "predictions", tmp_path / "truths", make_task(), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        evaluate(tmp_path / "nowhere", tmp_path / "truths", make_task())


def test_two_files_of_one_name_are_refused_and_hidden_ones_are_none(tmp_path):
    pair = label_maps(0)
    write_pairs(tmp_path, {"a": pair})
    shutil.copy(tmp_path / "predictions/a.nii.gz", tmp_path / "predictions/.tmp-x.nii.gz")
    assert len(evaluate(tmp_path / "predictions", tmp_path / "truths", make_task())) == 3
    write_volume(tmp_path / "truths/a.nii", pair[1], np.eye(4))
    with pytest.raises(ValueError, match="holds a.nii and a.nii.gz: keep one"):
        evaluate(tmp_path / "predictions", tmp_path / "truths", make_task())


def test_the_task_comes_from_a_dataset_json(tmp_path):
    dataset = make_task(**REGIONS)
    write_pairs(tmp_path, {"a": label_maps(2)})
    with pytest.raises(ValueError, match="no dataset.json in .*name the data set.*--task"):
        evaluate(tmp_path / "predictions", tmp_path / "truths")
    assert description_folders(tmp_path, tmp_path) == [tmp_path, tmp_path.parent]
    write_description(dataset, tmp_path / "predictions", 0)
    table = evaluate(tmp_path / "predictions", tmp_path / "truths")
    assert table.label.tolist() == list(dataset.regions) and set(table.group) == {"pathology"}
    read = described_dataset(tmp_path / "predictions/dataset.json")
    assert (read.regions, read.ignore, read.name) == (dataset.regions, 4, "toy")
    with pytest.raises(ValueError, match="unknown data set"):
        evaluate(tmp_path / "predictions", tmp_path / "truths", "no_such_task")


def test_evaluate_gives_the_same_with_two_processes(tmp_path):
    write_pairs(tmp_path, {str(seed): label_maps(seed) for seed in range(3)})
    arguments = tmp_path / "predictions", tmp_path / "truths", make_task()
    pd.testing.assert_frame_equal(evaluate(*arguments), evaluate(*arguments, workers=2))


def test_conventions_hold():
    dataset, full = make_task(groups="pathology"), np.ones((4, 4, 4), int)
    none = full * 0
    rows = {
        name: score_case(*maps, (1, 1, 1), dataset).iloc[0]
        for name, maps in dict(truth=(none, full), prediction=(full, none), neither=(none, none), both=(full, full)).items()
    }
    metrics = ["dsc", "nsd", "lesion_f1", "volume_error", "hd95"]
    np.testing.assert_equal(rows["truth"][metrics].tolist(), [0, 0, 0, -1, np.nan])
    np.testing.assert_equal(rows["prediction"][metrics].tolist(), [0, 0, 0, np.nan, np.nan])
    np.testing.assert_equal(rows["neither"][metrics].tolist(), [np.nan] * 5)
    assert rows["both"][metrics].tolist() == [1, 1, 1, 0, 0]
    assert conventions(dataset, 2.5)["NSD tolerance"] == "2.5 mm" and set(CONVENTIONS) < set(conventions(dataset))
