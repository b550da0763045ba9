"""Choice of device and precision, and placement of arrays on the device.

A backbone runs on CUDA, Intel's XPU, Apple's MPS or the CPU; neighbour search, training and evaluation on CUDA or
the CPU: the first two compute in float64, which MPS and most XPUs lack.
"""

import logging
import warnings
from pathlib import Path

import numpy as np
import torch

from common.errors import ConfigError, explained, first_line
from common.sections import Infrastructure

log = logging.getLogger("pipeline")
_FIRST_CARD = Path("/dev/nvidia0")


def pick(name: str, for_backbone: bool = False) -> torch.device:
    """The device for `infrastructure.device`: "auto" is the first of CUDA, XPU and MPS that is there, or the CPU.

    XPU and MPS are only `for_backbone`; other stages run on the CPU there. A warning says why "auto" cannot use an
    NVIDIA GPU that is there. Raises ConfigError if the device named is not available.
    """
    kind, _, index = name.partition(":")
    if kind == "cpu" or (not for_backbone and kind in ("xpu", "mps")):
        return torch.device("cpu")
    trouble = _trouble_with_cuda() if kind in ("auto", "cuda") else None
    counts = {"cuda": 0 if trouble else torch.cuda.device_count()}
    if for_backbone:
        counts |= {"xpu": torch.xpu.device_count(), "mps": int(torch.backends.mps.is_available())}
    if kind == "auto":
        if trouble:
            log.warning("the GPU is not used: %s", trouble)
        return torch.device(next((there for there, count in counts.items() if count), "cpu"))
    if int(index or 0) >= counts[kind]:
        reason = trouble or f"{counts[kind]} {kind.upper()} devices are available"
        raise ConfigError(f'infrastructure.device = "{name}", but {reason}\nuse "auto"')
    return torch.device(name)


def _trouble_with_cuda() -> str | None:
    """Why torch can use none of the NVIDIA GPUs, and what to do; None if it can, or if there are none.

    torch.cuda.device_count() may count GPUs that torch cannot use.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what is returned here
        if torch.cuda.is_available():
            return None
    try:
        torch.cuda.init()
    except Exception as error:  # of several types, with the reason
        text = str(error)
        if "not compiled" in text and _FIRST_CARD.exists():
            return f"torch {torch.__version__} is without CUDA; make install CONSTRAINTS= in a new .venv has it"
        if not any(words in text for words in ("not compiled", "Found no NVIDIA driver", "No CUDA GPUs")):
            return "; ".join(explained(error) or [first_line(error)])
    return None


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The name of the dtype for a setting: "auto" is bfloat16 on CUDA GPUs that compute in it, else float32.

    GPUs before compute capability 8.0 (V100, T4) only emulate bfloat16. Their float16 is fast, and 60 times as
    exact (cosine distance, random ViTs), but ends at 65,504, which DINOv3 is reported to exceed: it must be named.
    """
    if dtype != "auto":
        return dtype
    is_fast = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return "bfloat16" if is_fast else "float32"


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes fit in two thirds of the free memory of a CUDA device; always on a CPU."""
    return device.type != "cuda" or size <= free_bytes(device) * 2 // 3


def free_bytes(device: torch.device) -> int:
    """The free memory of a CUDA device, with what torch keeps of memory that this process has freed."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def search_memory_mb(settings: Infrastructure, device: torch.device) -> int:
    """infrastructure.search_memory_mb; "auto" is 1,024 on a CPU, and a quarter of what is free on CUDA, 256
    to 4,096: no tile is larger."""
    if settings.search_memory_mb != "auto":
        return settings.search_memory_mb
    return int(np.clip(free_bytes(device) // 2**22, 256, 4_096)) if device.type == "cuda" else 1_024


def place(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` as a tensor on `device` if it `fits`; else on the CPU, sharing memory."""
    tensor = torch.from_numpy(array)
    return tensor.to(device) if fits(array.nbytes, device) else tensor
