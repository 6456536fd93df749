"""Turn a folder of images, or a dataset of the Hub, into a prepared dataset that training opens at once.

    python prepare_dataset.py --train_data_dir photos --resolution 64 --center_crop --output_dir photos-64
    python train_unconditional.py --train_data_dir photos-64 --output_dir model

Run the same command again after it was stopped, or after files were added: only what is missing is done.
The training scripts take the raw folder too, and then prepare it in the cache by themselves. See docs/data.md.
"""

from dataclasses import dataclass

from trainkit.config import option, parse_options
from trainkit.errors import UserError, run_script
from trainkit.options import ImageOptions, SourceOptions


@dataclass
class OutputOptions:
    """output: where the prepared dataset goes"""

    output_dir: str | None = option(None, "folder for the prepared dataset, a new or empty one (required)")


@dataclass
class Options(SourceOptions, ImageOptions, OutputOptions):
    pass


def main() -> None:
    options = parse_options(Options, __doc__.partition("\n")[0])
    if options.output_dir is None:
        raise UserError("--output_dir is missing; give a folder for the prepared dataset")
    from trainkit.data.prepare import prepare
    from trainkit.data.settings import settings_from_options
    from trainkit.data.sources import open_source

    settings = settings_from_options(options)
    prepare(open_source(options), settings, options.output_dir, options.num_proc)


if __name__ == "__main__":
    run_script(main)
