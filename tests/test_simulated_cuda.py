"""tests/simulated_cuda.py: it finds what it is for, and nothing else. Oracle: what CUDA and torch document."""

import re
import threading
from collections import Counter

import made_up_merge
import numpy as np
import pytest
import short_training
import simulated_cuda
import torch
from conftest import paths_below
from simulated_cuda import MixedDevices

from common import devices

CUDA = torch.device("cuda")


# tensors


def test_numbers_go_there_and_back(cuda):
    x = torch.arange(6).reshape(2, 3)
    there = x.to("cuda")
    assert (there.device, there.is_cuda, there.device.type) == (torch.device("cuda:0"), True, "cuda")
    assert (there.T @ there).cpu().tolist() == (x.T @ x).tolist()
    assert x.cuda().tolist() == x.to(there.device).tolist() == x.to(there).tolist() == x.tolist()
    assert torch.tensor([1.5], device=CUDA).item() == 1.5
    assert type(there.cpu()) is type(there.to("cpu")) is torch.Tensor
    there[0] += 10  # the copy of the host does not change
    assert x[0].tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there.numpy()
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        np.asarray(there)


def test_everything_in_torch_is_put_back():
    def state():
        owners = torch, torch.cuda, torch.nn.Module, torch.inference_mode, threading.Thread
        owners += torch.utils._foreach_utils, torch.nn.utils.clip_grad
        attributes = {(owner.__name__, name): value for owner in owners for name, value in vars(owner).items()}
        return (
            attributes,
            list(torch.utils._foreach_utils._foreach_supported_types),
            torch.overrides._len_torch_function_stack(),
        )

    before = state()
    with simulated_cuda.installed():
        assert state() != before
        assert devices.pick("auto").type == "cuda"
        kept = torch.ones(2, device=CUDA)
    assert state() == before
    assert devices.pick("auto").type == "cpu"
    with pytest.raises(RuntimeError, match="none is installed"):
        kept + 1
    with simulated_cuda.installed() as device:  # what is left over from before is complete, and not counted
        assert (kept + 1).tolist() == [2, 2]
        del kept
        assert device.allocated == 0
        assert not device.races


@pytest.mark.parametrize(
    "mix",
    [
        lambda there, here: there + here,
        lambda there, here: here @ there.T,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.mm(there, there.T, out=torch.empty(3, 3)),
        lambda there, here: here[there[:, 0].long()],
        lambda there, here: there.index_select(0, torch.tensor([1])),
        lambda there, here: torch.searchsorted(there[0], torch.tensor(1.0)),
        lambda there, here: torch.nn.functional.linear(there, here),
        lambda there, here: torch.nn.functional.scaled_dot_product_attention(there, here, here),
    ],
)
def test_tensors_of_the_cpu_do_not_mix_with_those_of_the_device(cuda, mix):
    here = torch.ones(3, 3)
    with pytest.raises(MixedDevices):
        mix(here.to("cuda"), here)


def test_scalars_and_indices_of_the_cpu_are_taken_as_cuda_takes_them(cuda):
    there = torch.arange(4.0, device=CUDA)
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4, 6]
    cuda.reset()
    assert there[torch.tensor([3, 0])].tolist() == [3, 0]
    assert cuda.counts.waits == {"index on the host": 1, "copy to the host": 1}


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(3, generator=torch.Generator(), device=CUDA),
        lambda: torch.rand(3, generator=torch.Generator(CUDA)),
        lambda: torch.randperm(3, generator=torch.Generator("cpu"), device=CUDA),
        lambda: torch.empty(3, device=CUDA).normal_(generator=torch.Generator()),
    ],
)
def test_a_generator_of_the_other_device_is_refused(cuda, draw):
    with pytest.raises(MixedDevices, match="a generator of"):
        draw()
    assert len(torch.rand(3, generator=torch.Generator(CUDA).manual_seed(0), device=CUDA)) == 3


def test_a_module_moves_with_its_parameters_and_is_saved_as_one_of_the_cpu(cuda, tmp_path):
    model = torch.nn.Linear(3, 2).to(CUDA)
    weight = model.weight
    assert model.to(CUDA).weight is weight  # an optimiser would hold it
    model(torch.ones(4, 3, device=CUDA)).sum().backward()
    assert model.weight.grad.tolist() == [[4.0] * 3] * 2
    torch.save(model.state_dict(), tmp_path / "state")
    assert {type(value) for value in torch.load(tmp_path / "state", weights_only=True).values()} == {torch.Tensor}
    assert type(model.to("cpu").weight.data) is torch.Tensor


# memory


def test_out_of_memory_above_the_given_size():
    with simulated_cuda.installed(total_bytes=1000) as device:
        first = torch.zeros(600, dtype=torch.uint8, device=CUDA)
        view = first[100:]
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(401, dtype=torch.uint8, device=CUDA)
        assert torch.cuda.mem_get_info() == (400, 1000)
        del first
        assert torch.cuda.memory_allocated() == 600  # the view holds all of it
        del view
        assert (device.allocated, torch.cuda.max_memory_allocated()) == (0, 600)
        assert torch.cuda.mem_get_info() == (400, 1000)  # torch keeps what it has had
        torch.cuda.empty_cache()
        assert torch.cuda.mem_get_info() == (1000, 1000)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(1001, dtype=torch.uint8).to(CUDA)


# order


def on(stream, work):
    with torch.cuda.stream(stream):
        return work()


ORDERED = {
    "wait_stream": lambda side: torch.cuda.current_stream().wait_stream(side),
    "wait_event": lambda side: torch.cuda.current_stream().wait_event(side.record_event()),
    "Event.wait": lambda side: side.record_event().wait(),
    "Event.synchronize": lambda side: side.record_event().synchronize(),
    "Stream.synchronize": lambda side: side.synchronize(),
    "torch.cuda.synchronize": lambda side: torch.cuda.synchronize(),
}


@pytest.mark.parametrize("order", ORDERED.values(), ids=ORDERED)
def test_what_another_stream_wrote_is_read_after_it(racing_cuda, order):
    side = torch.cuda.Stream()
    made = on(side, lambda: torch.ones(3, device=CUDA))
    order(side)
    assert (made + 1).tolist() == [2, 2, 2]
    assert not racing_cuda.take_races()
    on(side, made.zero_)
    made + 1
    on(side, made.zero_)
    assert racing_cuda.take_races() == [
        f"stream 0 reads what stream {side.number} may still be writing",
        f"stream {side.number} writes what stream 0 may still be reading",
    ]


def test_an_event_orders_only_what_was_queued_before_it(racing_cuda):
    side = torch.cuda.Stream()
    made = on(side, lambda: torch.ones(3, device=CUDA))
    event = side.record_event()
    on(side, made.zero_)
    torch.cuda.current_stream().wait_event(event)
    made[1:] * 2
    assert racing_cuda.take_races() == [f"stream 0 reads what stream {side.number} may still be writing"]


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_is_not_freed_under_another_stream(racing_cuda, recorded):
    side = torch.cuda.Stream()
    made = torch.ones(3, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    on(side, made.sum)
    if recorded:
        made.record_stream(side)
    del made
    race = f"memory of stream 0 is freed while stream {side.number} may be using it"
    assert racing_cuda.take_races() == ([] if recorded else [race])


def test_a_pinned_buffer_is_left_alone_until_it_is_copied(racing_cuda):
    buffer = torch.zeros(3, pin_memory=True)
    there = buffer.to(CUDA, non_blocking=True)
    assert not racing_cuda.counts.waits
    buffer.fill_(1)
    assert racing_cuda.take_races() == ["the host writes a pinned buffer while a copy may be under way"]
    there.copy_(buffer, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    torch.add(buffer, 1, out=buffer)
    back = there.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream().record_event()
    assert not racing_cuda.take_races()
    back.numpy()
    assert racing_cuda.take_races() == ["the host reads a pinned buffer while a copy may be under way"]
    arrived.synchronize()
    assert back.numpy().tolist() == [1, 1, 1]
    assert not racing_cuda.take_races()


def test_a_pinned_buffer_is_used_again_in_the_order_of_streams(racing_cuda):
    buffer, there = torch.zeros(3, pin_memory=True), torch.ones(3, device=CUDA)
    for _ in range(2):  # out and in, on one stream, without a wait of the host
        buffer.copy_(there, non_blocking=True)
        there.copy_(buffer, non_blocking=True)
    assert not racing_cuda.take_races()
    side = torch.cuda.Stream()
    on(side, lambda: buffer.to(CUDA, non_blocking=True))
    assert racing_cuda.take_races() == [
        f"stream {side.number} reads a pinned buffer while a copy may be under way"
    ]
    side.wait_stream(torch.cuda.current_stream())
    on(side, lambda: buffer.to(CUDA, non_blocking=True))
    assert not racing_cuda.take_races()
    assert not racing_cuda.counts.waits


def test_a_thread_sees_the_device_and_what_was_waited_for_before_it_began(racing_cuda):
    side, found = torch.cuda.Stream(), []
    made = on(side, lambda: torch.ones(3, device=CUDA))
    for order in (lambda: None, side.synchronize):
        order()
        thread = threading.Thread(target=lambda: found.append((made + 1).tolist()))
        thread.start()
        thread.join()
        found.append(racing_cuda.take_races())
    assert found == [[2, 2, 2], [f"stream 0 reads what stream {side.number} may still be writing"], [2, 2, 2], []]


# counts


def test_kernels_copies_and_waits_are_counted_by_place(cuda):
    x = torch.ones(4, 4).to(CUDA)
    y = x.T[1:].relu() @ x  # two kernels: views have none
    if y.sum() > 0:
        y[y > 4] = 0  # no wait: CUDA fills under a mask
    y[x[:3] > 0]
    y.nonzero()
    assert cuda.counts.kernels == Counter("relu mm sum gt gt index_put_ gt index nonzero".split())
    assert cuda.counts.waits == {"copy from pageable memory": 1, "item": 1, "boolean index": 1, "nonzero": 1}
    assert cuda.counts.copies == {"to the device": 1, "to the host": 1}
    assert cuda.counts.to_device_bytes == 64
    places = {place.split()[0].partition(":")[0] for place, _ in cuda.counts.waits_at}
    assert places == {"tests/test_simulated_cuda.py"}
    assert cuda.reset().launches == 9
    assert cuda.counts.launches == 0


def test_a_wait_for_what_is_done_is_none(cuda):
    torch.ones(2, device=CUDA)
    event = torch.cuda.current_stream().record_event()
    event.synchronize()
    event.synchronize()
    torch.cuda.synchronize()
    assert cuda.counts.waits == {"event.synchronize": 1}


def test_the_command_tells_what_a_stage_costs(run_script, tmp_path):
    made_up_merge.write_merge(paths_below(tmp_path).merged_dir)
    stage = "difficulty.compute_visual_neighbors"
    done = run_script("tests/simulated_cuda.py", stage, *short_training.flags(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ kernels, \d+\.\d MB to the device", done.stdout)
    assert re.search(r"^ +\d+  copy to the host +difficulty/search/\S+:\d+ ", done.stdout, re.MULTILINE)
    assert done.stdout.rstrip().endswith("0 races")


def test_the_command_fails_as_the_stage_does(tmp_path, capsys):
    command = ["difficulty.compute_visual_neighbors", "--memory-gb", "1", *short_training.flags(tmp_path)]
    assert simulated_cuda.main(command) == 1
    assert "train.parquet does not exist" in capsys.readouterr().err
