"""What `doctor` finds in data sets that are damaged in exactly one way, and what `fix` makes of them."""

import gzip
import json
import os
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_toys import DEMO
from mednext_v2.core import sha256
from mednext_v2.data.datasets import Case, raw_dataset, read_case
from mednext_v2.data.scans import FILE_FAULTS, BadFile, inspect_header, read_label, read_scan
from mednext_v2.intake import check as module
from mednext_v2.intake.check import COLUMNS, FAULTS, check_raw_dataset, fix_raw_dataset, measure

AFFINE = np.array([[2.0, 0, 0, -20], [0, 3, 0, -30], [0, 0, 4, -40], [0, 0, 0, 1]])
SHAPE = (24, 20, 16)
CLASSES = {"background": 0, "liver": 1, "lesion": 2}
NAME = "Dataset007_MiniDemoCT"


def save(path, voxels, affine=AFFINE, change=None):
    """A NIfTI file in mm with sform and qform; `change` may alter its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    data = bytearray(image.to_bytes())
    if change:
        change(data)
    path.write_bytes(gzip.compress(bytes(data), 1) if path.suffix == ".gz" else bytes(data))


def good(folder, ending=".nii.gz", channels=("CT",), train=4, test=2, seed=0, labels=CLASSES, **meta):
    """A healthy data set, with splits."""
    rng = np.random.default_rng(seed)
    ids = {"Tr": [f"case_{i}" for i in range(train)], "Ts": [f"case_{i}" for i in range(train, train + test)]}
    for part, cases in ids.items():
        for case in cases:
            for channel in range(len(channels)):
                image = np.clip(rng.normal(0, 300, SHAPE), -1024, 2000).astype(np.int16)
                save(folder / f"images{part}/{case}_{channel:04d}{ending}", image)
            label = np.zeros(SHAPE, np.uint8)
            label[4:14, 4:14, 4:12] = 1
            label[6:9, 6:9, 6:9] = 2
            save(folder / f"labels{part}/{case}{ending}", label)
    meta = {"channel_names": {str(i): name for i, name in enumerate(channels)}, "labels": labels, "numTraining": train, "file_ending": ending} | meta
    (folder / "dataset.json").write_text(json.dumps(meta))
    splits = [{"train": ids["Tr"][:-1], "val": ids["Tr"][-1:]}, {"train": ids["Tr"][1:], "val": ids["Tr"][:1]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    return folder


IMAGE, LABEL = "imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz"
DAMAGES = {}


def damage(code, *files, name="", **options):
    """Registers a damage: what is to be found in which files after the function."""

    def register(function):
        key = name or function.__name__.strip("_")
        assert key not in DAMAGES, key
        DAMAGES[key] = (function, {(code, file) for file in files}, options)
        return function

    return register


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit(path, function, **options):
    """Replaces the voxels of a file by a function of them."""
    image = nibabel.load(path)
    voxels = np.asanyarray(image.dataobj).copy()
    new = function(voxels)
    save(path, voxels if new is None else new, image.affine, **options)


def edit_bytes(path, function):
    """Edits the decompressed bytes of a file."""
    data = bytearray(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    new = function(data)
    data = bytes(data if new is None else new)
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


def put(code, offset, *values):
    """A function that writes numbers into a header."""
    return lambda data: struct.pack_into(f"<{code * len(values)}", data, offset, *values)


# The folder


@damage("dataset-missing", "dataset.json")
def no_dataset_json(d):
    (d / "dataset.json").unlink()


@damage("dataset-json", "dataset.json")
def dataset_json_cut_off(d):
    path = d / "dataset.json"
    path.write_text(path.read_text()[:-5])


@damage("dataset-json", "dataset.json")
def dataset_json_not_text(d):
    (d / "dataset.json").write_bytes(bytes(range(256)))


@damage("dataset-json", "dataset.json")
def dataset_json_a_list(d):
    (d / "dataset.json").write_text("[1, 2]")


@damage("dataset-keys", "dataset.json")
def no_channel_names(d):
    edit_json(d / "dataset.json", channel_names=None)


@damage("dataset-keys", "dataset.json")
def no_labels(d):
    edit_json(d / "dataset.json", labels=None, modality={"0": "CT"})


@damage("dataset-keys", "dataset.json")
def channels_numbered_from_one(d):
    edit_json(d / "dataset.json", channel_names={"1": "CT"})


@damage("dataset-keys", "dataset.json")
def ending_a_number(d):
    edit_json(d / "dataset.json", file_ending=7)


@damage("labels-values", "dataset.json")
def first_form_labels(d):
    edit_json(d / "dataset.json", labels={"0": "background", "1": "liver", "2": "lesion"})


@damage("labels-values", "dataset.json")
def label_values_with_a_gap(d):
    edit_json(d / "dataset.json", labels={"background": 0, "liver": 1, "lesion": 2, "duct": 4})
    edit(d / LABEL, lambda v: v.__setitem__((20, 1, 1), 4))


@damage("labels-values", "dataset.json")
def background_not_zero(d):
    edit_json(d / "dataset.json", labels={"background": 2, "liver": 1, "lesion": 0})


@damage("labels-values", "dataset.json")
def two_names_one_value(d):
    edit_json(d / "dataset.json", labels=CLASSES | {"tumour": 2})


@damage("labels-values", "dataset.json")
def ignore_not_last(d):
    edit_json(d / "dataset.json", labels=CLASSES | {"ignore": 5})


@damage("labels-values", "dataset.json")
def regions_without_order(d):
    edit_json(d / "dataset.json", labels={"background": 0, "whole": [1, 2], "core": 2})


@damage("num-training", "dataset.json")
def wrong_number(d):
    edit_json(d / "dataset.json", numTraining=5)


@damage("file-ending", IMAGE.removesuffix(".gz"))
def other_ending(d):
    (d / IMAGE.removesuffix(".gz")).write_bytes(gzip.decompress((d / IMAGE).read_bytes()))
    (d / IMAGE).unlink()


@damage("stray-file", "imagesTr/notes.txt")
def a_note(d):
    (d / "imagesTr/notes.txt").write_text("hello")


@damage("stray-file", "imagesTr/case_1.nii.gz")
def image_without_channel_number(d):
    shutil.copy(d / IMAGE, d / "imagesTr/case_1.nii.gz")


@damage("stray-file", "labelsTr/._case_1.nii.gz")
def resource_fork(d):
    (d / "labelsTr/._case_1.nii.gz").write_bytes(b"Mac OS X")


@damage("folder-missing", "labelsTr")
def no_labels_folder(d):
    shutil.rmtree(d / "labelsTr")


@damage("label-missing", LABEL)
def image_without_label(d):
    (d / LABEL).unlink()


@damage("label-missing", "labelsTs/case_4.nii.gz")
def unlabelled_test_image(d):
    (d / "labelsTs/case_4.nii.gz").unlink()


@damage("test-unlabelled", "labelsTs")
def no_test_labels(d):
    shutil.rmtree(d / "labelsTs")


@damage("image-missing", IMAGE)
def label_without_image(d):
    (d / IMAGE).unlink()


@damage("channel-missing", "imagesTr/case_1_0001.nii.gz", channels=("T1", "T2"))
def one_channel_of_two(d):
    (d / "imagesTr/case_1_0001.nii.gz").unlink()


@damage("channel-extra", "imagesTr/case_1_0001.nii.gz")
def undeclared_channel(d):
    edit(d / IMAGE, lambda v: v + 1)
    shutil.copy(d / IMAGE, d / "imagesTr/case_1_0001.nii.gz")
    edit(d / IMAGE, lambda v: v - 1)


def edit_splits(d, function):
    path = d / "splits_final.json"
    folds = json.loads(path.read_text())
    function(folds)
    path.write_text(json.dumps(folds))


@damage("splits-json", "splits_final.json")
def splits_cut_off(d):
    (d / "splits_final.json").write_text("[{")


@damage("splits-json", "splits_final.json")
def splits_a_mapping(d):
    (d / "splits_final.json").write_text('{"train": [], "val": []}')


@damage("splits-json", "splits_final.json")
def splits_without_val(d):
    edit_splits(d, lambda folds: folds[1].pop("val"))


@damage("splits-unknown", "splits_final.json")
def splits_name_unknown(d):
    edit_splits(d, lambda folds: folds[0]["val"].append("case_99"))


@damage("splits-unknown", "splits_final.json")
def splits_name_test_case(d):
    edit_splits(d, lambda folds: folds[0]["train"].append("case_4"))


@damage("splits-absent", "splits_final.json")
def case_not_in_splits(d):
    edit_splits(d, lambda folds: [fold[side].remove("case_1") for fold in folds for side in fold if "case_1" in fold[side]])


@damage("splits-overlap", "splits_final.json")
def train_and_val_overlap(d):
    edit_splits(d, lambda folds: folds[0]["val"].append("case_1"))


@damage("splits-overlap", "splits_final.json")
def named_twice(d):
    edit_splits(d, lambda folds: folds[0]["train"].append("case_1"))


@damage("case-shared", IMAGE)
def same_id_in_train_and_test(d):
    os.rename(d / "imagesTs/case_4_0000.nii.gz", d / "imagesTs/case_1_0000.nii.gz")
    os.rename(d / "labelsTs/case_4.nii.gz", d / "labelsTs/case_1.nii.gz")


# Files


@damage("file-format", IMAGE)
def text_instead(d):
    (d / IMAGE).write_text("<html>404 Not Found</html>" * 100)


@damage("file-format", IMAGE)
def compressed_text(d):
    (d / IMAGE).write_bytes(gzip.compress(b"<html>404 Not Found</html>" * 100))


@damage("file-format", LABEL)
def folder_instead(d):
    (d / LABEL).unlink()
    (d / LABEL).mkdir()


@damage("file-format", IMAGE)
def header_of_a_pair(d):
    edit_bytes(d / IMAGE, lambda data: data.__setitem__(slice(344, 348), b"ni1\0"))


@damage("file-format", IMAGE)
def unknown_datatype(d):
    edit_bytes(d / IMAGE, put("h", 70, 999))


@damage("file-format", IMAGE)
def voxels_within_the_header(d):
    edit_bytes(d / IMAGE, put("f", 108, 100.0))


@damage("file-compression", IMAGE)
def named_gz_but_plain(d):
    (d / IMAGE).write_bytes(gzip.decompress((d / IMAGE).read_bytes()))


@damage("file-truncated", IMAGE)
def gz_cut_in_the_voxels(d):
    data = (d / IMAGE).read_bytes()
    (d / IMAGE).write_bytes(data[: len(data) // 2])


@damage("file-truncated", LABEL)
def gz_cut_in_the_last_bytes(d):
    (d / LABEL).write_bytes((d / LABEL).read_bytes()[:-3])


@damage("file-truncated", IMAGE)
def gz_cut_in_the_header(d):
    (d / IMAGE).write_bytes((d / IMAGE).read_bytes()[:40])


@damage("file-truncated", IMAGE)
def gz_whole_but_voxels_short(d):
    edit_bytes(d / IMAGE, lambda data: data[:-500])


@damage("file-truncated", "imagesTr/case_1_0000.nii", ending=".nii")
def plain_cut(d):
    path = d / "imagesTr/case_1_0000.nii"
    path.write_bytes(path.read_bytes()[:-1])


@damage("file-truncated", "imagesTr/case_1_0000.nii", ending=".nii")
def plain_cut_in_the_header(d):
    path = d / "imagesTr/case_1_0000.nii"
    path.write_bytes(path.read_bytes()[:200])


@damage("trailing-bytes", "imagesTr/case_1_0000.nii", ending=".nii")
def plain_too_long(d):
    path = d / "imagesTr/case_1_0000.nii"
    path.write_bytes(path.read_bytes() + b"\0" * 9)


@damage("trailing-bytes", IMAGE)
def gz_followed_by_text(d):
    (d / IMAGE).write_bytes((d / IMAGE).read_bytes() + b"and more")


@damage("file-empty", IMAGE)
def no_bytes(d):
    (d / IMAGE).write_bytes(b"")


@damage("gz-checksum", IMAGE)
def wrong_checksum(d):
    data = bytearray((d / IMAGE).read_bytes())
    data[-6] ^= 1
    (d / IMAGE).write_bytes(data)


@damage("file-damaged", IMAGE)
def gz_block_of_no_type(d):
    data = gzip.decompress((d / IMAGE).read_bytes())
    (d / IMAGE).write_bytes(gzip.compress(data[:9000]) + gzip.compress(data[9000:])[:10] + b"\x07" * 1000)


@damage("file-damaged", IMAGE)
def gz_first_block_of_no_type(d):
    data = bytearray((d / IMAGE).read_bytes())
    data[10] = 7
    (d / IMAGE).write_bytes(data)


@damage("gz-checksum", IMAGE)
def gz_bytes_changed(d):
    data = bytearray((d / IMAGE).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = b"\xff" * 300  # Codes of the dictionary, so decompression goes on
    (d / IMAGE).write_bytes(data)


@damage("file-link", LABEL)
def link_to_nowhere(d):
    (d / LABEL).unlink()
    (d / LABEL).symlink_to("/nowhere/at/all.nii.gz")


@damage("file-link", LABEL)
def link_to_itself(d):
    (d / LABEL).unlink()
    (d / LABEL).symlink_to(d / LABEL)


# Headers


@damage("dimensions", IMAGE)
def four_dimensions(d):
    edit(d / IMAGE, lambda v: np.stack([v, v], axis=-1))


@damage("dimensions", LABEL)
def a_slice(d):
    edit(d / LABEL, lambda v: v[:, :, 0])


@damage("dimensions", IMAGE)
def negative_axis(d):
    edit_bytes(d / IMAGE, put("h", 42, -5))


@damage("shape-mismatch", LABEL)
def label_of_another_shape(d):
    edit(d / LABEL, lambda v: v[:, :, :-1])


@damage("shape-mismatch", "imagesTr/case_1_0001.nii.gz", channels=("T1", "T2"))
def channel_of_another_shape(d):
    edit(d / "imagesTr/case_1_0001.nii.gz", lambda v: v[1:])


@damage("affine-mismatch", LABEL)
def label_moved(d):
    edit_bytes(d / LABEL, put("f", 292, -17.0))
    edit_bytes(d / LABEL, put("f", 268, -17.0))


@damage("affine-mismatch", LABEL)
def label_rotated_by_a_degree(d):
    angle = np.radians(1)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    save(d / LABEL, np.asanyarray(nibabel.load(d / LABEL).dataobj), turn @ AFFINE)


@damage("affine-mismatch", LABEL)
def label_turned_by_a_little(d):
    affine, turn = AFFINE.copy(), np.array([[1, -0.003, 0], [0.003, 1, 0], [0, 0, 1]])
    affine[:3, :3] = turn @ AFFINE[:3, :3]
    assert np.abs(affine - AFFINE).max() < 0.01, "each number is right, the far corner is not"
    save(d / LABEL, np.asanyarray(nibabel.load(d / LABEL).dataobj), affine)


@damage("affine-rounding", LABEL)
def label_spacing_rounded(d):
    affine = AFFINE.copy()
    affine[0, 0] = 2.002
    save(d / LABEL, np.asanyarray(nibabel.load(d / LABEL).dataobj), affine)


@damage("axes-differ", LABEL)
def label_mirrored_with_its_affine(d):
    flip = AFFINE @ np.array([[-1.0, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    save(d / LABEL, np.asanyarray(nibabel.load(d / LABEL).dataobj)[::-1], flip)


@damage("forms-disagree", IMAGE)
def qform_moved(d):
    edit_bytes(d / IMAGE, put("f", 268, 5.0))


@damage("forms-disagree", IMAGE)
def qform_not_a_number(d):
    edit_bytes(d / IMAGE, put("f", 256, np.nan))


@damage("forms-disagree", IMAGE)
def pixdim_of_another_scan(d):
    edit_bytes(d / IMAGE, lambda data: (put("h", 252, 0)(data), put("f", 80, 1.0, 1.0, 1.0)(data))[0])


@damage("affine-invalid", IMAGE)
def affine_of_zeros(d):
    edit_bytes(d / IMAGE, put("f", 280, *[0.0] * 12))


@damage("affine-invalid", IMAGE)
def affine_with_parallel_axes(d):
    edit_bytes(d / IMAGE, put("f", 280, 2, 2, 0, 0, 3, 3, 0, 0, 0, 0, 4, 0))


@damage("affine-invalid", IMAGE)
def affine_not_a_number(d):
    edit_bytes(d / IMAGE, put("f", 280, np.nan))


@damage("affine-none", IMAGE)
def no_affine(d):
    edit_bytes(d / IMAGE, put("h", 252, 0, 0))
    # The label goes where a header without affine puts the image, and says so
    save(d / LABEL, np.asanyarray(nibabel.load(d / LABEL).dataobj), nibabel.load(d / IMAGE).affine)


@damage("affine-sheared", IMAGE)
def sheared(d):
    edit_bytes(d / IMAGE, lambda data: (put("h", 252, 0)(data), put("f", 280, 2.0, 0.3)(data))[0])
    affine = nibabel.load(d / IMAGE).affine
    edit_bytes(d / IMAGE, put("f", 80, *nibabel.affines.voxel_sizes(affine)))
    edit_bytes(d / LABEL, lambda data: (put("h", 252, 0)(data), put("f", 280, 2.0, 0.3)(data))[0])
    edit_bytes(d / LABEL, put("f", 80, *nibabel.affines.voxel_sizes(affine)))


DAMAGES["sheared"][1].add(("affine-sheared", LABEL))


@damage("pixdim-invalid", IMAGE)
def pixdim_zero(d):
    edit_bytes(d / IMAGE, put("f", 84, 0.0))


@damage("pixdim-invalid", IMAGE)
def pixdim_negative(d):
    edit_bytes(d / IMAGE, put("f", 88, -4.0))


@damage("pixdim-invalid", IMAGE)
def pixdim_zero_and_no_affine(d):
    edit_bytes(d / IMAGE, put("h", 252, 0, 0))
    edit_bytes(d / IMAGE, put("f", 84, 0.0))


@damage("units", IMAGE)
def in_metres(d):
    edit_bytes(d / IMAGE, put("B", 123, 1))


@damage("units-stored", LABEL)
def in_microns(d):
    edit_bytes(d / LABEL, put("B", 123, 3))


DAMAGES["in_microns"][1].add(("affine-mismatch", LABEL))  # A thousandth of the image's size


@damage("units-stored", IMAGE)
def truly_in_metres(d):
    affine = np.diag([1e-3, 1e-3, 1e-3, 1]) @ AFFINE
    save(d / IMAGE, np.asanyarray(nibabel.load(d / IMAGE).dataobj), affine, put("B", 123, 1))


@damage("datatype-wide", LABEL)
def int64_label(d):
    edit(d / LABEL, lambda v: v.astype(np.int64))


@damage("datatype-complex", IMAGE)
def complex_image(d):
    edit(d / IMAGE, lambda v: v.astype(np.complex64))


@damage("datatype-colour", IMAGE)
def colour_image(d):
    colour = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    image = nibabel.Nifti1Image(colour, AFFINE)
    image.set_qform(AFFINE, 1)
    nibabel.save(image, d / IMAGE)


@damage("scale-invalid", IMAGE)
def slope_not_a_number(d):
    edit_bytes(d / IMAGE, put("f", 112, np.nan))


@damage("scale-invalid", IMAGE)
def intercept_infinite(d):
    edit_bytes(d / IMAGE, put("f", 116, np.inf))


@damage("scale-zero", IMAGE)
def slope_zero(d):
    edit_bytes(d / IMAGE, put("f", 112, 0.0))


def resave(d, affine):
    for file in (IMAGE, LABEL):
        save(d / file, np.asanyarray(nibabel.load(d / file).dataobj), affine)


@damage("spacing-odd", IMAGE)
def thick_slices(d):
    resave(d, AFFINE @ np.diag([1.0, 1, 5, 1]))


@damage("orientation-odd", IMAGE)
def mirrored(d):
    resave(d, np.diag([-1.0, 1, 1, 1]) @ AFFINE)


@damage("size-small", IMAGE)
def a_fragment(d):
    edit(d / IMAGE, lambda v: v[:2])
    edit(d / LABEL, lambda v: v[4:6])


@damage("size-huge", IMAGE)
def enormous(d):
    resave(d, AFFINE @ np.diag([1.0, 1, 3.9, 1]))
    voxels = np.zeros((4, 4, 170), np.int16)
    voxels[0] = -500
    save(d / IMAGE, voxels, AFFINE @ np.diag([1.0, 1, 3.9, 1]))
    save(d / LABEL, (voxels < 0).astype(np.uint8), AFFINE @ np.diag([1.0, 1, 3.9, 1]))


# Voxels


def setter(*index_and_value):
    *index, value = index_and_value
    return lambda v: v.__setitem__(tuple(index), value)


@damage("label-undeclared", LABEL)
def undeclared_value(d):
    edit(d / LABEL, setter(0, 0, 0, 3))


@damage("label-undeclared", LABEL)
def negative_label(d):
    edit(d / LABEL, lambda v: np.where(np.arange(SHAPE[2]) == 0, -1, v).astype(np.int16))


@damage("label-fraction", LABEL)
def interpolated_label(d):
    edit(d / LABEL, lambda v: np.where(np.arange(SHAPE[2]) == 0, 0.5, v).astype(np.float32))


@damage("label-fraction", LABEL)
def scaled_label(d):
    edit_bytes(d / LABEL, put("f", 112, 0.5))


@damage("label-rounding", LABEL)
def almost_whole_labels(d):
    edit(d / LABEL, lambda v: v.astype(np.float32) * np.float32(1.00001))


@damage("label-float", LABEL)
def whole_labels_as_float(d):
    edit(d / LABEL, lambda v: v.astype(np.float32))


@damage("label-nan", LABEL)
def nan_in_label(d):
    edit(d / LABEL, lambda v: np.where(np.arange(SHAPE[2]) == 0, np.nan, v).astype(np.float32))


@damage("label-empty", LABEL)
def empty_label(d):
    edit(d / LABEL, np.zeros_like)


@damage("label-empty", LABEL, labels=CLASSES | {"ignore": 3})
def only_ignored_voxels(d):
    edit(d / LABEL, lambda v: np.full_like(v, 3))


@damage("class-absent", "dataset.json")
def class_nobody_drew(d):
    for path in (d / "labelsTr").iterdir():
        edit(path, lambda v: np.minimum(v, 1))


def as_float(value):
    return lambda v: np.where(np.indices(SHAPE).sum(0) == 5, value, v).astype(np.float32)


@damage("image-nan", IMAGE)
def nan_in_image(d):
    edit(d / IMAGE, as_float(np.nan))


@damage("image-nan", IMAGE)
def nothing_but_nan(d):
    edit(d / IMAGE, lambda v: np.full(SHAPE, np.nan, np.float64))


@damage("image-infinite", IMAGE)
def infinity_in_image(d):
    edit(d / IMAGE, as_float(-np.inf))


@damage("image-infinite", IMAGE)
def too_large_for_float32(d):
    edit(d / IMAGE, lambda v: np.where(v > 500, 1e300, v))


@damage("image-narrow", IMAGE)
def offset_that_float32_cannot_hold(folder):
    edit(folder / IMAGE, lambda v: v.astype(np.float64) * 1e-6 + 1e6)


@damage("image-constant", IMAGE)
def constant_image(d):
    edit(d / IMAGE, lambda v: np.full_like(v, -1024))


@damage("hu-range", IMAGE)
def unsigned_image(d):
    edit(d / IMAGE, lambda v: (v + 1024).astype(np.uint16))


@damage("hu-range", IMAGE)
def far_below(d):
    edit(d / IMAGE, setter(0, 0, 0, -32768))


@damage("hu-range", IMAGE)
def far_above(d):
    edit(d / IMAGE, setter(0, 0, 0, 32767))


@damage("hu-range", IMAGE)
def normalised_image(d):
    edit(d / IMAGE, lambda v: (v / 300).astype(np.float32))


@damage("duplicate-image", "imagesTr/case_2_0000.nii.gz")
def copied_image(d):
    shutil.copy(d / IMAGE, d / "imagesTr/case_2_0000.nii.gz")


@damage("duplicate-image", "imagesTr/case_2_0000.nii.gz")
def compressed_again(d):
    data = gzip.compress(gzip.decompress((d / IMAGE).read_bytes()), 9)
    assert data != (d / IMAGE).read_bytes()
    (d / "imagesTr/case_2_0000.nii.gz").write_bytes(data)


@damage("duplicate-image", "imagesTr/case_2_0000.nii.gz")
def stored_as_scaled_big_endian_float(d):
    voxels = np.asanyarray(nibabel.load(d / IMAGE).dataobj)
    image = nibabel.Nifti1Image((voxels / 2).astype(">f4"), AFFINE, nibabel.Nifti1Header(endianness=">"))
    data = bytearray(image.to_bytes())
    struct.pack_into(">ff", data, 112, 2.0, 0.0)
    (d / "imagesTr/case_2_0000.nii.gz").write_bytes(gzip.compress(bytes(data)))


@damage("duplicate-image", IMAGE)
def training_on_a_test_image(d):
    shutil.copy(d / "imagesTs/case_5_0000.nii.gz", d / IMAGE)


@damage("dataset-elsewhere", "dataset.json")
def files_listed(d):
    edit_json(d / "dataset.json", dataset={})


def found(report):
    return {(row.code, row.file) for row in report.table.itertuples()}


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    """Good data sets by their options, made once."""
    made = {}

    def make(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = good(tmp_path_factory.mktemp("good") / NAME, **options)
        return made[key]

    return make


@pytest.fixture
def copy_of(healthy, tmp_path):
    return lambda **options: shutil.copytree(healthy(**options), tmp_path / NAME)


REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}


@pytest.mark.parametrize(
    "options",
    [{}, {"ending": ".nii"}, {"channels": ("T1", "T2", "CT")}, REGIONS, {"train": 1, "test": 0}],
    ids=["plain", "nii", "channels", "regions", "single"],
)
@pytest.mark.parametrize("quick", [False, True])
def test_nothing_is_found_in_a_good_data_set(healthy, options, quick):
    report = check_raw_dataset(healthy(**options), quick=quick)
    assert report.table.empty and report.clean and list(report.table.columns) == COLUMNS, report.text()
    train, test = options.get("train", 4), options.get("test", 2)
    assert (report.cases, report.files) == (train + test, (train + test) * (1 + len(options.get("channels", "1"))))


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_named_and_nothing_else(copy_of, name):
    function, expected, options = DAMAGES[name]
    folder = copy_of(**options)
    function(folder)
    report = check_raw_dataset(folder)
    assert found(report) == expected, report.text()
    assert len(report.table) <= 2 * len(expected), report.text()
    assert report.clean == all(FAULTS[code][0] == "warning" for code, _ in expected)
    for row in report.table.itertuples():
        assert (row.severity, row.remedy) == FAULTS[row.code] and row.what and row.dataset == NAME
        place = re.match(r"(?:images|labels)T[rs]/(case_\d)", row.file)
        assert not place or row.case == place[1] or row.code == "stray-file"
    assert report.verdict.startswith("clean" if report.clean else "NOT CLEAN") and row.file in report.text()


def test_every_code_has_a_test():
    elsewhere = {
        "dataset-number",
        "labels-task",
        "file-permission",
        "gz-length",
        "leak-id",
        "leak-content",
        "against-unread",
        "check-failed",
        "annotated-csv",  # Both in test_training_sets.py
        "annotated-unknown",
    }
    tested = {code for _, expected, _ in DAMAGES.values() for code, _ in expected}
    assert tested | elsewhere == set(FAULTS) and not tested & elsewhere
    assert len(tested) >= 25


HEADER = {
    "file-format",
    "file-compression",
    "file-link",
    "file-empty",
    "dimensions",
    "units",
    "affine-invalid",
    "shape-mismatch",
    "affine-mismatch",
    "pixdim-invalid",
    "num-training",
    "label-missing",
    "case-shared",
}


@pytest.mark.parametrize("name", [name for name in DAMAGES if {code for code, _ in DAMAGES[name][1]} & HEADER])
def test_quick_sees_what_headers_say(copy_of, name, monkeypatch):
    function, expected, options = DAMAGES[name]
    folder = copy_of(**options)
    function(folder)
    monkeypatch.setattr(module, "measure", None)
    assert found(check_raw_dataset(folder, quick=True)) == expected


def test_quick_suspects_a_cut_file_by_its_length(copy_of):
    folder = copy_of()
    gz_cut_in_the_voxels(folder)
    report = check_raw_dataset(folder, quick=True)
    assert found(report) == {("gz-length", IMAGE)} and report.clean and "headers only" in report.verdict


def test_headers_do_not_decompress_whole_files(tmp_path, monkeypatch):
    path = tmp_path / "big_0000.nii.gz"
    save(path, np.random.default_rng(0).integers(-1000, 1000, (128, 128, 64)).astype(np.int16))
    size, read = path.stat().st_size, []
    original = gzip._PaddedFile.read
    monkeypatch.setattr(gzip._PaddedFile, "read", lambda self, n: read.append(len(d := original(self, n))) or d)
    assert inspect_header(path)[1] == []
    assert 0 < sum(read) < size / 4


def test_voxels_are_decompressed_once(tmp_path, monkeypatch):
    path = tmp_path / "big_0000.nii.gz"
    save(path, np.random.default_rng(0).integers(-1000, 1000, (64, 64, 64)).astype(np.int16))
    head, opened = inspect_header(path)[0], []
    monkeypatch.setattr(module.gzip, "open", lambda p, o=gzip.open: opened.append(p) or o(p))
    assert measure(head)[1] == [] and opened == [path]


def test_permission(copy_of, monkeypatch):
    folder = copy_of()
    (folder / LABEL).chmod(0)
    if os.access(folder / LABEL, os.R_OK):  # Root may read anything
        real = open

        def guarded(file, *args, **kwargs):
            if Path(file) == folder / LABEL:
                raise PermissionError(13, "Permission denied")
            return real(file, *args, **kwargs)

        monkeypatch.setattr("builtins.open", guarded)
    assert found(check_raw_dataset(folder)) == {("file-permission", LABEL)}


def test_a_case_that_breaks_the_check_itself_is_a_finding(healthy, monkeypatch):
    def explode(head, label=False):
        raise RuntimeError("out of order")

    monkeypatch.setattr(module, "measure", explode)
    report = check_raw_dataset(healthy())
    assert set(report.table.code) == {"check-failed"} and len(report.table) == 6 and not report.clean
    assert "out of order" in report.text()


@pytest.mark.parametrize("dtype", ["u1", "i1", "<i2", ">i2", "u2", "i4", "<f4", ">f4", "f8", "u4", "i8"])
@pytest.mark.parametrize("scale", [(1.0, 0.0), (0.25, -7.0)])
def test_measures_agree_with_nibabel(tmp_path, dtype, scale):
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 100, (13, 11, 9)).astype(dtype)
    endian = ">" if dtype.byteorder == ">" else "<"
    image = nibabel.Nifti1Image(raw, AFFINE, nibabel.Nifti1Header(endianness=endian), dtype=dtype)
    data = bytearray(image.to_bytes())
    struct.pack_into(f"{endian}ff", data, 112, *scale)
    path = tmp_path / "x_0000.nii.gz"
    path.write_bytes(gzip.compress(bytes(data)))
    content, faults = measure(inspect_header(path)[0], label=True)
    truth = nibabel.load(path).get_fdata()
    values, counts = np.unique(truth, return_counts=True)
    assert faults == [] and (content.low, content.high) == (truth.min(), truth.max())
    assert content.values == dict(zip(values, counts))


def test_digest_depends_on_values_alone(tmp_path):
    rng = np.random.default_rng(2)
    voxels = rng.integers(-1000, 1000, (30, 20, 10)).astype(np.int16)
    voxels[0, 0, :2] = 5, 7
    changed, evened = voxels.copy(), voxels.copy()
    changed[3, 4, 5] += 1
    evened[0, 0, :2] = 6  # The same sum, of values and of their bits
    forms = {"i2": voxels, "f4": voxels.astype("f4"), "f8": voxels.astype("f8"), "i4": voxels.astype("i4")}
    forms |= {"turned": voxels.transpose(2, 0, 1)[:, ::-1]}
    digests = {}
    for name, array in {**forms, "changed": changed, "evened": evened, "scaled": voxels * 2}.items():
        save(tmp_path / f"{name}_0000.nii.gz", array)
        digests[name] = measure(inspect_header(tmp_path / f"{name}_0000.nii.gz")[0])[0].digest
    assert len({digests[name] for name in forms}) == 1
    assert len(set(digests.values())) == 4


def test_memory_is_bounded(tmp_path):
    import tracemalloc

    path = tmp_path / "big_0000.nii.gz"
    voxels = np.zeros((256, 256, 256), np.float32)  # 64 MiB
    voxels[::7, ::5, ::3] = 1.5
    save(path, voxels)
    head = inspect_header(path)[0]
    tracemalloc.start()
    measure(head)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


# Garbage


def flipped(path, rng, body):
    """Random bytes of a file replaced: in its decompressed header, or anywhere on disk."""
    data = bytearray(path.read_bytes())
    packed = path.suffix == ".gz"
    if not body:
        data = bytearray(gzip.decompress(data)) if packed else data
        places = rng.integers(0, 352, rng.integers(1, 12))
    else:
        places = rng.integers(0, len(data), rng.integers(1, 40))
    for place in places:
        data[place] = int(rng.integers(256))
    if body and rng.random() < 0.3:
        data = data[: int(rng.integers(len(data)))]
    path.write_bytes(gzip.compress(bytes(data), 1) if packed and not body else bytes(data))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The smallest data set there is, in both endings."""
    made = {}
    for ending in (".nii", ".nii.gz"):
        made[ending] = good(tmp_path_factory.mktemp("tiny") / NAME, ending=ending, train=1, test=0)
    return made


@pytest.mark.parametrize("seed", range(160))
def test_no_error_escapes_and_what_passes_can_be_read(tiny, tmp_path, seed):
    """What has no error must be readable by the library's own reader: an independent judge."""
    rng = np.random.default_rng(seed)
    ending = (".nii", ".nii.gz")[seed % 2]
    folder = shutil.copytree(tiny[ending], tmp_path / NAME)
    for file in rng.permutation([f"imagesTr/case_0_0000{ending}", f"labelsTr/case_0{ending}"])[: rng.integers(1, 3)]:
        flipped(folder / file, rng, body=rng.random() < 0.5)
    report = check_raw_dataset(folder)
    check_raw_dataset(folder, quick=True)
    if report.clean:
        dataset = raw_dataset(folder)
        image, label = folder / f"imagesTr/case_0_0000{ending}", folder / f"labelsTr/case_0{ending}"
        scan = read_case(dataset, Case("case_0", "train", (image,), label))
        assert np.isfinite(scan.image).all() and set(np.unique(scan.label)) <= {0, 1, 2}


@pytest.mark.parametrize("seed", range(40))
def test_garbage_json_never_raises(tiny, tmp_path, seed):
    rng = np.random.default_rng(seed)
    folder = shutil.copytree(tiny[".nii"], tmp_path / NAME)
    pool = [
        None,
        True,
        -1,
        1e308,
        "x",
        "",
        [],
        {},
        [1],
        {"0": 1},
        {"a": [0]},
        {"background": 0, "x": [1, "y"]},
        [[]],
        {"background": [0], "a": 1},
        {"background": False, "a": True},
        {"train": "abc", "val": []},
        [{"train": 1}],
    ]
    meta = json.loads((folder / "dataset.json").read_text())
    for key in rng.permutation([*meta, "regions_class_order", "dataset"])[:3]:
        meta[str(key)] = pool[rng.integers(len(pool))]
    (folder / "dataset.json").write_text(json.dumps(meta))
    (folder / "splits_final.json").write_text(json.dumps(pool[rng.integers(len(pool))]))
    check_raw_dataset(folder)


# Several data sets


def test_several_sets_and_their_numbers(tmp_path):
    good(tmp_path / NAME, train=3, test=0)
    good(tmp_path / "Dataset008_Other", train=3, test=0, seed=1)
    (tmp_path / "notes").mkdir()
    report = check_raw_dataset(tmp_path)
    assert report.clean and report.sets == (NAME, "Dataset008_Other") and report.cases == 6
    (tmp_path / "Dataset008_Other").rename(tmp_path / "Dataset007_Other")
    report = check_raw_dataset(tmp_path)
    assert set(report.table.code) == {"dataset-number"} and len(report.table) == 2


def test_the_same_scans_in_two_label_groups_are_no_fault(tmp_path):
    good(tmp_path / "Dataset551_GroupA", train=3, test=0)
    good(tmp_path / "Dataset552_GroupB", train=3, test=0)
    assert check_raw_dataset(tmp_path).table.empty


def test_other_sets_are_read_where_one_is_beyond_help(tmp_path):
    no_dataset_json(good(tmp_path / NAME))
    undeclared_value(good(tmp_path / "Dataset008_Other", seed=1))
    report = check_raw_dataset(tmp_path)
    assert set(report.table.code) == {"dataset-missing", "label-undeclared"}
    assert "voxels of Dataset007_MiniDemoCT were not read" in report.text()


def test_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        check_raw_dataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither dataset.json nor DatasetXXX_NAME"):
        check_raw_dataset(tmp_path)
    (tmp_path / "Dataset009_Empty").mkdir()
    assert set(check_raw_dataset(tmp_path).table.code) == {"dataset-missing", "folder-missing"}


def test_workers_change_nothing(copy_of):
    folder = copy_of()
    for name in ("undeclared_value", "nan_in_image", "wrong_number"):
        DAMAGES[name][0](folder)
    one, two = check_raw_dataset(folder), check_raw_dataset(folder, workers=2)
    assert one.table.equals(two.table) and len(one.table) == 3


def test_task_of_the_registry(healthy, copy_of):
    assert check_raw_dataset(healthy(), dataset=DEMO).table.empty
    report = check_raw_dataset(healthy(), dataset=replace(DEMO, labels={"lesion": 1, "liver": 2}))
    assert found(report) == {("labels-task", "dataset.json")}
    folder = copy_of(channels=("some name",))
    edit(folder / IMAGE, lambda v: (v + 1024).astype(np.uint16))
    assert found(check_raw_dataset(folder)) == set()
    told = {("hu-range", IMAGE), ("labels-task", "dataset.json")}
    assert found(check_raw_dataset(folder, dataset=DEMO)) == told, "the task says that it is CT, dataset.json does not"
    good(folder.parent / "Dataset008_Other", train=3, test=0, seed=1)
    assert check_raw_dataset(folder.parent, dataset=DEMO).sets == (NAME,)
    with pytest.raises(FileNotFoundError, match="does not hold Dataset009_MiniDemoCT"):
        check_raw_dataset(folder.parent, dataset=replace(DEMO, dataset=9))


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_other_formats(tmp_path, ending):
    itk = pytest.importorskip("SimpleITK")
    folder = good(tmp_path / NAME)
    for path in sorted(folder.glob("*T[rs]/*.nii.gz")):
        itk.WriteImage(itk.ReadImage(str(path)), str(path).removesuffix(".nii.gz") + ending, ending == ".mha")
        path.unlink()
    edit_json(folder / "dataset.json", file_ending=ending)
    assert check_raw_dataset(folder).table.empty
    image, label = folder / f"imagesTr/case_1_0000{ending}", folder / f"labelsTr/case_1{ending}"
    voxels = itk.ReadImage(str(label))
    voxels[0, 0, 0] = 9
    itk.WriteImage(voxels, str(label))
    image.write_bytes(image.read_bytes()[:-100])
    report = check_raw_dataset(folder)
    assert ("label-undeclared", f"labelsTr/case_1{ending}") in found(report)
    assert f"imagesTr/case_1_0000{ending}" in set(report.table[report.table.severity == "error"].file)


# Leakage


def leak_pair(tmp_path, test=2):
    corpus = good(tmp_path / "corpus/Dataset900_Corpus", seed=5, test=0)
    for path in sorted(corpus.glob("*Tr/case_*")):
        path.rename(path.with_name(path.name.replace("case_", "corpus_")))
    (corpus / "splits_final.json").unlink()
    return good(tmp_path / NAME, test=test), corpus


def test_folders_that_share_nothing(tmp_path):
    folder, corpus = leak_pair(tmp_path)
    assert check_raw_dataset(folder, against=corpus).table.empty
    assert check_raw_dataset(folder, against=corpus.parent, quick=True).table.empty
    assert check_raw_dataset(folder, against=folder).table.empty, "a folder is not compared with itself"


def test_leak_by_content_under_another_name_and_type(tmp_path):
    folder, corpus = leak_pair(tmp_path)
    voxels = np.asanyarray(nibabel.load(folder / "imagesTs/case_5_0000.nii.gz").dataobj)
    save(corpus / "imagesTr/corpus_2_0000.nii.gz", voxels[::-1].astype(np.float32))
    report = check_raw_dataset(folder, against=corpus)
    assert found(report) == {("leak-content", "imagesTs/case_5_0000.nii.gz")} and not report.clean
    assert "Dataset900_Corpus/imagesTr/corpus_2_0000.nii.gz" in report.table.what[0]
    assert check_raw_dataset(folder, against=corpus, quick=True).clean, "content is not read"


def test_leak_by_id(tmp_path):
    folder, corpus = leak_pair(tmp_path)
    for path in sorted(corpus.glob("*Tr/corpus_2*")):
        path.rename(path.with_name(path.name.replace("corpus_2", "case_5")))
    for quick in (False, True):
        report = check_raw_dataset(folder, against=corpus, quick=quick)
        assert found(report) == {("leak-id", "imagesTs/case_5_0000.nii.gz")} and not report.clean


def test_a_shared_training_case_matters_where_it_is_validated_on(tmp_path):
    folder, corpus = leak_pair(tmp_path)
    shutil.copy(folder / IMAGE, corpus / "imagesTr/corpus_0_0000.nii.gz")
    report = check_raw_dataset(folder, against=corpus)
    assert found(report) == {("leak-content", IMAGE)} and report.clean
    shutil.rmtree(folder / "imagesTs")
    shutil.rmtree(folder / "labelsTs")
    assert not check_raw_dataset(folder, against=corpus).clean


def test_what_cannot_be_compared_is_said(tmp_path):
    folder, corpus = leak_pair(tmp_path)
    (corpus / "imagesTr/corpus_0_0000.nii.gz").write_bytes(b"")
    assert found(check_raw_dataset(folder, against=corpus)) == {("against-unread", "imagesTr/corpus_0_0000.nii.gz")}


# Mending


def hashes(folder):
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


MENDED = {
    "wrong_number": "num-training",
    "other_ending": "file-ending",
    "named_gz_but_plain": "file-compression",
    "plain_too_long": "trailing-bytes",
    "gz_followed_by_text": "trailing-bytes",
    "qform_moved": "forms-disagree",
    "qform_not_a_number": "forms-disagree",
    "pixdim_of_another_scan": "forms-disagree",
    "affine_of_zeros": "affine-invalid",
    "affine_not_a_number": "affine-invalid",
    "pixdim_zero": "pixdim-invalid",
    "pixdim_negative": "pixdim-invalid",
    "in_metres": "units",
    "truly_in_metres": "units-stored",
    "int64_label": "datatype-wide",
    "slope_zero": "scale-zero",
    "label_spacing_rounded": "affine-rounding",
    "almost_whole_labels": "label-rounding",
    "whole_labels_as_float": "label-float",
    "splits_name_unknown": "splits",
    "train_and_val_overlap": "splits",
    "named_twice": "splits",
    "splits_name_test_case": "splits",
}


@pytest.mark.parametrize("name", MENDED)
def test_what_is_mended_is_clean_whole_and_where_it_was(copy_of, healthy, tmp_path, name):
    function, _, options = DAMAGES[name]
    folder = copy_of(**options)
    function(folder)
    before = hashes(folder)
    mended = fix_raw_dataset(folder, tmp_path / "out")
    assert hashes(folder) == before
    assert mended.after.table.empty and mended.clean and set(mended.table.action) == {"mended"}, mended.text()
    assert set(mended.table.code) == {MENDED[name]} and MENDED[name] in mended.text()
    assert check_raw_dataset(tmp_path / "out").table.empty
    source = healthy(**options)
    for path in sorted(source.glob("*T[rs]/*")):
        truth, copy = nibabel.load(path), nibabel.load(tmp_path / "out" / path.relative_to(source))
        assert np.array_equal(copy.get_fdata(), truth.get_fdata())
        assert np.allclose(copy.affine, truth.affine, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in DAMAGES if {code for code, _ in DAMAGES[name][1]} & set(FILE_FAULTS)])
def test_readers_refuse_what_the_doctor_calls_an_error_and_nothing_else(copy_of, name):
    function, _, options = DAMAGES[name]
    folder = copy_of(**options)
    function(folder)
    table = check_raw_dataset(folder).table
    wrong = set(table.file[table.code.isin(FILE_FAULTS) & (table.severity == "error")])
    for path in sorted(folder.glob("*T[rs]/case_*")):
        place = path.relative_to(folder).as_posix()
        read = read_label if path.parent.name.startswith("labels") else read_scan
        if place in wrong:
            with pytest.raises(BadFile) as error:
                read(path)
            assert path.name in str(error.value) and "\n" not in str(error.value)
        else:
            assert read(path).voxels.ndim == 3


LEFT_OUT = [
    "image_without_label",
    "label_without_image",
    "gz_cut_in_the_voxels",
    "plain_cut",
    "no_bytes",
    "wrong_checksum",
    "text_instead",
    "link_to_nowhere",
    "four_dimensions",
    "label_of_another_shape",
    "label_moved_far",
    "in_microns",
    "complex_image",
    "slope_not_a_number",
    "undeclared_value",
    "interpolated_label",
    "nan_in_label",
    "nan_in_image",
    "constant_image",
    "infinity_in_image",
    "affine_with_bad_qform",
    "training_on_a_test_image",
    "same_id_in_train_and_test",
]


def label_moved_far(d):
    edit_bytes(d / LABEL, put("f", 292, 50.0))
    edit_bytes(d / LABEL, put("f", 268, 50.0))


def affine_with_bad_qform(d):
    edit_bytes(d / IMAGE, put("f", 256, np.nan))
    edit_bytes(d / IMAGE, put("f", 280, np.nan))


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_be_mended_is_left_out_and_named(copy_of, tmp_path, name):
    function, _, options = DAMAGES.get(name, (globals().get(name), None, {}))
    folder = copy_of(**options)
    function(folder)
    before = hashes(folder)
    mended = fix_raw_dataset(folder, tmp_path / "out")
    assert hashes(folder) == before
    gone = mended.table[mended.table.action == "left out"]
    assert set(gone.case) == {"case_1"} and mended.clean, mended.text()
    assert not list((tmp_path / "out").glob("*Tr/case_1*"))
    assert json.loads((tmp_path / "out/dataset.json").read_text())["numTraining"] == 3
    folds = json.loads((tmp_path / "out/splits_final.json").read_text())
    assert all("case_1" not in fold[side] for fold in folds for side in fold)
    same = {file: digest for file, digest in hashes(tmp_path / "out").items() if "T" in file.split("/")[0]}
    assert len(same) == 6 + 4 and all(before.get(file) == d for file, d in same.items())


@pytest.mark.parametrize("shift,kept", [(0.9, True), (1.1, False)])
def test_a_label_is_aligned_within_half_a_voxel(copy_of, tmp_path, shift, kept):
    folder = copy_of()
    affine = AFFINE.copy()
    affine[0, 3] += shift  # mm; the smallest voxel is 2 mm
    save(folder / LABEL, np.asanyarray(nibabel.load(folder / LABEL).dataobj), affine)
    assert found(check_raw_dataset(folder)) == {("affine-mismatch", LABEL)}
    mended = fix_raw_dataset(folder, tmp_path / "out")
    assert (tmp_path / "out" / LABEL).exists() == kept and mended.clean
    if kept:
        assert np.array_equal(nibabel.load(tmp_path / "out" / LABEL).affine, AFFINE)
    assert fix_raw_dataset(folder, tmp_path / "more", tolerance=1.0).table.action.tolist() == ["mended"]


def test_an_axis_of_length_one_is_dropped(copy_of, healthy, tmp_path):
    folder = copy_of()
    edit(folder / IMAGE, lambda v: v[..., None])
    mended = fix_raw_dataset(folder, tmp_path / "out")
    assert mended.table.code.tolist() == ["dimensions"] and mended.after.table.empty
    copy = nibabel.load(tmp_path / "out" / IMAGE)
    assert copy.shape == SHAPE and np.array_equal(copy.get_fdata(), nibabel.load(healthy() / IMAGE).get_fdata())


def test_a_second_fault_behind_the_first_takes_the_case_out(copy_of, tmp_path):
    folder = copy_of()
    edit(folder / IMAGE, as_float(np.nan))
    (folder / IMAGE).write_bytes(gzip.decompress((folder / IMAGE).read_bytes()))
    assert found(check_raw_dataset(folder)) == {("file-compression", IMAGE)}
    mended = fix_raw_dataset(folder, tmp_path / "out")
    assert mended.clean and not (tmp_path / "out" / IMAGE).exists() and not (tmp_path / "out" / LABEL).exists()
    assert "image-nan" in set(mended.table.code)


def test_a_copy_shares_nothing_with_the_originals(copy_of, tmp_path):
    folder = copy_of()
    target = tmp_path / "elsewhere.nii.gz"
    (folder / IMAGE).rename(target)
    (folder / IMAGE).symlink_to(target)
    before = hashes(folder)
    fix_raw_dataset(folder, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*.*"):
        assert not path.is_symlink() and path.stat().st_nlink == 1
        path.write_bytes(b"spoilt")
    assert hashes(folder) == before


def test_originals_are_refused_as_target(copy_of, tmp_path):
    folder = copy_of()
    before = hashes(folder)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("mine")
    for out in (folder, folder / "mended", folder / "imagesTr", tmp_path / "link/mended", folder / "../" / NAME, tmp_path):
        with pytest.raises(ValueError, match="originals are never touched"):
            fix_raw_dataset(folder, out)
    with pytest.raises(FileExistsError, match="not empty"):
        fix_raw_dataset(folder, tmp_path / "full")
    assert hashes(folder) == before and (tmp_path / "full/precious.txt").read_text() == "mine"


def test_a_data_set_that_cannot_be_understood_is_left_out_whole(tmp_path):
    no_labels(good(tmp_path / "raw" / NAME))
    undeclared_value(good(tmp_path / "raw/Dataset008_Other", seed=1))
    mended = fix_raw_dataset(tmp_path / "raw", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Dataset008_Other"]
    assert mended.clean and mended.after.sets == ("Dataset008_Other",)
    assert "the whole data set" in mended.text() and "label-undeclared" in mended.text()
    nothing = fix_raw_dataset(tmp_path / "raw" / NAME, tmp_path / "none")
    assert nothing.after.sets == () and "no data set could be copied" in nothing.after.text()


def test_fix_takes_a_report_that_is_there(copy_of, tmp_path, monkeypatch):
    folder = copy_of()
    undeclared_value(folder)
    report = check_raw_dataset(folder)
    with pytest.raises(ValueError, match="headers only"):
        fix_raw_dataset(folder, tmp_path / "out", report=check_raw_dataset(folder, quick=True))
    with pytest.raises(ValueError, match="not of"):
        fix_raw_dataset(folder, tmp_path / "out", report=replace(report, sets=("Dataset001_Other",)))
    asked = []
    monkeypatch.setattr(module, "check_raw_dataset", lambda data, **options: asked.append(data) or check_raw_dataset(data, **options))
    assert fix_raw_dataset(folder, tmp_path / "out", report=report).clean
    assert len(asked) == 1 and asked[0] != folder, "the copy alone is examined"


def test_a_killed_fix_leaves_nothing(copy_of, tmp_path, monkeypatch):
    folder = copy_of()

    def explode(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "recheck_copy", explode)
    with pytest.raises(KeyboardInterrupt):
        fix_raw_dataset(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
