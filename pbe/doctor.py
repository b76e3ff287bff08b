"""`pbe doctor`: check this machine, or the cluster in RAY_ADDRESS, before a run.

Every check reports what it found and, if that is a problem, what to do. No check exceeds its time limit; those that
train run only on request (`--gpu`, `--ranks`).
"""

import configparser
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import psutil

from pbe import track
from pbe.config import Params, load_params
from pbe.errors import UserError, one_line
from pbe.places import local_path, refuse_credentials, storage_uri, tracking_uri
from pbe.settings import paths_in
from pbe.store import Store, load_manifest
from pbe.train.settings import TrainConfig

Level = Literal["ok", "warn", "fail"]

PACKAGES = ("torch", "deepspeed", "ray", "pyarrow", "diffusers", "transformers", "mlflow", "albumentations", "dvc")
ANSWER_S = 10.0  # a Ray head that takes longer counts as dead
DRILL_S = 180.0
SHARED_MEMORY_GIB, OPEN_FILES, SOCKET_PATH_CHARS = 2.0, 4096, 60


@dataclass(frozen=True)
class Finding:
    level: Level
    check: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level:4} {self.check}: {self.found}" + (f". {self.advice}" if self.advice else "")


def _verdict(good: object, check: str, found: str, otherwise: Level, advice: str = "") -> Finding:
    """`ok` if `good`, otherwise a finding of level `otherwise` with the advice."""
    return Finding("ok", check, found) if good else Finding(otherwise, check, found, advice)


def examine(root: Path, *, gpu: bool, ranks: int | None) -> Iterator[Finding]:
    """Yield findings as they are made. ranks: also train with this many, on the GPUs with `gpu`, else on the CPU."""
    yield from _versions(root)
    yield from repository(root)
    yield from _limits()
    params = None
    try:
        params = load_params(root / "params.yaml")  # and its variants
        yield Finding("ok", "params.yaml", f"variants {', '.join(params.variants)}")
    except UserError as error:
        yield Finding("fail", "params.yaml", one_line(error), "Checks that need it are skipped")
    yield from _guarded("storage", _storage())
    yield from _guarded("MLflow", tracking())
    if params is not None:
        yield from _guarded("processors", _processors(params))
        yield from _guarded("disk", _disk(root, params))
        yield from _paths(params)
    if gpu:
        yield from _gpus(root)
    if params is not None and (ranks or gpu):
        yield from _drill(params.train, gpu=gpu, ranks=ranks)


def _guarded(check: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Turn errors that the user can fix into findings."""
    try:
        yield from findings
    except (UserError, OSError) as error:
        yield Finding("fail", check, one_line(error))


def _versions(root: Path) -> Iterator[Finding]:
    pins = {}
    lock = root / "requirements.lock"
    if lock.is_file():
        lines = [line.partition("==") for line in lock.read_text().splitlines() if "==" in line and line[0] != "#"]
        pins = {name.lower(): version.strip() for name, _, version in lines}
    else:
        yield Finding("warn", "versions", "no requirements.lock here", "Run pbe doctor in the repository")
    new = sys.version_info >= (3, 11)
    yield _verdict(new, "Python", platform.python_version(), "fail", "pbe needs 3.11 or newer")
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("fail", name, "is not installed", "`make env` installs requirements.lock")
            continue
        pin = pins.get(name)
        if pin is None or version.partition("+")[0] == pin:
            yield Finding("ok", name, version)
        else:
            advice = "`make env` installs the tested one"
            yield Finding("warn", name, f"{version}, requirements.lock has {pin}", advice)


def repository(root: Path) -> Iterator[Finding]:
    """Whether DVC can run in `root`: it needs its own folder there and, without core.no_scm, git."""
    if (root / ".dvc").is_dir():
        yield Finding("ok", "DVC", "repository")
    else:
        yield Finding("fail", "DVC", f"{root} is not a DVC repository", "`dvc init`")
    try:
        without_git = _does_without_git(root)
    except (configparser.Error, ValueError) as error:
        yield Finding("fail", "DVC", one_line(error), "Mend .dvc/config")
        return
    yield Finding("ok", "git", "not used (core.no_scm)") if without_git else _git(root)


def _does_without_git(root: Path) -> bool:
    settings = configparser.ConfigParser(interpolation=None, strict=False)
    settings.read([root / ".dvc" / "config", root / ".dvc" / "config.local"])
    return settings.getboolean("core", "no_scm", fallback=False)


def _git(root: Path) -> Finding:
    """Ask git itself, which knows worktrees, submodules and folders inside a repository."""
    try:
        asked = _ask_git(root, "rev-parse", "--is-inside-work-tree")
        ignored = _ask_git(root, "check-ignore", "-q", "dvc.yaml").returncode == 0
    except FileNotFoundError:  # DVC reads repositories without it
        known = any((folder / ".git").exists() for folder in (root, *root.parents))
        if known:
            return Finding("warn", "git", "a repository, but no git on PATH", "Runs will not record their commit")
        return Finding("fail", "git", f"{root} is not in a git repository", "Install git, then `git init`")
    except subprocess.TimeoutExpired:
        return Finding("fail", "git", f"does not answer within {ANSWER_S:g} s in {root}")
    if "dubious ownership" in asked.stderr:
        advice = next((line.strip() for line in asked.stderr.splitlines() if "safe.directory" in line), "")
        return Finding("fail", "git", f"{root} belongs to another user, so git and DVC refuse it", f"`{advice}`")
    if asked.stdout.strip() == "false":
        return Finding("fail", "git", f"{root} is in a bare repository, without files", "`git clone` it and run there")
    if asked.returncode:
        said = one_line(asked.stderr.removeprefix("fatal: "))
        damaged = (root / ".git").exists()
        advice = "Put that repository back, or remove .git and `git init`" if damaged else "`git init`"
        return Finding("fail", "git", f"{root}: {said}", f"{advice}; `dvc repro` needs it")
    if ignored:
        return Finding("fail", "git", f"a repository around {root} ignores it", "`git init`; `dvc repro` needs its own")
    return Finding("ok", "git", "repository")


def _ask_git(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    in_english = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(["git", *command], cwd=root, env=in_english, capture_output=True, text=True, timeout=ANSWER_S)


def _limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = files == resource.RLIM_INFINITY or files >= OPEN_FILES
    advice = f"Ray needs at least {OPEN_FILES}: run `ulimit -n {OPEN_FILES}` before pbe"
    yield _verdict(enough, "open files", str(files), "warn", advice)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free_gib = shutil.disk_usage(shared).free / 2**30
        advice = "Ray falls back to slow disk: in a container, start it with a larger --shm-size"
        found = f"{free_gib:.1f} GiB free"
        yield _verdict(free_gib >= SHARED_MEMORY_GIB, "shared memory", found, "warn", advice)
    temp = tempfile.gettempdir()
    advice = "Ray's sockets in it need short paths: set TMPDIR to a shorter one"
    yield _verdict(len(temp) <= SOCKET_PATH_CHARS, "temporary folder", temp, "fail", advice)


def _storage() -> Iterator[Finding]:
    store = Store(storage_uri())
    name = f"doctor/{uuid.uuid4().hex}"
    said = uuid.uuid4().bytes
    store.write_bytes(name, said)
    back = store.read_bytes(name)
    listed = store.list_names("doctor")
    store.delete_file(name)
    if back != said or Path(name).name not in listed:
        yield Finding("fail", "storage", f"{store.uri}: a written file is not read back or not listed")
    elif store.exists(name):
        yield Finding("warn", "storage", f"{store.uri}: written and read, not removed", "pbe gc must delete")
    else:
        yield Finding("ok", "storage", f"{store.uri}: written, read, listed, removed")


def tracking() -> Iterator[Finding]:
    uri = tracking_uri()
    try:
        yield Finding("ok", "MLflow", f"{uri}: {track.check(uri)}")
    except track.TrackError as error:
        if not os.environ.get("RAY_ADDRESS"):
            raise
        yield Finding("warn", "MLflow", one_line(error), "From here; the cluster in RAY_ADDRESS must reach it")


def _processors(params: Params) -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        yield from _cluster(address)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gib = psutil.virtual_memory().available / 2**30
    yield _verdict(memory_gib > 4, "memory", f"{memory_gib:.1f} GiB free", "warn")
    for stage, wanted in wanted_cpus(params).items():
        # local Ray gets at least four CPUs (pipelines/runtime/local_ray.py)
        found = f"asks for {wanted:g}, this machine has {cores}"
        advice = f"it would be refused: lower the {stage} settings in params.yaml"
        yield _verdict(wanted <= max(cores, 4), f"CPUs of {stage}", found, "fail", advice)


def wanted_cpus(params: Params) -> dict[str, float]:
    """Minimum of Ray CPUs that each stage holds at once (train: the variant that asks for most)."""
    trains = [train for train in map(params.train_variant, params.variants) if train.steps]  # else without Ray
    return {
        "ingest": params.ingest.per_shard.cpus,
        "materialize": params.materialize.per_shard.cpus,
        "encode": params.encode.actors * params.encode.per_actor.cpus,
        "train": max((train.workers * train.per_worker.cpus for train in trains), default=0),
        "bench": params.bench.actors * params.bench.per_actor.cpus,
        "edit": params.edit.actors * params.edit.per_actor.cpus,
        "evaluate": params.evaluate.actors * params.evaluate.per_actor.cpus,
    }


def _cluster(address: str) -> Iterator[Finding]:
    try:
        refuse_credentials("RAY_ADDRESS", address)
    except UserError as error:
        yield Finding("fail", "RAY_ADDRESS", str(error))
        return
    if not address.startswith(("http://", "https://")):
        yield Finding("fail", "RAY_ADDRESS", address, "It must be the http:// address of the head's dashboard")
        return
    token = os.environ.get("RAY_AUTH_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        request = urllib.request.Request(f"{address.rstrip('/')}/api/version", headers=headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            there = json.load(answer)
        if not isinstance(there, dict) or "ray_version" not in there:
            raise ValueError("what answers is another server")
    except urllib.error.HTTPError as error:
        error.close()
        advice = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's" if error.code in (401, 403) else ""
        yield Finding("fail", "RAY_ADDRESS", f"{address}: answers {error.code} {error.reason}", advice)
        return
    except (OSError, HTTPException, ValueError) as error:
        yield Finding("fail", "RAY_ADDRESS", f"{address}: no Ray head answers ({one_line(error)})")
        return
    theirs, ours = str(there["ray_version"]), importlib.metadata.version("ray")
    if theirs == ours:
        yield Finding("ok", "RAY_ADDRESS", f"{address}: Ray {theirs}, as here")
    else:
        yield Finding("fail", "RAY_ADDRESS", f"{address}: Ray {theirs}, here {ours}", "They must be the same")
    if not storage_uri().startswith("s3://"):
        yield Finding("warn", "PBE_STORAGE", storage_uri(), "Its workers must see the same path; else use s3://")


def _disk(root: Path, params: Params) -> Iterator[Finding]:
    needs = gib_of_trainings(root, params)
    for name, folder in (("storage", storage_uri()), ("temporary folder", tempfile.gettempdir())):
        if folder.startswith("s3://"):
            continue
        there = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
        free_gib = shutil.disk_usage(there).free / 2**30
        if needs is None:
            yield Finding("ok", f"disk of the {name}", f"{free_gib:.1f} GiB free")
            continue
        wanted = needs[name]
        what = "checkpoints and models of all variants" if name == "storage" else "one checkpoint or model"
        found = f"{free_gib:.1f} GiB free, {what} take {wanted:.1f}"
        advice = "free some space (`pbe gc`), or set PBE_STORAGE or TMPDIR to a larger disk"
        yield _verdict(free_gib > wanted, f"disk of the {name}", found, "fail", advice)
    if needs is None:
        yield Finding("ok", "size of a checkpoint", "unknown until the encode stage has run with this version")


def gib_of_trainings(root: Path, params: Params) -> dict[str, float] | None:
    """GiB that training every variant from the beginning takes in the storage, and at a time in the temporary folder.

    None until the encode stage has run. Models are counted without their frozen encoders.
    """
    manifest = root / "data" / "encode" / "manifest.json"
    if not manifest.is_file():
        return None
    from pbe.model.architecture import architecture_of
    from pbe.train.trainable import parameter_counts

    encoded = load_manifest(manifest).config
    kept, written = 0.0, [0.0]
    for name in params.variants:
        train = params.train_variant(name)
        try:
            arch = architecture_of(
                train.unet,
                train.exemplar,
                image_px=params.materialize.image_px,
                encoded=encoded,
                caption_tokens=1 if train.condition == "text" else None,  # any number: captions have no parameters
            )
        except (KeyError, TypeError):  # from an older version; the next `dvc repro` replaces it
            return None
        count, trained = parameter_counts(arch, train.trainable)
        checkpoint = trained * checkpoint_bytes(train) if train.steps else 0
        model = 4 * count * (2 if train.ema_keep_raw else 1)
        kept += train.keep_checkpoints * checkpoint + model
        written += [checkpoint, model]
    largest = max(written)  # a checkpoint is written before the oldest goes
    return {"storage": (kept + largest) / 2**30, "temporary folder": largest / 2**30}


def checkpoint_bytes(train: TrainConfig) -> int:
    """Bytes of a checkpoint per trained parameter: weight, master, two moments and average. At most: bf16_pure and
    adamw_8bit take less."""
    narrow = train.precision in ("bf16", "bf16_pure")
    weight = 0 if train.zero_stage == 3 else 2 if narrow else 4
    master = 0 if train.zero_stage == 0 and not narrow else 4
    return weight + master + 8 + (4 if train.ema_decay is not None else 0)


def _paths(params: Params) -> Iterator[Finding]:
    """Every file, folder and model that params.yaml names, those of a variant under its own key."""
    named = dict(paths_in(params))
    for variant in params.variants:
        for key, name in paths_in(params.train_variant(variant), "train."):
            if named.get(key) != name:
                named[f"variants.{variant}.{key}"] = name
    for key, name in named.items():
        yield from _guarded(key, _path(key, name))


def _path(key: str, name: str) -> Iterator[Finding]:
    from pbe.model.hub import is_on_hub

    if name.startswith("s3://") or name == "random":
        return
    there = local_path(name)
    if name == "sd":
        yield Finding("ok", key, "sd: Stable Diffusion 1.4, downloaded at first use unless it is cached")
    elif there.exists():
        yield Finding("ok", key, f"{name}: a {'folder' if there.is_dir() else 'file'}")
    elif is_on_hub(name):
        yield Finding("ok", key, f"{name}: on the hub, downloaded at first use unless it is cached")
    else:
        is_weights = key.endswith(("weights", "init", "model", "clip"))
        advice = "Name a folder, or org/name@revision on the hub" if is_weights else ""
        yield Finding("fail", key, f"{name}: no such file or folder ({there})", advice)


def profiles_for(root: Path, card_gib: float) -> Finding:
    """Which profiles made for one card fit one with `card_gib` of memory; a profile's name ends in its card's size."""
    named = (re.fullmatch(r".+-(\d+)gb", path.stem) for path in (root / "infra/profiles").glob("*.yaml"))
    sizes = {match[0]: int(match[1]) for match in named if match}
    by_size = sorted(sizes, key=lambda name: sizes[name])
    # a card reports up to 5 % less than its name says
    fit = [name for name in by_size if sizes[name] <= card_gib / 0.95]
    rest = [name for name in by_size if name not in fit]
    found = f"{', '.join(fit) or 'none'} of those for one card" + (f"; too large: {', '.join(rest)}" if rest else "")
    return _verdict(fit, "profiles that fit", found, "warn", "Set train.offload: all")


def _gpus(root: Path) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        found = f"torch {torch.__version__} is built for {'CUDA ' + built if built else 'CPU only'} and sees no GPU"
        yield Finding("fail", "GPU", found, "Install a CUDA build of torch that fits the driver of `nvidia-smi`")
        return
    driver = _nvidia_smi()
    yield _verdict(driver, "driver", driver or "nvidia-smi does not answer", "warn")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
        found = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {about.major}.{about.minor}"
        yield _verdict(bf16, f"GPU {index}", found, "warn", "no bfloat16 units: set train.precision to fp32")
    yield profiles_for(root, torch.cuda.get_device_properties(0).total_memory / 2**30)
    try:
        query = torch.randn(1, 8, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        torch.nn.functional.scaled_dot_product_attention(query, query, query).float().sum().backward()
        torch.cuda.synchronize()
        yield Finding("ok", "sdpa", "bfloat16 attention, forward and backward")
    except RuntimeError as error:
        yield Finding("fail", "sdpa", one_line(error), "Set train.kernels.sdpa to false")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
    yield _verdict(nccl, "nccl", nccl or "not in this build of torch", "fail")


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "version " + ", ".join(sorted(set(done.stdout.split()))) if done.returncode == 0 else ""


def _drill(cfg: TrainConfig, *, gpu: bool, ranks: int | None) -> Iterator[Finding]:
    import torch

    from pbe.drill import DrillError, run_drill

    gpus = torch.cuda.device_count()
    if gpu and not torch.cuda.is_available():
        yield Finding("warn", "training drill", "not run: there is no GPU; `pbe doctor --ranks 2` runs it on the CPU")
        return
    world = ranks or gpus
    if gpu and world > gpus:
        yield Finding("fail", "training drill", f"{world} ranks, {gpus} GPUs", "nccl needs one GPU per rank")
        return
    check = f"training drill ({'nccl' if gpu else 'gloo'})"
    try:
        drill = run_drill(cfg, world=world, on_gpu=gpu, timeout_s=DRILL_S)
    except DrillError as error:
        yield Finding("fail", check, one_line(error))
        return
    took = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in drill.seconds.items())
    found = (
        f"ZeRO 2, {cfg.precision}, {drill.world} ranks, saved, resumed on {drill.resumed_world}: "
        f"loss {drill.straight:.5f} and {drill.resumed:.5f} ({took})"
    )
    yield _verdict(drill.agrees, check, found, "fail", "A resumed run would differ: please report this")
