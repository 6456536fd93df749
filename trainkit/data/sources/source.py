"""What a preparation needs of a source of images: a folder, archives, tables or a dataset of the Hub."""

from typing import Any, Protocol

from trainkit.data.account import Account
from trainkit.data.pairing import PairSettings
from trainkit.data.sources.records import Record, Unit


class Reader(Protocol):
    """Reads the items of a source in any process; it can be pickled."""

    def name(self, item: Any) -> str:
        """Return the item's name in rejected.jsonl and in the column `source`."""

    def read(self, item: Any) -> Record:
        """Read one item. Raises `RejectedImage` if that is not possible."""


class Source(Protocol):
    """A listing of images; `len()` is the number of items, and `fingerprint` changes when an item does."""

    name: str
    fingerprint: str
    label_names: list[str] | None
    has_text: bool
    vector_length: int | None
    pairs: PairSettings | None  # if its images have conditioning images, and these are wanted
    account: Account

    def __len__(self) -> int: ...

    @property
    def reader(self) -> Reader: ...

    def units(self) -> list[Unit]:
        """Return the work units, in the order of the items."""
