"""One line on a module of one's own: the attention below is found in the code as it stands.

python examples/decorate_your_module.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import fxopt


class Decoder(nn.Module):
    """Causal attention with a linear distance bias (ALiBi), written out by hand, and a feed-forward layer."""

    def __init__(self, channels: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.feed_forward = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, x_BSC: Tensor) -> Tensor:
        """``[B, S, C]`` to ``[B, S, C]``."""
        batch, length, channels = x_BSC.shape
        packed = self.qkv(self.norm(x_BSC)).view(batch, length, 3, self.heads, -1)
        q_BHSD, k_BHSD, v_BHSD = packed.permute(2, 0, 3, 1, 4)
        position = torch.arange(length, device=x_BSC.device)
        distance_SS = position - position[:, None]
        slopes_H11 = 2.0 ** -torch.arange(1, self.heads + 1, device=x_BSC.device)[:, None, None]

        scores = q_BHSD @ k_BHSD.transpose(-2, -1) / math.sqrt(q_BHSD.shape[-1]) + slopes_H11 * distance_SS
        weights = scores.masked_fill(distance_SS > 0, -torch.inf).softmax(-1)
        x_BSC = x_BSC + self.out((weights @ v_BHSD).transpose(1, 2).reshape(batch, length, channels))
        output_BSC: Tensor = x_BSC + self.feed_forward(x_BSC)
        return output_BSC


@fxopt.optimize
class FastDecoder(Decoder):
    """The same module, compiled at its first call. ``@fxopt.optimize`` may as well stand on `Decoder` itself."""


def example(length: int = 96) -> tuple[Decoder, tuple[Tensor]]:
    """The plain module and its arguments: ``python -m fxopt explain examples/decorate_your_module.py:example``."""
    torch.manual_seed(0)
    return Decoder().eval(), (torch.randn(2, length, 128),)


def main(length: int = 96) -> float:
    """Show that parameters, signature and results stay; return the largest difference between the two modules."""
    plain, (x_BSC,) = example(length)
    fast = FastDecoder().eval()
    fast.load_state_dict(plain.state_dict())
    with torch.no_grad():
        difference = float((fast(x_BSC) - plain(x_BSC)).abs().max())
        print(fxopt.explain(plain, x_BSC))
    print(f"\nsame state_dict: {list(fast.state_dict()) == list(plain.state_dict())}")
    print(f"largest difference: {difference:.2e}")
    return difference


if __name__ == "__main__":
    main()
