"""DICOM series and structure sets against phantoms of known shape, SimpleITK's reader and scikit-image's polygons."""

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless
from skimage.draw import polygon2mask

from data_toys_dicom import CT_IMAGE, FLIP, series_headers, turned_affine, write_ct_series, write_rtstruct
from mednext_v2.intake.dicom import (
    StructureSet,
    draw_structures,
    fill_polygons,
    find_series,
    label_values,
    newest_structure_set,
    plain_name,
    read_series,
    structure_names,
)

SHAPE, SPACING, ORIGIN = (32, 24, 10), (1.0, 1.5, 3.0), (12.5, -40.25, 700.0)
GRIDS = {
    "supine, head first": ("LPS", 0),
    "supine, slices downwards": ("LPI", 0),
    "supine, feet first": ("RPI", 0),
    "prone": ("RAS", 0),
    "prone, slices downwards": ("RAI", 0),
    "coronal": ("LIP", 0),
    "sagittal": ("PIL", 0),
    "oblique": ("LPS", 12),
    "oblique and downwards": ("LPI", -25),
    "oblique sagittal": ("AIR", 20),
}


@pytest.fixture
def voxels():
    return np.random.default_rng(0).integers(-1024, 3000, SHAPE)


def places(shape, affine) -> np.ndarray:
    "mm of every voxel"
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def at(volume, mm) -> np.ndarray:
    "Values of a volume at places in mm, which must be voxels' centres to 1e-4 mm"
    inverse = np.linalg.inv(volume.affine)
    index = mm @ inverse[:3, :3].T + inverse[:3, 3]
    nearest = np.rint(index).astype(int)
    assert np.abs((nearest - index) * np.linalg.norm(volume.affine[:3, :3], axis=0)).max() < 1e-4
    return volume.voxels[tuple(np.moveaxis(nearest, -1, 0))]


def dice(a, b) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def itk(folder):
    "The series as SimpleITK reads it"
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.mark.parametrize("name", GRIDS)
def test_every_voxel_is_where_the_files_and_simpleitk_put_it(name, voxels, tmp_path):
    affine = turned_affine(GRIDS[name][0], SPACING, ORIGIN, GRIDS[name][1])
    paths = write_ct_series(tmp_path, voxels, affine)
    volume = read_series(np.random.default_rng(1).permutation(paths).tolist())
    assert volume.voxels.dtype == np.int16 and volume.voxels.size == voxels.size
    assert np.array_equal(at(volume, places(SHAPE, affine)), voxels)
    image = itk(tmp_path)
    grid = np.eye(4)
    grid[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    grid[:3, 3] = image.GetOrigin()
    stored = SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0)
    assert np.array_equal(at(volume, places(stored.shape, FLIP @ grid)), stored)
    closest = np.abs(volume.affine[:3, :3]).argmax(axis=0)
    assert closest.tolist() == [0, 1, 2] and (np.diag(volume.affine) > 0).all(), "RAS"


RESCALES = {
    "plain": dict(slope=1, intercept=-1024, signed=False),
    "signed": dict(slope=1, intercept=0, signed=True),
    "odd intercept": dict(slope=1, intercept=-8192, signed=False),
    "half slope": dict(slope=0.5, intercept=-1024, signed=False),
    "broken slope": dict(slope=0.73, intercept=-1000.5, signed=False),
}


@pytest.mark.parametrize("name", RESCALES)
def test_hounsfield_units_are_exact(name, tmp_path):
    stored = np.random.default_rng(0).integers(0, 2000, SHAPE)
    values = stored * RESCALES[name]["slope"] + RESCALES[name]["intercept"]
    paths = write_ct_series(tmp_path, values, turned_affine("RAS"), **RESCALES[name])
    volume = read_series(paths)
    whole = RESCALES[name]["slope"] == 1
    assert volume.voxels.dtype == (np.int16 if whole else np.float32)
    ours = at(volume, places(SHAPE, turned_affine("RAS")))
    assert np.array_equal(ours, values) if whole else np.allclose(ours, values, rtol=0, atol=2e-4)


def test_slopes_may_differ_by_slice_and_large_values_stay_whole(voxels, tmp_path):
    affine = turned_affine("RAS")
    paths = write_ct_series(tmp_path / "a", voxels, affine, RescaleSlope=lambda z: "1" if z % 2 else "2")
    expected = np.where(np.arange(10) % 2, voxels, (voxels + 1024) * 2 - 1024)
    volume = read_series(paths)
    assert volume.voxels.dtype == np.float32 and np.array_equal(at(volume, places(SHAPE, affine)), expected)
    paths = write_ct_series(tmp_path / "b", voxels + 50_000, affine, intercept=0)
    assert np.array_equal(at(read_series(paths), places(SHAPE, affine)), voxels + 50_000)


def test_twelve_bits_with_a_sign(tmp_path):
    values = np.random.default_rng(0).integers(-2048, 2048, SHAPE)
    bits = dict(BitsStored=12, HighBit=11, PixelRepresentation=1)
    clean = values & 0xFFF  # The upper four bits are not part of the value
    affine = turned_affine("LPS")
    paths = write_ct_series(tmp_path, clean, affine, intercept=0, **bits)
    ours = at(read_series(paths), places(SHAPE, affine))
    assert np.array_equal(ours, values)
    assert np.array_equal(SimpleITK.GetArrayFromImage(itk(tmp_path)).T, ours)


@pytest.mark.parametrize("kind", ["RLE", "JPEG2000", "JPEGLS"])
def test_compressed_pixels_are_the_same(kind, voxels, tmp_path):
    affine = turned_affine("LPS", SPACING)
    plain = read_series(write_ct_series(tmp_path / "plain", voxels, affine))
    paths = write_ct_series(tmp_path / kind, voxels, affine)
    for path in paths:
        dataset = pydicom.dcmread(path)
        if kind == "RLE":
            dataset.compress(RLELossless)
        else:
            stored = SimpleITK.GetImageFromArray(dataset.pixel_array[None].astype(np.uint16))
            writer = SimpleITK.ImageFileWriter()
            writer.SetImageIO("GDCMImageIO")
            writer.UseCompressionOn()
            writer.SetCompressor(kind)
            writer.SetFileName(str(tmp_path / "one.dcm"))
            writer.Execute(stored)
            packed = pydicom.dcmread(tmp_path / "one.dcm")
            dataset.file_meta.TransferSyntaxUID = packed.file_meta.TransferSyntaxUID
            dataset.PixelData = packed.PixelData
            dataset["PixelData"].is_undefined_length = True
        assert dataset.file_meta.TransferSyntaxUID.is_compressed
        dataset.save_as(path)
    volume = read_series(paths)
    assert np.array_equal(volume.voxels, plain.voxels) and np.allclose(volume.affine, plain.affine)


def broken_series(kind, folder, voxels) -> list:
    "Paths of a series with one fault"
    affine = turned_affine("LPS", SPACING, ORIGIN)
    changes = {
        "uneven": dict(ImagePositionPatient=lambda z: [0, 0, 3 * z + (1.2 if z > 5 else 0)]),
        "tilted": dict(ImagePositionPatient=lambda z: [0, 0.5 * z, 3 * z]),
        "size": dict(Columns=lambda z: 16 if z == 3 else 32, Rows=lambda z: 48 if z == 3 else 24),
        "spacing": dict(PixelSpacing=lambda z: [1.5, 1.1] if z == 3 else [1.5, 1.0]),
        "scout": dict(ImageOrientationPatient=lambda z: [1, 0, 0, 0, 0, -1] if z == 3 else [1, 0, 0, 0, 1, 0]),
        "skewed": dict(ImageOrientationPatient=[1, 0, 0, 0.5, 0.8, 0]),
        "not a number": dict(ImagePositionPatient=lambda z: ["NaN", 0, 0] if z == 3 else [0, 0, 3 * z]),
        "no position": dict(ImagePositionPatient=None),
        "no rescale": dict(RescaleIntercept=None),
        "no slope": dict(RescaleSlope="0"),
        "frames": dict(NumberOfFrames=2),
        "colour": dict(SamplesPerPixel=3),
        "huge": dict(Rows=65_000, Columns=65_000),
        "pixels lie": dict(Rows=2400),
    }.get(kind, {})
    paths = write_ct_series(folder, voxels, affine, **changes)
    if kind == "missing":
        return paths[:3] + paths[5:]
    if kind == "missing near the end":
        return paths[:8] + paths[9:]
    if kind == "copies":
        return paths + write_ct_series(folder / "again", voxels[:, :, 4:5], affine @ shifted(4))
    if kind == "mixed":
        return paths + write_ct_series(folder / "other", voxels, affine @ shifted(10), series="2")
    if kind == "one":
        return paths[:1]
    if kind == "none":
        return []
    if kind == "text":
        paths[3].write_text("slice " * 100)
    if kind == "truncated pixels":
        paths[3].write_bytes(paths[3].read_bytes()[:-500])
    if kind == "truncated header":
        paths[3].write_bytes(paths[3].read_bytes()[:420])
    if kind == "gone":
        paths[3].unlink()
    if kind == "deflated":
        dataset = pydicom.dcmread(paths[3])
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(paths[3])
    return paths


def shifted(slices) -> np.ndarray:
    matrix = np.eye(4)
    matrix[2, 3] = slices
    return matrix


FAULTS = {
    "missing": "slices are missing (2, e.g. between IM",
    "missing near the end": "slices are missing (1, e.g. between IM",
    "uneven": "spaced unevenly (3.000 to 4.200 mm",
    "copies": "lie at the same position (1 such pairs): remove copies",
    "mixed": "are of different series",
    "tilted": "the gantry is tilted by 9.5 degrees",
    "size": "differ in size",
    "spacing": "differ in spacing",
    "scout": "differ in orientation",
    "skewed": "impossible ImageOrientationPatient",
    "not a number": "does not state ImagePositionPatient",
    "no position": "does not state ImagePositionPatient",
    "no rescale": "does not state RescaleIntercept",
    "no slope": "does not state RescaleSlope",
    "frames": "several frames",
    "colour": "colour image",
    "huge": "voxels, more than",
    "pixels lie": "cannot be read as DICOM",
    "one": "1 slices make no volume",
    "none": "0 slices make no volume",
    "text": "is no DICOM file",
    "truncated pixels": "cannot be read as DICOM",
    "truncated header": "",
    "deflated": "is deflated DICOM",
    "gone": "No such file",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAULTS)
def test_faults_of_a_series_are_named(kind, voxels, tmp_path):
    paths = broken_series(kind, tmp_path, voxels)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_series(paths)
    assert FAULTS[kind] in str(caught.value)
    assert kind == "none" or str(tmp_path) in str(caught.value)


def test_rounded_positions_are_no_fault(voxels, tmp_path):
    affine = turned_affine("LPS", (1, 1, 0.625))
    paths = write_ct_series(tmp_path, voxels, affine, ImagePositionPatient=lambda z: [0, 0, round(0.625 * z, 1)])
    assert read_series(paths).spacing[2] == pytest.approx(0.625, abs=0.01)


def test_series_are_found_by_identifier_not_by_name(voxels, tmp_path):
    affine = turned_affine("LPS", SPACING)
    write_ct_series(tmp_path / "x", voxels, affine, patient="A/../B", suffix="")
    write_ct_series(tmp_path / "x", voxels[:, :, :4], affine, patient="A/../B", series="22", suffix=".ima")
    write_ct_series(tmp_path / "y" / "z", voxels, affine, patient="C", modality="MR")
    (tmp_path / "x" / "notes.txt").write_text("not DICOM " * 50)
    (tmp_path / "x" / "empty.dcm").touch()
    (tmp_path / "y" / "loop").symlink_to(tmp_path)
    mask = np.ones(SHAPE, bool)
    write_rtstruct(tmp_path / "by series", tmp_path / "y" / "z", {"Heart": mask})
    write_rtstruct(tmp_path / "by frame", tmp_path / "y" / "z", {"Heart": mask}, reference="frame")
    found = find_series(tmp_path)
    assert [(one.patient, one.modality, len(one.paths), len(one.structures)) for one in found] == [
        ("A/../B", "CT", 10, 0),
        ("A/../B", "CT", 4, 0),
        ("C", "MR", 10, 2),
    ] or [len(one.paths) for one in found] == [4, 10, 10]
    assert found[0].case == "A-B" and found[2].case == "C"
    assert sum(len(one.structures) for one in found[:2]) == 0 and len(found[2].structures) == 2
    assert np.array_equal(np.sort(read_series(found[2].paths).voxels, axis=None), np.sort(voxels, axis=None))


def test_structure_sets_without_their_series_are_kept_apart(voxels, tmp_path):
    write_ct_series(tmp_path / "a", voxels, turned_affine("LPS"))
    write_ct_series(tmp_path / "b", voxels, turned_affine("LPS"), series="22")  # Same frame: the frame cannot decide
    mask = np.ones(SHAPE, bool)
    write_rtstruct(tmp_path / "frame", tmp_path / "a", {"Heart": mask}, reference="frame")
    write_rtstruct(tmp_path / "none", tmp_path / "a", {"Heart": mask}, reference="none")
    found = {one.uid: one for one in find_series(tmp_path)}
    assert len(found) == 3 and len(found[""].structures) == 2 and not found[""].paths
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    write_rtstruct(tmp_path / "lost", tmp_path / "b", {"Heart": mask})
    for path in (tmp_path / "b").iterdir():
        path.unlink()
    lost = [one for one in find_series(tmp_path) if one.uid]
    assert len(lost) == 1 and not lost[0].paths and lost[0].patient == "P01"


def test_folders_without_dicom_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_series(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x" * 1000)
    with pytest.raises(FileNotFoundError, match="holds no DICOM file"):
        find_series(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_in_a_folder_is_named(voxels, tmp_path):
    paths = write_ct_series(tmp_path, voxels, turned_affine("LPS"))
    data = paths[2].read_bytes()
    cut = data.index(b"Modality") if b"Modality" in data else 400
    for size in range(140, cut, 41):  # Cut anywhere: an error with the file's name, or the file is left out
        paths[2].write_bytes(data[:size])
        try:
            found = find_series(tmp_path)
        except ValueError as error:
            assert str(paths[2]) in str(error)
        else:
            assert sum(len(one.paths) for one in found) in (9, 10)


DATES = {
    "date": (dict(date="20200102"), dict(date="20200103")),
    "time": (dict(time="0959"), dict(time="100000.5")),
    "fraction": (dict(time="100000.25"), dict(time="100000.5")),
    "old spelling": (dict(date="2020.01.02", time="09:59:00"), dict(date="20200102", time="100000")),
    "creation": (dict(date="20200102"), dict(date="", time="", created=("20200103", "080000"))),
    "creation of both": (dict(date="", time="", created=("20200103", "080000")), dict(date="", time="", created=("20200103", "080001"))),
    "undated is older": (dict(date="", time=""), dict(date="19990101")),
    "set before file": (dict(date="20200102", created=("20240101", "")), dict(date="20200103")),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("name", DATES)
def test_the_newest_structure_set_wins(name, swap, voxels, tmp_path):
    write_ct_series(tmp_path / "ct", voxels, turned_affine("LPS"))
    old, new = DATES[name]
    names = ("a", "b") if swap else ("b", "a")
    write_rtstruct(tmp_path / names[0], tmp_path / "ct", {"Heart": None}, **old)
    write_rtstruct(tmp_path / names[1], tmp_path / "ct", {"Liver": None}, **new)
    (series,) = find_series(tmp_path)
    chosen = newest_structure_set(series.structures)
    assert chosen.path.name == names[1] and structure_names(chosen.path) == {"Liver": 0}


def test_copies_of_a_structure_set_are_one_and_ties_are_refused(tmp_path):
    one, copy, other = (StructureSet(tmp_path / name, "P", "1", uid, ("20200101", "")) for name, uid in ("ax", "bx", "cy"))
    assert newest_structure_set([copy, one]) is one
    with pytest.raises(ValueError, match="made at the same time .20200101."):
        newest_structure_set([one, other])
    with pytest.raises(ValueError, match="no structure set"):
        newest_structure_set([])


def ball_curves(centre, radius, heights, direction=1) -> list:
    "Circles of a ball in mm (LPS) in axial planes"
    angle = direction * np.linspace(0, 2 * np.pi, 90, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    curves = []
    for z in heights:
        if abs(z - centre[2]) < radius:
            size = np.sqrt(radius**2 - (z - centre[2]) ** 2)
            curves.append(np.column_stack([centre[:2] + size * circle, np.full(len(circle), z)]))
    return curves


@pytest.mark.parametrize("axes", ["LPS", "LPI", "RPI", "RAS"])
def test_a_ball_of_circles_is_a_ball(axes, tmp_path):
    affine = turned_affine(axes, (1, 1.25, 2), ORIGIN)
    shape = (40, 32, 16)
    write_ct_series(tmp_path / "ct", np.zeros(shape), affine)
    centre = (affine @ [20.3, 15.8, 7.6, 1])[:3]
    heights = [image.ImagePositionPatient[2] for image in series_headers(tmp_path / "ct")]
    curves = ball_curves((FLIP @ [*centre, 1])[:3], 11, heights)
    path = write_rtstruct(tmp_path / "rs", tmp_path / "ct", {"Ball": curves})
    (series,) = find_series(tmp_path)
    label = draw_structures(path, read_series(series.paths), {"ball": 3})
    ours = at(label, places(shape, affine)) == 3
    truth = np.linalg.norm(places(shape, affine) - centre, axis=-1) < 11
    assert dice(ours, truth) > 0.99
    assert ours.sum() * 2.5 == pytest.approx(4 / 3 * np.pi * 11**3, rel=0.03)  # Voxels of 2.5 mm3


def blocks() -> dict[str, np.ndarray]:
    masks = {name: np.zeros(SHAPE, bool) for name in ("body", "shell", "organ", "two")}
    masks["body"][2:30, 2:22, 1:9] = True
    masks["shell"][4:28, 4:20, 2:8] = True
    masks["shell"][8:20, 8:16, 3:6] = False
    masks["shell"][12:15, 10:13, 3:6] = True  # An island in the hole
    masks["organ"][10:14, 6:12, 4:7] = True
    masks["two"][3:8, 3:8, :] = masks["two"][15:29, 10:23, :] = True  # Two pieces, in all slices
    return masks


@pytest.mark.parametrize("name", GRIDS)
def test_masks_come_back_exactly_on_every_grid(name, tmp_path):
    affine = turned_affine(GRIDS[name][0], SPACING, ORIGIN, GRIDS[name][1])
    paths = write_ct_series(tmp_path / "ct", np.zeros(SHAPE), affine)
    masks = blocks()
    path = write_rtstruct(tmp_path / "rs", tmp_path / "ct", masks)
    volume = read_series(paths)
    for roi, mask in masks.items():
        label = draw_structures(path, volume, {roi: 1}, others="skip")
        assert label.voxels.dtype == np.uint8 and np.array_equal(label.affine, volume.affine)
        assert np.array_equal(at(label, places(SHAPE, affine)) == 1, mask), roi


@pytest.fixture
def scan(tmp_path):
    affine = turned_affine("RAS", SPACING, ORIGIN)
    return read_series(write_ct_series(tmp_path / "ct", np.zeros(SHAPE), affine))


def drawn(tmp_path, scan, rois, names=None, order=(), others="raise", **options) -> np.ndarray:
    path = write_rtstruct(tmp_path / "rs", tmp_path / "ct", rois, **options)
    return draw_structures(path, scan, names or {name: i + 1 for i, name in enumerate(rois)}, order, others).voxels


@pytest.mark.parametrize("options", [{"keyhole": True}, {"kind": "CLOSEDPLANAR_XOR"}, {"shift": 0.4}, {"shift": -0.4}])
def test_keyholes_and_shifted_planes_change_nothing(options, tmp_path, scan):
    masks = blocks()
    if "keyhole" in options:
        masks.pop("two")  # A bridge between pieces is no keyhole
    for roi, mask in masks.items():
        assert np.array_equal(drawn(tmp_path, scan, {roi: mask}, **options) == 1, mask), roi


@pytest.mark.parametrize("shift", [0.5, -0.5])
def test_planes_half_way_between_slices_all_go_one_way(shift, tmp_path, scan):
    mask = np.zeros(SHAPE, bool)
    mask[4:20, 4:20, 3:7] = True
    ours = drawn(tmp_path, scan, {"organ": mask}, shift=shift)
    assert any(np.array_equal(ours == 1, np.roll(mask, step, axis=2)) for step in (-1, 0, 1))


def test_curves_listed_twice_and_planes_between_slices_do_not_cancel(tmp_path, scan):
    mask = np.zeros(SHAPE, bool)
    mask[4:20, 4:20, 3:7] = True
    heights = [image.ImagePositionPatient[2] for image in series_headers(tmp_path / "ct")]
    square = [[x, y] for x, y in ((3.5, 3.5), (19.5, 3.5), (19.5, 19.5), (3.5, 19.5))]
    corner = np.array(series_headers(tmp_path / "ct")[0].ImagePositionPatient[:2], float)

    def curve(z, scale=1.0):
        return np.column_stack([corner - np.array(square) * SPACING[:2] * scale, np.full(4, z)])

    exact = [curve(z) for z in heights[3:7]]
    between = [curve(z + step, 0.5) for z in heights[3:7] for step in (-1, 1)]  # A third of a slice off
    assert np.array_equal(drawn(tmp_path, scan, {"organ": exact}) == 1, mask)
    assert np.array_equal(drawn(tmp_path, scan, {"organ": exact + exact[1:3]}) == 1, mask)
    assert np.array_equal(drawn(tmp_path, scan, {"organ": between + exact}) == 1, mask)


def test_what_comes_first_is_covered(tmp_path, scan):
    masks = blocks()
    rois = {"organ": masks["organ"], "Bones": masks["shell"], "SKIN": masks["body"]}
    names = {"organ": 1, "bones": 2, "skin": 3}
    expected = np.zeros(SHAPE, int)
    for name, value in (("SKIN", 3), ("Bones", 2), ("organ", 1)):
        expected[rois[name]] = value
    assert np.array_equal(drawn(tmp_path, scan, rois, names, order=(3, 2)), expected)
    by_value = drawn(tmp_path, scan, rois, names)
    assert (by_value[masks["body"]] == 3).all(), "without an order, higher values cover lower ones"


def test_several_structures_may_share_a_label(tmp_path, scan):
    a, b = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    a[4:12, 4:12, 2:6], b[8:20, 8:20, 3:8] = True, True
    ours = drawn(tmp_path, scan, {"Ovary": a, "Testis": b}, {"Ovary": 300, "testis": 300})
    assert ours.dtype == np.uint16 and np.array_equal(ours == 300, a | b)
    path = write_rtstruct(tmp_path / "rs", tmp_path / "ct", {"Ovary": a, "Testis": b})
    dataset = pydicom.dcmread(path)
    dataset.StructureSetROISequence[1].ROIName = "Ovary"
    dataset.save_as(path)
    assert structure_names(path) == {"Ovary": 4 + 5}
    assert np.array_equal(draw_structures(path, scan, {"ovary": 1}).voxels == 1, a | b)


def test_structures_match_by_number_not_by_place(tmp_path, scan):
    masks = blocks()
    path = write_rtstruct(tmp_path / "rs", tmp_path / "ct", {"body": masks["body"], "organ": masks["organ"]})
    dataset = pydicom.dcmread(path)
    dataset.ROIContourSequence = dataset.ROIContourSequence[::-1]
    dataset.save_as(path)
    label = draw_structures(path, scan, {"body": 1, "organ": 2}).voxels
    assert np.array_equal(label == 2, masks["organ"])


def test_absent_contours_leave_background(tmp_path, scan):
    rois = {"Prostate": None, "UteroCervix": [], "Liver": blocks()["organ"]}
    ours = drawn(tmp_path, scan, rois, {"Prostate": 1, "Utero Cervix": 2, "Liver": 3})
    assert set(np.unique(ours)) == {0, 3}
    assert structure_names(tmp_path / "rs") == {"Prostate": 0, "UteroCervix": 0, "Liver": 3}
    path = tmp_path / "rs"
    dataset = pydicom.dcmread(path)
    del dataset.ROIContourSequence
    dataset.save_as(path)
    assert not draw_structures(path, scan, {"Liver": 3}).voxels.any()


@pytest.mark.parametrize("kind", ["POINT", "OPEN_PLANAR", "OPEN_NONPLANAR"])
def test_points_and_lines_bound_nothing(kind, tmp_path, scan):
    assert not drawn(tmp_path, scan, {"Marker": blocks()["organ"]}, {"other": 1}, kind=kind).any()


def test_degenerate_curves_are_nothing_and_parts_outside_are_cut_off(tmp_path, scan):
    first = np.array(series_headers(tmp_path / "ct")[4].ImagePositionPatient, float)
    assert not drawn(tmp_path, scan, {"Dot": [first[None], np.stack([first, first - [5, 5, 0]])]}).any()
    assert not drawn(tmp_path, scan, {"Line": [np.stack([first, first - [5, 0, 0], first - [9, 0, 0]])]}).any()
    wide = [first + [[900, 900, 0], [-900, 900, 0], [-900, -900, 0], [900, -900, 0]]]
    expected = np.zeros(SHAPE, bool)
    expected[:, :, 4] = True
    assert np.array_equal(drawn(tmp_path, scan, {"Wide": wide}) == 1, expected)


def test_names_that_nobody_declared_stop_or_are_skipped(tmp_path, scan):
    masks = blocks()
    rois = {"Lt Adrenal": masks["organ"], "Cuoch": masks["body"], "Empty": None}
    with pytest.raises(ValueError, match="rs has structures 'Cuoch' that the table of names lacks"):
        drawn(tmp_path, scan, rois, {"Adrenal Left": 5})
    for names, others in (({"Adrenal Left": 5, "cuoch": None}, "raise"), ({"Adrenal Left": 5}, "skip")):
        assert np.array_equal(drawn(tmp_path, scan, rois, names, others=others) == 5, masks["organ"])
    with pytest.raises(ValueError, match="has the values 1 and 2"):
        label_values([], {"Lt Adrenal": 1, "adrenal left": 2})


@pytest.mark.parametrize(
    "names",
    [
        ("Adrenal Left", "Lt Adrenal", "LT_ADRENAL", "adrenal-l", " adrenal  left "),
        ("Femoral Head Rig", "Femoral Head Right", "Rt. Femoral Head", "RT FemoralHead"),
        ("Gall Bladder", "gallbladder", "GALL-BLADDER"),
        ("UteroCervix", "Utero Cervix"),
    ],
)
def test_spellings_of_one_name(names):
    assert len({plain_name(name) for name in names}) == 1
    distinct = ["Lung_L", "Lung_R", "Lung", "Left", "", "Large Intestine", "Small Intestine", "L5", "L4"]
    assert len({plain_name(name) for name in distinct}) == len(distinct)


def test_contours_of_another_scan_are_refused(tmp_path, scan):
    mask = blocks()["two"]
    with pytest.raises(ValueError, match="structure 'organ': a contour lies .* slices outside the scan"):
        drawn(tmp_path, scan, {"organ": mask}, shift=1.2)
    first = np.array(series_headers(tmp_path / "ct")[4].ImagePositionPatient, float)
    upright = [first + [[0, 0, 0], [-5, 0, 0], [-5, 0, 9]]]
    flat = [first + [[0, 0, 0], [-5, 0, 0], [-5, -5, 0]]] * 3
    with pytest.raises(ValueError, match="a contour crosses slices"):
        drawn(tmp_path, scan, {"organ": upright + flat})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data", [["1", "2"], ["1", "2", "x"], ["NaN", "1", "2"] * 3, ["1", "2", "3", "4"]])
def test_contours_that_are_no_coordinates_are_named(data, tmp_path, scan):
    path = write_rtstruct(tmp_path / "rs", tmp_path / "ct", {"organ": blocks()["organ"]})
    raw = path.read_bytes()
    item = pydicom.dcmread(path).ROIContourSequence[0].ContourSequence[0]
    old = item.get_item("ContourData").value
    new = "\\".join(data).encode()
    path.write_bytes(raw.replace(old, new + b" " * (len(old) - len(new)), 1))
    with pytest.raises(ValueError, match="rs, structure 'organ': a contour is no list of x, y, z"):
        draw_structures(path, scan, {"organ": 1})


def test_other_files_are_no_structure_sets(tmp_path, scan):
    image = next((tmp_path / "ct").iterdir())
    (tmp_path / "text").write_text("no DICOM " * 40)
    for path in (image, tmp_path / "text"):
        with pytest.raises(ValueError, match="is no structure set"):
            draw_structures(path, scan, {"organ": 1})


def test_polygons_fill_as_scikit_image_fills_them():
    rng = np.random.default_rng(0)
    for corners in rng.integers(3, 40, 60):
        curve = rng.uniform(-6, 40, (corners, 2))  # Crosses itself and leaves the image
        assert np.array_equal(fill_polygons([curve], (30, 35)), polygon2mask((30, 35), curve))


def test_polygons_are_even_odd_and_closed_by_themselves():
    rng = np.random.default_rng(1)
    curves = [rng.uniform(-6, 40, (12, 2)) for _ in range(5)]
    expected = np.zeros((30, 35), bool)
    for curve in curves:
        expected ^= polygon2mask((30, 35), curve)
    assert np.array_equal(fill_polygons(curves, (30, 35)), expected)
    closed = [np.concatenate([curve, curve[:1]]) for curve in curves]
    backwards = [curve[::-1] for curve in curves]
    assert np.array_equal(fill_polygons(closed, (30, 35)), expected) and np.array_equal(fill_polygons(backwards, (30, 35)), expected)
    assert not fill_polygons([], (4, 5)).any()


def test_polygons_through_centres_keep_their_area():
    jitter = np.random.default_rng(0).normal(0, 1e-7, (4, 2))  # Rounding in the affine must not fray the edges
    for size in range(1, 6):
        square = np.array([[2, 3], [2, 3 + size], [2 + size, 3 + size], [2 + size, 3]], float)
        assert fill_polygons([square + jitter], (12, 12)).sum() == size**2
    wild = np.array([[-1e30, -1e30], [1e30, -1e30], [1e30, 1e30], [-1e30, 1e30]])
    assert fill_polygons([wild], (12, 12)).all()


def test_written_files_are_what_others_read(voxels, tmp_path):
    paths = write_ct_series(tmp_path, voxels, turned_affine("LPS", SPACING))
    assert {pydicom.dcmread(path).SOPClassUID for path in paths} == {CT_IMAGE}
    assert [path.name for path in paths] != sorted(path.name for path in paths), "names tell no order"
    assert np.array_equal(SimpleITK.GetArrayFromImage(itk(tmp_path)).T, voxels)
