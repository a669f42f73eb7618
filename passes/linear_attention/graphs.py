"""The graphs of one exchanged module: in training and in evaluation, with its masks and without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from fxopt.ir.program import Program
from fxopt.passes.linear_attention.calling import Graphs
from fxopt.passes.linear_attention.capture import Isolated, attentions, canonical, isolated
from fxopt.passes.linear_attention.meaning import Kept, Proof, read_attention
from fxopt.passes.linear_attention.missing_masks import choices, optional, without
from fxopt.passes.linear_attention.replace import (
    SHARE,
    Captured,
    Form,
    forget_results,
    replace_attentions,
    results_of_weights,
)
from fxopt.rewriter.progressive import Call


@dataclass(frozen=True)
class Making:
    """What the graphs of one module are made of.

    Attributes:
        module: the original.
        call: how the model calls it.
        forms: what stands in the place of each of its attentions.
        parameters: the new ones, by name.
        drop: what may be given up.
        lengths: whether sequences may have any length.
        blends: whether training starts as the original.
    """

    module: nn.Module
    call: Call
    forms: tuple[Form, ...]
    parameters: Mapping[str, Tensor]
    drop: tuple[str, ...]
    lengths: bool
    blends: bool

    def graphs(self, evaluated: Isolated, proofs: tuple[Proof, ...]) -> tuple[Graphs, Graphs] | str:
        """What runs in training, and in evaluation; or why the module can't be exchanged.

        Args:
            evaluated: the module in evaluation, canonical; it is edited.
            proofs: what the model's program says of each of its attentions.
        """
        masks = optional(evaluated)
        given = self._pair(self.call, evaluated, proofs)
        if isinstance(given, str):
            return given
        bare = {places: self._without(places, _left(proofs, masks, places)) for places in choices(tuple(masks))}
        return Graphs(given[0], _of_mode(bare, 0)), Graphs(given[1], _of_mode(bare, 1))

    def _without(self, places: tuple[int, ...], proofs: tuple[Proof, ...]) -> tuple[Captured, Captured] | str:
        """The graphs for calls with ``None`` at ``places``, or why there are none."""
        call = without(self.call, places)
        evaluated = isolated(self.module, call, training=False, lengths=self.lengths)
        pair = evaluated if isinstance(evaluated, str) else self._bare(call, evaluated, proofs)
        return f"without which {pair}; give it a mask that hides nothing" if isinstance(pair, str) else pair

    def _bare(self, call: Call, evaluated: Isolated, proofs: tuple[Proof, ...]) -> tuple[Captured, Captured] | str:
        evaluated = replace(evaluated, program=canonical(evaluated.program))
        forms = self._forms(evaluated.program, proofs)
        objection = forms if isinstance(forms, str) else _grid_objection(forms)
        return objection or self._pair(call, evaluated, proofs)

    def _pair(self, call: Call, evaluated: Isolated, proofs: tuple[Proof, ...]) -> tuple[Captured, Captured] | str:
        training = self._training(call, evaluated)
        if isinstance(training, str):
            return training
        trained, forms = self._forms(training.program, proofs), self._forms(evaluated.program, proofs)
        if isinstance(trained, str) or isinstance(forms, str):
            return "it computes another attention in training than in evaluation"
        device = next(iter(self.parameters.values()), torch.empty(0)).device
        inputs = {**self.parameters, SHARE: torch.zeros((), device=device)}
        return (
            replace_attentions(training, lambda _, place: trained[place], inputs, blended=self.blends),
            replace_attentions(evaluated, lambda _, place: forms[place], inputs, blended=False),
        )

    def _training(self, call: Call, evaluated: Isolated) -> Isolated | str:
        captured = isolated(self.module, call, training=True, lengths=self.lengths)
        if isinstance(captured, str):
            return captured
        if captured.program.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
            return "in training it writes buffers of its own, such as running statistics, which its gradients read"
        # What dropout leaves of weights is in this graph only, so that none may be asked for.
        if _results_alike(captured.program, evaluated.program):
            forget_results(captured.program, results_of_weights(evaluated.program))
        return replace(captured, program=canonical(captured.program))

    def _forms(self, program: Program, proofs: tuple[Proof, ...]) -> list[Form] | str:
        """`forms` with what each attention of ``program`` keeps, or why they can't stand there."""
        sites = attentions(program)
        if len(sites) != len(self.forms):
            return f"it computes {len(sites)} attentions instead of {len(self.forms)}"
        read = [read_attention(site, self.drop, proof) for site, proof in zip(sites, proofs, strict=True)]
        objections = [kept for kept in read if isinstance(kept, str)]
        if objections:
            return objections[0]
        return [replace(f, kept=kept) for f, kept in zip(self.forms, read, strict=True) if isinstance(kept, Kept)]


def _of_mode(
    pairs: Mapping[tuple[int, ...], tuple[Captured, Captured] | str], mode: Literal[0, 1]
) -> dict[tuple[int, ...], Captured | str]:
    return {places: pair if isinstance(pair, str) else pair[mode] for places, pair in pairs.items()}


def _left(proofs: tuple[Proof, ...], masks: Mapping[int, bool], places: tuple[int, ...]) -> tuple[Proof, ...]:
    """What stays proved without the ``masks`` at ``places``: whether the others are causal, if these never were."""
    if all(masks[place] for place in places):
        return tuple(replace(proof, padded=False) for proof in proofs)
    return tuple(Proof(unread=proof.unread) for proof in proofs)


def _grid_objection(forms: list[Form]) -> str:
    causal = any(form.side and form.kept.causal for form in forms)
    return "it is causal, and tokens of a grid all see one another" if causal else ""


def _results_alike(program: Program, other: Program) -> bool:
    """Whether both give results of the same structure."""
    assert program.signature is not None and other.signature is not None
    return bool(program.signature.out_spec == other.signature.out_spec)
