"Global response normalisation: the formula, its symmetries, its gradients, its precision"

import pytest
import torch

from mednext_v2.network.grn import GRN3d, convert_grn, global_response_norm, relative_norm


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


def random_inputs(channels=6, size=(4, 3, 5), batch_size=2, dtype=torch.float64):
    x = torch.randn(batch_size, channels, *size, dtype=dtype)
    gamma, beta = torch.randn(2, 1, channels, 1, 1, 1, dtype=dtype)
    return x, gamma, beta


def by_hand(x, gamma, beta, reduction, eps=1e-6):
    "The formula written out over plain Python numbers, one sample and channel at a time"
    out = torch.empty_like(x)
    for n, sample in enumerate(x):
        norms = [sum(v * v for v in channel.flatten().tolist()) ** 0.5 for channel in sample]
        total = sum(norms) / (len(norms) if reduction == "mean" else 1)
        for c, g in enumerate(norms):
            v = sample[c]
            out[n, c] = gamma.flatten()[c] * v * (g / (total + eps)) + beta.flatten()[c] + v
    return out


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_the_formula_written_out(reduction):
    x, gamma, beta = random_inputs()
    torch.testing.assert_close(global_response_norm(x, gamma, beta, reduction), by_hand(x, gamma, beta, reduction))


def test_equals_monai_where_conventions_match():
    from monai.networks.blocks.mednext_block import MedNeXtBlock

    options = dict(use_residual_connection=False, global_resp_norm=True)
    block = MedNeXtBlock(2, 2, expansion_ratio=3, kernel_size=1, **options)
    x, gamma, beta = random_inputs()
    # MONAI has no GRN of its own: silence everything else in its block, and read the difference
    block.conv1 = block.norm = block.conv2 = block.act = block.conv3 = torch.nn.Identity()
    block.global_resp_gamma.data, block.global_resp_beta.data = gamma, beta
    torch.testing.assert_close(global_response_norm(x, gamma, beta, "mean"), block(x))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_those_of_the_function(reduction):
    inputs = [t.requires_grad_() for t in random_inputs(channels=3, size=(2, 2, 2))]
    assert torch.autograd.gradcheck(lambda *a: global_response_norm(*a, reduction, 1e-6), inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("silent", [[1], [0, 1, 2]])
def test_silent_channels_have_finite_gradients(reduction, silent):
    x, gamma, beta = random_inputs(channels=3, dtype=torch.float32)
    x[:, silent] = 0
    inputs = [t.requires_grad_() for t in (x, gamma, beta)]
    out = global_response_norm(*inputs, reduction)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(t.grad.isfinite().all() for t in inputs)
    # What is silent answers with its offset alone
    torch.testing.assert_close(out[:, silent], beta[:, silent].expand_as(out[:, silent]))


def test_the_slope_at_silence_is_that_of_the_identity():
    # With a relative norm of zero, y = x + beta: a small signal passes with slope 1 for the silent channel
    x = torch.ones(1, 2, 2, 2, 2, dtype=torch.float64)
    x[:, 0] = 0
    gamma, beta = torch.full((2, 1, 2, 1, 1, 1), 0.5, dtype=torch.float64)
    x.requires_grad_()
    global_response_norm(x, gamma, beta)[:, 0].sum().backward()
    torch.testing.assert_close(x.grad[:, 0], torch.ones_like(x[:, 0]))


def test_a_fresh_layer_is_the_identity_bit_for_bit():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(2, 5, 4, 4, 4).to(dtype)
        assert torch.equal(GRN3d(5)(x), x)
        assert torch.equal(GRN3d(5, "sum")(x), x)


def test_gamma_learns_from_the_first_step():
    layer = GRN3d(4)
    layer(torch.randn(1, 4, 3, 3, 3)).square().sum().backward()
    assert (layer.gamma.grad.abs() > 0).all() and (layer.beta.grad.abs() > 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_relative_norm_ignores_brightness_and_the_order_of_voxels(reduction):
    x, *_ = random_inputs()
    order = torch.randperm(x[0, 0].numel())
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(relative_norm(x * 1e4, reduction, 0), relative_norm(x, reduction, 0))
    torch.testing.assert_close(relative_norm(x.flip(2, 3, 4), reduction), relative_norm(x, reduction))
    torch.testing.assert_close(relative_norm(shuffled, reduction), relative_norm(x, reduction))


def test_shuffled_voxels_give_the_shuffled_output():
    x, gamma, beta = random_inputs()
    order = torch.randperm(x[0, 0].numel())
    shuffle = lambda t: t.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(global_response_norm(shuffle(x), gamma, beta), shuffle(global_response_norm(x, gamma, beta)))


def test_shuffled_channels_give_the_shuffled_output():
    x, gamma, beta = random_inputs()
    order = torch.randperm(x.shape[1])
    torch.testing.assert_close(global_response_norm(x[:, order], gamma[:, order], beta[:, order]), global_response_norm(x, gamma, beta)[:, order])


def test_samples_of_a_batch_do_not_meet():
    x, gamma, beta = random_inputs(batch_size=3)
    alone = torch.cat([global_response_norm(one[None], gamma, beta) for one in x])
    torch.testing.assert_close(global_response_norm(x, gamma, beta), alone)


def test_relative_norms_average_one_or_add_up_to_one():
    x, *_ = random_inputs()
    torch.testing.assert_close(relative_norm(x, "mean", 0).mean(1), torch.ones_like(x[:, 0, :1, :1, :1]))
    torch.testing.assert_close(relative_norm(x, "sum", 0).sum(1), torch.ones_like(x[:, 0, :1, :1, :1]))


@pytest.mark.parametrize("source, target", [("mean", "sum"), ("sum", "mean")])
@pytest.mark.parametrize("brightness", [1.0, 1e-7])  # At 1e-7 the outcome hangs on eps
def test_conversion_keeps_the_function(source, target, brightness):
    x, gamma, beta = random_inputs(channels=24)
    x *= brightness
    converted, eps = convert_grn(gamma, 1e-6, source, target)
    expected = global_response_norm(x, gamma, beta, source, 1e-6)
    actual = global_response_norm(x, converted, beta, target, eps)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_conversion_factors_and_the_way_back():
    gamma = torch.randn(1, 256, 1, 1, 1, dtype=torch.float64)
    as_sum, eps = convert_grn(gamma, 1e-6, "mean", "sum")
    torch.testing.assert_close(as_sum, 256 * gamma)
    assert eps == pytest.approx(2.56e-4)
    back, eps_back = convert_grn(as_sum, eps, "sum", "mean")
    assert torch.equal(back, gamma) and eps_back == pytest.approx(1e-6)
    assert convert_grn(gamma, 1e-6, "sum", "sum")[0] is gamma


def test_half_precision_statistics_do_not_overflow():
    x = torch.full((1, 4, 32, 32, 32), 1000.0, dtype=torch.float16)  # Norm 181,019 > 65,504
    zero, one = torch.zeros(1, 4, 1, 1, 1), torch.ones(1, 4, 1, 1, 1)
    out = global_response_norm(x, one, zero)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out, 2 * x)
    # The sum form's small relative norms must not vanish either
    assert relative_norm(torch.ones(1, 4096, 2, 2, 2, dtype=torch.float16), "sum").min() > 2e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    # 1 + gamma * r, or x + beta, rounded on the way would move about every second voxel
    x, gamma, beta = random_inputs(channels=8, size=(8, 8, 8), dtype=torch.float32)
    narrow = x.to(dtype)
    exact = global_response_norm(narrow.double(), gamma.double(), beta.double())
    actual = global_response_norm(narrow, gamma, beta)
    assert (actual != exact.to(dtype)).double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_agrees_with_float32(dtype):
    layer, x = GRN3d(8), torch.randn(1, 8, 6, 6, 6)
    torch.nn.init.normal_(layer.gamma)
    narrow = x.to(dtype)
    with torch.autocast("cpu", dtype):
        out = layer(narrow)
        assert relative_norm(narrow).dtype == torch.float32
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), layer(narrow.float()), rtol=8e-3, atol=8e-3)


def test_mixed_precision_keeps_no_widened_copy_for_backward():
    layer, saved = GRN3d(8), []
    x = torch.randn(1, 8, 6, 6, 6).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    large = [t for t in saved if t.numel() == x.numel()]
    assert large and all(t.data_ptr() == x.data_ptr() for t in large)


def test_wrong_arguments_are_named():
    x = torch.zeros(1, 4, 2, 2, 2)
    good, flat = torch.zeros(1, 4, 1, 1, 1), torch.zeros(1, 4, 1, 1)
    with pytest.raises(ValueError, match=r"must have shape \(1, 4, 1, 1, 1\).*got \(1, 4, 1, 1\)"):
        global_response_norm(x, flat, flat)
    with pytest.raises(ValueError, match="must have shape"):
        global_response_norm(x, good, torch.zeros(1, 1, 1, 1, 1))
    for call in (lambda: global_response_norm(x, good, good, "median"), lambda: GRN3d(4, "median"), lambda: convert_grn(good, 1e-6, "mean", "median")):
        with pytest.raises(ValueError, match="mean, sum, got 'median'"):
            call()
