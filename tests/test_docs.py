"""The generated pages are those of the passes and operators that exist; a pass is one file, one name, one page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from docs import build

ROOT = Path(__file__).resolve().parent.parent
PASSES = build.passes()
OPERATORS = build.operators()
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))


def names(pages: list[build.PassPage]) -> list[str]:
    return [page.name for page in pages]


def test_there_are_passes_and_operators_to_describe() -> None:
    assert "inactive-dropout" in names(PASSES)
    assert "attention" in [page.name for page in OPERATORS]


def test_pages_are_up_to_date() -> None:
    assert [str(path) for path in build.outdated(build.pages())] == [], "run `make docs`"


def test_pass_names_are_unique() -> None:
    assert len(set(names(PASSES))) == len(PASSES)


@pytest.mark.parametrize("page", PASSES, ids=names(PASSES))
def test_a_pass_is_one_file_of_its_name(page: build.PassPage) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", page.name)
    assert page.path.stem == page.name.replace("-", "_")
    assert page.class_name == "".join(word.capitalize() for word in page.name.split("-"))
    assert names(list(build.passes_in(page.path))) == [page.name]


@pytest.mark.parametrize("page", PASSES, ids=names(PASSES))
def test_a_pass_says_what_it_does_and_needs_what_exists(page: build.PassPage) -> None:
    assert page.summary
    assert page.text
    assert page.tier in build.TIERS
    assert set(page.requires) <= set(names(PASSES))


@pytest.mark.parametrize("page", PASSES, ids=names(PASSES))
def test_a_pass_is_tested_by_name(page: build.PassPage) -> None:
    assert re.search(rf"\b({page.class_name}|{page.path.stem})\b|\"{page.name}\"", TESTS)


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("*/*.py")), ids=lambda path: path.stem)
def test_a_registered_class_is_described(path: Path) -> None:
    """A pass that the page builder cannot see would silently have no page."""
    classes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    registered = [c.name for c in classes if any("register_pass" in ast.unparse(d) for d in c.decorator_list)]
    assert [page.class_name for page in build.passes_in(path)] == registered


@pytest.mark.parametrize("page", OPERATORS, ids=[page.name for page in OPERATORS])
def test_an_operator_states_its_mathematics(page: build.OperatorPage) -> None:
    assert page.schema.startswith("(Tensor ")
    assert len(page.text.splitlines()) > 1


def test_docstrings_become_markdown() -> None:
    text = """``softmax(x) @ v``, said once.

    Args:
        x: ``[B, S]``,
            contiguous.
        v: the values.

    Returns:
        ``[B, D]``.

    Raises:
        ValueError: ``x`` is empty.
    """
    assert build.markdown(text) == (
        "`softmax(x) @ v`, said once.\n\n**Arguments**\n\n- `x`: `[B, S]`,\n    contiguous.\n- `v`: the values.\n\n"
        "**Returns**\n\n`[B, D]`.\n\n**Errors**\n\n- `ValueError`: `x` is empty."
    )


def test_options_defaults_and_spellings_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    file = tmp_path / "passes" / "token" / "merge_tokens.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        '"""Fewer tokens."""\nRULES = (Rule(name="merge", patterns={"by key": 1, "by value": 2}),)\n'
        'class MergeTokens:\n    """Merge the ``r`` most alike."""\n    name: ClassVar[str] = "merge-tokens"\n'
        '    tier: ClassVar[str] = "approximate"\n    requires: ClassVar[tuple[str, ...]] = ("no-ops",)\n'
        "    r: int\n    measure: str | None = None\n"
    )
    (page,) = build.passes_in(file)
    text = page.render()
    assert "| `r` | `int` | required |\n| `measure` | `str \\| None` | `None` |" in text
    assert "| merge | by key; by value |" in text
    assert "**Runs after:** [no-ops](no-ops.md)" in text
    assert "**Tier:** approximate" in text


def test_stale_and_missing_pages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ROOT", tmp_path)
    folder = tmp_path / "docs" / "passes"
    folder.mkdir(parents=True)
    for name, text in (("kept", "same"), ("changed", "old"), ("gone", "left over")):
        (folder / f"{name}.md").write_text(text)
    wanted = {folder / "kept.md": "same", folder / "changed.md": "new", folder / "added.md": "new"}
    assert [path.stem for path in build.outdated(wanted)] == ["added", "changed", "gone"]
