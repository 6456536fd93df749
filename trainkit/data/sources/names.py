"""Match the file names in metadata to the images that are there.

Metadata is often written on another machine: names have the prefix of a folder that is missing, backslashes, absolute
paths, another case, another Unicode form, or no folder at all. A name is matched only if a single image fits best and
no other name fits the same image.
"""

import posixpath
import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote

MAX_PARTS = 64


def relative_name(name: str, prefix: str) -> str:
    """`name` in metadata of the folder `prefix` as a path relative to the root; it may lead out of it ("../")."""
    return posixpath.normpath(posixpath.join(prefix, name))


def match_names(names: Iterable[str], images: Iterable[str], taken: set[str], extensions: frozenset) -> dict[str, str]:
    """name -> image, for the `names` (relative paths) that no image has but that a single one of `images` fits best.

    `taken` are the images that have a row under their exact name. `extensions` are those of images, for names without
    one.
    """
    wanted = {name: _parts(name) for name in names}
    keys = {key for parts in wanted.values() for key in _keys(parts, extensions)}
    found: dict[str, list[str]] = {}
    for image in images:
        key = _normal(posixpath.basename(image))
        if key in keys:
            found.setdefault(key, []).append(image)
    matched: dict[str, str] = {}
    for name, parts in wanted.items():
        candidates = [image for key in _keys(parts, extensions) for image in found.get(key, ())]
        scores = [(_common(parts, _parts(image)), image) for image in candidates if image not in taken]
        best = max((score for score, _ in scores), default=0)
        fitting = [image for score, image in scores if score == best]
        if len(fitting) == 1:
            matched[name] = fitting[0]
    names_of: dict[str, int] = {}
    for image in matched.values():
        names_of[image] = names_of.get(image, 0) + 1
    return {name: image for name, image in matched.items() if names_of[image] == 1}


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _parts(name: str) -> list[str]:
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return [_normal(part) for part in parts[-MAX_PARTS:]]


def _keys(parts: list[str], extensions: frozenset) -> list[str]:
    if not parts:
        return []
    last = parts[-1]
    keys = [last, *([_normal(unquote(last))] if "%" in last else [])]
    if posixpath.splitext(last)[1] not in extensions:
        keys += [last + extension for extension in sorted(extensions)]
    return keys


def _common(name: list[str], image: list[str]) -> int:
    """How many folders above the file agree, plus one for the file itself."""
    count = 1
    for ours, theirs in zip(reversed(name[:-1]), reversed(image[:-1]), strict=False):
        if ours != theirs and _normal(unquote(ours)) != theirs:
            break
        count += 1
    return count
