"""Preparation and loading against nnU-Net 2.8's own preprocessing, and what that means for 18,000 scans.

    python benchmarks/data.py            # all of it, about 30 minutes on two cores
    python benchmarks/data.py speed      # a part: speed, memory, paper, loader
    python benchmarks/data.py table      # the tables, from benchmarks/results/data.json

Every measurement is a process of its own. Repeats of the two sides alternate; medians and the whole
spread are kept, and the raw numbers stay in the JSON. Needs nnunetv2: see benchmarks/README.md.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from nnunet_peer import peak_mib, request

HERE = Path(__file__).resolve().parent
SHORT = os.environ.get("BENCH_SHORT", "") not in ("", "0")  # What `make bench` compares: parts of a part, beside the committed results


def results_file(name: str) -> Path:
    "Where a script writes: a short run never over the committed results"
    return (HERE.parent / "runs" / "bench" if SHORT else HERE / "results") / f"{name}.json"


RESULTS = results_file("data")
REPEATS = int(os.environ.get("BENCH_REPEATS", 3))
MINI = ("abdomen_ct", "liver_lesion_ct", "head_bleed_ct", "brain_mr", "abdomen_mr", "brain_lesion_mr")
# Tasks, spacing of the raw scans and of the prepared ones: the suite as the mini profile builds it, on the grid
# of training already, and two tasks that must be resampled
GRAINS = {"as built": (MINI, None, None), "3 mm to 2 mm": (("abdomen_ct", "brain_mr"), (3.0, 3.0, 3.0), (2.0, 2.0, 2.0))}


# ---------------------------------------------------------------- what is measured, one process each
def mini_tasks(grain: str) -> list:
    "The tasks of the mini suite, on the grid that this grain is prepared to"
    from mednext_v2.data.datasets import get_dataset

    names, _, target = GRAINS[grain]
    return [replace(task, spacing=target or task.spacing) for task in map(get_dataset, names)]


def child_prepare(raw: str, out: str, grain: str, workers: int) -> dict:
    "Every mini data set prepared by this project"
    begin = time.perf_counter()
    from mednext_v2.data.preprocess import prepare

    cases, imported = 0, time.perf_counter() - begin
    for task in mini_tasks(grain):
        cases += len(prepare(task, raw, Path(out) / task.name, workers))
    return {"cases": cases, "import_s": imported, "work_s": time.perf_counter() - begin - imported}


def child_case(kind: str, raw: str, out: str) -> dict:
    "A data set of two copies of one case: seconds of a case, and the peak memory of this process"
    from mednext_v2.data.datasets import list_cases
    from mednext_v2.data.preprocess import Prepared, measure_fingerprint, prepare

    task = big_task(kind)
    before, begin, before_cpu = peak_mib(), time.perf_counter(), time.process_time()
    measure_fingerprint(task, raw)
    measured, begin, cpu = time.perf_counter() - begin, time.perf_counter(), time.process_time()
    prepare(task, raw, out)
    whole, cpu, measured_cpu = time.perf_counter() - begin, time.process_time() - cpu, cpu - before_cpu
    peak, case, prepared = peak_mib(), list_cases(task, raw)[0], Prepared(out)
    image, label = prepared.image(case.id), prepared.label(case.id)
    written = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    reads = {} if min(label.shape) < 64 else {"patch_64_cpu_s": patch_read(image, label, 64)}
    if min(label.shape) >= 192:
        reads["patch_128_cpu_s"] = patch_read(image, label, 128)
    shutil.rmtree(out)
    return {
        # Of two copies; only the training case is measured for the fingerprint
        "seconds": (whole - measured) / 2,
        "cpu_s": (cpu - measured_cpu) / 2,
        "fingerprint_cpu_s": measured_cpu,
        "peak_mib": peak,
        "imports_mib": before,
        "raw_bytes": sum(path.stat().st_size for path in (*case.images, case.label)),
        "prepared_bytes": written / 2,
        "voxels": int(np.prod(label.shape)),
        **reads,
    }


def patch_read(image, label, side: int) -> float:
    "Median seconds of a core to read a random cube of image and label, from the page cache"
    rng, times = np.random.default_rng(0), []
    for _ in range(30):
        start = [rng.integers(n - side + 1) for n in label.shape]
        place = tuple(slice(a, a + side) for a in start)
        begin = time.process_time()
        np.asarray(image[(slice(None), *place)])
        np.asarray(label[place])
        times.append(time.process_time() - begin)
    return float(np.median(times))


def child_loader(folder: str, augment: str, steps: int) -> dict:
    "A training loop on two cores, one for the network and one that reads ahead: how long it waits"
    import torch

    from mednext_v2.data.augment import PatchSampler, patch_loader
    from mednext_v2.data.preprocess import Prepared
    from mednext_v2.models.registry import create
    from mednext_v2.training.losses import deep_supervision_loss

    torch.set_num_threads(1)
    prepared = Prepared(folder)
    model = create("mednext_v2_tiny", 1, prepared.dataset.num_classes, deep_supervision=True, width=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    sampler = PatchSampler(prepared, "train", (32, 32, 32), 2, 0.33, augment)
    waits, whole = [], []
    with closing(patch_loader(sampler, steps=steps, workers=1)) as batches:
        for _ in range(steps):
            begin = time.perf_counter()
            image, label = next(batches)
            waits.append(time.perf_counter() - begin)
            loss = deep_supervision_loss(model(image), label)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 12.0)
            optimizer.step()
            whole.append(time.perf_counter() - begin)
    skip = 5  # The worker starts, the first steps warm up
    alone = []
    for step in range(10):
        begin = time.perf_counter()
        sampler.batch(step)
        alone.append(time.perf_counter() - begin)
    return {
        "wait_share": sum(waits[skip:]) / sum(whole[skip:]),
        "step_s": float(np.median(whole[skip:])),
        "wait_s": float(np.median(waits[skip:])),
        "batch_alone_s": float(np.median(alone)),
    }


CHILDREN = {"prepare": child_prepare, "case": child_case, "loader": child_loader}


def child(name: str, script: str = __file__, /, **arguments) -> dict:
    "Runs one of a script's `CHILDREN` in a process of its own; adds the seconds of the whole command"
    command = [sys.executable, script, "--child", name, json.dumps(arguments)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"command_s": time.perf_counter() - begin}


def take_turns(ways: dict, repeats: int, clock=time.process_time) -> dict:
    "Seconds of each function, in turns; the first round warms up"
    found = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            begin = clock()
            way()
            found[name].append(clock() - begin)
    return {name: values[1:] for name, values in found.items()}


def measure_parts(path: Path, order, measure, asked: list[str], table) -> None:
    "Measures what is asked for, all in this order if nothing is, into a JSON file beside what it holds; prints the table"
    results = json.loads(path.read_text()) if path.is_file() else {}
    for part in [part for part in asked or order if part != "table"]:
        begin, known = time.perf_counter(), machine()
        results[part] = {"machine": known, "result": measure(part), "load_after": os.getloadavg()}
        log(f"{part}: {time.perf_counter() - begin:.0f} s")
        results = {name: results[name] for name in order if name in results}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def run_script(children: dict, main) -> None:
    "The command line of a script: one of its children, or `main` with the parts asked for"
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(children[sys.argv[2]](**json.loads(sys.argv[3]))))
    else:
        main(sys.argv[1:])


# ---------------------------------------------------------------- data
KINDS = {
    # Shape in voxels, their size in mm, the target's size: sixty structures
    "memory": ((200, 200, 150), (1.5, 1.5, 1.5), (1.0, 1.0, 1.0)),
    "paper": ((512, 512, 400), (0.8, 0.8, 1.5), (1.5, 1.5, 1.5)),
}


def big_task(kind: str):
    "A CT task of sixty structures"
    from mednext_v2.data.datasets import Dataset

    labels = {f"structure{value}": value for value in range(1, 61)}
    return Dataset(
        name=f"big_{kind}",
        dataset=980 + list(KINDS).index(kind),
        title=f"Big {kind}",
        modality="CT",
        labels=labels,
        groups="organ",
        spacing=KINDS[kind][2],
        patch=(128, 128, 128),
        nsd_tolerance=1.0,
        role="pretrain",
        licence="none",
        citation="none",
    )


def big_raw(kind: str, raw: Path) -> None:
    "A body of noisy tissue with sixty ellipsoids; training and validation case are the same files"
    from mednext_v2.core import write_json
    from mednext_v2.data.datasets import write_description
    from mednext_v2.data.scans import write_volume

    shape, spacing, _ = KINDS[kind]
    rng, half = np.random.default_rng(0), np.array(shape) / 2
    x, y = np.ogrid[: shape[0], : shape[1]]
    body = ((x - half[0]) / (0.85 * half[0])) ** 2 + ((y - half[1]) / (0.6 * half[1])) ** 2 < 1
    image = np.where(body, 40, -1000).astype(np.int16)[..., None].repeat(shape[2], 2)
    label = np.zeros(shape, np.uint8)
    for value in range(1, 61):
        radius = rng.uniform(0.06, 0.2, 3) * half
        centre = half + rng.uniform(-0.5, 0.5, 3) * half * (1.2, 0.8, 1.7)
        box = tuple(slice(max(0, int(c - r)), int(c + r) + 2) for c, r in zip(centre, radius))
        grid = np.ogrid[tuple(slice(s.start, min(s.stop, n)) for s, n in zip(box, shape))]
        inside = sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radius)) < 1
        label[box][inside] = value
        image[box][inside] = rng.integers(-100, 400)
    for start in range(0, shape[0], 32):  # Noise of a diagnostic scan
        part = image[start : start + 32]
        part += rng.normal(0, 15, part.shape).astype(np.int16)
    folder = raw / big_task(kind).folder
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    (folder / "labelsTr").mkdir(exist_ok=True)
    affine = np.diag([*spacing, 1.0])
    write_volume(folder / "imagesTr" / "one_0000.nii.gz", image, affine)
    write_volume(folder / "labelsTr" / "one.nii.gz", label, affine)
    os.link(folder / "imagesTr" / "one_0000.nii.gz", folder / "imagesTr" / "two_0000.nii.gz")
    os.link(folder / "labelsTr" / "one.nii.gz", folder / "labelsTr" / "two.nii.gz")
    write_description(big_task(kind), folder, 2)
    image, label = folder / "imagesTr" / "one_0000.nii.gz", folder / "labelsTr" / "one.nii.gz"
    listed = {"images": [str(image)], "label": str(label)}
    known = json.loads((folder / "dataset.json").read_text())
    write_json(folder / "dataset.json", known | {"dataset": {"one": listed}}, sort_keys=False)  # For nnU-Net
    write_json(folder / "splits_final.json", [{"train": ["one"], "val": ["two"]}])


# ---------------------------------------------------------------- measurements
def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float]) -> dict:
    "Median and range of some repeats, and the repeats"
    return {"median": float(np.median(values)), "least": min(values), "most": max(values), "all": values}


def speed(work: Path) -> dict:
    "Cases per second of the mini raw data, ours and nnU-Net's, with one and two processes; a short run leaves commands out"
    from mednext_v2.study.seeds import build_dataset

    results = {}
    for grain, (_, spacing, _) in list(GRAINS.items())[: 1 if SHORT else None]:
        place = work / grain.replace(" ", "_")
        for task in mini_tasks(grain):
            build_dataset(task.name, None, place / "raw", spacing=spacing, workers=2)
        targets = {task.dataset: task.spacing[::-1] for task in mini_tasks(grain)}
        count = sum(len(list((place / "raw" / t.folder / "labelsTr").iterdir())) for t in mini_tasks(grain))
        log(f"{grain}: raw data built")
        request(place, targets, 2, ("fingerprint", "plan"), voxels=1e6)
        times = {f"{side} {workers}": [] for side in ("ours", "nnunet") for workers in (1, 2)}
        work_times = {"ours": [], "nnunet": []}
        detail = []
        for _ in range(REPEATS):
            for workers in (1,) if SHORT else (1, 2):
                folders = {"raw": str(place / "raw"), "out": str(place / "out")}
                ours = child("prepare", **folders, grain=grain, workers=workers)
                if SHORT:
                    shutil.rmtree(place / "out")
                    work_times["ours"].append(ours["cases"] / ours["work_s"])
                    continue
                theirs = request(place, targets, workers, ("preprocess",))
                times[f"ours {workers}"].append(ours["cases"] / ours["command_s"])
                times[f"nnunet {workers}"].append(count / theirs["command_s"])
                detail.append({"workers": workers, "ours": ours, "nnunet": theirs})
                seconds = f"ours {ours['command_s']:.1f} s, nnU-Net {theirs['command_s']:.1f} s"
                log(f"{grain}, {workers} processes: {seconds}")
                shutil.rmtree(place / "out")
                if workers == 1:
                    work_times["ours"].append(ours["cases"] / ours["work_s"])
            alone = request(place, targets, 1, ("in process",))["cases"].values()
            work_times["nnunet"].append(count / sum(some["seconds"] for some in alone))
            log(f"{grain}, without start-up: {work_times['ours'][-1]:.1f} and {work_times['nnunet'][-1]:.1f} cases/s")
        warm = {side: spread(values) for side, values in work_times.items()}
        warm_ratio = warm["ours"]["median"] / warm["nnunet"]["median"]
        results[grain] = {"without_start": {"cases_per_s": warm, "ratio": warm_ratio}, "nnunet_cases": count}
        if SHORT:
            continue
        rates = {name: spread(values) for name, values in times.items()}
        ratio = {w: rates[f"ours {w}"]["median"] / rates[f"nnunet {w}"]["median"] for w in (1, 2)}
        results[grain] = {"commands": {"cases_per_s": rates, "ratio": ratio}, **results[grain], "runs": detail}
    return results


def compare_case(work: Path, kind: str, peer_repeats: int) -> dict:
    "One case of sixty structures, ours and nnU-Net's"
    place, task = work / kind, big_task(kind)
    big_raw(kind, place / "raw")
    log(f"{kind}: raw data built")
    sides, target = {"ours": [], "nnunet": []}, {task.dataset: task.spacing[::-1]}
    request(place, target, 1, ("fingerprint", "plan"), voxels=1e6)
    for repeat in range(REPEATS):
        sides["ours"].append(child("case", kind=kind, raw=str(place / "raw"), out=str(place / "out")))
        log(f"{kind}: {sides['ours'][-1]}")
        if repeat < peer_repeats:
            answer = request(place, target, 1, ("in process",))
            sides["nnunet"].append(answer["cases"][str(task.dataset)])
            log(f"{kind}, nnU-Net: {sides['nnunet'][-1]}")
    shutil.rmtree(place)
    shape, spacing, wanted = KINDS[kind]
    result = {"shape": shape, "spacing": spacing, "target": wanted, "runs": sides}
    for field in ("seconds", "cpu_s", "peak_mib"):
        found = {side: spread([run[field] for run in runs]) for side, runs in sides.items()}
        result[field] = found | {"ratio": found["ours"]["median"] / found["nnunet"]["median"]}
    return result


def memory(work: Path) -> dict:
    "A case of moderate size that grows, as nnU-Net's own choice of spacing may ask for"
    return compare_case(work, "memory", REPEATS)


def paper(work: Path) -> dict:
    "A case of the paper's size, the unit of the extrapolation; nnU-Net takes minutes, so once"
    return compare_case(work, "paper", 1)


def loader(work: Path) -> dict:
    "Share of a training step that waits for patches, two cores, the mini profile's network"
    from mednext_v2.data.datasets import get_dataset
    from mednext_v2.data.preprocess import prepare
    from mednext_v2.study.seeds import build_dataset

    task = get_dataset("abdomen_ct")
    build_dataset(task.name, None, work / "loader" / "raw")
    prepare(task, work / "loader" / "raw", work / "loader" / "out")
    runs = {"light": [], "nnunet": []}
    for _ in range(REPEATS):
        for augment in runs:
            folder = str(work / "loader" / "out")
            runs[augment].append(child("loader", folder=folder, augment=augment, steps=60))
    fields = runs["light"][0]
    return {augment: {f: spread([run[f] for run in some]) for f in fields} for augment, some in runs.items()}


PARTS = {"speed": speed, "memory": memory, "paper": paper, "loader": loader}


# ---------------------------------------------------------------- tables
NAMES = ("nnunetv2", "batchgenerators", "numpy", "scipy", "scikit-image", "torch", "blosc2", "monai")
SCANS, STEP_S, BATCH = 18_000, 0.98, 2


def versions_of(names: Iterable[str]) -> dict:
    "Of those that are installed"
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def machine() -> dict:
    "What the numbers were taken on"
    from mednext_v2.study.arithmetic import cpu_facts, describe_processor

    facts = cpu_facts()  # Family and model tell apart what virtual machines give one name
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": facts.get("model name", platform.machine()),
        "family": facts.get("cpu family", ""),
        "model": facts.get("model", ""),
        "instructions": describe_processor()["instructions"],
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "python": platform.python_version(),
        "versions": versions_of(NAMES),
        "load_before": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
    }


def row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def heading(*cells) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def show(values: dict, digits: int = 2) -> str:
    "Median and range"
    return f"{values['median']:.{digits}f} ({values['least']:.{digits}f} to {values['most']:.{digits}f})"


def speed_table(result: dict) -> list[str]:
    lines = heading("mini raw data", "processes", "ours, cases/s", "nnU-Net, cases/s", "ratio")
    for grain, found in result.items():
        for workers in ("1", "2") if "commands" in found else ():
            rates = found["commands"]["cases_per_s"]
            ratio = found["commands"]["ratio"][workers]
            ours, theirs = rates[f"ours {workers}"], rates[f"nnunet {workers}"]
            lines.append(row(f"{grain}, whole command", workers, show(ours), show(theirs), f"{ratio:.1f}"))
        warm = found["without_start"]
        ours, theirs = (warm["cases_per_s"][side] for side in ("ours", "nnunet"))
        lines.append(row(f"{grain}, without start-up", 1, show(ours), show(theirs), f"{warm['ratio']:.1f}"))
    return lines


def case_table(results: list[dict]) -> list[str]:
    lines = heading("one case of 60 structures", "", "ours", "nnU-Net", "ours / nnU-Net")
    for found in results:
        sizes = {key: " x ".join(f"{n:g}" for n in found[key]) for key in ("shape", "spacing", "target")}
        name = f"{sizes['shape']} voxels of {sizes['spacing']} mm to {sizes['target']} mm"
        titles = {"seconds": "seconds", "cpu_s": "seconds of a core", "peak_mib": "peak memory, MiB"}
        for field, title in titles.items():
            digits = 0 if field == "peak_mib" else 1
            sides = [show(found[field][side], digits) for side in ("ours", "nnunet")]
            lines.append(row(name, title, *sides, f"{found[field]['ratio']:.2f}"))
    return lines


def loader_table(result: dict) -> list[str]:
    lines = heading("augmentation", "step, s", "wait, s", "share of the step that waits", "a batch alone, s")
    for augment, found in result.items():
        share = {key: 100 * found["wait_share"][key] for key in ("median", "least", "most")}
        cells = [show(found[field], 4) for field in ("step_s", "wait_s")]
        lines.append(row(augment, *cells, show(share, 1) + " %", show(found["batch_alone_s"], 4)))
    return lines


def paper_scale(result: dict, density: float) -> str:
    "What 18,000 CT cost, from the measured cost of one: a table with its sums"
    runs = result["runs"]["ours"]
    case = {field: float(np.median([run[field] for run in runs])) for field in runs[0]}
    theirs = result["cpu_s"]["nnunet"]["median"]
    hours = SCANS * case["cpu_s"] / 3600
    per_gpu, bits = BATCH / STEP_S, case["prepared_bytes"] / case["voxels"]
    patch, read = bits * 128**3, case["patch_128_cpu_s"]
    lines = heading("18,000 CT of 512 x 512 x 400 voxels, 0.8 x 0.8 x 1.5 mm to 1.5 mm", "value", "how")
    lines += [
        row("preparation", f"{hours:.0f} core hours", f"18,000 x {case['cpu_s']:.1f} s of a core / 3600"),
        row("its fingerprint", f"{500 * case['fingerprint_cpu_s'] / 3600:.1f} core hours", f"500 cases x {case['fingerprint_cpu_s']:.1f} s of a core / 3600"),
        *(row(f"on {n} cores", f"{hours / n:.1f} h", f"{hours:.0f} / {n}") for n in (16, 64, 512)),
        row("the same by nnU-Net", f"{SCANS * theirs / 3600:.0f} core hours", f"18,000 x {theirs:.0f} s / 3600"),
        row("memory of a worker", f"{case['peak_mib'] / 1024:.1f} GiB", f"measured; nnU-Net {result['peak_mib']['nnunet']['median'] / 1024:.1f} GiB"),
        row("raw", f"{SCANS * case['raw_bytes'] / 1e12:.1f} TB", f"18,000 x {case['raw_bytes'] / 1e6:.0f} MB (gzip, 15 HU of noise)"),
        row(
            "prepared",
            f"{SCANS * case['prepared_bytes'] / 1e12:.2f} TB",
            f"18,000 x {case['prepared_bytes'] / 1e6:.0f} MB: {bits:.2f} bytes a voxel, image and label",
        ),
        row(
            "prepared, of real scans",
            f"{SCANS * case['voxels'] * density / 1e12:.2f} TB",
            f"18,000 x {case['voxels'] / 1e6:.1f} million voxels x {density:.2f} bytes, as in storage.json",
        ),
        row("patches that one GPU takes", f"{per_gpu:.1f} /s", f"batch {BATCH} every {STEP_S} s: MedNeXt-L (v1), 128³, 68 A100 hours for 250,000 steps"),
    ]
    for gpus in (4, 64):
        rate = gpus * per_gpu
        lines += [
            row(f"{gpus} GPUs", f"{rate:.0f} reads/s", f"{gpus} x {per_gpu:.2f} patches of 128³"),
            row("", f"{rate * patch / 1e6:.0f} MB/s", f"{rate:.0f} x {bits:.2f} bytes x 128³, and more at the edges of chunks"),
            row("", f"{rate * read:.1f} cores", f"{rate:.0f} x {1000 * read:.0f} ms to read one from the page cache, without augmentation"),
        ]
    return "\n".join(lines)


def read_table(rows: list[dict]) -> list[str]:
    "Patch reads of storage.json: a cube of 64³ from a file opened anew, image as it is stored"
    picked = {("nibabel gz", "int16"): "nibabel, gzip (HU)", ("npy mapped", "float16"): "npy, mapped"}
    picked |= {("zarr zstd 32", "float16"): "zarr 3, sharded"}
    picked |= {("blosc2 as nnU-Net", "float32"): "blosc2 as nnU-Net writes"}
    picked |= {("storage 32", "float16"): "this project (blosc2, checked)"}
    titles = ("ms for a patch of 64³, opened anew", "times as fast", "MB", "ms to write")
    lines = heading("a volume of 256 x 256 x 200 as", *titles)
    found = {}
    for key, title in picked.items():
        same = [some for some in rows if (some["method"], some["array"]) == key]
        if same:
            first, write = ([ms for some in same for ms in some[key]] for key in ("first_ms", "write_ms"))
            size = np.mean([some["bytes"] for some in same]) / 1e6
            found[title] = (np.median(first), size, np.median(write))
    base = next(iter(found.values()))[0] if found else 1
    return lines + [row(title, f"{first:.1f}", f"{base / first:.0f}", f"{size:.0f}", f"{write:.0f}") for title, (first, size, write) in found.items()]


def tables(results: dict) -> str:
    "All tables that the results allow, as Markdown"
    parts = []
    if "speed" in results:
        parts.append("\n".join(speed_table(results["speed"]["result"])))
    big = [results[name]["result"] for name in ("memory", "paper") if name in results]
    if big:
        parts.append("\n".join(case_table(big)))
    storage, density = RESULTS.with_name("storage.json"), float("nan")
    if storage.is_file():
        rows = json.loads(storage.read_text())["rows"]
        parts.append("\n".join(read_table(rows)))
        kept = [some for some in rows if (some["method"], some["array"]) == ("storage 32", "float16")]
        density = sum(some["bytes"] for some in kept) / sum(some["raw_bytes"] / 2 for some in kept)
    if "loader" in results:
        parts.append("\n".join(loader_table(results["loader"]["result"])))
    if "paper" in results:
        parts.append(paper_scale(results["paper"]["result"], density))
    return "\n\n".join(parts)


def main(parts: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in [part for part in parts or PARTS if part != "table"]:
        with tempfile.TemporaryDirectory(prefix="bench_data_") as work:
            about, begin = machine(), time.perf_counter()
            results[name] = {"machine": about, "result": PARTS[name](Path(work))}
            log(f"{name}: {time.perf_counter() - begin:.0f} s")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    # As read from the file: whole numbers as keys are text there
    print(tables(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    run_script(CHILDREN, main)
