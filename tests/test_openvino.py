"Predictions that OpenVINO computes: the labels of PyTorch, by every way in"

import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from mednext_v2.cli import main
from mednext_v2.core import MissingExtra
from mednext_v2.inference import openvino
from mednext_v2.inference.predictor import PredictSettings, load_ensemble, predict
from mednext_v2.models.card import Card, save_model
from mednext_v2.models.registry import create
from model_toys import UNET_CARD, save_unet


def scan(path, shape=(24, 20, 30)):
    values = np.random.default_rng(0).normal(size=shape).cumsum(0).cumsum(1).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag((2, 2, 2, 1))), path)
    return path


def save_mednext(folder, **changes):
    torch.manual_seed(0)
    card = Card(**UNET_CARD | dict(backbone="mednext_v2_tiny", overrides={"width": 8}, mirror_axes=(0, 1), patch=(32, 32, 32)) | changes)
    save_model(folder, create("mednext_v2_tiny", card.in_channels, card.num_classes, width=8), card)
    return folder


@pytest.mark.parametrize("save", [save_unet, save_mednext])
@pytest.mark.parametrize("more", [[], ["--tta"]], ids=["once", "mirrored"])
def test_labels_are_those_of_pytorch(tmp_path, save, more):
    model = save(tmp_path / "model", mirror_axes=(0, 1))
    image = scan(tmp_path / "scan.nii.gz")
    for runtime in ("torch", "openvino"):
        main(["predict", "-m", str(model), "-i", str(image), "-o", str(tmp_path / f"{runtime}.nii.gz"), "--runtime", runtime, "--quiet", *more])
    first, second = (np.asanyarray(nib.load(tmp_path / f"{runtime}.nii.gz").dataobj) for runtime in ("torch", "openvino"))
    assert (first != second).mean() < 1e-3 and len(np.unique(first)) > 1  # A tie may fall the other way
    assert np.array_equal(second, np.asanyarray(predict(model, image, runtime="openvino", tta=bool(more)).dataobj))


def test_folds_are_averaged(tmp_path):
    for number in range(2):
        save_unet(tmp_path / f"folds/fold_{number}", seed=number)
    image = scan(tmp_path / "scan.nii.gz")
    first, second = (np.asanyarray(predict(tmp_path / "folds", image, runtime=runtime).dataobj) for runtime in ("torch", "openvino"))
    assert (first != second).mean() < 1e-3


def test_two_channels(tmp_path):
    known = {"schemes": ["zscore"] * 2, "mean": [0] * 2, "std": [1] * 2, "low": [0] * 2, "high": [0] * 2, "nonzero": False}
    model = save_mednext(tmp_path / "model", in_channels=2, normalisation=known)
    images = [scan(tmp_path / "a.nii.gz"), scan(tmp_path / "b.nii.gz")]
    first, second = (np.asanyarray(predict(model, images, runtime=runtime).dataobj) for runtime in ("torch", "openvino"))
    assert (first != second).mean() < 1e-3


def test_another_result_is_refused(tmp_path, monkeypatch):
    class Wrong:
        def __init__(self, compiled):
            self.compiled = compiled

        def __call__(self, x):
            return [1.1 * self.compiled(x)[0]]

    first = openvino.CompiledNetwork.__init__
    monkeypatch.setattr(openvino.CompiledNetwork, "__init__", lambda self, compiled, shape: first(self, Wrong(compiled), shape))
    with pytest.raises(ValueError, match="computes other logits than PyTorch, by .* % of the largest: predict without --runtime openvino"):
        load_ensemble(save_unet(tmp_path / "model"), PredictSettings(runtime="openvino", device="cpu"))


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="runtime must be torch or openvino, not 'onnx'"):
        PredictSettings(runtime="onnx")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="runtime openvino computes on the CPU: add --device cpu, not auto"):
        PredictSettings(runtime="openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r"pip install 'mednext_v2\[openvino\]'"):
        load_ensemble(save_unet(tmp_path / "model"), PredictSettings(runtime="openvino", device="cpu"))
