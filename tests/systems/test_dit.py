"""MoH-DiT (6): the denoiser is DiT's definition, with and without mixtures of heads, under the published names and sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from naive_backbones import linear
from torch import nn

from regard import load_checkpoint
from regard.bench import count
from regard.layers.mixers import HeadMixture, collect_balance
from regard.models import DITS, count_parameters, create_dit, export_state_dict
from regard.models.generative.dit import LabelEmbedding

DOUBLE = {"dtype": torch.float64}
SMALL = {"dim": 16, "input_size": 6, "num_classes": 5}
PLAIN = SMALL | {"depth": 2, "heads": 2}
MIXED = SMALL | {"parts": ((1, 2, 2, 0), (2, 6, 2, 3), (1, 3, 0, 2)), "head_dim": 4}
KINDS = pytest.mark.parametrize(("name", "options"), [("dit_s_2", PLAIN), ("moh_dit_s_2_75", MIXED)])


def small(name, options, **others):
    """A narrow float64 model with weights that matter, and these under the official names."""
    model = create_dit(name, **options | others, **DOUBLE).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, export_state_dict(model, "official")


def inputs(rows=6, columns=6):
    return torch.randn(3, 4, rows, columns, **DOUBLE), torch.tensor([0.0, 17.0, 999.0]), torch.tensor([1, 5, 0])


def norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def waves(position, count):
    """Sines, then cosines, of a position at falling frequencies."""
    angles = [position / 10000 ** (i / count) for i in range(count)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def time_waves(time):
    angles = [time * math.exp(-math.log(10000) * i / 128) for i in range(128)]
    return [math.cos(a) for a in angles] + [math.sin(a) for a in angles]


def naive_attention(x, weights, name, heads, head_dim):
    """One item (tokens, dim), head by head, each weighted for each token where there are routers."""
    q, k, v = (part.unflatten(-1, (heads, head_dim)) for part in linear(x, weights, f"{name}.qkv").chunk(3, -1))
    gates = torch.ones(len(x), heads, **DOUBLE)
    routed = weights.get(f"{name}.wg.weight")
    shared = heads if routed is None else heads - len(routed)
    if f"{name}.wg_1.weight" in weights:
        gates[:, :shared] = shared * (x @ weights[f"{name}.wg_1.weight"].T).softmax(-1)
    if routed is not None:
        p = (x @ routed.T).softmax(-1)
        keep = torch.zeros_like(p)
        active = {4: 3, 3: 2}[len(routed)]
        for token, row in enumerate(p.tolist()):
            for best in sorted(range(len(row)), key=lambda i: -row[i])[:active]:
                keep[token, best] = p[token, best]
        gates[:, shared:] = active * keep / keep.sum(-1, keepdim=True)
        if shared:
            balance = 2 * (x @ weights[f"{name}.wg_0.weight"].T).softmax(-1)
            gates[:, :shared] *= balance[:, :1]
            gates[:, shared:] *= balance[:, 1:]
    out = []
    for head in range(heads):
        share = (q[:, head] @ k[:, head].T / math.sqrt(head_dim)).softmax(-1)
        out.append(gates[:, head, None] * (share @ v[:, head]))
    return linear(torch.cat(out, -1), weights, f"{name}.proj")


def naive_dit(x, times, labels, weights, heads, head_dim):
    """Item by item, with the official names; latents are a multiple of 2 x 2."""
    outputs = []
    for latent, time, label in zip(x, times.tolist(), labels.tolist(), strict=True):
        rows, columns = latent.shape[1] // 2, latent.shape[2] // 2
        places = [(row, column) for row in range(rows) for column in range(columns)]
        kernel, bias = weights["x_embedder.proj.weight"].flatten(1), weights["x_embedder.proj.bias"]
        tokens = [kernel @ latent[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].flatten() + bias for r, c in places]
        quarter = len(bias) // 4
        positions = torch.tensor([waves(column, quarter) + waves(row, quarter) for row, column in places], **DOUBLE)
        tokens = torch.stack(tokens) + positions
        condition = linear(torch.tensor(time_waves(time), **DOUBLE), weights, "t_embedder.mlp.0")
        condition = linear(condition * torch.sigmoid(condition), weights, "t_embedder.mlp.2")
        condition = condition + weights["y_embedder.embedding_table.weight"][label]
        condition = condition * torch.sigmoid(condition)
        for index, count_of in enumerate(heads):
            block = f"blocks.{index}"
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = linear(
                condition, weights, f"{block}.adaLN_modulation.1"
            ).chunk(6)
            mixed = naive_attention(norm(tokens) * (1 + scale) + shift, weights, f"{block}.attn", count_of, head_dim)
            tokens = tokens + gate * mixed
            hidden = linear(norm(tokens) * (1 + mlp_scale) + mlp_shift, weights, f"{block}.mlp.fc1")
            hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
            tokens = tokens + mlp_gate * linear(hidden, weights, f"{block}.mlp.fc2")
        shift, scale = linear(condition, weights, "final_layer.adaLN_modulation.1").chunk(2)
        out = linear(norm(tokens) * (1 + scale) + shift, weights, "final_layer.linear")
        y = torch.zeros(out.shape[-1] // 4, 2 * rows, 2 * columns, **DOUBLE)
        for (row, column), values in zip(places, out, strict=True):
            for at, value in enumerate(values):  # of a token: down, then right, then channels
                down, right, channel = at // (2 * len(y)), at // len(y) % 2, at % len(y)
                y[channel, 2 * row + down, 2 * column + right] = value
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("size", [(6, 6), (4, 8)])  # that of the stored positions, and another
@KINDS
def test_equals_the_definition_item_by_item(name, options, size):
    model, weights = small(name, options)
    heads, head_dim = ((2, 2), 8) if name == "dit_s_2" else ((2, 6, 6, 3), 4)
    x, time, labels = inputs(*size)
    torch.testing.assert_close(
        model(x, time, labels), naive_dit(x, time, labels, weights, heads, head_dim), rtol=1e-10, atol=1e-10
    )


def test_other_sizes_are_padded_and_cut_and_sigma_is_a_choice():
    model, _ = small("dit_s_4", PLAIN | {"learn_sigma": False})
    x, time, labels = inputs(7, 10)
    padded = F.pad(x, [0, 2, 0, 1])
    assert torch.equal(model(x, time, labels), model(padded, time, labels)[..., :7, :10])  # bitwise: the same operators
    assert model(x, time, labels).shape == x.shape


# --------------------------------------------------------------------------------------------------------------------
# conditions and training


@KINDS
def test_at_the_start_every_branch_and_the_output_are_closed(name, options):
    model = create_dit(name, **options).eval()
    x = torch.randn(2, 4, 6, 6)
    assert not model(x, torch.zeros(2), torch.zeros(2, dtype=torch.long)).any()
    tokens, condition = torch.randn(2, 3, 3, 16), torch.randn(2, 16)
    for block in model.blocks:
        assert torch.equal(block(tokens, condition), tokens)
        assert block.mlp.fc1.weight.abs().max() <= math.sqrt(6 / 80) + 1e-6
        assert block.mlp.fc1.weight.abs().max() > 0.9 * math.sqrt(6 / 80)


def test_labels_are_dropped_in_training_alone_and_as_often_as_said():
    embedding = LabelEmbedding(5, 8, 0.25)
    labels = torch.randint(0, 5, (4000,))
    assert torch.equal(embedding.eval()(labels), embedding.table.weight[labels])
    dropped = (embedding.train()(labels) == embedding.table.weight[5]).all(-1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.02)
    kept = ~dropped
    assert torch.equal(embedding.table.weight[labels[kept]], embedding.table.weight[labels][kept])
    assert len(LabelEmbedding(5, 8, 0.0).train().table.weight) == 5


def test_guidance_moves_the_noise_away_from_that_without_a_label():
    model, _ = small("dit_s_2", PLAIN)
    x, time, labels = inputs()
    known, unknown = model(x, time, labels), model(x, time, torch.full((3,), 5))
    expected = known.clone()
    expected[:, :4] = unknown[:, :4] + 4.0 * (known[:, :4] - unknown[:, :4])
    torch.testing.assert_close(model.guided(x, time, labels, 4.0), expected, rtol=1e-11, atol=1e-11)
    expected[:, 3] = known[:, 3]  # as samples were published
    torch.testing.assert_close(model.guided(x, time, labels, 4.0, channels=3), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model.guided(x, time, labels, 1.0), known, rtol=1e-11, atol=1e-11)


def test_one_balance_loss_per_block_that_routes_and_gradients_everywhere():
    model, _ = small("moh_dit_s_2_75", MIXED)
    model.train().set_grad_checkpointing()
    x, time, labels = inputs()
    with collect_balance(model) as losses:
        y = model(x, time, labels)
        assert len(losses) == 3  # the first block shares all its heads
        (y.square().mean() + 0.01 * torch.stack(losses).mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


# --------------------------------------------------------------------------------------------------------------------
# published facts

PUBLISHED = {  # multiply-adds in 10^9 at 256 x 256 pixels, learned values in 10^6
    "dit_s_2": (6.06, 33), "dit_s_4": (1.41, 33), "dit_s_8": (0.36, 33),
    "dit_b_2": (23.01, 130), "dit_b_4": (5.56, 130), "dit_b_8": (1.42, 131),
    "dit_l_2": (80.71, 458), "dit_l_4": (19.70, 458), "dit_l_8": (5.01, 459),
    "dit_xl_2": (118.64, 675), "dit_xl_4": (29.05, 675), "dit_xl_8": (7.39, 676),
}  # fmt: skip
WIDTHS = {"s": (384, 12), "b": (768, 12), "l": (1024, 24), "xl": (1152, 28)}
LISTS = {  # heads, those that are shared and those that are routed, block by block
    "s_2_90": ([6] * 12, [3] * 8 + [6] * 4, [2] * 8 + [0] * 4),
    "s_2_75": ([6] * 12, [2, 2] + [3] * 8 + [6, 6], [1] * 6 + [2] * 4 + [0, 0]),
    "b_2_90": ([12] * 12, [6] * 5 + [7] * 5 + [12, 12], [4] * 10 + [0, 0]),
    "b_2_75": ([12] * 12, [4, 4] + [6] * 8 + [12, 12], [2, 2] + [3] * 8 + [0, 0]),
    "l_2_90": ([8] * 8 + [16] * 8 + [24] * 8, [8] * 8 + [16] * 16, [0] * 16 + [3] * 8),
    "l_2_75": ([8] * 8 + [16] * 8 + [24] * 8, [8] * 16 + [12] * 8, [0] * 8 + [4] * 16),
    "xl_2_90": ([8] * 9 + [16] * 10 + [24] * 9, [8] * 9 + [16] * 19, [0] * 19 + [3] * 9),
    "xl_2_75": ([8] * 9 + [16] * 10 + [24] * 9, [8] * 9 + [10] * 10 + [14] * 9, [0] * 9 + [2] * 19),
}


def closed_form(dim, depth, patch):
    attention = 4 * dim**2 + 4 * dim
    block = attention + 8 * dim**2 + 5 * dim + 6 * dim**2 + 6 * dim
    outside = 4 * patch**2 * dim + dim + 257 * dim + dim**2 + dim + 1001 * dim + 2 * dim**2 + 2 * dim
    return outside + depth * block + (dim + 1) * 8 * patch**2


def multiply_adds(model):
    """Of linear layers, the convolution and the attention pairs for latents of 32 x 32, in 10^9."""
    total = 0

    def add(module, _, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(add)
    x, one = torch.zeros(1, 4, 32, 32, device="meta"), torch.zeros(1, device="meta")
    with count() as cost:
        model(x, one, one.long())
    return (total + cost.flops / 2) / 1e9


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    gmacs, millions = PUBLISHED[name]
    dim, depth = WIDTHS[name.split("_")[1]]
    model = create_dit(name, device="meta").eval()
    total = count_parameters(model)
    assert total == closed_form(dim, depth, model.spec.patch_size)
    assert round(total / 1e6) == millions
    if name == "dit_xl_2":  # what the release prints, with the fixed positions
        assert total + model.positions.numel() == 675_129_632
    one, two = (multiply_adds(create_dit(name, depth=depth, device="meta").eval()) for depth in (1, 2))
    assert one + (depth - 1) * (two - one) == pytest.approx(gmacs, rel=0.01, abs=0.005)


@pytest.mark.parametrize("name", LISTS)
def test_mixtures_have_the_published_heads_and_one_router_each(name):
    heads, shared, routed = LISTS[name]
    dim, depth = WIDTHS[name.split("_")[0]]
    model = create_dit(f"moh_dit_{name}", device="meta")
    mixers = [block.mixer for block in model.blocks]
    assert all(isinstance(mixer, HeadMixture) for mixer in mixers)
    assert [mixer.heads for mixer in mixers] == heads
    assert [mixer.shared for mixer in mixers] == shared
    assert [mixer.routed for mixer in mixers] == routed
    width = 72 if name.startswith("xl") else 64
    total = closed_form(dim, depth, 2)
    for h, s, k in zip(heads, shared, routed, strict=True):
        total += 4 * dim * (h * width - dim) + 3 * (h * width - dim)  # fewer or more heads of one width
        total += dim * ((h - s) + (s if s > 1 else 0) + (2 if s and k else 0))
    assert count_parameters(model) == total


def test_every_name_is_here():
    assert sorted(DITS) == sorted([*PUBLISHED, *(f"moh_dit_{name}" for name in LISTS)])


@KINDS
def test_official_names_load_and_save(name, options):
    model, weights = small(name, options)
    known = {
        "x_embedder.proj.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight",
        "pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.attn.proj.bias", "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.bias",
        "blocks.1.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias", "final_layer.linear.weight",
    }  # fmt: skip
    if options is MIXED:
        known |= {
            "blocks.0.attn.wg_1.weight",
            "blocks.1.attn.wg.weight",
            "blocks.1.attn.wg_0.weight",
            "blocks.3.attn.wg.weight",
        }
        assert "blocks.0.attn.wg.weight" not in weights
        assert "blocks.3.attn.wg_0.weight" not in weights
    assert known <= weights.keys()
    assert len(weights) == len(model.state_dict())
    assert weights["pos_embed"].shape == (1, 9, 16)
    other = create_dit(name, **options, **DOUBLE).eval()
    assert load_checkpoint(other, {"model": weights}) == "official"
    given = inputs()
    assert torch.equal(other(*given), model(*given))  # bitwise: the same operators on the same shapes
    assert all(torch.equal(export_state_dict(other, "official")[key], value) for key, value in weights.items())


def test_a_checkpoint_is_read_from_a_file(tmp_path):
    model, weights = small("dit_s_2", PLAIN)
    torch.save(weights, tmp_path / "dit.pt")
    other = create_dit("dit_s_2", tmp_path / "dit.pt", **PLAIN, **DOUBLE).eval()
    given = inputs()
    assert torch.equal(other(*given), model(*given))  # bitwise: the same operators on the same shapes


def test_compiles_exports_and_keeps_items_apart():
    model, _ = small("moh_dit_s_2_75", MIXED, parts=((1, 6, 2, 3),))
    given = inputs()
    with torch.no_grad():
        expected = model(*given)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(*given), expected)
        torch.testing.assert_close(torch.export.export(model, given).module()(*given), expected)
        torch.testing.assert_close(model(*(t[1:] for t in given)), expected[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({0: torch.randn(2, 3, 6, 6)}, r"expected latents \(batch, 4, height, width\); got \(2, 3, 6, 6\)"),
        ({1: torch.tensor(1.0)}, r"expected time \(2,\), one per item of the batch; got \(\)"),
        ({2: torch.tensor([1])}, r"expected labels \(2,\), .*; got \(1,\)"),
    ],
)
def test_wrong_inputs_are_told(change, told):
    model = create_dit("dit_s_2", **PLAIN)
    given = [change.get(i, t) for i, t in enumerate((torch.randn(2, 4, 6, 6), torch.zeros(2), torch.tensor([0, 1])))]
    with pytest.raises(ValueError, match=told):
        model(*given)


def test_wrong_names_options_and_guidance_are_told():
    with pytest.raises(ValueError, match=r"unknown model 'dit_xxl_2'; did you mean .*dit_xl_2"):
        create_dit("dit_xxl_2")
    with pytest.raises(ValueError, match=r"has no option depths; its table takes dim, depth, heads"):
        create_dit("dit_s_2", depths=3)
    with pytest.raises(ValueError, match=r"label_drop must be in \[0, 1\); got 1"):
        create_dit("dit_s_2", **PLAIN, label_drop=1.0)
    x, one = torch.randn(1, 4, 6, 6), torch.zeros(1)
    with pytest.raises(ValueError, match="label_drop=0"):
        create_dit("dit_s_2", **PLAIN, label_drop=0.0).guided(x, one, one.long(), 2.0)
    with pytest.raises(ValueError, match=r"channels must be in 0\.\.4; got 5"):
        create_dit("dit_s_2", **PLAIN).guided(x, one, one.long(), 2.0, channels=5)
