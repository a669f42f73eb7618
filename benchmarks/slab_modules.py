"""A Swin block as it is published, and SLAB's, written from the formulas as plain PyTorch: the peers of fxopt.

Legend: B images, V windows of all images, N tokens of a window, C channels, D channels of a head, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxopt.passes.linear_attention.module import LinearisedModule
from fxopt.passes.norm.rep_module import RepNorm


@dataclass(frozen=True)
class Stage:
    """Sizes of a stage of Swin-T."""

    name: str
    channels: int
    heads: int
    side: int
    window: int = 7

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.side**2


STAGES = (
    Stage("stage 1", 96, 3, 56),
    Stage("stage 2", 192, 6, 28),
    Stage("stage 3", 384, 12, 14),
    Stage("stage 4", 768, 24, 7),
)


class SoftmaxWindows(nn.Module):
    """Swin's attention over windows ``[V, N, C]``, without shift and relative positions."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.heads = stage.heads
        self.qkv, self.proj = nn.Linear(stage.channels, 3 * stage.channels), nn.Linear(stage.channels, stage.channels)

    def forward(self, x_VNC: Tensor) -> Tensor:
        """See the class."""
        windows, tokens, channels = x_VNC.shape
        packed = self.qkv(x_VNC).reshape(windows, tokens, 3, self.heads, channels // self.heads)
        q_VHND, k_VHND, v_VHND = packed.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q_VHND, k_VHND, v_VHND)
        y_VNC: Tensor = self.proj(mixed.transpose(1, 2).reshape(windows, tokens, channels))
        return y_VNC


class SlabWindows(nn.Module):
    """SLAB's attention over windows ``[V, N, C]``, with the weights of a prepared `SoftmaxWindows`.

    ``wide`` computes queries, keys and values in float32, as the published code does.
    """

    def __init__(self, student: LinearisedModule, stage: Stage, *, wide: bool) -> None:
        super().__init__()
        self.heads, self.window, self.wide = stage.heads, stage.window, wide
        width = stage.channels // stage.heads
        self.qkv, self.proj = student.get_submodule("qkv"), student.get_submodule("proj")
        positions_HND = student.get_parameter("key_positions")
        self.positions = nn.Parameter(positions_HND.detach().transpose(0, 1).flatten(1)[None])
        weight = student.get_parameter("depthwise_weight").detach()
        self.depthwise = nn.Conv2d(width, width, weight.shape[-1], padding=weight.shape[-1] // 2, groups=width)
        self.depthwise.weight = nn.Parameter(weight[:, None].clone())
        self.depthwise.bias = nn.Parameter(student.get_parameter("depthwise_bias").detach().clone())

    def forward(self, x_VNC: Tensor) -> Tensor:
        """See the class."""
        windows, tokens, channels = x_VNC.shape
        q, k, v = self.qkv(x_VNC).chunk(3, -1)
        k = k + self.positions
        if self.wide:
            q, k, v = q.float(), k.float(), v.float()
        q, k, v = (x.reshape(windows, tokens, self.heads, -1).transpose(1, 2) for x in (F.relu(q), F.relu(k), v))
        total = q @ k.sum(2, keepdim=True).transpose(2, 3) + 1e-6
        mixed = (q @ (k.transpose(2, 3) @ v)) / total
        grid = v.transpose(2, 3).reshape(windows * self.heads, -1, self.window, self.window).to(x_VNC.dtype)
        near = self.depthwise(grid).reshape(windows, self.heads, -1, tokens).transpose(2, 3)
        mixed = mixed.to(x_VNC.dtype) + near
        y_VNC: Tensor = self.proj(mixed.transpose(1, 2).reshape(windows, tokens, channels))
        return y_VNC


class SlabNorm(nn.Module):
    """SLAB's norm in evaluation, ``BN(x) + α·x`` over ``[B, N, C]``, with the state of a prepared norm."""

    def __init__(self, student: RepNorm) -> None:
        super().__init__()
        channels = student.running_mean.numel()
        self.batch_norm = nn.BatchNorm1d(channels, eps=student.statistics.eps)
        # All in float32, as PyTorch has it for inputs of half precision.
        self.batch_norm.weight = nn.Parameter(student.batch_weight.detach().float())
        self.batch_norm.bias = nn.Parameter(student.batch_bias.detach().float())
        self.batch_norm.running_mean = student.running_mean.float()
        self.batch_norm.running_var = student.running_var.float()
        assert student.alpha is not None
        self.alpha = student.alpha

    def forward(self, x_BNC: Tensor) -> Tensor:
        """See the class."""
        x_BCN = x_BNC.transpose(1, 2)
        y_BNC: Tensor = (self.batch_norm(x_BCN) + self.alpha * x_BCN).transpose(1, 2)
        return y_BNC


class Block(nn.Module):
    """``x + attention(norm(x))``, and with ``fed`` the feed-forward half as well; ``x [B, side², C]``."""

    def __init__(self, stage: Stage, *, fed: bool) -> None:
        super().__init__()
        channels = stage.channels
        self.side, self.window, self.fed = stage.side, stage.window, fed
        self.norm1: nn.Module = nn.LayerNorm(channels)
        self.attention: nn.Module = SoftmaxWindows(stage)
        if fed:
            self.norm2: nn.Module = nn.LayerNorm(channels)
            self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """See the class."""
        x_BNC = x_BNC + self._join(self.attention(self._divide(self.norm1(x_BNC))), x_BNC)
        if self.fed:
            x_BNC = x_BNC + self.down(F.gelu(self.up(self.norm2(x_BNC))))
        return x_BNC

    def _divide(self, x_BNC: Tensor) -> Tensor:
        """Tokens of images to those of windows."""
        count, size = self.side // self.window, self.window
        grid = x_BNC.reshape(x_BNC.shape[0], count, size, count, size, x_BNC.shape[2])
        return grid.transpose(2, 3).reshape(-1, size * size, x_BNC.shape[2])

    def _join(self, x_VNC: Tensor, like_BNC: Tensor) -> Tensor:
        """The inverse."""
        count, size = self.side // self.window, self.window
        grid = x_VNC.reshape(like_BNC.shape[0], count, count, size, size, x_VNC.shape[2])
        return grid.transpose(2, 3).reshape(like_BNC.shape)


def slab(student: nn.Module, stage: Stage, *, fed: bool, wide: bool) -> Block:
    """SLAB's block in plain PyTorch, with the weights of a prepared `Block`."""
    block = Block(stage, fed=fed)
    attention, norm = student.get_submodule("attention"), student.get_submodule("norm1")
    assert isinstance(attention, LinearisedModule) and isinstance(norm, RepNorm)
    block.attention, block.norm1 = SlabWindows(attention, stage, wide=wide), SlabNorm(norm)
    if fed:
        norm = student.get_submodule("norm2")
        assert isinstance(norm, RepNorm)
        block.norm2 = SlabNorm(norm)
        block.up, block.down = student.get_submodule("up"), student.get_submodule("down")  # type: ignore[assignment]
    return block.eval()


@torch.no_grad()
def randomise(student: nn.Module) -> None:
    """Draw what starts at 0 or 1, so that nothing is equal by chance."""
    for name, value in (*student.named_parameters(), *student.named_buffers()):
        if name.endswith(("key_positions", "running_mean", "batch_bias")):
            value.normal_(0, 0.2)
        elif name.endswith(("running_var", "batch_weight", "alpha")):
            value.uniform_(0.5, 1.5)
