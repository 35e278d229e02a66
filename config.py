"""Every option of a run: its default, what it does, and how YAML files and the command line change it.

Merged in this order, later wins: the defaults below, the YAML files that ``BASE`` lists, the YAML file given
as ``--cfg``, ``--opts KEY VALUE ...``, the other command-line flags. Keys and defaults are those of the
official release.
"""

import argparse
import ast
import difflib
import errno
import os
import re
import stat
import sys
from pathlib import PurePath

from utils import UserError, adopt_launcher, check_environment, printable, telling_errors

check_environment()

import yaml
from yacs.config import CfgNode

# What a config and the BASE files below it may come to: a few lines of a stranger's could unfold to hours.
MOST_FILES, MOST_BYTES = 100, 100_000
# Datasets of torchvision that DATA.DATASET takes as torch/<name>.
TORCHVISION = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
# What changes no number of a run, or is set by the data.
APART = ("OUTPUT", "TAG", "DEVICE", "DATA.NUM_WORKERS", "DATA.PIN_MEMORY", "MODEL.NUM_CLASSES", "PRINT_FREQ")
APART += ("LOG.TRACKER", "RUNTIME")
# What decides the result of given weights: in every model, in classifiers, in detectors.
OF_MODELS = ("MODEL.TYPE", "MODEL.TIMM_NAME", "MODEL.TIMM_ARGS.", "MODEL.MSG.")
OF_CLASSIFIERS = ("DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.CROP")
OF_DETECTORS = ("TEST_SIZE", "MAX_SIZE", "SHUF_SIZE", "CHANNELS", "ANCHOR_SCALE", "ANCHOR_RATIOS")
OF_DETECTORS += ("PROPOSALS_TEST", "DELTA_STDS", "BOX_CONVS", "BOX_FCS", "MASK_CONVS", "SCORE_THRESHOLD")
OF_DETECTORS = tuple(f"DET.{name}" for name in (*OF_DETECTORS, "NMS_IOU", "PER_IMAGE"))
VERSION = ("MODEL.MSG.PATCH_EMBED", "MODEL.MSG.DOWNSAMPLE")  # v1 or CVPR 2022; official configs have neither
LARGEST = 2**31 - 1  # of any number but the seed
LARGEST_SEED = 2**63 - 1
MOST_ENTRIES, MOST_CHARACTERS = 1000, 4096  # of a list, of a text

# Flags of Swin's main.py that mean nothing here, and what to do instead.
ELSEWHERE = {
    "--fused-window-process": "messengers exchange without shifted windows, so there is nothing to fuse: "
    "leave it out",
    "--fused-layernorm": "--opts AMP.FUSED_LAYERNORM True takes apex's; PyTorch's own LayerNorm is one "
    "kernel too, so you may leave it out",
    "--zip": "unpack the archives into train/<class>/<image> and val/<class>/<image>, see the README, or "
    "give tars with --opts DATA.DATASET tar, see docs/data.md",
    "--cache-mode": "images are read from the folder, and the system's own cache keeps them: leave it out",
    "--throughput": "detect.py has no such mode; main.py times the classifier",
}


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
    # Folder that holds train/<class>/<image> and val/<class>/<image>, or what DATASET says.
    config.DATA.DATA_PATH = ""
    # What reads and augments images: pil, or opencv, which is faster (about twice in classification): the
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
    # Progressive resizing: [first epoch, size, strength] of each phase of training, epochs counted from 0; a
    # size is like IMG_SIZE, a strength the factor of RandAugment's magnitude. Evaluation is always at
    # IMG_SIZE. Empty: none.
    config.DATA.PROGRESSIVE = []
    # Page-locked host memory for faster copies to the GPU; without effect on the CPU.
    config.DATA.PIN_MEMORY = True
    # An image that cannot be read: raise ends the run; skip logs it, takes another in training and leaves it
    # out in evaluation, and ends the run when more than 1% of the set fail (of fewer than 100 images, one).
    config.DATA.ON_ERROR = "raise"
    # Larger images count as unreadable: pixels, each of which may take 8 bytes of the file, and scans of a
    # JPEG (progressive ones have about 10). What decodes for minutes or needs gigabytes is beyond that.
    config.DATA.MAX_PIXELS = 100_000_000
    config.DATA.MAX_SCANS = 100
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
    # Image channels. With data 3; or with DATA.BACKEND pil 1, images become grey, or 4, RGB and alpha.
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
    # cosine, linear, step, multistep, tanh or poly; all per update, all after a linear warm-up.
    config.TRAIN.LR_SCHEDULER.NAME = "cosine"
    # multistep: epochs after which the rate decays.
    config.TRAIN.LR_SCHEDULER.MILESTONES = [27, 33]
    # step: epochs between decays; both: the factor of a decay.
    config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
    config.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1
    # cosine, linear, tanh and poly: epochs at the end of the run that stay at MIN_LR; EPOCHS includes them.
    config.TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS = 0
    # cosine, tanh and poly: equal cycles, each of which begins at CYCLE_DECAY of the rate of the one before.
    config.TRAIN.LR_SCHEDULER.CYCLES = 1
    config.TRAIN.LR_SCHEDULER.CYCLE_DECAY = 0.1
    # poly: the exponent of the share of the cycle that is left.
    config.TRAIN.LR_SCHEDULER.POWER = 0.9

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
    # Colour jitter strength; only where AUTO_AUGMENT is none or 3a.
    config.AUG.COLOR_JITTER = 0.4
    # timm's AutoAugment / RandAugment / AugMix string, 3a for the 3-Augment of DeiT III, or none.
    config.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
    # Repeated augmentation, as in DeiT: how often an epoch takes an image, each time augmented differently.
    # It then takes so many times fewer images, others each time, and lasts as many updates as ever.
    config.AUG.REPEATED = 1
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
    # with RUNTIME onnxruntime or openvino, compute in float32 unless this key or AMP_DTYPE is set.
    config.AMP_OPT_LEVEL = "O1"
    # Mixed-precision type on GPUs: float16 (with gradient scaling) or bfloat16. The CPU always uses bfloat16.
    config.AMP_DTYPE = "float16"
    config.AMP = CfgNode()
    # Norms by NVIDIA apex's FusedLayerNorm where that is installed, on a GPU; PyTorch's otherwise.
    config.AMP.FUSED_LAYERNORM = False
    # torch.compile for training and evaluation: minutes at the start, faster afterwards. Not for detection.
    config.COMPILE = False
    # What computes the classifier's logits with --eval and --throughput: pytorch; onnxruntime or openvino, on
    # the CPU, refused where it is not installed or disagrees with PyTorch on the first images; auto, which is
    # openvino on the CPU where it is installed, else pytorch. Training and its evaluations are PyTorch's.
    config.RUNTIME = "pytorch"
    # The same bits in every run of the same config on the same machine; slower on CUDA.
    config.DETERMINISTIC = False

    config.DIST = CfgNode()
    # How long a process waits for the others before the run ends.
    config.DIST.TIMEOUT_SECONDS = 600

    config.LOG = CfgNode()
    # Where else the scalars of TensorBoard go: wandb (Weights & Biases, offline unless WANDB_MODE says
    # otherwise), trackio (on this machine), or empty, nowhere. Each is a package to install.
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


# Optimizers of timm that a run can resume with, see optimizer.py, and Swin's names for those of apex.
OPTIMIZERS = """
    adabelief adadelta adagrad adam adamax adamc adamp adamuon adamw adamwlegacy adan adanw adopt adoptc
    adoptw cadamc cadamp cadamw cadan cadanw cadopt cadoptc cadoptw clamb clambw claprop clion clionc
    cmars cnadamc cnadamw crmsproptf csgdc csgdp csgdw fused_adam fused_lamb lamb lambc lambcd lambcw
    lambw laprop lapropc larc lars lion lionc madgrad madgradw mars momentum muon nadam nadamc nadamlegacy
    nadamuon nadamw nesterov nesterovw nlarc nlars nmuon novograd novogradc novogradw radabelief radam
    radamlegacy radamw rmsprop rmsproptf rmsproptfc rmsproptfw sgd sgdc sgdp sgdw
""".split()  # noqa: SIM905, shorter than a list

# Keys that take one word of a few.
CHOICES = {
    "DATA.BACKEND": ("pil", "opencv"),
    "DATA.DATASET": ("imagenet", "tar", "wds", "hfds", *(f"torch/{name}" for name in TORCHVISION), "coco"),
    "DATA.EXIF_ORIENTATION": ("ignore", "apply"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "lanczos", "nearest", "random"),
    "DATA.ON_ERROR": ("raise", "skip"),
    "MODEL.TYPE": ("msg", "timm"),
    "MODEL.MSG.MANIP_TYPE": ("shuf", "mean", "shift", "none"),
    "MODEL.MSG.PATCH_EMBED": ("linear", "conv"),
    "MODEL.MSG.DOWNSAMPLE": ("linear", "conv"),
    "MODEL.MSG.ATTENTION": ("auto", "eager", "sdpa", "blocked", "triton"),
    "MODEL.MSG.HEAD": ("token", "avg"),
    "TRAIN.ON_SAVE_ERROR": ("continue", "stop"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step", "multistep", "tanh", "poly"),
    "DISTILL.KIND": ("soft", "hard"),
    "AUG.REMODE": ("pixel", "rand", "const"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "TEST.WEIGHTS": ("auto", "model", "ema"),
    "DET.BOX_LOSS": ("giou", "smooth_l1"),
    "DEVICE": ("", "cuda", "mps", "cpu"),
    "LOG.TRACKER": ("", "wandb", "trackio"),
    "AMP_OPT_LEVEL": ("O0", "O1", "O2"),
    "AMP_DTYPE": ("float16", "bfloat16"),
    "RUNTIME": ("pytorch", "onnxruntime", "openvino", "auto"),
}


def _at_least(low):
    return (lambda value: value >= low), f"at least {low}"


def _between(low, high):
    return (lambda value: low <= value <= high), f"at least {low} and at most {high}"


def _side_or_sides(low, high):
    def possible(value):
        sides = value if type(value) is list else [value, value]
        return len(sides) == 2 and _all_between(sides, low, high, (int,))

    return possible, f"a whole number or [height, width], at least {low} and at most {high}"


def _phases():
    possible_size, size = _side_or_sides(1, 10**5)

    def possible(value):
        if not all(type(phase) is list and len(phase) == 3 for phase in value):
            return False
        epochs, sizes, strengths = zip(*value) if value else ((), (), ())
        return (
            _all_between(epochs, 0, 10**6, (int,))
            and list(epochs) == sorted(set(epochs))
            and (not epochs or epochs[0] == 0)
            and all(possible_size(size) for size in sizes)
            and _all_between(strengths, 0, 1)
        )

    words = "a list of [first epoch, size, strength]: first epochs from 0 on, each later than the one before;"
    return possible, f"{words} sizes, {size}; strengths between 0 and 1"


def _numbers(low, high, kinds=(int, float), some=False):
    words = f"a list of {'' if float in kinds else 'whole '}numbers, at least {low} and at most {high}"
    words += ", one or more of them" if some else ""
    return (lambda value: (value or not some) and _all_between(value, low, high, kinds)), words


def _all_between(values, low, high, kinds=(int, float)):
    """Whether a list holds nothing but numbers from ``low`` to ``high``."""
    return all(type(value) in kinds and low <= value <= high for value in values)


def _is_below(name):
    """Whether a path stays below the folder that it is joined to."""
    path = PurePath(name)
    return bool(name) and not path.anchor and ".." not in path.parts


_ABOVE_0 = (lambda value: value > 0), "above 0"
_BELOW_1 = (lambda value: 0 <= value < 1), "at least 0 and below 1"
_SHARE = (lambda value: 0 <= value <= 1), "between 0 and 1"
_FOLDER = _is_below, "a name for a folder below OUTPUT"
_STAGES = _numbers(1, 1000, (int,))

# What the values of the other keys may be, as a test and its words; most of the upper limits are for what
# cannot be held in memory, counted in time, or waited for.
RANGES = {
    "DATA.BATCH_SIZE": _between(1, 10**6),
    "DATA.IMG_SIZE": _side_or_sides(1, 10**5),
    "DATA.MAX_PIXELS": _at_least(1),
    "DATA.MAX_SCANS": _at_least(1),
    "DATA.NUM_WORKERS": _between(0, 1000),
    "DATA.PROGRESSIVE": _phases(),
    "MODEL.NAME": _FOLDER,
    "MODEL.NUM_CLASSES": _between(1, 10**6),
    "MODEL.DROP_RATE": _BELOW_1,
    "MODEL.DROP_PATH_RATE": _BELOW_1,
    "MODEL.LABEL_SMOOTHING": _BELOW_1,
    "MODEL.MSG.PATCH_SIZE": _between(1, 10**5),
    "MODEL.MSG.IN_CHANS": _between(1, 10**4),
    "MODEL.MSG.EMBED_DIM": _between(1, 10**4),
    "MODEL.MSG.DEPTHS": _STAGES,
    "MODEL.MSG.NUM_HEADS": _STAGES,
    "MODEL.MSG.WINDOW_SIZE": _between(1, 10**5),
    "MODEL.MSG.QK_SCALE": ((lambda value: value is None or value > 0), "None or above 0"),
    "MODEL.MSG.SHUF_SIZE": _STAGES,
    "TRAIN.START_EPOCH": _between(0, 10**6),
    "TRAIN.EPOCHS": _between(1, 10**6),
    "TRAIN.WARMUP_EPOCHS": _between(0, 10**6),
    "TRAIN.WARMUP_STEPS": _at_least(0),
    "TRAIN.WEIGHT_DECAY": _at_least(0),
    "TRAIN.BASE_LR": _ABOVE_0,
    "TRAIN.WARMUP_LR": _at_least(0),
    "TRAIN.MIN_LR": _at_least(0),
    "TRAIN.LAYER_DECAY": ((lambda value: 0 < value <= 1), "above 0 and at most 1"),
    "TRAIN.CLIP_GRAD": _at_least(0),
    "TRAIN.SAVE_STEPS": _at_least(0),
    "TRAIN.SAVE_MINUTES": _at_least(0),
    "TRAIN.KEEP_CHECKPOINTS": _at_least(0),
    "TRAIN.MAX_NONFINITE": _at_least(0),
    "TRAIN.ACCUMULATION_STEPS": _at_least(0),
    "TRAIN.EMA.DECAY": _BELOW_1,
    "TRAIN.LR_SCHEDULER.MILESTONES": (
        lambda value: _all_between(value, 0, 10**6) and value == sorted(value),
        f"a list of numbers, at least 0 and at most {10**6}, in order, smallest first",
    ),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": _between(1, 10**6),
    "TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS": _between(0, 10**6),
    "TRAIN.LR_SCHEDULER.CYCLES": _between(1, 10**6),
    "TRAIN.LR_SCHEDULER.CYCLE_DECAY": ((lambda value: 0 < value <= 1), "above 0 and at most 1"),
    "TRAIN.LR_SCHEDULER.POWER": _between(0.01, 100),
    "TRAIN.LR_SCHEDULER.DECAY_RATE": ((lambda value: 0 < value <= 1), "above 0 and at most 1"),
    "TRAIN.OPTIMIZER.EPS": _ABOVE_0,
    "TRAIN.OPTIMIZER.BETAS": (
        lambda value: len(value) == 2 and _all_between(value, 0, 1) and 1 not in value,
        "two numbers, at least 0 and below 1",
    ),
    "TRAIN.OPTIMIZER.MOMENTUM": _BELOW_1,
    "DISTILL.TEMPERATURE": _between(0.01, 1000),
    "DISTILL.ALPHA": _SHARE,
    "AUG.COLOR_JITTER": _at_least(0),
    "AUG.REPEATED": _between(1, 100),
    "AUG.HFLIP": _SHARE,
    "AUG.REPROB": _SHARE,
    "AUG.RECOUNT": _between(0, 100),
    "AUG.MIXUP": _at_least(0),
    "AUG.CUTMIX": _at_least(0),
    "AUG.CUTMIX_MINMAX": (
        lambda value: (
            value is None or (len(value) == 2 and _all_between(value, 0, 1) and 0 < value[0] <= value[1])
        ),
        "None or two ratios, smallest first, above 0 and at most 1",
    ),
    "AUG.MIXUP_PROB": _SHARE,
    "AUG.MIXUP_SWITCH_PROB": _SHARE,
    "DET.MIN_SIZES": _numbers(16, 10**5, (int,), some=True),
    "DET.MAX_SIZE": _between(16, 10**5),
    "DET.CROP_MIN_SIZES": _numbers(16, 10**5, (int,)),
    "DET.CROP_SIZES": (
        lambda value: (
            not value or (len(value) == 2 and _all_between(value, 16, 10**5, (int,)) and value[0] <= value[1])
        ),
        f"an empty list or two whole numbers, smallest first, at least 16 and at most {10**5}",
    ),
    "DET.TEST_SIZE": _between(16, 10**5),
    "DET.SHUF_SIZE": _STAGES,
    "DET.FROZEN_STAGES": _at_least(0),
    "DET.CHANNELS": _between(1, 2000),
    "DET.ANCHOR_SCALE": _between(1, 10**4),
    "DET.ANCHOR_RATIOS": _numbers(0.001, 1000, some=True),
    "DET.RPN_SAMPLES": _at_least(1),
    "DET.PROPOSALS_TRAIN": _at_least(1),
    "DET.PROPOSALS_TEST": _at_least(1),
    "DET.ROI_SAMPLES": _at_least(1),
    "DET.ROI_POSITIVE": _SHARE,
    "DET.IOU_THRESHOLDS": _numbers(0, 1, some=True),
    "DET.LOSS_WEIGHTS": _numbers(0, 10**6),
    "DET.DELTA_STDS": (
        lambda value: all(type(v) is list and len(v) == 4 and _all_between(v, 1e-6, 10**6) for v in value),
        "four positive numbers for each stage",
    ),
    "DET.BOX_CONVS": _between(0, 100),
    "DET.BOX_FCS": _numbers(1, 10**4, (int,), some=True),
    "DET.MASK_CONVS": _between(0, 100),
    "DET.SCORE_THRESHOLD": _SHARE,
    "DET.NMS_IOU": _SHARE,
    "DET.PER_IMAGE": _at_least(1),
    "DET.PICTURES": _at_least(0),
    "DIST.TIMEOUT_SECONDS": _between(1, 10**6),
    "TAG": _FOLDER,
    "SAVE_FREQ": _at_least(1),
    "PRINT_FREQ": _at_least(1),
    "SEED": _at_least(0),
    "LOCAL_RANK": _at_least(0),
}


def parse_args(description, throughput=False, argv=None):
    """Parse the official release's command line, and what Swin's and this project add to it.

    Underscores in a flag are as good as dashes.

    Args:
        throughput: whether the program has a mode that times inference.
        argv: the words; those of the command line by default.

    Raises:
        ConfigError: an unknown flag, with the one that was probably meant.
        UserError: the variables of a launcher do not fit together.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    flags = ["-h", "--help"]

    def add(flag, to=parser, **options):
        to.add_argument(flag, **options)
        flags.append(flag)

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
    add("--amp-opt-level", to=amp, choices=levels, help="O0: float32; O1: mixed precision; O2: as O1")
    add("--disable-amp", to=amp, dest="amp_opt_level", action="store_const", const="O0", help="float32")
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
        if re.match("--?[A-Za-z]", flag):
            dashed = flag.replace("_", "-")
            if dashed not in flags:
                raise ConfigError(f"unknown flag {_show(flag)}; {_flag_hint(dashed, flags)}")
            flag = dashed
        words.append("=".join([flag, *value]))
    args = parser.parse_args(words)
    if args.local_rank is not None and os.environ.get("RANK"):  # launchers of old gave the flag alone
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    adopt_launcher()
    args.local_rank = int(os.environ.get("LOCAL_RANK") or args.local_rank or 0)
    return args


def _flag_hint(flag, flags):
    """What to use in place of an unknown flag."""
    name = flag.lstrip("-").lower()
    if f"--{name}" in ELSEWHERE:
        return ELSEWHERE[f"--{name}"]
    near = [known for known in flags if known.startswith(f"--{name}")]
    near = near or difflib.get_close_matches(f"--{name}", flags, 1, 0.7)
    if near:
        return f"did you mean {near[0]}?"
    key = _nearest_key(name)
    return f"did you mean --opts {key} VALUE?" if key else "--help lists every flag"


def read_command_line(description, dataset, throughput=False):
    """The config that a program is asked for; a mistake in it ends the program with one message.

    Programs call this before they import what takes seconds, so that usage and mistakes are shown at once.

    Args:
        description, throughput: see :func:`parse_args`.
        dataset: see :func:`get_config`.
    """
    with telling_errors():
        return get_config(parse_args(description, throughput), dataset)


def get_config(args, dataset=None):
    """Build the effective config of a run.

    Args:
        args: a namespace with ``cfg`` (path of a YAML file) and optionally ``opts`` (a flat list of keys and
            values), ``batch_size``, ``data_path``, ``resume``, ``pretrained``, ``accumulation_steps``,
            ``use_checkpoint``, ``optim``, ``amp_opt_level``, ``device``, ``output``, ``tag``, ``eval``,
            ``throughput``, ``local_rank``.
        dataset: the ``DATA.DATASET`` that the program is for: coco, or imagenet, which stands for all others;
            None takes any.

    Returns:
        A frozen CfgNode whose ``OUTPUT`` is the run's own folder, OUTPUT/MODEL.NAME/TAG.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value, with its key, its source and a way
            out.
    """
    config, sources = default_config(), {}
    _merge_file(config, os.path.expanduser(args.cfg), sources, (), [])
    opts = list(getattr(args, "opts", None) or [])
    if len(opts) % 2:
        raise ConfigError(f"--opts takes pairs of KEY VALUE, but {_show(opts[-1])} has no partner")
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
            _assign(config, key, value, "--" + flag.replace("_", "-"), sources)
    _check_dataset(config, sources, dataset)
    _check(config, sources)
    _check_version(config, sources)
    timed = config.THROUGHPUT_MODE and not config.EVAL_MODE  # in float32, as by the official code
    handed_over = config.EVAL_MODE and config.RUNTIME in ("onnxruntime", "openvino")
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
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{source} has {len(text):,} characters, and may have {MOST_BYTES:,}")
    config, sources = default_config(), {}
    tree = _tree(text, source, _LoaderOfText)
    tree.pop("BASE", None)
    for key, value in _leaves(tree):
        _assign(config, key, value, source, sources)
    if config.DATA.DATASET == "coco":
        config.COMPILE = False  # once allowed, and without effect
    _check(config, sources)
    config.DEVICE, config.RUNTIME, config.LOCAL_RANK = "", "pytorch", 0
    config.freeze()
    return config


def set_classes(config, count):
    """Set ``MODEL.NUM_CLASSES`` to what the data have; nothing else of a config changes after it is read."""
    config.defrost()
    config.MODEL.NUM_CLASSES = count
    config.freeze()


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
    return dict(_leaves(_tree(dump_config(config), "the config")))


def flat_text(text, source):
    """The same of what :func:`dump_config` wrote, perhaps long ago: keys that it lacks have their defaults.

    Args:
        text: YAML, or a dict of what it says by dotted key.
        source: where it is from, for messages.

    Raises:
        ConfigError: it is not YAML of that kind.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{source} has {len(text):,} characters, and may have {MOST_BYTES:,}")
    found = text if isinstance(text, dict) else dict(_leaves(_tree(text, source)))
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
    there, here = flat_text(theirs, source), _function(ours)
    if isinstance(theirs, dict):  # shapes tell the official versions apart
        there = {key: value for key, value in there.items() if key in theirs or key not in VERSION}
    there = _function(there)
    keys = [key for key in here if key in there]
    keys += sorted(key for key in here.keys() ^ there.keys() if key.startswith("MODEL.TIMM_ARGS."))
    return [
        f"{key} is {_show(there.get(key))} in the checkpoint and {_show(here.get(key))} in the config"
        for key in keys
        if there.get(key) != here.get(key)
    ]


def _function(options):
    """The options that decide the result of trained weights, by key; equal ones have equal values."""
    detects = options["DATA.DATASET"] == "coco"
    kinds = (*OF_MODELS, *(OF_DETECTORS if detects else OF_CLASSIFIERS))
    found = {key: value for key, value in options.items() if key.startswith(kinds)}
    unused = ["MODEL.MSG.ATTENTION"]
    if detects:
        unused += ["MODEL.MSG.HEAD", "MODEL.MSG.SHUF_SIZE"]
    else:
        size = found["DATA.IMG_SIZE"]
        found["DATA.IMG_SIZE"] = sides = size if isinstance(size, list) else [size, size]
        unused += ["TEST.CROP"] if any(type(side) is int and side <= 32 for side in sides) else []
        if found["DATA.INTERPOLATION"] == "random":
            found["DATA.INTERPOLATION"] = "bicubic"
    if options["MODEL.TYPE"] == "timm":
        unused += [key for key in found if key.startswith("MODEL.MSG.") and key != "MODEL.MSG.IN_CHANS"]
    return {key: value for key, value in found.items() if key not in unused}


class _Loader(yaml.SafeLoader):
    """Plain YAML without aliases: a few lines of them can unfold to gigabytes, or to a circle.

    A key that is given twice is an error: the last one would win without a word.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"configs may not use aliases{self.peek_event().start_mark}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.YAMLError(f"{key.value} is given twice{key.start_mark}")
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _LoaderOfText(_Loader):
    """For what people write: values are text, as on the command line, until the kind of their key is known.

    YAML would make ``TAG: 1.10`` the number 1.1, ``0010`` the number 8 and ``12:30`` the number 750.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in _Loader.yaml_implicit_resolvers.items()
    }


def _merge_file(config, path, sources, parents, sizes):
    """Merge a YAML file into ``config``, the files of its ``BASE`` first; ``sizes`` are those read so far."""
    path = os.path.normpath(path)
    if path in parents:
        raise ConfigError(f"{path}: BASE goes in a circle: {' -> '.join((*parents, path))}")
    if len(sizes) == MOST_FILES:
        raise ConfigError(f"{path}: BASE leads to more than {MOST_FILES} files, repeated ones included")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is a folder, a pipe or a device")
        with open(path, "rb") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"cannot read the config file {path}: {reason}") from error
    sizes.append(len(text))
    if sum(sizes) > MOST_BYTES:
        raise ConfigError(f"{path}: a config and its BASE files may have {MOST_BYTES:,} bytes together")
    tree = _tree(text, path, _LoaderOfText)
    bases = tree.pop("BASE", None) or []
    bases = bases if isinstance(bases, list) else [bases]
    if not all(isinstance(base, str) and "\0" not in base for base in bases):
        raise ConfigError(f"{path}: BASE is {_show(bases)}, but must be a list of YAML files")
    for base in filter(None, bases):
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        _merge_file(config, base, sources, (*parents, path), sizes)
    for key, value in _leaves(tree):
        _assign(config, key, value, path, sources)


def _tree(text, source, loader=_Loader):
    """The nested dict of a YAML text; empty where there is nothing in it."""
    try:
        tree = yaml.load(text, loader)
    # The reader leaves impossible dates and numbers, false tags, and lists in lists in lists, to Python.
    except Exception as error:
        raise ConfigError(
            f"{source} is not valid YAML: {_short(' '.join(str(error).split()), 300)}"
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{source}: expected 'KEY: value' lines, found a {type(tree).__name__}")
    return tree


def _leaves(tree, prefix=""):
    """Dotted keys and values of a nested dict."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nearest_key(key):
    """The key that was probably meant, or None."""
    known = [name for name, _ in _leaves(default_config())]
    wanted = key.upper().replace("-", "_")
    near = difflib.get_close_matches(wanted, known, 1, 0.75)
    if near:
        return near[0]
    # A key in the wrong section is as likely as a typing error: compare the last part too.
    lasts = [name.split(".")[-1] for name in known]
    near = difflib.get_close_matches(wanted.split(".")[-1], lasts, 1, 0.8)
    return known[lasts.index(near[0])] if near else None


def _assign(config, key, value, source, sources):
    """Set one dotted key, after checking its name and type."""
    node, *path = config, *key.split(".")
    for name in path[:-1]:
        node = node.get(name) if isinstance(node, CfgNode) else None
    if key.rpartition(".")[0] == "MODEL.TIMM_ARGS":
        node[path[-1]] = _argument(value, key, source)
        sources[key] = source
        return
    if not isinstance(node, CfgNode) or path[-1] not in node:
        near = _nearest_key(key)
        hint = f"did you mean {near}?" if near else "config.py lists every key"
        raise ConfigError(f"{source}: unknown key {_show(key)[1:-1]}; {hint}")
    present = node[path[-1]]
    if isinstance(present, CfgNode):
        if value is None or value == {}:
            return
        raise ConfigError(
            f"{source}: {key} is a section; set one of its keys, such as {key}.{next(iter(present))}"
        )
    node[path[-1]] = _coerce(value, present, key, source)
    sources[key] = source


def _coerce(value, present, key, source):
    """Bring a value to the type of the present one, or refuse it."""
    optional = {"MODEL.MSG.QK_SCALE": float, "AUG.CUTMIX_MINMAX": list}
    kind = optional.get(key, type(present))

    def refuse(what):
        raise ConfigError(f"{source}: {key} is {_show(value)}, but must be {what}")

    if kind is str:
        if type(value) is not str or "\0" in value or not _is_encodable(value):
            refuse(f"text, such as {present!r}")
        if len(value) > MOST_CHARACTERS:
            refuse(f"text of at most {MOST_CHARACTERS} characters")
        return os.path.expanduser(value) if key in _PATHS else value
    value = _literal(value)
    if value is None and key in optional:
        return None
    if _is_ambiguous(value):
        refuse("a number without a leading 0 or colons, which programs read differently")
    words = f"{_NAMES[kind]}, such as {present!r}"
    if key == "DATA.IMG_SIZE":  # one side or two, whichever an earlier file has
        kind, words = list if type(value) is list else int, RANGES[key][1]
    if kind in (list, tuple) and type(value) is list:
        value = kind(value)
    if type(value) is not kind and not (kind is float and type(value) is int):
        refuse(words)
    largest = LARGEST_SEED if key == "SEED" else LARGEST
    if not all(abs(number) <= largest for number in _numbers_in(value)):
        refuse(f"finite and no larger than {largest}")
    if kind in (list, tuple) and len(value) > MOST_ENTRIES:
        refuse(f"a list of at most {MOST_ENTRIES} entries")
    return float(value) if kind is float else value


def _argument(value, key, source):
    """An argument of timm's models: a number, a text, a truth value, None, or a list of these."""
    value = _literal(value)
    entries = value if isinstance(value, list) else [value]
    if _is_ambiguous(value):
        raise ConfigError(
            f"{source}: {key} is {_show(value)}, but must be a number without a leading 0 or colons, which "
            "programs read differently"
        )
    plain = all(type(entry) in (bool, int, float, str, type(None)) for entry in entries)
    if not re.fullmatch(r"MODEL\.TIMM_ARGS\.[a-z]\w{0,99}", key) or not plain:
        raise ConfigError(f"{source}: {key} is {_show(value)}, which is no argument of a model of timm")
    return None if value is None else _coerce(value, value, key, source)


def _literal(value):
    """What text says, in lists too; truth values in YAML's words as well as in Python's."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return _WORDS.get(value.lower(), value)
    return [_literal(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _is_ambiguous(value):
    """Whether text or an entry of a list, such as 010 or 1:30, is a number to YAML and not to Python."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_ambiguous, value))
    return isinstance(value, str) and bool(re.fullmatch(r"[-+]?(0[\d_]+|\d[\d_]*(:\d+)+(\.\d*)?)", value))


def _numbers_in(value):
    """The numbers in a value and its nested lists."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _numbers_in(entry)
    elif type(value) in (int, float):
        yield value


def _is_encodable(text):
    """Whether text can be part of a file's name; a YAML file can hold halves of characters."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _show(value):
    """A value as Python writes it, on one line and not too long."""
    try:
        return _short(repr(value))
    except ValueError:  # more digits than Python writes
        return "an enormous number"


def _short(text, most=120):
    return text if len(text) <= most else f"{text[:most]}..."


_WORDS = dict(true=True, yes=True, on=True, false=False, no=False, off=False, none=None, null=None)
# Where ~ is the home folder.
_PATHS = (
    "DATA.DATA_PATH",
    "MODEL.RESUME",
    "MODEL.PRETRAINED",
    "DISTILL.TEACHER",
    "DISTILL.WEIGHTS",
    "OUTPUT",
    "DET.TRAIN_IMAGES",
    "DET.TRAIN_JSON",
    "DET.VAL_IMAGES",
    "DET.VAL_JSON",
)
_NAMES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
}


def _value(config, key):
    for name in key.split("."):
        config = config[name]
    return config


def _check_dataset(config, sources, dataset):
    """Refuse a config that is for the other program."""
    programs = {**dict.fromkeys(CHOICES["DATA.DATASET"], "main.py"), "coco": "detect.py"}
    found = config.DATA.DATASET
    if dataset and found in programs and programs[found] != programs[dataset]:
        raise ConfigError(
            f"{sources.get('DATA.DATASET', 'defaults')}: DATA.DATASET is {found!r}, which is for "
            f"{programs[found]}; {programs[dataset]} takes configs whose DATA.DATASET is {dataset!r}"
        )


def _check_version(config, sources):
    """Refuse to mix v1 and CVPR 2022 unless both keys that tell them apart are set.

    Official configs have neither key: each of the two official versions can only build one of them. Depths
    tell which it is.
    """
    if all(key in sources for key in VERSION):
        return
    msg = config.MODEL.MSG
    if list(msg.DEPTHS) in ([2, 4, 12, 4], [2, 4, 28, 4]):
        problem = f"MODEL.MSG.DEPTHS {msg.DEPTHS} are those of the CVPR 2022 models"
        source = sources["MODEL.MSG.DEPTHS"]
    elif msg.PATCH_EMBED != msg.DOWNSAMPLE:
        problem = f"MODEL.MSG.PATCH_EMBED {msg.PATCH_EMBED} does not go with DOWNSAMPLE {msg.DOWNSAMPLE}"
        source = next(sources[key] for key in VERSION if key in sources)
    else:
        return
    raise ConfigError(
        f"{source}: {problem}, so set both keys: MODEL.MSG.PATCH_EMBED conv and MODEL.MSG.DOWNSAMPLE conv "
        "build a model of CVPR 2022, as configs/cvpr22 does; any other pair builds a mix, if you want one"
    )


def _check(config, sources):
    """Refuse impossible values. What only the model can judge, the model refuses itself."""

    def require(key, possible, what):
        value = _value(config, key)
        if not possible(value):
            raise ConfigError(f"{sources.get(key, 'defaults')}: {key} is {_show(value)}, but must be {what}")

    for key, names in CHOICES.items():
        lower = {name.lower(): name for name in names}
        near = difflib.get_close_matches(str(_value(config, key)).lower(), lower, 1, 0.7)
        hint = f"; did you mean {lower[near[0]]!r}?" if near else ""
        require(key, names.__contains__, "one of " + ", ".join(map(repr, names)) + hint)
    for key, (possible, what) in RANGES.items():
        require(key, possible, what)
    if config.MODEL.TYPE == "timm":
        require(
            "AMP.FUSED_LAYERNORM",
            lambda value: not value,
            "False for models of timm, which have their own norms",
        )
    schedule, epochs = config.TRAIN.LR_SCHEDULER, config.TRAIN.EPOCHS
    if schedule.NAME in ("step", "multistep"):
        key = "TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS"
        require(key, lambda value: value == 0, f"0 for {schedule.NAME}, which has no least rate")
    if schedule.NAME not in ("cosine", "tanh", "poly"):
        require("TRAIN.LR_SCHEDULER.CYCLES", lambda value: value == 1, "1 except for cosine, tanh and poly")
    require("TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS", lambda value: value < epochs, "below TRAIN.EPOCHS")
    require(
        "DATA.PROGRESSIVE",
        lambda value: all(epoch < epochs for epoch, *_ in value),
        f"a list whose first epochs are below TRAIN.EPOCHS, {epochs}",
    )
    near = difflib.get_close_matches(config.TRAIN.OPTIMIZER.NAME.lower(), OPTIMIZERS, 5, 0.5)
    near = near or ["adamw", "sgd", "lamb", "lion"]
    what = "an optimizer of timm that a run can resume with, such as " + ", ".join(map(repr, near))
    require("TRAIN.OPTIMIZER.NAME", OPTIMIZERS.__contains__, what)

    if config.DATA.DATASET == "coco":
        require("MODEL.TYPE", lambda value: value == "msg", "'msg' for detection")
        require("DISTILL.TEACHER", lambda value: not value, "empty for detection")
        require("DATA.PROGRESSIVE", lambda value: not value, "empty for detection, see DET.MIN_SIZES")
        what = "False for detection, whose images have too many sizes to compile for"
        require("COMPILE", lambda value: not value, what)
        require("RUNTIME", lambda value: value == "pytorch", "'pytorch' for detection")
    if config.RUNTIME != "pytorch" and (config.EVAL_MODE or config.THROUGHPUT_MODE):
        require("COMPILE", lambda value: not value, f"False with RUNTIME {config.RUNTIME}")
    named = config.MODEL.TYPE == "timm"
    require("MODEL.TIMM_NAME", lambda value: bool(value) == named, "given where MODEL.TYPE is timm only")
    msg, det, aug = config.MODEL.MSG, config.DET, config.AUG
    require(
        "MODEL.MSG.MLP_RATIO",
        lambda value: 1 / msg.EMBED_DIM <= value <= 100,
        "at least 1 / MODEL.MSG.EMBED_DIM and at most 100",
    )
    if config.DATA.DATA_PATH:
        what = "1, 3 or 4 with data, and 3 for detection and with DATA.BACKEND opencv"
        others = config.DATA.DATASET != "coco" and config.DATA.BACKEND == "pil"
        possible = (1, 3, 4) if others else (3,)
        require("MODEL.MSG.IN_CHANS", possible.__contains__, what)
    require("DET.TEST_SIZE", lambda value: value < det.MAX_SIZE, "below DET.MAX_SIZE")
    for key in ("DET.LOSS_WEIGHTS", "DET.DELTA_STDS"):
        require(key, lambda value: len(value) == len(det.IOU_THRESHOLDS), "as long as DET.IOU_THRESHOLDS")
    mixes = aug.MIXUP > 0 or aug.CUTMIX > 0 or aug.CUTMIX_MINMAX is not None
    if mixes and config.DATA.DATASET != "coco" and not config.EVAL_MODE and not config.THROUGHPUT_MODE:
        require("DATA.BATCH_SIZE", lambda value: value % 2 == 0, "even for mixup and CutMix, which mix pairs")
