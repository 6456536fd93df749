"""Optimizer and learning-rate schedule. Everything here counts optimizer steps."""

from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from trainkit.errors import UserError


def build_optimizer(options, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019), as `OptimizationOptions` say."""
    optimizer_class = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[options.optimizer]
    return optimizer_class(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
    )


def build_lr_scheduler(options, optimizer: torch.optim.Optimizer, max_train_steps: int) -> LambdaLR:
    """The schedule over `max_train_steps` optimizer steps, warm-up included.

    Not to be prepared by Accelerate, which would step it once a process instead of once an update.
    """
    if options.lr_scheduler == "step":
        if options.lr_step_size < 1:
            raise UserError(f"--lr_step_size {options.lr_step_size} must be at least 1 optimizer step")
        return LambdaLR(optimizer, lambda step: _step_factor(options, step))
    return get_scheduler(
        options.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=max_train_steps,
    )


def _step_factor(options, step: int) -> float:
    if step < options.lr_warmup_steps:
        return step / options.lr_warmup_steps
    return options.lr_step_gamma ** (step // options.lr_step_size)
