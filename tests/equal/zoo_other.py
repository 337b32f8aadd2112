"""Vision, convolution and audio families of `transformers`, from tiny configurations.

One or two layers or stages each, random weights, dropout where the family has some. One law of
sizes: two ranks may split every hidden dim, and no dim but the batch's is the batch's size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from meshwright import Job, annotate
from tests.equal.families import own_loss, vit

BATCH = 12
CLASSES = 5
COUNT = 96


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW whose eps no rounding reaches: a bias before a norm has true gradient zero."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.1)


class Columns(Dataset[dict[str, Tensor]]):
    """Rows of tensors held in memory."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(size: int) -> Columns:
    """Random images [3, size, size] and labels."""
    g = generator(5)
    images = torch.randn(COUNT, 3, size, size, generator=g)
    return Columns(pixel_values=images, labels=torch.randint(0, CLASSES, (COUNT,), generator=g))


def maps(size: int) -> Columns:
    """Random images and a class for each pixel; one in ten is ignored (255)."""
    g = generator(6)
    labels = torch.randint(0, CLASSES, (COUNT, size, size), generator=g)
    ignored = torch.rand(COUNT, size, size, generator=g) < 0.1
    images = torch.randn(COUNT, 3, size, size, generator=g)
    return Columns(pixel_values=images, labels=labels.masked_fill(ignored, 255))


def classifier(kind: str, size: int, **config: Any) -> Job:
    """An image classifier of `transformers`, by its type."""
    from transformers import AutoConfig, AutoModelForImageClassification

    made = AutoConfig.for_model(kind, num_labels=CLASSES, **config)
    factory = AutoModelForImageClassification._model_mapping[type(made)]
    factory = factory[0] if isinstance(factory, tuple) else factory
    return Job(lambda: factory(made), own_loss, adamw, lambda: pictures(size), BATCH)


LAYER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def deit() -> Job:
    """Vision transformer with a distillation token."""
    return classifier(
        "deit", 8, **LAYER, **DROPOUT, intermediate_size=32, image_size=8, patch_size=4,
    )  # fmt: skip


def swin() -> Job:
    """Windows that shift, merged patches, a relative position bias, paths that drop out."""
    return classifier(
        "swin", 16, embed_dim=8, depths=(2, 1), num_heads=(2, 2), window_size=2, image_size=16,
        patch_size=2, mlp_ratio=2.0, drop_path_rate=0.2, **DROPOUT,
    )  # fmt: skip


def beit() -> Job:
    """Relative position bias by lookup, scaled layers, mean pooling."""
    return classifier(
        "beit", 8, **LAYER, **DROPOUT, intermediate_size=32, image_size=8, patch_size=4,
        use_relative_position_bias=True, drop_path_rate=0.1,
    )  # fmt: skip


def dinov2() -> Job:
    """SwiGLU and scaled layers."""
    return classifier(
        "dinov2", 8, **LAYER, **DROPOUT, image_size=8, patch_size=4, mlp_ratio=2,
        use_swiglu_ffn=True, drop_path_rate=0.1,
    )  # fmt: skip


def convnext() -> Job:
    """Depthwise convolutions, channels last in the middle."""
    return classifier(
        "convnext", 16, num_stages=2, hidden_sizes=(8, 12), depths=(1, 1), patch_size=2,
        image_size=16, drop_path_rate=0.2, layer_scale_init_value=0.5,
    )  # fmt: skip


def resnet() -> Job:
    """Bottlenecks with batch norm."""
    return classifier(
        "resnet", 16, embedding_size=8, hidden_sizes=(16, 24), depths=(1, 1),
        layer_type="bottleneck",
    )  # fmt: skip


def regnet() -> Job:
    """Grouped convolutions, squeeze and excitation, batch norm."""
    return classifier(
        "regnet", 16, embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1), groups_width=4
    )


def mobilenet() -> Job:
    """Inverted bottlenecks: expand, depthwise, project; batch norm; dropout."""
    return classifier(
        "mobilenet_v2", 16, image_size=16, depth_multiplier=0.05, min_depth=4, depth_divisible_by=2,
        output_stride=4, classifier_dropout_prob=0.2,
    )  # fmt: skip


class Mixed(Dataset[dict[str, Tensor]]):
    """Sound and text: log-mel features and the tokens said."""

    def __init__(self, bins: int, frames: int, length: int, vocabulary: int) -> None:
        g = generator(7)
        self.features = torch.randn(COUNT, bins, frames, generator=g)
        self.labels = torch.randint(4, vocabulary, (COUNT, length), generator=g)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_features": self.features[index], "labels": self.labels[index]}


def whisper() -> Job:
    """An encoder of log-mel features behind two convolutions, and a decoder."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=24, num_mel_bins=6, encoder_layers=1, encoder_attention_heads=2,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, encoder_ffn_dim=32,
        d_model=16, dropout=0.1, attention_dropout=0.1, activation_dropout=0.1,
        max_source_positions=8, max_target_positions=10, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=3, use_cache=False,
    )  # fmt: skip
    return Job(
        lambda: WhisperForConditionalGeneration(config), own_loss, adamw,
        lambda: Mixed(6, 16, 7, 24), BATCH,
    )  # fmt: skip


def wav2vec2() -> Job:
    """Convolutions over a waveform, group norm per channel, a grouped positional convolution."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        **LAYER, intermediate_size=32, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(6, 3),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4, apply_spec_augment=False,
        layerdrop=0.0, classifier_proj_size=8, num_labels=CLASSES, feat_proj_dropout=0.1,
    )  # fmt: skip

    def sounds() -> Columns:
        g = generator(8)
        waves = torch.randn(COUNT, 64, generator=g)
        return Columns(input_values=waves, labels=torch.randint(0, CLASSES, (COUNT,), generator=g))

    return Job(lambda: Wav2Vec2ForSequenceClassification(config), own_loss, adamw, sounds, BATCH)


def clip() -> Job:
    """Two towers; each image's caption is told from all others of the micro-batch."""
    from transformers import CLIPConfig, CLIPModel

    tower = {**LAYER, "intermediate_size": 32, "attention_dropout": 0.1, "projection_dim": 8}
    text = {**tower, "vocab_size": 24, "max_position_embeddings": 6}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(
        text_config=text, vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )  # fmt: skip

    def captioned() -> Columns:
        g = generator(9)
        tokens = torch.randint(3, 24, (COUNT, 6), generator=g)
        tokens[:, -1] = 2
        return Columns(input_ids=tokens, pixel_values=torch.randn(COUNT, 3, 8, 8, generator=g))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch, return_loss=True).loss

    return Job(lambda: CLIPModel(config), loss, adamw, captioned, BATCH)


def segformer() -> Job:
    """Attention over reduced keys, depthwise convolutions, maps resized and joined."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_encoder_blocks=2, depths=(1, 1), sr_ratios=(2, 1), hidden_sizes=(8, 12),
        patch_sizes=(3, 3), strides=(2, 2), num_attention_heads=(1, 2), mlp_ratios=(2, 2),
        **DROPOUT, decoder_hidden_size=8, num_labels=CLASSES,
    )  # fmt: skip
    return Job(
        lambda: SegformerForSemanticSegmentation(config), own_loss, adamw, lambda: maps(16), BATCH
    )


class UNet(nn.Module):
    """Down, up and across: strided and transposed convolutions, group norm, resizing."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=2, dilation=2)
        self.gate = nn.Conv2d(2 * width, 4 * width, 1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = nn.Conv2d(2 * width, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        across = F.silu(self.first(x))
        low = F.silu(self.norm(self.down(F.dropout(across, 0.1, self.training))))
        low = low + F.glu(self.gate(F.max_pool2d(self.middle(low), 3, 1, 1)), dim=1)
        up = self.up(low) + F.interpolate(low[:, : across.shape[1]], scale_factor=2.0)
        found: Tensor = self.last(torch.cat([across, up], 1))
        return found


def unet() -> Job:
    """A small U-Net that labels pixels."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        found = model(batch["pixel_values"])
        total = F.cross_entropy(found, labels, ignore_index=255, reduction="sum")
        return total, (labels != 255).sum()

    return Job(UNet, loss, adamw, lambda: maps(8), BATCH)


class Field(nn.Module):
    """Convolutions and pooling over images whose rows are split: they read each other's edges."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.GELU(),
            nn.Dropout(0.1), nn.AvgPool2d(2, 1, 1), nn.Conv2d(8, 12, 3, padding=1), nn.Tanh(),
            nn.Upsample(scale_factor=2.0), nn.ConvTranspose2d(12, 8, 2, stride=2), nn.SiLU(),
            nn.Conv2d(8, 12, 3, padding=1),
        )  # fmt: skip
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor = self.layers(annotate(x, None, None, "context"))
        found: Tensor = self.head(seen.mean((2, 3)))
        return found


def field() -> Job:
    """Images split in height."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["pixel_values"]), batch["labels"])

    return Job(Field, loss, adamw, lambda: pictures(18), BATCH)


OTHERS: dict[str, Callable[[], Job]] = {
    "vit": lambda: vit(BATCH),
    "deit": deit,
    "swin": swin,
    "beit": beit,
    "dinov2": dinov2,
    "convnext": convnext,
    "resnet": resnet,
    "regnet": regnet,
    "mobilenet": mobilenet,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "clip": clip,
    "segformer": segformer,
    "unet": unet,
    "field": field,
}

BATCH_NORMED: Sequence[str] = ("resnet", "regnet", "mobilenet", "segformer", "field")
"""Families whose statistics are a batch's."""

__all__ = ["BATCH", "BATCH_NORMED", "OTHERS"]
