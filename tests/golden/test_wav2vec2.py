"""The model against Hugging Face's wav2vec 2.0, number for number: same weights, mask, distractors and Gumbel noise.

Where gp2vec differs on purpose, the algebra stands here: logits of the quantiser are divided by the square root of the
frame's width (so its weights are larger by that), and the loss is a mean over the M hidden frames instead of a sum."""

# ruff: noqa: NPY002  Hugging Face draws from NumPy's global generator, so these tests do too
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'gp2vec[dev]'")
from transformers.models.wav2vec2 import modeling_wav2vec2 as hf

from gp2vec.models.encoder import ConvLayer, EncoderConfig
from gp2vec.models.gp2vec import GP2Vec, GP2VecConfig, normalise, sample_negatives, span_mask, spread_spans
from gp2vec.models.quantizer import QuantizerConfig, hard_perplexity
from gp2vec.models.transformer import ContextConfig
from gp2vec.train.pretraining import anneal

# width, layers, heads, convolutions, kernel and groups of the positions, groups and words of the codebooks, their width
SHAPES = {
    "fine": (48, 2, 4, ((32, 11, 2), (32, 5, 2), (32, 5, 1)), (16, 4), (2, 16, 32)),
    "light": (64, 3, 8, ((24, 7, 3), (40, 3, 2)), (9, 8), (4, 6, 24)),
}
BATCH, SAMPLES, NEGATIVES, SPAN, TEMPERATURE = 3, 900, 20, 10, 1.3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def reference(shape, components, stable):
    "A randomly initialised `Wav2Vec2ForPreTraining` that takes waveforms of `components` components."
    width, layers, heads, convs, (kernel, groups), (codebooks, words, dim) = SHAPES[shape]
    channels, kernels, strides = zip(*convs, strict=True)
    config = transformers.Wav2Vec2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=2 * width,
        conv_dim=channels, conv_kernel=kernels, conv_stride=strides, conv_bias=True, feat_extract_norm="layer",
        num_conv_pos_embeddings=kernel, num_conv_pos_embedding_groups=groups, do_stable_layer_norm=stable,
        num_codevector_groups=codebooks, num_codevectors_per_group=words, codevector_dim=dim, proj_codevector_dim=dim,
        num_negatives=NEGATIVES, contrastive_logits_temperature=0.1, diversity_loss_weight=0.1,
        hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
        feat_quantizer_dropout=0.0, layerdrop=0.0,
    )  # fmt: skip
    model = hf.Wav2Vec2ForPreTraining(config)
    extractor = model.wav2vec2.feature_extractor
    first = extractor.conv_layers[0].conv
    extractor.conv_layers[0].conv = torch.nn.Conv1d(components, *convs[0])
    torch.nn.init.kaiming_normal_(extractor.conv_layers[0].conv.weight)
    assert first.in_channels == 1

    def forward(x):  # it would insert the one channel itself
        for layer in extractor.conv_layers:
            x = layer(x)
        return x

    extractor.forward = forward
    # Equal code vectors are recognised by comparing what this projection makes of them, bit for bit. A matrix product
    # may round equal rows differently, and then a true frame stands among its own distractors; a sum does not.
    project = model.project_q
    project.forward = lambda x: (x[..., None, :] * project.weight).sum(-1) + project.bias
    for parameter in model.parameters():  # biases and norms off their neutral start
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def ours(shape, components, stable, **changes):
    width, layers, heads, convs, (kernel, groups), (codebooks, words, dim) = SHAPES[shape]
    config = GP2VecConfig(
        embed_dim=width,
        num_negatives=NEGATIVES,
        feature_encoder=EncoderConfig(components, tuple(ConvLayer(*conv) for conv in convs)),
        quantizer=QuantizerConfig("gumbel", codebooks, words, dim),
        context_encoder=ContextConfig(layers, heads, 2, stable, kernel, groups, dropout=0.0),
        **{"feature_penalty": 0.0, "feature_grad_mult": 1.0} | changes,
    )
    return GP2Vec(config)


def weights(values, theirs):
    """gp2vec's parameters from wav2vec 2.0's; `values(name)` is a weight or a gradient of theirs.

    The same map takes gradients over, because it only renames and joins; the caller takes care of the one factor."""
    config = theirs.config
    found = {}

    def take(name, other):
        for kind in ("weight", "bias"):
            found[f"{name}.{kind}"] = values(f"{other}.{kind}")

    for i in range(len(config.conv_dim)):
        take(f"feature_encoder.convs.{i}", f"wav2vec2.feature_extractor.conv_layers.{i}.conv")
        take(f"feature_encoder.norms.{i}", f"wav2vec2.feature_extractor.conv_layers.{i}.layer_norm")
    take("feature_norm", "wav2vec2.feature_projection.layer_norm")
    take("feature_projection", "wav2vec2.feature_projection.projection")
    found["mask_embedding"] = values("wav2vec2.masked_spec_embed")
    position, conv = "context_encoder.position.conv", "wav2vec2.encoder.pos_conv_embed.conv"
    found[f"{position}.bias"] = values(f"{conv}.bias")
    for part in ("original0", "original1"):  # magnitude and direction of the weight normalisation, over the same axis
        found[f"{position}.parametrizations.weight.{part}"] = values(f"{conv}.parametrizations.weight.{part}")
    take("context_encoder.norm", "wav2vec2.encoder.layer_norm")
    for i in range(config.num_hidden_layers):
        layer, other = f"context_encoder.layers.{i}", f"wav2vec2.encoder.layers.{i}"
        for kind in ("weight", "bias"):
            parts = [values(f"{other}.attention.{name}_proj.{kind}") for name in "qkv"]
            found[f"{layer}.attention.qkv.{kind}"] = torch.cat(parts)
        take(f"{layer}.attention.out", f"{other}.attention.out_proj")
        take(f"{layer}.feed_forward.0", f"{other}.feed_forward.intermediate_dense")
        take(f"{layer}.feed_forward.3", f"{other}.feed_forward.output_dense")
        take(f"{layer}.norm1", f"{other}.layer_norm")
        take(f"{layer}.norm2", f"{other}.final_layer_norm")
    take("quantizer.logits", "quantizer.weight_proj")
    groups, words = config.num_codevector_groups, config.num_codevectors_per_group
    found["quantizer.codevectors"] = values("quantizer.codevectors").view(groups, words, -1)
    take("answer_head", "project_hid")
    take("target_head", "project_q")
    return found


def load(model, theirs):
    "Give `model` the weights of `theirs`; what theirs lacks (stations, missing components) says nothing."
    state = weights(theirs.state_dict().__getitem__, theirs)
    for kind in ("weight", "bias"):
        state[f"quantizer.logits.{kind}"] = state[f"quantizer.logits.{kind}"] * theirs.config.conv_dim[-1] ** 0.5
    used = {name for name in theirs.state_dict()}
    asked = set()
    weights(lambda name: asked.add(name) or theirs.state_dict()[name], theirs)
    assert asked == used, f"weights of wav2vec 2.0 that nothing here takes: {used - asked}"
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("station_encoder.", "feature_encoder.missing")) for name in missing), missing
    for parameter in model.station_encoder.parameters():
        parameter.data.zero_()


def spans_of_numpy(shape, prob, length, min_spans):
    "Starts of spans as Hugging Face draws them from NumPy's global generator, (B, spans)."
    batch, frames = shape
    chance = np.random.rand(1).item()
    spans = min(max(int(prob * frames / length + chance), min_spans), frames // length)
    choose = [np.random.choice(np.arange(frames - length + 1), spans, replace=False) for _ in range(batch)]
    return torch.from_numpy(np.array(choose))


def negatives_of_numpy(counts, negatives):
    "Distractors as Hugging Face draws them from NumPy's global generator, among the other hidden frames of a row."
    width = int(counts.max())
    drawn = torch.zeros(len(counts), width, negatives, dtype=torch.long)
    for row, count in zip(drawn, counts.tolist(), strict=True):
        row[:count] = torch.from_numpy(np.random.randint(0, count - 1, size=(count, negatives)))
    return drawn


def flat_index(negatives, mask):
    "The same distractors as indices of frames of the whole batch, the way Hugging Face counts them, (B, T, K)."
    index = torch.zeros(*mask.shape, negatives.shape[-1], dtype=torch.long)
    for row, hidden in enumerate(mask):
        places, count = hidden.nonzero().ravel(), int(hidden.sum())
        others = negatives[row, :count] + (negatives[row, :count] >= torch.arange(count)[:, None])
        index[row, hidden] = places[others]
        index[row] += row * mask.shape[1]
    return index


def error(value, expected):
    "Largest difference relative to the largest expected magnitude."
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((value - expected).abs().max() / scale).item()


@pytest.fixture
def lifted(monkeypatch):
    "Hugging Face rounds to float32 in four places, whatever the model; for float64 these lines are lifted."
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def compare(shape, components, stable, seed, dtype, training, monkeypatch):
    torch.manual_seed(seed)
    np.random.seed(seed)
    theirs, model = reference(shape, components, stable).to(dtype), ours(shape, components, stable).to(dtype)
    load(model, theirs)
    theirs.train(training), model.train(training)
    waveforms = torch.randn(BATCH, components, SAMPLES, dtype=dtype)
    frames = model.frame_count(SAMPLES)
    mask = torch.from_numpy(hf._compute_mask_indices((BATCH, frames), 0.65, SPAN, min_masks=2))
    negatives = negatives_of_numpy(mask.sum(1), NEGATIVES)
    hidden = int(mask.sum())
    noise = -torch.empty(BATCH, frames, *model.quantizer.codevectors.shape[:2], dtype=dtype).exponential_().log()

    def gumbel_softmax(logits, tau, hard):
        soft = ((logits + noise.view_as(logits)) / tau).softmax(-1)
        best = torch.zeros_like(logits).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return best - soft.detach() + soft

    monkeypatch.setattr(F, "gumbel_softmax", gumbel_softmax)
    last = []
    theirs.wav2vec2.encoder.register_forward_hook(lambda module, given, made: last.append(made.last_hidden_state))
    theirs.quantizer.temperature = model.quantizer.temperature = TEMPERATURE
    x = normalise(waveforms)[0]
    expected = theirs(x, mask_time_indices=mask.clone(), sampled_negative_indices=flat_index(negatives, mask),
                      output_hidden_states=True)  # fmt: skip
    (expected.loss / hidden).backward()  # a mean over the hidden frames instead of a sum

    states, targets = [], []
    model.context_encoder.register_forward_hook(lambda module, given, made: states.extend(made))
    model.quantizer.register_forward_hook(lambda module, given, made: targets.append(made))
    step = model(waveforms, mask=mask, negatives=negatives, noise=noise[mask])
    step.loss.backward()

    # Their first state is taken after positions are added, ours before, and their last before the final norm.
    assert len(states) == len(expected.hidden_states)
    errors = {f"layer {i}": error(states[i], expected.hidden_states[i]) for i in range(1, len(states) - 1)}
    errors["last layer"] = error(states[-1], last[0])
    quantised = model.target_head(targets[0].vectors)
    errors["quantised"] = error(quantised, expected.projected_quantized_states[mask])
    errors["answers"] = error(model.answer_head(states[-1]), expected.projected_states)
    errors["contrastive"] = error(step.answer.loss, expected.contrastive_loss / hidden)
    errors["diversity"] = error(step.diversity, expected.diversity_loss / hidden)
    errors["loss"] = error(step.loss, expected.loss / hidden)
    size = model.config.quantizer.codebook_size
    groups = model.config.quantizer.num_codebooks
    soft = (1 - step.diversity) * groups * size
    errors["perplexity"] = error(soft, expected.codevector_perplexity)
    if not training:  # in evaluation theirs is that of the codes really chosen
        assert hard_perplexity(step.codes, size).sum().item() == pytest.approx(soft.item(), rel=1e-6)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    silent = {name for name, gradient in gradients.items() if gradient is None}
    assert silent == (set() if training else {"quantizer.weight_proj.weight", "quantizer.weight_proj.bias"}), silent
    for name in silent:
        gradients[name] = torch.zeros_like(theirs.get_parameter(name))
    mapped = weights(gradients.__getitem__, theirs)
    scale = max(gradient.abs().max() for gradient in mapped.values())
    for name, gradient in mapped.items():
        found = model.get_parameter(name).grad
        found = torch.zeros_like(gradient) if found is None else found
        if name.startswith("quantizer.logits"):  # weights larger by the root, so gradients are smaller by it
            found = found * theirs.config.conv_dim[-1] ** 0.5
        # A bias of the keys moves all scores alike: its gradient is zero but for rounding, so scale by the model's.
        smallest = torch.finfo(dtype).eps * scale
        largest = gradient.abs().max().clamp_min(smallest)
        errors[f"gradient of {name}"] = ((found - gradient).abs().max() / largest).item()
    return errors


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("stable", [True, False], ids=["stable", "post-norm"])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_hugging_face_in_float64(shape, components, stable, seed, training, monkeypatch, lifted):
    errors = compare(shape, components, stable, seed, torch.float64, training, monkeypatch)
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE[torch.float64], f"{worst}: relative error {errors[worst]:.1e}"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("stable", [True, False], ids=["stable", "post-norm"])
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_hugging_face_in_float32(shape, components, stable, seed, training, monkeypatch):
    errors = compare(shape, components, stable, seed, torch.float32, training, monkeypatch)
    worst = max(errors, key=errors.get)
    assert errors[worst] < TOLERANCE[torch.float32], f"{worst}: relative error {errors[worst]:.1e}"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("frames, length, min_spans", [(373, 10, 2), (149, 10, 2), (40, 15, 2), (742, 30, 0)])
def test_masks_and_distractors_are_those_of_hugging_face_under_one_numpy_seed(frames, length, min_spans, seed):
    np.random.seed(seed)
    mask = hf._compute_mask_indices((4, frames), 0.65, length, min_masks=min_spans)
    negatives = hf._sample_negative_indices((4, frames), 7, mask)
    np.random.seed(seed)
    found = spread_spans(spans_of_numpy((4, frames), 0.65, length, min_spans), frames, length)
    assert np.array_equal(found, mask)
    drawn = flat_index(negatives_of_numpy(found.sum(1), 7), found)
    assert np.array_equal(drawn[found], negatives[mask])


def chi_square(counts, expected):
    "Probability of a deviation from the expected counts at least as large, by Pearson's test."
    return stats.chisquare(counts, np.broadcast_to(expected * np.sum(counts), counts.shape)).pvalue


def test_the_vectorised_mask_has_the_distribution_of_hugging_face():
    frames, length, rows = 60, 6, 4000
    np.random.seed(0)
    theirs = np.concatenate(
        [hf._compute_mask_indices((8, frames), 0.65, length, min_masks=2) for _ in range(rows // 8)]
    )
    generator = torch.Generator().manual_seed(0)
    found = torch.cat([span_mask(8, frames, 0.65, length, generator) for _ in range(rows // 8)]).numpy()
    # How many frames are hidden in a row, and how often each frame is: two samples of one distribution.
    bins = np.arange(length, frames)
    table = np.array([np.bincount(m.sum(1), minlength=frames)[bins] for m in (theirs, found)])
    table = table[:, table.sum(0) >= 20]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    # Rows hide many frames at once, so frames of one row are compared by one draw each.
    at = np.random.default_rng(0).integers(frames, size=rows)
    hits = [np.bincount(at[m[np.arange(rows), at]], minlength=frames) for m in (theirs, found)]
    assert stats.chi2_contingency(np.array(hits)).pvalue > 1e-3
    # The number of spans is rounded up with the right probability: 0.65 * 60 / 6 = 6.5.
    spans = [len(span_starts(prob=0.65, frames=frames, length=length, seed=seed)) for seed in range(2000)]
    assert set(spans) == {6, 7} and stats.binomtest(spans.count(7), 2000, 0.5).pvalue > 1e-3


def span_starts(prob, frames, length, seed):
    "Starts that `span_mask` draws for one row, seen through spans of one frame."
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gp2vec.models.gp2vec.spread_spans", lambda starts, *rest: drawn.append(starts))
        span_mask(1, frames, prob, length, torch.Generator().manual_seed(seed))
    assert len(set(drawn[0][0].tolist())) == drawn[0].shape[1] and drawn[0].max() <= frames - length
    return drawn[0][0].tolist()


def test_starts_of_spans_are_uniform():
    starts = np.concatenate([span_starts(0.65, 60, 6, seed) for seed in range(3000)])
    assert chi_square(np.bincount(starts, minlength=55), 1 / 55) > 1e-3


@pytest.mark.parametrize("count", [2, 5, 182, 371])
def test_distractors_are_uniform_and_independent(count):
    drawn = sample_negatives(torch.tensor([count, 400]), 4000, torch.Generator().manual_seed(0))[0, :count].numpy()
    for frame in (0, count // 2, count - 1):
        assert chi_square(np.bincount(drawn[frame], minlength=count - 1), 1 / (count - 1)) > 1e-3 if count > 2 else True
    # Over all frames together a million draws: what a truncation to 16 bits would show.
    assert chi_square(np.bincount(drawn.ravel(), minlength=count - 1), 1 / (count - 1)) > 1e-3 if count > 2 else True
    assert drawn.min() == 0 and drawn.max() == count - 2
    if count == 5:  # neighbours in the sequence of draws have nothing to do with each other
        pairs = np.bincount((4 * drawn[:, ::2] + drawn[:, 1::2]).ravel(), minlength=16)
        assert chi_square(pairs, 1 / 16) > 1e-3


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradient_scaling_and_penalty_as_in_fairseq(training):
    "What Hugging Face lacks: the encoder's gradient times 0.1, and 10 times the mean square *before* the layer norm."
    torch.manual_seed(0)
    plain, scaled = ours("fine", 3, True), ours("fine", 3, True, feature_grad_mult=0.1)
    penalised = ours("fine", 3, True, feature_grad_mult=0.1, feature_penalty=10.0)
    waveforms, mask = torch.randn(BATCH, 3, SAMPLES, dtype=torch.float64), None
    for model in (plain, scaled, penalised):
        model.load_state_dict(plain.state_dict())
        model.double().train(training)
        mask = span_mask(BATCH, model.frame_count(SAMPLES), 0.65, SPAN, torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        model(waveforms, mask=mask).loss.backward()
    inside = {n for n, _ in plain.named_parameters() if n.startswith("feature_encoder.") and "missing" not in n}
    fresh = ours("fine", 3, True).double().train(training)
    fresh.load_state_dict(plain.state_dict())
    (0.1 * 10 * fresh.feature_encoder(normalise(waveforms)[0]).square().mean()).backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is None:
            continue
        expected = parameter.grad * (0.1 if name in inside else 1)
        assert torch.allclose(scaled.get_parameter(name).grad, expected, rtol=1e-10, atol=1e-14), name
        extra = fresh.get_parameter(name).grad if name in inside else 0
        assert torch.allclose(penalised.get_parameter(name).grad, expected + extra, rtol=1e-9, atol=1e-12), name


def test_temperature_falls_along_half_a_cosine_over_the_run():
    total = 1000
    for step in (0, 1, 250, 500, 999, 5000):
        expected = 0.5 + 1.5 * (1 + np.cos(np.pi * min(step / (total - 1), 1))) / 2
        assert anneal(step, total, 2.0, 0.5) == pytest.approx(expected, rel=1e-12)
    assert anneal(0, total, 2.0, 0.5) == 2 and anneal(total - 1, total, 2.0, 0.5) == 0.5
