"""What must hold of the model whatever its settings: lengths, padding, gain, missing components, geometry, types,
degenerate input, processes, exporters."""

import math
import os
import warnings

import numpy as np
import obspy
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st

from gp2vec.models.conditioning import ConditioningConfig
from gp2vec.models.encoder import ConvLayer, EncoderConfig, frame_count, frame_geometry
from gp2vec.models.gp2vec import Encode, GP2Vec, GP2VecConfig, TasksConfig, sample_negatives, span_mask
from gp2vec.models.quantizer import EMAQuantizer, QuantizerConfig
from gp2vec.models.transformer import ContextConfig

LIGHT = tuple(ConvLayer(32, kernel, 2) for kernel in (11, 7, 5))
CODES = {
    "gumbel": ("contrastive", QuantizerConfig("gumbel", 2, 16, 32)),
    "ema": ("contrastive", QuantizerConfig("ema", 2, 16, 32)),
    "ema names": ("masked_prediction", QuantizerConfig("ema", 2, 16, 32)),
    "random_projection": ("masked_prediction", QuantizerConfig("random_projection", 1, 64, 16)),
    "random_projection vectors": ("contrastive", QuantizerConfig("random_projection", 1, 64, 16)),
}


def settings_of(codes="gumbel", **changes):
    objective, quantizer = CODES[codes]
    chosen = {
        "embed_dim": 48,
        "objective": objective,
        "feature_encoder": EncoderConfig(conv_layers=LIGHT),
        "quantizer": quantizer,
        "context_encoder": ContextConfig(2, 4, conv_pos=16, conv_pos_groups=4, dropout=0.0),
        "num_negatives": 20,
    }
    return GP2VecConfig(**chosen | changes)


def build(codes="gumbel", seed=0, **changes):
    torch.manual_seed(seed)
    model = GP2Vec(settings_of(codes, **changes))
    for parameter in model.parameters():  # what starts at zero would hide mistakes
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


VARIANTS = {
    "layer norm": {},
    "group norm": {"feature_encoder": EncoderConfig(conv_layers=LIGHT, norm="group")},
    "rotary, post-norm": {"context_encoder": ContextConfig(2, 4, norm_first=False, positions="rotary", dropout=0.0)},
    "film": {"conditioning": ConditioningConfig(fusion="film")},
    "cross-attention": {"conditioning": ConditioningConfig(fusion="cross_attention")},
    "spectrogram": {"spectrogram": 0.32},
}
UNPLACED = ConditioningConfig(fields=("elevation", "log_scale"))  # that a side task may ask for the rest
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def earthquake(batch=1):
    "The event that ObsPy ships, and turned around, and shifted: (batch, 3, 3000)."
    stream = obspy.read().detrend("demean").filter("highpass", freq=1.0)
    x = torch.from_numpy(np.stack([trace.data for trace in stream])).float()[None]
    return torch.cat([x, x.flip(-1), x.roll(700, -1), 0.1 * x.roll(1500, -1)])[:batch]


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, atol=tolerance * float(b.abs().max()), rtol=0)


@each_variant
def test_any_length_of_two_frames_or_more_works_and_shorter_says_so(variant):
    model = build(**VARIANTS[variant])
    stride, field = frame_geometry(LIGHT)
    with torch.no_grad():
        for samples in (field + stride, field + stride + 1, 100, 999, 3001):
            assert model.encode(torch.randn(1, 3, samples)).shape == (1, model.frame_count(samples), 48)
        assert model.frame_count(field + stride) == 2
        for samples in (field + stride - 1, 5, 0):
            with pytest.raises(ValueError, match=f"needs {field + stride} samples or more, two frames"):
                model.encode(torch.randn(1, 3, samples))


@each_variant
def test_neither_company_nor_order_nor_padding_matters(variant):
    model, x = build(**VARIANTS[variant]), earthquake(4)
    place = {"latitude": torch.tensor([34.0, 47.0, torch.nan, -20.0]), "longitude": torch.full((4,), 11.0)}
    with torch.no_grad():
        together = model.encode(x, place)
        order = torch.tensor([2, 0, 3, 1])
        assert close(model.encode(x[order], {k: v[order] for k, v in place.items()}), together[order])
        for i in range(4):
            assert close(model.encode(x[i : i + 1], {k: v[i : i + 1] for k, v in place.items()}), together[i : i + 1])
        lengths = torch.tensor([3000, 2000, 777, 1500])
        padded = torch.full((4, 3, 3600), torch.nan)
        for row, length in zip(range(4), lengths.tolist(), strict=True):
            padded[row, :, :length] = x[row, :, :length]
        long = model.encode(padded, place, lengths=lengths)
        for i, length in enumerate(lengths.tolist()):
            alone = model.encode(x[i : i + 1, :, :length], {k: v[i : i + 1] for k, v in place.items()})
            assert close(long[i : i + 1, : alone.shape[1]], alone), f"padding is heard in window {i}"


@each_variant
def test_gain_does_not_matter_without_log_scale_and_may_matter_with_it(variant):
    model, x = build(**VARIANTS[variant]), earthquake(2)
    with torch.no_grad():
        for gain in (1e-9, 3.7, 1e6):
            assert close(model.encode(gain * x), model.encode(x))
        assert close(model.encode(x.double() + 1e3 * x.std()), model.encode(x)), "nor does an offset"
        scales = (torch.full((2,), s) for s in (-3.0, 3.0))
        small, large = (model.encode(x, log_scale=scale) for scale in scales)
        assert not close(small, large, 1e-3)


@each_variant
def test_a_missing_component_is_no_information_and_not_a_quiet_trace(variant):
    model, x = build(**VARIANTS[variant]), earthquake(2)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    with torch.no_grad():
        told = model.encode(x, component_mask=mask)
        for filling in (0.0, 1e12, torch.nan, torch.inf):
            assert torch.equal(model.encode(torch.where(mask[..., None], x, filling), component_mask=mask), told)
    silent, encoder = x * mask[..., None], model.feature_encoder
    with torch.no_grad():  # at the same scale, which differs where silence counts as a component
        assert not close(encoder(silent), encoder(silent, mask), 1e-2), "silence is another thing"


def test_what_is_missing_reaches_neither_gradient_nor_targets():
    model = build("random_projection").train()
    x, mask = earthquake(2).requires_grad_(), torch.tensor([[True, True, False]] * 2)
    model(x, component_mask=mask).loss.backward()
    assert not x.grad[:, 2].any() and x.grad[:, :2].any()


@settings(max_examples=25, deadline=None)
@given(
    kernels=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    strides=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    extra=st.integers(0, 50),
)
def test_geometry_is_what_a_perturbation_measures(kernels, strides, extra):
    layers = tuple(ConvLayer(4, k, s) for k, s in zip(kernels, strides, strict=False))
    stride, field = frame_geometry(layers)
    samples = field + 3 * stride + extra
    config = settings_of(
        mask_span=3.0,  # s; a frame is up to 2.56 s long
        feature_encoder=EncoderConfig(conv_layers=layers),
        quantizer=QuantizerConfig("gumbel", 2, 8, 8),
    )
    encoder = GP2Vec(config).double().feature_encoder
    x = torch.randn(1, 3, samples, dtype=torch.float64).requires_grad_()
    frames = encoder(x)
    assert frames.shape[1] == frame_count(layers, samples)
    for t in (0, frames.shape[1] - 1):
        (gradient,) = torch.autograd.grad(frames[0, t] @ torch.randn(4, dtype=torch.float64), x, retain_graph=True)
        seen = gradient[0].abs().sum(0).nonzero().ravel()
        assert t * stride <= seen.min() and seen.max() < t * stride + field, "nothing outside the receptive field"
        if all(k >= s for k, s in zip(kernels, strides, strict=False)):  # else samples between kernels are skipped
            assert (seen.min(), seen.max()) == (t * stride, t * stride + field - 1), "and all of it"


def test_rate_and_receptive_field_follow_from_the_layers():
    model = build()
    assert model.frame_rate == 12.5 and model.receptive_field == 0.39 and model.frame_count(3000) == 371


@pytest.mark.parametrize("codes", CODES)
def test_the_same_seed_gives_the_same_step(codes):
    losses, weights = [], []
    for _ in range(2):
        model = build(codes).train()
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            loss = model(earthquake(3)).loss
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        weights.append([value.clone() for value in model.state_dict().values()])
    assert losses[0] == losses[1] and all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("codes", CODES)
def test_float32_islands_under_autocast(codes, monkeypatch):
    "Quantiser, cosines, cross-entropies and penalties stay in float32 while the rest runs in bfloat16."
    model, x = build(codes, tasks=TasksConfig(region=0.1), conditioning=UNPLACED).train(), earthquake(3)
    seen = {}
    cross_entropy = torch.nn.functional.cross_entropy

    def spy(logits, *rest, **more):
        seen.setdefault("logits", []).append(logits.dtype)
        return cross_entropy(logits, *rest, **more)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    normalize = torch.nn.functional.normalize
    monkeypatch.setattr(
        torch.nn.functional,
        "normalize",
        lambda v, **more: seen.setdefault("cosines", []).append(v.dtype) or normalize(v, **more),
    )
    model.quantizer.register_forward_hook(lambda module, given, made: seen.setdefault("quantised", []).append(made))
    model.context_encoder.register_forward_hook(lambda m, given, made: seen.setdefault("context", []).append(made[-1]))
    with torch.autocast("cpu", torch.bfloat16):
        step = model(x, {"latitude": torch.zeros(3), "longitude": torch.zeros(3)})
    assert set(seen["logits"]) == {torch.float32} and set(seen.get("cosines", [torch.float32])) == {torch.float32}
    quantised = seen["quantised"][0]
    assert quantised.diversity.dtype == quantised.commitment.dtype == step.loss.dtype == torch.float32
    assert quantised.vectors is None or quantised.vectors.dtype == torch.float32
    assert step.penalty.dtype == torch.float32
    assert seen["context"][0].dtype == torch.bfloat16, "else nothing was tested"
    step.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_similarities_do_not_round_under_autocast():
    from gp2vec.models.gp2vec import contrastive

    torch.manual_seed(0)
    answers, targets, counts = torch.randn(60, 32), torch.randn(60, 32), torch.tensor([30, 30])
    given = (answers, targets, torch.arange(60)[:, None], counts, sample_negatives(counts, 20))
    with torch.autocast("cpu", torch.bfloat16):
        inside = contrastive(*given)[0]
    assert torch.equal(inside, contrastive(*given)[0])


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_nothing_becomes_nan(codes, training):
    x = earthquake(3)
    x[1] = 0  # a dead trace
    for name in ("empty", "one frame", "one row empty"):
        model = build(codes).train(training)
        mask = torch.zeros(3, model.frame_count(3000), dtype=torch.bool)
        if name == "one frame":
            mask[:, 7] = True
        if name == "one row empty":
            mask[:2, 20:60] = True
        step = model(x, log_scale=torch.tensor([1.0, -math.inf, 2.0]), mask=mask)
        answer = step.answer
        for value in (step.loss, answer.accuracy, answer.chance, answer.perplexity, step.diversity):
            assert value.isfinite().all(), name
        if model.config.objective == "contrastive" and name != "one row empty":
            assert answer.accuracy == 0, "without distractors nothing can be told"
        step.loss.backward()
        broken = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert not broken, f"{name}: {broken}"
        assert all(value.isfinite().all() for value in model.state_dict().values()), name
        with torch.no_grad():
            assert model.encode(x, component_mask=torch.zeros(3, 3, dtype=torch.bool)).isfinite().all()


def test_collapse_is_seen_although_the_loss_looks_perfect():
    model, x = build(), earthquake(3)
    with torch.no_grad():
        model.quantizer.logits.weight.zero_()
        model.quantizer.logits.bias.view(2, -1)[:, 3] = 1e4
    step = model(x)
    assert step.answer.loss == 0, "there is nothing to tell"
    assert step.answer.accuracy == 0 and (step.answer.perplexity == 1).all() and step.diversity == 1 - 1 / 16
    dead = build()(torch.zeros(3, 3, 3000))
    assert dead.answer.loss == 0 and dead.answer.accuracy == 0 and (dead.answer.perplexity == 1).all()


@pytest.mark.parametrize("codes", CODES)
@each_variant
def test_metadata_reaches_neither_quantiser_nor_targets(codes, variant):
    "By gradient: what the station encoder makes moves the answer, and nothing that is to be answered."
    model = build(codes, **VARIANTS[variant]).train()
    model.requires_grad_(True)
    place = {"latitude": torch.tensor([34.0, 47.0, -20.0]), "longitude": torch.tensor([-118.0, 11.0, 30.0])}
    made = []
    model.quantizer.register_forward_hook(lambda module, given, target: made.append((given, target)))
    mask = span_mask(3, 371, 0.65, 15, torch.Generator().manual_seed(0))
    step = model(earthquake(3), place, log_scale=torch.ones(3), mask=mask)
    (features, waveforms, *_), target = made[0]
    station = [p for p in model.station_encoder.parameters() if p.requires_grad]
    for name, value in {"features": features, "vectors": target.vectors, "diversity": target.diversity}.items():
        if value is None or not value.requires_grad:
            continue
        found = torch.autograd.grad(value.float().square().sum(), station, allow_unused=True, retain_graph=True)
        assert all(g is None for g in found), f"metadata reaches the {name}"
    heard = torch.autograd.grad(step.answer.loss, station, allow_unused=True)
    assert any(g is not None and g.any() for g in heard), "but the context hears of it"
    model.eval()
    with torch.no_grad():
        codes = [model(earthquake(3), known, mask=mask).codes for known in (place, None)]
    assert torch.equal(*codes)


def _ranks(rank, frames, mask, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    quantizer = _trained(frames[:, 2 * rank : 2 * rank + 2], mask[:, 2 * rank : 2 * rank + 2])
    torch.save(quantizer.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _trained(frames, mask):
    torch.manual_seed(0)
    quantizer = EMAQuantizer(8, 2, 12, decay=0.8, revive_below=0.3)
    for step in range(len(frames)):
        quantizer(frames[step], None, mask[step])
    return quantizer


def test_two_processes_average_and_revive_like_one(tmp_path):
    import socket

    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(12, 4, 30, 8, generator=generator)
    frames[6:] += 3  # the frames move away, so codewords die
    mask = torch.rand(12, 4, 30, generator=generator) < torch.tensor([0.9, 0.2, 0.5, 0.1])[:, None]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_ranks, (frames, mask, port, str(tmp_path)), nprocs=2)
    one = _trained(frames, mask).state_dict()
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in one.items():
            assert torch.allclose(two[name], value, atol=1e-5), f"{name} of process {rank}"
    assert one["steps"] == 12


@pytest.mark.parametrize("codes", CODES)
def test_quantisers_tell_usage_perplexity_and_entropy(codes):
    model, made = build(codes).train(), []
    model.quantizer.register_forward_hook(lambda module, given, target: made.append(target))
    model(earthquake(3))
    target, groups = made[0], model.config.quantizer.num_codebooks
    for value in (target.usage, target.perplexity, target.entropy):
        assert value.shape == (groups,)
    assert (target.usage > 0).all() and (target.usage <= 1).all()
    assert torch.allclose(target.entropy.exp(), target.perplexity) and (target.perplexity > 1).all()
    assert (target.perplexity <= target.usage * target.codebook_size + 1e-3).all()


def test_side_tasks_are_absent_until_asked_for():
    plain = build()
    assert not [name for name in plain.state_dict() if name.startswith(("tasks", "spectrogram"))]
    model = build(tasks=TasksConfig(region=0.5, adversarial_band=0.2), conditioning=UNPLACED).train()
    known = {"latitude": torch.zeros(3), "longitude": torch.zeros(3), "band": ["HH", "BN", None]}
    torch.manual_seed(0)
    step = model(earthquake(3), known)
    assert set(step.tasks) == {"region", "adversarial_band"} and all(loss > 0 for loss in step.tasks.values())
    config = model.config
    rest = step.answer.loss + config.diversity_weight * step.diversity + config.feature_penalty * step.penalty
    assert torch.allclose(step.loss, rest + 0.5 * step.tasks["region"] + 0.2 * step.tasks["adversarial_band"])
    nobody = model(earthquake(3), None)
    assert all(loss == 0 for loss in nobody.tasks.values()) and nobody.loss.isfinite()


WRONG = [
    ({"embed_dim": 0}, "embed_dim is 1 or more, not 0"),
    ({"embed_dim": "wide"}, "embed_dim is 1 or more, not 'wide'"),
    ({"sampling_rate": 0.0}, "sampling_rate is above 0"),
    ({"mask_prob": 5.0}, "mask_prob is a share"),
    ({"mask_prob": math.nan}, "mask_prob is above 0"),
    ({"mask_span": 0.01}, r"mask_span is a frame or more, 0.08 s at 100 Hz, not 0.01 s"),
    ({"num_negatives": 0}, "num_negatives is 1 or more"),
    ({"contrastive_temperature": 0.0}, "contrastive_temperature is above 0"),
    ({"feature_penalty": math.nan}, "feature_penalty is 0 or more, not nan"),
    ({"feature_grad_mult": -1.0}, "feature_grad_mult is 0 or more"),
    ({"spectrogram": 0.01}, "spectrogram is 2 samples or more"),
    ({"quantizer": "gumbel"}, "quantizer is a QuantizerConfig, not 'gumbel'"),
    ({"tasks": {"region": 0.1}, "conditioning": UNPLACED}, "tasks is a TasksConfig"),
    ({"tasks": TasksConfig(adversarial_region=0.1)}, "adversarial_region asks for what conditioning.fields tells"),
]
PARTS = [
    (QuantizerConfig, {"num_codebooks": 0}, "num_codebooks is 1 or more"),
    (QuantizerConfig, {"codebook_size": 1}, "codebook_size is 2 or more"),
    (QuantizerConfig, {"spectral_window": -1.0}, "spectral_window is above 0"),
    (ContextConfig, {"ffn_ratio": 0}, "ffn_ratio is above 0"),
    (ConditioningConfig, {"hidden_dim": 0}, "hidden_dim is 1 or more"),
    (TasksConfig, {"region": math.nan}, "region is 0 or more"),
    (EncoderConfig, {"conv_layers": ((32, 5),)}, "channels, kernel_size and stride"),
]


@pytest.mark.parametrize("kind, wrong, said", [(settings_of, *case) for case in WRONG] + PARTS)
def test_settings_that_mean_nothing_are_refused_with_one_sentence(kind, wrong, said):
    with pytest.raises(ValueError, match=said):
        kind(**wrong)


def test_a_preset_sees_as_many_seconds_at_any_rate():
    usual = GP2VecConfig.preset("tiny")
    for rate in (40.0, 250.0):
        model = GP2Vec(GP2VecConfig.preset("tiny", sampling_rate=rate))
        assert model.frame_rate == pytest.approx(12.5, rel=0.25)
        assert model.receptive_field == pytest.approx(GP2Vec(usual).receptive_field, rel=0.25)
        assert model.encode(torch.randn(1, 3, int(30 * rate))).shape[2] == 192


GIVEN = {  # arguments of encode -> what is said
    "an array": (lambda x: {"waveforms": x.numpy()}, "waveforms are a tensor"),
    "no batch": (lambda x: {"waveforms": x[0]}, r"not \(3, 3000\)"),
    "a mask of numbers": (lambda x: {"component_mask": torch.ones(2, 3)}, "component_mask is a tensor of bool"),
    "a mask too small": (lambda x: {"component_mask": torch.ones(3, dtype=torch.bool)}, r"and \(2, 3\)"),
    "too long": (lambda x: {"lengths": torch.tensor([1000, 4000])}, "lengths are from 0 to the 3000"),
    "a length for all": (lambda x: {"lengths": torch.tensor(1000)}, r"\(2,\), one per window"),
    "fractions": (lambda x: {"lengths": torch.tensor([1000.0, 3000.0])}, "lengths is a tensor of int64"),
    "one word": (lambda x: {"metadata": {"network": "CI", "elevation": torch.zeros(2)}}, "words are a list"),
    "a word too many": (lambda x: {"metadata": {"network": ["CI"] * 3}}, "one per window, 2, not 3"),
    "text": (lambda x: {"metadata": {"elevation": ["a", "b"]}}, "is one number per window"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_input_that_cannot_be_is_refused_with_one_sentence(name):
    model, x = build(conditioning=ConditioningConfig(networks=("C", "I", "CI"))), earthquake(2)
    make, said = GIVEN[name]
    with pytest.raises(ValueError, match=said):
        model.encode(**{"waveforms": x} | make(x))


def test_whole_numbers_and_unknown_numbers_are_fine():
    model, x = build(), earthquake(2)
    with torch.no_grad():
        assert torch.equal(model.encode((1e4 * x).round().int()), model.encode((1e4 * x).round()))
        half = model.encode(x, {"elevation": [None, 1.0]})
        assert torch.equal(half, model.encode(x, {"elevation": torch.tensor([torch.nan, 1.0])}))
        assert not close(half[:1], model.encode(x, {"elevation": [2.0, 1.0]})[:1])


@pytest.mark.parametrize("codes", CODES)
def test_a_whole_step_in_bfloat16_weights(codes):
    step = build(codes).bfloat16()(earthquake(2).bfloat16())
    assert step.loss.isfinite()


def test_a_folder_without_weights_or_settings_is_named(tmp_path):
    model = build()
    for name in ("model.safetensors", "config.json"):
        model.save_pretrained(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
            GP2Vec.from_pretrained(tmp_path)


def test_loading_never_unpickles(tmp_path, monkeypatch):
    model = build("ema", tasks=TasksConfig(region=0.5), conditioning=UNPLACED, spectrogram=0.32)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".md"}
    for name in ("load", "_load", "_legacy_load"):
        if hasattr(torch.serialization, name):
            monkeypatch.setattr(torch.serialization, name, lambda *rest, **more: pytest.fail("unpickled"))
    monkeypatch.setattr("pickle.Unpickler", lambda *rest, **more: pytest.fail("unpickled"))
    again = GP2Vec.from_pretrained(tmp_path).eval()
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again.encode(earthquake(2)), model.encode(earthquake(2)))
    card = (tmp_path / "README.md").read_text()
    assert "library_name: gp2vec" in card and "license: mit" in card


def arguments(batch, samples):
    x = earthquake(4)[:batch, :, :samples].contiguous()
    mask = torch.ones(batch, 3, dtype=torch.bool)
    mask[0, 1] = False
    return x, mask, torch.linspace(-2, 3, batch)


def dynamic():
    "Batch and length may change."
    batch, samples = torch.export.Dim("batch", min=1, max=1024), torch.export.Dim("samples", min=64, max=1_000_000)
    return {0: batch, 2: samples}, {0: batch}, {0: batch}


# All of them take minutes.
export_variant = pytest.mark.parametrize(
    "variant",
    [name if name == "layer norm" else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)


@export_variant
def test_torch_export_with_dynamic_batch_and_length(variant):
    module = Encode(build(**VARIANTS[variant]))
    program = torch.export.export(module, arguments(2, 1200), dynamic_shapes=dynamic(), strict=False).module()
    with torch.no_grad():
        for shape in ((1, 3000), (4, 777), (2, 64)):
            assert close(program(*arguments(*shape)), module(*arguments(*shape)), 1e-4)


@export_variant
def test_onnx_with_dynamic_batch_and_length(variant, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'gp2vec[onnx]'")
    import onnxruntime

    module, path = Encode(build(**VARIANTS[variant])), tmp_path / "encode.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, arguments(2, 1200), path, dynamo=True, dynamic_shapes=dynamic(), verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    with torch.no_grad():
        for shape in ((1, 3000), (4, 777), (2, 64)):
            given = arguments(*shape)
            (found,) = session.run(None, {k: v.numpy() for k, v in zip(names, given, strict=True)})
            assert close(torch.from_numpy(found), module(*given), 1e-4)


@each_variant
def test_encode_compiles_into_one_graph(variant):
    "Breaks in the graph do not depend on the compiler behind it, so the quickest one will do."
    torch.compiler.reset()
    model = build(**VARIANTS[variant])
    compiled = torch.compile(model.encode, fullgraph=True, backend="eager")
    x, mask, scale = arguments(3, 1200)
    place = {"latitude": torch.tensor([34.0, torch.nan, 0.0]), "longitude": torch.zeros(3)}
    with torch.no_grad():
        assert close(compiled(x, place, mask, scale), model.encode(x, place, mask, scale))


@pytest.mark.slow
def test_compiled_encode_gives_the_same_numbers():
    torch.compiler.reset()
    model = build()
    compiled = torch.compile(model.encode, fullgraph=True)
    with torch.no_grad():
        assert close(compiled(earthquake(2)), model.encode(earthquake(2)), 1e-4)
