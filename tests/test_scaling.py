"Presets, counts and estimates: against numbers written down, formulas by hand, and what autograd really keeps"

import random
from dataclasses import replace

import pytest
import torch

from mednext_v2.network.fused import use_fused
from mednext_v2.network.mednext import Arch, MedNeXt
from mednext_v2.network.scaling import (
    PRESETS,
    MemoryMeter,
    arch_for_patch,
    build_mednext,
    count_flops,
    count_parameters,
    estimate,
    list_blocks,
    overview,
    scale,
)

MINI = Arch(width=4, depths=(1, 2, 1, 2, 1), ratios=(2, 3, 4, 2, 3))
FLAT = replace(MINI, strides=((1, 2, 2), (2, 2, 1)), kernels=((1, 3, 3), (3, 3, 3), (3, 5, 3)))  # Thick slices
ONE, TINY, BASE = (1,) * 9, PRESETS["tiny"].ratios, PRESETS["base"].ratios


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def parameters_by_hand(arch, in_channels=1, num_classes=3, heads=1):
    "Sums written from the description of the network alone"
    L, grn = len(arch.depths) // 2, 2 if arch.grn else 0

    def block(c, out, ratio, level, resampling):
        e = ratio * c
        taps = arch.kernel**3 if arch.kernels is None else arch.kernels[level][0] * arch.kernels[level][1] * arch.kernels[level][2]
        total = c * (taps + 1) + 2 * c + e * (c + 1) + grn * e + out * (e + 1)
        return total + (out * (c + 1) if resampling else 0)

    width = lambda level: arch.width * 2**level
    total = arch.width * (in_channels + 1)
    for place, (depth, ratio) in enumerate(zip(arch.depths, arch.ratios)):
        level = min(place, 2 * L - place)
        total += depth * block(width(level), width(level), ratio, level, False)
        if place:
            origin = level - 1 if place <= L else level + 1
            total += block(width(origin), width(level), ratio, level, True)
    return total + sum(num_classes * (width(i) + 1) for i in range(heads))


@pytest.mark.parametrize("fused", [True, False])
def test_thick_slices_have_the_numbers_by_hand_and_an_estimate_that_holds(fused):
    assert count_parameters(MedNeXt(FLAT, 2, 5, True)) == parameters_by_hand(FLAT, 2, 5, 3)
    arch = Arch(16, ONE, BASE, strides=((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), *[(3, 3, 3)] * 4))
    cost = estimate(arch, (12, 64, 64), deep_supervision=True, fused="cpu" if fused else None)
    assert cost.parameters == count_parameters(MedNeXt(arch, 1, 3, True))
    assert cost.total_bytes - cost.optimizer_bytes == pytest.approx(peak_of_a_step(arch, (12, 64, 64), fused=fused), rel=0.15)


def flops_by_hand(arch, patch, in_channels=1, num_classes=3, heads=1):
    L, k3 = len(arch.depths) // 2, arch.kernel**3
    voxels = lambda level: (patch[0] * patch[1] * patch[2]) // 8**level
    width = lambda level: arch.width * 2**level
    macs = voxels(0) * in_channels * arch.width
    for place, (depth, ratio) in enumerate(zip(arch.depths, arch.ratios)):
        level = min(place, 2 * L - place)
        c, n = width(level), voxels(level)
        macs += depth * n * (c * k3 + 2 * ratio * c * c)
        if 0 < place <= L:
            h = c // 2
            macs += n * (h * k3 + ratio * h * h + ratio * h * c + h * c)
        if place > L:
            h, below = 2 * c, voxels(level + 1)
            grown = 1
            for side in patch:
                grown *= side // 2**level - 1
            macs += below * (h * k3 + h * c) + grown * (ratio * h * h + ratio * h * c)
    return 2 * (macs + sum(voxels(i) * width(i) * num_classes for i in range(heads)))


@pytest.mark.parametrize("name, expected", [("base", 61_969_507), ("wide", 246_536_387), ("v1_large", 61_779_299)])
def test_counts_of_the_paper(name, expected):
    with torch.device("meta"):
        assert count_parameters(build_mednext(name, 1, 3)) == expected


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_parameters_equal_the_sum_by_hand(name, deep_supervision):
    with torch.device("meta"):
        model = build_mednext(name, 2, 5, deep_supervision)
    heads = 5 if deep_supervision else 1
    assert count_parameters(model) == parameters_by_hand(PRESETS[name], 2, 5, heads)


def test_v1_presets_are_the_v1_code_s_layouts():
    # Blocks and expansion ratios as the authors' create_mednext_v1 lists them
    layouts = {
        "v1_small": ([2] * 9, [2] * 9),
        "v1_base": ([2] * 9, [2, 3, 4, 4, 4, 4, 4, 3, 2]),
        "v1_medium": ([3, 4, 4, 4, 4, 4, 4, 4, 3], [2, 3, 4, 4, 4, 4, 4, 3, 2]),
        "v1_large": ([3, 4, 8, 8, 8, 8, 8, 4, 3], [3, 4, 8, 8, 8, 8, 8, 4, 3]),
    }
    for name, (depths, ratios) in layouts.items():
        assert PRESETS[name] == Arch(32, depths, ratios, kernel=3, grn=None)


def test_v2_presets_add_grn_to_v1_layouts():
    assert replace(PRESETS["base"], grn=None) == PRESETS["v1_large"]
    assert replace(PRESETS["small"], grn=None) == PRESETS["v1_small"]
    assert replace(PRESETS["wide"], width=32) == PRESETS["base"]
    assert all((arch.grn is None) == name.startswith("v1_") for name, arch in PRESETS.items())


def test_tiny_trains_on_a_laptop():
    arch = PRESETS["tiny"]
    assert arch.levels == 4 and 8 <= arch.width <= 16
    assert estimate(arch, (32, 32, 32), batch_size=2).total_bytes < 5e8
    model = build_mednext("tiny", 1, 3, deep_supervision=True)
    sum(o.square().mean() for o in model(torch.randn(1, 1, 32, 32, 32))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_create_model_passes_everything_on():
    model = build_mednext("tiny", 2, 4, True, "block", width=8, grn="sum", kernel=5)
    assert model.arch == Arch(8, (1,) * 9, (2,) * 9, kernel=5, grn="sum")
    assert (model.in_channels, model.num_classes) == (2, 4)
    assert model.deep_supervision and model.grad_checkpointing == "block"
    assert {module.grn for module in model.modules() if hasattr(module, "grn")} == {"sum"}
    assert PRESETS["tiny"].width == 16  # The preset itself is untouched


def test_create_model_without_grn_has_no_grn_parameters():
    assert not [n for n in build_mednext("tiny", 1, 2, grn=None).state_dict() if "grn" in n]
    assert [n for n in build_mednext("v1_small", 1, 2, width=2, grn="mean").state_dict() if "grn" in n]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build_mednext("giant", 1, 2), "no MedNeXt is called 'giant'; known: tiny, small,.*v1_large"),
        (lambda: build_mednext("base_k5", 1, 2), "no MedNeXt is called 'base_k5'"),
        (lambda: build_mednext("tiny", 1, 2, deep=3), "no 'deep'; it has: width, depths, ratios, kernel, grn"),
        (lambda: build_mednext("tiny", 1, 2, checkpointing="block"), "no 'checkpointing'; .*also takes grad_checkpointing"),
        (lambda: build_mednext("tiny", 1, 2, width=-1), "width must be a positive whole number"),
        (lambda: build_mednext("tiny", 1, 2, depths=(1, 1, 1)), "equally many entries, got 3 and 9"),
        (lambda: scale(Arch(), depth=0), "must be positive, got 0 and 1"),
        (lambda: scale(Arch(), width=-2), "must be positive, got 1 and -2"),
        (lambda: estimate(MINI, (16, 16, 16), precision="tf32"), "fp32, bf16, fp16, got 'tf32'"),
        (lambda: estimate(MINI, (16, 16, 15)), r"multiples of 4, got \(16, 16, 15\)"),
        (lambda: estimate(MINI, (16, 16, 16), grad_checkpointing="all"), "none, expansion, block, got 'all'"),
        (lambda: count_flops(MINI, (16, 16, 15)), r"multiples of 4, got \(16, 16, 15\)"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_scaling_changes_its_axis_alone():
    arch = Arch()
    deep = scale(arch, depth=1.5)
    assert deep.depths == (4, 6, 12, 12, 12, 12, 12, 6, 4) and replace(deep, depths=arch.depths) == arch
    assert scale(arch, width=1.5) == replace(arch, width=48)
    assert scale(arch) == arch
    smallest = scale(arch, depth=1e-3, width=1e-3)
    assert smallest.depths == (1,) * 9 and smallest.width == 1


@pytest.mark.parametrize("name", ["tiny", "v1_small"])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("patch", [(32, 32, 32), (64, 32, 16)])
def test_flops_equal_the_sum_by_hand(name, kernel, patch):
    arch = replace(PRESETS[name], kernel=kernel)
    assert count_flops(arch, patch) == flops_by_hand(arch, patch)
    with torch.device("meta"):
        model = MedNeXt(arch, 2, 7, deep_supervision=True)
    assert count_flops(model, patch) == flops_by_hand(arch, patch, 2, 7, heads=5)


def test_counting_flops_leaves_the_model_alone():
    model = build_mednext("tiny", 1, 2, width=4, grad_checkpointing="block")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_flops(model, (32, 16, 16))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training and all(p.device.type == "cpu" for p in model.parameters())


def test_flops_of_a_plain_convolution():
    layer = torch.nn.Conv3d(2, 6, 3, padding=1, groups=2)
    assert count_flops(layer, (4, 5, 6), in_channels=2) == 2 * 27 * 6 * 4 * 5 * 6


@pytest.mark.parametrize("arch", [MINI, FLAT], ids=["cubes", "thick slices"])
def test_walk_describes_the_blocks_that_are_there(arch):
    model, seen = MedNeXt(arch, 1, 2), []

    def note(block, inputs, _):
        (x,) = inputs
        inner = block.conv1(x)
        ratio = block.conv2.out_channels // block.conv2.in_channels
        sizes = x.shape[1], ratio, x[0, 0].numel(), inner[0, 0].numel(), block.conv3.out_channels
        seen.append((*sizes, block.conv1.kernel_size, block.conv1.stride))

    for module in model.modules():
        if hasattr(module, "conv3"):
            module.register_forward_hook(note)
    model(torch.zeros(1, 1, 16, 8, 12))
    assert seen == list_blocks(arch, (16, 8, 12))


def kept_for_backward(model, volume):
    own, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(volume)
    del outputs
    return sum(size for key, size in seen.items() if key not in own)


@pytest.mark.parametrize("grad_checkpointing", ["none", "expansion", "block"])
@pytest.mark.parametrize("grn", ["mean", None])
@pytest.mark.parametrize("batch_size, patch", [(1, (32, 32, 32)), (2, (32, 16, 32))])
def test_activations_are_what_autograd_keeps(grad_checkpointing, grn, batch_size, patch):
    arch = replace(PRESETS["tiny"], width=4, grn=grn)
    options = dict(grad_checkpointing=grad_checkpointing, deep_supervision=True, in_channels=2)
    kept = kept_for_backward(use_fused(MedNeXt(arch, num_classes=3, **options), False), torch.randn(batch_size, 2, *patch))
    promised = estimate(arch, patch, batch_size, **options).activation_bytes
    assert promised == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("grad_checkpointing", ["none", "expansion"])
def test_activations_in_mixed_precision(grad_checkpointing):
    # On a CPU autocast leaves the norm's input narrow; on a GPU, which we estimate, it widens it
    arch = replace(PRESETS["tiny"], width=4, ratios=(4,) * 9)
    model = use_fused(MedNeXt(arch, 1, 3, grad_checkpointing=grad_checkpointing), False)
    with torch.autocast("cpu", torch.bfloat16):
        kept = kept_for_backward(model, torch.randn(1, 1, 32, 32, 32))
    cost = estimate(arch, (32, 32, 32), precision="bf16", grad_checkpointing=grad_checkpointing)
    copies = cost.weight_bytes - 4 * cost.parameters  # Autograd keeps the 16-bit weights as well
    assert cost.activation_bytes + copies == pytest.approx(kept, rel=0.1)


def peak_of_a_step(arch, patch, batch_size=1, fused=False, grad_checkpointing="none"):
    "Bytes at the worst moment of a step, with gradients and, on top, the weights"
    model, volume = MedNeXt(arch, 1, 3, True, grad_checkpointing), torch.randn(batch_size, 1, *patch)
    use_fused(model, fused)
    with MemoryMeter() as memory:
        outputs = model(volume)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return memory.peak + 4 * count_parameters(model)


GRID = [
    (width, ratios, depths, patch, batch_size)
    for width, ratios, depths in ((8, TINY, ONE), (16, BASE, ONE), (16, TINY, TINY), (32, BASE, ONE))
    for patch, batch_size in (((32, 32, 32), 1), ((32, 32, 32), 2), ((48, 32, 32), 1), ((64, 64, 64), 1))
]


@pytest.mark.parametrize("grn", ["mean", None])
@pytest.mark.parametrize("width, ratios, depths, patch, batch_size", GRID)
def test_the_estimate_of_a_fused_step_is_within_15_percent(width, ratios, depths, patch, batch_size, grn):
    arch = Arch(width, depths, ratios, grn=grn)
    cost = estimate(arch, patch, batch_size, deep_supervision=True, fused="cpu")
    promised = cost.total_bytes - cost.optimizer_bytes
    assert promised == pytest.approx(peak_of_a_step(arch, patch, batch_size, fused=True), rel=0.15)


@pytest.mark.parametrize("grad_checkpointing", ["none", "expansion", "block"])
@pytest.mark.parametrize("width, ratios, depths, patch, batch_size", GRID[::3])
def test_the_estimate_of_a_plain_step_is_within_15_percent(width, ratios, depths, patch, batch_size, grad_checkpointing):
    arch = Arch(width, depths, ratios)
    cost = estimate(arch, patch, batch_size, grad_checkpointing=grad_checkpointing, deep_supervision=True)
    promised = cost.total_bytes - cost.optimizer_bytes
    assert promised == pytest.approx(peak_of_a_step(arch, patch, batch_size, grad_checkpointing=grad_checkpointing), rel=0.15)


def test_grn_adds_no_memory_to_a_fused_step():
    arch = Arch(16, ONE, BASE)
    with_grn, without = (peak_of_a_step(replace(arch, grn=grn), (64,) * 3, fused=True) for grn in ("mean", None))
    assert with_grn < 1.02 * without


def test_estimate_of_weights_and_optimizer_is_what_adamw_holds():
    model = MedNeXt(MINI, 1, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 1, 8, 8, 8)).sum().backward()
    optimizer.step()
    states = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    cost = estimate(MINI, (8, 8, 8))
    assert cost.weight_bytes == size(model.parameters())
    assert cost.gradient_bytes == size(p.grad for p in model.parameters())
    assert cost.optimizer_bytes == size(states)
    parts = ("weight", "gradient", "optimizer", "activation", "working")
    assert cost.total_bytes == sum(getattr(cost, f"{part}_bytes") for part in parts)


def test_estimates_scale_as_they_should():
    one, two = estimate(MINI, (16, 16, 16)), estimate(MINI, (16, 16, 16), batch_size=2)
    assert two.activation_bytes == 2 * one.activation_bytes and two.flops == 2 * one.flops
    assert two.weight_bytes == one.weight_bytes
    policies = ("none", "expansion", "block")
    kept = [estimate(MINI, (16, 16, 16), grad_checkpointing=p).activation_bytes for p in policies]
    assert kept[0] > 2 * kept[1] and kept[1] > kept[2]
    base = [estimate(Arch(), (128,) * 3, grad_checkpointing=p).total_bytes for p in policies]
    assert base[0] > base[1] > base[2]
    half = estimate(MINI, (16, 16, 16), precision="bf16")
    assert 0.5 < half.activation_bytes / one.activation_bytes < 0.62
    assert half.weight_bytes == 1.5 * one.weight_bytes


def test_overview_agrees_with_the_estimates():
    table = overview({"mini": MINI, "deep": scale(MINI, depth=2)}, (16, 16, 16), batch_size=2)
    cost = estimate(MINI, (16, 16, 16), batch_size=2)
    assert list(table.index) == ["mini", "deep"]
    assert table.loc["mini", "parameters (M)"] == cost.parameters / 1e6
    assert table.loc["mini", "training step (GB)"] == cost.total_bytes / 1e9
    assert table.loc["mini", "blocks"] == 7 + 4 and table.loc["deep", "blocks"] == 14 + 4


def test_a_network_for_cubes_is_the_paper_s_and_larger_memory_gives_a_larger_patch():
    sizes = []
    for memory in (8e9, 16e9, 80e9):
        arch, patch = Arch.for_data((1, 1, 1), (300, 300, 300), memory)
        assert arch == PRESETS["base"] and all(side % 16 == 0 for side in patch)
        assert estimate(arch, patch, 2, "bf16", deep_supervision=True, fused="cuda").total_bytes <= memory
        sizes.append(patch[0] * patch[1] * patch[2])
    assert sizes == sorted(set(sizes)) and sizes[0] >= 112**3 and sizes[-1] == 256**3


@pytest.mark.parametrize("thick", [0, 1, 2])
def test_thick_slices_are_halved_when_the_others_have_caught_up(thick):
    "Slices of 5 mm, voxels of 1 mm, whichever axis they lie across"
    order = lambda slices, others: tuple(slices if axis == thick else others for axis in range(3))
    arch, patch = Arch.for_data(order(5, 1), order(60, 400), 3e9, "tiny")
    assert arch.strides == (order(1, 2), order(1, 2), (2, 2, 2), (2, 2, 2))
    assert arch.kernels == (order(1, 3), order(1, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert (arch.width, arch.depths, arch.ratios) == (16, ONE, TINY)
    assert patch[thick] < 60 < max(patch) and not any(side % step for side, step in zip(patch, arch.axis_strides))
    small = replace(arch, width=2, depths=ONE, ratios=TINY)
    sides = [2 * step for step in arch.axis_strides]
    assert MedNeXt(small, 1, 3)(torch.zeros(1, 1, *sides)).shape == (1, 3, *sides)


def test_small_volumes_get_fewer_levels_and_their_own_size():
    arch, patch = Arch.for_data((1, 1, 1), (36, 50, 35), 24e9)
    assert (arch.levels, patch) == (3, (40, 56, 40))
    assert arch.depths == (3, 4, 8, 8, 8, 4, 3) == arch.ratios


@pytest.mark.parametrize("seed", range(20))
def test_topology_is_nnunet_s_as_far_as_the_levels_go(seed):
    theirs = pytest.importorskip("nnunetv2.experiment_planning.experiment_planners.network_topology")
    generator = random.Random(seed)
    spacing = [generator.choice((0.5, 0.8, 1, 2, 3, 5)) for _ in range(3)]
    patch = [generator.randrange(16, 200) for _ in range(3)]
    arch, fitted = arch_for_patch(PRESETS["tiny"], spacing, patch)
    _, strides, kernels, _, _ = theirs.get_pool_and_conv_props(spacing, patch, 4, 999999)
    assert arch.level_strides == strides[1 : arch.levels + 1] and arch.levels == min(4, len(strides) - 1)
    assert arch.level_kernels[:-1] == kernels[: arch.levels]
    assert all(old <= new < old + step for old, new, step in zip(patch, fitted, arch.axis_strides))


NOT_BYTES = (float("nan"), float("inf"), 0, -1, None, "24GB", True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Arch.for_data((1, 1, 1), (48,) * 3, 1e7), "the smallest, takes .* and memory is 1e.07 bytes .24e9 for 24 GB.: take a smaller network"),
        (lambda: Arch.for_data((1, 1), (300,) * 3, 1e9), "spacing and shape must be three positive numbers each"),
        (lambda: Arch.for_data((1, 0, 1), (300,) * 3, 1e9), "three positive numbers"),
        (lambda: Arch.for_data((1, 1, 1), (6, 7, 7), 1e9), "too small to halve"),
        *((lambda value=value: Arch.for_data((1, 1, 1), (300,) * 3, value), "memory must be a positive number of bytes, e.g. 24e9") for value in NOT_BYTES),
        *((lambda value=value: Arch.for_data((1, 1, value), (300,) * 3, 1e9), "three positive numbers") for value in NOT_BYTES),
        *((lambda value=value: Arch.for_data((1, 1, 1), (300, value, 300), 1e9), "three positive numbers") for value in NOT_BYTES),
        (lambda: Arch.for_data(1, (300,) * 3, 1e9), "three positive numbers"),
        *(
            (lambda value=value: Arch.for_data((1, 1, 1), (300,) * 3, 1e9, batch_size=value), "batch_size must be a positive")
            for value in (0, -1, 1.5, True, None)
        ),
        (lambda: Arch.for_data((1, 1, 1), (300,) * 3, 1e9, None), "no MedNeXt is called None"),
        (lambda: estimate(MINI, (16, 16, 16), batch_size=0), "batch_size must be a positive whole number"),
        (lambda: Arch.for_data((1, 1, 1), (300,) * 3, 1e9, "giant"), "no MedNeXt is called 'giant'"),
    ],
)
def test_data_for_which_there_is_no_network(call, message):
    with pytest.raises(ValueError, match=message):
        call()
