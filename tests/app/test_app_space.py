"""app.py: an exported Space, and what is said when something is missing."""

import shutil
import sys

import pytest
import yaml
from conftest import ROOT
from diffusers import DDPMPipeline, DDPMScheduler
from process_helpers import run_code, run_forked
from sampling_helpers import tiny_model
from source_tree import modules, reachable

from trainkit.app import space
from trainkit.app.space import export_space
from trainkit.errors import UserError
from trainkit.sampling.pipeline import save_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "stripes"
    save_pipeline(folder, DDPMPipeline(tiny_model(), DDPMScheduler()), "")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3/state.bin").write_text("large")
    return folder


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "my-space"
    export_space(ROOT, [str(model)], folder)
    return folder


@pytest.mark.slow
def test_the_space_has_the_code_the_model_and_no_more(exported, model):
    known = modules()
    needed = {known[name].relative_to(ROOT) for name in reachable("app")}
    code = {file.relative_to(exported) for file in exported.rglob("*.py")}
    assert needed <= code and {file.name for file in code - needed} <= {"__init__.py"}
    assert all((exported / file).read_bytes() == (ROOT / file).read_bytes() for file in code)
    copied = {file.relative_to(exported / "models/stripes").as_posix() for file in (exported / "models").rglob("*.*")}
    assert {"model_index.json", "unet/config.json", "schedulers/ddim/scheduler_config.json"} <= copied
    assert not any(name.endswith((".py", ".bin")) for name in copied), "no code, no checkpoints"
    assert yaml.safe_load((exported / "space.yaml").read_text()) == {"model_name_or_path": ["models/stripes"]}


def test_its_requirements_and_card_are_those_of_a_gradio_space(exported):
    lines = (exported / "requirements.txt").read_text().splitlines()
    ours = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert space.GRADIO in lines and set(lines) - {space.GRADIO} < set(ours)
    assert space.GRADIO in (ROOT / "requirements-app.txt").read_text().splitlines()
    names = {line.partition(">")[0] for line in lines}
    assert {"torch", "diffusers", "transformers", "pillow", "safetensors"} <= names
    assert not names & {"tensorboard", "h5py"}, "what only training needs is left out"
    _, head, text = (exported / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(head)
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["title"] == "stripes"
    assert int(card["sdk_version"].partition(".")[0]) == 6 and "# stripes" in text


@pytest.mark.slow
def test_the_exported_code_makes_images_without_the_project(exported, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(exported, moved)
    code = (
        "import trainkit.app.models as models, trainkit.app.generation as generation\n"
        "import trainkit.app.requests as requests\n"
        "model = models.open_model('models/stripes')\n"
        "job = requests.make_job(requests.Setting(model, 'dpmsolver', 3), requests.Request(0, 2))\n"
        "print(models.__file__, [frame.images.shape for frame in generation.frames(job)][-1])\n"
    )
    shown = run_code(code, folder=moved, environment={"PYTHONPATH": None})
    assert str(moved) in shown.stdout and "(2, 16, 16, 3)" in shown.stdout, shown.stderr


@pytest.mark.slow
def test_a_hub_id_stays_an_id_and_two_models_of_one_name_have_two_folders(model, tmp_path, monkeypatch):
    monkeypatch.setattr(space, "find_pipeline", lambda name: model)
    twin = tmp_path / "twin/stripes"
    shutil.copytree(model, twin)
    export_space(ROOT, ["user/stripes", str(model)], tmp_path / "one")
    assert yaml.safe_load((tmp_path / "one/space.yaml").read_text()) == {
        "model_name_or_path": ["user/stripes", "models/stripes"]
    }
    assert "models:\n- user/stripes" in (tmp_path / "one/README.md").read_text()
    export_space(ROOT, [str(model), str(twin)], tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two/models").iterdir()) == ["stripes", "stripes-2"]


def test_a_folder_with_files_is_kept(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: name a new folder"):
        export_space(ROOT, [str(model)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="model_name_or_path .* does not exist|there is no such folder"):
        export_space(ROOT, [str(tmp_path / "nothing/at/all")], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "error: --model_name_or_path: give one or two folders of saved pipelines, or Hub ids"),
        (["--model_name_or_path", "a", "b", "c"], "error: --model_name_or_path: give one or two folders"),
        (["--port", "0"], "error: --port 0 must be 1 to 65535"),
    ],
)
def test_mistakes_are_one_line(words, message):
    done = run_forked("app.py", *words, check=False)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_without_gradio_the_message_has_the_command(monkeypatch, model):
    from trainkit.app.serve import serve

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match='app.py needs the package gradio: pip install "gradio>=6"'):
        serve([str(model)], None, None, False)
