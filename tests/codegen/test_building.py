"""Kernels compiled without being run: all that a launch would, in several threads; failures stay where they belong."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen.attention.operator import attention_forward, module
from fxopt.codegen.building import compile_together, launcher
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import parse
from tests.codegen.offline import compiler

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

HALF = torch.bfloat16
#: A scale that no other test has: kernels once compiled stay in their module.
SPEC = str(AttentionSpec(parse("s * 0.0625078125"), parse("j <= i"), out_dtype=HALF))


def operands(rows: int = 256, keys: int = 256, width: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty(2, 4, length, width, dtype=HALF) for length in (rows, keys, keys))
    return q, k, v


def call(config: str, width: int = 64, **sizes: int) -> partial[Any]:
    return partial(attention_forward, *operands(width=width, **sizes), [], SPEC, config, False)


def kept(config: str) -> dict[Any, Any]:
    """What Triton keeps of the kernel for the device there is."""
    from triton.runtime import driver

    kernel = module(SPEC, 64, 64, HALF, config).attention_kernel
    found: dict[Any, Any] = kernel.device_caches[driver.active.get_current_device()][0]
    return found


def test_kernels_of_every_family_are_compiled_in_other_threads_and_not_run(tmp_path: Path) -> None:
    calls = {
        "64x64w4s3": call("64x64w4s3"),
        "128x64w8s2tma": call("128x64w8s2tma"),
        "short:64x64w4r1": call("short:64x64w4r1", rows=64, keys=64),
        "split:64w4s3": call("split:64w4s3", rows=1, keys=2048),
    }
    with compiler(tmp_path) as compiled:
        compile_together(calls.values())
        for config in calls:
            (found,) = kept(config).values()
            assert found.metadata.target.arch == 90 and "cubin" in found.asm, config
    assert len(compiled) == len(calls) and not any(found.cached for found in compiled)
    assert threading.get_ident() not in {found.thread for found in compiled}


def test_the_hopper_kernel_is_compiled_too(tmp_path: Path) -> None:
    with compiler(tmp_path) as compiled:
        compile_together([call("hopper:128x64s2q1", width=128)])
    assert [found.name for found in compiled] == ["attention_kernel"]


def test_a_launch_finds_what_was_compiled_and_outside_it_launches(tmp_path: Path) -> None:
    config = "32x64w4s2"
    with compiler(tmp_path) as compiled:
        compile_together([call(config), call(config)])
        assert len(compiled) == 1, "kernels alike are compiled once"
        # What a launch needs the driver of a GPU for comes after the compiler.
        with pytest.raises((AttributeError, RuntimeError)):
            call(config)()
    assert len(compiled) == 1


def test_a_call_that_fails_keeps_no_other_from_being_compiled(tmp_path: Path) -> None:
    def fails() -> None:
        raise MemoryError("no room")

    refused = call("no configuration")
    with compiler(tmp_path) as compiled:
        compile_together([fails, refused, call("16x64w4s2")])
    assert len(compiled) == 1


def test_a_kernel_that_can_not_be_compiled_says_why_when_it_is_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.nvidia.compiler import CUDABackend

    def broken(*_: object) -> None:
        raise ValueError("the assembler gave up")

    config = "32x32w4s2"
    with compiler(tmp_path) as compiled:
        with monkeypatch.context() as patch:
            patch.setattr(CUDABackend, "make_cubin", broken)
            compile_together([call(config)])
            assert not kept(config), "nothing that failed is kept"
            with pytest.raises(ValueError, match="the assembler gave up"):
                call(config)()
        compile_together([call(config)])
        assert [found.name for found in compiled] == ["attention_kernel"]


def test_without_triton_s_mode_launchers_launch() -> None:
    generated = module(SPEC, 64, 64, HALF, "64x64w4s3")
    assert launcher(generated) is generated.launch
    seen: list[object] = []
    compile_together([lambda: seen.append(launcher(generated))])
    assert seen and seen[0] is not generated.launch
    assert launcher(generated) is generated.launch


MODULE = """
import triton


@triton.jit
def fill(out_ptr, value: triton.language.constexpr):
    triton.language.store(out_ptr, value)


def run(out, *, value=3):
    fill[(1,)](out, value=value)


def launch(out, value=None):
    run(out) if value is None else run(out, value=value)
    return out
"""


def test_functions_that_launch_for_a_launcher_only_compile_too(tmp_path: Path) -> None:
    generated = import_source("test_building", MODULE)
    out = torch.zeros(1)
    with compiler(tmp_path) as compiled:
        compile_together([lambda: launcher(generated)(out), lambda: launcher(generated)(out, 5)])
    assert [found.name for found in compiled] == ["fill", "fill"]
    assert generated.launch.__globals__ is vars(generated), "the module itself is as it was"


def test_another_mode_of_triton_s_is_left_alone(tmp_path: Path) -> None:
    """Who compiles asynchronously already gets kernels as ever, one by one."""
    import triton

    with compiler(tmp_path) as compiled, ThreadPoolExecutor(1) as pool, triton.AsyncCompileMode(pool):
        compile_together([call("16x32w4s2")])
    assert not compiled


def test_kernels_are_parsed_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here and in the threads: CPython's parser fails now and then in two threads at once."""
    from triton.runtime.jit import JITFunction

    parse, inside, most = JITFunction.parse, [0], [0]

    def watched(function: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        tree = parse(function)
        inside[0] -= 1
        return tree

    monkeypatch.setattr(JITFunction, "parse", watched)
    configs = ("64x32w4s4", "32x32w4s4", "16x32w4s4", "16x64w4s4")
    with compiler(tmp_path) as compiled:
        compile_together([call(config) for config in configs])
    assert len(compiled) == len(configs)
    assert most == [1]
    assert JITFunction.parse is watched


def test_what_calls_a_kernel_is_built_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    built: list[tuple[str, int]] = []

    def launcher_class(src: Any, metadata: Any) -> None:
        built.append((src.name, threading.get_ident()))

    with compiler(tmp_path) as compiled:
        monkeypatch.setattr(driver.active, "launcher_cls", launcher_class, raising=False)
        compile_together([call("16x64w4s3"), call("32x64w4s3")])
    assert len(compiled) == len(built) == 2
    assert threading.get_ident() not in {thread for _, thread in built}


def test_blocks_of_several_threads_overlap_and_triton_parses_as_before_in_the_end(tmp_path: Path) -> None:
    """The first to begin is the first to end: what it found must not come back while the other one goes on."""
    from triton.runtime.jit import JITFunction

    usual = JITFunction.parse
    begun, ended = threading.Event(), threading.Event()

    def first() -> None:
        compile_together([call("16x128w4s2"), lambda: begun.wait(60)])
        ended.set()

    def second() -> None:
        begun.set()
        ended.wait(60)
        assert JITFunction.parse is not usual

    with compiler(tmp_path) as compiled:
        thread = threading.Thread(target=first)
        thread.start()
        compile_together([second, call("32x128w4s2")])
        thread.join()
    assert len(compiled) == 2 and JITFunction.parse is usual
