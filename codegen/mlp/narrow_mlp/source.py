"""From a narrow feed-forward block to the source of its kernel.

Rows are held in pieces whose widths are powers of two (96 = 64 + 32): a product per piece, none of it padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

from fxopt.codegen.mlp.narrow_mlp import template
from fxopt.codegen.mlp.narrow_mlp.activation import IN_TORCH, definition
from fxopt.codegen.mlp.narrow_mlp.config import Config
from fxopt.codegen.mlp.narrow_mlp.problem import Problem
from fxopt.codegen.template import fill, listing

#: Operations of the timings that the script makes.
_TIMED: Final = 2**35


@dataclass(frozen=True)
class Text:
    """The source for one problem and configuration."""

    problem: Problem
    config: Config

    def __str__(self) -> str:
        holes = {**self._sizes, **self._parameters, **self._loop, **self._end, **self._script}
        kernel = definition(self.problem.activation) + fill(template.KERNEL, holes)
        return fill(template.HEADER, holes) + kernel + fill(template.LAUNCH, holes) + fill(template.MAIN, holes)

    @property
    def _dtype(self) -> str:
        return str(self.problem.dtype).removeprefix("torch.")

    @property
    def _sizes(self) -> dict[str, str]:
        problem, config = self.problem, self.config
        return {
            "version": version("fxopt"),
            "width": str(problem.width),
            "hidden": str(problem.hidden),
            "out": str(problem.out),
            "dtype": self._dtype,
            "config": str(config),
            "block": str(config.rows),
            "last": str(config.rows - 1),
            "chunk": str(config.chunk),
            "warps": str(config.warps),
            "stages": str(config.stages),
            "limit": f"maxnreg={config.registers}," if config.registers else "",
            "limit_title": ", registers of a thread" if config.registers else "",
            "maths": self._maths(),
        }

    def _maths(self) -> str:
        problem = self.problem
        inner = "x · upᵀ" + (" + up_bias" if problem.up_bias else "")
        outer = " · downᵀ" + (" + down_bias" if problem.down_bias else "")
        return f"    y = {problem.activation}({inner}){outer}" + (" + residual" if problem.residual else "")

    @property
    def _parameters(self) -> dict[str, str]:
        problem = self.problem
        given = {"x": True, "up": True, "up_bias": problem.up_bias, "down": True, "down_bias": problem.down_bias}
        names = [name for name, there in {**given, "residual": problem.residual, "y": True}.items() if there]
        return {
            "parameters": listing(f"{name}_ptr" for name in names),
            "arguments": listing(names),
            "residual_stride": "residual_stride," if problem.residual else "",
            "residual_distance": "row_distance(residual)," if problem.residual else "",
        }

    @property
    def _loop(self) -> dict[str, str]:
        width, out = pieces(self.problem.width), pieces(self.problem.out)
        up = "up{n} = tl.load(up_ptr + (start + hidden)[None, :] * UP_ROW + c{n}[:, None] * UP_COLUMN)"
        down = "down{n} = tl.load(down_ptr + (start + hidden)[:, None] * DOWN_COLUMN + d{n}[None, :] * DOWN_ROW)"
        products = [up.format(n=n) for n in range(len(width))]
        products += [f"h = {self._dot(f'x{n}', f'up{n}', 'h' if n else '')}" for n in range(len(width))]
        results = [down.format(n=n) for n in range(len(out))]
        results += [f"y{n} = {self._dot('h', f'down{n}', f'y{n}')}" for n in range(len(out))]
        biased = ["up_bias = " + self._wide("tl.load(up_bias_ptr + start + hidden)")] if self.problem.up_bias else []
        return {
            "columns": "\n".join((*_places("c", width), *_places("d", out))),
            "load_x": "\n".join(_loads("x", "x_row", "c", len(width))),
            "zeros": "\n".join(
                f"y{n} = tl.zeros([{self.config.rows}, {size}], tl.float32)" for n, size in enumerate(out)
            ),
            "products": "\n".join((*biased, *products)),
            "add_up_bias": "h += up_bias[None, :]" if self.problem.up_bias else "",
            "results": "\n".join(results),
        }

    def _dot(self, left: str, right: str, onto: str) -> str:
        return f"tl.dot({left}, {right}{', ' if onto else ''}{onto})"

    @staticmethod
    def _wide(text: str) -> str:
        return f"{text}.to(tl.float32)"

    @property
    def _end(self) -> dict[str, str]:
        problem, count = self.problem, len(pieces(self.problem.out))
        bias = [f"y{n} += {self._wide(f'tl.load(down_bias_ptr + d{n})')}[None, :]" for n in range(count)]
        place = "tl.load(residual_row + d{n}[None, :], mask=there, other=0.0)"
        residual = ["residual_row = residual_ptr + (row * residual_stride)[:, None]"]
        residual += [f"y{n} += {self._wide(place.format(n=n))}" for n in range(count)]
        value = f"y{{n}}.to(tl.{self._dtype})"
        store = [f"tl.store(y_row + d{n}[None, :], {value.format(n=n)}, mask=there)" for n in range(count)]
        return {
            "add_down_bias": "\n".join(bias) if problem.down_bias else "",
            "add_residual": "\n".join(residual) if problem.residual else "",
            "store": "\n".join(store),
        }

    @property
    def _script(self) -> dict[str, str]:
        problem = self.problem
        operations = 2 * problem.hidden * (problem.width + problem.out)
        return {
            "in_torch": IN_TORCH[problem.activation],
            "operations": str(operations),
            "timed": str(max(_TIMED // operations, 1)),
            "draw_up_bias": f"draw({problem.hidden})" if problem.up_bias else "None",
            "draw_down_bias": f"draw({problem.out})" if problem.down_bias else "None",
            "draw_residual": f"draw(rows, {problem.out})" if problem.residual else "None",
        }


def pieces(width: int) -> tuple[int, ...]:
    """``width`` as a sum of different powers of two, the largest first."""
    return tuple(1 << bit for bit in reversed(range(width.bit_length())) if width >> bit & 1)


def _places(name: str, sizes: tuple[int, ...]) -> list[str]:
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    return [
        f"{name}{n} = {f'{start} + ' if start else ''}tl.arange(0, {size})"
        for n, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def _loads(name: str, row: str, columns: str, count: int) -> list[str]:
    return [f"{name}{n} = tl.load({row} + {columns}{n}[None, :], mask=there, other=0.0)" for n in range(count)]
