"""Each kind of generated kernel once, at lengths that no block divides: what ``make memcheck`` watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fxopt.codegen.attention.weights import source as weights
from tests.gpu import (
    test_attention_backward,
    test_attention_kernels,
    test_attention_weights,
    test_dropout,
    test_hopper_backward,
    test_hopper_lists,
    test_hopper_order,
    test_hopper_tile,
    test_kernel_families,
    test_linear_attention,
    test_narrow_mlp,
    test_pairs,
    test_residual_norm,
    test_short_kernels,
    test_split,
)

pytestmark = pytest.mark.gpu

portable, families = test_attention_kernels, test_kernel_families
portable_backward, hopper_backward = test_attention_backward, test_hopper_backward
#: What to call, and with what.
KINDS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "portable": (portable.test_kernel_is_within_the_budget_of_eager, ("causal", "D128 cross", "f16")),
    "portable, single precision": (portable.test_kernel_is_within_the_budget_of_eager, ("tile-bias", "D64", "f32")),
    "portable, band": (portable.test_kernel_is_within_the_budget_of_eager, ("band", "D96", "bf16")),
    "portable, hulls": (portable.test_captured_vectors_limit_the_keys, ("right padding", "zero", "bf16")),
    "hopper": (families.test_kernel_is_within_the_budget_of_eager, ("hopper", "causal", "D128 cross", "bf16")),
    "hopper, band": (families.test_kernel_is_within_the_budget_of_eager, ("hopper", "causal-band", "D64", "bf16")),
    "hopper, hulls": (
        families.test_captured_vectors_limit_the_keys_of_the_hopper_kernel, ("contiguous documents", "uniform", 64)
    ),
    "hopper, lists": (test_hopper_lists.test_lists_leave_out_blocks, ("longformer", "D80", "zero", "bf16")),
    "hopper, backward through lists": (
        hopper_backward.test_lists_leave_out_blocks, ("sinks", "D64", "nan", "bf16")
    ),
    "hopper, order": (test_hopper_order.test_any_filling_is_within_the_budget_of_eager, (0, True)),
    "hopper, tile": (test_hopper_tile.test_tiles_are_within_the_budget_of_eager, ("causal", "D64 unaligned", "bf16")),
    "pairs": (test_pairs.test_kernel_is_within_the_budget_of_eager, ("causal-padding", "ViT", "f16", 1)),
    "pairs, tile": (test_pairs.test_kernel_is_within_the_budget_of_eager, ("tile-bias", "cross", "f16", 1)),
    "short": (test_short_kernels.test_kernel_is_within_the_budget_of_eager, ("swin", "windows", "bf16", 0)),
    "short, padding": (test_short_kernels.test_kernel_is_within_the_budget_of_eager, ("padding", "7", "f16", 1)),
    "split": (test_split.test_kernel_is_within_the_budget_of_eager, ("causal-padding", "one kv head", "f16")),
    "weights": (
        test_attention_weights.test_kernel_is_within_the_budget_of_eager, ("tile-bias", "D96", "f16", "column_sum")
    ),
    **{
        f"weights, gradients of {kind}": (
            test_attention_weights.test_gradients_are_within_the_budget_of_eager, (kind,)
        )
        for kind in weights.KINDS
    },
    "dropout": (test_dropout.test_forward_is_within_the_budget_of_eager, ("causal", "D128 cross", "f16")),
    "dropout, backward": (test_dropout.test_gradients_are_within_the_budget_of_eager, ("swin", "D64", "f16")),
    "backward": (portable_backward.test_gradients_are_within_the_budget_of_eager, ("documents", "D128 cross", "f32")),
    "backward, slopes": (portable_backward.test_gradients_of_captured_tensors, ("slopes", "bf16")),
    "backward, table": (portable_backward.test_gradients_of_captured_tensors, ("periodic-table", "f16")),
    "backward, band": (portable_backward.test_gradients_of_captured_tensors, ("batch-band", "bf16")),
    "hopper backward": (
        hopper_backward.test_gradients_are_within_the_budget_of_eager, ("causal", "D128 more keys", "bf16")
    ),
    "hopper backward, rows": (
        hopper_backward.test_gradients_are_within_the_budget_of_eager, ("documents", "D64 odd", "f16")
    ),
    "hopper backward, hulls": (hopper_backward.test_gradients_of_padded_batches, ("mixed", True)),
    "linear attention": (test_linear_attention.test_kernels_are_within_the_budget_of_eager, ("swin", torch.bfloat16)),
    "linear attention, causal": (
        test_linear_attention.test_kernels_are_within_the_budget_of_eager, ("causal-128", torch.float16)
    ),
    "residual norm": (test_residual_norm.test_forward_is_within_the_budget_of_eager, ("layer bf16", 700)),
    "residual norm, backward": (test_residual_norm.test_gradients_are_within_the_budget_of_eager, ("rms bf16", 1000)),
    "narrow mlp": (test_narrow_mlp.test_it_is_within_the_budget_of_eager, ("gelu bf16", 96, 1000)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kernel_reads_and_writes_what_it_is_given(kind: str) -> None:
    check, given = KINDS[kind]
    check(*given)
