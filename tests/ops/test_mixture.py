"""Gates of mixtures and their losses, written out."""

import math

import pytest
import torch

from regard.ops.mixture import balance_loss, mixture, z_loss


def test_the_largest_share_the_total_in_proportion_to_their_probabilities():
    logits = torch.randn(3, 4, 6, dtype=torch.float64)
    gates, probabilities, chosen = mixture(logits, 2, total=2.0)
    for token, ours, p, kept in zip(*(t.reshape(-1, 6).tolist() for t in (logits, gates, probabilities, chosen)), strict=True):
        best = sorted(range(6), key=lambda i: -token[i])[:2]
        expected = [math.exp(x) / sum(map(math.exp, token)) for x in token]
        assert p == pytest.approx(expected)
        assert [i for i in range(6) if kept[i]] == sorted(best)
        share = sum(expected[i] for i in best)
        assert ours == pytest.approx([2 * expected[i] / share if i in best else 0.0 for i in range(6)])


def test_uniform_gates_of_all_heads_are_one():
    assert torch.equal(mixture(torch.zeros(2, 4), 4, total=4.0).gates, torch.ones(2, 4))


def test_gates_carry_the_gradient_of_the_masked_formula_even_where_probabilities_vanish():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64)
    gates, probabilities, chosen = mixture(logits, 3, total=3.0)
    kept = probabilities * chosen
    (ours,) = torch.autograd.grad((gates * weight).sum(), logits)
    (theirs,) = torch.autograd.grad((3 * kept / kept.sum(-1, keepdim=True) * weight).sum(), logits)
    torch.testing.assert_close(ours, theirs)
    far = torch.tensor([200.0, 199.0, -200.0, -300.0], requires_grad=True)
    gates = mixture(far, 3).gates
    gates.square().sum().backward()
    assert gates.isfinite().all()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (6, 2), (8, 8)])
def test_the_balance_loss_is_k_where_tokens_spread_evenly(experts, k):
    token = torch.arange(experts)
    chosen = ((token[:, None] + token) % experts) < k  # every expert is chosen by k of the tokens
    uniform = torch.full((experts, experts), 1 / experts)
    assert balance_loss(uniform, chosen).item() == pytest.approx(k)


def test_the_balance_loss_falls_as_the_favoured_expert_loses_probability():
    gates = mixture(torch.tensor([[3.0, 0, 0, 0]]).expand(8, 4), 1)
    assert balance_loss(gates.probabilities, gates.chosen).item() == pytest.approx(4 * gates.probabilities[0, 0].item())
    narrow, firm = [[0.01, 0.0]] * 9, [[0.0, 20.0]]  # 9 tokens choose the first expert, which is the less probable one
    gates = mixture(torch.tensor(narrow + firm), 1)
    assert balance_loss(gates.probabilities, gates.chosen).item() < 1.0
    logits = torch.randn(50, 4, requires_grad=True)
    gates = mixture(logits + torch.tensor([2.0, 0, 0, 0]), 1)
    (gradient,) = torch.autograd.grad(balance_loss(gates.probabilities, gates.chosen), logits)
    assert (gradient[:, 0] > 0).all()


def test_the_z_loss_is_the_mean_square_of_the_log_partition():
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = [math.log(sum(map(math.exp, row))) ** 2 for row in logits.reshape(-1, 5).tolist()]
    assert z_loss(logits).item() == pytest.approx(sum(expected) / 6)


def test_a_count_that_does_not_exist_is_refused():
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"1\.\.4.*got {k}"):
            mixture(torch.randn(2, 4), k)
