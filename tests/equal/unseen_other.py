"""Vision, audio, multimodal and diffusion families that the rules were not developed against.

The list was committed before any of them was run; docs/families.md tells what the first run gave.
Sizes are as in `zoo_other`: two ranks may split every hidden dim, no dim but the batch's is 12.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from meshwright import Job
from tests.equal.families import own_loss
from tests.equal.zoo_other import (
    BATCH,
    CLASSES,
    COUNT,
    DROPOUT,
    LAYER,
    Columns,
    Mixed,
    adamw,
    classifier,
    generator,
    maps,
)

__all__ = ["BATCH_NORMED", "UNSEEN"]

VOCABULARY = 24


def swinv2() -> Job:
    """Cosine attention in shifted windows, position biases made by a small network."""
    return classifier(
        "swinv2", 16, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=2, image_size=16,
        patch_size=2, mlp_ratio=2.0, drop_path_rate=0.2, **DROPOUT,
    )  # fmt: skip


def convnextv2() -> Job:
    """Depthwise convolutions and a norm of responses over space."""
    return classifier(
        "convnextv2", 16, num_stages=2, hidden_sizes=(8, 16), depths=(1, 1), patch_size=2,
        image_size=16, drop_path_rate=0.2,
    )  # fmt: skip


def levit() -> Job:
    """Attention behind convolutions, batch norm after every product, biases by lookup."""
    return classifier(
        "levit", 64, image_size=64, hidden_sizes=(16, 24, 32), num_attention_heads=(2, 2, 2),
        depths=(1, 1, 1), key_dim=(4, 4, 4),
    )  # fmt: skip


def poolformer() -> Job:
    """Pooling in place of attention."""
    return classifier(
        "poolformer", 16, num_encoder_blocks=2, depths=(1, 1), hidden_sizes=(8, 16),
        patch_sizes=(3, 3), strides=(2, 2), padding=(1, 1), drop_path_rate=0.1, mlp_ratio=2.0,
        layer_scale_init_value=0.5,
    )  # fmt: skip


def mobilevit() -> Job:
    """Attention over unfolded patches between inverted bottlenecks; batch norm."""
    return classifier(
        "mobilevit", 64, image_size=64, hidden_sizes=(8, 16, 20), num_attention_heads=2,
        neck_hidden_sizes=(4, 8, 8, 16, 16, 20, 24), expand_ratio=2.0,
        attention_probs_dropout_prob=0.1,
    )  # fmt: skip


def bit() -> Job:
    """Convolutions whose weights are standardised, group norm, activation before."""
    return classifier(
        "bit", 32, embedding_size=8, hidden_sizes=(16, 32), depths=(1, 1), num_groups=4,
        drop_path_rate=0.1,
    )  # fmt: skip


def focalnet() -> Job:
    """Focal modulation: one projection makes query, context and gates, of unequal widths."""
    return classifier(
        "focalnet", 16, embed_dim=8, hidden_sizes=(16, 16), depths=(1, 1), focal_levels=(2, 2),
        focal_windows=(3, 3), image_size=16, patch_size=2, mlp_ratio=2.0, drop_path_rate=0.1,
        hidden_dropout_prob=0.1,
    )  # fmt: skip


def hiera() -> Job:
    """Attention within units, queries pooled between stages."""
    return classifier(
        "hiera", 32, embed_dim=8, image_size=(32, 32), masked_unit_size=(2, 2), depths=(1, 1),
        num_heads=(2, 4), num_query_pool=1, masked_unit_attention=(True, False), mlp_ratio=2.0,
        drop_path_rate=0.1,
    )  # fmt: skip


def dpt() -> Job:
    """Maps of four depths resized and fused; a head with batch norm labels pixels."""
    from transformers import DPTConfig, DPTForSemanticSegmentation

    config = DPTConfig(
        **{**LAYER, "num_hidden_layers": 4}, **DROPOUT, intermediate_size=32, image_size=16,
        patch_size=4, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8, num_labels=CLASSES,
    )  # fmt: skip
    return Job(lambda: DPTForSemanticSegmentation(config), own_loss, adamw, lambda: maps(16), BATCH)


def detr() -> Job:
    """A set of boxes, matched with the true ones by the Hungarian method within the loss."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    config = DetrConfig(
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1), layer_type="basic",
            out_features=["stage2"],
        ),
        use_timm_backbone=False, use_pretrained_backbone=False, num_queries=6, d_model=16,
        encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=2, decoder_layers=1,
        decoder_ffn_dim=32, decoder_attention_heads=2, num_labels=CLASSES,
    )  # fmt: skip

    def boxed() -> Columns:
        g = generator(21)
        return Columns(
            pixel_values=torch.randn(COUNT, 3, 32, 32, generator=g),
            classes=torch.randint(0, CLASSES, (COUNT, 2), generator=g),
            boxes=torch.rand(COUNT, 2, 4, generator=g) * 0.4 + 0.1,
        )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        pairs = zip(batch["classes"], batch["boxes"], strict=True)
        labels = [{"class_labels": classes, "boxes": boxes} for classes, boxes in pairs]
        found: Tensor = model(batch["pixel_values"], labels=labels).loss
        return found

    return Job(lambda: DetrForObjectDetection(config), loss, adamw, boxed, BATCH)


def vit_mae() -> Job:
    """Patches hidden at random by sorting noise; a decoder paints them."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        **LAYER, **DROPOUT, intermediate_size=32, image_size=8, patch_size=2,
        decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=1,
        decoder_intermediate_size=32,
    )  # fmt: skip

    def images() -> Columns:
        return Columns(pixel_values=torch.randn(COUNT, 3, 8, 8, generator=generator(22)))

    return Job(lambda: ViTMAEForPreTraining(config), own_loss, adamw, images, BATCH)


def videomae() -> Job:
    """Tubes of frames by a convolution over three dims."""
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        **LAYER, **DROPOUT, intermediate_size=32, image_size=8, patch_size=4, num_frames=4,
        num_labels=CLASSES,
    )  # fmt: skip

    def videos() -> Columns:
        g = generator(23)
        frames = torch.randn(COUNT, 4, 3, 8, 8, generator=g)
        return Columns(pixel_values=frames, labels=torch.randint(0, CLASSES, (COUNT,), generator=g))

    return Job(lambda: VideoMAEForVideoClassification(config), own_loss, adamw, videos, BATCH)


def wavlm() -> Job:
    """Gated relative positions, a convolution with a normed weight, the CTC loss."""
    from transformers import WavLMConfig, WavLMForCTC

    config = WavLMConfig(
        **LAYER, intermediate_size=32, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(6, 3),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4, apply_spec_augment=False,
        layerdrop=0.0, vocab_size=VOCABULARY, num_buckets=8, max_bucket_distance=16,
        feat_proj_dropout=0.1,
    )  # fmt: skip

    def spoken() -> Columns:
        g = generator(24)
        said = torch.randint(1, VOCABULARY, (COUNT, 3), generator=g)
        return Columns(input_values=torch.randn(COUNT, 80, generator=g), labels=said)

    return Job(lambda: WavLMForCTC(config), own_loss, adamw, spoken, BATCH)


def speech_to_text() -> Job:
    """Gated linear units over convolutions, then an encoder and a decoder."""
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    config = Speech2TextConfig(
        vocab_size=VOCABULARY, encoder_layers=1, encoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_layers=1, decoder_ffn_dim=32, decoder_attention_heads=2, d_model=16,
        conv_channels=16, conv_kernel_sizes=(3, 3), input_feat_per_channel=6, use_cache=False,
        max_source_positions=32, max_target_positions=10,
    )  # fmt: skip
    return Job(
        lambda: Speech2TextForConditionalGeneration(config), own_loss, adamw,
        lambda: Mixed(16, 6, 7, VOCABULARY), BATCH,
    )  # fmt: skip


def ast() -> Job:
    """Overlapping patches of a spectrogram."""
    from transformers import ASTConfig, ASTForAudioClassification

    config = ASTConfig(
        **LAYER, **DROPOUT, intermediate_size=32, patch_size=4, frequency_stride=2, time_stride=2,
        max_length=16, num_mel_bins=8, num_labels=CLASSES,
    )  # fmt: skip

    def spectra() -> Columns:
        g = generator(25)
        seen = torch.randn(COUNT, 16, 8, generator=g)
        return Columns(input_values=seen, labels=torch.randint(0, CLASSES, (COUNT,), generator=g))

    return Job(lambda: ASTForAudioClassification(config), own_loss, adamw, spectra, BATCH)


_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _captioned(length: int = 6) -> Columns:
    g = generator(26)
    tokens = torch.randint(3, VOCABULARY - 1, (COUNT, length), generator=g)
    return Columns(input_ids=tokens, pixel_values=torch.randn(COUNT, 3, 8, 8, generator=g))


def siglip() -> Job:
    """Two towers, a sigmoid for every pair of the micro-batch, pooling by attention."""
    from transformers import SiglipConfig, SiglipModel

    tower = {**LAYER, "intermediate_size": 32, "attention_dropout": 0.1}
    config = SiglipConfig(
        text_config={**tower, **_TEXT, "max_position_embeddings": 6, "projection_size": 16},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
    )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch, return_loss=True).loss
        return found

    return Job(lambda: SiglipModel(config), loss, adamw, _captioned, BATCH)


def blip() -> Job:
    """Captions from an image by attention across; labels smoothed."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {**LAYER, **DROPOUT, **_TEXT, "intermediate_size": 32, "encoder_hidden_size": 16}
    text |= {"max_position_embeddings": 6, "sep_token_id": 2, "use_cache": False}
    vision = {**LAYER, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    config = BlipConfig(
        text_config=text, vision_config={**vision, "attention_dropout": 0.1}, projection_dim=8,
        label_smoothing=0.1,
    )  # fmt: skip

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch, labels=batch["input_ids"]).loss
        return found

    return Job(lambda: BlipForConditionalGeneration(config), loss, adamw, _captioned, BATCH)


def llava() -> Job:
    """Features of an image written over the places of its tokens, before a language model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Model

    image = VOCABULARY - 1
    text = LlamaConfig(
        **LAYER, **_TEXT, intermediate_size=32, max_position_embeddings=10, use_cache=False,
        attention_dropout=0.1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        **LAYER, intermediate_size=32, image_size=8, patch_size=4, attention_dropout=0.1
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=image, vision_feature_layer=-1,
        image_seq_length=4,
    )  # fmt: skip

    def seen() -> Columns:
        found = _captioned(10)
        found.columns["input_ids"][:, 1:5] = image
        return found

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        found: Tensor = model(**batch, labels=tokens.masked_fill(tokens == image, -100)).loss
        return found

    return Job(lambda: Model(config), loss, adamw, seen, BATCH)


def patchtst() -> Job:
    """Patches of several series, each scaled by its own history; batch norm."""
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=3, context_length=16, patch_length=4, patch_stride=4,
        prediction_length=4, num_hidden_layers=1, d_model=16, num_attention_heads=2, ffn_dim=32,
        attention_dropout=0.1, positional_dropout=0.1, path_dropout=0.1, ff_dropout=0.1,
        head_dropout=0.1,
    )  # fmt: skip

    def series() -> Columns:
        walk = torch.randn(COUNT, 20, 3, generator=generator(27)).cumsum(1)
        return Columns(past_values=walk[:, :16], future_values=walk[:, 16:])

    return Job(lambda: PatchTSTForPrediction(config), own_loss, adamw, series, BATCH)


def trocr() -> Job:
    """A vision encoder and a text decoder of different makers."""
    from transformers import (
        TrOCRConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
    )

    vision = ViTConfig(**LAYER, **DROPOUT, intermediate_size=32, image_size=8, patch_size=4)
    text = TrOCRConfig(
        **_TEXT, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        max_position_embeddings=10, use_cache=False, cross_attention_hidden_size=16,
        decoder_start_token_id=3,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    config.decoder_start_token_id, config.pad_token_id = 3, 0

    def lines() -> Columns:
        found = _captioned()
        found.columns["labels"] = found.columns.pop("input_ids")
        return found

    return Job(lambda: VisionEncoderDecoderModel(config), own_loss, adamw, lines, BATCH)


class _Block(nn.Module):
    """Two convolutions behind group norms, told the time."""

    def __init__(self, inner: int, outer: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inner), nn.GroupNorm(4, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.time = nn.Linear(time, outer)
        self.skip = nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        y = self.conv2(F.dropout(F.silu(self.norm2(y)), 0.1, self.training))
        out: Tensor = y + self.skip(x)
        return out


class _Across(nn.Module):
    """Self-attention over the pixels of a map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, width)
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, width, high, wide = x.shape
        fused = self.qkv(self.norm(x)).view(n, 3, self.heads, width // self.heads, high * wide)
        q, k, v = fused.transpose(3, 4).unbind(1)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)
        out: Tensor = x + self.out(seen)
        return out


class Diffusion(nn.Module):
    """A U-Net that tells the noise in an image at a time."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, 16), nn.SiLU(), nn.Linear(16, 16))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.before, self.middle = _Block(width, width, 16), _Block(width, 2 * width, 16)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.across = _Across(2 * width, 2)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.after = _Block(2 * width, width, 16)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(100.0) * torch.arange(half, device=x.device) / half)
        angles = when[:, None].to(x.dtype) * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        wide = self.before(self.first(x), time)
        low = self.across(self.middle(self.down(wide), time))
        up = self.up(F.interpolate(low, scale_factor=2.0, mode="nearest"))
        found: Tensor = self.last(F.silu(self.after(torch.cat([up, wide], 1), time)))
        return found


def diffusion() -> Job:
    """Noise and times are drawn within the loss."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x = batch["pixel_values"]
        when = torch.randint(0, 10, (len(x),))
        noise = torch.randn_like(x)
        kept = torch.cos(when.to(x.dtype) / 10)[:, None, None, None]
        found = model(x * kept + noise * (1 - kept**2).sqrt(), when)
        return F.mse_loss(found, noise)

    def images() -> Columns:
        return Columns(pixel_values=torch.randn(COUNT, 3, 8, 8, generator=generator(28)))

    return Job(Diffusion, loss, adamw, images, BATCH)


class WaveNet(nn.Module):
    """Causal convolutions further and further apart, gated, weights normed; skips add up."""

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Embedding(VOCABULARY, width)
        convs = [nn.Conv1d(width, 2 * width, 2, dilation=2**k) for k in range(depth)]
        self.gates = nn.ModuleList([weight_norm(conv) for conv in convs])
        self.joins = nn.ModuleList([nn.Conv1d(width, 2 * width, 1) for _ in range(depth)])
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(width, VOCABULARY, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(tokens).transpose(1, 2)
        skips = torch.zeros_like(x)
        for k, (gate, join) in enumerate(zip(self.gates, self.joins, strict=True)):
            value, opened = gate(F.pad(x, (2**k, 0))).chunk(2, 1)
            seen = F.dropout(value.tanh() * opened.sigmoid(), 0.1, self.training)
            more, skip = join(seen).split(x.shape[1], 1)
            x, skips = x + more, skips + skip
        found: Tensor = self.last(skips)
        return found


def _sequences() -> Columns:
    tokens = torch.randint(0, VOCABULARY, (COUNT, 9), generator=generator(29))
    return Columns(tokens=tokens[:, :-1], labels=tokens[:, 1:] % VOCABULARY)


def _labelled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["tokens"]), batch["labels"])


def wavenet() -> Job:
    """The next sample's class from those before."""
    return Job(WaveNet, _labelled, adamw, _sequences, BATCH)


class Tagger(nn.Module):
    """A two-way LSTM of two layers over embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.recur = nn.LSTM(8, 16, 2, batch_first=True, dropout=0.1, bidirectional=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recur(self.embed(tokens))
        found: Tensor = self.head(states).transpose(1, 2)
        return found


def tagger() -> Job:
    """A class for each token."""
    return Job(Tagger, _labelled, adamw, _sequences, BATCH)


class Graph(nn.Module):
    """Messages along edges, averaged at nodes: graphs of a batch are one graph of parts."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.tell = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.keep = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        graphs, count, _ = nodes.shape
        x = F.relu(self.first(nodes.flatten(0, 1)))
        firsts = torch.arange(graphs, device=x.device)[:, None, None] * count
        source, target = (edges + firsts).transpose(0, 1).flatten(1)
        degree = torch.zeros(len(x), dtype=x.dtype).index_add(
            0, target, torch.ones_like(x[:, 0])[source]
        )
        for tell, keep in zip(self.tell, self.keep, strict=True):
            told = torch.zeros_like(x).index_add(0, target, tell(x)[source])
            x = F.dropout(F.relu(keep(x) + told / degree.clamp(min=1)[:, None]), 0.1, self.training)
        owner = torch.arange(graphs, device=x.device).repeat_interleave(count)
        pooled = torch.zeros(graphs, x.shape[1], dtype=x.dtype)
        pooled = pooled.scatter_reduce(
            0, owner[:, None].expand_as(x), x, "mean", include_self=False
        )
        found: Tensor = self.head(pooled)
        return found


def graph() -> Job:
    """A class for each graph."""

    def graphs() -> Columns:
        g = generator(30)
        return Columns(
            nodes=torch.randn(COUNT, 6, 4, generator=g),
            edges=torch.randint(0, 6, (COUNT, 2, 10), generator=g),
            labels=torch.randint(0, CLASSES, (COUNT,), generator=g),
        )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["nodes"], batch["edges"]), batch["labels"])

    return Job(Graph, loss, adamw, graphs, BATCH)


UNSEEN: dict[str, Callable[[], Job]] = {
    made.__name__: made
    for made in (
        swinv2, convnextv2, levit, poolformer, mobilevit, bit, focalnet, hiera, dpt, detr, vit_mae,
        videomae, wavlm, speech_to_text, ast, siglip, blip, llava, patchtst, trocr, diffusion,
        wavenet, tagger, graph,
    )
}  # fmt: skip

BATCH_NORMED: Sequence[str] = ("levit", "mobilevit", "dpt", "patchtst")
"""Families whose statistics are a batch's."""
