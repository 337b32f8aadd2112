"""Mixtures of experts from `transformers`, one small layer each, with the losses they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from meshwright import Job
from tests.equal.families import BATCH, LENGTH, VOCABULARY, Tokens, adamw, own_loss

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "use_cache": False,
    "experts_implementation": "grouped_mm",
}  # fmt: skip


def mixtral(batch: int = BATCH) -> Job:
    """Mixtral: two experts of four for a token, and the auxiliary loss that balances them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **COMMON, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    return Job(lambda: MixtralForCausalLM(config), own_loss, adamw, Tokens, batch)


def qwen3(batch: int = BATCH) -> Job:
    """Qwen3-MoE: three experts of five, weights normalised, an auxiliary loss."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **COMMON, head_dim=8, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=3,
        norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    return Job(lambda: Qwen3MoeForCausalLM(config), own_loss, adamw, Tokens, batch)


def olmoe(batch: int = BATCH) -> Job:
    """OLMoE: norms of queries and keys, two experts of eight."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        **COMMON, intermediate_size=16, num_experts=8, num_experts_per_tok=2,
        output_router_logits=True,
    )  # fmt: skip
    return Job(lambda: OlmoeForCausalLM(config), own_loss, adamw, Tokens, batch)


def deepseek(batch: int = BATCH) -> Job:
    """DeepSeek-V3: latent attention, groups of experts, a shared one beside them."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, intermediate_size=48, moe_intermediate_size=16,
        n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, n_group=4, topk_group=2,
        first_k_dense_replace=0, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return Job(lambda: DeepseekV3ForCausalLM(config), own_loss, adamw, Tokens, batch)


def gptoss(batch: int = BATCH) -> Job:
    """GPT-OSS: biases of experts, gates and values side by side, attention sinks."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **COMMON, head_dim=8, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    return Job(lambda: GptOssForCausalLM(config), own_loss, adamw, Tokens, batch)


MIXTURES: dict[str, Callable[..., Job]] = {
    "mixtral": mixtral,
    "qwen3": qwen3,
    "olmoe": olmoe,
    "deepseek": deepseek,
    "gptoss": gptoss,
}
