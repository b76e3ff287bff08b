"""Which settings learn most in the same time? python tests/benchmarks/recipe.py PROJECT [--seconds 600] TRIAL...

PROJECT: folder of a project of profile scratch or speedrun, whose stages `encode` and `bench` have run. TRIAL:
NAME or NAME:KEY=VALUE;KEY=VALUE... of `train`, `encode.codec` and `edit`: the project's params.yaml, changed there.

    python tests/benchmarks/recipe.py . --seconds 600 plain "v:train.objective=v;train.lr=1e-3"

Each trial trains by a plain loop, without Ray and DeepSpeed, for the same seconds: processor time of one core, or wall
clock on a GPU (--device cuda). Its codec and latents, made before, are not counted. The learning rate follows warm-up
(3 % of the time) and cosine by elapsed time, so that every trial ends its schedule; `ema=0.999` is a trial's own key.
Then it edits the first --items of the bench with exemplars and with foreign references, from the same noise, and prints
one line: steps, loss, gain and win rate (share of items with a positive gain) with 95 % intervals by photo, Frechet
distance to the unedited crops, both by EfficientNet-lite2, which conditions nothing, and the hole's PSNR from its own
object. Losses of different objectives, perceptual weights or codecs cannot be compared. --pictures FOLDER keeps sheets
of edits. Nothing is asserted.
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from pbe.config import Params, parse_params  # noqa: E402
from pbe.data import images  # noqa: E402
from pbe.data.contact import sheet, with_hole  # noqa: E402
from pbe.data.masks import hole_of  # noqa: E402
from pbe.data.schema import HoleKind, array_value  # noqa: E402
from pbe.data.slots import slot_files  # noqa: E402
from pbe.diffusion.sampling import Sampling  # noqa: E402
from pbe.diffusion.schedule import alphas_cumprod  # noqa: E402
from pbe.diffusion.scheduler_config import TRAIN_TIMESTEPS, scheduler_config  # noqa: E402
from pbe.edit import Editor  # noqa: E402
from pbe.encode import encode_masked, encode_source  # noqa: E402
from pbe.evaluate.features.extractors import EfficientNetExtractor  # noqa: E402
from pbe.evaluate.metrics.frechet import frechet_distance  # noqa: E402
from pbe.evaluate.metrics.intervals import bootstrap_mean  # noqa: E402
from pbe.evaluate.metrics.similarity import (  # noqa: E402
    exemplar_gain,
    hole_psnr,
    hole_region,
    match_resolution,
)
from pbe.model.architecture import architecture_of  # noqa: E402
from pbe.model.backbone import load_backbone  # noqa: E402
from pbe.model.card import ModelCard  # noqa: E402
from pbe.model.codec import PatchCodec, fit_patch_codec  # noqa: E402
from pbe.model.exemplar import ExemplarMapper  # noqa: E402
from pbe.model.settings import PatchCodecConfig  # noqa: E402
from pbe.model.unet import new_network, use_float32_group_norm  # noqa: E402
from pbe.model.weights import Model  # noqa: E402
from pbe.store import Store, load_manifest  # noqa: E402
from pbe.train.data.batch import Batch  # noqa: E402
from pbe.train.loss import Diffusion, row_losses  # noqa: E402
from pbe.train.perceptual import PerceptualLoss  # noqa: E402
from tests.benchmarks.device import add_device  # noqa: E402

WARMUP_FRAC = 0.03
LATENT_BATCH = 64
Rows = list[dict[str, Any]]
KINDS: tuple[HoleKind, ...] = ("box", "bezier")  # which every row has


@dataclass(frozen=True)
class Crops:
    """Training rows in memory: sources (N, S, S, 3) uint8, holes by kind (N, S, S) of 0/1, tokens (N, draws, width)."""

    sources: np.ndarray
    holes: dict[str, np.ndarray]
    tokens: torch.Tensor


@dataclass(frozen=True)
class Trial:
    name: str
    params: Params
    ema: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path, nargs="?")
    parser.add_argument("trials", nargs="*", metavar="TRIAL")
    parser.add_argument("--seconds", type=float, default=600, help="of training, each trial")
    parser.add_argument("--items", type=int, default=96, help="bench items to edit")
    parser.add_argument("--rows", type=int, default=0, help="training rows at most; 0: all")
    parser.add_argument("--pictures", type=Path, help="folder for sheets of edits")
    add_device(parser)
    args = parser.parse_intermixed_args()
    if args.project is None or not args.trials:
        print("skipped: name a project and trials (--help)")
        return 0
    device = torch.device(args.device)
    torch.set_num_threads(1)
    text = (args.project / "params.yaml").read_text()
    trials = [trial_of(text, said) for said in args.trials]
    store = Store(str(args.project / ".store"))
    crops = read_crops(store, args.project, args.rows)
    bench = read_bench(store, args.project)[: args.items]
    extractor = EfficientNetExtractor(load_backbone("efficientnet_lite2").to(device))
    print(f"{len(crops.sources)} training rows, {len(bench)} items, {args.seconds:.0f} s each", flush=True)
    for trial in trials:
        editor, said = trained(trial, crops, seconds=args.seconds, device=device)
        print(f"{trial.name}: {said}", flush=True)
        print(f"{trial.name}: {scores(editor, trial.params, bench, extractor, args.pictures, trial.name)}", flush=True)
    return 0


def trial_of(text: str, said: str) -> Trial:
    name, _, changes = said.partition(":")
    settings, ema = yaml.safe_load(text), 0.0
    for change in filter(None, changes.split(";")):
        key, _, value = change.partition("=")
        if key == "ema":
            ema = float(value)
            continue
        *path, last = key.split(".")
        inner = settings
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = yaml.safe_load(value)
    return Trial(name, parse_params(yaml.safe_dump(settings), f"trial {name}"), ema)


def read_crops(store: Store, project: Path, limit: int) -> Crops:
    triplets = load_manifest(project / "data/materialize/manifest.json")
    encoded = load_manifest(project / "data/encode/manifest.json")
    sources, tokens = [], []
    holes: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for slot, encoded_slot in zip(slot_files(triplets), slot_files(encoded), strict=True):
        for file, encoded_file in zip(slot, encoded_slot, strict=True):
            for row in store.read_table(file).to_pylist():
                source = images.decode(row["source"])
                sources.append(source)
                for kind in KINDS:
                    holes[kind].append(hole_of(row, kind, source))
            table = store.read_table(encoded_file, columns=["exemplar_tokens"])
            field = table.schema.field("exemplar_tokens")
            tokens += [array_value(field, value)[:, 0] for value in table.column(0).to_pylist()]
        if 0 < limit <= len(sources):
            break
    count = limit or len(sources)
    return Crops(
        np.stack(sources[:count]),
        {kind: np.stack(found[:count]) for kind, found in holes.items()},
        torch.from_numpy(np.stack(tokens[:count])).float(),
    )


def read_bench(store: Store, project: Path) -> Rows:
    [unit] = load_manifest(project / "data/bench/manifest.json").units
    return store.read_table(unit.file("bench")).to_pylist()


def trained(trial: Trial, crops: Crops, *, seconds: float, device: torch.device) -> tuple[Editor, str]:
    """Train one trial; its Editor, and what to print of the training."""
    params, cfg = trial.params, trial.params.train
    codec_cfg = params.encode.codec
    if not isinstance(codec_cfg, PatchCodecConfig):
        raise SystemExit("encode.codec: trials fit their own patch codec; use a project of profile scratch or speedrun")
    codec, _ = fit_patch_codec(
        crops.sources[: codec_cfg.fit_crops], patch_px=codec_cfg.patch_px, channels=codec_cfg.channels
    )
    x0, masked, keep = latents(codec, crops)
    encoded = {
        "codec": {"channels": codec.channels, "patch_px": codec.patch_px},
        "backbone": {"width": crops.tokens.shape[-1]},
    }
    torch.manual_seed(params.seed)
    side = params.materialize.image_px
    network = new_network(architecture_of(cfg.unet, cfg.exemplar, image_px=side, encoded=encoded))
    assert isinstance(network.exemplar, ExemplarMapper)
    network.exemplar.set_statistics(crops.tokens[:, 0])
    averaged = copy.deepcopy(network).to(device) if trial.ema else network
    network.use_kernels(sdpa=True, channels_last=cfg.kernels.channels_last, checkpointed_levels=0)
    if cfg.precision == "bf16_autocast":
        network.use_autocast()
        if device.type == "cpu":
            use_float32_group_norm(network)
    network.to(device)
    if cfg.kernels.compile and device.type == "cuda":
        network.unet.compile()
    scheduler = scheduler_config(cfg.beta_schedule, cfg.objective)
    grey = codec.posterior(torch.zeros(1, 3, side, side))[0]
    perceptual = PerceptualLoss(codec, device) if cfg.perceptual_weight else None
    diffusion = Diffusion(cfg, grey.to(device), alphas_cumprod(scheduler).to(device), device, perceptual)
    optimizer = torch.optim.AdamW(
        network.parameters(), cfg.lr, betas=cfg.adam_betas, eps=cfg.adam_eps, weight_decay=cfg.weight_decay
    )
    rng = np.random.default_rng(params.seed)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    started, steps, window = clock(), 0, []
    while (done := (clock() - started) / seconds) < 1:
        rate = done / WARMUP_FRAC if done < WARMUP_FRAC else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * (cfg.final_lr_frac + (1 - cfg.final_lr_frac) * rate)
        batch = draw_batch(rng, trial, x0, masked, keep, crops.tokens).to(device)
        loss = row_losses(network, batch, diffusion).mean()
        loss.backward()
        if cfg.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if trial.ema:
            decay = min(trial.ema, (1 + steps) / (10 + steps))
            with torch.no_grad():
                for mean, new in zip(averaged.parameters(), network.parameters(), strict=True):
                    mean.lerp_(new, 1 - decay)
        if done > 0.8:
            window.append(loss.item())
    card = ModelCard(side, params.materialize.reference_px, params.materialize.reference_pad_px, "class", scheduler, {})
    parameters = sum(value.numel() for value in network.parameters())
    result = averaged if trial.ema else network
    result._autocast = False  # edits run in float32
    editor = Editor(Model(result.cpu(), codec, load_backbone("efficientnet_lite0"), card), device)
    size = f"{parameters / 1e6:.2f} M parameters, latents {tuple(x0.shape[1:])}"
    return editor, f"{size}, {steps} steps of {cfg.batch} rows, loss {np.mean(window):.4f}"


def latents(codec: PatchCodec, crops: Crops) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """x0 (N, C, h, w), and by hole kind the masked photo's latents and the keep masks; float16 but for the masks."""
    x0 = []
    masked: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    keep: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for start in range(0, len(crops.sources), LATENT_BATCH):
        rows = slice(start, start + LATENT_BATCH)
        x0.append(encode_source(codec, crops.sources[rows]).mean.half())
        for kind, holes in crops.holes.items():
            posterior, keep_mask = encode_masked(codec, crops.sources[rows], holes[rows])
            masked[kind].append(posterior.mean.half())
            keep[kind].append(keep_mask)
    joined = {kind: torch.cat(found) for kind, found in masked.items()}
    return torch.cat(x0), joined, {kind: torch.cat(found) for kind, found in keep.items()}


def draw_batch(
    rng: np.random.Generator,
    trial: Trial,
    x0: torch.Tensor,
    masked: dict[str, torch.Tensor],
    keep: dict[str, torch.Tensor],
    tokens: torch.Tensor,
) -> Batch:
    """A batch of random rows; the draws are those of pbe/train/data/draws.py, not its random numbers."""
    cfg = trial.params.train
    rows = torch.from_numpy(rng.integers(0, len(x0), cfg.batch))
    bezier = torch.from_numpy(rng.random(cfg.batch) < cfg.hole_probs.bezier)[:, None, None, None]
    drawn = rng.integers(1, tokens.shape[1], cfg.batch) if cfg.reference_augmentation else np.zeros(cfg.batch, np.int64)
    return Batch(
        x0=x0[rows].float(),
        masked_latent=torch.where(bezier, masked["bezier"][rows], masked["box"][rows]).float(),
        keep_mask_latent=torch.where(bezier, keep["bezier"][rows], keep["box"][rows]),
        exemplar_tokens=tokens[rows, torch.from_numpy(drawn)][:, None],
        noise=torch.from_numpy(rng.standard_normal((cfg.batch, *x0.shape[1:]), dtype=np.float32)),
        timestep=torch.from_numpy(rng.integers(0, TRAIN_TIMESTEPS, cfg.batch)),
        drop_condition=torch.from_numpy(rng.random(cfg.batch) < cfg.condition_dropout_prob),
        drop_context=torch.from_numpy(rng.random(cfg.batch) < cfg.context_dropout_prob),
        rows=(),
    )


def scores(
    editor: Editor, params: Params, bench: Rows, extractor: EfficientNetExtractor, pictures: Path | None, name: str
) -> str:
    sources = np.stack([images.decode(row["source"]) for row in bench])
    holes = np.stack([hole_of(row, "box", source) for row, source in zip(bench, sources, strict=True)])
    given = {kind: [images.decode(row[kind]) for row in bench] for kind in ("exemplar", "foreign", "own")}
    sampling = Sampling(params.edit.guidance_scale, params.edit.steps, params.edit.sampler)
    started = time.perf_counter()
    edits = {
        kind: np.concatenate(
            [
                editor.edit_crops(
                    sources[start : start + 16],
                    holes[start : start + 16],
                    references[start : start + 16],
                    seeds=range(start, min(start + 16, len(bench))),
                    sampling=sampling,
                )
                for start in range(0, len(bench), 16)
            ]
        )
        for kind, references in given.items()
    }
    seconds = (time.perf_counter() - started) / 3 / len(bench)

    def features(found: list[np.ndarray]) -> np.ndarray:
        return extractor(found, batch_rows=16)

    regions = {
        kind: features([hole_region(edit, hole) for edit, hole in zip(edits[kind], holes, strict=True)])
        for kind in ("exemplar", "foreign")
    }
    references = {
        kind: features(
            [
                match_resolution(reference, *hole_region(hole, hole).shape[:2])
                for reference, hole in zip(given[kind], holes, strict=True)
            ]
        )
        for kind in ("exemplar", "foreign")
    }
    gains = exemplar_gain(regions["exemplar"], regions["foreign"], references["exemplar"], references["foreign"]).both
    photos = [row["image_id"] for row in bench]
    gain, win = (
        bootstrap_mean(values, groups=photos, resamples=1000, seed=0)
        for values in (gains, (gains > 0).astype(np.float64))
    )
    frechet = frechet_distance(features(list(edits["exemplar"])), features(list(sources)))
    psnr = np.mean([min(hole_psnr(*item), 60) for item in zip(edits["own"], sources, holes, strict=True)])
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        shown = range(0, len(bench), max(1, len(bench) // 24))
        rows = [
            [sources[i] for i in shown],
            [with_hole(sources[i], holes[i]) for i in shown],
            *(
                column
                for kind in ("exemplar", "foreign")
                for column in (
                    [match_resolution(given[kind][i], *sources.shape[1:3]) for i in shown],
                    [edits[kind][i] for i in shown],
                )
            ),
        ]
        (pictures / f"{name}.png").write_bytes(images.encode_png(sheet(rows)))
    return (
        f"gain {gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}], win {win.value:.2f} [{win.low:.2f}, {win.high:.2f}]"
        f", Frechet {frechet:.1f}, own PSNR {psnr:.2f} dB, {1000 * seconds:.0f} ms per edit"
    )


if __name__ == "__main__":
    raise SystemExit(main())
