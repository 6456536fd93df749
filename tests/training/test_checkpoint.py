import pytest

from trainkit.errors import UserError
from trainkit.training.checkpoints import folder as checkpoints


def write(output_dir, step, content="weights"):
    staging = checkpoints.staging_folder(output_dir, step)
    (staging / "unet").mkdir(parents=True)
    (staging / "unet" / "weights").write_text(content)
    final = output_dir / f"checkpoint-{step}"
    checkpoints.commit(staging, final)
    return final


def test_a_committed_checkpoint_is_whole_and_a_cut_one_is_not(tmp_path):
    folder = write(tmp_path, 5)
    assert checkpoints.damage(folder, checksums=True) is None
    (folder / "unet" / "weights").write_text("weighty")
    assert checkpoints.damage(folder) is None  # the sizes are right
    assert checkpoints.damage(folder, checksums=True) == "unet/weights has changed since it was written"
    (folder / "unet" / "weights").write_text("wei")
    assert checkpoints.damage(folder) == "unet/weights has 3 bytes instead of 7"
    (folder / "unet" / "weights").unlink()
    assert checkpoints.damage(folder) == "unet/weights is missing"


def test_folders_are_ordered_by_step_not_by_name(tmp_path):
    for step in (100, 20, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [checkpoints.checkpoint_step(path) for path in checkpoints.checkpoint_folders(tmp_path)] == [3, 20, 100]


def test_rotation_keeps_the_newest_written(tmp_path):
    for step in (1, 2, 3, 4):
        newest = write(tmp_path, step)
        checkpoints.rotate(tmp_path, 2, newest)
    assert [path.name for path in checkpoints.checkpoint_folders(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    checkpoints.rotate(tmp_path, None, newest)
    assert len(checkpoints.checkpoint_folders(tmp_path)) == 2


def test_a_damaged_checkpoint_does_not_count_as_kept(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-3" / "unet" / "weights").write_text("cut")
    checkpoints.rotate(tmp_path, 2, write(tmp_path, 4))
    kept = [checkpoints.checkpoint_step(path) for path in checkpoints.checkpoint_folders(tmp_path)]
    assert kept == [2, 3, 4]  # two whole ones
    checkpoints.rotate(tmp_path, 2, write(tmp_path, 5))
    kept = [checkpoints.checkpoint_step(path) for path in checkpoints.checkpoint_folders(tmp_path)]
    assert kept == [4, 5]


def test_rotation_never_deletes_a_new_checkpoint_for_a_later_step(tmp_path):
    write(tmp_path, 30)
    newest = write(tmp_path, 10)  # a run resumed from an older step
    checkpoints.rotate(tmp_path, 1, newest)
    assert [path.name for path in checkpoints.checkpoint_folders(tmp_path)] == ["checkpoint-10"]


def test_replacing_a_checkpoint_survives_a_kill_between_the_renames(tmp_path):
    write(tmp_path, 5, "old")
    assert (write(tmp_path, 5, "new") / "unet" / "weights").read_text() == "new"
    (tmp_path / "checkpoint-5").rename(tmp_path / "tmp-checkpoint-replaced-5")  # killed here
    (tmp_path / "tmp-checkpoint-7").mkdir()
    checkpoints.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_resume_candidates(tmp_path):
    assert checkpoints.resume_candidates(tmp_path, "latest") == []
    older, newer = write(tmp_path, 5), write(tmp_path, 9)
    assert checkpoints.resume_candidates(tmp_path, "latest") == [newer, older]
    assert checkpoints.resume_candidates(tmp_path, "checkpoint-5") == [older]
    assert checkpoints.resume_candidates(tmp_path, str(newer)) == [newer]
    with pytest.raises(UserError, match="checkpoint-7 does not exist .*checkpoint-5, checkpoint-9"):
        checkpoints.resume_candidates(tmp_path, "checkpoint-7")
    (newer / "unet" / "weights").write_text("")
    with pytest.raises(UserError, match="checkpoint-9 is damaged: unet/weights has 0 bytes"):
        checkpoints.resume_candidates(tmp_path, "checkpoint-9")
