"One command from raw data to scores: the whole way, again, after a kill, and what is refused before it costs anything"

import io
import json
import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from mednext_v2 import cli, finetuning
from mednext_v2.core import Resources
from mednext_v2.data.preprocess import Prepared
from mednext_v2.data.scans import write_volume
from mednext_v2.finetuning import FinetuneOptions, finetune
from mednext_v2.models.card import read_card, read_state
from mednext_v2.training import launch
from mednext_v2.training.recipe import get_recipe
from test_importers import DNA, dna, nnunet_folder
from test_training_sets import BELLY, CHEST, scan, write_raw

SETTINGS = dict(
    recipe=get_recipe("smoke", steps=6, patch=(16, 16, 16), checkpoint_every=2, lr=1e-2),
    backbone="unet",
    overrides={"filters": (4, 8, 8)},
    resources=Resources("cpu", workers=1),
    options=FinetuneOptions(forecast=False),
)


def options(**changed) -> dict:
    return {"options": FinetuneOptions(forecast=False, **changed)}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    "Two training cases, one to validate, one to test whose axes are stored in another order"
    folder = tmp_path_factory.mktemp("raw")
    write_raw(CHEST, folder)
    image, places = scan(77)
    label = np.zeros(image.shape, np.uint8)
    for name, value in CHEST.labels.items():
        label[places[name]] = value
    turned = np.array([[0, 0, -1.0, 19], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    write_volume(folder / CHEST.folder / "imagesTs/held_0000.nii.gz", image[:, :, :18], turned)
    write_volume(folder / CHEST.folder / "labelsTs/held.nii.gz", label[:, :, :18], turned)
    return folder / CHEST.folder


@pytest.fixture(scope="module")
def done(raw, tmp_path_factory):
    out, told = tmp_path_factory.mktemp("done") / "out", []
    return out, finetune(raw, None, out, **SETTINGS | options(command="the command", report=told.append)), told


def times(folder) -> dict:
    return {path: os.stat(path).st_mtime_ns for path in folder.rglob("*")}


def test_whole_way(done, raw):
    out, table, told = done
    assert table[["split", "case"]].drop_duplicates().values.tolist() == [["test", "held"]]
    assert table.label.tolist() == list(CHEST.labels)
    made, true = (nibabel.load(path) for path in (out / "predictions/held.nii.gz", raw / "labelsTs/held.nii.gz"))
    assert made.shape == true.shape and np.allclose(made.affine, true.affine)
    voxels = [np.asarray(one.dataobj) for one in (made, true)]
    for row in table.itertuples():
        guess, truth = (one == CHEST.labels[row.label] for one in voxels)
        assert row.dsc == pytest.approx(2 * (guess & truth).sum() / (guess.sum() + truth.sum()))
    card = read_card(out / "model")
    assert card.scores["dsc"] == pytest.approx(table.dsc.mean(), abs=1e-4)
    assert {name: card.scores[name] for name in ("split", "cases", "grid", "command")} == dict(split="test", cases=1, grid="scan", command="the command")
    assert told[0].startswith("data: clean") and told[1].startswith("plan: unet from random weights, 6 steps")
    means = json.loads((out / "summary.json").read_text())["mean"]
    assert [means[str(value)]["Dice"] for value in CHEST.labels.values()] == pytest.approx(table.dsc.tolist())


def test_again_changes_nothing(done, raw):
    out, table, _ = done
    before, told = times(out), []
    again = finetune(raw, None, out, **SETTINGS | options(command="another", report=told.append))
    assert times(out) == before and not told
    pd.testing.assert_frame_equal(again, table, check_dtype=False)


def test_only_missing_steps_are_done_again(done, raw, monkeypatch):
    out, table, _ = done
    (out / "scores.csv").unlink()
    monkeypatch.setattr(finetuning, "train_in_processes", None)
    before = times(out / "predictions")
    again = finetune(raw, None, out, **SETTINGS | options(command="the command"))
    assert times(out / "predictions") == before and again.dsc.tolist() == table.dsc.tolist()


def test_killed_training_goes_on_to_the_same_scores(done, raw, tmp_path, monkeypatch):
    def kill(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(launch, "heartbeat", kill)
    with pytest.raises(KeyboardInterrupt):
        finetune(raw, None, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out/model").exists()
    steps, before = [], times(tmp_path / "out/prepared")
    monkeypatch.setattr(launch, "heartbeat", steps.append)
    table = finetune(raw, None, tmp_path / "out", **SETTINGS)
    assert steps == [5, 6] and times(tmp_path / "out/prepared") == before
    wanted, found = read_state(done[0] / "model"), read_state(tmp_path / "out/model")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert table.dsc.tolist() == done[1].dsc.tolist()


def test_sigkill_in_the_middle_and_the_same_call_again(done, raw, tmp_path):
    "The process is killed as the kernel does it, between two steps; nothing of it is left but its folder"
    out = tmp_path / "out"
    code = (
        "import os, signal, torch; from mednext_v2.core import Resources; from mednext_v2.training import launch; from mednext_v2.finetuning import finetune; "
        "torch.set_num_threads(1); launch.heartbeat = lambda step: step == 5 and os.kill(os.getpid(), signal.SIGKILL); "
        f"from test_finetune import SETTINGS; finetune({str(raw)!r}, None, {str(out)!r}, **SETTINGS)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300, cwd=Path(__file__).parent)
    assert ended.returncode == -signal.SIGKILL and not (out / "model").exists() and (out / "prepared/manifest.csv").is_file()
    table = finetune(raw, None, out, **SETTINGS)
    wanted, found = read_state(done[0] / "model"), read_state(out / "model")
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert table.dsc.tolist() == done[1].dsc.tolist()


def test_other_requests_and_exchanged_files_are_refused(done, raw):
    for changed, word in (({"seed": 1}, "seed was 0, now 1"), ({"spacing": (2, 2, 2)}, "task.spacing was"), ({"overrides": {}}, "network")):
        with pytest.raises(ValueError, match=rf"plan.json was made with other settings \({word}.*\): choose"):
            finetune(raw, None, done[0], **SETTINGS | changed)
    path = raw / "labelsTr" / "chest_0.nii.gz"
    stat = os.stat(path)
    os.utime(path, (0, 0))
    try:
        with pytest.raises(ValueError, match=r"other settings \(files was .*\): choose another folder"):
            finetune(raw, None, done[0], **SETTINGS)
    finally:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_parent_of_other_classes_and_voxels(done, tmp_path):
    "Backbone, size and voxels are the parent's, classes go by name, intensities are the data's; no test cases"
    write_raw(BELLY, tmp_path / "raw", shift=500)
    belly, said = tmp_path / "raw" / BELLY.folder, []
    settings = {name: value for name, value in SETTINGS.items() if name not in ("backbone", "overrides")}
    parent = tmp_path / "parent"
    (tmp_path / "parent").mkdir()
    for name in ("card.json", "model.safetensors"):
        (parent / name).write_bytes((done[0] / "model" / name).read_bytes())
    values = json.loads((parent / "card.json").read_text())
    (parent / "card.json").write_text(json.dumps(values | {"spacing": [1.25, 1.25, 1.25]}))
    table = finetune(belly, parent, tmp_path / "out", **settings | options(report=said.append))
    card = read_card(tmp_path / "out/model")
    assert (card.backbone, card.overrides["filters"], card.spacing) == ("unet", (4, 8, 8), (1.25, 1.25, 1.25))
    assert card.parent == values["sha256"] and card.init == "parent"
    prepared = Prepared(tmp_path / "out/prepared")
    assert prepared.spacing == (1.25, 1.25, 1.25) and card.normalisation["mean"] == prepared.fingerprint.mean
    notes = pd.read_csv(tmp_path / "out/run/transfer.csv").note.dropna().tolist()
    assert "rows of 2 of 3 classes" in notes  # Background and spleen
    assert set(table.split) == {"val"} and any("no test cases" in line for line in said)
    with pytest.raises(ValueError, match="tensors of the body do not fit"):
        finetune(belly, parent, tmp_path / "other", backbone="mednext_v2_tiny", **settings)
    assert not (tmp_path / "other/prepared").exists()


@pytest.mark.slow
def test_foreign_checkpoint_as_parent(raw, tmp_path):
    "A folder as the zoo leaves it: the only checkpoint in it is found and imported"
    with torch.no_grad():
        source, _ = dna(*DNA["resenc"])
    nnunet_folder(tmp_path / "zoo/nnUNetTrainer__nnUNetPlans__3d_fullres", source.state_dict())
    settings = {name: value for name, value in SETTINGS.items() if name not in ("backbone", "overrides")}
    settings["recipe"] = get_recipe("smoke", steps=2, patch=(16, 16, 16), checkpoint_every=2)
    finetune(raw, tmp_path / "zoo", tmp_path / "out", **settings)
    card, parent = read_card(tmp_path / "out/model"), read_card(tmp_path / "out/parent")
    assert (card.backbone, card.parent, card.init) == ("resenc_l", parent.sha256, "zoo")
    assert card.spacing == parent.spacing


@pytest.mark.parametrize("fault", ["missing", "grid", "label"])
def test_bad_raw_data_stop_before_anything_is_made(tmp_path, fault):
    write_raw(CHEST, tmp_path / "raw")
    folder = tmp_path / "raw" / CHEST.folder
    path = folder / "labelsTr/chest_1.nii.gz"
    if fault == "missing":
        path.unlink()
    elif fault == "grid":
        write_volume(path, np.zeros((9, 9, 9), np.uint8), np.eye(4))
    else:
        path.write_bytes(path.read_bytes()[:50])
    line = f"finetune -d {folder} -o {tmp_path / 'out'} --recipe smoke --backbone unet --device cpu"
    with pytest.raises(SystemExit, match="NOT CLEAN.*chest_1.*mednextv2 doctor --data") as stopped:
        cli.main(line.split())
    assert len(str(stopped.value).splitlines()) == 1 and not (tmp_path / "out").exists()


def test_too_little_memory_is_refused_before_anything_is_prepared(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "forecast", lambda *given: launch.Forecast(10**9, 1.0, 1e9))
    monkeypatch.setattr(launch, "available_memory", lambda device: 10**9)
    with pytest.raises(ValueError, match="needs about .* What fits"):
        finetune(raw, None, tmp_path / "out", **SETTINGS | {"options": FinetuneOptions()})
    assert not (tmp_path / "out/prepared").exists() and not (tmp_path / "out/plan.json").exists()


def test_command_line(raw, tmp_path):
    line = f"finetune -d {raw} -o {tmp_path / 'out'} --recipe smoke --backbone unet --network filters=(4,8,8) --device cpu "
    line += "--recipe-set patch=16,16,16 --unchecked --html"
    said = io.StringIO()
    with redirect_stdout(said):
        cli.main(line.split())
    assert "review.html" in said.getvalue() and "spleen" in said.getvalue()
    assert (tmp_path / "out/review.html").stat().st_size > 10_000


def test_seed_scans_become_a_data_set(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr("mednext_v2.study.seeds.build_dataset", lambda *given, **options: built.append(given))
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    (seeds / "manifest.yaml").write_text("seeds: {}")
    folder = finetuning.raw_folder(seeds, tmp_path / "out", "brain_mr")
    assert built == [("brain_mr", seeds, tmp_path / "out/raw")] and folder.parent == tmp_path / "out/raw"
    folder.mkdir(parents=True)
    finetuning.raw_folder(seeds, tmp_path / "out", "brain_mr")
    assert len(built) == 1 and finetuning.raw_folder(tmp_path, tmp_path / "out") == tmp_path


def test_without_recipe_and_model_the_machine_decides(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "forecast", lambda *given: launch.Forecast(10**8, 1.0, 1e12))
    said, asked = [], []
    kept = dict(overrides={"width": 4}, resources=Resources("cpu", workers=1))

    def stop(plan, resources):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning, "fit_model", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(raw, None, tmp_path / "out", None, options=FinetuneOptions(report=said.append, confirm=asked.append), **kept)
    known = json.loads((tmp_path / "out/plan.json").read_text())
    assert known["backbone"] == "mednext_v2_tiny" and 600 < known["recipe"]["steps"] <= 20_000 and not asked
    assert said[0].startswith("chosen: the small network mednext_v2_tiny") and "no GPU" in said[0]
    monkeypatch.setattr(launch, "forecast", lambda *given: launch.Forecast(10**8, 1.0, 2e12))  # Measured anew, on a machine that is less busy
    with pytest.raises(KeyboardInterrupt):
        finetune(raw, None, tmp_path / "out", None, options=FinetuneOptions(report=said.append), **kept)
    assert json.loads((tmp_path / "out/plan.json").read_text()) == known


def test_more_than_an_hour_is_asked_about(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "forecast", lambda *given: launch.Forecast(10**8, 1.0, 1e3))
    asked = []
    options = FinetuneOptions(confirm=lambda text: asked.append(text), report=lambda text: None)
    with pytest.raises(ValueError, match="not started: a training of .* was declined"):
        finetune(raw, None, tmp_path / "out", **SETTINGS | {"options": options})
    assert len(asked) == 1 and ("hour" in asked[0] or "day" in asked[0]) and not (tmp_path / "out/plan.json").exists()


def test_questions_need_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    assert cli.confirm_duration("2 days")  # A queue has nobody to ask
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert not cli.confirm_duration("2 days")


def test_a_wrong_backbone_is_refused_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "check_raw", lambda *given: pytest.fail("the data were read first"))
    with pytest.raises(ValueError, match="no backbone 'mednext_v2_tyni'"):
        finetune(tmp_path, None, tmp_path / "out", backbone="mednext_v2_tyni", resources=Resources("cpu"))
