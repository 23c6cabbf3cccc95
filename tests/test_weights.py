"Models that are kept in git: which, what is written of them, and their use by name in a clone, without one, altered and missing"

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from mednext_v2 import create_model, from_pretrained
from mednext_v2.cli import main
from mednext_v2.core import Resources, read_json, registry_file, root, sha256, write_csv, write_json
from mednext_v2.data.preprocess import prepare
from mednext_v2.finetuning import FinetuneOptions, finetune
from mednext_v2.models.card import Card, read_card, save_model
from mednext_v2.models.registry import create
from mednext_v2.report import weights
from mednext_v2.report.weights import LIMIT, describe_data, explain_scans, ship_models, shipped_name, shipped_runs, trained_folders
from mednext_v2.stages import profiles
from mednext_v2.study.paths import StudyPaths
from mednext_v2.study.plan import StudyPlan
from mednext_v2.study.runs import TrainingRun
from mednext_v2.training.recipe import get_recipe
from mednext_v2.zoo import shipped
from mednext_v2.zoo.catalogue import find_fetched
from mednext_v2.zoo.shipped import MANIFEST, PROFILES, find_shipped, shipped_table
from test_training_sets import CHEST, write_raw

NETWORKS = {"unet": {"filters": (4, 8, 8)}, "mednext_v2_base": {"width": 4}}
PLAN = StudyPlan("study", ("people_ct",), tuple(NETWORKS), ("scratch", "people_ct"), ("people_bleed_ct",), (0, 1))
CT = {"schemes": ["ct"], "mean": [40.0], "std": [120.0], "low": [-900.0], "high": [900.0], "nonzero": False}
KEPT = ["unet-people_ct-s0", "mednext_v2_base-people_ct-s0", "mednext_v2_base-people_bleed_ct-s0", "mednext_v2_base-people_ct-s1"]
PEOPLE = replace(CHEST, source="people", patient=r"_(\d)$", licence="Apache-2.0")


def save(run: TrainingRun) -> None:
    "A model with random weights where its training would put it, and what the training would log"
    folder, curves = trained_folders(run, PLAN)
    torch.manual_seed(run.seed)
    model = create(run.backbone, 1, 3, **NETWORKS[run.backbone])
    about = dict(overrides=NETWORKS[run.backbone], in_channels=1, labels=CHEST.labels, groups=CHEST.groups, task=run.task, modality="CT")
    about |= dict(spacing=(1.0, 1.0, 1.0), patch=(16, 16, 16), normalisation=CT, recipe={"steps": 4}, init=run.init, seed=run.seed, licence="Apache-2.0")
    save_model(folder, model, Card(run.backbone, **about))
    write_json(curves / "made.json", {"commit": f"{run.seed}" * 40})


def score_rows() -> pd.DataFrame:
    "Two test people of two images, one of validation and a real scan"
    people = [("a0", "hd01", "synthetic", "test"), ("a1", "hd01", "synthetic", "test"), ("b0", "hd02", "synthetic", "test")]
    people += [("c0", "hd03", "synthetic", "validation"), ("d0", "ctH", "real", "test")]
    dice = {"a0": 0.2, "a1": 0.4, "b0": 0.9, "c0": 1.0, "d0": 0.125}
    runs = [(init, backbone, seed) for init in PLAN.inits for backbone in PLAN.backbones for seed in PLAN.seeds]
    rows = [
        dict(init=init, backbone=backbone, seed=seed, case=case, person=person, scans=scans, split=split, dsc=dice[case])
        for init, backbone, seed in runs
        for case, person, scans, split in people
    ]
    return pd.DataFrame(rows).assign(task="people_bleed_ct", label="spleen", nsd=0.5)


def origins(name: str, intensities: tuple[str, ...] = ("synthetic",) * 3) -> pd.DataFrame:
    "Whose images the cases of a data set are: both training cases show one person"
    cases = [(f"{name}_{number}", split, person) for number, (split, person) in enumerate([("train", "hd01"), ("train", "hd01"), ("val", "hd02")])]
    return pd.DataFrame(cases, columns=["case", "split", "person"]).assign(kind="as mapped", intensities=intensities, how="")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A project with the models, the prepared data and the scores of a small study, and its weights as they are kept"
    place = tmp_path_factory.mktemp("project")
    (place / "dvc.yaml").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        paths = StudyPaths("study")
        for number, name in enumerate(("people_ct", "people_bleed_ct")):
            one = replace(PEOPLE, name=name, dataset=910 + number)
            write_raw(one, paths.raw)
            prepare(one, paths.raw, paths.prepared / name)
            write_csv(paths.raw / one.folder / "provenance.csv", origins(name))
        for run in shipped_runs(PLAN):
            save(run)
        write_csv(paths.results / "scores.csv", score_rows())
        ship_models("study", PLAN)
    return place


@pytest.fixture
def clone(study, tmp_path, monkeypatch):
    "What git keeps of that project: no models, no data, no scores; the working directory is below it"
    shutil.copytree(study / "results/study/weights", tmp_path / "clone/results/study/weights")
    (tmp_path / "clone/dvc.yaml").touch()
    (tmp_path / "clone/data").mkdir()
    shutil.copy(registry_file("datasets.yaml"), tmp_path / "clone/data")
    (tmp_path / "clone/work").mkdir()
    monkeypatch.chdir(tmp_path / "clone/work")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(shipped, "find_clones", lambda: [root()])
    return tmp_path / "clone"


def shelf(clone: Path) -> Path:
    return clone / "results/study/weights"


def test_what_is_kept_and_what_the_manifest_says(study):
    manifest = read_json(study / "results/study/weights" / MANIFEST)
    assert [one["name"] for one in manifest["models"]] == KEPT and manifest["left_out"] == []
    for one in manifest["models"]:
        folder = study / "results/study/weights" / one["name"]
        assert one["files"] == {name: sha256(folder / name) for name in ("card.json", "model.safetensors")}
        assert one["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        model, card = from_pretrained(folder)
        assert one["parameters"] == sum(value.numel() for value in model.parameters())
        assert (one["cases"], one["people"], one["scans"], one["licence"]) == (2, 1, "synthetic", "Apache-2.0")
        assert one["commit"] == str(one["seed"]) * 40 and card.seed == one["seed"]
    tuned = manifest["models"][2]
    assert set(tuned["data"]) == {"people_ct", "people_bleed_ct"} and tuned["data"]["people_ct"].startswith("Apache-2.0; ")
    assert tuned["scores"] == {"dsc": 0.6, "nsd": 0.5, "cases": 3}  # (0.2 + 0.4) / 2 of one person, 0.9 of the other
    assert [one["scores"] for one in manifest["models"] if one is not tuned] == [None] * 3


def test_weights_are_the_trained_ones_to_the_bit_and_a_card_gains_its_scores_alone(study, monkeypatch):
    monkeypatch.chdir(study)
    for run in shipped_runs(PLAN):
        source, kept = trained_folders(run, PLAN)[0], Path("results/study/weights") / shipped_name(run)
        assert (source / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()
        before, after = read_card(source), read_card(kept)
        assert replace(after, scores={}) == before and bool(after.scores) == (run.task == "people_bleed_ct")


def test_pages_say_what_a_model_is_and_what_it_is_not_for(study):
    place = study / "results/study/weights"
    for name in KEPT:
        page = (place / name / "README.md").read_text()
        assert f"mednextv2 predict -m study/{name} " in page and f'from_pretrained("study/{name}")' in page
        assert "not for clinical use" in page and "2 images.\nThey show 1 person: synthetic images" in page and "no medical device" in page
    assert "| people_bleed_ct | 3 | 0.600 | 0.600 |" in (place / "unet-people_ct-s0/README.md").read_text()
    tuned = (place / "mednext_v2_base-people_bleed_ct-s0/README.md").read_text()
    assert "On real scans, its mean DSC is 0.125" in tuned and "Means over 3 test cases" in tuned
    index = (place / "README.md").read_text()
    assert all(f"[study/{name}]({name}/README.md)" in index for name in KEPT) and "not for clinical use" in index


def test_a_second_time_gives_the_same_files(study, tmp_path, monkeypatch):
    monkeypatch.chdir(study)
    ship_models("study", PLAN, tmp_path / "again")
    first = {path.relative_to(study / "results/study/weights"): path for path in (study / "results/study/weights").rglob("*.*")}
    assert {name: (tmp_path / "again" / name).read_bytes() for name in first} == {name: path.read_bytes() for name, path in first.items()}


def test_what_does_not_fit_is_named_and_the_limit_is_kept(study, tmp_path, monkeypatch):
    monkeypatch.chdir(study)
    size = {run: (trained_folders(run, PLAN)[0] / "model.safetensors").stat().st_size for run in shipped_runs(PLAN)}
    limit = max(size.values()) + weights.WORDS
    ship_models("study", PLAN, tmp_path / "few", limit)
    manifest, page = read_json(tmp_path / "few" / MANIFEST), (tmp_path / "few/README.md").read_text()
    kept, left = ([one["name"] for one in manifest[key]] for key in ("models", "left_out"))
    assert kept and left and sorted(kept + left) == sorted(KEPT) and all(name in page for name in left)
    assert sorted(path.name for path in (tmp_path / "few").iterdir() if path.is_dir()) == sorted(kept)
    assert sum(path.stat().st_size for path in (tmp_path / "few").rglob("*") if path.is_file()) <= limit
    ship_models("study", PLAN, tmp_path / "none", 0)
    assert read_json(tmp_path / "none" / MANIFEST)["models"] == [] and "mednextv2 push" in (tmp_path / "none/README.md").read_text()


def test_missing_models_and_scores_name_the_command(study, tmp_path, monkeypatch):
    shutil.copytree(study, tmp_path / "part")
    monkeypatch.chdir(tmp_path / "part")
    Path("results/study/scores.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"scores\.csv: run `make repro PROFILE=study`"):
        ship_models("study", PLAN)
    shutil.rmtree("models/study/pretrain/people_ct/unet")
    with pytest.raises(FileNotFoundError, match=r"3 of 9 are missing, first .*unet.people_ct-s0.card\.json: run `make repro PROFILE=study`"):
        ship_models("study", PLAN)


def test_altered_trained_weights_are_not_kept(study, tmp_path, monkeypatch):
    shutil.copytree(study, tmp_path / "part")
    monkeypatch.chdir(tmp_path / "part")
    shutil.copy(
        "models/study/pretrain/people_ct/mednext_v2_base/people_ct-s1/model.safetensors", "models/study/pretrain/people_ct/mednext_v2_base/people_ct-s0"
    )
    before = read_json(Path("results/study/weights") / MANIFEST)
    with pytest.raises(ValueError, match=r"is not what card\.json beside it describes"):
        ship_models("study", PLAN)
    assert read_json(Path("results/study/weights") / MANIFEST) == before


def test_people_are_counted_once_and_kinds_are_named(study, tmp_path, monkeypatch):
    shutil.copytree(study / "data", tmp_path / "data")
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert describe_data("study", "people_ct") == {"cases": 2, "people": 1, "scans": "synthetic"}
    (file,) = Path("data/raw/study").glob("*910*/provenance.csv")
    write_csv(file, origins("people_ct", ("synthetic", "real", "real")))
    assert describe_data("study", "people_ct") == {"cases": 2, "people": 1, "scans": "deformed and synthetic"}
    assert explain_scans("deformed and synthetic").startswith("real scans, deformed, ") and "; synthetic images" in explain_scans("deformed and synthetic")
    write_csv(file, origins("people_ct")[1:])
    with pytest.raises(ValueError, match=r"knows 1 of the 2 training cases of .*people_ct: run `make repro PROFILE=study`"):
        describe_data("study", "people_ct")


def test_names_lead_to_the_models_in_a_clone(clone):
    for name in KEPT:
        assert find_fetched(f"study/{name}", imported=True) == shelf(clone) / name
    assert find_fetched("study/mednext_v2_base") == shelf(clone) / "mednext_v2_base-people_ct-s0"
    assert find_fetched(KEPT[2]) == find_fetched(f"study/weights/{KEPT[2]}") == clone / "results/study/weights" / KEPT[2]
    model, card = from_pretrained("study/unet")
    same = create_model(pretrained="study/unet")
    assert card.task == "people_ct" and not same.report.skipped and isinstance(model(torch.zeros(1, 1, 16, 16, 16)), torch.Tensor)


def test_the_shell_lists_describes_and_predicts_by_name(clone, capsys):
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(0, 100, (20, 18, 16)).astype(np.float32), np.eye(4)), "scan.nii.gz")
    main(["predict", "-m", "study/unet", "-i", "scan.nii.gz", "-o", "labels.nii.gz", "--quiet"])
    assert nib.load("labels.nii.gz").shape == (20, 18, 16)
    capsys.readouterr()
    main(["zoo", "list"])
    said = capsys.readouterr().out
    assert all(f"study/{name}" in said for name in KEPT) and "totalsegmentator_ct_291" in said
    main(["info", "study/unet"])
    assert "unet" in capsys.readouterr().out
    main(["info", "mednext_v2_base"])  # The network, as ever
    assert "mednext_v2_base" in capsys.readouterr().out


def test_fine_tuning_starts_from_a_name(clone):
    write_raw(CHEST, clone / "raw", cases=3)
    recipe = get_recipe("smoke", steps=2, patch=(16, 16, 16), checkpoint_every=2, lr=1e-2)
    finetune(clone / "raw" / CHEST.folder, "study/unet", clone / "out", recipe, resources=Resources("cpu", workers=1), options=FinetuneOptions(forecast=False))
    card = read_card(clone / "out/model")
    assert card.backbone == "unet" and card.parent == read_card(shelf(clone) / KEPT[0]).sha256


@pytest.mark.parametrize("file", ["card.json", "model.safetensors"])
@pytest.mark.parametrize("name", ["study/unet", KEPT[0], f"../results/study/weights/{KEPT[0]}", f"../results/study/weights/{KEPT[0]}/model.safetensors"])
def test_one_changed_byte_is_refused_however_the_model_is_given(clone, file, name):
    path = shelf(clone) / KEPT[0] / file
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file} is not what was committed.*git checkout"):
        find_fetched(name)
    assert find_fetched("study/mednext_v2_base").is_dir()


def test_a_missing_file_is_refused_and_a_copy_elsewhere_is_a_model_like_any_other(clone):
    shutil.copytree(shelf(clone) / KEPT[0], "mine")
    (shelf(clone) / KEPT[0] / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="none, it is missing"):
        find_fetched("study/unet")
    assert find_fetched("mine") == Path("mine")


def test_other_names_list_those_that_exist(clone):
    with pytest.raises(FileNotFoundError, match=f"study/segresnet is not among the models that are kept here: study/{KEPT[0]}, study/{KEPT[1]}"):
        find_fetched("study/segresnet")
    with pytest.raises(FileNotFoundError, match="paper/unet: .*has no models of the profile paper: .*`make repro PROFILE=paper`"):
        find_fetched("paper/unet")


def test_without_a_clone_the_name_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shipped, "find_clones", list)
    with pytest.raises(FileNotFoundError, match=r"study/unet: .*no clone of it: `git clone https://.*hub's user study is hf://study/unet"):
        find_fetched("study/unet")
    assert find_shipped("clinic/unet") is None and find_shipped("hf://study/unet") is None and shipped_table().empty
    with pytest.raises(SystemExit, match="mednextv2: study/unet: .*git clone"):
        main(["predict", "-m", "study/unet", "-i", "scan.nii.gz", "-o", "labels.nii.gz"])


def test_an_own_folder_of_that_name_is_found_first(clone):
    save(TrainingRun("study", "unet", "scratch", "people_ct", 1))
    shutil.copytree(shelf(clone) / KEPT[0], "study/unet")
    assert find_fetched("study/unet") == Path("study/unet")
    shutil.copytree(shelf(clone) / KEPT[0], clone / "models/study/spleen")
    assert find_fetched("study/spleen") == clone / "models/study/spleen"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../elsewhere"}, "name must be that of a folder"),
        ({"files": {"card.json": "0" * 64}}, "files must hold the SHA-256"),
        ({"secret": 1}, "secret"),
        ({"seed": "zero"}, "seed"),
    ],
)
def test_a_damaged_manifest_names_the_file_and_the_field(clone, change, message):
    path = shelf(clone) / MANIFEST
    values = read_json(path)
    values["models"][0] |= change
    write_json(path, values)
    with pytest.raises(ValueError, match=rf"{MANIFEST}.*{message}"):
        find_fetched("study/unet")
    path.write_text("{}")
    with pytest.raises(ValueError, match="models must be a list"):
        find_fetched("study/unet")


def test_names_of_profiles_are_those_that_exist():
    assert set(PROFILES) == set(profiles())


def test_weights_in_git_are_whole_and_stay_small():
    folders = sorted((root() / "results").glob(f"*/weights/{MANIFEST}"))
    assert sum(path.stat().st_size for file in folders for path in file.parent.rglob("*") if path.is_file()) <= LIMIT
    for file in folders:
        models = shipped.read_manifest(file.parent)
        assert {path.name for path in file.parent.iterdir() if path.is_dir()} == set(models)
        trained = read_json(file.parents[1] / "digests.json")["models"].values()
        for name, model in models.items():
            shipped.check_shipped(file.parent / name)
            assert model.files["model.safetensors"] in trained, f"{name} is not of the run whose scores are committed"
            from_pretrained(file.parent / name)
