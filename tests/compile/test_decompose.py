"""Decompositions: what each op is taken apart into computes what aten's own kernel does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from meshwright.compile.decompose import DECOMPOSITIONS

aten = torch.ops.aten
NONE, MEAN, SUM = 0, 1, 2
reductions = (NONE, MEAN, SUM)


def f(*shape, low=-2.0, high=2.0):
    seed = sum((k + 3) * size for k, size in enumerate(shape)) + int(10 * high)
    random = torch.Generator().manual_seed(seed)
    return torch.rand(shape, dtype=torch.float64, generator=random) * (high - low) + low


def grad_for(reduction, *shape):
    return f(*shape, high=1.5) if reduction == NONE else f(high=1.5)


def pairwise(op, backward, *more):
    x, y = f(5, 3), f(5, 3, high=2.5)
    for how in reductions:
        yield op, (x, y, how, *more)
        yield backward, (grad_for(how, 5, 3), x, y, how, *more)


def losses():
    yield from pairwise(aten.mse_loss.default, aten.mse_loss_backward.default)
    for edge in (0.5, 1.0):
        yield from pairwise(aten.smooth_l1_loss.default, aten.smooth_l1_loss_backward.default, edge)
        yield from pairwise(aten.huber_loss.default, aten.huber_loss_backward.default, edge)
    yield aten.smooth_l1_loss.default, (f(5, 3), f(5, 3, high=2.5), MEAN, 0.0)
    x, sign = f(5, 3), f(5, 3, high=2.5).sign()
    for how in reductions:
        yield aten.soft_margin_loss.default, (x, sign, how)
        yield aten.soft_margin_loss_backward.default, (grad_for(how, 5, 3), x, sign, how)


def likelihoods():
    for how in reductions:
        for weight in (None, f(4, low=0.1)):
            x, target = f(6, 4), torch.tensor([0, 3, 1, 2, 3, 1])
            given = (x, target, weight, how, 2)
            yield aten.nll_loss_forward.default, given
            total = aten.nll_loss_forward.default(*given)[1]
            yield aten.nll_loss_backward.default, (
                grad_for(how, 6), x, target, weight, how, 2, total,
            )  # fmt: skip
            image, labels = f(2, 4, 3, 2), torch.arange(12).reshape(2, 3, 2) % 4
            given = (image, labels, weight, how, -100)
            yield aten.nll_loss2d_forward.default, given
            total = aten.nll_loss2d_forward.default(*given)[1]
            yield aten.nll_loss2d_backward.default, (
                grad_for(how, 2, 3, 2), image, labels, weight, how, -100, total,
            )  # fmt: skip


def crossentropies():
    p, target = f(5, 3, low=0.05, high=0.95), f(5, 3, low=0.0, high=1.0)
    sure = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    for how in reductions:
        for weight in (None, f(5, 3, low=0.1)):
            yield aten.binary_cross_entropy.default, (p, target, weight, how)
            yield aten.binary_cross_entropy_backward.default, (
                grad_for(how, 5, 3), p, target, weight, how,
            )  # fmt: skip
            for positive in (None, f(3, low=0.5)):
                yield aten.binary_cross_entropy_with_logits.default, (
                    f(5, 3), target, weight, positive, how,
                )  # fmt: skip
        yield aten.binary_cross_entropy.default, (sure, sure.flip(0), None, how)
    far = torch.tensor([-800.0, -40.0, 0.0, 40.0, 800.0], dtype=torch.float64)
    yield aten.binary_cross_entropy_with_logits.default, (far, torch.ones(5).double())
    for x in (f(5, 3), far):
        yield aten.log_sigmoid_forward.default, (x,)
        buffer = aten.log_sigmoid_forward.default(x)[1]
        yield aten.log_sigmoid_backward.default, (f(*x.shape, high=1.5), x, buffer)


def means():
    x = f(5, 3, 4)
    yield aten.mean.default, (x,)
    yield aten.mean.default, (f(),)
    for dim, keep in (([1], False), ([-1, 0], True), (None, False), ([], True)):
        yield aten.mean.dim, (x, dim, keep)


def norms():
    x, w, b = f(5, 3, 4), f(3), f(3, high=1.5)
    mean, var = f(3, high=0.5), f(3, low=0.5)
    for weight, bias in ((w, b), (None, None)):
        for training in (True, False):
            given = (x, weight, bias, mean, var, training, 0.3, 1e-5)
            yield aten._native_batch_norm_legit_functional.default, given
            if training:
                yield aten.native_batch_norm.default, (x, weight, bias, None, None, True, 0.3, 1e-5)
                yield aten._native_batch_norm_legit.no_stats, (x, weight, bias, True, 0.3, 1e-5)
            else:
                yield aten.native_batch_norm.default, given
        _, saved, invstd = aten._native_batch_norm_legit.no_stats(x, weight, bias, True, 0.3, 1e-5)
        for mask in ((True, True, True), (True, False, False), (False, True, True)):
            if weight is None and mask[1]:
                continue
            yield aten.native_batch_norm_backward.default, (
                f(5, 3, 4, high=1.5), x, weight, None, None, saved, invstd, True, 1e-5, mask,
            )  # fmt: skip
            yield aten.native_batch_norm_backward.default, (
                f(5, 3, 4, high=1.5), x, weight, mean, var, None, None, False, 1e-5, mask,
            )  # fmt: skip
    one = f(1, 3)
    yield aten._native_batch_norm_legit_functional.default, (
        f(2, 3), w, b, mean, var, True, 0.1, 1e-5,
    )  # fmt: skip
    yield aten._native_batch_norm_legit_functional.default, (one, w, b, mean, var, False, 0.1, 1e-5)


def copies():
    for times in ((2, 1, 3), (1, 1, 1), (2, 1, 1, 2), (3, 5, 3, 4)):
        yield aten.repeat.default, (f(5, 3, 4), times)


def choices():
    x, truth = f(5, 3, 4), f(5, 3, 4) > 0.7
    for name, given in {"any": truth, "all": truth | (x > 0)}.items():
        op = getattr(aten, name)
        for call in ((given,), (torch.ones(()).bool(),), (x,)):
            yield op.default, call
        yield op.dim, (given, 1)
        yield op.dim, (given, -1, True)
        yield op.dims, (given, [0, 2])
        yield op.dims, (given, None, True)
    for whole in (truth, torch.ones(3).bool(), torch.zeros(3).bool()):
        yield aten._is_all_true.default, (whole,)
        yield aten._is_any_true.default, (whole,)
    for op in (aten.max.default, aten.min.default):
        yield op, (x,)
        yield op, (torch.arange(5),)
        yield op, (f(),)


def written():
    x, rows, some = f(5, 3, 4), f(5, 3, 1) > 0, f(5, 3, 4) > 0.5
    for mask, source in (
        (rows, f(15, 4)), (rows.expand(5, 3, 4), f(5, 3, 4)), (some, f(60)), (rows[0], f(3, 5, 4)),
        (rows, f(61)),
    ):  # fmt: skip
        yield aten.masked_scatter.default, (x, mask, source)
        yield aten.masked_scatter_backward.default, (f(5, 3, 4, high=1.5), mask, source.shape)
    index = torch.arange(24).reshape(4, 6) % 5
    for how in ("sum", "mean", "amax"):
        for keep in (True, False):
            yield aten.scatter_reduce.two, (f(5, 6), 0, index, f(4, 6), how), {"include_self": keep}


def conjugates():
    z = torch.complex(f(5, 4), f(5, 4))
    yield aten._conj.default, (z,)
    yield aten._neg_view.default, (z.conj().imag,)


CASES = [
    *losses(),
    *likelihoods(),
    *crossentropies(),
    *means(),
    *norms(),
    *copies(),
    *choices(),
    *conjugates(),
]
CASES = [(op, args, {}) for op, args in CASES] + [(*case, {})[:3] for case in written()]


def flat(found):
    return [found] if isinstance(found, Tensor) else list(found)


def test_every_decomposition_is_tried():
    assert {op for op, *_ in CASES} == set(DECOMPOSITIONS)
    taken = {
        op for op, args, how in CASES if DECOMPOSITIONS[op](*args, **how) is not NotImplemented
    }
    assert taken == set(DECOMPOSITIONS)


@pytest.mark.parametrize(
    ("op", "args", "how"), CASES, ids=[f"{op}-{place}" for place, (op, *_) in enumerate(CASES)]
)
def test_it_computes_what_the_op_does(op, args, how):
    """Values that a caller reads; saved statistics that aten leaves empty are not compared."""
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    found = DECOMPOSITIONS[op](*args, **how)
    if found is NotImplemented:
        assert op in PARTLY
        return
    wanted = op(*args, **how)
    for a, b in zip(args, before, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b), "operands are left alone"
    for mine, theirs in zip(flat(found), flat(wanted), strict=True):
        if theirs is None or (mine is not None and mine.numel() != theirs.numel()):
            assert mine is None or op in SCRATCH
            continue
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


PARTLY = {
    aten.nll_loss_forward.default,
    aten.nll_loss_backward.default,
    aten.scatter_reduce.two,
}
"""Of these, some forms are left as they are."""
SCRATCH = {
    aten.log_sigmoid_forward.default,  # its buffer is a kernel's own
    aten.log_sigmoid_backward.default,
    aten.nll_loss_forward.default,  # no count without a reduction
    aten.nll_loss2d_forward.default,
}


# ── through autograd, as the tracer uses them ────────────────────────────────────────────────────

target = torch.tensor([0, 2, 1, 1, 2])
soft = torch.softmax(f(5, 3), -1)


def batch_norm(x, w, b):
    return F.batch_norm(x, None, None, w, b, training=True).pow(3).sum()


LOSSES = {
    "cross entropy": (lambda x: F.cross_entropy(x, target), (f(5, 3),)),
    "smoothed": (lambda x: F.cross_entropy(x, target, label_smoothing=0.1), (f(5, 3),)),
    "ignoring": (lambda x: F.cross_entropy(x, target, ignore_index=1), (f(5, 3),)),
    "weighted": (lambda x, w: F.cross_entropy(x, target, w.detach()), (f(5, 3), f(3, low=0.5))),
    "soft targets": (lambda x: F.cross_entropy(x, soft), (f(5, 3),)),
    "images": (lambda x: F.cross_entropy(x, target.reshape(5, 1, 1)), (f(5, 3, 1, 1),)),
    "mse": (F.mse_loss, (f(5, 3), f(5, 3, high=3.0))),
    "l1": (F.l1_loss, (f(5, 3), f(5, 3, high=3.0))),
    "smooth l1": (F.smooth_l1_loss, (f(5, 3), f(5, 3, high=3.0))),
    "huber": (F.huber_loss, (f(5, 3), f(5, 3, high=3.0))),
    "logits": (lambda x: F.binary_cross_entropy_with_logits(x, soft), (f(5, 3),)),
    "probabilities": (lambda x: F.binary_cross_entropy(x.sigmoid(), soft), (f(5, 3),)),
    "divergence": (
        lambda x: F.kl_div(F.log_softmax(x, -1), soft, reduction="batchmean"), (f(5, 3),),
    ),
    "batch norm": (batch_norm, (f(5, 3, 4), f(3), f(3, high=1.5))),
    "instance norm": (
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b).pow(3).mean(),
        (f(5, 3, 4), f(3), f(3, high=1.5)),
    ),
    "log sigmoid": (lambda x: F.logsigmoid(x).mean(), (f(5, 3),)),
    "mean": (lambda x: x.mean(0).pow(2).mean(), (f(5, 3),)),
}  # fmt: skip


def value_and_gradients(loss):
    def run(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        value = loss(*leaves)
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        return [value, *(g for g in found if g is not None)]

    return run


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_autograds(name):
    loss, tensors = LOSSES[name]
    run = value_and_gradients(loss)
    graph = make_fx(run, decomposition_table=DECOMPOSITIONS)(*tensors)
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    left = called & (
        set(DECOMPOSITIONS) - {aten.nll_loss_forward.default, aten.nll_loss_backward.default}
    )
    assert not left
    for found, wanted in zip(graph(*tensors), run(*tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    for node in graph.graph.nodes:
        place = {aten.nll_loss_forward.default: 3, aten.nll_loss_backward.default: 4}
        if node.target in place:
            how = node.args[place[node.target]]
            assert how != MEAN, "a mean would divide by the local count"
