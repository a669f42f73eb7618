"""Split kernels without a GPU: when they are tried, their source, and what they compile to."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.cache import import_source
from fxopt.codegen.attention import kernels
from fxopt.codegen.attention.portable.config import padded
from fxopt.codegen.attention.problem import Problem
from fxopt.codegen.attention.split.config import Config, fitting, read_config
from fxopt.codegen.attention.split.kernel import KIND, candidates, objection, source
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse
from tests.codegen.cases import EXPRESSIONS, Shape, specification
from tests.codegen.test_compiled import HALF, POINTER, SHARED, SPECS, pytestmark, stack_bytes

triton = pytest.importorskip("triton")
__all__ = ["pytestmark"]

SHAPE = Shape(80, 80, 1, 4096, 2, "group", "bshd", heads=8)
LENGTHS = AttentionSpec(parse("s * 0.125"), parse("j < c0"), (Capture("b---", torch.int64),), out_dtype=HALF)
PROBLEM = Problem(LENGTHS, 128, 128, HALF, (9, 0), batch=16, heads=32, kv_heads=8, rows=1, keys=8192)


def compiled(
    spec: AttentionSpec,
    widths: tuple[int, int],
    dtype: torch.dtype,
    config: str,
    architecture: int,
    rows: int = 16,
    wide: bool = False,
) -> Any:
    """The kernel as Triton would specialise it for aligned operands with contiguous rows."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cut = read_config(config)
    kernel = import_source(KIND, source(spec, *widths, dtype, config)).attention_kernel
    sizes = {"BLOCK_M": rows, "BLOCK_N": cut.block_n, "BLOCK_D": padded(widths[0]), "BLOCK_E": max(map(padded, widths))}
    switches = {"PRECISION": "ieee", "FAST_TANH": dtype is not torch.float32, "WITH_LSE": True}
    known = {**sizes, **switches, "EVEN": False, "WIDE": wide, "BATCHES": 16}
    known |= dict.fromkeys(("q_stride_d", "k_stride_d", "v_stride_e", "c0_stride_j"), 1)
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    aligned: dict[tuple[int], Any] = {}
    for position, name in enumerate(kernel.arg_names):
        if name in known:
            signature[name], constants[position,] = "constexpr", known[name]
            continue
        signature[name] = _type(name, spec, dtype)
        if name.endswith("_ptr") or "_stride_" in name:
            aligned[position,] = [["tt.divisibility", 16]]
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    text = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(text, target=GPUTarget("cuda", architecture, 32), options=options)


def _type(name: str, spec: AttentionSpec, dtype: torch.dtype) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    if name in ("lse_ptr", "scratch_ptr", "counter_ptr"):
        return "*i32" if name == "counter_ptr" else "*fp32"
    read = spec.captures[int(name[1])].dtype if name[0] == "c" else dtype
    return "*i64" if read is torch.int64 else POINTER[read]


#: (architecture, specification, head dimensions, dtype, rows of a tile)
CASES = [
    (90, "plain", (128, 128), HALF, 16),
    (90, "causal", (128, 128), HALF, 64),
    (90, "lengths", (128, 128), HALF, 16),
    (90, "lengths", (128, 128), HALF, 32),
    (90, "softcap-window", (256, 256), HALF, 32),
    (90, "tile-bias", (64, 64), HALF, 16),
    (90, "padding", (80, 96), HALF, 16),
    (90, "plain", (192, 128), HALF, 32),
    (90, "plain", (256, 256), HALF, 16),
    (90, "plain", (128, 128), torch.float32, 16),
    (80, "causal", (128, 128), HALF, 16),
    (80, "lengths", (64, 64), HALF, 64),
    (100, "causal", (128, 128), HALF, 16),
    (100, "lengths", (128, 128), HALF, 64),
]


@pytest.mark.parametrize(("architecture", "name", "widths", "dtype", "rows"), CASES)
def test_candidates_compile_without_spills(
    architecture: int, name: str, widths: tuple[int, int], dtype: torch.dtype, rows: int, tmp_path: Path
) -> None:
    spec = LENGTHS if name == "lengths" else SPECS[name]
    problem = Problem(spec, *widths, dtype, (architecture // 10, 0), 16, rows, 1, 1, 8192)
    for config in candidates(problem):
        kernel = compiled(spec, widths, dtype, config, architecture, rows)
        limit = SHARED[architecture] + 1024
        assert (kernel.metadata.shared + 1024) * read_config(config).programs <= limit, config
        assert stack_bytes(kernel.asm["cubin"], tmp_path) == 0, config
        # Keys and values are copied in steps of 16 bytes.
        copies = [line for line in kernel.asm["ttgir"].splitlines() if "async_copy_global_to_local" in line]
        operands = [line for line in copies if f"!tt.ptr<{'bf16' if dtype is HALF else 'f32'}>" in line]
        assert len(operands) >= 4, config
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"]
        assert all(f"contiguity = {16 // dtype.itemsize} " in line for line in operands if "cg :" not in line), config


def test_parts_are_counted_by_acquire_and_release_across_the_device() -> None:
    ptx = compiled(SPECS["plain"], (64, 64), HALF, "split:64w4s3", 90).asm["ptx"]
    assert re.findall(r"atom\.\S+", ptx) == ["atom.global.gpu.acq_rel.add.u32"]
    before = ptx[: ptx.index("atom.global.gpu")].splitlines()
    stores = max(n for n, line in enumerate(before) if "st.global" in line)
    barriers = max(n for n, line in enumerate(before) if "bar.sync" in line)
    assert stores < barriers, "all threads have stored their part before one counts"


@pytest.mark.parametrize("wide", [False, True])
def test_offsets_of_batches_heads_and_blocks_take_64_bits(wide: bool) -> None:
    text = compiled(SPECS["tile-bias"], (64, 64), HALF, "split:64w4s3", 90, wide=wide).asm["ttir"]
    products = [line for line in text.splitlines() if "arith.muli" in line]
    assert (
        len([line for line in products if ": i64" in line]) >= 8
    )  # batch and head of k, v, q, out; steps of k, v, bias
    offsets = [line for line in products if "xi32>" in line and "k_tile" in line]
    assert bool(offsets) != wide


@pytest.mark.parametrize(("change", "reason"), [
    ({"rows": 17}, "68 rows"), ({"rows": 3, "kv_heads": 1}, "96 rows"), ({"keys": 1023}, "1023 keys"),
    ({"rows": None}, "not known"), ({"heads": None}, "not known"), ({"dtype": torch.float64}, "bfloat16"),
    ({"head_dim": 257}, "256"),
])  # fmt: skip
def test_objections(change: dict[str, Any], reason: str) -> None:
    problem = dataclasses.replace(PROBLEM, **change)
    assert reason in (objection(problem) or "")
    assert not any(config.startswith("split:") for config in kernels.candidates(problem)[0])


@pytest.mark.parametrize("change", [{}, {"rows": 16}, {"keys": 1024}, {"keys": None}, {"rows": 2, "kv_heads": 1}])
def test_few_queries_and_many_keys_are_tried_beside_the_portable_kernel(change: dict[str, Any]) -> None:
    problem = dataclasses.replace(PROBLEM, **change)
    assert objection(problem) is None
    found, refused = kernels.candidates(problem)
    assert 1 <= len([c for c in found if c.startswith("split:")]) <= 2
    assert any(":" not in c for c in found) and "split" not in refused


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 8, 33, 64])
@pytest.mark.parametrize("width", [16, 40, 64, 80, 128, 192, 256])
def test_candidates(width: int, rows: int, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    found = fitting(width, width, dtype, capability, rows)
    assert 1 <= len(set(found)) == len(found) <= 2


@pytest.mark.parametrize("config", [Config(64, 4, 3), Config(128, 8, 2, 3)])
def test_configurations_print_and_read_back(config: Config) -> None:
    assert read_config(str(config)) == config
    assert kernels.family(str(config)) is kernels.FAMILIES["split"]


@pytest.mark.parametrize(
    "text",
    ["64w4s3", "split:64x64w4s3", "split:48w4s3", "split:8w4s3", "split:64w3s3", "split:64w4s0", "split:64w4s3x0"],
)
def test_what_is_no_configuration(text: str) -> None:
    with pytest.raises(LoweringError, match="configuration"):
        read_config(text)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_same_specification_same_bytes_and_valid_python(name: str) -> None:
    spec = specification(name, SHAPE, HALF)
    text = kernels.source(spec, 80, 80, HALF, "split:64w4s3x2")
    assert text == kernels.source(specification(name, SHAPE, HALF), 80, 80, HALF, "split:64w4s3x2")
    tree = ast.parse(text)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions[-6:] == ["attention_kernel", "counters", "multiprocessors", "launch", "reference", "main"]
    assert str(spec.score) in (ast.get_docstring(tree) or "")
    assert "fxopt" not in text.split('"""', 2)[2]
    assert max(map(len, text.splitlines())) <= 120
    assert ("BATCHES" in text) == (name == "lengths"), "only lengths by batch are looked up before the loop"


@pytest.mark.parametrize(("mask", "visited"), [
    ("j < c0", "stop = tl.minimum(Sk, tl.minimum(tl.maximum(c0, -1), Sk)"),
    ("j < c1", "stop = Sk"),
    ("j < h + 5", "stop = Sk"),
    ("j <= i + (Sk - Sq)", "stop = tl.minimum(Sk, last + ((Sk - Sq) + 1))"),
    ("j > i + 7", "start_block = tl.maximum(0, first + 8)"),
])  # fmt: skip
def test_bounds_that_all_rows_of_a_tile_share_limit_what_is_visited(mask: str, visited: str) -> None:
    captures = (Capture("b---", torch.int64), Capture("bh--", torch.int64))
    text = source(AttentionSpec(parse("s"), parse(mask), captures), 64, 64, HALF, "split:64w4s3")
    assert visited in text


@pytest.mark.parametrize(("rows", "heads", "tile"), [(1, 8, 16), (2, 32, 32), (5, 20, 64), (40, 16, 64)])
def test_one_launch_of_tiles_as_large_as_the_rows_want(
    rows: int, heads: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[object, dict[str, object]]] = []

    class Recorder:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *_, **options: seen.append((grid, options))

    module = import_source(KIND, source(AttentionSpec(parse("s")), 64, 64, HALF, "split:64w4s3x2"))
    monkeypatch.setattr(module, "attention_kernel", Recorder())
    q, k = (torch.empty((1, h, n, 64), dtype=HALF, device="meta") for h, n in ((heads, rows), (2, 4096)))
    far = torch.empty_strided((1, 2, 4096, 64), (64, 64, 2**24, 1), dtype=HALF, device="meta")
    module.launch(q, k, k)
    module.launch(q, k, far)
    assert [(grid, options["BLOCK_M"], options["WIDE"]) for grid, options in seen] == [((8,), tile, w) for w in (0, 1)]
