"""Conditional models carry their code: loaded elsewhere, saved again, pushed; and the documentation runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from conditional_helpers import NAMES, class_pipeline, class_unet, image_pipeline, text_parts, vector_unet
from conftest import ROOT
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from hub_helpers import run_elsewhere
from huggingface_hub import ModelCard

from pipelines.vector_embedding import VectorEmbedding
from trainkit.sampling.pipeline import conditional_pipeline, save_pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model of each kind, as training saves them."""
    folder = tmp_path_factory.mktemp("saved")
    save_pipeline(
        folder / "conditional-model", conditional_pipeline(class_unet(), DDPMScheduler(), id2label=NAMES), "A card."
    )
    save_pipeline(
        folder / "earlier-model", conditional_pipeline(class_unet(1), DDPMScheduler(), id2label=NAMES), "A card."
    )
    save_pipeline(folder / "vector", conditional_pipeline(vector_unet(), DDPMScheduler()), "A card.")
    both = conditional_pipeline(vector_unet(4), DDPMScheduler(), id2label=NAMES)
    save_pipeline(folder / "class-and-vector", both, "A card.")
    unet, parts = text_parts(folder)
    save_pipeline(folder / "text", conditional_pipeline(unet, DDPMScheduler(), prompt_length=8, **parts), "A card.")
    image = image_pipeline("mask")
    parts = {"image_input": image.image_input}
    save_pipeline(folder / "image", conditional_pipeline(image.unet, DDPMScheduler(), **parts), "A card.")
    return folder


ELSEWHERE = """
import shutil
import torch
from diffusers import DiffusionPipeline

def image(pipeline, asked):
    pipeline.set_progress_bar_config(disable=True)
    values = dict(num_inference_steps=2, guidance_scale=2.0, output_type="pt")
    return pipeline(**asked, **values, generator=torch.Generator().manual_seed(0)).images

for kind, asked in {
    "conditional-model": dict(class_labels=["cat", 1, None, "7"]),
    "vector": dict(vectors=[[1.0, 2.0, 3.0], None]),
    "class-and-vector": dict(class_labels=["dog", None, 2], vectors=[[1.0, 2.0, 3.0], [0.0, 0.0, 9.0], None]),
    "text": dict(prompt=["a red square", None]),
    "image": dict(image=[torch.full((3, 16, 16), 0.5), None], mask_image=torch.eye(16)),
}.items():
    pipeline = DiffusionPipeline.from_pretrained(kind, trust_remote_code=True)
    first = image(pipeline, asked)
    assert len(first) == len(next(iter(asked.values())))
    torch.save(first, kind + ".pt")
    pipeline.save_pretrained("again")
    again = DiffusionPipeline.from_pretrained("again", trust_remote_code=True)
    assert torch.equal(image(again, asked), first), kind
    again.save_pretrained("again-" + kind)
    shutil.rmtree("again")
"""


def elsewhere(program, folder):
    """Run `program` without this repository, and without a warning of diffusers about what it loads."""
    done = run_elsewhere(program, folder)
    assert "not expected" not in done.stderr and "Expected types" not in done.stderr
    assert "following packages" not in done.stderr


@pytest.mark.slow
def test_a_saved_folder_loads_and_is_saved_again_without_this_repository(saved):
    elsewhere(ELSEWHERE, saved)
    for kind in ("conditional-model", "vector", "class-and-vector", "text", "image"):
        for folder in (saved / kind, saved / f"again-{kind}"):
            index = json.loads((folder / "model_index.json").read_text())
            assert index["_class_name"] == ["conditional", "ConditionalPipeline"] and "_name_or_path" not in index
            for name in ("conditional.py", "guidance.py", "labels_and_vectors.py", "prompts.py"):
                assert (folder / name).read_bytes() == (ROOT / "pipelines" / name).read_bytes()
    index = json.loads((saved / "again-vector" / "model_index.json").read_text())
    assert index["vector_embedding"] == ["vector_embedding", "VectorEmbedding"]
    assert (saved / "vector" / "schedulers" / "ddim").is_dir() and (saved / "vector" / "README.md").is_file()
    index = json.loads((saved / "again-image" / "model_index.json").read_text())
    assert index["image_input"] == ["image_input", "ImageInput"]
    assert (torch.load(saved / "image.pt", weights_only=True)[0, :, 0, 1] == 0.5).all(), "a known pixel"
    index = json.loads((saved / "again-class-and-vector" / "model_index.json").read_text())
    assert index["id2label"] == {str(label): name for label, name in NAMES.items()}
    made = torch.load(saved / "vector.pt", weights_only=True)
    unet = vector_unet()
    scheduler = DPMSolverMultistepScheduler.from_pretrained(saved / "vector" / "scheduler")
    pipeline = conditional_pipeline(unet, scheduler)
    values = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    expected = pipeline(vectors=[[1.0, 2, 3], None], generator=torch.Generator().manual_seed(0), **values).images
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-3)  # another process, other threads
    assert isinstance(unet.class_embedding, VectorEmbedding), "training continues with its own layer"


@pytest.mark.slow
def test_the_code_in_the_documentation_runs(saved):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "conditional.md").read_text(), re.DOTALL)
    blocks = [block for block in blocks if "conditional-model" in block or "earlier-model" in block]
    assert len(blocks) == 5
    elsewhere("\n".join(blocks), saved)
    index = json.loads((saved / "autoguided-model" / "model_index.json").read_text())
    assert index["guidance_unet"] == ["diffusers", "UNet2DModel"]


def test_a_push_takes_the_code_along(monkeypatch):
    pushed = {}

    def upload(*, folder_path, **rest):
        pushed.update({path.name: path.read_text() for path in Path(folder_path).glob("*.*")})

    class Repository:
        repo_id = "me/model"

    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda *names, **rest: Repository)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.ModelCard.load", lambda *names, **rest: ModelCard("x"))
    class_pipeline().push_to_hub("me/model")
    assert json.loads(pushed["model_index.json"])["_class_name"] == ["conditional", "ConditionalPipeline"]
    assert "class ConditionalPipeline" in pushed["conditional.py"]
    assert {"guidance.py", "labels_and_vectors.py", "prompts.py"} <= pushed.keys()
