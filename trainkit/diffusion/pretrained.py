"""Start from the weights of a saved pipeline, which may have other conditions and image channels.

Added weights are initialized so that the first prediction equals that of the old model: new channels at zero, new
classes as its null class, the projection of vectors and cross-attention at zero.

K classes, D width of the time embedding.
"""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

from trainkit.diffusion.text_unet import adapt_cross_attention
from trainkit.diffusion.unet import find_unet, load_any_variant
from trainkit.errors import UserError, one_line

UNET_CLASSES = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel}
FLAG = "--pretrained_model_name_or_path"
TABLE, NULL_VECTOR = "class_embedding.weight", "class_embedding.null_embedding"
MEAN, SHIFT = "class_embedding.mean", "time_embedding.linear_2.bias"
CHANNELS = ("conv_in.weight", "conv_out.weight", "conv_out.bias")
EMBEDDING, WEIGHTS = "vector_embedding", "diffusion_pytorch_model.safetensors"


def load_pretrained(unet: torch.nn.Module, name: str, class_names: list[str] | None = None) -> str:
    """Load the weights of the pipeline `name` (a folder or Hub id) that fit into `unet`; return a one-line summary.

    `class_names` (K,) are the classes of `unet` without the null class. Raises `UserError` if nothing fits, or if the
    vectors have another length.
    """
    config, subfolder = find_unet(name, FLAG)
    try:
        model_class = UNET_CLASSES[config.get("_class_name", "UNet2DModel")]
        old = load_any_variant(model_class, name, subfolder=subfolder).state_dict()
        if config.get("class_embed_type") == "identity":
            old |= {f"class_embedding.{key}": value for key, value in _embedding_weights(name).items()}
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{FLAG} {name}: its UNet cannot be loaded: {one_line(error)}") from None
    new = unet.state_dict()
    _check_vectors(old, new, name)
    fitting, notes = _unchanged(old, new), []
    if SHIFT not in fitting:  # its width decides about all others
        raise UserError(
            f"{FLAG} {name}: its weights do not fit this UNet; leave --model_config_name_or_path out to use its own"
        )
    state = new | fitting
    notes += _adapt_channels(old, state)
    notes += _adapt_condition(old, state, _class_names(name), class_names)
    cross_attention_notes, adapted = adapt_cross_attention(old, state)
    notes += cross_attention_notes
    done = {*fitting, *adapted, *(key for key in CHANNELS if key in old), TABLE}
    left = sorted(key for key in old.keys() | new.keys() if key not in done and not key.startswith("class_embedding."))
    if left:
        notes.append(f"not loaded: {', '.join(left[:8])}{f' and {len(left) - 8} more' if len(left) > 8 else ''}")
    unet.load_state_dict(state)
    return "; ".join([f"started from {name}: {len(fitting)} of {len(new)} tensors unchanged", *notes])


def _unchanged(old: dict, new: dict) -> dict:
    return {key: old[key] for key in new if key != TABLE and key in old and old[key].shape == new[key].shape}


def _adapt_channels(old: dict, state: dict) -> list[str]:
    """Copy the channels that both have; set the others to zero."""
    changed = [key for key in CHANNELS if key in old and old[key].shape != state[key].shape]
    width = "conv_norm_out.weight"  # the UNet's width at both ends
    if not changed or old[width].shape != state[width].shape:
        return []
    for key in changed:
        both = tuple(slice(min(sizes)) for sizes in zip(old[key].shape, state[key].shape, strict=True))
        state[key] = torch.zeros_like(state[key])
        state[key][both] = old[key][both]
    counts = [weights["conv_in.weight"].shape[1] for weights in (old, state)]
    return [f"image channels {counts[0]} -> {counts[1]}" + (", new ones zero" if counts[1] > counts[0] else "")]


def _adapt_condition(old: dict, state: dict, old_names: list[str] | None, names: list[str] | None) -> list[str]:
    """Where the conditions differ, the new model starts from the null condition of the old one."""
    had_table, has_table, null_vector = old.get(TABLE), state.get(TABLE), old.get(NULL_VECTOR)
    has_vectors = NULL_VECTOR in state
    notes = []
    if has_table is not None and had_table is not None:
        rows, known = _rows(had_table, len(has_table), old_names, names)
        state[TABLE] = had_table[rows]
        notes.append(f"{known} of {len(has_table) - 1} classes unchanged, the others start as its null class")
    elif has_table is not None:
        state[TABLE] = torch.zeros_like(has_table)
        notes.append(f"{len(has_table) - 1} classes added at zero")
    if has_vectors and null_vector is None:
        notes.append("vectors added at zero")
    dropped = [had_table[-1]] if had_table is not None and has_table is None else []
    if null_vector is not None and not has_vectors:
        dropped.append(null_vector)
    for embedding in dropped:
        state[SHIFT] = state[SHIFT] + embedding
    if dropped:
        notes.append("its null condition is kept in the time embedding")
    return notes


def _rows(table: torch.Tensor, wanted: int, old_names: list[str] | None, names: list[str] | None) -> tuple[list, int]:
    """The row of the old `table` (K + 1, D) for each of `wanted` rows, and how many are not the null row."""
    null = len(table) - 1
    if old_names is None or names is None:
        same = wanted == len(table)
        return (list(range(wanted)) if same else [null] * wanted), null if same else 0
    numbers = {name: number for number, name in enumerate(old_names)}
    rows = [numbers.get(name, null) for name in names]
    return [*rows, null], sum(row != null for row in rows)


def _check_vectors(old: dict, new: dict, name: str) -> None:
    lengths = [len(weights[MEAN]) for weights in (old, new) if MEAN in weights]
    if len(set(lengths)) > 1:
        raise UserError(
            f"{FLAG} {name} was trained with vectors of {lengths[0]} numbers, the training data has {lengths[1]}: "
            "give the images vectors of that length, or use another pipeline"
        )


def _embedding_weights(name: str) -> dict[str, torch.Tensor]:
    """The weights of the component that embeds vectors; none of its code is run."""
    if Path(name).is_dir():
        return load_file(Path(name) / EMBEDDING / WEIGHTS)
    return load_file(hf_hub_download(name, f"{EMBEDDING}/{WEIGHTS}"))


def pipeline_index(name: str) -> dict:
    """model_index.json of the pipeline `name` (a folder or Hub id); empty if there is none."""
    try:
        return DiffusionPipeline.load_config(name)
    except (OSError, ValueError):
        return {}


def _class_names(name: str) -> list[str] | None:
    """The class names of a pipeline in order of their numbers; None if it has none."""
    id2label = pipeline_index(name).get("id2label")
    return [id2label[key] for key in sorted(id2label, key=int)] if id2label else None
