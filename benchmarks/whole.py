"""A whole prediction, from a CT's file to its label map: this project, nnU-Net 2.8 and TotalSegmentator's pipeline, as whole commands.

    python benchmarks/whole.py            # tiny and base, some six minutes each on two cores
    python benchmarks/whole.py tiny       # a network of width 4, a CT of 512 x 512 x 300 voxels, 16 classes: all that is around the network
    python benchmarks/whole.py base       # the Base network, 100 classes, a small CT
    python benchmarks/whole.py full       # the Base network, 100 classes, 512 x 512 x 300: hours; full logits are 31 GB in float32
    python benchmarks/whole.py table      # the tables, from benchmarks/results/whole.json

`mednextv2 nnunet plan` plans the network, `mednextv2 import` makes the model folder of the same random weights, and each side predicts one scan
with every core (or BENCH_THREADS): `mednextv2 predict`; `nnUNetv2_predict --disable_tta -npp 0 -nps 0`, whose further processes would hold copies of one scan;
TotalSegmentator's `nnUNet_predict_image`, which resamples the scan to the network's voxels, lets nnU-Net predict there, and takes the labels back
by the nearest voxel. TotalSegmentator would replace packages here: give the Python of an environment of its own as BENCH_TOTALSEGMENTATOR.

Seconds are those of a process, start and imports included, those of a stage without what it calls of other stages. Memory is VmHWM, or that
of all processes together where it is more. `BENCH_SHRINK=0.2` makes a short run, to see that it works.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from types import ModuleType

import numpy as np

from data import heading, log, measure_parts, row, run_script
from nnunet_peer import leave_out_primus, peak_mib

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "whole.json"
SHRINK = float(os.environ.get("BENCH_SHRINK", 1))
THREADS = int(os.environ.get("BENCH_THREADS", os.cpu_count() or 1))
TOTALSEGMENTATOR = os.environ.get("BENCH_TOTALSEGMENTATOR", "")
SPACING, TARGET = (0.8, 0.8, 1.5), 1.5  # mm
PARTS = {
    # Network, its width, classes, scan, patch
    "tiny": ("tiny", 4, 16, (512, 512, 300), 128),
    "base": ("base", 32, 100, (180, 180, 96), 64),
    "full": ("base", 32, 100, (512, 512, 300), 128),
}
PLANS, SCANS, CONFIGURATION = "nnUNetMedNeXtWholePlans", "Dataset042_Whole", "3d_fullres"
STAGES = ("read", "prepare", "network", "back", "write", "rest")


# ---------------------------------------------------------------- clocks
seconds: dict[str, float] = defaultdict(float)
local = threading.local()


def timed(function, stage):
    "A function whose time counts for a stage, less that of timed functions that it calls"

    @wraps(function)
    def run(*arguments, **options):
        stack = local.__dict__.setdefault("stack", [])
        stack.append(0.0)
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            took = time.perf_counter() - begin
            seconds[stage] += took - stack.pop()
            if stack:
                stack[-1] += took

    return run


def clock(owner, stage: str, *names: str) -> None:
    "Time functions of a module or class"
    for name in names:
        setattr(owner, name, timed(getattr(owner, name), stage))


def finish() -> dict:
    "What a side reports at its end"
    import resource

    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"stages": dict(seconds), "cpu_s": sum(one.ru_utime + one.ru_stime for one in used), "peak_mib": peak_mib()}


# ---------------------------------------------------------------- the sides, one process each
def ours(work: str) -> dict:
    from mednext_v2.cli import main
    from mednext_v2.inference import files, predictor

    clock(files, "read", "read_job")
    clock(predictor, "prepare", "prepare_image")
    clock(predictor, "back", "tiled_labels")
    clock(files, "write", "write_job")
    average = predictor.average_models
    predictor.average_models = lambda *arguments: timed(average(*arguments), "network")
    main(["predict", "-m", f"{work}/model", "-i", f"{work}/scans/scan_0000.nii.gz", "-o", f"{work}/ours.nii.gz", "--device", "cpu", "--quiet"])
    return finish()


def clock_nnunet() -> ModuleType:
    "nnU-Net's prediction, timed"
    leave_out_primus()
    multiprocessing.cpu_count = lambda: THREADS  # As many threads it uses
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.inference import export_prediction, predict_from_raw_data
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor

    clock(SimpleITKIO, "read", "read_images")
    clock(SimpleITKIO, "write", "write_seg")
    clock(DefaultPreprocessor, "prepare", "run_case")
    clock(predict_from_raw_data.nnUNetPredictor, "network", "_internal_maybe_mirror_and_predict")
    clock(predict_from_raw_data.nnUNetPredictor, "back", "predict_sliding_window_return_logits")
    clock(export_prediction, "back", "convert_predicted_logits_to_segmentation_with_correct_shape")
    return predict_from_raw_data


def nnunet(work: str) -> dict:
    predicting = clock_nnunet()
    words = {"-i": f"{work}/scans", "-o": f"{work}/theirs", "-d": "42", "-p": PLANS, "-c": CONFIGURATION, "-f": "0", "-device": "cpu", "-npp": "0", "-nps": "0"}
    sys.argv = ["nnUNetv2_predict", "--disable_tta", "--disable_progress_bar", *(word for pair in words.items() for word in pair)]
    predicting.predict_entry_point()
    os.replace(f"{work}/theirs/scan.nii.gz", f"{work}/nnunet.nii.gz")
    return finish()


def totalsegmentator(work: str) -> dict:
    clock_nnunet()
    from totalsegmentator import nnunet as pipeline

    begun, change = [], pipeline.change_spacing

    def change_spacing(*arguments, **options):
        begun.append(1)
        return timed(change, "prepare" if len(begun) == 1 else "back")(*arguments, **options)

    pipeline.change_spacing = change_spacing
    pipeline.nnUNet_predict_image(
        f"{work}/scans/scan_0000.nii.gz",
        f"{work}/totalsegmentator.nii.gz",
        42,
        CONFIGURATION,
        folds=[0],
        trainer="nnUNetTrainer",
        plans=PLANS,
        resample=TARGET,
        task_name="lung_vessels",  # Names of labels, which it writes beside them; and windows that overlap by a half
        quiet=True,
        device="cpu",
    )
    return finish()


SIDES = {"ours": ours, "nnunet": nnunet, "totalsegmentator": totalsegmentator}


# ---------------------------------------------------------------- scan and weights
def sized(part: str) -> tuple:
    "Network, width, classes, scan and patch; smaller in a short run"
    name, width, classes, shape, patch = PARTS[part]
    return name, width, classes, tuple(max(32, int(n * SHRINK)) for n in shape), max(32, int(patch * SHRINK) // 16 * 16)


def write_scan(path: Path, shape: tuple) -> None:
    "A body with fifty ellipsoids and the noise of a diagnostic CT"
    from mednext_v2.data.scans import write_volume

    rng, half = np.random.default_rng(0), np.array(shape) / 2
    x, y = np.ogrid[: shape[0], : shape[1]]
    body = ((x - half[0]) / (0.85 * half[0])) ** 2 + ((y - half[1]) / (0.6 * half[1])) ** 2 < 1
    image = np.where(body, 40, -1000).astype(np.int16)[..., None].repeat(shape[2], 2)
    for _ in range(50):
        radius = rng.uniform(0.06, 0.2, 3) * half
        centre = half + rng.uniform(-0.5, 0.5, 3) * half * (1.2, 0.8, 1.7)
        box = tuple(slice(max(0, int(c - r)), int(c + r) + 2) for c, r in zip(centre, radius))
        grid = np.ogrid[tuple(slice(s.start, min(s.stop, n)) for s, n in zip(box, shape))]
        image[box][sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius)) < 1] = rng.integers(-100, 400)
    for start in range(0, shape[0], 32):
        part = image[start : start + 32]
        part += rng.normal(0, 15, part.shape).astype(np.int16)
    path.parent.mkdir(parents=True)
    write_volume(path, image, np.diag([*SPACING, 1.0]))


def describe(work: Path, classes: int, shape: tuple) -> None:
    "A raw data set as nnU-Net knows it: a description, and what it measured"
    raw, measured = (work / f"{kind}/{SCANS}" for kind in ("raw", "preprocessed"))
    for place in (raw / "imagesTr", raw / "labelsTr", measured):
        place.mkdir(parents=True)
    for case in range(5):
        (raw / f"imagesTr/case{case}_0000.nii.gz").touch()
        (raw / f"labelsTr/case{case}.nii.gz").touch()
    labels = {"background": 0, **{f"structure{value}": value for value in range(1, classes)}}
    about = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 5, "file_ending": ".nii.gz", "overwrite_image_reader_writer": "SimpleITKIO"}
    (raw / "dataset.json").write_text(json.dumps(about))
    values = dict(max=400.0, mean=40.0, median=40.0, min=-1000.0, percentile_00_5=-900.0, percentile_99_5=350.0, std=150.0)
    sizes = {"spacings": [SPACING[::-1]] * 5, "shapes_after_crop": [shape[::-1]] * 5, "median_relative_size_after_cropping": 1.0}
    (measured / "dataset_fingerprint.json").write_text(json.dumps(sizes | {"foreground_intensity_properties_per_channel": {"0": values}}))


def setup(work: str, part: str) -> dict:
    "A scan, nnU-Net's results folder of random weights, and the model folder that is imported from it"
    import torch

    leave_out_primus()
    from mednext_v2.integrations.nnunet import NNUNetMedNeXt, plan_nnunet
    from mednext_v2.zoo.importers import import_model

    place, (name, width, classes, shape, patch) = Path(work), sized(part)
    write_scan(place / "scans/scan_0000.nii.gz", shape)
    describe(place, classes, shape)
    path = plan_nnunet(42, name, spacing=(TARGET,) * 3, plans_name=PLANS, overrides={"width": width})
    plans = json.loads(path.read_text())
    configuration = plans["configurations"][CONFIGURATION]
    configuration["patch_size"] = [patch] * 3
    torch.manual_seed(0)
    model = NNUNetMedNeXt(1, classes, **configuration["architecture"]["arch_kwargs"])
    for value in model.parameters():  # As initialised, one class would win everywhere
        value.data += 0.5 * value.std(correction=0) * torch.randn_like(value)
    results = place / f"results/{SCANS}/nnUNetTrainer__{PLANS}__{CONFIGURATION}"
    (results / "fold_0").mkdir(parents=True)
    (results / "plans.json").write_text(json.dumps(plans))
    (results / "dataset.json").write_text((place / f"raw/{SCANS}/dataset.json").read_text())
    known = {"trainer_name": "nnUNetTrainer", "init_args": {"configuration": CONFIGURATION}, "inference_allowed_mirroring_axes": None}
    torch.save(known | {"network_weights": model.state_dict()}, results / "fold_0/checkpoint_final.pth")
    import_model(results, place / "model", {"licence": "none"}, fold=0)
    return {"strides": configuration["architecture"]["arch_kwargs"]["strides"]}


# ---------------------------------------------------------------- measurements
def memory_mib(top: int) -> float:
    "Memory of a process and of all below it; what a process shares with those that it was forked from counts once"
    parents = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # It has ended
    family = {top}
    while more := {number for number, parent in parents.items() if parent in family} - family:
        family |= more
    total = 0
    for number in family:
        try:
            file, field = ("status", "VmRSS:") if number == top else ("smaps_rollup", "Pss:")
            lines = Path(f"/proc/{number}/{file}").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith(field)), 0)
    return total / 1024


def run(name: str, work: Path, python: str = sys.executable, **arguments) -> dict:
    "A process for one of `CHILDREN`: what it reports, its seconds, and the most memory of all its processes together"
    environment = {**os.environ, **{f"nnUNet_{kind}": str(work / kind) for kind in ("raw", "preprocessed", "results")}}
    environment |= {"OMP_NUM_THREADS": str(THREADS), "nnUNet_compile": "f", "PYTHONPATH": str(HERE.parent), "TOTALSEG_HOME_DIR": str(work)}
    command = [python, __file__, "--child", name, json.dumps({"work": str(work), **arguments})]
    begin, most = time.perf_counter(), 0.0
    with open(work / "out.txt", "w+") as out, open(work / "errors.txt", "w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=errors)
        while process.poll() is None:
            most = max(most, memory_mib(process.pid))
            time.sleep(0.2)
        took = time.perf_counter() - begin
        out.seek(0), errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{name} failed ({process.returncode}):\n{errors.read()[-3000:]}")
        found = json.loads(out.read().splitlines()[-1])
    if "stages" in found:
        stages = {stage: found["stages"].get(stage, 0.0) for stage in STAGES}
        stages["rest"] = took - sum(stages.values())
        found |= {"seconds": took, "stages": stages, "peak_mib": max(most, found["peak_mib"])}
        log(f"{name}: {took:.1f} s, {found['peak_mib']:.0f} MiB; " + ", ".join(f"{stage} {value:.1f}" for stage, value in stages.items()))
    return found


def measure(part: str) -> dict:
    "All sides once, one after the other; labels that another side shares with ours"
    import nibabel as nib

    with tempfile.TemporaryDirectory(prefix="bench_whole_") as folder:
        work, found, failed = Path(folder), {}, {}
        run("setup", work, part=part)
        for side in SIDES:
            if side == "totalsegmentator" and not TOTALSEGMENTATOR:
                failed[side] = "not available: BENCH_TOTALSEGMENTATOR names no Python"
                continue
            try:
                found[side] = run(side, work, TOTALSEGMENTATOR if side == "totalsegmentator" else sys.executable)
            except RuntimeError as error:
                if side == "ours":
                    raise
                failed[side] = str(error)[-500:]
                log(failed[side])
        labels = {side: np.asarray(nib.load(work / f"{side}.nii.gz").dataobj) for side in found}
        same = {side: float((labels["ours"] == values).mean()) for side, values in labels.items() if side != "ours"}
        size = dict(zip(("network", "width", "classes", "shape", "patch"), sized(part)))
        return {
            "size": size,
            "shrink": SHRINK,
            "threads": THREADS,
            "sides": found,
            "failed": failed,
            "same_labels": same,
            "classes_seen": len(np.unique(labels["ours"])),
        }


# ---------------------------------------------------------------- tables
def tables(results: dict) -> str:
    lines = heading("CPU, all cores", "side", "seconds", *STAGES, "peak MiB", "time ratio", "memory ratio", "same labels")
    for name, entry in results.items():
        found = entry["result"]
        size, base = found["size"], found["sides"]["ours"]
        title = f"{name}: {size['network']} of width {size['width']}, {size['classes']} classes, {' x '.join(map(str, size['shape']))}"
        for side, values in found["sides"].items():
            stages = [f"{values['stages'][stage]:.1f}" for stage in STAGES]
            ratios = ["", "", ""]
            if side != "ours":
                ratios = [f"{base[field] / values[field]:.2f}" for field in ("seconds", "peak_mib")] + [f"{found['same_labels'][side]:.2%}"]
            lines.append(row(title, side, f"{values['seconds']:.1f}", *stages, f"{values['peak_mib']:.0f}", *ratios))
        lines += [row(title, side, "not available", *[""] * (len(STAGES) + 4)) for side in found["failed"]]
    return "\n".join(lines)


CHILDREN = {**SIDES, "setup": setup}


def main(parts: list[str]) -> None:
    path = RESULTS if SHRINK == 1 else Path(tempfile.gettempdir()) / "whole.json"
    measure_parts(path, tuple(PARTS), measure, parts or ["tiny", "base"], tables)


if __name__ == "__main__":
    run_script(CHILDREN, main)
