"""Ten optimizer steps against the reference's own optimizer, clipper and recipe.

Three runs start from the same weights and go their own ways: the reference in float64, the
reference in float32, and ours. Clips and prompts are the same for all.
"""
# pyright: reportMissingImports=false

import copy
import functools
import itertools
import pathlib
from typing import Any

import hydra
import jax
import numpy as np
import optax
import sam2
import torch
from omegaconf import OmegaConf
from training.optimizer import construct_optimizer
from training.utils.train_utils import register_omegaconf_resolvers

from configs import default
from sam2_jax import convert, optim, recipe
from sam2_jax.model.sam2 import init_params
from tests.parity import reference, tolerances
from tests.parity.cases import Case, Chosen, clips
from tests.parity.compare import record
from tests.parity.gates import norm
from tests.parity.gradients import Truth, compare_gradients
from tests.parity.ours import converted, prompts_of

RECIPE = "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml"
# Of the recipe's 5e-6 a weight of 0.5 would move by a hundred of float32's roundings: with these
# a hundredth of a step is a thousand of them, also where layers and the cosine make it smaller.
RATE, IMAGE_RATE = 1e-3, 6e-4
CLIPS, RUNS = 8, 3  # at most to choose from; by which float32's error is known
# Of large models each takes a minute; a single run may be right on a clip by luck alone
CLIPS_OF_LARGE, RUNS_OF_LARGE = 4, 3
A, B = [[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [1, 1, 1]]
IMAGE = dict(corrected=[0], points=True)


def cases(frames: int) -> list[Case]:
    """Ten plans of all kinds, for clips of `frames` and for images."""
    half = frames // 2
    return [
        Case(frames, dict(cond=[0]), A),
        Case(1, IMAGE, B),
        Case(frames, dict(corrected=[0, half], points=True), B),
        Case(1, dict(corrected=[0], box=[0], points=True), A),
        Case(1, IMAGE, A),
        Case(frames, dict(cond=[0, half + 1]), B),
        Case(frames, dict(corrected=[0], box=[0], points=True), A),
        Case(1, IMAGE, B),
        Case(frames, dict(cond=[0, half], corrected=[0, half], points=True), B),
        Case(frames, dict(cond=[0]), A),
    ]


# Of a large model a clip of eight frames takes the reference minutes, dozens of times over: what
# ten steps add to the gradients of test_training.py is the optimizer, for which few frames do.
FRAMES, FRAMES_OF_LARGE = 8, 4
STEPS = len(cases(FRAMES))


class Theirs:
    """A model of the reference's with the optimizer and clipper of its recipe."""

    def __init__(self, model: reference.Reference):
        if not OmegaConf.has_resolver("divide"):
            register_omegaconf_resolvers()
        config: Any = OmegaConf.load(pathlib.Path(sam2.__path__[0]) / RECIPE)
        config.scratch.base_lr, config.scratch.vision_lr = RATE, IMAGE_RATE
        o = config.trainer.optim
        self.parameters = dict(model.named_parameters())
        self.model = model
        self.optimizer = construct_optimizer(model, o.optimizer, o.options, o.param_group_modifiers)
        self.clip = hydra.utils.instantiate(o.gradient_clip)

    def step(self, start: reference.Reference, gradient: dict, where: float) -> float:
        """One step from `start` as in its trainer. Returns what the clipper multiplied by."""
        with torch.no_grad():
            for name, x in start.named_parameters():
                self.parameters[name].copy_(x)
        for name, parameter in self.parameters.items():
            parameter.grad = torch.tensor(gradient[name]) if name in gradient else None
        self.optimizer.step_schedulers(where, 0)
        before = norm(gradient.values())
        self.clip(self.model)
        self.optimizer.optimizer.step()
        return norm(p.grad.numpy() for p in self.parameters.values() if p.grad is not None) / before

    def rates(self) -> dict[str, float]:
        """The learning rate of each parameter."""
        groups = self.optimizer.optimizer.param_groups
        by_id = {id(p): group["lr"] for group in groups for p in group["params"]}
        return {name: by_id[id(p)] for name, p in self.parameters.items()}

    def spread(self, name: str) -> np.ndarray:
        """What Adam divides by: the root mean square of a parameter's gradients so far."""
        group = self.optimizer.optimizer.param_groups[0]
        state = self.optimizer.optimizer.state[self.parameters[name]]
        mean = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        return mean.sqrt().numpy()


class Doubt:
    """How well float32 knows what Adam makes of a parameter's gradients, carried like its moments.

    With errors of at most e_k in the gradients of its steps, the mean is off by at most their mean,
    weighted as Adam weights gradients, and the root of the mean square by that of the e_k (triangle
    inequality): the quotient, itself at most about 1, by the sum of both over what divides.
    """

    def __init__(self, betas: tuple[float, float]):
        self.betas = betas
        self.moments: dict[str, tuple[float, float, int]] = {}

    def add(self, name: str, error: float) -> None:
        """One more step with a gradient, known but for `error`."""
        first, second, steps = self.moments.get(name, (0.0, 0.0, 0))
        b1, b2 = self.betas
        first, second = b1 * first + (1 - b1) * error, b2 * second + (1 - b2) * error**2
        self.moments[name] = first, second, steps + 1

    def over(self, name: str, spread: np.ndarray) -> np.ndarray:
        """By how many learning rates a step of each weight may be off, `spread` what divides it."""
        first, second, steps = self.moments[name]
        b1, b2 = (1 - b**steps for b in self.betas)
        error = first / b1 + (second / b2) ** 0.5
        return np.divide(error, spread, where=spread > 0, out=np.zeros_like(spread))


@functools.cache
def make_ours(model, variant: str):
    """Our optimizer with the default rules and the rates of these tests, and its jitted step."""
    config = default.get_config(variant)
    config.train.steps = STEPS
    rules = [rule[0] for rule in config.optim.learning_rate]
    config.optim.learning_rate = tuple(
        (selectors, ("cosine", rate, rate / 10))
        for selectors, rate in zip(rules, (IMAGE_RATE, RATE), strict=True)
    )
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    optimizer = optim.make_optimizer(recipe.make_optim_settings(config), shapes, "2.1")

    @jax.jit
    def update(grads, state, params, active):
        updates, state = optimizer.tx.update(grads, state, params, active=active)
        return optax.apply_updates(params, updates), state

    return optimizer, update


def choose(
    base: reference.Reference,
    case: Case,
    seed: int,
    side: int,
    is_nano: bool,
) -> tuple[Chosen, Truth]:
    """A clip whose gradient float32 knows, or the one of several where it knows it best.

    Where the reference's own float32 is far off, most weights' gradients are below their noise.
    """
    best, (most_clips, runs) = None, (CLIPS, RUNS) if is_nano else (CLIPS_OF_LARGE, RUNS_OF_LARGE)
    for chosen in itertools.islice(clips(base, case, seed, side), most_clips):
        truth = Truth(chosen, plain=not is_nano)
        error = max(x.median() for x in itertools.islice(truth.own(), runs))
        if best is None or error < best[0]:
            best = error, chosen, truth
        if error <= tolerances.GRADIENT_MEDIAN:
            break
    assert best is not None, "no clip leaves the reference's decisions beyond doubt"
    return best[1:]


def test_ten_steps(make_pair, step, seed, resolution, is_nano):
    """Each step starts from the weights where the reference's float64 stands.

    The moments are everyone's own throughout. The weights are not: some gradients are nothing but
    rounding, and Adam makes whole steps of them, so that after a few steps any two programs (the
    reference's float32 and float64, too) stand at different weights with different gradients.
    Between steps the heads are tuned to the next clip, so that all of them stay in use.
    """
    pair = make_pair("2.1")
    theirs = Theirs(reference.exact_copy(pair.reference))
    optimizer, update = make_ours(pair.model, pair.variant)
    state = optimizer.tx.init(pair.params)
    current = pair.reference
    doubt = Doubt(theirs.optimizer.optimizer.param_groups[0]["betas"])
    for k, case in enumerate(cases(FRAMES if is_nano else FRAMES_OF_LARGE)):
        case = case if is_nano else case._replace(valid=[[1, 1]])
        chosen, truth = choose(current, case, 1000 * seed + k, resolution, is_nano)
        params = converted(chosen.model, pair.params)
        prompts = prompts_of(chosen.run.drawn, chosen.batch)
        *_, grads = step(pair.model, params, chosen.batch, chosen.plan, prompts)
        known = compare_gradients(truth, convert.to_reference(grads), "gradient in training")
        share = theirs.step(chosen.exact_model, known.exact, k / STEPS)
        for name, x in known.noise.items():
            doubt.add(name, share * x)
        params, state = update(grads, state, params, optim.active_groups(chosen.plan))
        compare_step(theirs, chosen.model, convert.to_reference(params), known.exact, doubt)
        current = copy.deepcopy(chosen.model)
        current.load_state_dict(theirs.model.state_dict())  # rounds to float32


def compare_step(theirs: Theirs, start, ours: dict, gradient: dict, doubt: Doubt):
    """Every parameter after a step: where the reference put it, or untouched as there."""
    before, rates = dict(start.named_parameters()), theirs.rates()
    above = total = 0
    for name, buffer in start.named_buffers():
        assert np.array_equal(ours[name], buffer.numpy()), name
    for name, parameter in theirs.parameters.items():
        if name not in gradient:  # None in the reference: neither moved nor decayed
            assert np.array_equal(ours[name], before[name].detach().numpy()), name
            continue
        expected, spread = parameter.detach().numpy(), theirs.spread(name)
        off = doubt.over(name, spread)
        above += int((off <= tolerances.STEP).sum())
        total += off.size
        bound = np.maximum(tolerances.STEP, off)
        rounding = tolerances.LAST_PLACE * np.abs(expected) / rates[name]
        error = np.maximum(np.abs(ours[name] - expected) / rates[name] - rounding, 0.0)
        worst = np.unravel_index((error - bound).argmax(), error.shape)
        record("step", float(np.where(off <= tolerances.STEP, error, 0).max()), tolerances.STEP)
        assert error[worst] <= bound[worst], f"{name} {worst}: {error[worst]} > {bound[worst]}"
    record("step: share of weights below noise", 1 - above / total, 1 - tolerances.ABOVE_NOISE)
    assert above >= tolerances.ABOVE_NOISE * total
