"""Files that other people write: bombs, names that a shell or a spreadsheet would run, places that hold no file."""

import copy
import json
import os
import re
import shutil
import time

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mednext_v2 import cli, stages
from mednext_v2.core import MAX_DEPTH, read_csv, read_json, read_yaml, root, write_csv
from mednext_v2.models.card import MAX_CARD_BYTES, Card, read_card, save_model
from mednext_v2.models.registry import create, load_model
from model_toys import UNET_CARD

LAUGHS = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl"))
YAML_BOMBS = {
    "list in itself": "a: &a [*a]",
    "mapping in itself": "a: &a {b: *a}",
    "billion laughs": LAUGHS,
    "merged laughs": re.sub(r"\[(\*.*)\]", r"{<<: [\1]}", LAUGHS.replace("[1, 2, 3, 4, 5, 6, 7, 8, 9]", "{x: 1}")),
    "deep": "a: " + "[" * 10_000 + "]" * 10_000,
    "deep, not closed": "{a: " * 10_000,
    "long number": "a: " + "9" * 5000,
    "code": "a: !!python/object/apply:os.system [id]",
    "no text": "\x00\x01",
    "list": "[1, 2]",
    "empty": "",
    "twice": "a: 1\na: 2",
    "two documents": "a: 1\n---\nb: 2",
}
JSON_BOMBS = {
    "deep": '{"a": ' + "[" * 10_000 + "]" * 10_000 + "}",
    "deep, and parsed": '{"a": ' + "[" * 500 + "]" * 500 + "}",
    "not closed": "[" * 100_000,
    "long number": '{"a": ' + "9" * 5000 + "}",
    "twice": '{"a": 1, "a": 2}',
    "list": "[1]",
    "empty": "",
    "cut": '{"a": [1, 2',
}


def refused(call, *named: str) -> str:
    "The one line of an error that comes at once and names what it has to"
    start = time.perf_counter()
    with pytest.raises((ValueError, FileNotFoundError, SystemExit)) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and all(name in line for name in named), line
    assert time.perf_counter() - start < 5
    return line


@pytest.mark.parametrize("text", YAML_BOMBS.values(), ids=YAML_BOMBS)
def test_yaml_that_is_none_is_one_line(tmp_path, text):
    path = tmp_path / "datasets.yaml"
    path.write_text(text)
    refused(lambda: read_yaml(path), str(path))


@pytest.mark.parametrize("text", JSON_BOMBS.values(), ids=JSON_BOMBS)
def test_json_that_is_none_is_one_line(tmp_path, text):
    path = tmp_path / "card.json"
    path.write_text(text)
    refused(lambda: read_json(path), str(path))


@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_size_is_looked_at_before_the_text(tmp_path, read):
    with open(path := tmp_path / "large", "wb") as file:
        file.truncate(2**30)
    refused(lambda: read(path), str(path), str(2**30))
    path.write_bytes(b"\xff\xfe")
    refused(lambda: read(path), str(path), "UTF-8")
    for place in ("/dev/zero", tmp_path, tmp_path / "absent"):
        refused(lambda: read(place), str(place))


def test_aliases_of_ordinary_files_are_read(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("base: &base {lr: 1e-3, patch: [32, 32]}\nlong: {<<: *base, steps: 10}\nsame: *base\n")
    base = {"lr": 0.001, "patch": (32, 32)}
    assert read_yaml(path) == {"base": base, "long": {"steps": 10, **base}, "same": base}
    path.write_bytes(b"\xef\xbb\xbf{}")  # As an editor on Windows begins a file
    assert read_json(path) == {}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab:{}[]&*<!?|>-,#%@'\"\n \t019.eE~\u2028", max_size=60))
def test_any_text_is_a_mapping_or_one_line(tmp_path, text):
    path = tmp_path / "any.yaml"
    path.write_text(text)
    for read in (read_yaml, read_json):
        try:
            assert isinstance(read(path), dict)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("text", YAML_BOMBS.values(), ids=YAML_BOMBS)
@pytest.mark.parametrize("command", [["datasets"], ["zoo", "list"]], ids="-".join)
def test_commands_refuse_a_registry_that_is_a_bomb(tmp_path, command, text):
    path = tmp_path / "registry.yaml"
    path.write_text(text)
    option = "--zoo" if command[0] == "zoo" else "--registry"
    refused(lambda: cli.main([*command, option, str(path)]), "registry.yaml")


def test_every_json_file_is_read_by_one_function():
    for path in (root() / "mednext_v2").glob("*.py"):
        calls = re.findall(r"json\.loads?\((?!json\.dumps)(?!file\.read\(promised)", path.read_text())
        assert len(calls) == (path.name == "core.py"), path.name


# ---- names that a shell reads -------------------------------------------------------------------------------------------


def composed(field: str, value) -> dict:
    values = dict(read_yaml(root() / "params.yaml"))
    if field in ("profile", "papers"):
        return {**values, field: value}
    return {**values, "axes": {**values["axes"], field: value}}


@pytest.mark.parametrize("name", ["a; rm -rf x", "$(id)", "`id`", "a b", "a|b", "a>b", "-rf", "../up", "a'b", "", "a\nb", "*"])
@pytest.mark.parametrize("field", ["profile", "papers", "corpora", "backbones", "inits", "released", "ablations"])
def test_names_for_a_shell_are_names(field, name):
    value = name if field == "profile" else ("scratch", name)
    refused(lambda: stages.check_names(composed(field, value)), field, repr(name))


def test_what_dvc_puts_into_commands_is_checked_where_it_is_composed():
    text = (root() / "dvc.yaml").read_text()
    sources = set(re.findall(r"^      \w+: (?:\[\")?\$\{([\w.]+)\}", text, re.M))
    known = {"profile", "papers", "shipped", *(f"axes.{name}" for name in read_yaml(root() / "params.yaml")["axes"])}
    assert sources and sources <= known
    for command in re.findall(r"cmd: (?:>-\n)?(.*?)\n    \w", text, re.S):
        assert set(re.findall(r"\$\{(.*?)\}", command)) - {"run"} <= {f"item.{n}" for n in re.findall(r"^      (\w+): ", text, re.M)}
    stages.check_names(read_yaml(root() / "params.yaml"))


def test_profile_with_a_hostile_name_is_not_composed(tmp_path, monkeypatch):
    shutil.copytree(root() / "conf", tmp_path / "conf")
    (tmp_path / "dvc.yaml").write_text("")
    smoke = tmp_path / "conf/profile/smoke.yaml"
    smoke.write_text(smoke.read_text().replace("corpora: [", 'corpora: ["x; touch owned", ', 1))
    monkeypatch.chdir(tmp_path)
    refused(lambda: stages.main(["params", "smoke"]), "axes.corpora", "x; touch owned")
    assert not (tmp_path / "params.yaml").exists()
    smoke.write_text(LAUGHS)
    refused(lambda: stages.main(["params", "smoke"]), "smoke.yaml", "expands")


# ---- cards --------------------------------------------------------------------------------------------------------------

CARD = UNET_CARD | {"modality": "CT", "normalisation": {"schemes": ["ct"], "mean": [50.0], "std": [60.0], "low": [-100.0], "high": [200.0], "nonzero": False}}
NAN, INFINITE, HUGE = float("nan"), float("inf"), 10**4000
MANY = {f"c{number}": number for number in range(1, 65_537)}


def heads(**changes):
    "Labels of two data sets that keep their own heads"
    head = dict(outputs=[0, 2], labels={"core": 1}, groups={"core": "organ"}, modality="CT", spacing=[2, 2, 2], normalisation=CARD["normalisation"])
    return {"one": head, "two": {**head, "outputs": [1, 3], **changes}}


BAD_FIELDS = [
    *(("spacing", value) for value in ([2, 2, INFINITE], [2, -2, 2], [2, 0, 2], [2, NAN, 2], [2, 2], [2] * 4, [], 2, "2", None,
                                       [2, 2, "2"], [2, 2, True], [2, 2, HUGE], [1e-300] * 3, {"x": 2})),
    *(("patch", value) for value in ([16, 16, 0], [16, 16, -16], [16, 16], [16, 16, 16.5], [10**9] * 3, [HUGE] * 3, "16", None, [True] * 3)),
    *(("labels", value) for value in (["core", "rim"], None, {}, "core", {"core": 1, "rim": 1}, {"core": 1, "rim": 3}, {"core": 0, "rim": 1},
                                      {"core": -1, "rim": 2}, {"core": True, "rim": 2}, {"core": 1.0, "rim": 2}, {"core": "1", "rim": "2"},
                                      {"core": [1], "rim": 2}, {"core": HUGE, "rim": 1}, MANY)),
    *(("groups", value) for value in ({"core": "organ"}, {"core": "organ", "rim": "tumour"}, {"core": "organ", "other": "organ"},
                                      {"core": 1, "rim": 2}, ["organ"], "organ", None)),
    *(("normalisation", value) for value in ({}, None, [], {"schemes": ["ct"]}, {**CARD["normalisation"], "schemes": ["percentile"]},
                                             {**CARD["normalisation"], "schemes": "ct"}, {**CARD["normalisation"], "schemes": ["ct", "ct"]},
                                             {**CARD["normalisation"], "schemes": [["ct"]]}, {**CARD["normalisation"], "schemes": [None]},
                                             {**CARD["normalisation"], "nonzero": 1}, {**CARD["normalisation"], "mean": []},
                                             {**CARD["normalisation"], "std": [NAN]}, {**CARD["normalisation"], "std": [-1]},
                                             {**CARD["normalisation"], "low": [300]}, {**CARD["normalisation"], "high": [INFINITE]},
                                             {**CARD["normalisation"], "mean": [HUGE]}, {**CARD["normalisation"], "mean": ["50"]},
                                             {**CARD["normalisation"], "mean": 50.0}, {**CARD["normalisation"], "mean": [True]})),
    *(("overrides", value) for value in (None, [], {"filters": [10**6] * 3}, {"filters": [4] * 100_000}, {"filters": [4] * 9000},
                                         {"filters": [HUGE]}, {"filters": [INFINITE, 8, 8]}, {"filters": [4, 8, -8]}, {"filters": None},
                                         {"filters": []}, {"filters": [4, 8, 16]}, {"filters": "488"}, {"depth": 3}, {"name": "unet"},
                                         {"in_channels": 3}, {"patch": [0, 0, 0]}, {})),
    *(("in_channels", value) for value in (0, -1, 10**9, HUGE, 1.0, "1", None, True)),
    *(("backbone", value) for value in ("nope", "", None, 1, "../unet", "mednext_v2_base", "resenc_l", "swin_unetr", "primus_l", "unet\n")),
    *(("regions", value) for value in ({"whole": [1, 5]}, {"whole": []}, {"whole": 1}, ["whole"], None, {"whole": ["1"]}, {"whole": [1, 2]})),
    *(("class_order", value) for value in ([1], [1, 2, 3], "12", None, [True])),
    *(("mirror_axes", value) for value in ([5], [-1], [0, 0], "012", [0.0], [True])),
    *(("orientation", value) for value in ("LPS", "", "XYZ", None, 3, "RASRAS")),
    *(("grn", value) for value in ("median", 1, True)),
    *(("heads", value) for value in ([], None, {"one": 1}, {"one": {}}, heads(outputs=[1, 9]), heads(outputs=[1]), heads(outputs="13"),
                                     heads(outputs=[1, HUGE]), heads(labels=None), heads(labels={"rim": 2}), heads(spacing=[2, 2, NAN]),
                                     heads(normalisation={}), heads(groups={"x": "organ"}), heads(modality=None))),
    *((name, value) for name in ("task", "modality", "licence", "provenance", "init", "version", "sha256") for value in (1, None, ["x"])),
    *((name, value) for name in ("recipe", "scores") for value in (None, [], "x")),
    ("seed", "0"), ("parent", 7), ("colour", "blue"),
]  # fmt: skip


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    "A model folder that predicts, and a scan for it"
    folder = tmp_path_factory.mktemp("cards")
    torch.manual_seed(0)
    save_model(folder / "model", create("unet", 1, 3, filters=(4, 8, 8)), Card(**CARD))
    voxels = np.random.default_rng(0).normal(0, 100, (20, 18, 16)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])), folder / "scan.nii.gz")
    return folder


def model_with(valid, folder, text: str):
    "The model, with another text for its card"
    shutil.copytree(valid / "model", folder / "model", dirs_exist_ok=True)
    (folder / "model/card.json").write_text(text)
    return folder / "model"


def card_with(valid, **changes) -> str:
    return json.dumps(json.loads((valid / "model/card.json").read_text()) | changes)


@pytest.mark.parametrize("field, value", BAD_FIELDS, ids=lambda value: re.sub(r"\s+", " ", repr(value))[:40])
def test_bad_field_of_a_card_is_one_line_at_once(valid, tmp_path, field, value):
    model = model_with(valid, tmp_path, card_with(valid, **{field: value}))
    line = refused(lambda: load_model(model), str(model), "card.json")
    assert field in line or field == "regions" and "class_order" in line
    assert len(line) < 2000


TEXTS = {
    "deep": '{"backbone": ' + "[" * 10_000 + "]" * 10_000 + "}",
    "too deep": '{"overrides": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}",
    "list": "[]",
    "empty": "",
    "null": "null",
    "cut": '{"backbone": "unet", "over',
    "twice": '{"backbone": "unet", "backbone": "resenc_l"}',
    "large": " " * (MAX_CARD_BYTES + 1),
    "number": '{"seed": ' + "1" * 5000 + "}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_card_that_is_no_card_is_one_line(valid, tmp_path, text):
    model = model_with(valid, tmp_path, text)
    for read in (read_card, load_model):
        refused(lambda: read(model), str(model / "card.json"))


COMMANDS = {
    "predict": ["predict", "-i", "{scan}", "-m", "{model}", "-o", "{out}", "--device", "cpu"],
    "info": ["info", "{model}"],
    "train": ["train", "{data}", "{out}", "--recipe", "smoke", "--from", "{model}"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("field, value", [("spacing", [2, 2, INFINITE]), ("labels", None), ("normalisation", {}), ("mirror_axes", [5])])
def test_commands_name_file_and_field(valid, tmp_path, command, field, value):
    model = model_with(valid, tmp_path, card_with(valid, **{field: value}))
    places = dict(scan=valid / "scan.nii.gz", model=model, out=tmp_path / "out", data=tmp_path)
    refused(lambda: cli.main([word.format(**places) for word in COMMANDS[command]]), str(model / "card.json"), field)
    assert not (tmp_path / "out").exists()


PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([HUGE, 10**9, NAN, INFINITE, 1e-300, 0.5]),
    st.text(max_size=5),
    st.lists(st.integers(-1, 20), max_size=4),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.sampled_from(["core", "rim", "x"]), st.one_of(st.integers(-1, 3), st.text(max_size=3)), max_size=3),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_card_loads_as_valid_or_is_refused_in_one_line(valid, tmp_path, data):
    values = json.loads((valid / "model/card.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        place = values
        while True:  # A field, or a value inside of it
            key = data.draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
            if not (isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans())):
                break
            place = place[key]
        if isinstance(place, dict) and data.draw(st.integers(0, 4)) == 0:
            place.pop(key)
        else:
            place[key] = data.draw(PLAIN)
    model = model_with(valid, tmp_path, json.dumps(values))
    start = time.perf_counter()
    try:
        network, card = load_model(model)
    except (ValueError, FileNotFoundError) as error:
        assert str(model) in str(error) and "\n" not in str(error)
    else:  # What is read is written and read again as the same card, and the network is the one of its weights
        again = copy.deepcopy(network)
        card = save_model(tmp_path / "again", again, card)
        assert read_card(tmp_path / "again") == card or any(map(np.isnan, filter(lambda v: isinstance(v, float), card.scores.values())))
        assert network(torch.zeros(1, card.in_channels, *(2 * step for step in network.strides))).shape[1] == card.num_classes
    assert time.perf_counter() - start < 5


# ---- tables -------------------------------------------------------------------------------------------------------------

NAMES = st.text(alphabet=st.sampled_from("=+-@'\t1.eE\"ab, "), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.lists(NAMES, min_size=1, max_size=5), header=NAMES.filter(lambda name: name != "dsc"))
def test_no_cell_is_a_formula_and_every_name_is_read_back(tmp_path, names, header):
    path, table = tmp_path / "scores.csv", pd.DataFrame({header: names, "dsc": [-0.5] * len(names)})
    write_csv(path, table)
    as_text = pd.read_csv(path, dtype=str, keep_default_na=False, header=None).to_numpy().ravel()
    for cell in as_text:
        assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r") or re.fullmatch(r"[-+]?[\d.eE+-]+", cell.strip()), cell
    again = read_csv(path, **{header: str})
    assert list(again.columns) == list(table.columns) and again[header].tolist() == names and again.dsc.tolist() == [-0.5] * len(names)


def test_numbers_stay_numbers_and_na_stays_a_name(tmp_path):
    table = pd.DataFrame({"label": ["NA", "None", "null", "nan"], "dsc": [-1.5, np.nan, -np.inf, 1], "n": [-1, 0, 1, 2]})
    write_csv(tmp_path / "a.csv", table)
    again = read_csv(tmp_path / "a.csv")
    pd.testing.assert_frame_equal(again, table, check_dtype=False)
    assert "'" not in (tmp_path / "a.csv").read_text()


# ---- places -------------------------------------------------------------------------------------------------------------

WRITERS = {
    "predict": ["predict", "-i", "{scan}", "-m", "{model}", "-o", "{place}"],
    "import": ["import", "{model}", "{place}"],
    "prepare": ["prepare", "{data}", "{place}"],
    "train": ["train", "{data}", "{place}"],
    "finetune": ["finetune", "-d", "{data}", "-o", "{place}"],
    "evaluate": ["evaluate", "{data}", "{data}", "-o", "{place}"],
    "doctor": ["doctor", "--data", "{data}", "--csv", "{place}"],
    "fix": ["doctor", "--data", "{data}", "--fix", "{place}"],
}


@pytest.mark.parametrize("place", ["/proc/x", "/sys/x/y", "/dev/x.nii.gz", "/dev/null", "/dev/null/x", "{file}/x", "{pipe}", "{link}"])
@pytest.mark.parametrize("command", WRITERS)
def test_place_that_holds_no_files_is_refused_before_the_work(valid, tmp_path, command, place):
    (tmp_path / "file").write_text("a file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/proc/self")
    place = place.format(**{name: tmp_path / name for name in ("file", "pipe", "link")})
    words = dict(scan=valid / "scan.nii.gz", model=valid / "model", data=tmp_path, place=place)
    refused(lambda: cli.main([word.format(**words) for word in WRITERS[command]]), place, "choose another")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "pipe"]
