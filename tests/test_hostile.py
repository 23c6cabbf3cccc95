"""Files that other people write: bombs, names that a shell or a spreadsheet would run, places that hold no file."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mednext_v2 import cli, pipeline
from mednext_v2.core import parse_json, read_json, read_yaml, root

LAUGHS = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl")
)
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
    refused(lambda: pipeline.check_names(composed(field, value)), field, repr(name))


def test_what_dvc_puts_into_commands_is_checked_where_it_is_composed():
    text = (root() / "dvc.yaml").read_text()
    sources = set(re.findall(r"^      \w+: (?:\[\")?\$\{([\w.]+)\}", text, re.M))
    known = {"profile", "papers", *(f"axes.{name}" for name in read_yaml(root() / "params.yaml")["axes"])}
    assert sources and sources <= known
    for command in re.findall(r"cmd: (?:>-\n)?(.*?)\n    \w", text, re.S):
        assert set(re.findall(r"\$\{(.*?)\}", command)) - {"run"} <= {f"item.{n}" for n in
                re.findall(r"^      (\w+): ", text, re.M)}
    pipeline.check_names(read_yaml(root() / "params.yaml"))


def test_profile_with_a_hostile_name_is_not_composed(tmp_path, monkeypatch):
    import shutil

    shutil.copytree(root() / "conf", tmp_path / "conf")
    (tmp_path / "dvc.yaml").write_text("")
    smoke = tmp_path / "conf/profile/smoke.yaml"
    smoke.write_text(smoke.read_text().replace("corpora: [", 'corpora: ["x; touch owned", ', 1))
    monkeypatch.chdir(tmp_path)
    refused(lambda: cli.main(["params", "smoke"]), "axes.corpora", "x; touch owned")
    assert not (tmp_path / "params.yaml").exists()
    smoke.write_text(LAUGHS)
    refused(lambda: cli.main(["params", "smoke"]), "smoke.yaml", "expands")
