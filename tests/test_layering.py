"""Who may import whom: scripts stand on trainkit, which stands on pipelines, which stand on pip packages alone."""

import re
import sys
from importlib.metadata import packages_distributions

import pytest
from source_tree import PACKAGES, ROOT, imports, imports_of, modules, reachable, scripts

FOUNDATION = (
    "trainkit.data", "trainkit.diffusion", "trainkit.errors", "trainkit.config", "trainkit.atomic",
    "trainkit.packages", "trainkit.options", "trainkit.__version__", "pipelines",
)  # fmt: skip
PIPELINE_PACKAGES = {"torch", "diffusers", "transformers", "numpy", "PIL"}
FORBIDDEN = {
    "torchvision": "it has no CPU build to go with every torch",
    "pickle": "files that need it can run code; weights are safetensors",
    "cPickle": "see pickle",
    "dill": "see pickle",
    "cloudpickle": "see pickle",
}


def top(name: str) -> str:
    return name.partition(".")[0]


def below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_the_reader_sees_every_form_of_import():
    source = (
        "import a.b\nfrom c import d\nfrom . import e\nfrom ..f import g\n"
        "def late():\n    import h\ntry:\n    from i import j\nexcept ImportError:\n    pass\n"
    )
    found = imports(source, "trainkit.data.x")
    assert found >= {"a.b", "c.d", "trainkit.data.e", "trainkit.f.g", "h", "i.j"}
    assert "trainkit.data.e" in imports("from . import e", "trainkit.data", is_package=True)


def test_the_tree_is_found():
    assert {"train_unconditional", "trainkit.config", "trainkit.errors"} <= set(modules())
    assert {"train_unconditional", "trainkit.data.cache", "trainkit.data.preparation.prepare"} <= reachable(
        "train_unconditional"
    )


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_keep_to_their_layer(module):
    found = imports_of(module, modules()[module])
    script_names = {file.stem for file in scripts()}
    ours = {name for name in found if top(name) in {*PACKAGES, *script_names}}

    assert not {top(name) for name in found} & script_names, "a script is not a library: move what is shared"
    if below(module, "trainkit.data", "trainkit.diffusion"):
        above = {name for name in ours - {"trainkit"} if not below(name, *FOUNDATION)}
        assert not above, f"data/ and diffusion/ stand on nothing else of ours: {sorted(above)}"
    if below(module, "pipelines"):
        allowed = PIPELINE_PACKAGES | set(sys.stdlib_module_names) | {"pipelines"}
        foreign = {top(name) for name in found} - allowed
        assert not foreign, f"a saved model would need {sorted(foreign)}"
        assert module == "pipelines" or not ours, "a pipeline file travels alone"


SHIPPED = [file for folder in (*PACKAGES, "recipes", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", [*scripts(), *SHIPPED], ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_imports_what_is_ruled_out(file):
    for name in imports(file.read_text(), file.stem):
        assert top(name) not in FORBIDDEN, f"{file.name} imports {name}: {FORBIDDEN[top(name)]}"


def test_what_is_imported_is_required():
    required, peers = _required("requirements.txt"), _required("requirements-dev.txt")
    distributions = packages_distributions()
    ours = {*PACKAGES, *(file.stem for file in [*scripts(), *SHIPPED])}
    for file in [*scripts(), *SHIPPED]:
        for package in {top(name) for name in imports(file.read_text(), file.stem)} - {""}:
            if package not in ours and package not in sys.stdlib_module_names:
                installed_by = {_normal(name) for name in distributions.get(package, [package])}
                known = required | peers if file.parent.name == "benchmarks" else required
                assert installed_by & known, f"{file.name} imports {package}: put it into requirements.txt"


def _required(file: str) -> set[str]:
    lines = (ROOT / file).read_text().splitlines()
    return {_normal(re.match(r"[\w.-]*", line)[0]) for line in lines if not line.startswith("#")}


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_no_module_of_ours_shadows_a_distribution():
    """Python looks beside the script first, so that an `evaluate.py` here would hide the package of that name."""
    ours = {file.stem for file in scripts()} | {package for package in PACKAGES if (ROOT / package).is_dir()}
    taken = set(packages_distributions()) | set(sys.stdlib_module_names) | {"evaluate"}
    assert not ours & taken
