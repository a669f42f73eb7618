"""Whether Inductor's padding of strides would make it copy a tensor twice."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import Final

import torch
from torch import fx
from torch._inductor import config
from torch.fx import Node

from fxopt.ir.nodes import is_call, is_tensor, shape, tensor

aten = torch.ops.aten
_RESHAPES: Final = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def pads_what_is_merged(graph: fx.Graph) -> bool:
    """Whether a permuted tensor is copied to merge its axes, as windows of an image are, and the copy would be padded.

    Inductor (``comprehensive_padding``) rounds long strides of what it computes up to whole cache lines. A product of
    all tokens merges the axes that are left as well, which those of a padded copy can't be: it is copied a second time.
    """
    return any(_is_padded(node) for node in graph.nodes if is_call(node, *_RESHAPES))


def _is_padded(node: Node) -> bool:
    source = node.args[0]
    # A graph that was left alone as Dynamo wrote it knows no values.
    if not isinstance(source, Node) or not is_tensor(source) or not is_tensor(node):
        return False
    if not all(isinstance(size, int) for size in (*shape(source), *shape(node))):
        return False
    value = tensor(source)
    if value.is_contiguous() or len(shape(node)) >= len(shape(source)):
        return False
    line = config.padding_alignment_bytes // value.element_size()
    strides = accumulate((int(size) for size in reversed(shape(source)[1:])), mul)
    return any(stride > config.padding_stride_threshold and stride % line for stride in strides)
