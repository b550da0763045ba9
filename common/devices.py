"""Which device computes, and what fits on it."""

import numpy as np
import torch

from common.errors import ConfigError


def pick(name: str) -> torch.device:
    """The device that `infrastructure.device` means: "auto" is CUDA if there is one. Raises ConfigError."""
    found = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if found else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ConfigError(
            f'infrastructure.device = "{name}", but there are {found} CUDA devices here; set it to "auto"'
        )
    return device


def place(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device`, if it takes at most two thirds of the free memory there; else on the host.

    On the host it shares memory with `array`.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cuda" and array.nbytes <= torch.cuda.mem_get_info(device)[0] * 2 // 3:
        return tensor.to(device)
    return tensor
