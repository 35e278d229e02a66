"""What messengers attend to, how far they carry information, and what the class score owes to them.

All functions take a trained :class:`MSGTransformer` in evaluation mode as it is, with any attention backend
and images of any size. They use hooks and replace the exchange of blocks; when they return, the model is as
before. docs/messengers.md has the formulas.

A *blank* image has only zeros, which is the mean colour after normalisation. To *silence* the messenger of a
window, we replace it with the one that a blank image has there, in every block of a stage, after the
attention and before the exchange. What it has gathered then reaches nobody, its own window included.

A *grid* of messengers is (B, rows, columns, C), with all windows of whole shuffle regions, also those beyond
the edge of the image.
"""

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from models.attention import hide, probabilities, qkv_heads
from models.msg_transformer import merge_windows, partition_windows
from models.padding import Extent
from utils import UserError

AT_ONCE = 16  # variants of an image in a batch
NOTHING = 1e-10  # relative change in float64 that is rounding


@dataclass(frozen=True)
class Grid:
    """The windows of a stage on an image.

    Attributes:
        rows, columns: windows, in whole shuffle regions.
        shown: (rows, columns) of the windows that hold a part of the image.
        tokens: (rows, columns) of patch tokens that do.
        side: of a window, in pixels.
        window_size: tokens on a side of a window.
        region: windows on a side of a shuffle region.
    """

    rows: int
    columns: int
    shown: tuple
    tokens: tuple
    side: int
    window_size: int
    region: int

    def join(self, messengers):
        """Messengers (B*regions, windows, C) as a grid."""
        return merge_windows(messengers[:, :, None], 1, self.region, self.rows, self.columns)

    def split(self, x):
        """Undo :meth:`join`."""
        return partition_windows(x, 1, self.region)[:, :, 0]

    def number_of(self, row, column):
        """The number of a window's region, and its number in that."""
        across = self.columns // self.region
        region = row // self.region * across + column // self.region
        return region, row % self.region * self.region + column % self.region

    def means(self, x):
        """The means of a map of pixels (height, width) over the windows that hold some: ``shown``."""
        height, width = x.shape
        sides = self.shown[0] * self.side - height, self.shown[1] * self.side - width
        maps = functional.pad(torch.stack([x, torch.ones_like(x)]), (0, sides[1], 0, sides[0]))
        total, count = functional.avg_pool2d(maps, self.side)
        return total / count


def grids(model, size):
    """The :class:`Grid` of every stage for images of ``size``, (height, width) in pixels."""
    found, extent, side = [], Extent.of_images(*size, model.patch_size), model.patch_size
    for stage in model.layers:
        shown, region = extent.windows(stage.window_size), stage.shuffle_size
        whole = (-(-count // region) * region for count in shown)
        sides = side * stage.window_size, stage.window_size, region
        found.append(Grid(*whole, shown, (extent.height, extent.width), *sides))
        extent, side = extent.merged(), 2 * side
    return found


def layouts(model, images):
    """The :class:`~models.padding.Layout` of every stage, None where its maps consist of whole regions."""
    found, extent = [], Extent.of_images(*images.shape[2:], model.patch_size)
    for stage in model.layers:
        found.append(stage.layout(extent, images))
        extent = extent.merged()
    return found


def blocks_of(model):
    """The blocks of all stages in order: (stage, block) from 0, and the block."""
    return [((i, j), block) for i, stage in enumerate(model.layers) for j, block in enumerate(stage.blocks)]


@contextlib.contextmanager
def hooks(*handles):
    """Context that removes hooks in the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def exchanges(model, change):
    """Context in which ``change((stage, block), exchange)`` takes the place of each block's exchange.

    Both are functions of messengers (B*regions, windows, C), after the attention, to the same shape.
    """
    kept = [(block, block.exchange) for _, block in blocks_of(model)]
    try:
        for place, block in blocks_of(model):
            block.exchange = _in_place(change(place, block.exchange or keep))
        yield
    finally:
        for block, exchange in kept:
            block.exchange = exchange


def _in_place(exchange):
    # A region of one window exchanges nothing, so that blocks ignore what comes back.
    def of_messengers(messengers):
        changed = exchange(messengers)
        return messengers.copy_(changed.clone()) if messengers.shape[1] == 1 else changed

    return of_messengers


def keep(messengers):
    """No exchange: every window keeps its messenger."""
    return messengers


@torch.no_grad()
def messenger_attention(model, images):
    """What messengers attend to: their rows of softmax(scale q k^T + bias), whatever the backend.

    Args:
        images: (B, channels, height, width).

    Returns:
        A dict of (stage, block), from 0, to weights (B, rows, columns, heads, 1+w*w) that add up to 1: for
        the messenger itself, then for the patch tokens, row-major; 0 for places beyond the edge of the
        image. The messenger of a window without patches sees itself alone.
    """
    found, places, rows = {}, grids(model, images.shape[2:]), layouts(model, images)

    def look_into(place):
        def look(attention, arguments):
            grid, layout = places[place[0]], rows[place[0]]
            weights = _messenger_rows(attention, arguments[0], layout)  # B*all windows, heads, tokens
            joined = grid.join(weights.flatten(1).unflatten(0, (-1, grid.region**2)))
            found[place] = joined.unflatten(3, weights.shape[1:])

        return look

    looks = [block.attn.register_forward_pre_hook(look_into(place)) for place, block in blocks_of(model)]
    with hooks(*looks):
        model.forward_features(images)
    return found


def _messenger_rows(attention, x, layout):
    """The messengers' rows of attention, (windows, heads, tokens), windows in the order of their regions."""
    bias, qkv = attention.bias(), attention.qkv(x)

    def weights(qkv, bias):
        q, k, _ = qkv_heads(qkv, bias.shape[-3])
        return probabilities(q[:, :, :1], k, bias[..., :1, :], attention.scale)[:, :, 0]

    if layout is None:
        return weights(qkv.flatten(0, 1), bias)
    whole = layout.full * layout.tokens
    of_full, of_padded, _ = qkv[0].split([whole, layout.held, layout.empty])
    parts = [weights(of_full.unflatten(0, (layout.full, layout.tokens)), bias)]
    if layout.padded:
        of_padded = of_padded[layout.spread.index].unflatten(0, (layout.padded, layout.tokens))
        parts.append(weights(of_padded, hide(bias, layout.hidden)))
    alone = functional.one_hot(layout.order.new_zeros(layout.empty, len(bias)), layout.tokens)
    return torch.cat([*parts, alone.to(qkv.dtype)])[layout.order]


@torch.no_grad()
def trace(model, images, replaced=None, seen=None):
    """Run the model and look at the tokens after every block.

    Args:
        images: (B, channels, height, width).
        replaced: function of the patch tokens (B, H, W, C) that enter the first block, to what enters
            instead; None leaves them.
        seen: function of (stage, block), patches (B, H, W, C) and the grid of messengers.

    Returns:
        The patch tokens that entered, (B, H, W, C).
    """
    places, rows, entered = grids(model, images.shape[2:]), layouts(model, images), []

    def enter(module, arguments, tokens):
        entered.append(tokens if replaced is None else replaced(tokens))
        return entered[0]

    def look_after(place):
        def look(block, arguments, x):
            layout, grid = rows[place[0]], places[place[0]]
            if layout is not None:
                messengers = layout.read_messengers(x)[:, :, 0]
                seen(place, layout.restore(x)[0], grid.join(messengers))
            else:
                patches = merge_windows(x[:, :, 1:], grid.window_size, grid.region, *grid.tokens)
                seen(place, patches, grid.join(x[:, :, 0]))

        return look

    looks = [block.register_forward_hook(look_after(place)) for place, block in blocks_of(model) if seen]
    with hooks(model.pos_drop.register_forward_hook(enter), *looks):
        model.forward_features(images)
    return entered[0]


def influence(model, image, windows):
    """Where the content of windows has travelled after each block.

    The patch tokens of one window of the first stage are replaced by those of a blank image as they enter the
    first block. The influence on a token y after a block is how much that changes it: ||y' - y|| / ||y||.
    Positions stay. Changes of less than :data:`NOTHING` are rounding, and count as none.

    Args:
        model: in float64.
        image: (channels, height, width), float64.
        windows: pairs of row and column, among those of the first stage that hold a part of the image.

    Returns:
        A dict of (stage, block), from 0, to the influence of each window on patch tokens (N, H, W) and on
        messengers (N, rows, columns).
    """
    side, before, found = grids(model, image.shape[1:])[0].window_size, {}, {}
    blank = trace(model, torch.zeros_like(image[None]))
    trace(model, image[None], seen=lambda place, *tokens: before.update({place: tokens}))
    for chosen in _batches(windows):

        def swap(tokens):
            tokens = tokens.clone()
            for number, (row, column) in enumerate(chosen):  # noqa: B023
                rows, columns = (slice(side * i, side * (i + 1)) for i in (row, column))
                tokens[number, rows, columns] = blank[0, rows, columns]
            return tokens

        def compare(place, *tokens):
            for kind, (after, unchanged) in enumerate(zip(tokens, before[place])):
                change = (after - unchanged).norm(dim=3) / unchanged.norm(dim=3).clamp(min=NOTHING)
                change = change.where(change > NOTHING, 0)
                found.setdefault(place, ([], []))[kind].append(change)

        trace(model, image.expand(len(chosen), -1, -1, -1), swap, compare)
    return {place: tuple(map(torch.cat, kinds)) for place, kinds in found.items()}


class Sent(NamedTuple):
    """What a window sends to another in an exchange.

    Attributes:
        source: its number in the region, row-major.
        sent, received: numbers of the channels, before and after.
        weight: factor of their values.
    """

    source: int
    sent: list
    received: list
    weight: float


def exchange_route(exchange, windows, channels, window):
    """What the messenger of a window is made of in an exchange: a :class:`Sent` for each source.

    It is found by sending one messenger at a time through the exchange.

    Args:
        exchange: of a block; None for none.
        windows, channels: of a shuffle region.
        window: number of the receiving window in its region, row-major.
    """
    numbers, route = torch.arange(1, channels + 1, dtype=torch.float64), []
    for source in range(windows):
        probes = torch.zeros(2, windows, channels, dtype=torch.float64)
        probes[0, source], probes[1, source] = 1, numbers
        weight, named = (exchange or keep)(probes)[:, window]
        received = weight.nonzero()[:, 0]
        if len(received):
            sent = (named / weight)[received].round().long() - 1
            route.append(Sent(source, sent.tolist(), received.tolist(), weight[received[0]].item()))
    return route


@torch.no_grad()
def sent_messengers(model, images):
    """Messengers as they enter the exchange: a dict of (stage, block) to (B*regions, windows, C)."""
    found = {}

    def record(place, exchange):
        def of_messengers(messengers):
            found[place] = messengers.clone()
            return exchange(messengers)

        return of_messengers

    with exchanges(model, record):
        model.forward_features(images)
    return found


@torch.no_grad()
def ablate(model, image, stage, masks):
    """Class scores (N, classes) of an image where messengers of a stage, from 0, are silenced.

    Args:
        image: (channels, height, width).
        masks: bool (N, rows, columns): which messengers, in each of N variants.
    """
    blank = sent_messengers(model, torch.zeros_like(image[None]))
    grid, parts = grids(model, image.shape[1:])[stage], []
    for chosen in _batches(masks.to(image.device)):
        silent = grid.split(chosen[..., None])  # N*regions, windows, 1

        def silence(place, exchange):
            if place[0] != stage:
                return exchange
            silenced = blank[place].repeat(len(chosen), 1, 1)  # noqa: B023
            return lambda messengers: exchange(torch.where(silent, silenced, messengers))  # noqa: B023

        with exchanges(model, silence):
            parts.append(class_scores(model, image.expand(len(chosen), -1, -1, -1)))
    return torch.cat(parts)


def ablate_each(model, image, stage):
    """:func:`ablate` for each messenger of a stage alone: (rows, columns, classes) of ``shown`` windows."""
    grid = grids(model, image.shape[1:])[stage]
    rows, columns = grid.shown
    masks = torch.zeros(rows * columns, grid.rows, grid.columns, dtype=torch.bool)
    for number, mask in enumerate(masks):
        mask[divmod(number, columns)] = True
    return ablate(model, image, stage, masks).unflatten(0, (rows, columns))


def class_scores(model, images):
    """The logits of images less their mean over the classes, (B, classes); softmax sees no difference."""
    logits = model(images)
    return logits - logits.mean(1, keepdim=True)


@torch.no_grad()
def without_exchange(model, images, places, withheld=False):
    """Class scores where blocks exchange nothing.

    Args:
        images: (B, channels, height, width).
        places: of the blocks, (stage, block) from 0.
        withheld: False lets every window keep its messenger. True exchanges as ever, but what comes from
            other windows is what a blank image would send: its channels stay where the model expects them.

    Returns:
        (B, classes), see :func:`class_scores`.
    """
    blank = sent_messengers(model, torch.zeros_like(images[:1])) if withheld else {}

    def switch_off(place, exchange):
        if place not in places:
            return exchange
        return _withholding(exchange, blank[place]) if withheld else keep

    with exchanges(model, switch_off):
        return class_scores(model, images)


def _withholding(exchange, blank):
    """The exchange in which windows get nothing but a blank image's messengers from the others."""

    def of_messengers(messengers):
        regions, windows, _ = messengers.shape
        sent = blank.repeat(regions // len(blank), 1, 1)
        alone = torch.eye(windows, dtype=messengers.dtype, device=messengers.device)[..., None]
        own = exchange((alone * (messengers - sent)[:, None]).flatten(0, 1))  # linear, and a window at a time
        own = own.unflatten(0, (regions, windows)).diagonal(dim1=1, dim2=2).movedim(2, 1)
        return exchange(sent) + own

    return of_messengers


def attention_map(model, image):
    """What the messengers of the last block attend to, the mean over the heads, for each pixel.

    It is (height, width), in units of the weight that each of the 1+w*w tokens has in an even look.
    """
    place, _ = blocks_of(model)[-1]
    return patch_weights(model, image, messenger_attention(model, image[None])[place][0].mean(2), place[0])


def patch_weights(model, image, weights, stage):
    """Weights (rows, columns, 1+w*w) of a stage's windows as a map of pixels, see :func:`attention_map`."""
    grid = grids(model, image.shape[1:])[stage]
    windows = grid.split(weights[None, ..., 1:])  # regions, windows, w*w
    sides = grid.rows * grid.window_size, grid.columns * grid.window_size
    tokens = merge_windows(windows[..., None], grid.window_size, grid.region, *sides)[0, ..., 0]
    stride = grid.side // grid.window_size
    pixels = tokens.repeat_interleave(stride, 0).repeat_interleave(stride, 1)
    return weights.shape[2] * pixels[: image.shape[1], : image.shape[2]]


def gradient_map(model, image, target):
    """Gradient times input: sum over channels of d score / d pixel * pixel, (height, width).

    The first order of what the score of the class ``target`` loses where the pixel becomes blank.
    """
    with torch.enable_grad():
        images = image[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(class_scores(model, images)[0, target], images)
    return (gradient[0] * image).sum(0)


@dataclass(frozen=True)
class Findings:
    """What a sheet of one image shows; see :func:`examine`.

    Attributes:
        grids: of the stages.
        window: (row, column) of the chosen one in the first stage.
        target: number of the class whose score is looked at.
        scores: of the classes, (classes,), see :func:`class_scores`.
        attention: of each stage's last block, as a map of pixels, see :func:`patch_weights`.
        drops: for each stage, what ablating each messenger takes from the score: ``shown``.
        gradient_map: of pixels.
        influence: of the window, (stage, block) to patches (H, W) and messengers (rows, columns).
        routes: (stage, block) of the first block of stages that exchange, to what its window there receives:
            pairs of :class:`Sent` and how far what is sent is from a blank image's, as a norm.
    """

    grids: list
    window: tuple
    target: int
    scores: torch.Tensor
    attention: list
    drops: list
    gradient_map: torch.Tensor
    influence: dict
    routes: dict


def examine(model, image, window=None):
    """The :class:`Findings` of an image.

    Args:
        model: in float64.
        image: (channels, height, width), float64.
        window: (row, column), counted from 0, of a window of the first stage that holds a part of the image;
            None for the one whose messenger the score depends on most.

    Raises:
        UserError: the model has no messengers, or there is no such window.
    """
    check_messengers(model)
    places = grids(model, image.shape[1:])
    rows, columns = places[0].shown
    if window is not None and not (0 <= window[0] < rows and 0 <= window[1] < columns):
        raise UserError(
            f"--window {window[0]},{window[1]}: the image has {rows}x{columns} windows, from 0,0 to "
            f"{rows - 1},{columns - 1}"
        )
    with torch.no_grad():
        scores = class_scores(model, image[None])[0]
    target = int(scores.argmax())
    drops = [(scores[target] - ablate_each(model, image, stage)[..., target]) for stage in range(len(places))]
    window = window or divmod(int(drops[0].argmax()), columns)
    attention = messenger_attention(model, image[None])
    last = {stage: weights[0].mean(2) for (stage, _), weights in attention.items()}  # later blocks win
    reach = influence(model, image, [window])
    return Findings(
        grids=places,
        window=window,
        target=target,
        scores=scores,
        attention=[patch_weights(model, image, weights, stage) for stage, weights in last.items()],
        drops=drops,
        gradient_map=gradient_map(model, image, target),
        influence={place: tuple(kind[0] for kind in kinds) for place, kinds in reach.items()},
        routes=routes_to(model, image, window),
    )


def check_messengers(model):
    """Raise a UserError if a model has no messengers."""
    if not model.tokens:
        raise UserError("the model has no messengers (MODEL.MSG.TOKENS False): there is nothing to show")


def routes_to(model, image, window):
    """Where the messengers of a window's place come from in each stage: ``routes`` of :class:`Findings`."""
    found, blank = {}, sent_messengers(model, torch.zeros_like(image[None]))
    sent = sent_messengers(model, image[None])
    for stage, grid in enumerate(grids(model, image.shape[1:])):
        place, block = (stage, 0), model.layers[stage].blocks[0]
        if grid.region == 1 or block.exchange is None:
            continue
        region, number = grid.number_of(*(index >> stage for index in window))
        news = (sent[place] - blank[place])[region]  # windows, C
        route = exchange_route(block.exchange, len(news), news.shape[1], number)
        found[place] = [(part, float(news[part.source, part.sent].norm())) for part in route]
    return found


def _batches(variants):
    return (variants[first : first + AT_ONCE] for first in range(0, len(variants), AT_ONCE))
