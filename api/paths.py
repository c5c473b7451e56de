"""Paths as they are routed here, however they were written or passed on."""


def own_path(path: str, prefix: str) -> str:
    """`path` with one slash between its steps, and without `prefix` where it begins with that.

    So it does not matter whether a proxy that serves all this under a prefix takes it away.
    """
    steps = [step for step in path.split("/") if step]
    before = [step for step in prefix.split("/") if step]
    if steps[: len(before)] == before:
        steps = steps[len(before) :]
    return "/" + "/".join(steps)
