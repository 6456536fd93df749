"""The flags that several scripts share, a dataclass for each room of `--help`.

Flags that diffusers' `train_unconditional.py` has keep its name and meaning. Steps are optimizer steps
everywhere.
"""

from dataclasses import dataclass

from trainkit.config import option

SECRET_OPTIONS = ("hub_token", "storage_options")  # never written down: not in checkpoints, not by trackers


@dataclass
class SourceOptions:
    """source: where the images come from"""

    train_data_dir: str | None = option(
        None,
        "folder of images (class folders become labels), .zip, .tar, .parquet or .h5 files, a URL of these, or a "
        "prepared dataset",
    )
    dataset_name: str | None = option(
        None, "Hub dataset, or a local folder `datasets` understands; wins over --train_data_dir"
    )
    dataset_config_name: str | None = option(None, "configuration of --dataset_name, where it has several")
    dataset_split: str = option("train", "split of --dataset_name to read")
    cache_dir: str | None = option(
        None, "folder for downloads and prepared datasets (default: $TRAINKIT_CACHE, else ~/.cache/trainkit)"
    )
    storage_options: str | None = option(
        None, "JSON with what a URL's store needs (key, secret, endpoint_url, anon, ...); default: its own settings"
    )
    vector_column: str = option(
        "vector", "column or key of vectors in metadata.jsonl, Parquet, HDF5, WebDataset .json and Hub datasets"
    )
    num_proc: int = option(0, "processes that decode images; 0 takes one for each core")


@dataclass
class ImageOptions:
    """images: what is made of them before training"""

    resolution: str | None = option(
        None, "side of the training images in pixels, or HxW; default: that of the prepared dataset, else 64"
    )
    stored_resolution: str | None = option(
        None, "side (or HxW) in pixels to store the images at, larger than --resolution; default: --resolution"
    )
    resize_mode: str | None = option(
        None, "how an image gets to that size: cut out its centre, cut anew at each visit (random_crop, the default), "
        "fit it inside with --background around, or stretch it", choices=("crop", "random_crop", "pad", "stretch"),
    )  # fmt: skip
    center_crop: bool = option(
        False, "--resize_mode crop: crop the centre once, when the data is prepared, in the place of random_crop"
    )
    image_mode: str = option("RGB", "colour mode the images are converted to", choices=("RGB", "L", "RGBA"))
    background: str = option(
        "white",
        "colour behind transparent pixels in RGB and L, and around padded images (name or #rrggbb)",
    )
    preserve_input_precision: bool = option(
        False, "keep 16 bits a channel where the source has more than 8, instead of reducing it to 8"
    )
    storage: str = option(
        "pixels", "how they lie on disk: pixels load the fastest, png is as exact, jpeg and webp are the smallest",
        choices=("pixels", "png", "jpeg", "webp"),
    )  # fmt: skip
    storage_quality: int = option(95, "quality of --storage jpeg and webp, 1 to 100; webp is lossless at 100")
    min_size: int = option(0, "reject images whose shorter side has fewer pixels")
    max_aspect_ratio: float = option(0.0, "reject images whose longer side is over this times the shorter; 0: none")
    animated: str = option(
        "first", "of images of several frames or pages: take the first, or reject them", choices=("first", "reject")
    )
    max_image_pixels: int = option(
        89_478_485, "reject images of more pixels (width x height), before room is made for them; 0: none"
    )


@dataclass
class LoadingOptions:
    """loading: how batches come from the prepared dataset"""

    dataloader_num_workers: int = option(1, "threads that gather batches and draw noise ahead; 0: none ahead")
    shuffle_block_size: int = option(
        0,
        "images to a block: shuffles blocks, then within 16 of them, for data beyond memory on slow disks; 0: all",
    )
    streaming: bool = option(
        False, "read a prepared dataset at a URL block by block, in the place of a copy in --cache_dir"
    )


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

    prediction_type: str = option(
        "v_prediction", "what the UNet predicts: the noise, the image, the velocity, or that of flow matching",
        choices=("epsilon", "sample", "v_prediction", "flow_prediction"),
    )  # fmt: skip
    loss_weighting: str | None = option(
        None, "weight of each noise level's error; default: min_snr with --snr_gamma, else none",
        choices=("none", "min_snr", "soft_min_snr", "edm"),
    )  # fmt: skip
    snr_gamma: float | None = option(
        None, "gamma of --loss_weighting min_snr (Hang et al. 2023) and soft_min_snr; default: 5 where they are named"
    )
    timestep_sampling: str = option(
        "uniform", "which noise levels are trained on how often",
        choices=("uniform", "logit_normal", "edm_lognormal"),
    )  # fmt: skip
    logit_mean: float = option(0.0, "logit_normal: mean of ln(t / (1 - t)), t from 0 (image) to 1 (noise)")
    logit_std: float = option(1.0, "logit_normal: standard deviation of that")
    edm_p_mean: float = option(-1.2, "edm_lognormal: mean of ln(noise / image), in standard deviations of the noise")
    edm_p_std: float = option(1.2, "edm_lognormal: standard deviation of that")
    ddpm_num_steps: int = option(1000, "steps of the training noise schedule")
    ddpm_beta_schedule: str | None = option(
        None, "noise schedule; default: that of --pretrained_model_name_or_path, else squaredcos_cap_v2",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    )  # fmt: skip
    noise_shift: float = option(
        1.0, "noise over image at each timestep times this: the image's side / 64, for example"
    )
    rescale_betas_zero_snr: bool = option(False, "end the noise schedule in pure noise (Lin et al. 2023)")
    ddpm_num_inference_steps: int = option(
        20, "solver steps for sample grids while training and for the saved pipeline's score (the example: 1000)"
    )


@dataclass
class AugmentationOptions:
    """augmentation: on the device, drawn anew for every visit"""

    random_flip: bool = option(False, "mirror each image left-right with probability 1/2")
    random_rotation: float = option(0.0, "turn by up to so many degrees either way, at most 180")
    random_translation: float = option(0.0, "shift by up to this part of width and height, at most 1")
    random_scale: float = option(
        0.0, "zoom by a factor of 1 / (1 + X) to 1 + X, at most 4: 1 is half to twice the size"
    )
    random_resized_crop: list[float] | None = option(
        None, "cut out a part and resize it: its smallest and largest area, as parts of the stored image's", nargs="+"
    )
    random_resized_crop_aspect: list[float] = option(
        [0.75, 1.3333], "least and greatest width to height of that part, relative to the image's own", nargs="+"
    )
    random_brightness: float = option(0.0, "lighten or darken by up to this part of the range from black to white")
    random_contrast: float = option(0.0, "multiply the distance from mid-grey by 1 - X to 1 + X, at most 1")
    random_saturation: float = option(0.0, "multiply the distance from grey by 1 - X to 1 + X, at most 1")
    random_hue: float = option(0.0, "turn the colour circle by up to so many degrees either way, at most 180")
    augmentation_probability: float = option(
        1.0, "chance that an image gets each kind of augmentation (but --random_flip)"
    )
    augmentation_conditioning: bool = option(
        False, "tell the UNet in training what was done to each image, so that samples do not show it (non-leaking)"
    )


@dataclass
class OptimizationOptions:
    """optimization: how long, with what step"""

    num_epochs: int = option(100, "passes over the data; --max_train_steps wins")
    max_train_steps: int | None = option(None, "optimizer steps in all; default: from --num_epochs")
    max_train_images: int | None = option(None, "images in all, in the place of --max_train_steps: for any batch size")
    train_batch_size: int = option(16, "images a device and micro-step; the global batch is logged")
    gradient_accumulation_steps: int = option(1, "micro-steps to one optimizer step")
    learning_rate: float = option(2e-3, "peak learning rate, after warm-up")
    find_learning_rate: bool = option(False, "train nothing: try rates for 120 steps, suggest one, draw the curve")
    lr_scheduler: str = option(
        "cosine", "learning-rate schedule over optimizer steps",
        choices=(
            "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "step",
            "warmup_stable_decay",
        ),
    )  # fmt: skip
    lr_warmup_steps: int = option(100, "optimizer steps over which the rate rises from 0")
    lr_step_size: int = option(10000, "with --lr_scheduler step: optimizer steps between two drops")
    lr_step_gamma: float = option(0.1, "with --lr_scheduler step: factor of each drop")
    lr_num_cycles: int = option(1, "with --lr_scheduler cosine_with_restarts: cosines after warm-up")
    lr_power: float = option(1.0, "with --lr_scheduler polynomial: power of what is left of the steps")
    lr_decay_steps: int | None = option(
        None, "with --lr_scheduler warmup_stable_decay: optimizer steps of the decay at the end; default: a fifth"
    )
    optimizer: str = option(
        "muon", "optimizer; muon learns sooner than adamw, at the same learning rates or larger",
        choices=(
            "adamw", "adam", "muon", "lion", "lamb", "adafactor", "prodigy", "schedule_free_adamw", "adamw_8bit",
        ),
    )  # fmt: skip
    adam_beta1: float = option(0.95, "decay of the gradient's running mean")
    adam_beta2: float = option(0.999, "decay of the squared gradient's running mean")
    adam_weight_decay: float = option(1e-6, "weight decay, of weight matrices: norms and biases have none")
    adam_epsilon: float = option(1e-8, "added to the root of the running mean of squares")
    max_grad_norm: float = option(1.0, "clip the gradient's global L2 norm to this; 0 does not clip")
    max_skipped_steps: int = option(
        10, "steps in a row whose gradient is not finite (each is skipped) that end the run"
    )


@dataclass
class EmaOptions:
    """EMA: an average of the weights, which is what gets sampled and saved"""

    use_ema: bool = option(True, "keep an exponential moving average of the weights")
    ema_inv_gamma: float = option(1.0, "inverse gamma of the warm-up 1 - (1 + step / inv_gamma) ** -power")
    ema_power: float = option(0.75, "power of that warm-up")
    ema_max_decay: float = option(0.9999, "decay once warmed up, per optimizer step")
    ema_half_life_images: int | None = option(
        None, "images after which a weight counts half; in the place of --ema_max_decay, for any batch size"
    )
    ema_power_lengths: list[float] | None = option(
        None, "also track power-function averages of these sigma_rel (Karras et al. 2024), such as 0.05 0.1", nargs="+"
    )
    ema_snapshot_steps: int | None = option(None, "optimizer steps between their snapshots (also at the end)")


@dataclass
class HardwareOptions:
    """hardware: precision, memory, seeds"""

    mixed_precision: str | None = option(
        None, "autocast of the forward pass; default: what `accelerate launch` says, else no",
        choices=("no", "fp16", "bf16"),
    )  # fmt: skip
    find_batch_size: bool = option(
        False, "use the largest micro-batch that fits, at the global batch that the flags give; accumulation follows"
    )
    compile: bool = option(False, "compile the UNet (torch.compile): minutes at the start, faster steps on GPUs")
    compile_mode: str = option(
        "default", "how: reduce-overhead uses CUDA graphs, max-autotune also tries out kernels",
        choices=("default", "reduce-overhead", "max-autotune"),
    )  # fmt: skip
    channels_last: str = option(
        "auto", "layout of images and weights in memory; auto: yes on CUDA", choices=("auto", "yes", "no")
    )
    allow_tf32: bool = option(True, "TensorFloat-32 for what is computed in float32, on GPUs that have it")
    gradient_checkpointing: bool = option(
        False, "compute activations a second time in the backward pass: less memory, about a third slower"
    )
    shard_weights: bool = option(
        False, "divide weights, averages and optimizer state over the processes (FSDP2): for models too large for one"
    )
    reshard_after_forward: bool = option(
        True, "with --shard_weights: free gathered weights after the forward pass (ZeRO-3), or keep them (ZeRO-2)"
    )
    deterministic: bool = option(False, "only algorithms that give the same bits every time; slower on GPUs")
    replica_check_steps: int = option(0, "optimizer steps between comparisons of all ranks' weights; 0: never")
    seed: int = option(0, "seed of weights, order, noise, timesteps and augmentation: same seed, same run")
    cpu_threads: int = option(0, "threads a process computes with on a CPU; 0: the cores shared by its processes")
    local_rank: int = option(-1, "rank on this machine, for launchers that pass it as a flag")


@dataclass
class CheckpointOptions:
    """checkpoints: exact training state, so that no work is lost"""

    output_dir: str = option("ddpm-model-64", "folder for checkpoints, grids and the saved pipeline")
    overwrite_output_dir: bool = option(False, "start again in a folder that holds checkpoints: deletes them")
    checkpointing_steps: int = option(500, "optimizer steps between checkpoints; 0: only when stopped by a signal")
    checkpoints_total_limit: int | None = option(None, "newest checkpoints to keep; default: all")
    async_checkpointing: bool = option(
        True, "write checkpoints in the background: training waits for the copy to the CPU alone"
    )
    resume_from_checkpoint: str | None = option(
        None, "checkpoint folder, or `latest`: the newest whole one in --output_dir (none there: start)"
    )
    save_model_epochs: int = option(10, "epochs between savings of the pipeline (also at the end)")


@dataclass
class LoggingOptions:
    """logging: what to watch"""

    save_images_epochs: int = option(10, "epochs between sample grids (also at the end)")
    preview_steps: int | None = option(None, "optimizer steps between sample grids; wins over --save_images_epochs")
    eval_batch_size: int = option(16, "images in a sample grid, over all processes")
    logger: str = option("tensorboard", "experiment tracker", choices=("tensorboard", "wandb", "trackio", "none"))
    logging_dir: str = option("logs", "the tracker's folder inside --output_dir")
    logging_steps: int = option(10, "optimizer steps between log lines; the device is read only then")


@dataclass
class ValidationOptions:
    """validation: how it does on images it never sees, and how good its samples are"""

    validation_data_dir: str | None = option(
        None, "folder of held-out images, or a prepared dataset of them: other images than the ones trained on"
    )
    validation_steps: int | None = option(
        None, "optimizer steps between held-out losses (also at the end); default: only at the end"
    )
    validation_images: int = option(256, "held-out images to take the loss of, at most: the first in a fixed order")
    score_steps: int | None = option(
        None, "optimizer steps between scores (KID) of samples (also at the end); default: no scores"
    )
    score_images: int = option(200, "samples to a score")


@dataclass
class TextOptions:
    """captions: with --condition text"""

    text_encoder_name_or_path: str | None = option(
        None, "folder or Hub id of the frozen text encoder: CLIP, T5, BERT or their like, or a saved pipeline's folder"
    )
    max_caption_tokens: int | None = option(
        None, "tokens at which captions are cut, start and end among them; default: the most that the encoder takes"
    )
    caption_dropout: float | None = option(
        None, "chance that an image is trained on without its caption; default: --conditioning_dropout"
    )


@dataclass
class LatentOptions:
    """latents: train on what an image autoencoder makes of the images, for large ones"""

    vae_name_or_path: str | None = option(
        None, "folder or Hub id of an AutoencoderKL, or of a pipeline that holds one; default: train on pixels"
    )


@dataclass
class HubOptions:
    """Hub: share the saved pipeline (never the training state)"""

    push_to_hub: bool = option(False, "push the pipeline whenever it is saved")
    hub_token: str | None = option(None, "token to push with; default: the one `hf auth login` stored")
    hub_model_id: str | None = option(None, "repository to push to; default: the name of --output_dir")
    hub_private_repo: bool = option(False, "create the repository private")
