"""LayerNorm and RMSNorm give way, during training, to a BatchNorm that folds into its neighbours afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from fxopt.ir.site import Tier
from fxopt.passes.norm.recognise import NormModule
from fxopt.passes.norm.rep_module import RepNorm, Transition
from fxopt.passes.norm.running import Statistics
from fxopt.passes.norm.swap import Swap, check_selection, read_patterns, swap_norms
from fxopt.passes.norm.token_mask import TokenMask
from fxopt.rewriter.progressive import Preparation, Student, Trainable
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.settings import check_number, check_whole


@register_pass
@dataclass(frozen=True)
class RepBatchNorm(Trainable):
    """``norm(x) -> λ·norm(x) + (1 − λ)·(BN(x) + α·x)``, ``λ`` falling from 1 to 0; in evaluation ``a ⊙ x + b``.

    ``norm`` is a LayerNorm or RMSNorm over the last axis of ``x [..., C]`` that a module of its own computes, whatever
    the module's class. ``BN(x) = γ ⊙ (x − μ) / √(σ² + ε) + β`` has the statistics of each channel over all tokens of
    the batch, of all processes where there are several, and without padded tokens where the model is given a mask.
    ``α`` is one trained number a norm. In evaluation, at any ``λ``, it is ``BN(x) + α·x`` with running statistics:
    ``s = γ / √(σ² + ε)``, ``a = s + α``, ``b = β − s·μ``.

    ``λ`` is 1 for the first ``warmup`` steps of the optimiser and falls linearly to 0 in the ``steps`` after them. Let
    both together be about 0.8 of the whole training: what is left trains the norms as they will be used. ``steps=0``
    with ``alpha=None`` is the plain exchange of LayerNorm for BatchNorm, there for comparison: small models may take
    it, deep ones train badly with it or not at all.

    A step of the optimiser moves the running statistics towards those of the last batch before it; a forward alone,
    repeated or recomputed, moves nothing.

    The original's parameters keep their names. New in the ``state_dict`` are ``batch_weight``, ``batch_bias`` and
    ``alpha``, and the buffers ``running_mean``, ``running_var`` and ``step``. Weight decay is meant for none of them.

    Trainable: `fxopt.prepare`, training as usual, `fxopt.convert`, after which ``a`` and ``b`` stand under the norm's
    name as ``weight`` and ``bias``.

    Args:
        steps: optimiser steps in which ``λ`` falls.
        warmup: optimiser steps before that, with the original alone.
        recalibrate: how many batches of the data given to `fxopt.convert` the statistics are taken from; ``None``: all.
        select: names of the norms to exchange, with ``*`` and ``?``: one pattern or several.
        alpha: where ``α`` starts; ``None`` for no such term.
        start: ``γ`` and ``β`` start as this multiple of the original's weight and bias.
        momentum: how far one step moves the running statistics towards those of the batch.
        eps: ``ε``.
        mask: the argument of the model's forward that says which tokens count: boolean or integer, nonzero for those
            that do, its axes the leading ones of what the norms read. ``None``, or ``"attention_mask"`` where the
            forward has no such argument: all tokens count.
        synchronize: whether the statistics are those of all processes of ``torch.distributed``.

    Raises:
        OptionError: an option out of range, a pattern that fits no norm, or a mask that is no argument.
    """

    name: ClassVar[str] = "rep-batch-norm"
    tier: ClassVar[Tier] = "trainable"
    requires: ClassVar[tuple[str, ...]] = ()
    kind: ClassVar[str] = "norm"
    subject: ClassVar[str] = "a LayerNorm or RMSNorm over the last axis, computed by a module of its own"

    steps: int
    warmup: int = 0
    recalibrate: int | None = None
    select: str | tuple[str, ...] = "*"
    alpha: float | None = 1.0
    start: float = 1.0
    momentum: float = 0.1
    eps: float = 1e-5
    mask: str | None = "attention_mask"
    synchronize: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "warmup"):
            check_whole(name, getattr(self, name), "optimiser steps")
        for name in ("start", "alpha"):
            if name == "start" or self.alpha is not None:
                check_number(name, getattr(self, name))
        check_selection(self.select, self.mask)
        self._statistics()

    def prepare(self, student: Student) -> Preparation:
        """Exchange the norms of ``student`` in place."""
        return swap_norms(student, Swap(self.name, read_patterns(self.select), self.mask, self._build))

    def _build(self, original: nn.Module, meaning: NormModule, mask: TokenMask, like: Tensor) -> RepNorm:
        transition = Transition(self.steps, self.warmup, self.alpha, self.start)
        return RepNorm(original, meaning, mask, self._statistics(), like, transition)

    def _statistics(self) -> Statistics:
        return Statistics(self.eps, self.momentum, self.synchronize, self.recalibrate)
