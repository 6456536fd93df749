"""Every optimizer and every schedule of the rate: what is decayed, resumed bit for bit, refused."""

import json
import math
import shutil
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY_UNET
from diffusers import UNet2DModel
from muon_worker import muon_steps
from process_helpers import run_forked
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from training_helpers import losses, run_in_process, same_weights, tiny_run

from trainkit.errors import UserError
from trainkit.options.training import HardwareOptions, OptimizationOptions
from trainkit.training import divided_muon
from trainkit.training.checkpoints.state import restore, take_snapshot, write_snapshot
from trainkit.training.divided_muon import _cost, owners_of
from trainkit.training.guards import step_if_finite
from trainkit.training.optimizers import (
    averaged_by_optimizer,
    build_lr_scheduler,
    build_optimizer,
    check_optimization,
    resume_lr_scheduler,
)

NAMES = ("adamw", "adam", "muon", "lion", "lamb", "adafactor", "prodigy", "schedule_free_adamw")
RATES = {"prodigy": 1.0, "lion": 3e-4, "adafactor": 1e-2}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def options_for(name, **settings):
    return OptimizationOptions(
        optimizer=name, learning_rate=RATES.get(name, 1e-3), adam_weight_decay=0.1, lr_warmup_steps=2,
        lr_scheduler="constant_with_warmup", **settings,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Training:
    """A tiny UNet that learns to give a fixed image, with the optimizer and its schedule."""

    def __init__(self, tiny_unet, name, seed=0):
        from diffusers import UNet2DModel

        torch.manual_seed(seed)
        self.unet = UNet2DModel.from_config(UNet2DModel.load_config(tiny_unet))
        self.optimizer = build_optimizer(options_for(name), self.unet)
        self.lr_scheduler = build_lr_scheduler(options_for(name), self.optimizer, 100)

    def loss(self, step):
        noisy = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        return (self.unet(noisy, torch.full((2,), 10 * step)).sample - noisy * 0.5).square().mean()

    def steps(self, first, end):
        values = []
        for step in range(first, end):
            loss = self.loss(step)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.lr_scheduler.step()
            values.append(loss.item())
        return values


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_learns_and_resumes_bit_for_bit(name, tiny_unet, tmp_path):
    whole = Training(tiny_unet, name)
    before = whole.steps(0, 5)
    facts = {"lr_scheduler": whole.lr_scheduler.state_dict()}
    write_snapshot(take_snapshot(whole.unet, {}, whole.optimizer, facts), tmp_path)
    after = whole.steps(5, 10)

    resumed = Training(tiny_unet, name, seed=1)
    facts = restore(tmp_path, resumed.unet, {}, resumed.optimizer)
    resume_lr_scheduler(resumed.lr_scheduler, facts["lr_scheduler"])
    assert resumed.steps(5, 10) == after
    assert all(torch.equal(*pair) for pair in zip(whole.unet.parameters(), resumed.unet.parameters(), strict=True))
    for one, other in zip(whole.optimizer.param_groups, resumed.optimizer.param_groups, strict=True):
        assert {key: value for key, value in one.items() if key != "params"} == {
            key: value for key, value in other.items() if key != "params"
        }
    assert name == "prodigy" or whole.loss(0).item() < before[0]  # Prodigy is still finding its rate


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_biases_are_not_decayed(name, tiny_unet):
    training = Training(tiny_unet, name)
    decayed = {
        id(parameter): group["weight_decay"]
        for group in training.optimizer.param_groups
        for parameter in group["params"]
    }
    for key, parameter in training.unet.named_parameters():
        assert decayed[id(parameter)] == (0.1 if parameter.ndim >= 2 else 0.0), key


def test_the_schedule_free_average_is_the_papers_and_leaves_the_weights_as_they_are():
    """x_t averages z_1 .. z_t, weighted by the square of the rate (Defazio et al. 2024); z takes plain steps."""
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    model = torch.nn.ParameterList([weight])
    optimizer = build_optimizer(options_for("schedule_free_adamw"), model)
    average, squares = weight.detach().clone(), 0.0
    for step, rate in enumerate([0.0, 0.01, 0.02, 0.02]):
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = torch.tensor([[1.0, 3.0]]) * (step + 1)
        optimizer.step()
        squares += rate**2
        part = rate**2 / squares if squares else 0.0
        average = (1 - part) * average + part * optimizer.state[weight]["z"]
        before = weight.detach().clone()
        with averaged_by_optimizer(optimizer):
            torch.testing.assert_close(weight.detach(), average)
        assert torch.equal(weight, before)
    assert not torch.allclose(weight, average)


@pytest.mark.slow
def test_a_schedule_free_run_saves_the_average_and_resumes(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch):

    def train(name, **flags):
        flags |= {"optimizer": "schedule_free_adamw", "no_use_ema": True, "lr_scheduler": "constant_with_warmup"}
        flags |= {"max_train_steps": 4, "checkpointing_steps": 2, "preview_steps": 2}
        arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / name, **flags)
        run_in_process(monkeypatch, "train_unconditional", arguments)
        return tmp_path / name

    whole, parts = train("whole"), train("parts")
    shutil.rmtree(parts / "checkpoint-4")
    train("parts", resume_from_checkpoint="latest")
    assert losses(parts) == losses(whole)
    for file in (f"checkpoint-4/unet/{WEIGHTS}", "checkpoint-4/optimizer.safetensors", f"unet/{WEIGHTS}"):
        same_weights(whole / file, parts / file)
    with pytest.raises(AssertionError):  # the saved pipeline is the average, the checkpoint what is trained
        same_weights(whole / f"checkpoint-4/unet/{WEIGHTS}", whole / f"unet/{WEIGHTS}")


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_sharded_weights_are_updated_by_the_fused_kernel(name, tmp_path):
    """It takes an eighth of the time, and skips a step whose gradients are not finite."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain, sharded = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
        sharded.load_state_dict(plain.state_dict())
        distribute_module(sharded, mesh, lambda _, module, mesh: shard_parameters(module, mesh))
        optimizers = [build_optimizer(options_for(name), model) for model in (plain, sharded)]
        assert all(group["fused"] for group in optimizers[1].param_groups)
        for norm in (1.0, math.nan, 1.0):
            for one, other in zip(plain.parameters(), sharded.parameters(), strict=True):
                one.grad = torch.randn_like(one)
                other.grad = distribute_tensor(one.grad, mesh, [Shard(0)])
            for optimizer in optimizers:
                step_if_finite(optimizer, torch.tensor(norm))
        for one, other in zip(plain.parameters(), sharded.parameters(), strict=True):
            assert torch.equal(one, other.full_tensor())
            assert optimizers[1].state[other]["step"] == 2
    finally:
        dist.destroy_process_group()


def shard_parameters(module, mesh):
    for key, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(key, torch.nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)])))


def rates(steps, **settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build_lr_scheduler(OptimizationOptions(**settings), optimizer, 100)
    found = []
    for step in range(100):
        if step in steps:
            found.append(scheduler.get_last_lr()[0])
        if step == 50:  # as a checkpoint does
            state = json.loads(json.dumps(scheduler.state_dict()))
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            scheduler = build_lr_scheduler(OptimizationOptions(**settings), optimizer, 100)
            scheduler.load_state_dict(state)
        optimizer.step()
        scheduler.step()
    return pytest.approx(found, abs=1e-6)


def test_schedules_have_their_shapes():
    flags = {"learning_rate": 1.0, "lr_warmup_steps": 20}
    assert rates((10, 20, 60, 79), lr_scheduler="cosine_with_restarts", lr_num_cycles=2, **flags) == [
        0.5, 1.0, 1.0, 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 0.475)).item()),
    ]  # fmt: skip
    polynomial = rates((10, 20, 60), lr_scheduler="polynomial", lr_power=2.0, **flags)
    assert polynomial == [0.5, 1.0, 0.25]
    stable = {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 40}
    assert rates((10, 20, 59, 60, 70, 90), **stable, **flags) == [0.5, 1, 1, 1, 0.5, 1 - 0.75**0.5]
    assert rates((79, 80, 85), lr_scheduler="warmup_stable_decay", **flags) == [1, 1, 0.5]  # a fifth


def test_a_decay_longer_than_the_run_is_refused():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    options = OptimizationOptions(lr_scheduler="warmup_stable_decay", lr_warmup_steps=500)
    with pytest.raises(UserError, match="--lr_warmup_steps 500 and --lr_decay_steps 20 are more than the 100 steps"):
        build_lr_scheduler(options, optimizer, 100)


class Options(OptimizationOptions, HardwareOptions):
    use_ema = True


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"optimizer": "schedule_free_adamw"}, "add --no_use_ema"),
        ({"optimizer": "prodigy", "learning_rate": 2e-3}, "use 1"),
        ({"lr_num_cycles": 0}, "--lr_num_cycles 0 must be at least 1"),
        ({"lr_power": 0.0}, "--lr_power 0.0 must be more than 0"),
        ({"lr_decay_steps": 0}, "--lr_decay_steps 0 must be at least 1"),
    ],
)
def test_what_cannot_be_kept_is_refused_in_one_line(flags, message):
    options = Options(**flags)
    options.shard_weights = False
    with pytest.raises(UserError, match="--") as refusal:
        check_optimization(options)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_needs_more_than_is_here_is_refused(monkeypatch):
    options = Options(optimizer="lion", learning_rate=1e-4)
    options.shard_weights = True
    with pytest.raises(UserError, match="--shard_weights supports adam, adamw, muon, not --optimizer"):
        check_optimization(options)
    options = Options(optimizer="schedule_free_adamw", lr_scheduler="cosine")
    options.use_ema = options.shard_weights = False
    with pytest.raises(UserError, match="takes the place of --lr_scheduler cosine"):
        check_optimization(options)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match="pip install pytorch-optimizer"):
        check_optimization(Options(optimizer="lamb"))
    for cuda, message in ((False, "needs a CUDA GPU"), (True, "pip install bitsandbytes")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(UserError, match=message):
            check_optimization(Options(optimizer="adamw_8bit"))


@pytest.mark.slow
def test_muon_divided_over_processes_is_muon_bit_for_bit(tmp_path, monkeypatch):
    from pytorch_optimizer import Muon
    from pytorch_optimizer.optimizer.utils import zero_power_via_newton_schulz_5

    odd = {"block_out_channels": (9, 15), "norm_num_groups": 3, "attention_head_dim": 3}  # rows, in unequal shards
    UNet2DModel.from_config(TINY_UNET | odd).save_config(tmp_path / "unet")
    run_forked(
        "tests/muon_worker.py", tmp_path / "unet", tmp_path / "two", processes=2, environment={"PYTHONPATH": str(ROOT)}
    )
    muon_steps(tmp_path / "unet", tmp_path / "one")
    for name in ("replicas0", "replicas1", "shards0", "shards1"):
        same_weights(tmp_path / f"two_{name}", tmp_path / "one")
    in_float32 = partial(zero_power_via_newton_schulz_5, dtype=torch.float32)
    monkeypatch.setattr("pytorch_optimizer.optimizer.muon.base.zero_power_via_newton_schulz_5", in_float32)
    monkeypatch.setattr(divided_muon, "DividedMuon", Muon)
    muon_steps(tmp_path / "unet", tmp_path / "library")
    same_weights(tmp_path / "one", tmp_path / "library", 1e-5)


def test_each_process_gets_its_share_of_the_work():
    shapes = [(256, 256, 3, 3)] * 9 + [(128, 128, 3, 3)] * 8 + [(512, 256)] * 3
    owners = owners_of(shapes, 4)
    work = [sum(_cost(s) for s, owner in zip(shapes, owners, strict=True) if owner == p) for p in range(4)]
    assert max(work) < 1.35 * sum(work) / 4
    assert owners == owners_of(shapes, 4) and set(owners_of(shapes, 1)) == {0}
    assert len(set(owners_of(shapes[:2], 8))) == 2


@pytest.mark.parametrize("num_processes", [1, 2, 5, 64])
def test_shards_are_exchanged_in_rounds_of_bounded_size(num_processes, monkeypatch):
    monkeypatch.setattr(divided_muon, "EXCHANGED_AT_ONCE", 1000)
    shapes = [torch.Size((16, 8, 3, 3)), torch.Size((8, 16))] * 7
    rounds = list(divided_muon.rounds_of(shapes, num_processes))
    assert sorted(sum(rounds, [])) == list(range(len(shapes)))
    sizes = [sum(shapes[index].numel() for index in indices) for indices in rounds]
    assert max(sizes) <= num_processes * 16 * 72  # the largest matrix on each process
    assert len(rounds) == {1: 8, 2: 4, 5: 2, 64: 1}[num_processes]
    for rows in (1, 3, 8, 65):
        chunks = [len(chunk) for chunk in torch.arange(rows).chunk(num_processes)]
        assert divided_muon.rows_of_shards(rows, num_processes) == chunks + [0] * (num_processes - len(chunks))
