"Blocks: against a float64 formula written by hand, against MONAI, and under checkpointing and autocast"

import math

import pytest
import torch
from monai.networks.blocks import mednext_block as monai_blocks

from mednext_v2.network.blocks import DownBlock, MedNeXtBlock, OutBlock, UpBlock
from mednext_v2.network.fused import use_fused

PAIRS = {MedNeXtBlock: (monai_blocks.MedNeXtBlock, 4), DownBlock: (monai_blocks.MedNeXtDownBlock, 8), UpBlock: (monai_blocks.MedNeXtUpBlock, 2)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def awake(block):
    "Random norm and GRN parameters, so that no term of the formula hides behind a 0 or a 1"
    for name, p in block.named_parameters():
        if any(part in name for part in ("grn", "global_resp", "norm")):
            torch.nn.init.normal_(p, mean=0.3)
    return block


def depthwise(x, weight, bias):
    "Same-size depthwise correlation as a sum of shifted volumes"
    reach, out = weight.shape[-1] // 2, bias.view(1, -1, 1, 1, 1).expand_as(x).clone()
    padded = torch.zeros(*x.shape[:2], *(s + 2 * reach for s in x.shape[2:]), dtype=x.dtype)
    inner = (slice(None), slice(None)) + tuple(slice(reach, reach + s) for s in x.shape[2:])
    padded[inner] = x
    X, Y, Z = x.shape[2:]
    for i in range(weight.shape[-1]):
        for j in range(weight.shape[-1]):
            for k in range(weight.shape[-1]):
                tap = weight[:, 0, i, j, k].view(1, -1, 1, 1, 1)
                out += tap * padded[:, :, i : i + X, j : j + Y, k : k + Z]
    return out


def by_hand(block, x):
    "The block's formula on explicit numbers; shares no operator with the implementation"
    p = dict(block.named_parameters())
    bias = lambda name: p[f"{name}.bias"].view(1, -1, 1, 1, 1)
    up, down = isinstance(block, UpBlock), isinstance(block, DownBlock)
    if up:  # A transposed convolution: spread the voxels out, then correlate with the flipped kernel
        spread = torch.zeros(*x.shape[:2], *(2 * s - 1 for s in x.shape[2:]), dtype=x.dtype)
        spread[:, :, ::2, ::2, ::2] = x
        v = depthwise(spread, p["conv1.weight"].flip(2, 3, 4), p["conv1.bias"])
    else:
        v = depthwise(x, p["conv1.weight"], p["conv1.bias"])
        v = v[:, :, ::2, ::2, ::2] if down else v
    mean = v.mean((2, 3, 4), keepdim=True)
    variance = (v - mean).square().mean((2, 3, 4), keepdim=True)
    v = (v - mean) / (variance + 1e-5).sqrt()
    v = v * p["norm.weight"].view(1, -1, 1, 1, 1) + bias("norm")
    v = torch.einsum("ncxyz,ec->nexyz", v, p["conv2.weight"][:, :, 0, 0, 0]) + bias("conv2")
    v = v * (1 + torch.erf(v / math.sqrt(2))) / 2
    if block.grn:
        g = v.square().sum((2, 3, 4), keepdim=True).sqrt()
        over = g.mean(1, keepdim=True) if block.grn == "mean" else g.sum(1, keepdim=True)
        v = p["grn_gamma"] * v * (g / (over + 1e-6)) + p["grn_beta"] + v
    v = torch.einsum("nexyz,ce->ncxyz", v, p["conv3.weight"][:, :, 0, 0, 0]) + bias("conv3")
    if not (up or down):
        return v + x
    weight = p["res_conv.weight"][:, :, 0, 0, 0]
    if down:
        return v + torch.einsum("ncxyz,kc->nkxyz", x[:, :, ::2, ::2, ::2], weight) + bias("res_conv")
    shortcut = torch.einsum("ncxyz,ck->nkxyz", spread, weight) + bias("res_conv")
    out = torch.zeros(len(x), weight.shape[1], *(2 * s for s in x.shape[2:]), dtype=x.dtype)
    out[:, :, 1:, 1:, 1:] = v + shortcut
    return out


@pytest.mark.parametrize("cls", PAIRS)
@pytest.mark.parametrize("grn", ["mean", "sum", None])
@pytest.mark.parametrize("kernel", [3, 5])
def test_equals_the_formula_by_hand(cls, grn, kernel):
    block = awake(cls(4, PAIRS[cls][1], ratio=3, kernel=kernel, grn=grn)).double()
    x = torch.randn(2, 4, 6, 4, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x), by_hand(block, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", PAIRS)
@pytest.mark.parametrize("grn", [True, False])
def test_equals_monai_with_the_same_weights(cls, grn):
    theirs, out_channels = PAIRS[cls]
    theirs = awake(theirs(4, out_channels, 3, 3, use_residual_connection=True, global_resp_norm=grn))
    ours = cls(4, out_channels, ratio=3, grn="mean" if grn else None)
    rename = lambda name: name.replace("global_resp", "grn")  # MONAI's one difference from v1
    ours.load_state_dict({rename(name): t for name, t in theirs.state_dict().items()})
    x = torch.randn(2, 4, 8, 6, 4, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out = ours(x)
    torch.testing.assert_close(out, theirs(y))
    slope = torch.randn_like(out)
    out.backward(slope)
    theirs(y).backward(slope)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    slopes = {rename(name): q.grad for name, q in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, slopes.pop(name), rtol=1e-3, atol=1e-3)
    assert not slopes


@pytest.mark.parametrize("cls", PAIRS)
def test_parameter_names_and_shapes_are_those_of_v1(cls):
    block = cls(4, PAIRS[cls][1], ratio=3)
    out, transposed = PAIRS[cls][1], cls is UpBlock
    expected = {
        "grn_gamma": (1, 12, 1, 1, 1),
        "grn_beta": (1, 12, 1, 1, 1),
        "conv1.weight": (4, 1, 3, 3, 3),
        "conv1.bias": (4,),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "conv2.weight": (12, 4, 1, 1, 1),
        "conv2.bias": (12,),
        "conv3.weight": (out, 12, 1, 1, 1),
        "conv3.bias": (out,),
    }
    if cls is not MedNeXtBlock:
        expected["res_conv.weight"] = (4, out, 1, 1, 1) if transposed else (out, 4, 1, 1, 1)
        expected["res_conv.bias"] = (out,)
    assert {name: tuple(t.shape) for name, t in block.state_dict().items()} == expected


@pytest.mark.parametrize("cls", PAIRS)
def test_a_zero_compression_leaves_the_shortcut(cls):
    block = awake(cls(4, PAIRS[cls][1]))
    torch.nn.init.zeros_(block.conv3.weight)
    torch.nn.init.zeros_(block.conv3.bias)
    x = torch.randn(1, 4, 4, 4, 4)
    shortcut = block.res_conv(x)
    out = block(x)[:, :, 1:, 1:, 1:] if cls is UpBlock else block(x)
    torch.testing.assert_close(out, shortcut)


def test_fresh_grn_changes_nothing():
    with_grn = use_fused(MedNeXtBlock(4, ratio=3), False)
    without = use_fused(MedNeXtBlock(4, ratio=3, grn=None), False)
    without.load_state_dict(with_grn.state_dict(), strict=False)
    x = torch.randn(1, 4, 5, 5, 5)
    assert torch.equal(with_grn(x), without(x))
    torch.nn.init.ones_(with_grn.grn_gamma)
    assert not torch.allclose(with_grn(x), without(x))


def test_up_blocks_leave_the_low_planes_empty_and_no_others():
    out = awake(UpBlock(4, 2))(torch.randn(1, 4, 3, 3, 3))
    for axis in (2, 3, 4):
        planes = out.abs().amax(dim=tuple({0, 1, 2, 3, 4} - {axis}))
        assert planes[0] == 0 and (planes[1:] > 0).all()


def test_a_plain_block_can_change_its_channels():
    block = awake(MedNeXtBlock(4, 6, ratio=2)).double()
    x = torch.randn(1, 4, 3, 4, 5, dtype=torch.float64)
    assert isinstance(block.res_conv, torch.nn.Conv3d)
    same = awake(MedNeXtBlock(4, ratio=2))
    assert not list(same.res_conv.parameters()) and block(x).shape == (1, 6, 3, 4, 5)
    inner = block(x) - torch.nn.functional.conv3d(x, block.res_conv.weight, block.res_conv.bias)
    torch.testing.assert_close(inner, block._expansion(block.conv1(x)))


@pytest.mark.parametrize("cls", PAIRS)
@pytest.mark.parametrize("grad_checkpointing", ["expansion", "block"])
@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_changes_no_number(cls, grad_checkpointing, autocast):
    block = awake(cls(4, PAIRS[cls][1], ratio=3))
    x, results = torch.randn(2, 4, 6, 6, 6), []
    for block.grad_checkpointing in ("none", grad_checkpointing):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = block(leaf)
        out.float().square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_checkpointing_keeps_less():
    kept = {}
    for grad_checkpointing in ("none", "expansion", "block"):
        block, seen = use_fused(MedNeXtBlock(4, ratio=8, grad_checkpointing=grad_checkpointing), False), {}
        own = {p.data_ptr() for p in block.parameters()}

        def pack(t):
            seen[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(torch.randn(1, 4, 8, 8, 8, requires_grad=True))
        kept[grad_checkpointing] = sum(n for key, n in seen.items() if key not in own) / (4 * 8**3)
    # In units of the input: x, conv1, norm and three expanded; x and conv1; x alone
    assert kept == pytest.approx({"none": 27, "expansion": 2, "block": 1}, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", PAIRS)
def test_autocast_agrees_with_float32(cls, dtype):
    block, x = awake(cls(4, PAIRS[cls][1], ratio=3)), torch.randn(1, 4, 6, 6, 6)
    with torch.autocast("cpu", dtype):
        narrow = block(x)
    assert narrow.isfinite().all()
    scale = block(x).abs().max()
    assert (narrow.float() - block(x)).abs().max() < 0.03 * scale


def test_air_gives_finite_gradients():
    # A constant volume is all zeros behind the norm: every channel may fall silent
    block = MedNeXtBlock(4, ratio=2)
    torch.nn.init.zeros_(block.conv2.bias)
    torch.nn.init.ones_(block.grn_gamma)
    x = torch.zeros(1, 4, 4, 4, 4, requires_grad=True)
    block(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters()) and x.grad.isfinite().all()


def test_gradcheck_of_a_whole_block():
    for cls, (_, out_channels) in PAIRS.items():
        block = awake(cls(2, out_channels // 2, ratio=2)).double()
        x = torch.randn(1, 2, 2, 2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(block, (x,))


def test_head_weights_are_stored_as_in_v1():
    head = OutBlock(5, 3)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {"conv_out.weight": (5, 3, 1, 1, 1), "conv_out.bias": (3,)}
    theirs = monai_blocks.MedNeXtOutBlock(5, 3, dim="3d")
    theirs.load_state_dict(head.state_dict())
    x = torch.randn(1, 5, 2, 3, 4)
    torch.testing.assert_close(head(x), theirs(x))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="mean, sum or None, got 'max'"):
        MedNeXtBlock(4, grn="max")
    with pytest.raises(ValueError, match="none, expansion, block, got 'all'"):
        MedNeXtBlock(4, grad_checkpointing="all")
