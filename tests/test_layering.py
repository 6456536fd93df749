"""Who may import whom: scripts stand on trainkit, which stands on pipelines, which stand on pip packages alone."""

import re
import sys
from importlib.metadata import packages_distributions

from source_tree import PACKAGES, ROOT, imports, imports_of, modules, reachable, scripts

# From the lowest up. What is in none, as a package that is about to be sorted in, is held by the others' rules alone.
LAYERS = (
    ("pipelines",),
    (
        "trainkit.errors",
        "trainkit.atomic",
        "trainkit.packages",
        "trainkit.locking",
        "trainkit.processes",
        "trainkit.terminal",
        "trainkit.options",
        "trainkit.versions",
    ),
    ("trainkit.data", "trainkit.diffusion"),
    ("trainkit.sampling",),
    ("trainkit.hub",),
    ("trainkit.evaluation",),
    ("trainkit.report",),
    ("trainkit.training",),
    ("trainkit.distillation",),
    ("trainkit.app",),
)
DATA_LAYERS = (
    (
        "trainkit.data.format",
        "trainkit.data.files",
        "trainkit.data.settings",
        "trainkit.data.account",
        "trainkit.data.faults",
        "trainkit.data.pairing",
    ),
    ("trainkit.data.images",),
    ("trainkit.data.sources",),
    ("trainkit.data.preparation", "trainkit.data.loading"),
    ("trainkit.data.cache",),
)
APART = (("trainkit.data.loading", "trainkit.data.preparation"),)  # the reader does not import the writer
# saved beside it
COMPANIONS = {"pipelines.conditional": ("pipelines.guidance", "pipelines.labels_and_vectors", "pipelines.prompts")}
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
    assert {"train_unconditional", "trainkit.data.cache", "trainkit.data.preparation.prepare"} <= reachable(
        "train_unconditional"
    )


def forbidden_imports(module: str, found: set[str]) -> list[str]:
    """What is wrong about a `module` of ours that imports the dotted names `found`, a line each."""
    script_names = {file.stem for file in scripts()}
    ours = {name for name in found if top(name) in PACKAGES}
    wrong = [f"{module} imports the script {name}" for name in found if top(name) in script_names]
    for layers in (LAYERS, DATA_LAYERS):
        own = _layer(module, layers)
        wrong += [f"{module} imports {name} from above" for name in ours if (_layer(name, layers) or 0) > (own or 99)]
    wrong += [
        f"{module} must not import {name}"
        for low, high in APART
        for name in ours
        if below(module, low) and below(name, high)
    ]
    if below(module, "pipelines"):
        allowed = PIPELINE_PACKAGES | set(sys.stdlib_module_names)
        wrong += [
            f"{module} imports {name}: a saved model would need it"
            for name in found
            if top(name) not in allowed and not below(name, *COMPANIONS.get(module, ()))
        ]
    return sorted(wrong)


def _layer(name: str, layers: tuple[tuple[str, ...], ...]) -> int | None:
    """1 for the lowest; None for what is in no layer."""
    return next((number for number, layer in enumerate(layers, 1) if below(name, *layer)), None)


def test_the_rules_find_what_breaks_them():
    assert forbidden_imports("trainkit.data.cache", {"train_unconditional"})
    assert forbidden_imports("trainkit.data.cache", {"trainkit.training.run"})
    assert forbidden_imports("trainkit.data.format", {"trainkit.data.cache"})
    assert forbidden_imports("trainkit.report.page", {"trainkit.training.log"})
    assert forbidden_imports("trainkit.evaluation.sweep", {"trainkit.report.write"})
    assert forbidden_imports("trainkit.data.loading.dataset", {"trainkit.data.preparation.shards"})
    assert forbidden_imports("trainkit.sampling.generate", {"trainkit.training.run"})
    assert forbidden_imports("trainkit.diffusion.unet", {"trainkit.data.loading.dataset", "trainkit.sampling.load"})
    assert forbidden_imports("pipelines.conditional", {"trainkit.errors"})
    assert forbidden_imports("pipelines.conditional", {"accelerate"})
    assert forbidden_imports("pipelines.guidance", {"pipelines.prompts.encode_prompts"})
    assert not forbidden_imports("trainkit.training.run", {"trainkit.evaluation.metrics", "pipelines.conditional"})


def test_imports_keep_to_their_layer():
    """Each layer imports from those below it, and from itself."""
    wrong = [
        line for module, file in modules().items() for line in forbidden_imports(module, imports_of(module, file))
    ]
    assert not wrong, "\n".join(wrong)


SHIPPED = [file for folder in (*PACKAGES, "tools", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))]


def test_nothing_imports_what_is_ruled_out():
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}: {FORBIDDEN[top(name)]}"
        for file in [*scripts(), *SHIPPED]
        for name in imports(file.read_text(encoding="utf-8"), file.stem)
        if top(name) in FORBIDDEN
    ]
    assert not wrong, "\n".join(wrong)


def test_tools_and_benchmarks_start_from_any_folder():
    """The scripts at the top are not installed: `python benchmarks/train.py` cannot import them."""
    top_level = {file.stem for file in scripts()}
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in SHIPPED
        for name in imports(file.read_text(encoding="utf-8"), file.stem)
        if top(name) in top_level
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_imported_is_required():
    required, peers = _required("requirements.txt"), _required("requirements-dev.txt")
    distributions = packages_distributions()
    ours = {*PACKAGES, *(file.stem for file in [*scripts(), *SHIPPED])}
    for file in [*scripts(), *SHIPPED]:
        for package in {top(name) for name in imports(file.read_text(), file.stem)} - {""}:
            if package not in ours and package not in sys.stdlib_module_names:
                installed_by = {_normal(name) for name in distributions.get(package, [package])}
                extra = {"benchmarks": peers, "app": _required("requirements-app.txt")}.get(file.parent.name, set())
                known = required | extra
                assert installed_by & known, f"{file.name} imports {package}: put it into requirements.txt"


def _required(file: str) -> set[str]:
    lines = (ROOT / file).read_text().splitlines()
    return {_normal(re.match(r"[\w.-]*", line)[0]) for line in lines if not line.startswith("#")}


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_no_module_of_ours_shadows_a_distribution():
    """Python looks in the folder of the script first: an `evaluate.py` here would hide the package of that name."""
    ours = {file.stem for file in scripts()} | {package for package in PACKAGES if (ROOT / package).is_dir()}
    others = {name for name, projects in packages_distributions().items() if set(projects) != {"trainkit"}}
    taken = others | set(sys.stdlib_module_names) | {"evaluate"}
    assert not ours & taken
