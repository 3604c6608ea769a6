"""The ranks that torchrun started, as ranks.Ranks describes them.

Two ways of talking. The store, a small server of keys and values that torchrun starts, is there before anything else
and outlives a rank: through it ranks wait for what may take hours (one host reads its pictures, rank 0 writes a
checkpoint), and agree on which of them tells the user why all of them end. Collectives of torch.distributed carry
tensors; a rank that is missing there is an error after a time that the user can set, and at once where its connection
broke.
"""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from fastsnap.training.ranks import Ranks, RanksLost, Value
from fastsnap.training.stopping import STOP_SIGNALS

CONNECT_SECONDS = 300.0  # until the store of a first rank on another host answers
LEAST_PAUSE, MOST_PAUSE = 0.001, 0.1  # seconds between two looks at the store, while this rank waits
STOPPING_SECONDS = 20.0  # that a rank which is asked to stop still waits for others; torchrun kills after 30
CLAIM_SECONDS = 5.0  # that a rank which lost others waits for their own word about it
FAILURE = "failure"


class ProcessGroup(Ranks):
    """See ranks.Ranks. Its methods raise RanksLost where other ranks do not answer."""

    def __init__(self) -> None:
        """Connects to the store. Raises RanksLost if nobody answers."""
        self.rank, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK") or 0)
        self.local_count = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        self.name = f" (rank {self.rank} of {self.count}, on {socket.gethostname()})"
        with _lost_if_it_fails():
            rendezvous = distributed.rendezvous("env://", timeout=timedelta(seconds=CONNECT_SECONDS))
            self._of_all_starts = next(rendezvous)[0]
            self._store = self._fresh(self._of_all_starts)
        self._meetings = 0
        self._timeout = 0.0

    def _fresh(self, store: Any) -> Any:
        """The part of the store that is these ranks' own: torchrun keeps one store through all its restarts, and what
        earlier ranks wrote is still in it, such as where to reach them.

        Every rank calls with a word of its own, which rank 0 answers with the name of that part, until all are there;
        what it answers to earlier ranks nobody reads.
        """
        own, part = secrets.token_hex(8), secrets.token_hex(8)
        calls = [f"call/{rank}" for rank in range(self.count)]
        store.set(calls[self.rank], own)
        waiting = time.monotonic() + CONNECT_SECONDS
        while time.monotonic() < waiting:
            if self.is_first:
                for call in calls:
                    if store.check([call]):
                        store.set(f"answer/{store.get(call).decode()}", part)
                if store.check([f"{part}/here/{rank}" for rank in range(1, self.count)]):
                    return distributed.PrefixStore(part, store)
            elif store.check([f"answer/{own}"]):
                part = store.get(f"answer/{own}").decode()
                store.set(f"{part}/here/{self.rank}", "")
                return distributed.PrefixStore(part, store)
            time.sleep(MOST_PAUSE / 10)
        raise RanksLost(f"not all {self.count} ranks came within {CONNECT_SECONDS:g} seconds")

    def open(self, device: torch.device, timeout: float) -> None:
        self._timeout = timeout
        with _lost_if_it_fails():
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.count,
                timeout=timedelta(seconds=timeout),
            )

    def close(self) -> None:
        # Rank 0 leaves last: where torchrun runs no store, it is in that process.
        with _lost_if_it_fails():
            self._store.set(f"leaving/{self.rank}", "")
            if self.is_first:
                self._wait_for([f"leaving/{rank}" for rank in range(self.count)])
            distributed.destroy_process_group()

    def meet(self, where: str) -> None:
        self._meetings += 1
        name = f"meeting {self._meetings}: {where}"
        with _lost_if_it_fails():
            self._store.set(f"{name}/{self.rank}", "here")
            self._wait_for([f"{name}/{rank}" for rank in range(self.count)])

    def _wait_for(self, keys: list[str]) -> None:
        pause, asked = LEAST_PAUSE, None  # its own wait() would not see that another rank failed
        while not self._store.check(keys):
            if self._store.check([FAILURE]):
                raise RanksLost("another rank failed")
            if self.is_stopping():
                # By torchrun, because a rank was killed, who will not come; or by the user, and the others still save.
                asked = asked or time.monotonic()
                if time.monotonic() - asked > STOPPING_SECONDS:
                    raise RanksLost("a stop was asked for")
            time.sleep(pause)
            pause = min(2 * pause, MOST_PAUSE)

    def from_first(self, make: Callable[[], Value]) -> Value:
        self._meetings += 1
        key = f"value {self._meetings}"
        value = json.dumps(make()) if self.is_first else ""
        with _lost_if_it_fails():
            if self.is_first:
                self._store.set(key, value)
            self._wait_for([key])
            return json.loads(self._store.get(key))

    def gather(self, value: Value) -> list[Value]:
        self._meetings += 1
        key = f"values {self._meetings}"
        with _lost_if_it_fails():
            self._store.set(f"{key}/{self.rank}", json.dumps(value))
            keys = [f"{key}/{rank}" for rank in range(self.count)]
            self._wait_for(keys)
            return [json.loads(self._store.get(key)) for key in keys]

    def largest(self, values: Sequence[int]) -> list[int]:
        tensor = torch.tensor(values, dtype=torch.int64)
        with _lost_if_it_fails():
            distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor.tolist()

    def sum(self, tensor: Tensor) -> None:
        with _lost_if_it_fails():
            distributed.all_reduce(tensor)

    def send(self, tensors: Sequence[Tensor]) -> None:
        with _lost_if_it_fails():
            for tensor in tensors:
                # A copy where it is needed: collectives want one piece of memory.
                plain = tensor.contiguous()
                distributed.broadcast(plain, src=0)
                if not self.is_first:
                    tensor.copy_(plain)

    def collect(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        with _lost_if_it_fails():
            if not self.is_first:
                if len(rows):
                    distributed.send(rows.contiguous(), dst=0)
                return rows
            parts = [rows]
            for rank, count in enumerate(counts[1:], start=1):
                part = rows.new_empty((count, *rows.shape[1:]))
                if count:
                    distributed.recv(part, src=rank)
                parts.append(part)
        return torch.cat(parts)

    def remember(self, what: str) -> None:
        with _lost_if_it_fails():
            self._of_all_starts.set(f"remember/{what}", "")

    def remembers(self, what: str) -> bool:
        with _lost_if_it_fails():
            return self._of_all_starts.check([f"remember/{what}"])

    def speaks_of_failure(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return int(self._store.compare_set(FAILURE, "", str(self.rank))) == self.rank
        return self.is_first  # the store is gone, and with it all agreement

    def explain(self, lost: RanksLost) -> str:
        """Names the ranks that do not answer. Signals do not interrupt it: torchrun sends one to all when one ends."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        missing = self._missing()
        who = f"rank {self.rank} of {self.count} on {socket.gethostname()}"
        others = f"rank {', '.join(map(str, missing))}" if missing else "another rank"
        patience = f", or it does not answer within {self._timeout:g} seconds" if self._timeout else ""
        return f"{who} lost {others} {lost.where} ({lost}): it was killed, its host is gone{patience}{lost.remedy}"

    def _missing(self) -> list[int]:
        """The ranks that do not say within a few seconds that they, too, have lost others, or why they failed."""
        waiting = time.monotonic() + CLAIM_SECONDS
        missing = list(range(self.count))
        with contextlib.suppress(RuntimeError):
            self._store.set(f"lost/{self.rank}", "here")
            while missing and time.monotonic() < waiting and not self._store.check([FAILURE]):
                missing = [rank for rank in missing if not self._store.check([f"lost/{rank}"])]
                time.sleep(MOST_PAUSE)
        return missing


@contextlib.contextmanager
def _lost_if_it_fails() -> Iterator[None]:
    """Errors of torch.distributed are all RuntimeErrors; their first line tells enough."""
    try:
        yield
    except RuntimeError as error:
        # Their first sentence, without the line of the library's source that it begins with.
        reason = re.sub(r"^(\[[^\]]*/[^\]]*\] *)+", "", str(error).partition("\n")[0]).partition(". ")[0]
        raise RanksLost(reason or type(error).__name__) from error
