"""Conditions as inputs of a model, their draws and their order; weights of a model of other conditions."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_UNET
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from trainkit.data.loading.class_order import ClassBalancedOrder, balanced_order, class_shares
from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.data.loading.order import Purpose, uniform_draws
from trainkit.data.loading.statistics import mean_and_std, vector_statistics
from trainkit.diffusion.conditioning import (
    ClassCondition,
    VectorCondition,
    add_vector_embedding,
    open_condition,
)
from trainkit.diffusion.pretrained import load_pretrained
from trainkit.diffusion.unet import build_unet
from trainkit.errors import UserError
from trainkit.options.script import ConditionalTrainingOptions
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline

COUNTS, UNKNOWN = (60, 25, 9, 0), 6
LABELS = np.random.default_rng(1).permutation(np.repeat([0, 1, 2, -1], [*COUNTS[:3], UNKNOWN]))


class Labelled:
    """A hundred images of 4x4 of known classes and vectors, as a prepared dataset gives them."""

    height = width = 4
    channels, bit_depth, fixed_size, holds_latents = 1, 8, True, False
    label_names, vector_length, preparation = ["cat", "dog", "elk", "fox"], 3, {}

    def __len__(self):
        return len(LABELS)

    def read_soon(self, indices):
        pass

    def gather(self, indices, crops):
        return np.zeros((len(indices), 4, 4, 1), dtype=np.uint8)

    def labels(self, indices):
        return LABELS[indices]

    def vectors(self, indices):
        return np.stack([indices, indices * 0 + 5, -indices], axis=1).astype(np.float32)

    def column(self, name):
        everything = np.arange(len(self))
        yield from np.array_split(self.labels(everything) if name == "label" else self.vectors(everything), 3)


def test_classes_as_inputs():
    condition = ClassCondition(Labelled(), Labelled.label_names, dropout=0.3)
    assert condition.unet_config == {"num_class_embeds": 5}
    indices = np.array([np.flatnonzero(LABELS == label)[0] for label in (0, 1, 2, -1)])
    assert condition.inputs(indices)["class_labels"].tolist() == [0, 1, 2, 4]  # an unknown one is null
    assert condition.inputs(indices, np.array([0.29, 0.31, 0.0, 0.9]))["class_labels"].tolist() == [4, 1, 4, 4]
    assert condition.pipeline_conditions(indices) == [0, 1, 2, None]
    assert condition.preview_conditions(8, seed=0) == ([0, 0, 1, 1, 2, 2, 3, 3], 2)


def test_held_out_images_may_number_their_classes_otherwise():
    held_out = Labelled()
    held_out.label_names = ["fox", "cat", "dog"]
    condition = ClassCondition(Labelled(), Labelled.label_names, dropout=0.5).for_images(held_out)
    indices = np.array([np.flatnonzero(LABELS == label)[0] for label in (0, 1, 2, -1)])
    assert condition.inputs(indices, np.ones(4))["class_labels"].tolist() == [3, 0, 1, 4]
    held_out.label_names = ["cat", "yak", "dog"]
    with pytest.raises(UserError, match="--validation_data_dir has the class yak"):
        condition.for_images(held_out)


def test_vectors_as_inputs():
    condition = VectorCondition(Labelled(), dropout=0.5)
    vectors = condition.inputs(np.array([3, 4]), np.array([0.6, 0.4]))["class_labels"]
    assert vectors[0].tolist() == [3, 5, -3] and vectors[1].isnan().all()
    assert torch.equal(condition.inputs(np.array([3]))["class_labels"], vectors[:1])


UNEVEN = {"account": {"reason why folders are not classes": {"count": 1, "examples": ["a/1.png is deeper"]}}}


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ({"label_names": None}, {}, "--condition class: photos has no classes; give it one folder per class"),
        ({"label_names": None, "preparation": UNEVEN}, {}, r"photos has no classes \(a/1.png is deeper\); give"),
        ({"label_names": ["cat"]}, {}, r"has only one class \(cat\)"),
        ({"column": lambda name: iter([np.full(9, -1)])}, {}, "gives no image a class"),
        ({"vector_length": None}, {"condition": ["vector"]}, "--condition vector: photos has no vectors"),
    ],
)
def test_images_without_the_condition_are_refused(what, options, message):
    images = Labelled()
    for name, value in what.items():
        setattr(images, name, value)
    with pytest.raises(UserError, match=message):
        open_condition(ConditionalTrainingOptions(train_data_dir="photos", **options), images)


def test_dropout_is_a_draw_of_each_row_of_the_global_batch():
    """Whatever the division, and as often as the flag says."""

    def labels(per_device, micro_steps, ranks):
        found = []
        for micro_step in range(micro_steps):
            for rank in range(ranks):
                shape = BatchShape(per_device, micro_steps, ranks, rank)
                condition = ClassCondition(Labelled(), Labelled.label_names, dropout=0.25)
                loader = BatchLoader(Labelled(), shape, 3, False, torch.device("cpu"), 0, condition=condition)
                found.append(loader.make(5, micro_step)["condition"]["class_labels"])
        return torch.cat(found)

    whole = labels(400, 1, 1)
    assert torch.equal(labels(100, 4, 1), whole) and torch.equal(labels(100, 2, 2), whole)
    dropped = uniform_draws(3, 5, Purpose.CONDITION_DROPOUT, 400) < 0.25
    assert (whole[dropped] == 4).all() and 70 < dropped.sum() < 130
    assert 10 < (whole[~dropped] == 4).sum() < 40  # of unknown class


def test_mean_and_deviation_in_one_pass():
    rows = np.random.default_rng(0).normal([1e5, -2, 0], [0.1, 3, 0], (1000, 3)).astype(np.float32)
    mean, std = mean_and_std([rows[:1], rows[1:700], rows[700:]])
    assert mean == pytest.approx(rows.mean(0, dtype=np.float64), rel=1e-6)
    assert std == pytest.approx([*rows.std(0, dtype=np.float64)[:2], 1], rel=1e-4)


def test_statistics_are_taken_once(tmp_path):
    images = Labelled()
    images.fingerprint = "abc"
    mean, std = vector_statistics(images, SimpleNamespace(cache_dir=tmp_path))
    assert mean == pytest.approx([49.5, 5, -49.5]) and std[1] == 1
    images.column = None
    again = vector_statistics(images, SimpleNamespace(cache_dir=tmp_path))
    assert np.array_equal(again, [mean, std])


def test_shares_of_classes():
    counts = np.array(COUNTS)
    assert class_shares(counts, "none").tolist() == [60, 25, 9, 0]
    assert sorted(class_shares(counts, "inverse").tolist()) == [0, 31, 31, 32]
    root = class_shares(counts, "sqrt")
    assert root.sum() == 94 and root[0] / root[2] == pytest.approx((60 / 9) ** 0.5, rel=0.1)


@pytest.mark.parametrize("balance", ["none", "sqrt", "inverse"])
def test_every_epoch_has_its_share_of_each_class_and_every_image_its_turn(balance):
    order, size = ClassBalancedOrder(LABELS, 4, seed=5, balance=balance), len(LABELS)
    visits = order.indices(np.arange(9 * size))
    shares = np.append(class_shares(np.array(COUNTS), balance), UNKNOWN)
    for epoch in np.split(LABELS[visits], 9):
        assert np.bincount(np.where(epoch == -1, 4, epoch), minlength=5).tolist() == shares.tolist()
    times = np.bincount(visits, minlength=size)
    for label in (0, 1, 2, -1):
        assert np.ptp(times[label == LABELS]) <= 1
    if balance == "none":
        assert (times == 9).all()
    first, second = visits[:size], visits[size : 2 * size]
    assert not np.array_equal(first, second) and not np.array_equal(first, np.sort(first))
    jumbled = np.random.default_rng(0).permutation(9 * size)
    assert np.array_equal(order.indices(jumbled), visits[jumbled])  # a function of the position alone
    assert not np.array_equal(ClassBalancedOrder(LABELS, 4, 6, balance).indices(np.arange(size)), first)


def test_balance_that_cannot_be_is_refused():
    images = Labelled()
    assert balanced_order(images, SimpleNamespace(class_balance="none")) is None
    with pytest.raises(UserError, match="--shuffle_block_size 64"):
        balanced_order(images, SimpleNamespace(class_balance="sqrt", shuffle_block_size=64))
    images.label_names = None
    with pytest.raises(UserError, match="--class_balance sqrt needs images with classes"):
        balanced_order(images, SimpleNamespace(class_balance="sqrt", shuffle_block_size=0))


# Weights of a model of other conditions


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
