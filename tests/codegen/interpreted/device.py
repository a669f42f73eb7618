"""Runs generated kernels on the CPU: import this before Triton, in a process of its own.

Triton 3.6's interpreter departs from the device in four points, which are put right here: it reads a scalar with
``int(array)``, which numpy refuses since 2.4; it multiplies the bit patterns of bfloat16 operands; it truncates
to bfloat16 instead of rounding; and it knows no assembly, of which the reciprocal is computed.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from tests.codegen.interpreted import remembered  # noqa: F401 - and makes it two to three times as fast

_patch_lang_tensor = interpreter._patch_lang_tensor
_convert_float = interpreter._convert_float
_create_dot = interpreter.InterpreterBuilder.create_dot


def _readable_scalars(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
    if source == tl.float32 and target == tl.bfloat16:
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    return _convert_float(values, source, target, mode)


def _dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), d, *options)


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = torch.from_numpy(handle.data.copy()).view(torch.bfloat16).float().numpy()
    return interpreter.TensorHandle(wide, tl.float32)


def _assembly(self: Any, text: str, constraints: str, values: Any, dtypes: Any, pure: bool, pack: int) -> Any:
    if not text.startswith("rcp.approx.ftz.f32 "):
        raise NotImplementedError(text)
    with np.errstate(divide="ignore"):
        inverse = interpreter.TensorHandle(np.float32(1) / values[0].data, tl.float32)
    return SimpleNamespace(get_result=lambda n: inverse)


_patched: set[Any] = set()


def _called(self: Any, *arguments: Any, **named: Any) -> Any:
    """Puts Triton's language in order for a function once, and not at each of its calls: that took a tenth of the time.

    What is patched for a function stays so, unless the launch did it already and does it again.
    """
    if self.fn not in _patched:
        _patched.add(self.fn)
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*arguments, **named)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


interpreter.InterpretedFunction.__call__ = _called
interpreter._patch_lang_tensor = _readable_scalars
interpreter._convert_float = _rounded
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.InterpreterBuilder.create_inline_asm = _assembly
