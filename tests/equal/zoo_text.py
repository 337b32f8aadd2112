"""Text families of `transformers`, tiny, from configurations alone: a table of settings.

Width 32, four heads, random weights, dropout wherever the configuration has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from meshwright import Job
from tests.equal.families import LENGTH, VOCABULARY, Tokens, adamw, masked_loss, own_loss

BATCH = 12
TAGS = 5


class Pairs(Dataset[dict[str, Tensor]]):
    """A padded source sequence and a target of another length, whose end does not count."""

    def __init__(self, count: int = 160) -> None:
        generator = torch.Generator().manual_seed(4)
        self.source = torch.randint(4, VOCABULARY, (count, LENGTH), generator=generator)
        self.target = torch.randint(4, VOCABULARY, (count, LENGTH - 2), generator=generator)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        short = torch.arange(LENGTH - 2) >= LENGTH - 2 - index % 3
        return {
            "input_ids": self.source[index],
            "attention_mask": (torch.arange(LENGTH) < LENGTH - index % 4).long(),
            "labels": self.target[index].masked_fill(short, -100),
        }


def tag_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A tag for every token: what is left of its number."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten() % TAGS)


def _causal(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    made: nn.Module = AutoModelForCausalLM.from_config(config)
    return made


def _masked(config: Any) -> nn.Module:
    from transformers import AutoModelForMaskedLM

    made: nn.Module = AutoModelForMaskedLM.from_config(config)
    return made


def _tagged(config: Any) -> nn.Module:
    from transformers import AutoModelForTokenClassification

    made: nn.Module = AutoModelForTokenClassification.from_config(config)
    return made


def _translating(config: Any) -> nn.Module:
    from transformers import AutoModelForSeq2SeqLM

    made: nn.Module = AutoModelForSeq2SeqLM.from_config(config)
    return made


@dataclass(frozen=True, slots=True)
class Task:
    """What a model learns: its class, its loss, its data."""

    model: Callable[[Any], nn.Module]
    loss: Callable[..., Any]
    data: Callable[[], Dataset[dict[str, Tensor]]]


CAUSAL = Task(_causal, own_loss, Tokens)
MASKED = Task(_masked, masked_loss, lambda: Tokens(masked=True))
TAGGED = Task(_tagged, tag_loss, lambda: Tokens(masked=True))
TRANSLATING = Task(_translating, own_loss, Pairs)


@dataclass(frozen=True, slots=True)
class Family:
    """A row of the table.

    Attributes:
        kind: model type, as `transformers` calls it.
        task: what it learns.
        settings: of its configuration.
        depth: the settings that say how many layers there are.
        whole: patterns of the matrices that stay whole over `tensor`, as in Megatron-LM: tables of
            fewer rows than are looked up, the small heads of masked models.
        reduces: all-reduces over `tensor` per layer and micro-batch, forward and backward.
        others: other collectives over `tensor` per layer: sums of the gradients of norms over
            heads, once a step.
    """

    kind: str
    task: Task
    settings: Mapping[str, Any]
    depth: tuple[str, ...] = ("num_hidden_layers",)
    whole: tuple[str, ...] = ()
    reduces: tuple[int, int] = (2, 2)
    others: int = 0

    def job(self, layers: int = 1, batch: int = BATCH) -> Job:
        """A job of so many layers."""

        def model() -> nn.Module:
            from transformers import AutoConfig

            depth = dict.fromkeys(self.depth, layers)
            config = AutoConfig.for_model(self.kind, **{**self.settings, **depth})
            return self.task.model(config)

        return Job(model, self.task.loss, adamw, self.task.data, batch)


def _sizes(**more: Any) -> dict[str, Any]:
    """Settings under the names that most configurations use."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": LENGTH,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


_DROPPED = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_TYPES = ("*token_type_embeddings*",)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        "gpt2",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 32, "n_head": 4,
            "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
        },
        ("n_layer",),
    ),
    "gpt-neox": Family(
        "gpt_neox",
        CAUSAL,
        _sizes(hidden_dropout=0.1, attention_dropout=0.1),
        reduces=(1, 2),  # attention and MLP side by side, a norm each
    ),
    "opt": Family(
        "opt",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4,
            "max_position_embeddings": LENGTH, "dropout": 0.1, "attention_dropout": 0.1,
            "use_cache": False,
        },
        whole=("*embed_positions*",),
    ),
    "bloom": Family(
        "bloom",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "n_head": 4, "hidden_dropout": 0.1,
            "attention_dropout": 0.1, "use_cache": False,
        },
        ("n_layer",),
    ),
    "falcon, one key": Family(
        "falcon",
        CAUSAL,
        _sizes(ffn_hidden_size=64, hidden_dropout=0.1, attention_dropout=0.1),
        reduces=(1, 2),  # the gradients of the key and the value, which are whole, beside
    ),
    "falcon, grouped": Family(
        "falcon",
        CAUSAL,
        _sizes(
            ffn_hidden_size=64, hidden_dropout=0.1, attention_dropout=0.1, num_kv_heads=2,
            new_decoder_architecture=True,
        ),
        reduces=(1, 2),
    ),
    "phi": Family(
        "phi",
        CAUSAL,
        _sizes(
            resid_pdrop=0.1, embd_pdrop=0.1, attention_dropout=0.1,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5
            },
        ),
        reduces=(1, 1),
    ),
    "gemma": Family(
        "gemma",
        CAUSAL,
        _sizes(num_key_value_heads=2, head_dim=16, attention_dropout=0.1),
    ),
    "llama": Family(
        "llama", CAUSAL, _sizes(num_key_value_heads=2, attention_dropout=0.1)
    ),
    "mistral": Family(
        "mistral",
        CAUSAL,
        _sizes(num_key_value_heads=2, sliding_window=4, attention_dropout=0.1),
    ),
    "qwen3": Family(
        "qwen3",
        CAUSAL,
        _sizes(num_key_value_heads=2, head_dim=16, attention_dropout=0.1),
        others=2,  # the norms of queries and of keys, whose weights all heads share
    ),
    "olmo": Family("olmo", CAUSAL, _sizes(clip_qkv=0.02, attention_dropout=0.1)),
    "bert": Family("bert", MASKED, _sizes(**_DROPPED), whole=(*_TYPES, "*transform.dense*")),
    "roberta": Family(
        "roberta",
        MASKED,
        _sizes(**_DROPPED, max_position_embeddings=LENGTH + 2),
        whole=(*_TYPES, "*position_embeddings*", "lm_head.dense*"),
    ),
    "electra": Family(
        "electra",
        TAGGED,
        _sizes(**_DROPPED, embedding_size=16, num_labels=TAGS),
        whole=(*_TYPES, "*embeddings_project*", "classifier*"),
    ),
    "albert": Family(
        "albert",
        MASKED,
        _sizes(**_DROPPED, embedding_size=16),
        whole=(*_TYPES, "*embedding_hidden_mapping_in*", "predictions.dense*"),
        others=2,  # the gradients of the mapping, once a step, since layers are shared
    ),
    "distilbert": Family(
        "distilbert",
        MASKED,
        {
            "vocab_size": VOCABULARY, "dim": 32, "n_heads": 4, "hidden_dim": 64,
            "max_position_embeddings": LENGTH,
        },
        ("n_layers",),
        ("vocab_transform*",),
    ),
    "deberta-v2": Family(
        "deberta-v2",
        MASKED,
        _sizes(
            **_DROPPED, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
            norm_rel_ebd="layer_norm", share_att_key=True, position_biased_input=False,
        ),
        whole=("*transform.dense*", "*rel_embeddings*"),
    ),
    "t5": Family(
        "t5",
        TRANSLATING,
        {
            "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4,
            "relative_attention_num_buckets": 8, "dropout_rate": 0.1, "use_cache": False,
            "decoder_start_token_id": 0,
        },
        ("num_layers", "num_decoder_layers"),
        reduces=(5, 5),  # two of an encoder's layer, three of a decoder's
    ),
    "bart": Family(
        "bart",
        TRANSLATING,
        {
            "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "d_model": 32,
            "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "dropout": 0.1, "attention_dropout": 0.1,
            "activation_dropout": 0.1, "use_cache": False,
        },
        ("encoder_layers", "decoder_layers"),
        whole=("*encoder.embed_positions*",),
        reduces=(5, 5),
    ),
    "mamba": Family(
        "mamba",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 4, "time_step_rank": 4,
            "use_cache": False, "use_associative_scan": False,
        },
    ),
    "mamba2": Family(
        "mamba2",
        CAUSAL,
        {
            "vocab_size": VOCABULARY, "hidden_size": 32, "num_heads": 8, "head_dim": 8,
            "state_size": 4, "n_groups": 2, "chunk_size": 4, "use_cache": False,
        },
        reduces=(1, 1),
    ),
}  # fmt: skip
