"""Twenty text families that the compiler was not developed against: a table of settings.

The list was written down, and committed, before any of them was run; `unseen.py` runs each once,
and docs/families.md keeps what was found then and what is found now.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from meshwright import Job
from tests.equal.families import LENGTH, VOCABULARY, Tokens
from tests.equal.zoo_text import (
    CAUSAL,
    MASKED,
    TAGGED,
    TAGS,
    TRANSLATING,
    Family,
    Task,
    _sizes,
)

__all__ = ["TABLE", "UNSEEN"]

LAYERS = 2


def unpadded_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """As `masked_loss`, of a model that takes no mask."""
    labels = batch["labels"].flatten()
    logits = model(batch["input_ids"]).logits
    total = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
    return total, (labels != -100).sum()


UNPADDED = Task(MASKED.model, unpadded_loss, lambda: Tokens(masked=True))

_DROPPED = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_GROUPED = {"num_key_value_heads": 2, "attention_dropout": 0.1}

TABLE: dict[str, Family] = {
    # Scores and logits through tanh, windows in every second layer, four norms a layer.
    "gemma2": Family(
        "gemma2", CAUSAL, _sizes(**_GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    ),
    # Attention and MLP side by side behind one norm, interleaved rotary, norms of queries and keys.
    "cohere": Family("cohere", CAUSAL, _sizes(**_GROUPED, use_qk_norm=True)),
    # Queries, keys and values of unequal sizes in one weight, gate and values in another.
    "phi3": Family("phi3", CAUSAL, _sizes(**_GROUPED, resid_pdrop=0.1, embd_pdrop=0.1)),
    # Half of each head is rotated; norms after attention and MLP.
    "glm4": Family("glm4", CAUSAL, _sizes(**_GROUPED, head_dim=8)),
    # ALiBi in place of positions.
    "mpt": Family(
        "mpt",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "max_seq_len": LENGTH,
            "resid_pdrop": 0.1, "emb_pdrop": 0.1, "use_cache": False,
        },
        ("n_layers",),
    ),
    # A fused weight in four parts, each of queries, values and keys.
    "codegen": Family(
        "codegen",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "n_positions": LENGTH, "n_ctx": LENGTH, "n_embd": 32,
            "n_head": 4, "rotary_dim": 4, "resid_pdrop": 0.1, "embd_pdrop": 0.1,
            "attn_pdrop": 0.1, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2,
        },
        ("n_layer",),
    ),
    # A recurrence over time, one token after the other; tokens mixed with those before them.
    "rwkv": Family(
        "rwkv",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "context_length": LENGTH, "hidden_size": 32,
            "intermediate_size": 48, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    # Attention as einsums over (time, batch, head), relative positions by a shift.
    "xlnet": Family(
        "xlnet",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_inner": 48, "dropout": 0.1,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        },
        ("n_layer",),
    ),
    "roformer": Family("roformer", MASKED, _sizes(**_DROPPED, embedding_size=16)),
    # Sequences pooled to half their length, and back.
    "funnel": Family(
        "funnel",
        MASKED,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48,
            "block_sizes": [1, 1], "hidden_dropout": 0.1, "attention_dropout": 0.1,
            "initializer_std": 0.02,  # else logits of some hundreds, and noise to match
        },
        ("num_decoder_layers",),
    ),
    # A convolution whose kernel is made from the tokens, beside attention.
    "convbert": Family(
        "convbert",
        MASKED,
        _sizes(**_DROPPED, embedding_size=16, conv_kernel_size=3, head_ratio=2),
    ),
    # Windows of tokens read by strides.
    "longformer": Family(
        "longformer",
        MASKED,
        _sizes(**_DROPPED, attention_window=4, max_position_embeddings=LENGTH + 2),
    ),
    # Landmarks, an iterated pseudo-inverse, a depthwise convolution over values.
    "nystromformer": Family(
        "nystromformer",
        UNPADDED,  # its own code cannot add a mask to what landmarks see
        _sizes(**_DROPPED, num_landmarks=4, segment_means_seq_len=LENGTH, conv_kernel_size=3),
    ),
    # Fourier transforms in place of attention.
    "fnet": Family(
        "fnet",
        UNPADDED,
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
            "hidden_dropout_prob": 0.1, "max_position_embeddings": LENGTH,
            "tpu_short_seq_length": LENGTH,
        },
    ),
    # Hashed characters, local attention, down by a strided convolution and up by repetition.
    "canine": Family(
        "canine",
        TAGGED,
        {
            "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, **_DROPPED,
            "max_position_embeddings": LENGTH, "num_hash_functions": 4, "num_hash_buckets": 16,
            "downsampling_rate": 2, "upsampling_kernel_size": 2, "local_transformer_stride": 4,
            "num_labels": TAGS, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    # Predicts two tokens at a time: streams of attention side by side.
    "prophetnet": Family(
        "prophetnet",
        TRANSLATING,
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48, "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4, "max_position_embeddings": LENGTH,
            "num_buckets": 8, "use_cache": False,
        },
        ("num_encoder_layers", "num_decoder_layers"),
    ),
    # Attention in blocks beside sums of blocks.
    "longt5": Family(
        "longt5",
        TRANSLATING,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4,
            "local_radius": 2, "global_block_size": 2, "relative_attention_num_buckets": 8,
            "encoder_attention_type": "transient-global", "use_cache": False,
            "decoder_start_token_id": 0,
        },
        ("num_layers", "num_decoder_layers"),
    ),
    # A gated linear recurrence, layer by layer with local attention.
    "recurrent_gemma": Family(
        "recurrent_gemma",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
            "num_attention_heads": 4, "num_key_value_heads": 2, "attention_window_size": 4,
            "attention_dropout": 0.1, "block_types": ["recurrent", "attention"],
            "use_cache": False,
        },
    ),
    # State-space layers, some with one attention block that they share.
    "zamba2": Family(
        "zamba2",
        CAUSAL,
        _sizes(
            attention_dropout=0.1, mamba_d_state=4, n_mamba_heads=8, mamba_ngroups=2, chunk_size=4,
            layers_block_type=["linear_attention", "hybrid"], use_mamba_kernels=False,
            use_shared_attention_adapter=True, adapter_rank=4,
        ),
    ),
    # A gated delta rule in chunks, gated attention, experts and a shared one.
    "qwen3_next": Family(
        "qwen3_next",
        CAUSAL,
        _sizes(
            **_GROUPED, head_dim=16, linear_conv_kernel_dim=2, linear_key_head_dim=8,
            linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4,
            moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
            num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"],
            experts_implementation="grouped_mm",
        ),
    ),
}  # fmt: skip


def _made(family: Family) -> Callable[[], Job]:
    return lambda: family.job(LAYERS)


UNSEEN: dict[str, Callable[[], Job]] = {name: _made(family) for name, family in TABLE.items()}
