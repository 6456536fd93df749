"""What a model is told of an image beside its pixels, as keyword arguments of the model.

    condition = open_condition(options, images)            # of the training images
    unet = build_unet(options, ..., **condition.unet_config)
    condition.inputs(batch.indices, uniforms)               # {"class_labels": ...}, some of them dropped

A condition that is dropped is the null one: the model learns the images of no condition in particular too, which
classifier-free guidance needs (Ho & Salimans 2022). Every kind has the members of `ClassCondition`.

B batch, K classes, D numbers of a vector.
"""

import numpy as np
import torch
from diffusers import UNet2DModel

from pipelines.vector_embedding import VectorEmbedding
from trainkit.data.files import cache_root
from trainkit.data.format import NO_LABEL
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.order import sample_indices
from trainkit.diffusion.text import TextCondition, check_text_options, load_text_encoder
from trainkit.errors import UserError

PREVIEW_CLASSES = 10


def check_condition(options) -> None:
    """Refuse what `ConditioningOptions` and `TextOptions` cannot mean, before anything is prepared."""
    check_text_options(options)
    dropout, scale = options.conditioning_dropout, options.preview_guidance_scale
    if not 0 <= dropout <= 1:
        raise UserError(f"--conditioning_dropout {dropout} must be 0 to 1: the part of images without condition")
    if scale < 1:
        raise UserError(f"--preview_guidance_scale {scale} must be at least 1 (no guidance)")
    if scale > 1 and dropout == 0:
        raise UserError(
            f"--preview_guidance_scale {scale} guides away from a null condition, which --conditioning_dropout 0 does "
            "not train: give --preview_guidance_scale 1, or some dropout"
        )


def open_condition(options, images: PreparedImages) -> "ClassCondition | VectorCondition | TextCondition":
    """What `--condition` says of the training `images`. Raises `UserError` where they do not have it.

    Captions are encoded here, by all processes of the run together.
    """
    dropout = options.conditioning_dropout
    given = f"--condition {options.condition}: {options.train_data_dir or options.dataset_name}"
    if options.condition == "text":
        return TextCondition(images, load_text_encoder(options), cache_root(options.cache_dir), given, dropout)
    if options.condition == "vector":
        if not images.vector_length:
            raise UserError(
                f"{given} has no vectors; give each image one: NAME.npy beside it, or a --vector_column of numbers in "
                "its metadata, and prepare it again"
            )
        return VectorCondition(images, dropout)
    if images.label_names is None:
        raise UserError(
            f"{given} has no classes; give it a folder a class, or a `label` column in its metadata, and prepare it "
            "again"
        )
    if len(images.label_names) < 2:
        raise UserError(f"{given} has one class alone ({images.label_names[0]}): train_unconditional.py is for that")
    if not any((labels != NO_LABEL).any() for labels in images.column("label")):
        raise UserError(f"{given} tells the class of none of its images: train_unconditional.py is for that")
    return ClassCondition(images, images.label_names, dropout)


class ClassCondition:
    """The classes of `images`, as the numbers of `names` (K,); K is the null class, and that of unknown ones.

    `images` may number their classes otherwise: names count. Raises `UserError` for a name that is not among `names`.
    """

    argument = "class_labels"  # of the pipeline

    def __init__(self, images: PreparedImages, names: list[str], dropout: float = 0.0):
        self.images, self.names, self.dropout = images, names, dropout
        self.null = len(names)
        unknown = sorted(set(images.label_names or ()) - set(names))
        if unknown or images.label_names is None:
            told = f"has the class {unknown[0]}, which is not trained on" if unknown else "has no classes"
            raise UserError(f"--validation_data_dir {told}: give it the class folders of the training images")
        self._numbers = np.array([names.index(name) for name in images.label_names] + [self.null])

    @property
    def components(self) -> dict:
        """Arguments of the saved pipeline for this condition."""
        return {"id2label": dict(enumerate(self.names))}

    @property
    def unet_config(self) -> dict:
        """What the UNet's config says of it."""
        return {"num_class_embeds": len(self.names) + 1}

    def for_images(self, images: PreparedImages) -> "ClassCondition":
        """The same of other `images`, held-out ones."""
        return ClassCondition(images, self.names)

    def inputs(self, indices: np.ndarray, uniforms: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """`class_labels` (B,) int64 of the images `indices` (B,); null where `uniforms` (B,) are below the dropout."""
        labels = self._numbers[self.images.labels(indices)]  # an unknown one is -1: the last
        if uniforms is not None:
            labels = np.where(uniforms < self.dropout, self.null, labels)
        return {"class_labels": torch.from_numpy(labels)}

    def example(self) -> str:
        """A condition as one would write it for the pipeline."""
        return repr(self.names[0])

    def of_images(self, indices: np.ndarray) -> list[int | None]:
        """What the pipeline is to be asked for, for images like those of `indices`."""
        return [None if label == self.null else label for label in self.inputs(indices)["class_labels"].tolist()]

    def to_preview(self, count: int, seed: int) -> tuple[list[int], int]:
        """About `count` conditions for a grid, and its columns: a row a class, for the first `PREVIEW_CLASSES`."""
        rows = min(len(self.names), PREVIEW_CLASSES)
        columns = -(-count // rows)
        return np.repeat(np.arange(rows), columns).tolist(), columns


class VectorCondition:
    """The vectors of `images` as they are stored; a row of NaN is the null one, which the UNet's embedding knows."""

    argument, names = "vectors", None  # of the pipeline; it has no classes
    components: dict = {}

    def __init__(self, images: PreparedImages, dropout: float = 0.0):
        self.images, self.dropout, self.length = images, dropout, images.vector_length

    @property
    def unet_config(self) -> dict:
        """What the UNet's config says of it: its `class_embedding` is replaced by one of vectors."""
        return {"class_embed_type": "identity"}

    def for_images(self, images: PreparedImages) -> "VectorCondition":
        """The same of other `images`, held-out ones. Raises `UserError` where their vectors are of another length."""
        if images.vector_length != self.length:
            raise UserError(
                f"--validation_data_dir has vectors of {images.vector_length or 0} numbers, the training images of "
                f"{self.length}: prepare both alike"
            )
        return VectorCondition(images)

    def inputs(self, indices: np.ndarray, uniforms: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """`class_labels` (B, D) float32 of the images `indices` (B,); NaN where `uniforms` are below the dropout."""
        vectors = self.images.vectors(indices)
        if uniforms is not None:
            vectors[uniforms < self.dropout] = np.nan
        return {"class_labels": torch.from_numpy(vectors)}

    def example(self) -> str:
        """A condition as one would write it for the pipeline."""
        return f"[numbers]  # {self.length} of them"

    def of_images(self, indices: np.ndarray) -> np.ndarray:
        """What the pipeline is to be asked for, for images like those of `indices`."""
        return self.images.vectors(indices)

    def to_preview(self, count: int, seed: int) -> tuple[np.ndarray, None]:
        """The vectors of `count` images, always the same ones, for a grid of any columns."""
        count = min(count, len(self.images))
        return self.of_images(sample_indices(np.arange(count), len(self.images), seed)), None


def add_vector_embedding(unet: UNet2DModel, mean: np.ndarray, std: np.ndarray) -> None:
    """Put into `unet` (of class_embed_type "identity") an embedding of vectors with these statistics (D,), in place.

    It lies where the UNet embeds classes, so that it is trained, averaged and checkpointed as every other weight is.
    """
    embedding = VectorEmbedding(
        vector_length=len(mean), embedding_dim=unet.time_embedding.linear_2.out_features
    )  # named: diffusers takes what is not for a default, which its `from_config` leaves out
    embedding.set_statistics(torch.from_numpy(mean), torch.from_numpy(std))
    unet.class_embedding = embedding


ImageCondition = ClassCondition | VectorCondition | TextCondition
