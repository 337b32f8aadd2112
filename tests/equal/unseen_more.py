"""A second list of unseen families, chosen when the first had been run and before this one was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright import Job
from tests.equal.families import own_loss
from tests.equal.zoo_other import (
    BATCH,
    CLASSES,
    COUNT,
    DROPOUT,
    LAYER,
    Columns,
    adamw,
    classifier,
    generator,
)

__all__ = ["BATCH_NORMED", "MORE"]

VOCABULARY = 24
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2
}  # fmt: skip
_INNER: dict[str, Any] = {**LAYER, "intermediate_size": 32}


def _data(columns: Callable[[torch.Generator], dict[str, Tensor]]) -> Callable[[], Columns]:
    return lambda: Columns(**columns(generator(31)))


def _tokens(g: torch.Generator, length: int = 6) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (COUNT, length), generator=g)


def pvt() -> Job:
    """Pyramids of attention over reduced keys."""
    return classifier(
        "pvt", 16, image_size=16, num_encoder_blocks=2, depths=(1, 1), hidden_sizes=(8, 16),
        sequence_reduction_ratios=(2, 1), patch_sizes=(4, 2), strides=(4, 2),
        num_attention_heads=(1, 2), mlp_ratios=(2, 2), drop_path_rate=0.1, **DROPOUT,
    )  # fmt: skip


def cvt() -> Job:
    """Queries and keys made by depthwise convolutions with batch norm."""
    return classifier(
        "cvt", 16, patch_sizes=(3, 3), patch_stride=(2, 2), patch_padding=(1, 1),
        embed_dim=(8, 16), num_heads=(1, 2), depth=(1, 2), mlp_ratio=(2.0, 2.0),
        attention_drop_rate=(0.1, 0.1), drop_rate=(0.1, 0.1), drop_path_rate=(0.0, 0.1),
        qkv_bias=(True, True), cls_token=(False, True), qkv_projection_method=("dw_bn", "dw_bn"),
        kernel_qkv=(3, 3), padding_kv=(1, 1), stride_kv=(2, 2), padding_q=(1, 1), stride_q=(1, 1),
    )  # fmt: skip


def _videos(g: torch.Generator) -> dict[str, Tensor]:
    frames = torch.randn(COUNT, 4, 3, 8, 8, generator=g)
    return {
        "pixel_values": frames,
        "labels": torch.randint(0, CLASSES, (COUNT,), generator=g),
    }


def timesformer() -> Job:
    """Attention over time, then over space."""
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    config = TimesformerConfig(
        **_INNER, **DROPOUT, image_size=8, patch_size=4, num_frames=4, num_labels=CLASSES
    )
    return Job(
        lambda: TimesformerForVideoClassification(config), own_loss, adamw, _data(_videos), BATCH
    )


def vivit() -> Job:
    """Tubes of video."""
    from transformers import VivitConfig, VivitForVideoClassification

    config = VivitConfig(
        **_INNER, **DROPOUT, image_size=8, num_frames=4, tubelet_size=[2, 4, 4], num_labels=CLASSES
    )
    return Job(lambda: VivitForVideoClassification(config), own_loss, adamw, _data(_videos), BATCH)


def glpn() -> Job:
    """Depth from one image: maps of all stages fused, a loss of logarithms."""
    from transformers import GLPNConfig, GLPNForDepthEstimation

    config = GLPNConfig(
        num_encoder_blocks=4, depths=[1] * 4, sr_ratios=[2, 2, 1, 1], hidden_sizes=[8, 8, 16, 16],
        patch_sizes=[3] * 4, strides=[4, 2, 2, 2],
        num_attention_heads=[1, 2, 2, 2], mlp_ratios=[2] * 4,
        **DROPOUT, drop_path_rate=0.1, decoder_hidden_size=8,
    )  # fmt: skip

    def depths(g: torch.Generator) -> dict[str, Tensor]:
        seen = torch.randn(COUNT, 3, 32, 32, generator=g)
        return {"pixel_values": seen, "labels": torch.rand(COUNT, 32, 32, generator=g) + 0.5}

    return Job(lambda: GLPNForDepthEstimation(config), own_loss, adamw, _data(depths), BATCH)


def sew() -> Job:
    """Squeezed speech, the CTC loss over labels that are padded."""
    from transformers import SEWConfig, SEWForCTC

    config = SEWConfig(
        **_INNER, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(6, 3),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4, apply_spec_augment=False,
        layerdrop=0.0, vocab_size=VOCABULARY,
    )  # fmt: skip

    def spoken(g: torch.Generator) -> dict[str, Tensor]:
        said = torch.randint(1, VOCABULARY, (COUNT, 3), generator=g)
        said[::3, 2] = -100
        return {"input_values": torch.randn(COUNT, 130, generator=g), "labels": said}

    return Job(lambda: SEWForCTC(config), own_loss, adamw, _data(spoken), BATCH)


def _captioned(g: torch.Generator, length: int = 6) -> dict[str, Tensor]:
    return {
        "input_ids": _tokens(g, length),
        "pixel_values": torch.randn(COUNT, 3, 8, 8, generator=g),
    }


def _told(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return found


def git() -> Job:
    """Patches and words in one sequence."""
    from transformers import GitConfig, GitForCausalLM

    vision = {**_INNER, "image_size": 8, "patch_size": 4, "attention_dropout": 0.1}
    config = GitConfig(
        **_INNER, **DROPOUT, **_TEXT, vision_config=vision, max_position_embeddings=16,
        use_cache=False,
    )  # fmt: skip
    return Job(lambda: GitForCausalLM(config), _told, adamw, _data(_captioned), BATCH)


def pix2struct() -> Job:
    """Flattened patches that carry their row and column, relative positions in the decoder."""
    from transformers import Pix2StructConfig, Pix2StructForConditionalGeneration

    text = {
        **_TEXT, "hidden_size": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
        "relative_attention_num_buckets": 8, "use_cache": False, "decoder_start_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "patch_embed_hidden_size": 10, "d_ff": 32, "d_kv": 8, "seq_len": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "attention_dropout": 0.1,
    }  # fmt: skip
    config = Pix2StructConfig(text_config=text, vision_config=vision)

    def patches(g: torch.Generator) -> dict[str, Tensor]:
        places = torch.randint(0, 4, (COUNT, 6, 2), generator=g)
        seen = torch.cat([places.float(), torch.randn(COUNT, 6, 10, generator=g)], 2)
        return {"flattened_patches": seen, "labels": _tokens(g)}

    return Job(
        lambda: Pix2StructForConditionalGeneration(config), own_loss, adamw, _data(patches), BATCH
    )


def layoutlmv3() -> Job:
    """Words with boxes beside an image's patches; biases by distance in two dims."""
    from transformers import LayoutLMv3Config, LayoutLMv3ForTokenClassification

    config = LayoutLMv3Config(
        **_INNER, **DROPOUT, **_TEXT, max_position_embeddings=12, max_2d_position_embeddings=32,
        coordinate_size=3, shape_size=2, rel_pos_bins=8, max_rel_pos=16, rel_2d_pos_bins=8,
        max_rel_2d_pos=16, input_size=8, patch_size=4, num_labels=CLASSES,
    )  # fmt: skip

    def pages(g: torch.Generator) -> dict[str, Tensor]:
        corner = torch.randint(0, 16, (COUNT, 6, 2), generator=g)
        boxes = torch.cat([corner, corner + torch.randint(1, 8, (COUNT, 6, 2), generator=g)], 2)
        labels = torch.randint(0, CLASSES, (COUNT, 6), generator=g)
        return {**_captioned(g), "bbox": boxes, "labels": labels}

    return Job(
        lambda: LayoutLMv3ForTokenClassification(config), own_loss, adamw, _data(pages), BATCH
    )


def sam() -> Job:
    """Masks from points: windows, decomposed positions, two-way attention, upscaling."""
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config={
            "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "window_size": 3,
            "global_attn_indexes": [1], "num_pos_feats": 4, "mlp_dim": 32,
        },
        prompt_encoder_config={
            "hidden_size": 8, "image_size": 16, "patch_size": 4, "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "attention_downsample_rate": 1, "iou_head_hidden_dim": 8, "iou_head_depth": 2,
        },
    )  # fmt: skip

    def pointed(g: torch.Generator) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.randn(COUNT, 3, 16, 16, generator=g),
            "input_points": torch.rand(COUNT, 1, 2, 2, generator=g) * 16,
            "input_labels": torch.randint(0, 2, (COUNT, 1, 2), generator=g),
            "masks": (torch.rand(COUNT, 1, 1, 16, 16, generator=g) < 0.5).float(),
        }

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        masks = batch.pop("masks") if "masks" in batch else None
        assert masks is not None
        found = model(**batch, multimask_output=False).pred_masks
        return F.binary_cross_entropy_with_logits(found, masks)

    def whole(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss(model, dict(batch))

    return Job(lambda: SamModel(config), whole, adamw, _data(pointed), BATCH)


def owlvit() -> Job:
    """Boxes and classes of patches by the likeness of image and query."""
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    config = OwlViTConfig(
        text_config={**_INNER, **_TEXT, "max_position_embeddings": 6, "attention_dropout": 0.1},
        vision_config={**_INNER, "image_size": 8, "patch_size": 4, "attention_dropout": 0.1},
        projection_dim=16,
    )

    def queried(g: torch.Generator) -> dict[str, Tensor]:
        found = _captioned(g)
        found["input_ids"][:, -1] = VOCABULARY - 1
        return {**found, "wanted": torch.rand(COUNT, 4, 4, generator=g)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = model(batch["input_ids"], batch["pixel_values"])
        boxes = F.l1_loss(found.pred_boxes, batch["wanted"])
        return boxes + F.softplus(found.logits).mean()

    return Job(lambda: OwlViTForObjectDetection(config), loss, adamw, _data(queried), BATCH)


def qwen2_vl() -> Job:
    """Images of any size end to end as one sequence; positions of three kinds."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    image = VOCABULARY - 1
    text = {
        **_INNER, **_TEXT, "num_key_value_heads": 1, "max_position_embeddings": 16,
        "use_cache": False, "attention_dropout": 0.1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, video_token_id=image - 1,
        vision_start_token_id=image - 2,
    )  # fmt: skip

    def seen(g: torch.Generator) -> dict[str, Tensor]:
        tokens = torch.randint(3, VOCABULARY - 3, (COUNT, 10), generator=g)
        tokens[:, 1], tokens[:, 2:6] = image - 2, image
        patches = torch.randn(COUNT, 16, 12, generator=g)
        return {"input_ids": tokens, "patches": patches}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        tokens, patches = batch["input_ids"], batch["patches"]
        sizes = torch.tensor([[1, 4, 4]]).expand(len(tokens), 3)
        found: Tensor = model(
            input_ids=tokens, pixel_values=patches.flatten(0, 1), image_grid_thw=sizes,
            labels=tokens, mm_token_type_ids=(tokens == image).int(),
        ).loss  # fmt: skip
        return found

    return Job(lambda: Qwen2VLForConditionalGeneration(config), loss, adamw, _data(seen), BATCH)


def paligemma() -> Job:
    """A prefix that all see, then words that look back."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    image = VOCABULARY - 1
    config = PaliGemmaConfig(
        vision_config={
            **_INNER, "model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4,
            "attention_dropout": 0.1, "vision_use_head": False, "projection_dim": 16,
        },
        text_config={
            **_INNER, **_TEXT, "model_type": "gemma", "head_dim": 8, "num_key_value_heads": 1,
            "max_position_embeddings": 16, "use_cache": False,
        },
        image_token_index=image, vocab_size=VOCABULARY, projection_dim=16, hidden_size=16,
    )  # fmt: skip

    def seen(g: torch.Generator) -> dict[str, Tensor]:
        found = _captioned(g, 10)
        found["input_ids"][:, :4] = image
        kinds = (torch.arange(10) >= 6).long().expand(COUNT, 10)
        labels = found["input_ids"].masked_fill(kinds == 0, -100)
        return {**found, "token_type_ids": kinds, "labels": labels}

    return Job(
        lambda: PaliGemmaForConditionalGeneration(config), own_loss, adamw, _data(seen), BATCH
    )


def time_series() -> Job:
    """Lags of a series, scaled; the likelihood of a Student's t."""
    from transformers import TimeSeriesTransformerConfig, TimeSeriesTransformerForPrediction

    config = TimeSeriesTransformerConfig(
        prediction_length=4, context_length=8, lags_sequence=[1, 2, 3], num_time_features=1,
        encoder_layers=1, decoder_layers=1, d_model=16, encoder_layerdrop=0.0,
        decoder_layerdrop=0.0, use_cache=False,
    )  # fmt: skip

    def series(g: torch.Generator) -> dict[str, Tensor]:
        walk = torch.randn(COUNT, 15, generator=g).cumsum(1)
        times = torch.linspace(0, 1, 15).expand(COUNT, 15).unsqueeze(-1)
        return {
            "past_values": walk[:, :11], "past_time_features": times[:, :11].contiguous(),
            "past_observed_mask": torch.ones(COUNT, 11), "future_values": walk[:, 11:],
            "future_time_features": times[:, 11:].contiguous(),
        }  # fmt: skip

    return Job(
        lambda: TimeSeriesTransformerForPrediction(config), own_loss, adamw, _data(series), BATCH
    )


def decision() -> Job:
    """Returns, states and actions in turns."""
    from transformers import DecisionTransformerConfig, DecisionTransformerModel

    config = DecisionTransformerConfig(
        state_dim=5, act_dim=2, hidden_size=16, max_ep_len=10, n_positions=32, n_layer=1, n_head=2,
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip

    def played(g: torch.Generator) -> dict[str, Tensor]:
        return {
            "states": torch.randn(COUNT, 6, 5, generator=g),
            "actions": torch.randn(COUNT, 6, 2, generator=g).tanh(),
            "returns_to_go": torch.rand(COUNT, 6, 1, generator=g),
            "timesteps": torch.arange(6).expand(COUNT, 6).contiguous(),
            "attention_mask": (torch.rand(COUNT, 6, generator=g) < 0.9).long(),
        }

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = model(**batch, rewards=batch["returns_to_go"])
        return F.mse_loss(found.action_preds, batch["actions"])

    return Job(lambda: DecisionTransformerModel(config), loss, adamw, _data(played), BATCH)


def clap() -> Job:
    """Sound and text: windows over a spectrogram, batch norm of its bins, a contrast."""
    from transformers import ClapConfig, ClapModel

    config = ClapConfig(
        text_config={**_INNER, **DROPOUT, **_TEXT, "max_position_embeddings": 10},
        audio_config={
            "window_size": 2, "num_mel_bins": 8, "spec_size": 16, "patch_size": 2,
            "patch_stride": [2, 2], "hidden_size": 16, "depths": [1, 1],
            "num_attention_heads": [2, 2], "patch_embeds_hidden_size": 8, "drop_path_rate": 0.1,
            "num_hidden_layers": 2, "mlp_ratio": 2.0,
        },
        projection_dim=8, hidden_size=16, num_hidden_layers=2,
    )  # fmt: skip

    def heard(g: torch.Generator) -> dict[str, Tensor]:
        return {
            "input_ids": _tokens(g),
            "input_features": torch.randn(COUNT, 1, 32, 8, generator=g),
        }

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch, return_loss=True).loss
        return found

    return Job(lambda: ClapModel(config), loss, adamw, _data(heard), BATCH)


def efficientnet() -> Job:
    """Squeezed and excited inverted bottlenecks, padded unevenly; batch norm."""
    return classifier(
        "efficientnet", 32, image_size=32, width_coefficient=1.0, depth_coefficient=1.0,
        depth_divisor=4, kernel_sizes=[3, 5], in_channels=[32, 8], out_channels=[8, 16],
        strides=[1, 2], num_block_repeats=[1, 1], expand_ratios=[1, 2], hidden_dim=1280,
        squeeze_expansion_ratio=0.5,
    )  # fmt: skip


def swin2sr() -> Job:
    """An enlarged image by windows of attention and pixels shuffled."""
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    config = Swin2SRConfig(
        image_size=8, embed_dim=8, depths=[2], num_heads=[2], window_size=4, drop_path_rate=0.1,
        **DROPOUT,
    )  # fmt: skip

    def images(g: torch.Generator) -> dict[str, Tensor]:
        small = torch.rand(COUNT, 3, 8, 8, generator=g)
        return {"pixel_values": small, "wanted": torch.rand(COUNT, 3, 16, 16, generator=g)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.l1_loss(model(batch["pixel_values"]).reconstruction, batch["wanted"])

    return Job(lambda: Swin2SRForImageSuperResolution(config), loss, adamw, _data(images), BATCH)


def encodec() -> Job:
    """Sound coded by convolutions and an LSTM, quantised, and made again."""
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        target_bandwidths=[1.5], hidden_size=8, num_filters=4, upsampling_ratios=[4, 2],
        codebook_size=8, codebook_dim=8, num_lstm_layers=1, sampling_rate=2400,
    )  # fmt: skip

    def sounds(g: torch.Generator) -> dict[str, Tensor]:
        return {"input_values": torch.randn(COUNT, 1, 64, generator=g)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x = batch["input_values"]
        return F.mse_loss(model(x).audio_values, x)

    return Job(lambda: EncodecModel(config), loss, adamw, _data(sounds), BATCH)


def speecht5() -> Job:
    """Text to a spectrogram: a prenet whose dropout never ends, a postnet with batch norm."""
    from transformers import SpeechT5Config, SpeechT5ForTextToSpeech

    config = SpeechT5Config(
        **_TEXT, hidden_size=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
        encoder_layerdrop=0.0, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        decoder_layerdrop=0.0, num_mel_bins=4, speech_decoder_prenet_units=8,
        speaker_embedding_dim=6, speech_decoder_postnet_layers=2, speech_decoder_postnet_units=8,
        encoder_max_relative_position=4, max_speech_positions=16, max_text_positions=16,
        use_guided_attention_loss=False, use_cache=False, decoder_start_token_id=3,
    )  # fmt: skip

    def read(g: torch.Generator) -> dict[str, Tensor]:
        return {
            "input_ids": _tokens(g),
            "labels": torch.randn(COUNT, 8, 4, generator=g),
            "speaker_embeddings": torch.randn(COUNT, 6, generator=g),
            "stop_labels": (torch.arange(8) == 7).float().expand(COUNT, 8).contiguous(),
        }

    return Job(lambda: SpeechT5ForTextToSpeech(config), own_loss, adamw, _data(read), BATCH)


MORE: dict[str, Callable[[], Job]] = {
    made.__name__: made
    for made in (
        pvt, cvt, timesformer, vivit, glpn, sew, git, pix2struct, layoutlmv3, sam, owlvit,
        qwen2_vl, paligemma, time_series, decision, clap, efficientnet, swin2sr, encodec, speecht5,
    )
}  # fmt: skip

UNSEEN = MORE

BATCH_NORMED: Sequence[str] = ("cvt", "glpn", "clap", "efficientnet", "speecht5")
"""Families whose statistics are a batch's."""
