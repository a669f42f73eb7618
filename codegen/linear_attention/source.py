"""From a specification of linear attention to the source of its kernels, forward and backward.

All of them are the same walk: a sum over tokens (of all, of those before or of those behind) meets each block of tokens
once. Sums over long sequences are divided into parts, each summed by a program of its own and added in order: no
atomics, so that two runs agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Final

import torch

from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.linear_attention import template, template_backward
from fxopt.codegen.linear_attention.config import LinearConfig, cut
from fxopt.codegen.linear_attention.grid import Grid, Sign
from fxopt.codegen.linear_attention.kernels_text import KernelText, text
from fxopt.codegen.linear_attention.operands import Operands
from fxopt.codegen.linear_attention.script import HostText
from fxopt.codegen.template import fill
from fxopt.ir.attention import NAME_OF
from fxopt.ir.linear_attention import LinearSpec

_ASSOCIATION: Final = {"linear": "Q (Kᵀ v)", "quadratic": "(Q Kᵀ) v"}
_KEYS_MATHS: Final = "Σ_j K[j]ᵀ v[j] and Σ_j K[j]"
_ROWS_MATHS: Final = "Σ_i Q[i]ᵀ n[i] and Σ_i m[i] Q[i], n, m gradients of the quotients' parts"


@dataclass(frozen=True)
class LinearText:
    """The source for one specification, pair of head dimensions, input dtype, set of operands and configuration."""

    spec: LinearSpec
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    operands: Operands
    config: LinearConfig

    def __str__(self) -> str:
        kernels = self.kernels
        body = "".join(kernel.text for kernel in kernels.values())
        return (
            fill(template.HEADER, self._holes)
            + self._functions
            + body
            + str(HostText(self._holes, self.blocks, kernels, self))
        )

    @cached_property
    def grid(self) -> Grid | None:
        """The tiles of the convolution, where there is one."""
        return Grid(self.spec.side, self.spec.first, self.operands.taps) if self.operands.taps else None

    def places(self, kind: str, count: str) -> str:
        """How many places a kernel of a kind goes through: the ``count`` of tokens, or those of all tiles."""
        return count if self.grid is None else str(self.grid.places(self.blocks[kind][0]))

    @property
    def _functions(self) -> str:
        if self.grid is None:
            return ""
        columns = max(self.blocks["forward"][2], self.blocks["by_value_channel"][2])
        return self.grid.functions(self.value_dim, self.value_dim % columns == 0)

    @property
    def is_quadratic(self) -> bool:
        """Whether all tokens of a sequence meet directly."""
        return self.config.association == "quadratic"

    @property
    def _is_pairwise(self) -> bool:
        """Whether tokens of a block meet directly."""
        return self.is_quadratic or self.spec.causal

    @cached_property
    def blocks(self) -> dict[str, tuple[int, ...]]:
        """Block of tokens, of channels of keys, of values, number of blocks of columns, warps: by kind of kernel."""
        keys, values = padded(self.head_dim), padded(self.value_dim)
        _, (block, columns, warps) = cut(self.head_dim, self.value_dim, self.dtype, causal=self.spec.causal)
        block = self.config.block if self.is_quadratic else block
        cut_d, cut_e, own = min(columns, keys), min(columns, values), min(self.config.columns, values)
        return {
            "forward": (self.config.block, keys, own, -(-self.value_dim // own), self.config.num_warps),
            "by_key_channel": (block, cut_d, values, -(-self.head_dim // cut_d), warps),
            "by_value_channel": (block, keys, cut_e, -(-self.value_dim // cut_e), warps),
        }

    @cached_property
    def _holes(self) -> dict[str, str]:
        spec, operands = self.spec, self.operands
        masked = "" if self.is_quadratic and not spec.causal else template.CAUSAL
        holes = {
            "version": version("fxopt"),
            "key_maths": "k[j] + positions[j]" if operands.positions else "k[j]",
            "kept": " where keep[j], else 0" if operands.keep else "",
            "causal_maths": " for j <= i, else 0" if spec.causal else "",
            "local_maths": f" + the values' {operands.taps}x{operands.taps} convolution at i" if operands.taps else "",
            "association_maths": "chunks: those before by their sum" if spec.causal else self._association,
            "out_dtype": str(spec.result(self.dtype)).removeprefix("torch."),
            "spec": "\n".join(f"    {field}" for field in str(spec).split("; ")),
            "config": str(self.config),
            "head_dim": str(self.head_dim),
            "value_dim": str(self.value_dim),
            "state_size": str(self.head_dim * self.value_dim),
            "eps": repr(spec.eps),
            "first": str(spec.first),
            "side": str(spec.side),
            "taps": str(operands.taps),
            "margin": str(operands.taps // 2),
            "tokens": "start + tl.arange(0, BLOCK_N)" if self.grid is None else "grid_tokens(start, Sq, BLOCK_N)",
            "causal": masked,
            "from_part": "0",
            "to_part": "part" if spec.causal else "state_parts",
            "state_parts": "parts" if spec.causal else "state_parts",
            "name_of_dtype": NAME_OF[self.dtype],
        }
        return holes | operands.holes(holes)

    @property
    def _association(self) -> str:
        return _ASSOCIATION[self.config.association]

    @cached_property
    def kernels(self) -> dict[str, KernelText]:
        """Every kernel by name."""
        found = [self._forward(), self._queries(), self._keys(), self._values()]
        if not self.is_quadratic:
            found = [self._keys_state("forward"), self._keys_state("backward"), self._rows_state(), *found]
        found += [self._filters()] if self.operands.taps else []
        # The sums over keys are cut alike for the forward and the gradients: one kernel serves both.
        return {kernel.name: kernel for kernel in found}

    def _state(self, tile: str, count: str, holes: Mapping[str, str]) -> str:
        """The lines that make the sum which the first block of tokens meets; none where all meet directly."""
        if self.is_quadratic:
            return ""
        own = "" if self.spec.causal else text(template.GATHER_OWN, {**holes, "count": count, "tile": tile})
        return text(template.NEW_STATE, {"gather": text(template.GATHER, {**holes, "gather_own": own})})

    def _between(self, from_state: str, from_pairs: str, holes: Mapping[str, str]) -> str:
        """The lines that make a result of the sum and of the tokens of the same block."""
        parts = [] if self.is_quadratic else [from_state]
        parts += [from_pairs] if self._is_pairwise else []
        assign = "=" if self.is_quadratic else "+="
        return "\n".join(text(part, {**holes, "assign": assign}) for part in parts)

    def _kernel(
        self, name: str, kind: str, body: str, tensors: Mapping[str, str], holes: Mapping[str, str]
    ) -> KernelText:
        return KernelText.of(name, kind, body, tensors, {**self._holes, **holes}, self.operands)

    def _keys_tile(self, fold: bool = True) -> str:
        folded = text(template.FOLD_KEYS, {}) if fold else ""
        return text(template.KEYS_TILE, {**self._holes, "fold_keys": folded})

    def _rows_tile(self, fold: bool = True) -> str:
        folded = text(template.FOLD_ROWS, {}) if fold else ""
        holes = {**self._holes, "load_gradient": text(template.LOAD_GRADIENT, self._holes), "fold_rows": folded}
        return text(template.ROWS_TILE, holes)

    def _keys_state(self, kind: str) -> KernelText:
        holes = {"name": "keys", "what": "keys", "sum_maths": _KEYS_MATHS, "count": "Sk", "tile": self._keys_tile()}
        return self._kernel(
            "keys_state_kernel", "by_key_channel", template.STATE_KERNEL, self.operands.keys("v"), holes
        )

    def _rows_state(self) -> KernelText:
        holes = {"name": "rows", "what": "queries", "sum_maths": _ROWS_MATHS, "count": "Sq", "tile": self._rows_tile()}
        tensors = {"q": "bhnd", "g": "bhne", "o": "bhne", "sums": ""}
        return self._kernel("rows_state_kernel", "by_key_channel", template.STATE_KERNEL, tensors, holes)

    def _forward(self) -> KernelText:
        pairs = template.WEIGHTS + template.FROM_WEIGHTS
        # Where registers hold both parts.
        parts = self.dtype is torch.bfloat16 and not self.spec.causal and max(self.head_dim, self.value_dim) <= 128
        times = (template.TIMES_PARTS if parts else template.TIMES_STATE).rstrip("\n")
        local = {**self.operands.local, "o": "bhne"} if self.operands.taps else {}
        tensors = {"q": "bhnd", **self.operands.keys("v"), **local, "r": "bhne", "sums": ""}
        holes = {
            "state": self._state(self._keys_tile(), "Sk", self._holes),
            "between": self._between(template.FROM_STATE, pairs, {**self._holes, "times_state": times}),
            "save": self._save,
            # A multiplication by the inverse rounds once more, which shows in float32 alone.
            "quotient": f"top / (bottom + {self.spec.eps!r})[:, None]"
            if self.dtype is torch.float32
            else f"top * (1.0 / (bottom + {self.spec.eps!r}))[:, None]",
            "local": self._local("+", "v", "out"),
            "slots": self.places("forward", "Sq"),
            "forward_fold": text(template.FOLD_KEYS, {}) if self.spec.causal else "",
        }
        return self._kernel("forward_kernel", "forward", template.FORWARD, tensors, holes)

    @property
    def _save(self) -> str:
        attended = text(template.SAVE_ATTENDED, self._holes) if self.operands.taps else ""
        return text(template.SAVE, {**self._holes, "save_attended": attended})

    def _local(self, sign: Sign, x: str, out: str) -> str:
        """The lines of the convolution of the values with its bias, or of its transpose."""
        if self.grid is None:
            return ""
        masked = "" if self.value_dim % self.blocks["forward"][2] == 0 else f", mask=e < {self.value_dim}, other=0.0"
        bias = f"tl.load(bias_ptr + e * bias_stride_e{masked}).to(tl.float32)[None, :]" if sign == "+" else ""
        return self.grid.add(sign, x, out, bias)

    def _queries(self) -> KernelText:
        seen = {**self._holes, "seen": "n[:, None] >= n[None, :]"}
        tensors = {"q": "bhnd", **self.operands.keys("v"), "g": "bhne", "o": "bhne", "r": "bhnd", "sums": ""}
        holes = {
            "state": self._state(self._keys_tile(), "Sk", self._holes),
            "load_gradient": text(template.LOAD_GRADIENT, self._holes),
            "between": self._between(
                template_backward.QUERIES_FROM_STATE, self._seen(template_backward.QUERIES_WEIGHTS), seen
            ),
            "fold": text(template.FOLD_KEYS, {}) if self.spec.causal else "",
        }
        return self._kernel("queries_kernel", "by_key_channel", template_backward.QUERIES, tensors, holes)

    def _seen(self, pairs: str) -> str:
        """Weights of pairs of tokens, without the line that masks them where all pairs count."""
        lines = pairs.splitlines(keepends=True)
        return pairs if self.spec.causal else "".join(line for line in lines if "$seen" not in line)

    def _behind(self) -> dict[str, str]:
        """The holes of a walk over keys, from the last to the first where only later queries read them."""
        start = "part * part_length + tile * BLOCK_N"
        if not self.spec.causal:
            return {"start": start}
        last = "tl.cdiv(tl.minimum(part_length, Sk - part * part_length), BLOCK_N) - 1"
        start = f"part * part_length + ({last} - tile) * BLOCK_N"
        return {"start": start, "from_part": "part + 1", "to_part": "parts"}

    def _keys(self) -> KernelText:
        holes = {**self._holes, **self._behind(), "seen": "n[:, None] <= n[None, :]"}
        tensors = {"q": "bhnd", **self.operands.keys("v"), "g": "bhne", "o": "bhne", "r": "bhnd", "sums": ""}
        rows = "\n".join(self._rows_tile(fold=False).splitlines()[1:])
        holes |= {
            "state": self._state(self._rows_tile(), "Sq", holes),
            "rows": rows if self._is_pairwise else "",
            "between": self._between(
                template_backward.KEYS_FROM_STATE, self._seen(template_backward.KEYS_WEIGHTS), holes
            ),
            "fold": text(template.FOLD_ROWS, {}) if self.spec.causal else "",
        }
        return self._kernel("keys_kernel", "by_key_channel", template_backward.KEYS, tensors, holes)

    def _values(self) -> KernelText:
        masked = text(template_backward.CAUSAL_BY_KEY, {}) if self.spec.causal else ""
        holes = {**self._holes, **self._behind(), "causal": masked}
        rows = text(template_backward.VALUES_ROWS, holes)
        fold = text(template_backward.VALUES_FOLD, {})
        tile = text(template_backward.VALUES_TILE, {"values_rows": rows, "values_fold": fold})
        taps = {"weight": "eyx"} if self.operands.taps else {}
        tensors = {"q": "bhnd", **self.operands.keys(), "g": "bhne", "r": "bhne", **taps, "sums": ""}
        holes |= {
            "state": self._state(tile, "Sq", holes),
            "rows": rows if self._is_pairwise else "",
            "between": self._between(template_backward.VALUES_FROM_STATE, template_backward.VALUES_WEIGHTS, holes),
            "local": self._local("-", "g", "result"),
            "slots": self.places("by_value_channel", "Sk"),
            "fold": fold if self.spec.causal else "",
        }
        return self._kernel("values_kernel", "by_value_channel", template_backward.VALUES, tensors, holes)

    def _filters(self) -> KernelText:
        taps, width = self.operands.taps, self.value_dim
        even = width % self.blocks["by_value_channel"][2] == 0
        masks = {"e_mask": "" if even else f" & (e < {width})[None, :]"}
        moved = [{"tap": str(tap), "shift": str(tap - taps // 2), **self._holes, **masks} for tap in range(taps)]
        holes = {
            "new_sums": "\n".join(f"sum_{tap} = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)" for tap in range(taps)),
            "add_taps": "\n".join(text(template_backward.ADD_TAP, given) for given in moved),
            "store_taps": "\n".join(
                f"tl.store(at + {tap} * {width}, tl.sum(sum_{tap}, 0), mask=e < {width})" for tap in range(taps)
            ),
        }
        tensors = {"g": "bhne", "v": "bhne", "sums": ""}
        return self._kernel("filters_kernel", "by_value_channel", template_backward.FILTERS, tensors, holes)
