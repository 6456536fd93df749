"""Weights of a model of other conditions as the start of training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_UNET
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from trainkit.diffusion.conditioning import add_vector_embedding
from trainkit.diffusion.pretrained import load_pretrained
from trainkit.diffusion.unet import build_unet
from trainkit.errors import UserError
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline


def make_unet(channels=3, **config):
    torch.manual_seed(1)
    known = {key: value for key, value in TINY_UNET.items() if not key.startswith("_")}
    unet = UNet2DModel(**known | {"sample_size": 8, "in_channels": channels, "out_channels": channels} | config)
    if config.get("class_embed_type") == "identity":
        add_vector_embedding(unet, np.float32([50, 5, -50]), np.float32([30, 1, 30]))
    return unet.eval()


def trained(unet):
    """`unet` with other weights than a fresh one has."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return unet


def predict(unet, images=None, **inputs):
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) if images is None else images
    with torch.no_grad():
        return unet(images, torch.tensor([1, 100, 500, 999]), **inputs).sample


CLASSES, VECTORS = torch.arange(4), torch.tensor([[1.0, 2, 3]] * 3 + [[torch.nan] * 3])


def test_an_unconditional_model_is_the_start_of_a_conditional_one(tmp_path):
    old = trained(make_unet())
    DDPMPipeline(old, DDPMScheduler()).save_pretrained(tmp_path)
    classes, vectors = make_unet(num_class_embeds=4), make_unet(class_embed_type="identity")
    assert not torch.equal(predict(classes, class_labels=CLASSES), predict(old))
    assert "3 classes added at zero" in load_pretrained(classes, str(tmp_path), ["a", "b", "c"])
    assert torch.equal(predict(classes, class_labels=CLASSES), predict(old))
    assert "vectors added at zero" in load_pretrained(vectors, str(tmp_path))
    assert torch.equal(predict(vectors, class_labels=VECTORS), predict(old))


def test_classes_are_found_by_name_and_new_ones_start_as_null(tmp_path):
    old = trained(make_unet(num_class_embeds=4))
    save_pipeline(tmp_path, conditional_pipeline(old, DDPMScheduler(), id2label={0: "a", 1: "b", 2: "c"}), "")
    new = make_unet(num_class_embeds=5)
    report = load_pretrained(new, str(tmp_path), ["c", "d", "a", "e"])
    assert "2 of 4 classes unchanged" in report and "not loaded" not in report
    expected = predict(old, class_labels=torch.tensor([2, 3, 0, 3]))
    assert torch.equal(predict(new, class_labels=CLASSES), expected)
    plain, vectors = make_unet(), make_unet(class_embed_type="identity")
    null = predict(old, class_labels=torch.full((4,), 3))
    for other, inputs in ((plain, {}), (vectors, {"class_labels": VECTORS})):
        assert "null condition is kept" in load_pretrained(other, str(tmp_path))
        torch.testing.assert_close(predict(other, **inputs), null, atol=1e-5, rtol=1e-5)


def test_vectors_keep_their_embedding_and_its_statistics(tmp_path):
    old = trained(make_unet(class_embed_type="identity"))
    with torch.no_grad():
        old.class_embedding.mean.add_(1)
    save_pipeline(tmp_path, conditional_pipeline(old, DDPMScheduler()), "")
    new = make_unet(class_embed_type="identity")
    load_pretrained(new, str(tmp_path))
    assert torch.equal(predict(new, class_labels=VECTORS), predict(old, class_labels=VECTORS))
    plain = make_unet(num_class_embeds=4)
    load_pretrained(plain, str(tmp_path), ["a", "b", "c"])
    null = predict(old, class_labels=torch.full((4, 3), torch.nan))
    torch.testing.assert_close(predict(plain, class_labels=CLASSES), null, atol=1e-5, rtol=1e-5)
    longer = make_unet(class_embed_type="identity")
    longer.class_embedding = type(longer.class_embedding)(5, 32)
    with pytest.raises(UserError, match="vectors of 3 numbers, the training data has 5"):
        load_pretrained(longer, str(tmp_path))


@pytest.mark.slow
def test_classes_and_vectors_start_from_either_and_from_both(tmp_path):
    """The prediction of the old model is that of what it knows, with the other condition at zero."""
    names, both = ["a", "b", "c"], {"num_class_embeds": 4, "class_embed_type": "identity"}
    rows = torch.cat([CLASSES[:, None].float(), VECTORS], dim=1)
    for old, inputs in (
        (trained(make_unet(num_class_embeds=4)), CLASSES), (trained(make_unet(class_embed_type="identity")), VECTORS)
    ):  # fmt: skip
        folder = tmp_path / str(inputs.ndim)
        save_pipeline(folder, conditional_pipeline(old, DDPMScheduler(), id2label=dict(enumerate(names))), "")
        new = make_unet(**both)
        report = load_pretrained(new, str(folder), names)
        assert ("vectors added at zero" if inputs.ndim == 1 else "3 classes added at zero") in report
        assert torch.equal(predict(new, class_labels=rows), predict(old, class_labels=inputs))

    old = trained(make_unet(**both))
    save_pipeline(tmp_path / "both", conditional_pipeline(old, DDPMScheduler(), id2label=dict(enumerate(names))), "")
    null = torch.full((4, 1), torch.nan)
    for given, inputs, asked in (
        (both, {"class_labels": rows}, rows),
        ({"num_class_embeds": 4}, {"class_labels": CLASSES}, torch.cat([rows[:, :1], null.expand(4, 3)], dim=1)),
        ({"class_embed_type": "identity"}, {"class_labels": VECTORS}, torch.cat([null, VECTORS], dim=1)),
        ({}, {}, null.expand(4, 4)),
    ):
        new = make_unet(**given)
        load_pretrained(new, str(tmp_path / "both"), names)
        expected = predict(old, class_labels=asked)
        torch.testing.assert_close(predict(new, **inputs), expected, atol=1e-5, rtol=1e-5)


def test_more_and_fewer_image_channels(tmp_path):
    grey = trained(make_unet(channels=1))
    DDPMPipeline(grey, DDPMScheduler()).save_pretrained(tmp_path)
    colour = make_unet(channels=3)
    assert "image channels 1 -> 3, new ones zero" in load_pretrained(colour, str(tmp_path))
    images = torch.randn(4, 3, 8, 8)
    prediction = predict(colour, images)
    torch.testing.assert_close(prediction[:, :1], predict(grey, images[:, :1]), atol=1e-5, rtol=1e-5)
    assert not prediction[:, 1:].any()
    DDPMPipeline(colour, DDPMScheduler()).save_pretrained(tmp_path / "colour")
    back = make_unet(channels=1)
    assert "image channels 3 -> 1" in load_pretrained(back, str(tmp_path / "colour"))
    torch.testing.assert_close(predict(back, images[:, :1]), predict(grey, images[:, :1]), atol=1e-5, rtol=1e-5)


def text_unet(pipeline, width):
    """The UNet that --condition text builds to start from a saved pipeline."""
    options = SimpleNamespace(condition="text", pretrained_model_name_or_path=str(pipeline), image_mode="RGB")
    options.model_config_name_or_path, options.enable_xformers_memory_efficient_attention = None, False
    torch.manual_seed(3)
    return build_unet(options, 8, 8, 3, cross_attention_dim=width).eval()


@pytest.mark.parametrize("heads", [8, None])
def test_captions_are_added_to_a_model_without(tmp_path, heads):
    """What it predicts stays; but diffusers knows no middle with self- and cross-attention."""
    old = trained(make_unet(add_attention=False, num_class_embeds=3, attention_head_dim=heads))
    DDPMPipeline(old, DDPMScheduler()).save_pretrained(tmp_path)
    new, text = text_unet(tmp_path, 12), {"encoder_hidden_states": torch.randn(4, 5, 12)}
    report = load_pretrained(new, str(tmp_path))
    assert "1 layers of cross-attention added at zero" in report and "not loaded" not in report
    null = predict(old, class_labels=torch.full((4,), 2))
    torch.testing.assert_close(predict(new, **text), null, atol=1e-5, rtol=1e-5)
    new(torch.randn(4, 3, 8, 8), 5, **text).sample.mean().backward()
    assert new.mid_block.attentions[0].proj_out.weight.grad.any()

    plain = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    old = trained(make_unet(**plain))
    DDPMPipeline(old, DDPMScheduler()).save_pretrained(tmp_path / "plain")
    new = text_unet(tmp_path / "plain", 12)
    report = load_pretrained(new, str(tmp_path / "plain"))
    assert "4 layers of cross-attention" in report and "not loaded: mid_block.attentions.0.group_norm" in report
    assert list(new.config.down_block_types) == ["DownBlock2D", "CrossAttnDownBlock2D"]


def test_a_model_of_captions_goes_on_with_the_same_or_another_encoder(tmp_path):
    DDPMPipeline(make_unet(), DDPMScheduler()).save_pretrained(tmp_path / "plain")
    old = trained(text_unet(tmp_path / "plain", 12))
    save_pipeline(tmp_path / "text", conditional_pipeline(old, DDPMScheduler()), "")
    same, other = (text_unet(tmp_path / "text", width) for width in (12, 20))
    states = torch.randn(4, 5, 20)
    report = load_pretrained(same, str(tmp_path / "text"))
    assert f"{len(old.state_dict())} of {len(old.state_dict())} tensors" in report and ";" not in report
    inputs = {"encoder_hidden_states": states[..., :12]}
    assert torch.equal(predict(same, **inputs), predict(old, **inputs))
    report = load_pretrained(other, str(tmp_path / "text"))
    assert "text 12 -> 20 numbers per token" in report and "not loaded" not in report
    assert torch.equal(predict(other, encoder_hidden_states=states), predict(other, encoder_hidden_states=-states))


def test_what_does_not_fit_is_told(tmp_path):
    old = trained(make_unet())
    DDPMPipeline(old, DDPMScheduler(prediction_type="sample")).save_pretrained(tmp_path)
    deeper = make_unet(layers_per_block=2)
    assert "not loaded: down_blocks.0.resnets.1" in load_pretrained(deeper, str(tmp_path))
    with pytest.raises(UserError, match="its weights do not fit this UNet"):
        load_pretrained(make_unet(block_out_channels=(16, 32)), str(tmp_path))
