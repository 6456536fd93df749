"""The schedulers that are saved with a pipeline, with the settings that sample its noise schedule.

The settings were chosen by sampling distributions whose exact denoiser is known (tests/sampling/test_schedulers.py,
test_convergence.py). Some classes raise in diffusers' DDPMPipeline (UniPC, Heun: no `generator` in `step`) or silently
sample garbage there (Euler: the pipeline scales neither the noise nor the model's input). They run in
pipelines/unconditional.py and conditional.py. DEIS is left out, and SASolver for flow matching: their last step does
not end at a noise level of zero.
"""

# T training timesteps, alpha_bar_t product of (1 - beta), sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)

import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SASolverScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from trainkit.atomic import write_text
from trainkit.diffusion.few_step import is_few_step, student_steps
from trainkit.diffusion.noise_schedule import NoiseScheduler, is_flow
from trainkit.errors import UserError
from trainkit.sampling.catalogue import DEFAULT_SCHEDULER, OWN_SCHEDULER

SIGMA_MAX = 40.0
TAIL_BETA = 1e-5
EVEN_STRIDES_TO = 3.75  # sigma at T / 2 (linear betas: 3.4), over which too few of 20 even strides are at low noise
CONFIG_NAME = "scheduler_config.json"


def scheduler_bundle(noise_scheduler: NoiseScheduler) -> dict[str, SchedulerMixin]:
    """Name -> scheduler that samples a model trained with `noise_scheduler`, for the names of catalogue.py.

    Models of pixels are clamped to [-1, 1] where the class can do it; models of latents (`clip_sample` is False) are
    not. A flow-matching model gets those that diffusers has in that form.
    """
    return {name: build() for name, build in _builders(noise_scheduler).items()}


def default_scheduler(noise_scheduler: NoiseScheduler) -> SchedulerMixin:
    """That of `scheduler_bundle` with the name `DEFAULT_SCHEDULER`, without building the others."""
    return _builders(noise_scheduler)[DEFAULT_SCHEDULER]()


def _builders(noise_scheduler: NoiseScheduler) -> dict[str, Callable[[], SchedulerMixin]]:
    if is_flow(noise_scheduler):
        return _flow_builders(noise_scheduler)
    config = noise_scheduler.config
    plain = {"prediction_type": config.prediction_type, "num_train_timesteps": config.num_train_timesteps}
    # the solvers ignore `clip_sample`; thresholding at 1 is the same clamp to [-1, 1]
    clamp = {"thresholding": True, "sample_max_value": 1.0} if config.clip_sample else {}
    capped = plain | {"trained_betas": capped_betas(noise_scheduler)}
    karras = capped | {"use_karras_sigmas": True}
    return {
        "sde_dpmsolver": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", **karras, **clamp),
        "dpmsolver": partial(DPMSolverMultistepScheduler, **karras, **clamp),
        "dpmsolver_3m": partial(DPMSolverMultistepScheduler, solver_order=3, **karras, **clamp),
        "unipc": partial(UniPCMultistepScheduler, **karras, **clamp),
        "sasolver": partial(_sasolver, noise_scheduler, karras | clamp, plain | clamp),
        "heun": partial(HeunDiscreteScheduler, clip_sample=config.clip_sample, **karras),
        "euler": partial(EulerDiscreteScheduler, **karras),
        # no clipping: DDIMScheduler clips the image but not the noise, and the two drift apart over hundreds of steps
        "ddim": partial(DDIMScheduler, timestep_spacing="trailing", clip_sample=False, **capped),
        # linspace is the one spacing that is right for any number of steps: DDPMScheduler looks up its neighbours
        "ddpm": partial(DDPMScheduler.from_config, config, timestep_spacing="linspace"),
    }


def _sasolver(noise_scheduler: DDPMScheduler, karras: dict, plain: dict) -> SASolverScheduler:
    """SA-Solver at even strides of the timesteps, or at the noise levels of `karras` if those strides are too long."""
    if _sigma_at_half(noise_scheduler) > EVEN_STRIDES_TO:
        return SASolverScheduler(**karras)
    start = {"timestep_spacing": "trailing", "lambda_min_clipped": _lambda_min(noise_scheduler)}
    return SASolverScheduler(**start, **plain, **_betas(noise_scheduler))


def _flow_builders(noise_scheduler: FlowMatchEulerDiscreteScheduler) -> dict[str, Callable[[], SchedulerMixin]]:
    """The schedulers of a flow-matching model; the solvers shift their steps by the square root of the training shift.

    With the full shift, 20 steps end at a noise level that smooths the finest details. With none, too few of the steps
    are at the noise levels where a large image takes shape.
    """
    config = noise_scheduler.config
    solver = {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": math.sqrt(config.shift),
        "num_train_timesteps": config.num_train_timesteps,
    }
    return {
        "sde_dpmsolver": partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", **solver),
        "dpmsolver": partial(DPMSolverMultistepScheduler, **solver),
        "dpmsolver_3m": partial(DPMSolverMultistepScheduler, solver_order=3, **solver),
        "unipc": partial(UniPCMultistepScheduler, **solver),
        "flow_euler": partial(FlowMatchEulerDiscreteScheduler.from_config, config),
        "flow_heun": partial(FlowMatchHeunDiscreteScheduler, config.num_train_timesteps, math.sqrt(config.shift)),
    }


def capped_betas(noise_scheduler: DDPMScheduler) -> list[float]:
    """The training betas (T,), except that sigma stops rising at `SIGMA_MAX`, or one timestep before the end.

    Cosine betas end at sigma 20,000, where dividing by sqrt(alpha_bar) turns the smallest error of the model into
    noise, and where Karras spacing (Karras et al. 2022, Eq. 5), which starts at the last sigma, would spend its steps.
    And diffusers raises where the first two steps round to one timestep: with a nearly flat tail they never do.
    """
    betas = noise_scheduler.betas.double().clone()
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    kept = min(int((sigmas <= SIGMA_MAX).sum()), len(betas) - 1)
    betas[max(kept, 1) :] = TAIL_BETA
    return betas.tolist()


def check_steps(scheduler: SchedulerMixin, num_inference_steps: int, flag: str = "--num_inference_steps") -> None:
    """Raise `UserError` for a number of steps at which the scheduler would fail or sample garbage."""
    num_train_timesteps = scheduler.config.num_train_timesteps
    if is_few_step(scheduler) and num_inference_steps > student_steps(scheduler):
        most = student_steps(scheduler)
        raise UserError(f"{flag} {num_inference_steps}: this is a student of {most} steps; use {most} or fewer")
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise UserError(f"{flag} {num_inference_steps} must be 1 to {num_train_timesteps}, the steps of training")
    if not isinstance(scheduler, DDIMScheduler):
        return
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps
    # DDIMScheduler strides by floor(T / steps), whatever its timesteps are; rounding may add a step at -1
    spacing = num_train_timesteps / num_inference_steps
    if len(timesteps) != num_inference_steps or timesteps.min() < 0 or (spacing % 1) / spacing > 0.05:
        divisors = [steps for steps in range(1, num_train_timesteps + 1) if num_train_timesteps % steps == 0]
        nearest = min(divisors, key=lambda steps: abs(steps - num_inference_steps))
        raise UserError(
            f"{flag} {num_inference_steps}: DDIM samples garbage if its steps do not divide the {num_train_timesteps} "
            f"of training; use {nearest}"
        )


def describe_scheduler(scheduler: SchedulerMixin) -> dict:
    """Class and configuration in plain JSON; a list of betas is replaced by its digest."""
    described = {"class": type(scheduler).__name__}
    for key, value in sorted(scheduler.config.items()):
        if key == "trained_betas" and value is not None:
            value = "sha256 " + hashlib.sha256(json.dumps(list(value)).encode()).hexdigest()
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        if not key.startswith("_"):
            described[key] = value
    return described


def save_bundle(folder: Path, bundle: dict[str, SchedulerMixin]) -> None:
    """Write `scheduler/` (the default) and `schedulers/<name>/`, each file under a temporary name, then renamed."""
    _save_scheduler(folder / "scheduler", bundle[DEFAULT_SCHEDULER])
    for name, scheduler in bundle.items():
        _save_scheduler(folder / "schedulers" / name, scheduler)


def load_scheduler(folder: Path, name: str | None = None) -> SchedulerMixin:
    """The scheduler `name` of a saved pipeline, None or `OWN_SCHEDULER` for its own.

    What the folder does not ship (any other DDPMPipeline, or a model saved by an earlier version) is made to fit the
    noise schedule that is stored in it.

    Raises:
        UserError: the folder has no scheduler, or the requested one does not exist for its noise schedule.
    """
    name = None if name == OWN_SCHEDULER else name
    if name is not None and (folder / "schedulers" / name / CONFIG_NAME).is_file():
        return _load(folder / "schedulers" / name)
    own = _load(folder / "scheduler" if (folder / "scheduler").is_dir() else folder)
    shipped = shipped_schedulers(folder)
    if is_few_step(own) and name is not None:
        raise UserError(
            f"--scheduler {name}: {folder} is a few-step student, which has one scheduler; remove the flag"
        )
    if (shipped and name is None) or is_few_step(own):
        return own
    bundle = _fitting_bundle(folder, own)
    if name is not None and name not in bundle:
        raise UserError(f"--scheduler {name} must be one of {', '.join(sorted({*bundle, *shipped}))}")
    return bundle[name or DEFAULT_SCHEDULER]


def shipped_schedulers(folder: Path) -> list[str]:
    """The names under `schedulers/`, sorted."""
    return sorted(path.parent.name for path in folder.glob(f"schedulers/*/{CONFIG_NAME}"))


def available_schedulers(folder: Path) -> list[str]:
    """The names that `load_scheduler` accepts: those of the catalogue that fit, then others of the folder."""
    own = load_scheduler(folder)
    if is_few_step(own):
        return [OWN_SCHEDULER]
    fitting = list(_fitting_bundle(folder, own))
    return fitting + [name for name in shipped_schedulers(folder) if name not in fitting]


def _fitting_bundle(folder: Path, own: SchedulerMixin) -> dict[str, SchedulerMixin]:
    """The bundle for the noise schedule of training, which is stored under `schedulers/`, else that of `own`."""
    shipped = shipped_schedulers(folder)
    trained_with = next((known for known in ("ddpm", "flow_euler") if known in shipped), None)
    noise_scheduler = own if trained_with is None else _load(folder / "schedulers" / trained_with)
    if not is_flow(noise_scheduler):
        noise_scheduler = DDPMScheduler.from_config(noise_scheduler.config)
    return scheduler_bundle(noise_scheduler)


def _betas(noise_scheduler: DDPMScheduler) -> dict:
    """Constructor arguments that give every scheduler class the betas of `noise_scheduler`."""
    config = noise_scheduler.config
    known = config.beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
    if not known or config.trained_betas is not None or config.rescale_betas_zero_snr:
        return {"trained_betas": noise_scheduler.betas.double().tolist()}
    return {key: config[key] for key in ("beta_schedule", "beta_start", "beta_end")}


def _sigma_at_half(noise_scheduler: DDPMScheduler) -> float:
    alpha_bar = noise_scheduler.alphas_cumprod[len(noise_scheduler.alphas_cumprod) // 2].item()
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def _lambda_min(noise_scheduler: DDPMScheduler) -> float:
    """The log SNR at which SA-Solver starts: cosine betas reach -10, where it is unstable."""
    last_alpha_bar = noise_scheduler.alphas_cumprod[-1].item()
    cosine_like = last_alpha_bar * (5 * SIGMA_MAX) ** 2 < 1
    return -math.log(SIGMA_MAX) if cosine_like else -float("inf")


def _load(folder: Path) -> SchedulerMixin:
    """The diffusers scheduler whose class the config names; nothing in the folder is executed."""
    try:
        class_name = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"--model_name_or_path: {folder} has no readable {CONFIG_NAME}") from None
    found = getattr(diffusers, str(class_name), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise UserError(f"--model_name_or_path: {folder} names {class_name}, which is not a scheduler of diffusers")
    scheduler_class: type[SchedulerMixin] = found
    return scheduler_class.from_pretrained(folder)


def _save_scheduler(folder: Path, scheduler: SchedulerMixin) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG_NAME, scheduler.to_json_string())
