"""The review page: what it holds, what it must not let through, and how it behaves in headless Chromium"""

import http.client
import json
import re
import shutil
import subprocess
import time

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from mednext_v2.core import ItemsFailed
from mednext_v2.data.datasets import Dataset
from mednext_v2.data.scans import write_volume
from mednext_v2.evaluation.metrics import evaluate
from mednext_v2.evaluation.review import crop_around, draw_front, draw_slice, review, score_rows, worst_slices

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>document.title='pwned'<", "<img src=x onerror=document.title='pwned'>", "]]>&amp;"
TASK = Dataset(
    "toy",
    999,
    "Toy",
    "CT",
    {"liver": 1, EVIL[1]: 2, "spleen": 3},
    {"liver": "organ", EVIL[1]: "pathology", "spleen": "organ"},
    (1, 1, 1),
    (8, 8, 8),
    1.0,
    "finetune",
    "none",
    "none",
)


def run_of(folder, cases: int = 4) -> tuple:
    "Predictions, truths and images on disk, and their scores"
    generator, affine = np.random.default_rng(0), np.diag([1.0, 1.0, 2.5, 1.0])
    names = [EVIL[0], EVIL[2], *(f"case {i}" for i in range(2, cases))]
    for i, name in enumerate(names):
        smooth = ndimage.gaussian_filter(generator.normal(size=(4, 40, 36, 16)), (0, 4, 4, 2))
        truth = smooth.argmax(0).astype(np.uint8)
        truth[truth == 3] = 0  # The spleen is never there
        guess = (smooth + 0.3 * i * smooth[::-1]).argmax(0).astype(np.uint8)
        guess[guess == 3] = 0
        if i == 2:
            guess[guess == 2] = 0  # Missed
        image = (truth * 60.0 + generator.normal(0, 10, truth.shape)).astype(np.int16)
        for part, values in (("predictions", guess), ("truths", truth), ("images", image)):
            suffix = "_0000" if part == "images" else ""
            write_volume(folder / part / f"{name}{suffix}.nii.gz", values, affine)
    places = [folder / part for part in ("predictions", "truths", "images")]
    return evaluate(*places[:2], TASK), *places


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("review")
    scores, *places = run_of(folder)
    return review(scores, *places, folder / "review.html", TASK, title=EVIL[0]), scores, places


def data_of(path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def test_page_holds_every_row_worst_first(page):
    path, scores, _ = page
    rows = data_of(path)["rows"]
    assert len(rows) == len(scores) == 12
    values = [row["dsc"] for row in rows]
    known = [value for value in values if value is not None]
    assert known == sorted(known) and values[: len(known)] == known and len(known) == 8
    assert known[0] == 0 and rows[0]["case"] == "case 2" and rows[0]["label"] == EVIL[1]
    for row in rows:
        same = scores[(scores.case == row["case"]) & (scores.label == row["label"])].iloc[0]
        for name in ("dsc", "nsd", "hd95", "n_lesions"):
            assert row[name] is None if pd.isna(same[name]) else row[name] == pytest.approx(float(same[name]))
        assert len(row["pictures"]) == (4 if row["dsc"] is not None else 0)
    assert [picture["text"].split()[0] for picture in rows[0]["pictures"]][-1] == "from"
    assert {picture["text"].split()[0] for picture in rows[0]["pictures"][:3]} == {"sagittal", "coronal", "axial"}


def test_page_needs_no_network_and_lets_no_name_through(page):
    text = page[0].read_text(encoding="utf-8")
    outside = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|src=[\"']?[^d\"' ]", outside)
    assert "Content-Security-Policy" in text and "default-src 'none'" in text
    assert "pwned'<" not in text.replace("&lt;", "") and "<img" not in text
    assert text.count("<script") == 2  # Data and code
    for name in EVIL[:2]:  # The third is harmless within a script
        assert name not in text


def test_size_of_a_page_of_thirty_cases_stays_below_ten_megabytes(page):
    rows = [row["pictures"] for row in data_of(page[0])["rows"] if row["pictures"]]
    largest = max(len(picture["source"]) for pictures in rows for picture in pictures)
    # With the defaults, whatever the number of cases
    assert (240 + 60 * 3) * largest < 10e6


def test_only_the_worst_rows_get_pictures_if_few_are_wanted(page, tmp_path):
    _, scores, places = page
    rows = data_of(review(scores, *places, tmp_path / "few.html", TASK, pictures=3, all_views=1))["rows"]
    assert [len(row["pictures"]) for row in rows] == [4, 1, 1] + [0] * 9
    by_nsd = data_of(review(scores, *places, tmp_path / "nsd.html", TASK, sort="nsd"))
    assert by_nsd["sort"] == "nsd" and by_nsd["rows"][0]["nsd"] == scores.nsd.min()


def test_a_broken_case_keeps_its_scores_and_says_why(page, tmp_path):
    _, scores, places = page
    for place in places:
        shutil.copytree(place, tmp_path / place.name)
    (tmp_path / "predictions/case 2.nii.gz").write_bytes(b"none")
    (tmp_path / "truths/case 3.nii.gz").unlink()
    broken = data_of(review(scores, *(tmp_path / place.name for place in places), tmp_path / "a.html", TASK))["rows"]
    notes = {row["case"]: row["note"] for row in broken if row["dsc"] is not None}
    assert "is not NIfTI" in notes["case 2"] and "no truth of that name" in notes["case 3"]
    assert notes[EVIL[0]] == "" and len(broken) == 12
    with pytest.raises(ItemsFailed):
        evaluate(tmp_path / "predictions", tmp_path / "truths", TASK)


def test_rows_of_several_runs_are_refused(page):
    scores = page[1]
    with pytest.raises(ValueError, match="more than once: choose the rows of one run"):
        score_rows(pd.concat([scores, scores]), "dsc")
    with pytest.raises(ValueError, match="need the column.s. hd77"):
        score_rows(scores, "hd77")


def test_page_without_images_and_from_a_csv(page, tmp_path):
    _, scores, places = page
    scores.to_csv(tmp_path / "scores.csv", index=False)
    rows = data_of(review(tmp_path / "scores.csv", *places[:2], None, tmp_path / "a.html", TASK))["rows"]
    assert sum(bool(row["pictures"]) for row in rows) == 8


# ---- Pictures


def test_the_first_slice_is_the_one_with_most_wrong_area():
    generator = np.random.default_rng(0)
    for spacing in ((1, 1, 1), (0.5, 2, 5)):
        a, b = (ndimage.gaussian_filter(generator.normal(size=(14, 12, 10)), 1.5) > 0 for _ in range(2))
        (axis, index), *others = worst_slices(a, b, spacing)
        faces = np.prod(spacing) / np.array(spacing)
        best = max((a ^ b).take(i, x).sum() * faces[x] for x in range(3) for i in range(a.shape[x]))
        assert (a ^ b).take(index, axis).sum() * faces[axis] == pytest.approx(best)
        for axis, index in others:
            assert (a ^ b).take(index, axis).sum() == max((a ^ b).take(i, axis).sum() for i in range(a.shape[axis]))


def test_a_slice_is_cropped_so_that_it_holds_the_class_and_stays_inside():
    mask = np.zeros((50, 8), bool)
    mask[20:23, 0:8] = True
    part = crop_around([mask], (1.0, 3.0), margin=10)
    assert part == (slice(10, 33), slice(0, 8)) and mask[part].sum() == mask.sum()


def test_right_is_left_and_anterior_is_up():
    from io import BytesIO

    from PIL import Image

    image = np.zeros((40, 40), np.uint8)  # Along R and A
    image[25:, 25:] = 255  # To the right and in front
    mask = np.zeros((40, 40), bool)
    mask[18:22, 18:22] = True
    picture = np.asarray(Image.open(BytesIO(draw_slice(image, mask, mask, (1, 1))))).mean(-1)
    half = picture.shape[0] // 2
    quarters = [[picture[:half, :half].mean(), picture[:half, half:].mean()], [picture[half:, :half].mean(), 0]]
    assert quarters[0][0] > 3 * max(quarters[0][1], quarters[1][0])


def test_the_view_from_the_front_shows_who_has_what_and_what_is_near():
    from io import BytesIO

    from PIL import Image

    both, prediction, truth = (np.zeros((40, 40, 40), bool) for _ in range(3))
    both[0:10, 30:40, 0:10] = True  # To the left of the patient, in front, below
    prediction[30:40, 0:10, 0:10] = True
    truth[0:10, 0:10, 30:40] = True
    picture = np.asarray(Image.open(BytesIO(draw_front(both | prediction, both | truth, (1, 1, 1))))).astype(int)
    size = picture.shape[0]
    low, high = slice(size // 16, size // 5), slice(size - size // 5, size - size // 16)
    shared, only_prediction, only_truth, nothing = (picture[part].reshape(-1, 3).mean(0) for part in ((high, high), (high, low), (low, high), (low, low)))
    assert shared.min() > 200 and np.ptp(shared) < 20 and nothing.max() < 20
    assert only_prediction[0] > 2 * only_prediction[2] and only_truth[2] > 2 * only_truth[0]
    assert only_truth.max() < 0.7 * shared.max()  # Farther away


@pytest.mark.parametrize("size", [1, 3, 40])
def test_small_and_thin_masks_are_drawn(size):
    mask = np.zeros((size, 40, 9), bool)
    mask[:, 20:21, 4] = True
    assert draw_front(mask, mask & False, (1.0, 1.0, 2.0))[:2] == b"\xff\xd8"
    for axis, index in worst_slices(mask, mask & False, (1.0, 1.0, 2.0)):
        flat = [spacing for number, spacing in enumerate((1.0, 1.0, 2.0)) if number != axis]
        empty = mask.take(index, axis)
        assert draw_slice(np.zeros(empty.shape, np.uint8), empty, empty & False, flat)[:2] == b"\xff\xd8"


# ---- In a browser


class Browser:
    "Headless Chromium with one page, spoken to over its debugging protocol"

    def __init__(self, folder, address: str):
        options = ("--headless=new --no-sandbox --window-size=1400,1000 --disable-gpu --disable-dev-shm-usage --remote-allow-origins=*").split()
        command = [CHROMIUM, *options, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self.connect(folder, address)
        except BaseException:
            self.close()
            raise

    def connect(self, folder, address: str) -> None:
        import websocket

        port, limit = folder / "DevToolsActivePort", time.monotonic() + 60
        while not (port.is_file() and port.read_text().strip()):
            if time.monotonic() > limit or self.process.poll() is not None:
                pytest.skip("Chromium does not start here")
            time.sleep(0.1)
        connection = http.client.HTTPConnection("127.0.0.1", int(port.read_text().split()[0]), timeout=30)
        connection.request("GET", "/json/list")
        target = next(page for page in json.load(connection.getresponse()) if page["type"] == "page")
        self.socket, self.number = websocket.create_connection(target["webSocketDebuggerUrl"], timeout=60), 0
        self.requests, self.errors = [], []
        for domain in ("Network", "Runtime", "Page", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)
        while self.run("document.readyState + location.protocol") != "completefile:":
            time.sleep(0.1)

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(message["params"])
            if message.get("id") == self.number:
                return message["result"]

    def run(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    pytest.importorskip("websocket")
    opened = Browser(tmp_path_factory.mktemp("profile"), page[0].as_uri())
    yield opened
    opened.close()


COLUMN = "[...document.querySelectorAll('#scores tbody tr')].map(r => r.children[{}].textContent)"
HEADS = "[...document.querySelectorAll('#scores thead th')].map(h => h.textContent)"


def test_browser_shows_all_rows_and_loads_all_pictures(browser, page):
    assert browser.run(COLUMN.format(1)) == [row["case"] for row in data_of(page[0])["rows"]]
    pictures = browser.run("[...document.images].map(i => i.complete && i.naturalWidth > 8)")
    assert len(pictures) == 8 + 4 and all(pictures)  # Eight rows, and the views of the first beside the table
    assert browser.run("document.getElementById('count').textContent") == "12 of 12 rows"


def test_browser_runs_no_name_and_asks_for_nothing(browser, page):
    browser.run("document.querySelectorAll('#scores tbody tr').forEach(row => row.click())")
    assert browser.run("document.title") == EVIL[0]
    assert not [url for url in browser.requests if not url.startswith(("data:", "about:", page[0].as_uri()))]
    assert not browser.errors
    browser.run("fetch('http://127.0.0.1:9/').catch(() => {})")
    browser.run("1")
    assert not [url for url in browser.requests if "127.0.0.1:9" in url]  # The policy forbids it


@pytest.mark.parametrize("title, digits", [("NSD", 3), ("HD95, mm", 1), ("case", None)])
def test_browser_sorts_in_both_directions(browser, title, digits):
    at = browser.run(HEADS).index(title)
    click = f"document.querySelectorAll('#scores thead th')[{at}].click()"
    seen = []
    for _ in range(2):
        browser.run(click)
        values = [text for text in browser.run(COLUMN.format(at))]
        known = [text for text in values if text != "not available"]
        assert values[: len(known)] == known and len(values) == 12  # Not available comes last, either way
        seen.append([float(text) for text in known] if digits else known)
    assert seen[0] == sorted(seen[0]) and seen[1] == sorted(seen[0], reverse=True) and seen[0] != seen[1]


def test_browser_filters_by_class_and_name(browser):
    choose = "(s => {{ s.value = {}; s.dispatchEvent(new Event({!r})); }})(document.getElementById({!r}))"
    browser.run(choose.format(json.dumps(EVIL[1]), "change", "label"))
    assert browser.run(COLUMN.format(2)) == [EVIL[1]] * 4
    browser.run(choose.format(json.dumps("case"), "input", "find"))
    assert sorted(browser.run(COLUMN.format(1))) == ["case 2", "case 3"]
    browser.run(choose.format("''", "change", "label") + ";" + choose.format("''", "input", "find"))
    assert len(browser.run(COLUMN.format(1))) == 12


def test_browser_shows_the_row_that_is_chosen(browser):
    rows = "document.querySelectorAll('#scores tbody tr')"
    browser.run(f"document.querySelectorAll('#scores thead th')[{browser.run(HEADS).index('DSC')}].click()")
    for number in (5, 1):
        browser.run(f"{rows}[{number}].click()")
        cells = browser.run(f"[...{rows}[{number}].children].map(c => c.textContent)")
        assert browser.run("document.querySelector('#detail h2').textContent") == f"{cells[1]}, {cells[2]}"
        assert browser.run("document.querySelectorAll('#detail img').length") == 4
