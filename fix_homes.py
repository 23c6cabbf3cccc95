"""Every name is imported from the module that defines it; run once, after split_rooms.py."""

import ast
import json
import re
import subprocess
from pathlib import Path

HOME = {}
for path in Path("mednext_v2").rglob("*.py"):
    module = "mednext_v2." + ".".join(path.with_suffix("").parts[1:])
    for node in ast.parse(path.read_text()).body:
        names = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        elif isinstance(node, ast.AnnAssign):
            names = [node.target.id]
        for name in names:
            HOME.setdefault(name, set()).add(module)
MODULES = {"mednext_v2." + ".".join(p.with_suffix("").parts[1:]) for p in Path("mednext_v2").rglob("*.py")}
IMPORT = re.compile(r"^([ \t]*)from (mednext_v2(?:\.\w+)+) import (?:\(([^()]*)\)|([^\n(#]+?))([ \t]*#[^\n]*)?$", re.M)


def fix(text: str) -> str:
    def replace(match):
        indent, module, listed, comment = match[1], match[2], match[3] or match[4], match[5] or ""
        if module not in MODULES:
            return match[0]
        parts = [part.strip() for part in re.sub(r"#[^\n]*", "", listed).split(",") if part.strip()]
        homes = {}
        for part in parts:
            name = part.split(" as ")[0]
            found = HOME.get(name, set())
            home = module if module in found or len(found) != 1 else next(iter(found))
            homes.setdefault(home, []).append(part)
        if set(homes) == {module}:
            return match[0]
        lines = []
        for home, names in homes.items():
            line = f"{indent}from {home} import {', '.join(names)}"
            if len(line) > 119:
                line = f"{indent}from {home} import (\n{indent}    " + f",\n{indent}    ".join(names) + f",\n{indent})"
            lines.append(line)
        return "\n".join(lines) + comment

    return IMPORT.sub(replace, text)


for name in subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True).stdout.split():
    path = Path(name)
    if path.suffix == ".ipynb" and path.parts[0] == "nbs":
        book = json.loads(path.read_text())
        old = json.dumps(book)
        for cell in book["cells"]:
            source = "".join(cell["source"])
            new = fix(source) if cell["cell_type"] == "code" else source
            if new != source:
                cell["source"] = new
        if json.dumps(book) != old:
            path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
    elif path.suffix == ".py" and path.parts[0] in ("tests", "benchmarks"):
        text = path.read_text()
        if (new := fix(text)) != text:
            path.write_text(new)
