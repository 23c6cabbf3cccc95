"""From raw data to a model where not all is annotated: cases that lack labels, and several data sets at once."""

import json
import shlex
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from data_toys_convert import write_cads
from mednext_v2 import cli
from mednext_v2.core import ItemsFailed, write_csv
from mednext_v2.data.datasets import Dataset, get_dataset, partial_cases, write_description
from mednext_v2.data.mixture import union_labels
from mednext_v2.data.preprocess import Prepared, prepare
from mednext_v2.data.scans import write_volume
from mednext_v2.inference.predictor import predict
from mednext_v2.intake.check import check_raw_dataset, fix_raw_dataset
from mednext_v2.intake.convert import CADS_GROUPS, CADS_LEVELS, cads_annotated, convert
from mednext_v2.models.card import read_card, read_state
from mednext_v2.models.registry import BACKBONES, create, load_model
from mednext_v2.models.transfer import Start, class_channels
from mednext_v2.network.scaling import estimate
from mednext_v2.training import launch, run, trainer
from mednext_v2.training.recipe import Recipe, get_recipe
from mednext_v2.training.run import TrainSettings, read_data, train_model
from mednext_v2.training.validation import PatchValidation, patch_validation
from training_toys import split

SMALL = {"filters": (4, 8, 8)}
SETTINGS = dict(batch_size=4, patch=(16, 16, 16), lr=2e-2, warmup=1, foreground=0.5, augment="none", checkpoint_every=100)
SHORT = Recipe(steps=2, **SETTINGS)
WORDS = {"liver": 400, "spleen": 100, "kidney": -200}  # Intensity of each
CUBES = {"liver": (2, 2, 2), "spleen": (10, 2, 2), "kidney": (2, 10, 10)}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def dataset(name: str, number: int, labels: tuple[str, ...], **fields) -> Dataset:
    settings = dict(
        modality="MR",
        spacing=(1.0, 1.0, 1.0),
        patch=(16, 16, 16),
        nsd_tolerance=1.0,
        role="pretrain",
        licence="none",
        citation="none",
        groups="organ",
        title=f"Toy {name}",
        name=name,
        dataset=number,
    )
    return Dataset(labels={label: value for value, label in enumerate(labels, 1)}, **settings | fields)


CHEST, BELLY = dataset("chest", 901, ("spleen", "liver")), dataset("belly", 902, ("kidney", "spleen"))


def scan(seed: int) -> tuple[np.ndarray, dict]:
    "Three bright cubes in noise, and where they are"
    rng = np.random.default_rng(seed)
    image, places = rng.normal(-700, 30, (20, 20, 20)), {}
    for name, start in CUBES.items():
        at = np.array(start) + rng.integers(0, 2, 3)
        places[name] = tuple(slice(a, a + 7) for a in at)
        image[places[name]] += 700 + WORDS[name]
    return image.astype(np.int16), places


def write_raw(one: Dataset, raw, cases: int = 3, annotated: dict | None = None, shift: int = 0) -> None:
    "A raw data set that shows all three organs, and labels its own"
    folder, names = raw / one.folder, [f"{one.name}_{number}" for number in range(cases)]
    for number, case in enumerate(names):
        image, places = scan(number + 10 * one.dataset)
        label = np.zeros(image.shape, np.uint8)
        for name, value in one.labels.items():
            if name in (annotated or {}).get(case, one.labels):
                label[places[name]] = value
        write_volume(folder / f"imagesTr/{case}_0000.nii.gz", image + np.int16(shift), np.eye(4))
        write_volume(folder / f"labelsTr/{case}.nii.gz", label, np.eye(4))
    write_description(one, folder, cases)
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:-1], "val": names[-1:]}]))
    if annotated:
        rows = [(case, " ".join(labels)) for case, labels in annotated.items()]
        write_csv(folder / "annotated.csv", pd.DataFrame(rows, columns=["case", "annotated"]))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "Both data sets, prepared"
    folder = tmp_path_factory.mktemp("sets")
    for one in (CHEST, BELLY):
        write_raw(one, folder / "raw")
        prepare(one, folder / "raw", folder / one.name)
    return folder


def train(data, out, recipe=SHORT, backbone="unet", **options):
    options = split(dict(overrides=SMALL) | options)
    settings = {field.name: options.pop(field.name) for field in fields(TrainSettings) if field.name in options}
    return train_model(TrainSettings(data, out, backbone, recipe, f"{out}.run", **settings), **options)


# ---- cases that lack labels


def test_cads_with_missing_parts_is_refused_unless_it_is_meant(tmp_path):
    write_cads(tmp_path / "source")
    for case in ("0001_visceral_gc/segmentations/10000001/10000001", "0041_ctrate/segmentations/train_1_a_1/train_1_a_1"):
        (tmp_path / f"source/{case}_part_552.nii.gz").unlink()
    with pytest.raises(ItemsFailed, match="part_552.nii.gz is missing"):
        convert("cads", tmp_path / "source", tmp_path / "raw", progress=False)
    table = convert("cads", tmp_path / "source", tmp_path / "raw", progress=False, partial=True).set_index("case")
    assert "without part 552" in table.warnings["0001_10000001"] and "without" not in table.warnings["0002_10000018"]
    cads = get_dataset("cads")
    found = partial_cases(cads, tmp_path / "raw")
    wanted = cads_annotated(cads, tuple(group for group in CADS_GROUPS if group != 552))
    assert found == {"0001_10000001": wanted, "0041_train_1_a_1": wanted}
    assert check_raw_dataset(tmp_path / "raw").table.code.str.startswith("annotated").sum() == 0
    # The parts come back: so does the whole case
    write_cads(tmp_path / "again")
    for path in (tmp_path / "again").rglob("*_part_552.nii.gz"):
        shutil.copy(path, tmp_path / "source" / path.relative_to(tmp_path / "again"))
    convert("cads", tmp_path / "source", tmp_path / "raw", progress=False, partial=True)
    assert partial_cases(cads, tmp_path / "raw") == {} and not list((tmp_path / "raw").rglob("annotated.csv"))


def test_what_may_hide_a_missing_part_is_not_called_annotated():
    cads = get_dataset("cads")
    names = sorted(cads.labels, key=cads.labels.get)
    places = [(group, value) for group, size in CADS_GROUPS.items() for value in range(1, size + 1)]
    values = dict(zip(places, names, strict=True))
    assert values[553, 9] == "brain" and values[559, 4] == "thoracic_cavity"
    found = cads_annotated(cads, tuple(group for group in CADS_GROUPS if group != 551))
    for (group, value), name in values.items():
        low = any(value in CADS_LEVELS[level].get(group, ()) for level in (0, 1))
        assert (name in found) == (group != 551 and not low), name


def test_annotated_goes_from_raw_to_the_loss(tmp_path, monkeypatch):
    annotated = {"chest_0": ("liver",), "chest_2": ("spleen",)}
    write_raw(CHEST, tmp_path / "raw", annotated=annotated)
    assert check_raw_dataset(tmp_path / "raw" / CHEST.folder).clean
    prepare(CHEST, tmp_path / "raw", tmp_path / "chest")
    prepared = Prepared(tmp_path / "chest")
    assert prepared.partial and prepared.manifest.set_index("case").annotated.to_dict() == {"chest_0": "liver", "chest_1": "", "chest_2": "spleen"}
    seen, whole = [], trainer.deep_supervision_loss
    monkeypatch.setattr(trainer, "deep_supervision_loss", lambda *given, **more: seen.append(more["annotated"]) or whole(*given, **more))
    train(tmp_path / "chest", tmp_path / "model", Recipe(steps=2, validate_every=2, **SETTINGS))
    rows = {tuple(row) for masks in seen for row in masks.tolist()}
    assert rows == {(True, False, True), (True, True, True)}  # The liver is class 2; chest_2 validates
    card = read_card(tmp_path / "model")
    assert card.labels == CHEST.labels and card.task == "chest" and card.heads == {}
    # The digest tells the two apart
    digest = prepared.digest
    (tmp_path / "raw" / CHEST.folder / "annotated.csv").unlink()
    prepare(CHEST, tmp_path / "raw", tmp_path / "chest")
    assert not Prepared(tmp_path / "chest").partial and Prepared(tmp_path / "chest").digest != digest


def test_validation_counts_known_classes_only():
    space = union_labels([CHEST])
    label = torch.zeros(2, 1, 2, 2, 2, dtype=torch.long)
    label[0, 0, 0] = 1
    label[1, 0, 1] = 2
    scores = torch.full((2, 3, 2, 2, 2), -5.0).scatter(1, label, 5.0)
    scores[1, 1, 0] = 9.0  # Sees class 1 where nobody looked for it
    echo = torch.nn.Identity()
    echo.weight = torch.nn.Parameter(torch.zeros(1))
    annotated = torch.tensor([[True, True, True], [True, False, True]])
    assert PatchValidation([(scores, label, annotated)], space)(echo) == 1
    everything = torch.ones_like(annotated)
    assert PatchValidation([(scores, label, everything)], space)(echo) < 0.9


@pytest.mark.parametrize(
    ("rows", "code", "word"),
    [
        ("case,annotated\nchest_0,livr\n", "annotated-csv", "'livr' is no label of"),
        ("case,annotated\nchest_9,liver\n", "annotated-unknown", "chest_9"),
        ("id,labels\nchest_0,liver\n", "annotated-csv", "lacks column annotated, case"),
        ("case,annotated\nchest_0,liver\nchest_0,spleen\n", "annotated-csv", "chest_0 twice"),
        ("", "annotated-csv", "No columns"),
    ],
)
def test_bad_annotated_tables_are_found_by_doctor_and_stop_prepare(tmp_path, rows, code, word):
    write_raw(CHEST, tmp_path / "raw")
    (tmp_path / "raw" / CHEST.folder / "annotated.csv").write_text(rows)
    report = check_raw_dataset(tmp_path / "raw", quick=True)
    assert report.table[["code", "severity"]].values.tolist() == [[code, "error"]] and word in report.table.what[0]
    with pytest.raises(ValueError, match=word):
        prepare(CHEST, tmp_path / "raw", tmp_path / "prepared")


def test_a_mended_copy_keeps_what_is_known(tmp_path):
    write_raw(CHEST, tmp_path / "raw", annotated={"chest_0": ("liver",), "chest_9": ("spleen",)})
    fix_raw_dataset(tmp_path / "raw", tmp_path / "mended")
    assert partial_cases(CHEST, tmp_path / "mended") == {"chest_0": ("liver",)}


def test_a_copied_raw_folder_keeps_what_is_known(tmp_path):
    write_raw(CHEST, tmp_path / "raw", annotated={"chest_0": ("liver",)})
    convert("raw", tmp_path / "raw" / CHEST.folder, tmp_path / "copy", progress=False)
    assert partial_cases(CHEST, tmp_path / "copy") == {"chest_0": ("liver",)}


# ---- several data sets


def organs(path, card=None) -> dict[str, float]:
    "Dice of a prediction on a new scan, by organ"
    image, places = scan(5)
    found = np.asarray(predict(path, nibabel.Nifti1Image(image, np.eye(4)), head=card and card.task).dataobj)
    labels = card.labels if card else read_card(path).labels
    dice = {}
    for name, value in labels.items():
        truth = np.zeros(found.shape, bool)
        truth[places[name]] = True
        dice[name] = 2 * (truth & (found == value)).sum() / (truth.sum() + (found == value).sum())
    return dice


LONG = Recipe(steps=70, validate_every=35, **SETTINGS)
LONGER = replace(LONG, steps=90, validate_every=45)  # Own heads share what they learn in the body alone


@pytest.fixture(scope="module")
def shared(sets):
    history = train([sets / "chest", sets / "belly"], sets / "shared", LONG)
    return sets / "shared", history


@pytest.fixture(scope="module")
def own(sets):
    history = train([sets / "chest", sets / "belly"], sets / "own", LONGER, heads="own", seed=2)
    return sets / "own", history


def test_shared_head_learns_what_each_set_teaches(shared, sets):
    folder, history = shared
    card = read_card(folder)
    assert card.labels == {"spleen": 1, "liver": 2, "kidney": 3} and card.task == "chest+belly" and not card.heads
    assert card.provenance.endswith(f"trained on {CHEST.folder}, {BELLY.folder}")
    assert min(organs(folder).values()) > 0.7, organs(folder)
    assert history.val_dice.dropna().iloc[-1] > 0.5


def test_own_heads_predict_one_set_at_a_time(own, sets):
    folder, history = own
    card = read_card(folder)
    assert card.labels == {"chest/spleen": 1, "chest/liver": 2, "belly/kidney": 3, "belly/spleen": 4}
    assert card.heads["belly"]["outputs"] == (1, 4, 5) and card.num_classes == 6
    dice = []
    for one in (CHEST, BELLY):
        model, narrowed = load_model(folder, head=one.name)
        assert narrowed.labels == one.labels and narrowed.num_classes == 3 and not narrowed.heads
        assert model(torch.zeros(1, 1, 16, 16, 16)).shape[1] == 3
        dice += organs(folder, narrowed).values()
    # So short a training leaves out one of the four with some seeds; a wrong row would spoil more
    assert sum(one > 0.9 for one in dice) >= 3, dice
    assert history.val_dice.dropna().iloc[-1] > 0.5
    with pytest.raises(ValueError, match="a head for each of belly, chest: name one, got head None"):
        load_model(folder)


def test_one_head_has_no_name(shared):
    with pytest.raises(ValueError, match="one head, which has no name, got head 'chest'"):
        load_model(shared[0], head="chest")


@pytest.mark.parametrize("target", ["chest", "belly"])
def test_fine_tuning_takes_the_rows_of_its_classes(own, shared, sets, tmp_path, monkeypatch, target):
    begun = {}

    def stop(recipe, model, *arguments, **options):
        begun.update({name: value.clone() for name, value in model.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "fit", stop)
    labels = {"chest": ("spleen", "liver"), "belly": ("kidney", "spleen")}[target]
    for parent, rows in ((shared[0], [0, *(read_card(shared[0]).labels[name] for name in labels)]), (own[0], read_card(own[0]).heads[target]["outputs"])):
        with pytest.raises(KeyboardInterrupt):
            train(sets / target, tmp_path / "tuned", start=Start(parent))
        given = read_state(parent)
        changed = [name for name in begun if begun[name].shape != given[name].shape]
        assert changed  # The heads
        for name in begun:
            wanted = given[name][list(rows)] if name in changed else given[name]
            assert torch.equal(begun[name], wanted), name


def test_channels_of_several_heads_are_found_by_name(own):
    channels = class_channels(read_card(own[0]), ("elsewhere",))
    assert set(channels) == {"background", "spleen", "liver", "kidney"} and len(set(channels.values())) == 4
    channels = class_channels(read_card(own[0]), ("chest",))  # The spleen of both: the wanted set's
    assert channels["background"] == 0 and [channels[name] for name in ("spleen", "liver", "kidney")] == [2, 3, 4]


def test_every_set_with_validation_cases_is_looked_at(sets):
    data = read_data([sets / "chest", sets / "belly"])
    batches = patch_validation(SHORT, data.sets, batches=2, labels=data.space).batches
    masks = torch.cat([annotated for _, _, annotated in batches])
    assert len(batches) == 4 and masks[:, 2].sum() == masks[:, 3].sum() == 8


def test_what_sets_must_have_in_common(sets, tmp_path):
    for one, shift in ((CHEST, 0), (BELLY, 1000)):
        one = replace(one, modality="CT", channels=("CT",))
        write_raw(one, tmp_path / "raw", shift=shift)
        prepare(one, tmp_path / "raw", tmp_path / one.name)
    both = [tmp_path / "chest", tmp_path / "belly"]
    with pytest.raises(ValueError, match="differ in normalisation"):
        train(both, tmp_path / "model")
    train(both, tmp_path / "model", heads="own", allow=("normalisation",))
    card = read_card(tmp_path / "model")
    ranges = [card.heads[name]["normalisation"]["mean"][0] for name in ("chest", "belly")]
    assert ranges[1] - ranges[0] > 200 and load_model(tmp_path / "model", head="belly")[1].normalisation["mean"][0] == ranges[1]
    with pytest.raises(ValueError, match="each data set once"):
        train([sets / "chest", sets / "chest"], tmp_path / "twice")


def test_regions_in_another_order_are_another_run(tmp_path):
    nested = dataset("nested", 903, ("spleen", "liver"), regions={"all": (1, 2), "liver": (2,)}, class_order=(1, 2))
    write_raw(nested, tmp_path / "raw")
    prepare(nested, tmp_path / "raw", tmp_path / "nested")
    train(tmp_path / "nested", tmp_path / "model")
    assert list(read_card(tmp_path / "model").regions) == ["all", "liver"] == list(class_channels(nested))
    turned = replace(nested, regions=dict(reversed(nested.regions.items())), class_order=(2, 1))
    prepare(turned, tmp_path / "raw", tmp_path / "nested")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds another run \(regions was"):
        train(tmp_path / "nested", tmp_path / "model")


def test_regions_are_not_mixed(sets, tmp_path):
    regions = dataset("nested", 903, ("spleen", "liver"), regions={"all": (1, 2), "liver": (2,)}, class_order=(1, 2))
    write_raw(regions, tmp_path / "raw")
    prepare(regions, tmp_path / "raw", tmp_path / "nested")
    with pytest.raises(ValueError, match="nested has overlapping regions"):
        read_data([sets / "chest", tmp_path / "nested"])


def test_command_line_trains_on_two_sets(sets, tmp_path, capsys):
    settings = ["steps=2", "batch_size=2", "patch=(16,16,16)", "warmup=1", "augment=none", "checkpoint_every=2"]
    line = ["train", str(sets / "chest"), str(tmp_path / "model"), "--with", str(sets / "belly"), "--backbone", "unet"]
    line += ["--recipe", "smoke", "--network", "filters=(4,8,8)", "--device", "cpu", "--workers", "0", "--unchecked"]
    cli.main([*line, "--sampling", "chest=2", "belly=1", "--heads", "own", "--recipe-set", *settings])
    assert "wrote" in capsys.readouterr().out and set(read_card(tmp_path / "model").heads) == {"chest", "belly"}
    write_volume(tmp_path / "scan.nii.gz", scan(5)[0], np.eye(4))
    ask = ["predict", "-m", str(tmp_path / "model"), "-i", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "l.nii.gz")]
    cli.main([*ask, "--head", "belly", "--statistics"])
    assert pd.read_csv(tmp_path / "l_statistics.csv").label.tolist() == list(read_card(tmp_path / "model").heads["belly"]["labels"])
    assert set(np.unique(nibabel.load(tmp_path / "l.nii.gz").dataobj)) <= {0, 1, 2}
    with pytest.raises(SystemExit, match="name one, got head None"):
        cli.main(ask)
    with pytest.raises(SystemExit, match="sampling has weights for chest, the data sets are chest, belly"):
        cli.main([*line[:2], str(tmp_path / "other"), *line[3:], "--sampling", "chest=2", "--recipe-set", *settings])


# ---- memory


def literally(text: str) -> list[str]:
    "A suggestion's options, as a user would copy them"
    return shlex.split(text.strip().split(" (")[0])


@pytest.mark.parametrize("processes, fused", [(1, None), (2, None), (1, "cpu")])
def test_a_suggestion_that_is_followed_to_the_letter_is_accepted(sets, tmp_path, monkeypatch, processes, fused):
    base = ["train", str(sets / "chest"), str(tmp_path / "model"), "--backbone", "mednext_v2_tiny", "--device", "cpu"]
    base += ["--network", "width=4", "--processes", str(processes)]
    recipe = ["batch_size=8", "patch=32,32,32", "steps=2"]
    monkeypatch.setattr(Prepared, "fingerprint", SimpleNamespace(shape=(64, 64, 64)), raising=False)
    monkeypatch.setattr(launch, "forecast", lambda *given: launch.Forecast(10**7, 1.0, 1e9, fused))

    def ask(*more: str, room: float) -> str:
        monkeypatch.setattr(launch, "available_memory", lambda device: int(room * processes))
        options = cli.parser().parse_args([*base, "--recipe", "smoke", "--recipe-set", *recipe, *more])
        built = get_recipe("smoke", **dict(cli.parse_pair(pair) for pair in options.recipe_set))
        return cli.forecast_training(options, built, dict(cli.parse_pair(pair) for pair in options.network))

    need = float(ask(room=1e12).split()[1]) * 1e9
    kinds = set()
    for share in (0.8, 0.5, 0.35, 0.25, 0.2):
        with pytest.raises(ValueError) as refused:
            ask(room=share * need)
        suggestions = str(refused.value).splitlines()[1:]
        if "nothing but a smaller network" in suggestions[0]:
            break
        for text in suggestions:
            assert "forecast:" in ask(*literally(text), room=share * need), text
            kinds |= {word.split("=")[0] for word in literally(text) if "=" in word}
    # Fused blocks keep their input alone, and sums are float32
    assert kinds in ([{"batch_size"}, {"batch_size", "patch"}] if fused else [{"grad_checkpointing", "batch_size", "patch", "precision"}])


def test_checkpointing_auto_is_what_free_memory_allows(sets, tmp_path, monkeypatch):
    data, recipe = run.read_data(sets / "chest"), replace(SHORT, patch=(32, 32, 32), batch_size=2)
    network, patch = run.build_network(data, "mednext_v2_tiny", recipe, {"width": 4})
    options = dict(batch_size=2, in_channels=data.in_channels, num_classes=data.outputs, deep_supervision=recipe.deep_supervision)
    kinds = ("none", "expansion", "block")
    for free, device, expected in [
        *((estimate(network.arch, patch, grad_checkpointing=kind, **options).total_bytes / 0.8 + 9, "cuda", kind) for kind in kinds),
        (0, "cuda", "block"),
        (estimate(network.arch, patch, fused="cpu", **options).total_bytes / 0.8 + 9, "cpu", "none"),
    ]:
        monkeypatch.setattr(launch, "available_memory", lambda device: int(free))
        found = run.build_network(data, "mednext_v2_tiny", recipe, {"width": 4, "grad_checkpointing": "auto"}, device=device)
        assert found[0].grad_checkpointing == expected
    monkeypatch.undo()
    others = dict(overrides={"width": 4, "grad_checkpointing": "auto"}, device="cpu", progress=False)
    train(sets / "chest", tmp_path / "model", recipe, "mednext_v2_tiny", **others)
    assert read_card(tmp_path / "model").overrides == {"width": 4}
    run.build_network(data, "unet", recipe, SMALL | {"grad_checkpointing": "auto"})  # Has no such choice


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.startswith("mednext")])
def test_every_mednext_can_recompute(name):
    with torch.device("meta"):
        model = create(name, 1, 3, grad_checkpointing="block")
    blocks = [module for module in model.modules() if getattr(module, "grad_checkpointing", None) is not None]
    assert len(blocks) > 10 and {module.grad_checkpointing for module in blocks} == {"block"}


def test_training_with_recomputing_gives_the_same_weights_and_a_plain_card(sets, tmp_path):
    recipe, kinds = replace(SHORT, patch=(32, 32, 32), batch_size=1), ("none", "expansion", "block")
    for kind in kinds:
        options = dict(overrides={"width": 4, "grad_checkpointing": kind}, device="cpu", progress=False)
        train(sets / "chest", tmp_path / kind, recipe, "mednext_v2_tiny", **options)
        assert read_card(tmp_path / kind).overrides == {"width": 4}
    plain, *others = (read_state(tmp_path / kind) for kind in kinds)
    assert all(torch.equal(value, other[name]) for other in others for name, value in plain.items())


# ---- labels in parts, which overlap


BODY = dataset("body", 904, ("box", "spleen", "liver"))
BODY_PARTS = {"whole": ["box"], "organs": ["spleen", "liver"]}


def write_body(raw) -> dict[str, dict]:
    "A raw data set whose box contains both organs; what each part shows, by case"
    write_raw(dataset("body", 904, ("spleen", "liver")), raw, 4)
    write_description(BODY, raw / BODY.folder, 4)
    folder, shown = raw / BODY.folder, {}
    for number in range(4):
        case, (image, places) = f"body_{number}", scan(number + 10 * BODY.dataset)
        box, organs = np.zeros(image.shape, np.uint8), np.zeros(image.shape, np.uint8)
        box[1:19, 1:19, 1:19] = 1
        organs[places["spleen"]], organs[places["liver"]] = 1, 2
        shown[case] = {"whole": box, "organs": organs}
        write_volume(folder / f"labelsTr/{case}.nii.gz", np.where(organs, organs + 1, box).astype(np.uint8), np.eye(4))
        for part, label in shown[case].items():
            write_volume(folder / f"partsTr/{part}/{case}.nii.gz", label, np.eye(4))
    (folder / "parts.json").write_text(json.dumps(BODY_PARTS))
    return shown


def test_parts_are_prepared_beside_the_map_of_all_labels(tmp_path):
    shown, folder = write_body(tmp_path / "raw"), tmp_path / "raw" / BODY.folder
    (folder / "partsTr/organs/body_3.nii.gz").unlink()
    table = prepare(BODY, tmp_path / "raw", tmp_path / "body").set_index("case")
    assert table.parts.to_dict() == {"body_0": "whole organs", "body_1": "whole organs", "body_2": "whole organs", "body_3": "whole"}
    whole = Prepared(tmp_path / "body")
    assert list(whole.parts) == ["whole", "organs"]
    for name, part in whole.parts.items():
        assert part.dataset.labels == {label: value for value, label in enumerate(BODY_PARTS[name], 1)} and part.fingerprint == whole.fingerprint
        for case in part.ids("train"):
            assert np.array_equal(part.label(case)[:], shown[case][name]) and np.array_equal(part.image(case)[:], whole.image(case)[:])
            assert set(part.foreground(case)) == set(part.dataset.labels.values())
    assert whole.label("body_0")[:].max() == 3 and [one.ids("val") for one in whole.parts.values()] == [["body_3"], []]
    # Without parts the same cases are what they would be without this
    (folder / "parts.json").unlink()
    plain = prepare(BODY, tmp_path / "raw", tmp_path / "plain").set_index("case")
    assert "parts" not in plain and not Prepared(tmp_path / "plain").parts and (plain.key != table.key).all()
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"cases", "fingerprint.json", "manifest.csv", "task.json"}
    # And a folder that had parts loses them
    prepare(BODY, tmp_path / "raw", tmp_path / "body")
    assert not (tmp_path / "body/parts.json").exists() and not list((tmp_path / "body").rglob("label_*"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda folder: (folder / "parts.json").write_text(json.dumps({"whole": ["box"], "organs": ["liver"]})), "each label of body must be in one part"),
        (lambda folder: (folder / "parts.json").write_text(json.dumps({"../up": ["box", "spleen", "liver"]})), "named by letters and digits"),
        (lambda folder: write_volume(folder / "partsTr/organs/body_1.nii.gz", np.full((20, 20, 20), 2, np.uint8), np.eye(4)), "has labels where body_1.nii.gz"),
        (lambda folder: write_volume(folder / "partsTr/organs/body_1.nii.gz", np.zeros((20, 20, 19), np.uint8), np.eye(4)), "has the shape"),
        (lambda folder: write_volume(folder / "partsTr/organs/body_1.nii.gz", np.full((20, 20, 20), 3, np.uint8), np.eye(4)), "body_organs declares 0 to 2"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, change, message):
    write_body(tmp_path / "raw")
    change(tmp_path / "raw" / BODY.folder)
    with pytest.raises((ValueError, ItemsFailed), match=message):
        prepare(BODY, tmp_path / "raw", tmp_path / "body")


def test_each_part_trains_a_head_of_its_own_and_fine_tuning_starts_from_all(sets, tmp_path):
    shown = write_body(tmp_path / "raw")
    prepare(BODY, tmp_path / "raw", tmp_path / "body")
    data = read_data(tmp_path / "body")
    assert data.outputs == 5 and data.space.outputs == (
        "body_whole/background",
        "body_organs/background",
        "body_whole/box",
        "body_organs/spleen",
        "body_organs/liver",
    )
    train(tmp_path / "body", tmp_path / "model", replace(LONG, steps=60, validate_every=60))
    card = read_card(tmp_path / "model")
    assert set(card.heads) == {"body_whole", "body_organs"} and card.num_classes == 5 and card.task == "body_whole+body_organs"
    assert len({one["normalisation"]["mean"] for one in card.heads.values()}) == 1
    dice = {}
    for part, labels in BODY_PARTS.items():
        image = nibabel.Nifti1Image(scan(10 * BODY.dataset)[0], np.eye(4))
        found = np.asarray(predict(tmp_path / "model", image, head=f"body_{part}").dataobj)
        for value, label in enumerate(labels, 1):
            a, b = found == value, shown["body_0"][part] == value
            dice[label] = 2 * (a & b).sum() / max(1, a.sum() + b.sum())
    assert min(dice.values()) > 0.6, dice  # The box and the organs in it, each in its own head
    train(sets / "chest", tmp_path / "tuned", start=Start(str(tmp_path / "model"), "body"))
    report = pd.read_csv(tmp_path / "tuned.run/transfer.csv")
    heads = report[report.iloc[:, 0].str.startswith("heads.")]
    assert heads.shape[0] == 4 and heads.iloc[:, -1].eq("rows of 3 of 3 classes").all()  # Background, spleen and liver
