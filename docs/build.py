"""Write ``docs/passes/<name>.md`` and ``docs/operators/<name>.md`` from the docstrings of passes and references.

Reads source text only (nothing is imported), so the pages can be built, and checked, without PyTorch:

    python docs/build.py            # write the pages, remove those of passes and operators that are gone
    python docs/build.py --check    # change nothing; exit 1 and name the pages that are out of date
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {"Args:": "Arguments", "Returns:": "Returns", "Raises:": "Errors"}
TIERS = {
    "exact": "an identity in real arithmetic; only rounding differs",
    "approximate": "no training needed; changes results by a measured amount",
    "trainable": "prepare, train, convert",
}


@dataclass(frozen=True)
class PassPage:
    """A pass as its file declares it."""

    name: str
    tier: str
    requires: tuple[str, ...]
    class_name: str
    path: Path
    summary: str
    text: str
    options: tuple[tuple[str, str, str], ...]
    spellings: tuple[tuple[str, tuple[str, ...]], ...]

    def render(self) -> str:
        """The page in Markdown."""
        parts = [f"# {self.name}", markdown(self.summary), markdown(self.text)]
        parts.append(f"**Tier:** {self.tier} ({TIERS.get(self.tier, 'of its own')})")
        if self.requires:
            parts.append("**Runs after:** " + ", ".join(f"[{name}]({name}.md)" for name in self.requires))
        if self.options:
            parts.append("## Options\n\n| option | type | default |\n| --- | --- | --- |")
            parts[-1] += "".join(
                f"\n| `{name}` | {_cell(kind)} | {_cell(value)} |" for name, kind, value in self.options
            )
        if self.spellings:
            parts.append("## Accepted spellings\n\n| rule | spellings |\n| --- | --- |")
            parts[-1] += "".join(f"\n| {rule} | {'; '.join(names)} |" for rule, names in self.spellings)
        return _page(parts, f"`fxopt.passes.{self.path.parent.name}.{self.path.stem}.{self.class_name}`", self.path)


@dataclass(frozen=True)
class OperatorPage:
    """A canonical operator as its schema and its reference declare it."""

    name: str
    schema: str
    path: Path
    summary: str
    text: str

    def render(self) -> str:
        """The page in Markdown."""
        schema = f"```\nfxopt::{self.name}{self.schema}\n```"
        parts = [f"# {self.name}", schema, markdown(self.text), "## Reference", markdown(self.summary)]
        module = ".".join(self.path.relative_to(ROOT).with_suffix("").parts)
        return _page(parts, f"`fxopt.{module}.{self.name}`", self.path)


def passes() -> list[PassPage]:
    """Every pass in ``passes/<family>/<file>.py``, by name."""
    found = (page for path in sorted((ROOT / "passes").glob("*/*.py")) for page in passes_in(path))
    return sorted(found, key=lambda page: page.name)


def passes_in(path: Path) -> Iterator[PassPage]:
    """The passes that the file declares: its classes with a ``name`` and a ``tier``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        constants = _class_constants(node)
        if "name" not in constants or "tier" not in constants:
            continue
        yield PassPage(
            name=ast.literal_eval(constants["name"]),
            tier=ast.literal_eval(constants["tier"]),
            requires=ast.literal_eval(constants["requires"]) if "requires" in constants else (),
            class_name=node.name,
            path=path,
            summary=ast.get_docstring(tree) or "",
            text=ast.get_docstring(node) or "",
            options=tuple(_options(node)),
            spellings=tuple(_spellings(tree)),
        )


def operators() -> list[OperatorPage]:
    """Every operator whose meaning some ``reference.py`` below ``codegen`` defines, by name."""
    schemas = _schemas()
    found = (
        page for path in sorted((ROOT / "codegen").glob("*/**/reference.py")) for page in _operators_in(path, schemas)
    )
    return sorted(found, key=lambda page: page.name)


def _operators_in(path: Path, schemas: dict[str, str]) -> Iterator[OperatorPage]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "define_meaning"):
            continue
        name, function = ast.literal_eval(node.args[0]), functions[ast.unparse(node.args[1])]
        yield OperatorPage(name, schemas[name], path, ast.get_docstring(tree) or "", ast.get_docstring(function) or "")


def _schemas() -> dict[str, str]:
    tree = ast.parse((ROOT / "fxopt" / "ir" / "operators.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "SCHEMAS" and node.value:
            schemas: dict[str, str] = ast.literal_eval(node.value)
            return schemas
    raise LookupError("fxopt/ir/operators.py has no table SCHEMAS")


def _class_constants(node: ast.ClassDef) -> dict[str, ast.expr]:
    return {
        ast.unparse(item.target): item.value
        for item in node.body
        if isinstance(item, ast.AnnAssign) and item.value and "ClassVar" in ast.unparse(item.annotation)
    }


def _options(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and "ClassVar" not in ast.unparse(item.annotation):
            default = f"`{ast.unparse(item.value)}`" if item.value else "required"
            yield ast.unparse(item.target), f"`{ast.unparse(item.annotation)}`", default


def _spellings(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Name and spellings of every rule written out as ``Rule(name=…, patterns={…})``."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "Rule"):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name, patterns = given.get("name"), given.get("patterns")
        if isinstance(name, ast.Constant) and isinstance(patterns, ast.Dict):
            yield str(name.value), tuple(str(k.value) for k in patterns.keys if isinstance(k, ast.Constant))


def markdown(docstring: str) -> str:
    """A docstring (Google sections, double backticks) as Markdown."""
    lines = inspect.cleandoc(docstring).replace("``", "`").splitlines()
    out: list[str] = []
    while lines:
        line = lines.pop(0)
        if line not in SECTIONS:
            out.append(line)
            continue
        body = _take_indented(lines)
        out += [f"**{SECTIONS[line]}**", "", *(_items(body) if line != "Returns:" else body), ""]
    return "\n".join(out).strip()


def _take_indented(lines: list[str]) -> list[str]:
    body = []
    while lines and (not lines[0].strip() or lines[0].startswith(" ")):
        body.append(lines.pop(0))
    return inspect.cleandoc("\n".join(["", *body])).splitlines()


def _items(body: list[str]) -> list[str]:
    """``name: text`` entries, whose further lines are indented, as a list."""
    return [re.sub(r"^([^\s:][^:]*):", r"- `\1`:", line) if line[:1].strip() else line for line in body]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _page(parts: list[str], qualified_name: str, path: Path) -> str:
    origin = path.relative_to(ROOT)
    footer = f"---\n{qualified_name}, generated from [{origin}](../../{origin}) by `make docs`."
    return "\n\n".join([part for part in parts if part] + [footer]) + "\n"


def pages() -> dict[Path, str]:
    """Every generated page: where it belongs, and its text."""
    docs = ROOT / "docs"
    written: dict[Path, str] = {docs / "passes" / f"{page.name}.md": page.render() for page in passes()}
    return written | {docs / "operators" / f"{page.name}.md": page.render() for page in operators()}


def outdated(wanted: dict[Path, str]) -> list[Path]:
    """The pages that are missing, differ, or belong to nothing any more."""
    there = {path for folder in ("passes", "operators") for path in (ROOT / "docs" / folder).glob("*.md")}
    wrong = {path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text}
    return sorted(wrong | (there - wanted.keys()))


def main(arguments: list[str]) -> int:
    """Write the pages, or with ``--check`` only say which are out of date."""
    wanted = pages()
    stale = outdated(wanted)
    if arguments == ["--check"]:
        print("\n".join(f"out of date: {path.relative_to(ROOT)}" for path in stale) or "every page is up to date")
        return int(bool(stale))
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8") if path in wanted else path.unlink()
    print(f"{len(wanted)} pages, {len(stale)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
