"""Speed and memory options: the run stays the same run, weights keep their names, nothing waits for the device."""

import json
import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_UNET
from diffusers import ConfigMixin, DDPMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import AttnProcessor2_0
from host_reads import HostReads
from torch._inductor.utils import fresh_cache
from training_helpers import losses, run_in_process, same_weights, tiny_run

from trainkit.diffusion.timesteps import draw_timesteps
from trainkit.errors import UserError
from trainkit.options.training import HardwareOptions, OptimizationOptions
from trainkit.training import guards
from trainkit.training.device import (
    compile_unet,
    largest_micro_batch,
    memory_format,
    move_to_device,
    prepare_device,
    uncompiled,
    wants_compilation,
)
from trainkit.training.optimizers import build_optimizer
from trainkit.training.throughput import Throughput, flops_of_image, memory_peak_mib, peak_tflops

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def one_level_unet(tmp_path_factory):
    """Two levels would take torch.compile twice as long."""
    one_level = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    folder = tmp_path_factory.mktemp("one-level-unet")
    (folder / "config.json").write_text(json.dumps(TINY_UNET | one_level))
    return folder


@pytest.fixture(scope="module")
def train(image_folder, one_level_unet, cache_dir, tmp_path_factory):
    """Run the script's main in this process with flags over those of a run of two steps; returns a new folder."""

    def call(**flags):
        flags = {"max_train_steps": 2, "checkpointing_steps": 1, "lr_warmup_steps": 0} | flags
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            arguments = tiny_run(image_folder, one_level_unet, cache_dir, folder, **flags)
            run_in_process(patch, "train_unconditional", arguments)
        return folder

    return call


@pytest.fixture(scope="module")
def plain(train):
    return train()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [{"channels_last": "yes"}, {"gradient_checkpointing": True}, {"compile": True}],
    ids=["channels_last", "gradient_checkpointing", "compile"],
)
def test_what_is_learned_and_saved_stays_the_same(plain, train, monkeypatch, flags, capsys):
    """Inductor, which takes a minute for the smallest UNet, has the test below; here the captured graph is run."""
    graphs, compile_module, as_captured = [], UNet2DModel.compile, torch._dynamo.lookup_backend("aot_eager")

    def capture(graph, inputs):
        graphs.append(graph)
        return as_captured(graph, inputs)

    def compile_without_inductor(unet, mode, dynamic):
        compile_module(unet, backend=capture, dynamic=dynamic)

    monkeypatch.setattr(UNet2DModel, "compile", compile_without_inductor)
    other = train(**flags)
    assert len(graphs) == ("compile" in flags)  # one for all steps and none for sampling, with a checkpoint between
    assert capsys.readouterr().out.count("compiled the UNet in ") == ("compile" in flags)
    assert losses(other) == pytest.approx(losses(plain), rel=1e-4)
    same_weights(plain / WEIGHTS, other / WEIGHTS, tolerance=1e-4)
    same_weights(plain / "checkpoint-2" / WEIGHTS, other / "checkpoint-2" / WEIGHTS, tolerance=1e-4)


class OneProduct(ModelMixin, ConfigMixin):
    """What Inductor hands to a library, without a minute of a C++ compiler."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 8, bias=False)

    def forward(self, rows):
        return self.linear(rows)


@pytest.mark.slow
def test_inductor_compiles_in_place():
    torch.manual_seed(0)
    model, rows, counters = OneProduct(), torch.randn(5, 4), torch._dynamo.utils.counters
    same = deepcopy(model)
    with fresh_cache():
        counters.clear()
        compile_unet(model, SimpleNamespace(compile=True, compile_mode="default"), 1, torch.device("cpu"))
        for network in (model, same):
            network(rows).square().mean().backward()
        assert counters["inductor"]["extern_calls"] == 2, counters  # forward and backward
    assert model.state_dict().keys() == same.state_dict().keys()
    torch.testing.assert_close(model.linear.weight.grad, same.linear.weight.grad)
    with uncompiled(model):
        counters.clear()
        assert torch.equal(model(rows[:3]), same(rows[:3])) and not counters


def test_each_option_reaches_the_unet():
    config = {key: value for key, value in TINY_UNET.items() if not key.startswith("_")}
    options = SimpleNamespace(gradient_checkpointing=True, channels_last="yes", shard_weights=False)
    unet = move_to_device(UNet2DModel(**config), options, torch.device("cpu"))
    assert unet.is_gradient_checkpointing
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(
        isinstance(module.processor, AttnProcessor2_0) for module in unet.modules() if hasattr(module, "processor")
    )
    options.channels_last = "auto"
    assert memory_format(options, torch.device("cpu")) == torch.contiguous_format
    assert memory_format(options, torch.device("cuda")) == torch.channels_last


def test_the_unet_is_compiled_by_default_on_cuda_where_that_works(monkeypatch, capsys):
    options, cuda = HardwareOptions(), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert wants_compilation(options, cuda)
    for kind in ("cpu", "mps", "xpu"):
        assert not wants_compilation(options, torch.device(kind))
    assert wants_compilation(HardwareOptions(compile=True), torch.device("cpu"))
    assert not wants_compilation(HardwareOptions(compile=False), cuda)
    assert capsys.readouterr().out == ""
    for name, value, missing in (
        ("shutil.which", None, "a C compiler"),
        ("importlib.util.find_spec", None, "the package triton"),
    ):
        monkeypatch.setattr(name, lambda *arguments, value=value: value)
        assert not wants_compilation(options, cuda) and f"torch.compile needs {missing}" in capsys.readouterr().out


def test_convolutions_are_timed_on_cuda_unless_deterministic(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        prepare_device(HardwareOptions())
        assert torch.backends.cudnn.benchmark and torch.get_float32_matmul_precision() == "high"
        prepare_device(HardwareOptions(allow_tf32=False))
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = before[0], before[2]
        torch.set_float32_matmul_precision(before[1])


@pytest.mark.slow
def test_compile_is_asked_of_torch(train, monkeypatch):
    asked = []
    monkeypatch.setattr(UNet2DModel, "compile", lambda unet, **settings: asked.append(settings))
    train(compile=True, compile_mode="max-autotune", max_train_steps=1)
    accumulation = {"train_batch_size": 4, "gradient_accumulation_steps": 2}
    train(compile=True, compile_mode="max-autotune", max_train_steps=1, **accumulation)
    assert asked == [
        {"mode": "max-autotune", "dynamic": False},
        {"mode": "max-autotune-no-cudagraphs", "dynamic": False},  # graphs would overwrite what is being summed
    ]


def test_a_micro_step_does_not_wait_for_the_device(train, monkeypatch):
    from trainkit.training.run import Run

    update, counts = Run.update, []

    def counted(run, loss):
        with HostReads() as reads:
            update(run, loss)
        counts.append((run.end_of_step, reads.count))

    monkeypatch.setattr(Run, "update", counted)
    train(logging_steps=4, train_batch_size=4, gradient_accumulation_steps=2, checkpointing_steps=0)
    assert [count for end, count in counts if not end] == [0] * 2


def device_decides(monkeypatch):
    """As on an accelerator: the CPU, which has nothing to wait for, lets the host decide about a step."""
    monkeypatch.setattr(guards, "_host_decides", lambda optimizer, device: not optimizer.state)


def test_default_options_read_nothing_between_log_lines(train, monkeypatch):
    from trainkit.training.run import Run

    device_decides(monkeypatch)
    update, counts = Run.update, []

    def counted(run, loss):
        with HostReads() as reads:
            update(run, loss)
        counts.append(reads.count)

    monkeypatch.setattr(Run, "update", counted)
    train(optimizer=None, logging_steps=None, checkpointing_steps=0, max_train_steps=5)
    assert counts[1:4] == [0, 0, 0]  # the first step creates the optimizer's state; the last one is logged


@pytest.mark.parametrize("name", ["adamw", "adam", "muon", "lion", "lamb", "schedule_free_adamw"])
def test_a_step_reads_nothing_and_a_broken_one_changes_nothing(name, monkeypatch):
    device_decides(monkeypatch)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 6, 3), torch.nn.GroupNorm(2, 6))
    model.to(memory_format=torch.channels_last)
    other = deepcopy(model)
    options = OptimizationOptions(optimizer=name, learning_rate=1e-2)
    optimizer, plain = build_optimizer(options, model), build_optimizer(options, other)
    for step in range(5):
        before = [value.clone() for value in values_of(model, optimizer)]
        for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            same.grad = parameter.grad.clone()
        norm = torch.tensor(math.nan if step == 3 else 1.0)
        if step == 3:
            model[0].weight.grad.fill_(math.nan)
        with HostReads() as reads:
            guards.step_if_finite(optimizer, norm)
        assert reads.count == (step == 0 and name not in ("adamw", "adam"))
        if step < 3:
            plain.step()
            assert all(map(torch.equal, values_of(model, optimizer), values_of(other, plain)))
        changed = [not torch.equal(*pair) for pair in zip(before, values_of(model, optimizer), strict=False)]
        assert any(changed) == (step != 3)


def values_of(model, optimizer):
    states = [value for p in model.parameters() for value in optimizer.state.get(p, {}).values()]
    return [*model.parameters(), *filter(torch.is_tensor, states)]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "edm_lognormal"])
@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, FlowMatchEulerDiscreteScheduler])
def test_drawing_timesteps_reads_nothing(sampling, scheduler_class):
    """Tensors on the meta device have no values, so a read raises. The timesteps are those of the CPU."""
    options = SimpleNamespace(
        timestep_sampling=sampling, noise_shift=1.5, logit_mean=0.0, logit_std=1.0, edm_p_mean=-1.2, edm_p_std=1.2
    )
    scheduler, uniforms = scheduler_class(), torch.rand(800, dtype=torch.float64)
    before = draw_timesteps(options, scheduler, uniforms)
    if scheduler_class is DDPMScheduler:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to("meta")  # as `add_noise` moves it to the GPU
    assert torch.equal(draw_timesteps(options, scheduler, uniforms), before)
    timesteps = draw_timesteps(options, scheduler, uniforms, "meta")
    assert timesteps.device.type == "meta" and timesteps.shape == (800,) and timesteps.dtype == before.dtype


@pytest.mark.parametrize("most, expected", [(1, 1), (5, 4), (12, 12), (13, 12), (24, 24), (99, 24)])
def test_the_largest_micro_batch_is_a_divisor_that_fits(most, expected):
    assert largest_micro_batch(24, lambda size: size <= most) == expected


def test_no_image_fits():
    with pytest.raises(UserError, match="--find_batch_size: not even one image fits"):
        largest_micro_batch(24, lambda size: False)


@pytest.mark.slow
def test_finding_the_batch_size_keeps_the_run(plain, train, monkeypatch, capsys):
    """Memory for three images: two are taken at once, and eight still make an optimizer step."""
    forward = UNet2DModel.forward

    def limited(unet, sample, *arguments, **keywords):
        if len(sample) > 3 and torch.is_grad_enabled():
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return forward(unet, sample, *arguments, **keywords)

    monkeypatch.setattr(UNet2DModel, "forward", limited)
    found = train(find_batch_size=True)
    assert "8 images per step = 2 per device x 1 process x 4 micro-steps" in capsys.readouterr().out
    assert losses(found) == pytest.approx(losses(plain), abs=1e-4)


def test_flops_of_a_convolution_and_of_attention_are_counted():
    class Network(torch.nn.Conv2d):
        def forward(self, image, timestep):
            return super().forward(image)

    # 8 x 8 pixels, 5 outputs of 3 x 3 x 2 products each, two FLOPs a product, three times for training
    assert flops_of_image(Network(2, 5, 3, padding=1), (2, 8, 8)) == 3 * 2 * 8 * 8 * 5 * 9 * 2
    config = {key: value for key, value in TINY_UNET.items() if not key.startswith("_")}
    without = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    shape = (3, 16, 16)
    assert flops_of_image(UNet2DModel(**config), shape) > 1.1 * flops_of_image(UNet2DModel(**config | without), shape)


def test_utilisation_is_a_share_of_the_named_peak():
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989 and peak_tflops("NVIDIA H100 PCIe", "bf16") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "no") == 156 and peak_tflops("cpu", "bf16") is None
    throughput = Throughput(10**9, torch.device("cpu"), "bf16", num_processes=2)
    assert "mfu" not in throughput.values(100) and "peak" not in str(throughput)
    throughput.peak_tflops = 0.1
    values = throughput.values(100)
    assert values["images_per_s_per_device"] == 50 and values["model_tflops_per_s"] == 0.05 and values["mfu"] == 0.5
    assert 50 < values["memory_peak_mib"] == pytest.approx(memory_peak_mib(torch.device("cpu")), rel=0.1)


def test_the_log_says_what_the_hardware_does(plain):
    rows = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    assert {"images_per_s", "images_per_s_per_device", "model_tflops_per_s", "memory_peak_mib"} <= rows[-1].keys()


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_update_is_fused_and_that_of_the_formula(name):
    from trainkit.options.training import OptimizationOptions
    from trainkit.training.optimizers import build_optimizer

    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    options = OptimizationOptions(optimizer=name, learning_rate=0.1, adam_weight_decay=0.5)
    optimizer = build_optimizer(options, model)
    assert all(group["fused"] for group in optimizer.param_groups)
    model(torch.randn(7, 5)).square().mean().backward()
    optimizer.step()
    for key, value in model.named_parameters():
        decay = 0.5 if key == "weight" else 0.0
        gradient = value.grad + (decay * start[key] if name == "adam" else 0)
        expected = start[key] * (1 - (0.1 * decay if name == "adamw" else 0)) - 0.1 * gradient.sign()
        torch.testing.assert_close(value.detach(), expected, atol=1e-4, rtol=0)  # the first step is the sign's
