"""An average of any length from a run's snapshots, as a pipeline like the run's (Karras et al. 2024, section 3.2)."""

# K snapshots

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from trainkit.atomic import write_json
from trainkit.diffusion.power_profiles import LONGEST, combination, gamma_of
from trainkit.errors import UserError, one_line
from trainkit.sampling.pipeline import PIPELINE_PARTS
from trainkit.training.averages.power_ema import FOLDER, snapshot_files

FLAG = "--model_dir"
PARTS = {"unet": "", "vector_embedding": "class_embedding."}  # folder of the pipeline -> prefix in training
TIME_TABLE = "time_proj.weight"  # of a few-step student (`with_time_table`)
OF_OTHER_WEIGHTS = ("samples.png",)
MISSING_LIMIT = 0.1  # of the profile
ROUNDING_LIMIT = 3.0  # times that of a single snapshot
RECORD_NAME = "reconstruction.json"


class Snapshots:
    """The snapshots of a run up to `step` (default: the last). Weighted sums of them are averages of other lengths.

    Only headers are read until weights are needed.

    Raises:
        UserError: there are no snapshots, or one is damaged.
    """

    def __init__(self, folder: Path, step: int | None = None):
        self.folder = folder
        files = snapshot_files(folder)
        if not files:
            raise UserError(
                f"{FLAG} {folder} holds no {FOLDER}: train with --ema_power_lengths 0.05 0.1 --ema_snapshot_steps 1000"
            )
        known = sorted(set(files.values()))
        self.step = known[-1] if step is None else step
        if self.step not in known:
            raise UserError(
                f"--step {step}: {folder} has snapshots of steps {', '.join(map(str, known))}; use one of these"
            )
        self.files = [file for file, of_step in files.items() if of_step <= self.step]
        self.opened = [_opened(file) for file in self.files]
        metadata = [opened.metadata() for opened in self.opened]
        self.steps = np.array([int(each["step"]) for each in metadata])
        self.tracked = sorted({float(each["sigma_rel"]) for each in metadata})
        self.gammas = np.array([gamma_of(float(each["sigma_rel"])) for each in metadata])
        self.shapes = _shapes(self.opened[-1])
        for file, opened in zip(self.files, self.opened, strict=True):
            difference = self.shapes.items() ^ _shapes(opened).items()
            if difference:
                name = min(difference)[0]
                raise UserError(
                    f"{FLAG}: {file} and {self.files[-1].name} are of different models ({name}); remove one"
                )

    def coefficients(self, sigma_rel: float) -> tuple[np.ndarray, float]:
        """The weight of each snapshot (K,) in the average of `sigma_rel` at `step`, and the error.

        The error is relative to the profile, 0 to 1.

        Raises:
            UserError: the snapshots cannot approximate this length.
        """
        try:
            found, missing = combination(self.steps, self.gammas, self.step, gamma_of(sigma_rel))
        except ValueError as error:
            raise UserError(f"--sigma_rel {error}") from None
        rounding = float(np.sqrt(np.square(found).sum()))
        if missing > MISSING_LIMIT or rounding > ROUNDING_LIMIT:
            given = self.reachable()
            raise UserError(
                f"--sigma_rel {sigma_rel:g}: {len(self.files)} snapshots up to step {self.step} miss {missing:.0%} of "
                f"its profile and multiply their rounding error by {rounding:.1f}; use {min(given):g} to "
                f"{max(given):g}, or train with more snapshots"
            )
        return found, missing

    def reachable(self) -> list[float]:
        """The lengths that the snapshots can approximate, in steps of 0.005, and the tracked ones, ascending."""
        found = []
        for sigma_rel in [*np.arange(0.005, LONGEST, 0.005).round(3).tolist(), *self.tracked]:
            coefficients, missing = combination(self.steps, self.gammas, self.step, gamma_of(sigma_rel))
            if missing <= MISSING_LIMIT and np.square(coefficients).sum() <= ROUNDING_LIMIT**2:
                found.append(sigma_rel)
        return sorted({*found, *self.tracked})

    def average(self, name: str, coefficients: np.ndarray) -> torch.Tensor:
        """The weighted sum of the snapshots of the tensor `name`, float32, summed in float64. Raises `UserError`."""
        if name not in self.shapes:
            raise UserError(f"{FLAG} {self.folder}: its snapshots are of another model than unet/ ({name} is missing)")
        newest = self.opened[-1].get_tensor(name)
        if not newest.is_floating_point():
            return newest
        total = torch.zeros(newest.shape, dtype=torch.float64)
        for opened, coefficient in zip(self.opened, coefficients.tolist(), strict=True):
            total.add_(opened.get_tensor(name).double(), alpha=coefficient)
        return total.float()

    def averages(
        self, prefix: str, saved: dict[str, torch.Tensor], coefficients: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """The averages of the tensors that a part of the pipeline has `saved`; `prefix` is before their names.

        The time table of a few-step student stays as it is: it is not trained, and no snapshot has it.
        """
        return {
            name: tensor if name == TIME_TABLE else self.average(prefix + name, coefficients)
            for name, tensor in saved.items()
        }

    def load_into(self, module: torch.nn.Module, part: str, coefficients: np.ndarray) -> None:
        """Load the average into `module`, which is the `part` of a pipeline (a key of `PARTS`)."""
        module.load_state_dict(self.averages(PARTS[part], module.state_dict(), coefficients))


def save_reconstruction(snapshots: Snapshots, sigma_rel: float, output_dir: Path, record: dict) -> dict:
    """Save the pipeline of the run with the average of `sigma_rel` in `output_dir`, staged, then renamed.

    Everything except the weights is copied. reconstruction.json records the snapshots and their weights, and `record`;
    it is also returned.
    """
    coefficients, missing = snapshots.coefficients(sigma_rel)
    record = {
        "sigma_rel": sigma_rel,
        "step": snapshots.step,
        "profile_missing": missing,
        "coefficients": dict(zip((file.name for file in snapshots.files), coefficients.tolist(), strict=True)),
    } | record
    staging = output_dir.absolute().with_name(f".tmp-{output_dir.absolute().name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name in set(PIPELINE_PARTS) - set(OF_OTHER_WEIGHTS):
            source = snapshots.folder / name
            if source.is_dir():
                shutil.copytree(source, staging / name)
            elif source.is_file():
                shutil.copy2(source, staging / name)
        if not any((staging / "unet").glob("*.safetensors")):
            raise UserError(f"{FLAG} {snapshots.folder}: unet/ has no safetensors weights to replace")
        for part, prefix in PARTS.items():
            for file in sorted((staging / part).glob("*.safetensors")):
                averages = snapshots.averages(prefix, load_file(file), coefficients)
                save_file(averages, file, metadata={"format": "pt"})
        with (staging / "README.md").open("a", encoding="utf-8") as card:
            card.write(
                f"\n## Average\n\nThe weights are the power-function average of sigma_rel {sigma_rel:g} at step "
                f"{snapshots.step} (Karras et al. 2024), reconstructed from {len(coefficients)} snapshots.\n"
            )
        write_json(staging / RECORD_NAME, record)
        if output_dir.exists():
            output_dir.rmdir()
        staging.rename(output_dir)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error.strerror}): choose another") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return record


def _opened(file: Path):
    try:
        opened = safe_open(file, "pt")
        metadata = opened.metadata() or {}
        int(metadata["step"]), gamma_of(float(metadata["sigma_rel"])), json.loads(metadata["config"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{FLAG}: {file} is truncated or damaged ({one_line(error)}); delete it, the others may suffice"
        ) from None
    return opened


def _shapes(opened) -> dict[str, tuple[int, ...]]:
    return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
