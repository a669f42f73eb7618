"""Why was this attention left alone? Read the near miss, mend the model, look at every step.

python examples/explain_and_dump.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import fxopt


class Pooling(nn.Module):
    """Attention of a few learned queries over a sequence. With ``cut`` small weights count as none."""

    def __init__(self, channels: int = 64, queries: int = 4, *, cut: float = 0.0) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, channels))
        self.keys = nn.Linear(channels, channels)
        self.values = nn.Linear(channels, channels)
        self.cut = cut

    def forward(self, x_BTC: Tensor) -> Tensor:
        """``[B, T, C]`` to ``[B, Q, C]``."""
        queries_BQC = self.queries.expand(len(x_BTC), -1, -1)
        scores_BQT = queries_BQC @ self.keys(x_BTC).transpose(-2, -1) * 0.125
        weights_BQT = scores_BQT.softmax(-1)
        if self.cut:
            weights_BQT = torch.relu(weights_BQT - self.cut)
        pooled_BQC: Tensor = weights_BQT @ self.values(x_BTC)
        return pooled_BQC


def main(directory: str | Path = "out/pooling") -> tuple[fxopt.Report, fxopt.Report]:
    """Explain the module that cuts its weights and the one that doesn't; dump the second. Return both reports."""
    torch.manual_seed(0)
    x_BTC = torch.randn(2, 50, 64)
    with torch.no_grad():
        before = fxopt.explain(Pooling(cut=0.01), x_BTC)
        for site in before.sites:
            print(f"{site.kind} {site.status} at {site.source.location}\n    {site.source.code}\n    {site.reason}")

        print("\nWithout the cut:")
        mended = Pooling()
        after = fxopt.explain(mended, x_BTC)
        for site in after.sites:
            print(f"{site.kind} {site.status}: {site.reason}")

        program = fxopt.capture(mended, (x_BTC,))
        folder = program.dump(directory)
    print(f"\nThe program as captured:\n{program.code}")
    print(f"{folder} holds")
    for path in sorted(folder.rglob("*")):
        print(f"    {path.relative_to(folder)}")
    return before, after


if __name__ == "__main__":
    main()
