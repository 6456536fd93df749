"""Embeds vectors for a UNet2DModel with class_embed_type "identity". This file is saved inside models."""

# B rows, D numbers of a vector, K classes, E width of the UNet's time embedding

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import is_accelerate_available
from torch import nn


class VectorEmbedding(ModelMixin, ConfigMixin):
    """Vectors (B, D) -> embeddings (B, E), normalized with statistics that are saved with the weights.

    A row of NaN is the null condition, which has a learned embedding. A new module returns zeros for all inputs, so
    that a UNet starts as if it had no condition.

    With `num_class_embeds` (K + 1, as in the UNet's config) a row (1 + D,) is a class and then a vector, and the sum
    of both embeddings is returned. Either may be null: K or NaN is the null class. The table of classes starts as that
    of a UNet.
    """

    # The statistics stay float32 when loaded in another dtype; without accelerate diffusers keeps them by itself.
    _keep_in_fp32_modules = ["mean", "std"] if is_accelerate_available() else None
    _source = Path(__file__).read_text(encoding="utf-8")  # kept: diffusers overwrites its copy of a loaded file
    mean: torch.Tensor
    std: torch.Tensor

    @register_to_config
    def __init__(
        self,
        vector_length: int,
        embedding_dim: int,
        hidden_dim: int | None = None,
        num_class_embeds: int | None = None,
    ):
        super().__init__()
        hidden_dim = hidden_dim or embedding_dim
        self.register_buffer("mean", torch.zeros(vector_length, dtype=torch.float32))
        self.register_buffer("std", torch.ones(vector_length, dtype=torch.float32))
        self.null_embedding = nn.Parameter(torch.zeros(embedding_dim))
        self.linear_1 = nn.Linear(vector_length, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, embedding_dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if num_class_embeds is not None:  # the name of the table in a UNet of classes, whose weights fit here
            self.weight = nn.Parameter(torch.randn(num_class_embeds, embedding_dim))

    def set_statistics(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Store mean and standard deviation (D,) of the training vectors; constant components are not scaled."""
        self.mean.copy_(torch.as_tensor(mean))
        std = torch.as_tensor(std)
        self.std.copy_(torch.where(std > 0, std, torch.ones_like(std)))

    def _apply(self, fn, recurse: bool = True):
        """Implements `.to(...)`: the statistics stay float32, because half precision would merge similar vectors."""
        kept = self.mean, self.std
        super()._apply(fn, recurse)
        if not (kept[0].is_meta or self.mean.is_meta):
            self.mean, self.std = (numbers.to(self.mean.device) for numbers in kept)
        return self

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.config.num_class_embeds is None:
            return self._embed_vectors(rows)
        labels = torch.nan_to_num(rows[:, 0], nan=self.config.num_class_embeds - 1).long()
        return nn.functional.embedding(labels, self.weight) + self._embed_vectors(rows[:, 1:])

    def _embed_vectors(self, vectors: torch.Tensor) -> torch.Tensor:
        null = vectors.isnan().any(dim=1, keepdim=True)
        normal = (torch.nan_to_num(vectors.float()) - self.mean.float()) / self.std.float()
        hidden = nn.functional.silu(self.linear_1(normal.to(self.linear_1.weight.dtype)))
        hidden = nn.functional.silu(self.linear_2(hidden))
        embedding = self.output(hidden)
        return torch.where(null, self.null_embedding.to(embedding.dtype), embedding)

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Write config.json and a copy of this file."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / "vector_embedding.py").write_text(self._source, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
