"""The `dask` executor: the same tasks on a cluster that the stage starts, or on somebody's scheduler.

    SMARTAVE_EXECUTOR=dask                                   a cluster on this machine
    SMARTAVE_EXECUTOR=dask SMARTAVE_DASK=tcp://HOST:8786     that scheduler's workers

Workers of another scheduler are started in the repository root, on a file system that all of them share,
with one thread each (`dask worker ADDRESS --nthreads 1`), and have a GPU where the settings say `cuda`: what
`device: auto` is, the machine decides that the stage is started on.
"""

import contextlib
import itertools
import logging
import os
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import Any

from pipeline.workers import MAX_DEATHS, THREAD_VARIABLES, Died, Handle, TaskError, message


class UnopenedError(ValueError):
    """A worker could not open; no other could."""


def _work(key: str, open_worker: Callable[[], Handle], task: Any) -> tuple[int, Any]:
    """(rows done, result). What a process has opened once it keeps."""
    from distributed import get_worker

    opened: dict[str, Handle] = get_worker().__dict__.setdefault("smartave_opened", {})
    if key not in opened:
        opened.clear()  # models of another job
        try:
            opened[key] = open_worker()
        except Exception as error:  # noqa: BLE001 - told to the one who asked, which raises
            raise UnopenedError(message(error)) from None
    rows = 0

    def tick(number: int) -> None:
        nonlocal rows
        rows += number

    try:
        result = opened[key](task, tick)
        return rows, result
    except Exception as error:  # noqa: BLE001 - as above
        raise ValueError(message(error)) from None


def num_workers(address: str) -> int:
    """Of that scheduler, now; 1 where none has come yet."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        return max(1, len(client.nthreads()))


def dask(
    open_worker: Callable[[], Handle],
    tasks: Sequence[Any],
    *,
    workers: int,
    threads: int,
    progress: Callable[[int], None],
) -> Generator[tuple[int, Any], None, None]:
    """As `workers.local`, but progress is by task; another scheduler gets `workers` of them at once."""
    import dask as library
    from distributed import Client, Future, KilledWorker, LocalCluster, as_completed

    if not tasks:
        return
    settings = {
        "distributed.scheduler.allowed-failures": MAX_DEATHS - 1,
        "distributed.scheduler.worker-saturation": 1.0,  # a waiting task is not to blame for a death
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(library.config.set(settings))
        address = os.environ.get("SMARTAVE_DASK")
        if not address:
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                env=dict.fromkeys(THREAD_VARIABLES, str(threads)),
                memory_limit=0,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            )
            address = stack.enter_context(cluster)
        client = stack.enter_context(Client(address, set_as_default=False))
        key = uuid.uuid4().hex
        futures: dict[Future, int] = {}

        def submitted(index: int) -> Future:
            name = f"{key}-{index}"
            future = client.submit(_work, key, open_worker, tasks[index], key=name, pure=False)
            futures[future] = index
            return future

        waiting = iter(range(len(tasks)))
        done = as_completed(map(submitted, itertools.islice(waiting, workers)), loop=client.loop)
        for future in done:
            done.update(map(submitted, itertools.islice(waiting, 1)))
            index, error = futures[future], future.exception()
            if error is None:
                rows, result = future.result()
                progress(rows)
                yield index, result
            elif isinstance(error, KilledWorker):
                yield index, Died("a signal or its own end")
            elif isinstance(error, UnopenedError):
                raise ValueError(str(error))
            else:
                raise TaskError(index, str(error))
