"The fused block gives what the formula gives, under everything that training does to it"

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from mednext_v2.network import fused
from mednext_v2.network.blocks import DownBlock, MedNeXtBlock, UpBlock
from mednext_v2.network.fused import can_fuse, pointwise, use_fused
from mednext_v2.network.mednext import Arch, MedNeXt

ARCH = {"width": 4, "depths": (1, 1, 1), "ratios": (2, 3, 2)}
FLAT = {"strides": ((1, 2, 2),), "kernels": ((1, 3, 3), (3, 3, 5))}  # Thick slices


def random_network(grn="mean", flat=False, **options):
    "A small network none of whose parameters is at its start"
    torch.manual_seed(0)
    model = MedNeXt(Arch(**ARCH | (FLAT if flat else {}), grn=grn), 1, 2, **options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def run(model, x):
    "Outputs, and gradients of parameters and input, of one scalar"
    model.zero_grad()
    x = x.clone().requires_grad_()
    found = model(x)
    outputs = found if isinstance(found, list) else [found]
    sum((output.double().square().mean() for output in outputs), torch.zeros(())).backward()
    return [output.detach() for output in outputs], [x.grad, *(p.grad.clone() for p in model.parameters())]


def error(found, expected):
    "Largest difference, relative to the largest value"
    pairs = zip(found, expected)
    return max(((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-9)).item() for a, b in pairs)


@pytest.mark.parametrize("grad_checkpointing", ["none", "expansion", "block"])
@pytest.mark.parametrize("grn, flat", [("mean", False), ("sum", False), (None, False), ("mean", True), (None, True)])
def test_network_equals_the_formula_in_float64(grn, flat, grad_checkpointing):
    model = random_network(grn, flat, deep_supervision=True, grad_checkpointing=grad_checkpointing)
    x = torch.randn(2, 1, 3 if flat else 16, 12, 16)
    assert all(can_fuse(block, torch.zeros(1, block.conv1.in_channels, 2, 2, 2)) for block in model.modules() if isinstance(block, MedNeXtBlock))
    expected = run(use_fused(copy.deepcopy(model).double(), on=False), x.double())
    found = run(use_fused(model), x)
    assert error(found[0], expected[0]) < 1e-5
    # The biases before a norm have no gradient but rounding: compare with the largest of all
    most = max(value.abs().max() for value in expected[1])
    assert all((a.double() - b).abs().max() <= 1e-5 * max(b.abs().max(), 1e-2 * most) for a, b in zip(*(found[1], expected[1])))


@pytest.mark.parametrize("cls", [MedNeXtBlock, DownBlock, UpBlock])
@pytest.mark.parametrize("kernel, stride", [(3, None), (5, None), ((1, 3, 3), (1, 2, 2)), ((3, 5, 1), (2, 2, 1)), ((1, 1, 3), (1, 1, 2))])
def test_block_equals_in_double_precision(cls, kernel, stride):
    block = cls(3, 4 if cls is not MedNeXtBlock else None, ratio=2, kernel=kernel, stride=None if cls is MedNeXtBlock else stride).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64)
    expected = run(use_fused(block, on=False), x)
    found = run(use_fused(block), x)
    assert error(found[0], expected[0]) < 1e-10
    most = max(value.abs().max() for value in expected[1])
    assert all((a - b).abs().max() < 1e-10 * most for a, b in zip(found[1], expected[1]))


def test_numerical_gradients_of_a_block():
    block = use_fused(MedNeXtBlock(2, ratio=2, grn="sum")).double()
    nn.init.normal_(block.grn_gamma)
    x = torch.randn(1, 2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert can_fuse(block, x) and torch.autograd.gradcheck(block, (x,))


def test_state_dict_is_unchanged():
    model = random_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = use_fused(model).state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.fused for module in use_fused(model, on=False).modules() if hasattr(module, "fused"))


def test_autocast_gives_its_dtype_and_finite_gradients():
    model = random_network()
    x = torch.randn(1, 1, 16, 16, 16)
    expected = run(use_fused(copy.deepcopy(model).double(), on=False), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(use_fused(model, on=False), x)
        found = run(use_fused(model), x)
    assert found[0][0].dtype == plain[0][0].dtype == torch.bfloat16
    assert all(value.isfinite().all() for value in found[1])
    assert error(found[0], expected[0]) <= 1.5 * error(plain[0], expected[0])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv3d(3, 5, 1),
        nn.Conv3d(3, 5, 1, stride=2),
        nn.ConvTranspose3d(3, 5, 1),
        nn.ConvTranspose3d(3, 5, 1, stride=2),
        nn.Conv3d(3, 5, 1, bias=False),
        nn.Conv3d(3, 6, 1, groups=3),
        nn.Conv3d(3, 5, 3, padding=1),
        nn.ConvTranspose3d(3, 5, 1, stride=3),
        nn.Conv3d(3, 5, 1, stride=(1, 2, 1)),
        nn.Conv3d(3, 5, 1, padding=1),
        nn.Identity(),
    ],
)
def test_pointwise_is_the_convolution(conv):
    conv, x = conv.double(), torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    expected, found = run(conv, x), run(network_of(conv), x)
    assert all(torch.allclose(a, b) for a, b in zip(found[0] + found[1], expected[0] + expected[1]))
    seen = []
    conv.register_forward_hook(lambda module, args, out: seen.append(out))
    pointwise(conv, x)
    assert len(seen) == 1


def network_of(conv):
    "A network that is `pointwise` of a convolution"

    class Pointwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return pointwise(self.conv, x)

    return Pointwise()


def test_gradients_stay_channels_last_and_inference_is_the_same():
    model, seen = random_network(), []
    for module in model.modules():
        if isinstance(module, MedNeXtBlock):
            module.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    x = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        expected = model(x).clone()
    model(x).square().mean().backward()
    assert seen and all(grad.is_contiguous(memory_format=torch.channels_last_3d) for grad in seen)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("grn", ["mean", "sum", None])
@pytest.mark.parametrize("cls", [MedNeXtBlock, DownBlock, UpBlock])
def test_large_samples_and_many_portions_are_the_same(cls, grn, monkeypatch):
    "Rows come in portions, and what is held for small samples is worked out anew for large ones"
    block = cls(3, 4 if cls is not MedNeXtBlock else None, ratio=2, grn=grn)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 8, 7, 6)
    expected = run(use_fused(copy.deepcopy(block).double(), on=False), x.double())
    most = max(value.abs().max() for value in expected[1])
    for held, kept in ((fused.MAX_HELD, fused.MAX_KEPT), (fused.MAX_HELD, 0), (0, 0)):
        monkeypatch.setattr(fused, "MAX_HELD", held)
        monkeypatch.setattr(fused, "MAX_KEPT", kept)
        for portion in (fused.CHUNK_VALUES, 6 * 64):
            monkeypatch.setattr(fused, "CHUNK_VALUES", portion)
            found = run(use_fused(block), x)
            assert error(found[0], expected[0]) < 1e-5
            assert all((a.double() - b).abs().max() < 1e-5 * most for a, b in zip(found[1], expected[1]))


@pytest.mark.parametrize("scale, shift", [(1, 0), (1e-3, 10), (1, 1e4), (0, 3)])
def test_moments_whatever_the_rows_that_are_looked_at_first(scale, shift):
    torch.manual_seed(0)
    x = scale * torch.randn(3001, 4, dtype=torch.float64) + shift
    x[:: 3001 // 256 | 1, 1] += 1e3 * scale  # All of the first, and nothing else
    x[1:, 2] = shift
    mean, rstd = fused.moments(x.float(), 1e-5)
    exact = x.float().double()
    assert torch.allclose(mean.double(), exact.mean(0), rtol=1e-6, atol=1e-6 * scale)
    # A sum of squares keeps what float32 keeps of a value less the mean
    expected = (exact.var(0, correction=0) + 1e-5).rsqrt()
    assert torch.allclose(rstd.double(), expected, rtol=1e-4 if shift == 1e4 else 1e-5)


@pytest.mark.parametrize("onednn", [fused.ONEDNN, False])
@pytest.mark.parametrize("rows, columns, out", [(1, 1, 1), (4000, 40, 50), (4000, 8, 50), (1000, 600, 3)])
def test_products_in_every_shape_and_without_onednn(rows, columns, out, onednn, monkeypatch):
    monkeypatch.setattr(fused, "ONEDNN", onednn)
    a, weight, bias = torch.randn(rows, columns), torch.randn(out, columns), torch.randn(out)
    for w in (weight, weight.t().contiguous().t()):
        expected = a.double() @ w.double().t() + bias
        assert error([fused.linear(a, w, bias)], [expected]) < 1e-6
        assert error([fused.linear(a, w, bias, gelu=True)], [nn.functional.gelu(expected)]) < 1e-6
    assert error([fused.transposed_product(a, a @ weight.t())], [a.double().t() @ (a @ weight.t()).double()]) < 1e-5


@pytest.mark.parametrize("grn", ["mean", "sum"])
@pytest.mark.parametrize("cls", [MedNeXtBlock, DownBlock, UpBlock])
def test_what_is_held_changes_nothing_and_stays_below_its_limit(cls, grn, monkeypatch):
    "Around the limit of each sample, with portions: nothing is held, the expanded rows, those and their activation"
    block = cls(8, 8 if cls is not MedNeXtBlock else None, ratio=4, grn=grn)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x, gelu, held, grown = torch.randn(2, 8, 12, 12, 12), [], [], fused.grn_gradients
    expanded = 32 * {MedNeXtBlock: 12, DownBlock: 6, UpBlock: 23}[cls] ** 3
    monkeypatch.setattr(fused, "CHUNK_VALUES", 1000 * 32)
    monkeypatch.setattr(F, "gelu", lambda values: gelu.append(values.numel()) or torch.ops.aten.gelu(values))

    def watched(*arguments):
        found = grown(*arguments)
        held.append(sum(value.numel() for chunk in found.held for value in chunk[1:] if value is not None))
        return found

    monkeypatch.setattr(fused, "grn_gradients", watched)
    seen = {}
    for limit in (expanded - 1, expanded, 2 * expanded - 1, 2 * expanded):
        monkeypatch.setattr(fused, "MAX_HELD", limit)
        gelu.clear(), held.clear()
        outputs, gradients = run(block, x)
        seen[limit] = outputs + gradients
        assert held == [expanded * (limit >= expanded) + expanded * (limit >= 2 * expanded)] * 2 and max(held) <= limit
        assert sum(gelu) == 2 * expanded * (1 if limit in (expanded - 1, 2 * expanded) else 2)  # Where nothing is held, the first is a part of the product
    anew, alone, *others = seen.values()
    assert all(torch.equal(a, b) for other in others for a, b in zip(alone, other))  # To the bit
    assert error(anew, [value.double() for value in alone]) < 1e-5  # Here GELU is a part of the product


def test_a_block_keeps_its_input_alone(monkeypatch):
    monkeypatch.setattr(fused, "MAX_KEPT", 0)
    model, kept = random_network(), {}
    x = torch.randn(1, 1, 32, 32, 32)

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes if not isinstance(tensor, nn.Parameter) else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    finest = ARCH["width"] * 32**3 * 4
    # Two blocks, the way down and the head at the finest level; the stem has one channel, and other levels are an eighth and less
    assert 4 * finest < sum(kept.values()) < 5 * finest


@pytest.mark.parametrize("part", ["conv1", "norm", "conv2", "conv3", "res_conv"])
def test_hooks_on_a_part_see_their_tensors(part):
    block, seen = use_fused(DownBlock(4, 8)), []
    x = torch.randn(1, 4, 8, 8, 8)
    handle = block.get_submodule(part).register_forward_hook(lambda module, args, out: seen.append(out))
    block(x)
    assert len(seen) == 1 and not can_fuse(block, x)
    handle.remove()
    assert can_fuse(block, x)


def test_replaced_parts_are_used():
    block = use_fused(MedNeXtBlock(4))
    block.norm = nn.Identity()
    x = torch.randn(1, 4, 8, 8, 8)
    assert not can_fuse(block, x)
    assert torch.equal(block(x), use_fused(block, on=False)(x))


def test_exporters_and_compilers_see_the_plain_form():
    block, x = use_fused(MedNeXtBlock(4)).eval(), torch.randn(1, 4, 8, 8, 8)
    expected = use_fused(block, on=False)(x)
    use_fused(block)
    exported = torch.export.export(block, (x,))
    assert not any("Block" in str(node.target) for node in exported.graph.nodes)
    for other in (exported.module(), torch.jit.trace(block, x), torch.compile(block, backend="eager", fullgraph=True)):
        assert torch.allclose(other(x), expected, atol=1e-5)


def parallel(rank, path, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(use_fused(random_network()))
    torch.manual_seed(1)
    x = torch.randn(2, 1, 8, 8, 8)
    model(x[rank : rank + 1]).square().mean().backward()
    if rank == 0:
        results.put([parameter.grad.numpy() for parameter in model.parameters()])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_average_their_gradients(tmp_path):
    results = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(parallel, (str(tmp_path / "store"), results), nprocs=2, join=False)
    found = results.get()
    while not context.join():
        pass
    torch.manual_seed(1)
    model = use_fused(random_network(), on=False)
    torch.manual_seed(1)
    x = torch.randn(2, 1, 8, 8, 8)
    model(x).square().mean().backward()
    most = max(parameter.grad.abs().max() for parameter in model.parameters())
    for value, parameter in zip(found, model.parameters()):
        assert (torch.from_numpy(value) - parameter.grad).abs().max() < 1e-5 * most


@pytest.mark.parametrize("grad_checkpointing", ["none", "expansion", "block"])
def test_a_compiled_network_is_one_graph(grad_checkpointing):
    from torch import _dynamo

    _dynamo.reset()
    found = _dynamo.explain(random_network(deep_supervision=True, grad_checkpointing=grad_checkpointing))(torch.randn(1, 1, 16, 16, 16))
    assert found.graph_count == 1 and found.graph_break_count == 0


def plain(model):
    return use_fused(copy.deepcopy(model), on=False)


def refuse(*_):
    raise AssertionError("the fused form was chosen")


def meta_batch(count=2, channels=1, **loader):
    "A batch as MONAI's loader gives it"
    from monai.data import DataLoader, Dataset, MetaTensor

    def case(i):
        volume = torch.randn(channels, 8, 8, 12, generator=torch.Generator().manual_seed(i))
        affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
        return {"image": MetaTensor(volume, affine=affine, meta={"case": i}), "label": MetaTensor(volume[:1] > 0)}

    return next(iter(DataLoader(Dataset([case(i) for i in range(count)]), batch_size=count, **loader)))


def meta_results(model, batch, autocast):
    from monai.data import MetaTensor

    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        y = model(batch)
    y.double().square().mean().backward()
    kept = (y.affine, y.meta["case"]) if isinstance(y, MetaTensor) else None
    return type(y), y.dtype, kept, y.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("grad_checkpointing", ["none", "expansion", "block"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("grn", ["mean", "sum"])
def test_metatensors_get_what_plain_operations_give(grn, mode, autocast, grad_checkpointing):
    model = random_network(grn, grad_checkpointing=grad_checkpointing).train(mode == "train")
    batch = meta_batch()["image"]
    found, expected = meta_results(model, batch, autocast), meta_results(plain(model), batch, autocast)
    assert found[0] is expected[0] is type(batch) and found[1] == expected[1]
    torch.testing.assert_close(found[2][0], batch.affine)
    assert found[2][1].tolist() == expected[2][1].tolist() == [0, 1]
    for a, b in zip((found[3], *found[4]), (expected[3], *expected[4])):
        torch.testing.assert_close(a.as_tensor() if hasattr(a, "as_tensor") else a, b.as_tensor() if hasattr(b, "as_tensor") else b)


def test_two_steps_with_a_loader_of_monai_equal_those_with_tensors():
    from mednext_v2.training.losses import deep_supervision_loss

    states = []
    for meta in (True, False):
        model = use_fused(random_network(deep_supervision=True), on=meta)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            batch = meta_batch()
            image, label = (batch[name] if meta else batch[name].as_tensor() for name in ("image", "label"))
            optimizer.zero_grad()
            deep_supervision_loss(model(image), label.long()).backward()
            optimizer.step()
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grn", ["mean", "sum", None])
def test_windows_of_monai_slide_over_a_metatensor(grn):
    from monai.inferers import SlidingWindowInferer

    model, batch = random_network(grn).eval(), meta_batch(1)["image"]
    inferer = SlidingWindowInferer((8, 8, 8), overlap=0.5)
    with torch.no_grad():
        found, expected = inferer(batch, model), inferer(batch.as_tensor(), plain(model))
    assert type(found) is type(batch)
    torch.testing.assert_close(found.as_tensor(), expected, rtol=1e-4, atol=1e-4)


class Own(torch.Tensor):
    "A class that changes nothing"


def second_order(model, x):
    "Gradients of a gradient penalty"
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    penalty = slope.norm()
    parameters = [parameter for name, parameter in model.named_parameters() if name != "out_0.conv_out.bias"]
    return [slope.detach(), penalty.detach(), *torch.autograd.grad(penalty, [x, *parameters], allow_unused=True)]


@pytest.mark.parametrize("grad_checkpointing", ["none", "block"])
@pytest.mark.parametrize("grn", ["mean", "sum", None])
def test_gradient_penalties_equal_those_of_the_plain_form(grn, grad_checkpointing):
    model = random_network(grn, grad_checkpointing=grad_checkpointing).double()
    x = torch.randn(2, 1, 8, 8, 8, dtype=torch.float64)
    found, expected = second_order(model, x), second_order(plain(model), x)
    for a, b in zip(found, expected):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(expected[1]))


def test_one_block_used_twice_has_its_second_derivative_once():
    "Its second input was computed with the same weights"
    block = MedNeXtBlock(2, ratio=2).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)

    def penalty(block):
        x = torch.arange(54, dtype=torch.float64).view(1, 2, 3, 3, 3).sin().requires_grad_()
        weight = block.conv2.weight
        (slope,) = torch.autograd.grad(block(block(x)).square().sum(), weight, create_graph=True)
        return slope.detach(), *torch.autograd.grad(slope.square().sum(), [x, weight])

    torch.testing.assert_close(penalty(block), penalty(plain(block)))


def transforms(model, x):
    "What each transform of PyTorch gives"
    from torch.func import functional_call, grad, jvp, vmap

    state, tangent = dict(model.named_parameters()), torch.ones_like(x)

    def loss(state, x):
        return functional_call(model, state, (x,)).square().mean()

    stacked = {name: torch.stack([value, 2 * value]) for name, value in state.items()}
    yield "grad", lambda: grad(loss)(state, x)
    yield "vmap", lambda: vmap(lambda one: model(one[None])[0])(x)
    yield "ensemble", lambda: vmap(lambda state: functional_call(model, state, (x,)))(stacked)
    yield "per-sample grad", lambda: vmap(grad(loss), in_dims=(None, 0))(state, x[:, None])
    yield "jvp", lambda: jvp(model, (x,), (tangent,))
    yield "functional_call", lambda: functional_call(model, state, (x,))

    def forward_mode():
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(model(torch.autograd.forward_ad.make_dual(x, tangent)))[:]

    yield "forward mode", forward_mode
    yield "double backward", lambda: torch.autograd.functional.jvp(model, x, tangent)[1]
    yield "subclass", lambda: model(x.as_subclass(Own)).as_subclass(torch.Tensor)


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("grad_checkpointing", ["none", "block"])
def test_transforms_give_what_the_plain_form_gives(number, grad_checkpointing):
    model = random_network(grad_checkpointing=grad_checkpointing).double()
    x = torch.randn(2, 1, 8, 8, 8, dtype=torch.float64)
    (name, found), (_, expected) = list(transforms(model, x))[number], list(transforms(plain(random_network().double()), x))[number]
    torch.testing.assert_close(found(), expected(), msg=lambda text: f"{name}: {text}")


def test_batched_gradients_are_refused_in_words():
    model = random_network()
    x = torch.randn(1, 1, 8, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"batched gradients .*call use_fused\(model, False\)"):
        torch.autograd.functional.jacobian(lambda x: model(x)[..., 0, 0, 0], x, vectorize=True)
    assert torch.autograd.functional.jacobian(lambda x: plain(model)(x)[..., 0, 0, 0], x, vectorize=True).any()


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 6, 8])
def test_no_backend_is_asked_in_a_transform(number, monkeypatch):
    monkeypatch.setitem(fused.BACKENDS, "cpu", refuse)
    model, x = random_network(), torch.randn(2, 1, 8, 8, 8)
    list(transforms(model, x))[number][1]()
    with pytest.raises(AssertionError, match="the fused form was chosen"):
        model(x)
    with pytest.raises(AssertionError, match="the fused form was chosen"):  # Nor is it forgotten afterwards
        model.eval()(x)


def test_weights_of_a_class_of_their_own_are_left_to_it():
    model = random_network()
    block = next(module for module in model.modules() if isinstance(module, MedNeXtBlock))
    assert can_fuse(block, torch.zeros(1, 4, 8, 8, 8))
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach().as_subclass(Own))
    assert not can_fuse(block, torch.zeros(1, 4, 8, 8, 8))
