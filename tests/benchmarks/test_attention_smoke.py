"""The attention benchmark on tiny sizes on the CPU: specifications, masks of peers and float64 agree in every case."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention, attention_process
from benchmarks.attention_cases import Case, Probe
from benchmarks.attention_goals import GOALS, judge
from benchmarks.attention_groups import GROUPS
from benchmarks.attention_kinds import PLAIN, Kind, Sizes, window
from benchmarks.attention_measure import Settings, _configs, _error, measure
from benchmarks.attention_peers import PEERS
from benchmarks.attention_process import supervise
from benchmarks.attention_results import Result, Verdict
from benchmarks.progress import Progress
from benchmarks.timing import Timing
from fxopt.codegen.attention.kernels import source
from fxopt.codegen.attention.possible import possible_keys

_CPU = torch.device("cpu")
_SETTINGS = Settings(_CPU, torch.float32, rounds=1)
#: What a CPU can't run, by how the reason begins.
_IMPOSSIBLE = {
    "flex-flash": "ModuleNotFoundError",
    "flex": "NotImplementedError: FlexAttention does not support backward",
}
_TINY = attention.select(list(GROUPS), tiny=True)


#: A forward case of every kind.
_OF_EACH_KIND = {case.kind.name: case for case in _TINY if case.mode == "forward"}


@pytest.mark.parametrize("case", _TINY, ids=str)
def test_attention_agrees_with_float64_for_every_candidate_of(case: Case) -> None:
    result = measure(case, _SETTINGS)
    impossible = {name for name, why in result.failures.items() if why.startswith(_IMPOSSIBLE.get(name, "never"))}
    assert result.failures.keys() == impossible
    assert "flex" not in impossible or case.mode != "forward"
    assert {*case.peers} - impossible <= result.timings.keys()
    assert any(name.startswith("fxopt ") for name in result.timings)
    assert any(name.startswith("base ") for name in result.timings) == bool(case.baselines)
    assert all(error < 1e-5 for error in result.errors.values())
    assert result.verdicts


@pytest.mark.parametrize("kind", {case.kind.name: case.kind for case in _TINY if case.mode != "forward"}.values())
@pytest.mark.parametrize("width", [64, 128])
def test_training_has_backwards_to_time_at_the_widths_of_the_figures(kind: Kind, width: int) -> None:
    """Also for kinds with captured tensors, none of which needs a gradient here."""
    case = Case("backward", kind, Sizes(1, 2, 2, 16, 16, width), "", (), mode="backward")
    configs = _configs(case, replace(_SETTINGS, dtype=torch.bfloat16), case.operands(_CPU, torch.bfloat16))
    assert "/hopper:" in configs[0] and len(configs) > 1


@pytest.mark.parametrize("case", _OF_EACH_KIND.values(), ids=list(_OF_EACH_KIND))
def test_attention_has_a_kernel_to_time_for(case: Case) -> None:
    operands = case.operands(_CPU, torch.bfloat16)
    configs = _configs(case, replace(_SETTINGS, dtype=torch.bfloat16), operands)
    for config in configs:
        text = source(operands.spec, case.sizes.width, case.sizes.width, torch.bfloat16, config)
        compile(text, config, "exec")
    assert configs


#: For every kind a specification that is wrong by a little.
_NEAR_MISSES: dict[str, dict[str, Any]] = {
    "plain": {"score": "{s} * 1.01"},
    "causal": {"mask": "j <= i + 1"},
    "softcap": {"score": "{s}"},
    "alibi": {"score": "{s} + c0 * float(j - i) * 1.01"},
    "relative-bias": {"score": "{s} + c0 * float(i - j)"},
    "t5-buckets": {"score": "{s} - c0"},
    "window": {"mask": "(j <= i) & (j >= i - 9)"},
    "prefix": {"mask": "(j <= i) | (j <= 7)"},
    "documents": {"mask": "(c0 >= c1) & (j <= i)"},
    "longformer": {"mask": "((abs(i - j) <= 5) | (j < 2)) | (i < 1)"},
    "sinks": {"mask": "(j <= i) & ((j < 3) | ((i - j) < 9))"},
    "strided": {"mask": "(j <= i) & (((i - j) < 8) | ((j % 8) >= 5))"},
    "interleaved": {"mask": "(c0 >= c1) & (j <= i)"},
    "block-causal": {"mask": "(j // 12) < (i // 12)"},
    "dense-bias": {"score": "{s}"},
    "window-bias": {"score": "{s} * 1.01 + c0"},
    "shifted": {"score": "{s} + c0"},
    "padded-keys": {"mask": "c0 | (j == 39)"},
    "padded-rows": {"mask": "(c0 | (j == 39)) & c1"},
}


@pytest.mark.parametrize("case", _OF_EACH_KIND.values(), ids=list(_OF_EACH_KIND))
def test_attention_finds_a_specification_that_is_wrong_by_a_little_for(case: Case) -> None:
    wrong = replace(case, kind=replace(case.kind, **_NEAR_MISSES[case.kind.name]), peers=(), baselines=())
    result = measure(wrong, _SETTINGS)
    assert result.failures
    assert all(name.startswith("fxopt ") and why.startswith("wrong: error") for name, why in result.failures.items())
    assert result.timings == {}


def test_attention_finds_wrong_gradients() -> None:
    case = next(case for case in _TINY if case.mode == "backward" and case.kind.name == "softcap")
    result = measure(replace(case, kind=replace(case.kind, score="{s}"), peers=()), _SETTINGS)
    assert result.failures
    assert all(why.startswith("wrong: error") for why in result.failures.values())


def test_attention_counts_nan_as_infinite_error_but_in_rows_without_keys() -> None:
    out = torch.ones(1, 1, 3, 2)
    out[0, 0, 1] = float("nan")
    exact = torch.ones(3, 2, dtype=torch.float64)
    probe = Probe(0, 0, slice(0, 3), (exact,), torch.tensor([True, False, True]))
    assert _error((out,), [probe]) == 0.0
    assert _error((out,), [replace(probe, kept=torch.ones(3, dtype=torch.bool))]) == float("inf")


@pytest.mark.parametrize(
    ("kind", "kept", "computed"),
    [
        (PLAIN, 100 * 130, 100 * 130),
        # Blocks of queries begin at 0 and 64; in the first keys 0 … 63 are kept, in the second 0 … 99.
        (next(case.kind for case in _TINY if case.kind.name == "causal"), 100 * 101 // 2, 64 * 64 + 36 * 128),
        # In the second block of queries the first key is 62, in the first block of keys.
        (window(3), 1 + 2 + 98 * 3, 64 * 64 + 36 * 128),
    ],
    ids=["plain", "causal", "window"],
)
def test_attention_counts_the_work_that_masks_leave(kind: Kind, kept: int, computed: int) -> None:
    case = Case("forward", kind, Sizes(2, 6, 3, 100, 130, 8), "", ())
    work = case.work(kind, case.operands(_CPU, torch.float32))
    assert work.flops == 4 * 2 * 6 * 8 * kept
    assert work.computed == 4 * 2 * 6 * 8 * computed
    assert work.bytes == 2 * 2 * 3 * 130 * 8 * 4


def _timing(milliseconds: float) -> Timing:
    return Timing(milliseconds, milliseconds, milliseconds, 1, 1)


def test_attention_judges_every_goal_by_the_fastest_of_both_sides() -> None:
    (case,) = attention.select(["modified"], "window D64 N2048")
    result = Result(str(case), case.group)
    for name, milliseconds in {"fxopt a": 2.0, "fxopt b": 1.0, "flex": 1.4, "base plain a": 4.0}.items():
        result.timings[name] = _timing(milliseconds)
        result.work[name] = result.computed[name] = 5.0 if name.startswith("base") else 1.0
    judge(case, result)
    flex, plain = result.verdicts
    assert (flex.own, flex.other, flex.reached) == ("fxopt b", "flex", True)
    assert flex.ratio == pytest.approx(1.4)
    assert (plain.other, plain.reached) == ("base plain a", False)
    assert plain.ratio == pytest.approx(0.8)
    del result.timings["flex"]
    judge(case, result)
    assert result.verdicts[0].ratio is None
    assert result.verdicts[0].reached is None


@pytest.mark.parametrize("case", [case for case in _TINY if case.group == "padded"], ids=str)
def test_padding_is_judged_by_a_kernel_that_masks_it_and_knows_nothing(case: Case) -> None:
    """It gives the same in rows that are no padding; the batch without any padding is only compared with."""
    operands = case.operands(_CPU, torch.float32)
    unaware, full = case.baselines
    assert isinstance(unaware, Kind) and isinstance(full, Kind)
    spec = case.with_kind(unaware, operands).spec
    assert spec.mask is None and possible_keys(spec) is None
    found = zip(*(case.probes(k, case.with_kind(k, operands)) for k in (case.kind, unaware)), strict=True)
    for padded, masked in found:
        torch.testing.assert_close(masked.exact[0][padded.kept], padded.exact[0][padded.kept])
    result = Result(str(case), case.group)
    for name, milliseconds in {"fxopt a": 1.0, f"base {unaware.name} a": 1.9, f"base {full.name} a": 1.2}.items():
        result.timings[name] = _timing(milliseconds)
        result.work[name] = result.computed[name] = 1.0
    judge(case, result)
    assert [v.reached for v in result.verdicts] == [True, None]
    assert [v.ratio for v in result.verdicts] == pytest.approx([1.9, 1.2])


def test_attention_has_cases_for_every_goal_and_quick_ones_of_every_group_with_goals() -> None:
    cases = attention.select(list(GROUPS))
    assert len({str(case) for case in cases}) == len(cases)
    assert all(any(goal.concerns(case) for case in cases) for goal in GOALS)
    quick = attention.select(list(GROUPS), quick=True)
    assert {goal.group for goal in GOALS} == {case.group for case in quick}
    assert {case.kind.name for case in quick} >= {case.kind.name for case in cases if case.group == "modified"}
    assert [str(case) for case in attention.select(["forward"], "causal D64 N512")] == ["forward causal D64 N512"]


def _run(output: Path, *arguments: str) -> tuple[list[Result], dict[str, Any]]:
    common = ("--device", "cpu", "--tiny", "--rounds", "1", "--group", "short", "--output", str(output))
    results = attention.main([*common, *arguments])
    return results, json.loads(output.read_text())


def test_attention_writes_what_it_measured_and_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, document = _run(tmp_path / "out.json", "--case", "plain", "--configs", "32x32w4s2", "no-such:1")
    assert [Result.from_json(data) for data in document["results"]] == results
    assert "fxopt 32x32w4s2" in results[0].timings
    assert document["results"][0]["rates"]["sdpa-math"] > 0
    assert document["environment"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "1.20x the best peer" in printed
    assert [str(case) for case in attention.select(["short"], "plain", tiny=True)] == [results[0].case]


def test_attention_keeps_the_other_candidates_where_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setup: object) -> Any:
        raise RuntimeError("no kernel\nand more")

    monkeypatch.setitem(PEERS, "sdpa-math", broken)
    result = measure(attention.select(["short"], "plain", tiny=True)[0], _SETTINGS)
    assert result.failures == {"sdpa-math": "RuntimeError: no kernel"}
    assert {"sdpa-flash", "flex"} <= result.timings.keys()


def test_attention_skips_and_says_so_after_the_time_limit(tmp_path: Path) -> None:
    results, _ = _run(tmp_path / "out.json", "--time-limit", "0")
    assert [result.failures for result in results] == [{"case": "skipped: the time limit is reached"}] * 2


def test_attention_stops_where_the_device_is_lost_with_what_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "is_lost", lambda device: True)
    with pytest.raises(SystemExit, match="3"):
        _run(tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["case"] for result in written] == ["short plain D16 N40"]


def test_attention_runs_in_a_worker_process(tmp_path: Path) -> None:
    results, document = _run(tmp_path / "out.json", "--isolate", "--start", "1")
    assert [(result.case, result.failures) for result in results] == [("short dense-bias D16 N40", {})]
    assert len(document["results"]) == 1


def _worker(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o700)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [("kill -ABRT $$", "status -6"), ("exit 3", "status 3"), ("exec sleep 60", "hung: no result within 0.2 s")],
)
def test_attention_records_a_worker_that_dies_or_hangs_for_its_case_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str, reason: str
) -> None:
    _worker(tmp_path / "python", lines)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setattr(attention_process, "_START_SECONDS", 0.2)
    cases, published = attention.select(["short"], tiny=True), []
    results = supervise([], cases, 0.2, Progress(), lambda found: published.append(len(found)))
    assert [result.case for result in results] == [str(case) for case in cases]
    assert all(reason in result.failures["case"] for result in results)
    assert published == [1, 2]


def test_attention_takes_what_a_worker_wrote_before_it_lost_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Result("a", "short", timings={"fxopt": _timing(1.0)}, work={"fxopt": 1.0}, computed={"fxopt": 1.0})
    done.verdicts = [Verdict("goal", 1.0, "fxopt", None, None)]
    (tmp_path / "found.json").write_text(json.dumps({"results": [done.to_json()]}))
    copy = f"for last; do :; done; cp {tmp_path}/found.json $last; exit 3"
    _worker(tmp_path / "python", copy)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    results = supervise([], attention.select(["short"], tiny=True), 5.0, Progress(), lambda found: None)
    assert results == [done, done]


def test_attention_needs_a_gpu_or_tiny_sizes() -> None:
    with pytest.raises(SystemExit, match="--tiny"):
        attention.main(["--device", "cpu"])
