"""An exported folder opens in diffusers alone, pbe being out of reach, and decodes what the editor decodes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbe.data.rng import row_rng
from pbe.diffusion.sampling import Sampling
from pbe.edit import Editor
from pbe.encode import Levels, to_images
from pbe.export import export_model
from pbe.model.weights import save_model
from pbe.protocol import EditProtocol
from tests.tiny_weights import lively, paper_model, vae_of

PIPELINES_PROTOCOL = EditProtocol(area="photo", paste_back=False, resampling="bicubic")
SEED, SCALE, STEPS, N = 7, 5.0, 4, 2
STRANGER = """
import sys
sys.modules["pbe"] = None  # an import of it fails
sys.path[:0] = sys.argv[3:]
import numpy as np, torch
from diffusers import DiffusionPipeline
from PIL import Image
folder, work = sys.argv[1:3]
given = np.load(work + "/given.npz")
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
photo, mask, reference = (Image.fromarray(given[name]) for name in ("photo", "mask", "reference"))
def run(**settings):
    return pipe(image=photo, mask_image=mask, example_image=reference, num_inference_steps=int(given["steps"]),
                guidance_scale=float(given["scale"]), num_images_per_prompt=len(given["noise"]),
                latents=torch.from_numpy(given["noise"]), **settings).images
np.savez(work + "/made.npz", squares=run(output_type="pt").numpy(), pasted=np.stack(run()),
         whole=np.stack(run(paste_back=False)))
"""


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """A model in which every weight matters."""
    model = paper_model()
    lively(model.network.exemplar, 5)
    lively(vae_of(model), 6)
    save_model(tmp_path / "model", model)
    export_model(tmp_path, str(tmp_path / "model"), tmp_path / "out")
    return tmp_path / "out"


def _compare(exported: Path, work: Path, scale: float, monkeypatch: pytest.MonkeyPatch, *packages: Path) -> None:
    rng = np.random.default_rng(0)
    photo, reference = (rng.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in ((40, 56), (50, 33)))
    mask = np.zeros((40, 56), np.uint8)
    mask[9:30, 11:37] = 255
    decoded: list[torch.Tensor] = []

    def noted(pixels: torch.Tensor, *, levels: Levels) -> np.ndarray:
        decoded.append(pixels.clamp(-1, 1))
        return to_images(pixels, levels=levels)

    monkeypatch.setattr("pbe.edit.to_images", noted)
    edits = Editor.load(exported, device="cpu").edit(
        photo, mask, reference, seed=SEED, n=N, sampling=Sampling(scale, STEPS), protocol=PIPELINES_PROTOCOL
    )
    noise = [row_rng(SEED + k, "edit").standard_normal((4, 4, 4), dtype=np.float32) for k in range(N)]
    given = {"photo": photo, "mask": mask, "reference": reference, "noise": np.stack(noise)}
    np.savez(work / "given.npz", steps=STEPS, scale=scale, **given)  # type: ignore[arg-type]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(exported), str(work), *map(str, packages)],
        cwd=work, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = np.load(work / "made.npz")
    [expected] = decoded
    np.testing.assert_allclose(2 * made["squares"] - 1, expected.numpy(), atol=1e-4)
    assert np.abs(made["whole"].astype(int) - np.stack(edits)).max() <= 1  # of 255, where the last bits decide
    np.testing.assert_array_equal(made["pasted"][:, mask == 0], np.stack([photo] * N)[:, mask == 0])
    np.testing.assert_array_equal(made["pasted"][:, mask > 0], made["whole"][:, mask > 0])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_a_stranger_decodes_what_the_editor_decodes(
    scale: float, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _compare(exported, tmp_path, scale, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "packages",
    [
        ["diffusers"],  # the newest
        ["diffusers==0.37.0"],
        ["diffusers==0.33.1", "transformers==4.51.3", "tokenizers==0.21.1", "huggingface_hub==0.30.2"],
    ],
    ids=lambda packages: packages[0],
)
def test_other_versions_of_diffusers_open_it_too(
    packages: list[str], exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the environment's own; what they need besides is the environment's."""
    folder = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    got = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    if got.returncode:
        pytest.skip(f"pip cannot get {' '.join(packages)}: {got.stderr.strip().splitlines()[-1]}")
    _compare(exported, tmp_path, SCALE, monkeypatch, folder)


def test_the_pipeline_refuses_a_mask_of_another_size() -> None:
    from pbe.published.pipeline import PaintByExamplePipeline

    pictures = {"image": Image.new("RGB", (8, 8)), "example_image": Image.new("RGB", (8, 8))}
    with pytest.raises(ValueError, match=r"mask_image is \(8, 9\), image \(8, 8\): the sizes must match"):
        PaintByExamplePipeline.__call__(None, mask_image=Image.new("L", (8, 9)), **pictures)  # type: ignore[arg-type]
