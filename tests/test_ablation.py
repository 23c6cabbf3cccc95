"Ablations from pretraining to scores, what is trained once, what is refused, and the tables that come out"

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from mednext_v2 import cli
from mednext_v2.core import params
from mednext_v2.data.preprocess import Prepared, prepare_all
from mednext_v2.models.card import read_card
from mednext_v2.report import collect as collected
from mednext_v2.report.forecast import forecast_table, list_trainings, profile_params, published_compute, read_published, storage_table
from mednext_v2.scoring.ablations import (
    MODEL_COLUMNS,
    Ablation,
    AblationFolders,
    Variant,
    finetunings,
    limit_cases,
    pretrainings,
    read_ablation,
    run_ablation,
    shared_rows,
)
from mednext_v2.scoring.evaluate import SCORE_COLUMNS
from mednext_v2.scoring.features import snapshot_features
from mednext_v2.stages import compose_params
from mednext_v2.study.seeds import build_dataset

ROOT = Path(__file__).parents[1]
COMPUTE = dict(device="cpu", workers=1, threads=1, processes=1, parallel="ddp", readers=0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "Prepared tasks; the raw ones lie beside them"
    folder = tmp_path_factory.mktemp("work")
    for name, cases in (("brain_lesion_mr", (2, 1, 1)), ("corpus_ct", (3, 1, 0))):
        build_dataset(name, None, folder / "raw", cases)
    prepare_all(("corpus_ct", "brain_lesion_mr"), folder / "raw", folder / "prepared")
    return folder / "prepared"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    "A project that holds the profile smoke"
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "data").mkdir()
    for name in ("datasets.yaml", "published_compute.csv"):
        shutil.copy(ROOT / "data" / name, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    compose_params("smoke")
    return tmp_path


def places(workplace, prepared) -> AblationFolders:
    return AblationFolders(prepared, prepared.with_name("raw"), workplace / "models/smoke/ablate/grn", workplace / "runs/smoke/ablate/grn")


def test_an_ablation_from_pretraining_to_scores_and_again(workplace, prepared, monkeypatch):
    described, plan = read_ablation("smoke", "grn")
    where = places(workplace, prepared)
    table = run_ablation(described, plan, where, COMPUTE, 0.25)
    assert list(table) == ["ablation", "variant", *SCORE_COLUMNS]
    assert set(zip(table.variant, table.init)) == {(v, i) for v in ("without", "mean") for i in ("scratch", "corpus_ct")}
    models = pd.read_csv(where.out / "models.csv")
    assert list(models) == MODEL_COLUMNS and models.role.value_counts().to_dict() == {"finetune": 4, "pretrain": 2}
    sizes = models.groupby("variant").parameters.max()
    assert sizes["mean"] > sizes["without"] and models.flops.gt(0).all() and models.seconds.gt(0).all()
    assert models[models.role == "pretrain"].scans.tolist() == [3, 3]
    for variant in ("without", "mean"):
        parent = where.models / "pretrain" / variant / "corpus_ct-s0"
        child = where.models / "finetune" / variant / "corpus_ct/brain_lesion_mr-s0"
        assert read_card(child).parent == read_card(parent).sha256
        assert len(list((parent / "snapshots").glob("*.safetensors"))) == 2
    assert not [path for path in (workplace / "scratch").iterdir()]

    features, maps = snapshot_features(where.models / "pretrain", prepared, "smoke", patches=1)
    assert set(features.variant) == {"without", "mean"} and features.step.nunique() == 2
    assert features.effective_rank.le(features.channels + 1e-6).all()
    last = features[features.step == features.step.max()]
    assert len(last) == 2 * 17 and {name: one.dtype for name, one in maps.items()} == dict.fromkeys(("mean", "without"), np.uint8)

    monkeypatch.setattr("mednext_v2.training.trainer.train_step", lambda *rest: pytest.fail("it was trained again"))
    again = run_ablation(described, plan, where, COMPUTE, 0.25)
    pd.testing.assert_frame_equal(again, table)


def test_variants_that_share_a_pretraining_train_it_once_and_the_main_run_lends_its_own(workplace, prepared):
    _, plan = read_ablation("smoke", "grn")
    variants = dict(
        main=Variant(),
        lr=Variant(finetune={"lr": 1e-3}),
        few=Variant(corpus_cases=2),
        same=Variant(corpus_cases=2, finetune={"lr": 1e-3}),
        wide=Variant(overrides={"width": 6}),
    )
    described = Ablation("some", variants, plan.tasks, ("pretrained",), (0,))
    found = pretrainings(described, plan, places(workplace, prepared), workplace / "new")
    main = workplace / "models/smoke/pretrain/corpus_ct/mednext_v2_tiny"
    assert found["main", 0] == found["lr", 0] == main / "corpus_ct-s0"
    assert found["few", 0] is found["same", 0] and found["wide", 0] is not found["few", 0]
    assert Prepared(found["few", 0].data / "corpus_ct").ids("train") == Prepared(prepared / "corpus_ct").ids("train")[:2]


def test_a_seed_is_that_of_pretraining_and_fine_tuning_alike(workplace, prepared):
    _, plan = read_ablation("smoke", "grn")
    plan = replace(plan, seeds=(0, 1))
    described = Ablation("some", dict(main=Variant(), wide=Variant(overrides={"width": 6})), plan.tasks, ("pretrained",), (0, 1, 2))
    parents = pretrainings(described, plan, places(workplace, prepared), workplace / "new")
    main = workplace / "models/smoke/pretrain/corpus_ct/mednext_v2_tiny"
    assert [parents["main", seed] for seed in (0, 1)] == [main / "corpus_ct-s0", main / "corpus_ct-s1"]
    # The main runs have no seed 2, so the ablation trains it
    own = [parents["main", 2], *(parents["wide", seed] for seed in (0, 1, 2))]
    assert [job.run.seed for job in own] == [2, 0, 1, 2] and len({job.out for job in own}) == 4
    for job in finetunings(described, plan, places(workplace, prepared), workplace / "new", parents):
        assert job.parent.name == f"corpus_ct-s{job.run.seed}"


def test_variants_that_others_train_are_not_trained_and_their_rows_are_copied(workplace, prepared):
    _, plan = read_ablation("smoke", "grn")
    variants = dict(main=Variant(trained_by="main"), wide=Variant(overrides={"width": 6}, trained_by="scaling/wide"), own=Variant(overrides={"width": 8}))
    described = Ablation("grn", variants, plan.tasks, ("pretrained",), (0,))
    assert {name for name, _ in pretrainings(described, plan, places(workplace, prepared), workplace / "new")} == {"own"}
    row = dict(task=plan.tasks[0], backbone="mednext_v2_tiny", init="corpus_ct", seed=0, split="test", dsc=0.5)
    main = pd.DataFrame([row, row | {"split": "validation"}, row | {"init": "scratch"}, row | {"seed": 1}, row | {"backbone": "unet"}])
    others = pd.DataFrame([row | {"ablation": name, "variant": "wide", "dsc": 0.6} for name in ("scaling", "schedules")])
    found = shared_rows(described, plan, main, others)
    assert found[["ablation", "variant", "dsc"]].to_numpy().tolist() == [["grn", "main", 0.5], ["grn", "wide", 0.6]]
    with pytest.raises(ValueError, match="ablation grn, wide: scaling/wide has no rows"):
        shared_rows(described, plan, main, others[others.ablation != "scaling"])


@pytest.mark.parametrize("trained_by", ["main", "scaling/narrow", "scaling/wide", "nothing/width", "scaling"])
def test_a_variant_that_another_run_does_not_train_alike_is_refused(workplace, trained_by):
    import yaml

    values = yaml.safe_load((workplace / "params.yaml").read_text())
    values["ablations"]["grn"]["variants"]["without"]["trained_by"] = trained_by
    (workplace / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=f"ablation grn, without: trained_by '{trained_by}' is not the same training"):
        read_ablation("smoke", "grn")


def test_limit_cases_are_the_first_ones_and_are_read_as_before(prepared, tmp_path):
    whole = Prepared(prepared / "corpus_ct")
    few = Prepared(limit_cases(prepared / "corpus_ct", 1, tmp_path / "few"))
    assert few.ids("train") == whole.ids("train")[:1] and few.ids("val") == whole.ids("val") and few.digest != whole.digest
    case = few.ids("train")[0]
    assert np.array_equal(np.asarray(few.image(case)), np.asarray(whole.image(case)))
    with pytest.raises(ValueError, match="has 3 training cases, 4 were asked for"):
        limit_cases(prepared / "corpus_ct", 4, tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": {"a": {"finetune": {"rate": 1}}}}, "a recipe has no rate"),
        ({"variants": {"a": {"backbone": "resnet"}}}, "resnet"),
        ({"variants": {"a": {"corpus": "corpus_xr"}}}, "corpus 'corpus_xr' is none of corpus_ct, corpus_mr"),
        ({"variants": {"a": {"overides": {}}}}, "Variant has no 'overides'"),
        ({"variants": {"a": {}}, "tasks": ["pancreas"]}, "pancreas is none of the profile's tasks"),
        ({"variants": {"a": {}}, "inits": ["imagenet"]}, "inits must be scratch or pretrained, got imagenet"),
        ({"variants": {}}, "at least one variant"),
    ],
)
def test_what_is_misspelt_is_refused_before_anything_is_trained(workplace, change, message):
    import yaml

    path = workplace / "params.yaml"
    values = yaml.safe_load(path.read_text())
    values["ablations"]["grn"] = change
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=message):
        read_ablation("smoke", "grn")


def test_an_ablation_that_is_not_there_names_those_that_are(workplace):
    with pytest.raises(ValueError, match="ablation 'depth' is not in params.yaml; it has: grn, scaling"):
        read_ablation("smoke", "depth")


def test_two_variants_that_are_the_same_are_refused(workplace, prepared):
    _, plan = read_ablation("smoke", "grn")
    described = Ablation("twice", {"a": Variant(), "b": Variant()}, plan.tasks[1:], ("scratch",), (0,))
    with pytest.raises(ValueError, match="a and b train the same"):
        run_ablation(described, plan, places(workplace, prepared), COMPUTE)
    assert not (workplace / "models/smoke/ablate").exists() or not list((workplace / "models/smoke/ablate").iterdir())


@pytest.mark.parametrize("profile", ["smoke", "mini", "study", "paper"])
def test_every_variant_of_every_profile_can_be_built(profile, workplace):
    "On the meta device; in the profile paper with the real sizes"
    from mednext_v2.models.registry import create

    compose_params(profile)
    for name in params("axes.ablations"):
        described, _ = read_ablation(profile, name)
        for variant in described.variants.values():
            own = params("backbones").get(variant.backbone, {})
            with torch.device("meta"):
                network = create(variant.backbone, 1, 3, True, **{**own, **variant.overrides})
            patch = (params("recipes.finetune") | variant.finetune)["patch"]
            assert all(side % network.stride == 0 for side in patch)


def test_the_paper_profile_fits_gpus_of_80_gb_and_counts_every_run():
    table = forecast_table("paper")
    assert table.gpu_memory_gb.max() < 80 and table.gpu_memory_gb.notna().sum() > len(table) / 2
    values = profile_params("paper")
    tasks, seeds = len(values["axes"]["tasks"]), len(values["seeds"])
    main = table[table.stage == "finetune"]
    # Four of the six are dealt into five folds, two have a published split
    assert main.runs.tolist() == [(4 * 5 + 2) * seeds] * len(values["axes"]["backbones"])
    released = table[table.stage == "released"]
    assert len(released) == 7 and set(released.runs) == {(4 * 5 + 2) * seeds} and released.parameters.min() > 1e7
    grn = list_trainings("paper").query("stage == 'ablate grn'")
    assert grn.runs.tolist() == [2 * tasks * seeds] * 3 + [seeds] * 3
    # The reference itself is taken to need its published hours
    row = published_compute().set_index("model").loc["MedNeXt-L k3"]
    from mednext_v2.models.registry import cost
    from mednext_v2.report.forecast import reference_rate

    flops = cost("mednext_v1_large", (128, 128, 128)).flops
    assert flops * 2 * 250_000 / reference_rate() == pytest.approx(row.a100_hours)


def test_storage_of_data_is_measured_stated_or_not_available(workplace):
    shutil.copy(ROOT / "data/published_sizes.csv", workplace / "data")
    table = storage_table("paper").set_index("dataset")
    values = profile_params("paper")["axes"]
    assert list(table.index) == [*values["corpora"], *values["further"], *values["tasks"]] and table.cases.notna().all()
    assert table.raw_gb["ctspine1k"] == 150 and table.known["ctspine1k"] == "raw published" and np.isnan(table.prepared_gb["ctspine1k"])
    assert table.prepared_gb["panther"] == pytest.approx(92 * 320 * 260 * 80 * 3 / 1e9) and np.isnan(table.raw_gb["panther"])
    assert table.loc["cads", ["raw_gb", "prepared_gb"]].isna().all()
    for mark in ("data/raw/paper/Dataset550_CADS/dataset.json", "data/prepared/paper/cads/manifest.csv"):
        (workplace / mark).parent.mkdir(parents=True)
        (workplace / mark).write_bytes(bytes(1_500_000))
    table = storage_table("paper").set_index("dataset")
    assert table.raw_gb["cads"] == table.prepared_gb["cads"] == 0.0015 and table.known["cads"] == "raw measured, prepared measured"
    answer = cli.plan(SimpleNamespace(profile="smoke", all=False))
    assert "not available" in answer and set(answer.values["data"].dataset) >= set(profile_params("smoke")["axes"]["tasks"])
    (workplace / "sizes.csv").write_text("dataset,source\ncads,\n")
    with pytest.raises(ValueError, match="line 2 has no source"):
        read_published(workplace / "sizes.csv")


def test_model_rows_say_what_a_training_took(tmp_path, workplace, prepared):
    from mednext_v2.scoring.ablations import model_row
    from mednext_v2.study.runs import TrainingRun, train_runs
    from mednext_v2.training.recipe import Recipe

    recipe = Recipe(steps=2, batch_size=1, patch=(32, 32, 32), warmup=1, augment="none", snapshots=2)
    run = TrainingRun("smoke", "unet", "scratch", "brain_lesion_mr", 4)
    train_runs([run], recipe, {"filters": (2, 4, 8)}, prepared, tmp_path / "models", tmp_path / "curves")
    row = model_row(tmp_path / "models" / run.name, tmp_path / "curves" / run.name, role="finetune")
    made = json.loads((tmp_path / "curves" / run.name / "run.json").read_text())
    assert (row["steps"], row["seed"], row["backbone"], row["device"]) == (2, 4, "unet", "cpu") and row["seconds"] == made["seconds"]
    assert [path.name for path in sorted((tmp_path / "models" / run.name / "snapshots").iterdir())] == ["step0000001.safetensors", "step0000002.safetensors"]


def test_collected_models_hold_main_runs_and_ablations(workplace, monkeypatch):
    _, plan = read_ablation("smoke", "grn")
    monkeypatch.setattr(collected, "main_models", lambda *rest: [dict.fromkeys(MODEL_COLUMNS, 1)])
    for name in ("people_table", "corpora_table"):  # tests/test_collect.py
        monkeypatch.setattr(collected, name, lambda *rest: pd.DataFrame(columns=["person"]))
    part = workplace / "runs/smoke/ablate/grn"
    part.mkdir(parents=True)
    pd.DataFrame([dict.fromkeys(MODEL_COLUMNS, 2)]).to_csv(part / "models.csv", index=False)
    pd.DataFrame([dict.fromkeys(["ablation", "variant", *SCORE_COLUMNS], "001")]).to_csv(part / "scores.csv", index=False)
    tables = collected.collect_tables("smoke", plan)
    assert tables["models"].steps.tolist() == [1, 2] and tables["ablations"].case.tolist() == ["001"] and len(tables["features"]) == 0
    assert (workplace / "results/smoke/features.csv").is_file()
