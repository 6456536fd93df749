"""Whether the folders of images are their classes, for folders and archives alike."""

import re

from trainkit.data.account import MAX_EXAMPLES, Account, Kind
from trainkit.data.sources.entries import BELOW_SPLIT, TOP_FOLDER, folder_class
from trainkit.data.sources.splits import split_by_folder

REPEATS = re.compile(r"([1-9][0-9]*)_.+")


def _are_repeats(names: set[str]) -> bool:
    """Whether all folders are named like 10_cat, and not numbered one after the other like classes."""
    found = [REPEATS.fullmatch(name) for name in names]
    if not found or None in found:
        return False
    numbers = sorted(int(match[1]) for match in found if match)
    return len(numbers) == 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers)))


class FolderClasses:
    """The classes that folders stand for, learnt from one path after the other.

    With `label_from` parent_folder they are classes only if all images are equally deep and in folders of several
    names, as `datasets` has it. With top_folder, images that are not in a folder have no class; where every folder at
    the top is a split, as in train/cat/a/1.png, the classes are the folders in it.
    """

    def __init__(self, label_from: str):
        self._names: dict[str, set[str]] = {label_from: set(), BELOW_SPLIT: set()}
        self._label_from, self._is_uneven = label_from, label_from == "none"
        self._are_splits = label_from == TOP_FOLDER
        self._last: str | None = None
        self._depth: int | None = None
        self._example: str | None = None
        self._reason: str | None = None
        self._shallow: dict[int, list[str]] = {0: [], 1: []}  # examples of paths, by the depth of their folders
        self._num_shallow = dict.fromkeys(self._shallow, 0)

    @property
    def rule(self) -> str:
        """How `folder_class` finds the class of an image."""
        return BELOW_SPLIT if self._are_splits and self._names[BELOW_SPLIT] else self._label_from

    @property
    def names(self) -> set[str]:
        return self._names[self.rule]

    @property
    def are_classes(self) -> bool:
        return not self._is_uneven and len(self.names) > 1

    def note(self, path: str) -> None:
        """Learn from the path of an image. Paths of one folder are best given one after the other."""
        folder, depth = path.rpartition("/")[0], path.count("/")
        if depth in self._shallow:
            self._num_shallow[depth] += 1
            if len(self._shallow[depth]) < MAX_EXAMPLES:
                self._shallow[depth].append(path)
        if folder != self._last:
            self._last = folder
            self._note_folder(folder, path)

    def count(self, account: Account) -> None:
        """Add to the account why folders are not classes, which images are not in one, and repeats of kohya."""
        for name in sorted(self.names) if _are_repeats(self.names) else ():
            account.add(Kind.REPEATS, name)
        if self._reason:
            account.add(Kind.NO_CLASSES, self._reason)
        elif self._label_from == TOP_FOLDER and self.are_classes:
            for depth in (0, 1) if self.rule == BELOW_SPLIT else (0,):
                for path in self._shallow[depth]:
                    account.add(Kind.NO_CLASS_FOLDER, path)
                account.add(Kind.NO_CLASS_FOLDER, count=self._num_shallow[depth] - len(self._shallow[depth]))
        elif self._label_from == TOP_FOLDER:
            why = f"all images are in {next(iter(self.names))}" if self.names else "no image is in a folder"
            account.add(Kind.NO_CLASSES, f"--label_from {TOP_FOLDER}: {why}")

    def _note_folder(self, folder: str, path: str) -> None:
        if self._is_uneven or (not folder and self._label_from == TOP_FOLDER):
            return
        depth = folder.count("/") + 1 if folder else 0
        if self._label_from == "parent_folder" and self._depth not in (None, depth):
            self._reason = (
                f"{self._example} and {path} are not equally deep; --label_from top_folder uses the folders at the top"
            )
            self._is_uneven = True
            self._names[self._label_from].clear()
            return
        self._depth, self._example = depth, path
        if folder:
            self._names[self._label_from].add(folder_class(folder, self._label_from))
        if self._are_splits:
            self._are_splits = split_by_folder(f"{folder.partition('/')[0]}/") is not None
            if name := folder_class(folder, BELOW_SPLIT):
                self._names[BELOW_SPLIT].add(name)
