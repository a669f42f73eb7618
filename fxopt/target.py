"""Command-line targets: ``module:factory`` or ``path/to/file.py:factory`` -> a model with inputs to call it with."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch import nn

from fxopt.errors import TargetError, TargetRunError

_FORMS: Final = "(model, args), (model, args, kwargs), or a model with an attribute example_inputs"


@dataclass(frozen=True)
class Target:
    """A model (or function) and the arguments of one call."""

    model: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def set_mode(self, train: bool) -> None:
        """Put a module into training or evaluation mode.

        Raises:
            TargetError: training mode of a function, which has none.
        """
        if isinstance(self.model, nn.Module):
            self.model.train(train)
        elif train:
            raise TargetError("a function has no training mode; leave --train out, or give a module")


def load_target(text: str) -> Target:
    """Import the module, call the factory and check what it gives.

    The factory takes no arguments and returns one of: ``(model, args)``; ``(model, args, kwargs)``; a model whose
    attribute ``example_inputs`` holds the arguments (a tuple), the keyword arguments (a dict) or one tensor. A model in
    place of the factory is taken as it is.

    Raises:
        TargetError: the text has another form, nothing is found there, or it gives something else.
        TargetRunError: the module or the factory raised.
    """
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise TargetError(f"{text!r} is not a target; write module:factory or path/to/file.py:factory")
    found = _attribute(_import(place), name, text)
    if isinstance(found, nn.Module):
        return _from_model(found, text)
    if not callable(found):
        raise TargetError(f"{text} is a {type(found).__name__}; it must be a factory that returns {_FORMS}")
    try:
        made = found()
    except (Exception, SystemExit) as error:
        raise TargetRunError(f"{text} raised {type(error).__name__}: {error} ({_line(error)})") from error
    return _from_result(made, text)


def _attribute(module: ModuleType, path: str, text: str) -> Any:
    value: Any = module
    for name in path.split("."):
        if not hasattr(value, name):
            public = [known for known in vars(module) if not known.startswith("_")] if value is module else []
            known = f"; it defines {', '.join(sorted(public))}" if public else ""
            raise TargetError(f"{text}: there is no {name!r} in {getattr(value, '__name__', value)}{known}")
        value = getattr(value, name)
    return value


def _import(place: str) -> ModuleType:
    by_path = place.endswith(".py")
    try:
        return _import_file(Path(place)) if by_path else _import_module(place)
    except TargetError:
        raise
    except (Exception, SystemExit) as error:
        raise TargetRunError(f"{place} can't be imported: {type(error).__name__}: {error} ({_line(error)})") from error


def _import_module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise TargetError(f"{name!r} is neither the name of a module nor the path of a .py file")
    # `python -m` looks into the working directory, a console script does not.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise TargetError(
                f"there is no module called {error.name!r} (searched {Path.cwd()} and sys.path)"
            ) from error
        raise


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {path} (looked in {Path.cwd()})")
    name = f"fxopt_target_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _from_result(made: Any, text: str) -> Target:
    if isinstance(made, nn.Module):
        return _from_model(made, text)
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        shown = f"a tuple of {len(made)}" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise TargetError(f"{text} returned {shown}; it must return {_FORMS}")
    model, args, kwargs = made if len(made) == 3 else (*made, {})
    if not callable(model):
        raise TargetError(f"{text} returned a {type(model).__name__} as the model; it must be a module or a function")
    if not isinstance(args, tuple | list):
        raise TargetError(f"{text} returned a {type(args).__name__} as args; write (model, (input,))")
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise TargetError(f"{text} returned {type(kwargs).__name__} as kwargs; it must map names to values")
    return Target(model, tuple(args), dict(kwargs))


def _from_model(model: nn.Module, text: str) -> Target:
    if not hasattr(model, "example_inputs"):
        raise TargetError(f"{text} gave a {type(model).__name__} without example_inputs; give {_FORMS}")
    inputs: Any = model.example_inputs
    if isinstance(inputs, Mapping):
        return Target(model, (), dict(inputs))
    return Target(model, tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,))


def _line(error: BaseException) -> str:
    """The innermost line at which ``error`` was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "unknown line"
