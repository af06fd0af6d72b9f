"""The loop around the step: feed, log, evaluate, save, in an order that survives being stopped.

At a step where all happen: its metrics row, on disk, the checkpoint, then the evaluation: its
figures into the checkpoint, and its row. So whatever a checkpoint says was done, is on record; what
is later is cut at resume and done again, and an evaluation without a row is made up for.
"""

import contextlib
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from sam2_jax import checkpoint, cluster, sharding, stopping
from sam2_jax.progress import Clock, Display
from sam2_jax.records import METRICS, NOTHING_SEEN, WORST, Records, Seen, was_evaluated
from sam2_jax.train import Metrics, RandomKey, State, TrainStep
from sam2_jax.types import Batch, UserError

RECENT, ENOUGH = 50, 10  # steps that say what loss is usual, and the fewest that do
SPIKE = 10.0  # times the usual, from which on a loss is told of at once


class LoopSettings(NamedTuple):
    """When things happen; 0 for `eval_every` means only at the end."""

    steps: int
    log_every: int
    eval_every: int
    save_every: int
    profile_steps: tuple[int, ...] = ()  # first and last step of a trace
    max_skipped: int = 0  # so many steps in a row may be skipped for not being finite
    best: str = "eval/J&F"  # metric of the evaluation
    best_is_lowest: bool = False
    wandb: str = ""  # project of Weights & Biases


class Hooks(NamedTuple):
    """What the loop calls, all but `save` optional."""

    save: Callable[[int, State], None]  # starts a checkpoint
    evaluate: Callable[[State, int], dict[str, float]] | None = None  # a row for metrics.jsonl
    judge: Callable[[int, dict[str, float]], None] | None = None  # that row, to the checkpoint
    source_of: Callable[[int], str] | None = None  # of batch n, from 0, where there are several
    clips_of: Callable[[int], list[str]] | None = None  # names of the clips of batch n
    should_stop: Callable[[int], bool] | None = None  # after a step, the same on all processes
    bad_step: Callable[[int, State, Batch, dict[str, float]], UserError] | None = None


class Stopped(Exception):
    """The run was asked to end and has saved where it was."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}, which is saved")
        self.step = step


def make_loop_settings(config: Any) -> LoopSettings:
    """From the config's `train` and `checkpoint` sections."""
    t = config.train
    return LoopSettings(
        steps=t.steps,
        log_every=t.log_every,
        eval_every=t.eval_every,
        save_every=config.checkpoint.every_steps,
        profile_steps=tuple(t.profile_steps),
        max_skipped=t.max_skipped if t.not_finite == "skip" else 0,
        best=config.checkpoint.best,
        best_is_lowest=config.checkpoint.best_is_lowest,
        wandb=t.wandb,
    )


def owes_evaluation(workdir: pathlib.Path, step: int) -> bool:
    """Whether metrics.jsonl lacks the evaluation of `step`; process 0 looks for all."""
    lacks = jax.process_index() == 0 and not was_evaluated(workdir / METRICS, step)
    return bool(cluster.of_first(int(lacks)))


class Profile:
    """A trace of chosen steps, in `workdir/tensorboard`, for TensorBoard's profile tab."""

    def __init__(self, steps: tuple[int, ...], workdir: pathlib.Path):
        self._steps, self._workdir = steps, workdir
        self._on = False

    def before(self, step: int) -> None:
        """Starts the trace if it is time."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(str(self._workdir / "tensorboard"))
            self._on = True

    def after(self, step: int, state: State) -> None:
        """Ends the trace if it is time, once the device is done."""
        if self._on and step >= self._steps[-1]:
            jax.block_until_ready(state.step)
            self.close()

    def close(self) -> None:
        """Writes what there is; `UserError` where it cannot be."""
        was_on, self._on = self._on, False
        if was_on:
            with checkpoint.writing(self._workdir):
                jax.profiler.stop_trace()


class Worst:
    """The batches whose losses stood out most from those before, so that someone can look at them.

    By loss of a decoder pass, for plans differ in the number of these, over the median of the
    `RECENT` steps before: at any time of a run, whatever the losses were at its beginning.
    """

    def __init__(self, seen: Seen = NOTHING_SEEN):
        """`seen`: by an earlier start, to go on from."""
        self.seen = seen

    def see(self, step: int, loss: float, passes: float, clips: list[str]) -> float:
        """One more batch: how many times the usual its loss is; infinity if it is not finite.

        1 for the first few, where nothing is usual yet.
        """
        each = loss / max(passes, 1.0)
        finite = [x for _, x in self.seen.recent[-RECENT:]]
        usual = statistics.median(finite) if len(finite) >= ENOUGH else each
        times = each / usual if usual else 1.0
        times = times if math.isfinite(each) else math.inf
        rows = sorted([*self.seen.rows, (times, step, loss, clips)], reverse=True)[:WORST]
        recent = [*self.seen.recent, (step, each)] if math.isfinite(each) else self.seen.recent
        # As many again, so that what a start goes back behind is still there
        self.seen = Seen(rows, recent[-2 * RECENT :])
        return times


def run_loop(
    state: State,
    step_fn: TrainStep,
    batches: Iterator[Batch],
    run_key: RandomKey,
    settings: LoopSettings,
    mesh: Mesh,
    *,
    workdir: pathlib.Path,
    hooks: Hooks,
) -> State:
    """Trains from `state.step` to `settings.steps` and returns the last state.

    Only process 0 writes and shows. Metrics of step n are read once step n+1 is launched, so that
    the device never waits for the host. Of several sources the loss of each is also logged as
    `SOURCE/loss`. What is evaluated is saved first: whatever ends an evaluation costs no step, and
    the next start makes up for it.

    Raises:
        UserError: of `hooks.bad_step`, where more steps in a row than allowed were not finite,
            before anything of them is saved; what is to be recorded cannot be written.
        Stopped: `hooks.should_stop` said so; the step is saved.
    """
    done = int(state.step)
    leads = jax.process_index() == 0
    with checkpoint.writing(workdir):
        records = Records(workdir, done, settings.wandb) if leads else None
    display = Display(done, settings.steps, leads)
    profile = Profile(settings.profile_steps if leads else (), workdir)
    worst, clock = Worst(records.read_worst(done) if records else NOTHING_SEEN), Clock()
    skipped_in_all = records.count_skipped() if records else 0
    began = time.perf_counter()

    def finish(step: int, metrics: Metrics, batch: Batch) -> bool:
        """Reads and shows; whether one more step that is not finite is one too many."""
        nonlocal skipped_in_all
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        skipped = values.get("skipped_in_a_row", 0.0)
        if skipped > settings.max_skipped and hooks.bad_step:
            raise hooks.bad_step(step, state, batch, values)
        if hooks.source_of:
            values[f"{hooks.source_of(step - 1)}/loss"] = values["loss"]
        skipped_in_all += skipped > 0
        if settings.max_skipped:
            values["skipped"] = float(skipped_in_all)
        if hooks.clips_of and records:
            clips = hooks.clips_of(step - 1)
            loss = math.inf if skipped else values["loss"]
            times = worst.see(step, loss, values["passes"], clips)
            if skipped:
                display.say(f"step {step} is not finite and skipped: {', '.join(clips)}")
            elif times >= SPIKE:
                what = f"loss {loss:.4g}, {times:.0f} times the usual for its prompts"
                display.say(f"step {step}: {what}, on {', '.join(clips)}")
        videos, frames = batch.images.shape[:2]
        clock.tick(videos, videos * frames)
        display.step(values["loss"])
        if step == done + 1:
            display.say(f"compiled; first step done after {time.perf_counter() - began:.0f} s")
        regular = step == 1 or step == settings.steps or step % settings.log_every == 0
        if regular or skipped:
            row = values | clock.read()
            display.row(step, row)
            if records:
                with checkpoint.writing(workdir):
                    records.write(step, row)
        if step == done + 1:
            clock.restart()  # what follows is not slowed by compilation
        return 0 < settings.max_skipped <= skipped

    def evaluate(step: int) -> None:
        assert hooks.evaluate
        asked = time.time()
        try:
            row = hooks.evaluate(state, step)
        except stopping.Interrupted:
            raise Stopped(step) from None
        if hooks.judge:
            hooks.judge(step, row)  # before the row, which says that it was evaluated
        if records:
            with checkpoint.writing(workdir):
                records.write(step, row)
                kept = {*checkpoint.steps_of(workdir), step} if hooks.judge else None
                records.best(settings.best, settings.best_is_lowest, kept)
                records.pictures(step, asked)

    def close(
        kind: type[BaseException] | None, first: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, trace
        with checkpoint.ending(workdir, first), contextlib.ExitStack() as each:
            each.callback(profile.close)
            if records:
                each.callback(records.close)
                records.worst(worst.seen)

    def due(step: int) -> bool:
        regular = settings.eval_every and step % settings.eval_every == 0
        return bool(hooks.evaluate and (regular or step == settings.steps))

    # The loop hands over what it means to, and nothing goes to or fro unseen
    run_key = jax.jit(lambda key: key, out_shardings=sharding.replicated(mesh))(run_key)
    compiled: set[tuple[int, ...]] = set()  # shapes of batches, each of which compiles a step
    with contextlib.ExitStack() as stack:
        stack.callback(display.close)
        stack.push(close)
        if done and due(done) and owes_evaluation(workdir, done):
            evaluate(done)
        pending: tuple[int, Metrics, Batch] | None = None
        close_by = 0 < settings.max_skipped <= int(state.skipped)
        for step in range(done + 1, settings.steps + 1):
            asked = time.perf_counter()
            batch = sharding.put_batch(next(batches), mesh)
            clock.wait(time.perf_counter() - asked)
            profile.before(step)
            shape = batch.masks.shape
            with jax.transfer_guard("disallow" if shape in compiled else "allow"):
                state, metrics = step_fn(state, batch, run_key)
            compiled.add(shape)
            profile.after(step, state)
            if pending:
                close_by = finish(*pending)
            pending = (step, metrics, batch)
            last = step == settings.steps
            stops = bool(hooks.should_stop and hooks.should_stop(step))
            evaluates = due(step) and (last or not stops)  # else made up for at the next start
            saves = last or stops or evaluates or step % settings.save_every == 0
            if saves or close_by:  # a report is to have the state before the step, not one after
                close_by, pending = finish(*pending), None
            if not saves:
                continue
            if records:
                with checkpoint.writing(workdir):
                    records.sync()
                    records.worst(worst.seen)
            hooks.save(step, state)
            if evaluates:
                evaluate(step)
            if stops and not last:
                raise Stopped(step)
            clock.restart()
    return state
