"""A push, against a small HTTP server that answers as the Hub does."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import launch
from training_helpers import tiny_run

OBJECT_ID = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Creates any repository, takes every file in the commit itself, and remembers both."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/me/digits", "id": "me/digits"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.answer({"files": [file | {"shouldIgnore": False, "oid": None} for file in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.server.commits.append({file["path"]: base64.b64decode(file["content"]) for file in files})
            self.answer({"commitUrl": f"{self.server.url}/me/digits/commit/{OBJECT_ID}", "commitOid": OBJECT_ID})
        else:
            self.answer({})

    def do_GET(self):
        self.answer({"id": "me/digits", "sha": OBJECT_ID, "siblings": [], "private": False, "tags": [], "name": "me"})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.created, server.commits, server.tokens = [], [], set()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def environment(hub):
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_the_pipeline_is_pushed_and_the_training_state_is_not(hub, image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(
        image_folder, tiny_unet, cache_dir, tmp_path, max_train_steps=2, checkpointing_steps=1, push_to_hub=True,
        hub_model_id="me/digits", hub_token="hf_secret", hub_private_repo=True,
    )  # fmt: skip
    done = launch("train_unconditional.py", *arguments, environment=environment(hub))
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


def test_an_unreachable_hub_is_told_before_training_starts(image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, push_to_hub=True, hub_model_id="me/digits")
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = launch("train_unconditional.py", *arguments, environment=offline, check=False)
    assert done.returncode != 0 and "error: --push_to_hub: repository me/digits cannot be created" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()
