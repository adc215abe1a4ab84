"""For all tests."""

import os

from hypothesis import settings

# How long an example takes says something about the machine, not about the code: nothing here is timed. A gate tries
# the same examples each time, so that it judges the change before it; others are looked for by `make explore`.
explored = os.environ.get("STATOR_EXAMPLES")
settings.register_profile("stator", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=int(explored or 100), print_blob=True)
settings.load_profile("explore" if explored else "stator")
