"""What a run shows of itself while it goes on: a bar or lines, rates, waiting, memory."""

import math
import sys
import time
from collections import deque

import jax
from tqdm.auto import tqdm

SMOOTHED_STEPS = 50  # the bar shows the mean loss of so many: single steps differ by their prompts
# What a logged row says of the machine and not of the training: differs from run to run.
MACHINE = (
    "steps_per_second",
    "videos_per_second",
    "frames_per_second",
    "data_wait",
    "device_memory",
)


def device_memory() -> int | None:
    """Bytes in use at the most so far on the first device; None where it does not tell (CPU)."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


class Clock:
    """Rates since the last reading, pauses left out."""

    def __init__(self):
        self.restart()

    def wait(self, seconds: float) -> None:
        """So long the loop waited for data."""
        self._waited += seconds

    def tick(self, videos: int, frames: int) -> None:
        """One step is done, of so many videos and of frames of all of them."""
        self._steps += 1
        self._videos += videos
        self._frames += frames

    def read(self) -> dict[str, float]:
        """Per second since the last reading or `restart`, and the share spent waiting for data."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        rates = {
            "steps_per_second": self._steps / seconds,
            "videos_per_second": self._videos / seconds,
            "frames_per_second": self._frames / seconds,
            "data_wait": min(self._waited / seconds, 1.0),
        }
        if memory := device_memory():
            rates["device_memory"] = float(memory)
        self.restart()
        return rates

    def restart(self) -> None:
        """After a pause: forget everything."""
        self._start = time.perf_counter()
        self._steps = self._videos = self._frames = 0
        self._waited = 0.0


class Display:
    """A progress bar on a terminal, a line per logged row elsewhere; silent if not `visible`."""

    def __init__(self, done: int, total: int, visible: bool):
        self._lines = visible and not sys.stderr.isatty()
        self._total = total
        self._losses: deque[float] = deque(maxlen=SMOOTHED_STEPS)
        self._text = ""
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not visible or self._lines,
            dynamic_ncols=True,
            unit="step",
        )

    def step(self, loss: float) -> None:
        """One more step is done."""
        if math.isfinite(loss):
            self._losses.append(loss)
        mean = sum(self._losses) / len(self._losses) if self._losses else loss
        self._bar.set_postfix_str(f"loss {mean:.3f}{self._text}", refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._lines or not self._bar.disable:
            tqdm.write(text)

    def row(self, step: int, row: dict[str, float]) -> None:
        """A row was logged."""
        text = f", {row['videos_per_second']:.2f} videos/s, {row['frames_per_second']:.1f} frames/s"
        if row["data_wait"] > 0.05:
            text += f", {row['data_wait']:.0%} waiting for data"
        if "device_memory" in row:
            text += f", {row['device_memory'] / 2**30:.1f} GiB"
        self._text = text
        if self._lines:
            rate = row["steps_per_second"]
            left = (self._total - step) / rate if rate else math.inf
            tqdm.write(
                f"step {step}/{self._total}  loss {row['loss']:.3f}  {rate:.2f} steps/s{text}, "
                f"{left / 60:.1f} min left"
            )
            sys.stdout.flush()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
