"""The account of a preparation: what happened to everything that was found, so that nothing is dropped in silence.

    account = Account()
    account.add(Kind.ROW_WITHOUT_IMAGE, "metadata.csv line 7: a.png")
    account.lines()      # "1 metadata row without an image: metadata.csv line 7: a.png"

Sources fill one while they list, workers one per shard for what only reading a file shows. Accounts are merged,
printed, stored in preparation.json and shown by --inspect.
"""

import os
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

MAX_EXAMPLES = 3
MAX_KINDS = 100  # extensions counted separately; files with further ones are counted together
SHOWN_EXTENSIONS = 6
OTHERS = "others"


class Kind(str, Enum):
    """What an account counts, in words; "~" stands where the plural has an s."""

    FILES_FOUND = "file~ found"
    ROWS_FOUND = "row~ found"
    EXTRA_ITEMS = "further item~ (a missing file, a damaged part of an archive)"
    SHARED_SIDECAR = "caption or vector file~ used again for another image"
    IMAGES = "image~"
    HELD_OUT = "image~ held out for validation"
    REJECTED = "rejected"
    CAPTION_FILES = "caption file~ used"
    VECTOR_FILES = "vector file~ used"
    CONDITION_FILES = "conditioning image~ used"
    CONDITION_NOT_USED = "conditioning image~ without an image, not used"
    LABEL_FILES = "label file~ used (.cls, .json)"
    METADATA_FILES = "metadata file~ used"
    SIDECAR_NOT_USED = "caption, vector or label file~ of an image, not used"
    HIDDEN = "hidden file~, not read"
    METADATA_ROWS = "metadata row~ used"
    ROW_WITHOUT_IMAGE = "metadata row~ without an image"
    IMAGE_WITHOUT_ROW = "image~ without a metadata row, not used"
    NO_ROWS = "metadata file~ without rows"
    DUPLICATE_ROW = "metadata row~ repeating another one"
    MERGED_ROW = "further metadata row~ of an image, added as captions"
    MATCHED_NAME = "file name~ in metadata matched to an image of a slightly different name"
    COLUMN_NOT_USED = "column~ not used"
    COLUMN_ALIAS = "column~ read under another name"
    NO_CLASSES = "reason~ why folders are not classes"
    NO_CLASS_FOLDER = "image~ without a class folder"
    LABEL_NOT_A_CLASS = "label~ not naming a class"
    VECTOR_NOT_USED = ".npy file~ not used as vectors"
    SIDECAR_NOT_READ = "file~ named after an image, not read"
    MASK = "mask~ of OneTrainer (-masklabel, -condlabel), not read"
    SAMPLE_PART = "further image~ of a WebDataset sample, not read"
    LINK_NOT_FOLLOWED = "linked folder~ not read, since what it links to is read elsewhere"
    NO_CAPTION = "image~ without a caption"
    NO_CLASS = "image~ without a class"
    EMPTY_CAPTION = "empty caption~"
    FALLBACK_ENCODING = "text file~ not in UTF-8, read as cp1252"
    OTHER_SPLIT = "file~ of another split, not read"
    OTHER_SPLIT_ROWS = "row~ of another split, not read"
    NO_SPLIT = "file~ outside the folders of splits, not read (--dataset_split all reads all)"
    SPLIT_NAME = "image~ named like one of a split, read like the others"
    OTHER_FORMAT = "image file~ next to tables or archives, not read"
    FOREIGN_IMAGE = "image~ of a format that is not read (convert to JPEG or PNG)"
    TABLE_NOT_READ = "table~ not read (metadata.jsonl, .csv, .json and .parquet are)"
    REPEATS = "folder~ named as of kohya (REPEATS_NAME): repeats are not read, every image counts once"
    CLASS_ORDER = "difference~ to the class order of `datasets`"
    SIMILAR_NAMES = "pair~ of class names that look the same or are the same number"

    def words(self, count: int = 1) -> str:
        return self.value.replace("~", "" if count == 1 else "s")


FOUND = (Kind.FILES_FOUND, Kind.ROWS_FOUND, Kind.EXTRA_ITEMS, Kind.SHARED_SIDECAR)
# What becomes of each file or row that was found. Further kinds, and `ignored`, complete the sum; others are notes.
RESULTS = (Kind.IMAGES, Kind.HELD_OUT, Kind.REJECTED)
USES = (
    Kind.CAPTION_FILES, Kind.VECTOR_FILES, Kind.CONDITION_FILES, Kind.CONDITION_NOT_USED, Kind.LABEL_FILES,
    Kind.METADATA_FILES, Kind.SIDECAR_NOT_USED, Kind.IMAGE_WITHOUT_ROW, Kind.OTHER_SPLIT, Kind.NO_SPLIT,
    Kind.OTHER_FORMAT, Kind.HIDDEN,
)  # fmt: skip


class Account:
    """Counts per kind with up to three examples each, and ignored files by extension."""

    def __init__(self) -> None:
        self.counts: dict[Kind, int] = {}
        self.examples: dict[Kind, list[str]] = {}
        self.ignored: dict[str, int] = {}  # extension, or the name of a file without one

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Account) and self.to_json() == other.to_json()

    def add(self, kind: Kind, example: str | None = None, count: int = 1) -> None:
        if count <= 0:
            return
        self.counts[kind] = self.counts.get(kind, 0) + count
        examples = self.examples.setdefault(kind, [])
        if example is not None and len(examples) < MAX_EXAMPLES and example not in examples:
            examples.append(example)

    def ignore(self, name: str) -> None:
        """Count a file that is neither an image nor anything about one."""
        extension = self._extension(name)
        self.ignored[extension] = self.ignored.get(extension, 0) + 1

    def unignore(self, name: str) -> None:
        """Take back an `ignore`: metadata names the file as an image."""
        extension = self._extension(name)
        if self.ignored.get(extension, 0) > 1:
            self.ignored[extension] -= 1
        else:
            self.ignored.pop(extension, None)

    def merge(self, other: "Account") -> None:
        for kind, count in other.counts.items():
            examples = other.examples.get(kind, [])
            self.add(kind, None, count)
            for example in examples:
                if len(self.examples[kind]) < MAX_EXAMPLES and example not in self.examples[kind]:
                    self.examples[kind].append(example)
        for extension, count in other.ignored.items():
            self.ignored[extension] = self.ignored.get(extension, 0) + count

    def move(self, kind: Kind, other: Kind, count: int) -> None:
        """Count `count` of `kind` as `other` instead."""
        self.counts[kind] = self.counts.get(kind, 0) - count
        self.add(other, count=count)

    @property
    def difference(self) -> int:
        """What was found minus what became of it: 0 in an account that adds up."""
        found, used = (sum(self.counts.get(kind, 0) for kind in kinds) for kinds in (FOUND, (*RESULTS, *USES)))
        return found - used - sum(self.ignored.values())

    def sum_line(self) -> str | None:
        """'12 files found = 10 images + 1 rejected + 1 ignored'; None if it was not counted what was found."""
        if not any(kind in self.counts for kind in (Kind.FILES_FOUND, Kind.ROWS_FOUND)):
            return None
        found, used = (
            [f"{self.counts[kind]:,} {kind.words(self.counts[kind])}" for kind in kinds if self.counts.get(kind)]
            for kinds in (FOUND, (*RESULTS, *USES))
        )
        if ignored := sum(self.ignored.values()):
            used.append(f"{ignored:,} ignored")
        if self.difference:
            used.append(f"{self.difference:,} not accounted for")
        return f"{' + '.join(found)} = {' + '.join(used)}"

    def lines(self) -> list[str]:
        """The sum, then a line with count and examples per kind that the sum does not show, in the order of `Kind`."""
        summed = self.sum_line()
        shown = {*FOUND, *RESULTS} | ({kind for kind in USES if not self.examples.get(kind)} if summed else set())
        ordered = [kind for kind in Kind if self.counts.get(kind) and kind not in shown]
        lines = [summed] if summed else []
        lines += [_line(kind, self.counts[kind], self.examples.get(kind, [])) for kind in ordered]
        ignored = format_ignored(self.ignored)
        return [*lines, f"ignored {ignored}"] if ignored else lines

    def to_json(self) -> dict[str, Any]:
        """{"metadata row without an image": {"count": 1, "examples": [...]}, ...}; ignored files are kept apart."""
        return {
            kind.words(): {"count": self.counts[kind], "examples": self.examples.get(kind, [])}
            for kind in Kind
            if self.counts.get(kind)
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], ignored: Mapping[str, int] | None = None) -> "Account":
        account, kinds = cls(), {kind.words(): kind for kind in Kind}
        for name, entry in content.items():
            if name in kinds:
                account.counts[kinds[name]] = entry["count"]
                account.examples[kinds[name]] = list(entry["examples"])
        account.ignored = dict(ignored or {})
        return account

    def _extension(self, name: str) -> str:
        extension = os.path.splitext(name)[1].lower() or name.rpartition("/")[2]
        return extension if extension in self.ignored or len(self.ignored) < MAX_KINDS else OTHERS


def _line(kind: Kind, count: int, examples: Iterable[str]) -> str:
    shown = ", ".join(examples)
    more = ", ..." if count > MAX_EXAMPLES and shown else ""
    return f"{count:,} {kind.words(count)}{f': {shown}{more}' if shown else ''}"


def format_ignored(ignored: Mapping[str, int]) -> str:
    """'12 files that are not images: .pdf 9, .txt 3'; empty if there are none."""
    found = {extension: count for extension, count in ignored.items() if count > 0}
    ordered = sorted(found.items(), key=lambda item: (-item[1], item))
    if not ordered:
        return ""
    shown = [f"{extension} {count:,}" for extension, count in ordered[:SHOWN_EXTENSIONS]]
    if len(ordered) > SHOWN_EXTENSIONS:
        shown.append(f"{len(ordered) - SHOWN_EXTENSIONS:,} more kinds")
    total = sum(found.values())
    what = "1 file that is not an image" if total == 1 else f"{total:,} files that are not images"
    return f"{what}: {', '.join(shown)}"
