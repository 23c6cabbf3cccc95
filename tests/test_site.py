"""The site of `make docs`: it builds without a warning, its links lead somewhere, and pages look right on a phone and on a desk. Alone: pytest -m site"""

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from mednext_v2.cli import parser
from mednext_v2.scoring.evaluate import SCORE_COLUMNS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "nbs/site"))
for needed in ("myst_nb", "pydata_sphinx_theme", "sphinx_copybutton", "sphinx_design"):
    pytest.importorskip(needed, reason="pip install '.[docs]'")

import build_site  # noqa: E402
import chapter_pages  # noqa: E402
import reference_pages  # noqa: E402
from site_links import Links  # noqa: E402

pytestmark = pytest.mark.site
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
PROFILE = "study" if (ROOT / "results/study/claims/claims.csv").is_file() else "mini"
PAGES = f"""index start/first-label-map learn/index learn/network/grn learn/network/scaling learn/report/claims how-to/finetune
results/index results/{PROFILE}/claims results/{PROFILE}/scratch_vs_pretrained results/{PROFILE}/data
reference/index reference/cli/finetune reference/api/network.grn reference/networks reference/columns""".split()


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The built site; with several workers, one builds it"
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared
    out, done = shared / "site", shared / "site.log"
    with FileLock(shared / "site.lock"):
        if not done.is_file():
            command = [sys.executable, ROOT / "nbs/site/build_site.py", "--out", out, "--stage", shared / "staged", "--jobs", "2"]
            done.write_text(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT).stdout)
    return out


@pytest.mark.slow
def test_builds_without_warnings_or_broken_links(site):
    log = (site.parent / "site.log").read_text()
    assert re.search(r"\d+ pages in \d+ s", log), log[-3000:]
    assert build_site.check(site) == []


@pytest.mark.slow
def test_nothing_comes_from_the_network(site):
    "No page loads a script, a style, a font or a picture of another machine"
    for path in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=[\"'](?:https?:)?//[^\"']+", path.read_text(encoding="utf-8"))
        loaded += re.findall(r"<link[^>]+rel=[\"']stylesheet[\"'][^>]+href=[\"'](?:https?:)?//[^\"']+", path.read_text(encoding="utf-8"))
        assert not loaded, f"{path.relative_to(site)}: {loaded[:3]}"


@pytest.mark.slow
def test_every_chapter_command_and_claim_has_a_place(site):
    texts = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    order = build_site.arrange(build_site.Site(site.parent / "unused"))
    pages = [page for groups in order.values() for items in groups.values() for _, page, _ in items]
    assert len(set(pages)) == len(pages) and {f"{page}.html" for page in pages} <= set(texts)
    for name, _, _ in reference_pages.commands(parser()):
        assert f"reference/cli/{name.replace(' ', '-')}.html" in texts
    for number in range(1, 8):
        assert f'id="claim-{PROFILE}-{number}"' in texts[f"results/{PROFILE}/claims.html"]
    assert all("#| " not in text for name, text in texts.items() if name.startswith("learn/network"))
    assert "default_exp" not in texts["learn/network/grn.html"]
    summary = (site / "llms.txt").read_text(encoding="utf-8")
    assert all(f"/{page}.html" in summary for page in pages)
    assert "GRN3d(" in (site / "api.txt").read_text(encoding="utf-8")
    assert all(f"{name}</span>" in texts["reference/columns.html"] for name in SCORE_COLUMNS)


def test_columns_of_scores_are_described():
    said = build_site.yaml(build_site.HERE / "columns.yaml")
    assert set(SCORE_COLUMNS) <= set(said)


def test_links_lead_to_pages_files_or_the_repository(tmp_path):
    links = Links(ROOT, tmp_path, "https://example.org/x", "main")
    links.pages, links.suffix = {"nbs/network/10_grn.ipynb": "learn/network/grn"}, {"learn/network/grn": ".ipynb"}
    text = "[a](10_grn.ipynb#axes) [b](../../LICENSE) `[c](nowhere.md)` [d](https://a.b/c) ![e](../../results/mini/grn/grn_dsc.png) [f](gone.ipynb)"
    done = links.rewrite(text, "learn/network/blocks", "nbs/network/40_blocks.ipynb")
    assert "[a](grn.ipynb#axes)" in done and "[b](https://example.org/x/blob/main/LICENSE)" in done
    assert "`[c](nowhere.md)`" in done and "[d](https://a.b/c)" in done
    assert "![e](../../files/results/mini/grn/grn_dsc.png)" in done and list(links.assets)
    assert links.broken == ["nbs/network/40_blocks.ipynb: gone.ipynb"]


def test_hidden_cells_go_and_long_ones_fold(tmp_path):
    links = Links(ROOT, tmp_path, "https://example.org/x", "main")
    shown, said = chapter_pages.stage(ROOT, "nbs/network/10_grn.ipynb", "learn/network/grn", "GRN", links, [])
    sources = {cell["id"]: cell for cell in shown["cells"]}
    assert {"module", "test-imports"}.isdisjoint(sources) and said.startswith("Global response normalisation")
    for cell in chapter_pages.read(ROOT / "nbs/network/10_grn.ipynb")["cells"]:
        if cell["cell_type"] == "code" and "#| export" in chapter_pages.source(cell) and len(cell["source"]) > chapter_pages.FOLD + 2:
            assert "hide-input" in sources[cell["id"]]["metadata"]["tags"]
    assert "#|" not in json.dumps([cell["source"] for cell in shown["cells"]])


def test_parameters_are_read_from_docments():
    module = ROOT / "mednext_v2/network/grn.py"
    member = next(one for one in reference_pages.members(module, "mednext_v2.network.grn") if one.name == "GRN3d")
    assert member.call.startswith("(channels") and any("Over the channels" in line for line in member.entry)


# ---- In a browser
CONTRAST = """
() => {
  const parse = (text) => {
    const n = (text.match(/[\\d.]+/g) || []).map(Number), scale = text.startsWith("color(srgb") ? 255 : 1;
    return [n[0] * scale, n[1] * scale, n[2] * scale, n[3] ?? 1];
  };
  const linear = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const behind = (element) => {
    const stack = [];
    for (let e = element; e; e = e.parentElement) stack.push(parse(getComputedStyle(e).backgroundColor));
    return stack.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const bad = new Map();
  const walker = document.createTreeWalker(document.querySelector("main") || document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), e = walker.currentNode.parentElement;
    if (!text || !e || !e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    if (["SCRIPT", "STYLE", "NOSCRIPT"].includes(e.tagName) || e.closest("svg, math, .headerlink, .visually-hidden, .copybtn")) continue;
    const style = getComputedStyle(e), under = behind(e), colour = over(parse(style.color), under);
    const [a, b] = [light(colour), light(under)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.6 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) bad.set(`${e.tagName}.${e.className} ${style.color}`, `${ratio.toFixed(2)} ${text.slice(0, 30)}`);
  }
  return [...bad].map(([k, v]) => `${k}: ${v}`).slice(0, 8);
}
"""
WIDE = """
() => [document.documentElement.scrollWidth - innerWidth, [...document.querySelectorAll("main *")].filter((e) => {
  const box = e.getBoundingClientRect();
  if (box.right <= innerWidth + 1 || !box.width || !e.checkVisibility({ checkVisibilityCSS: true })) return false;
  for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (["auto", "scroll", "hidden"].includes(getComputedStyle(p).overflowX)) return false;
  return true;
}).slice(0, 5).map((e) => e.tagName + "." + e.className)]
"""


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[docs]'")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("width, scheme", [(390, "light"), (1280, "light"), (1280, "dark")])
def test_pages_fit_and_can_be_read(site, browser, address, width, scheme):
    wrong, context = [], browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.on("console", lambda message: wrong.append(f"{page.url}: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(f"{page.url}: {error}"))
    failed = lambda request: wrong.append(f"{page.url}: {request.url} {request.failure}") if request.failure != "net::ERR_ABORTED" else None
    page.on("requestfailed", failed)  # Aborted: what was still loading when the next page was called
    for name in PAGES:
        page.goto(f"{address}/{name}.html")
        beyond, wide = page.evaluate(WIDE)
        wrong += [f"{name} at {width}: {beyond} px too wide {wide}"] if beyond > 0 or wide else []
        wrong += [f"{name} at {width}, {scheme}: contrast {text}" for text in page.evaluate(CONTRAST)]
    context.close()
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_tables_sort_and_filter(site, browser, address):
    page = browser.new_page()
    page.goto(f"{address}/results/{PROFILE}/data.html")
    box = page.locator(".data-table", has=page.locator("th", has_text="lesion_f1")).last
    cells = lambda: box.locator("tbody tr").evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
    columns = [text.strip(" ▲▼") for text in box.locator("thead th").all_inner_texts()]
    at = columns.index("dsc")
    box.locator("thead th button").nth(at).click()
    values = [float(row[at]) for row in cells() if row[at]]
    assert values == sorted(values) and values
    box.locator("thead th button").nth(at).click()
    values = [float(row[at]) for row in cells() if row[at]]
    assert values == sorted(values, reverse=True) and values[0] > 0.5
    network = cells()[0][columns.index("backbone")]
    page.locator(".table-tools input").last.fill(f"liver {network}")
    assert cells() and all("liver" in " ".join(row) and network in " ".join(row) for row in cells())
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "start, clicks, there",
    [
        ("index", ["Fine-tune on your data"], "mednextv2 finetune"),
        ("index", ["What GRN does"], "relative norm"),
        ("index", ["What came of each claim", "Claims", "Claim 6"], "Scaling the representation helps pathology"),
        ("index", ["Base inside nnU-Net"], "nnUNetv2_train"),
    ],
    ids=["finetune", "grn", "claim 6", "nnunet"],
)
def test_what_a_reader_looks_for_is_three_clicks_away(site, browser, address, start, clicks, there):
    page = browser.new_page()
    page.goto(f"{address}/{start}.html")
    for text in clicks:
        page.get_by_role("link", name=text).locator("visible=true").first.click()
    page.wait_for_load_state()
    assert there in page.locator("main").inner_text()
    page.close()
