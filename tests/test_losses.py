"Dice + cross-entropy against independent implementations, and on hard input"

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mednext_v2.training.losses import check_labels, deep_supervision_loss, deep_supervision_weights, dice_ce, shrink_label, soft_dice, sum_over_processes


def draw(classes=4, batch_size=2, size=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch_size, classes, size, size, size, generator=generator, dtype=dtype)
    label = torch.randint(0, classes, (batch_size, 1, size, size, size), generator=generator)
    return logits, label


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("smooth", [1e-5, 1.0])
def test_equals_monai(batch_dice, smooth):
    from monai.losses import DiceCELoss  # Here, so that the processes started below need not import it

    logits, label = draw()
    oracle = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice, smooth_nr=smooth, smooth_dr=smooth)
    torch.testing.assert_close(dice_ce(logits, label, smooth, batch_dice), oracle(logits, label))


def formula(logits: np.ndarray, label: np.ndarray, smooth: float, present_only: bool) -> float:
    "The loss written out voxel by voxel and class by class, in float64"
    exponent = np.exp(logits - logits.max(1, keepdims=True))
    p = exponent / exponent.sum(1, keepdims=True)
    dices = []
    for c in range(1, logits.shape[1]):
        truth = label[:, 0] == c
        if present_only and not truth.any():
            continue
        dices.append((2 * p[:, c][truth].sum() + smooth) / (p[:, c].sum() + truth.sum() + smooth))
    ce = -np.mean(np.log(np.take_along_axis(p, label, 1)))
    return (1 - np.mean(dices) if dices else 0) + ce


@pytest.mark.parametrize("present_only", [True, False])
@pytest.mark.parametrize("shown", [(0, 1, 2, 3), (0, 2), (0,)])
def test_equals_formula(present_only, shown):
    logits, label = draw()
    label = torch.tensor(shown)[label % len(shown)]
    wanted = formula(logits.double().numpy(), label.numpy(), 1e-5, present_only)
    assert dice_ce(logits, label, present_only=present_only).item() == pytest.approx(wanted, abs=1e-6)


def test_present_only_per_sample_ignores_the_other_sample():
    logits, label = draw(classes=3)
    label[0], label[1] = label[0] % 2, 2 * (label[1] % 2)  # classes 0, 1 and 0, 2
    both = soft_dice(logits.softmax(1), label, batch_dice=False, present_only=True)
    each = [soft_dice(logits[i : i + 1].softmax(1), label[i : i + 1], present_only=True) for i in (0, 1)]
    torch.testing.assert_close(both, torch.stack(each).mean())


@pytest.mark.parametrize("present_only", [True, False])
def test_gradients(present_only):
    logits, label = draw(classes=3, size=2, dtype=torch.float64)
    label %= 2
    function = lambda x: dice_ce(x, label, present_only=present_only)
    assert torch.autograd.gradcheck(function, logits.requires_grad_())


def test_softmax_is_float32_under_autocast():
    logits, label = draw()
    with torch.autocast("cpu", torch.bfloat16):
        loss = dice_ce(logits.bfloat16(), label)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, dice_ce(logits.bfloat16().float(), label), rtol=0, atol=0)


def test_large_scores_stay_finite():
    _, label = draw()
    logits = torch.zeros(2, 4, 6, 6, 6).scatter_(1, label, 1)
    for scale in (1e4, -1e4):
        x = (scale * logits).requires_grad_()
        loss = dice_ce(x, label)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
    assert dice_ce(1e4 * logits, label) < 1e-6


def test_voxel_order_does_not_matter():
    logits, label = draw()
    order = torch.randperm(216, generator=torch.Generator().manual_seed(1))
    shuffled = [t.flatten(2)[..., order].view_as(t) for t in (logits, label)]
    torch.testing.assert_close(dice_ce(*shuffled), dice_ce(logits, label))


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (4, torch.int64, r"0\.\.3 for 4 output channels, got \[4\]"),
        (-1, torch.int64, r"got \[-1\]"),
        (255, torch.uint8, r"got \[255\]"),
        (1, torch.float32, "must be integers, got torch.float32"),
    ],
)
def test_labels_that_do_not_fit(value, dtype, message):
    logits, label = draw()
    label = label.to(dtype)
    label[0, 0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=message):
        dice_ce(logits, label)
    with pytest.raises(ValueError, match=message):
        check_labels(label, 4)


@pytest.mark.parametrize("shape", [(2, 6, 6, 6), (2, 1, 6, 6, 5), (1, 1, 6, 6, 6), (2, 4, 6, 6, 6)])
def test_shapes_that_do_not_agree(shape):
    logits, _ = draw()
    with pytest.raises(ValueError, match="must agree"):
        dice_ce(logits, torch.zeros(shape, dtype=torch.int64))


def test_deep_supervision_is_the_weighted_sum():
    logits, label = draw(size=8)
    outputs = [logits, logits[..., ::2, ::2, ::2], logits[..., ::4, ::4, ::4]]
    terms = [dice_ce(o, label[..., ::s, ::s, ::s]) for o, s in zip(outputs, (1, 2, 4))]
    wanted = (4 * terms[0] + 2 * terms[1] + terms[2]) / 7
    torch.testing.assert_close(deep_supervision_loss(outputs, label), wanted)


def test_deep_supervision_passes_options_on():
    logits, label = draw(size=4)
    label %= 2
    outputs = [logits, logits[..., ::2, ::2, ::2]]
    assert deep_supervision_loss(outputs, label, present_only=True) != deep_supervision_loss(outputs, label)


@pytest.mark.parametrize("outputs", range(1, 7))
def test_weights_halve_and_add_up_to_one(outputs):
    weights = deep_supervision_weights(outputs)
    assert sum(weights) == pytest.approx(1)
    assert all(a == pytest.approx(2 * b) for a, b in zip(weights, weights[1:]))


@pytest.mark.parametrize("ddp", [False, True])
@pytest.mark.parametrize("stages", range(2, 9))
def test_nnunet_weighting_equals_nnunet_trainer(stages, ddp):
    trainers = pytest.importorskip("nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
    trainer = object.__new__(trainers.nnUNetTrainer)  # Without a data set; `_build_loss` needs what follows
    trainer.is_ddp, trainer.enable_deep_supervision, trainer._do_i_compile = ddp, True, lambda: False
    trainer.label_manager = SimpleNamespace(has_regions=False, ignore_label=None)
    kernels = [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1)
    trainer.configuration_manager = SimpleNamespace(batch_dice=True, pool_op_kernel_sizes=kernels)
    if stages == 2 and not ddp:  # One output, whose weight would be 0 / 0
        assert deep_supervision_weights(1, "nnunet") == [1]
        return
    theirs = list(trainer._build_loss().weight_factors)
    assert len(theirs) == stages - 1
    # Across processes nnU-Net puts 1e-6 for 0, lest parameters go unused: ours stay in the graph
    assert deep_supervision_weights(len(theirs), "nnunet") == pytest.approx(theirs, abs=3e-6 if ddp else 1e-12)


@pytest.mark.parametrize("weighting, counts", [("mednext", True), ("nnunet", False)])
def test_coarsest_output_counts_in_mednext_alone(weighting, counts):
    logits, label = draw(size=8)
    outputs = [logits[..., :: 2**i, :: 2**i, :: 2**i].clone().requires_grad_() for i in range(3)]
    deep_supervision_loss(outputs, label, weights=weighting).backward()
    assert [bool(output.grad.abs().sum() > 0) for output in outputs] == [True, True, counts]


def test_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting must be one of mednext, nnunet, got 'v1'"):
        deep_supervision_weights(3, "v1")


@pytest.mark.parametrize("name, weighting", [("pretrain", "mednext"), ("finetune", "mednext"), ("v1", "mednext"), ("nnunet", "nnunet")])
def test_recipe_weighs_outputs_as_its_source(name, weighting):
    from mednext_v2.training.recipe import get_recipe
    from mednext_v2.training.trainer import loss_options

    recipe = get_recipe(name)
    assert recipe.weighting == loss_options(recipe)["weights"] == weighting
    with pytest.raises(ValueError, match=f"recipe {name}: weighting must be one of mednext, nnunet, got 'none'"):
        get_recipe(name, weighting="none")


def test_a_loss_is_chosen_by_name(monkeypatch):
    from mednext_v2.training.checkpoint import identity
    from mednext_v2.training.losses import LOSSES
    from mednext_v2.training.recipe import Recipe
    from mednext_v2.training.trainer import loss_options

    logits, label = draw(size=8)
    outputs, default = [logits, logits[..., ::2, ::2, ::2]], loss_options(Recipe(steps=1))
    assert torch.equal(deep_supervision_loss(outputs, label, **default), deep_supervision_loss(outputs, label))
    with pytest.raises(ValueError, match="recipe: loss must be one of dice_ce, got 'double'"):
        Recipe(steps=1, loss="double")
    with pytest.raises(ValueError, match="no loss 'double'; there are: dice_ce"):
        deep_supervision_loss(outputs, label, loss="double")

    monkeypatch.setitem(LOSSES, "double", lambda *given, **options: 2 * dice_ce(*given, **options))
    recipe = Recipe(steps=1, loss="double")
    torch.testing.assert_close(deep_supervision_loss(outputs, label, **loss_options(recipe)), 2 * deep_supervision_loss(outputs, label))
    network = torch.nn.Conv3d(1, 2, 1)
    runs = [identity(Recipe(steps=1, loss=name), network, None, seed=0)["recipe.loss"] for name in ("dice_ce", "double")]
    assert runs == ["dice_ce", "double"]


def test_a_recipe_from_before_the_field_loss_is_read():
    from dataclasses import asdict

    from mednext_v2.core import build
    from mednext_v2.training.recipe import Recipe

    old = asdict(Recipe(steps=1))
    del old["loss"]
    assert build(Recipe, old).loss == "dice_ce"


@pytest.mark.parametrize("name, outputs", [("nnunet_plain", 5), ("resenc_l", 5), ("mednext_v2_base", 5)])
def test_networks_give_as_many_outputs_as_their_source(name, outputs):
    "nnU-Net supervises one output fewer than a network has stages (six), MedNeXt each of its five levels"
    from mednext_v2.models.registry import create

    with torch.device("meta"):
        network = create(name, 1, 3, True)
        assert len(network(torch.empty(1, 1, 64, 64, 64))) == outputs


def test_shrinking_uneven_sizes_is_nearest():
    label = torch.randint(0, 5, (2, 1, 9, 8, 6), generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.interpolate(label.float(), (4, 8, 3), mode="nearest").long()
    assert torch.equal(shrink_label(label, (4, 8, 3)), wanted)


# Default options: the numbers of the first version, bit for bit


def first_version(logits, label, smooth=1e-5, batch_dice=True, present_only=False):
    "dice_ce as it was before regions, ignored voxels, partial labels and processes"
    with torch.autocast(logits.device.type, enabled=False):
        log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), 1)
        label, p = label.long(), log_p.exp()
        truth = torch.zeros_like(p).scatter_(1, label, 1)[:, 1:]
        axes = tuple(range(2, label.ndim)) if not batch_dice else (0, *range(2, label.ndim))
        overlap, size = (p[:, 1:] * truth).sum(axes), truth.sum(axes)
        dice = (2 * overlap + smooth) / (p[:, 1:].sum(axes) + size + smooth)
        weight = (size > 0).to(dice) if present_only else torch.ones_like(dice)
        dice = 1 - ((1 - dice) * weight).sum() / weight.sum().clamp(min=1)
        return 1 - dice + torch.nn.functional.nll_loss(log_p, label[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("present_only", [True, False])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_defaults_keep_the_first_versions_bits(batch_dice, present_only, dtype):
    for classes, batch_size, size, seed in ((2, 1, 17, 0), (5, 3, 12, 1), (40, 2, 9, 2)):
        logits, label = draw(classes, batch_size, size, seed)
        options = dict(batch_dice=batch_dice, present_only=present_only)
        label = (label % max(2, classes // 2)).to(torch.uint8)
        grads = []
        for function in (first_version, dice_ce):
            x = logits.to(dtype).requires_grad_()
            loss = function(x, label, **options)
            loss.backward()
            grads.append((loss.detach(), x.grad))
        assert all(torch.equal(a, b) for a, b in zip(*grads))


# Voxels that do not count


def masked(seed=0, classes=4, dtype=torch.float64, value=255):
    logits, label = draw(classes, seed=seed, dtype=dtype)
    hidden = torch.rand(label.shape, generator=torch.Generator().manual_seed(seed + 10)) < 0.4
    return logits, label, label.masked_fill(hidden, value), ~hidden


REGIONS = ((1, 2, 3), (2, 3), (3,))
MODES = {"classes": {}, "regions": {"regions": REGIONS}}


def mode_inputs(mode, **options):
    "The same label for four classes or for three nested regions"
    logits, label, holes, counted = masked(**options)
    return (logits[:, 1:] if mode == "regions" else logits), label, holes, counted


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("present_only", [True, False])
def test_ignoring_is_cutting_away(mode, batch_dice, present_only):
    logits, label, _, _ = mode_inputs(mode)
    label[label == 3] = 2
    holes = label.clone()
    holes[..., 4:] = 255
    options = dict(batch_dice=batch_dice, present_only=present_only, **MODES[mode])
    grads = []
    for cut in (False, True):
        x = logits.clone().requires_grad_()
        inputs = (x[..., :4], label[..., :4]) if cut else (x, holes)
        loss = dice_ce(*inputs, **options, ignore=None if cut else 255)
        loss.backward()
        grads += [loss.detach(), x.grad]
    torch.testing.assert_close(grads[0], grads[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(grads[1], grads[3], rtol=0, atol=1e-12)
    assert (grads[1][..., 4:] == 0).all() and (grads[1][..., :4] != 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [4, 255, -1, 1000])
def test_scores_of_ignored_voxels_do_not_matter(mode, value):
    logits, label, holes, counted = mode_inputs(mode, value=value)
    wild = torch.where(counted, logits, 1e4 * logits)
    one, other = (dice_ce(x, holes, ignore=value, **MODES[mode]) for x in (logits, wild))
    assert torch.equal(one, other)
    declared = dice_ce(logits, label, ignore=value, **MODES[mode])
    torch.testing.assert_close(declared, dice_ce(logits, label, **MODES[mode]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("present_only", [True, False])
@pytest.mark.parametrize(
    ("fill", "options"),
    [
        (255, dict(ignore=255)),
        (255, dict(ignore=255, regions=REGIONS)),
        (0, dict(annotated=torch.zeros(2, 3, dtype=torch.bool))),
        (0, dict(annotated=torch.tensor([[True, False, False]] * 2))),
        (0, dict(annotated=torch.zeros(2, 3, dtype=torch.bool), regions=REGIONS)),
        (255, dict(annotated=torch.tensor([[True, True, False]] * 2), ignore=255)),
    ],
    ids=str,
)
def test_nothing_annotated_is_zero_without_gradient(fill, options, batch_dice, present_only):
    for scale in (1, 1e4):
        logits, label = draw(classes=3)
        x = (scale * logits).requires_grad_()
        label = torch.full_like(label, fill)
        loss = dice_ce(x, label, batch_dice=batch_dice, present_only=present_only, **options)
        loss.backward()
        assert loss.item() == 0 and (x.grad == 0).all()


# Oracles: nnU-Net and MONAI


def loss_and_gradient(function, logits, *arguments, **options):
    x = logits.clone().requires_grad_()
    loss = function(x, *arguments, **options)
    loss.backward()
    return loss.detach(), x.grad


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("dice_class", ["SoftDiceLoss", "MemoryEfficientSoftDiceLoss"])
@pytest.mark.parametrize("ignore", [None, 4])
def test_equals_nnunet_classes(ignore, dice_class, batch_dice):
    compound = pytest.importorskip("nnunetv2.training.loss.compound_losses")
    logits, label, holes, _ = masked(dtype=torch.float32, value=4)
    dice = dict(batch_dice=batch_dice, do_bg=False, smooth=1e-5, ddp=False)
    oracle = compound.DC_and_CE_loss(dice, {}, ignore_label=ignore, dice_class=getattr(compound, dice_class))
    label = label if ignore is None else holes
    ours = loss_and_gradient(dice_ce, logits, label, batch_dice=batch_dice, ignore=ignore)
    theirs = loss_and_gradient(lambda x: 1 + oracle(x, label), logits)  # They leave out the one of 1 - Dice
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("ignore", [None, 4])
def test_equals_nnunet_regions(ignore, batch_dice):
    compound = pytest.importorskip("nnunetv2.training.loss.compound_losses")
    logits, label, holes, counted = masked(dtype=torch.float32, value=4)
    logits, label = logits[:, 1:], label if ignore is None else holes
    dice = dict(batch_dice=batch_dice, do_bg=True, smooth=1e-5, ddp=False)
    # With an ignore label nnU-Net sums the binary cross-entropy over regions, without one it averages
    weight = 1 if ignore is None else 1 / len(REGIONS)
    oracle = compound.DC_and_BCE_loss({}, dice, weight_ce=weight, use_ignore_label=ignore is not None)
    planes = [sum((label == v) for v in region) > 0 for region in REGIONS]
    target = torch.cat(planes if ignore is None else [*planes, ~counted], 1)
    ours = loss_and_gradient(dice_ce, logits, label, batch_dice=batch_dice, ignore=ignore, regions=REGIONS)
    theirs = loss_and_gradient(lambda x: 1 + oracle(x, target), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("smooth", [1e-5, 1.0])
def test_equals_monai_regions(batch_dice, smooth):
    from monai.losses import DiceCELoss, DiceLoss

    logits, label = draw(dtype=torch.float64)
    options = dict(include_background=True, batch=batch_dice, smooth_nr=smooth, smooth_dr=smooth)
    # The first channel of MONAI's counts only if its "background" is included: there is none among regions
    target = torch.cat([label >= 1, label >= 2, label >= 3], 1).double()
    dice = DiceLoss(sigmoid=True, **options)
    oracle = lambda x: dice(x, target) + torch.nn.BCEWithLogitsLoss()(x, target)
    ours = loss_and_gradient(dice_ce, logits[:, 1:], label, smooth, batch_dice, regions=REGIONS)
    torch.testing.assert_close(ours, loss_and_gradient(oracle, logits[:, 1:]), rtol=0, atol=1e-10)
    excluded = DiceLoss(sigmoid=True, **options | {"include_background": False})(logits[:, 1:], target)
    assert (excluded - dice(logits[:, 1:], target)).abs() > 1e-4
    # One region alone: MONAI's compound loss is binary there
    one = DiceCELoss(sigmoid=True, **options)(logits[:, :1], target[:, :1])
    torch.testing.assert_close(dice_ce(logits[:, :1], label, smooth, batch_dice, regions=((1, 2, 3),)), one)


def test_regions_may_overlap_without_nesting_and_in_any_order():
    logits, label = draw(dtype=torch.float64)
    crossing = ((1, 3), (2, 3))
    loss = dice_ce(logits[:, :2], label, regions=crossing)
    turned = dice_ce(logits[:, [1, 0]], label, regions=[[3, 2], [3, 1]])
    torch.testing.assert_close(loss, turned, rtol=0, atol=1e-12)
    present = dice_ce(logits[:, :2], label % 2, regions=crossing, present_only=True)
    binary = torch.nn.BCEWithLogitsLoss()
    truth = torch.cat([label % 2 == 1, torch.zeros_like(label) > 0], 1).double()
    p, t = logits[:, 0].sigmoid(), truth[:, 0]
    dice = (2 * (p * t).sum() + 1e-5) / (p.sum() + t.sum() + 1e-5)
    torch.testing.assert_close(present, 1 - dice + binary(logits[:, :2], truth), rtol=0, atol=1e-12)


# Partial labels


def partial(dtype=torch.float64, ignore=None):
    "Five classes, three samples; the first has no class 3 and 4, the second no 1, the third has all"
    logits, label = draw(classes=5, batch_size=3, dtype=dtype)
    annotated = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    label = torch.where(annotated.gather(1, label.flatten(1)).view(label.shape), label, 0)
    if ignore is not None:
        label[:, :, :2] = ignore
    return logits, label, annotated


def partial_formula(logits, label, annotated, batch_dice, present_only, ignore, smooth=1e-5):
    "Voxel by voxel, with merged probabilities, in numpy"
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy, voxels = 0.0, 0
    groups = [range(len(p))] if batch_dice else [[b] for b in range(len(p))]
    for b in range(len(p)):
        for place in np.ndindex(label.shape[2:]):
            value = label[(b, 0, *place)]
            if value == ignore:
                continue
            merged = [0, *(c for c in range(1, p.shape[1]) if not annotated[b, c])] if value == 0 else [value]
            entropy -= np.log(sum(p[(b, c, *place)] for c in merged))
            voxels += 1
    dices = []
    for group in groups:
        for c in range(1, p.shape[1]):
            overlap = predicted = true = 0.0
            for b in (b for b in group if annotated[b, c]):
                counted = label[b, 0] != ignore
                overlap += p[b, c][label[b, 0] == c].sum()
                predicted += p[b, c][counted].sum()
                true += (label[b, 0] == c).sum()
            if any(annotated[b, c] for b in group) and (true > 0 or not present_only):
                dices.append((2 * overlap + smooth) / (predicted + true + smooth))
    return 1 - np.mean(dices) + entropy / voxels


@pytest.mark.parametrize("ignore", [None, 9])
@pytest.mark.parametrize("present_only", [True, False])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_partial_labels_equal_formula(batch_dice, present_only, ignore):
    logits, label, annotated = partial(ignore=ignore)
    label[label == 2] = 0  # Annotated, and absent
    options = dict(batch_dice=batch_dice, present_only=present_only, ignore=ignore)
    wanted = partial_formula(logits.numpy(), label.numpy(), annotated.numpy(), **options)
    assert dice_ce(logits, label, annotated=annotated, **options).item() == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("batch_dice", [True, False])
def test_partial_labels_equal_a_smaller_network(batch_dice):
    logits, label = draw(classes=5, dtype=torch.float64)
    label = label % 3
    annotated = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    small = torch.cat([logits[:, [0, 3, 4]].logsumexp(1, keepdim=True), logits[:, 1:3]], 1)
    wanted = dice_ce(small, label, batch_dice=batch_dice)
    torch.testing.assert_close(dice_ce(logits, label, batch_dice=batch_dice, annotated=annotated), wanted, rtol=0, atol=1e-12)


def test_all_annotated_is_the_plain_loss():
    logits, label = draw(classes=5, dtype=torch.float64)
    for first in (True, False):  # The entry of the background is not read
        annotated = torch.ones(2, 5, dtype=torch.bool)
        annotated[:, 0] = first
        for options in ({}, {"batch_dice": False}, {"present_only": True}):
            ours = loss_and_gradient(dice_ce, logits, label, annotated=annotated, **options)
            plain = loss_and_gradient(dice_ce, logits, label, **options)
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


def test_sample_without_any_annotation_counts_as_ignored():
    logits, label, annotated = partial()
    label[1], annotated[1] = 0, False
    both = [0, 2]
    for options in ({}, {"batch_dice": False}):
        ours = loss_and_gradient(dice_ce, logits, label, annotated=annotated, **options)
        wanted = dice_ce(logits[both], label[both], annotated=annotated[both], **options)
        torch.testing.assert_close(ours[0], wanted, rtol=0, atol=1e-12)
        assert (ours[1][1] == 0).all()


@pytest.mark.parametrize("present_only", [True, False])
@pytest.mark.parametrize("batch_dice", [True, False])
def test_unannotated_regions_have_no_gradient_and_no_weight(batch_dice, present_only):
    logits, label, holes, _ = mode_inputs("regions")
    annotated = torch.tensor([[True, False, True]] * 2)
    options = dict(batch_dice=batch_dice, present_only=present_only, ignore=255)
    loss, grad = loss_and_gradient(dice_ce, logits, holes, regions=REGIONS, annotated=annotated, **options)
    two = logits[:, [0, 2]]
    # Value 2 lies in the first region too, so it stays known
    wanted, gradient = loss_and_gradient(dice_ce, two, holes, regions=((1, 2, 3), (3,)), **options)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad[:, [0, 2]], gradient, rtol=0, atol=1e-12)
    assert (grad[:, 1] == 0).all()


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_all_options_together(mode, batch_dice):
    logits, label = draw(classes=4, size=2, dtype=torch.float64)
    label[0, 0, 0], label[1, 0, 0, 0] = 0, 7
    label[0][label[0] == 2] = 0
    annotated = torch.tensor([[True, True, False, True], [True, True, True, True]])
    if mode == "regions":
        logits, annotated = logits[:, 1:], annotated[:, 1:]
    options = dict(batch_dice=batch_dice, ignore=7, annotated=annotated, **MODES[mode])
    assert torch.autograd.gradcheck(lambda x: dice_ce(x, label, **options), logits.clone().requires_grad_())


# Several processes


def in_parts(function, parts):
    "The loss of every part, by a `reduce` whose sums autograd follows through all parts"
    notes = [[] for _ in parts]
    for part, note in zip(parts, notes):
        function(part, lambda tensor: note.append(tensor) or tensor)
    assert len({len(note) for note in notes}) == 1, "processes must call reduce equally often"
    totals = [sum(tensors) for tensors in zip(*notes)]
    losses = []
    for part in parts:
        remaining = iter(totals)
        losses.append(function(part, lambda tensor: next(remaining)))
        assert next(remaining, None) is None
    return losses


def spread(seed=0):
    "Four samples that differ in what they show, what is ignored and what is annotated; two resolutions"
    logits, label = draw(classes=4, batch_size=4, seed=seed, dtype=torch.float64)
    coarse = logits[..., ::2, ::2, ::2] * 0.5
    label[0] %= 2
    label[1, :, 2:] = 7
    label[2][label[2] == 3] = 0
    label[3] = 7
    annotated = torch.ones(4, 4, dtype=torch.bool)
    annotated[2, 3] = annotated[0, 2:] = False
    return logits, coarse, label, annotated


PARTS = [[[0, 1, 2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]], [[0], [1, 2, 3]]]


@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("present_only", [True, False])
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("partly", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_parts_give_the_gradient_of_the_whole(mode, partly, batch_dice, present_only, parts):
    logits, coarse, label, annotated = spread()
    first = 1 if mode == "regions" else 0
    options = dict(batch_dice=batch_dice, present_only=present_only, ignore=7, **MODES[mode])
    scale = torch.linspace(0.5, 1.5, 4, dtype=torch.float64).requires_grad_()  # Weights that processes share

    def loss(part, reduce=None):
        shared = scale.view(1, 4, 1, 1, 1)
        outputs = [(x[part] * shared)[:, first:] for x in (logits, coarse)]
        more = dict(annotated=annotated[part][:, first:]) if partly else {}
        return deep_supervision_loss(outputs, label[part], reduce=reduce, **more, **options)

    whole = loss([0, 1, 2, 3])
    losses = in_parts(loss, parts)
    assert all(abs(one.item() - whole.item()) < 1e-12 for one in losses)
    averaged = torch.autograd.grad(sum(losses) / len(parts), scale)[0]  # As DistributedDataParallel averages
    torch.testing.assert_close(averaged, torch.autograd.grad(whole, scale)[0], rtol=0, atol=1e-10)


CASES = [{}, dict(ignore=7), dict(ignore=7, batch_dice=False), dict(ignore=7, present_only=True, partly=True), dict(ignore=7, regions=REGIONS)]


def small_network():
    torch.manual_seed(0)
    return torch.nn.Conv3d(4, 4, 1).double()


def case_gradient(network, case, part, reduce):
    "Loss and gradient of one case, on the samples of one process"
    logits, _, label, annotated = spread()
    options, first = dict(case), 1 if "regions" in case else 0
    if options.pop("partly", False):
        options["annotated"] = annotated[part][:, first:]
    if "ignore" not in options:
        label = label % 7 % 4
    network.zero_grad()
    loss = dice_ce(network(logits[part])[:, first:], label[part], reduce=reduce, **options)
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in network.parameters()]


def process(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    network = torch.nn.parallel.DistributedDataParallel(small_network())
    found = [case_gradient(network, case, [rank, rank + 2], sum_over_processes) for case in CASES]
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_real_processes_give_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    wanted = [case_gradient(small_network(), case, [0, 1, 2, 3], None) for case in CASES]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for (loss, grads), (whole, gradients) in zip(found, wanted, strict=True):
            assert loss == pytest.approx(whole, abs=1e-12)
            torch.testing.assert_close(grads, gradients, rtol=0, atol=1e-12)


# Deep supervision with options


def test_own_weights_are_used_as_they_are():
    logits, label = draw(size=8)
    outputs = [logits, logits[..., ::2, ::2, ::2]]
    terms = [dice_ce(o, label[..., ::s, ::s, ::s]) for o, s in zip(outputs, (1, 2))]
    loss = deep_supervision_loss(outputs, label, weights=[3, 0.5])
    torch.testing.assert_close(loss, 3 * terms[0] + 0.5 * terms[1])
    x = [o.clone().requires_grad_() for o in outputs]
    deep_supervision_loss(x, label, weights=[1, 0]).backward()
    assert (x[1].grad == 0).all() and (x[0].grad != 0).any()  # There, so that no process waits for it


@pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, -1], [1, float("nan")], [float("inf"), 1]])
def test_weights_that_do_not_fit(weights):
    logits, label = draw()
    with pytest.raises(ValueError, match="2 outputs need as many weights of 0 or more, got"):
        deep_supervision_loss([logits, logits[..., ::2, ::2, ::2]], label, weights=weights)


def test_options_reach_every_resolution():
    logits, label, holes, _ = masked(value=7)
    outputs = [logits[:, 1:], logits[:, 1:, ::2, ::2, ::2]]
    annotated = torch.tensor([[True, True, False], [True, True, True]])
    options = dict(ignore=7, regions=REGIONS, annotated=annotated)
    terms = [dice_ce(o, holes[..., ::s, ::s, ::s], **options) for o, s in zip(outputs, (1, 2))]
    loss = deep_supervision_loss(outputs, holes, **options)
    torch.testing.assert_close(loss, (2 * terms[0] + terms[1]) / 3)


def test_every_wrong_label_is_found_though_labels_are_looked_at_once():
    logits, label = draw(size=8)
    outputs = [logits, logits[..., ::2, ::2, ::2]]
    label[0, 0, 1, 1, 1] = 4  # At full size only
    with pytest.raises(ValueError, match=r"got \[4\]"):
        deep_supervision_loss(outputs, label)
    label[0, 0, 1, 1, 1] = 3  # Too much for a coarse output with fewer channels
    with pytest.raises(ValueError, match=r"0\.\.2 for 3 output channels, got \[3\]"):
        deep_supervision_loss([logits, outputs[1][:, :3]], label)
    label[0, 0, 2, 2, 2] = 9  # No output at full size: the coarse ones are looked at each
    with pytest.raises(ValueError, match=r"got \[9\]"):
        deep_supervision_loss([logits[..., ::4, ::4, ::4], outputs[1]], label)


# Input that does not fit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ignore=3), r"ignore must be a value that is no class, got 3, one of \[0, 1, 2, 3\]"),
        (dict(ignore=0), "ignore must be a value that is no class, got 0"),
        (dict(ignore=2, regions=((1,), (2,), (1,), (3,))), r"no class, got 2, one of \[0, 1, 2, 3\]"),
        (dict(regions=((1, 2), (2,))), "2 regions need as many output channels, got 4"),
        (dict(regions=((1,), (2,), (1, 2), (2, 5))), r"0 or in a region, one of \[0, 1, 2, 5\], got \[3\]"),
        (dict(regions=((1,), (2,), (), (3,))), r"tuple of positive integers, got \(\)"),
        (dict(regions=((1,), (2,), (0, 1), (3,))), r"positive integers, got \(0, 1\)"),
        (dict(regions=((1,), (2,), (1.5,), (3,))), r"positive integers, got \(1\.5,\)"),
        (dict(regions=(1, 2, 3, 4)), "positive integers, got 1"),
        (dict(regions=("core", "edema", "a", "b")), "positive integers, got 'core'"),
        (dict(annotated=torch.ones(2, 3, dtype=torch.bool)), r"\(2, 4\), got torch.bool \(2, 3\)"),
        (dict(annotated=torch.ones(4, dtype=torch.bool)), r"\(2, 4\), got torch.bool \(4,\)"),
        (dict(annotated=torch.ones(1, 4, dtype=torch.bool)), r"\(2, 4\), got torch.bool \(1, 4\)"),
        (dict(annotated=torch.ones(2, 4)), r"must be bool .* got torch.float32 \(2, 4\)"),
        (dict(annotated=torch.arange(8).view(2, 4) != 6), "sample 1 has voxels of class 2, which is not"),
    ],
)
def test_options_that_do_not_fit(options, message):
    logits, label = draw()
    for function in (dice_ce, deep_supervision_loss):
        with pytest.raises(ValueError, match=message):
            function(logits, label, **options)


@pytest.mark.parametrize("mode", MODES)
def test_labels_beside_the_ignored_value(mode):
    logits, label, holes, _ = mode_inputs(mode)
    holes[0, 0, 0, 0, :3] = torch.tensor([254, 5, -1])
    with pytest.raises(ValueError, match=r"or be 255, ignored\), got \[-1, 5, 254\]"):
        dice_ce(logits, holes, ignore=255, **MODES[mode])
    with pytest.raises(ValueError, match="must be integers, got torch.float64"):
        dice_ce(logits, holes.double(), ignore=255, **MODES[mode])
    small = label.to(torch.uint8)
    small[0, 0, 0, 0, 0] = 255
    with pytest.raises(ValueError, match=r"or be -1, ignored\), got \[255\]"):
        dice_ce(logits, small, ignore=-1, **MODES[mode])
    byte, word = (dice_ce(logits, labels, ignore=255, **MODES[mode]) for labels in (small, small.int()))
    assert torch.equal(byte, word)


def test_half_precision_counts_in_single():
    logits, label, annotated = partial(torch.float32)
    regions = ((1,), (2,), (3,), (4,))
    for options in (dict(annotated=annotated), dict(annotated=annotated[:, 1:], regions=regions)):
        scores = logits[:, 5 - options["annotated"].shape[1] :].bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            loss = dice_ce(scores, label, **options)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, dice_ce(scores.float(), label, **options))
