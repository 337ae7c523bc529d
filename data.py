"""Finds the images and the class names in a folder; decodes, augments and batches them.

    dataset = load("./oxford_pets")
    plain, weak, strong = transforms(224)
    for x, x_strong, index in DeviceLoader(dataset.train.view(weak, strong), 64, shuffle=True):

Layouts, tried in this order (`python data.py PATH` prints which one it took):
1. `demo`, `demo:STYLE`      drawn on the fly (clip/shapes.py)
2. CoOp's                    split_zhou_*.json (its val part is not used); its lists of Aircraft
3. torchvision's             a folder that one of its data-set classes reads, see `SETS`; if PATH
                             (say ./oxford_pets) is not there, torchvision downloads it (not Cars)
4. `train/` + `test|val/`    each with a folder per class (labelled) or with images (unlabelled)
5. a folder per class        a fifth of the images, chosen by a hash of the paths, is the test set
6. images and `--classes`    unlabelled, in sub-folders too, or a single file: training and test
                             set are the same

Label firewall: `Images.view(...)`, which training reads, holds no labels. `Images.y_true` is for
accuracy and diagnostics, and where a flag asks for labels: --shots, candidate sets."""
import argparse
import base64
import csv
import gc
import hashlib
import html
import io
import itertools
import json
import math
import mmap
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # large pages: normalize takes half the time
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

import clip
from clip import shapes
from clip.clip import MEAN, STD, to_rgb

ENSEMBLE = ("itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
            "a {} in a video game.", "art of the {}.", "a photo of the small {}.")  # CLIP's best 7
EXTENSIONS = tuple(".jpg .jpeg .png .ppm .pgm .bmp .tif .tiff .webp .gif .jfif".split())
UNREAD = ".heic", ".heif", ".avif"              # a phone's, which are warned of and skipped
SPLITS = ("train", "test", "val", "valid", "validation")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")      # no EPS: Pillow would run it
MOST_OPENED = 200_000           # with more images than that, none is opened before it is needed
WORDNET_ID = re.compile(r"n\d{8}")
warnings.filterwarnings("ignore", module=r"PIL\.")      # about odd but readable files
CURVES = {"accuracy": (1, "#0b5fc5"), "disambiguation": (1, "#7a3e9d"), "kept": (100, "#c8511b"),
          "precision": (100, "#2e8540"), "unfiltered": (100, "#767676")}       # to percent, color


class DataError(ValueError):
    """A mistake in the user's data or arguments; its message says what was expected and where."""


# ---- images ----

def decode(path, draft=False):
    """The image as PIL RGB, not rotated by EXIF, as CLIP's preprocess. draft: a JPEG 8x smaller."""
    with Image.open(path, formats=FORMATS) as image:
        if image.mode == "F":
            raise DataError("pixels of floats, which have no common scale")
        if draft:
            image.draft("RGB", (1, 1))
        return to_rgb(image)


class Images(Dataset):
    """N images: the files `root/names[i]`, or the PIL images `pictures`. y_true: their classes (N,)
    int64 if they are known, else None; for accuracy and diagnostics only."""
    def __init__(self, names, y_true=None, root=None, pictures=None):
        self.names, self.root, self.pictures = names, root, pictures
        self.caches = {}                                # see `cache_pixels`
        self.y_true = None if y_true is None else torch.as_tensor(y_true, dtype=torch.long)   # (N,)

    def __getstate__(self):                             # spawned processes do not share the caches
        return {**self.__dict__, "caches": {}}

    def __len__(self):
        return len(self.names)

    def image(self, i):
        """Image i as PIL RGB; grey, with a warning, if the file cannot be read."""
        if self.pictures is not None:
            return self.pictures[i].convert("RGB")
        try:
            return decode(os.path.join(self.root, self.names[i]))
        except Exception as e:                          # Pillow's plugins raise nearly anything
            print(f"warning: grey instead of {self.names[i]}: {reason(e)}", file=sys.stderr)
            return Image.new("RGB", (256, 256), "grey")

    def subset(self, indices):
        """The images `indices`, in that order."""
        indices = [int(i) for i in indices]
        return Images([self.names[i] for i in indices],
                      None if self.y_true is None else self.y_true[indices], self.root,
                      None if self.pictures is None else [self.pictures[i] for i in indices])

    def view(self, *transforms):
        """These images as a torch Dataset without labels, see `__getitem__`."""
        view = Images(self.names, None, self.root, self.pictures)       # the label firewall
        view.caches, view.transforms = self.caches, transforms
        return view

    def __getitem__(self, item):
        """Of a view: (i, seed) -> (t1(image i), t2(image i), ..., i), with the random numbers of
        the transforms drawn from `seed`; torch's global random state is left as it was."""
        i, seed = item
        prepare = self.transforms[0].prepare            # the same for all of them
        cache = self.caches.get(prepare)
        pixels = cache.get(i, self.image) if cache else prepare(self.image(i))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)   # torch.manual_seed takes 50x longer
            views = [t(pixels) for t in self.transforms]
        return (*views, i)


@dataclass
class Data:
    """What `load` found. description is one line: layout, classes, split, counts, template."""
    train: Images
    test: Images
    class_names: list           # C strings, as they go into the prompt
    templates: list             # prompts with one {} for the class name
    description: str
    name: str                   # CoOp's name of a public data set, "demo", or ""


# ---- transforms and batches ----
# A transform has two halves: `prepare` turns the decoded image into uint8 pixels, always the same
# for an image, so that they can be cached; calling the transform does the random rest.

def to_pixels(image):
    """PIL RGB image -> (H, W, 3) uint8."""
    return T.functional.pil_to_tensor(image).permute(1, 2, 0)


def resize(x, shape):
    """(H, W, 3) uint8 -> (*shape, 3) uint8; bicubic."""
    x = x.permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)  # (1, 3, H, W)
    return F.interpolate(x, shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0)


class Square(NamedTuple):
    """CLIP's own preprocess up to the pixels: short side to `size`, bicubic, central square."""
    size: int

    def __call__(self, image):
        image = T.functional.resize(image, self.size, T.InterpolationMode.BICUBIC)
        return to_pixels(T.functional.center_crop(image, self.size))


class Short(NamedTuple):
    """The short side reduced to `size` where it is longer: what random crops are taken from."""
    size: int

    def __call__(self, image):
        x, r = to_pixels(image), self.size / min(image.size)
        return x if r >= 1 else resize(x, [max(1, round(side * r)) for side in x.shape[:2]])


class Plain(NamedTuple):
    """CLIP's preprocess, or its mirror image. (H, W, 3) -> (R, R, 3), both uint8."""
    prepare: Square
    mirror: bool = False

    def __call__(self, x):
        return x.flip(1) if self.mirror else x


class Augment(NamedTuple):
    """A random crop with an area in `area` of the picture, mirrored in half the cases if `flip`;
    then torchvision's RandAugment, if asked for. (H, W, 3) -> (R, R, 3), both uint8."""
    prepare: Short
    size: int
    area: tuple
    flip: bool
    randaugment: bool = False

    def __call__(self, x):
        top, left, h, w = T.RandomResizedCrop.get_params(x.permute(2, 0, 1), self.area,
                                                         (3 / 4, 4 / 3))
        x = resize(x[top:top + h, left:left + w], (self.size, self.size))      # (R, R, 3)
        if self.flip and torch.rand(()) < 0.5:
            x = x.flip(1)
        if self.randaugment:
            x = to_pixels(T.RandAugment(num_ops=2, magnitude=9)(Image.fromarray(x.numpy())))
        return x


def transforms(size, flip=True):
    """(plain, weak, strong) for images of size x size pixels; see `Plain` and `Augment`."""
    short = Short(round(size * 256 / 224))
    return (Plain(Square(size)), Augment(short, size, (0.6, 1.0), flip),
            Augment(short, size, (0.4, 1.0), flip, randaugment=True))


def normalize(x):
    """uint8 (B, R, R, 3) -> CLIP's floats (B, 3, R, R), channels last, the same bits."""
    mean, std = (torch.tensor(v).repeat(x.shape[2]).to(x.device) for v in (MEAN, STD))  # (3 R,)
    out = torch.empty(x.shape, device=x.device)
    few = 2**15 // len(mean) if x.device.type == "cpu" else x.numel()       # stay in a core's cache
    for pixels, floats in zip(x.view(-1, len(mean)).split(few), out.view(-1, len(mean)).split(few)):
        torch.div(pixels, 255, out=floats).sub_(mean).div_(std)             # rows R G B R G B ...
    out = out.permute(0, 3, 1, 2)
    return out.contiguous() if x.device.type == "mps" else out      # whose BatchNorm was wrong


class PixelCache:
    """Pixels of N images as one `prepare` makes them, in memory that the loader's processes share
    and fill as images are first asked for. Long ones, of over 2 size^2 pixels, are left out."""
    def __init__(self, N, prepare):
        room = 3 * prepare.size * 2 * prepare.size      # bytes of an image; unused cost none
        self.prepare = prepare
        self.memory = torch.frombuffer(mmap.mmap(-1, N * room), dtype=torch.uint8).view(N, room)
        self.shapes = torch.frombuffer(mmap.mmap(-1, 8 * N), dtype=torch.int32).view(N, 2)  # or 0

    def get(self, i, image):
        """(H, W, 3) uint8; image(i) is decoded the first time only."""
        h, w = self.shapes[i].tolist()
        if h * w > 0:                                   # another process may have written h alone
            return self.memory[i, :3 * h * w].view(h, w, 3)
        x = self.prepare(image(i))
        if x.numel() <= self.memory.shape[1]:
            self.memory[i, :x.numel()] = x.flatten()
            self.shapes[i] = torch.tensor(x.shape[:2])
        return x


def cache_pixels(dataset, transforms, gb):
    """Decodes each image once per kind of `prepare`, if `gb` GB suffice (at 3:2); says so."""
    plain, *_, augmented = (t.prepare for t in transforms)
    wanted = {(dataset.train, augmented), (dataset.train, plain), (dataset.test, plain)}
    need = sum(4.5 * prepare.size ** 2 * len(images) for images, prepare in wanted) / 2**30
    need *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # soon each process has most of them
    if need > gb:
        return f"images are decoded anew each time: to keep them takes --cache {math.ceil(need)}"
    for images, prepare in wanted:
        images.caches[prepare] = PixelCache(len(images), prepare)
    return f"images are decoded once and their pixels kept: about {need:.1f} GB"


class EpochSampler(Sampler):
    """The batches of each epoch, lists of (index, seed), from (seed, epoch) alone. Of several
    processes each takes its shard of every batch. `among`: the images that a shuffled epoch of
    unchanged length draws from; empty: all."""
    def __init__(self, n, batch_size, shuffle=False, seed=0, epoch=0):
        self.n, self.batch_size, self.shuffle = n, batch_size, shuffle
        self.seed, self.epoch, self.among = seed, epoch, []
        whole = batch_size if n >= batch_size else world_size()
        self.used = n - n % whole if shuffle else n     # shuffled: whole batches, but leave one

    def __len__(self):
        return math.ceil(self.used / self.batch_size)

    def __iter__(self):
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        seeds = torch.randint(2**62, (self.n,), generator=rng).tolist()
        order = torch.randperm(self.n, generator=rng).tolist() if self.shuffle else range(self.n)
        items = [(i, seeds[i]) for i in order[:self.used]]
        if self.among:                                  # each as often as the others, or once more
            n, times = len(self.among), math.ceil(self.used / len(self.among))
            drawn = torch.cat([torch.randperm(n, generator=rng) for _ in range(times)])
            items = [(self.among[k], seed) for k, seed in zip(drawn[:self.used].tolist(), seeds)]
        for k in range(0, self.used, self.batch_size):
            size = min(self.batch_size, self.used - k)
            first, last = (k + size * r // world_size() for r in (rank(), rank() + 1))
            if first < last:                            # a table's last batch may be short
                yield items[first:last]


class DeviceLoader(DataLoader):
    """Batches (x1, x2, ..., index) of a view of N images: the x normalised floats (B, 3, R, R) on
    the device, index (B,) on the CPU. Its processes send uint8. epoch: where a run resumes."""
    def __init__(self, view, batch_size, shuffle=False, seed=0, workers=0, device="cpu", epoch=0,
                 pin=True):
        self.N, self.device = len(view), torch.device(device)
        super().__init__(
            view, num_workers=workers, worker_init_fn=worker_init,
            batch_sampler=EpochSampler(self.N, batch_size, shuffle, seed, epoch),
            pin_memory=pin and self.device.type == "cuda",
            persistent_workers=shuffle and workers > 0,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            generator=torch.Generator().manual_seed(0))         # not the global one

    def __iter__(self):
        for n, (*views, index) in enumerate(super().__iter__(), 1):
            yield (*(normalize(x.to(self.device, non_blocking=self.pin_memory))
                     for x in views), index)
            if not self.batch_sampler.shuffle and sys.stdout.isatty():  # training: `Run.steps`
                print(f"\r{f'looking at images, batch {n} of {len(self)}':<99}", end="", flush=True)


def worker_init(_):
    """A loader process leaves Ctrl-C, which reaches them all, to the one that it works for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- layouts ----

class Known(NamedTuple):
    """A public data set, as CoOp or torchvision lays it out."""
    folders: tuple = ("",)      # called so by CoOp, and (the last one) by torchvision; or own
    template: str = "a photo of a {}."          # CoOp's hand-crafted prompt
    split: str = ""             # CoOp's split_zhou_*.json
    images: str = ""            # the folder that the split's paths are relative to
    rename: dict = {}           # class folder -> class name; None: not a class
    kind: str = ""              # torchvision's class, which downloads
    parts: tuple = ({"split": "train"}, {"split": "test"})      # and reads, with these arguments
    keeps: str = "_image_files"         # files (beside _labels); _samples; "data" (and .targets)
    clean: Callable = str       # its class name -> CoOp's


ARRAYS = ({"train": True}, {"train": False})
SETS = (
    Known(("imagenet", "ilsvrc2012"), images="images"),
    Known(("caltech-101", "caltech101"), split="Caltech101", images="101_ObjectCategories",
          rename={"BACKGROUND_Google": None, "Faces_easy": None, "Faces": "face", "Leopards":
                  "leopard", "Motorbikes": "motorbike", "airplanes": "airplane"},
          kind="Caltech101", parts=()),
    Known(("oxford_pets", "oxford-iiit-pet"), "a photo of a {}, a type of pet.",
          "OxfordPets", "images", {"annotations": None}, "OxfordIIITPet",
          ({"split": "trainval"}, {"split": "test"}), "_images", str.lower),
    Known(("stanford_cars",), split="StanfordCars", kind="StanfordCars", keeps="_samples",
          clean=lambda name: " ".join([name.split()[-1], *name.split()[:-1]])),
    Known(("oxford_flowers", "flowers-102"), "a photo of a {}, a type of flower.",
          "OxfordFlowers", "jpg", kind="Flowers102"),
    Known(("food-101",), "a photo of {}, a type of food.", "Food101", "images", kind="Food101"),
    Known(("fgvc_aircraft", "fgvc-aircraft-2013b"), "a photo of a {}, a type of aircraft.",
          kind="FGVCAircraft"),
    Known(("sun397", "SUN397"), split="SUN397", images="SUN397", kind="SUN397",
          parts=({},), clean=lambda name: " ".join(reversed(name.split("/")))),
    Known(("dtd",), "{} texture.", "DescribableTextures", "images", kind="DTD"),
    Known(("eurosat",), "a centered satellite photo of {}.", "EuroSAT", "2750",
          {"AnnualCrop": "Annual Crop Land", "Highway": "Highway or Road",
           "HerbaceousVegetation": "Herbaceous Vegetation Land", "Pasture": "Pasture Land",
           "Industrial": "Industrial Buildings", "PermanentCrop": "Permanent Crop Land",
           "Residential": "Residential Buildings", "SeaLake": "Sea or Lake"}, "EuroSAT", ()),
    Known(("ucf101",), "a photo of a person doing {}.", "UCF101", "UCF-101-midframes"),
    Known(("cifar10", "cifar-10-batches-py"), kind="CIFAR10", parts=ARRAYS, keeps="data"),
    Known(("cifar100", "cifar-100-python"), kind="CIFAR100", parts=ARRAYS, keeps="data"),
    Known(("mnist", "MNIST"), 'a photo of the number: "{}".', kind="MNIST", parts=ARRAYS,
          keeps="data", clean=lambda name: name.split(" - ")[1]),       # "7 - seven"
    Known(("imagenette", "imagenette2"), kind="Imagenette", keeps="_samples",
          parts=({"split": "train"}, {"split": "val"}), clean=lambda names: names[0]),
)
BY_NAME = {name: known for known in SETS
           for name in (*known.folders, f"split_zhou_{known.split}.json")}
EXPECTED = f"""Expected one of
  DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or val)
  DIR/CLASS/*.jpg
  DIR/*.jpg and --classes FILE|a,b,c
  a data set as CoOp, with split_zhou_*.json, or torchvision lays it out:
  {', '.join(known.folders[0] for known in SETS)}"""


# The reader of a layout returns a text for the description, the class names (None if only --classes
# can tell), the training images and the test images.

def read_coop(file, images):
    """split_zhou_*.json: {"train": [[path, label, class name], ...], "val": ..., "test": ...}, the
    paths relative to the folder `images`."""
    split, names, parts = read_json(file), {}, []
    try:
        for part in ("train", "test"):
            files = [f"{images}/{path}".lstrip("/") for path, _, _ in split[part]]
            parts.append(Images(files, [label for _, label, _ in split[part]], file.parent))
            names |= {label: str(name) for _, label, name in split[part]}
        names = [names[k] for k in range(len(names))]
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise DataError(f'{file}: expected {{"train": [[path, label, class name], ...], "test": '
                        f'...}}, labels from 0 without a gap ({reason(e)})') from None
    return f"CoOp's {file.name}, val not used", names, *parts


def read_aircraft(root):
    """CoOp's lists: the classes in variants.txt, and lines `1025794 707-320` for each part."""
    names, parts = read_text(root / "variants.txt").splitlines(), []
    for part in ("train", "test"):
        file = root / f"images_variant_{part}.txt"
        try:
            numbers, variants = zip(*(s.split(" ", 1) for s in read_text(file).splitlines()))
            labels = [names.index(name) for name in variants]
        except ValueError as e:
            raise DataError(f"{file}: expected `1025794 707-320` ... ({reason(e)})") from None
        parts.append(Images([f"images/{number}.jpg" for number in numbers], labels, root))
    return "CoOp's official split", names, *parts


def torchvision_set(known, parent, **how):
    """torchvision's own data-set object in a folder; DataError if it cannot be had."""
    try:
        return getattr(torchvision.datasets, known.kind)(parent, **how)
    except Exception as e:                              # each class raises its own
        why = "it needs scipy: pip install scipy" if "scipy" in str(e) else (
            reason(e).split(". You can use download")[0])        # a flag of torchvision's
        raise DataError(f"torchvision's {known.kind} in {parent}: {why}. {EXPECTED}") from None


def read_torchvision(root, known):
    """A folder as torchvision lays it out, read by torchvision's own class."""
    parts = []
    for how in known.parts:
        found = torchvision_set(known, root.parent, **how)
        files, pictures = getattr(found, known.keeps), None
        if known.keeps == "data":                       # arrays (N, H, W, 3) or (N, H, W)
            labels = found.targets
            pictures = [Image.fromarray(array) for array in torch.as_tensor(files).numpy()]
            files = [f"{len(parts)}/{i:05d}.png" for i in range(len(files))]
        else:
            files, labels = zip(*files) if known.keeps == "_samples" else (files, found._labels)
            files = [Path(os.path.relpath(file, root)).as_posix() for file in files]
        parts.append(Images(files, labels, root, pictures))
    names = getattr(found, "classes", None)             # Flowers102 has them since torchvision 0.22
    names = names and [known.clean(name) for name in names]
    if len(parts) == 1:
        return hash_split(names, *parts)
    return f"official split by torchvision's {known.kind}", names, *parts


def hash_split(names, images):
    """A fifth of the images, picked by a hash of the paths, is the test set: always the same."""
    parts = [], []                                      # train, test
    for file, i in sorted((file, i) for i, file in enumerate(images.names)):
        digest = hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
        parts[int.from_bytes(digest, "big") % 5 == 0].append(i)
    if not all(parts):
        return "class folders, too few images for a split: train = test", names, images, images
    return "class folders, split by a hash of the paths", names, *map(images.subset, parts)


def read_folders(root, known, classes, split):
    """Folders per class, with or without train/ and test|val/; or images without labels."""
    base = "" if known.kind and known.parts or not (root / known.images).is_dir() else known.images
    parts = [f"{base}/{d}".lstrip("/") for d in SPLITS if (root / base / d).is_dir()]
    if len(parts) > 1 and parts[0].endswith("train"):
        seen, train = class_folders(root, parts[0], known)
        part, tested, test = max(((d, *class_folders(root, d, known)) for d in parts[1:]),
                                 key=lambda found: bool(found[1]))      # rather a labelled one
        names = seen or tested or classes or []
        if tested != names:                             # slow for 20,000 classes
            by_name_of(tested, names, [test], f"{part}/ has class folders that {parts[0]}/ lacks")
        return f"{parts[0]}/{'' if seen else ', no labels'} + {part}/", names, train, test
    names, images = class_folders(root, base, known)
    if names in [[d] for d in SPLITS]:                  # alone: its own folders are the classes
        base = parts[0]
        names, images = class_folders(root, base, known)
    found, wanted = ({plain_name(c) for c in some} for some in (names, classes or names))
    if len(names) > 1 and not (classes and found <= wanted) and (
            found & {*SPLITS[1:], "training", "testing"}
            or all(re.match("train|test|val|dev", c) for c in found)
            or any(re.search(r"\btrain", plain_name(c))        # with folders of its own
                   and class_folders(root, f"{base}/{c}".lstrip("/"), known)[0] for c in names)):
        raise DataError(f"{root}: the folders {', '.join(names)} are no classes (if they are, name "
                        f"them with --classes). {EXPECTED}")
    labelled = found & wanted and (                     # not 2023/, 2024/; one class if that is all
        len(names) > 1 or classes and len(images) == len(list_images(root)))
    if labelled or len(names) > 1 and WORDNET_ID.fullmatch(names[0]):
        return hash_split(names, images) if split else ("class folders", names, images, images)
    images = Images(list_images(root), None, root)
    return "unlabelled, train = test", None, images, images


def class_folders(root, base, known):
    """(class names, Images) of the class folders in root/base; ([], Images without labels) if it
    has none, or `images` alone. The order of the classes is that of torchvision's ImageFolder."""
    names, files, labels = [], [], []
    for d in sorted(e.name for e in os.scandir(root / base) if e.is_dir() and e.name[0] != "."):
        found = list_images(root, f"{base}/{d}".lstrip("/"))
        if found and known.rename.get(d, d):
            files += found
            labels += [len(names)] * len(found)
            names.append(known.rename.get(d, d))
    if names in ([], ["images"]):
        return [], Images(list_images(root, base), None, root)
    return names, Images(files, labels, root)


def wordnet_names(folders, root):
    """Class folders called n01440764 (ImageNet's WordNet ids) get the names of CoOp's
    classnames.txt, or torchvision's if all 1000 are there. Other folders are names themselves."""
    if not all(WORDNET_ID.fullmatch(d) for d in folders):
        return folders
    file = root / "classnames.txt"                      # lines `n01440764 tench`
    table = dict(re.findall(r"(?m)^(n\d{8})\s+(.+)$", read_text(file))) if file.is_file() else {}
    if table.keys() >= set(folders):
        return [table[wnid] for wnid in folders]
    if len(folders) == 1000:
        return list(torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
    raise DataError(f"{root}: the class folders are WordNet ids ({folders[0]}, ...): put CoOp's "
                    f"classnames.txt, lines like `n01440764 tench`, there")


def list_images(root, base=""):
    """Paths, relative to root, of the images in root/base and below, sorted; not a run's own."""
    files = []
    for folder, folders, names in os.walk(Path(root, base), followlinks=True):
        inside = Path(folder).relative_to(root).as_posix()
        here = Path(folder).resolve()                   # a link to a folder above has no end
        folders[:] = [d for d in folders if not d.startswith(".")
                      and not here.is_relative_to((here / d).resolve())]
        if "args.json" in names:                        # a run folder
            names, folders[:] = [], []
        files += [f"{inside}/{name}".removeprefix("./") for name in names
                  if name.lower().endswith(EXTENSIONS + UNREAD) and not name.startswith(".")]
    return sorted(files)


def plain_name(name):
    """A class name for comparing: any case; underscores and punctuation as spaces; accents as one
    character with their letter, which macOS writes as two."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFC", name.casefold())))


def meant(name, names):
    """Indices of the names that are meant by one: spelt so, else so but for case and underscores,
    else with the same `plain_name`, unless these differ (`c++`, `c#`)."""
    def folded(c):
        return " ".join(c.replace("_", " ").split()).casefold()
    for key in (str, folded, plain_name):
        found = [k for k, c in enumerate(names) if key(c) == key(name) != ""]
        if len({folded(names[k]) for k in found}) == 1:
            return found
    return []


def reason(e):
    """An exception in a few words."""
    if isinstance(e, pickle.UnpicklingError):           # its text tells how to run the file
        return "damaged, or something else"
    if isinstance(e, KeyError):
        return f"without {e}"
    return getattr(e, "strerror", None) or " ".join(str(e).split())[:200] or type(e).__name__


def read_text(path):
    """The text of a file of UTF-8; DataError if it is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: expected a file of UTF-8 text: {reason(e)}") from None


def read_json(path):
    """What a JSON file holds; DataError with line and column if it is none."""
    text = re.sub(r"\A\s*```\w*\n|\n```\s*\Z", "", read_text(path))     # an LLM's code fence
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise DataError(f"{path} is not valid JSON: {e}") from None


def load(path, classes=None, template=None, adapted=None):
    """`Data` of a folder or of demo[:STYLE]. Opens each of up to MOST_OPENED images. classes: None,
    "a,b,c" or a file with one name per line, the folder's own among them, if it has any. template:
    None (the data set's), "ensemble" (eight) or a text with one {}. adapted: the classes of a model
    that is there; class folders without test/ are the test set. Raises DataError, CLIPError."""
    path, classes = str(path), adapted or classes and listed_classes(classes)
    if path == "demo" or path.startswith("demo:"):
        known, text = Known(("demo",)), path[5:] or "narrow"
        if text not in shapes.STYLES:
            raise DataError(f"{path}: unknown style, expected one of {', '.join(shapes.STYLES)}")
        names, parts = list(shapes.SHAPES), []
        for part in ("train", "test"):
            pictures, labels = shapes.pictures(text, part)
            files = [f"{part}/{i:05d}.png" for i in range(len(labels))]
            parts.append(Images(files, labels, pictures=pictures))
    else:
        root = locate(Path(os.path.expanduser(path or "(nothing)")).absolute())
        split = min(root.glob("split_zhou_*.json"), default=None)
        known = BY_NAME.get(split and split.name, BY_NAME.get(root.name, Known()))
        if split:
            text, names, *parts = read_coop(split, known.images)
        elif (root / "images_variant_train.txt").is_file():
            text, names, *parts = read_aircraft(root)
        elif known.kind and known.parts and root.name == known.folders[-1] and not (
                root / "test").is_dir():                # the user's own so called
            text, names, *parts = read_torchvision(root, known)
        elif root.is_file():
            text, names, photo = "one image", None, Images([root.name], None, root.parent)
            parts = [photo, photo]
        else:
            text, names, *parts = read_folders(root, known, classes, not adapted)
            used = {*parts[0].names, *parts[1].names}
            if not known.folders[0] and (others := len(list_images(root)) - len(used)):     # own
                print(f"warning: {others} other images in {path} are left out", file=sys.stderr)
        if not all(parts):                              # without images
            raise DataError(f"{path}: no images ({', '.join(EXTENSIONS)}). {EXPECTED}")
        if not (names or classes):
            raise DataError(f"{path}: no names of classes: give --classes, or two class folders. "
                            f"{EXPECTED}")
        names = wordnet_names(names or classes, root)
    says = f"{path}: neither --classes nor a model has"
    names = by_name_of(names, classes, parts, says) if classes else check_classes(names)
    train, test = parts
    if train.pictures is None and sum(map(len, {train, test})) <= MOST_OPENED:
        train = readable(train)
        test = train if parts[1] is parts[0] else readable(test)
    own = known.template if template in (None, "ensemble") else template
    if re.findall("[{}]+", own) != ["{}"]:
        raise DataError(f"--template {template!r}: expected `ensemble` or a text with one {{}}")
    clip.tokenize([own.replace("{}", c) for c in names])        # CLIPError if one is too long
    templates = [own, *(ENSEMBLE if template == "ensemble" else ())]
    some = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return Data(train, test, names, templates, f"{known.folders[0] or path}: {text}; "
                f"{len(names)} classes ({some}), {len(train)} training and {len(test)} test "
                f'images, "{templates[0]}"', known.folders[0])


def locate(root):
    """The folder, or image, of --data; a data set that is not there torchvision downloads."""
    known = BY_NAME.get(root.name, Known())
    home = root.parent / (known.folders[-1] or root.name)
    if root.is_file() and root.name.lower().endswith(EXTENSIONS + UNREAD):
        return root
    if root.is_dir():                                   # where ./mnist is ./MNIST: the latter
        return home if home.is_dir() and home.samefile(root) else root
    if not (known.kind and root.parent.is_dir()):
        raise DataError(f"{root}: no such folder or image. {EXPECTED}")
    if not home.is_dir():
        print(f"downloading {known.kind} with torchvision into {home}", flush=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as folder:    # until it is complete
            torchvision_set(known, folder, download=True)
            os.rename(f"{folder}/{known.folders[-1]}", home)
    return home


def readable(images):
    """The images that can be decoded; a warning names the others."""
    def problem(file):
        try:
            decode(os.path.join(images.root, file), draft=True)
        except Exception as e:                          # Pillow's plugins raise nearly anything
            phone = file.lower().endswith(UNREAD)
            return f"{file} ({'convert it to JPEG' if phone else reason(e)})"
    if len(images) > 1000:
        print(f"opening {len(images)} images once", file=sys.stderr, flush=True)
    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, images.names))
    bad = [text for text in problems if text]
    if bad:
        says = f"{len(bad)} of {len(images)} images cannot be read: {', '.join(bad[:5])}"
        if 2 * len(bad) > len(images):
            raise DataError(f"{images.root}: {says}")
        print(f"warning: {says}{', ...' if bad[5:] else ''}; skipped", file=sys.stderr)
        images = images.subset(i for i, text in enumerate(problems) if not text)
    return images


def listed_classes(classes):
    """--classes (see `load`) as a list of names."""
    if not os.path.isfile(classes) and "," not in classes:
        raise DataError(f"--classes {classes}: neither a file nor a list a,b,c (of one: a,)")
    text = read_text(classes).strip() if os.path.isfile(classes) else classes
    return check_classes([c for c in text.split("\n" if "\n" in text else ",") if c.strip()])


def check_classes(names):
    """Class names as they go into the prompt; DataError unless all differ, or are a thousand."""
    names = [" ".join(c.replace("_", " ").split()) for c in names]
    folded = [c.casefold() for c in names]
    if len(set(folded)) < len(names) < 1000 or not names:       # ImageNet has two `missile`
        twice = [c for c in names if folded.count(c.casefold()) > 1]
        raise DataError(f"expected classes, all different, got {', '.join(twice[:9]) or 'none'}")
    return names


def by_name_of(names, wanted, parts, says):
    """Returns `wanted`; the parts' labels, which count in `names`, then count in it. DataError,
    with `says`, if one of the names means none of them."""
    found = [meant(name, wanted) for name in names]
    if others := [name for name, some in zip(names, found) if not some]:
        raise DataError(f"{says}: {', '.join(others[:20])}")
    order = torch.tensor([k if k in some else some[0] for k, some in enumerate(found)])
    for images in set(parts):                           # of two `missile` each stays itself
        images.y_true = None if images.y_true is None else order[images.y_true]
    return wanted


# ---- shared by the scripts: flags and CLIP ----

def add_common(parser, script, batch_size, what="images per step, of all processes"):
    """The flags that all scripts share."""
    add, switch = parser.add_argument, {"action": argparse.BooleanOptionalAction}
    parser.set_defaults(script=script)                  # which --resume compares
    add("--data", default="demo", help="folder (see data.py), image, demo[:STYLE] (%(default)s)")
    add("--classes", help="class names: a,b,c or a file with one per line")
    add("--template", help="prompt with {} for the class name, or `ensemble`: eight of them")
    add("--arch", help="tiny, ViT-B/16, RN50, ...; default: tiny for the demo, else ViT-B/16")
    add("--weights", type=on_disk, help="file: OpenAI's, open_clip's, Hugging Face's")
    add("--quick-gelu", help="the weights' activation; default: what the file says, else yes; "
        "--no-quick-gelu for most that were trained on LAION", **switch)
    add("--load", metavar="FILE", help="a run's model.pt: no training, classifies --data")
    add("--out", type=os.path.expanduser, help=f"run folder; default: runs/{script}-N, a new one")
    add("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    add("--device", help="cuda, cuda:1, mps, cpu; default: the best there is")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto",
        help="mixed precision (%(default)s: bf16 or fp16 on CUDA, off elsewhere)")
    add("--batch-size", type=int, default=batch_size, help=f"{what} (%(default)s)")
    add("--workers", type=int, help="processes of a loader; default: up to 4, 0 for images in "
        "memory and where they cannot share them (macOS, Windows, containers: /dev/shm < 1 GB)")
    add("--cache", type=float, default=4, metavar="GB", help="memory for pixels (%(default)s)")
    add("--flip", help="mirror half of the views; default: if CLIP minds less than crops", **switch)
    add("--max-steps", type=int, help="stop (each phase) there, to try things out")
    add("--resume", default=False, help="continue the run in --out", **switch)


def free_folder(script):
    """Makes and returns the first free one of runs/SCRIPT-1, -2, ..."""
    for n in itertools.count(1):
        with suppress(FileExistsError):
            os.makedirs(out := f"runs/{script}-{n}")
            return out


def on_disk(name):
    """A flag's file in full, as model.pt may be loaded from another folder; other names as is."""
    return os.path.abspath(name) if os.path.isfile(name) else name


def recipe(text, additions):
    """--recipe -> (paper or ours, names of the additions that are on). Paper has none, ours all;
    "ours-a-b" leaves two out, "paper+a" adds one. Raises DataError."""
    base, *changes = re.split(r"(?=[+-])", text)
    on, sign = (set(additions), "-") if base == "ours" else (set(), "+")
    on ^= {change[1:] for change in changes}
    if base not in ("paper", "ours") or on - additions.keys() or {c[0] for c in changes} - {sign}:
        raise DataError(f"--recipe {text}: expected paper, then +NAME, or ours, then -NAME, of "
                        f"{', '.join(additions)}")
    return base, on


def setup(args, settings={}):
    """What a run works with: .args, .device, .dataset, .C (classes), .clip_model (frozen), .full
    (--student's CLIP, or the same), .clip_name, .run, .saved (what --load read), .amp_dtype (None:
    full precision), .load (`DeviceLoader` with this run's settings), and loaders of the plain
    images: .train, .test. settings: {flag not given: (of CLIPs with D < 512, of larger ones)}."""
    device, saved = pick_device(args.device), None
    torch.manual_seed(args.seed)
    if args.load and (args.classes or args.template):
        raise DataError("--load: classes and template are the model's, leave yours out")
    if args.load:                                       # its classes and its CLIP
        saved, clip_model, full, _ = read_model(args.load, args.script, args.weights, device,
                                                vars(args).get("student"))
    dataset = broadcast_from_rank0(load, args.data, args.classes, args.template,
                                   saved and saved["class_names"])
    weights = args.weights or args.arch or ("tiny" if dataset.name == "demo" else "ViT-B/16")
    if not saved:
        if world_size() > 1:                            # perhaps one downloads it, for all
            broadcast_from_rank0(lambda: bool(clip.load(weights)))
        clip_model, _ = clip.load(weights, device=device, quick_gelu=args.quick_gelu)
        full = second_clip(vars(args).get("student"), clip_model, args.quick_gelu)
    if args.arch and (args.weights or args.load):
        clip.check_architecture(clip_model, args.arch)
    for flag, values in settings.items():
        if getattr(args, flag, None) is None:
            setattr(args, flag, values[clip_model.visual.output_dim >= 512])
    if vars(args).get("epochs2") == 0 and (args.student or args.export):
        raise DataError("--epochs2 0 leaves nothing to --student and --export")
    if os.path.isdir(vars(args).get("export") or ""):
        raise DataError(f"--export {args.export} is a folder")
    root = dataset.train.root
    if not args.out and args.resume:
        raise DataError(f"--resume: give the run's folder, as --out runs/{args.script}-1")
    elif not args.out:
        args.out = broadcast_from_rank0(free_folder, args.script)
    elif root and os.path.isdir(args.out) and os.path.samefile(args.out, root):
        raise DataError(f"--out {args.out} is the folder of the images")
    names = "\n".join(dataset.class_names + dataset.train.names).encode(errors="backslashreplace")
    found = f"{dataset.description}, names {hashlib.sha256(names).hexdigest()[:8]}"
    run = args.run = Run(args.out, {**vars(args), "dataset": found}, args.resume)
    run.say(dataset.description)
    plain, *_ = views = transforms(clip_model.visual.input_resolution)
    run.say(cache_pixels(dataset, views, args.cache))
    workers, amp = args.workers, args.amp
    if workers is None:
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))    # of each process
        workers = min(8, cores) // 2 if dataset.train.pictures is None else 0
        if sys.platform != "linux" or shutil.disk_usage("/dev/shm").free < 2**30:
            workers = 0             # elsewhere they share no cache; batches pass through /dev/shm
    if amp == "auto" and device.type == "cuda":         # older GPUs have no bf16
        amp = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    load_view = partial(DeviceLoader, batch_size=args.batch_size, device=device, workers=workers,
                        pin=not vars(args).get("compile"))      # no thread may disturb `graphed`
    return SimpleNamespace(
        args=args, device=device, dataset=dataset, C=len(dataset.class_names),
        clip_model=clip_model.requires_grad_(False), clip_name=weights, full=full, run=run,
        load=load_view, train=load_view(dataset.train.view(plain)),
        test=load_view(dataset.test.view(plain)), saved=saved,
        amp_dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp))


def second_clip(name, clip_model, quick_gelu):
    """Another CLIP for the same images, frozen; without a name `clip_model` itself."""
    if not name:
        return clip_model
    other, _ = clip.load(name, device=clip_model.logit_scale.device,
                         quick_gelu=quick_gelu if os.path.exists(name) else None)
    R, size = clip_model.visual.input_resolution, other.visual.input_resolution
    if size != R:
        raise DataError(f"--student {name} takes images of {size} pixels, not {R}")
    return other.requires_grad_(False)


def pick_device(name=None):
    """torch.device of --device, else the best there is, a GPU for each process; or DataError."""
    best = "mps" if torch.backends.mps.is_available() else "cpu"
    name = name or ("cuda" if torch.cuda.is_available() else best)
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name
    try:
        if name.startswith("cuda"):
            torch.cuda.set_device(name)
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise DataError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from None


def report_zero_shot(job, accuracy):
    """Prints it (percent or None); warns below 5 times chance, at most 35 % (RN50 has 38 on
    EuroSAT's ten), if CLIP should know the classes: of a known data set, or --weights."""
    job.run.say("no test labels" if accuracy is None else f"zero-shot accuracy {accuracy:.2f} %")
    known, C = job.dataset.name or job.args.weights, len(job.dataset.class_names)
    if known and accuracy is not None and accuracy < min(500 / C, 35):
        print("warning: that is little: are labels and class names in the same order, do the "
              "weights need --no-quick-gelu (most of LAION's do)?", file=sys.stderr)


def some(images):
    """A thousand of the images, from all over, or all where there are fewer."""
    return images.subset(torch.linspace(0, len(images) - 1, min(1000, len(images))).long())


def augmented_views(job, posterior):
    """(weak, strong) transforms. Without --flip, --no-flip they mirror if that moves the zero-shot
    posterior(view of n images) (n, C) less than weak cropping does (a mirrored 3 is not a 3)."""
    size, flip, images = job.clip_model.visual.input_resolution, job.args.flip, job.dataset.train
    if flip is None:
        plain, weak, _ = transforms(size, flip=False)
        p, *others = (posterior(some(images).view(t)).clamp(min=1e-8)           # (n, C) each
                      for t in (plain, Plain(plain.prepare, mirror=True), weak))
        mirrored, cropped = (float((p * (p / q).log()).sum(dim=1).mean()) for q in others)
        flip = mirrored < cropped
        job.run.say(f"views are {'' if flip else 'not '}mirrored: mirroring moves the zero-shot "
                    f"posteriors by {mirrored:.3f}, cropping by {cropped:.3f} (KL)")
    return transforms(size, flip)[1:]


# ---- shared by the scripts: measures ----

def accuracy(y, y_true):
    """Percent of the images whose class y (N,) is the true one; None without labels."""
    if y_true is not None:
        return round(100 * float((y == y_true).double().mean()), 2)


def few_shot(y_true, K, seed):
    """Indices of K images per class, of all where there are fewer. y_true (N,); None: DataError."""
    if y_true is None:
        raise DataError("--shots: the training images have no labels")
    order = torch.randperm(len(y_true), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[y_true[order] == k][:K] for k in y_true.unique()]).sort().values


def auroc(score, right):
    """How likely a right label scores above a wrong one. score (N,), right (N,) bool; or nan."""
    a, b = score[right], score[~right].sort().values
    below = torch.searchsorted(b, a) + torch.searchsorted(b, a, right=True)     # twice, with ties
    return float(below.double().mean() / (2 * len(b)))


# ---- shared by the scripts: several processes ----
# torchrun starts them: each has all weights and tables, and encodes its shard of the images.

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def broadcast_from_rank0(f, *args):
    """f(*args) of the first process, for all; so too a user's mistake."""
    try:
        result = [f(*args) if rank() == 0 else None]
    except (DataError, clip.CLIPError, OSError) as e:
        result = [e]
    if world_size() > 1:
        dist.broadcast_object_list(result, device=torch.device("cpu"))
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def all_reduce_sum(table):
    """The sum, in place, of all processes' tables: exact where one holds a row and the others 0."""
    if world_size() > 1:
        dist.all_reduce(table)
    return table


def gather(x):
    """All processes' x (B / processes, ...), or None -> (B, ...), with the gradient of its own."""
    if world_size() == 1 or x is None:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank()] = x
    return torch.cat(parts)


def distributed(students, compiled=False):
    """The students, called with (clip_model, x), with gradients averaged over the processes;
    compiled: by torch.compile and, on a single GPU, run as CUDA graphs."""
    if world_size() > 1:
        students = [torch.nn.parallel.DistributedDataParallel(me) for me in students]
        for me in students:
            me.broadcast_buffers = False                # which are the same everywhere
    if compiled:
        students = [torch.compile(me) for me in students]
        if world_size() == 1 and next(students[0].parameters()).is_cuda:
            pool = torch.cuda.graph_pool_handle()       # they take turns: one memory is enough
            students = [graphed(me, pool) for me in students]
    return students


class Pass(torch.nn.Module):
    """What CUDA graphs can hold of a student's call: images in, tensors out."""
    def __init__(self, student, clip_model):
        super().__init__()
        self.student, self.clip_model = student, clip_model

    def forward(self, x):
        return tuple(v for v in self.student(self.clip_model, x) if v is not None)


def graphed(student, pool):
    """The student, whose passes are recorded at the first call, for x of that shape: the GPU is
    told of each pass at once, not of thousands of small operations."""
    graphs = []

    def call(clip_model, x):
        if not graphs:
            gc.collect()                                # none of the last phase may die meanwhile
            graphs.append(torch.cuda.make_graphed_callables(
                Pass(student, clip_model), (x.clone(),), allow_unused_input=True, pool=pool))
        v, l_pos, *l_neg = graphs[0](x)
        return v, l_pos, *(l_neg or [None])
    return call


# ---- shared by the scripts: the run folder ----

def command_line(adapt, args):
    """Runs a script. Returns 0, 2 for a user's mistake, 130 if stopped by Ctrl-C or SIGTERM."""
    status, n = 2, int(os.environ.get("WORLD_SIZE", 1))
    if hasattr(sys.stdout, "reconfigure"):              # a notebook's has none
        sys.stdout.reconfigure(errors="backslashreplace")       # any path, on any terminal
    try:
        for flag, value in vars(args).items():
            least = flag in ("batch_size", "rounds", "passes", "max_steps")     # 1; else 0
            most = 1 if flag == "q" else math.inf
            if isinstance(value, (int, float)) and not least <= value <= most:
                raise DataError(f"--{flag.replace('_', '-')} {value} is out of range")
        if args.batch_size % n:
            raise DataError(f"--batch-size {args.batch_size} cannot be divided by {n} processes")
        if n == 1:                                      # torchrun's processes just end
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        else:
            gpu = torch.cuda.is_available() and args.device != "cpu"
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo",
                                    timeout=timedelta(days=1))  # the first one may download
        if rank() > 0:                                  # the first one speaks
            sys.stdout = open(os.devnull, "w", encoding="utf-8")
        adapt(args)
        if n > 1:
            dist.destroy_process_group()
        return 0
    except (DataError, clip.CLIPError, OSError, csv.Error) as e:
        says = f"error: {e}"
    except RuntimeError as e:
        if not re.search("out of memory|(can't allocate|not enough) memory", str(e)):
            raise
        says = f"error: out of memory: begin anew with --batch-size < {args.batch_size}"
    except KeyboardInterrupt:
        status, says = 130, "stopped"
        if args.out and (Path(args.out) / "args.json").exists():
            says += f"; --resume --out {args.out} goes on after the last epoch"
    if status == 2 and rank() == 0 and "run" in args and len(args.run.lines) == 1:
        with suppress(OSError):                         # nothing was learnt: the folder goes, but
            (args.run.out / "args.json").unlink()       # not if there is more in it
            args.run.out.rmdir()
    print(says, file=sys.stderr, flush=True)
    return status


class Run:
    """The run folder (args.json, log.jsonl, last.pt), the clock and the line on the screen. Of
    several processes the first one writes."""
    def __init__(self, out, args, resume=False):
        self.out, self.start, self.shown, self.state = Path(out), time.time(), 0.0, None
        self.lines, self.images, self.busy = [args], 0, 0.0     # images, seconds of training
        if broadcast_from_rank0((self.out / "args.json").exists) != resume:
            raise DataError(f"{out} holds no run to --resume" if resume else
                            f"{out} already holds a run: give --resume, or another --out")
        if broadcast_from_rank0((self.out / "last.pt").exists) and resume:
            try:
                self.state = torch.load(self.out / "last.pt", map_location="cpu", weights_only=True)
            except Exception as e:                      # torch.load raises nearly anything
                raise DataError(f"{out}/last.pt is not a checkpoint: {reason(e)}") from None
            self.lines, self.images, self.busy, seconds = self.state["run"]
            self.start -= seconds
            free = "resume", "out", "device", "workers", "cache", "export"
            other = [f"--{k.replace('_', '-')} {v}" for k, v in self.lines[0].items()
                     if args.get(k) != v and k not in free]
            if other:
                raise DataError(f"--resume: this run was begun with {' '.join(other)}".replace(
                    "--dataset", "other images or classes:").replace("--script", "the script"))
        with replacing(self.out / "args.json", "w") as file:
            json.dump(self.lines[0], file, indent=2)

    def restore(self, parts):
        """Gives each of {name: module, optimizer, ...} its state; the rest of last.pt."""
        state, self.state = self.state, None
        for name, part in parts.items():
            if name == "optimizer":                     # may go on on another device
                for group, mine in zip(state[name]["param_groups"], part.param_groups):
                    group["fused"] = mine["fused"]
            if state[name]:                             # a GradScaler that was off has none
                part.load_state_dict(state[name])
        torch.set_rng_state(state["rng"])
        return state

    def checkpoint(self, parts, **more):
        """last.pt, after an epoch: the parts, the rest, the random state, the log so far."""
        self.save("last.pt", {
            **more, **{name: part.state_dict() for name, part in parts.items()},
            "rng": torch.get_rng_state(),
            "run": [self.lines, self.images, self.busy, time.time() - self.start]})

    def save(self, name, content):
        with replacing(self.out / name) as file:
            torch.save(content, file.name)              # by name: Ctrl-C does not spoil a write

    def steps(self, batches, images, where, left):
        """At most `left` steps of so many images. The caller appends a dict for each to `rows`."""
        self.rows, self.where, self.mark = [], where, time.time()
        for batch in itertools.islice(batches, left):
            yield batch
            self.images, left = self.images + images, left - 1
            if sys.stdout.isatty() and time.time() - self.shown > 0.2:
                self.shown, speed = time.time(), self.images / (self.busy + time.time() - self.mark)
                self.say(f"{where} step {len(self.rows)} loss {float(self.rows[-1]['loss']):.3f} "
                         f"{speed:.0f} img/s, {left * images / speed:.0f} s left", end="")

    def means(self, lower):
        """The means of the epoch's rows, "skipped": the sum. DataError if a loss is not finite."""
        rows = [{k: float(v) for k, v in row.items()} for row in self.rows]     # waits for the GPU
        self.busy += time.time() - self.mark
        means = {k: round(sum(row[k] for row in rows) / len(rows), 4) for k in rows[0]}
        if not math.isfinite(means["loss"]):
            raise DataError(f"the loss became {means['loss']} in {self.where}: begin anew with a "
                            f"lower {lower}")
        return {**means, "skipped": int(sum(row["skipped"] for row in rows))}

    def report(self, **facts):
        """Logs and prints the facts of an epoch, or of the whole run, and what it took so far."""
        facts |= {"seconds": round(time.time() - self.start, 1),
                  "images_per_second": round(self.images / self.busy) if self.busy else None,
                  "peak_memory_gb": peak_memory_gb()}
        self.lines.append(facts)
        with replacing(self.out / "log.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)
        self.say("  ".join(f"{k} {v:.6g}" for k, v in facts.items() if isinstance(v, (int, float))))

    def say(self, text, end="\n"):
        print(f"\r{text:<99}" if sys.stdout.isatty() else text, end=end, flush=True)


def peak_memory_gb():
    """Peak memory in GB: of the GPU if one is in use, else of this process (on Linux)."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    if os.path.exists("/proc/self/status"):
        if kib := re.search(r"VmHWM:\s+(\d+)", read_text("/proc/self/status")):
            return round(int(kib[1]) / 2**20, 3)


@contextmanager
def replacing(path, mode="wb", **how):
    """A file that takes the place of `path` once it is complete. Only the first process writes."""
    part = f"{path}.tmp" if rank() == 0 else os.devnull
    Path(part).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, mode, **how) as file:
            yield file
        if rank() == 0:
            os.replace(part, path)
    except RuntimeError as e:                           # torch.save's
        raise DataError(f"cannot write {path}, is the disk full? ({reason(e)})") from None
    finally:
        if rank() == 0:
            Path(part).unlink(missing_ok=True)


def write_results(job, p, p_clean, index, zero_shot, **facts):
    """predictions.csv, report.html, and between them the last line of the log, with `facts`.
    p, p_clean (N, H): softmax of the test images and their p_clean, for the classes index."""
    run, test, names = job.run, job.dataset.test, job.dataset.class_names
    y = write_predictions(run.out / "predictions.csv", test.names, names, p, p_clean, index)
    if len(y) == 1:                                     # --data photo.jpg
        run.say(f"{test.names[0]}: {names[y[0]]}")
    run.say(f"results in {run.out}")
    run.report(zero_shot=zero_shot, accuracy=accuracy(y, test.y_true), **facts)
    write_report(run, test, names, p, index)


def write_predictions(path, names, class_names, p, p_clean, index):
    """A row per image: its likeliest class, which is returned, (N,), its p and p_clean, (N, H)."""
    best = p.argmax(dim=1, keepdim=True)                                        # (N, 1)
    y, *scores = (v.gather(1, best)[:, 0] for v in (index.long(), p, p_clean))  # (N,) each
    with replacing(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["path", "class", "confidence", "p_clean"])
        for name, k, a, b in zip(names, y.tolist(), *(v.tolist() for v in scores)):
            table.writerow([name, class_names[k], f"{a:.4f}", f"{b:.4f}"])
    return y


def pseudo_label_sheet(path, images, class_names, y, clean, score):
    """pseudo_labels.png: a row for each of the first 40 classes; left those of the labels y (N,)
    that are clean (N,) and have the highest score, p_clean (N,), right the others, worst first."""
    cell = 56                                                                   # pixels
    sheet = Image.new("RGB", (120 + 16 * cell, 18 + min(len(class_names), 40) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for x0, title, chosen, order in (
            (110, "called clean, cleanest first", clean > 0.5, score.argsort(descending=True)),
            (120 + 8 * cell, "called wrong, worst first", clean <= 0.5, score.argsort())):
        pen.text((x0, 3), title, "black")
        for k, name in enumerate(class_names[:40]):
            letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
            name = letters.strip()[:17] or f"class {k}"     # Pillow's font has no others
            pen.text((4, 40 + k * cell), name, "black")
            best = order[((y == k) & chosen)[order]][:8]                        # (<= 8,)
            for j, i in enumerate(best.tolist()):
                picture = ImageOps.fit(images.image(i), (cell - 2, cell - 2))
                sheet.paste(picture, (x0 + j * cell, 18 + k * cell))
    with replacing(path) as file:
        sheet.save(file, "PNG")


def write_report(run, images, class_names, p, index):
    """report.html, one file that needs no other: curves of the log, confusion matrix (of up to 40
    classes), pseudo_labels.png, the least certain images. p (N, H): see `write_results`."""
    def inline(image):
        image.save(file := io.BytesIO(), "PNG")
        return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'

    names, (args, *epochs, last) = [html.escape(c) for c in class_names], run.lines
    best, place = p.topk(min(2, p.shape[1]), dim=1)                             # (N, 2) each
    k = index.gather(1, place).long()                                           # classes
    page = ["<!doctype html><meta charset=utf-8><title>report</title><style>body{font:14px "
            "sans-serif}td,th{padding:2px 5px;text-align:right}figure{display:inline-block;"
            f"margin:4px;width:110px}}</style><p>{html.escape(args['dataset'])}"]
    for key, title in ("zero_shot", "zero-shot accuracy"), ("accuracy", "accuracy after the run"):
        if last[key] is not None:
            page.append(f"<p>{title} {last[key]} %")
    if last.get("crops"):
        page.append("<p>Predictions weigh in five crops of each image, zero-shot does not")
    if epochs:
        lines = [{"accuracy": last["zero_shot"]}, *epochs]
        page.append("<h2>Percent after each epoch, of plain images</h2>"
                    "<svg width=800 height=210 fill=none><path "
                    'stroke="#ddd" d="M0 1H650M0 50H650M0 100H650M0 150H650M0 200H650"/>')
        for n, (key, (scale, color)) in enumerate(CURVES.items()):
            values = [(650 * k / len(epochs), scale * line[key])
                      for k, line in enumerate(lines) if line.get(key) is not None]
            if values:
                points = " ".join(f"{x:.0f},{200 - 2 * v:.0f}" for x, v in values)
                page.append(
                    f'<polyline points="{points}" stroke="{color}" stroke-width=2 /><text '
                    f'x=660 y={20 + 20 * n} fill="{color}">{key} {values[-1][1]:.1f}</text>')
        page.append("</svg>")
    if images.y_true is not None and len(names) <= 40:
        counts = (len(names) * images.y_true + k[:, 0]).bincount(minlength=len(names) ** 2)
        page.append("<h2>A row per true class, a column per prediction</h2><table><tr><th><th>"
                    + "<th>".join(names))
        for c, row in zip(names, counts.view(-1, len(names)).tolist()):
            page.append(f"<tr><th>{c}" + "".join(
                f'<td style="background:rgba(11,95,197,{n / sum(row):.2f})">{n}' if n else "<td>"
                for n in row))
        page.append("</table>")
    if (run.out / "pseudo_labels.png").exists():
        with Image.open(run.out / "pseudo_labels.png") as sheet:
            page.append(f"<h2>Pseudo-labels</h2>{inline(sheet)}")
    page.append("<h2>Least certain test images</h2>")
    for i in (best[:, 0] - best[:, -1]).argsort()[:50].tolist():
        says = "<br>".join(f"{names[j]} {v:.2f}" for v, j in zip(best[i].tolist(), k[i].tolist()))
        page.append(f'<figure title="{html.escape(images.names[i])}">'
                    f"{inline(ImageOps.fit(images.image(i), (96, 96)))}<br>{says}</figure>")
    with replacing(run.out / "report.html", "w", encoding="utf-8", errors="replace") as file:
        file.write("\n".join(page))


def save_model(job, models, **more):
    """model.pt: what was learnt and `more`. Whole encoders are rounded to half precision, in
    `models` too, so that they predict what the file's will."""
    weights = {k: v.half() if ".visual." in k and v.is_floating_point() else v
               for k, v in models.state_dict().items()}
    models.load_state_dict(weights)
    job.run.save("model.pt", {
        **more, "models": weights, "script": job.args.script, "clip": job.clip_name,
        "class_names": job.dataset.class_names, "templates": job.dataset.templates,
        "sha256": clip.fingerprint(job.clip_model), "quick_gelu": job.args.quick_gelu})


def export_clip(job, model):
    """The image encoder of a model of phase 2 as a plain CLIP, a state dict with OpenAI's names;
    beside it, in FILE.classes, the unit rows t_k of W (C, D), for CLIP's own tau f.t_k. From here
    on job.clip_model is that CLIP. Returns t."""
    if not hasattr(model, "fc"):
        raise DataError("--export: without phase 2 CLIP's encoder is as it was")
    job.full.visual, t = model.visual, F.normalize(model.fc.weight.detach(), dim=1)     # (C, D)
    job.clip_model, path = job.full, os.path.abspath(job.args.export)   # not in the run folder
    job.run.save(path, clip.checkpoint_of(job.full))
    job.run.save(f"{path}.classes", {"class_names": job.dataset.class_names, "t": t.cpu()})
    return t


def read_model(path, script, weights, device, student=None):
    """What a run of `script` left in model.pt; the CLIP that it started from, and its preprocess.
    weights: a file of that CLIP, or None: where the run found it. DataError if they do not fit."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        writer = saved["script"]
    except Exception as e:                              # torch.load raises nearly anything
        raise DataError(f"{path} is not a run's model.pt: {reason(e)}") from None
    if writer != script:
        raise DataError(f"{path} was written by {writer}.py, and this is {script}.py")
    try:
        gelu = saved["quick_gelu"]
        model, preprocess = clip.load(weights or saved["clip"], device, quick_gelu=gelu)
        full = second_clip(student or saved.get("student"), model, gelu)
    except clip.CLIPError as e:
        raise DataError(f"{path} needs its CLIP, from --weights (and --student) if it lies "
                        f"elsewhere now: {e}") from None
    if clip.fingerprint(model) != saved["sha256"]:
        raise DataError(f"the model was adapted from another CLIP: {saved['clip']}, SHA-256 of its "
                        f"weights {saved['sha256']}; give it with --weights")
    return saved, model, full, T.Compose([to_rgb, preprocess])  # as `decode` does


def fill(models, weights):
    """The models get model.pt's weights. Raises DataError if they do not fit."""
    try:
        models.load_state_dict(weights)
    except RuntimeError:
        raise DataError("the model does not fit: its --student is of another architecture, or "
                        "another version wrote it") from None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Says what the scripts find in a folder.")
    parser.add_argument("path", nargs="?", default="demo")
    parser.add_argument("--classes", help="names, or a file of them; for class folders not needed")
    sys.stdout.reconfigure(errors="backslashreplace")       # any path, on any terminal
    try:
        print(load(**vars(parser.parse_args())).description)
    except (DataError, clip.CLIPError, OSError) as e:
        sys.exit(f"error: {e}")
