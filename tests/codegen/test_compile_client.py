"""Kernels compiled in another process: they are in Triton's cache then, and what fails there is compiled here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.cache import import_source
from fxopt.codegen import compile_client, compile_server
from fxopt.codegen.attention.operator import attention_forward
from fxopt.codegen.building import compile_together, launcher
from fxopt.ir.attention import AttentionSpec
from fxopt.ir.expression import parse
from tests.codegen.offline import compiler

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif(compile_client.processors() < 2, reason="one processor: nothing is compiled elsewhere"),
]

HALF = torch.bfloat16
SPEC = str(AttentionSpec(parse("s * 0.0625578125"), parse("j <= i"), out_dtype=HALF))
FILL = """
import triton
import torch

#: {0}


@triton.jit
def fill(out_ptr, value: triton.language.constexpr):
    triton.language.store(out_ptr, value{1})


def launch(out):
    fill[(1,)](out, value=3)
    return out
"""


@pytest.fixture(autouse=True)
def server() -> Iterator[None]:
    compile_client.stop()
    yield
    compile_client.stop()


def call(config: str, width: int = 32) -> partial[Any]:
    q, k, v = (torch.empty(2, 4, 256, width, dtype=HALF) for _ in range(3))
    return partial(attention_forward, q, k, v, [], SPEC, config, False)


def filled(name: str, extra: str = "") -> partial[Tensor]:
    generated = import_source("test_compile_client", FILL.format(name, extra))
    return partial(lambda: launcher(generated)(torch.zeros(1)))


@pytest.mark.parametrize("config", ["64x64w4s3", "128x64w8s2tma", "hopper:128x128s4q2a0", "hopper:192x128s3q2a0b"])
def test_what_another_process_compiled_is_read_from_the_cache(config: str, tmp_path: Path) -> None:
    with compiler(tmp_path) as compiled:
        compile_together([call(config)], beside=True)
    assert compiled and all(found.cached for found in compiled)


def test_without_other_python_to_run_kernels_are_compiled_here(tmp_path: Path) -> None:
    with compiler(tmp_path) as compiled:
        compile_together([filled("here")])
    assert [found.cached for found in compiled] == [False]
    assert not compile_client._SERVERS


def test_many_are_compiled_at_once_and_the_process_stays(tmp_path: Path) -> None:
    calls = [filled(str(n)) for n in range(12)]
    with compiler(tmp_path) as compiled:
        compile_together(calls[:6], beside=True)
        (first,) = compile_client._SERVERS
        compile_together(calls[6:], beside=True)
    assert len(compiled) >= 2 and [first] == compile_client._SERVERS and first.runs


def test_a_kernel_that_fails_there_fails_here_with_its_reason(tmp_path: Path) -> None:
    broken = filled("broken", " + nowhere")
    with compiler(tmp_path) as compiled:
        compile_together([broken, filled("whole")], beside=True)
        with pytest.raises(Exception, match="nowhere"):
            broken()
    assert [found.name for found in compiled if found.cached] == ["fill"]


def test_where_the_process_dies_kernels_are_compiled_here(tmp_path: Path) -> None:
    with compiler(tmp_path) as compiled:
        compile_client.start()
        (server,) = compile_client._SERVERS
        server.stop()
        with pytest.raises((OSError, ValueError)):
            server.ask(compile_server.Job(0, "m", "p", "", "k", ("a", "b"), ((), (), ()), None, {}, ""))
        compile_together([filled("after")], beside=True)
        assert [server] != compile_client._SERVERS, "another one was started"
    assert [found.cached for found in compiled] == [True]


def test_where_there_can_be_no_process_kernels_are_compiled_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with compiler(tmp_path) as compiled:
        compile_together([filled("alone")], beside=True)
    assert [found.cached for found in compiled] == [False]
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with compiler(tmp_path / "other") as compiled:
        compile_together([filled("alone too")], beside=True)
    assert [found.cached for found in compiled] == [False]


def test_what_waits_when_the_process_dies_is_compiled_here(tmp_path: Path) -> None:
    def die() -> None:
        time.sleep(0.2)
        compile_client._SERVERS[-1]._process.kill()

    with compiler(tmp_path) as compiled:
        compile_together([call("hopper:128x128s4q2a0", width=64), die], beside=True)
    assert len(compiled) == 1


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "from fxopt.codegen import compile_client\n"
        "compile_client.start(); print(compile_client._SERVERS[-1]._process.pid, flush=True)\n"
        "import os; os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    server, deadline = int(done.stdout), time.monotonic() + 30
    while Path(f"/proc/{server}").exists() and "Z" not in Path(f"/proc/{server}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)


def test_it_starts_without_pytorch() -> None:
    code = f"import runpy, sys; runpy.run_path({compile_server.__file__!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_another_assembler_put_in_place_later_changes_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Inductor does in a process whose graphs are all in its caches."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas_version

    other = tmp_path / "ptxas"
    real = knobs.nvidia.ptxas.path
    other.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release 99.9" || exec {real} "$@"\n'
    )
    other.chmod(0o755)
    get_ptxas_version.cache_clear()
    compile_client.note_assembler.cache_clear()
    with compiler(tmp_path / "cache") as compiled:
        compile_client.note_assembler()
        monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
        assert "99.9" in subprocess.check_output([knobs.nvidia.ptxas.path, "--version"], text=True)
        compile_together([filled("assembled")], beside=True)
        assert [found.cached for found in compiled] == [True]
        assert "99.9" not in get_ptxas_version(90)


@pytest.mark.parametrize("place", [None, "the user's"])
def test_the_process_has_the_assembler_that_was_noted(
    place: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []

    def popen(command: list[str], env: dict[str, str], **_: Any) -> None:
        started.append(env)
        raise OSError("enough")

    monkeypatch.setattr(compile_client, "note_assembler", lambda: place)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "Inductor's")
    monkeypatch.setattr(subprocess, "Popen", popen)
    assert not compile_client.start()
    assert [env.get("TRITON_PTXAS_PATH") for env in started] == [place]
