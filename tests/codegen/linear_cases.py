"""Operands of linear attention for the tests of its meaning and of its kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fxopt.codegen.meanings  # noqa: F401 - canonical operators get their meaning
from fxopt.codegen.linear_attention.operands import Operands, read_operands
from fxopt.ir.linear_attention import LinearSpec
from fxopt.ir.operators import overload

Given = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class LinearCase:
    """One linear attention: sizes, optional operands as `Operands` prints them, what is causal, where the grid is."""

    head_dim: int
    value_dim: int
    rows: int
    keys: int
    operands: str = ""
    causal: bool = False
    side: int = 0
    first: int = 0
    batch: int = 2
    heads: int = 2

    def spec(self, dtype: torch.dtype, layout: str = "bhsd") -> LinearSpec:
        """The specification."""
        return LinearSpec(self.causal, self.side, self.first, out_dtype=dtype, out_layout=layout)  # type: ignore[arg-type]

    @property
    def optional(self) -> Operands:
        """The optional operands."""
        return read_operands(self.operands)

    def draw(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Given:
        """All operands, with strides of packed projections; a case is never without a query that meets no key."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        q = normal(self.batch, self.rows, self.heads, self.head_dim).transpose(1, 2)
        packed = normal(self.batch, self.keys, self.heads, self.head_dim + self.value_dim).transpose(1, 2)
        k, v = packed.split((self.head_dim, self.value_dim), -1)
        q[0, 0, 0] = -1.0
        keep = (torch.rand(self.batch, self.keys, generator=generator) < 0.7).to(device)
        taps = self.optional.taps
        return (
            q,
            k,
            v,
            normal(self.heads, self.keys, self.head_dim) if self.optional.positions else None,
            keep if self.optional.keep else None,
            normal(self.value_dim, taps, taps) * 0.2 if taps else None,
            normal(self.value_dim) if taps else None,
        )


def widened(given: Given) -> Given:
    """The operands in float64, as leaves that record gradients."""
    return tuple(x.detach().double().requires_grad_() if x is not None and x.is_floating_point() else x for x in given)


def leaves(given: Given) -> list[Tensor]:
    """The operands that have gradients."""
    return [x for x in given if x is not None and x.is_floating_point()]


def exact(case: LinearCase, given: Given, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Result and gradients in float64."""
    return eager(case, widened(given), grad.double())


def eager(case: LinearCase, given: Given, grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Result and gradients by the meaning, in the dtype of the operands."""
    given = tuple(x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in given)
    spec = replace(case.spec(grad.dtype), out_dtype=grad.dtype)
    out = overload("linear_attention")(*given, str(spec))
    return out.detach(), torch.autograd.grad(out, leaves(given), grad)


CASES: dict[str, LinearCase] = {
    "window": LinearCase(32, 32, 49, 49, "pc5", side=7, batch=3),
    "window-odd": LinearCase(24, 40, 49, 49, "pc3", side=7, batch=1),
    "class-token": LinearCase(16, 16, 26, 26, "pc5", side=5, first=1),
    "grid": LinearCase(16, 16, 100, 100, "pc3", side=10, batch=1),
    "sequence": LinearCase(32, 32, 150, 150),
    "padded": LinearCase(32, 48, 70, 70, "k"),
    "cross": LinearCase(20, 40, 33, 70, "pk"),
    "causal": LinearCase(32, 32, 150, 150, causal=True),
    "causal-padded": LinearCase(24, 48, 70, 70, "k", causal=True),
    "short": LinearCase(64, 64, 9, 9, "p"),
    "one-query": LinearCase(16, 16, 1, 3),
    "class-token before tiles": LinearCase(16, 16, 101, 101, "pc3", side=10, first=1, batch=1),
}
