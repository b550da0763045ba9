"""Tensors of the simulated CUDA device: numbers on the CPU that say they are on cuda:0.

Operators on them are computed by the CPU's kernels, after a check that no tensor or generator of the CPU is mixed
in, and noted as reads and writes of the current stream (simulated_streams.py). `FunctionMode` stands before
torch's functions and gives such tensors where "cuda" is asked for.
"""

import weakref
from collections.abc import Callable, Iterator

import torch
from simulated_streams import (
    CUDA,
    Block,
    access,
    active,
    copy_begins,
    hold,
    host_uses,
    is_active,
    is_pinned,
    pin,
    place,
    release,
)
from torch.overrides import TorchFunctionMode

# Operators that compute nothing: their results are other shapes of the same memory.
VIEWS = set(
    "view _unsafe_view t transpose permute slice select unsqueeze squeeze expand detach alias split "
    "split_with_sizes unbind as_strided _reshape_alias unfold lift_fresh diagonal view_as_real".split()
)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# CUDA takes a scalar tensor of the CPU as an argument of most kernels, but not as the table or index of these.
NO_SCALARS_OF_THE_CPU = {"index_select", "gather", "searchsorted", "bincount", "scatter_"}
# Functions that are one kernel on CUDA, and that the CPU splits up for tensors of another class than its own.
WHOLE = {"scaled_dot_product_attention", "adaptive_avg_pool2d"}
# Operators for whose result the host waits: its size depends on the values.
WAITS = {
    "nonzero": ["nonzero"],
    "masked_select": ["masked_select"],
    "_unique2": ["unique"],
    "unique_dim": ["unique"],
    "unique_consecutive": ["unique"],
    "equal": ["equal"],
    "_local_scalar_dense": ["item"],  # also bool(), float(), int()
    "bincount": ["bincount (min)", "bincount (max)"],
}

IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}  # and what ends with a "_"
# Functions that look at no number of a tensor. Properties are all "__get__".
METADATA = set("__get__ __len__ size dim stride numel element_size is_pinned data_ptr untyped_storage".split())


class MixedDevices(RuntimeError):
    """What CUDA refuses: tensors, or a generator, of the CPU where all must be on the device."""


class SimulatedTensor(torch.Tensor):
    """A tensor on the device. `on_cpu` holds its numbers."""

    on_cpu: torch.Tensor
    block: Block

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device="cpu",
        )
        self.on_cpu, self.block = on_cpu, hold(on_cpu)
        weakref.finalize(self, release, on_cpu.untyped_storage()._cdata).atexit = False
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def record_stream(self, stream) -> None:
        self.block.recorded.add(stream.number)

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def is_pinned(self, *args):
        return False

    def __deepcopy__(self, memo):
        copy = SimulatedTensor(self.on_cpu.clone())
        memo[id(self)] = new = torch.nn.Parameter(copy, self.requires_grad) if is_parameter(self) else copy
        return new

    def __reduce_ex__(self, protocol):
        return self.on_cpu.detach().__reduce_ex__(protocol)  # a saved tensor is loaded onto the CPU

    def __repr__(self, **_):
        return f"SimulatedTensor({tuple(self.shape)}, {self.dtype})"


def is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def leaves(values) -> Iterator:
    """What stands in the tuples, lists and dicts of an operator's arguments. (torch's pytree takes far longer.)"""
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from leaves(value)
    elif isinstance(values, dict):
        yield from leaves(tuple(values.values()))
    else:
        yield values


def mapped(function: Callable, values):
    """`values` with function(leaf) in place of each leaf."""
    if isinstance(values, (tuple, list)):
        return type(values)([mapped(function, value) for value in values])
    if isinstance(values, dict):
        return {key: mapped(function, value) for key, value in values.items()}
    return function(values)


def tensors_in(values) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(values) if isinstance(leaf, torch.Tensor)]


def wrapped(value):
    """A tensor of the CPU as one of the device, with the same memory; anything else as it is."""
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, SimulatedTensor)
    return SimulatedTensor(value) if is_plain else value


def unwrapped(value):
    return value.on_cpu if isinstance(value, SimulatedTensor) else value


def blocks_of(values) -> list[Block]:
    return [leaf.block for leaf in leaves(values) if isinstance(leaf, SimulatedTensor)]


# operators that the CPU lacks
ON_CUDA_ONLY = {torch.ops.aten.mm.dtype: lambda x, y, out_dtype: torch.mm(x.to(out_dtype), y.to(out_dtype))}


def dispatch(func, args: tuple, kwargs: dict):
    """Run an operator of which an argument is on the device."""
    name = func.overloadpacket.__name__
    if torch._C._current_graph_task_id() != -1:  # in a backward pass torch makes zeros for gradients that lack
        args = mapped(wrapped, args)
    tensors = tensors_in((args, kwargs))
    refuse_mixed(name, args, kwargs, tensors)
    if name == "copy_" and not all(isinstance(tensor, SimulatedTensor) for tensor in args[:2]):
        return copy_across(*args, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    if name in VIEWS:
        return mapped(wrapped, func(*mapped(unwrapped, args), **mapped(unwrapped, kwargs)))
    return launch(name, func, args, kwargs, tensors)


def refuse_mixed(name: str, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> None:
    """Raise MixedDevices as CUDA would. An index on the host is moved to the device, for which the host waits."""
    for tensor in tensors:
        if isinstance(tensor, SimulatedTensor) or name == "copy_":
            continue
        is_index = name in INDEXING and tensor is not args[0] and any(tensor is index for index in args[1])
        if is_index and isinstance(args[0], SimulatedTensor):
            active().copied("to the device", tensor.nbytes)
            active().waited("index on the host")
        elif tensor.dim() or name in NO_SCALARS_OF_THE_CPU:
            shapes = ", ".join(f"{tuple(each.shape)} on {each.device}" for each in tensors)
            raise MixedDevices(f"{name} of {shapes} at {place()}")


def launch(name: str, func, args: tuple, kwargs: dict, tensors: list[torch.Tensor]):
    """Run an operator that reads and writes memory of the device; note that, and what is waited for."""
    written = written_by(func, args, kwargs)
    read = [tensor for tensor in tensors if not any(tensor is one for one in written)]
    access(blocks_of(read), blocks_of(written))
    result = ON_CUDA_ONLY.get(func, func)(*mapped(unwrapped, args), **mapped(unwrapped, kwargs))
    for tensor in written:
        if tensor.shape != tensor.on_cpu.shape or tensor.stride() != tensor.on_cpu.stride():
            raise NotImplementedError(f"{name} changes the shape of a tensor: not simulated")
    for kind in waits_of(name, args, kwargs):
        active().waited(kind)
    if name == "_local_scalar_dense":
        active().copied("to the host", tensors[0].element_size())
        return result
    active().launched(name)
    same = {id(tensor.on_cpu): tensor for tensor in written}
    result = mapped(lambda value: same.get(id(value)) if id(value) in same else wrapped(value), result)
    access_made(result)
    return result


def access_made(result) -> None:
    """Note the results of an operator as written by it."""
    stream = torch.cuda.current_stream()
    for block in blocks_of(result):
        block.written = stream, stream.clock[stream.number]


def written_by(func, args: tuple, kwargs: dict) -> list[SimulatedTensor]:
    """The arguments that an operator changes, as its schema says."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in leaves(value) if isinstance(leaf, SimulatedTensor)]
    return found


def waits_of(name: str, args: tuple, kwargs: dict) -> list[str]:
    if name in INDEXING:
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        fills = len(args) > 2 and args[2].dim() == 0 and name != "index"  # of a mask: masked_fill_, no wait
        return ["boolean index"] if masks and not fills else []
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return ["repeat_interleave"]
    return WAITS.get(name, [])


def copy_across(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """target.copy_(source) with one of them on the host."""
    to_device = isinstance(target, SimulatedTensor)
    host = source if to_device else target
    access(blocks_of([] if to_device else [source]), blocks_of([target] if to_device else []))
    unwrapped(target).copy_(unwrapped(source))
    if to_device and source.dtype != target.dtype:
        active().counts.copies["converted on the host"] += 1
    active().copied("to the device" if to_device else "to the host", source.nbytes)
    pinned = is_pinned(host)
    if pinned:
        copy_begins(host, into=not to_device)
    if not to_device and not (pinned and non_blocking):
        active().waited("copy to the host")
    elif to_device and host.dim():  # a scalar goes with the kernel
        wait_for_copy_to_device(pinned, non_blocking)
    return target


def wait_for_copy_to_device(pinned: bool, non_blocking: bool) -> None:
    if not pinned:
        active().waited("copy from pageable memory")
    elif not non_blocking:
        active().waited("copy from pinned memory")


def to_device(tensor: torch.Tensor, dtype: torch.dtype | None, non_blocking: bool) -> SimulatedTensor:
    """tensor.to("cuda", dtype)."""
    if dtype not in (None, tensor.dtype):
        host_uses(tensor, writes=False)
        active().counts.copies["converted on the host"] += 1
    with torch._C.DisableTorchFunction():
        result = SimulatedTensor(tensor.detach().to(dtype or tensor.dtype, copy=True))
    access([], [result.block])
    active().copied("to the device", result.nbytes)
    pinned = is_pinned(tensor)
    if pinned:
        copy_begins(tensor, into=False)
    wait_for_copy_to_device(pinned, non_blocking)
    return result.requires_grad_(tensor.requires_grad)


def to_host(tensor: SimulatedTensor, dtype: torch.dtype | None, non_blocking: bool) -> torch.Tensor:
    """tensor.to("cpu", dtype); with `non_blocking` into pinned memory, as torch does it."""
    access([tensor.block], [])
    active().copied("to the host", tensor.nbytes)
    result = tensor.on_cpu.detach().to(dtype or tensor.dtype, copy=True)
    if non_blocking:
        pin(result)
        copy_begins(result, into=True)
    else:
        active().waited("copy to the host")
    return result


class SimulatedGenerator(torch.Generator):
    """torch.Generator: says which device it is for, and draws the CPU's numbers for either."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, "cpu")
        self.kind = torch.device(device)
        return self

    device = property(lambda self: self.kind)


def is_cuda(device) -> bool:
    """Whether an argument names the CUDA device. A number counts as well in torch; nothing here uses that."""
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


class FunctionMode(TorchFunctionMode):
    """Moves tensors to the simulated device and back, and creates them there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if not is_active():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if isinstance(generator := kwargs.get("generator"), SimulatedGenerator):
            wanted = "cuda" if is_cuda(kwargs.get("device")) or blocks_of((args, kwargs)) else "cpu"
            if generator.device.type != wanted:
                found = generator.device.type
                raise MixedDevices(f"{name}: a generator of {found} for a tensor on {wanted} at {place()}")
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self.move(func, *args, **kwargs)
        if name in WHOLE and isinstance(args[0], SimulatedTensor):
            return launch_whole(name, func, args, kwargs)
        if kwargs.pop("pin_memory", False) or name == "pin_memory":
            made = func(*args, **kwargs) if name != "pin_memory" else args[0].clone()
            pin(made)
            return made
        if is_cuda(kwargs.get("device")):
            return self.create(func, name, args, kwargs)
        self.note_use_of_the_host(name, args, kwargs)
        return func(*args, **kwargs)

    def move(self, func, tensor, *args, **kwargs):
        """Tensor.to, .cuda or .cpu."""
        if func is torch.Tensor.cpu:
            kwargs["device"] = "cpu"
        elif func is torch.Tensor.cuda:
            kwargs["device"] = "cuda"
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        non_blocking = kwargs.pop("non_blocking", False)
        for value in args:
            if isinstance(value, torch.Tensor):
                device, dtype = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, bool):
                non_blocking = value
            elif value is not None:
                device = value
        is_here = isinstance(tensor, SimulatedTensor)
        if is_cuda(device) and not is_here:
            return to_device(tensor, dtype, non_blocking)
        if is_here and device is not None and not is_cuda(device):
            return to_host(tensor, dtype, non_blocking)
        if not is_here:
            host_uses(tensor, writes=False)
        return torch.Tensor.to(tensor, dtype=dtype or tensor.dtype, **kwargs)

    def create(self, func, name: str, args: tuple, kwargs: dict):
        """A function with device="cuda"."""
        if blocks_of((args, kwargs)):
            return func(*args, **{**kwargs, "device": None})
        made = func(*args, **{**kwargs, "device": "cpu"})
        if name in ("tensor", "as_tensor", "asarray"):
            return to_device(made, None, False)
        if not name.startswith("empty"):
            active().launched(name)
        with torch._C.DisableTorchFunction():
            made = wrapped(made)
        access([], blocks_of(made))
        return made

    def note_use_of_the_host(self, name: str, args: tuple, kwargs: dict) -> None:
        """Tell of pinned buffers that a function of the host reads or writes. What numpy does with the memory of
        one is not seen, but that it is handed over is: as a read."""
        if name in METADATA or (name == "copy_" and blocks_of(args)):  # the latter is of the device
            return
        in_place = name in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        target = args[0] if args and in_place else kwargs.get("out")
        for tensor in leaves((args, kwargs)):
            if type(tensor) is torch.Tensor:
                host_uses(tensor, writes=tensor is target)


def launch_whole(name: str, func, args: tuple, kwargs: dict) -> SimulatedTensor:
    """A function of torch as one kernel. It has no gradient."""
    tensors = tensors_in((args, kwargs))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(f"the gradient of {name} is not simulated")
    refuse_mixed(name, args, kwargs, tensors)
    access(blocks_of(tensors), [])
    active().launched(name)
    with torch._C.DisableTorchFunction():
        result = SimulatedTensor(func(*mapped(unwrapped, args), **mapped(unwrapped, kwargs)))
    access_made(result)
    return result
