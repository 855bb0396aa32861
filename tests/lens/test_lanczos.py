"""Lanczos' method: the eigenvector that a full decomposition finds, also where many eigenvalues lie close together."""

import pytest
import torch

from regard.studies.tokencut.lanczos import largest_eigenvector

KIND = torch.float64


def matrix(values, seed=0):
    """A symmetric matrix of these eigenvalues, and its eigenvectors in columns."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=KIND)).Q
    return vectors @ torch.tensor(values, dtype=KIND).diag() @ vectors.T, vectors


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 0.9, *torch.linspace(-0.5, 0.5, 118).tolist()],
        [1.0, 0.9, *torch.linspace(0.8, 0.89, 118).tolist()],  # the one sought is close to many
        [0.2, 0.9, *torch.linspace(-3.0, 0.5, 118).tolist()],  # the known one is not the largest, the longest not the sought
        [1.0, -0.1, *torch.linspace(-0.9, -0.2, 18).tolist()],
    ],
)
def test_the_largest_beside_a_known_one_is_found(values):
    whole, vectors = matrix(values)
    found, value = largest_eigenvector(lambda x: whole @ x, 3.0 * vectors[:, 0])
    assert value == pytest.approx(values[1], abs=1e-12)
    assert float(found.norm()) == pytest.approx(1.0)
    assert abs(float(found @ vectors[:, 1])) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(whole @ found, value * found, rtol=0, atol=1e-9)


def test_one_of_several_alike_is_found():
    whole, vectors = matrix([1.0, 0.5, 0.5, 0.5, *[0.1] * 30])
    found, value = largest_eigenvector(lambda x: whole @ x, vectors[:, 0])
    assert value == pytest.approx(0.5)
    assert float((vectors[:, 1:4].T @ found).norm()) == pytest.approx(1.0)


def test_an_operator_of_two_has_one_other_vector():
    whole, vectors = matrix([1.0, 0.25])
    found, value = largest_eigenvector(lambda x: whole @ x, vectors[:, 0])
    assert value == pytest.approx(0.25)
    assert abs(float(found @ vectors[:, 1])) == pytest.approx(1.0)


def test_too_few_steps_are_told():
    whole, vectors = matrix(torch.linspace(0.0, 1.0, 60).tolist())
    with pytest.raises(RuntimeError, match="no eigenvector to a tolerance of 1e-10 after 10 steps"):
        largest_eigenvector(lambda x: whole @ x, vectors[:, -1], steps=10)
