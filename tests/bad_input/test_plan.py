"""Plans that cannot be: for the world, the batch, by their names, in text and in TOML."""

from __future__ import annotations

import pytest

from tests.bad_input.jobs import write_job

VERBS = ("train", "verify", "plan")


@pytest.fixture(autouse=True)
def job_file(folder):
    write_job(folder / "job.py")


@pytest.mark.parametrize("verb", VERBS)
def test_a_plan_of_more_ranks_than_there_are(mw, folder, verb):
    mw(verb, "job.py", "--plan", "data=3,pipeline=2", "-n", 4).fails(
        2, "plan asks for data=3 x pipeline=2 = 6 ranks, but the world has 4", "start 6 ranks"
    )
    assert not (folder / "runs").exists()


def test_a_plan_that_does_not_divide_the_world(mw):
    mw("train", "job.py", "--plan", "tensor=2", "-n", 3).fails(2, "tensor=2", "3")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("zero4", ("'zero4'", "did you mean 'zero3'?")),
        ("micrbatches=2", ("'micrbatches'", "did you mean 'microbatches'?")),
        ("data=two", ("data takes a whole number", "'two'")),
        ("data=0", ("data=0", "from 1")),
        ("data=1,data=2", ("sets data twice",)),
        ("plans/none.toml", ("plans/none.toml cannot be read", "No such file")),
    ],
)
def test_a_plan_that_says_nothing(mw, verb, plan, words):
    mw(verb, "job.py", "--plan", plan).fails(2, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "data = 1\nmicrobatch = 2\n",
            ("unknown key 'microbatch'", "did you mean 'microbatches'?"),
        ),
        ("data = '1'\n", ("data takes a whole number", "not '1'")),
        ("data = true\n", ("data takes a whole number",)),
        ("data == 1\n", ("is not TOML", "line 1")),
        ("data = 1\ndata = 1\n", ("is not TOML",)),
    ],
)
def test_a_plan_file_with_a_mistake(mw, folder, text, words):
    (folder / "plan.toml").write_text(text)
    mw("train", "job.py", "--plan", "plan.toml").fails(2, "plan.toml", *words)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("microbatches=9", ("microbatches=9", "batch_size=8", "use microbatches=8 or fewer")),
        (
            "precision=float16",
            ("precision=float16", "precision=bf16-pure only; write precision=fp16"),
        ),
    ],
)
def test_a_plan_that_this_job_or_version_cannot_have(mw, plan, words):
    mw("train", "job.py", "--plan", plan).fails(2, *words)


def test_a_batch_of_fewer_samples_than_ranks(mw, folder):
    write_job(folder / "job.py", batch_size="2")
    words = ("batch_size=2 has fewer samples than data=4 has ranks", "use data=2 or fewer")
    mw("verify", "job.py", "-n", 4).fails(2, *words)
    mw("plan", "job.py", "-n", 4).fails(2, *words)


def test_a_plan_that_the_environment_contradicts(mw, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_PLAN", "zero1")
    mw("train", "job.py", "--plan", "zero3").fails(2, "MESHWRIGHT_PLAN is 'zero1'", "unset it")


def test_what_eager_cannot_do(mw):
    mw("train", "job.py", "--plan", "zero1", "--eager").fails(2, "zero=1", "use zero=0")


def test_batch_norm_in_micro_batches(mw, folder):
    write_job(
        folder / "job.py",
        model="lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))",
        normalize_over="4",
    )
    mw("train", "job.py").fails(2, "normalize_over=4", "microbatches=2")


UNRULED = """
@torch.library.custom_op("bad::scan", mutates_args=())
def scan(x: torch.Tensor) -> torch.Tensor:
    return torch.cumsum(x, 0)


@scan.register_fake
def _(x):
    return torch.empty_like(x)


scan.register_autograd(lambda ctx, g: torch.flip(torch.cumsum(torch.flip(g, (0,)), 0), (0,)))


class Scanned(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(torch.ops.bad.scan(self.first(x)))
"""


@pytest.mark.parametrize("verb", VERBS)
def test_an_op_without_a_rule_that_would_gather_more_than_the_plan_allows(mw, folder, verb):
    write_job(folder / "job.py", UNRULED, model="Scanned")
    said = mw(verb, "job.py", "--plan", "data=2,max_fallback=0", "-n", 2).fails(
        2,
        "bad::scan at ",
        "job.py:",
        "has no rule",
        "256 B a step" if verb == "verify" else "128 B a step",  # in float64
        'mw.rule("bad::scan", "n a -> n a"',
    )
    assert "max_fallback=1" in said


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_a_plan_that_a_rank_has_no_memory_for(mw, folder, verb):
    mw(verb, "job.py", "--plan", "data=2", "--memory", "100B").fails(
        2, "plan data=2 needs ", "but there are 100 B", "weights", "fits"
    )
    assert not (folder / "runs").exists()


def test_a_plan_that_a_rank_has_memory_for_is_trained(mw):
    mw("train", "job.py", "--plan", "data=1", "--memory", "1MiB").works("step 3/3")
    mw("train", "job.py", "--eager", "--memory", "1MiB").fails(2, "--memory", "--eager traces")


ANNOTATED = """
class Model(Model):
    def forward(self, x):
        h = mw.annotate(self.first(x), {words})
        return self.last(h)
"""


@pytest.mark.parametrize(
    ("verb", "given", "words"),
    [
        ("train", "None, 'tensr'", "names the mesh axis 'tensr'; did you mean 'tensor'?"),
        ("verify", "None, 'tensor', whole='tensor'", "names the mesh axis tensor twice"),
        ("plan", "3", "names the mesh axis 3; known: context, data"),
        (
            "plan",
            "None, None, 'tensor'",
            "names 3 dims of a tensor of shape [8, 8]; name 2 or fewer",
        ),
    ],
)
def test_an_annotation_that_cannot_be(mw, folder, verb, given, words):
    write_job(folder / "job.py", ANNOTATED.format(words=given))
    mw(verb, "job.py", "--plan", "tensor=1", "-n", 1).fails(2, "job.py:", f"annotate {words}")


@pytest.mark.parametrize(
    ("layouts", "words"),
    [
        (
            '"frist.weight" = ["tensor", "none"]',
            "matches no parameter; did you mean 'first.weight'",
        ),
        ('"first.*" = ["tensr", "none"]', "tensr"),
        (
            '"first.weight" = ["tensor", "tensor"]',
            "splits dims 0 and 1 over tensor; an axis splits",
        ),
        ('"first.weight" = ["tensor"]', "names 1 dims, but first.weight has 2: [8, 4]"),
        ('"last.weight" = ["tensor", "none"]', "it has 1 elements; use tensor=1"),
    ],
)
def test_a_layout_of_parameters_that_cannot_be(mw, folder, layouts, words):
    (folder / "plan.toml").write_text(f"tensor = 2\n[layouts]\n{layouts}\n")
    mw("plan", "job.py", "--plan", "plan.toml", "-n", 2).fails(2, "layout", words)


def test_a_plan_over_its_budget(mw):
    mw("plan", "job.py", "--plan", "data=2", "--max-bytes", "10B").fails(
        2, "moves ", "the budget is 10 B", "all_reduce over data", "to move less:"
    )
