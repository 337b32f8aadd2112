"""What the sweep of bills trains under experts: a Mixtral of some 60 MiB of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from meshwright import Job

SAMPLES, VOCABULARY = 64, 512


def job(width: int = 384, depth: int = 3, experts: int = 6, context: int = 128) -> Job:
    """Two experts for a token, and the auxiliary loss that balances them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": depth,
        "num_attention_heads": width // 64, "num_key_value_heads": 2,
        "max_position_embeddings": context, "use_cache": False,
        "experts_implementation": "grouped_mm", "intermediate_size": 2 * width,
        "num_local_experts": experts, "num_experts_per_tok": 2, "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (SAMPLES, context), generator=generator)

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, labels=ids).loss
        return found

    return Job(
        model=lambda: MixtralForCausalLM(MixtralConfig(**shape)),
        loss=loss,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
        data=lambda: [*tokens],
        batch_size=12,
        steps=8,
    )
