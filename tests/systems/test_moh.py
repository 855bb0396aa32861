"""MoH (6): heads are chosen and weighted as published, all of them on is plain attention, and the loss evens out the load."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regard import create_mixer, create_model
from regard.layers.mixers import collect_balance
from regard.models import count_parameters

DIM, HEADS, WIDTH = 24, 6, 4
GRID = (3, 5)


def mixer(shared=2, routed=2, **options):
    made = create_mixer("mixture_of_heads", dim=DIM, heads=HEADS, shared=shared, routed=routed, dtype=torch.float64, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def tokens(*shape):
    return torch.randn(2, *(shape or GRID), DIM, dtype=torch.float64)


def head_outputs(moh, x):
    """The outputs of all heads before any gate: (batch, tokens, heads, width), for a sequence of tokens."""
    q, k, v = (part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in moh.qkv(x).chunk(3, -1))
    return ((q @ k.transpose(-1, -2) / math.sqrt(WIDTH)).softmax(-1) @ v).transpose(1, 2)


def softmax(logits):
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def naive_gates(moh, token, query):
    """The gates of one token, as the text defines them."""
    s, k = moh.shared, moh.routed
    shared, routed = [1.0] * s, []
    if s > 1 and moh.kind == "linear":
        shared = [s * p for p in softmax((moh.shared_router.weight @ token).tolist())]
    if k:
        if moh.kind == "linear":
            p = softmax((moh.router.weight @ token).tolist())
            best = sorted(range(len(p)), key=lambda i: -p[i])[:k]
            routed = [k * p[i] / sum(p[j] for j in best) if i in best else 0.0 for i in range(len(p))]
        else:
            lengths = [math.sqrt(sum(value**2 for value in query[i].tolist())) for i in range(s, HEADS)]
            best = sorted(range(len(lengths)), key=lambda i: -lengths[i])[:k]
            return shared + [float(i in best) for i in range(len(lengths))]
        if s:
            first, second = softmax((moh.balance.weight @ token).tolist())
            shared = [2 * first * gate for gate in shared]
            routed = [2 * second * gate for gate in routed]
    return shared + routed


CHOICES = [(2, 2, "linear"), (1, 3, "linear"), (0, 3, "linear"), (6, 0, "linear"), (3, 3, "linear"), (3, 1, "query_norm")]


def naive_mixer(moh, x):
    sequence = x.flatten(1, -2)
    outputs = head_outputs(moh, sequence)
    queries = moh.qkv(sequence)[..., :DIM].unflatten(-1, (HEADS, WIDTH))
    y = torch.zeros_like(sequence)
    for item in range(len(x)):
        for at in range(sequence.shape[1]):
            for head, gate in enumerate(naive_gates(moh, sequence[item, at], queries[item, at])):
                if gate:  # only the chosen heads of a token are computed at all
                    columns = moh.proj.weight[:, head * WIDTH : (head + 1) * WIDTH]
                    y[item, at] += gate * columns @ outputs[item, at, head]
    return (y + moh.proj.bias).unflatten(1, x.shape[1:-1])


@pytest.mark.parametrize(("shared", "routed", "router"), CHOICES)
def test_equals_the_sum_over_the_chosen_heads_of_each_token(shared, routed, router):
    moh = mixer(shared, routed, router=router)
    if router == "query_norm":
        assert moh.router is moh.shared_router is moh.balance is None
    x = tokens()
    torch.testing.assert_close(moh(x), naive_mixer(moh, x), rtol=1e-11, atol=1e-11)


def test_extra_tokens_choose_their_heads_too():
    moh, x, extra = mixer(), tokens(), tokens(2)
    y, y_extra = moh(x, extra)
    joint = naive_mixer(moh, torch.cat([extra, x.flatten(1, 2)], 1))
    torch.testing.assert_close(y_extra, joint[:, :2], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(y.flatten(1, 2), joint[:, 2:], rtol=1e-11, atol=1e-11)


def test_all_heads_shared_and_undecided_is_multi_head_attention():
    moh = mixer(HEADS, 0)
    nn.init.zeros_(moh.shared_router.weight)
    plain = create_mixer("multi_head", dim=DIM, heads=HEADS, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in moh.state_dict().items() if "router" not in k})
    x = tokens()
    torch.testing.assert_close(moh(x), plain(x), rtol=1e-12, atol=1e-12)
    even = mixer(2, 4)  # all routed heads on, undecided between heads and between groups
    for layer in (even.router, even.shared_router, even.balance):
        nn.init.zeros_(layer.weight)
    plain.load_state_dict({k: v for k, v in even.state_dict().items() if k.startswith(("qkv", "proj"))})
    torch.testing.assert_close(even(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shared", "routed", "router"), CHOICES)
def test_every_token_has_so_many_heads_and_so_much_weight(shared, routed, router):
    moh, x = mixer(shared, routed, router=router), tokens()
    q = moh.qkv(x)[..., :DIM].unflatten(-1, (HEADS, WIDTH))
    gates = moh.gates(x, moh.route(x, q))
    assert torch.equal((gates != 0).sum(-1), torch.full((2, *GRID), shared + routed))
    assert (gates[..., :shared] > 0).all()
    first, second = (2.0 * moh.balance(x).softmax(-1)).unbind(-1) if moh.balance is not None else (1.0, 1.0)
    budget = torch.as_tensor(shared * first + routed * second).expand(2, *GRID)
    torch.testing.assert_close(gates.sum(-1), budget.double())


def test_the_load_balance_loss_is_the_published_one_and_the_number_of_routed_heads_where_even():
    moh, x, extra = mixer(2, 2).train(), tokens(), tokens(2)
    with collect_balance(moh) as losses:
        moh(x, extra)
    p = moh.router(torch.cat([x.flatten(1, 2), extra], 1)).softmax(-1).flatten(0, 1)
    chosen = F.one_hot(p.topk(2, -1).indices, 4).sum(1).double()
    expected = (p.mean(0) * chosen.mean(0)).mean() * 16
    assert len(losses) == 1
    torch.testing.assert_close(losses[0], expected)
    nn.init.zeros_(moh.router.weight)
    with collect_balance(moh) as losses:
        moh(x)
    assert losses[0].item() == pytest.approx(2.0)
    with collect_balance(moh.eval()) as losses:
        moh(x)
    assert losses == []
    assert moh.losses is None


def test_training_with_the_loss_spreads_tokens_over_heads():
    """Routers that send every token to the same heads are drawn apart by the loss alone."""
    moh, x = mixer(0, 1).train(), torch.randn(1, 64, DIM, dtype=torch.float64)
    with torch.no_grad():
        moh.router.weight.mul_(0.2)
        x[..., 0] = 1.0
        moh.router.weight[0, 0] += 1.5  # the first head is everyone's favourite

    def loads():
        return torch.bincount(moh.router(x).argmax(-1).flatten(), minlength=HEADS) / 64

    before = loads().max()
    optimiser = torch.optim.SGD([moh.router.weight], lr=0.5)
    for _ in range(60):
        optimiser.zero_grad()
        with collect_balance(moh) as losses:
            moh(x)
        losses[0].backward()
        optimiser.step()
    assert before > 0.6
    assert loads().max() < 0.4


def test_query_norms_are_rotation_free_and_pass_gradients_straight_through():
    torch.manual_seed(2)
    moh, x = mixer(3, 1, router="query_norm"), tokens()
    turned = create_mixer(
        "mixture_of_heads", dim=DIM, heads=HEADS, shared=3, routed=1, router="query_norm", rope=True, dtype=torch.float64
    )
    turned.load_state_dict(moh.state_dict())
    q = moh.qkv(x)[..., :DIM].unflatten(-1, (HEADS, WIDTH))
    assert torch.equal(moh.route(x, q).chosen, turned.route(x, turned.rope(q)).chosen)
    q = q.detach().requires_grad_()
    gates = moh.route(x, q).gates
    weights = torch.randn(3, dtype=torch.float64)
    (straight,) = torch.autograd.grad((gates * weights).sum(), q)
    lengths = q[..., 3:, :].square().sum(-1).sqrt()
    soft = (lengths / lengths.std(-1, keepdim=True)).softmax(-1)
    (expected,) = torch.autograd.grad((soft * weights).sum(), q)
    torch.testing.assert_close(straight, expected)
    assert straight.abs().max() > 0


@pytest.mark.parametrize(("shared", "routed"), [(2, 1), (0, 2), (3, 0)])
def test_parameters_are_the_hosts_and_three_routers(shared, routed):
    """MoH-ViT on DeiT-T: three heads, twelve blocks."""
    host = count_parameters(create_model("deit_tiny_patch16_224", device="meta"))
    model = create_model(
        "deit_tiny_patch16_224", mixer=("mixture_of_heads", {"shared": shared, "routed": routed}), device="meta"
    )
    others = 3 - shared
    each = others + (shared if shared > 1 else 0) + (2 if shared and others else 0)
    assert count_parameters(model) == host + 12 * 192 * each


def test_a_model_trains_with_one_loss_per_block():
    model = create_model("deit_tiny_patch16_224", mixer="mixture_of_heads", dim=32, depth=3, head_dim=8, num_classes=3).train()
    model.set_grad_checkpointing()
    with collect_balance(model) as losses:
        logits = model(torch.randn(2, 3, 48, 48))
        assert len(losses) == 3
        (logits.square().sum() + 0.01 * torch.stack(losses).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.blocks[0].mixer.op.router.weight.grad.any()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shared": 7, "routed": 0}, "shared=7, routed=0"),
        ({"shared": 2, "routed": 5}, "shared=2, routed=5"),
        ({"shared": 2, "routed": 0}, "1 to all of the others routed; got shared=2, routed=0"),
        ({"router": "random"}, "'linear' or 'query_norm'; got 'random'"),
        ({"shared": 5, "routed": 1, "router": "query_norm"}, "single routed head"),
    ],
)
def test_wrong_numbers_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        create_mixer("mixture_of_heads", dim=DIM, heads=HEADS, **options)
