"""What `prepare` makes of a raw data set against what nnU-Net 2.8's own preprocessing makes of it.

Needs nnunetv2 (benchmarks/README.md says how it installs without another torch); skipped where it is absent.
nnU-Net keeps the stored orientation, arrays here are RAS, so its arrays are turned before they are compared.
What is known to differ:
- images are stored in half precision here;
- where two classes have exactly equal weight, the higher one wins here, in nnU-Net the class of the nearest
  voxel in stored order (batchgenerators 0.25.5; the higher one before);
- the CT window comes from all labelled voxels here, from a random sample there.
"""

import json
import pickle
import sys
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from mednext_v2.core import root, write_json
from mednext_v2.data.datasets import Dataset, list_cases, read_case, write_description
from mednext_v2.data.preprocess import Prepared, prepare
from mednext_v2.study.seeds import read_seed, seeds_folder, verify_seeds

pytestmark = pytest.mark.skipif(find_spec("nnunetv2") is None, reason="nnunetv2 is not installed")
sys.path.insert(0, str(root() / "benchmarks"))


def dataset(number: int, name: str, modality: str, labels: tuple[str, ...], spacing: tuple, channels=()) -> Dataset:
    values = {label: value for value, label in enumerate(labels, 1)}
    fixed = {"groups": "organ", "patch": (32, 32, 32), "nsd_tolerance": 2.0, "licence": "none"}
    fixed |= {"citation": "none", "role": "pretrain"}
    own = {"modality": modality, "labels": values, "spacing": spacing, "channels": channels}
    return Dataset(name=name, dataset=number, title=f"Parity {name}", **fixed, **own)


# A target of 7 mm beside 2 mm is strongly anisotropic, which decides the way whatever the case
ABDOMEN = dataset(991, "abdomen", "CT", ("liver", "aorta", "vertebrae"), (3.0, 3.0, 3.0))
THICK = dataset(992, "thick", "CT", ("liver", "aorta", "vertebrae"), (2.2, 2.2, 7.0))
BRAIN = dataset(993, "brain", "MR", ("frontal", "deep_grey", "cerebellum"), (2.5, 3.0, 2.5), ("T1", "T2"))
BODY = dataset(994, "body", "MR", ("liver", "aorta", "back_muscle"), (2.0, 2.0, 6.5))
TASKS = {t.name: t for t in (ABDOMEN, THICK, BRAIN, BODY)}
SEEDS = {"abdomen": "ctA", "thick": "ctA", "brain": "mrP", "body": "mrM"}

# Twice as fine as the target, an even number of voxels: every other place on a boundary is a tie
EVEN = ("abdomen", "thick")

# Voxel size in mm (R, A, S), stored orientation, shift of the grid in mm: one line a case
CASES = {
    "abdomen": {
        "iso": ((2.3, 2.3, 2.3), "RAS", (0.4, -0.7, 1.1)),
        "thin": ((1.9, 1.9, 5.1), "LPS", (1.3, 0.2, 0.0)),  # 2.7 times: treated as any other
        "thick": ((1.5, 1.5, 5.0), "LAI", (0.0, 0.9, 2.0)),  # 3.3 times: slices apart
        "sagittal": ((6.5, 1.8, 2.0), "PIR", (0.3, 0.3, 0.3)),  # Another axis is coarse, axes are permuted
    },
    "thick": {"iso": ((2.9, 2.9, 2.9), "LPS", (0.1, 0.2, 0.3)), "thick": ((1.6, 1.6, 5.3), "RAS", (0.0, 0.0, 1.0))},
    "brain": {"iso": ((2.1, 2.1, 2.1), "LAS", (0.2, 0.0, 0.5)), "thick": ((1.7, 1.7, 6.0), "RPS", (0.4, 0.6, 0.0))},
    "body": {"iso": ((2.6, 2.6, 2.6), "RPI", (0.0, 0.5, 0.2)), "thin": ((1.8, 2.4, 4.4), "LPS", (0.7, 0.0, 0.6))},
}


def regrid(volume: np.ndarray, old: tuple, new: tuple, shift: tuple, order: int) -> np.ndarray:
    "Voxels of another size, the grid moved by some mm"
    shape = [int(((n - 1) * a - s) / b) for n, a, b, s in zip(volume.shape, old, new, shift)]
    return ndimage.affine_transform(volume, np.array(new) / old, np.array(shift) / old, shape, order=order)


def make_case(name: str, seed, spacing: tuple, shift: tuple) -> tuple[np.ndarray, np.ndarray]:
    "Channels (C, X, Y, Z) and label of a phantom cut from a seed scan, with the quirks that decide a crop"
    label = seed.select(seed.label, TASKS[name].labels).astype(np.uint8)
    box = ndimage.find_objects((label > 0).astype(np.uint8))[0]
    grown = tuple(slice(max(0, s.start - 6), s.stop + 6) for s in box)
    image, label = seed.image[grown].astype(np.float32), label[grown]
    image = regrid(image, seed.spacing, spacing, shift, 1).round()
    label = regrid(label, seed.spacing, spacing, shift, 0)
    # Along an odd number of voxels no new one falls in the middle between two
    even = (TASKS[name].name, spacing) == (EVEN[0], CASES[EVEN[0]][EVEN[1]][0])
    odd = tuple(slice(0, n - (n % 2 == (even and axis < 2))) for axis, n in enumerate(label.shape))
    image, label = image[odd], label[odd]
    if name == "brain":  # Skull-stripped already: zeros outside
        second = np.where(image > 0, 4000 - 3 * image, 0).round()
        centre = np.argwhere(label == 2).mean(axis=0)
        hole = np.linalg.norm((np.indices(label.shape).T - centre) * spacing, axis=-1).T < 7
        image[hole] = second[hole] = 0  # Zeros inside the brain are tissue, not background
        label[image + second == 0] = 0  # nnU-Net would count these as tissue, as it could not in a new scan
        crop = trimmed(image + second)
        margin = ((9, 4), (5, 8), (3, 2))
        return np.stack([np.pad(c[crop], margin) for c in (image, second)]), np.pad(label[crop], margin)
    if name == "body":
        return image[None] + 20, label  # No zero anywhere
    if name == "abdomen":  # Rows that a scanner left at 0 HU
        image, label = (np.pad(array, ((0, 0), (3, 0), (0, 0))) for array in (image, label))
    return image[None], label


def trimmed(image: np.ndarray) -> tuple[slice, ...]:
    "The box of what is not zero, an odd number of voxels long"
    box = ndimage.find_objects((image != 0).astype(np.uint8))[0]
    return tuple(slice(s.start, s.stop - ((s.stop - s.start) % 2 == 0)) for s in box)


def write_raw(name: str, raw: Path) -> None:
    "A raw data set of these cases; the last stands in validation as well, since no split may be empty"
    folder, seed = raw / TASKS[name].folder, verify_seeds()[SEEDS[name]]
    scan = read_seed(seeds_folder(), seed)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    listed = {}
    for id, (spacing, axes, shift) in {**CASES[name], "spare": list(CASES[name].values())[0]}.items():
        image, label = make_case(name, scan, spacing, shift)
        image[:, 0, 0, 0] += id == "spare"  # No scan may be in two splits
        affine = np.diag([*spacing, 1.0])
        affine[:3, 3] = -40, 12.5, 300
        stored = nibabel.orientations.axcodes2ornt(axes)
        turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(affine), stored)
        files = [f"imagesTr/{id}_{c:04d}.nii.gz" for c in range(len(image))] + [f"labelsTr/{id}.nii.gz"]
        for file, voxels in zip(files, (*image.astype(np.int16), label)):
            nibabel.Nifti1Image(voxels, affine).as_reoriented(turn).to_filename(folder / file)
        if id != "spare":
            images = [str(folder / file) for file in files[:-1]]
            listed[id] = {"images": images, "label": str(folder / files[-1])}
    write_description(TASKS[name], folder, len(listed))
    # nnU-Net takes all of imagesTr for its fingerprint, unless dataset.json lists the cases
    known = json.loads((folder / "dataset.json").read_text())
    write_json(folder / "dataset.json", known | {"dataset": listed}, sort_keys=False)
    write_json(folder / "splits_final.json", [{"train": list(listed), "val": ["spare"]}])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "Every data set prepared by nnU-Net, two processes at a time, and by this project"
    from nnunet_peer import request

    folder = tmp_path_factory.mktemp("parity")
    for name in TASKS:
        write_raw(name, folder / "raw")

    def peer(part: int):
        some = {t.dataset: t.spacing[::-1] for t in list(TASKS.values())[part::2]}
        # 400,000 voxels instead of 100 million: the phantoms have no more
        return request(folder / f"peer{part}", some, voxels=4e5, raw=folder / "raw")

    with ThreadPool(2) as pool:
        pool.map(peer, range(2))
    for name, one in TASKS.items():
        prepare(one, folder / "raw", folder / "prepared" / name)
    return folder


def peer_place(folder: Path, name: str) -> Path:
    "Where nnU-Net put a data set"
    return folder / f"peer{list(TASKS).index(name) % 2}" / "preprocessed" / TASKS[name].folder


def peer_arrays(folder: Path, name: str, id: str) -> tuple[np.ndarray, np.ndarray, dict]:
    "nnU-Net's image (C, X, Y, Z) and label in RAS, and what it noted beside them"
    import blosc2

    dataset, place = TASKS[name], peer_place(folder, name)
    plans = json.loads((place / "nnUNetPlans.json").read_text())
    back = [0, *(1 + axis for axis in plans["transpose_backward"])]
    stem = place / plans["configurations"]["3d_fullres"]["data_identifier"] / id
    noted = pickle.loads(stem.with_suffix(".pkl").read_bytes())
    stored = nibabel.load(folder / "raw" / dataset.folder / "labelsTr" / f"{id}.nii.gz").affine
    arrays = []
    for part in ("", "_seg"):
        array = blosc2.open(f"{stem}{part}.b2nd")[:].transpose(back)  # (C, z, y, x) of the file
        turned = [nibabel.orientations.apply_orientation(c.T, nibabel.io_orientation(stored)) for c in array]
        arrays.append(np.stack(turned))
    # Training reads -1, background outside the non-zero region, as background
    return arrays[0], np.maximum(arrays[1][0], 0), noted


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * (one & other).sum() / (one.sum() + other.sum())


each_case = pytest.mark.parametrize("name, id", [(name, id) for name, cases in CASES.items() for id in cases])


def weights(label: np.ndarray, shape: tuple, coarse: int | None) -> np.ndarray:
    "Linear weight of each class present (classes, *shape), slice by slice along the coarse axis"
    found = []
    for value in np.unique(label):
        mask = (label == value).astype(float)
        if coarse is not None:
            ratio = label.shape[coarse] / shape[coarse]
            mask = mask.take(np.floor((np.arange(shape[coarse]) + 0.5) * ratio).astype(int), axis=coarse)
        factors = np.divide(shape, mask.shape)
        found.append(ndimage.zoom(mask, factors, order=1, mode="nearest", grid_mode=True))
    return np.stack(found)


def tied(both: Path, name: str, id: str, shape: tuple) -> np.ndarray:
    "Where the two strongest classes are equally strong"
    case = next(case for case in list_cases(TASKS[name], both / "raw") if case.id == id)
    scan = read_case(TASKS[name], case)
    box = ndimage.find_objects((scan.image != 0).any(axis=0).astype(np.uint8))[0]
    ratios = [np.array(s) / min(s) for s in (np.round(scan.spacing, 4), TASKS[name].spacing)]
    uneven = [ratio for ratio in ratios if ratio.max() > 3]
    coarse = int(uneven[0].argmax()) if uneven else None
    first, second = np.sort(weights(scan.label[box], shape, coarse), axis=0)[-1:-3:-1]
    return first - second < 1e-6


@each_case
def test_label_as_nnunet(both, name, id):
    ours = np.asarray(Prepared(both / "prepared" / name).label(id)[...])
    theirs = peer_arrays(both, name, id)[1]
    assert ours.shape == theirs.shape
    ties = tied(both, name, id, ours.shape)
    # Not all of the rest is equal: at the edge of a stripped brain nnU-Net has two backgrounds
    for label, value in TASKS[name].labels.items():
        assert (theirs == value).sum() > 50, f"{label} is too small here to tell anything"
        assert dice((ours == value) & ~ties, (theirs == value) & ~ties) > 0.997, label
        assert dice(ours == value, theirs == value) > (0.99 if (name, id) != EVEN else 0.9), label
    assert ties.mean() < (0.001 if (name, id) != EVEN else 0.02)


@each_case
def test_image_as_nnunet(both, name, id):
    ours = np.asarray(Prepared(both / "prepared" / name).image(id)[...], np.float32)
    theirs = peer_arrays(both, name, id)[0]
    assert ours.shape == theirs.shape
    difference = np.abs(ours - theirs)
    assert difference.mean() < (0.01 if TASKS[name].modality == "CT" else 0.001)
    assert np.percentile(difference, 99.9) < 0.05
    assert difference.max() < 0.3
    assert np.ptp(theirs) > 3, "a constant image would agree with anything"


@pytest.mark.parametrize("name", TASKS)
def test_fingerprint_as_nnunet(both, name):
    ours = Prepared(both / "prepared" / name).fingerprint
    known = json.loads((peer_place(both, name) / "dataset_fingerprint.json").read_text())
    for c, theirs in enumerate(known["foreground_intensity_properties_per_channel"].values()):
        assert ours.mean[c] == pytest.approx(theirs["mean"], abs=0.05 * theirs["std"])
        assert ours.std[c] == pytest.approx(theirs["std"], rel=0.05)
        for field in ("percentile_00_5", "median", "percentile_99_5"):
            assert getattr(ours, field)[c] == pytest.approx(theirs[field], abs=0.1 * theirs["std"]), field


def test_hard_cases_are_hard(both):
    "There is a crop, slices treated apart, a tissue mask: as nnU-Net itself says"
    noted = {(name, id): peer_arrays(both, name, id)[2] for name, cases in CASES.items() for id in cases}
    before, after = "shape_before_cropping", "shape_after_cropping_and_before_resampling"
    cropped = {name for (name, _), n in noted.items() if tuple(n[before]) != tuple(n[after])}
    assert cropped == {"abdomen", "brain"}
    plans = {name: json.loads((peer_place(both, name) / "nnUNetPlans.json").read_text()) for name in TASKS}
    masked = {name: plan["configurations"]["3d_fullres"]["use_mask_for_norm"] for name, plan in plans.items()}
    assert masked == {"abdomen": [False], "thick": [False], "brain": [True, True], "body": [False]}
