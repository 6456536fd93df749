"""How a training script starts: resolve and check its options, start its processes, build the run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from filelock import FileLock

from trainkit.data.loading.augment import build_augmentation, check_augmentation
from trainkit.data.loading.class_order import ClassBalancedOrder
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.loading.loader import BatchLoader, BatchShape
from trainkit.data.trial import num_images
from trainkit.diffusion.conditioning import ImageCondition
from trainkit.diffusion.latents import check_latent_options
from trainkit.diffusion.noise_schedule import build_noise_scheduler
from trainkit.diffusion.objective import check_objective
from trainkit.diffusion.resolve import resolve_objective
from trainkit.diffusion.unet import check_unet_options
from trainkit.errors import UserError, one_line
from trainkit.hub.options import check_hub_options
from trainkit.options.script import TrainingOptions
from trainkit.processes import on_main_process
from trainkit.sampling.schedulers import check_steps, default_scheduler
from trainkit.terminal import warn
from trainkit.training import launch
from trainkit.training.averages.ema import build_ema
from trainkit.training.averages.power_ema import PowerAverages, check_ema_power_lengths
from trainkit.training.checkpoints.resume import (
    check_resumable,
    complete_checkpoints,
    report_resume,
    restore_first,
)
from trainkit.training.checkpoints.state import restore, restore_random_states
from trainkit.training.checkpoints.writer import CheckpointWriter
from trainkit.training.config_file import CONFIG_NAME, write_config
from trainkit.training.device import compile_unet, memory_format, move_to_device, prepare_device
from trainkit.training.dry_run import trial_options
from trainkit.training.global_batch import split_global_batch
from trainkit.training.guards import SkippedSteps, WriteGuard, check_same_dataset
from trainkit.training.learning_rate_finder import check_learning_rate_search
from trainkit.training.log import truncate_metrics
from trainkit.training.optimizers import build_lr_scheduler, build_optimizer, check_optimization, resume_lr_scheduler
from trainkit.training.output_folder import check_output_dir, claim_output_dir
from trainkit.training.run import Run
from trainkit.training.score import check_score
from trainkit.training.sharding import shard
from trainkit.training.summary import print_summary, reproducing
from trainkit.training.throughput import Throughput, flops_of_image
from trainkit.training.trackers import check_tracker


def resolve_options(options: TrainingOptions) -> TrainingOptions:
    """A copy of `options` in which every default that depends on other settings has its value.

    The prediction type, loss weighting and noise schedule follow the pretrained model, if any. An FSDP or DeepSpeed
    launch turns into `--shard_weights`, and a launch with `dynamo_config` into `--compile`. Raises `UserError` for
    settings that contradict each other.
    """
    return launch.compile_as_launched(launch.shard_as_launched(resolve_objective(options)))


def check_options(options: TrainingOptions) -> None:
    """Raise `UserError` for settings that cannot work, before any image is prepared."""
    check_score(options)
    check_unet_options(options)
    check_latent_options(options)
    check_objective(options)
    check_optimization(options)
    check_ema_power_lengths(options)
    check_learning_rate_search(options)
    check_augmentation(options, grey=options.image_mode == "L")
    check_sampling(options)
    check_hub_options(options)
    check_output_dir(options)
    check_tracker(options.logger)  # the last: it may ask a server


def check_sampling(options: TrainingOptions) -> None:
    """Raise `UserError` if the trained model could not be sampled with `--ddpm_num_inference_steps`."""
    scheduler = default_scheduler(build_noise_scheduler(options))
    check_steps(scheduler, options.ddpm_num_inference_steps, "--ddpm_num_inference_steps")
    try:
        scheduler.set_timesteps(options.ddpm_num_inference_steps)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"--ddpm_num_inference_steps {options.ddpm_num_inference_steps} does not work with --ddpm_num_steps "
            f"{options.ddpm_num_steps} ({one_line(error)}): use fewer of the former, or more of the latter"
        ) from None


def prepare_process(options: TrainingOptions) -> None:
    """Set precision, deterministic algorithms and CPU threads of this process; before the first computation."""
    prepare_device(options)
    if options.deterministic:
        launch.make_deterministic()
    launch.set_cpu_threads(options.cpu_threads)


def start_accelerator(options: TrainingOptions) -> Accelerator:
    """The run's `Accelerator`, with device, algorithms and random seeds set."""
    prepare_process(options)
    accelerator = launch.start_accelerator(
        options.mixed_precision,
        options.cpu_threads,
        log_with=None if options.logger == "none" else options.logger,
        project_dir=Path(options.output_dir) / options.logging_dir,
    )
    set_seed(options.seed)
    return accelerator


def start_run(
    options: TrainingOptions,
    accelerator: Accelerator,
    unet: UNet2DModel,
    images: PreparedImages,
    condition: ImageCondition | None = None,
    order: ClassBalancedOrder | None = None,
    settings: Any = None,
) -> Run:
    """Claim the output folder, build the parts of a run, and resume them from a checkpoint if there is one.

    `condition` gives the model's further inputs; `order` replaces the default of every image once per epoch.
    `settings` are the script's own options, if these are others than `options`; they are written to config.yaml. With
    `--dry_run` the run is one in a temporary folder. A collective: call it on every rank. Raises `UserError` on all
    ranks.
    """
    settings, asked = settings or options, options
    if options.dry_run:
        options = trial_options(options, images)
    check_same_dataset(accelerator, images)
    locks: list[FileLock] = []
    on_main_process(lambda: locks.append(claim_output_dir(options)))
    candidates = complete_checkpoints(options)
    check_resumable(options, images, candidates)

    def inputs_of(size: int) -> dict[str, torch.Tensor]:  # as large as those of training
        return {} if condition is None else condition.inputs(np.zeros(size, dtype=np.int64))

    unet = move_to_device(unet, options, accelerator.device)
    shape = split_global_batch(options, accelerator, unet, images, inputs_of, candidates)
    max_train_steps = count_steps(options, num_images(images), shape.global_size)
    image_flops = flops_of_image(unet, (unet.config.in_channels, images.height, images.width), inputs_of(1))
    model, optimizer = _prepare_model(options, accelerator, unet)
    compile_unet(accelerator.unwrap_model(model), options, shape.micro_steps, accelerator.device)
    run = _build_run(
        options,
        accelerator,
        images,
        condition,
        order,
        model,
        optimizer,
        shape,
        max_train_steps,
        candidates,
        image_flops,
        settings,
    )
    run.lock = locks[0] if locks else None
    resumed_from = _resume(run, candidates)
    _announce(run, asked, resumed_from)
    return run


def _announce(run: Run, asked: TrainingOptions, resumed_from: Path | None) -> None:
    """Write config.yaml, start the trackers and print the summary of the options `asked` for."""
    if run.accelerator.is_main_process and not asked.find_learning_rate:
        with run.writing(CONFIG_NAME):
            write_config(run.output_dir, *reproducing(run))
    run.start_log()
    print_summary(run, asked, resumed_from)
    if run.accelerator.is_main_process and asked.lr_warmup_steps >= run.max_train_steps:
        warn(
            f"--lr_warmup_steps {asked.lr_warmup_steps} is not less than the {run.max_train_steps} steps of the run: "
            "the learning rate does not stay at its peak"
        )


def _build_run(
    options: TrainingOptions,
    accelerator: Accelerator,
    images: PreparedImages,
    condition: ImageCondition | None,
    order: ClassBalancedOrder | None,
    model: torch.nn.Module,
    optimizer: AcceleratedOptimizer,
    shape: BatchShape,
    max_train_steps: int,
    candidates: list[Path],
    image_flops: int,
    settings: Any,
) -> Run:
    """The run at step 0, around a prepared model and its optimizer."""
    unet = accelerator.unwrap_model(model)
    output_dir = Path(options.output_dir)
    writing = WriteGuard(output_dir)
    loader = _build_loader(options, images, shape, accelerator.device, condition, order)
    return Run(
        options=options,
        accelerator=accelerator,
        images=images,
        condition=condition,
        model=model,
        unet=unet,
        optimizer=optimizer,
        lr_scheduler=build_lr_scheduler(options, optimizer.optimizer, max_train_steps),
        ema=build_ema(options, unet, shape.global_size),
        power_averages=PowerAverages(
            options, accelerator, unet, shape.global_size, max_train_steps, candidates, writing
        ),
        loader=loader,
        checkpoints=CheckpointWriter(
            output_dir, accelerator, options.checkpoints_total_limit, options.async_checkpointing, writing
        ),
        skipped=SkippedSteps(
            images,
            loader.order,
            shape.global_size,
            options.max_skipped_steps,
            output_dir,
            accelerator.is_main_process,
        ),
        throughput=Throughput(image_flops, accelerator.device, accelerator.mixed_precision, accelerator.num_processes),
        writing=writing,
        max_train_steps=max_train_steps,
        settings=settings,
    )


def count_steps(options: TrainingOptions, num_images: int, global_batch_size: int) -> int:
    """The optimizer steps of the whole run, from steps, images or epochs. Raises `UserError`."""
    if options.max_train_steps and options.max_train_images:
        raise UserError("--max_train_steps and --max_train_images both set the length of the run: use one of them")
    if options.max_train_images:
        return math.ceil(options.max_train_images / global_batch_size)
    return options.max_train_steps or math.ceil(options.num_epochs * num_images / global_batch_size)


def _prepare_model(
    options: TrainingOptions, accelerator: Accelerator, unet: UNet2DModel
) -> tuple[torch.nn.Module, AcceleratedOptimizer]:
    """The wrapped or sharded model and its optimizer."""
    if not options.shard_weights or accelerator.num_processes == 1:
        return accelerator.prepare(unet, build_optimizer(options, unet))
    unet = accelerator.prepare_model(unet, evaluation_mode=True)  # device and autocast, but no DDP
    shard(unet, accelerator.mixed_precision, accelerator.device, options.reshard_after_forward)
    return unet, accelerator.prepare_optimizer(build_optimizer(options, unet))


def _build_loader(
    options: TrainingOptions,
    images: PreparedImages,
    shape: BatchShape,
    device: torch.device,
    condition: ImageCondition | None,
    order: ClassBalancedOrder | None,
) -> BatchLoader:
    return BatchLoader(
        images,
        shape,
        options.seed,
        options.random_flip,
        device,
        options.dataloader_num_workers,
        memory_format(options, device),
        options.shuffle_block_size,
        build_augmentation(options, images.channels),
        condition,
        order,
        None if condition is None else condition.picture,
    )


def _resume(run: Run, candidates: list[Path]) -> Path | None:
    """Load the first of `candidates` that can be read into the parts of `run`; returns it."""

    def load(folder: Path) -> dict:
        saved = restore(folder, run.unet, run.averages, run.optimizer.optimizer)
        resume_lr_scheduler(run.lr_scheduler, saved["lr_scheduler"])
        if run.accelerator.scaler is not None and saved["loss_scaler"]:
            run.accelerator.scaler.load_state_dict(saved["loss_scaler"])
        restore_random_states(folder, run.accelerator.process_index)
        return saved

    folder, saved = restore_first(candidates, load)
    if folder is not None:
        run.step = run.checkpoints.saved_step = saved["step"]
        run.skipped.in_a_row = saved.get("skipped_in_a_row", 0)
    if folder is None:
        on_main_process(lambda: truncate_metrics(run.output_dir, 0))
    else:
        on_main_process(lambda: report_resume(run.options, run.images, folder, saved, run.max_train_steps))
    run.power_averages.start(run.step)
    return folder
