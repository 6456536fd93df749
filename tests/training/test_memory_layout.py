"""Weights in channels_last memory: a resumed optimizer pairs each weight with its own state."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel

from trainkit.options.script import TrainingOptions
from trainkit.training.averages.ema import ShardedEMA
from trainkit.training.checkpoints.state import restore, take_snapshot, write_snapshot
from trainkit.training.device import memory_format, move_to_device
from trainkit.training.optimizers import build_optimizer
from trainkit.training.sharding import full_weights, load_full_weights


def model_and_optimizer(tiny_unet, name, seed):
    options = TrainingOptions(optimizer=name, channels_last="yes", learning_rate=1e-2)
    torch.manual_seed(seed)
    unet = UNet2DModel.from_config(UNet2DModel.load_config(tiny_unet))
    unet = move_to_device(unet, options, torch.device("cpu"))
    return unet, build_optimizer(options, unet)


def step(unet, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
def test_a_resume_is_bit_equal_in_channels_last(tiny_unet, tmp_path, name):
    unet, optimizer = model_and_optimizer(tiny_unet, name, 0)
    step(unet, optimizer, 1)
    write_snapshot(take_snapshot(unet, {}, optimizer, {}), tmp_path)
    step(unet, optimizer, 2)

    resumed, resumed_optimizer = model_and_optimizer(tiny_unet, name, 5)
    restore(tmp_path, resumed, {}, resumed_optimizer)
    for parameter in resumed.parameters():
        for value in resumed_optimizer.state[parameter].values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()
    step(resumed, resumed_optimizer, 2)
    for ours, theirs in zip(resumed.parameters(), unet.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_are_sharded_stay_contiguous(tiny_unet):
    options = TrainingOptions(channels_last="yes", shard_weights=True)
    unet = UNet2DModel.from_config(UNet2DModel.load_config(tiny_unet))
    assert all(p.is_contiguous() for p in move_to_device(unet, options, torch.device("cpu")).parameters())
    assert memory_format(options, torch.device("cpu")) is torch.channels_last  # of the images


def test_channels_last_lasts(tiny_unet):
    """The input of each convolution, the gradients and the averages, before and after a load of contiguous weights."""
    options = SimpleNamespace(gradient_checkpointing=False, channels_last="yes", shard_weights=False)
    unet = move_to_device(UNet2DModel.from_config(UNet2DModel.load_config(tiny_unet)), options, torch.device("cpu"))
    average, seen = ShardedEMA(unet), []

    def note(convolution, inputs):
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(note)
    dropouts = [module for module in unet.modules() if isinstance(module, torch.nn.Dropout)]
    for mode in (False, True):
        unet.train(mode)
        assert dropouts and all(dropout.training is mode for dropout in dropouts)
        unet(torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last), 5).sample.sum().backward()
        average.step()
        weights = [*unet.parameters(), *average._averages, *(p.grad for p in unet.parameters())]
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights if w.ndim == 4)
        load_full_weights(unet, {name: value.contiguous() for name, value in full_weights(unet).items()})
        average.load_full_weights(average.full_weights())
    assert seen and all(seen)
