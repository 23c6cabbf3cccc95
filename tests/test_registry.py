"The registry of public data sets: names, counts, groups and rules against what is published"

import re
from collections import Counter

import numpy as np
import pytest
import yaml

from mednext_v2.core import root
from mednext_v2.data.datasets import load_datasets, read_splits, write_description
from mednext_v2.intake.convert import CONVERTERS

TASKS = load_datasets()
MADE = ("seeds", "people")
MINI = [dataset for dataset in TASKS.values() if dataset.source in MADE]
PUBLIC = {name: dataset for name, dataset in TASKS.items() if dataset.source not in MADE}

# Labels without the background, as published by the sources that the entries' notes name. A new entry needs no line here: what every entry must
# have is checked of all of them
COUNTS = {
    "cads": 167,
    "pediatric_ct_seg": 29,
    "skm_tea": 6,
    "toothfairy2": 42,
    "toothfairy3": 77,
    "brainmetshare": 1,
    "panther": 2,
    "panther_t2": 2,
    "ctspine1k": 25,
    "amos": 15,
    "kits": 3,
    "lits": 2,
    "btcv": 13,
    "acdc": 3,
    "brats": 3,
}
# And one of two ToothFairies
FINETUNING = ("pediatric_ct_seg", "skm_tea", "brainmetshare", "panther", "ctspine1k")
BENCHMARKS = ("amos", "kits", "lits", "btcv", "acdc", "brats")
# A word that makes a label or a region pathology, unless an organ is named with it
DISEASE = re.compile(r"tumour|lesion|cyst|metasta|oedema|haemorrhage|necro|mass|core")


def write(path, **datasets):
    "A registry file of these entries, and its path"
    path.write_text(yaml.safe_dump(datasets, sort_keys=False), encoding="utf-8")
    return path


def fields(name: str) -> dict:
    "The fields of an entry, as the file has them"
    return yaml.safe_load((root() / "data" / "datasets.yaml").read_text(encoding="utf-8"))[name]


def test_mini_and_public_entries():
    assert MINI and all(900 <= dataset.dataset < 1000 for dataset in MINI)
    assert {name: len(PUBLIC[name].labels) for name in COUNTS} == COUNTS


@pytest.mark.parametrize("name", PUBLIC)
def test_labels_are_listed_in_the_order_of_their_values(name):
    labels = PUBLIC[name].labels
    assert list(labels.values()) == list(range(1, len(labels) + 1))
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", label) for label in labels)


@pytest.mark.parametrize("name", PUBLIC)
def test_entry_is_filled_in(name):
    dataset, keys = PUBLIC[name], fields(name)
    assert dataset.url.startswith("https://") and " " not in dataset.url
    assert dataset.licence and dataset.citation and dataset.note
    assert {"split", "url", "licence", "citation", "note", "nsd_tolerance"} <= set(keys)
    assert dataset.source in ("raw", name) and (dataset.source == "raw" or name in CONVERTERS)


def test_published_entries_keep_role_source_and_tolerance():
    assert {name for name in COUNTS if PUBLIC[name].role == "pretrain"} == {"cads"}
    assert {name for name in COUNTS if PUBLIC[name].source == "raw"} == set(BENCHMARKS)
    assert {PUBLIC[name].nsd_tolerance for name in COUNTS} == {1.0}


@pytest.mark.parametrize("name", PUBLIC)
def test_groups_cover_every_label_and_region(name):
    assert set(PUBLIC[name].groups) == {*PUBLIC[name].labels, *PUBLIC[name].regions}


@pytest.mark.parametrize("name", COUNTS)
def test_groups_follow_the_words(name):
    dataset = PUBLIC[name]
    for label, group in dataset.groups.items():
        sick = DISEASE.search(label) and not label.startswith("kidney_and_")
        assert group == ("pathology" if sick else "organ"), label


def test_pathology_sets():
    sick = {name for name in COUNTS if "pathology" in PUBLIC[name].groups.values()}
    assert sick == {"brainmetshare", "panther", "panther_t2", "kits", "lits", "brats"}


@pytest.mark.parametrize("name", PUBLIC)
def test_patch_fits_a_five_level_network_and_the_memory_of_128_cubed(name):
    patch = np.array(PUBLIC[name].patch)
    assert (patch % 16 == 0).all() and patch.prod() <= 128**3
    assert patch.prod() >= 0.4 * 128**3
    coarse, fine = np.argmax(PUBLIC[name].spacing), np.argmin(PUBLIC[name].spacing)
    assert patch[coarse] <= patch[fine]  # Thick slices get the short side


def test_numbers_and_folders_are_unique_and_sortable():
    assert all(n == 1 for n in Counter(dataset.dataset for dataset in TASKS.values()).values())
    assert all(n == 1 for n in Counter(dataset.folder for dataset in TASKS.values()).values())
    assert all(re.fullmatch(r"Dataset\d{3}_[\w.-]+", dataset.folder) for dataset in TASKS.values())


def test_benchmark_folders_are_those_of_nnunet():
    assert [PUBLIC[name].folder for name in BENCHMARKS] == [
        "Dataset219_AMOS2022_postChallenge_task2",
        "Dataset220_KiTS2023",
        "Dataset029_LiTS",
        "Dataset017_AbdominalOrganSegmentation",
        "Dataset027_ACDC",
        "Dataset137_BraTS2021",
    ]


def test_classes_of_the_six_finetuning_sets():
    five = sum(len(PUBLIC[name].labels) for name in FINETUNING)
    assert five + len(PUBLIC["toothfairy2"].labels) == 105
    assert abs(five + len(PUBLIC["toothfairy3"].labels) - 139) <= 1  # "about 139": 140 with all 77 classes


# ---- CADS


def test_cads_is_nine_parts_in_order():
    sizes = dict(zip(range(551, 560), (17, 24, 18, 21, 24, 15, 9, 29, 10)))
    assert sum(sizes.values()) == 167
    names = list(PUBLIC["cads"].labels)
    ends = np.cumsum(list(sizes.values()))
    first = [names[end - size] for end, size in zip(ends, sizes.values())]
    last = [names[end - 1] for end in ends]
    assert " ".join(first) == ("spleen vertebrae_l5 esophagus humerus_left rib_left_1 spinal_canal white_matter oar_a_carotid_l subcutaneous_tissue")
    assert " ".join(last) == (
        "lung_lower_lobe_right vertebrae_c1 face iliopsoas_right rib_right_12 left_rectus_abdominis head_muscles oar_pituitary spinal_cord"
    )


def test_cads_values_inside_the_parts():
    labels = PUBLIC["cads"].labels
    spine = [f"l{i}" for i in range(5, 0, -1)] + [f"t{i}" for i in range(12, 0, -1)]
    spine += [f"c{i}" for i in range(7, 0, -1)]  # From below, unlike CTSpine1K
    assert [labels[f"vertebrae_{end}"] for end in spine] == list(range(18, 42))
    ribs = [f"rib_{side}_{i}" for side in ("left", "right") for i in range(1, 13)]
    assert [labels[rib] for rib in ribs] == list(range(81, 105))
    marks = {"aorta": 7, "brain": 50, "colon": 57, "sacrum": 70, "sternum": 115, "csf": 122, "blood": 127}
    marks |= {"oar_brainstem": 133, "oar_glnd_thyroid": 148, "bones": 162, "breast_implant": 165}
    assert marks.items() <= labels.items()


def test_cads_comments_agree_with_the_parts():
    text = (root() / "data" / "datasets.yaml").read_text(encoding="utf-8")
    block = text.split("\ncads:")[1].split("  groups:")[0]
    parts = re.split(r"# (55\d) [a-z ,]+\n", block)[1:]
    sizes = {int(part): len(re.findall(r"\w+: \d+", body)) for part, body in zip(parts[::2], parts[1::2])}
    assert sizes == dict(zip(range(551, 560), (17, 24, 18, 21, 24, 15, 9, 29, 10)))


@pytest.mark.parametrize(
    "case, patient",
    [
        ("train_1_a_1", "train_1"),
        ("valid_20_b_2", "valid_20"),
        ("volume-covid19-A-0700_day003", "volume-covid19-A-0700"),
        ("10000018", "10000018"),
        ("1.3.6.1.4.1.14519.5.2.1.6279", "1.3.6.1.4.1.14519.5.2.1.6279"),
    ],
)
def test_cads_patients(case, patient):
    assert re.search(PUBLIC["cads"].patient, case)[1] == patient


# ---- The others, against rules written down here once more


def toothfairy(raw: int) -> str:
    "What a raw value of ToothFairy 2 and 3 means, by the FDI number of the tooth"
    if raw > 110:
        return f"{toothfairy(raw - 100)}_pulp"
    sides = {1: "upper_right", 2: "upper_left", 3: "lower_left", 4: "lower_right"}
    teeth = ["central_incisor", "lateral_incisor", "canine"]
    teeth += ["first_premolar", "second_premolar", "first_molar", "second_molar", "third_molar"]
    return f"{sides[raw // 10]}_{teeth[raw % 10 - 1]}"


def test_toothfairy2_values_follow_nnunets_conversion():
    labels = PUBLIC["toothfairy2"].labels
    shifts = {1: 0, 2: 2, 3: 4, 4: 6}  # Raw 21 becomes 19, 31 becomes 27, 41 becomes 35
    for quadrant, shift in shifts.items():
        for raw in range(10 * quadrant + 1, 10 * quadrant + 9):
            assert labels[toothfairy(raw)] == raw - shift
    others = ["lower_jawbone", "upper_jawbone", "pharynx", "bridge", "crown", "implant"]
    assert [labels[name] for name in others] == [1, 2, 7, 8, 9, 10]


def test_toothfairy3_adds_canals_and_pulps_to_toothfairy2():
    labels = PUBLIC["toothfairy3"].labels
    assert PUBLIC["toothfairy2"].labels.items() <= labels.items()
    pulps = [raw for quadrant in (11, 12, 13, 14) for raw in range(10 * quadrant + 1, 10 * quadrant + 9)]
    assert [labels[toothfairy(raw)] for raw in pulps] == list(range(46, 78))
    assert labels["left_mandibular_incisive_canal"] == 43 and labels["lingual_canal"] == 45


def test_ctspine1k_counts_downwards_from_the_neck():
    labels = PUBLIC["ctspine1k"].labels
    ends = ("c1", "c7", "t1", "t12", "l1", "l6")
    assert [labels[f"vertebra_{end}"] for end in ends] == [1, 7, 8, 19, 20, 25]


def test_pediatric_and_knee_values():
    organs, knee = PUBLIC["pediatric_ct_seg"].labels, PUBLIC["skm_tea"].labels
    assert (organs["skin"], organs["bones"]) == (28, 29)  # Last, since they are painted first
    assert knee == {
        "patellar_cartilage": 1,
        "femoral_cartilage": 2,
        "tibial_cartilage_medial": 3,
        "tibial_cartilage_lateral": 4,
        "meniscus_medial": 5,
        "meniscus_lateral": 6,
    }
    assert PUBLIC["skm_tea"].spacing == (0.8, 0.3125, 0.3125)  # Slices lie along left-right


def test_regions_are_nnunets():
    brats, kits = PUBLIC["brats"], PUBLIC["kits"]
    assert list(brats.regions.values()) == [(1, 2, 3), (2, 3), (3,)] and brats.class_order == (1, 2, 3)
    assert list(brats.regions) == ["whole_tumour", "tumour_core", "enhancing_tumour"]
    assert brats.channels == ("T1", "T1ce", "T2", "Flair")
    assert list(kits.regions.values()) == [(1, 2, 3), (2, 3), (2,)] and kits.class_order == (1, 3, 2)
    assert brats.num_classes == kits.num_classes == 3
    assert not any(PUBLIC[name].regions for name in COUNTS if name not in ("brats", "kits"))


def test_split_rules_and_patients():
    rules = {name: PUBLIC[name].split for name in COUNTS}
    published = {name for name, rule in rules.items() if rule == "files"}
    assert published == {"cads", "skm_tea", "ctspine1k"}
    dealt = {name for name, rule in rules.items() if rule == "fivefold"}
    assert dealt == {*BENCHMARKS, "pediatric_ct_seg", "toothfairy2", "brainmetshare", "panther"}
    assert re.search(PUBLIC["acdc"].patient, "patient012_frame13")[1] == "patient012"
    assert re.search(PUBLIC["panther"].patient, "10000_0001")[1] == "10000"


def test_frames_of_an_acdc_patient_stay_together(tmp_path):
    dataset = PUBLIC["acdc"]
    ids = [f"patient{p:03d}_frame{f:02d}" for p in range(1, 21) for f in (1, 7 + p % 5)]
    for part in ("imagesTr", "labelsTr", "labelsTs", "imagesTs"):
        (tmp_path / dataset.folder / part).mkdir(parents=True)
    for id in ids:
        (tmp_path / dataset.folder / "labelsTr" / f"{id}.nii.gz").touch()
    (tmp_path / dataset.folder / "labelsTs" / "patient101_frame01.nii.gz").touch()
    write_description(dataset, tmp_path / dataset.folder, len(ids))
    splits = read_splits(dataset, tmp_path)
    patients = {split: {id[:10] for id in splits[split]} for split in ("train", "val")}
    assert not patients["train"] & patients["val"]
    assert (len(splits["train"]), len(splits["val"])) == (32, 8)


# ---- Names, numbers and labels stay the user's


def test_user_overrides_number_and_labels(tmp_path):
    mine = fields("panther") | {"dataset": 777, "title": "My Pancreas", "spacing": [1.5, 1.5, 1.5]}
    mine |= {"labels": {"pancreas": 1, "lesion": 2}, "groups": {"pancreas": "organ", "lesion": "pathology"}}
    dataset = load_datasets(write(tmp_path / "mine.yaml", panther=mine))["panther"]
    assert (dataset.folder, dataset.spacing) == ("Dataset777_MyPancreas", (1.5, 1.5, 1.5))
    assert (dataset.labels, dataset.groups) == (mine["labels"], mine["groups"])
    assert dataset.patient == PUBLIC["panther"].patient  # What is not changed stays
    assert PUBLIC["panther"].dataset == 91


def test_user_swaps_the_knee_set(tmp_path):
    other = fields("skm_tea") | {"title": "Other Knee", "labels": {"femur": 1, "tibia": 2}, "source": "raw"}
    datasets = load_datasets(write(tmp_path / "mine.yaml", corpus=fields("cads"), knee=other))
    assert list(datasets) == ["corpus", "knee"] and datasets["knee"].groups == {"femur": "organ", "tibia": "organ"}


# ---- A bad entry is named


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("lits", {"colour": "red"}, r"mine\.yaml, data set 'lits'.*colour"),
        ("lits", {"labels": {"liver": 1, "tumour": 3}}, r"'lits', labels: .*without gaps.*'tumour': 3"),
        ("lits", {"labels": {"liver": 0, "tumour": 1}}, r"'lits', labels"),
        ("lits", {"labels": {"liver": 1, "tumour": 1}}, r"'lits', labels"),
        ("lits", {"dataset": 1029}, r"'lits', dataset: a number from 1 to 999, got 1029"),
        ("lits", {"modality": "CBCT"}, r"'lits', modality: one of CT, MR, got 'CBCT'"),
        ("lits", {"groups": {"liver": "organ"}}, r"'lits', groups: no group for tumour"),
        ("lits", {"groups": {"liver": "organ", "tumour": "cancer"}}, r"'lits', groups: each one of"),
        ("lits", {"split": "random"}, r"'lits', split: one of files, fivefold, holdout"),
        ("lits", {"spacing": [1, 1]}, r"'lits': spacing must be a list of 3 numbers, got \(1, 1\)"),
        ("lits", {"spacing": [1, 1, float("inf")]}, r"'lits', spacing: three positive lengths"),
        ("lits", {"spacing": [1, 1, True]}, r"'lits': spacing must be a list of 3 numbers"),
        ("lits", {"labels": {"liver": True, "tumour": 2}}, r"'lits': labels must be a mapping of text to whole numbers"),
        ("lits", {"labels": {"liver": 1, "tumour": 2.0}}, r"'lits': labels must be a mapping of text to whole numbers"),
        ("lits", {"labels": ["liver", "tumour"]}, r"'lits': labels must be a mapping of text to whole numbers"),
        ("lits", {"labels": None}, r"'lits': labels must be a mapping of text to whole numbers, got None"),
        ("lits", {"labels": {1: 1, 2: 2}}, r"'lits': labels must be a mapping of text to whole numbers"),
        ("lits", {"nsd_tolerance": "1 mm"}, r"'lits': nsd_tolerance must be a number, got '1 mm'"),
        ("lits", {"nsd_tolerance": float("nan")}, r"'lits', nsd_tolerance: a positive length"),
        ("lits", {"dataset": 10**400}, r"'lits', dataset: a number from 1 to 999"),
        ("lits", {"patch": [10**12] * 3}, r"'lits', patch: three positive whole numbers"),
        ("lits", {"title": 7}, r"'lits': title must be text, got 7"),
        ("acdc", {"patient": "patient[0-9]+"}, r"'acdc', patient: a group"),
        ("acdc", {"patient": "(patient"}, r"'acdc', patient: a regular expression"),
        ("brats", {"regions": {"whole_tumour": [1, 2, 4]}}, r"'brats', (regions|groups)"),
        ("kits", {"class_order": [1, 1, 2]}, r"'kits', class_order: the i-th value must lie"),
        ("kits", {"ignore": 3}, r"'kits', ignore: none, or the value after the last label, 4"),
    ],
)
def test_bad_entry_is_named(tmp_path, name, change, message):
    path = write(tmp_path / "mine.yaml", btcv=fields("btcv"), **{name: fields(name) | change})
    with pytest.raises(ValueError, match=message):
        load_datasets(path)


def test_shared_number_names_both(tmp_path):
    path = write(tmp_path / "mine.yaml", lits=fields("lits"), liver=fields("lits"))
    with pytest.raises(ValueError, match="lits, liver share dataset 29"):
        load_datasets(path)


def test_missing_field_is_named(tmp_path):
    entry = fields("lits")
    del entry["licence"]
    with pytest.raises(ValueError, match=r"'lits'.*licence"):
        load_datasets(write(tmp_path / "mine.yaml", lits=entry))
