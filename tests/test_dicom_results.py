"From DICOM to label maps, segmentations and structure sets, which are read back by other means than those that wrote them"

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from pydicom import dcmread
from skimage.draw import polygon2mask

from data_toys_dicom import series_headers, turned_affine, write_ct_series
from data_toys_dicom import write_rtstruct as write_toy_rtstruct
from mednext_v2.cli import main
from mednext_v2.core import MissingExtra, read_json
from mednext_v2.data.scans import Volume
from mednext_v2.inference.files import colour
from mednext_v2.inference.predictor import PredictSettings
from mednext_v2.intake.dicom import draw_structures, read_series, read_stack, stack_slices
from mednext_v2.integrations import dicom
from mednext_v2.integrations.dicom import join_holes, list_segments, predict_dicom, segment_codes, trace_outlines, write_dicom_seg, write_rtstruct
from mednext_v2.models.card import Card
from model_toys import KNOWN, UNET_CARD, save_unet

CPU = PredictSettings(device="cpu")
LABELS = {"spleen": 1, "kidney_left": 2, "liver_tumour": 3, "gap": 4, "rib_left_4": 5}
GROUPS = {name: "pathology" if name == "liver_tumour" else "organ" for name in LABELS}
CARD = Card(**UNET_CARD | {"labels": LABELS, "groups": GROUPS, "modality": "CT"})
GRIDS = [("LPS", (1.0, 1.0, 1.0), 0.0), ("LPS", (0.7, 1.3, 2.5), 11.0), ("PSR", (1.5, 0.9, 3.0), 0.0), ("LSA", (1.0, 2.0, 1.5), 7.0)]


def noisy_labels(shape, seed=0):
    "Labels with holes, islands in holes, voxels that touch at corners, and an empty slice; value 4 does not occur"
    values = np.random.default_rng(seed).choice([0, 1, 2, 3, 5], size=shape, p=[0.5, 0.3, 0.1, 0.08, 0.02])
    values[..., 1] = 0
    values[2:-2, 2:-2, 2] = 1
    values[4:-4, 4:-4, 2] = 0
    values[6:-6, 6:-6, 2] = 1
    return values.astype(np.uint8)


def write_series(folder, shape=(20, 18, 6), axes="LPS", spacing=(1.0, 1.0, 1.0), degrees=0.0, seed=0, **options):
    "A series of noise, and its slices in order"
    voxels = np.random.default_rng(seed).integers(-500, 500, shape)
    paths = write_ct_series(folder, voxels, turned_affine(axes, spacing, (-40, 30, 12), degrees), **options)
    return stack_slices(paths)[0]


def read_segmentation(path, headers) -> dict[str, np.ndarray]:  # (columns, rows, slices) by name
    "A binary segmentation by numpy alone: a frame lies where it says, and on the slice that it refers to"
    made = dcmread(path)
    assert (made.SegmentationType, made.BitsAllocated, made.BitsStored) == ("BINARY", 1, 1)
    count, rows, columns = int(made.NumberOfFrames), made.Rows, made.Columns
    bits = np.unpackbits(np.frombuffer(made.PixelData, np.uint8), bitorder="little")[: count * rows * columns]
    names = {int(segment.SegmentNumber): segment.SegmentLabel for segment in made.SegmentSequence}
    found = {name: np.zeros((columns, rows, len(headers)), bool) for name in names.values()}
    shared = made.SharedFunctionalGroupsSequence[0]
    for frame, groups in zip(bits.reshape(count, rows, columns), made.PerFrameFunctionalGroupsSequence):
        number = groups.get("SegmentIdentificationSequence", shared.get("SegmentIdentificationSequence"))[0].ReferencedSegmentNumber
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        (index,) = [index for index, header in enumerate(headers) if header.SOPInstanceUID == source]
        place = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        np.testing.assert_allclose(place, np.array(headers[index].ImagePositionPatient, float), atol=1e-4)
        found[names[number]][:, :, index] |= frame.T.astype(bool)
    return found


@pytest.mark.parametrize("axes, spacing, degrees", GRIDS)
def test_a_segmentation_holds_the_labels(tmp_path, axes, spacing, degrees):
    slices = write_series(tmp_path / "ct", axes=axes, spacing=spacing, degrees=degrees)
    labels = noisy_labels((20, 18, 6))
    write_dicom_seg(tmp_path / "a.dcm", labels, slices, list_segments(labels, CARD), CARD)
    headers = [dcmread(image.path, stop_before_pixels=True) for image in slices]
    found = read_segmentation(tmp_path / "a.dcm", headers)
    assert set(found) == set(LABELS) - {"gap"}
    for name, mask in found.items():
        assert (mask == (labels == LABELS[name])).all() and mask.any()
    made = dcmread(tmp_path / "a.dcm")
    assert (made.PatientID, made.StudyInstanceUID, made.FrameOfReferenceUID) == (
        headers[0].PatientID,
        headers[0].StudyInstanceUID,
        headers[0].FrameOfReferenceUID,
    )
    assert made.SeriesInstanceUID != headers[0].SeriesInstanceUID and made.Modality == "SEG"


def lab(value) -> np.ndarray:
    "A label's colour in CIELab as DICOM stores it, by scikit-image"
    from skimage.color import rgb2lab

    light, a, b = rgb2lab(np.array(colour(value)) / 255)
    return np.array([light / 100, (a + 128) / 255, (b + 128) / 255]) * 65535


def test_segments_say_what_they_are(tmp_path):
    slices, labels = write_series(tmp_path / "ct"), noisy_labels((20, 18, 6))
    write_dicom_seg(tmp_path / "a.dcm", labels, slices, list_segments(labels, CARD), CARD)
    segments = {segment.SegmentLabel: segment for segment in dcmread(tmp_path / "a.dcm").SegmentSequence}
    kinds = {name: segment.SegmentedPropertyTypeCodeSequence[0] for name, segment in segments.items()}
    codes = {name: (kind.CodeValue, kind.CodingSchemeDesignator, kind.CodeMeaning) for name, kind in kinds.items()}
    assert codes == {
        "spleen": ("78961009", "SCT", "Spleen"),
        "kidney_left": ("64033007", "SCT", "Kidney"),
        "liver_tumour": ("108369006", "SCT", "Neoplasm"),
        "rib_left_4": ("rib_left_4", "99MEDNEXT", "rib_left_4"),
    }
    assert kinds["kidney_left"].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert segments["liver_tumour"].AnatomicRegionSequence[0].CodeMeaning == "Liver"
    categories = {name: segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning for name, segment in segments.items()}
    assert categories["spleen"] == "Anatomical Structure" and categories["liver_tumour"] == "Morphologically Abnormal Structure"
    for name, segment in segments.items():
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        np.testing.assert_allclose(segment.RecommendedDisplayCIELabValue, lab(LABELS[name]), atol=400)  # White points differ by a little


def slice_masks(path, slices) -> dict[str, np.ndarray]:  # Number of contours that hold a voxel, by name
    "A structure set by scikit-image: the pixels whose centres lie in a contour, contour by contour"
    made, shape = dcmread(path), (int(slices[0].size[1]), int(slices[0].size[0]))
    headers = {dcmread(image.path, stop_before_pixels=True).SOPInstanceUID: index for index, image in enumerate(slices)}
    names = {roi.ROINumber: roi.ROIName for roi in made.StructureSetROISequence}
    found = {}
    for drawn in made.ROIContourSequence:
        count = found[names[drawn.ReferencedROINumber]] = np.zeros((*shape[::-1], len(slices)), int)
        for item in drawn.ContourSequence:
            assert item.ContourGeometricType == "CLOSED_PLANAR" and all(len(str(number)) <= 16 for number in item.ContourData)
            image = slices[index := headers[item.ContourImageSequence[0].ReferencedSOPInstanceUID]]
            away = np.array(item.ContourData, float).reshape(-1, 3) - image.corner
            np.testing.assert_allclose(away @ np.cross(*image.along), 0, atol=1e-3)
            corners = np.stack([away @ image.along[1] / image.spacing[1], away @ image.along[0] / image.spacing[0]], axis=1)
            count[:, :, index] += polygon2mask(shape, corners).T
    return found


@pytest.mark.parametrize("axes, spacing, degrees", GRIDS)
def test_a_structure_set_holds_exactly_the_labelled_voxels(tmp_path, axes, spacing, degrees):
    slices = write_series(tmp_path / "ct", axes=axes, spacing=spacing, degrees=degrees)
    labels = noisy_labels((20, 18, 6))
    write_rtstruct(tmp_path / "a.dcm", labels, slices, list_segments(labels, CARD), CARD)
    volume = read_series([image.path for image in slices])
    drawn = draw_structures(tmp_path / "a.dcm", volume, LABELS)
    native = dicom.Header(Path("."), labels.shape, labels.dtype, stack_slices([image.path for image in slices])[1])
    assert (Volume(drawn.voxels, drawn.affine, native).to_native(drawn.voxels) == labels).all()
    for name, count in slice_masks(tmp_path / "a.dcm", slices).items():
        assert (count == (labels == LABELS[name])).all()  # Each voxel in one contour, so that any rule of filling gives the same


def test_contours_may_be_long(tmp_path):
    """An explicit transfer syntax has two bytes for the length of a contour."""
    slices = write_series(tmp_path / "ct", (120, 130, 2))
    labels = np.zeros((120, 130, 2), np.uint8)
    labels[1::2] = 1
    labels[:, 60] = 1
    labels[::2, 5:-5] = np.random.default_rng(0).integers(0, 2, (60, 120, 2))
    write_rtstruct(tmp_path / "a.dcm", labels, slices, list_segments(labels, CARD), CARD)
    lengths = [item.get_item("ContourData").length for item in dcmread(tmp_path / "a.dcm").ROIContourSequence[0].ContourSequence]
    assert max(lengths) > 65_534
    assert (slice_masks(tmp_path / "a.dcm", slices)["spleen"] == (labels == 1)).all()


def test_a_structure_set_says_what_it_is(tmp_path):
    slices, labels = write_series(tmp_path / "ct"), noisy_labels((20, 18, 6))
    write_rtstruct(tmp_path / "a.dcm", labels, slices, list_segments(labels, CARD), CARD)
    made, first = dcmread(tmp_path / "a.dcm"), dcmread(slices[0].path)
    assert [roi.ROIName for roi in made.StructureSetROISequence] == ["spleen", "kidney_left", "liver_tumour", "rib_left_4"]
    assert [tuple(drawn.ROIDisplayColor) for drawn in made.ROIContourSequence] == [colour(value) for value in (1, 2, 3, 5)]
    assert [seen.RTROIInterpretedType for seen in made.RTROIObservationsSequence] == ["ORGAN", "ORGAN", "", "ORGAN"]
    assert [seen.RTROIIdentificationCodeSequence[0].CodeMeaning for seen in made.RTROIObservationsSequence] == ["Spleen", "Kidney", "Neoplasm", "rib_left_4"]
    frame = made.ReferencedFrameOfReferenceSequence[0]
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert (frame.FrameOfReferenceUID, series.SeriesInstanceUID) == (first.FrameOfReferenceUID, first.SeriesInstanceUID)
    assert len(series.ContourImageSequence) == len(slices) and made.ApprovalStatus == "UNAPPROVED"


@pytest.mark.parametrize("seed", range(20))
def test_outlines_turn_at_corners_only_and_meet_no_other_piece(seed):
    mask = np.random.default_rng(seed).random((9, 11)) < 0.55
    outlines = trace_outlines(mask)
    for corners in outlines:
        ways = [(b[0] == a[0], b[1] == a[1]) for a, b in pairwise([*corners, corners[0]])]
        assert all(one != other for one, other in pairwise([*ways, ways[0]])) and all(sum(way) == 1 for way in ways)
    filled = sum(polygon2mask(mask.shape, np.array(corners) - 0.5).astype(int) for corners in join_holes(outlines))
    assert (filled == mask).all()


def test_nothing_to_outline():
    assert trace_outlines(np.zeros((3, 4), bool)) == [] and join_holes([]) == []


@pytest.mark.parametrize(
    "name, meaning, side",
    [
        ("heart_atrium_left", "Left atrium", None),
        ("lung_upper_lobe_right", "Upper lobe of lung", "Right"),
        ("Right Kidney", "Kidney", "Right"),
        ("urinary_bladder", "Bladder", None),
        ("vertebrae_T10", "T10 vertebra", None),
        ("hip_left", "hip_left", None),
        ("kidney_and_masses", "kidney_and_masses", None),
        ("left_right", "left_right", None),
    ],
)
def test_codes_are_exact_or_private(name, meaning, side):
    found = segment_codes(name)
    assert (found.type.meaning, found.side and found.side.meaning) == (meaning, side)
    assert (found.type.scheme_designator == "SCT") == (meaning != name) and len(found.type.value) <= 16


# The command


def run(line, capsys=None) -> str:
    main([str(word) for word in line])
    return capsys.readouterr().out if capsys else ""


@pytest.fixture
def model(tmp_path):
    return save_unet(tmp_path / "model", modality="CT")


def test_a_folder_of_dicom_is_labelled_as_its_nifti(tmp_path, model, capsys):
    slices = write_series(tmp_path / "study/ct", (24, 20, 18), "PSR", (1.5, 1.5, 2.0), 9.0)
    run(["predict", "-m", model, "-i", tmp_path / "study", "-o", tmp_path / "out/a.nii.gz", "--dicom-seg", "--rtstruct", "--device", "cpu"])
    said = capsys.readouterr()
    assert all(name in said.out for name in ("a.nii.gz", "a.seg.dcm", "a.rtstruct.dcm"))
    windows = re.findall(r"predicting: (\d+)/(\d+) ", said.err)
    assert windows[-1][0] == windows[-1][1] != "0"
    volume = read_series([image.path for image in slices])
    nib.save(nib.Nifti1Image(volume.voxels, volume.affine), tmp_path / "scan.nii.gz")
    run(["predict", "-m", model, "-i", tmp_path / "scan.nii.gz", "-o", tmp_path / "b.nii.gz", "--device", "cpu"])
    ours, theirs = nib.load(tmp_path / "out/a.nii.gz"), nib.load(tmp_path / "b.nii.gz")
    turned = nib.as_closest_canonical(ours)
    assert (np.asarray(turned.dataobj) == np.asarray(theirs.dataobj)).all() and np.allclose(turned.affine, theirs.affine, atol=1e-4)
    labels = np.asarray(ours.dataobj)
    assert labels.any() and labels.shape == (24, 20, 18)
    found = read_segmentation(tmp_path / "out/a.seg.dcm", [dcmread(image.path) for image in slices])
    counts = {name: (mask == (labels == value)).all() for value, name in ((1, "core"), (2, "rim")) if (mask := found.get(name)) is not None}
    assert counts and all(counts.values())
    report = read_json(tmp_path / "out/a.json")
    assert report["files"] == [{"series": slices[0].series, "modality": "CT", "slices": 18}] and not list((tmp_path / "study").rglob("*.nii*"))
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"a.txt", "a.ctbl", "a.json"}


def test_statistics_and_picture_of_a_series_are_those_of_its_nifti(tmp_path, model, capsys):
    slices = write_series(tmp_path / "ct", (24, 20, 18), "PSR", (1.5, 1.5, 2.0), 9.0)
    volume = read_series([image.path for image in slices])
    nib.save(nib.Nifti1Image(volume.voxels, volume.affine), tmp_path / "scan.nii.gz")
    answers = []
    for source, name in ((tmp_path / "ct", "a"), (tmp_path / "scan.nii.gz", "b")):
        line = ["predict", "-m", model, "-i", source, "-o", tmp_path / f"out/{name}.nii.gz", "--device", "cpu", "--statistics", "--preview", "--json"]
        answers.append(json.loads(run(line, capsys))["statistics"])
    ours, theirs = (pd.read_csv(tmp_path / f"out/{name}_statistics.csv") for name in "ab")
    assert (ours.case + theirs.case == "a" + "scan").all() and [row["voxels"] for row in answers[0]] == ours.voxels.tolist()
    pd.testing.assert_frame_equal(ours.drop(columns="case"), theirs.drop(columns="case"))
    labels, stored = np.asarray(nib.load(tmp_path / "out/a.nii.gz").dataobj), read_stack([image.path for image in slices]).voxels
    assert ours["mean"][0] == pytest.approx(stored[labels == 1].mean()) and ours.ml[0] == pytest.approx((labels == 1).sum() * 4.5e-3)  # HU
    assert (tmp_path / "out/a.png").read_bytes() == (tmp_path / "out/b.png").read_bytes()
    run(["predict", "-m", model, "-i", tmp_path / "ct", "-o", tmp_path / "folder", "--device", "cpu", "--statistics"])
    (label_map,) = (tmp_path / "folder").glob("*.nii.gz")  # A folder may hold several series: each has a table of its own
    assert (tmp_path / "folder" / label_map.name.replace(".nii.gz", "_statistics.csv")).is_file() and not list((tmp_path / "ct").glob("*.csv"))


def test_results_are_added_without_the_network(tmp_path, model, monkeypatch):
    write_series(tmp_path / "ct", (20, 20, 18))
    first = predict_dicom(model, tmp_path / "ct", tmp_path / "out", CPU)
    assert [path.name.startswith("P01-") for path in first] == [True]
    monkeypatch.setattr(dicom, "label_job", None)
    results = predict_dicom(model, tmp_path / "ct", tmp_path / "out", CPU, results=["seg", "rtstruct"])
    kept = {path: path.read_bytes() for path in results}
    assert results[0] == first[0] and len(results) == 3
    assert predict_dicom(model, tmp_path / "ct", tmp_path / "out", CPU, results=["seg", "rtstruct"]) == results
    assert {path: path.read_bytes() for path in results} == kept
    other = save_unet(tmp_path / "other", seed=5, modality="CT")
    with pytest.raises(ValueError, match="was made in another way"):
        predict_dicom(other, tmp_path / "ct", tmp_path / "out", CPU, results=["seg"])
    monkeypatch.undo()
    predict_dicom(other, tmp_path / "ct", tmp_path / "out", CPU, results=["seg"], overwrite=True)
    assert results[1].read_bytes() != kept[results[1]]


def test_several_series_are_listed_and_chosen(tmp_path, model, capsys):
    for number, description in enumerate(("arterial", "venous"), 1):
        write_series(tmp_path / "study" / description, (20, 20, 18), seed=number, series=str(number), SeriesDescription=description)
    line = ["predict", "-m", model, "-i", tmp_path / "study", "-o", tmp_path / "out", "--device", "cpu"]
    with pytest.raises(SystemExit) as caught:
        run(line)
    told = str(caught.value)
    assert "holds 2 CT or MR series" in told and "'arterial'" in told and "'venous'" in told and "choose one with --series" in told
    lines = {text.split("'")[3]: text.split() for text in told.splitlines() if text.startswith("  ")}
    for word in (lines["venous"][0], lines["venous"][-1], lines["venous"][-1][-6:]):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        run([*line, "--series", word])
        (report,) = (tmp_path / "out").glob("*.json")
        assert read_json(report)["files"][0]["series"] == lines["venous"][-1]
    for words, text in ((["9"], "--series 9 is none of them"), (["1", "2"], r"needs 1 different series, got 2"), (["1.2.x"], "is none of them")):
        with pytest.raises(SystemExit, match=text):
            run([*line, "--series", *words])


def test_channels_are_series_in_the_order_given(tmp_path):
    normalisation = {name: values * 2 if isinstance(values, list) else values for name, values in KNOWN.items()}
    model = save_unet(tmp_path / "model", in_channels=2, normalisation=normalisation)
    volumes = {}
    for number in (1, 2):
        slices = write_series(tmp_path / f"study/{number}", (20, 20, 18), seed=number, series=str(number), modality="MR")
        volumes[slices[0].series] = read_series([image.path for image in slices])
    with pytest.raises(ValueError, match="choose 2 in the order of the model's channels"):
        predict_dicom(model, tmp_path / "study", tmp_path / "out", CPU)
    with pytest.raises(ValueError, match="needs 2 different series"):
        predict_dicom(model, tmp_path / "study", tmp_path / "out", CPU, series=["1", "1"])
    for order in (["1", "2"], ["2", "1"]):
        (made,) = predict_dicom(model, tmp_path / "study", tmp_path / "out", CPU, series=order)
        chosen = [entry["series"] for entry in read_json(made.with_name(made.name.replace(".nii.gz", ".json")))["files"]]
        for channel, series in enumerate(chosen):
            nib.save(nib.Nifti1Image(volumes[series].voxels, volumes[series].affine), tmp_path / f"scan_{channel:04d}.nii.gz")
        (tmp_path / "scans").mkdir(exist_ok=True)
        for channel in range(2):
            shutil.move(tmp_path / f"scan_{channel:04d}.nii.gz", tmp_path / f"scans/scan_{channel:04d}.nii.gz")
        run(["predict", "-m", model, "-i", tmp_path / "scans", "-o", tmp_path / "nifti", "--device", "cpu", "--overwrite"])
        ours, theirs = nib.as_closest_canonical(nib.load(made)), nib.load(tmp_path / "nifti/scan.nii.gz")
        assert (np.asarray(ours.dataobj) == np.asarray(theirs.dataobj)).all()


def test_what_else_lies_in_the_folder_is_no_scan(tmp_path, model):
    slices = write_series(tmp_path / "study/ct", (20, 20, 18))
    write_toy_rtstruct(tmp_path / "study/rt.dcm", tmp_path / "study/ct", {"liver": np.ones((20, 20, 18), bool)})
    labels = noisy_labels((20, 20, 18))
    write_dicom_seg(tmp_path / "study/seg.dcm", labels, slices, list_segments(labels, CARD), CARD)
    (tmp_path / "study/notes.txt").write_text("notes " * 100)
    assert len(predict_dicom(model, tmp_path / "study", tmp_path / "out", CPU)) == 1
    shutil.rmtree(tmp_path / "study/ct")
    with pytest.raises(ValueError, match="holds no CT or MR series, only RTSTRUCT, SEG"):
        predict_dicom(model, tmp_path / "study", tmp_path / "again", CPU)


def test_refused_before_the_network_runs(tmp_path, model, monkeypatch):
    monkeypatch.setattr(dicom, "label_job", None)
    write_series(tmp_path / "mr", (20, 20, 18), modality="MR")
    with pytest.raises(ValueError, match="is MR, but the model was trained on CT"):
        predict_dicom(model, tmp_path / "mr", tmp_path / "out", CPU)
    slices = write_series(tmp_path / "ct", (20, 20, 18))
    for target in ("ct", "ct/out", "ct/labels.nii.gz"):
        with pytest.raises(ValueError, match="lies in the folder of the DICOM files"):
            predict_dicom(model, tmp_path / "ct", tmp_path / target, CPU)
    with pytest.raises(ValueError, match="no DICOM results are called nrrd"):
        predict_dicom(model, tmp_path / "ct", tmp_path / "out", CPU, results=["nrrd"])
    (tmp_path / "labels.seg.dcm").write_bytes(b"of somebody else")
    with pytest.raises(ValueError, match="is there without a label map"):
        predict_dicom(model, tmp_path / "ct", tmp_path / "labels.nii.gz", CPU, results=["seg"])
    monkeypatch.setattr("mednext_v2.core.find_spec", lambda name: None if name == "highdicom" else name)
    with pytest.raises(MissingExtra, match=r"--dicom-seg needs highdicom: pip install 'mednext_v2\[dicom\]'"):
        predict_dicom(model, tmp_path / "ct", tmp_path / "out", CPU, results=["seg"])
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="is one file of a DICOM series: give the folder"):
        run(["predict", "-m", model, "-i", slices[0].path, "-o", tmp_path / "out", "--device", "cpu"])
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), tmp_path / "scan.nii.gz")
    for options in (["--dicom-seg"], ["--rtstruct"], ["--series", "1"]):
        with pytest.raises(SystemExit, match=f"{options[0]}: no effect here, .*scan.nii.gz is no folder of DICOM"):
            run(["predict", "-m", model, "-i", tmp_path / "scan.nii.gz", "-o", tmp_path / "out", *options, "--device", "cpu"])
    (tmp_path / "empty").mkdir()
    for target, options, text in (("labels.nii.gz", [], "holds no scan .* and no DICOM file"), ("out", ["--dicom-seg"], "holds no DICOM file")):
        with pytest.raises(SystemExit, match=text):
            run(["predict", "-m", model, "-i", tmp_path / "empty", "-o", tmp_path / target, *options, "--device", "cpu"])
    slices[7].path.unlink()
    with pytest.raises(ValueError, match="slices are missing"):
        predict_dicom(model, tmp_path / "ct", tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def strip(folder, *words):
    for path in Path(folder).iterdir():
        image = dcmread(path)
        for word in words:
            delattr(image, word)
        image.save_as(path)


def test_anonymised_headers_are_enough(tmp_path, model):
    slices = write_series(tmp_path / "ct", (20, 20, 18))
    strip(tmp_path / "ct", *"PatientName PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber ReferringPhysicianName StudyID Manufacturer".split())
    made = predict_dicom(model, tmp_path / "ct", tmp_path / "out", CPU, results=["seg", "rtstruct"])
    assert len(made) == 3 and len(series_headers(tmp_path / "ct")) == len(slices)
    strip(tmp_path / "ct", "FrameOfReferenceUID")
    with pytest.raises(ValueError, match="does not state FrameOfReferenceUID, to which DICOM results must refer"):
        predict_dicom(model, tmp_path / "ct", tmp_path / "other", CPU, results=["rtstruct"])
    assert len(predict_dicom(model, tmp_path / "ct", tmp_path / "other", CPU)) == 1


def test_without_labels_there_are_no_results(tmp_path, model):
    write_series(tmp_path / "ct", (20, 20, 18))
    nib.save(nib.Nifti1Image(np.zeros((20, 20, 18), np.uint8), stack_slices(sorted((tmp_path / "ct").iterdir()))[1]), tmp_path / "roi.nii.gz")
    made = predict_dicom(model, tmp_path / "ct", tmp_path / "out", CPU)
    image = nib.load(made[0])
    nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine, image.header), made[0])
    with pytest.warns(UserWarning, match="no voxel is labelled, so there are no DICOM results"):
        assert predict_dicom(model, tmp_path / "ct", tmp_path / "out", CPU, results=["seg"]) == made


def test_a_folder_with_nifti_stays_a_folder_of_nifti(tmp_path):
    write_series(tmp_path / "both/ct")
    assert dicom.is_dicom(tmp_path / "both") and not dicom.is_dicom(tmp_path / "absent")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "both/a.nii.gz")
    assert not dicom.is_dicom(tmp_path / "both")
