"""Choice of device and precision, and placement of arrays on the device."""

import numpy as np
import torch

from common.errors import ConfigError
from common.sections import Infrastructure


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
    return device.type != "cuda" or size <= free_bytes(device) * 2 // 3


def free_bytes(device: torch.device) -> int:
    """The free memory of a CUDA device, with what torch keeps of memory that this process has freed."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def search_memory_mb(settings: Infrastructure, device: torch.device) -> int:
    """infrastructure.search_memory_mb; "auto" is 1,024 on a CPU, and a quarter of what is free on CUDA, at
    most 4,096: no tile is larger."""
    if settings.search_memory_mb != "auto":
        return settings.search_memory_mb
    return min(4_096, free_bytes(device) // 2**22) if device.type == "cuda" else 1_024


def place(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device` if it `fits`; else on the CPU, sharing memory."""
    tensor = torch.from_numpy(array)
    return tensor.to(device) if fits(array.nbytes, device) else tensor
