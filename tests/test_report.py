"""From scores to tables and figures: the declared mean, intervals, provenance of reported numbers, equal bytes"""

import json
import re
import shutil
import subprocess

import matplotlib
import numpy as np
import pandas as pd
import pytest

from mednext_v2.core import root
from mednext_v2.data.datasets import Dataset
from mednext_v2.evaluation.statistics import declared_mean
from mednext_v2.report import tables
from mednext_v2.report.tables import caption, format_main_table, gains, main_table, published, save_figure, save_table, score_text, summary

matplotlib.use("Agg")

# Facts known of the paper: model, pretraining, patch, DSC, NSD
FACTS = [
    ("nnU-Net", "", None, 80.57, 78.49),
    ("ResEnc-L", "", None, 81.65, 79.72),
    ("MedNeXt-v2 Base", "", 128, 82.31, 80.34),
    ("nnU-Net", "TotalSegmentator CT", None, 81.20, 78.86),
    ("ResEnc-L", "CADS (22k CT)", None, 82.55, 80.31),
    ("STU-Net-L", "AbdomenAtlas 1.0", None, 81.83, 79.56),
    ("MedNeXt-v2 Base", "CADS (18k CT)", 128, 82.95, 81.06),
    ("MedNeXt-v2 Base", "CADS (18k CT)", 192, 83.70, 81.77),
]


def make_scores(seed=0, cases=4, tasks=None, backbones=("mednext_v2_tiny", "unet"), seeds=(0,), share_nan=0.1):
    "Random scores in the columns of scores.csv, some of them absent"
    generator = np.random.default_rng(seed)
    tasks = tasks or {"abdomen_ct": ("liver", "spleen", "rib"), "liver_lesion_ct": ("liver", "lesion")}
    rows = [
        dict(
            profile="mini",
            task=task,
            case=f"{task}_{case}",
            person=f"{task}_{case}",
            scans="deformed",
            split="test",
            label=label,
            group="pathology" if label == "lesion" else "organ",
            backbone=backbone,
            init=init,
            patch="32x32x16",
            seed=s,
            dsc=generator.uniform(),
            nsd=generator.uniform(),
            n_voxels=5,
            n_predicted=5,
        )
        for task, labels in tasks.items()
        for case in range(cases)
        for label in labels
        for backbone in backbones
        for init in ("scratch", "corpus_ct")
        for s in seeds
    ]
    scores = pd.DataFrame(rows)
    absent = generator.uniform(size=len(scores)) < share_nan
    scores.loc[absent, ["dsc", "nsd"]] = np.nan
    return scores


def loop_mean(scores: pd.DataFrame, metric: str) -> float:
    "Written out, with a case for each person: classes, then people and seeds (people that have all seeds), then tasks"
    tasks = []
    for task in scores.task.unique():
        people = []
        for _, rows in scores[scores.task == task].groupby("case"):
            seeds = [part[metric].dropna().mean() for _, part in rows.groupby("seed")]
            if np.isfinite(seeds).all():
                people.append(sum(seeds) / len(seeds))
        if people:
            tasks.append(sum(people) / len(people))
    return sum(tasks) / len(tasks)


def test_published_holds_exactly_the_known_figures():
    table = published()
    known = table[table.value.notna()]
    found = {(row.model, row.pretraining, None if pd.isna(row.patch) else int(row.patch), row.metric): row.value for row in known.itertuples()}
    expected = {(m, t, p, metric): v for m, t, p, *values in FACTS for metric, v in zip(("DSC", "NSD"), values)}
    assert found == expected
    assert (table.source == "arXiv:2512.17774").all()
    assert known.known.str.contains("not checked").all()
    assert (table[table.value.isna()].known == "not available").all()
    assert (table.init == np.where(table.pretraining == "", "scratch", "pretrained"))[table.pretraining != ""].all()


def test_published_names_backbones_that_exist():
    from mednext_v2.models.registry import BACKBONES

    assert set(published().backbone) - {""} <= set(BACKBONES)


def test_published_refuses_other_columns_and_values_without_a_source(tmp_path):
    text = (root() / "data/published.csv").read_text()
    (tmp_path / "a.csv").write_text(text.replace("model,", "network,", 1))
    with pytest.raises(ValueError, match="needs the columns model, backbone"):
        published(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text(text.replace(",80.57,arXiv:2512.17774,", ",80.57,,", 1))
    with pytest.raises(ValueError, match="line 2 has a value and no source"):
        published(tmp_path / "b.csv")
    with pytest.raises(FileNotFoundError, match="c.csv is missing"):
        published(tmp_path / "c.csv")


@pytest.mark.parametrize("by", [["backbone", "init"], ["task", "backbone", "init"], ["group", "init"], ["backbone"]])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_summary_equals_the_mean_written_out(by, seeds):
    scores = make_scores(seeds=seeds)
    if by == ["backbone"]:
        scores = scores[scores.init == "scratch"]
    if by == ["group", "init"]:
        scores = scores[scores.backbone == "unet"]
    table = summary(scores, by)
    assert len(table) == len(scores[by].drop_duplicates())
    for row in table.to_dict("records"):
        part = scores[np.logical_and.reduce([scores[column] == row[column] for column in by])]
        for metric in ("dsc", "nsd"):
            assert row[metric] == pytest.approx(loop_mean(part, metric), abs=1e-12)
            assert row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"]
        assert row["cases"] == part[["task", "case"]].drop_duplicates().shape[0]
        assert row["seeds"] == len(seeds)


def test_summary_does_not_depend_on_the_order_of_rows():
    scores = make_scores()
    shuffled = scores.sample(frac=1, random_state=3)
    by = ["backbone", "init"]
    pd.testing.assert_frame_equal(summary(scores, by).sort_values(by, ignore_index=True), summary(shuffled, by).sort_values(by, ignore_index=True))


def test_a_large_task_does_not_outvote_a_small_one():
    tasks = {"abdomen_ct": tuple("abcdefghi"), "liver_lesion_ct": ("lesion",)}
    scores = make_scores(tasks=tasks, share_nan=0)
    scores["dsc"] = np.where(scores.task == "abdomen_ct", 0.2, 0.8)
    assert summary(scores, ["backbone", "init"]).dsc.tolist() == pytest.approx([0.5] * 4)


def test_summary_averages_over_backbones_only_when_asked_to():
    scores = make_scores(share_nan=0)
    with pytest.raises(ValueError, match=r"keep the column\(s\) backbone, init"):
        summary(scores, ["task"])


def test_summary_refuses_rows_that_are_there_twice_and_missing_columns():
    scores = make_scores()
    with pytest.raises(ValueError, match="2 row"):
        summary(pd.concat([scores, scores.head(2)]), ["backbone", "init"])
    with pytest.raises(ValueError, match="need the column.* dsc; they have"):
        summary(scores.drop(columns="dsc"), ["backbone", "init"])


def test_a_class_that_is_never_scored_is_left_out():
    scores = make_scores(share_nan=0)
    base = summary(scores[scores.label != "rib"], ["backbone", "init"])
    scores.loc[scores.label == "rib", ["dsc", "nsd"]] = np.nan
    assert summary(scores, ["backbone", "init"]).dsc.tolist() == pytest.approx(base.dsc.tolist())


def test_declared_mean_is_nan_without_scores_and_warns_of_nothing():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(declared_mean([np.full((3, 2), np.nan)])).all()
        assert declared_mean([np.full((3, 2), np.nan), np.full((3, 2), 0.5)]).tolist() == [0.5]


def test_gains_are_paired():
    scores = make_scores(share_nan=0)
    key = ["task", "case", "label", "backbone", "seed"]
    base = scores[scores.init == "scratch"].set_index(key)
    other = base.reset_index().assign(init="corpus_ct")
    other["dsc"] = other.dsc + np.where(other.label == "lesion", 0.3, 0.1)
    table = gains(pd.concat([base.reset_index(), other]), ["group", "backbone"])
    assert table.groupby("group").dsc.first().to_dict() == pytest.approx({"organ": 0.1, "pathology": 0.3})
    assert (table.init == "corpus_ct").all() and len(table) == 4
    np.testing.assert_allclose(table.dsc_high - table.dsc_low, 0, atol=1e-12)


def test_gains_leave_out_what_has_no_partner():
    scores = make_scores(share_nan=0)
    whole = gains(scores, ["backbone"])
    extra = make_scores(seed=9, tasks={"brain_mr": ("insula",)}, share_nan=0)
    more = pd.concat([scores, extra[extra.init == "corpus_ct"]])
    pd.testing.assert_frame_equal(gains(more, ["backbone"]), whole)
    with pytest.raises(ValueError, match="no case, class and seed"):
        gains(scores[scores.init == "scratch"], ["backbone"])


def test_main_table_keeps_reported_and_regenerated_apart():
    scores = make_scores()
    table = main_table(scores, published())
    ran = table.init.notna()
    assert ran.sum() == 4 and ran.tolist() == sorted(ran, reverse=True)
    mean = summary(scores, ["backbone", "init"])
    assert table.mean_dsc[ran].tolist() == mean.dsc.tolist()
    by_task = summary(scores, ["task", "backbone", "init"]).query("task == 'abdomen_ct'")
    assert table.abdomen_ct_nsd[ran].tolist() == by_task.nsd.tolist()
    assert table.mean_dsc[~ran].isna().all()
    # Every reported row appears exactly once, and numbers stay where they belong
    assert sorted(table.reported_dsc_percent.dropna()) == sorted(fact[3] for fact in FACTS)
    unet = table[(table.backbone == "unet") & ran].set_index("init")
    assert unet.reported_dsc_percent.to_dict() == {"scratch": 80.57, "corpus_ct": 81.20}
    assert table[(table.backbone == "mednext_v2_tiny")].reported_dsc_percent.isna().all()


def test_main_table_joins_base_at_its_own_patch():
    scores = make_scores(backbones=("mednext_v2_base",))
    table = main_table(scores, published()).query("backbone == 'mednext_v2_base'")
    assert table.reported_dsc_percent.tolist() == [82.31, 82.95, 83.70]
    assert table.init.isna().tolist() == [False, False, True]


def test_main_table_of_two_corpora_gives_the_reported_figure_once():
    scores = make_scores(backbones=("mednext_v2_base",))
    second = scores[scores.init == "corpus_ct"].assign(init="corpus_mr")
    table = main_table(pd.concat([scores, second]), published())
    assert table[table.init == "corpus_mr"].reported_dsc_percent.isna().all()
    assert (table.reported_dsc_percent == 82.95).sum() == 1


def test_rows_at_another_patch_have_no_mean_unless_all_tasks_ran():
    scores = make_scores(share_nan=0)
    small = scores[scores.backbone == "mednext_v2_tiny"].assign(ablation="scaling", variant="context", patch="48x48x16")
    everything = main_table(scores, published(), small)
    assert everything[everything.side == 48].mean_dsc.notna().all() and (everything.side == 48).sum() == 2
    part = main_table(scores, published(), small[small.task == "abdomen_ct"])
    rows = part[part.side == 48]
    assert rows.mean_dsc.isna().all() and rows.liver_lesion_ct_dsc.isna().all() and rows.abdomen_ct_dsc.notna().all()
    assert rows.reported_dsc_percent.isna().all()
    cells = format_main_table(part, {}, "mini")[("regenerated, profile mini: DSC over NSD, %", "liver_lesion_ct")]
    assert cells[part.side == 48].eq("not run").all() and not cells[part.side == 32].eq("not run").any()
    # What was run as a main run is not shown twice
    again = scores[scores.backbone == "mednext_v2_tiny"].assign(ablation="scaling", variant="base")
    assert len(main_table(scores, published(), again)) == len(main_table(scores, published()))


def test_reported_rows_stand_beside_the_same_patch():
    wide = make_scores(backbones=("mednext_v2_base",)).assign(patch="192x192x96")
    narrow = wide[wide.init == "corpus_ct"].assign(patch="128x128x96", ablation="scaling", variant="base")
    table = main_table(wide, published(), narrow).query("backbone == 'mednext_v2_base' and init == 'corpus_ct'").set_index("side")
    assert table.reported_dsc_percent.to_dict() == {192: 83.70, 128: 82.95}


def test_what_cannot_be_told_from_the_best_is_marked():
    scores = make_scores(share_nan=0, cases=12, seeds=(0, 1, 2))
    clear = scores.backbone == "unet"
    scores.loc[clear, "dsc"] = 0.01 * scores.dsc[clear]
    table = main_table(scores, published()).query("init.notna()")
    apart = dict(zip(zip(table.backbone, table.init), table.mean_dsc_apart))
    assert apart["unet", "scratch"] is True and apart["unet", "corpus_ct"] is True
    assert {apart["mednext_v2_tiny", init] for init in ("scratch", "corpus_ct")} == {None, False}
    cells = format_main_table(table, {}, "mini")[("regenerated, profile mini: DSC over NSD, %", "mean of tasks")]
    assert [" ≈<br>" in cell for cell in cells] == [told is False for told in table.mean_dsc_apart]


def test_main_table_shown_says_what_is_missing():
    scores = make_scores(share_nan=0)
    scores.loc[scores.backbone == "unet", "dsc"] = 0.123
    table = main_table(scores, published())
    shown = format_main_table(table, {"abdomen_ct": "Abdomen <CT>"}, "mini")
    assert ("regenerated, profile mini: DSC over NSD, %", "Abdomen &lt;CT&gt;") in shown
    cells = shown[("regenerated, profile mini: DSC over NSD, %", "mean of tasks")]
    assert cells[table.init.isna()].eq("not run").all()
    assert cells[(table.backbone == "unet") & table.init.notna()].str.startswith("12.3 (12.3–12.3)<br>").all()
    best = table.mean_dsc.idxmax()
    assert cells[best].startswith(f"<b>{100 * table.mean_dsc[best]:.1f}")
    reported = shown[shown.columns[-2]]
    assert reported[table.reported_dsc_percent.isna()].eq("not available").all()
    assert set(reported) == {"not available", *(f"{fact[3]:.2f}" for fact in FACTS)}


def test_captions_name_profile_and_n():
    scores = make_scores()
    words = caption("Scores.", "mini", scores)
    assert words == (
        "Scores. Profile mini: small networks, a minute of training, deformed real scans: too little to show an effect; not comparable "
        "with the reported column. The unit is a person: n = 8 people (8 images), 2 tasks, 5 classes, 1 seed."
    )
    assert "the numbers mean nothing" in caption("Scores", "smoke", scores)
    assert "not comparable" in caption("Scores", "study", scores)
    assert "not comparable" not in caption("Scores", "paper", scores)


def test_score_text():
    assert score_text(0.5) == "50.0"
    assert score_text(0.5, 0.4, 0.65) == "50.0 (40.0–65.0)"
    assert score_text(float("nan"), 0.1, 0.2) == "not available"


def test_titles_are_those_of_the_registry_and_colours_differ():
    from mednext_v2.models.registry import BACKBONES

    assert {name: tables.backbone_title(name) for name in BACKBONES} == {n: b.title for n, b in BACKBONES.items()}
    colours = [tables.backbone_colour(name) for name in BACKBONES]
    assert len(set(colours)) == len(colours)


def test_a_backbone_without_a_style_gets_one(monkeypatch):
    from dataclasses import replace

    from mednext_v2.models.registry import BACKBONES

    monkeypatch.setitem(BACKBONES, "new_net", replace(BACKBONES["unet"], name="new_net", title="New Net"))
    assert tables.backbone_title("new_net") == "New Net"
    assert tables.backbone_title("of_a_plugin") == "of_a_plugin"
    styles = [(tables.backbone_colour(name), tables.backbone_marker(name)) for name in [*BACKBONES, "of_a_plugin"]]
    assert len(set(styles)) == len(styles)
    assert re.fullmatch("#[0-9A-F]{6}", tables.backbone_colour("new_net")) and tables.backbone_marker("new_net") in tables.SPARE_MARKERS
    assert tables.backbone_marker("mednext_v2_base") == "o"


def draw():
    import matplotlib.pyplot as plt

    tables.house_style()
    figure, axes = plt.subplots(figsize=(2, 1.5))
    axes.plot([0, 1], [1, 3], label="a")
    axes.fill_between([0, 1], [1, 2], [2, 4], clip_path=None)
    axes.imshow(np.arange(12).reshape(3, 4), extent=(0, 1, 0, 1))
    axes.legend()
    plt.close(figure)
    return figure


def test_figures_are_the_same_bytes_in_another_process(tmp_path):
    import subprocess
    import sys

    paths = save_figure(draw(), tmp_path / "a", "picture")
    assert [path.name for path in paths] == ["picture.svg", "picture.png"]
    code = f"from test_report import draw, save_figure; save_figure(draw(), {str(tmp_path / 'b')!r}, 'picture')"
    folder = str(root() / "tests")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder)
    for path in paths:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    text = paths[0].read_text()
    assert "<dc:date>" not in text and not re.search(r"20\d\d-\d\d-\d\d", text)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["picture.png", "picture.svg"]


def test_tables_round_trip_and_escape(tmp_path):
    table = pd.DataFrame({"model": ["a<b", "c"], "value": [1 / 3, np.nan]})
    csv, html, tex = save_table(table, tmp_path, "scores", "n < 5 & more")
    back = pd.read_csv(csv)
    assert back.value[0] == pytest.approx(1 / 3, abs=1e-6) and np.isnan(back.value[1])
    text = html.read_text()
    assert "a&lt;b" in text and "n &lt; 5 &amp; more" in text and "<td>not available</td>" in text and "nan" not in text.lower()
    assert save_table(table, tmp_path / "again", "scores", "n < 5 & more")[1].read_bytes() == html.read_bytes()


TOY = Dataset(
    "toy",
    999,
    "Toy",
    "CT",
    {"liver": 1, "lesion": 2, "rib": 3},
    {"liver": "organ", "lesion": "pathology", "rib": "organ"},
    (1, 1, 1),
    (8, 8, 8),
    1.0,
    "finetune",
    "none",
    "none",
)


def test_label_colours_are_warm_for_pathology_only():
    colours = tables.label_colours(TOY)
    assert list(colours) == list(TOY.labels) and len(set(colours.values())) == 3
    assert colours["lesion"] in tables.WARM and {colours["liver"], colours["rib"]} <= set(tables.COOL)


def test_best_slice_prefers_pathology_then_classes():
    labels = np.zeros((6, 6, 5), int)
    labels[:, :, 1] = 1
    labels[:2, :, 2] = 1
    labels[2:4, :, 2] = 3
    assert tables.best_slice(labels, TOY) == 2
    labels[0, 0, 3] = labels[0, :2, 4] = 2
    assert tables.best_slice(labels, TOY) == 4
    assert tables.best_slice(np.zeros((6, 6, 5), int), TOY) == 0


def test_slices_show_the_right_side_on_the_left_and_anterior_on_top():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    image = np.zeros((8, 10))
    image[7, 9] = 1  # RAS: the rightmost, most anterior pixel
    labels = np.zeros((8, 10), int)
    labels[7, 9] = 1
    tables.show_slice(axes, image, labels, {1: "#ff0000"}, (2, 3), (0, 1))
    grey, tint = (picture.get_array() for picture in axes.images)
    assert grey.shape == (10, 8) and grey[9, 0] == 1 and grey.sum() == 1  # origin lower: the last row is on top
    assert tint[9, 0, 3] > 0 and np.count_nonzero(tint[..., 3]) == 1
    assert axes.get_xlim() == (0, 16) and axes.get_ylim() == (0, 30)
    outline = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
    np.testing.assert_allclose([outline.min(0), outline.max(0)], [[0, 27], [2, 30]], atol=0.5)
    plt.close(figure)


def test_paper_notebooks_are_thin_and_committed_without_outputs():
    for path in sorted((root() / "nbs/paper").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        source = "\n".join("".join(cell["source"]) for cell in code)
        assert not re.search(r"^\s*(def|class) ", source, re.M), path.name
        tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
        assert ["".join(cell["source"]) for cell in tagged] == ['profile = "smoke"\nout = ""'], path.name
        assert "".join(cells[0]["source"]).startswith("# ") and "\n> " in "".join(cells[0]["source"])
        assert not any(cell["outputs"] for cell in code), path.name


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with invented scores, cases and predictions of two tasks; the notebooks find it by their working directory"
    import shutil

    import nibabel

    from mednext_v2.core import write_json
    from mednext_v2.data.datasets import get_dataset, write_description
    from mednext_v2.data.scans import write_volume

    tasks = {name: get_dataset(name) for name in ("abdomen_ct", "brain_lesion_mr")}
    (tmp_path / "data").mkdir()
    for name in ("dvc.yaml", "params.yaml", "data/published.csv", "data/datasets.yaml"):
        shutil.copy(root() / name, tmp_path / name)
    scores = make_scores(tasks={name: tuple(task.labels) for name, task in tasks.items()}, cases=3)
    scores["group"] = [tasks[task].groups[label] for task, label in zip(scores.task, scores.label)]
    (tmp_path / "results/mini").mkdir(parents=True)
    pd.DataFrame(columns=["ablation", "variant", *scores]).to_csv(tmp_path / "results/mini/ablations.csv", index=False)
    pd.DataFrame(columns=["ablation", "variant", "role", "steps"]).to_csv(tmp_path / "results/mini/models.csv", index=False)
    scores.to_csv(tmp_path / "results/mini/scores.csv", index=False)
    generator = np.random.default_rng(0)
    for name, task in tasks.items():
        folder = tmp_path / "data/raw/mini" / task.folder
        cases = sorted(scores[scores.task == name].case.unique())
        affine = np.diag([-task.spacing[0], *task.spacing[1:], 1])  # Stored towards the left
        for case in cases:
            label = np.zeros((20, 18, 8), np.uint8)
            label[4:14, 5:15, 2:6] = generator.integers(0, task.num_classes, (10, 10, 4))
            image = generator.normal(size=label.shape).astype(np.float32)
            write_volume(folder / "imagesTs" / f"{case}_0000.nii.gz", image, affine)
            write_volume(folder / "labelsTs" / f"{case}.nii.gz", label, affine)
            for init in ("scratch", "corpus_ct"):
                path = tmp_path / f"runs/mini/evaluate/{init}-mednext_v2_tiny/predictions/{name}-s0/{case}.nii.gz"
                path.parent.mkdir(parents=True, exist_ok=True)
                nibabel.save(nibabel.Nifti1Image(label, affine), path)
        for part in ("train", "val"):
            write_volume(folder / "imagesTr" / f"{part}_0000.nii.gz", image, affine)
            write_volume(folder / "labelsTr" / f"{part}.nii.gz", label, affine)
        write_description(task, folder, 2)
        write_json(folder / "splits_final.json", [{"train": ["train"], "val": ["val"]}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_paper(name: str, source=None, **parameters) -> dict:
    "Run the code of a paper notebook here, with parameters as papermill would set them; its variables"
    import matplotlib.pyplot as plt

    names = {}
    for cell in json.loads((source or root(__file__) / "nbs/paper" / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}:{cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names.update(parameters)
    plt.close("all")
    return names


def test_main_table_notebook(project):
    names = run_paper("main_table", profile="mini", out="results/mini/main_table")
    saved = pd.read_csv(project / "results/mini/main_table/main_table.csv")
    mean = summary(names["scores"], ["backbone", "init"])
    assert saved.mean_nsd.dropna().tolist() == pytest.approx(mean.nsd.tolist(), rel=1e-5)
    html = (project / "results/mini/main_table/main_table.html").read_text()
    assert (
        "Profile mini: small networks, a minute of training, deformed real scans: too little to show an effect; not comparable with the reported column" in html
    )
    assert all(f"<td>{value:.2f}</td>" in html for fact in FACTS for value in fact[3:])
    assert "Mini abdomen CT" in html and "not available" in html and "not run" in html


def test_scratch_vs_pretrained_notebook(project):
    names = run_paper("scratch_vs_pretrained", profile="mini", out="results/mini/scratch_vs_pretrained")
    folder = project / "results/mini/scratch_vs_pretrained"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{stem}.{suffix}"
        for stem, suffixes in {
            "scratch_vs_pretrained": ("svg", "png"),
            "scores": ("csv", "csv.json", "html", "tex"),
            "gains": ("csv", "csv.json", "html", "tex"),
            "gains_by_group": ("csv", "csv.json", "html", "tex"),
            "reported": ("csv", "csv.json", "html", "tex"),
        }.items()
        for suffix in suffixes
    )
    gain = pd.read_csv(folder / "gains.csv")
    assert set(zip(gain.group, gain.task)) == {("organ", "abdomen_ct"), ("pathology", "brain_lesion_mr")}
    assert gain.dsc.tolist() == pytest.approx(gains(names["scores"], ["group", "task", "backbone"]).dsc.tolist(), abs=1e-5)
    # One hollow and one filled marker of each task and backbone, at the values of the table
    for axes, metric in zip(names["panels"], ("dsc", "nsd")):
        drawn = sorted(float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() in ("o", "^"))
        assert drawn == pytest.approx(sorted(100 * names["table"][metric]))
    reported = pd.read_csv(folder / "reported.csv").set_index(["model", "metric"])
    assert reported.loc[("MedNeXt-v2 Base", "DSC"), "gain"] == pytest.approx(0.64)
    assert np.isnan(reported.loc[("MedNeXt-v2 Wide", "DSC"), "gain"])


def test_qualitative_notebook(project):
    names = run_paper("qualitative", profile="mini", out="results/mini/qualitative")
    scores = names["scores"]
    for task, case in names["cases"].items():
        part = scores[(scores.task == task) & (scores.backbone == "mednext_v2_tiny") & (scores.init == "corpus_ct")]
        by_case = part.groupby("case").dsc.mean()
        assert by_case[case] == by_case.median()
    for row in names["rows"].values():
        assert set(row["maps"]) == {"image", "truth", "scratch", "corpus_ct"}
        assert all(isinstance(row["maps"][kind], np.ndarray) for kind in ("scratch", "corpus_ct"))
        assert row["maps"]["scratch"].shape == row["image"].shape
        np.testing.assert_array_equal(row["maps"]["scratch"], row["maps"]["truth"])  # Its prediction is the truth, and so lies on it
    folder = project / "results/mini/qualitative"
    assert {path.name for path in folder.iterdir()} == {f"qualitative.{s}" for s in ("svg", "png", "csv", "csv.json", "html", "tex")}


def test_qualitative_notebook_without_a_prediction_says_so(project):
    import shutil

    shutil.rmtree(project / "runs/mini/evaluate/scratch-mednext_v2_tiny")
    names = run_paper("qualitative", profile="mini", out="results/mini/qualitative")
    assert {row["maps"]["scratch"] for row in names["rows"].values()} == {"not available"}


def test_architecture_notebook(project):
    names = run_paper("architecture", profile="mini", out="results/mini/architecture")
    assert names["parameters"] == 61_969_507 and names["grn_sites"] == 62
    saved = pd.read_csv(project / "results/mini/architecture/architecture.csv")
    assert saved.blocks.tolist() == [3, 4, 8, 8, 8, 8, 8, 4, 3]
    assert saved.channels.tolist() == [32, 64, 128, 256, 512, 256, 128, 64, 32]


@pytest.mark.parametrize("name", ["scores", "ablations"])
def test_scores_from_before_they_were_computed_on_the_scans_own_grid_are_told_apart(project, name):
    path = project / f"results/mini/{name}.csv"
    table = pd.read_csv(project / "results/mini/scores.csv")
    table.to_csv(path, index=False)
    old = tables.read_table("mini", name)
    assert set(old.grid) == {"prepared"} and "scored on the prepared grid, not on the scans' own. The unit is" in tables.caption("Means", "mini", old)
    table.assign(grid="scan").to_csv(path, index=False)
    new = tables.read_table("mini", name)
    assert set(new.grid) == {"scan"} and "grid" not in tables.caption("Means", "mini", new)


def test_read_scores_says_how_to_make_them(project):
    text = (project / "results/mini/scores.csv").read_text()
    (project / "results/mini/scores.csv").write_text(text.replace("abdomen_ct_0", "001"))
    assert "001" in set(tables.read_scores("mini").case)
    with pytest.raises(FileNotFoundError, match="run `make repro PROFILE=paper`"):
        tables.read_scores("paper")


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
def test_latex_compiles_and_stays_on_the_page(tmp_path):
    scores = make_scores()
    shown = format_main_table(main_table(scores, published()), {"abdomen_ct": "Abdomen_<CT> & 50 %"}, "mini")
    words = pd.DataFrame({"claim": ["One ≈ sentence that is far longer than any column of a page can be, ± 3 · 10³"] * 2, "n": [1.0, float("nan")]})
    for name, table in {"wide": shown, "words": words}.items():
        save_table(table, tmp_path, name, "A caption with 95 % – and _more_", table)
        (tmp_path / f"{name}_page.tex").write_text(
            f"\\documentclass{{article}}\\usepackage{{booktabs,graphicx}}\\begin{{document}}\\input{{{name}.tex}}\\end{{document}}"
        )
        command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", f"{name}_page.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        assert "too wide" not in done.stdout
