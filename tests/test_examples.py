"""The examples: jobs that learn as plain torch, since no model of theirs knows of Meshwright."""

from __future__ import annotations

import importlib.util
import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from meshwright import Job
from meshwright.run.data.samples import open_source
from meshwright.run.match import compare
from meshwright.run.weights import export, read
from tests.laws.source import ROOT

SMALL = {"gpt": {"depth": 1, "width": 32, "context": 32, "batch": 16}, "digits": {}, "finetune": {}}


def example(name):
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """The tiny GPT-2 is made here, not in the home folder."""
    return tmp_path_factory.mktemp("cache") / "tiny-gpt2"


def made(name, tiny):
    module = example(name)
    options = {"folder": str(module.tiny_gpt2(tiny))} if name == "finetune" else {}
    return module.job(**SMALL[name], **options)


def mean(result):
    """The loss that the three forms of a result stand for."""
    match result:
        case (total, weight, dict()) | (total, weight):
            return total if isinstance(weight, dict) else total / weight
    return result


def trained(job, steps):
    """Losses of `steps` steps, the model, and the data's source."""
    torch.manual_seed(job.seed)
    model = job.model()
    optimizer = job.optimizer(model)
    schedule = job.schedule(optimizer) if job.schedule else None
    source = open_source(job.data(), batch_size=job.batch_size, seed=job.seed)
    losses = []
    for _, batch in zip(range(steps), source.batches(), strict=False):
        loss = mean(job.loss(model, batch.tree))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("name", SMALL)
def test_an_example_learns(name, tiny):
    job = made(name, tiny)
    losses, model = trained(job, 40)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    held_out = open_source(job.evaluation(), batch_size=job.batch_size, seed=0, training=False)
    model.eval()
    with torch.no_grad():
        assert mean(job.loss(model, next(held_out.batches()).tree)) < losses[0]


@pytest.mark.parametrize("name", SMALL)
def test_a_job_function_has_a_type_and_a_default_for_every_set_key(name):
    function = example(name).job
    assert function.__doc__
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        assert parameter.default is not parameter.empty
        assert parameter.annotation in (int, float, str, int | None)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_can_be_built_on_the_meta_device(name, tiny):
    job = made(name, tiny)
    with torch.device("meta"):
        model = job.model()
    assert all(value.is_meta for value in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_a_script_is_free_of_devices_and_ranks(name):
    text = (ROOT / f"examples/{name}.py").read_text(encoding="utf-8").lower()
    code = text.split('"""', 2)[2]
    for word in ("distributed", "cuda", "rank ==", "world_size", "environ", "ddp", "fsdp"):
        assert word not in code


def test_the_gpt_predicts_the_next_byte_and_sees_no_later_one():
    gpt = example("gpt")
    window = gpt.training_set(64)[3]
    assert torch.equal(window["x"][1:], window["y"][:-1])
    model = gpt.GPT(depth=2, width=32, context=64).eval()
    changed = window["x"].clone()
    changed[40:] = 0
    assert_close(model(window["x"][None])[:, :40], model(changed[None])[:, :40])


def test_the_gpts_corpus_is_the_same_each_time_and_held_out_files_are_apart():
    gpt = example("gpt")
    training, held_out = gpt.corpus(held_out=False), gpt.corpus(held_out=True)
    assert len(training) > 5_000_000
    assert training == gpt.corpus(held_out=False)
    assert held_out[:2000] not in training


def test_tied_weights_are_one_parameter():
    model = example("gpt").GPT(depth=1, width=32, context=8, tied=True)
    assert model.head.weight is model.token.weight


def test_digits_reports_accuracy_as_sum_and_weight(tiny):
    job = made("digits", tiny)
    batch = next(open_source(job.data(), batch_size=64, seed=0).batches()).tree
    _, metrics = job.loss(job.model(), batch)
    right, count = metrics["accuracy"]
    assert 0 <= right <= count == 64


def test_digits_takes_normalize_over():
    assert example("digits").job(normalize_over=16).normalize_over == 16


def test_finetune_freezes_embeddings_and_counts_answers_only(tiny):
    job = made("finetune", tiny)
    model = job.model()
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"transformer.wte.weight", "transformer.wpe.weight"}
    trained_ones = {id(p) for g in job.optimizer(model).param_groups for p in g["params"]}
    assert trained_ones == {id(p) for p in model.parameters() if p.requires_grad}
    module = example("finetune")
    batch = module.collate([("17+25=", "42"), ("1+1=", "2")])
    assert bytes(batch["tokens"][0].tolist()) == b"17+25=42\0\0\0\0"
    assert (batch["labels"] != module.IGNORED).sum(1).tolist() == [3, 2]


def test_finetune_builds_the_same_folder_each_time_and_only_once(tmp_path):
    module = example("finetune")
    one = module.tiny_gpt2(tmp_path / "a" / "gpt2")
    other = module.tiny_gpt2(tmp_path / "b" / "gpt2")
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    before = (one / "model.safetensors").stat().st_mtime_ns
    assert module.tiny_gpt2(one) == one
    assert (one / "model.safetensors").stat().st_mtime_ns == before


def test_finetune_leaves_the_folder_of_the_rank_that_was_first(tmp_path, monkeypatch):
    """The other rank's folder appears while this one's is made."""
    module = example("finetune")
    first = module.tiny_gpt2(tmp_path / "gpt2")
    later = iter([False, True])
    monkeypatch.setattr(module.Path, "exists", lambda path: next(later))
    assert module.tiny_gpt2(first) == first
    assert [file.name for file in tmp_path.iterdir()] == ["gpt2"]


def test_finetune_warms_up_and_decays():
    factors = [example("finetune").warm_up_and_cosine(s, 100, 10) for s in (0, 9, 10, 55, 100, 200)]
    assert_close(factors, [0.1, 1.0, 1.0, 0.55, 0.1, 0.1])


def filled(model, weights):
    """`model` with the values of `weights`, as a run fills it."""
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    tied = {"lm_head.weight": "transformer.wte.weight"}
    found = compare(weights.shapes(), shapes, tied, where="weights")
    assert (found.fresh, found.unused) == ((), ())
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(weights.tensor(found.sources[name]))
    return model


def test_what_finetune_exports_loads_in_transformers(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    job = made("finetune", tiny)
    model: nn.Module = filled(job.model(), read(job.weights)).eval()
    tokens = torch.arange(10)[None]
    pretrained = AutoModelForCausalLM.from_pretrained(tiny).eval()
    assert_close(model(input_ids=tokens).logits, pretrained(input_ids=tokens).logits)
    out = export(tmp_path / "out", model.named_parameters(), tiny)
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert_close(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_every_example_makes_a_job(tiny):
    assert all(isinstance(made(name, tiny), Job) for name in SMALL)


def test_the_gan_makes_images_that_are_more_like_digits(tiny):
    gan = example("gan")
    job = gan.job(width=64)
    torch.manual_seed(0)
    model, real = job.model(), job.data().tensors[0]
    optimizers = {name: phase.optimizer(model) for name, phase in job.phases.items()}

    def apart():
        """How far the made images' mean and spread per pixel are from those of real ones."""
        with torch.no_grad():
            made = model.made(500)
        off = (made.mean(0) - real.mean(0)).abs() + (made.std(0) - real.std(0)).abs()
        return float(off.mean())

    before = apart()
    source = open_source(job.data(), batch_size=job.batch_size, seed=0)
    for step, batch in zip(range(300), source.batches(), strict=False):
        name = job.phase_at(step)
        model.zero_grad()
        mean(job.phases[name].loss(model, batch.tree)).backward()
        optimizers[name].step()
    assert apart() < 0.6 * before
