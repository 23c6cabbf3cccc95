"""The one reader: what it gives is what nibabel and SimpleITK give, or it refuses; listing, grids and labels by rule.

Whatever a header says, no command may read other voxels or other millimetres than the two libraries that everybody uses."""

import gzip
import os

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mednext_v2.data.scans import BadFile, list_scans, list_volumes, read_header, read_label, read_scan, same_grid, write_volume
from mednext_v2.evaluation.metrics import score_files
from mednext_v2.inference.predictor import network_input

SimpleITK = pytest.importorskip("SimpleITK")
SimpleITK.ProcessObject_SetGlobalWarningDisplay(False)
SHAPE = (5, 6, 7)
RAS = np.diag([2.0, 3.0, 4.0, 1.0])


def by_itk(path) -> tuple[np.ndarray, np.ndarray] | None:
    "Voxels and affine in mm, towards R, A, S; None if SimpleITK refuses"
    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError:
        return None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        return None
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).T, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def canonical(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    image = nib.as_closest_canonical(nib.Nifti1Image(voxels, affine, dtype=voxels.dtype))
    return np.asanyarray(image.dataobj), image.affine


def agree(one: tuple, other: tuple) -> bool:
    "Equal voxels, and corners within a tenth of a voxel"
    (voxels, affine), (others, placed) = one, other
    if voxels.shape != others.shape:
        return False
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in voxels.shape], [1])).reshape(4, -1)
    apart = np.linalg.norm((affine - placed) @ corners, axis=0).max()
    close = np.allclose(voxels.astype(float), others.astype(float), rtol=1e-5, atol=1e-6, equal_nan=True)
    return bool(close and apart <= 0.11 * nib.affines.voxel_sizes(placed).min() + 1e-6)


numbers = st.sampled_from([0.0, 1.0, -1.0, 2.0, 2.5, 1e-3, 1e3, 1e-8, 1e8, float("nan"), float("inf")])
edits = st.dictionaries(
    st.sampled_from(
        [
            "xyzt_units",
            "sform_code",
            "qform_code",
            "scl_slope",
            "scl_inter",
            "quatern_b",
            "quatern_d",
            "qoffset_x",
            "pixdim",
            "srow_x",
            "srow_y",
            "datatype",
            "dim",
            "magic",
            "vox_offset",
            "qfac",
        ]
    ),
    st.tuples(numbers, st.integers(0, 7), st.integers(0, 4)),
    max_size=4,
)


def write_odd(path, dtype: str, changes: dict, packed: bool, cut: int) -> None:
    "A NIfTI file with a header that some program could have written"
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 90, SHAPE).astype(dtype)
    image = nib.Nifti1Image(voxels, RAS, dtype=voxels.dtype)
    image.set_qform(RAS, 1)
    image.set_sform(RAS, 1)
    content = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, (number, integer, place) in changes.items():
        with np.errstate(all="ignore"):
            if name in ("xyzt_units", "sform_code", "qform_code"):
                header[name] = integer
            elif name == "pixdim":
                header["pixdim"][1 + place % 3] = number
            elif name == "qfac":
                header["pixdim"][0] = number
            elif name in ("srow_x", "srow_y"):
                header[name][place % 4] = number
            elif name == "dim":
                header["dim"][place] = integer
            elif name == "datatype":
                header["datatype"] = (2, 4, 16, 128, 32, 1792, 99)[integer % 7]
            elif name == "magic":
                header["magic"] = (b"n+1", b"ni1", b"xxx")[integer % 3]
            else:
                header[name] = number
    content[:348] = header.binaryblock
    content = bytes(content[: len(content) - cut])
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)


@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["u1", "i2", "u2", "i4", "f4", "f8"]), edits, st.booleans(), st.sampled_from([0, 0, 0, 0, 3, 200]))
def test_odd_headers_are_read_as_nibabel_and_itk_do_or_refused(tmp_path, dtype, changes, packed, cut):
    # Names of their own: asked for odd.nii.gz, ITK reads an odd.nii that lies beside it
    path = tmp_path / ("packed.nii.gz" if packed else "plain.nii")
    write_odd(path, dtype, changes, packed, cut)
    try:
        volume = read_scan(path)
    except BadFile as error:
        assert str(path) in str(error) and "\n" not in str(error)
        for read in (read_label, lambda p: network_input([p])):
            with pytest.raises(BadFile):
                read(path)
        return
    itk = by_itk(path)
    assert itk is not None and agree((volume.voxels, volume.affine), canonical(*itk))
    image = nib.load(path)
    scale = {1: 1e3, 3: 1e-3}.get(int(image.header["xyzt_units"]) & 7, 1.0)  # nibabel leaves the unit to its user
    assert agree((volume.voxels, volume.affine), canonical(np.asanyarray(image.dataobj), np.diag([scale] * 3 + [1.0]) @ image.affine))
    assert read_header(path).spacing == pytest.approx(volume.spacing)
    taken = network_input([path])
    whole = np.zeros(taken.shape, np.float32)
    whole[taken.box] = taken.image[0]
    np.testing.assert_allclose(whole, volume.voxels.astype(np.float32), rtol=1e-6)


@settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=700), st.sampled_from([".nii", ".nii.gz", ".mha", ".nrrd", ".mhd"]), st.booleans())
def test_garbage_is_refused_in_one_line(tmp_path, content, ending, packed):
    path = tmp_path / f"garbage{ending}"
    path.write_bytes(gzip.compress(content) if packed else content)
    for read in (read_header, read_scan, read_label):
        with pytest.raises(BadFile) as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".seg.nrrd"])
def test_formats_hold_the_same(tmp_path, ending):
    voxels = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.int16)
    write_volume(tmp_path / "a.nii.gz", voxels, RAS)
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(tmp_path / "a.nii.gz")), str(tmp_path / f"b{ending}"))
    first, second = read_label(tmp_path / "a.nii.gz"), read_label(tmp_path / f"b{ending}")
    np.testing.assert_array_equal(first.voxels, second.voxels)
    assert same_grid(first, second) < 1e-4
    assert list(list_volumes(tmp_path / f"b{ending}")) == ["b"]


@pytest.mark.parametrize("unit, factor", [("mm", 1), ("meter", 1e-3), ("micron", 1e3), ("unknown", 1)])
def test_lengths_are_in_mm_whatever_the_unit(tmp_path, unit, factor):
    affine = np.diag([2.0 * factor, 3 * factor, 4 * factor, 1])
    image = nib.Nifti1Image(np.ones((24, 20, 16), np.int16), affine)
    image.header.set_xyzt_units(unit)
    image.set_qform(affine, 1)
    nib.save(image, tmp_path / "scan.nii.gz")
    for source in (tmp_path / "scan.nii.gz", nib.load(tmp_path / "scan.nii.gz")):
        assert read_scan(source).spacing == pytest.approx((2, 3, 4), rel=1e-5)
    assert agree((read_scan(tmp_path / "scan.nii.gz").voxels, read_scan(tmp_path / "scan.nii.gz").affine), by_itk(tmp_path / "scan.nii.gz"))


def test_grids_agree_by_their_corners(tmp_path):
    label = np.zeros((50, 50, 6), np.uint8)
    for name, shift in (("a", 0), ("close", 0.05), ("far", 0.2)):
        affine = np.diag([1.0, 1, 3, 1])
        affine[0, 3] = shift
        write_volume(tmp_path / f"{name}.nii.gz", label, affine)
    assert same_grid(read_label(tmp_path / "a.nii.gz"), read_label(tmp_path / "close.nii.gz")) == pytest.approx(0.05)
    with pytest.raises(BadFile, match="far.nii.gz lies on another grid than .*a.nii.gz, corners up to 0.2 mm apart"):
        same_grid(read_label(tmp_path / "far.nii.gz"), read_label(tmp_path / "a.nii.gz"))
    with pytest.raises(BadFile, match="another grid"):
        score_files(tmp_path / "far.nii.gz", tmp_path / "a.nii.gz", None)


@pytest.mark.parametrize("highest, kind", [(1, np.uint8), (255, np.uint8), (256, np.uint16), (65535, np.uint16), (70000, np.uint32)])
def test_labels_never_wrap(tmp_path, highest, kind):
    label = np.zeros(SHAPE, np.float64)
    label[1, 2, 3] = highest
    write_volume(tmp_path / "label.nii.gz", label, RAS)
    read = read_label(tmp_path / "label.nii.gz").voxels
    assert read.max() == highest and read.dtype == kind


@pytest.mark.parametrize("value, text", [(0.99999994, "0.99999994"), (-1, "-1"), (np.nan, "NaN or infinite"), (2.5, "2.5")])
def test_labels_are_whole_numbers_from_zero(tmp_path, value, text):
    label = np.zeros(SHAPE, np.float32)
    label[0, 0, 0] = value
    write_volume(tmp_path / "label.nii.gz", label, RAS)
    with pytest.raises(BadFile, match=text):
        read_label(tmp_path / "label.nii.gz")


@pytest.mark.parametrize(
    "names, channels, expected",
    [
        (["amos_0001.nii.gz", "amos_0004.nii.gz"], 1, ["amos_0001", "amos_0004"]),
        (["a_0000.nii.gz", "b_0000.nii"], 1, ["a", "b"]),
        (["a_0000.nii.gz", "a_0001.nii.gz"], 2, ["a"]),
        (["a.mha", ".DS_Store", "._a.mha", "notes.txt"], 1, ["a"]),
        (["amos_0001.nii.gz", "amos_0004.nii.gz"], 2, "amos_0001.nii.gz, amos_0004.nii.gz"),
        (["a_0000.nii.gz", "a_0001.nii.gz"], 1, "a_0000.nii.gz, a_0001.nii.gz"),
        (["a_0000.nii.gz", "a_0002.nii.gz"], 2, "a_0000.nii.gz, a_0002.nii.gz"),
        (["a_0000.nii.gz", "a_0001.nii"], 2, "in one format"),
        (["a_0000.nii.gz", "b.nii.gz"], 1, "b.nii.gz, which has no channel number"),
        (["a.nii.gz", "a.nii"], 1, "a.nii and a.nii.gz"),
    ],
)
def test_which_files_are_scans(tmp_path, names, channels, expected):
    for name in names:
        (tmp_path / name).touch()
    if isinstance(expected, list):
        assert list(list_scans(tmp_path, channels)) == expected
    else:
        with pytest.raises(BadFile, match=expected):
            list_scans(tmp_path, channels)


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    for name, text in (("folder", "is a folder"), ("link", "which does not exist"), ("pipe", "a device")):
        with pytest.raises(BadFile, match=text):
            read_scan(tmp_path / f"{name}.nii.gz")
    with pytest.raises(FileNotFoundError, match="absent.nii is missing"):
        read_scan(tmp_path / "absent.nii")
