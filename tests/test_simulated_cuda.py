"""The simulated CUDA device finds what it is for, and nothing else. Oracle: what CUDA and torch document, and the
real Feed and loop of the pipeline, as they are and with a line of theirs taken out.
"""

import re
import threading
from collections import Counter

import made_up_merge
import numpy as np
import pytest
import short_training
import simulated_cuda
import torch
from embedding_setup import photographs
from mutations import mutated
from simulated_cuda import MixedDevices

from common import config, devices
from generate import loop, pixels
from train import datasets
from train.sampling import feed

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def device():
    """The device, for tests that provoke races."""
    with simulated_cuda.installed() as simulation:
        yield simulation


def races_of(device) -> list[str]:
    """The kinds of the races found, without the places; none are left."""
    kinds = sorted({race.partition(":")[0] for race in device.races})
    device.races.clear()
    return kinds


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
def test_what_another_stream_wrote_is_read_after_it(device, order):
    side = torch.cuda.Stream()
    made = on(side, lambda: torch.ones(3, device=CUDA))
    order(side)
    assert (made + 1).tolist() == [2, 2, 2]
    assert not races_of(device)
    on(side, made.zero_)
    made + 1
    on(side, made.zero_)
    assert races_of(device) == [
        f"stream 0 reads what stream {side.number} may still be writing",
        f"stream {side.number} writes what stream 0 may still be reading",
    ]


def test_an_event_orders_only_what_was_queued_before_it(device):
    side = torch.cuda.Stream()
    made = on(side, lambda: torch.ones(3, device=CUDA))
    event = side.record_event()
    on(side, made.zero_)
    torch.cuda.current_stream().wait_event(event)
    made[1:] * 2
    assert races_of(device) == [f"stream 0 reads what stream {side.number} may still be writing"]


@pytest.mark.parametrize("recorded", [True, False])
def test_memory_is_not_freed_under_another_stream(device, recorded):
    side = torch.cuda.Stream()
    made = torch.ones(3, device=CUDA)
    side.wait_stream(torch.cuda.current_stream())
    on(side, made.sum)
    if recorded:
        made.record_stream(side)
    del made
    race = f"memory of stream 0 is freed while stream {side.number} may be using it"
    assert races_of(device) == ([] if recorded else [race])


def test_a_pinned_buffer_is_left_alone_until_it_is_copied(device):
    buffer = torch.zeros(3, pin_memory=True)
    there = buffer.to(CUDA, non_blocking=True)
    assert not device.counts.waits
    buffer.fill_(1)
    assert races_of(device) == ["the host writes a pinned buffer while a copy may be under way"]
    there.copy_(buffer, non_blocking=True)
    torch.cuda.current_stream().synchronize()
    torch.add(buffer, 1, out=buffer)
    back = there.to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream().record_event()
    assert not races_of(device)
    back.numpy()
    assert races_of(device) == ["the host reads a pinned buffer while a copy may be under way"]
    arrived.synchronize()
    assert back.numpy().tolist() == [1, 1, 1]
    assert not races_of(device)


def test_a_thread_sees_the_device_and_what_was_waited_for_before_it_began(device):
    side, found = torch.cuda.Stream(), []
    made = on(side, lambda: torch.ones(3, device=CUDA))
    for order in (lambda: None, side.synchronize):
        order()
        thread = threading.Thread(target=lambda: found.append((made + 1).tolist()))
        thread.start()
        thread.join()
        found.append(races_of(device))
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


# mutations of the pipeline


def make_rows() -> datasets.TrainRows:
    """100 buildings of 4 images each, with 20 neighbours."""
    rng = np.random.default_rng(0)
    building = np.repeat(np.arange(100), 4)
    columns = {"target_lat": building * 0.01, "target_lon": np.zeros(400), "street_view_id": np.arange(400)}
    neighbors = rng.integers(0, 400, (400, 20)).astype(np.int32)
    offsets = np.tile(np.array([0, 5, 10, 20], np.uint8), (400, 1))
    embeddings = rng.normal(size=(400, 16)).astype(np.float16)
    return datasets.make_rows(embeddings, neighbors, offsets, building, columns, 25.0, CUDA)


def take_steps(module, reads_reward: bool = True) -> None:
    """Five steps of a Feed as training takes them: something is computed of a batch, its reward is read, and the
    next batch is drawn while the device still computes."""
    ahead, arms = module.Feed(make_rows(), 32, 4, 0), np.zeros(4, np.int64)
    weights = torch.randn(16, 8, device=CUDA)
    ahead.draw(0, arms)
    for step in range(5):
        batch, embeddings = ahead.take()
        vectors = embeddings.float() @ weights
        read = module.reading((vectors @ vectors.T).sum())
        later = embeddings * 2
        if reads_reward:
            assert np.isfinite(read())
        if step < 4:
            ahead.draw(step + 1, arms)
        del batch, embeddings, vectors, later


@pytest.fixture(params=["on the device", "on the host"])
def place(request, monkeypatch):
    """Where the embeddings are."""
    monkeypatch.setattr(devices, "fits", lambda size, device: request.param == "on the device")
    return request.param


OF_FEED = {
    "current.wait_stream(self._stream)": "reads what",
    "tensor.record_stream(current)": "is freed while",
    "torch.cuda.synchronize(rows.device)": "reads what",
    "copied.synchronize()": "the host reads a pinned buffer",
}


def test_the_feed_as_it_is_has_no_race(cuda, place):
    take_steps(feed)


@pytest.mark.parametrize(("line", "found"), OF_FEED.items(), ids=OF_FEED)
def test_a_feed_without_one_of_its_lines_has_one(device, place, line, found):
    take_steps(mutated(feed, line, "pass"))
    assert any(found in race for race in races_of(device))


@pytest.mark.parametrize("reads_reward", [True, False])
def test_a_pinned_buffer_used_again_before_it_was_copied_is_found(device, monkeypatch, reads_reward):
    monkeypatch.setattr(devices, "fits", lambda size, device: False)
    line = "batch = self.sampler.draw(step, arms)"  # which waits for the stream that copies
    take_steps(mutated(feed, line, f"self._pinned.zero_(); {line}"), reads_reward)
    expected = [] if reads_reward else ["the host writes a pinned buffer while a copy may be under way"]
    assert races_of(device) == expected  # the reward comes after the copy


def test_a_sampler_with_a_generator_of_the_cpu_is_refused(cuda, monkeypatch):
    module = mutated(datasets, "torch.Generator(rows.device)", "torch.Generator()")
    monkeypatch.setattr(feed, "Sampler", module.Sampler)
    with pytest.raises(MixedDevices, match="rand: a generator of cpu for a tensor on cuda"):
        take_steps(feed)


def embed(module, jpegs: list[bytes]) -> np.ndarray:
    """Images in batches of two chunks through the loop, with a "model" that gives their mean colour."""
    preprocessing = pixels.Preprocessing(None, (16, 16), None, "bilinear", False, 1.0, (0.0,) * 3, (1.0,) * 3)
    overrides = ["infrastructure.embedding_batch_size=16", "infrastructure.workers=2"]
    settings = config.load(None, overrides).infrastructure
    job = module.Job("a", len(jpegs), lambda start, stop: jpegs[start:stop])
    progress = module.GenerationProgress("test", "image")
    device = devices.pick("auto")
    (result,) = module.embed([job], lambda x: x.mean(dim=(2, 3)), preprocessing, device, settings, progress)
    return result.vectors


JPEGS = photographs(48)
OF_LOOP = {
    "current.wait_event(chunk.ready)": ("pass", "reads what"),
    "chunk.pixels.record_stream(current)": ("pass", "is freed while"),
    "arrived.synchronize() or host": ("host", "the host reads a pinned buffer"),
}


def test_the_generation_as_it_is_has_no_race(cuda):
    assert len(embed(loop, JPEGS)) == 48


@pytest.mark.parametrize(("line", "by", "found"), [(line, *rest) for line, rest in OF_LOOP.items()], ids=OF_LOOP)
def test_a_generation_without_one_of_its_lines_has_a_race(device, line, by, found):
    embed(mutated(loop, line, by), JPEGS)
    assert any(found in race for race in races_of(device))


def test_the_command_tells_what_a_stage_costs(run_script, tmp_path):
    made_up_merge.write_merge(tmp_path / "data" / "merged")
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
