"""Attention over split sequences equals one device in every form, at its paper's counts."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch.utils.data import Dataset

from meshwright import Job
from meshwright.errors import PlanError
from meshwright.program.explain import collectives
from meshwright.run.form import first_micros
from tests.equal.cells import example
from tests.equal.families import Tokens as Short
from tests.equal.families import adamw, masked_loss, own_loss
from tests.equal.harness import Case, assert_equal
from tests.laws.source import ROOT

LENGTH, VOCABULARY, BATCH = 13, 48, 6


class Tokens(Dataset):
    """Sources with padding, at the left where `left`, and targets of the same or another length."""

    def __init__(self, target=None, *, left=False):
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(4, VOCABULARY, (60, LENGTH), generator=generator)
        self.target = torch.randint(4, VOCABULARY, (60, target or LENGTH), generator=generator)
        self.left = left

    def __len__(self):
        return 60

    def __getitem__(self, index):
        seen = (torch.arange(LENGTH) < LENGTH - index % 4).long()
        return {
            "input_ids": self.tokens[index],
            "attention_mask": seen.flip(0) if self.left else seen,
            "labels": self.target[index],
        }


def gpt(heads, dropout=0.0):
    """examples/gpt.py, whose heads are 32 wide."""
    return example("gpt").job(
        depth=1, width=32 * heads, context=LENGTH, batch=BATCH, dropout=dropout
    )


def llama(keys, **more):
    """Grouped queries, no dropout: a kernel, with padding at the left."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=keys, max_position_embeddings=LENGTH,
        use_cache=False, **more,
    )  # fmt: skip
    return Job(lambda: LlamaForCausalLM(config), own_loss, adamw, lambda: Tokens(left=True), BATCH)


def bert():
    """Both directions, with padding."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=LENGTH, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Job(
        lambda: BertForMaskedLM(config), masked_loss, adamw, lambda: Short(masked=True), BATCH
    )


def bart(target=None):
    """An encoder, a decoder that looks at it, and a kernel for both."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=2 * LENGTH, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip
    return Job(
        lambda: BartForConditionalGeneration(config), own_loss, adamw, lambda: Tokens(target), BATCH
    )


def t5(target=None):
    """Attention that is computed op by op, with a bias for each distance, and dropout."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4,
        relative_attention_num_buckets=8, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    return Job(
        lambda: T5ForConditionalGeneration(config), own_loss, adamw, lambda: Tokens(target), BATCH
    )


JOBS = {
    "gpt": lambda: gpt(4),
    "gpt, dropout": lambda: gpt(4, 0.1),
    "gpt, one head": lambda: gpt(1),
    "llama": lambda: llama(4),
    "llama, two keys": lambda: llama(2),
    "llama, computed": lambda: llama(4, attn_implementation="eager"),
    "bert": bert,
    "bart": bart,
    "bart, other length": lambda: bart(7),
    "t5": t5,
}


@cache
def case(name):
    return Case(JOBS[name]())


def choices(name, plan):
    """What each attention of the model takes, in order, and the collectives of rank 0's step."""
    build = case(name).build(plan, None)
    micros = first_micros(build, case(name).data)
    compiled = build.lowered(0, micros).compiled
    return [one.form for one in build.unit(micros[0]).attention], [
        row for row in collectives(compiled, build.axes) if row.axis == "context"
    ]


SOME = [
    ("gpt", "context=2"), ("gpt, dropout", "context=2,tensor=2"), ("gpt, one head", "context=3"),
    ("gpt", "context=2,attention=gather"), ("llama", "context=2,attention=ring"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "plan"), SOME)
def test_a_form_equals_one_device(name, plan):
    assert_equal(case(name).verify(plan, steps=2))


HEADS = {"gpt": 4, "gpt, dropout": 4, "gpt, one head": 1, "llama": 8, "llama, two keys": 8}
COMPUTED = ("gpt, dropout", "llama, computed", "t5")


def refused(name, plan):
    """Whether the form asked for cannot be; padded Llamas repeat their keys for each query."""
    sizes = dict(item.split("=") for item in plan.split(",") if "=" in item)
    heads = HEADS.get(name, 8 if "llama" in name else 4)
    if sizes.get("attention") == "all-to-all":
        return heads % (int(sizes["context"]) * int(sizes.get("tensor", 1))) > 0
    return sizes.get("attention") == "ring" and name in COMPUTED


FORMS = ("", ",attention=all-to-all", ",attention=ring", ",attention=gather")
MESHES = ("", "data=2,", "tensor=2,", "zero3,data=2,")


@pytest.mark.matrix
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("context", [2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", JOBS)
def test_every_form_equals_one_device_or_is_refused(name, form, context, mesh, microbatches):
    plan = f"{mesh}context={context},microbatches={microbatches}{form}"
    if refused(name, plan):
        with pytest.raises(PlanError, match=f"plan asks for {form[1:]}, but "):
            case(name).verify(plan, steps=2)
    else:
        assert_equal(case(name).verify(plan, steps=2))


@pytest.mark.parametrize(
    ("name", "plan", "forms"),
    [
        ("gpt", "context=2", ["all-to-all"]),
        ("gpt", "context=3", ["ring"]),
        ("gpt", "context=2,tensor=4", ["ring"]),
        ("gpt, dropout", "context=4", ["all-to-all"]),
        ("gpt, dropout", "context=3", ["gather"]),
        ("llama, two keys", "context=2", ["all-to-all"] * 2),
        ("bart", "context=2", ["all-to-all"] * 3),
        ("bart, other length", "context=2", ["all-to-all", "gather", "gather"]),
        ("t5", "context=2", ["all-to-all"] * 3),
    ],
)
def test_the_form_that_moves_fewer_bytes_is_taken(name, plan, forms):
    assert choices(name, plan)[0] == forms


TABLE = BATCH * 4 * LENGTH * 32 * 4
"""Bytes of queries, and of keys, of `gpt` in float32."""


def shared(count, parts):
    """The even share of `count` tables; sequences of 13 are uneven by one token at most."""
    return pytest.approx(count * TABLE * (parts - 1) / parts**2, rel=0.5 * parts / LENGTH)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("name", ["gpt", "gpt, dropout"])
def test_heads_are_exchanged_by_four_all_to_alls_each_way(name, parts):
    """Jacobs et al. 2023, section 3.1: queries, keys, values and the output."""
    rows = [row for row in choices(name, f"context={parts}")[1] if row.op != "all_reduce"]
    assert {row.op for row in rows} == {"all_to_all"}
    for phase in ("forward", "backward"):
        mine = [row for row in rows if row.phase == phase]
        assert sum(row.count for row in mine) == 4
        assert sum(row.bytes for row in mine) == shared(4, parts)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_keys_and_values_hop_to_every_other_rank(parts):
    """Liu et al. 2023, section 3: N - 1 hops, each of a block of keys and one of values."""
    rows = choices("gpt", f"context={parts},attention=ring")[1]
    rows = [row for row in rows if row.op != "all_reduce"]
    assert {row.op for row in rows} == {"permute"}
    for phase, tables in (("forward", 2), ("backward", 4)):
        mine = [row for row in rows if row.phase == phase]
        assert sum(row.count for row in mine) == tables * (parts - 1)
        assert sum(row.bytes for row in mine) == shared(tables * parts, parts)


@pytest.mark.parametrize(
    ("name", "plan", "words"),
    [
        ("gpt, one head", "context=2,attention=all-to-all", "1 head of keys does not divide"),
        ("gpt", "context=2,tensor=4,attention=all-to-all", "divide by context=2 x tensor=4"),
        ("gpt, dropout", "context=2,attention=ring", "computed op by op"),
    ],
)
def test_a_form_that_cannot_be_is_refused_with_its_remedy(name, plan, words):
    with pytest.raises(PlanError, match=words) as raised:
        choices(name, plan)
    assert "gpt.py:" in str(raised.value)
    assert "attention=gather, or drop attention" in str(raised.value)


@pytest.mark.matrix
@pytest.mark.mp
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("form", ["all-to-all", "ring"])
def test_processes_agree(form):
    done = subprocess.run(
        [sys.executable, "-m", "meshwright", "verify", "examples/gpt.py", "--set", "depth=1",
         "--set", "width=64", "--set", "context=13", "--set", "batch=4", "--json",
         "--plan", f"context=2,attention={form}", "--ranks", "processes", "--steps", "2"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=220,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]
