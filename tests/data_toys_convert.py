"""Small data sets in exactly the published forms, and what their raw form must hold."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import nibabel
import numpy as np
import SimpleITK as sitk
from PIL import Image

from data_toys_dicom import turned_affine, write_ct_series, write_rtstruct

SHAPE = (6, 7, 8)
SCANNER = {"axes": "LPS", "spacing": (1.0, 1.5, 2.5), "origin": (10.0, -20.0, 30.0)}
CADS_SIZES = {551: 17, 552: 24, 553: 18, 554: 21, 555: 24, 556: 15, 557: 9, 558: 29, 559: 10}


@dataclass
class Made:
    "A case as it was written, and how to damage it"

    images: list[np.ndarray]  # As written, (X, Y, Z) each
    affine: np.ndarray  # (4, 4), voxel index to mm in RAS
    label: np.ndarray | None  # In the registry's values, on the same grid
    image_path: Path
    label_path: Path | None  # A file, or a folder of slices
    spoil: Callable | None = None  # Puts an undeclared value into the label
    split: str = "train"
    patient: str = ""
    files: dict[str, Path] = field(default_factory=dict)


def noise(seed: int, low=-900, high=900, dtype=np.int16) -> np.ndarray:
    "An image in which (almost) no two voxels are alike"
    return np.random.default_rng(seed).integers(low, high, SHAPE).astype(dtype)


def blobs(seed: int, values, dtype=np.uint8) -> np.ndarray:
    "A label map without any symmetry, in which every value occurs"
    rng = np.random.default_rng(seed)
    label = rng.choice([0, *values], SHAPE).astype(dtype)
    label.ravel()[rng.permutation(label.size)[: len(values)]] = values
    return label


def put(path: Path, voxels, affine) -> Path:
    "A volume: NIfTI by nibabel, MetaImage by SimpleITK"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".mha":
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
        return path
    matrix = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((matrix[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(matrix[:3, 3].tolist())
    sitk.WriteImage(image, str(path))
    return path


def spoiler(path: Path, affine, value: int, dtype=np.uint8) -> Callable:
    "Writes the label again with a value that nobody declared"

    def spoil():
        bad = blobs(0, [1], dtype)
        bad[1, 2, 3] = value
        put(path, bad, affine)

    return spoil


def scan(seed, image_path, label_path, raw, table=None, wrong=250, axes="LPS", degrees=0.0, **more) -> Made:
    "One image file and one label file; `raw` are the publisher's values, `table` makes them ours"
    affine = turned_affine(axes, SCANNER["spacing"], SCANNER["origin"], degrees)
    image = put(image_path, noise(seed), affine)
    voxels = blobs(seed, raw)
    ours = np.vectorize(lambda value: (table or {}).get(value, value))(voxels)
    if label_path is None:
        return Made([noise(seed)], affine, None, image, None, **more)
    put(label_path, voxels, affine)
    return Made([noise(seed)], affine, ours, image, label_path, spoiler(label_path, affine, wrong), **more)


def write_toothfairy2(source: Path) -> dict[str, Made]:
    raw = [*range(1, 19), *range(21, 29), *range(31, 39), *range(41, 49)]
    ours = {v: v - 2 * (v > 20) - 2 * (v > 30) - 2 * (v > 40) for v in raw}
    root = source / "Dataset112_ToothFairy2"
    ids = ["ToothFairy2F_001", "ToothFairy2F_002", "ToothFairy2P_010"]
    return {
        id: scan(i, root / f"imagesTr/{id}_0000.mha", root / f"labelsTr/{id}.mha", raw, ours, 49, axes)
        for i, (id, axes) in enumerate(zip(ids, ("LPS", "RAI", "PSR")))
    }


def write_toothfairy3(source: Path) -> dict[str, Made]:
    raw = [*range(1, 19), *range(21, 29), *range(31, 39), *range(41, 49), 103, 104, 105]
    raw += [100 + v for v in raw[10:18]] + [100 + v for v in raw[18:42]]
    ours = {v: v if v < 19 else v - 2 if v < 29 else v - 4 if v < 39 else v - 6 for v in raw if v < 50}
    ours |= {103: 43, 104: 44, 105: 45} | {v: ours[v - 100] + 35 for v in raw if v > 110}
    made = {}
    for i, id in enumerate(["ToothFairy3F_001", "ToothFairy3P_380"]):
        root = source / "ToothFairy3"
        paths = root / f"imagesTr/{id}_0000.nii.gz", root / f"labelsTr/{id}.nii.gz"
        one = scan(i, *paths, raw, ours, 106)
        # Where the voxels truly lie: they run right, back and down, about the centre of the declared box
        centre = one.affine @ [*(np.array(SHAPE) - 1) / 2, 1]
        true = turned_affine("RPI", SCANNER["spacing"])
        true[:3, 3] = centre[:3] - true[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
        made[id] = Made(one.images, true, one.label, one.image_path, one.label_path, one.spoil)
    return made


def write_panther(source: Path, dataset=1) -> dict[str, Made]:
    root = source / f"PANTHER_Task{dataset}"
    ids = ["10000_0001", "10000_0002", "10003_0001"] if dataset == 1 else ["10001", "10002"]
    put(root / "ImagesTr_unlabeled/20000_0001_0000.mha", noise(9), turned_affine())
    made = {}
    for i, id in enumerate(ids):
        paths = root / f"ImagesTr/{id}_0000.mha", root / f"LabelsTr/{id}.mha"
        made[id] = scan(i, *paths, [1, 2], wrong=3, patient=id[:5])
    return made


def write_panther_t2(source: Path) -> dict[str, Made]:
    return write_panther(source, 2)


SPINE = {
    "COLONOG": ("1.3.6.1.4.1.9328.50.4.0001", "train"),
    "COVID-19": ("volume-covid19-A-0377_ct", "test"),
    "HNSCC-3DCT-RT": ("HN_P001", "val"),
    "MSD-T10": ("liver_12", "train"),
}


def write_ctspine1k(source: Path) -> dict[str, Made]:
    made = {}
    for i, (folder, (name, split)) in enumerate(SPINE.items()):
        image = source / f"raw_data/volumes/{folder}/{name}.nii.gz"
        label = source / f"raw_data/labels/{folder}/{name}_seg.nii.gz"
        id = f"{folder}_{name}".replace(".", "_")
        axes = ("LPS", "RAS", "PIR", "LAS")[i]
        made[id] = scan(i, image, label, range(1, 26), wrong=26, axes=axes, split=split)
    listed = {"train": "trainset", "val": "test_public", "test": "test_private"}
    blocks = []
    for key, title in listed.items():
        names = [name.removesuffix("_ct") for name, split in SPINE.values() if split == key]
        blocks.append(f"{title}:\n" + "".join(f"{name}.nii.gz\n" for name in names))
    (source / "metadata").mkdir()
    (source / "metadata" / "data_split.txt").write_text("\n".join(blocks))
    return made


def write_amos(source: Path) -> dict[str, Made]:
    root, made = source / "amos22", {}
    for i, (number, part) in enumerate([(1, "Tr"), (500, "Tr"), (507, "Tr"), (8, "Va"), (590, "Va")]):
        id = f"amos_{number:04d}"
        paths = root / f"images{part}/{id}.nii.gz", root / f"labels{part}/{id}.nii.gz"
        made[id] = scan(i, *paths, range(1, 16), wrong=16, split={"Tr": "train", "Va": "val"}[part])
    made["amos_0411"] = scan(7, root / "imagesTs/amos_0411.nii.gz", None, [1], split="test")
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "spleen"}}))
    return made


def write_kits(source: Path) -> dict[str, Made]:
    made = {}
    for i in (0, 1, 400):
        folder = source / "dataset" / f"case_{i:05d}"
        paths = folder / "imaging.nii.gz", folder / "segmentation.nii.gz"
        made[folder.name] = scan(i, *paths, [1, 2, 3], wrong=4)
    return made


def write_lits(source: Path) -> dict[str, Made]:
    made = {}
    for number in (0, 2, 10):
        folder = source / f"Training Batch {1 + number // 10}"
        paths = folder / f"volume-{number}.nii", folder / f"segmentation-{number}.nii"
        made[f"volume-{number}"] = scan(number, *paths, [1, 2], wrong=3)
    made["test-volume-3"] = scan(3, source / "Test Batch/test-volume-3.nii", None, [1], split="test")
    return made


def write_btcv(source: Path) -> dict[str, Made]:
    root, made = source / "RawData", {}
    for number in ("0001", "0002", "0010"):
        paths = root / f"Training/img/img{number}.nii.gz", root / f"Training/label/label{number}.nii.gz"
        made[f"img{number}"] = scan(int(number), *paths, range(1, 14), wrong=14)
    made["img0061"] = scan(61, root / "Testing/img/img0061.nii.gz", None, [1], split="test")
    return made


def write_acdc(source: Path) -> dict[str, Made]:
    made, plan = {}, [("training", 1, 1, 12), ("training", 2, 1, 9), ("testing", 101, 1, 14)]
    for part, patient, first, last in plan:
        folder = source / part / f"patient{patient:03d}"
        for frame in (first, last):
            stem = f"patient{patient:03d}_frame{frame:02d}"
            paths = folder / f"{stem}.nii.gz", folder / f"{stem}_gt.nii.gz"
            split = "train" if part == "training" else "test"
            made[stem] = scan(patient + frame, *paths, [1, 2, 3], wrong=4, split=split, patient=folder.name)
        put(folder / f"patient{patient:03d}_4d.nii.gz", np.zeros((*SHAPE, 2), np.int16), np.eye(4))
        (folder / "Info.cfg").write_text(f"ED: {first}\nES: {last}\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\n")
    return made


def write_brats(source: Path) -> dict[str, Made]:
    made = {}
    for number in (0, 2, 5):
        id = f"BraTS2021_{number:05d}"
        folder = source / "BraTS2021_Training_Data" / id
        paths = folder / f"{id}_t1.nii.gz", folder / f"{id}_seg.nii.gz"
        one = scan(number, *paths, [1, 2, 4], {1: 2, 2: 1, 4: 3}, wrong=3)
        for channel, tail in enumerate(("t1ce", "t2", "flair"), start=1):
            one.images.append(noise(1000 * channel + number))
            put(folder / f"{id}_{tail}.nii.gz", one.images[-1], one.affine)
        made[id] = one
    return made


def put_slices(folder: Path, voxels, mode="L") -> Path:
    "One picture a slice; `voxels` is (rows, columns, slices)"
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(voxels.shape[2]):
        Image.fromarray(np.ascontiguousarray(voxels[..., index])).convert(mode).save(folder / f"{index}.png")
    return folder


def write_brainmetshare(source: Path) -> dict[str, Made]:
    made, shape = {}, (16, 15, 12)  # More than ten slices: 10 comes after 9 only if sorted as a number
    for number, labelled in ((5, True), (11, True), (200, False)):
        part, id = "train" if labelled else "test", f"Mets_{number:03d}"
        case = source / f"mets_stanford_release_{part}" / id
        rng = np.random.default_rng(number)
        channels = [rng.integers(0, 256, shape).astype(np.uint8) for _ in range(4)]
        for channel, voxels in enumerate(channels):
            put_slices(case / str(channel), voxels, "RGB" if channel == 2 else "L")
        mask = (rng.random(shape) < 0.2).astype(np.uint8)
        # Rows run to the back, columns to the left
        affine = np.array([[0, -0.94, 0, 0], [-0.94, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1]])
        if labelled:
            put_slices(case / "seg", mask * 255)
        spoil = (lambda case=case, mask=mask: put_slices(case / "seg", mask * 100)) if labelled else None
        label_path = case / "seg" if labelled else None
        split = "train" if labelled else "test"
        image_path = case / "0" / "3.png"
        made[id] = Made(channels, affine, mask if labelled else None, image_path, label_path, spoil, split)
    return made


def put_knee(path: Path, echoes, one_hot) -> Path:
    "An HDF5 file with the keys of SKM-TEA"
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["echo1"], file["echo2"] = echoes
        if one_hot is not None:
            file.create_dataset("seg", data=one_hot, compression="gzip")
        file["stats/echo1/mean"] = float(echoes[0].mean())
    return path


def write_skm_tea(source: Path) -> dict[str, Made]:
    made, images = {}, {"train": [], "val": [], "test": []}
    plan = [(1, "train", "LR"), (5, "train", "RL"), (30, "val", "LR"), (66, "test", "RL")]
    for number, split, side in plan:
        id, seed = f"MTR_{number:03d}", number
        echoes = [noise(seed, 0, 2000, np.float32), noise(seed + 500, 0, 2000, np.float32)]
        label = blobs(seed, range(1, 7))
        one_hot = np.stack([label == value for value in range(1, 7)], axis=-1).astype(np.uint8)
        spacing = (0.3125, 0.3125, 0.8)
        affine = turned_affine("IP" + side[1], spacing)  # "SI" runs from superior to inferior
        path = put_knee(source / f"image_files/{id}.h5", echoes, one_hot)
        stored = label.transpose(1, 0, 2)
        mask = source / f"segmentation_masks/dicom-track/{id}.nii.gz"
        put(mask, np.ascontiguousarray(stored[..., ::-1] if side == "RL" else stored), np.eye(4))
        scan_info = {"scan_id": id, "subject_id": 70 + number, "orientation": ["SI", "AP", side]}
        images[split].append(scan_info | {"file_name": path.name, "voxel_spacing": list(spacing)})

        def spoil(path=path, echoes=echoes, mask=mask):
            put_knee(path, echoes, None)
            put(mask, np.full((SHAPE[1], SHAPE[0], SHAPE[2]), 7, np.uint8), np.eye(4))

        more = {"mask": mask, "echo2": echoes[1]}
        made[id] = Made(echoes[:1], affine, label, path, None, spoil, split, str(70 + number), more)
    for split, scans in images.items():
        path = source / f"annotations/v1.0.0/{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"info": {"version": "v1.0.0"}, "images": scans, "annotations": []}))
    return made


def put_parts(folder: Path, id: str, parts: dict[int, np.ndarray], affine) -> None:
    "The nine maps of one CADS image"
    for group in CADS_SIZES:
        put(folder / f"segmentations/{id}/{id}_part_{group}.nii.gz", parts[group], affine)


def cads_parts(seed: int) -> dict[int, np.ndarray]:
    "Maps that do not overlap: every voxel belongs to one group"
    rng = np.random.default_rng(seed)
    owner = rng.choice([0, *CADS_SIZES], SHAPE)
    maps = {group: rng.integers(1, size + 1, SHAPE) for group, size in CADS_SIZES.items()}
    return {group: np.where(owner == group, label, 0).astype(np.uint8) for group, label in maps.items()}


def cads_sum(parts: dict[int, np.ndarray]) -> np.ndarray:
    "The merged map of parts that do not overlap"
    total, offset = np.zeros(SHAPE, int), 0
    for group, size in CADS_SIZES.items():
        total += np.where(parts[group] > 0, parts[group] + offset, 0)
        offset += size
    return total


def write_cads(source: Path) -> dict[str, Made]:
    made = {}
    plan = [
        ("0001_visceral_gc", "10000018", "_0000", "excluded"),
        ("0001_visceral_gc", "10000001", "_0000", "train"),
        ("0002_visceral_sc", "10000018", "_0000", "train"),  # The same id as a test image of another folder
        ("0041_ctrate", "train_1_a_1", "", "train"),
        ("0041_ctrate", "train_2_a_1", "", "train"),
    ]
    for seed, (folder, id, tail, split) in enumerate(plan):
        axes = ("LPS", "RAS", "LAS", "PIR", "LPS")[seed]
        affine = turned_affine(axes, SCANNER["spacing"], SCANNER["origin"])
        parts = cads_parts(seed)
        put_parts(source / folder, id, parts, affine)
        image = put(source / folder / f"images/{id}{tail}.nii.gz", noise(seed), affine)
        part = source / folder / f"segmentations/{id}/{id}_part_557.nii.gz"
        one = Made([noise(seed)], affine, cads_sum(parts), image, part, spoiler(part, affine, 10), split)
        made[f"{folder[:4]}_{id}"] = one
    rule = "-" * 80
    text = f"Dataset: 0001_visceral_gc\nNumber of images: 1\n{rule}\n  10000018\n\n"
    text += f"{'=' * 80}\nTotal unique test images: 1\n"
    (source / "resources/info").mkdir(parents=True)
    (source / "resources/info/image_ids_test_split.txt").write_text(text)
    (source / "0001_visceral_gc/0001_visceral_gc.csv").write_text("id\n10000018\n")
    return made


def box(low, high) -> np.ndarray:
    "A box of voxels, upper ends left out"
    mask = np.zeros((12, 14, 6), bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high))] = True
    return mask


def write_pediatric_ct_seg(source: Path) -> dict[str, Made]:
    made, values = {}, {"Lt Adrenal": 1, "Femoral Head Rig": 9, "Lung_L": 26, "Skin": 28, "Bones": 29}
    masks = {
        "Lt Adrenal": box((4, 5, 2), (7, 8, 4)),
        "Skin": box((1, 1, 1), (11, 13, 5)),
        "Lung_L": box((7, 2, 1), (9, 6, 5)),
        "Bones": box((2, 8, 1), (8, 11, 5)),
        "Femoral Head Rig": box((5, 8, 2), (8, 10, 3)),
    }
    affine = turned_affine("LPS", (1.0, 1.5, 2.5), (10.0, -20.0, 30.0))
    for number in (1, 2):
        id = f"Pediatric-CT-SEG-{number:04d}"
        rng = np.random.default_rng(number)
        voxels = rng.integers(-900, 900, (12, 14, 6))
        folder = source / id / "CT"
        paths = write_ct_series(folder, voxels, affine, patient=id, series=str(number))
        label = np.zeros(voxels.shape, int)
        for name in ("Skin", "Bones", "Lt Adrenal", "Femoral Head Rig", "Lung_L"):
            label[masks[name]] = values[name]
        path = source / id / "RTSTRUCT" / "new.dcm"
        rois = {**masks, "UteroCervix": None, "BODY": masks["Skin"]}
        write_rtstruct(path, folder, rois, date="20200202")
        if number == 2:  # An older structure set, with another skin
            old = {**rois, "Skin": box((0, 0, 1), (12, 14, 5))}
            write_rtstruct(source / id / "RTSTRUCT" / "old.dcm", folder, old, date="20190202")

        def spoil(path=path, folder=folder, rois=rois):
            write_rtstruct(path, folder, {**rois, "Tail": masks["Lung_L"]}, date="20200202")

        made[id] = Made([voxels], affine, label, paths[2], path, spoil, patient=id)
    return made


def write_raw(source: Path) -> dict[str, Made]:
    "nnU-Net's own layout: two channels, regions and an ignore label"
    made = {}
    for number in (1, 2, 3):
        id = f"case_{number}"
        paths = source / f"imagesTr/{id}_0000.nii.gz", source / f"labelsTr/{id}.nii.gz"
        one = scan(number, *paths, [1, 2, 3], wrong=9)
        one.images.append(noise(number + 50))
        put(source / f"imagesTr/{id}_0001.nii.gz", one.images[1], one.affine)
        made[id] = one
    description = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3},
        "regions_class_order": [1, 2],
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (source / "dataset.json").write_text(json.dumps(description))
    return made


WRITERS = {name.removeprefix("write_"): f for name, f in list(globals().items()) if name.startswith("write_")}
WRITERS = {name: f for name, f in WRITERS.items() if name not in ("ct_series", "rtstruct")}
