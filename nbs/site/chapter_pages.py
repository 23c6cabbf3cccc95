"""Notebooks as pages: without directives and hidden cells, long exported cells folded, links that lead to pages"""

import json
import re
from pathlib import Path

from site_links import Links

FOLD = 12  # Lines of an exported cell that are shown at once; a longer one is folded
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)
HIDDEN = re.compile(r"^#\| *(hide|default_exp)\b", re.M)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    return "".join(cell["source"])


def heading(notebook: dict) -> tuple[str, str]:
    "Title and subtitle of a notebook"
    first = source(notebook["cells"][0])
    title, subtitle = re.search(r"^# (.+)$", first, re.M), re.search(r"^> (.+)$", first, re.M)
    return title[1].strip() if title else "", subtitle[1].strip() if subtitle else ""


def module_of(notebook: dict) -> str | None:
    "The module that a notebook is exported to, e.g. network.grn"
    found = re.search(r"^#\| default_exp ([\w.]+)", "\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"), re.M)
    return found and found[1]


def plain(text: str) -> str:
    "Markdown as one line of plain words"
    text = re.sub(r"^#+ .*$|^> ?|^\|.*$|```.*?```|\$\$.*?\$\$", " ", text, flags=re.M | re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\s+", " ", re.sub(r"[*`$]", "", text)).strip()


def shorten(text: str, most: int = 300) -> str:
    "The first sentences of a text that fit"
    if len(text) <= most:
        return text
    cut = text[:most]
    return cut[: cut.rfind(". ") + 1] if ". " in cut[80:] else cut[: cut.rfind(" ")] + " …"


def shown_name(code: str) -> str:
    "What a folded cell defines, for its button"
    names = re.findall(r"^(?:async )?(?:def|class) (\w+)", code, re.M) or re.findall(r"^([A-Za-z_]\w*)(?:: [^=\n]+)? = ", code, re.M)
    public = [name for name in names if not name.startswith("_")] or names
    return ", ".join(public[:3]) + (" …" if len(public) > 3 else "") if public else "imports"


def code_cell(cell: dict, words: str, links: Links, page: str, path: str) -> dict | None:
    "A code cell as it is shown; None if it is not"
    code = source(cell)
    if HIDDEN.search(code):
        return None
    exported, silent = re.search(r"^#\| *exporti?\b", code, re.M), re.search(r"^#\| *echo: *false", code, re.M)
    code = DIRECTIVE.sub("", code).strip("\n")
    outputs = [show_output(output, links, page, path) for output in cell.get("outputs", [])]
    if not code and not outputs:
        return None
    lines, tags, extra = code.count("\n") + 1, [], {}
    imports = exported and not re.search(r"^(?!from |import |\s|\)|#|$)", code, re.M)
    if silent:
        tags.append("remove-input")
    elif exported and (lines > FOLD or (imports and lines > 3)):
        tags.append("hide-input")
        extra["code_prompt_show"] = f"Show the code: {'imports' if imports else shown_name(code)} ({lines} lines)"
        extra["code_prompt_hide"] = "Hide the code"
    extra["image"] = {"alt": shorten(words) or "Figure of this chapter"}
    return {"cell_type": "code", "id": cell["id"], "metadata": {"tags": tags, "mystnb": extra}, "source": code, "outputs": outputs, "execution_count": None}


def show_output(output: dict, links: Links, page: str, path: str) -> dict:
    "An output with links that lead to pages, and headings that do not join those of the page"
    output = json.loads(json.dumps(output))
    if "text/markdown" in output.get("data", {}):
        text = links.rewrite("".join(output["data"]["text/markdown"]), page, path, html=True)
        output["data"]["text/markdown"] = re.sub(r"^#+ (.+)$", r"**\1**", re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S), flags=re.M)
    if "text/html" in output.get("data", {}):
        output["data"]["text/html"] = scope(re.sub(r"<caption>", '<caption class="caption">', "".join(output["data"]["text/html"])))
    return output


def scope(html: str) -> str:
    "HTML of an output without style sheets of its own, which would reach the whole page"
    return re.sub(r"<style[^>]*>.*?</style>", "", html, flags=re.S)


def stage(root: Path, path: str, page: str, title: str, links: Links, see: list[str]) -> tuple[dict, str]:
    "A notebook as a page, and the page's description"
    notebook = read(root / path)
    own, subtitle = heading(notebook)
    cells, words = [], subtitle
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "markdown":
            text = links.rewrite(source(cell), page, path)
            if number == 0:
                rest = re.sub(r"^# .+\n+(> .+\n*)?", "", text)
                text = f"# {title or own}\n\n:::{{div}} lead\n{links.rewrite(subtitle, page, path)}\n:::\n\n{rest}"
            words = plain(source(cell)) or words
            cells.append({"cell_type": "markdown", "id": cell["id"], "metadata": {}, "source": text})
        elif cell["cell_type"] == "code" and (shown := code_cell(cell, words, links, page, path)):
            cells.append(shown)
    if see:
        text = "\n".join(f"- {line}" for line in see)
        cells.append({"cell_type": "markdown", "id": "see-also", "metadata": {}, "source": f":::{{div}} see-also\n\n{text}\n:::"})
    kernel = {
        "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "python"},
    }
    return {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, plain(subtitle)
