"Model folders that can be trusted, and transfer that says what it did"

import dataclasses
import json

import pytest
import torch
from mednext_v2.backbones import BACKBONES, create
from mednext_v2.scaling import create_model
from mednext_v2.weights import (
    Card,
    LoadReport,
    adapt_stem,
    match_classes,
    read_card,
    read_state,
    save_model,
    transfer,
)

CARD = Card(
    backbone="mednext_v2_tiny",
    overrides={"width": 2, "depths": (1,) * 9},
    in_channels=1,
    labels={"liver": 1, "spleen": 2},
    groups={"liver": "organ", "spleen": "organ"},
    task="demo",
    modality="CT",
    spacing=(5.0, 5.0, 5.0),
    patch=(32, 32, 32),
    normalisation={"clip": (-100.0, 200.0)},
    recipe={"steps": 1, "patch": (32, 32, 32)},
)
NETWORKS = {"mednext_v2_tiny": dict(width=2), "unet": dict(filters=(4, 8, 8))}


def tiny(in_channels=1, num_classes=3, seed=0, name="mednext_v2_tiny", deep_supervision=False, **overrides):
    torch.manual_seed(seed)
    return create(name, in_channels, num_classes, deep_supervision, **NETWORKS[name] | overrides)


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "model", tiny(), CARD)
    return tmp_path / "model"


def test_round_trip_is_bit_for_bit(folder):
    state = read_state(folder)
    own = tiny().state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own)
    card = read_card(folder)
    assert dataclasses.replace(card, sha256="", version="") == CARD and len(card.sha256) == 64 and card.version


def test_saving_twice_gives_equal_bytes(folder, tmp_path):
    save_model(tmp_path / "again", tiny(), CARD)
    for name in ("model.safetensors", "card.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model"]


def test_saving_again_replaces_the_whole_folder(folder):
    (folder / "stale.txt").write_text("old")
    save_model(folder, tiny(seed=1), CARD)
    assert torch.equal(read_state(folder)["stem.weight"], tiny(seed=1).stem.weight)
    assert not (folder / "stale.txt").exists()


def test_tied_and_strided_tensors_are_saved(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias = torch.nn.Parameter(torch.arange(6.0)[::2])
    save_model(tmp_path / "m", model, CARD)
    state = read_state(tmp_path / "m")
    assert torch.equal(state["0.weight"], state["1.weight"]) and state["0.bias"].tolist() == [0, 2, 4]


@pytest.mark.parametrize("kept", [0, 4, 8, 500, 20_000, -1])
def test_truncated_weights_are_named(folder, kept):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:kept])
    with pytest.raises(ValueError, match=rf"is truncated \({len(data[:kept])} of \d+ bytes\)") as error:
        read_state(folder)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("where", [3, 60, -2])
def test_one_flipped_bit_is_named(folder, where):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[where] ^= 64
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is (altered|truncated).*card.json says"):
        read_state(folder)


def test_weights_of_another_kind_are_named(folder):
    path = folder / "model.safetensors"
    torch.save({"stem.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="altered"):
        read_state(folder)
    values = json.loads((folder / "card.json").read_text())
    from mednext_v2.core import sha256

    (folder / "card.json").write_text(json.dumps(values | {"sha256": sha256(path)}))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_state(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="card.json is missing"):
        read_card(tmp_path / "nowhere")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing beside its card"):
        read_state(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values | {"colour": 1}, "no 'colour'; it has: backbone"),
        (lambda values: {k: v for k, v in values.items() if k != "labels"}, "needs 'labels'"),
        (lambda values: [values], "one JSON object, got a list"),
    ],
)
def test_bad_cards(folder, change, message):
    path = folder / "card.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message) as error:
        read_card(folder)
    assert str(path) in str(error.value)


def test_card_that_is_not_json(folder):
    (folder / "card.json").write_text('{"backbone": ')
    with pytest.raises(ValueError, match="card.json is not JSON"):
        read_card(folder)


@pytest.mark.parametrize(("old", "new"), [(1, 1), (1, 3), (3, 1), (2, 4), (4, 2)])
def test_adapted_stem_answers_a_replicated_image_as_before(old, new):
    weight = torch.randn(5, old, 3, 3, 3, dtype=torch.float64)
    image = torch.randn(2, 1, 6, 6, 6, dtype=torch.float64)
    before, after = (
        torch.nn.functional.conv3d(image.expand(-1, n, -1, -1, -1), w)
        for n, w in ((old, weight), (new, adapt_stem(weight, new)))
    )
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("name", NETWORKS)
def test_transferred_network_answers_as_before(name):
    "Classes in another order, another number of channels: known classes keep their scores"
    source, target = tiny(1, 4, name=name), tiny(2, 3, seed=1, name=name)
    entry = BACKBONES[name]
    report = transfer(
        target, source.state_dict(), {"a": 1, "b": 2, "c": 3}, {"c": 1, "new": 2}, entry.heads, entry.stem
    )
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        before, after = source(image), target(image.expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(after[:, [0, 1]], before[:, [0, 3]], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[:, 2], before[:, 2], atol=1e-3)
    assert report.coverage == 1 and report.missing == () == report.skipped
    assert any("1 -> 2" in note for note in report.notes.values())
    assert any("classes kept: background, c" == note for note in report.notes.values())


@pytest.mark.parametrize("name", NETWORKS)
def test_new_classes_keep_their_fresh_rows(name):
    source, target, fresh = tiny(name=name), tiny(seed=1, name=name), tiny(seed=1, name=name)
    entry = BACKBONES[name]
    transfer(target, source.state_dict(), {"a": 1, "b": 2}, {"x": 1, "b": 2}, entry.heads, entry.stem)
    with torch.no_grad():
        for model in (target, fresh, source):
            for parameter, value in model.named_parameters():
                if not parameter.startswith(entry.heads):
                    value.fill_(0.01)
        image = torch.randn(1, 1, 32, 32, 32)
        scores, new, old = target(image), fresh(image), source(image)
    torch.testing.assert_close(scores[:, 1], new[:, 1])
    torch.testing.assert_close(scores[:, [0, 2]], old[:, [0, 2]])


def test_square_head_is_read_along_the_right_axis():
    "As many channels as classes: only the kind of layer tells which axis counts the classes"
    source, target = create_model("tiny", 1, 4, width=4), create_model("tiny", 1, 4, width=4)
    before = source.state_dict()["out_0.conv_out.weight"]
    assert before.shape[:2] == (4, 4)
    transfer(target, source.state_dict(), {"a": 1, "b": 2, "c": 3}, {"c": 1, "b": 2, "a": 3})
    assert torch.equal(target.out_0.conv_out.weight.detach(), before[:, [0, 3, 2, 1]])


def test_same_labels_load_everything():
    source, target = tiny(), tiny(seed=1)
    labels = {"a": 1, "b": 2}
    report = transfer(target, source.state_dict(), labels, dict(reversed(labels.items())))
    assert set(report.loaded) == set(source.state_dict()) and report.adapted == () and report.coverage == 1
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())


def test_unknown_labels_leave_heads_fresh():
    source, target = tiny(), tiny(seed=1)
    head = target.out_0.conv_out.weight.detach().clone()
    report = transfer(target, source.state_dict())
    assert torch.equal(target.out_0.conv_out.weight.detach(), head)
    assert report.missing == report.skipped == ("out_0.conv_out.weight", "out_0.conv_out.bias")
    assert 0.9 < report.coverage < 1


def test_auxiliary_heads_come_and_go():
    labels = {"a": 1, "b": 2}
    plain, deep = tiny(), tiny(deep_supervision=True)
    report = transfer(tiny(seed=1, deep_supervision=True), plain.state_dict(), labels, labels)
    assert len(report.missing) == 8 and report.skipped == ()
    report = transfer(tiny(seed=1), deep.state_dict(), labels, labels)
    assert len(report.skipped) == 8 and report.missing == ()


@pytest.mark.parametrize("fault", ["absent", "shape", "stem"])
def test_body_that_does_not_fit_changes_nothing(fault):
    target, state = tiny(seed=1), dict(tiny().state_dict())
    name = "stem.weight" if fault == "stem" else "bottleneck.0.conv2.weight"
    state[name] = torch.zeros(3, 1, 1, 1, 1)
    if fault == "absent":
        del state[name]
    before = {k: v.clone() for k, v in target.state_dict().items()}
    found = "none" if fault == "absent" else r"\(3, 1, 1, 1, 1\)"
    with pytest.raises(ValueError, match=rf"1 tensors of the body.*{name}: wanted \(.*\), given {found}"):
        transfer(target, state)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize(("source", "target"), [({"a": 1}, {"a": 1, "b": 2}), ({"a": 1, "b": 2}, {"a": 1})])
def test_labels_of_other_heads_are_refused(source, target):
    with pytest.raises(ValueError, match="_labels name 1 classes and background, but out_0.* has 3 rows"):
        transfer(tiny(), tiny(seed=1).state_dict(), source, target)


def test_surplus_of_the_source_is_reported():
    state = dict(tiny().state_dict()) | {"dummy_tensor": torch.ones(1)}
    assert "dummy_tensor" in transfer(tiny(seed=1), state).skipped


def test_half_precision_weights_are_taken():
    source = {name: value.half() for name, value in tiny().state_dict().items()}
    target = tiny(seed=1)
    transfer(target, source, {"a": 1, "b": 2}, {"b": 1, "x": 2})
    assert target.stem.weight.dtype == torch.float32
    torch.testing.assert_close(target.stem.weight, tiny().stem.weight, rtol=1e-3, atol=1e-3)


def test_match_classes():
    assert match_classes({"a": 1}, None) == {} == match_classes(None, {"a": 1})
    assert match_classes({"a": 2, "b": 1}, {"b": 1, "a": 2, "c": 3}) == {
        "background": (0, 0), "b": (1, 1), "a": (2, 2)
    }


def test_report_table():
    report = LoadReport(("a",), ("b",), ("c",), ("d",), {"b": "why"})
    table = report.table()
    assert table.outcome.tolist() == ["loaded", "adapted", "skipped", "missing"]
    assert table.note.tolist() == ["", "why", "", ""] and report.coverage == 2 / 3
