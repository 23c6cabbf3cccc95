"""How fast a random patch is read from a prepared volume, by the way in which the volume is kept.

    python benchmarks/storage.py           writes benchmarks/results/storage.json (ten idle minutes)
    python benchmarks/storage.py --quick   one volume, one round, to see that it runs

Contents: real scans of data/seeds (abdomen ctA, head ctH; 3 mm) brought to 256 x 256 x 200 voxels by cubic
interpolation (labels by nearest neighbour), with spatially correlated noise of 15 HU, then clipped and
z-scored as nnU-Net does for CT. Scans of that size are not in the repository; the noise stands for what
interpolation smoothes away, and is what compressors cannot compress.

Every round goes through all methods before the next begins, so that a slow spell of the machine meets all of
them. Each method uses one thread. Patches lie at the same random places for all.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

import data
from mednext_v2.core import root, write_json
from mednext_v2.data.storage import open_array, open_handle, write_array

SIDES = (32, 64, 128)
SIZE = (256, 256, 200)


# ---- Contents


def enlarge(voxels: np.ndarray, order: int) -> np.ndarray:
    "To SIZE, each axis by its own factor"
    from scipy.ndimage import zoom

    return zoom(voxels, [new / old for new, old in zip(SIZE, voxels.shape)], order=order, mode="nearest")


def contents(seed: str) -> dict[str, np.ndarray]:
    "The arrays of one volume: HU as scanned, the z-scored image in two precisions, the label"
    import nibabel
    from scipy.ndimage import gaussian_filter

    folder, rng = root() / "data/seeds", np.random.default_rng(0)
    scan = nibabel.load(folder / f"{seed}.nii.gz").get_fdata(dtype=np.float32)
    label = np.asarray(nibabel.load(folder / f"{seed}_label.nii.gz").dataobj).astype(np.uint8)
    noise = gaussian_filter(rng.normal(size=SIZE).astype(np.float32), 0.7)
    hounsfield = enlarge(scan, 3) + 15 / noise.std() * noise
    label = enlarge(label, 0)
    low, high = np.percentile(hounsfield[label > 0], [0.5, 99.5])
    mean, deviation = hounsfield[label > 0].mean(), hounsfield[label > 0].std()
    image = ((hounsfield.clip(low, high) - mean) / deviation).astype(np.float32)[None]
    return {"int16": np.round(hounsfield).astype(np.int16)[None], "float32": image, "float16": image.astype(np.float16), "label": label[None]}


# ---- Methods: how to write, how to open, and how to read a box of an open one


class Npy:
    suffix = ".npy"

    def write(self, path, array):
        np.save(path, array)

    def open(self, path):
        return np.load(path, mmap_mode="r")

    def read(self, opened, box):
        return np.array(opened[box])


class Nibabel(Npy):
    suffix = ".nii.gz"

    def write(self, path, array):
        import nibabel

        nibabel.save(nibabel.Nifti1Image(array[0], np.eye(4)), path)

    def open(self, path):
        return path

    def read(self, opened, box):
        import nibabel

        return np.asanyarray(nibabel.load(opened).dataobj)[box[1:]][None]


class Zarr(Npy):
    suffix = ".zarr"

    def __init__(self, codec: str, level: int, side: int, pipeline: str):
        self.codec, self.level, self.side, self.pipeline = codec, level, side, pipeline

    def configure(self):
        import zarr

        paths = {"python": "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs": "zarrs.ZarrsCodecPipeline"}
        return zarr.config.set({"codec_pipeline.path": paths[self.pipeline], "threading.max_workers": 1})

    def write(self, path, array):
        import zarr
        from zarr.codecs import BloscCodec, Crc32cCodec

        chunks = (1, self.side, self.side, self.side)
        shard = tuple(-(-size // side) * side for size, side in zip(array.shape, chunks))
        codec = BloscCodec(cname=self.codec, clevel=self.level, shuffle="shuffle")
        with self.configure():
            zarr.create_array(
                str(path), data=array, chunks=chunks, shards=shard, overwrite=True, compressors=[codec, Crc32cCodec()], config={"write_empty_chunks": True}
            )

    def open(self, path):
        import zarr

        with self.configure():
            return zarr.open_array(str(path), mode="r")

    def read(self, opened, box):
        with self.configure():
            return opened[box]


class Blosc2(Npy):
    suffix = ".b2nd"

    def __init__(self, codec: str, level: int, filters: str, side: int | None):
        self.codec, self.level, self.filters, self.side = codec, level, filters, side

    def write(self, path, array):
        import blosc2

        block = chunk = (1, self.side, self.side, self.side) if self.side else None
        chosen = blosc2.Filter[self.filters]
        if block is None:
            from nnunetv2.training.dataloading import nnunet_dataset as peer

            block, chunk = peer.comp_blosc2_params(array.shape, (128, 128, 128), array.dtype.itemsize)
            settings = block, chunk, blosc2.Codec[self.codec], self.level
            chosen = peer.nnUNetDatasetBlosc2._select_filter(array, *settings)
        settings = {"codec": blosc2.Codec[self.codec], "clevel": self.level, "filters": [chosen], "nthreads": 1}
        path.unlink(missing_ok=True)
        blosc2.asarray(array, chunks=chunk, blocks=block, cparams=settings, urlpath=str(path))

    def open(self, path):
        import blosc2

        return blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})

    def read(self, opened, box):
        return opened[box]


class Ours(Npy):
    suffix = ".b2nd"

    def __init__(self, side: int):
        self.side = side

    def write(self, path, array):
        write_array(path, array, (1, self.side, self.side, self.side))

    def open(self, path):
        open_handle.cache_clear()
        return open_array(path)

    def read(self, opened, box):
        return opened[box]


METHODS = {
    "nibabel gz": Nibabel(),
    "npy mapped": Npy(),
    "zarr lz4 32": Zarr("lz4", 5, 32, "python"),
    "zarr zstd 32": Zarr("zstd", 1, 32, "python"),
    "zarr zstd 64": Zarr("zstd", 1, 64, "python"),
    "zarr+zarrs lz4 32": Zarr("lz4", 5, 32, "zarrs"),
    "zarr+zarrs zstd 32": Zarr("zstd", 1, 32, "zarrs"),
    "zarr+zarrs zstd 64": Zarr("zstd", 1, 64, "zarrs"),
    "blosc2 as nnU-Net": Blosc2("LZ4HC", 5, "SHUFFLE", None),
    "blosc2 zstd 32": Blosc2("ZSTD", 1, "SHUFFLE", 32),
    "blosc2 lz4hc 32": Blosc2("LZ4HC", 5, "SHUFFLE", 32),
    "storage 16": Ours(16),
    "storage 32": Ours(32),
    "storage 64": Ours(64),
}
SHORT_METHODS = {("nibabel gz", "int16"), ("blosc2 as nnU-Net", "float32"), ("npy mapped", "float16"), ("zarr zstd 32", "float16"), ("storage 32", "float16")}


# ---- Measuring


def files_of(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]


def forget(path: Path) -> None:
    "Drops a file's pages from the system's memory: the next read comes from the disk"
    open_handle.cache_clear()  # Pages that are still mapped would stay
    for file in files_of(path):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def timed(function, *arguments) -> tuple[float, object]:
    "Milliseconds, and the result"
    start = time.perf_counter()
    result = function(*arguments)
    return round(1e3 * (time.perf_counter() - start), 4), result


def resident(field: str) -> int:
    "A field of this process's status in kB"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_of(function, *arguments) -> float:
    "MB by which the resident memory of a process of its own rises at most while it calls the function"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # Room left by earlier arrays would hide new ones
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
            function(*arguments)
            rise = (resident("VmHWM") - before) / 1024
            os.write(writer, json.dumps(round(rise, 1)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text or "null")


def places(rng, shape, side, count) -> list[tuple[slice, ...]]:
    starts = rng.integers(0, np.array(shape[1:]) - side + 1, (count, 3)).tolist()
    return [(slice(0, 1), *(slice(at, at + side) for at in start)) for start in starts]


def measure(name: str, array: np.ndarray, folder: Path, rounds: int, patches: int, methods: list[str]) -> list[dict]:
    "One row for each method: sizes and raw times in ms of each read"
    rows = {
        m: {"array": name, "method": m, "raw_bytes": array.nbytes, "write_ms": [], "first_ms": [], "cold_ms": [], "held_ms": {str(side): [] for side in SIDES}}
        for m in methods
    }
    paths = {m: folder / f"{name}-{i}{METHODS[m].suffix}" for i, m in enumerate(methods)}
    for _ in range(1 + (rounds > 1)):
        for m in methods:
            rows[m]["write_ms"].append(timed(METHODS[m].write, paths[m], array)[0])
    for m in methods:
        rows[m]["bytes"] = sum(file.stat().st_size for file in files_of(paths[m]))
        rows[m]["files"] = len(files_of(paths[m]))
        rows[m]["write_peak_mb"] = peak_of(METHODS[m].write, folder / f"peak{METHODS[m].suffix}", array)
    for number in range(rounds):
        for m in methods:
            method, rng = METHODS[m], np.random.default_rng(number)
            count = 1 if m == "nibabel gz" else patches
            for side in SIDES:
                source = method.open(paths[m])
                boxes = places(rng, array.shape, side, patches)[:count]
                if m != "nibabel gz":
                    method.read(source, boxes[0])
                for box in boxes:
                    spent, read = timed(method.read, source, box)
                    rows[m]["held_ms"][str(side)].append(spent)
                    assert np.array_equal(read, array[box]), f"{m} reads other voxels"
            source = None
            for box in places(rng, array.shape, 64, patches)[: max(count // 3, 1)]:
                anew = lambda: method.read(method.open(paths[m]), box)
                rows[m]["first_ms"].append(timed(anew)[0])
                forget(paths[m])
                rows[m]["cold_ms"].append(timed(anew)[0])
    for m in methods:
        box = places(np.random.default_rng(0), array.shape, 64, 1)[0]
        rows[m]["read_peak_mb"] = peak_of(lambda: METHODS[m].read(METHODS[m].open(paths[m]), box))
    return list(rows.values())


def requests(array: np.ndarray, folder: Path) -> list[dict]:
    "Requests and bytes of one 64 voxel patch from an S3 server on loopback, after a first one elsewhere"
    import blosc2
    import fsspec
    import s3fs
    import zarr
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
    }
    calls, call = [], s3fs.S3FileSystem._call_s3

    async def counted(self, method, *arguments, **options):
        answer = await call(self, method, *arguments, **options)
        calls.append(int(answer.get("ContentLength", 0)) if method == "get_object" else 0)
        return answer

    s3fs.S3FileSystem._call_s3 = counted
    store = fsspec.filesystem("s3")
    store.mkdir("bucket")
    store.put(str(folder / "s3.zarr"), "bucket/a.zarr", recursive=True)
    for name in ("storage", "nnunet"):
        store.put(str(folder / f"{name}.b2nd"), f"bucket/{name}.b2nd")

    def zarr_open():
        return zarr.open_array("s3://bucket/a.zarr", mode="r")

    ways = {
        "storage 32": lambda: open_array("s3://bucket/storage.b2nd"),
        "blosc2 as nnU-Net": lambda: blosc2.open("s3://bucket/nnunet.b2nd", mode="r", cache_policy=blosc2.CachePolicy.NONE),
        "zarr zstd 32": zarr_open,
    }
    boxes, rows = places(np.random.default_rng(1), array.shape, 64, 12), []
    for name, way in ways.items():
        calls.clear()
        source = way()
        row = {"method": name, "open_requests": len(calls), "open_bytes": sum(calls), "requests": [], "bytes": []}
        for box in boxes:
            calls.clear()
            assert np.array_equal(source[box], array[box])
            row["requests"].append(len(calls))
            row["bytes"].append(sum(calls))
        rows.append(row)
    s3fs.S3FileSystem._call_s3 = call
    server.stop()
    return rows


def machine() -> dict:
    names = "numpy nibabel zarr zarrs numcodecs blosc2 google-crc32c fsspec s3fs moto nnunetv2".split()
    return data.machine() | {"system": platform.platform(), "versions": data.versions_of(names)}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=data.results_file("storage"))
    options = parser.parse_args()
    if not data.SHORT and not importlib.util.find_spec("zarrs"):
        raise SystemExit("storage.py measures Zarr's decoder in Rust as well: pip install --no-deps zarrs==0.2.3")
    folder = Path(tempfile.mkdtemp(prefix="storage-"))
    begin, rows, fetched = machine(), [], []
    try:
        for seed in ["ctA"] if options.quick or data.SHORT else ["ctA", "ctH"]:
            arrays = contents(seed)
            for name, array in arrays.items():
                if seed == "ctH" and name == "float32":
                    continue
                # NIfTI has no float16, and int16 is what a raw scan is
                methods = [m for m in METHODS if (m == "nibabel gz" or name != "int16") and (m != "nibabel gz" or name != "float16")]
                if data.SHORT:
                    methods = [m for m in methods if (m, name) in SHORT_METHODS]
                if not methods:
                    continue
                rounds, patches = (1, 4) if options.quick else (int(os.environ.get("BENCH_REPEATS", 5)), 9)
                found = measure(name, array, folder, rounds, patches, methods)
                rows += [{"volume": seed, **row} for row in found]
                print(seed, name, "done", flush=True)
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if seed == "ctA" and not data.SHORT:
                METHODS["zarr zstd 32"].write(folder / "s3.zarr", arrays["float16"])
                METHODS["storage 32"].write(folder / "storage.b2nd", arrays["float16"])
                METHODS["blosc2 as nnU-Net"].write(folder / "nnunet.b2nd", arrays["float16"])
                fetched = requests(arrays["float16"], folder)
    finally:
        shutil.rmtree(folder)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {"about": __doc__, "machine": begin, "shape": [1, *SIZE], "rows": rows, "s3": fetched})


if __name__ == "__main__":
    main()
