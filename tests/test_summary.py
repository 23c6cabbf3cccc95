"Statistics and pictures of label maps: by hand, read back by Pillow, whatever the axes of the file"

import json

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mednext_v2 import cli
from mednext_v2.data.scans import BadFile, read_label, read_scan, write_volume
from mednext_v2.inference.files import colour
from mednext_v2.inference.summary import draw_slice, encode_png, label_statistics, summarise_predictions, write_preview
from model_toys import save_unet

AFFINE = np.diag([2.0, 3.0, 5.0, 1.0])


@pytest.fixture
def files(tmp_path):
    "A scan whose values grow towards the patient's right, and a box of label 2 there, in the upper front"
    scan = np.broadcast_to(np.arange(20.0)[:, None, None], (20, 18, 16)).astype(np.float32).copy()
    labels = np.zeros(scan.shape, np.uint8)
    labels[15:18, 12:16, 11:15] = 2
    for name, values in (("scan", scan), ("labels", labels)):
        write_volume(tmp_path / f"{name}.nii.gz", values, AFFINE)
    return tmp_path


def test_statistics_by_hand(files):
    table = label_statistics(read_label(files / "labels.nii.gz"), read_scan(files / "scan.nii.gz"), {1: "core", 2: "rim"})
    assert table.label.tolist() == ["core", "rim"] and table.voxels.tolist() == [0, 48]
    assert table.ml.tolist() == pytest.approx([0, 48 * 30 / 1000]) and np.isnan(table["mean"][0]) and table["mean"][1] == pytest.approx(16)


@pytest.mark.parametrize("turned", [False, True])
def test_the_patients_right_is_on_the_left_and_up_is_up(files, turned):
    labels, scan = files / "labels.nii.gz", files / "scan.nii.gz"
    if turned:  # The same in other axes of the file
        for path in (labels, scan):
            nibabel.save(nibabel.load(path).as_reoriented([[2, -1], [0, 1], [1, -1]]), path)
    for axis, up in ((1, True), (2, True), (0, True)):
        pixels = draw_slice(read_label(labels), read_scan(scan), axis, (0, 1e6)).astype(int)  # All black but the label
        rows, columns = np.nonzero(pixels.sum(2))
        middle = np.array(pixels.shape[:2]) / 2
        assert (rows.mean() < middle[0]) == up and columns.mean() < middle[1], axis
        assert pixels[rows[0], columns[0]].tolist() == (0.45 * np.array(colour(2))).astype(int).tolist()


def test_pillow_reads_the_picture(files):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, 3)).astype(np.uint8)
    (files / "noise.png").write_bytes(encode_png(pixels))
    with Image.open(files / "noise.png") as picture:
        picture.verify()
    assert np.array_equal(np.asarray(Image.open(files / "noise.png")), pixels)
    path = write_preview(read_label(files / "labels.nii.gz"), read_scan(files / "scan.nii.gz"), files / "seen.png")
    assert Image.open(path).height == 320


def test_command_writes_both(tmp_path, capsys):
    torch.manual_seed(0)
    save_unet(tmp_path / "model")
    values = np.random.default_rng(0).normal(size=(20, 18, 16)).astype(np.float32)
    write_volume(tmp_path / "a.nii.gz", values, np.diag([2.0, 2.0, 2.0, 1.0]))
    line = f"predict -m {tmp_path / 'model'} -i {tmp_path / 'a.nii.gz'} -o {tmp_path / 'out.nii.gz'} --device cpu --statistics --preview --json"
    cli.main(line.split())
    answer = json.loads(capsys.readouterr().out)
    table = pd.read_csv(tmp_path / "out_statistics.csv")
    labels = np.asarray(nibabel.load(tmp_path / "out.nii.gz").dataobj)
    assert table.voxels.tolist() == [int((labels == value).sum()) for value in (1, 2)] == [row["voxels"] for row in answer["statistics"]]
    assert table["mean"][0] == pytest.approx(values[labels == 1].mean(), rel=1e-4) and (tmp_path / "out.png").is_file()


def test_a_label_map_of_another_scan_is_refused(files):
    save_unet(files / "model")
    write_volume(files / "other.nii.gz", np.zeros((9, 9, 9), np.float32), AFFINE)
    with pytest.raises(BadFile, match="labels.nii.gz|other.nii.gz"):
        summarise_predictions([files / "model"], files / "other.nii.gz", files / "labels.nii.gz")


def test_a_scan_that_fails_leaves_the_others_with_their_statistics(tmp_path, capsys):
    save_unet(tmp_path / "model")
    values = np.random.default_rng(0).normal(size=(20, 18, 16)).astype(np.float32)
    (tmp_path / "scans").mkdir()
    write_volume(tmp_path / "scans/a_0000.nii.gz", values, np.diag([2.0, 2.0, 2.0, 1.0]))
    (tmp_path / "scans/b_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(SystemExit, match="1 of 2 failed, the others are done"):
        cli.main(f"predict -m {tmp_path / 'model'} -i {tmp_path / 'scans'} -o {tmp_path / 'out'} --device cpu --statistics".split())
    assert set(pd.read_csv(tmp_path / "out/statistics.csv").case) == {"a"}
    (tmp_path / "scans/a_0000.nii.gz").unlink()
    with pytest.raises(SystemExit, match="1 of 1 failed:"):
        cli.main(f"predict -m {tmp_path / 'model'} -i {tmp_path / 'scans'} -o {tmp_path / 'none'} --device cpu".split())
    with pytest.raises(SystemExit, match=r"is not a model folder; did you mean .*model\?"):
        cli.main(f"predict -m {tmp_path} -i {tmp_path / 'scans'} -o {tmp_path / 'none'} --device cpu".split())
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        cli.main(["evaluate", str(tmp_path / "nowhere"), str(tmp_path / "scans")])
