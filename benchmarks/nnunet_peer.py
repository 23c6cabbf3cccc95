"""nnU-Net's own fingerprint, plan and preprocessing of raw data sets, in a process of its own.

    python benchmarks/nnunet_peer.py REQUEST.json

REQUEST.json says what to do; times and more go to the file that it names as `answer`. nnU-Net reads its
folders from the environment when it is imported, so whoever calls sets them: `request` does.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType


def leave_out_primus() -> None:
    "nnU-Net's search for a trainer imports all of its own, and those of Primus need a torchvision that fits torch"
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        name = "nnunetv2.training.nnUNetTrainer.primus.primus_trainers"
        sys.modules[name] = ModuleType(name)


def request(
    folder: Path,  # Holds raw/, and gets preprocessed/ and results/
    datasets: dict[int, tuple],  # Number to target spacing in stored order, z y x, mm
    processes: int = 1,
    steps: tuple[str, ...] = ("fingerprint", "plan", "preprocess"),
    voxels: float = 10e7,  # Foreground voxels drawn for the fingerprint; nnU-Net's own number if not given
    raw: Path | None = None,  # Another folder of raw data sets than folder / "raw"
) -> dict:  # Answer of the process; RuntimeError with its last words if it failed
    "Runs this file as a process and reads its answer"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    places = {part: folder / part for part in ("raw", "preprocessed", "results")}
    places["raw"] = raw or places["raw"]
    asked = {"datasets": datasets, "processes": processes, "steps": steps, "voxels": voxels}
    asked["answer"] = str(folder / "answer.json")
    (folder / "request.json").write_text(json.dumps(asked))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{f"nnUNet_{k}": str(v) for k, v in places.items()}}
    command = [sys.executable, __file__, str(folder / "request.json")]
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nnU-Net failed:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}")
    answer = json.loads((folder / "answer.json").read_text())
    return answer | {"command_s": time.perf_counter() - start}


def fingerprint(number: int, processes: int, voxels: float) -> None:
    "dataset_fingerprint.json by nnU-Net"
    from nnunetv2.experiment_planning.dataset_fingerprint import fingerprint_extractor

    extractor = fingerprint_extractor.DatasetFingerprintExtractor(number, processes)
    extractor.show_progress_bar = False
    extractor.num_foreground_voxels_for_intensitystats = voxels
    extractor.run(overwrite_existing=True)


def plan(number: int, spacing: list[float] | None) -> None:
    "nnUNetPlans.json by nnU-Net"
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

    plan_experiment_dataset(number, overwrite_target_spacing=spacing)


def preprocess(number: int, processes: int) -> None:
    "Arrays of the configuration 3d_fullres by nnU-Net"
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    settings = {"configurations": ("3d_fullres",), "num_processes": [processes], "show_progress_bar": False}
    preprocess_dataset(number, **settings)


def in_process(number: int) -> dict:
    "What a worker of nnU-Net's preprocessing does, without the pool: its seconds and its peak memory"
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
    from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    name = maybe_convert_to_dataset_name(number)
    place = Path(nnUNet_preprocessed) / name
    plans = PlansManager(str(place / "nnUNetPlans.json"))
    known = json.loads((place / "dataset.json").read_text())
    listed = get_filenames_of_train_images_and_targets(str(Path(nnUNet_raw) / name), known)
    settings = plans.get_configuration("3d_fullres")
    preprocessor = settings.preprocessor_class(verbose=False)
    folder = place / "in_process"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before, begin, cpu = peak_mib(), time.perf_counter(), time.process_time()
    for id, files in listed.items():
        preprocessor.run_case_save(str(folder / id), files["images"], files["label"], plans, settings, known)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    written = sum(path.stat().st_size for path in folder.iterdir())
    size = {"peak_mib": peak_mib(), "imports_mib": before, "bytes": written}
    return {"cases": len(listed), "seconds": seconds, "cpu_s": cpu, **size}


def peak_mib() -> float:
    "Most memory that this process had resident since it began, of itself alone"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main(path: str) -> None:
    asked = json.loads(Path(path).read_text())
    begin = time.perf_counter()
    import nnunetv2.experiment_planning.plan_and_preprocess_api  # noqa: F401

    times, cases = {"import": time.perf_counter() - begin}, {}
    for number, spacing in asked["datasets"].items():
        actions = {
            "fingerprint": lambda: fingerprint(int(number), asked["processes"], asked["voxels"]),
            "plan": lambda: plan(int(number), spacing),
            "preprocess": lambda: preprocess(int(number), asked["processes"]),
            "in process": lambda: cases.update({number: in_process(int(number))}),
        }
        for step in asked["steps"]:
            begin = time.perf_counter()
            actions[step]()
            times[f"{step} {number}"] = time.perf_counter() - begin
    Path(asked["answer"]).write_text(json.dumps({"times_s": times, "cases": cases}))


if __name__ == "__main__":
    main(sys.argv[1])
