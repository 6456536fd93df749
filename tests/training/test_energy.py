"""The energy of a run: read from counters, over their wraps and over resumes, and absent where there is none."""

import ctypes
import json
from types import SimpleNamespace

import pytest
import torch
from training_helpers import run_in_process, tiny_run

from trainkit.training import energy
from trainkit.training.energy import Counter, EnergyMeter, find_counters

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def zone(folder, number, name, joules, readable=True):
    path = folder / f"intel-rapl:{number}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text("1000000000\n")
    if readable:
        (path / "energy_uj").write_text(f"{round(joules * 1e6)}\n")


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two packages with a part, and the sum of the machine, which would count them twice."""
    folder = tmp_path / "powercap"
    for number, name in (("0", "package-0"), ("0:0", "core"), ("1", "package-1"), ("2", "psys")):
        zone(folder, number, name, 100.0)
    monkeypatch.setattr(energy, "POWERCAP", folder)
    return folder


def test_packages_are_added_up_and_a_counter_that_begins_again(powercap):
    meter = EnergyMeter(CPU, 1, step=0)
    zone(powercap, "0", "package-0", 130.0)
    zone(powercap, "0:0", "core", 120.0)
    assert meter.record() == {
        "joules": 30.0, "covers": "the processors alone, other programs on them included", "since_step": 0,
    }  # fmt: skip
    zone(powercap, "1", "package-1", 40.0)  # over the range of 1,000 J
    assert meter.record()["joules"] == 30.0 + 940.0


def test_a_resume_adds_up_and_says_since_when(powercap):
    meter = EnergyMeter(CPU, 1, step=20, earlier={"joules": 7.5, "since_step": 3})
    zone(powercap, "0", "package-0", 101.0)
    assert meter.record()["joules"] == 8.5 and meter.record()["since_step"] == 3
    assert EnergyMeter(CPU, 1, step=20).record()["since_step"] == 20  # earlier starts did not measure


def test_what_cannot_be_read_is_not_told(powercap, tmp_path, monkeypatch):
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    assert EnergyMeter(CPU, 1, step=0).record() is None
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "none")
    assert EnergyMeter(CPU, 1, step=0).record() is None
    assert EnergyMeter(torch.device("mps"), 1, step=0).record() is None
    assert EnergyMeter(GPU, 1, step=0).record() is None  # no driver here

    def fails():
        raise OSError

    meter = EnergyMeter(CPU, 1, step=0)
    meter._counters = [Counter(fails)]
    assert meter.record() is None


def test_it_is_read_once_a_minute(powercap):
    meter = EnergyMeter(CPU, 1, step=0)
    zone(powercap, "0", "package-0", 150.0)
    meter.update(at_least_s=60)
    assert meter._joules == 0
    meter.update()
    assert meter._joules == 50


class Driver:
    """NVML of two GPUs, of which the second has used 2 J, then 3 J, ..."""

    def __init__(self):
        self.joules = 1

    def nvmlInit_v2(self):
        return 0

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        handle._obj.value = {b"GPU-a": 1, b"GPU-b": 2}.get(name.value, 0)
        return 0 if handle._obj.value else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, joules):
        self.joules += handle.value == 2
        joules._obj.value = 1000 * (self.joules if handle.value == 2 else 50)
        return 0


def test_gpus_are_found_by_their_uuid(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    uuids = ["b", "a", "unknown"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))
    meter = EnergyMeter(GPU, 2, step=0)
    found = meter.record()
    assert found == {"joules": 1.0, "covers": "the 2 GPUs of this machine alone", "since_step": 0}
    assert find_counters(GPU, 1)[1] == "the GPU alone"
    assert find_counters(GPU, 3) == ([], "")  # a part of the devices is no figure


@pytest.mark.slow
def test_it_is_in_the_record_the_card_and_the_report_and_adds_up(
    image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch
):
    used = iter(range(0, 10**6, 360))  # 0.1 Wh each time it is read
    monkeypatch.setattr(energy, "find_counters", lambda *_: ([Counter(lambda: next(used))], "the counter of a test"))
    flags = {"max_train_steps": 2, "checkpointing_steps": 2, "save_images_epochs": 100}
    found = []
    for more in ({}, {"max_train_steps": 3, "resume_from_checkpoint": "latest"}):
        arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", **(flags | more))
        run_in_process(monkeypatch, "train_unconditional", arguments)
        found.append(json.loads((tmp_path / "out" / "report.json").read_text())["energy"])
    assert found[0]["since_step"] == found[1]["since_step"] == 0 and found[1]["joules"] > found[0]["joules"] > 0
    for page in ("README.md", "report.html"):
        assert "Wh (the counter of a test)" in (tmp_path / "out" / page).read_text()
