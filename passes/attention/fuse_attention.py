"""Attention, however it is spelled, becomes one operator."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch.fx import Node

from fxopt.analysis.constants import Constants
from fxopt.analysis.gradients import may_need_gradient
from fxopt.analysis.simplify import simplify
from fxopt.ir.attention import AttentionSpec, EmptyRows
from fxopt.ir.autocast import is_autocast
from fxopt.ir.expression import Expr, S, call, const
from fxopt.ir.nodes import is_call, shape, tensor
from fxopt.ir.operators import overload
from fxopt.ir.program import Program
from fxopt.ir.site import Tier
from fxopt.passes.attention.answers import Operands, answer
from fxopt.passes.attention.axes import is_key_like
from fxopt.passes.attention.band import length_of, with_bands
from fxopt.passes.attention.captures import renumbered, write_captures
from fxopt.passes.attention.layout import output_layout
from fxopt.passes.attention.log_sum_exp import LseReaders, answer_lse, read_lse
from fxopt.passes.attention.masking import Logits, Masked, MaskProver, separate_mask
from fxopt.passes.attention.operands import Heads, read_heads, unscaled
from fxopt.passes.attention.positions import Captured, Explained, explain
from fxopt.passes.attention.proofs import captures_of, described, not_hidden
from fxopt.passes.attention.readers import lead_sizes
from fxopt.passes.attention.region import Region, lift_region
from fxopt.passes.attention.row_terms import Reduced, without_row_terms
from fxopt.passes.attention.space import Space, space_of
from fxopt.passes.attention.weights import Weights, read_weights
from fxopt.passes.attention.zeroed import lift_kept, unlike_mask
from fxopt.rewriter.builder import Builder
from fxopt.rewriter.passes import PassResult, apply_rules
from fxopt.rewriter.pattern import Match, Op, Var
from fxopt.rewriter.registry import register_pass
from fxopt.rewriter.rule import Rejection, Rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """An attention that was recognised: what `_write` needs to build the canonical operator."""

    output: Node
    contracted: torch.dtype
    operands: tuple[Captured, ...]
    weights: Weights
    space: Space
    masked: Masked
    heads: Heads
    lse: LseReaders
    notes: tuple[str, ...]


def _recognise(match: Match, prover: MaskProver) -> Site | Rejection | None:
    weights = read_weights(match["weights"], match.root)
    if weights is None or isinstance(weights, Rejection):
        return weights
    logits = weights.softmax.args[0]
    assert isinstance(logits, Node)
    region = _region(logits, weights, prover.constants)
    if isinstance(region, Rejection):
        return region
    queries, keys = region.scores.args
    assert isinstance(queries, Node) and isinstance(keys, Node)
    lse = read_lse(logits, weights, match.root)
    if isinstance(lse, Rejection):
        return lse
    mixed = _mixed(region.scores, queries, keys) or _mixed(match.root, match["weights"], match["values"])
    rejection = mixed or _unfit(region, weights, lse, queries, keys, match["values"])
    if rejection:
        return rejection
    return _described(match, prover, region, weights, lse)


def _described(match: Match, prover: MaskProver, region: Region, weights: Weights, lse: LseReaders) -> Site | Rejection:
    """The site in the terms of the canonical operator, where these can say it."""
    queries, keys = region.scores.args
    assert isinstance(queries, Node) and isinstance(keys, Node)
    space = space_of(region.scores, keys, region.stages)
    for operand in region.operands:
        if obstacle := operand.obstacle(space):
            return Rejection(obstacle, (operand.node,))
    contracted = tensor(region.scores).dtype
    explained = explain(region.whole, region.operands, space, prover.lifter, contracted)
    logits = Logits(region.dtypes, any(map(may_need_gradient, (region.scores, *(o.node for o in region.operands)))))
    masked = _masked(region, explained, space, prover, logits)
    if isinstance(masked, str):
        return Rejection(masked, weights.fills)
    # The log-sum-exp has all terms.
    reduced = Reduced(masked.score) if lse else without_row_terms(masked.score, explained.operands, prover.constants)
    masked = replace(masked, score=reduced.score)
    if lse and weights.fills:
        return Rejection("the log-sum-exp of scores whose weights are set to 0 by their mask is read", lse.readers)
    if lse and masked.uniform:
        reason = "the log-sum-exp of the scores is read, which in a row without keys is that of the filled number"
        return Rejection(reason, lse.readers)
    heads = read_heads(queries, keys, match["values"], space)
    if isinstance(heads, Rejection):
        return heads
    if (weights.readers or lse) and lead_sizes((space.batch, space.heads), shape(weights.softmax)[:-2]) is None:
        what = "attention weights" if weights.readers else "log-sum-exp of the scores"
        reason = f"the {what} escape in a shape of which several sizes are dynamic: {weights.softmax}"
        return Rejection(reason, (weights.softmax,))
    lengths = length_of(queries, -2, space), length_of(keys, -1, space)
    operands = with_bands(masked, explained.operands, space, prover.bands, lengths)
    loaded = explained.loaded(operands, captures_of(masked.score, masked.mask))
    notes = (*reduced.notes, *loaded, *not_hidden(masked.score, operands))
    return Site(match.root, contracted, operands, weights, space, masked, heads, lse, notes)


def _region(logits: Node, weights: Weights, constants: Constants) -> Region | Rejection:
    region = lift_region(logits, constants)
    if isinstance(region, Rejection) or not weights.fills:
        return region
    return lift_kept(weights.fills, region, constants)


def _masked(region: Region, explained: Explained, space: Space, prover: MaskProver, logits: Logits) -> Masked | str:
    """The mask taken out of the scores, or why weights that are set to 0 are not those that it hides."""
    if region.kept is None:
        return separate_mask(explained.expression, explained.operands, space, prover, logits)
    kept, score, _ = explained.expression.args
    masked = separate_mask(score, explained.operands, space, prover, logits)
    return unlike_mask(masked, kept, explained.operands, space, prover, logits) or masked


def _unfit(
    region: Region, weights: Weights, lse: LseReaders, queries: Node, keys: Node, values: Node
) -> Rejection | None:
    """Why a lifted region is still not an attention that may be rewritten."""
    if not tensor(queries).dtype.is_floating_point:
        return Rejection(f"attention over {tensor(queries).dtype} is not supported", (queries,))
    if len(shape(queries)) < 2 or len(shape(keys)) < 2 or len(shape(values)) < 2:
        return Rejection("queries, keys and values need at least two axes", (queries,))
    if not is_key_like(keys, values):
        reason = "the contraction does not sum over the feature axis of keys: keys must enter as k.transpose(-2, -1)"
        return Rejection(reason, (region.scores, keys))
    inside = {*region.nodes, *weights.nodes, *lse.nodes}
    for node in region.nodes:
        outside = [user for user in node.users if user not in inside]
        if outside:
            return Rejection(f"the scores escape: {node} is also read by {outside[0]}", (node, *outside))
    return None


def _mixed(product: Node, left: Node, right: Node) -> Rejection | None:
    """Why a product can't be computed, as eager says when it runs it. From PyTorch 2.12 on it isn't captured either."""
    dtypes = tensor(left).dtype, tensor(right).dtype
    if dtypes[0] == dtypes[1]:
        return None
    # Autocast makes the two alike, but leaves float64 as it is.
    if torch.float64 not in dtypes and is_autocast(product, tensor(left).device.type):
        return None
    return Rejection(f"a product of {dtypes[0]} and {dtypes[1]}", (product,))


def _write(builder: Builder, site: Site) -> Node:
    readers, softmax = site.weights.readers, site.weights.softmax
    # Other readers of the weights may stand before the site's result, and what they get before them.
    with builder.before(softmax if readers else builder.at):
        operands = _operands(builder, site)
    # Values that are there before the softmax are laid out there: one kernel may then give output and weights.
    with builder.before(softmax if readers and site.heads.value_node < softmax else builder.at):
        values = builder.cast(site.heads.values(builder, operands.queries), tensor(site.output).dtype)
    if readers:
        answer(builder, readers, softmax, operands)
    spec = replace(
        operands.spec,
        dropout=site.weights.dropout,
        out_dtype=tensor(site.output).dtype,
        out_layout=output_layout(site.output),
    )
    sources = (operands.queries, operands.keys, values, list(operands.captures))
    if not site.lse:
        result = builder.call(overload("attention"), *sources, str(spec))
        return site.heads.restore(builder, result, site.output)
    both = builder.call(overload("attention_with_lse"), *sources, str(spec))
    result, lse = (builder.call(operator.getitem, both, n) for n in range(2))
    answer_lse(builder, lse, site.lse, shape(softmax)[:-2])
    return site.heads.restore(builder, result, site.output)


def _operands(builder: Builder, site: Site) -> Operands:
    """Queries, keys and captured tensors, and the specification but for what only the result knows."""
    score, mask, nodes, captures = write_captures(builder, site.masked, site.operands, site.space)
    queries, factor = unscaled(builder, site.heads.queries(builder))
    keys, key_factor = unscaled(builder, site.heads.keys(builder, queries))
    # Autocast casts the operands of a contraction to the dtype of its result.
    queries, keys = (builder.cast(x, site.contracted) for x in (queries, keys))
    spec = AttentionSpec(
        score=_scale(score, factor * key_factor),
        mask=mask,
        captures=captures,
        kv_map=site.heads.kv_map,
        empty_rows=_empty_rows(site),
        softmax_dtype=tensor(site.weights.softmax).dtype,
    )
    return Operands(queries, keys, tuple(nodes), spec)


def _empty_rows(site: Site) -> EmptyRows:
    if site.weights.fills and site.masked.mask is not None:
        return "zero"
    if site.masked.uniform:
        return "uniform"
    return "zero" if is_call(site.weights.softmax, aten._safe_softmax.default) else "nan"


def _scale(score: Expr, factor: float) -> Expr:
    if factor == 1.0:
        return score
    return simplify(score.replace(lambda e: call("mul", S, const(factor)) if e == S else e))


def rules(program: Program) -> tuple[Rule, ...]:
    """The rules of this pass, bound to one program's constants."""
    prover = MaskProver(Constants(program))
    return (
        Rule(
            name="attention",
            kind="attention",
            patterns={"softmax between two contractions": Op(aten.matmul.default, Var("weights"), Var("values"))},
            check=lambda match: _recognise(match, prover),
            rewrite=_write,
            describe=lambda site: described(renumbered(site.masked)[1], site.notes),
        ),
    )


@register_pass
@dataclass(frozen=True)
class FuseAttention:
    """``dropout(softmax(f(q @ kᵀ))) @ v -> fxopt.attention(q, k, v, captures, spec)``.

    ``f`` is any composition of pointwise operations, casts and views that keep rows and keys apart; every operand that
    is broadcast onto the scores is lifted into the score and mask expressions. See `fxopt.ir.attention.AttentionSpec`.

    Masks that fill with the lowest finite number of a dtype, or add it, become masks as those of −inf do:

        where(m, x, lowest)       -> mask m; a row without keys gives the mean of all values
        x + where(m, 0, lowest)   -> the same

    The second holds because rounding absorbs any score far smaller than a unit in the last place of the lowest number
    (2·10³¹ for bfloat16's in float32; not so in float16, where such sums stay scores). A gradient flows through the sum
    even in a row without keys, so where one may be needed the sum stays a score too. Masks that fill with different
    numbers, or overflow when they are added to one another, stay scores as well.

    Weights may be set to 0 after the softmax, by the mask of the scores or in the rows that it leaves no key: such rows
    give 0. ``nan_to_num`` is not taken for that, since it hides NaN of queries and keys as well.

    Finite terms that are the same for all keys of a row are dropped, as softmax doesn't see them: numbers, positions,
    integers and constants (what comes at run time may be −inf or NaN, and has a gradient):

        s + c + f(i)              -> s

    What is added to the scores as a whole, such as ``slope·(j - i)``, isn't taken apart, as the parts would be rounded
    where the whole isn't; kernels do that block by block. Where the log-sum-exp is read, which has these terms, they
    stay.

    ``logsumexp`` of the same scores, over the keys, comes with the result, by ``fxopt.attention_with_lse``, and what is
    computed from it is computed after that. Where all weights are read too, the site stays: what the model does is the
    least then.

    Weights that are read elsewhere too are computed apart, exactly, and as little of them as is read: those of some
    rows by ``fxopt.attention_weights`` on those queries, sums over the queries and the diagonal by
    ``fxopt.attention_statistics``, and the whole weights only for a reader that needs them.
    """

    name: ClassVar[str] = "fuse-attention"
    tier: ClassVar[Tier] = "exact"
    requires: ClassVar[tuple[str, ...]] = ("contractions", "fills")

    def run(self, program: Program) -> PassResult:
        """Fuse every site."""
        return apply_rules(program, rules(program))
