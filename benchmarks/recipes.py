"""Which settings are best for the same time? Trains each of them on real images for as long, and scores the samples.

    python tools/fetch_images.py fashion_mnist data/fashion --limit 6000
    python benchmarks/recipes.py

An arm is train_unconditional.py's defaults with a few flags changed; `diffusers` is recipes/diffusers_defaults.yaml.
All arms train the same UNet, one thread each, `--jobs` at a time. How many steps fit into `--seconds` is measured
first, once for all arms of one optimizer and batch size: a busy moment later on costs no arm its steps. An arm may
have another share of the time: `--arms diffusers default@0.33`. Samples are made by the saved pipeline's default
scheduler in 20 steps and scored by KID against held-out images. Finished runs are kept in OUTPUT_DIR/runs.jsonl, so
that the same command goes on after a stop. The table is printed, and written to OUTPUT_DIR/table.md; samples.png
beside it has a strip of samples an arm.
"""

import itertools
import json
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainkit.errors import UserError, run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options

ROOT = Path(__file__).resolve().parent.parent
HEAD = 18  # pixels above a strip of samples
CALIBRATION_STEPS, CALIBRATION_TAIL = 120, 100  # steps of a calibration, and the last of them that are timed
# what is predicted, over every noise schedule: each is accepted, and saved with schedulers that sample it
PREDICTIONS = {"epsilon": "epsilon", "sample": "sample", "v": "v_prediction"}
SCHEDULES = {"linear": "linear", "scaled": "scaled_linear", "cosine": "squaredcos_cap_v2", "sigmoid": "sigmoid"}
WEIGHTS = {"min-SNR": "min_snr", "soft min-SNR": "soft_min_snr", "EDM weight": "edm"}
ZERO_SNR = ["--rescale_betas_zero_snr"]
FLOW = ["--prediction_type", "flow_prediction"]
OBJECTIVES = {"flow": FLOW}
for prediction, schedule in itertools.product(PREDICTIONS, SCHEDULES):
    flags = ["--prediction_type", PREDICTIONS[prediction], "--ddpm_beta_schedule", SCHEDULES[schedule]]
    OBJECTIVES[f"{prediction}, {schedule}"] = flags
    if prediction == "v":
        OBJECTIVES[f"v, {schedule}, zero SNR"] = flags + ZERO_SNR
    if prediction == "sample":  # whose own weight is 0 where the SNR is
        OBJECTIVES[f"sample, {schedule}, zero SNR, EDM weight"] = flags + ZERO_SNR + ["--loss_weighting", "edm"]
        OBJECTIVES[f"sample, {schedule}, soft min-SNR"] = flags + ["--loss_weighting", "soft_min_snr"]
WEIGHTED = {
    f"{name}, {weight}": ["--prediction_type", prediction, "--loss_weighting", WEIGHTS[weight]]
    for (name, prediction), weight in itertools.product((PREDICTIONS | {"flow": "flow_prediction"}).items(), WEIGHTS)
}
ARMS = (
    OBJECTIVES
    | WEIGHTED
    | {
        "default": [],
        "diffusers": ["--config", str(ROOT / "recipes/diffusers_defaults.yaml")],
        "gamma 1": ["--loss_weighting", "soft_min_snr", "--snr_gamma", "1"],
        "gamma 20": ["--loss_weighting", "soft_min_snr", "--snr_gamma", "20"],
        "logit-normal": ["--timestep_sampling", "logit_normal"],
        "flow, logit-normal": [*FLOW, "--timestep_sampling", "logit_normal"],
        "EDM": ["--timestep_sampling", "edm_lognormal", "--loss_weighting", "edm"],
        "shift 0.5": ["--noise_shift", "0.5"],
        "AdamW 1e-3": ["--optimizer", "adamw", "--learning_rate", "1e-3"],
        "AdamW 2e-3": ["--optimizer", "adamw", "--learning_rate", "2e-3"],
        "rate 1e-3": ["--learning_rate", "1e-3"],
        "rate 5e-3": ["--learning_rate", "5e-3"],
        "rate 1e-2": ["--learning_rate", "1e-2"],
        "batch 32": ["--train_batch_size", "32"],
        "batch 64": ["--train_batch_size", "64"],
        "EMA 0.99": ["--ema_max_decay", "0.99"],
        "EMA 0.999": ["--ema_max_decay", "0.999"],
        "EMA power 0.6": ["--ema_power", "0.6"],
        "no EMA": ["--no_use_ema"],
    }
)


@dataclass
class RunOptions:
    """runs: what all of them share"""

    data_dir: str = option("data/fashion", "folder that tools/fetch_images.py made: train/ and heldout/")
    seeds: list[int] = option([0, 1, 2], "seeds of the weights, the order and the noise of training", nargs="+")
    unet: str = option(str(ROOT / "recipes/mnist_unet"), "config of the UNet; its channels follow the images")
    num_images: int = option(500, "samples to a score")
    jobs: int = option(2, "runs at a time, a thread each")
    output_dir: str | None = option(
        None, "folder for runs, samples and the table; default: benchmark-runs/<script>-<name of --data_dir>"
    )


@dataclass
class BenchmarkOptions(RunOptions):
    """benchmark"""

    arms: list[str] = option(
        ["default", "default@0.33", "diffusers", "flow", "v, cosine"],
        "which settings, `all`, `objectives` (every prediction over every schedule), `weights` (every prediction with "
        "every weight), or NAME@SHARE of the time",
        nargs="+",
    )
    seconds: float = option(120.0, "seconds of training each run gets, on one thread")


def main() -> None:
    options = parse_options(BenchmarkOptions, __doc__)
    groups = {("all",): ARMS, ("objectives",): OBJECTIVES, ("weights",): WEIGHTED}
    named = groups.get(tuple(options.arms), options.arms)
    arms = [(name, *split_share(name)) for name in named]
    output_dir = own_folder(options, "recipes")
    done = kept(output_dir)
    steps = {}
    for name, arm, share in arms:
        steps[name] = max(1, round(options.seconds * share * steps_per_second(options, arm, output_dir)))

    jobs = [
        (name, ARMS[arm], seed)
        for seed in options.seeds
        for name, arm, _ in arms
        if (name, seed, steps[name]) not in done
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        for result in pool.map(lambda job: trained(options, *job, steps[job[0]], output_dir), jobs):
            print(json.dumps(result), flush=True)
    table = tabled(steps, kept(output_dir))
    (output_dir / "table.md").write_text(table)
    pictured(steps, kept(output_dir), output_dir).save(output_dir / "samples.png")
    print(table)


def own_folder(options: RunOptions, script: str, **more) -> Path:
    """The folder of the runs, with unet/config.json for the channels of the images.

    Raises `UserError` for one that holds runs of other images, another UNet or score.
    """
    default = Path("benchmark-runs") / f"{script}-{Path(options.data_dir).resolve().name}"
    folder = Path(options.output_dir) if options.output_dir else default
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"data_dir": options.data_dir, "unet": options.unet, "num_images": options.num_images} | more
    file = folder / "settings.json"
    if file.is_file() and (held := json.loads(file.read_text())) != settings:
        raise UserError(f"--output_dir {folder} holds runs of other settings ({held}): give another folder")
    file.write_text(json.dumps(settings))
    channels = dict.fromkeys(("in_channels", "out_channels"), len(first_image(options).getbands()))
    config = json.loads(Path(options.unet, "config.json").read_text())
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "unet/config.json").write_text(json.dumps(config | channels))
    return folder


def split_share(name: str) -> tuple[str, float]:
    """`default@0.33` -> ("default", 0.33). Raises `UserError`."""
    arm, _, share = name.partition("@")
    if arm not in ARMS:
        raise UserError(f"--arms {arm} is not one of: {', '.join(ARMS)}")
    try:
        return arm, float(share or 1)
    except ValueError:
        raise UserError(f"--arms {name}: the share after @ must be a number") from None


def kept(output_dir: Path) -> dict[tuple[str, int, int], dict]:
    """The finished runs of `output_dir` by (name, seed, steps)."""
    file = output_dir / "runs.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    runs = [json.loads(line) for line in lines]
    return {(run["name"], run["seed"], run["steps"]): run for run in runs}


def steps_per_second(options, arm: str, output_dir: Path) -> float:
    """Speed of an arm alone on one thread, measured once a kind of step and kept in `output_dir`."""
    file = output_dir / "speed.json"
    speeds = json.loads(file.read_text()) if file.is_file() else {}
    kind = "adamw" if "adamw" in ARMS[arm] or arm == "diffusers" else "muon"
    kind += next((f", batch {ARMS[arm][at + 1]}" for at, flag in enumerate(ARMS[arm]) if "batch" in flag), "")
    if kind not in speeds:
        run_dir = output_dir / "calibration"
        steps = ["--max_train_steps", str(CALIBRATION_STEPS), "--logging_steps", str(CALIBRATION_TAIL)]
        last = train(options, ARMS[arm], run_dir, 0, steps)[-1]
        speeds[kind] = last["images_per_s"] / (last["images"] / last["step"])
        file.write_text(json.dumps(speeds, indent=1))
    return speeds[kind]


def run_folder(output_dir: Path, name: str, seed: int, steps: int) -> Path:
    return output_dir / re.sub("[^a-z0-9.@]+", "-", f"{name} {seed} {steps}".lower())


def trained(options, name: str, flags: list[str], seed: int, steps: int, output_dir: Path) -> dict:
    """Train and score one run; its numbers are appended to runs.jsonl."""
    scoring = [
        *("--score_steps", str(10**9), "--score_images", str(options.num_images), "--eval_batch_size", "100"),
        *("--validation_data_dir", f"{options.data_dir}/heldout"),
    ]
    run_dir = run_folder(output_dir, name, seed, steps)
    log = train(options, [*flags, "--max_train_steps", str(steps)], run_dir, seed, scoring)
    result = {"name": name, "seed": seed, "steps": steps}
    for line in log:
        result |= {key: line[key] for key in ("images", "kid", "kid_std", "validation_loss") if key in line}
    with open(output_dir / "runs.jsonl", "a") as file:
        file.write(json.dumps(result) + "\n")
    return result


def train(options, flags: list[str], run_dir: Path, seed: int, more_flags: list[str]) -> list[dict]:
    """Run train_unconditional.py with `flags`; the lines of its metrics.jsonl. `more_flags` win over all others."""
    command = [
        *(sys.executable, str(ROOT / "train_unconditional.py")),
        *("--train_data_dir", f"{options.data_dir}/train", *flags),
        *("--model_config_name_or_path", str(run_dir.parent / "unet"), "--image_mode", first_image(options).mode),
        *("--resolution", str(min(first_image(options).size)), "--center_crop"),
        *("--output_dir", str(run_dir), "--overwrite_output_dir", "--seed", str(seed), "--cpu_threads", "1"),
        *("--mixed_precision", "auto", "--logger", "none", "--checkpointing_steps", "0", "--num_epochs", "1000000"),
        *("--preview_steps", str(10**9), "--save_model_epochs", str(10**9)),
        *("--ddpm_num_inference_steps", "20", *more_flags),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if finished.returncode:
        raise UserError(f"{' '.join(command)} failed: {finished.stderr[-2000:]}")
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def first_image(options):
    from PIL import Image

    file = next(iter(sorted(Path(options.data_dir, "train").rglob("*.png"))), None)
    if file is None:
        raise UserError(f"--data_dir {options.data_dir}: no train/**/*.png; python tools/fetch_images.py makes it")
    return Image.open(file)


def scored(steps: dict[str, int], runs: dict) -> list[tuple[float, str, list[dict]]]:
    """Mean KID, name and runs of each arm, best first; `steps` has the arms and the length of their runs."""
    found = []
    for name, length in steps.items():
        of_arm = [run for (arm, _, count), run in sorted(runs.items()) if arm == name and count == length]
        if of_arm:
            found.append((statistics.mean(run["kid"] for run in of_arm), name, of_arm))
    return sorted(found, key=lambda arm: arm[0])


def tabled(steps: dict[str, int], runs: dict) -> str:
    """A Markdown table of the arms, best first: mean over seeds and their spread (standard deviation)."""
    lines = ["| arm | KID | spread over seeds | seeds | images |", "|---|---|---|---|---|"]
    for kid, name, of_arm in scored(steps, runs):
        spread = statistics.stdev(run["kid"] for run in of_arm) if len(of_arm) > 1 else float("nan")
        lines.append(f"| {name} | {kid:.3f} | {spread:.3f} | {len(of_arm)} | {of_arm[0]['images']:,} |")
    return "\n".join(lines) + "\n"


def pictured(steps: dict[str, int], runs: dict, output_dir: Path):
    """A picture with the first samples of each arm's first seed, best arm first, two arms beside each other."""
    from PIL import Image, ImageDraw

    strips = []
    for kid, name, (first, *_) in scored(steps, runs):
        grid = Image.open(run_folder(output_dir, name, first["seed"], first["steps"]) / "samples.png").convert("RGB")
        strip = Image.new("RGB", (grid.width, HEAD + grid.height // 5), "white")
        strip.paste(grid, (0, HEAD))
        ImageDraw.Draw(strip).text((4, 4), f"{name}   KID {kid:.3f}", fill="black")
        strips.append(strip)
    width, height = strips[0].size
    picture = Image.new("RGB", (2 * width, height * -(-len(strips) // 2)), "white")
    for number, strip in enumerate(strips):
        picture.paste(strip, (number % 2 * width, number // 2 * height))
    return picture


if __name__ == "__main__":
    run_script(main)
