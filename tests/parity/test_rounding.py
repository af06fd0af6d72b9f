"""What `reordered` reorders is the same computation."""
# pyright: reportMissingImports=false

import numpy as np

from tests.parity import tolerances
from tests.parity.cases import make_batch, make_plan
from tests.parity.gradients import gradient
from tests.parity.reference import exact_copy
from tests.parity.rollout import float64, train_forward
from tests.parity.rounding import reordered


def test_other_orders_of_summation_round_otherwise_and_no_more(pair, rng, resolution):
    batch = make_batch(rng, 2, np.ones((1, 2), bool), resolution)
    plan = make_plan(2, corrected=[0], points=True)
    model = exact_copy(pair.reference)
    with float64():
        run = train_forward(model, batch, plan)
        expected = gradient(model, run.losses["core_loss"])
        with reordered(0):
            run = train_forward(model, batch, plan, run.drawn)
            found = gradient(model, run.losses["core_loss"])
    scale = max(np.abs(x).max() for x in expected.values())
    errors = [np.abs(found[name] - x).max() / scale for name, x in expected.items()]
    assert 0 < max(errors) < tolerances.EQUAL
