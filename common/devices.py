"""Which device computes, and what fits on it."""

import numpy as np
import torch

from common.errors import ConfigError


def pick(name: str) -> torch.device:
    """The device that `infrastructure.device` means: "auto" is CUDA if there is one. Raises ConfigError."""
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    if name.startswith("cuda") and not available:
        raise ConfigError(f'infrastructure.device = "{name}", but there is no CUDA device here; set it to "auto"')
    return torch.device(name)


def place(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device`, if it takes at most two thirds of the free memory there; else on the host.

    On the host it shares memory with `array`.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and array.nbytes <= torch.cuda.mem_get_info(device)[0] * 2 // 3:
        return tensor.to(device)
    return tensor
