"""Copies that Inductor's padding of strides would double: windows of images, and what is no such copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fxopt.errors import FxoptWarning
from fxopt.frontend.export import from_export
from fxopt.lowering.padding import pads_what_is_merged


def windows(x_BHWC: Tensor) -> Tensor:
    """Windows of 7 × 7 tokens."""
    batch, height, width, channels = x_BHWC.shape
    grid = x_BHWC.view(batch, height // 7, 7, width // 7, 7, channels)
    return grid.transpose(2, 3).reshape(-1, 49, channels)


def merged_heads(x_BHSD: Tensor) -> Tensor:
    return x_BHSD.transpose(1, 2).reshape(*x_BHSD.shape[::2], -1).clone()


def split(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.reshape(x_BHWC.shape[0], -1)


def moved(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.transpose(1, 2).reshape(x_BHWC.shape[0], x_BHWC.shape[2], x_BHWC.shape[1], 3, -1)


@pytest.mark.parametrize(("function", "sizes", "dtype", "expected"), [
    (windows, (2, 14, 14, 96), torch.bfloat16, True),  # 4704 elements from window to window, 73.5 cache lines
    (windows, (2, 14, 14, 192), torch.bfloat16, False),  # 147 whole lines
    (windows, (2, 14, 14, 96), torch.float32, False),
    (windows, (2, 14, 14, 4), torch.bfloat16, False),  # strides too short to be padded
    (split, (2, 14, 14, 99), torch.bfloat16, False),  # no copy
    (moved, (2, 14, 15, 99), torch.bfloat16, False),  # a copy whose axes stay apart
])  # fmt: skip
def test_copies_that_padding_would_double(
    function: Callable[[Tensor], Tensor], sizes: tuple[int, ...], dtype: torch.dtype, expected: bool
) -> None:
    program = from_export(function, (torch.randn(sizes).to(dtype),))
    assert pads_what_is_merged(program.graph) is expected


@pytest.mark.parametrize(("settings", "expected"), [({}, False), ({"comprehensive_padding": True}, True)])
def test_such_graphs_are_compiled_without_padding_unless_it_is_asked_for(
    settings: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, object]] = []

    def compile_fx(module: GraphModule, inputs: object, *, config_patches: dict[str, object], **_: object) -> object:
        seen.append(config_patches)
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch._dynamo.reset()
    x = torch.randn(2, 14, 14, 96, dtype=torch.bfloat16)
    options: dict[str, Any] = {"inductor": settings}
    compiled = torch.compile(windows, backend="fxopt", options=options)
    assert torch.equal(compiled(x), windows(x))
    assert [patches["comprehensive_padding"] for patches in seen] == [expected]


def test_dynamic_sizes_are_left_alone() -> None:
    batch = torch.export.Dim("batch", min=2, max=64)
    program = from_export(windows, (torch.randn(4, 14, 14, 96).bfloat16(),), dynamic_shapes=(({0: batch},),))
    assert not pads_what_is_merged(program.graph)


def test_a_graph_that_was_left_alone_is_compiled() -> None:
    """It knows no values, and may call operators of the dialect all the same."""

    def function(x: Tensor) -> Tensor:
        checked: Tensor = checkpoint(torch.exp, x, use_reentrant=False)
        flat: Tensor = torch.ops.aten.reshape.default(x.transpose(1, 2), [4, -1])
        return checked.sum() + flat.sin().sum()

    torch._dynamo.reset()
    x = torch.randn(4, 6, 8, requires_grad=True)
    with pytest.warns(FxoptWarning):
        found = torch.compile(function, backend="fxopt")(x)
    torch.testing.assert_close(found, function(x))
