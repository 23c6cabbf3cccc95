"""Pages of results: figures, tables and the ledger, read from results/<profile> as they are"""

import csv
import json
import re
from html import escape
from pathlib import Path

from chapter_pages import heading, plain, read, shorten, source
from site_links import Links

SMALL = 400  # Rows of a table that stand in the page itself; more are in a script beside it
LONG = 60  # Characters from which on a cell may wrap
LEDGER = "claims"


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    return (rows[0], rows[1:]) if rows else ([], [])


def caption(path: Path) -> str:
    "The caption of a table, from the HTML beside its CSV"
    html = path.with_suffix(".html")
    found = re.search(r"<caption[^>]*>(.*?)</caption>", html.read_text(encoding="utf-8"), re.S) if html.is_file() else None
    return re.sub(r"<[^>]+>", "", found[1]).strip() if found else ""


def cell(text: str) -> str:
    kind = ' class="long"' if len(text) > LONG else ' class="number"' if re.fullmatch(r"[-+−]?[\d.,]+(e[-+]?\d+)?%?", text) else ""
    return f"<td{kind}>{escape(text)}</td>"


def table(path: Path, page: str, links: Links, label: str) -> list[str]:
    "A table that sorts and filters; a long one is drawn by the script from data beside the page"
    columns, rows = read_csv(path)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    start = f'<div class="data-table" role="region" tabindex="0" aria-label="{escape(label, quote=True)}"'
    if not rows:
        return ["*This table has no rows: what it is made from is not available in this profile.*", ""]
    if len(rows) > SMALL:
        place = f"files/tables/{path.relative_to(links.root / 'results').with_suffix('.js').as_posix()}"
        script = links.staged / "tables" / place
        script.parent.mkdir(parents=True, exist_ok=True)
        key = place.removeprefix("files/tables/")
        data = json.dumps(rows, separators=(",", ":"), ensure_ascii=False)
        script.write_text(f"(window.siteTables ||= {{}})[{json.dumps(key)}] = {data};\n", encoding="utf-8")
        links.files[place] = script
        body = f'{start} data-rows="{key}"><table><thead><tr>{head}</tr></thead><tbody></tbody></table></div>'
        body += f'\n<script defer src="{links.relative(page, place)}"></script>'
    else:
        body = f"{start}><table><thead><tr>{head}</tr></thead><tbody>"
        body += "\n".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows) + "</tbody></table></div>"
    return ["```{raw} html", body, "```", ""]


def made_by(path: Path, links: Links) -> str:
    "What made a table: command, commit, seeds, versions; empty if nothing says so"
    note = path.with_name(path.name + ".json")
    if not note.is_file():
        return ""
    said = json.loads(note.read_text(encoding="utf-8"))
    commit = str(said.get("commit", ""))
    parts = [f"`{said['command']}`"] if said.get("command") else []
    parts += [f"commit [{commit[:9]}]({links.url}/commit/{commit})"] if commit else []
    parts += [f"with changes that were not committed: {len(said['uncommitted'])} files"] if said.get("uncommitted") else []
    parts += [f"code `{said['code']}`"] if said.get("code") else []
    parts += [f"seeds {', '.join(map(str, said['seeds']))}"] if said.get("seeds") else []
    parts += [f"arithmetic {said['arithmetic']}"] if said.get("arithmetic") else []
    return "Made by " + ", ".join(parts) + "." if parts else ""


def files_of(path: Path, page: str, links: Links) -> str:
    "Links to a table or figure in every form that there is"
    there = [path.with_suffix(f".{kind}") for kind in ("csv", "tex", "svg", "png")]
    there += [path.with_name(path.stem + ".csv.json")]
    names = {"tex": "LaTeX", "json": "what made it (JSON)"}
    links_to = []
    for one in (one for one in there if one.is_file()):
        place = f"files/{one.relative_to(links.root).as_posix()}"
        links.files[place] = one
        links_to.append(f'<a href="{links.relative(page, place)}" download>{names.get(one.suffix[1:], one.suffix[1:].upper())}</a>')
    return ", ".join(links_to)


def show_table(path: Path, page: str, links: Links, level: str = "##") -> list[str]:
    said = caption(path)
    lines = [f"{level} Table: {path.stem.replace('_', ' ')}", ""] + ([said, ""] if said else [])
    lines += table(path, page, links, said or path.stem.replace("_", " "))
    lines += [f'<p class="files">Download: {files_of(path, page, links)}</p>', ""]
    if made := made_by(path, links):
        lines += [":::{div} made-by", made, ":::", ""]
    return lines


def show_figure(stem: Path, page: str, links: Links, alt: str) -> list[str]:
    "A figure as SVG, which scales; as PNG where the SVG is large"
    vector, pixels = stem.with_suffix(".svg"), stem.with_suffix(".png")
    chosen = vector if vector.is_file() and vector.stat().st_size < 500_000 or not pixels.is_file() else pixels
    place = f"files/{chosen.relative_to(links.root).as_posix()}"
    links.files[place] = chosen
    where = links.relative(page, place)
    alt = escape(alt, quote=True)
    picture = f'<figure class="result"><a href="{where}"><img src="{where}" alt="{alt}" loading="lazy"></a></figure>'
    return [picture, "", f'<p class="files">Download: {files_of(stem.with_suffix(".svg"), page, links)}</p>', ""]


def ledger(path: Path, page: str, links: Links, level: str = "##") -> list[str]:
    "The ledger: one block for each claim, with every column that the table has"
    columns, rows = read_csv(path)
    lines = []
    for row in rows:
        values = dict(zip(columns, row))
        number, says = values.pop("claim", "?"), values.pop("says", "")
        verdict = values.get("verdict", "")
        lines += [f"(claim-{path.parent.parent.name}-{number})=", f"{level} Claim {number}: {plain(says)}", ""]
        if verdict:
            lines += [f'<p><span class="verdict verdict-{verdict.split(" ")[0]}">{escape(verdict)}</span></p>', ""]
        body = []
        for name, value in values.items():
            shown = escape(value) or "not available"
            if name == "notebook" and value in links.pages:
                target = f"results/{path.parent.parent.name}/{Path(value).stem}"
                target = target if target in links.suffix else links.pages[value]
                shown = f'<a href="{links.relative(page, target)}.html">{escape(value)}</a>'
            elif name == "commit" and value:
                shown = f'<a href="{links.url}/commit/{escape(value)}">{escape(value[:9])}</a>'
            elif name in ("command", "profile") or "hash" in name:
                shown = f"<code>{shown}</code>"
            body.append(f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{shown}</td></tr>')
        lines += ["```{raw} html", f'<table class="facts"><tbody>{"".join(body)}</tbody></table>', "```", ""]
    if made := made_by(path, links):
        lines += [":::{div} made-by", made, ":::", ""]
    lines += [f'<p class="files">Download: {files_of(path, page, links)}</p>', ""]
    return lines


def page_of(root: Path, profile: str, name: str, links: Links) -> tuple[str, str, str]:
    "The page of one notebook of the paper: its prose, and where it saves something, what was saved; text, title and description"
    page, folder, path = f"results/{profile}/{name}", root / "results" / profile / name, f"nbs/paper/{name}.ipynb"
    notebook = read(root / path) if (root / path).is_file() else {"cells": []}
    title, subtitle = heading(notebook) if notebook["cells"] else (name.replace("_", " ").capitalize(), "")
    figures = {path.stem: path.with_suffix("") for path in sorted(folder.glob("*.png"))}
    tables = {path.stem: path for path in sorted(folder.glob("*.csv"))}
    lines = [f"# {title}", "", ":::{div} lead", f"{links.rewrite(subtitle, page, path)} (profile {profile})", ":::", ""]
    words = subtitle

    def show(kind: str, stem: str) -> None:
        if kind == "figure":
            lines.extend(show_figure(figures.pop(stem), page, links, shorten(caption(folder / f"{stem}.csv") or f"{title}: {words}", 400)))
        elif name == LEDGER and stem == LEDGER:
            lines.extend(ledger(tables.pop(stem), page, links))
        else:
            lines.extend(show_table(tables.pop(stem), page, links))

    for number, one in enumerate(notebook["cells"]):
        text = source(one)
        if one["cell_type"] == "markdown" and number:
            words = plain(text) or words
            lines += [links.rewrite(text, page, path), ""]
        elif one["cell_type"] == "code":
            for stem in [stem for stem in figures if f'"{stem}"' in text]:
                show("figure", stem)
            for stem in [stem for stem in tables if f'"{stem}"' in text and "save_table" in text]:
                show("table", stem)
    for stem in list(figures):
        show("figure", stem)
    for stem in list(tables):
        show("table", stem)
    if notebook["cells"]:
        lines += ["---", "", f"Made by the notebook [{path}]({links.online(path)}).", ""]
    return "\n".join(lines) + "\n", title, plain(subtitle)


def data_page(root: Path, profile: str, links: Links) -> str:
    "The tidy tables that everything else is made from"
    page, lines = f"results/{profile}/data", ["# Scores and costs", "", ":::{div} lead", f"The tables that pages of profile {profile} are made from", ":::", ""]
    for path in sorted((root / "results" / profile).glob("*.csv")):
        lines += show_table(path, page, links)
    return "\n".join(lines) + "\n"


def overview(root: Path, profile: str, pages: list[tuple[str, str, str]], links: Links) -> str:
    "The first page of a profile: what it is, the ledger in short, and its pages"
    page, folder = f"results/{profile}/index", root / "results" / profile
    text = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else ""
    text = links.rewrite(re.sub(r"\A# .*\n+", "", text), page, f"results/{profile}/README.md")
    lines = [f"# Results of profile {profile}", "", text.strip(), ""]
    if (path := folder / LEDGER / f"{LEDGER}.csv").is_file():
        columns, rows = read_csv(path)
        lines += ["## The paper's claims", "", "Each was tested by a rule that was fixed before the numbers were known.", ""]
        for row in rows:
            values = dict(zip(columns, row))
            number = values.get("claim", "?")
            verdict = f" **{values['verdict']}**" if values.get("verdict") else ""
            lines += [f"- [Claim {number}](#claim-{profile}-{number}): {plain(values.get('says', ''))}{verdict}"]
        lines += [""]
    lines += ["## Pages", ""] + [f"- [{title}]({name}.md): {text}" for name, title, text in pages if name != "index"]
    lines += ["", ":::{toctree}", ":hidden:", "", *[f"{title} <{name}>" for name, title, _ in pages], ":::", ""]
    return "\n".join(lines)
