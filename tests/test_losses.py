"Dice + cross-entropy against independent implementations, and on hard input"

import numpy as np
import pytest
import torch
from mednext_v2.losses import (
    check_labels,
    deep_supervision_loss,
    deep_supervision_weights,
    dice_ce,
    shrink_label,
    soft_dice,
)
from monai.losses import DiceCELoss


def draw(classes=4, batch=2, size=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, classes, size, size, size, generator=generator, dtype=dtype)
    label = torch.randint(0, classes, (batch, 1, size, size, size), generator=generator)
    return logits, label


@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("smooth", [1e-5, 1.0])
def test_equals_monai(batch_dice, smooth):
    logits, label = draw()
    oracle = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice,
        smooth_nr=smooth, smooth_dr=smooth,
    )
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
    function = lambda x: dice_ce(x, label, present_only=present_only)  # noqa: E731
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


def test_shrinking_uneven_sizes_is_nearest():
    label = torch.randint(0, 5, (2, 1, 9, 8, 6), generator=torch.Generator().manual_seed(0))
    wanted = torch.nn.functional.interpolate(label.float(), (4, 8, 3), mode="nearest").long()
    assert torch.equal(shrink_label(label, (4, 8, 3)), wanted)
