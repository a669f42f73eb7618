"""LayerNorm and RMSNorm give way to a norm without means whose second moments are smoothed over steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fxopt.ir.site import Tier
from fxopt.passes.norm.recognise import NormModule
from fxopt.passes.norm.running import Statistics
from fxopt.passes.norm.swap import Swap, check_selection, read_patterns, swap_norms
from fxopt.passes.norm.token_mask import TokenMask
from fxopt.passes.norm.unified_module import Smoothing, UnifiedNormalisation
from fxopt.rewriter.progressive import Preparation, Student, Trainable
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.settings import check_switch, check_whole


@register_pass
@dataclass(frozen=True)
class UnifiedNorm(Trainable):
    """``norm(x) -> γ ⊙ x / √(v + ε) + β``, ``v [C]`` a second moment over tokens; in evaluation the running one.

    ``norm`` is a LayerNorm or RMSNorm over the last axis of ``x [..., C]`` that a module of its own computes. Let
    ``v_t`` be the mean of ``x²`` over the tokens that count in step ``t``. For the first ``warmup`` steps of the
    optimiser ``v = v_t``; after them ``v`` is the geometric mean ``exp(mean log(v_i + ε)) − ε`` of the last ``window``
    steps. The running ``v`` moves towards it by ``momentum``.

    Backward, with ``g`` the gradient of ``z = x / √(v + ε)`` and ``m_t`` the mean of ``g ⊙ z`` over tokens, the
    gradient of ``x`` is ``r ⊙ (g − ψ ⊙ z) / √(v + ε)``. In the warm-up ``ψ = m_t``, which is the derivative; after it
    ``ψ`` moves towards the mean of the last ``window`` values of ``m`` by ``momentum`` a step. ``r`` is
    ``√((v + ε) / (v_running + ε))`` within 1/5 and 5, and 1 in the first 1000 steps and the warm-up. Under a gradient
    scaler ``ψ`` is in scaled units, so a scale that changes disturbs it for a few steps.

    With ``filter_outliers`` a step after the warm-up in which the arithmetic and geometric mean of a channel's window
    lie further apart than ``window`` times the variance of ``√v`` over the window's steps and channels uses its own
    ``v_t``, and leaves the running value in the window instead of it.

    γ and β are the original's weight and bias under their names, made where it has none. New in the ``state_dict`` are
    the buffers ``running_second``, ``second_window``, ``gradient_window``, ``gradient_average`` and ``step``.

    Trainable: `fxopt.prepare`, training as usual, `fxopt.convert`, after which ``γ / √(v + ε)`` and
    ``β`` stand under the norm's name as ``weight`` and ``bias``.

    Args:
        warmup: optimiser steps before smoothing starts.
        window: how many steps are smoothed over.
        filter_outliers: see above; meant for vision, not for language.
        recalibrate: how many batches of the data given to `fxopt.convert` the statistics are taken from; ``None``: all.
        select: names of the norms to exchange, with ``*`` and ``?``: one pattern or several.
        momentum: how far one step moves running values.
        eps: ``ε``.
        mask: the argument of the model's forward that says which tokens count; see rep-batch-norm.
        synchronize: whether the statistics are those of all processes of ``torch.distributed``.

    Raises:
        OptionError: an option out of range, a pattern that fits no norm, or a mask that is no argument.
    """

    name: ClassVar[str] = "unified-norm"
    tier: ClassVar[Tier] = "trainable"
    requires: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = "norm"
    subject: ClassVar[str] = "a LayerNorm or RMSNorm over the last axis, computed by a module of its own"

    warmup: int = 4000
    window: int = 4
    filter_outliers: bool = False
    recalibrate: int | None = None
    select: str | tuple[str, ...] = "*"
    momentum: float = 0.1
    eps: float = 1e-5
    mask: str | None = "attention_mask"
    synchronize: bool = True

    def __post_init__(self) -> None:
        check_whole("warmup", self.warmup, "optimiser steps")
        check_whole("window", self.window, "optimiser steps", least=1)
        check_switch("filter_outliers", self.filter_outliers)
        check_selection(self.select, self.mask)
        self._statistics()

    def prepare(self, student: Student) -> Preparation:
        """Exchange the norms of ``student`` in place."""
        return swap_norms(student, Swap(self.name, read_patterns(self.select), self.mask, self._build))

    def _build(self, original: nn.Module, meaning: NormModule, mask: TokenMask, like: Tensor) -> UnifiedNormalisation:
        smoothing = Smoothing(self.warmup, self.window, self.filter_outliers)
        return UnifiedNormalisation(original, meaning, mask, self._statistics(), like, smoothing)

    def _statistics(self) -> Statistics:
        return Statistics(self.eps, self.momentum, self.synchronize, self.recalibrate)
