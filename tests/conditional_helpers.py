"""Tiny models of each kind of condition."""

import torch
from conftest import TINY_UNET
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from transformers import BertConfig, BertModel, BertTokenizerFast

from pipelines.conditional import ConditionalPipeline
from pipelines.image_input import ImageInput
from pipelines.vector_embedding import VectorEmbedding

NAMES = {0: "cat", 1: "dog", 2: "7"}
UNET = {key: value for key, value in TINY_UNET.items() if not key.startswith("_")} | {"sample_size": 16}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "square", "circle"]


def class_unet(seed=0, **changes):
    torch.manual_seed(seed)
    return UNet2DModel(**UNET | {"num_class_embeds": 4} | changes).eval()


def class_pipeline(**parts):
    pipeline = ConditionalPipeline(class_unet(), DDIMScheduler(), id2label=NAMES, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def vector_unet(num_class_embeds=None):
    """As training has it: the embedding, perhaps also of classes, sits in the UNet."""
    unet = class_unet(num_class_embeds=num_class_embeds, class_embed_type="identity")
    width = unet.time_embedding.linear_2.out_features
    unet.class_embedding = VectorEmbedding(3, width, num_class_embeds=num_class_embeds)
    torch.nn.init.normal_(unet.class_embedding.output.weight)
    torch.nn.init.normal_(unet.class_embedding.null_embedding)
    unet.class_embedding.set_statistics(torch.ones(3), torch.tensor([2.0, 1.0, 0.0]))
    return unet


def vector_pipeline(num_class_embeds=None):
    unet = vector_unet(num_class_embeds)
    embedding, unet.class_embedding = unet.class_embedding, torch.nn.Identity()
    names = None if num_class_embeds is None else NAMES
    pipeline = ConditionalPipeline(unet, DDIMScheduler(), vector_embedding=embedding, id2label=names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_pipeline(kind, factor=1, noise=0.0, channels=3, picture_channels=None, classes=None, **changes):
    settings = {"factor": factor, "noise": noise, "picture_channels": picture_channels, "classes": classes}
    image_input = ImageInput(kind=kind, channels=channels, **settings)
    sizes = {"num_class_embeds": None, "out_channels": channels, "in_channels": channels + image_input.num_channels}
    pipeline = ConditionalPipeline(class_unet(**sizes | changes), DDIMScheduler(), image_input=image_input)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_parts(folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 12}
    encoder = BertModel(BertConfig(vocab_size=len(WORDS), hidden_size=16, **sizes)).eval()
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(**UNET | blocks | {"cross_attention_dim": 16, "attention_head_dim": 2}).eval()
    return unet, {"text_encoder": encoder, "tokenizer": BertTokenizerFast(str(folder / "vocab.txt"))}
