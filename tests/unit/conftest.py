"""For all tests."""

from hypothesis import settings

# How long an example takes says something about the machine, not about the code: nothing here is timed.
settings.register_profile("stator", deadline=None)
settings.load_profile("stator")
