"""The seams between notebooks, `dvc.yaml`, `params.yaml`, `conf/` and the exported library."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from mednext_v2.core import build, code_digest, params, read_yaml
from mednext_v2.public import stub
from mednext_v2.rooms import ROOMS, chapters, floor_plan, import_graph, imported_modules, reachable_modules, room_of
from mednext_v2.stages import compose_params, notebook_parameters, profiles, readme
from mednext_v2.study.plan import StudyPlan
from mednext_v2.training.checkpoint import STEP_MODULES, TRAINING_ROOMS

ROOT = Path(__file__).parents[1]
THIN = sorted([*(ROOT / "nbs/pipeline").glob("*.ipynb"), *(ROOT / "nbs/paper").glob("*.ipynb")])
CHAPTERS = sorted({*(ROOT / "nbs").glob("[0-9]*.ipynb"), *(ROOT / "nbs").glob("*/[0-9]*.ipynb")} - set(THIN))
STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]
NAME = {"ids": lambda path: path.stem}


def cells(path: Path, kind: str = "code") -> list[str]:
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def exports(path: Path) -> str | None:
    match = re.search(r"#\| default_exp ([\w.]+)", "\n".join(cells(path)))
    return match and match[1]


@pytest.mark.parametrize("path", [*CHAPTERS, *THIN], **NAME)
def test_notebook_opens_with_title_subtitle_and_kernel(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert re.match(r"# .+\n+> .+", "".join(notebook["cells"][0]["source"]))
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert all(re.fullmatch(r"[a-z][a-z0-9-]+", name) for name in ids), f"cell ids are words: {ids}"


@pytest.mark.parametrize("path", THIN, **NAME)
def test_stage_notebook_is_thin(path):
    assert notebook_parameters(path) >= {"profile"}
    assert exports(path) is None
    assert not re.search(r"^\s*(def|class) ", "\n".join(cells(path)), re.M), "functions belong in a chapter"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"]), "outputs change what DVC sees"


@pytest.mark.parametrize("path", [*CHAPTERS, ROOT / "nbs/index.ipynb"], **NAME)
def test_chapter_is_small_enough_for_git(path):
    assert path.stat().st_size < 400_000
    assert str(Path.home()) not in path.read_text(encoding="utf-8")


def test_library_and_readme_are_in_step_with_the_notebooks(tmp_path):
    for name in ("nbs", "settings.ini", "setup.py", "pyproject.toml"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    (tmp_path / "mednext_v2").mkdir()
    shutil.copy(ROOT / "mednext_v2/__init__.py", tmp_path / "mednext_v2")
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    code = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment)
    fresh, kept = ({str(path.relative_to(place)): path.read_text() for path in (place / "mednext_v2").rglob("*.py")} for place in (tmp_path, ROOT))
    differing = sorted(name for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))
    assert not differing, f"{', '.join(differing)}: run `make export`, and edit notebooks only"
    assert (ROOT / "README.md").read_text(encoding="utf-8").strip() == readme().strip(), "run `make readme`"


@pytest.mark.parametrize("module", import_graph())
def test_imports_go_downwards(module):
    floors, order = list(ROOMS), [exports(path) for path in CHAPTERS]
    for other in import_graph()[module]:
        assert floors.index(room_of(other)) <= floors.index(room_of(module)), f"{module} imports {other} from a floor above"
        if room_of(other) == room_of(module) and other.count(".") > 1:
            before, after = (order.index(name.removeprefix("mednext_v2.")) for name in (other, module))
            assert before < after, f"{module} imports {other}, which is a later chapter"


def test_names_for_editors_are_those_of_the_package():
    assert (ROOT / "mednext_v2/__init__.pyi").read_text(encoding="utf-8") == stub(), "run `make export`"


def test_public_names_stay_few():
    """A name is public because a user types it or another room calls it."""
    found = {name: sum(not word.startswith("_") for word in getattr(import_module(name), "__all__", ())) for name in import_graph()}
    assert sum(found.values()) <= 200, f"more public names than agreed: {found}"


def test_the_plan_in_the_readme_is_the_one_of_the_code():
    assert floor_plan().replace("](", "](nbs/") in (ROOT / "README.md").read_text(encoding="utf-8")
    assert {room_of(module) for module in import_graph()} == set(ROOMS) and all(chapters().values())


def test_the_linter_finds_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "mednext_v2", "tests", "benchmarks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nfix what it finds in mednext_v2/ in the notebook"


def test_notebooks_and_tests_are_formatted():
    command = [sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "nbs", "tests", "benchmarks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\n`make export` formats them"


@pytest.mark.parametrize("path", ["Makefile", "conf/config.yaml"])
def test_where_profiles_are_listed_none_is_missing(path):
    listed = re.search(r"PROFILE=(?=\w+[ |(])(.+?)(?:  |\n)", (ROOT / path).read_text(encoding="utf-8"))[1]
    assert set(re.findall(r"\w+", listed.replace("(default)", ""))) == set(profiles())


def test_package_version_comes_from_settings():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    import mednext_v2

    assert mednext_v2.__version__ == settings["DEFAULT"]["version"]
    assert f"version: {mednext_v2.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_params_are_the_composed_mini_profile(tmp_path):
    assert read_yaml(compose_params("mini", tmp_path / "params.yaml")) == read_yaml(ROOT / "params.yaml"), "run `make params`"


@pytest.mark.parametrize("profile", profiles())
def test_every_profile_builds_its_dataclasses(profile, tmp_path):
    import torch

    from mednext_v2.models.registry import create
    from mednext_v2.training.recipe import Recipe

    path = compose_params(profile, tmp_path / "params.yaml")
    values = read_yaml(path)
    plan = build(StudyPlan, {"profile": profile, "seeds": values["seeds"], **values["axes"]})
    for recipe in values["recipes"].values():
        built = build(Recipe, recipe)
        kinds = {field.name: field.type for field in fields(Recipe)}
        for name, kind in kinds.items():
            if kind in (int, float, str, "int", "float", "str"):
                expected = {"int": int, "float": (int, float), "str": str}[getattr(kind, "__name__", kind)]
                assert isinstance(getattr(built, name), expected), f"{name} reads as {getattr(built, name)!r}"
    for backbone in plan.backbones:
        with torch.device("meta"):
            model = create(backbone, 1, 3, deep_supervision=True, **values["backbones"][backbone])
        for recipe in values["recipes"].values():
            assert all(side % model.stride == 0 for side in recipe["patch"]), (backbone, recipe["patch"])


@pytest.mark.parametrize("name", STAGES)
def test_stage_sends_parameters_that_its_notebook_has(name):
    cmd = STAGES[name]["cmd"]
    paths = [word for word in cmd.split() if word.endswith(".ipynb")]
    for path in paths:
        items = params("papers") if "${item.item}" in path else [""]
        for item in items:
            sent = set(re.findall(r"(\w+)=", cmd))
            assert sent <= notebook_parameters(ROOT / path.replace("${item.item}", item))


def notebooks_of(stage: dict) -> list[Path]:
    path = next(word for word in stage["cmd"].split() if word.endswith(".ipynb"))
    return [ROOT / path.replace("${item.item}", item) for item in (params("papers") if "${item.item}" in path else [""])]


@pytest.mark.parametrize("name", STAGES)
def test_stage_depends_on_every_module_its_notebook_uses(name):
    """Follows the imports of the notebook and those of the modules, and compares with the rooms in `deps`."""
    declared = {str(dep) for dep in STAGES[name]["deps"] if str(dep).startswith("mednext_v2/")}
    used = set()
    for path in notebooks_of(STAGES[name]):
        used |= imported_modules("\n".join(line for line in "\n".join(cells(path)).splitlines() if not line.startswith("%")))
    needed = {f"mednext_v2/{room_of(module)}" + (".py" if (ROOT / f"mednext_v2/{room_of(module)}.py").exists() else "") for module in reachable_modules(used)}
    assert needed <= declared, f"{name} does not declare {sorted(needed - declared)}"
    assert declared <= needed | {"mednext_v2/core.py"}, f"{name} declares more than it uses: {sorted(declared - needed)}"
    assert all((ROOT / dep).exists() for dep in declared)


@pytest.mark.parametrize("room", ["intake", "zoo", "report", "cli.py", "inference", "evaluation", "scoring"])
@pytest.mark.parametrize("name", ["suite", "prepare", "pretrain", "scratch", "finetune"])
def test_what_only_reads_or_shows_models_retrains_nothing(name, room):
    assert f"mednext_v2/{room}" not in STAGES[name]["deps"]


def test_what_decides_a_step_is_hashed_and_there():
    rooms = {name.split("/")[0] for name in STEP_MODULES}
    assert rooms == set(TRAINING_ROOMS)
    assert len({code_digest([name]) for name in (*STEP_MODULES, *TRAINING_ROOMS)}) == len(STEP_MODULES) + len(TRAINING_ROOMS)
    with pytest.raises(FileNotFoundError):
        code_digest(["training/absent"])


def test_training_stages_declare_what_the_key_of_a_run_hashes():
    for name in ("pretrain", "scratch", "finetune"):
        declared = [str(dep) for dep in STAGES[name]["deps"] if str(dep).startswith("mednext_v2/")]
        assert {f"mednext_v2/{room}" for room in TRAINING_ROOMS} <= set(declared)
        assert len(declared) <= 6


LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)[^)]*\)")


@pytest.mark.parametrize("path", [*CHAPTERS, *THIN, ROOT / "nbs/index.ipynb", *sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("benchmarks/*.md"))], **NAME)
def test_links_lead_somewhere(path):
    text = "\n".join(cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    for link in LINK.findall(re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)):
        target = path.parent / link
        assert target.exists() or target.with_suffix(".ipynb").exists(), link


def test_tracked_text_names_no_machine():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # A warning in an output names the environment that it came from, which may lie outside of this checkout
    installed = "/".join(("site-packages", ""))
    forbidden = [str(ROOT), str(Path.home()) + "/", sys.prefix, installed]
    for name in listed:
        path = ROOT / name
        if path.suffix in {".gz", ".png"} or not path.exists():
            continue
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text and len(word) > 4], name
