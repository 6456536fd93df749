"""FSDP2 on two CPU processes against one process without it, and averages against diffusers' EMAModel."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from process_helpers import ROOT, run_forked
from sharding_worker import BATCHES, CONFIG, Training

from trainkit.errors import UserError
from trainkit.training import sharding
from trainkit.training.averages.ema import ShardedEMA

HALF = BATCHES // 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the worker's: threads that wait for each other on busy cores cost a hundred times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Whole states of one unsharded process at half of the steps and at the end, and what two sharded ones made."""
    folder = tmp_path_factory.mktemp("states")
    training = Training(seed=0, sharded=False)
    training.train(0, HALF)
    found = {"unsharded_half": training.state()}
    torch.save(found["unsharded_half"] | {"norms": []}, folder / "unsharded_half.pt")
    training.train(HALF, BATCHES)
    found["unsharded_all"] = training.state()
    run_forked("tests/sharding_worker.py", folder, processes=2, environment={"PYTHONPATH": str(ROOT)})
    for name in ("sharded_half", "resumed_all"):
        found[name] = torch.load(folder / f"{name}.pt", weights_only=True)
    return found | {"copy": folder / "copy"}


def same_state(one, other):
    for part in ("weights", "averages"):
        torch.testing.assert_close(one[part], other[part], atol=1e-5, rtol=0)
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()
    torch.testing.assert_close(one["optimizer"]["state"], other["optimizer"]["state"], atol=1e-5, rtol=1e-3)
    groups = [state["optimizer"]["param_groups"][0] for state in (one, other)]
    assert groups[0]["params"] == groups[1]["params"] and "conv_in.weight" in groups[0]["params"]
    assert groups[0]["lr"] == pytest.approx(groups[1]["lr"]) and one["schedule"] == other["schedule"]
    assert one["average_settings"] == other["average_settings"]


@pytest.mark.slow(15)
def test_two_sharded_processes_train_as_one_does(states):
    same_state(states["sharded_half"], states["unsharded_half"])
    assert states["sharded_half"]["norms"] == pytest.approx(states["unsharded_half"]["norms"][:HALF], rel=1e-4)
    start = UNet2DModel(**CONFIG).state_dict()
    moved = (states["sharded_half"]["weights"]["conv_in.weight"] - start["conv_in.weight"]).abs().max()
    assert moved > 1e-3, "the training moves weights by far more than the tolerance"


@pytest.mark.slow
def test_a_state_of_one_process_is_resumed_on_two(states):
    same_state(states["resumed_all"], states["unsharded_all"])


@pytest.mark.slow
def test_a_state_of_two_processes_is_resumed_on_one(states):
    training = Training(seed=5, sharded=False)
    training.load(states["sharded_half"])
    training.train(HALF, BATCHES)
    same_state(training.state(), states["unsharded_all"])


@pytest.mark.slow
def test_an_exported_unet_loads_with_stock_diffusers(states):
    unet = UNet2DModel.from_pretrained(states["copy"])
    assert unet.config["_class_name"] == "UNet2DModel"
    torch.testing.assert_close(dict(unet.state_dict()), states["sharded_half"]["weights"], atol=0, rtol=0)
    assert DDPMPipeline(unet, DDPMScheduler())(num_inference_steps=1).images[0].size == (8, 8)


def test_whole_states_are_copies_and_misfits_are_told():
    training = Training(seed=0, sharded=False)
    training.train(0, 1)
    state = training.state()
    before = {name: value.clone() for name, value in state["weights"].items()}
    moments = state["optimizer"]["state"]["conv_in.weight"]["exp_avg"].clone()
    training.train(1, 2)
    torch.testing.assert_close(state["weights"], before, atol=0, rtol=0)
    assert torch.equal(state["optimizer"]["state"]["conv_in.weight"]["exp_avg"], moments)
    with pytest.raises(ValueError, match="conv_in.bias: expected"):
        sharding.load_full_weights(training.unet, {n: v for n, v in before.items() if n != "conv_in.bias"})
    state["optimizer"]["param_groups"][0]["params"].remove("conv_in.bias")
    with pytest.raises(ValueError, match="does not fit the model"):
        sharding.load_full_optimizer_state(training.unet, training.optimizer, state["optimizer"])
    with pytest.raises(UserError, match="--mixed_precision fp16 does not work with sharded weights: use bf16"):
        sharding.shard(training.unet, "fp16", "cpu")


def test_averages_are_those_of_diffusers_bit_for_bit(tmp_path):
    settings = {"decay": 0.9, "use_ema_warmup": True, "inv_gamma": 1.5, "power": 0.75, "min_decay": 0.1}
    unet = UNet2DModel(**CONFIG)
    unet.conv_in.bias.requires_grad_(False)
    theirs = EMAModel(unet.parameters(), foreach=True, model_cls=UNet2DModel, model_config=unet.config, **settings)
    ours = ShardedEMA(unet, **settings)
    for step in range(6):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.add_(torch.randn_like(parameter))
        theirs.step(unet.parameters())
        ours.step()
        assert ours.decay_at(step + 1) == theirs.cur_decay_value
    trained = {name: value.clone() for name, value in unet.state_dict().items()}
    with ours.swapped_in():
        assert all(torch.equal(*pair) for pair in zip(unet.parameters(), theirs.shadow_params, strict=True))
    assert all(torch.equal(value, trained[name]) for name, value in unet.state_dict().items())

    theirs.save_pretrained(tmp_path)  # and a folder that EMAModel wrote can be loaded
    saved, config = UNet2DModel.from_pretrained(tmp_path), UNet2DModel.load_config(tmp_path)
    other = ShardedEMA(UNet2DModel(**CONFIG), **settings)
    other.load_full_weights(saved.state_dict())
    other.load_state_dict(config)
    assert other.state_dict() == ours.state_dict() and other.optimization_step == 6
    torch.testing.assert_close(other.full_weights(), ours.full_weights(), atol=0, rtol=0)
