"""The form of a job's first step, looked at before anything is initialised."""

from __future__ import annotations

from typing import Any

from meshwright.compile.example import example_of
from meshwright.job import Job
from meshwright.run.build import Build, Micro, micro_ranges
from meshwright.run.data.samples import Source, open_source

__all__ = ["first_micros"]


def first_micros(build: Build, data: Any = None) -> list[Micro]:
    """The forms of the first step's micro-batches, from rank 0's samples of it.

    Args:
        build: of the job and plan.
        data: what `job.data()` returned, where it was called already; a stream is opened anew,
            since what is read of it is gone.
    """
    source = _open(build.job, data)
    try:
        ranges = micro_ranges(build.job.batch_size, build.plan.microbatches)
        return [_form(build, source, range_) for range_ in ranges]
    finally:
        source.close()


def _open(job: Job, data: Any) -> Source:
    def opened(data: Any) -> Source:
        return open_source(data, batch_size=job.batch_size, seed=job.seed, collate=job.collate)

    if data is not None:
        source = opened(data)
        if source.length is not None:
            return source
        source.close()
    return opened(job.data())


def _form(build: Build, source: Source, range_: tuple[int, int]) -> Micro:
    start, stop = range_
    batch = source.fetch(0, *build.samples_of(0, range_), range_)
    return Micro(example_of(batch.tree)[0], stop - start)
