"""The condition: upstream's blocks under diffusers' names and with its numbers; the unconditional vector row by row."""

import pytest
import torch
from torch import Tensor

from pbe.model.exemplar import ExemplarMapper, StandardisedProjection


@pytest.fixture
def mapper() -> ExemplarMapper:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ExemplarMapper(backbone_width=12, mapper_width=10, mapper_blocks=2, context_width=6)


def _tokens(rows: int, tokens: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 12, generator=torch.Generator().manual_seed(seed))


def _projection(mapper: ExemplarMapper) -> StandardisedProjection:
    assert mapper.projection is not None
    return mapper.projection


def test_dropped_rows_are_the_unconditional_vector_and_the_others_do_not_notice(mapper: ExemplarMapper) -> None:
    drop = torch.tensor([True, False, True, False])
    tokens = _tokens(4)
    context = mapper(tokens, drop)
    assert context.shape == (4, 1, 6)
    assert (context[drop] == mapper.uncond_vector[0]).all()
    torch.testing.assert_close(context[~drop], mapper(tokens, torch.zeros(4, dtype=torch.bool))[~drop])
    other = mapper(_tokens(4, seed=1), drop)
    assert torch.equal(other[drop], context[drop]) and not torch.isclose(other[~drop], context[~drop]).all(-1).any()


def test_of_many_tokens_each_sees_the_others_of_its_row_alone(mapper: ExemplarMapper) -> None:
    tokens, keep = _tokens(3, tokens=5), torch.tensor([False, True, False])
    context = mapper(tokens, keep)
    assert context.shape == (3, 5, 6) and (context[1] == mapper.uncond_vector[0]).all()
    changed = tokens.clone()
    changed[0, 4] += 1
    after = mapper(changed, keep)
    assert not torch.isclose(after[0], context[0]).all(-1).any()
    torch.testing.assert_close(after[1:], context[1:])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("drop", [[True, True], [False, False], [True, False]])
def test_every_parameter_is_in_every_graph(drop: list[bool], tokens: int, mapper: ExemplarMapper) -> None:
    """ZeRO needs a gradient for each parameter at each step; it is zero if the row took the other branch."""
    mapper(_tokens(2, tokens), torch.tensor(drop)).square().sum().backward()
    grads = {}
    for name, parameter in mapper.named_parameters():
        assert parameter.grad is not None, name
        grads[name] = parameter.grad
    used = not all(drop)
    assert bool(grads["uncond_vector"].any()) == any(drop)
    assert bool(grads["projection.linear.weight"].any()) == bool(grads["proj_out.weight"].any()) == used
    # one token: softmax over one key is 1, so upstream's queries and keys learn nothing; the values do
    assert bool(grads["mapper.blocks.0.attn1.to_v.weight"].any()) == used
    largest = max(grads[f"mapper.blocks.0.attn1.to_{name}.weight"].abs().max() for name in "qk")
    assert (largest > 1e-7) == (used and tokens > 1)


def test_features_are_standardised_by_the_given_references(mapper: ExemplarMapper) -> None:
    references = 3 + 5 * _tokens(200)[:, 0]
    mapper.set_statistics(references)
    projection = _projection(mapper)
    standard = (references - projection.feature_mean) / projection.feature_std
    torch.testing.assert_close(standard.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std(0), torch.ones(12), atol=1e-4, rtol=0)
    # the units of the features do not matter once they are standardised
    drop = torch.zeros(3, dtype=torch.bool)
    before = mapper(references[:3, None], drop)
    mapper.set_statistics(10 * references)
    torch.testing.assert_close(mapper(10 * references[:3, None], drop), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("rows", [1, 4])
def test_equal_references_and_even_a_single_one_give_finite_statistics(rows: int, mapper: ExemplarMapper) -> None:
    mapper.set_statistics(_tokens(1)[:, 0].repeat(rows, 1))
    assert (_projection(mapper).feature_std == 0.05).all()
    assert torch.isfinite(mapper(_tokens(2), torch.tensor([False, True]))).all()


def test_statistics_are_stored_with_the_weights_but_not_trained(mapper: ExemplarMapper) -> None:
    mapper.set_statistics(_tokens(20)[:, 0])
    names = {"projection.feature_mean", "projection.feature_std"}
    assert names <= set(mapper.state_dict()) and not names & {name for name, _ in mapper.named_parameters()}


# -- upstream's encoder, from diffusers -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
@pytest.mark.parametrize("layers", [5, 9, 24])
def test_it_is_diffusers_encoder_in_names_and_numbers(layers: int) -> None:
    from transformers import CLIPVisionConfig

    deprecated = pytest.importorskip(
        "diffusers.pipelines.deprecated.paint_by_example.image_encoder",
        reason="this diffusers has no encoder to compare",
    )
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        theirs = deprecated.PaintByExampleImageEncoder(config, proj_size=12).eval()
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases start at zero there
        pixels = torch.randn(3, 3, 32, 32)
    ours = ExemplarMapper(backbone_width=16, mapper_width=16, mapper_blocks=(layers + 1) // 5, context_width=12).eval()
    trained = {name: value for name, value in theirs.state_dict().items() if not name.startswith("model.")}
    ours.load_state_dict(trained, strict=True)
    expected, uncond = theirs(pixels, return_uncond_vector=True)
    tokens = theirs.model(pixel_values=pixels).pooler_output[:, None]
    context = ours(tokens, torch.tensor([False, False, True]))
    torch.testing.assert_close(context[:2], expected[:2], atol=1e-5, rtol=0)
    assert torch.equal(context[2], uncond[0])


def test_the_papers_mapper_has_upstreams_parameter_counts() -> None:
    """Counted in the official code: the trainable part besides the UNet has 63,771,136 parameters."""
    with torch.device("meta"):
        mapper = ExemplarMapper(backbone_width=1024, mapper_width=1024, mapper_blocks=5, context_width=768)
    counts: dict[str, int] = {}
    for name, parameter in mapper.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    assert counts == {"mapper": 62_981_120, "final_layer_norm": 2_048, "proj_out": 787_200, "uncond_vector": 768}
