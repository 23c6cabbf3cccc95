"""Write environment/*.txt: the packages of `make setup`, each with the hashes of its files

    pip install uv && python environment/lock.py [TORCH_CPU_WHEEL]

The wheel is the CPU build of PyTorch for Linux on x86-64, which PyPI does not have. Without it, the hash that torch-cpu.txt holds is kept.
"""

import hashlib
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHON, PLATFORM = "3.11.7", "x86_64-manylinux_2_28"
BUILD = "setuptools==81.0.0\n"  # The last release with pkg_resources, which some of the packages without a wheel need
EXTRAS = ("train", "convert", "dicom", "remote", "cluster", "pipeline", "docs", "dev")
HEADER = """# Written by environment/lock.py from settings.ini, constraints.txt and benchmarks/peers.txt. For Linux on x86-64, Python 3.11.
# {}
"""
ABOUT = {
    "build": "First: builds the packages that have no wheel, and this one. pip install --no-deps --require-hashes -r environment/build.txt",
    "all": "Then all but PyTorch. pip install --no-deps --no-build-isolation --require-hashes -r environment/all.txt",
    "torch-cpu": "Last, this or torch-nvidia.txt: the CPU build, from PyTorch's own index or a folder of wheels (pip --find-links). Same options",
    "torch-nvidia": "Last, this or torch-cpu.txt: the build of PyPI, with NVIDIA's libraries, which it loads without a GPU too. Same options",
}


def compile_lock(requirements: str, *options: str) -> dict[str, str]:
    "The requirements, resolved by uv within constraints.txt: entries with the hashes of all files of a release, by name of the package"
    command = ["uv", "pip", "compile", "-", "--quiet", "--generate-hashes", "--python-version", PYTHON, "--python-platform", PLATFORM]
    plain = ["--constraints", "constraints.txt", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
    done = subprocess.run([*command, *plain, *options], input=requirements, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return split_entries(done.stdout)


def split_entries(text: str) -> dict[str, str]:
    "The entries of a lock by the name of their package"
    entries = re.findall(r"^([A-Za-z0-9][^\s=]*)(==[^\n]*\n(?:[ \t]+--hash[^\n]*\n?)*)", text, flags=re.M)
    return {name: name + rest for name, rest in entries}


def requirements() -> str:
    "What `make setup` asks for, one requirement a line"
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    words = [config["DEFAULT"][key] for key in ("requirements", *(f"{extra}_requirements" for extra in EXTRAS))]
    return "\n".join(" ".join(words).split()) + "\n"


def cpu_entry(version: str, wheels: list[str]) -> str:
    "The entry of the CPU build; SystemExit if its hash is not known"
    wanted, file = f"torch=={version}+cpu", HERE / "torch-cpu.txt"
    if not wheels:
        old = split_entries(file.read_text(encoding="utf-8")).get("torch", "") if file.is_file() else ""
        if not old.startswith(f"{wanted} "):
            raise SystemExit(f"the hash of {wanted} is not known: run python environment/lock.py torch-{version}+cpu-cp311-….whl")
        return old
    if not Path(wheels[0]).name.startswith(f"torch-{version}+cpu-cp311-"):
        raise SystemExit(f"{wheels[0]} is not the CPU build of torch {version} for Python 3.11")
    return f"{wanted} \\\n    --hash=sha256:{hashlib.sha256(Path(wheels[0]).read_bytes()).hexdigest()}\n"


def main() -> None:
    peers = compile_lock((ROOT / "benchmarks/peers.txt").read_text(encoding="utf-8"), "--no-deps")
    every = {**compile_lock(requirements()), **peers}
    version = every["torch"].split()[0].removeprefix("torch==")
    known = {re.sub(r"[._]", "-", name).lower() for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.M)}
    build = compile_lock(BUILD, "--no-deps")
    nvidia = {name: entry for name, entry in compile_lock("torch\n").items() if name not in {*known, *build} or name == "torch"}
    cpu = {"torch": cpu_entry(version, sys.argv[1:]), **compile_lock("triton\n", "--no-deps")}
    rest = {name: every[name] for name in sorted(every) if name not in {*nvidia, *build}}
    for name, entries in {"build": build, "all": rest, "torch-cpu": cpu, "torch-nvidia": nvidia}.items():
        (HERE / f"{name}.txt").write_text(HEADER.format(ABOUT[name]) + "".join(entries.values()), encoding="utf-8")


if __name__ == "__main__":
    main()
