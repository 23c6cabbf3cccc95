"""The tables of a study with people, eight backbones and three seeds, with invented numbers, in the columns that the pipeline writes"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mednext_v2.data.datasets import get_dataset
from mednext_v2.report.arms import planned_rows, read_planned

PEOPLE = {"test": ("synthetic", [f"hd{number:02d}" for number in range(1, 9)], 1), "validation": ("synthetic", ["hd10", "hd11", "hd12"], 2)}
REAL = {"people_bleed_ct": ["ctA", "ctB", "ctC"], "people_lesion_mr": ["mrA", "mrB"]}


def made_scores(rows: pd.DataFrame, splits: Sequence[str], generator: np.random.Generator) -> pd.DataFrame:
    "Rows of networks, tasks, classes and seeds (one each) on test people, validation people and real scans"
    parts = []
    for split in splits:
        scans, people, images = PEOPLE[split]
        made = [rows.assign(person=person, scans=scans, split=split, case=rows.task + f"_{person}_{image:02d}") for person in people for image in range(images)]
        parts += made
    for task, people in REAL.items():
        some = rows[rows.task == task]
        parts += [some.assign(person=person, scans="real", split="test", case=f"{task}_{person}") for person in people]
    table = pd.concat(parts, ignore_index=True)

    def chance(spread: float, *keys: str) -> np.ndarray:
        codes = table.groupby(list(keys), sort=True).ngroup()
        return spread * generator.standard_normal(codes.max() + 1)[codes]

    network = ["ablation", "variant", "backbone", "init"] if "ablation" in table else ["backbone", "init"]
    table["level"] = (
        chance(0.05, "backbone") + chance(0.04, *network) + chance(0.06, "task", "person") + chance(0.1, "task", "label") + chance(0.02, *network, "seed")
    )
    table["level"] += 0.05 * (table.init != "scratch") - 0.15 * (table.group == "pathology") - 0.2 * (table.scans == "real")
    for metric, more in (("dsc", 0.6), ("nsd", 0.5)):
        table[metric] = np.clip(more + table.level + 0.03 * generator.standard_normal(len(table)), 0, 1).round(4)
    absent = (table.group == "pathology") & (table.person == "hd08")  # A person without a finding
    table.loc[absent, ["dsc", "nsd"]] = np.nan
    return table.drop(columns="level").assign(patch="32x32x32", grid="scan", n_voxels=np.where(absent, 0, 50), n_predicted=50)


def made_models(scores: pd.DataFrame, ablations: pd.DataFrame) -> pd.DataFrame:
    "Rows of models.csv"
    keys = ["ablation", "variant", "profile", "task", "backbone", "init", "seed", "patch"]
    both = pd.concat([scores.assign(ablation=None, variant=None), ablations])[keys].drop_duplicates(ignore_index=True)
    larger = 1 + 3 * both.variant.fillna("").str.startswith("compound")
    number = both.backbone.astype("category").cat.codes
    cost = dict(parameters=((0.3 + 0.1 * number) * 1e6 * larger).astype(int), flops=((0.2 + 0.012 * number) * 1e9 * larger**2).astype(int))
    finetune = both.assign(role="finetune", scans=12, **cost)
    pretrain = finetune[finetune.init != "scratch"].drop_duplicates(["ablation", "variant", "backbone", "init", "seed"])
    scans = pretrain.variant.map({"people_2": 16, "people_4": 32}).fillna(48).astype(int)
    made = pd.concat([finetune, pretrain.assign(role="pretrain", task=pretrain.init, scans=scans)], ignore_index=True)
    return made.assign(steps=200, seconds=40.0 + 5 * made.seed, peak_mib=700 + 10 * made.seed, device="cpu")


def made_features(generator: np.random.Generator, profile: str) -> pd.DataFrame:
    "Rows of features.csv; no channel is dead"
    shape = {"variant": ["without", "mean", "sum"], "step": [100, 350, 600], "depth": range(17)}
    table = pd.MultiIndex.from_product(shape.values(), names=shape).to_frame(index=False)
    grn = table.variant != "without"
    noise = generator.standard_normal((2, len(table)))
    return table.assign(
        profile=profile, layer="enc_block_" + table.depth.astype(str), channels=14, dead_share=0.0,
        cosine_distance=0.3 + 0.1 * grn + 0.02 * noise[0], effective_rank=6 + 2 * grn + 0.5 * noise[1],
    )  # fmt: skip


def made_people(tasks: Sequence[str]) -> pd.DataFrame:
    "Rows of people.csv"
    rows = []
    for task in tasks:
        for split, people, images in (("train", 3, 12), ("val", 3, 6), ("test", 8, 8)):
            counts = dict(
                people=people, images=images, as_mapped=people, deformations=images - people, without_finding=1, simulated=images - 1, synthetic=images
            )
            rows.append(dict(task=task, split=split, **counts, intensities="synthetic", scans="synthetic" if split == "test" else "deformed"))
    return pd.DataFrame(rows)


def made_study(profile: str = "study", seed: int = 0) -> dict[str, pd.DataFrame]:
    "All tables, by name"
    generator, plan = np.random.default_rng(seed), read_planned(profile).plan
    keys = {"scores": [], "ablations": ["ablation", "variant"]}
    tables = {}
    for name, rows in planned_rows(profile, 1, 2).items():
        once = rows[[*keys[name], "profile", "task", "label", "group", "backbone", "init", "seed"]].drop_duplicates(ignore_index=True)
        tables[name] = made_scores(once, ["test", "validation"] if name == "scores" else ["test"], generator)
    tables["models"] = made_models(tables["scores"], tables["ablations"])
    tables["features"] = made_features(generator, profile)
    trials = [
        dict(backbone=backbone, start=start, lr=lr, task=task, dice=0.5 + 0.1 * generator.standard_normal())
        for backbone in plan.backbones
        for start in ("pretrain", *plan.inits)
        for lr in (1e-3, 3e-3, 1e-2, 3e-2)
        for task in (plan.corpora if start == "pretrain" else plan.tasks[:2])
    ]
    tables["rates"] = pd.DataFrame(trials)
    tables["people"] = made_people((*plan.corpora, *plan.further, *plan.tasks))
    tables["corpora"] = pd.DataFrame([dict(variant=arm, person=f"hd{number}") for arm in ("ct_full", "mr_full") for number in range(13, 19)])
    return tables


def write_images(folder: Path, scores: pd.DataFrame, backbone: str, seed: int = 0) -> None:
    "Raw scans of the test people, and predictions of one backbone, below a project's folder"
    import nibabel

    from mednext_v2.core import write_json
    from mednext_v2.data.datasets import write_description
    from mednext_v2.data.scans import write_volume

    generator, profile = np.random.default_rng(seed), scores.profile.iloc[0]
    for name, part in scores[(scores.split == "test") & (scores.scans != "real")].groupby("task"):
        task, about = get_dataset(name), part
        raw, affine = folder / "data/raw" / profile / task.folder, np.diag([-3.0, 3, 3, 1])
        at = np.indices((28, 32, 12)).transpose(1, 2, 3, 0) - [14, 16, 6]
        places = {value: at - [-6 + 12 * (value % 2), 8 - 5 * (value % 4), 0] for value in task.labels.values()}
        for case in [*sorted(about.case.unique()), f"{name}_hd13_00", f"{name}_hd14_00", f"{name}_hd15_00"]:
            label = np.zeros((28, 32, 12), np.uint8)
            for value, place in places.items():
                label[np.linalg.norm(place + generator.normal(0, 0.5, 3), axis=-1) < 3.5] = value
            image = (generator.normal(0, 0.15, label.shape) + (np.linalg.norm(at, axis=-1) < 14) + 0.5 * (label > 0)).astype(np.float32)
            part = "Ts" if case in set(about.case) else "Tr"
            write_volume(raw / f"images{part}/{case}_0000.nii.gz", image, affine)
            write_volume(raw / f"labels{part}/{case}.nii.gz", label, affine)
            for init in scores.init.unique():
                path = folder / f"runs/{profile}/evaluate/{init}-{backbone}/predictions/{name}-s0/{case}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(np.where(generator.random(label.shape) < 0.9, label, 0).astype(np.uint8), affine), path)
        write_description(task, raw, 3)
        write_json(raw / "splits_final.json", [{"train": [f"{name}_hd13_00", f"{name}_hd14_00"], "val": [f"{name}_hd15_00"]}])
