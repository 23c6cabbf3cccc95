"Model folders that can be trusted, and transfer that says what it did"

import dataclasses
import json
from itertools import permutations
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from mednext_v2.cli import main
from mednext_v2.data.datasets import load_datasets
from mednext_v2.inference.files import label_names
from mednext_v2.integrations.bundle import write_bundle
from mednext_v2.integrations.dicom import list_segments
from mednext_v2.integrations.export import export_model
from mednext_v2.integrations.hub import model_files
from mednext_v2.models.card import Card, LoadReport, add_scores, assign_regions, read_card, read_state, save_model
from mednext_v2.models.registry import create, head_card
from mednext_v2.models.transfer import class_channels, transfer
from mednext_v2.zoo.importers import open_checkpoint
from model_toys import KNOWN, UNET_CARD

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


# Which output is which class

NESTED = {"whole": (1, 2, 3), "core": (1, 3), "top": (3,)}
HEAD = dict(groups={}, modality="MR", spacing=(2.0, 2.0, 2.0), normalisation=KNOWN)
HEADS = {
    "Two": HEAD | dict(labels={"alpha": 2, "zeta": 1}, outputs=(0, 3, 2)),
    "Aniso": HEAD | dict(labels={"three": 3, "one": 1, "two": 2}, outputs=(1, 4, 6, 5)),
}
ALL = {"Two/zeta": 1, "Two/alpha": 2, "Aniso/one": 3, "Aniso/two": 4, "Aniso/three": 5}
KINDS = {  # Fields of a card, the head asked for, and by class its output and its value in a label map
    "labels": (dict(labels={"two": 2, "three": 3, "one": 1}), None, {"one": (1, 1), "two": (2, 2), "three": (3, 3)}),
    "regions": (dict(labels={"a": 1, "b": 2, "top": 3}, regions=NESTED, class_order=(2, 1, 3)), None, {"whole": (0, 2), "core": (1, 1), "top": (2, 3)}),
    "first head": (dict(labels=ALL, heads=HEADS), "Two", {"zeta": (3, 1), "alpha": (2, 2)}),
    "second head": (dict(labels=ALL, heads=HEADS), "Aniso", {"one": (4, 1), "two": (6, 2), "three": (5, 3)}),
}


def save_choice(folder, fields, output):
    "A network that finds one output everywhere"
    card = Card(**UNET_CARD | dict(groups={}, task="toys", licence="MIT") | fields)
    network = create("unet", 1, card.num_classes, filters=(4, 8, 8))
    state = network.state_dict()
    state["heads.0.conv.conv.weight"].zero_()
    state["heads.0.conv.conv.bias"].fill_(-1.0)
    state["heads.0.conv.conv.bias"][output] = 1.0
    save_model(folder, network, card)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_calls_an_output_by_the_same_name(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    fields, head, classes = KINDS[kind]
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(16, 16, 16)).astype("f4"), np.diag([2.0, 2, 2, 1])), "scan.nii.gz")
    option = f" --head {head}" if head else ""
    for name, (output, value) in classes.items():
        folder = save_choice(tmp_path / name, fields, output)
        card = head_card(read_card(folder), head)
        assert [*label_names(card).items()] == sorted((number, label) for label, (_, number) in classes.items())
        main(f"predict -m {name} -i scan.nii.gz -o {name}.nii.gz --device cpu --statistics{option}".split())
        labels = np.asarray(nib.load(f"{name}.nii.gz").dataobj)
        assert np.unique(labels).tolist() == [value]
        table = pd.read_csv(f"{name}_statistics.csv")
        assert table.label[table.voxels > 0].tolist() == [name] and f'"{name}"' in (tmp_path / f"{name}.txt").read_text().splitlines()[2 + value]
        assert json.loads((tmp_path / f"{name}.json").read_text())["voxels"][name] == labels.size
        assert [(segment.value, segment.name) for segment in list_segments(labels, card)] == [(value, name)]

        write_bundle(folder, tmp_path / "bundle" / name, head)
        told = json.loads((tmp_path / "bundle" / name / "configs/metadata.json").read_text())["network_data_format"]["outputs"]["pred"]
        bundled = create("unet", 1, len(told["channel_def"]), filters=(4, 8, 8))
        bundled.load_state_dict(torch.load(tmp_path / "bundle" / name / "models/model.pt", weights_only=True))
        assert (
            told["num_channels"] == len(told["channel_def"]) and told["channel_def"][str(int(bundled.state_dict()["heads.0.conv.conv.bias"].argmax()))] == name
        )

        published = model_files(folder, "clinic/toys", "")
        (tmp_path / "published").mkdir(exist_ok=True)
        (tmp_path / "published/card.json").write_bytes(bytes(published["card.json"]))
        assert class_channels(read_card(tmp_path / "published")) == class_channels(read_card(folder))
        page = bytes(published["README.md"]).decode()
        assert head or [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ") and f" {name} |" in line] == [[f" {value} ", f" {name} "]]


@pytest.mark.parametrize("kind", KINDS)
def test_classes_start_from_those_of_the_same_name(tmp_path, kind):
    fields, _, classes = KINDS[kind]
    for name, (output, _) in classes.items():
        folder = save_choice(tmp_path / name, fields, output)
        others = [*classes][::-1]
        if kind == "regions":
            target = class_channels(SimpleNamespace(labels={}, regions={other: (1,) for other in others}))
        else:
            target = class_channels(SimpleNamespace(labels={other: place + 1 for place, other in enumerate(others)}, regions={}))
        tuned = create("unet", 1, len(target), filters=(4, 8, 8))
        transfer(tuned, folder, target, class_channels(read_card(folder), [KINDS[kind][1] or ""]))
        assert int(tuned.state_dict()["heads.0.conv.conv.bias"].argmax()) == target[name]
        assert list(open_checkpoint(folder).regions) == list(fields.get("regions", {}))


def test_an_export_says_the_order_of_its_outputs(tmp_path):
    pytest.importorskip("onnxruntime")
    described = export_model(save_choice(tmp_path / "model", KINDS["regions"][0], 0), tmp_path / "out")
    told = json.loads((tmp_path / "out/export.json").read_text())
    assert dict(zip(told["regions"], told["class_order"])) == {"whole": 2, "core": 1, "top": 3} and told["regions"].keys() == described["regions"].keys()


def test_regions_keep_their_order_whoever_writes_the_card(tmp_path):
    fields = dict(UNET_CARD, labels={"a": 1, "b": 2, "c": 3}, groups={})
    for number, names in enumerate(permutations(NESTED)):
        regions = {name: NESTED[name] for name in names}
        card = Card(**fields, regions=regions, class_order=tuple(max(NESTED[name]) for name in names))
        folder = tmp_path / str(number)
        save_model(folder, create("unet", 1, 3, filters=(4, 8, 8)), card)
        add_scores(folder, {"dsc": 0.5}, "evaluate")
        (folder / "card.json").write_text(json.dumps(json.loads((folder / "card.json").read_text()), sort_keys=True))
        assert list(read_card(folder).regions) == list(names)
    assert list(Card(**fields | {"labels": {"b": 2, "c": 3, "a": 1}}).labels) == ["a", "b", "c"]


def write_older(folder, values):
    "As versions before `region_order` wrote cards"
    path = folder / "card.json"
    path.write_text(json.dumps({key: value for key, value in (json.loads(path.read_text()) | values).items() if key != "region_order"}, sort_keys=True))


def test_older_cards_are_read_where_their_values_tell_the_order(tmp_path, capsys):
    folder = save_choice(tmp_path / "model", KINDS["regions"][0], 0)
    write_older(folder, {})
    assert list(json.loads((folder / "card.json").read_text())["regions"]) == ["core", "top", "whole"]
    assert list(read_card(folder).regions) == ["whole", "core", "top"]
    crossing = {"labels": {"a": 1, "b": 2, "c": 3}, "regions": {"left": [1, 2], "right": [2, 3], "top": [3]}, "class_order": [2, 2, 3]}
    write_older(folder, crossing)
    with pytest.raises(SystemExit) as ended:
        main(["predict", "-m", str(folder), "-i", str(folder / "card.json"), "-o", str(tmp_path / "out.nii.gz")])
    said = f"{ended.value}{capsys.readouterr().err}"
    assert 'add "region_order"' in said and str(folder / "card.json") in said and "dataset.json of toys" in said
    path = folder / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"region_order": ["right", "left", "top"]}))
    assert list(read_card(folder).regions) == ["right", "left", "top"]
    for wrong in (["left", "top"], ["left", "left", "top"], ["left", "right", "other"], "left", [1, 2, 3]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"region_order": wrong}))
        with pytest.raises(ValueError, match="card.json: region_order must be each of the regions"):
            read_card(folder)


def test_older_cards_of_every_registered_data_set_can_be_read():
    found = [dataset for dataset in load_datasets().values() if dataset.regions]
    assert len(found) > 1
    for dataset in found:
        assert assign_regions(dict(sorted(dataset.regions.items())), dataset.class_order) == list(dataset.regions)
