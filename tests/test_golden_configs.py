"""Every config in every variant is what it was: no number changes unnoticed.

tests/golden/default.json holds all keys of configs/default.py:tiny. The file of another config says
in what its `tiny` differs from that, sources of a mixture from the source of the default; its other
variants, in what they differ from its own `tiny`. gpu.json says what is recomputed, and in how many
parts a device's videos are worked off, on some machines; null where nothing fits. After a change
that is meant, write them anew and look at the difference:

    python -m tests.test_golden_configs
"""

import contextlib
import json
import pathlib
from typing import Any

import pytest

from sam2_jax import config as config_lib
from sam2_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
VARIANTS = ("tiny", "small", "base_plus", "large", "nano")
MACHINES = ("8", "24", "80", "8x24")  # GB of a device, or of each of eight
MIXTURE = "data.mixture"

Flat = dict[str, Any]  # of JSON's types, by dotted key


def resolved(name: str, variant: str) -> Flat:
    """All keys of a config as a run would get them, and the names of a mixture's sources."""
    config = config_lib.finish(config_lib.load_file(f"{ROOT}/configs/{name}.py:{variant}"))
    flat = config_lib.flat_keys(config) | {MIXTURE: sorted(config.data.mixture)}
    return json.loads(json.dumps(flat))


def default_of(key: str) -> str:
    """The key of the default config that this one is a copy of."""
    if not key.startswith(f"{MIXTURE}."):
        return key
    return "data." + key.removeprefix(f"{MIXTURE}.").split(".", 1)[1]


def difference(flat: Flat, base: Flat) -> Flat:
    """What is not as in `base`, which every key has a counterpart in."""
    assert {default_of(key) for key in flat} == {default_of(key) for key in base}
    return {
        key: flat[key]
        for key in sorted(flat)
        if flat[key] != base.get(key, base.get(default_of(key)))
    }


def golden(name: str) -> dict[str, Flat]:
    """What the file of a config is to hold."""
    default, tiny = resolved("default", "tiny"), resolved(name, "tiny")
    first = dict(sorted(tiny.items())) if name == "default" else difference(tiny, default)
    rest = {variant: difference(resolved(name, variant), tiny) for variant in VARIANTS[1:]}
    return {"tiny": first} | rest


def recomputed(name: str, variant: str) -> Flat:
    """[train.remat, train.accumulate] by machine."""
    found: Flat = dict.fromkeys(MACHINES)
    for machine in MACHINES:
        with contextlib.suppress(UserError):
            train = resolved(name, f"{variant},gpu={machine}")
            found[machine] = [train["train.remat"], train["train.accumulate"]]
    return found


def golden_machines() -> dict[str, Flat]:
    """What gpu.json is to hold."""
    return {name: {v: recomputed(name, v) for v in VARIANTS} for name in NAMES}


def as_text(content: dict[str, Flat]) -> str:
    """JSON with a line for every key, so that a changed value is a changed line."""
    blocks = []
    for variant, flat in content.items():
        lines = [f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in flat.items()]
        blocks.append(f'  "{variant}": {{\n' + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_what_they_were(name):
    """Run `python -m tests.test_golden_configs` if the change is meant."""
    assert json.loads((GOLDEN / f"{name}.json").read_text()) == golden(name)


def test_machines_get_what_they_got():
    """Run `python -m tests.test_golden_configs` if the change is meant."""
    assert json.loads((GOLDEN / "gpu.json").read_text()) == golden_machines()


def test_every_file_belongs_to_a_config():
    assert {path.stem for path in GOLDEN.glob("*.json")} == {*NAMES, "gpu"}


def write_all() -> None:
    """Write all files anew, and remove those of configs that are no more."""
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.json"):
        path.unlink()
    for name in NAMES:
        (GOLDEN / f"{name}.json").write_text(as_text(golden(name)))
    (GOLDEN / "gpu.json").write_text(as_text(golden_machines()))


if __name__ == "__main__":
    write_all()
