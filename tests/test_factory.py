"One call for every network: its names, its arguments, and the weights it may start from"

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mednext_v2 import Arch, create_model, list_models, sliding_window
from mednext_v2.factory import FeaturePyramid
from mednext_v2.models.card import save_model
from mednext_v2.models.registry import BACKBONES, create, get_backbone, load_model, overrides_of
from mednext_v2.models.transfer import check_options
from mednext_v2.network.scaling import PRESETS, count_parameters, get_arch, parse_name
from mednext_v2.training.launch import Step, smaller_patches
from mednext_v2.training.run import fit_patch
from mednext_v2.zoo.importers import find_checkpoint
from model_toys import UNET_CARD, Card

TINY = dict(width=2, depths=(1,) * 9, ratios=(2,) * 9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A trained network with heads for deep supervision, of one channel and three classes"
    torch.manual_seed(0)
    model = create("base", 1, 3, deep_supervision=True, **TINY)
    card = Card(**UNET_CARD | dict(backbone="mednext_v2_base", overrides=overrides_of(model), labels={"a": 1, "b": 2}, groups={}, in_channels=1))
    path = tmp_path_factory.mktemp("models") / "trained"
    save_model(path, model, card)
    return path, model.eval()


@pytest.mark.parametrize("preset", PRESETS)
def test_short_and_long_names_are_one_everywhere(preset):
    long = get_backbone(preset).name
    assert long.startswith("mednext_") and get_backbone(long).name == long and get_arch(long) == get_arch(preset)
    assert parse_name(long) == parse_name(preset) == (preset, {}) and list_models(preset) == [long] == list_models(long)
    models = [create_model(name, 1, 2, **TINY) for name in (preset, long)]
    assert models[0].arch == models[1].arch and [model.blueprint["name"] for model in models] == [long, long]


def test_names_are_listed_by_pattern():
    assert all(parse_name(name) is None for name in ("v2_v1_base", "mednext_v2_v1_base", "base_k5", "mednext_v2_base_k5", "mednext", "", "Base"))
    assert set(BACKBONES) <= set(list_models())
    assert list_models("*_k5") == [f"mednext_v1_{size}_k5" for size in ("small", "base", "medium", "large")] == list_models("v1_*_k5")
    assert set(list_models("mednext*")) == {name for name in BACKBONES if name.startswith("mednext")}
    assert list_models("MedNeXt*") == list_models("mednext*")
    assert list_models("nothing*") == [] and list_models("unet") == ["unet"]
    assert create_model("v1_base_k5", 1, 2, **TINY).arch.kernel == 5


def test_classes_by_either_name_and_one_channel_unless_given():
    assert create_model("unet", num_classes=3, filters=(4, 8, 8)).in_channels == 1
    assert create_model("tiny", 2, out_channels=3, width=2).num_classes == 3
    assert create_model("tiny", 2, 3, out_channels=3, width=2).num_classes == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("tiny", in_chans=1, num_classes=2), "no 'in_chans'; here it is in_channels"),
        (lambda: create_model("tiny", 1, n_classes=2), "no 'n_classes'; here it is num_classes"),
        (lambda: create_model("tiny", 1, 2, spatial_dims=3), "no 'spatial_dims'; here it is nothing: every network is three-dimensional"),
        (lambda: create_model("tiny", 1, 2, out_channels=3), "num_classes and out_channels are the same, got 2 and 3"),
        (lambda: create_model("tiny", 1), "needs num_classes, background included"),
        (lambda: create_model("clinic/quick"), "'?clinic/quick'? is no name of a network .* pretrained='clinic/quick'"),
        (lambda: create_model(Path("/path/model"), 1, 2), "pretrained='/path/model'"),
        (lambda: list_models(None), "a pattern is a string such as 'mednext.*', got None"),
        (lambda: create_model(num_classes=2), "needs a name \\(see list_models\\) or pretrained weights"),
        (lambda: create_model("tiny", 1, 2, widht=2), "Arch has no 'widht'"),
        (lambda: create_model("tyni", 1, 2), "no backbone 'tyni'; there are: mednext_v2_tiny"),
        (lambda: create_model("tiny", 0, 2), "in_channels must be a positive whole number"),
        (lambda: create_model("unet", 1, 0, filters=(4, 8, 8)), "num_classes must be a positive whole number, got 0; for features .* features_only=True"),
        (lambda: create_model("tiny", 1, 2, pretrained=""), "pretrained says which weights"),
        (lambda: create_model(3, 1, 2), "a backbone is named by a string such as 'base', got 3"),
        (lambda: create_model((PRESETS["tiny"], (32, 32, 32)), 1, 2), "arch, patch = Arch.for_data"),
        (lambda: create_model("nnunet_plain", num_classes=2, patch=64, spacing=(5, 1, 1)), "patch must be one positive whole number of voxels per axis"),
        (lambda: create_model("nnunet_plain", num_classes=2, patch=(64, 64)), "three axes, as \\(64, 64, 64\\) is, got \\(64, 64\\)"),
        (lambda: create_model("tiny", num_classes=2, patch=(64, 64.0, 64)), "patch must be one positive whole number"),
        (lambda: create_model("tiny", num_classes=2, patch="64,64,64"), "patch must be one positive whole number"),
        (lambda: create_model("nnunet_plain", num_classes=2, spacing=5), "spacing must be one positive number of mm per axis"),
        (lambda: create_model("nnunet_plain", num_classes=2, spacing=(5, 1, float("nan"))), "spacing must be one positive number of mm per axis"),
        (lambda: create_model("tiny", 1, 2, pretrained=True), "pretrained says which weights"),
        (lambda: create_model("unet", 1, features_only=True, filters=(4, 8, 8)), "features_only is for the sizes of MedNeXt, got unet"),
    ],
)
def test_what_it_does_not_take_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_folder_as_it_is(folder):
    path, trained = folder
    image = torch.randn(1, 1, 32, 32, 32)
    for deep in (False, True):
        model = create_model(pretrained=path, deep_supervision=deep)
        assert model.training and model.report.coverage == 1 and len(model.report.skipped) == (0 if deep else 8)
        with torch.no_grad():
            assert torch.equal(model.eval()(image), trained(image))
    assert create_model("base", pretrained=path).blueprint["name"] == "mednext_v2_base"


def test_other_channels_and_classes(folder):
    path, trained = folder
    model = create_model(pretrained=path, in_channels=3, out_channels=5)
    assert (model.in_channels, model.num_classes) == (3, 5) and model.report.missing == ("out_0.conv_out.weight", "out_0.conv_out.bias")
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        before, after = trained.encode(image), model.encode(image.expand(-1, 3, -1, -1, -1))
    for a, b in zip(after, before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_weights_of_another_network_are_refused(folder, tmp_path):
    path, _ = folder
    with pytest.raises(ValueError, match="is a mednext_v2_base, not a mednext_v2_wide"):
        create_model("wide", pretrained=path)
    for fold in ("fold_0", "fold_1"):
        save_model(tmp_path / fold, create("unet", 1, 3, filters=(4, 8, 8)), Card(**UNET_CARD))
    with pytest.raises(ValueError, match="holds several folds: give the folder of one"):
        create_model(pretrained=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(grn="sum"), "was trained with grn='mean'; with grn='sum' .* leave grn out"),
        (dict(grn=None), "was trained with grn='mean'; with grn=None"),
        (dict(strides=((1, 2, 2), 2, 2, 2)), "was trained with strides=None; with strides=\\(\\(1, 2, 2\\)"),
        (dict(kernel=5), "was trained with kernel=3; with kernel=5 .* leave kernel out \\(to start a training with more, name a conversion"),
        (dict(width=4), "was trained with width=2; with width=4"),
        (dict(depths=(1,) * 7, ratios=(2,) * 7), "leave depths, ratios out"),
    ],
)
@pytest.mark.parametrize("features_only", [False, True])
def test_options_that_change_what_weights_compute_are_refused(folder, options, message, features_only):
    path, trained = folder
    with pytest.raises(ValueError, match=message):
        create_model(pretrained=path, features_only=features_only, **options)
    with pytest.raises(ValueError, match=message):
        create_model(replace(trained.arch, **options), pretrained=path, features_only=features_only)


def test_options_that_change_nothing_stay_allowed(folder):
    path, trained = folder
    image = torch.randn(1, 1, 32, 32, 32)
    same = dict(grn="mean", kernel=3, strides=[2] * 4, kernels=[[3, 3, 3]] * 5, width=2, depths=[1] * 9)
    for options in (
        {},
        same,
        dict(grad_checkpointing="block"),
        dict(patch=(64, 64, 64), spacing=(5, 1, 1)),
        dict(name=trained.arch),
        dict(deep_supervision=True),
    ):
        model = create_model(pretrained=path, **options).eval()
        with torch.no_grad():
            assert model.report.coverage == 1 and torch.equal(model(image), trained(image)), options
    assert create_model(pretrained=path, grad_checkpointing="block").grad_checkpointing == "block"


def test_options_of_other_networks_are_compared_too(tmp_path):
    pytest.importorskip("monai")
    save_model(tmp_path / "unet", create("unet", 1, 3, filters=(4, 8, 8)), Card(**UNET_CARD))
    assert create_model(pretrained=tmp_path / "unet", filters=[4, 8, 8], patch=(32, 32, 32)).filters == (4, 8, 8)
    with pytest.raises(ValueError, match="was trained with filters=\\(4, 8, 8\\); with filters=\\(4, 8, 16\\)"):
        create_model(pretrained=tmp_path / "unet", filters=(4, 8, 16))
    with pytest.raises(ValueError, match="is a unet, not a MedNeXt"):
        create_model(PRESETS["tiny"], pretrained=tmp_path / "unet")


def test_strides_of_a_planned_network_may_not_change_with_the_spacing():
    pytest.importorskip("dynamic_network_architectures")
    trained = ("nnunet_plain", dict(patch=(64, 64, 64), features_per_stage=(4,) * 5))
    check_options("model", trained, ("nnunet_plain", trained[1] | dict(patch=[64, 64, 80])))
    with pytest.raises(ValueError, match="model was trained with the usual spacing; with spacing=\\(5, 1, 1\\)"):
        check_options("model", trained, ("nnunet_plain", trained[1] | dict(spacing=(5, 1, 1))))


def test_numbers_of_a_trained_model_are_checked(folder):
    for name in ("num_classes", "out_channels", "in_channels"):
        for value in (0, -1, 2.5, True):
            with pytest.raises(ValueError, match="must be a positive whole number, got"):
                create_model(pretrained=folder[0], **{name: value})
    with pytest.raises(ValueError, match="leave num_classes out and give features_only=True"):
        create_model(pretrained=folder[0], num_classes=0)


@pytest.mark.parametrize("name", ["tiny", "v1_base", "v1_small_k5", "thick"])
def test_a_network_by_its_arch(name):
    arch = Arch.for_data((5, 1, 1), (60, 400, 400), 3e9, "tiny")[0] if name == "thick" else create_model(name, 1, 2, **TINY).arch
    with torch.device("meta"):
        model = create_model(arch, in_channels=2, num_classes=3, grad_checkpointing="block")
        again = create(**model.blueprint)
        assert model.arch == again.arch == arch and (model.in_channels, model.num_classes, model.grad_checkpointing) == (2, 3, "block")
        assert create_model(arch, num_classes=2, width=4).arch == replace(arch, width=4)
        assert create_model(arch, features_only=True).channels == arch.channels
    assert [create_model(PRESETS[name], 1, 2).blueprint["name"] for name in ("tiny", "v1_small")] == ["mednext_v2_tiny", "mednext_v1_small"]


def test_it_says_where_a_name_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(FileNotFoundError, match="livers: there is no such file or folder, and no model of that name below models.*owner/name.*zoo list"):
        create_model(pretrained="livers")
    with pytest.raises(FileNotFoundError, match="mednextv2 zoo fetch totalsegmentator_ct_291"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("HOME", str(tmp_path))
        create_model(pretrained="totalsegmentator_ct_291")


def test_a_checkpoint_of_another_program(folder, tmp_path):
    _, trained = folder
    torch.save({"state_dict": trained.state_dict() | {"dummy_tensor": torch.ones(1)}}, tmp_path / "authors.pth")
    model = create_model(pretrained=tmp_path / "authors.pth")
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.eval()(image), trained(image))
    assert find_checkpoint(tmp_path).name == "authors.pth"


@pytest.mark.parametrize("arch", [PRESETS["tiny"], replace(PRESETS["tiny"], strides=((1, 2, 2), *[(2, 2, 2)] * 3))], ids=["cubes", "thick slices"])
def test_features_are_the_encoder_s_and_nothing_else_is_there(arch):
    whole = create_model("tiny", 2, 3, strides=arch.strides)
    pyramid = create_model("tiny", 2, features_only=True, strides=arch.strides)
    assert isinstance(pyramid, FeaturePyramid) and set(pyramid.state_dict()) < set(whole.state_dict())
    pyramid.load_state_dict({name: value for name, value in whole.state_dict().items() if name in pyramid.state_dict()})
    image = torch.randn(1, 2, 16, 32, 32) if arch.strides else torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        levels, expected = pyramid(image), whole.encode(image)
    assert all(torch.equal(a, b) for a, b in zip(levels, expected, strict=True))
    for level, channels, reduction in zip(levels, pyramid.channels, pyramid.reductions, strict=True):
        assert level.shape == (1, channels, *(side // step for side, step in zip(image.shape[2:], reduction)))
    decoder = sum(p.numel() for name, p in whole.named_parameters() if name.startswith(("up_", "dec_", "out_")))
    assert count_parameters(pyramid) == count_parameters(whole) - decoder


def test_pretrained_features(folder):
    path, trained = folder
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        found = create_model(pretrained=path, features_only=True)(image)
        assert all(torch.equal(a, b) for a, b in zip(found, trained.encode(image), strict=True))


def test_thick_slices_through_card_windows_and_forecast(tmp_path):
    "Strides and kernels per axis, given as lists, in a model folder and wherever a patch has to fit"
    torch.manual_seed(0)
    flat = dict(TINY, strides=[[1, 2, 2], [1, 2, 2], 2, 2], kernels=[[1, 3, 3], [1, 3, 3], 3, 3, 3])
    model = create_model("base", 1, 3, deep_supervision=True, **flat).eval()
    assert model.strides == (4, 16, 16) and hash(tuple(overrides_of(model).items()))
    card = Card(**UNET_CARD | dict(backbone="mednext_v2_base", overrides=overrides_of(model), labels={"a": 1, "b": 2}, groups={}, patch=(8, 32, 32)))
    save_model(tmp_path / "flat", model, card)
    loaded, kept = load_model(tmp_path / "flat")
    assert loaded.arch == model.arch and kept.overrides["strides"] == ((1, 2, 2), (1, 2, 2), 2, 2)
    with torch.no_grad():
        scan = torch.randn(1, 1, 8, 32, 32)
        assert torch.equal(loaded(scan), model(scan)) and torch.equal(create_model(pretrained=tmp_path / "flat").eval()(scan), model(scan))
        assert sliding_window(loaded, torch.randn(1, 11, 40, 50), patch=(8, 32, 32)).shape == (3, 11, 40, 50)
    save_model(tmp_path / "bad", model, replace(card, patch=(6, 32, 32)))
    with pytest.raises(ValueError, match=r"patch must be divisible by \(4, 16, 16\), got \(6, 32, 32\)"):
        load_model(tmp_path / "bad")
    step = Step("mednext_v2_base", (8, 32, 32), overrides=tuple(overrides_of(model).items()))
    assert step.cost("cpu").parameters == count_parameters(model)
    assert fit_patch((64, 64, 64), (30, 70, 500), model.strides) == (28, 64, 64)
    assert all(not any(side % step for side, step in zip(patch, model.strides)) for patch in smaller_patches((20, 64, 64), model.stride))
