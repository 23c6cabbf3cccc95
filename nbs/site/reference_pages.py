"""The reference: what modules, commands, tables, cards and networks have, written from the code that has it"""

import argparse
import ast
import io
import re
import tokenize
from pathlib import Path


# ---- API, from the sources and their docments
def comments(text: str) -> dict[int, str]:
    "The trailing comment of each line"
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# %%", "#|")) and token.line[: token.start[1]].strip():
            found[token.start[0]] = token.string.lstrip("# ").strip()
    return found


def exported(tree: ast.Module) -> list[str]:
    "The names of `__all__`"
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def parameters(node: ast.FunctionDef, said: dict[int, str], method: bool = False) -> list[tuple[str, str, str, str]]:
    "Name, type, default and meaning of each parameter of a function"
    args, rows = node.args, []
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    every = list(zip(plain, defaults)) + ([(args.vararg, None)] if args.vararg else []) + list(zip(args.kwonlyargs, args.kw_defaults))
    every += [(args.kwarg, None)] if args.kwarg else []
    for arg, default in every:
        if method and arg.arg in ("self", "cls") and not rows:
            continue
        star = "*" if arg is args.vararg else "**" if arg is args.kwarg else ""
        last = (default or arg).end_lineno or arg.lineno
        alone = last != node.lineno or node.lineno != node.body[0].lineno  # Comments of a signature on one line belong to what it returns
        text = said.get(last, "") if alone and arg.lineno != node.lineno else ""
        rows.append((star + arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", ast.unparse(default) if default is not None else "", text))
    return rows


def returned(node: ast.FunctionDef, text: str, said: dict[int, str]) -> tuple[str, str]:
    "Type and meaning of what a function returns"
    end = node.body[0].lineno - 1
    lines = range(node.returns.end_lineno if node.returns else node.lineno, max(end, node.lineno) + 1)
    meaning = next((said[line] for line in lines if line in said and re.search(r"\)\s*(->.*)?:\s*#", text.splitlines()[line - 1])), "")
    return ast.unparse(node.returns) if node.returns else "", meaning


def fields(node: ast.ClassDef, said: dict[int, str]) -> list[tuple[str, str, str, str]]:
    "The annotated fields of a class"
    rows = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith("_"):
            default = ast.unparse(item.value) if item.value else ""
            found = re.fullmatch(r"field\(default_factory=(\w+)\)", default)
            default = {"dict": "{}", "list": "[]"}.get(found[1], f"{found[1]}()") if found else default
            rows.append((item.target.id, ast.unparse(item.annotation), default, said.get(item.end_lineno or 0, "")))
    return rows


def prose(text: str | None) -> str:
    "A docstring as Markdown: names between backticks stay code, all else stands for itself"
    return "\n\n".join(escape(re.sub(r"\s+", " ", part)) for part in re.split(r"\n\s*\n", (text or "").strip()))


def unescape(text: str) -> str:
    "What `escape` was given"
    return re.sub(r"\\([\\*_<>\[\]{}|#~$])", r"\1", text)


def code(text: str) -> str:
    "Text as inline code, whatever it holds"
    ticks = "``" if "`" in text else "`"
    return f"{ticks} {text} {ticks}" if ticks == "``" else f"`{text}`"


def definition_list(rows: list[tuple[str, str, str, str]]) -> str:
    "Parameters, each with type, default and meaning"
    lines = []
    for name, kind, default, meaning in rows:
        about = ", ".join([*([code(kind)] if kind else []), *([f"default {code(default)}"] if default else [])])
        lines += [code(name), f": {about}{': ' if about and meaning else ''}{prose(meaning)}" if about or meaning else ": &nbsp;", ""]
    return "\n".join(lines)


def signature(rows: list[tuple[str, str, str, str]]) -> str:
    "A signature without types, which stand below it"
    parts = []
    for name, _, default, _ in rows:
        default = default if len(default) < 40 else "…"
        parts.append(name + (f"={default}" if default else ""))
    return f"({', '.join(parts)})".replace("\n", " ")


def describe_function(node: ast.FunctionDef, text: str, said: dict[int, str], method: bool = False) -> tuple[str, list[str]]:
    rows = parameters(node, said, method)
    kind, meaning = returned(node, text, said)
    body = [prose(ast.get_docstring(node)), ""]
    if rows:
        body += [definition_list(rows)]
    if kind and kind != "None" or meaning:
        body += [f"**Returns** {code(kind) if kind else ''}" + (f": {prose(meaning)}" if meaning else ""), ""]
    return signature(rows), body


def describe_class(node: ast.ClassDef, text: str, said: dict[int, str]) -> tuple[str, list[str]]:
    init = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"), None)
    rows = parameters(init, said, True) if init else fields(node, said)
    body = [prose(ast.get_docstring(node)), ""]
    if rows:
        body += [definition_list(rows)]
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
            marks = {ast.unparse(mark) for mark in item.decorator_list}
            if any(mark.endswith((".setter", ".deleter")) for mark in marks):
                continue
            if "property" in marks or "cached_property" in marks:
                body += [f"::::{{py:property}} {item.name}", "", prose(ast.get_docstring(item)), "::::", ""]
            else:
                call, inner = describe_function(item, text, said, "staticmethod" not in marks)
                flag = [f":{mark}:" for mark in ("classmethod", "staticmethod") if mark in marks]
                body += [f"::::{{py:method}} {item.name}{call}", *flag, "", *inner, "::::", ""]
    return signature(rows) if rows else "", body


class Member:
    "A public name of a module: how it is called, its line, and its entry on the page"

    def __init__(self, module: str, name: str, call: str, line: str, entry: list[str]):
        self.module, self.name, self.call, self.line, self.entry = module, name, call, line, entry


def members(path: Path, module: str) -> list[Member]:
    "The public names of a module, in their order"
    text = path.read_text(encoding="utf-8")
    tree, said, found = ast.parse(text), comments(text), []
    nodes = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    values = {ast.unparse(node.targets[0]): node for node in tree.body if isinstance(node, ast.Assign)}
    values |= {ast.unparse(node.target): node for node in tree.body if isinstance(node, ast.AnnAssign)}
    for name in exported(tree):
        node = nodes.get(name)
        if node is None:
            if value := values.get(name):
                meaning = said.get(value.lineno, "") or said.get(value.end_lineno or 0, "")
                found.append(Member(module, name, "", meaning, [f":::::{{py:data}} {name}", f":module: {module}", "", prose(meaning), ":::::", ""]))
            continue
        call, body = describe_class(node, text, said) if isinstance(node, ast.ClassDef) else describe_function(node, text, said)
        kind = "class" if isinstance(node, ast.ClassDef) else "function"
        line = re.split(r"(?<=[a-z0-9`)])[.;] ", prose(ast.get_docstring(node)).split("\n")[0])[0]
        found.append(Member(module, name, call, line, [f":::::{{py:{kind}}} {name}{call}", f":module: {module}", "", *body, ":::::", ""]))
    return found


# ---- The command line, from its parser
def commands(parser: argparse.ArgumentParser, words: str = "") -> list[tuple[str, argparse.ArgumentParser, str]]:
    "Each command with its parser and its line in the help"
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {item.dest: item.help or "" for item in action._choices_actions}
            for name, sub in action.choices.items():
                inner = commands(sub, f"{words}{name} ")
                found += inner or [(f"{words}{name}", sub, helps.get(name, ""))]
    return found


def option_text(action: argparse.Action) -> tuple[str, str]:
    "How an option is written, and what it does"
    value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper())
    value = " ".join(value) if isinstance(value, tuple) else value
    value = "" if action.nargs == 0 else f" {value}" + (" …" if action.nargs in ("+", "*") or isinstance(action.nargs, int) else "")
    written = ", ".join(action.option_strings) + value if action.option_strings else (action.metavar or action.dest)
    written = written if isinstance(written, str) else " ".join(written)
    try:
        meaning = (action.help or "") % {**vars(action), "prog": "mednextv2"}
    except (KeyError, ValueError, TypeError):
        meaning = action.help or ""
    return written, meaning + (" (required)" if action.required and action.option_strings else "")


def escape(text: str) -> str:
    "Text of a help, in Markdown: every mark stands for itself but those of code"
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_<>\[\]{}|#~$])", r"\\\1", part) for part in parts)


def command_page(name: str, parser: argparse.ArgumentParser, line: str) -> str:
    parser.prog = f"mednextv2 {name}"
    usage = re.sub(r"\s+", " ", parser.format_usage()).strip()
    lines = [f"# mednextv2 {name}", "", ":::{div} lead", escape(line), ":::", "", ":::{div} usage", "```sh", usage.removeprefix("usage: "), "```", ":::", ""]
    if parser.epilog:
        label, _, rest = parser.epilog.partition(":")
        lines += [f"**{label.capitalize()}**" if rest else escape(parser.epilog), "", *(["```sh", rest.strip(), "```", ""] if rest else [])]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)]
        if actions:
            lines += [f"## {(group.title or 'options').capitalize()}", ""]
            lines += [escape(group.description), ""] if group.description else []
            for written, meaning in map(option_text, actions):
                lines += [code(written), f": {escape(meaning) or '&nbsp;'}", ""]
    return "\n".join(lines) + "\n"
