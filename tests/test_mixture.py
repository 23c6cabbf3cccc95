"Patches of many data sets: pure in seed and step, in exact proportion, with the right classes and masks"

import math
import pickle
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from mednext_v2.data.augment import ArrayCases, PatchSampler, patch_loader
from mednext_v2.data.datasets import Dataset, get_dataset, read_annotated
from mednext_v2.data.mixture import MixtureSampler, consecutive_parts, integer_shares, known_only, mix, select_outputs, similar_names, turn_of, union_labels
from mednext_v2.intake.convert import CADS_GROUPS
from mednext_v2.training.losses import deep_supervision_loss
from training_toys import readers


def dataset(name, labels, groups="organ", **fields):
    settings = dict(
        dataset=1, title=f"Toy {name}", modality="CT", spacing=(1, 1, 1), patch=(8, 8, 8), nsd_tolerance=1, role="pretrain", licence="none", citation="none"
    )
    return Dataset(name=name, labels=labels, groups=groups, **settings | fields)


BELLY = dataset("belly", {"spleen": 1, "liver": 2, "tumour": 3}, dict(spleen="organ", liver="organ", tumour="pathology"))
CHEST = dataset("chest", {"lung": 1, "heart": 2}, ignore=3)
TRUNK = dataset("trunk", {"bone": 1, "spleen": 2})
TASKS = [BELLY, CHEST, TRUNK]
SPACE = union_labels(TASKS)


def cases(one: Dataset, count: int, seed: int, size: int = 18, channels: int = 1) -> ArrayCases:
    "Blocks of every value that the task has, over noise"
    rng, images, labels = np.random.default_rng(seed), {}, {}
    for number in range(count):
        coarse = rng.choice(one.values, (size // 3,) * 3).astype(np.uint8)
        label = coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)
        images[f"{one.name}{number}"] = rng.normal(label, 0.3, (channels, *label.shape)).astype(np.float32)
        labels[f"{one.name}{number}"] = label
    return ArrayCases(images, labels, {"train": tuple(images)}, one.ignore)


SETS = {"belly": cases(BELLY, 6, 1), "chest": cases(CHEST, 3, 2), "trunk": cases(TRUNK, 1, 3)}


def samplers(sets=SETS, augment="nnunet_elastic", batch_size=2, patch=(8, 8, 8), foreground=0.5, seed=0):
    settings = (patch, batch_size, foreground, augment, seed)
    return {name: PatchSampler(one, "train", *settings) for name, one in sets.items()}


def mixture(sampling="proportional", labels=SPACE, batch_size=4, annotated=None, allow=(), **options):
    return MixtureSampler(samplers(**options), sampling, labels, annotated, batch_size, allow)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@dataclass
class AsPrepared:
    "Arrays in memory that say what a prepared folder says"

    cases: ArrayCases
    dataset: Dataset
    mean: float = 0.0
    scheme: str = "ct"
    column: dict | None = None

    def __getattr__(self, name):
        return getattr(self.__dict__["cases"], name)

    @property
    def fingerprint(self):
        n = len(self.dataset.channels)
        known = dict(low=[-1], high=[1], mean=[self.mean], std=[1], schemes=[self.scheme])
        values = {key: value * n for key, value in known.items()} | {"nonzero": False}
        return SimpleNamespace(normalisation=lambda: values)

    @property
    def manifest(self):
        table = self.cases.manifest
        if self.column is None:
            return table
        return table.assign(annotated=[self.column.get(case, "") for case in table.case])


# ----------------------------------------------------------------------------------------------- union


def test_same_names_are_one_class_and_others_stay_apart():
    assert SPACE.labels == {"spleen": 1, "liver": 2, "tumour": 3, "lung": 4, "heart": 5, "bone": 6}
    assert SPACE.members["trunk"] == {"bone": 6, "spleen": 1}
    assert SPACE.tables == {"belly": (0, 1, 2, 3), "chest": (0, 4, 5, 7), "trunk": (0, 6, 1)}
    assert SPACE.groups == {**dict.fromkeys(SPACE.labels, "organ"), "tumour": "pathology"}
    assert (SPACE.num_classes, SPACE.ignore, SPACE.outputs) == (7, 7, ("background", *SPACE.labels))
    assert union_labels([BELLY, TRUNK]).ignore is None


def test_classes_follow_values_not_the_order_in_the_file():
    other = replace(BELLY, labels={"tumour": 3, "liver": 2, "spleen": 1})
    assert union_labels([other]) == union_labels([BELLY])


def test_one_more_data_set_leaves_earlier_numbers():
    for heads in ("shared", "own"):
        fewer, more = (union_labels(TASKS[:n], heads).labels for n in (2, 3))
        assert fewer.items() <= more.items()


def test_organ_in_one_and_pathology_in_another_is_refused():
    cyst = dataset("cyst", {"cyst": 1, "spleen": 2}, "pathology")
    message = r"'spleen' is organ in belly \(spleen\) and pathology in cyst \(spleen\): .*rename"
    with pytest.raises(ValueError, match=message):
        union_labels([BELLY, cyst])
    with pytest.raises(ValueError, match="'thing' is organ in belly .* pathology in belly"):
        union_labels([BELLY], rename={"belly": {"liver": "thing", "tumour": "thing"}})
    apart = union_labels([BELLY, cyst], rename={"cyst": {"spleen": "bad spleen"}})
    assert (apart.groups["spleen"], apart.groups["bad spleen"]) == ("organ", "pathology")
    unsure = replace(cyst, groups="unspecified")
    for datasets in ([BELLY, unsure], [unsure, BELLY]):
        groups = union_labels(datasets).groups
        assert (groups["spleen"], groups["cyst"]) == ("organ", "unspecified")
    union_labels([BELLY, cyst], "own")  # Nothing is shared


def test_rename_joins_parts_and_leaves_out():
    space = union_labels(TASKS, rename={"belly": {"tumour": "lesion"}, "chest": {"lung": "spleen", "heart": "background"}})
    assert space.labels == {"spleen": 1, "liver": 2, "lesion": 3, "bone": 4}
    assert space.tables["chest"] == (0, 1, 0, 5)
    assert space.annotated("chest").tolist() == [True, True, False, False, False]
    merged = union_labels([BELLY, CHEST], rename={"belly": {"spleen": "organs", "liver": "organs"}})
    assert merged.labels == {"organs": 1, "tumour": 2, "lung": 3, "heart": 4}
    # A class of which a case has only half is not annotated, and none of its voxels is left
    mask = merged.annotated("belly", ("liver", "tumour"))
    assert mask.tolist() == [True, False, True, False, False]
    assert merged.table("belly", mask).tolist() == [0, 0, 0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(datasets=[]), "at least one, got: none"),
        (dict(datasets=[BELLY, BELLY]), "each data set once, and at least one, got: belly, belly"),
        (dict(datasets=TASKS, heads="many"), "one of shared, own, got 'many'"),
        (dict(datasets=TASKS, rename={"head": {}}), "no data set 'head'; there are: belly, chest, trunk"),
        (dict(datasets=TASKS, rename={"chest": {"bone": "b"}}), "no label 'bone'; it has: lung, heart"),
        (dict(datasets=TASKS, rename={"chest": {"lung": ""}}), "'lung' of chest needs a name, got ''"),
    ],
)
def test_bad_unions_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        union_labels(**arguments)


def test_similar_names():
    one = dataset("one", {"kidney_left": 1, "rib_left_1": 2, "heart": 3})
    two = dataset("two", {"Left Kidney": 1, "rib_left_11": 2, "heart": 3})
    assert similar_names(union_labels([one, two])) == [("kidney_left", "Left Kidney")]
    suspicious = similar_names(union_labels([get_dataset("cads"), get_dataset("amos")]))
    assert ("kidney_right", "right_kidney") in suspicious
    assert ("adrenal_gland_left", "left_adrenal_gland") in suspicious


# ------------------------------------------------------------------------------------------ proportion


@pytest.mark.parametrize("seed", range(8))
def test_turns_are_exact_and_never_far_from_their_share(seed):
    rng = np.random.default_rng(seed)
    shares = tuple(int(n) for n in rng.integers(1, 12, rng.integers(1, 9)))
    whole, had, depth = sum(shares), Counter(), math.ceil(math.log2(len(shares)))
    for number in range(3 * whole):
        which, before = turn_of(number, shares)
        assert before == had[which]  # Counted one by one
        had[which] += 1
        for i, share in enumerate(shares):
            assert abs(had[i] - (number + 1) * share / whole) < max(depth, 1e-9)
        if (number + 1) % whole == 0:
            assert [had[i] for i in range(len(shares))] == [share * (number + 1) // whole for share in shares]


def test_turns_of_a_year_of_training():
    shares = tuple(integer_shares("sqrt", {str(n): n for n in range(1, 41)}).values())
    wanted = np.sqrt(np.arange(1, 41)) / np.sqrt(np.arange(1, 41)).sum()
    number = 10**9
    turns = dict(turn_of(n, shares) for n in range(number, number + 1000))  # The last of each
    assert set(turns) == set(range(40))
    for i, before in turns.items():
        assert before == pytest.approx(wanted[i] * (number + 1000), abs=1 / wanted[0] * wanted[i] + 6)


def test_weights():
    sizes = {"a": 900, "b": 100, "c": 25}
    assert integer_shares("proportional", sizes) == {"a": 36, "b": 4, "c": 1}
    assert integer_shares("sqrt", sizes) == {"a": 6, "b": 2, "c": 1}
    assert integer_shares({"c": 0.1, "a": 0.7, "b": 0.2}, sizes) == {"a": 7, "b": 2, "c": 1}
    assert list(integer_shares({"c": 1, "a": 1, "b": 1.0}, sizes).items()) == [("a", 1), ("b", 1), ("c", 1)]
    third = integer_shares({"a": 1 / 3, "b": 1e-9, "c": 2}, sizes)
    assert third["a"] / third["c"] == pytest.approx(1 / 6) and third["b"] / third["c"] == pytest.approx(5e-10)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("equal", "proportional, sqrt, or a weight by data set, got 'equal'"),
        ({"a": 1}, "sampling has weights for a, the data sets are a, b"),
        ({"a": 1, "b": 2, "c": 3}, "sampling has weights for a, b, c"),
        ({"a": 1, "b": 0}, "the sampling weight of b must be positive, got 0"),
        ({"a": math.nan, "b": 1}, "the sampling weight of a must be positive, got nan"),
        ({"a": 1, "b": math.inf}, "the sampling weight of b"),
        ({"a": 1, "b": "2"}, "the sampling weight of b must be positive, got '2'"),
        ({"a": True, "b": 1}, "the sampling weight of a"),
    ],
)
def test_bad_weights_are_explained(sampling, message):
    with pytest.raises(ValueError, match=message):
        integer_shares(sampling, {"a": 1, "b": 2})


def test_batches_keep_the_weights():
    source = mixture({"belly": 0.5, "chest": 0.3, "trunk": 0.2}, batch_size=3)
    seen = Counter(source.member(step, index)[0] for step in range(100) for index in range(3))
    assert seen == {"belly": 150, "chest": 90, "trunk": 60}
    assert mixture("proportional").shares == {"belly": 6, "chest": 3, "trunk": 1}


# ---------------------------------------------------------------------------------------------- stream


def test_batch_depends_on_seed_and_step_alone():
    one, two = mixture(), mixture()
    forwards = [one.batch(step) for step in range(6)]
    np.random.seed(1)
    torch.manual_seed(1)
    backwards = [two[step] for step in reversed(range(6))][::-1]
    assert all(equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not equal(forwards[0][:2], forwards[1][:2])
    assert not equal(forwards[0][:2], mixture(seed=1).batch(0)[:2])
    image, label, annotated = forwards[0]
    assert (image.dtype, label.dtype, annotated.dtype) == (torch.float32, torch.int64, torch.bool)
    assert (image.shape, label.shape, annotated.shape) == ((4, 1, 8, 8, 8), (4, 1, 8, 8, 8), (4, 7))


@pytest.mark.parametrize(
    ("workers", "start", "method", "on_device"),
    [(0, 3, None, False), (1, 0, "fork", False), (2, 2, "fork", False)] + [(workers, 1, None, True) for workers in range(3)],
)
def test_stream_is_the_same_for_any_workers_and_start(workers, start, method, on_device):
    source = mixture("sqrt", annotated={"belly": {"belly1": ("liver",), "belly2": ("liver", "spleen")}})
    wanted = [source.batch(step) for step in range(6)]
    found = list(patch_loader(source, start, 6, workers, method=method, augment_on_device=on_device))
    assert all(equal(a, b) for a, b in zip(found, wanted[start:], strict=True))
    assert readers() == []


def test_stream_is_the_same_through_a_pickle():
    source = mixture()
    source.batch(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint and equal(copy.batch(3), source.batch(3))


def test_processes_share_a_batch():
    source = mixture(batch_size=4)
    for step in range(3):
        parts = [[source.sample(step, index) for index in range(rank, 4, 2)] for rank in range(2)]
        rebuilt = [torch.stack([parts[i % 2][i // 2][part] for i in range(4)]) for part in range(3)]
        assert equal(rebuilt, source.batch(step))
    assert equal(source.augment_regions(1, source.regions(1)[1::2]), [part[1::2] for part in source.batch(1)])


def by_name(space, name, one: Dataset, label: torch.Tensor) -> torch.Tensor:
    "The classes of a data set's own label, voxel by voxel and by name"
    names = {value: label for label, value in one.labels.items()}
    found = []
    for value in label.flatten().tolist():
        if value == one.ignore:
            found.append(space.ignore)
        else:
            found.append(space.labels[names[value]] if value else 0)
    return torch.tensor(found).view_as(label)


def test_every_data_set_gives_its_own_stream_with_its_labels_by_name():
    own, source = samplers(batch_size=2), mixture("sqrt", batch_size=3)
    given, shown = Counter(), set()
    for step in range(16):
        image, label, annotated = source.batch(step)
        for index in range(3):
            name = source.member(step, index)[0]
            alone = own[name].batch(given[name] // 2)
            assert torch.equal(image[index], alone[0][given[name] % 2])
            one = next(t for t in TASKS if t.name == name)
            wanted = by_name(SPACE, name, one, alone[1][given[name] % 2])
            assert torch.equal(label[index], wanted)
            shown.update(wanted.unique().tolist())
            assert annotated[index].tolist() == [True, *(n in one.labels for n in SPACE.labels)]
            given[name] += 1
    assert shown == set(range(8)) and set(given) == set(SETS)


def test_weights_do_not_change_what_is_in_a_stream():
    few, many = mixture({"belly": 1, "chest": 1, "trunk": 1}), mixture({"belly": 9, "chest": 2, "trunk": 1})

    def patches(source):
        places = [(step, i) for step in range(8) for i in range(4) if source.member(step, i)[0] == "chest"]
        return [source.sample(*place) for place in places[:5]]

    assert all(equal(a, b) for a, b in zip(patches(few), patches(many), strict=True))


def test_the_share_of_patches_on_a_class_holds_within_each_data_set():
    "Counted over the batch, every second patch on a class and every second of a set meet never or always"
    sets = {"belly": SETS["belly"], "chest": SETS["chest"]}
    source = MixtureSampler(samplers(sets, foreground=0.5), {"belly": 1, "chest": 1}, SPACE, batch_size=2)
    aimed = Counter()
    for step in range(40):
        for index in range(2):
            name, at = source.member(step, index)
            aimed[name] += source.samplers[name].is_foreground(*at)
    assert aimed == {"belly": 20, "chest": 20}


def test_a_mix_seeds_each_data_set_by_its_name():
    fewer = mix({"chest": SETS["chest"]}, (8, 8, 8), labels=SPACE, augment="none", seed=3)
    more = mix(SETS, (8, 8, 8), labels=SPACE, augment="none", seed=3)
    assert more.samplers["chest"].fingerprint == fewer.samplers["chest"].fingerprint
    assert len({one.seed for one in more.samplers.values()}) == 3
    assert mix(SETS, (8, 8, 8), labels=SPACE, augment="none", seed=4).fingerprint != more.fingerprint
    assert (more.batch_size, more.augment, more.foreground, more.seed) == (2, "none", 0.33, None)
    prepared = {one.name: AsPrepared(SETS[one.name], one) for one in TASKS}
    assert mix(prepared, (8, 8, 8)).labels == SPACE


# --------------------------------------------------------------------------------------- partial labels


def test_cases_that_lack_labels():
    lacking = {"belly0": ("liver",), "belly1": ("spleen", "tumour")}
    sampling = {"belly": 8, "chest": 1, "trunk": 1}
    source = mixture(sampling, annotated={"belly": lacking}, augment="none")
    plain = mixture(sampling, augment="none")
    seen = Counter()
    for step in range(12):
        batch, whole = source.batch(step), plain.batch(step)
        for index in range(4):
            name, case = source.locate(step, index)[0].split("/")
            label, mask = batch[1][index], batch[2][index]
            one = next(t for t in TASKS if t.name == name)
            allowed = [SPACE.labels[n] for n in lacking.get(case, one.labels)]
            assert mask.nonzero().flatten().tolist() == [0, *sorted(allowed)]
            kept = torch.isin(whole[1][index], torch.tensor([*allowed, SPACE.ignore]))
            assert torch.equal(label, torch.where(kept, whole[1][index], 0))
            seen[case] += 1
    assert seen["belly0"] and seen["belly1"] and seen["chest0"] + seen["chest1"] + seen["chest2"]
    # The loss accepts what it gets
    image, label, annotated = source.batch(0)
    deep_supervision_loss(torch.zeros(4, 7, 8, 8, 8), label, annotated=annotated, ignore=SPACE.ignore)


def test_annotated_table_from_a_file_and_a_manifest(tmp_path):
    path = tmp_path / "annotated.csv"
    path.write_text("case,annotated\n001,abdomen\n002,tumour liver\nNA,\n")
    parts = {"abdomen": ("spleen", "liver")}
    assert read_annotated(path, BELLY, parts) == {"001": ("spleen", "liver"), "002": ("liver", "tumour")}
    noted = AsPrepared(SETS["belly"], BELLY, column={"belly3": "tumour"})
    source = mixture(sets=SETS | {"belly": noted})
    assert source.masks["belly"]["belly3"].tolist() == SPACE.annotated("belly", ["tumour"]).tolist()
    assert set(source.masks["belly"]) == {"belly3"}
    # What is given by hand wins over the column
    given = mixture(sets=SETS | {"belly": noted}, annotated={"belly": {"belly1": ["liver"]}})
    assert set(given.masks["belly"]) == {"belly1"}


def test_parts_of_cads():
    cads = get_dataset("cads")
    parts = consecutive_parts(cads, CADS_GROUPS)
    assert [len(labels) for labels in parts.values()] == [17, 24, 18, 21, 24, 15, 9, 29, 10]
    assert parts["552"][0] == "vertebrae_l5" and parts["559"][0] == "subcutaneous_tissue"
    table = pd.DataFrame({"case": ["a"], "annotated": ["551 552 555"]})
    space = union_labels([cads])
    mask = space.annotated("cads", read_annotated(table, cads, parts)["a"])
    assert mask.sum() == 1 + 17 + 24 + 24
    assert mask[space.labels["rib_left_1"]] and not mask[space.labels["heart"]]
    # As pandas reads a column where each case has one part
    numbers = pd.DataFrame({"case": ["a", "b"], "annotated": [551, 552]})
    assert len(read_annotated(numbers, cads, parts)["b"]) == 24
    with pytest.raises(ValueError, match="cads has 167 labels, the parts have 17"):
        consecutive_parts(cads, {551: 17})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"case": ["a"]}, "lacks column annotated"),
        ({"case": ["a", "a"], "annotated": ["liver", "spleen"]}, "case a twice"),
        ({"case": ["a"], "annotated": ["liver lung"]}, "case a: 'lung' is no label of belly"),
    ],
)
def test_bad_annotated_tables_are_explained(rows, message, tmp_path):
    path = tmp_path / "annotated.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    with pytest.raises(ValueError, match=f"annotated.csv.*{message}"):
        read_annotated(path, BELLY)


@pytest.mark.parametrize(
    ("annotated", "message"),
    [
        ({"head": {}}, "annotated: no data set 'head'"),
        ({"belly": {"belly9": ["liver"]}}, "data set belly has no case 'belly9'"),
        ({"belly": {"belly0": ["lung"]}}, "belly has no label 'lung'; it has: spleen, liver, tumour"),
        ({"belly": {"belly0": []}}, "a case without annotated classes cannot be used"),
    ],
)
def test_bad_annotations_are_explained(annotated, message):
    with pytest.raises(ValueError, match=message):
        mixture(annotated=annotated)


# ---------------------------------------------------------------------------------------------- refusals


def prepared(name="chest", channels=("CT",), count=None, mean=0.0, scheme="ct", **fields):
    one = replace(next(t for t in TASKS if t.name == name), channels=channels, **fields)
    return AsPrepared(cases(one, 2, 4, channels=count or len(channels)), one, mean, scheme)


@pytest.mark.parametrize(
    ("other", "trait", "shown"),
    [
        (dict(spacing=(2, 2, 2)), "spacing", r"\(1, 1, 1\) and \(2, 2, 2\)"),
        (dict(modality="MR"), "modality", "CT and MR"),
        (dict(channels=("contrast CT",)), "channels", r"\('CT',\) and \('contrast CT',\)"),
        (dict(mean=3.0), "normalisation", r"CT ct \(.*mean 0, std 1\) and CT ct \(.*mean 3, std 1\)"),
    ],
)
def test_what_differs_is_refused_unless_it_is_meant(other, trait, shown):
    sets = {"belly": prepared("belly"), "chest": prepared(**other)}
    both = {trait} | ({"normalisation"} if trait == "channels" else set())
    with pytest.raises(ValueError, match=f"belly and chest differ in {trait}, {shown}: .*allow='{trait}'"):
        mixture(sets=sets, allow=both - {trait})
    allowed = mixture(sets=sets, allow=both)
    assert allowed.fingerprint != mixture(sets={"belly": sets["belly"], "chest": prepared()}).fingerprint
    allowed.batch(0)


def test_a_z_score_has_no_constants_to_differ_in():
    sets = {"belly": prepared("belly", scheme="zscore"), "chest": prepared(scheme="zscore", mean=5.0)}
    assert mixture(sets=sets).batch(0)[0].shape[0] == 4


def test_more_channels_are_refused_whatever_is_allowed():
    sets = {"belly": prepared("belly"), "chest": prepared(channels=("CT", "PET"))}
    with pytest.raises(ValueError, match="belly and chest differ in number of channels, 1 and 2: make"):
        mixture(sets=sets, allow=("channels", "modality", "spacing", "normalisation"))
    sets = {"belly": SETS["belly"], "chest": cases(CHEST, 1, 0, channels=2)}
    with pytest.raises(ValueError, match="number of channels, 1 and 2"):
        mixture(sets=sets)


def test_channels_of_the_same_names_are_put_in_order():
    first, turned = prepared("belly", ("CT", "PET")), prepared("chest", ("PET", "CT"))
    source = mixture(sets={"belly": first, "chest": turned}, augment="none")
    own = samplers({"chest": turned}, augment="none")["chest"]
    places = [(s, i) for s in range(3) for i in range(4) if source.member(s, i)[0] == "chest"]
    for number, place in enumerate(places):
        assert torch.equal(source.sample(*place)[0], own.batch(number // 2)[0][number % 2].flip(0))


TURNED = replace(BELLY, labels={"liver": 1, "spleen": 2, "tumour": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(allow=("colour",)), "allow: 'colour' is none of channels, modality, spacing, normalisation"),
        (dict(batch_size=0), "batch_size must be given, and positive"),
        (dict(sets={}), "no data set to draw patches from"),
        (dict(labels=union_labels([BELLY, CHEST])), "no data set 'trunk' in these labels; there are: belly"),
        (dict(sets={"belly": AsPrepared(SETS["belly"], TURNED)}), "belly was prepared with other"),
        (dict(sets={"chest": AsPrepared(SETS["chest"], replace(CHEST, ignore=None))}), "chest was prepared"),
    ],
)
def test_bad_mixtures_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        mixture(**options)


def test_patches_must_have_one_size():
    parts = samplers()
    parts["trunk"] = PatchSampler(SETS["trunk"], "train", (8, 8, 10), 2, augment="none")
    with pytest.raises(ValueError, match=r"belly and trunk differ in patch, \(8, 8, 8\) and \(8, 8, 10\)"):
        MixtureSampler(parts, "sqrt", SPACE)
    parts["trunk"] = PatchSampler(SETS["trunk"], "train", (8, 8, 8), 3, augment="none")
    with pytest.raises(ValueError, match="batch_size must be given"):
        MixtureSampler(parts, "sqrt", SPACE)
    assert MixtureSampler(parts, "sqrt", SPACE, batch_size=5).batch(1)[0].shape[0] == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_an_undeclared_value_names_step_data_set_and_case(workers):
    broken = cases(TRUNK, 1, 3)
    broken.labels["trunk0"][:] = 5
    sampling = {"belly": 1, "chest": 1, "trunk": 2}
    source = mixture(sampling, sets=SETS | {"trunk": broken}, batch_size=1, augment="none")
    step = next(s for s in range(9) if source.member(s, 0)[0] == "trunk")
    message = f"^step {step}, patch 0, data set trunk: case trunk0: .* values 5 to 5, its data set has 0 to 2$"
    with pytest.raises(RuntimeError, match=message):
        list(patch_loader(source, step, 9, workers))


def test_a_case_that_cannot_be_read_names_the_step_of_the_mixture():
    class Gone(AsPrepared):
        def label(self, case):
            raise OSError("no such file")

    parts = samplers(SETS | {"trunk": Gone(SETS["trunk"], TRUNK)})
    source = MixtureSampler(parts, {"belly": 1, "chest": 1, "trunk": 1}, SPACE, batch_size=3)
    index = next(i for i in range(3) if source.member(7, i)[0] == "trunk")
    message = f"^step 7, patch {index}, data set trunk: .*case trunk0: OSError: no such file"
    with pytest.raises(RuntimeError, match=message):
        source.batch(7)


# -------------------------------------------------------------------------------------------- fingerprint


def test_fingerprint_changes_with_all_that_decides_the_batches():
    changed = {name: one for name, one in SETS.items()}
    labels = {case: label.copy() for case, label in SETS["trunk"].labels.items()}
    labels["trunk0"][0, 0, 0] = 1 - labels["trunk0"][0, 0, 0].clip(0, 1)
    changed["trunk"] = replace(SETS["trunk"], labels=labels)
    turned = dict(reversed(SETS.items()))
    kinds = [
        mixture(),
        mixture("sqrt"),
        mixture({"belly": 6, "chest": 3, "trunk": 2}),
        mixture(batch_size=3),
        mixture(seed=1),
        mixture(augment="none"),
        mixture(foreground=0.25),
        mixture(patch=(8, 8, 6)),
        mixture(sets=changed),
        mixture(sets=turned),
        mixture(labels=union_labels(TASKS[::-1])),
        mixture(labels=union_labels(TASKS, "own")),
        mixture(labels=union_labels(TASKS, rename={"trunk": {"spleen": "spleen 2"}})),
        mixture(annotated={"belly": {"belly0": ["liver"]}}),
        mixture(annotated={"belly": {"belly0": ["spleen"]}}),
        mixture(annotated={"belly": {"belly1": ["liver"]}}),
        mixture(allow="spacing"),
    ]
    assert len({one.fingerprint for one in kinds}) == len(kinds)
    assert mixture().fingerprint == mixture({"belly": 0.6, "chest": 0.3, "trunk": 0.1}).fingerprint


# --------------------------------------------------------------------------------------------- own heads


OWN = union_labels(TASKS, "own")


def test_own_heads_have_their_own_channels():
    backgrounds = [f"{name}/background" for name in SETS]
    assert OWN.outputs == (*backgrounds, *OWN.labels) and len(OWN.outputs) == 10
    assert list(OWN.labels) == [f"{t.name}/{label}" for t in TASKS for label in t.labels]
    for one in TASKS:
        wanted = [f"{one.name}/{label}" for label in ("background", *one.labels)]
        assert [OWN.outputs[channel] for channel in OWN.head(one.name)] == wanted
    assert SPACE.head("trunk") == [0, 6, 1]


def test_own_heads_are_each_their_own_softmax():
    "The loss of a mixed batch is that of each sample with nothing but its own head"
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 10, 4, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    names = ["trunk", "belly", "chest", "belly", "trunk", "chest"]
    speaks = torch.from_numpy(np.stack([OWN.annotated(name) for name in names]))
    labels, alone = [], 0
    for i, name in enumerate(names):
        own = torch.randint(0, len(OWN.members[name]) + 1, (1, 1, 4, 4, 4), generator=generator)
        labels.append(torch.from_numpy(OWN.table(name).astype(np.int64))[own])
        logits = scores[i : i + 1, OWN.head(name)].log_softmax(1)
        alone = alone + torch.nn.functional.nll_loss(logits, own[:, 0]) / 6
    selected = select_outputs(OWN, [scores, scores[..., :2]], speaks)
    assert [tuple(s.shape) for s in selected] == [(6, 8, 4, 4, 4), (6, 8, 4, 4, 2)]
    together = torch.nn.functional.nll_loss(selected[0].log_softmax(1), torch.cat(labels)[:, 0])
    torch.testing.assert_close(together, alone)
    ours, wanted = (torch.autograd.grad(loss, scores, retain_graph=True)[0] for loss in (together, alone))
    torch.testing.assert_close(ours, wanted)
    # The project's loss moves no output of another data set
    loss = deep_supervision_loss(selected[0], torch.cat(labels), annotated=speaks)
    gradient = torch.autograd.grad(loss, scores)[0]
    for i, name in enumerate(names):
        moved = gradient[i].abs().sum((1, 2, 3)).nonzero().flatten().tolist()
        assert moved == sorted(OWN.head(name))


def test_own_heads_hold_in_half_precision_and_for_partial_cases():
    mask = torch.from_numpy(OWN.annotated("belly", ["tumour"]))[None]
    scores = torch.zeros(1, 10, 2, 2, 2, dtype=torch.float16, requires_grad=True)
    nothing = torch.zeros(1, 1, 2, 2, 2).long()
    deep_supervision_loss(select_outputs(OWN, scores, mask), nothing, annotated=mask).backward()
    assert torch.isfinite(scores.grad).all()
    found = scores.grad[0].mean((1, 2, 3))[OWN.head("belly")]
    assert found[3] > 0 > found[0] and torch.allclose(found[0], found[1])  # Spleen and liver are unknown


def test_a_failed_step_with_own_heads_replays_with_its_own_loss(tmp_path):
    from mednext_v2.models.registry import create
    from mednext_v2.training.recipe import get_recipe
    from mednext_v2.training.replay import read_bundle, replay, write_bundle
    from mednext_v2.training.trainer import loss_options

    sampler = mixture(labels=OWN, patch=(16, 16, 16))
    network = create("unet", 1, len(OWN.outputs), deep_supervision=True, filters=(4, 8, 8))
    recipe, batch = get_recipe("smoke", patch=(16, 16, 16)), sampler.batch(0)
    options = loss_options(recipe, sampler)
    weights = network.state_dict()
    fine = write_bundle(tmp_path, 1, "loss is nan", recipe, network, weights, batch, options, sampler)
    assert replay(fine).empty and read_bundle(fine)[0]["labels"]["heads"] == "own"
    batch[0][0, 0, 0, 0, 0] = np.nan
    broken = write_bundle(tmp_path, 2, "loss is nan", recipe, network, weights, batch, options, sampler)
    assert replay(broken).stage.iloc[0] == "image" and "loss" in set(replay(broken).stage)


def test_a_network_with_other_outputs_is_refused():
    for space, wanted in ((SPACE, 7), (OWN, 10)):
        speaks = torch.ones(1, space.num_classes, dtype=torch.bool)
        with pytest.raises(ValueError, match=f"the network has 3 outputs, these labels need {wanted}"):
            select_outputs(space, torch.zeros(1, 3, 2, 2, 2), speaks)


def test_known_only_asks_each_sample():
    rng = np.random.default_rng(0)
    prediction, speaks = rng.integers(0, 7, (3, 4, 5, 6)), rng.random((3, 7)) < 0.5
    speaks[:, 0] = True
    found = known_only(torch.from_numpy(prediction), torch.from_numpy(speaks))
    for i, voxels in enumerate(prediction):
        assert np.array_equal(found[i], np.vectorize(lambda v: v if speaks[i, v] else 0)(voxels))


# ------------------------------------------------------------------------------------------- learning


def shapes(seed: int, size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    "A bright ball (1) and a dark cube (2) in noise"
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    ball = rng.uniform(4, 6, 3)[:, None, None, None]
    label = (np.linalg.norm(grid - ball, axis=0) < 3.5).astype(np.uint8)
    x, y, z = rng.integers(9, 12, 3)
    label[x : x + 4, y : y + 4, z : z + 4] = 2
    return (np.array([0, 1, -1])[label] + rng.normal(0, 0.3, label.shape)).astype(np.float32)[None], label


def halves() -> tuple[dict[str, ArrayCases], list[Dataset]]:
    "Two data sets of the same scenes: one labelled the balls, the other the cubes"
    sets, datasets = {}, []
    for number, (name, label) in enumerate({"round": "ball", "square": "cube"}.items(), 1):
        scenes = {f"{name}{i}": shapes(100 * number + i) for i in range(4)}
        images = {case: image for case, (image, _) in scenes.items()}
        labels = {case: (truth == number).astype(np.uint8) for case, (_, truth) in scenes.items()}
        sets[name] = ArrayCases(images, labels, {"train": tuple(images)})
        datasets.append(dataset(name, {label: 1}))
    return sets, datasets


@cache
def train(heads: str, marginal: bool, steps: int = 80) -> dict[str, tuple[float, float]]:
    "Dice and certainty on new scenes, after two half-annotated data sets, the cubes three times as often"
    sets, datasets = halves()
    space = union_labels(datasets, heads)
    sampling = {"round": 1, "square": 3}
    source = mix(sets, (12, 12, 12), 4, sampling, space, foreground=0.0, augment="none")
    torch.manual_seed(0)
    layers = [torch.nn.Conv3d(1, 8, 3, padding=1), torch.nn.Conv3d(8, 8, 3, padding=1)]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), torch.nn.Conv3d(8, len(space.outputs), 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for image, label, annotated in patch_loader(source, 0, steps):
        outputs = select_outputs(space, model(image), annotated)
        loss = deep_supervision_loss(outputs, label, annotated=annotated if marginal else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scenes, found = [shapes(900 + i) for i in range(4)], {}
    with torch.no_grad():
        logits = model(torch.from_numpy(np.stack([image for image, _ in scenes])))
    truth = np.stack([label for _, label in scenes])
    for number, (name, label) in enumerate({"round": "ball", "square": "cube"}.items(), 1):
        scores = logits[:, space.head(name)] if heads == "own" else logits
        which = 1 if heads == "own" else space.labels[label]
        true, predicted = truth == number, scores.argmax(1).numpy() == which
        dice = 2 * (predicted & true).sum() / (predicted.sum() + true.sum())
        found[label] = float(dice), float(scores.softmax(1)[:, which].numpy()[true].mean())
    return found


@pytest.mark.parametrize("heads", ["shared", "own"])
def test_two_half_annotated_data_sets_teach_both_classes(heads):
    found = train(heads, marginal=True)
    assert all(dice > 0.8 and certainty > 0.65 for dice, certainty in found.values()), found


def test_without_the_marginal_loss_each_data_set_denies_what_the_other_teaches():
    plain, marginal = (np.mean([c for _, c in train("shared", kind).values()]) for kind in (False, True))
    assert plain < marginal - 0.2
