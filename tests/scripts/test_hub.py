"""A push, against a small HTTP server that answers as the Hub does."""

import pytest
from conftest import launch
from hub_server import environment, serve_hub
from training_helpers import tiny_run


@pytest.fixture
def hub():
    with serve_hub() as server:
        yield server


@pytest.mark.slow
def test_the_pipeline_is_pushed_and_the_training_state_is_not(hub, image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(
        image_folder, tiny_unet, cache_dir, tmp_path, max_train_steps=2, checkpointing_steps=1, push_to_hub=True,
        hub_model_id="me/digits", hub_token="hf_secret", hub_private_repo=True,
    )  # fmt: skip
    done = launch("train_unconditional.py", *arguments, environment=environment(hub, tmp_path / "home"))
    assert "failed" not in done.stderr, done.stderr[-2000:]
    assert hub.created[0]["name"] == "digits" and hub.created[0].get("visibility", "private") == "private"
    assert hub.tokens == {"Bearer hf_secret"}
    pushed = hub.commits[-1]
    assert {"model_index.json", "README.md", "samples.png", "scheduler/scheduler_config.json"} <= pushed.keys()
    assert "schedulers/ddim/scheduler_config.json" in pushed
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert pushed[weights] == (tmp_path / weights).read_bytes()
    assert not [name for name in pushed if "checkpoint" in name or "optimizer" in name or "metrics" in name]
    assert b"hf_secret" not in b"".join(pushed.values())
    assert b"hf_secret" not in (tmp_path / "checkpoint-2" / "training_state.json").read_bytes()


@pytest.mark.slow
def test_an_unreachable_hub_is_told_before_training_starts(image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, push_to_hub=True, hub_model_id="me/digits")
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = launch("train_unconditional.py", *arguments, environment=offline, check=False)
    assert done.returncode != 0 and "error: --push_to_hub: repository me/digits cannot be created" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
