"""DICOM series and structure sets that several tests write, by arithmetic of their own."""

from hashlib import sha256
from pathlib import Path

import numpy as np
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian
from skimage.measure import find_contours

CT_IMAGE, RT_STRUCTURES = UID("1.2.840.10008.5.1.4.1.1.2"), UID("1.2.840.10008.5.1.4.1.1.481.3")
FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM counts mm to the left and back, NIfTI to the right and front


def uid(*words) -> UID:
    "The same words give the same identifier"
    text = "\n".join(map(str, words))
    return UID(f"2.25.{int.from_bytes(sha256(text.encode()).digest()[:15], 'big')}")


def new_dataset(kind: UID, instance: UID, patient: str, study: UID) -> Dataset:
    "What every DICOM file must state"
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID, dataset.file_meta.MediaStorageSOPInstanceUID = kind, instance
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = kind, instance
    dataset.PatientID, dataset.PatientName, dataset.StudyInstanceUID = patient, patient, study
    dataset.StudyDate = dataset.StudyTime = dataset.StudyID = dataset.AccessionNumber = ""
    dataset.PatientBirthDate = dataset.PatientSex = dataset.ReferringPhysicianName = dataset.Manufacturer = ""
    return dataset


def turned_affine(
    axes="LPS",  # Where each voxel axis leads, e.g. "LPS" for a patient on the back, head first
    spacing=(1.0, 1.0, 1.0),  # mm
    origin=(0.0, 0.0, 0.0),  # mm, RAS
    degrees=0.0,  # Turned about the vertical axis of the room, for an oblique grid
) -> np.ndarray:
    "An affine (voxel index to mm in RAS) with the axes named"
    affine = np.eye(4)
    for column, letter in enumerate(axes):
        axis = ["LR", "PA", "IS"].index(next(pair for pair in ("LR", "PA", "IS") if letter in pair))
        affine[:3, column] = 0
        affine[axis, column] = spacing[column] if letter in "RAS" else -spacing[column]
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    tip = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine[:3, :3] = tip @ turn @ affine[:3, :3]
    affine[:3, 3] = origin
    return affine


def write_ct_series(
    folder,
    voxels,  # (X, Y, Z) HU, whole numbers if the slope is 1; X runs along an image's rows, Z across images
    affine,  # (4, 4), voxel index to mm in RAS: the grid's own axes, in any orientation
    patient="P01",
    series="1",  # Any word: part of the identifiers
    slope=1.0,
    intercept=-1024.0,
    signed=False,  # Whether stored values may be negative
    modality="CT",
    position="HFS",
    names="shuffled",  # File names tell nothing of the order: "shuffled" | "ordered"
    suffix=".dcm",
    **changes,  # Further DICOM keywords for all images; a callable is called with the slice index
) -> list[Path]:  # In the order of Z
    "One file per slice"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    voxels, matrix = np.asarray(voxels), FLIP @ np.asarray(affine, float)
    spacing = np.linalg.norm(matrix[:3, :3], axis=0)
    along = matrix[:3, :3] / spacing
    stored = np.rint((voxels - intercept) / slope).astype(np.int16 if signed else np.uint16)
    numbers = np.arange(voxels.shape[2])
    shown = np.random.default_rng(len(series)).permutation(numbers) if names == "shuffled" else numbers
    paths = []
    for index in numbers:
        image = new_dataset(CT_IMAGE, uid(patient, series, index), patient, uid(patient, "study"))
        image.SeriesInstanceUID, image.FrameOfReferenceUID = uid(patient, series), uid(patient, "frame")
        image.Modality, image.PatientPosition = modality, position
        image.SeriesNumber, image.InstanceNumber = 1, int(index) + 1
        image.SeriesDescription, image.ImageType = f"series {series}", ["ORIGINAL", "PRIMARY", "AXIAL"]
        corner = matrix @ [0, 0, index, 1]
        image.ImagePositionPatient = [f"{value:.6f}" for value in corner[:3]]
        image.ImageOrientationPatient = [f"{value:.10f}" for value in (*along[:, 0], *along[:, 1])]
        image.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]  # Between rows, then between columns
        image.SliceThickness = f"{spacing[2]:.6f}"
        image.Rows, image.Columns = voxels.shape[1], voxels.shape[0]
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
        image.PixelRepresentation = int(signed)
        image.RescaleSlope, image.RescaleIntercept, image.RescaleType = f"{slope:g}", f"{intercept:g}", "HU"
        image.PixelData = np.ascontiguousarray(stored[:, :, index].T).tobytes()
        for keyword, value in changes.items():
            setattr(image, keyword, value(index) if callable(value) else value)
        paths.append(folder / f"{'IM' if names == 'shuffled' else 'slice'}{shown[index]:04d}{suffix}")
        image.save_as(paths[-1], enforce_file_format=True)
    return paths


def series_headers(folder) -> list[Dataset]:
    "The images of a folder in the order of their instance numbers, without pixels"
    found = [dcmread(path, stop_before_pixels=True) for path in Path(folder).iterdir() if path.is_file()]
    return sorted((image for image in found if "Rows" in image), key=lambda image: image.InstanceNumber)


def outlines(
    mask,  # bool (X, Y)
    keyhole=False,  # Join holes to the outline by a bridge, as planning systems do
) -> list[np.ndarray]:  # Each (points, 2), voxel indices
    "Closed curves half-way between voxels inside and outside; holes are curves of their own"
    curves = [curve[:-1] - 1 for curve in find_contours(np.pad(np.asarray(mask, float), 1), 0.5)]
    if not keyhole or len(curves) < 2:
        return curves
    curves.sort(key=lambda curve: -np.ptp(curve, axis=0).prod())
    outer = curves[0]
    for hole in curves[1:]:
        distance = np.linalg.norm(outer[:, None] - hole[None], axis=2)
        a, b = np.unravel_index(distance.argmin(), distance.shape)
        ring = np.roll(hole, -b, axis=0)
        outer = np.concatenate([outer[: a + 1], ring, ring[:1], outer[a:]])
    return [outer]


def write_rtstruct(
    path,
    series_folder,
    rois,  # Name to bool mask (X, Y, Z) as the series was written, list of (points, 3) in mm LPS, or None: no contour
    date="20200102",  # StructureSetDate; "" leaves it empty
    time="120000",
    created=("", ""),  # InstanceCreationDate and -Time
    keyhole=False,
    shift=0.0,  # Contours lie this many slices off
    reference="series",  # What it tells of its images: "series" | "frame" | "none"
    kind="CLOSED_PLANAR",
) -> Path:
    "An RTSTRUCT that refers to the images in a folder"
    images = series_headers(series_folder)
    first = images[0]
    structures = new_dataset(RT_STRUCTURES, uid(path, date, time), first.PatientID, first.StudyInstanceUID)
    structures.SeriesInstanceUID, structures.Modality = uid(path, "series"), "RTSTRUCT"
    structures.StructureSetLabel, structures.StructureSetDate, structures.StructureSetTime = "toy", date, time
    if created[0]:
        structures.InstanceCreationDate, structures.InstanceCreationTime = created
    structures.ReferencedFrameOfReferenceSequence = Sequence([frame_item(images, reference)])
    structures.StructureSetROISequence, structures.ROIContourSequence = Sequence(), Sequence()
    structures.RTROIObservationsSequence = Sequence()
    for number, (name, shape) in enumerate(rois.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ROIGenerationAlgorithm = number, name, "MANUAL"
        roi.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
        structures.StructureSetROISequence.append(roi)
        drawn.ReferencedROINumber, drawn.ROIDisplayColor = number, [255, 0, 0]
        if shape is not None:
            curves = shape if isinstance(shape, list) else mask_curves(shape, images, keyhole, shift)
            drawn.ContourSequence = Sequence(contour_item(curve, kind) for curve in curves)
        structures.ROIContourSequence.append(drawn)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    structures.save_as(path, enforce_file_format=True)
    return Path(path)


def frame_item(images, reference) -> Dataset:
    "What a structure set tells of its images"
    frame, study, series = Dataset(), Dataset(), Dataset()
    frame.FrameOfReferenceUID = images[0].FrameOfReferenceUID if reference != "none" else uid("elsewhere")
    if reference == "series":
        series.SeriesInstanceUID, series.ContourImageSequence = images[0].SeriesInstanceUID, Sequence()
        for image in images:
            one = Dataset()
            one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
            series.ContourImageSequence.append(one)
        study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = CT_IMAGE, images[0].StudyInstanceUID
        study.RTReferencedSeriesSequence = Sequence([series])
        frame.RTReferencedStudySequence = Sequence([study])
    return frame


def contour_item(curve, kind) -> Dataset:
    "A curve (points, 3) in mm"
    item = Dataset()
    item.ContourGeometricType, item.NumberOfContourPoints = kind, len(curve)
    item.ContourData = [f"{value:.4f}" for value in np.asarray(curve).ravel()]
    return item


def mask_curves(mask, images, keyhole, shift) -> list[np.ndarray]:
    "Outlines of a mask in mm, each on its own image's plane"
    step = np.subtract(images[-1].ImagePositionPatient, images[0].ImagePositionPatient) / max(len(images) - 1, 1)
    curves = []
    for index, image in enumerate(images):
        along = np.array(image.ImageOrientationPatient, float).reshape(2, 3)
        rows, columns = map(float, image.PixelSpacing)
        corner = np.array(image.ImagePositionPatient, float) + shift * step
        for outline in outlines(np.asarray(mask)[:, :, index], keyhole):
            curves.append(corner + outline[:, :1] * columns * along[0] + outline[:, 1:] * rows * along[1])
    return curves
