"""Samples are checked once, where they come in."""

from typing import Any

import numpy as np
import pytest

from megatron_hbp.errors import DataError
from megatron_hbp.planning.core.samples import MAX_TOKENS, Samples, read_samples


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.array([], int), "no samples"),
        (np.array([3, 0, 5]), "sample 1 has length 0"),
        (np.array([1.5]), "whole numbers"),
        (np.array([[1]]), "whole numbers"),
        (np.array([1, MAX_TOKENS + 1]), "sample 1 has length 2147483648; a plan counts up to 2147483647"),
    ],
)
def test_lengths_that_cannot_be(lengths, message):
    with pytest.raises(DataError, match=message):
        Samples.of(lengths)


@pytest.mark.parametrize("name", ["loss_tokens", "repeats"])
def test_what_belongs_to_samples_must_match_them(name):
    with pytest.raises(DataError, match=rf"{name} has shape \(2,\)"):
        Samples.of(np.array([5]), **dict[str, Any]({name: np.array([1, 2])}))


def test_values_are_int64_and_counted():
    samples = Samples.of(np.array([7, 9], np.uint16), loss_tokens=np.array([1, 2], np.int8))
    assert samples.loss_tokens is not None
    assert samples.lengths.dtype == samples.loss_tokens.dtype == np.int64
    assert (len(samples), samples.longest, samples.repeats) == (2, 9, None)


def test_loss_tokens_are_read_beside_the_lengths(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, 6]))
    np.save(tmp_path / "b.npy", np.array([5, 0]))
    loss_tokens = read_samples(tmp_path / "a.npy", tmp_path / "b.npy").loss_tokens
    assert loss_tokens is not None and loss_tokens.tolist() == [5, 0]
    np.save(tmp_path / "b.npy", np.array([6, 0]))
    with pytest.raises(DataError, match="sample 0 has 6 loss tokens of 5 tokens"):
        read_samples(tmp_path / "a.npy", tmp_path / "b.npy")
