"""--condition text from start to end: encoders of several kinds, exact runs, a pipeline that carries its encoder."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from process_helpers import run_code, run_forked
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from training_helpers import losses, run_in_process, same_weights, tiny_run
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from trainkit.diffusion.text import TextCondition, load_text_encoder
from trainkit.errors import UserError
from trainkit.options.model import TextOptions

WEIGHTS = "diffusion_pytorch_model.safetensors"
WORDS = "[PAD] [UNK] [CLS] [SEP] a red green blue square of shade one two".split()
TINY_TEXT_UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 12,
}
PROMPT_SCRIPT = """
import sys, torch
from diffusers import DiffusionPipeline
assert "trainkit" not in sys.modules
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
make = lambda prompts, scale: pipeline(
    prompt=prompts, num_inference_steps=2, guidance_scale=scale, output_type="np",
    generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
).images
both = make(["a red square", "a blue square of shade one"], 2.0)
assert both.shape == (2, 16, 16, 3), both.shape
assert abs(both[:1] - make(["a red square"], 2.0)).max() < 1e-4
assert abs(both[:1] - make(["a green square"], 2.0)).max() > 1e-4, "the prompt matters"
try:
    make(["a " * 40], 1.0)
except ValueError as error:
    print(error)
"""


def tokenizer():
    """Words of `WORDS`, framed as BERT frames them."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, **special)


def save_encoder(folder, model):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tiny_bert(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=20, **sizes))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("bert"), tiny_bert())


@pytest.fixture(scope="module")
def text_unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_unet")
    (folder / "config.json").write_text(json.dumps(TINY_TEXT_UNET))
    return folder


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """24 squares of three colours, with two captions each."""
    folder = tmp_path_factory.mktemp("captioned")
    for number in range(24):
        colour = ("red", "green", "blue")[number % 3]
        pixels = np.zeros((16, 16, 3), dtype=np.uint8)
        pixels[..., number % 3] = 120 + number * 5
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        shade = ("one", "two")[number % 2]
        (folder / f"{number:02d}.txt").write_text(f"a {colour} square\na {colour} square of shade {shade}\n")
    return folder


def text_run(captioned, text_unet, cache_dir, output_dir, bert, **flags):
    flags = {"condition": "text", "text_encoder_name_or_path": bert, "max_train_steps": 6} | flags
    return tiny_run(captioned, text_unet, cache_dir, output_dir, **flags)


@pytest.fixture(scope="module")
def whole(captioned, text_unet, cache_dir, bert, tmp_path_factory):
    """Six steps of eight images on one process, with a checkpoint after the third."""
    folder, held_out = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "held_out"))
    held_out.mkdir()
    for number in range(4):
        shutil.copy(captioned / f"{number:02d}.png", held_out)
        shutil.copy(captioned / f"{number:02d}.txt", held_out)
    flags = {"validation_data_dir": held_out, "augmentation_conditioning": True}
    run_forked("train_conditional.py", *text_run(captioned, text_unet, cache_dir, folder, bert, **flags))
    return folder


@pytest.mark.parametrize("kind", ["bert", "clip", "t5"])
def test_encoders_of_several_kinds_are_loaded(kind, tmp_path):
    small = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokens = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    model = {
        "bert": tiny_bert,
        "clip": lambda: CLIPModel(
            CLIPConfig(
                text_config=small | tokens | {"max_position_embeddings": 10},
                vision_config=small | {"image_size": 8, "patch_size": 4},
            )
        ),
        "t5": lambda: T5EncoderModel(
            T5Config(vocab_size=len(WORDS), d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ),
    }[kind]()
    encoder = load_text_encoder(TextOptions(text_encoder_name_or_path=str(save_encoder(tmp_path, model))))
    assert encoder.width == 12 and encoder.max_tokens == (10 if kind == "clip" else 16)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    one, two = encoder.encode(["a red square", "blue"])
    assert one.shape == (5, 12) and two.shape == (3, 12)
    assert np.allclose(encoder.encode(["blue"])[0], two, atol=1e-5), "padding changes nothing"
    digest = encoder.digest()
    assert encoder.digest() == digest
    with torch.no_grad():
        next(encoder.model.parameters()).add_(1)
    assert encoder.digest() != digest, "other weights, another cache"


@pytest.mark.slow
def test_the_pipeline_loads_without_this_repository(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*"))
    done = run_code(PROMPT_SCRIPT, copy, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "42 tokens, the model accepts 16" in done.stdout
    assert {"text_encoder", "tokenizer", "conditional.py", "samples.png"} <= {path.name for path in copy.iterdir()}
    assert json.loads((copy / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_captions_that_training_cuts_are_cut_for_previews_too(bert):
    encoder = load_text_encoder(TextOptions(text_encoder_name_or_path=str(bert)))
    assert encoder.cut("a red square") == "a red square"
    assert encoder.cut("a " * 40 + "red") == "a " * 13 + "a"  # 16 tokens, two of which frame it
    encoder.max_tokens = 2
    assert encoder.cut("red red red") == ""

    condition = object.__new__(TextCondition)
    index = SimpleNamespace(first_of=lambda indices: indices, texts=lambda numbers: ["a blue square"] * len(numbers))
    condition.encoder, condition.encodings = encoder, SimpleNamespace(index=index)
    encoder.max_tokens = 4
    assert condition.pipeline_conditions(np.arange(2)) == ["a blue"] * 2 and condition.example() == "'a blue'"


@pytest.mark.slow
def test_it_is_trained_validated_and_checkpointed(whole):
    three, six = (load_file(whole / f"checkpoint-{step}" / "unet" / WEIGHTS) for step in (3, 6))
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert three[name].shape[1] == 12 and not torch.equal(three[name], six[name])
    assert any("validation_loss" in line for line in (whole / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow(12)
def test_two_sharded_processes_encode_for_themselves_and_go_on_as_one_would(
    whole, captioned, text_unet, bert, tmp_path
):
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", resumed)
    flags = {"train_batch_size": 4, "resume_from_checkpoint": "latest", "shard_weights": True}
    flags["augmentation_conditioning"] = True
    arguments = text_run(captioned, text_unet, tmp_path / "cache", resumed, bert, **flags)
    run_forked("train_conditional.py", *arguments, processes=2)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-4)
    same_weights(resumed / "unet" / WEIGHTS, whole / "unet" / WEIGHTS, tolerance=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"text_encoder_name_or_path": None}, "--condition text needs --text_encoder_name_or_path"),
        ({"text_encoder_name_or_path": "/nowhere"}, "--text_encoder_name_or_path /nowhere: the folder does not exist"),
        ({"caption_dropout": 1.5}, "--caption_dropout 1.5 must be 0 to 1"),
        ({"max_caption_tokens": 50}, "--max_caption_tokens 50 is more than the 16 that"),
        ({"condition": "class"}, "--text_encoder_name_or_path .* needs --condition text"),
    ],
)
def test_one_line_error(flags, message, captioned, text_unet, cache_dir, bert, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=message) as error:
        run_here(monkeypatch, text_run(captioned, text_unet, cache_dir, tmp_path, bert, **flags))
    assert "\n" not in str(error.value)


def test_a_unet_that_does_not_fit_is_refused(captioned, cache_dir, bert, tiny_unet, text_unet, tmp_path, monkeypatch):
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text(json.dumps(TINY_TEXT_UNET | {"cross_attention_dim": 32}))
    message = "wide has cross_attention_dim 32, but --text_encoder_name_or_path gives 12 numbers per token"
    with pytest.raises(UserError, match=message):
        run_here(monkeypatch, text_run(captioned, tmp_path / "wide", cache_dir, tmp_path / "out", bert))
    with pytest.raises(UserError, match="describes a UNet2DModel; --condition text needs a UNet2DConditionModel"):
        run_here(monkeypatch, text_run(captioned, tiny_unet, cache_dir, tmp_path / "out", bert))
    flags = {"condition": "class", "text_encoder_name_or_path": None}
    with pytest.raises(UserError, match="describes a UNet2DConditionModel; without --condition text it must be"):
        run_here(monkeypatch, text_run(captioned, text_unet, cache_dir, tmp_path / "out", bert, **flags))


def run_here(monkeypatch, arguments):

    run_in_process(monkeypatch, "train_conditional", arguments)


@pytest.mark.slow
def test_a_dry_run_encodes_few_captions(captioned, text_unet, bert, tmp_path, monkeypatch, capsys):
    arguments = text_run(captioned, text_unet, tmp_path / "cache", tmp_path / "out", bert, dry_run=True)
    run_in_process(monkeypatch, "train_conditional", arguments)
    printed = capsys.readouterr().out
    assert "--dry_run: all checks passed" in printed and "UNet2DConditionModel of " in printed
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache" / "prepared").exists()
