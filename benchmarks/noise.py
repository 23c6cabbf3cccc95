"""How far do the scores of a profile move with the processor's instructions alone, and with the seed alone?

    make repro && python benchmarks/noise.py            (about five minutes on one core for each arithmetic and each seed)

Each setting trains the networks of the profile from scratch and scores them, in a clone of the committed state with the prepared data of
`make repro`. benchmarks/results/noise.csv holds the mean of each backbone and task; noise.json says where and with what. A setting that is
already there is not run again. The chapter on power and the ledger read it.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/noise.csv"
# The pinned arithmetic of make repro; the widest instructions of this processor; and two narrower ones, as simulated other processors
ARITHMETIC = {
    "pinned": {},
    "widest": {"FAST": "1"},
    "scalar": {"FAST": "1", "ATEN_CPU_CAPABILITY": "default"},
    "sse4.1": {"FAST": "1", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}
LEAST_SEEDS = 3  # A profile with fewer has others for the spread


def settings_of(seeds: list[int]) -> list[tuple[str, int]]:  # Arithmetic and seed
    "The profile's seeds, and further ones up to three, with pins; its first seed with each other arithmetic"
    more = [seed for seed in range(len(seeds) + LEAST_SEEDS) if seed not in seeds]
    seeds = [*seeds, *more[: max(0, LEAST_SEEDS - len(seeds))]]
    return [("pinned", seed) for seed in seeds] + [(name, min(seeds)) for name in ARITHMETIC if name != "pinned"]


def train_and_score(profile: str, seed: int) -> pd.DataFrame:
    "Means by backbone and task of the networks of the profile, trained from scratch with one seed"
    from mednext_v2.core import build, params
    from mednext_v2.scoring.evaluate import evaluate_runs
    from mednext_v2.study.paths import StudyPaths
    from mednext_v2.study.plan import read_plan
    from mednext_v2.study.runs import finetuning_runs, resources_of, train_runs
    from mednext_v2.training.recipe import Recipe

    plan, paths, compute = read_plan(profile), StudyPaths(profile), params("compute")
    recipe, scores = build(Recipe, params("recipes.finetune"), "params.yaml:recipes.finetune"), []
    for backbone in plan.backbones:
        runs, models = finetuning_runs(plan, backbone, "scratch"), paths.models("finetune", "scratch", backbone)
        curves = paths.curves("finetune", "scratch", backbone)
        train_runs(runs, recipe, params(f"backbones.{backbone}"), paths.prepared, models, curves, resources=resources_of(compute))
        scores.append(
            evaluate_runs(runs, models, paths.prepared, paths.raw, paths.evaluated("scratch", backbone), params("evaluate.overlap"), splits=("test",))
        )
    return pd.concat(scores).groupby(["backbone", "init", "task"], sort=False)[["dsc", "nsd"]].mean().reset_index().assign(seed=seed)


def run_one(profile: str, name: str, seed: int) -> pd.DataFrame:
    "One setting, in a clone of its own"
    free = {key: value for key, value in os.environ.items() if key not in ("FAST", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")}
    with tempfile.TemporaryDirectory() as folder:
        clone, table = Path(folder) / "clone", Path(folder) / "scores.csv"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        for part in (f"data/raw/{profile}", f"data/prepared/{profile}"):
            shutil.copytree(ROOT / part, clone / part)
        call = [sys.executable, "benchmarks/noise.py", "--one", str(seed), "--profile", profile, "--out", str(table)]
        subprocess.run(call, cwd=clone, env=free | ARITHMETIC[name] | {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}, check=True)
        return pd.read_csv(table).assign(arithmetic=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--jobs", type=int, default=2, help="settings at a time, each of which keeps one core busy")
    parser.add_argument("--one", type=int, metavar="SEED", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        from mednext_v2.study.arithmetic import is_pinned, pin_arithmetic

        if not is_pinned() and pin_arithmetic():  # Pins hold in processes that are started after them
            os.execv(sys.executable, [sys.executable, *sys.argv])
        from mednext_v2.stages import compose_params

        compose_params(options.profile)
        text = Path("params.yaml").read_text(encoding="utf-8")
        text, count = re.subn(r"^seeds:\n(- \d+\n)+", f"seeds:\n- {options.one}\n", text, flags=re.M)  # All seeds: each has a setting of its own
        assert count == 1, "params.yaml lists no seeds"
        Path("params.yaml").write_text(text, encoding="utf-8")
        train_and_score(options.profile, options.one).assign(pinned=is_pinned()).to_csv(options.out, index=False)
        return
    from mednext_v2.core import read_yaml, versions
    from mednext_v2.study.arithmetic import describe_machine

    done = pd.read_csv(RESULTS) if RESULTS.is_file() else pd.DataFrame(columns=["arithmetic", "seed", "profile"])
    settings = settings_of(read_yaml(ROOT / f"conf/profile/{options.profile}.yaml")["seeds"])
    missing = [(name, seed) for name, seed in settings if not ((done.arithmetic == name) & (done.seed == seed) & (done.profile == options.profile)).any()]
    with ThreadPoolExecutor(options.jobs) as pool:
        for table in pool.map(lambda one: run_one(options.profile, *one), missing):
            table = table.assign(profile=options.profile)
            done = pd.concat([done, table], ignore_index=True) if len(done) else table
            done.to_csv(RESULTS, index=False, float_format="%.6f")
            print(f"{table.arithmetic[0]}, seed {table.seed[0]}: mean DSC {table.dsc.mean():.4f}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    about = {"commit": commit, "profile": options.profile, "machine": describe_machine(), "versions": versions(), "arithmetic": ARITHMETIC}
    RESULTS.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
