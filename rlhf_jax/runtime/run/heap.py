"""Memory that the C library keeps after it was freed."""

import ctypes
import sys


def trim_heap() -> bool:
    """Returns freed memory to the operating system; False if the C library cannot.

    A compilation leaves hundreds of megabytes that glibc keeps, and that training does not need.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
