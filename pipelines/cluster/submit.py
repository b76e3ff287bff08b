"""Submit a stage as a Ray job, follow its log and fetch its small files.

With RAY_ADDRESS=http://host:port, `run_remotely` ships a package (working_dir.py), and a job runs the same command
there (its side is job_entry.py). Data stays in PBE_STORAGE, which both sides reach; the files that dvc.lock names come
back through <storage>/jobs/<job id>/ (job_results.py). A job's id is the digest of settings, inputs and the stage's
VERSION, regardless of its other code. The same command attaches to a running job, fetches the outputs of a finished
one, even if its cluster is gone, and starts a new attempt of a failed one (Ray rejects a used id).
"""

import asyncio
import contextlib
import logging
import os
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pbe.errors import one_line
from pbe.places import refuse_credentials
from pipelines.cluster.job_results import attempts_in_storage, fetch, take_over_finished
from pipelines.cluster.working_dir import (
    Package,
    entrypoint,
    job_env,
    job_name,
    leave_mark,
    pack,
    refuse_what_cannot_travel,
)
from pipelines.runtime.provenance import COMMIT_VARIABLE, git_commit
from pipelines.runtime.stage import Stage, StageError

ANSWER_S = 10  # an address that does not answer within this time is unreachable
REQUEST_S = 60  # a request without an answer within this time has failed
QUIET_S = 60  # after this time without a log line, check the job's status and reopen the log
POLL_S = 2  # between attempts to reach a lost cluster
LOST_S = 300  # after this time without an answer the command gives up; the job keeps running
STOP_S = 5  # a second Ctrl-C within this time stops the job
STOPPED_S = 60  # how long it may take to stop
LOG_LINES = 20  # of a failed job's log, repeated in the error

# what requests, aiohttp and Ray's client raise for a broken connection or a refused request
CLIENT_ERRORS = (OSError, RuntimeError, aiohttp.ClientError, AuthenticationError)
MALFORMED_ANSWERS = (ValueError, TypeError, KeyError)  # what malformed or foreign JSON answers raise


def run_remotely(stage: Stage, address: str) -> None:
    """Run the stage as a job of the cluster at `address` and bring the files of `stage.outputs` back.

    Raises StageError when the settings cannot work there, the address does not answer, or the job fails (with
    its id and the end of its log). Ctrl-C detaches, a second one stops the job; both raise KeyboardInterrupt.
    """
    _refuse_what_cannot_work(stage, address)
    _reach_storage(stage)
    package = pack(stage)
    name = job_name(stage, package)
    finished = take_over_finished(stage, name)
    if finished:
        print(f"{stage.name}: job {finished} finished earlier; its outputs have been fetched", flush=True)
        return
    client = _connect(address)
    leave_mark(stage)
    job_id, is_new = _job_to_follow(client, stage, name)
    try:
        is_new = is_new and _submit(client, stage, package, job_id, address)
    except KeyboardInterrupt:
        print(
            f"\n{stage.name}: interrupted while job {job_id} was sent: it may run; the same command attaches to it. "
            f"To stop it: ray job stop --address {address} {job_id}",
            flush=True,
        )
        raise
    if not is_new:
        print(f"{stage.name}: attached again to job {job_id}, which runs at {address}", flush=True)
        _say_other_commit(client, stage, job_id, address)
    try:
        job, log_end = _follow(client, job_id, address)
    except KeyboardInterrupt:
        _detach_or_stop(client, stage, job_id, address)
        raise
    if job.status != JobStatus.SUCCEEDED:
        raise StageError(f"job {job_id} is {job.status} at {address}; the end of its log:\n{_indented(log_end)}")
    if not fetch(stage, job_id):
        raise StageError(
            f"job {job_id} succeeded, but its outputs are not in {stage.store.uri}; "
            "is PBE_STORAGE the same place for the cluster and for this machine?"
        )


def running_jobs(address: str) -> list[tuple[str, str]]:
    """Return ids and states of the stages' unfinished jobs. Raises StageError."""
    with _as_stage_error("cannot list the cluster's jobs"):
        found = {str(job.submission_id): job.status for job in _connect(address).list_jobs()}
    return [
        (name, str(status)) for name, status in found.items() if name.startswith("pbe-") and not status.is_terminal()
    ]


# -- checks before submission --------------------------------------------------------------------------------


def _refuse_what_cannot_work(stage: Stage, address: str) -> None:
    """Raise StageError before anything is sent."""
    other = os.environ.get("RAY_API_SERVER_ADDRESS", address)  # Ray's client prefers it to its argument
    if other.rstrip("/") != address.rstrip("/"):
        raise StageError(
            f"RAY_API_SERVER_ADDRESS={other} and RAY_ADDRESS={address} name two clusters; unset the former"
        )
    refuse_what_cannot_travel(stage, address)


def _reach_storage(stage: Stage) -> None:
    try:
        stage.store.list_names("jobs")  # list: its error names the cause, that of a HEAD request does not
    except OSError as error:
        raise StageError(
            f"PBE_STORAGE={stage.store.uri} cannot be read from here, and a job's manifest comes back through it (are "
            f"the credentials in AWS_* there, and not expired?): {one_line(error)}"
        ) from None


# -- the cluster ---------------------------------------------------------------------------------------------


class _Client(JobSubmissionClient):
    """A client whose requests time out: a dead tunnel accepts a request and never answers."""

    def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=(ANSWER_S, REQUEST_S), **more)


def _connect(address: str) -> JobSubmissionClient:
    refuse_credentials("RAY_ADDRESS", address)
    try:
        # first by urllib, because Ray's client would wait for minutes for an address that swallows packets
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        pass  # a server answers; the client below reports the error better
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise StageError(
            f"RAY_ADDRESS={address} does not answer ({reason}); it must be the cluster's dashboard, "
            "http://host:8265 as a rule; without RAY_ADDRESS the stage runs on this machine"
        ) from None
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)  # its client reports each upload and each closed log
    try:
        return _Client(address)
    except AuthenticationError:
        raise StageError(
            f"RAY_ADDRESS={address} rejected the token, or needs one; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from None
    except (*CLIENT_ERRORS, *MALFORMED_ANSWERS) as error:
        raise StageError(f"RAY_ADDRESS={address} is not a Ray dashboard that accepts jobs: {one_line(error)}") from None


def _last_attempt(client: JobSubmissionClient, stage: Stage, name: str) -> tuple[int, JobStatus | None]:
    """Return number and status of the newest job of this name, preferring unfinished ones; (0, None) if none.

    Attempts known only to the storage count too, without a status: a cluster forgets its jobs when it ends.
    """
    attempts: dict[int, JobStatus | None] = dict.fromkeys(attempts_in_storage(stage, name))
    with _as_stage_error("cannot list the cluster's jobs"):
        for job in client.list_jobs():
            head, _, number = (job.submission_id or "").rpartition("-")
            if head == name and number.isdigit():
                attempts[int(number)] = job.status
    active = [number for number, status in attempts.items() if status and not status.is_terminal()]
    newest = max(active or attempts, default=0)
    return newest, attempts.get(newest)


def _job_to_follow(client: JobSubmissionClient, stage: Stage, name: str) -> tuple[str, bool]:
    """Return the id of the unfinished job of this name and False, or that of the next attempt and True."""
    attempt, status = _last_attempt(client, stage, name)
    is_new = status is None or status.is_terminal()
    return f"{name}-{attempt + is_new}", is_new


def _submit(client: JobSubmissionClient, stage: Stage, package: Package, job_id: str, address: str) -> bool:
    """Submit the job; False if an equal one was submitted at the same time, which can be followed instead."""
    data = package.zipped(job_id)
    with tempfile.TemporaryDirectory(prefix="pbe-job-") as folder:
        file = Path(folder) / f"{job_id}.zip"
        file.write_bytes(data)
        try:
            client.submit_job(
                entrypoint=entrypoint(stage, job_id),
                submission_id=job_id,
                runtime_env={"working_dir": str(file), "env_vars": job_env(stage, job_id)},
            )
        except (*CLIENT_ERRORS, *MALFORMED_ANSWERS) as error:
            if "already exists" in str(error):
                return False
            if isinstance(error, OSError):  # no answer, which may have been lost on its way
                raise StageError(
                    f"the cluster did not answer for job {job_id} ({one_line(error)}): it may run; the same command "
                    f"attaches to it, or sends it again. To stop it: ray job stop --address {address} {job_id}"
                ) from None
            raise StageError(
                f"the cluster did not take job {job_id} (the same command may work now): {one_line(error)}"
            ) from None
    print(f"{stage.name}: submitted job {job_id} to {address} ({len(data) / 1e3:,.0f} kB)", flush=True)
    return True


def _say_other_commit(client: JobSubmissionClient, stage: Stage, job_id: str, address: str) -> None:
    """Print the job's commit if it differs from the one here: a job's id holds the VERSION, not the code."""
    ours, theirs = git_commit(stage.root), None
    with contextlib.suppress(*CLIENT_ERRORS, *MALFORMED_ANSWERS):
        theirs = (client.get_job_info(job_id).runtime_env or {})["env_vars"][COMMIT_VARIABLE]
    if theirs not in (None, ours):
        print(
            f"{stage.name}: it runs the code of commit {theirs}, here is {ours}. To run yours, stop it and give the "
            f"same command again: ray job stop --address {address} {job_id}",
            flush=True,
        )


def _detach_or_stop(client: JobSubmissionClient, stage: Stage, job_id: str, address: str) -> None:
    """Handle Ctrl-C: a second one within STOP_S stops the job; nothing else does, not even a closed terminal."""
    print(f"\n{stage.name}: Ctrl-C again within {STOP_S} s stops job {job_id}; otherwise it keeps running", flush=True)
    try:
        time.sleep(STOP_S)
    except KeyboardInterrupt:
        with _as_stage_error(f"job {job_id} may still run: the request to stop it failed"):
            client.stop_job(job_id)
            deadline = time.monotonic() + STOPPED_S
            while not client.get_job_status(job_id).is_terminal() and time.monotonic() < deadline:
                time.sleep(POLL_S)
            print(f"{stage.name}: job {job_id} is {client.get_job_status(job_id)}", flush=True)
        return
    print(
        f"{stage.name}: detached; job {job_id} keeps running, and the same command attaches to it again. "
        f"To stop it: ray job stop --address {address} {job_id}",
        flush=True,
    )


@contextlib.contextmanager
def _as_stage_error(what: str) -> Iterator[None]:
    try:
        yield
    except (*CLIENT_ERRORS, *MALFORMED_ANSWERS) as error:
        raise StageError(f"{what}: {one_line(error)}") from None


@dataclass
class _Log:
    """Tracks how much of a job's log has been printed. Every connection sends the log from its beginning."""

    printed: int = 0  # characters
    end: str = ""
    interrupted: bool = False

    async def follow(self, client: JobSubmissionClient, job_id: str) -> None:
        """Print new output until the job ends. Raises TimeoutError after QUIET_S without a line."""
        try:
            await self._print(client.tail_job_logs(job_id))
        finally:
            # Ctrl-C cancels this task; a connection that breaks while it is being closed for that hides it
            task = asyncio.current_task()
            self.interrupted = task is not None and task.cancelling() > 0

    async def _print(self, chunks: AsyncIterator[str]) -> None:
        position = 0
        while True:
            async with asyncio.timeout(QUIET_S):  # a connection that died during sleep sends nothing
                text = await anext(chunks, None)
            if text is None:
                return
            new = text[max(0, self.printed - position) :]
            position += len(text)
            self.printed = max(self.printed, position)
            self.end = (self.end + new)[-20_000:]
            print(new, end="", flush=True)


def _follow(client: JobSubmissionClient, job_id: str, address: str) -> tuple[JobDetails, str]:
    """Wait for the job; return it and the end of its log. Raises StageError after LOST_S without an answer."""
    log = _Log()
    last_answer = time.monotonic()
    while True:
        try:
            # a broken log connection matters only when the cluster does not answer either
            with contextlib.suppress(*CLIENT_ERRORS):
                asyncio.run(log.follow(client, job_id))
            if log.interrupted:
                raise KeyboardInterrupt
            job = client.get_job_info(job_id)
        except (*CLIENT_ERRORS, *MALFORMED_ANSWERS) as error:
            if "does not exist" in str(error):
                raise StageError(
                    f"{address} no longer knows job {job_id}: its cluster has stopped or restarted, and the job ended "
                    "with it; the same command resumes from the stored parts and checkpoints"
                ) from None
            if time.monotonic() - last_answer > LOST_S:
                raise StageError(
                    f"lost contact with {address} ({one_line(error)}); job {job_id} may still run there, and "
                    "the same command attaches to it again"
                ) from None
        else:
            last_answer = time.monotonic()
            if job.status.is_terminal():
                return job, log.end or job.message or "(no log)"
        time.sleep(POLL_S)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines()[-LOG_LINES:])
