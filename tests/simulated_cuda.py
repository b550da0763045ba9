"""A CUDA device that is not there, so that the pipeline's GPU branches run, and are tested, without a GPU.

    with simulated_cuda.installed(total_bytes=2**30) as cuda:
        ...  # torch.device("cuda") works, in this thread and in those begun here
        cuda.races, cuda.counts.launches, cuda.counts.waits, cuda.peak

It raises MixedDevices where tensors or generators of the CPU and of the device meet, and OutOfMemoryError beyond
its size. It finds races: two streams that touch one memory without an order between them (no `wait_stream`),
memory that is freed while another stream may still use it (no `record_stream`), and a pinned buffer that the host
writes, or reads, while a copy out of it, or into it, may be under way. It counts operators (each launches a kernel
or more), copies, and the host's waits for the device, by file and line.

It computes with the CPU's kernels. So it cannot see what numpy writes into pinned memory; a data type that CUDA's
kernel for an operator lacks; the rounding of cuBLAS, and CUDA's own random numbers; which operators autocast
converts on CUDA alone; what inference mode forbids; torch.compile; and time. Parameters are replaced when a module
moves to it: an optimiser made before that would keep those of the CPU. Processes that are started see no device.

What it replaces in torch holds for the whole process, until `uninstall` puts everything back. With pytest-xdist
(--dist loadfile) a process runs one test at a time, so a fixture that installs it for a test, or for a module
whose tests all need it, disturbs no other test; torch is not imported anew, which a process for each test would
take seconds for. Threads see the device if it was installed when they began.

Command  python tests/simulated_cuda.py STAGE [--memory-gb 80] [--no-bf16] [the stage's own options]
         STAGE: a module such as difficulty.compute_visual_neighbors; prints what was counted and found
"""

import argparse
import contextlib
import gc
import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import simulated_streams
import torch
import torch.nn.utils.clip_grad
import torch.utils._foreach_utils
from simulated_streams import DEFAULT_STREAM, Counts, Simulation
from simulated_tensors import FunctionMode, MixedDevices, SimulatedGenerator, SimulatedTensor, is_cuda

from common import cli

__all__ = ["Counts", "MixedDevices", "Simulation", "install", "installed", "uninstall"]
_undo = contextlib.ExitStack()


def install(total_bytes: int = 80 * 2**30, bf16: bool = True) -> Simulation:
    """Give this process a CUDA device of so many bytes; `bf16`: whether it multiplies bfloat16 (from 8.0 on)."""
    if simulated_streams.is_active():
        raise RuntimeError("a simulated CUDA device is installed already")
    simulation = Simulation(total_bytes, bf16)
    simulated_streams.activate(simulation)
    for owner, names in (
        (torch.cuda, _of_torch_cuda(simulation)),
        (torch, {"Generator": SimulatedGenerator, "autocast": _autocast(torch.autocast)}),
        (torch.inference_mode, _no_grad()),
        (torch.nn.Module, {"to": _module_to(torch.nn.Module.to)}),
        (threading.Thread, _of_threads()),
        (torch.utils._foreach_utils, {"_get_foreach_kernels_supported_devices": lambda: ["cuda"]}),
        (torch.nn.utils.clip_grad, {"_group_tensors_by_device_and_dtype": _grouping()}),
    ):
        for name, value in names.items():
            _undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
    supported = torch.utils._foreach_utils._foreach_supported_types
    supported.append(SimulatedTensor)
    _undo.callback(supported.remove, SimulatedTensor)
    _undo.enter_context(FunctionMode())
    return simulation


def uninstall() -> None:
    """Take the device away again, in the thread that installed it."""
    _undo.close()
    simulated_streams.activate(None)
    gc.collect()


@contextlib.contextmanager
def installed(total_bytes: int = 80 * 2**30, bf16: bool = True) -> Iterator[Simulation]:
    """The device, for as long as the block lasts."""
    try:
        yield install(total_bytes, bf16)
    finally:
        uninstall()


def _of_torch_cuda(simulation: Simulation) -> dict:
    """What torch.cuda then holds."""

    def reset_peak(device=None) -> None:
        simulation.peak = simulation.allocated

    def empty_cache() -> None:
        simulation.reserved = simulation.allocated

    capability = (8, 0) if simulation.bf16 else (7, 5)
    properties = SimpleNamespace(
        name="simulated",
        total_memory=simulation.total,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=1,
    )
    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: simulation.bf16 or including_emulation,
        "Stream": simulated_streams.Stream,
        "Event": simulated_streams.Event,
        "stream": simulated_streams.use_stream,
        "current_stream": simulated_streams.current_stream,
        "default_stream": lambda device=None: DEFAULT_STREAM,
        "synchronize": simulated_streams.synchronize,
        "mem_get_info": lambda device=None: (simulation.total - simulation.reserved, simulation.total),
        "memory_allocated": lambda device=None: simulation.allocated,
        "max_memory_allocated": lambda device=None: simulation.peak,
        "memory_reserved": lambda device=None: simulation.reserved,
        "reset_peak_memory_stats": reset_peak,
        "empty_cache": empty_cache,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }


def _autocast(autocast):
    """torch.autocast("cuda", ...) as that of the CPU, whose kernels compute."""
    return lambda device_type, *args, **kwargs: autocast("cpu", *args, **kwargs)


def _no_grad() -> dict:
    """Inference mode as no_grad: with subclasses of Tensor it does not work. Decorators enter it for each call."""

    def enter(self):
        self._no_grad = torch.set_grad_enabled(torch.is_grad_enabled() and not self.mode)

    def leave(self, *exception):
        torch.set_grad_enabled(self._no_grad.prev)

    return {"__enter__": enter, "__exit__": leave}


def _module_to(move):
    """Module.to, which must replace the parameters that come to the device or leave it, and no others."""

    def to(module, *args, **kwargs):
        asked = [*args, kwargs.get("device")]
        devices = {is_cuda(value) for value in asked if isinstance(value, (str, torch.device))}
        here = {isinstance(tensor, SimulatedTensor) for tensor in [*module.parameters(), *module.buffers()]}
        if devices == here == {True} and not any(isinstance(value, torch.dtype) for value in asked):
            return module
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(bool(devices) and devices != here)
        try:
            return move(module, *args, **kwargs)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)

    return to


def _grouping():
    """The grouping of tensors by device of `clip_grad_norm_`, which asks C++ for the device."""
    group = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype
    return lambda tensors: {(found[0][0][0].device, key[1]): found for key, found in group(tensors).items()}


def _of_threads() -> dict:
    """Threads that see the device, and know what their parent has waited for."""
    start, run = threading.Thread.start, threading.Thread.run

    def start_thread(thread):
        simulated_streams.start_of_thread(thread)
        start(thread)

    def run_thread(thread):
        simulated_streams.in_thread(thread)
        with FunctionMode():
            run(thread)

    return {"start": start_thread, "run": run_thread}


def report(simulation: Simulation, lines: int = 15) -> str:
    """What was counted and found, as text."""
    counts = simulation.counts
    traffic = f"{counts.to_device_bytes / 2**20:.1f} MB to the device, {counts.to_host_bytes / 2**20:.1f} MB back"
    told = [f"{counts.launches:,} kernels, {traffic}, at most {simulation.peak / 2**20:.1f} MB in use"]
    told.append(f"{counts.copies['converted on the host']:,} copies were converted on the host first")
    for what, found in (("kernels", counts.kernels_at), ("waits", counts.waits_at)):
        told.append(f"{found.total():,} {what}")
        told += [f"{count:9,}  {kind:28} {at}" for (at, kind), count in found.most_common(lines)]
    told.append(f"{len(simulation.races):,} races")
    told += [f"{count:9,}  {race}" for race, count in simulation.races.most_common()]
    return "\n".join(told)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", help="module of a stage, such as train.train")
    parser.add_argument("--memory-gb", type=float, default=80, metavar="GB", help="of the device (80)")
    parser.add_argument("--no-bf16", action="store_true", help="a card before compute capability 8.0")
    args, of_stage = parser.parse_known_args(argv)
    stage = importlib.import_module(args.stage)
    with installed(int(args.memory_gb * 2**30), not args.no_bf16) as simulation:
        code = cli.exit_code_of(lambda: stage.main(of_stage))
        print(report(simulation))
    return code or int(bool(simulation.races))


if __name__ == "__main__":
    cli.run(main)
