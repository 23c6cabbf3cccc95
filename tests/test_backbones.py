"One contract for every network, and the U-Net against MONAI's own"

import dataclasses

import pytest
import torch
from mednext_v2.backbones import BACKBONES, PlainUNet, create, get_backbone, load_model
from mednext_v2.scaling import PRESETS, count_parameters
from mednext_v2.weights import Card, save_model
from monai.networks.nets import DynUNet

SMALL = {name: dict(width=2, depths=(1,) * 9, ratios=(2,) * 9) for name in BACKBONES} | {
    "unet": dict(filters=(4, 6, 8, 8))
}
CARD = Card(
    backbone="unet", overrides=SMALL["unet"], in_channels=1, labels={"a": 1, "b": 2}, groups={}, task="t",
    modality="CT", spacing=(1, 1, 1), patch=(16, 16, 16), normalisation={}, recipe={},
)


def dynunet(unet: PlainUNet, deep: int = 0) -> DynUNet:
    "MONAI's network with the same weights"
    strides = [1] + [2] * (len(unet.filters) - 1)
    options = dict(deep_supervision=True, deep_supr_num=deep) if deep else {}
    oracle = DynUNet(
        3, unet.in_channels, unet.num_classes, [3] * len(strides), strides, strides[1:], unet.filters, **options
    )
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


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("training", [True, False])
def test_contract(name, training):
    torch.manual_seed(0)
    plain = create(name, 2, 3, **SMALL[name]).train(training)
    deep = create(name, 2, 3, deep_supervision=True, **SMALL[name]).train(training)
    assert (deep.in_channels, deep.num_classes, deep.deep_supervision) == (2, 3, True)
    size = 2 * plain.stride
    image = torch.randn(1, 2, size, size, plain.stride)
    if name == "unet":
        image = torch.randn(1, 2, size, size, size)
    with torch.no_grad():
        output, outputs = plain(image), deep(image)
    assert isinstance(output, torch.Tensor) and output.shape == (1, 3, *image.shape[2:])
    assert isinstance(outputs, list) and len(outputs) >= 3
    for level, scores in enumerate(outputs):
        assert scores.shape == (1, 3, *(n // 2**level for n in image.shape[2:]))
    # The auxiliary heads change nothing about the first output
    deep.load_state_dict(plain.state_dict() | {k: v for k, v in deep.state_dict().items() if k not in plain.state_dict()})
    with torch.no_grad():
        assert torch.equal(deep(image)[0], output)


@pytest.mark.parametrize("name", BACKBONES)
def test_prefixes_find_all_heads_and_the_one_stem(name):
    entry = BACKBONES[name]
    with torch.device("meta"):
        networks = [create(name, c, k, deep_supervision=True, **SMALL[name]) for c, k in ((1, 5), (2, 7))]
    shapes = [{n: v.shape for n, v in network.state_dict().items()} for network in networks]
    changed = {n for n in shapes[0] if shapes[0][n] != shapes[1][n]}
    heads = {n for n in shapes[0] if n.startswith(entry.heads)}
    assert heads <= changed
    stems = changed - heads
    assert len(stems) == 1 and stems.pop().startswith(entry.stem)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    network = create(name, 1, 3, deep_supervision=True, **SMALL[name])
    outputs = network(torch.randn(1, 1, *[2 * network.stride] * 3))
    sum(o.square().mean() for o in outputs).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


def test_every_preset_is_there():
    assert len(BACKBONES) == len(PRESETS) + 1
    assert {"mednext_v2_tiny", "mednext_v2_wide", "mednext_v1_large", "unet"} <= set(BACKBONES)
    assert all(name == entry.name for name, entry in BACKBONES.items())
    assert len({entry.title for entry in BACKBONES.values()}) == len(BACKBONES)
    assert get_backbone("mednext_v1_small").title == "MedNeXt-v1 Small"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create("nnunet", 1, 2), "no backbone 'nnunet'; there are: mednext_v2_tiny"),
        (lambda: create("unet", 1, 2, width=3), "'unet' does not take these overrides.*width"),
        (lambda: create("mednext_v2_tiny", 1, 2, filters=(1, 2)), "filters"),
        (lambda: create("unet", 1, 2, filters=(4, 8)), "three or more"),
        (lambda: create("unet", 1, 2, filters=(4, 8, 8))(torch.zeros(1, 1, 6, 8, 8)), "divisible by 4, got"),
        (lambda: create("unet", 1, 2, filters=(4, 8, 8))(torch.zeros(1, 2, 8, 8, 8)), r"\(B, 1, X, Y, Z\)"),
    ],
)
def test_errors_say_what_would_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
        outputs = load_model(tmp_path / "m", deep_supervision=True)[0](image)
        assert all(torch.equal(a, b) for a, b in zip(outputs, model(image)))
    else:
        with pytest.raises(ValueError, match="4 absent, 0 surplus"):
            load_model(tmp_path / "m", deep_supervision=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"filters": (4, 6, 8)}, "surplus"), ({"filters": (4, 6, 8, 16)}, "of another shape")],
)
def test_load_model_refuses_another_networks_weights(tmp_path, overrides, message):
    save_model(tmp_path / "m", create("unet", 1, 3, **CARD.overrides), dataclasses.replace(CARD, overrides=overrides))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "m")
