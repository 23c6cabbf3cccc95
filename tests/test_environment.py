"The environment as files: a lock with hashes, and the Dockerfile and dev container that are made from it"

import configparser
import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCKS = ("build", "all", "torch-cpu", "torch-nvidia")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
MARKERS = {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.11"}


def read_lock(name: str) -> dict[str, str]:  # Version by package
    "The versions of a lock; an entry without a hash, or a line that is none, fails"
    text = (ROOT / f"environment/{name}.txt").read_text(encoding="utf-8")
    entry = r"([a-z0-9][a-z0-9-]*)==(\S+)(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n"
    found = dict(re.findall(entry, text))
    assert re.sub(entry, "", re.sub(r"^#.*\n", "", text, flags=re.M)) == "", f"environment/{name}.txt holds lines that are no locked package"
    return found


def asked_for() -> list[Requirement]:
    "Requirements of `make setup` but those of benchmarks/peers.txt"
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    command = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = {extra for extras in re.findall(r"-e '\.\[([\w,]+)\]'", command) for extra in extras.split(",")}
    words = [settings["DEFAULT"][key] for key in ("requirements", *(f"{extra}_requirements" for extra in extras))]
    return [Requirement(word) for word in " ".join(words).split()]


def pins(file: str) -> dict[str, str]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, flags=re.M)}


@pytest.mark.parametrize("torch", ["torch-cpu", "torch-nvidia"])
def test_the_lock_has_all_that_is_asked_for_in_the_pinned_versions(torch):
    locked = {**read_lock("build"), **read_lock("all"), **read_lock(torch)}
    for requirement in asked_for():
        if requirement.marker is None or requirement.marker.evaluate(MARKERS):
            version = locked.get(canonicalize_name(requirement.name))
            assert version and requirement.specifier.contains(version, prereleases=True), f"{requirement} is not met: run python environment/lock.py"
    for name, version in {**pins("constraints.txt"), **pins("benchmarks/peers.txt")}.items():
        found = locked.get(name, version)  # A constraint may name a package that nothing asks for here
        assert found.removesuffix("+cpu") == version, f"{name} is {found} in the lock and {version} in constraints.txt: run python environment/lock.py"
    assert set(pins("benchmarks/peers.txt")) <= set(locked)


def test_no_package_is_locked_without_being_pinned_where_it_could_change():
    """A new lock gives the same versions, but for NVIDIA's libraries, which PyTorch names itself."""
    assert set(read_lock("all")) <= {*pins("constraints.txt"), *pins("benchmarks/peers.txt")}


def test_locks_do_not_overlap_and_name_no_index():
    names = [set(read_lock(name)) for name in ("build", "all", "torch-nvidia")]
    assert sum(map(len, names)) == len(set.union(*names))
    assert not {"torch", "triton"} & set(read_lock("all")) and not any(name.startswith("nvidia-cu") for name in read_lock("all"))
    text = "".join((ROOT / f"environment/{name}.txt").read_text(encoding="utf-8") for name in LOCKS) + DOCKERFILE
    assert "://" not in text and "--index-url" not in text and "--find-links" not in text.replace("(pip --find-links)", "")


def test_the_dockerfile_installs_from_the_lock_alone_and_runs_the_pipeline_without_root():
    instructions = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", "")
    installs = [part.strip() for part in re.split(r"&&|RUN|\n", instructions) if "pip install" in part]
    assert len(installs) == 4 and all("--no-deps" in part for part in installs)
    assert all("--require-hashes" in part for part in installs if "--editable" not in part)
    files = {name.strip('"').replace("$TORCH", "cpu") for part in installs for name in re.findall(r"-r (\S+)", part)}
    assert files == {f"environment/{name}.txt" for name in ("build", "all", "torch-cpu")}
    assert instructions.startswith("FROM python:3.11-slim\n") and instructions.rstrip().endswith('CMD ["make", "repro"]')
    assert instructions.index("USER 1000") < instructions.index("pip install") and "USER root" not in instructions


@pytest.mark.skipif(not (shutil.which("hadolint") or (Path(sys.executable).parent / "hadolint").exists()), reason="hadolint comes with `make setup` on Linux")
def test_hadolint_finds_nothing():
    program = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dev_container_is_built_from_the_dockerfile():
    found = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    file, context = (ROOT / ".devcontainer" / found["build"][key] for key in ("dockerfile", "context"))
    assert file.resolve() == ROOT / "Dockerfile" and context.resolve() == ROOT
    user, venv = re.search(r"--uid 1000 (\w+)", DOCKERFILE)[1], re.search(r"^ENV VENV=(\S+)", DOCKERFILE, flags=re.M)[1]
    assert found["remoteUser"] == user and found["workspaceFolder"] == re.search(r"^WORKDIR (\S+)", DOCKERFILE, flags=re.M)[1]
    assert found["workspaceFolder"] in found["workspaceMount"]
    assert found["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"] == f"{venv}/bin/python"
    assert not venv.startswith(found["workspaceFolder"]), "the clone that is mounted there would hide it"


def test_the_image_holds_every_tracked_file():
    """A tracked file that .dockerignore leaves out would make the tree in the image differ from its commit."""
    patterns = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    left_out = [name for name in tracked for pattern in patterns if fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name, f"{pattern}/*")]
    assert left_out == [] and ".git" not in patterns
