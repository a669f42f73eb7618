"""Which tokens count in statistics: the model's own mask argument, handed to the norms of one model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import MaskError
from fxopt.rewriter.progressive import StudentHook


class TokenMask:
    """The mask of the call that is running, shared by all norms of a model.

    ``value`` is ``[B, N]`` or any leading axes of what the norms read: boolean or integer, nonzero where a token
    counts; ``None`` where all do. It stays until the next call of the model, because activations that are computed
    again in the backward pass need it then; copies of the model don't take it along.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __getstate__(self) -> dict[str, None]:
        """Without the mask of a call."""
        return {"value": None}

    def over(self, x: Tensor) -> Tensor | None:
        """The mask as booleans ``[..., 1]`` that broadcast over ``x [..., C]``; ``None`` where all tokens count.

        Raises:
            MaskError: the mask is not one of tokens, or its axes are not the leading axes of ``x``.
        """
        mask = self.value
        if mask is None:
            return None
        if mask.dtype.is_floating_point or mask.dtype.is_complex:
            raise MaskError(
                f"a mask of tokens is boolean or integer, nonzero where a token counts; this one is {mask.dtype}. "
                "Name another argument with mask=…, or mask=None to count all tokens"
            )
        leading = x.shape[:-1]
        if len(leading) == 1 and mask.numel() == leading[0]:
            mask = mask.reshape(-1)
        if leading[: mask.dim()] != mask.shape:
            raise MaskError(
                f"the mask {list(mask.shape)} does not lie over the leading axes of {list(x.shape)}; leave this norm "
                "out with select=…, or give mask=None to count all tokens"
            )
        return (mask != 0).reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))


class MaskReader(StudentHook):
    """A forward pre-hook of the whole model: takes the mask out of the call's arguments."""

    def __init__(self, name: str, position: int | None, mask: TokenMask) -> None:
        self.name, self.position, self.mask = name, position, mask

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the argument ``name`` of this call, or that there is none."""
        given = kwargs.get(self.name)
        if self.position is not None and len(args) > self.position:
            given = args[self.position]
        self.mask.value = given if isinstance(given, torch.Tensor) else None
