"""The world contract: which rank this process is, of how many, and where they meet.

Torchrun's environment variables are the contract. Where they are missing, Slurm's, Open MPI's and
PMI's are read. A process with none of them is a world of one.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meshwright.comm.base import World
from meshwright.errors import UsageError, nearest

__all__ = ["Contract", "here", "read", "write"]

RUN_DIR = "MESHWRIGHT_RUN_DIR"
PLAN = "MESHWRIGHT_PLAN"
OFFLOAD = "MESHWRIGHT_OFFLOAD"
TIMEOUT = "MESHWRIGHT_TIMEOUT"
STORE_FD = "MESHWRIGHT_STORE_FD"
TOKEN_FD = "MESHWRIGHT_TOKEN_FD"
TOKEN_FILE = "MESHWRIGHT_TOKEN_FILE"
ATTEMPT = "MESHWRIGHT_ATTEMPT"
COMM = "MESHWRIGHT_COMM"

_COMMS = ("gloo", "shared")
_TOKEN_BYTES = 256
_FIRST_PORT, _PORTS = 20_000, 12_000


@dataclass(frozen=True, slots=True)
class Contract:
    """Everything a process is told about its world.

    Attributes:
        world: this rank, the world's size, and the same within this host.
        engine: who started the processes: `meshwright`, `torchrun`, `slurm`, `openmpi`, `pmi`, or
            `none` for a world of one.
        address: host of the store; empty for a world of one.
        port: the store's port.
        token: hex text that all ranks hold, never printed; None where the engine gives none.
        run_dir: the run's folder, if it has been chosen.
        plan: a plan's text that overrides the script's.
        store_fd: an inherited listening socket for rank 0's store.
        hosted: torchrun's agent runs the store.
        attempt: tells restarts of one world apart.
        timeout: seconds for every wait, in place of the defaults.
        comm: what carries the data, `shared` or `gloo`; None lets `connect` choose.
        offload: the folder of what is offloaded to disk.
    """

    world: World = field(default_factory=World)
    engine: str = "none"
    address: str = ""
    port: int = 0
    token: str | None = field(default=None, repr=False)
    run_dir: Path | None = None
    plan: str | None = None
    store_fd: int | None = None
    hosted: bool = False
    attempt: str = "0"
    timeout: float | None = None
    comm: str | None = None
    offload: Path | None = None

    @property
    def supervised(self) -> bool:
        """Whether our own launcher watches this process and prints its failure."""
        return self.engine == "meshwright"


@dataclass(frozen=True, slots=True)
class _Names:
    """The variables of one engine; `sign` tells that the engine did start this process."""

    engine: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    sign: str
    job: str = ""


_ENGINES = (
    _Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", ""),
    # SLURM_PROCID is also set in a batch script, which is no rank; the step is set under srun only.
    _Names("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "", "SLURM_STEP_ID",
           "SLURM_JOB_ID"),
    _Names("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
           "OMPI_COMM_WORLD_LOCAL_SIZE", "", "PMIX_NAMESPACE"),
    _Names("pmi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", "", "PMI_ID"),
)  # fmt: skip


def here() -> Contract:
    """The contract of this process, from its environment."""
    return read(os.environ)


def read(environ: Mapping[str, str]) -> Contract:
    """The contract that `environ` states.

    Raises:
        UsageError: a variable is missing beside its sister, is no number, or contradicts another;
            the message names the variables and their values.
    """
    names = next((names for names in _ENGINES if _started(names, environ)), None)
    common = {
        "run_dir": Path(environ[RUN_DIR]) if environ.get(RUN_DIR) else None,
        "plan": environ.get(PLAN) or None,
        "offload": Path(environ[OFFLOAD]) if environ.get(OFFLOAD) else None,
        "timeout": _seconds(environ),
        "comm": _comm(environ),
    }
    if names is None:
        return Contract(**common)  # type: ignore[arg-type]
    world = _world(names, environ)
    if world.size == 1:
        return Contract(world, _engine(names, environ), **common)  # type: ignore[arg-type]
    address, port = _meeting(names, world, environ)
    return Contract(
        world,
        _engine(names, environ),
        address,
        port,
        token=_token(environ),
        store_fd=_number(environ, STORE_FD) if world.rank == 0 and STORE_FD in environ else None,
        hosted=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_attempt(environ),
        **common,  # type: ignore[arg-type]
    )


def write(contract: Contract, token_fd: int | None) -> dict[str, str]:
    """The variables that `read` turns back into `contract`; its token is behind `token_fd`."""
    world = contract.world
    found = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size,
        "MASTER_ADDR": contract.address,
        "MASTER_PORT": contract.port,
        TOKEN_FD: token_fd,
        STORE_FD: contract.store_fd,
        RUN_DIR: contract.run_dir,
        PLAN: contract.plan,
        OFFLOAD: contract.offload,
        TIMEOUT: contract.timeout,
        COMM: contract.comm,
        ATTEMPT: contract.attempt,
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _started(names: _Names, environ: Mapping[str, str]) -> bool:
    if names.sign and names.sign not in environ:
        return False
    found = [name for name in (names.rank, names.size) if name in environ]
    if len(found) == 1:
        missing = names.size if found[0] == names.rank else names.rank
        raise UsageError(
            f"{found[0]} is {environ[found[0]]!r} but {missing} is not set; a rank needs both: "
            f"set {missing}, or unset {found[0]} for a world of one"
        )
    return len(found) == 2


def _engine(names: _Names, environ: Mapping[str, str]) -> str:
    return "meshwright" if TOKEN_FD in environ and names.rank == "RANK" else names.engine


def _world(names: _Names, environ: Mapping[str, str]) -> World:
    rank, size = _number(environ, names.rank), _number(environ, names.size)
    if size < 1 or rank >= size:
        raise UsageError(
            f"{names.rank}={rank} and {names.size}={size}: ranks go from 0 to {names.size} - 1"
        )
    local_rank, local_size = _local(names, rank, size, environ)
    # Open MPI numbers the ranks of one host in an order of its own.
    ahead = local_rank > rank and local_size < size
    if local_rank >= local_size or local_size > size or ahead:
        raise UsageError(
            f"local rank {local_rank} of {local_size} on this host does not fit rank {rank} of "
            f"{size}; set {names.local_rank} and {names.local_size or names.local_rank}, or neither"
        )
    return World(rank, size, local_rank, local_size)


def _local(names: _Names, rank: int, size: int, environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and size within this host."""
    has_rank = names.local_rank in environ
    if names.engine == "slurm" and has_rank:
        local_rank = _number(environ, names.local_rank)
        return local_rank, _slurm_tasks(environ, default=max(local_rank + 1, 1))
    has_size = names.local_size in environ
    if has_rank and has_size:
        return _number(environ, names.local_rank), _number(environ, names.local_size)
    if has_rank or has_size:
        found, missing = names.local_rank, names.local_size
        if has_size:
            found, missing = missing, found
        raise UsageError(
            f"{found} is {environ[found]!r} but {missing} is not set; set both or neither"
        )
    one_host = environ.get("MASTER_ADDR", "127.0.0.1") in {"127.0.0.1", "localhost", "::1"}
    return (rank, size) if one_host else (0, 1)


def _slurm_tasks(environ: Mapping[str, str], default: int) -> int:
    """Tasks on this node, from text such as `4(x2),3` and this node's place in it."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(environ["SLURM_NODEID"]) if environ.get("SLURM_NODEID", "").isdigit() else 0
    return counts[node] if node < len(counts) else default


def _meeting(names: _Names, world: World, environ: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of the store."""
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if names.engine == "torchrun":
        for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
            if not value:
                raise UsageError(
                    f"WORLD_SIZE={world.size} but {name} is not set; ranks meet at "
                    "MASTER_ADDR:MASTER_PORT: set both on every rank, or start with `mw launch`"
                )
    if not address:
        address = _first_host(names, world, environ)
    if port:
        number = _number(environ, "MASTER_PORT")
        if not 0 < number < 1 << 16:
            raise UsageError(f"MASTER_PORT is {number}; ports go from 1 to 65535")
        return address, number
    # Nobody can be asked, yet all ranks must name the same port: it follows from the job's name.
    job = environ.get(names.job) or f"{names.engine}/{os.getuid()}"
    digest = hashlib.sha256(job.encode()).digest()
    return address, _FIRST_PORT + int.from_bytes(digest[:4], "big") % _PORTS


def _first_host(names: _Names, world: World, environ: Mapping[str, str]) -> str:
    if world.local_size == world.size:
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if names.engine == "slurm" and nodes:
        match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
        if match:
            return match[1] + (match[2] or "") + (match[3] or "")
    raise UsageError(
        f"{world.size} ranks on several hosts, started by {names.engine}, but MASTER_ADDR is not "
        "set; set it on every rank to the address of rank 0's host"
    )


def _token(environ: Mapping[str, str]) -> str | None:
    if TOKEN_FD in environ:
        fd = _number(environ, TOKEN_FD)
        try:
            token = os.pread(fd, _TOKEN_BYTES, 0).decode()
        except OSError as error:
            raise UsageError(
                f"{TOKEN_FD}={fd} cannot be read ({error.strerror}): the launcher's file "
                "descriptor did not reach this process; start it without closing descriptors"
            ) from None
        os.set_inheritable(fd, False)  # noqa: FBT003  programs that this one starts need not know
        return token
    if TOKEN_FILE in environ:
        return _token_file(Path(environ[TOKEN_FILE]))
    return None


def _token_file(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        token = path.read_text().strip()
    except OSError as error:
        raise UsageError(f"{TOKEN_FILE}={path} cannot be read: {error.strerror}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            f"{TOKEN_FILE}={path} may be read by others (mode {stat.S_IMODE(mode):o}); "
            f"run: chmod 600 {path}"
        )
    if not token:
        raise UsageError(f"{TOKEN_FILE}={path} is empty; write 32 random hex bytes into it")
    return token


def _attempt(environ: Mapping[str, str]) -> str:
    run = environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return environ.get(ATTEMPT, "0")
    return f"{run}.{environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _seconds(environ: Mapping[str, str]) -> float | None:
    text = environ.get(TIMEOUT)
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{TIMEOUT} is {text!r}; it is a positive number of seconds, such as 300")
    return seconds


def _comm(environ: Mapping[str, str]) -> str | None:
    text = environ.get(COMM) or None
    if text is not None and text not in _COMMS:
        raise UsageError(
            f"{COMM} is {text!r}; {nearest(text, _COMMS)} (unset, ranks of one host share memory)"
        )
    return text


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UsageError(f"{name} is {text!r}; it must be a whole number from 0 up")
    return int(text)
