"""Where each file of the repository is on the site, and links to it"""

import os
import re
from pathlib import Path, PurePosixPath

# A Markdown link or picture: its bang, text and target; and a definition of a link
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1\s*$|`[^`\n]+`", re.M | re.S)


class Links:
    "The pages of the site by the path of their source in the repository, and how other files are linked to"

    def __init__(self, root: Path, staged: Path, url: str, branch: str):
        self.root, self.staged, self.url, self.branch = root, staged, url, branch
        self.pages: dict[str, str] = {}  # Path in the repository, e.g. nbs/network/10_grn.ipynb, to a page without its suffix
        self.assets: dict[str, Path] = {}  # Pictures of Markdown by their place among the sources
        self.files: dict[str, Path] = {}  # Files by their place on the site
        self.suffix: dict[str, str] = {}  # Of the staged file of a page
        self.broken: list[str] = []

    def online(self, path: str) -> str:
        "The address of a file or folder in the repository's web view"
        return f"{self.url}/{'tree' if (self.root / path).is_dir() else 'blob'}/{self.branch}/{path}"

    def relative(self, page: str, other: str) -> str:
        "The link from a page to another, or to an asset"
        return PurePosixPath(os.path.relpath(other, os.path.dirname(page) or ".")).as_posix()

    def target(self, page: str, source: str, target: str, picture: bool = False, html: bool = False) -> str:
        "A target as it stands in a source file, as it is to stand on a page"
        for address in (self.url, f"{self.url}/"):  # Links to the repository's own web view: the site has most of it
            if target.startswith(f"{address}/blob/{self.branch}/"):
                target = "/" + target.split(f"/blob/{self.branch}/", 1)[1]
        if re.match(r"[a-z][a-z0-9+.-]*:", target) or target.startswith("#"):
            return target
        path, _, anchor = target.partition("#")
        at = path.lstrip("/") if path.startswith("/") else os.path.normpath(os.path.join(os.path.dirname(source), path))
        at = at.rstrip("/")
        if not (self.root / at).exists():
            self.broken.append(f"{source}: {target}")
            return target
        if at in self.pages:
            other = self.pages[at]
            return self.relative(page, other + (".html" if html else self.suffix[other])) + (f"#{anchor}" if anchor else "")
        if picture:
            place = f"files/{at}"
            self.assets[place] = self.root / at
            return self.relative(page, place)
        return self.online(at) + (f"#{anchor}" if anchor else "")

    def rewrite(self, text: str, page: str, source: str, html: bool = False) -> str:
        "Markdown with all its links as they are to stand on a page (`html`: where Sphinx does not look for them); code is left alone"
        kept: list[str] = []

        def keep(match: re.Match) -> str:
            kept.append(match[0])
            return f"\x00{len(kept) - 1}\x00"

        def change(match: re.Match) -> str:
            return f"{match[1]}[{match[2]}]({self.target(page, source, match[3], bool(match[1]), html)})"

        hidden = FENCE.sub(keep, text)
        done = LINK.sub(change, hidden)
        return re.sub(r"\x00(\d+)\x00", lambda match: kept[int(match[1])], done)
