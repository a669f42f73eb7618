"""Reading what Nsight Compute prints: the counters of one run on an H200, cut down to the columns that are read."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import attention_profile

PAGE = (Path(__file__).parent / "attention_profile.csv").read_text()
CANDIDATES = ("window: fxopt", "window: flex", "plain: fxopt")


def test_kernels_are_told_apart_by_the_markers_before_them() -> None:
    window, flex, plain = attention_profile.kernels(PAGE, CANDIDATES)
    assert (window.candidate, flex.candidate, plain.candidate) == CANDIDATES
    assert flex.name == "triton_tem_fused_flex_attention_0"
    assert (window.microseconds, flex.microseconds, plain.microseconds) == (321.792, 383.52, 554.944)
    assert (plain.counters["tensor"], plain.counters["XU"]) == (56.198409, 58.704698)
    assert plain.counters["registers"] == 128
    assert sum(plain.waits.values()) == pytest.approx(1.0)
    assert max(plain.waits, key=lambda reason: plain.waits[reason]) == "long_scoreboard"


def test_the_table_names_what_warps_waited_for() -> None:
    shown = io.StringIO()
    table = attention_profile.table(list(attention_profile.kernels(PAGE, CANDIDATES)))
    Console(file=shown, width=250).print(table)
    assert "long_scoreboard 26%, wait 21%, selected 16%" in shown.getvalue()


def test_milliseconds_are_read_too() -> None:
    page = PAGE.replace('"us"', '"ms"', 1)
    assert next(attention_profile.kernels(page, CANDIDATES)).microseconds == 321_792.0


@pytest.mark.parametrize("names", [CANDIDATES[:2], (*CANDIDATES, "one more")])
def test_another_number_of_candidates_is_an_error(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="3 markers before the kernels of"):
        list(attention_profile.kernels(PAGE, names))


def test_what_is_no_page_is_an_error() -> None:
    with pytest.raises(ValueError, match="no page of raw counters: 'ERR_NVGPUCTRPERM"):
        list(attention_profile.kernels("ERR_NVGPUCTRPERM: no permission\n", CANDIDATES))


def test_of_our_own_candidates_the_first_one_is_profiled_unless_configurations_are_named() -> None:
    names = ["fxopt a", "fxopt b", "flex", "base plain a"]
    asked = argparse.Namespace(configs=[], names=["fxopt", "flex"])
    assert attention_profile._chosen(names, asked) == ["fxopt a", "flex"]
    assert attention_profile._chosen(names, argparse.Namespace(configs=["a", "b"], names=["fxopt"])) == names[:2]
