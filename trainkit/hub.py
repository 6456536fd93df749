"""Share a saved pipeline on the Hub: its card, and a push that never takes the training state along."""

import sys
from pathlib import Path

from trainkit.errors import UserError

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- diffusers
- unconditional-image-generation
- diffusion-models-class
---

# {name}

An unconditional image diffusion model, {height}x{width} pixels, trained for {step:,} steps of {global_batch} images.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}")
images = pipeline(batch_size=16, num_inference_steps={num_inference_steps}).images
```

`scheduler/` is the few-step default. Others are in `schedulers/`:

```python
from diffusers import DDIMScheduler

pipeline.scheduler = DDIMScheduler.from_pretrained("{name}", subfolder="schedulers/ddim")
```

![samples](samples.png)

## Training

{settings}
"""
CONDITIONAL_CARD = """---
library_name: diffusers
tags:
- diffusers
- conditional-image-generation
---

# {name}

A conditional image diffusion model, {height}x{width} pixels, trained for {step:,} steps of {global_batch} images.
Its pipeline is `conditional.py` here, which `trust_remote_code` lets diffusers run.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)
images = pipeline({argument}={example}, guidance_scale=2.0, num_inference_steps={num_inference_steps}).images
```
{classes}
`scheduler/` is the few-step default; others are in `schedulers/`.

![samples](samples.png)

## Training

{settings}
"""
NAMED_CLASSES = 100
SHOWN = (
    "prediction_type", "ddpm_beta_schedule", "noise_shift", "rescale_betas_zero_snr", "ddpm_num_steps",
    "loss_weighting", "snr_gamma", "timestep_sampling", "optimizer", "learning_rate",
    "lr_scheduler", "lr_warmup_steps", "use_ema", "ema_max_decay", "random_flip", "mixed_precision", "seed",
)  # fmt: skip


def model_card(options, height: int, width: int, step: int, global_batch: int) -> str:
    """README.md of a saved pipeline: how to load it, and what it was trained with."""
    return CARD.format(
        name=options.hub_model_id or Path(options.output_dir).resolve().name,
        height=height,
        width=width,
        step=step,
        global_batch=global_batch,
        num_inference_steps=options.ddpm_num_inference_steps,
        settings="\n".join(f"- {name}: {getattr(options, name)}" for name in SHOWN),
    )


def conditional_model_card(options, condition, height: int, width: int, step: int, global_batch: int) -> str:
    """README.md of a saved conditional pipeline: how to ask it for something, and what it was trained with."""
    names = condition.names or []
    more = f", ... ({len(names):,} in all)" if len(names) > NAMED_CLASSES else ""
    return CONDITIONAL_CARD.format(
        name=options.hub_model_id or Path(options.output_dir).resolve().name,
        height=height,
        width=width,
        step=step,
        global_batch=global_batch,
        argument=condition.argument,
        example=condition.example(),
        classes=f"\nClasses: {', '.join(names[:NAMED_CLASSES])}{more}.\n" if names else "",
        num_inference_steps=options.ddpm_num_inference_steps,
        settings="\n".join(
            f"- {name}: {getattr(options, name)}" for name in ("condition", "conditioning_dropout", *SHOWN)
        ),
    )


def create_repository(options) -> str:
    """Create the repository that `--push_to_hub` needs, before training starts, and return its id."""
    from huggingface_hub import create_repo

    name = options.hub_model_id or Path(options.output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=options.hub_token, private=options.hub_private_repo).repo_id
    except Exception as error:  # of the Hub, of its HTTP library, of the name's form
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--push_to_hub: repository {name} cannot be created ({reason}); check --hub_model_id and --hub_token, or "
            "log in with `hf auth login`"
        ) from None


def push_pipeline(folder: Path, repo_id: str, token: str | None, parts: tuple[str, ...], step: int) -> None:
    """Upload the pipeline's `parts` of `folder`, nothing else; a failed upload warns, the files stay on disk."""
    from huggingface_hub import upload_folder

    patterns = [pattern for part in parts for pattern in (part, f"{part}/*")]
    try:
        upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=patterns, token=token, commit_message=f"Step {step}"
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        print(f"\nWARNING: the push to {repo_id} failed ({reason}); {folder} is complete", file=sys.stderr, flush=True)
