"""What the README shows is what the commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fxopt
from fxopt.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(first: str) -> str:
    """The rest of the README's block after the line ``first``."""
    return README.partition(f"{first}\n")[2].partition("```")[0]


def test_explain_prints_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = "explain examples/decorate_your_module.py:example"
    shown = block(f"$ python -m fxopt {command}")
    done = CliRunner().invoke(app, command.split())
    assert shown and done.stdout.replace(f"{ROOT}/", "").startswith(shown)


def test_errors_read_as_shown() -> None:
    with pytest.raises(fxopt.errors.OptionError) as option:
        fxopt.optimize(lambda x: x, lower="cuda")
    with pytest.raises(fxopt.errors.UnknownPassError) as unknown:
        fxopt.optimize(lambda x: x, passes=["fuse-atention"])
    assert f"OptionError: {option.value}\n" in README
    shown = re.search(r"UnknownPassError: (.*) …\n", README)
    assert shown is not None and str(unknown.value).startswith(shown[1])
