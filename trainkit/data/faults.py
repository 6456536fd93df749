"""What can be wrong with an image file, by the names that rejected.jsonl and preparation.json use.

Files of other kinds (a PDF, a video, ...) have further names, listed in `data/images/limits.py`.
"""

EMPTY = "empty"  # no bytes
NOT_AN_IMAGE = "not_an_image"  # no format that Pillow reads
TRUNCATED = "truncated"  # ends early
CORRUPT = "corrupt"  # cannot be decoded
UNREADABLE = "unreadable"  # the system refuses to read it
MISSING = "missing"  # named, but not there
LINK = "link"  # a link in an archive, which is not followed
ENCRYPTED = "encrypted"  # a password protects the archive
UNSUPPORTED = "unsupported"  # a compression method or bit depth that is not read
NOT_A_FILE = "not_a_file"  # a device, a pipe or a socket
TOO_LARGE = "too_large"  # --max_image_pixels
TOO_SMALL = "too_small"  # --min_size
BAD_ASPECT = "bad_aspect"  # --max_aspect_ratio
ANIMATED = "animated"  # --animated reject
BAD_CAPTION = "bad_caption"  # its caption file is not text
BAD_VECTOR = "bad_vector"  # its vector has another length or type
OUT_OF_RANGE = "out_of_range"  # floating-point samples outside [0, 1]
DUPLICATE_NAME = "duplicate_name"  # an archive holds a later file of the same name
DUPLICATE = "duplicate"  # --deduplicate
CRASHED = "crashed"  # decoding it killed the process

TRANSIENT = frozenset({UNREADABLE, CRASHED})  # may succeed next time although no file changed: tried again


class RejectedImage(Exception):
    """An image file that cannot be used: `fault` is one of the names above, the message gives details."""

    def __init__(self, fault: str, message: str):
        super().__init__(message)
        self.fault = fault
