import contextlib
import gc
import json
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path

# Several threads round differently from run to run, and those of several workers wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait sleep: scripts of the tests compute with all cores, which they share with other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test reaches the Hub itself. Read when libraries are imported, so that the workers are as the fork server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cpu_times
import numpy as np
import process_helpers
import pytest
import undrawn_figures
from hub_helpers import as_client, hub  # noqa: F401 - fixtures
from hypothesis import HealthCheck, settings
from PIL import Image

ROOT = Path(__file__).parent.parent
LAUNCHER = "accelerate.commands.launch"
QUICK_S, SLOW_S = 0.05, 2.0  # CPU seconds of a test, as a mean: without the marker, and where it gives no number
TINY_UNET = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}

# The same examples in each run, and no time limit, which a busy machine would exceed.
settings.register_profile(
    "suite", max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("suite")


def pytest_addoption(parser):
    parser.addoption("--write_golden", action="store_true", help="write tests/golden/ instead of comparing with it")
    parser.addoption("--cpu_times", action="store_true", help="report CPU seconds per file and per test")


def pytest_configure(config):
    if config.option.cpu_times:
        config.pluginmanager.register(cpu_times.CpuTimes())
    if "PYTEST_XDIST_WORKER" not in os.environ and getattr(config.option, "numprocesses", None):
        process_helpers.share_fork_server()  # before the workers copy the environment
        config.option.tx = process_helpers.fork_workers(config.option.tx)


def pytest_collection_finish():
    """Imports made half a million objects. Each `gc.collect` of a run would take a third of a second to visit them."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Files that take longest first, so that workers, which take a file each, end at about the same time."""
    seconds = Counter()
    for item in items:
        slow = item.get_closest_marker("slow")
        seconds[item.path] += QUICK_S if slow is None else sum(slow.args) or SLOW_S
    items.sort(key=lambda item: -seconds[item.path])


def slow_after(count, cases):
    """Cases to parametrize a test with, of which the first `count` stay quick and the others are marked slow."""
    cases = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=[pytest.mark.slow] * (i >= count)) for i, case in enumerate(cases)]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """37 small JPEGs and PNGs of two classes and different sizes."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(37):
        height, width = 16 + i % 5, 20 + i % 3
        rows, columns = np.mgrid[0:height, 0:width] / 16
        colour = rng.uniform(0, 255, 3)
        pixels = (np.sin(rows + i) * np.cos(columns * (1 + i % 2)))[..., None] * 60 + colour
        path = folder / ("round" if i % 2 else "square") / f"{i:03d}.{'png' if i % 3 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(path)
    return folder


@pytest.fixture(scope="session")
def tiny_unet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unet")
    (folder / "config.json").write_text(json.dumps(TINY_UNET))
    return folder


@pytest.fixture(scope="session")
def smaller_unet(tmp_path_factory):
    """Half as many weights as in `tiny_unet`, for divided weights: each is gathered from all processes."""
    folder = tmp_path_factory.mktemp("smaller_unet")
    one_level = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    (folder / "config.json").write_text(json.dumps(TINY_UNET | one_level))
    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """The folder of a random autoencoder that halves RGB images once."""
    from latent_helpers import save_vae  # imports diffusers

    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def latent_unet(tmp_path_factory):
    """The config of a UNet for the latents of `vae`."""
    folder = tmp_path_factory.mktemp("latent_unet")
    (folder / "config.json").write_text(json.dumps(TINY_UNET | {"in_channels": 2, "out_channels": 2}))
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def on_the_cpu_alone(monkeypatch):
    """No GPU and no network."""
    for name, value in {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def drawn_figures(monkeypatch):
    """Figures of matplotlib as they are, see undrawn_figures.py."""
    monkeypatch.setattr(undrawn_figures.Figure, "savefig", undrawn_figures.DRAW)


@contextlib.contextmanager
def fresh_s3(key="k", secret="s"):
    """An S3 server of this machine with an empty bucket; gives the options of its file system."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST"))
        options = {"key": key, "secret": secret, "endpoint_url": f"http://{host}:{port}"}
        fsspec.filesystem("s3", **dict(options)).mkdir("bucket")
        yield options
    finally:
        server.stop()


def launch_words(script, *arguments, processes=1, config_file=None):
    """The arguments of `accelerate launch` that really start `processes` CPU processes."""
    launcher = []
    if processes > 1:
        launcher += ["--main_process_port", "0", *([] if config_file else ["--multi_gpu"])]
    if config_file:
        launcher += ["--config_file", str(config_file)]
    launcher += ["--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*launcher, str(ROOT / script), *map(str, arguments)]


launch_environment = process_helpers.script_environment


def launch(script, *arguments, processes=1, environment=None, check=True):
    """Run a script of ours through `accelerate launch`; returns the finished process with its output as text.

    All processes are fresh interpreters, which costs seconds of imports for each: see `launch_forked`.
    """
    done = subprocess.run(
        [sys.executable, "-m", LAUNCHER, *launch_words(script, *arguments, processes=processes)],
        env=launch_environment(**(environment or {})),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def launch_forked(folder, script, *arguments, processes=1, config_file=None):
    """As `launch`, but all processes are children of the fork server; `folder` is of the test."""
    words = launch_words(script, *arguments, processes=processes, config_file=config_file)
    done = process_helpers.start_launcher(folder, LAUNCHER, *words).wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done
