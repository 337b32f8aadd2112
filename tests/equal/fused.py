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


def _job(model: Callable[[], nn.Module], loss: Any = own_loss) -> Job:
    return Job(model, loss, adamw, Tokens, batch_size=BATCH)


def _causal(kind: str, **config: Any) -> Job:
    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, f"{kind}Config")(**config)
        return getattr(transformers, f"{kind}ForCausalLM")(made)

    return _job(make)


def falcon() -> Job:
    """One key and one value for all heads, in one weight with the queries; two heads of 8."""
    return _causal(
        "Falcon", vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=4,
        num_hidden_layers=1, multi_query=True, new_decoder_architecture=False, alibi=False,
        bias=True, use_cache=False,
    )  # fmt: skip


def bigcode() -> Job:
    """GPT-BigCode: queries first, then a key and a value."""
    return _causal(
        "GPTBigCode", vocab_size=VOCABULARY, n_embd=WIDTH, n_head=4, n_layer=1, n_positions=16,
        multi_query=True, use_cache=False, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
    )  # fmt: skip


def phi3() -> Job:
    """Eight heads of queries, two of keys and values."""
    return _causal(
        "Phi3", vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=8,
        num_key_value_heads=2, num_hidden_layers=1, intermediate_size=48, pad_token_id=0,
        use_cache=False, resid_pdrop=0.1, max_position_embeddings=16,
        original_max_position_embeddings=16,
    )  # fmt: skip


def mamba2() -> Job:
    """Gate, channels, B, C and time steps in one weight; one group of B and C."""
    return _causal(
        "Mamba2", vocab_size=VOCABULARY, hidden_size=WIDTH, num_heads=8, head_dim=8, state_size=4,
        num_hidden_layers=1, n_groups=1, chunk_size=4, conv_kernel=4, use_cache=False,
    )  # fmt: skip


class Uneven(nn.Module):
    """Queries of four heads, one key and one value by a split of three; a gate of half a width."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.fused = nn.Linear(WIDTH, WIDTH + 2 * 8)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        x = self.table(tokens)
        query, key, value = self.fused(x).split([WIDTH, 8, 8], -1)
        heads = query.unflatten(-1, (4, 8)).transpose(1, 2)
        weights = (heads @ key.unsqueeze(1).mT / 8**0.5).softmax(-1)
        mixed = (weights @ value.unsqueeze(1)).transpose(1, 2).flatten(2)
        return self.head(F.layer_norm(x + self.out(mixed), (WIDTH,)))


def _uneven_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def uneven() -> Job:
    """The hand-written module."""
    return _job(Uneven, _uneven_loss)


FUSED: dict[str, Callable[[], Job]] = {
    "falcon": falcon, "bigcode": bigcode, "phi3": phi3, "mamba2": mamba2, "uneven": uneven,
}  # fmt: skip
