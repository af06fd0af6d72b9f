"""Files of whole models: `.pt` and `.pth` as facebookresearch/sam2 writes them, and `.safetensors`.

Both hold a state dict under the reference's names, in its layouts (see convert.py). Nothing is
unpickled but tensors and plain containers.

No tensor depends on the resolution: one file serves all. As in the reference, what does depend on
it is computed for the grid at hand: the trunk's position embedding is stretched, its window tile
repeated (which asks for a multiple of 32), sine codes are scaled to the grid, rotary angles count
its cells (a yaml's feat_sizes only says which to compute beforehand), points are divided by the
image's side. Only the reference's image predictor insists on 1024 (`_bb_feat_sizes`).
"""

import contextlib
import os
import pathlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  # makes bfloat16 known to numpy, which safetensors asks for it
import numpy as np
import safetensors.numpy

from sam2_jax import convert
from sam2_jax.model.variants import VARIANTS
from sam2_jax.types import UserError, listed

PICKLED = (".pt", ".pth")
SUFFIXES = (*PICKLED, ".safetensors")
HOLDS = "expected {'model': tensors by name} as facebookresearch/sam2 writes it, or these tensors"
AGAIN = "get it again where it came from"
SAFE = (2, 6)  # earlier versions can be made to run code even so (CVE-2025-32434)
FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
TYPES = ("float16", "bfloat16", "float32", "float64")  # as PyTorch does
# How files begin that a download leaves in place of what was asked for
NOT_IT = {
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"<": "a web page: download the file itself",
}
# How the names of other models begin, and what to tell whoever has such a file.
FOREIGN = {
    ("image_encoder.blocks.", "image_encoder.patch_embed.", "vision_encoder.layers."): (
        "a checkpoint of SAM 1, another model: take one of SAM 2 or 2.1"
    ),
    ("vision_encoder.backbone.",): (
        "SAM 2 under the names of Hugging Face transformers: take sam2.1_hiera_*.pt or "
        "sam2_hiera_*.pt of the same repository, which has the reference's own names"
    ),
    ("module.",): (
        "names behind DistributedDataParallel's 'module.': save model.module.state_dict()"
    ),
}
ONLY_2_1 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.")  # how names begin that 2.0 has not
# Tensors of a trunk's block whose first axis is the block's width
_BLOCK = re.compile(r"image_encoder.trunk.blocks.(\d+).(?:norm2|proj|attn.proj|mlp.layers.1).\w+")


def read(path: pathlib.Path, values: bool = True) -> dict[str, np.ndarray]:
    """Name -> float32 array of every tensor in a file; other float types are converted.

    Without `values` only names and shapes are read, and the arrays are `convert.hollow`.
    `UserError` for what is no such file, tensors that are not floats, SAM 1, and Hugging Face's
    names.
    """
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise UserError(f"{path} is no file with an ending of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from e
    if what := [x for begins, x in NOT_IT.items() if start.lstrip().startswith(begins)]:
        raise UserError(f"{path} is {what[0]}")
    state = (_read_pickled if path.suffix in PICKLED else _read_safetensors)(path, values)
    if what := [x for starts, x in FOREIGN.items() if any(k.startswith(starts) for k in state)]:
        raise UserError(f"{path} holds {what[0]}")
    return state


def write(path: pathlib.Path, state: Mapping[str, np.ndarray], overwrite: bool = False) -> None:
    """Writes a state dict, as float32 and in the format of the suffix, whole or not at all.

    Raises `UserError` if the file exists and is not to be overwritten, or cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} has none of the endings {', '.join(SUFFIXES)}")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: choose another name, or say --overwrite")
    # Writable, as torch.from_numpy wants them and JAX's are not
    arrays = {name: np.require(x, np.float32, ["C", "W"]) for name, x in state.items()}
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        mode = part.stat().st_mode  # safetensors would keep the file to its owner
        if path.suffix in PICKLED:
            torch = _torch(path)
            torch.save({"model": {k: torch.from_numpy(x) for k, x in arrays.items()}}, part)
        else:
            safetensors.numpy.save_file(arrays, part, metadata={"format": "pt"})
        part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:  # torch's are RuntimeErrors
        raise UserError(f"{path} cannot be written ({e}): is there a folder with room?") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def recognise(state: Mapping[str, Any]) -> tuple[str, str]:
    """(variant, version) of a state dict, by names and shapes; a few tensors may be missing.

    Raises `UserError`, which says what there is, for a trunk of none of the variants.
    """
    named = ((_BLOCK.fullmatch(name), x) for name, x in state.items() if x.ndim)
    widths = {(int(block[1]), x.shape[0]) for block, x in named if block}
    fits = {}
    for name, v in VARIANTS.items():
        blocks = [v.embed_dim * 2**stage for stage, n in enumerate(v.stages) for _ in range(n)]
        # Of two that agree as well (half a file of tiny or small) the shallower
        fits[name] = (len(widths & set(enumerate(blocks))), -len(blocks))
    variant = max(fits, key=lambda name: fits[name])
    if 2 * fits[variant][0] <= len(widths):
        trunk = listed(f"block {i} {c} wide" for i, c in sorted(widths)) or "no block"
        raise UserError(
            f"{len(state)} tensors ({listed(sorted(state))}) with {trunk} of a trunk: expected "
            f"those of a SAM 2, that is {', '.join(VARIANTS)}"
        )
    return variant, "2.1" if any(name.startswith(ONLY_2_1) for name in state) else "2.0"


def load(path: pathlib.Path, like: Mapping, values: bool = True) -> dict:
    """Parameters of the model whose shapes are `like`, float32, from a file; see `read`.

    `UserError` names tensors that are missing, superfluous or misshapen, and how to mend it.
    """
    state = read(path, values)
    try:
        return convert.from_reference(state, like)
    except UserError as e:
        raise UserError(f"{path}: {e}; {_advice(state, like)}") from e


def _advice(state: Mapping[str, np.ndarray], like: Mapping) -> str:
    """What the file looks like, beside what is wanted, and how to mend it."""
    try:
        found = recognise(state)
        wanted = recognise(convert.hollow_reference(like))
    except UserError as e:
        return str(e)
    looks = f"the file looks like {' '.join(found)}"
    if found == wanted:
        return f"{looks}, as it should, but is not whole or not as published: {AGAIN}"
    flags = "--config=...:{} --config.model.version={}".format(*found)
    return f"{looks}, this config is {' '.join(wanted)}: take {flags}"


def _torch(path: pathlib.Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"{path} needs PyTorch: pip install -e '.[torch]'") from e
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE:
        raise UserError(f"{path} needs a newer PyTorch: pip install -U -e '.[torch]'")
    return torch


def _read_pickled(path: pathlib.Path, values: bool) -> dict[str, np.ndarray]:
    torch = _torch(path)
    mapped = zipfile.is_zipfile(path)  # torch's format since 1.6; its index stands at the end
    try:
        # Mapped, a file is read where it is used: not the moments in a trainer's checkpoint
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it has to say, the error says
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as e:  # torch raises almost anything for a file that is not one of its own
        about = f"{path} ({path.stat().st_size:,} bytes, {type(e).__name__})"
        if isinstance(e, pickle.UnpicklingError):
            why = "holds code, which is not run, or is not PyTorch's"
            raise UserError(f"{about} {why}: {HOLDS}; do not trust its source") from e
        raise UserError(f"{about} is cut short or not PyTorch's: {HOLDS}; {AGAIN}") from e
    state = loaded.get("model", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{path} holds no tensors but {type(state).__name__}: {HOLDS}")
    if other := [str(k) for k, x in state.items() if not isinstance(x, torch.Tensor)]:
        raise UserError(f"{path} holds what is no tensor: {listed(other)}: {HOLDS}")
    kinds = {k: _kind(x) for k, x in state.items()}
    _refuse_types(path, {k: kind for k, kind in kinds.items() if kind not in TYPES})
    if not values:
        return {str(name): convert.hollow(tuple(x.shape)) for name, x in state.items()}
    if mapped:  # torch does not look at the sums that it writes; of all that is in the file
        with zipfile.ZipFile(path) as archive:
            wrong = archive.testzip()
        if wrong:
            raise UserError(f"{path} is damaged: {wrong} in it is not what was saved: {AGAIN}")
    return {str(name): x.detach().float().numpy() for name, x in state.items()}


def _kind(x: Any) -> str:
    """The type of a torch tensor, and what else is odd about it, such as sparse or meta."""
    kind = str(x.dtype).removeprefix("torch.")
    layout = str(x.layout).removeprefix("torch.")
    return " ".join([kind, *["meta"] * x.is_meta, *[layout] * (layout != "strided")])


def _read_safetensors(path: pathlib.Path, values: bool) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            types = {name: file.get_slice(name).get_dtype() for name in file.keys()}
            _refuse_types(path, {k: x for k, x in types.items() if x not in FLOATS})
            if not values:
                return {k: convert.hollow(tuple(file.get_slice(k).get_shape())) for k in types}
            return {k: file.get_tensor(k).astype(np.float32, copy=False) for k in types}
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(
            f"{path} ({path.stat().st_size:,} bytes) is cut short or not safetensors ({e}): {AGAIN}"
        ) from e


def _refuse_types(path: pathlib.Path, types: Mapping[str, Any]) -> None:
    if types:
        raise UserError(
            f"{path} holds {listed(f'{k} of type {x}' for k, x in types.items())}: expected "
            f"{', '.join(TYPES)}, dense: take weights that are not quantised"
        )
