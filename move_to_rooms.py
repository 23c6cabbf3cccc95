"""Moves the flat modules and chapters into rooms, and rewrites every import, path and link. Run once, from the repository's root."""

import json
import re
import subprocess
from os.path import relpath
from pathlib import Path, PurePosixPath

ROOMS = {
    "network": "10_grn:grn 10b_fused:fused 10c_kernels:kernels 11_blocks:blocks 12_model:mednext 13_scaling:scaling",
    "models": "15_stunet:stunet 14_weights:card 16_backbones:registry 19_adapt:transfer",
    "data": "19b_scans:scans 20_tasks:datasets 25_storage:storage 26_prepare:preprocess 27_augment:augment 33_mixture:mixture",
    "training": "30_losses:losses 31_recipe:recipe 32_checkpoint:checkpoint 34_guard:replay 35_trainer:trainer 36_launch:launch 37_fitting:run",
    "inference": "40_inference:predictor 43_labelmaps:files",
    "evaluation": "41_metrics:metrics 42_stats:statistics 44_review:review",
    "zoo": "17_importers:importers 18_zoo:catalogue",
    "intake": "22_dicom:dicom 23_convert:convert 24_doctor:check",
    "study": "21_suite:seeds 51_pipeline:30_runs",
    "scoring": "51b_ablation:30_ablations",
    "": "45_onestep:60_finetuning 52_cli:90_cli 53_public:91_public",
    "report": "50_report:tables 50a_analysis:analysis 50b_claims:claims 50c_power:power 50d_speed:speed 51c_plan:forecast",
}
CHAPTER, MODULE = {"00_core": "00_core"}, {"core": "core"}  # Old to new, without endings
for room, listed in ROOMS.items():
    for number, pair in enumerate(listed.split(), 1):
        old, new = pair.split(":")
        name = old.split("_", 1)[1]
        if room:
            chapter = new if new[0].isdigit() else f"{number}0_{new}"
            CHAPTER[old], MODULE[name] = f"{room}/{chapter}", f"{room}.{chapter.split('_', 1)[1]}"
        else:
            CHAPTER[old], MODULE[name] = new, new.split("_", 1)[1]
NAMES = "|".join(sorted(MODULE, key=len, reverse=True))


def imported(match: re.Match) -> tuple[str, dict]:
    "`from mednext_v2 import a, b as c` by rooms, and what names become"
    indent, listed, tail = match[1], match[2], match[3]
    lines, renamed, others = [], {}, []
    for part in listed.split(","):
        name, _, alias = part.strip().partition(" as ")
        if name not in MODULE:
            others.append(part.strip())
            continue
        room, _, last = MODULE[name].rpartition(".")
        lines.append(f"from mednext_v2{'.' + room if room else ''} import {last}" + (f" as {alias}" if alias else ""))
        if not alias and last != name:
            renamed[name] = last
    if others:
        lines.insert(0, f"from mednext_v2 import {', '.join(others)}")
    return ("\n" + indent).join(lines).join((indent, tail)) if tail != ";" else indent + "; ".join(lines) + tail, renamed


def code(text: str) -> str:
    "Imports and dotted names"
    renamed = {}

    def replace(match):
        line, more = imported(match)
        renamed.update(more)
        return line

    text = re.sub(rf"\bmednext_v2\.({NAMES})\b(?!\.ipynb)", lambda m: f"mednext_v2.{MODULE[m[1]]}", text)
    text = re.sub(r"^([ \t]*)from mednext_v2 import ((?:\w+(?: as \w+)?)(?:, *\w+(?: as \w+)?)*)(.*)$", replace, text, flags=re.M)
    for old, new in renamed.items():
        text = re.sub(rf"(?<![\w.\"'/])({old})(?=\.[a-zA-Z_])|(?<=[(, ])({old})(?=, \"[a-zA-Z_]+\")", new, text)
    return text


def paths(text: str, place: PurePosixPath) -> str:
    "Files that are named, and links from the file at `place`"
    text = re.sub(rf"\bmednext_v2/({NAMES})\.py", lambda m: f"mednext_v2/{MODULE[m[1]].replace('.', '/')}.py", text)
    chapters = "|".join(sorted(CHAPTER, key=len, reverse=True))
    text = re.sub(rf"\bnbs/({chapters})\.(ipynb|html)", lambda m: f"nbs/{CHAPTER[m[1]]}.{m[2]}", text)

    def link(match):
        if match[1].endswith("nbs/"):
            return match[0]
        return f"{match[1]}{relpath('nbs/' + CHAPTER[match[3]], place.parent)}.{match[4]}"

    return re.sub(rf"(\(|`|')((?:\.\./)*)({chapters})\.(ipynb|html)", link, text)


def prose(text: str) -> str:
    "`module.name` in backticks, where the module has another name now"
    changed = {old: new.rpartition(".")[2] for old, new in MODULE.items() if new.rpartition(".")[2] != old}
    return re.sub(rf"`({'|'.join(changed)})\.(?=[a-zA-Z_]+[`(])(?!json|yaml|csv|md|py)", lambda m: f"`{changed[m[1]]}.", text)


def notebook(path: Path, target: PurePosixPath) -> str:
    known = json.loads(path.read_text(encoding="utf-8"))
    for cell in known["cells"]:
        text = "".join(cell["source"])
        text = re.sub(r"#\| default_exp (\w+)", lambda m: f"#| default_exp {MODULE[m[1]]}", text)
        if cell["cell_type"] == "markdown":
            text = prose(text)
        text = paths(code(text), target)
        if cell["cell_type"] == "code" and "HOMES = {" in text:
            text = re.sub(r'^    "(\w+)": \[', lambda m: f'    "{MODULE[m[1]]}": [', text, flags=re.M)
        cell["source"] = text.splitlines(keepends=True) if isinstance(cell["source"], list) else text
    return json.dumps(known, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = PurePosixPath(name)
        if path.parts[0] in ("results", "mednext_v2", "dvc.lock") or path.suffix in (".gz", ".png", ".nii"):
            continue
        stem = path.stem if path.parts[:-1] == ("nbs",) else ""
        target = PurePosixPath("nbs", CHAPTER[stem] + ".ipynb") if stem in CHAPTER else path
        if path.suffix == ".ipynb":
            text = notebook(Path(path), target)
        elif path.suffix in (".py", ".md", ".yaml", ".yml", ".ini", ".toml", ".sbatch", ".txt", "") and Path(path).name != "move_to_rooms.py":
            old = Path(path).read_text(encoding="utf-8")
            text = paths(code(old) if path.suffix == ".py" else re.sub(rf"\bmednext_v2\.({NAMES})\b", lambda m: f"mednext_v2.{MODULE[m[1]]}", old), target)
        else:
            continue
        if target != path:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["git", "mv", str(path), str(target)], check=True)
        Path(target).write_text(text, encoding="utf-8")
    for name in listed:
        if re.fullmatch(r"mednext_v2/[a-z]\w*\.py", name):
            subprocess.run(["git", "rm", "-q", "--cached", name], check=True)
            Path(name).unlink()


main()
