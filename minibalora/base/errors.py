"""Errors that a user can do something about."""

import errno
import re

# A full disk, a quota, a limit on file sizes, a read-only or broken disk.
WRITE_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}


class InputError(ValueError):
    """An error in the user's input. The message says in one line what, where, and how to mend it.

    The scripts print the line and end with status 2.
    """


def is_failed_write(error: BaseException) -> bool:
    """Return whether writing to a disk failed."""
    rust = re.search(r"\(os error (\d+)\)", str(error))  # safetensors puts the number into its message
    number = int(rust[1]) if rust else getattr(error, "errno", None)
    return number in WRITE_ERRORS


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the machine's memory, not a GPU's, was exhausted. torch raises a RuntimeError then."""
    texts = ("allocate memory", "not enough memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
