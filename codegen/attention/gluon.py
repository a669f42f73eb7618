"""Text of Triton as text of Gluon, whose language module repeats most of its functions."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fxopt.codegen.printing import HELPERS
from fxopt.codegen.template import listing


def as_gluon(text: str) -> str:
    """``text`` for inputs of half precision, for which the hardware's tanh is accurate enough."""
    text = text.replace("FAST_TANH", "True")
    text = re.sub(r"\btl\.(?!PropagateNan)", "gl.", text)
    return text.replace("@triton.jit", "@gluon.jit").replace("gl.sigmoid(", "sigmoid(")


def parameters(names: Iterable[str]) -> str:
    """Parameters, one a line; those in capitals are compile-time constants."""
    return listing(names, annotate=True).replace("tl.constexpr", "gl.constexpr")


def named_apart(text: str) -> str:
    """Text of Gluon whose device functions are named apart from those of Triton in the same module."""
    return re.sub(rf"(?<![.\w])({'|'.join(HELPERS)})\(", r"gluon_\1(", text)
