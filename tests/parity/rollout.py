"""The reference's training forward on our clips, prompted by our plans, in float32 or float64."""
# pyright: reportMissingImports=false

import contextlib
import functools
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import training.model.sam2
from torch.utils.checkpoint import checkpoint
from training.loss_fns import MultiStepMultiMasksAndIous
from training.utils.data_utils import BatchedVideoDatapoint, BatchedVideoMetaData

from sam2_jax.types import Batch, PromptPlan
from tests.parity.reference import CORRECTIONS, MEAN, STD, Reference


@contextlib.contextmanager
def float64():
    """Within it the reference, which asks for float32 by name in many places, gets float64."""
    torch.set_default_dtype(torch.float64)
    double = torch.Tensor.double
    try:
        with (
            mock.patch.object(torch, "float", torch.float64),
            mock.patch.object(torch, "float32", torch.float64),
            mock.patch.object(torch.Tensor, "float", double),
        ):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class Drawn(NamedTuple):
    """Prompts that the reference drew, for each real object (its flat axis n)."""

    points: np.ndarray  # t 1+corrections n 2
    labels: np.ndarray  # t 1+corrections n
    boxes: np.ndarray  # t n 2 2
    in_order: list[tuple[str, torch.Tensor, torch.Tensor]]  # as drawn, to be given again


class Run(NamedTuple):
    """What one forward pass returned."""

    frames: list[dict]  # the reference's outputs, in frame order
    losses: dict[str, torch.Tensor]
    drawn: Drawn


class Script:
    """Stands in for the reference's random numbers: answers so that it follows our plan."""

    def __init__(self, plan: PromptPlan):
        t = np.arange(len(plan.is_cond))
        cond, corrected = t[plan.is_cond], t[plan.is_corrected]
        order = [*cond, *(i for i in t if i not in cond)]  # as the reference visits them
        self.answers: list[Any] = [0.0 if plan.use_points else 0.9]  # use_pt_input
        if plan.use_points:
            self.answers += [0.0 if plan.is_box[i] else 0.9 for i in cond]
            for i in order:
                if plan.is_corrected[i]:
                    self.answers += [0.0 if x else 0.9 for x in plan.from_truth[i]]
        self.counts = [len(cond), len(corrected)]
        frames = [[i for i in cond if i], [i for i in corrected if not plan.is_cond[i]]]
        self.frames = [list(map(int, some)) for some in frames if some]

    def random(self):
        return self.answers.pop(0)

    def integers(self, low, high, endpoint):
        return self.counts.pop(0) if low == 1 else self.counts[-1]

    def choice(self, among, size, replace):
        frames = self.frames.pop(0)
        assert len(frames) == size and set(frames) <= set(among)
        return np.array(frames)


def datapoint(batch: Batch) -> BatchedVideoDatapoint:
    """What the reference's loader would make of our batch; its objects are the `valid` ones."""
    t = batch.images.shape[1]
    video, slot = np.nonzero(batch.valid)
    # Normalised in float32 also for float64: both start from the same numbers
    images = torch.tensor(np.moveaxis(np.asarray(batch.images), -1, 2).astype(np.float32)) / 255
    images = ((images - MEAN) / STD).transpose(0, 1)
    index = np.stack(np.broadcast_arrays(np.arange(t)[:, None], video[None]), -1)
    nothing = torch.zeros(t, len(video), 0)
    # Their decorator hides the arguments that it adds
    meta_class: Any = BatchedVideoMetaData
    clips_class: Any = BatchedVideoDatapoint
    return clips_class(
        img_batch=images.to(torch.get_default_dtype()),
        obj_to_frame_idx=torch.tensor(index),
        masks=torch.tensor(batch.masks[video, :, slot]).transpose(0, 1),
        metadata=meta_class(nothing, nothing, batch_size=[t]),
        dict_key="all",
        batch_size=[t],
    )


def train_forward(
    model: Reference, batch: Batch, plan: PromptPlan, drawn: Drawn | None = None
) -> Run:
    """The reference's training forward and losses.

    Points and boxes are drawn by the reference, at random, or given again as an earlier run drew
    them: predictions that differ by a rounding would draw others.
    """
    clips: Any = datapoint(batch)
    script: Any = Script(plan)
    model.rng = script
    given = list(drawn.in_order) if drawn else None
    in_order: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def sampler(name):
        original = getattr(training.model.sam2, name)

        def sample(*args, **kwargs):
            if given is None:
                points, labels = original(*args, **kwargs)
            else:
                was, points, labels = given.pop(0)
                assert was == name
            in_order.append((name, points.clone(), labels.clone()))
            return points.to(torch.get_default_dtype()), labels

        return mock.patch.object(training.model.sam2, name, sample)

    with sampler("get_next_point"), sampler("sample_box_points"), blocks_recomputed(model):
        backbone = model.prepare_prompt_inputs(model.forward_image(clips.flat_img_batch), clips)
        outputs: Any = model.forward_tracking(backbone, clips, return_dict=True)
    assert not script.answers and not given
    by_frame = outputs["cond_frame_outputs"] | outputs["non_cond_frame_outputs"]
    frames = [by_frame[i] for i in range(clips.num_frames)]
    order = backbone["init_cond_frames"] + backbone["frames_not_in_init_cond"]
    return Run(frames, loss_of(frames, clips.masks), sort_out(in_order, plan, order, clips.masks))


@contextlib.contextmanager
def blocks_recomputed(model: Reference):
    """Within it what the trunk's blocks compute is not kept for gradients but computed again.

    Of the largest model in float64 eight small frames would take ten gigabytes. Blocks with a
    maximum in them are left alone: see gates.py, which counts those.
    """
    with contextlib.ExitStack() as stack:
        for block in model.image_encoder.trunk.blocks:
            if not block.q_stride:
                again = functools.partial(checkpoint, block.forward, use_reentrant=False)
                stack.enter_context(mock.patch.object(block, "forward", again))
        yield


def loss_of(frames: list[dict], masks: torch.Tensor) -> dict[str, torch.Tensor]:
    """The reference's losses with the weights of its configuration."""
    criterion = MultiStepMultiMasksAndIous(
        weight_dict={"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1},
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=True,
        focal_gamma_obj_score=0,
        focal_alpha_obj_score=-1,
    )
    return criterion(frames, masks)


def sort_out(in_order: list, plan: PromptPlan, order: list[int], masks: torch.Tensor) -> Drawn:
    """Prompts by frame and decoder pass: first those of all conditioning frames were drawn."""
    t, n = masks.shape[:2]
    points = np.zeros((t, 1 + CORRECTIONS, n, 2), np.float32)
    labels = np.zeros((t, 1 + CORRECTIONS, n), np.int32)
    boxes = np.zeros((t, n, 2, 2), np.float32)
    left = list(in_order)
    if plan.use_points:
        for i in (i for i in order if plan.is_cond[i]):
            name, where, what = left.pop(0)
            if name == "sample_box_points":
                boxes[i] = where
            else:
                points[i, 0], labels[i, 0] = where[:, 0], what[:, 0]
        for i in (i for i in order if plan.is_corrected[i]):
            for k in range(CORRECTIONS):
                _, where, what = left.pop(0)
                points[i, 1 + k], labels[i, 1 + k] = where[:, 0], what[:, 0]
    assert not left
    return Drawn(points, labels, boxes, in_order)
