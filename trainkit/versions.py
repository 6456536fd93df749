"""The code and packages that a run used."""

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainkit import __version__

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "diffusers", "accelerate", "datasets", "transformers", "huggingface_hub")


def versions() -> dict[str, str]:
    """Versions of Python, of this code and of the packages whose versions can change a result."""
    found = {"python": platform.python_version(), "trainkit": __version__}
    for name in PACKAGES:
        try:
            found[name] = _installed(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def _installed(name: str) -> str:
    """The version of a package, which the import system takes milliseconds to find."""
    return version(name)


@functools.cache
def git_commit() -> str | None:
    """The commit of this code, with `+` after it if files were changed since; None outside a clone."""
    if not (ROOT / ".git").exists():  # git would look in the folders above
        return None
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
