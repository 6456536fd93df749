"""Optimizer and learning-rate schedule. Everything here counts optimizer steps."""

import torch
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from trainkit.errors import UserError

# Ends of the network and the embeddings of the timestep: Muon is for the matrices between them (Jordan et al. 2024).
NOT_FOR_MUON = ("conv_in.", "conv_out.", "time_embedding.", "time_emb_proj.", "class_embedding.")


def build_optimizer(options, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `OptimizationOptions` name, in its fused form where it has one and no part of `model` is a
    `DTensor`. Norms and biases get no weight decay.

    adamw  Loshchilov & Hutter 2019
    adam   Kingma & Ba 2015
    muon   Jordan et al. 2024, with the update scaled to AdamW's size (Liu et al. 2025, section 2.2), so that one
           learning rate serves its weight matrices and, by AdamW, all else
    """
    matrices = {name: value for name, value in model.named_parameters() if value.ndim >= 2}
    vectors = [value for value in model.parameters() if value.ndim < 2]
    settings = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    decay = options.adam_weight_decay
    if options.optimizer == "muon":
        outside = [value for name, value in matrices.items() if _is_end_or_embedding(name)]
        taken = {id(value) for value in outside}
        inside = [value for value in matrices.values() if id(value) not in taken]
        return _muon_class()(
            [
                {"params": inside, "use_muon": True, "lr": options.learning_rate, "weight_decay": decay},
                settings | {"params": outside, "use_muon": False, "weight_decay": decay},
                settings | {"params": vectors, "use_muon": False, "weight_decay": 0.0},
            ],
            use_adjusted_lr=True,
        )
    optimizer_class = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[options.optimizer]
    groups = [
        {"params": list(matrices.values()), "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    parts = [*matrices.values(), *vectors]
    fused = not any(isinstance(part, DTensor) for part in parts)
    return optimizer_class(groups, **settings, fused=fused or None)


def _is_end_or_embedding(name: str) -> bool:
    return any(f".{part}" in f".{name}" for part in NOT_FOR_MUON)


def _muon_class() -> type[torch.optim.Optimizer]:
    try:
        from pytorch_optimizer import Muon
    except ImportError:
        raise UserError("--optimizer muon needs a package: pip install pytorch-optimizer") from None
    return Muon


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
