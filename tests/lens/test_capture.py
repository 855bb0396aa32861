"""Captured maps are the weights the attention multiplied its values with."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import regard
from regard import Source, attend, create_mixer
from regard import patterns as P
from regard.lens import capture
from regard.ops.attention.transposed import attend_transposed
from regard.ops.calls.observe import OBSERVERS, WATCHERS, within
from regard.ops.local.kernels import apply_kernel

STATIC = [
    P.Dense(),
    P.Causal(),
    P.Window(3, shift=1),
    P.Neighborhood(3, dilation=2),
    P.Neighborhood((3, 2), causal=(True, False)),
    P.Halo(2, 1, border="mask"),
    P.Grid(2),
    P.Axis(0) | P.Axis(1),
    P.Window(3) & P.Neighborhood(3),
    P.PerHead({P.Window(2): 1, P.Dense(): 3}),
]
ROUTED = [
    P.Blocks(torch.tensor([[[0, 1], [2, -1], [3, 3], [1, 2]]]), (3, 3)),
    P.Clusters(torch.arange(30)[None] % 4),
]


class Attends(nn.Module):
    """A layer that attends to sources made of its input, in any backend."""

    def __init__(self, pattern, backend="auto", bias=None, **options):
        super().__init__()
        self.pattern, self.backend, self.bias, self.options = pattern, backend, bias, options

    def forward(self, x):
        q, k, v = x
        return attend(q, [Source(k, v, self.pattern, bias=self.bias)], backend=self.backend, **self.options)


def random_qkv(grid=(5, 6), heads=4, kv_heads=4, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.randn(2, *grid, h, 8, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def softmax_of(q, k, mask, bias=None, scale=None):
    k = k.flatten(1, -3).repeat_interleave(q.shape[-2] // k.shape[-2], 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, -3), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits if bias is None else logits + bias
    return torch.softmax(logits.masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0)


@pytest.mark.parametrize(
    ("pattern", "backend"),
    [
        pytest.param(pattern, backend, id=f"{backend}-{pattern!r}")
        for pattern in STATIC + ROUTED
        for backend in ("reference", "dense", "tiled")
        if not (backend == "tiled" and isinstance(pattern, P.Clusters))  # labels are not tiles
    ],
)
def test_maps_equal_masked_softmax_for_every_pattern_and_backend(pattern, backend):
    x = random_qkv(kv_heads=2)
    q, k, v = x
    model = Attends(pattern, backend)
    expected_out = model(x)
    with capture(model) as maps:
        out = model(x)
    assert torch.equal(out, expected_out)  # bitwise: the same operators on the same shapes
    (found,) = maps
    assert (found.name, found.call, found.grid, found.pattern) == ("", 0, (5, 6), pattern)
    (weights,) = found.weights
    mask = pattern.mask((5, 6))
    expected = softmax_of(q, k, mask if mask.ndim == 4 else mask[None, None])
    torch.testing.assert_close(weights, expected.unflatten(-1, (5, 6)), rtol=0, atol=1e-12)
    values = v.flatten(1, 2).repeat_interleave(2, 2)
    rebuilt = torch.einsum("bhqk,bkhd->bqhd", weights.flatten(-2), values).unflatten(1, (5, 6))
    torch.testing.assert_close(rebuilt, out, rtol=0, atol=1e-12)


def test_biases_scale_and_valid_keys_are_in_the_maps():
    x = random_qkv()
    q, k, v = x
    bias = torch.randn(1, 4, 30, 30, dtype=torch.float64)
    valid = torch.rand(2, 5, 6) > 0.4

    class Model(nn.Module):
        def forward(self, x):
            return attend(q, k, v, P.Window(3), bias=bias, valid=valid, scale=0.7)

    model = Model()
    with capture(model) as maps:
        model(x)
    mask = P.Window(3).mask((5, 6)) & valid.flatten(1)[:, None, None]
    torch.testing.assert_close(maps[0].weights[0].flatten(-2), softmax_of(q, k, mask, bias, 0.7), rtol=0, atol=1e-12)


def test_sources_and_sink_share_one_softmax():
    q, k, v = random_qkv()
    other_k, other_v = (torch.randn(2, 3, 4, 8, dtype=torch.float64) for _ in range(2))

    class Model(nn.Module):
        def forward(self, x):
            return attend(q, [Source(k, v, P.Neighborhood(3)), Source(other_k, other_v)], sink=0.3)

    model = Model()
    with capture(model, rows=[0, 17]) as maps:
        model(q)
    grid_map, token_map = maps[0].weights
    assert grid_map.shape == (2, 4, 2, 5, 6)
    assert token_map.shape == (2, 4, 2, 3)
    flat = q.flatten(1, 2)[:, [0, 17]]
    mask = P.Neighborhood(3).mask((5, 6))[[0, 17]]
    logits = torch.einsum("bqhd,bkhd->bhqk", flat, torch.cat([k.flatten(1, 2), other_k], 1)) * 8**-0.5
    logits = logits.masked_fill(~torch.cat([mask, torch.ones(2, 3, dtype=torch.bool)], 1), -torch.inf)
    expected = torch.softmax(torch.cat([logits, torch.full((2, 4, 2, 1), 0.3, dtype=torch.float64)], -1), -1)
    torch.testing.assert_close(grid_map.flatten(-2), expected[..., :30], rtol=0, atol=1e-12)
    torch.testing.assert_close(token_map, expected[..., 30:33], rtol=0, atol=1e-12)


def network():
    torch.manual_seed(0)
    stage = nn.ModuleDict({"first": create_mixer("window", dim=16, heads=2, window_size=3)})
    stage["second"] = create_mixer("criss_cross", dim=16, heads=1)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.stage = stage
            self.last = create_mixer("multi_head", dim=16, heads=2)

        def forward(self, x):
            y = self.stage["second"](x + self.stage["first"](x))
            return self.last(y[:, ::2, ::2])

    return Network()


def test_maps_are_named_by_module_and_numbered_by_call():
    model = network()
    with capture(model) as maps:
        model(torch.randn(1, 6, 8, 16))
    assert [(m.name, m.call, m.grid) for m in maps] == [
        ("stage.first", 0, (6, 8)), ("stage.second", 0, (6, 8)), ("stage.second", 1, (6, 8)), ("last", 0, (3, 4)),
    ]  # fmt: skip
    assert maps["stage.second"] is maps[1]
    assert maps["stage.second", 1] is maps[2]
    assert len(maps) == 4
    with pytest.raises(KeyError, match=r"no attention .stage.secnd.*there are stage.second"):
        maps["stage.secnd"]


@pytest.mark.parametrize("layers", ["stage.*", "last", "*second"])
def test_layers_are_chosen_by_glob(layers):
    model = network()
    with capture(model, layers=layers) as maps:
        model(torch.randn(1, 6, 8, 16))
    expected = {"stage.*": {"stage.first", "stage.second"}, "last": {"last"}, "*second": {"stage.second"}}
    assert {m.name for m in maps} == expected[layers]


def test_rows_are_coordinates_indices_or_fractions():
    model, x = network(), torch.randn(1, 6, 8, 16)
    with capture(model, layers="stage.first") as whole:
        model(x)
    for rows, flat in (([(2, 5), (5, 0)], [21, 40]), ([21, 40], [21, 40]), ([(0.34, 0.7), (0.99, 0.0)], [21, 40])):
        with capture(model, rows=rows, layers="stage.first") as maps:
            model(x)
        assert maps[0].rows == tuple(flat)
        torch.testing.assert_close(maps[0].weights[0], whole[0].weights[0][:, :, flat], rtol=1e-6, atol=0)


def test_fractions_name_one_place_at_every_resolution():
    model = network()
    with capture(model, rows=[(0.5, 0.5)]) as maps:
        model(torch.randn(1, 6, 8, 16))
    assert [m.rows for m in maps] == [(3 * 8 + 4,)] * 3 + [(1 * 4 + 2,)]


def test_extra_tokens_are_another_call_without_coordinates():
    mixer = create_mixer("window", dim=16, heads=2, window_size=3)
    x, extra = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 16)
    with capture(mixer) as maps:
        mixer(x, extra)
    assert [(m.grid, [tuple(w.shape[3:]) for w in m.weights]) for m in maps] == [
        ((4, 5), [(4, 5), (2,)]),
        ((2,), [(4, 5), (2,)]),
    ]
    for found in maps:
        total = sum(w.flatten(3).sum(-1) for w in found.weights)
        torch.testing.assert_close(total, torch.ones_like(total))
    with capture(mixer, rows=[(1, 1)]) as maps:
        mixer(x, extra)
    assert [m.grid for m in maps] == [(4, 5)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_under_checkpointing_is_not_recorded(reentrant):
    mixer = create_mixer("window", dim=16, heads=2, window_size=3)
    outer = nn.Sequential(mixer)
    x = torch.randn(1, 4, 5, 16, requires_grad=True)
    forwards = []
    mixer.register_forward_pre_hook(lambda *_: forwards.append(1))
    with capture(outer) as maps, regard.bench.count() as cost:
        checkpoint(outer, x, use_reentrant=reentrant).sum().backward()
    assert len(forwards) == 2
    assert len(maps) == 1
    assert cost.calls == 1


def test_outputs_and_gradients_are_those_without_capture():
    model, x = network(), torch.randn(1, 6, 8, 16)
    plain = model(x)
    plain.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with capture(model):
        watched = model(x)
    watched.sum().backward()
    assert torch.equal(plain, watched)  # bitwise: the same operators on the same shapes
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))


def test_nothing_stays_behind_even_after_an_error():
    hooks = (nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks)
    before, model = [len(h) for h in hooks], network()
    with pytest.raises(ValueError, match="expected x"), capture(model):
        model(torch.randn(1, 6, 8, 4))
    assert not OBSERVERS
    assert [len(h) for h in hooks] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_recording_goes_on_after_an_error_inside_the_model():
    model = network()
    with capture(model) as maps:
        with pytest.raises(ValueError, match="expected x"):
            model(torch.randn(1, 6, 8, 4))
        attend(*random_qkv())  # nothing is running any more
        model.stage["first"](torch.randn(1, 6, 8, 16))
    assert [m.name for m in maps] == ["stage.first"]


def test_other_modules_are_not_recorded():
    model, other = network(), create_mixer("multi_head", dim=16, heads=2)
    with capture(model) as maps:
        other(torch.randn(1, 3, 3, 16))
        attend(*random_qkv())
    assert not len(maps)


def test_autocast_maps_are_the_float32_softmax_of_the_low_precision_logits():
    mixer = create_mixer("multi_head", dim=16, heads=2)
    x = torch.randn(1, 4, 4, 16)
    with torch.autocast("cpu", torch.bfloat16), capture(mixer) as maps:
        mixer(x)
        q, k, _ = mixer.project(x, x)
    assert q.dtype == torch.bfloat16
    expected = softmax_of(q.float(), k.float(), torch.ones(16, 16, dtype=torch.bool))
    assert maps[0].weights[0].dtype == torch.float32
    torch.testing.assert_close(maps[0].weights[0].flatten(-2), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"rows": [(6, 0)], "layers": "stage.first"}, r"inside the grid \(6, 8\) of 'stage.first'.*got \(6, 0\)"),
        ({"rows": [(0.5, 1.0)]}, r"fractions in \[0, 1\) of it; got \(0.5, 1.0\)"),
        ({"rows": [48]}, r"0..47 on the grid \(6, 8\).*got 48"),
        ({"limit": 2 * 48 * 48 * 4 - 1}, "48 queries of 'stage.first' take 0.0 MiB.*choose rows="),
    ],
)
def test_errors_name_the_layer_and_what_is_allowed(arguments, told):
    model = network()
    with pytest.raises(ValueError, match=told), capture(model, **arguments):
        model(torch.randn(1, 6, 8, 16))


def test_limit_counts_what_was_taken_before():
    model, x = network(), torch.randn(1, 6, 8, 16)
    needed = 2 * 48 * 48 * 4 + 2 * 48 * 48 * 4 + 2 * 12 * 12 * 4
    with capture(model, limit=needed):
        model(x)
    with pytest.raises(ValueError, match="'last'"), capture(model, limit=needed - 1):
        model(x)


def test_limit_of_what_is_kept_is_the_bytes_of_every_tensor_once():
    q, k, v = random_qkv(kv_heads=2)
    bias, valid = torch.randn(1, 4, 30, 30, dtype=torch.float64), torch.rand(2, 5, 6) > 0.4

    class Layer(nn.Module):
        def forward(self, q):
            return attend(q, [Source(k, v, bias=bias, valid=valid), Source(k, k)])

    layer, needed = Layer(), 8 * (q.numel() + k.numel() + v.numel() + bias.numel()) + valid.numel()
    with capture(layer, lazy=True, limit=needed):
        layer(q)
    with pytest.raises(ValueError, match="choose rows="), capture(layer, lazy=True, limit=needed - 1):
        layer(q)


def test_maps_hold_no_graph_of_a_model_that_is_trained():
    """Of no tensor that a map shows or keeps: the activations before it could not be freed."""
    bias = torch.randn(1, 4, 30, 30, dtype=torch.float64, requires_grad=True)
    q, k, v = (t.requires_grad_() for t in random_qkv())

    class Layer(nn.Module):
        def forward(self, q):
            return attend(q, k, v, bias=bias, sink=bias[0, :, 0, 0])

    layer = Layer()
    outlook = create_mixer("outlook", dim=8, heads=2)
    for lazy in (False, True):
        with capture(layer, lazy=lazy) as maps:
            layer(q)
        assert not maps[0].weights[0].requires_grad
        if lazy:
            record = maps[0]._kept.record
            held = [record.q, record.sink, *(t for s in record.sources for t in (s.k, s.v, s.bias))]
            assert not any(t.requires_grad for t in held)
        with capture(outlook, lazy=lazy) as maps:
            outlook(torch.randn(1, 4, 4, 8))
        assert not maps[0].weights[0].requires_grad


def test_nothing_is_told_or_stored_where_nothing_is_wanted():
    model, x = network(), torch.randn(1, 6, 8, 16)
    with torch.no_grad(), LiveBytes() as memory:
        model(x)
    for nothing in ({"layers": "no.such.*"}, {"kinds": "kernel"}):
        with torch.no_grad(), LiveBytes() as watched, capture(model, **nothing) as maps:
            model(x)
        assert not len(maps)
        assert watched.most == memory.most


@pytest.mark.parametrize("pattern", STATIC + ROUTED, ids=repr)
def test_lazy_maps_are_those_that_are_computed_at_once(pattern):
    layer, x = Attends(pattern), random_qkv()
    with capture(layer) as once, capture(layer, lazy=True) as later:
        layer(x)
    assert all(torch.equal(a, b) for a, b in zip(once[0].weights, later[0].weights, strict=True))
    for part, weights, gradients in later[0].stream(4):
        assert gradients is None
        torch.testing.assert_close(weights[0], once[0].weights[0][:, :, part], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "dense", "tiled"])
def test_gradients_are_those_of_the_explicit_weights(backend):
    q, k, v = (t.requires_grad_() for t in random_qkv(kv_heads=2))
    extra = torch.randn(2, 3, 2, 8, dtype=torch.float64)
    pattern, direction = P.Neighborhood(3), torch.randn(2, 5, 6, 4, 8, dtype=torch.float64)

    class Layer(nn.Module):
        def forward(self, q, k, v):
            sources = [
                Source(k, v, pattern),
                Source(extra, extra),
                Source(k[..., :1, :], v[..., :1, :], "window(2)", heads=(1, 3)),
            ]
            return attend(q, sources, sink=0.2, backend=backend)

    layer = Layer()
    with capture(layer, gradients=True, rows=[3, 17]) as maps:
        (layer(q, k, v) * direction).sum().backward()
    keys = [k.flatten(1, 2), extra, k[..., :1, :].flatten(1, 2)]
    values = [t.detach().repeat_interleave(4 // t.shape[2], 2) for t in (v.flatten(1, 2), extra, v[..., :1, :].flatten(1, 2))]
    masks = [
        pattern.mask((5, 6)).expand(4, 30, 30),
        torch.ones(4, 30, 3, dtype=torch.bool),
        P.Window(2).mask((5, 6)).repeat(4, 1, 1),
    ]
    masks[2][[0, 2]] = False
    logits = [
        torch.einsum("bqhd,bkhd->bhqk", q.flatten(1, 2), t.repeat_interleave(4 // t.shape[2], 2)).masked_fill(~m, -torch.inf)
        * 8**-0.5
        for t, m in zip(keys, masks, strict=True)
    ]
    sink = torch.full((2, 4, 30, 1), 0.2, dtype=torch.float64)
    weights = torch.cat([*logits, sink], -1).softmax(-1).detach().requires_grad_()
    y = torch.einsum("bhqk,bkhd->bqhd", weights[..., :-1], torch.cat(values, 1))
    (expected,) = torch.autograd.grad((y.unflatten(1, (5, 6)) * direction).sum(), weights)
    expected[:, [0, 2], :, 33:63] = 0.0  # these heads do not have the third source
    found = torch.cat([g.flatten(3) for g in maps[0].gradients], -1)
    torch.testing.assert_close(found, expected[:, :, [3, 17], :-1], rtol=0, atol=1e-12)


def test_several_globs_choose_layers_and_kinds_operators():
    model, x = network(), torch.randn(1, 6, 8, 16)
    with capture(model, layers=["stage.first", "la*"]) as maps:
        model(x)
    assert [m.name for m in maps] == ["stage.first", "last"]
    mixer = create_mixer("aggregated", dim=16, heads=2, ratio=2)
    for kinds, expected in (("*", ["attention", "kernel"]), ("kernel", ["kernel"]), (["attention"], ["attention"])):
        with capture(mixer, kinds=kinds) as maps:
            mixer(torch.randn(1, 4, 4, 16))
        assert [m.kind for m in maps] == expected
        assert maps[""].kind == expected[0]


def test_kernels_are_weights_of_the_tokens_they_add_up():
    v = torch.randn(2, 5, 6, 4, 3, dtype=torch.float64)
    for border, size, dilation in (("zero", 3, 1), ("shift", 3, 1), ("zero", (2, 3), 2), ("shift", (2, 3), (2, 1))):
        taps = 9 if size == 3 else 6
        weights = torch.randn(1, 5, 6, 4, taps, dtype=torch.float64)

        class Layer(nn.Module):
            def forward(self, v, arguments=(weights, size, dilation, border)):
                weights, size, dilation, border = arguments
                return apply_kernel(v, weights, size, dilation=dilation, border=border)

        layer = Layer()
        with capture(layer) as maps:
            y = layer(v)
        again = torch.einsum("bhqk,bkhd->bqhd", maps[0].weights[0].flatten(3), v.flatten(1, 2)).unflatten(1, (5, 6))
        torch.testing.assert_close(again, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_outlook_windows_are_weights_of_tokens(stride):
    mixer = create_mixer("outlook", dim=8, heads=2, kernel_size=3, stride=stride).double()
    x = torch.randn(2, 5, 6, 8, dtype=torch.float64)
    with capture(mixer) as maps:
        y = mixer(x)
    v = mixer.v(x).unflatten(-1, (2, 4)).flatten(1, 2)
    mixed = torch.einsum("bhqk,bkhd->bqhd", maps[0].weights[0].flatten(3), v).flatten(2).unflatten(1, (5, 6))
    torch.testing.assert_close(mixer.proj(mixed), y, rtol=0, atol=1e-12)
    with capture(mixer, rows=[(2, 3), (4, 0)]) as some:
        mixer(x)
    torch.testing.assert_close(some[0].weights[0], maps[0].weights[0][:, :, [15, 24]])


@pytest.mark.parametrize("pattern", [P.Dense(), P.Window(2), P.Neighborhood(3)])
def test_transposed_attention_is_one_map_of_what_keys_receive(pattern):
    q, k, v = random_qkv()

    class Layer(nn.Module):
        def forward(self, q, k, v):
            return attend_transposed(q, k, v, pattern)

    layer = Layer()
    with capture(layer) as maps:
        y = layer(q, k, v)
    assert [m.kind for m in maps] == ["transposed"]
    again = torch.einsum("bhkq,bqhd->bkhd", maps[0].weights[0].flatten(3), v.flatten(1, 2)).unflatten(1, (5, 6))
    torch.testing.assert_close(again, y, rtol=0, atol=1e-10)
    sent = maps[0].weights[0].sum(2)  # every query sends one in all
    torch.testing.assert_close(sent, torch.ones_like(sent))


def test_channels_and_mixtures_show_what_they_weigh():
    mixer = create_mixer("channel_group", dim=8, heads=2).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    with capture(mixer) as maps:
        mixer(x)
    _, k, v = mixer.qkv(x).unflatten(-1, (3, 2, 4)).flatten(1, 2).unbind(2)
    expected = (torch.einsum("bnhi,bnhj->bhij", k, v) / 2.0).softmax(-1)
    torch.testing.assert_close(maps[0].weights[0], expected, rtol=0, atol=1e-12)
    assert (maps[0].kind, maps[0].row_places) == ("channel", None)
    with capture(mixer, rows=[2]) as maps:
        mixer(x)
    assert not len(maps)  # its rows are no queries
    heads = create_mixer("mixture_of_heads", dim=8, heads=4)
    with capture(heads, kinds="mixture") as maps:
        heads(x.float())
    assert maps[0].weights[0].shape == (1, 1, 12, 3 if heads.shared == 1 else 4 - heads.shared)
    torch.testing.assert_close(maps[0].weights[0].sum(-1), torch.ones(1, 1, 12))


def test_nothing_watches_after_a_capture_or_an_error():
    mixer = create_mixer("outlook", dim=8, heads=2)
    with capture(mixer):
        assert len(WATCHERS) == len(OBSERVERS) == 1
    with pytest.raises(ValueError, match="expected x"), capture(mixer):
        mixer(torch.randn(1, 4, 4, 3))
    assert not WATCHERS
    assert not OBSERVERS
    q = random_qkv()[0]
    with pytest.raises(ValueError, match="v must stand on the queries"), capture(mixer):
        attend_transposed(q, q[:, :1], q[:, :2])
    assert not within()


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.most, self.storages = 0, 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        key = storage._cdata
        if key in self.storages:
            return
        size = storage.nbytes()
        self.storages[key] = size
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key):
        self.alive -= self.storages.pop(key, 0)


def test_a_large_image_costs_the_chosen_rows_alone():
    """512 x 512 pixels are 16384 tokens at stage one: all weights of its six heads' worth of blocks would take gigabytes."""
    model = regard.create_model("swin_tiny_patch4_window7_224", num_classes=0).eval()
    image = torch.randn(1, 3, 512, 512)
    peaks = {}
    for name, options in {"plain": None, "rows": {"rows": [(0.5, 0.5)]}, "lazy": {"lazy": True}}.items():
        with torch.no_grad(), LiveBytes() as memory:
            if options is None:
                model(image)
            else:
                with capture(model, **options) as maps:
                    model(image)
                assert len(maps) == 12
        peaks[name] = memory.most
    grids = [(128 // 2**stage) ** 2 for stage in (0, 0, 1, 1, *[2] * 6, 3, 3)]
    heads = [3 * 2**stage for stage in (0, 0, 1, 1, *[2] * 6, 3, 3)]
    chosen = sum(4 * n * h for n, h in zip(grids, heads, strict=True))
    tensors = sum(3 * 4 * n * h * 32 for n, h in zip(grids, heads, strict=True))
    whole = sum(4 * n * n * h for n, h in zip(grids, heads, strict=True))
    assert whole > 2 << 30
    assert sum(w.numel() * 4 for m in maps[:1] for w in m.stream(1).__next__()[1]) == 4 * grids[0] * heads[0]
    assert peaks["rows"] < peaks["plain"] + 16 * chosen + (64 << 20)
    assert peaks["lazy"] < peaks["plain"] + tensors + (64 << 20)
    with pytest.raises(ValueError, match=r"more than limit=2048.0 MiB: choose rows="), torch.no_grad(), capture(model):
        model(image)
    with pytest.raises(ValueError, match=r"'stages.0.blocks.0.mixer.op' take 3072.0 MiB.*choose rows="):
        maps[0].weights  # noqa: B018  # the property raises


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_model_is_captured_as_it_was_written(compiled_first):
    torch._dynamo.reset()
    mixer = create_mixer("window", dim=16, heads=2).eval()
    x = torch.randn(1, 8, 8, 16)
    compiled = torch.compile(mixer, backend="eager")
    with torch.no_grad():
        if compiled_first:
            compiled(x)
        with capture(mixer) as expected:
            y = mixer(x)
        with capture(mixer) as outer, capture(mixer) as maps:
            torch.testing.assert_close(compiled(x), y)
        assert len(outer) == len(maps) == len(expected) == 1
        torch.testing.assert_close(maps[0].weights, expected[0].weights)
        ran = torch._dynamo.utils.counters["frames"]["ok"]
        torch._dynamo.reset()
        compiled(x)  # compiles again once nobody looks
        assert torch._dynamo.utils.counters["frames"]["ok"] > ran


def test_what_was_not_captured_is_told() -> None:
    model = create_mixer("window", dim=16, heads=2, window_size=4)
    with capture(model, rows=[(0.5,)]) as maps:  # a coordinate for the two axes
        model(torch.randn(1, 8, 8, 16))
    with pytest.raises(IndexError, match=r"no attention was captured: .* `rows` fit no grid of it"):
        maps[0]
    with capture(model, rows=[0]) as maps:
        model(torch.randn(1, 8, 8, 16))
    assert maps[-1] is maps[0]
    with pytest.raises(IndexError, match="no attention 1 was captured; there are 1"):
        maps[1]
    with pytest.raises(TypeError, match=r"found must be one attention of a capture, such as maps\[0\]; got Maps"):
        regard.lens.image_map(maps)
