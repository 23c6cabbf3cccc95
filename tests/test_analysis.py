"""Effects, gains by group, scaling laws and feature statistics against the same written out; paper notebooks on invented tables"""

import json

import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mednext_v2.core import root
from mednext_v2.network.scaling import build_mednext
from mednext_v2.report.analysis import effects, forest, group_gains, scaling_law
from mednext_v2.scoring.features import feature_statistics, network_features
from mednext_v2.zoo.catalogue import load_zoo
from table_toys import toy_ablations, toy_models, toy_scores, write_tables

matplotlib.use("Agg")
HERE = root(__file__)
NOTEBOOKS = "grn scaling per_class pathology modality schedules pretraining_data".split()


def test_effects_are_paired_by_seed_and_take_any_corpus_as_a_start():
    table = toy_ablations()
    found = effects(table[table.ablation == "modality"], "ct_full", ["dsc"]).set_index("variant")
    assert list(found.index) == ["mr_full", "ct_frozen", "mr_frozen"] and set(found.init) == {"pretrained"}
    one = table[table.ablation == "grn"].query("init == 'scratch'")
    fewer = one[(one.variant == "without") | (one.seed == 0)]
    part = one[one.seed == 0].pivot_table(index=["task", "case", "label"], columns="variant", values="dsc")
    expected = (part["mean"] - part["without"]).groupby(["task", "case"]).mean().groupby("task").mean().mean()
    row = effects(fewer, "without", ["dsc"]).set_index("variant").loc["mean"]
    assert row.difference == pytest.approx(expected) and row.low < row.difference < row.high
    assert (row.seeds, row.tasks, row.people) == (1, 3, 4)
    assert effects(table.iloc[:0], "without").empty and effects(one, "sung").empty


def test_forest_draws_a_dot_for_each_effect_or_says_that_there_is_none():
    found = effects(toy_ablations(names=["grn"]), "without")
    axes = forest(found, "nsd").axes[0]
    dots = sorted(float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o")
    assert dots == pytest.approx(sorted(100 * found[found.metric == "nsd"].difference))
    assert "not available" in {text.get_text() for text in forest(found.iloc[:0]).axes[0].texts}
    matplotlib.pyplot.close("all")


def test_group_gains_equal_the_mean_written_out():
    scores = toy_scores()
    part = scores[scores.backbone == "unet"]
    found = group_gains(part, {"init": "corpus_ct"}, {"init": "scratch"}).set_index("group")
    key = ["task", "case", "label", "group", "seed"]
    gain = part.pivot_table(index=key, columns="init", values="dsc").eval("corpus_ct - scratch").reset_index(name="gain")
    expected = gain.groupby(["group", "task", "label"]).gain.mean().groupby(["group", "task"]).mean().groupby("group").mean()
    assert found.gain[["organ", "pathology"]].tolist() == pytest.approx(expected.tolist())
    assert found.gain["difference"] == pytest.approx(expected["pathology"] - expected["organ"])
    assert (found.low < found.gain).all() and (found.gain < found.high).all() and found.people.tolist() == [4, 4, 4]
    organs = group_gains(part[part.group == "organ"], {"init": "corpus_ct"}, {"init": "scratch"}).set_index("group")
    assert np.isfinite(organs.gain["organ"]) and np.isnan(organs.gain[["pathology", "difference"]]).all()
    apart = part.assign(seed=part.seed + 5 * (part.init == "scratch"))  # No seed in common: nothing is paired
    assert group_gains(apart, {"init": "corpus_ct"}, {"init": "scratch"}).gain.isna().all()
    single = group_gains(part[part.case.str.endswith("_0")], {"init": "corpus_ct"}, {"init": "scratch"})
    assert np.isfinite(single.gain).all() and np.isnan(single.low).all()


def test_a_scaling_law_is_found_and_needs_four_sizes():
    table = toy_ablations(names=["scaling"]).query("init == 'scratch'")
    models = toy_models(toy_scores(), table)
    cost = models[models.ablation == "scaling"].groupby("variant").flops.mean()
    table = table.assign(dsc=1 - 0.6 * (table.variant.map(cost) / 3e8) ** -0.2)
    law = scaling_law(table, models)
    assert [law[name] for name in ("exponent", "low", "high")] == pytest.approx([0.2] * 3) and law["sizes"] == 5
    few = scaling_law(table[table.variant.isin(["base", "width", "depth"])], models)
    assert np.isnan(few["exponent"]) and few["sizes"] == 3
    assert scaling_law(table, models, "parameters")["sizes"] == 4  # A larger patch has no more parameters


def test_feature_statistics_equal_a_singular_value_decomposition():
    maps = torch.randn(2, 6, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    found = feature_statistics(maps)
    flat = maps.transpose(0, 1).flatten(1).double()
    share = torch.linalg.svdvals(flat)
    share = share / share.sum()
    assert found["effective_rank"] == pytest.approx(float((-(share * share.log()).sum()).exp()))
    cosine = torch.cosine_similarity(flat[:, None], flat[None], dim=-1)
    assert found["cosine_distance"] == pytest.approx(float((1 - cosine).mean() / 2))
    assert feature_statistics(torch.zeros(1, 3, 2, 2, 2))["dead_share"] == 1
    maps[:, 0] = 0
    assert feature_statistics(maps)["dead_share"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("grn", [None, "mean", "sum"])
def test_network_features_look_in_front_of_the_projection_and_leave_no_hook(grn):
    torch.manual_seed(0)
    model = build_mednext("tiny", 1, 2, width=2, depths=(1, 1, 1), ratios=(2, 3, 2), grn=grn).train()
    table = network_features(model, torch.randn(1, 1, 8, 8, 8))
    assert table.layer.tolist() == ["enc_block_0.0", "down_0", "bottleneck.0", "up_0", "dec_block_0.0"]
    assert table.channels.tolist() == [4, 6, 12, 8, 4] and table.depth.tolist() == list(range(5))
    assert model.training and not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="Conv3d has no MedNeXt block"):
        network_features(nn.Conv3d(1, 1, 1), torch.zeros(1, 1, 4, 4, 4))


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project that holds invented tables alone"
    for name in ("data", "conf"):
        (tmp_path / name).mkdir()
    for name in ("dvc.yaml", "params.yaml", "data/datasets.yaml", "conf/rules.yaml"):
        (tmp_path / name).write_text((HERE / name).read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_paper(name: str) -> dict:
    "Run the code of a paper notebook here, as papermill would; its variables"
    names = {}
    for cell in json.loads((HERE / "nbs/paper" / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}:{cell['id']}", "exec"), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names |= dict(profile="mini", out=f"results/mini/{name}")
    matplotlib.pyplot.close("all")
    return names


@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_with_and_without_ablations(project, name, empty):
    write_tables(project / "results/mini", empty)
    run_paper(name)
    made = {path.suffix for path in (project / "results/mini" / name).iterdir()}
    assert {".svg", ".png", ".csv", ".html", ".tex"} <= made
    pages = "".join(path.read_text() for path in (project / "results/mini" / name).glob("*.html"))
    assert "nan" not in pages.lower().replace("finan", "") and "n = " in pages
    if empty and name not in ("per_class", "pathology"):
        assert "not available" in pages


def test_pathology_notebook_without_pretraining_says_so(project):
    write_tables(project / "results/mini", empty=True)
    scores = toy_scores()
    scores[scores.init == "scratch"].to_csv(project / "results/mini/scores.csv", index=False)
    assert run_paper("pathology")["table"].empty


@pytest.mark.parametrize("name", ["backbones", "claims", "main_table", "scratch_predicts_pretrained", "scratch_vs_pretrained", "study_design"])
def test_a_released_model_is_in_the_main_table_and_mixed_into_nothing_else(project, name):
    (project / "data/published.csv").write_text((HERE / "data/published.csv").read_text())
    write_tables(project / "results/mini")
    run_paper(name)
    pages = "".join(path.read_text() for path in (project / "results/mini" / name).glob("*.html"))
    assert ("cads_open_551" in pages or f"released: {load_zoo()['cads_open_551'].title}" in pages) == (
        name == "main_table"
    )  # The ledger has too few of them for a verdict


def test_rows_of_shorter_trainings_are_not_in_the_main_table(project):
    (project / "data/published.csv").write_text((HERE / "data/published.csv").read_text())
    write_tables(project / "results/mini")
    at = project / "results/mini/ablations.csv"
    table = pd.read_csv(at)
    table.loc[table.variant == "context", "patch"] = "48x48x16"
    table.to_csv(at, index=False)
    assert (run_paper("main_table")["table"].side == 48).sum() == 2
    models = pd.read_csv(project / "results/mini/models.csv")
    models.loc[models.ablation == "scaling", "steps"] = 60
    models.to_csv(project / "results/mini/models.csv", index=False)
    assert not (run_paper("main_table")["table"].side == 48).any()
