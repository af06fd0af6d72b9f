"""What every value of the reference's recipe is in configs/mose.py, or why it is nothing there."""

from typing import Any

from configs import mose
from sam2_jax import config_keys, optim
from sam2_jax.model import sam2 as model
from sam2_jax.model.variants import VARIANTS

CONFIG = config_keys.flat_keys(mose.get_config("base_plus"))
SIZE = VARIANTS["base_plus"]


def glob_of(selector: str) -> str:
    """A pattern over dotted names, for a selector over slash paths."""
    return selector.replace("/", ".")


def rule(option: str, number: int) -> Any:
    """(patterns and classes, value or schedule) of a rule of ours for an option."""
    selectors, value = CONFIG[f"optim.{option}"][number]
    return [glob_of(selector) for selector in selectors], value


def jitter(key: str) -> dict[str, Any]:
    """What ColorJitter is given."""
    names = ("brightness", "contrast", "saturation")
    return dict(zip(names, CONFIG[f"data.augment.{key}"], strict=True)) | {"hue": None}


MODEL, DATA = "trainer.model", "trainer.data.train"
CLIPS = f"{DATA}.datasets.0.dataset.datasets.0"
CHANGES = f"{CLIPS}.transforms.0.transforms"
OPTIM = "trainer.optim"
MEMORY = f"{MODEL}.memory_attention"
(IMAGE, IMAGE_RATE), (REST, REST_RATE) = rule("learning_rate", 0), rule("learning_rate", 1)
(BARE, BARE_DECAY), (DECAYED, DECAY) = rule("weight_decay", 0), rule("weight_decay", 1)
(KEPT, KEPT_SHARE), *_ = CONFIG["optim.layer_decay_overrides"]

# Value of the reference's file -> the same in ours, of which nothing is rounded or converted
SAME = {
    "trainer.max_epochs": mose.EPOCHS * CONFIG["data.phases_per_epoch"],
    f"{DATA}.phases_per_epoch": CONFIG["data.phases_per_epoch"],
    "launcher.num_nodes": 1,
    "launcher.gpus_per_node": mose.DEVICES,
    f"{DATA}.batch_sizes.0": CONFIG["data.batch_size"] / mose.DEVICES,
    # Data
    f"{CLIPS}.multiplier": CONFIG["data.multiplier"],
    f"{CLIPS}.sampler.num_frames": CONFIG["data.num_frames"],
    f"{CLIPS}.sampler.max_num_objects": CONFIG["data.max_objects"],
    f"{CHANGES}.1.degrees": CONFIG["data.augment.degrees"],
    f"{CHANGES}.1.shear": CONFIG["data.augment.shear"],
    f"{CHANGES}.2.sizes": CONFIG["model.resolution"],
    f"{CHANGES}.2.square": not CONFIG["data.augment.keep_aspect"],
    **{f"{CHANGES}.3.{name}": value for name, value in jitter("jitter").items()},
    f"{CHANGES}.4.p": CONFIG["data.augment.grayscale"],
    **{f"{CHANGES}.5.{name}": value for name, value in jitter("frame_jitter").items()},
    **{f"{CHANGES}.7.mean.{i}": x for i, x in enumerate(model.MEAN)},
    **{f"{CHANGES}.7.std.{i}": x for i, x in enumerate(model.STD)},
    # Model
    f"{MODEL}.image_size": CONFIG["model.resolution"],
    f"{MODEL}.image_encoder.trunk.embed_dim": SIZE.embed_dim,
    f"{MODEL}.image_encoder.trunk.num_heads": SIZE.num_heads,
    f"{MODEL}.image_encoder.trunk.drop_path_rate": CONFIG["model.drop_path"],
    f"{MODEL}.image_encoder.neck.d_model": SIZE.hidden_dim,
    **{
        f"{MODEL}.image_encoder.neck.backbone_channel_list.{i}": SIZE.embed_dim * 2 ** (3 - i)
        for i in range(4)
    },
    f"{MEMORY}.d_model": SIZE.hidden_dim,
    f"{MEMORY}.num_layers": SIZE.memory_layers,
    f"{MEMORY}.layer.d_model": SIZE.hidden_dim,
    f"{MEMORY}.layer.dim_feedforward": SIZE.feedforward_dim,
    f"{MEMORY}.layer.dropout": CONFIG["model.dropout"],
    f"{MEMORY}.layer.self_attention.dropout": CONFIG["model.attention_dropout"],
    f"{MEMORY}.layer.self_attention.embedding_dim": SIZE.hidden_dim,
    f"{MEMORY}.layer.cross_attention.dropout": CONFIG["model.attention_dropout"],
    f"{MEMORY}.layer.cross_attention.embedding_dim": SIZE.hidden_dim,
    f"{MEMORY}.layer.cross_attention.kv_in_dim": SIZE.memory_dim,
    f"{MODEL}.memory_encoder.out_dim": SIZE.memory_dim,
    f"{MODEL}.num_maskmem": model.NUM_MEMORIES,
    f"{MODEL}.no_obj_embed_spatial": CONFIG["model.version"] == "2.1",
    f"{MODEL}.proj_tpos_enc_in_obj_ptrs": CONFIG["model.version"] == "2.1",
    f"{MODEL}.use_signed_tpos_enc_to_obj_ptrs": CONFIG["model.version"] == "2.1",
    # Prompts
    f"{MODEL}.prob_to_use_pt_input_for_train": CONFIG["prompts.prob_points"],
    f"{MODEL}.prob_to_use_box_input_for_train": CONFIG["prompts.prob_box"],
    f"{MODEL}.prob_to_sample_from_gt_for_train": CONFIG["prompts.prob_from_truth"],
    f"{MODEL}.num_init_cond_frames_for_train": CONFIG["prompts.max_cond_frames"],
    f"{MODEL}.num_frames_to_correct_for_train": CONFIG["prompts.max_corrected_frames"],
    f"{MODEL}.num_correction_pt_per_frame": CONFIG["prompts.corrections"],
    # Optimizer. Theirs has the rule for all others first, ours last
    f"{OPTIM}.amp.enabled": CONFIG["train.precision"] != "float32",
    f"{OPTIM}.amp.amp_dtype": CONFIG["train.precision"],
    f"{OPTIM}.optimizer._target_": {"adamw": "torch.optim.AdamW"}[CONFIG["optim.name"]],
    f"{OPTIM}.gradient_clip.max_norm": CONFIG["optim.clip_norm"],
    f"{OPTIM}.param_group_modifiers.0.layer_decay_value": CONFIG["optim.layer_decay"],
    f"{OPTIM}.param_group_modifiers.0.apply_to": glob_of(optim.TRUNK.rstrip("/")),
    f"{OPTIM}.param_group_modifiers.0.overrides.0.pattern": KEPT[0],
    f"{OPTIM}.param_group_modifiers.0.overrides.0.value": KEPT_SHARE,
    **{
        f"{OPTIM}.options.lr.{i}.scheduler.{name}": value
        for i, schedule in enumerate((REST_RATE, IMAGE_RATE))
        for name, value in {
            "_target_": f"fvcore.common.param_scheduler.{schedule[0].title()}ParamScheduler",
            "start_value": schedule[1],
            "end_value": schedule[2],
        }.items()
    },
    f"{OPTIM}.options.lr.1.param_names.0": IMAGE[0],
    f"{OPTIM}.options.weight_decay.0.scheduler.value": DECAY,
    f"{OPTIM}.options.weight_decay.1.scheduler.value": BARE_DECAY,
    f"{OPTIM}.options.weight_decay.1.param_names.0": BARE[0],
    f"{OPTIM}.options.weight_decay.1.module_cls_names.0": BARE[1].replace("class:", "torch.nn."),
    # Losses
    "trainer.loss.all.weight_dict.loss_mask": CONFIG["loss.mask"],
    "trainer.loss.all.weight_dict.loss_dice": CONFIG["loss.dice"],
    "trainer.loss.all.weight_dict.loss_iou": CONFIG["loss.iou"],
    "trainer.loss.all.weight_dict.loss_class": CONFIG["loss.object_class"],
    "trainer.logging.log_freq": CONFIG["train.log_every"],
}

BUILT_IN = "no setting of ours: part of the model, compared with the reference by test_modules.py"
TRACKING = "no setting of ours: how frames are tracked, compared by test_training.py"
LOADER = "how its loader works; ours is another"
MACHINE = "about its machine and launcher, not about the result"
# Pattern -> why no value of ours is to be equal
OTHERWISE = {
    "trainer._target_": "its class",
    "trainer.mode": "trains without validation; ours evaluates when train.eval_every says",
    "trainer.accelerator": MACHINE,
    "trainer.seed_value": "draws of other generators cannot be the same",
    "trainer.distributed.*": MACHINE,
    "launcher.experiment_log_dir": MACHINE,
    "submitit.*": MACHINE,
    "trainer.logging.tensorboard_writer.*": "where it logs to: ours to the workdir",
    "trainer.logging.log_dir": "as above",
    "trainer.checkpoint.*": "checkpoint.init_from names the file, checkpoint.every_steps how often",
    f"{DATA}._target_": "its class",
    f"{DATA}.datasets.0.*_target_": "its classes; those of the transforms are compared in order",
    f"{DATA}.shuffle": "training clips always come in random order here",
    f"{DATA}.num_workers": LOADER,
    f"{DATA}.pin_memory": LOADER,
    f"{DATA}.drop_last": "of whole batches of one clip nothing is left; see the number of steps",
    f"{DATA}.collate_fn.*": LOADER,
    f"{CLIPS}.training": LOADER,
    f"{CLIPS}.video_dataset.img_folder": "data.root, which the user gives",
    f"{CLIPS}.video_dataset.gt_folder": "as above",
    f"{CLIPS}.video_dataset.file_list_txt": "data.include; the list is not in the package",
    f"{CHANGES}.*.consistent_transform": "compared with the order of the transforms",
    f"{CHANGES}.1.image_interpolation": "no setting of ours: always bilinear",
    f"{MODEL}._target_": "its class",
    f"{MODEL}.*._target_": "its classes",
    f"{MODEL}.image_encoder.scalp": BUILT_IN,
    f"{MODEL}.image_encoder.neck.position_encoding.*": BUILT_IN,
    f"{MODEL}.image_encoder.neck.fpn_*": BUILT_IN,
    f"{MEMORY}.pos_enc_at_input": BUILT_IN,
    f"{MEMORY}.layer.pos_enc_*": BUILT_IN,
    f"{MEMORY}.layer.activation": BUILT_IN,
    f"{MEMORY}.layer.*_attention.rope_*": BUILT_IN,
    f"{MEMORY}.layer.*_attention.feat_sizes.*": BUILT_IN,
    f"{MEMORY}.layer.*_attention.num_heads": BUILT_IN,
    f"{MEMORY}.layer.*_attention.downsample_rate": BUILT_IN,
    f"{MODEL}.memory_encoder.position_encoding.*": BUILT_IN,
    f"{MODEL}.memory_encoder.mask_downsampler.*": BUILT_IN,
    f"{MODEL}.memory_encoder.fuser.*": BUILT_IN,
    f"{MODEL}.sigmoid_*_for_mem_enc": BUILT_IN,
    f"{MODEL}.use_*": TRACKING,
    f"{MODEL}.directly_add_no_mem_embed": TRACKING,
    f"{MODEL}.multimask_*": TRACKING,
    f"{MODEL}.iou_prediction_use_sigmoid": TRACKING,
    f"{MODEL}.add_*": TRACKING,
    f"{MODEL}.only_obj_ptrs_in_the_past_for_eval": TRACKING,
    f"{MODEL}.pred_obj_scores*": TRACKING,
    f"{MODEL}.fixed_no_obj_ptr": TRACKING,
    f"{MODEL}.rand_*_for_train": "always at random up to the largest number: test_prompts.py",
    f"{MODEL}.*_for_eval": "evaluation here prompts as eval.prompts says",
    f"{OPTIM}.gradient_clip._target_": "its class",
    f"{OPTIM}.gradient_clip.norm_type": "no setting of ours: always the Euclidean norm",
    f"{OPTIM}.param_group_modifiers.0._*_": "its function",
    f"{OPTIM}.options.weight_decay.?.scheduler._target_": "constant, as a plain number of ours is",
    "trainer.loss.all._target_": "its class",
    "trainer.loss.all.supervise_all_iou": "no setting of ours: compared by test_losses.py",
    "trainer.loss.all.iou_use_l1_loss": "as above",
    "trainer.loss.all.pred_obj_scores": "as above",
    "trainer.loss.all.focal_*_obj_score": "as above: plain cross-entropy",
}
# Transforms of the file, with whether all frames of a clip share one draw, and where ours are
ORDER = (
    ("RandomHorizontalFlip", True, "_flip"),
    ("RandomAffine", True, "_turn"),
    ("RandomResizeAPI", True, "resize_clip"),
    ("ColorJitter", True, "jitter"),
    ("RandomGrayscale", True, "grey"),
    ("ColorJitter", False, "frame_jitter"),
    ("ToTensorAPI", None, None),  # on the device, with the next: model/sam2.py `normalise`
    ("NormalizeAPI", None, None),
)
