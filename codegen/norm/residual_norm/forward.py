"""From a residual norm to the source of its forward kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from fxopt.codegen.norm.residual_norm import template
from fxopt.codegen.norm.residual_norm.config import LONGEST
from fxopt.codegen.norm.residual_norm.text import RowsText, rounded, widened
from fxopt.codegen.template import fill, listing

_TITLES: Final = {"layer_norm": "Residual sum and LayerNorm", "rms_norm": "Residual sum and RMSNorm"}


@dataclass(frozen=True)
class ForwardText(RowsText):
    """The source for one problem and configuration."""

    def __str__(self) -> str:
        long = self.problem.width > LONGEST
        holes = {**self.holes, **self._launch, **(self._long if long else self._short)}
        kernel = fill(template.LONG_FORWARD if long else template.FORWARD, holes)
        launch = fill(template.LAUNCH_FORWARD, holes)
        return fill(template.HEADER, holes) + kernel + launch + self.script(template.MAIN_FORWARD, holes)

    @property
    def _names(self) -> list[str]:
        weights = [name for name in ("weight", "bias") if getattr(self.problem, name) is not None]
        results = ["normal", "sum", *(["mean"] if self.centred else []), "scale"]
        return ["x", "residual", *weights, *results]

    @property
    def _launch(self) -> dict[str, str]:
        problem = self.problem
        moved = sum(dtype.itemsize for dtype in (problem.x, problem.residual, problem.total, problem.out))
        given = {"sum": "total"}
        return {
            "title": _TITLES[problem.kind],
            "maths": self.maths(),
            "meaning": "rows of a program, warps",
            "parameters": listing(f"{name}_ptr" for name in self._names),
            "arguments": listing(given.get(name, name) for name in self._names),
            "mean_size": "x.shape[:-1] if with_statistics else (0,)" if self.centred else "(0,)",
            "statistics_title": "mean and inverse deviation"
            if self.centred
            else "inverse root mean square (and no mean)",
            "bytes": str(moved),
        }

    @property
    def _short(self) -> dict[str, str]:
        problem, width = self.problem, self.problem.width
        load = "{0}{{n}} = tl.load({0}_row + c{{n}}, mask={{mask}}, other=0.0)"
        term = f"{widened('x{n}', problem.x)} + {widened('residual{n}', problem.residual)}"
        sums = [
            *(self.each(load.format(name)) for name in ("x", "residual")),
            self.each(f"s{{n}} = {rounded(term, problem.total)}"),
        ]
        normalise = [*self._affine("d{n} * scale", "{n}"), "tl.store(normal_row + c{n}, y{n}, mask={mask})"]
        many = self.config.rows > 1
        return {
            "rows_of_program": f"{self.config.rows} rows" if many else "One row",
            "load_sums": "\n".join(sums),
            "store_sums": self.each("tl.store(sum_row + c{n}, s{n}, mask={mask})"),
            "widen_sums": "" if problem.total == torch.float32 else self.each("s{n} = s{n}.to(tl.float32)"),
            "statistics": self._statistics(width),
            "store_mean": "tl.store(mean_ptr + row[:, None], mean, mask=there)" if self.centred else "",
            "load_weights": self.load_weights("weight", "bias"),
            "normalise": "\n".join(map(self.each, normalise)),
        }

    def _statistics(self, width: int) -> str:
        lines = []
        if self.centred:
            lines += [self.row_sum("total", "s{n}"), f"mean = total / {width}"]
            inside = (self.inside(n) for n in self.chunks)
            differences = (
                f"tl.where({mask}, s{n} - mean, 0.0)" if mask else f"s{n} - mean" for n, mask in enumerate(inside)
            )
            lines += [f"d{n} = {difference}" for n, difference in enumerate(differences)]
        else:
            lines += [f"d{n} = s{n}" for n in self.chunks]
        lines.append(self.row_sum("squares", "d{n} * d{n}"))
        lines.append(f"scale = tl.rsqrt(squares / {width} + {float(self.problem.eps)!r})")
        return "\n".join(lines)

    def _affine(self, normal: str, number: str) -> list[str]:
        """Statements that make ``y`` of the normalised value: scaled, shifted and rounded where the norm says so."""
        problem, y = self.problem, f"y{number}"
        dtype = problem.total if problem.scale_after_cast else torch.float32
        statements = [f"{y} = {rounded(normal, dtype)}"]
        for name, sign in (("weight", "*"), ("bias", "+")):
            other = getattr(problem, name)
            if other is None:
                continue
            text = f"{widened(y, dtype)} {sign} {name}{number}"
            dtype = torch.promote_types(dtype, other) if problem.scale_after_cast else dtype
            statements.append(f"{y} = {rounded(text, dtype)}")
        return statements if dtype == problem.out else [*statements, f"{y} = {rounded(y, problem.out)}"]

    @property
    def _long(self) -> dict[str, str]:
        problem = self.problem
        load = "tl.load({}_ptr + c, mask=c < " + str(problem.width) + ", other=0.0)"
        found = [name for name in ("weight", "bias") if getattr(problem, name) is not None]
        normal = "(s - mean) * scale" if self.centred else "s * scale"
        store = f"tl.store(normal_ptr + row * {problem.width} + c, y, mask=c < {problem.width})"
        return {
            "mean_zero": "mean = 0.0" if self.centred else "",
            "accumulate": fill(template.MERGE, self.holes).rstrip() if self.centred else "squares += tl.sum(s * s, 0)",
            "store_mean": "tl.store(mean_ptr + row, mean)" if self.centred else "",
            "load_chunk_weights": "\n".join(
                f"{name} = {widened(load.format(name), getattr(problem, name))}" for name in found
            ),
            "normalise": "\n".join([*self._affine(normal, ""), store]),
        }
