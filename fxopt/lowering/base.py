"""The base compiler: what runs the part of the graph that fxopt doesn't lower itself."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from importlib import import_module
from threading import RLock, Thread
from typing import Any, Final

import torch
from torch import fx

from fxopt.codegen.compile_client import note_assembler
from fxopt.codegen.launching import DECOMPOSITIONS
from fxopt.codegen.mlp import gelu
from fxopt.errors import OptionError
from fxopt.lowering.options import Options
from fxopt.lowering.padding import pads_what_is_merged

_FUSE_ATTENTION: Final = "torch._inductor.fx_passes.fuse_attention"
_PATTERNS_LOCK: Final = RLock()


def compile_base(
    module: fx.GraphModule, inputs: Sequence[Any], options: Options, mode: str | None = None
) -> Callable[..., Any]:
    """Compile ``module`` with the base that ``options`` name; ``mode`` is torch.compile's.

    Raises:
        OptionError: among ``options.inductor`` is no setting of Inductor.
    """
    if options.base == "eager":
        return module.forward
    if options.base == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, list(inputs))
    from torch._inductor import list_mode_options

    from fxopt.lowering.first_pass import FirstPass

    _check_settings(options)
    if _on_cuda(inputs):
        # Before Inductor can put another one in its place.
        note_assembler()
    unpadded = {"comprehensive_padding": False} if pads_what_is_merged(module.graph) else {}
    patches = {**unpadded, **(list_mode_options(mode) if mode else {}), **dict(options.inductor)}
    place = "joint_custom_pre_pass"
    given = patches.get(place, getattr(torch._inductor.config, place))
    with without_attention_patterns() as take_away:
        patches[place] = FirstPass(take_away, given)
        return _compile_fx(module, inputs, patches)


def _compile_fx(module: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    with torch._inductor.config.patch(patches):
        table = _decompositions(torch._inductor.config.fallback_random)
        # Given the patches as well, it has them when it compiles a backward, which may be later.
        compiled: Any = compile_fx(module, inputs, config_patches=patches, decompositions=table)
        return compiled  # type: ignore[no-any-return]


def _check_settings(options: Options) -> None:
    from torch._inductor import list_options

    known = list_options()
    for name, _ in options.inductor:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise OptionError(f"inductor: torch._inductor.config has no setting {name!r}{hint}")


def start_base(inputs: Sequence[Any], options: Options) -> None:
    """Start Inductor's processes that compile kernels for a GPU, as its own backend does when it is entered.

    They take seconds to come up, and until then Inductor compiles one kernel after the other. Meanwhile Triton notes
    the version of its assembler, for which it may have to wait for a C compiler.

    Raises:
        OptionError: among ``options.inductor`` is no setting of Inductor.
    """
    if options.base == "inductor" and _on_cuda(inputs):
        from torch._inductor.async_compile import maybe_warm_pool

        _check_settings(options)
        with torch._inductor.config.patch(dict(options.inductor)):
            maybe_warm_pool()
        Thread(target=note_assembler, name="fxopt-assembler", daemon=True).start()


def _on_cuda(inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs)


#: Settings of Inductor under which it times kernels while it compiles.
_TIMING: Final = ("max_autotune", "max_autotune_gemm", "benchmark_fusion", "benchmark_combo_kernel")


def times_kernels(options: Options, mode: str | None) -> bool:
    """Whether Inductor will time kernels on the device while it compiles; ``mode`` is torch.compile's."""
    if options.base != "inductor":
        return False
    from torch._inductor import config, list_mode_options

    patches = {**(list_mode_options(mode) if mode else {}), **dict(options.inductor)}
    return any(patches.get(name, getattr(config, name, False)) for name in _TIMING)


class _Table(dict[Any, Callable[..., Any]]):
    """Decompositions that are pickled by name, since some of their functions can't be: Inductor's cache asks for it.

    What they do is in its key by another way (`fxopt.lowering.first_pass`).
    """

    def __init__(self, entries: Mapping[Any, Callable[..., Any]], fallback_random: bool) -> None:
        super().__init__(entries)
        self._fallback_random = fallback_random

    def __reduce__(self) -> tuple[Callable[[bool], _Table], tuple[bool]]:
        return _decompositions, (self._fallback_random,)


def get_ready(options: Options) -> None:
    """What Inductor does before its first graph, a second of Python: for the time that others compile in threads."""
    if options.base != "inductor":
        return
    import_module("torch._inductor.compile_fx")
    from torch._inductor.codecache import CacheBase, torch_key

    # Both are kept, and stand in the keys of its caches.
    torch_key()
    CacheBase.get_system()


@lru_cache(maxsize=2)
def _decompositions(fallback_random: bool) -> _Table:
    """Inductor's decompositions and our own: one table for all compilations, as PyTorch keeps what it traces by it.

    Inductor has two tables, by its setting ``fallback_random``.
    """
    from torch._inductor.decomposition import select_decomp_table

    usual = select_decomp_table()
    return _Table({**usual, **DECOMPOSITIONS, **gelu.decompositions(usual)}, fallback_random)


@contextmanager
def without_attention_patterns() -> Iterator[Callable[[], None]]:
    """Inside, a call of what this gives takes away Inductor's attention patterns, which accept a softmax over the wrong
    axis and permuted keys.

    Sites that fxopt keeps must stay what they are; those that Inductor could rewrite rightly were rewritten before. The
    call belongs between making the patterns, which Inductor does when it needs them, not where the graph is in its
    cache, and looking for them.
    """
    with _PATTERNS_LOCK, ExitStack() as put_back:
        yield partial(_take_away, put_back)


def _take_away(put_back: ExitStack) -> None:
    from torch._inductor.fx_passes import joint_graph

    for registry in (joint_graph.patterns, *joint_graph.pass_patterns):
        entries = {key: list(listed) for key, listed in registry.patterns.items()}
        put_back.callback(registry.patterns.update, entries)
        for key, listed in entries.items():
            registry.patterns[key] = [e for e in listed if not _is_attention_pattern(e)]


def _is_attention_pattern(entry: Any) -> bool:
    closure = getattr(entry.extra_check, "__closure__", None) or ()
    return any(getattr(cell.cell_contents, "__module__", "") == _FUSE_ATTENTION for cell in closure)
