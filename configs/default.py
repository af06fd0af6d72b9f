"""All settings of a run and their defaults: those of the reference's MOSE fine-tuning.

Other configs are this one and named changes. A key that is not here is an error.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(variant: str = "tiny") -> Any:
    """Settings of facebookresearch/sam2@2b90b9f sam2.1_hiera_b+_MOSE_finetune.yaml.

    `variant` is tiny, small, base_plus, large, or nano (for a CPU). A ConfigDict, of whose
    attributes a type checker knows nothing.
    """
    c: Any = ConfigDict()
    c.seed = 0

    c.model = ConfigDict()
    c.model.variant = variant
    c.model.version = "2.1"  # 2.0 lacks the signed temporal code of pointers, for old weights
    c.model.resolution = 1024  # side of the square input, pixels; a multiple of 32
    c.model.attention_dropout = 0.1  # on attention weights of memory attention; 0: fused kernels
    c.model.dropout = 0.1  # elsewhere in memory attention
    c.model.drop_path = 0.1  # of the trunk's blocks, growing with depth

    c.data = ConfigDict()
    c.data.source = "folder"  # folder, synthetic or tfds
    c.data.root = ""  # DAVIS layout, or a folder with JPEGImages/ and Annotations/
    c.data.eval_root = ""  # clips to evaluate on; empty: DAVIS's own val list
    c.data.num_frames = 8  # consecutive frames of a training clip
    c.data.max_objects = 3  # per clip; fewer are padded
    c.data.batch_size = 1  # videos over all devices
    c.data.hflip = 0.5  # probability of mirroring a clip
    c.data.reverse = 0.0  # probability of playing it backwards
    c.data.workers = 0  # worker processes; 0: threads of this one
    c.data.synthetic = ConfigDict()
    c.data.synthetic.num_clips = 20_000  # different clips before the first comes again
    c.data.synthetic.max_objects = 3  # rendered; data.max_objects of them are trained on
    c.data.synthetic.speed = 1.0  # of all motion
    c.data.synthetic.eval_clips = 16
    c.data.synthetic.eval_frames = 16

    c.prompts = ConfigDict()
    c.prompts.prob_points = 0.5  # clicks or boxes instead of a mask
    c.prompts.prob_box = 0.5  # of those, a box instead of a click
    c.prompts.prob_from_truth = 0.1  # a correction click from the truth, not from the error
    c.prompts.max_cond_frames = 2  # 1 to so many frames are prompted
    c.prompts.max_corrected_frames = 2  # up to so many frames get correction clicks
    c.prompts.corrections = 7  # clicks on each of them

    c.loss = ConfigDict()
    c.loss.mask = 20.0
    c.loss.dice = 1.0
    c.loss.iou = 1.0
    c.loss.object_class = 1.0

    c.optim = ConfigDict()
    # Rules are ordered globs over slash paths of parameters; the first that matches counts.
    c.optim.learning_rate = (  # globs, first value, last value of the cosine
        (("image_encoder/*",), 3e-6, 3e-7),
        (("*",), 5e-6, 5e-7),
    )
    c.optim.weight_decay = (  # LayerNorm's leaves are scale and bias, LayerNorm2d's weight decays
        (("*bias*", "*/scale"), 0.0),
        (("*",), 0.1),
    )
    c.optim.frozen = ()  # globs; the prompt encoder's random frequencies, a buffer, always are
    c.optim.layer_decay = 0.9  # share of the rate from one block of the trunk to the one before
    c.optim.layer_decay_min = 0.0
    c.optim.layer_decay_overrides = ((("*pos_embed*",), 1.0),)  # globs of the trunk, share
    c.optim.warmup_steps = 0
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.clip_norm = 0.1

    c.train = ConfigDict()
    c.train.steps = 10_000
    c.train.log_every = 10
    c.train.eval_every = 1_000  # 0: only at the end
    c.train.precision = "bfloat16"  # of the computation; state and losses are float32
    c.train.remat = "frame"  # what to recompute in the backward pass: none, frame or full

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1: whatever is left
    c.mesh.fsdp = 1  # shards parameters and moments
    c.mesh.model = 1  # kept for splitting one video over devices

    c.checkpoint = ConfigDict()
    c.checkpoint.init_from = ""  # a workdir, .pt or .safetensors to start from; empty: random
    c.checkpoint.every_steps = 500
    c.checkpoint.keep = 2

    c.eval = ConfigDict()
    c.eval.max_clips = 0  # 0: all
    c.eval.max_frames = 0  # of each clip; 0: all
    return c


def from_nothing_on_cpu(c: Any) -> None:
    """Small clips, and rates of training from random weights, far above those of fine-tuning."""
    c.model.resolution = 128
    c.model.attention_dropout = 0.0
    c.model.dropout = 0.0
    c.model.drop_path = 0.0
    c.data.num_frames = 4
    c.data.max_objects = 2
    c.data.batch_size = 2
    # More clicks or faster rates, at this batch size, and the memory is never learnt.
    c.prompts.prob_points = 0.3
    c.prompts.max_cond_frames = 1
    c.prompts.max_corrected_frames = 1
    c.optim.learning_rate = ((("*",), 3e-4, 3e-6),)
    c.optim.layer_decay = 1.0
    c.optim.warmup_steps = 200
    c.optim.clip_norm = 1.0
    c.train.log_every = 20
    c.train.precision = "float32"
    c.train.remat = "frame"  # on a CPU also the faster choice: less to store and fetch
