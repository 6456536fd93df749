"""Prepare a folder in small units, with a reader that takes a moment for each image: there is much to interrupt."""

import sys
import time

from trainkit.data.preparation import prepare
from trainkit.data.sources import folder, records


class SlowReader(folder.FolderReader):
    def read(self, entry):
        time.sleep(0.001)
        return super().read(entry)


if __name__ == "__main__":
    from tests.slow_prepare import SlowReader as Reader  # by a name that workers know

    records.UNIT_ITEMS, prepare.SLICE_ITEMS = 64, 8
    folder.ImageFolder.reader = property(lambda self: Reader(str(self.folder), {}))
    settings = prepare.PreparationSettings(16, 16, resize_mode="crop")
    prepare.prepare(folder.ImageFolder(sys.argv[1]), settings, sys.argv[2], int(sys.argv[3]), show_progress=False)
