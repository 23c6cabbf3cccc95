"""GPU kernels give what the formula gives

On a machine without a GPU they run in Triton's interpreter, in `float32`. It must be chosen before Triton is imported, so blocks are computed in a process of
their own.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from mednext_v2.network import fused, kernels
from mednext_v2.network.blocks import DownBlock, MedNeXtBlock, UpBlock
from mednext_v2.network.fused import use_fused
from mednext_v2.network.scaling import PRESETS, estimate

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CASES = {  # A block, and sides that no tile divides; norms of a few voxels would make the gradients before them a difference of equals
    "same": (MedNeXtBlock, dict(channels=16, ratio=2), (3, 2, 2)),
    "wider": (MedNeXtBlock, dict(channels=16, out_channels=32, ratio=3), (3, 2, 2)),
    "thin": (MedNeXtBlock, dict(channels=16, ratio=2, kernel=(1, 3, 3)), (3, 2, 2)),
    "down": (DownBlock, dict(channels=16, out_channels=32), (5, 4, 3)),
    "up": (UpBlock, dict(channels=32, out_channels=16), (3, 2, 2)),
}


def block_and_input(case: str, grn: str | None, device="cpu", scale=1):
    "None of its parameters is at its start"
    torch.manual_seed(0)
    kind, options, sides = CASES[case]
    block = kind(**options, grn=grn)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block.to(device), torch.randn(2, options["channels"], *(scale * side for side in sides), device=device)


def results(block, x) -> list[torch.Tensor]:
    "Output, and gradients of the input and of all parameters but the one that has none"
    x = x.clone().requires_grad_()
    y = block(x)
    parameters = [parameter for name, parameter in block.named_parameters() if name != "conv1.bias"]
    return [y.detach(), *torch.autograd.grad(y.double().square().mean(), [x, *parameters])]


def relative(found, exact) -> list[float]:
    "Norms of what is wrong, over those of what is right"
    return [float((a.double() - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(found, exact)]


def errors(case: str, grn: str | None) -> list[float]:
    "Of kernels, relative to the formula in `float64`"
    block, x = block_and_input(case, grn)
    exact = results(use_fused(block.double(), False), x.double())
    use_fused(block.float())
    fused.BACKENDS["cpu"] = lambda block, x: kernels.run_block(block, fused.channels_last(x))
    return relative(results(block, x), exact)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("case, grn", [("same", "mean"), ("thin", "mean"), ("wider", "sum"), ("down", "mean"), ("up", "mean"), ("same", None)])
def test_interpreted_kernels_give_what_the_formula_gives(case, grn):
    here = os.path.dirname(os.path.abspath(__file__))
    script = f"import json, sys; sys.path.insert(0, {here!r}); import test_kernels; print(json.dumps(test_kernels.errors({case!r}, {grn!r})))"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 9 and max(found) < 1e-5


@gpu
@pytest.mark.parametrize("grn", ["mean", "sum", None])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_are_as_exact_as_the_plain_form(case, grn, dtype):
    block, x = block_and_input(case, grn, "cuda", scale=4)
    exact = results(use_fused(block.double(), False), x.double())
    block.float()

    def off(on):
        with torch.autocast("cuda", dtype):
            return relative(results(use_fused(block, on), x), exact)

    for ours, plain in zip(off(True), off(False)):
        assert ours < max(1.5 * plain, 2 * torch.finfo(dtype).eps)


@gpu
def test_a_step_gives_the_same_numbers_every_time():
    block, x = MedNeXtBlock(32).cuda(), torch.randn(1, 32, 40, 40, 40, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        first, second = results(block, x), results(block, x)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@gpu
def test_blocks_without_kernels_keep_the_plain_form():
    for block, cast in ((MedNeXtBlock(24), True), (MedNeXtBlock(32, kernel=5), True), (DownBlock(32, stride=(1, 2, 2)), True), (MedNeXtBlock(32), False)):
        block, x = block.cuda(), torch.randn(1, block.conv1.in_channels, 6, 5, 4, device="cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=cast):
            assert kernels.triton_block(block, x) is None
            block(x)


@gpu
@pytest.mark.parametrize("width, side, grad_checkpointing", [(16, 96, "none"), (32, 64, "none"), (32, 128, "none"), (32, 128, "block")])
def test_the_estimate_of_a_step_is_within_15_percent(width, side, grad_checkpointing):
    from mednext_v2.network.mednext import MedNeXt

    arch = replace(PRESETS["base"], width=width)
    promised = estimate(arch, (side,) * 3, 1, "bf16", grad_checkpointing, deep_supervision=True, fused="cuda")
    model, x = MedNeXt(arch, 1, 3, True, grad_checkpointing).cuda(), torch.randn(1, 1, *[side] * 3, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            outputs = model(x)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        optimizer.step()
        optimizer.zero_grad()
    found = torch.cuda.max_memory_allocated()
    assert promised.total_bytes == pytest.approx(found, rel=0.15)


def test_kernels_lower_the_estimate_where_they_fit_alone():
    patch, options = (128,) * 3, dict(deep_supervision=True)
    plain, ours = (estimate(PRESETS["base"], patch, 1, "bf16", fused=form, **options) for form in (None, "cuda"))
    assert ours.total_bytes < plain.total_bytes / 3
    exact = [estimate(PRESETS["base"], patch, 1, "fp32", fused=form, **options) for form in (None, "cuda")]
    assert exact[0] == exact[1]
    with pytest.raises(ValueError, match="fused must be cpu, cuda or None"):
        estimate(PRESETS["base"], patch, fused=True)


def test_kernels_are_not_offered_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not kernels.kernels_run_on("cuda") and not kernels.kernels_run_on("cpu")
    assert [kernels.fused_form(device) for device in ("cpu", "cuda", "meta")] == ["cpu", None, None]


def test_a_backend_may_leave_a_block_to_its_plain_form(monkeypatch):
    block, x = MedNeXtBlock(4), torch.randn(1, 4, 4, 4, 4)
    monkeypatch.setitem(fused.BACKENDS, "cpu", lambda block, x: None)
    assert torch.equal(block(x), use_fused(block, False)(x))


def second_order(block, x) -> list[torch.Tensor]:
    "Gradients of a gradient penalty"
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(block(x).float().square().sum(), x, create_graph=True)
    parameters = [parameter for name, parameter in block.named_parameters() if name != "conv1.bias"]
    found = torch.autograd.grad(slope.float().square().sum(), [x, *parameters], allow_unused=True)
    return [slope.detach(), *(value for value in found if value is not None)]


@gpu
@pytest.mark.parametrize("case, grn", [("same", "mean"), ("thin", "mean"), ("wider", "sum"), ("down", "mean"), ("up", "mean"), ("same", None)])
def test_second_derivatives_take_the_plain_form(case, grn):
    block, x = block_and_input(case, grn, "cuda", scale=4)
    exact = second_order(use_fused(block.double(), False), x.double())
    use_fused(block.float())
    with torch.autocast("cuda", torch.bfloat16):
        found = second_order(block, x)
    assert max(relative(found, exact)) < 0.1


@gpu
def test_kernels_are_not_asked_for_classes_and_transforms(monkeypatch):
    monkeypatch.setitem(fused.BACKENDS, "cuda", lambda *_: pytest.fail("the kernels were chosen"))
    block, x = block_and_input("same", "mean", "cuda")
    own = type("Own", (torch.Tensor,), {})
    with torch.autocast("cuda", torch.bfloat16):
        assert type(block(x.as_subclass(own))) is own
        torch.func.vmap(lambda one: block(one[None])[0])(x)
