"""Export the page as a Hugging Face Space: its code, requirements, card and models, in one folder."""

import ast
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

from trainkit.atomic import TEMPORARY_PREFIX, write_text
from trainkit.errors import UserError
from trainkit.sampling.load import HUB_FILES, PICKLED, find_pipeline
from trainkit.sampling.weights import CONDITIONAL_FILES

SCRIPT, CONFIG, REQUIREMENTS = "app.py", "space.yaml", "requirements.txt"
PACKAGES = ("trainkit", "pipelines")
GRADIO, GRADIO_VERSION = "gradio>=6,<7", "6.31.0"  # the version that the page was tried with
FLAG = "--export_space"


def export_space(root: Path, names: Sequence[str], folder: Path) -> str:
    """Write the Space of the pipelines `names` into the new `folder`; returns what to do with it.

    `root` is the folder of app.py. A local pipeline is copied, without code and checkpoints; of a Hub id the Space
    keeps the id. The folder appears complete or not at all.

    Raises:
        UserError: the folder is not empty or cannot be written, or a pipeline cannot be opened.
    """
    folder = folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{FLAG} {folder} is not empty: name a new folder")
    sources = {name: find_pipeline(name) for name in names}
    staging = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        _write(root, sources, staging)
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"{FLAG} {folder} cannot be written ({error.strerror or error})") from None
    return (
        f"{folder}: try it with `cd {folder} && python {SCRIPT}`; publish it with "
        f"`hf upload USER/{_title(sources).replace(' ', '-')} {folder} . --repo-type space`"
    )


def _write(root: Path, sources: dict[str, Path], folder: Path) -> None:
    files = needed_files(root, root / SCRIPT)
    for file in files:
        target = folder / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    opened = [_place(name, source, folder) for name, source in sources.items()]
    write_text(folder / CONFIG, yaml.safe_dump({"model_name_or_path": opened}))
    required = [*requirements(root / REQUIREMENTS, files), GRADIO]
    write_text(folder / REQUIREMENTS, "\n".join(required) + "\n")
    write_text(folder / "README.md", _card(sources, [name for name in opened if name in sources]))


def _place(name: str, source: Path, folder: Path) -> str:
    """What the Space opens for a model: its Hub id, or the path of a copy of its pipeline."""
    if not Path(name).is_dir():
        return name
    target = folder / "models" / source.resolve().name
    while target.exists():  # another folder of the same name
        target = target.with_name(f"{target.name}-2")
    found = {path for pattern in [*HUB_FILES, *CONDITIONAL_FILES] for path in source.glob(pattern)}
    if not any(path.suffix == ".safetensors" for path in found):
        found |= {path for pattern in PICKLED for path in source.glob(pattern)}
    for path in found:
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    return target.relative_to(folder).as_posix()


def needed_files(root: Path, script: Path) -> list[Path]:
    """`script` and the files of our packages that it imports, late and indirect imports too, sorted."""
    found: set[Path] = set()
    waiting = [script]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for name in imported_names(file):
            parts = name.split(".")
            if parts[0] in PACKAGES:
                # of a package its __init__.py, and for `from package import name` perhaps a module
                candidates = [root.joinpath(*parts[:end], "__init__.py") for end in range(1, len(parts) + 1)]
                candidates.append(root.joinpath(*parts).with_suffix(".py"))
                waiting += [candidate for candidate in candidates if candidate.is_file()]
    return sorted(found)


def imported_names(file: Path) -> set[str]:
    """The dotted names that a source file imports anywhere: `from a import b` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # relative imports are those of pipelines/, whose files import their siblings
            module = f"{file.parent.name}.{node.module}" if node.level else node.module
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def requirements(file: Path, sources: Iterable[Path]) -> list[str]:
    """The lines of a requirements file that the modules in `sources` need, without comments."""
    modules = {name.partition(".")[0] for source in sources for name in imported_names(source)}
    modules -= {*sys.stdlib_module_names, *PACKAGES}
    installed = packages_distributions()
    needed = {_normal(name) for module in modules for name in installed.get(module, [module])}
    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    needed.add("safetensors")  # diffusers reads the weights with it
    return [line for line in lines if line and _normal(re.split(r"[^\w.-]", line)[0]) in needed]


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _title(sources: dict[str, Path]) -> str:
    names = [source.resolve().name if Path(name).is_dir() else name.split("/")[-1] for name, source in sources.items()]
    return " and ".join(names)


def _card(sources: dict[str, Path], hub_ids: list[str]) -> str:
    """README.md of the Space; its head is the Space's configuration."""
    head = {
        "title": _title(sources),
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "app_file": SCRIPT,
        "pinned": False,
    } | ({"models": hub_ids} if hub_ids else {})
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {_title(sources)}\n\n"
        "A page to try an image diffusion model: choose scheduler, steps and seed, and see the images as they denoise."
        f"\n\nTo run it on your own machine: `pip install -r {REQUIREMENTS}`, then `python {SCRIPT}`.\n"
    )
