"""Draws by counter: pure in (seed, op, sample), of the right law, replacing every random op."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from meshwright.compile.draw import draw, draw_op, keep, philox, position_operand
from meshwright.compile.random import _HANDLERS, RandomMode
from meshwright.errors import NotTraceable

aten = torch.ops.aten
KEPT = keep(0.7, torch.float32)
MASK = [1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 0]
kinds = st.sampled_from(["uniform", "normal", "integers", KEPT])
wide = st.sampled_from(["uniform", "normal", "integers"])  # two numbers are hardly ever equal


def where(first=0, *, seed=7, step=3, microbatch=0):
    return position_operand(seed, first, step, microbatch)


@st.composite
def shapes(draw_, samples):
    """(size of `n` samples as a function, sample dim) for any rank, outer and unit."""
    lead = draw_(st.lists(st.integers(1, 3), max_size=2))
    rest = draw_(st.lists(st.integers(1, 3), max_size=2))
    outer, unit = draw_(st.integers(1, 3)), draw_(st.integers(1, 3))
    return (lambda n: [*lead, outer * n * unit, *rest]), (len(lead), outer, unit)


def samples_first(tensor, sample):
    """The tensor with its samples as dim 0."""
    dim, outer, unit = sample
    shape = tensor.shape
    n = shape[dim] // (outer * unit)
    seen = tensor.reshape(*shape[:dim], outer, n, unit, *shape[dim + 1 :])
    return seen.movedim(dim + 1, 0)


@given(
    kind=kinds,
    case=shapes(0),
    cuts=st.lists(st.integers(0, 9), max_size=3),
    first=st.integers(0, 99),
)
def test_a_sample_is_drawn_the_same_under_any_split(kind, case, cuts, first):
    """Ranks (start) and micro-batches (first) only say where a sample stands."""
    size, sample = case
    whole = samples_first(draw(kind, size(9), 2, sample, 0, where(first)), sample)
    edges = sorted({0, 9, *cuts})
    for low, high in pairwise(edges):
        by_rank = draw(kind, size(high - low), 2, sample, low, where(first))
        by_microbatch = draw(kind, size(high - low), 2, sample, 0, where(first + low, microbatch=5))
        assert by_rank.shape == torch.Size(size(high - low))
        assert torch.equal(samples_first(by_rank, sample), whole[low:high])
        assert torch.equal(by_rank, by_microbatch)


@given(kind=wide, case=shapes(0))
def test_samples_differ_from_one_another(kind, case):
    size, sample = case
    whole = samples_first(draw(kind, size(6), 0, sample, 0, where()), sample).reshape(6, -1)
    assert len({tuple(row.tolist()) for row in whole}) == 6


@given(kind=kinds, seed=st.integers(-(2**63), 2**63 - 1))
def test_any_seed_is_a_stream_of_its_own(kind, seed):
    first = draw(kind, [4, 80], 0, (0, 1, 1), 0, where(seed=seed))
    again = draw(kind, [4, 80], 0, (0, 1, 1), 0, where(seed=seed))
    other = draw(kind, [4, 80], 0, (0, 1, 1), 0, where(seed=seed ^ 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_a_draw_depends_on():
    """Of a sample: its position and the op. Without samples: the step, the micro-batch, the op."""

    def drawn(sample, n=0, first=0, **place):
        return tuple(draw("uniform", [4], n, sample, 0, where(first, **place)).tolist())

    rows = (0, 1, 1)
    base = drawn(rows)
    assert drawn(rows, step=9) == base, "the position is global already"
    assert drawn(rows, microbatch=9) == base
    assert drawn(rows, n=1) != base
    assert drawn(rows, first=4) != base
    assert drawn(rows, first=1)[:3] == base[1:]
    whole = drawn(None)
    assert len({whole, base, drawn(None, n=1), drawn(None, step=4), drawn(None, microbatch=1)}) == 5
    assert drawn(None, first=8) == whole


def test_kinds_have_their_dtype_and_range():
    sample = (0, 1, 1)
    uniform = draw("uniform", [2000, 4], 0, sample, 0, where())
    assert uniform.dtype == torch.float32
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1
    normal = draw("normal", [2000, 4], 0, sample, 0, where())
    assert abs(normal.mean()) < 0.05
    assert abs(normal.std() - 1) < 0.05
    integers = draw("integers", [2000], 0, sample, 0, where())
    assert integers.dtype == torch.int64
    assert integers.min() >= 0
    assert len(integers.unique()) == 2000


def test_uniform_numbers_are_spread_evenly_over_samples_and_within():
    drawn = draw("uniform", [500, 20], 0, (0, 1, 1), 0, where()).numpy()
    for numbers in (drawn.ravel(), drawn[:, 0], drawn[0]):
        counts = np.histogram(numbers, bins=4, range=(0, 1))[0]
        expected = len(numbers) / 4
        chi = ((counts - expected) ** 2 / expected).sum()
        assert chi < 16.3, "0.1 % of true uniform samples are worse"
    assert abs(np.corrcoef(drawn[:-1, 0], drawn[1:, 0])[0, 1]) < 0.15


DTYPES = [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_is_zeros_and_ones_and_the_same_in_every_dtype(dtype):
    found = draw(keep(0.7, dtype), [500, 20], 0, (0, 1, 1), 0, where())
    assert found.dtype == dtype
    assert torch.equal(found.float(), draw(KEPT, [500, 20], 0, (0, 1, 1), 0, where()))
    assert set(found.float().unique().tolist()) == {0.0, 1.0}
    assert found.double().mean() == pytest.approx(0.7, abs=5 * (0.21 / 10_000) ** 0.5)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.3 / 256, 0.5, 0.9, 255.7 / 256, 1.0])
@pytest.mark.parametrize("sample", [None, (0, 1, 1)])
def test_a_mask_keeps_with_its_probability_to_more_than_a_byte(p, sample):
    """The first byte cannot tell 0.3/256 from 0: what follows decides."""
    count = 400_000
    found = draw(keep(p, torch.bool), [1000, 400], 0, sample, 0, where())
    assert found.double().mean() == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5)


def test_a_larger_probability_keeps_what_a_smaller_one_keeps():
    """One number is behind a mask: a byte first, further bits where that decides nothing."""
    shares = [0.0, 0.2, 0.2001, 0.20010001, 0.7, 0.9, 1.0]
    masks = [draw(keep(p, torch.bool), [64, 999], 0, (0, 1, 1), 0, where()) for p in shares]
    assert all(bool((fewer <= more).all()) for fewer, more in pairwise(masks))


def test_masks_of_neighbours_and_of_later_bytes_are_independent():
    drawn = draw(KEPT, [500, 200], 0, (0, 1, 1), 0, where()).numpy()
    pairs = [
        (drawn[:-1], drawn[1:]),
        (drawn[:, :-1], drawn[:, 1:]),
        (drawn[:, :-32], drawn[:, 32:]),
    ]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / one.size**0.5


def test_shares_of_another_length_draw_other_numbers():
    """Else a long sample and a later short one would have the same mask."""
    long = draw("uniform", [1, 64], 0, (0, 1, 1), 0, where(10)).ravel()
    short = draw("uniform", [30, 32], 0, (0, 1, 1), 0, where(0)).ravel()
    assert not set(long.tolist()) & set(short.tolist())


@pytest.mark.parametrize(("kind", "streams"), [("uniform", 1), ("integers", 1), (KEPT, 2)])
def test_all_samples_are_drawn_in_one_go(monkeypatch, kind, streams):
    """What a Python loop over samples costs is most of it where samples are small."""
    made, philox_ = [], np.random.Philox
    monkeypatch.setattr(np.random, "Philox", lambda **k: made.append(1) or philox_(**k))
    draw(kind, [4096, 64], 0, (0, 1, 1), 0, where())
    assert len(made) == streams


def test_the_stream_is_philox():
    """Pinned, so that a checkpoint of today draws the same numbers tomorrow."""
    raw = philox(1, 2, (3, 4)).bit_generator.random_raw(2).tolist()
    reference = np.random.Philox(key=[1, 2], counter=[0, 0, 3, 4]).random_raw(2).tolist()
    assert raw == reference
    found = draw("uniform", [2], 0, (0, 1, 1), 0, where(5, seed=11))
    mask = draw(KEPT, [1, 16], 0, (0, 1, 1), 0, where(5, seed=11)).int().ravel().tolist()
    assert mask == MASK
    assert found.tolist() == pytest.approx([0.9360330104827881, 0.642219603061676], abs=0)


@given(kind=kinds, case=shapes(0))
def test_the_op_is_the_function(kind, case):
    size, sample = case
    place = where(6)
    found = draw_op(kind, size(3), 1, *sample, 2, place)
    assert torch.equal(found, draw(kind, size(3), 1, sample, 2, place))
    fake = torch.empty(0, device="meta")
    said = draw_op(kind, size(3), 1, *sample, 2, place.to(fake.device))
    assert (said.shape, said.dtype) == (found.shape, found.dtype)
    none = draw_op(kind, size(3), 1, -1, 1, 1, 0, place)
    assert torch.equal(none, draw(kind, size(3), 1, None, 0, place))


# ── the mode ─────────────────────────────────────────────────────────────────────────────────────

N = 4000
x = torch.zeros(N)
probabilities = torch.full((N,), 0.3)


def mode(seed=1, **named):
    return RandomMode(lambda kind, size, n: draw(kind, size, n, None, 0, where(seed=seed)), **named)


def in_place(op, *args):
    return lambda: op(torch.zeros(N), *args)


# op -> (what makes N numbers by it, their mean, their standard deviation)
MAKES = {
    aten.bernoulli_.float: (in_place(aten.bernoulli_.float, 0.3), 0.3, 0.46),
    aten.bernoulli_.Tensor: (in_place(aten.bernoulli_.Tensor, probabilities), 0.3, 0.46),
    aten.bernoulli.default: (lambda: aten.bernoulli.default(probabilities), 0.3, 0.46),
    aten.bernoulli.p: (lambda: aten.bernoulli.p(x, 0.3), 0.3, 0.46),
    aten.native_dropout.default: (
        lambda: aten.native_dropout.default(torch.ones(N), 0.3, True)[0], 1.0, 0.65,
    ),
    aten.rand.default: (lambda: torch.rand(N), 0.5, 0.29),
    aten.randn.default: (lambda: torch.randn(N), 0.0, 1.0),
    aten.rand_like.default: (lambda: torch.rand_like(x), 0.5, 0.29),
    aten.randn_like.default: (lambda: torch.randn_like(x), 0.0, 1.0),
    aten.uniform_.default: (in_place(aten.uniform_.default, 2.0, 4.0), 3.0, 0.58),
    aten.normal_.default: (in_place(aten.normal_.default, 2.0, 3.0), 2.0, 3.0),
    aten.normal.Tensor_float: (lambda: torch.normal(x + 2, 3.0), 2.0, 3.0),
    aten.normal.float_Tensor: (lambda: torch.normal(2.0, x + 3), 2.0, 3.0),
    aten.normal.Tensor_Tensor: (lambda: torch.normal(x + 2, x + 3), 2.0, 3.0),
    aten.normal.float_float: (lambda: torch.normal(2.0, 3.0, (N,)), 2.0, 3.0),
    aten.exponential_.default: (in_place(aten.exponential_.default, 2.0), 0.5, 0.5),
    aten.log_normal_.default: (in_place(aten.log_normal_.default, 0.0, 0.5), 1.13, 0.6),
    aten.cauchy_.default: (lambda: torch.atan(torch.zeros(N).cauchy_()), 0.0, 0.91),
    aten.geometric_.default: (in_place(aten.geometric_.default, 0.5), 2.0, 1.41),
    aten.randint.default: (lambda: torch.randint(10, (N,)), 4.5, 2.87),
    aten.randint.low: (lambda: torch.randint(5, 15, (N,)), 9.5, 2.87),
    aten.randint_like.default: (lambda: torch.randint_like(x, 10), 4.5, 2.87),
    aten.randint_like.low_dtype: (lambda: torch.randint_like(x, 5, 15), 9.5, 2.87),
    aten.random_.default: (in_place(aten.random_.default), 2**30, 2**30 / 3**0.5),
    aten.random_.to: (in_place(aten.random_.to, 10), 4.5, 2.87),
    getattr(aten.random_, "from"): (in_place(getattr(aten.random_, "from"), 5, 15), 9.5, 2.87),
    aten.randperm.default: (lambda: torch.randperm(N), (N - 1) / 2, N / 12**0.5),
    aten.multinomial.default: (
        lambda: torch.multinomial(torch.tensor([0.1, 0.2, 0.7]), N, replacement=True), 1.6, 0.66,
    ),
}  # fmt: skip


def test_every_replaced_op_is_tried():
    assert set(MAKES) == set(_HANDLERS)


@pytest.mark.parametrize("op", MAKES, ids=str)
def test_an_op_is_replaced_by_draws_of_its_law(op):
    make, mean, deviation = MAKES[op]
    like = make()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    with mode() as counting:
        found = make()
    assert counting.count == 1
    assert torch.equal(torch.random.get_rng_state(), before), "torch's own generator is untouched"
    assert (found.shape, found.dtype) == (like.shape, like.dtype)
    numbers = found.double()
    assert abs(numbers.mean() - mean) < 5 * deviation / N**0.5
    assert numbers.std() == pytest.approx(deviation, rel=0.1)
    with mode():
        assert torch.equal(make(), found)
    with mode(seed=2):
        assert not torch.equal(make(), found)


def test_draws_are_numbered_in_order():
    seen = []

    def emit(kind, size, n):
        seen.append((kind, size, n))
        return draw(kind, size, n, None, 0, where())

    with RandomMode(emit) as counting:
        torch.rand(2, 3)
        F.dropout(torch.ones(4), 0.5)
        torch.randint(3, (5,))
    assert seen == [("uniform", [2, 3], 0), ("keep 0.5 float32", [4], 1), ("integers", [5], 2)]
    assert counting.count == 3


def test_what_draws_nothing_counts_nothing():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with mode() as counting:
        layer(torch.ones(2, 3, 8))
        F.dropout(torch.ones(4), 0.5, training=False)
        F.scaled_dot_product_attention(*[torch.ones(1, 2, 3, 4)] * 3)
    assert counting.count == 0


def test_a_permutation_is_one_and_choices_without_replacement_differ():
    with mode():
        assert torch.randperm(50).sort().values.tolist() == list(range(50))
        assert torch.randperm(5, dtype=torch.int32).dtype == torch.int32
        weights = torch.tensor([[0.0, 1.0, 1.0, 1.0]] * 200)
        chosen = torch.multinomial(weights, 3)
    assert chosen.sort(-1).values.tolist() == [[1, 2, 3]] * 200


def test_choices_follow_their_weights():
    with mode():
        chosen = torch.multinomial(torch.tensor([0.1, 0.2, 0.7]).expand(N, 3), 1)
    shares = torch.bincount(chosen.ravel(), minlength=3) / N
    assert shares.tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.03)


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_dropout_keeps_and_scales(p):
    with mode():
        found = F.dropout(torch.ones(N), p)
        fused, mask = aten.native_dropout.default(torch.ones(N), p, True)
    for kept in (found, fused):
        scale = 1 / (1 - p) if p < 1 else 0.0
        assert set(kept.unique().tolist()) <= {0.0, float(torch.tensor(scale))}
        assert float((kept > 0).float().mean()) == pytest.approx(1 - p, abs=0.03)
    assert torch.equal(mask, fused > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_stays_below_its_end_in_every_dtype(dtype):
    def almost_one(kind, size, n):
        return torch.full(size, 1 - 2**-24)

    with RandomMode(almost_one):
        assert torch.rand(3, dtype=dtype).max() < 1
        assert torch.rand_like(torch.empty(3, dtype=dtype)).max() < 1
        assert torch.empty(3, dtype=dtype).uniform_(0, 0.5).max() < 0.5


def test_an_exponential_is_never_zero():
    """Its logarithm is taken: a Gumbel sample must be finite."""
    with RandomMode(lambda kind, size, n: torch.zeros(size)):
        assert torch.empty(3).exponential_().min() > 0
        assert F.gumbel_softmax(torch.zeros(1, 3)).isfinite().all()


def test_a_sure_success_comes_at_once():
    with mode():
        assert torch.zeros(4).geometric_(1.0).tolist() == [1.0] * 4


def test_an_empty_range_is_refused():
    with (
        mode(),
        pytest.raises(NotTraceable, match="random integers from 3 to 3: the range is empty"),
    ):
        torch.empty(2).random_(3, 3)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("rrelu_with_noise", lambda: F.rrelu(torch.ones(4), training=True)),
        ("poisson", lambda: torch.poisson(torch.ones(4))),
        ("rand.generator", lambda: torch.rand(4, generator=torch.Generator())),
        ("_sample_dirichlet", lambda: torch.distributions.Dirichlet(torch.ones(3)).sample()),
    ],
)
def test_a_seeded_op_without_a_draw_is_refused(name, make):
    """Nothing may draw from a generator that differs between ranks."""
    before = torch.random.get_rng_state()
    with mode(), pytest.raises(NotTraceable) as caught:
        make()
    assert name in str(caught.value)
    assert "no counter-based draw; use torch.rand" in str(caught.value)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: F.scaled_dot_product_attention(*[torch.ones(1, 2, 3, 4)] * 3, dropout_p=0.5),
        lambda: F.dropout2d(torch.ones(4, 3, 2, 2), 0.5),
        lambda: F.alpha_dropout(torch.ones(4), 0.5, training=True),
        lambda: torch.distributions.Normal(0.0, 1.0).rsample((3,)),
        lambda: torch.distributions.Categorical(torch.ones(3)).sample((3,)),
    ],
    ids=["attention", "dropout2d", "alpha", "normal", "categorical"],
)
def test_what_is_built_on_draws_works(make):
    with mode() as counting:
        found = make()
    assert counting.count == 1
    with mode():
        assert torch.equal(make(), found)


def test_promotion_keeps_the_models_own_casts_in_double():
    with mode(promote=True):
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64
        assert torch.ones(2, dtype=torch.float64).float().dtype == torch.float64
        assert torch.ones(2, dtype=torch.float64).to(torch.bfloat16).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.int32).dtype == torch.int32
    with mode():
        assert torch.ones(2, dtype=torch.float64).float().dtype == torch.float32
