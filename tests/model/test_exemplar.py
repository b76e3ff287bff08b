"""The condition: one context token from standardised features, or the unconditional vector, row by row."""

import pytest
import torch
from torch import Tensor

from pbe.model.exemplar import ExemplarMapper


@pytest.fixture
def mapper() -> ExemplarMapper:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ExemplarMapper(backbone_width=12, mapper_width=10, context_width=6)


def _tokens(rows: int, tokens: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, tokens, 12, generator=torch.Generator().manual_seed(seed))


def test_dropped_rows_are_the_unconditional_vector_and_the_others_do_not_notice(mapper: ExemplarMapper) -> None:
    drop = torch.tensor([True, False, True, False])
    tokens = _tokens(4)
    context = mapper(tokens, drop)
    assert context.shape == (4, 1, 6)
    assert (context[drop] == mapper.uncond_vector[0]).all()
    torch.testing.assert_close(context[~drop], mapper(tokens, torch.zeros(4, dtype=torch.bool))[~drop])
    other = mapper(_tokens(4, seed=1), drop)
    assert torch.equal(other[drop], context[drop]) and not torch.isclose(other[~drop], context[~drop]).all(-1).any()


def test_more_tokens_than_one_are_mapped_one_by_one(mapper: ExemplarMapper) -> None:
    tokens, keep = _tokens(2, tokens=5), torch.tensor([False, True])
    context = mapper(tokens, keep)
    assert context.shape == (2, 5, 6)
    torch.testing.assert_close(context[:1, 3:4], mapper(tokens[:1, 3:4], keep[:1]))
    assert (context[1] == mapper.uncond_vector[0]).all()


@pytest.mark.parametrize("drop", [[True, True], [False, False], [True, False]])
def test_every_parameter_is_in_every_graph(drop: list[bool], mapper: ExemplarMapper) -> None:
    """ZeRO needs a gradient for each parameter at each step; zero where the row took the other branch."""
    mapper(_tokens(2), torch.tensor(drop)).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in mapper.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert bool(grads["uncond_vector"].any()) == any(drop)
    assert bool(grads["mapper.0.weight"].any()) == (not all(drop))


def test_features_are_standardised_by_the_given_references(mapper: ExemplarMapper) -> None:
    references = 3 + 5 * _tokens(200)[:, 0]
    mapper.set_statistics(references)
    standard = (references - mapper.feature_mean) / mapper.feature_std
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
    assert (mapper.feature_std == 0.05).all()
    assert torch.isfinite(mapper(_tokens(2), torch.tensor([False, True]))).all()


def test_statistics_are_stored_with_the_weights_but_not_trained(mapper: ExemplarMapper) -> None:
    mapper.set_statistics(_tokens(20)[:, 0])
    assert {"feature_mean", "feature_std"} <= set(mapper.state_dict())
    assert not {"feature_mean", "feature_std"} & {name for name, _ in mapper.named_parameters()}
