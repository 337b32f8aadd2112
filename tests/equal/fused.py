"""Models with one weight for several products of unequal widths, as users would write jobs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from meshwright import Job
from tests.equal.families import VOCABULARY, Tokens, adamw, own_loss

BATCH = 12
WIDTH = 32
KEY = 8


def _causal(kind: str, depth: str, **config: Any) -> Callable[[int], Job]:
    """A job of so many layers of a kind of `transformers`' models."""

    def job(layers: int = 1) -> Job:
        def make() -> nn.Module:
            from transformers import AutoConfig, AutoModelForCausalLM

            common = {"vocab_size": VOCABULARY, "use_cache": False, "pad_token_id": 0}
            made = AutoConfig.for_model(kind, **{**common, **config, depth: layers})
            found: nn.Module = AutoModelForCausalLM.from_config(made)
            return found

        return Job(make, own_loss, adamw, Tokens, batch_size=BATCH)

    return job


class Uneven(nn.Module):
    """Queries of four heads, one key and one value: of each layer, a split of three."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.fused = nn.ModuleList(nn.Linear(WIDTH, WIDTH + 2 * KEY) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.table(tokens)
        for fused, out in zip(self.fused, self.out, strict=True):
            query, key, value = fused(x).split([WIDTH, KEY, KEY], -1)
            heads = query.unflatten(-1, (WIDTH // KEY, KEY)).transpose(1, 2)
            weights = (heads @ key.unsqueeze(1).mT / KEY**0.5).softmax(-1)
            mixed = (weights @ value.unsqueeze(1)).transpose(1, 2).flatten(2)
            x = F.layer_norm(x + out(mixed), (WIDTH,))
        logits: Tensor = self.head(x)
        return logits


def _likelihood(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def uneven(layers: int = 1) -> Job:
    """The hand-written module."""
    return Job(lambda: Uneven(layers), _likelihood, adamw, Tokens, batch_size=BATCH)


FUSED: dict[str, Callable[..., Job]] = {
    # One key and one value for all heads, in one weight with the queries.
    "falcon": _causal(
        "falcon", "num_hidden_layers", hidden_size=WIDTH, num_attention_heads=4, alibi=False,
        multi_query=True, new_decoder_architecture=False, parallel_attn=False, bias=True,
        ffn_hidden_size=64, hidden_dropout=0.1, attention_dropout=0.1,
    ),
    "bigcode": _causal(
        "gpt_bigcode", "n_layer", n_embd=WIDTH, n_head=4, n_positions=16, multi_query=True,
        n_inner=64, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    ),
    # Eight heads of queries, two of keys and of values.
    "phi3": _causal(
        "phi3", "num_hidden_layers", hidden_size=WIDTH, num_attention_heads=8,
        num_key_value_heads=2, intermediate_size=48, resid_pdrop=0.1, max_position_embeddings=16,
        original_max_position_embeddings=16,
    ),
    # Gate, channels, B, C and time steps; one group of B and C, for all heads.
    "mamba2": _causal(
        "mamba2", "num_hidden_layers", hidden_size=WIDTH, num_heads=8, head_dim=8, state_size=4,
        n_groups=1, chunk_size=4, conv_kernel=4,
    ),
    "uneven": uneven,
}  # fmt: skip
