"""What a kill, a second run or a wrong folder may not do."""

import copy
import dataclasses
import errno
import inspect
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import warnings

import nibabel
import numpy as np
import psutil
import pytest
import torch
from accelerate.tracking import GeneralTracker

from kill_toys import Meet, New, Nth, ended, start, tree
from mednext_v2 import cli, core
from mednext_v2.core import LEFTOVER_PREFIXES, NEW_FOLDER, FolderKind, Resources, atomic_files, atomic_folder, check_output, output_lock
from mednext_v2.data.preprocess import Prepared, remove_stale_cases
from mednext_v2.data.scans import write_volume
from mednext_v2.models.card import MODEL_FOLDER, Card, save_model
from mednext_v2.models.registry import create
from mednext_v2.training import launch, trainer
from mednext_v2.training.checkpoint import identity
from mednext_v2.training.monitor import Display
from mednext_v2.training.trainer import training_sampler
from test_hostile import CARD
from test_training_sets import CHEST, write_raw
from training_toys import fit, toy_cases, toy_model, toy_recipe, toy_run

HOLD = """
import sys, time
from mednext_v2.core import output_lock
with output_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", [NEW_FOLDER, MODEL_FOLDER, FolderKind("part", ("a",), ("b",))])
def test_a_folder_that_is_not_ours_a_link_and_a_file_are_refused(tmp_path, kind):
    place = tmp_path / "models"
    (place / "spleen").mkdir(parents=True)
    (tmp_path / "link").symlink_to(place)
    (tmp_path / "file").write_text("a file")
    for wrong, message in (("models", "spleen.*will not be replaced"), ("link", "is a link"), ("file", "is a file"), ("file/below", "is a file")):
        with pytest.raises(FileExistsError, match=message):
            check_output(tmp_path / wrong, kind)
        with pytest.raises(FileExistsError, match=message), atomic_folder(tmp_path / wrong, kind):
            pytest.fail("nothing may be written before the check")
    assert (place / "spleen").is_dir() and (tmp_path / "file").read_text() == "a file"


def test_a_rename_that_fails_leaves_the_older_folder(tmp_path, monkeypatch):
    part, path, real = FolderKind("part", ("a",)), tmp_path / "out", os.replace
    path.mkdir()
    (path / "a").write_text("old")

    def fails(old, new):
        if ".tmp-" in str(old):
            raise OSError(errno.EIO, "broken")
        real(old, new)

    monkeypatch.setattr(core.os, "replace", fails)
    with pytest.raises(OSError, match="broken"), atomic_folder(path, part) as temporary:
        (temporary / "a").write_text("new")
    assert (path / "a").read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_second_is_told_who_holds_a_folder_and_a_dead_one_holds_nothing(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {first.pid} on "), output_lock(tmp_path):
        pass
    first.kill()
    first.wait()
    with output_lock(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_files_that_belong_together_appear_together(tmp_path, monkeypatch):
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(core.os, "fsync", full)
    with pytest.raises(OSError, match="No space"), atomic_files(*paths, instead=paths[:1]) as new:
        for path in new:
            path.write_text("new")
    assert [path.read_text() for path in paths] == ["old", "old"] and len(list(tmp_path.iterdir())) == 2


def test_a_living_neighbour_and_foreign_folders_stay_in_prepared_cases(tmp_path):
    for name in ("a.0123456789abcdef", "b.0123456789abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "case.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years")
    with atomic_folder(tmp_path / "c.0123456789abcdef") as living:
        remove_stale_cases(tmp_path, {"a.0123456789abcdef"})
        assert living.is_dir()
        assert {path.name for path in tmp_path.iterdir()} == {"a.0123456789abcdef", "mine", living.name}


# ---- a kill wherever a file or a folder gets its name ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    "A raw data set, a model folder that predicts, and scans"
    folder = tmp_path_factory.mktemp("given")
    write_raw(CHEST, folder / "raw", cases=2)
    for path in list((folder / "raw" / CHEST.folder).rglob("chest_0*.nii.gz")):  # To test on
        place = path.parent.with_name(path.parent.name.replace("Tr", "Ts"))
        place.mkdir()
        target = place / path.name.replace("chest_0", "held")
        voxels = np.asarray(nibabel.load(path).dataobj).copy()
        voxels[-1, -1, -1] += "images" in place.name  # No scan may be in two splits
        write_volume(target, voxels, np.eye(4))
    torch.manual_seed(0)
    save_model(folder / "model", create("unet", 1, 3, filters=(4, 8, 8)), Card(**CARD))
    for name in ("one", "two"):
        source = folder / "raw" / CHEST.folder / f"imagesTr/chest_{int(name == 'two')}_0000.nii.gz"
        for scans in ("two", name):
            (folder / scans).mkdir(exist_ok=True)
            shutil.copy(source, folder / scans / f"{name}_0000.nii.gz")
    return folder


TINY = ["--recipe", "smoke", "--backbone", "unet", "--network", "filters=(4,8,8)", "--device", "cpu", "--unchecked",
        "--recipe-set", "patch=16,16,16", "steps=2", "checkpoint_every=1", "validate_every=2"]  # fmt: skip


def predict_line(given, scans: str, out, *more) -> list:
    return ["predict", "-i", given / scans, "-m", given / "model", "-o", out, "--device", "cpu", *more]


LINES = {
    "predict one": lambda given, out: predict_line(given, "one", out),
    "predict file": lambda given, out: predict_line(given, "one/one_0000.nii.gz", out / "map.nii.gz", "--save-probabilities"),
    "predict two": lambda given, out: predict_line(given, "two", out, "--save-probabilities"),
    "prepare": lambda given, out: ["prepare", given / "raw" / CHEST.folder, out],
    "convert": lambda given, out: ["convert", "--dataset", "raw", given / "raw" / CHEST.folder, out],
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("command", LINES)
def test_killed_at_any_commit_the_same_command_goes_on_to_the_same(given, tmp_path, command, after):
    root = tmp_path / "root"
    line, log = LINES[command](given, root / "out"), tmp_path / "log"

    def fresh():
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (root / "thesis.txt").write_text("years")

    fresh()
    assert ended(start(line, log, root)) == 0, log.read_text()
    wanted = tree(root)
    for number in itertools.count(1):
        fresh()
        code = ended(start(line, log, root, Nth(number, after)))
        if code == 0:
            break
        assert code == 9, log.read_text()
        assert ended(start(line, log, root)) == 0, (number, log.read_text())
        assert tree(root) == wanted, number
    assert number > 3 and tree(root) == wanted


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_map_that_is_labelled_again_is_there_at_any_moment(given, tmp_path, after):
    "The older good map, or the new one; whatever dies between"
    root, log = tmp_path / "root", tmp_path / "log"
    out, old = root / "out", given / "older"
    line = predict_line(given, "two", out, "--save-probabilities", "--overwrite")
    if not old.exists():
        assert ended(start(predict_line(given, "two", old, "--fast", "--save-probabilities"), log, old)) == 0, log.read_text()
    assert ended(start(line, log, root)) == 0, log.read_text()
    wanted = tree(root)
    for number in itertools.count(1):
        shutil.rmtree(root)
        shutil.copytree(old, out)
        code = ended(start(line, log, root, Nth(number, after)))
        for name in ("one", "two"):
            assert nibabel.load(out / f"{name}.nii.gz").get_fdata().shape == (20, 20, 20)
        if code == 0:
            break
        assert code == 9 and ended(start(line, log, root)) == 0, log.read_text()
        assert tree(root) == wanted, number
    assert number > 6


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_finetune_killed_at_one_commit_after_the_other_ends_as_if_never_killed(given, tmp_path, after):
    "Each start is killed at the first name that none before it has given; data, training, labels and scores are the same"
    root, log = tmp_path / "root", tmp_path / "log"
    line = ["finetune", "-d", given / "raw" / CHEST.folder, "-o", root / "out", *TINY]
    without = ("out/run",)  # Its seconds, and what only keeps a record
    assert ended(start(line, log, root)) == 0, log.read_text()
    wanted = tree(root, without)
    shutil.rmtree(root)
    kills = New(tmp_path / "kills", after)
    while (code := ended(start(line, log, root, kills))) == 9:
        assert len(kills.list.read_text().splitlines()) < 100
    assert code == 0, log.read_text()
    names = {name.rstrip("!") for name in kills.list.read_text().splitlines()}
    assert {"out/plan.json", "out/prepared/manifest.csv", "out/run/last.pt", "out/model", "out/predictions/held.nii.gz",
            "out/scores.csv", "out/model/card.json"} <= names  # fmt: skip
    assert tree(root, without) == wanted
    assert not [path for path in (root / "out/run").rglob("*") if path.name.startswith(LEFTOVER_PREFIXES)]


def test_a_prepared_folder_is_never_half_old_and_half_new(given, tmp_path):
    "While its descriptions change, no manifest says that all is there; folds of an older data set do not stay"
    root, log, out = tmp_path / "root", tmp_path / "log", tmp_path / "root/out"
    line = LINES["prepare"](given, out)
    assert ended(start(line, log, root)) == 0, log.read_text()
    (out / "folds.json").write_text("[{}, {}]")
    new = [*line, "--spacing", "2", "2", "2"]
    for number in itertools.count(1):
        code = ended(start(new, log, root, Nth(number, after=True)))
        whole = (out / "manifest.csv").is_file()
        if whole:
            prepared = Prepared(out)
            assert set(prepared.manifest.spacing) == {"x".join(f"{size:g}" for size in prepared.spacing)}
        if code == 0:
            break
        assert code == 9
    assert prepared.spacing == (2, 2, 2) and not (out / "folds.json").exists()


# ---- two at once -----------------------------------------------------------------------------------------------------------


def train_line(given, out) -> list:
    prepared = given / "prepared"
    if not prepared.exists():
        assert ended(start(LINES["prepare"](given, prepared), given / "log", given)) == 0
    return ["train", prepared, out, *TINY]


AT_ONCE = {name: LINES[name] for name in ("predict file", "predict two", "prepare", "convert")} | {
    "finetune": lambda given, out: ["finetune", "-d", given / "raw" / CHEST.folder, "-o", out, *TINY],
    "train": train_line,
}


@pytest.mark.parametrize("command", AT_ONCE)
def test_the_second_of_two_at_once_is_told_in_one_line_and_the_first_is_undisturbed(given, tmp_path, command):
    root, without = tmp_path / "root", ("out/run", "out.run")  # Which hold seconds
    root.mkdir()
    line, log, go, here = AT_ONCE[command](given, root / "out"), tmp_path / "log", tmp_path / "go", tmp_path / "here"
    assert ended(start(line, log, root)) == 0, log.read_text()
    wanted = tree(root, without)
    shutil.rmtree(root)
    root.mkdir()
    first = start(line, log, root, Meet(here, go))
    while not here.exists():
        assert first.is_alive(), log.read_text()
        time.sleep(0.02)
    try:
        before = tree(root)
        second = ended(start(line, tmp_path / "second", root))
        assert tree(root) == before
    finally:
        go.touch()
    told = tmp_path.joinpath("second").read_text().splitlines()
    assert second == 1 and f"is being written by process {first.pid} on " in told[-1] and told[-1].startswith("mednextv2: "), told
    assert ended(first) == 0, log.read_text()
    assert tree(root, without) == wanted
    assert not [path for path in root.rglob("*") if path.name.startswith(LEFTOVER_PREFIXES)]


# ---- what is refused before it costs anything, and what only keeps a record ------------------------------------------------


@pytest.mark.parametrize("scans, target", [("two", "link"), ("one/one_0000.nii.gz", "link.nii.gz")])
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_predict_refuses_a_link_before_it_loads_anything(given, tmp_path, monkeypatch, scans, target, more):
    kept = tmp_path / "kept"
    kept.mkdir() if target == "link" else kept.write_text("kept")
    (tmp_path / target).symlink_to(kept)
    monkeypatch.setattr("mednext_v2.inference.files.load_ensemble", None)
    with pytest.raises(SystemExit, match=f"mednextv2: .*{target} is a link"):
        cli.main([str(word) for word in predict_line(given, scans, tmp_path / target, *more)])
    assert (tmp_path / target).is_symlink() and (kept.read_text() == "kept" if kept.is_file() else not list(kept.iterdir()))


class Broken(GeneralTracker):
    "A tracker whose server is away, at first or later"

    name, requires_logging_directory, tracker = "broken", False, None

    def __init__(self, when: str):
        super().__init__(_blank=True)
        self.when = when

    def fails(self, *_, **__):
        raise ConnectionError("the server is away")

    def store_init_configuration(self, values):
        self.when == "start" and self.fails()

    def log(self, values, step=None, **_):
        self.when == "later" and self.fails()

    finish = fails


@pytest.mark.parametrize("when", ["start", "later"])
def test_a_tracker_that_fails_is_told_and_ends_nothing(tmp_path, when):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        _, history = toy_run(tmp_path, toy_recipe(steps=4), trackers=(Broken(when),), log_every=1)
    assert history.step.tolist() == [1, 2, 3, 4]
    texts = [str(one.message) for one in told if "the server is away" in str(one.message)]
    assert texts.count("trackers: left out, ConnectionError: the server is away") == 1


@pytest.mark.parametrize("path", ["", "/nowhere"])
def test_without_git_a_run_says_that_the_commit_is_not_available(tmp_path, monkeypatch, path):
    monkeypatch.setenv("PATH", path)
    toy_run(tmp_path, toy_recipe(steps=1, warmup=0))
    assert json.loads((tmp_path / "run.json").read_text())["commit"] == "not available"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), ValueError("rank0.json is no JSON")])
def test_a_heartbeat_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setenv(launch.WATCH_VARIABLE, str(tmp_path))
    (tmp_path / "rank0.json").write_text("{}")
    os.utime(tmp_path / "rank0.json", (0, 0))
    monkeypatch.setattr(launch, "write_json" if isinstance(error, OSError) else "read_json", fails)
    launch.heartbeat(3)
    assert (tmp_path / "rank0.json").read_text() == "{}"


def test_a_process_table_that_cannot_be_read_ends_nothing(monkeypatch):
    def denied(*_):
        raise psutil.AccessDenied(1)

    class Child:
        def wait(self, seconds):
            return 0

    monkeypatch.setattr(launch.psutil, "Process", denied)
    monkeypatch.setattr(launch.psutil, "virtual_memory", denied)
    assert not launch.is_lost({"pid": 1})
    launch.kill_run(Child(), {0: {"pid": 1, "time": 0}})
    assert "Use fewer workers" in launch.memory_note(0)


# ---- which run it is -------------------------------------------------------------------------------------------------------

FIRST = dict(steps=2, warmup=0)
OTHER = {  # What another run would be: the field that says so, and arguments of `fit`
    "recipe": ("recipe.lr", lambda: dict(recipe=toy_recipe(**FIRST, lr=2e-2))),
    "model": ("initial weights", lambda: dict(model=toy_model(1))),
    "sampler": ("data", lambda: dict(sampler=training_sampler(toy_recipe(**FIRST), toy_cases(2)))),
    "seed": ("seed", lambda: dict(seed=1)),
    "compiled": ("compiled", lambda: dict(compiled="default")),
    "channels_last": ("channels_last", lambda: dict(channels_last=True)),
    "augment_on_device": ("augment_on_device", lambda: dict(augment_on_device=True)),
}
SAME = {  # What may differ: where it runs, how it is kept and shown
    "folder": {}, "device": {}, "parallel": {}, "processes": {}, "threads": {}, "resume": {"resume": "force"}, "validate": {"validate": lambda network: 0.5},
    "workers": {"workers": 1}, "progress": {"progress": True}, "title": {"title": "again"}, "log_every": {"log_every": 1},
    "trackers": {"trackers": (Broken("later"),)}, "pictures": {"pictures": 1}, "on_step": {"on_step": lambda step: None},
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    "A run that has ended, and what it was given"
    folder, recipe = tmp_path_factory.mktemp("begun") / "run", toy_recipe(**FIRST)
    given = dict(recipe=recipe, model=toy_model(), sampler=training_sampler(recipe, toy_cases()), device="cpu", progress=False)
    fit(folder=folder, **given)
    return folder, given


def again(begun, **changes):
    return fit(**{"folder": begun[0], **begun[1], "model": toy_model(), **changes})


def test_every_argument_of_a_training_makes_another_run_or_is_listed_as_free():
    fields = {field.name for kind in (Resources, Display) for field in dataclasses.fields(kind)}
    known = set(inspect.signature(trainer.fit).parameters) - {"resources", "display"} | fields
    assert known == {*OTHER, *SAME} and not {*OTHER} & {*SAME}


@pytest.mark.parametrize("name", OTHER)
def test_another_run_is_refused_by_the_name_of_what_differs(begun, name):
    field, changes = OTHER[name]
    with pytest.raises(ValueError, match=rf"holds another run \({field} was"):
        again(begun, **changes())


@pytest.mark.filterwarnings("ignore:tracker", "ignore:pictures")
@pytest.mark.parametrize("name", [name for name in SAME if SAME[name]])
def test_what_is_free_goes_on_with_the_same_run(begun, name):
    assert again(begun, **SAME[name]).step.tolist() == [2]


def test_every_field_of_a_recipe_makes_another_run_or_is_free():
    recipe = toy_recipe()
    model, sampler = toy_model(), training_sampler(recipe, toy_cases())
    who = identity(recipe, model, sampler, 0)
    free = set()
    for field in dataclasses.fields(recipe):
        other = copy.copy(recipe)
        object.__setattr__(other, field.name, "another")
        differing = {name for name, value in identity(other, model, sampler, 0).items() if who[name] != value}
        assert differing <= {f"recipe.{field.name}"}
        free |= set() if differing else {field.name}
    assert free == {"checkpoint_every"}


def test_a_resumed_run_with_other_workers_and_checkpoints_gives_the_same_bits(tmp_path):
    def stop(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    wanted, _ = toy_run(tmp_path / "whole", toy_recipe(steps=8))
    with pytest.raises(KeyboardInterrupt):
        toy_run(tmp_path / "cut", toy_recipe(steps=8, checkpoint_every=3), on_step=stop)
    steps = []
    found, _ = toy_run(tmp_path / "cut", toy_recipe(steps=8, checkpoint_every=5), workers=2, log_every=1, on_step=steps.append)
    assert steps == [4, 5, 6, 7, 8]
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in wanted.state_dict().items())
