"""Shows every parameter of a config's model and how it is trained; reads no data, compiles nothing.

  python scripts/inspect_model.py --config=configs/davis.py:tiny
  python scripts/inspect_model.py --config=configs/davis.py:nano --step=1000 --json=parameters.json
  python scripts/inspect_model.py --config=configs/davis.py:large --config.mesh.fsdp=8

Paths and classes are what the globs and class:NAME of optim.* match. Rate and decay are those of
the update after --step updates, with layer decay and multiplier. Sharding is that of the config's
mesh on the devices here.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # for `import configs`

import functools
import json
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from sam2_jax import config as config_lib
from sam2_jax import optim, recipe, sharding
from sam2_jax.model.classes import module_classes
from sam2_jax.model.sam2 import init_params, make_sam2
from sam2_jax.rules import paths_of
from sam2_jax.types import UserError

_STEP = flags.DEFINE_integer("step", 0, "Updates done before the one that is shown.")
_JSON = flags.DEFINE_string("json", "", "File for the same as JSON, with all options.")
RIGHT = ("count", "rate", "decay", "arrays", "share")  # columns of numbers


def words_of_layout(shape: tuple[int, ...], mesh: Mesh) -> str:
    """Where an array lies."""
    spec = sharding.leaf_spec(shape, mesh.shape["fsdp"])
    axis = next((axis for axis, name in enumerate(spec) if name), None)
    return "on every device" if axis is None else f"axis {axis} over fsdp"


def inspect(config: Any, mesh: Mesh, step: int) -> dict[str, Any]:
    """All that is shown, of JSON's types: `parameters`, `groups` and what they were asked for."""
    m = config.model
    model = make_sam2(m.variant, m.resolution, m.version)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    optimizer, shapes = recipe.make_config_optimizer(config, shapes)
    classes = module_classes(model)
    parameters = []
    for path, leaf in zip(paths_of(shapes), jax.tree.leaves(shapes), strict=True):
        label = optimizer.labels[path]
        parameters.append(
            {
                "path": path,
                "class": classes[path.rpartition("/")[0]],
                "shape": list(leaf.shape),
                "count": leaf.size,
                "group": label,
                "frozen": label == optim.FROZEN,
                "options": optim.values_of_path(optimizer, path, step),
                "sharding": words_of_layout(leaf.shape, mesh),
            }
        )
    sizes = optim.group_sizes(optimizer, shapes)
    groups = [
        {"group": label, "about": optimizer.about[label], "arrays": arrays, "count": count}
        for label, (arrays, count) in sizes.items()
    ]
    asked = {"variant": m.variant, "version": m.version, "step": step, "steps": config.train.steps}
    return asked | {"mesh": dict(mesh.shape), "groups": groups, "parameters": parameters}


def parameter_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """One line of the first table each."""
    about = {group["group"]: group["about"] for group in found["groups"]}
    return [
        {
            "path": p["path"],
            "class": p["class"],
            "shape": " x ".join(map(str, p["shape"])),
            "count": f"{p['count']:,}",
            "rate": "-" if p["frozen"] else f"{p['options']['learning_rate']:.4g}",
            "decay": "-" if p["frozen"] else f"{p['options']['weight_decay']:.4g}",
            "sharding": p["sharding"],
            "group": about[p["group"]],
        }
        for p in found["parameters"]
    ]


def group_rows(found: dict[str, Any]) -> list[dict[str, str]]:
    """One line of the second table each: sums per group, of what is trained and of all."""
    groups = found["groups"]
    trained = [group for group in groups if group["group"] != optim.FROZEN]
    total = sum(group["count"] for group in groups)
    lines = [(group["about"], [group]) for group in groups]
    return [
        {
            "arrays": str(sum(group["arrays"] for group in of)),
            "count": f"{sum(group['count'] for group in of):,}",
            "share": f"{sum(group['count'] for group in of) / total:.1%}",
            "group": name,
        }
        for name, of in [*lines, ("trained", trained), ("all", groups)]
    ]


def table(rows: list[dict[str, str]]) -> str:
    """Aligned columns under their names; numbers to the right."""
    rows = [{name: name for name in rows[0]}, *rows]
    widths = {name: max(len(row[name]) for row in rows) for name in rows[0]}

    def cell(name: str, text: str) -> str:
        return text.rjust(widths[name]) if name in RIGHT else text.ljust(widths[name])

    return "\n".join("  ".join(cell(*item) for item in row.items()).rstrip() for row in rows)


def main(config: Any) -> None:
    """Prints both tables, writes the JSON file."""
    step, steps = _STEP.value, config.train.steps
    if not 0 <= step < steps:
        raise UserError(f"--step={step} must be at least 0 and less than train.steps={steps}")
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model)
    found = inspect(config, mesh, step)
    axes = ", ".join(f"{name} {size}" for name, size in found["mesh"].items())
    print(f"{found['variant']} {found['version']}, after {step} of {steps} updates; mesh: {axes}\n")
    print(table(parameter_rows(found)) + "\n")
    print(table(group_rows(found)))
    if _JSON.value:
        try:
            pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")
        except OSError as e:
            raise UserError(f"--json={_JSON.value} cannot be written: {e.strerror}") from e


if __name__ == "__main__":
    config_lib.run(main)
