"""What a kernel for few keys writes besides the output: weights, sums of them over the rows, their diagonal.

All weights of a row are in registers. Those of many rows, and the diagonal, are written before the products with the
values, and what is added up over rows when the output is written: the other way round takes more registers than there
are. The column sums of each block of rows are written, and a second kernel adds those of a head in order, where it has
several blocks: sums that a program kept would take a quarter of the registers that its weights take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fxopt.codegen.attention.short.config import Config
from fxopt.codegen.attention.weights.wants import Want
from fxopt.codegen.template import fill

_MATHS: Final = {
    "weights": "want_{n}[b,h,i,j] = P[b,h,i,j]{rows}",
    "column_sum": "want_{n}[b,h,j] = Σ_i P[b,h,i,j]",
    "diagonal": "want_{n}[b,h,n] = P[b,h,n,n]",
}
_SIZE: Final = {
    "weights": "(batch, heads, {rows}, keys)",
    "column_sum": "(batch, heads, keys)",
    "diagonal": "(batch, heads, min(rows, keys))",
}

_SHARE: Final = "# Rows beyond the end, which repeat the last one, have no weight."
_INVERSE: Final = "1.0 / total[:, None]"

_WHOLE: Final = """\
want_base = want_${n}_ptr + ((b_wide * heads + h_wide) * Sq + first) * Sk
$stores"""
_STORE_WHOLE: Final = (
    "tl.store(want_base + (row * Sk + j_{piece}), w_{piece}.to(want_{n}_ptr.dtype.element_ty), "
    "mask=(rows < Sq) & (j_{piece} < Sk))"
)

#: A block that holds none of the rows skips them.
_ROWS: Final = """\
if (first < $stop) & (first + BLOCK_M > $start):
    taken = (rows >= $start) & (rows < $stop)$stepped
    want_base = want_${n}_ptr + ((b_wide * heads + h_wide) * $count + $place) * Sk
    $stores"""
_STORE_ROWS: Final = (
    "tl.store(want_base + j_{piece}, w_{piece}.to(want_{n}_ptr.dtype.element_ty), mask=taken & (j_{piece} < Sk))"
)

#: A single row is picked out of its block, which takes fewer registers than a masked block.
_ROW: Final = """\
if (first <= $start) & (first + BLOCK_M > $start):
    want_base = want_${n}_ptr + (b_wide * heads + h_wide) * Sk
    $stores"""
_STORE_ROW: Final = (
    "tl.store(want_base + n_{piece}, tl.sum(tl.where(rows == {start}, w_{piece}, 0.0), 0)"
    ".to(want_{n}_ptr.dtype.element_ty), mask=n_{piece} < Sk)"
)

_DIAGONAL: Final = """\
width = tl.minimum(Sq, Sk)
$diagonal
want_base = want_${n}_ptr + (b_wide * heads + h_wide) * width
tl.store(want_base + rows, diagonal[:, None].to(want_${n}_ptr.dtype.element_ty), mask=rows < width)"""

_COLUMNS: Final = """\
want_base = want_${n}_ptr + ((b_wide * heads + h_wide) * tl.cdiv(Sq, BLOCK_M) + first // BLOCK_M) * Sk
$stores"""
_STORE_COLUMNS: Final = (
    "tl.store(want_base + n_{piece}, tl.sum(w_{piece}, 0).to(want_{n}_ptr.dtype.element_ty), mask=n_{piece} < Sk)"
)

ADD_PARTS: Final = '''
@triton.jit
def add_parts_kernel(parts_ptr, out_ptr, parts, keys, BLOCK: tl.constexpr):
    """The column sums of one head: those of each part of its rows, added in order."""
    head = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    columns = tl.zeros([BLOCK], tl.float32)
    for part in range(0, parts):
        columns += tl.load(parts_ptr + (head * parts + part) * keys + j, mask=j < keys, other=0.0)
    tl.store(out_ptr + head * keys + j, columns.to(out_ptr.dtype.element_ty), mask=j < keys)

'''

_ALLOCATE_PARTS: Final = """\
# Where a head has several blocks of rows, each writes its own sums.
parts_$n = want_$n
if parts > 1:
    parts_$n = torch.empty((batch, heads, parts, keys), dtype=torch.float32, device=q.device)"""
_ADD_PARTS: Final = """\
if parts > 1:
    add_parts_kernel[(batch * heads,)](parts_$n, want_$n, parts, keys, BLOCK=$block)"""


@dataclass(frozen=True)
class WantedText:
    """The text for some ``wants``; in ``exact`` kernels weights are divided by the sum of their row, in others they are
    multiplied with its inverse, and with ``zero`` those of a row without keys are 0.
    """

    wants: Sequence[Want]
    config: Config
    exact: bool
    zero: bool

    @property
    def _pieces(self) -> range:
        return range(len(self.config.pieces))

    @property
    def sums(self) -> bool:
        """Whether column sums are among them."""
        return any(want.kind == "column_sum" for want in self.wants)

    @property
    def names(self) -> list[str]:
        """What the kernel writes to, as the launcher calls it."""
        return [f"parts_{n}" if want.kind == "column_sum" else f"want_{n}" for n, want in enumerate(self.wants)]

    @property
    def pointers(self) -> tuple[str, ...]:
        """The parameters of the kernel."""
        return tuple(f"want_{n}_ptr" for n in range(len(self.wants)))

    @property
    def before(self) -> str:
        """Lines of each step before the products with the values."""
        early = [n for n, want in enumerate(self.wants) if not _is_late(want)]
        return "\n".join([*self._shares, *map(self._wanted, early)]) if early else ""

    @property
    def after(self) -> str:
        """Lines of each step when the output is written."""
        late = [n for n, want in enumerate(self.wants) if _is_late(want)]
        shares = self._shares if len(late) == len(self.wants) else []
        return "\n".join([*shares, *map(self._wanted, late)]) if late else ""

    @property
    def _shares(self) -> list[str]:
        """The weights, as what the rows' sums leave of them."""
        counted = "(rows < Sq) & (total[:, None] != 0)" if self.zero else "rows < Sq"
        of_row, nothing, sign = ("total[:, None]", 'float("inf")', "/") if self.exact else (_INVERSE, "0.0", "*")
        return [_SHARE, f"share = tl.where({counted}, {of_row}, {nothing})"] + [
            f"w_{n} = p_{n} {sign} share" for n in self._pieces
        ]

    def _wanted(self, n: int) -> str:
        texts = {"weights": self._weights, "column_sum": self._columns, "diagonal": self._diagonal}
        return texts[self.wants[n].kind](n, self.wants[n])

    def _weights(self, n: int, want: Want) -> str:
        if want.rows is None:
            return _text(_WHOLE, n=n, stores=self._stores(_STORE_WHOLE, n))
        start, stop, step = want.rows
        if len(range(*want.rows)) == 1:
            return _text(_ROW, n=n, start=start, stores=self._stores(_STORE_ROW, n, start=start))
        moved = f"(rows - {start})" if start else "rows"
        numbers: dict[str, object] = {"start": start, "stop": stop, "count": len(range(*want.rows))}
        numbers["place"] = moved if step == 1 else f"{moved} // {step}"
        stepped = f" & ({moved} % {step} == 0)" if step != 1 else ""
        return _text(_ROWS, n=n, stores=self._stores(_STORE_ROWS, n), stepped=stepped, **numbers)

    def _diagonal(self, n: int, _: Want) -> str:
        terms = [f"tl.sum(tl.where(j_{piece} == rows, w_{piece}, 0.0), 1)" for piece in self._pieces]
        lines = [f"diagonal {'+=' if piece else '='} {term}" for piece, term in enumerate(terms)]
        return _text(_DIAGONAL, n=n, diagonal="\n".join(lines))

    def _columns(self, n: int, _: Want) -> str:
        return _text(_COLUMNS, n=n, stores=self._stores(_STORE_COLUMNS, n))

    def _stores(self, text: str, n: int, **holes: object) -> str:
        return "\n".join(text.format(n=n, piece=piece, **holes) for piece in self._pieces)

    @property
    def maths(self) -> str:
        """What is written, for the head of the module."""
        rows = ("" if want.rows is None else f", rows {':'.join(map(str, want.rows))}" for want in self.wants)
        lines = (
            _MATHS[w.kind].format(n=n, rows=text) for n, (w, text) in enumerate(zip(self.wants, rows, strict=True))
        )
        return "\n".join(f"    {line}" for line in lines)

    @property
    def launch(self) -> dict[str, str]:
        """The holes of the host side."""
        columns = [n for n, want in enumerate(self.wants) if want.kind == "column_sum"]
        block = 1 << (self.config.keys - 1).bit_length()
        return {
            "allocate_wanted": "\n".join(self._allocation(n, want) for n, want in enumerate(self.wants)),
            "zeroed": "".join(f", want_{n}.zero_()" for n in range(len(self.wants))),
            "wanted": "".join(f", want_{n}" for n in range(len(self.wants))),
            "allocate_parts": "\n".join(
                [f"parts = -(-rows // {self.config.rows})" for _ in columns[:1]]
                + [_text(_ALLOCATE_PARTS, n=n) for n in columns]
            ),
            "add_parts": "\n".join(_text(_ADD_PARTS, n=n, block=block) for n in columns),
            "results": "tuple[torch.Tensor, ...]" if self.wants else "tuple[torch.Tensor, torch.Tensor]",
        }

    def _allocation(self, n: int, want: Want) -> str:
        rows = "rows" if want.rows is None else len(range(*want.rows))
        return f"want_{n} = torch.empty({_SIZE[want.kind].format(rows=rows)}, dtype={want.dtype}, device=q.device)"


def _is_late(want: Want) -> bool:
    """Whether it is added up over rows, as a single row is that is picked out of its block."""
    return want.kind == "column_sum" or (want.rows is not None and len(range(*want.rows)) == 1)


def _text(piece: str, **holes: object) -> str:
    return fill(piece, {name: str(value) for name, value in holes.items()}).rstrip("\n")
