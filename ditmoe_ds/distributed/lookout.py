"""No rank dies unseen: when one ends or falls silent, all others learn which, where and at what step, and end too.

A collective whose partner is gone fails at once on some networks, after half an hour on others, and names nobody. So every rank keeps
one TCP connection to rank 0 beside the process group: a killed process closes it, a vanished host falls silent on it.
"""

import asyncio
import contextlib
import errno
import faulthandler
import json
import math
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from ditmoe_ds.distributed.topology import AgreedError, World, agreed, host_name
from ditmoe_ds.errors import UserError, in_a_line

BEAT = 5.0
"""Seconds between a rank's signs of life."""
SILENCE = 40.0
"""Seconds without one after which a rank counts as gone. A closed connection is noticed at once."""
GATHER = 2.0
"""Seconds to wait for further news before a cause is named: ranks that fail because another did are not the cause."""
LONG = 600.0
"""Seconds in one step after which a rank writes down where it is."""


class Lookout:
    """A context in which a rank is watched, entered and left by all together; an error that is not agreed ends all processes.

    Raises:
        AgreedError: a rank cannot connect to rank 0.
    """

    def __init__(self, world: World):
        self.world = world
        self.step = 0
        """The last finished step."""
        self.since = time.monotonic()
        """When it was finished."""
        self.stacks: Path | None = None
        """Folder for the stacks of a rank in a long step."""
        self.before_end: Callable[[], object] = lambda: None
        """Called before one rank's error ends all, while all processes still exist: finishes what their threads are writing together."""
        self._closing = False
        self._answered = threading.Event()
        self._sending = threading.Lock()
        meeting: list[Any] = [None]
        if world.rank == 0:
            self._office = _Office(world.size)
            meeting = [(self._office.port, self._office.token)]
        dist.broadcast_object_list(meeting, src=0)
        port, token = meeting[0]
        self._socket = agreed(lambda: _connect(world.rank, port))
        self._socket.settimeout(BEAT)
        os.register_at_fork(after_in_child=self._forget)
        self._send(token=token, rank=world.rank, host=host_name())
        threading.Thread(target=self._stand, daemon=True, name="lookout").start()
        dist.barrier()

    def _forget(self) -> None:
        """In a loader's process, which must not keep a dead rank's connections open."""
        self._socket.close()
        if self.world.rank == 0:
            self._office.forget()

    def __call__(self, trainer: Any, record: dict[str, Any]) -> None:
        """A callback that notes the step. Rank 0 alone reports it: a thousand messages a step would take much of its Python's time."""
        self.step, self.since = record["step"], time.monotonic()
        if self.world.rank == 0:
            self._send()

    def __enter__(self) -> "Lookout":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, AgreedError):
            self._close()
        elif isinstance(error, Exception):
            # The others do not know of it and may be in a collective that never returns; they are told, and end meanwhile.
            mistake = isinstance(error, UserError)
            text = str(error)[:2000] if mistake else f"{type(error).__name__}: {in_a_line(error, 500)}"
            self._send(error=text, code=2 if mistake else 1)
            if self._answered.wait(2 * BEAT):  # set only if this error is named as the cause
                self.before_end()
            if not mistake:
                traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(2 if mistake else 1)

    def _close(self) -> None:
        self._closing = True
        self._send(bye=True)
        if self.world.rank == 0:
            self._office.empty.wait(SILENCE)
        self._socket.close()

    def _send(self, **message: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # rank 0 is gone, which the reading thread notices
            self._socket.sendall((json.dumps(dict(step=self.step) | message) + "\n").encode())

    def _stand(self) -> None:
        received, missed = b"", 0
        while not received.endswith(b"\n"):
            if self.stacks and time.monotonic() - self.since > LONG:
                self.since = math.inf  # at most once a step, which may never end although every rank is alive
                # not here: the step may wait for a file server, for which this would wait, too, and fall silent
                threading.Thread(target=self._note_where, args=(self.stacks,), daemon=True, name="lookout-stacks").start()
            try:
                part = self._socket.recv(4096)
            except TimeoutError:
                missed += 1  # counted, not timed: a process that was suspended has missed nothing
                if missed * BEAT >= SILENCE:
                    self._end(f"rank 0 on {os.environ['MASTER_ADDR']} was not heard for {SILENCE:.0f} s, after step {self.step} here", 1, 0)
                self._send()
                continue
            except OSError:
                part = b""
            if not part:
                if not self._closing:
                    self._end(f"rank 0 on {os.environ['MASTER_ADDR']} ended without a word, after step {self.step} here", 1, 0)
                return
            missed = 0
            received = (received + part).lstrip(b"\n")  # an empty line answers ours
        verdict = json.loads(received)
        if verdict["rank"] == self.world.rank:
            self._say(verdict["text"])
            self._answered.set()
        else:
            self._end(verdict["text"], verdict["code"], None if verdict["alive"] else verdict["rank"])

    def _note_where(self, folder: Path) -> None:
        """Write down where every thread is: a step may never end although every rank is alive."""
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            with open(folder / f"rank-{self.world.rank}.txt", "w") as file:
                print(f"after step {self.step}, at {time.asctime()}", file=file, flush=True)
                faulthandler.dump_traceback(file)
        if self.world.rank == 0:
            print(f"step {self.step + 1} takes more than {LONG / 60:.0f} minutes; where each rank is: {folder}", flush=True)

    def _say(self, text: str, dead: int | None = None) -> None:
        """Print once on every host: on its first rank, or its second if that one is dead."""
        if self.world.local_rank == 0 or (self.world.local_rank == 1 and dead == self.world.rank - 1):
            print(f"error: {text}", file=sys.stderr, flush=True)

    def _end(self, text: str, code: int, dead: int | None) -> None:
        self._say(text, dead)
        if dead is None:
            self.before_end()
        sys.stdout.flush()
        os._exit(code)  # the main thread may be in a collective that never returns


def _connect(rank: int, port: int) -> socket.socket:
    address = os.environ["MASTER_ADDR"]
    try:
        return socket.create_connection((address, port), timeout=60)
    except OSError as error:
        scarce = error.errno == errno.EMFILE  # not the network's fault
        fix = "raise nofile in /etc/security/limits.conf" if scarce else "let TCP through between all nodes (ditmoe doctor)"
        raise UserError(
            f"rank {rank} on {host_name()} cannot reach rank 0 at {address}:{port} ({error.strerror or error}); {fix}"
        ) from None


class _Office:
    """On rank 0: listens to every rank, and when one is lost tells all others which."""

    def __init__(self, ranks: int) -> None:
        self.room = ranks + 64
        """How many more connections may be open without having said whose they are."""
        self.token = secrets.token_hex()
        self.step = 0
        """The last that a rank has reported as finished: all take their steps together."""
        self.empty = threading.Event()
        """Every rank has said goodbye."""
        self._present: dict[int, asyncio.StreamWriter] = {}
        self._lost: list[tuple[int, str, int]] = []
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True, name="lookout-office").start()

    async def _run(self) -> None:
        server = await asyncio.start_server(self._attend, sock=self._listener, backlog=1024)
        await server.serve_forever()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One rank, from its first line to its last."""
        known = False
        if self.room:
            self.room -= 1
            with contextlib.suppress(Exception):
                hello = json.loads(await asyncio.wait_for(reader.readline(), SILENCE))
                known = secrets.compare_digest(hello["token"], self.token)
            self.room += 1
        if not known:  # not one of ours: a port scanner
            writer.close()
            return
        rank, who = hello["rank"], f"rank {hello['rank']} on {hello['host']}"
        self._present[rank] = writer
        try:
            while line := await _next(reader):
                writer.write(b"\n")  # so that the ranks notice when rank 0 falls silent
                message = json.loads(line)
                if "bye" in message:
                    del self._present[rank]
                    if not self._present:
                        self.empty.set()
                    return
                if "error" in message:
                    self._lose(rank, f"{who} failed after step {message['step']}: {message['error']}", message["code"])
                    return
                self.step = max(self.step, message["step"])
            self._lose(rank, f"{who} ended without a word after step {self.step} (killed, or out of memory)", 0)
        except TimeoutError:
            self._lose(rank, f"{who} was not heard for {SILENCE:.0f} s, after step {self.step}", 0)
        except ConnectionError:
            self._lose(rank, f"{who} ended without a word after step {self.step} (its connection broke)", 0)

    def forget(self) -> None:
        """Let go of all connections, in a process that was forked."""
        with open(os.devnull) as nothing:  # replaced, not closed, so that no other file takes a number that is still held
            for connection in (self._listener, *(writer.get_extra_info("socket") for writer in self._present.values())):
                if connection.fileno() >= 0:
                    os.dup2(nothing.fileno(), connection.fileno())

    def _lose(self, rank: int, text: str, code: int) -> None:
        self._lost.append((rank, text, code))
        if len(self._lost) == 1:
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        await asyncio.sleep(GATHER)
        silent = [lost for lost in self._lost if not lost[2]]
        rank, text, code = (silent or self._lost)[0]
        verdict = (json.dumps(dict(rank=rank, text=text, code=code or 1, alive=bool(code))) + "\n").encode()
        others = {present: writer for present, writer in self._present.items() if present}
        for writer in others.values():
            writer.write(verdict)
        for _ in range(int(GATHER / 0.1)):  # rank 0 is told last: it ends then, and everybody's connection with it
            if others.keys() <= {lost for lost, _, _ in self._lost}:
                break
            await asyncio.sleep(0.1)
        if 0 in self._present:
            self._present[0].write(verdict)


async def _next(reader: asyncio.StreamReader) -> bytes:
    """The next line; empty at the end.

    Raises:
        asyncio.TimeoutError: none came for ``SILENCE``, counted in beats: a process that was suspended has missed at most one.
    """
    for _ in range(round(SILENCE / BEAT) - 1):
        with contextlib.suppress(asyncio.TimeoutError):
            return await asyncio.wait_for(reader.readline(), BEAT)
    return await asyncio.wait_for(reader.readline(), BEAT)
