"""Streams, events and memory of the simulated CUDA device: what is ordered, what is in use, what was counted.

Order is kept by vector clocks. Each stream numbers the operations that are queued on it. Its clock says, for every
stream, up to which operation all is done before the next one of its own begins; an event is a copy of that clock.
Each thread of the host has a clock too, of what it has waited for: what it queues next comes after all of that.
"""

import contextlib
import itertools
import sys
import threading
import time
import weakref
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.device("cuda", 0)
_lock = threading.RLock()
_thread = threading.local()
Clock = Counter  # stream number -> number of its operation


@dataclass
class Counts:
    """What has been done since the last `Simulation.reset`."""

    kernels: Counter = field(default_factory=Counter)  # by operator: each launches a kernel, or more
    kernels_at: Counter = field(default_factory=Counter)  # by (place, operator)
    waits: Counter = field(default_factory=Counter)  # of the host for the device, by kind
    waits_at: Counter = field(default_factory=Counter)  # by (place, kind)
    copies: Counter = field(default_factory=Counter)  # "to the device", "to the host", "converted on the host"
    to_device_bytes: int = 0
    to_host_bytes: int = 0

    @property
    def launches(self) -> int:
        return self.kernels.total()


class Simulation:
    """An installed device: its size, the memory in use, counts, and the races found so far."""

    def __init__(self, total_bytes: int, bf16: bool):
        self.total, self.bf16 = total_bytes, bf16
        self.allocated = self.peak = self.reserved = 0  # reserved: with the free blocks that torch would keep
        self.counts = Counts()
        self.races: Counter = Counter()  # by description

    def reset(self) -> Counts:
        """Count from 0 again; returns the counts so far. Races and memory remain."""
        counts, self.counts = self.counts, Counts()
        return counts

    def take_races(self) -> list[str]:
        """The kinds of the races found, without their places; none are left."""
        kinds = sorted({race.partition(":")[0] for race in self.races})
        self.races.clear()
        return kinds

    def launched(self, operator: str) -> None:
        with _lock:
            self.counts.kernels[operator] += 1
            self.counts.kernels_at[place(), operator] += 1

    def waited(self, kind: str, clock: Clock | None = None) -> None:
        """The host waits for all of the current stream, or for what `clock` covers: no wait if that is done."""
        with _lock:
            known = host_clock()
            if clock is None or any(operation > known[stream] for stream, operation in clock.items()):
                self.counts.waits[kind] += 1
                self.counts.waits_at[place(), kind] += 1
                merge(known, current_stream().clock if clock is None else clock)

    def copied(self, direction: str, size: int) -> None:
        with _lock:
            self.counts.copies[direction] += 1
            if direction == "to the device":
                self.counts.to_device_bytes += size
            else:
                self.counts.to_host_bytes += size

    def allocate(self, size: int) -> None:
        """Raises OutOfMemoryError as CUDA's allocator does."""
        if self.allocated + size > self.total:
            used, total = self.allocated / 2**20, self.total / 2**20
            raise torch.OutOfMemoryError(
                f"CUDA out of memory (simulated). Tried to allocate {size / 2**20:.2f} MiB: "
                f"{used:.2f} of {total:.2f} MiB are in use."
            )
        self.allocated += size
        self.peak, self.reserved = max(self.peak, self.allocated), max(self.reserved, self.allocated)


_active: Simulation | None = None


def active() -> Simulation:
    """The installed simulation."""
    if _active is None:
        raise RuntimeError("a tensor of the simulated CUDA device is used, but none is installed")
    return _active


def is_active() -> bool:
    return _active is not None


def activate(simulation: Simulation | None) -> None:
    """Begin or (None) end a simulation. What is left over from another one is done."""
    global _active
    for stream in Stream.all:
        merge(host_clock(), stream.clock)
    Stream.all[:] = [DEFAULT_STREAM]
    _active = simulation


def merge(clock: Clock, other: Clock) -> None:
    for stream, operation in other.items():
        clock[stream] = max(clock[stream], operation)


def host_clock() -> Clock:
    """What the current thread has waited for."""
    if not hasattr(_thread, "clock"):
        _thread.clock = Counter()
    return _thread.clock


class Stream:
    """torch.cuda.Stream."""

    all: ClassVar[list["Stream"]] = []  # of the simulation
    numbers = itertools.count()
    device = CUDA

    def __init__(self, device=None, priority: int = 0):
        self.number, self.clock = next(Stream.numbers), Counter()
        Stream.all.append(self)

    def queue(self) -> int:
        """The number of the operation that is queued now."""
        merge(self.clock, host_clock())
        self.clock[self.number] += 1
        return self.clock[self.number]

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        merge(self.clock, event.clock)

    def wait_stream(self, stream: "Stream") -> None:
        merge(self.clock, stream.clock)

    def synchronize(self) -> None:
        active().waited("stream.synchronize", self.clock)

    def query(self) -> bool:
        return True


class Event:
    """torch.cuda.Event. The time between two is that of the host."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self.clock: Clock = Counter()
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.clock, self.seconds = Counter((stream or current_stream()).clock), time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        active().waited("event.synchronize", self.clock)

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.seconds - self.seconds)


DEFAULT_STREAM = Stream()


def current_stream(device=None) -> Stream:
    return getattr(_thread, "stream", None) or DEFAULT_STREAM


@contextlib.contextmanager
def use_stream(stream: Stream | None):
    """torch.cuda.stream. Of None: no change."""
    before = current_stream()
    _thread.stream = stream or before
    try:
        yield
    finally:
        _thread.stream = before


def synchronize(device=None) -> None:
    """torch.cuda.synchronize: the host waits for all streams."""
    together: Clock = Counter()
    for stream in Stream.all:
        merge(together, stream.clock)
    active().waited("synchronize", together)


def place() -> str:
    """The innermost line of the repository that is being run, outside the simulation: file:line function."""
    frame = sys._getframe(1)
    while frame is not None:
        if (path := _path_in_repository(frame.f_code.co_filename)) is not None:
            return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


_paths: dict[str, str | None] = {}


def _path_in_repository(filename: str) -> str | None:
    if filename not in _paths:
        path = Path(filename)
        inside = path.is_relative_to(ROOT) and not path.relative_to(ROOT).parts[0].startswith(".")
        is_ours = inside and not path.name.startswith("simulated_")
        _paths[filename] = str(path.relative_to(ROOT)) if is_ours else None
    return _paths[filename]


class Block:
    """The memory of one storage on the device, with its last write and the last read by each stream."""

    def __init__(self, size: int):
        self.owner, self.size, self.stream, self.made_at = active(), size, current_stream(), place()
        self.owner.allocate(size)
        self.tensors = 0  # that use it
        self.written: tuple[Stream, int] | None = None
        self.read: Clock = Counter()
        self.recorded: set[int] = set()  # streams named by record_stream

    def reads(self, stream: Stream, operation: int) -> None:
        if self._is_being_written_for(stream):
            self._race(f"stream {stream.number} reads what stream {self.written[0].number} may still be writing")
        self.read[stream.number] = operation

    def writes(self, stream: Stream, operation: int) -> None:
        if self._is_being_written_for(stream):
            self._race(f"stream {stream.number} writes what stream {self.written[0].number} may still be writing")
        for other, until in self.read.items():
            if other != stream.number and until > stream.clock[other]:
                self._race(f"stream {stream.number} writes what stream {other} may still be reading")
        self.written = stream, operation

    def freed(self) -> None:
        """The memory returns to the stream that allocated it, whose next operation may use it again."""
        self.owner.allocated -= self.size
        done = Counter(self.stream.clock)
        merge(done, host_clock())
        used = Counter(self.read)
        if self.written:
            merge(used, Counter({self.written[0].number: self.written[1]}))
        for stream, until in used.items():
            if stream != self.stream.number and stream not in self.recorded and until > done[stream]:
                self._race(f"memory of stream {self.stream.number} is freed while stream {stream} may be using it")

    def _is_being_written_for(self, stream: Stream) -> bool:
        if self.written is None or self.written[0] is stream:
            return False
        writer, operation = self.written
        return operation > stream.clock[writer.number]

    def _race(self, what: str) -> None:
        self.owner.races[f"{what}: made at {self.made_at}, found at {place()}"] += 1


_blocks: dict[int, Block] = {}  # by storage


def hold(tensor: torch.Tensor) -> Block:
    """The block of the storage of a tensor, allocated if it has none; `release` gives it back."""
    with _lock:
        storage = tensor.untyped_storage()
        block = _blocks.get(storage._cdata)
        if block is None:
            block = _blocks[storage._cdata] = Block(storage.nbytes())
        block.tensors += 1
        return block


def release(storage: int) -> None:
    with _lock:
        block = _blocks[storage]
        block.tensors -= 1
        if not block.tensors:
            del _blocks[storage]
            block.freed()


def access(reads: list[Block], writes: list[Block]) -> None:
    """Queue an operation on the current stream that reads and writes these blocks."""
    with _lock:
        stream = current_stream()
        operation = stream.queue()
        for block in reads:
            block.reads(stream, operation)
        for block in writes:
            block.writes(stream, operation)


class _Pinned:
    """A pinned buffer of the host, and the copies that may be under way: (stream, operation, place)."""

    def __init__(self) -> None:
        self.out_of: list[tuple[int, int, str]] = []  # to the device
        self.into: list[tuple[int, int, str]] = []


_pinned: dict[int, _Pinned] = {}  # by address


def pin(tensor: torch.Tensor) -> None:
    """Note that the memory of a tensor of the host is pinned."""
    storage = tensor.untyped_storage()
    _pinned[storage.data_ptr()] = _Pinned()
    weakref.finalize(storage, _pinned.pop, storage.data_ptr(), None).atexit = False


def _buffer_of(tensor: torch.Tensor) -> _Pinned | None:
    return _pinned.get(tensor.untyped_storage().data_ptr()) if _pinned else None


def is_pinned(tensor: torch.Tensor) -> bool:
    return _buffer_of(tensor) is not None


def copy_begins(tensor: torch.Tensor, into: bool) -> None:
    """A copy out of, or `into`, a pinned buffer has been queued on the current stream; a race if one of another
    stream may be under way."""
    stream, buffer, known = current_stream(), _buffer_of(tensor), host_clock()
    assert buffer is not None
    _tell_of_copies(buffer, into, stream.clock, f"stream {stream.number}", stream.number)
    for copies in (buffer.into, buffer.out_of):
        copies[:] = [copy for copy in copies if copy[1] > known[copy[0]]]
    (buffer.into if into else buffer.out_of).append((stream.number, stream.clock[stream.number], place()))


def host_uses(tensor: torch.Tensor, writes: bool) -> None:
    """The host reads or writes a tensor of its own; a race if it is pinned and a copy may be under way."""
    buffer = _buffer_of(tensor)
    if buffer is not None:
        _tell_of_copies(buffer, writes, host_clock(), "the host")


def _tell_of_copies(buffer: _Pinned, writes: bool, done: Clock, who: str, own_stream: int | None = None) -> None:
    """Note a race for each copy into the buffer, and if that is written also out of it, that may not be `done`."""
    for stream, operation, begun_at in [*buffer.into, *(buffer.out_of if writes else [])]:
        if stream != own_stream and operation > done[stream]:
            what = f"{who} {'writes' if writes else 'reads'} a pinned buffer while a copy may be under way"
            active().races[f"{what}: begun at {begun_at}, found at {place()}"] += 1


def start_of_thread(thread: threading.Thread) -> None:
    """Call it in the parent: a new thread begins with what its parent has waited for."""
    thread._simulated_clock = Counter(host_clock())


def in_thread(thread: threading.Thread) -> None:
    """Call it in the new thread."""
    _thread.clock = getattr(thread, "_simulated_clock", Counter())
