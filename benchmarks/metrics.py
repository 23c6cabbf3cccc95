"""How long the scores of one case take, beside MONAI, DeepMind's surface-distance and nnU-Net.

    python benchmarks/metrics.py           writes benchmarks/results/metrics.json
    python benchmarks/metrics.py --quick   20 classes on a small volume, one round, to see that it runs

Contents: a synthetic label map of ellipsoids, up to 60 of them that do not overlap, radii 5 to 30 voxels, and a
prediction of it with displaced edges and stray islands. Every round goes through all methods before the next begins.
Each method uses one thread and is given what its users have: two label maps. What each computes is in METHODS. nnU-Net
has no surface metric: its row is there for the part that it does compute.

The part `difference` holds NSD by the definition used here (area of surface) beside MONAI's default (voxels at the
edge), on the committed seed labels against displaced copies of themselves.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

from data import SHORT, machine, results_file, versions_of
from mednext_v2.core import root, write_json
from mednext_v2.data.datasets import Dataset
from mednext_v2.data.scans import read_scan
from mednext_v2.evaluation.metrics import dice, score_case, surface_dice

SPACING = (1.0, 1.0, 1.5)
TOLERANCE = 1.0
VERSIONS = ("numpy", "scipy", "monai", "surface-distance", "nnunetv2")


# ---- Contents


def displaced(labels: np.ndarray, rng, size: float, smooth: float = 4.0) -> np.ndarray:
    "Each voxel takes the label of a voxel near by, about `size` voxels off, smoothly varying"
    at = np.indices(labels.shape, dtype=np.float32)
    for axis in at:
        noise = ndimage.gaussian_filter(rng.normal(size=labels.shape).astype(np.float32), smooth)
        axis += size / noise.std() * noise
    return ndimage.map_coordinates(labels, at, order=0, mode="nearest")


def contents(shape: tuple[int, ...], classes: int) -> tuple[np.ndarray, np.ndarray]:
    "Prediction and truth"
    rng, truth = np.random.default_rng(0), np.zeros(shape, np.uint8)
    value = 0
    for _ in range(20_000):
        radii = rng.uniform(5, 30, 3) * min(shape) / 200
        centre = rng.uniform(radii, np.array(shape) - radii)
        box = tuple(slice(int(c - r), int(c + r) + 2) for c, r in zip(centre, radii))
        part = truth[box]
        points = np.indices(part.shape).transpose(1, 2, 3, 0) + [s.start for s in box]
        inside = (((points - centre) / radii) ** 2).sum(-1) <= 1
        if inside.sum() < 50 or part[inside].any():
            continue
        value += 1
        part[inside] = value
        if value == classes:
            break
    prediction = displaced(truth, rng, 1.0)
    for label in range(1, value + 1, 3):  # An island far off, as networks leave them
        corner = rng.integers(0, np.array(shape) - 4)
        prediction[tuple(slice(c, c + 3) for c in corner)] = label
    return prediction, truth


def task_of(classes: int) -> Dataset:
    labels = {f"class {value}": value for value in range(1, classes + 1)}
    return Dataset("synthetic", 999, "Synthetic", "CT", labels, "organ", SPACING, (64, 64, 64), TOLERANCE, "finetune", "none", "none")


# ---- Methods: each gives NSD and HD95 by class where it computes them, to see that all do the same work


def ours(prediction, truth, classes):
    scores = score_case(prediction, truth, SPACING, task_of(classes), TOLERANCE)
    return scores.nsd.to_numpy(), scores.hd95.to_numpy()


def deepmind(prediction, truth, classes):
    import surface_distance

    found = []
    for value in range(1, classes + 1):
        masks = truth == value, prediction == value
        surfaces = surface_distance.compute_surface_distances(*masks, SPACING)
        surface_distance.compute_dice_coefficient(*masks)
        found.append((surface_distance.compute_surface_dice_at_tolerance(surfaces, TOLERANCE), surface_distance.compute_robust_hausdorff(surfaces, 95)))
    return np.array(found).T


def monai(prediction, truth, classes):
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    found = []
    for value in range(1, classes + 1):  # Sixty classes at once would hold sixty masks of the whole volume
        masks = [torch.from_numpy(labels == value)[None, None] for labels in (prediction, truth)]
        compute_dice(*[mask.float() for mask in masks])
        nsd = compute_surface_dice(*masks, [TOLERANCE], True, spacing=SPACING, use_subvoxels=True)
        hd95 = compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=SPACING)
        found.append((nsd.item(), hd95.item()))
    return np.array(found).T


def nnunet(prediction, truth, classes):
    from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask

    for value in range(1, classes + 1):
        compute_tp_fp_fn_tn(region_or_label_to_mask(truth, value), region_or_label_to_mask(prediction, value))
    return None, None


METHODS = {
    "ours: DSC, NSD, HD95, volume": ours,
    "surface-distance: DSC, NSD, HD95": deepmind,
    "MONAI: DSC, NSD, HD95 of voxel edges": monai,
    "nnU-Net: DSC alone": nnunet,
}


def difference() -> list[dict]:
    "NSD by area and by voxels at the edge, class by class"
    import torch
    from monai.metrics import compute_surface_dice

    rows, rng = [], np.random.default_rng(0)
    for path in sorted((root() / "data/seeds").glob("*_label.nii.gz")):
        volume = read_scan(path)
        truth = volume.voxels.astype(np.uint8)
        for size in (0.5, 1.5):
            guess = displaced(truth, rng, size)
            for value in np.unique(truth)[1:].tolist():
                masks = guess == value, truth == value
                tensors = [torch.from_numpy(mask)[None, None] for mask in masks]
                edges = compute_surface_dice(*tensors, [3.0], True, spacing=volume.spacing).item()
                rows.append(
                    {
                        "scan": path.name,
                        "value": value,
                        "voxels": int(masks[1].sum()),
                        "dsc": dice(*masks),
                        "nsd_area": surface_dice(*masks, volume.spacing, 3.0),
                        "nsd_voxels": edges,
                    }
                )
    return rows


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=int(os.environ.get("BENCH_REPEATS", 3)))
    parser.add_argument("--shape", type=int, nargs=3, default=(256, 256, 220))
    parser.add_argument("--out", type=Path, default=results_file("metrics"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, classes, rounds = ((96, 96, 80), 20, 1) if options.quick else (tuple(options.shape), 60, options.rounds)
    prediction, truth = contents(shape, classes)
    classes = int(truth.max())
    cube = np.zeros((12, 12, 12), np.uint8)
    cube[3:8, 3:8, 3:8] = 1
    seconds, loads, values = {name: [] for name in METHODS}, [], {}
    for method in METHODS.values():  # Imports do not count
        method(cube, cube, 1)
    for _ in range(rounds):
        loads.append(os.getloadavg()[0])
        for name, method in METHODS.items():
            start = time.process_time()
            values[name] = method(prediction, truth, classes)
            seconds[name].append(round(time.process_time() - start, 3))
            print(f"{name}: {seconds[name][-1]} s of a core", flush=True)
    first, *others = METHODS
    worst = [max(abs(np.subtract(values[first][0], values[name][0]))) for name in others[:2]]
    ratios = {name: statistics.median(seconds[name]) / statistics.median(seconds[first]) for name in others}
    distances = [] if SHORT else difference()
    result = {
        "about": __doc__,
        "shape": shape,
        "classes": classes,
        "core_seconds": seconds,
        "times_as_long": ratios,
        "largest_nsd_difference": dict(zip(others, map(float, worst))),
        "machine": machine() | {"load": loads, "versions": versions_of(VERSIONS)},
    }
    print({key: result[key] for key in ("times_as_long", "largest_nsd_difference")})
    if distances:
        off = np.array([row["nsd_area"] - row["nsd_voxels"] for row in distances])
        found = {"mean": float(off.mean()), "mean_absolute": float(abs(off).mean()), "largest": float(abs(off).max())}
        result["difference"] = {"rows": distances, **found}
        print(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)


if __name__ == "__main__":
    main()
