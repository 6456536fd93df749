"""What was measured of a saved model, in its README.md: one section, and the model-index of the metadata.

A save writes the card, then calls `update_card`; evaluate_samples.py calls it again whenever it has a new score.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from trainkit.atomic import write_text
from trainkit.report.metrics import read_rows
from trainkit.report.record import read_record
from trainkit.report.scores import (
    Score,
    read_scores,
    readable_table,
    scores_of_cell,
    scores_of_file,
    scores_of_training,
)
from trainkit.sampling.table import PICTURE_NAME, table_lines
from trainkit.sampling.weights import weights_digest

CARD_NAME = "README.md"
BEGIN, END = "<!-- sampling table: written by evaluate_samples.py -->", "<!-- end of the sampling table -->"
RESULTS_PLACE = f"{BEGIN}\n{END}"
OF_EARLIER_WEIGHTS = "**Measured on weights that were saved earlier; the model was trained further since.**"
TASK = "image-generation"


def update_card(folder: Path) -> None:
    """Write what is known of the model in `folder` into its README.md, if it has one; the rest of it is kept.

    Raises:
        OSError: a file cannot be read or written.
    """
    file = folder / CARD_NAME
    if not file.is_file():
        return
    table, scores, record = readable_table(folder), read_scores(folder), read_record(folder)
    rows = read_rows(folder)
    latest = [row for row in rows if row["step"] == rows[-1]["step"]]  # an earlier score is not of these weights
    trained = scores_of_training(latest, (record.get("options") or {}).get("score_extractor"))
    digest = weights_digest(folder) if table or scores else None
    of_earlier = [found for found in (table, scores) if found and _digest_of(found) not in (None, digest)]
    lines = [
        *_score_lines(trained, scores, scores in of_earlier),
        *(_table_section(table, table in of_earlier) if table else []),
    ]
    text = file.read_text(encoding="utf-8")
    if lines or BEGIN in text:
        text = with_section(text, "\n".join([BEGIN, *lines, END]))
    results = [
        *_eval_results(trained, record, _dataset_name(record)),
        *([] if table in of_earlier else _table_results(table, record)),
        *([] if scores in of_earlier else _file_results(scores, record)),
    ]
    write_text(file, _with_metadata(text, results, folder.resolve().name))


def _digest_of(found: dict) -> str | None:
    """The digest of the weights that a table or scores.json is about, if it is known."""
    return found["weights_sha256"] if "cells" in found else (found.get("sampling") or {}).get("weights_sha256")


def with_section(card: str, text: str) -> str:
    """The card with `text` in place of its earlier section, or at its end."""
    before, begin, rest = card.partition(BEGIN)
    after = rest.partition(END)[2].lstrip("\n") if begin else ""
    return f"{before.rstrip()}\n\n{text}\n" + (f"\n{after}" if after else "")


def _score_lines(trained: list[Score], scores: dict, of_earlier: bool) -> list[str]:
    listed = [*scores_of_file(scores), *trained]
    lines = []
    if listed:
        lines += [
            "## Scores",
            "",
            "| score | value | samples | real images | features |",
            "|---|---|---|---|---|",
        ]
        lines += [f"| {s.label} | {s.text} | {s.detail} | {s.num_reference or '?'} | {s.extractor} |" for s in listed]
        lines += ["", OF_EARLIER_WEIGHTS if of_earlier else _comparability(scores), ""]
    return [*lines, *_memorization_lines(scores)]


def _comparability(scores: dict) -> str:
    note = scores.get("note") or "not comparable with published figures (few samples)"
    return f"{note[0].upper()}{note[1:]}."


def _memorization_lines(scores: dict) -> list[str]:
    found = (scores.get("memorization") or {}).get("features") or {}
    if "share_too_near" not in found:
        return []
    return [
        f"Copies: {found['num_copies']} of {scores['num_generated']:,} samples equal a training image, and "
        f"{found['share_too_near']:.1%} are nearer to one than 99 % of {found['num_held_out']:,} held-out images are "
        "(about 1 % is expected).",
        "",
    ]


def _table_section(table: dict, of_earlier: bool) -> list[str]:
    """The table, the picture, and what the scores depend on."""
    used = table["settings"]
    return [
        "## Schedulers and steps", "", *([OF_EARLIER_WEIGHTS, ""] if of_earlier else []), *table_lines(table), "",
        f"{used['num_images']:,} samples per row, the same seeds in each, against {used['num_reference']:,} "
        f"reference images; {used['feature_extractor']}; {used['note']}. Schedulers that are not in DDPMPipeline "
        "run in `unconditional.py`.", "",
        f"![rows of samples, one row per scheduler and steps]({PICTURE_NAME})",
    ]  # fmt: skip


def _table_results(table: dict, record: dict) -> list[EvalResult]:
    """Those of the best scheduler for each number of steps."""
    if not table:
        return []
    metric = table["settings"]["metrics"][0]
    best: dict[int, dict] = {}
    for cell in table["cells"]:
        known = best.setdefault(cell["steps"], cell)
        if cell["scores"].get(metric, float("inf")) < known["scores"].get(metric, float("inf")):
            best[cell["steps"]] = cell
    reference = _name(table["settings"].get("reference"))
    return [
        result
        for steps in sorted(best)
        for result in _eval_results(scores_of_cell(table, best[steps]), record, reference)
    ]


def _file_results(scores: dict, record: dict) -> list[EvalResult]:
    return _eval_results(scores_of_file(scores), record, _name(scores.get("reference")))


def _eval_results(scores: list[Score], record: dict, reference: str) -> list[EvalResult]:
    options = record.get("options") or {}
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=options.get("dataset_name") or "imagefolder",
            dataset_name=reference,
            metric_type=score.key,
            metric_value=score.value,
            metric_name=f"{score.label} ({score.detail}; {score.extractor})",
            metric_args={
                "num_generated": score.num_generated,
                "num_reference": score.num_reference,
                "num_inference_steps": score.steps,
                "scheduler": score.scheduler,
                "feature_extractor": score.extractor,
                "source": score.source,
            },
        )
        for score in scores
    ]


def _with_metadata(text: str, results: list[EvalResult], name: str) -> str:
    """The card with `results` in place of those that an earlier call wrote; a card without metadata stays without."""
    if not text.startswith("---"):
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data  # a ModelCardData, whose attributes the type of the base class lacks
    kept = [result for result in data.eval_results or [] if "feature_extractor" not in (result.metric_args or {})]
    results = kept + results
    data.eval_results = results or None
    data.model_name = (data.model_name or name) if results else None
    data.metrics = sorted({result.metric_type for result in results}) or None
    return str(card)


def _dataset_name(record: dict) -> str:
    return (record.get("dataset") or {}).get("name") or "training images"


def _name(path: str | None) -> str:
    return Path(path).name if path else "reference images"
