"""`mw checkpoint`: what is in a checkpoint, whether it is whole, and other formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from meshwright.cli.output import log, print_json, show
from meshwright.cli.told import Task
from meshwright.cli.words import AsJson, Settings
from meshwright.plan.size import parse_bytes

__all__ = ["app"]

app = typer.Typer(
    name="checkpoint",
    help="Look into checkpoints, verify them, turn them into other formats and back.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INSPECT = "Example:  mw checkpoint inspect runs/gpt-001"
VERIFY = "Example:  mw checkpoint verify runs/gpt-001"
CONVERT = "Example:  mw checkpoint convert model.pt out --map 'module.*=*'"
EXPORT = "Example:  mw checkpoint export runs/gpt-001 out --to safetensors"


class Format(StrEnum):
    """What can be written."""

    meshwright = "meshwright"
    safetensors = "safetensors"
    dcp = "dcp"
    universal = "universal"
    torch = "torch"


_FORMATS = "meshwright, safetensors, dcp (torch's), universal (DeepSpeed's), torch (a file)."

Source = Annotated[
    Path,
    typer.Argument(
        metavar="FROM",
        help="A run, a checkpoint, or a folder or file of another format.",
        show_default=False,
    ),
]
To = Annotated[
    Path, typer.Argument(metavar="TO", help="A folder that is new or empty.", show_default=False)
]
Step = Annotated[
    int | None,
    typer.Option("--step", min=0, metavar="K", help="Of a run's.", show_default="newest"),
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="OLD=NEW",
        help="Rename tensors; [bold]*[/] is any text, nothing for NEW leaves them out. May be "
        "given again.",
        show_default=False,
    ),
]
Partial = Annotated[
    bool, typer.Option("--partial", help="With --like: take what fits, though some is missing.")
]
Like = Annotated[
    str | None,
    typer.Option(
        "--like",
        metavar="WHAT",
        help="What it must fit: a job's [bold]FILE[:NAME][/], or another checkpoint.",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FOLDER",
        help="Whose config.json and tokenizer go along, for safetensors.",
        show_default="FROM",
    ),
]
ShardSize = Annotated[
    str, typer.Option("--shard-size", metavar="SIZE", help="Most of one file, for safetensors.")
]
Skip = Annotated[
    bool,
    typer.Option(
        "--skip-objects", help="Of a torch file, leave out what is neither tensor nor plain."
    ),
]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be written."""

    source: Path
    to: Path
    form: Format | None
    step: int | None
    maps: tuple[str, ...]
    like: str | None
    settings: tuple[str, ...]
    partial: bool
    config: Path | None
    shard_size: str
    skip: bool
    json: bool


@app.command("inspect", epilog=INSPECT)
def inspect(
    source: Source,
    *,
    names: Annotated[
        str | None,
        typer.Option(
            "--names", metavar="PATTERN", help="List these, with optimizer state.",
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every layer on its own.")] = False,
    step: Step = None,
    skip_objects: Skip = False,
    json: AsJson = False,
) -> Task:  # fmt: skip
    """Show what a checkpoint of any format holds; no values are read."""
    return partial(_ended, _inspect, source, names, every, step, skip_objects, json)


@app.command("verify", epilog=VERIFY)
def verify(
    source: Source, *, step: Step = None, skip_objects: Skip = False, json: AsJson = False
) -> Task:
    """Compare every byte with its digest; of a run, all its checkpoints."""
    return partial(_ended, _verify, source, step, skip_objects, json)


@app.command("convert", epilog=CONVERT)
def convert(
    source: Source,
    to: To,
    *,
    form: Annotated[
        Format | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help=_FORMATS,
            show_default="meshwright; safetensors where there are weights only",
        ),
    ] = None,
    step: Step = None,
    maps: Map = None,
    like: Like = None,
    settings: Settings = None,
    take_part: Partial = False,
    config: Config = None,
    shard_size: ShardSize = "5GB",
    skip_objects: Skip = False,
    json: AsJson = False,
) -> Task:
    """Turn a checkpoint or weights of any format into another; pickles are read, never run."""
    return partial(
        _ended,
        _convert,
        _Wanted(
            source, to, form, step, tuple(maps or ()), like, tuple(settings or ()), take_part,
            config, shard_size, skip_objects, json,
        ),
    )  # fmt: skip


@app.command("export", epilog=EXPORT)
def export(
    source: Source,
    to: To,
    *,
    form: Annotated[
        Format, typer.Option("--to", metavar="FORMAT", help=_FORMATS)
    ] = Format.safetensors,
    step: Step = None,
    maps: Map = None,
    config: Config = None,
    shard_size: ShardSize = "5GB",
    json: AsJson = False,
) -> Task:
    """Write a run's checkpoint for others to read; the model is not built."""
    return partial(
        _ended,
        _convert,
        _Wanted(
            source, to, form, step, tuple(maps or ()), None, (), False, config, shard_size, False,
            json,
        ),
    )  # fmt: skip


def _ended(act: Callable[..., int], *given: Any) -> int:
    """The exit status; what is wrong with a checkpoint is told whole."""
    from meshwright.errors import StorageError

    try:
        return act(*given)
    except StorageError as error:
        log(f"mw: {error}")
        return error.exit_status


def _inspect(
    path: Path, names: str | None, every: bool, step: int | None, skip: bool, json: bool
) -> int:
    from meshwright.run.foreign.convert import open_source
    from meshwright.run.foreign.told import told
    from meshwright.view.checkpoints import contents_table

    found = told(open_source(_at(path, step), skip_objects=skip))
    if json:
        print_json(found)
    else:
        show(contents_table(found, pattern=names, every=every))
    return 0


def _at(path: Path, step: int | None) -> Path:
    """The checkpoint of `step` in a run, or the newest."""
    from meshwright.errors import UsageError
    from meshwright.run.imported import checkpoint_in

    found = checkpoint_in(path, step) if path.is_dir() else None
    if step is not None and (found is None or found == path):
        raise UsageError(f"--step {step}, but {path} is no run, nor a folder of its checkpoints")
    return found or path


def _verify(path: Path, step: int | None, skip: bool, json: bool) -> int:
    from meshwright.errors import StorageError
    from meshwright.run.foreign.convert import checked
    from meshwright.run.imported import checkpoints_in
    from meshwright.view.checkpoints import checked_table

    paths = [_at(path, step)] if step is not None else checkpoints_in(path)
    found = [checked(one, skip_objects=skip) for one in paths]
    if json:
        print_json({"whole": all(one["whole"] for one in found), "checkpoints": found})
    else:
        show(checked_table(found))
    return 0 if all(one["whole"] for one in found) else StorageError.exit_status


def _convert(wanted: _Wanted) -> int:
    from meshwright.errors import UsageError
    from meshwright.run.foreign.convert import convert as write
    from meshwright.run.foreign.convert import open_source, usual_format
    from meshwright.run.foreign.fit import fitted
    from meshwright.run.foreign.rename import parse_rules, renamed
    from meshwright.run.foreign.told import difference_told
    from meshwright.view.checkpoints import written_table

    rules = parse_rules(wanted.maps)
    limit = _shard_bytes(wanted.shard_size)
    _require_sense(wanted)
    opened = open_source(_at(wanted.source, wanted.step), skip_objects=wanted.skip)
    named = renamed(opened, rules)
    source, difference = named.source, None
    if opened.items and not source.items:
        raise UsageError(f"--map leaves out all of {opened.path}; nothing would be written")
    if wanted.like is not None:
        items, tied = _wanted_items(wanted.like, wanted.settings)
        source, difference = fitted(source, items, partial=wanted.partial, tied=tied)
    how = opened.check()
    form = usual_format(source) if wanted.form is None else wanted.form.value
    made = write(source, wanted.to, form, config=wanted.config, shard_bytes=limit)
    found: dict[str, Any] = {
        "from": str(opened.path),
        "to": str(made.path),
        "format": made.format,
        "step": source.step,
        "tensors": made.tensors,
        "bytes": made.bytes,
        "checked": how,
        "left_out": list(made.left_out),
        **difference_told(named, difference),
        "notes": list(opened.notes),
    }
    if wanted.json:
        print_json(found)
    else:
        show(written_table(found))
    return 0


def _shard_bytes(text: str) -> int:
    """Most bytes of one file."""
    from meshwright.errors import UsageError

    limit = parse_bytes(text, "--shard-size")
    if limit < 1:
        raise UsageError(f"--shard-size {text} leaves no room for a tensor; give it as in 5GB")
    return limit


def _require_sense(wanted: _Wanted) -> None:
    """Refuse words that would be passed over."""
    from meshwright.errors import UsageError

    if wanted.like is None and (wanted.partial or wanted.settings):
        what = "--partial takes what fits" if wanted.partial else "--set is for a job's file"
        raise UsageError(f"{what}, but nothing says what must fit; add --like WHAT")
    if wanted.config is not None and not wanted.config.exists():
        raise UsageError(f"--config {wanted.config}: there is nothing; name a folder, or leave it")


def _wanted_items(like: str, settings: tuple[str, ...]) -> tuple[Any, Any]:
    """Names, shapes and tied names of a job's model, or of another checkpoint."""
    from meshwright.cli.words import Which
    from meshwright.run.foreign.convert import open_source
    from meshwright.run.foreign.model import model_items

    if ".py" in Path(like).name:
        return model_items(Which(like, settings).load())
    source = open_source(_at(Path(like), None))
    return source.items, source.tied
