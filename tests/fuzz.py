"""How many examples the fuzzing tests try: a few in the suite, MMFT_FUZZ=N of each outside of it."""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("MMFT_FUZZ", "0"))


def examples(few: int) -> settings:
    return settings(max_examples=EXAMPLES or few, deadline=None, derandomize=not EXAMPLES, database=None,
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much])  # fmt: skip
