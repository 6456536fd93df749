"""Files that appear whole: readers see the old content or the new one, never a part."""

import pytest

from trainkit.atomic import replacing, write_json, write_text


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "state.json"
    write_json(file, {"step": 1})
    with replacing(file, flush=True) as temporary:
        temporary.write_text("half", encoding="utf-8")
        assert temporary.suffix == ".json" and '"step": 1' in file.read_text(encoding="utf-8")
    assert file.read_text(encoding="utf-8") == "half" and list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "notes.txt"
    write_text(file, "größer")
    with pytest.raises(RuntimeError), replacing(file) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert file.read_bytes().decode("utf-8") == "größer" and list(tmp_path.iterdir()) == [file]
