"""What processes of one run must agree on."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from sam2_jax import preparing
from sam2_jax.data.augment import AugmentSettings
from sam2_jax.data.pipeline import Part, make_loader
from sam2_jax.data.sampling import Sampling
from sam2_jax.types import UserError
from tests.data.arrays import Arrays, some_clips


@pytest.mark.parametrize(("row", "column"), [(1, 0), (2, 1)])
def test_processes_that_find_other_clips_stop(monkeypatch, row, column):
    """Another checksum on process 1, another number of clips on process 2."""
    part = Part("train", Arrays(some_clips()), Sampling(1, 1), AugmentSettings(), 1)
    loader = make_loader([part], side=16)
    preparing.same_everywhere(loader)  # a single process agrees with itself

    def gather(numbers):
        return np.stack([numbers] * 3)

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    preparing.same_everywhere(loader)

    def differ(numbers):
        found = gather(numbers)
        found[row, column] += 1
        return found

    monkeypatch.setattr(multihost_utils, "process_allgather", differ)
    with pytest.raises(UserError, match=f"process {row} finds other training clips"):
        preparing.same_everywhere(loader)
