"""From a prepared scan to labels on its own grid: this project, nnU-Net 2.8's predictor, MONAI's inferer.

    python benchmarks/inference.py            # all of it
    python benchmarks/inference.py many       # a part: some (60 classes), many (167 classes), large (512 x 512 x 400)
    python benchmarks/inference.py table      # the tables, from benchmarks/results/inference.json

The same network, windows and overlap, and the same image, on one thread of the CPU. Each side takes a network's
grid to labels on the scan's grid: nnU-Net by its predictor, its resampling of logits and its argmax; MONAI by
`sliding_window_inference`, `interpolate` and `argmax`. nnU-Net sums in float16, the two others in float32. Every
run is a process of its own, and the sides take turns. Times are without imports. Memory is what the process held
at its peak, and that less what it held before the scan. `BENCH_SHRINK=0.5` makes a short run, to see that it works.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from data import heading, log, machine, results_file, row, show, spread
from nnunet_peer import peak_mib

RESULTS = results_file("inference")
REPEATS = int(os.environ.get("BENCH_REPEATS", 3))
SHRINK = float(os.environ.get("BENCH_SHRINK", 1))
SIZE = {
    # Classes, network's grid, scan's grid, patch
    "some": (60, (128, 128, 112), (192, 192, 168), (64, 64, 64)),
    "many": (167, (128, 128, 112), (192, 192, 168), (64, 64, 64)),
    "large": (167, (512, 512, 400), (512, 512, 400), (128, 128, 128)),
}
LARGE_BOUND_GB = 6


# ---------------------------------------------------------------- the sides, one process each
def ours(model, image, patch: tuple, shape: tuple) -> np.ndarray:
    from mednext_v2.inference.windows import average_models, eval_mode, lay_windows, tiled_labels

    with eval_mode(model):
        return tiled_labels(average_models([model]), image, lay_windows(image.shape[1:], patch, 0.5, shape))


def monai(model, image, patch: tuple, shape: tuple) -> np.ndarray:
    import torch
    from monai.inferers import sliding_window_inference

    with torch.inference_mode():
        logits = sliding_window_inference(torch.from_numpy(image).float()[None], patch, 1, model.eval(), 0.5, "gaussian")
        if shape != logits.shape[2:]:
            logits = torch.nn.functional.interpolate(logits, shape, mode="trilinear", align_corners=False)
        return logits[0].argmax(0).numpy()


def nnunet(model, image, patch: tuple, shape: tuple) -> np.ndarray:
    from types import SimpleNamespace

    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    classes = model(torch.zeros(1, 1, *patch)).shape[1]
    predictor = nnUNetPredictor(0.5, True, False, False, torch.device("cpu"), allow_tqdm=False)
    predictor.network, predictor.configuration_manager = model, SimpleNamespace(patch_size=list(patch))
    names = {"background": 0, **{f"structure{value}": value for value in range(1, classes)}}
    predictor.label_manager = LabelManager(names, None)
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image).float())
    coarse, fine = (tuple(1.0 / n for n in size) for size in (image.shape[1:], shape))
    # As in its plans: linear, and along a coarse axis the nearest
    logits = resample_data_or_seg_to_shape(logits, shape, coarse, fine, is_seg=False, order=1, order_z=0)
    return np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits))


SIDES = {"ours": ours, "monai": monai, "nnunet": nnunet}


def child(side: str, part: str, out: str) -> dict:
    "One side on one scan: seconds and memory; the labels go to a file"
    import torch

    from mednext_v2.models.registry import create

    torch.set_num_threads(1)
    torch.manual_seed(0)
    classes, grid, shape, patch = sized(part)
    model = torch.nn.Conv3d(1, classes, 1)
    if part != "large":  # There memory is in question, and a network of one layer leaves all of it to the logits
        model = create("mednext_v2_tiny", 1, classes, width=8)
        for value in model.parameters():  # As initialised, one class would win everywhere
            value.data += 0.2 * torch.randn_like(value)
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, *grid), np.float32).astype(np.float16)
    run = SIDES[side]
    run(model, image[:, :32, :32, :32], (32, 32, 32), (40, 40, 40))  # Imports, first use
    before, begin, cpu = peak_mib(), time.perf_counter(), time.process_time()
    labels = run(model, image, patch, shape)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    peak = peak_mib()
    np.save(out, labels.astype(np.uint8))
    return {"seconds": seconds, "cpu_s": cpu, "peak_mib": peak, "before_mib": before, "above_mib": peak - before}


# ---------------------------------------------------------------- measurements
def sized(part: str) -> tuple:
    "Classes, grids and patch; smaller in a short run, in whole eighths of the patch"
    classes, *sizes = SIZE[part]
    return classes, *(tuple(max(16, int(n * SHRINK) // 16 * 16) for n in size) for size in sizes)


def measure(side: str, part: str, out: Path) -> dict:
    command = [sys.executable, __file__, "--child", side, part, str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{side}, {part} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    log(f"{part}, {side}: {found['seconds']:.1f} s, {found['peak_mib']:.0f} MiB")
    return found


def compare(part: str, work: Path) -> dict:
    "All sides in turn; labels of ours that others have too"
    runs = {side: [] for side in SIDES}
    for _ in range(REPEATS):
        for side in SIDES:
            runs[side].append(measure(side, part, work / f"{side}.npy"))
    labels = {side: np.load(work / f"{side}.npy") for side in SIDES}
    same = {side: float((labels["ours"] == labels[side]).mean()) for side in ("monai", "nnunet")}
    fields = {f: {side: spread([run[f] for run in some]) for side, some in runs.items()} for f in runs["ours"][0]}
    return {"size": sized(part), "classes_seen": len(np.unique(labels["ours"])), "same_labels": same, "measured": fields}


def large(work: Path) -> dict:
    "Ours alone, on a scan whose logits fill more than this machine"
    found = measure("ours", "large", work / "ours.npy")
    return {"size": sized("large"), "measured": found, "logits_gb": 4e-9 * SIZE["large"][0] * float(np.prod(sized("large")[1]))}


PARTS = {part: partial(compare, part) for part in ("some", "many")} | {"large": large}


# ---------------------------------------------------------------- tables
def side_by_side(results: dict) -> list[str]:
    lines = heading("classes", "side", "seconds", "processor s", "peak MiB", "above start MiB", "time ratio", "peak ratio", "above start ratio", "same labels")
    for found in results:
        values = found["measured"]
        for side in SIDES:
            ratios = ["", "", "", ""]
            if side != "ours":
                ratios = [f"{values[f]['ours']['median'] / values[f][side]['median']:.2f}" for f in ("seconds", "peak_mib", "above_mib")]
                ratios.append(f"{found['same_labels'][side]:.4%}")
            cells = [show(values[f][side], digits) for f, digits in (("seconds", 1), ("cpu_s", 1), ("peak_mib", 0), ("above_mib", 0))]
            lines.append(row(found["size"][0], side, *cells, *ratios))
    return lines


def tables(results: dict) -> str:
    known = {name: entry["result"] for name, entry in results.items()}
    lines = side_by_side([known[name] for name in ("some", "many") if name in known])
    if "large" in known:
        found = known["large"]
        classes, grid, *_ = found["size"]
        lines += [
            "",
            f"{classes} classes on {' x '.join(map(str, grid))}: peak {found['measured']['peak_mib'] / 953.674:.2f} GB "
            f"(bound {LARGE_BOUND_GB} GB, full logits {found['logits_gb']:.0f} GB), {found['measured']['seconds']:.0f} s",
        ]
    return "\n".join(lines)


def main(parts: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in [part for part in parts or PARTS if part != "table"]:
        with tempfile.TemporaryDirectory(prefix="bench_inference_") as work:
            known, begin = machine(), time.perf_counter()
            results[name] = {"machine": known, "shrink": SHRINK, "result": PARTS[name](Path(work)), "load_after": os.getloadavg()}
            results = {part: results[part] for part in PARTS if part in results}
            log(f"{name}: {time.perf_counter() - begin:.0f} s")
        if SHRINK == 1:
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*sys.argv[2:])))
    else:
        main(sys.argv[1:])
