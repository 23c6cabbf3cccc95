"People: same seed same voxels, tissues as physics has them, lesions where they belong, and nobody who is tested on is trained on"

import json
import shutil
from dataclasses import replace

import nibabel
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from mednext_v2.core import read_yaml, root, sha256
from mednext_v2.data.datasets import find_patient, get_dataset, list_cases, load_datasets, read_case
from mednext_v2.stages import compose_params
from mednext_v2.study.people import (
    BLEED,
    BUILT_PEOPLE,
    LESION,
    MIXTURES,
    ORIGIN,
    REAL,
    SAME_HEAD,
    SEQUENCES,
    TASKS,
    TISSUES,
    Finding,
    PersonCase,
    build_people,
    build_people_suite,
    check_people,
    check_suite,
    class_map,
    compare_people,
    describe_cases,
    list_real_cases,
    make_case,
    people_datasets,
    people_folder,
    people_table,
    person_hu,
    place_finding,
    plan_people,
    read_origins,
    read_person,
    reshape,
    split_people,
    synthesise_ct,
    synthesise_mr,
)
from mednext_v2.study.seeds import BUILT, build_dataset, generator, load_seeds, verify_seeds, voxel_digest

CLONE = root()
SEEDS = CLONE / "data" / "seeds"
NAMES = tuple(load_seeds(people_folder()))
DATASETS = people_datasets()
FEW = {"images": (1, 1, 1, 2), "counts": (1, 1, 1, 1)}
VOXELS = {  # SHA-256 of image and label, the first 16 digits: the same on every machine
    "people_ct": "cce25b3ba7d3e165",
    "people_mr": "02e3cc1190d6c14b",
    "people_bleed_ct": "f03a4c785db2b7c5",
    "people_lesion_mr": "aa0aa53c73963d76",
}


@pytest.fixture(scope="module")
def people():
    return {name: read_person(name) for name in ("hd01", "hd03", "hd16")}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    return folder, build_people_suite(None, folder, **FEW)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", VOXELS)
def test_voxels_of_a_case_are_these(people, name):
    case = PersonCase(name, "test", "hd03", 1)
    image, label, _ = make_case(case, people["hd03"], DATASETS[name].labels, 0)
    assert voxel_digest(image, label)[:16] == VOXELS[name]


def test_same_seed_same_bytes_in_any_number_of_processes(suite, tmp_path):
    folder = suite[0] / DATASETS["people_bleed_ct"].folder
    build_people("people_bleed_ct", None, tmp_path, **FEW, workers=2)
    assert contents(tmp_path / folder.name) == contents(folder)


def test_a_case_depends_on_the_seed_and_not_on_how_many_there_are(suite, tmp_path):
    many = suite[1].set_index("case").sha256
    few = build_people("people_head_ct", None, tmp_path / "few", images=(1, 1, 1, 1), counts=(1, 1, 1, 1)).set_index("case").sha256
    assert (few == many[few.index]).all()
    other = build_people("people_ct", None, tmp_path / "other", images=(1, 1, 1, 1), counts=(1, 1, 1, 1), seed=1)
    assert not set(other.sha256) & set(many) and many.is_unique


def test_tasks_are_in_the_registry_with_titles_of_their_own():
    known = load_datasets()
    assert set(DATASETS) == set(TASKS) == {name for name in known if name.startswith("people_")}
    assert len({one.title for one in known.values()}) == len(known) and not any("eople" in one.title for one in DATASETS.values())
    for name, dataset in DATASETS.items():
        assert (dataset.source, dataset.licence, dataset.spacing) == ("people", "Apache-2.0", (2.5, 2.5, 2.5))
        assert dataset.modality == ("MR" if TASKS[name].sequences else "CT")
        assert dataset.role == "pretrain" or 4 <= len(dataset.labels) <= 8
    assert DATASETS["people_ct"].labels == DATASETS["people_mr"].labels


def test_every_structure_is_a_mixture_of_tissues_with_a_source():
    assert set(MIXTURES) == set(read_person("hd03").structures)
    for mixture in MIXTURES.values():
        assert set(mixture) <= set(TISSUES) and sum(mixture.values()) == pytest.approx(1)
    assert all(tissue.source for tissue in TISSUES.values())


@pytest.mark.parametrize("name", NAMES)
def test_inferred_names_agree_with_anatomy(name):
    person = read_person(name)
    volume = dict(zip(person.structures, np.bincount(person.label.ravel(), minlength=29)[1:] * 2.5**3 / 1000))
    eyes, _ = ndimage.label(ndimage.binary_erosion(person.where("eyeball")))
    sizes = np.sort(np.bincount(eyes.ravel())[1:])[::-1]
    assert sizes[1] > 0.5 * sizes[0] and sizes[:2].sum() > 0.95 * sizes.sum()
    assert 7 < volume["eyeball"] < 17  # Two
    bone = person.where("bone_dense", "bone_spongy")
    rim = ndimage.binary_dilation(bone) & ~bone
    assert person.where("soft_tissue", "csf", "vein")[rim].mean() > 0.6
    assert 250 < volume["bone_dense"] + volume["bone_spongy"] < 800
    assert 800 < sum(volume[s] for s in (*TASKS["people_head_ct"].classes["cerebrum"], "cerebellum_white", "cerebellum_cortex", "brainstem")) < 1700


def test_unknown_person_structure_and_value(tmp_path):
    with pytest.raises(ValueError, match="no person 'hd21'.*hd01, hd02"):
        read_person("hd21")
    with pytest.raises(ValueError, match="no structure tail: there are white_matter"):
        read_person("hd03").where("tail")
    copy = shutil.copytree(people_folder(), tmp_path / "people")
    image = nibabel.load(copy / "hd03_label.nii.gz")
    voxels = np.asarray(image.dataobj).copy()
    voxels[0, 0, 0] = 77
    nibabel.save(nibabel.Nifti1Image(voxels, image.affine), copy / "hd03_label.nii.gz")
    with pytest.raises(ValueError, match="hd03_label.nii.gz has the values 77, which label set 'person'"):
        read_person("hd03", copy)


def test_an_altered_person_is_seen_before_anything_is_built(tmp_path):
    copy = shutil.copytree(SEEDS, tmp_path / "seeds")
    file = copy / "people/hd05_label.nii.gz"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="hd05_label.nii.gz was altered") as error:
        build_people("people_head_ct", copy / "people", tmp_path / "raw", **FEW)
    assert sha256(file) in str(error.value) and "git checkout -- data/seeds/people/hd05_label.nii.gz" in str(error.value)
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("name", ["hd01", "hd16"])
def test_deformation_keeps_every_structure_and_about_its_volume(people, name):
    person = people[name]
    assert reshape(person, 0) is person
    for shape in (1, 2):
        moved = reshape(person, shape)
        assert moved.label.shape == person.label.shape and (moved.label != person.label).mean() > 0.1
        assert set(np.unique(moved.label)) == set(np.unique(person.label))
        for structures in ({"white_matter"}, {"cortex"}, {"thalamus"}, {"lateral_ventricle"}, {"brainstem"}):
            assert 0.65 < moved.where(*structures).sum() / person.where(*structures).sum() < 1.5, (shape, structures)
    assert not np.array_equal(reshape(person, 1).label, reshape(person, 2).label)
    assert not np.array_equal(reshape(person, 1).label, reshape(person, 1, seed=1).label)


def test_ct_and_mr_of_a_shape_are_the_same_head(suite):
    cases = [{case.id.split("_", 2)[2]: case for case in list_cases(DATASETS[name], suite[0])} for name in ("people_ct", "people_mr")]
    assert set(cases[0]) == set(cases[1]) and len(cases[0]) == 2
    for key in cases[0]:
        ct, mr = (read_case(DATASETS[name], found[key]) for name, found in zip(("people_ct", "people_mr"), cases))
        np.testing.assert_array_equal(ct.label, mr.label)
        assert not np.array_equal(ct.image, mr.image)


def deep(person, *structures):
    "Voxels that no neighbour's value reaches"
    return ndimage.binary_erosion(person.where(*structures), iterations=2)


@pytest.mark.parametrize(
    "structure, tissue", [("white_matter", "white"), ("lateral_ventricle", "fluid"), ("eyeball", "fluid"), ("thalamus", None), ("bone_dense", "dense bone")]
)
@pytest.mark.parametrize("name", ["hd01", "hd16"])
def test_hounsfield_units_are_in_the_tissue_s_range(people, name, structure, tissue):
    image = synthesise_ct(people[name], generator(0, "hu", name))
    mask = ndimage.binary_erosion(people[name].where(structure)) if structure != "bone_dense" else people[name].where(structure)
    low, high = TISSUES[tissue].hu if tissue else (20, 45)
    slack = 8 if structure != "bone_dense" else 350  # Dense bone is thin: partial volume
    assert low - slack < np.median(image[mask]) < high + slack
    assert 1 < image[mask].std()  # Not one value


def test_soft_tissue_is_fat_and_muscle_and_air_is_air(people):
    person = people["hd16"]
    image = synthesise_ct(person, generator(0, "soft"))
    soft = image[ndimage.binary_erosion(person.where("soft_tissue"))]
    assert 0.1 < np.mean(soft < -60) < 0.6 and 0.2 < np.mean((soft > 20) & (soft < 80)) < 0.8
    air = ndimage.binary_erosion(person.label == 0, iterations=3)
    assert np.median(image[air]) == pytest.approx(-1000, abs=3)
    assert image.dtype == np.int16 and image.min() >= -1024 and image.max() <= 3071


def test_a_person_keeps_the_values_and_two_people_differ():
    assert person_hu("hd01") == person_hu("hd01") != person_hu("hd02")
    for tissue, value in person_hu("hd01").items():
        assert TISSUES[tissue].hu[0] <= value <= TISSUES[tissue].hu[1]


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_mr_contrast_is_that_of_its_sequence(people, sequence):
    person = people["hd16"]
    for key in "ab":
        image = synthesise_mr(person, generator(0, "mr", key), sequence).astype(float)
        level = {s: np.median(image[deep(person, s) if s == "white_matter" else ndimage.binary_erosion(person.where(s))]) for s in
                 ("white_matter", "lateral_ventricle")} | {"grey": np.median(image[ndimage.binary_erosion(person.where("caudate", "putamen"))])}  # fmt: skip
        white, fluid, grey = level["white_matter"], level["lateral_ventricle"], level["grey"]
        if sequence == "T1":
            assert white > 1.05 * grey > 1.3 * fluid
        elif sequence == "T2":
            assert fluid > 1.3 * grey and grey > 1.05 * white
        elif sequence == "FLAIR":
            assert grey > white > 3 * fluid
        else:
            assert grey > white
        air = image[ndimage.binary_erosion(person.label == 0, iterations=3)]
        assert 0 < air.mean() < 0.2 * white and air.std() > 1  # Rician noise, not zero
        assert np.median(image[person.where("bone_dense")]) < 0.75 * white


def test_an_image_differs_from_the_next_in_contrast_noise_and_bias(people):
    one, other = (synthesise_mr(people["hd03"], generator(0, key), "T1") for key in "ab")
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.8 and not np.array_equal(one, other)


@pytest.mark.parametrize("finding", [BLEED, LESION], ids=["bleed", "lesion"])
@pytest.mark.parametrize("name", ["hd01", "hd03", "hd16"])
def test_findings_are_where_they_belong(people, name, finding):
    inside = people[name].where(*finding.inside)
    for key in "abc":
        share = place_finding(inside, finding, people[name].spacing, generator(0, name, key))
        mask = share > 0.5
        assert mask.any() and not share[~inside].any() and 0 <= share.min() <= share.max() <= 1
        assert 1 <= ndimage.label(mask, np.ones((3, 3, 3)))[1] <= 6 * finding.count[1]
        largest = finding.count[1] * 4 / 3 * np.pi * (1.5 * finding.radius[1]) ** 3
        assert mask.sum() * 2.5**3 < largest


def test_no_place_for_a_finding():
    with pytest.raises(ValueError, match="no place for a lesion 3 voxels deep in white_matter, which have 27 voxels"):
        mask = np.zeros((9, 9, 9), bool)
        mask[3:6, 3:6, 3:6] = True
        place_finding(mask, Finding((1, 1), (5, 5), ("white_matter",), 3), (2.5, 2.5, 2.5), generator(0))


def test_a_bleed_is_brighter_than_brain_and_a_lesion_than_white_matter(people):
    person = people["hd01"]
    share = place_finding(person.where(*BLEED.inside), BLEED, person.spacing, generator(0, "bleed"))
    image = synthesise_ct(person, generator(0, "ct"), bleed=share)
    core = image[ndimage.binary_erosion(share > 0.99)]
    assert TISSUES["clot"].hu[0] - 8 < np.median(core) < TISSUES["clot"].hu[1] + 8
    assert np.median(core) > np.median(image[person.where("cortex") & (share == 0)]) + 8
    share = place_finding(person.where("white_matter"), LESION, person.spacing, generator(0, "lesion"))
    for sequence in ("T2", "FLAIR"):
        image = synthesise_mr(person, generator(0, sequence), sequence, share)
        assert np.median(image[share > 0.9]) > 1.2 * np.median(image[deep(person, "white_matter") & (share == 0)])


def test_split_is_by_hash_and_roles_are_apart():
    split = split_people(NAMES)
    assert [len(names) for names in split.values()] == [6, 3, 3, 8]
    assert sorted(sum(split.values(), ())) == sorted(NAMES)
    assert split == split_people(NAMES[::-1]) != split_people(NAMES, seed=1)
    for counts in ((10, 5, 5, 5), (6, 3, 3), (6, 3, 3, 0)):
        with pytest.raises(ValueError, match="at least 1 each, and together at most 20 people"):
            split_people(NAMES, counts)
    with pytest.raises(ValueError, match="named twice"):
        split_people(("hd01", "hd01", "hd02", "hd03"), (1, 1, 1, 1))


def test_plan_holds_every_person_of_its_roles_and_some_without_finding():
    split = split_people(NAMES)
    plans = plan_people("people_bleed_ct", split)
    for part, number in (("train", 4), ("val", 2), ("test", 3)):
        found = pd.Series([plan.person for plan in plans if plan.split == part]).value_counts()
        assert set(found.index) == set(split[part]) and set(found) == {number}
    healthy = {plan.person for plan in plans if plan.split == "test" and plan.healthy}
    assert len(healthy) == 1 and all(plan.healthy for plan in plans if plan.person in healthy)
    assert sum(plan.healthy for plan in plans if plan.split == "train") == 3
    lesions = [plan for plan in plan_people("people_lesion_mr", split) if plan.split == "train"]
    for healthy in (True, False):  # What has no lesion is not told by its sequence
        assert {plan.shape % len(TASKS["people_lesion_mr"].sequences) for plan in lesions if plan.healthy == healthy} == {0, 1}
    corpus = plan_people("people_ct", split, corpus=True)
    assert {plan.split for plan in corpus} == {"train", "val"} and not {plan.person for plan in corpus} & set(split["test"])
    with pytest.raises(ValueError, match="no task 'people_spine'"):
        plan_people("people_spine", split)
    with pytest.raises(ValueError, match="at least 1 each"):
        plan_people("people_ct", split, (0, 1, 1, 1))


def rows(*cases):
    return pd.DataFrame(cases, columns=["task", "role", "split", "person"])


CLEAN = [("people_ct", "pretrain", "train", "hd01"), ("people_ct", "pretrain", "val", "hd02"), ("head", "finetune", "train", "hd03"),
         ("head", "finetune", "val", "hd02"), ("head", "finetune", "test", "hd04"), ("head", "finetune", "test", "hd04")]  # fmt: skip


@pytest.mark.parametrize(
    "case, message",
    [
        (("people_mr", "pretrain", "train", "hd04"), "hd04 is in the test of head and in the corpus of people_mr"),
        (("people_mr", "pretrain", "val", "hd04"), "hd04 is in the test of head and in the validation of people_mr"),
        (("brain", "finetune", "train", "hd04"), "hd04 is in the test of head and in the training of brain"),
        (("brain", "finetune", "test", "hd01"), "hd01 is in the test of brain and in the corpus of people_ct"),
        (("brain", "finetune", "train", "hd01"), "hd01 is in the corpus of people_ct and in the training of brain"),
        (("brain", "finetune", "val", "hd03"), "hd03 is in the training of head and in the validation of brain"),
        (("brain", "finetune", "val", None), "a case of brain has no person"),
        (("brain", "finetune", "val", " "), "a case of brain has no person"),
        (("brain", "finetune", "Test", "hd01"), "a case of brain has the split 'Test': it must be one of train, val, test"),
        (("brain", "corpus", "train", "hd05"), "a case of brain has the role 'corpus': it must be one of pretrain, finetune"),
    ],
)
def test_a_person_in_two_places_is_refused(case, message):
    check_people(rows(*CLEAN))
    with pytest.raises(ValueError, match=message):
        check_people(rows(*CLEAN, case))
    with pytest.raises(ValueError, match="lacks person"):
        check_people(rows(*CLEAN).drop(columns="person"))


def test_tasks_built_with_two_splits_are_refused(suite, tmp_path):
    raw = shutil.copytree(suite[0], tmp_path / "raw")
    build_people("people_head_ct", None, raw, images=(1, 1, 1, 1), counts=(2, 1, 1, 1))
    with pytest.raises(ValueError, match="build all tasks with the same split"):
        check_suite(raw)
    with pytest.raises(FileNotFoundError, match="has no data set of people"):
        check_suite(tmp_path / "nothing")


def test_a_person_that_is_not_the_name_s_is_refused(suite, tmp_path):
    raw = shutil.copytree(suite[0], tmp_path / "raw")
    file = raw / DATASETS["people_head_ct"].folder / "provenance.csv"
    table = pd.read_csv(file)
    table.loc[0, "person"] = "hd99"
    table.to_csv(file, index=False)
    with pytest.raises(ValueError, match="is not the one in its name"):
        check_suite(raw)


def test_suite_says_what_is_a_person_and_what_a_deformation(suite):
    table = describe_cases(suite[1])
    head = table.loc[("people_head_ct", "test")]
    assert (head.people, head.images, head.as_mapped, head.deformations, head.synthetic, head.intensities) == (1, 2, 1, 1, 2, "synthetic")
    bleeds = table.loc["people_bleed_ct"]
    assert (bleeds.simulated + bleeds.without_finding == bleeds.images).all() and not head.simulated
    assert ("people_ct", "test") not in table.index
    cases = suite[1]
    assert set(cases.kind[cases.case.str.endswith("_00")]) == {"person"}
    moved = cases[cases.case.str.endswith("_01")]
    assert (moved.kind == "deformation of " + moved.person).all()
    tested = set(cases.person[cases.split == "test"])
    assert not tested & set(cases.person[cases.split != "test"]) and not tested & set(cases.person[cases.role == "pretrain"])


@pytest.mark.parametrize("name", TASKS)
def test_every_case_is_fit_to_train_on(suite, name):
    dataset, seen = DATASETS[name], set()
    cases = list_cases(dataset, suite[0])
    assert [case.split for case in cases].count("test") == (0 if dataset.role == "pretrain" else 2)
    for case in cases:
        scan = read_case(dataset, case)
        assert scan.spacing == pytest.approx(dataset.spacing) and min(scan.label.shape) >= 48
        found = set(np.unique(scan.label)) - {0}
        seen |= found
        pathology = {value for label, value in dataset.labels.items() if dataset.groups[label] == "pathology"}
        assert found | pathology == set(dataset.labels.values()), case.id
        assert find_patient(dataset, case.id) == case.id.split("_")[-2]
    assert seen == set(dataset.labels.values())


def test_a_healthy_case_has_no_finding(people):
    labels = DATASETS["people_bleed_ct"].labels
    _, label, how = make_case(PersonCase("people_bleed_ct", "test", "hd03", 0, healthy=True), people["hd03"], labels, 0)
    assert labels["haemorrhage"] not in label and how == "synthetic CT; no haemorrhage"
    np.testing.assert_array_equal(label, class_map(people["hd03"], TASKS["people_bleed_ct"], labels))


def test_real_scans_are_a_column_of_their_own(suite):
    for name, dataset in DATASETS.items():
        cases, real = list_cases(dataset, suite[0]), list_real_cases(dataset, suite[0])
        assert [find_patient(dataset, case.id) for case in real] == [one.scan for one in REAL.get(name, ())]
        assert not {case.id for case in cases} & {case.id for case in real}
        for case, classes in real.items():
            scan = read_case(dataset, case)
            assert case.split == "real" and "imagesReal" in str(case.images[0])
            assert set(np.unique(scan.label)) - {0} == {dataset.labels[label] for label in classes}
    head, _ = (nibabel.load(path).get_fdata() for path in (SEEDS / "ctH.nii.gz", SEEDS / "ctH_label.nii.gz"))
    written = nibabel.load(suite[0] / DATASETS["people_head_ct"].folder / "imagesReal/people_head_ct_ctH_0000.nii.gz").get_fdata()
    np.testing.assert_array_equal(written, head)
    folder = suite[0] / DATASETS["people_bleed_ct"].folder
    bled = nibabel.load(folder / "imagesReal/people_bleed_ct_ctH_0000.nii.gz").get_fdata()
    label = nibabel.load(folder / "labelsReal/people_bleed_ct_ctH.nii.gz").get_fdata()
    assert (bled != head).any() and np.median(bled[label == 4]) > 50
    assert set(verify_seeds(SEEDS)) >= {one.scan for many in REAL.values() for one in many}


def test_no_two_of_the_twenty_are_one_head_and_one_that_was_turned_or_mirrored_is_known_again(people):
    pairs = compare_people([read_person(name) for name in NAMES])
    assert len(pairs) == 190 and 0.6 < pairs.likeness[0] < SAME_HEAD - 0.1
    head = people["hd03"]
    for turn, shift, mirrored in ((10, (2, -3, 1), False), (-8, (0, 2, 2), True), (0, (4, 4, 4), False)):
        angle = np.deg2rad(turn)
        matrix = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        middle = (np.array(head.label.shape) - 1) / 2
        label = ndimage.affine_transform(head.label, matrix, offset=middle - matrix @ middle + shift, order=0)
        again = replace(head, name="again", label=label[::-1] if mirrored else label)
        assert compare_people([head, again]).likeness[0] > SAME_HEAD, (turn, mirrored)


def test_origin_of_every_case_of_people_of_seeds_and_of_others(suite, tmp_path):
    found = read_origins(DATASETS["people_bleed_ct"], suite[0])
    assert list(found) == [*ORIGIN, "scans"] and set(found.scans) == {"synthetic"}
    assert found.person.tolist() == [find_patient(DATASETS["people_bleed_ct"], case) for case in found.case]
    seeds = build_dataset("abdomen_mr", None, tmp_path, cases=(1, 1, 2))
    origins = read_origins(get_dataset("abdomen_mr"), tmp_path).set_index("split")
    assert origins.person.to_dict() == {"train": "ctA", "val": "ctA", "test": "mrM"} and seeds.person.tolist() == origins.person.tolist()
    assert origins.scans.to_dict() == {"train": "synthetic", "val": "synthetic", "test": "deformed"}
    assert origins.kind.tolist()[2:] == ["scan in its own shape", "deformation of mrM"]
    folder = tmp_path / get_dataset("abdomen_mr").folder
    table = pd.read_csv(folder / "provenance.csv")
    table.drop(columns="person").to_csv(folder / "provenance.csv", index=False)
    with pytest.raises(ValueError, match="provenance.csv lacks the column person: build abdomen_mr anew"):
        read_origins(get_dataset("abdomen_mr"), tmp_path)
    (folder / "provenance.csv").unlink()  # A data set that nobody deformed
    plain = read_origins(get_dataset("abdomen_mr"), tmp_path)
    assert set(plain.scans) == {"real"} and plain.person.tolist() == plain.case.tolist()
    converted = get_dataset("abdomen_mr").__class__(**vars(get_dataset("abdomen_mr")) | {"source": "raw"})
    table.to_csv(folder / "provenance.csv", index=False)  # As a converter leaves one
    assert set(read_origins(converted, tmp_path).scans) == {"real"}


def test_table_of_people_keeps_real_scans_apart(suite, tmp_path):
    raw = shutil.copytree(suite[0], tmp_path / "raw")
    build_dataset("corpus_mr", None, raw, cases=(3, 1, 0))
    table = people_table([*TASKS, "corpus_mr"], raw).set_index(["task", "split"])
    assert table.index.is_unique and set(table.loc["people_head_ct"].index) == {"train", "val", "test", "real"}
    assert table.loc[("people_head_ct", "real")][["people", "images", "synthetic", "scans"]].tolist() == [1, 1, 0, "real"]
    assert table.loc[("people_bleed_ct", "real"), "simulated"] == 1
    mixed = table.loc[("corpus_mr", "train")]
    assert (mixed.people, mixed.images, mixed.synthetic, mixed.scans) == (2, 3, 2, "deformed, synthetic")
    assert table.loc[("people_ct", "train"), "people"] == 1 and ("people_ct", "real") not in table.index


def test_missing_real_scan(suite, tmp_path):
    dataset = DATASETS["people_brain_mr"]
    shutil.copytree(suite[0] / dataset.folder, tmp_path / dataset.folder)
    (tmp_path / dataset.folder / "labelsReal/people_brain_mr_mrP.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="mrP.nii.gz is missing, and real.csv names it"):
        list_real_cases(dataset, tmp_path)
    with pytest.raises(FileNotFoundError, match="build it with `build_people`"):
        list_real_cases(dataset, tmp_path / "nothing")
    (tmp_path / dataset.folder / "real.csv").unlink()
    with pytest.raises(FileNotFoundError, match="real.csv is missing: build people_brain_mr anew"):
        list_real_cases(dataset, tmp_path)


def test_failed_build_leaves_what_was_there_and_another_folder_is_not_replaced(suite, tmp_path, monkeypatch):
    dataset = DATASETS["people_head_ct"]
    shutil.copytree(suite[0] / dataset.folder, tmp_path / dataset.folder)
    before = contents(tmp_path)
    monkeypatch.setattr("mednext_v2.study.people.write_descriptions", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_people("people_head_ct", None, tmp_path, images=(1, 1, 1, 1), counts=(1, 1, 1, 1))
    assert contents(tmp_path) == before
    (tmp_path / dataset.folder / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis.txt"):
        build_people("people_head_ct", None, tmp_path, **FEW)
    assert BUILT_PEOPLE.name != BUILT.name


def run_suite(profile: str) -> dict:
    "The variables of the stage `suite` after its cells were run here"
    cells = json.loads((CLONE / "nbs/pipeline/10_suite.ipynb").read_text())["cells"]
    found = {"profile": profile}
    for cell in cells:
        if cell["cell_type"] == "code" and "parameters" not in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), found)
    return found


@pytest.mark.parametrize(
    "numbers, tasks",
    [
        ({"suite": None, "people": {"images": [1, 1, 1, 1], "counts": [2, 1, 1, 1], "seed": 0}}, {"people_head_ct"}),
        ({"suite": {"cases": [1, 1, 1], "corpus": [1, 1], "seed": 0}, "people": None}, {"brain_mr"}),
        ({"suite": {"cases": [1, 1, 1], "corpus": [1, 1], "seed": 0}}, {"brain_mr"}),
        (
            {"suite": {"cases": [1, 1, 1], "corpus": [1, 1], "seed": 0}, "people": {"images": [1, 1, 1, 1], "counts": [2, 1, 1, 1], "seed": 0}},
            {"people_head_ct", "brain_mr"},
        ),
    ],
    ids=["people", "seeds", "seeds without a word of people", "both"],
)
def test_the_suite_stage_builds_what_a_profile_describes(tmp_path, monkeypatch, numbers, tasks):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "data").mkdir()
    shutil.copy(CLONE / "data/datasets.yaml", tmp_path / "data")
    (tmp_path / "data/seeds").symlink_to(CLONE / "data/seeds")
    composed = read_yaml(compose_params("smoke", tmp_path / "params.yaml"))
    plain = json.loads(json.dumps({name: value for name, value in composed.items() if name not in ("suite", "people")} | numbers))
    (tmp_path / "params.yaml").write_text(json.dumps(plain))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mednext_v2.study.people.TASKS", {"people_head_ct": TASKS["people_head_ct"]})
    monkeypatch.setattr("mednext_v2.study.seeds.load_datasets", lambda: {"brain_mr": get_dataset("brain_mr")})
    first = run_suite("smoke")["provenance"]
    assert set(first.task) == tasks and {path.name for path in (tmp_path / "data/raw/smoke").iterdir()} == {get_dataset(name).folder for name in tasks}
    if "people_head_ct" in tasks:
        assert first[first.task == "people_head_ct"].person.nunique() == 3
    if tasks == {"people_head_ct"}:
        before = contents(tmp_path / "data/raw/smoke")
        assert run_suite("smoke")["provenance"].equals(first) and contents(tmp_path / "data/raw/smoke") == before  # A second start


def test_a_profile_that_describes_no_raw_data_is_refused(tmp_path, monkeypatch):
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    composed = read_yaml(compose_params("smoke", tmp_path / "params.yaml"))
    (tmp_path / "params.yaml").write_text(json.dumps(composed | {"suite": None, "people": None}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="profile smoke is in axes.suites and describes neither `suite` nor `people`"):
        run_suite("smoke")
