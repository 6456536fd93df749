"""The page in a browser: images that are not noise, messages, two visitors at once. Needs gradio 6 and chromium."""

import base64
import contextlib
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from app_helpers import save_models
from conftest import ROOT
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from process_helpers import script_environment
from sampling_helpers import tiny_model

from trainkit.diffusion.few_step import progressive_scheduler
from trainkit.sampling.pipeline import save_pipeline

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
START_S, WAIT_S = 150, 60

gradio = pytest.importorskip("gradio", minversion="6", reason='pip install "gradio>=6"')
webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),  # starting the page and a browser takes half a minute on a busy machine
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and its chromedriver are not installed"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A running app.py with an unconditional model and one of classes."""
    folder = save_models(tmp_path_factory.mktemp("models"))
    with serving(str(folder / "plain"), str(folder / "class")) as url:
        yield url


@contextlib.contextmanager
def serving(*words, folder=ROOT):
    """The address of an app.py with these models, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, folder / "app.py", *(["--model_name_or_path", *words] if words else [])]
    environment = script_environment(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with subprocess.Popen(
        [*command, "--port", str(port)], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}/"
            wait_for(lambda: answers(url) or process.poll() is not None, START_S)
            assert process.poll() is None, process.stdout.read().decode()
            yield url
        finally:
            process.terminate()


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def wait_for(condition, seconds=WAIT_S):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"nothing after {seconds} s"
        time.sleep(0.1)
    return found


@contextlib.contextmanager
def visitor(url, profile):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, "--window-size=1280,1000", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.get(url)
        wait_for(lambda: find(browser, "#generate"))
        yield browser
    finally:
        browser.quit()


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def type_into(browser, selector, text):
    field = wait_for(lambda: find(browser, selector))[0]
    field.click()
    field.send_keys("\ue009a\ue000", text, "\ue004")  # Ctrl+A, the text, Tab
    return field


def upload(browser, field, file):
    """Give a file to a field for pictures, and wait until the browser has it."""
    wait_for(lambda: find(browser, f"{field} input[type=file]"))[0].send_keys(str(file))
    wait_for(lambda: find(browser, f"{field} img"))


def pictures(browser, side="A"):
    """The finished images of one side; an empty list until they are there."""
    if not find(browser, f"#result-{side} figure a"):
        return []
    sources = [one.get_attribute("src") for one in find(browser, f"#result-{side} img")]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one.partition("base64,")[2])))) for one in sources]


def test_click_and_see_the_images_of_both_sides(address, tmp_path):
    with visitor(address, tmp_path / "a") as browser:
        type_into(browser, "#steps-A input[type=number]", "6")
        type_into(browser, "#steps-B input[type=number]", "6")
        find(browser, "#generate")[0].click()
        both = wait_for(lambda: pictures(browser, "B") and (pictures(browser), pictures(browser, "B")))
        assert [len(side) for side in both] == [8, 8] and both[0][0].shape == (16, 16, 3)
        assert "seed 0 · cat" in find(browser, "#result-B")[0].text
        assert "6 steps" in find(browser, "#result-A")[0].text
        links = [one.get_attribute("download") for one in find(browser, "#result-A a")]
        assert links[-1] == "plain-sde_dpmsolver-6-grid.png" and len(links) == 9
        wide = find(browser, "#result-A img")[0]
        assert wide.size["width"] >= 64 and wide.value_of_css_property("image-rendering") == "pixelated"


def test_a_bad_value_is_a_message(address, tmp_path):
    with visitor(address, tmp_path / "a") as browser:
        type_into(browser, "#classes input", "dgo\ue007")
        find(browser, "#generate")[0].click()
        shown = wait_for(lambda: [one.text for one in find(browser, ".toast-body") if one.text])
        assert "Classes: no class is called 'dgo': did you mean 'dog'?" in shown[0] and "Traceback" not in shown[0]
        assert pictures(browser) == []


def test_two_visitors_at_once_see_the_images_of_their_seeds(address, tmp_path):
    with visitor(address, tmp_path / "a") as one, visitor(address, tmp_path / "b") as other:
        for browser, seed in ((one, "5"), (other, "6")):
            type_into(browser, "#seed input", seed)
        for browser in (one, other):
            find(browser, "#generate")[0].click()
        first, second = (wait_for(lambda browser=browser: pictures(browser)) for browser in (one, other))
    assert len(first) == len(second) == 8
    for index in range(7):
        assert np.abs(first[index + 1].astype(int) - second[index]).max() <= 1, "the same seed"
        assert np.abs(first[index].astype(int) - second[index]).max() > 20


def test_an_uploaded_picture_is_enlarged_and_filled(tmp_path):
    """The upsampler beside the model that fills masks, with one picture for both, and a file that is no picture."""
    folder = save_models(tmp_path / "models")
    photo, mask = Image.new("RGB", (40, 30), "teal"), Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 16, 8))
    photo.save(tmp_path / "photo.png")
    mask.save(tmp_path / "mask.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with serving(str(folder / "enlarge"), str(folder / "fill")) as url, visitor(url, tmp_path / "a") as browser:
        upload(browser, "#picture", tmp_path / "broken.png")
        find(browser, "#generate")[0].click()
        shown = wait_for(lambda: [one.text for one in find(browser, ".toast-body") if one.text])
        assert "Image: it cannot be read" in shown[0] and pictures(browser) == []
        find(browser, "#picture button[aria-label='Remove Image']")[0].click()
        for field, name in (("#picture", "photo.png"), ("#mask", "mask.png")):
            upload(browser, field, tmp_path / name)
        find(browser, "#generate")[0].click()
        enlarged, filled = wait_for(lambda: pictures(browser, "B") and (pictures(browser), pictures(browser, "B")))
    assert len(enlarged) == len(filled) == 8 and enlarged[0].shape == filled[0].shape == (16, 16, 3)
    assert all((one[8:] == (0, 128, 128)).all() and (one[:8] != (0, 128, 128)).any() for one in filled)


def test_an_uploaded_label_map_is_shown_in_colours_and_a_wrong_one_is_told(tmp_path):
    folder, ids = save_models(tmp_path / "models"), np.zeros((16, 16), np.uint8)
    ids[:, 8:] = 3
    Image.fromarray(ids).save(tmp_path / "map.png")
    Image.fromarray(ids + 1).save(tmp_path / "beyond.png")
    with serving(str(folder / "maps")) as url, visitor(url, tmp_path / "a") as browser:
        upload(browser, "#picture", tmp_path / "beyond.png")
        told = wait_for(lambda: [one.text for one in find(browser, "#label-map .tk-map") if one.text])
        assert "it holds the id 4, and the ids of 4 classes are 0 to 3" in told[0]
        find(browser, "#generate")[0].click()
        shown = wait_for(lambda: [one.text for one in find(browser, ".toast-body") if one.text])
        assert "it holds the id 4" in shown[0] and pictures(browser) == []
        find(browser, "#picture button[aria-label='Remove Image']")[0].click()
        wait_for(lambda: not find(browser, "#label-map .tk-map"))
        upload(browser, "#picture", tmp_path / "map.png")
        legend = wait_for(lambda: [one.text for one in find(browser, "#label-map li") if one.text])
        assert legend == ["0: 50%", "3: 50%"]
        find(browser, "#generate")[0].click()
        made = wait_for(lambda: pictures(browser))
    assert len(made) == 8 and made[0].shape == (16, 16, 3)


def test_an_exported_space_runs_by_itself(tmp_path, monkeypatch):
    """In its own folder, without the project on the path and without network; a student of one step."""
    model = tmp_path / "model"
    student = progressive_scheduler(DDPMScheduler().alphas_cumprod.double(), 1, "sample")
    save_pipeline(model, DDPMPipeline(tiny_model(), student), "")
    space = tmp_path / "space"
    command = [sys.executable, ROOT / "app.py", "--model_name_or_path", model, "--export_space", space]
    subprocess.run(command, check=True, env=script_environment(), capture_output=True)
    shutil.rmtree(model)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with serving(folder=space) as url, visitor(url, tmp_path / "a") as browser:
        find(browser, "#generate")[0].click()
        assert len(wait_for(lambda: pictures(browser))) == 8
