"""OUTPUT/config.yaml: the same run again, and no secret; the summary at the start and the commands at the end."""

from dataclasses import asdict

import pytest
import yaml
from training_helpers import run_in_process, same_weights, tiny_run

from trainkit.options.parsing import parse_options
from trainkit.options.training import SECRET_OPTIONS
from trainkit.training.config_file import OF_ONE_START
from trainkit.training.precision import has_fast_bfloat16
from trainkit.training.signals import StopSignals
from trainkit.training.summary import count

UNET = "unet/diffusion_pytorch_model.safetensors"
TOKEN = "hf_aSecretOfTheTest"


@pytest.fixture
def train(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch, capsys):
    """Train in this process; returns the output folder and what was printed."""

    def call(name="one", script="train_conditional", **flags):
        flags = {"max_train_steps": 2, "ddpm_num_inference_steps": 2} | flags
        run_in_process(monkeypatch, script, tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / name, **flags))
        return tmp_path / name, capsys.readouterr().out

    return call


@pytest.mark.slow
def test_a_run_from_its_config_is_the_same_run(train, tmp_path, monkeypatch):
    one, _ = train(class_balance="sqrt", hub_token=TOKEN, random_resized_crop=[0.5, 1])
    text = (one / "config.yaml").read_text()
    assert TOKEN not in text and "# given, and not written here: --hub_token" in text
    other = ["--config", str(one / "config.yaml"), "--output_dir", str(tmp_path / "other")]
    run_in_process(monkeypatch, "train_conditional", other)
    same_weights(one / UNET, tmp_path / "other" / UNET)
    again = yaml.safe_load((tmp_path / "other" / "config.yaml").read_text())
    assert again == yaml.safe_load(text) | {"output_dir": str(tmp_path / "other")}


def test_every_option_is_in_it_but_secrets_and_what_one_start_does(train):
    from train_unconditional import Options

    one, _ = train(script="train_unconditional", max_train_steps=1)
    held = yaml.safe_load((one / "config.yaml").read_text())
    options = parse_options(Options, "", ["--config", str(one / "config.yaml")])
    assert held.keys() == asdict(options).keys() - {*SECRET_OPTIONS, *OF_ONE_START}
    assert held["prediction_type"] == "sample" and held["mixed_precision"] == "no"  # resolved
    text = (one / "config.yaml").read_text()
    assert text.index("\noptimizer: adamw") < text.index("# the defaults of trainkit") < text.index("\nadam_beta1:")
    for name in ("trainkit: ", "packages: torch ", "python: ", "dataset: 37 images", "processes: 1 on ", "batch: "):
        assert f"\n# {name}" in text


@pytest.mark.slow
def test_a_resumed_run_adds_its_start_and_a_new_one_begins_again(train):
    one, _ = train(max_train_steps=2)
    train(max_train_steps=4, resume_from_checkpoint="latest")
    starts = [line for line in (one / "config.yaml").read_text().splitlines() if line.startswith("# start: ")]
    assert [line.partition("step ")[2] for line in starts] == ["0, 1 on cpu", "2, 1 on cpu"]
    train(max_train_steps=2, overwrite_output_dir=True)
    assert (one / "config.yaml").read_text().count("# start: ") == 1
    assert (one / "backup-1" / "config.yaml").read_text().count("# start: ") == 2


@pytest.mark.slow
def test_the_command_after_a_stop_resumes_the_run(train, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(StopSignals, "agreed", lambda self, step: step == 2)
    one, printed = train(max_train_steps=4, hub_token=TOKEN)
    command = printed.splitlines()[-1].partition("continue with: ")[2]
    assert command.startswith("python train_conditional.py --config ") and TOKEN not in printed
    assert "--hub_token ..." in command
    monkeypatch.setattr(StopSignals, "agreed", lambda self, step: False)
    words = command.replace(" --hub_token ...", "").split()
    run_in_process(monkeypatch, "train_conditional", words[2:])
    assert "2 of 4 steps done" in capsys.readouterr().out
    whole, _ = train("whole", max_train_steps=4)
    same_weights(one / UNET, whole / UNET)


def test_the_summary_names_what_is_trained_and_the_last_line_what_comes_next(train):
    one, printed = train(max_train_steps=4, preview_steps=2, logger="tensorboard", validation_split=None)
    lines = printed.splitlines()
    for start in (
        "data        37 images 16x16 RGB, 2 classes, ", "model       UNet2DModel of 45.4 k parameters, ",
        "length      4 steps = 32 images = 0.865 epochs", "batch       8 images per step = 8 per device",
        "objective   predict sample, loss weighting soft_min_snr", "optimizer   adamw, learning rate 0.001, cosine",
        "device      cpu", f"output      {one}, new run", "saves       checkpoint every 3 steps",
        f"tracker     tensorboard --logdir {one}/logs",
    ):  # fmt: skip
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1].endswith(
        f"next: python sample.py --model_name_or_path {one} --output_dir {one}-samples --class_labels all"
    )


@pytest.mark.slow
def test_the_precision_that_auto_was_is_written_down(train):
    one, printed = train(mixed_precision="auto", max_train_steps=1)
    chosen = "bf16" if has_fast_bfloat16("cpu") else "no"
    assert yaml.safe_load((one / "config.yaml").read_text())["mixed_precision"] == chosen
    assert f"mixed precision {chosen}\n" in printed


@pytest.mark.slow
def test_quiet_prints_the_last_line_alone(train, monkeypatch):
    monkeypatch.setattr("trainkit.terminal._settings", {"quiet": False, "interval_s": 30.0})
    _, printed = train(quiet=True, preview_steps=1, lr_warmup_steps=1)
    assert len(printed.splitlines()) == 1 and printed.startswith("saved the pipeline")


@pytest.mark.parametrize("number, text", [(45_300, "45.3 k"), (113_700_000, "113.7 M"), (12, "12"), (2.1e9, "2.1 G")])
def test_counts(number, text):
    assert count(number) == text
