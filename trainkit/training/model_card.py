"""README.md of a saved pipeline: how to load it, and how it was trained."""

from pathlib import Path

from trainkit.diffusion.conditioning import ImageCondition
from trainkit.options.script import TrainingOptions
from trainkit.sampling.catalogue import outside_stock_pipeline
from trainkit.sampling.generate import Pipeline, image_shape

CARD = """---
library_name: diffusers
{metadata}
---

# {name}

{title} image diffusion model, {height}x{width} pixels, trained for {step:,} steps of {global_batch} images.
{note}
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}"{trust})
images = pipeline({arguments}, num_inference_steps={num_inference_steps}).images
```
{classes}
{schedulers}

![samples](samples.png)

## Training

{settings}
"""
OTHER_SCHEDULERS = """`scheduler/` is the default for few steps. `schedulers/` has others{runs_where}:

```python
from diffusers import {other_class}

pipeline.scheduler = {other_class}.from_pretrained("{name}", subfolder="schedulers/{other}")
```"""
UNCONDITIONAL_METADATA = """pipeline_tag: unconditional-image-generation
tags:
- diffusers
- unconditional-image-generation
- diffusion-models-class"""
CONDITIONAL_METADATA = """tags:
- diffusers
- conditional-image-generation"""
CUSTOM_CODE_NOTE = "The pipeline is `conditional.py` in this folder. `trust_remote_code` lets diffusers run it.\n"
STOCK_NOTE = (
    f". DDPMPipeline cannot run {outside_stock_pipeline()}: load the model with `DiffusionPipeline.from_pretrained("
    '"{name}", custom_pipeline="unconditional", trust_remote_code=True)` for them. For example'
)
NAMED_CLASSES = 100
LISTED_OPTIONS = (
    "condition", "condition_from", "conditioning_dropout", "prediction_type", "ddpm_beta_schedule", "noise_shift",
    "rescale_betas_zero_snr", "ddpm_num_steps", "loss_weighting", "snr_gamma", "timestep_sampling", "optimizer",
    "learning_rate", "lr_scheduler", "lr_warmup_steps", "use_ema", "ema_max_decay", "random_flip", "mixed_precision",
    "seed",
)  # fmt: skip


def model_card(
    options: TrainingOptions,
    pipeline: Pipeline,
    condition: ImageCondition | None,
    step: int,
    global_batch_size: int,
    repo_id: str | None = None,
    origin: str | None = None,
) -> str:
    """The text of README.md for `pipeline`, after `step` optimizer steps of `global_batch_size` images.

    `origin` says what a few-step student was distilled from.
    """
    height, width, _ = image_shape(pipeline)
    flow = options.prediction_type == "flow_prediction"
    name = repo_id or options.hub_model_id or Path(options.output_dir).resolve().name
    arguments = "batch_size=16"
    if condition is not None:
        guidance = "" if origin else ", guidance_scale=2.0"
        arguments = f"{condition.argument}={condition.example()}{guidance}"
    names = getattr(condition, "names", None) or []
    other, other_class = ("flow_euler", "FlowMatchEulerDiscreteScheduler") if flow else ("ddim", "DDIMScheduler")
    runs_where = STOCK_NOTE.format(name=name) if condition is None else ""
    schedulers = OTHER_SCHEDULERS.format(name=name, other=other, other_class=other_class, runs_where=runs_where)
    more = f", ... ({len(names):,} in all)" if len(names) > NAMED_CLASSES else ""
    return CARD.format(
        metadata=UNCONDITIONAL_METADATA if condition is None else CONDITIONAL_METADATA,
        name=name,
        title="An unconditional" if condition is None else "A conditional",
        height=height,
        width=width,
        step=step,
        global_batch=global_batch_size,
        note=(f"\n{origin}\n" if origin else "") + ("" if condition is None else f"\n{CUSTOM_CODE_NOTE}"),
        trust="" if condition is None else ", trust_remote_code=True",
        arguments=arguments,
        num_inference_steps=options.ddpm_num_inference_steps,
        classes=f"\nClasses: {', '.join(names[:NAMED_CLASSES])}{more}.\n" if names else "",
        schedulers="" if origin else schedulers,
        settings="\n".join(f"- {name}: {_words(options, name)}" for name in LISTED_OPTIONS if hasattr(options, name)),
    )


def _words(options: TrainingOptions, name: str) -> str:
    value = getattr(options, name)
    return " ".join(value) if isinstance(value, list) else str(value)
