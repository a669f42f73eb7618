"""Compiling the kernels of all sites before the first of them is measured: several at once, and each once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from fxopt.analysis.gradients import may_need_gradient
from fxopt.codegen.attention.backward.config import RECOMPUTE, split_config
from fxopt.codegen.building import compile_together
from fxopt.ir.nodes import tensor
from fxopt.lowering.candidate import Candidate
from fxopt.lowering.measure import extent, layout
from fxopt.lowering.packed import PACKED


def build(
    sites: Sequence[tuple[Node, Sequence[Candidate]]],
    training: bool,
    meanwhile: Sequence[Callable[[], None]] = (),
    beside: bool = False,
) -> None:
    """Compile the generated kernels among the candidates of each site, for operands as it has them; none is run.

    Where there are any, calls to make ``meanwhile`` are made. ``beside`` tells that other threads run Python. What
    fails here fails again when it is measured, and is refused there with its reason.
    """
    generated = [(site, candidate) for site, found in sites for candidate in found if candidate.family == "triton"]
    if generated:
        compilations = [partial(_compile, site, candidate, training) for site, candidate in generated]
        compile_together([*compilations, *meanwhile], beside)


def _compile(site: Node, candidate: Candidate, training: bool) -> None:
    given = site.args if candidate.arguments is None else candidate.arguments
    stand_ins = _stand_ins(given)
    arguments = map_arg(given, lambda node: stand_ins[node])
    with torch.no_grad():
        seeds = candidate.seeds(tensor(site.args[0]).device)
        result = candidate.target(*arguments, *candidate.extra, *seeds)
        if candidate.target is torch.ops.fxopt.linear_attention_forward.default and training:
            (*operands, spec), (out, attended, sums) = arguments, result
            whole = out if operands[-1] is None else attended
            grad = torch.empty_like(out)
            torch.ops.fxopt.linear_attention_backward(*operands, whole, sums, grad, spec, candidate.extra[0])
        config = _backward_config(candidate) if training else ""
        if not config:
            return
        # Autograd would call it in a thread of its own, where kernels are launched.
        (out, lse), wanted = result, _wanted(site)
        grads = (torch.empty_like(out), None if candidate.first else torch.empty_like(lse))
        rest = (out, lse, *grads, wanted, site.args[4], config, *seeds)
        if candidate.target is PACKED:
            packed, captures, _, places = arguments
            torch.ops.fxopt.attention_packed_backward(packed, captures, places, *rest)
        else:
            torch.ops.fxopt.attention_backward(*arguments[:4], *rest)


def _backward_config(candidate: Candidate) -> str:
    """The configuration of the generated backward; nothing where there is none."""
    if candidate.target not in (torch.ops.fxopt.attention_forward.default, PACKED):
        return ""
    config = split_config(candidate.extra[0])[1]
    return "" if config == RECOMPUTE else config


def _stand_ins(arguments: tuple[Any, ...]) -> dict[Node, Tensor]:
    """Tensors like those among the ``arguments`` that share one piece of memory, as nobody reads them."""
    nodes: list[Node] = []
    map_arg(arguments, nodes.append)
    layouts = {node: (tensor(node).dtype, *layout(tensor(node))) for node in nodes}
    size = max(extent(sizes, strides) * dtype.itemsize for dtype, sizes, strides in layouts.values())
    # A multiple of every element's size.
    shared = torch.empty(-(-size // 16) * 16, dtype=torch.uint8, device=tensor(nodes[0]).device)
    return {node: shared.view(dtype).as_strided(sizes, strides) for node, (dtype, sizes, strides) in layouts.items()}


def _wanted(site: Node) -> list[bool]:
    captures = site.args[3]
    assert isinstance(captures, list | tuple)
    return [isinstance(node, Node) and may_need_gradient(node) for node in captures]
