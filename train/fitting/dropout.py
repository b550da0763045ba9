"""Dropout for training on a CPU, where PyTorch's takes a fifth of a step: it draws its mask element by element."""

import torch
from torch import nn

_LEVELS = 2**16


class CpuDropout(nn.Module):
    """nn.Dropout with the probability rounded to 1/65,536: one random number gives four elements of the mask."""

    def __init__(self, p: float):
        super().__init__()
        self.dropped = round(p * _LEVELS)  # of _LEVELS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.dropped:
            return x
        numbers = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = numbers.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -32,768..32,767
        kept = levels >= self.dropped - _LEVELS // 2
        return x * (kept * (_LEVELS / (_LEVELS - self.dropped))).to(x.dtype)


def replace_dropout(layers: nn.Sequential) -> None:
    """Replace each nn.Dropout by a CpuDropout."""
    for place, layer in enumerate(layers):
        if isinstance(layer, nn.Dropout):
            layers[place] = CpuDropout(layer.p)
