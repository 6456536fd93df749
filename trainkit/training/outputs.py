"""What a run shows while it goes on."""

import numpy as np

from trainkit.sampling.grid import image_grid, save_image


def write_preview(run, samples: np.ndarray, columns: int | None = None) -> None:
    """Write a grid of `samples` (N, H, W, C) uint8, the same on every rank: samples/<step>.png and samples.png."""
    if not run.accelerator.is_main_process:
        return
    grid = image_grid(samples, columns)
    with run.writing("samples.png"):
        (run.output_dir / "samples").mkdir(exist_ok=True)
        save_image(grid, run.output_dir / "samples" / f"{run.step:07d}.png")
        save_image(grid, run.output_dir / "samples.png")
        run.log.image("samples", grid, run.step)
