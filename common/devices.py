"""Which device computes, in which precision, and what fits on it."""

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


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The name of the dtype that a setting means on `device`."""
    if dtype == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return dtype


def fits(size: int, device: torch.device) -> bool:
    """Whether so many bytes take at most two thirds of the memory that is free on a CUDA device. The host, where
    they would lie otherwise, always takes them."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] * 2 // 3


def place(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device`, if it fits there (see `fits`); else on the host, where it shares memory."""
    tensor = torch.from_numpy(array)
    return tensor.to(device) if fits(array.nbytes, device) else tensor
