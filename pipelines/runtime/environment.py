"""Environment variables of Ray and glibc, set once for the driver and its workers before either starts.

Variables that the user has set are left unchanged.
"""

import ctypes
import os
import sys

# glibc maps each block above its threshold (32 MiB at most) anew and unmaps it at free, so a CPU forward pass pays for
# page faults: EfficientNet-lite0 at batch 32 took 33 ms per image with it and 11 ms without (one thread).
# The driver calls mallopt; Ray workers need the variables, because Ray starts their interpreter.
MMAP_THRESHOLD_BYTES = 1 << 30
TRIM_THRESHOLD_BYTES = (1 << 31) - 1  # mallopt takes an int
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

WORKER_ENV = {
    "NO_ALBUMENTATIONS_UPDATE": "1",  # otherwise its import checks online for a newer version
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD_BYTES),
    # pyarrow's own allocator also returns blocks: reading the photos of a part took 110 ms, and 20 ms with glibc's
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}

DRIVER_ENV = {
    **WORKER_ENV,
    # a task that Ray ends for want of memory: run_units says so and waits, where Ray would try for ever, in silence
    "RAY_task_oom_retries": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # our own bar counts units, not operators
    "RAY_COLOR_PREFIX": "0",  # no escape codes in the log
    # without a dashboard this line repeats every second
    "RAY_DEDUP_LOGS_SKIP_REGEX": "Failed to query Ray Train Controller actor state",
}

# For a local Ray only, before Ray is imported: a token, Ray's own default, without its warning; and 127.0.0.1 for all
# of its servers, which Ray does by default on macOS and Windows, hence the name.
LOCAL_DRIVER_ENV = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# For a local Ray only: this machine is not preempted, and the train controller polls its workers every 0.5 s instead
# of every 2 s. A training takes 45 s instead of 51 s.
LOCAL_RAY_ENV = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


def prepare_driver() -> None:
    """Set the driver's environment; call it before `import ray`, which reads the variables."""
    set_unset(DRIVER_ENV)
    if is_local():
        set_unset(LOCAL_DRIVER_ENV)
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            libc.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
            libc.mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def set_unset(variables: dict[str, str]) -> None:
    """Set the environment variables that are not set yet."""
    for key, value in variables.items():
        os.environ.setdefault(key, value)


def is_local() -> bool:
    """Return whether Ray is to start on this machine: RAY_ADDRESS names no cluster."""
    return os.environ.get("RAY_ADDRESS") in (None, "", "local")


def is_dashboard(address: str) -> bool:
    """Return whether RAY_ADDRESS is a dashboard to submit jobs to, not this process's own cluster (host:port)."""
    return address.startswith(("http://", "https://"))
