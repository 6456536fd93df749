"""Options of the model: its architecture, its objective and its conditions."""

from dataclasses import dataclass

from trainkit.options.fields import option

DERIVED_KINDS = ("downscale:FACTOR", "grayscale", "mask", "edges")  # of --condition_from


@dataclass
class ModelOptions:
    """model: the UNet to train"""

    model_config_name_or_path: str | None = option(
        None,
        "folder or Hub id with the config.json of the UNet; default: the 113.7 M UNet of the diffusers example",
    )
    pretrained_model_name_or_path: str | None = option(
        None,
        "folder or Hub id of a saved pipeline to start from; its classes, channels and resolution may differ",
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "use xFormers attention; needs the xformers package"
    )


@dataclass
class ObjectiveOptions:
    """objective: what the UNet predicts, and over which noise schedule"""

    prediction_type: str | None = option(
        None,
        "what the UNet predicts: noise, image, velocity, or flow-matching velocity; default: that of the "
        "pretrained model, else sample",
        choices=("epsilon", "sample", "v_prediction", "flow_prediction"),
    )  # fmt: skip
    loss_weighting: str | None = option(
        None,
        "weight of each noise level; default: min_snr with --snr_gamma, soft_min_snr for the default "
        "prediction (edm with --rescale_betas_zero_snr), else none",
        choices=("none", "min_snr", "soft_min_snr", "edm"),
    )  # fmt: skip
    snr_gamma: float | None = option(
        None,
        "gamma of --loss_weighting min_snr (Hang et al. 2023) and soft_min_snr; default: 5",
        within="(0, inf)",
    )
    timestep_sampling: str = option(
        "uniform", "distribution of the noise levels in training",
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
        None, "noise schedule; default: that of the pretrained model, else squaredcos_cap_v2",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "pretrained"),
    )  # fmt: skip
    noise_shift: float = option(
        1.0, "factor on the noise level of each timestep, for example side / 64", within="(0, inf)"
    )
    rescale_betas_zero_snr: bool = option(False, "end the noise schedule in pure noise (Lin et al. 2023)")
    ddpm_num_inference_steps: int = option(
        20,
        "solver steps for sample grids and scores during training (the diffusers example: 1000)",
        within="[1, inf)",
    )


@dataclass
class ConditioningOptions:
    """conditioning: what the model is conditioned on"""

    condition: list[str] = option(
        ["class"],
        "class: the class of an image; vector: its stored numbers; text: its captions; image: another image; class "
        "vector: both; image also after each of the others",
        choices=("class", "vector", "text", "image"), nargs="+",
    )  # fmt: skip
    conditioning_dropout: float = option(
        0.1,
        "probability that an image is trained without its condition, for guidance (Ho & Salimans 2022)",
        within="[0, 1]",
    )
    vector_dropout: float | None = option(
        None,
        "probability that an image is trained without its vector; default: --conditioning_dropout",
        within="[0, 1]",
    )
    class_balance: str = option(
        "none", "frequency of each class: proportional to its images, to the square root of that, or equal",
        choices=("none", "sqrt", "inverse"),
    )  # fmt: skip
    preview_guidance_scale: float | None = option(
        None,
        "guidance scale of the sample grids during training; default: 2, or 1 (no guidance) for --condition image",
        within="[1, inf)",
    )


@dataclass
class ImageConditionOptions:
    """image conditions: for --condition image"""

    image_dropout: float | None = option(
        None,
        "probability that an image is trained without its second image; default: --conditioning_dropout",
        within="[0, 1]",
    )
    condition_from: str | None = option(
        None,
        "make the second image from the image itself: downscale:4 (super-resolution by 4), grayscale (colouring), "
        "mask (inpainting of random boxes and strokes) or edges; default: the data has a conditioning image for each",
    )
    conditioning_noise: float | None = option(
        None,
        "with downscale: maximum standard deviation of the noise in the small image, whose pixels are -1 to 1; drawn "
        "for each visit, and an input of the model; default: 0.2",
        within="[0, 2]",
    )
    validation_conditioning_data_dir: str | None = option(
        None, "folder of the conditioning images of --validation_data_dir, as --conditioning_data_dir"
    )


@dataclass
class TextOptions:
    """captions: for --condition text"""

    text_encoder_name_or_path: str | None = option(
        None, "folder or Hub id of the frozen text encoder (CLIP, T5, BERT, ...), or of a pipeline that has one"
    )
    max_caption_tokens: int | None = option(
        None,
        "maximum number of tokens per caption, including start and end; default: the limit of the encoder",
        within="[2, inf)",
    )
    caption_dropout: float | None = option(
        None,
        "probability that an image is trained without its caption; default: --conditioning_dropout",
        within="[0, 1]",
    )


@dataclass
class LatentOptions:
    """latents: train in the latent space of an image autoencoder"""

    vae_name_or_path: str | None = option(
        None, "folder or Hub id of an AutoencoderKL, or of a pipeline that has one; default: train on pixels"
    )
