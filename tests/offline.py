"""For tests that compile for devices that are not there."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture
def without_compilation_cache():
    """What is compiled for a device that is not there cannot be read back, and a try warns."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether there is one is asked once
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
