"""The reference's tensors and ours: one table of names and layouts that serves both directions.

The reference (facebookresearch/sam2@2b90b9f) keeps torch layouts under dotted names; we keep
channels-last arrays in a nested dict. Only numpy here: whoever reads a checkpoint file hands its
tensors over as arrays, and nothing but names and the order of axes changes, so that a round trip
is exact to the bit. What comes out are views of what went in, almost all of them strided: a file
that is mapped into memory is not read, only looked at.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sam2_jax.types import UserError, listed

# Kind of layer -> its tensors: the reference's leaf, ours, and the layout: the reference's axes ->
# ours, a letter each, where 1 is an axis of length one that we leave out.
LAYERS = {
    "dense": (("weight", "kernel", "oi->io"), ("bias", "bias", "o->o")),
    "conv": (("weight", "kernel", "oihw->hwio"), ("bias", "bias", "o->o")),
    "upsample": (("weight", "kernel", "iohw->ihwo"), ("bias", "bias", "o->o")),
    "norm": (("weight", "scale", "c->c"), ("bias", "bias", "c->c")),
    "norm2d": (("weight", "weight", "c->c"), ("bias", "bias", "c->c")),
}
# Convolutions with a norm and an activation between them, numbered on in a torch Sequential
SEQUENCES = tuple(
    (kind, f"{theirs}.{3 * i + offset}", f"{ours}/{name}_{i}")
    for theirs, ours, convs in (
        ("memory_encoder.mask_downsampler.encoder", "memory_encoder/mask_downsampler", 5),
        ("sam_prompt_encoder.mask_downscaling", "sam_prompt_encoder/mask_downscaling", 3),
    )
    for kind, name, offset, count in (("conv", "conv", 0, convs), ("norm2d", "norm", 1, convs - 1))
    for i in range(count)
)
# (kind of layer or layout of a single tensor, the reference's name, ours). `#` is a number and
# {a,b} are alternatives, the same on both sides. Where ours is not given it is the reference's,
# with `/` for `.` and `_#` for `.#`.
TABLE = (
    ("1chw->hwc", "image_encoder.trunk.{pos_embed,pos_embed_window}"),
    ("conv", "image_encoder.trunk.patch_embed.proj", "image_encoder/trunk/patch_embed"),
    ("norm", "image_encoder.trunk.blocks.#.norm#"),
    ("dense", "image_encoder.trunk.blocks.#.{proj,attn.qkv,attn.proj,mlp.layers.#}"),
    ("conv", "image_encoder.neck.convs.#.conv", "image_encoder/neck/convs_#"),
    (
        "dense",
        "memory_attention.layers.#.{self_attn,cross_attn_image}.{q,k,v,out}_proj",
        "memory_attention/layers_#_{self_attn,cross_attn_image}/{q,k,v,out}_proj",
    ),
    ("dense", "memory_attention.layers.#.linear#", "memory_attention/layers_#_linear#"),
    ("norm", "memory_attention.layers.#.norm#", "memory_attention/layers_#_norm#"),
    ("norm", "memory_attention.norm"),
    *SEQUENCES,
    ("conv", "memory_encoder.{pix_feat_proj,out_proj}"),
    (
        "oihw->hwio",
        "memory_encoder.fuser.layers.#.dwconv.weight",
        "memory_encoder/fuser_layers_#/dwconv_kernel",
    ),
    (
        "c->c",
        "memory_encoder.fuser.layers.#.dwconv.bias",
        "memory_encoder/fuser_layers_#/dwconv_bias",
    ),
    ("c->c", "memory_encoder.fuser.layers.#.gamma", "memory_encoder/fuser_layers_#/gamma"),
    ("norm2d", "memory_encoder.fuser.layers.#.norm", "memory_encoder/fuser_layers_#/norm"),
    ("dense", "memory_encoder.fuser.layers.#.pwconv#", "memory_encoder/fuser_layers_#/pwconv#"),
    (
        "df->df",
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
        "sam_prompt_encoder/gaussian",
    ),
    (
        "1c->c",
        "sam_prompt_encoder.{point_embeddings.#,not_a_point_embed,no_mask_embed}.weight",
        "sam_prompt_encoder/{point_embeddings/#,not_a_point_embed,no_mask_embed}",
    ),
    (
        "nc->nc",
        "sam_mask_decoder.{obj_score_token,iou_token,mask_tokens}.weight",
        "sam_mask_decoder/{obj_score_token,iou_token,mask_tokens}",
    ),
    (
        "dense",
        "sam_mask_decoder.transformer.layers.#."
        "{self_attn,cross_attn_token_to_image,cross_attn_image_to_token}.{q,k,v,out}_proj",
    ),
    ("dense", "sam_mask_decoder.transformer.layers.#.mlp.layers.#"),
    ("norm", "sam_mask_decoder.transformer.layers.#.norm#"),
    ("dense", "sam_mask_decoder.transformer.final_attn_token_to_image.{q,k,v,out}_proj"),
    ("norm", "sam_mask_decoder.transformer.norm_final_attn"),
    ("conv", "sam_mask_decoder.conv_s#"),
    ("upsample", "sam_mask_decoder.output_upscaling.0", "sam_mask_decoder/upscale_0"),
    ("norm2d", "sam_mask_decoder.output_upscaling.1", "sam_mask_decoder/upscale_norm"),
    ("upsample", "sam_mask_decoder.output_upscaling.3", "sam_mask_decoder/upscale_1"),
    ("dense", "sam_mask_decoder.output_hypernetworks_mlps.#.layers.#"),
    ("dense", "sam_mask_decoder.{iou_prediction_head,pred_obj_score_head}.layers.#"),
    ("conv", "mask_downsample"),
    ("dense", "obj_ptr_proj.layers.#"),
    ("t11d->td", "maskmem_tpos_enc"),
    ("11c->c", "{no_mem_embed,no_mem_pos_enc}"),
    ("1c->c", "no_obj_ptr"),
    # Of SAM 2.1 only
    ("1d->d", "no_obj_embed_spatial"),
    ("dense", "obj_ptr_tpos_proj"),
)
STACKED = "sam_prompt_encoder/point_embeddings"  # four tensors of the reference, one of ours


class Rule(NamedTuple):
    """One kind of tensor; `#` in both names stands for the same number."""

    reference: str
    ours: str
    layout: str


def _alternatives(name: str) -> list[str]:
    found = re.search(r"\{([^}]*)\}", name)
    if not found:
        return [name]
    start, end = name[: found.start()], name[found.end() :]
    return [x for one in found[1].split(",") for x in _alternatives(start + one + end)]


def _rules() -> list[Rule]:
    rules = []
    for kind, reference, *ours in TABLE:
        ours = ours[0] if ours else reference.replace(".#", "_#").replace(".", "/")
        pairs = zip(_alternatives(reference), _alternatives(ours), strict=True)
        for theirs, our in pairs:
            if kind in LAYERS:
                rules += [Rule(f"{theirs}.{a}", f"{our}/{b}", how) for a, b, how in LAYERS[kind]]
            else:
                rules.append(Rule(theirs, our, kind))
    return rules


RULES = _rules()


def from_reference(state_dict: Mapping[str, np.ndarray], like: Mapping | None = None) -> dict:
    """Parameters of a `Sam2` from the reference's state dict.

    Give the model's own parameters (arrays, or their shapes as of `jax.eval_shape`) as `like` to
    have missing, superfluous and misshapen tensors refused; without, only names that no rule
    knows and axes that no layout fits are. UserError names the tensors.
    """
    found = _names(state_dict, "reference")
    if like is not None:
        wanted = {name: x.shape for name, x in hollow_reference(like).items()}
        given = {name: tuple(x.shape) for name, x in state_dict.items()}
        _refuse("the checkpoint lacks tensors of this model", wanted.keys() - given)
        _refuse("the checkpoint holds tensors that this model has not", given.keys() - wanted)
        wrong = [
            f"{name} {shape} instead of {wanted[name]}"
            for name, shape in given.items()
            if shape != wanted[name]
        ]
        _refuse("tensors of other shapes than this model's", wrong)
    flat = {
        path: _to_ours(name, np.asarray(state_dict[name]), layout)
        for name, (path, layout) in found.items()
    }
    rows = [flat.pop(path) for path in sorted(flat) if path.startswith(STACKED)]
    if len({row.shape for row in rows}) > 1:
        raise UserError(f"{STACKED}: the {len(rows)} tensors have different shapes")
    if rows:
        flat[STACKED] = np.stack(rows)
    params: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, params)[leaf] = value
    return params


def to_reference(params: Mapping) -> dict[str, np.ndarray]:
    """The reference's state dict of a `Sam2`'s parameters; UserError names those with no rule."""
    flat = flatten(params)
    flat |= {f"{STACKED}/{i}": row for i, row in enumerate(flat.pop(STACKED, ()))}
    return {
        name: _to_reference(path, np.asarray(flat[path]), layout)
        for path, (name, layout) in _names(flat, "ours").items()
    }


def hollow(shape: tuple[int, ...]) -> np.ndarray:
    """Zeros, float32, that take no memory: to ask of shapes what is asked of arrays."""
    return np.broadcast_to(np.zeros((), np.float32), shape)


def hollow_reference(like: Mapping) -> dict[str, np.ndarray]:
    """`to_reference` of parameters that only have shapes: every tensor is `hollow`."""
    return to_reference({path: hollow(x.shape) for path, x in flatten(like).items()})


def _names(tensors: Mapping[str, Any], side: str) -> dict[str, tuple[str, str]]:
    """Name -> that of the other side, and the layout; UserError names those with no rule."""
    found = {name: _find(name, side) for name in tensors}
    _refuse("tensors that no SAM 2 has", [name for name, other in found.items() if other is None])
    return {name: other for name, other in found.items() if other is not None}


@functools.cache
def _patterns(side: str) -> list[tuple[re.Pattern, Rule]]:
    def pattern(rule: Rule) -> re.Pattern:
        return re.compile(re.escape(getattr(rule, side)).replace(r"\#", r"(\d+)"))

    return [(pattern(rule), rule) for rule in RULES]


def _find(name: str, side: str) -> tuple[str, str] | None:
    """The name on the other side and the layout."""
    for pattern, rule in _patterns(side):
        if match := pattern.fullmatch(name):
            other = rule.ours if side == "reference" else rule.reference
            for number in match.groups():
                other = other.replace("#", number, 1)
            return other, rule.layout
    return None


def _to_ours(name: str, value: np.ndarray, layout: str) -> np.ndarray:
    theirs, ours = layout.split("->")
    ones = tuple(i for i, axis in enumerate(theirs) if axis == "1")
    if value.ndim != len(theirs) or any(value.shape[i] != 1 for i in ones):
        raise UserError(f"{name} has shape {value.shape}; expected ({', '.join(theirs)})")
    kept = theirs.replace("1", "")
    return value.squeeze(ones).transpose([kept.index(axis) for axis in ours])


def _to_reference(name: str, value: np.ndarray, layout: str) -> np.ndarray:
    theirs, ours = layout.split("->")
    if value.ndim != len(ours):
        raise UserError(f"{name} has shape {value.shape}; expected ({', '.join(ours)})")
    value = value.transpose([ours.index(axis) for axis in theirs.replace("1", "")])
    ones = tuple(i for i, axis in enumerate(theirs) if axis == "1")
    return np.expand_dims(value, ones)


def flatten(params: Mapping, prefix: str = "") -> dict[str, Any]:
    """Slash path -> leaf of a nested dict."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}/") if nested else {prefix + key: value}
    return flat


def _refuse(what: str, names) -> None:
    if names:
        raise UserError(f"{what}: {listed(sorted(names))}")
