"""The flag that was probably meant by an unknown one: a usual name elsewhere, or the nearest spelling."""

import difflib
from collections.abc import Iterable

# What other programs call it -> our flags; the first one that the script has is suggested.
OTHER_NAMES = {
    ("lr", "lr_max", "peak_lr", "rate"): ("learning_rate",),
    ("bs", "b", "batch", "batch_size", "per_device_train_batch_size"): (
        "train_batch_size", "sample_batch_size", "batch_size",
    ),
    ("epochs", "num_train_epochs", "max_epochs", "n_epochs", "epoch"): ("num_epochs",),
    ("steps", "max_steps", "num_steps", "train_steps", "iterations", "iters", "num_training_steps"): (
        "max_train_steps", "num_inference_steps",
    ),
    ("sampling_steps", "sample_steps", "inference_steps", "ddim_steps"): (
        "num_inference_steps", "ddpm_num_inference_steps",
    ),
    ("o", "out", "output", "outdir", "out_dir", "save_dir", "output_path", "output_folder"): (
        "output_dir", "output_file",
    ),
    ("i", "data", "data_dir", "data_path", "dataset", "dataset_dir", "train_data", "train_dir", "images", "input"): (
        "train_data_dir", "generated",
    ),
    ("resume", "resume_from", "resume_training"): ("resume_from_checkpoint",),
    ("m", "model", "model_path", "model_dir", "ckpt", "checkpoint", "pretrained", "pretrained_model"): (
        "model_name_or_path", "pretrained_model_name_or_path", "teacher_model_name_or_path", "model_dir",
    ),
    ("teacher", "teacher_model"): ("teacher_model_name_or_path",),
    ("size", "image_size", "img_size", "res"): ("resolution",),
    ("wd", "weight_decay"): ("adam_weight_decay",),
    ("warmup", "warmup_steps", "lr_warmup", "num_warmup_steps"): ("lr_warmup_steps",),
    ("fp16", "bf16", "amp", "precision", "dtype"): ("mixed_precision",),
    ("grad_accum", "accum", "accumulation_steps", "gradient_accumulation"): ("gradient_accumulation_steps",),
    ("workers", "num_workers", "j"): ("dataloader_num_workers", "num_proc"),
    ("ema",): ("use_ema",),
    ("ema_decay",): ("ema_max_decay",),
    ("save_steps", "save_every", "checkpoint_steps", "ckpt_every", "save_interval"): ("checkpointing_steps",),
    ("log_steps", "log_every", "log_interval"): ("logging_steps", "log_interval_s"),
    ("wandb", "report_to", "tracker"): ("logger",),
    ("project", "project_name", "wandb_project"): ("tracker_project_name",),
    ("name", "run_name", "wandb_name", "exp_name", "experiment_name"): ("tracker_run_name",),
    ("n", "num_samples", "n_samples", "count"): ("num_images",),
    ("cfg", "cfg_scale", "guidance"): ("guidance_scale",),
    ("labels", "classes", "class", "class_label"): ("class_labels", "condition"),
    ("prompt", "prompts"): ("prompts_file",),
    ("sampler", "noise_scheduler"): ("scheduler", "lr_scheduler"),
    ("flip", "hflip", "horizontal_flip"): ("random_flip",),
    ("color_mode", "colour_mode", "mode"): ("image_mode",),
    ("grad_clip", "clip_grad", "clip_grad_norm", "gradient_clip_val"): ("max_grad_norm",),
    ("force", "overwrite", "f"): ("overwrite_output_dir",),
    ("hub", "push"): ("push_to_hub",),
    ("token", "hf_token"): ("hub_token",),
    ("repo", "repo_id", "hub_repo"): ("hub_model_id",),
    ("threads", "num_threads"): ("cpu_threads",),
    ("val_dir", "val_data_dir", "valid_dir", "eval_data_dir"): ("validation_data_dir",),
    ("real", "reference_dir"): ("reference",),
    ("fake", "samples", "generated_dir"): ("generated",),
}  # fmt: skip


def suggestion(name: str, known: Iterable[str]) -> str:
    """': did you mean X?' with the name of `known` that is likely meant by `name`, else ' (see --help)'.

    Names may begin with dashes, all of them or none.
    """
    known = list(known)
    dashes, plain = name[: len(name) - len(name.lstrip("-"))] and "--", name.lstrip("-").replace("-", "_").lower()
    for names, flags in OTHER_NAMES.items():
        if plain in names:
            meant = next((dashes + flag for flag in flags if dashes + flag in known), None)
            if meant is not None:
                return f": did you mean {meant}?"
    matches = difflib.get_close_matches(dashes + plain, known, n=1)
    return f": did you mean {matches[0]}?" if matches else " (see --help)"
