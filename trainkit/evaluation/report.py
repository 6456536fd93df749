"""What a score depends on, and whether it may be compared with published figures."""

from trainkit.evaluation.features import INCEPTION_SHA256

PUBLISHED_IMAGES = 50_000


def comparability(weights_sha256: str, num_generated: int, num_reference: int) -> str:
    """Whether a FID of so many images is comparable with published ones, and if not, why.

    Published FIDs use the Inception network and 50,000 samples against the statistics of the training set.
    """
    reasons = []
    if weights_sha256 != INCEPTION_SHA256:
        reasons.append("those use Inception features")
    for name, count in (("generated", num_generated), ("reference", num_reference)):
        if count < PUBLISHED_IMAGES:
            reasons.append(f"{count:,} {name} images, those use {PUBLISHED_IMAGES:,}")
    if reasons:
        return f"not comparable with published figures ({'; '.join(reasons)})"
    return "comparable with published FIDs of the same resize (clean-fid), if the reference is the training set"


def describe_sampling(record: dict | None) -> str:
    """Scheduler, steps and guidance of samples by the sampling.json next to them."""
    if not record:
        return "unknown sampler (no sampling.json)"
    scheduler = f"{record['scheduler_name']} ({record['scheduler']['class']})"
    guidance = record.get("guidance_scale")
    guided = "" if guidance is None else f", guidance {guidance:g}"
    return f"{scheduler}, {record['num_inference_steps']} steps{guided}"


def format_score(values: dict[str, float], name: str) -> str:
    """A score with its standard error (for KID of few images the deviation over subsets): `12.3 +- 0.4`."""
    if name not in values:
        return "unknown (too few images)"
    error = values.get(f"{name}_se", values.get(f"{name}_std"))
    return f"{values[name]:.4g}" + (f" +- {error:.2g}" if error is not None else "")


def format_share(found: dict) -> str:
    """A share with its 95 % interval."""
    low, high = found["interval"]
    return f"{found['share']:.1%} (95 % interval {low:.1%} to {high:.1%})"
