"STU-Net against its published counts, the authors' names of parameters, and the order of operations they use"

import pytest
import torch
from torch.nn import functional as F

from mednext_v2.models.stunet import SIZES, Enlarge, STUNet, check_volume, stunet
from mednext_v2.network.scaling import count_flops, count_parameters

# README of uni-medical/STU-Net: millions of parameters, and tera multiply-adds at 128³
PUBLISHED = {"small": (14.60, 0.13), "base": (58.26, 0.51), "large": (440.30, 3.81), "huge": (1457.33, 12.60)}
SMALL = dict(widths=(4, 6, 8), depths=(2, 1, 2))


@pytest.mark.parametrize("size", SIZES)
def test_counts_are_the_published_ones(size):
    "105 classes of TotalSegmentator; FLOPs as the authors count them, who repeat voxels before the 1³ convolution"
    with torch.device("meta"):
        network = stunet(size, 1, 105, deep_supervision=True)
    millions, teramacs = PUBLISHED[size]
    assert abs(count_parameters(network) / 1e6 - millions) < 0.005
    saved = 0
    for level, layer in enumerate(network.upsample_layers):  # From 4³ voxels on: an eighth of the work
        saved += 7 * layer.conv.weight.numel() * (4 * 2**level) ** 3
    counted = count_flops(network, (128,) * 3) / 2
    assert abs((counted + saved) / 1e12 - teramacs) < 0.006 + 0.01 * teramacs


def test_names_are_the_authors():
    names = set(STUNet(1, 3, True, **SMALL).state_dict())
    block = {f"{layer}.{leaf}" for layer in ("conv1", "norm1", "conv2", "norm2") for leaf in ("weight", "bias")}
    first = block | {"conv3.weight", "conv3.bias"}
    wanted = {f"conv_blocks_context.{level}.0.{n}" for level in range(3) for n in first}
    wanted |= {f"conv_blocks_context.{level}.1.{n}" for level in (0, 2) for n in block}
    wanted |= {f"conv_blocks_localization.{level}.0.{n}" for level in range(2) for n in first}
    wanted |= {f"conv_blocks_localization.1.1.{n}" for n in block}  # Finest last
    wanted |= {f"{part}.{leaf}" for leaf in ("weight", "bias") for part in ("seg_outputs.0", "seg_outputs.1")}
    wanted |= {f"upsample_layers.{level}.conv.{leaf}" for level in range(2) for leaf in ("weight", "bias")}
    assert names == wanted
    plain = set(STUNet(1, 3, **SMALL).state_dict())
    assert names - plain == {"seg_outputs.0.weight", "seg_outputs.0.bias"} and plain < names


def test_forward_is_the_described_one():
    "The network written out with functions, in double precision"
    torch.manual_seed(0)
    network = STUNet(2, 3, True, **SMALL, strides=((1, 2, 2), (2, 2, 2))).double()
    state = network.state_dict()

    def block(x, name, stride=1):
        w = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        y = F.conv3d(x, w["conv1.weight"], w["conv1.bias"], stride, padding=1)
        y = F.leaky_relu(F.instance_norm(y, weight=w["norm1.weight"], bias=w["norm1.bias"]), 0.01)
        y = F.conv3d(y, w["conv2.weight"], w["conv2.bias"], padding=1)
        y = F.instance_norm(y, weight=w["norm2.weight"], bias=w["norm2.bias"])
        way = F.conv3d(x, w["conv3.weight"], w["conv3.bias"], stride) if "conv3.weight" in w else x
        return F.leaky_relu(y + way, 0.01)

    def up(x, name, factor):
        x = F.interpolate(x, scale_factor=factor, mode="nearest")
        return F.conv3d(x, state[f"{name}.conv.weight"], state[f"{name}.conv.bias"])

    image = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    full = block(block(image, "conv_blocks_context.0.0"), "conv_blocks_context.0.1")
    half = block(full, "conv_blocks_context.1.0", (1, 2, 2))
    low = block(block(half, "conv_blocks_context.2.0", 2), "conv_blocks_context.2.1")
    x = torch.cat((up(low, "upsample_layers.0", (2.0, 2.0, 2.0)), half), 1)
    coarse = block(x, "conv_blocks_localization.0.0")
    x = torch.cat((up(coarse, "upsample_layers.1", (1.0, 2.0, 2.0)), full), 1)
    fine = block(block(x, "conv_blocks_localization.1.0"), "conv_blocks_localization.1.1")
    outputs = network(image)
    for head, features, output in ((1, fine, outputs[0]), (0, coarse, outputs[1])):
        expected = F.conv3d(features, state[f"seg_outputs.{head}.weight"], state[f"seg_outputs.{head}.bias"])
        torch.testing.assert_close(output, expected)


def test_enlarging_before_or_after_the_convolution_is_the_same():
    torch.manual_seed(0)
    layer, x = Enlarge(6, 3, (1, 2, 2)).double(), torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stunet("giant", 1, 2), "no STU-Net is called 'giant'; there are: small, base"),
        (lambda: STUNet(1, 2, widths=(4, 8), depths=(1, 1, 1)), "one positive number per level and strides one less"),
        (lambda: STUNet(1, 2, widths=(4,), depths=(1,)), "one positive number per level"),
        (lambda: STUNet(1, 2, **SMALL)(torch.zeros(1, 1, 6, 8, 8)), r"divisible by \(4, 4, 4\), got \(1, 1, 6, 8, 8\)"),
        (lambda: STUNet(1, 2, **SMALL)(torch.zeros(1, 2, 8, 8, 8)), r"\(B, 1, X, Y, Z\)"),
        (lambda: check_volume((1, 1, 8, 8), 1, (2, 2, 2)), r"got \(1, 1, 8, 8\)"),
        (lambda: check_volume((1, 1, 0, 8, 8), 1, (2, 2, 2)), r"got \(1, 1, 0, 8, 8\)"),
        (lambda: check_volume((1, 1, 8, 8, 8), 1, (2, 2, 2), (8, 8, 4)), r"of size \(8, 8, 4\)"),
    ],
)
def test_errors_say_what_would_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()
