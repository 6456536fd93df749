"""Pretrain on a little data, then fine-tune on much: how many images does that save?

    python tools/fetch_images.py fashion_mnist data/fashion --limit 6000
    python benchmarks/transfer.py --subset half_of_classes --images 10000 --pretraining_images 10000

A model is trained from scratch on a tenth of the images (`--subset tenth`), or on the first half of the classes
(`half_of_classes`). From it, models are fine-tuned on all images, with --pretrained_model_name_or_path, for a half and
a quarter of `--images`. Beside them, models are trained from scratch for `--images`, for half of them, and for as many
as pretraining and the half together. All else is train_unconditional.py's defaults, the rate of fine-tuning aside.
Samples are scored by KID against held-out images, as benchmarks/recipes.py does. Finished runs are kept in
OUTPUT_DIR/runs.jsonl: the same command goes on after a stop.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from recipes import RunOptions, kept, own_folder, run_folder, tabled, trained
from trainkit.errors import run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options

BATCH_SIZE = 16  # the default
PRETRAINED = "pretraining"


@dataclass
class BenchmarkOptions(RunOptions):
    """benchmark"""

    subset: str = option("tenth", "what is pretrained on", choices=("tenth", "half_of_classes"))
    images: int = option(10_000, "images that training from scratch sees")
    pretraining_images: int = option(10_000, "images that pretraining sees, the same few again and again")
    fine_tuning_rate: float = option(1e-3, "learning rate of fine-tuning")


def main() -> None:
    options = parse_options(BenchmarkOptions, __doc__)
    output_dir = own_folder(options, "transfer", subset=options.subset, rate=options.fine_tuning_rate)
    subset = subset_of(Path(options.data_dir) / "train", options.subset, output_dir / "subset")
    whole, half, quarter = (options.images // (BATCH_SIZE * part) for part in (1, 2, 4))
    pretraining = options.pretraining_images // BATCH_SIZE
    steps = {
        PRETRAINED: pretraining,
        "from scratch": whole,
        "from scratch, half": half,
        "from scratch, as many in all": pretraining + half,
        "fine-tuned, half": half,
        "fine-tuned, quarter": quarter,
    }

    def measure(seed: int) -> None:
        pretrained = str(run_folder(output_dir, PRETRAINED, seed, pretraining))
        fine_tuning = [
            *("--pretrained_model_name_or_path", pretrained),
            *("--learning_rate", str(options.fine_tuning_rate)),
        ]
        flags = {PRETRAINED: ["--train_data_dir", str(subset)], "fine-tuned": fine_tuning}
        for name, count in steps.items():
            if (name, seed, count) not in kept(output_dir):
                run = trained(options, name, flags.get(name.partition(",")[0], []), seed, count, output_dir)
                print(json.dumps(run), flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(measure, options.seeds))
    table = tabled(steps, kept(output_dir))
    (output_dir / "table.md").write_text(table)
    print(table)


def subset_of(images: Path, which: str, folder: Path) -> Path:
    """A folder of links to every tenth image of each class, or to all images of the first half of the classes."""
    shutil.rmtree(folder, ignore_errors=True)
    classes = sorted(path for path in images.iterdir() if path.is_dir())
    for path in classes if which == "tenth" else classes[: len(classes) // 2]:
        (folder / path.name).mkdir(parents=True)
        for file in sorted(path.iterdir())[:: 10 if which == "tenth" else 1]:
            (folder / path.name / file.name).symlink_to(file.resolve())
    return folder


if __name__ == "__main__":
    run_script(main)
