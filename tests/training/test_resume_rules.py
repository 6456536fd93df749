"""What a run keeps, uses and refuses when it is resumed, and what it does with the folder it writes to."""

import json
import signal
import time

import pytest
from process_helpers import ScriptRun
from training_helpers import run_in_process, tiny_run

from trainkit.errors import UserError
from trainkit.training.log import read_metrics


@pytest.fixture
def train(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch):
    """Run train_unconditional.py in this process for two steps more than before; returns its output folder."""

    def call(**flags):
        flags = {
            "max_train_steps": 2,
            "checkpointing_steps": 1,
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
        } | flags
        output_dir = flags.pop("output_dir", tmp_path / "out")
        arguments = tiny_run(image_folder, tiny_unet, cache_dir, output_dir, **flags)
        run_in_process(monkeypatch, "train_unconditional", arguments)
        return output_dir

    return call


def state(folder):
    return json.loads((folder / "training_state.json").read_text())


@pytest.mark.slow
def test_changed_options_are_used_from_the_checkpoint_on(train, capsys):
    out = train(learning_rate=1e-3)
    train(
        max_train_steps=4, learning_rate=1e-5, adam_beta1=0.5, adam_weight_decay=0.1, ema_max_decay=0.5,
        resume_from_checkpoint="latest",
    )  # fmt: skip
    assert "--learning_rate 0.001 -> 1e-05" in capsys.readouterr().out
    assert [row["lr"] for row in read_metrics(out)] == [1e-3, 1e-3, 1e-5, 1e-5]
    group = state(out / "checkpoint-4")["optimizer"]["param_groups"][0]
    assert (group["lr"], group["betas"][0], group["weight_decay"]) == (1e-5, 0.5, 0.1)
    assert json.loads((out / "checkpoint-4" / "unet_ema" / "config.json").read_text())["decay"] == 0.5


@pytest.mark.slow
def test_a_branch_that_is_left_is_set_aside(train, capsys):
    out = train(max_train_steps=4)
    train(max_train_steps=3, resume_from_checkpoint="checkpoint-2", seed=9)
    assert "moved checkpoint-3, checkpoint-4 to" in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    kept = out / "abandoned" / "after-2-1"
    assert sorted(path.name for path in kept.iterdir()) == ["checkpoint-3", "checkpoint-4", "metrics.jsonl"]
    assert state(out / "checkpoint-3")["options"]["seed"] == 9
    train(max_train_steps=4, resume_from_checkpoint="latest", seed=9)
    assert "resumed from" in (output := capsys.readouterr().out) and "checkpoint-3: 3 of 4" in output


@pytest.mark.slow
def test_a_bare_name_is_that_of_the_output_folder(train, tmp_path, monkeypatch, capsys):
    out = train()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    train(max_train_steps=3, resume_from_checkpoint="checkpoint-2")
    assert f"resumed from {out / 'checkpoint-2'}" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_left_to_do_is_said(train, capsys):
    train()
    train(resume_from_checkpoint="latest")
    assert "nothing left to train: 2 steps are done and the run has 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"use_ema": False}, "holds an average of the weights .EMA.: remove --no_use_ema"),
        ({"optimizer": "adam"}, "--optimizer adam: .*checkpoint-2 holds the state of adamw; use --optimizer adamw"),
    ],
)
def test_a_mismatch_is_named_and_no_checkpoint_is_passed_over(train, flags, message):
    out = train()
    with pytest.raises(UserError, match=message):
        train(max_train_steps=3, resume_from_checkpoint="latest", **flags)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
def test_other_images_need_a_flag(train, tmp_path, image_folder, capsys):
    import shutil

    train()
    other = tmp_path / "other"
    shutil.copytree(image_folder / "round", other)
    with pytest.raises(
        UserError, match=r"was trained on 37 images of .*this run has 18 images of other .*--allow_dataset"
    ):
        train(max_train_steps=3, resume_from_checkpoint="latest", train_data_dir=other)
    train(max_train_steps=3, resume_from_checkpoint="latest", train_data_dir=other, allow_dataset_change=True)
    assert "WARNING: the dataset has changed: 37 images" in capsys.readouterr().out


@pytest.mark.slow
def test_files_of_others_are_refused_or_backed_up(train, tmp_path):
    out = tmp_path / "out"
    (out / "unet").mkdir(parents=True)
    (out / "unet" / "notes.txt").write_text("mine")
    (out / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that no run of these scripts made \(unet, README.md\)"):
        train()
    assert (out / "README.md").read_text() == "mine"
    train(overwrite_output_dir=True)
    assert (out / "backup-1" / "unet" / "notes.txt").read_text() == "mine"
    assert (out / "backup-1" / "README.md").read_text() == "mine"
    (out / "unet" / "notes.txt").write_text("later")
    train(max_train_steps=3, resume_from_checkpoint="latest")
    assert (out / "unet" / "notes.txt").read_text() == "later"


@pytest.mark.slow
def test_a_finished_model_without_checkpoints_is_not_replaced(train):
    import shutil

    out = train()
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
    for resume in (None, "latest"):
        with pytest.raises(UserError, match="holds the model of an earlier run and no checkpoint to resume"):
            train(resume_from_checkpoint=resume)


@pytest.mark.slow
def test_checkpoints_behind_links_and_odd_names_are_left_alone(train, tmp_path):
    out = train()
    (out / "checkpoint-1").rename(tmp_path / "moved")
    (out / "checkpoint-1").symlink_to(tmp_path / "moved")
    (out / "checkpoint-\u00b2").mkdir()
    train(max_train_steps=3, resume_from_checkpoint="latest", checkpoints_total_limit=1)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-\u00b2"]
    assert (tmp_path / "moved" / "manifest.json").is_file()


def test_the_output_folder_is_not_among_the_images(train, image_folder):
    for where in (image_folder, image_folder / "model"):
        with pytest.raises(UserError, match="is inside --train_data_dir .*, where grids would become training images"):
            train(output_dir=where)
    assert not (image_folder / "model").exists()


@pytest.mark.slow
def test_two_runs_at_one_folder(image_folder, tiny_unet, cache_dir, tmp_path, monkeypatch):
    from trainkit.training import output_folder

    flags = {"max_train_steps": 100_000, "checkpointing_steps": 0, "lr_warmup_steps": 0}
    arguments = tiny_run(image_folder, tiny_unet, cache_dir, tmp_path / "out", **flags)
    run = ScriptRun("train_unconditional.py", *arguments)
    [first] = run.ranks
    try:
        while not (tmp_path / "out" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.1)
        monkeypatch.setattr(output_folder, "LOCK_WAIT_S", 0.1)
        with pytest.raises(UserError, match=rf"is in use by process {first.pid} on .* since 20\d\d"):
            run_in_process(monkeypatch, "train_unconditional", arguments)
    finally:
        first.send_signal(signal.SIGTERM)
        run.wait(timeout=60)
    assert first.returncode == 0  # the signal stops it with a checkpoint


def test_numbers_that_would_fail_at_the_end_are_refused_at_the_start(train, tmp_path):
    with pytest.raises(UserError, match="--ddpm_num_inference_steps 2000 must be 1 to 1000"):
        train(ddpm_num_inference_steps=2000)
    assert not (tmp_path / "out").exists()
