"""Non-leaking augmentation from start to end: trained with labels, resumed and divided, saved as a stock UNet."""

import json
import shutil

import pytest
import torch
from conftest import TINY_UNET
from diffusers import DDPMPipeline, UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding
from process_helpers import run_forked
from safetensors.torch import load_file
from training_helpers import losses, run_in_process, same_weights, tiny_run

from trainkit.data.loading.augment_draws import LABELS
from trainkit.diffusion.augmentation_input import add_augmentation_input, without_augmentation_input
from trainkit.errors import UserError
from trainkit.training.averages.ema import ShardedEMA

LAYER = "time_embedding.cond_proj.weight"
WEIGHTS = "diffusion_pytorch_model.safetensors"
AUGMENTATION = {
    "random_rotation": 20, "random_hue": 40, "random_scale": 0.2, "augmentation_probability": 0.8,
    "augmentation_conditioning": True, "max_train_steps": 6,
}  # fmt: skip


def unet_with_input(seed=0):
    torch.manual_seed(seed)
    stock = UNet2DModel(**{name: value for name, value in TINY_UNET.items() if name != "_class_name"})
    unet = UNet2DModel.from_config(stock.config)
    unet.load_state_dict(stock.state_dict())
    add_augmentation_input(unet, LABELS)
    return stock, unet


def test_labels_move_the_prediction_and_zeros_do_not():
    stock, unet = unet_with_input()
    images, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    expected = stock(images, timesteps).sample
    assert torch.equal(unet(images, timesteps).sample, expected)
    assert torch.equal(unet(images, timesteps, augmentation=torch.zeros(2, LABELS)).sample, expected)
    labels = torch.zeros(2, LABELS)
    labels[1] = 1
    labelled = unet(images, timesteps, augmentation=labels).sample
    assert torch.allclose(labelled[0], expected[0], atol=1e-6) and not torch.allclose(
        labelled[1], expected[1], atol=1e-3
    )
    labelled.square().mean().backward()
    assert unet.time_embedding.cond_proj.weight.grad.abs().min() > 0
    assert torch.equal(unet(images, timesteps).sample, expected), "labels are not left behind"


def test_every_parameter_has_a_gradient_where_no_image_is_augmented():
    """DDP waits without end for a parameter that has no gradient."""
    _, unet = unet_with_input()
    labels = torch.zeros(2, LABELS)
    unet(torch.randn(2, 3, 8, 8), torch.tensor([3, 500]), augmentation=labels).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in unet.parameters())


def test_without_the_layer_it_is_a_stock_unet_and_then_as_before():
    stock, unet = unet_with_input()
    names = [name for name, _ in unet.named_parameters()]
    average = ShardedEMA(unet)
    with average.swapped_in(), without_augmentation_input(unet):
        assert unet.state_dict().keys() == stock.state_dict().keys()
    assert [name for name, _ in unet.named_parameters()] == names and LAYER in names
    with without_augmentation_input(stock):  # a UNet that has none
        pass


class EmbeddingAlone(torch.nn.Module):
    """What of a UNet the layer is in."""

    def __init__(self):
        super().__init__()
        self.time_embedding = TimestepEmbedding(8, 16)

    def forward(self, times):
        return self.time_embedding(times)


@pytest.mark.slow
def test_compiled_once_for_all_labels():
    model, times, graphs = EmbeddingAlone(), torch.randn(2, 8), []
    add_augmentation_input(model, LABELS)
    labels = torch.randn(3, 2, LABELS).unbind()
    expected = [model(times, augmentation=label) for label in labels]
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward, dynamic=False)
    for label, result in zip(labels, expected, strict=True):
        assert torch.allclose(model(times, augmentation=label), result, atol=1e-6)
    assert len(graphs) == 1
    # A CUDA graph always reads what is marked this way at one address.
    inputs = [node.meta for node in graphs[0].graph.nodes if node.op == "placeholder"]
    free = [meta["example_value"].shape for meta in inputs if "_dynamo_static_input_type" not in meta["tensor_dict"]]
    assert sorted(free) == sorted([(2, 8), (2, LABELS)])


@pytest.fixture(scope="module")
def whole(image_folder, tiny_unet, cache_dir, tmp_path_factory):
    """Six steps of eight images on one process, with a checkpoint after the third."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    flags = {"validation_data_dir": tmp_path_factory.mktemp("held_out"), **AUGMENTATION}
    for file in sorted(image_folder.rglob("*.png"))[:6]:
        shutil.copy(file, flags["validation_data_dir"])
    run_forked("train_unconditional.py", *tiny_run(image_folder, tiny_unet, cache_dir, folder, **flags))
    return folder


@pytest.mark.slow
def test_the_saved_pipeline_is_stock_and_the_checkpoints_hold_the_layer(whole):
    saved = load_file(whole / "unet" / WEIGHTS)
    unet, loading = UNet2DModel.from_pretrained(whole / "unet", output_loading_info=True)
    assert saved.keys() == unet.state_dict().keys() and not any(loading.values())
    assert json.loads((whole / "unet" / "config.json").read_text())["_class_name"] == "UNet2DModel"
    assert json.loads((whole / "model_index.json").read_text())["unet"] == ["diffusers", "UNet2DModel"]
    pipeline = DDPMPipeline.from_pretrained(whole)
    assert pipeline(num_inference_steps=2).images[0].size == (16, 16)

    three, six = (load_file(whole / f"checkpoint-{step}" / "unet" / WEIGHTS)[LAYER] for step in (3, 6))
    assert three.shape == (8, LABELS) and not torch.equal(three, six), "it is trained"
    averages = load_file(whole / "checkpoint-6" / "unet_ema" / WEIGHTS)
    assert not torch.equal(averages[LAYER], six)
    assert all(torch.equal(saved[name], averages[name]) for name in saved), "the averaged weights are saved"
    assert f"{LAYER}/exp_avg" in load_file(whole / "checkpoint-6" / "optimizer.safetensors")
    assert any("validation_loss" in line for line in (whole / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow(6)
@pytest.mark.parametrize("sharded", [None, True])
def test_two_processes_go_on_as_one_would(whole, sharded, image_folder, tiny_unet, cache_dir, tmp_path):
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)
    flags = {
        **AUGMENTATION,
        "train_batch_size": 4,
        "resume_from_checkpoint": "latest",
        "shard_weights": sharded or None,
    }
    run_forked("train_unconditional.py", *tiny_run(image_folder, tiny_unet, cache_dir, resumed, **flags), processes=2)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-4)
    for part in ("checkpoint-6/unet", "unet"):
        same_weights(resumed / part / WEIGHTS, whole / part / WEIGHTS, tolerance=1e-4)


@pytest.mark.slow
def test_a_checkpoint_with_the_layer_fits_no_run_without(whole, image_folder, tiny_unet, cache_dir, monkeypatch):

    flags = {**AUGMENTATION, "augmentation_conditioning": None, "resume_from_checkpoint": "checkpoint-3"}
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, whole, **flags)
    with pytest.raises(UserError, match=rf"does not fit this run .*{LAYER}.*resume with the options") as error:
        run_in_process(monkeypatch, "train_unconditional", arguments)
    assert "\n" not in str(error.value)
