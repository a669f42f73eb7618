"""The groups of cases of the attention benchmark, as data; and the same with tiny sizes, to check them anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from benchmarks.attention_cases import Case, Mode
from benchmarks.attention_kinds import (
    ALIBI,
    CAUSAL,
    DENSE,
    PLAIN,
    RELATIVE,
    SOFTCAP,
    T5,
    UNAWARE,
    Kind,
    Sizes,
    block_causal,
    documents,
    interleaved,
    longformer,
    padding,
    prefix,
    shifted_windows,
    sinks,
    strided,
    window,
)

_TOKENS: Final = 16_384
_MODEL_WIDTH: Final = 2048
_LENGTH: Final = 2048  # the one of a quick run
_MODES: Final[tuple[Mode, ...]] = ("forward+backward", "backward")
_SDPA: Final = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math")
_TINY_LENGTHS: Final = (40,)
_TINY_WIDTH: Final = 16


def _square(width: int, length: int, tiny: bool) -> Sizes:
    """Self-attention of 16k tokens with heads × D = 2048."""
    heads = 2 if tiny else _MODEL_WIDTH // width
    return Sizes(3 if tiny else _TOKENS // length, heads, heads, length, length, width)


def _squares(
    group: str, kinds: tuple[Kind, ...], widths: tuple[int, ...], lengths: tuple[int, ...], peers: tuple[str, ...],
    tiny: bool,
) -> Iterator[Case]:  # fmt: skip
    for width in (_TINY_WIDTH,) if tiny else widths:
        for length in _TINY_LENGTHS if tiny else lengths:
            for kind in kinds:
                yield Case(group, kind, _square(width, length, tiny), f"D{width} N{length}", peers)


def forward(tiny: bool) -> Iterator[Case]:
    """Plain and causal attention at all head dimensions."""
    peers = ("sdpa-flash", "sdpa-cudnn", "flex", "flex-flash")
    for case in _squares("forward", (PLAIN, CAUSAL), (64, 128, 256), (512, 2048, 8192), peers, tiny):
        yield replace(case, quick=case.sizes.rows == _LENGTH and case.sizes.width < 256)


def modified(tiny: bool) -> Iterator[Case]:
    """What FlexAttention was made for; our own plain kernel runs beside it. Head dimension 256 for two of them."""
    masks = (window(9), prefix(7), documents(4)) if tiny else (window(1024), prefix(256), documents(8))
    kinds = (SOFTCAP, ALIBI, RELATIVE, T5, *masks)
    lengths = (2048, 8192)
    for case in _squares("modified", kinds, (64, 128), lengths, ("flex",), tiny):
        quick = case.sizes.rows == _LENGTH and case.sizes.width == 64
        yield replace(case, quick=quick, baselines=(PLAIN,))
    for case in _squares("modified", (SOFTCAP, RELATIVE), () if tiny else (256,), lengths, ("flex",), False):
        yield replace(case, baselines=(PLAIN,))


def holes(tiny: bool) -> Iterator[Case]:
    """Masks that leave out blocks between those that they keep; FlexAttention's block mask is made beforehand."""
    small = (longformer(5, 2), sinks(9, 2), strided(8, 2), interleaved(3, 4), block_causal(12))
    large = (longformer(256, 64), sinks(1024), strided(128, 8), interleaved(4, 256), block_causal(1024))
    for case in _squares("holes", small if tiny else large, (64, 128), (2048, 8192), ("flex",), tiny):
        yield replace(case, quick=case.sizes.rows == 8192 and case.sizes.width == 64, baselines=(PLAIN,))


def bias(tiny: bool) -> Iterator[Case]:
    """A bias of its own for every head, query and key."""
    peers = ("sdpa-efficient", "sdpa-cudnn", "flex")
    yield from _squares("bias", (DENSE,), (64, 128, 256), (512, 2048, 8192), peers, tiny)


def short(tiny: bool) -> Iterator[Case]:
    """Short sequences, as in BERT; N = 197 is that of ViT."""
    for case in _squares("short", (PLAIN, DENSE), (64,), (128, 197, 256, 512), (*_SDPA, "flex"), tiny):
        yield replace(case, quick=case.sizes.rows == 197)


def windows(tiny: bool) -> Iterator[Case]:
    """The four stages of Swin-T on 64 images, windows of 7×7 tokens; the last stage is one window, never shifted."""
    images = 2 if tiny else 64
    for stage, side in enumerate((14, 7) if tiny else (56, 28, 14, 7)):
        heads = 3 * 2**stage
        sizes = Sizes(images * (side // 7) ** 2, heads, heads, 49, 49, 32)
        shifted = (shifted_windows(side, 7, 3),) if side > 7 else ()
        for kind in (replace(DENSE, name="window-bias"), *shifted):
            yield Case("windows", kind, sizes, f"W{sizes.batch} H{heads}", (*_SDPA[1:], "flex"), quick=stage == 0)


def backward(tiny: bool) -> Iterator[Case]:
    """Gradients, alone and with the forward pass before them."""
    sparse = (longformer(5, 2), sinks(9, 2)) if tiny else (longformer(256, 64), sinks(1024))
    flex = (SOFTCAP, RELATIVE, ALIBI, *sparse)
    for kinds, peers in (((PLAIN, CAUSAL), _SDPA[:2]), (flex, ("flex",))):
        for case in _squares("backward", kinds, (64, 128), (2048, 8192), peers, tiny):
            quick = case.sizes.rows == _LENGTH and case.sizes.width == 128
            for mode in _MODES:
                yield replace(case, mode=mode, quick=quick and mode == "backward")


def decode(tiny: bool) -> Iterator[Case]:
    """One query per sequence against its cache of keys and values; memory is what limits it."""
    full = ((16, 8192, 8), (1, 131_072, 8), (64, 2048, 8), (4, 8192, 32), (64, 16_384, 1))
    for batch, keys, kv_heads in ((3, 70, 2), (1, 133, 4)) if tiny else full:
        heads, width = (4, _TINY_WIDTH) if tiny else (32, 128)
        sizes = Sizes(batch, heads, kv_heads, 1, keys, width)
        label = f"B{batch} T{keys} H{heads} G{kv_heads} D{width}"
        yield Case("decode", PLAIN, sizes, label, (*_SDPA, "flex"), quick=batch in (1, 16), baselines=("copy",))


def padded(tiny: bool) -> Iterator[Case]:
    """A batch of sentences, 60% of it filled, as BERT takes them; beside our own kernel unaware of it, and unpadded."""
    for length in _TINY_LENGTHS if tiny else (512, 2048):
        sizes = Sizes(3, 2, 2, length, length, _TINY_WIDTH) if tiny else Sizes(32, 12, 12, length, length, 64)
        label = f"B{sizes.batch} H{sizes.heads} D{sizes.width} N{length}"
        for rows in (False, True):
            kind, full = padding(rows=rows), padding(rows=rows, full=True)
            peers = (*_SDPA[1:], "flex")
            yield Case("padded", kind, sizes, label, peers, quick=length == 512, baselines=(UNAWARE, full))


GROUPS: Final[dict[str, Callable[[bool], Iterator[Case]]]] = {
    group.__name__: group for group in (forward, modified, holes, bias, short, windows, backward, decode, padded)
}
