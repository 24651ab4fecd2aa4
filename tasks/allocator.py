"""How the C library keeps memory between the steps of a job."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 2**28  # bytes of free memory at the heap's end that are not given back
LARGEST = 2**25  # bytes of what comes from the heap; glibc takes no more in all of its releases


def keep_freed_memory() -> bool:
    """Keep up to KEPT bytes that are freed for what is allocated next; return whether the C library does so.

    A step frees all that it made. By default glibc gives much of that back to the system, which hands it out again in
    the next step page by page, each filled with zeros: some 4,000 pages in a step of the models of images at K = 50.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, KEPT))
