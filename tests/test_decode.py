"""What happens on one frame, where no whole clip is needed."""

import jax.numpy as jnp
import numpy as np

from sam2_jax.decode import prefer_stable
from sam2_jax.types import Decoded


def test_only_unstable_single_masks_give_way():
    masks = np.full((3, 4, 10, 10), -1.0, np.float32)
    masks[0, 0, :5] = 1.0  # the same area above +0.05 and -0.05
    masks[1, 0, :5] = 0.0  # no area above +0.05
    masks[1, 2, :2] = 1.0
    ious = np.array([[0.1, 0.2, 0.9, 0.3]] * 3, np.float32)
    decoded = Decoded(masks, ious, jnp.zeros((3, 4, 8)), jnp.zeros(3))
    out = prefer_stable(decoded)
    np.testing.assert_array_equal(out.masks[:, 0], [masks[0, 0], masks[1, 2], masks[2, 0]])
    np.testing.assert_allclose(out.ious[:, 0], [0.1, 0.9, 0.1])  # nothing at all is stable
    np.testing.assert_array_equal(out.masks[:, 1:], masks[:, 1:])
