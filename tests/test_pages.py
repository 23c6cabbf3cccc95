"""Every page of the paper runs on a made study with eight backbones, three seeds and eight people, and says whose numbers they are"""

import json
import re

import matplotlib
import pandas as pd
import pytest

from mednext_v2.core import root
from study_toys import made_study, write_images

matplotlib.use("Agg")
HERE = root(__file__)
PAGES = sorted(path.stem for path in (HERE / "nbs/paper").glob("*.ipynb") if path.stem not in ("claims", "architecture"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A project that holds the tables of a made study, its test scans and predictions"
    folder = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", "params.yaml", "data/datasets.yaml", "data/published.csv", "data/published_compute.csv", "data/zoo.yaml", "conf"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(HERE / name)
    tables = made_study()
    (folder / "results/study").mkdir(parents=True)
    for name, table in tables.items():
        table.to_csv(folder / f"results/study/{name}.csv", index=False)
    write_images(folder, tables["scores"], "mednext_v2_base")
    return folder


def run_page(name: str, out: str) -> dict:
    "The variables of a page after its code ran here"
    names = {}
    for cell in json.loads((HERE / f"nbs/paper/{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}:{cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= dict(profile="study", out=out)
    matplotlib.pyplot.close("all")
    return names


RAW = re.compile(r"people_\w+|mednext_v\d\w+|resenc_l|stunet_base|segresnet\b|ct_full|base_mean|no_warmup|frozen_encoder")  # Names of code


@pytest.mark.parametrize("name", PAGES)
def test_every_page_runs_on_a_made_study(study, monkeypatch, name):
    monkeypatch.chdir(study)
    names = run_page(name, f"results/study/{name}")
    pages = {path.stem: path.read_text() for path in (study / "results/study" / name).glob("*.html")}
    assert pages and "nan" not in " ".join(pages.values()).lower().replace("finan", "")
    if name not in ("compute", "qualitative"):
        shown = {stem: text for stem, text in pages.items() if re.search(r"<caption>.*n = ", text)}
        assert shown, "no caption names n"
    for figure in (value for value in names.values() if isinstance(value, matplotlib.figure.Figure)):
        texts = [text.get_text() for text in figure.findobj(matplotlib.text.Text)]
        assert not [text for text in texts if RAW.search(text)]


def test_real_scans_and_validation_people_are_in_no_other_table(study, monkeypatch):
    monkeypatch.chdir(study)
    names = run_page("main_table", "results/study/main_table")
    assert set(names["scores"].scans) == {"synthetic"} and set(names["scores"].split) == {"test"}
    assert set(names["real"].scans) == {"real"} and names["real"].person.nunique() == 5
    beside = pd.read_csv(study / "results/study/main_table/real_scans.csv")
    assert set(beside.task) == {"people_bleed_ct", "people_lesion_mr"} and beside.people.max() == 3
