"""The UNet2DConditionModel for captions, and the checks of its config."""

import torch

from trainkit.errors import UserError
from trainkit.options.script import TrainingOptions

# For 32 to 64 pixels, or latents of that size: 40.9 M parameters with an encoder 384 wide. Cross-attention where it
# is cheap, at half and a quarter of the side. `attention_head_dim` is the number of heads in this class of diffusers.
TEXT_UNET = {
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
SHARED = (  # entries with the same meaning in the config of a UNet2DModel
    "center_input_sample", "freq_shift", "flip_sin_to_cos", "block_out_channels", "layers_per_block", "act_fn",
    "mid_block_scale_factor", "downsample_padding", "norm_num_groups", "norm_eps", "resnet_time_scale_shift",
    "dropout",
)  # fmt: skip
HEADS = 8
ENCODER_INPUTS = ("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type", "time_cond_proj_dim")


def takes_text(options: TrainingOptions) -> bool:
    """Whether the options ask for a UNet2DConditionModel."""
    return "text" in getattr(options, "condition", ())


def with_cross_attention(config: dict) -> dict:
    """The config of a UNet2DConditionModel that can load the weights of a UNet2DModel with this `config`.

    Blocks with self-attention are unchanged. Plain blocks get cross-attention, except at the full size. The middle
    gets it instead of its self-attention: diffusers has no middle block with both.
    """
    down, up, sizes = (config[name] for name in ("down_block_types", "up_block_types", "block_out_channels"))
    head_dim = config.get("attention_head_dim", HEADS)  # of self-attention; cross-attention gets as many heads
    free = [True] * len(down)
    if head_dim is None:  # one head as wide as its block; diffusers numbers both lists from the full size
        widths = [
            [size for kind, size in pairs if kind.startswith("Attn")]
            for pairs in zip(zip(down, sizes, strict=True), zip(up, reversed(sizes), strict=True), strict=True)
        ]
        free = [not found for found in widths]  # elsewhere cross-attention would have that many heads
        head_dim = [min(found, default=HEADS) for found in widths]
    crossed = {"DownBlock2D": "CrossAttnDownBlock2D", "UpBlock2D": "CrossAttnUpBlock2D"}
    down = [crossed.get(kind, kind) if level and free[level] else kind for level, kind in enumerate(down)]
    up = [crossed.get(kind, kind) if level and free[level] else kind for level, kind in enumerate(reversed(up))]
    return {name: config[name] for name in SHARED if name in config} | {
        "down_block_types": down,
        "up_block_types": up[::-1],
        "attention_head_dim": head_dim,
    }


def adapt_cross_attention(old: dict, state: dict) -> tuple[list[str], set[str]]:
    """Start cross-attention at zero in `state`, in place, where `old` has none or one of another width.

    Returns notes for the user and the names of the tensors concerned.
    """
    added = [name for name in state if name.endswith(".proj_out.weight") and name not in old]
    notes, done = [], set()
    for name in added:
        layer = name.removesuffix("proj_out.weight")
        for ending in ("weight", "bias"):  # the layer then adds nothing
            state[f"{layer}proj_out.{ending}"] = torch.zeros_like(state[f"{layer}proj_out.{ending}"])
        done |= {other for other in state if other.startswith(layer)}
    if added:
        notes.append(f"{len(added)} layers of cross-attention added at zero")
    other_width = [
        name
        for name in state
        if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))
        and name in old
        and old[name].shape != state[name].shape
    ]
    for name in other_width:
        if name.endswith(".to_v.weight"):
            state[name] = torch.zeros_like(state[name])
    if other_width:
        widths = [weights[other_width[0]].shape[1] for weights in (old, state)]
        notes.append(f"text {widths[0]} -> {widths[1]} numbers per token: its readers start at zero")
    return notes, done | set(other_width)


def check_unet_class(config: dict, where: str, with_text: bool) -> None:
    """Raise `UserError` unless the class of the config (named by `where` in messages) fits `with_text`."""
    class_name = config.get("_class_name")
    wanted = "UNet2DConditionModel" if with_text else "UNet2DModel"
    if class_name in ("UNet2DConditionModel", "UNet2DModel") and class_name != wanted:
        usage = "--condition text needs" if with_text else "without --condition text it must be"
        raise UserError(f"{where} describes a {class_name}; {usage} a {wanted}")


def check_text_config(config: dict, where: str, width: int) -> None:
    """Raise `UserError` unless the config (named by `where`) accepts hidden states of `width` numbers directly."""
    found = config.get("cross_attention_dim", width)
    if found != width:
        raise UserError(
            f"{where} has cross_attention_dim {found}, but --text_encoder_name_or_path gives {width} numbers per "
            "token: change one of the two"
        )
    given = next((name for name in ENCODER_INPUTS if config.get(name) is not None), None)
    if given is not None:
        raise UserError(
            f"{where} has {given} {config[given]}, an input that these scripts do not train: set it to null"
        )
