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
NO_CONDITION = "no_conditioning_image"  # its conditioning image is not there
BAD_CONDITION = "bad_conditioning_image"  # its conditioning image cannot be decoded
CONDITION_SIZE = "conditioning_image_size"  # its conditioning image has another shape
NO_LABEL_MAP = "no_label_map"  # --conditioning_classes: it stops the preparation
OUT_OF_RANGE = "out_of_range"  # floating-point samples outside [0, 1]
DUPLICATE_NAME = "duplicate_name"  # an archive holds a later file of the same name
DUPLICATE = "duplicate"  # --deduplicate
CRASHED = "crashed"  # decoding it killed the process

TRANSIENT = frozenset({UNREADABLE, CRASHED})  # may succeed next time although no file changed: tried again
OF_THE_SETTINGS = frozenset({NO_LABEL_MAP})  # would be the fault of most files: nothing is prepared


class RejectedImage(Exception):
    """An image file that cannot be used: `fault` is one of the names above, the message gives details."""

    def __init__(self, fault: str, message: str):
        super().__init__(message)
        self.fault = fault


def of_condition(rejection: RejectedImage, name: str = "") -> RejectedImage:
    """The fault of an image whose conditioning image, perhaps the file `name`, is rejected."""
    fault, reason = BAD_CONDITION, f"{rejection.fault}, {rejection}"
    if rejection.fault in (CONDITION_SIZE, UNREADABLE, *OF_THE_SETTINGS):
        fault, reason = rejection.fault, str(rejection)
    elif rejection.fault == MISSING:
        fault, reason = NO_CONDITION, "it is not there"
    return RejectedImage(fault, f"its conditioning image{f' {name}' if name else ''}: {reason}")
