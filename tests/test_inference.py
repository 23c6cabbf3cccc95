"""Windows against convolution over the whole scan, grids and orientations, and what bad scans get"""

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff
from scipy.spatial.transform import Rotation
from torch import nn

from mednext_v2.core import find_device
from mednext_v2.data.scans import read_scan
from mednext_v2.inference import predictor, windows
from mednext_v2.inference.predictor import predict, predict_scan
from mednext_v2.inference.windows import MemoryBudget, average_models, eval_mode, labels_on_grid, lay_windows, resample_logits, sliding_window, tiled_labels
from model_toys import save_unet

torch.set_num_threads(1)


class Echo(nn.Module):
    "Background at 0 and the image itself as the second class; a coarse second output that must not be used"

    def __init__(self, deep_supervision=True):
        super().__init__()
        self.deep_supervision = deep_supervision
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, torch.is_inference_mode_enabled(), tuple(x.shape)))
        logits = torch.cat([torch.zeros_like(x[:, :1]), x[:, :1]], 1)
        return [logits, -logits[..., ::2, ::2, ::2]] if self.deep_supervision else logits


class Itself(nn.Module):
    "Gives back the very tensor that it got"

    def forward(self, x):
        return x


def ball(shape=(30, 26, 22), center=(12, 15, 9), radius=7.0) -> np.ndarray:
    "Signed distance to a ball: positive inside"
    points = np.indices(shape).transpose(1, 2, 3, 0) - np.array(center)
    return (radius - np.linalg.norm(points, axis=-1)).astype(np.float32)


def card(spacing=(1.0, 1.0, 1.0), patch=(16, 16, 16), in_channels=1):
    return SimpleNamespace(
        doubt="",
        in_channels=in_channels,
        modality="MR",
        spacing=spacing,
        patch=patch,
        normalisation={},
        labels={"ball": 1},
        class_order=(),
        mirror_axes=(),
        windows="nnunet",
    )


@pytest.fixture
def raw_intensities(monkeypatch):
    "Geometry without normalisation: the network sees the scan's own values"
    monkeypatch.setattr(predictor, "normalise", lambda image, *_: image)


# Windows


@pytest.mark.parametrize("shape", [(30, 26, 22), (16, 16, 16), (17, 33, 16), (40, 9, 5), (1, 1, 1), (3, 40, 1)])
@pytest.mark.parametrize("overlap", [0, 0.3, 0.5])
def test_windows_neither_shift_nor_blur(shape, overlap):
    image = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    logits = sliding_window(Echo(), image, (16, 16, 16), overlap)
    assert logits.shape == (2, *shape) and logits.dtype == torch.float32
    np.testing.assert_allclose(logits[1].numpy(), image[0], atol=2e-6)
    assert not logits[0].any()


def test_a_local_network_gives_the_same_in_windows_as_on_the_whole_scan():
    # Its field of view of one voxel makes tiles and whole scan comparable
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(2, 8, 1), nn.GELU(), nn.Conv3d(8, 5, 1))
    image = torch.randn(2, 37, 20, 18)
    with torch.no_grad():
        whole = model(image[None])[0]
    torch.testing.assert_close(sliding_window(model, image, (16, 8, 16)), whole, atol=1e-5, rtol=1e-5)


def test_overlap_is_blended_by_a_gaussian_written_out():
    class Ramp(nn.Module):
        "The answer depends on the position in the window"

        def forward(self, x):
            ramp = torch.arange(x.shape[-1], dtype=torch.float32).expand(x.shape[0], 1, *x.shape[2:])
            return torch.cat([torch.zeros_like(ramp), ramp], 1)

    # Sigma is an eighth of the window; its centre is the voxel 4 for nnU-Net, between 3 and 4 for MONAI
    for kind, centre, starts in (("nnunet", 4, (0, 2, 5)), ("monai", 3.5, (0, 4, 5))):
        logits = sliding_window(Ramp(), np.zeros((1, 8, 8, 13), np.float32), (8, 8, 8), 0.5, kind)
        weight = np.exp(-0.5 * (np.arange(8) - centre) ** 2)
        # A voxel in several windows is the weighted mean of its positions in them
        for z in range(13):
            positions = [z - start for start in starts if 0 <= z - start < 8]
            expected = np.average(positions, weights=[weight[p] for p in positions])
            assert logits[1, 4, 4, z].item() == pytest.approx(expected, abs=0.02)


def test_network_is_in_evaluation_and_inference_mode_and_gets_its_modes_back():
    model = nn.Sequential(Echo(), nn.Identity())
    model.train()
    model[1].eval()
    model[0].deep_supervision = False
    sliding_window(model, np.ones((1, 20, 20, 20), np.float32), (16, 16, 16))
    assert model.training and model[0].training and not model[1].training
    assert {mode[:2] for mode in model[0].modes} == {(False, True)}
    assert {mode[2] for mode in model[0].modes} == {(1, 1, 16, 16, 16)}


def test_modes_come_back_after_an_error():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    model = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        sliding_window(model, np.ones((1, 8, 8, 8)), (8, 8, 8))
    assert model.training


@pytest.mark.parametrize("as_tensor", [True, False])
def test_the_image_is_left_alone(as_tensor):
    # MONAI weights the network's output in place; a network that returns its input would have the image changed
    image = torch.ones(1, 20, 20, 20) if as_tensor else np.ones((1, 20, 20, 20), np.float32)
    copy = image.clone() if as_tensor else image.copy()
    logits = sliding_window(Itself(), image, (16, 16, 16))
    assert (image == copy).all() and torch.allclose(logits, torch.ones(1))


def test_half_and_read_only_images(tmp_path):
    image = ball()[None]
    np.save(tmp_path / "image.npy", image)
    mapped = np.load(tmp_path / "image.npy", mmap_mode="r")
    assert torch.equal(sliding_window(Echo(), mapped, (16, 16, 16)), sliding_window(Echo(), image, (16, 16, 16)))
    half = sliding_window(Echo(), torch.from_numpy(image).half(), (16, 16, 16))
    assert half.dtype == torch.float32 and torch.allclose(half[1], torch.from_numpy(image[0]), atol=1e-2)


@pytest.mark.parametrize(
    "shape, patch, overlap, message",
    [
        ((8, 8, 8), (8, 8, 8), 0.5, r"must be \(channels, X, Y, Z\), got shape \(8, 8, 8\)"),
        ((1, 1, 8, 8, 8), (8, 8, 8), 0.5, "must be .channels"),
        ((1, 8, 0, 8), (8, 8, 8), 0.5, "must be .channels"),
        ((1, 8, 8, 8), (8, 8), 0.5, "three patch sizes"),
        ((1, 8, 8, 8), (8, 8, 8), 1, "0 <= overlap < 1"),
    ],
)
def test_windows_refuse(shape, patch, overlap, message):
    with pytest.raises(ValueError, match=message):
        sliding_window(Echo(), np.zeros(shape, np.float32), patch, overlap)


# Grids


@pytest.mark.parametrize("classes, shape", [(2, (9, 9, 9)), (7, (5, 14, 6)), (300, (6, 5, 4))])
def test_labels_class_by_class_equal_argmax_of_all(classes, shape):
    logits = torch.randn(classes, 7, 8, 5, generator=torch.Generator().manual_seed(classes))
    labels = labels_on_grid(logits, shape)
    np.testing.assert_array_equal(labels, resample_logits(logits, shape).argmax(0).numpy())
    assert labels.dtype == (np.uint16 if classes > 256 else np.uint8)
    np.testing.assert_array_equal(labels_on_grid(logits), logits.argmax(0).numpy())


def test_resampling_keeps_positions():
    # A linear ramp in mm stays the same ramp at the new voxel centres, away from the border
    ramp = torch.arange(20.0).reshape(1, 20, 1, 1).expand(1, 20, 4, 4)
    finer = resample_logits(ramp, (50, 4, 4))[0, :, 0, 0]
    centres = (torch.arange(50) + 0.5) * 20 / 50 - 0.5
    inside = (centres >= 0) & (centres <= 19)
    torch.testing.assert_close(finer[inside], centres[inside], atol=1e-4, rtol=0)


# Scans


def nifti(values: np.ndarray, affine: np.ndarray | None = None) -> nib.Nifti1Image:
    return nib.Nifti1Image(values, np.diag([1.0, 1, 1, 1]) if affine is None else affine)


def turned(image: nib.Nifti1Image, codes: str) -> nib.Nifti1Image:
    "The same scan stored with other axes"
    change = nib.orientations.ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(codes))
    values = apply_orientation(image.get_fdata(dtype=np.float32), change)
    return nib.Nifti1Image(values, image.affine @ inv_ornt_aff(change, image.shape))


OBLIQUE = np.eye(4)  # Turned by about ten degrees around each axis
OBLIQUE[:3, :3] = Rotation.from_euler("xyz", (8, -11, 10), degrees=True).as_matrix() * (1.9, 1.4, 2.6)
OBLIQUE[:3, 3] = -30, 12, 5


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA", "PIL", "ALI", "IPR"])
@pytest.mark.parametrize("affine", [np.diag([2.0, 1.5, 2.5, 1]), OBLIQUE])
def test_however_the_scan_is_stored_the_labels_lie_on_it(codes, affine, raw_intensities):
    scan = nifti(ball(), affine)
    straight = predict_scan(Echo(), card((2, 2, 2)), [scan])
    other = turned(scan, codes)
    labels = predict_scan(Echo(), card((2, 2, 2)), [other])
    assert labels.shape == other.shape and np.array_equal(labels.affine, other.affine)
    back = turned(nib.Nifti1Image(np.asarray(labels.dataobj, np.float32), labels.affine), "RAS")
    np.testing.assert_array_equal(back.get_fdata(), straight.get_fdata())
    truth = ball() > 0
    found = np.asarray(straight.dataobj) > 0
    assert 2 * (truth & found).sum() / (truth.sum() + found.sum()) > 0.97


@pytest.mark.parametrize(
    "spacing, tolerance",
    # Four times as long as wide, and the nearest slice is taken: half a slice of the scan at most
    [((1, 1, 1), 0.15), ((0.7, 0.8, 2), 0.15), ((3, 3, 3), 0.15), ((0.5, 0.8, 2), 0.5)],
)
def test_the_label_is_where_the_ball_is_at_any_spacing_of_the_model(spacing, tolerance, raw_intensities):
    scan = nifti(ball())
    found = predict_scan(Echo(), card(spacing), [scan]).get_fdata() > 0
    np.testing.assert_allclose(np.argwhere(found).mean(0), (12, 15, 9), atol=tolerance)
    assert found.sum() == pytest.approx((ball() > 0).sum(), rel=0.06)


@pytest.mark.parametrize("codes", ["RAS", "SPL"])
def test_a_scan_on_the_model_grid_is_not_interpolated(codes, raw_intensities):
    noise = np.random.default_rng(0).normal(size=(20, 10, 12)).astype(np.float32)
    scan = turned(nifti(noise, np.diag([1.0, 2, 4, 1])), codes)
    labels = predict_scan(Echo(), card((1, 2, 4)), [scan])
    np.testing.assert_array_equal(labels.get_fdata(), scan.get_fdata() > 0)


@pytest.mark.parametrize("shape", [(5, 6, 4), (40, 3, 1), (1, 1, 1)])
def test_scans_smaller_than_the_patch(shape, raw_intensities):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    labels = predict_scan(Echo(), card(), [nifti(values)])
    np.testing.assert_array_equal(labels.get_fdata(), values > 0)


def test_thick_slices(raw_intensities):
    values = ball((30, 26, 6), (12, 15, 3), 5)
    labels = predict_scan(Echo(), card((2, 2, 2)), [nifti(values, np.diag([1, 1, 5.0, 1]))])
    found = labels.get_fdata() > 0
    assert labels.shape == (30, 26, 6)
    assert 2 * (found & (values > 0)).sum() / (found.sum() + (values > 0).sum()) > 0.9


def test_the_label_map_opens_on_the_scan(tmp_path, raw_intensities):
    scan = nifti(np.round(ball() * 100).astype(np.int16), OBLIQUE)
    scan.header.set_slope_inter(0.01, 0)
    scan.set_sform(OBLIQUE, 1)
    scan.header["cal_max"] = 400
    nib.save(scan, tmp_path / "scan.nii.gz")
    scan = nib.load(tmp_path / "scan.nii.gz")
    nib.save(predict_scan(Echo(), card(), [scan]), tmp_path / "labels.nii.gz")
    labels = nib.load(tmp_path / "labels.nii.gz")
    assert labels.get_data_dtype() == np.uint8 and set(np.unique(labels.get_fdata())) == {0, 1}
    assert np.array_equal(labels.affine, scan.affine) and labels.header["cal_max"] == 0
    assert labels.header["sform_code"] == 1 and labels.header.get_xyzt_units()[0] == "mm"


def test_channels_must_share_a_grid(raw_intensities):
    scan, moved = nifti(ball()), nifti(ball(), np.array([[1, 0, 0, 3], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    assert predict_scan(Echo(), card(in_channels=2), [scan, scan]).shape == scan.shape
    for other in (moved, nifti(ball((30, 26, 21)))):
        with pytest.raises(ValueError, match="on another grid|has the shape"):
            predict_scan(Echo(), card(in_channels=2), [scan, other])


def test_read_scan_refuses(tmp_path):
    broken = ball()
    broken[3, 4, 5] = np.nan
    endless = ball()
    endless[0, 0, 0] = np.inf
    flat = np.diag([1.0, 1, 0, 1])
    for image, message in [
        (nifti(np.zeros((4, 4, 4, 2), np.float32)), r"must be 3D and has the shape \(4, 4, 4, 2\)"),
        (nifti(np.zeros((4, 4), np.float32)), "must be 3D"),
        (nifti(np.zeros((4, 0, 4), np.float32)), "must be 3D"),
        (nifti(broken), "has 1 voxels that are NaN or infinite, the first at"),
        (nifti(endless), "has 1 voxels that are NaN or infinite"),
        (nib.spatialimages.SpatialImage(ball(), flat), "has no usable grid"),
        (nib.spatialimages.SpatialImage(ball(), np.full((4, 4), np.nan)), "has no usable grid"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            read_scan(image)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere.nii.gz is missing"):
        read_scan(tmp_path / "nowhere.nii.gz")
    with pytest.raises(ValueError, match="is no volume by its name"):
        read_scan(tmp_path)


def test_read_scan_refuses_broken_files(tmp_path):
    (tmp_path / "text.nii.gz").write_text("not an image")
    (tmp_path / "empty.nii").write_bytes(b"")
    nib.save(nifti(np.random.default_rng(0).normal(size=(20, 20, 20))), tmp_path / "whole.nii.gz")
    (tmp_path / "half.nii.gz").write_bytes((tmp_path / "whole.nii.gz").read_bytes()[:20000])
    nib.save(nifti(np.ones((20, 20, 20))), tmp_path / "plain.nii")
    (tmp_path / "half.nii").write_bytes((tmp_path / "plain.nii").read_bytes()[:20000])
    for name in ("text.nii.gz", "empty.nii", "half.nii.gz", "half.nii"):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
            read_scan(tmp_path / name)
        assert "\n" not in str(error.value)


# The whole way, with a model folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "toy"
    return save_unet(folder, labels={"a": 1, "b": 2}, groups={"a": "organ", "b": "organ"})


def test_predict_from_a_file_equals_predict_from_memory(model_folder, tmp_path):
    scan = nifti(100 + 10 * ball(), np.diag([1.5, 1.5, 2.0, 1]))
    nib.save(scan, tmp_path / "scan.nii.gz")
    labels = predict(model_folder, tmp_path / "scan.nii.gz")
    assert set(np.unique(labels.get_fdata())) <= {0, 1, 2} and labels.shape == scan.shape
    np.testing.assert_array_equal(labels.get_fdata(), predict(str(model_folder), [scan]).get_fdata())
    np.testing.assert_array_equal(labels.get_fdata(), predict(model_folder, scan).get_fdata())


@pytest.mark.parametrize("codes", ["LPS", "SAR", "IPL"])
def test_predict_flipped_gives_the_same_labels_flipped(model_folder, codes):
    scan = nifti(100 + 10 * ball(), np.diag([1.5, 1.5, 2.0, 1]))
    straight = predict(model_folder, scan)
    labels = predict(model_folder, turned(scan, codes))
    back = turned(nib.Nifti1Image(np.asarray(labels.dataobj, np.float32), labels.affine), "RAS")
    np.testing.assert_array_equal(back.get_fdata(), straight.get_fdata())
    assert len(np.unique(straight.get_fdata())) > 1


def test_predict_does_not_depend_on_intensity_units_of_mr(model_folder):
    a, b = (predict(model_folder, nifti(scale * (100 + 10 * ball()))).get_fdata() for scale in (1, 7))
    assert (a == b).mean() > 0.999


def test_predict_refuses_a_wrong_number_of_channels(model_folder):
    scan = nifti(ball())
    with pytest.raises(ValueError, match=r"expects 1 channel\(s\), got 2 image\(s\): give one 3D image per channel"):
        predict(model_folder, [scan, scan])


def test_predict_reads_the_scan_before_the_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="scan.nii.gz is missing"):
        predict(tmp_path / "no_model", tmp_path / "scan.nii.gz")


def test_predict_on_the_file_equals_predict_on_the_prepared_case(tmp_path):
    from mednext_v2.data.datasets import get_dataset
    from mednext_v2.data.preprocess import Prepared, prepare
    from mednext_v2.models.card import Card, save_model
    from mednext_v2.models.registry import create
    from mednext_v2.study.seeds import build_dataset

    dataset = get_dataset("abdomen_ct")
    build_dataset(dataset.name, None, tmp_path / "raw", (1, 1, 1))
    prepare(dataset, tmp_path / "raw", tmp_path / "prepared")
    prepared = Prepared(tmp_path / "prepared")
    overrides = dict(filters=(4, 8, 8))
    torch.manual_seed(0)
    model = create("unet", 1, dataset.num_classes, **overrides)
    save_model(
        tmp_path / "model",
        model,
        Card(
            backbone="unet",
            overrides=overrides,
            in_channels=1,
            labels=dataset.labels,
            groups=dataset.groups,
            task=dataset.name,
            modality="CT",
            spacing=dataset.spacing,
            patch=(16, 16, 16),
            normalisation=prepared.fingerprint.normalisation(),
            recipe={},
        ),
    )
    case = prepared.ids("test")[0]
    file = tmp_path / "raw" / dataset.folder / "imagesTs" / f"{case}_0000.nii.gz"
    expected = sliding_window(model, prepared.image(case)[:], (16, 16, 16)).argmax(0).numpy()
    assert nib.load(file).shape == expected.shape and len(np.unique(expected)) > 2
    np.testing.assert_array_equal(np.asarray(predict(tmp_path / "model", file).dataobj), expected)


# Bounded memory


class Smooth(nn.Module):
    "Logits as a trained network has them: fields that vary over several voxels"

    def __init__(self, classes, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.project = nn.Conv3d(1, classes, 5, padding=2)

    def forward(self, x):
        return 8 * nn.functional.avg_pool3d(self.project(x), 3, 1, 1)


CASES = [
    # Image, patch, overlap, wanted grid, classes
    ((24, 20, 18), (16, 16, 16), 0.5, (24, 20, 18), 2),
    ((33, 20, 18), (16, 8, 16), 0.5, (50, 31, 12), 7),
    ((20, 41, 9), (16, 16, 16), 0.25, (13, 20, 27), 5),
    ((17, 16, 40), (8, 16, 16), 0.6, (17, 50, 20), 3),
    ((30, 26, 1), (16, 16, 16), 0.5, (30, 26, 3), 4),
    ((1, 1, 1), (8, 8, 8), 0.5, (2, 1, 3), 2),
    ((26, 26, 12), (16, 16, 8), 0.5, (52, 52, 5), 167),
    ((25, 19, 16), (16, 16, 16), 0, (26, 18, 16), 300),
]


@pytest.mark.parametrize("shape, patch, overlap, wanted, classes", CASES)
@pytest.mark.parametrize("regions", [False, True])
def test_labels_cell_by_cell_are_those_of_the_full_logits(shape, patch, overlap, wanted, classes, regions):
    model, order = Smooth(classes), tuple(range(1, classes + 1)) if regions else ()
    image = np.random.default_rng(classes).normal(size=(1, *shape)).astype(np.float32)
    full = labels_on_grid(sliding_window(model, image, patch, overlap), wanted, order)
    axes = lay_windows(shape, patch, overlap, wanted)
    with eval_mode(model):
        for memory in (1.0, 0.0):
            found = tiled_labels(average_models([model]), image, axes, order, budget=MemoryBudget(memory))
            np.testing.assert_array_equal(found, full)
            assert found.dtype == full.dtype


def nnunet_logits(image: torch.Tensor, patch: tuple, model: nn.Module, overlap: float) -> torch.Tensor:
    "Window after window as nnU-Net lays, pads and weighs them, with its own functions, and sums in float64"
    steps = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    pads = [max(side - size, 0) for side, size in zip(patch, image.shape[2:])]
    flat = [n for pad in reversed(pads) for n in (pad // 2, pad - pad // 2)]
    padded = nn.functional.pad(image, flat)
    weight = steps.compute_gaussian(tuple(patch), 1 / 8, 10, device=torch.device("cpu")).double()
    starts = steps.compute_steps_for_sliding_window(padded.shape[2:], patch, 1 - overlap)
    total, weights = 0, torch.zeros(padded.shape[2:], dtype=torch.float64)
    for corner in itertools.product(*starts):
        spot = tuple(slice(begin, begin + side) for begin, side in zip(corner, patch))
        logits = model(padded[(slice(None), slice(None), *spot)])[0].double()
        total = torch.zeros(len(logits), *padded.shape[2:], dtype=torch.float64) if weights.max() == 0 else total
        total[(slice(None), *spot)] += logits * weight
        weights[spot] += weight
    inside = tuple(slice(pad // 2, pad // 2 + size) for pad, size in zip(pads, image.shape[2:]))
    return (total / weights)[(slice(None), *inside)].float()


@pytest.mark.parametrize("windows", ["nnunet", "monai"])
@pytest.mark.parametrize("shape, patch, overlap, wanted, classes", CASES[:6])
def test_logits_cell_by_cell_are_those_of_nnunet_monai_and_torch(shape, patch, overlap, wanted, classes, windows):
    from monai.inferers import sliding_window_inference

    model = Smooth(classes)
    image = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if windows == "monai":
            expected = sliding_window_inference(image, patch, 1, model, overlap, "gaussian", padding_mode="replicate")
        else:
            expected = nnunet_logits(image, patch, model, overlap)[None]
        torch.testing.assert_close(sliding_window(model, image[0], patch, overlap, windows), expected[0], atol=2e-5, rtol=1e-5)
        expected = nn.functional.interpolate(expected, wanted, mode="trilinear", align_corners=False)[0]
    found = torch.full((classes, *wanted), torch.nan)

    def on_logits(place, logits):
        assert found[(slice(None), *place)].isnan().all()
        found[(slice(None), *place)] = logits

    with eval_mode(model):
        axes = lay_windows(shape, patch, overlap, wanted, windows=windows)
        labels = tiled_labels(model, image[0], axes, on_logits=on_logits, windows=windows)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    best = expected.topk(2, 0)[0]
    sure = (best[0] - best[1]).numpy() > 1e-4
    np.testing.assert_array_equal(labels[sure], expected.argmax(0).numpy()[sure])


@pytest.mark.parametrize("seed", range(4))
def test_a_part_has_the_labels_of_the_whole(seed):
    rng = np.random.default_rng(seed)
    shape, wanted = tuple(rng.integers(6, 34, 3).tolist()), tuple(rng.integers(4, 50, 3).tolist())
    image, model = rng.normal(size=(1, *shape)).astype(np.float32), Smooth(4)
    ends = [sorted(rng.integers(0, n, 2).tolist()) for n in wanted]
    box = tuple(slice(a, b + 1) for a, b in ends)
    full = labels_on_grid(sliding_window(model, image, (8, 16, 8)), wanted)
    expected = np.zeros_like(full)
    expected[box] = full[box]
    with eval_mode(model):
        found = tiled_labels(model, image, lay_windows(shape, (8, 16, 8), 0.5, wanted, box))
    np.testing.assert_array_equal(found, expected)


def test_half_precision_changes_less_than_two_voxels_in_a_thousand():
    model, image = Smooth(20), np.random.default_rng(0).normal(size=(1, 40, 36, 30)).astype(np.float32)
    axes = lay_windows((40, 36, 30), (16, 16, 16), 0.5, (60, 36, 20))
    with eval_mode(model):
        exact, half = (tiled_labels(average_models([model]), image, axes, budget=MemoryBudget(1, half)) for half in (False, True))
    assert 0 < (exact != half).mean() < 2e-3


def test_cells_that_wait_stay_within_the_budget(monkeypatch):
    most, spilled = [0], []
    real_put, real_spill = windows.TileBuffer.put, windows.TileBuffer.spill

    def put(self, *arguments):
        real_put(self, *arguments)
        most[0] = max(most[0], self.size)

    monkeypatch.setattr(windows.TileBuffer, "put", put)
    monkeypatch.setattr(windows.TileBuffer, "spill", lambda self, key: spilled.append(key) or real_spill(self, key))
    model, image = Smooth(3), np.zeros((1, 40, 40, 40), np.float32)
    with eval_mode(model):
        tiled_labels(average_models([model]), image, lay_windows((40,) * 3, (16,) * 3, 0.5), budget=MemoryBudget(5e-5))
    assert most[0] <= 5e4 and spilled


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_of_temporary_logits_is_one_line(monkeypatch):
    # Writing to this device always meets a full disk
    monkeypatch.setattr(windows.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))
    model = Smooth(3)
    with eval_mode(model), pytest.raises(OSError, match="no space for .* GB of logits in .*set TMPDIR") as error:
        tiled_labels(model, np.zeros((1, 24, 24, 24), np.float32), lay_windows((24,) * 3, (16,) * 3, 0.5), budget=MemoryBudget(0))
    assert "\n" not in str(error.value)


def test_only_a_full_accelerator_sends_sums_to_the_cpu(monkeypatch):
    model, image = Smooth(3), np.random.default_rng(0).normal(size=(1, 20, 20, 20)).astype(np.float32)
    axes = lay_windows((20,) * 3, (16,) * 3, 0.5)
    real, places = windows.add_window, []

    def failing(error):
        def add(cells, logits, *rest):
            places.append(len(places))
            if len(places) == 3:
                raise error
            real(cells, logits, *rest)

        places.clear()
        monkeypatch.setattr(windows, "add_window", add)

    with eval_mode(model):
        expected = tiled_labels(average_models([model]), image, axes)
        for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("MPS backend out of memory (x)")):
            failing(error)
            with pytest.warns(UserWarning, match="too little memory .* in the computer's memory"):
                np.testing.assert_array_equal(tiled_labels(average_models([model]), image, axes), expected)
        failing(RuntimeError("CUDA error: an illegal memory access was encountered"))
        with pytest.raises(RuntimeError, match="illegal memory access"):
            tiled_labels(average_models([model]), image, axes)
        failing(torch.OutOfMemoryError("CUDA out of memory"))
        with pytest.raises(torch.OutOfMemoryError):
            tiled_labels(average_models([model]), image, axes, budget=MemoryBudget(device="cpu"))


MEASURE = """
import sys, json
import numpy as np, torch
from mednext_v2.inference import windows
from mednext_v2.core import peak_bytes

from mednext_v2.data.scans import read_scan

torch.set_num_threads(1)
shape, classes, patch, overlap = json.loads(sys.argv[1])
model = torch.nn.Conv3d(1, classes, 1)
image = np.random.default_rng(0).standard_normal((1, *shape), np.float32).astype(np.float16)
small = np.zeros((1, 8, 8, 8), np.float32)
with windows.eval_mode(model):
    axes = windows.lay_windows(shape, patch, overlap)
    windows.tiled_labels(model, small, windows.lay_windows((8, 8, 8), (8, 8, 8), 0))  # What torch and MONAI hold
    before = peak_bytes()
    labels = windows.tiled_labels(windows.average_models([model]), image, axes, budget=windows.MemoryBudget(memory=0.05))
weight, bias = (value.detach().numpy().ravel() for value in (model.weight, model.bias))
thin = image[0, ::7, ::5, ::3, None].astype(np.float32) * weight + bias
top = np.sort(thin, -1)
sure = top[..., -1] - top[..., -2] > 1e-4
right = (labels[::7, ::5, ::3] == thin.argmax(-1))[sure].mean()
print(json.dumps([before, peak_bytes(), float(right), float(sure.mean())]))
"""


def measured(*arguments) -> list:
    import json
    import subprocess
    import sys

    command = [sys.executable, "-c", MEASURE, json.dumps(arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def test_memory_is_a_fraction_of_the_full_logits():
    # The full logits would take 167 * 160 * 96 * 96 * 4 bytes = 0.98 GB
    before, peak, right, sure = measured((160, 96, 96), 167, (32, 32, 32), 0.25)
    assert right == 1 and sure > 0.5
    assert peak - before < 0.3 * 167 * 160 * 96**2 * 4


# Mirroring, options, arrays


def test_mirroring_is_the_mean_over_all_mirror_images():
    model, image = Smooth(3), np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    x = torch.from_numpy(image)[None]
    with torch.no_grad():
        flips = [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]
        expected = torch.stack([model(x.flip(f)).flip(f) for f in flips]).mean(0)
        torch.testing.assert_close(average_models([model], (0, 1, 2))(x), expected, atol=1e-5, rtol=1e-5)
        two = torch.stack([model(x.flip(f)).flip(f) for f in ((), (4,))]).mean(0)
        torch.testing.assert_close(average_models([model], (2,))(x), two, atol=1e-5, rtol=1e-5)


def test_mirror_axes_of_the_card_are_used(raw_intensities):
    scan, model = nifti(ball()), Echo(False)
    for axes, passes in (((0, 1, 2), 8), ((2,), 2), ((), 1)):
        known = card(patch=(32, 32, 32))
        known.mirror_axes = axes
        model.modes.clear()
        predict_scan(model, known, [scan], tta=True)
        assert len(model.modes) == passes
    model.modes.clear()
    predict_scan(model, card(patch=(16, 16, 16)), [scan], fast=True)
    fast = len(model.modes)
    predict_scan(model, card(patch=(16, 16, 16)), [scan])
    assert fast < len(model.modes) - fast


def test_options_refuse():
    for wrong, message in [({"overlap": 1.0}, "overlap < 1"), ({"memory": -1}, "memory >= 0"), ({"fast": True, "tta": True}, "fast or tta")]:
        with pytest.raises(ValueError, match=message):
            predictor.PredictSettings(**wrong)
    with pytest.raises(ValueError, match="device 'tpu' is not available here"):
        find_device("tpu")
    for name in ("cpu:1", "cpu:x", "cpu:", ""):
        with pytest.raises(ValueError, match="is not available here: use one of auto, .*cpu"):
            find_device(name)
    assert find_device("cpu:0") == "cpu:0"


def test_each_gpu_is_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [find_device(name) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    with pytest.raises(ValueError, match="'cuda:2' is not available here: use one of auto, cuda:0 to cuda:1, .*cpu"):
        find_device("cuda:2")


def test_arrays_and_iterators(model_folder):
    values = (100 + 10 * ball()).astype(np.float32)
    scan = nifti(values, np.diag([1.5, 1.5, 2.0, 1]))
    expected = predict(model_folder, scan, device="cpu").get_fdata()
    for image in ((values, (1.5, 1.5, 2.0)), [(values, [1.5, 1.5, 2.0])]):
        np.testing.assert_array_equal(predict(model_folder, image, device="cpu").get_fdata(), expected)
    found = predict(model_folder, iter([scan, (values, (1.5, 1.5, 2.0)), [scan]]), device="cpu")
    assert not isinstance(found, list)
    for labels in found:
        np.testing.assert_array_equal(labels.get_fdata(), expected)
    refused = [(values, "is a ndarray: give"), ((values, (1, 1)), "three positive sizes"), ((values, (1, 1, 0)), "three positive"), ([], "at least one")]
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            predict(model_folder, wrong, device="cpu")


def test_a_region_of_interest(model_folder):
    scan = turned(nifti(100 + 10 * ball(), np.diag([1.5, 1.5, 2.0, 1])), "LPS")
    whole = predict(model_folder, scan, device="cpu").get_fdata()
    inside = np.zeros(scan.shape, bool)
    inside[4:20, 3:17, 5:12] = True
    assert len(np.unique(whole[inside])) > 1
    for roi in ((4, 20, 3, 17, 5, 12), nib.Nifti1Image(inside.astype(np.uint8), scan.affine)):
        found = predict(model_folder, scan, device="cpu", roi=roi).get_fdata()
        np.testing.assert_array_equal(found, whole * inside)
    for roi, message in [
        ((0, 0, 0, 3, 0, 3), "holds no voxel"),
        ((1, 2, 3), "six voxel numbers"),
        (nib.Nifti1Image(inside.astype(np.uint8), np.eye(4)), "on another grid"),
    ]:
        with pytest.raises(ValueError, match=message):
            predict(model_folder, scan, device="cpu", roi=roi)


@pytest.mark.parametrize("shape, spacing", [((20, 18, 1), (1, 1, 5)), ((20, 18, 4), (1, 1, 5)), ((3, 2, 2), (1, 1, 1))])
@pytest.mark.parametrize("value", [0, 7])
def test_odd_volumes_are_labelled_from_end_to_end(model_folder, shape, spacing, value):
    values = np.full(shape, value, np.float32)
    labels = predict(model_folder, nifti(values, np.diag([*spacing, 1.0])), device="cpu", tta=True)
    assert labels.shape == shape and labels.get_data_dtype() == np.uint8


def test_a_header_without_spacing_is_refused(tmp_path):
    scan = nifti(np.ones((4, 4, 4), np.float32))
    nib.save(scan, tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    content[80:92] = bytes(12)  # pixdim[1..3]
    content[252:256] = bytes(4)  # qform_code, sform_code
    (tmp_path / "scan.nii").write_bytes(content)
    with pytest.raises(ValueError, match=r"scan.nii has the voxel sizes \(pixdim\) \(0, 0, 0\)"):
        read_scan(tmp_path / "scan.nii")


@pytest.mark.parametrize("side, size, overlap", list(itertools.product((1, 4, 7, 32), (1, 5, 31, 32, 33, 100), (0, 0.25, 0.5, 0.9))))
def test_windows_start_where_monai_puts_them(side, size, overlap):
    from monai.data.utils import dense_patch_slices

    whole = max(size, side)
    step = side if side == whole else max(1, int(side * (1 - overlap)))
    expected = tuple(where.start for (where,) in dense_patch_slices((whole,), (side,), (step,)))
    for axis in windows.lay_windows((size,) * 3, (side,) * 3, overlap, windows="monai"):
        assert axis.starts == expected


@pytest.mark.parametrize("side, size, overlap", list(itertools.product((1, 4, 7, 32, 97), (1, 5, 31, 32, 33, 40, 100, 513), (0, 0.25, 0.5, 0.9))))
def test_windows_start_where_nnunet_puts_them(side, size, overlap):
    steps = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    expected = steps.compute_steps_for_sliding_window((max(size, side),), (side,), 1 - overlap)[0]
    for axis in windows.lay_windows((size,) * 3, (side,) * 3, overlap):
        assert axis.starts == tuple(sorted(set(expected)))  # Steps below a voxel give nnU-Net a window twice


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 3, 4), (16, 8, 5), (64, 32, 96), (128, 128, 128)])
def test_windows_weigh_what_nnunet_gives_them(patch):
    steps = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    expected = steps.compute_gaussian(patch, 1 / 8, 10, device=torch.device("cpu"))
    assert torch.equal(windows.gaussian(patch), expected.float())


def test_windows_are_of_a_known_kind():
    with pytest.raises(ValueError, match="laid as nnunet or monai, got 'gaussian'"):
        sliding_window(Echo(), np.zeros((1, 8, 8, 8), np.float32), (8, 8, 8), windows="gaussian")


@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 3, 4), (16, 8, 5), (64, 32, 96)])
def test_windows_weigh_what_monai_gives_them(patch):
    from monai.data.utils import compute_importance_map

    torch.testing.assert_close(windows.gaussian(patch, windows="monai").float(), compute_importance_map(patch, "gaussian", 0.125), rtol=1e-6, atol=0)


def test_predicting_with_a_network_of_its_own_does_not_import_monai(tmp_path):
    "Its import takes seconds, as long as many a scan"
    code = (
        "import sys, numpy, torch; from mednext_v2.inference import windows; from mednext_v2.models.registry import create; "
        "axes = windows.lay_windows((36, 36, 36), (32, 32, 32), 0.5); model = create('mednext_v2_tiny', 1, 3, width=4); "
        "context = windows.eval_mode(model); context.__enter__(); "
        "windows.tiled_labels(windows.average_models([model]), numpy.zeros((1, 36, 36, 36)), axes); assert 'monai' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
