"Benchmarks that need a machine which is not here still run"

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_whole_prediction_is_measured_and_labelled_as_by_nnunet(tmp_path):
    pytest.importorskip("nnunetv2")
    settings = {"BENCH_SHRINK": "0.12", "BENCH_THREADS": "1", "BENCH_TOTALSEGMENTATOR": "", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, BENCHMARKS / "whole.py", "tiny"], capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "whole.json").read_text())["tiny"]["result"]
    assert set(found["sides"]) == {"ours", "nnunet"} and "totalsegmentator" in found["failed"] and "| not available |" in done.stdout
    assert found["same_labels"]["nnunet"] > 0.99 and found["classes_seen"] > 4
    for side in found["sides"].values():
        assert side["stages"]["network"] > 0 and sum(side["stages"].values()) == pytest.approx(side["seconds"]) and side["peak_mib"] > 100
