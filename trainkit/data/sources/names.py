"""Match the file names in metadata to the images that are there.

Metadata is often written on another machine: names have the prefix of a folder that is missing, backslashes, absolute
paths, another case, another extension, another Unicode form, or no folder. A name is matched only if a single image
fits best and no other name fits the same image.
"""

import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from urllib.parse import unquote

MAX_PARTS = 64


def relative_name(name: str, prefix: str) -> str:
    """`name` in metadata of the folder `prefix` as a path relative to the root; it may lead out of it ("../")."""
    return posixpath.normpath(posixpath.join(prefix, name))


def match_names(names: Iterable[str], images: Iterable[str], used: set[str], extensions: frozenset) -> dict[str, str]:
    """name -> image, for the `names` (relative paths) that no image has but that a single one of `images` fits best.

    `used` are the images that have a row under their exact name. `extensions` are those of images, for names without
    one.
    """
    wanted = {name: _parts(name) for name in names}
    keys = {key for parts in wanted.values() for key in (*_keys(parts), *_converted_keys(parts, extensions))}
    found: dict[str, list[str]] = {}
    for image in images:
        key = _normal(posixpath.basename(image))
        if key in keys and image not in used:
            found.setdefault(key, []).append(image)
    matched = _best_matches(wanted, found, _keys)
    used = used | set(matched.values())
    rest = {name: parts for name, parts in wanted.items() if name not in matched}
    left = {key: [image for image in group if image not in used] for key, group in found.items()}
    return matched | _best_matches(rest, left, lambda parts: _converted_keys(parts, extensions))


def _best_matches(
    wanted: dict[str, list[str]], found: dict[str, list[str]], keys_of: Callable[[list[str]], list[str]]
) -> dict[str, str]:
    """name -> image, where one image fits the name best and no other name fits that image."""
    matched: dict[str, str] = {}
    for name, parts in wanted.items():
        candidates = [image for key in keys_of(parts) for image in found.get(key, ())]
        scores = [(_common(parts, _parts(image)), image) for image in candidates]
        best = max((score for score, _ in scores), default=0)
        fitting = [image for score, image in scores if score == best]
        if len(fitting) == 1:
            matched[name] = fitting[0]
    counts = Counter(matched.values())
    return {name: image for name, image in matched.items() if counts[image] == 1}


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _parts(name: str) -> list[str]:
    parts = [part for part in re.split(r"[\\/]|::", name) if part not in ("", ".", "..")]
    return [_normal(part) for part in parts[-MAX_PARTS:]]


def _keys(parts: list[str]) -> list[str]:
    """The file names that a name may stand for as it is."""
    last = parts[-1] if parts else ""
    return [last, *([_normal(unquote(last))] if "%" in last else [])]


def _converted_keys(parts: list[str], extensions: frozenset) -> list[str]:
    """The file names of the same image in another format, or with the extension that the name lacks."""
    last = parts[-1] if parts else ""
    stem, extension = posixpath.splitext(last)
    stem = stem if extension in extensions else last
    return [stem + other for other in sorted(extensions)] if stem else []


def _common(name: list[str], image: list[str]) -> int:
    """How many folders above the file agree, plus one for the file itself."""
    count = 1
    for ours, theirs in zip(reversed(name[:-1]), reversed(image[:-1]), strict=False):
        if ours != theirs and _normal(unquote(ours)) != theirs:
            break
        count += 1
    return count
