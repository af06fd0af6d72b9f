"""The fastest setting that fits a machine, searched by compiling; and reports for a person."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sam2_jax import compiled, sharding
from sam2_jax.compiled import Report
from sam2_jax.config_checks import REMATS
from sam2_jax.config_keys import sources_by_key
from sam2_jax.memory_estimate import heaviest_source, size
from sam2_jax.topology import Target
from sam2_jax.types import UserError

MOST_PARTS = 4  # of a batch that are tried, one after the other


class Setting(NamedTuple):
    """What is searched over."""

    fsdp: int
    remat: str
    accumulate: int
    model: int = 1

    def flags(self) -> str:
        """As the command line takes it."""
        shared = f"--config.mesh.model={self.model} " if self.model > 1 else ""
        return (
            f"--config.mesh.data=-1 --config.mesh.fsdp={self.fsdp} {shared}"
            f"--config.train.remat={self.remat} --config.train.accumulate={self.accumulate}"
        )


def settings(config: Any, devices: int) -> Iterator[list[Setting]]:
    """For each mesh the settings from the fastest to the leanest: recomputation costs most.

    Meshes: parameters and moments whole on every device, and split over all of up to eight. Where
    there are fewer videos than devices to deal them out to, `mesh.model` is raised.

    Raises:
        UserError: `mesh.model` does not fit the devices.
    """
    model, left, parts = _shared_left_and_parts(config, devices)
    for fsdp in sorted({1, next(n for n in (8, 4, 2, 1) if left % n == 0)}):
        yield [Setting(fsdp, remat, part, model) for remat in REMATS for part in parts]


def last_resort(config: Any, devices: int) -> list[Setting]:
    """For where none of `settings` fits: the leanest, split over more than eight, up to all."""
    model, left, parts = _shared_left_and_parts(config, devices)
    more = [n for n in range(9, left + 1) if left % n == 0]
    return [Setting(fsdp, REMATS[-1], parts[-1], model) for fsdp in more]


def _shared_left_and_parts(config: Any, devices: int) -> tuple[int, int, list[int]]:
    """`mesh.model`, devices over which videos are dealt out, parts of those of one.

    With fewer videos than devices, the least devices to a video with which it comes out even.
    """
    model, videos = config.mesh.model, heaviest_source(config)[1].batch_size
    left, *_ = sharding.mesh_shape(-1, 1, model, devices)
    if videos < left:
        left = next(n for n in range(videos, 0, -1) if left % n == 0 and videos % n == 0)
        model = devices // left
    return model, left, [n for n in range(1, MOST_PARTS + 1) if videos // left % n == 0]


def search(config: Any, target: Target, say: Callable[[str], None]) -> Report:
    """`settings`: reports of what was tried, the best first; `flags` of the best.

    On every mesh what comes after the first that fits could only be slower, and is not tried; nor
    is `last_resort`, where anything fits.

    A setting that cannot be compiled, or not be run, is told and passed over.

    Raises:
        UserError: the memory of the machine is not known, or nothing fits.
    """
    if target.usable_bytes is None:
        raise UserError(f"--suggest: the memory of {target.name} is not known, so anything fits")
    ladders = list(settings(config, len(target.devices)))
    last = last_resort(config, len(target.devices))
    most = sum(map(len, [*ladders, last]))
    say(f"at most {most} compilations")
    if (config.mesh.data, config.mesh.fsdp) != (-1, 1):
        say("note: mesh.data and mesh.fsdp are searched for, not taken as given")
    tried: list[tuple[Setting, Report]] = []
    refused: list[UserError] = []
    for ladder in [*ladders, last]:
        if ladder is last and any(found["fits"] for _, found in tried):
            break
        for setting in ladder:
            count = len(tried) + len(refused) + 1
            say(f"compiling {count} of at most {most}: {setting.flags()}")
            try:
                found = compiled.report(_with(config, setting), target, count_work=False)
            except UserError as error:
                known = str(error) in map(str, refused)
                say(f"  cannot be: {'the same' if known else error}")
                refused.append(error)
                continue
            tried.append((setting, found))
            say(f"  {words(found)}")
            if found["fits"]:
                break
    if not tried:
        raise UserError(
            f"--suggest: no setting can be on {target.name}: {refused[0]}; or take more videos "
            "(data.batch_size), or fewer devices"
        )
    timed = not any(found["fits"] and found["kernels_without_estimate"] for _, found in tried)
    tried.sort(key=lambda item: rank(*item, timed))
    best, report = tried[0]
    if not report["fits"]:
        raise UserError(
            f"nothing fits {target.name}: the leanest that was tried takes "
            f"{size(report['peak_bytes'])} of {size(target.usable_bytes)} a device; set "
            "train.segment (frames tracked at a time), or lower model.resolution, data.num_frames "
            "or data.max_objects"
        )
    given = {f"{key}.batch_size": x.batch_size for key, x in sources_by_key(config).items()}
    given["model.attention"] = config.model.attention
    flags = " ".join([best.flags(), *(f"--config.{key}={value}" for key, value in given.items())])
    return {"flags": flags, "settings": [{"flags": s.flags(), **found} for s, found in tried]}


def rank(setting: Setting, found: Report, timed: bool) -> tuple:
    """Sorts the best first: what fits by estimated seconds, if all are `timed`, else by the rule.

    The rule: least recomputation, then fewest bytes sent, then fewest parts. It holds where the
    compiler estimates no time, or not that of kernels: a setting that runs these once more would
    look too fast. What does not fit comes last, the leanest first.
    """
    rule = (REMATS.index(setting.remat), found["sent_bytes"] or 0, setting.accumulate)
    if not found["fits"]:
        return (1, found["peak_bytes"])
    return (0, found["estimated_seconds"] or 0.0 if timed else 0.0, rule)


def _with(config: Any, setting: Setting) -> Any:
    copy = config.copy_and_resolve_references().unlock()
    copy.mesh.data, copy.mesh.fsdp, copy.mesh.model = -1, setting.fsdp, setting.model
    copy.train.remat, copy.train.accumulate = setting.remat, setting.accumulate
    return copy.lock()


def words(found: Report) -> str:
    """Memory and time in a line."""
    fits = {True: "fits", False: "does not fit", None: "memory not known"}[found["fits"]]
    share = f", {found['peak_bytes'] / found['hbm_bytes']:.0%}" if found["hbm_bytes"] else ""
    seconds = found["estimated_seconds"]
    time = f", about {seconds:.3g} s a step" if seconds else ""
    if time and found["kernels_without_estimate"]:
        time += " and its kernels"
    return f"{size(found['peak_bytes'])}{share}: {fits}{time}"


def as_table(found: Report) -> str:
    """What `search` gives, for a person."""
    lines = [f"{words(row):48} {row['flags']}" for row in found["settings"]]
    return "\n".join([*lines, "", f"take {found['flags']}"])


def report_table(found: Report) -> str:
    """What `compiled.report` gives, for a person."""
    hbm = found["hbm_bytes"]

    def share(count: int | float | None) -> str:
        return f"{size(count):>12}" + (f"{count / hbm:8.1%}" if count is not None and hbm else "")

    mesh = ", ".join(f"{name} {n}" for name, n in found["mesh"].items())
    clip = f"{found['frames']} frames, {found['objects']} objects, {found['resolution']} px"
    keys = ("argument", "output", "alias", "temp", "generated_code", "peak")
    rows = [
        ("machine", f"{found['devices']} x {found['device_kind']} ({mesh})"),
        ("step", f"{found['variant']}, {clip}, {found['batch_size']} videos"),
        ("attention", found["attention"]),
        ("precision", f"{found['precision']}, sums {found['reduce_precision']}"),
        ("recomputing", found["remat"]),
        ("parts of a batch", str(found["accumulate"])),
        *((key.replace("_", " "), share(found[f"{key}_bytes"])) for key in keys),
        ("memory", size(hbm).rjust(12)),
        ("fits", {True: "yes", False: "no", None: "not known"}[found["fits"]]),
        *((f"  {name}", share(count)) for name, count in found["state_bytes"].items()),
        *((f"  {name}", f"{n / 1e12:.2f} TFLOP") for name, n in found["flops_by_plan"].items()),
        *(
            (kind, f"{row['count']} times, {size(row['bytes'])}")
            for kind, row in (found["collectives"] or {}).items()
        ),
        ("sent a step", size(found["sent_bytes"])),
        ("least to be sent", size(found["least_collective_bytes"])),
        ("bytes moved, loops once", size(found["bytes_accessed"])),
    ]
    for name in ("compile_seconds", "optimal_seconds", "estimated_seconds"):
        value = found[name]
        rows.append((name.replace("_", " "), "-" if value is None else f"{value:.3g} s"))
    if found["kernels_without_estimate"]:
        rows.append(("not in this estimate", f"{found['kernels_without_estimate']} kernel calls"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
