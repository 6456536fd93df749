"""A user's mistake costs one line that names the flag and the fix, and no work."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from conftest import LAUNCHER, ROOT, launch_environment, launch_forked
from process_helpers import run_forked, start_launcher
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
        ({"model_config_name_or_path": ROOT / "recipes" / "mnist_unet", "resolution": 28}, "add --image_mode L"),
        ({"output_dir": "/proc/model"}, "--output_dir /proc/model cannot be written"),
        ({"lr_scheduler": "cosin"}, "--lr_scheduler: 'cosin' is none of"),
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


def test_errors_leave_the_script_as_one_line(tmp_path):
    done = run_forked("train_unconditional.py", "--train_data_dir", tmp_path / "none", check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: --train_data_dir") and done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--standalone"], ["--master_port", "0"]])  # nobody listens at port 0
def test_processes_that_torchrun_starts_without_a_gpu_are_refused(words, image_folder, tiny_unet, cache_dir, tmp_path):
    words = ["--nproc_per_node", "2", *words, ROOT / "train_unconditional.py"]
    words += tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out")
    environment = {"ACCELERATE_USE_CPU": None}
    done = start_launcher(tmp_path, "torch.distributed.run", *words, environment=environment).wait(timeout=100)
    check_refusal(done, tmp_path / "out")


def check_refusal(done, output_dir):
    assert done.returncode != 0
    assert "error: 2 processes were requested" in done.stderr and "ACCELERATE_USE_CPU=true" in done.stderr
    assert not output_dir.exists()


@pytest.mark.slow(17)
def test_cpu_processes_of_the_launcher_are_refused(image_folder, tiny_unet, cache_dir, tmp_path):
    """Fresh interpreters: the script reads the command line of the process that started it."""
    launcher = [sys.executable, "-m", LAUNCHER, "--cpu", "--num_processes", "2"]
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out")
    done = subprocess.run(
        [*launcher, str(ROOT / "train_unconditional.py"), *arguments],
        env={name: value for name, value in launch_environment().items() if name != "ACCELERATE_USE_CPU"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    check_refusal(done, tmp_path / "out")


def test_a_launcher_config_with_cpu_processes_is_refused(train, monkeypatch, tmp_path):
    """In this process, with the environment and the command line that the launcher gives to its one process."""
    config, script = tmp_path / "two_cpu.yaml", tmp_path / "print_environment.py"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    script.write_text("import json, os\nprint(json.dumps(dict(os.environ)))\n")
    words = ["--config_file", str(config), str(script)]
    [environment] = start_launcher(tmp_path, LAUNCHER, *words).wait(timeout=100).stdout.splitlines()
    environment = json.loads(environment)
    assert environment["ACCELERATE_USE_CPU"].lower() == "true" and "WORLD_SIZE" not in environment
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    parent = SimpleNamespace(cmdline=lambda: ["python", "-m", LAUNCHER, *words])
    monkeypatch.setattr(psutil, "Process", lambda process_id: {os.getppid(): parent}[process_id])
    with pytest.raises(UserError, match="^2 processes were requested, but this one runs with 1"):
        train(monkeypatch)


@pytest.mark.slow
def test_the_command_that_the_refusal_names_works(image_folder, tiny_unet, cache_dir, tmp_path):
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path, max_train_steps=1)
    done = launch_forked(tmp_path, "train_unconditional.py", *arguments, processes=2)
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
