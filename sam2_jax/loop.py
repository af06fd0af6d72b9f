"""The loop around the step: feed, log, evaluate, save, in an order that survives being stopped.

At a step where all happen: its metrics row, the evaluation's row, both on disk, then the
checkpoint. So whatever a checkpoint says was done, is on record; what is later is cut at resume
and done again.
"""

import math
import pathlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from tqdm.auto import tqdm

from sam2_jax import sharding
from sam2_jax.records import Records
from sam2_jax.train import Metrics, RandomKey, State, TrainStep, best_params
from sam2_jax.types import Batch, UserError

SMOOTHED_STEPS = 50  # the bar shows the mean loss of so many: single steps differ by their prompts


class LoopSettings(NamedTuple):
    """When things happen; 0 for `eval_every` means only at the end."""

    steps: int
    log_every: int
    eval_every: int
    save_every: int


def make_loop_settings(config: Any) -> LoopSettings:
    """From the config's `train` and `checkpoint` sections."""
    t = config.train
    return LoopSettings(t.steps, t.log_every, t.eval_every, config.checkpoint.every_steps)


class Display:
    """A progress bar on a terminal, a line per logged row elsewhere; silent if not `visible`."""

    def __init__(self, done: int, total: int, visible: bool):
        self._lines = visible and not sys.stderr.isatty()
        self._total = total
        self._losses: deque[float] = deque(maxlen=SMOOTHED_STEPS)
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not visible or self._lines,
            dynamic_ncols=True,
            unit="step",
        )

    def step(self, loss: float) -> None:
        """One more step is done."""
        self._losses.append(loss)
        mean = sum(self._losses) / len(self._losses)
        self._bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._lines or not self._bar.disable:
            tqdm.write(text)

    def row(self, step: int, row: dict[str, float]) -> None:
        """A row was logged."""
        if self._lines:
            rate = row["steps_per_second"]
            left = (self._total - step) / rate if rate else math.inf
            tqdm.write(
                f"step {step}/{self._total}  loss {row['loss']:.3f}  "
                f"{rate:.2f} steps/s  {left / 60:.1f} min left"
            )
            sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


class Clock:
    """Steps per second since the last reading, pauses left out."""

    def __init__(self):
        self._start = time.perf_counter()
        self._steps = 0

    def tick(self) -> None:
        """One step is done."""
        self._steps += 1

    def read(self) -> float:
        """Steps per second since the last reading or `restart`."""
        now = time.perf_counter()
        rate = self._steps / max(now - self._start, 1e-9)
        self._start, self._steps = now, 0
        return rate

    def restart(self) -> None:
        """After a pause: forget the time and the steps."""
        self._start, self._steps = time.perf_counter(), 0


def run_loop(
    state: State,
    step_fn: TrainStep,
    batches: Iterator[Batch],
    run_key: RandomKey,
    settings: LoopSettings,
    mesh: Mesh,
    *,
    workdir: pathlib.Path,
    save: Callable[[int, State], None],
    evaluate: Callable[[Any, int], dict[str, float]] | None = None,
    source_of: Callable[[int], str] | None = None,
) -> State:
    """Trains from `state.step` to `settings.steps` and returns the last state.

    `save(step, state)` starts a checkpoint, `evaluate(params, step)` gives rows for
    metrics.jsonl; `source_of(n)` names the source of batch n, counted from 0, where there are
    several, and the loss of each is logged as `SOURCE/loss`. Only process 0 writes and shows.
    Metrics of step n are read once step n+1 is launched, so that the device never waits for the
    host. Raises `UserError` where the loss is
    not finite, before anything of that step is saved.
    """
    done = int(state.step)
    leads = jax.process_index() == 0
    records = Records(workdir, done) if leads else None
    display = Display(done, settings.steps, leads)
    clock = Clock()
    began = time.perf_counter()

    def finish(step: int, metrics: Metrics) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"]):
            raise UserError(
                f"the loss of step {step} is {values['loss']}: lower optim.learning_rate, or "
                "train.precision=float32; the last checkpoint is from before"
            )
        if source_of:
            values[f"{source_of(step - 1)}/loss"] = values["loss"]
        clock.tick()
        display.step(values["loss"])
        if step == done + 1:
            display.say(f"compiled; first step done after {time.perf_counter() - began:.0f} s")
        if step == 1 or step == settings.steps or step % settings.log_every == 0:
            row = values | {"steps_per_second": clock.read()}
            display.row(step, row)
            if records:
                records.write(step, row)
        if step == done + 1:
            clock.restart()  # what follows is not slowed by compilation

    pending: tuple[int, Metrics] | None = None
    try:
        for step in range(done + 1, settings.steps + 1):
            state, metrics = step_fn(state, sharding.put_batch(next(batches), mesh), run_key)
            if pending:
                finish(*pending)
            pending = (step, metrics)
            last = step == settings.steps
            evaluates = evaluate and (
                last or (settings.eval_every and step % settings.eval_every == 0)
            )
            saves = last or step % settings.save_every == 0
            if not (evaluates or saves):
                continue
            finish(*pending)
            pending = None
            if evaluates and evaluate:
                try:
                    row = evaluate(best_params(state), step)
                except UserError:
                    save(step, state)  # what was learnt is not lost to a bad evaluation set
                    raise
                if records:
                    records.write(step, row)
            if saves:
                if records:
                    records.sync()
                save(step, state)
            clock.restart()
    finally:
        display.close()
        if records:
            records.close()
    return state
