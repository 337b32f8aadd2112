"""The store through which ranks find each other, opened with care.

torch's `TCPStore` asks nobody for a credential and by default listens on every interface. Here it
gets a socket that is bound to one address, and before anything else each rank and the store's owner
prove to one another that they hold the job's token (an HMAC challenge both ways). What follows
lives under a prefix derived from the token.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from meshwright.comm.base import World
from meshwright.errors import PeerLost, Stalled, UsageError

__all__ = ["Rendezvous", "await_keys", "is_loopback", "open_store", "own_address"]

_CLIENT_WAIT = 0.5
_ANSWER_WITHIN = 30.0
_READ_WITHIN = 2.0
_FIRST_PAUSE, _LAST_PAUSE = 0.002, 0.1


_KEPT: dict[tuple[str, int, int], tuple[TCPStore, int]] = {}
"""(address, port, rank) -> the store that this process has open there, and how often it met."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where and how the ranks of one start meet.

    Attributes:
        address: host name or address of the store.
        port: its port.
        token: hex text that all ranks hold, or None where the engine gives no secret.
        listen_fd: a listening socket for rank 0's store; None makes rank 0 bind one itself.
        hosted: the store is run by somebody else (torchrun's agent): rank 0 is a client, too.
        attempt: names this start of the world, so that a restart reads nothing of an older one.
        seconds: how long to wait for the other ranks.
    """

    address: str
    port: int
    token: str | None = field(default=None, repr=False)
    listen_fd: int | None = None
    hosted: bool = False
    attempt: str = "0"
    seconds: float = 1800.0


def open_store(world: World, where: Rendezvous) -> tuple[Store, TCPStore]:
    """Open the store and prove the token; returns this meeting's private part, and the whole.

    A process that meets again (a second run in one script) finds the store that it kept open, and
    a part of it that nobody has used.

    Raises:
        UsageError: the address does not resolve, the port is taken, or tokens differ.
        Stalled: no store answered in `where.seconds`.
    """
    place = (where.address, where.port, world.rank)
    root, meetings = _KEPT.pop(place, (None, 0))
    if root is None:
        root = _serve(world, where) if world.rank == 0 and not where.hosted else _join(world, where)
    _KEPT[place] = root, meetings + 1
    prefix = f"meshwright/{where.attempt}/{world.epoch}/{meetings}"
    if where.token is not None:
        _challenge(PrefixStore(f"{prefix}/hello", root), world, where.token, where.seconds)
        prefix = _proof(where.token, "store", prefix)
    return PrefixStore(prefix, root), root


def await_keys(store: Store, keys: list[str], seconds: float) -> bool:
    """Whether all `keys` are set within `seconds`.

    By asking again and again: `Store.wait` hears no signals, and warns whenever it is late.

    Raises:
        DistError: the store is gone.
    """
    end = time.monotonic() + seconds
    pause = _FIRST_PAUSE
    while not store.check(keys):
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LAST_PAUSE)
    return True


def is_loopback(address: str) -> bool:
    """Whether `address` (a name or a number) is this machine talking to itself.

    Raises:
        UsageError: it does not resolve.
    """
    try:
        number = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        raise UsageError(
            f"MASTER_ADDR is {address!r}, which does not resolve ({error.strerror}); "
            "give the address of rank 0's host, or 127.0.0.1 for one host"
        ) from None
    return ipaddress.ip_address(number).is_loopback


def own_address(address: str, port: int) -> str:
    """This machine's address as seen on the way to `address`; nothing is sent."""
    if is_loopback(address):
        return "127.0.0.1"
    family = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        return str(probe.getsockname()[0])


def _serve(world: World, where: Rendezvous) -> TCPStore:
    listen_fd = where.listen_fd if where.listen_fd is not None else _bind(where.address, where.port)
    return TCPStore(
        where.address,
        where.port,
        world.size,
        is_master=True,
        timeout=timedelta(seconds=where.seconds),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )


def _bind(address: str, port: int) -> int:
    """A listening socket on exactly this address, never on a wildcard."""
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    try:
        return socket.create_server(where[:2], family=family).detach()
    except OSError as error:
        raise UsageError(
            f"rank 0 cannot listen on {address}:{port} (MASTER_ADDR:MASTER_PORT): "
            f"{os.strerror(error.errno or 0)}; choose a free port, and an address of rank 0's host"
        ) from None


def _join(world: World, where: Rendezvous) -> TCPStore:
    """Connect as a client once somebody listens; until then stay open to signals."""
    end = time.monotonic() + where.seconds
    while not _answers(where.address, where.port):
        if time.monotonic() > end:
            raise Stalled(
                f"rank {world.rank} waited {where.seconds:g} s for rank 0's store at "
                f"{where.address}:{where.port} and nobody listens there; "
                "see whether rank 0 started, and its log"
            )
    # A socket that our launcher opened answers once rank 0 has started; any other does at once.
    left = end - time.monotonic()
    return _client(world, where, left if where.token else min(left, _ANSWER_WITHIN))


def _client(world: World, where: Rendezvous, seconds: float) -> TCPStore:
    """The store's client. Its constructor waits for an answer without end: hence the thread."""
    found: list[TCPStore | DistError] = []

    def connect() -> None:
        try:
            found.append(
                TCPStore(
                    where.address,
                    where.port,
                    world.size,
                    is_master=False,
                    timeout=timedelta(seconds=where.seconds),
                    wait_for_workers=False,
                )
            )
        except DistError as error:
            found.append(error)

    thread = threading.Thread(target=connect, name="joining the store", daemon=True)
    thread.start()
    thread.join(seconds)
    there = f"{where.address}:{where.port} (MASTER_ADDR:MASTER_PORT)"
    match found:
        case [TCPStore() as store]:
            return store
        case [DistError() as error]:
            raise PeerLost(f"rank {world.rank} could not join the store at {there}: {error}")
    raise Stalled(
        f"rank {world.rank} reached {there}, but no store answered there within {seconds:.0f} s; "
        "see rank 0's log, and whether another program holds the port: choose a free one"
    )


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), _CLIENT_WAIT).close()
    except OSError:
        time.sleep(_CLIENT_WAIT / 5)  # nobody there yet: look again soon, without burning a core
        return False
    return True


def _challenge(hello: Store, world: World, token: str, seconds: float) -> None:
    """Rank 0 and every other rank prove the token to each other by fresh nonces."""
    if world.rank == 0:
        nonce = secrets.token_hex(16)
        hello.set("nonce", nonce)
        for rank in range(1, world.size):
            _admit(hello, rank, nonce, token, seconds)
        return
    try:
        known = _prove(hello, str(world.rank), token, seconds)
    except DistError as error:
        raise PeerLost(
            f"rank {world.rank} joined rank 0's store, which then went away or did not answer "
            f"within {seconds:g} s; see rank 0's log ({error})"
        ) from None
    if not known:
        raise UsageError(
            f"rank {world.rank} and rank 0 hold different job tokens; another job may be using "
            "this MASTER_PORT: start all ranks from one launch, or choose another port"
        )


def _prove(hello: Store, rank: str, token: str, seconds: float) -> bool:
    """A member's side of the challenge: whether rank 0 holds the same token."""
    nonce = secrets.token_hex(16)
    if not await_keys(hello, ["nonce"], seconds):
        raise DistError("no challenge came")
    owners = hello.get("nonce").decode()
    hello.set(f"member/{rank}", nonce + " " + _proof(token, "member", rank, owners, nonce))
    if not await_keys(hello, [f"owner/{rank}"], seconds):
        raise DistError("no answer came")
    answer = hello.get(f"owner/{rank}")
    hello.set(f"read/{rank}", "")
    return hmac.compare_digest(answer, _proof(token, "owner", rank, nonce, owners).encode())


def _admit(hello: Store, rank: int, nonce: str, token: str, seconds: float) -> None:
    """Check one member's proof and answer with rank 0's own."""
    if not await_keys(hello, [f"member/{rank}"], seconds):
        raise Stalled(
            f"rank 0 waited {seconds:g} s for rank {rank} to join; "
            "see whether it started, and its log"
        )
    theirs, _, proof = hello.get(f"member/{rank}").decode(errors="replace").partition(" ")
    right = hmac.compare_digest(
        proof.encode(), _proof(token, "member", str(rank), nonce, theirs).encode()
    )
    hello.set(f"owner/{rank}", _proof(token, "owner", str(rank), theirs, nonce) if right else "no")
    if not right:
        with suppress(DistError):  # the store goes with this rank: let the other read its answer
            await_keys(hello, [f"read/{rank}"], _READ_WITHIN)
        raise UsageError(
            f"rank {rank} holds another job token than rank 0; another job may be using this "
            "MASTER_PORT: start all ranks from one launch, or choose another port"
        )


def _proof(token: str, *words: str) -> str:
    """HMAC-SHA256 over length-prefixed words."""
    message = b"".join(len(word).to_bytes(4, "big") + word.encode() for word in words)
    return hmac.new(token.encode(), message, hashlib.sha256).hexdigest()
