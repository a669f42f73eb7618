"""Feed-forward blocks that the kernel is tested on: operands and the meaning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.codegen.mlp.narrow_mlp.problem import Problem
from fxopt.codegen.mlp.reference import mlp

B16, F16 = torch.bfloat16, torch.float16
Operands = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Case:
    """A block without its sizes."""

    activation: str
    dtype: torch.dtype
    up_bias: bool = True
    down_bias: bool = True
    residual: bool = False

    def operands(
        self, *rows: int, width: int, hidden: int, out: int = 0, device: str = "cpu", seed: int = 0
    ) -> Operands:
        """``x``, the weights and biases of both layers, and the residual; results of the size of one."""
        out = out or width
        generator = torch.Generator().manual_seed(seed)

        def draw(*sizes: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(sizes, generator=generator) * scale).to(device, self.dtype)

        x, up, down = draw(*rows, width), draw(hidden, width, scale=width**-0.5), draw(out, hidden, scale=hidden**-0.5)
        biases = draw(hidden) if self.up_bias else None, draw(out) if self.down_bias else None
        return x, up, biases[0], down, biases[1], draw(*rows, out) if self.residual else None

    def problem(self, width: int, hidden: int, out: int = 0) -> Problem:
        """The problem of these sizes."""
        given = (self.up_bias, self.down_bias, self.residual)
        return Problem(width, hidden, out or width, self.activation, self.dtype, *given)

    def meaning(self, operands: Sequence[Tensor | None]) -> Tensor:
        """The block in plain PyTorch, in the dtype of ``operands``."""
        x, up, up_bias, down, down_bias, residual = operands
        assert x is not None and up is not None and down is not None
        return mlp(x, up, up_bias, down, down_bias, residual, self.activation)


#: What differs in the text of the kernel: activations, operands that are not there, and dtypes.
CASES = {
    "gelu bf16": Case("gelu", B16, residual=True),
    "gelu f16": Case("gelu", F16),
    "tanh bf16": Case("gelu_tanh", B16),
    "tanh f16": Case("gelu_tanh", F16, down_bias=False),
    "silu f16": Case("silu", F16, up_bias=False, residual=True),
    "silu bf16": Case("silu", B16, up_bias=False, down_bias=False),
    "relu bf16": Case("relu", B16, up_bias=False, down_bias=False, residual=True),
    "relu f16": Case("relu", F16),
    "sigmoid bf16": Case("sigmoid", B16, down_bias=False),
    "sigmoid f16": Case("sigmoid", F16),
}


def wide(operands: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``operands`` in float64."""
    return [None if x is None else x.double() for x in operands]
