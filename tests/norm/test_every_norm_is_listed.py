"""Norms that evaluation does not run, and those of a student that is prepared again, are in the report too."""

from __future__ import annotations

import pytest
from torch import Tensor, nn

import fxopt
from fxopt.errors import PreparationError
from fxopt.passes import RepBatchNorm, UnifiedNorm
from tests.norm.models import CHANNELS, One, encoder, inputs


class Auxiliary(One):
    """Norms that evaluation has no use for."""

    def __init__(self) -> None:
        super().__init__(nn.LayerNorm(CHANNELS))
        self.extra, self.plain, self.spare = (
            nn.LayerNorm(CHANNELS),
            nn.RMSNorm(CHANNELS, elementwise_affine=False),
            nn.Linear(3, 3),
        )
        self.scale = nn.PReLU(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.plain(self.extra(y)).mean() if self.training else y


def test_norms_that_run_in_training_only_are_listed() -> None:
    student = fxopt.prepare(Auxiliary(), (inputs(1)[0],), passes=[RepBatchNorm(steps=5)])
    sites = {site.source.module: site for site in fxopt.prepared(student).report.sites}
    assert {name: site.status for name, site in sites.items()} == {
        "norm": "rewritten", "extra": "kept", "plain": "kept",
    }  # fmt: skip
    for name in ("extra", "plain"):
        assert "does not run when the model is called with the example arguments in evaluation" in sites[name].reason


def test_a_norm_that_runs_in_training_only_can_not_be_selected() -> None:
    with pytest.raises(PreparationError, match="extra: it does not run"):
        fxopt.prepare(Auxiliary(), (inputs(1)[0],), passes=[RepBatchNorm(steps=5, select="extra")])


def test_preparing_again_keeps_what_was_said_before() -> None:
    x = inputs(1)[0]
    first = fxopt.prepare(encoder(), (x,), passes=[RepBatchNorm(steps=0, select="blocks.*")])
    student = fxopt.prepare(first, (x,), passes=[UnifiedNorm()])
    report = fxopt.prepared(student).report
    assert {site.source.module: site.rule for site in report.sites} == {
        **{f"blocks.{i}.{name}": "rep-batch-norm" for i in range(2) for name in ("norm", "root")},
        "last": "unified-norm",
    }
    assert report.count("norm") == 5
    norms = [site for site in fxopt.convert(student, [x]).report.sites if site.kind == "norm"]
    assert len(norms) == 5
    assert all("models.py" in site.source.location for site in norms), "the lines that were exchanged"
    with pytest.raises(PreparationError, match=r"blocks\.0\.norm: it is exchanged already, by rep-batch-norm; .*last"):
        fxopt.prepare(student, (x,), passes=[UnifiedNorm()])
    with pytest.raises(PreparationError, match=r"last: it is exchanged already"):
        fxopt.prepare(student, (x,), passes=[UnifiedNorm(select="last")])
