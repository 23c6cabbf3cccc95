"""The zoo against a server on loopback that misbehaves, archives that attack, disks that fill, and a second process."""

import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import struct
import tarfile
import threading
import time
import zipfile
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mednext_v2.core import registry_file
from mednext_v2.models.licence import derived_licence, licence_terms
from mednext_v2.zoo import catalogue
from mednext_v2.zoo.catalogue import UNKNOWN, Limits, download, fetch, get_entry, load_zoo, safe_parts, unpack, verify, weights_source, zoo_table

BODY = random.Random(0).randbytes(700_001)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Plan:
    """What the server does; `script` has one word for each request that misbehaves."""

    files: dict = field(default_factory=dict)  # Path to content
    script: list = field(default_factory=list)
    etag: str = '"one"'
    ranges: bool = True
    asked: list = field(default_factory=list)  # (path, Range, If-Range)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        plan = self.server.plan
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        plan.asked.append((self.path, wanted, condition))
        word = plan.script.pop(0) if plan.script else "well"
        body = plan.files.get(self.path.split("?")[0])
        if word.isdigit() or body is None:
            return self.answer(int(word) if word.isdigit() else 404, {}, b"")
        if word.startswith("to:"):
            return self.answer(302, {"Location": word[3:]}, b"")
        if word == "changed":
            plan.etag, body = '"two"', body[::-1]
            plan.files[self.path] = body
        if word == "stall":
            time.sleep(0.5)
        headers, start = {"ETag": plan.etag} if plan.etag else {}, 0
        if word == "stubborn":
            plan.files[self.path] = body = body[::-1]
            headers["ETag"] = condition = plan.etag = '"three"'
        if plan.ranges and wanted and condition == plan.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            headers["Content-Range"] = f"bytes {start + (word == 'shifted')}-{len(body) - 1}/{len(body)}"
        sent = body[start:]
        headers["Content-Length"] = str(10**18 if word == "huge" else len(sent))
        if word == "open-ended":
            del headers["Content-Length"]
        if word == "gzip":
            headers["Content-Encoding"] = "gzip"
        self.answer(206 if start else 200, headers, sent[: len(sent) // 2] if word == "cut" else sent)

    def answer(self, code, headers, body):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(catalogue, "WAIT", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.handle_error = lambda *request: None  # A client that hangs up is no news here
    running.plan = Plan({"/model.bin": BODY})
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def get(server, tmp_path):
    """Downloads model.bin from the server."""
    target = tmp_path / "in" / "model.bin"

    def run(**options):
        return download(f"{server.url}/model.bin", target, progress=False, **options)

    run.target = target
    run.parts = lambda: list(target.parent.glob("*.part"))
    return run


def ranges(server) -> list:
    return [wanted for _, wanted, _ in server.plan.asked]


def test_download_is_whole_and_leaves_one_file(get, server):
    assert get(expected=digest(BODY)) == digest(BODY)
    assert get.target.read_bytes() == BODY
    assert [path.name for path in get.target.parent.iterdir()] == ["model.bin"]
    assert len(server.plan.asked) == 1


def test_cut_connection_goes_on_from_where_it_was(get, server):
    server.plan.script = ["cut"]
    assert get() == digest(BODY)
    first, second, rest = ranges(server)
    assert first is None and second is None and 0 < int(re.fullmatch(r"bytes=(\d+)-", rest)[1]) < len(BODY)
    assert server.plan.asked[2][2] == '"one"'


def test_next_call_goes_on_where_the_last_gave_up(get, server, monkeypatch):
    monkeypatch.setattr(catalogue, "TRIES", 1)
    server.plan.script = ["cut", "503"]
    with pytest.raises(ConnectionError, match="bytes are kept: call again"):
        get()
    (part,) = get.parts()
    kept = part.stat().st_size
    assert 0 < kept < len(BODY) and not get.target.exists()
    server.plan.asked.clear()
    assert get() == digest(BODY)
    assert ranges(server) == [None, f"bytes={kept}-"] and not get.parts()


def test_server_without_ranges_starts_again(get, server):
    server.plan.ranges, server.plan.script = False, ["cut"]
    assert get() == digest(BODY)
    assert ranges(server)[-1] is None and get.target.read_bytes() == BODY


def test_server_that_always_cuts_and_has_no_ranges_is_given_up(get, server):
    server.plan.ranges, server.plan.script = False, ["cut"] * 50
    with pytest.raises(ConnectionError, match=f"given up after {catalogue.TRIES} tries"):
        get()
    assert len(server.plan.asked) <= 2 * (catalogue.TRIES + 1)  # The first brought new bytes


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_validator_nothing_is_continued(etag, get, server):
    server.plan.etag, server.plan.script = etag, ["cut"]
    assert get() == digest(BODY)
    assert ranges(server) == [None, None]


def test_file_that_changes_between_parts_is_not_mixed(get, server):
    server.plan.script = ["cut", "changed"]
    assert get() == digest(BODY[::-1])


def test_server_that_sends_another_range_is_asked_anew(get, server):
    server.plan.script = ["cut", "well", "shifted"]
    assert get() == digest(BODY)
    assert ranges(server)[0] is None and ranges(server)[-1] is None


def test_changed_tag_on_a_partial_answer_is_not_mixed(get, server):
    """A server that ignores If-Range gives itself away by its tag."""
    server.plan.script = ["cut", "well", "stubborn"]
    assert get() == digest(BODY[::-1])
    assert ranges(server)[-1] is None


@pytest.mark.parametrize("change", ["version", "url"])
def test_part_of_another_file_is_not_continued(change, get, server, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "TRIES", 1)
    server.plan.script = ["cut", "503"]
    with pytest.raises(ConnectionError):
        get()
    server.plan.files["/model.bin"] = body = BODY[::-1]
    server.plan.etag = '"one"' if change == "url" else '"two"'
    server.plan.asked.clear()
    again = download(f"{server.url}/model.bin{'?v=2' if change == 'url' else ''}", get.target, progress=False)
    assert again == digest(body) and ranges(server) == [None] and not get.parts()


def test_part_that_is_whole_is_not_asked_for_again(get, server, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(catalogue, "sha256", killed)
        with pytest.raises(KeyboardInterrupt):
            get()
    assert [part.stat().st_size for part in get.parts()] == [len(BODY)] and not get.target.exists()
    assert get() == digest(BODY) and ranges(server) == [None, None]


def test_passing_errors_are_tried_again(get, server):
    server.plan.script = ["500", "503", "429", "502"]
    assert get() == digest(BODY)
    assert len(server.plan.asked) == 5


def test_server_that_stalls_is_tried_again(get, server, monkeypatch):
    monkeypatch.setattr(catalogue, "TIMEOUT", (5, 0.1))
    server.plan.script = ["cut", "stall"]
    assert get() == digest(BODY)
    assert len(server.plan.asked) == 4


def test_416_starts_again(get, server):
    server.plan.script = ["cut", "well", "416"]
    assert get() == digest(BODY)
    assert ranges(server)[-1] is None


def test_missing_file_is_asked_for_once(get, server):
    server.plan.script = ["404"]
    with pytest.raises(FileNotFoundError, match="HTTP 404"):
        get()
    assert len(server.plan.asked) == 1


@pytest.mark.parametrize("word", ["403", "gzip"])
def test_other_answers_are_errors_at_once(word, get, server):
    server.plan.script = [word]
    with pytest.raises(ValueError, match="cannot be downloaded"):
        get()
    assert len(server.plan.asked) == 1 and not get.target.exists()


def test_nobody_listens(tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match="given up"):
        download(f"{server.url}/model.bin", tmp_path / "model.bin", progress=False)


def test_wrong_hash_is_named_and_nothing_is_kept(get):
    with pytest.raises(ValueError, match=f"sha256 {digest(BODY)} .expected {'0' * 64}"):
        get(expected="0" * 64)
    assert not list(get.target.parent.iterdir())


def test_wrong_size_counts_where_no_hash_is_known(get):
    with pytest.raises(ValueError, match="expected 5"):
        get(size=5)
    assert not list(get.target.parent.iterdir())
    assert get(size=5, expected=digest(BODY)) == digest(BODY)


def test_file_larger_than_allowed_is_refused_before_it_is_read(get):
    with pytest.raises(ValueError, match="700001 bytes, at most 1000 are allowed"):
        get(max_bytes=1000)
    assert not get.parts()


def test_body_without_a_length_is_cut_off_at_the_cap(get, server):
    server.plan.script = ["open-ended"]
    with pytest.raises(ValueError, match="sends more than 1000 bytes"):
        get(max_bytes=1000)
    server.plan.script = ["open-ended"]
    assert get() == digest(BODY)


def test_huge_declared_size_is_refused(get, server):
    server.plan.script = ["huge"]
    with pytest.raises(ValueError, match="1000000000000000000 bytes"):
        get()
    server.plan.script = ["huge"]
    with pytest.raises(OSError, match="has .* left: free some"):
        get(max_bytes=10**19)
    assert not get.parts()


def test_redirect_is_followed_on_the_web_only(get, server, monkeypatch):
    server.plan.script = [f"to:{server.url}/model.bin"]
    assert get() == digest(BODY)
    for target in ("file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://127.0.0.1/a"):
        server.plan.script = [f"to:{target}"]
        with pytest.raises(ValueError, match="redirects from http to .*refused"):
            get()
    server.plan.script = ["to:/model.bin"] * 20
    with pytest.raises(ValueError, match="more than ten times"):
        get()


def test_redirect_may_not_give_up_encryption():
    class Answer:
        is_redirect, url, headers = True, "https://example.org/a", {"location": "http://example.org/a"}

    with pytest.raises(ValueError, match="from https to http"):
        catalogue.refuse_unsafe_redirect(Answer())
    Answer.headers = {"location": "https://example.org/b"}
    catalogue.refuse_unsafe_redirect(Answer())


@pytest.mark.parametrize("url", ["ftp://example.org/a", "data:,a", "/etc/passwd", "s3://bucket/a"])
def test_other_schemes_are_not_opened(url, tmp_path):
    with pytest.raises(ValueError, match="only https, http, file"):
        download(url, tmp_path / "a", progress=False)


def test_file_scheme_copies(tmp_path):
    (tmp_path / "a b").write_bytes(BODY)
    assert download((tmp_path / "a b").as_uri(), tmp_path / "c", progress=False) == digest(BODY)
    with pytest.raises(FileNotFoundError, match="is not a file"):
        download(tmp_path.as_uri(), tmp_path / "d", progress=False)


# Archives


def zipped(path: Path, *members, **options) -> Path:
    """Members are (name or ZipInfo, content)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def tarred(path: Path, *members) -> Path:
    """Members are (name or TarInfo, content)."""
    with tarfile.open(path, "w:gz" if path.name.lower().endswith("gz") else "w") as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def zip_link(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def tar_kind(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def refused(archive: Path, match: str, **limits):
    """The archive is refused with these words, and neither the folder nor anything else new is there."""
    before = sorted(archive.parent.parent.rglob("*"))
    with pytest.raises(ValueError, match=match) as caught:
        unpack(archive, archive.parent / "out", Limits(**limits))
    assert archive.name in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(archive.parent.parent.rglob("*")) == before


@pytest.fixture
def place(tmp_path):
    (tmp_path / "deep").mkdir()
    return tmp_path / "deep"


GOOD = {"D/plans.json": b"{}", "D/fold_0/checkpoint_final.pth": BODY, "D/dataset.json": b"{ }"}


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.TGZ"])
def test_good_archive_is_unpacked(name, place):
    pack = zipped if name.endswith("zip") else tarred
    folders = [("D/", b"")] if pack is zipped else [(tar_kind("./D/", tarfile.DIRTYPE), b"")]
    unpack(pack(place / name, *folders, *GOOD.items()), place / "out")
    out = place / "out"
    assert {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()} == GOOD


OUTSIDE = ["../evil", "D/../../evil", "/evil", "//evil", "C:/evil", "C:evil", "..\\evil", "D/.. /evil", "D/a:b", "..."]


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", OUTSIDE)
def test_path_that_leads_out_is_refused(name, pack, place):
    archive = pack(place / ("a.zip" if pack is zipped else "a.tar.gz"), ("D/plans.json", b"{}"), (name, b"evil"))
    refused(archive, "could lead out of the folder")


def test_nul_in_a_zip_name_is_refused(place):
    archive = zipped(place / "a.zip", ("good.json_../../evil", b"evil"))
    data = archive.read_bytes()
    archive.write_bytes(data.replace(b"good.json_", b"good.json\0"))
    refused(archive, "could lead out|differ")


def test_links_and_devices_in_a_zip_are_refused(place):
    for mode in (0o120777, 0o060644, 0o020644, 0o010644):
        archive = zipped(place / "a.zip", (zip_link("D/link", mode), b"/etc/passwd"))
        refused(archive, "is a link or a device")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind, place):
    inside = tar_kind("D/link", kind, "plans.json")  # Refused even if it stays inside
    refused(tarred(place / "a.tar", ("D/plans.json", b"{}"), (inside, b"")), "is a link or a device")


def test_write_through_a_link_is_refused(place):
    (place.parent / "victim").mkdir()
    link = tar_kind("D", tarfile.SYMTYPE, str(place.parent / "victim"))
    refused(tarred(place / "a.tar", (link, b""), ("D/evil", b"evil")), "is a link or a device")


@pytest.mark.parametrize("pack, name", [(zipped, "a.zip"), (tarred, "a.tar.gz")])
def test_bomb_is_refused_by_its_ratio(pack, name, place):
    archive = pack(place / name, ("bomb", bytes(20 * 2**20)))
    assert archive.stat().st_size < 100_000
    refused(archive, "claims 20971520 bytes")


def test_bomb_with_a_lying_header_is_refused(place):
    """The header promises ten bytes; the stream holds twenty million."""
    archive = zipped(place / "a.zip", ("bomb", bytes(20 * 2**20)))
    data = archive.read_bytes()
    real = struct.pack("<I", 20 * 2**20)
    assert data.count(real) == 2  # In the local header and in the directory
    archive.write_bytes(data.replace(real, struct.pack("<I", 10)))
    refused(archive, "Bad CRC-32|claims")


def test_stream_longer_than_its_header_is_cut_off(place):
    """Whatever a reader lets through, no more than promised is written."""

    class Endless(io.RawIOBase):
        given = 0

        def read(self, size=-1):
            self.given += size
            assert self.given < 20 * 2**20, "the stream is read without end"
            return bytes(size)

    endless = Endless()
    member = catalogue.ArchiveMember("bomb", False, 3 * 2**20, lambda: endless)
    with pytest.raises(ValueError, match="does not have the 3145728 bytes"):
        catalogue.write_member(member, place / "bomb", 10**9)
    assert endless.given <= 4 * 2**20 and (place / "bomb").stat().st_size <= 3 * 2**20


def test_overlapping_members_count_each_time(place):
    """Many entries of the directory that share one stream, as in a bomb of a few kilobytes."""
    archive = zipped(place / "a.zip", *((f"{i:04d}", bytes(9000) + BODY[:1000]) for i in range(200)))
    with zipfile.ZipFile(archive) as opened:
        first = opened.infolist()[0]
    refused(archive, "claims", total=100 * first.file_size)


def test_header_that_promises_more_than_the_cap_is_refused(place):
    archive = zipped(place / "a.zip", ("a", BODY))
    real = struct.pack("<I", len(BODY))
    archive.write_bytes(archive.read_bytes().replace(real, struct.pack("<I", 2**31)))
    refused(archive, "claims 2147483648 bytes")
    refused(zipped(place / "b.zip", ("a", BODY), ("b", BODY)), "claims 700001 bytes", total=10**6)


def test_too_many_files_are_refused(place):
    for pack, name in ((zipped, "a.zip"), (tarred, "a.tar")):
        refused(pack(place / name, *((f"{i}", b"12345678") for i in range(11))), "more than 10 files", files=10)


@pytest.mark.parametrize("first, second", [("a", "a"), ("a", "A"), ("D/x", "d/y"), ("a", "a/b"), ("a/b", "a"), ("e\u0301", "\u00e9"), ("a", "a.")])
@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_in_one_place_are_refused(first, second, pack, place):
    archive = pack(place / ("a.zip" if pack is zipped else "a.tar"), (first, b"1"), (second, b"2"))
    refused(archive, "have one place")


def test_encrypted_and_rare_compression_are_refused(place):
    archive = zipped(place / "a.zip", ("a", b"12345"))
    data = bytearray(archive.read_bytes())
    at = data.index(b"PK\x01\x02")
    data[at + 8] |= 1
    archive.write_bytes(data)
    refused(archive, "is encrypted")
    with zipfile.ZipFile(place / "b.zip", "w", zipfile.ZIP_LZMA) as other:
        other.writestr("a", b"12345")
    refused(place / "b.zip", "neither stored nor deflated")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
@pytest.mark.parametrize("keep", [0, 10, 600, 300_000])
def test_truncated_archive_is_refused(name, keep, place):
    archive = (zipped if name.endswith("zip") else tarred)(place / name, ("a", BODY), ("b", BODY))
    archive.write_bytes(archive.read_bytes()[:keep])
    refused(archive, "is refused")


def test_flipped_bit_in_a_zip_is_refused(place):
    archive = zipped(place / "a.zip", ("a", BODY))
    data = bytearray(archive.read_bytes())
    data[350_000] ^= 1
    archive.write_bytes(data)
    refused(archive, "is refused")


def test_tar_header_that_asks_for_gigabytes_is_refused(place):
    """A GNU long name of 4 GB would be read into memory by tarfile alone."""
    info = tar_kind("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    info.size = 2**32
    with open(place / "a.tar", "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    refused(place / "a.tar", "asks for 4294967")


def test_unknown_suffix_is_no_archive(place):
    zipped(place / "a.pth", ("a", b"1"))
    refused(place / "a.pth", "it is none of .zip")


def test_modes_and_owners_do_not_come_out_of_an_archive(place):
    info = tarfile.TarInfo("run")
    info.mode, info.uid = 0o6777, 0
    unpack(tarred(place / "a.tar", (info, b"#!")), place / "out")
    assert (place / "out/run").stat().st_mode & 0o7111 == 0


# Fetching


@pytest.fixture
def world(server, tmp_path):
    """A registry of one archive on the server; `run` fetches it."""
    archive = zipped(tmp_path / "weights.zip", *GOOD.items())
    server.plan.files["/weights.zip"] = archive.read_bytes()

    class World:
        cache, home, registry = tmp_path / "cache", tmp_path / "cache/zoo/toy", tmp_path / "zoo.yaml"
        fields = {
            "title": "Toy", "url": f"{server.url}/{{file}}", "file": "weights.zip", "licence": "Apache-2.0",
            "non_commercial": "no", "layout": "nnunet_v2", "modality": "CT", "source": "made up",
            "where": "https://example.org/toy",
        }  # fmt: skip

        def write(self, **changes):
            self.registry.write_text(json.dumps({"toy": self.fields | changes}))

        def run(self, **options):
            return fetch("toy", self.cache, progress=False, path=self.registry, **options)

        def verify(self, name="all"):
            return verify(name, self.cache, self.registry)

    world = World()
    world.write()
    return world


@pytest.mark.parametrize("place", ["zoo/toy", "zoo/toy/model"])
@pytest.mark.parametrize("what", ["link", "file", "foreign"])
def test_a_place_that_is_not_its_own_is_refused_before_anything_is_downloaded(world, server, place, what):
    target, other = world.cache / place, world.cache / "other"
    target.parent.mkdir(parents=True)
    other.mkdir()
    if what == "link":
        target.symlink_to(other)
    elif what == "file":
        target.write_text("a file")
    else:
        (world.home / "model").mkdir(parents=True)
        (world.home / "model/thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match={"link": "is a link", "file": "is a file", "foreign": "thesis.txt"}[what]):
        world.run()
    assert not server.plan.asked and not list(other.iterdir()) and not (world.home / "download").exists()


def test_fetch_brings_the_files_and_a_receipt(world, server):
    folder = world.run()
    assert folder == world.home / "model"
    assert {name: (folder / name).read_bytes() for name in GOOD} == GOOD
    receipt = json.loads((folder / "zoo.json").read_text())
    assert receipt["sha256"] == digest(server.plan.files["/weights.zip"])
    assert receipt["files"]["D/plans.json"] == [2, digest(b"{}")]
    assert sorted(p.name for p in world.home.iterdir() if p.name != "lock") == ["model", "state.json"]


def test_second_fetch_asks_no_server(world, server):
    world.run()
    server.shutdown()
    server.server_close()
    world.run()
    assert len(server.plan.asked) == 1


def test_fetch_again_if_a_file_is_gone_or_of_another_size(world, server):
    folder = world.run()
    (folder / "D/plans.json").unlink()
    world.run()
    (folder / "D/plans.json").write_bytes(b"longer")
    assert (world.run() / "D/plans.json").read_bytes() == b"{}"
    assert len(server.plan.asked) == 3


def test_hash_of_the_first_download_is_kept(world, server, tmp_path):
    folder = world.run()
    (folder / "D/plans.json").unlink()
    server.plan.files["/weights.zip"] = zipped(tmp_path / "new.zip", ("evil", b"evil")).read_bytes()
    with pytest.raises(ValueError, match="the hash was seen first.*state.json"):
        world.run()
    assert not (folder / "evil").exists()
    (world.home / "state.json").unlink()
    assert (world.run() / "evil").is_file()


def test_registry_hash_is_enforced(world, server):
    world.write(sha256="0" * 64)
    with pytest.raises(ValueError, match="is not what was expected"):
        world.run()
    assert not (world.home / "model").exists()
    assert not [path for path in (world.home / "download").rglob("*") if path.is_file()]
    world.write(sha256=digest(server.plan.files["/weights.zip"]))
    world.run()


def test_new_url_in_the_registry_is_fetched(world, server):
    world.run()
    world.write(url=f"{server.url}/{{file}}?v=2")
    assert world.verify().set_index("file").state["zoo.json"] == "another version"
    world.run()
    assert [path for path, *_ in server.plan.asked] == ["/weights.zip", "/weights.zip?v=2"]


def test_checkpoint_and_small_files_are_not_unpacked(world, server):
    server.plan.files |= {"/fold_0/model.pth": BODY, "/plans.json": b"{}"}
    world.write(file="fold_0/model.pth", others={"plans.json": digest(b"{}")})
    folder = world.run()
    assert (folder / "fold_0/model.pth").read_bytes() == BODY and (folder / "plans.json").read_bytes() == b"{}"
    server.plan.files["/plans.json"] = b"[]"
    (folder / "plans.json").unlink()
    with pytest.raises(ValueError, match="plans.json is not what was expected"):
        world.run()


def test_evil_archive_leaves_nothing_and_its_hash_is_not_trusted(world, server, tmp_path):
    server.plan.files["/weights.zip"] = zipped(tmp_path / "evil.zip", ("a", b"1"), ("../../evil", b"2")).read_bytes()
    with pytest.raises(ValueError, match="weights.zip is refused"):
        world.run()
    assert not [p for p in world.home.iterdir() if p.name != "lock"]
    assert not (world.cache / "evil").exists()


def test_archive_cannot_bring_its_own_receipt(world, server, tmp_path):
    forged = zipped(tmp_path / "forged.zip", ("D/zoo.json", b'{"licence": "public domain"}'))
    server.plan.files["/weights.zip"] = forged.read_bytes()
    with pytest.raises(ValueError, match="could pass for ours"):
        world.run()
    assert not (world.home / "model").exists()


def test_full_disk_while_downloading_keeps_what_arrived(world, server, monkeypatch):
    real, written = open, []

    class Full:
        """A file on a disk that takes 100 kB."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            if sum(written) + len(data) > 100_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(len(data))
            return self.file.write(data)

        def tell(self):
            return self.file.tell()

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    with monkeypatch.context() as patched:
        patched.setattr(catalogue, "open", lambda path, mode: Full(real(path, mode)), raising=False)
        with pytest.raises(OSError, match="is full: free some, then call again"):
            world.run()
    assert not (world.home / "model").exists()
    world.run()
    assert server.plan.asked[2][1] == f"bytes={sum(written)}-"


@pytest.fixture
def waiting(world, monkeypatch):
    """The archive has arrived, and there was no room to unpack it."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(catalogue, "write_member", full)
        with pytest.raises(OSError, match="is full"):
            world.run()
    return world


def test_full_disk_while_unpacking_keeps_the_download_only(waiting, world, server):
    assert sorted(p.name for p in world.home.iterdir() if p.name != "lock") == ["download"]
    world.run()
    assert len(server.plan.asked) == 1


def test_download_that_waits_for_room_is_not_taken_for_another_url(waiting, world, server):
    world.write(url=f"{server.url}/{{file}}?v=2")
    world.run()
    assert len(server.plan.asked) == 2 and not (world.home / "download").exists()


def test_leftovers_of_a_killed_process_are_removed(world):
    (world.home / ".tmp-dead").mkdir(parents=True)
    (world.home / ".tmp-dead/half").write_bytes(BODY)
    world.run()
    assert not (world.home / ".tmp-dead").exists()


def run_fetch(cache, registry, ready, results):
    ready.wait()
    results.put(str(fetch("toy", cache, progress=False, path=registry)))


def test_two_processes_download_once(world, server):
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(2), context.Queue()
    jobs = [context.Process(target=run_fetch, args=(world.cache, world.registry, ready, results)) for _ in range(2)]
    for job in jobs:
        job.start()
    found = {results.get(timeout=60) for _ in jobs}
    for job in jobs:
        job.join(timeout=60)
    assert found == {str(world.home / "model")} and len(server.plan.asked) == 1
    assert (world.verify().state == "ok").all()


def test_verify_finds_what_changed(world):
    folder = world.run()
    assert (world.verify().state == "ok").all() and len(world.verify("toy")) == len(GOOD)
    (folder / "D/plans.json").write_bytes(b"[]")  # As long as before
    (folder / "D/dataset.json").unlink()
    (folder / "D/more.py").write_text("")
    (folder / "D/link").symlink_to("/etc/passwd")
    states = world.verify("toy").set_index("file").state.to_dict()
    assert states == {
        "D/plans.json": "changed", "D/dataset.json": "missing", "D/fold_0/checkpoint_final.pth": "ok",
        "D/more.py": "added", "D/link": "added",
    }  # fmt: skip


def test_verify_does_not_take_a_link_for_a_file(world, tmp_path):
    plans = world.run() / "D/plans.json"
    plans.unlink()
    (tmp_path / "elsewhere").write_bytes(b"{}")  # The same bytes, today
    plans.symlink_to(tmp_path / "elsewhere")
    assert world.verify("toy").set_index("file").state["D/plans.json"] == "changed"


def test_verify_says_what_is_not_there(world):
    assert world.verify().empty
    with pytest.raises(FileNotFoundError, match="fetch it first"):
        world.verify("toy")
    with pytest.raises(ValueError, match="no model 'other'"):
        world.verify("other")


def test_verify_does_not_follow_a_forged_receipt_out(world):
    folder = world.run()
    receipt = json.loads((folder / "zoo.json").read_text())
    receipt["files"]["../../../../etc/passwd"] = [1, "0" * 64]
    (folder / "zoo.json").write_text(json.dumps(receipt))
    with pytest.raises(ValueError, match="could lead out"):
        world.verify()


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_damaged_receipt_is_an_error_that_names_it(text, world):
    (world.run() / "zoo.json").write_text(text)
    for call in (world.run, world.verify, lambda: weights_source(world.home / "model")):
        with pytest.raises(ValueError, match="model/zoo.json .*remove it"):
            call()


# Licences


@pytest.mark.parametrize("kind", ["yes", "unknown"])
def test_licence_has_to_be_accepted_once(kind, world, server):
    world.write(non_commercial=kind, licence="CC BY-NC-SA 4.0")
    with pytest.raises(PermissionError, match="CC BY-NC-SA 4.0.*https://example.org/toy.*--accept-licence"):
        world.run()
    assert not server.plan.asked
    world.run(accept_licence=True)
    state = json.loads((world.home / "state.json").read_text())
    assert state["accepted"] == "CC BY-NC-SA 4.0" and state["accepted_at"].endswith("+00:00")
    world.run()
    assert len(server.plan.asked) == 1


def test_other_terms_have_to_be_accepted_again(world):
    world.write(non_commercial="yes", licence="CC BY-NC 4.0")
    world.run(accept_licence=True)
    world.write(non_commercial="yes", licence="CC BY-NC-ND 4.0")
    with pytest.raises(PermissionError, match="CC BY-NC-ND"):
        world.run()


def test_licence_is_found_from_any_file_below(world, tmp_path):
    world.write(non_commercial="yes", licence="CC BY-NC-SA 4.0")
    folder = world.run(accept_licence=True)
    for path in (folder, folder / "D", folder / "D/fold_0/checkpoint_final.pth"):
        origin = weights_source(path)
        assert (origin.licence, origin.non_commercial) == ("CC BY-NC-SA 4.0", "yes")
        assert "https://example.org/toy" in origin.provenance and len(origin.sha256) == 64
    assert weights_source(tmp_path) == (UNKNOWN, "unknown", UNKNOWN, "")


STRAY = {"other": '{"animals": ["lion"]}', "list": "[1]", "no JSON": "{", "deep": "[" * 10_000}


@pytest.mark.parametrize("text", [*STRAY.values(), None], ids=[*STRAY, "receipt of another model"])
def test_stray_zoo_json_above_is_nobodys(text, world, tmp_path):
    folder = world.run(accept_licence=True)
    (tmp_path / "home/mine").mkdir(parents=True)
    (tmp_path / "home/zoo.json").write_text(text if text else (folder / "zoo.json").read_text())
    (tmp_path / "home/mine/model.pth").write_bytes(b"weights")
    for path in (tmp_path / "home/mine/model.pth", tmp_path / "home/mine"):
        assert weights_source(path) == (UNKNOWN, "unknown", UNKNOWN, "")


def test_own_file_in_a_fetched_folder_is_not_under_its_licence(world):
    folder = world.run(accept_licence=True)
    (folder / "mine.pth").write_bytes(b"weights")
    assert weights_source(folder / "mine.pth").licence == UNKNOWN and weights_source(folder).licence != UNKNOWN


LICENCES = sorted({entry.licence for entry in load_zoo().values()} | {"CC BY-NC 4.0", "GPL-3.0", "MIT"})


@pytest.mark.parametrize("parent", LICENCES)
@pytest.mark.parametrize("own", ["Apache-2.0", "CC BY-NC 4.0"])
def test_restrictions_survive_generations(parent, own):
    """Whatever the maker of each generation wishes, terms do not get lost on the way."""
    licence, kinds = parent, licence_terms(parent)
    for _ in range(3):
        licence = derived_licence(licence, own)
        assert kinds <= licence_terms(licence) or kinds == set()
        assert parent in licence


def test_derived_licences_by_kind():
    assert derived_licence("", "MIT") == "MIT"
    assert derived_licence("Apache-2.0", "Apache-2.0") == "Apache-2.0"
    assert derived_licence("CC BY-SA 4.0", "MIT").startswith("CC BY-SA 4.0")
    assert derived_licence("CC BY-NC 4.0", "MIT").startswith("MIT, non-commercial")
    assert "not to be shared" in derived_licence("CC BY-NC-ND 4.0", "MIT")
    assert derived_licence(UNKNOWN, "MIT").startswith("unknown until")


# The registry


def test_model_for_people_only_says_where_and_takes_a_copy(world, tmp_path, server):
    world.write(url=UNKNOWN)
    with pytest.raises(FileNotFoundError, match="by hand from https://example.org/toy.*--given"):
        world.run()
    assert not world.home.exists()
    folder = world.run(given=tmp_path / "weights.zip")
    assert (folder / "D/plans.json").is_file() and not server.plan.asked
    assert world.run() == folder


def test_model_that_nobody_has_says_so(tmp_path):
    (tmp_path / "a.pth").write_bytes(BODY)
    for given in (None, tmp_path / "a.pth"):
        with pytest.raises(FileNotFoundError, match="was not published when .* see https://github.com/MIC-DKFZ"):
            fetch("mednext_v2_official", tmp_path / "cache", given=given)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change, match",
    [
        ({"url": "ftp://example.org/a"}, "url is"),
        ({"url": UNKNOWN, "where": ""}, "where is"),
        ({"non_commercial": "perhaps"}, "non_commercial is"),
        ({"layout": "a/b/c"}, "layout is"),
        ({"sha256": "abc"}, "sha256 is"),
        ({"file": "../a.zip"}, "could lead out"),
        ({"others": {"/etc/passwd": UNKNOWN}}, "could lead out"),
        ({"licence": ""}, "licence is"),
        ({"sha265": "0" * 64}, "ZooEntry has no 'sha265'"),
    ],
)
def test_bad_entry_is_named(change, match, world):
    world.write(**change)
    with pytest.raises(ValueError, match=match):
        load_zoo(world.registry)


def test_entry_name_cannot_be_a_path():
    for name in ("../a", "A", "a/b", ""):
        with pytest.raises(ValueError, match="name is"):
            replace(get_entry("stunet_base"), name=name)


def test_every_model_of_the_facts_has_an_entry():
    names = set(load_zoo())
    wanted = [f"totalsegmentator_ct_{i}" for i in (291, 292, 293, 294, 295, 297)]
    wanted += [f"totalsegmentator_mr_{i}" for i in (850, 851, 852)]
    wanted += [f"cads_{kind}_{i}" for kind in ("reference", "research", "open") for i in range(551, 560)]
    wanted += [f"stunet_{size}" for size in ("small", "base", "large", "huge")]
    wanted += [f"voco_comni_{size}" for size in ("nnunet", "b", "l", "h")]
    wanted += [f"suprem_{net}" for net in ("swinunetr", "unet", "segresnet")]
    wanted += ["multitalent_v2", "mrsegmentator", "nninteractive", "openmind_mae_resenc_l", "mednext_v2_official"]
    assert set(wanted) <= names


def test_registry_agrees_with_the_licence_names():
    for entry in load_zoo().values():
        if "non-commercial" in licence_terms(entry.licence):
            assert entry.non_commercial == "yes", entry.name
        if licence_terms(entry.licence) & {"unknown"}:
            assert entry.non_commercial == "unknown", entry.name
        if entry.available:
            assert entry.url.startswith("https://") and "{file}" in entry.url, entry.name
            assert " " not in entry.address(entry.file)
    assert sum(entry.classes for name, entry in load_zoo().items() if name.startswith("cads_open_")) == 167


def test_backbones_are_in_their_registry():
    from mednext_v2.models.registry import BACKBONES

    if "resenc_l" not in BACKBONES:
        pytest.skip("the registry has no peers yet")
    strange = {entry.backbone for entry in load_zoo().values()} - {None, *BACKBONES}
    assert not strange, f"zoo.yaml names {strange}"


def test_layouts_are_those_of_the_importers():
    importers = pytest.importorskip("mednext_v2.zoo.importers")
    for entry in load_zoo().values():
        wrapping, _, family = entry.layout.partition("/")
        assert entry.layout == UNKNOWN or wrapping in importers.WRAPPINGS, entry.name
        assert not family or family in importers.FAMILIES, entry.name


def test_table_shows_what_is_not_known():
    table = zoo_table().set_index("name")
    assert table.loc["mednext_v2_official", "licence"] == UNKNOWN and table.loc["stunet_base", "download"] == "by hand"
    assert table.loc["totalsegmentator_ct_297", "spacing (mm)"] == "3 × 3 × 3"
    assert table.loc["nninteractive", "hash known"] == "yes" and table.source.str.len().min() > 10


def test_safe_parts_never_lead_out(tmp_path):
    """Names of random pieces: what is accepted lies below the folder."""
    rng, pieces = random.Random(3), ["a", "..", ".", "", "/", "b", "\\", "C:", ".. ", "~", "...", "é", "\x00"]
    accepted = 0
    for _ in range(3000):
        name = "/".join(rng.choices(pieces, k=rng.randint(1, 4)))
        try:
            parts = safe_parts(name)
        except ValueError:
            continue
        accepted += 1
        inside = Path(os.path.normpath(tmp_path.joinpath(*parts)))
        assert inside == tmp_path or tmp_path in inside.parents
    assert 100 < accepted < 2900


def test_default_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("MEDNEXT_V2_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert catalogue.cache_folder() == tmp_path / "mednext_v2/zoo"
    monkeypatch.setenv("MEDNEXT_V2_CACHE", str(tmp_path / "own"))
    assert catalogue.cache_folder() == tmp_path / "own/zoo"
    assert catalogue.cache_folder(tmp_path / "given") == tmp_path / "given/zoo"


def test_package_data_has_the_registry():
    text = (Path(__file__).parents[1] / "setup.py").read_text()
    assert '"zoo.yaml"' in text and registry_file("zoo.yaml").is_file()
