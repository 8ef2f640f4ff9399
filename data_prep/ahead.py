"""Work that other processes do ahead of its consumer, with results in order."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ditmoe_ds.errors import DataError

T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R")


def ahead(elements: Iterable[tuple[T, A]], work: Callable[[A], R], processes: int, option: str) -> Generator[tuple[T, R], None, None]:
    """For each element (name, argument) the pair (name, work(argument)), in order, some elements ahead of the consumer.

    The elements are drawn in a thread, so a slow source is waited for ahead of time too.

    Args:
        work: can be pickled, with what it takes and returns; the processes import its module.
        processes: 0 works in a thread.
        option: of the command line, that names ``processes``.

    Raises:
        DataError: a process died.
    """
    entries: queue.Queue[tuple[T, Future[R]] | BaseException | None] = queue.Queue(2 * max(processes, 1))
    stopped = threading.Event()

    def put(entry: tuple[T, Future[R]] | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return entries.put(entry, timeout=0.1)

    def feed() -> None:
        try:
            for name, argument in elements:
                put((name, pool.submit(work, argument)))
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # the consumer raises it
            put(error)

    with _pool(processes, work) as pool:
        threading.Thread(target=feed, daemon=True).start()
        try:
            while (entry := entries.get()) is not None:
                if isinstance(entry, BaseException):
                    raise entry
                yield entry[0], entry[1].result()
        except BrokenProcessPool:
            raise DataError(f"{option}={processes}: one of these processes died, perhaps for want of memory; use fewer") from None
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _pool(processes: int, work: Callable[..., object]) -> Executor:
    if not processes:
        return ThreadPoolExecutor(1)
    # Not a fork of this process: it has threads, and maybe a GPU.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(work, "func", work).__module__])  # of a partial: its function's
    return ProcessPoolExecutor(processes, context, _end_with_parent)


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work forever; a terminal's Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
