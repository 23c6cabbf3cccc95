"Benchmarks that need a machine which is not here still run, and `make bench` finds what changed"

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
compare = importlib.import_module("compare")


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


# ---------------------------------------------------------------- make bench


def a_block(cpu: str = "A", gflops: float = 100, slow: float = 1, noise: float = 0.02, tensors: float = 0.08, **about) -> dict:
    "What block.py writes for one part: this project's step takes 0.3 of MONAI's, times `slow`"
    repeats = [1 - noise, 1, 1 + noise]
    seconds = {kind: {"monai": [1.0] * 3, "fused": [0.3 * slow * one for one in repeats]} for kind in ("step", "infer")}
    memory = {"monai": {"added_mib": 1000, "alive_mib": 1000}, "fused": {"added_mib": 120, "alive_mib": 1000 * tensors}}
    result = {"case": {"width": 16, "side": 64, "depths": [1]}, "peaks": {"flops": gflops * 1e9}, "seconds": seconds, "memory": memory}
    return {"mini": {"machine": {"cpu": cpu, "date": "2026-01-01", "load_before": [0.1, 0, 0], **about}, "result": result}}


def compared(then: dict, now: dict, asked=(("block", "mini"),)) -> tuple:
    "Verdicts by name, notes, and the whole text"
    read = [{("block", part): found for part, found in compare.block_parts(results).items()} for results in (then, now)]
    rows, notes = compare.compare(*read, list(asked))
    return {one.what.partition(" ")[0]: one.verdict for one in rows}, notes, compare.report(rows, notes, compare.processors(*read, list(asked)))


def test_a_regression_is_found_and_comes_first():
    verdicts, notes, text = compared(a_block(), a_block(slow=1.3))
    assert verdicts == {"step": "slower", "forward": "slower", "memory": "same", "tensors": "same"} and not notes
    first, _, rest = text.partition("All ratios")
    assert (
        first.startswith("Regressions: 2 of 4 ratios")
        and "| step / MONAI's, width 16, 64³ | 0.300 (0.294 to 0.306) | 0.390 (0.382 to 0.398) | +30 % | slower |" in first
    )
    assert "memory of a step" in rest and "Measured on" not in text
    assert compared(a_block(), a_block(slow=0.7))[0]["step"] == "faster"


def test_noise_is_no_regression():
    assert set(compared(a_block(), a_block(slow=1.09))[0].values()) == {"same"}  # Less than noise, although ranges do not meet
    assert compared(a_block(noise=0.2), a_block(slow=1.3, noise=0.2))[0]["step"] == "same"  # Ranges meet
    lone = compare.Ratio([0.3]), compare.Ratio([0.36])  # One repeat each
    assert compare.judge(*lone, True) == "same" and compare.judge(lone[0], compare.Ratio([0.6]), True) == "slower"
    assert "one repeat" in str(lone[0])


def test_what_is_counted_has_little_noise_on_any_processor():
    assert compared(a_block(), a_block("B", tensors=0.09))[0]["tensors"] == "more"
    assert compared(a_block(), a_block("B", tensors=0.07))[0]["tensors"] == "less"


@pytest.mark.parametrize("now", [a_block("B", slow=1.6), a_block("A", gflops=200, slow=1.6)], ids=["name", "rate"])
def test_another_processor_is_named_and_not_blamed(now):
    verdicts, _, text = compared(a_block(), now)
    assert verdicts["step"] == "not comparable: another processor"
    assert text.startswith("Regressions: 0 of 4") and "Changed, not comparable: 2" in text
    assert "block mini: another processor (committed: A, 100 GFLOP/s a core, 2026-01-01; now: " in text and "expected" in text


def test_a_processor_that_was_not_recorded_is_named():
    then = a_block()
    del then["mini"]["machine"]["cpu"]
    verdicts, _, text = compared(then, a_block(slow=2))
    assert verdicts["step"] == "not comparable: processor not recorded" and "perhaps another processor (committed: a processor that was not recorded" in text


def test_family_and_model_say_more_than_a_noisy_rate():
    zen = {"family": "25", "model": "1"}
    assert compared(a_block(**zen), a_block(gflops=40, slow=1.5, **zen))[0]["step"] == "slower"
    assert compared(a_block(**zen), a_block(slow=1.5, family="25", model="17"))[0]["step"] == "not comparable: another processor"


def test_missing_parts_and_other_work_are_named():
    asked = [("block", "mini"), ("metrics", "")]
    _, notes, text = compared(a_block(), a_block(load_before=[3.2, 1, 1]), asked)
    assert notes == ["metrics: missing in this run"] and "- metrics: missing in this run" in text
    assert "block mini: other work shared the cores when it began (a load of 3.2)" in text
    assert compared({}, a_block())[1] == ["block mini: missing in the committed results; `make bench-full` takes them anew"]
    now = a_block()
    now["mini"]["result"]["seconds"]["step"]["unet"] = [1.0] * 3
    assert compared(a_block(), now)[1] == ["block mini: step / nnU-Net's U-Net's, width 16, 64³ is missing in the committed results"]


def test_a_step_that_does_not_fit_is_left_out_by_name(monkeypatch):
    assert compare.fits(500, 100, 0.5, 600) and not compare.fits(500, 100, 1.2, 600)
    monkeypatch.setattr(compare, "run_step", lambda script, part, *_: "failed: no such thing" if script == "block" else "")
    reasons = compare.run([("block", "mini", 1, 1), ("data", "speed", 1, 1000), ("metrics", "", 1, 1)], 60)
    assert reasons["block", "mini"] == "failed: no such thing" and "no time left" in reasons["data", "speed"] and len(reasons) == 2


def test_a_step_that_fails_or_hangs_ends_with_its_children(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compare, "HERE", tmp_path)
    (tmp_path / "fails.py").write_text("print('first', flush=True); raise ValueError('no such peer')")
    assert compare.run_step("fails", "", 1, 60) == "failed: ValueError: no such peer" and "    first" in capsys.readouterr().err
    words = "import os, subprocess, sys; assert os.environ['BENCH_SHORT'] == '1'; print(sys.argv[1], os.environ['BENCH_REPEATS'])"
    (tmp_path / "runs.py").write_text(words)
    assert compare.run_step("runs", "part", 3, 60) == "" and "    part 3" in capsys.readouterr().err
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)'])"
    (tmp_path / "hangs.py").write_text(child)
    begin = time.perf_counter()
    assert compare.run_step("hangs", "", 1, 1) == "stopped after 1 s: no time left" and time.perf_counter() - begin < 20


def test_strict_alone_sets_the_exit_code(monkeypatch, tmp_path, capsys):
    for name, results in (("then", a_block()), ("now", a_block(slow=2))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "block.json").write_text(json.dumps(results))
    monkeypatch.setattr(compare, "COMMITTED", tmp_path / "then")
    monkeypatch.setattr(compare, "FRESH", tmp_path / "now")
    for arguments, code in (([], 0), (["--strict"], 1)):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--table", "block", *arguments])
        assert compare.main() == code and "Regressions: 2" in capsys.readouterr().out
    assert (tmp_path / "now" / "report.md").read_text().startswith("Regressions: 2")


def test_every_step_is_a_part_of_a_script_whose_committed_results_can_be_read():
    assert sum(seconds for *_, seconds in compare.STEPS) < 600
    committed = compare.read_parts(compare.COMMITTED)
    assert {(script, part) for script, part, *_ in compare.STEPS} <= set(committed)
    assert all(value > 0 for part in committed.values() for ratio in part.ratios.values() for value in ratio.values)


def test_a_short_run_never_writes_over_the_committed_results(tmp_path):
    words = "import block, data, inference, metrics, storage; print(block.RESULTS, inference.RESULTS, data.RESULTS, data.results_file('metrics'))"
    for short, folder in (("1", "runs/bench"), ("", "benchmarks/results")):
        command = [sys.executable, "-c", words]
        out = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS, env=os.environ | {"BENCH_SHORT": short}, check=True).stdout.split()
        assert [Path(path).parent for path in out] == [BENCHMARKS.parent / folder] * 4
