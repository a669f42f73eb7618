"""Softmax attention over sequences gives way, in training, to linear attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from fxopt.ir.linear_attention import EPS
from fxopt.ir.site import Tier
from fxopt.passes.linear_attention.meaning import Kept
from fxopt.passes.linear_attention.module import Transition
from fxopt.passes.linear_attention.options import read_drop, read_names
from fxopt.passes.linear_attention.swap import Plan, Swap, swap_attentions
from fxopt.rewriter.progressive import Preparation, Student, Trainable
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.settings import check_positive, check_whole


@register_pass
@dataclass(frozen=True)
class LinearAttention(Trainable):
    """``softmax(q·kᵀ)·v -> Q_i (Σ_j K_jᵀ v_j) / (Q_i·Σ_j K_j + eps)``, ``Q = relu(q)``, ``K = relu(k)``.

    The sums go over the keys that the original sees: all of them, ``j <= i`` where it is causal, without padded ones
    where it has a mask of keys. What a mask is that the model makes elsewhere, the example arguments prove: give some
    with padding if there is any. Sequences may have any length. No parameter is new. Everything else is as
    `SimplifiedLinearAttention` has it: an attention is found by what it computes and exchanged together with the
    smallest module around it; any other mask or bias is refused unless ``drop`` gives it up; with ``steps`` or
    ``warmup`` training starts as the original.

    Trainable: `fxopt.prepare`, training as usual, `fxopt.convert`. Prepare the model on the device, and in the dtype,
    that it is trained in.

    Args:
        drop: what may be given up: ``"bias"``, ``"mask"``.
        select: names of the modules to exchange, with ``*`` and ``?``: one pattern or several.
        steps: optimiser steps in which ``λ`` falls; 0 for none.
        warmup: optimiser steps before that, with the original alone.
        eps: added to the sum of a row's weights.

    Raises:
        OptionError: an option of another type or out of range, or a pattern that fits no attention.
    """

    name: ClassVar[str] = "linear-attention"
    tier: ClassVar[Tier] = "trainable"
    requires: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = "attention"
    subject: ClassVar[str] = "an attention that the canonical operator stands for"

    drop: str | tuple[str, ...] = ()
    select: str | tuple[str, ...] = "*"
    steps: int = 0
    warmup: int = 0
    eps: float = EPS

    def __post_init__(self) -> None:
        for name in ("steps", "warmup"):
            check_whole(name, getattr(self, name), "optimiser steps")
        check_positive("eps", self.eps)
        read_names("select", self.select)
        read_drop(self.drop)

    def prepare(self, student: Student) -> Preparation:
        """Exchange the attentions of ``student`` in place."""
        select = read_names("select", self.select)
        transition = Transition(self.steps, self.warmup)
        swap = Swap(self.name, select, read_drop(self.drop), self.eps, transition, lengths=True, plan=_plan)
        return swap_attentions(student, swap)


def _plan(site: Node, kept: Kept, like: Tensor) -> Plan | str:
    """Whatever its sizes; its masks were read before."""
    return Plan("causal linear attention" if kept.causal else "linear attention")
