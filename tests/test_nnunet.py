"""MedNeXt-v2 inside nnU-Net: the network that plans name, its planner and trainers, and the whole way through nnU-Net on a toy data set."""

import json
import pydoc
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nnunet_round
from mednext_v2.cli import main
from mednext_v2.core import read_json, write_json
from mednext_v2.integrations.nnunet import EpochSchedule, NNUNetMedNeXt, _adapt_arch, _training_bytes, _wanted_network, epoch_recipe, plan_nnunet
from mednext_v2.models.card import Card, save_model
from mednext_v2.models.registry import create
from mednext_v2.models.transfer import Start
from mednext_v2.network.mednext import Arch
from mednext_v2.network.scaling import get_arch
from mednext_v2.training.recipe import get_recipe
from mednext_v2.zoo.importers import NNUNET_CLASS, import_checkpoint, nearest_backbone, open_checkpoint
from model_toys import UNET_CARD

ARCH = dict(width=4, depths=[1] * 5, ratios=[2] * 5, strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]], kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]])
needs_nnunet = pytest.mark.skipif(find_spec("nnunetv2") is None, reason="nnunetv2 is not installed")


def make(**changes) -> NNUNetMedNeXt:
    torch.manual_seed(0)
    return NNUNetMedNeXt(**{"input_channels": 1, "num_classes": 3} | ARCH | changes)


# The network


def test_plans_find_the_class_and_it_has_what_the_stock_trainer_asks_for():
    assert pydoc.locate(NNUNET_CLASS) is NNUNetMedNeXt
    network, x = make(deep_supervision=True), torch.randn(1, 1, 2, 8, 8)
    scales = 1 / np.cumprod(ARCH["strides"], axis=0)[:-1]  # nnUNetTrainer._get_deep_supervision_scales
    for mode in (True, False):
        outputs = network.train(mode)(x)
        assert [tuple(y.shape) for y in outputs] == [(1, 3, *(np.array([2, 8, 8]) * scale).astype(int)) for scale in scales]
    network.decoder.deep_supervision = False
    assert torch.equal(network(x), outputs[0])


def test_no_weight_is_unused_in_training():
    network = make(deep_supervision=True).train()
    sum(y.sum() for y in network(torch.randn(1, 1, 2, 8, 8))).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_names_and_outputs_are_those_of_the_library(tmp_path):
    network, x = make().eval(), torch.randn(1, 1, 2, 8, 8)
    arch = Arch(4, (1,) * 5, (2,) * 5, strides=((1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)))
    name, overrides = nearest_backbone(arch)
    ours = create(name, 1, 3, **overrides).eval()
    ours.load_state_dict({key: value for key, value in network.state_dict().items() if not key.startswith("out_1")})
    assert torch.equal(ours(x), network(x))


def test_bare_weights_with_flat_kernels_are_refused(tmp_path):
    torch.save(make().state_dict(), tmp_path / "bare.pth")
    assert "strides may too" in " ".join(open_checkpoint(tmp_path / "bare.pth").notes)
    with pytest.raises(ValueError, match="give a model to load it into"):
        import_checkpoint(tmp_path / "bare.pth")


def test_the_compiler_leaves_the_network_whole():
    network, x = make(deep_supervision=True), torch.randn(1, 1, 2, 8, 8)
    graphs = []
    compiled = torch.compile(network, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    expected, found = network(x), compiled(x)
    sum(y.sum() for y in found).backward()
    assert not graphs and all(map(torch.equal, expected, found)) and network.stem.weight.grad is not None


# Weights to start from


def save_start(folder: Path, **changes) -> Path:
    "A model folder of an anisotropic MedNeXt for (X, Y, Z), thick along X"
    torch.manual_seed(1)
    overrides = {"width": 4, "depths": (1,) * 5, "ratios": (2,) * 5, "strides": ((1, 2, 2), (2, 2, 2)), "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3))}
    facts = UNET_CARD | {"backbone": "mednext_v2_tiny", "overrides": overrides, "spacing": (5.0, 1.25, 1.0)} | changes
    known = Card(**facts)
    model = create(known.backbone, known.in_channels, known.num_classes, **known.overrides)
    for parameter in model.parameters():  # Each axis of a kernel its own
        nn.init.normal_(parameter, std=0.3)
    save_model(folder, model, known)
    return folder


def test_plans_refuse_a_start_that_would_compute_something_else(tmp_path):
    folder = save_start(tmp_path / "model")
    assert _wanted_network(None, Start(folder), {"grn": "mean"})[0].arch == _wanted_network(None, Start(folder), {})[0].arch
    for convert, grn in (((), "sum"), ((), None), (("grn",), "sum"), (("grn",), None)):
        with pytest.raises(ValueError, match=f"model was trained with grn='mean'; with grn=.?{grn}"):
            _wanted_network(None, Start(folder, convert=convert), {"grn": grn})


def start_of(folder: Path, axes: list[int], classes: dict, **changes) -> dict:
    return {"model": str(folder), "mapping": {}, "heads": "by-name", "scope": "all", "convert": [], "axes": axes, "classes": classes} | changes


def test_weights_are_turned_to_the_axes_of_nnunet_and_heads_go_by_name(tmp_path, capsys):
    folder = save_start(tmp_path / "model")
    # nnU-Net's axes are X, Z, Y: X is axis 0, Y is axis 2, Z is axis 1
    start = start_of(folder, [0, 2, 1], {"background": 0, "rim": 1, "core": 2, "new": 3})
    network = make(num_classes=4, start=start)
    drawn = {name: value.clone() for name, value in network.state_dict().items()}
    network.eval()  # As in inference: nothing is read
    assert all(torch.equal(drawn[name], value) for name, value in network.state_dict().items())
    network.train().eval()
    model, x = import_checkpoint(folder).model.eval(), torch.randn(1, 1, 2, 8, 16)
    expected = model(x)
    found = network(x.permute(0, 1, 2, 4, 3)).permute(0, 1, 2, 4, 3)
    torch.testing.assert_close(found[:, [0, 2, 1]], expected, rtol=1e-4, atol=1e-4)
    assert "class new " in capsys.readouterr().out


def test_a_checkpoint_counts_more_than_the_start(tmp_path):
    network = make(start=start_of(tmp_path / "gone", [0, 1, 2], {}))
    other = make()
    network.load_state_dict(other.state_dict())
    network.train()
    assert all(map(torch.equal, network.state_dict().values(), other.state_dict().values()))
    with pytest.raises(FileNotFoundError, match="gone"):
        make(start=start_of(tmp_path / "gone", [0, 1, 2], {})).train()


# What is planned


def test_a_network_follows_the_steps_of_nnunet_as_far_as_it_has_levels():
    deep = [[1, 1, 1], *[[2, 2, 2]] * 5]
    assert _adapt_arch(get_arch("base"), deep, [[3, 3, 3]] * 6, False) == get_arch("base")
    shallow = _adapt_arch(get_arch("base"), deep[:3], [[3, 3, 3]] * 3, False)
    assert (shallow.depths, shallow.ratios) == ((3, 4, 8, 4, 3),) * 2
    with pytest.raises(ValueError, match="4 levels of the given weights"):
        _adapt_arch(get_arch("base"), deep[:3], [[3, 3, 3]] * 3, True)
    for few in (1, 2):
        with pytest.raises(ValueError, match=f"two levels: nnU-Net lowers the resolution {few - 1} time"):
            _adapt_arch(get_arch("base"), deep[:few], [[3, 3, 3]] * few, False)


def test_a_network_of_one_output_has_no_loss_in_nnunet_and_is_refused(tmp_path):
    one = dict(depths=[1] * 3, ratios=[2] * 3, strides=ARCH["strides"][:2], kernel_sizes=ARCH["kernel_sizes"][:2])
    assert make(**one)(torch.randn(1, 1, 2, 8, 8)).shape == (1, 3, 2, 8, 8)  # It predicts
    said = r"two levels or more, and depths \[1, 1, 1\] are of 1: give five"
    with pytest.raises(ValueError, match=said):
        make(**one, deep_supervision=True)
    overrides = {"width": 4, "depths": (1, 1, 1), "ratios": (2, 2, 2)}
    for start in (Start(), Start(save_start(tmp_path / "model", overrides=overrides))):
        with pytest.raises(ValueError, match=said):
            _wanted_network(None if start.model else "tiny", start, {} if start.model else overrides)


def test_stock_planners_compare_memory_in_their_own_unit():
    network = make()
    values = network.compute_conv_feature_map_size((32, 64, 64))
    assert values / 560e6 * 8e9 == pytest.approx(_training_bytes(network.arch, (32, 64, 64), 2, 1, 3))


def test_a_recipe_in_epochs_is_the_recipe():
    paper = epoch_recipe(get_recipe("finetune"))
    assert (paper.steps, paper.warmup, paper.lr, paper.optimizer) == (300, 50, 1e-3, "adamw")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    schedule, rates = EpochSchedule(optimizer, paper), []
    for epoch in range(300):
        schedule.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(1e-3 / 50) and rates[49] == rates[50] == max(rates) == 1e-3
    assert rates[299] == pytest.approx(1e-3 * (1 / 250) ** 0.9)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    "A toy data set with the fingerprint that nnU-Net makes of it, so that only the planner runs"
    nnunet_round.write_data(tmp_path)
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
        (tmp_path / part).mkdir(exist_ok=True)
    number = dict(max=200.0, mean=100.0, median=100.0, min=-50.0, percentile_00_5=-40.0, percentile_99_5=180.0, std=40.0)
    fingerprint = {"spacings": [[1.0, 1.25, 5.0]] * 5, "shapes_after_crop": [[160, 128, 24]] * 5, "median_relative_size_after_cropping": 1.0}
    folder = tmp_path / "preprocessed/Dataset042_Toy"
    folder.mkdir()
    write_json(folder / "dataset_fingerprint.json", fingerprint | {"foreground_intensity_properties_per_channel": {"0": number}})
    return tmp_path


def fullres(path: Path) -> dict:
    return read_json(path)["configurations"]["3d_fullres"]


@needs_nnunet
def test_memory_decides_on_patch_and_batch(measured):
    voxels = []
    for memory in (0.2, 1.0):
        plan = fullres(plan_nnunet(42, "tiny", memory=memory, overrides={"width": 8}))
        kwargs = plan["architecture"]["arch_kwargs"]
        network = NNUNetMedNeXt(1, 3, **kwargs)
        assert _training_bytes(network.arch, plan["patch_size"], plan["batch_size"], 1, 3) <= memory * 1e9
        assert all(side % step == 0 for side, step in zip(plan["patch_size"], network.strides))
        voxels.append(plan["batch_size"] * np.prod(plan["patch_size"]))
    assert voxels[0] < voxels[1] and plan["architecture"]["network_class_name"] == NNUNET_CLASS
    assert kwargs["strides"][1] == [1, 2, 2] and kwargs["kernel_sizes"][0] == [1, 3, 3]
    with pytest.raises(ValueError, match="does not fit 0.0 GB"):
        plan_nnunet(42, "wide", memory=0.01)


@needs_nnunet
def test_data_is_shared_only_if_it_is_the_same(measured):
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

    options = dict(memory=0.2, overrides={"width": 8})
    assert fullres(plan_nnunet(42, "tiny", **options))["data_identifier"] == "nnUNetPlans_3d_fullres"
    own = fullres(plan_nnunet(42, "tiny", spacing=(4.0, 1.25, 1.0), plans_name="finer", **options))
    assert own["data_identifier"] == "finer_3d_fullres" and own["spacing"] == [4.0, 1.0, 1.25]
    plan_experiment_dataset(42, gpu_memory_target_in_gb=1)
    path = plan_nnunet(42, "tiny", **options)
    assert fullres(path)["data_identifier"] == "nnUNetPlans_3d_fullres" and "2d" not in read_json(path)["configurations"]
    plan_experiment_dataset(42, gpu_memory_target_in_gb=1, overwrite_target_spacing=(1.0, 1.0, 3.0))
    assert fullres(plan_nnunet(42, "tiny", **options))["data_identifier"] == "nnUNetMedNeXtV2TinyPlans_3d_fullres"


@needs_nnunet
def test_plans_from_a_model_folder(measured, capsys):
    folder = save_start(measured / "model", labels={"large": 1, "other": 2}, groups={"large": "organ", "other": "organ"})
    plan = fullres(plan_nnunet("Dataset042_Toy", start=Start(folder), memory=0.2))
    kwargs = plan["architecture"]["arch_kwargs"]
    assert kwargs["start"]["axes"] == [0, 2, 1] and kwargs["kernel_sizes"][0] == [1, 3, 3] and kwargs["width"] == 4
    assert re.search(r"class large +from large", capsys.readouterr().err)
    with pytest.raises(ValueError, match="no class 'other'"):
        plan_nnunet(42, start=Start(folder, mapping={"other": "other"}), memory=0.2)


@needs_nnunet
def test_regions_start_from_regions_of_the_same_name(measured):
    folder = save_start(measured / "model", regions={"all": (1, 2), "inner": (2,)}, class_order=(1, 2), groups={})
    about = measured / "raw/Dataset042_Toy/dataset.json"
    labels = {"background": 0, "whole": [1, 2], "inner": 2, "ignore": 3}
    about.write_text(json.dumps(read_json(about) | {"labels": labels, "regions_class_order": [1, 2]}))  # Their order counts
    kwargs = fullres(plan_nnunet(42, start=Start(folder, mapping={"whole": "all"}), memory=0.2))["architecture"]["arch_kwargs"]
    assert kwargs["start"]["classes"] == {"whole": 0, "inner": 1} and kwargs["start"]["mapping"] == {"whole": "all"}
    network = NNUNetMedNeXt(1, 2, **kwargs).train()
    assert torch.equal(network.out_0.conv_out.bias, import_checkpoint(folder).model.out_0.conv_out.bias)


@needs_nnunet
def test_what_cannot_be_planned_is_refused_in_one_line(measured, monkeypatch):
    for absent in (7, "nope", "Dataset007_Gone", "-1"):
        with pytest.raises(ValueError, match=f"^no data set '{absent}' in nnUNet_raw, .*; there are: Dataset042_Toy$"):
            plan_nnunet(absent)
    about = measured / "raw/Dataset042_Toy/dataset.json"
    write_json(about, read_json(about) | {"labels": {"background": 0, "small": 1, "large": 5}})
    with pytest.raises(ValueError, match="values 1 to 2"):
        plan_nnunet(42)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(SystemExit, match="nnUNet_raw is not set"):
        main(["nnunet", "plan", "-d", "42"])


def refused(*words: str) -> str:
    "What `nnunet plan` says as it ends"
    with pytest.raises(SystemExit) as ended:
        main(["nnunet", "plan", "-d", "42", *words])
    assert "\n" not in str(ended.value)
    return str(ended.value)


def untouched(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_nnunet
def test_values_that_no_plan_can_have_are_refused_before_anything_is_measured(measured):
    (measured / "preprocessed/Dataset042_Toy/dataset_fingerprint.json").unlink()
    before = untouched(measured)
    for memory in ("0", "-1", "nan", "inf"):
        assert "memory must be more than 0 GB" in refused("--memory", memory)
    for first in ("0", "-1", "nan", "inf"):
        assert "three positive lengths in mm" in refused("--spacing", first, "1", "1")
    for name in ("../../evil", "a/b", "/tmp/evil", "", "a b", "..", "näme", "plans\n"):
        assert "letters, digits, _ and - only" in refused("--plans-name", name)
    known = "plans can have: tiny, small, base, wide, v1_small, v1_base, v1_medium, v1_large"
    for name in ("nope", "stunet_small", "unet"):
        assert refused("--backbone", name).endswith(f"no MedNeXt is called '{name}'; {known}")
    assert "3 voxels at most" in refused("--backbone", "v1_base_k5")
    for setting in ("kernel=5", "strides=2", "grad_checkpointing=none", "in_channels=2", "wdth=4"):
        assert "only width, depths, ratios, grn" in refused("--network", setting)
    with pytest.raises(ValueError, match="three positive lengths"):
        plan_nnunet(42, spacing=(1.0, 1.0))
    assert untouched(measured) == before
    (measured / "raw/Dataset042_Twin").mkdir()
    assert "Dataset042_Toy, Dataset042_Twin have the same number" in refused()


@needs_nnunet
def test_plans_of_another_planner_are_not_replaced(measured):
    folder, line = measured / "preprocessed/Dataset042_Toy", ["--backbone", "tiny", "--network", "width=4", "--memory", "0.2", "--plans-name"]
    (folder / "dataset_fingerprint.json").rename(measured / "kept.json")
    for name, other in (("nnUNetPlans", "nnUNetMedNeXtV2TinyPlans"), ("nnUNetMedNeXtV2TinyPlans", "nnUNetMedNeXtV2TinyPlans2")):
        write_json(folder / f"{name}.json", {"configurations": {"3d_fullres": {"architecture": {"network_class_name": "PlainConvUNet"}}}})
        before = untouched(measured)
        assert f"{name}.json holds plans that are not of this library" in (said := refused(*line, name)) and f"such as {other} (--plans-name)" in said
        assert untouched(measured) == before
    (measured / "kept.json").rename(folder / "dataset_fingerprint.json")
    for width in (4, 8):  # Ours may be replaced
        main(["nnunet", "plan", "-d", "42", "--backbone", "tiny", "--network", f"width={width}", "--memory", "0.2", "--plans-name", "own"])
        assert fullres(folder / "own.json")["architecture"]["arch_kwargs"]["width"] == width


@needs_nnunet
def test_another_network_than_the_models_is_refused(measured):
    folder = str(save_start(measured / "model"))
    before = untouched(measured)
    assert "is a mednext_v2_tiny, not a mednext_v2_base" in refused("--from", folder, "--backbone", "base")
    assert "trained with width=4; with width=8 " in refused("--from", folder, "--network", "width=8")
    assert "trained with grn='mean'; with grn=None " in refused("--from", folder, "--network", "grn=None")
    assert untouched(measured) == before
    same = ["--backbone", "mednext_v2_tiny", "--network", "width=4", "--memory", "0.2"]
    main(["nnunet", "plan", "-d", "42", "--from", folder, *same])
    own = fullres(measured / "preprocessed/Dataset042_Toy/nnUNetMedNeXtV2TinyPretrainedPlans.json")
    assert own["architecture"]["arch_kwargs"]["width"] == 4


@needs_nnunet
def test_a_network_that_the_weights_are_converted_to_is_planned(measured):
    folder = str(save_start(measured / "v1", backbone="mednext_v1_small"))
    said = refused("--from", folder, "--network", "grn=mean")
    assert "trained with grn=None; with grn='mean' " in said and "name a conversion: `--convert`" in said
    main(["nnunet", "plan", "-d", "42", "--from", folder, "--network", "grn=mean", "--convert", "grn", "--memory", "0.2"])
    own = fullres(measured / "preprocessed/Dataset042_Toy/nnUNetMedNeXtV1SmallPretrainedPlans.json")
    assert own["architecture"]["arch_kwargs"]["grn"] == "mean"


@pytest.mark.parametrize("command", ["nnunet plan -d 42", "train prepared out", "finetune -d raw -o out"])
def test_how_weights_are_used_needs_weights(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "--model" if "finetune" in command else "--from"
    for words in ("--mapping new=old", "--start-heads fresh", "--scope encoder", "--convert grn"):
        with pytest.raises(SystemExit, match=f"{words.split()[0]}: no effect here, without {source} there are no weights to start from"):
            main([*command.split(), *words.split()])
    with pytest.raises(ValueError, match="without a model to start from"):
        plan_nnunet(42, start=Start(scope="encoder"))
    with pytest.raises(SystemExit, match="--mapping new: must be NEW=OLD"):
        main([*command.split(), source, str(save_start(tmp_path / "model")), "--mapping", "new"])


@needs_nnunet
def test_a_program_reads_plans_as_fields(measured, capsys):
    main(["nnunet", "plan", "-d", "Dataset042_Toy", "--backbone", "tiny", "--network", "width=4", "--memory", "0.2", "--plans-name", "My-plans_2", "--json"])
    said, path = json.loads(capsys.readouterr().out), measured / "preprocessed/Dataset042_Toy/My-plans_2.json"
    plan = fullres(path)
    expected = dict(patch=plan["patch_size"], batch=plan["batch_size"], strides=plan["architecture"]["arch_kwargs"]["strides"][1:])
    configurations, size = said.pop("configurations"), said.pop("sizes")["path"]
    assert size == {"files": 1, "bytes": path.stat().st_size} and said.pop("warnings") == []
    assert said == {"command": "nnunet plan", "path": str(path), **expected} and configurations["3d_fullres"] == expected


def test_without_nnunet_or_with_an_old_one_a_line_says_what_to_install(monkeypatch):
    import mednext_v2.integrations.nnunet as door

    monkeypatch.setattr(door, "version", lambda name: "2.7.0")
    with pytest.raises(ValueError, match="2.7.0 is too old, 2.8.0 is needed"):
        door.trainers_folder()

    monkeypatch.setitem(sys.modules, "nnunetv2.experiment_planning.plan_and_preprocess_api", None)
    with pytest.raises(SystemExit, match=r"pip install 'mednext_v2\[nnunet\]'"):
        main(["nnunet", "plan", "-d", "42"])


# The whole way


@needs_nnunet
@pytest.mark.slow
def test_plan_preprocess_train_validate_predict_import_and_the_same_labels(tmp_path):
    done = subprocess.run([sys.executable, nnunet_round.__file__, tmp_path, "trainers"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] > 0.9999 and found["validated"] == 1 and len(found["labels"]) > 1
    assert found["strides"][1] == [1, 2, 2] and found["card"]["strides"][0] == [1, 2, 2]
