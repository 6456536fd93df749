"""Rooms of the network: its shape, what it learns, what it is conditioned on."""

from dataclasses import dataclass

from trainkit.options.fields import option


@dataclass
class ModelOptions:
    """model: the UNet2DModel"""

    model_config_name_or_path: str | None = option(
        None,
        "folder or Hub id whose config.json describes the UNet; default: diffusers' 113.7 M example at 3 channels",
    )
    pretrained_model_name_or_path: str | None = option(
        None,
        "folder or Hub id of a saved pipeline to start from; its UNet may have other classes, channels and resolution",
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "use xFormers attention, where the xformers package is installed"
    )


@dataclass
class ObjectiveOptions:
    """objective: what the UNet learns to predict, over which noise schedule"""

    prediction_type: str | None = option(
        None, "what the UNet predicts: the noise, the image, the velocity, or that of flow matching; default: that of "
        "--pretrained_model_name_or_path, else sample",
        choices=("epsilon", "sample", "v_prediction", "flow_prediction"),
    )  # fmt: skip
    loss_weighting: str | None = option(
        None, "weight of each noise level's error; default: min_snr with --snr_gamma, else soft_min_snr where "
        "sample is predicted by default (edm with --rescale_betas_zero_snr), else none",
        choices=("none", "min_snr", "soft_min_snr", "edm"),
    )  # fmt: skip
    snr_gamma: float | None = option(
        None,
        "gamma of --loss_weighting min_snr (Hang et al. 2023) and soft_min_snr; default: 5 where they are named",
        within="(0, inf)",
    )
    timestep_sampling: str = option(
        "uniform", "which noise levels are trained on how often",
        choices=("uniform", "logit_normal", "edm_lognormal"),
    )  # fmt: skip
    logit_mean: float = option(
        0.0, "logit_normal: mean of ln(t / (1 - t)), where t goes from 0 (image) to 1 (noise)", within="(-inf, inf)"
    )
    logit_std: float = option(1.0, "logit_normal: standard deviation of ln(t / (1 - t))", within="(0, inf)")
    edm_p_mean: float = option(
        -1.2, "edm_lognormal: mean of ln(sigma), the noise level relative to the image", within="(-inf, inf)"
    )
    edm_p_std: float = option(1.2, "edm_lognormal: standard deviation of ln(sigma)", within="(0, inf)")
    ddpm_num_steps: int = option(1000, "timesteps of the training noise schedule", within="[1, inf)")
    ddpm_beta_schedule: str | None = option(
        None, "noise schedule; default: pretrained, which is that of --pretrained_model_name_or_path, else "
        "squaredcos_cap_v2",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "pretrained"),
    )  # fmt: skip
    noise_shift: float = option(
        1.0, "noise over image at each timestep times this: the image's side / 64, for example", within="(0, inf)"
    )
    rescale_betas_zero_snr: bool = option(False, "end the noise schedule in pure noise (Lin et al. 2023)")
    ddpm_num_inference_steps: int = option(
        20,
        "solver steps for sample grids while training and for the saved pipeline's score (the example: 1000)",
        within="[1, inf)",
    )


@dataclass
class TextOptions:
    """captions: with --condition text"""

    text_encoder_name_or_path: str | None = option(
        None, "folder or Hub id of the frozen text encoder: CLIP, T5, BERT or their like, or a saved pipeline's folder"
    )
    max_caption_tokens: int | None = option(
        None,
        "tokens at which captions are cut, start and end among them; default: the most that the encoder takes",
        within="[2, inf)",
    )
    caption_dropout: float | None = option(
        None,
        "chance that an image is trained on without its caption; default: --conditioning_dropout",
        within="[0, 1]",
    )


@dataclass
class LatentOptions:
    """latents: train on what an image autoencoder makes of the images, for large ones"""

    vae_name_or_path: str | None = option(
        None, "folder or Hub id of an AutoencoderKL, or of a pipeline that holds one; default: train on pixels"
    )
