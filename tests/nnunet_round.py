"""nnU-Net's whole way with a MedNeXt of this library on a toy data set, on a CPU: plan, preprocess, train, validate, predict, import, and compare labels.

    python tests/nnunet_round.py FOLDER [stock | trainers]

A program of its own, because nnU-Net reads its folders from the environment; tests/test_nnunet.py runs it, and so may another
installation of nnU-Net. It prints one line of JSON. `trainers` trains with a trainer of ours from random weights, `stock` with nnU-Net's own from
a model folder, which is taken away before prediction.
"""

import json
import multiprocessing
import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from nnunet_peer import leave_out_primus

TRAINER = """
import torch
from mednext_v2.integrations.nnunet_trainers.mednext_trainers import nnUNetTrainerMedNeXtV2
from mednext_v2.training.recipe import Recipe

class nnUNetTrainerShort(nnUNetTrainerMedNeXtV2):
    recipe = Recipe(steps=500, warmup=250, batch_size=2)  # Two epochs, one of them warm-up

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 3, 1
"""


def write_data(folder: Path, spacing=(5.0, 1.25, 1.0), size=(20, 32, 40), cases=5) -> None:
    "A raw data set of nnU-Net: two balls on noise, thick slices along X, so nnU-Net turns the axes"
    raw, rng = folder / "raw/Dataset042_Toy", np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1) * spacing
    for part in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / part).mkdir(parents=True)
    for case in range(cases + 1):
        label = np.zeros(size, np.uint8)
        for value, place in ((1, 0.3), (2, 0.7)):
            centre = np.array(size) * spacing * place + rng.normal(0, 1, 3)
            label[((grid - centre) ** 2).sum(-1) < (8 + 4 * value) ** 2] = value
        image, affine = rng.normal(0, 20, size) + 100.0 * label, np.diag([*spacing, 1.0])
        part = "imagesTr" if case < cases else "imagesTs"
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), raw / f"{part}/toy{case}_0000.nii.gz")
        if case < cases:
            nib.save(nib.Nifti1Image(label, affine), raw / f"labelsTr/toy{case}.nii.gz")
    about = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "small": 1, "large": 2}, "numTraining": cases, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(about))


def set_environment(folder: Path, trainers: bool) -> None:
    "What nnU-Net reads when it is imported"
    os.environ |= {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
    os.environ |= {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    (folder / "results").mkdir(exist_ok=True)
    if trainers:
        from mednext_v2.integrations.nnunet import trainers_folder

        own = folder / "own_trainers"
        own.mkdir(exist_ok=True)
        (own / "short.py").write_text(TRAINER)
        os.environ["nnUNet_extTrainer"] = os.pathsep.join([str(trainers_folder()), str(own)])


def shorten_stock_trainer() -> None:
    "One epoch of three steps"
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    whole = nnUNetTrainer.print_plans

    def print_plans(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 3, 1
        whole(self)

    nnUNetTrainer.print_plans = print_plans


def write_start(folder: Path) -> None:
    "A model folder of random weights with a class in common"
    from mednext_v2.models.card import Card, save_model
    from mednext_v2.models.registry import create

    sizes = {"width": 4, "depths": (1,) * 7, "ratios": (2,) * 7}
    scaling = {"schemes": ["zscore"], "mean": [0], "std": [1], "low": [0], "high": [0], "nonzero": False}
    known = {"labels": {"large": 1}, "groups": {"large": "organ"}, "task": "toy", "modality": "MR", "spacing": (5.0, 1.25, 1.0), "patch": (16, 32, 32)}
    save_model(folder, create("mednext_v2_tiny", 1, 2, **sizes), Card("mednext_v2_tiny", sizes, 1, normalisation=scaling, recipe={}, **known))


def run(program, *words: str) -> None:
    "An entry point of nnU-Net with its command line"
    sys.argv = [program.__name__, *words]
    program()


def main(folder: Path, kind: str) -> dict:
    from mednext_v2.cli import main as mednextv2

    write_data(folder)
    set_environment(folder, kind == "trainers")
    leave_out_primus()
    multiprocessing.cpu_count = lambda: 1  # As many threads are used
    import torch
    from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import preprocess_entry
    from nnunetv2.inference import predict_from_raw_data as predicting
    from nnunetv2.run.run_training import run_training_entry

    torch.manual_seed(0)
    plans, trainer, network = "nnUNetMedNeXtV2TinyPlans", "nnUNetTrainerShort", ["--backbone", "tiny", "--network", "width=4"]
    if kind == "stock":
        shorten_stock_trainer()
        write_start(folder / "start")
        plans, trainer, network = "nnUNetMedNeXtV2TinyPretrainedPlans", "nnUNetTrainer", ["--from", str(folder / "start")]
    mednextv2(["nnunet", "plan", "-d", "42", *network, "--memory", "0.05"])
    run(preprocess_entry, "-d", "42", "-plans_name", plans, "-c", "3d_fullres", "-np", "1")
    run(run_training_entry, "42", "3d_fullres", "0", "-p", plans, "-tr", trainer, "-device", "cpu")
    torch.set_num_threads(1)
    shutil.rmtree(folder / "start", ignore_errors=True)
    results, scans = folder / f"results/Dataset042_Toy/{trainer}__{plans}__3d_fullres", folder / "raw/Dataset042_Toy/imagesTs"
    torch.half = torch.float32  # The type of nnU-Net's sums, which would decide ties by chance
    same = ["-d", "42", "-i", str(scans), "-c", "3d_fullres", "-f", "0", "-p", plans, "-tr", trainer, "-device", "cpu"]
    run(predicting.predict_entry_point, *same, "-o", str(folder / "theirs"), "-npp", "0", "-nps", "0")
    mednextv2(["import", str(results), str(folder / "model"), "--licence", "none"])
    mednextv2(["predict", "-m", str(folder / "model"), "-i", str(scans), "-o", str(folder / "ours"), "--tta", "--device", "cpu"])
    theirs, ours = (np.asarray(nib.load(folder / name / "toy5.nii.gz").dataobj) for name in ("theirs", "ours"))
    planned = json.loads((folder / f"preprocessed/Dataset042_Toy/{plans}.json").read_text())["configurations"]["3d_fullres"]
    summary = json.loads((results / "fold_0/validation/summary.json").read_text())
    return {
        "labels": sorted(map(int, np.unique(ours))),
        "same": float((theirs == ours).mean()),
        "validated": len(summary["metric_per_case"]),
        "patch": planned["patch_size"],
        "strides": planned["architecture"]["arch_kwargs"]["strides"],
        "kernels": planned["architecture"]["arch_kwargs"]["kernel_sizes"],
        "card": json.loads((folder / "model/card.json").read_text())["overrides"],
    }


if __name__ == "__main__":
    found = main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "trainers")
    print(json.dumps(found))
