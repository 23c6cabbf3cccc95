"Model folders that can be trusted, and transfer that says what it did"

import dataclasses
import json

import pytest
import torch

from mednext_v2.models.card import Card, LoadReport, add_scores, read_card, read_state, save_model
from mednext_v2.models.registry import create

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
    normalisation={"schemes": ("ct",), "mean": (50.0,), "std": (60.0,), "low": (-100.0,), "high": (200.0,), "nonzero": False},
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
    assert dataclasses.replace(card, sha256="", version="", grn=None) == CARD and card.grn == "mean" and len(card.sha256) == 64 and card.version


def test_cards_of_older_versions_are_read(folder):
    "They may hold null for axes, and how the network was trained among its overrides"
    path = folder / "card.json"
    values = json.loads(path.read_text())
    values |= {"mirror_axes": None, "overrides": values["overrides"] | {"checkpointing": "block"}}
    path.write_text(json.dumps(values))
    card = read_card(folder)
    assert card.mirror_axes == () and card.overrides == CARD.overrides


def test_saving_twice_gives_equal_bytes(folder, tmp_path):
    save_model(tmp_path / "again", tiny(), CARD)
    for name in ("model.safetensors", "card.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model"]


def test_saving_again_replaces_a_model_and_nothing_else(folder):
    save_model(folder, tiny(seed=1), CARD)
    assert torch.equal(read_state(folder)["stem.weight"], tiny(seed=1).stem.weight)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no model folder .it holds notes.txt"):
        save_model(folder, tiny(seed=2), CARD)
    assert torch.equal(read_state(folder)["stem.weight"], tiny(seed=1).stem.weight)


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


def test_report_table():
    report = LoadReport(("a",), ("b",), ("c",), ("d",), {"b": "why"}, {"a": ((2,), (2,)), "d": ((3, 1), None)})
    table = report.table()
    assert table.outcome.tolist() == ["loaded", "adapted", "skipped", "missing"]
    assert table.note.tolist() == ["", "why", "", ""] and report.coverage == 2 / 3
    assert table.model.tolist() == [(2,), None, None, (3, 1)] and table.source.tolist() == [(2,), None, None, None]


@pytest.mark.parametrize(("allow", "left"), [((), "d.*c"), (("d",), "c"), (("[cd]",), None), (("*",), None)])
def test_gaps_are_errors_unless_allowed_by_name(allow, left):
    report = LoadReport(("a",), ("b",), ("c",), ("d",))
    if left is None:
        assert report.require(allow) is report
    else:
        with pytest.raises(ValueError, match=f"cover 66.7% of the model: .*{left}.*allow them by name"):
            report.require(allow)


def test_report_prints_every_class():
    text = str(LoadReport(classes={"liver": "organ 5", "tumour": ""}))
    assert "class liver   from organ 5" in text and "class tumour  new" in text


def test_scores_are_written_into_the_card_alone(folder):
    before, weights = read_card(folder), (folder / "model.safetensors").read_bytes()
    card = add_scores(folder, {"dsc": 0.5, "cases": 4}, "mednextv2 evaluate predictions labelsTs")
    assert card == read_card(folder) and dataclasses.replace(card, scores={}) == before
    assert card.scores == {"dsc": 0.5, "cases": 4, "grid": "scan", "command": "mednextv2 evaluate predictions labelsTs"}
    assert (folder / "model.safetensors").read_bytes() == weights and read_state(folder)
