"""Every command that reads volumes against every fault of a file: the right result, or one line with file, fault and remedy."""

import gzip
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from mednext_v2 import cli
from mednext_v2.core import read_csv, write_csv
from mednext_v2.data.datasets import get_dataset, read_annotated, write_description
from mednext_v2.data.preprocess import Prepared
from mednext_v2.data.scans import read_label, read_scan, write_volume
from mednext_v2.models.card import Card, save_model
from mednext_v2.models.registry import create
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
    card = Card("unet", SMALL, 1, CHEST.labels, CHEST.groups, "chest", "MR", (1.0, 1.0, 1.0), (16, 16, 16), {"schemes": ("zscore",), "nonzero": False}, {})
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
    write_description(CHEST, made, 3)
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
            "finetune": [
                "-d",
                self.raw,
                "-o",
                out,
                "--backbone",
                "unet",
                "--recipe",
                "smoke",
                "--unchecked",
                "--device",
                "cpu",
                "--recipe-set",
                "steps=2",
                "patch=(16,16,16)",
                "--network",
                "filters=(4,8,8)",
            ],
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
    content = bytearray(nibabel.Nifti1Image(voxels, affine).to_bytes())
    changed = nibabel.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in header.items():
        changed[name] = value
    content[:348] = changed.binaryblock
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
OF_LABELS = [*ANY, fraction, negative, unknown_value, shifted, turned, smaller]
FAULTS = [("image", fault) for fault in (*ANY, too_large, offset)] + [("label", fault) for fault in OF_LABELS]


def concerns(command: str, part: str, fault) -> bool:
    "Whether a command reads that file, and the fault is one to it: `convert` copies intensities as they are"
    return (command, fault) != ("convert", offset) and part == {"predict": "image", "evaluate": "label"}.get(command, part)


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


# ---- MetaImage and NRRD are held to the same rules


def itk_volume(path, spacing=(1.0, 1.0, 1.0), direction=(1.0, 0, 0, 0, 1, 0, 0, 0, 1)):
    voxels = np.random.default_rng(0).integers(0, 99, (18, 18, 18)).astype(np.int16)
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    image.SetDirection(direction)
    SimpleITK.WriteImage(image, str(path))


def edit_text(path, old: bytes, new: bytes):
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("a.nrrd", lambda p: itk_volume(p, direction=(1, 0.5, 0, 0, 1, 0, 0, 0, 1)), "off right angles"),
        ("a.mha", lambda p: itk_volume(p, direction=(1, 0.5, 0, 0, 1, 0, 0, 0, 1)), "off right angles"),
        ("a.nrrd", lambda p: edit_text(p, b"space directions: (1,0,0) (0,1,0) (0,0,1)\n", b""), "no space directions"),
        ("a.nrrd", lambda p: edit_text(p, b"kinds:", b'space units: "m" "m" "m"\nkinds:'), "lengths in m"),
        ("a.mha", lambda p: edit_text(p, b"ElementSpacing = 1 1 1\n", b""), "no ElementSpacing"),
        ("a.mhd", lambda p: edit_text(p, b"DimSize = 18 18 18", b"DimSize = 18 18 0"), "shape"),
        ("a.mhd", lambda p: p.with_suffix(".raw").unlink(), "a.raw, which is missing"),
        ("a.mhd", lambda p: edit_text(p, b"a.raw", b"LIST"), "not in one file"),
        ("a.mha", lambda p: p.write_bytes(p.read_bytes()[:-2000]), "cannot be read"),
        ("A.NII.GZ", lambda p: None, "capitals"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_other_formats_are_refused_for_the_same_faults(tmp_path, model, clean, name, change, words, command):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / name
    itk_volume(tmp_path / "whole.nii.gz") if "NII" in name else itk_volume(path)
    if "NII" in name:
        (tmp_path / "whole.nii.gz").rename(path)
    change(path)
    words_of = {
        "predict": ["-m", model, "-i", path.parent, "-o", tmp_path / "out", "--device", "cpu"],
        "evaluate": [path.parent, path.parent, "--task", clean / "dataset.json", "-o", tmp_path / "out"],
    }
    with pytest.raises(SystemExit) as ended:
        cli.main([command, *map(str, words_of[command])])
    assert name in str(ended.value.code) and words in str(ended.value.code)


@pytest.mark.parametrize("command", ["predict", "prepare"])
def test_a_whole_scan_of_a_few_microns_is_refused(desk, capsys, command):
    for path in (desk.image, desk.label):
        voxels, affine = stored(path)
        rewrite(path, voxels, affine * np.array([2, 2, 2, 1]), xyzt_units=3)
    words = ["--spacing", "1", "1", "1"] if command == "prepare" else []
    out = desk.folder / command
    with pytest.raises(SystemExit) as ended:
        place = [desk.raw, out] if command == "prepare" else ["-m", desk.model, "-i", desk.image, "-o", out, "--device", "cpu"]
        cli.main([command, *map(str, place), *words])
    assert "check its voxel size and the unit" in str(ended.value.code) and CASE in str(ended.value.code)


# ---- what changed is done anew, what is not ours stays


def predict(desk, *more) -> Path:
    out = desk.folder / "map.nii.gz"
    cli.main(["predict", "-m", str(desk.model), "-i", str(desk.image), "-o", str(out), "--device", "cpu", *map(str, more)])
    return out


def test_a_mask_that_changed_is_not_taken_for_done(desk):
    mask, (voxels, affine) = desk.folder / "mask.nii.gz", stored(desk.image)
    write_volume(mask, np.ones(voxels.shape, np.uint8), affine)
    predict(desk, "--roi", mask)
    part = np.zeros(voxels.shape, np.uint8)
    part[:5] = 1
    write_volume(mask, part, affine)
    with pytest.raises(SystemExit, match="made in another way"):
        predict(desk, "--roi", mask)


@pytest.mark.parametrize("command", ["predict", "prepare"])
def test_voxels_in_a_second_file_are_part_of_a_scan(tmp_path, model, clean, command):
    raw = tmp_path / clean.name
    shutil.copytree(clean, raw)
    for path in sorted(raw.rglob("*.nii.gz")):
        image = SimpleITK.ReadImage(str(path))
        path.unlink()
        SimpleITK.WriteImage(image, str(path).replace(".nii.gz", ".mhd"))
    edit_text(raw / "dataset.json", b'".nii.gz"', b'".mhd"')
    scan, out = raw / f"imagesTr/{CASE}_0000.mhd", tmp_path / "out"
    words = [raw, out] if command == "prepare" else ["-m", model, "-i", scan, "-o", out, "--device", "cpu"]
    cli.main([command, *map(str, words)])
    before = Prepared(out).row(CASE) if command == "prepare" else None
    content = bytearray(scan.with_suffix(".raw").read_bytes())
    content[100:2000] = bytes(1900)
    scan.with_suffix(".raw").write_bytes(content)
    if command == "prepare":
        cli.main([command, *map(str, words)])
        assert Prepared(out).row(CASE) != before
    else:
        with pytest.raises(SystemExit, match="made in another way"):
            cli.main([command, *map(str, words)])


def test_counts_follow_the_names_of_the_labels(desk):
    desk.run("prepare")
    before = Prepared(desk.folder / "prepare").manifest.set_index("case")
    content = (desk.raw / "dataset.json").read_text()
    spleen, liver = '"spleen": 1', '"liver": 2'
    assert spleen in content and liver in content
    (desk.raw / "dataset.json").write_text(content.replace(spleen, '"spleen": 2').replace(liver, '"liver": 1'))
    cli.main(["prepare", str(desk.raw), str(desk.folder / "again")])
    desk.run("prepare")
    for name in ("prepare", "again"):
        after = Prepared(desk.folder / name).manifest.set_index("case")
        assert after.voxels_liver.equals(before.voxels_spleen.rename("voxels_liver"))


@pytest.mark.parametrize("ending", [".json", ".npz"])
@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--save-probabilities",)])
def test_a_file_beside_the_label_map_that_is_not_ours_stays(desk, ending, more):
    mine = desk.folder / f"map{ending}"
    mine.write_text('{"Modality": "CT"}')
    with pytest.raises(SystemExit, match=f"map{ending} is there"):
        predict(desk, *more)
    assert mine.read_text() == '{"Modality": "CT"}'


@pytest.mark.parametrize("command", ["prepare", "finetune", "doctor", "evaluate"])
def test_a_folder_named_like_a_known_data_set_must_be_that_data_set(desk, capsys, command):
    known = get_dataset("lits")
    desk.raw = desk.raw.rename(desk.raw.with_name(known.folder))
    with pytest.raises(SystemExit) as ended:
        desk.run(command)
    assert "label 'liver' is 2, the registry's lits says 1" in str(ended.value.code) + capsys.readouterr().out


def test_labels_with_blanks_can_be_listed_as_annotated(desk):
    edit_text(desk.raw / "dataset.json", b'"spleen": 1', b'"left kidney": 1')
    edit_text(desk.raw / "dataset.json", b'"spleen": "organ"', b'"left kidney": "organ"')
    write_csv(desk.raw / "annotated.csv", pd.DataFrame({"case": [CASE, "chest_2"], "annotated": ["left kidney", "left kidney; liver"]}))
    desk.run("doctor")
    desk.run("prepare")
    prepared = Prepared(desk.folder / "prepare")
    assert read_annotated(prepared.manifest, prepared.dataset) == {CASE: ("left kidney",), "chest_2": ("left kidney", "liver")}


@pytest.mark.parametrize("command", ["prepare", "finetune", "evaluate"])
def test_channels_are_numbered_from_zero(desk, command):
    edit_text(desk.raw / "dataset.json", b'"0":', b'"zero":')
    with pytest.raises(SystemExit, match="dataset.json.* channel_names .*'zero'"):
        desk.run(command)


@pytest.mark.parametrize("command", ["prepare", "finetune"])
def test_volumes_of_another_format_are_not_left_out(desk, command):
    write_volume(desk.raw / "imagesTr/more_0000.nii", *stored(desk.image))
    write_volume(desk.raw / "labelsTr/more.nii", *stored(desk.label))
    with pytest.raises(SystemExit, match="more_0000.nii|NOT CLEAN"):
        desk.run(command)


def test_a_scan_may_not_be_in_two_splits(desk):
    shutil.copy(desk.image, desk.raw / "imagesTs/chest_0_0000.nii.gz")
    with pytest.raises(SystemExit, match="is the same file as chest_1_0000.nii.gz, one in the test and one in the train split"):
        desk.run("prepare")


@pytest.mark.parametrize("name", ["scores.csv", "summary.json"])
@pytest.mark.parametrize("command", ["finetune", "evaluate"])
def test_scores_that_are_not_ours_stay(desk, command, name):
    (desk.folder / command).mkdir()
    mine = desk.folder / command / name
    mine.write_text('{"foreground_mean": {}}')
    with pytest.raises(SystemExit, match=f"{name} is there"):
        desk.run(command)
    assert mine.read_text() == '{"foreground_mean": {}}'


def test_a_file_that_is_no_table_of_findings_stays(desk):
    before = desk.image.read_bytes()
    with pytest.raises(SystemExit, match="is there and is no table"):
        cli.main(["doctor", "--data", str(desk.raw), "--csv", str(desk.image)])
    assert desk.image.read_bytes() == before
    for _ in range(2):
        cli.main(["doctor", "--data", str(desk.raw), "--csv", str(desk.folder / "found.csv")])


def test_two_label_maps_of_one_name_do_not_share_a_report(desk):
    predict(desk)
    with pytest.raises(SystemExit, match="map.json is the report of map.nii.gz"):
        scan, out = desk.raw / "imagesTr/chest_2_0000.nii.gz", desk.folder / "map.nii"
        cli.main(["predict", "-m", str(desk.model), "-i", str(scan), "-o", str(out), "--device", "cpu"])
    predict(desk)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda text: text.replace(",", ";"), "lacks the column case"),
        (lambda text: text.replace("lowest", "least"), "lacks the column lowest"),
        (lambda text: re.sub(r",-[0-9.]+,", ",abc,", text), "the row of case chest_. is damaged"),
        (lambda text: text.replace("train", "training"), "the row of case chest_. is damaged"),
        (lambda text: text + '"', "is no table as CSV holds it"),
    ],
)
def test_a_manifest_that_was_edited_is_named(desk, change, words):
    desk.run("prepare")
    manifest = desk.folder / "prepare/manifest.csv"
    manifest.write_text(change(manifest.read_text()))
    with pytest.raises(SystemExit, match=f"manifest.csv.*{words}"):
        cli.main(["train", str(desk.folder / "prepare"), str(desk.folder / "model"), "--backbone", "unet", "--recipe", "smoke"])


@pytest.mark.parametrize("words", [["--seed", "-1"], ["--seed", "9" * 20], ["--workers", "-1"]])
def test_numbers_that_cannot_be_are_refused_by_name(desk, capsys, words):
    with pytest.raises(SystemExit):
        cli.main(["train", str(desk.raw), str(desk.folder / "model"), *words])
    assert f"argument {words[0]}: '{words[1]}' is not a whole number from 0 to 4294967295" in capsys.readouterr().err


def test_groups_of_labels_are_a_mapping(desk):
    edit_text(desk.raw / "dataset.json", (desk.raw / "dataset.json").read_bytes().split(b'"groups": ')[1].split(b"}")[0] + b"}", b'["organ"]')
    with pytest.raises(SystemExit, match="groups must be a mapping of labels"):
        desk.run("prepare")
