"""What the texts of forward and backward share: chunks of a row, the header, and the script at the end."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Final

import torch

from fxopt.codegen.norm.residual_norm import template
from fxopt.codegen.norm.residual_norm.config import Config
from fxopt.codegen.norm.residual_norm.problem import Problem
from fxopt.codegen.template import fill

_MATHS: Final = {
    "layer_norm": "n = (s - mean(s)) / sqrt(var(s) + {eps})",
    "rms_norm": "n = s / sqrt(mean(s²) + {eps})",
}
#: Bytes that the script's timings move are those of this many elements, or as near as whole rows come.
_TIMED_ELEMENTS: Final = 2**25


def name_of(dtype: torch.dtype | None) -> str:
    """``bfloat16`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def rounded(text: str, dtype: torch.dtype) -> str:
    """The expression ``text``, of float32, in ``dtype``."""
    inner = text if re.fullmatch(r"[\w{}]+", text) else f"({text})"
    return text if dtype == torch.float32 else f"{inner}.to(tl.{name_of(dtype)})"


def widened(text: str, dtype: torch.dtype | None) -> str:
    """The expression ``text`` of ``dtype`` in float32."""
    return text if dtype == torch.float32 else f"{text}.to(tl.float32)"


@dataclass(frozen=True)
class RowsText:
    """The texts of one problem and configuration."""

    problem: Problem
    config: Config

    @property
    def centred(self) -> bool:
        """Whether the mean is subtracted."""
        return self.problem.kind == "layer_norm"

    @cached_property
    def chunk(self) -> int:
        """Elements of a row that are handled by one statement."""
        problem = self.problem
        widest = max(dtype.itemsize for dtype in (problem.x, problem.residual, problem.total, problem.out))
        return self.config.chunk(problem.width, widest)

    @property
    def chunks(self) -> range:
        """The numbers of the chunks of a row."""
        return range(-(-self.problem.width // self.chunk))

    def inside(self, n: int) -> str:
        """The mask of chunk ``n`` of the columns; empty where all of them exist."""
        return f"c{n} < {self.problem.width}" if (n + 1) * self.chunk > self.problem.width else ""

    def mask(self, n: int) -> str:
        """The mask of chunk ``n`` of the rows."""
        inside = self.inside(n)
        return f"there & ({inside})" if inside else "there"

    def each(self, statement: str) -> str:
        """``statement`` for every chunk, with its number for ``{n}``, its mask, and that of its columns."""
        return "\n".join(statement.format(n=n, mask=self.mask(n), of_columns=self._of_columns(n)) for n in self.chunks)

    def row_sum(self, name: str, term: str) -> str:
        """Statements that make ``name`` the sum of ``term`` over each row: over the chunks first, then over threads."""
        terms = [f"{name}_terms {'+=' if n else '='} {term.format(n=n)}" for n in self.chunks]
        return "\n".join((*terms, f"{name} = tl.sum({name}_terms, 1, keep_dims=True)"))

    def _of_columns(self, n: int) -> str:
        inside = self.inside(n)
        return f", mask={inside}, other=0.0" if inside else ""

    @property
    def columns(self) -> str:
        """The places of the chunks in a row."""
        starts = ((n, f"{n * self.chunk} + " if n else "") for n in self.chunks)
        return "\n".join(f"c{n} = {start}tl.arange(0, {self.chunk})[None, :]" for n, start in starts)

    def load_weights(self, *names: str) -> str:
        """Chunks of those of ``weight`` and ``bias`` that there are, in float32.

        Every row loads its own, so that they lie in registers as the rows do; of one row alone Triton would spread them
        over all warps, and move the rows there and back through shared memory.
        """
        found = [name for name in names if getattr(self.problem, name) is not None]
        many, shape = self.config.rows > 1, f"[{self.config.rows}, {self.chunk}]"
        texts = []
        for name in found:
            place = f"tl.broadcast_to({name}_ptr + c{{n}}, {shape})" if many else f"{name}_ptr + c{{n}}"
            load = f"tl.load({place}{{of_columns}})"
            texts.append(self.each(f"{name}{{n}} = {widened(load, getattr(self.problem, name))}"))
        return "\n".join(texts)

    @property
    def holes(self) -> dict[str, str]:
        """Those of every template."""
        problem = self.problem
        dtypes = {"x": problem.x, "residual": problem.residual, "weight": problem.weight, "bias": problem.bias}
        listed = ", ".join(f"{name} {name_of(dtype)}" for name, dtype in dtypes.items() if dtype is not None)
        mean = "s.mean(-1, keepdim=True)" if self.centred else "torch.zeros_like(s[..., :1])"
        return {
            "version": version("fxopt"),
            "width": str(problem.width),
            "block": str(self.config.rows),
            "programs": "rows" if self.config.rows == 1 else f"(rows + {self.config.rows - 1}) // {self.config.rows}",
            "warps": str(self.config.warps),
            "chunk": str(self.chunk),
            "eps": repr(float(problem.eps)),
            "dtypes": listed,
            "config": str(self.config),
            "columns": self.columns,
            "reference_mean": mean,
            "reference_weight": "" if problem.weight is None else " * weight.double()",
            "reference_bias": "" if problem.bias is None else " + bias.double()",
            "main_weight": self._drawn(problem.weight),
            "main_bias": self._drawn(problem.bias),
            "timed": str(max(_TIMED_ELEMENTS // problem.width, 1)),
            "x": name_of(problem.x),
            "residual": name_of(problem.residual),
            "total": name_of(problem.total),
            "out": name_of(problem.out),
        }

    def _drawn(self, dtype: torch.dtype | None) -> str:
        if dtype is None:
            return "None"
        return f'torch.randn({self.problem.width}, device="cuda", dtype=torch.{name_of(dtype)})'

    def maths(self) -> str:
        """What is normalised, and how, for the header."""
        problem = self.problem
        out = "n" + (" * weight" if problem.weight else "") + (" + bias" if problem.bias else "")
        rounds = problem.scale_after_cast and out != "n" and problem.total != torch.float32
        order = f"; n is rounded to {name_of(problem.total)} first" if rounds else ""
        normal = _MATHS[problem.kind].format(eps=problem.eps)
        return f"    s = x + residual, in {name_of(problem.total)}\n    {normal}\n    out = {out}{order}"

    def script(self, main: str, holes: dict[str, str]) -> str:
        """The reference and ``main``."""
        return fill(template.NORMALISED, holes) + fill(main, holes)
