"""Converters on small data sets in the published forms: every voxel in its place, and every fault named."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from hashlib import sha256
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from data_toys_convert import CADS_SIZES, SHAPE, WRITERS, blobs, cads_parts, noise, put, put_knee, put_parts, put_slices
from data_toys_dicom import turned_affine
from mednext_v2.core import ItemsFailed
from mednext_v2.data.datasets import get_dataset, list_cases, load_datasets, raw_dataset, read_case
from mednext_v2.data.scans import Volume
from mednext_v2.intake.convert import CONVERTERS, convert, merge_parts, options_of, value_table

NAMES = list(WRITERS)
get_dataset = functools.cache(get_dataset)


@pytest.fixture(autouse=True)
def registry_read_once(monkeypatch):
    "The registry is a long file; reading it for every conversion would take most of the time"
    monkeypatch.setattr("mednext_v2.intake.convert.load_datasets", READ_ONCE)


READ_ONCE = functools.cache(load_datasets)


def start(name, tmp_path):
    "A source in the published form, and what it holds"
    source = tmp_path / ("Dataset500_Toy" if name == "raw" else "source")
    source.mkdir()
    return source, WRITERS[name](source)


def run(name, source, tmp_path, **options):
    return convert(name, source, tmp_path / "raw", progress=False, **options)


def folder_of(name, source, tmp_path):
    return tmp_path / "raw" / ("Dataset500_Toy" if name == "raw" else get_dataset(name).folder)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    "Each form converted once: source, what it holds, table, folder, and where that is"

    @functools.cache
    def once(name):
        tmp_path = tmp_path_factory.mktemp(name)
        source, made = start(name, tmp_path)
        return source, made, run(name, source, tmp_path), folder_of(name, source, tmp_path), tmp_path

    return once


def failures(name, source, tmp_path, **options):
    "Reasons by case; the others must be done"
    with pytest.raises(ItemsFailed) as caught:
        run(name, source, tmp_path, **options)
    return caught.value.failures


def check_volume(path, voxels, affine):
    "SimpleITK finds every voxel as it was written at the place where it was written"
    image = sitk.ReadImage(str(path))
    assert sorted(image.GetSize()) == sorted(voxels.shape)
    index = np.indices(voxels.shape).reshape(3, -1).T
    points = nibabel.affines.apply_affine(affine, index) * [-1, -1, 1]
    step = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    found = (points - image.GetOrigin()) @ np.linalg.inv(step).T
    assert np.abs(found - np.rint(found)).max() < 1e-3
    x, y, z = np.rint(found).astype(int).T
    assert len({*zip(x, y, z)}) == voxels.size
    assert (sitk.GetArrayFromImage(image)[z, y, x] == voxels.ravel()).all()


def times(folder):
    return {p: p.stat().st_mtime_ns for p in folder.glob("*T[rs]/*")}


@pytest.mark.parametrize("name", NAMES)
def test_every_voxel_is_in_its_place(name, converted):
    source, made, table, folder, _ = converted(name)
    table = table.set_index("case")
    assert set(table.index) == set(made)
    for id, case in made.items():
        split = table.split[id]
        if case.split == "excluded":
            assert split == "excluded" and not [*folder.glob(f"*/{id}*")]
            continue
        assert split == case.split or (name == "cads" and split == "val")
        part = "Ts" if split == "test" else "Tr"
        for channel, voxels in enumerate(case.images):
            path = folder / f"images{part}" / f"{id}_{channel:04d}.nii.gz"
            check_volume(path, voxels, case.affine)
            assert name == "raw" or nibabel.aff2axcodes(nibabel.load(path).affine) == ("R", "A", "S")
        label = folder / f"labels{part}" / f"{id}.nii.gz"
        assert label.exists() == (case.label is not None)
        if case.label is not None:
            check_volume(label, case.label, case.affine)
        if case.patient:
            assert table.patient[id] == case.patient
    images = [*folder.glob("imagesTr/*_0000.nii.gz")]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == len(images)


@pytest.mark.parametrize("name", NAMES)
def test_provenance_names_sources_and_digests(name, converted):
    source, made, table, folder, _ = converted(name)
    assert (folder / "provenance.csv").read_text().count("\n") == len(table) + 1
    for row in table.to_dict("records"):
        for name in row["files"].split(";"):
            assert (source / name.removesuffix("/*")).exists(), name
        if row["split"] == "excluded":
            continue
        part = "Ts" if row["split"] == "test" else "Tr"
        images = sorted(folder.glob(f"images{part}/{row['case']}_????.nii.gz"))
        assert row["sha256"].split(";") == [sha256(p.read_bytes()).hexdigest() for p in images]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_folder_is_told_what_was_expected(name, tmp_path):
    source = tmp_path / "wrong"
    (source / "holiday").mkdir(parents=True)
    (source / "notes.txt").write_text("x")
    with pytest.raises(ValueError) as caught:
        run(name, source, tmp_path)
    message = str(caught.value)
    assert CONVERTERS[name].layout in message and str(source) in message
    assert "found holiday, notes.txt" in message
    assert not (tmp_path / "raw").exists()


def labelled(name, made):
    "A case to damage that is not the first"
    return [id for id, case in made.items() if case.label_path and case.split != "excluded"][-1]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "skm_tea"])
def test_a_missing_label_is_named_and_the_others_are_done(name, tmp_path):
    source, made = start(name, tmp_path)
    id = labelled(name, made)
    path = made[id].label_path
    if name == "acdc":  # Where test labels are absent, a test case simply has none
        id, path = "patient002_frame09", made["patient002_frame09"].label_path
    if name == "pediatric_ct_seg":
        shutil.rmtree(path.parent)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    reasons = failures(name, source, tmp_path)
    assert list(reasons) == [id]
    assert path.name in reasons[id] or "RTSTRUCT of" in reasons[id]
    folder = folder_of(name, source, tmp_path)
    done = {p.name.removesuffix(".nii.gz").rpartition("_")[0] for p in folder.glob("imagesT?/*.nii.gz")}
    assert done == {i for i, case in made.items() if case.split != "excluded"} - {id}
    assert not (folder / "dataset.json").exists()
    run(name, source, tmp_path, skip=(id,))
    assert (folder / "dataset.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_file_is_named_and_the_others_are_done(name, tmp_path):
    source, made = start(name, tmp_path)
    id = [i for i, case in made.items() if case.split != "excluded"][1]
    path = made[id].image_path
    path.write_bytes(path.read_bytes()[:-100])
    reasons = failures(name, source, tmp_path)
    assert list(reasons) == [id] and str(path) in reasons[id]
    folder = folder_of(name, source, tmp_path)
    assert not [*folder.glob(f"*T?/{id}[_.]*")]
    provenance = (folder / "provenance.csv").read_text()
    assert sum(line.startswith(f"{i},") for i in made for line in provenance.splitlines()) == len(made) - 1


@pytest.mark.parametrize("name", NAMES)
def test_an_undeclared_value_is_named(name, tmp_path):
    source, made = start(name, tmp_path)
    id = [i for i, case in made.items() if case.spoil and case.split != "excluded"][-1]
    made[id].spoil()
    reasons = failures(name, source, tmp_path)
    assert list(reasons) == [id]
    words = ("is not declared", "the table of names lacks", "has label 10, but group 557 has 0-9")
    assert any(word in reasons[id] for word in words), reasons[id]


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_writes_nothing(name, converted):
    source, made, first, folder, tmp_path = converted(name)
    before = times(folder)
    texts = {p.name: p.read_bytes() for p in folder.glob("*.*") if p.is_file()}
    second = run(name, source, tmp_path)
    assert times(folder) == before and len(before) >= len(made)
    assert {p.name: p.read_bytes() for p in folder.glob("*.*") if p.is_file()} == texts
    assert first.equals(second)


def test_a_changed_source_is_converted_again_alone(tmp_path):
    source, made = start("kits", tmp_path)
    run("kits", source, tmp_path)
    folder = folder_of("kits", source, tmp_path)
    before = times(folder)
    put(made["case_00001"].image_path, noise(77), made["case_00001"].affine)
    run("kits", source, tmp_path)
    assert {p.name[:10] for p, t in times(folder).items() if before[p] != t} == {"case_00001"}
    check_volume(folder / "imagesTr/case_00001_0000.nii.gz", noise(77), made["case_00001"].affine)
    (folder / "labelsTr/case_00000.nii.gz").write_bytes(b"half")
    run("kits", source, tmp_path)
    check_volume(folder / "labelsTr/case_00000.nii.gz", made["case_00000"].label, made["case_00000"].affine)


def test_cases_that_are_gone_do_not_stay(tmp_path):
    source, made = start("kits", tmp_path)
    run("kits", source, tmp_path)
    folder = folder_of("kits", source, tmp_path)
    shutil.rmtree(made["case_00400"].image_path.parent)
    assert len(run("kits", source, tmp_path)) == 2
    assert not [*folder.glob("*/case_00400*")]
    (folder / "imagesTr" / "stranger_0000.nii.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="1 files .* did not make, as imagesTr/stranger_0000.nii.gz"):
        run("kits", source, tmp_path)


@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_a_case_that_fails_now_leaves_nothing_of_before(tmp_path, fault):
    source, made = start("kits", tmp_path)
    run("kits", source, tmp_path)
    folder = folder_of("kits", source, tmp_path)
    path = made["case_00001"].label_path
    path.write_bytes(path.read_bytes()[:-50]) if fault == "truncated" else path.unlink()
    assert list(failures("kits", source, tmp_path)) == ["case_00001"]
    assert not [*folder.glob("*/case_00001*")] and not (folder / "dataset.json").exists()
    assert len([*folder.glob("labelsTr/*")]) == 2


KILLED = """
import sys, time
import mednext_v2.intake.convert as convert
write = convert.write_volume
def slow(path, voxels, affine):
    (path.parent / ".tmp-left.nii.gz").parent.mkdir(parents=True, exist_ok=True)
    (path.parent / ".tmp-left.nii.gz").write_bytes(b"half")
    time.sleep(0.4)
    write(path, voxels, affine)
convert.write_volume = slow
convert.convert("kits", sys.argv[1], sys.argv[2], progress=False)
"""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    source, made = start("kits", tmp_path)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(tmp_path / "raw")])
    folder = folder_of("kits", source, tmp_path)
    end = time.time() + 60
    while not [*folder.glob(".convert/*.json")] and time.time() < end and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = [p.stem for p in folder.glob(".convert/*.json")]
    assert 1 <= len(done) < 3 and not (folder / "dataset.json").exists()
    before = {p: t for p, t in times(folder).items() if any(p.name.startswith(id) for id in done)}
    run("kits", source, tmp_path)
    assert {p: t for p, t in times(folder).items() if p in before} == before
    for id, case in made.items():
        check_volume(folder / f"labelsTr/{id}.nii.gz", case.label, case.affine)
    assert not [*folder.rglob(".tmp-*")]


def test_processes_give_the_same_files(tmp_path):
    source, _ = start("ctspine1k", tmp_path)
    one = convert("ctspine1k", source, tmp_path / "one", progress=False)
    two = convert("ctspine1k", source, tmp_path / "two", workers=2, progress=False)
    assert one.equals(two)


# What is checked at every conversion


def test_a_small_shift_is_taken_back_and_noted(tmp_path):
    source, made = start("kits", tmp_path)
    case = made["case_00001"]
    moved = case.affine.copy()
    moved[:3, 3] += [0.004, 0, 0.003]
    put(case.label_path, case.label.astype(np.uint8), moved)
    table = run("kits", source, tmp_path).set_index("case")
    assert table.warnings["case_00001"] == "segmentation.nii.gz moved by 0.005 mm onto the image"
    folder = folder_of("kits", source, tmp_path)
    files = [folder / "imagesTr/case_00001_0000.nii.gz", folder / "labelsTr/case_00001.nii.gz"]
    assert np.array_equal(*(nibabel.load(path).affine for path in files))


def test_a_large_shift_names_both_files(tmp_path):
    source, made = start("kits", tmp_path)
    case = made["case_00001"]
    turned = case.affine.copy()
    turned[0, 0] *= 1.03  # The corner moves by 0.15 mm, no entry by more than 0.03
    put(case.label_path, case.label.astype(np.uint8), turned)
    reason = failures("kits", source, tmp_path)["case_00001"]
    assert str(case.label_path) in reason and str(case.image_path) in reason and "0.15 mm apart" in reason
    assert len(run("kits", source, tmp_path, tolerance=0.2)) == 3


def test_other_shapes_and_nan_are_named(tmp_path):
    source, made = start("kits", tmp_path)
    one, two = made["case_00000"], made["case_00001"]
    put(one.label_path, one.label.astype(np.uint8)[:, :, 1:], one.affine)
    bad = noise(1).astype(np.float32)
    bad[2, 3, 4] = np.nan
    put(two.image_path, bad, two.affine)
    reasons = failures("kits", source, tmp_path)
    assert "(6, 7, 7)" in reasons["case_00000"] and "(6, 7, 8)" in reasons["case_00000"]
    assert str(two.image_path) in reasons["case_00001"] and "NaN" in reasons["case_00001"]


def test_fractions_in_a_label_are_no_values(tmp_path):
    source, made = start("kits", tmp_path)
    case = made["case_00000"]
    put(case.label_path, case.label.astype(np.float32) + 0.5, case.affine)
    assert "has label 0.5" in failures("kits", source, tmp_path)["case_00000"]
    put(case.label_path, case.label.astype(np.float64), case.affine)  # Whole numbers stored as floats are
    run("kits", source, tmp_path)
    path = folder_of("kits", source, tmp_path) / "labelsTr/case_00000.nii.gz"
    check_volume(path, case.label, case.affine)
    assert nibabel.load(path).get_data_dtype() == np.uint8


def test_links_out_of_the_source_are_refused(tmp_path):
    source, made = start("kits", tmp_path)
    case = made["case_00001"]
    outside = tmp_path / "secret.nii.gz"
    case.image_path.rename(outside)
    case.image_path.symlink_to(outside)
    folder = made["case_00400"].image_path.parent
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    reasons = failures("kits", source, tmp_path)
    assert set(reasons) == {"case_00001", "case_00400"}
    assert all("link to a place outside" in reason for reason in reasons.values())


def test_links_within_the_source_are_followed(tmp_path):
    source, made = start("kits", tmp_path)
    case = made["case_00001"]
    case.image_path.rename(source / "blob")
    put(source / "store.nii.gz", case.images[0], case.affine)
    case.image_path.symlink_to(source / "store.nii.gz")
    assert len(run("kits", source, tmp_path)) == 3


def test_options_names_and_skips_that_do_not_exist(tmp_path):
    source, _ = start("kits", tmp_path)
    with pytest.raises(ValueError, match="converter kits has no option test_list; it has: none"):
        run("kits", source, tmp_path, test_list="x")
    with pytest.raises(ValueError, match="skip names case_9"):
        run("kits", source, tmp_path, skip=("case_9",))
    with pytest.raises(ValueError, match="nothing converts 'kitz'; known: .*cads.*raw"):
        run("kitz", source, tmp_path)
    with pytest.raises(ValueError, match="unlabelled is error or test"):
        run("kits", source, tmp_path, unlabelled="maybe")
    with pytest.raises(FileNotFoundError, match="is no folder: unpack"):
        run("kits", tmp_path / "kits.zip", tmp_path)
    assert set(options_of("cads")) == {"partial", "parts", "test_list", "val_share"}


def test_cases_without_label_can_be_taken_for_a_test_set(tmp_path):
    source, made = start("kits", tmp_path)
    made["case_00400"].label_path.unlink()
    table = run("kits", source, tmp_path, unlabelled="test").set_index("case")
    folder = folder_of("kits", source, tmp_path)
    assert table.split["case_00400"] == "test" and (folder / "imagesTs/case_00400_0000.nii.gz").exists()
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2


def test_an_own_registry_names_an_own_set(tmp_path):
    source, made = start("toothfairy2", tmp_path)
    text = Path("data/datasets.yaml").read_text() if Path("data").is_dir() else ""
    block = text[text.index("toothfairy2:") : text.index("toothfairy3:")]
    mine = block.replace("toothfairy2:", "teeth:", 1).replace("dataset: 119", "dataset: 777")
    (tmp_path / "mine.yaml").write_text(mine.replace("title: ToothFairy2_All", "title: Teeth"))
    table = run("teeth", source, tmp_path, registry=tmp_path / "mine.yaml")
    assert len(table) == len(made) and (tmp_path / "raw/Dataset777_Teeth/dataset.json").exists()


def test_tables_make_every_label_of_the_registry():
    for dataset in load_datasets().values():
        for name in {dataset.source, dataset.name} & set(CONVERTERS) - {"cads", "raw"}:
            made = set(value_table(name, dataset).values())
            assert made == set(dataset.values), dataset.name


# The published splits reach the reader of raw data sets


@pytest.mark.parametrize("name", ["cads", "skm_tea", "ctspine1k"])
def test_published_splits_are_read_back(name, tmp_path):
    source, made = start(name, tmp_path)
    table = run(name, source, tmp_path)
    dataset = get_dataset(name)
    cases = list_cases(dataset, tmp_path / "raw")
    assert {case.id: case.split for case in cases} == {row["case"]: row["split"] for row in table.to_dict("records") if row["split"] != "excluded"}
    for case in cases:
        assert read_case(dataset, case).label.max() <= len(dataset.labels)


# CADS

# Lower structure, upper structure (group and value), and the registry's name of the one on top
OVERLAPS = [
    ((553, 9), (557, 1), "white_matter"),
    ((557, 1), (558, 5), "oar_brainstem"),
    ((559, 4), (551, 13), "lung_upper_lobe_left"),
    ((556, 3), (553, 5), "heart_ventricle_left"),
    ((559, 9), (556, 3), "heart"),
    ((556, 1), (559, 10), "spinal_cord"),
    ((553, 16), (556, 5), "sigmoid"),
    ((553, 16), (556, 6), "rectum"),
    ((556, 4), (553, 14), "small_bowel"),
    ((553, 1), (558, 11), "oar_esophagus_s"),
    ((554, 20), (556, 13), "left_psoas_major"),
    ((557, 6), (558, 4), "oar_bone_mandible"),
    ((556, 9), (559, 8), "breast_implant"),
    ((559, 2), (554, 12), "gluteus_maximus_left"),
    ((556, 2), (558, 21), "oar_glottis"),
    ((559, 5), (552, 1), "vertebrae_l5"),
    ((553, 18), (558, 23), "oar_lips"),
]


def test_finer_structures_lie_on_top(tmp_path):
    parts = {group: np.zeros(SHAPE, np.uint8) for group in CADS_SIZES}
    labels = get_dataset("cads").labels
    for row, (lower, upper, _) in enumerate(OVERLAPS):
        place = (row % 6, row // 6, 0)
        for group, value in (lower, upper):
            parts[group][place] = value
    put_parts(tmp_path, "a", parts, np.eye(4))
    paths = tuple(tmp_path / f"segmentations/a/a_part_{group}.nii.gz" for group in CADS_SIZES)
    merged, notes, hidden = merge_parts(paths, Volume(parts[551], np.eye(4)), Path("image"))
    for row, (_, _, name) in enumerate(OVERLAPS):
        assert merged[row % 6, row // 6, 0] == labels[name], name
    assert np.count_nonzero(merged) == len(OVERLAPS)
    assert {labels["brain"], labels["colon"], labels["spinal_canal"]} <= set(hidden) and notes == []


def test_hidden_structures_are_noted(tmp_path):
    source, made = start("cads", tmp_path)
    case, parts = made["0041_train_1_a_1"], cads_parts(3)
    parts[559][...] = 4  # A thoracic cavity everywhere
    parts[553][parts[553] == 9] = 0
    parts[553][0, 0, 0], parts[557][0, 0, 0] = 9, 1  # All of the brain is white matter
    put_parts(source / "0041_ctrate", "train_1_a_1", parts, case.affine)
    table = run("cads", source, tmp_path).set_index("case")
    assert "hidden under others:" in table.warnings["0041_train_1_a_1"]
    assert "brain" in table.warnings["0041_train_1_a_1"]


def test_missing_and_moved_parts_are_named(tmp_path):
    source, made = start("cads", tmp_path)
    folder = made["0001_10000001"].label_path.parent
    for group in (553, 559):
        (folder / f"10000001_part_{group}.nii.gz").unlink()
    moved = made["0002_10000018"]
    affine = moved.affine.copy()
    affine[0, 3] += 1
    path = moved.label_path.with_name("10000018_part_552.nii.gz")
    put(path, cads_parts(2)[552], affine)
    reasons = failures("cads", source, tmp_path)
    assert set(reasons) == {"0001_10000001", "0002_10000018"}
    assert "part_553.nii.gz" in reasons["0001_10000001"] and "part_559.nii.gz" in reasons["0001_10000001"]
    assert str(path) in reasons["0002_10000018"] and "1 mm apart" in reasons["0002_10000018"]
    assert moved.image_path.name in reasons["0002_10000018"]


def test_the_nine_maps_are_written_beside_the_merged_one(tmp_path, converted):
    from mednext_v2.data.preprocess import Prepared, prepare
    from mednext_v2.intake.check import fix_raw_dataset

    source, made = start("cads", tmp_path)
    whole, parts = made["0041_train_1_a_1"], cads_parts(3)
    parts[559][parts[551] > 0] = 3  # Every organ of 551 lies in a cavity: neither is lost
    put_parts(source / "0041_ctrate", "train_1_a_1", parts, whole.affine)
    (source / "0041_ctrate/segmentations/train_2_a_1/train_2_a_1_part_552.nii.gz").unlink()
    cads, table = get_dataset("cads"), run("cads", source, tmp_path, partial=True)
    folder = folder_of("cads", source, tmp_path)
    written = json.loads((folder / "parts.json").read_text())
    assert {part: len(labels) for part, labels in written.items()} == {str(group): size for group, size in CADS_SIZES.items()}
    assert [label for labels in written.values() for label in labels] == sorted(cads.labels, key=cads.labels.get)
    for group in CADS_SIZES:
        check_volume(folder / f"partsTr/{group}/0041_train_1_a_1.nii.gz", parts[group], whole.affine)
    assert not (folder / "partsTr/552/0041_train_2_a_1.nii.gz").exists() and (folder / "partsTr/553/0041_train_2_a_1.nii.gz").exists()
    assert table.label_sha256.str.len().max() == 64
    before = times(folder) | {path: path.stat().st_mtime_ns for path in folder.glob("partsTr/*/*")}
    run("cads", source, tmp_path, partial=True)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "nothing is converted twice"
    prepare(cads, tmp_path / "raw", tmp_path / "prepared")
    found = Prepared(tmp_path / "prepared").parts
    assert [one.dataset.name for one in found.values()] == [f"cads_{group}" for group in CADS_SIZES]
    assert {case for case in found["553"].manifest.case} - {case for case in found["552"].manifest.case} == {"0041_train_2_a_1"}
    for copy in (lambda: convert("raw", folder, tmp_path / "copy", progress=False), lambda: fix_raw_dataset(folder, tmp_path / "mended", dataset=cads)):
        with pytest.raises(ValueError, match="has labels in parts"):
            copy()
    with pytest.raises(ValueError, match="True or False, got 'false'"):
        run("cads", source, tmp_path, parts="false")
    run("cads", source, tmp_path, partial=True, parts=False)
    assert not (folder / "parts.json").exists() and not list(folder.glob("partsTr/*/*"))


def test_cads_needs_its_test_list(tmp_path):
    source, _ = start("cads", tmp_path)
    listed = source / "resources/info/image_ids_test_split.txt"
    listed.rename(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="image_ids_test_split.txt is missing.*murong-xu/CADS.*test_list"):
        run("cads", source, tmp_path)
    table = run("cads", source, tmp_path, test_list=tmp_path / "list.txt").set_index("case")
    assert table.split["0001_10000018"] == "excluded" and table.split["0002_10000018"] != "excluded"
    (tmp_path / "list.txt").write_text("===\n")
    with pytest.raises(ValueError, match="names no image"):
        run("cads", source, tmp_path, test_list=tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("10000018\ntrain_2_a_1\n")  # A plain list holds for all folders
    table = run("cads", source, tmp_path, test_list=tmp_path / "list.txt").set_index("case")
    excluded = set(table.index[table.split == "excluded"])
    assert excluded == {"0001_10000018", "0002_10000018", "0041_train_2_a_1"}
    folder = folder_of("cads", source, tmp_path)
    assert len([*folder.glob("imagesTr/*")]) == 2 and not [*folder.glob("*/0041_train_2_a_1*")]


def test_merging_holds_one_part_in_memory(tmp_path):
    shape = (128, 128, 128)
    rng = np.random.default_rng(0)
    for group, size in CADS_SIZES.items():
        label = np.kron(rng.integers(0, size + 1, (8, 8, 8)), np.ones((16, 16, 16), int))
        put(tmp_path / f"segmentations/a/a_part_{group}.nii.gz", label.astype(np.uint8), np.eye(4))
    paths = tuple(tmp_path / f"segmentations/a/a_part_{group}.nii.gz" for group in CADS_SIZES)
    image = Volume(np.broadcast_to(np.int16(0), shape), np.eye(4))
    merge_parts(paths[:1], image, Path("image"), groups=tuple(CADS_SIZES)[:1])  # What is imported and cached once does not count
    tracemalloc.start()
    merge_parts(paths, image, Path("image"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.5 * np.prod(shape)  # Nine parts alone would be nine bytes a voxel


# SKM-TEA


def test_the_knee_mask_stands_in_for_a_missing_label(tmp_path):
    source, made = start("skm_tea", tmp_path)
    for id in ("MTR_001", "MTR_005"):  # Left to right, and right to left
        put_knee(made[id].image_path, [made[id].images[0], made[id].files["echo2"]], None)
    table = run("skm_tea", source, tmp_path).set_index("case")
    folder = folder_of("skm_tea", source, tmp_path)
    for id in ("MTR_001", "MTR_005"):
        assert table.warnings[id] == "label from the NIfTI mask"
        check_volume(folder / f"labelsTr/{id}.nii.gz", made[id].label, made[id].affine)


def test_knee_faults_are_named(tmp_path):
    source, made = start("skm_tea", tmp_path)
    case = made["MTR_001"]
    put_knee(case.image_path, [case.images[0], case.files["echo2"]], None)
    case.files["mask"].unlink()
    other = np.zeros(SHAPE, np.uint8).transpose(1, 0, 2)
    put(made["MTR_030"].files["mask"], other, np.eye(4))
    with h5py.File(made["MTR_005"].image_path, "w") as file:
        file["echo1"] = made["MTR_005"].images[0]
    cut = made["MTR_066"].files["mask"]
    cut.write_bytes(cut.read_bytes()[:-40])
    reasons = failures("skm_tea", source, tmp_path)
    assert "no label" in reasons["MTR_001"] and "MTR_001.h5" in reasons["MTR_001"]
    assert "no 'echo2', it has: echo1" in reasons["MTR_005"]
    assert str(cut) in reasons["MTR_066"] and set(reasons) == {"MTR_001", "MTR_005", "MTR_066"}
    provenance = (folder_of("skm_tea", source, tmp_path) / "provenance.csv").read_text()
    assert f"the NIfTI mask differs in {np.count_nonzero(made['MTR_030'].label)} voxels" in provenance


@pytest.mark.parametrize("trick", ["external link", "external storage", "virtual"])
def test_hdf5_does_not_lead_to_other_files(tmp_path, trick):
    source, made = start("skm_tea", tmp_path)
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones(SHAPE, np.float32)
    (tmp_path / "secret.bin").write_bytes(np.ones(SHAPE, np.float32).tobytes())
    with h5py.File(made["MTR_001"].image_path, "a") as file:
        del file["echo2"]
        if trick == "external link":
            file["echo2"] = h5py.ExternalLink(str(secret), "/x")
        elif trick == "external storage":
            place = [(str(tmp_path / "secret.bin"), 0, h5py.h5f.UNLIMITED)]
            file.create_dataset("echo2", SHAPE, np.float32, external=place)
        else:
            layout = h5py.VirtualLayout(SHAPE, np.float32)
            layout[...] = h5py.VirtualSource(str(secret), "x", SHAPE)
            file.create_virtual_dataset("echo2", layout)
    reasons = failures("skm_tea", source, tmp_path)
    assert list(reasons) == ["MTR_001"] and "is not followed" in reasons["MTR_001"]


def test_knees_need_their_annotations(tmp_path):
    source, _ = start("skm_tea", tmp_path)
    (source / "annotations/v1.0.0").rename(tmp_path / "annotations")
    with pytest.raises(ValueError, match="train.json is missing.*StanfordMIMI/skm-tea.*annotations"):
        run("skm_tea", source, tmp_path)
    assert len(run("skm_tea", source, tmp_path, annotations=tmp_path / "annotations")) == 4
    (source / "image_files/MTR_001.h5").rename(source / "image_files/MTR_999.h5")
    with pytest.raises(ValueError, match="MTR_999.h5 is in none of the files"):
        run("skm_tea", source, tmp_path, annotations=tmp_path / "annotations")


# The others


def test_tooth_values_in_the_gaps_become_background(tmp_path):
    source, made = start("toothfairy2", tmp_path)
    case = made["ToothFairy2F_001"]
    label = blobs(3, [18, 40, 41])
    put(case.label_path, label, case.affine)
    table = run("toothfairy2", source, tmp_path).set_index("case")
    assert table.warnings["ToothFairy2F_001"] == "raw value 40 taken as background"
    ours = np.select([label == 18, label == 41], [18, 35], 0)
    folder = folder_of("toothfairy2", source, tmp_path)
    check_volume(folder / "labelsTr/ToothFairy2F_001.nii.gz", ours, case.affine)


def test_tooth_directions_can_stay_as_declared(tmp_path):
    source, made = start("toothfairy3", tmp_path)
    declared = turned_affine("LPS", (1.0, 1.5, 2.5), (10.0, -20.0, 30.0))
    table = run("toothfairy3", source, tmp_path, fix_direction=False)
    folder = folder_of("toothfairy3", source, tmp_path)
    assert set(table.warnings) == {""}
    case = made["ToothFairy3F_001"]
    check_volume(folder / "labelsTr/ToothFairy3F_001.nii.gz", case.label, declared)
    # A file whose header was put right is left alone
    truth = turned_affine("RPI", (1.0, 1.5, 2.5), (1.0, 2.0, 3.0))
    put(case.image_path, case.images[0], truth)
    raw = np.asarray(nibabel.load(case.label_path).dataobj)
    put(case.label_path, raw, truth)
    assert run("toothfairy3", source, tmp_path).set_index("case").warnings["ToothFairy3F_001"] == ""
    check_volume(folder / "imagesTr/ToothFairy3F_001_0000.nii.gz", case.images[0], truth)


def test_slices_that_do_not_fit_are_named(tmp_path):
    source, made = start("brainmetshare", tmp_path)
    first, second = (made[id].image_path.parent.parent for id in ("Mets_005", "Mets_011"))
    (first / "3" / "7.png").unlink()
    put_slices(second / "1", np.zeros((16, 15, 12), np.uint8)[:, :-1])
    reasons = failures("brainmetshare", source, tmp_path)
    assert "slice 7" in reasons["Mets_005"] and str(first / "3") in reasons["Mets_005"]
    assert "different sizes" in reasons["Mets_011"]


def test_colours_are_no_grey_values(tmp_path):
    from PIL import Image

    source, made = start("brainmetshare", tmp_path)
    colour = np.zeros((16, 15, 3), np.uint8)
    colour[0, 0] = 1, 2, 3
    path = made["Mets_005"].image_path
    Image.fromarray(colour).save(path)
    assert str(path) in failures("brainmetshare", source, tmp_path)["Mets_005"]


def test_a_heart_without_its_frames_file_is_named(tmp_path):
    source, _ = start("acdc", tmp_path)
    (source / "training/patient002/Info.cfg").unlink()
    (source / "training/patient001/patient001_frame12.nii.gz").unlink()
    reasons = failures("acdc", source, tmp_path)
    assert "Info.cfg is missing" in reasons["patient002"]
    assert "patient001_frame12.nii.gz is missing" in reasons["patient001_frame12"]


def test_spine_scans_keep_to_the_published_split(tmp_path):
    source, made = start("ctspine1k", tmp_path)
    listed = source / "metadata/data_split.txt"
    text = listed.read_text()
    listed.write_text(text.replace("liver_12.nii.gz\n", ""))
    table = run("ctspine1k", source, tmp_path).set_index("case")
    assert table.split["MSD-T10_liver_12"] == "excluded"
    listed.write_text("trainset:\nother.nii.gz\n")
    with pytest.raises(ValueError, match="lists none of the 4 scans"):
        run("ctspine1k", source, tmp_path)
    listed.unlink()
    with pytest.raises(ValueError, match="data_split.txt is missing.*split_list"):
        run("ctspine1k", source, tmp_path)
    (tmp_path / "list.txt").write_text(text)
    assert len(run("ctspine1k", source, tmp_path, split_list=tmp_path / "list.txt")) == 4


def test_amos_can_be_one_modality(tmp_path):
    source, _ = start("amos", tmp_path)
    assert set(run("amos", source, tmp_path, modality="MR").case) == {"amos_0507", "amos_0590"}
    assert len(run("amos", source, tmp_path, modality="CT")) == 4
    with pytest.raises(ValueError, match="modality is CT, MR or both, got 'PET'"):
        run("amos", source, tmp_path, modality="PET")


def test_two_structure_sets_of_one_moment_do_not_decide(tmp_path):
    source, made = start("pediatric_ct_seg", tmp_path)
    from data_toys_dicom import write_rtstruct

    id = "Pediatric-CT-SEG-0001"
    folder = source / id / "CT"
    skin = {"Skin": np.ones((12, 14, 6), bool)}
    write_rtstruct(source / id / "RTSTRUCT" / "twin.dcm", folder, skin, date="20200202")
    reasons = failures("pediatric_ct_seg", source, tmp_path)
    assert list(reasons) == [id] and "made at the same time" in reasons[id]


def test_a_missing_ct_slice_is_named(tmp_path):
    source, made = start("pediatric_ct_seg", tmp_path)
    made["Pediatric-CT-SEG-0001"].image_path.unlink()
    reasons = failures("pediatric_ct_seg", source, tmp_path)
    assert list(reasons) == ["Pediatric-CT-SEG-0001"]


# Raw


def test_raw_files_are_linked_not_copied(tmp_path):
    source, made = start("raw", tmp_path)
    (source / "splits_final.json").write_text('[{"train": ["case_1", "case_2"], "val": ["case_3"]}]')
    table = run("raw", source, tmp_path).set_index("case")
    folder = tmp_path / "raw" / "Dataset500_Toy"
    assert (folder / "dataset.json").read_bytes() == (source / "dataset.json").read_bytes()
    assert (folder / "splits_final.json").read_bytes() == (source / "splits_final.json").read_bytes()
    assert table.split["case_3"] == "val"
    for path in folder.glob("*T?/*"):
        assert path.samefile(source / path.relative_to(folder))
    convert("raw", source, tmp_path / "copied", progress=False, link=False)
    copy = tmp_path / "copied/Dataset500_Toy/labelsTr/case_1.nii.gz"
    assert not copy.samefile(source / "labelsTr/case_1.nii.gz")
    assert copy.read_bytes() == (source / "labelsTr/case_1.nii.gz").read_bytes()
    with pytest.raises(ValueError, match="lies in the source"):
        convert("raw", source, tmp_path, progress=False)
    assert raw_dataset(folder).regions == {"whole": (1, 2), "core": (2,)}


def test_raw_in_other_formats_stays_as_it_is(tmp_path):
    source = tmp_path / "Dataset501_Heads"
    for i in (1, 2, 3):
        put(source / f"imagesTr/a{i}_0000.mha", noise(i), np.eye(4))
        put(source / f"labelsTr/a{i}.mha", blobs(i, [1]), np.eye(4))
    text = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "head": 1}, "file_ending": ".mha"}
    (source / "dataset.json").write_text(json.dumps(text))
    run("raw", source, tmp_path)
    assert (tmp_path / "raw/Dataset501_Heads/imagesTr/a1_0000.mha").samefile(source / "imagesTr/a1_0000.mha")


def test_a_raw_folder_of_a_known_set_works_as_it_is(tmp_path):
    source = tmp_path / "Dataset017_AbdominalOrganSegmentation"
    for i in (1, 2):
        put(source / f"imagesTr/img{i}_0000.nii.gz", noise(i), np.eye(4))
        put(source / f"labelsTr/img{i}.nii.gz", blobs(i, range(1, 14)), np.eye(4))
    labels = {"background": 0, "Spleen": 1, "Right Kidney": 2}
    text = {"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz"}
    (source / "dataset.json").write_text(json.dumps(text))
    assert len(run("btcv", source, tmp_path)) == 2
    folder = tmp_path / "raw" / "Dataset017_AbdominalOrganSegmentation"
    assert len(json.loads((folder / "dataset.json").read_text())["labels"]) == 14
    text["labels"] = {"background": 0, "Spleen": 2, "Right Kidney": 1}
    (source / "dataset.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="has 'Spleen' as 2, the data set btcv as 1"):
        run("btcv", source, tmp_path)
