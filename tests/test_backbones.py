"One contract for every network, and each against its source: MONAI's, nnU-Net's, published counts"

import copy
import dataclasses
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from monai.networks.nets import DynUNet

from mednext_v2.core import import_extra
from mednext_v2.models import registry
from mednext_v2.models.card import Card, save_model
from mednext_v2.models.registry import BACKBONES, PlainUNet, backbone_table, cost, create, get_backbone, load_model, overrides_of, parts
from mednext_v2.models.transfer import transfer
from mednext_v2.network.scaling import PRESETS, count_parameters, plan_pooling
from mednext_v2.training.losses import deep_supervision_loss
from mednext_v2.training.recipe import get_recipe
from mednext_v2.training.trainer import check_run
from model_toys import declare_torchvision

declare_torchvision()


def why_not(module: str) -> str:
    "Why a module cannot be imported; empty if it can"
    try:
        import_extra(module, "backbones")
    except ImportError as error:
        return str(error)
    return ""


DNA = "dynamic_network_architectures.architectures"
ABSENT = {"dynamic_network_architectures": why_not(f"{DNA}.unet")}
ABSENT["dynamic_network_architectures, timm"] = why_not(f"{DNA}.primus")


def every(names=BACKBONES):
    "A parameter per network, skipped with the reason where its package is missing"
    reasons = {name: ABSENT.get(BACKBONES[name].package, "") for name in names}
    return [pytest.param(n, marks=pytest.mark.skipif(bool(why), reason=why or "-")) for n, why in reasons.items()]


ONE_OF_EACH = ("mednext_v2_tiny", "unet", "nnunet_plain", "resenc_l", "stunet_base", "unetr", "segresnet", "primus_m")


def stride_of(name: str) -> int:
    "The stride of a network at mini size"
    return {"unetr": 16, "segresnet": 8, "unet": 8}.get(name) or {"med": 16, "swi": 32}.get(name[:3], 8)


def mini(name: str, in_channels=2, num_classes=3, deep_supervision=False, **overrides):
    "A network at mini size, for cubes of two strides"
    patch = {"patch": (2 * stride_of(name),) * 3} if BACKBONES[name].uses else {}
    return create(name, in_channels, num_classes, deep_supervision, **patch, **BACKBONES[name].mini | overrides)


SMALL_UNET = dict(filters=(4, 6, 8, 8))
CARD = Card(
    backbone="unet",
    overrides=SMALL_UNET,
    in_channels=1,
    labels={"a": 1, "b": 2},
    groups={},
    task="t",
    modality="CT",
    spacing=(1, 1, 1),
    patch=(16, 16, 16),
    normalisation={"schemes": ("zscore",), "nonzero": False},
    recipe={},
)


def dynunet(unet: PlainUNet, deep: int = 0) -> DynUNet:
    "MONAI's network with the same weights"
    strides = [1] + [2] * (len(unet.filters) - 1)
    options = dict(deep_supervision=True, deep_supr_num=deep) if deep else {}
    oracle = DynUNet(3, unet.in_channels, unet.num_classes, [3] * len(strides), strides, strides[1:], unet.filters, **options)
    state = {}
    for name, value in unet.state_dict().items():
        if name.startswith("heads."):
            _, number, rest = name.split(".", 2)
            name = f"output_block.{rest}" if number == "0" else f"deep_supervision_heads.{int(number) - 1}.{rest}"
        state[name] = value
    assert oracle.load_state_dict(state, strict=False).unexpected_keys == []
    return oracle


def test_unet_equals_dynunet_with_gradients():
    torch.manual_seed(0)
    unet = PlainUNet(2, 3, filters=(4, 6, 8, 8)).double()
    oracle = dynunet(unet).double()
    image = torch.randn(2, 2, 16, 8, 24, dtype=torch.float64)
    ours, theirs = unet(image), oracle(image)
    torch.testing.assert_close(ours, theirs)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    torch.testing.assert_close(unet.input_block.conv1.conv.weight.grad, oracle.input_block.conv1.conv.weight.grad)
    torch.testing.assert_close(unet.bottleneck.conv2.conv.weight.grad, oracle.bottleneck.conv2.conv.weight.grad)


def test_unet_heads_equal_dynunets_before_it_enlarges_them():
    torch.manual_seed(0)
    unet = PlainUNet(1, 3, deep_supervision=True, filters=(4, 6, 8, 8))
    oracle = dynunet(unet, deep=2).train()
    image = torch.randn(1, 1, 16, 16, 16)
    outputs, stacked = unet(image), oracle(image)
    assert len(outputs) == 3
    for output, raw in zip(outputs[1:], oracle.heads):
        torch.testing.assert_close(output, raw)
    torch.testing.assert_close(outputs[0], stacked[:, 0])


def test_unet_default_is_nnunets_size():
    with torch.device("meta"):
        unet = create("unet", 1, 3)
        oracle = dynunet(unet)
    assert unet.filters == (32, 64, 128, 256, 320, 320) and unet.stride == 32
    assert count_parameters(unet) == count_parameters(oracle)


@pytest.mark.parametrize("name", every())
def test_contract(name):
    torch.manual_seed(0)
    plain, deep = mini(name), mini(name, deep_supervision=True)
    assert (deep.in_channels, deep.num_classes, deep.deep_supervision) == (2, 3, True)
    assert plain.stride == max(plain.strides) == stride_of(name)
    # The auxiliary heads change nothing about the first output
    deep.load_state_dict(deep.state_dict() | plain.state_dict())
    image = torch.randn(1, 2, *[2 * plain.stride] * 3)
    with torch.no_grad():
        output, alone = plain.eval()(image), deep.eval()(image)
        deep.list_in_eval = True
        outputs = deep(image)
        again = copy.deepcopy(plain.train())(image)  # As the running average of weights copies it
    assert isinstance(output, torch.Tensor) and isinstance(again, torch.Tensor)
    assert output.shape == again.shape == (1, 3, *image.shape[2:])
    assert isinstance(outputs, list) and (len(outputs) > 1) == BACKBONES[name].auxiliary
    for level, scores in enumerate(outputs):
        assert scores.shape == (1, 3, *(n // 2**level for n in image.shape[2:]))
    assert torch.equal(outputs[0], output) and torch.equal(alone, output)
    assert isinstance(copy.deepcopy(deep).train()(image), list)
    label = torch.randint(0, 3, (1, 1, *image.shape[2:]))
    assert torch.isfinite(deep_supervision_loss(outputs, label))


@pytest.mark.parametrize("name", every(ONE_OF_EACH))
def test_trainer_accepts_it(name):
    recipe = dataclasses.replace(get_recipe("smoke"), patch=(2 * stride_of(name),) * 3, deep_supervision=True)
    check_run(recipe, mini(name, deep_supervision=True), SimpleNamespace())
    with pytest.raises(ValueError, match="deep_supervision is True, but the network has False"):
        check_run(recipe, mini(name), SimpleNamespace())


@pytest.mark.parametrize("name", every())
def test_prefixes_find_all_heads_and_the_stem(name):
    entry = BACKBONES[name]
    with torch.device("meta"):
        base, channels, classes = (mini(name, c, k, True).state_dict() for c, k in ((1, 5), (2, 5), (1, 7)))
    by_channels = {n for n in base if base[n].shape != channels[n].shape}
    assert by_channels and all(n.startswith(entry.stem) for n in by_channels)
    by_classes = {n for n in base if base[n].shape != classes[n].shape}
    heads = {n for n in base if n.startswith(entry.heads)}
    assert heads and heads <= by_classes
    others = by_classes - heads
    assert not others or (name.startswith("primus") and all(n.startswith(entry.decoder) for n in others))


@pytest.mark.parametrize("name", every())
def test_every_parameter_has_one_part_and_gets_a_gradient(name):
    torch.manual_seed(0)
    network, entry = mini(name, 1, deep_supervision=True), BACKBONES[name]
    everywhere = parts(network)
    assert set(everywhere) == set(network.state_dict())
    found = {n: everywhere[n] for n, _ in network.named_parameters()}
    assert set(found.values()) == {"stem", "encoder", "decoder", "heads"}
    for parameter, part in found.items():  # A stem lies in its encoder; other parts do not overlap
        claims = [p for p in ("heads", "stem", "decoder", "encoder") if parameter.startswith(getattr(entry, p))]
        assert set(claims) - {part} <= ({"encoder"} if part == "stem" else {"decoder"} if part == "heads" else set())
    outputs = network(torch.randn(1, 1, *[2 * network.stride] * 3))
    assert isinstance(outputs, list) and network.training
    sum(o.square().mean() for o in outputs).backward()
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = [n for n, p in network.named_parameters() if not p.requires_grad]
    assert all("norm_cross_attn" in n for n in frozen)


@pytest.mark.parametrize("name", every([name for name in ONE_OF_EACH if BACKBONES[name].auxiliary]))
def test_without_deep_supervision_no_parameter_is_left_over(name):
    "DistributedDataParallel waits for the gradient of each"
    network = mini(name, 1)
    network(torch.randn(1, 1, *[2 * network.stride] * 3)).square().mean().backward()
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


def test_part_of_an_unknown_parameter_is_an_error():
    network = mini("unet")
    network.extra = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="'unet': parameter extra.weight lies in no part"):
        parts(network)


def test_registry():
    assert {"mednext_v2_tiny", "mednext_v1_large_k5", "unet", "stunet_huge", "swin_unetr_v2"} <= set(BACKBONES)
    assert {f"mednext_{'v2_' * (p[:2] != 'v1')}{p}" for p in PRESETS} <= set(BACKBONES)
    assert all(name == entry.name for name, entry in BACKBONES.items())
    assert len({entry.title for entry in BACKBONES.values()}) == len(BACKBONES)
    assert get_backbone("mednext_v1_small").title == "MedNeXt-v1 Small"
    assert all(isinstance(entry.stem, tuple) and isinstance(entry.heads, tuple) for entry in BACKBONES.values())


@pytest.mark.parametrize("name", every([name for name, entry in BACKBONES.items() if entry.published]))
def test_count_is_the_published_one(name):
    entry = BACKBONES[name]
    known, patch = entry.published, entry.published.patch
    with torch.device("meta"):
        network = create(name, 1, known.num_classes, known.deep_supervision, patch=patch)
    tolerance = {14.60: 0.005, 58.26: 0.005, 440.30: 0.005, 1457.33: 0.005, 247.0: 0.5}.get(known.millions, 0.1)
    assert abs(count_parameters(network) / 1e6 - known.millions) < tolerance


@pytest.mark.parametrize("name", every())
def test_mini_is_small(name):
    with torch.device("meta"):
        count = count_parameters(mini(name, 1))
    assert 1e5 < count < (5e6 if name.startswith("swin") else 5.1e5)


@pytest.mark.parametrize("name", every())
def test_blueprint_builds_the_same_network_again(name):
    with torch.device("meta"):
        network = mini(name, deep_supervision=True)
        again = create(**network.blueprint)
    assert again.blueprint == network.blueprint
    shapes = [{n: v.shape for n, v in net.state_dict().items()} for net in (network, again)]
    assert shapes[0] == shapes[1]


def test_blueprint_keeps_patch_and_spacing_whoever_uses_them():
    network = create("unet", 1, 3, patch=[32, 32, 32], spacing=(1, 1, 2.5), **SMALL_UNET)
    assert overrides_of(network) == {"patch": (32, 32, 32), "spacing": (1, 1, 2.5), **SMALL_UNET}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create("nnunet", 1, 2), "no backbone 'nnunet'; there are: mednext_v2_tiny"),
        (lambda: create("mednext_v2_tiny", 1, 2, checkpointing="block"), "no 'checkpointing'; .*also takes grad_checkpointing"),
        (lambda: create("unet", 1, 2, width=3), "'unet' does not take these overrides.*width"),
        (lambda: create("mednext_v2_tiny", 1, 2, filters=(1, 2)), "filters"),
        (lambda: create("unet", 1, 2, filters=(4, 8)), "three or more"),
        (lambda: create("unet", 1, 2, filters=(4, 8, 8))(torch.zeros(1, 1, 6, 8, 8)), "divisible by 4, got"),
        (lambda: create("unet", 1, 2, filters=(4, 8, 8))(torch.zeros(1, 2, 8, 8, 8)), r"\(B, 1, X, Y, Z\)"),
        (lambda: create("unet", 1, 2, patch=(48, 64, 64)), r"\(48, 64, 64\) must be divisible by .*\(64, 64, 64\) is"),
        (lambda: create("unet", 1, 2, patch=(32,)), r"patch must be one positive whole number of voxels per axis, .*got \(32,\)"),
        (lambda: create("unet", 1, 2, spacing=(1, 0, 1)), "spacing must be one positive number of mm per axis"),
        (lambda: create("unetr", 1, 2), "UNETR is built for one patch: give patch"),
        (lambda: create("unetr", 1, 2, patch=(40, 32, 32)), r"multiples of 16, got \(40, 32, 32\)"),
        (lambda: mini("unetr", 1)(torch.zeros(1, 1, 48, 32, 32)), r"of size \(32, 32, 32\), got \(1, 1, 48, 32, 32\)"),
        (lambda: mini("segresnet", 1)(torch.zeros(1, 1, 12, 16, 16)), r"divisible by \(8, 8, 8\), got"),
        (lambda: mini("segresnet", 1)(torch.zeros(1, 2, 16, 16, 16)), r"\(B, 1, X, Y, Z\)"),
        (lambda: create("segresnet", 1, 2, filters=3), "'segresnet' does not take these overrides.*filters"),
        (lambda: mini("stunet_base", 1)(torch.zeros(1, 1, 12, 16, 16)), r"divisible by \(8, 8, 8\)"),
        (lambda: create("stunet_base", 1, 2, widths=(4, 8)), "widths and depths need one positive number per level"),
    ],
)
def test_errors_say_what_would_work(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("saved_deep", [True, False])
def test_load_model(tmp_path, saved_deep):
    torch.manual_seed(0)
    model = create("unet", 1, 3, saved_deep, **CARD.overrides)
    card = save_model(tmp_path / "m", model, CARD)
    loaded, read = load_model(tmp_path / "m")
    image = torch.randn(1, 1, 16, 16, 16)
    expected = model(image)[0] if saved_deep else model(image)
    assert read == card and not loaded.training and torch.equal(loaded(image), expected)
    if saved_deep:
        outputs = load_model(tmp_path / "m", deep_supervision=True)[0].train()(image)
        assert all(torch.equal(a, b) for a, b in zip(outputs, model(image)))
    else:
        with pytest.raises(ValueError, match="4 absent, 0 surplus"):
            load_model(tmp_path / "m", deep_supervision=True)


@pytest.mark.parametrize(("overrides", "message"), [({"filters": (4, 6, 8)}, "surplus"), ({"filters": (4, 6, 8, 16)}, "of another shape")])
def test_load_model_refuses_another_networks_weights(tmp_path, overrides, message):
    save_model(tmp_path / "m", create("unet", 1, 3, **CARD.overrides), dataclasses.replace(CARD, overrides=overrides))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", every(ONE_OF_EACH))
def test_folder_holds_any_of_them(name, tmp_path):
    torch.manual_seed(0)
    model = mini(name, 1, deep_supervision=True).eval()
    save_model(tmp_path / "m", model, dataclasses.replace(CARD, backbone=name, overrides=overrides_of(model)))
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["card.json", "model.safetensors"]
    loaded, _ = load_model(tmp_path / "m")
    image = torch.randn(1, 1, *[2 * model.stride] * 3)
    with torch.no_grad():
        assert torch.equal(loaded(image), model(image))


@pytest.mark.parametrize("name", every(["nnunet_plain", "resenc_l", "stunet_base", "unetr", "segresnet"]))
def test_transfer_keeps_answers(name):
    torch.manual_seed(0)
    source, target = mini(name, 1, 3), mini(name, 2, 3)
    report = transfer(target, source.state_dict(), {"background": 0, "new": 1, "a": 2}, {"background": 0, "a": 1, "b": 2})
    image = torch.randn(1, 1, *[2 * source.stride] * 3)
    with torch.no_grad():
        before, after = source(image), target(image.expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(after[:, [0, 2]], before[:, [0, 1]], rtol=1e-3, atol=1e-4)
    assert report.missing == () == report.skipped


# nnU-Net


def test_topology_is_nnunets():
    theirs = pytest.importorskip("nnunetv2.experiment_planning.experiment_planners.network_topology")
    generator = random.Random(0)
    for _ in range(300):
        patch = [generator.randrange(4, 260) for _ in range(3)]
        spacing = [generator.choice((0.3, 0.5, 0.8, 1, 1.5, 2, 3, 5)) for _ in range(3)]
        _, strides, kernels, _, _ = theirs.get_pool_and_conv_props(spacing, patch, 4, 999999)
        assert plan_pooling(patch, spacing) == (strides, kernels), (patch, spacing)


PLANS = {  # `arch_kwargs` of a plans.json
    "n_stages": 3, "features_per_stage": [4, 6, 8], "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "conv_bias": True, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None, "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
}  # fmt: skip
NNUNETS = {
    "nnunet_plain": ("PlainConvUNet", {"n_conv_per_stage": [2, 2, 2], "n_conv_per_stage_decoder": [2, 2]}),
    "resenc_l": ("ResidualEncoderUNet", {"n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": [1, 1]}),
}


@pytest.mark.parametrize("name", every(NNUNETS))
def test_network_of_a_plan_is_nnunets_own(name):
    theirs = pytest.importorskip("nnunetv2.utilities.get_network_from_plans").get_network_from_plans
    kind, blocks = NNUNETS[name]
    requires = ("conv_op", "norm_op", "dropout_op", "nonlin")
    oracle = theirs(f"{DNA}.unet.{kind}", PLANS | blocks, requires, 2, 3, deep_supervision=True)
    network = create(name, 2, 3, True, **PLANS, **blocks)
    assert network.load_state_dict(oracle.state_dict()).missing_keys == []
    assert (network.strides, network.stride) == ((2, 4, 4), 4)
    image = torch.randn(1, 2, 4, 8, 8)
    for ours, expected in zip(network(image), oracle(image), strict=True):
        assert torch.equal(ours, expected)
    plain = create(name, 2, 3, **PLANS, **blocks)
    left = plain.load_state_dict(oracle.state_dict(), strict=False)
    assert left.missing_keys == [] and all(n.startswith("decoder.seg_layers.0.") for n in left.unexpected_keys)
    assert torch.equal(plain(image), oracle(image)[0])


@pytest.mark.parametrize("field", ["conv_op", "norm_op", "dropout_op", "nonlin"])
@pytest.mark.parametrize("value", ["os.system", "torch.nn.functional.relu", "torch.nn.os.system", "builtins.eval"])
def test_class_names_of_a_plan_reach_torch_nn_only(field, value):
    "A card or a plan from elsewhere must not name code to run"
    with pytest.raises(ValueError, match=f"'{value}' is not a class of torch.nn"):
        create("resenc_l", 1, 2, **{field: value})


@pytest.mark.parametrize("name", every(["nnunet_plain"]))
def test_patch_and_spacing_shape_nnunet(name):
    with torch.device("meta"):
        flat = create(name, 1, 3, patch=(16, 192, 192), spacing=(5, 0.7, 0.7))
        cube = create(name, 1, 3, patch=(128, 128, 128))
    assert flat.strides == (4, 32, 32) and cube.strides == (32, 32, 32)
    assert [stage[0].convs[0].conv.kernel_size for stage in flat.encoder.stages][:2] == [(1, 3, 3), (1, 3, 3)]


@pytest.mark.parametrize(("name", "module"), [("resenc_m", "unet"), ("primus_s", "primus")])
def test_missing_package_says_what_to_install(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{DNA}.{module}", None)
    with pytest.raises(ImportError, match=r"pip install --no-deps 'dynamic_network_architectures>=0.4.4,<0.5'") as caught:
        create(name, 1, 2, patch=(32, 32, 32))
    assert "\n" not in str(caught.value)


def test_table_has_rows_for_networks_that_cannot_be_built(monkeypatch):
    few = ("unet", "primus_s")
    monkeypatch.setattr(registry, "BACKBONES", {name: BACKBONES[name] for name in few})
    monkeypatch.setitem(sys.modules, f"{DNA}.primus", None)
    with pytest.warns(UserWarning, match="'primus_s': .*pip install"):
        table = backbone_table((64, 64, 64))
    assert list(table.index) == list(few) and table["GMACs"].isna().tolist() == [False, True]


# What they cost


def test_flops_of_a_convolution_and_of_a_block_of_attention():
    network = create("unet", 1, 3, **SMALL_UNET)
    assert cost("unet", (16, 16, 16), **SMALL_UNET).parameters == count_parameters(network)
    three, four = (cost("unet", (16, 16, 16), num_classes=k, **SMALL_UNET).flops for k in (3, 4))
    assert four - three == 2 * 4 * 16**3  # One class more: a 1³ convolution of 4 channels


@pytest.mark.parametrize("name", every(["primus_m"]))
def test_flops_of_primus_count_attention(name):
    width, tokens = 96, 4**3
    one, two = (cost(name, (32,) * 3, embed_dim=width, eva_depth=d, eva_numheads=4).flops for d in (1, 2))
    hidden = int(width * 8 / 3)
    assert two - one == 2 * tokens * (4 * width**2 + 3 * width * hidden + 2 * tokens * width)


# Plug-ins


TOY = """
from mednext_v2.models.registry import Backbone, declare
from torch import nn

def build(in_channels, num_classes, deep_supervision=False, width=4):
    network = nn.Sequential(nn.Conv3d(in_channels, width, 3, padding=1), nn.ReLU(), nn.Conv3d(width, num_classes, 1))
    return declare(network, in_channels, num_classes, deep_supervision, (1, 1, 1), auxiliary=False)

def bare(in_channels, num_classes, deep_supervision=False):
    return nn.Conv3d(in_channels, num_classes, 1)

def entry(name, build):
    return Backbone(name, name, build, heads=("2.",), stem=("0.",), encoder=(), decoder=(), auxiliary=False)

TOY, BARE, CLASH = entry("toy", build), entry("bare", bare), entry("unet", build)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    "Puts a package with entry points on the path, as pip would"

    def add(distribution: str, points: dict[str, str], **modules: str) -> None:
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("[mednext_v2.backbones]\n" + "\n".join(lines) + "\n")
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)

    monkeypatch.syspath_prepend(tmp_path)
    return add


def test_plugin_is_a_backbone_like_others(install, tmp_path):
    install("toys", {"toy": "toys_one:TOY"}, toys_one=TOY)
    model = create("toy", 1, 3, deep_supervision=True, width=5)
    assert model.blueprint["name"] == "toy" and set(parts(model).values()) == {"stem", "heads"}
    save_model(tmp_path / "m", model, dataclasses.replace(CARD, backbone="toy", overrides=overrides_of(model)))
    image = torch.randn(1, 1, 4, 5, 6)
    assert torch.equal(load_model(tmp_path / "m")[0](image), model(image)[0])
    assert cost("toy", (4, 4, 4)).flops == 2 * 64 * (27 * 4 + 4 * 3)


def test_broken_plugins_are_named_and_stop_nobody(install):
    install("good", {"toy": "toys_two:TOY"}, toys_two=TOY)
    install("crash", {"boom": "toys_boom:X"}, toys_boom="raise RuntimeError('first line\\nsecond line')")
    thefts = {"unet": "CLASH", "toy2": "TOY", "no": "build", "gone": "NONE"}
    install("thief", {name: f"toys_two:{value}" for name, value in thefts.items()})
    with pytest.warns(UserWarning) as caught:
        assert get_backbone("toy").title == "toy"
    texts = [str(w.message) for w in caught]
    wanted = {
        "'boom' of crash is left out: does not load (RuntimeError: first line)",
        "'unet' of thief is left out: its name 'unet' is taken",
        "'toy2' of thief is left out: its name 'toy' is taken",
        "'no' of thief is left out: toys_two:build is a function: it must be a mednext_v2.models.registry.Backbone",
        "'gone' of thief is left out: does not load (AttributeError",
    }
    assert all(any(want in text for text in texts) for want in wanted), texts
    assert len(texts) == len(wanted) and not any("\n" in text for text in texts)
    assert get_backbone("unet") is BACKBONES["unet"]


def test_plugin_that_breaks_the_contract(install):
    install("toys", {"bare": "toys_three:BARE"}, toys_three=TOY)
    with pytest.raises(ValueError, match=r"'bare': its network has no num_classes, deep_supervision: let build"):
        create("bare", 1, 2)
    with pytest.raises(ValueError, match="there are: mednext_v2_tiny, .*, bare"):
        get_backbone("nothing")
