"""Whether the folders of images are their classes, for folders and archives alike."""

import re

from trainkit.data.account import MAX_EXAMPLES, Account, Kind
from trainkit.data.sources.entries import folder_class

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
    names, as `datasets` has it. With top_folder, images that are not in a folder have no class.
    """

    def __init__(self, label_from: str):
        self.names: set[str] = set()
        self._label_from, self._is_uneven = label_from, label_from == "none"
        self._last: str | None = None
        self._depth: int | None = None
        self._example: str | None = None
        self._reason: str | None = None
        self._num_without_folder = 0
        self._without_folder: list[str] = []

    @property
    def are_classes(self) -> bool:
        return not self._is_uneven and len(self.names) > 1

    def note(self, path: str) -> None:
        """Learn from the path of an image. Paths of one folder are best given one after the other."""
        folder = path.rpartition("/")[0]
        if not folder:
            self._num_without_folder += 1
            if len(self._without_folder) < MAX_EXAMPLES:
                self._without_folder.append(path)
        if folder != self._last:
            self._last = folder
            self._note_folder(folder, path)

    def count(self, account: Account) -> None:
        """Add to the account why folders are not classes, which images are not in one, and repeats of kohya."""
        for name in sorted(self.names) if _are_repeats(self.names) else ():
            account.add(Kind.REPEATS, name)
        if self._reason:
            account.add(Kind.NO_CLASSES, self._reason)
        elif self._label_from == "top_folder" and self.are_classes:
            for path in self._without_folder:
                account.add(Kind.NO_CLASS_FOLDER, path)
            account.add(Kind.NO_CLASS_FOLDER, count=self._num_without_folder - len(self._without_folder))

    def _note_folder(self, folder: str, path: str) -> None:
        if self._is_uneven or (not folder and self._label_from == "top_folder"):
            return
        depth = folder.count("/") + 1 if folder else 0
        if self._label_from == "parent_folder" and self._depth not in (None, depth):
            self._reason = (
                f"{self._example} and {path} are not equally deep; --label_from top_folder uses the folders at the top"
            )
            self._is_uneven = True
            self.names.clear()
            return
        self._depth, self._example = depth, path
        if folder:
            self.names.add(folder_class(folder, self._label_from))
