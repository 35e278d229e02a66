"""Every option of a run: its default, what it does, and how YAML files and the command line change it.

Merged in this order, later wins: the defaults below, the YAML files that ``BASE`` lists, the YAML file given
as ``--cfg``, ``--opts KEY VALUE ...``, the other command-line flags. Keys and defaults are those of the
official release.
"""

import argparse
import ast
import difflib
import math
import os

import yaml
from yacs.config import CfgNode

from utils import UserError


class ConfigError(UserError):
    """A config cannot be used; the message says which key of which file and what to do."""


def default_config():
    """The options and their defaults, as a fresh CfgNode."""
    config = CfgNode()
    # YAML files to merge first, relative to the file that names them.
    config.BASE = [""]

    config.DATA = CfgNode()
    # Images per process and micro-batch.
    config.DATA.BATCH_SIZE = 128
    # Folder that holds train/<class>/<image> and val/<class>/<image>.
    config.DATA.DATA_PATH = ""
    # What reads and augments images: pil, or opencv, which is about twice as fast: the same random choices,
    # pixels that differ by rounding. Random erasing draws other numbers.
    config.DATA.BACKEND = "pil"
    # Kind of dataset: imagenet, which means any ImageFolder of that layout; coco for detect.py.
    config.DATA.DATASET = "imagenet"
    # Side of the square input, in pixels.
    config.DATA.IMG_SIZE = 224
    # Resampling when images are resized: bicubic, bilinear, lanczos, nearest, or random (training only).
    config.DATA.INTERPOLATION = "bicubic"
    # Page-locked host memory for faster copies to the GPU; without effect on the CPU.
    config.DATA.PIN_MEMORY = True
    # An image that cannot be read: raise ends the run; skip logs it, takes another in training and leaves it
    # out in evaluation, and ends the run when more than 1% fail.
    config.DATA.ON_ERROR = "raise"
    # Data-loading worker processes for each training process; 0 loads in the training process itself.
    config.DATA.NUM_WORKERS = 8

    config.MODEL = CfgNode()
    # Model family: msg.
    config.MODEL.TYPE = "msg"
    # Name of the run's folder below OUTPUT.
    config.MODEL.NAME = "msg_tiny_p4_win7_224"
    # Checkpoint file to continue from, or to evaluate with --eval.
    config.MODEL.RESUME = ""
    # Checkpoint file whose weights start a new run (fine-tuning). The head is new if the classes differ.
    config.MODEL.PRETRAINED = ""
    # Classes; taken from the data folder where there is one.
    config.MODEL.NUM_CLASSES = 1000
    # Dropout probability, in the residual branches and after the embedding.
    config.MODEL.DROP_RATE = 0.0
    # Stochastic depth: probability of dropping a branch of the last block; grows linearly from 0 at the
    # first.
    config.MODEL.DROP_PATH_RATE = 0.1
    # Label smoothing.
    config.MODEL.LABEL_SMOOTHING = 0.1

    config.MODEL.MSG = CfgNode()
    # Side of a patch, in pixels.
    config.MODEL.MSG.PATCH_SIZE = 4
    # Image channels.
    config.MODEL.MSG.IN_CHANS = 3
    # Channels of the first stage; they double in every stage.
    config.MODEL.MSG.EMBED_DIM = 96
    # Blocks of each stage; the number of entries is the number of stages.
    config.MODEL.MSG.DEPTHS = [2, 2, 6, 2]
    # Attention heads of each stage.
    config.MODEL.MSG.NUM_HEADS = [3, 6, 12, 24]
    # Patch tokens on a side of a window.
    config.MODEL.MSG.WINDOW_SIZE = 7
    # Hidden channels of the MLP, in multiples of the stage's channels.
    config.MODEL.MSG.MLP_RATIO = 4.0
    # Bias of the query, key and value linear layer.
    config.MODEL.MSG.QKV_BIAS = True
    # Factor of q k^T; None means (channels / heads)^-0.5.
    config.MODEL.MSG.QK_SCALE = None
    # Learned absolute position embedding.
    config.MODEL.MSG.APE = False
    # LayerNorm after the patch embedding.
    config.MODEL.MSG.PATCH_NORM = True
    # Windows on a side of a shuffle region, in each stage; the whole side where fewer are left.
    config.MODEL.MSG.SHUF_SIZE = [4, 4, 2, 1]
    # What messengers do in every block: shuf (exchange channel groups) or none.
    config.MODEL.MSG.MANIP_TYPE = "shuf"
    # False removes the messengers: plain local windows, classified by the mean of the final tokens.
    config.MODEL.MSG.TOKENS = True
    # Patch embedding: linear (v1, non-overlapping) or conv (CVPR 2022, overlapping 7x7).
    config.MODEL.MSG.PATCH_EMBED = "linear"
    # Patch merging: linear (v1, 2x2 neighbours) or conv (CVPR 2022, 3x3 of stride 2).
    config.MODEL.MSG.DOWNSAMPLE = "linear"
    # How attention is computed, the same up to rounding: auto (the fastest for the device), eager (the
    # formula), sdpa (PyTorch's scaled_dot_product_attention), blocked (for the CPU), triton (needs a GPU).
    config.MODEL.MSG.ATTENTION = "auto"

    config.TRAIN = CfgNode()
    # First epoch of a run that does not resume.
    config.TRAIN.START_EPOCH = 0
    config.TRAIN.EPOCHS = 300
    config.TRAIN.WARMUP_EPOCHS = 20
    # Updates of warm-up, in place of WARMUP_EPOCHS; 0: as those say.
    config.TRAIN.WARMUP_STEPS = 0
    # Decoupled weight decay; none on 1-d parameters, position tables and messenger tokens.
    config.TRAIN.WEIGHT_DECAY = 0.05
    # Learning rates for 512 images per update, 16 in detection; scaled linearly with the images of the run's
    # updates.
    config.TRAIN.BASE_LR = 5e-4
    config.TRAIN.WARMUP_LR = 5e-7
    config.TRAIN.MIN_LR = 5e-6
    # Largest global gradient norm; 0 does not clip.
    config.TRAIN.CLIP_GRAD = 5.0
    # Continue from the latest checkpoint of the output folder.
    config.TRAIN.AUTO_RESUME = True
    # Checkpoints within an epoch: every so many updates, every so many minutes; 0 for none.
    config.TRAIN.SAVE_STEPS = 0
    config.TRAIN.SAVE_MINUTES = 0.0
    # Epoch checkpoints to keep, the newest; 0 keeps all. The best is always kept.
    config.TRAIN.KEEP_CHECKPOINTS = 0
    # When a checkpoint cannot be written: continue training, or stop.
    config.TRAIN.ON_SAVE_ERROR = "continue"
    # End the run after so many updates in a row whose loss or gradients are not finite (each is skipped); 0:
    # never.
    config.TRAIN.MAX_NONFINITE = 20
    # Micro-batches per update; 0 and 1 both mean no accumulation.
    config.TRAIN.ACCUMULATION_STEPS = 0
    # Gradient checkpointing: less memory, about a third more compute.
    config.TRAIN.USE_CHECKPOINT = False

    config.TRAIN.LR_SCHEDULER = CfgNode()
    # cosine, linear, step or multistep; all per update, all after a linear warm-up.
    config.TRAIN.LR_SCHEDULER.NAME = "cosine"
    # multistep: epochs after which the rate decays.
    config.TRAIN.LR_SCHEDULER.MILESTONES = [27, 33]
    # step: epochs between decays; both: the factor of a decay.
    config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
    config.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1

    config.TRAIN.OPTIMIZER = CfgNode()
    # adamw or sgd (with Nesterov momentum).
    config.TRAIN.OPTIMIZER.NAME = "adamw"
    config.TRAIN.OPTIMIZER.EPS = 1e-8
    config.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
    config.TRAIN.OPTIMIZER.MOMENTUM = 0.9

    config.AUG = CfgNode()
    # Colour jitter strength; only where AUTO_AUGMENT is none.
    config.AUG.COLOR_JITTER = 0.4
    # timm's AutoAugment / RandAugment / AugMix string, or none.
    config.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
    # Probability of a horizontal flip.
    config.AUG.HFLIP = 0.5
    # Random erasing: probability, fill (pixel, rand, const), rectangles.
    config.AUG.REPROB = 0.25
    config.AUG.REMODE = "pixel"
    config.AUG.RECOUNT = 1
    # Mixup and CutMix: Beta parameters, 0 switches one off.
    config.AUG.MIXUP = 0.8
    config.AUG.CUTMIX = 1.0
    # Smallest and largest side ratio of the CutMix box; replaces the Beta distribution.
    config.AUG.CUTMIX_MINMAX = None
    # Probability of mixing at all, and of CutMix instead of mixup where both are on.
    config.AUG.MIXUP_PROB = 1.0
    config.AUG.MIXUP_SWITCH_PROB = 0.5
    # One mix per batch, pair or elem.
    config.AUG.MIXUP_MODE = "batch"

    config.TEST = CfgNode()
    # True: resize the short side to 256/224 of the size, then centre crop. False: resize to the size.
    config.TEST.CROP = True

    config.DET = CfgNode()
    # Below DATA.DATA_PATH: images and COCO annotations of training and validation.
    config.DET.TRAIN_IMAGES = "train2017"
    config.DET.TRAIN_JSON = "annotations/instances_train2017.json"
    config.DET.VAL_IMAGES = "val2017"
    config.DET.VAL_JSON = "annotations/instances_val2017.json"
    # Training images are resized so that the short side is one of these, in pixels, and the long side at most
    # MAX_SIZE.
    config.DET.MIN_SIZES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    config.DET.MAX_SIZE = 1333
    # Half of the time resize to one of CROP_MIN_SIZES first and crop sides of CROP_SIZES, smallest and
    # largest; empty lists never do.
    config.DET.CROP_MIN_SIZES = [400, 500, 600]
    config.DET.CROP_SIZES = [384, 600]
    # Short side in evaluation.
    config.DET.TEST_SIZE = 800
    # Windows on a side of a shuffle region in each stage; maps are padded to whole regions.
    config.DET.SHUF_SIZE = [4, 4, 8, 4]
    # Stages of the backbone that do not train, from the first; the patch embedding belongs to the first.
    config.DET.FROZEN_STAGES = 0
    # Channels of the feature pyramid, the proposal network and the convolutions of the heads.
    config.DET.CHANNELS = 256
    # Side of an anchor in multiples of the stride, and height over width.
    config.DET.ANCHOR_SCALE = 8
    config.DET.ANCHOR_RATIOS = [0.5, 1.0, 2.0]
    # Anchors sampled for the loss of the proposal network, and proposals kept of each level and in all.
    config.DET.RPN_SAMPLES = 256
    config.DET.PROPOSALS_TRAIN = 2000
    config.DET.PROPOSALS_TEST = 1000
    # Proposals sampled of each image for the losses of the heads, and how many of them may be positive.
    config.DET.ROI_SAMPLES = 512
    config.DET.ROI_POSITIVE = 0.25
    # Stages of the cascade: smallest IoU with an object, weight of the losses, divisors of the box deltas.
    config.DET.IOU_THRESHOLDS = [0.5, 0.6, 0.7]
    config.DET.LOSS_WEIGHTS = [1.0, 0.5, 0.25]
    config.DET.DELTA_STDS = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    # Box loss: giou, on decoded boxes, or smooth_l1, on deltas.
    config.DET.BOX_LOSS = "giou"
    # Convolutions of a box head, with BatchNorm (over all processes on CUDA), and widths of its linear
    # layers; convolutions of a mask head.
    config.DET.BOX_CONVS = 4
    config.DET.BOX_FCS = [1024]
    config.DET.MASK_CONVS = 4
    # Detections: smallest score, IoU of non-maximum suppression within a class, most of an image.
    config.DET.SCORE_THRESHOLD = 0.05
    config.DET.NMS_IOU = 0.5
    config.DET.PER_IMAGE = 100
    # Validation images that are drawn with their detections after each evaluation.
    config.DET.PICTURES = 8

    # cuda or cpu; empty takes cuda where there is one.
    config.DEVICE = ""
    # O0 is float32; O1 is mixed precision; O2 existed only in apex and runs as O1.
    config.AMP_OPT_LEVEL = "O1"
    # Mixed-precision type on CUDA: float16 (with gradient scaling) or bfloat16. The CPU always uses bfloat16.
    config.AMP_DTYPE = "float16"
    # torch.compile for training and evaluation: minutes at the start, faster afterwards.
    config.COMPILE = False
    # The same bits in every run of the same config on the same machine; slower on CUDA.
    config.DETERMINISTIC = False

    config.DIST = CfgNode()
    # How long a process waits for the others before the run ends.
    config.DIST.TIMEOUT_SECONDS = 600

    # Root of the output folder; the run writes to OUTPUT/MODEL.NAME/TAG.
    config.OUTPUT = "output"
    config.TAG = "default"
    # Epochs between checkpoints; the last epoch and the best are always kept.
    config.SAVE_FREQ = 1
    # Optimizer updates between log lines; batches in evaluation.
    config.PRINT_FREQ = 100
    config.SEED = 0
    # Set by --eval, --throughput and the launcher.
    config.EVAL_MODE = False
    config.THROUGHPUT_MODE = False
    config.LOCAL_RANK = 0
    return config


def parse_args(description, throughput=False, argv=None):
    """Parse the official release's command line, and --pretrained, --use-checkpoint and --device.

    Args:
        throughput: whether the program has a mode that times inference.
        argv: the words; those of the command line by default.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--cfg", required=True, metavar="FILE", help="YAML config")
    add("--opts", nargs="+", metavar="KEY VALUE", help="change config keys, e.g. TRAIN.EPOCHS 100")
    add("--batch-size", type=int, help="images per process and micro-batch")
    add("--data-path", metavar="DIR", help="folder of the data; the README shows its layout")
    add("--resume", metavar="FILE", help="checkpoint to continue from, or to evaluate with --eval")
    add("--pretrained", metavar="FILE", help="checkpoint whose weights start a new run (fine-tuning)")
    add("--accumulation-steps", type=int, help="micro-batches per optimizer update")
    add("--use-checkpoint", action="store_true", help="gradient checkpointing, to save memory")
    add("--amp-opt-level", choices=["O0", "O1", "O2"], help="O0: float32; O1: mixed precision; O2: as O1")
    add("--device", choices=["cuda", "cpu"], help="default: cuda where there is one")
    add("--output", metavar="DIR", help="results go to <output>/<model name>/<tag>; default: output")
    add("--tag", help="name of this run; default: default")
    add("--eval", action="store_true", help="evaluate only")
    if throughput:
        add("--throughput", action="store_true", help="time inference only")
    add("--local_rank", "--local-rank", type=int, help="set by torch.distributed.launch")
    args = parser.parse_args(argv)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank or 0))
    return args


def get_config(args):
    """Build the effective config of a run.

    Args:
        args: a namespace with ``cfg`` (path of a YAML file) and optionally ``opts`` (a flat list of keys and
            values), ``batch_size``, ``data_path``, ``resume``, ``pretrained``, ``accumulation_steps``,
            ``use_checkpoint``, ``amp_opt_level``, ``device``, ``output``, ``tag``, ``eval``, ``throughput``,
            ``local_rank``.

    Returns:
        A frozen CfgNode whose ``OUTPUT`` is the run's own folder, OUTPUT/MODEL.NAME/TAG.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value, with its key, its source and a way
            out.
    """
    config, sources = default_config(), {}
    _merge_file(config, args.cfg, sources, ())
    opts = list(getattr(args, "opts", None) or [])
    if len(opts) % 2:
        raise ConfigError(f"--opts takes pairs of KEY VALUE, but {opts[-1]!r} has no partner")
    if "BASE" in opts[::2]:
        raise ConfigError("--opts: BASE belongs in a YAML file")
    for key, value in zip(opts[::2], opts[1::2]):
        _assign(config, key, value, "--opts", sources)
    for flag, key in (
        ("batch_size", "DATA.BATCH_SIZE"),
        ("data_path", "DATA.DATA_PATH"),
        ("resume", "MODEL.RESUME"),
        ("pretrained", "MODEL.PRETRAINED"),
        ("accumulation_steps", "TRAIN.ACCUMULATION_STEPS"),
        ("use_checkpoint", "TRAIN.USE_CHECKPOINT"),
        ("amp_opt_level", "AMP_OPT_LEVEL"),
        ("device", "DEVICE"),
        ("output", "OUTPUT"),
        ("tag", "TAG"),
        ("eval", "EVAL_MODE"),
        ("throughput", "THROUGHPUT_MODE"),
        ("local_rank", "LOCAL_RANK"),
    ):
        value = getattr(args, flag, None)
        if value is not None and value is not False:
            _assign(config, key, value, "--" + flag.replace("_", "-"), sources)
    _check(config, sources)
    config.OUTPUT = os.path.join(config.OUTPUT, config.MODEL.NAME, config.TAG)
    config.freeze()
    return config


def dump_config(config):
    """The config as YAML that ``--cfg`` takes again: OUTPUT is the root, as it was given."""
    config = config.clone()
    config.defrost()
    suffix = os.path.join("", config.MODEL.NAME, config.TAG)
    config.OUTPUT = config.OUTPUT.removesuffix(suffix).rstrip(os.sep) or os.curdir
    config.BASE = [""]
    return config.dump()


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases: a few lines of them can unfold to gigabytes, or to a circle."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"configs may not use aliases{self.peek_event().start_mark}")
        return super().compose_node(parent, index)


def _merge_file(config, path, sources, parents):
    """Merge a YAML file into ``config``, the files of its ``BASE`` first."""
    path = os.path.normpath(path)
    if path in parents:
        raise ConfigError(f"{path}: BASE goes in a circle: {' -> '.join((*parents, path))}")
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.load(file, _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    # The reader leaves impossible dates and numbers, and lists in lists in lists, to Python.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected 'KEY: value' lines, found a {type(tree).__name__}")
    bases = tree.pop("BASE", None) or []
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and "\0" not in base for base in bases):
        raise ConfigError(f"{path}: BASE is {bases!r}, but must be a list of YAML files")
    for base in filter(None, bases):
        _merge_file(config, os.path.join(os.path.dirname(path), base), sources, (*parents, path))
    for key, value in _leaves(tree):
        _assign(config, key, value, path, sources)


def _leaves(tree, prefix=""):
    """Dotted keys and values of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _assign(config, key, value, source, sources):
    """Set one dotted key, after checking its name and type."""
    node, *path = config, *key.split(".")
    for name in path[:-1]:
        node = node.get(name) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or path[-1] not in node:
        known = [name for name, _ in _leaves(default_config())]
        # A key in the wrong section is as likely as a typing error: compare the last part too.
        near = difflib.get_close_matches(key, known, 1, 0.75) or [
            name
            for last in difflib.get_close_matches(path[-1], [name.split(".")[-1] for name in known], 1, 0.8)
            for name in known
            if name.split(".")[-1] == last
        ]
        hint = f"did you mean {near[0]}?" if near else "config.py lists every key"
        raise ConfigError(f"{source}: unknown key {key}; {hint}")
    if isinstance(node[path[-1]], CfgNode):
        if value is None:
            return
        raise ConfigError(
            f"{source}: {key} is a section; set one of its keys, such as {key}.{next(iter(node[path[-1]]))}"
        )
    default = default_config()
    for name in path:
        default = default[name]
    node[path[-1]] = _coerce(value, default, key, source)
    sources[key] = source


def _coerce(value, default, key, source):
    """Bring a value to the type of its default, or refuse it."""
    if isinstance(value, str) and not isinstance(default, str):
        # YAML reads 5e-4 as a string, and so comes everything from the command line.
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = {"true": True, "false": False, "none": None, "null": None}.get(value.lower(), value)
    optional = {"MODEL.MSG.QK_SCALE": float, "AUG.CUTMIX_MINMAX": list}
    kind = optional.get(key, type(default))
    if value is None and key in optional:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (list, tuple) and isinstance(value, (list, tuple)):
        return kind(value)
    if type(value) is not kind:
        raise ConfigError(f"{source}: {key} is {value!r}, but must be {_NAMES[kind]}, such as {default!r}")
    return value


_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
}


def _is_positive(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_below(name):
    """Whether a path stays below the folder that it is joined to."""
    return bool(name) and not os.path.isabs(name) and ".." not in name.split(os.sep)


def _check(config, sources):
    """Refuse impossible values. What only the model can judge, the model refuses itself."""

    def require(key, possible, what):
        value = config
        for name in key.split("."):
            value = value[name]
        if not possible(value):
            raise ConfigError(f"{sources.get(key, 'defaults')}: {key} is {value!r}, but must be {what}")

    def choice(key, *names):
        require(key, names.__contains__, "one of " + ", ".join(repr(name) for name in names))

    choice("DATA.DATASET", "imagenet", "coco")
    choice("DATA.BACKEND", "pil", "opencv")
    choice("DATA.INTERPOLATION", "bicubic", "bilinear", "lanczos", "nearest", "random")
    choice("MODEL.TYPE", "msg")
    choice("MODEL.MSG.MANIP_TYPE", "shuf", "none")
    choice("MODEL.MSG.PATCH_EMBED", "linear", "conv")
    choice("MODEL.MSG.DOWNSAMPLE", "linear", "conv")
    choice("MODEL.MSG.ATTENTION", "auto", "eager", "sdpa", "blocked", "triton")
    choice("TRAIN.LR_SCHEDULER.NAME", "cosine", "linear", "step", "multistep")
    choice("DET.BOX_LOSS", "giou", "smooth_l1")
    choice("TRAIN.OPTIMIZER.NAME", "adamw", "sgd")
    choice("AUG.REMODE", "pixel", "rand", "const")
    choice("AUG.MIXUP_MODE", "batch", "pair", "elem")
    choice("DEVICE", "", "cpu", "cuda")
    choice("AMP_OPT_LEVEL", "O0", "O1", "O2")
    choice("DATA.ON_ERROR", "raise", "skip")
    choice("TRAIN.ON_SAVE_ERROR", "continue", "stop")
    choice("AMP_DTYPE", "float16", "bfloat16")
    positive = "DATA.BATCH_SIZE DATA.IMG_SIZE MODEL.NUM_CLASSES TRAIN.EPOCHS SAVE_FREQ PRINT_FREQ"
    positive += " MODEL.MSG.PATCH_SIZE MODEL.MSG.IN_CHANS MODEL.MSG.EMBED_DIM MODEL.MSG.WINDOW_SIZE"
    positive += " DIST.TIMEOUT_SECONDS DET.MAX_SIZE DET.TEST_SIZE DET.CHANNELS DET.ANCHOR_SCALE"
    positive += " DET.RPN_SAMPLES DET.PROPOSALS_TRAIN DET.PROPOSALS_TEST DET.ROI_SAMPLES DET.PER_IMAGE"
    for key in positive.split():
        require(key, lambda value: value >= 1, "at least 1")
    not_negative = "DATA.NUM_WORKERS SEED LOCAL_RANK AUG.RECOUNT AUG.MIXUP AUG.CUTMIX AUG.COLOR_JITTER"
    not_negative += " TRAIN.START_EPOCH TRAIN.WARMUP_EPOCHS TRAIN.WEIGHT_DECAY TRAIN.WARMUP_LR TRAIN.MIN_LR"
    not_negative += " TRAIN.CLIP_GRAD TRAIN.ACCUMULATION_STEPS TRAIN.SAVE_STEPS TRAIN.SAVE_MINUTES"
    not_negative += " TRAIN.KEEP_CHECKPOINTS TRAIN.MAX_NONFINITE TRAIN.WARMUP_STEPS"
    not_negative += " DET.FROZEN_STAGES DET.BOX_CONVS DET.MASK_CONVS DET.PICTURES"
    for key in not_negative.split():
        require(key, lambda value: 0 <= value < math.inf, "0 or more, and finite")
    require("MODEL.MSG.MLP_RATIO", lambda value: value > 0, "above 0")
    above_0 = "TRAIN.BASE_LR TRAIN.OPTIMIZER.EPS TRAIN.LR_SCHEDULER.DECAY_RATE"
    for key in above_0.split():
        require(key, lambda value: 0 < value < math.inf, "above 0 and finite")
    require("TRAIN.OPTIMIZER.MOMENTUM", lambda value: 0 <= value < 1, "at least 0 and below 1")
    require("MODEL.MSG.QK_SCALE", lambda value: value is None or value > 0, "None or above 0")
    require(
        "MODEL.MSG.IN_CHANS", lambda value: value == 3 or not config.DATA.DATA_PATH, "3 for image folders"
    )
    require("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", lambda value: value >= 1, "at least 1")
    for key in ("MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE", "MODEL.LABEL_SMOOTHING"):
        require(key, lambda value: 0 <= value < 1, "at least 0 and below 1")
    shares = "AUG.HFLIP AUG.REPROB AUG.MIXUP_PROB AUG.MIXUP_SWITCH_PROB"
    shares += " DET.ROI_POSITIVE DET.SCORE_THRESHOLD DET.NMS_IOU"
    for key in shares.split():
        require(key, lambda value: 0 <= value <= 1, "between 0 and 1")
    for key in ("MIN_SIZES", "ANCHOR_RATIOS", "BOX_FCS", "IOU_THRESHOLDS"):
        require(
            f"DET.{key}", lambda values: values and all(_is_positive(v) for v in values), "positive numbers"
        )
    for key in ("CROP_MIN_SIZES", "CROP_SIZES"):
        require(f"DET.{key}", lambda values: all(_is_positive(v) for v in values), "positive numbers")
    require(
        "DET.CROP_SIZES", lambda value: not value or len(value) == 2 and value[0] <= value[1], "two sides"
    )
    stages = len(config.DET.IOU_THRESHOLDS)
    for key in ("LOSS_WEIGHTS", "DELTA_STDS"):
        require(f"DET.{key}", lambda value: len(value) == stages, "as long as DET.IOU_THRESHOLDS")
    require(
        "DET.DELTA_STDS",
        lambda value: all(isinstance(v, list) and len(v) == 4 and all(map(_is_positive, v)) for v in value),
        "four positive numbers for each stage",
    )
    require(
        "TRAIN.OPTIMIZER.BETAS",
        lambda value: len(value) == 2 and all(isinstance(b, (int, float)) and 0 <= b < 1 for b in value),
        "two numbers, at least 0 and below 1",
    )
    require(
        "AUG.CUTMIX_MINMAX",
        lambda value: value is None or (len(value) == 2 and 0 < value[0] <= value[1] <= 1),
        "None or two ratios, smallest first, above 0 and at most 1",
    )
    for key in ("MODEL.NAME", "TAG"):
        require(key, _is_below, "a name for a folder below OUTPUT")
    mixes = config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or config.AUG.CUTMIX_MINMAX is not None
    if mixes and config.DATA.DATASET == "imagenet" and not config.EVAL_MODE and not config.THROUGHPUT_MODE:
        require("DATA.BATCH_SIZE", lambda value: value % 2 == 0, "even for mixup and CutMix, which mix pairs")
