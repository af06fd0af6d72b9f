"""All settings of a run and their defaults: those of the reference's MOSE fine-tuning.

Other configs are this one and named changes. A key that is not here is an error.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

from sam2_jax.presets import with_arguments


@with_arguments
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
    # How large attentions are computed: auto, or xla, blockwise, cudnn, flash (model/kernels.py)
    c.model.attention = "auto"
    c.model.dropout = 0.1  # elsewhere in memory attention
    c.model.drop_path = 0.1  # of the trunk's blocks, growing with depth

    c.data = source()
    c.data.eval_root = ""  # folder of clips to evaluate on; empty: DAVIS's val list, or held out
    c.data.workers = 0  # worker processes; 0: threads of this one
    c.data.on_error = "stop"  # at what cannot be read, or skip: leave it out and count it
    c.data.max_bad = 0.01  # share of the clips that skip may leave out
    c.data.mixture = ConfigDict()  # sources to train on, each `source()`; empty: the one above
    c.data.draw = "interleave"  # which source a step takes: exact proportions, or random
    c.data.phases_per_epoch = 1  # random draws end and begin anew so often in an epoch

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
    c.optim.name = "adamw"  # or adafactor, lion, sgd
    # An option is a schedule (sam2_jax/schedules.py) for all parameters, or rules of its own: the
    # first of which a glob over slash paths, or class:NAME of a module, matches a parameter.
    c.optim.learning_rate = option(
        (
            (("image_encoder/*",), ("cosine", 3e-6, 3e-7)),
            (("*",), ("cosine", 5e-6, 5e-7)),
        )
    )
    c.optim.weight_decay = option(((("*bias*", "class:LayerNorm"), 0.0), (("*",), 0.1)))
    c.optim.b1 = option(None)  # None: as usual for the optimizer; so for all that follow
    c.optim.b2 = option(None)
    c.optim.eps = option(None)
    c.optim.momentum = option(None)  # of sgd and adafactor; None: none
    c.optim.decay_rate = option(None)  # of adafactor's second moments
    c.optim.nesterov = False  # momentum of sgd that looks ahead
    c.optim.multiplier = ()  # globs, factor of the learning rate; 1 where none matches
    c.optim.frozen = ()  # globs; the prompt encoder's random frequencies, a buffer, always are
    c.optim.layer_decay = 0.9  # share of the rate from one block of the trunk to the one before
    c.optim.layer_decay_min = 0.0
    c.optim.layer_decay_overrides = ((("*pos_embed*",), 1.0),)  # globs of the trunk, share
    c.optim.warmup_steps = 0  # over which learning rates rise, on top of their schedules
    c.optim.clip_norm = 0.1

    c.train = ConfigDict()
    c.train.steps = 10_000
    c.train.log_every = 10
    c.train.eval_every = 1_000  # 0: only at the end
    c.train.precision = "bfloat16"  # of the computation; state and losses are float32
    c.train.reduce_precision = "float32"  # in which kernels' gradients are summed over devices
    c.train.not_finite = "stop"  # at a loss or gradient that is not, or skip the update
    c.train.max_skipped = 10  # so many skipped in a row, then stop
    c.train.profile_steps = ()  # first and last step of a trace for TensorBoard's profile tab
    c.train.wandb = ""  # project of Weights & Biases to log to as well; empty: none
    c.train.remat = "frame"  # what to recompute in the backward pass: none, frame or full
    c.train.segment = 0  # frames tracked at a time, and again for the gradient; 0: all of a clip
    c.train.truncate = False  # no gradient into the memories of earlier segments
    c.train.accumulate = 1  # parts that a batch is worked off in, one after the other, for memory
    c.train.ema_decay = 0.0  # of a moving average of the parameters, which is evaluated; 0: none

    c.lora = ConfigDict()  # thin products beside frozen kernels; see sam2_jax/lora.py
    c.lora.rules = ()  # (globs over paths of kernels, rank, alpha), ...; empty: none
    c.lora.also_train = ()  # globs of the model's own parameters that are trained beside them

    c.mesh = ConfigDict()
    c.mesh.data = -1  # -1: whatever is left
    c.mesh.fsdp = 1  # shards parameters and moments
    c.mesh.model = 1  # devices that share each video: its frames to encode, its objects to track

    c.checkpoint = ConfigDict()
    c.checkpoint.init_from = ""  # a workdir, .pt or .safetensors to start from; empty: random
    c.checkpoint.every_steps = 500
    c.checkpoint.keep = 2  # the last ones
    c.checkpoint.keep_every = 0  # and those of every so many steps; 0: none
    c.checkpoint.keep_best = 1  # and so many of the best
    c.checkpoint.best = "eval/J&F"  # by this metric of the evaluation, such as eval/loss
    c.checkpoint.best_is_lowest = False

    c.eval = ConfigDict()
    c.eval.max_clips = 0  # 0: all
    c.eval.max_frames = 0  # of each clip; 0: all
    c.eval.prompts = ("mask",)  # of the first frame: mask, box, click1, click3 ...
    c.eval.loss_clips = 0  # of each set, fixed ones, on which the loss is computed as well; 0: none
    c.eval.sets = ConfigDict()  # further folders of clips to evaluate on, by name
    return c


def option(value: Any) -> Any:
    """A setting of no fixed type: a number, a tuple and None may take each other's place."""
    return FieldReference(value, field_type=object)


def source() -> Any:
    """Settings of one source of training data, those of config.data and of every mixture entry."""
    s: Any = ConfigDict()
    s.source = "folder"  # see sam2_jax/data/catalogue.py: KINDS
    s.root = ""  # folder of the data
    s.include = ""  # text file with the names of the clips to take, one a line; empty: all
    s.exclude = ""  # text file with the names of the clips to leave out

    s.num_frames = 8  # of a training clip; 1: images
    s.max_objects = 3  # per clip; fewer are padded
    s.batch_size = 1  # videos over all devices
    s.reverse = 0.0  # probability of playing a clip backwards
    s.min_stride = 1  # frames of the video from one frame shown to the next, drawn between these
    s.max_stride = 1
    s.later_objects = 0.0  # probability of following objects that the first frame does not show
    s.weight = 0.0  # share of the steps in a mixture; 0 for all sources: as long as they are.
    # With data.draw=random it only orders the batches of an epoch, which shows every source whole.
    s.multiplier = 1.0  # how often an epoch shows a clip

    s.augment = ConfigDict()  # in this order; frames and masks of a clip move together
    s.augment.hflip = 0.5  # probability
    s.augment.vflip = 0.0
    s.augment.degrees = 25.0  # largest rotation
    s.augment.shear = 20.0  # largest shear along x, degrees
    s.augment.scale = (1.0, 1.0)  # zoom is drawn between these
    s.augment.keep_aspect = False  # pad at right and bottom instead of stretching to a square
    s.augment.mosaic = 0.0  # probability of a 2 x 2 mosaic of which one cell is followed
    s.augment.mosaic_hflip = False  # cells mirrored at random
    s.augment.jitter = (0.1, 0.03, 0.03)  # brightness, contrast, saturation; one draw a clip
    s.augment.grayscale = 0.05  # probability
    s.augment.frame_jitter = (0.1, 0.05, 0.05)  # as jitter, a draw for every frame
    s.augment.blur = 0.0  # largest standard deviation, pixels
    s.augment.noise = 0.0  # standard deviation, of 255
    s.augment.fill = (123, 116, 103)  # colour of what a rotation brings in

    s.folder = ConfigDict()
    s.folder.resolution = ""  # 480p or Full-Resolution, of DAVIS; empty: the one that is there
    s.folder.sample_rate = 1  # take every so manieth frame
    s.folder.annotated_every = 1  # masks exist for every so manieth frame only; the others go
    s.folder.single_object = False  # every object of a clip is a clip of its own

    s.sav = ConfigDict()
    s.sav.annotations = "manual"  # or auto
    s.sav.ann_every = 4  # annotated frames of the video, of 24 a second

    s.instances = ConfigDict()  # of SA-1B and COCO
    s.instances.annotations = ""  # COCO: the JSON file; root is the folder of images
    s.instances.max_area = 1.1  # objects that cover this share of the image or more are left out
    s.instances.min_stability = -1.0  # SA-1B: less stable masks are left out

    s.tfds = ConfigDict()
    s.tfds.dataset = "davis/480p"  # or davis/full_resolution, youtube_vis/...

    s.synthetic = ConfigDict()
    s.synthetic.num_clips = 20_000  # different clips before the first comes again
    s.synthetic.max_objects = 3  # rendered; max_objects of them are trained on
    s.synthetic.speed = 1.0  # of all motion
    s.synthetic.eval_clips = 16
    s.synthetic.eval_frames = 16
    return s


def plain(s: Any) -> None:
    """No augmentation but mirroring."""
    s.augment.degrees = s.augment.shear = s.augment.grayscale = 0.0
    s.augment.mosaic = s.augment.noise = s.augment.blur = 0.0
    s.augment.jitter = s.augment.frame_jitter = (0.0, 0.0, 0.0)


def from_nothing_on_cpu(c: Any) -> None:
    """Small clips, and rates of training from random weights, far above those of fine-tuning."""
    c.model.resolution = 128
    c.model.attention_dropout = 0.0
    c.model.dropout = 0.0
    c.model.drop_path = 0.0
    plain(c.data)
    c.data.num_frames = 4
    c.data.max_objects = 2
    c.data.batch_size = 2
    # More clicks or faster rates, at this batch size, and the memory is never learnt.
    c.prompts.prob_points = 0.3
    c.prompts.max_cond_frames = 1
    c.prompts.max_corrected_frames = 1
    c.optim.learning_rate = ("cosine", 3e-4, 3e-6)
    c.optim.layer_decay = 1.0
    c.optim.warmup_steps = 200
    c.optim.clip_norm = 1.0
    c.train.log_every = 20
    c.train.precision = "float32"
    c.train.remat = "frame"  # on a CPU also the faster choice: less to store and fetch
