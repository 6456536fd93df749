"""A user's mistake costs one line that names the flag and the fix, and no work."""

import subprocess
import sys

import pytest
from conftest import ROOT, launch, launch_environment
from training_helpers import run_in_process, tiny_run

from trainkit.errors import UserError


@pytest.fixture
def train(image_folder, tiny_unet, cache_dir, tmp_path):
    """Call the script's main in this process with flags over those of the tiny run."""

    def call(monkeypatch, **flags):
        output_dir = flags.pop("output_dir", tmp_path / "out")
        arguments = tiny_run(image_folder, tiny_unet, flags.pop("cache_dir", cache_dir), output_dir, **flags)
        run_in_process(monkeypatch, "train_unconditional", arguments)

    return call


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resolution": 17}, r"--resolution 17 must be divisible by 2 \(the UNet halves it 1 times\)"),
        ({"model_config_name_or_path": "/nowhere"}, "--model_config_name_or_path /nowhere: no config.json to read"),
        ({"train_data_dir": None}, "--train_data_dir"),
        ({"train_data_dir": "/nowhere"}, "--train_data_dir /nowhere"),
        ({"image_mode": "L"}, "in_channels 3, but the images .--image_mode L. have 1 channels"),
        ({"mixed_precision": "fp16"}, "--mixed_precision fp16"),
        ({"train_batch_size": 0}, "--train_batch_size 0 must be at least 1"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "--resume_from_checkpoint checkpoint-9 does not exist"),
        ({"output_dir": "/proc/model"}, "--output_dir /proc/model cannot be written"),
        ({"lr_scheduler": "cosin"}, "--lr_scheduler: invalid choice: 'cosin'"),
        ({"optimiser": "adamw"}, "unknown argument --optimiser: did you mean --optimizer?"),
        ({"lr_scheduler": "step", "lr_step_size": 0}, "--lr_step_size 0"),
        ({"validation_steps": 5}, "--validation_steps 5 needs --validation_data_dir"),
        ({"validation_data_dir": "/nowhere"}, "--validation_data_dir /nowhere"),
        ({"validation_data_dir": "/nowhere", "validation_steps": 0}, "--validation_steps 0 must be at least 1"),
        ({"score_steps": 5, "score_images": 3}, "--score_images 3 must be at least 4"),
    ],
)
def test_one_line_error(train, monkeypatch, flags, message):
    with pytest.raises(UserError, match=message) as error:
        train(monkeypatch, **flags)
    assert "\n" not in str(error.value)


def test_empty_folder_and_no_readable_image(train, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--train_data_dir .*empty"):
        train(monkeypatch, train_data_dir=tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="no readable image"):
        train(monkeypatch, train_data_dir=tmp_path / "broken")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resolution": 17}, "--resolution 17"),
        ({"model_config_name_or_path": "/nowhere"}, "--model_config_name_or_path /nowhere"),
        ({"output_dir": "/proc/model"}, "--output_dir /proc/model cannot be written"),
        ({"resume_from_checkpoint": "checkpoint-9"}, "--resume_from_checkpoint checkpoint-9 does not exist"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_prepared(train, monkeypatch, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        train(monkeypatch, cache_dir=tmp_path / "cache", **flags)
    assert not (tmp_path / "cache").exists()


def test_an_earlier_run_is_not_overwritten(train, monkeypatch, tmp_path):
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoint-3 of an earlier run: continue it with --resume_from_check"):
        train(monkeypatch)
    assert (tmp_path / "out" / "checkpoint-3").exists()


@pytest.mark.slow
def test_errors_leave_the_script_as_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "train_unconditional.py"), "--train_data_dir", str(tmp_path / "none")]
    done = subprocess.run(command, env=launch_environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: --train_data_dir") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
        ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"],  # nobody listens there
    ],
)
def test_processes_that_would_not_train_together_are_refused(launcher, image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out")
    environment = {name: value for name, value in launch_environment().items() if name != "ACCELERATE_USE_CPU"}
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train_unconditional.py"), *arguments],
        env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: 2 processes were requested" in done.stderr and "ACCELERATE_USE_CPU=true" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_config_file_with_cpu_processes_is_refused(image_folder, tiny_unet, cache_dir, tmp_path):
    launcher, config = [sys.executable, "-m", "accelerate.commands.launch"], tmp_path / "two_cpu.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out")
    done = subprocess.run(
        [*launcher, "--config_file", config, ROOT / "train_unconditional.py", *arguments],
        env=launch_environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert "error: 2 processes were requested" in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_the_command_that_the_refusal_names_works(image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, max_train_steps=1)
    done = launch("train_unconditional.py", *arguments, processes=2)
    assert "8 per device x 2 processes" in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3", "WORLD_SIZE": "16",
             "LOCAL_WORLD_SIZE": "8", "ACCELERATE_USE_CPU": "true"},
            "--max_restarts over several machines .*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ),
    ],
)  # fmt: skip
def test_launches_that_cannot_work_are_refused(train, monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        train(monkeypatch)
