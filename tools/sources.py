"""Images to use a model on: files, folders, patterns, and the frames of videos."""

import collections
import glob
import os
from typing import Any, NamedTuple

import cv2
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from data.datasets import MAX_PIXELS, DataError, find_images, is_image, load_image, without_pillows_limit

# What OpenCV's builds can mostly decode.
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")


class Picture(NamedTuple):
    """An image or frame, or why there is none."""

    place: int  # of its file in the list of files
    frame: int | None = None  # of a video, from 0
    size: tuple | None = None  # (height, width) in pixels
    inputs: Any = None  # what the transform made of it
    image: Image.Image | None = None  # RGB, where it is kept
    problem: str | None = None  # why it cannot be read


class Pictures(IterableDataset):
    """The :class:`Picture` of every image and of every ``every``-th frame of a list of files.

    What cannot be read becomes a Picture with a problem. Workers share the files; a video is read from
    beginning to end by one of them. ``keep`` keeps the images themselves. ``mode`` is Pillow's, of image
    files; frames are RGB.
    """

    def __init__(self, paths, transform, every=1, keep=False, mode="RGB"):
        self.mode = mode
        self.paths, self.transform, self.every, self.keep = paths, transform, every, keep

    def count(self):
        """How many there will be, by what the files say."""
        return sum(map(self._count, self.paths))

    def _count(self, path):
        return max(1, -(-_frames_of(path) // self.every)) if is_video(path) else 1

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for place in range(first, len(self.paths), step):
            read = self._read_video if is_video(self.paths[place]) else self._read_image
            try:
                for frame, image in read(self.paths[place]):
                    with without_pillows_limit():
                        inputs = self.transform(image)
                    size = (image.height, image.width)
                    yield Picture(place, frame, size, inputs, image.convert("RGB") if self.keep else None)
            except DataError as error:
                yield Picture(place, problem=str(error))

    def _read_image(self, path):
        yield None, load_image(path, mode=self.mode)

    def _read_video(self, path):
        for number, frame in enumerate(read_frames(path)):
            if number % self.every == 0:
                yield number, Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


def read_frames(path):
    """Yield the frames of a video as OpenCV decodes them: (H, W, 3), BGR, turned as the file says.

    Raises:
        DataError: OpenCV cannot decode it, or it ends long before it says, after its whole frames; what a
            file says of its length may be off by a few frames.
    """
    video, count = _open_video(path), 0
    try:
        if video.get(cv2.CAP_PROP_FRAME_WIDTH) * video.get(cv2.CAP_PROP_FRAME_HEIGHT) > MAX_PIXELS:
            raise DataError(f"{path} cannot be used: its frames have more than {MAX_PIXELS:,} pixels")
        while (read := video.read())[0]:
            yield read[1]
            count += 1
        said = video.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        video.release()
    if not count:
        raise DataError(f"{path} cannot be read as a video: OpenCV decodes no frame of it")
    if said - count > max(2, 0.02 * said):
        raise DataError(f"{path} is damaged: it ends after {count} of {said:.0f} frames")


def frame_rate(path):
    """Frames per second of a video; 25 where it does not say."""
    video = _open_video(path)
    try:
        rate = video.get(cv2.CAP_PROP_FPS)
    finally:
        video.release()
    return rate if 0 < rate < 1000 else 25.0


def _open_video(path):
    return cv2.VideoCapture(os.fsencode(path))  # text that is no UTF-8 would end the process


def _frames_of(path):
    video = _open_video(path)
    try:
        return int(min(max(0, video.get(cv2.CAP_PROP_FRAME_COUNT)), 10**9))
    finally:
        video.release()


def is_video(path):
    """Whether a file name ends like that of a video; the notes of a Mac on one are none."""
    return path.lower().endswith(VIDEOS) and not os.path.basename(path).startswith("._")


def find_files(words):
    """The files that a user names: files, folders with images and videos at any depth, or glob patterns.

    Returns:
        Their paths, each once; a dict of those that lead nowhere to the reason; and a Counter of what else is
        in the folders.
    """
    found, missing, ignored = {}, {}, collections.Counter()
    for word in words:
        matches = [word] if os.path.exists(word) else sorted(glob.glob(word, recursive=True))
        if not matches:
            missing[word] = f"{word}: no such file or folder, and no pattern that fits one"
        for path in matches:
            try:
                files = _files_below(path, ignored) if os.path.isdir(path) else [_file(path)]
            except DataError as error:
                missing[path] = str(error)
                continue
            for file in files:
                found.setdefault(os.path.realpath(file), file)
    return list(found.values()), missing, ignored


def _file(path):
    if not os.path.isfile(path):  # a pipe would wait forever
        raise DataError(f"{path} is not a file")
    return path


def _files_below(folder, ignored):
    whole = os.path.abspath(folder)
    files = find_images(*os.path.split(whole), ignored, wanted=lambda name: is_image(name) or is_video(name))
    return [os.path.join(folder, os.path.relpath(file, whole)) for file in files]
