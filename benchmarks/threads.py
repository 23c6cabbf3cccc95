"""More than one thread, and beside what people deploy: OpenVINO, ONNX Runtime and MONAI with the same network.

    python benchmarks/threads.py              # all of it, about twenty minutes on two idle cores
    python benchmarks/threads.py forward16_48 # a part
    python benchmarks/threads.py table        # the tables, from benchmarks/results/threads.json

Needs the extras export and dev. All sides of a part take turns in one process, each with every number of threads, and each after a pause, for
the others' threads wait for work by spinning. Times are seconds of the clock, so the machine must be idle. A part of a step compares with MONAI
alone, since the other two do not train. Memory is what a process of its own adds to its peak (`VmHWM`) over what it held before the first pass.
Amdahl's law reads the share that one thread does alone off the gain from one thread to two, and says what eight would give: an extrapolation.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np

from block import BASE, batch, monai_network, over, step
from data import child, heading, measure_parts, results_file, row, run_script, spread
from nnunet_peer import peak_mib

RESULTS = results_file("threads")
REPEATS = int(os.environ.get("BENCH_REPEATS", 3))
THREADS = (1, 2)
PAUSE = 0.3  # Seconds: longer than any side spins
FORWARD = [(8, 48), (8, 96), (16, 48), (16, 96), (32, 48), (32, 64)]  # Width and side
STEP = [(16, 48), (32, 48)]
PARTS = {f"forward{width}_{side}": ("infer", width, side) for width, side in FORWARD}
PARTS |= {f"step{width}_{side}": ("step", width, side) for width, side in STEP}
SIDES = {
    "fused": "this project, fused",
    "plain": "this project, plain",
    "monai": "MONAI's MedNeXt, GRN",
    "openvino": "OpenVINO",
    "onnx": "ONNX Runtime",
    "fused_bf16": "this project, fused, bf16",
    "openvino_bf16": "OpenVINO, bf16",
}


def has_bf16() -> bool:
    "Does the processor multiply bfloat16?"
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def sides_of(kind: str) -> list[str]:
    "What takes part; bfloat16 only where the processor has it"
    if kind == "step":
        return ["fused", "plain", "monai"]
    return [side for side in SIDES if has_bf16() or not side.endswith("bf16")]


def network(side: str, width: int):
    "The Base layout at this width, eight classes; MONAI's has two, as in block.py"
    import torch

    from mednext_v2.network.fused import use_fused
    from mednext_v2.network.mednext import Arch, MedNeXt

    torch.manual_seed(0)
    if side == "monai":
        return monai_network({"width": width, "depths": BASE, "ratios": BASE})
    return use_fused(MedNeXt(Arch(width, BASE, BASE, grn="mean"), 1, 8, deep_supervision=True), side.startswith("fused"))


def exported(width: int, side: int, folder: str) -> str:
    "The network as ONNX, as `mednextv2 export` writes it"
    from mednext_v2.integrations.export import write_onnx

    path = Path(folder) / "network.onnx"
    write_onnx(network("plain", width).eval(), path, 1, (1, side, side, side), None)
    return str(path)


def run_of(name: str, kind: str, width: int, side: int, threads: int, path: str):
    "One side with so many threads, as a function of nothing that gives the output of a forward pass"
    x = batch({"batch": 1, "side": side})
    if name.startswith("openvino"):
        import openvino

        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "bf16" if name.endswith("bf16") else "f32"}
        options |= {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
        compiled = openvino.Core().compile_model(path, "CPU", options)
        return lambda: compiled(x.numpy())[0]
    if name == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"image": x.numpy()})[0]
    import torch

    model = network(name, width)

    def run():
        torch.set_num_threads(threads)
        if kind == "step":
            return step(model, x)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=name.endswith("bf16")):
            return model.eval()(x)

    return run


def child_time(kind: str, width: int, side: int) -> dict:
    "Seconds of the clock by side and number of threads; the first round warms up. Forward passes of one network agree, or this fails"
    with tempfile.TemporaryDirectory() as folder:
        path = exported(width, side, folder) if kind == "infer" else ""
        runs = {(name, threads): run_of(name, kind, width, side, threads, path) for name in sides_of(kind) for threads in THREADS}
        seconds, outputs = {name: {str(threads): [] for threads in THREADS} for name, _ in runs}, {}
        for repeat in range(REPEATS + 1):
            for (name, threads), run in runs.items():
                time.sleep(PAUSE)
                begin = time.perf_counter()
                output = run()
                seconds[name][str(threads)] += [time.perf_counter() - begin] * (repeat > 0)
                if kind == "infer" and name != "monai":
                    outputs[name, threads] = output if isinstance(output, np.ndarray) else output.float().numpy()
    expected = outputs.get(("plain", 1))
    differences = {f"{name}, {threads}": float(abs(one - expected).max() / abs(expected).max()) for (name, threads), one in outputs.items()}
    wrong = {name: value for name, value in differences.items() if value > (0.1 if "bf16" in name else 1e-4)}
    if wrong:
        raise RuntimeError(f"forward passes differ: {wrong}")
    return {"seconds": seconds, "differences": differences}


def child_memory(name: str, kind: str, width: int, side: int, path: str) -> dict:
    "What two runs with two threads add to the peak of a process, MiB; a compiled network's weights among them"
    import torch  # Every side holds it, so that it counts for none

    batch({"batch": 1, "side": side})
    before = peak_mib()
    run = run_of(name, kind, width, side, 2, path)
    for _ in range(2):
        run()
    return {"added_mib": peak_mib() - before, "torch": torch.__version__}


CHILDREN = {"time": child_time, "memory": child_memory}


def measure(part: str) -> dict:
    "All sides of a part"
    kind, width, side = PARTS[part]
    found = child("time", __file__, kind=kind, width=width, side=side)
    with tempfile.TemporaryDirectory() as folder:
        path = exported(width, side, folder) if kind == "infer" else ""
        names = sides_of(kind)
        memory = {name: child("memory", __file__, name=name, kind=kind, width=width, side=side, path=path)["added_mib"] for name in names}
    return {"kind": kind, "width": width, "side": side, **found, "added_mib": memory}


def peers_table(results: dict, kind: str) -> str:
    "Each side's time over this project's fused form in the same round, and its memory"
    title = {"infer": "forward pass", "step": "training step"}[kind]
    lines = heading(
        title, "side", *(f"{count} thread{'s' * (count > 1)}, s" for count in THREADS), *(f"fused / it, {count}" for count in THREADS), "added, MiB"
    )
    for entry in results.values():
        found = entry["result"]
        if found["kind"] != kind:
            continue
        for name, seconds in found["seconds"].items():
            base = found["seconds"]["fused_bf16" if name.endswith("bf16") else "fused"]
            medians = [f"{spread(seconds[str(count)])['median']:.3f}" for count in THREADS]
            ratios = [over(base[str(count)], seconds[str(count)]) for count in THREADS]
            lines.append(row(f"width {found['width']}, {found['side']}³", SIDES[name], *medians, *ratios, f"{found['added_mib'][name]:.0f}"))
    return "\n".join(lines)


def gain_table(results: dict) -> str:
    "What a second thread gains"
    from mednext_v2.report.speed import amdahl

    lines = heading("from one thread to two", "side", "gain", "share of one thread alone", "gain of eight, extrapolated")
    for entry in results.values():
        found = entry["result"]
        for name, seconds in found["seconds"].items():
            gain, alone, eight = amdahl(*(spread(seconds[str(count)])["median"] for count in THREADS))
            what = f"{'forward pass' if found['kind'] == 'infer' else 'training step'}, width {found['width']}, {found['side']}³"
            lines.append(row(what, SIDES[name], f"{gain:.2f}", f"{100 * alone:.0f} %", f"{eight:.1f}"))
    return "\n".join(lines)


def tables(results: dict) -> str:
    return "\n\n".join([peers_table(results, "infer"), peers_table(results, "step"), gain_table(results)])


if __name__ == "__main__":
    run_script(CHILDREN, lambda asked: measure_parts(RESULTS, PARTS, measure, asked, tables))
