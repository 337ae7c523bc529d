"""Finds the images and the class names in a folder; decodes, augments and batches them.

    found = load("./oxford_pets")                  # or load("./photos", classes="cat,dog")
    views = test, weak, strong = transforms(224)
    keep_decoded(found, views, gb=4)               # decode each file once
    for x_weak, x_strong, index in loader(found.train.view(weak, strong), 64, shuffle=True):

Layouts, tried in this order (`python data.py PATH` prints which one it took, and shows images):
1. `demo`, `demo:STYLE`      drawn on the fly (clip/shapes.py)
2. a data set of `SETS`      CoOp's split file if it is there, else the data set's own lists. If
                             PATH/oxford_pets is not there, PATH/oxford-iiit-pet (its other name)
                             is taken, or torchvision downloads it
3. `train/` + `test|val/`    each with a folder per class (labelled) or with images (unlabelled)
4. a folder per class        a fifth of the images is the test set: those whose path has a SHA-256
                             divisible by 5, so the split is the same for every seed and machine
5. images and `--classes`    unlabelled: all of them are the training set and the test set; those
                             in sub-folders too, if no sub-folder is called like a class
If none fits but exactly one sub-folder (or one in it) does, that one is taken. The `val` part
of a split file is not used.

Order of this file: images; transforms and batches; layouts, with the table of data sets; `load`;
LLM-written prompts; candidate labels and few-shot subsets; settings, scores and the run folder,
which are the same in every script.

Label firewall: `Images.view(...)`, which training reads, holds no labels. `Images.y_true` is for
accuracy and diagnostics only.
"""
from __future__ import annotations

import argparse
import bisect
import copy
import csv
import difflib
import errno
import hashlib
import io
import json
import math
import mmap
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import stat
import struct
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import unicodedata
import warnings
import weakref
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

import clip
from clip import shapes
from clip.clip import MEAN, STD, Unpickler

TEMPLATE = "a photo of a {}."
ENSEMBLE = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
            "a {} in a video game.", "art of the {}.", "a photo of the small {}.")  # CLIP's best 7
CHECKED = 200_000               # with more images than that, none is opened before it is needed
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")    # judged by content, not by name


class DataError(ValueError):
    """A mistake in the user's data or arguments; its message says what was expected and where."""
    def __init__(self, text):
        text = re.sub(r"(?s)\s+\Z|Caught DataError in DataLoader.*\n[\w.]*DataError: ", "", text)
        said, *tree = text.split("Expected one of\n", 1)        # a tree of folders has lines
        super().__init__("Expected one of\n".join([printable(said), *tree]))


# ---- images ----

PIXELS = Image.MAX_IMAGE_PIXELS         # 89 million; an image of more is refused: 360 MB decoded
LARGEST = 2**30                         # bytes of a file that is read here
SCANS = 100                             # of a progressive JPEG: each goes over all of its pixels
ONE = threading.Lock()                  # of the threads decodes a large image


def opened(path):
    """The file, open for reading. OSError unless it is a plain one, of 1 GB at most: a pipe or a
    device may keep one waiting for ever."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "is not a plain file", str(path))
    if info.st_size > LARGEST:
        raise OSError(errno.EFBIG, "is larger than 1 GB", str(path))
    return open(path, "rb")


def decode(path, draft=False):
    """The image as PIL RGB, EXIF orientation not applied (CLIP's preprocess does not either).
    draft: decodes, a JPEG at 1/8 of its size, only to see that it can be done; (width, height)."""
    with opened(path) as file, Image.open(file, formats=FORMATS) as im:
        w, h = im.size
        if w * h > PIXELS:
            raise ValueError(f"{w} x {h} pixels are more than {PIXELS // 10**6} million")
        if max(w, h) > 100 * min(w, h):                 # 224 pixels high it would fill the memory
            raise ValueError(f"{w} x {h} pixels are too narrow a strip")
        if w * h > 2**22 and im.tile and im.tile[0][0].startswith("ppm"):   # decoded in Python
            raise ValueError(f"a PPM of text or of an odd range with {w} x {h} pixels")
        if im.info.get("progressive"):
            file.seek(0)
            if (scans := file.read().count(b"\xff\xda")) > SCANS:
                raise ValueError(f"a JPEG of {scans} scans")
        if draft:
            im.draft("RGB", (1, 1))
        with ONE if w * h > 2**24 else nullcontext():
            if isinstance(im.info.get("transparency"), bytes):
                im = im.convert("RGBA")                 # same colours, without Pillow's warning
            rgb = im.convert("RGB")
    return (w, h) if draft else rgb


class Images(Dataset):
    """N images and, if they are known, their true classes.

    y_true: (N,) int64 or None; for accuracy and diagnostics only.
    Source: the files `root/files[i]`, of (width, height) `sizes[i]`; or the PIL images `pictures`.
    sizes is None if the files were not checked; then an unreadable one is grey, with a warning.
    inside: the sub-folder that `root` is of what the user named, "" or with a slash at its end.
    """
    def __init__(self, files, y_true=None, root=None, inside="", pictures=None, sizes=None):
        self.files, self.root, self.inside = files, root, inside
        self.pictures, self.sizes, self.kept = pictures, sizes, None        # see `keep_decoded`
        self.warned = torch.zeros(0 if sizes or pictures else len(files), dtype=torch.bool)
        self.warned.share_memory_()                     # by the loader's processes
        self.y_true = None if y_true is None else torch.as_tensor(y_true, dtype=torch.long)   # (N,)
        if self.y_true is not None and self.y_true.shape != (len(self),):
            raise ValueError(f"{len(self)} images but labels {tuple(self.y_true.shape)}")

    @cached_property
    def names(self):
        """N relative paths, for people and files."""
        return [_text(self.inside + file) for file in self.files]

    def __len__(self):
        return len(self.files)

    def image(self, i):
        """Image i as PIL RGB. DataError if the file can no longer be read."""
        if self.pictures is not None:
            return self.pictures[i].convert("RGB")
        try:
            return decode(os.path.join(self.root, self.files[i]))
        except Exception as e:                          # Pillow's plugins raise nearly anything
            if self.sizes is None:
                bad = int(self.warned.sum())            # so far
                if not self.warned[i] and bad < 5:
                    more = "; the next ones are not named" if bad == 4 else ""
                    said = printable(f"grey instead of {self.names[i]}: {_reason(e)}{more}")
                    print(f"warning: {said}", file=sys.stderr)
                self.warned[i] = True
                if 2 * bad > len(self):
                    raise DataError(f"more than half of {len(self)} images cannot be read, the "
                                    f"last {self.names[i]}: {_reason(e)}") from None
                return Image.new("RGB", (256, 256), "grey")
            raise DataError(f"cannot read {self.names[i]} any more: {_reason(e)}") from None

    __getitem__ = image

    def pixels(self, i, kinds):
        """{prepare: prepare(image i)} for `prepare` in kinds, (H, W, 3) uint8 each."""
        if self.kept is not None and set(kinds) <= set(self.kept.kinds):
            return self.kept.pixels(i, partial(self.image, i))
        image = self.image(i)
        return {prepare: prepare(image) for prepare in set(kinds)}

    def subset(self, indices):
        """The images `indices`, in that order."""
        indices = [int(i) for i in indices]

        def pick(x):
            return None if x is None else [x[i] for i in indices]
        y = None if self.y_true is None else self.y_true[indices]
        return Images(pick(self.files), y, self.root, self.inside, pick(self.pictures),
                      pick(self.sizes))

    def view(self, *transforms):
        """Dataset whose item i is (t1(image), t2(image), ..., i): one decoding, and no label."""
        return View(self, transforms)


class View(Dataset):
    """See `Images.view`. Item (i, seed), as `Order` asks for it, is item i with the random numbers
    of its transforms drawn from `seed`; torch's global random state is left as it was."""
    def __init__(self, images, transforms):
        self.images, self.transforms = copy.copy(images), transforms
        self.images.y_true = None                       # the label firewall

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        rng, state = torch.default_generator, None      # torch.manual_seed takes 50x longer
        if isinstance(item, tuple):
            item, seed = item
            state = rng.get_state()
            rng.manual_seed(seed)
        pixels = self.images.pixels(item, [t.prepare for t in self.transforms])
        views = (*(t(pixels[t.prepare]) for t in self.transforms), item)
        if state is not None:
            rng.set_state(state)
        return views


@dataclass
class Data:
    """What `load` found. description is one line: layout, classes, split, counts, template."""
    train: Images
    test: Images
    class_names: list           # C strings, as they go into the prompt
    templates: list             # prompts with one {} for the class name
    description: str
    title: str | None           # of a known public data set


# ---- transforms and batches ----
# A transform has two halves: `prepare` turns the decoded image into uint8 pixels, always the same
# for an image, so that they can be kept; calling the transform does the random rest.

def to_pixels(image):
    """PIL image -> (H, W, 3) uint8."""
    image = image.convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(
        image.height, image.width, 3)


class Square(NamedTuple):
    """CLIP's own preprocess up to the pixels: short side to `size`, bicubic, central square."""
    size: int

    def shape(self, w, h):
        return self.size, self.size

    def __call__(self, image):
        image = T.functional.resize(image, self.size, T.InterpolationMode.BICUBIC)
        return to_pixels(T.functional.center_crop(image, self.size))


def resize(x, shape):
    """(H, W, 3) uint8 -> (*shape, 3) uint8; bicubic."""
    x = x.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)  # (1, 3, H, W)
    return F.interpolate(x, shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0)


class Short(NamedTuple):
    """The short side reduced to `size` where it is longer: what random crops are taken from."""
    size: int

    def shape(self, w, h):
        r = min(1, self.size / min(w, h))
        return max(1, round(h * r)), max(1, round(w * r))

    def __call__(self, image):
        x, shape = to_pixels(image), self.shape(*image.size)
        return x if shape == x.shape[:2] else resize(x, shape)


class Plain(NamedTuple):
    """CLIP's preprocess. Transforms take (H, W, 3) and give (R, R, 3), both uint8."""
    prepare: Square

    def __call__(self, x):
        return x


class Augment(NamedTuple):
    """A random crop with an area in `area` of the picture, flipped in half the cases; then
    torchvision's RandAugment, if asked for."""
    prepare: Short
    size: int
    area: tuple
    randaugment: bool = False

    def __call__(self, x):
        top, left, h, w = T.RandomResizedCrop.get_params(x.permute(2, 0, 1), self.area,
                                                         (3 / 4, 4 / 3))
        x = resize(x[top:top + h, left:left + w], (self.size, self.size))      # (R, R, 3)
        if torch.rand(()) < 0.5:
            x = x.flip(1)
        if self.randaugment:
            x = to_pixels(T.RandAugment(num_ops=2, magnitude=9)(Image.fromarray(x.numpy())))
        return x


def transforms(size):
    """(test, weak, strong) for images of size x size pixels; see `Plain` and `Augment`."""
    short = Short(round(size * 256 / 224))
    return (Plain(Square(size)), Augment(short, size, (0.6, 1.0)),
            Augment(short, size, (0.4, 1.0), randaugment=True))


@cache
def mean_std(R, device):
    """CLIP's, for a row of R pixels; kept, as a copy to a GPU waits for all that it has to do."""
    return [torch.tensor(v, device=device).repeat(R) for v in (MEAN, STD)]


def normalize(x, out=None):
    """uint8 pixels (B, R, R, 3) -> CLIP's floats (B, 3, R, R), bit for bit those of its preprocess;
    channels last in memory, as GPUs like it. out: where to put them, (B, R, R, 3)."""
    out = torch.empty(x.shape, device=x.device) if out is None else out
    row = x.shape[2] * 3                                                        # R R G B ... values
    mean, std = mean_std(x.shape[2], x.device)                                  # (row,) each
    few = 2**15 // row if x.device.type == "cpu" else len(x) * x.shape[1]       # stay in the cache
    for part, into in zip(x.view(-1, row).split(few), out.view(-1, row).split(few)):
        torch.div(part, 255, out=into).sub_(mean).div_(std)
    return out.permute(0, 3, 1, 2)


class Kept:
    """Pixels of N images, (H, W, 3) uint8 for each kind of `prepare`, in memory (or a temporary
    file) that the loader's processes share and fill as images are first asked for."""
    def __init__(self, sizes, kinds):
        self.kinds, self.done = kinds, mmap.mmap(-1, len(sizes))                # done: a byte each
        self.shape = {f: [f.shape(w, h) for w, h in sizes] for f in kinds}
        ends = torch.tensor([3 * h * w for f in kinds for h, w in self.shape[f]]).cumsum(0)
        self.end, self.bytes = dict(zip(kinds, ends.view(len(kinds), -1))), int(ends[-1])

    def allocate(self, file=None):
        """Takes the memory, or the space in an open file. OSError if there is none."""
        if file is not None:
            file.truncate(self.bytes)
            if hasattr(os, "posix_fallocate"):          # else a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, self.bytes)
        memory = mmap.mmap(-1 if file is None else file.fileno(), self.bytes)
        self.memory = torch.frombuffer(memory, dtype=torch.uint8)

    def __reduce__(self):
        return type(None), ()                           # a spawned process gets none of it

    def pixels(self, i, decoded):
        """{prepare: (H, W, 3) uint8} of image i; decoded() is called the first time only."""
        views = {}
        for f in self.kinds:
            (h, w), end = self.shape[f][i], int(self.end[f][i])
            views[f] = self.memory[end - 3 * h * w:end].view(h, w, 3)
        if not self.done[i]:
            image = decoded()
            for f, view in views.items():
                view.copy_(f(image))
            self.done[i] = 1
        return views


def keep_decoded(found, transforms, gb):
    """From now on each file of `found` is decoded once, and its pixels are kept: in memory up to
    `gb` GB, for all processes of this machine together; if they need more, in a temporary file of
    at most half of the free disk space; else they are decoded each time, with the same results.
    Returns a line that says which. Call it before `view`.

    Spawned loader processes (macOS, Windows) cannot share what is kept and decode anew.
    """
    if found.train.pictures is not None:
        return "the images are in memory"
    kinds = list(dict.fromkeys(t.prepare for t in transforms))
    sets = [(found.train, kinds)] + [(found.test, kinds[:1])] * (found.test is not found.train)
    if gb <= 0 or not all(images.sizes for images, _ in sets):
        return "images are decoded anew each time" + (" (too many to keep)" if gb > 0 else "")
    kept, gb = [Kept(images.sizes, some) for images, some in sets], gb / local_world()
    need, folder = sum(k.bytes for k in kept) / 2**30, tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / 2**30
    try:
        if gb < need > free / 2 / local_world():
            raise OSError
        for k in kept:
            k.allocate(None if need <= gb else tempfile.TemporaryFile())
    except OSError:
        return (f"images are decoded anew each time: to keep them takes {need:.1f} GB; --cache "
                f"allows {gb:g}, and {folder} has {free:.1f} free")
    for (images, _), k in zip(sets, kept):
        images.kept = k
    where = "memory" if need <= gb else f"a temporary file in {folder}"
    return f"decoded images are kept: {need:.1f} GB in {where}"


class Order(Sampler):
    """The batches of each epoch and a seed for each item, both from (seed, epoch) alone: the same
    for any number of workers. `epoch` is the one to come, each pass adds one; `skip`: how many of
    its batches the next pass leaves out.

    Several processes: each takes its share of every batch if the order is shuffled (training), and
    else its share of the images (a table that all then sum up, see `total`)."""
    def __init__(self, indices, batch_size, shuffle=False, seed=0, epoch=0, drop_last=False):
        self.indices, self.shuffle, self.seed, self.epoch = list(indices), shuffle, seed, epoch
        self.size, self.skip = batch_size if shuffle else max(1, batch_size // world()), 0
        n = len(self.indices) if shuffle else len(share(self.indices))
        self.used, self.whole = n, []
        if drop_last:
            self.used -= n % (self.size if n >= self.size else world())
        if drop_last and not self.used:
            raise DataError(f"{n} training images are too few for {world()} processes")

    def __len__(self):
        return -(-self.used // self.size)

    def batches(self):
        """The batches of the next pass, those of all processes: lists of (index, seed)."""
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        n, first = len(self.indices), self.skip * self.size
        self.epoch, self.skip = self.epoch + 1, 0
        seeds = torch.randint(2**62, (n,), generator=g).tolist()
        order = torch.randperm(n, generator=g).tolist() if self.shuffle else share(range(n))
        items = [(self.indices[k], seeds[k]) for k in order[:self.used]]
        self.whole = [items[k:k + self.size] for k in range(first, len(items), self.size)]
        return self.whole

    def __iter__(self):                                 # DataLoader may ask twice, `Batches` begins
        return iter([share(b) if self.shuffle else b for b in self.whole])


class Batches:
    """What `loader` returns: batches (x1, x2, ..., index), the x normalised floats (B, 3, R, R) on
    the device. What crosses from the loader's processes and to the device is uint8. Several
    processes, shuffled: x is this one's share, (B / processes, 3, R, R), the index that of all."""
    waited = 0.0                                        # seconds, for all loaders together

    def __init__(self, batches, device):
        self.batches, self.sampler = batches, batches.batch_sampler
        self.device = torch.device(device)
        self.memory = []                                # [(of a former batch, who holds it)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        start, wholes = time.time(), self.sampler.batches()
        batches = iter(self.batches)
        for whole in wholes:
            *views, _ = next(batches)
            Batches.waited += time.time() - start
            yield (*(normalize(x.to(self.device, non_blocking=True), self.room(x)) for x in views),
                   torch.tensor([i for i, _ in whole]))                         # (B,)
            start = time.time()

    def room(self, x):
        """Where the floats go. On a CPU new memory costs more time than the arithmetic (7.6 instead
        of 2.6 ms, 64 x 224 x 224 pixels), so a former batch's is used once no tensor holds it."""
        if self.device.type != "cpu":
            return None
        free = [m for m, holder in self.memory if holder() is None and len(m) >= 4 * x.numel()]
        memory = free[0] if free else bytearray(4 * x.numel())
        view = memoryview(memory)                       # lives as long as a tensor in it does
        others = [pair for pair in self.memory if pair[0] is not memory]
        self.memory = [(memory, weakref.ref(view)), *others[:7]]
        return torch.frombuffer(view, dtype=torch.float32, count=x.numel()).view(x.shape)


def loader(dataset, batch_size, shuffle=False, seed=0, workers=0, device="cpu", drop_last=False,
           subset=None, epoch=0):
    """`Batches` of a view, or of the images `subset` of it (indices, repeats allowed).

    Order and augmentations follow from (seed, epoch), see `Order`: give `epoch` where a run resumes
    or a new subset begins. drop_last drops nothing where that would leave no batch.
    """
    indices = range(len(dataset)) if subset is None else [int(i) for i in subset]
    order = Order(indices, batch_size, shuffle, seed, epoch, drop_last)
    batches = DataLoader(dataset, batch_sampler=order, num_workers=workers,
                         pin_memory=torch.device(device).type == "cuda",
                         persistent_workers=shuffle and workers > 0, worker_init_fn=worker,
                         generator=torch.Generator().manual_seed(0))    # not the global one
    return Batches(batches, device)


def worker(_):
    """A loader process leaves Ctrl-C, which reaches them all, to the one that it works for, and to
    SIGTERM it gives ten seconds to finish its step."""
    signal.set_wakeup_fd(-1)                            # inherited, see `end_at_once`
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))


def pick_workers(workers, images):
    """--workers, or without it: one process per two cores, 4 at most; none for images in memory or
    where processes do not share what `keep_decoded` keeps."""
    if workers is not None:
        return workers
    forked = multiprocessing.get_start_method() == "fork"
    each = (os.cpu_count() or 1) // local_world()
    return min(8, each) // 2 if forked and images.root else 0


# ---- layouts ----

class Rows(NamedTuple):
    """Images and their classes: two lists, which take half the memory of a list of pairs."""
    files: list                 # paths relative to the folder
    labels: list | None         # None: not known

    @classmethod
    def of(cls, pairs):
        return cls([file for file, _ in pairs], [label for _, label in pairs])


class Found(NamedTuple):
    """What the reader of a layout returns. class_names None: only --classes can tell. pictures: for
    images that are not files."""
    layout: str
    train: Rows
    test: Rows
    class_names: list | None
    pictures: tuple | None = None


class Known(NamedTuple):
    """A public data set, as it lies on people's disks."""
    title: str | None
    folders: tuple              # its folder is called so by CoOp, by torchvision, by others
    template: str = TEMPLATE    # CoOp's hand-crafted prompt
    split: str = ""             # CoOp's split file
    images: str = ""            # the folder that the split's paths are relative to
    own: tuple = ()             # its own files, and folders with a slash, all needed; a|b: either
    read: Callable | None = None        # (root, ignored, itself) -> Found, without CoOp's split
    torchvision: str = ""       # the class that downloads it
    rename: dict = {}           # class folder -> class name; None: not a class
    test_only: bool = False


def listed(root, ignored, known, files, line, row, order=None, note=""):
    """Official lists of images. files: train, test. line: (regular expression, an example);
    row(*groups) = (path, class, class name). The classes are sorted, or in the order of a file:
    order = (file, line), whose first group in lower case is the class."""
    parts = [[row(*groups) for groups in read_lines(root / file, *line)] for file in files]
    name = {}
    for file, (path, key, c) in [(f, r) for f, rows in zip(files, parts) for r in rows]:
        if name.setdefault(key, c) != c:
            raise DataError(f"{file}: {path}: class {key} is {c} here, but {name[key]} before")
    keys = ([k.lower() for k, in read_lines(root / order[0], *order[1])] if order
            else sorted(name))
    label = {key: k for k, key in enumerate(keys)}
    lost = [f"{c} of {file}" for file, rows in zip(files, parts) for _, c, _ in rows
            if c not in label]
    if lost:
        raise DataError(f"{order[0]} lacks the class {lost[0]}")
    train, test = (Rows.of([(path, label[key]) for path, key, _ in rows]) for rows in parts)
    return Found(f"official split of {' and '.join(files)}{note}", train, test,
                 [name.get(key, key) for key in keys])


def read_lines(path, pattern, example):
    """The groups of `pattern` in each line of a text file that is neither empty nor a # comment."""
    with opened(path) as file:
        lines = file.read().decode("utf-8-sig", "replace").splitlines()
    for k, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(pattern, line.strip())
            if not match:
                raise DataError(f"{path.parent.name}/{path.name} line {k}: expected `{example}`, "
                                f"got `{line[:40]}`")
            yield match.groups()


def read_text(path):
    """DataError unless it is a file of UTF-8 text; a byte order mark is dropped."""
    try:
        with opened(path) as file:
            raw = file.read()
        text = raw.decode("utf-8-sig")
        at = raw.find(b"\0")
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        at = e.start
    if at >= 0:
        raise DataError(f"{path}: expected UTF-8 text, line {raw[:at].count(10) + 1} is not")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path):
    """DataError with line and column unless it is JSON in which no key is given twice."""
    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
            raise ValueError(f"key {twice[0]!r:.60} is given twice")
        return found
    text = re.sub(r"\A\s*```\w*\n|\n```\s*\Z", "", read_text(path))     # an LLM's code fence
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as e:
        raise DataError(f"{os.path.basename(path)} is not valid JSON: {e}, at "
                        f"`{' '.join(text[max(0, e.pos - 20):e.pos + 20].split())}`") from None
    except RecursionError:
        raise DataError(f"{os.path.basename(path)} is not valid JSON: nested too deeply") from None
    except ValueError as e:
        raise DataError(f"{os.path.basename(path)}: {e}") from None


# Flowers102 and Stanford Cars come with .mat files, which otherwise only scipy reads.
MAT_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
MAT_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}


def read_mat(path):
    """{variable: value} of a MATLAB file (version 5 to 7, little-endian): numeric arrays as flat
    lists, char as str, cells as lists, structs as lists of dicts. DataError for anything else."""
    with opened(path) as file:
        raw, room, found = memoryview(file.read()), 64 << 20, {}
    try:
        if raw[124:128] != b"\0\1IM":
            raise ValueError("expected version 5 to 7, little-endian (save with -v7)")
        for kind, body in mat_elements(raw, 128):
            if kind == 15:                              # compressed
                unzip = zlib.decompressobj()
                body = memoryview(unzip.decompress(body, room))
                room -= len(body)
                if not (unzip.eof and room > 0):
                    raise ValueError("more than 64 MB, or cut off")
                kind, body = next(mat_elements(body))
            name, value = mat_array(kind, body)
            found[name] = value
    except StopIteration:
        raise DataError(f"{path.name}: not a readable .mat file: it ends too early") from None
    except (ValueError, LookupError, RecursionError, struct.error, zlib.error) as e:
        raise DataError(f"{path.name}: not a readable .mat file: {_reason(e)}") from None
    return found


def mat_elements(raw, at=0):
    """(type, contents) of one element after the other."""
    while at < len(raw):
        kind, n = struct.unpack_from("<II", raw, at)
        start = at + 8
        if kind >> 16:                                  # small: 4 bytes of tag, up to 4 of data
            kind, n, start = kind & 0xFFFF, min(4, kind >> 16), at + 4
        if start + n > len(raw):
            raise ValueError(f"expected {n} more bytes, got {len(raw) - start}")
        yield kind, raw[start:start + n]
        at = start + n + (0 if kind == 15 else (at - start - n) % 8)    # padded to 8 bytes


def mat_array(kind, raw):
    """(name, value) of an array element; StopIteration if a part of it is missing."""
    if kind != 14:
        raise ValueError(f"expected an array (type 14), got type {kind}")
    if not raw:                                         # how an empty cell is written
        return "", []
    parts = mat_elements(raw)
    (_, flags), (_, dims), (_, name) = next(parts), next(parts), next(parts)
    kind, n = flags[0], math.prod(struct.unpack(f"<{len(dims) // 4}I", dims[:128]))
    if n > len(raw) or kind not in (1, 2, 4, *range(6, 16)) or flags[1] & 8:
        raise ValueError(f"an array of class {kind} with {n} elements is not read here")
    fields = [""]
    if kind == 2:                                       # struct: the fields' names come first
        (_, width), (_, names) = next(parts), next(parts)
        width = int.from_bytes(width, "little")
        fields = [bytes(names[i:i + width]).split(b"\0")[0].decode("latin-1")
                  for i in range(0, len(names), width)]
    if kind in (1, 2):
        rows = [{f: mat_array(*next(parts))[1] for f in fields} for _ in range(n)]
        value = rows if kind == 2 else [row[""] for row in rows]
    else:
        stored, body = next(parts) if n else (1, b"")
        code = MAT_NUMBERS[stored if kind != 4 else 1]
        value = (bytes(body).decode(MAT_TEXTS[stored]) if kind == 4 else
                 list(struct.unpack(f"<{len(body) // struct.calcsize(code)}{code}", body)))
        if kind != 4 and len(value) != n:
            raise ValueError(f"expected {n} numbers, got {len(value)}")
    return bytes(name).decode("latin-1"), value


def own_folders(root, ignored, known, bases):
    """A folder per class in the first of `bases` that is there, and no official split."""
    base = next(b for b in bases if (root / b).is_dir())
    return hash_split(*_class_images(root, base, ignored, known), base)


def hash_split(names, rows, base=""):
    """A fifth of the images is the test set, picked by a hash of the paths below `base`: the same
    for every seed, machine and place. names: classes."""
    parts, start = (Rows([], []), Rows([], [])), len(base) + 1 if base else 0   # train, test
    for file, label in zip(*rows):
        digest = hashlib.sha256(file[start:].encode("utf-8", "surrogateescape")).digest()
        part = parts[int.from_bytes(digest, "big") % 5 == 0]
        part.files.append(file)
        part.labels.append(label)
    if not all(part.files for part in parts):
        return Found("class folders, too few images for a split: train = test", rows, rows, names)
    return Found("class folders, split by a hash of the paths", *parts, names)


def sun397(root, ignored, known):
    """SUN397/a/abbey/*.jpg, SUN397/a/apartment_building/outdoor/*.jpg; CoOp's class names have the
    parts of the path reversed: `outdoor apartment_building`."""
    base = "SUN397" if (root / "SUN397").is_dir() else ""
    lists = [f for f in ("Training_01.txt", "Testing_01.txt") if (root / f).is_file()]
    order = [f for f in ("ClassName.txt", "SUN397/ClassName.txt") if (root / f).is_file()]

    def row(key, file):                                 # /a/apartment_building/outdoor
        return f"{base}{key}/{file}".lstrip("/"), key.lower(), " ".join(key.split("/")[:1:-1])
    if len(lists) == 2:
        line = r"(/\w/.+)/([^/]+)", "/a/abbey/sun_aaa.jpg"
        return listed(root, ignored, known, lists, line, row,
                      (order[0], (r"(/\w/.+)", "/a/abbey")) if order else None,
                      ", partition 1: CoOp's test set, the training set has CoOp's val in it")
    files = [(f"/{path}".rpartition("/")[0], path) for path in _list(root / base, ignored, True)]
    keys = ([key for key, in read_lines(root / order[0], r"(/\w/.+)", "/a/abbey")] if order else
            sorted({key for key, _ in files if re.match(r"/\w/.", key)}))
    label, prefix = {key: k for k, key in enumerate(keys)}, base + "/" if base else ""
    rows = Rows.of([(prefix + path, label[key]) for key, path in files if key in label])
    return hash_split([row(key, "")[2] for key in keys], rows, base)


FLOWERS = """
    pink primrose, hard-leaved pocket orchid, canterbury bells, sweet pea, english marigold,
    tiger lily, moon orchid, bird of paradise, monkshood, globe thistle, snapdragon, colt's
    foot, king protea, spear thistle, yellow iris, globe-flower, purple coneflower, peruvian
    lily, balloon flower, giant white arum lily, fire lily, pincushion flower, fritillary, red
    ginger, grape hyacinth, corn poppy, prince of wales feathers, stemless gentian, artichoke,
    sweet william, carnation, garden phlox, love in the mist, mexican aster, alpine sea holly,
    ruby-lipped cattleya, cape flower, great masterwort, siam tulip, lenten rose, barbeton
    daisy, daffodil, sword lily, poinsettia, bolero deep blue, wallflower, marigold, buttercup,
    oxeye daisy, common dandelion, petunia, wild pansy, primula, sunflower, pelargonium, bishop
    of llandaff, gaura, geranium, orange dahlia, pink-yellow dahlia, cautleya spicata, japanese
    anemone, black-eyed susan, silverbush, californian poppy, osteospermum, spring crocus,
    bearded iris, windflower, tree poppy, gazania, azalea, water lily, rose, thorn apple,
    morning glory, passion flower, lotus, toad lily, anthurium, frangipani, clematis, hibiscus,
    columbine, desert-rose, tree mallow, magnolia, cyclamen, watercress, canna lily,
    hippeastrum, bee balm, ball moss, foxglove, bougainvillea, camellia, mallow, mexican
    petunia, bromelia, blanket flower, trumpet creeper, blackberry lily
    """                             # by number, from 1


def flowers102(root, ignored, known):
    """imagelabels.mat: the class, from 1, of each jpg/image_00001.jpg; setid.mat: the split."""
    labels, sets = read_mat(root / "imagelabels.mat"), read_mat(root / "setid.mat")
    try:
        parts = [[(f"jpg/image_{n:05d}.jpg", int(labels["labels"][n - 1]) - 1)
                  for n in map(int, sets[part])] for part in ("trnid", "tstid")]
        if min(map(int, (*sets["trnid"], *sets["tstid"]))) < 1:
            raise IndexError                            # -1 would be the last
    except (LookupError, TypeError, ValueError, ArithmeticError):
        raise DataError("imagelabels.mat and setid.mat: expected labels, trnid and tstid of the "
                        "same images") from None
    names = " ".join(FLOWERS.split()).split(", ")
    if (root / "cat_to_name.json").is_file():           # CoOp's: {"1": "pink primrose", ...}
        table = read_json(root / "cat_to_name.json")
        if not isinstance(table, dict) or set(table) != {str(k + 1) for k in range(len(table))}:
            raise DataError('cat_to_name.json: expected {"1": "pink primrose", "2": ...}')
        names = [str(table[str(k + 1)]) for k in range(len(table))]
    return Found("official split of setid.mat, not CoOp's", *map(Rows.of, parts), names)


def stanford_cars(root, ignored, known):
    """devkit/cars_train_annos.mat and cars_test_annos_withlabels.mat; classes from 1 in
    devkit/cars_meta.mat, `Acura RL Sedan 2012`, to which CoOp gives the year first."""
    test = "cars_test_annos_withlabels.mat"
    test = test if (root / test).is_file() else f"devkit/{test}"

    def read(file, variable, row):
        try:
            return [row(v) for v in read_mat(root / file)[variable]]
        except FileNotFoundError:
            raise DataError(f"{file} is missing: without it, or CoOp's "
                            f"split_zhou_StanfordCars.json, there are no labels") from None
        except DataError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError):
            raise DataError(f"{file}: expected {variable}, as in the data set's devkit") from None
    parts = [read(file, "annotations", lambda v: (f"{folder}/{v['fname']}", int(v["class"][0]) - 1))
             for folder, file in (("cars_train", "devkit/cars_train_annos.mat"),
                                  ("cars_test", test))]
    names = read("devkit/cars_meta.mat", "class_names",
                 lambda c: " ".join([c.split()[-1], *c.split()[:-1]]))
    return Found("official split: CoOp's test set, the training set has CoOp's val in it",
                 *map(Rows.of, parts), names)


def ucf101(root, ignored, known):
    """ucfTrainTestlist/trainlist01.txt: `ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1`, whose
    middle frame CoOp has as UCF-101-midframes/Apply_Eye_Makeup/v_ApplyEyeMakeup_g08_c01.jpg."""
    spelled = {d.replace("_", "").lower(): d for d in _folders(root / "UCF-101-midframes")}

    def row(c, file, _):
        name = spelled.get(c.lower()) or "_".join(re.findall("[A-Z][^A-Z]*", c))
        return f"UCF-101-midframes/{name}/{file}.jpg", c.lower(), name
    files = "ucfTrainTestlist/trainlist01.txt", "ucfTrainTestlist/testlist01.txt"
    line = r"(\w+)/(\w+)\.avi( \d+)?", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1"
    return listed(root, ignored, known, files, line, row,
                  ("ucfTrainTestlist/classInd.txt", (r"\d+ (\w+)", "1 ApplyEyeMakeup")),
                  ": CoOp's test set, the training set has CoOp's val in it")


def tiny_imagenet(root, ignored, known):
    """val/val_annotations.txt: lines `val_0.JPEG n03444034 0 32 44 62` on val/images/val_0.JPEG."""
    folders, rows = _class_images(root, "train", ignored, known)
    label = {wnid: k for k, wnid in enumerate(folders)}
    line = r"(\S+)\s+(n\d{8})\b.*", "val_0.JPEG n03444034 0 32 44 62"
    test = [(f"val/images/{file}", label.get(wnid, -1))
            for file, wnid in read_lines(root / "val/val_annotations.txt", *line)]
    return Found("official split, tested on val", rows, Rows.of(test), folders)


class _Array:
    """Stands in for a numpy array: keeps its bytes."""
    def __init__(self, *_):
        self.raw = b""

    def __setstate__(self, state):
        self.raw = state[-1]


class _Unpickler(Unpickler):
    """Reads arrays, and nothing that could run code."""
    def find_class(self, module, name):
        if (module, name) == ("_codecs", "encode"):
            return lambda text, *_: text.encode("latin1")
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return _Array
        raise pickle.UnpicklingError(f"{module}.{name} is not part of an image archive")


class Pixels(list):
    """PIL images of rows of 3,072 bytes: 32 x 32 red, then green, then blue."""
    def __getitem__(self, i):
        row = super().__getitem__(i)
        return Image.merge("RGB", [Image.frombytes("L", (32, 32), row[k:k + 1024])
                                   for k in (0, 1024, 2048)])


def cifar(root, ignored, known, train, test, meta, key, names):
    """The Python pickles of CIFAR-10 and -100: {data: (N, 3072) uint8, `key`: N labels}."""
    def read(file):
        try:
            with opened(root / file) as stream:         # BytesIO: never more than it holds
                table = _Unpickler(io.BytesIO(stream.read()), encoding="bytes").load()
            return {k.decode() if isinstance(k, bytes) else k: v for k, v in table.items()}
        except OSError:
            raise
        except Exception as e:                          # unpickling raises nearly anything
            raise DataError(f"{file} is not one of CIFAR's files: {_reason(e)}") from None
    table = read(meta).get(names, ()) if (root / meta).is_file() else ()
    classes = [c.decode() if isinstance(c, bytes) else str(c) for c in table]
    C = len(classes) or 1000
    rows, pictures = [], []
    for part, files in (("train", train), ("test", test)):
        labels, pixels = [], Pixels()
        for file in files:
            table = read(file)
            raw, y = getattr(table.get("data"), "raw", b""), table.get(key)
            if not (isinstance(y, list) and all(type(k) is int and 0 <= k < C for k in y)
                    and len(raw) == 3072 * len(y)):
                raise DataError(f"{file}: expected data (N, 3072) and N {key} below {C}")
            labels += y
            pixels += [raw[n:n + 3072] for n in range(0, len(raw), 3072)]
        rows.append(Rows([f"{part}/{i:05d}.png" for i in range(len(labels))], labels))
        pictures.append(pixels)
    return Found("official split", *rows, classes or None, pictures=tuple(pictures))


SETS = (
    Known("ImageNet", ("imagenet", "imagenet-1k", "ilsvrc2012", "ilsvrc")),
    Known("Caltech101", ("caltech-101", "caltech101"),
          split="split_zhou_Caltech101.json", images="101_ObjectCategories",
          own=("101_ObjectCategories/",), torchvision="Caltech101",
          read=partial(own_folders, bases=["101_ObjectCategories"]),
          rename={"BACKGROUND_Google": None, "Faces_easy": None, "Faces": "face",
                  "Leopards": "leopard", "Motorbikes": "motorbike", "airplanes": "airplane"}),
    Known("Oxford Pets", ("oxford_pets", "oxford-iiit-pet"), "a photo of a {}, a type of pet.",
          split="split_zhou_OxfordPets.json", images="images", torchvision="OxfordIIITPet",
          own=("annotations/trainval.txt", "annotations/test.txt", "images/"),
          read=partial(listed, files=("annotations/trainval.txt", "annotations/test.txt"),
                       line=(r"(.+)_(\d+) (\d+)( .*)?", "Abyssinian_100 1 1 1"),
                       row=lambda c, n, k, _: (f"images/{c}_{n}.jpg", int(k), c.lower()),
                       note=": CoOp's test set, the training set has CoOp's val in it")),
    Known("Stanford Cars", ("stanford_cars",), split="split_zhou_StanfordCars.json",
          own=("devkit/cars_train_annos.mat", "cars_train/"), read=stanford_cars),
    Known("Flowers102", ("oxford_flowers", "flowers-102"), "a photo of a {}, a type of flower.",
          split="split_zhou_OxfordFlowers.json", images="jpg", torchvision="Flowers102",
          own=("imagelabels.mat", "setid.mat", "jpg/"), read=flowers102),
    Known("Food101", ("food-101", "food101"), "a photo of {}, a type of food.",
          split="split_zhou_Food101.json", images="images", torchvision="Food101",
          own=("meta/train.txt", "meta/test.txt", "meta/classes.txt", "images/"),
          read=partial(listed, files=("meta/train.txt", "meta/test.txt"),
                       line=(r"([^/]+)/(.+)", "apple_pie/1005649"),
                       row=lambda c, n: (f"images/{c}/{n}.jpg", c.lower(), c),
                       order=("meta/classes.txt", ("(.+)", "apple_pie")), note=", not CoOp's")),
    Known("FGVC Aircraft", ("fgvc_aircraft", "fgvc-aircraft-2013b"),
          "a photo of a {}, a type of aircraft.", torchvision="FGVCAircraft",
          own=("images_variant_train.txt", "images_variant_test.txt", "variants.txt", "images/"),
          read=partial(listed, files=("images_variant_train.txt", "images_variant_test.txt"),
                       line=(r"(\d+) (.+)", "1025794 707-320"),
                       row=lambda n, c: (f"images/{n}.jpg", c.lower(), c),
                       order=("variants.txt", ("(.+)", "707-320")), note=", which CoOp uses too")),
    Known("SUN397", ("sun397",), split="split_zhou_SUN397.json", images="SUN397",
          own=("SUN397/a/|a/abbey/",), read=sun397, torchvision="SUN397"),
    Known("DTD", ("dtd",), "{} texture.", split="split_zhou_DescribableTextures.json",
          images="images", own=("labels/train1.txt", "labels/test1.txt", "images/"),
          read=partial(listed, files=("labels/train1.txt", "labels/test1.txt"),
                       line=(r"([^/]+)/(.+)", "banded/banded_0002.jpg"),
                       row=lambda c, file: (f"images/{c}/{file}", c, c), note=", not CoOp's"),
          torchvision="DTD"),
    Known("EuroSAT", ("eurosat", "eurosat_rgb"), "a centered satellite photo of {}.",
          split="split_zhou_EuroSAT.json", images="2750", own=("2750/AnnualCrop/|AnnualCrop/",),
          read=partial(own_folders, bases=["2750", ""]), torchvision="EuroSAT",
          rename={"AnnualCrop": "Annual Crop Land", "Highway": "Highway or Road",
                  "HerbaceousVegetation": "Herbaceous Vegetation Land", "Pasture": "Pasture Land",
                  "Industrial": "Industrial Buildings", "PermanentCrop": "Permanent Crop Land",
                  "Residential": "Residential Buildings", "SeaLake": "Sea or Lake"}),
    Known("UCF101", ("ucf101",), "a photo of a person doing {}.",
          split="split_zhou_UCF101.json", images="UCF-101-midframes",
          own=("UCF-101-midframes/", "ucfTrainTestlist/classInd.txt"), read=ucf101),
    Known("CIFAR-10", ("cifar-10-batches-py", "cifar10", "cifar-10"), torchvision="CIFAR10",
          own=("data_batch_1", "test_batch"),
          read=partial(cifar, train=[f"data_batch_{k}" for k in range(1, 6)], test=["test_batch"],
                       meta="batches.meta", key="labels", names="label_names")),
    Known("CIFAR-100", ("cifar-100-python", "cifar100", "cifar-100"), torchvision="CIFAR100",
          own=("train", "test"),
          read=partial(cifar, train=["train"], test=["test"], meta="meta", key="fine_labels",
                       names="fine_label_names")),
    Known("Imagenette", ("imagenette2", "imagenette", "imagenette2-320", "imagenette2-160"),
          torchvision="Imagenette"),
    Known("Tiny-ImageNet", ("tiny-imagenet-200", "tiny-imagenet"), read=tiny_imagenet,
          own=("wnids.txt", "val/val_annotations.txt", "train/")),
    Known("ImageNet-V2", ("imagenetv2", "imagenetv2-matched-frequency-format-val"), test_only=True),
    Known("ImageNet-Sketch", ("imagenet-sketch",), test_only=True),
    Known("ImageNet-A", ("imagenet-adversarial", "imagenet-a"), test_only=True),
    Known("ImageNet-R", ("imagenet-rendition", "imagenet-r"), test_only=True),
)

OTHER = Known(None, ())        # a user's own data


def expected(known=None):
    """What --data may be, for error messages."""
    def tree(k):
        own = ", ".join(n.replace("|", " or ") for n in k.own)
        coop = f"\n  {k.folders[0]}/ with {k.split} and {k.images or 'its images'}/" * bool(k.split)
        return coop + f"\n  {k.folders[0]}/ with {own}" * bool(own)
    if known and tree(known):
        return "Expected one of" + tree(known)
    return f"""Expected one of
  DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or val)
  DIR/CLASS/*.jpg
  DIR/*.jpg and --classes FILE|a,b,c
  a data set as CoOp or torchvision lays it out: {', '.join(k.folders[0] for k in SETS)}"""


def read_coop(known, root):
    """split_zhou_*.json: {"train": [[path, label, class name], ...], "val": ..., "test": ...}.
    Class names and their order are those of its training part."""
    split = read_json(root / known.split)
    if not isinstance(split, dict):
        raise DataError(f'{known.split}: expected {{"train": [...], "test": [...]}}')
    names, parts = {}, {part: split.get(part, []) for part in ("train", "val", "test")}
    for part, rows in parts.items():
        for k, row in enumerate(rows if isinstance(rows, list) else [rows]):
            if not (isinstance(row, list) and [type(x) for x in row] == [str, int, str]):
                raise DataError(f"{known.split}: {part}[{k}]: expected [path, label, class name], "
                                f"got {json.dumps(row)[:60]}")
            if names.setdefault(row[1], row[2]) != row[2]:
                raise DataError(f"{known.split}: label {row[1]} is both {names[row[1]]} and "
                                f"{row[2]}")
    labels = sorted(names)
    names = {label: names[label] for label in {row[1] for row in parts["train"]}}
    if not names or labels != list(range(len(names))):
        raise DataError(f"{known.split}: training labels must be 0, 1, 2, ... without a gap and "
                        f"test labels be among them; {len(names)} classes, labels "
                        f"{str(labels)[:60]}")
    base = f"{known.images}/" if known.images else ""
    train, test = (Rows.of([(base + path.lstrip("/"), label) for path, label, _ in parts[part]])
                   for part in ("train", "test"))
    return Found(f"CoOp layout, {known.split}, {len(parts['val'])} images of val not used",
                 train, test, [names[k] for k in labels])


def read_train_test(train, tests, root, ignored, known, classes):
    """train/ and test|val/, each with class folders or with unlabelled images."""
    parts = {d: _class_images(root, d, ignored, known) for d in (train, *tests)}
    test = ([d for d in tests if parts[d][0]] or tests)[0]      # rather a labelled val/
    (seen, rows), (tested, test_rows) = parts[train], parts[test]
    names = seen or tested or classes
    extra = [c for c in tested if c not in names]
    if extra:
        raise DataError(f"{test}/ has class folders that {train}/ lacks: {', '.join(extra[:5])}")
    if tested and tested != names:                      # some have no test images
        place = [names.index(c) for c in tested]
        test_rows = Rows(test_rows.files, [place[k] for k in test_rows.labels])
    kinds = [d + ("/ labelled" if parts[d][0] else "/ unlabelled") for d in (train, test)]
    unused = "".join(f", {d}/ not used" for d in tests if d != test)
    return Found(" + ".join(kinds) + unused, rows, test_rows, names)


def read_class_folders(root, ignored, known, classes):
    """A folder per class and no split: layout 4 of this file's docstring."""
    names, rows = _class_images(root, "", ignored, known)
    if classes and known is OTHER and not set(map(_plain, classes)) & set(map(_plain, names)) and (
            not re.fullmatch(r"n\d{8}", names[0])):
        return read_flat(root, Counter(), known, classes)   # 2023/, 2024/ are no classes
    if {f"{c}/" for c in names} & set(known.own):       # cars_train/ is not a class
        raise DataError(f"{root}: the lists that say the classes are missing. {expected(known)}")
    if known.test_only:
        return Found("test only, train = test", rows, rows, names)
    return hash_split(names, rows)


def read_test_only(test, root, ignored, known, classes):
    """test|val/ with class folders and no train/."""
    names, rows = _class_images(root, test, ignored, known)
    return Found("test only, train = test", rows, rows, names)


def read_flat(root, ignored, known, classes):
    """Images without labels, train = test = all; those in sub-folders too, unless a sub-folder is
    called like a class."""
    folders = [d for d in _folders(root) if _list(root / d, Counter(), deep=True)]
    deep = not set(map(_plain, folders)) & set(map(_plain, classes or folders))
    rows = Rows(_list(root, ignored, deep), None)
    unused = "" if deep else "".join(f", {d}/ not used" for d in folders)
    kind = "folders of images" if deep and folders else "flat folder"
    return Found(f"{kind}, unlabelled, train = test{unused}", rows, rows, None)


def read_known(root, ignored, known, classes):
    """A data set of `SETS`, recognised by its files."""
    if known.split and (root / known.split).is_file():
        return read_coop(known, root)
    try:
        found = known.read(root, ignored, known)
    except (DataError, OSError):
        raise
    except Exception as e:                              # of files that nobody thought of
        raise DataError(f"{root}: the files of {known.title} cannot be understood: "
                        f"{_reason(e)}. {expected(known)}") from e
    return found._replace(layout=found.layout + (f"; no {known.split}" if known.split else ""))


def recognise(root):
    """(data set of `SETS` or None, reader of this folder's layout or None). Readers are called with
    (root, ignored, data set, classes) and return `Found`."""
    def there(name):                                    # a|b/: the file a or the folder b
        return any((root / n).is_dir() if n.endswith("/") else (root / n).is_file()
                   for n in name.split("|"))
    for known in SETS:
        if known.split and there(known.split) or known.own and all(map(there, known.own)):
            return known, read_known
    for other in sorted(root.glob("split_zhou_*.json")):    # refuse, never invent another split
        raise DataError(f"{root} holds {other.name}, which is of no known data set: "
                        + ", ".join(k.split for k in SETS if k.split))
    folders = _folders(root)
    named = {d.lower(): d for d in folders}
    tests = [named[d] for d in ("test", "val", "valid", "validation") if d in named]
    if "train" in named and tests:
        return None, partial(read_train_test, named["train"], tests)
    if sum(_has_images(root / d) for d in folders) > 1:
        return None, read_class_folders
    if tests and any(_has_images(root / tests[0] / d) for d in _folders(root / tests[0])):
        return None, partial(read_test_only, tests[0])
    return None, read_flat if _has_images(root) else None


def search(root, depth=2):
    """{sub-folder/: (data set, reader)}: root itself, else what its sub-folders hold."""
    known, reader = recognise(root)
    if reader:
        return {"": (known, reader)}
    folders = _folders(root) if depth else []
    return {f"{d}/{inside}": found for d in folders[:100]
            for inside, found in search(root / d, depth - 1).items()}


def by_name(folder):
    """The data set whose folder is called so, or None."""
    return next((k for k in SETS if str(folder).lower() in k.folders), None)


def locate(path):
    """The folder of --data. A data set may lie there under its other name (PATH/oxford_pets as
    PATH/oxford-iiit-pet), or be downloaded by torchvision."""
    root = Path(os.path.expanduser(path))
    if path and os.path.isdir(root):
        return root
    if path and os.path.exists(root):
        raise DataError(f"{path}: is not a folder. {expected()}")
    known = by_name(root.name) if path else None
    beside = sorted(root.parent.iterdir()) if known and root.parent.is_dir() else None
    for other in beside or ():
        if other.is_dir() and by_name(other.name) is known:
            return other
    if beside is None or not known.torchvision:
        raise DataError(f"{path or '(empty path)'}: no such folder. {expected(known)}")
    return download(known, root.parent)


def download(known, parent):
    """Downloads a data set into `parent` as torchvision does, and moves it there when complete."""
    kind = getattr(torchvision.datasets, known.torchvision)
    print(f"downloading {known.title} with torchvision into {parent}/", flush=True)
    timeout, extraction = socket.getdefaulttimeout(), vars(tarfile.TarFile).get("extraction_filter")
    try:
        if hasattr(tarfile, "data_filter"):             # refuses members that lie outside
            tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".download-") as folder:
            socket.setdefaulttimeout(60)                # torchvision would wait for ever
            try:
                kind(folder, download=True)
            except ModuleNotFoundError:                 # Flowers102 wants scipy then, we do not
                pass
            new = next(d for d in sorted(Path(folder).iterdir()) if d.is_dir())
            return new.rename(parent / new.name)
    except Exception as e:                              # network, disk, archive
        raise DataError(f"{known.title} could not be downloaded ({_reason(e)}). "
                        f"{expected(known)}") from None
    finally:
        socket.setdefaulttimeout(timeout)
        tarfile.TarFile.extraction_filter = extraction


def wordnet(folders, root, known, classes):
    """Class folders called n01440764 (ImageNet's WordNet ids) get the names of a classnames.txt
    beside them, or torchvision's if all 1000 are there; ImageNet-V2's folders 0 to 999 likewise.
    Other folders are class names themselves."""
    numbered = known.title == "ImageNet-V2" and folders == [str(k) for k in range(1000)]
    wnids = all(re.fullmatch(r"n\d{8}", d) for d in folders)
    if not (numbered or wnids):
        return folders
    if classes and len(classes) == len(folders):
        return classes
    near = (root, root.parent, root.parent / "imagenet", root.parent.parent / "imagenet")
    for file in (d / f for f in ("classnames.txt", "words.txt") for d in near):
        table = dict(read_lines(file, r"(n\d{8})\s+([^,]+).*", "n01440764 tench")
                     if file.is_file() else ())
        if numbered and len(table) == 1000:
            return [table[w] for w in sorted(table)]
        if wnids and table.keys() >= set(folders):
            return [table[w] for w in folders]
    if len(folders) == 1000:
        return list(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    table = getattr(torchvision.datasets.Imagenette, "_WNID_TO_CLASS", {})
    if table.keys() >= set(folders):
        return [table[w][0] for w in folders]
    raise DataError(f"{root}: the class folders are WordNet ids ({folders[0]}, ...): put CoOp's "
                    f"classnames.txt, lines like `n01440764 tench`, beside them, or name the "
                    f"{len(folders)} classes with --classes")


# ---- load ----

def load(path, classes=None, template=None):
    """`Data` of a folder or of demo[:STYLE]. Reads every image once; prints a warning for bad ones.

    classes: None, a list of names, "a,b,c", or a file with one name per line. If the folder has
    class names of its own they must be the same in the same order (any case or underscores).
    template: None for the data set's own, "ensemble" for `ENSEMBLE` and that, or a text with {}.
    Raises DataError.
    """
    path, classes = os.fspath(path), class_list(classes)
    if path == "demo" or path.startswith("demo:"):
        found, root, inside, data_set = read_demo(path[5:]), None, "", OTHER
        ignored = Counter()
    else:
        root = locate(path)
        found, inside, data_set, ignored = read_folder(path, root, classes)
    if not (found.class_names or classes):
        raise DataError(f"{path} holds {len(found.train.files)} images without class names: give "
                        f"--classes FILE|a,b,c" + (f", or the lists that are missing. "
                                                   f"{expected(data_set)}" if data_set.own else ""))
    own = wordnet(found.class_names or classes, root / inside, data_set, classes) if root else (
        found.class_names)
    where = f"{path} ({found.layout}): "
    names = check_classes(own, classes, own == found.class_names, where)    # not with WordNet's
    if len(names) == 1:
        print(f"warning: {names[0]} is the only class: nothing to tell apart", file=sys.stderr)
    if not (found.train.files and found.test.files):
        raise DataError(f"{where}no {'test' if found.train.files else 'training'} images")
    for files, labels in (found.train, found.test):
        if labels and not 0 <= min(labels) <= max(labels) < len(names):
            raise DataError(f"{path}: labels from {min(labels)} to {max(labels)}, but there are "
                            f"{len(names)} classes: {found.layout}")
    if found.pictures:
        sets = [Images(*rows, inside=inside, pictures=pictures)
                for rows, pictures in zip((found.train, found.test), found.pictures)]
    else:
        sets = readable(path, root, inside, found.train, found.test)
    templates = templates_of(template, data_set.template)
    line = (f"{data_set.title + ', ' if data_set.title else ''}"
            f"{'in ' + inside + ': ' if inside else ''}{found.layout}: {len(names)} classes, "
            f'{len(sets[0])} training and {len(sets[1])} test images, "{templates[0]}"')
    if templates[1:]:
        line += f" and {len(templates) - 1} more templates"
    if ignored:
        line += "; ignored: " + kinds(ignored)
    return Data(*sets, names, templates, printable(line), data_set.title)


def read_demo(style):
    """The drawn world of `clip/shapes.py`; its default style is "narrow"."""
    style = style or "narrow"
    if style not in shapes.STYLES:
        raise DataError(f"demo:{style}: unknown style, expected one of {', '.join(shapes.STYLES)}")
    drawn = [shapes.pictures(style, part) for part in ("train", "test")]    # (PIL images, labels)
    rows = [Rows([f"{part}/{i:05d}.png" for i in range(len(y))], y)
            for part, (_, y) in zip(("train", "test"), drawn)]
    return Found(f"demo:{style}, drawn here", *rows, list(shapes.SHAPES),
                 pictures=(drawn[0][0], drawn[1][0]))


def read_folder(path, root, classes):
    """(Found, sub-folder with a slash or "", data set, count of ignored files)."""
    ignored, inside = Counter(), ""
    try:
        readers = search(root)
        if len(readers) != 1 and classes and _list(root, Counter(), deep=True):
            readers = {"": (None, read_flat)}           # folders of unlabelled images
        if len(readers) != 1:
            _list(root, ignored)
            unread = f" (not read: {kinds(ignored)})" if ignored else ""
            several = ", ".join(inside[:-1] for inside in readers)
            raise DataError(f"{path} holds several data sets, give one: {several}" if readers else
                            f"{path}: no images in a known layout{unread}. "
                            + expected(by_name(root.resolve().name)))
        (inside, (known, reader)), = readers.items()
        for folder in (root.resolve().name, *inside.split("/")):
            known = known or by_name(folder)
        known = known or OTHER
        found = reader(root / inside, ignored, known, classes)
    except OSError as e:
        raise DataError(f"cannot read {e.filename or path}: {e.strerror or e}") from None
    return found, inside, known, ignored


def readable(path, root, inside, train, test):
    """[training, test] `Images` of the files in root/inside, without those that cannot be read; one
    object if they are the same. With more than CHECKED files none is opened here."""
    same, sizes, bad, sets = train == test, None, {}, []
    parts = (("training", train), ("test", test))[:1 if same else 2]
    if sum(len(rows.files) for _, rows in parts) <= CHECKED:
        files = sorted({file for _, rows in parts for file in rows.files})
        sizes, bad = check_files(root / inside, files, inside)
    for part, (files, labels) in parts:
        if bad:
            kept = [i for i, file in enumerate(files) if file not in bad]
            labels = labels and [labels[i] for i in kept]
            worst = next((file for file in files if file in bad), None)
            first = f": {_text(inside + worst)} {bad[worst]}, ..." if worst else ""
            names = [files[i] for i in kept]
        else:
            names, first = files, ""
        if not names or 2 * len(names) < len(files):
            how_many = f"only {len(names)}" if names else "none"
            raise DataError(f"{path}: {how_many} of {len(files)} {part} images can be read{first}")
        sets.append(Images(names, labels, root / inside, inside,
                           sizes=sizes and [sizes[file] for file in names]))
    return sets * 2 if same else sets


def templates_of(template, own):
    """The prompts of --template; the first is the one that learnable prompts start from."""
    if template in (None, "ensemble"):
        return [own] + [t for t in ENSEMBLE if template and t != own]
    if template.count("{}") != 1 or re.search(r"[{}]", template.replace("{}", "")):
        raise DataError(f"--template {template!r}: expected `ensemble` or a text with one {{}} for "
                        f"the class name")
    return [template]


def class_list(classes):
    """--classes (see `load`) as a checked list of names, or None."""
    where = ""
    if classes is None:
        return None
    if isinstance(classes, (str, os.PathLike)):
        text = os.path.expanduser(classes)
        if os.path.isfile(text):
            classes, where = read_text(text).splitlines(), f"--classes {text}: "
        elif "," in text or not text.strip():
            classes = text.split(",")
        else:
            raise DataError(f"--classes {text}: neither a file nor a list like a,b,c (of one: a,)")
    names = [c for c in classes if c.strip() and not c.startswith("#")]
    return check_classes(names, where=where)


def check_classes(names, wanted=None, unique=True, where=""):
    """Class names as they go into the prompt: spaces for underscores, `wanted`'s spelling if given.
    DataError unless there are any, all different if they must be unique (ImageNet has two
    `missile`), and the same as `wanted` in its order."""
    names = [" ".join(_text(c).replace("_", " ").split()) for c in names]
    if not names or "" in names:
        raise DataError(f"{where}classes with a name are needed, got {names[:5]} "
                        f"(--classes a,b,c or a file with one name per line)")
    twice = [c for c, n in Counter(map(str.casefold, names)).items() if n > 1]
    if twice and unique:
        raise DataError(f"{where}class names must differ, whatever their case: "
                        f"{', '.join(f'{c:.60}' for c in twice[:5])}")
    odd = [c for c in names if re.search(r"[\x00-\x1f\x7f-\x9f]", c)]
    if odd:
        raise DataError(f"{where}expected class names without control characters, got "
                        f"{odd[0]!r:.60}")
    for k, (a, b) in enumerate(zip_longest(wanted or names, names, fillvalue="missing"), 1):
        if a.casefold() != b.casefold():
            raise DataError(f"--classes must name the data's own {len(names)} classes in their "
                            f"order: number {k} is {a:.60}, but in the data {b:.60}")
    return wanted or names


def check_files(root, files, inside):
    """({file: (width, height)}, {file: why it does not decode}), tried in threads; prints a warning
    line per kind."""
    def look(file):
        try:
            return decode(os.path.join(root, file), draft=True), None
        except FileNotFoundError:
            return None, "is missing"
        except Exception as e:                          # Pillow's plugins raise nearly anything
            return None, _reason(e)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # Pillow's, about odd but readable files
        found, shown = [], time.time()
        for result in pool.map(look, files):
            found.append(result)
            if sys.stderr.isatty() and time.time() - shown > 0.5:
                shown = time.time()
                print(f"\rlooking at the images: {len(found)} of {len(files)} ", end="",
                      file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr, flush=True)
    sizes = {file: size for file, (size, _) in zip(files, found)}
    bad = {file: reason for file, (_, reason) in zip(files, found) if reason}
    missing = [file for file in bad if bad[file] == "is missing"]
    for what, group in (("missing", missing), ("unreadable", sorted(bad.keys() - set(missing)))):
        if group and len(bad) < len(files):
            first = ", ".join(f"{_text(inside + file)} ({bad[file]})" for file in group[:5])
            print(printable(f"warning: {len(group)} of {len(files)} images {what}, skipped: {first}"
                            + (", ..." if len(group) > 5 else "")), file=sys.stderr)
    return sizes, bad


# ---- small helpers ----

def _text(name):
    """A file name as printable text: composed accents, undecodable bytes escaped."""
    if name.isascii():
        return name
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode())


def printable(text):
    """One line of at most 2000 letters, none of which moves a terminal's cursor: a file may be
    called anything."""
    text = text if len(text) <= 2000 else f"{text[:1500]} ... {text[-400:]}"
    return text if text.isprintable() else "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def kinds(ignored):
    """The most frequent of the counted kinds of files."""
    first = sorted(ignored.most_common(8))
    rest = ignored.total() - sum(n for _, n in first)
    return ", ".join(f"{n} {kind}" for kind, n in first) + (f", {rest} more" if rest else "")


def _reason(e):
    if isinstance(e, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    return " ".join(str(e).split())[:80] or type(e).__name__


def _folders(root):
    """Sorted names of the sub-folders, without hidden ones and what macOS puts into archives."""
    return sorted(e.name for e in os.scandir(root)
                  if _is_folder(e) and not e.name.startswith((".", "__MACOSX")))


def _has_images(folder):
    try:
        return any(_is_image(e) for e in os.scandir(folder))
    except PermissionError:
        return False


def _is_image(entry):
    """By the name; folders and devices are not, a broken link is (it will be reported missing)."""
    named = entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
    if named and entry.is_symlink():
        return not os.path.exists(entry.path) or os.path.isfile(entry.path)
    return named and entry.is_file()


def _is_folder(entry):
    """os.DirEntry.is_dir raises if a link leads to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _list(folder, ignored, deep=False):
    """Paths of the images, relative to folder, sorted; counts in `ignored` what it passes over. A
    folder to which links lead too is read once."""
    files, todo, seen = [], [""], set()
    while todo:
        inside = todo.pop()
        here = os.path.join(folder, inside)
        info = os.stat(here)
        if (info.st_dev, info.st_ino) in seen:
            continue
        seen.add((info.st_dev, info.st_ino))
        for e in sorted(os.scandir(here), key=lambda e: e.name, reverse=True):
            if e.name.startswith("."):
                ignored["hidden"] += 1
            elif _is_folder(e):
                todo += [f"{inside}{e.name}/"] if deep else []
            elif _is_image(e):
                files.append(inside + e.name)
            else:
                ignored[os.path.splitext(e.name)[1].lower() or "without extension"] += 1
    return sorted(files)


def _class_images(root, base, ignored, known):
    """(class names, Rows) of the class folders in root/base; ([], Rows without labels) if it has
    none. The order of the classes is that of torchvision's ImageFolder."""
    prefix, names, rows = base + "/" if base else "", [], Rows([], [])
    folders = [d for d in _folders(root / base) if known.rename.get(d, d) is not None]
    if known.title == "ImageNet-V2" and all(map(str.isdecimal, folders)):
        folders.sort(key=int)                           # not 0, 1, 10, 100, ...
    for d in folders:
        files = _list(root / base / d, ignored, deep=True)
        if files:
            rows.files.extend(f"{prefix}{d}/{file}" for file in files)
            rows.labels.extend([len(names)] * len(files))
            names.append(known.rename.get(d, d))
    direct = [prefix + file for file in _list(root / base, ignored)]
    if names and direct:
        ignored["images outside the class folders"] += len(direct)
    return names, rows if names else Rows(direct, None)


# ---- LLM-written prompts ----

def _plain(name):
    """A class name for comparing: any case, any white space or underscores."""
    return " ".join(_text(name).replace("_", " ").split()).casefold()


def _words(name):
    """Its letters and digits as sorted words: "apartment building (outdoor)" in any order."""
    return " ".join(sorted("".join(c if c.isalnum() else " " for c in _plain(name)).split()))


# The same class in CoOp's, CLIP's and CuPL's lists of names, where the words differ.
ALIASES = [{_words(name) for name in line.split("=")} for line in """
    face = centered face
    car side = side of a car
    cougar body = body of a cougar cat
    cougar face = face of a cougar cat
    crocodile head = head of a crocodile
    flamingo head = head of a flamingo
    snoopy = snoopy (cartoon beagle)
    yin yang = yin and yang symbol
    ball moss = air plant
    pink-yellow dahlia = pink and yellow dahlia
    handstand pushups = hand stand pushups
    2012 Ram C/V Cargo Van Minivan = 2012 Ram CV Cargo Van Minivan
    keyboard = computer keyboard
    herbaceous vegetation land = HerbaceousVegetation = brushland or shrubland
    industrial buildings = Industrial = industrial buildings or commercial buildings
    residential buildings = Residential = residential buildings or homes or apartments
    annual crop land = AnnualCrop
    permanent crop land = PermanentCrop
    highway or road = Highway
    pasture land = Pasture
    sea or lake = SeaLake
    """.strip().splitlines()]


def match_keys(class_names, keys, path):
    """{class name: key}, for the classes that have one: the same string, else any case and `_`,
    else the same words in any order, else an alias. A key that fits one class better is not given
    to another. DataError if two keys fit a class equally well, or one key two classes."""
    def aliases(name):
        words = _words(name)
        return "; ".join(sorted(next((a for a in ALIASES if words in a), ())))
    found = {}
    for form in (str, _plain, _words, aliases):
        free, taken = {}, {}
        for key in keys - set(found.values()):
            free.setdefault(form(key), []).append(key)
        for c in dict.fromkeys(c for c in class_names if c not in found):
            fits = free.get(form(c), []) if form(c) else []
            if len(fits) > 1:
                raise DataError(f"{path}: class {c!r:.60} fits two keys: "
                                + ", ".join(f"{key!r:.60}" for key in sorted(fits)))
            if fits and taken.setdefault(fits[0], c) != c:
                raise DataError(f"{path}: key {fits[0]!r:.60} fits two classes: {c!r:.60} and "
                                f"{taken[fits[0]]!r:.60}")
        found.update((c, key) for key, c in taken.items())
    return found


def fit(text):
    """The text, or as many of its first words as CLIP has room for: 77 tokens."""
    def fits(k):
        try:
            return clip.tokenize(" ".join(words[:k])) is not None
        except RuntimeError:                            # too long for the context length
            return False
    words = text[:1200].split(" ")                      # 75 tokens have some 300 letters
    words = words[:76] if len(text) <= 1200 else words[:76][:len(words) - 1]    # without half ones
    if fits(len(words)):
        return " ".join(words)
    return " ".join(words[:bisect.bisect(range(len(words)), False, key=lambda k: not fits(k)) - 1])


def load_prompts(path, class_names, template):
    """(C lists of sentences in label order, one line about them), as an LLM wrote them.

    JSON: {class name: [sentence, ...]}, see `match_keys` for the names, or [[sentence, ...], ...]
    in label order. White space is tidied, repetitions are dropped, long sentences cut to CLIP's 77
    tokens. A class without sentences gets the template, and a warning names it. Raises DataError.
    """
    found, C = read_json(path), len(class_names)
    if not isinstance(found, (dict, list)):
        raise DataError(f"{path}: expected {{class name: [sentence, ...]}} or [[sentence, ...], "
                        f"...], got {str(found)[:40]}")
    table = found if isinstance(found, dict) else dict(enumerate(found))
    for key, texts in table.items():
        for k, text in enumerate(texts) if isinstance(texts, list) else [(None, texts)]:
            if not isinstance(text, str) or k is None:
                raise DataError(f"{path}: {key!r:.60}{'' if k is None else f'[{k}]'}: expected "
                                f"{'a list of strings' if k is None else 'a string'}, got "
                                f"{json.dumps(text)[:40]}")
    if table is not found and len(table) != C:
        raise DataError(f"{path}: expected {C} lists, one for each class, got {len(table)}")
    key_of = match_keys(class_names, table.keys(), path) if table is found else {}
    keys = [key_of.get(c) for c in class_names] if table is found else list(table)
    cut, sentences = 0, {}
    for key in set(keys) - {None}:
        tidy = [" ".join(_text(text).split()) for text in table[key]]
        tidy = list(dict.fromkeys(re.sub(r"^(\d+[.)]|[-*•]) ", "", text) for text in tidy))
        short = [fit(text) for text in tidy]
        cut += sum(a != b for a, b in zip(tidy, short))
        sentences[key] = [text for text in dict.fromkeys(short) if text]
    prompts = [sentences.get(key, []) for key in keys]
    missing = [c for c, texts in zip(class_names, prompts) if not texts]
    if len(missing) == C:
        raise DataError(f"{path}: no sentences for classes like {class_names[0]!r:.60}; its keys: "
                        f"{', '.join(f'{key!r:.30}' for key in list(table)[:3]) or 'none'}")
    if missing:
        print(f'warning: {path} has no sentences for {len(missing)} of {C} classes, they get '
              f'"{template}": {", ".join(missing[:20])}{", ..." if len(missing) > 20 else ""}',
              file=sys.stderr)
    counts = [len(texts) for texts in prompts if texts]
    line = (f"{_text(os.path.basename(path))}: {min(counts)} to {max(counts)} sentences for "
            f"{C - len(missing)} of {C} classes")
    line += f", {cut} of them cut to 77 tokens" if cut else ""
    unused = len(table.keys() - set(keys))
    return ([texts or [template.format(c)] for c, texts in zip(class_names, prompts)],
            line + (f", {unused} of {len(table)} keys fit no class" if unused else ""))


def our_prompts(name, title):
    """Path of the sentences that come with this project for --data demo[:STYLE] or the data set
    called `title`, or None."""
    folders = [k.folders for k in SETS if k.title == title and title] + [("demo",)] * (
        name.split(":")[0] == "demo")
    files = (Path(__file__).parent / "prompts" / f"{f}.json" for some in folders for f in some)
    return next((str(file) for file in files if file.is_file()), None)


# ---- candidate labels, few-shot subsets ----
# sets (N, C) bool: the classes that image i may be of.

def flip_candidates(y_true, C, q, seed):
    """sets (N, C): every wrong label enters with probability q, independently of the others (Feng
    et al. 2020, arXiv 2007.08929); the true one is always in. y_true (N,)."""
    return _draw(torch.full((len(y_true), C), float(q)), y_true, q, seed)


def hard_candidates(p, y_true, q, seed):
    """sets (N, C): wrong label k enters with probability min(1, q (C-1) p_k / sum_{j != y} p_j): as
    many as with `flip_candidates` before the cap, but likely mistakes more often. p (N, C) is a
    posterior. As in VALEN (Xu et al. 2021), whose division by the maximum cancels."""
    C = p.shape[1]
    wrong = p.double().cpu().scatter(1, y_true[:, None], 0.0)                   # (N, C)
    mass = wrong.sum(dim=1, keepdim=True)                                       # (N, 1)
    return _draw(torch.where(mass > 0, q * (C - 1) * wrong / mass, q), y_true, q, seed)


def _draw(chance, y_true, q, seed):
    if not 0 <= q <= 1:
        raise ValueError(f"expected q in [0, 1], got {q}")
    g = torch.Generator().manual_seed(seed)
    sets = torch.rand(chance.shape, generator=g) < chance                       # (N, C)
    return sets.scatter(1, y_true[:, None], True)


def read_candidates(path, images, class_names):
    """(sets (N, C) bool, one line about them), from the user's own file about the N images.

    JSON {image: [class, ...]}; or CSV: the image first, then its classes, in columns or separated
    by | or ;, or a 0/1 column for every class, whose names are the header. Classes are names (any
    case or underscores) or indices from 0: digits are an index unless a class is called so. Images
    are found by their path or the end of it, if only one ends so. Those without an entry get all
    classes: nothing is known of them. Raises DataError.
    """
    N, C, numbers = len(images), len(class_names), {}
    for k, c in enumerate(class_names):
        numbers.setdefault(_plain(c), []).append(k)     # ImageNet has two `missile`
    entries = {}                                        # {image: class indices}
    for where, image, cells in _candidate_rows(path, numbers):
        numeric = [cell for cell in cells if str(cell) in ("0", "1")]
        if len(numeric) == len(cells) == C > 2 and "0" not in numbers:
            raise DataError(f"{where}: rows of 0 and 1 need a first line `image,CLASS,CLASS,...`")
        chosen = {k for cell in cells for k in _candidate(cell, numbers, C, where)}
        if not chosen:
            raise DataError(f"{where}: expected at least one candidate class, got none")
        image = re.sub(r"^(\./+)+", "", _text(image).strip().replace("\\", "/"))
        if entries.setdefault(image, chosen) != chosen:
            raise DataError(f"{where}: {image!r:.60} occurs twice, with different classes")
    index = {}                                          # {end of a path: image, -1 if of several}
    for i, name in enumerate(images.names):
        for end in _ends(name):
            index[end] = -1 if end in index else i
    depth = max(name.count("/") for name in images.names)
    sets, seen = torch.ones(N, C, dtype=torch.bool), {}                         # (N, C)
    for image, chosen in entries.items():
        fits = {index[image]} if image in index else {      # or the path has more in front
            i for end in _ends(image, depth) for i in [index.get(end, -1)]
            if i >= 0 and images.names[i] == end}
        if len(fits) == 1 and -1 not in fits:
            i, = fits
            if seen.setdefault(i, image) != image:
                raise DataError(f"{path}: {image!r:.60} and {seen[i]!r:.60} are one image")
            sets[i] = torch.zeros(C, dtype=torch.bool).index_fill(0, torch.tensor([*chosen]), True)
    if not seen:
        raise DataError(f"{path}: none of its {len(entries)} images is among the {N} here; "
                        f"expected names like {images.names[0]!r:.60}, got "
                        f"{next(iter(entries), '')!r:.60}")
    line = f"{_text(os.path.basename(path))}: {describe_candidates(sets, images.y_true)}"
    if len(seen) < N:
        line += f"; {N - len(seen)} of {N} images have no entry: all classes"
    unknown = len(entries) - len(seen)
    return sets, line + (f"; entries of images not here: {unknown}" if unknown else "")


def _ends(path, depth=1000):
    """c.jpg, b/c.jpg and a/b/c.jpg of a/b/c.jpg; those with `depth` slashes at most."""
    parts = path.split("/")
    return ["/".join(parts[-k:]) for k in range(1, len(parts) + 1)[:depth + 1]]


HEADERS = ("", "path", "image", "file", "filename", "image_path", "img", "img_path", "name", "id")


def _candidate_rows(path, numbers):
    """(where, image, [class, ...]) of each entry of a JSON or CSV file."""
    if str(path).lower().endswith(".json"):
        found = read_json(path)
        if not isinstance(found, dict):
            raise DataError(f"{path}: expected {{image: [class, ...]}}, got {str(found)[:40]}")
        for image, cells in found.items():
            if not isinstance(cells, list):
                raise DataError(f"{path}: {image!r:.60}: expected a list of classes, got "
                                f"{json.dumps(cells)[:40]}")
            yield f"{path}: {image!r:.60}", image, cells
        return
    text = read_text(path)
    first = text.split("\n", 1)[0]
    rows = csv.reader(io.StringIO(text, newline=""), strict=True,
                      delimiter=next((c for c in ",\t;" if c in first), ","))
    table = None                                        # the classes of the 0/1 columns
    try:
        for k, row in enumerate(rows):
            image, *cells = [cell.strip() for cell in row] or [""]
            where = f"{path} line {rows.line_num}"
            if k == 0 and image.lower() in HEADERS:
                table = cells if cells and all(_plain(c) in numbers for c in cells) else None
            elif image or any(cells):
                if table and not (len(cells) == len(table) and set(cells) <= {"0", "1"}):
                    raise DataError(f"{where}: expected {len(table)} cells with 0 or 1")
                if table:
                    cells = [c for c, cell in zip(table, cells) if cell == "1"]
                yield where, image, [one for cell in cells for one in (
                    [cell] if _plain(cell) in numbers else re.split("[|;]", cell)) if one.strip()]
    except csv.Error as e:
        raise DataError(f"{path} line {rows.line_num}: not a row of a CSV file: {e}") from None


def _candidate(cell, numbers, C, where):
    """The class indices that a name or an index stands for."""
    name = _plain(cell) if isinstance(cell, str) else None
    if name in numbers:
        return numbers[name]
    if type(cell) is int or name and re.fullmatch("[0-9]{1,9}", name):
        if 0 <= int(cell) < C:
            return [int(cell)]
        raise DataError(f"{where}: expected class indices from 0 to {C - 1}, got {cell}")
    near = difflib.get_close_matches(str(name)[:100], numbers, n=1, cutoff=0)
    raise DataError(f"{where}: unknown class {cell!r:.60}, the closest is {near[0]!r}")


def describe_candidates(sets, y_true=None):
    """One line: mean size of the sets (N, C), their range, the share that holds y_true (N,)."""
    size = sets.sum(dim=1)                                                      # (N,)
    line = (f"{size.double().mean():.1f} candidate labels an image ({int(size.min())} to "
            f"{int(size.max())})")
    if y_true is None:
        return line
    inside = sets.gather(1, y_true[:, None]).double().mean()
    return line + f", the true one among them for {100 * float(inside):.2f} %"


def few_shot(images, K, seed):
    """Sorted indices of K images per class, drawn without replacement; all of a class with fewer.
    The seed decides, not the order in which the files were found. DataError without labels."""
    if images.y_true is None:
        raise DataError("--shots: a few-shot subset is drawn per class, but there are no labels")
    members = {}
    for i, (k, name) in enumerate(zip(images.y_true.tolist(), images.names)):
        members.setdefault(k, []).append((name, i))
    return sorted(i for k, rows in members.items() for _, i in
                  random.Random(f"{seed} {k}").sample(sorted(rows), min(K, len(rows))))


# ---- settings and scores, the same in every script ----

def natural(text, least=0):
    """argparse type: a whole number, `least` or more."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text}")
    return int(text)


positive = partial(natural, least=1)


def fraction(text):
    """argparse type: a number above 0, 1 at most."""
    try:
        if 0 < float(text) <= 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text}")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""
    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_common(parser, script, batch_size, images="images per step"):
    """The flags that all scripts share. --out is the first free folder unless given."""
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction}
    free = next(f"runs/{script}-{n}" for n in range(1, 10_000)
                if not os.path.exists(f"runs/{script}-{n}"))
    parser.set_defaults(script=script)                  # which --resume compares
    add("--data", default="demo", help="folder of images (see data.py), or demo[:STYLE]")
    add("--classes", help="class names: a,b,c or a file with one per line")
    add("--template", help="prompt with {} for the class name, or `ensemble`: the data set's and "
        "seven more; default: the data set's hand-crafted one")
    add("--arch", help="tiny, ViT-B/16, RN50, ...; default: tiny for the demo, else ViT-B/16")
    add("--weights", help="CLIP weights from disk (OpenAI, open_clip, Hugging Face), instead "
        "of a download; the architecture is inferred")
    add("--out", default=free, help="run folder")
    add("--seed", type=int, default=0, help="of all that is random")
    add("--device", help="cuda, cuda:1, mps, cpu; default: the best there is")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
        help="mixed precision; auto: bf16 or fp16 on CUDA, off elsewhere")
    add("--batch-size", type=positive, default=batch_size, help=f"{images}, of all processes")
    add("--workers", type=natural, help="loader processes; default: 0 for images in memory, "
        "else one per two cores, 4 at most")
    add("--cache", type=gigabytes, default=4, metavar="GB", help="memory for decoded images; "
        "if they need more they go to a temporary file; 0: decode them anew each time")
    add("--max-steps", type=positive, help="stop (each phase) there, to try things out")
    add("--resume", default=False, help="continue the run in --out", **switch)
    add("--overwrite", default=False, help="replace the run in --out", **switch)


def begin(args):
    """(device, data, frozen CLIP, its name) of the flags above."""
    device = pick_device(args.device)
    torch.manual_seed(args.seed)
    found = once(load, args.data, args.classes, args.template)
    arch = args.arch or ("tiny" if args.data.split(":")[0] == "demo" else "ViT-B/16")
    model, _ = in_turn(clip.load, args.weights or arch, device=device)
    if args.weights and args.arch:
        clip.check_architecture(model, args.arch)
    name = os.path.basename(args.weights) if args.weights else arch
    return device, found, model.requires_grad_(False), name


def pick_device(name=None):
    """torch.device of --device; without a name CUDA, then MPS, then CPU. DataError if unusable.
    Of several processes each takes a GPU of its own."""
    name = name or ("cuda" if torch.cuda.is_available() else
                    "mps" if torch.backends.mps.is_available() and world() == 1 else "cpu")
    if world() > 1 and name not in ("cuda", "cpu"):
        raise DataError(f"--device {name}: of several processes each takes its own, give cuda")
    try:
        if world() > 1 and name == "cuda":
            torch.cuda.set_device(name := f"cuda:{os.environ['LOCAL_RANK']}")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise DataError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from None


def precision(amp, device):
    """(autocast, GradScaler) of --amp. Weights are fp32 throughout; fp16 needs its loss scaled."""
    if amp == "auto":
        bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        amp = "bf16" if bf16 else "fp16" if device.type == "cuda" else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16" and device.type != "mps")
    if scaler.is_enabled():                             # its first steps often overflow
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    return (lambda: torch.autocast(device.type, dtype) if dtype else nullcontext()), scaler


def skipped(scaler, optimizer):
    """1 if fp16 overflowed and `scaler.step(optimizer)` has just left the step out, else 0; with a
    scaler at work a tensor on the device, which nothing has to wait for."""
    if not scaler.is_enabled():
        return 0
    return sum(scaler._found_inf_per_device(optimizer).values()).clamp(max=1).squeeze()


def above_zero(text):
    """argparse type: a number above 0."""
    try:
        if 0 < float(text) < math.inf:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")


def gigabytes(text):
    """argparse type: a number from 0 on."""
    try:
        if 0 <= float(text) < 1e9:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number of GB from 0, got {text}")


def check_label_order(found, accuracy):
    """Warns when the zero-shot accuracy (percent) on a known data set is so low that the labels are
    probably in another order than the class names. The line is at 5 times chance, 35 % at most: on
    EuroSAT's ten classes 38 % are published for CLIP RN50."""
    C = len(found.class_names)
    if found.title and accuracy is not None and accuracy < min(500 / C, 35):
        print(f"warning: {accuracy:.1f} % zero-shot on {found.title} is too little for {C} "
              f"classes: check that label k means class name k (`python data.py PATH` shows both), "
              f"that the split file belongs to these images, and the weights", file=sys.stderr)


def auroc(score, right):
    """Probability that a right label scores above a wrong one, a tie counting half; None if there
    are no right or no wrong ones. score (N,), right (N,) bool."""
    values, rank = score.double().unique(return_inverse=True)
    n = torch.bincount(rank, minlength=len(values)).double()                    # images per value
    mean_rank = (n.cumsum(0) - (n - 1) / 2)[rank]                               # (N,)
    a, b = int(right.sum()), int((~right).sum())
    area = mean_rank[right].sum() - a * (a + 1) / 2
    return round(float(area / (a * b)), 4) if a and b else None


# ---- several processes ----
# torchrun starts them. Each has all weights and tables and draws the same random numbers; it
# encodes its share of the images. With one process nothing here does anything.

def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Which one this is; the first, 0, prints, writes and downloads."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_world():
    """How many of them are on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if world() > 1 else 1


def share(items):
    """This process's part, contiguous, of a list."""
    n = len(items)
    return items[n * rank() // world():n * (rank() + 1) // world()]


def join(args):
    """Joins the processes that torchrun has started: NCCL between GPUs, Gloo between CPUs."""
    n = int(os.environ.get("WORLD_SIZE", 1))
    if n == 1:
        return
    gpu = torch.cuda.is_available() and (args.device or "cuda").startswith("cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=1))
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
    if args.batch_size % n:
        raise DataError(f"--batch-size {args.batch_size} cannot be divided by {n} processes")
    args.out = once(str, args.out)                      # which may be a free one's name


def once(f, *args):
    """f(*args) of the first process, for all."""
    result = [f(*args) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


def in_turn(f, *args, **how):
    """f(*args), which may download: first process, then each other machine's first, then all."""
    turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for k in range(3):
        if k == turn:
            result = f(*args, **how)
        total(torch.zeros(1))                           # wait for each other
    return result


def total(table):
    """The sum, in place, of all processes' tables: exact where one holds a row and the others 0."""
    if world() > 1:
        dist.all_reduce(table)
    return table


class _Gather(torch.autograd.Function):
    """All processes then compute the same loss from the same tensor, so the sum of their gradients
    is `world()` times the own one, and DistributedDataParallel's mean that of one process."""
    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return share(grad) * world()


def gather(x):
    """All processes' x (B / processes, ...), with its gradient -> (B, ...)."""
    return _Gather.apply(x) if world() > 1 else x


def parallel(module):
    """The module with its gradients averaged over the processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # newer versions call it otherwise
        return DistributedDataParallel(module, broadcast_buffers=False) if world() > 1 else module


def average_gradients(optimizer):
    """The same by hand, for gradients that all processes have computed from the same batch: keeps
    them equal to the last bit."""
    for v in (v for group in optimizer.param_groups for v in group["params"] if world() > 1):
        total(v.grad.div_(world()))


# ---- command line and run folder ----

def command_line(adapt, args):
    """Runs a script. Returns the exit status: 0, 2 for a mistake of the user's, 130 if stopped.

    Ctrl-C and SIGTERM let the step under way finish, and save it (see `Run.steps`); outside the
    steps, or the second time, they end the run at once. So do they with several processes.
    """
    Run.inside = Run.asked = False

    def stop(*_):
        if Run.asked or not Run.inside:
            raise KeyboardInterrupt
        Run.asked = True
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(s, stop)
    status, says = 2, ""
    try:
        join(args)
        if world() > 1:
            end_at_once(args.out)
        adapt(args)
        if world() > 1:
            dist.destroy_process_group()
        return 0
    except (DataError, clip.CLIPError, OSError) as e:
        says = f"error: {e}"
    except torch.cuda.OutOfMemoryError:
        says = f"error: out of GPU memory, lower --batch-size {args.batch_size}"
    except KeyboardInterrupt:
        status, says = 130, "stopped; " + whats_left(args.out)
    except Exception as e:                              # a mistake of ours, or a process that left
        lost = Run.asked and "DataLoader worker" in str(e)      # SIGTERM ended one of the loader's
        if world() == 1 and not lost:
            raise
        if lost:
            status, says = 130, "stopped; " + whats_left(args.out)
        elif re.search("(?i)gloo|nccl|closed by peer|reset by peer", str(e)):
            time.sleep(2)                               # torchrun is about to end this one
            says = "error: another process has ended"
        else:
            status, says = 1, traceback.format_exc()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
    if rank():
        time.sleep(1)                                   # what all meet, the first one says
        says = f"process {rank()}: {says}"
    print(says, file=sys.__stderr__ if rank() else sys.stderr, flush=True)
    if world() > 1:
        os._exit(status)                                # to tidy up it would wait for the others
    return status


def whats_left(out):
    """What a stopped run can go on from."""
    return (f"--resume --out {out} continues it" if os.path.isfile(f"{out}/last.pt") else
            f"no epoch is done yet, --resume --out {out} begins again")


def end_at_once(out):
    """Several processes: a signal ends this one even where it waits, in C++, for the others."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda *_: None)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def wait():
        while ours.recv(1)[0] not in (signal.SIGINT, signal.SIGTERM):
            pass
        if rank() == 0:
            print(f"stopped; the last finished epoch stays: {whats_left(out)}",
                  file=sys.__stderr__, flush=True)
        theirs.close()
        os._exit(130)
    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def replacing(path, mode="wb", **how):
    """A file to write that takes the place of `path` when it is complete and on the disk: until
    then the former one stays. DataError if it cannot be written. Only the first process writes."""
    part, gone = Path(f"{path}.tmp" if rank() == 0 else os.devnull), rank() > 0
    try:
        with open(part, mode, **how) as file:
            yield file
            file.flush()
            if not gone:
                os.fsync(file.fileno())
        if not gone:
            os.replace(part, path)
            gone = True
    except (OSError, RuntimeError) as e:                # torch.save hides the OSError
        reason = e
        while not isinstance(reason, OSError) and reason.__context__:
            reason = reason.__context__
        if not isinstance(reason, OSError):
            raise
        raise DataError(f"cannot write {path}: {reason.strerror or reason}") from None
    finally:
        with suppress(OSError):
            gone or part.unlink()


class Run:
    """The run folder (args.json, log.jsonl, last.pt), the clock and the line on the screen. Of
    several processes the first one writes."""
    inside = asked = False              # in the steps; asked to stop after this one

    def __init__(self, out, args, resume=False, overwrite=False):
        self.out, self.start, self.shown, self.state = Path(out), time.time(), 0.0, None
        self.lines, self.seen, self.busy = [args], 0, 0.0       # images, seconds of training
        if resume:
            self.read_state()
            other = [k for k, v in self.lines[0].items()
                     if k not in ("resume", "overwrite", "out", "device", "workers", "cache")
                     and args.get(k) != v]
            if other:
                raise DataError(f"--resume: {self.out} was begun with other settings: "
                                     + ", ".join(f"{k} {self.lines[0][k]}" for k in other))
        elif rank() == 0 and (self.out / "args.json").exists() and not overwrite:
            raise DataError(f"{self.out} already holds a run: give --resume to continue it, "
                                 f"--overwrite to replace it, or another --out")
        if rank() == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            old = () if resume else (self.out / name for name in (
                "last.pt", "model.pt", "predictions.csv", "pseudo_labels.png", "disambiguated.csv"))
            for file in (*old, *self.out.glob("*.tmp")):
                file.unlink(missing_ok=True)
        self.write("args.json", json.dumps(self.lines[0], indent=2) + "\n")
        self.log()

    def read_state(self):
        """--resume: what last.pt holds; a run without one, but with args.json, begins again."""
        path = self.out / "last.pt"
        if not path.is_file():
            if not (self.out / "args.json").is_file():
                raise DataError(f"--resume: no args.json in {self.out}, nothing to continue")
            self.lines = [read_json(self.out / "args.json")]
            return
        try:
            if not zipfile.is_zipfile(path):            # weights_only had holes in older formats
                raise ValueError("not written by this version's torch.save")
            self.state = torch.load(path, map_location="cpu", weights_only=True)
            self.lines, self.start = self.state["log"], self.start - self.state["seconds"]
            self.seen, self.busy = self.state["clock"]
        except Exception as e:                          # torch.load raises nearly anything
            raise DataError(f"{path} is not a checkpoint of this script: {_reason(e)}") from None

    def restore(self, parts):
        """Gives each of {name: module, optimizer, ...} its state; the rest of last.pt."""
        state, self.state = self.state, None
        for name, part in parts.items():
            if state[name]:                             # not of a scaler that had nothing to do
                part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        return state

    def checkpoint(self, parts, **more):
        """last.pt: the parts, the rest, the log so far. If asked to stop, the run ends here."""
        rng = self.rng if Run.asked else torch.get_rng_state()  # a transform may have been at work
        self.save("last.pt", {**more, **{k: part.state_dict() for k, part in parts.items()},
                              "rng": rng, "clock": [self.seen, self.busy], "log": self.lines,
                              "seconds": time.time() - self.start})
        if Run.asked:
            raise KeyboardInterrupt

    def write(self, name, text):
        if rank() == 0:
            with replacing(self.out / name, "w", encoding="utf-8") as file:
                file.write(text)

    def log(self, **line):
        self.lines += [line] if line else []
        self.write("log.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    def save(self, name, content):
        """An interrupted write leaves the previous file intact."""
        if rank() == 0:
            with replacing(self.out / name) as file:
                torch.save(content, file)

    def steps(self, batches, images):
        """Passes on the batches of an epoch, of so many images, until it is asked to stop."""
        self.mark, self.rng = (time.time(), Batches.waited), torch.get_rng_state()
        try:
            for batch in batches:
                Run.inside = True
                yield batch
                self.seen, self.rng = self.seen + images, torch.get_rng_state()
                Run.inside = False
                if Run.asked:
                    break
        except KeyboardInterrupt:                       # while it waited for a batch
            Run.asked = True

    def speed(self):
        """Images per second of training, of all processes; in the steps."""
        return self.seen / (self.busy + time.time() - self.mark[0])

    def read(self, rows, where, step, lower):
        """The epoch's steps, each {name: number or 0-dim tensor}, as numbers; their means. Ends the
        run if a loss is not finite: `where`, the last `step`, the flag that wants lowering."""
        rows = [{k: float(v) for k, v in row.items()} for row in rows]
        seconds = time.time() - self.mark[0]            # the device has nothing left to do
        self.busy += seconds
        self.check([row["loss"] for row in rows], where, step, lower)
        facts = {k: round(sum(row[k] for row in rows) / len(rows), 4) for k in (rows or [{}])[0]}
        waited = (Batches.waited - self.mark[1]) / max(seconds, 1e-9)
        return rows, {**facts, "skipped": round(sum(row["skipped"] for row in rows)),
                      "waiting": round(min(waited, 1), 3)}

    def check(self, losses, where, step, lower):
        """DataError if one of these losses, of the steps up to `step`, is not finite."""
        bad = [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            kept = "holds the last good epoch" if (self.out / "last.pt").exists() else "is absent"
            raise DataError(f"the loss became {losses[bad[0]]} in {where}, step "
                            f"{step - len(losses) + 1 + bad[0]}: lower {lower}; last.pt {kept}")

    def epoch(self, at, epochs, device, loss, skipped, waiting, **facts):
        """The line of an epoch, in log.jsonl and printed; at: {"phase": if any, "epoch"}."""
        facts = {"loss": loss, **facts, "skipped": skipped, "waiting": waiting,
                 **self.totals(device)}
        self.log(**at, **facts)
        shown = {k: v for k, v in facts.items() if v is not None and k not in (
            "seconds", "images_per_second") and (v or k != "skipped")}
        percent = ("accuracy", "disambiguation", "supervised")
        self.say(" ".join(f"{k} {v}" for k, v in at.items()) + f"/{epochs}" + "".join(
            f"  {k} {v:.2f} %" if k in percent else f"  {k} {v:.4g}" for k, v in shown.items())
            + f"  {facts['images_per_second']} img/s")

    def totals(self, device):
        """What it took so far."""
        return {"seconds": round(time.time() - self.start, 1),
                "images_per_second": round(self.seen / self.busy) if self.busy else None,
                "peak_memory_gb": peak_memory_gb(device)}

    def live(self, text):
        """A line, text(), that the next one overwrites; on a terminal only, and not always."""
        if sys.stdout.isatty() and time.time() - self.shown > 0.2:
            print(f"\r{text()[:99]:<99}", end="", flush=True)
            self.shown = time.time()

    def say(self, text):
        print(f"\r{text:<99}" if sys.stdout.isatty() else text, flush=True)


def peak_memory_gb(device):
    """Peak memory in GB: of the GPU, or of this process on a CPU; None where that is not known."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    try:
        import resource
    except ImportError:                                 # Windows
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20     # bytes there, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 3)


def write_predictions(path, names, class_names, p, p_clean):
    """predictions.csv: a row per image; p (N, C) softmax, p_clean (N, C) of the chosen class."""
    confidence, y = p.max(dim=1)
    rows = zip(names, (class_names[k] for k in y), confidence.tolist(),
               p_clean.gather(1, y[:, None])[:, 0].tolist())
    with replacing(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "class", "confidence", "p_clean"])
        table.writerows((n, c, f"{a:.4f}", f"{b:.4f}") for n, c, a, b in rows)


def draw_sheet(path, titles, rows, cell=56, columns=8):
    """A picture of two blocks side by side, under two titles. rows: [(name, (images, images))], 40
    rows and 8 PIL images in each half at most."""
    left, right = 110, 110 + columns * cell + 10
    sheet = Image.new("RGB", (right + columns * cell, 18 + min(len(rows), 40) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for x0, title in zip((left, right), titles):
        pen.text((x0, 3), title, "black")
    for top, (name, halves) in zip(range(18, 18 + 40 * cell, cell), rows):
        pen.text((4, top + cell // 2 - 6), name[:17], "black")
        for x0, pictures in zip((left, right), halves):
            for j, picture in enumerate(pictures[:columns]):
                sheet.paste(ImageOps.fit(picture, (cell - 2, cell - 2)), (x0 + j * cell, top))
    with replacing(path) as file:
        sheet.save(file, "PNG")


def pseudo_label_sheet(path, images, class_names, p, p_clean):
    """pseudo_labels.png: a row per class; left the labels with the highest p_clean, right the
    rejected ones (p_clean < 1/2), worst first. p, p_clean (N, C)."""
    y = p.argmax(dim=1)
    q = p_clean.gather(1, y[:, None])[:, 0]                                     # (N,)

    def best(mine, score):
        mine = mine.nonzero()[:, 0]                                             # their indices
        return [images.image(i) for i in mine[score[mine].argsort()][:8].tolist()]
    rows = [(name, (best((y == k) & (q > 0.5), -q), best((y == k) & (q <= 0.5), q)))
            for k, name in enumerate(class_names[:40])]
    draw_sheet(path, ("accepted, cleanest first", "rejected, worst first"), rows)


# ---- main ----

def contact_sheet(path, found):
    """A contact sheet of up to 8 training images (left) and 8 test images (right) per class."""
    def some(images, k):
        mine = (range(len(images)) if images.y_true is None else
                (images.y_true == k).nonzero()[:, 0].tolist())
        steps = torch.linspace(0, len(mine) - 1, 8).long().unique() if mine else ()
        return [images.image(mine[i]) for i in steps]
    labelled = found.test.y_true is not None
    rows = [(name if labelled else "", (some(found.train, k), some(found.test, k)))
            for k, name in enumerate(found.class_names[:40 if labelled else 1])]
    draw_sheet(path, ("training images", "test images"), rows)


class Decoded(Dataset):
    """As torchvision's ImageFolder: each image decoded anew, with a transform for each view."""
    def __init__(self, images, transforms):
        self.images, self.transforms = images, transforms

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images.image(i)
        return (*(t(image) for t in self.transforms), i)


def measure_speed(found, size=224, workers=2):
    """Prints images per second of a weak and a strong view of the training images, here and with
    torchvision's transforms on freshly decoded images; and whether test images are CLIP's."""
    bicubic = T.InterpolationMode.BICUBIC
    end = [T.ToTensor(), T.Normalize(MEAN, STD)]
    usual = [T.Compose([T.RandomResizedCrop(size, area, interpolation=bicubic),
                        T.RandomHorizontalFlip(), *more, *end])
             for area, more in (((0.6, 1), []), ((0.4, 1), [T.RandAugment(2, 9)]))]

    plain = DataLoader(Decoded(found.train, usual), 64, shuffle=True, num_workers=workers,
                       persistent_workers=True)
    test, weak, strong = views = transforms(size)
    print(keep_decoded(found, views, 4))
    ours = loader(found.train.view(weak, strong), 64, shuffle=True, workers=workers)
    for name, batches in (("plain", plain), ("here", ours)):
        for epoch in (1, 2, 3):
            start = time.time()
            for _ in batches:
                pass
            print(f"{name:5} epoch {epoch}: {len(found.train) / (time.time() - start):5.0f} "
                  f"images/s (two {size} x {size} views of each, {workers} loader processes)")
    preprocess = T.Compose([T.Resize(size, bicubic), T.CenterCrop(size), *end])
    some = list(range(0, len(found.test), max(1, len(found.test) // 200)))
    batches = loader(found.test.view(test), 1, subset=some + some)      # decoded, then kept
    same = all(torch.equal(x[0], preprocess(found.test.image(int(i)))) for x, i in batches)
    print(f"test tensors of {len(some)} images are bit for bit CLIP's: {same}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="A first look at a data set: what is found, five samples, a contact sheet.")
    add = parser.add_argument
    add("path", help="folder, or demo[:STYLE]")
    add("--classes", help="a,b,c or a file with one class name per line")
    add("--template", help="prompt with {} for the class name, or `ensemble`")
    add("--prompts", metavar="FILE", help="check LLM-written sentences (JSON) against the classes")
    add("--candidates", metavar="FILE", help="check candidate labels (JSON or CSV)")
    add("--shots", type=positive, metavar="K", help="show a few-shot subset of the training images")
    add("--seed", type=int, default=0, help="of --shots")
    add("--sheet", metavar="FILE", default="contact_sheet.png", help="the picture that is written")
    add("--speed", action="store_true", help="measure the loader against a plain one instead")
    args = parser.parse_args(argv)
    try:
        found = load(args.path, args.classes, args.template)
        print(found.description)
        if args.speed:
            measure_speed(found)
            return 0
        names = found.class_names
        print(f"classes: {', '.join(names)}")
        print(f"prompts: {' | '.join(t.format(names[0]) for t in found.templates)}")
        if args.prompts is not None:
            print(load_prompts(args.prompts, names, found.templates[0])[1])
        if args.candidates is not None:
            print(read_candidates(args.candidates, found.train, names)[1])
        if args.shots:
            found.train = found.train.subset(few_shot(found.train, args.shots, args.seed))
            print(f"--shots {args.shots} --seed {args.seed}: {len(found.train)} training images")
        for part, images in {"train": found.train, "test": found.test}.items():
            if part == "test" and images is found.train:
                continue                                # shown already
            if images.y_true is not None:
                n = torch.bincount(images.y_true, minlength=len(names))
                print(f"{part:5}  {int(n.min())} ({names[n.argmin()]}) to {int(n.max())} "
                      f"({names[n.argmax()]}) images per class")
            for i in torch.linspace(0, len(images) - 1, min(5, len(images))).long().tolist():
                label = "?" if images.y_true is None else names[images.y_true[i]]
                print(f"{part:5}  {label:20}  {images.names[i]}")
        contact_sheet(args.sheet, found)
        print(f"contact sheet: {args.sheet}")
    except (DataError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
