"Fresh results against committed ones, in a repository of its own"

import json
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

import rehearsal
from mednext_v2.core import sha256, write_csv, write_json
from mednext_v2.report import provenance, verify
from mednext_v2.study import paths

CLAIM = dict(claim=1, effect=0.10, low=0.05, high=0.15, of="one less other", verdict="supported")


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
    write_csv(results / "models.csv", pd.DataFrame({"backbone": ["unet"], "parameters": [10], "seconds": [4.5], "peak_mib": [600]}))
    write_json(results / "digests.json", {"models": verify.model_digests(project / "models/toy")})
    for stage in ("collect", "paper/claims"):
        (project / "runs/toy" / stage).mkdir(parents=True, exist_ok=True)
        (project / "runs/toy" / stage / "notebook.ipynb").write_text("{}")


def commit_all(project) -> None:
    git = ["git", "-C", str(project), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["add", "-A"], ["commit", "-qm", "results"]):
        subprocess.run([*git, *words], check=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A repository whose committed results are those of `write_results`"
    for module in (verify, provenance, paths):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    write_results(tmp_path)
    (tmp_path / "nbs/paper").mkdir(parents=True)
    (tmp_path / "nbs/paper/claims.ipynb").write_text("{}")
    (tmp_path / ".gitignore").write_text("/models\n/runs\n")
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    commit_all(tmp_path)
    return tmp_path


def test_the_same_run_is_identical(project, capsys):
    assert verify.main(["toy"]) == 0
    assert "toy against HEAD: identical (4 identical)" in capsys.readouterr().out
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


def failing(profile: str = "toy") -> dict[str, str]:
    "What is outside, new, missing or broken, by the end of its name"
    verdict, rows = verify.verify_results(profile)
    rows = rows[rows.verdict.isin(verify.FAILED)]
    assert (verdict == "outside") == bool(len(rows))
    return {what.removeprefix("results/toy/"): word for what, word in zip(rows.what, rows.verdict)}


def test_equal_weights_with_other_scores_are_outside(project, capsys):
    """The same networks, but scored otherwise: neither the digests nor an interval may hide it."""
    write_results(project, shift=0.005)
    assert verify.main(["toy"]) == 1
    assert failing() == {"scores.csv": "outside"}
    shown = capsys.readouterr().out
    assert "row 1, dsc: 0.505" in shown and "the weights are the same, so evaluation or the pages have changed, or a file was edited" in shown


def test_a_network_with_equal_weights_has_equal_scores_even_if_another_differs(project):
    other = project / "models/toy/finetune/scratch/unet/t-s0"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"of scratch")
    write_results(project)
    commit_all(project)
    write_results(project, b"other weights")
    assert failing() == {}
    table = score_rows()
    write_csv(project / "results/toy/scores.csv", table.assign(dsc=table.dsc + 0.001 * (table.init == "corpus")))
    assert failing() == {}
    write_csv(project / "results/toy/scores.csv", table.assign(dsc=table.dsc + 0.001 * (table.init == "scratch")))
    assert failing() == {"scores of finetune/scratch/unet/t-s0": "outside"}


@pytest.mark.parametrize("weights", [b"weights", b"other weights"])
@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("models.csv", None, "missing"),
        ("models.csv", '"x', "broken"),
        ("models.csv", "", "broken"),
        ("models.csv", "backbone,parameters,seconds,peak_mib\nunet,10,soon,600\n", "outside"),
        ("mine.csv", "a\n1\n", "new"),
        ("scores.csv", None, "missing"),
        ("scores.csv", ",".join(score_rows()) + "\n", "outside"),
        ("scores.csv", score_rows().assign(dsc="high").to_csv(index=False), "outside"),
        ("scores.csv", score_rows().assign(task="other").to_csv(index=False), "outside"),
        ("claims/claims.csv", None, "missing"),
    ],
)
def test_a_table_that_is_gone_broken_or_of_other_runs_is_named(project, weights, name, text, word):
    write_results(project, weights)
    path = project / "results/toy" / name
    path.unlink() if text is None else path.write_text(text)
    assert failing() == {name: word}


def test_measured_columns_alone_may_differ(project, capsys):
    table = pd.DataFrame({"backbone": ["unet"], "parameters": [10], "seconds": [9.9], "peak_mib": [601]})
    write_csv(project / "results/toy/models.csv", table)
    assert verify.main(["toy"]) == 0
    shown = capsys.readouterr().out
    assert "toy against HEAD: identical (3 identical, 1 identical but for times and memory)" in shown and "results/toy/models.csv" in shown
    write_csv(project / "results/toy/models.csv", table.assign(parameters=11))
    assert failing() == {"models.csv": "outside"}


@pytest.mark.parametrize("column", ["of", "verdict"])
def test_another_pair_or_verdict_of_a_claim_is_outside(project, column):
    write_results(project, b"other weights", effect=0.11)
    write_csv(project / "results/toy/claims/claims.csv", pd.DataFrame([CLAIM | {column: "A less B"}]))
    verdict, rows = verify.verify_results("toy")
    assert verdict == "outside" and set(rows[rows.verdict == "outside"].ours) == {f"{column}: A less B"}


def test_a_claim_that_is_gone_is_missing(project):
    two = [CLAIM, CLAIM | {"claim": 2}]
    assert verify.compare_claims(pd.DataFrame(two[:1]), pd.DataFrame(two)).verdict.tolist() == ["within the noise", "missing"]
    assert verify.compare_claims(pd.DataFrame(two), pd.DataFrame(two[1:])).verdict.tolist() == ["new", "within the noise"]


def refused(capsys, *arguments: str) -> str:
    assert verify.main(list(arguments)) == 2
    return capsys.readouterr().err


def test_a_clone_without_a_run_is_refused(project, capsys):
    for name in ("models", "runs"):
        shutil.rmtree(project / name)
    assert "models/toy holds no model, so there is no run to compare: run make repro PROFILE=toy first" in refused(capsys, "toy", "--record")
    assert not (project / "benchmarks/machines.md").exists()


@pytest.mark.parametrize("stage", ["collect", "paper/claims"])
def test_a_run_that_was_killed_is_refused(project, capsys, stage):
    (project / "runs/toy" / stage / "notebook.ipynb").unlink()
    assert f"the last run has not ended (not done here: {stage.split('/')[-1]}): run make repro PROFILE=toy first" in refused(capsys, "toy")
    (project / "models/toy/pretrain/corpus/unet/corpus-s0/model.safetensors").write_bytes(b"newer")
    assert "does not describe the models in models/toy" in refused(capsys, "toy")


def write_provenance(path: Path, **more) -> None:
    found = {name: kind() for name, kind in provenance.SHAPE.items()} | {"table": sha256(path)} | more
    write_json(provenance.provenance_file(path), found)


def test_pages_of_an_earlier_run_are_refused(project, capsys):
    scores, page = project / "results/toy/scores.csv", project / "results/toy/claims/claims.csv"
    write_provenance(scores)
    write_provenance(page, made_from={"results/toy/scores.csv": sha256(scores)})
    commit_all(project)
    assert failing() == {}
    write_results(project, shift=0.1)  # Edited: the page is not to blame
    assert failing() == {"scores.csv": "outside", "scores.csv.json": "outside"}
    write_provenance(scores)
    assert "the last run has not ended (made from tables of an earlier run: claims)" in refused(capsys, "toy")


def test_what_cannot_be_compared_is_named(project, capsys):
    assert "results/toy/scores.csv is not in nowhere" in refused(capsys, "toy", "--revision", "nowhere")
    write_json(project / "results/toy/digests.json", {})
    assert "results/toy/digests.json does not list digests under `models`" in refused(capsys, "toy")
    (project / "conf/profile").mkdir(parents=True)
    (project / "conf/profile/toy.yaml").write_text("profile: toy")
    for name in ("nonsense", "../x", ""):
        assert f"no profile is called {name!r}; conf/profile holds: toy" in refused(capsys, name)


def test_results_that_were_committed_without_digests_are_compared_by_their_numbers(project):
    text = (project / "results/toy/digests.json").read_text()
    (project / "results/toy/digests.json").unlink()
    commit_all(project)
    (project / "results/toy/digests.json").write_text(text)
    verdict, table = verify.verify_results("toy")
    assert verdict == "within the noise" and "not committed" in set(table.verdict)
    write_results(project, shift=0.005)
    assert verify.verify_results("toy")[0] == "within the noise"
    write_results(project, effect=0.2)
    assert verify.verify_results("toy")[0] == "outside"


@pytest.mark.parametrize("name", ["renamed", "corpus"])
def test_a_model_that_is_new_or_missing_is_no_noise(project, name):
    folder = project / "models/toy/pretrain/corpus"
    shutil.copytree(folder, folder.with_name("further"))
    write_results(project)
    commit_all(project)
    folder.rename(folder.with_name(name)) if name != "corpus" else (folder / "unet/corpus-s0/model.safetensors").unlink()
    write_json(project / "results/toy/digests.json", {"models": verify.model_digests(project / "models/toy")})
    gone = {"weights pretrain/corpus/unet/corpus-s0": "missing"}
    assert failing() == gone | ({"weights pretrain/renamed/unet/corpus-s0": "new"} if name == "renamed" else {})


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


@pytest.mark.parametrize(
    "code, processor, expected",
    [
        (0, ("Xeon", "AVX-512"), 0),
        (1, ("Xeon", "AVX-512"), 1),  # It gave the committed numbers once
        (1, ("Xeon", "AVX2"), 0),
        (1, ("EPYC", "AVX2"), 0),  # There others came out, and were noted
        (2, ("EPYC", "AVX2"), 2),  # Nothing to compare is an error everywhere
    ],
)
def test_a_rehearsal_fails_where_the_numbers_were_made_before(code, processor, expected):
    rows = ["mini | abc | Xeon | AVX-512 | 99 | 2.13 | 53 of 53 | identical", "study | abc | Xeon | AVX2 | 99 | 2.13 | 9 of 9 | identical"]
    rows.append("mini | abc | EPYC | AVX2 | 99 | 2.13 | 3 of 53 | outside")
    machines = verify.HEADING + "".join(f"| 2026-11-30 | {row} |\n" for row in rows)
    assert rehearsal.judge(code, machines, dict(zip(("processor", "instructions"), processor))) == expected


def test_means_are_of_test_people_and_what_was_scored_includes_the_person():
    row = dict(task="t", case="c", label="a", group="organ", backbone="unet", init="scratch", seed=0, person="p", scans="synthetic", split="test")
    table = pd.DataFrame(
        [row | dict(dsc=0.5, nsd=0.5), row | dict(case="v", split="validation", dsc=0.1, nsd=0.1), row | dict(case="r", scans="real", dsc=0.0, nsd=0.0)]
    )
    assert verify.of_tests(table).case.tolist() == ["c"]
    before = table.drop(columns=["split", "scans", "person"])
    assert len(verify.of_tests(before)) == 3  # A table of an earlier version holds tests alone
    header = list(table)
    rows = [header, *table.astype(str).values.tolist()]
    other = [list(cells) for cells in rows]
    other[1][header.index("person")] = "q"
    assert verify.differs_in_kind(other, rows) == ("row 1, person: q", "p") and verify.differs_in_kind(rows, rows) == ("", "")


def test_a_page_that_shows_fewer_columns_than_its_csv_hides_its_times():
    from mednext_v2.report.verify import hide_measured

    header = ["backbone", "dsc", "dsc_low", "dsc_high", "seconds"]
    shown = [[r"\toprule"], ["backbone", "DSC", "seconds of a training"], ["U-Net", "28.4", "15"]]
    assert hide_measured([list(row) for row in shown], "backbones/backbones", header)[-1] == ["U-Net", "28.4", "measured"]
    assert hide_measured([list(row) for row in shown], "grn/effects", header) == shown
