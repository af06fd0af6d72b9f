"""The reference's own classes at any of our sizes, with random weights.

Settings are those of its sam2.1_hiera_b+_MOSE_finetune.yaml, without dropout.
"""
# pyright: reportMissingImports=false

import contextlib
import copy
from fnmatch import fnmatch
from typing import Any
from unittest import mock

import numpy as np
import torch
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.transformer import RoPEAttention, TwoWayTransformer
from sam2.modeling.sam2_utils import LayerNorm2d
from training.model.sam2 import SAM2Train

from sam2_jax.model.variants import Variant

CORRECTIONS = 7  # clicks per corrected frame
# Gains over 1/sqrt(fan-in), by part of the name, the first that matches. With equal gains all
# frames and objects look alike to the decoder and attention to pointers underflows: nothing would
# depend on memory, and no test would see it.
GAINS = (
    (("cross_attn_image.v_proj", "cross_attn_image.out_proj"), 3.0),
    (("token_to_image.v_proj", "token_to_image.out_proj", "mask_downsampler.encoder.12"), 3.0),
    (("transformer.*.q_proj", "transformer.*.k_proj", "obj_ptr_proj.layers.2"), 2.0),
    (("memory_attention*q_proj", "memory_attention*k_proj"), 1.5),
    (("pix_feat_proj", "hypernetworks_mlps.*.layers.2"), 0.5),
    (("memory_encoder.out_proj",), 0.3),
    (("",), 1.2),
)
# Layers that read the output of a norm, not those that write to a residual stream
INSIDE = ("qkv", "q_proj", "k_proj", "v_proj", "linear1", "mlp.layers.0", "pwconv1")
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

    `kind` is a version, or "faint": version 2.1 with so little in its residual streams that norms
    see numbers beside which their epsilon matters, and as much as ever between norm and stream.
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
        # What the prompts of a step are is scripted, see rollout.py
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
        with torch.no_grad():
            for name, module in model.named_modules():
                is_norm = isinstance(module, (torch.nn.LayerNorm, LayerNorm2d))
                # In the two-way transformer the stream itself comes out of norms
                kept = is_norm and "sam_mask_decoder.transformer" not in name
                if not kept and not any(x in name for x in INSIDE):
                    for x in module.parameters(recurse=False):
                        x *= 0.02
    return model


def randomise(model: torch.nn.Module) -> None:
    """Weights that neither fade nor drown what passes through them; nothing left at 0 or 1."""
    with torch.no_grad():
        for name, x in model.state_dict().items():
            if name.endswith("weight") and x.ndim > 1 and "embed." not in name:
                fan_in = x[0].numel() if "upscaling" not in name else len(x)
                gain = next(g for globs, g in GAINS if any(fnmatch(name, f"*{k}*") for k in globs))
                x.normal_(0.0, gain / fan_in**0.5)
            else:
                x += 0.3 * torch.randn_like(x)


def score_bias(model: Any) -> torch.Tensor:
    """What is added to all object scores."""
    return model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias


@contextlib.contextmanager
def images_remembered(model: Any):
    """Within it, without gradients, an image is encoded once however often it is asked for."""
    encode, known = model.forward_image, {}

    def forward_image(images: torch.Tensor) -> dict[str, Any]:
        key = images.numpy().tobytes()
        if key not in known:
            known[key] = encode(images)
        return dict(known[key])  # callers add to it

    with torch.no_grad(), mock.patch.object(model, "forward_image", forward_image):
        yield


def exact_copy(model: Reference) -> Reference:
    """The same weights in float64; to be run within `rollout.float64`."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        # Tables made in float32 when the model was: made anew when they are next needed
        if isinstance(module, RoPEAttention):
            module.freqs_cis = module.freqs_cis[:0]
        if isinstance(module, PositionEmbeddingSine):
            module.cache.clear()
    return exact


def state_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """All tensors as arrays."""
    return {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}
