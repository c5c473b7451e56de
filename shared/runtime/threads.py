"""Thread pools whose threads start at once."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def started_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Return a pool whose threads are all running, so that `submit` cannot fail.

    A plain `ThreadPoolExecutor` starts threads on demand. If the system refuses one, `submit`
    raises, but the task stays queued and may run later. Raises RuntimeError if the system refuses
    a thread now.
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
