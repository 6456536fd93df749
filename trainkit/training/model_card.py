"""README.md of a saved pipeline: how to load it, how it was trained, and on what. Metadata as the Hub reads it."""

from pathlib import Path
from typing import Any

from diffusers import DDPMPipeline
from huggingface_hub import ModelCard, ModelCardData

from trainkit.diffusion.conditioning import ImageCondition
from trainkit.options.script import TrainingOptions
from trainkit.report.card_results import RESULTS_PLACE
from trainkit.report.page import about
from trainkit.report.record import read_json
from trainkit.report.summary import DISTILLATION_NAME, format_value, progress, read_run
from trainkit.sampling.catalogue import outside_stock_pipeline
from trainkit.sampling.generate import Pipeline, image_shape

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
LOSS_PICTURE = "loss.png"
# The task on the Hub and the tags, by the pipeline's argument. No task of the Hub is one with classes or vectors, and
# without a task it would take a diffusers model for text-to-image.
TASKS = {
    None: ("unconditional-image-generation", ["unconditional-image-generation", "diffusion-models-class"]),
    "class_labels": ("other", ["class-conditional-image-generation", "conditional-image-generation"]),
    "vectors": ("other", ["conditional-image-generation"]),
    "prompt": ("text-to-image", ["conditional-image-generation"]),
    "image": ("image-to-image", ["conditional-image-generation"]),
}
STOCK_NOTE = (
    ". DDPMPipeline cannot run {outside}: load the model with `DiffusionPipeline.from_pretrained("
    '"{name}", custom_pipeline="unconditional", trust_remote_code=True)` for them. For example'
)
NAMED_CLASSES = 100
EQUIPMENT = ("model", "global batch", "hardware", "wall-clock time", "energy")  # of what the report says of a run
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
    record: dict[str, Any],
    repo_id: str | None = None,
) -> str:
    """The text of README.md for `pipeline`, without scores, which `update_card` adds.

    `record` is what the run says of itself (trainkit/report/record.py); its `origin` makes it the card of a student.
    """
    height, width, _ = image_shape(pipeline)
    name = repo_id or options.hub_model_id or Path(options.output_dir).resolve().name
    origin, run = record.get("origin"), read_run(Path(options.output_dir), record)
    arguments, known = "batch_size=16", vars(options)
    if condition is not None:
        guidance = "" if origin else ", guidance_scale=2.0"
        arguments = f"{condition.argument}={condition.example()}{guidance}"
    stock = isinstance(pipeline, DDPMPipeline)
    flow = options.prediction_type == "flow_prediction"
    scheduler, scheduler_class = (
        ("flow_euler", "FlowMatchEulerDiscreteScheduler") if flow else ("ddim", "DDIMScheduler")
    )
    stock_note = STOCK_NOTE.format(outside=outside_stock_pipeline(), name=name)
    card = ModelCard.from_template(
        card_data(options, condition, name, origin),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=name,
        title=record.get("title") or "Diffusion model",
        step=record["step"],
        global_batch_size=record["global_batch_size"],
        origin=origin,
        trained_on=_trained_on(record.get("dataset") or {}),
        custom_code=None if stock else f"{'un' if condition is None else ''}conditional.py",
        arguments=arguments,
        num_inference_steps=options.ddpm_num_inference_steps,
        classes=_listed_classes(getattr(condition, "names", None) or []),
        other_scheduler=None if origin else scheduler,
        other_class=scheduler_class,
        runs_where=stock_note if stock else "",
        results_place=RESULTS_PLACE,
        facts=[(what, f"{value} {detail}".strip()) for what, value, detail in progress(run)] + _equipment(about(run)),
        loss_picture=LOSS_PICTURE if (run.folder / LOSS_PICTURE).is_file() else None,
        settings=[(each, format_value(value)) for each in LISTED_OPTIONS if (value := known.get(each)) is not None],
        height=height,
        width=width,
        license=options.license,
        versions=_versions(record),
    )
    return f"{card}\n"


def card_data(
    options: TrainingOptions, condition: ImageCondition | None, name: str, origin: str | None
) -> ModelCardData:
    """The metadata of the card, without scores."""
    task, tags = TASKS[None if condition is None else condition.argument]
    dataset = options.dataset_name
    teacher = read_json(Path(options.output_dir) / DISTILLATION_NAME).get("teacher") if origin else None
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        license=options.license,
        datasets=[dataset] if dataset and _is_hub_id(dataset) else None,
        base_model=teacher if teacher and _is_hub_id(teacher) else None,
        tags=["diffusers", *tags, *(["distillation", "few-step"] if origin else [])],
    )


def _is_hub_id(name: str) -> bool:
    return "://" not in name and not Path(name).exists() and not name.startswith((".", "/", "~"))


def _trained_on(dataset: dict[str, Any]) -> str:
    """`Trained on mnist: 4,500 images of 10 classes (fingerprint ...)`."""
    if not dataset.get("num_images"):
        return ""
    classes = f" of {dataset['num_classes']:,} classes" if dataset.get("num_classes") else ""
    name = f"`{dataset['name']}`: " if dataset.get("name") else ""
    return f"Trained on {name}{dataset['num_images']:,} images{classes} (fingerprint `{dataset['fingerprint']}`)."


def _listed_classes(names: list[str]) -> str:
    more = f", ... ({len(names):,} in all)" if len(names) > NAMED_CLASSES else ""
    return ", ".join(names[:NAMED_CLASSES]) + more


def _equipment(facts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (what, value)
        for what, value in facts
        if what in ("model", "global batch", "hardware", "wall-clock time", "energy")
    ]


def _versions(record: dict[str, Any]) -> str:
    parts = [f"{name} {version}" for name, version in (record.get("versions") or {}).items()]
    if record.get("git_commit"):
        parts.append(f"git commit {record['git_commit']}")
    return ", ".join(parts)
