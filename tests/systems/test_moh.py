"""MoH (6): heads are chosen and weighted as published, all of them on is plain attention, and the loss evens out the load.

The mixtures of TransNeXt are here beside the dense ones; MoH-DiT has a file of its own.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from regard import attend, create_mixer, create_model, list_models, load_checkpoint
from regard.bench import count
from regard.layers.mixers import (
    AggregatedAttention,
    CosineAttention,
    HeadMixture,
    MixtureOfAggregatedHeads,
    MixtureOfCosineHeads,
    MixtureOfHeadsAttention,
    MultiHeadAttention,
    collect_balance,
)
from regard.models import count_parameters, export_state_dict, model_card
from regard.ops.mixture import chosen_attend

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
        ({"router": "random"}, "router must be one of linear, query_norm; got 'random'"),
        ({"shared": 5, "routed": 1, "router": "query_norm"}, "single routed head"),
    ],
)
def test_wrong_numbers_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        create_mixer("mixture_of_heads", dim=DIM, heads=HEADS, **options)


# --------------------------------------------------------------------------------------------------------------------
# any attention

HOSTS = [
    (MixtureOfHeadsAttention, MultiHeadAttention, {}),
    (MixtureOfCosineHeads, CosineAttention, {}),
    (MixtureOfAggregatedHeads, AggregatedAttention, {"ratio": 2}),
]


@pytest.mark.parametrize(("mixed", "plain", "options"), HOSTS)
@pytest.mark.parametrize(("shared", "routed"), [(2, 2), (1, 3), (0, 3), (6, 0)])
def test_every_head_of_a_host_adds_what_it_does_alone_times_its_gate(mixed, plain, options, shared, routed):
    moh = mixed(DIM, HEADS, shared=shared, routed=routed, dtype=torch.float64, **options)
    host = plain(DIM, HEADS, dtype=torch.float64, **options)
    for parameter in moh.parameters():
        nn.init.normal_(parameter, std=0.5)
    weights = {name: value for name, value in moh.state_dict().items() if name in host.state_dict()}
    assert len(weights) == len(host.state_dict())
    x, extra = tokens(4, 5), tokens(2)
    expected, expected_extra = torch.zeros_like(x), torch.zeros_like(extra)
    for head in range(HEADS):
        alone = torch.zeros_like(weights["proj.weight"])
        alone[:, head * WIDTH : (head + 1) * WIDTH] = weights["proj.weight"][:, head * WIDTH : (head + 1) * WIDTH]
        host.load_state_dict(weights | {"proj.weight": alone, "proj.bias": torch.zeros(DIM, dtype=torch.float64)})
        own = host(x, extra)
        for outputs, inputs, adds in zip((expected, expected_extra), (x, extra), own, strict=True):
            gates = [naive_gates(moh, token, None)[head] for token in inputs.reshape(-1, DIM)]
            outputs += torch.tensor(gates, dtype=torch.float64).reshape(*inputs.shape[:-1], 1) * adds
    y, y_extra = moh(x, extra)
    torch.testing.assert_close(y, expected + moh.proj.bias, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y_extra, expected_extra + moh.proj.bias, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mixed", "plain", "options"), HOSTS)
def test_the_loss_is_collected_in_the_same_way_on_every_host(mixed, plain, options):
    moh, x = mixed(DIM, HEADS, shared=2, routed=2, dtype=torch.float64, **options).train(), tokens(4, 5)
    nn.init.normal_(moh.router.weight)
    with collect_balance(moh) as losses:
        moh(x)
    p = moh.router(x).softmax(-1).flatten(0, -2)
    chosen = F.one_hot(p.topk(2, -1).indices, 4).sum(1).double()
    assert len(losses) == 1
    torch.testing.assert_close(losses[0], 4 * (p.mean(0) * chosen.mean(0)).sum())
    gradient = torch.autograd.grad(losses[0], moh.router.weight)[0]
    assert gradient.any()


@pytest.mark.parametrize("mixed", [MixtureOfCosineHeads, MixtureOfAggregatedHeads])
def test_queries_of_one_length_cannot_be_chosen_by_it(mixed):
    with pytest.raises(ValueError, match="router must be one of linear; got 'query_norm'"):
        mixed(DIM, HEADS, router="query_norm")


# --------------------------------------------------------------------------------------------------------------------
# MoH-ViT as published

VITS = {  # of which TransNeXt; heads per stage that are shared and routed
    "moh_transnext_base_75": ("transnext_base", (4, 8, 4, 5), (0, 0, 8, 16)),
    "moh_transnext_base_50": ("transnext_base", (2, 2, 2, 4), (2, 4, 6, 8)),
    "moh_transnext_small_80": ("transnext_small", (3, 6, 3, 8), (0, 0, 6, 12)),
    "moh_transnext_small_75": ("transnext_small", (3, 6, 3, 4), (0, 0, 6, 12)),
}
NARROW = {"dim": 8, "head_dim": 4, "depths": (1, 1, 2, 1), "shared": (2, 1, 2, 4), "routed": (0, 2, 3, 8)}


@pytest.mark.parametrize("name", VITS)
def test_published_sizes_are_those_of_the_host_and_its_routers(name):
    host, shared, routed = VITS[name]
    model, plain = create_model(name, device="meta"), create_model(host, device="meta")
    routers = 0
    for stage, s, k in zip(plain.spec.stages, shared, routed, strict=True):
        others = stage.heads - s
        routers += stage.depth * stage.dim * (others + (s if s > 1 else 0) + (2 if s and k else 0))
    assert count_parameters(model) == count_parameters(plain) + routers == model_card(name).params
    for stage, s, k in zip(model.stages, shared, routed, strict=True):
        assert {(block.mixer.op.shared, block.mixer.op.routed) for block in stage.blocks} == {(s, k)}
    assert len({name for name in model.no_weight_decay() if "router" in name}) == 0
    assert model_card(name).gmacs == model_card(host).gmacs


def test_every_published_name_is_here():
    assert sorted(VITS) == list_models("moh_*")


def test_official_names_of_the_gates_load_and_save_and_keep_their_order():
    model, weights = tiny("moh_transnext_base_75", **NARROW)
    shapes = {name: tuple(value.shape) for name, value in weights.items() if ".wg" in name}
    assert shapes == {
        "block1.0.attn.wg_1.weight": (2, 8),  # all heads shared
        "block2.0.attn.wg.weight": (3, 16),  # one shared head needs no softmax
        "block2.0.attn.wg_0.weight": (2, 16),
        "block3.0.attn.wg.weight": (6, 32),
        "block3.0.attn.wg_0.weight": (2, 32),
        "block3.0.attn.wg_1.weight": (2, 32),
        "block3.1.attn.wg.weight": (6, 32),
        "block3.1.attn.wg_0.weight": (2, 32),
        "block3.1.attn.wg_1.weight": (2, 32),
        "block4.0.attn.wg.weight": (12, 64),
        "block4.0.attn.wg_0.weight": (2, 64),
        "block4.0.attn.wg_1.weight": (4, 64),
    }
    other = create_model("moh_transnext_base_75", num_classes=5, dtype=torch.float64, **NARROW).eval()
    assert load_checkpoint(other, {"model": dict(weights)}) == "official"
    image = torch.randn(1, 3, 70, 45, dtype=torch.float64)
    assert torch.equal(other(image), model(image))  # bitwise: the same operators on the same shapes
    assert all(torch.equal(export_state_dict(other, "official")[key], value) for key, value in weights.items())
    mixers = [module for module in model.modules() if isinstance(module, HeadMixture)]
    x = torch.randn(1, 3, 3, 64, dtype=torch.float64)
    first, second = (2 * (x @ weights["block4.0.attn.wg_0.weight"].T).softmax(-1)).unbind(-1)
    gates = mixers[-1].gates(x, mixers[-1].route(x, x))
    torch.testing.assert_close(gates[..., :4].sum(-1), 4 * first)  # the first gate and the first heads are the shared ones
    torch.testing.assert_close(gates[..., 4:].sum(-1), 8 * second)


def test_published_networks_train_with_one_loss_per_block_that_routes():
    model = create_model("moh_transnext_base_75", num_classes=3, **NARROW).train()
    model.set_grad_checkpointing()
    with collect_balance(model) as losses:
        logits = model(torch.randn(2, 3, 64, 64))
        assert len(losses) == 4  # five blocks, of which the first shares all heads
        (logits.square().sum() + 0.01 * torch.stack(losses).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# what is not chosen need not be computed


@pytest.mark.parametrize("scale", [None, 0.3])
def test_chosen_queries_attend_as_ever_and_the_others_give_nothing(scale):
    q, k, v = torch.randn(2, 3, 4, 5, 6).double(), torch.randn(2, 7, 5, 6).double(), torch.randn(2, 7, 5, 2).double()
    chosen = torch.rand(2, 3, 4, 5) < 0.4
    chosen[0, ..., 1] = False
    y = chosen_attend(q, k, v, chosen, scale=scale)
    expected = torch.zeros(2, 3, 4, 5, 2).double()
    for item, row, column, head in chosen.nonzero().tolist():
        logits = [(scale or 6**-0.5) * (q[item, row, column, head] @ key) for key in k[item, :, head]]
        weights = torch.tensor(softmax([value.item() for value in logits]), dtype=torch.float64)
        expected[item, row, column, head] = weights @ v[item, :, head]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dense = attend(q, k[:, :, None], v[:, :, None], scale=scale)
    torch.testing.assert_close(y, dense * chosen[..., None], rtol=1e-12, atol=1e-12)


class QueryRows(TorchDispatchMode):
    """Counts the queries that torch's attention really runs for, over items and heads."""

    def __enter__(self):
        self.total = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name():
            self.total += args[0].shape[:-1].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("router", "shared", "rope"), [("linear", 2, False), ("linear", 0, True), ("query_norm", 3, True)])
def test_inference_gathers_and_changes_nothing(router, shared, rope):
    """576 tokens, heads of 64, a third of the routed heads or fewer: enough to gather."""
    moh = create_mixer(
        "mixture_of_heads", dim=24, heads=8, head_dim=64, shared=shared, routed=1, router=router, rope=rope, dtype=torch.float64
    ).eval()
    x, extra = torch.randn(2, 24, 24, 24, dtype=torch.float64), torch.randn(2, 3, 24, dtype=torch.float64)
    expected, expected_extra = moh(x, extra)  # with gradients: all heads
    with torch.no_grad(), QueryRows() as rows:
        y, y_extra = moh(x, extra)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(y_extra, expected_extra, rtol=1e-11, atol=1e-11)
    q = moh.qkv(x)[..., : 8 * 64].unflatten(-1, (8, 64))
    most = moh.route(x, q).chosen.sum((1, 2)).max().item()  # queries of the most chosen head
    assert most < 576 // 2
    assert rows.total == 2 * (most * (8 - shared) + 576 * shared + 3 * 8)  # the extra tokens compute all heads
    with torch.no_grad(), count(), QueryRows() as rows:  # whoever watches sees all heads
        moh(x)
    assert rows.total == 2 * 576 * 8


def test_only_where_enough_is_left_out_is_anything_gathered():
    moh = create_mixer("mixture_of_heads", dim=192, heads=8, shared=2, routed=3).eval()
    few, many = torch.randn(1, 16, 16, 8, 64), torch.randn(1, 24, 24, 8, 64)
    with torch.no_grad():
        assert not moh.gathers(few, few)  # half of 256 x 256 x 64
        assert moh.gathers(many, many)  # half of 576 x 576 x 64
        assert not moh.gathers(many.bfloat16(), many.bfloat16())
        assert not moh.gathers(many.to("meta"), many.to("meta"))
        moh.routed = 4  # of six
        assert not moh.gathers(many, many)
        moh.routed = 3
    assert not moh.gathers(many, many)


def test_compiles_and_exports_with_all_heads():
    moh = create_mixer("mixture_of_heads", dim=64, heads=4, head_dim=64, shared=1, routed=1).eval()
    x = torch.randn(1, 24, 24, 64)
    with torch.no_grad():
        expected = moh(x)
        torch.testing.assert_close(torch.compile(moh, fullgraph=True, backend="aot_eager")(x), expected)
        torch.testing.assert_close(torch.export.export(moh, (x,)).module()(x), expected)
