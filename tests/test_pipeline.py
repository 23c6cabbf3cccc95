"""The stages: their graph, what bad input gets, and what a run leaves behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest

from mednext_v2.core import ItemsFailed, params, read_yaml
from mednext_v2.data.datasets import get_dataset
from mednext_v2.data.preprocess import prepare_all
from mednext_v2.report.collect import collect
from mednext_v2.scoring.evaluate import SCORE_COLUMNS, evaluate_runs
from mednext_v2.stages import check_plan, compose_params, profiles, run_notebook, run_stage
from mednext_v2.study.plan import read_plan
from mednext_v2.study.runs import TrainingRun, run_key, train_runs
from mednext_v2.study.seeds import build_dataset
from mednext_v2.training.recipe import Recipe
from mednext_v2.training.run import fit_patch

ROOT = Path(__file__).parents[1]
RECIPE = Recipe(steps=3, batch_size=1, patch=(32, 32, 32), lr=1e-2, warmup=1, augment="light", checkpoint_every=2)
SMALL = {"filters": (2, 4, 8)}


# ---- the graph


@pytest.fixture(scope="module")
def graph():
    """Stage name to the names of all stages it depends on, near and far, and its own parameters."""
    import networkx
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        tree = repo.index.graph
        above = {s.addressing: {d.addressing for d in networkx.descendants(tree, s)} for s in tree}
        keys = {s.addressing: {k for d in s.deps for k in getattr(d, "params", [])} for s in tree}
        files = {s.addressing: {d.def_path for d in s.deps} for s in tree}
    return above, keys, files


def reads(graph, key: str) -> set[str]:
    """Stages that re-run when a parameter changes."""
    above, keys, _ = graph
    direct = {name for name, own in keys.items() if any(k == key or k.startswith(key + ".") for k in own)}
    return direct | {name for name, parents in above.items() if parents & direct}


def test_changing_finetune_leaves_pretrain_alone(graph):
    rerun = reads(graph, "recipes.finetune")
    assert rerun and not [name for name in rerun if name.startswith(("pretrain", "prepare", "suite"))]
    assert {name.split("@")[0] for name in rerun} >= {"scratch", "finetune", "evaluate", "collect", "paper"}


def test_changing_pretrain_leaves_scratch_alone(graph):
    rerun = reads(graph, "recipes.pretrain")
    assert not [name for name in rerun if name.startswith("scratch@")]
    assert [name for name in rerun if name.startswith("finetune@")]


def test_changing_one_backbone_leaves_the_other_alone(graph):
    trained = {"pretrain", "scratch", "finetune"}
    rerun = {name for name in reads(graph, "backbones.unet") if name.split("@")[0] in trained}
    assert rerun and all(name.endswith("unet") for name in rerun)


def test_changing_a_figure_reruns_that_figure_alone(graph):
    above, _, files = graph
    for notebook in (ROOT / "nbs/paper").glob("*.ipynb"):
        name = f"nbs/paper/{notebook.name}"
        readers = {stage for stage, own in files.items() if name in own}
        assert len(readers) == 1, f"{name}: {readers}"
        assert not [stage for stage, parents in above.items() if parents & readers]


def test_report_never_retrains(graph):
    above, _, files = graph
    readers = {stage for stage, own in files.items() if "mednext_v2/report/tables.py" in own}
    rerun = readers | {stage for stage, parents in above.items() if parents & readers}
    assert not {stage.split("@")[0] for stage in rerun} & {"suite", "prepare", "pretrain", "scratch", "finetune"}


# ---- bad input


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what a stage needs, holding the profile smoke."""
    for name in ("nbs", "conf", "data", "mednext_v2", "dvc.yaml"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("raw", "prepared", "__pycache__")
        (shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tmp_path))
    monkeypatch.chdir(tmp_path)
    compose_params("smoke")
    return tmp_path


def change_params(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("- abdomen_ct", "- abdomen_tc", "axes.tasks names 'abdomen_tc', which is not known; known: corpus_ct, "),
        ("- unet", "- unett", "axes.backbones names 'unett', which is not known; known: mednext_v2_tiny, "),
        ("- scratch", "- imagenet", "axes.inits names 'imagenet', which is not known; known: scratch, corpus_ct"),
        ("  tasks:", "  taks:", "StudyPlan has no 'taks'; it has: profile, "),
    ],
)
def test_misspelt_axis_is_named_with_the_known_ones(project, old, new, message):
    change_params(project / "params.yaml", old, new)
    with pytest.raises(ValueError) as error:
        check_plan(read_plan("smoke"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_stage_of_another_profile_is_refused(project):
    with pytest.raises(ValueError, match="holds the profile 'smoke', not 'mini': run `make repro PROFILE=mini`"):
        read_plan("mini")


def test_unknown_profile_lists_the_known(project):
    with pytest.raises(ValueError, match="no profile is called 'huge'; conf/profile holds: mini, paper, smoke, study"):
        compose_params("huge")
    assert params("profile") == "smoke", "and params.yaml is as it was"


def test_altered_seed_stops_the_stage_in_one_line_and_leaves_nothing(project):
    seed = project / "data/seeds/ctB.nii.gz"
    seed.write_bytes(seed.read_bytes()[:-7] + b"altered")
    command = [sys.executable, "-m", "mednext_v2.stages", "run", "nbs/pipeline/10_suite.ipynb", "runs/smoke/suite"]
    done = subprocess.run([*command, "profile=smoke"], capture_output=True, text=True, cwd=project)
    assert done.returncode == 1
    line = next(line for line in done.stderr.splitlines() if "failed:" in line)
    assert "ctB.nii.gz" in line and "git checkout" in line
    assert not list((project / "data").glob("raw/smoke/*"))
    assert (project / "runs/smoke/suite/notebook.ipynb").exists(), "the failed notebook is evidence"


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for name, cases in (("brain_lesion_mr", (2, 1, 1)), ("corpus_ct", (2, 1, 0))):
        build_dataset(name, None, folder, cases)
    return folder


def damage(folder: Path, voxel, kind: str) -> Path:
    path = sorted(folder.glob(f"{kind}/*.nii.gz"))[0]
    image = nibabel.load(path)
    values = np.asanyarray(image.dataobj).astype(np.float32)
    values[5, 5, 5] = voxel
    nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    return path


@pytest.mark.parametrize(("voxel", "kind", "word"), [(np.nan, "imagesTr", "NaN"), (7, "labelsTr", "7")])
def test_bad_voxels_name_the_file_and_the_other_data_sets_are_prepared(raw, tmp_path, voxel, kind, word):
    copy = tmp_path / "raw"
    shutil.copytree(raw, copy)
    path = damage(copy / get_dataset("brain_lesion_mr").folder, voxel, kind)
    with pytest.raises(ItemsFailed, match=word) as error:
        prepare_all(("brain_lesion_mr", "corpus_ct"), copy, tmp_path / "prepared")
    assert path.name in str(error.value) and list(error.value.results) == ["corpus_ct"]
    assert (tmp_path / "prepared/corpus_ct/manifest.csv").exists()
    assert not (tmp_path / "prepared/brain_lesion_mr/manifest.csv").exists()


# ---- training and evaluation


@pytest.fixture(scope="session")
def prepared(raw, tmp_path_factory):
    folder = tmp_path_factory.mktemp("work") / "prepared"
    prepare_all(("corpus_ct", "brain_lesion_mr"), raw, folder)
    return folder


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data/datasets.yaml", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(runs, prepared, out, parent=None, recipe=RECIPE, **options):
    return train_runs(runs, recipe, SMALL, prepared, out, out.with_name(f"{out.name}-curves"), parent, **options)


def test_pretrain_finetune_evaluate_collect(raw, prepared, workplace):
    from mednext_v2.models.card import read_card

    corpus = TrainingRun("smoke", "unet", "scratch", "corpus_ct")
    run = TrainingRun("smoke", "unet", "corpus_ct", "brain_lesion_mr", seed=3)
    train([corpus], prepared, workplace / "pretrain")
    parent = workplace / "pretrain/corpus_ct-s0"
    history = train([run], prepared, workplace / "finetune", parent)
    assert set(history.run) == {"brain_lesion_mr-s3"} and np.isfinite(history.loss).all()
    card = read_card(workplace / "finetune/brain_lesion_mr-s3")
    assert card.parent == read_card(parent).sha256 and card.init == "corpus_ct" and card.seed == 3
    assert card.labels == get_dataset("brain_lesion_mr").labels and card.normalisation

    scores = evaluate_runs([run], workplace / "finetune", prepared, raw, workplace / "evaluate/one")
    assert list(scores.columns) == SCORE_COLUMNS
    labels = nibabel.load(next((workplace / "evaluate/one/predictions/brain_lesion_mr-s3").glob("*.nii.gz")))
    assert set(np.unique(np.asanyarray(labels.dataobj))) <= {0, 1, 2}
    collected = collect(workplace / "evaluate", workplace / "results")
    assert len(collected) == len(scores) == 4 and set(zip(scores.split, scores.person)) == {("validation", "mrP"), ("test", "mrQ")}
    assert set(scores.scans) == {"deformed"}
    assert "unet" in json.loads((workplace / "results/metrics.json").read_text())


def between_grids(source: Path, folder: Path) -> Path:
    "The data set on coarser voxels than the task's, its axes turned and mirrored, air of zeros around each scan"
    shutil.copytree(source, folder)
    for path in folder.rglob("*.nii.gz"):
        image = nibabel.load(path)
        values = np.pad(np.asanyarray(image.dataobj)[::2], ((3, 1), (0, 2), (4, 0)))
        coarse = image.affine @ np.diag([2.0, 1, 1, 1])
        moved = nibabel.Nifti1Image(values, coarse @ nibabel.affines.from_matvec(np.eye(3), [-3, 0, -4]))
        turned = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(moved.affine), np.array([[2, -1], [0, 1], [1, -1]]))
        nibabel.save(moved.as_reoriented(turned), path)
    return folder


def test_pipeline_scores_as_predict_and_evaluate_and_finetune_do_on_the_scans_own_grid(raw, workplace):
    from mednext_v2 import cli
    from mednext_v2.core import Resources
    from mednext_v2.data.datasets import list_cases
    from mednext_v2.data.preprocess import Prepared
    from mednext_v2.finetuning import FinetuneOptions, FinetunePlan, score_model
    from mednext_v2.models.card import read_card
    from mednext_v2.models.transfer import Start

    task = get_dataset("brain_lesion_mr")
    own = between_grids(raw / task.folder, workplace / "raw" / task.folder)
    prepare_all((task.name,), own.parent, workplace / "prepared")
    run = TrainingRun("smoke", "unet", "scratch", task.name)
    train([run], workplace / "prepared", workplace / "models")
    model = workplace / "models" / run.name
    scores = evaluate_runs([run], model.parent, workplace / "prepared", own.parent, workplace / "evaluate", overlap=0.5, splits=("test",))
    case = next(case for case in list_cases(task, own.parent) if case.split == "test")
    truth = nibabel.load(case.label)
    assert Prepared(workplace / "prepared" / task.name).label(case.id).shape != truth.shape
    assert set(scores.grid) == {"scan"} and (scores.n_predicted > 0).any()
    voxels = np.asanyarray(truth.dataobj)
    assert scores.n_voxels.tolist() == [(voxels == task.labels[label]).sum() for label in scores.label]
    made = nibabel.load(workplace / "evaluate/predictions" / run.name / f"{case.id}.nii.gz")
    assert made.shape == truth.shape and np.allclose(made.affine, truth.affine)

    shutil.copytree(case.images[0].parent, workplace / "scans")
    shutil.copytree(case.label.parent, workplace / "truths")
    cli.main(["predict", "-m", str(model), "-i", str(workplace / "scans"), "-o", str(workplace / "told"), "--device", "cpu"])
    cli.main(["evaluate", str(workplace / "told"), str(workplace / "truths"), "--task", task.name, "--out", str(workplace / "table")])
    told = pd.read_csv(workplace / "table/scores.csv")
    shutil.copytree(model, workplace / "tuned/model")
    score_model(FinetunePlan(task, own, workplace / "tuned", "unet", RECIPE, {}, Start()), FinetuneOptions(), Resources("cpu"))
    kept = pd.read_csv(workplace / "evaluate/scores.csv")
    for other in (told, pd.read_csv(workplace / "tuned/scores.csv")):
        shared = [name for name in kept if name in other]
        pd.testing.assert_frame_equal(kept[shared], other[shared], check_exact=True)
        assert {"case", "label", "dsc", "nsd", "hd95", "volume_error", "n_voxels", "n_predicted"} <= set(shared)
    assert read_card(workplace / "tuned/model").scores["grid"] == "scan"


def test_raw_case_that_is_gone_is_named(raw, prepared, workplace):
    from mednext_v2.data.preprocess import Prepared
    from mednext_v2.scoring.evaluate import raw_cases

    data, task = Prepared(prepared / "brain_lesion_mr"), get_dataset("brain_lesion_mr")
    assert [case.id for case in raw_cases(data, raw, "test")] == data.ids("test")
    folder = shutil.copytree(raw / task.folder, workplace / "raw" / task.folder)
    gone = data.ids("val")[0]
    splits = json.loads((folder / "splits_final.json").read_text())
    splits[0]["val"], splits[0]["train"] = splits[0]["train"][:1], splits[0]["train"][1:]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    with pytest.raises(ValueError, match=f"has no case {gone}, which .* was made from: prepare it anew"):
        raw_cases(data, folder.parent, "val")


def test_pretrained_weights_are_what_finetuning_starts_from(prepared, workplace, monkeypatch):
    import mednext_v2.training.trainer
    from mednext_v2.models.card import read_state

    train([TrainingRun("smoke", "unet", "scratch", "corpus_ct")], prepared, workplace / "pretrain")
    parent = workplace / "pretrain/corpus_ct-s0"
    seen = {}

    def stop(recipe, model, *arguments, **options):
        seen.update({name: value.clone() for name, value in model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(mednext_v2.training.trainer, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        train([TrainingRun("smoke", "unet", "corpus_ct", "brain_lesion_mr")], prepared, workplace / "finetune", parent)
    source = read_state(parent)
    body = [name for name in seen if not name.startswith("heads.")]
    assert body and all((seen[name] == source[name]).all() for name in body)
    assert not (workplace / "finetune").exists(), "an interrupted stage leaves no models"


def test_every_fold_is_trained_on_its_own_cases_and_all_cases_are_scored_once(raw, prepared, workplace):
    from mednext_v2.data.preprocess import FOLDS, Prepared
    from mednext_v2.models.card import read_card

    data = shutil.copytree(prepared, workplace / "prepared")
    task = data / "brain_lesion_mr"
    first = Prepared(task)
    tested, others = first.ids("test"), [case for case in first.manifest.case if case not in first.ids("test")]
    splits = [first.manifest.set_index("case").split.to_dict(), dict.fromkeys(tested, "train") | dict.fromkeys(others[:1], "val")]
    splits[1] |= dict.fromkeys(others[1:], "test")
    (task / FOLDS).write_text(json.dumps(splits))
    runs = [TrainingRun("smoke", "unet", "scratch", "brain_lesion_mr", 0, fold) for fold in (0, 1)]
    assert [run.name for run in runs] == ["brain_lesion_mr-s0", "brain_lesion_mr-s0-f1"]
    train(runs, data, workplace / "models")
    assert len({read_card(workplace / "models" / run.name).sha256 for run in runs}) == 2
    scores = evaluate_runs(runs, workplace / "models", data, raw, workplace / "evaluate/one", splits=("test",))
    assert sorted(scores.case.unique()) == sorted({*tested, *others[1:]}) and not scores.duplicated(["case", "label"]).any()
    with pytest.raises(ValueError, match=r"brain_lesion_mr has 2 fold\(s\), fold 2 was asked for"):
        train([TrainingRun("smoke", "unet", "scratch", "brain_lesion_mr", 0, 2)], data, workplace / "more")


def test_folds_are_those_of_tasks_that_are_dealt(project):
    from mednext_v2.study.runs import finetuning_runs

    change_params(project / "params.yaml", "  - abdomen_ct", "  - panther")
    change_params(project / "params.yaml", "  folds:\n  - 0\n", "  folds:\n  - 0\n  - 4\n")
    runs = finetuning_runs(read_plan("smoke"), "unet", "scratch")
    assert [(run.task, run.fold) for run in runs] == [("panther", 0), ("panther", 4), ("brain_lesion_mr", 0)]
    change_params(project / "params.yaml", "  - 4\n", "  - 5\n")
    with pytest.raises(ValueError, match="axes.folds must be some of 0 to 4, got 0, 5"):
        read_plan("smoke")


def test_data_that_are_dealt_keep_all_folds_and_with_test_cases_of_their_own_none(raw, tmp_path):
    import dataclasses

    from mednext_v2.data.datasets import count_folds, read_splits
    from mednext_v2.data.preprocess import FOLDS, prepare
    from mednext_v2.data.scans import write_volume

    task = dataclasses.replace(get_dataset("corpus_ct"), split="fivefold", role="pretrain")
    folder = shutil.copytree(raw / task.folder, tmp_path / "raw" / task.folder)
    (folder / "splits_final.json").unlink()
    for path in [*folder.glob("labelsTr/*.nii.gz"), *folder.glob("imagesTr/*.nii.gz")]:
        voxels, affine = np.asarray(nibabel.load(path).dataobj).copy(), nibabel.load(path).affine
        voxels[0, 0, 0] += "images" in path.parent.name  # No scan may be in two splits
        write_volume(path.with_name(f"again_{path.name}"), voxels, affine)
    prepare(task, tmp_path / "raw", tmp_path / "prepared")
    folds = json.loads((tmp_path / "prepared" / FOLDS).read_text())
    assert len(folds) == 5 and len({id for one in folds for id, split in one.items() if split == "test"}) == len(folds[0])
    assert folds[3] == {id: split for split, ids in read_splits(task, tmp_path / "raw", 3).items() for id in ids}
    shutil.copytree(folder / "labelsTr", folder / "labelsTs")
    assert count_folds(task, tmp_path / "raw") == 1


def test_a_released_model_is_tuned_and_scored_like_ours(raw, prepared, workplace, monkeypatch):
    from mednext_v2.models.card import read_card
    from mednext_v2.scoring.released import run_released
    from mednext_v2.study.plan import StudyPlan
    from mednext_v2.zoo.catalogue import RECEIPT

    name, compute = "suprem_unet", dict(device="cpu", workers=1, threads=1, processes=1, parallel="ddp", readers=0)
    plan = StudyPlan("smoke", ("corpus_ct",), ("unet",), ("scratch",), ("brain_lesion_mr",), (0,), released=(name,))
    monkeypatch.setenv("MEDNEXT_V2_CACHE", str(workplace / "cache"))
    places = dict(data=prepared, raw=raw, models=workplace / "models/smoke/released" / name, out=workplace / "runs/smoke/evaluate" / name)
    with pytest.raises(FileNotFoundError, match="then `mednextv2 zoo fetch suprem_unet`"):
        run_released(plan, name, RECIPE, **places, compute=compute)
    train([TrainingRun("smoke", "unet", "scratch", "corpus_ct")], prepared, workplace / "pretrain")
    model = shutil.copytree(workplace / "pretrain/corpus_ct-s0", workplace / "cache/zoo" / name / "model")
    (model / RECEIPT).write_text("{}")
    scores = run_released(plan, name, RECIPE, **places, compute=compute)
    assert set(scores.init) == {name} and set(scores.backbone) == {"unet"}
    assert read_card(places["models"] / "unet/brain_lesion_mr-s0").parent == read_card(model).sha256
    assert len(collect(workplace / "runs/smoke/evaluate", workplace / "results")) == len(scores)
    from mednext_v2.report.collect import main_models
    from mednext_v2.scoring.released import released_model

    (workplace / "data/prepared").mkdir()
    shutil.copytree(prepared, workplace / "data/prepared/smoke")
    rows = main_models("smoke", StudyPlan("smoke", (), (), ("scratch",), ("brain_lesion_mr",), (0,), released=(name,)))
    assert [(row["task"], row["init"], row["backbone"]) for row in rows] == [("brain_lesion_mr", name, "unet")]
    assert released_model(name, workplace / "other") == model


def test_same_seed_same_weights_and_another_seed_others(prepared, workplace):
    from mednext_v2.models.card import read_card

    hashes = []
    for attempt, seed in enumerate((0, 0, 1)):
        shutil.rmtree(workplace / "scratch", ignore_errors=True)
        run = TrainingRun("smoke", "unet", "scratch", "brain_lesion_mr", seed)
        train([run], prepared, workplace / f"try{attempt}")
        hashes.append(read_card(workplace / f"try{attempt}" / run.name).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_finished_runs_of_a_failed_stage_are_not_trained_again(prepared, workplace, monkeypatch):
    from mednext_v2.training import trainer

    run = TrainingRun("smoke", "unet", "scratch", "brain_lesion_mr")
    missing = TrainingRun("smoke", "unet", "scratch", "no_such_task")
    with pytest.raises(FileNotFoundError, match="no_such_task"):
        train([run, missing], prepared, workplace / "models")
    assert not (workplace / "models").exists()
    assert len(list((workplace / "scratch").rglob("last.pt"))) == 1
    monkeypatch.setattr(trainer, "train_step", lambda *arguments: pytest.fail("it was trained again"))
    assert len(train([run], prepared, workplace / "models")) and (workplace / "models" / run.name).is_dir()


SAME = """
import os, signal, sys, time
from pathlib import Path
from mednext_v2.study.runs import TrainingRun, train_runs
from mednext_v2.training import trainer
from mednext_v2.training.recipe import Recipe
name, end = sys.argv[1:]
save, step, steps, begun = trainer.save_state, trainer.train_step, [], Path("begun")
def saved(state):
    save(state)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
def counted(*arguments):
    steps.append(1)
    if end != "again":  # All are in the middle of their training at the same time
        (begun / name).touch()
        while len(list(begun.iterdir())) < 3:
            time.sleep(0.02)
    return step(*arguments)
trainer.save_state, trainer.train_step = saved, counted
recipe = Recipe(**{recipe!r})
train_runs([TrainingRun("smoke", "unet", "scratch", "corpus_ct")], recipe, {small!r}, Path({data!r}), Path(name), Path(f"{{name}}-curves"))
print(len(steps))
"""


def test_stages_that_train_the_same_model_side_by_side_leave_each_other_alone(prepared, workplace):
    """Two go on, one is killed in the middle; it starts again when the others have ended and removed their checkpoints."""
    import signal

    (workplace / "begun").mkdir()
    recipe = vars(RECIPE) | {"steps": 5}
    program = SAME.format(recipe=recipe, small=SMALL, data=str(prepared))

    def start(name: str, end: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", program, name, end], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    processes = [start("a", "whole"), start("b", "whole"), start("c", "killed")]
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, -signal.SIGKILL], told
    assert [out.strip() for out, _ in told] == ["5", "5", ""]
    assert len(list((workplace / "scratch").iterdir())) == 1 and not (workplace / "c").exists(), "what the killed one had stays"
    again = start("c", "again")
    assert again.communicate(timeout=300)[0].strip() == "3", "it goes on after its second step"
    digests = {(workplace / name / "corpus_ct-s0/model.safetensors").read_bytes() for name in "abc"}
    assert len(digests) == 1 and not list((workplace / "scratch").iterdir())


def test_views_of_a_fold_that_several_stages_want_at_the_same_time(prepared, workplace):
    from threading import Barrier, Thread

    from mednext_v2.data.preprocess import Prepared, link_view

    whole = Prepared(prepared / "corpus_ct").manifest
    barrier, views = Barrier(6), []

    def view() -> None:
        barrier.wait()
        views.append(link_view(prepared / "corpus_ct", whole[:1], workplace / "folds/one"))

    threads = [Thread(target=view) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert views == 6 * [workplace / "folds/one"] and len(Prepared(views[0]).manifest) == 1
    assert [path.name for path in (workplace / "folds").iterdir()] == ["one"]


def test_each_training_notes_its_arithmetic_and_an_unpinned_one_is_not_taken_over(prepared, workplace, monkeypatch):
    from mednext_v2.report.verify import write_digests
    from mednext_v2.study.arithmetic import PINS, read_trainings, summarise_arithmetic
    from mednext_v2.study.paths import StudyPaths

    paths, runs = StudyPaths("smoke"), [TrainingRun("smoke", "unet", "scratch", "corpus_ct", seed) for seed in (0, 1)]
    places = paths.models(), paths.runs()

    def make(run: TrainingRun) -> None:
        place = f"unet{run.seed}"
        train_runs([run], RECIPE, SMALL, prepared, paths.models("pretrain", "corpus_ct", place), paths.curves("pretrain", "corpus_ct", place))

    monkeypatch.setenv("FAST", "1")
    make(runs[0])
    for name, value in PINS.items():
        monkeypatch.setenv(name, value)
    make(runs[1])
    assert [(one["arithmetic"], one["models"]) for one in read_trainings(*places)] == [("not pinned (FAST is set)", 1), ("pinned to AVX2", 1)]
    assert summarise_arithmetic(*places) == "not the same in all parts: not pinned (FAST is set) in 1, pinned to AVX2 in 2"
    found = write_digests("smoke")
    assert not found["pinned"] and all(one["versions"]["torch"] and one["commit"] for one in found["trainings"])
    make(runs[0])  # With pins: the model of before is there, but it is not the one that was asked for
    assert [(one["arithmetic"], one["models"]) for one in read_trainings(*places)] == [("pinned to AVX2", 2)]
    assert write_digests("smoke")["pinned"] and summarise_arithmetic(*places) == "pinned to AVX2"
    (paths.curves("pretrain", "corpus_ct", "unet1") / "corpus_ct-s1/made.json").unlink()
    assert not write_digests("smoke")["pinned"] and "not known in 1" in summarise_arithmetic(*places)


def weights(folder: Path) -> dict:
    from mednext_v2.models.card import read_state

    return read_state(folder)


def furthest(a: dict, b: dict) -> float:
    assert set(a) == set(b)
    return max((a[name] - b[name]).abs().max().item() for name in a)


TWO = Recipe(steps=3, batch_size=2, patch=(32, 32, 32), lr=1e-2, warmup=1, augment="light", checkpoint_every=2, validate_every=3)

STAGE = """
from pathlib import Path
from mednext_v2.core import Resources
from mednext_v2.study.runs import TrainingRun, train_runs
from mednext_v2.training.recipe import Recipe
recipe = Recipe(**{recipe!r})
history = train_runs([TrainingRun("smoke", "unet", "scratch", "corpus_ct")], recipe, {small!r}, Path({data!r}), Path("models"),
                     Path("curves"), resources=Resources("cpu", threads=1, processes=int(processes)))
history.to_csv("seen.csv", index=False)
"""


def training_notebook(folder: Path, prepared: Path, recipe: Recipe) -> Path:
    "A stage that trains in as many processes as its parameter says"
    from dataclasses import asdict

    import nbformat

    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    code = STAGE.format(recipe=asdict(recipe), small=SMALL, data=str(prepared))
    notebook.cells = [nbformat.v4.new_code_cell("processes = '1'", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    nbformat.write(notebook, folder / "stage.ipynb")
    return folder / "stage.ipynb"


@pytest.mark.slow
def test_two_processes_from_a_notebook_train_as_one(prepared, workplace):
    history = train_runs([TrainingRun("smoke", "unet", "scratch", "corpus_ct")], TWO, SMALL, prepared, workplace / "one", workplace / "one-curves")
    run_notebook(training_notebook(workplace, prepared, TWO), workplace / "out", processes="2")
    found = pd.read_csv(workplace / "seen.csv")
    assert np.allclose(found[["loss", "lr"]], history[["loss", "lr"]], atol=1e-5)
    assert found.val_dice.dropna().tolist() == pytest.approx(history.val_dice.dropna().tolist(), abs=1e-2)
    one, two = weights(workplace / "one/corpus_ct-s0"), weights(workplace / "models/corpus_ct-s0")
    assert 0 < furthest(one, two) < 1e-5
    for name in ("plots/metrics/loss.tsv", "history.csv", "run.json"):
        assert (workplace / "curves/corpus_ct-s0" / name).is_file()
    assert json.loads((workplace / "curves/corpus_ct-s0/run.json").read_text())["processes"] == 2
    assert not list((workplace / "scratch").iterdir())


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_stage_with_its_message(prepared, workplace, capsys):
    odd = Recipe(**vars(TWO) | {"batch_size": 1})
    with pytest.raises(SystemExit) as ended:
        run_stage(training_notebook(workplace, prepared, odd), workplace / "out", "processes=2")
    assert "batch_size 1 must be divisible by 2" in str(ended.value) and "RunEnded" in str(ended.value)
    assert not (workplace / "models").exists()


def test_checkpoints_go_when_the_models_are_there_and_only_what_is_gone_is_trained(prepared, workplace, monkeypatch):
    from mednext_v2.training import trainer

    runs, trained, fit = [TrainingRun("smoke", "unet", "scratch", "corpus_ct", seed) for seed in (0, 1)], [], trainer.fit

    def watched(recipe, *arguments, **options):
        trained.append(options["seed"])
        return fit(recipe, *arguments, **options)

    def again(recipe=RECIPE):
        trained.clear()
        history = train(runs, prepared, workplace / "models", recipe=recipe)
        return list(trained), history, {run.seed: weights(workplace / "models" / run.name) for run in runs}

    monkeypatch.setattr(trainer, "fit", watched)
    seeds, history, before = again()
    assert seeds == [0, 1] and not list((workplace / "scratch").iterdir())
    seeds, same_history, _ = again()
    assert seeds == []
    pd.testing.assert_frame_equal(same_history, history)
    shutil.rmtree(workplace / "models/corpus_ct-s1")  # One model is gone
    seeds, _, after = again()
    assert seeds == [1] and furthest(before[0], after[0]) == furthest(before[1], after[1]) == 0
    damaged = workplace / "models/corpus_ct-s0/model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert again()[0] == [0]
    shutil.rmtree(workplace / "models-curves")  # DVC takes away both before a stage runs
    assert again()[0] == [0, 1]
    assert again(Recipe(**vars(RECIPE) | {"lr": 2e-2}))[0] == [0, 1]


def test_key_of_a_run_changes_with_all_it_is_made_of():
    run = TrainingRun("mini", "unet", "scratch", "brain_mr")
    keys = [
        run_key(run, RECIPE),
        run_key(TrainingRun("mini", "unet", "scratch", "brain_mr", 1), RECIPE),
        run_key(run, Recipe(steps=4)),
        run_key(run, RECIPE, {"filters": (4, 8, 16)}),
    ]
    assert len(set(keys)) == len(keys) and run_key(run, RECIPE) == keys[0]


@pytest.mark.parametrize(
    ("patch", "shape", "strides", "expected"),
    [
        ((32, 32, 32), (80, 64, 24), (16, 16, 16), (32, 32, 16)),
        ((32, 32, 32), (80, 64, 24), (8, 8, 8), (32, 32, 24)),
        ((128, 128, 128), (100, 300, 5), (16, 16, 16), (96, 128, 16)),
        ((32, 32, 32), (20, 20, 20), (16, 16, 16), (32, 16, 16)),
        ((16, 32, 16), (20, 20, 20), (8, 8, 8), (16, 16, 16)),
        ((64, 64, 64), (80, 64, 7), (16, 16, 1), (64, 64, 7)),
    ],
)
def test_patch_fits_volume_and_strides(patch, shape, strides, expected):
    assert fit_patch(patch, shape, strides) == expected


def test_collect_keeps_case_names_and_needs_input(tmp_path):
    row = dict(profile="mini", task="t", case="001", person="007", scans="real", split="test", label="liver", backbone="unet", init="scratch", seed=0)
    (tmp_path / "in/one").mkdir(parents=True)
    pd.DataFrame([row | dict(dsc=0.5, nsd=0.5)]).reindex(columns=SCORE_COLUMNS).to_csv(tmp_path / "in/one/scores.csv", index=False)
    found = collect(tmp_path / "in", tmp_path / "out")
    assert (found.case.tolist(), found.person.tolist()) == (["001"], ["007"])
    with pytest.raises(FileNotFoundError, match="the stage `evaluate` has not run"):
        collect(tmp_path / "out", tmp_path / "none")


def test_profiles_differ_in_numbers_only(tmp_path):
    def keys(value, prefix=""):
        if not isinstance(value, dict):
            return {prefix}
        return set().union(*(keys(item, f"{prefix}.{key}") for key, item in value.items()), {prefix})

    composed = {name: read_yaml(compose_params(name, tmp_path / "p.yaml")) for name in profiles()}
    # What a suite is made of, and which rates are tried, only those profiles say that have it
    apart = ("backbones", "ablations", "suite", "people", "rates", "shipped")
    assert all(set(value) == set(composed["mini"]) for value in composed.values())
    shapes = {name: keys({k: v for k, v in value.items() if k not in apart}) for name, value in composed.items()}
    assert shapes["mini"] == shapes["smoke"] == shapes["study"]
    small = {".recipes.pretrain.present_only", ".recipes.finetune.present_only"}
    assert shapes["mini"] - small == shapes["paper"] - {".recipes.finetune.grad_accum_steps"}
