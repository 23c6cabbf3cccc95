"Fresh results against committed ones, in a repository of its own"

import json
import subprocess

import pandas as pd
import pytest

from mednext_v2.core import write_csv, write_json
from mednext_v2.report import provenance, verify
from mednext_v2.study import paths

CLAIM = dict(claim=1, effect=0.10, low=0.05, high=0.15, of="one less other", verdict="supported at this scale")


def score_rows(shift: float = 0.0) -> pd.DataFrame:
    rows = []
    for init, mean in (("scratch", 0.5), ("corpus", 0.6)):
        for case in range(6):
            value = mean + 0.02 * case + shift
            rows.append(dict(task="t", case=f"{case}", label="liver", group="organ", backbone="unet", init=init, seed=0, dsc=value, nsd=value))
    return pd.DataFrame(rows)


def write_results(project, weights: bytes = b"weights", shift: float = 0.0, effect: float = 0.10) -> None:
    "What `make repro` leaves of a profile with one model"
    model, results = project / "models/toy/pretrain/corpus/unet/corpus-s0", project / "results/toy"
    model.mkdir(parents=True, exist_ok=True)
    (model / "model.safetensors").write_bytes(weights)
    (results / "claims").mkdir(parents=True, exist_ok=True)
    write_csv(results / "scores.csv", score_rows(shift))
    write_csv(results / "claims/claims.csv", pd.DataFrame([CLAIM | {"effect": effect}]))
    write_json(results / "digests.json", {"models": verify.model_digests(project / "models/toy")})


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A repository whose committed results are those of `write_results`"
    for module in (verify, provenance, paths):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    write_results(tmp_path)
    (tmp_path / ".gitignore").write_text("models\nruns\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "results"]):
        subprocess.run([*git, *words], check=True)
    return tmp_path


def test_the_same_run_is_identical(project, capsys):
    assert verify.main(["toy"]) == 0
    assert "toy against HEAD: identical (3 identical)" in capsys.readouterr().out
    assert set(pd.read_csv(project / "runs/toy/verify/verify.csv").verdict) == {"identical"}


def test_other_weights_and_means_inside_their_intervals_are_within_the_noise(project, capsys):
    write_results(project, b"other weights", shift=0.005, effect=0.12)
    assert verify.main(["toy"]) == 0
    shown = capsys.readouterr().out
    assert "within the noise" in shown and "different" in shown and "outside" not in shown


@pytest.mark.parametrize(("changes", "row"), [(dict(shift=0.2), "mean DSC unet scratch"), (dict(effect=0.2), "claim 1: one less other")])
def test_what_lies_outside_is_named_and_ends_with_exit_code_1(project, capsys, changes, row):
    write_results(project, b"other weights", **changes)
    assert verify.main(["toy"]) == 1
    found = pd.read_csv(project / "runs/toy/verify/verify.csv")
    assert row in set(found[found.verdict == "outside"].what) and row in capsys.readouterr().out


def test_equal_weights_with_other_scores_are_not_identical(project):
    """The same networks, but scored otherwise: the digests alone would hide it."""
    write_results(project, shift=0.005)
    assert verify.verify_results("toy")[0] == "within the noise"
    write_results(project, shift=0.2)
    assert verify.verify_results("toy")[0] == "outside"


def test_a_backbone_that_is_gone_or_a_number_that_is_missing_is_outside(project):
    table = score_rows()
    write_csv(project / "results/toy/scores.csv", table[table.init == "scratch"])
    verdict, rows = verify.verify_results("toy")
    assert verdict == "outside" and "mean DSC unet corpus" in set(rows[rows.verdict == "outside"].what)


def test_what_is_not_there_is_named(project):
    with pytest.raises(SystemExit, match="results/other/digests.json is not there: run make repro PROFILE=other first"):
        verify.main(["other"])
    with pytest.raises(SystemExit, match="verify: results/toy/scores.csv is not in nowhere"):
        verify.main(["toy", "--revision", "nowhere"])


def test_results_that_were_committed_without_digests_are_compared_by_their_numbers(project):
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "rm", "-q", "--cached", "results/toy/digests.json"], check=True)
    subprocess.run([*git, "commit", "-qm", "older"], check=True)
    verdict, table = verify.verify_results("toy")
    assert verdict == "within the noise" and "not committed" in set(table.verdict)
    write_results(project, effect=0.2)
    assert verify.verify_results("toy")[0] == "outside"


@pytest.mark.parametrize("name", ["renamed", "corpus"])
def test_a_model_that_is_new_or_missing_is_no_noise(project, name):
    folder = project / "models/toy/pretrain/corpus"
    folder.rename(folder.with_name(name)) if name != "corpus" else (folder / "unet/corpus-s0/model.safetensors").unlink()
    write_json(project / "results/toy/digests.json", {"models": verify.model_digests(project / "models/toy")})
    assert verify.verify_results("toy")[0] == "outside"


def test_a_machine_is_recorded_once_a_run(project):
    (project / "benchmarks").mkdir()
    for _ in range(2):
        verify.main(["toy", "--record"])
    lines = (project / "benchmarks/machines.md").read_text().splitlines()
    head = subprocess.run(["git", "-C", str(project), "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert f"| toy | {head} |" in lines[-1]
    assert sum(line.startswith("| ") for line in lines) == 4 and lines[-1].endswith("| 1 of 1 | identical |")


def test_digests_name_trainings_machine_and_versions(project):
    found = verify.write_digests("toy")
    assert not found["pinned"] and found["trainings"] == [{"models": 1}], "nobody noted how the model was trained"
    note = {"key": "k", "model": found["models"]["pretrain/corpus/unet/corpus-s0"], "arithmetic": "pinned to AVX2"}
    write_json(project / "runs/toy/pretrain/corpus-unet/corpus-s0/made.json", note)
    found = verify.write_digests("toy")
    assert found["pinned"] and found["trainings"] == [{"arithmetic": "pinned to AVX2", "models": 1}]
    assert json.loads((project / "results/toy/digests.json").read_text()) == json.loads(json.dumps(found))
    assert list(found) == ["pinned", "trainings", "machine", "versions", "models"] and list(found["models"]) == ["pretrain/corpus/unet/corpus-s0"]
