"Preparation: geometry, statistics against plain NumPy, the same bytes again, and refusals that leave nothing behind"

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import joblib
import nibabel
import numpy as np
import pytest
from scipy import ndimage

from data_toys import DEMO
from mednext_v2.core import ItemsFailed, build, root
from mednext_v2.data.datasets import Scan, get_dataset, list_cases, read_case
from mednext_v2.data.preprocess import (
    PREPARATION,
    SCHEMES,
    Fingerprint,
    Prepared,
    foreground_voxels,
    image_type,
    measure_fingerprint,
    normalise,
    prepare,
    resample,
    resample_image,
    resample_label,
    subsample_evenly,
    target_shape,
)
from mednext_v2.data.scans import write_volume
from mednext_v2.study.seeds import build_dataset

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
GOLDEN = [-3.43508, 10.287038, 2.189345, -10.527577, 0.567898, -5.582685]
CASES = {"001": "train", "002": "train", "NA": "val", "004": "test"}


def random_case(number):
    rng = np.random.default_rng(number)
    shape = (6 + number, 7, 8)
    return rng.normal(50, 100, shape).astype(np.float32), rng.integers(0, 3, shape).astype(np.uint8)


@pytest.fixture
def raw(tmp_path):
    "A raw folder of random volumes on the task's own grid"
    folder = tmp_path / "raw" / DEMO.folder
    for number, (case, split) in enumerate(CASES.items()):
        image, label = random_case(number)
        suffix = "Ts" if split == "test" else "Tr"
        write_volume(folder / f"images{suffix}/{case}_0000.nii.gz", image, AFFINE)
        write_volume(folder / f"labels{suffix}/{case}.nii.gz", label, AFFINE)
    splits = [{split: [c for c, s in CASES.items() if s == split] for split in ("train", "val")}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    return tmp_path / "raw"


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    "A CT and an MR task of the mini suite, raw and prepared"
    folder = tmp_path_factory.mktemp("mini")
    for name in ("liver_lesion_ct", "brain_mr"):
        build_dataset(name, root() / "data" / "seeds", folder / "raw", cases=(2, 1, 1))
        prepare(get_dataset(name), folder / "raw", folder / name)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def known(**changes):
    "A fingerprint of one channel"
    return Fingerprint(
        **{
            "cases": 1,
            "spacing": (1.0, 1.0, 1.0),
            "shape": (4, 4, 4),
            "mean": (50.0,),
            "std": (20.0,),
            "median": (50.0,),
            "minimum": (-100.0,),
            "maximum": (200.0,),
            "percentile_00_5": (0.0,),
            "percentile_99_5": (100.0,),
            "schemes": ("ct",),
            "nonzero": False,
            **changes,
        }
    )


def sphere(radius=24.0, spacing=(2.0, 2.0, 2.0), extent=96.0, centre=(44.0, 50.0, 40.0), origin=(-7.0, 11.0, 90.0)):
    "A ball of 1000 HU with its centre given in mm from the outer corner"
    shape = [round(extent / s) for s in spacing]
    places = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) * s for n, s in zip(shape, spacing)], indexing="ij"))
    label = np.linalg.norm(places - np.reshape(centre, (3, 1, 1, 1)), axis=0) < radius
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return Scan(1000 * label[None].astype(np.float32), label.astype(np.uint8), affine)


def world_centre(scan, weights):
    return scan.affine[:3, :3] @ ndimage.center_of_mass(weights) + scan.affine[:3, 3]


# Fingerprint


def test_fingerprint_is_plain_numpy_over_labelled_training_voxels(raw):
    measured = measure_fingerprint(DEMO, raw)
    pool = np.concatenate([image[label > 0] for image, label in map(random_case, (0, 1))]).astype(float)
    assert measured.cases == 2 and measured.shape == (6, 7, 8) and measured.spacing == pytest.approx((2, 3, 4))
    assert measured.mean[0] == pytest.approx(pool.sum() / len(pool))
    assert measured.std[0] == pytest.approx(np.sqrt(((pool - pool.mean()) ** 2).mean()))
    assert measured.minimum[0] == pool.min() and measured.maximum[0] == pool.max()
    assert measured.median[0] == pytest.approx(np.median(pool))
    ordered = np.sort(pool)
    for share, value in ((0.005, measured.percentile_00_5[0]), (0.995, measured.percentile_99_5[0])):
        place = share * (len(pool) - 1)  # Linear interpolation between the neighbours in rank
        low, part = int(place), place - int(place)
        assert value == pytest.approx(ordered[low] * (1 - part) + ordered[low + 1] * part)


def test_fingerprint_ignores_validation_test_and_background(raw):
    before = measure_fingerprint(DEMO, raw)
    for case in list_cases(DEMO, raw):
        scan = read_case(DEMO, case)
        image = scan.image[0].copy()
        if case.split == "train":
            image[scan.label == 0] = 9999
        else:
            image += 5000
        write_volume(case.images[0], image, AFFINE)
    assert measure_fingerprint(DEMO, raw) == before


def test_fingerprint_measures_crops_and_some_of_many_cases(raw, monkeypatch):
    monkeypatch.setattr("mednext_v2.data.preprocess.MAX_MEASURED_CASES", 1)
    assert measure_fingerprint(DEMO, raw).cases == 1


def test_fingerprint_needs_a_labelled_voxel(raw):
    for case in list_cases(DEMO, raw):
        write_volume(case.label, np.zeros_like(read_case(DEMO, case).label), AFFINE)
    with pytest.raises(ValueError, match="no training case of demo has a labelled voxel"):
        measure_fingerprint(DEMO, raw)


def test_fingerprint_survives_json():
    measured = known(nonzero=True)
    assert build(Fingerprint, json.loads(json.dumps(dataclasses.asdict(measured)))) == measured


def test_nonzero_is_for_mr_with_a_background_of_zeros(mini, raw):
    assert Prepared(mini / "brain_mr").fingerprint.nonzero
    assert not Prepared(mini / "liver_lesion_ct").fingerprint.nonzero
    assert not measure_fingerprint(dataclasses.replace(DEMO, modality="MR", channels=()), raw).nonzero


def test_spread_is_even_and_keeps_both_ends():
    values = subsample_evenly(np.arange(1000), 11)
    assert values[0] == 0 and values[-1] == 999 and set(np.diff(values)) <= {99, 100, 101}
    np.testing.assert_array_equal(subsample_evenly(np.arange(5), 11), np.arange(5))


# Intensities


def test_ct_by_hand():
    image = np.array([-500.0, 0.0, 50.0, 70.0, 100.0, 900.0]).reshape(1, 6, 1, 1)
    np.testing.assert_allclose(normalise(image, known()).ravel(), [-2.5, -2.5, 0, 1, 2.5, 2.5])


def test_ct_is_one_map_for_all_cases_and_keeps_order():
    values = np.linspace(-50, 150, 101).reshape(1, -1, 1, 1)
    once = normalise(values, known()).ravel()
    assert (np.diff(once) >= 0).all() and (np.diff(once[26:76]) > 0).all()
    part = normalise(values[:, :30], known()).ravel()
    np.testing.assert_array_equal(part, once[:30])


@pytest.mark.parametrize("nonzero", [False, True])
def test_mr_forgets_gain_and_has_unit_spread(nonzero):
    image = np.random.default_rng(0).uniform(1, 100, (1, 8, 8, 8))
    image[:, :4] = 0
    tissue = image > 0 if nonzero else np.ones_like(image, bool)
    result = normalise(image, known(schemes=("zscore",), nonzero=nonzero))
    assert result[tissue].mean() == pytest.approx(0, abs=1e-6)
    assert result[tissue].std() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(normalise(37 * image, known(schemes=("zscore",), nonzero=nonzero)), result, atol=1e-5)
    if nonzero:
        assert not result[image == 0].any()  # As nnU-Net leaves it


def test_mr_with_zero_background_does_not_depend_on_how_much_there_is():
    image = np.random.default_rng(0).uniform(1, 100, (1, 6, 6, 6))
    padded = np.pad(image, ((0, 0), (5, 5), (5, 5), (5, 5)))
    inside = normalise(padded, known(schemes=("zscore",), nonzero=True))[:, 5:-5, 5:-5, 5:-5]
    np.testing.assert_allclose(inside, normalise(image, known(schemes=("zscore",), nonzero=True)), atol=1e-6)


@pytest.mark.parametrize("scheme", ["ct", "zscore"])
@pytest.mark.parametrize("value", [0.0, 50.0])
def test_constant_image_stays_finite(scheme, value):
    result = normalise(np.full((1, 3, 3, 3), value), known(schemes=(scheme,), std=(0.0,), nonzero=True, mean=(value,)))
    np.testing.assert_array_equal(result, 0)


def test_each_channel_has_its_own_numbers_and_a_card_is_enough():
    two = known(mean=(0.0, 50.0), std=(1.0, 10.0), percentile_00_5=(-5.0, 0.0), percentile_99_5=(5.0, 100.0), schemes=("ct", "ct"))
    image = np.full((2, 2, 2, 2), 60.0)
    np.testing.assert_allclose(normalise(image, two)[:, 0, 0, 0], [5, 1])
    stored = json.loads(json.dumps(two.normalisation()))
    np.testing.assert_array_equal(normalise(image, stored), normalise(image, two))


def test_each_channel_follows_its_name(raw):
    "PET beside CT: one window for all CTs, each PET by itself, and a channel that is left alone"
    channels = ("CT", "PET", "noNorm")
    for case in list_cases(DEMO, raw):
        image = read_case(DEMO, case).image[0]
        for c in (1, 2):
            write_volume(case.images[0].with_name(case.images[0].name.replace("_0000", f"_000{c}")), image + 1000, AFFINE)
    dataset = dataclasses.replace(DEMO, channels=channels)
    measured = measure_fingerprint(dataset, raw)
    assert measured.schemes == ("ct", "zscore", "none")
    image = read_case(dataset, list_cases(dataset, raw)[0]).image
    ct, pet, plain = normalise(image, measured)
    np.testing.assert_array_equal(plain, image[2])
    assert pet.mean() == pytest.approx(0, abs=1e-5) and pet.std() == pytest.approx(1, abs=1e-5)
    clipped = np.clip(image[0], measured.percentile_00_5[0], measured.percentile_99_5[0])
    np.testing.assert_allclose(ct, (clipped - measured.mean[0]) / measured.std[0], rtol=1e-5, atol=1e-6)


def test_normalise_refuses_other_channels():
    with pytest.raises(ValueError, match=r"shape \(1, X, Y, Z\), got \(2, 3, 3, 3\)"):
        normalise(np.zeros((2, 3, 3, 3)), known())


# Geometry


@pytest.mark.parametrize("target", [(4.0, 4.0, 4.0), (1.5, 1.5, 1.5), (5.0, 2.0, 3.0), (2.0, 2.0, 7.0)])
def test_a_ball_keeps_volume_and_centre_in_mm(target):
    fine = sphere()
    coarse = resample(fine, target)
    volume = lambda scan: scan.label.sum() * np.prod(scan.spacing)
    # At twice the voxel size a surface voxel may be exactly half full; ties go to the label
    assert volume(coarse) == pytest.approx(volume(fine), rel=0.06 if target == (4, 4, 4) else 0.03)
    tolerance = 0.05 * max(target)
    assert world_centre(coarse, coarse.label) == pytest.approx(world_centre(fine, fine.label), abs=tolerance)
    assert world_centre(coarse, coarse.image[0]) == pytest.approx(world_centre(fine, fine.image[0]), abs=tolerance)


def test_outer_faces_stay_where_they_were():
    fine = sphere()
    coarse = resample(fine, (5.0, 7.0, 3.0))
    for scan in (fine, coarse):
        scan_faces = [nibabel.affines.apply_affine(scan.affine, corner) for corner in (np.full(3, -0.5), np.array(scan.label.shape) - 0.5)]
        np.testing.assert_allclose(scan_faces, [(-8, 10, 89), (88, 106, 185)], atol=1e-9)
    assert coarse.label.shape == (19, 14, 32) and coarse.spacing == pytest.approx((96 / 19, 96 / 14, 3))


def test_a_linear_ramp_is_interpolated_exactly_inside():
    ramp = np.arange(30.0).reshape(1, 30, 1, 1) * np.ones((1, 30, 4, 4))
    out = resample_image(ramp, (20, 4, 4), order=3)[0, :, 0, 0]
    expected = (np.arange(20) + 0.5) * 1.5 - 0.5
    np.testing.assert_allclose(out[3:-3], expected[3:-3], atol=2e-2)
    assert out.dtype == np.float32


def test_labels_stay_labels_and_follow_the_larger_share():
    label = np.zeros((4, 4, 4), np.uint8)
    label[2:] = 7
    label[2:, 2:] = 3
    assert set(np.unique(resample_label(label, (7, 9, 5)))) == {0, 3, 7}
    line = np.array([0, 0, 0, 5, 5, 5, 5, 5, 5], np.uint8).reshape(9, 1, 1)
    np.testing.assert_array_equal(resample_label(line, (3, 1, 1)).ravel(), [0, 5, 5])
    tie = np.array([0, 2, 2, 0], np.uint8).reshape(4, 1, 1)
    np.testing.assert_array_equal(resample_label(tie, (2, 1, 1)).ravel(), [2, 2])


def test_three_classes_against_argmax_of_interpolated_masks():
    label = np.random.default_rng(0).integers(0, 3, (7, 6, 5)).astype(np.uint8)
    shape = (9, 8, 7)
    where = np.stack(np.meshgrid(*[(np.arange(n) + 0.5) * o / n - 0.5 for n, o in zip(shape, label.shape)], indexing="ij"))
    masks = [ndimage.map_coordinates((label == k).astype(float), where, order=1, mode="nearest") for k in range(3)]
    clear = np.sort(masks, axis=0)[-1] - np.sort(masks, axis=0)[-2] > 1e-4
    np.testing.assert_array_equal(resample_label(label, shape)[clear], np.argmax(masks, axis=0)[clear])


def test_same_grid_is_left_alone():
    scan = sphere()
    same = resample(scan, (2.0, 2.0, 2.0))
    np.testing.assert_array_equal(same.image, scan.image)
    np.testing.assert_array_equal(same.affine, scan.affine)
    assert target_shape((3, 4, 5), (5, 5, 0.5), (5, 5, 5)) == (3, 4, 1)


# The prepared folder


def test_prepared_arrays_are_the_normalised_raw_ones(raw, tmp_path):
    prepare(DEMO, raw, tmp_path / "out")
    prepared = Prepared(tmp_path / "out")
    for number, case in enumerate(CASES):
        image, label = random_case(number)
        np.testing.assert_array_equal(np.asarray(prepared.label(case)), label)
        expected = normalise(image[None], prepared.fingerprint)
        np.testing.assert_array_equal(np.asarray(prepared.image(case)), expected.astype(np.float16))
        assert prepared.image(case).dtype == np.float16 and prepared.label(case).dtype == np.uint8
        assert prepared.lowest(case) == (float(expected.astype(np.float16).min()),)


def test_names_that_look_like_numbers_or_nothing_stay_names(raw, tmp_path):
    prepare(DEMO, raw, tmp_path / "out")
    prepared = Prepared(tmp_path / "out")
    assert [prepared.ids(split) for split in ("train", "val", "test")] == [["001", "002"], ["NA"], ["004"]]


def test_manifest_counts_voxels_and_splits(mini):
    prepared = Prepared(mini / "liver_lesion_ct")
    assert prepared.manifest.split.tolist() == ["train", "train", "val", "test"]
    for row in prepared.manifest.itertuples():
        label = np.asarray(prepared.label(row.case))
        assert (row.voxels_liver, row.voxels_lesion) == ((label == 1).sum(), (label == 2).sum())
        assert row.shape == "x".join(map(str, label.shape)) and row.spacing == "5x5x5"
        assert prepared.image(row.case).shape == (1, *label.shape)
    assert prepared.manifest.sha256.is_unique


def test_reader_gives_back_task_and_fingerprint(mini):
    prepared = Prepared(mini / "brain_mr")
    assert prepared.dataset == get_dataset("brain_mr") and prepared.spacing == (5.0, 5.0, 5.0)
    assert prepared.fingerprint == measure_fingerprint(prepared.dataset, mini / "raw")
    with pytest.raises(ValueError, match="unknown split 'tests'; known: train, val, test"):
        prepared.ids("tests")
    with pytest.raises(ValueError, match="brain_mr has no case 'nobody'"):
        prepared.image("nobody")


def test_reader_says_what_is_missing(mini, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a prepared data set, manifest.csv is missing: prepare it first"):
        Prepared(tmp_path)
    shutil.copytree(mini / "brain_mr", tmp_path / "copy")
    (tmp_path / "copy" / "task.json").unlink()
    with pytest.raises(FileNotFoundError, match="task.json is missing"):
        Prepared(tmp_path / "copy")


def test_same_input_same_bytes_in_any_number_of_processes(mini, tmp_path):
    dataset = get_dataset("liver_lesion_ct")
    for folder, workers in (("again", 1), ("two", 2)):
        prepare(dataset, mini / "raw", tmp_path / folder, workers=workers)
        assert contents(tmp_path / folder) == contents(mini / "liver_lesion_ct")


def test_another_voxel_is_another_hash_and_digest(raw, tmp_path):
    before = prepare(DEMO, raw, tmp_path / "out").set_index("case").sha256
    digest = Prepared(tmp_path / "out").digest
    case = list_cases(DEMO, raw)[-1]
    image = read_case(DEMO, case).image[0].copy()
    image[0, 0, 0] = image.mean()
    write_volume(case.images[0], image, AFFINE)
    after = prepare(DEMO, raw, tmp_path / "out").set_index("case").sha256
    assert list(before.index[before != after]) == ["004"] and Prepared(tmp_path / "out").digest != digest


@pytest.mark.parametrize("codes", ["LAS", "PIR"])
def test_orientation_of_the_files_does_not_matter(raw, tmp_path, codes):
    prepare(DEMO, raw, tmp_path / "ras")
    for path in raw.rglob("*.nii.gz"):
        image = nibabel.load(path)
        turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(codes))
        turned = image.as_reoriented(turn)
        write_volume(path, np.asanyarray(turned.dataobj), turned.affine)
    prepare(DEMO, raw, tmp_path / "turned")
    turned, ras = (Prepared(tmp_path / name).manifest.drop(columns="key") for name in ("turned", "ras"))
    assert turned.equals(ras)  # Keys hash the raw files, sha256 the arrays


def test_other_spacing_is_resampled_and_recorded(raw, tmp_path):
    dataset = dataclasses.replace(DEMO, spacing=(4.0, 3.0, 2.0))
    manifest = prepare(dataset, raw, tmp_path / "out").set_index("case")
    assert manifest["shape"]["001"] == "3x7x16" and manifest.raw_spacing["001"] == "2x3x4"
    assert manifest.spacing["002"] == "3.5x3x2"  # 7 voxels of 2 mm become 4 (to even), which fill the same 14 mm
    prepared = Prepared(tmp_path / "out")
    raw_scan = read_case(dataset, list_cases(dataset, raw)[0])
    expected = resample_image(normalise(raw_scan.image, prepared.fingerprint), (3, 7, 16))
    np.testing.assert_array_equal(np.asarray(prepared.image("001")), expected.astype(np.float16))
    assert prepared.fingerprint.shape == (3, 7, 16) and prepared.fingerprint.spacing == pytest.approx((2, 3, 4))


def test_foreground_places_are_right_even_and_limited():
    label = np.zeros((20, 20, 20), np.uint8)
    label[:10] = 2
    label[15, 3, 4] = 1
    rows = foreground_voxels(label, most=50)
    assert [(int(v), int(n)) for v, n in zip(*np.unique(rows[:, 0], return_counts=True))] == [(1, 1), (2, 50)]
    assert (label[tuple(rows[:, 1:].T)] == rows[:, 0]).all()
    assert set(foreground_voxels(label, ignore=2)[:, 0]) == {1}
    assert len(np.unique(rows[:, 1])) > 9  # Spread over the whole class
    assert foreground_voxels(np.zeros((3, 3, 3), np.uint8)).shape == (0, 4)


def test_reader_gives_places_by_class(mini):
    prepared = Prepared(mini / "brain_mr")
    case = prepared.ids("train")[0]
    places, label = prepared.foreground(case), np.asarray(prepared.label(case))
    assert set(places) == set(prepared.dataset.labels.values())
    for value, where in places.items():
        assert len(where) == min((label == value).sum(), 1_000) and (label[tuple(where.T)] == value).all()


# Refusals


def spoil_nan(case):
    image = read_case(DEMO, case).image[0].copy()
    image[1, 2, 3] = np.nan
    write_volume(case.images[0], image, AFFINE)


def spoil_label(case):
    write_volume(case.label, read_case(DEMO, case).label + 1, AFFINE)


def spoil_grid(case):
    write_volume(case.images[0], read_case(DEMO, case).image[0], AFFINE * [[1], [1], [1.1], [1]])


def spoil_file(case):
    case.images[0].write_bytes(case.images[0].read_bytes()[:100])


def valid(folder):
    "What a manifest vouches for"
    return {name: data for name, data in contents(folder).items() if not name.startswith("cases")}, Prepared(folder).digest


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_nan, "004_0000.nii.gz has 1 voxels that are NaN"),
        (spoil_label, "004.nii.gz has label 3, but demo declares 0 to 2"),
        (spoil_grid, "004_0000.nii.gz lies on another grid than 004.nii.gz"),
        (spoil_file, "004_0000.nii.gz "),
    ],
)
def test_unfit_case_is_named_and_the_old_data_stays_whole(raw, tmp_path, spoil, message, workers):
    out = tmp_path / "out" / "demo"
    prepare(DEMO, raw, out)
    before, old = valid(out), {case: np.asarray(Prepared(out).image(case)) for case in CASES}
    spoil(list_cases(DEMO, raw)[-1])
    with pytest.raises(ItemsFailed, match=message) as error:
        prepare(dataclasses.replace(DEMO, spacing=(2.5, 3.0, 4.0)), raw, out, workers=workers)
    assert list(error.value.failures) == ["004"] and list(error.value.results) == ["001", "002", "NA"]
    assert valid(out) == before and len(list((tmp_path / "out").iterdir())) == 1
    for case, image in old.items():
        np.testing.assert_array_equal(np.asarray(Prepared(out).image(case)), image)


def test_unfit_training_case_does_not_stop_the_others(raw, tmp_path):
    spoil_nan(list_cases(DEMO, raw)[0])
    spoil_file(list_cases(DEMO, raw)[-1])
    with pytest.raises(ItemsFailed, match="2 of 4 failed, the others are done") as error:
        prepare(DEMO, raw, tmp_path / "out")
    assert list(error.value.failures) == ["001", "004"] and list(error.value.results) == ["002", "NA"]
    with pytest.raises(FileNotFoundError, match="manifest.csv is missing"):
        Prepared(tmp_path / "out")


def test_second_run_makes_nothing_again_and_a_mended_case_alone(raw, tmp_path, monkeypatch):
    from mednext_v2.data import preprocess as module

    made = []
    write = module.write_case
    monkeypatch.setattr(module, "write_case", lambda dataset, scan, folder: made.append(1) or write(dataset, scan, folder))
    case = list_cases(DEMO, raw)[-1]
    good = case.label.read_bytes()
    spoil_label(case)
    with pytest.raises(ItemsFailed):
        prepare(DEMO, raw, tmp_path / "out")
    assert len(made) == 3
    case.label.write_bytes(good)
    manifest = prepare(DEMO, raw, tmp_path / "out")
    assert len(made) == 4
    assert prepare(DEMO, raw, tmp_path / "out").equals(manifest) and len(made) == 4
    prepare(dataclasses.replace(DEMO, spacing=(4.0, 3.0, 4.0)), raw, tmp_path / "out")
    assert len(made) == 8 and len(list((tmp_path / "out" / "cases").iterdir())) == 4  # The old ones are gone


KILLED = """
import os, sys
from pathlib import Path
from data_toys import DEMO
from mednext_v2.data import preprocess as module
write, count = module.write_case, [0]

def killed(task, scan, folder):
    count[0] += 1
    if count[0] == 3:
        (folder / "half").write_bytes(b"x")
        os.kill(os.getpid(), 9)
    return write(task, scan, folder)

module.write_case = killed
module.prepare(DEMO, Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_preparation_goes_on_where_it_was(raw, tmp_path, monkeypatch):
    command = [sys.executable, "-c", KILLED, str(raw), str(tmp_path / "out")]
    assert subprocess.run(command, cwd=Path(__file__).parent).returncode == -9
    assert len([p for p in (tmp_path / "out" / "cases").iterdir() if not p.name.startswith(".tmp")]) == 2
    prepare(DEMO, raw, tmp_path / "whole")
    from mednext_v2.data import preprocess as module

    made, write = [], module.write_case
    monkeypatch.setattr(module, "write_case", lambda dataset, scan, folder: made.append(1) or write(dataset, scan, folder))
    prepare(DEMO, raw, tmp_path / "out")
    assert len(made) == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_arrays_are_those_that_the_preparation_number_stands_for(tmp_path):
    "Whoever changes what comes out must raise PREPARATION, or old cases would be taken for new ones"
    rng = np.random.default_rng(5)
    smooth = ndimage.gaussian_filter(rng.normal(0, 400, (24, 20, 12)), 2)
    folder = tmp_path / "raw" / DEMO.folder
    for case, suffix in (("a", "Tr"), ("b", "Tr"), ("c", "Ts")):
        smooth[0, 0, 0] += 1e-3  # No scan may be in two splits
        write_volume(folder / f"images{suffix}/{case}_0000.nii.gz", smooth.astype(np.float32), AFFINE)
        write_volume(folder / f"labels{suffix}/{case}.nii.gz", (smooth > 20).astype(np.uint8) + (smooth > 60), AFFINE)
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    sums = []
    for spacing in ((2.0, 3.0, 4.0), (3.0, 2.0, 5.0), (1.0, 1.0, 6.0)):
        prepare(dataclasses.replace(DEMO, spacing=spacing), tmp_path / "raw", tmp_path / "out")
        prepared = Prepared(tmp_path / "out")
        image, label = (np.asarray(part("c")).astype(float) for part in (prepared.image, prepared.label))
        weights = np.cos(np.arange(image.size)).reshape(image.shape)
        sums += [(image * weights).sum(), (label * weights[0]).sum()]
    assert PREPARATION == 2
    np.testing.assert_allclose(sums, GOLDEN, atol=0.05)


def test_workers_of_a_dask_cluster_prepare_the_same_bytes(raw, tmp_path):
    distributed = pytest.importorskip("distributed")
    prepare(DEMO, raw, tmp_path / "one")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster), joblib.parallel_config(backend="dask"):
            prepare(DEMO, raw, tmp_path / "dask", workers=2)
            spoil_nan(list_cases(DEMO, raw)[-1])
            with pytest.raises(ItemsFailed, match="1 of 4 failed"):
                prepare(DEMO, raw, tmp_path / "dask", workers=2)
    manifest = contents(tmp_path / "one").pop("manifest.csv")
    assert (tmp_path / "dask" / "manifest.csv").read_bytes() == manifest


def test_missing_file_stops_before_any_image_is_read(raw, tmp_path, monkeypatch):
    list_cases(DEMO, raw)[-1].label.unlink()
    monkeypatch.setattr("mednext_v2.data.preprocess.read_case", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(FileNotFoundError, match="labelsTs/004.nii.gz is missing"):
        prepare(DEMO, raw, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unexpected_failure_names_the_case(raw, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr("mednext_v2.data.preprocess.resample", fail)
    with pytest.raises(ItemsFailed, match="001: MemoryError: no room"):
        prepare(DEMO, raw, tmp_path / "out")


def test_a_channel_that_keeps_its_own_scale_is_never_squeezed_into_half_precision():
    image = np.full((1, 2, 2, 2), 1e5, np.float32)
    assert image_type(image, ("none",)) is np.float32 and image_type(image, ("ct",)) is np.float32
    assert image_type(image / 1e4, ("zscore",)) is np.float16 and image_type(image / 1e4, ("none",)) is np.float32


@pytest.mark.parametrize("name", ["rescale_to_0_1", "RGB_to_0_1", "noNorm", "zscore", "T1"])
def test_schemes_by_channel_name_are_nnunets(name):
    known = pytest.importorskip("nnunetv2.preprocessing.normalization.map_channel_name_to_normalization")
    image = np.random.default_rng(0).integers(3, 250, (1, 6, 5, 4)).astype(np.float32)
    scheme = SCHEMES.get(name.casefold(), "zscore")
    ours = normalise(image, dict(schemes=(scheme,), mean=[0], std=[1], low=[0], high=[0], nonzero=False))
    theirs = known.get_normalization_scheme(name)(False, {}).run(image[0].copy(), np.zeros(image.shape[1:]))
    np.testing.assert_allclose(ours[0], theirs, rtol=1e-5, atol=1e-6)


def test_a_scheme_that_is_not_known_is_refused():
    known = dict(schemes=("histogram",), mean=[0], std=[1], low=[0], high=[0], nonzero=False)
    with pytest.raises(ValueError, match="no normalisation is called 'histogram'"):
        normalise(np.ones((1, 2, 2, 2), np.float32), known)
    with pytest.raises(ValueError, match="8-bit colours go from 0 to 255"):
        normalise(np.full((1, 2, 2, 2), 300, np.float32), known | {"schemes": ("rgb_to_0_1",)})


def test_two_channels_below_zero_come_back_from_the_manifest(tmp_path):
    "Their lowest values are text that begins with a minus, which `write_csv` guards against spreadsheets"
    dataset = dataclasses.replace(DEMO, channels=("T1", "T2"), modality="MR")
    rng, folder = np.random.default_rng(0), tmp_path / "raw" / DEMO.folder
    for case, suffix in (("a", "Tr"), ("b", "Tr"), ("c", "Ts")):
        for channel in (0, 1):
            write_volume(folder / f"images{suffix}/{case}_000{channel}.nii.gz", rng.normal(size=(12, 10, 8)).astype(np.float32), AFFINE)
        write_volume(folder / f"labels{suffix}/{case}.nii.gz", (rng.random((12, 10, 8)) > 0.5).astype(np.uint8), AFFINE)
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    prepare(dataset, tmp_path / "raw", tmp_path / "out")
    lowest = Prepared(tmp_path / "out").lowest("a")
    assert len(lowest) == 2 and max(lowest) < 0 and not Prepared(tmp_path / "out").partial
