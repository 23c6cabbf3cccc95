"Registry and raw folders: every rule of a task can be broken, and every unfit file is refused with its name"

import dataclasses
import json
import shutil

import nibabel
import numpy as np
import pytest
from data_toys import DEMO

from mednext_v2.tasks import (
    Task,
    get_task,
    list_cases,
    load_tasks,
    read_case,
    read_volume,
    write_volume,
)

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
        ("dataset", "901", "from 1 to 999"),
        ("title", " ", "not be empty"),
        ("modality", "PET", "one of CT, MR"),
        ("role", "train", "one of pretrain, finetune"),
        ("labels", {}, "at least one"),
        ("labels", {"liver": 1, "lesion": 3}, "without gaps"),
        ("labels", {"liver": 0, "lesion": 1}, "without gaps"),
        ("labels", {"liver": 1, "lesion": 1}, "without gaps"),
        ("labels", {"liver": 1, "lesion": "2"}, "without gaps"),
        ("groups", {"liver": "organ"}, "no group for lesion"),
        ("groups", {"liver": "organ", "lesion": "tumour"}, "organ, pathology"),
        ("groups", {"liver": "organ", "lesion": "pathology", "x": "organ"}, "x is not in labels"),
        ("spacing", [5.0, 5.0], "three positive lengths"),
        ("spacing", [5.0, 5.0, 0.0], "three positive lengths"),
        ("patch", [32, 32, 1.5], "three positive whole"),
        ("nsd_tolerance", -1.0, "a positive length"),
    ],
)
def test_broken_rule_names_data_set_field_and_rule(tmp_path, field, value, rule):
    with pytest.raises(ValueError) as error:
        load_tasks(write_registry(tmp_path, **{field: value}))
    message = str(error.value)
    assert "'demo'" in message and field in message and rule in message and "\n" not in message


def test_unknown_and_missing_fields_are_named(tmp_path):
    with pytest.raises(ValueError, match="data set 'demo': Task has no 'lables'"):
        load_tasks(write_registry(tmp_path, lables={}))
    path = write_registry(tmp_path)
    entry = json.loads(path.read_text())
    del entry["demo"]["licence"]
    path.write_text(json.dumps(entry))
    with pytest.raises(ValueError, match="data set 'demo': Task needs 'licence'"):
        load_tasks(path)


def test_two_data_sets_with_one_number(tmp_path):
    path = write_registry(tmp_path)
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"other": entry["demo"]}))
    with pytest.raises(ValueError, match="demo, other share dataset 7"):
        load_tasks(path)


def test_task_survives_json():
    assert Task(**json.loads(json.dumps(dataclasses.asdict(DEMO)))) == DEMO


def test_registry_holds_the_seven_tasks_with_consistent_groups():
    tasks = load_tasks()
    assert {name: task.dataset for name, task in tasks.items()}.items() >= {
        "corpus_ct": 900,
        "abdomen_ct": 901,
        "liver_lesion_ct": 902,
        "head_bleed_ct": 903,
        "brain_mr": 904,
        "abdomen_mr": 905,
        "brain_lesion_mr": 906,
    }.items()
    # One word, one meaning: a label of the same name is in the same group everywhere
    for task in tasks.values():
        for label, group in task.groups.items():
            assert all(group == other.groups.get(label, group) for other in tasks.values())
    with pytest.raises(ValueError, match="unknown task 'pancreas'; known: corpus_ct"):
        get_task("pancreas")


@pytest.mark.parametrize("codes", ["LAS", "PIR", "SAR", "LPI"])
def test_any_orientation_reads_as_ras(tmp_path, codes):
    ras = nibabel.Nifti1Image(IMAGE, AFFINE)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(AFFINE), nibabel.orientations.axcodes2ornt(codes)
    )
    nibabel.save(ras.as_reoriented(turn), tmp_path / "turned.nii.gz")
    volume = read_volume(tmp_path / "turned.nii.gz")
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
    assert [(case.id, case.split) for case in list_cases(DEMO, raw)] == [
        ("one", "train"),
        ("two", "val"),
        ("three", "test"),
    ]


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
        (spoil_shape, r"one_0000.nii.gz has shape \(5, 7, 8\), one.nii.gz has \(6, 7, 8\)"),
        (spoil_affine, r"one_0000.nii.gz and one.nii.gz lie on different grids .* 1.5\)"),
        (spoil_nan, r"one_0000.nii.gz has 1 voxels that are NaN or infinite, the first at \(2, 3, 4\)"),
        (spoil_inf, r"one_0000.nii.gz has 2 voxels that are NaN or infinite, the first at \(0, 0, 0\)"),
        (spoil_value, r"one.nii.gz has label 7, but demo declares 0 to 2"),
        (spoil_fraction, r"one.nii.gz has label 0.5, but demo declares 0 to 2"),
        (spoil_label_nan, r"one.nii.gz has 1 voxels that are NaN"),
        (spoil_dimensions, r"one_0000.nii.gz has shape \(6, 7, 8, 2\): one 3D volume"),
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
    with pytest.raises(ValueError, match="one_0000.nii.gz cannot be read .*replace it"):
        read_volume(path)


def test_text_is_not_a_volume(tmp_path):
    (tmp_path / "scan.nii.gz").write_text("see attachment")
    with pytest.raises(ValueError, match="scan.nii.gz cannot be read"):
        read_volume(tmp_path / "scan.nii.gz")
    with pytest.raises(FileNotFoundError, match="none.nii.gz is missing"):
        read_volume(tmp_path / "none.nii.gz")


def test_channels_are_stacked_in_order(raw):
    task = dataclasses.replace(DEMO, channels=("native", "contrast"))
    for case, suffix in (("one", "Tr"), ("two", "Tr"), ("three", "Ts")):
        write_volume(raw / DEMO.folder / f"images{suffix}/{case}_0001.nii.gz", IMAGE + 1000, AFFINE)
    scan = read_case(task, list_cases(task, raw)[0])
    np.testing.assert_allclose(scan.image, [IMAGE, IMAGE + 1000])
    (raw / DEMO.folder / "imagesTr/one_0001.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="one_0001.nii.gz is missing"):
        list_cases(task, raw)


def test_a_test_case_is_listed_once_with_two_channels(raw):
    task = dataclasses.replace(DEMO, channels=("native", "contrast"))
    for case, suffix in (("one", "Tr"), ("two", "Tr"), ("three", "Ts")):
        write_volume(raw / DEMO.folder / f"images{suffix}/{case}_0001.nii.gz", IMAGE, AFFINE)
    assert [case.id for case in list_cases(task, raw) if case.split == "test"] == ["three"]


def test_modules_start_without_torch():
    import subprocess
    import sys

    code = (
        "import sys, mednext_v2.tasks, mednext_v2.suite, mednext_v2.prepare;"
        "print({'torch', 'monai', 'matplotlib'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
