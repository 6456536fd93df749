"""Files of a source that are no images and say nothing of one: counted, so that none is lost in silence."""

import os
from collections import Counter
from collections.abc import Mapping

MAX_KINDS = 100  # told apart; files of yet others are counted together
TOLD_KINDS = 6
OTHERS = "others"


class Ignored(Counter):
    """Extension (of a name without one: the name) -> number of files."""

    def add(self, name: str) -> None:
        self[self._kind(name)] += 1

    def take(self, name: str) -> None:
        """One of them is an image after all."""
        if self[kind := self._kind(name)] > 0:
            self[kind] -= 1

    def _kind(self, name: str) -> str:
        extension = os.path.splitext(name)[1].lower() or name.rpartition("/")[2]
        return extension if extension in self or len(self) < MAX_KINDS else OTHERS


def told_ignored(ignored: Mapping[str, int]) -> str:
    """'12 files that are no images: .pdf 9, .txt 3'; nothing where there are none."""
    found = {kind: count for kind, count in ignored.items() if count > 0}
    ordered = sorted(found.items(), key=lambda item: (-item[1], item))
    if not ordered:
        return ""
    told = [f"{kind} {count:,}" for kind, count in ordered[:TOLD_KINDS]]
    if len(ordered) > TOLD_KINDS:
        told.append(f"{len(ordered) - TOLD_KINDS:,} more kinds")
    total = sum(found.values())
    what = "1 file that is no image" if total == 1 else f"{total:,} files that are no images"
    return f"{what}: {', '.join(told)}"
