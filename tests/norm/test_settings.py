"""What users give that can't be: each is an error that says what would do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import CaptureError, OptionError
from fxopt.passes import RepBatchNorm, UnifiedNorm
from tests.norm.models import encoder, inputs

WRONG = {
    "steps as text": (lambda: RepBatchNorm(steps="100"), "steps='100' is not possible; give a whole number"),  # type: ignore[arg-type]
    "half a step": (lambda: RepBatchNorm(steps=2.5), "steps=2.5 is not possible; give a whole number"),  # type: ignore[arg-type]
    "a step that is true": (lambda: RepBatchNorm(steps=True), "steps=True is not possible"),
    "warmup of parts": (lambda: UnifiedNorm(warmup=1.0), "warmup=1.0 is not possible; give a whole number"),  # type: ignore[arg-type]
    "window as text": (lambda: UnifiedNorm(window="4"), "window='4' is not possible"),  # type: ignore[arg-type]
    "filter_outliers": (lambda: UnifiedNorm(filter_outliers=1), "filter_outliers=1 is not possible; choose True"),  # type: ignore[arg-type]
    "recalibrate of parts": (lambda: UnifiedNorm(recalibrate=1.5), "recalibrate=1.5 is not possible"),  # type: ignore[arg-type]
    "alpha": (lambda: RepBatchNorm(steps=1, alpha="1"), "alpha='1' is not possible; give a finite number"),  # type: ignore[arg-type]
    "start": (lambda: RepBatchNorm(steps=1, start=float("inf")), "start=inf is not possible; give a finite number"),
    "momentum as text": (lambda: UnifiedNorm(momentum="0.1"), "momentum='0.1' is not possible"),  # type: ignore[arg-type]
    "synchronize": (lambda: UnifiedNorm(synchronize="yes"), "synchronize='yes' is not possible"),  # type: ignore[arg-type]
    "select": (lambda: UnifiedNorm(select=5), "select=5 is not possible; give a name or pattern"),  # type: ignore[arg-type]
    "mask of another kind": (lambda: UnifiedNorm(mask=torch.ones(2)), "give the name of an argument"),  # type: ignore[arg-type]
    "steps": (lambda: RepBatchNorm(steps=-1), "steps=-1"),
    "warmup": (lambda: RepBatchNorm(steps=1, warmup=-2), "warmup=-2"),
    "warmup of a unified norm": (lambda: UnifiedNorm(warmup=-1), "warmup=-1"),
    "run on a graph": (lambda: UnifiedNorm().run(fxopt.capture(encoder(), (inputs(1)[0],))), "give it to fxopt.pre"),
    "momentum": (lambda: RepBatchNorm(steps=1, momentum=0.0), "momentum=0.0"),
    "recalibrate": (lambda: UnifiedNorm(recalibrate=0), "recalibrate=0"),
    "window": (lambda: UnifiedNorm(window=0), "window=0"),
    "eps": (lambda: UnifiedNorm(eps=float("nan")), "eps=nan"),
    "mask": (lambda: prepare_with(RepBatchNorm(steps=5, mask="pad")), "has: x, attention_mask"),
    "no passes": (lambda: fxopt.prepare(encoder(), (inputs(1)[0],), passes=[]), "passes is empty"),
    "an exact pass": (lambda: prepare_with(fxopt.passes.Gelu()), "gelu is not a trainable pass"),
    "a name without its options": (lambda: fxopt.prepare(encoder(), (), passes=["rep-batch-norm"]), "needs steps"),
    "a function": (lambda: fxopt.prepare(len, (), passes=[UnifiedNorm()]), "prepare takes an nn.Module"),  # type: ignore[arg-type]
    "in rewrite": (lambda: fxopt.rewrite(encoder(), (inputs(1)[0],), passes=[UnifiedNorm()]), "give it to fxopt.pre"),
}


def prepare_with(chosen: fxopt.Pass) -> nn.Module:
    return fxopt.prepare(encoder(), (inputs(1)[0],), passes=[chosen])


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_option_is_an_error_that_says_what_would_do(call: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call()


def test_arguments_must_be_a_tuple() -> None:
    with pytest.raises(CaptureError, match="write \\(x,\\)"):
        fxopt.prepare(encoder(), inputs(1)[0], passes=[UnifiedNorm()])  # type: ignore[arg-type]
