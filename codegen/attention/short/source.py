"""From an attention specification to the source of a kernel that holds all keys of a head at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch

from fxopt.codegen.attention.captured import CapturedTensor, captured_tensors
from fxopt.codegen.attention.frame import (
    AXIS,
    HEADER,
    KV_HEAD,
    MAIN,
    REFERENCE,
    STRIDES,
    allocation,
    both,
    description,
    unpacked,
)
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.portable.tiles import wide
from fxopt.codegen.attention.script import script_holes
from fxopt.codegen.attention.short import template
from fxopt.codegen.attention.short.config import Config
from fxopt.codegen.attention.short.statements import (
    EVERYWHERE,
    WALKED,
    Statement,
    captured,
    inside,
    places,
    queries_and_keys,
    values,
)
from fxopt.codegen.attention.short.sums import is_linear, moves_with, split_sum
from fxopt.codegen.attention.short.wanted import ADD_PARTS, WantedText
from fxopt.codegen.attention.softmax import Exponent, exponent, row_maximum
from fxopt.codegen.attention.weights.wants import Want
from fxopt.codegen.printing import emit, helpers
from fxopt.codegen.template import fill, listing
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import Expr, S, call, capture

_LEGEND: Final = "(rows x keys in pieces, warps, steps of a program)"
_LOGIT: Final = re.compile(r"\bx\b")
_CONSTANTS: Final = ("BLOCK_M", "BLOCK_D", "BLOCK_E", "PRECISION", "FAST_TANH", "FULL", "WIDE", "WITH_LSE")


@dataclass(frozen=True)
class KernelText:
    """The source for one specification, pair of head dimensions, input dtype and configuration, and for what is wanted
    of the weights besides.
    """

    spec: AttentionSpec
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    config: Config
    wants: tuple[Want, ...] = ()

    def __str__(self) -> str:
        holes = description(self.spec, self.head_dim, self.value_dim, f"{self.config} {_LEGEND}", self._captures)
        holes |= {"library": "import math" if self.config.walk == "batch" else "", "imports": ""}
        holes |= self._kernel | self._launch | {"wanted_maths": self._wanted.maths}
        added = ADD_PARTS if self._wanted.sums else ""
        body = fill(template.KERNEL, holes) + added + fill(template.LAUNCH, holes)
        devices = "".join(f"\n{text}\n" for text in helpers(body))
        keys = self.config.keys
        holes |= script_holes(self.spec, self.dtype, check=keys * 3 // 4 + 1, timed=(2**17 // keys, keys))
        return fill(HEADER, holes) + devices + body + fill(REFERENCE, holes) + fill(MAIN, holes)

    @property
    def _exact(self) -> bool:
        return self.dtype is torch.float32

    @cached_property
    def _captures(self) -> tuple[CapturedTensor, ...]:
        return captured_tensors(self.spec)

    @cached_property
    def _exponent(self) -> Exponent:
        return exponent(self.spec, exact=self._exact)

    @cached_property
    def _sum(self) -> tuple[Expr, Expr | None]:
        """The logit as what changes from step to step, and what does not."""
        return split_sum(self._exponent.inner, moves_with(WALKED[self.config.walk], self.spec.captures))

    @property
    def _kernel(self) -> dict[str, str]:
        """The holes of the kernel."""
        walked = WALKED[self.config.walk]
        statements = list(self._statements())
        return {
            "unspecialized": "[" + ", ".join(f'"{name}"' for name in self._sizes) + "]",
            "kernel_parameters": listing((*self._pointers, *self._strides, *self._sizes, *_CONSTANTS), annotate=True),
            "what": template.WHAT[self.config.walk],
            "walk": template.WALK[self.config.walk],
            "kv_head": KV_HEAD[self.spec.kv_map],
            "pieces": "\n".join(f"n_{n} = {self._range(n)}\nj_{n} = n_{n}[None, :]" for n in self._pieces),
            "widen_pieces": "\n".join(f"n_{n} = n_{n}.to(tl.int64)" for n in self._pieces),
            "before": "\n".join(s.text for s in statements if walked not in s.axes),
            "loop": template.LOOP[self.config.walk],
            "inside": "\n".join(s.text for s in statements if walked in s.axes),
        }

    @cached_property
    def _wanted(self) -> WantedText:
        return WantedText(self.wants, self.config, self._exact, self.spec.empty_rows == "zero")

    def _statements(self) -> Iterator[Statement]:
        """The kernel's work in order, every read before the first product."""
        yield from places()
        yield from queries_and_keys(self.config, self.head_dim)
        for tensor in self._captures:
            yield from captured(tensor, self.config)
        yield from values(self.config, self.value_dim)
        _, fixed = self._sum
        if fixed is not None:
            axes = "i" if self.config.walk == "batch" else "b"
            yield from (Statement(axes, self._fixed(fixed, n)) for n in self._pieces)
        yield from (Statement(EVERYWHERE, self._logits(n)) for n in self._pieces)
        yield Statement(EVERYWHERE, fill(template.SOFTMAX, self._softmax).rstrip("\n"))

    @property
    def _pieces(self) -> range:
        return range(len(self.config.pieces))

    def _range(self, n: int) -> str:
        indices = f"tl.arange(0, {self.config.pieces[n]})"
        return f"{self.config.starts[n]} + {indices}" if n else indices

    def _fixed(self, fixed: Expr, n: int) -> str:
        """The addends that stay, −∞ beyond the last key where that is as good as leaving it out."""
        lines = [f"fixed_{n} = {self._emit(call('float', fixed), n)}"]
        if self._fixed_ends_keys:
            lines += [f"if FULL <= {n}:", f'    fixed_{n} = tl.where(j_{n} < Sk, fixed_{n}, float("-inf"))']
        return "\n".join(lines)

    @property
    def _fixed_ends_keys(self) -> bool:
        moving, fixed = self._sum
        return fixed is not None and is_linear(moving)

    def _logits(self, n: int) -> str:
        moving, fixed = self._sum
        # A name beyond those of the captured tensors, which the emitter treats alike.
        rest = capture(len(self._captures))
        score = moving if fixed is None else call("add", moving, rest)
        lines = [f"s_{n} = tl.dot(q, k_{n}, input_precision=PRECISION)", f"x_{n} = {self._emit(score, n)}"]
        if not score.reads(S):
            lines.append(f"x_{n} = tl.zeros_like(s_{n}) + x_{n}")
        if self.spec.mask is not None:
            lines.append(f'x_{n} = tl.where({self._emit(self.spec.mask, n)}, x_{n}, float("-inf"))')
        if not self._fixed_ends_keys:
            lines += [f"if FULL <= {n}:", f'    x_{n} = tl.where(j_{n} < Sk, x_{n}, float("-inf"))']
        return "\n".join(lines)

    @property
    def _softmax(self) -> dict[str, str]:
        """The holes of the softmax and the result."""
        factor = self._exponent.factor
        total = " + ".join(f"tl.sum(p_{n}, 1)" for n in self._pieces)
        weights = (f"p_{n} = tl.exp2({_LOGIT.sub(f'x_{n}', self._exponent.text)})" for n in self._pieces)
        # A row without keys gives the mean of all values: as if every key had the weight one.
        averages = (
            f'p_{n} = tl.where((peak == float("-inf"))[:, None] & (j_{n} < Sk), 1.0, p_{n})' for n in self._pieces
        )
        quotient = "acc / total[:, None]" if self._exact else "acc * (1.0 / total)[:, None]"
        zeroed = f"tl.where(total[:, None] == 0, 0.0, {quotient})"
        return {
            "peak": "\n".join(self._peak(n) for n in self._pieces),
            "unit": self._exponent.unit,
            "weights": "\n".join(weights),
            "averages": "\n".join(averages) if self.spec.empty_rows == "uniform" else "",
            "total": total,
            "products": "\n".join(self._product(n) for n in self._pieces),
            "wanted_before": self._wanted.before,
            "wanted_after": self._wanted.after,
            "result": zeroed if self.spec.empty_rows == "zero" else quotient,
            "out_mask": both("rows < Sq", inside("e[None, :]", self.value_dim)),
            "lse_factor": f" * {factor!r}" if factor != 1.0 else "",
        }

    def _peak(self, n: int) -> str:
        """The largest logit of each row, up to the ``n``-th piece."""
        size = self.config.pieces[n]
        plain = self._exact or self.config.rows < 16 * self.config.warps or size < 32
        largest = f"tl.max(x_{n}, 1)" if plain else row_maximum(f"x_{n}", str(size), size)
        return f"peak = tl.maximum(peak, {largest})" if n else f"peak = {largest}"

    def _product(self, n: int) -> str:
        onto = ", acc" if n else ""
        return f"acc = tl.dot(p_{n}.to(v_{n}.dtype), v_{n}{onto}, input_precision=PRECISION)"

    @property
    def _pointers(self) -> tuple[str, ...]:
        return (
            "q_ptr",
            "k_ptr",
            "v_ptr",
            *(f"{c.name}_ptr" for c in self._captures),
            "out_ptr",
            "lse_ptr",
            *self._wanted.pointers,
        )

    @property
    def _strides(self) -> tuple[str, ...]:
        named = tuple(f"{tensor}_stride_{axis}" for tensor, axes in STRIDES.items() for axis in axes)
        return (*named, *(name for c in self._captures for name in c.strides))

    @property
    def _sizes(self) -> tuple[str, ...]:
        walk = ("batch", "stride") if self.config.walk == "batch" else ()
        return (*walk, "steps", "heads", "kv_heads", "Sq", "Sk", *(p for c in self._captures for p in c.period))

    @property
    def _launch(self) -> dict[str, str]:
        """The holes of the host side."""
        names = [c.name for c in self._captures]
        periods = [f"{c.name}.shape[0]" for c in self._captures if c.period]
        block = {"periods": ", ".join(periods), "steps": str(self.config.steps), "block_m": str(self.config.rows)}
        ends = tuple(start + size for start, size in zip(self.config.starts, self.config.pieces, strict=True))
        return {
            "allocate": allocation(self.spec, self.value_dim),
            "longest": str(self.config.keys),
            "unpack_captures": unpacked(names),
            "grid": fill(template.GRID[self.config.walk], block).rstrip("\n"),
            "full": f"sum(keys >= end for end in {ends})",
            "wide": wide(self._reaches),
            "launch_arguments": listing(self._arguments(names, periods)),
            "results_legend": "Then what is wanted of the weights, in turn." if self.wants else "",
            **self._wanted.launch,
        }

    def _arguments(self, names: Sequence[str], periods: Sequence[str]) -> tuple[str, ...]:
        config = self.config
        strides = [f"{t}.stride({AXIS[axis]})" for t, axes in STRIDES.items() for axis in axes]
        strides += [value for c in self._captures for value in c.stride_values]
        walk = ("batch", "stride") if config.walk == "batch" else ()
        sizes = (*walk, str(config.steps), "heads", "kv_heads", "rows", "keys", *periods)
        blocks = (f"BLOCK_M={config.rows}", f"BLOCK_D={padded(self.head_dim)}", f"BLOCK_E={padded(self.value_dim)}")
        switches = ('PRECISION="ieee" if exact else "tf32"', "FAST_TANH=fast", "FULL=full", "WIDE=wide")
        cap = (f"maxnreg={config.registers}",) if config.registers else ()
        options = (f"num_warps={config.warps}", f"num_stages={config.stages}", *cap)
        tensors = ("q", "k", "v", *names, "out", "lse", *self._wanted.names)
        return (*tensors, *strides, *sizes, *blocks, *switches, "WITH_LSE=with_lse", *options)

    @property
    def _reaches(self) -> list[tuple[int, str]]:
        """How far each axis of a tile reaches: its extent and the stride, as the launcher writes it."""
        rows, keys = self.config.rows, self.config.keys
        tiles = [(rows, "q.stride(2)"), (padded(self.head_dim), "q.stride(3)")]
        tiles += [(keys, "k.stride(2)"), (padded(self.head_dim), "k.stride(3)")]
        tiles += [(keys, "v.stride(2)"), (padded(self.value_dim), "v.stride(3)")]
        return tiles + [reach for c in self._captures for reach in c.reaches(rows, keys)]

    def _emit(self, expr: Expr, n: int) -> str:
        """``expr`` over the ``n``-th piece of keys."""
        names = {"s": f"s_{n}", "j": f"j_{n}", str(capture(len(self._captures))): f"fixed_{n}"}
        names |= {c.name: f"{c.name}_{n}" for c in self._captures if c.in_loop}
        return emit(expr, names, (*self.spec.capture_kinds, "float"))
