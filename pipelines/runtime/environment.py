"""What Ray and glibc read from the environment: set once, before either starts, for the driver and its workers.

A variable that the user has set stays as it is.
"""

import ctypes
import os
import sys

# glibc maps every block above 32 MiB at most afresh and gives it back at every free, so that a CPU forward pass pays
# for page faults: EfficientNet-lite0 at batch 32 took 33 ms an image that way and 11 ms without (one thread).
# The driver sets it by mallopt, Ray workers by environment, as their interpreter is not ours to prepare.
MMAP_THRESHOLD_BYTES = 1 << 30
TRIM_THRESHOLD_BYTES = (1 << 31) - 1  # mallopt takes an int
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

WORKER_ENV = {
    "NO_ALBUMENTATIONS_UPDATE": "1",  # its import asks the network for a newer version
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD_BYTES),
    # pyarrow's own allocator gives blocks back too: reading the photos of a part took 110 ms, and 20 by glibc's
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}

DRIVER_ENV = {
    **WORKER_ENV,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # ours shows units, not operators
    # lines of Ray's own workers that say nothing to a user; the first comes every second without a dashboard
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Failed to query Ray Train Controller actor state|Requesting resources: "
    "|Attempting to start training worker group|Setting up process group for",
}

# For a Ray that we start on this machine: nothing announces its preemption, and the train controller looks every
# half second whether the workers are done, not every other second. Six seconds less per training (45 s, was 51 s).
LOCAL_RAY_ENV = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


def prepare_driver() -> None:
    """Call before ray is imported: it reads its variables then."""
    set_unset(DRIVER_ENV)
    if not os.environ.get("RAY_ADDRESS"):
        set_unset({"RAY_AUTH_MODE": "token"})  # Ray's own default for a local Ray, which would warn each time
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def set_unset(variables: dict[str, str]) -> None:
    """Set those environment variables that are not set."""
    for key, value in variables.items():
        os.environ.setdefault(key, value)


def is_dashboard(address: str) -> bool:
    """Whether RAY_ADDRESS names a cluster to send jobs to, not one that this process belongs to (host:port)."""
    return address.startswith(("http://", "https://"))
