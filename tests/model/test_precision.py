"""float32_products sets the precision inside the block and restores it afterwards, even after an error."""

import pytest
import torch

from pbe.model.precision import float32_products


def flags() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("tf32", [False, True])
def test_flags_hold_inside_and_come_back(tf32: bool) -> None:
    before = flags()
    with float32_products(tf32=tf32):
        assert flags() == (tf32, tf32)
        with float32_products(tf32=not tf32):
            assert flags() == (not tf32, not tf32)
        assert flags() == (tf32, tf32)
    assert flags() == before
    with pytest.raises(RuntimeError), float32_products(tf32=tf32):
        raise RuntimeError
    assert flags() == before
