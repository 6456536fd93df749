"""What the project's own modules are and what they import, read from their source without running it."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("trainkit", "pipelines")


def scripts() -> list[Path]:
    """The scripts at the top of the tree: train_unconditional.py and its like."""
    return sorted(ROOT.glob("*.py"))


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for the scripts and everything in the packages."""
    files = [*scripts(), *(file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))]
    return {_dotted(file): file for file in files}


def _dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names that `source` imports anywhere, late imports too: `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


@cache
def imports_of(module: str, file: Path) -> set[str]:
    return imports(file.read_text(), module, file.name == "__init__.py")


def reachable(module: str) -> set[str]:
    """`module` and every module of ours that it imports, directly or through others."""
    known, found, waiting = modules(), set(), [module]
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found.add(name)
            waiting.extend(imports_of(name, known[name]))
    return found
