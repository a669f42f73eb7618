"""Random spellings: one piece chosen for each part of an attention, composed into a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fxopt.testing import Sizes, draw, row_mask

Piece = Callable[..., Tensor]


def _repeat(x: Tensor, times: int) -> Tensor:
    b, g, t, d = x.shape
    return x[:, :, None].expand(b, g, times, t, d).reshape(b, g * times, t, d)


def _safe_softmax(s: Tensor) -> Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def _causal(s: Tensor) -> Tensor:
    return torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()


def _window(s: Tensor) -> Tensor:
    i = torch.arange(s.shape[-2], device=s.device)[:, None] - torch.arange(s.shape[-1], device=s.device)
    return (i >= 0) & (i < 4)


def _flat_product(a: Tensor, b: Tensor) -> Tensor:
    product = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
    return product.view(*a.shape[:-1], b.shape[-1])


#: ``contract(a, b) = a·b`` over the last axis of ``a`` and the one before the last of ``b``.
CONTRACT: Final[dict[str, Piece]] = {
    "matmul": torch.matmul,
    "at": lambda a, b: a @ b,
    "einsum": lambda a, b: torch.einsum("bhik,bhkj->bhij", a, b),
    "bmm": _flat_product,
}
#: ``key(k) = kᵀ``.
KEY: Final[dict[str, Piece]] = {
    "transpose": lambda k: k.transpose(-2, -1),
    "positive": lambda k: k.transpose(2, 3),
    "mT": lambda k: k.mT,
    "permute": lambda k: k.permute(0, 1, 3, 2),
    "twice": lambda k: k.permute(0, 2, 1, 3).permute(0, 2, 3, 1),
}
#: ``scale(product, q, kᵀ, c)``: the scores, scaled by ``c`` at some place.
SCALE: Final[dict[str, Piece]] = {
    "after": lambda product, q, k, c: product(q, k) * c,
    "left": lambda product, q, k, c: c * product(q, k),
    "divide": lambda product, q, k, c: product(q, k) / (1 / c),
    "query": lambda product, q, k, c: product(q * c, k),
    "key": lambda product, q, k, c: product(q, k * c),
    "both": lambda product, q, k, c: product(q * c**0.5, k * c**0.5),
    "none": lambda product, q, k, c: product(q, k),
}
#: ``mask(scores, bias, keep)``.
MASK: Final[dict[str, Piece]] = {
    "none": lambda s, bias, keep: s,
    "bias": lambda s, bias, keep: s + bias,
    "bias left": lambda s, bias, keep: bias + s,
    "fill": lambda s, bias, keep: s.masked_fill(~keep, float("-inf")),
    "where": lambda s, bias, keep: torch.where(keep, s, torch.finfo(s.dtype).min),
    "causal": lambda s, bias, keep: s.masked_fill(~_causal(s), float("-inf")),
    "window": lambda s, bias, keep: s.masked_fill(~_window(s), float("-inf")),
    "triu": lambda s, bias, keep: s + torch.full(s.shape[-2:], float("-inf"), dtype=s.dtype, device=s.device).triu(1),
    "bias and causal": lambda s, bias, keep: (bias + s).masked_fill(~_causal(s), float("-inf")),
    "fill and bias": lambda s, bias, keep: s.masked_fill(~keep, float("-inf")) + bias,
    "two biases": lambda s, bias, keep: bias.flip(-1) + (s + bias),
    "cap and bias": lambda s, bias, keep: 5.0 * torch.tanh(s / 5.0) + bias,
}
#: ``softmax(scores)`` in the dtype of the scores.
SOFTMAX: Final[dict[str, Piece]] = {
    "method": lambda s: s.softmax(-1),
    "positive": lambda s: torch.softmax(s, 3),
    "functional f32": lambda s: torch.nn.functional.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "float": lambda s: s.float().softmax(-1).type_as(s),
    "written": _safe_softmax,
    "logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "log": lambda s: s.log_softmax(-1).exp(),
}
#: ``heads(x, H/G)``: key/value heads repeated to the query heads.
HEADS: Final[dict[str, Piece]] = {
    "interleave": lambda x, times: x.repeat_interleave(times, 1),
    "expand": _repeat,
}
#: What brings an argument into ``[B, H, S, D]``, and its inverse for making that argument.
LAYOUT: Final[dict[str, tuple[int, ...]]] = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (1, 2, 0, 3)}
#: Views that do nothing.
NOISE: Final[dict[str, Piece]] = {
    "none": lambda x: x,
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "reshape": lambda x: x.flatten(0, 1).reshape(x.shape),
    "contiguous": lambda x: x.contiguous(),
    "transpose": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice": lambda x: x[:, :, 0:],
}


@dataclass(frozen=True)
class Recipe:
    """The name of the piece chosen for each part."""

    contract: str
    key: str
    scale: str
    mask: str
    softmax: str
    heads: str
    layout: str
    noise: str
    dtype: torch.dtype


class Composed(nn.Module):
    """The attention that a recipe spells."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
        recipe, noise = self.recipe, NOISE[self.recipe.noise]
        axes = LAYOUT[recipe.layout]
        q, k, v = (noise(x.permute(axes)) for x in (q, k, v))
        k, v = (HEADS[recipe.heads](x, q.shape[1] // x.shape[1]) for x in (k, v))
        product = CONTRACT[recipe.contract]
        s = SCALE[recipe.scale](product, q, KEY[recipe.key](k), q.shape[-1] ** -0.5)
        p = SOFTMAX[recipe.softmax](noise(MASK[recipe.mask](s, bias, keep)))
        return noise(product(p, v))


def inputs(recipe: Recipe, sizes: Sizes) -> tuple[Tensor, ...]:
    """Arguments for a recipe: ``q, k, v`` in its layout, a bias ``[B,1,S,S]`` and a boolean mask ``[1,H,S,S]``."""
    axes = LAYOUT[recipe.layout]
    inverse = tuple(axes.index(axis) for axis in range(4))
    q, k, v = (
        draw((sizes.B, heads, sizes.S, sizes.D), dtype=recipe.dtype, seed=seed).permute(inverse).contiguous()
        for seed, heads in enumerate((sizes.H, sizes.G, sizes.G))
    )
    bias = draw((sizes.B, 1, sizes.S, sizes.S), dtype=recipe.dtype, seed=3)
    return q, k, v, bias, row_mask((1, sizes.H, sizes.S, sizes.S))


def _names(pieces: dict[str, Any]) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(pieces))


RECIPES: Final[st.SearchStrategy[Recipe]] = st.builds(
    Recipe,
    contract=_names(CONTRACT),
    key=_names(KEY),
    scale=_names(SCALE),
    mask=_names(MASK),
    softmax=_names(SOFTMAX),
    heads=_names(HEADS),
    layout=_names(LAYOUT),
    noise=_names(NOISE),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)

#: Small sizes, whose axes collide as often as not.
SIZES: Final[st.SearchStrategy[Sizes]] = st.builds(
    lambda b, g, times, s, d: Sizes(B=b, H=g * times, G=g, S=s, T=s, D=d, E=d),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([2, 3, 4, 8]), st.sampled_from([2, 4, 8]),
)  # fmt: skip
