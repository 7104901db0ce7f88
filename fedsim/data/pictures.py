"""Picture data sets, in the files of their authors and in the layout in which torchvision keeps them.

Torchvision only downloads them. They are read here, because it takes none but those whose checksums it knows. Pixels
stay bytes in memory. A file that is damaged or unsafe is refused, and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from clients.errors import RequestError
from clients.recipe import Folder
from fedsim.data.downloads import Files, found, present
from fedsim.data.picture_files import check_labels, damaged, read_batch, read_idx, read_mat
from fedsim.data.source import Source


def mnist(*, root: Folder = "data", download: bool = False, classes: Sequence[int] | None = None) -> Source:
    """28x28 grey images of handwritten digits (LeCun et al. 1998): ``x`` uint8 ``[60000, 1, 28, 28]``, 10,000 to test.

    Args:
        root: the folder that holds ``MNIST/raw/train-images-idx3-ubyte`` and the other three, unpacked or ``.gz``.
        download: fetches what is missing there, through torchvision.
        classes: only examples of these, renumbered from 0 in this order.
    """
    files = _idx_files("MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist/")
    return _idx_source(files, range(10), root, download, classes)


def fashion_mnist(*, root: Folder = "data", download: bool = False, classes: Sequence[int] | None = None) -> Source:
    """28x28 grey images of clothes (Xiao et al. 2017): ``x`` uint8 ``[60000, 1, 28, 28]``, 10,000 to test.

    Args:
        root: the folder that holds ``FashionMNIST/raw/train-images-idx3-ubyte`` and the other three, unpacked or
            ``.gz``.
        download: fetches what is missing there, through torchvision.
        classes: only examples of these, renumbered from 0 in this order.
    """
    files = _idx_files("FashionMNIST", "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/")
    return _idx_source(files, range(10), root, download, classes)


#: The labels in EMNIST's files, by split.
_EMNIST_LABELS = {
    "byclass": range(62),
    "bymerge": range(47),
    "balanced": range(47),
    "letters": range(1, 27),
    "digits": range(10),
    "mnist": range(10),
}


def emnist(
    *,
    split: Literal["byclass", "bymerge", "balanced", "letters", "digits", "mnist"] = "balanced",
    root: Folder = "data",
    download: bool = False,
    classes: Sequence[int] | None = None,
) -> Source:
    """28x28 grey images of handwritten letters and digits (Cohen et al. 2017), upright: ``x`` uint8 ``[N, 1, 28, 28]``.

    The files hold every image with rows and columns exchanged; here they are exchanged back. The labels of ``letters``
    begin at 1 in its files and at 0 here, so that ``a`` is class 0.

    Args:
        split: 814,255 examples ``byclass`` (62 classes) and ``bymerge`` (47), 131,600 ``balanced`` (47), 145,600
            ``letters`` (26), 280,000 ``digits`` and 70,000 ``mnist`` (10), those to test included.
        root: the folder that holds ``EMNIST/raw/emnist-SPLIT-train-images-idx3-ubyte`` and the other three, unpacked
            or ``.gz``.
        download: fetches what is missing there (all splits, 0.5 GB), through torchvision.
        classes: only examples of these, renumbered from 0 in this order.
    """
    labels = _EMNIST_LABELS.get(split)
    if labels is None:
        raise RequestError(f"data.source.split: {split!r} is not one of {', '.join(_EMNIST_LABELS)}")
    files = _idx_files(
        "EMNIST",
        "https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",
        names=(f"emnist-{split}-train", f"emnist-{split}-test"),
        archive="EMNIST/raw/gzip.zip",
        calls=({"split": split},),
    )
    return _idx_source(files, labels, root, download, classes, transposed=True)


def cifar10(*, root: Folder = "data", download: bool = False, classes: Sequence[int] | None = None) -> Source:
    """32x32 colour images of 10 things (Krizhevsky 2009): ``x`` uint8 ``[50000, 3, 32, 32]``, 10,000 to test.

    Args:
        root: the folder that holds ``cifar-10-batches-py/data_batch_1`` and the other five (the Python version).
        download: fetches what is missing there, through torchvision.
        classes: only examples of these, renumbered from 0 in this order.
    """
    files = Files(
        torchvision="CIFAR10",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        archive="cifar-10-python.tar.gz",
        address="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    )
    return _cifar_source(files, "labels", 10, root, download, classes)


def cifar100(
    *,
    labels: Literal["fine", "coarse"] = "fine",
    root: Folder = "data",
    download: bool = False,
    classes: Sequence[int] | None = None,
) -> Source:
    """32x32 colour images of 100 things (Krizhevsky 2009): ``x`` uint8 ``[50000, 3, 32, 32]``, 10,000 to test.

    Args:
        labels: the 100 classes, or the 20 superclasses that hold five of them each.
        root: the folder that holds ``cifar-100-python/train`` and ``test`` (the Python version).
        download: fetches what is missing there, through torchvision.
        classes: only examples of these, renumbered from 0 in this order.
    """
    counts = {"fine": 100, "coarse": 20}
    if labels not in counts:
        raise RequestError(f"data.source.labels: {labels!r} is not one of {', '.join(counts)}")
    files = Files(
        torchvision="CIFAR100",
        folder="cifar-100-python",
        train=("train",),
        test=("test",),
        archive="cifar-100-python.tar.gz",
        address="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    )
    return _cifar_source(files, f"{labels}_labels", counts[labels], root, download, classes)


def svhn(
    *,
    extra: bool = False,
    root: Folder = "data",
    download: bool = False,
    classes: Sequence[int] | None = None,
) -> Source:
    """32x32 colour images of house numbers (Netzer et al. 2011): ``x`` uint8 ``[73257, 3, 32, 32]``, 26,032 to test.

    ``y`` is the digit in the middle. The files say 10 for the digit 0; here it is class 0.

    Args:
        extra: trains on the 531,131 easier examples too.
        root: the folder that holds ``train_32x32.mat``, ``test_32x32.mat`` and, for ``extra``, ``extra_32x32.mat``.
        download: fetches what is missing there, through torchvision.
        classes: only examples of these, renumbered from 0 in this order.
    """
    splits = ("train", "extra") if extra else ("train",)
    files = Files(
        torchvision="SVHN",
        folder="",
        train=tuple(f"{split}_32x32.mat" for split in splits),
        test=("test_32x32.mat",),
        address="http://ufldl.stanford.edu/housenumbers/",
        calls=tuple({"split": split} for split in (*splits, "test")),
    )
    _check_classes(classes, 10)
    folder = found(files, root, download)

    def split(names: Sequence[str]) -> dict[str, np.ndarray]:
        return only_classes(_joined([read_mat(folder / name) for name in names]), classes, 10)

    return Source(train=split(files.train), test=split(files.test), input_range=(0.0, 1.0))


def only_classes(split: Mapping[str, np.ndarray], classes: Sequence[int] | None, count: int) -> dict[str, np.ndarray]:
    """The examples of some classes alone, renumbered from 0 in the order given.

    Args:
        split: ``y`` ``int64 [N]`` in ``range(count)``, and columns ``[N, ...]`` beside it.
        classes: which; None for all, as they are.
        count: how many there are.

    Raises:
        RequestError: for no class, one that there is not or that is named twice, or one without an example.
    """
    _check_classes(classes, count)
    if classes is None:
        return dict(split)
    renumbered = np.full(count, -1, dtype=np.int64)
    renumbered[list(classes)] = np.arange(len(classes))
    y = renumbered[split["y"]]
    kept = y >= 0
    if not kept.any():
        raise RequestError(f"data.source.classes: there is no example of {', '.join(map(str, classes))}")
    return {name: (y if name == "y" else column)[kept] for name, column in split.items()}


def _check_classes(classes: Sequence[int] | None, count: int) -> None:
    if classes is None:
        return
    named = list(classes)
    lines = [] if named else ["data.source.classes: no class; name at least one, or leave it out for all"]
    for place, one in enumerate(named):
        if isinstance(one, bool) or one not in range(count):
            lines.append(f"data.source.classes[{place}]: there is no class {one!r}; they are 0 to {count - 1}")
        elif one in named[:place]:
            lines.append(f"data.source.classes[{place}]: {one} is named twice; name each class once")
    if lines:
        raise RequestError(lines)


def _idx_files(torchvision: str, address: str, names: tuple[str, str] = ("train", "t10k"), **more: Any) -> Files:
    train, test = ((f"{name}-images-idx3-ubyte", f"{name}-labels-idx1-ubyte") for name in names)
    return Files(torchvision, f"{torchvision}/raw", train, test, address, packed=True, **more)


def _idx_source(
    files: Files,
    labels: range,
    root: str,
    download: bool,
    classes: Sequence[int] | None,
    transposed: bool = False,
) -> Source:
    _check_classes(classes, len(labels))
    folder = found(files, root, download)

    def split(names: Sequence[str]) -> dict[str, np.ndarray]:
        images, classes_of = (present(folder / name, packed=True) or folder / name for name in names)
        x, y = read_idx(images, "images", 3), read_idx(classes_of, "labels", 1).astype(np.int64)
        if x.shape[1:] != (28, 28):
            raise damaged(images, f"holds images of {x.shape[1]}x{x.shape[2]}; they are 28x28")
        if len(x) != len(y):
            raise damaged(classes_of, f"holds {len(y)} labels, and {images.name} {len(x)} images")
        check_labels(y, labels, classes_of)
        if transposed:
            x = np.ascontiguousarray(x.swapaxes(1, 2))
        return only_classes({"x": x[:, None], "y": y - labels[0]}, classes, len(labels))

    return Source(train=split(files.train), test=split(files.test), input_range=(0.0, 1.0))


def _cifar_source(
    files: Files,
    key: str,
    count: int,
    root: str,
    download: bool,
    classes: Sequence[int] | None,
) -> Source:
    _check_classes(classes, count)
    folder = found(files, root, download)

    def split(names: Sequence[str]) -> dict[str, np.ndarray]:
        return only_classes(_joined([read_batch(folder / name, key, count) for name in names]), classes, count)

    return Source(train=split(files.train), test=split(files.test), input_range=(0.0, 1.0))


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in ("x", "y")}
