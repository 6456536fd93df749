"""What a launcher's configuration asks of the script: FSDP and DeepSpeed configs become divided weights of our own."""

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_simple_launcher_cmd_env
from conftest import ROOT, launch_forked
from process_helpers import run_forked
from training_helpers import losses, same_weights, tiny_run

from trainkit.errors import UserError
from trainkit.options.script import TrainingOptions
from trainkit.training.launch import compile_as_launched, shard_as_launched

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def launched(monkeypatch):
    """Options as a script has them after it was started with `environment`."""

    def call(environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return shard_as_launched(TrainingOptions())

    return call


def test_a_plain_launch_divides_nothing(launched):
    assert launched({}) == TrainingOptions()


@pytest.mark.parametrize(("stage", "divided", "twice"), [("0", False, False), ("2", True, False), ("3", True, True)])
def test_zero_stages(launched, stage, divided, twice):
    options = launched({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage})
    assert (options.shard_weights, options.reshard_after_forward) == (divided, twice)


def test_the_deepspeed_config_asks_for_zero_2(launched):
    """Through what Accelerate's launcher makes of the file; the package itself is not needed for that."""
    file = str(ROOT / "accelerate_configs" / "deepspeed.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", file, "train_unconditional.py"])
    arguments = _validate_launch_command(arguments)[0]
    arguments.deepspeed_fields_from_accelerate_config = ""  # `accelerate launch` sets it on the way
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    options = launched({name: value for name, value in environment.items() if "DEEPSPEED" in name})
    assert options.shard_weights and not options.reshard_after_forward


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "switch it off"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "switch it off",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            "deepspeed_config_file is not supported: set zero_stage",
        ),
    ],
)
def test_what_is_not_done_is_refused(launched, environment, message):
    with pytest.raises(UserError, match=message):
        launched(environment)


@pytest.fixture
def compiled(monkeypatch):
    """Options as a script has them if the launcher's configuration has `dynamo_config`."""

    def call(dynamo_config, **flags):
        words = [word for name, value in dynamo_config.items() for word in (f"--{name}", *([value] if value else []))]
        arguments = launch_command_parser().parse_args([*words, "--cpu", "train_unconditional.py"])
        arguments, *_ = _validate_launch_command(arguments)
        for name, value in prepare_simple_launcher_cmd_env(arguments)[1].items():
            if "DYNAMO" in name:
                monkeypatch.setenv(name, value)
        return compile_as_launched(TrainingOptions(**flags))

    return call


def test_a_dynamo_config_is_the_flag_compile(compiled):
    """Accelerate itself would wrap the compiled model and rename every weight."""
    assert compiled({}) == compiled({"dynamo_backend": "no"}) == TrainingOptions()
    options = compiled({"dynamo_backend": "inductor", "dynamo_mode": "reduce-overhead"})
    assert options == TrainingOptions(compile=True, compile_mode="reduce-overhead")
    assert TorchDynamoPlugin().backend == DynamoBackend.NO  # what Accelerate does from here on
    options = compiled({"dynamo_backend": "inductor"}, compile=True, compile_mode="max-autotune")
    assert options.compile_mode == "max-autotune"  # the script's own flag


@pytest.mark.parametrize(
    ("dynamo_config", "message"),
    [
        ({"dynamo_backend": "eager"}, "dynamo_backend EAGER is not supported: use INDUCTOR or NO"),
        ({"dynamo_backend": "inductor", "dynamo_use_fullgraph": None}, "dynamo_use_fullgraph true is not supported"),
    ],
)
def test_other_compilations_are_refused_in_one_line(compiled, dynamo_config, message):
    with pytest.raises(UserError, match=message) as refusal:
        compiled(dynamo_config)
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def whole(image_folder, tiny_unet, cache_dir, tmp_path_factory):
    """Two steps of one process."""
    folder = tmp_path_factory.mktemp("whole")
    flags = {"max_train_steps": 2, "checkpointing_steps": 0, "lr_warmup_steps": 0}
    run_forked("train_unconditional.py", *tiny_run(image_folder, tiny_unet, cache_dir, folder, **flags))
    return folder


@pytest.mark.slow(7)
@pytest.mark.parametrize("reshard", [True, False], ids=["ZeRO-3", "ZeRO-2"])
def test_the_fsdp_config_trains_the_same_run(whole, image_folder, tiny_unet, cache_dir, tmp_path, reshard):
    config = (ROOT / "accelerate_configs" / "fsdp.yaml").read_text().replace("num_processes: 8", "num_processes: 2")
    config = config.replace("reshard_after_forward: true", f"reshard_after_forward: {str(reshard).lower()}")
    (tmp_path / "fsdp.yaml").write_text(config)
    flags = {"max_train_steps": 2, "checkpointing_steps": 0, "lr_warmup_steps": 0, "train_batch_size": 4}
    divided = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "divided", **flags)
    config = tmp_path / "fsdp.yaml"
    done = launch_forked(tmp_path, "train_unconditional.py", *divided, processes=2, config_file=config)
    assert f"weights sharded over the processes ({'ZeRO-3' if reshard else 'ZeRO-2'})" in done.stdout
    assert losses(tmp_path / "divided") == pytest.approx(losses(whole), abs=1e-4)
    same_weights(tmp_path / "divided" / WEIGHTS, whole / WEIGHTS, tolerance=1e-4)


OTHER_COPY = """
import trainkit.training.start as start
start_run = start.start_run
def start_with_another_copy(options, accelerator, unet, images):
    if accelerator.process_index == 1:
        images.fingerprint = "another copy"
    return start_run(options, accelerator, unet, images)
start.start_run = start_with_another_copy
import train_unconditional
from trainkit.errors import run_script
run_script(train_unconditional.main)
"""


@pytest.mark.slow
def test_ranks_with_different_datasets_are_named_before_training(image_folder, tiny_unet, cache_dir, tmp_path):
    (tmp_path / "other_copy.py").write_text(OTHER_COPY, encoding="utf-8")
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", train_batch_size=4)
    environment = {"PYTHONPATH": str(ROOT)}
    done = run_forked(tmp_path / "other_copy.py", *arguments, processes=2, environment=environment, check=False)
    assert done.returncode != 0
    assert "the dataset of rank 1 (37 images) differs from that of rank 0 (37 images)" in done.stderr
    assert not (tmp_path / "out").exists()
