"""Pools of threads that are there before they are needed."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def started_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads all run by now, so that `submit` needs none and does not fail.

    By itself a `ThreadPoolExecutor` starts them as work comes. Where the system gives no more, it
    then raises for work that it keeps all the same, and does when nobody expects it any more.
    Raises RuntimeError where the system gives not all of them now.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    all_run = Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(all_run.wait)
        all_run.wait()
    except RuntimeError:
        all_run.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return pool
