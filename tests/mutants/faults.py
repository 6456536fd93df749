"""The deliberate faults: one per contract, each a replacement of a short text that its file holds once."""

from typing import NamedTuple

GOLDEN = "tests/training/test_golden.py::test_losses_are_those_on_file"
UNCONDITIONAL, LATENTS = (f"{GOLDEN}[unconditional]",), (f"{GOLDEN}[latents]",)
OBJECTIVES = ("tests/diffusion/test_objectives.py", "tests/diffusion/test_diffusion.py")
TRAINING = "tests/scripts/test_train_unconditional.py"


class Fault(NamedTuple):
    """`old` in `file` becomes `new`; pytest with the arguments `tests` must then fail."""

    name: str
    contract: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = [
    # The objective
    Fault(
        "loss_sign", "the loss is the difference from the target", "trainkit/diffusion/objective.py",
        "(prediction.float() - target)", "(prediction.float() + target)", OBJECTIVES,
    ),
    Fault(
        "v_prediction_sign", "the velocity of Salimans & Ho", "trainkit/diffusion/objective.py",
        "return scheduler.get_velocity(", "return -scheduler.get_velocity(", OBJECTIVES,
    ),
    Fault(
        "flow_target_swapped", "flow matching goes from image to noise", "trainkit/diffusion/objective.py",
        "return noise - images", "return images - noise", OBJECTIVES,
    ),
    Fault(
        "min_snr_inverted", "min-SNR bounds the weight from above", "trainkit/diffusion/objective.py",
        "torch.minimum(alpha2, gamma * sigma2)", "torch.maximum(alpha2, gamma * sigma2)", OBJECTIVES,
    ),
    Fault(
        "alpha_bar_off_by_one", "weights belong to their own timestep", "trainkit/diffusion/noise_schedule.py",
        "[timesteps]\n    return alphas_cumprod.sqrt()",
        "[timesteps - 1]\n    return alphas_cumprod.sqrt()", OBJECTIVES,
    ),
    Fault(
        "shift_inverted", "--noise_shift above 1 adds noise", "trainkit/diffusion/noise_schedule.py",
        "shift**2 * (1 - alphas_cumprod)", "(1 - alphas_cumprod) / shift**2", OBJECTIVES,
    ),
    # Order and draws
    Fault(
        "seed_without_step", "noise differs between steps", "trainkit/data/loading/order.py",
        "counter=[0, row, step, 0]", "counter=[0, row, 0, 0]", ("tests/data/test_order.py",),
    ),
    Fault(
        "epochs_alike", "each epoch has its own order", "trainkit/data/loading/order.py",
        "_mix(epochs.astype(np.uint64) +", "_mix(0 * epochs.astype(np.uint64) +", ("tests/data/test_order.py",),
    ),
    Fault(
        "rows_of_rank_0", "each process trains on its own rows", "trainkit/data/loading/loader.py",
        "self.num_processes + self.process_index)", "self.num_processes)", ("tests/data/test_loader.py",),
    ),
    Fault(
        "flip_without_draw", "half of the images are mirrored", "trainkit/data/loading/loader.py",
        "uniforms(Purpose.FLIP) < 0.5", "uniforms(Purpose.FLIP) < 2", ("tests/data/test_loader.py",),
    ),
    Fault(
        "channels_swapped", "channels keep their order", "trainkit/data/loading/model_range.py",
        "return images.permute(0, 3, 1, 2)", "return images.flip(-1).permute(0, 3, 1, 2)", UNCONDITIONAL,
    ),
    # A step
    Fault(
        "ema_off_by_one", "the average is that of diffusers' EMAModel", "trainkit/training/averages/ema.py",
        "step - self.update_after_step - 1", "step - self.update_after_step",
        ("tests/training/test_sharding.py", "-k", "of_diffusers"),
    ),
    Fault(
        "warmup_off_by_one", "warm-up counts optimizer steps", "trainkit/training/optimizers.py",
        "optimizer=optimizer,\n        num_warmup_steps=options.lr_warmup_steps",
        "optimizer=optimizer,\n        num_warmup_steps=options.lr_warmup_steps + 1", UNCONDITIONAL,
    ),
    Fault(
        "accumulation_summed", "micro-steps are averaged", "trainkit/training/global_batch.py",
        "accelerator.gradient_accumulation_steps = micro_steps", "accelerator.gradient_accumulation_steps = 1",
        ("tests/training/test_golden.py", "-k", "accumulated"),
    ),
    Fault(
        "schedule_stands_still", "the learning rate follows its schedule", "trainkit/training/run.py",
        "        self.lr_scheduler.step()\n", "", UNCONDITIONAL,
    ),
    Fault(
        "broken_gradient_applied", "a gradient that is not finite changes nothing", "trainkit/training/guards.py",
        "if finite:\n            optimizer.step()", "if True:\n            optimizer.step()",
        ("tests/training/test_engine.py", "-k", "broken_gradient"),
    ),
    # Checkpoints and signals
    Fault(
        "resume_off_by_one", "a resumed run repeats and skips no step", "trainkit/training/start.py",
        'run.checkpoints.saved_step = saved["step"]', 'run.checkpoints.saved_step = saved["step"] + 1',
        ("tests/training/test_engine.py", "-k", "resumes_bit_for_bit"),
    ),
    Fault(
        "rename_left_out", "a file is replaced by a rename", "trainkit/atomic.py",
        "yield temporary\n", "yield path\n", ("tests/test_atomic.py",),
    ),
    Fault(
        "checksum_ignored", "a changed byte of a checkpoint is noticed", "trainkit/training/checkpoints/folder.py",
        "if checksums and _checksum(path) != checksum:", "if False:",
        ("tests/training/test_engine.py", "-k", "flipped_byte"),
    ),
    Fault(
        "rotation_deletes_the_newest", "rotation deletes the oldest", "trainkit/training/checkpoints/folder.py",
        "in reversed(checkpoint_folders(output_dir)):", "in checkpoint_folders(output_dir):",
        ("tests/training/test_checkpoint.py",),
    ),
    Fault(
        "sigterm_ignored", "SIGTERM writes a checkpoint", "trainkit/training/signals.py",
        'in ("SIGTERM", "SIGUSR1",', 'in ("SIGUSR1",', (TRAINING, "-k", "sigterm"),
    ),
    # Conditions
    Fault(
        "label_map_reversed", "saved class names are those of the labels", "trainkit/diffusion/conditioning.py",
        "dict(enumerate(self.names))", "dict(enumerate(reversed(self.names)))",
        ("tests/scripts/test_train_conditional.py", "-k", "classes_from_training"),
    ),
    Fault(
        "dropout_ignored", "conditions are dropped as often as asked", "trainkit/diffusion/conditioning.py",
        "np.where(draws(Purpose.CONDITION_DROPOUT) < self.dropout,", "np.where(draws(Purpose.CONDITION_DROPOUT) < 0,",
        ("tests/diffusion/test_conditioning.py",),
    ),
    Fault(
        "one_draw_for_both", "class and vector are dropped by their own draws", "trainkit/diffusion/conditioning.py",
        "draws(self.purpose) < self.dropout", "draws(Purpose.CONDITION_DROPOUT) < self.dropout",
        ("tests/diffusion/test_conditioning.py",),
    ),
    Fault(
        "latents_not_mirrored", "second images of latents are mirrored with them", "trainkit/data/loading/loader.py",
        "augmented(second, moves, flip,", "augmented(second, moves, None,",
        ("tests/diffusion/test_latent_image_condition.py",),
    ),
    Fault(
        "known_pixels_decoded", "known pixels are put back after decoding", "pipelines/conditional.py",
        "        if pixels is not None:", "        if pixels is not None and self.vae is None:",
        ("tests/pipelines/test_pipeline_latent_image.py",),
    ),
    Fault(
        "latents_unscaled", "latents are scaled as the VAE says", "trainkit/diffusion/latents.py",
        "((latents - self.shift) * self.scale)", "(latents - self.shift)", LATENTS,
    ),
    # Saving and sampling
    Fault(
        "weights_not_averaged", "the saved weights are the averaged ones", "trainkit/training/outputs.py",
        "        with run.averaged_weights() as unet:", "        for unet in [run.unet]:",
        (TRAINING, "-k", "averaged_ones"),
    ),
    Fault(
        "one_seed_per_batch", "an image depends on its own seed", "trainkit/sampling/noise.py",
        "manual_seed(seed) for seed in", "manual_seed(seeds[0]) for _ in",
        ("tests/sampling/test_sampling.py", "-k", "batch"),
    ),
    Fault(
        "clipping_off", "solvers clip to the range of pixels", "trainkit/sampling/schedulers.py",
        '"thresholding": True', '"thresholding": False', ("tests/sampling/test_schedulers.py",),
    ),
    Fault(
        "guidance_from_the_condition", "guidance starts from the null condition", "pipelines/conditional.py",
        "reference + self._guidance_scale * (conditional", "conditional + self._guidance_scale * (conditional",
        ("tests/pipelines/test_pipeline_conditional.py",),
    ),
    # Preparation
    Fault(
        "crop_off_by_one", "the centre is that of torchvision", "trainkit/data/images/geometry.py",
        "left, top = round(", "left, top = 1 + round(",
        ("tests/data/test_images.py", "tests/data/test_resize_modes.py"),
    ),
    Fault(
        "byte_order_mark_kept", "a byte order mark is not part of a caption", "trainkit/data/sources/texts.py",
        '"utf-8-sig"', '"utf-8"', ("tests/data/test_meaning.py",),
    ),
    Fault(
        "last_row_wins", "several rows of an image are its captions", "trainkit/data/sources/joining.py",
        "captions += further", "captions = further", ("tests/data/test_meaning.py",),
    ),
    Fault(
        "split_ignored", "the test split is not trained on", "trainkit/data/sources/splits.py",
        "return SPLIT_OF[match[1]]\n    return None", 'return "train"\n    return None',
        ("tests/data/test_splits.py",),
    ),
    Fault(
        "class_order_reversed", "class numbers follow from the names", "trainkit/data/sources/records.py",
        "by_name = sorted(names)", "by_name = sorted(names, reverse=True)",
        ("tests/data/test_meaning.py", "tests/data/test_sources.py"),
    ),
    Fault(
        "cache_key_without_settings", "other settings are another dataset", "trainkit/data/preparation/prepare.py",
        "_digest(FORMAT, settings.identity, *filters", "_digest(FORMAT, *filters",
        ("tests/data/test_prepare.py", "-k", "other_settings"),
    ),
    Fault(
        "compiled_twice", "--compile compiles one graph", "trainkit/training/device.py",
        "        unet.to_json_string()\n", "", ("tests/training/test_speed.py", "-k", "stays_the_same and compile"),
    ),
]  # fmt: skip
