"""DATA.DATASET: tars, WebDataset shards, Hugging Face's and torchvision's datasets, as good as folders."""

import io
import itertools
import os
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import digits_config, write_images
from PIL import Image

from data import DataError, build_loaders
from data.archives import open_dataset
from data.datasets import ImageFolder, build_dataset

ONE_CLASS = ["MODEL.NUM_CLASSES", 1]
RECIPE = ["AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "AUG.HFLIP", 0.5, "DATA.NUM_WORKERS", 0]


def add(tar, name, content):
    """Add a file to an open tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def add_folder(tar, folder, prefix=""):
    """Add all files below a folder to an open tar, in an order that is not theirs."""
    for path in sorted(folder.rglob("*.*"), reverse=True):
        add(tar, prefix + str(path.relative_to(folder)), path.read_bytes())


def write_tars(source, target):
    """An ImageFolder as train.tar and val.tar."""
    target.mkdir(exist_ok=True)
    for split in ("train", "val"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            add(tar, "README", b"images")
            add_folder(tar, source / split, "./")


def write_shards(source, target, split_names=("train", "validation"), per_shard=20):
    """An ImageFolder as WebDataset shards, and the names of its classes."""
    target.mkdir(exist_ok=True)
    for split, name in zip(("train", "val"), split_names):
        images = build_dataset(str(source), split, None)
        for shard in range(-(-len(images) // per_shard)):
            with tarfile.open(target / f"set-{name}-{shard:04d}.tar", "w") as tar:
                for number, (path, target_class) in list(enumerate(images.samples))[
                    shard * per_shard : (shard + 1) * per_shard
                ]:
                    add(tar, f"{number:06d}.cls", str(target_class).encode())
                    add(tar, f"{number:06d}.json", b"{}")
                    add(tar, f"{number:06d}.png", Path(path).read_bytes())
                    add(tar, f"{number:06d}.seg.png", b"a mask")
    (target / "classnames.txt").write_text("\n".join(images.classes) + "\n")


def import_datasets():
    """Hugging Face's package, which cannot hash a table of PyArrow 26 to make its fingerprint."""
    datasets = pytest.importorskip("datasets.arrow_dataset", exc_type=ImportError)
    datasets.generate_fingerprint = lambda dataset: "0"
    return __import__("datasets")


def write_saved(source, target, val="validation"):
    """An ImageFolder as Hugging Face's save_to_disk writes it."""
    datasets = import_datasets()
    splits = {}
    for split, name in (("train", "train"), ("val", val)):
        images = build_dataset(str(source), split, None)
        columns = dict(
            image=[dict(bytes=Path(path).read_bytes(), path=None) for path, _ in images.samples],
            label=images.targets,
        )
        features = dict(image=datasets.Image(), label=datasets.ClassLabel(names=images.classes))
        splits[name] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(splits).save_to_disk(str(target))


WRITERS = dict(tar=write_tars, wds=write_shards, hfds=write_saved)


def loaders(kind, root, *opts, **flags):
    opts = ["DATA.DATASET", kind, *RECIPE, *opts]
    return build_loaders(digits_config(*opts, data_path=str(root), **dict(dict(batch_size=8), **flags)))


@pytest.mark.parametrize("backend", ["pil", "opencv"])
@pytest.mark.parametrize("kind", WRITERS)
def test_batches_are_those_of_a_folder_of_the_same_images(data, tmp_path, kind, backend):
    WRITERS[kind](data, tmp_path / "set")
    ours, wanted = (
        loaders(name, root, "DATA.BACKEND", backend)
        for name, root in ((kind, tmp_path / "set"), ("imagenet", data))
    )
    assert ours[3] == wanted[3] == ["a", "b", "c"]
    for sampler in (ours[1], wanted[1]):
        sampler.start(1)
    for index, count in ((0, 9), (2, 2)):
        batches = list(zip(ours[index], wanted[index], strict=True))
        assert len(batches) == count
        for (images, targets), (other_images, other_targets) in batches:
            assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


@pytest.mark.parametrize("layout", ["one", "by class", "mixed"])
def test_tars_in_every_layout_have_the_images_and_classes_of_the_folder(tmp_path, layout):
    write_images(tmp_path / "images", 3, ("a", "b", "c-d"), size=8)
    train = tmp_path / "train"
    train.mkdir()
    if layout == "one":
        train = tmp_path / "train.tar"
        with tarfile.open(train, "w") as tar:
            add_folder(tar, tmp_path / "images", "deep/er/")
    elif layout == "mixed":
        for number, name in enumerate(("a", "b", "c-d")):
            with tarfile.open(train / f"{number}.tar", "w") as tar:
                add_folder(tar, tmp_path / "images" / name, f"{name}/")
    else:
        for name in ("a", "b", "c-d"):
            with tarfile.open(train / f"{name}.tar", "w") as tar:
                add_folder(tar, tmp_path / "images" / name)
    ours = open_dataset("tar", str(tmp_path), "train", lambda image: image.tobytes())
    folder = ImageFolder(str(tmp_path / "images"), lambda image: image.tobytes())
    assert ours.classes == ["a", "b", "c-d"] and [ours[i] for i in range(9)] == list(folder)


def test_classes_of_shards_are_numbers_without_a_list_of_names(data, tmp_path):
    write_shards(data, tmp_path / "set")
    os.remove(tmp_path / "set" / "classnames.txt")
    assert loaders("wds", tmp_path / "set")[3] == ["0", "1", "2"]


def write_mnist(root, labels=(3, 1, 4, 1, 5, 9, 2, 6), folder="MNIST"):
    """Files of MNIST with one image for each label; returns the images."""
    (root / folder / "raw").mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28), dtype=np.uint8)
    for name in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, *images.shape)
        (root / folder / "raw" / f"{name}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">II", 0x801, len(labels))
        (root / folder / "raw" / f"{name}-labels-idx1-ubyte").write_bytes(head + bytes(labels))
    return images


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_datasets_of_torchvision_are_read(tmp_path, name, folder):
    images = write_mnist(tmp_path, folder=folder)
    found = open_dataset(f"torch/{name}", str(tmp_path), "val", np.asarray)
    for index, label in enumerate((3, 1, 4, 1, 5, 9, 2, 6)):
        pixels, target = found[index]
        assert target == label and (pixels == images[index][..., None]).all()
    assert len(found.classes) == 10
    train, _, val, classes = loaders(f"torch/{name}", tmp_path, "DATA.BACKEND", "opencv", batch_size=4)
    assert next(iter(train))[0].shape == (4, 3, 32, 32) and classes == found.classes
    assert next(iter(val))[1].tolist() == [3, 1, 4, 1, 5, 9, 2, 6][:4]


def test_cifar_is_read(tmp_path, monkeypatch):
    import pickle

    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", dict(filename="batches.meta", key="label_names", md5=None))
    folder, pixels = tmp_path / CIFAR10.base_folder, np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32))
    folder.mkdir()
    content = dict(data=pixels.reshape(4, -1).astype(np.uint8), labels=[0, 1, 1, 0])
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=["cat", "dog"])))
    found = open_dataset("torch/cifar10", str(tmp_path), "train", np.asarray)
    assert found.classes == ["cat", "dog"] and found.targets.tolist() == [0, 1, 1, 0]
    assert all((found[i][0] == pixels[i].transpose(1, 2, 0)).all() for i in range(4))


def refusal(kind, root, *opts, **flags):
    with pytest.raises(DataError) as error:
        loaders(kind, root, *opts, **flags)
    return str(error.value)


def test_data_that_are_not_there_are_named(tmp_path):
    for kind in ("tar", "wds", "hfds", "torch/cifar10"):
        assert f"{tmp_path}/none is not a folder" in refusal(kind, tmp_path / "none")
    tar_of(tmp_path / "interval-train-0.tar")
    assert "holds no tars of val" in refusal("tar", tmp_path)
    assert "copy them first" in refusal("wds", "https://example.org/shards")
    words = refusal("torch/cifar10", tmp_path)
    assert "does not hold the files of torch/cifar10" in words and "CIFAR10(" in words
    assert "torch/mnist" in refusal("torch/mnist", tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "pip install datasets" in refusal("hfds", tmp_path)


def tar_of(path, **files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            add(tar, name, content)
    return path


def png(size=8):
    file = io.BytesIO()
    Image.effect_noise((size, size), 90).convert("RGB").save(file, "PNG")
    return file.getvalue()


def link(tar, name, target, kind=tarfile.SYMTYPE):
    """Add a link to an open tar."""
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


def found_in(dataset, root):
    """The images of a dataset: (path below its root, name of the class, pixels)."""
    entries = [(path, *dataset[i]) for i, path in enumerate(dataset.paths)]
    return [
        (os.path.relpath(path, root), dataset.classes[target], pixels) for path, pixels, target in entries
    ]


def test_a_tar_gives_exactly_what_its_unpacked_folder_gives(tmp_path):
    path = tmp_path / "val.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "cat/1.png", png())
        add(tar, "cat/1.txt", b"notes")
        add(tar, "./cat/2.PNG", png())
        add(tar, "cat/1.png", png())  # the last one counts
        add(tar, "/cat//3.jpg", png())
        add(tar, "cat/sub/../4.png", png())
        add(tar, "cat/._1.png", b"a note")
        add(tar, "._5.png", b"a note")
        add(tar, "cat/.shown.png", png())
        add(tar, "cat/.cache/1.png", png())
        add(tar, "cat/.cache/deeper/6.png", png())
        add(tar, ".git/7.png", png())
        add(tar, "outside.png", png())
        add(tar, "README", b"pictures")
        link(tar, "dog/.#lock", "me@here")
        link(tar, "dog/again.txt", "../cat/1.txt")
        link(tar, ".git/head", "nowhere")
        link(tar, "dog/4.png", "nowhere")
        add(tar, "dog/4.png", png())
        add(tar, "b\udcc2\udced/1.png", png())
        add(tar, "dog/zebra.png", png())
        add(tar, "dog/dog/0.png", png())  # after zebra.png: folders come before their names
    with tarfile.open(path) as tar:
        for member in tar:
            member.name = os.path.normpath(member.name.lstrip("/"))
            (tmp_path / "val" / member.name).unlink(missing_ok=True)  # as the tar of a shell does
            tar.extract(member, tmp_path / "val", filter="tar")
    pixels = lambda image: image.tobytes()  # noqa: E731
    folder, tar = (open_dataset(kind, str(tmp_path), "val", pixels) for kind in ("imagenet", "tar"))
    expected = found_in(folder, tmp_path / "val")
    assert found_in(tar, path) == expected and len(expected) == 9
    assert tar.source.ignored == {
        "members that a later one replaces": 2,
        "notes of a Mac (._*)": 2,
        "hidden folders": 2,
        "images outside the class folders": 1,
        ".txt": 2,
        "no ending": 3,
    }
    del tar.source.ignored["members that a later one replaces"]
    folder.ignored["no ending"] += 1  # a link in a hidden folder
    assert folder.ignored == tar.source.ignored


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.GNUTYPE_SPARSE])
@pytest.mark.parametrize("dataset", ["tar", "wds"])
def test_images_that_are_links_or_sparse_are_refused(tmp_path, dataset, kind):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        add(tar, "cat/1.png", png())
        add(tar, "cat/1.cls", b"0")
        link(tar, "dog/1.png", "cat/1.png", kind)
    words = refusal(dataset, tmp_path, eval=True)
    assert "val.tar has dog/1.png as a link or a sparse file: make the tar with --dereference" in words


def test_tars_in_a_tar_are_refused(tmp_path):
    tar_of(tmp_path / "val.tar", **{"a.tar": b""})
    assert "val.tar has the tar a.tar: unpack val.tar into a folder of tars" in refusal(
        "tar", tmp_path, eval=True
    )


def test_names_above_the_folder_and_notes_on_tars_are_as_tar_unpacks_them(tmp_path):
    tar_of(tmp_path / "val.tar", **{"../a/1.png": png(), "._b.tar": b"a note"})
    dataset = open_dataset("tar", str(tmp_path), "val", None)
    assert dataset.paths == [str(tmp_path / "val.tar/a/1.png")]
    assert dataset.source.ignored == {"notes of a Mac (._*)": 1}


def test_the_test_set_is_taken_only_where_there_is_no_other(tmp_path):
    for name in ("test", "val"):
        tar_of(tmp_path / f"{name}.tar", **{f"{name}/1.png": png()})
        assert open_dataset("tar", str(tmp_path), "val", None).classes == [name]


def test_a_tar_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tar_of(tmp_path / "val.tar", **{"a/1.png": png(), "b/1.png": png()})
    dataset = open_dataset("tar", str(tmp_path), "val", None)
    os.truncate(path, dataset.source.places[1, 1] + 9)
    with pytest.raises(DataError, match="val.tar ends before byte .*: it has changed since the start"):
        dataset[1]


def test_shards_leave_out_notes_of_a_mac_and_hidden_folders(tmp_path):
    (tmp_path / "val").mkdir()
    names = ("x/1", "x/._2", "._3", ".git/4")
    files = {f"{name}.{end}": png() if end == "JPG" else b"1" for name in names for end in ("JPG", "cls")}
    tar_of(tmp_path / "val" / "a.TAR", **files)
    tar_of(tmp_path / "val" / "._a.tar", **{"x/5.png": b"a note"})
    dataset = open_dataset("wds", str(tmp_path), "val", None)
    assert [os.path.basename(path) for path in dataset.paths] == ["1.JPG"]
    assert dataset.source.ignored == {"notes of a Mac (._*)": 4, ".jpg": 1, ".cls": 1}


def test_tars_that_cannot_be_used_are_named(tmp_path):
    path, words = tmp_path / "val.tar", f"{tmp_path}/val.tar cannot be read as an uncompressed tar"
    tar_of(path)
    assert "val.tar holds no images" in refusal("tar", tmp_path)
    assert "val.tar holds no images" in refusal("wds", tmp_path)
    tar_of(path, **{"1.png": png(), "2.png": png()})
    assert "val.tar has no class folders: images belong in <class>/<image>" in refusal("tar", tmp_path)
    tar_of(path, **{"a/1.png": png(64), "a/2.png": png(64)})
    whole = path.read_bytes()
    for content in (b"", b"no tar" * 200, whole[:3000], whole[:13000], b"\x1f\x8b" + whole):
        path.write_bytes(content)
        assert words in refusal("tar", tmp_path) and words in refusal("wds", tmp_path)


@pytest.mark.parametrize("kind", ["tar", "wds"])
def test_classes_that_differ_are_refused(tmp_path, kind):
    for split, names in (("train", "ab"), ("val", "ac")):
        of_tar = {f"{name}/{i}.png": png() for name, i in itertools.product(names, range(4))}
        of_wds = {f"{i}.{end}": png() if end == "png" else str(i % (2 + (split == "val"))).encode()
                  for i in range(8) for end in ("png", "cls")}  # fmt: skip
        tar_of(tmp_path / f"{split}.tar", **(of_tar if kind == "tar" else of_wds))
    words = refusal(kind, tmp_path)
    assert "have different classes" in words and ("b, c" if kind == "tar" else "has 2") in words


def test_shards_without_sound_labels_are_refused(tmp_path):
    path = tmp_path / "val.tar"
    for label in (b"cat", b"-1", b"1.5", b"", b"1" * 9, b"\xb2"):
        tar_of(path, **{"x/1.jpg": png(), "x/1.cls": label})
        assert "val.tar/x/1.cls holds" in refusal("wds", tmp_path)
    tar_of(path, **{"1.jpg": png()})
    assert "has no 1.cls" in refusal("wds", tmp_path)
    tar_of(path, **{"1.jpg": png(), "1.cls": b"2"})
    (tmp_path / "classnames.txt").write_text("a\nb\n")
    assert "1.jpg is of class 2, but there are 2 classes" in refusal("wds", tmp_path)
    (tmp_path / "classnames.txt").write_text("a\na\n")
    assert "a name twice" in refusal("wds", tmp_path)


def test_a_tar_that_leads_back_to_an_earlier_member_ends(tmp_path):
    path = tar_of(tmp_path / "val.tar", **{f"a/{i}.png": png() for i in range(3)})
    content = bytearray(path.read_bytes())
    second, third = content.index(b"a/1.png"), content.index(b"a/2.png")
    header = content[third : third + 512]
    header[124:136] = (second - third - 512).to_bytes(12, "big", signed=True)  # the size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[third : third + 512] = header
    path.write_bytes(content)
    assert "begins before the one that precedes it" in refusal("tar", tmp_path, eval=True)


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_limits_hold_for_images_in_archives(tmp_path, backend):
    tar_of(tmp_path / "val.tar", **{"a/1.png": png(64), "a/2.png": b"no image"})
    tar_of(tmp_path / "train.tar", **{f"a/{i}.png": png() for i in range(8)})
    opts = ["DATA.MAX_PIXELS", 2000, "DATA.BACKEND", backend, *ONE_CLASS]
    words = "it has 64x64 pixels, and DATA.MAX_PIXELS is 2000"
    with pytest.raises(DataError, match=f"val.tar/a/1.png cannot be read as an image: {words}"):
        list(loaders("tar", tmp_path, *opts)[2])
    with pytest.raises(DataError, match="val.tar/a/2.png cannot be read as an image"):
        list(loaders("tar", tmp_path, "DATA.BACKEND", backend, *ONE_CLASS)[2])


def test_saved_datasets_that_cannot_be_used_are_named(data, tmp_path):
    datasets = import_datasets()
    assert "holds no val that save_to_disk" in refusal("hfds", tmp_path)

    def save(features, **columns):
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        made.save_to_disk(str(tmp_path / "val"))
        return refusal("hfds", tmp_path, eval=True)

    picture, number = datasets.Image(), datasets.Value("int64")
    image = dict(bytes=png(), path=None)
    assert "one column of ClassLabel" in save(dict(image=picture, label=number), image=[image], label=[0])
    two = datasets.ClassLabel(names=["a", "b"])
    features = dict(image=picture, fine=two, coarse=two)
    assert "fine, coarse" in save(features, image=[image], fine=[0], coarse=[0])
    assert "image 0 is of class -1" in save(dict(image=picture, label=two), image=[image], label=[None])
    assert "cannot be read as" in save(dict(image=picture, label=two), image=[], label=[])
    os.truncate(next((tmp_path / "val").glob("*.arrow")), 100)
    assert "cannot be read as a Hugging Face dataset" in refusal("hfds", tmp_path, eval=True)


def test_what_was_found_is_said(data, tmp_path, caplog):
    write_shards(data, tmp_path / "set")
    with caplog.at_level("INFO"):
        loaders("wds", tmp_path / "set")[0].report()
    found = re.escape(
        f"{tmp_path}/set/set-train-0000.tar to set-train-0003.tar (4 tars): 72 images in 3 classes"
    )
    assert re.match(found + r"; ignored: (\.png 72, \.json 72|\.json 72, \.png 72)", caplog.messages[0])
