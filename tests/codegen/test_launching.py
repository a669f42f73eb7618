"""What a call costs the host: what depends on the configuration alone is computed once, and by nothing slow."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention import kernels, operator
from fxopt.codegen.attention.backward import operator as backward
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.offline import compiler

triton = pytest.importorskip("triton")

HALF = torch.bfloat16
SPEC = AttentionSpec(parse("s * 0.125"), parse("j <= i"), out_dtype=HALF)
CONFIGS = {"64x64w4s3": 64, "128x64w8s2tma": 128, "hopper:128x128s2q2": 128, "short:64x64w4r1": 64, "split:64w4s3": 128}
#: Functions for the compiler, each some microseconds at run time, and what is parsed or looked for.
SLOW = {"cdiv", "get_default_for", "import_module", "find_spec"}


def text(config: str) -> str:
    width = CONFIGS[config]
    return kernels.source(SPEC, width, width, HALF, config)


def called(tree: ast.AST) -> set[str]:
    return {ast.unparse(node.func).split(".")[-1] for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("config", CONFIGS)
def test_launchers_call_nothing_slow(config: str) -> None:
    host = [
        node
        for node in ast.parse(text(config)).body
        if isinstance(node, ast.FunctionDef) and not node.decorator_list and node.name not in ("reference", "main")
    ]
    assert "launch" in {node.name for node in host}
    assert not {name for node in host for name in called(node)} & SLOW


@pytest.mark.parametrize("config", ["64x128w8s2-128x64w8s2", "hopper:64x128s4"])
def test_the_launcher_of_gradients_calls_nothing_slow(config: str) -> None:
    source = backward.source_of(str(SPEC), 64, 64, HALF, config, ())
    (launch,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "launch")
    assert not called(launch) & SLOW


def tensors() -> dict[str, Tensor]:
    packed = torch.zeros(2, 33, 3, 4, 64, dtype=HALF)
    return {
        "contiguous": torch.zeros(2, 4, 33, 64, dtype=HALF),
        "packed": packed[:, :, 1].transpose(1, 2),
        "head of 8 elements": torch.zeros(2, 4, 33, 8, dtype=HALF),
        "head of 4 elements": torch.zeros(2, 4, 33, 4, dtype=HALF),
        "float32, head of 4": torch.zeros(2, 4, 33, 4),
        "float32, head of 2": torch.zeros(2, 4, 33, 2),
        "begins at 2 bytes": torch.zeros(2 * 4 * 33 * 64 + 1, dtype=HALF)[1:].view(2, 4, 33, 64),
        "begins at 16 bytes": torch.zeros(2 * 4 * 33 * 64 + 8, dtype=HALF)[8:].view(2, 4, 33, 64),
        "not dense": torch.zeros(2, 4, 33, 128, dtype=HALF)[..., ::2],
        "transposed": torch.zeros(2, 4, 64, 33, dtype=HALF).transpose(2, 3),
        "expanded": torch.zeros(1, 4, 33, 64, dtype=HALF).expand(2, -1, -1, -1),
        "odd batch": torch.zeros(2 * 4 * 33 * 64 + 9, dtype=HALF).as_strided((2, 4, 33, 64), (8449, 2112, 64, 1)),
        "odd heads": torch.zeros(20_000, dtype=HALF).as_strided((2, 4, 33, 64), (8464, 2115, 64, 1)),
    }


DESCRIBABLE = {"contiguous", "packed", "head of 8 elements", "float32, head of 4", "begins at 16 bytes"}


@pytest.mark.parametrize("config", ["128x64w8s2tma", "hopper:128x128s2q2"])
@pytest.mark.parametrize("name", tensors())
def test_what_descriptors_can_read(config: str, name: str) -> None:
    """Dense rows, and everything else, the beginning too, at multiples of 16 bytes."""
    x = tensors()[name]
    found = operator.module(str(SPEC), 128, 128, HALF, config).describable(x)
    steps = [x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])]
    assert found == (name in DESCRIBABLE)
    assert found == (x.stride(-1) == 1 and min(x.stride()) > 0 and all(step % 16 == 0 for step in steps))


def test_a_call_only_looks_up_what_it_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    spec = str(AttentionSpec(parse("s * 0.12502"), out_dtype=HALF))

    def objection(*arguments: object) -> None:
        asked.append(arguments)

    def module(*_: object) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda q, k, v, captures, with_lse: (torch.empty_like(q), q.new_empty(0)))

    monkeypatch.setattr(operator, "objection", objection)
    monkeypatch.setattr(operator, "module", module)
    operands = [torch.zeros(1, 2, 16, 64, dtype=HALF) for _ in range(3)]
    for _ in range(3):
        operator.on_cuda(*operands, [], spec, "64x64w4s3", False)
    assert len(asked) == 1


TILED = AttentionSpec(parse("s * 0.125 + c0"), None, (Capture("-hij", HALF),), out_dtype=HALF)
TILE_CONFIGS = ("hopper:128x128s3q2a0", "hopper:192x128s3q2a0")


@pytest.mark.parametrize("config", TILE_CONFIGS)
@pytest.mark.parametrize("keys", [200, 197])
def test_tiles_are_copied_only_where_descriptors_cannot_read_them(config: str, keys: int) -> None:
    found = operator.module(str(TILED), 64, 64, HALF, config)
    whole = torch.randn(1, 4, 300, 208, dtype=HALF)
    for tile in (whole[..., :keys], whole[..., :keys].contiguous(), whole[..., 1 : keys + 1], whole.mT[..., :keys]):
        described = found.tiled(tile)
        assert (described.base is tile) == found.describable(tile)
        assert described.base.equal(tile) and found.describable(described.base)
        assert list(described.shape) == list(tile.shape) and described.block_shape == [1, 1, 64, 128]
    assert found.describable(whole[..., :keys]) and found.describable(whole[..., :keys].contiguous()) == (keys == 200)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("config", TILE_CONFIGS)
def test_launches_that_copy_no_tile_are_remembered(config: str, tmp_path: Path) -> None:
    q, k = torch.zeros(2, 4, 300, 64, dtype=HALF), torch.zeros(2, 2, 208, 64, dtype=HALF)
    whole = torch.zeros(1, 4, 300, 216, dtype=HALF)
    operator._REPLAYS.clear()
    with compiler(tmp_path, launches=True) as compiled:
        for tile, remembered in ((whole[..., 1:209], 0), (whole[..., :208], 1)):
            for _ in range(2):
                out, lse = operator.on_cuda(q, k, k, [tile], str(TILED), config, False)
            assert out.shape == q.shape and lse.numel() == 0
            assert len(operator._REPLAYS) == remembered
    assert {kernel.name for kernel in compiled} == {"attention_kernel"}
    operator._REPLAYS.clear()
