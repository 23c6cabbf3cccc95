"""Stored arrays against NumPy, against damage, kills and workers, and over a real S3 protocol on loopback."""

import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mednext_v2.core import sha256
from mednext_v2.data import storage
from mednext_v2.data.storage import exists, join_path, open_array, read_bytes, write_array, write_bytes

KINDS = ["float16", "float32", "float64", "uint8", "int16", "int32", "uint16", "bool", ">f4", ">i2"]


def random_array(rng, shape, kind="float16"):
    dtype = np.dtype(kind)
    values = rng.normal(size=shape) * 50
    values = np.abs(values) if dtype.kind == "u" else values
    return (values > 0 if dtype.kind == "b" else values).astype(dtype)


def random_key(rng, shape):
    """Integers, slices with any sign and step, some empty, some past the border; sometimes an ellipsis."""
    key = []
    for size in shape:
        low, high = sorted(rng.integers(-size - 3, size + 4, 2).tolist())
        step = int(rng.choice([1, 1, 1, 2, 5, -1, -3]))
        ends = [None if rng.random() < 0.2 else end for end in (low, high)]
        box = slice(*(ends if step > 0 else ends[::-1]), step)
        key.append(int(rng.integers(-size, size)) if rng.random() < 0.2 else box)
    if rng.random() < 0.3:
        at = int(rng.integers(0, len(key) + 1))
        key[at:] = [...]
    return tuple(key)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_keeps_every_type(kind, tmp_path):
    array = random_array(np.random.default_rng(1), (2, 37, 41, 33), kind)
    write_array(tmp_path / "a.b2nd", array)
    stored = open_array(tmp_path / "a.b2nd")
    assert stored.dtype == array.dtype.newbyteorder("=") and stored.shape == array.shape and stored.ndim == 4
    assert np.array_equal(np.asarray(stored), array)
    assert np.asarray(stored, dtype=np.float64).dtype == np.float64


@pytest.mark.parametrize("seed", range(12))
def test_any_slice_is_numpys(seed, tmp_path):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 90, rng.integers(1, 5)).tolist())
    if len(shape) == 4:
        shape = (1 + shape[0] % 3, *shape[1:])
    chunks = None if seed % 3 else tuple(rng.integers(1, 40, len(shape)).tolist())
    array = random_array(rng, shape, rng.choice(["float32", "uint8", "float16"]))
    write_array(tmp_path / "a.b2nd", array, chunks)
    stored = open_array(tmp_path / "a.b2nd")
    for _ in range(40):
        key = random_key(rng, shape)
        read, expected = stored[key], array[key]
        assert np.array_equal(read, expected) and np.shape(read) == expected.shape, key
        assert read.dtype == expected.dtype
        if read.ndim:
            assert read.flags.c_contiguous and read.flags.writeable
            read[...] = 0  # What was read is the reader's own
    assert np.array_equal(stored[...], array)


def test_keys_that_are_no_boxes_are_refused(tmp_path):
    write_array(tmp_path / "a.b2nd", np.zeros((5, 6), np.uint8))
    stored = open_array(tmp_path / "a.b2nd")
    for key in (None, [1, 2], np.array([True] * 5), True, (0, np.array([1])), 1.5, "a"):
        with pytest.raises(TypeError, match="integers, slices and an ellipsis"):
            stored[key]
    for key in (5, (0, -7), (0, 0, 0), (0, 0, slice(1))):
        with pytest.raises(IndexError):
            stored[key]
    assert len(stored) == 5 and "uint8" in repr(stored)


@pytest.mark.parametrize(
    "array, word",
    [
        (np.array(["a"]), "convert to"),
        (np.zeros((2, 0, 3)), "no voxels"),
        (np.float32(1), "no axes"),
        (np.zeros(3, complex), "complex128"),
        (np.array([object()]), "object"),
    ],
)
def test_what_cannot_be_stored_is_refused(array, word, tmp_path):
    with pytest.raises(ValueError, match=word):
        write_array(tmp_path / "a.b2nd", array)
    assert not list(tmp_path.iterdir())


def test_wrong_names_and_chunks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ends in .b2nd"):
        write_array(tmp_path / "a.npy", np.zeros(3))
    for chunks in ((0, 1), (4,), (4, 4, 4)):
        with pytest.raises(ValueError, match="give 2 positive sizes"):
            write_array(tmp_path / "a.b2nd", np.zeros((4, 4)), chunks)


def test_equal_arrays_are_equal_bytes_in_any_process(tmp_path):
    rng = np.random.default_rng(3)
    array = random_array(rng, (1, 70, 66, 50), "float32")
    digest = write_array(tmp_path / "a.b2nd", array)
    assert digest == sha256(tmp_path / "a.b2nd")
    np.save(tmp_path / "a.npy", np.asfortranarray(array).astype(">f4"))
    code = (
        "import sys, numpy, blosc2; from mednext_v2.data.storage import write_array; blosc2.set_nthreads(5)\n"
        "print(write_array(sys.argv[2], numpy.load(sys.argv[1])[:, ::1]))"
    )
    files = [str(tmp_path / name) for name in ("a.npy", "b.b2nd")]
    other = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest
    array[0, 3, 4, 5] += 1
    assert write_array(tmp_path / "a.b2nd", array) != digest


def test_a_file_written_again_is_read_anew(tmp_path):
    path = tmp_path / "a.b2nd"
    write_array(path, np.zeros((40, 40), np.uint8))
    stored = open_array(path)
    assert stored[3, 3] == 0
    write_array(path, np.ones((40, 40), np.uint8))
    assert stored[3, 3] == 1
    write_array(path, np.ones((40, 41), np.uint8))
    with pytest.raises(ValueError, match="a.b2nd was replaced.*open it again"):
        stored[3, 3]
    path.unlink()
    with pytest.raises(FileNotFoundError, match="a.b2nd does not exist; write it first"):
        stored[3, 3]


# ---- Damage


def outcome(path, array):
    try:
        return "same" if np.array_equal(np.asarray(open_array(path)), array) else "WRONG"
    except ValueError as error:
        assert path.name in str(error) and "again" in str(error), error
        return "named"


def test_every_truncation_is_named(tmp_path):
    array = random_array(np.random.default_rng(5), (1, 50, 40, 33))
    write_array(tmp_path / "a.b2nd", array)
    data = (tmp_path / "a.b2nd").read_bytes()
    for cut in [0, 1, 10, 100, 200, 1000, len(data) // 2, len(data) - 100, len(data) - 1]:
        path = tmp_path / f"cut{cut}.b2nd"
        path.write_bytes(data[:cut])
        assert outcome(path, array) == "named", cut
    assert outcome(tmp_path / "a.b2nd", array) == "same"


def test_no_flipped_bit_is_ever_read_as_voxels(tmp_path):
    """All bytes of header and trailer, a sample of the others; in a process of its own, which might die."""
    code = f"""
import random, resource, sys, numpy as np
from collections import Counter
from pathlib import Path
sys.path.insert(0, {str(os.path.dirname(__file__))!r})
from test_storage import outcome, random_array
from mednext_v2.data.storage import write_array
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
folder, rng = Path(sys.argv[1]), random.Random(0)
array = random_array(np.random.default_rng(6), (1, 50, 40, 33))
write_array(folder / "a.b2nd", array)
data, found = (folder / "a.b2nd").read_bytes(), Counter()
ends = [*range(300), *range(len(data) - 250, len(data))]
for i, at in enumerate([*ends, *(rng.randrange(len(data)) for _ in range(250))]):
    changed = bytearray(data)
    changed[at] ^= 1 << rng.randrange(8)
    path = folder / "f.b2nd"
    path.write_bytes(changed)
    found[("ends " if i < len(ends) else "body ") + outcome(path, array)] += 1
print(dict(found))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = eval(done.stdout.splitlines()[-1])
    assert not [name for name in found if "WRONG" in name], found
    assert found["body named"] > 240, found


def test_damage_elsewhere_leaves_a_patch_readable(tmp_path):
    array = random_array(np.random.default_rng(7), (96, 96, 96))
    write_array(tmp_path / "a.b2nd", array)
    data = bytearray((tmp_path / "a.b2nd").read_bytes())
    data[int(len(data) * 0.95)] ^= 1
    (tmp_path / "a.b2nd").write_bytes(data)
    stored = open_array(tmp_path / "a.b2nd")
    assert np.array_equal(stored[:32, :32, :32], array[:32, :32, :32])
    with pytest.raises(ValueError, match=r"a.b2nd is damaged: 1 blocks .* at voxel \[64, 64, \d+\]"):
        stored[64:, 64:]


def test_files_of_others_are_named(tmp_path):
    import blosc2

    blosc2.asarray(np.zeros((40, 40)), urlpath=str(tmp_path / "nnunet.b2nd"))
    with pytest.raises(ValueError, match="nnunet.b2nd .*no checksums"):
        open_array(tmp_path / "nnunet.b2nd")
    (tmp_path / "text.b2nd").write_text("case,split\n")
    with pytest.raises(ValueError, match="text.b2nd is truncated or damaged"):
        open_array(tmp_path / "text.b2nd")
    (tmp_path / "folder.b2nd").mkdir()
    with pytest.raises((ValueError, OSError), match="folder.b2nd"):
        open_array(tmp_path / "folder.b2nd")


KILLED = """
import os, signal, sys
import numpy as np
from mednext_v2.data import storage
moment, path = sys.argv[1:]
if moment == "half":  # Voxels written, checksums not yet
    storage.checksums = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
if moment == "sync":  # All written, not yet of its name
    os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
while True:
    storage.write_array(path, np.random.default_rng(8).normal(size=(1, 90, 90, 90)).astype("float32"))
    print("written", flush=True)
"""


@pytest.mark.parametrize("moment", ["half", "sync", "any"])
@pytest.mark.parametrize("before", [True, False])
def test_a_killed_write_leaves_the_old_or_nothing(moment, before, tmp_path):
    path = tmp_path / "a.b2nd"
    old, new = np.arange(1000), np.random.default_rng(8).normal(size=(1, 90, 90, 90)).astype("float32")
    if before:
        write_array(path, old)
    process = subprocess.Popen([sys.executable, "-c", KILLED, moment, str(path)], stdout=subprocess.PIPE)
    if moment == "any":
        process.stdout.readline()
        time.sleep(0.05 + 0.1 * before)
        process.kill()
        expected = new
    else:
        expected = old
    assert process.wait(timeout=30) == -signal.SIGKILL
    if expected is old and not before:
        assert not path.exists()
    else:
        assert np.array_equal(np.asarray(open_array(path)), expected)


# ---- Workers


def read_patch(job):
    stored, key = job
    return stored[key]


class Patches:
    def __init__(self, stored):
        self.stored = stored

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return i, self.stored[:, 4 * i : 4 * i + 40, i:, 3]


def test_workers_read_what_their_parent_has_read_before(tmp_path):
    import blosc2
    from torch.utils.data import DataLoader

    array = random_array(np.random.default_rng(9), (1, 80, 70, 60), "float32")
    write_array(tmp_path / "a.b2nd", array)
    blosc2.set_nthreads(4)
    blosc2.asarray(array)[:]  # Leaves threads behind that a forked child does not have
    stored = open_array(tmp_path / "a.b2nd")
    assert np.array_equal(stored[...], array)  # A handle is open when the workers are made
    how = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 30}
    loader = DataLoader(Patches(stored), batch_size=None, **how)
    for i, patch in loader:
        assert np.array_equal(patch, array[:, 4 * i : 4 * i + 40, i:, 3])
    key = np.s_[0, 10:70, ::3]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        read = pool.map_async(read_patch, [(stored, key)] * 3).get(timeout=60)
    assert all(np.array_equal(patch, array[key]) for patch in read)


def test_a_pickle_is_a_name_and_not_the_voxels(tmp_path):
    array = random_array(np.random.default_rng(10), (60, 60, 60))
    write_array(tmp_path / "a.b2nd", array)
    stored = open_array(tmp_path / "a.b2nd")
    stored[:10]
    assert len(pickle.dumps(stored)) < 1000
    assert np.array_equal(pickle.loads(pickle.dumps(stored))[5], array[5])


def test_relative_names_hold_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_array("a.b2nd", np.arange(5))
    stored = open_array("a.b2nd")
    monkeypatch.chdir("/")
    storage.open_handle.cache_clear()
    assert stored[4] == 4


def test_threads_read_side_by_side(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    array = random_array(np.random.default_rng(11), (90, 90, 90))
    write_array(tmp_path / "a.b2nd", array)
    stored, rng = open_array(tmp_path / "a.b2nd"), np.random.default_rng(12)
    keys = [tuple(slice(i, i + 30) for i in rng.integers(0, 60, 3)) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        patches = pool.map(stored.__getitem__, keys)
        assert all(np.array_equal(patch, array[key]) for patch, key in zip(patches, keys))


def test_many_arrays_need_few_open_files(tmp_path):
    paths = [tmp_path / f"{i}.b2nd" for i in range(150)]
    for i, path in enumerate(paths):
        write_array(path, np.full(10, i))
    before = len(os.listdir("/proc/self/fd"))  # A process that has run other tests has files of its own open
    arrays = [open_array(path) for path in paths]
    assert [int(array[3]) for array in arrays] == list(range(150))
    assert len(os.listdir("/proc/self/fd")) - before <= 64 + 10


# ---- Object stores


class Counting(threading.Thread):
    """A proxy on loopback that counts what goes through it: an oracle that no client library can deceive."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.target, self.received, self.asked = port, 0, []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]

    def run(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, ask in ((client, server, True), (server, client, False)):
                threading.Thread(target=self.pump, args=(source, sink, ask), daemon=True).start()

    def pump(self, source, sink, ask):
        try:
            while data := source.recv(65536):
                if ask:
                    self.asked += [line for line in data.split(b"\r\n") if b" HTTP/1." in line]
                else:
                    self.received += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def clear(self):
        self.received, self.asked = 0, []


@pytest.fixture(scope="module")
def s3():
    """An S3 server (moto) on loopback behind a counting proxy, and a bucket in it."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Counting(server.get_host_and_port()[1])
    proxy.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
            "NO_PROXY": "127.0.0.1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield proxy
    proxy.server.close()
    server.stop()


@pytest.fixture(scope="module")
def volume(s3):
    array = random_array(np.random.default_rng(13), (1, 160, 160, 128))
    write_array("s3://bucket/case/image.b2nd", array)
    return array


def test_a_patch_from_s3_fetches_only_its_blocks(s3, volume):
    stored = open_array("s3://bucket/case/image.b2nd")
    opening, size = s3.received, len(read_bytes("s3://bucket/case/image.b2nd"))
    key = np.s_[:, 30:94, 50:114, 40:104]
    blocks, all_blocks = 3 * 3 * 3, 5 * 5 * 4
    assert np.array_equal(stored[key], volume[key])  # The first read also fetches the table of blocks
    table = s3.received - opening - size
    s3.clear()
    assert np.array_equal(stored[key], volume[key])
    gets = [line for line in s3.asked if line.startswith(b"GET /bucket/case/image.b2nd")]
    assert len(gets) == len(s3.asked) == blocks
    share = size * blocks / all_blocks
    assert 0.8 * share < s3.received < 1.03 * share + 600 * len(gets)
    assert s3.received < 0.3 * size and table < s3.received + 10_000
    s3.clear()
    assert np.array_equal(stored[:, :32, :32, :32], volume[:, :32, :32, :32])
    assert s3.received < 2 * 32**3 * 1.01 + 600


def test_opening_from_s3_reads_no_voxels(s3, volume):
    storage.open_handle.cache_clear()
    s3.clear()
    stored = open_array("s3://bucket/case/image.b2nd")
    assert stored.shape == volume.shape and stored.dtype == volume.dtype
    assert s3.received < 25_000 and len(s3.asked) <= 6


def test_any_slice_from_s3_is_numpys(s3, volume):
    stored, rng = open_array("s3://bucket/case/image.b2nd"), np.random.default_rng(14)
    for _ in range(3):
        key = random_key(rng, volume.shape)
        assert np.array_equal(stored[key], volume[key]), key
    assert np.array_equal(np.asarray(stored), volume)


def test_s3_through_fork_spawn_and_pickle(s3, volume):
    import blosc2

    blosc2.set_nthreads(4)
    blosc2.asarray(volume)[:]  # Leaves threads behind that a forked child does not have
    stored, key = open_array("s3://bucket/case/image.b2nd"), np.s_[0, 100:140, 3:60, ::7]
    assert np.array_equal(stored[key], volume[key])
    for start in ["fork"] * 4 + ["spawn"]:
        with multiprocessing.get_context(start).Pool(1) as pool:
            assert np.array_equal(pool.map_async(read_patch, [(stored, key)]).get(timeout=60)[0], volume[key])
    assert np.array_equal(pickle.loads(pickle.dumps(stored))[key], volume[key])


def test_a_cache_spares_the_second_epoch(s3, volume, tmp_path):
    key = np.s_[:, 30:94, 50:114, 40:104]
    first = open_array("s3://bucket/case/image.b2nd", cache=tmp_path / "cache")
    assert np.array_equal(first[key], volume[key])
    s3.clear()
    assert np.array_equal(first[key], volume[key])
    assert not [line for line in s3.asked if line.startswith(b"GET")]
    with multiprocessing.get_context("fork").Pool(1) as pool:  # Another process shares it
        s3.clear()
        assert np.array_equal(pool.map_async(read_patch, [(first, key)]).get(timeout=60)[0], volume[key])
    assert s3.received < 25_000


def test_helpers_on_s3(s3):
    base = "s3://bucket/helpers"
    place = join_path(base, "Dataset901", "manifest.json")
    assert place == "s3://bucket/helpers/Dataset901/manifest.json"
    assert not exists(place)
    with pytest.raises(FileNotFoundError, match="helpers/Dataset901/manifest.json does not exist"):
        read_bytes(place)
    write_bytes(place, json.dumps({"case": 1}).encode())
    assert exists(place) and json.loads(read_bytes(place)) == {"case": 1}
    assert not exists(join_path(base, "Dataset901"))


def test_damage_and_absence_on_s3_are_named(s3, volume):
    with pytest.raises(FileNotFoundError, match="s3://bucket/none.b2nd does not exist"):
        open_array("s3://bucket/none.b2nd")
    with pytest.raises(FileNotFoundError, match="s3://nobucket/a.b2nd"):
        open_array("s3://nobucket/a.b2nd")
    write_array("s3://bucket/none.b2nd", np.arange(7))
    assert open_array("s3://bucket/none.b2nd")[6] == 6
    data = bytearray(read_bytes("s3://bucket/case/image.b2nd"))
    for name, changed in {"cut": data[: len(data) // 2], "empty": b"", "text": b"case,split\n"}.items():
        write_bytes(f"s3://bucket/{name}.b2nd", bytes(changed))
        with pytest.raises(ValueError, match=f"s3://bucket/{name}.b2nd is truncated or damaged"):
            open_array(f"s3://bucket/{name}.b2nd")[...]
    data[len(data) // 2] ^= 4
    write_bytes("s3://bucket/flip.b2nd", bytes(data))
    with pytest.raises(ValueError, match="s3://bucket/flip.b2nd is damaged: 1 blocks"):
        np.asarray(open_array("s3://bucket/flip.b2nd"))


def test_the_same_array_has_the_same_hash_in_any_place(s3, tmp_path):
    array = random_array(np.random.default_rng(15), (40, 50, 60))
    bases = (tmp_path, tmp_path.as_uri(), "s3://bucket/hash", "memory://hash")
    digests = {write_array(join_path(base, "a.b2nd"), array) for base in bases}
    assert len(digests) == 1
    assert np.array_equal(open_array(join_path(tmp_path.as_uri(), "a.b2nd"))[3], array[3])


def test_a_missing_package_is_named():
    with pytest.raises((ImportError, ValueError), match="gs://bucket/a.b2nd.*gcsfs"):
        open_array("gs://bucket/a.b2nd")
