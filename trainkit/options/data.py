"""Options of the data: where images come from, how they are prepared, loaded and augmented."""

from dataclasses import dataclass

from trainkit.options.fields import option


@dataclass
class SourceOptions:
    """source: where the images come from"""

    train_data_dir: str | None = option(
        None,
        "folder of images (class folders become labels), .zip, .tar, .parquet or .h5 files, a URL of "
        "these, or a prepared dataset",
    )
    dataset_name: str | None = option(
        None, "Hub dataset, or a local folder that `datasets` can load; takes precedence over --train_data_dir"
    )
    dataset_config_name: str | None = option(None, "configuration of --dataset_name, if it has several")
    dataset_split: str = option(
        "train", "split to read if the data has splits, by the rules of `datasets`; all: everything"
    )
    cache_dir: str | None = option(
        None, "folder for downloads and prepared datasets (default: $TRAINKIT_CACHE, else ~/.cache/trainkit)"
    )
    storage_options: str | None = option(
        None,
        "JSON with what the store of a URL needs (key, secret, endpoint_url, anon, ...); default: its own settings",
    )
    vector_column: str = option(
        "vector", "column or key of vectors in metadata files, Parquet, HDF5, WebDataset .json and Hub datasets"
    )
    image_column: str | None = option(
        None, "column of images, or of the names of their files, in tables and metadata files; default: image, "
        "file_name or another usual name",
    )  # fmt: skip
    caption_column: str | None = option(
        None,
        "column of captions in metadata files, tables and Hub datasets; default: text, caption, or the "
        "only other column with such a name",
    )  # fmt: skip
    label_from: str = option(
        "parent_folder",
        "folder that gives the class of an image: its own (if all images are equally deep), the top one, "
        "or none", choices=("parent_folder", "top_folder", "none"),
    )  # fmt: skip
    num_proc: int = option(0, "processes that decode images; 0: one per core", within="[0, inf)")


@dataclass
class PairOptions:
    """pairs: a conditioning image for each image, for train_conditional.py --condition image"""

    conditioning_data_dir: str | None = option(
        None,
        "folder of conditioning images with the relative names of the images in --train_data_dir, any image suffix; "
        "default: what tables, metadata files and WebDataset archives pair",
    )
    conditioning_image_column: str | None = option(
        None, "column of conditioning images, or of the names of their files, in tables and metadata files; default: "
        "conditioning_image in tables, conditioning_file_name in metadata files; none: prepare without them",
    )  # fmt: skip
    conditioning_image_mode: str | None = option(
        None, "colour mode of the conditioning images; default: that of the prepared dataset, else RGB",
        choices=("RGB", "L", "RGBA"),
    )  # fmt: skip
    conditioning_classes: int | None = option(
        None,
        "conditioning images are label maps of ids from 0 to this number less 1: one input channel for each",
        within="[2, 256]",
    )


@dataclass
class ImageOptions:
    """images: how they are decoded, resized and stored"""

    resolution: str | None = option(
        None, "side of the training images in pixels, or HxW; default: that of the prepared dataset, else 64"
    )
    stored_resolution: str | None = option(
        None, "side (or HxW) in pixels of the stored images, larger than --resolution; default: --resolution"
    )
    resize_mode: str | None = option(
        None,
        "how images are brought to that size: centre crop, a new random crop per visit (the default), "
        "padding with --background, or stretching", choices=("crop", "random_crop", "pad", "stretch"),
    )  # fmt: skip
    center_crop: bool = option(False, "same as --resize_mode crop: crop the centre once, when the data is prepared")
    image_mode: str | None = option(
        None, "colour mode of the images; default: that of the prepared dataset, else RGB",
        choices=("RGB", "L", "RGBA"),
    )  # fmt: skip
    background: str = option(
        "white",
        "colour behind transparent pixels in RGB and L and around padded images: a name or #rrggbb",
    )
    preserve_input_precision: bool = option(
        False, "keep 16 bits per channel if the source has more than 8, instead of reducing them to 8"
    )
    storage: str = option(
        "pixels", "storage format: pixels load fastest, png is lossless, jpeg and webp are smallest",
        choices=("pixels", "png", "jpeg", "webp"),
    )  # fmt: skip
    storage_quality: int = option(95, "quality of --storage jpeg and webp; webp is lossless at 100", within="[1, 100]")
    min_size: int = option(0, "reject images whose shorter side has fewer pixels", within="[0, inf)")
    max_aspect_ratio: float = option(
        0.0, "reject images whose longer side exceeds this times the shorter one; 0: no limit", within="[0, inf)"
    )
    animated: str = option(
        "first", "images with several frames or pages: use the first one, or reject them", choices=("first", "reject")
    )
    max_image_pixels: int = option(
        89_478_485,
        "reject images of more pixels (width x height) before they are decoded; 0: no limit",
        within="[0, inf)",
    )


@dataclass
class LoadingOptions:
    """loading: how batches are read from the prepared dataset"""

    dataloader_num_workers: int = option(
        1, "threads that load batches and draw noise ahead of the step; 0: none", within="[0, inf)"
    )
    shuffle_block_size: int = option(
        0,
        "images per block: shuffle blocks, then within 16 of them, for data larger than memory on slow "
        "disks; 0: shuffle all",
        within="[0, inf)",
    )
    streaming: bool = option(False, "read a prepared dataset at a URL block by block, without a copy in --cache_dir")


@dataclass
class AugmentationOptions:
    """augmentation: on the device, drawn again for every visit of an image"""

    random_flip: bool = option(False, "mirror each image left to right with probability 1/2")
    random_rotation: float = option(0.0, "rotate by up to this many degrees either way", within="[0, 180]")
    random_translation: float = option(0.0, "shift by up to this fraction of width and height", within="[0, 1]")
    random_scale: float = option(
        0.0, "zoom by a factor from 1 / (1 + X) to 1 + X; X = 1 is half to twice the size", within="[0, 4]"
    )
    random_resized_crop: list[float] | None = option(
        None,
        "crop a part and resize it: its smallest and largest area as fractions of the stored image",
        nargs="+",
        within="(0, 1]",
    )
    random_resized_crop_aspect: list[float] = option(
        [0.75, 1.3333],
        "smallest and largest aspect ratio (width to height) of that part, relative to the image",
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
        1.0, "probability that an image gets each kind of augmentation, except --random_flip", within="(0, 1]"
    )
    augmentation_conditioning: bool = option(
        False, "give the UNet the augmentation of each image as an input, so that samples do not show it (non-leaking)"
    )
