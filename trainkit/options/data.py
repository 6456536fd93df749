"""Rooms of images: where they come from, what is made of them, how they are read and varied."""

from dataclasses import dataclass

from trainkit.options.fields import option


@dataclass
class SourceOptions:
    """source: where the images come from"""

    train_data_dir: str | None = option(
        None,
        "folder of images (class folders become labels), .zip, .tar, .parquet or .h5 files, a URL of these, or a "
        "prepared dataset",
    )
    dataset_name: str | None = option(
        None, "Hub dataset, or a local folder `datasets` understands; wins over --train_data_dir"
    )
    dataset_config_name: str | None = option(None, "configuration of --dataset_name, where it has several")
    dataset_split: str = option(
        "train", "split to read where the data has splits, by the rules of `datasets`; all: everything as one"
    )
    cache_dir: str | None = option(
        None, "folder for downloads and prepared datasets (default: $TRAINKIT_CACHE, else ~/.cache/trainkit)"
    )
    storage_options: str | None = option(
        None, "JSON with what a URL's store needs (key, secret, endpoint_url, anon, ...); default: its own settings"
    )
    vector_column: str = option(
        "vector", "column or key of vectors in metadata.jsonl, Parquet, HDF5, WebDataset .json and Hub datasets"
    )
    caption_column: str | None = option(
        None, "column of captions in metadata files, tables and Hub datasets; default: text, caption or the only "
        "other one whose name says so",
    )  # fmt: skip
    label_from: str = option(
        "parent_folder", "folder whose name is an image's class: the one that holds it (all images equally deep), the "
        "one at the top, or none", choices=("parent_folder", "top_folder", "none"),
    )  # fmt: skip
    num_proc: int = option(0, "processes that decode images; 0: one per core", within="[0, inf)")


@dataclass
class ImageOptions:
    """images: what is made of them before training"""

    resolution: str | None = option(
        None, "side of the training images in pixels, or HxW; default: that of the prepared dataset, else 64"
    )
    stored_resolution: str | None = option(
        None, "side (or HxW) in pixels to store the images at, larger than --resolution; default: --resolution"
    )
    resize_mode: str | None = option(
        None, "how an image gets to that size: cut out its centre, cut anew at each visit (random_crop, the default), "
        "fit it inside with --background around, or stretch it", choices=("crop", "random_crop", "pad", "stretch"),
    )  # fmt: skip
    center_crop: bool = option(
        False, "--resize_mode crop: crop the centre once, when the data is prepared, in the place of random_crop"
    )
    image_mode: str | None = option(
        None, "colour mode that the images are converted to; default: that of the prepared dataset, else RGB",
        choices=("RGB", "L", "RGBA"),
    )  # fmt: skip
    background: str = option(
        "white",
        "colour behind transparent pixels in RGB and L, and around padded images (name or #rrggbb)",
    )
    preserve_input_precision: bool = option(
        False, "keep 16 bits a channel where the source has more than 8, instead of reducing it to 8"
    )
    storage: str = option(
        "pixels", "how they lie on disk: pixels load the fastest, png is as exact, jpeg and webp are the smallest",
        choices=("pixels", "png", "jpeg", "webp"),
    )  # fmt: skip
    storage_quality: int = option(95, "quality of --storage jpeg and webp; webp is lossless at 100", within="[1, 100]")
    min_size: int = option(0, "reject images whose shorter side has fewer pixels", within="[0, inf)")
    max_aspect_ratio: float = option(
        0.0, "reject images whose longer side exceeds this times the shorter one; 0: no limit", within="[0, inf)"
    )
    animated: str = option(
        "first", "of images of several frames or pages: take the first, or reject them", choices=("first", "reject")
    )
    max_image_pixels: int = option(
        89_478_485,
        "reject images of more pixels (width x height), before room is made for them; 0: none",
        within="[0, inf)",
    )


@dataclass
class LoadingOptions:
    """loading: how batches come from the prepared dataset"""

    dataloader_num_workers: int = option(
        1, "threads that load batches and draw noise ahead of the step; 0: none", within="[0, inf)"
    )
    shuffle_block_size: int = option(
        0,
        "images to a block: shuffles blocks, then within 16 of them, for data beyond memory on slow disks; 0: all",
        within="[0, inf)",
    )
    streaming: bool = option(
        False, "read a prepared dataset at a URL block by block, in the place of a copy in --cache_dir"
    )


@dataclass
class AugmentationOptions:
    """augmentation: on the device, drawn anew for every visit"""

    random_flip: bool = option(False, "mirror each image left-right with probability 1/2")
    random_rotation: float = option(0.0, "rotate by up to this many degrees either way", within="[0, 180]")
    random_translation: float = option(0.0, "shift by up to this fraction of width and height", within="[0, 1]")
    random_scale: float = option(
        0.0, "zoom by a factor of 1 / (1 + X) to 1 + X, at most 4: 1 is half to twice the size", within="[0, 4]"
    )
    random_resized_crop: list[float] | None = option(
        None,
        "cut out a part and resize it: its smallest and largest area, as parts of the stored image's",
        nargs="+",
        within="(0, 1]",
    )
    random_resized_crop_aspect: list[float] = option(
        [0.75, 1.3333],
        "least and greatest width to height of that part, relative to the image's own",
        nargs="+",
        within="(0, inf)",
    )
    random_brightness: float = option(
        0.0, "change the brightness by up to this fraction of the range from black to white", within="[0, 1]"
    )
    random_contrast: float = option(
        0.0, "multiply the distance from mid-grey by a factor from 1 - X to 1 + X", within="[0, 1]"
    )
    random_saturation: float = option(
        0.0, "multiply the distance from grey by a factor from 1 - X to 1 + X", within="[0, 1]"
    )
    random_hue: float = option(0.0, "rotate the hue by up to this many degrees either way", within="[0, 180]")
    augmentation_probability: float = option(
        1.0, "chance that an image gets each kind of augmentation (but --random_flip)", within="(0, 1]"
    )
    augmentation_conditioning: bool = option(
        False, "tell the UNet in training what was done to each image, so that samples do not show it (non-leaking)"
    )
