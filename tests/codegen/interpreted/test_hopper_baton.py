"""Groups that take turns at products by a baton, emulated: the numbers are those of groups that don't; none waits in
vain, and none arrives where nobody waits."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fxopt.codegen.attention.hopper.kernel import source
from tests.codegen import emulated_barriers
from tests.codegen.cases import Shape, captured, operands, specification
from tests.codegen.emulated_barriers import NamedBarriers
from tests.codegen.emulated_gluon import emulated
from tests.codegen.interpreted.test_hopper_stream import launch
from tests.codegen.tiles import TILES
from tests.codegen.vectors import VECTORS

pytest.importorskip("triton.experimental.gluon")
pytestmark = pytest.mark.usefixtures("poisoned_outputs")
HALF = torch.bfloat16
CONFIGS = ("hopper:128x64s2q2a0", "hopper:192x64s3q2a0", "hopper:192x128s3q2a0", "hopper:192x64s2q3a1")
SHAPES = {
    "square": Shape(16, 16, 330, 330, 1, "group", "bshd", heads=2),
    # One tile to each of the three programs but one, which has two.
    "one block": Shape(16, 16, 260, 50, 1, "group", "bshd", heads=1, batch=2),
}
NAMES = ("plain", "causal", "window", "prefix", "alibi", "softcap", "block-diagonal", "lengths", "causal-band")


def assert_same(config: str, run: Callable[[str], tuple[Tensor, Tensor]]) -> None:
    wanted, found = run(config), run(f"{config}b")
    assert torch.isfinite(wanted[0]).all()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [(n, s, CONFIGS[(a + b) % len(CONFIGS)]) for a, n in enumerate(NAMES) for b, s in enumerate(SHAPES)],
)
def test_groups_in_turn_compute_what_others_do(
    name: str, shape: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = SHAPES[shape]
    spec = specification(name, sizes, HALF, "zero")
    q, k, v = operands(sizes, HALF)
    captures = captured(name, sizes, spec)
    assert_same(config, lambda text: launch(spec, q, k, v, captures, text, monkeypatch))


@pytest.mark.parametrize("number", range(len(VECTORS)))
def test_tiles_without_keys_take_no_turns(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = list(VECTORS)[number]
    sizes = Shape(16, 16, 200, 300, 1, batch=4, heads=2)
    spec = VECTORS[name].specification(HALF, "zero")
    q, k, v = operands(sizes, HALF)
    captures = VECTORS[name].draw(sizes)
    assert_same(CONFIGS[number % 3], lambda text: launch(spec, q, k, v, captures, text, monkeypatch))


@pytest.mark.parametrize("name", list(TILES)[:3])
def test_values_by_row_and_key_are_waited_for_with_the_baton_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Shape(16, 16, 330, 330, 1, "group", "bshd", heads=2)
    spec = TILES[name].specification(sizes, HALF, "zero")
    q, k, v = operands(sizes, HALF)
    captures = TILES[name].draw(sizes, HALF)
    assert_same("hopper:192x128s3q2a0", lambda text: launch(spec, q, k, v, captures, text, monkeypatch))


@pytest.mark.parametrize(("line", "reason"), [
    ("    if MEMBER == GROUPS - 1:\n        pass_baton(0)\n", "deadlock"),
    ("    if MEMBER == 0:\n        take_baton(0)\n", "nobody waited"),
])  # fmt: skip
def test_without_its_first_and_last_move_the_baton_is_lost(
    line: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Shape(16, 16, 130, 64, 1, "group", "bshd", heads=1, batch=1)
    text = source(specification("plain", sizes, HALF), 16, 16, HALF, "hopper:128x64s2q2a0b")
    assert text.count(line) == 1
    monkeypatch.setattr(emulated_barriers, "PATIENCE", 1.0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=3))
    with tempfile.TemporaryDirectory() as folder, pytest.raises(AssertionError, match=reason):
        emulated(text.replace(line, ""), Path(folder)).launch(*operands(sizes, HALF), [], True)


def test_named_barriers_let_through_whom_others_have_met() -> None:
    barriers = NamedBarriers()
    passed: list[int] = []

    def wait() -> None:
        barriers.wait(3, 256)
        passed.append(len(passed))

    thread = threading.Thread(target=wait)
    thread.start()
    barriers.arrive(4, 256)
    assert not barriers.idle and not passed
    barriers.arrive(3, 256)
    thread.join(5)
    assert passed == [0] and not barriers.idle
    barriers.wait(4, 256)
    assert barriers.idle
