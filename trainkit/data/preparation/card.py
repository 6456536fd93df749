"""A prepared dataset in one screen of text: what is in it, where it came from, how to train on it."""

from pathlib import Path

from trainkit.data.account import Account
from trainkit.data.files import RemotePath, exists, sizes
from trainkit.data.format import (
    LOCK_NAME,
    PREPARATION_NAME,
    REJECTED_NAME,
    VALIDATION_FOLDER,
    WORK_FOLDER,
    filters_of,
    read_preparation,
)
from trainkit.data.loading.dataset import PreparedImages
from trainkit.data.pairing import pairs_of
from trainkit.errors import UserError
from trainkit.terminal import counted

SHOWN_CLASSES = 6


def print_card(folder: Path | RemotePath, flag: str = "--inspect") -> None:
    """Print the card of a prepared dataset. Raises `UserError` if it is missing, unfinished or damaged."""
    preparation = _read(folder, flag)
    damage = None
    try:
        PreparedImages(folder)
        if filters_of(preparation).get("validation_fraction") and exists(folder / VALIDATION_FOLDER):
            PreparedImages(folder / VALIDATION_FOLDER)
    except UserError as error:
        damage = error
    print(card(folder, preparation), flush=True)
    if damage is not None:
        raise damage


def _read(folder: Path | RemotePath, flag: str) -> dict:
    if isinstance(folder, Path) and not folder.is_dir():
        raise UserError(f"{flag} {folder} {'is a file' if folder.exists() else 'does not exist'}; give a folder")
    preparation = read_preparation(folder)
    if preparation is not None:
        return preparation
    again = "run its prepare_dataset.py command again, which continues from the finished work"
    if exists(folder / PREPARATION_NAME):
        raise UserError(f"{flag} {folder} is damaged ({PREPARATION_NAME} and state.json do not agree); {again}")
    if exists(folder / LOCK_NAME) or exists(folder / WORK_FOLDER):
        shards, slices = (
            sum(name.endswith(".arrow") for name in sizes(where)) for where in (folder, folder / WORK_FOLDER)
        )
        raise UserError(f"{flag} {folder} is unfinished ({shards:,} shards, {slices:,} parts of others); {again}")
    raise UserError(
        f"{flag} {folder} is not a prepared dataset (it has no {PREPARATION_NAME}); make one with prepare_dataset.py"
    )


def card(folder: Path | RemotePath, preparation: dict) -> str:
    """Return the text of the card: a dozen lines of `name  value`."""
    lines = facts(folder, preparation)
    width = max(map(len, lines)) + 2
    indented = {name: value.replace("\n", "\n" + " " * (width + 2)) for name, value in lines.items()}
    return "\n".join([f"{folder}", *(f"  {name:<{width}}{value}" for name, value in indented.items())])


def facts(folder: Path | RemotePath, preparation: dict) -> dict[str, str]:
    """Return what a preparation says of a dataset, by the names that the card gives it."""
    settings, filters = preparation["settings"], filters_of(preparation)
    size = (
        f"{settings['height']}x{settings['width']} {settings['image_mode']}, {settings['bit_depth']} bits per channel"
    )
    num_bytes = sum(shard["num_bytes"] for shard in preparation["shards"])
    num_images = preparation["num_images"]
    versions = ", ".join(f"{name} {number}" for name, number in preparation["versions"].items())
    lines = {
        "images": f"{num_images:,} of {size}, stored as {settings.get('storage', 'pixels')}",
        "conditions": _conditions(preparation),
        "held out": _held_out(folder, filters),
        "classes": _classes(preparation["classes"]),
        "rejected": _rejected(preparation["rejected"]),
        "account": _account(preparation),
        "mean, std": _statistics(preparation, settings["image_mode"]),
        "columns": ", ".join(preparation["columns"]),
        "files": f"{counted(len(preparation['shards']), 'shard')}, {num_bytes / 1e6:,.1f} MB, "
        f"{num_bytes / max(num_images, 1):,.0f} bytes per image",
        "settings": ", ".join(f"{name} {_setting(value)}" for name, value in (settings | filters).items()),
        "source": f"{preparation['source']['name']} ({preparation['source']['fingerprint']})",
        "fingerprint": f"{preparation['fingerprint']}, format {preparation['format']}",
        "made with": versions,
        "train": _command(folder, preparation, filters),
    }
    return {name: value for name, value in lines.items() if value}


def _account(preparation: dict) -> str:
    return "\n".join(Account.from_json(preparation.get("account", {}), preparation.get("ignored")).lines())


def _conditions(preparation: dict) -> str | None:
    pairs = pairs_of(preparation)
    return None if pairs is None else f"each has a conditioning image: {pairs}"


def _held_out(folder: Path | RemotePath, filters: dict) -> str | None:
    if not filters.get("validation_fraction"):
        return None
    held_out = read_preparation(folder / VALIDATION_FOLDER)
    return f"{held_out['num_images']:,} more in {folder / VALIDATION_FOLDER}" if held_out else None


def _classes(classes: dict[str, int]) -> str:
    if not classes:
        return "none"
    ordered = sorted(classes.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {count:,}" for name, count in ordered[:SHOWN_CLASSES])
    if len(ordered) == 1:
        return shown
    (_, most), (least_name, least) = ordered[0], ordered[-1]
    between = "... " if len(ordered) > SHOWN_CLASSES + 1 else ""
    more = f", {between}{least_name} {least:,}" if len(ordered) > SHOWN_CLASSES else ""
    skew = f"the largest is {most / least:,.1f} times the smallest" if least else f"{least_name} has no images"
    return f"{len(ordered):,}: {shown}{more}; {skew}"


def _rejected(rejected: dict[str, int]) -> str:
    if not rejected:
        return "none"
    faults = ", ".join(f"{count:,} {fault}" for fault, count in sorted(rejected.items(), key=lambda item: -item[1]))
    return f"{sum(rejected.values()):,}: {faults}; see {REJECTED_NAME}"


def _statistics(preparation: dict, image_mode: str) -> str | None:
    pixels = preparation.get("pixels")
    if pixels is None:
        return None
    values = zip(image_mode, pixels["mean"], pixels["std"], strict=True)
    return ", ".join(f"{channel} {mean:.4f} {std:.4f}" for channel, mean, std in values) + " (of samples in 0..1)"


def _setting(value) -> str:
    """Text of a setting; the only one that is a list is a colour."""
    return f"#{bytes(value).hex()}" if isinstance(value, list) else str(value)


def _command(folder: Path | RemotePath, preparation: dict, filters: dict) -> str:
    script = "train_unconditional.py" if pairs_of(preparation) is None else "train_conditional.py --condition image"
    command = f"accelerate launch {script} --train_data_dir {folder}"
    if filters.get("validation_fraction"):
        command += f" --validation_data_dir {folder / VALIDATION_FOLDER}"
    return command + " --output_dir model"
