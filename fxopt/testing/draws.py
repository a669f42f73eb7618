"""Random draws that don't depend on the dtype or the kernel, so that runs in different precisions can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

_FUSED: Final = torch.ops.aten.native_dropout.default


class _PlainDropout(TorchDispatchMode):
    """Fused dropout, whose draws depend on how many elements of a dtype a thread takes, by a float32 number each."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(zip(("input", "p", "train"), args, strict=False)) | (kwargs or {})
        if func is not _FUSED or given["train"] is False or given["p"] == 1:
            return func(*args, **(kwargs or {}))
        return _dropped(given["input"], float(given["p"]))


def _dropped(x: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    kept = torch.rand(x.shape, device=x.device, dtype=torch.float32) >= probability
    return x * kept / (1 - probability), kept


@contextmanager
def equal_draws() -> Iterator[None]:
    """Inside, dropout after the same ``torch.manual_seed`` drops the same elements in every floating dtype.

    Fused attention, which draws numbers of its own, runs as separate operators.
    """
    with sdpa_kernel(SDPBackend.MATH), _PlainDropout():  # type: ignore[no-untyped-call]
        yield
