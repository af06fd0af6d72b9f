"""Flags that the commands share, and the config that they describe."""

from collections.abc import Callable
from typing import Any

from sam2_jax import config as config_lib
from sam2_jax import startup
from sam2_jax.benchmarks import plans, reference, report
from sam2_jax.model.variants import VARIANTS
from sam2_jax.types import UserError

OURS, REFERENCE = "ours", "reference"
GetConfig = Callable[[str], Any]
SIZES = ("resolution", "frames", "objects", "batch_size", "threads", "repeats")


def environment(side: str) -> dict[str, str]:
    """What a process that measures a side has in its environment, beside that of this one.

    Ours begins as scripts/train.py does, the reference as its own scripts do.
    """
    return {"JAX_PLATFORMS": "cpu"} | startup.huge_pages() if side == OURS else {}


def make_parser(about: str | None, resolution: int, frames: int) -> config_lib.Parser:
    """Flags that all commands have, defaults of the sizes as given."""
    parser = config_lib.Parser(about)
    parser.add_argument("--variant", default="tiny", help="one of " + ", ".join(VARIANTS))
    parser.add_argument("--resolution", type=int, default=resolution, help="pixels, 32 n")
    parser.add_argument("--frames", type=int, default=frames, help="of a clip")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    report.add_json(parser)
    return parser


def add_training(parser: config_lib.Parser) -> None:
    """Flags of a training step."""
    parser.add_argument("--objects", type=int, default=3, help="of a clip")
    parser.add_argument("--batch_size", type=int, default=1, help="videos")
    parser.add_argument("--precision", default="float32", help="of the computation, of both sides")
    parser.add_argument("--remat", default="none", help="train.remat of the config")
    parser.add_argument("--attention", default="auto", help="model.attention of the config")


def at_least(name: str, value: int, least: int = 1) -> None:
    """Raises UserError for a flag's value that is too small."""
    if value < least:
        raise UserError(f"--{name}={value} must be at least {least}")


def check(args: Any) -> None:
    """Raises UserError for sizes that cannot be."""
    if args.variant not in VARIANTS:
        raise UserError(f"--variant={args.variant}: expected one of {', '.join(VARIANTS)}")
    for name in SIZES:
        value = getattr(args, name, 1)
        if isinstance(value, int):
            at_least(name, value)
    if args.resolution % 32:
        near = max(32, round(args.resolution / 32) * 32)
        raise UserError(f"--resolution={args.resolution} is no multiple of 32: take {near}")


def parse_plans(text: str, frames: int) -> list[str]:
    """Names of plans, given with commas between them; UserError for one that is none."""
    names = [name for name in text.split(",") if name]
    try:
        plans.check(names, frames)
    except ValueError as error:
        raise UserError(f"--plans={text}: {error}") from error
    if not names:
        raise UserError(f"--plans= is empty: expected {plans.NAMES}, with commas between them")
    return names


def wants_reference(given: str) -> bool:
    """Whether the reference is to be measured: 'yes', 'no', or 'auto' where it is installed.

    Raises UserError where it is asked for and cannot be.
    """
    if given not in ("yes", "no", "auto"):
        raise UserError(f"--reference={given}: expected yes, no or auto")
    missing = reference.missing()
    if given == "yes" and missing:
        raise UserError(
            f"--reference=yes needs the reference, and {missing} cannot be imported: install it "
            "as .ci/run does, or leave the flag out"
        )
    if given == "auto" and missing:
        print(f"without the reference: {missing} cannot be imported")
    return given != "no" and not missing


def make_config(get_config: GetConfig, args: Any) -> Any:
    """The reference's recipe at the size that the flags give, checked and locked."""
    config = get_config(args.variant)
    config.model.resolution = args.resolution
    config.data.num_frames, config.data.max_objects = args.frames, args.objects
    config.data.batch_size = args.batch_size
    config.data.source = "synthetic"
    config.train.precision, config.train.remat = args.precision, args.remat
    config.model.attention = args.attention
    return config_lib.finish(config)
