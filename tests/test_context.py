"""From padded waveforms to context: what holds across encoder and context network, in every setting."""

import itertools

import pytest
import torch

from gp2vec.models.encoder import (
    ConvLayer,
    EncoderConfig,
    FeatureEncoder,
    conv_layers_for,
    frame_count,
    frame_geometry,
    frame_mask,
)
from gp2vec.models.transformer import (
    ContextConfig,
    ContextEncoder,
    SelfAttention,
    attend,
    attention_kernel,
    attention_weights,
    rotate,
    rotation,
)

LAYERS = (ConvLayer(32, 11, 2), ConvLayer(32, 7, 2), ConvLayer(32, 5, 2))
SETTINGS = list(
    itertools.product(("conv", "rotary"), (True, False), ("layer", "group"), ("add", "film", "cross_attention"))
)


def network(positions, norm_first, norm, fusion, **settings):
    torch.manual_seed(0)
    encoder = FeatureEncoder(EncoderConfig(conv_layers=LAYERS, norm=norm))
    config = ContextConfig(
        num_layers=2, num_heads=4, conv_pos=16, norm_first=norm_first, positions=positions, **settings
    )
    context = ContextEncoder(32, config, fusion)
    for module in (encoder, context):
        for parameter in module.parameters():  # so that nothing is zero that training would move
            parameter.data += 0.05 * torch.randn_like(parameter)
    condition = torch.randn(3, 5, 32) if fusion == "cross_attention" else torch.randn(3, 32)
    return encoder.eval(), context.eval(), condition


@pytest.mark.parametrize(("positions", "norm_first", "norm", "fusion"), SETTINGS)
def test_padding_order_and_company_change_nothing(positions, norm_first, norm, fusion):
    "Each window alone gives what it gives beside longer ones, whatever fills it up, in any order."
    encoder, context, condition = network(positions, norm_first, norm, fusion)
    lengths = torch.tensor([1000, 611, 300])
    waveforms = torch.randn(3, 3, 1000)
    waveforms[torch.arange(1000).expand(3, 3, -1) >= lengths[:, None, None]] = torch.nan
    components = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    real = frame_mask(LAYERS, lengths, 1000)
    with torch.no_grad():
        together = context(encoder(waveforms, components, lengths), None, real, condition)
        for i, length in enumerate(lengths.tolist()):
            one = slice(i, i + 1)
            alone = context(encoder(waveforms[one, :, :length], components[one]), condition=condition[one])
            frames = frame_count(LAYERS, length)
            for a, b in zip(together, alone, strict=True):
                assert torch.allclose(a[i, :frames], b[0], atol=1e-5)
        order = torch.tensor([2, 0, 1])
        shuffled = encoder(waveforms[order], components[order], lengths[order])
        shuffled = context(shuffled, None, real[order], condition[order])[-1]
        for i, row in enumerate(order):
            assert torch.allclose(shuffled[i][real[row]], together[-1][row][real[row]], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [37, 1025])
def test_both_ways_to_attend_agree(dtype, frames):
    "And their gradients do, masked or not, to the precision of the type; lengths on both sides of the choice."
    truth, tolerance = {}, 1e-5 if dtype == torch.float32 else 3e-2
    for masked in (False, True):
        mask = (torch.arange(frames) < frames - 5)[None, None, None] if masked else None
        torch.manual_seed(0)
        leaf = torch.randn(3, 2, 2, frames, 8, dtype=torch.float64)
        for kind in (torch.float64, dtype):
            q, k, v = (x.to(kind).requires_grad_() for x in leaf)
            mixed = attend(q, k, v, mask) if kind == dtype else attention_weights(q, k, mask) @ v
            mixed.sin().sum().backward()
            got = [x.double() for x in (mixed, q.grad, k.grad, v.grad)]
            truth = truth if kind == dtype else dict(enumerate(got))
        for i, x in enumerate(got):
            assert (x - truth[i]).norm() < tolerance * truth[i].norm()


def test_the_choice_of_kernel_is_one_place(monkeypatch):
    "Whatever it answers is what runs."
    from gp2vec.models import transformer

    q = k = v = torch.randn(1, 1, 5, 4)
    for kernel in ("sdpa", "product"):
        calls = []
        monkeypatch.setattr(transformer, "attention_kernel", lambda *a, kernel=kernel: kernel)
        weights = transformer.attention_weights
        monkeypatch.setattr(
            transformer, "attention_weights", lambda *a, weights=weights, calls=calls: calls.append(1) or weights(*a)
        )
        assert torch.allclose(attend(q, k, v), weights(q, k) @ v, atol=1e-6)
        assert bool(calls) == (kernel == "product")
        monkeypatch.undo()
    assert attention_kernel("cpu", torch.float32, (2, 4, 100, 100), True) == "sdpa"


def test_rotary_attention_knows_distances_only():
    torch.manual_seed(0)
    attention = SelfAttention(32, 2).eval()
    x = torch.randn(1, 12, 32)
    early, late = rotation(12, 16), rotation(500, 16)[:, 488:]
    with torch.no_grad():
        assert torch.allclose(attention(x, None, early), attention(x, None, late), atol=1e-4)
        assert not torch.allclose(attention(x, None, early), attention(x.flip(1), None, early).flip(1), atol=1e-3)
    x = torch.randn(1, 1, 300, 16, dtype=torch.float64)
    assert torch.allclose(rotate(x, rotation(300, 16)).norm(dim=-1), x.norm(dim=-1)), "turned, not stretched"


@pytest.mark.parametrize("fusion", ["add", "film", "cross_attention"])
@pytest.mark.parametrize("positions", ["conv", "rotary"])
def test_checkpointing_gives_the_same_gradients(positions, fusion):
    grads = []
    for checkpointing in (False, True):
        settings = {"checkpointing": checkpointing, "dropout": 0.2, "layer_drop": 0.4}
        encoder, context, condition = network(positions, True, "layer", fusion, **settings)
        condition.requires_grad_()
        torch.manual_seed(3)
        real = frame_mask(LAYERS, torch.tensor([600, 400, 500]), 600)
        frames = encoder(torch.randn(3, 3, 600))
        context.train()(frames, None, real, condition)[-1][real].square().mean().backward()
        found = {name: p.grad for m in (encoder, context) for name, p in m.named_parameters()}
        grads.append({**found, "condition": condition.grad})
    assert grads[0].keys() == grads[1].keys() and any(g is not None for g in grads[0].values())
    for name, gradient in grads[0].items():
        assert (gradient is None and grads[1][name] is None) or torch.equal(gradient, grads[1][name]), name


def test_checkpointing_computes_layers_twice():
    "Otherwise the same gradients prove nothing."
    for checkpointing, times in ((False, 1), (True, 2)):
        _, context, _ = network("conv", True, "layer", "add", checkpointing=checkpointing, dropout=0.0)
        calls = []
        context.layers[0].attention.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        context.train()(torch.randn(1, 20, 32))[-1].sum().backward()
        assert len(calls) == times


@pytest.mark.parametrize("fusion", ["film", "cross_attention"])
def test_fusion_begins_as_the_identity_and_learns(fusion):
    torch.manual_seed(0)
    context = ContextEncoder(32, ContextConfig(num_layers=2, num_heads=4, conv_pos=16, dropout=0.0), fusion).eval()
    frames, condition = torch.randn(3, 20, 32), torch.randn(3, 5, 32)
    condition = condition if fusion == "cross_attention" else condition[:, 0]
    bare, told = context(frames)[-1], context(frames, condition=condition)[-1]
    assert torch.equal(bare, told)
    optimiser = torch.optim.SGD(context.parameters(), 0.1)
    told.square().mean().backward()
    optimiser.step()
    assert not torch.equal(context(frames)[-1], context(frames, condition=condition)[-1])


def test_addition_is_at_the_entrance_on_every_frame():
    _, context, condition = network("rotary", True, "layer", "add")
    frames = torch.randn(3, 20, 32)
    with torch.no_grad():
        told, by_hand = context(frames, condition=condition), context(frames + condition[:, None])
    assert all(torch.equal(a, b) for a, b in zip(told, by_hand, strict=True))


def test_layer_drop_skips_and_dropping_all_is_a_bare_path():
    _, context, _ = network("rotary", True, "layer", "add", layer_drop=1.0, dropout=0.0)
    frames = torch.randn(2, 20, 32)
    states = context.train()(frames)
    assert torch.equal(states[1], frames) and torch.allclose(states[-1], context.norm(frames))
    assert not torch.equal(context.eval()(frames)[1], frames), "never in evaluation"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_without_a_real_frame_stay_finite(dtype):
    "By either way to attend, and so do all gradients."
    _, context, condition = network("conv", True, "layer", "add")
    real = torch.zeros(3, 20, dtype=torch.bool)
    real[0] = True
    frames = torch.full((3, 20, 32), torch.nan).masked_fill(real[..., None], 1.0)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        states = context(frames, None, real, condition)
    assert all(state.isfinite().all() for state in states)
    states[-1].float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in context.parameters() if p.grad is not None)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_geometry_is_what_a_perturbation_measures(norm):
    "Random encoders at random rates; the group norm listens to the whole window by its two statistics."
    rng = torch.Generator().manual_seed(0)
    for rate in (20.0, 62.5, 100.0, 200.0):
        kernels = (0.02 + 0.2 * torch.rand(3, generator=rng)).tolist()
        spacings = (0.1 * torch.rand(3, generator=rng)).cumsum(0).tolist()
        layers = conv_layers_for(rate, 4, kernels, spacings)
        stride, field = frame_geometry(layers)
        samples = field + 20 * stride + 3
        at = int(torch.randint(0, samples, (), generator=rng))
        encoder = FeatureEncoder(EncoderConfig(in_channels=1, conv_layers=layers, norm=norm)).double().eval()
        waveform = torch.randn(1, 1, samples, dtype=torch.float64, generator=rng)
        touched = waveform.clone()
        touched[..., at] = torch.nan
        reached = encoder(touched).isnan().any(-1)[0]
        assert len(reached) == frame_count(layers, samples)
        expected = torch.tensor([t * stride <= at < t * stride + field for t in range(len(reached))])
        assert torch.equal(reached, expected if norm == "layer" else expected | expected.any())


def test_no_float32_is_lost_under_autocast():
    "Norms and softmax sum in float32: bfloat16 sums over a thousand frames would be wrong by more than this."
    _, context, _ = network("rotary", True, "layer", "add")
    frames = torch.randn(1, 1000, 32)
    with torch.no_grad():
        truth = context(frames)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            low = context(frames)
    assert all(state.dtype == torch.float32 for state in low)
    assert (low[-1] - truth).norm() < 0.02 * truth.norm()
    q, k = torch.randn(2, 1, 1, 1000, 32)
    assert (attention_weights(q.bfloat16(), k.bfloat16()).double().sum(-1) - 1).abs().max() < 0.01
