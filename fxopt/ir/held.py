"""What buffers hold while a model is compiled, and whether they hold it still: proofs of masks rest on it.

A buffer may change after compilation, so what was proved of its contents needs a check at each call. `Unchanged` is
that check: a tensor that is the same object, in the same memory and with the same ``_version`` holds what it held.
Edits in place count there, also under ``no_grad`` and through ``detach()`` and views; a tensor in place of another
(``.to()``, assignment) is another object. Only then are contents compared, which waits for the device.

What PyTorch does not count goes unseen: writing through ``.data``, a NumPy array that shares the memory, or a
kernel of one's own that does not mark what it writes.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.weak import WeakIdKeyDictionary

#: Bytes above which a buffer's contents are not looked at.
MAX_BYTES: Final = 2**28
#: How often the contents of one tensor are looked at. What is edited more often is read at each call instead.
LOOKS: Final = 3


@dataclass(frozen=True)
class Held:
    """A buffer that a program takes as an input.

    Attributes:
        name: what the user calls it.
        tensor: the buffer itself.
        doubt: why nothing may be proved of what it holds; empty where it may.
    """

    name: str
    tensor: Tensor
    doubt: str = ""


@dataclass
class _Look:
    version: tuple[Any, ...]
    digest: bytes
    count: int = 1


_LOOKED: Final[MutableMapping[Tensor, _Look]] = WeakIdKeyDictionary()


def version(tensor: Tensor) -> tuple[Any, ...]:
    """What changes whenever the values of ``tensor`` do (in-place changes of inference tensors aside)."""
    count = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), count, tensor.dtype, tensor.device


def doubt_of(tensor: Tensor) -> str:
    """Why nothing may be proved of what ``tensor`` holds; empty where it may."""
    if type(tensor) is not Tensor or is_functorch_wrapped_tensor(tensor) or tensor.device.type not in ("cpu", "cuda"):
        return "it is no plain tensor"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex():
        return "it holds no plain numbers"
    if tensor.requires_grad:
        return "it is learned"
    if tensor.is_inference():
        return "it was made in inference mode, where changes are not counted"
    if tensor.numel() * tensor.itemsize > MAX_BYTES:
        return f"it is larger than {MAX_BYTES >> 20} MiB"
    known = _LOOKED.get(tensor)
    often = known is not None and known.count >= LOOKS and known.version != version(tensor)
    return "it changed several times since it was compiled" if often else ""


def contents(tensor: Tensor) -> bytes | None:
    """A digest of what ``tensor`` holds; ``None`` where `doubt_of` says why not. Unedited, it is computed once."""
    if doubt_of(tensor):
        return None
    known, now = _LOOKED.get(tensor), version(tensor)
    if known is not None and known.version == now:
        return known.digest
    digest = _digest(tensor)
    _LOOKED[tensor] = _Look(now, digest, 1 if known is None else known.count + 1)
    return digest


def _digest(tensor: Tensor) -> bytes:
    with unset_fake_temporarily(), torch.no_grad():
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=32)
        found.update(flat.numpy().data)
        return found.digest()


class Unchanged:
    """Whether a tensor, or another in its place, holds what one held: called with it, at each call of a model."""

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self._seen: dict[int, tuple[weakref.ReferenceType[Tensor], int, int]] = {}

    def __call__(self, tensor: Tensor) -> bool:
        """Whether it does; under a microsecond unless it was edited or is seen for the first time."""
        seen = self._seen.get(id(tensor))
        if seen and seen[0]() is tensor and seen[1] == tensor._version and seen[2] == tensor.data_ptr():
            return True
        if contents(tensor) != self.digest or self._replaced() > LOOKS:
            return False
        self._seen[id(tensor)] = weakref.ref(tensor), tensor._version, tensor.data_ptr()
        return True

    def _replaced(self) -> int:
        """How many of the tensors seen are no more: another in place of each was looked at."""
        return sum(reference() is None for reference, _, _ in self._seen.values())

    def __getstate__(self) -> dict[str, Any]:
        return {"digest": self.digest, "_seen": {}}
