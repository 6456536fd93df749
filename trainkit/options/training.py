"""Options of a run: optimization, averages, hardware, checkpoints, logs, validation, the Hub."""

from dataclasses import dataclass

from trainkit.options.fields import option
from trainkit.options.terminal import TerminalOptions

SECRET_OPTIONS = ("hub_token", "storage_options")  # never written down: not in checkpoints, not by trackers
TOKEN_HELP = (
    "token with write access; better: the variable HF_TOKEN, since `ps` shows flags; default: that of HF_TOKEN or "
    "`hf auth login`"
)


def mixed_precision_option() -> str | None:
    return option(
        None, "autocast of the forward pass; auto: bf16 where the device has it in hardware, else no; default: that "
        "of `accelerate launch`, else no",
        choices=("auto", "no", "fp16", "bf16"),
    )  # fmt: skip


def cpu_threads_option() -> int:
    return option(
        0, "compute threads per process on a CPU; 0: OMP_NUM_THREADS, else the cores shared among the processes",
        within="[0, inf)",
    )  # fmt: skip


def compile_mode_option() -> str:
    return option(
        "default", "mode of torch.compile: reduce-overhead uses CUDA graphs, max-autotune also tries kernels",
        choices=("default", "reduce-overhead", "max-autotune"),
    )  # fmt: skip


def channels_last_option() -> str:
    return option("auto", "memory layout of images and weights; auto: yes on CUDA", choices=("auto", "yes", "no"))


@dataclass
class OptimizationOptions:
    """optimization: length of the run, optimizer and learning rate"""

    num_epochs: int = option(100, "passes over the data; --max_train_steps takes precedence", within="[1, inf)")
    max_train_steps: int | None = option(
        None, "optimizer steps in total; default: from --num_epochs", within="[1, inf)"
    )
    max_train_images: int | None = option(
        None, "images in total, instead of --max_train_steps: independent of the batch size", within="[1, inf)"
    )
    train_batch_size: int = option(
        16, "images per device and micro-step; the global batch size is logged", within="[1, inf)"
    )
    gradient_accumulation_steps: int = option(1, "micro-steps per optimizer step", within="[1, inf)")
    learning_rate: float = option(
        None,
        "peak learning rate, after warm-up; default: 2e-3, or 5e-4 with distill.py --method consistency",
        within="[0, inf)",
    )
    find_learning_rate: bool = option(
        False, "train nothing: try learning rates for 120 steps, suggest one and plot the curve"
    )
    dry_run: bool = option(
        False,
        "train nothing and write nothing into --output_dir: check everything, time a few steps in a temporary folder, "
        "and print the plan with time, memory and disk room",
    )
    lr_scheduler: str = option(
        "cosine", "learning-rate schedule over optimizer steps",
        choices=(
            "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "step",
            "warmup_stable_decay",
        ),
    )  # fmt: skip
    lr_warmup_steps: int = option(100, "optimizer steps over which the learning rate rises from 0", within="[0, inf)")
    lr_step_size: int = option(10000, "with --lr_scheduler step: optimizer steps between two drops", within="[1, inf)")
    lr_step_gamma: float = option(0.1, "with --lr_scheduler step: factor of each drop", within="(0, 1]")
    lr_num_cycles: int = option(
        1, "with --lr_scheduler cosine_with_restarts: number of cosines after warm-up", within="[1, inf)"
    )
    lr_power: float = option(
        1.0, "with --lr_scheduler polynomial: exponent of the remaining fraction of the steps", within="(0, inf)"
    )
    lr_decay_steps: int | None = option(
        None,
        "with --lr_scheduler warmup_stable_decay: optimizer steps of the decay at the end; default: a "
        "fifth of the run",
        within="[1, inf)",
    )
    optimizer: str = option(
        None,
        "optimizer; default: muon, which learns faster than adamw at the same or larger learning rates, or adamw with "
        "distill.py --method consistency",
        choices=(
            "adamw", "adam", "muon", "lion", "lamb", "adafactor", "prodigy", "schedule_free_adamw", "adamw_8bit",
        ),
    )  # fmt: skip
    adam_beta1: float = option(0.95, "decay of the running mean of the gradient", within="[0, 1)")
    adam_beta2: float = option(0.999, "decay of the running mean of the squared gradient", within="[0, 1)")
    adam_weight_decay: float = option(
        1e-6, "weight decay of weight matrices; norms and biases have none", within="[0, inf)"
    )
    adam_epsilon: float = option(1e-8, "added to the root of the running mean of squares", within="(0, inf)")
    max_grad_norm: float = option(
        1.0, "clip the global L2 norm of the gradient to this; 0: no clipping", within="[0, inf)"
    )
    max_skipped_steps: int = option(
        10,
        "end the run after this many consecutive steps with a non-finite gradient; each is skipped",
        within="[1, inf)",
    )


@dataclass
class EmaOptions:
    """EMA: the average of the weights that is sampled and saved"""

    use_ema: bool = option(True, "keep an exponential moving average (EMA) of the weights")
    ema_inv_gamma: float = option(
        1.0, "inverse gamma of the EMA warm-up 1 - (1 + step / inv_gamma) ** -power", within="(0, inf)"
    )
    ema_power: float = option(0.75, "power of the EMA warm-up", within="(0, inf)")
    ema_max_decay: float = option(0.9999, "EMA decay per optimizer step after the warm-up", within="[0, 1)")
    ema_half_life_images: int | None = option(
        None,
        "half-life of the EMA in images, independent of the batch size; replaces --ema_max_decay",
        within="(0, inf)",
    )
    ema_power_lengths: list[float] | None = option(
        None,
        "also track power-function averages of these relative lengths sigma_rel (Karras et al. 2024), "
        "such as 0.05 0.1",
        nargs="+",
        within="(0, inf)",
    )
    ema_snapshot_steps: int | None = option(
        None, "optimizer steps between snapshots of these averages (also at the end)", within="[1, inf)"
    )


@dataclass
class HardwareOptions:
    """hardware: precision, memory, seeds"""

    mixed_precision: str | None = mixed_precision_option()
    find_batch_size: bool = option(
        False, "use the largest micro-batch that fits into memory at the same global batch size"
    )
    compile: bool | None = option(
        None, "compile the UNet with torch.compile: a minute or more at the start, then faster steps; default: on CUDA"
    )
    compile_mode: str = compile_mode_option()
    channels_last: str = channels_last_option()
    allow_tf32: bool = option(True, "use TensorFloat-32 for float32 computations on GPUs that have it")
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, about a third slower"
    )
    shard_weights: bool = option(
        False,
        "shard weights, averages and optimizer state over the processes (FSDP2), for models too large for one device",
    )
    reshard_after_forward: bool = option(
        True,
        "with --shard_weights: free gathered weights after the forward pass (ZeRO-3) instead of keeping them (ZeRO-2)",
    )
    deterministic: bool = option(False, "use deterministic algorithms only; slower on GPUs")
    replica_check_steps: int = option(
        0, "optimizer steps between comparisons of the weights of all ranks; 0: never", within="[0, inf)"
    )
    seed: int = option(
        0,
        "seed of weights, order, noise, timesteps and augmentation: the same seed gives the same run",
        within="[0, inf)",
    )
    cpu_threads: int = cpu_threads_option()
    local_rank: int = option(-1, "rank on this machine, for launchers that pass it as a flag", within="[-1, inf)")


@dataclass
class CheckpointOptions:
    """checkpoints: the exact training state"""

    output_dir: str = option("ddpm-model-64", "folder for checkpoints, sample grids and the saved pipeline")
    overwrite_output_dir: bool = option(
        False, "start again: delete the checkpoints in --output_dir and move its other run files to a backup folder"
    )
    checkpointing_steps: int = option(
        500, "optimizer steps between checkpoints; 0: only when a signal stops the run", within="[0, inf)"
    )
    checkpoints_total_limit: int | None = option(
        None, "number of newest checkpoints to keep; default: all", within="[1, inf)"
    )
    async_checkpointing: bool = option(
        True, "write checkpoints in the background: training waits only for the copy to the CPU"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "checkpoint folder, its name in --output_dir, `latest`: the newest complete one (none: start a new run), "
        "`hub`: the newest one there or in --hub_model_id, or hf://USER/MODEL: that of another repository",
    )
    allow_dataset_change: bool = option(False, "resume on other images than those of the checkpoint")
    save_model_epochs: int = option(
        10, "epochs between saved pipelines (also at the end); 0: only at the end", within="[0, inf)"
    )


@dataclass
class LoggingOptions:
    """logging: sample grids, trackers and log lines"""

    save_images_epochs: int = option(
        10, "epochs between sample grids (also at the end); 0: only at the end", within="[0, inf)"
    )
    preview_steps: int | None = option(
        None, "optimizer steps between sample grids; replaces --save_images_epochs", within="[1, inf)"
    )
    eval_batch_size: int = option(16, "images in a sample grid, over all processes", within="[1, inf)")
    logger: str = option("tensorboard", "experiment tracker", choices=("tensorboard", "wandb", "trackio", "none"))
    logging_dir: str = option("logs", "folder of the tracker inside --output_dir")
    tracker_project_name: str = option("trainkit", "project of wandb and trackio that the run belongs to")
    tracker_run_name: str | None = option(None, "name of the run in the tracker; default: the name of --output_dir")
    logging_steps: int = option(
        10, "optimizer steps between log lines; the device is read only then", within="[1, inf)"
    )


@dataclass
class ValidationOptions:
    """validation: held-out loss and scores of samples"""

    validation_data_dir: str | None = option(
        None, "folder of held-out images, or a prepared dataset of them; not among the training images"
    )
    validation_split: str | None = option(
        None, "split of --train_data_dir or --dataset_name that holds the held-out images, such as validation"
    )
    validation_steps: int | None = option(
        None, "optimizer steps between held-out losses (also at the end); default: only at the end", within="[1, inf)"
    )
    validation_images: int = option(
        256, "maximum number of held-out images to compute the loss of: the first in a fixed order", within="[1, inf)"
    )
    score_steps: int | None = option(
        None,
        "optimizer steps between KID scores of samples (also at the end); default: no scores",
        within="[1, inf)",
    )
    score_images: int = option(200, "samples per score", within="[4, inf)")
    score_extractor: str = option(
        "efficientnet_lite0",
        "network of the features of a score, as --feature_extractor of evaluate_samples.py: inception, "
        "efficientnet_lite0, a TorchScript file, or a vision model of transformers",
    )


@dataclass
class HubOptions:
    """Hub: push the saved pipeline in the background; see docs/hub.md"""

    push_to_hub: bool = option(False, "push the pipeline with its card, samples, tables and log to the Hub")
    hub_strategy: str = option(
        "every_save",
        "end: push once, at the end; every_save: whenever the pipeline is saved; checkpoint: also the newest "
        "checkpoint, for --resume_from_checkpoint hub on another machine",
        choices=("end", "every_save", "checkpoint"),
    )
    hub_model_id: str | None = option(None, "repository to push to; default: the name of --output_dir")
    hub_token: str | None = option(None, TOKEN_HELP)
    hub_private_repo: bool = option(False, "create a private repository")
    hub_timeout_s: float = option(
        60.0,
        "seconds after which a push is given up, plus one per MB; the end of the run waits no longer for the last one",
        within="(0, inf)",
    )
    license: str | None = option(
        None,
        "licence of the trained model for its card, such as mit or cc-by-4.0; default: none is given",
    )


@dataclass
class RunOptions(
    OptimizationOptions,
    EmaOptions,
    HardwareOptions,
    CheckpointOptions,
    LoggingOptions,
    ValidationOptions,
    HubOptions,
    TerminalOptions,
):
    """The options of everything that trains, whatever the model and the images are."""
