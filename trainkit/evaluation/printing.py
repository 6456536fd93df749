"""What evaluate_samples.py prints of its scores: a line for each, with everything that it depends on."""

from trainkit.evaluation.report import describe_sampling, format_score, format_share


def print_scores(result: dict, metrics: list[str]) -> None:
    """One line per score, with everything that it depends on."""
    for name in metrics:
        print(
            f"{name.upper()} {format_score(result['scores'], name)} | "
            f"noise floor {format_score(result['noise_floor'], name)} "
            f"({result['num_noise_floor']} real against {result['num_noise_floor']} real) | "
            f"{result['num_generated']} generated, {result['num_reference']} reference | "
            f"{describe_sampling(result['sampling'])} | {result['feature_extractor']}, weights "
            f"{result['weights_sha256'][:12]} | resize {result['resize']} | {result['note']}"
        )
    for flag, splits in result["splits"].items():
        print(f"{flag}: images of the splits {splits} are all used; give the folder of one split to use it alone")
    if result["same_images"]:
        print("WARNING: --generated and --reference hold the same images")
    for name, why in list(result["unreadable_reference"].items())[:10]:
        print(f"--reference: {name} cannot be read ({why})")
    if result["unreadable_reference"]:
        print(f"--reference: left out {len(result['unreadable_reference'])} images that cannot be read")


def print_paired(result: dict) -> None:
    """One line for the samples against their true images."""
    found = result["paired"]
    if not found:
        return
    line = f"PSNR {format_score(found, 'psnr')} dB"
    if "ssim" in found:
        line += f", SSIM {format_score(found, 'ssim')}"
    if "psnr_of_mean" in found:
        line += (
            f" | PSNR of the mean over the samples of a condition {found['psnr_of_mean']:.4g} dB, standard deviation "
            f"over them {found['deviation']:.3g} of 255"
        )
    print(f"{line} | {found['n']} samples of {found['num_conditions']} conditions against the true images")


def print_memorization(result: dict) -> None:
    """One line per space in which copies were searched."""
    found = result["memorization"]
    for space in ("features", "pixels") if found else ():
        values = found[space]
        line = (
            f"MEMORIZATION in {space}: {values['num_copies']} of {result['num_generated']} samples equal a reference "
            "image"
        )
        if "share_too_near" in values:
            line += (
                f"; {values['share_too_near']:.1%} are nearer to one than 99 % of {values['num_held_out']} held-out "
                "images (about 1 % is expected)"
            )
        print(line)


def print_conditioning(result: dict, metrics: list[str]) -> None:
    """One line per class and per kind of condition, with the chance level and the accuracy of the classifier."""
    for label, of_class in list((result.get("per_class") or {}).items())[:20]:
        values = ", ".join(
            f"{name.upper()} {format_score(of_class['scores'], name)} "
            f"(noise floor {format_score(of_class['noise_floor'], name)})"
            for name in metrics
        )
        print(
            f"class {label}: {values} | {of_class['num_generated']} generated, {of_class['num_reference']} reference "
            f"| {of_class['note']}"
        )
    if accuracy := result.get("accuracy"):
        print(
            f"ACCURACY {format_share(accuracy)} of {accuracy['n']} samples show the requested class | chance "
            f"{accuracy['chance']:.1%} | the classifier is right on {format_share(accuracy['classifier'])} of "
            f"{accuracy['classifier']['n']} real images of {accuracy['trained_on']} that it was not trained on | "
            f"{accuracy['num_without_label']} samples without a class left out"
        )
    if retrieval := result.get("retrieval"):
        print(
            f"RETRIEVAL {format_share(retrieval)} of {retrieval['n']} samples are nearest to the real images of "
            f"their caption, among {retrieval['num_captions']} captions | chance {retrieval['chance']:.1%} | "
            f"{retrieval['num_not_judged']} samples whose caption no real image has left out"
        )
