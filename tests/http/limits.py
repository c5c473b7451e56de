"""The limits of the service that these tests share: low, so that they are cheap to reach."""

MAX_BODY_BYTES = 8_000_000
MAX_PART_BYTES = 1_000_000
MAX_PARTS = 100
