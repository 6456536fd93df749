"""The conditions of images (class, vector, caption or another image), as keyword arguments of the model.

    condition = open_condition(options, images)            # training images
    unet = build_unet(options, ..., **condition.unet_config)
    condition.inputs(batch.indices, draws)                  # {"class_labels": ...}, some of them dropped

A dropped condition becomes the null condition: the model also learns to generate without a condition, which
classifier-free guidance needs (Ho & Salimans 2022). All kinds have the members of `ClassCondition`.

B batch, K classes, D numbers of a vector.
"""

import numpy as np
import torch
from diffusers import UNet2DModel

from pipelines.vector_embedding import VectorEmbedding
from trainkit.data.account import Account, Kind
from trainkit.data.files import cache_root
from trainkit.data.format import NO_LABEL
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import DropoutDraws, Purpose, sample_indices
from trainkit.diffusion.combined import CombinedCondition
from trainkit.diffusion.image_condition import (
    PictureCondition,
    check_image_options,
    image_dropout,
    open_picture_condition,
)
from trainkit.diffusion.text import TextCondition, check_text_options, load_text_encoder
from trainkit.errors import UserError
from trainkit.options.script import ConditionalTrainingOptions

PREVIEW_CLASSES, DEFAULT_PREVIEW_SCALE = 10, 2.0
WRITTEN_NUMBERS = 16  # of an example vector, at most


def caption_dropout(options: ConditionalTrainingOptions) -> float:
    """The probability of training an image without its caption."""
    return options.conditioning_dropout if options.caption_dropout is None else options.caption_dropout


def vector_dropout(options: ConditionalTrainingOptions) -> float:
    """The probability of training an image without its vector."""
    return options.conditioning_dropout if options.vector_dropout is None else options.vector_dropout


def preview_scale(options: ConditionalTrainingOptions) -> float:
    """The guidance scale of previews. An image says so much about the result that guidance would only overdo it."""
    if options.preview_guidance_scale is not None:
        return options.preview_guidance_scale
    return 1.0 if options.condition == ["image"] else DEFAULT_PREVIEW_SCALE


def check_condition(options: ConditionalTrainingOptions) -> None:
    """Raise `UserError` for conditioning and caption options that contradict each other."""
    kinds = options.condition
    first = kinds[:-1] if kinds[-1] == "image" else kinds
    if len(kinds) > 1 and first not in (["class"], ["vector"], ["class", "vector"], ["text"]):
        raise UserError(
            f"--condition {' '.join(kinds)}: give class, vector, class vector or text, alone or with image after it, "
            "or image alone"
        )
    if options.vector_dropout is not None and "vector" not in kinds:
        raise UserError(f"--vector_dropout {options.vector_dropout:g} needs --condition vector, or class vector")
    check_text_options(options)
    check_image_options(options)
    probabilities = {
        "class": options.conditioning_dropout, "vector": vector_dropout(options), "text": caption_dropout(options),
        "image": image_dropout(options),
    }  # fmt: skip
    dropout, scale = min(probabilities[kind] for kind in kinds), preview_scale(options)
    if not 0 <= dropout <= 1:
        raise UserError(f"--conditioning_dropout {dropout} must be 0 to 1: the fraction of images without condition")
    if scale < 1:
        raise UserError(f"--preview_guidance_scale {scale} must be at least 1 (no guidance)")
    if scale > 1 and dropout == 0:
        raise UserError(
            f"--preview_guidance_scale {scale} guides away from a null condition, which --conditioning_dropout 0 does "
            "not train: give --preview_guidance_scale 1, or some dropout"
        )


def open_condition(
    options: ConditionalTrainingOptions, images: PreparedImages
) -> "ClassCondition | VectorCondition | TextCondition | PictureCondition | CombinedCondition":
    """The condition of the training `images`, or all of them, that `--condition` names.

    Captions are encoded here, by all processes of the run together.

    Raises:
        UserError: the images do not have this condition.
    """
    parts = [_open_one(options, images, kind) for kind in options.condition]
    return parts[0] if len(parts) == 1 else CombinedCondition(parts)


def _open_one(
    options: ConditionalTrainingOptions, images: PreparedImages, kind: str
) -> "ClassCondition | VectorCondition | TextCondition | PictureCondition":
    given = f"--condition {kind}: {options.train_data_dir or options.dataset_name}"
    if kind == "image":
        return open_picture_condition(options, images)
    if kind == "text":
        encoder = load_text_encoder(options)
        return TextCondition(images, encoder, cache_root(options.cache_dir), given, caption_dropout(options))
    if kind == "vector":
        if not images.vector_length:
            raise UserError(
                f"{given} has no vectors; give each image one: NAME.npy beside it, or a --vector_column of numbers in "
                "its metadata, and prepare it again"
            )
        return VectorCondition(images, vector_dropout(options), vector_purpose(options.condition))
    if images.label_names is None:
        account = Account.from_json(images.preparation.get("account", {}))
        reason = "".join(f" ({why})" for why in account.examples.get(Kind.NO_CLASSES, [])[:1])
        raise UserError(
            f"{given} has no classes{reason}; give it one folder per class, or a `label` column in its metadata"
        )
    if len(images.label_names) < 2:
        raise UserError(f"{given} has only one class ({images.label_names[0]}): use train_unconditional.py")
    if not any((labels != NO_LABEL).any() for labels in images.column("label")):
        raise UserError(f"{given} gives no image a class: use train_unconditional.py")
    return ClassCondition(images, images.label_names, options.conditioning_dropout)


def vector_purpose(kinds: list[str]) -> Purpose:
    """The purpose of the draws that drop vectors: beside a class they have their own."""
    return Purpose.VECTOR_DROPOUT if "class" in kinds else Purpose.CONDITION_DROPOUT


class ClassCondition:
    """The classes of `images`, numbered by `names` (K,). K is the null class, also used for images without a class.

    `images` may number their classes differently; names decide. Raises `UserError` for a class not in `names`.
    """

    argument, picture = "class_labels", None  # argument of the pipeline; there is no second image

    def __init__(self, images: PreparedImages, names: list[str], dropout: float = 0.0):
        self.images, self.names, self.dropout = images, names, dropout
        self.null = len(names)
        unknown = sorted(set(images.label_names or ()) - set(names))
        if unknown or images.label_names is None:
            problem = f"has the class {unknown[0]}, which is not trained on" if unknown else "has no classes"
            raise UserError(f"--validation_data_dir {problem}: give it the class folders of the training images")
        self._numbers = np.array([names.index(name) for name in images.label_names] + [self.null])

    @property
    def components(self) -> dict:
        """Arguments of the saved pipeline for this condition."""
        return {"id2label": dict(enumerate(self.names))}

    @property
    def unet_config(self) -> dict:
        """Entries of the UNet's config for this condition."""
        return {"num_class_embeds": len(self.names) + 1}

    def for_images(self, images: PreparedImages) -> "ClassCondition":
        """The same condition for other (held-out) `images`."""
        return ClassCondition(images, self.names)

    def inputs(self, indices: np.ndarray, draws: DropoutDraws | None = None) -> dict[str, torch.Tensor]:
        """`class_labels` (B,) int64 of the images `indices` (B,); null where `draws` are below the dropout."""
        labels = self._numbers[self.images.labels(indices)]  # no class is -1: the last
        if draws is not None:
            labels = np.where(draws(Purpose.CONDITION_DROPOUT) < self.dropout, self.null, labels)
        return {"class_labels": torch.from_numpy(labels)}

    def example(self) -> str:
        """A condition written as an argument of the pipeline, for the model card."""
        return repr(self.names[0])

    def pipeline_conditions(self, indices: np.ndarray) -> list[int | None]:
        """The pipeline arguments that request images like those of `indices`."""
        return [None if label == self.null else label for label in self.inputs(indices)["class_labels"].tolist()]

    def preview_conditions(self, count: int, seed: int) -> tuple[list[int], int]:
        """About `count` conditions for a grid, and its columns: one row per class, at most `PREVIEW_CLASSES`."""
        rows = min(len(self.names), PREVIEW_CLASSES)
        columns = -(-count // rows)
        return np.repeat(np.arange(rows), columns).tolist(), columns


class VectorCondition:
    """The stored vectors of `images`. A row of NaN is the null condition, which the UNet's embedding handles.

    `purpose` is that of the draws of its dropout: a vector beside a class needs its own.
    """

    argument, names, picture = "vectors", None, None  # argument of the pipeline; no classes, no second image
    components: dict = {}

    def __init__(self, images: PreparedImages, dropout: float = 0.0, purpose: Purpose = Purpose.CONDITION_DROPOUT):
        self.images, self.dropout, self.length, self.purpose = images, dropout, images.vector_length, purpose

    @property
    def unet_config(self) -> dict:
        """Entries of the UNet's config for this condition; its `class_embedding` is replaced by one for vectors."""
        return {"class_embed_type": "identity"}

    def for_images(self, images: PreparedImages) -> "VectorCondition":
        """The same condition for other (held-out) `images`. Raises `UserError` if the vector length differs."""
        if images.vector_length != self.length:
            raise UserError(
                f"--validation_data_dir has vectors of {images.vector_length or 0} numbers, the training images of "
                f"{self.length}: prepare both the same way"
            )
        return VectorCondition(images)

    def inputs(self, indices: np.ndarray, draws: DropoutDraws | None = None) -> dict[str, torch.Tensor]:
        """`class_labels` (B, D) float32 of the images `indices` (B,); NaN where `draws` are below the dropout."""
        vectors = self.images.vectors(indices)
        if draws is not None:
            vectors[draws(self.purpose) < self.dropout] = np.nan
        return {"class_labels": torch.from_numpy(vectors)}

    def example(self) -> str:
        """A condition written as an argument of the pipeline, for the model card."""
        vector = self.images.vectors(np.zeros(1, dtype=np.int64))[0]
        if len(vector) > WRITTEN_NUMBERS:
            return f"[0.0] * {len(vector)}"
        return repr([float(f"{number:.4g}") for number in vector])

    def pipeline_conditions(self, indices: np.ndarray) -> np.ndarray:
        """The pipeline arguments that request images like those of `indices`."""
        return self.images.vectors(indices)

    def preview_conditions(self, count: int, seed: int) -> tuple[np.ndarray, None]:
        """The vectors of `count` images chosen by `seed`, for a grid with any number of columns."""
        count = min(count, len(self.images))
        return self.pipeline_conditions(sample_indices(np.arange(count), len(self.images), seed)), None


def add_vector_embedding(unet: UNet2DModel, mean: np.ndarray, std: np.ndarray) -> None:
    """Replace the class embedding of `unet` by an embedding of vectors with these statistics (D,), in place.

    The UNet must have class_embed_type "identity". If it has num_class_embeds too, the embedding is that of classes
    and vectors. It is trained, averaged and checkpointed like every other weight.
    """
    embedding = VectorEmbedding(
        vector_length=len(mean),
        embedding_dim=unet.time_embedding.linear_2.out_features,
        num_class_embeds=unet.config.num_class_embeds,
    )  # as keywords: diffusers drops positional arguments from the saved config
    embedding.set_statistics(torch.from_numpy(mean), torch.from_numpy(std))
    unet.class_embedding = embedding


ImageCondition = ClassCondition | VectorCondition | TextCondition | PictureCondition | CombinedCondition
