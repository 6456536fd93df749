"""Images that memory should not hold: a temporary file that the processes of a machine share."""

# N images, B batch, H/W pixels, C channels

import contextlib
import math
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from trainkit.atomic import temporary_folder
from trainkit.errors import UserError, one_line
from trainkit.processes import on_main_process, wait_for_everyone


def spooled(accelerator: Accelerator, blocks: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """The images of `blocks`, together of `shape` (N, H, W, C), in a temporary file and not in memory. A collective.

    Each machine has one file, which its processes share. It has no name once they have opened it, so that nothing of
    it is left behind.

    Raises:
        UserError: the disk of the file is too small.
    """
    file = temporary_folder() / on_main_process(lambda: f"trainkit-samples-{secrets.token_hex(8)}")
    writes = accelerator.is_local_main_process
    try:
        if writes:
            _write(blocks, file, shape)
        else:
            for _ in blocks:
                pass
        wait_for_everyone()
        images = np.memmap(file, np.uint8, "r", shape=shape)
        wait_for_everyone()
    finally:
        if writes:
            with contextlib.suppress(OSError):  # Windows deletes no open file
                file.unlink(missing_ok=True)
    return images


def _write(blocks: Iterable[np.ndarray], file: Path, shape: tuple[int, ...]) -> None:
    size = math.prod(shape)

    def too_small(why: str) -> UserError:
        return UserError(
            f"the {shape[0]:,} samples need {size / 1e9:.1f} GB in {file.parent} ({why}); set TMPDIR to another "
            "folder, or give fewer --num_images"
        )

    if (free := shutil.disk_usage(file.parent).free) < size:
        raise too_small(f"{free / 1e9:.1f} GB are free")
    with open(file, "wb", buffering=0) as stream:
        for block in blocks:
            rest = memoryview(block.data).cast("B")
            try:
                while rest:
                    rest = rest[stream.write(rest) :]
            except OSError as error:
                raise too_small(one_line(error)) from None
