"""The `local` executor: tasks over spawned processes that live and die with this one.

An executor is a function `(open_worker, tasks, workers=, threads=, progress=) -> generator of
(task index, result)`, in order of arrival; the result of a task that took `MAX_DEATHS` workers with it is
`Died`. `open_worker()` is called once in each worker and returns `handle(task, tick)`; `tick(n)` reports
that n more rows are done. Both travel by pickle, so they are top-level functions and plain values.
Dask is another such function (pipeline/cluster.py).
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any, Protocol

Handle = Callable[[Any, Callable[[int], None]], Any]

MAX_DEATHS = 2  # of workers that had the same task, or that were opening, with none between that had opened
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
TICK_S = 0.5
PR_SET_PDEATHSIG = 1


class Executor(Protocol):
    def __call__(
        self,
        open_worker: Callable[[], Handle],
        tasks: Sequence[Any],
        *,
        workers: int,
        threads: int,
        progress: Callable[[int], None],
    ) -> Generator[tuple[int, Any], None, None]: ...


@dataclass(frozen=True, slots=True)
class Died:
    """What became of a task whose every worker died; `how` the last one did."""

    how: str


class TaskError(ValueError):
    """`index` of the task that failed; the message is the worker's."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


@contextlib.contextmanager
def stopping_with_parent() -> Iterator[None]:
    """End this process when the one that started it has died (`kill -9` of `dvc repro` leaves its stage)."""
    parent, over = os.getppid(), threading.Event()

    def watch() -> None:
        while not over.wait(TICK_S):
            if os.getppid() != parent:
                sys.stderr.write(f"the process that started this one ({parent}) has died: stopping\n")
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _main(parent: int, pipe: connection.Connection, open_worker: Callable[[], Handle]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with stopping_with_parent(), contextlib.suppress(EOFError, BrokenPipeError):
        try:
            handle = open_worker()
        except Exception as error:  # noqa: BLE001 - told to the parent, which raises
            pipe.send(("unopened", message(error)))
            return
        pipe.send(("opened", None))
        while True:
            task = pipe.recv()
            last, pending = time.monotonic(), 0

            def tick(rows: int) -> None:
                nonlocal last, pending
                pending += rows
                if time.monotonic() - last >= TICK_S:
                    pipe.send(("rows", pending))
                    last, pending = time.monotonic(), 0

            try:
                result = handle(task, tick)
                pipe.send(("rows", pending))
                pipe.send(("done", result))
            except Exception as error:  # noqa: BLE001 - told to the parent, which raises
                pipe.send(("failed", message(error)))
                return


def message(error: Exception) -> str:
    """A sentence for what a user can mend (wrong input, a full disk), the whole story for the rest."""
    told = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno)
    return str(error) if told else "".join(traceback.format_exception(error)).strip()


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    opened: bool = False
    index: int | None = None  # of its task
    rows: int = 0  # of its task that are done


@dataclass
class _Pool:
    open_worker: Callable[[], Handle]
    threads: int
    workers: list[_Worker] = field(default_factory=list)

    def start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_main, args=(os.getpid(), theirs, self.open_worker), daemon=True)
        with environment(dict.fromkeys(THREAD_VARIABLES, str(self.threads))):
            process.start()
        theirs.close()
        self.workers.append(_Worker(process, ours))
        return self.workers[-1]

    def stop(self, worker: _Worker) -> int:
        """Its exit code: negative is the signal that killed it."""
        self.workers.remove(worker)
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()
        return worker.process.exitcode


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def local(
    open_worker: Callable[[], Handle],
    tasks: Sequence[Any],
    *,
    workers: int,
    threads: int,
    progress: Callable[[int], None],
) -> Generator[tuple[int, Any], None, None]:
    """Each worker computes with exactly `threads` threads, however many workers there are: equal bits.

    A worker that dies (out of memory, a fault in a decoder) costs one more try of its task; one that dies
    with the second try makes the task's result `Died`. A task that raises raises `TaskError`, a worker that
    cannot open, or two that die of it, `ValueError`. `progress(n)` gets the change in rows done, negative
    when a try is lost.
    """
    pool = _Pool(open_worker, threads)
    waiting, deaths = deque(range(len(tasks))), [0] * len(tasks)
    left, unopened = len(tasks), 0
    try:
        while left:
            while len(pool.workers) < min(workers, left):
                pool.start()
            for worker in pool.workers:
                if worker.index is None and waiting:
                    worker.index, worker.rows = waiting.popleft(), 0
                    with contextlib.suppress(BrokenPipeError):  # its death is seen below
                        worker.pipe.send(tasks[worker.index])
            ready = connection.wait([worker.pipe for worker in pool.workers], timeout=TICK_S)
            progress(0)
            for worker in [worker for worker in pool.workers if worker.pipe in ready]:
                try:
                    kind, value = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join(TICK_S)  # so that it is its own end that is told
                    exit_code = pool.stop(worker)
                    how = f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
                    unopened += not worker.opened
                    if unopened == MAX_DEATHS:
                        raise ValueError(
                            f"{unopened} processes died while they started, the last one by {how}: is there "
                            f"memory for what {workers} of them load (SMARTAVE_WORKERS)?"
                        ) from None
                    if worker.index is None:
                        continue
                    progress(-worker.rows)
                    deaths[worker.index] += worker.opened
                    if deaths[worker.index] == MAX_DEATHS:
                        left -= 1
                        yield worker.index, Died(how)
                    else:
                        waiting.appendleft(worker.index)
                    continue
                if kind == "opened":
                    worker.opened, unopened = True, 0
                    continue
                if kind == "unopened":
                    raise ValueError(value)
                assert worker.index is not None
                if kind == "failed":
                    raise TaskError(worker.index, value)
                if kind == "rows":
                    worker.rows += value
                    progress(value)
                else:
                    left -= 1
                    index, worker.index = worker.index, None
                    yield index, value
    finally:
        for worker in list(pool.workers):
            pool.stop(worker)
