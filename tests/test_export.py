"Exported models against the network itself, ONNX Runtime, OpenVINO, torch.export and `predict`"

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim

from mednext_v2.cli import main
from mednext_v2.core import root
from mednext_v2.inference.predictor import PredictSettings, label_image, label_volume, load_ensemble, network_input, predict
from mednext_v2.integrations import consumer, export
from mednext_v2.integrations.export import export_model
from mednext_v2.models.card import Card, save_model
from mednext_v2.models.registry import create

SEEDS = root() / "data/seeds"
CT = {"schemes": ["ct"], "mean": [20.0], "std": [120.0], "low": [-500.0], "high": [400.0], "nonzero": False}
CARD = dict(
    backbone="mednext_v2_tiny",
    overrides={"width": 4, "depths": (1,) * 5, "ratios": (2,) * 5},
    in_channels=1,
    labels={"bone": 1, "fat": 2},
    groups={},
    task="toy",
    modality="CT",
    spacing=(6.0, 6.0, 6.0),
    patch=(32, 32, 32),
    normalisation=CT,
    recipe={},
)


def zscore(channels=1, nonzero=True):
    return {"schemes": ["zscore"] * channels, "nonzero": nonzero}


def save(folder, **changes):
    "A model folder with random weights, GRN included, and logits of some size"
    torch.manual_seed(0)
    card = Card(**CARD | changes)
    model = create(card.backbone, card.in_channels, card.num_classes, **card.overrides).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "grn" in name:
                parameter.normal_(std=0.2)
    save_model(folder, model, card)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A model folder, its network and its export as ONNX"
    folder = tmp_path_factory.mktemp("exported")
    model = save(folder / "model")
    export_model(folder / "model", folder / "onnx")
    return folder, model


def openvino_outputs(path, x):
    openvino = pytest.importorskip("openvino")
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]


@pytest.mark.parametrize("size", [(1, 16, 32, 48), (2, 48, 16, 32), (1, 64, 64, 16)])
def test_onnx_runtime_and_openvino_agree_with_the_network(exported, size):
    folder, model = exported
    x = torch.randn(size[0], 1, *size[1:])
    with torch.no_grad():
        expected = model(x).numpy()
    for got in (export.run_onnx(folder / "onnx/model.onnx")(x.numpy()), openvino_outputs(folder / "onnx/model.onnx", x.numpy())):
        assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max() + 1e-5


def test_sides_say_what_fits_and_others_are_refused(exported):
    onnx = pytest.importorskip("onnx")
    path = exported[0] / "onnx/model.onnx"
    onnx.checker.check_model(path)
    image = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [side.dim_param or side.dim_value for side in image] == ["n", 1, "4*x", "4*y", "4*z"]
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        export.run_onnx(path)(np.zeros((1, 1, 30, 32, 32), np.float32))


def test_the_description_names_the_model_and_its_licence(tmp_path):
    save(tmp_path / "model", licence="CC BY 4.0", provenance="a toy")
    described = export_model(tmp_path / "model", tmp_path / "out")
    assert json.loads((tmp_path / "out/export.json").read_text()) == json.loads(json.dumps(described))
    assert described["model"]["licence"] == "CC BY 4.0" and described["model"]["sha256"] == json.loads((tmp_path / "model/card.json").read_text())["sha256"]
    assert max(described["differences"].values()) < 1e-5 and len(described["differences"]) == 2


REGIONS = dict(regions={"all": (1, 2), "fat": (2,)}, class_order=(1, 2))
SETTINGS = {
    "ct": ("ctK", {}),
    "skull-stripped": ("mrP", dict(modality="MR", normalisation=zscore(), spacing=(5.0, 4.0, 6.0))),
    "thick slices": ("ctK", dict(spacing=(5.0, 5.0, 18.0), normalisation=zscore(nonzero=False), patch=(32, 32, 16))),
    "monai": ("mrP", dict(modality="MR", normalisation=zscore(), windows="monai", patch=(48, 32, 64))),
    "as stored": ("ctH", dict(normalisation={"schemes": ["none"], "nonzero": False}, spacing=(9.0, 9.0, 9.0))),
    "to unit": ("ctB", dict(normalisation={"schemes": ["rescale_to_0_1"], "nonzero": False}, spacing=(9.0, 9.0, 9.0))),
    "regions": ("ctK", REGIONS),
    "strides per axis": ("ctK", dict(overrides=CARD["overrides"] | {"strides": ((2, 2, 1), (2, 2, 2))}, spacing=(6.0, 6.0, 12.0), patch=(32, 32, 14))),
}


def predicted(folder, scans):
    "Labels of `predict`, and how clear each is: the distance of two best probabilities, or of a region's from one half"
    settings = PredictSettings(device="cpu")
    members, volume = load_ensemble(folder, settings), network_input(scans)
    probabilities = np.zeros((members[0].card.num_classes, *volume.image.shape[1:]), np.float32)
    labels = label_image(label_volume(members, volume, settings, probabilities), volume)
    ordered, margin = np.sort(probabilities, axis=0), np.ones(volume.shape, np.float32)
    margin[volume.box] = np.abs(probabilities - 0.5).min(0) if members[0].card.class_order else ordered[-1] - ordered[-2]
    return labels, volume.to_native(margin)


def assert_same_labels(folder, scans, labels):
    "Labels are those of `predict`, but where rounding decides"
    expected, margin = predicted(folder, scans)
    assert np.array_equal(np.asarray(expected.dataobj), np.asarray(predict(folder, scans, device="cpu").dataobj))
    assert np.allclose(labels.affine, expected.affine) and len(np.unique(expected.dataobj)) > 1
    differ = np.asarray(labels.dataobj) != np.asarray(expected.dataobj)
    assert differ.mean() < 1e-4 and margin[differ].max(initial=0) < 1e-4


@pytest.mark.parametrize("name", SETTINGS)
def test_labels_are_those_of_predict(tmp_path, name):
    seed, changes = SETTINGS[name]
    save(tmp_path / "model", **changes)
    scan = str(SEEDS / f"{seed}.nii.gz")
    described = export_model(tmp_path / "model", tmp_path / "out")
    assert described["sides"] == {"multiples_of": [4, 4, 2 if "strides" in name else 4]}
    weight = np.load(tmp_path / "out/weights.npy").astype(np.float32)
    network = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    assert_same_labels(tmp_path / "model", [scan], consumer.label([scan], network, weight, described))


def test_axes_units_and_channels_are_read_as_predict_does(tmp_path):
    save(tmp_path / "model", in_channels=2, modality="MR", normalisation=zscore(2))
    described = export_model(tmp_path / "model", tmp_path / "out")
    image = nib.load(SEEDS / "mrP.nii.gz")
    turned = nib.as_closest_canonical(image).as_reoriented(np.array([[1, -1], [2, 1], [0, -1]]))
    voxels, affine = turned.get_fdata(dtype=np.float32), turned.affine.copy()
    affine[:3] /= 1000
    paths = []
    for number in range(2):
        paths.append(str(tmp_path / f"scan_{number:04d}.nii.gz"))
        metres = nib.Nifti1Image(voxels ** (number + 1), affine)
        metres.header.set_xyzt_units("meter")
        metres.header.set_sform(affine, 1)
        nib.save(metres, paths[-1])
    network, weight = onnxruntime.InferenceSession(tmp_path / "out/model.onnx"), np.load(tmp_path / "out/weights.npy").astype(np.float32)
    assert_same_labels(tmp_path / "model", paths, consumer.label(paths, network, weight, described))
    other = nib.load(paths[1])  # Axes and units of its own
    for turn in ([[0, -1], [1, 1], [2, 1]], [[2, 1], [0, -1], [1, 1]]):
        flipped = other.as_reoriented(np.array(turn))
        millimetres = nib.Nifti1Image(flipped.get_fdata(dtype=np.float32), np.diag([1000, 1000, 1000, 1]) @ flipped.affine)
        millimetres.header.set_xyzt_units("mm")
        for order in (1, -1):
            nib.save(flipped if order == 1 else millimetres, tmp_path / "turned.nii.gz")
            channels = [paths[0], str(tmp_path / "turned.nii.gz")][::order]
            assert_same_labels(tmp_path / "model", channels, consumer.label(channels, network, weight, described))
    refused = [paths[:1]]
    for name, scale, shift in (("unit", 1, 0), ("moved", 1000, 0.3)):  # The same numbers in another unit, and 0.3 mm away
        affine = np.diag([scale, scale, scale, 1]) @ other.affine
        affine[0, 3] += shift
        moved = nib.Nifti1Image(other.get_fdata(dtype=np.float32), affine)
        moved.header.set_xyzt_units("mm")
        nib.save(moved, tmp_path / f"{name}.nii.gz")
        refused.append([paths[0], str(tmp_path / f"{name}.nii.gz")])
    for channels in refused:
        with pytest.raises(SystemExit, match=r"2 3D scan\(s\) on one grid are needed"):
            consumer.label(channels, network, weight, described)


def test_the_script_needs_three_packages(exported, tmp_path):
    folder, _ = exported
    block = "import sys, runpy; sys.modules.update(torch=None, scipy=None, mednext_v2=None, pandas=None)"
    code = f"{block}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    scan = str(SEEDS / "ctK.nii.gz")
    subprocess.run([sys.executable, "-c", code, str(folder / "onnx/predict.py"), scan, str(tmp_path / "labels.nii.gz")], check=True, cwd=tmp_path)
    assert_same_labels(folder / "model", [scan], nib.load(tmp_path / "labels.nii.gz"))


def test_the_script_refuses_before_the_network_runs_and_loses_nothing(exported, tmp_path, capsys, monkeypatch):
    def run(*arguments):
        "Exit code (0 without an exit) and what was said"
        try:
            consumer.main([str(each) for each in arguments], exported[0] / "onnx")
            code = 0
        except SystemExit as end:
            code = end.code
        return (1, code) if isinstance(code, str) else (code or 0, "".join(capsys.readouterr()))

    whole = (SEEDS / "ctK.nii.gz").read_bytes()
    scan, link, broken, other = (tmp_path / name for name in ("same.nii.gz", "link.nii.gz", "broken.nii.gz", "other.mgz"))
    scan.write_bytes(whole)
    link.symlink_to(scan)
    broken.write_bytes(whole[: len(whole) // 2])
    nib.save(nib.MGHImage(np.zeros((4, 4, 4), np.float32), np.eye(4)), other)
    code, said = run("--help")
    assert code == 0 and "--overwrite" in said
    assert run(scan)[0] == 2
    with monkeypatch.context() as patch:
        patch.setattr(consumer, "slide", lambda *_: pytest.fail("the network ran"))
        out = tmp_path / "new/deep/labels.nii.gz"
        for arguments, told in (
            ((scan, scan), "is one of the scans"),
            ((scan, scan, "--overwrite"), "is one of the scans"),
            ((scan, link, "--overwrite"), "is one of the scans"),
            ((scan, broken), "is there already"),
            ((scan, tmp_path / "labels.png"), r"ends in .nii.gz or .nii"),
            ((scan, tmp_path), r"ends in .nii.gz or .nii"),
            ((scan, scan / "labels.nii"), "cannot be made"),
            ((tmp_path / "none.nii.gz", out), "none.nii.gz: there is no such file"),
            ((broken, out), "broken.nii.gz cannot be read"),
            ((other, out), "other.mgz cannot be read"),
            ((scan, link, out), "1 3D scan"),
        ):
            code, said = run(*arguments)
            assert code == 1 and told in said and "\n" not in said, (arguments, said)
    assert scan.read_bytes() == whole and broken.read_bytes() == whole[: len(whole) // 2]
    assert run(scan, out) == (0, "") and [path.name for path in out.parent.iterdir()] == [out.name]
    first = np.asarray(nib.load(out).dataobj)
    out.write_bytes(b"older")
    assert run(scan, "--overwrite", out)[0] == 0 and np.array_equal(np.asarray(nib.load(out).dataobj), first)


@pytest.mark.parametrize("backbone, overrides, patch, free", [
    ("unet", {"filters": (4, 8, 8)}, (16, 16, 16), True),
    ("unetr", {"hidden_size": 24, "mlp_dim": 24, "num_heads": 2, "feature_size": 4}, (32, 32, 32), False),
])  # fmt: skip
def test_other_networks_are_exported_as_they_can_be(tmp_path, backbone, overrides, patch, free):
    model = save(tmp_path / "model", backbone=backbone, overrides=overrides | ({} if free else {"patch": patch}), patch=patch)
    described = export_model(tmp_path / "model", tmp_path / "out")
    assert ("multiples_of" in described["sides"]) is free
    x = torch.randn(1, 1, *patch)
    with torch.no_grad():
        expected = model(x).numpy()
    assert np.abs(export.run_onnx(tmp_path / "out/model.onnx")(x.numpy()) - expected).max() < 1e-4 * np.abs(expected).max()


def test_one_head_of_several(tmp_path):
    head = dict(labels={"bone": 1}, groups={}, modality="CT", spacing=(6.0, 6.0, 6.0), normalisation=CT)
    heads = {"one": head | {"outputs": (0, 1)}, "two": head | {"labels": {"fat": 1}, "outputs": (2, 3)}}
    model = save(tmp_path / "model", heads=heads)
    with pytest.raises(ValueError, match="a head for each of one, two: name one"):
        export_model(tmp_path / "model", tmp_path / "out")
    described = export_model(tmp_path / "model", tmp_path / "out", head="two")
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        expected = model(x)[:, 2:].numpy()
    assert described["labels"] == {"fat": 1} and described["outputs"] == 2
    assert np.abs(export.run_onnx(tmp_path / "out/model.onnx")(x.numpy()) - expected).max() < 1e-5


def test_an_exported_program_takes_other_sizes_and_refuses_wrong_ones(exported):
    folder, model = exported
    described = export_model(folder / "model", folder / "torch", format="torch")
    module = torch.export.load(folder / "torch/model.pt2").module()
    x = torch.randn(3, 1, 32, 48, 64)
    with torch.no_grad():
        assert torch.allclose(module(x), model(x), atol=1e-5)
    with pytest.raises(AssertionError, match="Guard failed"):
        module(torch.zeros(1, 1, 30, 32, 32))
    assert described["file"]["name"] == "model.pt2" and not (folder / "torch/predict.py").exists()


def test_a_plain_dim_explains_itself(exported):
    _, model = exported
    x = (torch.zeros(1, 1, 32, 32, 32),)
    with pytest.raises(Exception) as caught:
        torch.export.export(model, x, dynamic_shapes={"x": {2: Dim("X")}})
    lines = str(caught.value).splitlines()
    assert lines[1].endswith("(L['x'].size()[2] % 4) == 0.") and "X = 4*_X" in str(caught.value)
    program = torch.export.export(model, x, dynamic_shapes={"x": {2: model.stride * Dim("X", min=2)}})
    assert program.module()(torch.zeros(1, 1, 64, 32, 32)).shape == (1, 3, 64, 32, 32)


def test_a_wrong_export_never_appears(exported, tmp_path, monkeypatch):
    folder, _ = exported
    monkeypatch.setitem(export.FORMATS, "onnx", ("model.onnx", export.write_onnx, lambda path: lambda x: export.run_onnx(path)(x) * 1.01))
    with pytest.warns(UserWarning, match="no export with free sides"), pytest.raises(ValueError, match="differs from the model at size"):
        export_model(folder / "model", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_said_in_one_line(exported, tmp_path, monkeypatch):
    folder, _ = exported
    with pytest.raises(ValueError, match="format must be onnx or torch, got 'coreml'"):
        export_model(folder / "model", tmp_path / "out", format="coreml")
    with pytest.raises(FileNotFoundError, match="is not a model folder"):
        export_model(tmp_path / "absent", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'mednext_v2\[export\]'"):
        export_model(folder / "model", tmp_path / "out")


def test_the_command_says_what_was_written_and_how_to_run_it(exported, tmp_path, capsys):
    main(["export", str(exported[0] / "model"), str(tmp_path / "out")])
    assert "sides multiples of 4x4x4, differs by at most" in (said := capsys.readouterr().out) and "next: python" in said
    main(["bundle", str(exported[0] / "model"), str(tmp_path / "bundle")])
    assert "docs/README.md" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is no bundle"):
        main(["bundle", str(exported[0] / "model"), str(tmp_path / "out")])
