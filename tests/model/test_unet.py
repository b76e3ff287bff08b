"""The denoiser's contract: channel order, polarity and condition as upstream; GroupNorm in float32 changes nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pbe.model.architecture import Architecture
from pbe.model.exemplar import ExemplarMapper
from pbe.model.unet import ConditionedUNet, Float32GroupNorm, new_network, use_float32_group_norm


def _with(arch: Architecture, **changes: Any) -> Architecture:
    """`arch` with other settings of its UNet."""
    return replace(arch, unet=arch.unet.model_copy(update=changes))


def _inputs(arch: Architecture, rows: int = 3, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    latent = (arch.latent_channels, arch.latent_px, arch.latent_px)
    return {
        "noisy_latent": normal(*latent),
        "timestep": torch.randint(1000, (rows,), generator=generator),
        "masked_latent": normal(*latent),
        "keep_mask_latent": torch.rand(rows, 1, *latent[1:], generator=generator),
        "exemplar_tokens": normal(1, arch.backbone_width),
        "drop_condition": torch.zeros(rows, dtype=torch.bool),
    }


def _alive(model: ConditionedUNet) -> ConditionedUNet:
    """Some diffusers layers start at zero; make every parameter matter."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def _build(arch: Architecture) -> ConditionedUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _alive(new_network(arch).eval())


@torch.no_grad()
def test_the_network_sees_noisy_latent_then_masked_latent_then_keep_mask(
    model: ConditionedUNet, arch: Architecture
) -> None:
    seen: list[Tensor] = []
    handle = model.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = _inputs(arch)
    out = model(**inputs)
    handle.remove()
    count = arch.latent_channels
    assert out.shape == inputs["noisy_latent"].shape
    assert model.unet.conv_in.in_channels == 2 * count + 1
    assert torch.equal(seen[0][:, :count], inputs["noisy_latent"])
    assert torch.equal(seen[0][:, count : 2 * count], inputs["masked_latent"])
    assert torch.equal(seen[0][:, 2 * count :], inputs["keep_mask_latent"])


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["noisy_latent", "timestep", "masked_latent", "keep_mask_latent", "exemplar_tokens", "drop_condition"]
)
@pytest.mark.parametrize("class_embedding", [True, False])
def test_every_input_matters_to_its_own_row_alone(name: str, class_embedding: bool, arch: Architecture) -> None:
    model = _build(_with(arch, class_embedding=class_embedding))
    inputs = _inputs(arch)
    before = model(**inputs)
    changed = inputs[name].clone()
    changed[1] = ~changed[1] if name == "drop_condition" else _inputs(arch, seed=1)[name][1]
    after = model(**{**inputs, name: changed})
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], atol=1e-5, rtol=0)
    assert (after[1] - before[1]).abs().max() > 1e-4


@torch.no_grad()
def test_a_dropped_row_is_computed_from_the_unconditional_vector(arch: Architecture) -> None:
    """A dropped row equals a row whose condition is that vector, for any reference."""
    model, inputs = _build(arch), _inputs(arch)
    drop = torch.tensor([True, False, True])
    out = model(**{**inputs, "drop_condition": drop})
    assert isinstance(model.exemplar, ExemplarMapper)
    vector = model.exemplar.uncond_vector.expand(3, 1, -1)
    channels = torch.cat([inputs[name] for name in ("noisy_latent", "masked_latent", "keep_mask_latent")], dim=1)
    expected = model.unet(channels, inputs["timestep"], encoder_hidden_states=vector, class_labels=vector[:, 0]).sample
    torch.testing.assert_close(out[drop], expected[drop], atol=1e-5, rtol=0)
    torch.testing.assert_close(out[~drop], model(**inputs)[~drop], atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", [(True, True, False), (False, False, True), (False,) * 3, (True,) * 3])
def test_attention_is_where_it_is_asked_for(attention: tuple[bool, ...], arch: Architecture) -> None:
    unet = new_network(_with(arch, block_channels=(8, 8, 8), attention=attention)).unet
    down = [hasattr(block, "attentions") for block in unet.down_blocks]
    assert down == list(attention)
    assert [hasattr(block, "attentions") for block in unet.up_blocks] == down[::-1]


def test_the_width_of_the_condition_fits_and_class_embedding_is_a_switch(arch: Architecture) -> None:
    with_class, without = (new_network(_with(arch, class_embedding=value)) for value in (True, False))
    extra = set(with_class.state_dict()) - set(without.state_dict())
    assert extra and all("class_embedding" in name for name in extra)
    assert (
        with_class.unet.config.cross_attention_dim == arch.unet.context_width == without.unet.config.cross_attention_dim
    )


@torch.no_grad()
def test_float32_group_norm_changes_neither_names_nor_values_nor_outputs(arch: Architecture) -> None:
    model, inputs = _build(arch), _inputs(arch)
    before, state = model(**inputs), {name: value.clone() for name, value in model.state_dict().items()}
    norms = sum(isinstance(module, nn.GroupNorm) for module in model.modules())
    use_float32_group_norm(model)
    assert norms > 5 and sum(type(module) is Float32GroupNorm for module in model.modules()) == norms
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(**inputs), before, atol=0, rtol=0)


@torch.no_grad()
def test_float32_group_norm_ignores_autocast() -> None:
    norm = nn.Sequential(nn.GroupNorm(2, 4))
    values = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = norm(values)
    use_float32_group_norm(norm)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm(values)
        from_half = norm(values.bfloat16())
    assert got.dtype == from_half.dtype == torch.float32 and torch.equal(got, expected)
    torch.testing.assert_close(from_half, expected, atol=0.05, rtol=0)
