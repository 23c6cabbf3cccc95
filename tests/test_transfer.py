"Transfer that says what it did: channels, classes, kernels, frozen parts, rates layer by layer"

from types import SimpleNamespace

import pytest
import torch

from mednext_v2.models.card import Card, save_model
from mednext_v2.models.registry import create, parts
from mednext_v2.models.transfer import (
    Start,
    adapt_stem,
    class_channels,
    freeze,
    grow_kernels,
    identity_grn,
    layer_numbers,
    learning_rate_scales,
    match_classes,
    transfer,
)
from mednext_v2.network.fused import use_fused
from mednext_v2.training.run import load_start
from model_toys import UNET_CARD

NETWORKS = {"mednext_v2_tiny": dict(width=2), "unet": dict(filters=(4, 8, 8))}
AB, ABC = {"background": 0, "a": 1, "b": 2}, {"background": 0, "a": 1, "b": 2, "c": 3}
ONE_EACH = dict(width=4, depths=(1,) * 9, ratios=(2,) * 9)


def tiny(in_channels=1, num_classes=3, seed=0, name="mednext_v2_tiny", deep_supervision=False, **overrides):
    torch.manual_seed(seed)
    return create(name, in_channels, num_classes, deep_supervision, **NETWORKS[name] | overrides)


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (3, 1), (2, 4), (4, 2)])
def test_adapted_stem_answers_a_replicated_image_as_before(old, new):
    weight = torch.randn(5, old, 3, 3, 3, dtype=torch.float64)
    image = torch.randn(2, 1, 6, 6, 6, dtype=torch.float64)
    before, after = (torch.nn.functional.conv3d(image.expand(-1, n, -1, -1, -1), w) for n, w in ((old, weight), (new, adapt_stem(weight, new))))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("name", NETWORKS)
def test_transferred_network_answers_as_before(name):
    "Classes in another order, another number of channels: known classes keep their scores"
    source, target = tiny(1, 4, name=name), tiny(2, 3, seed=1, name=name)
    report = transfer(target, source.state_dict(), {"background": 0, "c": 1, "new": 2}, ABC)
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        before, after = source(image), target(image.expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(after[:, [0, 1]], before[:, [0, 3]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[:, 2], before[:, 2], atol=1e-3)
    assert report.coverage == 1 and report.missing == () == report.skipped
    assert any("1 -> 2" in note for note in report.notes.values())
    assert report.classes == {"background": "background", "c": "c", "new": ""}


@pytest.mark.parametrize("name", NETWORKS)
def test_new_classes_keep_their_fresh_rows(name):
    source, target, fresh = tiny(name=name), tiny(seed=1, name=name), tiny(seed=1, name=name)
    transfer(target, source.state_dict(), {"background": 0, "x": 1, "b": 2}, AB)
    part_of = parts(source)
    with torch.no_grad():
        for model in (target, fresh, source):
            for parameter, value in model.named_parameters():
                if part_of[parameter] != "heads":
                    value.fill_(0.01)
        image = torch.randn(1, 1, 32, 32, 32)
        scores, new, old = target(image), fresh(image), source(image)
    torch.testing.assert_close(scores[:, 1], new[:, 1])
    torch.testing.assert_close(scores[:, [0, 2]], old[:, [0, 2]])


def test_two_classes_may_start_from_one():
    source, target = tiny(), tiny(seed=1)
    report = transfer(target, source.state_dict(), {"background": 0, "left": 1, "right": 2}, AB, {"left": "b", "right": "b"})
    bias, given = target.out_0.conv_out.bias.detach(), source.out_0.conv_out.bias.detach()
    assert torch.equal(bias, given[[0, 2, 2]]) and report.classes["left"] == report.classes["right"] == "b"


def test_square_head_is_read_along_the_right_axis():
    "As many channels as classes: only the kind of layer tells which axis counts the classes"
    source, target = (create("mednext_v2_tiny", 1, 4, width=4) for _ in range(2))
    before = source.state_dict()["out_0.conv_out.weight"]
    assert before.shape[:2] == (4, 4)
    transfer(target, source.state_dict(), {"background": 0, "c": 1, "b": 2, "a": 3}, ABC)
    assert torch.equal(target.out_0.conv_out.weight.detach(), before[:, [0, 3, 2, 1]])


def test_same_classes_load_everything():
    source, target = tiny(), tiny(seed=1)
    report = transfer(target, source.state_dict(), AB, dict(reversed(AB.items())))
    assert set(report.loaded) == set(source.state_dict()) and report.adapted == () and report.coverage == 1
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("options", [{}, dict(classes=AB, source_classes=AB, heads="fresh"), dict(classes=AB)])
def test_heads_stay_fresh(options):
    source, target = tiny(), tiny(seed=1)
    head = target.out_0.conv_out.weight.detach().clone()
    report = transfer(target, source.state_dict(), **options)
    assert torch.equal(target.out_0.conv_out.weight.detach(), head)
    assert report.missing == report.skipped == ("out_0.conv_out.weight", "out_0.conv_out.bias")
    assert 0.9 < report.coverage < 1
    assert set(report.classes.values()) <= {""}


def test_scores_of_regions_do_not_become_scores_of_labels():
    regions = {"whole": 0, "a": 1, "core": 2}
    source, target = tiny(), tiny(seed=1)
    report = transfer(target, source.state_dict(), AB, regions)
    assert report.missing and set(report.classes.values()) == {""}
    report = transfer(target, source.state_dict(), {"core": 0, "whole": 1, "new": 2}, regions)
    assert torch.equal(target.out_0.conv_out.bias[:2], source.out_0.conv_out.bias[[2, 0]]) and not report.missing


def test_encoder_alone():
    source, target = tiny(seed=0), tiny(seed=1)
    with torch.no_grad():
        for value in source.parameters():
            value.add_(1)  # So that nothing is equal by chance
    before = weights_of(target)
    report = transfer(target, source.state_dict(), AB, AB, scope="encoder")
    for name, part in parts(target).items():
        wanted = source.state_dict()[name] if part in ("stem", "encoder") else before[name]
        assert torch.equal(target.state_dict()[name], wanted), name
    assert set(report.missing) == {name for name, part in parts(target).items() if part in ("decoder", "heads")}


def test_auxiliary_heads_come_and_go():
    plain, deep = tiny(), tiny(deep_supervision=True)
    report = transfer(tiny(seed=1, deep_supervision=True), plain.state_dict(), AB, AB)
    assert len(report.missing) == 8 and report.skipped == ()
    report = transfer(tiny(seed=1), deep.state_dict(), AB, AB)
    assert len(report.skipped) == 8 and report.missing == ()


@pytest.mark.parametrize("fault", ["absent", "shape", "stem"])
def test_body_that_does_not_fit_changes_nothing(fault):
    target, state = tiny(seed=1), dict(tiny().state_dict())
    name = "stem.weight" if fault == "stem" else "bottleneck.0.conv2.weight"
    state[name] = torch.zeros(3, 1, 1, 1, 1)
    if fault == "absent":
        del state[name]
    before = weights_of(target)
    found = "none" if fault == "absent" else r"\(3, 1, 1, 1, 1\)"
    with pytest.raises(ValueError, match=rf"1 tensors of the body.*{name}: wanted \(.*\), given {found}"):
        transfer(target, state)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    report = transfer(target, state, allow=[name])
    assert name in report.missing and torch.equal(target.state_dict()[name], before[name])


def test_classes_of_other_heads_are_refused():
    for classes, source in ((AB, {"background": 0, "a": 1}), ({"background": 0, "a": 1}, AB)):
        with pytest.raises(ValueError, match="has 3 output channels, but 2 classes: background, a"):
            transfer(tiny(), tiny(seed=1).state_dict(), classes, source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads="by_name"), "heads must be by-name or fresh, got 'by_name'"),
        (dict(scope="body"), "scope must be all or encoder, got 'body'"),
        (dict(convert=["upkern"]), "no conversion upkern; there are: grn, kernels"),
        (dict(mapping={"a": "z"}), "the source has no class 'z'; it has: background, a, b"),
        (dict(mapping={"z": "a"}), "the model has no class 'z'; it has: background, a, b"),
    ],
)
def test_unknown_choices_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        transfer(tiny(), tiny(seed=1).state_dict(), AB, AB, **options)


def test_surplus_of_the_source_is_reported():
    state = dict(tiny().state_dict()) | {"dummy_tensor": torch.ones(1)}
    report = transfer(tiny(seed=1), state)
    assert "dummy_tensor" in report.skipped and report.shapes["dummy_tensor"] == (None, (1,))


def test_half_precision_weights_are_taken():
    source = {name: value.half() for name, value in tiny().state_dict().items()}
    target = tiny(seed=1)
    transfer(target, source, {"background": 0, "b": 1, "x": 2}, AB)
    assert target.stem.weight.dtype == torch.float32
    torch.testing.assert_close(target.stem.weight, tiny().stem.weight, rtol=1e-3, atol=1e-3)


def test_model_folder_brings_its_classes(tmp_path):
    card = Card(
        "mednext_v2_tiny",
        {"width": 2},
        1,
        {"a": 1, "b": 2},
        {"a": "organ", "b": "organ"},
        "demo",
        "CT",
        (1.0,) * 3,
        (32,) * 3,
        {"schemes": ("zscore",), "nonzero": False},
        {},
    )
    source = tiny()
    save_model(tmp_path / "model", source, card)
    target = tiny(seed=1)
    report = transfer(target, tmp_path / "model", {"background": 0, "b": 1, "a": 2})
    assert torch.equal(target.out_0.conv_out.bias, source.out_0.conv_out.bias[[0, 2, 1]])
    assert report.coverage == 1 and class_channels(card) == AB


@pytest.mark.parametrize("door", ["transfer", "training"])
@pytest.mark.parametrize(
    ("options", "convert", "message"),
    [
        (dict(grn="sum"), (), "trained with grn='mean'; with grn='sum' its weights would compute something else: leave grn out$"),
        (dict(grn="sum"), ("grn",), "trained with grn='mean'; with grn='sum'"),
        (dict(grn=None), (), "trained with grn='mean'; with grn=None"),
        (dict(depths=(1,) * 9, strides=((1, 2, 2), 2, 2, 2)), (), None),  # Training adapts to other strides
        (dict(kernel=5), (), "trained with kernel=3; with kernel=5 .* name a conversion: `--convert`"),
        (dict(kernel=5), ("kernels",), None),
        (dict(grn="mean", grad_checkpointing="block"), (), None),
    ],
)
def test_a_start_that_would_compute_something_else_is_refused(tmp_path, options, convert, message, door):
    card = Card(**UNET_CARD | dict(backbone="mednext_v2_tiny", overrides={"width": 2}, labels={"a": 1, "b": 2}, groups={}))
    save_model(tmp_path / "model", tiny(), card)
    target, data = tiny(seed=1, **options), SimpleNamespace(class_channels=AB, sets={})
    before = weights_of(target)

    def begin():
        if door == "transfer":
            return transfer(target, tmp_path / "model", AB, convert=convert)
        return load_start(Start(str(tmp_path / "model"), convert=convert), target, data, tmp_path)

    if message is None:
        assert begin() is not None and not torch.equal(target.stem.weight, before["stem.weight"])
        return
    with pytest.raises(ValueError, match=message):
        begin()
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_v1_becomes_v2_without_a_change_of_its_scores():
    torch.manual_seed(0)
    old, new = create("mednext_v1_small", 1, 3, **ONE_EACH), create("mednext_v2_tiny", 1, 3, **ONE_EACH)
    for name, value in new.named_parameters():
        if "grn" in name:
            torch.nn.init.normal_(value)  # As if it had learnt something else before
    report = transfer(new, old.state_dict(), AB, AB, convert=["grn"])
    image = torch.randn(2, 1, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(new(image), old(image), rtol=1e-4, atol=1e-5)
        exact = [use_fused(network, False)(image) for network in (new, old)]
        torch.testing.assert_close(*exact, rtol=0, atol=0)
    assert report.coverage == 1 and {note for note in report.notes.values()} == {"GRN as identity"}
    with pytest.raises(ValueError, match="grn.* given none"):
        transfer(create("mednext_v2_tiny", 1, 3, **ONE_EACH), old.state_dict(), AB, AB)


def test_kernels_grow_as_upkern_does():
    "Written after nnunet_mednext.run.load_weights: trilinear, channels untouched, other tensors as they are"
    torch.manual_seed(0)
    small, large = (create("mednext_v2_tiny", 1, 3, **ONE_EACH, kernel=kernel) for kernel in (3, 5))
    grown, state = grow_kernels(small.state_dict(), large), small.state_dict()
    changed = [name for name in state if grown[name].shape != state[name].shape]
    assert changed and all(grown[name].shape == value.shape for name, value in large.state_dict().items())
    for name in changed:
        wanted = torch.nn.functional.interpolate(state[name], size=(5, 5, 5), mode="trilinear")
        assert torch.equal(grown[name], wanted) and state[name].shape[2:] == (3, 3, 3)
    assert transfer(large, state, AB, AB, convert=["kernels"]).coverage == 1
    assert grow_kernels(large.state_dict(), small)[changed[0]].shape[2:] == (5, 5, 5)  # Never shrinks


def test_identity_grn_leaves_what_is_there():
    state = tiny().state_dict()
    name = next(key for key in state if key.endswith("grn_gamma"))
    partial = {key: value for key, value in state.items() if key != name}
    filled = identity_grn(partial, tiny())
    assert filled.keys() == state.keys() and not filled[name].any()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("frozen", [["encoder"], ["stem", "encoder", "decoder"], ["heads"]])
def test_frozen_parts_keep_their_values_in_training(name, frozen):
    model = tiny(name=name)
    still = freeze(model, frozen)
    before = weights_of(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(1, 1, 32, 32, 32)).square().mean().backward()
    optimizer.step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert not moved & set(still) and {parts(model)[key] for key in moved} == set(parts(model).values()) - set(frozen)


def test_freezing_that_cannot_be_meant():
    with pytest.raises(ValueError, match="no part body; a network has: stem, encoder, decoder, heads"):
        freeze(tiny(), ["body"])
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze(tiny(), ["stem", "encoder", "decoder", "heads"])


@pytest.mark.parametrize("name", NETWORKS)
def test_rates_fall_from_the_heads_to_the_stem(name):
    model = tiny(name=name)
    numbers, scales = layer_numbers(model), learning_rate_scales(model, 0.5)
    assert scales.keys() == dict(model.named_parameters()).keys()
    by_part = {part: [numbers[n] for n in scales if parts(model)[n] == part] for part in set(parts(model).values())}
    assert set(by_part["stem"]) == {0} and len(set(by_part["heads"])) == 1
    assert max(by_part["stem"]) < min(by_part["encoder"]) <= max(by_part["encoder"]) < min(by_part["decoder"])
    assert sorted(set(numbers.values())) == list(range(max(numbers.values()) + 1))
    assert {scales[n] for n in scales if parts(model)[n] == "heads"} == {1.0}
    assert scales[next(n for n in numbers if numbers[n] == 1)] == 0.5 ** (max(numbers.values()) - 1)
    assert set(learning_rate_scales(model, 1).values()) == {1}


@pytest.mark.parametrize("decay", [0, -1, 1.5, float("nan")])
def test_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match="layer decay must be above 0"):
        learning_rate_scales(tiny(), decay)


def test_match_classes():
    assert match_classes(AB, None) == {} and match_classes(None, AB) == dict.fromkeys(AB, "")
    assert match_classes({"background": 0, "a": 2, "b": 1}, ABC) == {"background": "background", "a": "a", "b": "b", "c": ""}


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_of_deep_supervision_there_and_back_are_named(name):
    deep, plain = tiny(name=name, deep_supervision=True), tiny(seed=1, name=name)
    extra = set(deep.state_dict()) - set(plain.state_dict())
    there = transfer(plain, deep.state_dict(), AB, AB)
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain.eval()(image), deep.eval()(image))
    assert extra and set(there.skipped) == extra and there.missing == () and there.coverage == 1
    assert all(there.notes[key] == "deep supervision: a head that the model does not have, left out" for key in extra)
    other = tiny(seed=2, name=name, deep_supervision=True)
    back = transfer(other, plain.state_dict(), AB, AB)
    with torch.no_grad():
        assert torch.equal(plain(image), other.eval()(image))
    assert set(back.missing) == extra and back.skipped == ()
    assert all(key in str(back) and "fresh" in back.notes[key] for key in extra)
