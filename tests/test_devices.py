"""common/devices.py: which device and which precision, with what torch says of the machine put in its mouth."""

import warnings

import pytest
import torch

from common import config, devices
from common.errors import ConfigError

OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver."


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that says what torch finds: numbers of devices; with `trouble`, CUDA cannot be initialised."""

    def set_up(cuda: int = 0, xpu: int = 0, mps: bool = False, trouble: str = "", file: bool = False) -> None:
        def is_available() -> bool:
            if trouble:
                warnings.warn(f"CUDA initialization: {trouble}", stacklevel=1)
            return bool(cuda and not trouble)

        def init() -> None:
            if trouble or not cuda:
                raise RuntimeError(
                    trouble or "Found no NVIDIA driver on your system. Please check that you have one"
                )

        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)  # counted by NVML, whatever the driver
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.xpu, "device_count", lambda: xpu)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        card = tmp_path / "nvidia0"
        if file:
            card.touch()
        monkeypatch.setattr(devices, "_FIRST_CARD", card)

    return set_up


@pytest.mark.parametrize(
    ("there", "backbone", "other"),
    [
        ({}, "cpu", "cpu"),
        ({"cuda": 2}, "cuda", "cuda"),
        ({"cuda": 1, "xpu": 1, "mps": True}, "cuda", "cuda"),
        ({"xpu": 1, "mps": True}, "xpu", "cpu"),
        ({"mps": True}, "mps", "cpu"),
    ],
)
def test_auto_takes_the_device_that_a_stage_can_use(machine, there, backbone, other, caplog):
    machine(**there)
    assert devices.pick("auto", for_backbone=True) == torch.device(backbone)
    assert devices.pick("auto") == torch.device(other)
    assert not caplog.records


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:1", "xpu", "xpu:1", "mps"])
def test_a_device_that_is_named_is_taken_if_it_is_there(machine, name):
    machine(cuda=2, xpu=2, mps=True)
    settings = config.load(None, [f"infrastructure.device={name}"]).infrastructure
    assert devices.pick(settings.device, for_backbone=True) == torch.device(name)
    assert devices.pick(name) == torch.device(name if "cuda" in name else "cpu")
    if name != "cpu":
        machine(**({"cuda": 1, "xpu": 1} if ":" in name else {}))  # one: the second is missing
        with pytest.raises(
            ConfigError, match=f'infrastructure.device = "{name}", but [01] .* available\nuse "auto"'
        ):
            devices.pick(name, for_backbone=True)


@pytest.mark.parametrize("name", ["gpu", "mps:0", "cuda:", "xpu:a", "meta"])
def test_no_other_device_can_be_named(name):
    with pytest.raises(ConfigError, match=r"\[infrastructure\] device"):
        config.load(None, [f"infrastructure.device={name}"])


def test_a_driver_that_is_too_old_is_told_and_not_passed_over(machine, caplog, recwarn):
    machine(cuda=1, trouble=OLD_DRIVER)
    assert devices.pick("auto") == torch.device("cpu")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(
        f"the GPU is not used: {OLD_DRIVER.partition(' Please')[0]}; update the dr"
    )
    with pytest.raises(
        ConfigError, match=r'"cuda", but The NVIDIA driver .* too old .*; update the driver, .*\nuse'
    ):
        devices.pick("cuda")
    assert not recwarn  # torch's own words, once more


def test_a_torch_without_cuda_is_told_where_there_is_a_card(machine, caplog):
    machine(trouble="Torch not compiled with CUDA enabled")
    assert devices.pick("auto") == torch.device("cpu")
    assert not caplog.records
    machine(trouble="Torch not compiled with CUDA enabled", file=True)
    assert devices.pick("auto") == torch.device("cpu")
    assert "is without CUDA; make install CONSTRAINTS=" in caplog.text


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "dtype"),
    [("cuda", True, "bfloat16"), ("cuda", False, "float32"), ("xpu", True, "float32"), ("mps", True, "float32")],
)
def test_auto_is_bfloat16_on_the_gpus_that_do_not_emulate_it(monkeypatch, device, has_bfloat16, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9) if has_bfloat16 else (7, 5))
    assert devices.resolve_dtype("auto", torch.device(device)) == dtype
    assert devices.resolve_dtype("auto", torch.device("cpu")) == "float32"
    assert devices.resolve_dtype("float16", torch.device(device)) == "float16"
