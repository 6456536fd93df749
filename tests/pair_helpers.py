"""Pairs of an image and a conditioning image on disk, and what a preparation makes of them."""

import csv
import dataclasses
import json
import shutil

import datasets
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from source_files import SETTINGS, files_of, write_tar, write_zip

from trainkit.data.account import Account
from trainkit.data.loading.conditioning_images import ConditioningImages
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.preparation.prepare import prepare
from trainkit.data.sources.opening import open_source
from trainkit.options.data import ImageOptions, LoadingOptions, PairOptions, SourceOptions

CLASSES = 4
MAPS = {"conditioning_classes": CLASSES}


@dataclasses.dataclass
class PairedOptions(SourceOptions, PairOptions, ImageOptions, LoadingOptions):
    """What prepare_dataset.py is told about its images."""


def open_pairs(given, **options):
    return open_source(PairedOptions(train_data_dir=str(given), num_proc=1, **options))


def prepared_pairs(given, output, settings=SETTINGS, **options):
    """Prepare and read back: the images, their conditioning images (N, H, W, _) and preparation.json."""
    preparation = prepare(open_pairs(given, **options), settings, output, 1, show_progress=False, overwrite=True)
    assert Account.from_json(preparation["account"], preparation["ignored"]).difference == 0
    images = PreparedImages(output)
    return images, ConditioningImages(images).gather(np.arange(len(images))), preparation


def label_map(number, height=20, width=28):
    """Ids (height, width) uint8 below `CLASSES`: a rectangle that is not in the middle, so that moves show."""
    ids = np.zeros((height, width), dtype=np.uint8)
    ids[3 : 9 + number % 4, 4 + number % 5 : 12] = 1 + number % (CLASSES - 1)
    return ids


def write_pairs(folder, count=8, height=20, width=28):
    """`images`, whose red channel is 60 times the id in `maps`, in two subfolders. Returns both folders."""
    for number in range(count):
        ids, name = label_map(number, height, width), f"{'ab'[number % 2]}/{number:02d}.png"
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 2), dtype=np.uint8)
        for kind, pixels in (("images", np.dstack([ids * 60, noise])), ("maps", ids)):
            (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / name)
    return folder / "images", folder / "maps"


def with_metadata(images, maps, folder, name="metadata.jsonl", column="conditioning_file_name"):
    """Both in one folder, and a table that says which belong together. Returns the folder."""
    shutil.copytree(images, folder / "images")
    shutil.copytree(maps, folder / "maps")
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png"))
    rows = [{"file_name": f"images/{each}", column: f"maps/{each}"} for each in names]
    if name.endswith("csv"):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder


def table_of(images, maps, column="conditioning_image"):
    def column_of(folder):
        files = [{"bytes": path.read_bytes(), "path": None} for path in sorted(folder.rglob("*.png"))]
        return pa.array(files, pa.struct({"bytes": pa.binary(), "path": pa.string()}))

    return pa.table({"image": column_of(images), column: column_of(maps)})


def webdataset(images, maps, path):
    files = {name.replace("/", "-"): content for name, content in files_of(images)}
    files |= {name.replace("/", "-").replace(".png", ".cond.PNG"): content for name, content in files_of(maps)}
    return write_tar(path, sorted(files.items()))


def hdf5(images, maps, path, name="conditioning_images", **changes):
    """Both as arrays of one file; `changes` replace arrays."""
    arrays = {key: [np.asarray(Image.open(file)) for file in sorted(folder.rglob("*.png"))]
              for key, folder in (("data", images), (name, maps))}  # fmt: skip
    with h5py.File(path, "w") as file:
        for key, array in (arrays | changes).items():
            file[key] = np.stack(array)
    return path


def given_as(how, images, maps, folder):
    """The source and the flags for the same pairs in another form."""
    folder.mkdir()
    if how == "folder":
        return images, {"conditioning_data_dir": str(maps)}
    if how in ("metadata.jsonl", "metadata.csv"):
        return with_metadata(images, maps, folder, how), {}
    if how == "named column":
        with_metadata(images, maps, folder, column="segmentation")
        return folder, {"conditioning_image_column": "segmentation"}
    if how == "zip":
        return write_zip(folder / "p.zip", files_of(with_metadata(images, maps, folder / "in"))), {}
    if how == "beside zip":
        inside = with_metadata(images, maps, folder / "in")
        shutil.move(inside / "metadata.jsonl", folder)
        write_zip(folder / "p.zip", files_of(inside))
        shutil.rmtree(inside)
        return folder, {}
    if how == "webdataset":
        return webdataset(images, maps, folder / "p.tar"), {}
    if how == "parquet":
        pq.write_table(table_of(images, maps), folder / "p.parquet")
        return folder / "p.parquet", {}
    if how == "paths in parquet":
        with_metadata(images, maps, folder)
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        names = {"file_name": "image", "conditioning_file_name": "conditioning_image"}
        columns = {new: [row[old] for row in rows] for old, new in names.items()}
        pq.write_table(pa.table(columns), folder / "p.parquet")
        return folder / "p.parquet", {}
    if how == "hdf5":
        return hdf5(images, maps, folder / "p.h5"), {}
    features = datasets.Features({"image": datasets.Image(), "edges": datasets.Image()})
    datasets.Dataset(table_of(images, maps, "edges"), info=datasets.DatasetInfo(features=features)).save_to_disk(
        folder / "saved"
    )
    return folder / "saved", {"conditioning_image_column": "edges"}
