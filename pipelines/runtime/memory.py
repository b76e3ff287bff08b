"""What to say and how long to wait when a node runs out of memory, mostly because of other programs.

Ray ends tasks and actors of a node above RAY_memory_usage_threshold (95 %), before the kernel ends what it likes.
"""

import os
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from pipelines.runtime.stage import StageError

WAITS_S = (10, 20, 40, 80, 160)  # each before one more attempt; from the first again once something was done

_NODE = re.compile(r"Memory on the node \(IP: ([^,)]+).*?\) was ([\d.]+)GB used / ([\d.]+)GB")
_LARGEST = re.compile(r"Top 10 memory users:[^\n]*\n(\d+)\t([\d.]+)\t([^\n]*)")


@dataclass
class Patience:
    """Waits until memory may be free again. advice: what the user can change, beside closing other programs."""

    title: str
    advice: str
    _done: int = 0
    _waited: int = 0

    def wait(self, problem: str, *, done: int) -> None:
        """Say what happened and wait, longer each time. Raises StageError after the longest wait.

        done: parts or steps so far; if there are more than at the last wait, the next wait is the shortest one.
        """
        if done > self._done:
            self._done, self._waited = done, 0
        if self._waited == len(WAITS_S):
            total_s = sum(WAITS_S)
            raise StageError(
                f"{self.title}: {problem}, and again after waits of {total_s:g} s; close other programs, or "
                f"{self.advice}; finished work is kept: run the same command again to resume"
            )
        wait_s = WAITS_S[self._waited]
        self._waited += 1
        print(f"{self.title}: {problem}; retrying in {wait_s:g} s. If it repeats: {self.advice}", flush=True)
        time.sleep(wait_s)


def shortage(error: BaseException) -> str | None:
    """Return the shortage of memory that an error of Ray tells of, in half a sentence; None if it tells of none."""
    text = "\n".join(str(each) for each in _chain(error))
    if found := _NODE.search(text):
        host, used, total = found.groups()
        problem = f"node {host} is low on memory ({float(used):.1f} of {float(total):.1f} GB in use"
        if largest := _LARGEST.search(text):
            number, size, command = largest.groups()
            program = Path(command.split()[0]).name if command.strip() else "?"  # its arguments may hold secrets
            problem += f", {size} of them by process {number}, {program}"
        return f"{problem}), so Ray ended some of this work"
    if "Worker exit type: SYSTEM_ERROR" in text or "The worker died unexpectedly" in text:
        return "a process of this work was killed, by the kernel if memory was short (`dmesg` says so there)"
    return None


def wait_if_restarted(title: str, advice: str) -> None:
    """In an actor: if Ray has started it again, say so, and wait until its node has memory for it.

    Raises StageError if the node has none after all waits. Ray itself would start the actor for ever, in silence.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 calls a method of its own here that it calls deprecated
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
    if restarted:
        print(f"{title}: an actor ended and was started again; {_memory_left()}. If it repeats: {advice}", flush=True)
        wait_for_memory(Patience(title, advice))


def wait_for_memory(patience: Patience) -> None:
    """Wait while this node is so full that Ray ends work on it. Raises StageError if it stays so."""
    threshold = float(os.environ.get("RAY_memory_usage_threshold") or 0.95)  # noqa: SIM112 (Ray's name)
    while psutil.virtual_memory().percent >= 100 * threshold:
        patience.wait(_memory_left(), done=0)


def _memory_left() -> str:
    node = psutil.virtual_memory()
    return f"its node has {node.available / 1e9:.1f} of {node.total / 1e9:.1f} GB of memory left"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and what caused it, once each; for Ray Train also the errors of the workers."""
    seen: list[BaseException] = []
    todo = [error]
    while todo:
        each = todo.pop()
        if isinstance(each, BaseException) and each not in seen:
            seen.append(each)
            yield each
            todo += [each.__cause__, *getattr(each, "worker_failures", {}).values()]
