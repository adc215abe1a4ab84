import pytest

# The suites live in the package; their assertions should explain themselves like those of a test file.
pytest.register_assert_rewrite("stator.testing.contracts")
