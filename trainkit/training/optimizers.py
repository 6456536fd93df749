"""Optimizer and learning-rate schedule. Everything here counts optimizer steps."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from trainkit.errors import UserError
from trainkit.packages import load_package

# The ends of the network and the timestep embeddings: Muon is for the matrices between them (Jordan et al. 2024).
NOT_FOR_MUON = ("conv_in.", "conv_out.", "time_embedding.", "time_emb_proj.", "class_embedding.")
WITH_PYTORCH_OPTIMIZER = ("muon", "lion", "lamb", "prodigy", "schedule_free_adamw")
SHARDED = ("adam", "adamw", "muon")  # tested to be exact with `--shard_weights`
LEAST_PRODIGY_RATE = 0.05  # the rate multiplies the one that Prodigy finds, so it should be 1


def check_optimization(options) -> None:
    """Raise `UserError` for settings of `OptimizationOptions` that cannot work together."""
    name = options.optimizer
    if name in WITH_PYTORCH_OPTIMIZER:
        _pytorch_optimizer(name)
    if name == "adamw_8bit":
        _bitsandbytes()
    if options.shard_weights and name not in SHARDED:
        raise UserError(f"--shard_weights supports {', '.join(SHARDED)}, not --optimizer {name}")
    if name == "prodigy" and options.learning_rate < LEAST_PRODIGY_RATE:
        raise UserError(
            f"--learning_rate {options.learning_rate}: --optimizer prodigy finds the rate and multiplies it by this; "
            "use 1"
        )
    if name == "schedule_free_adamw":
        if options.use_ema:
            raise UserError("--optimizer schedule_free_adamw averages the weights itself: add --no_use_ema")
        if options.lr_scheduler not in ("constant", "constant_with_warmup"):
            raise UserError(
                f"--optimizer schedule_free_adamw takes the place of --lr_scheduler {options.lr_scheduler}: use "
                "constant_with_warmup or constant"
            )
    if options.lr_num_cycles < 1:
        raise UserError(f"--lr_num_cycles {options.lr_num_cycles} must be at least 1")
    if options.lr_power <= 0:
        raise UserError(f"--lr_power {options.lr_power} must be more than 0")
    if options.lr_decay_steps is not None and options.lr_decay_steps < 1:
        raise UserError(f"--lr_decay_steps {options.lr_decay_steps} must be at least 1 optimizer step")


def build_optimizer(options, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that `OptimizationOptions` name. Norms and biases get no weight decay.

    Adam and AdamW are fused, also with sharded weights.

    adamw       Loshchilov & Hutter 2019
    adam        Kingma & Ba 2015
    muon        Jordan et al. 2024, with the update scaled to AdamW's size (Liu et al. 2025, section 2.2), so that one
                learning rate works for its weight matrices and, through AdamW, for all other parameters
    lion        Chen et al. 2023: learning rates 3 to 10 times smaller than AdamW's, weight decay 3 to 10 times larger
    lamb        You et al. 2020, for global batches of thousands
    adafactor   Shazeer & Stern 2018, without momentum: the rate is relative to the size of each weight tensor
    prodigy     Mishchenko & Defazio 2023, which finds the learning rate itself: `--learning_rate 1`
    schedule_free_adamw  Defazio et al. 2024: without a schedule, and with its own average of the weights
    adamw_8bit  Dettmers et al. 2022: the moments of large tensors in 8 bits, on CUDA
    """
    matrices = {name: value for name, value in model.named_parameters() if value.ndim >= 2}
    vectors = [value for value in model.parameters() if value.ndim < 2]
    settings = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
    }
    name, decay = options.optimizer, options.adam_weight_decay
    if name == "muon":
        outside = [value for name, value in matrices.items() if _is_end_or_embedding(name)]
        taken = {id(value) for value in outside}
        inside = [value for value in matrices.values() if id(value) not in taken]
        _pytorch_optimizer(name)  # an error in one line if it is missing
        from trainkit.training import divided_muon

        return divided_muon.DividedMuon(
            [
                {"params": inside, "use_muon": True, "lr": options.learning_rate, "weight_decay": decay},
                settings | {"params": outside, "use_muon": False, "weight_decay": decay},
                settings | {"params": vectors, "use_muon": False, "weight_decay": 0.0},
            ],
            use_adjusted_lr=True,
        )
    groups = [
        {"params": list(matrices.values()), "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if name in ("adamw", "adam"):
        return {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name](groups, **settings, fused=True)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr=options.learning_rate)
    if name == "lion":
        return _pytorch_optimizer(name).Lion(groups, lr=settings["lr"], betas=settings["betas"])
    if name == "lamb":
        return _pytorch_optimizer(name).Lamb(groups, **settings)
    if name == "prodigy":
        # the safeguard keeps small rates of warm-up out of the estimate; the correction is Adam's
        return _pytorch_optimizer(name).Prodigy(groups, **settings, safeguard_warmup=True, bias_correction=True)
    if name == "schedule_free_adamw":
        return _pytorch_optimizer(name).ScheduleFreeAdamW(groups, **settings)
    return _bitsandbytes().AdamW8bit(groups, **settings)


@contextmanager
def averaged_by_optimizer(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block, the weights to use for inference: for schedule-free optimizers, their average.

    The optimizer's own `eval` and `train` would recompute the training weights from the average, which is not exact to
    the bit; here they are kept. Do not train inside the block.
    """
    kept = []
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"] if "train_mode" in group else ():
                state = optimizer.state.get(parameter, {})
                if "z" in state:  # y = (1 - beta1) z + beta1 x (Defazio et al. 2024, Eq. 3), solved for x
                    kept.append((parameter, parameter.clone()))
                    parameter.lerp_(state["z"], 1 - 1 / group["betas"][0])
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weights in kept:
                parameter.copy_(weights)


def _is_end_or_embedding(name: str) -> bool:
    return any(f".{part}" in f".{name}" for part in NOT_FOR_MUON)


def _pytorch_optimizer(name: str):
    try:
        import pytorch_optimizer  # seconds
    except ImportError:
        raise UserError(f"--optimizer {name} needs a package: pip install pytorch-optimizer") from None
    return pytorch_optimizer


def _bitsandbytes():
    if not torch.cuda.is_available():
        raise UserError("--optimizer adamw_8bit needs a CUDA GPU: use adamw, or adafactor, whose state is smaller")
    return load_package("bitsandbytes", "--optimizer adamw_8bit").optim


def build_lr_scheduler(options, optimizer: torch.optim.Optimizer, max_train_steps: int) -> LambdaLR:
    """The schedule over `max_train_steps` optimizer steps, warm-up included.

    Do not prepare it with Accelerate, which would step it once per process instead of once per update.
    """
    if options.lr_scheduler == "step":
        if options.lr_step_size < 1:
            raise UserError(f"--lr_step_size {options.lr_step_size} must be at least 1 optimizer step")
        return LambdaLR(optimizer, lambda step: _step_factor(options, step))
    if options.lr_scheduler == "warmup_stable_decay":
        return _warmup_stable_decay(options, optimizer, max_train_steps)
    return get_scheduler(
        options.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=max_train_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )


def _warmup_stable_decay(options, optimizer: torch.optim.Optimizer, max_train_steps: int) -> LambdaLR:
    """Constant after warm-up, then 1 - sqrt(fraction of the decay), down to 0 at the end (Haegele et al. 2024)."""
    try:
        from transformers.optimization import get_wsd_schedule
    except ImportError:
        raise UserError("--lr_scheduler warmup_stable_decay needs a package: pip install transformers") from None
    decay_steps = options.lr_decay_steps or max(1, max_train_steps // 5)
    if options.lr_warmup_steps + decay_steps > max_train_steps:
        raise UserError(
            f"--lr_warmup_steps {options.lr_warmup_steps} and --lr_decay_steps {decay_steps} are more than the "
            f"{max_train_steps} steps of the run: lower one of them"
        )
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_decay_steps=decay_steps,
        num_training_steps=max_train_steps,
        decay_type="1-sqrt",
    )


def resume_lr_scheduler(scheduler: LambdaLR, saved: dict) -> None:
    """Continue `scheduler` at the step of its `saved` state, with the rate and the schedule of this run's options."""
    scheduler.load_state_dict(saved | {"base_lrs": scheduler.base_lrs})
    rates = [
        base * factor(scheduler.last_epoch)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _step_factor(options, step: int) -> float:
    if step < options.lr_warmup_steps:
        return step / options.lr_warmup_steps
    return options.lr_step_gamma ** (step // options.lr_step_size)
