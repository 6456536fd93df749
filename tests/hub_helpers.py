"""What the tests of the Hub share: a server, and this process as its client."""

import pytest
from hub_server import environment, serve_hub
from process_helpers import ROOT, ScriptRun, run_code

SECRET = "hf_" + "s3cret" * 6  # looks like a token of the Hub


@pytest.fixture
def hub():
    with serve_hub() as server:
        yield server


@pytest.fixture
def as_client(monkeypatch, hub, tmp_path):
    """Use the server as the Hub, in this process and in those that it starts, and retry at once."""
    use_hub(monkeypatch, hub.url, tmp_path / "home", environment(hub, tmp_path / "home"))
    yield hub
    from huggingface_hub.utils import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    set_client_factory(default_client_factory)


def hub_constants(url, home):
    """What huggingface_hub reads from the environment when it is imported, for a Hub at `url`."""
    return {
        "ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(home),
        "HF_TOKEN_PATH": str(home / "token"), "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    }  # fmt: skip


def code_to_use_hub(hub, home):
    """The first lines of a program that is run by the fork server, with `hub` as its Hub."""
    return f"""
import os
import huggingface_hub.hf_api
os.environ.update({environment(hub, home)})
vars(huggingface_hub.constants).update({hub_constants(hub.url, home)})
huggingface_hub.hf_api.api.endpoint = {hub.url!r}
"""


def run_elsewhere(program, folder, hub=None):
    """Run a program in `folder` as somebody who has diffusers but not this repository, whose imports fail.

    Code of models is cached in `folder`, and so are files of `hub`. Returns the finished process.
    """
    code = f"""
import sys
from diffusers.utils import dynamic_modules_utils
sys.modules.update(trainkit=None, pipelines=None)
dynamic_modules_utils.HF_MODULES_CACHE = {str(folder / "modules")!r}
"""
    code += code_to_use_hub(hub, folder / "elsewhere") if hub else ""
    done = run_code(code + program, folder=folder, environment={"PYTHONPATH": None})
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_forked_with_hub(hub, home, script, *arguments, processes=1):
    """As `run_forked`, with `hub` as the Hub of the script and of what it starts."""
    code = f"""
{code_to_use_hub(hub, home)}
import {script}
from trainkit.errors import run_script
run_script({script}.main)
"""
    done = ScriptRun("-c", *arguments, code=code, processes=processes, environment={"PYTHONPATH": str(ROOT)}).wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def use_hub(monkeypatch, url, home, variables):
    import huggingface_hub.constants

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in hub_constants(url, home).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("trainkit.hub.upload.RETRY_DELAYS_S", (0.05,))
