"""tools/fetch_images.py on a made-up set: what it writes, and that it writes it whole or not at all."""

import gzip
import importlib.util

import numpy as np
import pytest
from PIL import Image
from source_tree import ROOT


@pytest.fixture
def fetch(monkeypatch):
    """fetch(*words) runs the script on 23 + 6 images of 3 classes; `fetch.reads` counts the fetches."""
    spec = importlib.util.spec_from_file_location("fetch_images", ROOT / "tools" / "fetch_images.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def made_up():
        run.reads += 1
        rng = np.random.default_rng(0)
        splits = {}
        for name, count in (("train", 23), ("heldout", 6)):
            splits[name] = (rng.integers(0, 256, (count, 4, 5), dtype=np.uint8), np.arange(count) % 3)
        run.splits = splits
        return ["a", "b", "c"], splits

    def run(*words):
        monkeypatch.setattr("sys.argv", ["fetch_images.py", *map(str, words)])
        module.main()

    run.reads, run.module = 0, module
    monkeypatch.setitem(module.READERS, "mnist", made_up)
    return run


def test_class_folders_hold_the_images_without_loss(fetch, tmp_path):
    fetch("mnist", tmp_path / "deep" / "out")
    files = sorted((tmp_path / "deep" / "out" / "train" / "b").iterdir())
    images, labels = fetch.splits["train"]
    assert [file.name for file in files] == [f"{rank:05d}.png" for rank in range(8)]
    assert all((np.asarray(Image.open(f)) == image).all() for f, image in zip(files, images[labels == 1], strict=True))
    assert len(list((tmp_path / "deep" / "out" / "heldout").rglob("*.png"))) == 6


def test_a_limit_is_spread_over_the_classes(fetch, tmp_path):
    fetch("mnist", tmp_path / "out", "--limit", 7)
    counts = [len(list(folder.iterdir())) for folder in sorted((tmp_path / "out" / "train").iterdir())]
    assert counts == [3, 2, 2]
    assert len(list((tmp_path / "out" / "heldout").rglob("*.png"))) == 6


def test_a_second_run_fetches_nothing_and_another_request_is_refused(fetch, tmp_path):
    fetch("mnist", tmp_path / "out")
    fetch("mnist", tmp_path / "out")
    assert fetch.reads == 1
    for words in (("mnist", tmp_path / "out", "--limit", 5), ("mnist", tmp_path)):
        with pytest.raises(SystemExit, match="error: .*holds something else"):
            fetch(*words)


def test_an_interrupted_fetch_is_not_taken_for_a_whole_one(fetch, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        write = fetch.module.write_class_folders

        def interrupted(images, labels, names, folder):
            write(images[:5], labels[:5], names, folder)
            raise KeyboardInterrupt

        patch.setattr(fetch.module, "write_class_folders", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("mnist", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fetch("mnist", tmp_path / "out")
    assert len(list((tmp_path / "out" / "train").rglob("*.png"))) == 23
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_idx_files_are_read(fetch, tmp_path):
    rng = np.random.default_rng(1)
    for prefix, count in (("train", 3), ("t10k", 2)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
    images, labels = fetch.module._read_idx_splits(tmp_path)["heldout"]
    assert (images == pixels).all() and labels.tolist() == [0, 1]


def test_a_missing_or_failing_tool_is_one_line(fetch, tmp_path):
    with pytest.raises(SystemExit, match="error: no-such-tool is needed"):
        fetch.module._download(["no-such-tool"], str(tmp_path))
    with pytest.raises(SystemExit, match="error: 'sh -c echo oh >&2; false' failed: oh"):
        fetch.module._download(["sh", "-c", "echo oh >&2; false"], str(tmp_path))


def test_emoji_are_named_by_their_characters(fetch):
    caption = fetch.module.emoji_caption
    assert caption("1f469-1f3fd-200d-1f680") == "woman rocket, medium skin tone"
    assert caption("1f3c3-200d-2642-fe0f") == "runner male"
    assert caption("0023-fe0f-20e3") == "number sign keycap"
    assert caption("1f1eb-1f1f7") == "flag of FR"
    assert caption("1f3f4-e0067_e0062_e0065_e006e_e0067_e007f") == "waving black flag flag of gbeng"
    assert caption("e123") is None, "a character without a name"


def test_emoji_lie_beside_their_captions_with_all_skin_tones_in_one_split(fetch, tmp_path, monkeypatch):
    tones = ["", "-1f3fb", "-1f3ff"]
    emoji = {f"{point:x}{tone}": b"webp" for point in range(0x1F466, 0x1F479) for tone in tones} | {"e123": b""}
    monkeypatch.setattr(fetch.module, "read_emoji", lambda: emoji)
    fetch("emoji", tmp_path / "out")
    splits = [{file.stem for file in (tmp_path / "out" / name).glob("*.webp")} for name in ("train", "heldout")]
    assert sum(map(len, splits)) == len(emoji) - 1 and not splits[0] & splits[1] and len(splits[1]) in range(1, 20)
    kinds = [{name.partition("-")[0] for name in split} for split in splits]
    assert not kinds[0] & kinds[1]
    assert all((tmp_path / "out" / "train" / f"{name}.txt").read_text().strip() for name in splits[0])
    fetch("emoji", tmp_path / "few", "--limit", 4)
    assert len(list((tmp_path / "few" / "train").glob("*.webp"))) == 4
