"""The cost model: blocks that masks leave, the order of well-known problems, what is tried, and what was measured."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fxopt.codegen.attention import cost, kernels
from fxopt.codegen.attention.kept import kept_blocks, listed_blocks
from fxopt.codegen.attention.portable.key_lists import left_out
from fxopt.codegen.attention.problem import Problem
from fxopt.errors import LoweringError
from fxopt.ir.attention import AttentionSpec, Capture
from fxopt.ir.expression import parse

HALF = torch.bfloat16
HOPPER = (9, 0)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SLOPES = Capture("-h--", torch.float32)
BIAS = Capture("-hij", HALF)
#: Score, mask and captured tensors of the kinds of attention that were measured.
KINDS: dict[str, tuple[str, str | None, tuple[Capture, ...]]] = {
    "plain": ("s * 0.125", None, ()),
    "causal": ("s * 0.125", "j <= i", ()),
    "window": ("s * 0.125", "(j <= i) & (j > i - 1024)", ()),
    "softcap": ("50.0 * tanh(s * 0.125 / 50.0)", None, ()),
    "relative-bias": ("s * 0.125 + c0 * float(j - i)", None, (SLOPES,)),
    "alibi": ("s * 0.125 + c0 * float(j - i)", "j <= i", (SLOPES,)),
    "dense-bias": ("s * 0.125 + c0", None, (BIAS,)),
    "t5-buckets": ("s * 0.125 + c0", None, (Capture("-h-d", HALF),)),
    "shifted": ("s * 0.125 + c0 + c1", None, (BIAS, Capture("p-ij", HALF))),
}


def specification(kind: str) -> AttentionSpec:
    score, mask, captures = KINDS[kind]
    return AttentionSpec(parse(score), None if mask is None else parse(mask), captures, out_dtype=HALF)


def problem(
    kind: str, width: int, batch: int | None, heads: int | None, rows: int | None, keys: int | None, **rest: Any
) -> Problem:
    sizes: dict[str, Any] = {"batch": batch, "heads": heads, "kv_heads": heads, "rows": rows, "keys": keys}
    return Problem(specification(kind), width, width, HALF, HOPPER, **(sizes | rest))


VIT = problem("plain", 64, 128, 12, 197, 197)
BERT_SHORT = problem("plain", 64, 128, 12, 128, 128)
BERT = problem("plain", 64, 32, 12, 512, 512)
SWIN = problem("shifted", 32, 4096, 3, 49, 49)
LLAMA = problem("causal", 128, 2, 32, 2048, 2048, kv_heads=8)
TRAINING = dataclasses.replace(LLAMA, with_lse=True)
DECODE = problem("plain", 128, 1, 32, 1, 8192, kv_heads=8)
UNKNOWN = problem("causal", 128, None, None, None, None)
DYNAMIC = problem("causal", 64, 8, 16, 512, 512, dynamic_keys=True)
OLDER = dataclasses.replace(LLAMA, capability=(8, 0))
MANY = problem("plain", 128, 64, 16, 512, 128)
PROBLEMS = {
    "vit": VIT, "bert-128": BERT_SHORT, "bert-512": BERT, "swin": SWIN, "llama": LLAMA, "training": TRAINING,
    "decode": DECODE, "unknown": UNKNOWN, "dynamic": DYNAMIC, "older": OLDER, "many": MANY,
}  # fmt: skip
#: The family that should be fastest, and which families are tried.
EXPECTED = {
    "vit": ("pairs", {"pairs", "short", ""}), "bert-128": ("short", {"short", "pairs", ""}),
    "bert-512": ("hopper", {"hopper", ""}),
    "swin": ("short", {"short", ""}), "llama": ("hopper", {"hopper", ""}), "training": ("hopper", {"hopper", ""}),
    "decode": ("split", {"split", ""}), "unknown": ("hopper", {"hopper", ""}), "dynamic": ("hopper", {"hopper", ""}),
    "older": ("", {""}),
}  # fmt: skip


def family(config: str) -> str:
    return config.partition(":")[0] if ":" in config else ""


@pytest.mark.parametrize(("mask", "counts"), [
    (None, [8] * 8),
    ("j <= i", [1, 2, 3, 4, 5, 6, 7, 8]),
    ("j < i", [1, 2, 3, 4, 5, 6, 7, 8]),
    ("(j <= i) & (j > i - 128)", [1, 2, 3, 3, 3, 3, 3, 3]),
    ("(j <= i) | (j < 256)", [4, 4, 4, 4, 5, 6, 7, 8]),
    ("i // 128 == j // 128", [2] * 8),
    ("j // 128 <= i // 128", [2, 2, 4, 4, 6, 6, 8, 8]),
    ("(j // 128 <= i // 128) & (j // 128 > i // 128 - 2)", [2, 2, 4, 4, 4, 4, 4, 4]),
    ("(j // 128 < i // 128) | (j < 65)", [2, 2, 2, 2, 4, 4, 6, 6]),
    ("j <= i + (Sk - Sq)", [1, 2, 3, 4, 5, 6, 7, 8]),
    ("j < 65", [2] * 8),
    ("j < 0", [0] * 8),
    ("j <= i + b", [8] * 8),
    ("j < c0", [8] * 8),
])  # fmt: skip
def test_masks_leave_blocks(mask: str | None, counts: list[int]) -> None:
    spec = AttentionSpec(parse("s"), None if mask is None else parse(mask), (Capture("b---", torch.int64),))
    assert list(kept_blocks(spec, 512, 512, 64, 64)) == counts


@pytest.mark.parametrize(("mask", "counts"), [
    (None, [8] * 8),
    ("j <= i", [1, 2, 3, 4, 5, 6, 7, 8]),
    ("((abs(i - j) < 64) | (j < 4)) | (i < 4)", [8, 3, 4, 4, 4, 4, 4, 3]),
    ("(j <= i) & ((j < 4) | ((i - j) < 64))", [1, 2, 3, 3, 3, 3, 3, 3]),
    ("(j <= i) & ((j % 256) >= 250)", [0, 0, 0, 1, 1, 1, 1, 2]),
    ("(j <= i) & c1", [1, 2, 3, 4, 5, 6, 7, 8]),
    ("(j < c0) & (abs(i - j - b) < 4)", [8] * 8),
])  # fmt: skip
def test_lists_leave_blocks(mask: str | None, counts: list[int]) -> None:
    captures = (Capture("b---", torch.int64), Capture("b--j", torch.bool))
    spec = AttentionSpec(parse("s"), None if mask is None else parse(mask), captures)
    assert list(listed_blocks(spec, 512, 512, 64, 64)) == counts


@pytest.mark.parametrize(("mask", "length", "expected"), [
    (None, 8192, "few"),
    ("j <= i", 8192, "few"),
    ("(j <= i) & (((i - j) % 3) == 0)", 8192, "few"),
    ("(j <= i) & ((j < 4) | ((i - j) < 512))", 8192, "many"),
    ("(j <= i) & ((j < 4) | ((i - j) < 512))", 512, "few"),
    ("(c0 == c1) & (j <= i)", 8192, "perhaps"),
    ("c1 != 0", 8192, "few"),
    ("((abs(i - j) < 9) | (c0 == 1)) | (c1 == 1)", 8192, "perhaps"),
    ("(c2 & (j <= i)) & ((j < 4) | ((i - j) < 512))", 8192, "many"),
    ("c2 & (j <= i)", 8192, "few"),
])  # fmt: skip
def test_lists_are_for_masks_that_bounds_do_not_tell(mask: str | None, length: int, expected: str) -> None:
    captures = (Capture("b-i-", torch.int64), Capture("b--j", torch.int64), Capture("b-ij", torch.bool))
    read = captures if mask and "c2" in mask else captures[:2]
    spec = AttentionSpec(parse("s"), None if mask is None else parse(mask), read)
    assert left_out(spec, length, length) == expected


HOLES = AttentionSpec(parse("s * 0.125"), parse("((abs(i - j) <= 256) | (j < 64)) | (i < 64)"), out_dtype=HALF)
DOCUMENTS = AttentionSpec(
    parse("s * 0.125"), parse("c0 == c1"), (Capture("b-i-", torch.int64), Capture("b--j", torch.int64)), out_dtype=HALF
)


def test_lists_are_tried_where_they_should_take_less_time() -> None:
    """First on long sequences with holes; not on short ones; for documents beside hulls where nothing is known."""
    problems = {n: Problem(HOLES, 64, 64, HALF, HOPPER, 16384 // n, 16, 16, n, n) for n in (256, 2048, 8192)}
    tried = {n: kernels.ranking(p).tried for n, p in problems.items()}
    assert all("list" in config for n in (2048, 8192) for config in tried[n])
    assert not any("list" in config for config in tried[256])
    for capability in (HOPPER, (8, 0)):
        found = kernels.ranking(Problem(DOCUMENTS, 64, 64, HALF, capability, 4, 16, 16, 2048, 2048)).tried
        assert [config.endswith("list") for config in found if ":" not in config].count(True) == (capability != HOPPER)


def test_a_list_needs_a_mask() -> None:
    with pytest.raises(LoweringError, match="64x64w4s3list goes through a list of the blocks that a mask keeps"):
        kernels.source(AttentionSpec(parse("s")), 64, 64, HALF, "64x64w4s3list")


def test_blocks_follow_both_lengths_and_the_tiles() -> None:
    spec = AttentionSpec(parse("s"), parse("j <= i + (Sk - Sq)"))
    assert kept_blocks(spec, 130, 1000, 64, 128) == (8, 8, 8)
    assert kept_blocks(AttentionSpec(parse("s"), parse("j <= i")), 130, 1000, 64, 64) == (1, 2, 3)
    assert kept_blocks(AttentionSpec(parse("s")), 1, 8192, 16, 64) == (128,)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_right_family_comes_first(name: str) -> None:
    tried = kernels.ranking(PROBLEMS[name]).tried
    first, families = EXPECTED[name]
    assert family(tried[0]) == first
    assert {family(config) for config in tried} == families


@pytest.mark.parametrize("name", PROBLEMS)
def test_at_most_four_are_tried_in_order_and_the_portable_kernel_is_one(name: str) -> None:
    found = kernels.ranking(PROBLEMS[name])
    assert 1 <= len(found.tried) <= 4
    assert "" in {family(config) for config in found.tried}
    times = [found.expected[config] for config in found.tried]
    general = next(config for config in found.tried if not family(config))
    assert sorted(times) == times
    assert all(time <= 1.4 * times[0] for config, time in found.expected.items() if config != general)
    assert not set(found.tried) & set(found.left_out)
    assert kernels.candidates(PROBLEMS[name]) == (found.tried, dict(found.refused))


def test_a_cap_cuts_what_is_worth_trying_and_keeps_the_fallback() -> None:
    families = [{"a": 1.0, "b": 1.1}, {"c": 1.05, "d": 1.2}, {"e": 1.15, "f": 1.3}, {"general": 1.25, "other": 1.35}]
    assert kernels._worth_trying(families) == ("a", "c", "b", "general")
    assert kernels._worth_trying([{"a": 1.0, "b": 1.5, "c": 1.1}, {"general": 9.0}]) == ("a", "c", "general")
    assert kernels._worth_trying([{"a": 2.0, "b": 9.0}, {"general": 1.0}]) == ("general",)
    assert kernels._worth_trying([{"only": 3.0}]) == ("only",)
    assert kernels._worth_trying([]) == ()


def test_where_nothing_serves_nothing_is_ranked() -> None:
    found = kernels.ranking(problem("plain", 300, 1, 1, 8, 8))
    assert found.tried == () and not found.left_out and set(found.refused) == set(kernels.FAMILIES)


@pytest.mark.parametrize("name", PROBLEMS)
def test_more_work_takes_longer(name: str) -> None:
    asked = PROBLEMS[name]
    for config in kernels.ranking(asked).tried:
        kind = kernels.family(config)
        assert kind.seconds(dataclasses.replace(asked, batch=512), config) <= kind.seconds(
            dataclasses.replace(asked, batch=8192), config
        )


def test_a_causal_mask_saves_half_and_padding_to_tiles_costs() -> None:
    long = problem("plain", 128, 4, 16, 8192, 8192)
    seconds = kernels.family("hopper:128x128s2q2").seconds
    causal = dataclasses.replace(long, spec=specification("causal"))
    assert seconds(causal, "hopper:128x128s2q2") < 0.6 * seconds(long, "hopper:128x128s2q2")
    portable = kernels.FAMILIES[""].seconds
    few, more = (problem("plain", 64, 1024, 16, rows, rows) for rows in (64, 65))
    assert portable(more, "64x64w4s3r128") > 2 * portable(few, "64x64w4s3r128")


def test_nothing_is_faster_than_memory_and_products() -> None:
    device = cost.device_of(HOPPER)
    for asked in (LLAMA, BERT, VIT, DECODE):
        assert asked.batch and asked.heads and asked.rows and asked.keys and asked.kv_heads
        kept = 0.5 if asked.spec.mask is not None else 1.0
        flops = 4.0 * asked.batch * asked.heads * asked.rows * asked.keys * asked.head_dim * kept
        moved = 4.0 * asked.batch * asked.kv_heads * asked.keys * asked.head_dim
        peak = device.multiprocessors * device.clock * device.products
        floor = max(flops / peak, moved / device.memory)
        for config in kernels.ranking(asked).tried:
            assert kernels.family(config).seconds(asked, config) >= floor, config


def measured() -> list[Any]:
    """What one H100 took for every configuration that kernels are still tried with, in seconds, by problem."""
    found = []
    for name in ("h100-attention.json", "h100-attention-quick.json", "h100-attention-causal-d128.json"):
        for result in json.loads((RESULTS / name).read_text())["results"]:
            match = re.search(r"(\S+) D(\d+) N(\d+)$", result["case"])
            # Shorter ones were timed with their launches.
            if match is None or match[1] not in KINDS or "backward" in result["case"] or int(match[3]) < 2048:
                continue
            width, length = int(match[2]), int(match[3])
            asked = problem(match[1], width, 16_384 // length, 2048 // width, length, length)
            times = {key.removeprefix("fxopt "): value for key, value in result["timings"].items()}
            found.append(pytest.param(asked, times, id=f"{result['case']} {name}"))
    for case, times in json.loads((RESULTS / "h100-windows.json").read_text())["results"].items():
        _, batch, heads = re.split(r" [BH]", case.partition(" N")[0])
        sizes = (int(batch), int(heads), 49, 49)
        timed = {config: time for config, time in times.items() if isinstance(time, dict)}
        found.append(pytest.param(problem("shifted", 32, *sizes), timed, id=case))
    return found


@pytest.mark.parametrize(("asked", "timings"), measured())
def test_expectations_agree_with_measurements(asked: Problem, timings: dict[str, dict[str, float]]) -> None:
    """Each within a factor of 1.5, and the best guess at most 1.1 times as slow as the best."""
    ranked = kernels.ranking(asked)
    times = {c: timings[c]["median_ms"] / 1e3 for c in (*ranked.tried, *ranked.left_out) if c in timings}
    assert times
    for config, time in times.items():
        expected = {**ranked.expected, **ranked.left_out}[config]
        assert 1 / 1.5 <= expected / time <= 1.5, (config, expected, time)
    tried = [config for config in ranked.tried if config in times]
    assert times[tried[0]] <= 1.1 * min(times.values())
    assert min(times, key=lambda config: times[config]) in tried or min(times[c] for c in tried) <= 1.05 * min(
        times.values()
    )
