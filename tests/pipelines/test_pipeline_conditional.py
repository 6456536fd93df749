"""The pipeline that travels in conditional models: guidance, schedulers, seeds, conditions."""

import math
import re

import diffusers
import numpy as np
import pytest
import torch
from conditional_helpers import UNET, class_pipeline, class_unet, text_parts, vector_pipeline
from conftest import slow_after
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

from pipelines.conditional import ConditionalPipeline
from pipelines.guidance import noise_level, rescaled
from pipelines.prompts import encode_prompts
from pipelines.vector_embedding import VectorEmbedding


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only lose by sharing out their work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_pipeline(tmp_path):
    unet, parts = text_parts(tmp_path)
    pipeline = ConditionalPipeline(unet, DDIMScheduler(), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def images_of(pipeline, seeds=(0, 1), **arguments):
    values = {"num_inference_steps": 4, "output_type": "pt", "generator": generators(*seeds)}
    return pipeline(**values | arguments).images


class Calls:
    """The rows of each call of a module."""

    def __init__(self, module):
        self.rows = []
        module.register_forward_pre_hook(lambda module, inputs: self.rows.append(len(inputs[0])))


def test_guidance_of_1_is_no_guidance_and_one_call_a_step():
    pipeline = class_pipeline()
    plain = images_of(pipeline, class_labels=[0, 2])
    calls = Calls(pipeline.unet)
    assert torch.equal(images_of(pipeline, class_labels=[0, 2], guidance_scale=1.0, guidance_rescale=0.7), plain)
    assert calls.rows == [2] * 4
    strong = images_of(pipeline, class_labels=[0, 2], guidance_scale=3.0)
    assert calls.rows[4:] == [4] * 4 and not torch.allclose(strong, plain)


def test_guidance_goes_from_the_null_class_to_the_asked_one():
    pipeline = class_pipeline()
    noise = torch.randn(1, 3, 16, 16)
    pipeline.scheduler.set_timesteps(1)
    timestep = pipeline.scheduler.timesteps[0]
    with torch.no_grad():
        null, asked = (pipeline.unet(noise, timestep, torch.tensor([label])).sample for label in (3, 1))
    expected = pipeline.scheduler.step(null + 2.5 * (asked - null), timestep, noise).prev_sample
    made = pipeline(1, latents=noise, num_inference_steps=1, guidance_scale=2.5, output_type="latent").images
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("null", [[None, None], [3, 3]])
def test_the_null_condition_is_not_changed_by_guidance(null):
    pipeline = class_pipeline()
    if null[0] == 3:  # the id of the null class is none that can be asked for
        with pytest.raises(ValueError, match="class_labels: 3 must be 0 to 2"):
            pipeline(null)
        return
    plain = images_of(pipeline, class_labels=null)
    torch.testing.assert_close(images_of(pipeline, class_labels=null, guidance_scale=4.0), plain, atol=1e-4, rtol=0)


def test_guidance_keeps_to_its_interval():
    pipeline = class_pipeline()
    pipeline.scheduler.set_timesteps(4)
    sigmas = [noise_level(pipeline.scheduler, index, t) for index, t in enumerate(pipeline.scheduler.timesteps)]
    alphas = pipeline.scheduler.alphas_cumprod[pipeline.scheduler.timesteps]
    np.testing.assert_allclose(sigmas, ((1 - alphas) / alphas).sqrt(), rtol=1e-4)
    calls = Calls(pipeline.unet)
    images_of(pipeline, class_labels=[0, 1], guidance_scale=2.0, guidance_interval=(sigmas[2], sigmas[1]))
    assert calls.rows == [2, 4, 2, 2]


def test_the_noise_level_of_flow_matching_and_of_edm():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    levels = [noise_level(flow, index, timestep) for index, timestep in enumerate(flow.timesteps)]
    assert levels[0] == math.inf and levels == sorted(levels, reverse=True)
    half = float(flow.sigmas[2])
    assert levels[2] == pytest.approx(half / (1 - half))
    edm = diffusers.EDMEulerScheduler(sigma_max=80.0)
    edm.set_timesteps(4)
    assert noise_level(edm, 0, edm.timesteps[0]) == pytest.approx(80)


def test_rescaled_guidance_has_the_contrast_of_the_conditional_prediction():
    torch.manual_seed(0)
    guided, conditional = 5 * torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    full = rescaled(guided, conditional, 1.0)
    torch.testing.assert_close(full.std(dim=(1, 2, 3)), conditional.std(dim=(1, 2, 3)))
    torch.testing.assert_close(rescaled(guided, conditional, 0.25), 0.25 * full + 0.75 * guided)
    pipeline = class_pipeline()
    values = {"class_labels": [0, 1], "guidance_scale": 4.0}
    plain, taken_back = (images_of(pipeline, guidance_rescale=factor, **values) for factor in (0, 1))
    assert not torch.allclose(plain, taken_back)


@pytest.mark.parametrize("classes", [4, None])
def test_autoguidance_guides_away_from_the_weak_unet(classes):
    weak = class_unet(seed=1, num_class_embeds=classes)
    pipeline = class_pipeline(guidance_unet=weak)
    calls = Calls(weak)
    noise = torch.randn(1, 3, 16, 16)
    pipeline.scheduler.set_timesteps(1)
    timestep = pipeline.scheduler.timesteps[0]
    with torch.no_grad():
        asked = pipeline.unet(noise, timestep, torch.tensor([1])).sample
        bad = weak(noise, timestep, *([] if classes is None else [torch.tensor([1])])).sample
    expected = pipeline.scheduler.step(bad + 2 * (asked - bad), timestep, noise).prev_sample
    made = pipeline(1, latents=noise, num_inference_steps=1, guidance_scale=2.0, output_type="latent").images
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    images_of(pipeline, class_labels=[0, 1])
    assert calls.rows == [1, 1], "without guidance it is not called"


@pytest.mark.parametrize("kind", slow_after(1, ["class", "vector", "text"]))
def test_an_image_depends_on_its_seed_and_condition_alone(kind, text_pipeline):
    pipeline = {"class": class_pipeline, "vector": vector_pipeline, "text": lambda: text_pipeline}[kind]()
    pipeline.scheduler = DDPMScheduler()  # draws noise at each step
    asked = {
        "class": ["dog", 0, None, 2],
        "vector": [[1.0, 2, 3], [0.0, 0, 0], None, [9.0, 1, 1]],
        "text": ["a red square", "blue", None, "a circle"],
    }[kind]
    together = images_of(pipeline, (5, 6, 7, 8), guidance_scale=2.0, **{pipeline.conditions[0]: asked})
    assert len({image.numpy().tobytes() for image in together}) == 4
    for index, condition in enumerate(asked):
        alone = images_of(pipeline, (5 + index,), guidance_scale=2.0, **{pipeline.conditions[0]: [condition]})
        torch.testing.assert_close(alone[0], together[index], atol=1 / 255, rtol=0)
    other = images_of(pipeline, (5,), guidance_scale=2.0, **{pipeline.conditions[0]: [asked[1]]})
    assert not torch.allclose(other[0], together[0], atol=1 / 255), "the condition changes the image"


MEAN, DEVIATION = 0.4, 0.2


class ExactDenoiser(UNet2DModel):
    """For normally distributed pixels: the noise of a DDPM, the velocity of flow matching, or what EDM asks for."""

    def forward(self, sample, timestep, class_labels):
        if self.config.attention_head_dim == "edm":  # Karras et al. 2022, Eq. 7, of data of deviation 0.5
            sigma = math.exp(4 * timestep)
            total = sigma**2 + 0.25
            sample = sample * math.sqrt(total)
            denoised = (DEVIATION**2 * sample + sigma**2 * MEAN) / (DEVIATION**2 + sigma**2)
            return UNet2DOutput(sample=(denoised - 0.25 / total * sample) * math.sqrt(total) / (0.5 * sigma))
        if self.config.attention_head_dim == "flow":
            signal, noise = 1 - timestep / 1000, timestep / 1000
            slope = (noise - signal * DEVIATION**2) / (signal**2 * DEVIATION**2 + noise**2)
            return UNet2DOutput(sample=slope * (sample - signal * MEAN) - MEAN)
        alpha = np.interp(float(timestep), np.arange(1000), DDPMScheduler().alphas_cumprod)
        slope = math.sqrt(1 - alpha) / (alpha * DEVIATION**2 + 1 - alpha)
        return UNet2DOutput(sample=slope * (sample - math.sqrt(alpha) * MEAN))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    "DDPM DDIM EulerDiscrete EulerAncestralDiscrete HeunDiscrete UniPCMultistep DEISMultistep DPMSolverMultistep "
    "DPMSolverMultistep-sde DPMSolverSinglestep SASolver KDPM2Discrete KDPM2AncestralDiscrete LMSDiscrete PNDM "
    "EDMEuler EDMDPMSolverMultistep FlowMatchEulerDiscrete FlowMatchHeunDiscrete".split(),
)
def test_any_scheduler_samples_what_it_should(name):
    unet = ExactDenoiser(**UNET | {"num_class_embeds": 4, "sample_size": 8})
    name, _, kind = name.partition("-")
    scheduler_class, betas = getattr(diffusers, f"{name}Scheduler"), DDPMScheduler(clip_sample=False).config
    if name.startswith(("Flow", "EDM")):
        scheduler = scheduler_class()
        unet.register_to_config(attention_head_dim="flow" if "Flow" in name else "edm")
    else:
        more = {"algorithm_type": "sde-dpmsolver++"} if kind else {}
        scheduler = scheduler_class.from_config(betas, timestep_spacing="linspace", **more)
    pipeline = ConditionalPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    image = images_of(pipeline, class_labels=[0, 1], num_inference_steps=100, output_type="latent")
    assert abs(image.mean() - MEAN) < 0.05 and abs(image.std() / DEVIATION - 1) < 0.25


def test_outputs():
    pipeline = class_pipeline()
    names = ("pil", "np", "pt", "latent")
    kinds = {name: images_of(pipeline, class_labels=[0, "7"], output_type=name) for name in names}
    assert [image.size for image in kinds["pil"]] == [(16, 16)] * 2
    assert kinds["np"].shape == (2, 16, 16, 3) and kinds["pt"].shape == kinds["latent"].shape == (2, 3, 16, 16)
    torch.testing.assert_close((kinds["latent"] / 2 + 0.5).clamp(0, 1), kinds["pt"])
    np.testing.assert_allclose(np.asarray(kinds["pil"][1]) / 255, kinds["np"][1], atol=0.51 / 255)
    several = images_of(pipeline, (0, 1, 2, 3), class_labels=[0, 2], num_images_per_prompt=2)
    same = images_of(pipeline, (0, 1, 2, 3), class_labels=[0, 0, 2, 2])
    assert torch.equal(several, same)


def test_latents_are_decoded_by_the_vae():
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(block_out_channels=[8, 8], norm_num_groups=4, latent_channels=3, scaling_factor=0.5, **blocks)
    pipeline = class_pipeline(vae=vae.eval())
    latents = images_of(pipeline, class_labels=[0, 1], output_type="latent")
    images = images_of(pipeline, class_labels=[0, 1])
    assert images.shape == (2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(images, (vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1))


def test_a_callback_sees_and_changes_every_step_and_can_stop():
    pipeline, seen = class_pipeline(), []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tuple(tensors["latents"].shape)))
        pipe._interrupt = step == 2
        return {"latents": torch.zeros_like(tensors["latents"])}

    made = images_of(pipeline, class_labels=[0, 1], callback_on_step_end=callback, output_type="latent")
    assert [step for step, _, _ in seen] == [0, 1, 2] and seen[0][2] == (2, 3, 16, 16)
    assert not made.any()


def test_a_callback_may_leave_everything_as_it_is():
    pipeline, seen = class_pipeline(), []
    for names in (None, [], ["latents"]):
        images = images_of(
            pipeline, class_labels=[0, 1], callback_on_step_end_tensor_inputs=names,
            callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(list(tensors)),
        )  # fmt: skip
        assert torch.equal(images, images_of(pipeline, class_labels=[0, 1]))
    assert seen == [[]] * 8 + [["latents"]] * 4


def test_vectors_are_told_apart_in_half_precision(tmp_path):
    pipeline = vector_pipeline()
    pipeline.vector_embedding.set_statistics(torch.full((3,), 100_000.0), torch.tensor([0.5, 1.0, 1.0]))
    asked = {"vectors": [[100_000.5, 100_001, 99_999], [99_999.5, 100_001, 99_999]], "guidance_scale": 2.0}
    expected = images_of(pipeline, **asked)
    pipeline.vector_embedding.save_pretrained(tmp_path)
    pipeline.to(dtype=torch.bfloat16)
    found = images_of(pipeline, **asked)
    assert found.dtype == torch.float32 and (found - expected).abs().mean() < 0.05
    loaded = VectorEmbedding.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert loaded.output.weight.dtype == torch.float16 and loaded.mean.dtype == torch.float32
    vectors = torch.tensor(asked["vectors"])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(vectors).float(), VectorEmbedding.from_pretrained(tmp_path)(vectors), atol=0.02, rtol=0.02
        )


def test_offloaded_parts_make_the_same_images(text_pipeline):
    pipeline = class_pipeline(guidance_unet=class_unet(seed=1))
    for pipe, asked in ((pipeline, {"class_labels": [0, 1]}), (text_pipeline, {"prompt": ["a red square", None]})):
        expected = images_of(pipe, guidance_scale=2.0, **asked)
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(images_of(pipe, guidance_scale=2.0, **asked), expected)


def test_new_vector_embeddings_leave_the_unet_as_it_was_and_learn_null():
    embedding = VectorEmbedding(3, 8)
    vectors = torch.tensor([[1.0, 2, 3], [torch.nan] * 3])
    assert not embedding(vectors).any()
    embedding(vectors).sum().backward()
    assert embedding.null_embedding.grad.any()
    assert all(weights.grad.isfinite().all() for weights in embedding.parameters())


def test_an_encoding_does_not_depend_on_the_other_prompts(text_pipeline):
    encoder, tokenizer = text_pipeline.text_encoder, text_pipeline.tokenizer
    together, mask = encode_prompts(tokenizer, encoder, ["a", "a red circle"])
    alone, _ = encode_prompts(tokenizer, encoder, ["a"])
    torch.testing.assert_close(together[:1], alone)
    assert together.shape == (2, 12, 16) and mask.sum(1).tolist() == [3, 5]
    assert encode_prompts(tokenizer, encoder, ["a"], 6)[0].shape == (1, 6, 16)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "class_labels is missing"),
        ({"prompt": "a cat"}, "prompt: this model accepts class_labels"),
        ({"class_labels": 3}, "class_labels: 3 must be 0 to 2"),
        ({"class_labels": [-1]}, "class_labels: -1 must be 0 to 2"),
        ({"class_labels": "dgo"}, "no class is called 'dgo': did you mean 'dog'?"),
        ({"class_labels": 0, "guidance_scale": 0.5}, "guidance_scale 0.5 must be at least 1"),
        (
            {"class_labels": 0, "guidance_interval": (3, 1)},
            "guidance_interval (3, 1): give two noise levels, the lower",
        ),
        ({"class_labels": 0, "guidance_interval": [3]}, "guidance_interval [3]: give two noise levels"),
        ({"class_labels": 0, "guidance_scale": math.nan}, "guidance_scale nan must be at least 1"),
        ({"class_labels": [1.5, 0]}, "class_labels: 1.5 is not a whole number"),
        ({"class_labels": math.nan}, "class_labels: nan is not a whole number"),
        ({"class_labels": "\u00b2"}, "no class is called '\u00b2'"),
        ({"class_labels": []}, "class_labels: the list is empty"),
        ({"class_labels": torch.zeros(0)}, "class_labels: the list is empty"),
        ({"class_labels": 0, "num_images_per_prompt": 0}, "num_images_per_prompt and num_inference_steps must be"),
        (
            {"class_labels": 0, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            "only ['latents'] can be given",
        ),
        ({"class_labels": 0, "guidance_rescale": 2}, "guidance_rescale 2 must be 0 to 1"),
        ({"class_labels": 0, "output_type": "jpg"}, "output_type 'jpg'"),
        ({"class_labels": [0, 1], "generator": generators(1)}, "1 generators for 2 images"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        class_pipeline()(**arguments)


@pytest.mark.parametrize(
    "vectors, message",
    [
        ([1.0, 2.0], "2 numbers in a vector, the model accepts 3"),
        (np.zeros((2, 5)), "the model accepts (images, 3)"),
        ([[1.0, 2.0, math.inf]], "every number must be finite"),
        ([[1.0, 2.0, math.nan]], "every number must be finite"),
    ],
)
def test_wrong_vectors_are_named(vectors, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        vector_pipeline()(vectors=vectors)


def test_a_prompt_that_is_too_long_is_named(text_pipeline):
    with pytest.raises(ValueError, match="has 22 tokens, the model accepts 12: shorten it"):
        text_pipeline(prompt="red " * 20)
