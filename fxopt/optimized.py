"""Optimized modules: of a subclass that compiles its calls and is the user's class in everything else.

The compiled call belongs to the class. Whatever makes an instance, be it ``__init__``, ``copy.deepcopy``, unpickling or
`optimized_twin`, it is compiled, and instances of one class share what TorchDynamo compiled.
"""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from types import MethodType, new_class
from typing import Any, Final

import torch
from torch import nn

from fxopt.errors import OptionError

_SOURCE: Final = "_fxopt_source"


@dataclass
class _Call:
    """The compiled call of a class of modules: what it calls, and the arguments of torch.compile."""

    source: type[nn.Module]
    settings: Mapping[str, Any]

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """Takes the module, then the arguments of its call."""
        return torch.compile(plain_call(self.source), backend="fxopt", **self.settings)


class _Quiet:
    """Keeps a class made here from what ``__init_subclass__`` of the user's class does with the user's own."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        if _SOURCE not in cls.__dict__:
            super().__init_subclass__(**arguments)


def optimized_class(cls: type[nn.Module], settings: Mapping[str, Any]) -> type[nn.Module]:
    """A subclass of ``cls`` of the same name, whose instances are compiled with ``settings`` of torch.compile."""
    source: type[nn.Module] = cls.__dict__.get(_SOURCE, cls)
    for known in source.__subclasses__():
        if known.__dict__.get(_SOURCE) is source and known.__dict__["_fxopt_call"].settings == settings:
            return known
    defined = {
        _SOURCE: source,
        "_fxopt_call": _Call(source, settings),
        "_compiled_call_impl": property(_compiled_call, _refuse),
        "__reduce_ex__": _reduce,
        "__module__": source.__module__,
        "__qualname__": source.__qualname__,
        "__doc__": source.__doc__,
    }
    told = next(base for base in source.__mro__ if "__init_subclass__" in base.__dict__)
    bases = (source,) if told is object or issubclass(source, _Quiet) else (_Quiet, source)
    return new_class(source.__name__, bases, {}, lambda namespace: namespace.update(defined))


def optimized_twin(model: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """``model`` once more, compiled: of its class, with its very parameters, modules, hooks and attributes.

    The two share one state, present and future, so that ``train``, ``to`` and ``load_state_dict`` of one are those of
    the other. A call of ``model`` itself stays what it was. `torch.nn.utils.parametrize` changes the class of one of
    them and the state of both: use it before.

    Raises:
        OptionError: a TorchScript module, or a lazy one without parameters yet.
    """
    while isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if isinstance(model, torch.jit.ScriptModule):
        raise OptionError("TorchScript can't be optimized; give the module that it was made from")
    if isinstance(model, nn.modules.lazy.LazyModuleMixin) and model.has_uninitialized_params():
        raise OptionError(f"{type(model).__name__} has no parameters yet; call it once, then optimize it")
    twin = object.__new__(optimized_class(type(model), settings))
    object.__setattr__(twin, "__dict__", model.__dict__)
    for name in (name for cls in type(model).__mro__ for name in _slots(cls) if hasattr(model, name)):
        object.__setattr__(twin, name, getattr(model, name))
    return twin


def plain_call(cls: type[nn.Module]) -> Callable[..., Any]:
    """What calls a module of class ``cls`` as it was written, compiled or not, in a form that TorchDynamo enters.

    It takes the module, then the arguments. TorchDynamo does not enter PyTorch's own modules from outside: theirs are
    called from a function that it does enter.
    """
    from torch._dynamo import trace_rules

    call: Callable[..., Any] = cls._call_impl
    if not trace_rules.check(cls.forward):
        return call

    def enter(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return call(module, *args, **kwargs)

    return enter


def _compiled_call(self: Any) -> Callable[..., Any] | None:
    # What compiles or exports the model around it takes the module itself.
    if torch.compiler.is_compiling():
        return None
    # What is parametrized is a property of the class, of which the other of the twins knows nothing.
    if not all(hasattr(type(self), name) for name in self._modules.get("parametrizations") or ()):
        raise OptionError(
            f"this {type(self).__name__} was parametrized after fxopt.optimize; parametrize the model, then optimize it"
        )
    return MethodType(type(self)._fxopt_call.compiled, self)


def _refuse(self: nn.Module, value: object) -> None:
    raise OptionError(
        f"this {type(self).__name__} is compiled by fxopt.optimize already; leave out its .compile(), or the optimize"
    )


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _reduce(self: Any, protocol: Any) -> Any:
    """As the class has it, but for a class that can't be found by its name: that is made anew from the user's."""
    made: Any = next(cls for cls in type(self).__mro__ if _SOURCE in cls.__dict__)
    reduced = super(made, self).__reduce_ex__(protocol)
    named = _by_name(made)
    if type(self) is not made or named is made or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return reduced
    source = made.__dict__[_SOURCE]
    user = named if isinstance(named, type) and named.__dict__.get(_SOURCE) is source else source
    return (_renewed, (user, dict(made.__dict__["_fxopt_call"].settings), *reduced[1][1:]), *reduced[2:])


def _renewed(cls: type[nn.Module], settings: Mapping[str, Any], *args: Any) -> nn.Module:
    made = optimized_class(cls, settings)
    new: nn.Module = made.__new__(made, *args)
    return new


def _by_name(cls: type) -> Any:
    parts = cls.__qualname__.split(".")
    return reduce(lambda found, name: getattr(found, name, None), parts, sys.modules.get(cls.__module__))
