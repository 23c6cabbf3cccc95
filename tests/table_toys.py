"""The four tables of a profile with invented numbers, in the columns that the pipeline writes: for the paper's notebooks"""

from pathlib import Path

import numpy as np
import pandas as pd

TASKS = {  # Task: class to group, as in data/datasets.yaml
    "abdomen_ct": {"liver": "organ", "spleen": "organ", "aorta": "organ"},
    "liver_lesion_ct": {"liver": "organ", "lesion": "pathology"},
    "brain_lesion_mr": {"oedema": "pathology", "core": "pathology"},
}
BACKBONES = {"mednext_v2_tiny": 0.10, "unet": 0.02, "resenc_l": 0.05}
VARIANTS = {  # Ablation: variant to what it adds to a score
    "grn": {"without": 0.0, "mean": 0.05, "sum": 0.04},
    "scaling": {"base": 0.0, "depth": 0.02, "width": 0.03, "context": 0.04, "compound": 0.07},
    "schedules": {"default": 0.0, "no_warmup": -0.01, "lr_low": -0.05, "lr_high": -0.02, "frozen_encoder": -0.1},
    "pretraining_data": {"cases_3": -0.04, "cases_6": -0.02, "all": 0.0},
    "modality": {"ct_full": 0.0, "mr_full": -0.01, "ct_frozen": -0.08, "mr_frozen": -0.12},
}
COSTS = {"base": (1, 1), "depth": (1.8, 1.7), "width": (2.2, 2.1), "context": (1, 3.4), "compound": (3.9, 12)}


def toy_scores(seeds=(0, 1), cases=4, seed=0) -> pd.DataFrame:
    "Rows of scores.csv"
    generator, rows = np.random.default_rng(seed), []
    for backbone, gain in BACKBONES.items():
        for init in ("scratch", "corpus_ct"):
            rows += _rows(generator, gain + 0.08 * (init != "scratch"), backbone, init, seeds, cases)
    return pd.DataFrame(rows)


def toy_released(name="cads_open_551", backbone="resenc_l", seeds=(0, 1), cases=4, seed=3) -> pd.DataFrame:
    "Rows of scores.csv of a public pretrained model"
    return pd.DataFrame(_rows(np.random.default_rng(seed), 0.1, backbone, name, seeds, cases))


def toy_ablations(seeds=(0, 1), cases=4, seed=1, names=tuple(VARIANTS)) -> pd.DataFrame:
    "Rows of ablations.csv"
    generator, rows = np.random.default_rng(seed), []
    for ablation in names:
        for variant, gain in VARIANTS[ablation].items():
            inits = ("scratch", "corpus_ct") if ablation in ("grn", "scaling") else ("corpus_ct",)
            for init in ("corpus_mr",) if variant.startswith("mr_") else inits:
                made = _rows(generator, 0.1 + gain + 0.08 * (init != "scratch"), "mednext_v2_tiny", init, seeds, cases)
                rows += [dict(ablation=ablation, variant=variant) | row for row in made]
    return pd.DataFrame(rows)


def _rows(generator, gain, backbone, init, seeds, cases) -> list[dict]:
    return [
        dict(
            profile="mini",
            task=task,
            case=f"{task}_{case}",
            person=f"{task}_{case}",
            scans="deformed",
            split="test",
            label=label,
            group=group,
            backbone=backbone,
            init=init,
            patch="32x32x16",
            seed=seed,
            dsc=np.clip(0.4 + gain + 0.03 * case + 0.04 * generator.normal(), 0, 1),
            nsd=np.clip(0.3 + gain + 0.03 * case + 0.04 * generator.normal(), 0, 1),
            n_voxels=5 * (case > 0 or label != "lesion"),
            n_predicted=5,
        )
        for task, labels in TASKS.items()
        for case in range(cases)
        for label, group in labels.items()
        for seed in seeds
    ]


def toy_models(scores: pd.DataFrame, ablations: pd.DataFrame) -> pd.DataFrame:
    "Rows of models.csv, one fine-tuned model for each that was scored"
    key = ["ablation", "variant", "profile", "task", "backbone", "init", "seed", "patch"]
    both = pd.concat([scores.assign(ablation=None, variant=None), ablations], ignore_index=True)
    table = both[key].drop_duplicates(ignore_index=True)
    cost = np.array([COSTS.get(variant, (1, 1)) for variant in table.variant])
    scans = table.variant.map({"cases_3": 3, "cases_6": 6}).fillna(12).astype(int)
    pretrain = table[table.init != "scratch"].assign(task=table.init).drop_duplicates(["ablation", "variant", "backbone", "init"])
    made = pd.concat([table.assign(role="finetune", scans=8), pretrain.assign(role="pretrain", scans=scans)])
    cost = cost[made.index]
    made = made.assign(
        parameters=(250_000 * cost[:, 0]).astype(int),
        flops=(3e8 * cost[:, 1]).astype(int),
        steps=150,
        seconds=30 * cost[:, 1],
        peak_mib=400 * cost[:, 1] ** 0.7,
        device="cpu",
    )
    return made.reset_index(drop=True)


def toy_features(seed=2) -> pd.DataFrame:
    "Rows of features.csv"
    generator = np.random.default_rng(seed)
    return pd.DataFrame(
        [
            dict(
                profile="mini",
                variant=variant,
                step=step,
                layer=f"enc_block_{depth}",
                depth=depth,
                channels=16,
                cosine_distance=0.3 + 0.1 * (variant != "without") + 0.02 * generator.normal(),
                effective_rank=8 + 3 * (variant != "without") + generator.normal(),
                dead_share=abs(0.05 * generator.normal()),
            )
            for variant in VARIANTS["grn"]
            for step in (100, 300, 500)
            for depth in range(17)
        ]
    )


def write_tables(folder: Path, empty: bool = False) -> None:
    "Write scores, ablations, models and features as CSV files; `empty` leaves out all rows of ablations"
    scores, ablations = toy_scores(), toy_ablations()
    tables = dict(scores=scores, ablations=ablations, models=toy_models(scores, ablations), features=toy_features())
    if empty:
        models = tables["models"]
        tables |= dict(ablations=ablations.iloc[:0], models=models[models.ablation.isna()], features=tables["features"][["profile", "variant", "step"]][:0])
    else:
        tables["scores"] = pd.concat([scores, toy_released()], ignore_index=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
