"""Experiment trackers: refused early if they cannot work, given every step and setting, and no secret."""

import json
import struct
from types import SimpleNamespace

import pytest
from accelerate import tracking
from PIL import Image
from process_helpers import run_forked
from training_helpers import run_in_process, tiny_run

from trainkit.errors import UserError
from trainkit.training.log import StepLog
from trainkit.training.trackers import check_tracker, start_trackers, tracked_values

SECRET = "hf_aSecretOfTheTest"


@pytest.mark.parametrize("logger", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line_before_anything_is_prepared(logger, monkeypatch, tmp_path, tiny_unet):

    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    arguments = tiny_run(tmp_path / "not looked at", tiny_unet, tmp_path / "cache", tmp_path / "out", logger=logger)
    with pytest.raises(UserError, match=f"--logger {logger}: .* pip install {logger}, or --logger none") as error:
        run_in_process(monkeypatch, "train_unconditional", arguments)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_and_biases_without_a_login_is_one_line_before_anything_is_written(
    monkeypatch, tmp_path, tiny_unet, image_folder
):
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path.parent))
    output_dir, cache = tmp_path / "out", tmp_path / "cache"
    arguments = tiny_run(image_folder, tiny_unet, cache, output_dir, logger="wandb")
    with pytest.raises(UserError, match="--logger wandb cannot start .*No API key.*WANDB_MODE=offline") as error:
        run_in_process(monkeypatch, "train_unconditional", arguments)
    assert "\n" not in str(error.value) and not output_dir.exists() and not cache.exists()


def test_what_is_installed_is_not_refused(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for logger in ("none", "tensorboard", "wandb"):
        check_tracker(logger)


def test_a_tracker_that_does_not_start_is_one_line(tmp_path):
    from train_unconditional import Options

    def refuse(*arguments, **keywords):
        raise RuntimeError("No API key\nconfigured")

    accelerator = SimpleNamespace(init_trackers=refuse, is_main_process=True)
    options = Options(logger="wandb", output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"--logger wandb cannot start \(No API key configured\): .*WANDB_MODE=off"):
        start_trackers(accelerator, options, tmp_path)


def test_a_tracker_without_pictures_gets_none():
    taken = []
    without = SimpleNamespace(name="trackio")
    with_pictures = SimpleNamespace(name="wandb", log_images=lambda images, step: taken.append((*images, step)))
    log = StepLog.__new__(StepLog)
    log.accelerator = SimpleNamespace(trackers=[without, with_pictures])
    log.write_image("samples", Image.new("L", (4, 4)), 3)
    assert taken == [("samples", 3)]


def test_tensorboard_is_flushed_once_per_log_line(tmp_path):
    flushed, written = [], []

    class Writer:
        def flush(self):
            flushed.append(len(written))

    writer = Writer()

    def log(values, step):
        written.append(step)
        writer.flush()  # as Accelerate's tracker does

    log_of_run = StepLog.__new__(StepLog)
    log_of_run.output_dir, log_of_run._tracked = tmp_path, True
    trackers = [SimpleNamespace(name="tensorboard", writer=writer)]
    log_of_run.accelerator = SimpleNamespace(trackers=trackers, log=log, num_processes=1)
    log_of_run._write([{"step": step, "loss": 0.5} for step in range(10)])
    assert flushed == [10] and written == list(range(10))


def wandb_records(file):
    """The records of a wandb file: LevelDB's log format (32 KiB blocks of length-prefixed chunks) after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, pieces = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(pieces)
            pieces = b""


@pytest.fixture(scope="module")
def offline_run(image_folder, tiny_unet, cache_dir, tmp_path_factory):
    """Ten steps with Weights & Biases offline: previews and validations fall between two log lines."""
    output_dir = tmp_path_factory.mktemp("wandb") / "model"
    flags = {
        "logger": "wandb", "max_train_steps": 10, "logging_steps": 4, "preview_steps": 3, "hub_token": SECRET,
        "validation_steps": 5, "checkpointing_steps": 0,
    }  # fmt: skip
    flags["validation_data_dir"] = folder = tmp_path_factory.mktemp("held")
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 90, 120)).save(folder / f"{i}.png")
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, output_dir, **flags)
    run_forked("train_unconditional.py", *arguments, environment={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    file = next((output_dir / "logs").rglob("*.wandb"))
    return output_dir, list(wandb_records(file))


@pytest.mark.slow
def test_wandb_has_every_step_and_every_validation(offline_run):
    output_dir, records = offline_run
    history = {}
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
            history[int(values["_step"])] = values
    assert [step for step, values in history.items() if "train/loss" in values] == list(range(1, 11))
    grouped = {name.partition("/")[0] for values in history.values() for name in values if not name.startswith("_")}
    assert grouped == {"train", "validation", "speed", "samples"}
    assert [step for step, values in history.items() if "validation/loss" in values] == [5, 10]
    assert [step for step, values in history.items() if "samples" in values] == [3, 6, 9, 10]
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert history[5]["validation/loss"] == next(row["validation_loss"] for row in lines if "validation_loss" in row)


@pytest.mark.slow
def test_wandb_is_told_the_settings_but_no_token(offline_run):
    output_dir, records = offline_run
    config = {}
    for record in records:
        for part in (record.config, record.run.config):
            config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in part.update}
    assert config["learning_rate"] == 1e-3 and config["max_train_steps"] == 10 and "hub_token" not in config
    files = [file for file in output_dir.rglob("*") if file.is_file()]
    assert [file for file in files if file.suffix == ".png" and "media" in file.parts]
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]  # the command line is stored too


@pytest.mark.slow
def test_wandb_has_one_project_and_a_name_per_run(offline_run):
    _, records = offline_run
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name) == ("trainkit", "model")


def test_values_are_in_four_groups_and_constants_are_left_out():
    row = {
        "step": 4, "images": 32, "loss": 0.5, "lr": 1e-3, "grad_norm": 1.0, "images_per_s": 9.0,
        "images_per_s_per_device": 9.0, "model_tflops_per_s": 0.1, "memory_peak_mib": 5.0, "mfu": 0.3,
        "data_wait_share": 0.0, "eta_s": 3.0, "loss_scale": 1.0, "validation_loss": 0.4,
        "validation_loss_t0_250": 0.2, "kid": 0.1, "kid_std": 0.01, "kid_n": 200, "kid_reference_n": 100,
        "kid_reference": "training", "kid_num_inference_steps": 20,
    }  # fmt: skip
    names = sorted(tracked_values(row))
    assert names == [
        "score/kid", "score/kid_std", "speed/data_wait_share", "speed/eta_s", "speed/images_per_s",
        "speed/memory_peak_mib", "speed/mfu", "speed/model_tflops_per_s", "train/grad_norm", "train/images",
        "train/loss", "train/loss_scale", "train/lr", "validation/loss", "validation/loss_by_noise_t0_250",
    ]  # fmt: skip
    assert "speed/images_per_s_per_device" in tracked_values(row, num_processes=2)


@pytest.mark.parametrize("logger, project, keyword", [
    ("tensorboard", "mine", {}), ("wandb", "diffusion", "wandb"), ("trackio", "diffusion", "trackio"),
])  # fmt: skip
def test_project_and_run_name_reach_the_tracker(logger, project, keyword, tmp_path):
    from train_unconditional import Options

    taken = {}
    accelerator = SimpleNamespace(
        init_trackers=lambda project, config, init_kwargs: taken.update(project=project, **init_kwargs)
    )
    options = Options(
        logger=logger, output_dir=str(tmp_path), tracker_project_name="diffusion", tracker_run_name="mine"
    )
    start_trackers(accelerator, options, tmp_path)
    assert taken["project"] == project
    assert not keyword or taken[keyword]["name"] == "mine"
