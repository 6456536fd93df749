"""The UNet2DConditionModel that captions are trained with, and what its config must agree with."""

from trainkit.errors import UserError

# For 32 to 64 pixels, or latents of that size: 40.9 M parameters with an encoder 384 wide. Cross-attention where it
# is cheap, at a half and a quarter of the side. What diffusers calls `attention_head_dim` is here the number of heads.
TEXT_UNET = {
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 8,
}
ENCODER_INPUTS = ("encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type", "time_cond_proj_dim")


def takes_text(options) -> bool:
    """Whether the UNet is a UNet2DConditionModel."""
    return getattr(options, "condition", None) == "text"


def check_unet_class(config: dict, where: str, with_text: bool) -> None:
    """Refuse a config (of what `where` says) whose class takes text where there is none, or the other way round."""
    class_name = config.get("_class_name")
    wanted = "UNet2DConditionModel" if with_text else "UNet2DModel"
    if class_name in ("UNet2DConditionModel", "UNet2DModel") and class_name != wanted:
        told = "--condition text takes" if with_text else "without --condition text it takes"
        raise UserError(f"{where} describes a {class_name}; {told} a {wanted}")


def check_text_config(config: dict, where: str, width: int) -> None:
    """Refuse a config (of what `where` says) that does not take hidden states of `width` numbers as they are."""
    found = config.get("cross_attention_dim", width)
    if found != width:
        raise UserError(
            f"{where} has cross_attention_dim {found}, but --text_encoder_name_or_path gives {width} numbers a token: "
            "change one of the two"
        )
    given = next((name for name in ENCODER_INPUTS if config.get(name) is not None), None)
    if given is not None:
        raise UserError(f"{where} has {given} {config[given]}, an input that is not trained here: set it to null")
