"""The peer of the model's benchmarks: Hugging Face's wav2vec 2.0 with our shapes, three components, and our weights.

seisLM's pretraining model is this one with other settings (their outputs differ by 0.0), so it stands for both."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2 import modeling_wav2vec2 as hf

from gp2vec.models.encoder import ConvLayer, EncoderConfig
from gp2vec.models.gp2vec import GP2Vec, GP2VecConfig
from gp2vec.models.quantizer import QuantizerConfig
from gp2vec.models.transformer import ContextConfig

_peers = ((512, 10, 5), (512, 3, 2), (512, 2, 2))  # T = 149 of 3000 samples
_light = ((256, 11, 2), (256, 7, 2), (256, 5, 2))
_fine = ((512, 11, 2), (512, 5, 2), (512, 5, 1))  # T = 742
# width, layers, heads, feed-forward, convolutions, kernel of the positions
SHAPES = {
    "seislm": (240, 6, 12, 3072, ((256, 3, 2), (256, 3, 2)), 128),
    "small": (256, 6, 4, 1024, _light, 32),
    "small149": (256, 6, 4, 1024, tuple((256, *c[1:]) for c in _peers), 32),
    "base149": (768, 12, 12, 3072, _peers, 128),
    "base": (768, 12, 12, 3072, _fine, 128),
}


def ours(shape: str, negatives: int = 100) -> GP2Vec:
    "GP2Vec of a shape, without dropout, penalty and gradient scaling, which the peer lacks."
    width, layers, heads, wide, convs, kernel = SHAPES[shape]
    torch.manual_seed(0)
    return GP2Vec(
        GP2VecConfig(
            embed_dim=width,
            num_negatives=negatives,
            feature_penalty=0.0,
            feature_grad_mult=1.0,
            feature_encoder=EncoderConfig(3, tuple(ConvLayer(*conv) for conv in convs)),
            quantizer=QuantizerConfig("gumbel", 2, 320, 256),
            context_encoder=ContextConfig(layers, heads, wide / width, True, kernel, 16, dropout=0.0),
        )
    )


def peer(shape: str, negatives: int = 100) -> torch.nn.Module:
    "`Wav2Vec2ForPreTraining` of a shape; it takes three components."
    width, layers, heads, wide, convs, kernel = SHAPES[shape]
    channels, kernels, strides = zip(*convs, strict=True)
    torch.manual_seed(0)
    model = hf.Wav2Vec2ForPreTraining(
        Wav2Vec2Config(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=wide,
            conv_dim=channels, conv_kernel=kernels, conv_stride=strides, conv_bias=True, feat_extract_norm="layer",
            num_conv_pos_embeddings=kernel, num_conv_pos_embedding_groups=16, do_stable_layer_norm=True,
            num_codevector_groups=2, num_codevectors_per_group=320, codevector_dim=256, proj_codevector_dim=256,
            num_negatives=negatives, contrastive_logits_temperature=0.1, diversity_loss_weight=0.1,
            hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0,
            feat_quantizer_dropout=0.0, layerdrop=0.0,
        )
    )  # fmt: skip
    extractor = model.wav2vec2.feature_extractor
    extractor.conv_layers[0].conv = torch.nn.Conv1d(3, *convs[0])

    def forward(x):
        for layer in extractor.conv_layers:
            x = layer(x)
        return x

    extractor.forward = forward
    return model


def same_weights(model: GP2Vec, theirs: torch.nn.Module) -> None:
    "Give ours the weights of the peer, with the mapping that the golden tests prove."
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "golden"))
    from test_wav2vec2 import load

    load(model, theirs)
