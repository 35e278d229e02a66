"""Every option of a run: its default, what it does, and how YAML files and the command line change it.

Merged in this order, later wins: the defaults below, the YAML files that ``BASE`` lists, the YAML file given
as ``--cfg``, ``--opts KEY VALUE ...``, the other command-line flags. Keys and defaults are those of the
official release.
"""

import argparse
import os
import re
import sys

from utils import adopt_launcher, check_environment, printable, telling_errors

check_environment()

from yacs.config import CfgNode

import config_rules as rules
from config_rules import APART, CHOICES, OPTIMIZERS, ConfigError  # noqa: F401, they are imported from here


def default_config():
    """The options and their defaults, as a fresh CfgNode."""
    config = CfgNode()
    # YAML files to merge first, relative to the file that names them.
    config.BASE = [""]

    config.DATA = CfgNode()
    # Images per process and micro-batch.
    config.DATA.BATCH_SIZE = 128
    # Folder that holds train/<class>/<image> and val/<class>/<image>, or what DATASET says.
    config.DATA.DATA_PATH = ""
    # What reads and augments the images of a classifier: pil, or opencv, which is about twice as fast: the
    # same random choices, pixels that differ by rounding. Random erasing draws other numbers.
    config.DATA.BACKEND = "pil"
    # What DATA_PATH holds: imagenet, which means any ImageFolder of that layout; tar (train.tar and val.tar,
    # or folders of tars); wds (WebDataset shards); hfds (what Hugging Face's save_to_disk writes);
    # torch/cifar10, cifar100, mnist, kmnist, fashion_mnist or qmnist (torchvision's files); coco for
    # detect.py. docs/data.md has the details.
    config.DATA.DATASET = "imagenet"
    # Side of the square images that the model sees, in pixels, or [height, width].
    config.DATA.IMG_SIZE = 224
    # Resampling when images are resized: bicubic, bilinear, lanczos, nearest, or random (training only).
    config.DATA.INTERPOLATION = "bicubic"
    # Page-locked host memory for faster copies to the GPU; without effect on the CPU.
    config.DATA.PIN_MEMORY = True
    # An image that cannot be read: raise ends the run; skip logs it, takes another in training and leaves it
    # out in evaluation, and ends the run when more than 1% of the set fail (of fewer than 100 images, one).
    config.DATA.ON_ERROR = "raise"
    # Images of more pixels count as unreadable: they would need gigabytes.
    config.DATA.MAX_PIXELS = 100_000_000
    # Photos that are stored turned and carry an EXIF orientation: ignore it, as the official code does, or
    # apply it in training and evaluation. Predictions and pictures of messengers always apply it.
    config.DATA.EXIF_ORIENTATION = "ignore"
    # Data-loading worker processes for each training process, no more than it has cores; 0 loads in the
    # training process itself.
    config.DATA.NUM_WORKERS = 8

    config.MODEL = CfgNode()
    # Model family: msg, or timm to train one of timm's models in the same way.
    config.MODEL.TYPE = "msg"
    # timm: name of the model, and arguments to build it with beside those that have a key here, such as
    # TIMM_ARGS: {embed_dim: 48, depths: [2, 2, 6, 2]}.
    config.MODEL.TIMM_NAME = ""
    config.MODEL.TIMM_ARGS = CfgNode()
    # Name of the run's folder below OUTPUT.
    config.MODEL.NAME = "msg_tiny_p4_win7_224"
    # Checkpoint file to continue from, or to evaluate with --eval.
    config.MODEL.RESUME = ""
    # Checkpoint file whose weights start a new run (fine-tuning). The head is new if the classes differ.
    config.MODEL.PRETRAINED = ""
    # Classes; taken from the data folder where there is one. A set of a single class is refused unless this
    # is 1.
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
    # Image channels. With data 3; or with DATA.BACKEND pil 1: images become grey.
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
    # What messengers of a region exchange in every block: shuf (channel groups, the paper's) or none; to
    # compare with, shift (channel groups, each in its place) or mean (each becomes the mean of all).
    config.MODEL.MSG.MANIP_TYPE = "shuf"
    # False removes the messengers: plain local windows.
    config.MODEL.MSG.TOKENS = True
    # What the classifier reads of the last stage: token (the mean of its messengers) or avg (the mean of its
    # patch tokens; always so without messengers).
    config.MODEL.MSG.HEAD = "token"
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
    # Factor of the learning rate from a block to the one before it, for fine-tuning; 1.0: one rate for all.
    config.TRAIN.LAYER_DECAY = 1.0
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

    # Moving average of the weights (EMA), timm's ModelEmaV3: evaluated as well as the weights themselves;
    # best.pth is best in the higher score of the two. Every checkpoint then holds both.
    config.TRAIN.EMA = CfgNode()
    config.TRAIN.EMA.ENABLED = False
    # Share of the average that stays at an update. 0.9999 averages over about 10,000 updates: without the
    # warm-up, short runs need less.
    config.TRAIN.EMA.DECAY = 0.9999
    # Begin with a short average: the share at update u is 1 - u^(-2/3), until that reaches DECAY.
    config.TRAIN.EMA.WARMUP = True

    config.TRAIN.LR_SCHEDULER = CfgNode()
    # cosine, linear, step or multistep; all per update, all after a linear warm-up.
    config.TRAIN.LR_SCHEDULER.NAME = "cosine"
    # multistep: epochs after which the rate decays.
    config.TRAIN.LR_SCHEDULER.MILESTONES = [27, 33]
    # step: epochs between decays; both: the factor of a decay.
    config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
    config.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1

    config.TRAIN.OPTIMIZER = CfgNode()
    # adamw, sgd (with Nesterov momentum), any other name of timm's, such as lamb, lion, muon or nadamw; or
    # fused_adam and fused_lamb, which are NVIDIA apex's where that is installed.
    config.TRAIN.OPTIMIZER.NAME = "adamw"
    # Of AdamW. timm's other optimizers have their own EPS and BETAS, until these are changed.
    config.TRAIN.OPTIMIZER.EPS = 1e-8
    config.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
    config.TRAIN.OPTIMIZER.MOMENTUM = 0.9

    config.DISTILL = CfgNode()
    # Knowledge distillation from a teacher: a checkpoint of this code, or the name of a model of timm. Empty:
    # none.
    config.DISTILL.TEACHER = ""
    # Of a model of timm: the file of its weights, or pretrained for timm's own, which it may download.
    config.DISTILL.WEIGHTS = ""
    # soft: the teacher's probabilities at TEMPERATURE; hard: its most likely class.
    config.DISTILL.KIND = "soft"
    config.DISTILL.TEMPERATURE = 3.0
    # Share of the teacher in the loss; the rest is of the labels.
    config.DISTILL.ALPHA = 0.5

    config.AUG = CfgNode()
    # Colour jitter strength; only where AUTO_AUGMENT is none.
    config.AUG.COLOR_JITTER = 0.4
    # timm's AutoAugment / RandAugment / AugMix string, or none.
    config.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
    # Train on random crops; False: on whole images, resized to DATA.IMG_SIZE.
    config.AUG.CROP = True
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
    # True: resize, aspect kept, until the image covers 256/224 of DATA.IMG_SIZE, then centre crop. False, and
    # always where the short side of IMG_SIZE is at most 32: resize to IMG_SIZE, aspect changed.
    config.TEST.CROP = True
    # Which weights of a checkpoint --eval and --pretrained take: model, their average (ema), or auto: the one
    # that scored higher, and the average where the file does not say.
    config.TEST.WEIGHTS = "auto"
    # A checkpoint is used under its own config. True allows another one, for example to evaluate at another
    # DATA.IMG_SIZE on purpose; the log then names the keys that differ.
    config.TEST.OTHER_CONFIG = False

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
    # Detections: smallest score, IoU of non-maximum suppression within a class, most of an image. AP counts
    # all of them; COCO's own figures count 100.
    config.DET.SCORE_THRESHOLD = 0.05
    config.DET.NMS_IOU = 0.5
    config.DET.PER_IMAGE = 100
    # Validation images that are drawn with their detections after each evaluation.
    config.DET.PICTURES = 8

    # cuda, mps (the GPU of a Mac, one process only) or cpu; empty takes cuda where there is one, else cpu.
    config.DEVICE = ""
    # O0 is float32; O1 is mixed precision; O2 existed only in apex and runs as O1. --throughput, and --eval
    # with RUNTIME openvino, compute in float32 unless this key or AMP_DTYPE is set.
    config.AMP_OPT_LEVEL = "O1"
    # Mixed-precision type on GPUs: float16 (with gradient scaling) or bfloat16. A CPU uses bfloat16, or
    # float32 if it does not compute in bfloat16 (x86 without AVX-512).
    config.AMP_DTYPE = "float16"
    config.AMP = CfgNode()
    # Norms by NVIDIA apex's FusedLayerNorm where that is installed, on a GPU; PyTorch's otherwise.
    config.AMP.FUSED_LAYERNORM = False
    # torch.compile for training and evaluation: minutes at the start, faster afterwards. Not for detection.
    config.COMPILE = False
    # What computes the classifier's logits with --eval and --throughput: pytorch; openvino, on the CPU, which
    # is compared with PyTorch on the first images; or auto: openvino if it is installed and
    # models/fast/choices.py says so for this CPU, else pytorch. Training always uses PyTorch.
    config.RUNTIME = "pytorch"
    # The same bits in every run of the same config on the same machine; slower on CUDA.
    config.DETERMINISTIC = False

    config.DIST = CfgNode()
    # How long a process waits for the others before the run ends.
    config.DIST.TIMEOUT_SECONDS = 600

    config.LOG = CfgNode()
    # Where else the scalars of TensorBoard go: wandb (Weights & Biases, a package to install; offline unless
    # WANDB_MODE says otherwise), or empty, nowhere.
    config.LOG.TRACKER = ""

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
    """Parse the official release's command line, and what Swin's and this project add to it.

    Underscores in a flag are as good as dashes.

    Args:
        throughput: whether the program has a mode that times inference.

    Raises:
        UserError: the variables of a launcher do not fit together.
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
    add(
        "--optim", metavar="NAME", help="adamw, sgd, fused_adam, fused_lamb, or any of timm's: lamb, lion ..."
    )
    amp = parser.add_mutually_exclusive_group()
    levels = CHOICES["AMP_OPT_LEVEL"]
    amp.add_argument("--amp-opt-level", choices=levels, help="O0: float32; O1: mixed precision; O2: as O1")
    amp.add_argument("--disable-amp", dest="amp_opt_level", action="store_const", const="O0", help="float32")
    add("--device", choices=CHOICES["DEVICE"][1:], help="default: cuda where there is one, else cpu")
    add("--output", metavar="DIR", help="results go to <output>/<model name>/<tag>; default: output")
    add("--tag", help="name of this run; default: default")
    add("--eval", action="store_true", help="evaluate only")
    if throughput:
        add("--throughput", action="store_true", help="time inference only, in float32 unless told otherwise")
    add("--local-rank", type=int, help="set by torch.distributed.launch")
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        flag, *value = word.split("=", 1)
        words.append("=".join([flag.replace("_", "-") if flag.startswith("--") else flag, *value]))
    args = parser.parse_args(words)
    if args.local_rank is not None and os.environ.get("RANK"):  # launchers of old gave the flag alone
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    adopt_launcher()
    args.local_rank = int(os.environ.get("LOCAL_RANK") or args.local_rank or 0)
    return args


def read_command_line(description, dataset, throughput=False):
    """The config that a program is asked for; a mistake in it ends the program with one message.

    Programs call this before they import what takes seconds, so that usage and mistakes are shown at once.
    """
    with telling_errors():
        return get_config(parse_args(description, throughput), dataset)


def get_config(args, dataset=None):
    """Build the effective config of a run.

    Args:
        args: a namespace with ``cfg`` (path of a YAML file) and optionally ``opts`` (a flat list of keys and
            values) and the other flags of :func:`parse_args`.
        dataset: the ``DATA.DATASET`` that the program is for: coco, or imagenet, which stands for all others;
            None takes any.

    Returns:
        A frozen CfgNode whose ``OUTPUT`` is the run's own folder, OUTPUT/MODEL.NAME/TAG.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value, with its key, its source and a way
            out.
    """
    config, sources = default_config(), {}
    _merge_file(config, os.path.expanduser(args.cfg), sources)
    opts = list(getattr(args, "opts", None) or [])
    if len(opts) % 2:
        raise ConfigError(f"--opts takes pairs of KEY VALUE, but {rules.show_value(opts[-1])} has no partner")
    if "BASE" in opts[::2]:
        raise ConfigError("--opts: BASE belongs in a YAML file")
    for key, value in zip(opts[::2], opts[1::2]):
        rules.assign(config, key, value, "--opts", sources)
    for flag, key in (
        ("batch_size", "DATA.BATCH_SIZE"),
        ("data_path", "DATA.DATA_PATH"),
        ("resume", "MODEL.RESUME"),
        ("pretrained", "MODEL.PRETRAINED"),
        ("accumulation_steps", "TRAIN.ACCUMULATION_STEPS"),
        ("use_checkpoint", "TRAIN.USE_CHECKPOINT"),
        ("optim", "TRAIN.OPTIMIZER.NAME"),
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
            rules.assign(config, key, value, "--" + flag.replace("_", "-"), sources)
    rules.check_dataset(config, sources, dataset)
    rules.check_config(config, sources)
    rules.check_version(config, sources)
    timed = config.THROUGHPUT_MODE and not config.EVAL_MODE  # in float32, as by the official code
    handed_over = config.EVAL_MODE and config.RUNTIME == "openvino"
    if (timed or handed_over) and not {"AMP_OPT_LEVEL", "AMP_DTYPE"} & sources.keys():
        config.AMP_OPT_LEVEL = "O0"
    config.OUTPUT = os.path.join(config.OUTPUT, config.MODEL.NAME, config.TAG)
    if printable(config.OUTPUT) != config.OUTPUT:
        raise ConfigError(
            f"the output folder {printable(config.OUTPUT)} has a name that is no UTF-8, and TensorBoard "
            "cannot write there: choose another --output or --tag"
        )
    config.freeze()
    return config


def parse_config(text, source):
    """The config of a checkpoint, for use on this machine: ``DEVICE`` and ``RUNTIME`` are as by default.

    Args:
        text: what :func:`dump_config` wrote; ``BASE`` files are not read.
        source: where it is from, for messages.

    Returns:
        A frozen CfgNode.

    Raises:
        ConfigError: as for :func:`get_config`.
    """
    config, sources = default_config(), {}
    tree = rules.read_tree(text, source, values_as_text=True)
    tree.pop("BASE", None)
    for key, value in rules.leaves(tree):
        # Training, logs and what is of a machine do not decide what the model is, and earlier releases had
        # other options for them.
        if not key.startswith(("TRAIN.", "LOG.", "RUNTIME")) and key not in rules.GONE:
            rules.assign(config, key, value, source, sources)
    if config.DATA.DATASET == "coco":
        config.COMPILE, config.DATA.BACKEND = False, "pil"  # others were once allowed
    rules.check_config(config, sources)
    config.DEVICE, config.LOCAL_RANK = "", 0
    config.freeze()
    return config


def set_classes(config, count):
    """Set ``MODEL.NUM_CLASSES`` to what the data have; nothing else of a config changes after it is read."""
    config.defrost()
    config.MODEL.NUM_CLASSES = count
    config.freeze()


def image_shape(config):
    """(C, H, W) of the images that the model of a config takes."""
    size = config.DATA.IMG_SIZE
    return (config.MODEL.MSG.IN_CHANS, *(size if isinstance(size, list) else (size, size)))


def dump_config(config):
    """The config as YAML that ``--cfg`` takes again: OUTPUT is the root, as it was given.

    A config for main.py has no keys of detection.
    """
    config = config.clone()
    config.defrost()
    suffix = os.path.join("", config.MODEL.NAME, config.TAG)
    config.OUTPUT = config.OUTPUT.removesuffix(suffix).rstrip(os.sep) or os.curdir
    config.BASE = [""]
    if config.DATA.DATASET != "coco":
        del config["DET"]
    return config.dump()


def flat_config(config):
    """The keys of a config with their dots, and their values, as :func:`dump_config` writes them."""
    return dict(rules.leaves(rules.read_tree(dump_config(config), "the config")))


def flat_text(text, source):
    """The same of what :func:`dump_config` wrote, perhaps long ago: keys that it lacks have their defaults.

    Args:
        text: YAML, or a dict of what it says by dotted key.
        source: where it is from, for messages.

    Raises:
        ConfigError: it is not YAML of that kind.
    """
    found = text if isinstance(text, dict) else dict(rules.leaves(rules.read_tree(text, source)))
    defaults = default_config()
    defaults.DATA.DATASET = found.get("DATA.DATASET", "imagenet")
    return flat_config(defaults) | found


def function_difference(theirs, ours, source):
    """Where the same weights would compute something else under a checkpoint's config than under another.

    Args:
        theirs: the config of a checkpoint, as :func:`~checkpoint.read_weights` returns it.
        ours: the other, from :func:`flat_config` or :func:`flat_text`.
        source: where theirs is from, for messages.

    Returns:
        A list of texts, each with a key and both its values; empty where nothing differs, or where ``theirs``
        says nothing about a model.

    Raises:
        ConfigError: theirs is not YAML of that kind.
    """
    if not theirs or (isinstance(theirs, str) and not re.search("^MODEL:", theirs, re.MULTILINE)):
        return []
    there = flat_text(theirs, source)
    if isinstance(theirs, dict):  # shapes tell the official versions apart
        there = {key: value for key, value in there.items() if key in theirs or key not in rules.VERSION}
    return rules.differences(there, ours)


def _merge_file(config, path, sources, parents=()):
    """Merge a YAML file into ``config``, the files of its ``BASE`` first."""
    path = os.path.normpath(path)
    if path in parents:
        raise ConfigError(f"{path}: BASE goes in a circle: {' -> '.join((*parents, path))}")
    try:
        with open(path, "rb") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"cannot read the config file {path}: {reason}") from error
    tree = rules.read_tree(text, path, values_as_text=True)
    bases = tree.pop("BASE", None) or []
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and "\0" not in base for base in bases):
        raise ConfigError(f"{path}: BASE is {rules.show_value(bases)}, but must be a list of YAML files")
    for base in filter(None, bases):
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        _merge_file(config, base, sources, (*parents, path))
    for key, value in rules.leaves(tree):
        rules.assign(config, key, value, path, sources)
