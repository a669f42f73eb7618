"""The model benchmark on tiny models on the CPU: it measures, checks, and loses nothing to a failing peer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import models
from benchmarks.accuracy import Reference, compare
from benchmarks.model_cases import CASES
from benchmarks.model_peers import ASKED_PEERS, PEERS
from benchmarks.model_results import CaseResult, PeerResult, judge
from benchmarks.timing import Timing

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

_QUICK = ("--quick", "--device", "cpu", "--rounds", "2", "--keep-caches")


def _run(output: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    status = models.main([*_QUICK, "--output", str(output), *arguments])
    results = json.loads(output.read_text())["results"]
    return status, {result["model"]: result for result in results}


def test_models_measures_and_checks_fxopt_beside_eager(tmp_path: Path) -> None:
    peers = ("--peers", "eager", "fxopt", "--fxopt-option", "base=eager")
    status, results = _run(tmp_path / "out.json", "--models", "bert-eager", *peers)
    measured = results["bert-eager"]["peers"]
    assert status == 0, measured["fxopt"]["reason"]
    assert results["bert-eager"]["best_peer"] == "eager"
    assert measured["fxopt"]["timing"]["samples"] == 2
    assert 0 < measured["fxopt"]["error"]["relative"] < 4 * measured["eager"]["error"]["relative"]
    assert measured["fxopt"]["graphs"] >= 1
    speedup = measured["eager"]["timing"]["median_ms"] / measured["fxopt"]["timing"]["median_ms"]
    assert results["bert-eager"]["speedups"]["fxopt"] == pytest.approx(speedup)
    seconds = measured["fxopt"]["fxopt_seconds"]
    assert 0 < seconds["own"] <= seconds["total"] <= measured["fxopt"]["first_call_seconds"]


def test_models_keeps_the_other_peers_where_one_fails_in_an_isolated_process(tmp_path: Path) -> None:
    peers = ("--peers", "eager", "fxopt", "--fxopt-option", "no_such_option=1")
    status, results = _run(tmp_path / "out.json", "--models", "llama", "--isolate", *peers)
    measured = results["llama"]["peers"]
    assert status == 1
    assert measured["fxopt"]["status"] == "failed"
    assert measured["fxopt"]["reason"]
    assert measured["eager"]["timing"]["median_ms"] > 0


def test_models_records_a_crashed_process_for_its_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crash = tmp_path / "crash"
    crash.write_text("#!/bin/sh\nkill -ABRT $$\n")
    crash.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(crash))
    status, results = _run(tmp_path / "out.json", "--models", "vit", "t5", "--isolate", "--peers", "eager")
    assert status == 1
    reasons = [result["peers"]["eager"]["reason"] for result in results.values()]
    assert len(reasons) == 2
    assert all("ended with status -6 before it wrote a result" in reason for reason in reasons)


def test_models_skips_and_says_so_after_the_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, results = _run(tmp_path / "out.json", "--models", "vit", "llama", "--peers", "eager", "--time-limit", "0")
    assert status == 0
    assert [result["peers"]["eager"]["status"] for result in results.values()] == ["skipped", "skipped"]
    assert "llama: skipped, the time limit is reached" in capsys.readouterr().out


def test_models_judges_fxopt_by_the_fastest_peer_that_is_not_fxopt() -> None:
    medians = {"eager": 4.0, "inductor": 3.0, "fxopt": 2.0, "fxopt-max-autotune": 1.0}
    peers = {name: PeerResult(timing=Timing(ms, ms, ms, 1, 1)) for name, ms in medians.items()}
    result = CaseResult("bert", "a model", peers=peers)
    judge(result)
    assert (result.best_peer, result.speedups) == ("inductor", {"fxopt": 1.5, "fxopt-max-autotune": 3.0})


def test_models_gives_the_mode_to_fxopt_with_and_without_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, object]] = []

    def backend(module: Any, inputs: Any, *, mode: str | None = None, options: object = None) -> Any:
        seen.append((mode, options))
        return module.forward

    monkeypatch.setattr("benchmarks.model_peers.fxopt_compile", backend)
    peer = PEERS["fxopt-max-autotune"]
    assert peer.mode == "max-autotune"
    for options in ({}, {"base": "eager"}):
        torch._dynamo.reset()
        peer.compile(lambda x: x + 1, options)(x=torch.ones(1))
    torch._dynamo.reset()
    assert seen == [("max-autotune", {"strict": True}), ("max-autotune", {"strict": True, "base": "eager"})]


def test_models_runs_some_peers_only_where_they_are_asked_for() -> None:
    standard = models._parser().parse_args([]).peers
    assert {*standard, *ASKED_PEERS} == {*PEERS}
    assert not {*standard} & {*ASKED_PEERS}


@pytest.mark.parametrize("name", CASES)
def test_models_builds_every_model_the_same_twice_and_sensitive_to_its_inputs(name: str) -> None:
    case, where = CASES[name], (torch.device("cpu"), torch.float32)
    model, inputs = case.build(*where, quick=True), case.make_inputs(*where, seed=0, quick=True)
    with torch.no_grad():
        output = model(**inputs)[0]
        repeated = case.build(*where, quick=True)(**inputs)[0]
    assert output.isfinite().all()
    assert torch.equal(output, repeated)
    assert not torch.allclose(output[0], output[1], atol=1e-3)


def test_compare_counts_nan_as_infinite_error_and_rejects_a_wrong_shape() -> None:
    expected = Reference(torch.ones(2, 3, dtype=torch.float64), "float64")
    assert compare(torch.full((2, 3), 1.5), expected).maximal == 0.5
    assert compare(torch.full((2, 3), float("nan")), expected).relative == float("inf")
    with pytest.raises(ValueError, match=r"shape \(3, 2\), expected \(2, 3\)"):
        compare(torch.ones(3, 2), expected)


def test_models_lists_models_and_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert models.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*CASES, "reduce-overhead", "max-autotune", "fxopt"))
