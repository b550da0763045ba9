"""The projection head: what is trained, and the last part of the published model.

Hugging Face copies this file beside the weights. It imports torch alone: transformers takes seconds to import.
"""

import torch
from torch import nn
from torch.nn import functional as F


class ProjectionHead(nn.Module):
    """y = normalize(W0 (x - mu) + g * MLP(x)) with x normalised first: (N, input_dim) -> (N, output_dim) float32.

    `linear.weight` (W0) and `mean` (mu) start as a learned whitening and the gain g at 0, so that training starts
    from the best linear baseline (`whitenlearn` of cnnimageretrieval-pytorch; Radenovic et al.
    2018, section 3.3). Both normalisations run in float32, also under autocast and with half-precision weights.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, dropout: float = 0.0):
        super().__init__()
        if output_dim > input_dim:
            raise ValueError(f"output_dim = {output_dim} exceeds the backbone's dimension {input_dim}")
        self.linear = nn.Linear(input_dim, output_dim, bias=False)
        self.mean = nn.Parameter(torch.zeros(input_dim), requires_grad=False)
        self.gain = nn.Parameter(torch.zeros(()))
        self.mlp = nn.Sequential(
            # the next layer can learn scale and shift; without them no gradient flows back to the input, which
            # saves a fifth of a training step's products
            nn.LayerNorm(input_dim, elementwise_affine=False),
            nn.Linear(input_dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, output_dim),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(x.float(), dim=-1)
        dtype = self.mean.dtype  # not linear.weight's: dynamic quantisation makes that a method
        y = self.linear((x - self.mean.float()).to(dtype)) + self.gain * self.mlp(x.to(dtype))
        return F.normalize(y.float(), dim=-1)
