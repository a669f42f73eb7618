"""Interpreting a graph whose nodes switch autocast or the recording of gradients while `make_fx` traces it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode

from fxopt.ir.autocast import ENTER, EXIT

_OF_INFERENCE: Final = (_enter_inference_mode, _exit_inference_mode)
_OFF: Final = (EXIT, _exit_inference_mode)


class Switching(fx.Interpreter):
    """Throws the switches for real, so that values are what they will be, and has the tracer write them down.

    Inference mode is written down as what of it concerns a graph: gradients are not recorded.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self._open: list[Callable[[], Any]] = []

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Interpret the graph; what is still switched on when that fails is switched off."""
        try:
            return super().run(*args, **kwargs)
        finally:
            while self._open:
                self._open.pop()()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call; a switch is thrown."""
        if target in _OFF:
            self._open.pop()()
        if target is _enter_inference_mode:
            self._open.append(_recording(torch.is_grad_enabled() and not args[0]))
        if target is ENTER:
            self._open.append(_autocast(*args))
        return None if target in _OF_INFERENCE else super().call_function(target, args, kwargs)


def _autocast(*args: Any) -> Callable[[], Any]:
    """Switch autocast; the tracer writes down the call of the graph itself."""
    mode = torch.autocast(*args)

    def leave() -> None:
        with torch._C.DisableTorchFunction():
            mode.__exit__(None, None, None)

    with torch._C.DisableTorchFunction():
        mode.__enter__()
    return leave


def _recording(wanted: bool) -> Callable[[], Any]:
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(wanted)
    return lambda: torch._C._set_grad_enabled(before)
