"""Templates of generated source: text with ``$holes``, and how they are filled."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from string import Template


def fill(template: str, holes: Mapping[str, str]) -> str:
    """Fill the holes of ``template``.

    A hole on a line of its own takes any number of lines, indented as it stands; where it stays empty the line goes.
    """
    lines = []
    for line in template.splitlines():
        name = line.strip().removeprefix("$")
        alone = line.strip().startswith("$") and name in holes
        if alone and not holes[name]:
            continue
        if alone:
            lines.append(textwrap.indent(holes[name], line[: len(line) - len(line.lstrip())]))
        else:
            lines.append(Template(line).substitute(holes))
    return "\n".join(lines) + "\n"


def listing(names: Iterable[str], annotate: bool = False) -> str:
    """Arguments or parameters, one a line; ``annotate`` marks those in capitals as compile-time constants."""
    return "\n".join(f"{n}: tl.constexpr," if annotate and n.isupper() else f"{n}," for n in names)
