"""Bodies of POSTs for schemathesis, which loads this module into its own process."""

from typing import Any

import schemathesis
from hypothesis import strategies
from instances import multipart, real_file

_, MULTIPART = multipart()
INSTANCES = strategies.sampled_from([real_file(), b"no DICOM", b""])

schemathesis.openapi.media_type("application/dicom", INSTANCES)
schemathesis.openapi.media_type(
    "multipart/related",
    strategies.lists(INSTANCES, max_size=3).map(lambda instances: multipart(*instances)[0]),
)


@schemathesis.hook
def before_call(
    _: schemathesis.HookContext, case: schemathesis.Case[Any], __: dict[str, Any]
) -> None:
    if case.media_type == "multipart/related":
        case.headers.setdefault("Content-Type", MULTIPART)
