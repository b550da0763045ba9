"""Choice of device and precision, and placement of arrays on the device."""

import numpy as np
import torch

from common.errors import ConfigError


def pick(name: str) -> torch.device:
    """The device for `infrastructure.device`: "auto" is CUDA if available. Raises ConfigError."""
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise ConfigError(
            f'infrastructure.device = "{name}", but {num_gpus} CUDA devices are available: use "auto"'
        )
    return device


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The name of the dtype for a setting: "auto" is bfloat16 on CUDA, else float32."""
    if dtype == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return dtype


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes fit in two thirds of the free memory of a CUDA device; always on a CPU."""
    return device.type != "cuda" or size <= torch.cuda.mem_get_info(device)[0] * 2 // 3


def place(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device` if it `fits`; else on the CPU, sharing memory."""
    tensor = torch.from_numpy(array)
    return tensor.to(device) if fits(array.nbytes, device) else tensor
