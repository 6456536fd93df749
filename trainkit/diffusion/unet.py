"""The UNet that is trained: diffusers' example by default, or the one a config.json describes."""

import contextlib
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel

from trainkit.data.cache import is_prepared
from trainkit.data.settings import parse_resolution
from trainkit.diffusion.text_unet import (
    TEXT_UNET,
    check_text_config,
    check_unet_class,
    takes_text,
    with_cross_attention,
)
from trainkit.errors import UserError, one_line
from trainkit.options.script import TrainingOptions

# The UNet of diffusers' train_unconditional.py: 113.7 M parameters at 3 channels.
EXAMPLE_UNET = {
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (
        "DownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D",
    ),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
}  # fmt: skip


def build_unet(
    options: TrainingOptions, height: int, width: int, channels: int, **condition
) -> UNet2DModel | UNet2DConditionModel:
    """A freshly initialised UNet for images of this size, from `--model_config_name_or_path` or the example's.

    `condition` are the config's entries for a condition; by default the UNet has none. A pretrained pipeline gives its
    config; its number of channels may differ. Raises `UserError` if the config cannot be read or does not fit the
    images.
    """
    model_class, config = _final_config(options, height, width, channels, condition)
    unet = _from_config(model_class, config, options)
    if options.enable_xformers_memory_efficient_attention:
        try:
            unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, NotImplementedError) as error:
            raise UserError(f"--enable_xformers_memory_efficient_attention: {error}; leave the flag out") from None
    return unet


def _final_config(
    options: TrainingOptions, height: int, width: int, channels: int, condition: dict
) -> tuple[type[ModelMixin], dict]:
    """The class of the UNet and its config for images of this size. Raises `UserError` if it does not fit them."""
    check_channels(options, channels)
    name, config = options.model_config_name_or_path, _config(options)
    config |= {"sample_size": height if height == width else (height, width)}
    config |= {"in_channels": channels, "out_channels": channels}
    config |= {"class_embed_type": None, "num_class_embeds": None}
    if takes_text(options):
        # a pretrained model may have been trained with another encoder
        given = config if name is not None else {**config, "cross_attention_dim": condition["cross_attention_dim"]}
        check_text_config(given, _where(options), condition["cross_attention_dim"])
    check_resolution(height, width, len(config["block_out_channels"]) - 1)
    return UNet2DConditionModel if takes_text(options) else UNet2DModel, config | condition


def _from_config(
    model_class: type[ModelMixin], config: dict, options: TrainingOptions
) -> UNet2DModel | UNet2DConditionModel:
    try:
        return model_class.from_config(config)
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(
            f"{_where(options)} is not a working {model_class.__name__} config: {one_line(error)}"
        ) from None


def check_unet_options(options: TrainingOptions) -> None:
    """Refuse a config that cannot be read or built, or a `--resolution` that does not fit it, before preparation."""
    times = unet_halvings(options)
    if options.resolution is not None and not _takes_latents(options):
        check_resolution(*parse_resolution(options.resolution), times)
    if options.model_config_name_or_path is None or takes_text(options):
        return
    config = _config(options)
    mode = options.image_mode or (None if is_prepared(options) else "RGB")  # as raw images will be prepared
    if mode is not None and not _takes_latents(options):
        check_channels(options, len(mode))
    with torch.device("meta"):
        _from_config(UNet2DModel, config, options)


def check_channels(options: TrainingOptions, channels: int) -> None:
    """Raise `UserError` if `--model_config_name_or_path` is for images or latents of other `channels`."""
    name, config = options.model_config_name_or_path, _config(options)
    # with a second image the input has more channels, whatever the config says
    for key in ("out_channels",) if "image" in getattr(options, "condition", ()) else ("in_channels", "out_channels"):
        if name is not None and config.get(key, 3) != channels:
            what = "latents of --vae_name_or_path" if _takes_latents(options) else "images"
            mode = "" if _takes_latents(options) else f" (--image_mode {options.image_mode or 'RGB'})"
            fix = (
                "add --image_mode L, or choose another UNet"
                if mode and config.get(key, 3) == 1
                else "change one of the two"
            )
            raise UserError(
                f"--model_config_name_or_path {name} has {key} {config.get(key, 3)}, but the {what}{mode} have "
                f"{channels} channels: {fix}"
            )


def unet_halvings(options: TrainingOptions) -> int:
    """How often the UNet of the options halves its input. Raises `UserError` if its config cannot be read."""
    return len(_config(options)["block_out_channels"]) - 1


def _takes_latents(options: TrainingOptions) -> bool:
    return options.vae_name_or_path is not None


def _config(options: TrainingOptions) -> dict:
    if options.model_config_name_or_path is not None:
        config = load_unet_config(options.model_config_name_or_path)
    elif options.pretrained_model_name_or_path is not None:
        config = load_unet_config(options.pretrained_model_name_or_path, "--pretrained_model_name_or_path")
        if takes_text(options) and config.get("_class_name", "UNet2DModel") == "UNet2DModel":
            return with_cross_attention(config)
    else:
        return dict(TEXT_UNET if takes_text(options) else EXAMPLE_UNET)
    check_unet_class(config, _where(options), takes_text(options))
    return config


def _where(options: TrainingOptions) -> str:
    """The flag that gives the UNet's config, with its value."""
    if options.model_config_name_or_path is not None:
        return f"--model_config_name_or_path {options.model_config_name_or_path}"
    return f"--pretrained_model_name_or_path {options.pretrained_model_name_or_path}"


def load_unet_config(name_or_path: str, flag: str = "--model_config_name_or_path") -> dict:
    """The UNet2DModel config of a folder or Hub repository: its own config.json, or that of its `unet` subfolder."""
    return find_unet(name_or_path, flag)[0]


def find_unet(name_or_path: str, flag: str) -> tuple[dict, str | None]:
    """The config of a UNet in a folder or Hub repository, and its subfolder (None: the top of the folder).

    Raises `UserError` that names `flag`.
    """
    is_folder = Path(name_or_path).is_dir()
    if name_or_path.startswith((".", "/", "~")) and not is_folder:  # not a Hub id
        raise UserError(f"{flag} {name_or_path}: no config.json to read: the folder does not exist")
    if is_folder:
        subfolders = ["unet" if (Path(name_or_path) / "unet" / "config.json").is_file() else None]
    else:
        subfolders = ["unet", None]  # older repositories have it at the top
    for subfolder in subfolders:
        try:
            config = UNet2DModel.load_config(name_or_path, subfolder=subfolder)
            break
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split()).partition(". ")[0]
    else:
        raise UserError(
            f"{flag} {name_or_path}: no config.json to read ({reason}); give the folder of a saved pipeline, a folder "
            "with the config.json of a UNet, or a Hub id"
        )
    if "block_out_channels" not in config:
        raise UserError(f"{flag} {name_or_path}: config.json describes no UNet2DModel")
    return dict(config), subfolder


def load_any_variant(model_class: type[ModelMixin], *where, **how) -> ModelMixin:
    """`model_class.from_pretrained(*where, **how)`, of the fp16 or bf16 variant of the weights if there is no other.

    In float32. Raises what `from_pretrained` raises.
    """
    try:
        return model_class.from_pretrained(*where, **how).float()
    except (OSError, ValueError) as error:
        for variant in ("fp16", "bf16", "non_ema"):
            with contextlib.suppress(OSError, ValueError):
                return model_class.from_pretrained(*where, variant=variant, **how).float()
        raise error


def check_resolution(height: int, width: int, halvings: int) -> None:
    """Raise `UserError` for an image size that the UNet cannot halve `halvings` times."""
    factor = 2**halvings
    if height % factor or width % factor:
        size = str(height) if height == width else f"{height}x{width}"
        nearest = "x".join(str(max(factor, round(side / factor) * factor)) for side in dict.fromkeys((height, width)))
        raise UserError(
            f"--resolution {size} must be divisible by {factor} (the UNet halves it {halvings} times): use {nearest}, "
            f"or a smaller UNet through --model_config_name_or_path"
        )
