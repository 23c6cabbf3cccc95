"Benchmarks that need a machine which is not here still run"

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_gpu_benchmark_runs_on_a_cpu_and_reports_what_failed(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--device", "cpu", "--width", "2", "--repeats", "1", "--out", out]
    done = subprocess.run([*command, "--side", "32", "--sides", "monai", "fused", "last", "block"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["result"]
    assert set(found) == {"monai", "fused", "last", "block"} and all(len(one["step"]) == 1 for one in found.values())
    assert "| plain, channels last |" in done.stdout and "Error" not in done.stdout and "nan" not in done.stdout
    done = subprocess.run([*command, "--side", "16", "--sides", "block"], capture_output=True, text=True)
    assert done.returncode == 0 and "leaves one voxel" in done.stdout


def test_without_a_gpu_the_gpu_benchmark_says_so():
    import torch

    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
        assert done.returncode and "--device cpu runs the same code" in done.stderr
