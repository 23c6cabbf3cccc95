"""Build the site: `make docs` → _docs/

    python nbs/site/build_site.py [--out _docs] [--stage build/site] [--jobs 2]

Pages are staged in build/site: chapters from nbs/ as they were saved (nothing is executed), the pages of nbs/site, and pages that are written from
results/ and from the code. Then Sphinx makes HTML of them; a warning or a link that leads nowhere is an error.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from ruamel.yaml import YAML  # noqa: E402

import chapter_pages  # noqa: E402
import reference_pages  # noqa: E402
import result_pages  # noqa: E402
from site_links import Links  # noqa: E402

PROFILES = ("study", "mini", "paper")
SECTIONS = {"start": "Start", "learn": "Learn", "how-to": "How-to", "results": "Results", "reference": "Reference"}


class Site:
    "Pages by their place, with title, description and text, and the order that they are listed in"

    def __init__(self, staged: Path, root: Path = ROOT):
        settings = ConfigParser(delimiters=["="])
        settings.read(root / "settings.ini", encoding="utf-8")
        self.root, self.settings = root, settings["DEFAULT"]
        self.links = Links(root, staged, self.settings["git_url"], self.settings["branch"])
        self.titles: dict[str, str] = {}
        self.descriptions: dict[str, str] = {}
        self.staged, self.source, self.plain_api = staged, staged / "source", ""

    def write(self, page: str, text: str | dict, title: str = "", description: str = "") -> None:
        "Stage a page"
        path = self.source / f"{page}{'.ipynb' if isinstance(text, dict) else '.md'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(text) if isinstance(text, dict) else text, encoding="utf-8")
        found = re.search(r"^# (.+)$", text, re.M) if isinstance(text, str) else None
        self.titles[page] = title or (found[1] if found else page)
        if not description and isinstance(text, str):
            lead = re.search(r"^:::\{div\} lead\n(.*?)\n:::", text, re.M | re.S)
            description = chapter_pages.shorten(chapter_pages.plain(lead[1] if lead else re.sub(r"^:::.*?^:::|^```.*?^```", "", text, flags=re.M | re.S)), 160)
        self.descriptions[page] = description


def yaml(path: Path) -> dict:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def arrange(site: Site) -> dict[str, dict[str, list[tuple[str, str, str]]]]:
    "Where each chapter stands: by section and group its source, its page and its title"
    wanted = yaml(HERE / "toc.yaml")
    rooms, placed = wanted.pop("rooms"), set()
    order: dict = {section: {group: [] for group in groups} for section, groups in wanted.items()}

    def place(section: str, group: str, path: str, title: str) -> None:
        name = re.sub(r"(^|/)\d+_", r"\1", path.removeprefix("nbs/").removesuffix(".ipynb"))
        order[section][group].append((path, f"{section}/{name}", title))
        placed.add(path)

    for section, groups in wanted.items():
        for group, items in groups.items():
            for item in items:
                ((name, title),) = item.items()
                if (site.root / f"nbs/{name}.ipynb").is_file():
                    place(section, group, f"nbs/{name}.ipynb", title)
    others = [*site.root.glob("nbs/[0-9]*.ipynb"), *site.root.glob("nbs/*/[0-9]*.ipynb")]
    for path in sorted(one.relative_to(site.root).as_posix() for one in others):
        if path not in placed:
            section, group = rooms.get(Path(path).parent.name, "learn/Under the hood").split("/")
            place(section, group, path, chapter_pages.heading(chapter_pages.read(site.root / path))[0])
    return order


def modules(site: Site) -> dict[str, Path]:
    "The modules with public names, and their files"
    found = {}
    for path in sorted((site.root / "mednext_v2").rglob("*.py")):
        if path.name not in ("_modidx.py", "__init__.py") and "__all__" in (text := path.read_text(encoding="utf-8")):
            if re.search(r"__all__ = \[[^\]]", text):
                found[".".join(path.relative_to(site.root).with_suffix("").parts)] = path
    return found


def toctree(items: list[tuple[str, str]], caption: str = "", hidden: bool = True) -> str:
    lines = [":::{toctree}", *([f":caption: {caption}"] if caption else []), *([":hidden:"] if hidden else []), ":maxdepth: 1", ""]
    return "\n".join([*lines, *[f"{title} <{target}>" for title, target in items], ":::", ""])


def stage_written(site: Site) -> dict[str, list[str]]:
    "Pages that are written for the site; by section, their names in the order of their file names"
    found: dict[str, list[str]] = {}
    for path in sorted(HERE.rglob("*.md")):
        name = re.sub(r"(^|/)\d+_", r"\1", path.relative_to(HERE).with_suffix("").as_posix())
        site.links.pages[path.relative_to(site.root).as_posix()] = name
        site.links.suffix[name] = ".md"
        found.setdefault(str(Path(name).parent), []).append(name)
    return found


def write_written(site: Site, also: dict[str, str]) -> None:
    for path in sorted(HERE.rglob("*.md")):
        source = path.relative_to(site.root).as_posix()
        page = site.links.pages[source]
        text = site.links.rewrite(path.read_text(encoding="utf-8"), page, source)
        site.write(page, text + also.get(page, ""))


def write_chapters(site: Site, order: dict, api: dict[str, str]) -> None:
    for groups in order.values():
        for items in groups.values():
            for path, page, title in items:
                notebook = chapter_pages.read(site.root / path)
                see, module = [], chapter_pages.module_of(notebook)
                name = f"mednext_v2.{module}"
                if module and name in api:
                    see.append(f"Reference: [`{name}`]({site.links.relative(page, api[name])}.md)")
                stem = (module or "").split(".")[-1]
                if (site.root / f"tests/test_{stem}.py").is_file():
                    see.append(f"Tests: [tests/test_{stem}.py]({site.links.online(f'tests/test_{stem}.py')})")
                see.append(f"This page is a notebook: [{path}]({site.links.online(path)})")
                text, said = chapter_pages.stage(site.root, path, page, title, site.links, see)
                site.write(page, text, title, said)


def told(title: str, description: str) -> str:
    "What a list says after a title, without saying the title twice"
    if description.lower().startswith(title.lower()):
        description = description[len(title) :].lstrip(":,. ")
    return f": {description}" if description else ""


def group_index(order: dict, site: Site, page: str) -> str:
    "Lists of chapters by group, for the page that opens a section"
    parts = []
    for group, items in order.items():
        if items:
            listed = [f"- [{title}]({site.links.relative(page, other)}.ipynb)" + told(title, site.descriptions.get(other, "")) for _, other, title in items]
            parts += [f"## {group}", "", *listed, "", toctree([(title, f"/{other}") for _, other, title in items], group)]
    return "\n".join(["", *parts])


def place_results(site: Site) -> None:
    "Where pages of results are, before any page is written, so that pages can link to each other"
    profiles = [name for name in PROFILES if (site.root / "results" / name).is_dir()]
    for profile in profiles:
        folders = [path.name for path in sorted((site.root / "results" / profile).iterdir()) if any(path.glob("*.csv")) or any(path.glob("*.png"))]
        for name in folders:
            site.links.suffix[f"results/{profile}/{name}"] = ".md"
            if profile == profiles[0]:
                site.links.pages.setdefault(f"nbs/paper/{name}.ipynb", f"results/{profile}/{name}")
        site.links.pages[f"results/{profile}"] = site.links.pages[f"results/{profile}/README.md"] = f"results/{profile}/index"
        site.links.suffix[f"results/{profile}/index"] = ".md"


def write_results(site: Site) -> str:
    "Pages of results, and what the page that opens them has to list"
    lists, profiles = [], []
    if not (site.root / "results/study").is_dir():
        lists += ["Results of the profile `study` are not in this commit: they are made anew.", ""]
    order = [one if isinstance(one, str) else next(iter(one)) for one in yaml(site.root / "conf/config.yaml").get("papers", [])]
    for profile in PROFILES:
        if not (folder := site.root / "results" / profile).is_dir():
            continue
        found = [path.name for path in sorted(folder.iterdir()) if f"results/{profile}/{path.name}" in site.links.suffix]
        first = ["claims", "main_table", "scratch_vs_pretrained", "scratch_predicts_pretrained", "backbones", "scaling", "grn", *order]
        names = sorted(found, key=lambda name: (first.index(name) if name in first else len(first), name))
        pages = []
        for name in names:
            text, title, said = result_pages.page_of(site.root, profile, name, site.links)
            site.write(f"results/{profile}/{name}", text, f"{title} ({profile})", said)
            pages.append((name, title, said))
        if any(folder.glob("*.csv")):
            site.write(f"results/{profile}/data", result_pages.data_page(site.root, profile, site.links), f"Scores and costs ({profile})")
            pages.append(("data", "Scores and costs", "every score of every case, and what each training cost"))
        site.write(f"results/{profile}/index", result_pages.overview(site.root, profile, pages, site.links), f"Results of profile {profile}")
        lists += [f"## Profile {profile}", "", f"[What it is]({profile}/index.md), and:", ""]
        lists += [*(f"- [{title}]({profile}/{name}.md){told(title, said)}" for name, title, said in pages), ""]
        profiles.append((f"Profile {profile}", f"{profile}/index"))
    return "\n".join(["", *lists, toctree(profiles)])


def write_api(site: Site, found: dict[str, Path], chapter_of: dict[str, str]) -> list[tuple[str, list[reference_pages.Member]]]:
    listed = []
    for name, path in found.items():
        page, names = f"reference/api/{name.removeprefix('mednext_v2.')}", reference_pages.members(path, name)
        text = path.read_text(encoding="utf-8")
        said = re.match(r'"""(.*?)"""', text, re.S)
        lines = [f"# {name}", "", ":::{div} lead", reference_pages.prose(said[1] if said else ""), ":::", ""]
        chapter = chapter_of.get(name)
        lines += [f"Explained and shown at work in [{site.titles[chapter]}]({site.links.relative(page, chapter)}.ipynb).", ""] if chapter else []
        lines += [f"```{{py:module}} {name}", "```", ""]
        lines += [line for member in names for line in member.entry]
        site.write(page, "\n".join(lines), name, reference_pages.prose(said[1] if said else ""))
        listed.append((name, names))
    return listed


def write_reference(site: Site, order: dict) -> None:
    from mednext_v2.cli import GROUPS, SECTIONS, parser
    from mednext_v2.public import HOME_OF

    found = modules(site)
    chapter_of = {}
    for groups in order.values():
        for items in groups.values():
            for path, page, _ in items:
                if module := chapter_pages.module_of(chapter_pages.read(site.root / path)):
                    chapter_of[f"mednext_v2.{module}"] = page
    listed = write_api(site, found, chapter_of)
    summary = ["# The API on one page", "", ":::{div} lead", "Every public name, with its arguments and one line", ":::", ""]
    everyday = {f"mednext_v2.{home}.{name}" for name, home in HOME_OF.items()}
    plain = []
    for module, names in listed:
        summary += [f"## {module.removeprefix('mednext_v2.')}", ""]
        plain += ["", f"## {module}", ""]
        for one in names:
            star = " (also `from mednext_v2 import`)" if f"{module}.{one.name}" in everyday else ""
            summary += [f"{{py:obj}}`{one.name} <{module}.{one.name}>`{star}", f": {reference_pages.code(one.name + one.call)}", ""]
            summary += [f"  {one.line}", ""] if one.line else []
            plain.append(f"- `{one.name}{one.call}`{star}: {reference_pages.unescape(one.line)}")
    site.write("reference/summary", "\n".join(summary))
    site.plain_api = "\n".join(plain)
    api = [(name.removeprefix("mednext_v2."), f"api/{name.removeprefix('mednext_v2.')}") for name, _ in listed]

    top = parser()
    every = reference_pages.commands(top)
    for name, command, line in every:
        site.write(
            f"reference/cli/{name.replace(' ', '-')}", reference_pages.command_page(name, command, line), f"mednextv2 {name}", chapter_pages.shorten(line)
        )
    lines = ["# The command line", "", ":::{div} lead", "Every command of `mednextv2`, from its parser", ":::", ""]
    by_name, left = {name: line for name, _, line in every}, [name for name, _, _ in every]
    listed_by = [*SECTIONS.items(), ("more", " ".join(sorted({name.split()[0] for name in left})))]
    for title, words in listed_by:
        names = [name for word in words.split() for name in list(left) if name.split()[0] == word]
        left = [name for name in left if name not in names]
        if names:
            lines += [
                f"## {title.capitalize()}",
                "",
                *[f"- [`mednextv2 {n}`](cli/{n.replace(' ', '-')}.md): {reference_pages.escape(by_name[n])}" for n in names],
                "",
            ]
    assert GROUPS and not left
    site.write("reference/cli", "\n".join(lines) + "\n" + toctree([(f"mednextv2 {n}", f"cli/{n.replace(' ', '-')}") for n, _, _ in every]))
    write_tables_of_reference(site)
    pages = [("The API on one page", "summary"), ("The command line", "cli"), ("Columns of tables", "columns"), ("Fields of a card", "card")]
    pages += [("Registry of networks", "networks"), ("Exit codes", "exit-codes")]
    listed_pages = [f"- [{title}]({name}.md): {site.descriptions[f'reference/{name}']}" for title, name in pages]
    text = ["# Reference", "", ":::{div} lead", "Written from the code: what can be called, and what files hold", ":::", "", *listed_pages, "", toctree(pages)]
    text += ["## Modules", "", *[f"- [`mednext_v2.{title}`]({name}.md): {site.descriptions[f'reference/{name}']}" for title, name in api]]
    site.write("reference/index", "\n".join([*text, "", toctree(api, "Modules")]))


def write_tables_of_reference(site: Site) -> None:
    "Columns, fields of a card, networks and exit codes"
    import ast

    from mednext_v2.evaluation.metrics import CONVENTIONS

    text = (site.root / "mednext_v2/models/card.py").read_text(encoding="utf-8")
    card = next(node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Card")
    rows = reference_pages.fields(card, reference_pages.comments(text))
    lead = "What `card.json` of a model folder says; a field with a default may be missing in older cards"
    site.write("reference/card", f"# Fields of a card\n\n:::{{div}} lead\n{lead}\n:::\n\n{reference_pages.definition_list(rows)}")

    said, lines = yaml(HERE / "columns.yaml"), ["# Columns of tables", "", ":::{div} lead", "What each column of a CSV holds", ":::", ""]
    for folder in ("results/study", "results/mini"):
        for path in sorted((site.root / folder).glob("*.csv")):
            if f"## {path.name}" not in lines:
                lines += [f"## {path.name}", ""]
                for name in columns_of(path):
                    lines += [reference_pages.code(name), f": {said.get(name, '&nbsp;')}", ""]
    lines += ["## Conventions of scores", "", *(f"{name}\n: {reference_pages.escape(value)}\n" for name, value in CONVENTIONS.items())]
    site.write("reference/columns", "\n".join(lines))

    codes = yaml(HERE / "exit_codes.yaml")
    lines = [
        "# Exit codes",
        "",
        ":::{div} lead",
        "What `mednextv2` returns to the shell",
        ":::",
        "",
        *(f"`{code}`\n: {words}\n" for code, words in codes.items()),
    ]
    site.write("reference/exit-codes", "\n".join(lines))
    write_networks(site)


def columns_of(path: Path) -> list[str]:
    "The columns of a table; of the scores those that the code writes now, which committed tables may not have yet"
    from mednext_v2.scoring.evaluate import SCORE_COLUMNS

    there = result_pages.read_csv(path)[0]
    wanted = {"scores.csv": SCORE_COLUMNS, "ablations.csv": ["ablation", "variant", *SCORE_COLUMNS]}.get(path.name, [])
    return [*wanted, *(name for name in there if name not in wanted)]


def write_networks(site: Site) -> None:
    "The registry: name, title, published size and package of each network; nothing is built"
    from html import escape

    from mednext_v2.models.registry import BACKBONES, get_backbone

    rows = []
    for entry in map(get_backbone, BACKBONES):
        size = f"{entry.published.millions:g}" if entry.published else ""
        rows.append([f"<code>{escape(entry.name)}</code>", escape(entry.title), size, escape(str(entry.package or ""))])
    head = "".join(f'<th scope="col">{name}</th>' for name in ("name", "network", "published size (millions of parameters)", "package"))
    body = "\n".join("<tr>" + "".join(f"<td>{value}</td>" for value in row) + "</tr>" for row in rows)
    html = f'<div class="data-table" role="region" tabindex="0" aria-label="Networks"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    lead = "Every network that `--backbone` and `create_model` know by name"
    more = "How they are built, counted and extended: [the registry](../learn/models/registry.ipynb)."
    site.write("reference/networks", f"# Registry of networks\n\n:::{{div}} lead\n{lead}\n:::\n\n{more}\n\n```{{raw}} html\n{html}\n```\n")


def stage(site: Site) -> None:
    "Write all sources"
    shutil.rmtree(site.staged, ignore_errors=True)
    order = arrange(site)
    for groups in order.values():
        for items in groups.values():
            for path, page, _ in items:
                site.links.pages[path], site.links.suffix[page] = page, ".ipynb"
    written = stage_written(site)
    place_results(site)
    for other in ("README.md", "nbs/index.ipynb"):
        site.links.pages[other] = "index"
    for name in modules(site):
        site.links.suffix[f"reference/api/{name.removeprefix('mednext_v2.')}"] = ".md"
    api = {name: f"reference/api/{name.removeprefix('mednext_v2.')}" for name in modules(site)}
    write_chapters(site, order, api)
    profiles = write_results(site)
    write_reference(site, order)
    also = {"results/index": profiles}
    for section in ("start", "learn", "how-to"):
        pages = [name for name in written.get(section, []) if name != f"{section}/index"]
        titles = {page: re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.M)[1] for path, page in ((HERE / p, n) for p, n in sources(site, pages))}
        listed = [f"- [{titles[page]}]({Path(page).name}.md)" for page in pages]
        also[f"{section}/index"] = "\n".join(["", *listed, "", toctree([(titles[p], f"/{p}") for p in pages])] if pages else [])
        also[f"{section}/index"] += group_index(order.get(section, {}), site, f"{section}/index")
    also["index"] = "\n" + toctree([(title, f"{section}/index") for section, title in SECTIONS.items()])
    write_written(site, also)
    for folder, files in ((site.source, site.links.assets), (site.staged / "extra", site.links.files)):
        for place, path in files.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / place)
    (site.staged / "descriptions.json").write_text(json.dumps(site.descriptions), encoding="utf-8")


def sources(site: Site, pages: list[str]) -> list[tuple[str, str]]:
    "The files of nbs/site that pages are written in"
    by_page = {page: path for path, page in site.links.pages.items() if path.startswith("nbs/site/")}
    return [(by_page[page].removeprefix("nbs/site/"), page) for page in pages]


def llms(site: Site, out: Path) -> None:
    "llms.txt: what the project is and a line for each page; api.txt: the public names"
    base = f"{site.settings['doc_host']}{site.settings['doc_baseurl']}"
    lines = [f"# {site.settings['lib_name']}", "", f"> {site.settings['description']}", ""]
    lines += [f"Source: {site.settings['git_url']}. Every public name on one page: {base}/api.txt", ""]
    for section, title in SECTIONS.items():
        lines += [f"## {title}", ""]
        written = set(site.links.pages[path] for path in site.links.pages if path.startswith("nbs/site/"))
        pages = [page for page in site.titles if page.startswith(f"{section}/")]
        pages.sort(key=lambda page: (page != f"{section}/index", page not in written))  # Else in the order of the site
        lines += [f"- [{site.titles[page]}]({base}/{page}.html)" + (f": {site.descriptions[page]}" if site.descriptions[page] else "") for page in pages] + [""]
    (out / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
    (out / "api.txt").write_text(f"# {site.settings['lib_name']} {site.settings['version']}: public names\n{site.plain_api}\n", encoding="utf-8")


class Anchors(HTMLParser):
    "The links and the anchors of a page"

    def __init__(self):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.silent: list[str] = []  # Pictures without a text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if name := found.get("id") or found.get("name"):
            self.anchors.add(name)
        for key in ("href", "src"):
            if found.get(key):
                self.links.append(str(found[key]))
        if tag == "img" and not (found.get("alt") or "").strip():
            self.silent.append(found.get("src") or "")


def check(out: Path) -> list[str]:
    "What is wrong with the links and pictures of a built site: files or anchors that are not there, pictures without a text"
    pages, wrong = {}, []
    for path in sorted(set(out.rglob("*.html")) - set((out / "_static").rglob("*")) - set((out / "files").rglob("*"))):
        pages[path] = Anchors()
        pages[path].feed(path.read_text(encoding="utf-8"))
    for path, found in pages.items():
        name = path.relative_to(out).as_posix()
        wrong += [f"{name}: a picture without a text, {source[:80]}" for source in found.silent]
        for link in dict.fromkeys(found.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                wrong.append(f"{name}: {link} is not there")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors and not parts.fragment.startswith(":~:"):
                wrong.append(f"{name}: {link} has no such anchor")
    return wrong


def main() -> None:
    options = argparse.ArgumentParser(description="Build the site from what is saved: nothing is executed, nothing is downloaded")
    options.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder (default _docs)")
    options.add_argument("--stage", type=Path, default=ROOT / "build/site", help="folder for what Sphinx reads (default build/site)")
    options.add_argument("--jobs", default=str(min(os.cpu_count() or 1, 4)), help="processes")
    options = options.parse_args()
    start, site = time.perf_counter(), Site(options.stage.resolve())
    stage(site)
    if site.links.broken:
        raise SystemExit("links to files that are not there:\n" + "\n".join(site.links.broken))
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "html",
        "-W",
        "--keep-going",
        "-q",
        "-j",
        options.jobs,
        "-c",
        str(HERE),
        "-d",
        str(site.staged / "doctrees"),
    ]
    environment = {**os.environ, "SITE_STAGE": str(site.staged)}
    if subprocess.run([*command, str(site.source), str(site.staged / "html")], env=environment).returncode:
        raise SystemExit("Sphinx found something to mend")
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.copytree(site.staged / "html", options.out)
    (options.out / ".buildinfo").unlink(missing_ok=True)
    (options.out / ".nojekyll").touch()
    llms(site, options.out)
    if wrong := check(options.out):
        raise SystemExit("\n".join(wrong))
    pages = len(list(options.out.rglob("*.html")))
    print(f"{options.out}: {pages} pages in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
