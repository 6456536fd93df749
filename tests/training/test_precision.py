"""`--mixed_precision auto`, and bfloat16 on a CPU that has no instructions for it."""

import pytest
import torch

from trainkit.training import precision


@pytest.fixture
def machine(monkeypatch):
    """Pretend a device and its instructions."""

    def pretend(device_type: str, *capabilities: str, cuda_bf16: bool = False) -> None:
        def is_bf16_supported(including_emulation: bool = True) -> bool:
            return cuda_bf16 or including_emulation

        for name in ("avx512_bf16", "amx_tile"):
            monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in capabilities)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
        device = None if device_type == "cpu" else torch.device(device_type)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)

    return pretend


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_tile"])
def test_auto_is_bf16_on_a_cpu_that_has_it(machine, instructions):
    machine("cpu", instructions)
    assert precision.resolve_precision("auto") == "bf16"


def test_auto_is_float32_on_other_cpus(machine):
    machine("cpu")
    assert precision.resolve_precision("auto") == "no"


def test_auto_is_bf16_on_gpus_that_do_not_emulate_it(machine):
    machine("cuda", cuda_bf16=True)
    assert precision.resolve_precision("auto") == "bf16"
    machine("cuda", cuda_bf16=False)
    assert precision.resolve_precision("auto") == "no"
    machine("mps")
    assert precision.resolve_precision("auto") == "no"


def test_auto_looks_at_the_cpu_where_accelerate_is_told_to_use_it(machine, monkeypatch):
    machine("cuda", cuda_bf16=True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert precision.resolve_precision("auto") == "no"


@pytest.mark.parametrize("asked", [None, "no", "fp16", "bf16"])
def test_what_is_asked_for_stays(asked):
    assert precision.resolve_precision(asked) == asked


def test_bf16_on_a_cpu_without_it_is_warned_about(machine, capsys):
    machine("cpu")
    precision.warn_of_slow_bfloat16("bf16", "cpu")
    assert "WARNING: --mixed_precision bf16: this CPU has no instructions" in capsys.readouterr().out
    precision.warn_of_slow_bfloat16("no", "cpu")
    machine("cpu", "avx512_bf16")
    precision.warn_of_slow_bfloat16("bf16", "cpu")
    assert not capsys.readouterr().out
