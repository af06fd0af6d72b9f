"""The reference's training step (facebookresearch/sam2@2b90b9f), of its own released configuration.

Everything is built from the file that it fine-tunes on MOSE with: model, losses, optimizer with its
groups, clipping. This module imports no JAX, so that a process that measures has the one of both
libraries that it is about.
"""
# pyright: reportMissingImports=false

import contextlib
import importlib.util
import inspect
import io
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

RECIPE = "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml"
NEEDED = ("torch", "sam2", "training", "hydra")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def missing() -> str:
    """The packages of the reference that are not installed; empty if it can run."""
    return ", ".join(name for name in NEEDED if importlib.util.find_spec(name) is None)


class Side(NamedTuple):
    """What a step needs."""

    model: Any
    criterion: Any
    optimizer: Any  # of its own class
    clip: Any


def recipe(variant: Mapping[str, Any], resolution: int) -> Any:
    """Its configuration for one of our sizes, given the fields of a `Variant`."""
    import sam2
    from omegaconf import OmegaConf
    from training.utils.train_utils import register_omegaconf_resolvers

    if not OmegaConf.has_resolver("divide"):
        register_omegaconf_resolvers()
    config: Any = OmegaConf.load(pathlib.Path(sam2.__path__[0]) / RECIPE)
    config.scratch.resolution = resolution
    v, m = variant, config.trainer.model
    c, d = v["hidden_dim"], v["memory_dim"]
    m.image_encoder.trunk.update(
        embed_dim=v["embed_dim"],
        num_heads=v["num_heads"],
        stages=list(v["stages"]),
        global_att_blocks=list(v["global_blocks"]),
        window_spec=list(v["window_spec"]),
        window_pos_embed_bkg_spatial_size=[v["background"]] * 2,
    )
    m.image_encoder.neck.d_model = m.image_encoder.neck.position_encoding.num_pos_feats = c
    m.image_encoder.neck.backbone_channel_list = [v["embed_dim"] * 2**i for i in (3, 2, 1, 0)]
    m.memory_attention.update(d_model=c, num_layers=v["memory_layers"])
    layer = m.memory_attention.layer
    layer.update(d_model=c, dim_feedforward=v["feedforward_dim"])
    side = resolution // 16
    for attention in (layer.self_attention, layer.cross_attention):
        attention.update(embedding_dim=c, feat_sizes=[side, side])
    layer.cross_attention.kv_in_dim = d
    m.memory_encoder.update(out_dim=d)
    m.memory_encoder.position_encoding.num_pos_feats = d
    m.memory_encoder.mask_downsampler.embed_dim = c
    m.memory_encoder.fuser.layer.dim = c
    m.memory_encoder.in_dim = c
    return config


def make_model(config: Any, variant: Mapping[str, Any]) -> Any:
    """The model of a configuration, of the variant's size throughout."""
    from hydra.utils import instantiate
    from sam2.modeling.sam import transformer

    width = variant["decoder_mlp_dim"]  # no setting of its: 2048 in all its sizes
    two_way = transformer.TwoWayTransformer

    def of_width(*args: Any, **kwargs: Any) -> Any:
        return two_way(*args, **kwargs | {"mlp_dim": width})

    quiet = contextlib.redirect_stdout(io.StringIO())
    with mock.patch("sam2.modeling.sam2_base.TwoWayTransformer", of_width), quiet:
        return instantiate(config, _convert_="all")


def make_side(variant: Mapping[str, Any], resolution: int) -> Side:
    """Model, losses, optimizer and clipping as its trainer makes them."""
    from hydra.utils import instantiate
    from training.optimizer import construct_optimizer

    config = recipe(variant, resolution)
    model, o = make_model(config.trainer.model, variant).train(), config.trainer.optim
    optimizer = construct_optimizer(model, o.optimizer, o.options, o.param_group_modifiers)
    criterion = instantiate(config.trainer.loss.all, _convert_="all")
    return Side(model, criterion, optimizer, instantiate(o.gradient_clip))


def make_predictor(variant: Mapping[str, Any], resolution: int) -> Any:
    """Its video predictor as its evaluation builds it: without postprocessing or compilation."""
    from omegaconf import OmegaConf
    from sam2.modeling.sam2_base import SAM2Base

    known = inspect.signature(SAM2Base.__init__).parameters
    trained = recipe(variant, resolution).trainer.model
    given = {name: trained[name] for name in trained if name in known}
    given |= {"image_size": resolution, "non_overlap_masks": True}
    given["_target_"] = "sam2.sam2_video_predictor.SAM2VideoPredictor"
    return make_model(OmegaConf.create(given), variant).eval()


class Script:
    """Stands in for its random numbers: answers so that it follows a plan (see plans.make)."""

    def __init__(self, plan: Mapping[str, np.ndarray]):
        frame = np.arange(len(plan["is_cond"]))
        cond, corrected = frame[plan["is_cond"]], frame[plan["is_corrected"]]
        low, high = 0.0, 0.999  # below every probability, and above
        self._answers = [low if plan["use_points"] else high]
        if plan["use_points"]:
            self._answers += [low if plan["is_box"][i] else high for i in cond]
            truth = plan["from_truth"][plan["order"]][plan["is_corrected"][plan["order"]]]
            self._answers += [low if x else high for x in truth.flatten()]
        self._counts = [len(cond), len(corrected)]
        frames = [cond[cond > 0], corrected[~plan["is_cond"][corrected]]]
        self._frames = [some for some in frames if len(some)]

    def random(self) -> float:
        return self._answers.pop(0)

    def integers(self, low: int, high: int, endpoint: bool) -> int:
        return self._counts.pop(0)

    def choice(self, among: Any, size: int, replace: bool) -> np.ndarray:
        frames = self._frames.pop(0)
        assert len(frames) == size
        return frames

    def is_finished(self) -> bool:
        return not self._answers and not self._frames


def normalised(images: np.ndarray) -> Any:
    """uint8 images (... h w 3) as its models take them, float32 (... 3 h w)."""
    import torch

    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (torch.tensor(np.moveaxis(images, -1, -3).astype(np.float32)) / 255 - mean) / std


def datapoint(images: np.ndarray, masks: np.ndarray) -> Any:
    """What its loader would make of uint8 images (b t h w 3) and masks (b t o h w)."""
    import torch
    from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

    b, t, o = masks.shape[:3]
    flat = masks.swapaxes(0, 1).reshape(t, b * o, *masks.shape[3:])
    index = np.zeros((t, b * o, 2), np.int64)
    index[..., 0], index[..., 1] = np.arange(t)[:, None], np.repeat(np.arange(b), o)
    nothing = torch.zeros(t, b * o, 0)
    # Their decorator hides the arguments that it adds
    meta_class: Any = BatchedVideoMetaData
    clips_class: Any = BatchedVideoDatapoint
    return clips_class(
        img_batch=normalised(images).transpose(0, 1),
        obj_to_frame_idx=torch.tensor(index),
        masks=torch.tensor(flat),
        metadata=meta_class(nothing, nothing, batch_size=[t]),
        dict_key="all",
        batch_size=[t],
    )


def forward(side: Side, clips: Any, plan: Mapping[str, np.ndarray]) -> Any:
    """Its loss on a batch, prompted by a plan."""
    script = Script(plan)
    side.model.rng = script
    loss = side.criterion(side.model(clips), clips.masks)["core_loss"]
    assert script.is_finished()
    return loss


def step(
    side: Side, clips: Any, plan: Mapping[str, np.ndarray], precision: str = "float32"
) -> float:
    """One step of its trainer: gradients, clipping, optimizer. Returns the loss.

    In bfloat16 its trainer runs model and losses under autocast, which leaves parameters, some
    operations and the losses' sums in float32.
    """
    import torch

    side.optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        loss = forward(side, clips, plan)
    loss.backward()
    side.clip(model=side.model)
    side.optimizer.step(0.0, 0)
    return float(loss.detach())
