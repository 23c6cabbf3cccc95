"""Every command that reads volumes against every fault of a file: the right result, or one line with file, fault and remedy."""

import gzip
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from mednext_v2 import cli
from mednext_v2.backbones import create
from mednext_v2.core import read_csv
from mednext_v2.prepare import Prepared
from mednext_v2.scans import read_label, read_scan, write_volume
from mednext_v2.tasks import write_dataset
from mednext_v2.weights import Card, save_model
from test_training_sets import CHEST, SMALL, write_raw

SimpleITK = pytest.importorskip("SimpleITK")
SimpleITK.ProcessObject_SetGlobalWarningDisplay(False)
CASE = "chest_1"
COMMANDS = ["prepare", "finetune", "convert", "doctor", "predict", "evaluate"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "An untrained network for the toy's two organs"
    folder = tmp_path_factory.mktemp("model") / "model"
    torch.manual_seed(0)
    net = create("unet", 1, 3, **SMALL)
    card = Card(
        "unet", SMALL, 1, CHEST.labels, CHEST.groups, "chest", "MR", (1.0, 1.0, 1.0), (16, 16, 16), {"schemes": ("zscore",), "nonzero": False}, {},
    )
    save_model(folder, net, card)
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    write_raw(CHEST, folder, cases=4)
    made = folder / CHEST.folder
    for part, tail in (("images", "_0000"), ("labels", "")):
        (made / f"{part}Ts").mkdir()
        (made / f"{part}Tr/chest_0{tail}.nii.gz").rename(made / f"{part}Ts/chest_0{tail}.nii.gz")
    write_dataset(CHEST, made, 3)
    (made / "splits_final.json").write_text('[{"train": ["chest_1", "chest_2"], "val": ["chest_3"]}]')
    return made


class Desk:
    "A copy of the data set whose files may be spoilt, and the commands that read it"

    def __init__(self, folder: Path, clean: Path, model: Path):
        self.folder, self.model, self.raw = folder, model, folder / "raw" / clean.name
        shutil.copytree(clean, self.raw)

    @property
    def image(self) -> Path:
        return self.raw / f"imagesTr/{CASE}_0000.nii.gz"

    @property
    def label(self) -> Path:
        return self.raw / f"labelsTr/{CASE}.nii.gz"

    def run(self, command: str) -> None:
        "One command over the data set, as it is typed"
        out = self.folder / command
        words = {
            "prepare": [self.raw, out],
            "finetune": ["-d", self.raw, "-o", out, "--backbone", "unet", "--recipe", "smoke", "--unchecked", "--device", "cpu",
                         "--set", "steps=2", "patch=(16,16,16)", "--network", "filters=(4,8,8)"],
            "convert": ["--dataset", "raw", self.raw, out],
            "doctor": ["--data", self.raw],
            "predict": ["-m", self.model, "-i", self.raw / "imagesTr", "-o", out, "--device", "cpu"],
            "evaluate": [self.raw / "labelsTr", self.folder / "truth", "--task", self.raw / "dataset.json", "-o", out],
        }[command]
        if command == "evaluate" and not (self.folder / "truth").exists():
            shutil.copytree(self.raw / "labelsTr", self.folder / "truth")
        cli.main([command, *map(str, words)])


@pytest.fixture
def desk(tmp_path, clean, model):
    made = Desk(tmp_path, clean, model)
    shutil.copytree(clean / "labelsTr", tmp_path / "truth")
    return made


# ---- what is at fault is refused


def stored(path: Path):
    image = nibabel.load(path)
    return np.asarray(image.dataobj), image.affine


def rewrite(path: Path, voxels, affine, **header) -> None:
    image = nibabel.Nifti1Image(voxels, affine)
    for name, value in header.items():
        image.header[name] = value
    content = bytearray(image.to_bytes())
    content[:348] = image.header.binaryblock
    path.write_bytes(gzip.compress(bytes(content)))


def colour(path):
    voxels, affine = stored(path)
    rgb = np.zeros(voxels.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, affine), path)


def complex_numbers(path):
    voxels, affine = stored(path)
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.complex64), affine), path)


def four_axes(path):
    voxels, affine = stored(path)
    nibabel.save(nibabel.Nifti1Image(np.stack([voxels, voxels], -1), affine), path)


def flat(path):
    voxels, affine = stored(path)
    nibabel.save(nibabel.Nifti1Image(voxels[..., 0], affine), path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-300])


def cut_inside(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-300]))


def empty(path):
    path.write_bytes(b"")


def web_page(path):
    path.write_text("<!DOCTYPE html><html><body>Please log in</body></html>")


def other_format(path):
    voxels, _ = stored(path)
    there = path.with_name("other.mha")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels.T), str(there))
    there.rename(path)


def broken_link(path):
    path.unlink()
    path.symlink_to(path.with_name("elsewhere"))


def folder(path):
    path.unlink()
    path.mkdir()


def huge(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))


def singular(path):
    voxels, affine = stored(path)
    rewrite(path, voxels, affine, srow_x=[0, 0, 0, 0], sform_code=1, qform_code=0)


def not_a_number(path):
    voxels, affine = stored(path)
    voxels = voxels.astype(np.float32)
    voxels[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def too_large(path):
    voxels, affine = stored(path)
    voxels = voxels.astype(np.float64)
    voxels[1, 2, 3] = 1e300
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def offset(path):
    "Small differences on a large number: float32 has one value for all"
    voxels, affine = stored(path)
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.float64) * 1e-6 + 1e6, affine), path)


def fraction(path):
    voxels, affine = stored(path)
    voxels = voxels.astype(np.float32)
    voxels[voxels == 1] = 0.99999994
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def negative(path):
    voxels, affine = stored(path)
    nibabel.save(nibabel.Nifti1Image(np.where(voxels == 1, -1, voxels.astype(np.int16)), affine), path)


def unknown_value(path):
    voxels, affine = stored(path)
    nibabel.save(nibabel.Nifti1Image(np.where(voxels == 1, 257, voxels.astype(np.int16)), affine), path)


def shifted(path):
    voxels, affine = stored(path)
    affine[0, 3] += 0.5
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def turned(path):
    voxels, affine = stored(path)
    angle = np.deg2rad(5)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def smaller(path):
    voxels, affine = stored(path)
    nibabel.save(nibabel.Nifti1Image(voxels[:-1], affine), path)


ANY = [colour, complex_numbers, four_axes, flat, cut, cut_inside, empty, web_page, other_format, broken_link, folder, huge, singular, not_a_number]
FAULTS = [("image", fault) for fault in (*ANY, too_large, offset)] + [("label", fault) for fault in (*ANY, fraction, negative, unknown_value, shifted, turned, smaller)]


def concerns(command: str, part: str, fault) -> bool:
    "Whether a command reads that file, and can know of the fault"
    return part == {"predict": "image", "evaluate": "label"}.get(command, part)


TABLE = [(c, part, fault) for c in COMMANDS for part, fault in FAULTS if concerns(c, part, fault)]


@pytest.mark.parametrize("command, part, fault", TABLE, ids=[f"{c}-{part}-{fault.__name__}" for c, part, fault in TABLE])
def test_a_faulty_file_is_named_with_its_fault(desk, capsys, command, part, fault):
    path = getattr(desk, part)
    fault(path)
    with pytest.raises(SystemExit) as ended:
        desk.run(command)
    shown = capsys.readouterr()
    text = shown.out if command == "doctor" else str(ended.value.code)
    assert ended.value.code not in (0, None)
    assert path.name in text, text
    assert "Traceback" not in shown.err + text
    lines = [line for line in text.splitlines() if path.name in line]
    assert command == "doctor" or ": " in lines[0].split(path.name, 1)[1], lines  # What is wrong, and what to do


# ---- what can be read is read


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("unit, factor", [("meter", 1e-3), ("micron", 1e3)])
def test_lengths_in_another_unit_give_what_mm_give(desk, tmp_path, capsys, command, unit, factor):
    one = Desk(tmp_path / "units", desk.raw, desk.model)
    shutil.copytree(desk.folder / "truth", one.folder / "truth")
    for path in sorted(one.raw.rglob("*.nii.gz")):
        image = nibabel.load(path)
        scale = np.diag([factor] * 3 + [1.0])
        voxels = np.asarray(image.dataobj)
        changed = nibabel.Nifti1Image(voxels, scale @ image.affine)
        changed.set_qform(scale @ image.affine, 1)
        changed.header.set_xyzt_units(unit)
        nibabel.save(changed, path)
        assert read_scan(path).spacing == pytest.approx((1, 1, 1), rel=1e-5)
    for place in (desk, one):
        place.run(command)
    same_results(command, desk, one)


def same_results(command: str, one: Desk, other: Desk) -> None:
    "What two data sets gave is equal, value by value"
    if command == "prepare":
        sets = [Prepared(place.folder / command) for place in (one, other)]
        assert list(sets[0].manifest.case) == list(sets[1].manifest.case)
        for case in sets[0].manifest.case:
            np.testing.assert_array_equal(sets[0].image(case)[:], sets[1].image(case)[:])
            np.testing.assert_array_equal(sets[0].label(case)[:], sets[1].label(case)[:])
    elif command in ("finetune", "evaluate"):
        pd.testing.assert_frame_equal(*[read_csv(place.folder / command / "scores.csv") for place in (one, other)], rtol=2e-6)
    elif command in ("predict", "convert"):
        files = [sorted((place.folder / command).rglob("*.nii.gz")) for place in (one, other)]
        assert len(files[0]) == len(files[1]) > 2
        for a, b in zip(*files):
            first, second = (read_label if command == "predict" or "labels" in str(a) else read_scan)(a), read_scan(b)
            np.testing.assert_array_equal(first.voxels, second.voxels)
            np.testing.assert_allclose(first.affine, second.affine, atol=1e-4)


@pytest.mark.parametrize("command", COMMANDS)
def test_axes_in_another_order_are_the_same_scan(desk, tmp_path, command):
    one = Desk(tmp_path / "axes", desk.raw, desk.model)
    shutil.copytree(desk.folder / "truth", one.folder / "truth")
    for part in ("imagesTr", "labelsTr"):
        for path in sorted((one.raw / part).glob("*.nii.gz")):
            image = nibabel.load(path)
            turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt("PSL"))
            nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine).as_reoriented(turn).to_filename(path)
    for place in (desk, one):
        place.run(command)
    same_results(command, desk, one)


@pytest.mark.parametrize("command", COMMANDS)
def test_hidden_files_are_no_data(desk, command):
    for place in desk.raw.rglob("*"):
        if place.is_dir():
            (place / ".DS_Store").write_bytes(b"\0\1")
            (place / f"._{CASE}_0000.nii.gz").write_bytes(b"Mac OS X")
    desk.run(command)
    assert not [path for path in (desk.folder / command).rglob("*") if "DS_Store" in path.name or path.name.startswith("._")]
