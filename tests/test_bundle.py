"Bundles run by MONAI itself: labels against `predict`, Dice against ours, training and fine-tuning"

import json
import logging
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai import bundle as monai_bundle
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from mednext_v2.cli import main
from mednext_v2.core import root
from mednext_v2.data.scans import read_label, write_volume
from mednext_v2.evaluation.metrics import dice
from mednext_v2.inference.predictor import predict
from mednext_v2.integrations.bundle import write_bundle
from mednext_v2.integrations.monai import PrepareScand, case_items, label_name
from mednext_v2.models.card import Card, save_model
from mednext_v2.models.registry import create, load_model
from test_training_sets import BELLY, CHEST, write_raw

pytest.importorskip("ignite")
SEEDS = root() / "data/seeds"
CT = {"schemes": ["ct"], "mean": [-500.0], "std": [300.0], "low": [-1000.0], "high": [1000.0], "nonzero": False}
CARD = dict(
    backbone="mednext_v2_tiny",
    overrides={"width": 4, "depths": (1, 1, 1), "ratios": (2, 2, 2)},
    in_channels=1,
    labels=CHEST.labels,
    groups={},
    task="chest",
    modality="CT",
    spacing=(1.0, 1.0, 1.0),
    patch=(16, 16, 16),
    normalisation=CT,
    recipe={},
    mirror_axes=(0, 1),
)


def save(folder, **changes):
    torch.manual_seed(0)
    card = Card(**CARD | changes)
    save_model(folder, create(card.backbone, card.in_channels, card.num_classes, **card.overrides), card)
    return card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A model, its bundle and two raw data sets"
    folder = tmp_path_factory.mktemp("bundle")
    save(folder / "model")
    write_bundle(folder / "model", folder / "bundle")
    for one in (CHEST, BELLY):
        write_raw(one, folder / "raw")
        raw = folder / "raw" / one.folder
        for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
            (raw / f"{kind}Ts").mkdir()
            for number in range(2):
                (raw / f"{kind}Ts/{one.name}_t{number}{ending}").write_bytes((raw / f"{kind}Tr/{one.name}_{number}{ending}").read_bytes())
    return folder


def run(made, configs, monkeypatch, **overrides):
    "`monai.bundle.run` in the bundle's folder"
    monkeypatch.chdir(made / "bundle")
    logging.disable(logging.CRITICAL)
    try:
        monai_bundle.run(config_file=[f"configs/{name}.json" for name in configs], meta_file="configs/metadata.json", logging_file=False, **overrides)
    finally:
        logging.disable(logging.NOTSET)


def test_monai_labels_scans_as_predict_does(made, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("ctK", "mrP"):
        (scans / f"{name}_0000.nii.gz").write_bytes((SEEDS / f"{name}.nii.gz").read_bytes())
    save(tmp_path / "model", spacing=(6.0, 5.0, 7.0), patch=(16, 20, 24), normalisation={"schemes": ["zscore"], "nonzero": True}, modality="MR")
    write_bundle(tmp_path / "model", tmp_path / "bundle")
    options = ["--config_file", "configs/inference.json", "--dataset_dir", str(scans), "--output_dir", str(tmp_path / "labels")]
    subprocess.run([sys.executable, "-m", "monai.bundle", "run", *options, "--device", "$torch.device('cpu')"], cwd=tmp_path / "bundle", check=True)
    for name in ("ctK", "mrP"):
        got, expected = read_label(tmp_path / f"labels/{name}.nii.gz"), predict(tmp_path / "model", SEEDS / f"{name}.nii.gz", device="cpu")
        assert got.header.shape == expected.shape and np.allclose(got.header.affine, expected.affine, atol=1e-5)
        native = got.to_native(got.voxels)
        assert len(np.unique(native)) > 1 and np.array_equal(native, np.asarray(expected.dataobj))
    (tmp_path / "truth").mkdir()
    for name in ("ctK", "mrP"):
        (tmp_path / f"truth/{name}.nii.gz").write_bytes((tmp_path / f"labels/{name}.nii.gz").read_bytes())
    main(["evaluate", str(tmp_path / "labels"), str(tmp_path / "truth"), "--task", str(made / "raw" / CHEST.folder / "dataset.json")])


def write_channels(folder, name, axes, shape=(20, 18, 16), unit="mm", flipped=False):
    "A scan of two channels in these axes, voxels of 2 x 2 x 3 mm; the second may be stored the other way round"
    folder.mkdir(parents=True, exist_ok=True)
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    affine, scale = np.diag([2.0, 2.0, 3.0, 1.0]), {"mm": 1, "meter": 1000, "micron": 0.001}[unit]
    rng = np.random.default_rng(7)
    for channel in range(2):
        voxels, stored = rng.normal(size=shape).astype("f4"), affine
        if flipped and channel:
            voxels, stored = voxels[::-1], affine @ np.array([[-1, 0, 0, shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        ending = f"_{channel:04}.nii.gz"
        image = nib.Nifti1Image(apply_orientation(voxels, turn), np.diag([1 / scale] * 3 + [1]) @ stored @ inv_ornt_aff(turn, shape))
        image.header.set_xyzt_units(unit)
        nib.save(image, folder / f"{name}{ending}")


READ = {
    **{axes: dict(axes=axes) for axes in ("RAS", "LPS", "PIR", "ASL", "SAR")},
    "one_slice": dict(axes="RAS", shape=(20, 18, 1)),
    "one_sagittal_slice": dict(axes="SAR", shape=(1, 18, 16)),
    "metres": dict(axes="RAS", unit="meter"),
    "microns": dict(axes="PIR", unit="micron"),
    "flipped": dict(axes="RAS", flipped=True),
}
TWO = dict(in_channels=2, spacing=(2.5, 2.0, 2.0), patch=(16, 16, 16), normalisation={"schemes": ["zscore", "zscore"], "nonzero": True}, modality="MR")


@pytest.fixture(scope="module")
def two_channels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save(folder / "model", **TWO)
    write_bundle(folder / "model", folder / "bundle")
    for name, how in READ.items():
        write_channels(folder / "scans", name, **how)
    return folder


def test_scans_are_read_and_written_as_predict_does(two_channels, tmp_path, monkeypatch):
    run(two_channels, ["inference"], monkeypatch, dataset_dir=str(two_channels / "scans"), output_dir=str(tmp_path))
    for name in READ:
        got, files = nib.load(tmp_path / f"{name}.nii.gz"), [two_channels / f"scans/{name}_{channel:04}.nii.gz" for channel in range(2)]
        expected = predict(two_channels / "model", files, device="cpu")
        assert got.shape == expected.shape and len(np.unique(expected.dataobj)) > 1 and got.get_data_dtype() == expected.get_data_dtype(), name
        assert np.array_equal(np.asarray(got.dataobj), np.asarray(expected.dataobj)), name
        assert np.allclose(got.affine, expected.affine, atol=1e-4) and got.header.get_xyzt_units()[0] == "mm", name


def test_evaluation_takes_scans_in_any_axes(two_channels, tmp_path, monkeypatch):
    raw = tmp_path / "Dataset101_Two"
    for name in ("PIR", "metres", "one_slice"):
        write_channels(raw / "imagesTs", name, **READ[name])
        write_channels(raw / "imagesTr", f"{name}tr", **READ[name])
        files = [raw / f"imagesTs/{name}_{channel:04}.nii.gz" for channel in range(2)]
        for part, case in (("labelsTs", name), ("labelsTr", f"{name}tr")):
            (raw / part).mkdir(exist_ok=True)
            nib.save(predict(two_channels / "model", files, device="cpu"), raw / part / f"{case}.nii.gz")
    about = {"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, **CHEST.labels}, "numTraining": 3, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(about))
    run(two_channels, ["evaluate"], monkeypatch, dataset_dir=str(raw), output_dir=str(tmp_path / "out"))
    found = pd.read_csv(tmp_path / "out/val_mean_dice_raw.csv").set_index("filename").to_numpy()
    assert len(found) == 3 and (found[~np.isnan(found)] == 1).all() and (found == 1).any(axis=1).all()


def test_what_predict_refuses_is_refused_before_a_scan_is_labelled(two_channels, tmp_path, monkeypatch):
    write_channels(tmp_path / "scans", "a", "RAS")
    write_channels(tmp_path / "scans", "b", "RAS")
    path = tmp_path / "scans/b_0001.nii.gz"
    image = nib.load(path)
    for wrong, said in (
        (nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine), "the further axes can be dropped"),
        (nib.Nifti1Image(np.asarray(image.dataobj), image.affine + np.outer([5, 0, 0, 0], [0, 0, 0, 1])), "lies on another grid than"),
    ):
        nib.save(wrong, path)
        with pytest.raises(RuntimeError) as caught:
            run(two_channels, ["inference"], monkeypatch, dataset_dir=str(tmp_path / "scans"), output_dir=str(tmp_path / "out"))
        assert said in str(caught.value.__cause__) and "b_0001" in str(caught.value.__cause__)
        assert not (tmp_path / "out").exists()


def test_label_maps_are_named_as_by_predict_and_never_among_the_scans(made, tmp_path, monkeypatch):
    for name, case in (("a.v1_0000", "a.v1"), ("b_2023", "b_2023"), ("c", "c")):
        assert label_name({"filename_or_obj": f"scans/{name}.nii.gz"}, None) == {"subject": f"{case}.nii.gz"}
    (tmp_path / "ctK.nii.gz").write_bytes((SEEDS / "ctK.nii.gz").read_bytes())
    raw = made / "raw" / CHEST.folder
    for config, data, out in (("inference", tmp_path, tmp_path), ("evaluate", raw, raw / "imagesTs"), ("evaluate", raw, raw / "labelsTs")):
        with pytest.raises(RuntimeError) as caught:
            run(made, [config], monkeypatch, dataset_dir=str(data), output_dir=str(out))
        assert "choose another output_dir" in str(caught.value.__cause__)
    assert (tmp_path / "ctK.nii.gz").read_bytes() == (SEEDS / "ctK.nii.gz").read_bytes()


def test_dice_of_the_bundle_is_ours(made, monkeypatch, tmp_path):
    data = made / "raw" / CHEST.folder
    run(made, ["evaluate"], monkeypatch, dataset_dir=str(data), output_dir=str(tmp_path))
    table = pd.read_csv(tmp_path / "val_mean_dice_raw.csv").set_index("filename")
    assert len(table) == 2
    for item in case_items(data, "test"):
        truth, found = (read_label(item["label"]).voxels, read_label(tmp_path / item["label"].rpartition("/")[2]).voxels)
        row = table[[item["image"][0] in str(name) for name in table.index]].iloc[0]
        assert [row.iloc[value - 1] for value in (1, 2)] == pytest.approx([dice(found == value, truth == value) for value in (1, 2)], abs=1e-6)


def test_training_learns_and_leaves_the_weights_that_were_given(made, monkeypatch, capsys):
    before = (made / "bundle/models/model.pt").read_bytes()
    data = str(made / "raw" / CHEST.folder)
    run(made, ["train"], monkeypatch, dataset_dir=data, epochs=6, warmup=0, val_interval=3, learning_rate=1e-2)
    trained = torch.load(made / "bundle/models/model_trained.pt", weights_only=True)
    assert (made / "bundle/models/model.pt").read_bytes() == before
    given = torch.load(made / "bundle/models/model.pt", weights_only=True)
    assert set(trained) == set(given) and any(not torch.equal(trained[name], given[name]) for name in given)


def test_finetuning_starts_classes_from_those_of_the_same_name(made, monkeypatch, capsys):
    data = str(made / "raw" / BELLY.folder)
    run(made, ["train", "finetune"], monkeypatch, dataset_dir=data, epochs=1, warmup=0, val_interval=1, learning_rate=0.0)
    assert "adapted" in capsys.readouterr().out
    given, tuned = (torch.load(made / f"bundle/models/{name}.pt", weights_only=True) for name in ("model", "model_finetuned"))
    assert torch.equal(given["stem.weight"], tuned["stem.weight"])
    assert torch.equal(given["out_0.conv_out.bias"][CHEST.labels["spleen"]], tuned["out_0.conv_out.bias"][BELLY.labels["spleen"]])
    with pytest.raises(RuntimeError) as caught:
        run(made, ["train"], monkeypatch, dataset_dir=data, epochs=1)
    assert "use configs/finetune.json" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("configs", "message"),
    [("configs/inference.json", "empty holds no volume"), ("['configs/train.json','configs/finetune.json']", "empty is not named DatasetNNN_Name")],
)
def test_as_a_program_it_ends_in_one_line(made, tmp_path, configs, message):
    (tmp_path / "empty").mkdir()
    line = [sys.executable, "-m", "monai.bundle", "run", "--config_file", configs, "--logging_file", "False", "--dataset_dir", str(tmp_path / "empty")]
    done = subprocess.run(line, cwd=made / "bundle", capture_output=True, text=True)
    said = [text for text in done.stderr.splitlines() if text.startswith("mednext_v2: ")]
    assert done.returncode == 1 and len(said) == 1 and message in said[0] and "Traceback" not in done.stderr, done.stderr


def test_monai_agrees_with_what_the_metadata_says(made, monkeypatch):
    monkeypatch.chdir(made / "bundle")
    monai_bundle.verify_net_in_out("network_def", meta_file="configs/metadata.json", config_file="configs/inference.json", device="cpu")
    from monai.bundle import ConfigWorkflow

    for name, kind in (("inference", "inference"), ("train", "train")):
        data = str(made / "raw" / CHEST.folder / ("imagesTr" if name == "inference" else "."))
        flow = ConfigWorkflow(config_file=f"configs/{name}.json", meta_file="configs/metadata.json", logging_file=False, workflow_type=kind, dataset_dir=data)
        flow.initialize()
        assert not flow.check_properties()


def test_a_head_and_regions(tmp_path):
    head = dict(labels={"a": 1}, groups={}, modality="CT", spacing=(1.0, 1.0, 1.0), normalisation=CT)
    save(tmp_path / "model", labels={"one/a": 1, "two/a": 2}, heads={"one": head | {"outputs": (0, 1)}, "two": head | {"outputs": (3, 2)}})
    with pytest.raises(ValueError, match="name one"):
        write_bundle(tmp_path / "model", tmp_path / "bundle")
    write_bundle(tmp_path / "model", tmp_path / "bundle", head="two")
    network = create("mednext_v2_tiny", 1, 2, **CARD["overrides"]).eval()
    network.load_state_dict(torch.load(tmp_path / "bundle/models/model.pt", weights_only=True))
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.allclose(network(x), load_model(tmp_path / "model", head="two")[0](x), atol=1e-6)
    save(tmp_path / "regions", regions={"all": (1, 2), "part": (2,)}, class_order=(1, 2))
    write_bundle(tmp_path / "regions", tmp_path / "other")
    assert not (tmp_path / "other/configs/train.json").exists()
    assert json.loads((tmp_path / "other/configs/inference.json").read_text())["postprocessing"]["transforms"][1]["class_order"] == [1, 2]


def test_axes_that_were_not_turned_are_refused(tmp_path):
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

    write_volume(tmp_path / "scan.nii.gz", np.ones((8, 8, 8), np.float32), np.diag([-1.0, 1, 1, 1]))
    steps = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), PrepareScand("image", (1, 1, 1), CT)])
    with pytest.raises(RuntimeError) as caught:
        steps({"image": tmp_path / "scan.nii.gz"})
    assert "scan.nii.gz must be (C, X, Y, Z) in RAS" in str(caught.value.__cause__)


def test_lengths_that_monai_takes_for_mm_are_refused(tmp_path):
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd

    write_channels(tmp_path, "a", "RAS", unit="meter")
    steps = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), Orientationd("image", axcodes="RAS"), PrepareScand("image", (1, 1, 1), CT)])
    with pytest.raises(RuntimeError) as caught:
        steps({"image": tmp_path / "a_0000.nii.gz"})
    assert "has lengths in metres" in str(caught.value.__cause__)
