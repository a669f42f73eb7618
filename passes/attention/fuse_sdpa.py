"""``scaled_dot_product_attention`` becomes the same operator as every other spelling."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from fxopt.analysis.constants import Constants
from fxopt.analysis.gradients import may_need_gradient
from fxopt.ir.attention import AttentionSpec, KvMap
from fxopt.ir.expression import NEG_INF, Expr, I, J, S, call, const
from fxopt.ir.nodes import arguments, same_size, scalar, shape, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.passes.attention.band import length_of, with_bands
from fxopt.passes.attention.captures import renumbered, write_captures
from fxopt.passes.attention.layout import output_layout
from fxopt.passes.attention.masking import Logits, Masked, MaskProver, separate_mask
from fxopt.passes.attention.operands import repeated_heads
from fxopt.passes.attention.positions import Captured, Explained, explain
from fxopt.passes.attention.proofs import captures_of, described, not_hidden
from fxopt.passes.attention.region import lift_mask
from fxopt.passes.attention.row_terms import without_row_terms
from fxopt.passes.attention.space import Space
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Anything, Match, Op, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One SDPA call in ``space``: its operands, heads looked through, and its mask separated from the score."""

    node: Node
    queries: Node
    keys: Node
    values: Node
    space: Space
    operands: tuple[Captured, ...]
    masked: Masked
    notes: tuple[str, ...]
    kv_map: KvMap
    dropout: float


def _read(match: Match, prover: MaskProver) -> Call | Rejection:
    node = match.root
    given = arguments(node)
    queries, keys, values, bias = given["query"], given["key"], given["value"], given["attn_mask"]
    rejection = _unfit(queries, keys, values, given["scale"])
    if rejection:
        return rejection
    lead = shape(queries)[:-2]
    space = Space(lead, max(len(lead) - 1, 0) if len(lead) > 1 else len(lead), shape(queries)[-2], shape(keys)[-2])
    expression = _scaled(given["scale"], queries)
    explained = Explained(expression, (), {})
    dtypes = frozenset({tensor(queries).dtype})
    if isinstance(bias, Node):
        lifted = lift_mask(bias, (*lead, space.rows, space.columns), prover.constants)
        if isinstance(lifted, Rejection):
            return lifted
        for operand in lifted.operands:
            if obstacle := operand.obstacle(space):
                return Rejection(obstacle, (operand.node,))
        explained = explain(lifted.expression, lifted.operands, space, prover.lifter, tensor(queries).dtype)
        dtypes |= lifted.dtypes
        term, boolean = explained.expression, tensor(bias).dtype is torch.bool
        expression = call("where", term, expression, NEG_INF) if boolean else call("add", expression, term)
    differentiable = any(map(may_need_gradient, (queries, keys, *(operand.node for operand in explained.operands))))
    masked = separate_mask(expression, explained.operands, space, prover, Logits(dtypes, differentiable))
    reduced = without_row_terms(masked.score, explained.operands, prover.constants)
    masked = replace(masked, score=reduced.score)
    if given["is_causal"]:
        masked = replace(masked, mask=_and(masked.mask, call("le", J, I)))
    shared = repeated_heads(keys, values) if not given["enable_gqa"] else None
    lengths = length_of(queries, -2, space), length_of(keys, -2, space)
    operands = with_bands(masked, explained.operands, space, prover.bands, lengths)
    loaded = explained.loaded(operands, captures_of(masked.score, masked.mask))
    notes = (*reduced.notes, *loaded, *not_hidden(masked.score, operands))
    kv_map: KvMap = "group"
    if shared is not None:
        keys, values, kv_map = shared
    return Call(node, queries, keys, values, space, operands, masked, notes, kv_map, float(given["dropout_p"]))


def _unfit(queries: Node, keys: Node, values: Node, scale: Any) -> Rejection | None:
    ranks = {len(shape(x)) for x in (queries, keys, values)}
    if len(ranks) != 1 or not ranks <= {3, 4}:
        return Rejection(f"queries, keys and values of ranks {sorted(ranks)}; 3 or 4 alike are lifted", (queries,))
    if not tensor(queries).dtype.is_floating_point:
        return Rejection(f"attention over {tensor(queries).dtype} is not supported", (queries,))
    if scale is not None and scalar(scale) is None:
        return Rejection("the scale is not a number known at compile time", (queries,))
    if scale is None and not isinstance(shape(queries)[-1], int):
        return Rejection("the head dimension is dynamic", (queries,))
    if not all(same_size(shape(x)[0], shape(queries)[0]) for x in (keys, values)):
        return Rejection("keys or values are broadcast over the batch", (keys,))
    return None


def _scaled(scale: Any, queries: Node) -> Expr:
    factor = scalar(scale)
    width = shape(queries)[-1]
    if factor is None:
        assert isinstance(width, int)
        factor = width**-0.5
    return call("mul", S, const(float(factor)))


def _and(mask: Expr | None, term: Expr) -> Expr:
    return term if mask is None else call("and", mask, term)


def _write(builder: Builder, found: Call) -> Node:
    score, mask, captures, descriptions = write_captures(builder, found.masked, found.operands, found.space)
    spec = AttentionSpec(
        score=score,
        mask=mask,
        captures=descriptions,
        kv_map=found.kv_map,
        empty_rows="uniform" if found.masked.uniform else "zero",
        dropout=found.dropout,
        out_dtype=tensor(found.node).dtype,
        out_layout=output_layout(found.node),
    )
    flat = len(shape(found.queries)) == 3
    q, k, v = (
        builder.call(aten.unsqueeze.default, x, 1) if flat else x for x in (found.queries, found.keys, found.values)
    )
    # Autocast casts the operands to the dtype of the result.
    q, k, v = (builder.cast(x, tensor(found.node).dtype) for x in (q, k, v))
    result = builder.call(overload("attention"), q, k, v, captures, str(spec))
    return builder.call(aten.squeeze.dim, result, 1) if flat else result


def rules(program: Program) -> tuple[Rule, ...]:
    """The rules of this pass, bound to one program's constants."""
    prover = MaskProver(Constants(program))
    call_sdpa = Op(
        aten.scaled_dot_product_attention.default, Var("q"), Var("k"), Var("v"),
        attn_mask=Anything(), dropout_p=Anything(), is_causal=Anything(), scale=Anything(), enable_gqa=Anything(),
    )  # fmt: skip
    return (
        Rule(
            name="sdpa",
            kind="attention",
            patterns={"scaled_dot_product_attention": call_sdpa},
            check=lambda match: _read(match, prover),
            rewrite=_write,
            describe=lambda found: described(renumbered(found.masked)[1], found.notes),
        ),
    )


@register_pass
@dataclass(frozen=True)
class FuseSdpa:
    """``scaled_dot_product_attention(q, k, v, mask, p, is_causal, scale) -> fxopt.attention(q, k, v, captures, spec)``.

    A boolean mask and ``is_causal`` (top-left) become the mask expression, an additive mask part of the score. A row
    that keeps no key gives 0, as SDPA defines. Masks that do not depend on the inputs are evaluated and proved. An
    additive mask of the lowest finite number becomes a mask, and terms that are the same for all keys go, as in
    ``fuse-attention``.
    """

    name: ClassVar[str] = "fuse-sdpa"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, program: Program) -> PassResult:
        """Rewrite every call."""
        return apply_rules(program, rules(program))
