"""What the training loop costs over the bare steps, and against nnU-Net 2.8's own trainer.

    python benchmarks/trainer.py            # all of it, about eight minutes on two cores
    python benchmarks/trainer.py overhead   # a part: overhead, peer, growth
    python benchmarks/trainer.py table      # the tables, from benchmarks/results/trainer.json

The trainer is timed from outside: it asks its sampler for the patches of the next step, and the sampler keeps
the time. Between blocks of steps the sampler lets the other side take as many steps, in the same process on
the same patches, so that a slow spell of the machine meets both. Processor time is kept beside wall time: on a
machine that others use as well, it is the one that says what a side costs. Part `peer` needs nnunetv2: see
benchmarks/README.md. `BENCH_BLOCKS=2` makes a short run, to see that it works.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from data import heading, log, machine, row, show, spread
from nnunet_peer import peak_mib, request

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "trainer.json"
TASK = "abdomen_ct"
BLOCK = 10  # Steps
BLOCKS = int(os.environ.get("BENCH_BLOCKS", 20))  # Without the one that warms up
READY = 10  # Batches in memory
GROWTH_STEPS, GROWTH_REPEATS = 16, 3


# ---------------------------------------------------------------- ready batches
def clock() -> np.ndarray:
    "Wall seconds and processor seconds of this process"
    return np.array([time.perf_counter(), time.process_time()])


class Batches:
    "Batches that lie in memory, over and over: no side pays for reading or augmentation"

    def __init__(self, recipe, prepared):
        from mednext_v2.training.trainer import training_sampler

        sampler = training_sampler(recipe, prepared)
        self.ready = [sampler.batch(step) for step in range(READY)]
        self.patch, self.batch_size, self.fingerprint = recipe.patch, recipe.batch_size, sampler.fingerprint
        self.prepared, self.asked = prepared, []

    def __getitem__(self, step: int):
        self.asked.append(clock())
        return self.ready[step % READY]


class Interleaved(Batches):
    "Batches for `fit` that give the other sides their turn between blocks"

    def __init__(self, recipe, prepared, others: dict):
        super().__init__(recipe, prepared)
        self.others = others  # Name to function that takes a list of batches
        self.seconds = {"trainer": [], **{name: [] for name in others}}
        self.first = self.begin = None

    def __getitem__(self, step: int):
        now = clock()
        self.first = now if self.first is None else self.first
        if step % BLOCK == 0:
            if step:
                self.seconds["trainer"].append((now - self.begin).tolist())
            batches = [self.ready[number % READY] for number in range(step, step + BLOCK)]
            for name, function in self.others.items():
                begin = clock()
                function(batches)
                self.seconds[name].append((clock() - begin).tolist())
            self.begin = clock()
        return self.ready[step % READY]


# ---------------------------------------------------------------- the sides
def recipe_of(**changes):
    "The recipe `quick` without its validations, which are no part of a step"
    from mednext_v2.training.recipe import get_recipe

    return get_recipe("mini", validate_every=0, **changes)


def network(prepared):
    "MedNeXt-v2 tiny as the mini profile has it, always with the same weights"
    import torch

    from mednext_v2.models.registry import create

    torch.set_num_threads(1)
    torch.manual_seed(0)
    return create("mednext_v2_tiny", 1, prepared.dataset.num_classes, deep_supervision=True, width=8)


def bare(recipe, model):
    "A function that takes steps with nothing around them: forward, loss, backward, clipping, optimizer"
    import torch

    from mednext_v2.training.losses import deep_supervision_loss
    from mednext_v2.training.recipe import make_optimizer

    model = copy.deepcopy(model).train()
    optimizer = make_optimizer(recipe, model)
    options = {"present_only": recipe.present_only, "batch_dice": recipe.batch_dice}

    def steps(batches: list) -> None:
        for image, label in batches:
            optimizer.zero_grad()
            loss = deep_supervision_loss(model(image), label, **options)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()

    return steps


def nnunet(recipe, model, folder: Path):
    "A function that takes steps by nnU-Net's trainer: the training half of its `run_training`, as an epoch"
    import torch

    for part in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{part}"] = str(folder / part)
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    class Peer(nnUNetTrainer):
        "Only the network is another, and with it the number of its outputs"

        @staticmethod
        def build_network_architecture(*_, **__):
            return copy.deepcopy(model)

        def _get_deep_supervision_scales(self):
            return [[0.5**level] * 3 for level in range(outputs)]

    outputs = len(model(torch.zeros(1, 1, *recipe.patch)))
    place = next((folder / "preprocessed").iterdir())
    plans = json.loads((place / "nnUNetPlans.json").read_text()) | {"continue_training": False}
    settings = {"patch_size": list(recipe.patch), "batch_size": recipe.batch_size, "batch_dice": recipe.batch_dice}
    plans["configurations"]["3d_fullres"] |= settings
    known = json.loads((place / "dataset.json").read_text())
    trainer = Peer(plans, "3d_fullres", 0, known, torch.device("cpu"))
    trainer.initialize()
    ready = {}

    def as_nnunet(image, label) -> dict:
        "What its loader's workers give: the label of every resolution"
        from mednext_v2.training.losses import shrink_label

        if id(image) not in ready:
            sizes = [tuple(int(n * 0.5**level) for n in label.shape[2:]) for level in range(outputs)]
            targets = [shrink_label(label, size).short().contiguous() for size in sizes]
            ready[id(image)] = {"data": image, "target": targets}
        return ready[id(image)]

    def steps(batches: list) -> None:
        loader = iter([as_nnunet(*batch) for batch in batches])
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        done = [trainer.train_step(next(loader)) for _ in range(len(batches))]
        trainer.on_train_epoch_end(done)
        trainer.current_epoch += 1

    return steps


# ---------------------------------------------------------------- what is measured, one process each
def child_compare(prepared: str, work: str, changes: dict, peer: bool) -> dict:
    "One run of `fit`, between whose blocks the other sides take theirs: seconds of every block, by both clocks"
    from mednext_v2.core import Resources
    from mednext_v2.data.preprocess import Prepared
    from mednext_v2.training.trainer import fit

    prepared = Prepared(prepared)
    recipe = recipe_of(steps=BLOCK * (BLOCKS + 1) + 1, **changes)
    model = network(prepared)
    others = {"bare": bare(recipe, model)}
    if peer:
        others["nnunet"] = nnunet(recipe, model, Path(work) / "nnunet")
    sampler = Interleaved(recipe, prepared, others)
    begin = clock()
    fit(recipe, model, sampler, Path(work) / "run", resources=Resources("cpu"))
    return {
        "start_s": (sampler.first - begin).tolist(),
        "block": BLOCK,
        "checkpoint_every": recipe.checkpoint_every,
        "parameters": sum(value.numel() for value in model.parameters()),
        "block_s": sampler.seconds,
    }


def child_growth(prepared: str, work: str, side: int) -> dict:
    "A short run of `fit` at a patch size: seconds a step and peak memory; goes on from weights that are there"
    import torch

    from mednext_v2.core import Resources
    from mednext_v2.data.preprocess import Prepared
    from mednext_v2.training.trainer import fit

    prepared, weights = Prepared(prepared), Path(work) / "weights.pt"
    recipe = recipe_of(steps=GROWTH_STEPS, warmup=5, patch=(side, side, side))
    model, sampler = network(prepared), Batches(recipe, prepared)
    if weights.is_file():
        model.load_state_dict(torch.load(weights, weights_only=True))
    before = peak_mib()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        fit(recipe, model, sampler, folder, resources=Resources("cpu"))
    torch.save(model.state_dict(), weights)
    steps = np.diff(sampler.asked, axis=0)[4:]
    wall, processor = np.median(steps, axis=0).tolist()
    memory = {"peak_mib": peak_mib(), "before_mib": before}
    return {"step_s": wall, "step_cpu_s": processor, "steps_s": steps.tolist(), **memory}


CHILDREN = {"compare": child_compare, "growth": child_growth}


def child(name: str, **arguments) -> dict:
    "Runs one of `CHILDREN` in a process of its own"
    command = [sys.executable, __file__, "--child", name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{name} {arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- measurements
def build(work: Path) -> dict:
    "Raw and prepared data of the mini task; arguments of the children"
    from mednext_v2.data.datasets import get_dataset
    from mednext_v2.data.preprocess import prepare
    from mednext_v2.study.seeds import build_dataset

    build_dataset(TASK, None, work / "raw")
    prepare(get_dataset(TASK), work / "raw", work / "prepared")
    return {"prepared": str(work / "prepared"), "work": str(work)}


def ratios(run: dict, side: str, kind: int) -> dict:  # kind 0 is wall, 1 is processor time
    "Time of the trainer over that of another side, block by block, and over all of them"
    blocks = {name: np.array(values)[:, kind] for name, values in run["block_s"].items()}
    # Block i of the trainer lies between blocks i and i + 1 of the others; the first warms up
    ours, before, after = blocks["trainer"][1:], blocks[side][1:-1], blocks[side][2:]
    theirs = (before + after) / 2
    ends = np.arange(2, len(ours) + 2) * run["block"]  # Steps done after each block
    saves = ends // run["checkpoint_every"] > (ends - run["block"]) // run["checkpoint_every"]
    plain = (ours / theirs)[~saves].tolist()
    whole = ours[~saves].sum() / theirs[~saves].sum()
    # What a checkpoint adds to its block, shared among the steps that it is for
    added = [x - y * whole for x, y in zip(ours[saves], theirs[saves])]
    save = float(np.mean(added)) if added else float("nan")
    step = theirs.mean() / run["block"]
    saved = whole + save / (run["checkpoint_every"] * step)
    totals = {"whole": float(whole), "checkpoint_s": save, "with_checkpoints": float(saved)}
    return {"blocks": spread(plain)} | totals


def compare(work: Path, changes: dict, peer: bool) -> dict:
    "The trainer beside bare steps and, if asked, nnU-Net's trainer"
    places = build(work)
    if peer:
        from mednext_v2.data.datasets import get_dataset

        task = get_dataset(TASK)
        request(work / "nnunet", {task.dataset: task.spacing[::-1]}, 1, voxels=1e6, raw=work / "raw")
    run = child("compare", **places, changes=changes, peer=peer)
    names = [name for name in run["block_s"] if name != "trainer"]
    found = {"recipe": changes}
    for kind, title in enumerate(KINDS):
        seconds = {name: [block[kind] for block in blocks[1:]] for name, blocks in run["block_s"].items()}
        rates = {name: spread([run["block"] / value for value in values]) for name, values in seconds.items()}
        found[title] = {"steps_per_s": rates, "ratio": {name: ratios(run, name, kind) for name in names}}
    return found | {"run": run}


def overhead(work: Path) -> dict:
    "The recipe of the mini profile beside bare steps"
    return compare(work, {}, peer=False)


def peer(work: Path) -> dict:
    "nnU-Net's optimizer and Dice for both"
    changes = {"optimizer": "sgd", "lr": 1e-2, "present_only": False}
    return compare(work, changes, peer=True)


def growth(work: Path) -> dict:
    "The patch of the recipe grows, and nothing else"
    places, runs = build(work), {"32": [], "48": []}
    for _ in range(GROWTH_REPEATS):
        for side in runs:
            runs[side].append(child("growth", **places, side=int(side)))
            log(f"{side}: {runs[side][-1]['step_s']:.3f} s, {runs[side][-1]['peak_mib']:.0f} MiB")
    fields = ("step_s", "step_cpu_s", "peak_mib", "before_mib")
    summary = {side: {f: spread([run[f] for run in some]) for f in fields} for side, some in runs.items()}
    return summary | {"runs": runs}


KINDS = ("wall time", "processor time")
PARTS = {"overhead": overhead, "peer": peer, "growth": growth}


# ---------------------------------------------------------------- tables
def about() -> dict:
    "What the numbers were taken on, and of which code"
    from mednext_v2.training.checkpoint import STEP_MODULES, code_digest

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE)
    found = machine()
    found["versions"] |= {name: version(name) for name in ("accelerate", "dvclive")}
    return found | {"commit": git.stdout.strip(), "code": code_digest(STEP_MODULES), "threads": 1}


def overhead_table(found: dict) -> list[str]:
    "Overhead over bare steps in percent"
    run, rows = found["run"], {}
    for number, kind in enumerate(KINDS):
        ratio, rates = found[kind]["ratio"]["bare"], found[kind]["steps_per_s"]
        cost = {key: 100 * (ratio["blocks"][key] - 1) for key in ("median", "least", "most")}
        rows.setdefault("bare steps, steps/s", []).append(show(rates["bare"]))
        rows.setdefault("the trainer, steps/s", []).append(show(rates["trainer"]))
        rows.setdefault("overhead of a block", []).append(show(cost, 1) + " %")
        rows.setdefault("overhead, all blocks together", []).append(f"{100 * (ratio['whole'] - 1):.1f} %")
        saves = f"with a checkpoint every {run['checkpoint_every']} steps"
        rows.setdefault(saves, []).append(f"{100 * (ratio['with_checkpoints'] - 1):.1f} %")
        rows.setdefault("a checkpoint", []).append(f"{ratio['checkpoint_s']:.2f} s")
        rows.setdefault("start of a run, to its first step", []).append(f"{run['start_s'][number]:.2f} s")
    lines = heading("recipe quick, 32³, batch 2, one thread", *KINDS)
    return lines + [row(title, *cells) for title, cells in rows.items()]


def peer_table(found: dict) -> list[str]:
    "Steps per second of all sides, and how many times as fast ours is"
    names = {"trainer": "this project's trainer", "bare": "bare steps", "nnunet": "nnU-Net's trainer"}
    columns = [title for kind in KINDS for title in (f"steps/s, {kind}", "the trainer / this side")]
    lines = heading("SGD, 32³, batch 2, one thread", *columns)
    for side, title in names.items():
        cells = []
        for kind in KINDS:
            cells.append(show(found[kind]["steps_per_s"][side]))
            if side == "trainer":
                cells.append("")
                continue
            blocks = found[kind]["ratio"][side]["blocks"]
            faster = {"median": 1 / blocks["median"], "least": 1 / blocks["most"], "most": 1 / blocks["least"]}
            cells.append(show(faster))
        lines.append(row(title, *cells))
    return lines


def growth_table(found: dict) -> list[str]:
    "What a larger patch costs"
    fields = {"step_s": 2, "step_cpu_s": 2, "peak_mib": 0, "before_mib": 0}
    lines = heading("patch", "s/step, wall", "s/step, processor", "peak memory, MiB", "before training, MiB")
    for side in ("32", "48"):
        lines.append(row(f"{side}³", *(show(found[side][field], digits) for field, digits in fields.items())))
    step = [found["48"][field]["median"] / found["32"][field]["median"] for field in ("step_s", "step_cpu_s")]
    net = [found[side]["peak_mib"]["median"] - found[side]["before_mib"]["median"] for side in ("48", "32")]
    factors = [*(f"{value:.2f}" for value in step), f"{net[0] / net[1]:.2f}, of what training adds", ""]
    return lines + [row("48³ / 32³; 3.38 times the voxels", *factors)]


TABLES = {"overhead": overhead_table, "peer": peer_table, "growth": growth_table}


def tables(results: dict) -> str:
    "All tables that the results allow, as Markdown"
    return "\n\n".join("\n".join(TABLES[name](results[name]["result"])) for name in PARTS if name in results)


def main(parts: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in [part for part in parts or PARTS if part != "table"]:
        with tempfile.TemporaryDirectory(prefix="bench_trainer_") as work:
            known, begin = about(), time.perf_counter()
            results[name] = {"machine": known, "result": PARTS[name](Path(work)), "load_after": os.getloadavg()}
            log(f"{name}: {time.perf_counter() - begin:.0f} s")
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main(sys.argv[1:])
