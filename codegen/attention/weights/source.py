"""From an attention specification to the source of the kernels of its weights, or of a statistic of them.

Per block of rows the keys are gone over twice: once for the largest logit and the sum of exponentials, once for the
weights themselves. Column sums keep the former for every row and go over the rows per block of keys; no atomics, so
that two runs agree to the last bit. Where the log-sum-exp of the rows is given, the first walk is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from types import MappingProxyType
from typing import Final

import torch

from fxopt.codegen.attention.portable.config import Config, padded
from fxopt.codegen.attention.portable.loops import key_range_text, loop_spans
from fxopt.codegen.attention.portable.tiles import wide
from fxopt.codegen.attention.script import script_holes
from fxopt.codegen.attention.softmax import LOG2E
from fxopt.codegen.attention.weights import template
from fxopt.codegen.attention.weights.blocks import BlocksText
from fxopt.codegen.printing import emit, helpers
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import NAME_OF, AttentionSpec
from fxopt.ir.expression import Expr

_KV_HEAD: Final = {"group": "h // (heads // kv_heads)", "tile": "h % kv_heads"}
_KV_HEAD_MATHS: Final = {"group": "h // (H/G)", "tile": "h mod G"}
#: The weight of a logit, by what a row without keys gives; the same in words.
WEIGHT: Final = {
    "nan": "p / total",
    "zero": "tl.where(total == 0, 0.0, p / total)",
    "uniform": "tl.where(total == 0, 1.0 / Sk, p / total)",
}
#: The same, and the exponent of 2, where the log-sum-exp of a row is known.
_KNOWN_WEIGHT: Final = {
    "nan": "p",
    "zero": 'tl.where(lse == float("-inf"), 0.0, p)',
    "uniform": 'tl.where(lse == float("-inf"), 1.0 / Sk, p)',
}
#: The same in the script's reference.
_REFERENCE: Final = {
    row: f'torch.where((x == float("-inf")).all(-1, keepdim=True), {value}, out)' if value else "out"
    for row, value in {"nan": "", "zero": "0.0", "uniform": "1 / k.shape[2]"}.items()
}
_EMPTY: Final = {"nan": "NaN", "zero": "0", "uniform": "1/T for every key"}
_CONSTANTS: Final = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "PRECISION", "FAST_TANH", "EVEN", "WIDE")
_STRIDES: Final = {"q": ("bhid", (0, 1, 2, 3)), "k": ("bhjd", (0, 1, 2, 3)), "lse": ("bhi", (0, 1, 2))}
_SIGNATURE: Final = {
    False: "def launch(q: torch.Tensor, k: torch.Tensor, captures: Sequence[torch.Tensor] = ()) -> torch.Tensor:",
    True: "def launch(\n    q: torch.Tensor, k: torch.Tensor, captures: Sequence[torch.Tensor], lse: torch.Tensor\n"
    ") -> torch.Tensor:",
}


#: What the kernel of the rows does before its work where nothing is known of their sums.
_FIRST: Final = "the sums of its softmax, then "


@dataclass(frozen=True, slots=True)
class Kind:
    """What a module computes from the weights: its texts, and the tensors that the kernel of the rows writes."""

    title: str
    maths: str
    work: str
    size: str
    shape: str
    reduced: str
    finish: str
    writes: tuple[str, ...] = ("out",)


KINDS: Final[dict[str, Kind]] = {
    "weights": Kind(
        "weights", "out = P", "its weights", "(batch, heads, rows, keys)", "P [B, H, Sq, Sk]", "out",
        template.FINISH_WEIGHTS,
    ),
    "column_sum": Kind(
        "column sums", "out[b,h,j] = Σ_i P[b,h,i,j]", "the maxima and sums of its softmax", "(batch, heads, keys)",
        "Σ_i P [B, H, Sk]", "out.sum(2)", template.FINISH_SUMS, ("peak", "total"),
    ),
    "diagonal": Kind(
        "diagonal", "out[b,h,n] = P[b,h,n,n]", "its weights on the diagonal",
        "(batch, heads, min(rows, keys))", "the diagonal of P [B, H, min(Sq, Sk)]", "out.diagonal(dim1=2, dim2=3)",
        template.FINISH_DIAGONAL,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class WeightsText:
    """The source for one specification, head dimension, input dtype, kind and configuration; ``known`` tells that the
    log-sum-exp of the rows is given.
    """

    spec: AttentionSpec
    head_dim: int
    dtype: torch.dtype
    kind: str
    config: Config
    known: bool = False

    def __str__(self) -> str:
        holes = {**self._description, **self._logits.holes, **self._sums}
        holes |= self._kernel(holes)
        summed = self.kind == "column_sum"
        rows = "" if summed and self.known else fill(template.ROWS, holes | self._rows(holes))
        columns = fill(template.COLUMNS, holes | self._columns(holes)) if summed else ""
        holes |= self._launch
        sums = template.SUMS_KNOWN if self.known else template.SUMS_WALKED
        body = fill(template.BLOCKS + sums, holes) + rows + columns + fill(template.LAUNCH, holes)
        devices = "".join(f"\n{text}\n" for text in helpers(body))
        script = {**holes, **script_holes(self.spec, self.dtype)}
        script |= {"reference_result": _REFERENCE[self.spec.empty_rows], "reference_reduced": self._kind.reduced}
        return fill(template.HEADER, holes) + devices + body + fill(template.MAIN, script)

    @property
    def _kind(self) -> Kind:
        return KINDS[self.kind]

    @cached_property
    def _logits(self) -> BlocksText:
        return BlocksText(self.spec, self.head_dim, self.dtype)

    @property
    def _description(self) -> dict[str, str]:
        spec = self.spec
        return {
            "title": self._kind.title,
            "version": version("fxopt"),
            "kv_head_maths": _KV_HEAD_MATHS[spec.kv_map],
            "score_maths": str(spec.score),
            "kept": "" if spec.mask is None else f" with {spec.mask}",
            "result_maths": self._kind.maths,
            "captures": "\n".join(c.description for c in self._logits.captures),
            "empty": _EMPTY[spec.empty_rows],
            "out_dtype": NAME_OF[spec.out_dtype],
            "spec": "\n".join(f"    {field}" for field in str(spec).split("; ")),
            "config": str(self.config),
            "head_dim": str(self.head_dim),
        }

    @property
    def _sums(self) -> dict[str, str]:
        """The holes that say how a logit becomes a weight."""
        if not self.known:
            return {"weight": WEIGHT[self.spec.empty_rows], "sums": "total, peak"}
        text = f"x * {self._logits.exponent.scale} - lse * {LOG2E!r}"
        return {"weight": _KNOWN_WEIGHT[self.spec.empty_rows], "sums": "lse", "known_exponent": text}

    def _kernel(self, holes: Mapping[str, str]) -> dict[str, str]:
        """The holes that the kernels share."""
        inside = self._logits.inside("d[None, :]")
        sizes = ("heads", "kv_heads", "Sq", "Sk", *(p for c in self._logits.captures for p in c.period))
        texts = {"kv_head": _KV_HEAD[self.spec.kv_map], "q_mask": f", mask={inside}, other=0.0" if inside else ""}
        return {
            "unspecialized": "[" + ", ".join(f'"{name}"' for name in sizes) + "]",
            "place": _text(template.PLACE, texts),
            "rows_of_block": template.ROWS_OF_BLOCK,
            "load_q": _text(template.LOAD_Q, texts),
            "capture_bases": "\n".join(c.base for c in self._logits.captures),
            "key_range": key_range_text(self._logits.range, self._emit),
        }

    def _rows(self, holes: Mapping[str, str]) -> dict[str, str]:
        """The holes of the kernel that goes over the rows."""
        ranged = any(b.slope for b in self._logits.range.side("upper"))
        diagonal = {"first": "first // BLOCK_N * BLOCK_N", "last": "tl.minimum(last + 1, Sk)", "bounded": "True"}
        finish = {
            "write_loops": self._loops(template.WRITE, holes),
            "outside": self._outside,
            "diagonal_loop": _text(template.LOOP, {**holes, **diagonal, "body": _text(template.PICK, holes)}),
        }
        return {
            "rows_parameters": self._parameters(self._writes),
            "rows_work": self._kind.work if self.known or self.kind == "column_sum" else f"{_FIRST}{self._kind.work}",
            "row_block": "blocks - 1 - program % blocks" if ranged else "program % blocks",
            "sums_found": self._sums_found(holes),
            "finish": _text(self._kind.finish, {**holes, **finish}),
        }

    @property
    def _writes(self) -> tuple[str, ...]:
        """The tensors besides the operands that the kernel of the rows is given."""
        return ("lse", *self._kind.writes) if self.known else self._kind.writes

    def _sums_found(self, holes: Mapping[str, str]) -> str:
        """The lines that find the sums of the rows, and the limits of the keys that later lines read."""
        if not self.known:
            return _text(template.WALK, {**holes, "fold_loops": self._loops(template.FOLD, holes)})
        return template.LOAD_LSE + (f"\n{holes['key_range']}" if self.kind == "weights" else "")

    def _loops(self, body: str, holes: Mapping[str, str]) -> str:
        spans = loop_spans(self._logits.range)
        texts = [
            {"first": s.first, "last": s.last, "bounded": str(s.bounded), "body": _text(body, holes)} for s in spans
        ]
        return "\n".join(_text(template.LOOP, {**holes, **text}) for text in texts)

    @property
    def _outside(self) -> str:
        if not self._logits.range.bounds:
            return ""
        write = {"write": _text(template.WRITE, self._sums)}
        lower = bool(self._logits.range.side("lower"))
        end = "tl.maximum(stop, start_block)" if lower else "tl.maximum(stop, 0)"
        before = _text(template.BEFORE, write) if lower else ""
        return _text(template.OUTSIDE, {**write, "before": before, "covered": f"tl.cdiv({end}, BLOCK_N) * BLOCK_N"})

    def _columns(self, holes: Mapping[str, str]) -> dict[str, str]:
        """The holes of the kernel that goes over the keys."""
        found = self._logits.range
        column = _text(template.COLUMN, holes)
        limits = [line for line in holes["key_range"].splitlines() if not line.startswith("full_")]
        lower = " & (start + BLOCK_N > start_block)" if found.side("lower") else ""
        skipped = {"inside": f"(start < stop){lower}" if lower else "start < stop", "column": column}
        return {
            "columns_parameters": self._parameters((*self._summed, "out")),
            "sums_of_rows": template.LOAD_LSE if self.known else template.SUMS_OF_ROWS,
            "columns_range": "\n".join([*self._limit_captures, *limits]) if found.bounds else "",
            "columns_body": _text(template.SKIPPED_COLUMN, skipped) if found.bounds else column,
        }

    @property
    def _summed(self) -> tuple[str, ...]:
        """The tensors that tell the sums of the rows."""
        return ("lse",) if self.known else ("peak", "total")

    @property
    def _strides(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: axes for name, axes in _STRIDES.items() if self.known or name != "lse"}

    @property
    def _limit_captures(self) -> list[str]:
        """The loads of captured numbers that limit the keys, which must be known before a block is skipped."""
        read = {int(n.value or 0) for b in self._logits.range.bounds for n in b.offset.walk() if n.op == "capture"}
        return [c.base for c in self._logits.captures if c.index in read]

    def _parameters(self, writes: Sequence[str]) -> str:
        captures = self._logits.captures
        tensors = (f"{name}_ptr" for name in ("q", "k", *(c.name for c in captures), *writes))
        strides = (f"{name}_stride_{axis}" for name, (axes, _) in self._strides.items() for axis in axes)
        captured = (name for c in captures for name in c.strides)
        sizes = ("heads", "kv_heads", "Sq", "Sk", *(p for c in captures for p in c.period))
        return listing((*tensors, *strides, *captured, *sizes, *_CONSTANTS), annotate=True)

    def _arguments(self, writes: Sequence[str]) -> str:
        captures, config = self._logits.captures, self.config
        strides = (f"{name}.stride({axis})" for name, (_, axes) in self._strides.items() for axis in axes)
        captured = (value for c in captures for value in c.stride_values)
        sizes = ("heads", "kv_heads", "rows", "keys", *(f"{c.name}.shape[0]" for c in captures if c.period))
        blocks = (f"BLOCK_M={config.block_m}", f"BLOCK_N={config.block_n}", f"BLOCK_D={padded(self.head_dim)}")
        even = f"EVEN=keys % {config.block_n} == 0"
        switches = ('PRECISION="ieee" if exact else "tf32"', "FAST_TANH=fast", even, "WIDE=wide")
        options = (f"num_warps={config.num_warps}", f"num_stages={config.num_stages}")
        names = ("q", "k", *(c.name for c in captures), *writes)
        return listing((*names, *strides, *captured, *sizes, *blocks, *switches, *options))

    @property
    def _launch(self) -> dict[str, str]:
        """The holes of the host side."""
        names = [c.name for c in self._logits.captures]
        summed = self.kind == "column_sum"
        columns = {"block_n": str(self.config.block_n), "columns_arguments": self._arguments((*self._summed, "out"))}
        rows = {"block_m": str(self.config.block_m), "rows_arguments": self._arguments(self._writes)}
        return {
            "signature": _SIGNATURE[self.known],
            "lse_shape": ", lse [B, H, Sq]" if self.known else "",
            "given": "q, k, captures, lse" if self.known else "q, k, captures",
            "main_lse": "lse = torch.logsumexp(exact_logits(q, k, captures), -1).float()" if self.known else "",
            "result_shape": self._kind.shape,
            "result_size": self._kind.size,
            "torch_dtype": str(self.spec.out_dtype),
            "unpack_captures": f"({', '.join(names)},) = captures" if names else "",
            "wide": wide(self._reaches),
            "scratch": template.SCRATCH if summed and not self.known else "",
            "launch_rows": "" if summed and self.known else _text(template.LAUNCH_ROWS, rows),
            "launch_columns": _text(template.LAUNCH_COLUMNS, columns) if summed else "",
        }

    @property
    def _reaches(self) -> list[tuple[int, str]]:
        rows, keys, width = self.config.block_m, self.config.block_n, padded(self.head_dim)
        tiles = [(rows, "q.stride(2)"), (width, "q.stride(3)"), (keys, "k.stride(2)"), (width, "k.stride(3)")]
        tiles += [(rows, "keys")] if self.kind == "weights" else []
        return tiles + [reach for c in self._logits.captures for reach in c.reaches(rows, keys)]

    def _emit(self, expr: Expr | None, names: Mapping[str, str] = MappingProxyType({})) -> str:
        return "" if expr is None else emit(expr, names, self.spec.capture_kinds)


def _text(piece: str, holes: Mapping[str, str]) -> str:
    return fill(piece, holes).rstrip("\n")
