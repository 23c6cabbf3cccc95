"The mini suite: seeds are the ones we mean, same seed same bytes, and nothing of a test scan is ever trained on"

import hashlib
import json
import shutil

import nibabel
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from mednext_v2.core import root, sha256
from mednext_v2.data.datasets import list_cases, load_datasets, read_case
from mednext_v2.study.seeds import (
    BRAIN_LESION,
    HEAD_BLEED,
    SOURCES,
    LabelledScan,
    add_ct_lesions,
    add_mr_lesions,
    build_dataset,
    build_suite,
    deform,
    finish_mr,
    generator,
    load_seeds,
    plan_cases,
    read_seed,
    smooth_field,
    spline_matrix,
    spoiled_echo,
    synthesise_mr,
    verify_seeds,
)

SEEDS = root() / "data" / "seeds"
TASKS = {name: dataset for name, dataset in load_datasets().items() if dataset.source == "seeds"}


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    "The suite with the full number of training cases, and its provenance"
    folder = tmp_path_factory.mktemp("suite")
    return folder, build_suite(SEEDS, folder, cases=(8, 2, 2), corpus=(4, 2))


@pytest.fixture
def copy(tmp_path):
    "A copy of the seeds that a test may spoil"
    return shutil.copytree(SEEDS, tmp_path / "seeds")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("folder", [SEEDS, SEEDS / "people"], ids=["scans", "people"])
def test_every_seed_file_is_in_the_manifest_and_unaltered(folder):
    listed = {name for seed in verify_seeds(folder).values() for name in seed.files}
    assert listed == {path.name for path in folder.glob("*.nii.gz")}


@pytest.mark.parametrize("folder", [SEEDS, SEEDS / "people"], ids=["scans", "people"])
def test_manifest_states_origin_licence_and_true_spacing(folder):
    readme = (SEEDS / "README.md").read_text()
    for seed in load_seeds(folder).values():
        assert all(str(value).strip() for value in vars(seed).values())
        assert seed.licence.split()[0] in readme
        for name in seed.files:
            image = nibabel.load(folder / name)
            assert image.header.get_zooms() == pytest.approx(seed.spacing)
            assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")


def test_missing_seed(copy):
    (copy / "mrQ_label.nii.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        verify_seeds(copy)
    assert "mrQ_label.nii.gz is missing" in str(error.value) and "\n" not in str(error.value)
    assert "git checkout -- data/seeds/mrQ_label.nii.gz" in str(error.value)


def test_one_altered_byte_is_seen_before_anything_is_built(copy, tmp_path):
    data = bytearray((copy / "ctA.nii.gz").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "ctA.nii.gz").write_bytes(data)
    with pytest.raises(ValueError) as error:
        build_dataset("abdomen_ct", copy, tmp_path / "raw", cases=(1, 1, 1))
    message = str(error.value)
    assert "ctA.nii.gz was altered" in message and "git checkout -- data/seeds/ctA.nii.gz" in message
    assert sha256(SEEDS / "ctA.nii.gz") in message and sha256(copy / "ctA.nii.gz") in message
    assert not (tmp_path / "raw").exists()


def test_missing_or_misspelt_manifest(copy):
    text = (copy / "manifest.yaml").read_text()
    (copy / "manifest.yaml").write_text(text.replace("    licence:", "    license:", 1))
    with pytest.raises(ValueError, match="seed 'ctA': SeedEntry has no 'license'"):
        verify_seeds(copy)
    (copy / "manifest.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="manifest.yaml is missing"):
        verify_seeds(copy)


def test_label_sets_cover_what_the_tasks_need():
    for name, source in SOURCES.items():
        for scan in {*source.train, source.test} - {""}:
            seed = read_seed(SEEDS, load_seeds(SEEDS)[scan])
            if name in ("abdomen_ct", "brain_mr", "abdomen_mr"):
                assert set(TASKS[name].labels) <= set(seed.names), (name, scan)


@pytest.mark.parametrize("name", ["head_bleed_ct", "brain_lesion_mr"])
def test_same_seed_same_bytes_in_any_number_of_processes(tmp_path, name):
    for folder, workers in (("one", 1), ("again", 1), ("two", 2)):
        build_dataset(name, SEEDS, tmp_path / folder, cases=(2, 1, 1), workers=workers)
    first = contents(tmp_path / "one")
    assert len(first) == 2 * 4 + 3
    assert first == contents(tmp_path / "again") == contents(tmp_path / "two")


def test_another_seed_is_another_suite(suite, tmp_path):
    folder, provenance = suite
    other = build_dataset("brain_mr", SEEDS, tmp_path, cases=(8, 2, 2), seed=1)
    assert not set(other.sha256) & set(provenance.sha256)


def test_a_case_does_not_depend_on_how_many_there_are(suite, tmp_path):
    few = build_dataset("liver_lesion_ct", SEEDS, tmp_path, cases=(1, 1, 1)).set_index("case").sha256
    many = suite[1].set_index("case").sha256
    assert (few == many[few.index]).all()


def test_no_two_cases_are_the_same(suite):
    assert suite[1].sha256.is_unique


def test_no_test_scan_trains_anywhere(suite):
    provenance = suite[1]
    tested = set(provenance.source_scan[provenance.split == "test"])
    trained = set(provenance.source_scan[provenance.split != "test"])
    assert tested == {"ctB", "ctK", "mrQ", "mrM"} and not tested & trained


@pytest.mark.parametrize("name", TASKS)
def test_layout_is_nnunets(suite, name):
    dataset, folder = TASKS[name], suite[0] / TASKS[name].folder
    about = json.loads((folder / "dataset.json").read_text())
    assert about["channel_names"] == {"0": dataset.modality} and about["file_ending"] == ".nii.gz"
    assert about["labels"] == {"background": 0, **dataset.labels}
    fold = json.loads((folder / "splits_final.json").read_text())[0]
    assert about["numTraining"] == len(fold["train"]) + len(fold["val"])
    for suffix in ("Tr", "Ts"):
        images = {path.name.removesuffix("_0000.nii.gz") for path in folder.glob(f"images{suffix}/*")}
        assert images == {path.name.removesuffix(".nii.gz") for path in folder.glob(f"labels{suffix}/*")}
        if suffix == "Tr":
            assert images == {*fold["train"], *fold["val"]}


@pytest.mark.parametrize("name", TASKS)
def test_every_case_is_fit_to_train_on_and_every_label_is_there(suite, name):
    dataset = TASKS[name]
    seen = {"train": set(), "val": set(), "test": set()}
    for case in list_cases(dataset, suite[0]):
        scan = read_case(dataset, case)
        assert scan.spacing == pytest.approx(dataset.spacing)
        found = set(np.unique(scan.label)) - {0}
        seen[case.split] |= found
        if dataset.role == "finetune":
            assert found == set(dataset.labels.values()), case.id
    assert seen["train"] == seen["val"] == set(dataset.labels.values())


def test_provenance_describes_each_case_and_its_hash_is_of_the_voxels(suite):
    folder = suite[0] / TASKS["abdomen_mr"].folder
    table = pd.read_csv(folder / "provenance.csv")
    assert list(table) == ["case", "split", "person", "kind", "intensities", "how", "source_scan", "note", "sha256"]
    assert not table.isna().any().any()
    assert set(table.intensities[table.split == "test"]) == {"real"} and set(table.intensities[table.split != "test"]) == {"synthetic"}
    assert table.how[table.case == "abdomen_mr_test00"].item().endswith("not deformed")
    for row in table[table.case.isin(["abdomen_mr_train00", "abdomen_mr_test01"])].itertuples():
        suffix = "Ts" if row.split == "test" else "Tr"
        image = nibabel.load(folder / f"images{suffix}/{row.case}_0000.nii.gz").dataobj
        label = nibabel.load(folder / f"labels{suffix}/{row.case}.nii.gz").dataobj
        voxels = np.asarray(image).astype("<i2").tobytes() + np.asarray(label).astype("u1").tobytes()
        assert hashlib.sha256(voxels).hexdigest() == row.sha256


def test_first_test_case_keeps_the_shape_of_the_scan(suite):
    dataset = TASKS["brain_mr"]
    pristine, moved = [c for c in list_cases(dataset, suite[0]) if c.split == "test"]
    seed = read_seed(SEEDS, load_seeds(SEEDS)["mrQ"])
    volume = np.prod(seed.spacing) * (seed.label > 0).sum()
    change = [np.prod(dataset.spacing) * (read_case(dataset, c).label > 0).sum() / volume - 1 for c in (pristine, moved)]
    assert abs(change[0]) < 0.02 < abs(change[1])


def test_failed_build_leaves_what_was_there(tmp_path, monkeypatch):
    build_dataset("brain_mr", SEEDS, tmp_path, cases=(1, 1, 1))
    before = contents(tmp_path)

    def fail(*_, **__):
        raise RuntimeError("disk full")

    monkeypatch.setattr("mednext_v2.study.seeds.write_descriptions", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        build_dataset("brain_mr", SEEDS, tmp_path, cases=(1, 1, 1), seed=1)
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


def test_unknown_task_and_too_few_cases(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'pancreas'"):
        build_dataset("pancreas", SEEDS, tmp_path)
    with pytest.raises(ValueError, match="no scans are set aside for task 'pancreas'"):
        plan_cases("pancreas", (1, 1, 1))
    with pytest.raises(ValueError, match="needs at least one train and one val case"):
        build_dataset("brain_mr", SEEDS, tmp_path, cases=(1, 0, 1))


def test_corpus_mixes_torso_and_head_two_to_one():
    plans = plan_cases("corpus_ct", (12, 2, 0))
    scans = pd.Series([plan.scan for plan in plans if plan.split == "train"]).value_counts()
    assert scans.to_dict() == {"ctA": 8, "ctH": 4}
    assert {plan.scan for plan in plans if plan.split == "val"} == {"ctA", "ctH"}
    assert len({plan.case for plan in plans}) == 14


def ball(size=40, radius=10, centre=(19.5, 19.5, 19.5)):
    distance = np.linalg.norm(np.stack(np.indices((size,) * 3)) - np.reshape(centre, (3, 1, 1, 1)), axis=0)
    label = (distance < radius).astype(np.uint8)
    return LabelledScan(1000 * label.astype(np.int16), label, ("ball",), (3.0, 3.0, 3.0))


def test_deformation_of_strength_zero_only_resamples():
    scan = ball()
    image, label = deform(scan, scan.image, (3, 3, 3), generator(0), amount=0)
    np.testing.assert_array_equal(label, scan.label)
    np.testing.assert_array_equal(image, scan.image)
    image, label = deform(scan, scan.image, (5, 5, 5), generator(0), amount=0)
    assert label.sum() * 5**3 == pytest.approx(scan.label.sum() * 3**3, rel=0.05)
    for values in (label, image):  # The centre at 60 mm
        assert ndimage.center_of_mass(values) == pytest.approx([60 / 5 - 0.5] * 3, abs=0.05)


def test_image_and_label_move_together():
    scan = ball()
    for key in ("a", "b", "c"):
        image, label = deform(scan, scan.image, (3, 3, 3), generator(0, key))
        inside, outside = label == 1, label == 0
        assert np.mean((image > 500) == inside) > 0.995
        assert image[inside].mean() > 900 and image[outside].mean() < 20
        assert not np.array_equal(label, scan.label)


def test_top_keeps_the_upper_end():
    scan = ball(centre=(19.5, 19.5, 35))
    _, label = deform(scan, scan.image, (3, 3, 3), generator(0), amount=0, top=30.0)
    assert label.shape == (40, 40, 10)
    # 120 mm high: the slab is 86 to 116 mm, index 35 lies at 106.5 mm, that is at (106.5 - 86) / 3 - 0.5
    assert ndimage.center_of_mass(label)[2] < (106.5 - 86) / 3 - 0.5 < 10
    assert label[20, 20].sum() == (scan.label[20, 20] > 0)[28:39].sum() - 1


def test_spline_weights_reproduce_straight_lines():
    weights = spline_matrix(20, 3.7)
    nodes = (np.arange(weights.shape[1]) - 1) * 3.7
    np.testing.assert_allclose(weights @ nodes, np.arange(20), atol=1e-9)
    np.testing.assert_allclose(weights.sum(axis=1), 1)


def test_smooth_field_has_unit_variance_and_is_not_the_same_on_all_axes():
    field = smooth_field(generator(0), (30, 20, 10), 5)
    assert field.shape == (30, 20, 10) and field.std() == pytest.approx(1, abs=1e-4)
    for axis in range(3):
        assert 0.05 < np.abs(np.diff(field, axis=axis)).mean() < 0.6


def test_echo_signal_against_the_formula_and_its_limits():
    assert spoiled_echo(500.0, 1e6) == pytest.approx(1)
    assert spoiled_echo(500.0, 100.0, flip=90.0) == pytest.approx(1 - np.exp(-0.2))
    assert spoiled_echo(343.0, 150.0) > spoiled_echo(586.0, 150.0) > spoiled_echo(1441.0, 150.0)


def test_synthesised_mr_is_fat_bright_and_air_is_dark_but_noisy():
    scan = read_seed(SEEDS, load_seeds(SEEDS)["ctA"])
    image = synthesise_mr(scan, generator(0, "mr"), realistic=True)
    fat = (scan.label == 0) & (scan.image > -120) & (scan.image < -80)
    air = ndimage.binary_erosion(scan.image < -900, iterations=4)
    aorta = scan.where(scan.label, "aorta")
    assert np.median(image[fat]) > 1.5 * np.median(image[aorta]) > 2 * np.median(image[air]) > 0
    assert np.mean(image == 0) < 0.01


def test_mr_background_stays_zero():
    image = np.zeros((20, 20, 20), np.float32)
    image[5:15, 5:15, 5:15] = 50
    finished = finish_mr(image, generator(0), (5, 5, 5))
    assert not finished[image == 0].any() and (finished[image > 0] > 100).all()


@pytest.mark.parametrize("key", ["a", "b", "c", "d"])
def test_lesions_stay_in_the_organ_and_change_only_it(key):
    organ = ball().label > 0
    before = np.where(organ, 60.0, -1000.0)
    image, mask = add_ct_lesions(before, organ, HEAD_BLEED, (3, 3, 3), generator(0, key))
    assert mask.any() and not mask[~organ].any()
    np.testing.assert_array_equal(image[~organ], before[~organ])
    assert image[mask].mean() > image[organ & ~mask].mean() + 15


def test_core_lies_in_the_oedema():
    organ = ball(radius=18).label > 0
    image, label = add_mr_lesions(np.where(organ, 100.0, 0.0), organ, BRAIN_LESION, (3, 3, 3), generator(0, "mr"))
    assert set(np.unique(label)) == {0, 1, 2} and not label[~organ].any()
    shell = ndimage.binary_dilation(label == 2) & (label != 2) & ndimage.binary_erosion(organ)
    assert np.mean(label[shell] == 1) > 0.9
    assert image[label == 1].mean() < 0.9 * image[organ & (label == 0)].mean()
