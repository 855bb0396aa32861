"""Hosts: every attention of a real model of another library is shown before it is computed, and can be changed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peers import timm as load_timm
from torch import Tensor, nn

from regard.hosts import HostCall, attach
from regard.hosts.replacing import change_of

transformers = pytest.importorskip("transformers", reason="its models are hosts")

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = VIT | {"vocab_size": 30, "max_position_embeddings": 16}


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 30, shape, generator=torch.Generator().manual_seed(0))


def image(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def padded(left: bool) -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, slice(0, 3) if left else slice(4, None)] = 0
    return {"input_ids": tokens(2, 7), "attention_mask": mask}


def vit(kind: str):
    config = transformers.ViTConfig(**VIT, image_size=32, patch_size=8, attn_implementation=kind)
    return transformers.ViTModel(config), {"pixel_values": image()}


def clip(kind: str):
    config = transformers.CLIPVisionConfig(**VIT, image_size=32, patch_size=8, attn_implementation=kind)
    return transformers.CLIPVisionModel(config), {"pixel_values": image()}


def bert(kind: str):
    return transformers.BertModel(transformers.BertConfig(**TEXT, attn_implementation=kind)), padded(left=False)


def gpt2(kind: str):
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=4, n_positions=16, attn_implementation=kind)
    return transformers.GPT2Model(config), padded(left=True)


def llama(kind: str):
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation=kind)
    return transformers.LlamaModel(config), padded(left=True)


def t5(kind: str):
    config = transformers.T5Config(
        vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, attn_implementation=kind
    )
    return transformers.T5EncoderModel(config), padded(left=False)


def swin(kind: str):
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=4, attn_implementation=kind
    )
    return transformers.SwinModel(config), {"pixel_values": image()}


TRANSFORMERS = [vit, clip, bert, gpt2, llama, t5, swin]


def made(build: Callable, kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = build(kind)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    return model.eval(), inputs


def first(output) -> Tensor:
    return output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", getattr(output, "sample", output))


def computed(call: HostCall) -> Tensor:
    """The definition, ``(batch, heads, queries, value_dim)``; what sees nothing is left out by whoever compares."""
    weights = call.weights
    if weights is None:
        k = call.k.repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
        scores = torch.einsum("bhqd,bhkd->bhqk", call.q, k) * call.scale
        weights = torch.softmax(scores if call.bias is None else scores + call.bias, -1)
    v = call.v.repeat_interleave(weights.shape[1] // call.v.shape[1], 1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


def check_untouched(model: nn.Module, own: dict[str, dict]) -> None:
    """Every module has the attributes that it had, and nothing waits to be put back."""
    for name, module in model.named_modules():
        assert module.__dict__.keys() == own[name].keys(), name
        assert all(module.__dict__[key] is value for key, value in own[name].items() if key != "_buffers"), name
        assert change_of(module, "forward") is change_of(module, "config") is None


def check_listener(model: nn.Module, run: Callable[[], Tensor], attentions: int) -> None:
    """What is shown is what is multiplied; the model's output keeps its bits."""
    own = {name: dict(module.__dict__) for name, module in model.named_modules()}
    plain = run()
    seen: list[tuple[HostCall, Tensor]] = []

    def listen(call: HostCall) -> HostCall:
        return call.then(lambda output, to_tokens: seen.append((call, to_tokens(output))))

    with attach(model, listen):
        assert torch.equal(run(), plain)  # bitwise: the host computes it
    check_untouched(model, own)
    assert torch.equal(run(), plain)  # bitwise: the same operators
    assert len(seen) == attentions
    for call, output in seen:
        assert dict(model.named_modules())[call.path] is call.module
        if call.host != "torch":  # there the output is that of the module
            expected = computed(call).transpose(1, 2)
            torch.testing.assert_close(output.reshape(expected.shape).nan_to_num(), expected.nan_to_num(), rtol=1e-4, atol=1e-5)


def check_editor(model: nn.Module, run: Callable[[], Tensor]) -> None:
    """The same by another way gives the same; a head that gives nothing changes the output; nothing of it stays."""
    own = {name: dict(module.__dict__) for name, module in model.named_modules()}
    plain = run()
    with attach(model, lambda call: replace(call, v=call.v.clone())):
        torch.testing.assert_close(run(), plain, rtol=1e-4, atol=1e-5)
    first_handle = attach(model, lambda call: None)
    with attach(model, lambda call: replace(call, output=torch.zeros_like(computed(call)))):
        first_handle.remove()
        first_handle.remove()
        assert not torch.allclose(run(), plain)
    with pytest.raises(KeyError), attach(model, lambda call: {}["what"]):
        run()
    check_untouched(model, own)
    assert torch.equal(run(), plain)  # bitwise: the same operators


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("build", TRANSFORMERS)
def test_transformers_show_what_they_multiply_and_take_what_is_changed(build, kind: str) -> None:
    model, inputs = made(build, kind)
    run = torch.no_grad()(lambda: first(model(**inputs)))
    check_listener(model, run, 2)
    check_editor(model, run)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_causal_attention_without_a_mask_is_shown_with_its_bias(build) -> None:
    model, inputs = made(build, "sdpa")
    check_listener(model, torch.no_grad()(lambda: first(model(inputs["input_ids"]))), 2)


def test_a_silent_head_of_transformers_is_one_whose_values_are_zero() -> None:
    model, inputs = made(vit, "sdpa")
    expected = transformers.ViTModel(model.config).eval()
    expected.load_state_dict(model.state_dict())
    for name, parameter in expected.named_parameters():
        if "value" in name or "v_proj" in name:
            parameter.data[4:8] = 0.0  # head 1 of 4 channels

    def silence(call: HostCall) -> HostCall:
        return replace(call, v=call.v * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None, None])

    with torch.no_grad(), attach(model, silence):
        torch.testing.assert_close(first(model(**inputs)), first(expected(**inputs)))


def test_a_bias_against_a_key_is_a_padding_mask() -> None:
    model, inputs = made(bert, "sdpa")
    whole = {"input_ids": inputs["input_ids"]}

    def hide(call: HostCall) -> HostCall:
        bias = torch.zeros(2, 1, 1, 7)
        bias[1, ..., 4:] = -math.inf
        return replace(call, bias=bias)

    with torch.no_grad():
        expected = first(model(**inputs))
        with attach(model, hide):
            torch.testing.assert_close(first(model(**whole)), expected)


def test_generation_with_a_cache_is_shown_step_by_step() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    sizes = []
    with attach(model, lambda call: sizes.append((call.path, call.queries, call.keys))):
        shown = model.generate(tokens(1, 5), max_new_tokens=3, do_sample=False)
    torch.testing.assert_close(shown, model.generate(tokens(1, 5), max_new_tokens=3, do_sample=False))
    assert [size[1:] for size in sizes[::2]] == [(5, 5), (1, 6), (1, 7)]
    assert {path for path, *_ in sizes} == {"model.layers.0.self_attn", "model.layers.1.self_attn"}


def test_gradients_flow_through_what_was_changed() -> None:
    model, inputs = made(vit, "sdpa")
    gate = torch.ones(4, 1, 1, requires_grad=True)
    with attach(model, lambda call: replace(call, v=call.v * gate)):
        first(model(**inputs)).square().sum().backward()
    slope, step = gate.grad[2, 0, 0], 1e-2
    sides = []
    for sign in (1, -1):
        moved = torch.ones(4, 1, 1)
        moved[2] += sign * step
        with torch.no_grad(), attach(model, lambda call, moved=moved: replace(call, v=call.v * moved)):
            sides.append(first(model(**inputs)).square().sum())
    torch.testing.assert_close(slope, (sides[0] - sides[1]) / (2 * step), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_attention_with_all_its_options(batch_first: bool) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, add_bias_kv=True, add_zero_attn=True, kdim=6, vdim=5).eval()
    shapes = [(2, 3, 8), (2, 4, 6), (2, 4, 5)]
    tensors = [torch.randn(*(s if batch_first else (s[1], s[0], s[2]))) for s in shapes]
    padding = torch.tensor([[False] * 4, [False, False, True, True]])

    def run(need_weights: bool = True):
        return module(*tensors, key_padding_mask=padding, need_weights=need_weights)

    with torch.no_grad():
        plain, weights = run()
        with attach(module, lambda call: replace(call, q=call.q.clone())):
            edited, found = run()
            assert run(need_weights=False)[1] is None
    torch.testing.assert_close(edited, plain)
    torch.testing.assert_close(found, weights)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_encoder_layers_are_shown_once_fused_or_not(norm_first: bool, grad: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 8)

    def run() -> Tensor:
        with torch.set_grad_enabled(grad):
            return model(x)

    check_listener(model, run, 2)
    check_editor(model, run)
    with torch.no_grad(), attach(model, lambda call: replace(call, v=torch.zeros_like(call.v))):
        silent = run()
    with torch.no_grad():
        for each in model.layers:
            each.self_attn.in_proj_weight[16:] = 0.0
            each.self_attn.in_proj_bias[16:] = 0.0
    torch.testing.assert_close(silent.detach(), run().detach())


@pytest.mark.peer
@pytest.mark.parametrize("fused", [True, False])
def test_timm_shows_what_it_multiplies_and_takes_what_is_changed(fused: bool) -> None:
    timm = load_timm()
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=3).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    run = torch.no_grad()(lambda: model(image()))
    check_listener(model, run, 2)
    check_editor(model, run)
    kept = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    with attach(model, lambda call: replace(call, v=call.v * kept)):
        silent = run()
    for block in model.blocks:
        block.attn.qkv.weight.data[56:64] = 0.0  # the values of head 1, of 8 channels
        block.attn.qkv.bias.data[56:64] = 0.0
    torch.testing.assert_close(silent, run())
    with attach(model, lambda call: replace(call, scale=2.0)):
        if fused:
            assert run().isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"'blocks\.0\.attn' computes its weights itself: .*, not scale"):
                run()


def unet(D):
    blocks = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    return (
        D.UNet2DConditionModel(
            **blocks, cross_attention_dim=12, attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        {"sample": torch.randn(2, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(2, 5, 12)},
        8,
    )  # fmt: skip


def flux(D):
    model = D.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return (
        model,
        {
            "hidden_states": torch.randn(1, 16, 16), "encoder_hidden_states": torch.randn(1, 5, 12),
            "pooled_projections": torch.randn(1, 10), "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
        },
        2,
    )  # fmt: skip


def sd3(D):
    model = D.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    return (
        model,
        {
            "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 12),
            "pooled_projections": torch.randn(1, 10), "timestep": torch.tensor([3]),
        },
        2,
    )  # fmt: skip


def wan(D):
    model = D.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=10, freq_dim=16, ffn_dim=16, num_layers=1
    )
    return (
        model,
        {
            "hidden_states": torch.randn(1, 16, 2, 4, 4), "timestep": torch.tensor([3]),
            "encoder_hidden_states": torch.randn(1, 5, 10),
        },
        2,
    )  # fmt: skip


@pytest.mark.parametrize("build", [unet, flux, sd3, wan])
def test_diffusers_show_what_they_multiply_and_take_what_is_changed(build) -> None:
    diffusers = pytest.importorskip("diffusers", reason="its models are hosts")
    torch.manual_seed(0)
    model, inputs, attentions = build(diffusers)
    model.eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.2)
    run = torch.no_grad()(lambda: first(model(**inputs, return_dict=False)))
    check_listener(model, run, attentions)
    check_editor(model, run)


def test_the_processor_of_diffusers_that_slices_is_seen_too() -> None:
    diffusers = pytest.importorskip("diffusers", reason="its models are hosts")
    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(0)
    model, inputs, attentions = unet(diffusers)
    model.eval().set_attn_processor(AttnProcessor())
    run = torch.no_grad()(lambda: first(model(**inputs, return_dict=False)))
    check_listener(model, run, attentions)
    check_editor(model, run)


def test_another_thread_is_not_shown() -> None:
    model, inputs = made(vit, "sdpa")
    seen: list[str] = []
    with torch.no_grad(), attach(model, lambda call: seen.append(call.path)):
        worker = threading.Thread(target=torch.no_grad()(lambda: model(**inputs)))
        worker.start()
        worker.join()
        assert seen == []
        model(**inputs)
    assert len(seen) == 2


def test_each_is_asked_in_turn_and_sees_what_was_changed_before() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    seen = []
    with (
        torch.no_grad(),
        attach(module, lambda call: replace(call, v=2 * call.v)),
        attach(module, lambda call: seen.append(call.v)),
    ):
        module(x, x, x)
    v = F.linear(x, module.in_proj_weight[16:], module.in_proj_bias[16:]).unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(seen[0], 2 * v)


class Silent(nn.Module):
    """What has the attributes of timm's attention, and attends otherwise."""

    num_heads, attn_drop = 2, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def test_what_cannot_be_reached_or_seen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no attention that can be reached: neither torch\.nn\.Multihead"):
        attach(nn.Linear(2, 2), lambda call: None)
    model = Silent()
    with attach(model, lambda call: None), pytest.raises(ValueError, match=r"attended in a way that cannot be seen"):
        model(torch.randn(1, 3, 4))
    with attach(model, lambda call: None, strict=False):
        model(torch.randn(1, 3, 4))
    with pytest.raises(TypeError, match=r"model must be a module; got str 'vit'"):
        attach("vit", lambda call: None)
    with pytest.raises(TypeError, match=r"at_attention must be a function of a HostCall; got int 3"):
        attach(model, 3)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda call: 3, r"at_attention must return None or a HostCall; got int 3"),
        (lambda call: replace(call, v=call.v[..., :2]), r"v of an answer for '' must be \(2, -1, -1, 4\)"),
        (
            lambda call: replace(call, q=call.q[..., :1, :]),
            r"q of an answer for '' must be \(2, 2, 3, -1\) .*; got a float32 tensor",
        ),
        (lambda call: replace(call, output=torch.zeros(1)), r"output of an answer for '' must be \(2, 2, 3, 4\)"),
        (lambda call: replace(call, bias=torch.zeros(5, 5)), r"bias of an answer for '' must broadcast to \(2, 2, 3, 3\)"),
        (lambda call: replace(call, k=None), r"k of an answer must be a tensor; got None"),
        (lambda call: replace(call, scale=math.nan), r"scale of an answer for '' must be"),
        (lambda call: replace(call, scale="1"), r"scale of an answer for '' must be"),
        (lambda call: replace(call, v=call.v.double()), r"v of an answer for '' must be .*float32.*; got a float64 tensor"),
        (lambda call: replace(call, bias=torch.zeros(3, 3, dtype=torch.long)), r"bias of an answer for '' must be"),
        (
            lambda call: replace(call, k=call.k[..., :2]),
            r"q and k of an answer for '' need one head_dim, .*; got q \(2, 2, 3, 4\)",
        ),
        (lambda call: replace(call, k=call.k[:, :1]), r"need one head_dim, k and v heads that divide those of q"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(answer, told: str) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with attach(module, answer), pytest.raises((TypeError, ValueError), match=told):
        module(x, x, x)


def test_sinks_and_bounded_logits_are_refused_as_no_bias_says_them() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=4, attn_implementation="eager")
    model = transformers.Gemma2Model(config).eval()
    with attach(model, lambda call: None), pytest.raises(ValueError, match=r"bounds its logits \(softcap\)"):
        model(tokens(1, 5))


def test_what_hides_keys_by_itself_is_refused() -> None:
    model, inputs = made(bert, "sdpa")
    transformers.AttentionInterface.register("another", lambda *_, **__: None)
    model.set_attn_implementation("another")
    with attach(model, lambda call: None), pytest.raises(ValueError, match=r"attends by 'another', whose masks are its own"):
        model(**inputs)


def test_a_causal_hint_without_a_mask_is_refused_as_by_torch() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(1, 3, 8)
    with attach(module, lambda call: replace(call, v=2 * call.v)), pytest.raises(RuntimeError, match="attn_mask"):
        module(x, x, x, is_causal=True)


def test_fewer_keys_need_another_bias() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, mask = torch.randn(2, 4, 8), torch.zeros(4, 4, dtype=torch.bool).fill_diagonal_(True)

    def first_half(call: HostCall) -> HostCall:
        return replace(call, k=call.k[:, :, :2], v=call.v[:, :, :2])

    with attach(module, first_half):
        found = module(x, x, x, need_weights=False)[0]
        with pytest.raises(ValueError, match=r"bias of an answer for '' must broadcast to \(2, 2, 4, 2\)"):
            module(x, x, x, attn_mask=mask)
    torch.testing.assert_close(found, module(x, x[:, :2], x[:, :2], need_weights=False)[0])
