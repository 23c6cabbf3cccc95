"""Files and folders: what is written, what is refused, and that one broken scan costs one label map"""

import errno
import json
import re
import sys
import threading
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from tqdm import tqdm

from mednext_v2 import core
from mednext_v2.cli import main
from mednext_v2.core import ItemsFailed, map_items
from mednext_v2.data.scans import BadFile
from mednext_v2.inference import files, predictor
from mednext_v2.inference.files import colour, itksnap_table, label_names, list_jobs, names_extension, predict_files, read_names, slicer_table
from mednext_v2.inference.predictor import PredictSettings, predict
from mednext_v2.integrations.bundle import write_bundle
from mednext_v2.integrations.export import export_model
from mednext_v2.models.card import read_card
from mednext_v2.training.run import show_elapsed
from model_toys import KNOWN, save_unet

torch.set_num_threads(1)
CPU = PredictSettings(device="cpu")


def scan(path, seed=0, shape=(18, 14, 9), spacing=(1.5, 1.5, 3.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.diag([*spacing, 1.0])), path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_unet(tmp_path_factory.mktemp("models") / "one")


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Names


def test_tables_of_names_are_read_back():
    names = {1: "left kidney", 2: 'so "called"', 300: "spleen"}
    rows = [line for line in itksnap_table(names).splitlines() if not line.startswith("#")]
    fields = [line.split(maxsplit=7) for line in rows]
    assert [int(row[0]) for row in fields] == [0, 1, 2, 300] and all(len(row) == 8 for row in fields)
    assert fields[1][1:4] == [str(part) for part in colour(1)] and fields[1][7] == '"left kidney"'
    assert all(row[7].count('"') == 2 for row in fields)
    table = slicer_table(names)
    rows = [line.split() for line in table.splitlines() if not line.startswith("#")]
    assert table.startswith("# Color table file") and all(len(row) == 6 for row in rows)
    assert rows[1] == ["1", "left_kidney", *map(str, colour(1)), "255"]


def test_names_go_through_the_header(tmp_path):
    names = {1: "a < b & c", 2: "Läsion"}
    image = nib.Nifti1Image(np.arange(8, dtype=np.uint8).reshape(2, 2, 2), np.eye(4))
    assert read_names(image) == {}
    image.header.extensions.append(names_extension(names))
    nib.save(image, tmp_path / "a.nii.gz")
    again = nib.load(tmp_path / "a.nii.gz")
    assert read_names(again) == names and (np.asarray(again.dataobj) == image.dataobj).all()


def test_regions_are_named_by_the_value_they_are_painted_with(model):
    card = replace(read_card(model), groups={}, regions={"whole": (1, 2), "core": (2,)}, class_order=(1, 2))
    assert label_names(card) == {1: "whole", 2: "core"}
    shared = replace(card, regions={"left": (1, 2), "whole": (1, 2), "core": (2,)}, class_order=(1, 1, 2))
    assert label_names(shared) == {1: "left or whole", 2: "core"}


# A file


def test_a_file(model, tmp_path):
    source = scan(tmp_path / "in/anna.nii.gz")
    done = predict_files(model, source, tmp_path / "out/labels.nii.gz", CPU)
    assert done == {"anna": tmp_path / "out/labels.nii.gz"}
    names = {"labels.nii.gz", "labels.json", "labels.txt", "labels.ctbl"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    image = nib.load(done["anna"])
    np.testing.assert_array_equal(np.asarray(image.dataobj), np.asarray(predict(model, source, device="cpu").dataobj))
    assert image.get_data_dtype() == np.uint8 and read_names(image) == {1: "core", 2: "rim"}
    np.testing.assert_array_equal(image.affine, nib.load(source).affine)
    report = json.loads((tmp_path / "out/labels.json").read_text())
    assert report["models"][0]["sha256"] == [read_card(model).sha256]
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or report["versions"]["torch"] == torch.__version__
    assert report["peak_bytes"] > 1e7 and report["seconds"]["network"] > 0 and report["device"] == "cpu"
    assert report["voxels"] == {"core": int((voxels(done["anna"]) == 1).sum()), "rim": int((voxels(done["anna"]) == 2).sum())}


def test_probabilities_are_those_of_the_labels(model, tmp_path):
    source = scan(tmp_path / "anna.nii")
    predict_files(model, source, tmp_path / "out", CPU, probabilities=True)
    shares = np.load(tmp_path / "out/anna.npz")["probabilities"].astype(np.float32)
    assert shares.shape == (3, 18, 14, 9)
    np.testing.assert_allclose(shares.sum(0), 1, atol=2e-3)
    sure = np.sort(shares, 0)[-1] - np.sort(shares, 0)[-2] > 2e-3
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(shares.argmax(0)[sure], voxels(tmp_path / "out/anna.nii.gz")[sure])


# Ensembles and folds


def test_folds_average_logits_and_models_average_probabilities(model, tmp_path):
    source = scan(tmp_path / "anna.nii.gz")
    other = save_unet(tmp_path / "other", 1)
    for number, folder in enumerate((model, other)):
        (tmp_path / "folds").mkdir(exist_ok=True)
        (tmp_path / f"folds/fold_{number}").symlink_to(folder)
    weights = [predictor.load_ensemble(folder, CPU)[0].models[0] for folder in (model, other)]
    card = read_card(model)

    class Mean(torch.nn.Module):
        def forward(self, x):
            return (weights[0](x) + weights[1](x)) / 2

    expected = predictor.predict_scan(Mean(), card, [nib.load(source)])
    for folds in ((), ("0", "1")):
        found = predict(tmp_path / "folds", source, device="cpu", folds=folds)
        np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(expected.dataobj))
    single = predict(tmp_path / "folds", source, device="cpu", folds=("1",))
    np.testing.assert_array_equal(np.asarray(single.dataobj), np.asarray(predict(other, source, device="cpu").dataobj))

    shares = []
    for folder in (model, other):
        predict_files(folder, source, tmp_path / folder.name, CPU, probabilities=True)
        shares.append(np.load(tmp_path / folder.name / "anna.npz")["probabilities"].astype(np.float32))
    mean = sum(shares) / 2
    together = np.asarray(predict([model, other], source, device="cpu").dataobj)
    sure = np.sort(mean, 0)[-1] - np.sort(mean, 0)[-2] > 2e-3
    np.testing.assert_array_equal(together[sure], mean.argmax(0)[sure])
    assert (together != np.asarray(expected.dataobj)).mean() < 0.2


def test_models_of_an_ensemble_may_differ_in_grid_but_not_in_labels(model, tmp_path):
    source = scan(tmp_path / "anna.nii.gz")
    coarse = save_unet(tmp_path / "coarse", 2, spacing=(3.0, 3.0, 3.0), patch=(8, 8, 8))
    assert predict([model, coarse], source, device="cpu").shape == (18, 14, 9)
    others = save_unet(tmp_path / "others", 3, labels={"core": 1, "edge": 2}, groups={"core": "organ", "edge": "organ"})
    with pytest.raises(ValueError, match="labels differs between models"):
        predict([model, others], source, device="cpu")
    (tmp_path / "folds").mkdir()
    (tmp_path / "folds/fold_0").symlink_to(model)
    (tmp_path / "folds/fold_1").symlink_to(coarse)
    with pytest.raises(ValueError, match="spacing differs"):
        predict(tmp_path / "folds", source, device="cpu")
    with pytest.raises(ValueError, match="has no fold 7; it has: 0, 1"):
        predict(tmp_path / "folds", source, device="cpu", folds=(7,))
    with pytest.raises(ValueError, match="no folds to choose"):
        predict(model, source, device="cpu", folds=(0,))
    with pytest.raises(FileNotFoundError, match="neither card.json nor fold_0"):
        predict(tmp_path, source, device="cpu")


# A folder


def test_one_broken_scan_does_not_stop_the_rest(model, tmp_path):
    for number, name in enumerate("abc"):
        scan(tmp_path / f"in/{name}.nii.gz", number)
    (tmp_path / "in/b.nii.gz").write_bytes((tmp_path / "in/b.nii.gz").read_bytes()[:3000])
    values = np.full((4, 4, 4), np.nan, np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "in/d.nii.gz")
    before = everything(tmp_path / "in")
    with pytest.raises(ItemsFailed) as error:
        predict_files(model, tmp_path / "in", tmp_path / "out", CPU)
    assert set(error.value.failures) == {"b", "d"} and set(error.value.results) == {"a", "c"}
    assert "NaN" in error.value.failures["d"] and all("\n" not in text for text in error.value.failures.values())
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"a.nii.gz", "a.json", "c.nii.gz", "c.json", "labels.txt", "labels.ctbl"}
    assert everything(tmp_path / "in") == before
    for name in "ac":
        single = predict(model, tmp_path / f"in/{name}.nii.gz", device="cpu")
        np.testing.assert_array_equal(voxels(tmp_path / f"out/{name}.nii.gz"), np.asarray(single.dataobj))


def test_done_ones_are_skipped_and_others_are_not_overwritten(model, tmp_path, monkeypatch):
    for number, name in enumerate("ab"):
        scan(tmp_path / f"in/{name}.nii.gz", number)
    predict_files(model, tmp_path / "in", tmp_path / "out", CPU)
    before = everything(tmp_path / "out")
    (tmp_path / "out/a.nii.gz").unlink()
    labelled = []
    real = files.label_volume
    monkeypatch.setattr(files, "label_volume", lambda *args: labelled.append(1) or real(*args))
    predict_files(model, tmp_path / "in", tmp_path / "out", CPU)
    after = everything(tmp_path / "out")
    assert labelled == [1]
    same = [name for name in before if name.name != "a.json"]
    assert all(before[name] == after[name] for name in same)
    with pytest.raises(ItemsFailed, match="made in another way"):
        predict_files(model, tmp_path / "in", tmp_path / "out", replace(CPU, overlap=0.25))
    assert everything(tmp_path / "out") == after
    predict_files(model, tmp_path / "in", tmp_path / "out", replace(CPU, overlap=0.25), overwrite=True)
    assert json.loads((tmp_path / "out/a.json").read_text())["options"]["overlap"] == 0.25


def test_a_full_disk_is_one_line_and_leaves_no_part(model, tmp_path, monkeypatch):
    for name in "ab":
        scan(tmp_path / f"in/{name}.nii.gz")
    real = files.nib.save

    def full(image, path):
        if path.name.endswith("a.nii.gz"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(image, path)

    monkeypatch.setattr(files.nib, "save", full)
    with pytest.raises(ItemsFailed, match="No space left on device") as error:
        predict_files(model, tmp_path / "in", tmp_path / "out", CPU)
    assert list(error.value.failures) == ["a"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b.nii.gz", "b.json", "labels.txt", "labels.ctbl"}


def test_a_disk_without_room_is_found_before_the_network_works(model, tmp_path, monkeypatch):
    scan(tmp_path / "in/a.nii.gz")
    monkeypatch.setattr(core.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    monkeypatch.setattr(files, "label_job", None)
    with pytest.raises(ItemsFailed, match="a.nii.gz, before compression, needs .* has 1000 left") as error:
        predict_files(model, tmp_path / "in/a.nii.gz", tmp_path / "new/folder/a.nii.gz", CPU)
    assert list(error.value.failures) == ["a"] and not (tmp_path / "new").exists()


@pytest.mark.skipif(not hasattr(predictor.os, "posix_fallocate"), reason="needs posix_fallocate")
def test_probabilities_without_room_are_refused_and_do_not_end_the_process(model, tmp_path, monkeypatch):
    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    scan(tmp_path / "in/a.nii.gz")
    monkeypatch.setattr(predictor.os, "posix_fallocate", full)
    with pytest.raises(ItemsFailed, match="no space for .* GB of probabilities .* TMPDIR"):
        predict_files(model, tmp_path / "in", tmp_path / "out", CPU, probabilities=True)
    assert not list((tmp_path / "out").glob("*"))


def test_channels_of_a_folder(tmp_path):
    known = {key: value * 2 if isinstance(value, list) else value for key, value in KNOWN.items()}
    two = save_unet(tmp_path / "two", in_channels=2, normalisation=known)
    for channel in (0, 1):
        scan(tmp_path / f"in/anna_000{channel}.nii.gz", channel)
    scan(tmp_path / "in/ben_0000.nii.gz")
    scan(tmp_path / "in/carl_0000.nii.gz")
    scan(tmp_path / "in/carl_0001.nii.gz", shape=(18, 14, 8))
    with pytest.raises(BadFile, match="has ben_0000.nii.gz for ben, and 2 channels are expected"):
        predict_files(two, tmp_path / "in", tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
    (tmp_path / "in/ben_0000.nii.gz").unlink()
    with pytest.raises(ItemsFailed) as error:
        predict_files(two, tmp_path / "in", tmp_path / "out", CPU)
    assert "has the shape" in error.value.failures["carl"] and list(error.value.results) == ["anna"]
    scan(tmp_path / "plain/anna.nii.gz")
    with pytest.raises(ValueError, match="anna.nii.gz, which has no channel number"):
        predict_files(two, tmp_path / "plain", tmp_path / "out2", CPU)


def test_where_the_output_may_not_be(tmp_path):
    source = scan(tmp_path / "in/a.nii.gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for wrong, target, kind, message in [
        (tmp_path / "in", tmp_path / "in", ValueError, "scans are never overwritten"),
        (tmp_path / "in", tmp_path / "link", ValueError, "scans are never overwritten"),
        (source, source, ValueError, "scans are never overwritten"),
        (source, tmp_path / "in", ValueError, "scans are never overwritten"),
        (tmp_path / "in", tmp_path / "labels.nii.gz", ValueError, "the output must be a folder"),
        (tmp_path / "empty", tmp_path / "out", FileNotFoundError, "holds no volume"),
        (tmp_path / "empty", tmp_path / "labels.nii.gz", FileNotFoundError, "holds no volume"),
        (tmp_path / "nowhere", tmp_path / "out", FileNotFoundError, "does not exist"),
    ]:
        with pytest.raises(kind, match=message):
            list_jobs(wrong, target, 1)
    scan(tmp_path / "in/a.nii")
    with pytest.raises(ValueError, match="holds a.nii and a.nii.gz: keep one"):
        list_jobs(tmp_path / "in", tmp_path / "out", 1)


def test_axes_that_training_may_not_have_had_are_said_once(tmp_path):
    save_unet(tmp_path / "known")
    save_unet(tmp_path / "model", orientation="unknown")
    for name, affine in (("a", np.diag([-2, -2, 2, 1])), ("b", np.diag([-2, -2, 2, 1])), ("c", np.diag([2, 2, 2, 1]))):
        for folder in ("all", name):
            (tmp_path / folder).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(20, 20, 20)).astype("float32"), affine), tmp_path / folder / f"{name}.nii.gz")
    said = "a scan is in LPS: the axes of the scans that this model was trained on are not known"
    for model, source, count in (("model", "all", 1), ("model", "c", 0), ("known", "all", 0)):
        line = ["predict", "-m", tmp_path / model, "-i", tmp_path / source, "-o", tmp_path / f"{model}_{source}", "--device", "cpu"]
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            main([*map(str, line), "--quiet"])
        told = "\n".join(str(warning.message) for warning in shown)
        assert told.count(said) == count and told.count("axes of the scans") == count
    for number, name in enumerate(("a", "c")):
        report = json.loads((tmp_path / f"model_all/{name}.json").read_text())
        assert len([text for text in report["warnings"] if said in text]) == 1 - number
    for write in (export_model, write_bundle):
        with pytest.warns(UserWarning, match="model: the axes of the scans that this model was trained on are not known"):
            write(tmp_path / "model", tmp_path / write.__name__)


def test_a_file_of_another_kind_is_no_table_of_names(model, tmp_path):
    source = scan(tmp_path / "in/a.nii.gz")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/labels.txt").write_text("notes of mine")
    with pytest.raises(ValueError, match="labels.txt is there and is no table"):
        predict_files(model, source, tmp_path / "out", CPU)
    assert (tmp_path / "out/labels.txt").read_text() == "notes of mine"


def test_masks_of_a_folder_limit_the_labels(model, tmp_path):
    source = scan(tmp_path / "in/a.nii.gz")
    mask = np.zeros((18, 14, 9), np.uint8)
    mask[3:12, 4:9, 2:6] = 1
    (tmp_path / "masks").mkdir()
    nib.save(nib.Nifti1Image(mask, nib.load(source).affine), tmp_path / "masks/a.nii.gz")
    predict_files(model, source, tmp_path / "out", CPU, roi=tmp_path / "masks")
    whole = np.asarray(predict(model, source, device="cpu").dataobj)
    np.testing.assert_array_equal(voxels(tmp_path / "out/a.nii.gz"), whole * mask)
    scan(tmp_path / "in/b.nii.gz")
    with pytest.raises(ItemsFailed, match="holds no mask b.nii.gz"):
        predict_files(model, tmp_path / "in", tmp_path / "out", CPU, roi=tmp_path / "masks")


def test_ct_that_is_not_in_hu_is_warned_of(tmp_path):
    known = KNOWN | {"schemes": ["ct"], "low": [-900.0], "high": [900.0], "std": [300.0]}
    ct = save_unet(tmp_path / "ct", modality="CT", normalisation=known)
    with pytest.warns(UserWarning, match="does not look like CT in HU"):
        predict_files(ct, scan(tmp_path / "in/a.nii.gz"), tmp_path / "out", CPU)
    assert "HU" in json.loads((tmp_path / "out/a.json").read_text())["warnings"][0]


# Progress


def shown(capsys):
    "Windows done and in all, of each time that the bar was drawn"
    return [tuple(map(int, pair)) for pair in re.findall(r"predicting: (\d+)/(\d+) ", capsys.readouterr().err)]


def passes(monkeypatch):
    "Counts calls of the networks"
    calls, real = [], files.load_ensemble

    def load(*args):
        members = real(*args)
        for member in members:
            for network in member.models:
                network.register_forward_hook(lambda *_: calls.append(1))
        return members

    monkeypatch.setattr(files, "load_ensemble", load)
    return calls


def test_the_bar_counts_every_window_of_every_network(model, tmp_path, monkeypatch, capsys):
    for seed, shape in ((0, (18, 14, 9)), (1, (40, 30, 12))):
        scan(tmp_path / f"in/{seed}.nii.gz", seed, shape)
    (tmp_path / "in/broken.nii.gz").write_text("not an image")
    for number in (0, 1):
        save_unet(tmp_path / f"folds/fold_{number}", number, mirror_axes=(0, 2))
    coarse = save_unet(tmp_path / "coarse", 2, spacing=(3.0, 3.0, 3.0), patch=(8, 8, 8), mirror_axes=(1,))
    calls, settings = passes(monkeypatch), replace(CPU, tta=True)
    told, real = [], files.WindowBar.tell
    monkeypatch.setattr(files.WindowBar, "tell", lambda bar, *args: (real(bar, *args), told.append((bar.bar.n, bar.bar.total))))
    with pytest.raises(ItemsFailed, match="1 of 3 failed"):
        predict_files([tmp_path / "folds", coarse], tmp_path / "in", tmp_path / "out", settings, progress=True)
    drawn = shown(capsys)
    assert drawn[0] == (0, len(calls)) and drawn[-1] == (len(calls), len(calls))  # Headers are enough
    assert [done for done, _ in told] == sorted(done for done, _ in told) and {total for _, total in told} == {len(calls)}
    assert {done for done, _ in told} == set(range(len(calls) + 1))
    monkeypatch.undo()
    with pytest.raises(ItemsFailed):
        predict_files([tmp_path / "folds", coarse], tmp_path / "in", tmp_path / "without", settings)
    assert "predicting" not in capsys.readouterr().err
    for name in ("0.nii.gz", "1.nii.gz"):
        np.testing.assert_array_equal(voxels(tmp_path / "out" / name), voxels(tmp_path / "without" / name))


def test_done_scans_and_regions_take_fewer_windows(model, tmp_path, monkeypatch, capsys):
    for name in "abc":
        scan(tmp_path / f"in/{name}.nii.gz", 0, (60, 30, 9))
    predict_files(model, tmp_path / "in/b.nii.gz", tmp_path / "out", CPU)
    calls = passes(monkeypatch)
    predict_files(model, tmp_path / "in", tmp_path / "out", CPU, progress=True)
    assert shown(capsys)[-1] == (len(calls), len(calls)) and len(calls) % 2 == 0
    whole = len(calls)
    calls.clear()
    predict_files(model, tmp_path / "in", tmp_path / "part", CPU, roi=(0, 5, 0, 30, 0, 9), progress=True)
    drawn = shown(capsys)
    assert drawn[-1] == (len(calls), len(calls)) and len(calls) * 2 < whole * 3
    assert drawn[1][1] == len(calls)  # What the first scan took is expected of the others


def test_the_bar_begins_again_with_the_scan(model, tmp_path, monkeypatch):
    member, told = predictor.load_ensemble(model, CPU)[0], []
    volume = predictor.network_input([scan(tmp_path / "a.nii.gz", 0, (40, 30, 9))])
    real, failed = predictor.average_models, []

    def average(*args):
        def full(x):
            if len(told) > 3 and not failed:
                failed.append(1)
                raise torch.OutOfMemoryError("full")
            return once(x)

        once = real(*args)
        return full

    monkeypatch.setattr(predictor, "average_models", average)
    with pytest.warns(UserWarning, match="too little memory"):
        predictor.label_volume([member], volume, CPU, None, lambda *done: told.append(done))
    total = told[0][1]
    assert [done for done, _ in told] == [*range(4), *range(total + 1)]


def test_a_bar_that_cannot_be_drawn_costs_nothing(model, tmp_path, monkeypatch):
    class Closed:
        encoding = "utf-8"

        def isatty(self):
            return False

        def flush(self):
            pass

        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "closed")

    monkeypatch.setattr(sys, "stderr", Closed())
    with files.WindowBar({"a": 3}, True) as bar:
        for done in range(4):
            bar.tell("a", done, 5)
    map_items(len, {"a": ("a",)}, description="counting")
    with show_elapsed("waiting"):
        time.sleep(1.2)
    taken = []

    def take() -> None:
        for lock in tqdm.get_lock().locks:
            taken.append(lock.acquire(timeout=5))
            if taken[-1]:
                lock.release()

    other = threading.Thread(target=take)
    other.start()
    other.join()
    assert all(taken), "a lock that is kept stops the bars of every other thread"


@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_nothing_is_drawn_for_programs(option, model, tmp_path, capsys):
    from mednext_v2.cli import main

    line = ["predict", "-m", model, "-i", scan(tmp_path / "a.nii.gz"), "--device", "cpu", "-o"]
    main([str(word) for word in (*line, tmp_path / "loud")])
    heard = capsys.readouterr()
    assert "predicting: " in heard.err and "predicting" not in heard.out
    main([str(word) for word in (*line, tmp_path / "still", option)])
    assert "predicting" not in capsys.readouterr().err
    np.testing.assert_array_equal(voxels(tmp_path / "loud/a.nii.gz"), voxels(tmp_path / "still/a.nii.gz"))
