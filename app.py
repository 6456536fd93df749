#!/usr/bin/env python
"""Open a page in the browser to try saved pipelines.

    pip install "gradio>=6"
    python app.py --model_name_or_path ddpm-model-64
    python app.py --model_name_or_path ddpm-model-64 ddpm-model-64-4-steps     # side by side
    python app.py --model_name_or_path ddpm-model-64 --export_space my-space    # the files of a Hugging Face Space

Takes every pipeline that sample.py takes: unconditional, of classes, vectors, prompts or images, and few-step
students. Image i of the page is that of sample.py with the same settings. No code in a model's folder is executed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from trainkit.errors import UserError, run_script
from trainkit.options.fields import option
from trainkit.options.parsing import parse_options

SPACE_CONFIG = "space.yaml"  # in an exported folder: the options of the page


@dataclass
class ModelOptions:
    """models: what the page opens"""

    model_name_or_path: list[str] | None = option(
        None, "one or two folders of saved pipelines, or Hub ids; two are shown side by side", nargs="+"
    )


@dataclass
class ServerOptions:
    """server: where the page is served"""

    host: str | None = option(
        None, "address to listen on; 0.0.0.0: reachable from other machines; default: this machine alone"
    )
    port: int | None = option(None, "port to listen on; default: the first free one from 7860", within="[1, 65535]")
    share: bool = option(False, "also serve under a public address of gradio.live for a week")


@dataclass
class ExportOptions:
    """export: a Hugging Face Space"""

    export_space: str | None = option(
        None, "write what a Space needs into this new folder and exit: the page, its requirements and the models"
    )


@dataclass
class Options(ModelOptions, ServerOptions, ExportOptions):
    """The options of app.py."""


def main() -> None:
    words, exported = sys.argv[1:], Path(__file__).resolve().parent / SPACE_CONFIG
    if exported.is_file() and "--config" not in words:
        words = ["--config", str(exported), *words]
    options = parse_options(Options, __doc__, words)
    names = options.model_name_or_path or []
    if not 1 <= len(names) <= 2:
        raise UserError("--model_name_or_path: give one or two folders of saved pipelines, or Hub ids")
    if options.export_space is not None:
        from trainkit.app.space import export_space

        print(export_space(Path(__file__).resolve().parent, names, Path(options.export_space)))
        return
    from trainkit.app.serve import serve

    serve(names, options.host, options.port, options.share)


if __name__ == "__main__":
    run_script(main)
