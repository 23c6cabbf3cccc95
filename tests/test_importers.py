"Weights of other programs: read without running them, the same function afterwards, or an error"

import argparse
import json
import math
import os
import pathlib
import pickle
import re
import zipfile
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monai.networks.nets import MedNeXt as MonaiMedNeXt
from monai.networks.nets import SegResNet, SwinUNETR
from safetensors.torch import save_file
from torch import nn

from mednext_v2.models.card import Card, read_card, save_model
from mednext_v2.models.registry import BACKBONES, Backbone, create, load_model
from mednext_v2.network.fused import use_fused
from mednext_v2.network.scaling import build_mednext
from mednext_v2.zoo import importers
from mednext_v2.zoo.importers import (
    MAPS,
    describe,
    detect_layout,
    guess_backbone,
    import_checkpoint,
    import_model,
    load_weights,
    nnunet_axes,
    nnunet_labels,
    nnunet_normalisation,
    open_checkpoint,
    parse_checkpoint,
    plans_metadata,
    read_content,
    rename_parameter,
    segresnet_arch,
    to_xyz_axes,
    unet_arch,
)

IMAGE = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def shaken(model):
    "A network whose every parameter matters: GRN and norms begin as identities otherwise"
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny(name="tiny", **changes):
    return shaken(build_mednext(name, 1, 3, **{"width": 4} | changes))


def save(path, content):
    torch.save(content, path)
    return path


# ---- Wrappings and prefixes

V2 = {  # As nnUNetTrainer.save_checkpoint of nnunetv2 2.8.1 writes it
    "optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01}]},
    "grad_scaler_state": None,
    "logging": {"mean_fg_dice": [np.float64(0.4)], "dice_per_class_or_region": [[np.float32(0.4), np.float64(0.2)]]},
    "_best_ema": np.float64(0.4),
    "current_epoch": 1000,
    "init_args": {"configuration": "3d_fullres", "fold": 0, "device": torch.device("cuda")},
    "trainer_name": "nnUNetTrainer",
    "inference_allowed_mirroring_axes": (0, 1, 2),
}
V1 = {  # As NetworkTrainer.save_checkpoint of nnU-Net v1 writes it
    "epoch": 50,
    "optimizer_state_dict": {},
    "lr_scheduler_state_dict": None,
    "plot_stuff": ([np.float64(0.1)], [np.float32(0.2)], [], [0.3]),
    "best_stuff": (np.float64(0.1), None, np.float64(0.3)),
    "amp_grad_scaler": {"scale": 65536.0},
}
NNSSL = V2 | {
    "nnssl_adaptation_plan": {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {"transpose_forward": [0, 1, 2], "configurations": {"onemmiso": {"spacing": [1, 2, 3], "patch_size": [160, 128, 96]}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [160, 160, 160],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv"],
        "key_to_lpe": None,
    }
}
WRAPPED = {
    "plain": lambda state: state,
    "nnunet_v2": lambda state: V2 | {"network_weights": state},
    "nnunet_v1": lambda state: V1 | {"state_dict": OrderedDict(state)},
    "nnssl": lambda state: NNSSL | {"network_weights": state},
    "suprem": lambda state: {"net": state, "optimizer": {}, "scheduler": {}, "epoch": 2100},
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "best_acc": 0.5},
    "run": lambda state: {"model": state, "identity": {}, "progress": {"step": 7}, "optimizer": {}},
    "model": lambda state: {"model": state},
    "model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}, "loss": 0.1},
    "network": lambda state: {"network": state, "epoch": 3},
    "teacher": lambda state: {"student": {name: value + 1 for name, value in state.items()}, "teacher": state, "epoch": 3},
    "student": lambda state: {"student": state, "epoch": 3},
}


PREFIXES = ["", "_orig_mod.", "module._orig_mod.", "module.backbone."]


@pytest.mark.parametrize("wrapping, prefix", [*((w, "module.") for w in WRAPPED), *(("plain", p) for p in PREFIXES)])
def test_every_wrapping_and_prefix_gives_the_same_output(wrapping, prefix, tmp_path):
    source = tiny()
    state = {prefix + name: value for name, value in source.state_dict().items()}
    path = save(tmp_path / "a.pth", WRAPPED[wrapping](state))
    assert detect_layout(path) == f"{wrapping}/mednext"
    # Turned where the plan of nnssl says that the axes are others
    image = IMAGE if wrapping != "nnssl" else IMAGE.transpose(2, 4)
    expected = source(image)
    expected = expected if wrapping != "nnssl" else expected.transpose(2, 4)
    model, report, _ = import_checkpoint(path)
    torch.testing.assert_close(model.eval()(IMAGE), expected)
    assert report.coverage == 1 and not report.skipped and not report.missing


def test_what_the_wrapping_tells_is_found(tmp_path):
    state = tiny().state_dict()
    found = {name: open_checkpoint(save(tmp_path / name, wrap(state))) for name, wrap in WRAPPED.items()}
    epochs = {"nnunet_v2": 1000, "nnunet_v1": 50, "nnssl": 1000, "suprem": 2100, "run": 7, "plain": None}
    assert {name: found[name].epoch for name in epochs} == epochs
    assert found["nnunet_v2"].trainer == "nnUNetTrainer"
    assert found["nnssl"].spacing == (3.0, 2.0, 1.0) and found["nnssl"].patch == (96, 128, 160)
    assert all(f.licence == "not available" and f.labels is None for f in found.values())
    assert {(f.in_channels, f.num_classes, f.backbone) for f in found.values()} == {(1, 3, "mednext_v2_tiny")}


def test_plans_that_are_not_understood_are_noted_and_the_weights_still_load(tmp_path):
    content = NNSSL | {"network_weights": tiny().state_dict(), "nnssl_adaptation_plan": [1, 2]}
    found = open_checkpoint(save(tmp_path / "a.pth", content))
    assert found.spacing is None and any("not understood" in note for note in found.notes)
    assert import_checkpoint(tmp_path / "a.pth").report.coverage == 1


def test_safetensors_and_half_precision(tmp_path):
    source = tiny().half()
    save_file(source.state_dict(), tmp_path / "a.safetensors")
    model = import_checkpoint(tmp_path / "a.safetensors").model
    assert torch.equal(model.eval()(IMAGE), source.float()(IMAGE))


# ---- MedNeXt under other names


def monai(ratios=((2, 3), 3, (3, 2)), blocks=((1, 2), 2, (2, 1)), grn=False, kernel=3, **options):
    model = MonaiMedNeXt(
        init_filters=4,
        in_channels=1,
        out_channels=3,
        kernel_size=kernel,
        use_residual_connection=True,
        encoder_expansion_ratio=ratios[0],
        bottleneck_expansion_ratio=ratios[1],
        decoder_expansion_ratio=ratios[2],
        blocks_down=blocks[0],
        blocks_bottleneck=blocks[1],
        blocks_up=blocks[2],
        global_resp_norm=grn,
        **options,
    )
    return shaken(model)


FOUR = (((2, 3, 4, 4), 4, (4, 4, 3, 2)), ((1, 1, 2, 1), 1, (1, 2, 1, 1)))


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("grn", [False, True])
@pytest.mark.parametrize("shape", [((2, 2), 2, (2, 2)), ((2, 3), 3, (3, 2)), FOUR], ids=["even", "rising", "base"])
def test_monai_mednext_gives_the_same_output(shape, grn, kernel, tmp_path):
    source = monai(*shape if shape is FOUR else (shape,), grn=grn, kernel=kernel)
    path = save(tmp_path / "a.pth", source.state_dict())
    model, report, found = import_checkpoint(path)
    assert found.layout == "plain/mednext_monai" and model.arch.kernel == kernel
    assert model.arch.grn == ("mean" if grn else None)
    torch.testing.assert_close(use_fused(model.eval(), False)(IMAGE), source(IMAGE), rtol=1e-4, atol=1e-5)
    down = {name for name in report.adapted if name.startswith("down_")}
    assert down == set(report.adapted) and report.coverage == 1


def test_channels_added_to_a_down_block_learn(tmp_path):
    source = monai()
    model = import_checkpoint(save(tmp_path / "a.pth", source.state_dict())).model
    with torch.enable_grad():
        model(IMAGE).square().mean().backward()
    added = model.down_0.conv3.weight.grad[:, 8:]
    assert model.down_0.conv3.weight[:, 8:].abs().sum() == 0 and added.abs().min() > 0


def test_monai_auxiliary_heads_are_those_of_the_same_level(tmp_path):
    source = monai(grn=True, deep_supervision=True)
    path = save(tmp_path / "a.pth", source.state_dict())
    model = import_checkpoint(path, deep_supervision=True).model.eval()
    model.list_in_eval = True
    ours, theirs = model(IMAGE), source.train()(IMAGE)
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    report = import_checkpoint(path).report  # And they may stay behind
    assert {name.split(".")[0] for name in report.skipped} == {"out_1", "out_2"}


def public_v1(model):
    "A restatement of the public v1 class's names, from MONAI's, which was derived from it"
    levels, state = len(model.enc_stages), {}
    places = {"stem": "stem", "bottleneck": "bottleneck", "out_0": "out_0"}
    for i in range(levels):
        places |= {f"enc_stages.{i}": f"enc_block_{i}", f"down_blocks.{i}": f"down_{i}"}
        places |= {f"up_blocks.{i}": f"up_{levels - 1 - i}", f"dec_stages.{i}": f"dec_block_{levels - 1 - i}"}
    for name, value in model.state_dict().items():
        place = next(p for p in places if name.startswith(p + "."))
        state[(places[place] + name.removeprefix(place)).replace("global_resp_", "grn_")] = value
    return state | {"dummy_tensor": torch.ones(1)}


@pytest.mark.parametrize("grn", [False, True])
def test_public_v1_class_gives_the_same_output(grn, tmp_path):
    source = monai(ratios=((2, 2), 2, (2, 2)), grn=grn)
    path = save(tmp_path / "model_final_checkpoint.model", V1 | {"state_dict": public_v1(source)})
    model, report, found = import_checkpoint(path)
    assert (found.layout, report.skipped) == ("nnunet_v1/mednext", ("dummy_tensor",))
    torch.testing.assert_close(model.eval()(IMAGE), source(IMAGE), rtol=1e-4, atol=1e-5)
    names = {name for name in report.adapted}
    assert names == ({f"down_{i}.grn_{p}" for i in range(2) for p in ("gamma", "beta")} if grn else set())


@pytest.mark.parametrize("target", ["mean", "sum"])
@pytest.mark.parametrize("source", ["mean", "sum"])
def test_weights_of_either_grn_convention_fit_a_model_of_either(source, target, tmp_path):
    "What official weights will need: their names may be ours, their convention is not known"
    weights = tiny(grn=source)
    path = save(tmp_path / "a.pth", weights.state_dict())
    model, report, _ = import_checkpoint(path, tiny(grn=target), grn=source)
    torch.testing.assert_close(model(IMAGE), weights(IMAGE), rtol=1e-3, atol=1e-4)
    gammas = {name for name in model.state_dict() if name.endswith("grn_gamma")}
    assert set(report.adapted) == (gammas if source != target else set())
    if source != target:  # Said wrongly, it is another function
        wrong = import_checkpoint(path, tiny(grn=target), grn=target).model
        assert (wrong(IMAGE) - weights(IMAGE)).abs().max() > 1e-2


def test_a_network_built_from_a_file_has_the_convention_that_is_given(tmp_path):
    weights = tiny(grn="sum")
    model = import_checkpoint(save(tmp_path / "a.pth", weights.state_dict()), grn="sum").model
    assert model.arch == weights.arch and torch.equal(model.eval()(IMAGE), weights(IMAGE))


ACCEL = {
    "conv1": "depthwise",
    "conv2": "expand",
    "conv3": "project",
    "res_conv": "residual",
    "grn_gamma": "grn.gamma",
    "grn_beta": "grn.beta",
    "conv_out": "conv",
}


def accel(model):
    "The names of mednext-accel's MedNeXtV2 (models/mednext_v2.py, blocks_v2.py), from ours"
    state = {}
    for name, value in model.state_dict().items():
        place, *rest = name.split(".")
        kind, _, level = place.rpartition("_")
        i = int(level) if level.isdigit() else 0
        place = {
            "enc_block": f"encoder_stages.{i}",
            "down": f"downsamples.{i}",
            "up": f"upsamples.{3 - i}",
            "dec_block": f"decoder_stages.{3 - i}",
            "out": f"deep_supervision_heads.{4 - i}" if i else "head",
        }.get(kind, place)
        state[".".join([place, *(ACCEL.get(part, part) for part in rest)])] = value
    return state


def test_mednext_accel_needs_a_word_on_padding(tmp_path):
    source = tiny(grn="sum", deep_supervision=True)
    path = save(tmp_path / "a.pth", accel(source))
    assert detect_layout(path) == "plain/mednext_accel"
    with pytest.raises(ValueError, match="allow 'padding'"):
        import_checkpoint(path)
    model, report, found = import_checkpoint(path, allow=("padding",), deep_supervision=True)
    assert model.arch.grn == "sum" and report.coverage == 1 and not report.adapted
    for name, value in model.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name


@pytest.mark.parametrize("names", MAPS)
def test_names_map_one_to_one(names):
    ours = tiny(deep_supervision=True).state_dict()
    theirs = {
        "mednext": ours,
        "mednext_accel": accel(tiny(deep_supervision=True)),
        "mednext_monai": monai(*FOUR, grn=True, deep_supervision=True).state_dict(),
    }[names]
    renamed = [rename_parameter(name, MAPS[names], 4) for name in theirs]
    assert len(set(renamed)) == len(theirs)
    # Block counts differ between these networks, names do not
    heads = {name.split(".")[0] for name in ours}
    assert {name.split(".")[0] for name in renamed} == heads


# ---- Classes of other packages


def dna(cls, residual, **changes):
    kwargs = {
        "n_stages": 3,
        "features_per_stage": [4, 8, 12],
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage_decoder": [1, 2],
        "conv_bias": True,
        ("n_blocks_per_stage" if residual else "n_conv_per_stage"): [1, 2, 3],
        **changes,
    }
    fixed = dict(
        conv_op=nn.Conv3d, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}
    )
    return shaken(cls(1, num_classes=3, **kwargs, **fixed)), kwargs


DNA = {"resenc": (ResidualEncoderUNet, True), "nnunet_plain": (PlainConvUNet, False)}


@pytest.mark.parametrize("family", DNA)
@pytest.mark.parametrize("bias", [True, False])
def test_nnunet_networks_are_read_off_their_weights(family, bias):
    model, kwargs = dna(*DNA[family], conv_bias=bias)
    assert unet_arch(model.state_dict(), DNA[family][1]) == kwargs
    backbone, overrides = guess_backbone(family, model.state_dict())
    assert backbone == {"resenc": "resenc_l", "nnunet_plain": "nnunet_plain"}[family] and overrides == kwargs


@pytest.mark.parametrize("family", DNA)
def test_nnunet_networks_give_the_same_output(family, tmp_path):
    source, _ = dna(*DNA[family])
    model, _ = dna(*DNA[family])
    path = save(tmp_path / "a.pth", V2 | {"network_weights": source.state_dict()})
    assert detect_layout(path) == f"nnunet_v2/{family}"
    _, report, _ = import_checkpoint(path, model)
    assert torch.equal(model(IMAGE), source(IMAGE)) and report.coverage == 1


class Holder(nn.Module):
    "A backbone that keeps another package's class under `network.`"

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def test_a_network_may_be_part_of_the_model(tmp_path):
    source, _ = dna(*DNA["resenc"])
    model = Holder(dna(*DNA["resenc"])[0])
    import_checkpoint(save(tmp_path / "a.pth", source.state_dict()), model)
    assert torch.equal(model(IMAGE), source(IMAGE))


@pytest.mark.parametrize("forward", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("family", DNA)
def test_exchanged_axes_are_the_same_function(family, forward):
    source, _ = dna(*DNA[family], strides=[[1, 1, 1], [1, 2, 4], [2, 1, 2]])
    found = parse_checkpoint(source.state_dict(), "a.pth")
    axes = nnunet_axes({"transpose_forward": forward})
    ours = to_xyz_axes(importers.replace(found, axes=axes))
    model, _ = dna(*DNA[family], **ours.overrides)
    load_weights(model, ours)
    image = torch.randn(1, 1, 16, 24, 32)  # (X, Y, Z)
    # What nnU-Net does: an array of (Z, Y, X), transposed by the plans
    theirs = image.permute(0, 1, 4, 3, 2).permute(0, 1, *(2 + axis for axis in forward))
    scores = source(theirs).permute(0, 1, *(2 + axis for axis in np.argsort(forward))).permute(0, 1, 4, 3, 2)
    torch.testing.assert_close(model(image), scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("newer", [False, True])
def test_suprem_and_voco_give_the_same_output(newer, tmp_path):
    options = dict(in_channels=1, out_channels=3, feature_size=12, depths=(1, 1, 1, 1), use_v2=newer)
    networks = [shaken(SwinUNETR(**options)) for _ in range(3)]
    (source, *targets), image = networks, torch.randn(1, 1, 64, 32, 32)
    text = {"module.organ_embedding": torch.zeros(2), "module.precls_conv.0.weight": torch.ones(3)}
    suprem = {"net": {f"module.backbone.{n}": v for n, v in source.state_dict().items()} | text, "epoch": 1}
    voco = {f"module.{n.replace('swinViT', 'swin_vit')}": v for n, v in source.state_dict().items()}
    for layout, content, model in zip(("suprem", "plain"), (suprem, voco), targets):
        path = save(tmp_path / f"{layout}.pth", content)
        _, report, found = import_checkpoint(path, model)
        assert found.layout == f"{layout}/swin_unetr" and report.coverage == 1
        assert found.backbone == ("swin_unetr_v2" if newer else "swin_unetr")
        assert found.overrides == {"feature_size": 12, "depths": (1,) * 4}
        assert torch.equal(model(image), source(image))
    assert parse_checkpoint(suprem, "a").outside == tuple(text)


def test_suprem_segresnet_gives_the_same_output(tmp_path):
    options = {"init_filters": 8, "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1]}
    source = shaken(SegResNet(in_channels=1, out_channels=3, **options))
    assert segresnet_arch(source.state_dict()) == options
    model = SegResNet(in_channels=1, out_channels=3, **options).eval()
    path = save(tmp_path / "a.pth", {"net": source.state_dict()})
    assert import_checkpoint(path, model).checkpoint.layout == "suprem/segresnet"
    assert torch.equal(model(IMAGE), source(IMAGE))


class ResBlock(nn.Module):
    "STU-Net's BasicResBlock, by its names"

    def __init__(self, a, b, shortcut):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(a, b, 3, padding=1), nn.Conv3d(b, b, 3, padding=1)
        self.norm1, self.norm2 = nn.InstanceNorm3d(b, affine=True), nn.InstanceNorm3d(b, affine=True)
        self.conv3 = nn.Conv3d(a, b, 1) if shortcut else None


class Upsample(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.conv = nn.Conv3d(a, b, 1)


class STUNet(nn.Module):
    "The names of STU-Net (nnUNet-1.7.1/nnunet/network_architecture/STUNet.py at 0652eaf), three levels of it"

    def __init__(self, width=16, classes=5):
        super().__init__()
        dims = [width, 2 * width, 4 * width]
        self.conv_blocks_context = nn.ModuleList(nn.Sequential(ResBlock(a, b, True)) for a, b in zip([1, *dims], dims))
        self.upsample_layers = nn.ModuleList(Upsample(dims[-1 - u], dims[-2 - u]) for u in range(2))
        self.conv_blocks_localization = nn.ModuleList(nn.Sequential(ResBlock(2 * dims[-2 - u], dims[-2 - u], True)) for u in range(2))
        self.seg_outputs = nn.ModuleList(nn.Conv3d(dims[-2 - u], classes, 1) for u in range(2))


def test_stunet_in_a_v1_checkpoint(tmp_path):
    source, model = STUNet(), STUNet()
    path = save(tmp_path / "large_ep4k.model", V1 | {"state_dict": source.state_dict()})
    _, report, found = import_checkpoint(path, model)
    assert (found.layout, found.num_classes) == ("nnunet_v1/stunet", 5)
    assert (found.backbone, found.overrides) == ("stunet_small", {"widths": (16, 32, 64), "depths": (1, 1, 1)})
    assert report.coverage == 1 and not report.skipped
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("size, width, depth", [("small", 16, 1), ("base", 32, 1), ("large", 64, 2), ("huge", 96, 3)])
def test_published_stunets_are_told_by_their_size(size, width, depth):
    "Depths and widths of STUNetTrainer_small to _huge (nnUNet-2.2, STUNetTrainer.py at 0652eaf)"
    state = {
        f"conv_blocks_context.{i}.{block}.conv1.weight": torch.empty(width * n, 1, 3, 3, 3, device="meta")
        for i, n in enumerate((1, 2, 4, 8, 16, 16))
        for block in range(depth)
    }
    assert guess_backbone("stunet", state) == (f"stunet_{size}", {})


def test_nnssl_checkpoint_of_an_encoder_and_decoder(tmp_path):
    source, kwargs = dna(*DNA["resenc"])
    found = open_checkpoint(save(tmp_path / "a.pth", NNSSL | {"network_weights": source.state_dict()}))
    assert found.layout == "nnssl/resenc" and found.overrides == kwargs and found.axes == (2, 1, 0)
    text = describe(tmp_path / "a.pth")
    assert "pretrained without labels: ResEncL" in text and "3 x 2 x 1 mm" in text


# ---- nnU-Net's folder

PLANS = {
    "dataset_name": "Dataset001_Toy",
    "transpose_forward": [0, 2, 1],
    "image_reader_writer": "SimpleITKIO",
    "foreground_intensity_properties_per_channel": {"0": {"mean": 40.0, "std": 20.0, "median": 39.0, "percentile_00_5": -100.0, "percentile_99_5": 200.0}},
    "configurations": {
        "3d_fullres": {
            "spacing": [3.0, 1.0, 2.0],
            "patch_size": [16, 32, 64],
            "normalization_schemes": ["CTNormalization"],
            "use_mask_for_norm": [False],
            "architecture": {"arch_kwargs": {"dropout_op": None}},
        }
    },
}
DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 2, "liver": 1}}


def nnunet_folder(folder, state, plans=PLANS, dataset=DATASET, folds=("0",)):
    for fold in folds:
        (folder / f"fold_{fold}").mkdir(parents=True)
        save(folder / f"fold_{fold}" / "checkpoint_final.pth", V2 | {"network_weights": state})
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return folder


@pytest.mark.parametrize("family", DNA)
def test_auxiliary_heads_of_nnunet_may_stay_behind_but_not_the_last(family, tmp_path):
    source, _ = dna(*DNA[family])
    model, _ = dna(*DNA[family])
    model.decoder.seg_layers[0] = nn.Identity()
    path = save(tmp_path / "a.pth", V2 | {"network_weights": source.state_dict()})
    report = import_checkpoint(path, model).report
    assert report.skipped == ("decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias")
    assert torch.equal(model(IMAGE), source(IMAGE))
    model.decoder.seg_layers[1] = nn.Conv3d(4, 7, 1)
    with pytest.raises(ValueError, match="decoder.seg_layers.1.weight"):
        import_checkpoint(path, model)


@pytest.fixture
def resenc(monkeypatch):
    "The registry with nnU-Net's residual encoder, whether this version has it or not"
    if "resenc_l" not in BACKBONES:

        def build(in_channels, num_classes, deep_supervision=False, **kwargs):
            return dna(*DNA["resenc"], **kwargs)[0]

        entry = Backbone("resenc_l", "", build, heads=("decoder.seg_layers.",), stem="encoder.stem.")
        monkeypatch.setitem(BACKBONES, "resenc_l", entry)


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", None, "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_the_axes_of_training_are_known_only_of_readers_that_turn_scans(tmp_path, resenc, reader, recwarn):
    place = nnunet_folder(tmp_path / "T__P__3d_fullres", dna(*DNA["resenc"])[0].state_dict(), PLANS | {"image_reader_writer": reader})
    known = bool(reader) and reader.endswith("Reorient")
    card, _ = import_model(place, tmp_path / "ours")
    said = [str(warning.message) for warning in recwarn if "set orientation to RAS in card.json" in str(warning.message)]
    assert card.orientation == read_card(tmp_path / "ours").orientation == ("RAS" if known else "unknown") and len(said) == (not known)
    assert known or "trained in the orientation of its files" in card.provenance and str(place) in said[0]
    recwarn.clear()
    assert import_model(place, tmp_path / "told", {"orientation": "RAS"})[0].orientation == "RAS" and not [w for w in recwarn if "axes" in str(w.message)]


def test_nnunet_folder_becomes_a_model_folder(tmp_path, resenc):
    source, _ = dna(*DNA["resenc"])
    place = nnunet_folder(tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres", source.state_dict())
    card, report = import_model(place, tmp_path / "ours", {"licence": "Apache-2.0"})
    assert report.coverage == 1
    assert (card.backbone, card.labels, card.modality) == ("resenc_l", {"liver": 1, "spleen": 2}, "CT")
    # The network's axes are Z, X, Y of the image: (0, 2, 1) of (Z, Y, X)
    assert (card.spacing, card.patch) == ((1.0, 2.0, 3.0), (32, 64, 16))
    assert card.normalisation == {"mean": [40.0], "std": [20.0], "low": [-100.0], "high": [200.0], "schemes": ["ct"], "nonzero": False}
    assert card.licence == "Apache-2.0" and "orientation" in card.provenance and len(card.parent) == 64
    model, read = load_model(tmp_path / "ours")
    assert read.overrides["kernel_sizes"][0] == (3, 3, 1) and read.mirror_axes == (0, 1, 2)
    image = torch.randn(1, 1, 16, 24, 32)
    scores = source(image.permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(model(image), scores, rtol=1e-4, atol=1e-5)


def test_axes_of_mirroring_turn_with_the_network(tmp_path):
    source, _ = dna(*DNA["resenc"])
    place = nnunet_folder(tmp_path / "T__P__3d_fullres", source.state_dict())
    path = place / "fold_0" / "checkpoint_final.pth"
    save(path, V2 | {"network_weights": source.state_dict(), "inference_allowed_mirroring_axes": (0, 2)})
    card, _ = import_model(place, tmp_path / "ours")
    assert card.mirror_axes == (1, 2)  # Of the network's Z, X, Y the first and the last
    save(path, V2 | {"network_weights": source.state_dict(), "inference_allowed_mirroring_axes": ()})
    assert import_model(place, tmp_path / "ours")[0].mirror_axes == ()  # nnUNetTrainerNoMirroring


def test_a_mednext_trained_by_nnunet_becomes_a_model_folder(tmp_path):
    source = tiny()
    place = nnunet_folder(tmp_path / "T__P__3d_fullres", source.state_dict())
    import_model(place, tmp_path / "ours")
    model, card = load_model(tmp_path / "ours")
    scores = source(IMAGE.permute(0, 1, 4, 2, 3)).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(model(IMAGE), scores, rtol=1e-4, atol=1e-5)
    assert card.licence == "not available" and card.groups == {}
    assert detect_layout(tmp_path / "ours") == "model_folder/mednext"


def test_folds_are_named(tmp_path):
    place = nnunet_folder(tmp_path / "a", tiny().state_dict(), folds=("0", "1"))
    assert open_checkpoint(place).notes[0] == "fold 0; there are also: 1"
    assert open_checkpoint(place, fold="1").path.endswith("fold_1/checkpoint_final.pth")
    with pytest.raises(FileNotFoundError, match="no fold 7; it has: 0, 1"):
        open_checkpoint(place, fold="7")


def test_regions_and_their_order():
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    told = nnunet_labels({"labels": labels, "regions_class_order": [1, 2, 3]})
    assert told["regions"] == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert told["class_order"] == (1, 2, 3) and told["labels"] == {"value 1": 1, "value 2": 2, "enhancing": 3}
    with pytest.raises(ValueError, match="values 1 to 2"):
        nnunet_labels({"labels": {"background": 0, "a": 1, "b": 3}})


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [True]}, True),
        ({"normalization_schemes": ["HistogramNormalization"], "use_mask_for_norm": [False]}, None),
        ({"normalization_schemes": ["ZScoreNormalization"] * 2, "use_mask_for_norm": [True, False]}, None),
        ({"normalization_schemes": ["CTNormalization"] * 2, "use_mask_for_norm": [False, False]}, None),
    ],
    ids=["masked", "unknown", "mixed", "unmeasured"],
)
def test_a_normalisation_that_is_not_ours_is_not_made_up(change, expected):
    known = nnunet_normalisation(PLANS, PLANS["configurations"]["3d_fullres"] | change)
    assert known is None if expected is None else known["nonzero"] is expected


def test_settings_that_shapes_do_not_tell_are_checked(tmp_path, resenc):
    plans = json.loads(json.dumps(PLANS))
    plans["configurations"]["3d_fullres"]["architecture"] = {"arch_kwargs": {"nonlin": "torch.nn.ReLU"}}
    source, _ = dna(*DNA["resenc"])
    place = nnunet_folder(tmp_path / "T__P__3d_fullres", source.state_dict(), plans)
    assert "not a network of ours: nonlin=torch.nn.ReLU" in describe(place)
    with pytest.raises(ValueError, match="does not say which network it is"):
        import_model(place, tmp_path / "ours")


def test_the_second_stage_of_a_cascade_is_refused(tmp_path):
    state = tiny().state_dict() | {"stem.weight": torch.ones(4, 3, 1, 1, 1)}
    with pytest.raises(ValueError, match="takes 3 channels, and its data set has CT"):
        import_model(nnunet_folder(tmp_path / "T__P__3d_fullres", state), tmp_path / "ours")


def test_an_inherited_configuration_and_a_reoriented_reader():
    plans = PLANS | {"image_reader_writer": "NibabelIOWithReorient"}
    low = {"inherits_from": "3d_fullres", "patch_size": [8, 16, 24]}
    plans["configurations"] = PLANS["configurations"] | {"3d_low": low}
    facts = plans_metadata(plans, "3d_low", DATASET)
    assert facts["patch"] == (16, 24, 8) and facts["spacing"] == (1.0, 2.0, 3.0)
    assert facts["notes"] == ("trained on images turned to RAS",)


def test_a_card_needs_what_prediction_needs(tmp_path):
    path = save(tmp_path / "a.pth", tiny().state_dict())
    with pytest.raises(ValueError, match="does not state labels, spacing, patch, normalisation"):
        import_model(path, tmp_path / "ours")
    facts = {"labels": {"liver": 1, "spleen": 2}, "spacing": (1.0,) * 3, "patch": (32,) * 3, "normalisation": {"schemes": ("zscore",), "nonzero": False}}
    with pytest.raises(ValueError, match="has 3 outputs, and its classes make 2"):
        import_model(path, tmp_path / "ours", facts | {"labels": {"liver": 1}})
    assert not (tmp_path / "ours").exists()
    assert import_model(path, tmp_path / "ours", facts)[0].recipe["imported"] == "plain/mednext"


# ---- Closed


def test_less_than_the_whole_network_is_an_error_and_changes_nothing(tmp_path):
    source, model = tiny(), tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value for name, value in source.state_dict().items() if not name.startswith(("up_1.", "out_0."))}
    path = save(tmp_path / "a.pth", state | {"extra.weight": torch.ones(1)})
    for allow, named in (((), "up_1"), (("up_1.*", "out_*"), "extra.weight"), (("extra*", "up_1.*"), "out_0")):
        with pytest.raises(ValueError, match=named):
            import_checkpoint(path, model, allow=allow)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = import_checkpoint(path, model, allow=("extra*", "up_1.*", "out_0.*")).report
    assert {name.split(".")[0] for name in report.missing} == {"up_1", "out_0"} and report.coverage < 1
    assert torch.equal(model.stem.weight, source.stem.weight)


def test_another_number_of_classes_is_an_error_unless_the_head_is_allowed(tmp_path):
    path = save(tmp_path / "a.pth", tiny().state_dict())
    model = build_mednext("tiny", 1, 5, width=4)
    with pytest.raises(ValueError, match="out_0.conv_out.weight"):
        import_checkpoint(path, model)
    report = import_checkpoint(path, model, allow=("out_0.*",)).report
    assert report.shapes["out_0.conv_out.bias"] == ((5,), (3,)) and "out_0.conv_out.bias" in report.missing


def test_a_grn_network_does_not_fit_a_v1_model(tmp_path):
    path = save(tmp_path / "a.pth", tiny().state_dict())
    with pytest.raises(ValueError, match="not in the model"):
        import_checkpoint(path, build_mednext("v1_small", 1, 3, width=4, depths=(1,) * 9))


def test_another_network_is_named(tmp_path):
    path = save(tmp_path / "a.pth", tiny().state_dict())
    with pytest.raises(ValueError, match="holds mednext, and the model is resenc"):
        import_checkpoint(path, dna(*DNA["resenc"])[0])
    with pytest.raises(ValueError, match="holds mednext, and the model is Linear"):
        import_checkpoint(path, nn.Linear(1, 1))


def test_two_networks_in_one_file_need_a_prefix(tmp_path):
    both = {f"{who}.{n}": v for who in ("student", "teacher") for n, v in tiny().state_dict().items()}
    path = save(tmp_path / "a.pth", both)
    with pytest.raises(ValueError, match="two networks in one file, at student. and teacher."):
        open_checkpoint(path)
    found = open_checkpoint(path, prefix="teacher.")
    assert len(found.outside) == len(found.state) == len(both) // 2


@pytest.mark.parametrize("options, why", [({"spatial_dims": 2}, "2D images"), ({"use_residual_connection": False}, "residual up and down blocks")])
def test_a_mednext_that_ours_is_not(options, why, tmp_path):
    state = MonaiMedNeXt(
        init_filters=4, blocks_down=(1, 1), blocks_up=(1, 1), blocks_bottleneck=1, kernel_size=3, **{"use_residual_connection": True} | options
    ).state_dict()
    path = save(tmp_path / "a.pth", state)
    assert why in describe(path)
    with pytest.raises(ValueError, match="give a model"):
        import_checkpoint(path)


def test_a_transformer_is_not_turned():
    found = parse_checkpoint(SwinUNETR(in_channels=1, out_channels=3, feature_size=12).state_dict(), "a.pth")
    with pytest.raises(ValueError, match="cannot be exchanged"):
        to_xyz_axes(importers.replace(found, axes=(2, 1, 0)))


@pytest.mark.parametrize(
    "content, why",
    [
        ([1, 2], "holds a list"),
        ({}, "it has: nothing"),
        ({"weights": 1}, "it has: weights"),
        (torch.ones(1), "a Tensor"),
        ({"state_dict": {"a": 1}}, "it has: state_dict"),
    ],
)
def test_a_file_without_weights(content, why, tmp_path):
    with pytest.raises(ValueError, match=why):
        open_checkpoint(save(tmp_path / "a.pth", content))


def test_weights_of_an_unknown_class_are_described_and_not_loaded(tmp_path):
    path = save(tmp_path / "a.pth", nn.Linear(2, 3).state_dict())
    assert detect_layout(path) == "plain/unknown"
    assert "9 numbers in 2 tensors, weight (3, 2) to bias (3,)" in describe(path)
    with pytest.raises(ValueError, match="give a model"):
        import_checkpoint(path)


# ---- Files that lie


class Payload:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_refused_at_once_and_never_run(tmp_path, monkeypatch):
    path = save(tmp_path / "a.pth", V2 | {"network_weights": tiny().state_dict(), "logging": Payload(tmp_path / "ran")})
    calls, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k["weights_only"]) or load(*a, **k))
    for reader in (read_content, open_checkpoint, detect_layout, describe, import_checkpoint):
        with pytest.raises(ValueError, match="mkdir: refused, and nothing of it was run"):
            reader(path)
    assert calls == [True] * 5 and not (tmp_path / "ran").exists()
    # Said explicitly, it is run: that is what the word means
    assert open_checkpoint(path, trust=True).family == "mednext"
    assert calls[-1] is False and (tmp_path / "ran").exists()


@pytest.mark.parametrize("asked", [slice(1), print, np.load, np.memmap], ids=["slice", "print", "load", "memmap"])
def test_no_function_is_on_the_list(asked, tmp_path):
    before = set(map(str, torch.serialization.get_safe_globals()))
    with pytest.raises(ValueError, match="asks to run"):
        read_content(save(tmp_path / "a.pth", {"state_dict": {"a": torch.ones(1)}, "epoch": asked}))
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_a_bare_pickle_is_refused(tmp_path):
    for name in ("a.pkl", "a.pth", "a.model", "a.model.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        with pytest.raises(ValueError, match="not an archive of torch.save|never read"):
            read_content(tmp_path / name)
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before PyTorch 1.6"):
        read_content(tmp_path / "old.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_truncated_file_says_so(kind, share, tmp_path):
    path = tmp_path / f"a.{kind}"
    (save_file if kind == "safetensors" else torch.save)(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match="cut short|truncated|altered"):
        read_content(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = save(tmp_path / "a.pth", {"w": torch.zeros(1000)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checksum of a/data/0 is wrong"):
        read_content(path)


class Lie:
    "A tensor whose pickle claims another shape than its storage holds"

    def __init__(self, shape, stride):
        self.shape, self.stride = shape, stride

    def __reduce__(self):
        storage = torch.storage.TypedStorage(wrap_storage=torch.zeros(8).untyped_storage(), dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.shape, self.stride, False, OrderedDict())


@pytest.mark.parametrize("lie", [Lie((10**7, 10**6), (10**6, 1)), Lie((10**7, 10**6), (0, 0))], ids=["size", "stride"])
def test_a_huge_declared_shape_is_refused_before_it_is_allocated(lie, tmp_path):
    with pytest.raises(ValueError, match=r"state_dict.w claims the shape \(10000000, 1000000\)"):
        read_content(save(tmp_path / "a.pth", {"state_dict": {"w": lie}}))


def rewritten(source, path, change, compression=zipfile.ZIP_STORED):
    "An archive with its pickle changed"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


def test_a_huge_declared_storage_is_refused(tmp_path):
    small = save(tmp_path / "a.pth", {"w": torch.zeros(70_000)})
    true, lie = (b"J" + n.to_bytes(4, "little") for n in (70_000, 2 * 10**9))
    path = rewritten(small, tmp_path / "b.pth", lambda data: data.replace(true, lie))
    with pytest.raises(ValueError, match="claims the shape"):
        read_content(path)


def test_a_compressed_archive_is_refused(tmp_path):
    small = save(tmp_path / "a.pth", {"w": torch.zeros(10**6)})
    path = rewritten(small, tmp_path / "b.pth", bytes, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(ValueError, match="does not compress"):
        read_content(path)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}},
        {"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 64]}},
        {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 64]}},
        dict.fromkeys("wv", {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}),
    ],
    ids=["beyond", "shape", "negative", "overlap"],
)
def test_safetensors_with_a_lying_header(header, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(ValueError, match="not read"):
        read_content(tmp_path / "a.safetensors")


def test_safetensors_with_a_huge_header(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((2**62).to_bytes(8, "little") + bytes(64))
    with pytest.raises(ValueError, match="altered, and not read"):
        read_content(tmp_path / "a.safetensors")


def test_damaged_archives_always_give_one_line(tmp_path):
    "Random damage inside of the pickle: never another error than ours"
    small = save(tmp_path / "a.pth", V1 | {"state_dict": {"w": torch.zeros(3)}})
    random = np.random.default_rng(0)
    for turn in range(60):

        def damage(data):
            data = bytearray(data)
            for place in random.integers(0, len(data), 3):
                data[place] = random.integers(0, 256)
            return bytes(data)

        path = rewritten(small, tmp_path / f"{turn}.pth", damage)
        try:
            open_checkpoint(path)
        except ValueError as error:
            assert "\n" not in str(error)


def test_links(tmp_path):
    inside = nnunet_folder(tmp_path / "a", tiny().state_dict())
    target = inside / "fold_0" / "checkpoint_final.pth"
    target.rename(tmp_path / "elsewhere.pth")
    target.symlink_to(tmp_path / "elsewhere.pth")
    with pytest.raises(ValueError, match="a link out of"):
        open_checkpoint(inside)
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    (tmp_path / "mine.pth").symlink_to(tmp_path / "elsewhere.pth")
    with pytest.raises(FileNotFoundError, match="a broken link"):
        open_checkpoint(tmp_path / "loop.pth")
    assert detect_layout(tmp_path / "mine.pth") == "nnunet_v2/mednext"  # A link that a person gives is followed


def test_a_card_with_a_lying_hash(tmp_path):
    card = Card("mednext_v2_tiny", {"width": 4}, 1, {"a": 1, "b": 2}, {}, "t", "CT", (1.0,) * 3, (32,) * 3, {"schemes": ("zscore",), "nonzero": False}, {})
    save_model(tmp_path / "m", tiny(), card)
    assert "its sha256 is right" in describe(tmp_path / "m")
    text = (tmp_path / "m" / "card.json").read_text()
    digest = json.loads(text)["sha256"]
    (tmp_path / "m" / "card.json").write_text(text.replace(digest, "0" * 64))
    for reader in (describe, detect_layout, import_checkpoint):
        with pytest.raises(ValueError, match="altered: sha256"):
            reader(tmp_path / "m")


@pytest.mark.parametrize("name, text", [("plans.json", "{"), ("dataset.json", "[]"), ("plans.json", "[" * 100_000)])
def test_plans_that_are_not_json(name, text, tmp_path):
    folder = nnunet_folder(tmp_path / "a", tiny().state_dict())
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} (is not JSON|must hold one JSON object|is nested too deep)"):
        open_checkpoint(folder)


def test_plans_that_go_in_a_circle(tmp_path):
    plans = {"configurations": {"3d_fullres": {"inherits_from": "b"}, "b": {"inherits_from": "3d_fullres"}}}
    found = open_checkpoint(nnunet_folder(tmp_path / "a", tiny().state_dict(), plans))
    assert any("inherits from itself" in note for note in found.notes) and found.spacing is None


def test_folders_of_other_kinds(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        open_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_checkpoint(tmp_path / "nothing")
    save(tmp_path / "last.pt", WRAPPED["run"](tiny().state_dict()))
    assert detect_layout(tmp_path) == "run/mednext"


# ---- What a person holds


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_every_layout_is_described(wrapping, tmp_path):
    source = tiny()
    text = describe(save(tmp_path / "a.pth", WRAPPED[wrapping](source.state_dict())))
    total = sum(p.numel() for p in source.parameters())
    assert f"{wrapping}/mednext" in text and f"{total:,} numbers" in text and "mednext_v2_tiny {'width': 4}" in text
    assert "licence" in text.splitlines()[-1] and text.splitlines()[-1].startswith("not known:")


def test_shared_tensors_are_counted_once(tmp_path):
    model, _ = dna(*DNA["nnunet_plain"])
    text = describe(save(tmp_path / "a.pth", model.state_dict()))
    assert f"{sum(p.numel() for p in model.parameters()):,} numbers" in text


UNBUILT = ("primus", "unetr")  # Told by name; what their sizes are does not stand in their weights


@pytest.mark.parametrize("name", [name for name in BACKBONES if not name.startswith(UNBUILT)])
def test_every_network_of_the_registry_is_told_and_rebuilt(name, tmp_path):
    source = create(name, 1, 3, **BACKBONES[name].mini).eval()
    model, report, found = import_checkpoint(save(tmp_path / f"{name}.pth", source.state_dict()))
    assert found.backbone.split("_")[:2] == name.split("_")[:2] or not name.startswith("mednext")
    assert report.coverage == 1
    shapes = [{n: v.shape for n, v in m.state_dict().items()} for m in (model, source)]
    assert shapes[0] == shapes[1]


# ---- Other layouts


@pytest.mark.parametrize("key, content", [
    ("ema", lambda state: {"ema": state, "state_dict": {}}),
    ("ema.model", lambda state: {"ema": {"model": state}, "epoch": 1}),
    ("ema.model", lambda state: {"ema.model": state}),
    ("student", lambda state: {"student": state, "teacher": {"stem.weight": torch.ones(1)}}),
])  # fmt: skip
def test_weights_under_a_key_that_is_given(key, content, tmp_path):
    source = tiny()
    path = save(tmp_path / "a.pth", content(source.state_dict()))
    model, report, found = import_checkpoint(path, key=key)
    assert found.layout == "key/mednext" and report.coverage == 1
    assert torch.equal(model(IMAGE), source(IMAGE))
    for wrong in ("other", key + ".deeper", ""):
        with pytest.raises(ValueError, match=f"no weights under {wrong!r}; it has: {list(content({}))[0]}"):
            import_checkpoint(path, key=wrong)


SSL = {  # Names before and behind those of the encoder, as MONAI publishes them
    "model_swinvit.pt": (lambda n: "module." + n.replace("mlp.linear", "mlp.fc"), "state_dict", ["module.norm.weight"]),
    "one GPU": (lambda n: n.replace("mlp.linear", "mlp.fc"), "state_dict", ["rotation_head.weight", "norm.weight"]),
    "ssl_pretrained_weights.pth": (
        lambda n: "encoder." + re.sub(r"^(layers.\.0\.)", r"\g<1>0.", n), "model", ["encoder.mask_token", "decoder.0.weight"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", SSL)
def test_self_supervised_encoders_of_swin_unetr(layout, tmp_path):
    renamed, wrapping, more = SSL[layout]
    source, model = (create("swin_unetr", 1, 3, feature_size=12) for _ in range(2))
    encoder = {name: value for name, value in source.state_dict().items() if ".swinViT." in f".{name}"}
    prefix = next(iter(encoder)).split("swinViT.")[0]
    state = {renamed(name.removeprefix(prefix + "swinViT.")): value for name, value in encoder.items()}
    state |= {name: torch.ones(2) for name in more}
    path = save(tmp_path / layout, {wrapping: state, "epoch": 1})
    found = open_checkpoint(path)
    assert (found.family, found.backbone, found.in_channels) == ("swin_unetr", "swin_unetr", 1)
    assert found.outside == tuple(more) and found.overrides["feature_size"] == 12
    report = import_checkpoint(path, model, allow=("*encoder*", "*decoder*", "*out*")).report
    own = model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in encoder.items()) and set(report.loaded) == set(encoder)
    with pytest.raises(ValueError, match="not in the source"):
        import_checkpoint(path, model)


BESIDE = {
    "array": np.arange(6.0).reshape(2, 3), "integers": np.ones(3, np.int16), "text": np.array(["a", "bc"]), "empty": np.zeros((0, 3)),
    "scalar": np.float32(0.5), "path": pathlib.PurePosixPath("/data/raw"), "here": pathlib.Path("runs"),
    "windows": pathlib.PureWindowsPath("C:/runs"), "options": argparse.Namespace(lr=0.1, roi=(96, 96, 96), save=pathlib.Path("x")),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_values_beside_the_weights_are_read_as_values(name, tmp_path):
    value = BESIDE[name]
    read = read_content(save(tmp_path / "a.pth", {"state_dict": {"a": torch.ones(1)}, "beside": value}))["beside"]
    if isinstance(value, np.ndarray):
        assert np.array_equal(read, value) and read.dtype == value.dtype
    elif isinstance(value, pathlib.PurePath):
        assert type(read) is str and pathlib.PurePath(read.replace("\\", "/")).name == value.name
    elif name == "options":
        assert vars(read) == {"lr": 0.1, "roi": (96, 96, 96), "save": "x"}
    else:
        assert read == value


class Large:
    "An array that asks for more memory than there is, and brings no bytes"

    def __reduce__(self):
        return np.ndarray, ((10**7, 10**6), np.dtype("f8"))


def test_an_array_gets_no_memory_for_what_it_claims(tmp_path):
    read = read_content(save(tmp_path / "a.pth", {"state_dict": {"a": torch.ones(1)}, "beside": Large()}))
    assert read["beside"].size == 0


# ---- Odd shapes

FUZZED = {
    name: partial(create, name, 1, 3, **BACKBONES[name].mini)
    for name in ("mednext_v2_tiny", "mednext_v1_small", "unet", "nnunet_plain", "resenc_l", "stunet_small", "segresnet", "swin_unetr")
}
FUZZED["monai"] = torch.no_grad()(lambda: monai())


@pytest.fixture(scope="module")
def states():
    return {name: {n: v.half() if v.is_floating_point() else v for n, v in make().state_dict().items()} for name, make in FUZZED.items()}


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 27, 2**14]), max_size=6).filter(lambda shape: math.prod(shape) <= 2**15)


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tensors_of_odd_shapes_are_one_line(states, name, tmp_path, data):
    state = dict(states[name])
    telling = [n for n in state if re.search(r"conv\w*\d*\.(weight|0)|proj|bias_table|transp|out|head|stem|seg", n)]
    for _ in range(data.draw(st.integers(1, 3))):
        shape = data.draw(SHAPES)
        state[data.draw(st.sampled_from(telling or list(state)))] = torch.zeros(
            shape, dtype=data.draw(st.sampled_from([torch.float16, torch.int64, torch.bool, torch.complex64]))
        )
    path = save(tmp_path / "a.pth", state)
    for read in (describe, import_checkpoint, partial(import_checkpoint, model=name if name in BACKBONES else None)):
        try:
            read(path)
        except ValueError as error:
            assert "\n" not in str(error) and (str(path) in str(error) or "weights cover" in str(error)), error


@pytest.mark.parametrize("name", FUZZED)
def test_the_tensor_of_another_shape_is_named(states, name, tmp_path):
    family = open_checkpoint(save(tmp_path / "a.pth", states[name])).family
    sign = importers.FAMILIES[family].stem or importers.FAMILIES[family].marker
    name_in_file = next(n for n in states[name] if n.endswith(sign))
    path = save(tmp_path / "b.pth", states[name] | {name_in_file: torch.zeros(3)})
    for read in (describe, import_checkpoint):
        with pytest.raises(ValueError, match=rf"b\.pth: {re.escape(sign)} has the shape \(3,\)"):
            read(path)
