"The network: v1's names, MONAI's numbers, and errors that say what would work"

import copy
import dataclasses
import pickle

import pytest
import torch

from mednext_v2.network.mednext import Arch, MedNeXt, check_input, pad_to_stride

TINY = Arch(width=4, depths=(1, 2, 1, 1, 2), ratios=(2, 3, 2, 4, 2))
NAMES = {  # Written down by hand from the authors' v1 code, one level after the other
    "block": "conv1.weight conv1.bias norm.weight norm.bias conv2.weight conv2.bias conv3.weight conv3.bias grn_gamma grn_beta",
    "stages": "enc_block_0 enc_block_1 enc_block_2 enc_block_3 bottleneck dec_block_3 dec_block_2 dec_block_1 dec_block_0",
    "between": "down_0 down_1 down_2 down_3 up_3 up_2 up_1 up_0",
    "heads": "out_0 out_1 out_2 out_3 out_4",
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def on_meta(*args, **options):
    with torch.device("meta"):
        return MedNeXt(*args, **options)


def awake(model):
    for name, p in model.named_parameters():
        if any(part in name for part in ("grn", "global_resp", "norm")):
            torch.nn.init.normal_(p, mean=0.3)
    return model


def v1_names(depths, grn, deep_supervision):
    inner = [n for n in NAMES["block"].split() if grn or not n.startswith("grn")]
    names = {"stem.weight", "stem.bias"}
    for stage, depth in zip(NAMES["stages"].split(), depths):
        names |= {f"{stage}.{i}.{n}" for i in range(depth) for n in inner}
    for place in NAMES["between"].split():
        names |= {f"{place}.{n}" for n in (*inner, "res_conv.weight", "res_conv.bias")}
    for head in NAMES["heads"].split()[: 5 if deep_supervision else 1]:
        names |= {f"{head}.conv_out.weight", f"{head}.conv_out.bias"}
    return names


@pytest.mark.parametrize("grn", ["mean", None])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_state_has_exactly_the_names_of_v1(grn, deep_supervision):
    arch = Arch(width=2, depths=(3, 1, 2, 1, 1, 1, 2, 1, 1), grn=grn)
    model = on_meta(arch, 1, 3, deep_supervision)
    assert set(model.state_dict()) == v1_names(arch.depths, grn, deep_supervision)


def test_v1_weights_load_and_only_their_dummy_is_left_over():
    arch = Arch(width=2, depths=(1,) * 9, ratios=(2,) * 9)
    source, model = awake(MedNeXt(arch, 1, 3)), MedNeXt(arch, 1, 3)
    state = source.state_dict() | {"dummy_tensor": torch.ones(1)}
    report = model.load_state_dict(state, strict=False)
    assert report.unexpected_keys == ["dummy_tensor"] and not report.missing_keys
    x = torch.randn(1, 1, 32, 16, 16)
    assert torch.equal(model(x), source(x))


def test_parameters_of_the_authors_v1_class_with_grn():
    # Their first down block has no GRN, and there is one dummy number (61,969,251 without it)
    model = on_meta(Arch(), 1, 3)
    without = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("down_0.grn"))
    assert without == 61_969_251


@pytest.mark.parametrize(
    "width, grn, deep_supervision, expected",
    [
        (32, "mean", False, 61_969_507),
        (32, "sum", False, 61_969_507),
        (32, None, False, 61_779_299),
        (32, "mean", True, 61_972_399),
        (64, "mean", False, 246_536_387),
        (64, None, False, 246_155_971),
        (64, "mean", True, 246_542_159),
    ],
)
def test_parameter_counts_of_the_paper(width, grn, deep_supervision, expected):
    model = on_meta(Arch(width=width, grn=grn), 1, 3, deep_supervision)
    assert sum(p.numel() for p in model.parameters()) == expected


def monai_twin(grn, deep_supervision):
    "MONAI's network and ours with the same weights; MONAI sizes down blocks by the level they leave"
    from monai.networks.nets.mednext import MedNeXt as Monai

    theirs = Monai(
        init_filters=4,
        in_channels=2,
        out_channels=3,
        encoder_expansion_ratio=(3, 3, 3, 3),
        bottleneck_expansion_ratio=3,
        decoder_expansion_ratio=(2, 3, 4, 2),
        kernel_size=3,
        deep_supervision=deep_supervision,
        use_residual_connection=True,
        blocks_down=(1, 2, 1, 1),
        blocks_bottleneck=2,
        blocks_up=(1, 1, 2, 1),
        global_resp_norm=grn,
    )
    awake(theirs)
    depths, ratios = (1, 2, 1, 1, 2, 1, 1, 2, 1), (3, 3, 3, 3, 3, 2, 3, 4, 2)
    arch = Arch(width=4, depths=depths, ratios=ratios, grn="mean" if grn else None)
    ours, renamed = MedNeXt(arch, 2, 3, deep_supervision), {}
    place = {"up_blocks": "up", "dec_stages": "dec_block"}
    for name, tensor in theirs.state_dict().items():
        part, *rest = name.replace("global_resp", "grn").split(".")
        if part in ("enc_stages", "down_blocks"):
            part = {"enc_stages": "enc_block_", "down_blocks": "down_"}[part] + rest.pop(0)
        elif part in place:
            part = f"{place[part]}_{3 - int(rest.pop(0))}"
        elif part == "out_blocks":
            part = f"out_{4 - int(rest.pop(0))}"
        renamed[".".join((part, *rest))] = tensor
    report = ours.load_state_dict(renamed, strict=False)
    assert not report.unexpected_keys
    # MONAI leaves GRN out of its down blocks; ours is the identity there, as it starts at zero
    assert all(n.startswith("down_") and "grn" in n for n in report.missing_keys)
    assert bool(report.missing_keys) == grn
    return theirs, ours


@pytest.mark.parametrize("grn", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
def test_equals_monai_with_the_same_weights(grn, deep_supervision):
    theirs, ours = monai_twin(grn, deep_supervision)
    theirs, ours, x = theirs.double(), ours.double(), torch.randn(2, 2, 16, 32, 16).double()
    expected, actual = theirs.train()(x), ours.train()(x)
    if not deep_supervision:
        expected, actual = [expected], [actual]
    assert len(expected) == len(actual)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_deep_supervision_is_finest_first_and_one_tensor_in_eval():
    model = awake(MedNeXt(TINY, 1, 3, deep_supervision=True))
    x = torch.randn(2, 1, 16, 8, 12)
    train, evaluation = model.train()(x), model.eval()(x)
    assert [tuple(o.shape) for o in train] == [(2, 3, 16, 8, 12), (2, 3, 8, 4, 6), (2, 3, 4, 2, 3)]
    assert torch.equal(evaluation, train[0])
    model.list_in_eval = True
    assert all(torch.equal(a, b) for a, b in zip(train, model(x), strict=True))
    model.train().deep_supervision = False
    assert torch.equal(model(x), train[0]) and len(model.state_dict()) > len(MedNeXt(TINY, 1, 3).state_dict())
    model.deep_supervision = True
    assert len(model(x)) == 3
    plain = MedNeXt(TINY, 1, 3)
    plain.load_state_dict(model.state_dict(), strict=False)
    out = plain(x)
    assert isinstance(out, torch.Tensor) and torch.equal(out, train[0])
    with pytest.raises(ValueError, match="no heads for deep supervision: make it with deep_supervision=True"):
        plain.deep_supervision = True


def test_strides_and_kernels_per_axis():
    "5 mm slices: two levels within the slice alone, then cubes"
    arch = Arch(width=2, depths=(1,) * 7, ratios=(2,) * 7, strides=[[1, 2, 2], [1, 2, 2], 2], kernels=[[1, 3, 3], [1, 3, 3], 3, 3])
    model = awake(MedNeXt(arch, 1, 3, deep_supervision=True))
    assert (arch.stride, arch.axis_strides, model.stride, model.strides) == (8, (2, 8, 8), 8, (2, 8, 8))
    x = torch.randn(1, 1, 6, 16, 24)
    assert [tuple(o.shape[2:]) for o in model(x)] == [(6, 16, 24), (6, 8, 12), (6, 4, 6), (3, 2, 3)]
    assert model.down_0.conv1.kernel_size == model.up_1.conv1.kernel_size == (1, 3, 3) and model.down_1.conv1.kernel_size == (3, 3, 3)
    # Above the first level that halves them, slices do not see each other but through the lower levels
    assert model.enc_block_0[0].conv1.weight.shape == (2, 1, 1, 3, 3)
    with pytest.raises(ValueError, match=r"multiples of \(2, 8, 8\), got \(5, 16, 24\); nearest: \(4, 16, 24\) or \(6, 16, 24\)"):
        model(x[:, :, :5])
    padded, crop = pad_to_stride(x[:, :, :5], model.strides)
    assert padded.shape == x.shape and padded[crop].shape[2:] == (5, 16, 24)
    with pytest.raises(ValueError, match="leaves one voxel at stride .*at least one side must be twice that"):
        model(x[:, :, :2, :8, :8])


def test_the_defaults_said_in_other_words_are_the_same_network():
    same = Arch(strides=[[2, 2, 2]] * 4, kernels=[[3, 3, 3]] * 5)
    assert same == Arch() and hash(same) == hash(Arch())
    assert Arch(kernels=[5] * 5) == Arch(kernel=5)
    flat = Arch(strides=[[1, 2, 2], 2, 2, 2])
    assert flat.strides == ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)) and flat != Arch()
    state = MedNeXt(Arch(width=2, depths=(1,) * 3, ratios=(2,) * 3), 1, 2).state_dict()
    MedNeXt(Arch(width=2, depths=(1,) * 3, ratios=(2,) * 3, strides=[(1, 2, 2)]), 1, 2).load_state_dict(state)  # Weights know no strides


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"strides": [2, 2, 2]}, "strides must have 4 entries for these depths"),
        ({"strides": [1, 2, 2, 2]}, "strides must halve at least one axis at each level"),
        ({"strides": [(1, 1, 1), 2, 2, 2, 2]}, "leave out nnU-Net's first one, of the stem"),
        ({"strides": [3, 2, 2, 2]}, "strides must have 1 or 2 on each of three axes"),
        ({"strides": [(2, 2), 2, 2, 2]}, "strides must have 1 or 2 on each of three axes"),
        ({"strides": 2}, "strides must have 4 entries"),
        ({"strides": [2.0, 2, 2, 2]}, "strides must have 1 or 2"),
        ({"kernels": [3] * 4}, "kernels must have 5 entries for these depths"),
        ({"kernels": [(2, 3, 3), 3, 3, 3, 3]}, "kernels must have an odd number on each of three axes"),
        ({"kernels": [(1, 3, 3), 3, 3, 3, 3], "kernel": 5}, "give kernel or kernels"),
        ({"kernels": [True] * 5}, "kernels must have an odd number"),
    ],
)
def test_strides_and_kernels_that_no_network_has(fields, message):
    with pytest.raises(ValueError, match=message):
        Arch(**fields)


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_any_depth_of_the_u(levels):
    arch = Arch(width=2, depths=(1,) * (2 * levels + 1), ratios=(2,) * (2 * levels + 1))
    model = MedNeXt(arch, 1, 2, deep_supervision=True)
    assert model.stride == arch.stride == 2**levels
    outputs = model(torch.randn(1, 1, 2 * arch.stride, arch.stride, arch.stride))
    assert len(outputs) == levels + 1
    assert [o.shape[2] for o in outputs] == [2 * arch.stride // 2**i for i in range(levels + 1)]
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_parameter_takes_part():
    model = awake(MedNeXt(TINY, 1, 2))
    torch.manual_seed(1)
    model(torch.randn(1, 1, 16, 8, 8)).square().sum().backward()
    # A bias ahead of the norm is subtracted again, so only its gradient may vanish
    idle = [n for n, p in model.named_parameters() if p.grad.abs().max() == 0]
    assert all(n.endswith("conv1.bias") for n in idle)


def test_samples_of_a_batch_do_not_meet():
    model, x = awake(MedNeXt(TINY, 1, 2)).double(), torch.randn(3, 1, 8, 8, 4).double()
    torch.testing.assert_close(model(x), torch.cat([model(one[None]) for one in x]))


def test_far_voxels_are_seen():
    # Norm and GRN are global: a change in one corner reaches the opposite one
    model, x = awake(MedNeXt(TINY, 1, 2)).double(), torch.randn(1, 1, 32, 32, 32).double()
    y = x.clone()
    y[..., 0, 0, 0] += 5
    assert (model(x) - model(y))[..., -1, -1, -1].abs().max() > 1e-9


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad_checkpointing", ["expansion", "block"])
def test_checkpointing_changes_no_number(grad_checkpointing, autocast):
    plain = awake(MedNeXt(TINY, 1, 3, deep_supervision=True))
    other = MedNeXt(TINY, 1, 3, deep_supervision=True, grad_checkpointing=grad_checkpointing)
    other.load_state_dict(plain.state_dict())
    x, results = torch.randn(2, 1, 8, 16, 8), []
    for model in (plain, other):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = model(x)
        sum(o.float().square().sum() for o in outputs).backward()
        results.append([*outputs, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(plain(x), other(x), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_float32(dtype):
    model, x = awake(MedNeXt(TINY, 1, 3)), torch.randn(1, 1, 16, 16, 8)
    with torch.autocast("cpu", dtype):
        narrow = model(x)
    wide = model(x)
    assert narrow.isfinite().all()
    assert (narrow.float() - wide).abs().max() < 0.05 * wide.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_few_steps_learn_a_shape(reduction):
    model = MedNeXt(dataclasses.replace(TINY, grn=reduction), 1, 2)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 16)] * 3, indexing="ij"))
    label = (grid.square().sum(0) < 0.5).long()[None]
    x = label[:, None].float() + 0.5 * torch.randn(1, 1, 16, 16, 16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


def test_models_copy_pickle_and_materialise_from_meta():
    model, x = awake(MedNeXt(TINY, 1, 2, grad_checkpointing="block")), torch.randn(1, 1, 8, 8, 8)
    empty = on_meta(TINY, 1, 2).to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), empty):
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(depths=(2, 2, 2, 2)), r"depths must have an odd number of entries.*got 4"),
        (dict(depths=(2,)), r"3 or more"),
        (dict(ratios=()), r"ratios must have an odd number of entries.*got 0"),
        (dict(depths=(1, 1, 1)), r"equally many entries, got 3 and 9"),
        (dict(depths=(1,) * 8 + (0,)), r"depths must be a list of positive whole numbers, got \(1,"),
        (dict(ratios=(1.5,) * 9), r"ratios must be a list of positive whole numbers"),
        (dict(ratios=4), r"ratios must be a list of positive whole numbers, got 4"),
        (dict(depths="333"), r"depths must be a list of positive whole numbers, got '333'"),
        (dict(width=0), r"width must be a positive whole number, got 0"),
        (dict(width=True), r"width must be a positive whole number, got True"),
        (dict(width="32"), r"width must be a positive whole number, got '32'"),
        (dict(kernel=4), r"kernel must be an odd positive number, got 4"),
        (dict(kernel=-3), r"kernel must be an odd positive number, got -3"),
        (dict(grn="max"), r"grn must be one of mean, sum or None, got 'max'"),
        (dict(grn=True), r"grn must be one of mean, sum or None, got True"),
    ],
)
def test_arch_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Arch(**fields)


def test_arch_is_a_value():
    listed = Arch(depths=[3, 4, 8, 8, 8, 8, 8, 4, 3], ratios=[3, 4, 8, 8, 8, 8, 8, 4, 3])
    assert listed == Arch() and hash(listed) == hash(Arch())
    with pytest.raises(dataclasses.FrozenInstanceError):
        listed.width = 8
    numpy = pytest.importorskip("numpy")
    assert type(Arch(depths=tuple(numpy.array([1] * 9))).depths[0]) is int


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 8, 8, 8), r"five axes; got 4: \(1, 8, 8, 8\)"),
        ((1, 3, 8, 8, 8), r"takes 2 input channels, got 3"),
        ((1, 2, 10, 8, 9), r"multiples of 4, got \(10, 8, 9\); nearest: \(8, 8, 8\) or \(12, 8, 12\)"),
        ((1, 2, 3, 8, 8), r"nearest: \(4, 8, 8\); or see pad_to_stride\(x, 4\)$"),
        ((1, 2, 0, 8, 8), r"multiples of 4, got \(0, 8, 8\)"),
        ((2, 2, 4, 4, 4), r"leaves one voxel at stride 4.*at least one side must be 8"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_forward_refuses_and_says_what_fits(shape, message, training):
    model = MedNeXt(TINY, 2, 2).train(training)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape))


def test_the_sizes_an_error_suggests_do_fit():
    for side in range(1, 70):
        try:
            check_input((1, 1, side, 32, 32), 1, 16)
        except ValueError as error:
            tail = str(error).split("nearest: ")[1].split("; or see")[0]
            for sides in tail.split(" or "):
                suggested = tuple(map(int, sides.strip("()").split(",")))
                check_input((1, 1, *suggested), 1, 16)
                assert abs(suggested[0] - side) < 16
        else:
            assert side % 16 == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(in_channels=0), "in_channels must be a positive whole number, got 0"),
        (dict(num_classes=2.0), "num_classes must be a positive whole number, got 2.0"),
        (dict(grad_checkpointing=True), "none, expansion, block, got True"),
    ],
)
def test_model_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        MedNeXt(TINY, **(dict(in_channels=1, num_classes=2) | options))


@pytest.mark.parametrize("size", [(1, 1, 1), (4, 4, 4), (5, 9, 7), (8, 8, 8), (17, 3, 4)])
@pytest.mark.parametrize("stride", [4, 16])
def test_padding_fits_and_is_cut_back(size, stride):
    x = torch.randn(2, 1, *size)
    padded, crop = pad_to_stride(x, stride, value=-1)
    check_input(padded.shape, 1, stride)
    assert torch.equal(padded[crop], x)
    assert padded.sum() == pytest.approx(float(x.sum()) - (padded.numel() - x.numel()), rel=1e-4, abs=1e-2)
    assert all(new - old < stride for new, old in zip(padded.shape[2:4], size))
    if size == (8, 8, 8) and stride == 4:
        assert padded.shape == x.shape


def test_an_odd_volume_goes_through_the_network_and_has_gradients():
    model = MedNeXt(TINY, 2, 3)
    x = torch.randn(1, 2, 9, 7, 5, requires_grad=True)
    padded, crop = pad_to_stride(x, model.stride)
    y = model(padded)[crop]
    assert y.shape == (1, 3, 9, 7, 5)
    y.square().sum().backward()
    assert x.grad.shape == x.shape and x.grad.isfinite().all() and x.grad.any()


def test_a_padded_metatensor_keeps_its_place():
    from monai.data import MetaTensor

    affine = torch.tensor([[2.0, 0, 0, -9], [0, 3, 0, 5], [0, 0, 4, 1], [0, 0, 0, 1]])
    x = MetaTensor(torch.randn(1, 2, 9, 7, 5), affine=affine, meta={"name": "scan"})
    model = MedNeXt(TINY, 2, 3)
    padded, crop = pad_to_stride(x, model.stride)
    y = model(padded)[crop]
    assert isinstance(y, MetaTensor) and y.shape == (1, 3, 9, 7, 5) and y.meta["name"] == "scan"
    torch.testing.assert_close(y.affine.float(), affine)


@pytest.mark.parametrize("shape", [(2, 9, 7, 5), (1, 2, 0, 8, 8)])
def test_what_cannot_be_padded_is_refused(shape):
    with pytest.raises(ValueError, match="pad_to_stride takes"):
        pad_to_stride(torch.zeros(shape), 4)
