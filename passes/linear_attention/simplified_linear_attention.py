"""Softmax attention over a grid of tokens gives way, in training, to linear attention with a convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from fxopt.ir.linear_attention import EPS
from fxopt.ir.nodes import shape
from fxopt.ir.site import Tier
from fxopt.passes.linear_attention.meaning import Kept
from fxopt.passes.linear_attention.module import Transition
from fxopt.passes.linear_attention.options import check_side, read_drop, read_names
from fxopt.passes.linear_attention.swap import Plan, Swap, swap_attentions
from fxopt.rewriter.progressive import Preparation, Student, Trainable
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.settings import check_positive, check_whole


@register_pass
@dataclass(frozen=True)
class SimplifiedLinearAttention(Trainable):
    """``softmax(q·kᵀ)·v -> Q_i (Σ_j K_jᵀ v_j) / (Q_i·Σ_j K_j + eps) + conv(v)_i``.

    ``Q = relu(q)`` and ``K = relu(k + p)``: SLAB's attention, linear in the number of tokens, without softmax and
    scale. ``p [heads, tokens, D]`` are learned positions, which start at 0; ``conv`` is a depthwise convolution of the
    values over the square grid that the tokens form, one ``kernel x kernel`` filter a channel, the same for all heads.
    Windows, as Swin has them, are grids of their own.

    An attention is found by what it computes, however it is spelled, and exchanged together with the smallest module
    around it: that module runs as one captured graph then, for any batch. Its parameters keep their names; new in the
    ``state_dict`` are ``key_positions``, ``depthwise_weight`` and ``depthwise_bias``, and ``step`` with a schedule.

    Refused, with the reason: tokens that form no square grid; a class token, unless ``class_tokens`` says that there is
    one (SLAB has none: it takes the mean of all tokens); causal attention; weights that are read elsewhere; and a bias
    or a mask, unless ``drop`` gives it up. SLAB gives up Swin's relative positions, for which ``p`` stands in, and
    the mask of its shifted windows: ``drop=("bias", "mask")``. A dropout of weights goes, as there are none.

    With ``steps`` or ``warmup`` training starts as the original: ``λ·softmax attention + (1 − λ)·linear attention``,
    ``λ`` 1 for ``warmup`` steps of the optimiser and then falling to 0 in ``steps`` more. In evaluation it is the
    linear attention at any ``λ``.

    Trainable: `fxopt.prepare`, training as usual, `fxopt.convert`. Prepare the model on the device, and in the dtype,
    that it is trained in.

    Args:
        kernel: the side of the filters, odd.
        class_tokens: how many tokens stand before the grid. They attend like all others; the convolution leaves them
            out.
        drop: what may be given up: ``"bias"``, ``"mask"``.
        select: names of the modules to exchange, with ``*`` and ``?``: one pattern or several.
        steps: optimiser steps in which ``λ`` falls; 0 for none.
        warmup: optimiser steps before that, with the original alone.
        eps: added to the sum of a row's weights.

    Raises:
        OptionError: an option of another type or out of range, or a pattern that fits no attention.
    """

    name: ClassVar[str] = "simplified-linear-attention"
    tier: ClassVar[Tier] = "trainable"
    requires: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = "attention"
    subject: ClassVar[str] = "an attention that the canonical operator stands for"

    kernel: int = 5
    class_tokens: int = 0
    drop: str | tuple[str, ...] = ()
    select: str | tuple[str, ...] = "*"
    steps: int = 0
    warmup: int = 0
    eps: float = EPS

    def __post_init__(self) -> None:
        check_side("kernel", self.kernel)
        check_whole("class_tokens", self.class_tokens, "tokens")
        for name in ("steps", "warmup"):
            check_whole(name, getattr(self, name), "optimiser steps")
        check_positive("eps", self.eps)
        read_names("select", self.select)
        read_drop(self.drop)

    def prepare(self, student: Student) -> Preparation:
        """Exchange the attentions of ``student`` in place."""
        select = read_names("select", self.select)
        transition = Transition(self.steps, self.warmup)
        swap = Swap(self.name, select, read_drop(self.drop), self.eps, transition, lengths=False, plan=self._plan)
        return swap_attentions(student, swap)

    def _plan(self, site: Node, kept: Kept, like: Tensor) -> Plan | str:
        tokens, keys = shape(site.args[0])[2], shape(site.args[1])[2]
        if kept.causal or kept.padded:
            what = "it is causal" if kept.causal else "it has a mask of padded keys"
            return f"{what}, and tokens of a grid all see one another; LinearAttention keeps that"
        if not (isinstance(tokens, int) and isinstance(keys, int)) or tokens != keys:
            return f"its {tokens} queries and {keys} keys are not the tokens of one grid of a fixed size"
        side = self._side(tokens)
        if isinstance(side, str):
            return side
        heads, width, channels = shape(site.args[1])[1], shape(site.args[1])[3], shape(site.args[2])[3]
        bound = 1 / self.kernel
        parameters = {
            "positions": like.new_zeros(heads, tokens, width),
            "weight": like.new_empty(channels, self.kernel, self.kernel).uniform_(-bound, bound),
            "bias": like.new_empty(channels).uniform_(-bound, bound),
        }
        title = f"linear attention, {self.kernel}x{self.kernel} convolution over {side}x{side} tokens"
        return Plan(title, side, self.class_tokens, parameters)

    def _side(self, tokens: int) -> int | str:
        """The side of the grid, or why there is none."""
        grid = tokens - self.class_tokens
        side = math.isqrt(max(grid, 0))
        if grid > 0 and side**2 == grid:
            return side
        one = math.isqrt(max(tokens - 1, 0)) ** 2 == tokens - 1 and tokens > 1 and not self.class_tokens
        hint = "a grid with one more: class_tokens=1, or take the mean of all tokens instead of a class token"
        return f"{tokens} tokens are not a square grid" + (f"; they are {hint}" if one else "")
