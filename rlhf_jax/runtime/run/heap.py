"""What the process has freed and the system does not have back."""

import ctypes
import sys


def trim_heap() -> bool:
    """Hands memory that was freed back to the system; False where the C library has no way.

    Compiling leaves hundreds of megabytes that glibc keeps for later, and nothing needs later.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(0))
