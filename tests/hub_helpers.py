"""What the tests of the Hub share: a server, and this process as its client."""

import pytest
from hub_server import environment, serve_hub

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


def use_hub(monkeypatch, url, home, variables):
    import huggingface_hub.constants

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    constants = {"ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(home)}
    constants |= {"HF_TOKEN_PATH": str(home / "token"), "HF_HUB_DISABLE_PROGRESS_BARS": True}
    constants["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr("trainkit.hub.upload.RETRY_DELAYS_S", (0.05,))
