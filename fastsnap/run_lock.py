"""One writer at a time in a run folder: a lock of the file system, or, where there are none, a file that is kept fresh.

NFS and Lustre are often mounted without locks. There an exclusively created file says who writes: host, process and a
token; a thread renews its time. It belongs to nobody if its process is gone, which only its own machine can see, or if
its time is older than STALE_SECONDS, which all can.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from fastsnap.printing import print_error
from fastsnap.run_files import RunError, read_bounded

LOCK, GUARD = ".lock", ".writer"
MOST_GUARD_BYTES = 4096
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0  # many heartbeats: a busy file server may keep some waiting
Say = Callable[[str], None]


def say_on_standard_error(text: str) -> None:
    """For callers without a console of their own."""
    print_error(text)


@dataclass(frozen=True)
class Writer:
    """A process, as its guard describes it. `machine` tells apart what a host's name does not: boots and containers."""

    host: str
    machine: str
    pid: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    started: str  # tells the process from a later one of the same number
    token: str

    @staticmethod
    def here() -> "Writer":
        """This process, with a token of its own."""
        pid = os.getpid()
        return Writer(socket.gethostname(), _machine(), pid, _started(pid) or "", secrets.token_hex(8))

    def is_gone(self) -> bool | None:
        """Whether the process has ended; None where that cannot be seen from this machine."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return _started(self.pid) != self.started if self.started else False


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process was started, in clock ticks since boot; None if it has ended or where that cannot be seen."""
    try:
        # Behind the name in parentheses, which may hold spaces: state, ..., start time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


@contextlib.contextmanager
def hold(folder: Path, say: Say) -> Iterator[Callable[[], None]]:
    """Hold `folder`, which exists, for writing, and yield a function that raises RunError once it was taken away.

    say  is told in a sentence what the user should know
    Raises RunError if another process holds it. A killed process holds nothing.
    """
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(
            f"cannot write to the run folder {folder}: {error.strerror}; choose another --out"
        ) from error
    try:
        unsupported = _lock(lock, folder)
        if unsupported is None:
            yield lambda: None
            return
        say(
            f"note: the file system of {folder} has no locks ({unsupported}); the file {GUARD} in it says instead "
            "which process writes. Leave it there while that one runs"
        )
        with _guarded(folder, say) as require_held:
            yield require_held
    finally:
        os.close(lock)


def _lock(lock: int, folder: Path) -> str | None:
    """Lock the open file; returns why the file system cannot, or None. Raises RunError if another process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            return error.strerror or str(error)
        holder = os.read(lock, 20).decode(errors="replace") or "unknown"
        raise RunError(
            f"{folder} is being written by process {holder}; wait for it, stop it, or choose another --out"
        ) from None
    with contextlib.suppress(OSError):  # a full disk: the number is for the message above only
        os.truncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    return None


@contextlib.contextmanager
def _guarded(folder: Path, say: Say) -> Iterator[Callable[[], None]]:
    guard, own = folder / GUARD, Writer.here()
    if not _create(guard, own):
        _take_over(guard, own, say)
    ended = threading.Event()
    heartbeat = threading.Thread(target=_renew, args=(guard, own, ended), daemon=True)
    heartbeat.start()

    def require_held() -> None:
        if _is_readable(guard) and _read(guard) != own:
            raise RunError(
                f"{folder} was taken over by another process, since this one was stopped for more than "
                f"{STALE_SECONDS:.0f} s; nothing more is saved from here. Wait for the other one"
            )

    try:
        yield require_held
    finally:
        ended.set()
        heartbeat.join()
        if _read(guard) == own:
            with contextlib.suppress(OSError):  # it will be stale
                guard.unlink(missing_ok=True)


def _create(guard: Path, writer: Writer) -> bool:
    """Make the guard; False if there is one already."""
    try:
        with guard.open("x") as file:
            file.write(json.dumps(asdict(writer), indent=2))
    except FileExistsError:
        return False
    except OSError as error:
        raise RunError(f"cannot save {guard}: {error.strerror}; choose another --out") from error
    return True


def _read(guard: Path) -> Writer | None:
    """Who the guard says writes; None if it is gone, or not yet or never written in full."""
    try:
        return msgspec.json.decode(read_bounded(guard, MOST_GUARD_BYTES) or b"", type=Writer)
    except (RunError, msgspec.DecodeError):
        return None


def _is_readable(guard: Path) -> bool:
    """Whether what `_read` finds means something: a file server may be away for a moment; the next save asks again."""
    try:
        read_bounded(guard, MOST_GUARD_BYTES)
    except RunError:
        return False
    return True


def _renew(guard: Path, own: Writer, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        if _read(guard) == own:
            with contextlib.suppress(OSError):  # a file server that is away: the next one may arrive
                os.utime(guard)


def _take_over(guard: Path, own: Writer, say: Say) -> None:
    """Put the guard of `own` in the place of one that belongs to nobody. Raises RunError if it does belong to one."""
    writer, age = _read(guard), _age(guard)
    name = f"process {writer.pid} on {writer.host}" if writer else "a process unknown"
    gone = writer.is_gone() if writer else None
    if gone is False or (gone is None and age < STALE_SECONDS):
        remedy = "wait for it, stop it, or choose another --out"
        if gone is None:
            remedy += f". If it is gone, try again in {STALE_SECONDS - age:.0f} s: it was last heard of {age:.0f} s ago"
        raise RunError(f"{guard.parent} is being written by {name}; {remedy}")
    _replace(guard, writer, own)
    reason = "is gone" if gone else f"has not been heard of for {age:.0f} s"
    say(f"note: {name}, which wrote here, {reason}: going on in its place")


def _replace(guard: Path, writer: Writer | None, own: Writer) -> None:
    """Put `own` in the place of `writer`. Raises RunError if another process does, or did, so."""
    claim = guard.with_name(f"{GUARD}.claim")  # whoever makes it is the only one that may replace the guard
    with contextlib.suppress(FileNotFoundError):
        if _age(claim) > STALE_SECONDS:  # of a process that was killed within the next lines
            claim.unlink()
    claimed = _create(claim, own)
    try:
        if not claimed or _read(guard) != writer:
            raise RunError(
                f"{guard.parent} is being written by another process, which just began; choose another --out"
            )
        renewed = guard.with_name(f"{GUARD}.{own.token}")
        _create(renewed, own)
        renewed.replace(guard)
    except OSError as error:
        raise RunError(
            f"cannot replace {guard}: {error.strerror}; try again, or choose another --out"
        ) from error
    finally:
        if claimed:
            with contextlib.suppress(OSError):  # it will be stale
                claim.unlink(missing_ok=True)


def _age(guard: Path) -> float:
    """Seconds since the guard was renewed, by the clock of the file system: that of another host may be wrong."""
    probe = guard.with_name(f"{GUARD}.{secrets.token_hex(8)}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now - guard.stat().st_mtime
    except OSError:
        return 0.0  # gone or renewed this moment
