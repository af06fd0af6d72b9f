"""The reference's own classes at any of our sizes, with random weights, and its training forward.

Settings are those of its sam2.1_hiera_b+_MOSE_finetune.yaml, without dropout.
"""
# pyright: reportMissingImports=false

from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import training.model.sam2
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.transformer import RoPEAttention, TwoWayTransformer
from sam2.modeling.sam2_utils import LayerNorm2d
from training.loss_fns import MultiStepMultiMasksAndIous
from training.model.sam2 import SAM2Train

from sam2_jax.model.variants import Variant
from sam2_jax.types import Batch, PromptPlan

CORRECTIONS = 3  # clicks per corrected frame; the reference's configuration has 7
GAIN = 1.2
MEAN, STD = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


class Reference(SAM2Train):
    """SAM2Train whose two-way transformer has the variant's width."""

    decoder_mlp_dim = 2048

    def _build_sam_heads(self):
        super()._build_sam_heads()
        if self.decoder_mlp_dim != 2048:
            old = self.sam_mask_decoder
            transformer = TwoWayTransformer(2, self.hidden_dim, 8, self.decoder_mlp_dim)
            self.sam_mask_decoder = MaskDecoder(
                num_multimask_outputs=3,
                transformer=transformer,
                transformer_dim=self.hidden_dim,
                iou_head_depth=3,
                iou_head_hidden_dim=256,
                use_high_res_features=True,
                iou_prediction_use_sigmoid=True,
                pred_obj_scores=True,
                pred_obj_scores_mlp=True,
                use_multimask_token_for_obj_ptr=old.use_multimask_token_for_obj_ptr,
            )


def build(v: Variant, resolution: int, kind: str, seed: int) -> Reference:
    """The reference's training model at our variant's dimensions, every tensor random.

    `kind` is a version, or "faint": version 2.1 with all weights so small that norms see numbers
    beside which their epsilon matters.
    """
    torch.manual_seed(seed)
    c, d = v.hidden_dim, v.memory_dim
    trunk = Hiera(
        embed_dim=v.embed_dim,
        num_heads=v.num_heads,
        stages=v.stages,
        global_att_blocks=v.global_blocks,
        window_pos_embed_bkg_spatial_size=(v.background, v.background),
        window_spec=v.window_spec,
    )
    neck = FpnNeck(
        position_encoding=PositionEmbeddingSine(c),
        d_model=c,
        backbone_channel_list=[v.embed_dim * 2**i for i in (3, 2, 1, 0)],
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )

    def rope(**kwargs) -> RoPEAttention:
        return RoPEAttention(embedding_dim=c, num_heads=1, downsample_rate=1, dropout=0.0, **kwargs)

    layer = MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=v.feedforward_dim,
        dropout=0.0,
        pos_enc_at_attn=False,
        self_attention=rope(),
        d_model=c,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=rope(rope_k_repeat=True, kv_in_dim=d),
    )
    memory_encoder = MemoryEncoder(
        out_dim=d,
        position_encoding=PositionEmbeddingSine(d),
        mask_downsampler=MaskDownSampler(c, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(CXBlock(c), num_layers=2),
        in_dim=c,
    )
    latest = kind != "2.0"
    sized: Any = type("Sized", (Reference,), {"decoder_mlp_dim": v.decoder_mlp_dim})
    model = sized(
        ImageEncoder(trunk, neck, scalp=1),
        MemoryAttention(c, True, layer, v.memory_layers),
        memory_encoder,
        image_size=resolution,
        sigmoid_scale_for_mem_enc=20.0,
        sigmoid_bias_for_mem_enc=-10.0,
        use_mask_input_as_output_without_sam=True,
        directly_add_no_mem_embed=True,
        no_obj_embed_spatial=latest,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        iou_prediction_use_sigmoid=True,
        use_obj_ptrs_in_encoder=True,
        add_tpos_enc_to_obj_ptrs=latest,
        proj_tpos_enc_in_obj_ptrs=latest,
        use_signed_tpos_enc_to_obj_ptrs=latest,
        only_obj_ptrs_in_the_past_for_eval=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        fixed_no_obj_ptr=True,
        multimask_output_for_tracking=True,
        use_multimask_token_for_obj_ptr=True,
        multimask_min_pt_num=0,
        multimask_max_pt_num=1,
        use_mlp_for_obj_ptr_proj=True,
        # What the prompts of a step are is scripted, see `Script`
        prob_to_use_pt_input_for_train=0.5,
        prob_to_use_box_input_for_train=0.5,
        prob_to_sample_from_gt_for_train=0.1,
        num_frames_to_correct_for_train=2,
        rand_frames_to_correct_for_train=True,
        add_all_frames_to_correct_as_cond=True,
        num_init_cond_frames_for_train=2,
        rand_init_cond_frames_for_train=True,
        num_correction_pt_per_frame=CORRECTIONS,
    ).train()
    randomise(model)
    if kind == "faint":
        norms = [m for m in model.modules() if isinstance(m, (torch.nn.LayerNorm, LayerNorm2d))]
        kept = {id(x) for norm in norms for x in norm.parameters()}
        with torch.no_grad():
            for x in model.parameters():
                x *= 1.0 if id(x) in kept else 0.02
    return model


def randomise(model: torch.nn.Module) -> None:
    """Weights that neither fade nor drown what passes through them; nothing left at 0 or 1."""
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("weight") and x.ndim > 1 and "embed." not in name:
                fan_in = x[0].numel() if "upscaling" not in name else len(x)
                # Attention to memories that tells one from another
                sharp = "memory_attention" in name and ("q_proj" in name or "k_proj" in name)
                x.normal_(0.0, (2.5 if sharp else GAIN) / fan_in**0.5)
            else:
                x += 0.3 * torch.randn_like(x)


def score_bias(model: Any) -> torch.Tensor:
    """What is added to all object scores."""
    return model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias


def balance(model: Reference, frames: list[dict]) -> None:
    """Shift the object scores in `frames` so that both signs occur, none near zero."""
    scores = [
        score.flatten()
        for frame in frames
        if frame["mask_inputs"] is None
        for score in frame["multistep_object_score_logits"]
    ]
    ordered = torch.cat(scores).sort().values
    third = len(ordered) // 3
    middle = ordered[third : len(ordered) - third]
    widest = int((middle[1:] - middle[:-1]).argmax())
    with torch.no_grad():
        bias = score_bias(model)
        bias -= (middle[widest] + middle[widest + 1]) / 2


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """All tensors as arrays."""
    return {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}


class Script:
    """Stands in for the reference's random numbers: answers so that it follows our plan."""

    def __init__(self, plan):
        self.plan = plan
        t = np.arange(len(plan.is_cond))
        cond, corrected = t[plan.is_cond], t[plan.is_corrected]
        rest = [i for i in t if i not in cond]
        order = list(cond) + rest  # as the reference visits them
        self.answers: list[Any] = [0.0 if plan.use_points else 0.9]  # use_pt_input
        if plan.use_points:
            self.answers += [0.0 if plan.is_box[i] else 0.9 for i in cond]
            for i in order:
                if plan.is_corrected[i]:
                    self.answers += [0.0 if x else 0.9 for x in plan.from_truth[i]]
        self.counts = [len(cond), len(corrected)]
        self.frames = [[i for i in cond if i], [i for i in corrected if not plan.is_cond[i]]]
        self.frames = [list(map(int, frames)) for frames in self.frames if frames]

    def random(self):
        return self.answers.pop(0)

    def integers(self, low, high, endpoint):
        return self.counts.pop(0) if low == 1 else self.counts[-1]

    def choice(self, among, size, replace):
        frames = self.frames.pop(0)
        assert len(frames) == size and set(frames) <= set(among)
        return np.array(frames)


def train_forward(model: Reference, batch: Batch, plan: PromptPlan):
    """The reference's training forward on our batch, with our plan.

    Returns its outputs of every frame (a dict), the losses and the prompts it drew: points
    [t, passes, objects, 2], labels [t, passes, objects] and boxes [t, objects, 2, 2]. The
    reference has one flat axis of objects: those of all videos that are `valid`.
    """
    b, t = batch.images.shape[:2]
    video, slot = np.nonzero(batch.valid)
    flat = torch.tensor(batch.images).permute(0, 1, 4, 2, 3).flatten(0, 1).float() / 255
    clips: Any = SimpleNamespace(
        flat_img_batch=(flat - MEAN) / STD,
        num_frames=t,
        masks=torch.tensor(batch.masks[video, :, slot]).transpose(0, 1),
        flat_obj_to_img_idx=[torch.tensor(video * t + i) for i in range(t)],
    )
    script: Any = Script(plan)
    model.rng = script
    drawn: list[tuple[str, Any, Any]] = []

    def recording(name):
        original = getattr(training.model.sam2, name)

        def record(*args, **kwargs):
            points, labels = original(*args, **kwargs)
            drawn.append((name, points.numpy(), labels.numpy()))
            return points, labels

        return mock.patch.object(training.model.sam2, name, record)

    with recording("get_next_point"), recording("sample_box_points"):
        backbone = model.prepare_prompt_inputs(model.forward_image(clips.flat_img_batch), clips)
        outputs: Any = model.forward_tracking(backbone, clips, return_dict=True)
    order = backbone["init_cond_frames"] + backbone["frames_not_in_init_cond"]
    frames = outputs["cond_frame_outputs"] | outputs["non_cond_frame_outputs"]
    frames = [frames[i] for i in range(t)]
    n = len(video)
    points = np.zeros((t, 1 + CORRECTIONS, n, 2), np.float32)
    labels = np.zeros((t, 1 + CORRECTIONS, n), np.int32)
    boxes = np.zeros((t, n, 2, 2), np.float32)
    if plan.use_points:
        for i in backbone["init_cond_frames"]:
            name, where, what = drawn.pop(0)
            if name == "sample_box_points":
                boxes[i] = where
            else:
                points[i, 0], labels[i, 0] = where[:, 0], what[:, 0]
        for i in order:
            if plan.is_corrected[i]:
                for k in range(CORRECTIONS):
                    _, where, what = drawn.pop(0)
                    points[i, 1 + k], labels[i, 1 + k] = where[:, 0], what[:, 0]
    assert not drawn and not script.answers
    criterion = MultiStepMultiMasksAndIous(
        weight_dict={"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1},
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=True,
        focal_gamma_obj_score=0,
        focal_alpha_obj_score=-1,
    )
    losses = criterion(frames, clips.masks)
    return frames, losses, (points, labels, boxes)
