"""Profiles: every one is valid, the placeholder becomes the absolute folder, and mistakes leave params.yaml alone."""

from pathlib import Path

import pytest
import yaml

from pbe.config import ParamsError, load_params
from pipelines import profile

REPOSITORY = Path(__file__).resolve().parents[2]
PROFILES = REPOSITORY / "infra" / "profiles"
NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the profiles and a params.yaml, in place of the repository."""
    folder = tmp_path / "infra" / "profiles"
    folder.mkdir(parents=True)
    for path in PROFILES.glob("*.yaml"):
        (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "params.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(profile, "repo_root", lambda: tmp_path)
    return tmp_path


def test_the_sample_profile_is_params_yaml() -> None:
    assert (PROFILES / "sample.yaml").read_bytes() == (REPOSITORY / "params.yaml").read_bytes(), (
        "params.yaml as committed is the sample profile: cp params.yaml infra/profiles/sample.yaml"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_profile_is_valid(name: str, checkout: Path) -> None:
    needs_root = profile.PLACEHOLDER in (PROFILES / f"{name}.yaml").read_text()
    profile.main(name, str(checkout) if needs_root else "")
    assert len(load_params(checkout / "params.yaml").variants) >= 2
    assert profile.PLACEHOLDER not in (checkout / "params.yaml").read_text()


def test_root_becomes_absolute_whatever_its_name(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos = checkout / 'my "photos": # 1 \\ of 2'
    photos.mkdir()
    monkeypatch.chdir(checkout)
    profile.main("coco", photos.name)
    params = load_params(checkout / "params.yaml")
    assert (params.ingest.images, params.ingest.boxes) == (f"{photos}/images", str(photos))
    assert params.evaluate.split == "validation"


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("imagenet", "", "'imagenet' is unknown; there are: coco, paper-tiny, sample, tiny"),
        ("../profiles/coco", "/", "is unknown"),
        ("coco", "", "make profile P=coco ROOT="),
        ("coco", "/nowhere/at/all", "is not a folder"),
        ("sample", "/", "takes no ROOT"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(name: str, root: str, message: str, checkout: Path) -> None:
    with pytest.raises(ParamsError, match=message):
        profile.main(name, root)
    assert (checkout / "params.yaml").read_text() == "seed: 1\n"


def test_an_invalid_profile_does_not_replace_params(checkout: Path) -> None:
    raw = yaml.safe_load((PROFILES / "tiny.yaml").read_text())
    raw["train"]["batch"] = 7
    (checkout / "infra" / "profiles" / "bad.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError, match="lanes 2 must divide batch 7"):
        profile.main("bad", "")
    assert sorted(path.name for path in checkout.iterdir()) == ["infra", "params.yaml"]
    assert (checkout / "params.yaml").read_text() == "seed: 1\n"
