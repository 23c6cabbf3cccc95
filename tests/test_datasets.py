"Registry and raw folders: every rule of a task can be broken, and every unfit file is refused with its name"

import dataclasses
import json
import shutil

import nibabel
import numpy as np
import pytest

from data_toys import DEMO
from mednext_v2.data.datasets import (
    Dataset,
    data_files,
    get_dataset,
    list_cases,
    load_datasets,
    make_fold,
    plan_spacing,
    raw_dataset,
    read_case,
    read_grids,
    write_description,
)
from mednext_v2.data.scans import BadFile, present_values, read_scan, write_volume

AFFINE = np.array([[2.0, 0, 0, -10], [0, 3.0, 0, 20], [0, 0, 4.0, 30], [0, 0, 0, 1]])
IMAGE = np.random.default_rng(0).normal(0, 100, (6, 7, 8)).astype(np.float32)
LABEL = np.random.default_rng(1).integers(0, 3, (6, 7, 8)).astype(np.uint8)


@pytest.fixture
def raw(tmp_path):
    "A raw folder with one case in each split"
    folder = tmp_path / DEMO.folder
    for case, suffix in (("one", "Tr"), ("two", "Tr"), ("three", "Ts")):
        write_volume(folder / f"images{suffix}/{case}_0000.nii.gz", IMAGE, AFFINE)
        write_volume(folder / f"labels{suffix}/{case}.nii.gz", LABEL, AFFINE)
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["one"], "val": ["two"]}]))
    return tmp_path


def write_registry(folder, **changes):
    entry = {k: v for k, v in dataclasses.asdict(DEMO).items() if k != "name"} | changes
    (folder / "datasets.yaml").write_text(json.dumps({"demo": entry}))  # JSON is YAML
    return folder / "datasets.yaml"


@pytest.mark.parametrize(
    "field, value, rule",
    [
        ("dataset", 0, "from 1 to 999"),
        ("dataset", "901", "must be a whole number, got '901'"),
        ("title", " ", "not be empty"),
        ("modality", "PET", "one of CT, MR"),
        ("role", "train", "one of pretrain, finetune"),
        ("labels", {}, "at least one"),
        ("labels", {"liver": 1, "lesion": 3}, "without gaps"),
        ("labels", {"liver": 0, "lesion": 1}, "without gaps"),
        ("labels", {"liver": 1, "lesion": 1}, "without gaps"),
        ("labels", {"liver": 1, "lesion": "2"}, "must be a mapping of text to whole numbers"),
        ("groups", {"liver": "organ"}, "no group for lesion"),
        ("groups", {"liver": "organ", "lesion": "tumour"}, "organ, pathology"),
        ("groups", {"liver": "organ", "lesion": "pathology", "x": "organ"}, "x is not in labels"),
        ("spacing", [5.0, 5.0], "must be a list of 3 numbers, got (5.0, 5.0)"),
        ("spacing", [5.0, 5.0, 0.0], "three positive lengths"),
        ("patch", [32, 32, 1.5], "must be a list of 3 whole numbers"),
        ("nsd_tolerance", -1.0, "a positive length"),
    ],
)
def test_broken_rule_names_data_set_field_and_rule(tmp_path, field, value, rule):
    with pytest.raises(ValueError) as error:
        load_datasets(write_registry(tmp_path, **{field: value}))
    message = str(error.value)
    assert "'demo'" in message and field in message and rule in message and "\n" not in message


def test_unknown_and_missing_fields_are_named(tmp_path):
    with pytest.raises(ValueError, match="data set 'demo': Dataset has no 'lables'"):
        load_datasets(write_registry(tmp_path, lables={}))
    path = write_registry(tmp_path)
    entry = json.loads(path.read_text())
    del entry["demo"]["licence"]
    path.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="data set 'demo': Dataset needs 'licence'"):
        load_datasets(path)


def test_two_data_sets_with_one_number(tmp_path):
    path = write_registry(tmp_path)
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"other": entry["demo"]}))
    with pytest.raises(ValueError, match="demo, other share dataset 7"):
        load_datasets(path)


def test_task_survives_json():
    assert Dataset(**json.loads(json.dumps(dataclasses.asdict(DEMO)))) == DEMO


def test_registry_holds_the_seven_tasks_with_consistent_groups():
    datasets = load_datasets()
    assert {name: dataset.dataset for name, dataset in datasets.items()}.items() >= {
        "corpus_ct": 900,
        "abdomen_ct": 901,
        "liver_lesion_ct": 902,
        "head_bleed_ct": 903,
        "brain_mr": 904,
        "abdomen_mr": 905,
        "brain_lesion_mr": 906,
    }.items()
    # One word, one meaning: a label of the same name is in the same group everywhere
    for dataset in datasets.values():
        for label, group in dataset.groups.items():
            assert all(group == other.groups.get(label, group) for other in datasets.values())
    with pytest.raises(ValueError, match="unknown data set 'pancreas'; known: corpus_ct"):
        get_dataset("pancreas")


@pytest.mark.parametrize("codes", ["LAS", "PIR", "SAR", "LPI"])
def test_any_orientation_reads_as_ras(tmp_path, codes):
    ras = nibabel.Nifti1Image(IMAGE, AFFINE)
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(AFFINE), nibabel.orientations.axcodes2ornt(codes))
    nibabel.save(ras.as_reoriented(turn), tmp_path / "turned.nii.gz")
    volume = read_scan(tmp_path / "turned.nii.gz")
    np.testing.assert_array_equal(volume.voxels, IMAGE)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert volume.voxels.flags.c_contiguous and volume.spacing == pytest.approx((2, 3, 4))


def test_written_volume_is_plain_nifti_without_time_or_name(tmp_path):
    write_volume(tmp_path / "a.nii.gz", IMAGE, AFFINE)
    write_volume(tmp_path / "b.nii.gz", IMAGE, AFFINE)
    data = (tmp_path / "a.nii.gz").read_bytes()
    assert data == (tmp_path / "b.nii.gz").read_bytes()
    assert data[4:8] == bytes(4) and not data[3] & 0x08  # gzip's time and file name
    image = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(image.get_fdata(), IMAGE)
    assert image.header.get_xyzt_units()[0] == "mm"


def test_cases_are_listed_by_split(raw):
    assert [(case.id, case.split) for case in list_cases(DEMO, raw)] == [("one", "train"), ("two", "val"), ("three", "test")]


@pytest.mark.parametrize("lost", ["imagesTr/one_0000", "labelsTr/two", "imagesTs/three_0000", "labelsTs/three"])
def test_missing_file_is_named(raw, lost):
    (raw / DEMO.folder / f"{lost}.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=f"{lost}.nii.gz is missing: restore it"):
        list_cases(DEMO, raw)


@pytest.mark.parametrize(
    "splits, rule",
    [
        ([{"train": [], "val": ["two"]}], "the train split of demo is empty"),
        ([{"train": ["one"], "val": []}], "the val split of demo is empty"),
        ([{"train": ["one", "three"], "val": ["two"]}], "three is in train and in test"),
        ([{"train": ["one", "two"], "val": ["two"]}], "two is in train and in val"),
        ([], "not a list of folds"),
        ({"train": ["one"]}, "not a list of folds"),
    ],
)
def test_bad_splits_are_refused(raw, splits, rule):
    (raw / DEMO.folder / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match=rule) as error:
        list_cases(DEMO, raw)
    assert "splits_final.json" in str(error.value)


def test_empty_test_split_is_refused_only_where_a_test_is_due(raw):
    for folder in ("imagesTs", "labelsTs"):
        shutil.rmtree(raw / DEMO.folder / folder)
    with pytest.raises(ValueError, match="the test split of demo is empty"):
        list_cases(DEMO, raw)
    assert len(list_cases(dataclasses.replace(DEMO, role="pretrain"), raw)) == 2


def spoil_shape(image, label, affine):
    return image[1:], label, affine, affine


def spoil_affine(image, label, affine):
    moved = affine.copy()
    moved[0, 3] += 1.5
    return image, label, moved, affine


def spoil_nan(image, label, affine):
    image = image.copy()
    image[2, 3, 4] = np.nan
    return image, label, affine, affine


def spoil_inf(image, label, affine):
    image = image.copy()
    image[:2, 0, 0] = -np.inf
    return image, label, affine, affine


def spoil_value(image, label, affine):
    return image, np.where(label == 2, 7, label).astype(np.uint8), affine, affine


def spoil_fraction(image, label, affine):
    return image, (label / 2).astype(np.float32), affine, affine


def spoil_label_nan(image, label, affine):
    label = label.astype(np.float32)
    label[0, 0, 0] = np.nan
    return image, label, affine, affine


def spoil_dimensions(image, label, affine):
    return np.stack([image, image], axis=-1), label, affine, affine


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_shape, r"one_0000.nii.gz has the shape \(5, 7, 8\), one.nii.gz has \(6, 7, 8\)"),
        (spoil_affine, r"one_0000.nii.gz lies on another grid than one.nii.gz, corners up to 1.5 mm apart"),
        (spoil_nan, r"one_0000.nii.gz has 1 voxels that are NaN or infinite, the first at \(2, 3, 4\)"),
        (spoil_inf, r"one_0000.nii.gz has 2 voxels that are NaN or infinite, the first at \(0, 0, 0\)"),
        (spoil_value, r"one.nii.gz has label 7, but demo declares 0 to 2"),
        (spoil_fraction, r"one.nii.gz has label 0.5, which is not a whole number, in \d+ voxels"),
        (spoil_label_nan, r"one.nii.gz has 1 voxels that are NaN"),
        (spoil_dimensions, r"one_0000.nii.gz has the shape \(6, 7, 8, 2\): store one 3D volume"),
    ],
)
def test_unfit_case_is_refused(raw, spoil, message):
    case = list_cases(DEMO, raw)[0]
    image, label, image_affine, label_affine = spoil(IMAGE, LABEL, AFFINE)
    write_volume(case.images[0], image, image_affine)
    write_volume(case.label, label, label_affine)
    with pytest.raises(ValueError, match=message) as error:
        read_case(DEMO, case)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 3, 40, -200])
def test_truncated_file_is_refused(raw, keep):
    path = list_cases(DEMO, raw)[0].images[0]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadFile, match="one_0000.nii.gz (has 0 bytes|is not NIfTI|ends|lacks|has the magic).*: (copy|replace)"):
        read_scan(path)


def test_text_is_not_a_volume(tmp_path):
    (tmp_path / "scan.nii.gz").write_text("see attachment")
    with pytest.raises(BadFile, match="scan.nii.gz is not NIfTI"):
        read_scan(tmp_path / "scan.nii.gz")
    with pytest.raises(FileNotFoundError, match="none.nii.gz is missing"):
        read_scan(tmp_path / "none.nii.gz")


def test_channels_are_stacked_in_order(raw):
    dataset = dataclasses.replace(DEMO, channels=("native", "contrast"))
    for case, suffix in (("one", "Tr"), ("two", "Tr"), ("three", "Ts")):
        write_volume(raw / DEMO.folder / f"images{suffix}/{case}_0001.nii.gz", IMAGE + 1000, AFFINE)
    scan = read_case(dataset, list_cases(dataset, raw)[0])
    np.testing.assert_allclose(scan.image, [IMAGE, IMAGE + 1000])
    (raw / DEMO.folder / "imagesTr/one_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="one_0001.nii.gz is missing"):
        list_cases(dataset, raw)


def test_a_test_case_is_listed_once_with_two_channels(raw):
    dataset = dataclasses.replace(DEMO, channels=("native", "contrast"))
    for case, suffix in (("one", "Tr"), ("two", "Tr"), ("three", "Ts")):
        write_volume(raw / DEMO.folder / f"images{suffix}/{case}_0001.nii.gz", IMAGE, AFFINE)
    assert [case.id for case in list_cases(dataset, raw) if case.split == "test"] == ["three"]


def test_modules_start_without_torch():
    import subprocess
    import sys

    code = "import sys, mednext_v2.data.datasets, mednext_v2.study.seeds, mednext_v2.data.preprocess;print({'torch', 'monai', 'matplotlib'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


# Any raw folder in nnU-Net's layout


def write_raw(folder, description, ids, label, channels=1, ending=".nii.gz"):
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(description | {"file_ending": ending}))
    for case in ids:
        for channel in range(channels):
            write_volume(folder / f"imagesTr/{case}_{channel:04d}{ending}", IMAGE, AFFINE)
        write_volume(folder / f"labelsTr/{case}{ending}", label, AFFINE)


BRATS = {
    "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"},
    "labels": {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]},
    "regions_class_order": [1, 2, 3],
    "numTraining": 10,
}


def test_regions_channels_and_class_order_come_from_dataset_json(tmp_path):
    label = np.random.default_rng(2).integers(0, 4, IMAGE.shape).astype(np.uint8)
    ids = [f"p{i:02d}" for i in range(10)]
    write_raw(tmp_path / "Dataset137_BraTS2021", BRATS, ids, label, channels=4)
    dataset = raw_dataset(tmp_path / "Dataset137_BraTS2021")
    assert dataset.channels == ("T1", "T1ce", "T2", "Flair") and dataset.modality == "MR"
    assert dataset.regions == {"whole tumor": (1, 2, 3), "tumor core": (2, 3), "enhancing tumor": (3,)}
    assert dataset.class_order == (1, 2, 3) and dataset.num_classes == 3 and dataset.values == (0, 1, 2, 3)
    assert dataset.labels == {"value 1": 1, "value 2": 2, "enhancing tumor": 3}
    assert dataset.folder == "Dataset137_BraTS2021" and dataset.spacing == pytest.approx((2, 3, 4))
    cases = list_cases(dataset, tmp_path)
    assert [sum(case.split == split for case in cases) for split in ("train", "val", "test")] == [7, 1, 2]
    assert read_case(dataset, cases[0]).image.shape == (4, *IMAGE.shape)


def test_description_written_here_reads_the_same(tmp_path):
    dataset = Dataset(
        **(
            dataclasses.asdict(DEMO)
            | {
                "regions": {"both": [1, 2], "lesion": 2},
                "ignore": 3,
                "groups": {"liver": "organ", "lesion": "pathology", "both": "organ"},
                "channels": ["CT", "PET"],
            }
        )
    )
    write_raw(tmp_path / dataset.folder, {}, ["a", "b", "c"], LABEL, channels=2)
    write_description(dataset, tmp_path / dataset.folder, training=3)
    found = raw_dataset(tmp_path / dataset.folder)
    same = ("regions", "class_order", "ignore", "channels", "modality", "folder", "num_classes", "values", "name")
    assert {name: getattr(found, name) for name in same} == {name: getattr(dataset, name) for name in same}
    assert found.groups["lesion"] == "pathology" and found.groups["both"] == "organ"
    # Plain labels, and an ignore label beside them
    plain = dataclasses.replace(DEMO, ignore=3)
    write_description(plain, tmp_path / dataset.folder, training=3)
    found = raw_dataset(tmp_path / dataset.folder, spacing=(1, 1, 1))
    assert (found.labels, found.groups, found.ignore) == (plain.labels, plain.groups, 3) and not found.regions


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": {"background": 0, "liver": 1, "lesion": 3}}, "without gaps"),
        ({"labels": {"background": 0, "whole": [1, 2], "core": [2]}}, "labels must be a mapping of text to whole"),  # Regions need a class order
        ({"labels": {"background": 0, "liver": 1, "ignore": 5}}, "ignore"),
        ({"channel_names": {}}, "lacks 'channel_names'"),
        ({"labels": []}, "lacks 'labels'"),
    ],
)
def test_bad_description_is_refused_by_name(tmp_path, change, message):
    good = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "lesion": 2}}
    write_raw(tmp_path / "Dataset001_A", good | change, ["a"], LABEL)
    with pytest.raises(ValueError, match=message) as error:
        raw_dataset(tmp_path / "Dataset001_A")
    assert "dataset.json" in str(error.value)


def test_unknown_endings_and_folder_names(tmp_path):
    write_raw(tmp_path / "Dataset001_A", BRATS, ["a"], LABEL)
    with pytest.raises(ValueError, match="file_ending '.png': convert"):
        (tmp_path / "Dataset001_A/dataset.json").write_text(json.dumps(BRATS | {"file_ending": ".png"}))
        raw_dataset(tmp_path / "Dataset001_A")
    with pytest.raises(ValueError, match="not named DatasetNNN_Name"):
        raw_dataset(tmp_path)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_metaimage_and_nrrd_lie_where_itk_says(tmp_path, ending, codes):
    itk = pytest.importorskip("SimpleITK")
    write_volume(tmp_path / "a.nii.gz", IMAGE, AFFINE)
    image = itk.DICOMOrient(itk.ReadImage(str(tmp_path / "a.nii.gz")), codes)
    itk.WriteImage(image, str(tmp_path / f"a{ending}"))
    volume = read_scan(tmp_path / f"a{ending}")
    np.testing.assert_allclose(volume.voxels, IMAGE)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    (tmp_path / f"half{ending}").write_bytes((tmp_path / f"a{ending}").read_bytes()[:300])
    with pytest.raises(ValueError, match=f"half{ending} "):
        read_scan(tmp_path / f"half{ending}")


def test_five_folds_are_those_of_nnunet():
    KFold = pytest.importorskip("sklearn.model_selection").KFold  # As in nnunetv2.utilities.crossval_split
    dataset = dataclasses.replace(DEMO, split="fivefold")
    for n in (5, 13, 52):
        ids = [f"case{i:03d}" for i in range(n)]
        for fold, (rest, tested) in enumerate(KFold(5, shuffle=True, random_state=12345).split(ids)):
            dealt = make_fold(dataset, ids, fold=fold)
            assert dealt["test"] == [ids[i] for i in tested]
            assert sorted(dealt["train"] + dealt["val"]) == [ids[i] for i in rest]
            assert len(dealt["val"]) == max(1, round(n / 20))


@pytest.mark.parametrize("rule", ["fivefold", "holdout"])
def test_a_patient_is_on_one_side(rule):
    dataset = dataclasses.replace(DEMO, split=rule, patient=r"^(patient\d+)_frame")
    ids = [f"patient{i:03d}_frame{f:02d}" for i in range(20) for f in (1, 12)]
    dealt = make_fold(dataset, ids)
    sides = [{id[:10] for id in part} for part in dealt.values()]
    assert sum(len(side) for side in sides) == 20 and sorted(sum(dealt.values(), [])) == ids
    assert dealt == make_fold(dataset, ids[::-1]) | {split: sorted(part) for split, part in dealt.items()}
    with pytest.raises(ValueError, match="case scan7: its patient is not found"):
        make_fold(dataset, [*ids, "scan7"])
    with pytest.raises(ValueError, match="has 2 patients, split"):
        make_fold(dataset, ids[:4])


def test_splits_file_may_name_test_cases_and_unlabelled_tests_are_nobodys(raw):
    folder = raw / DEMO.folder
    shutil.copy(folder / "imagesTr/one_0000.nii.gz", folder / "imagesTr/four_0000.nii.gz")
    shutil.copy(folder / "labelsTr/one.nii.gz", folder / "labelsTr/four.nii.gz")
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["one"], "val": ["two"], "test": ["four"]}]))
    assert [c.id for c in list_cases(DEMO, raw) if c.split == "test"] == ["four", "three"]
    shutil.rmtree(folder / "labelsTs")
    assert [c.id for c in list_cases(DEMO, raw) if c.split == "test"] == ["four"]


def test_spacing_is_planned_as_nnunet_plans_it():
    even = np.full((5, 3), 1.5)
    assert plan_spacing(even, np.full((5, 3), 100)) == (1.5, 1.5, 1.5)
    thick = np.array([[0.8, 0.8, z] for z in (3.0, 5.0, 5.0, 5.0, 6.0)])
    thin_stack = np.tile([512, 512, 60], (5, 1))
    assert plan_spacing(thick, thin_stack) == pytest.approx((0.8, 0.8, np.percentile(thick[:, 2], 10)))
    assert plan_spacing(thick, np.tile([512, 512, 400], (5, 1))) == (0.8, 0.8, 5.0)  # Enough slices: the median


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32"])
def test_present_values_are_the_sorted_distinct_ones(dtype):
    voxels = np.random.default_rng(3).choice([0, 3, 7, 100], (5, 6, 7)).astype(dtype)
    voxels = voxels - 3 if dtype == "int16" else voxels
    np.testing.assert_array_equal(present_values(voxels), np.unique(voxels))


# What a raw folder holds besides its data, and what it is called


@pytest.mark.parametrize("name", ["Dataset007_MiniDemoCT", "Dataset007_My Toy", "Dataset007_two  spaces"])
def test_a_folder_keeps_its_name(tmp_path, name):
    write_raw(tmp_path / name, BRATS, ["a", "b", "c"], LABEL, channels=4)
    dataset = raw_dataset(tmp_path / name)
    assert dataset.folder == name and len(list_cases(dataset, tmp_path)) == 3
    assert Dataset(**json.loads(json.dumps(dataclasses.asdict(dataset)))) == dataset


def test_a_folder_name_as_title_has_the_number():
    with pytest.raises(ValueError, match="'demo', title: a folder's name must begin with Dataset007_"):
        dataclasses.replace(DEMO, title="Dataset008_My Toy")


def test_hidden_files_and_notes_are_no_data(raw):
    folder = raw / DEMO.folder
    before, files = list_cases(DEMO, raw), data_files(folder)
    for path in [path for path in folder.rglob("*.nii.gz")]:
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7Mac OS X")
    (folder / ".DS_Store").write_bytes(b"Bud1")
    (folder / "imagesTr/.DS_Store").write_bytes(b"Bud1")
    (folder / "note.txt").write_text("from the clinic")
    assert list_cases(DEMO, raw) == before and data_files(folder) == files
    assert {path.name for path in files} >= {"splits_final.json", "one_0000.nii.gz", "three.nii.gz"}


@pytest.mark.parametrize("extra", ["one_0001.nii.gz", "one_0003.nii.gz", "one_0000.nii"])
def test_a_channel_too_many_or_in_two_formats_is_refused(raw, extra):
    folder = raw / DEMO.folder / "imagesTr"
    write_volume(folder / extra, IMAGE, AFFINE)
    with pytest.raises(BadFile, match=f"one_0000.*{extra}|{extra}.*one_0000") as error:
        list_cases(DEMO, raw)
    assert "\n" not in str(error.value)


def test_two_channels_of_one_name_are_both_what_it_says(tmp_path):
    from mednext_v2.data.preprocess import summarise_cases

    about = {"channel_names": {"0": "CT", "1": "CT", "2": "PET"}, "labels": {"background": 0, "liver": 1, "lesion": 2}}
    write_raw(tmp_path / "Dataset007_Two", about, ["a", "b", "c"], LABEL, channels=3)
    dataset = raw_dataset(tmp_path / "Dataset007_Two")
    measured = {"spacing": (1, 1, 1), "shape": (4, 4, 4), "kept": 1.0, "values": np.arange(9.0).reshape(3, 3)}
    assert dataset.channels == ("CT", "CT", "PET") and summarise_cases(dataset, [measured]).schemes == ("ct", "ct", "zscore")


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint32", "float64"])
def test_values_that_float32_cannot_tell_apart_are_refused(raw, dtype):
    case, fine = list_cases(DEMO, raw)[0], np.arange(IMAGE.size).reshape(IMAGE.shape)
    write_wide(case.images[0], (fine + 1_000_000_000).astype(dtype))
    with pytest.raises(BadFile, match="one_0000.nii.gz has values from 1000000000 to 1000000335, which float32 holds to 64"):
        read_case(DEMO, case)
    write_wide(case.images[0], (fine * 1_000_000).astype(dtype))  # Rounded, and told apart
    np.testing.assert_allclose(read_case(DEMO, case).image[0], fine * 1_000_000)


def write_wide(path, voxels):
    nibabel.save(nibabel.Nifti1Image(voxels, AFFINE, dtype=voxels.dtype), path)


def test_headers_are_read_without_voxels(tmp_path):
    lps = AFFINE * [[-1], [-1], [1], [1]]
    write_volume(tmp_path / "lps.nii.gz", np.random.default_rng(0).integers(-999, 999, (60, 70, 80)).astype(np.int16), lps)
    data = (tmp_path / "lps.nii.gz").read_bytes()
    (tmp_path / "half.nii.gz").write_bytes(data[: len(data) // 2])  # Its header is whole
    spacings, shapes = read_grids([tmp_path / "lps.nii.gz", tmp_path / "half.nii.gz"])
    np.testing.assert_allclose(spacings, [[2, 3, 4]] * 2)
    assert shapes.tolist() == [[60, 70, 80]] * 2
    (tmp_path / "cut.nii.gz").write_bytes(data[:20])
    with pytest.raises(BadFile, match="cut.nii.gz ends within the header"):
        read_grids([tmp_path / "cut.nii.gz"])
