"""Training on pairs from raw folders to the saved pipeline: resumed, divided, with classes, and what is refused."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from pair_helpers import CLASSES, label_map, write_pairs
from PIL import Image
from process_helpers import run_forked
from safetensors.torch import load_file
from training_helpers import (
    assert_resumes_bit_equal,
    assert_trained_on_images,
    losses,
    run_in_process,
    same_weights,
    tiny_run,
)

from trainkit.errors import UserError

UNET = "unet/diffusion_pytorch_model.safetensors"
STEPS = 4
PAIRS = {"condition": "image", "conditioning_dropout": 0.3, "max_train_steps": STEPS, "checkpointing_steps": 2}
SHORT = {"checkpointing_steps": 0, "save_images_epochs": 1000}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    images, maps = write_pairs(folder, 16)
    write_pairs(folder / "held-out", 4)
    return {"train_data_dir": images, "conditioning_data_dir": maps}


@pytest.fixture
def train(folders, tiny_unet, cache_dir, tmp_path, monkeypatch):
    """Run the script's main in this process with flags over those of the tiny run; returns the output folder."""

    def call(name="out", **flags):
        flags = PAIRS | folders | flags
        arguments = tiny_run(flags.pop("train_data_dir"), tiny_unet, cache_dir, tmp_path / name, **flags)
        run_in_process(monkeypatch, "train_conditional", arguments)
        return tmp_path / name

    return call


@pytest.mark.slow
def test_label_maps_from_training_to_the_saved_pipeline(train, folders, tmp_path, capsys):
    """And a run that was stopped half-way is the same run, bit for bit."""
    held_out = folders["train_data_dir"].parent / "held-out"
    flags = {
        "conditioning_classes": CLASSES, "validation_data_dir": held_out / "images",
        "validation_conditioning_data_dir": held_out / "maps", "random_rotation": 20, "random_hue": 20,
    }  # fmt: skip
    out = train(**flags)
    assert_trained_on_images(out, in_channels=3 + CLASSES, arguments="image=label_map")

    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(image=[Image.fromarray(label_map(1, 16, 20))], num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 16, 20, 3)
    with pytest.raises(ValueError, match="the id 4, the model has 0 to 3"):
        pipeline(image=np.full((16, 16), 4))

    assert_resumes_bit_equal(train, out, flags, tmp_path / "before")
    assert "2 of 4 steps done" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_and_micro_steps_are_the_same_run(train, folders, tiny_unet, cache_dir, tmp_path):
    flags = {"conditioning_classes": CLASSES, "train_batch_size": 2} | SHORT
    whole = train("whole", **flags, gradient_accumulation_steps=4)
    arguments = PAIRS | folders | flags | {"gradient_accumulation_steps": 2}
    arguments = tiny_run(arguments.pop("train_data_dir"), tiny_unet, cache_dir, tmp_path / "two", **arguments)
    run_forked("train_conditional.py", *arguments, processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), abs=1e-4)
    same_weights(tmp_path / "two" / UNET, whole / UNET, tolerance=1e-3)


@pytest.mark.slow
def test_the_pair_goes_into_the_loss_and_new_channels_start_at_zero(train, capsys):
    maps, pictures = train("maps", conditioning_classes=CLASSES, **SHORT), train("pictures", **SHORT)
    assert losses(maps) != losses(pictures)
    dropped = [
        losses(train(name, conditioning_dropout=1, **kind, **SHORT))
        for name, kind in (("rgb", {}), ("grey", {"conditioning_image_mode": "L"}))
    ]
    assert dropped[0] != losses(pictures)
    slow = {"pretrained_model_name_or_path": maps, "learning_rate": 1e-12} | SHORT
    more = train("more", conditioning_classes=CLASSES + 3, **slow)
    assert "image channels 7 -> 10, new ones zero" in capsys.readouterr().out
    old, new = (load_file(folder / UNET)["conv_in.weight"] for folder in (maps, more))
    torch.testing.assert_close(new[:, :7], old, atol=1e-6, rtol=0)
    assert new[:, 7:].abs().max() < 1e-6


@pytest.mark.slow
def test_classes_and_pairs_together(train):
    out = train(condition=["class", "image"], **SHORT)
    config = UNet2DModel.load_config(out / "unet")
    assert (config["in_channels"], config["out_channels"], config["num_class_embeds"]) == (6, 3, 3)
    assert "image=picture, class_labels='a'" in (out / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    for arguments in ({"class_labels": "b", "image": Image.new("RGB", (16, 16))}, {"class_labels": ["a"]}):
        assert pipeline(**arguments, num_inference_steps=2, guidance_scale=2.0, output_type="np").images.shape[0] == 1


@pytest.fixture(scope="module")
def prepared(folders, tmp_path_factory):
    """Prepared datasets: without pairs, with pictures, with label maps."""
    import prepare_dataset
    from trainkit.data.preparation.prepare import prepare
    from trainkit.data.settings import settings_from_options
    from trainkit.data.sources.opening import open_source

    output = tmp_path_factory.mktemp("prepared")
    pictures = {"conditioning_data_dir": str(folders["conditioning_data_dir"])}
    for name, flags in (("plain", {}), ("pictures", pictures), ("maps", pictures | {"conditioning_classes": CLASSES})):
        given = str(folders["train_data_dir"])
        options = prepare_dataset.Options(train_data_dir=given, resolution="16", num_proc=1, **flags)
        prepare(open_source(options), settings_from_options(options), output / name, 1, False)
    return output


@pytest.mark.slow
def test_a_prepared_dataset_of_pairs_is_all_that_training_needs(train, prepared, monkeypatch, capsys):
    from trainkit.training import outputs

    monkeypatch.setattr(outputs.Outputs, "write_final", lambda self: None)
    raw = train("raw", conditioning_classes=CLASSES, **SHORT)
    ready = {"conditioning_data_dir": None, "resolution": None} | SHORT
    assert losses(train("ready", train_data_dir=prepared / "maps", **ready)) == losses(raw)
    capsys.readouterr()
    train("classes", train_data_dir=prepared / "maps", **ready, condition="class")
    assert "has label maps of 4 classes as conditioning images, which are not used" in capsys.readouterr().out


MISTAKES = [
    (
        None,
        {"conditioning_data_dir": None},
        "--condition image needs --condition_from: downscale:FACTOR, .*; or co",
    ),
    (None, {"condition": "class"}, "--conditioning_data_dir .*maps needs --condition image"),
    (
        None,
        {"condition_from": "edges"},
        "--conditioning_data_dir .*maps is for .* and --condition_from edges makes",
    ),
    (
        None,
        {"conditioning_noise": 0.1},
        "--conditioning_noise 0.1 is noise in a small image: it needs --condition_f",
    ),
    (None, {"conditioning_classes": 2}, "--conditioning_classes 2: .*.png: .*: it holds the id [23]"),
    (None, {"conditioning_classes": 1}, "--conditioning_classes 1 must be 2 to 256"),
    (
        None,
        {"conditioning_data_dir": None, "conditioning_classes": 4},
        "--condition image needs --condition_from: .*; or conditioning images, of which .* has none",
    ),
    (
        None,
        {"validation_conditioning_data_dir": "x"},
        "--validation_conditioning_data_dir x needs --validation_data",
    ),
    (
        None,
        {"validation_data_dir": "held-out/images"},
        "of which --validation_data_dir .* has none: --validation_con",
    ),
    ("plain", {}, "--conditioning_data_dir .* is prepared already, without conditioning images: prepare the raw"),
    (
        "maps",
        {},
        "--conditioning_data_dir .* is prepared already, with its conditioning images: leave the flag out",
    ),
    ("plain", {"conditioning_data_dir": None}, "--condition image needs --condition_from: .*plain has none"),
    (
        "maps",
        {"conditioning_data_dir": None, "condition_from": "edges"},
        "--condition_from edges, but .*maps has conditioning images",
    ),
    (
        "maps",
        {"conditioning_data_dir": None, "conditioning_classes": 5},
        "--conditioning_classes 5, but .*maps holds label maps of 4 classes",
    ),
    (
        "pictures",
        {"conditioning_data_dir": None, "conditioning_classes": 4},
        "--conditioning_classes 4, but .*pictures holds RGB pictures",
    ),
    (
        "pictures",
        {"conditioning_data_dir": None, "conditioning_image_mode": "L"},
        "--conditioning_image_mode L, but .*pictures holds RGB pictures",
    ),
]


@pytest.mark.parametrize(("data", "flags", "message"), MISTAKES)
def test_one_line_error(train, folders, prepared, monkeypatch, data, flags, message):
    monkeypatch.chdir(folders["train_data_dir"].parent)
    if data is not None:
        flags = {"train_data_dir": prepared / data, "resolution": None} | flags
    with pytest.raises(UserError, match=message) as error:
        train(**flags)
    assert "\n" not in str(error.value)
