"What made a number stands beside it, and committed results that are older than the code say so"

import io
import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from mednext_v2 import cli
from mednext_v2.core import read_yaml, sha256, write_csv, write_json
from mednext_v2.report import provenance
from mednext_v2.report.provenance import commit_in_readme, describe_provenance, is_current, provenance_file, read_provenance, write_result
from mednext_v2.report.tables import save_table
from mednext_v2.study.arithmetic import PINS
from mednext_v2.study.paths import profile_of

ROOT = Path(__file__).parents[1]
TABLE = pd.DataFrame({"task": "liver", "backbone": ["unet", "unet", "tiny"], "init": ["scratch", "corpus", "scratch"], "dsc": [0.5, 0.6, 0.7]})


def run_git(*words: str, where: Path = ROOT) -> str:
    done = subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A repository of its own, with prepared data and the stages of this one"
    (tmp_path / "params.yaml").write_text("{profile: toy, seeds: [0, 1]}")
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    (tmp_path / ".gitignore").write_text("/data/\n")
    write_csv(tmp_path / "data/prepared/toy/liver/manifest.csv", pd.DataFrame({"case": ["c1"]}))
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        run_git(*words, where=tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_scores(project: Path) -> Path:
    path = project / "results/toy/scores.csv"
    write_result(path, TABLE)
    return path


def test_a_table_says_what_made_it(project, monkeypatch):
    for name, value in PINS.items():
        monkeypatch.setenv(name, value)
    path = write_scores(project)
    found = json.loads((project / "results/toy/scores.csv.json").read_text())
    assert found == read_provenance(path)
    assert found["commit"] == run_git("rev-parse", "HEAD", where=project) and found["uncommitted"] == []
    assert (found["command"], found["stage"], found["seeds"]) == ("make repro PROFILE=toy", "collect", [0, 1])
    assert found["made_from"] == {"data/prepared/toy/liver/manifest.csv": sha256(project / "data/prepared/toy/liver/manifest.csv")}
    assert found["arithmetic"] == "pinned to AVX2" and found["versions"]["torch"] and found["processor"]
    assert found["table"] == sha256(path) and len(found["code"]) == 16
    assert is_current(path)


def test_the_same_run_gives_the_same_bytes_and_its_own_outputs_do_not_make_the_tree_dirty(project):
    path = write_scores(project)
    first = provenance_file(path).read_bytes()
    run_git("add", "-A", where=project)  # From here on git knows the results
    run_git("commit", "-qm", "results", where=project)
    write_result(path, TABLE.assign(dsc=0.1))
    (project / "params.yaml").write_text("{profile: toy, seeds: [3]}")
    write_result(path, TABLE)
    second = json.loads(provenance_file(path).read_text())
    assert second["uncommitted"] == [] and second["seeds"] == [3]
    differing = {name for name, value in json.loads(first).items() if second[name] != value}
    assert differing == {"commit", "seeds"}
    (project / "dvc.yaml").write_text((project / "dvc.yaml").read_text() + "# A change\n")
    write_result(path, TABLE)
    assert json.loads(provenance_file(path).read_text())["uncommitted"] == ["dvc.yaml"]


def test_a_project_inside_another_repository_has_no_commit_of_its_own(project, monkeypatch):
    inner = project / "copy"
    inner.mkdir()
    for name in ("dvc.yaml", "params.yaml"):
        (inner / name).write_text((project / name).read_text())
    monkeypatch.chdir(inner)
    assert provenance.describe_commit() == {"commit": "", "uncommitted": []}
    write_result(inner / "results/toy/scores.csv", TABLE)
    assert "made by commit unknown" in describe_provenance(inner / "results/toy/scores.csv", "toy")


def test_pages_have_theirs_from_save_table_and_other_folders_have_none(project, tmp_path_factory):
    write_scores(project)
    for name in ("grn", "architecture"):
        (project / "nbs/paper").mkdir(parents=True, exist_ok=True)
        (project / f"nbs/paper/{name}.ipynb").write_text("{}")
    csv = save_table(TABLE, "results/toy/grn", "effects", "Effects")[0]  # As a stage calls it: below the project's root
    found = read_provenance(csv)
    assert found["stage"] == "paper" and list(found["made_from"]) == ["nbs/paper/grn.ipynb", "results/toy/scores.csv"]
    assert is_current(csv)
    (project / "nbs/paper/grn.ipynb").write_text("{}\n")
    assert not is_current(csv), "the notebook is code too"
    other = read_provenance(save_table(TABLE, "results/toy/architecture", "architecture", "")[0])
    assert other["stage"] == "architecture" and list(other["made_from"]) == ["nbs/paper/architecture.ipynb"], "it reads no scores"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save_table(TABLE, elsewhere, "effects", "Effects")
    assert not list(elsewhere.glob("*.json")) and profile_of(elsewhere / "effects.csv") == ""


def test_provenance_of_another_table_is_not_believed(project):
    path = write_scores(project)
    write_csv(path, TABLE.assign(dsc=0.99))
    assert read_provenance(path) is None and not is_current(path)
    assert "describes another table" in describe_provenance(path, "toy")


def edit(path: Path, **changes) -> None:
    "Change what is said of a table; None takes a key away"
    found = json.loads(provenance_file(path).read_text()) | changes
    provenance_file(path).write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


def test_what_the_repository_and_the_run_contradict_is_not_believed(project):
    (project / "nbs/pipeline").mkdir(parents=True)
    (project / "nbs/pipeline/60_collect.ipynb").write_text("{}")
    (project / "conf/profile").mkdir(parents=True)
    (project / "conf/profile/toy.yaml").write_text("{profile: toy, seeds: [0, 1]}")
    for words in (["add", "-A"], ["commit", "-qm", "code"]):
        run_git(*words, where=project)
    path = write_scores(project)
    found = read_provenance(path)
    write_json(path.with_name("digests.json"), {"versions": found["versions"], "machine": {"processor": found["processor"]}, "models": {}})
    assert provenance.warn_of_provenance(path, "toy") == ""
    notebook = "nbs/pipeline/60_collect.ipynb"
    for changes, said in (
        ({"commit": "f" * 40}, "commit ffffffffffff is not in this repository"),
        ({"seeds": [99]}, "the profile has the seeds [0, 1], not [99]"),
        ({"versions": {"torch": "1.0"}}, "digests.json has other versions"),
        ({"processor": "abacus"}, "digests.json has other processor"),
        ({"stage": "paper"}, "scores.csv is made by the stage collect, not paper"),
        ({"stage": "nowhere"}, "scores.csv is made by the stage collect, not nowhere"),
        ({"made_from": {notebook: "0" * 64}}, f"holds another {notebook}"),
        ({"made_from": {"data/prepared/toy/liver/manifest.csv": "0" * 64}}, "data/prepared/toy/liver/manifest.csv is another one here"),
    ):
        write_scores(project)
        edit(path, **changes)
        assert said in provenance.warn_of_provenance(path, "toy") and said in describe_provenance(path, "toy")


@pytest.mark.parametrize("changes", [{"stage": None}, {"seeds": "99"}, {"versions": None, "table": 3}])
def test_provenance_that_lacks_something_gets_a_sentence(project, changes, capsys):
    path = write_scores(project)
    edit(path, **changes)
    assert read_provenance(path) is None and not is_current(path)
    cli.main(["results", "--profile", "toy", "--where", "1"])
    shown = capsys.readouterr().out
    assert shown.startswith("warning: nobody knows what made this table: scores.csv.json is incomplete: it lacks ") and all(name in shown for name in changes)
    provenance_file(path).write_text("{")
    assert provenance.warn_of_provenance(path, "toy").startswith("warning: nobody knows what made this table: scores.csv.json is not JSON")


def test_an_edited_table_is_announced_first_in_every_form(project, capsys):
    path = write_scores(project)
    cli.main(["results", "--profile", "toy", "--where", "1", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["provenance"] == read_provenance(path) and answer["doubts"] == ""
    write_csv(path, TABLE.assign(dsc=0.99))
    warning = "nobody knows what made this table: scores.csv.json describes another table: scores.csv was edited, or is of another run"
    for more in ([], ["--where", "1"]):
        cli.main(["results", "--profile", "toy", *more])
        assert capsys.readouterr().out.splitlines()[0] == f"warning: {warning}"
    cli.main(["results", "--profile", "toy", "--csv"])
    shown = capsys.readouterr()
    assert warning in shown.err and pd.read_csv(io.StringIO(shown.out)).shape[0] == 3
    cli.main(["results", "--profile", "toy", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["provenance"] is None and answer["doubts"] == warning


def test_a_change_of_code_that_the_table_depends_on_is_said(project, monkeypatch):
    path = write_scores(project)
    assert "which has not changed since" in describe_provenance(path, "toy")
    stages = read_yaml(project / "dvc.yaml")["stages"]
    monkeypatch.setattr(provenance, "code_digest", lambda parts: "other" if "training" in set(parts) else "same")
    assert "mednext_v2/training" in stages["collect"]["deps"]
    assert not is_current(path) and "which has changed since" in describe_provenance(path, "toy")


def test_the_command_line_prints_rows_and_what_made_them(project, capsys):
    write_scores(project)
    cli.main(["results", "--profile", "toy", "--where", "backbone=unet,init=scratch"])
    shown = capsys.readouterr().out
    assert "0.5" in shown and "0.6" not in shown and "tiny" not in shown
    commit = run_git("rev-parse", "HEAD", where=project)[:12]
    assert f"made by commit {commit}, with make repro PROFILE=toy (stage collect)" in shown and "data/prepared/toy/liver " in shown and "seeds 0, 1" in shown
    cli.main(["results", "--profile", "toy", "--where", "3"])
    assert "tiny" in (shown := capsys.readouterr().out) and "unet" not in shown
    cli.main(["results", "--profile", "toy"])
    assert "made by" not in capsys.readouterr().out
    cli.main(["results", "--profile", "toy", "--where", "init=scratch", "--csv"])
    assert pd.read_csv(io.StringIO(capsys.readouterr().out)).shape[0] == 2


def test_results_without_provenance_name_the_commit_of_their_readme(project, capsys):
    provenance_file(write_scores(project)).unlink()
    cli.main(["results", "--profile", "toy", "--where", "1"])
    assert "not available (there is no scores.csv.json): make it again with make repro PROFILE=toy" in capsys.readouterr().out
    (project / "results/toy/README.md").write_text("Made by the code of commit 0123abc. It is old.\n")
    cli.main(["results", "--profile", "toy", "--where", "1"])
    assert "not available (there is no scores.csv.json): made by commit 0123abc, see results/toy/README.md" in capsys.readouterr().out


def unexplained(profile: str, tables: list[Path]) -> str:  # Empty if all is well
    "Why the committed results of a profile mislead: older than the code, and no commit named, or a wrong one"
    if all(is_current(path) for path in tables):
        return ""
    if not (named := commit_in_readme(profile)):
        old = next(path.name for path in tables if not is_current(path))
        return f"{old} was made by other code: say in results/{profile}/README.md 'Made by the code of commit …', or run make repro"
    makers = {found["commit"] for path in tables if (found := read_provenance(path))}
    wrong = [maker for maker in makers if maker and not maker.startswith(named)]
    return f"results/{profile}/README.md names commit {named}, its tables were made by {', '.join(wrong)}" if wrong else ""


def test_results_that_are_older_than_the_code_must_name_their_commit(project, monkeypatch):
    path = write_scores(project)
    readme = project / "results/toy/README.md"
    assert unexplained("toy", [path]) == ""
    monkeypatch.setattr(provenance, "code_digest", lambda parts: "other")
    assert "scores.csv was made by other code" in unexplained("toy", [path])
    readme.write_text("Made by the code of commit 0123abc.")
    assert "names commit 0123abc, its tables were made by" in unexplained("toy", [path])
    readme.write_text(f"Made by the code of commit {read_provenance(path)['commit'][:7]}.")
    assert unexplained("toy", [path]) == ""


COMMITTED = sorted({line.split("/")[1] for line in run_git("ls-files", "results").splitlines()})


@pytest.mark.parametrize("profile", COMMITTED)
def test_committed_results_are_of_this_code_or_name_the_commit_that_made_them(profile):
    tables = [ROOT / name for name in run_git("ls-files", f"results/{profile}").splitlines() if name.endswith(".csv")]
    assert len(tables) > 4 and unexplained(profile, tables) == ""
    commit = commit_in_readme(profile)
    if commit and run_git("rev-parse", "--is-shallow-repository") == "false":
        run_git("merge-base", "--is-ancestor", commit, "HEAD")  # It is there, and it came before
    assert [warning for path in tables if (warning := provenance.warn_of_provenance(path, profile)) and "is another one here" not in warning] == []


def test_every_writer_of_results_goes_through_one_function():
    """A stage that wrote a table with `write_csv` would leave it without provenance."""
    thin = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nbs/paper").glob("*.ipynb"))
    assert "write_csv" not in thin and "to_csv" not in thin
    for name in ("collect", "tables", "analysis", "claims", "power", "speed", "forecast"):
        assert "write_csv" not in (ROOT / f"mednext_v2/report/{name}.py").read_text(encoding="utf-8"), name
