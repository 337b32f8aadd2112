"""Further text families, by one table of sizes; a configuration is given those that it has.

No family has settings of its own here, so none could be favoured: these are the types of
`transformers` that such settings make run in eager torch at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from meshwright import Job
from tests.equal.families import VOCABULARY, adamw
from tests.equal.zoo_text import BATCH, CAUSAL, MASKED, TAGGED, TAGS, TRANSLATING, Task

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "text_vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "n_embed"), 32),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads", "num_encoder_attention_heads", "attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "n_inner", "d_inner", "d_ff", "encoder_ffn_dim",
            "decoder_ffn_dim", "ffn_hidden_size", "dim_ff", "hidden_dim",
        ),
        48,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
            "decoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks",
        ),
        2,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_seq_length"), 16
    ),
    "num_key_value_heads": 2, "n_head_kv": 2, "num_kv_heads": 2, "head_dim": 8, "d_kv": 8,
    **dict.fromkeys(
        (
            "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout",
            "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate",
            "activation_dropout",
        ),
        0.1,
    ),
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
    "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "num_labels": TAGS,
    "embedding_size": 16, "rotary_dim": 4, "sliding_window": 4, "attention_window": 4,
    "attention_window_size": 4, "state_size": 4, "ssm_state_size": 4, "mamba_d_state": 4,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "mamba_n_groups": 2, "n_groups": 2, "chunk_size": 4, "mamba_chunk_size": 4,
    "mamba_dt_rank": 4, "time_step_rank": 4, "n_mamba_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_conv_kernel_dim": 2,
    "relative_attention_num_buckets": 8, "num_buckets": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "true_hidden_size": 32, "intra_bottleneck_size": 16,
    "num_global_layers": 1, "block_size": 2, "num_random_blocks": 1,
    "attention_type": "original_full",
    "num_hash_functions": 2, "type_vocab_size": 2, "expert_capacity": 16,
    "experts_implementation": "grouped_mm",
}  # fmt: skip

KINDS = """
afmoe apertus arcee bamba big_bird bigbird_pegasus biogpt bitnet blenderbot blenderbot-small
cohere2 cohere2_moe cpmant ctrl data2vec-text deberta doge dots1 ernie ernie4_5 ernie4_5_moe esm
eurobert exaone4 falcon_mamba flaubert flex_olmo gemma3_text glm glm4_moe gpt_bigcode
gpt_neox_japanese gptj granite granitemoe granitemoehybrid gte helium hunyuan_v1_dense
hunyuan_v1_moe ibert jamba jetmoe jina_embeddings_v3 layoutlm led lfm2 llama4_text m2m_100 marian
mbart megatron-bert minimax mobilebert modernbert modernbert-decoder mra mt5 mvp nanochat nemotron
nemotron_h nllb-moe nomic_bert olmo2 olmo3 olmo_hybrid openai-gpt pegasus pegasus_x persimmon
phimoe plbart qwen2 qwen2_moe qwen3_5_text rembert roberta-prelayernorm seed_oss smollm3 stablelm
starcoder2 umt5 vaultgemma xglm xlm xlm-roberta-xl xlstm yoso
""".split()  # noqa: SIM905 - a table of words


def _fields(factory: Any) -> set[str]:
    found = set(getattr(factory, "attribute_map", {}))
    for base in factory.__mro__:
        found |= set(vars(base).get("__annotations__", {}))
    return found | set(inspect.signature(factory.__init__).parameters)


def _task(config: Any) -> Task:
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    )

    table: Sequence[tuple[Any, Task]] = (
        (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, TRANSLATING),
        (MODEL_FOR_MASKED_LM_MAPPING, MASKED),
        (MODEL_FOR_CAUSAL_LM_MAPPING, CAUSAL),
    )
    for mapping, task in table:
        if type(config) in mapping:
            return task
    return TAGGED


def _job(kind: str) -> Job:
    from transformers import CONFIG_MAPPING, AutoConfig

    fields = _fields(CONFIG_MAPPING[kind])
    given = {k: v for k, v in SIZES.items() if k in fields}
    config = AutoConfig.for_model(kind, **given)
    task = _task(config)
    return Job(lambda: task.model(config), task.loss, adamw, task.data, BATCH)


def _made(kind: str) -> Callable[[], Job]:
    return lambda: _job(kind)


UNSEEN: dict[str, Callable[[], Job]] = {kind: _made(kind) for kind in KINDS}
