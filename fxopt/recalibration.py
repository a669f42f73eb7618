"""Statistics of progressive modules from a user's data: what `fxopt.convert` does first."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.errors import FxoptWarning, OptionError, PreparationError
from fxopt.rewriter.progressive import Progressive, progressive_modules


def check_data(data: object) -> None:
    """``data`` is an iterable of calls, or ``None``.

    Raises:
        OptionError: it is something else, or a call itself.
    """
    if isinstance(data, Tensor | Mapping | str):
        raise OptionError(
            f"data is an iterable of calls of a model; the parts of a {type(data).__name__} would be taken for calls; "
            "give data=[…] for a single call"
        )
    if data is not None and not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise OptionError(
            f"data={data!r} is not possible; give an iterable of calls of the model, such as a DataLoader"
        )


def recalibrate(trained: nn.Module, data: Iterable[Any]) -> None:
    """Statistics of the calls in ``data``, for each module of as many as it wants.

    Raises:
        OptionError: what ``data`` holds can't be given to the model, or gives statistics that are not finite.
        PreparationError: ``data`` is empty.
    """
    modules = progressive_modules(trained)
    gathering = dict(modules)
    for module in gathering.values():
        module.gather(True)
    seen = 0
    with torch.no_grad():
        for batch in data:
            args, kwargs = _as_call(batch, trained, seen)
            trained(*args, **kwargs)
            _check_finite(gathering, seen)
            seen += 1
            for name in [name for name, module in gathering.items() if module.batches() == seen]:
                gathering.pop(name).gather(False)
            if not gathering:
                break
    for module in gathering.values():
        module.gather(False)
    if not seen:
        raise PreparationError("data is empty: there is nothing to take statistics from; give batches, or data=None")
    _say_short(gathering, seen)


def _as_call(batch: Any, trained: nn.Module, number: int) -> tuple[Sequence[Any], Mapping[str, Any]]:
    args: Sequence[Any] = batch if isinstance(batch, tuple | list) else ()
    kwargs: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    if not isinstance(batch, tuple | list | Mapping):
        args = (batch,)
    try:
        inspect.signature(trained.forward).bind(*args, **kwargs)
    except TypeError as error:
        takes = ", ".join(inspect.signature(trained.forward).parameters)
        raise OptionError(
            f"batch {number} of data does not fit the model's forward({takes}): {error}. The parts of a tuple or list "
            "are positional arguments, those of a mapping keyword arguments; of batches of inputs and labels give the "
            "inputs alone, data=(inputs for inputs, labels in loader)"
        ) from error
    return args, kwargs


def _check_finite(gathering: Mapping[str, Progressive], number: int) -> None:
    name = next((name for name, module in gathering.items() if not module.is_finite()), None)
    if name is not None:
        raise OptionError(
            f"batch {number} of data gives statistics of {name} that are not finite; leave that batch out if it holds "
            "NaN or infinite values, else the student's weights do"
        )


def _say_short(gathering: Mapping[str, Progressive], seen: int) -> None:
    """What still gathers at the end of the data and wants so many batches has fewer than that."""
    wanted = max((module.batches() or 0 for module in gathering.values()), default=0)
    if wanted:
        warnings.warn(
            f"data holds {seen} batches and recalibrate={wanted} asks for more; the statistics are those of the {seen}",
            FxoptWarning,
            stacklevel=4,
        )
