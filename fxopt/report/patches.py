"""Finding the convolutions that could be linear layers: those whose window moves by its own size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch.fx import Graph

from fxopt.analysis.convolutions import read_convolution
from fxopt.report.found import Found

_HINT: Final = (
    "no rule was tried; a convolution whose stride is its kernel size, without padding, with dilation 1 and groups=1, "
    "is a linear layer on patches"
)


def find_patch_convolutions(graph: Graph) -> Iterator[Found]:
    """Every convolution of ``graph`` that moves by its own size, more than one element, along at least one axis."""
    for node in graph.nodes:
        convolution = read_convolution(node)
        if convolution is not None and convolution.cuts_patches:
            yield Found("linear", node, (node,), _HINT)
