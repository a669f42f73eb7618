"""The tiles of a grid of tokens, and the convolution of the values along it, as text of a kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from fxopt.codegen.linear_attention import template_grid as template
from fxopt.codegen.linear_attention.template_grid import ACROSS
from fxopt.codegen.template import fill

Sign = Literal["+", "-"]

_NAMES: Final[dict[Sign, str]] = {"+": "filtered", "-": "filtered_back"}
_MATHS: Final[dict[Sign, str]] = {
    "+": "Σ weight[a, b] x[y + a - margin, x + b - margin]",
    "-": "Its transpose, Σ weight[a, b] x[y - a + margin, x - b + margin],",
}
#: The shortest block of tokens: two rows.
_SHORTEST: Final = 2 * ACROSS


@dataclass(frozen=True, slots=True)
class Grid:
    """``side²`` tokens on a grid behind ``first`` others, and filters of ``taps²`` taps."""

    side: int
    first: int
    taps: int

    @property
    def tiles(self) -> int:
        """How many tiles stand beside each other."""
        return -(-self.side // ACROSS)

    @property
    def whole(self) -> int | None:
        """The shortest block that holds all tokens; ``None`` where no block does."""
        return max(_power(self.side) * ACROSS, _SHORTEST) if self.tiles == 1 and not self.first else None

    def places(self, block: int) -> int:
        """Those of all blocks of ``block`` tokens, the tokens before the grid in blocks of their own."""
        below = -(-self.side // (block // ACROSS))
        return (-(-self.first // block) + below * self.tiles) * block

    def functions(self, width: int, even: bool) -> str:
        """The order of the tokens in blocks, and the convolutions; ``even`` where no channel lies beyond ``width``."""
        texts = [fill(template.TOKENS, self._holes), *(self._filtered(sign, width, even) for sign in _NAMES)]
        return "".join(texts)

    @property
    def _holes(self) -> dict[str, str]:
        first = str(self.first)
        return {
            "before": f" - ({first} + BLOCK_N - 1) // BLOCK_N" if self.first else "",
            "below": "tile" if self.tiles == 1 else f"(tile // {self.tiles})",
            "from_left": "" if self.tiles == 1 else f" + tile % {self.tiles} * {ACROSS}",
            "behind": f" + {first}" if self.first else "",
            "on_grid": "(tile >= 0) & " if self.first else "",
            "side": str(self.side),
            "taps": str(self.taps),
            "margin": str(self.taps // 2),
            "lead": template.LEAD if self.first else template.ALL,
            "lead_tokens": fill(template.LEAD_TOKENS, {"first": first}).rstrip() if self.first else "",
        }

    def _filtered(self, sign: Sign, width: int, even: bool) -> str:
        columns = range(min(self.side, ACROSS))
        masked = "" if even else f", mask=e < {width}, other=0.0"
        taps = (
            f"tap_{n} = tl.load(tap + {n} * weight_stride_x{masked}).to(tl.float32)[None, :]" for n in range(self.taps)
        )
        holes = {
            "name": _NAMES[sign],
            "maths": _MATHS[sign],
            "sign": sign,
            "new_sums": "\n".join(f"sum_{n} = zero" for n in range(ACROSS)),
            "e_mask": "" if even else f" & (e < {width})[None, :]",
            "load_taps": "\n".join(taps),
            "columns": "\n".join(self._column(c, sign, columns) for c in self._read(columns)),
        }
        return fill(template.FILTERED, {**self._holes, **holes})

    def _read(self, columns: range) -> range:
        """The columns that those of a tile need, from its first one on."""
        margin = self.taps // 2
        return columns if self.tiles == 1 else range(-margin, ACROSS + margin)

    def _column(self, column: int, sign: Sign, columns: range) -> str:
        """The lines that load a column of tokens and add it, once for each tap, to the columns of the result."""
        inside = "inside"
        if self.tiles > 1:
            left = f"tile % {self.tiles} * {ACROSS}"
            inside += f" & ({left} >= {-column})" if column < 0 else f" & ({left} < {self.side - column})"
        lines = [f"near = tl.load(at + {column} * stride_n, mask={inside}, other=0.0).to(tl.float32)"]
        for n in columns:
            tap = (column - n if sign == "+" else n - column) + self.taps // 2
            if 0 <= tap < self.taps:
                lines.append(f"sum_{n} += near * tap_{tap}")
        return "\n".join(lines)

    def add(self, sign: Sign, x: str, out: str, bias: str) -> str:
        """The lines that add the convolution of ``x``, and ``bias`` where there is one, to ``out`` on the grid."""
        given = [x, "weight_ptr", "start", "e", f"{x}_stride_n", f"{x}_stride_e"]
        given += [f"weight_stride_{axis}" for axis in "eyx"]
        lines = [f"local = {_NAMES[sign]}(\n    {', '.join([*given, 'BLOCK_N', 'BLOCK_E'])}\n)"]
        lines += [f"local += {bias}"] if bias else []
        begin = f"({self.first} + BLOCK_N - 1) // BLOCK_N * BLOCK_N"
        return "\n".join(
            [*lines, f"{out} += " + (f"tl.where(start >= {begin}, local, 0.0)" if self.first else "local")]
        )


def _power(size: int) -> int:
    """The power of two from ``size`` on."""
    return 1 << (size - 1).bit_length()
