"""Finds the images and the class names in a folder; decodes, augments and batches them.

    found = load("./oxford_pets")                  # or load("./photos", classes="cat,dog")
    test, weak, strong = transforms(224)
    for x_weak, x_strong, index in loader(found.train.view(weak, strong), 64, shuffle=True):

Layouts, tried in this order (`python data.py PATH` prints which one it took):
1. `demo`, `demo:STYLE`      drawn on the fly
2. a data set of `SETS`      CoOp's split file if it is there, else the data set's own annotations
3. `train/` + `test|val/`    each with a folder per class (labelled) or with images (unlabelled)
4. a folder per class        a fifth of the images is the test set: those whose path has a SHA-256
                             divisible by 5, so the split is the same for every seed and machine
5. images and `--classes`    unlabelled: all of them are the training set and the test set
If none fits but exactly one sub-folder does, that one is taken.

Label firewall: `Images.view(...)`, which training reads, holds no labels. `Images.y_true` is for
accuracy and diagnostics only.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import os
import random
import sys
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

MEAN = (0.48145466, 0.4578275, 0.40821073)              # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
TEMPLATE = "a photo of a {}."
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")    # judged by content, not by name


class DataError(ValueError):
    """A mistake in the user's data or arguments; its message says what was expected and where."""


# ---- images ----

def decode(path, draft=False):
    """The image as PIL RGB, EXIF orientation not applied (CLIP's preprocess does not either).
    `draft` decodes a JPEG at 1/8 of its size: enough to find out whether it is intact."""
    with Image.open(path, formats=FORMATS) as im:
        if draft:
            im.draft("RGB", (1, 1))
        if isinstance(im.info.get("transparency"), bytes):
            im = im.convert("RGBA")                     # same colours, without Pillow's warning
        return im.convert("RGB")


class Images(Dataset):
    """N images and, if they are known, their true classes.

    names: N relative paths. y_true: (N,) int64 or None; for accuracy and diagnostics only.
    Source: the files `root/files[i]`, or the PIL images in `pictures`.
    """
    def __init__(self, names, y_true=None, root=None, pictures=None):
        self.files, self.root, self.pictures = list(names), root, pictures
        self.names = [_text(name) for name in self.files]
        self.y_true = None if y_true is None else torch.as_tensor(y_true, dtype=torch.long)   # (N,)
        if self.y_true is not None and self.y_true.shape != (len(self.names),):
            raise ValueError(f"{len(self.names)} images but labels {tuple(self.y_true.shape)}")

    def __len__(self):
        return len(self.names)

    def image(self, i):
        """Image i as PIL RGB. DataError if the file can no longer be read."""
        if self.pictures is not None:
            return self.pictures[i].convert("RGB")
        try:
            return decode(os.path.join(self.root, self.files[i]))
        except Exception as e:                          # Pillow's plugins raise nearly anything
            raise DataError(f"cannot read {self.names[i]} any more: {_reason(e)}") from None

    __getitem__ = image

    def view(self, *transforms):
        """Dataset whose item i is (t1(image), t2(image), ..., i): one decoding, and no label."""
        return View(Images(self.files, None, self.root, self.pictures), transforms)


class View(Dataset):
    """See `Images.view`. Item (i, seed), as `Order` asks for it, is item i with the random numbers
    of its transforms drawn from `seed`; torch's global random state is left as it was."""
    def __init__(self, images, transforms):
        self.images, self.transforms = images, transforms

    def __len__(self):
        return len(self.images)

    def __getitem__(self, item):
        rng, state = torch.default_generator, None      # torch.manual_seed takes 50x longer
        if isinstance(item, tuple):
            item, seed = item
            state = rng.get_state()
            rng.manual_seed(seed)
        image = self.images.image(item)
        views = (*(t(image) for t in self.transforms), item)
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


# ---- transforms and batches ----

def to_rgb(image):
    return image.convert("RGB")


def transforms(size):
    """(test, weak, strong): PIL image -> (3, size, size) tensor. test is CLIP's preprocess."""
    bicubic = InterpolationMode.BICUBIC
    tensor = [to_rgb, T.ToTensor(), T.Normalize(MEAN, STD)]
    crop = partial(T.RandomResizedCrop, size, interpolation=bicubic)
    flip, augment = T.RandomHorizontalFlip(), T.RandAugment(num_ops=2, magnitude=9)
    test = T.Compose([T.Resize(size, interpolation=bicubic), T.CenterCrop(size), *tensor])
    weak = T.Compose([crop(scale=(0.6, 1.0)), flip, *tensor])
    strong = T.Compose([crop(scale=(0.4, 1.0)), flip, augment, *tensor])
    return test, weak, strong


class Order(Sampler):
    """The order of each epoch and a seed for each item, both from (seed, epoch) alone: the same
    batches for any number of workers. `epoch` is the one to come; each pass adds one."""
    def __init__(self, indices, shuffle=False, seed=0, epoch=0):
        self.indices, self.shuffle, self.seed, self.epoch = list(indices), shuffle, seed, epoch

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        self.epoch += 1
        n = len(self.indices)
        seeds = torch.randint(2**62, (n,), generator=g).tolist()
        order = torch.randperm(n, generator=g).tolist() if self.shuffle else range(n)
        return iter([(self.indices[k], seeds[k]) for k in order])


def loader(dataset, batch_size, shuffle=False, seed=0, workers=0, device="cpu", drop_last=False,
           subset=None, epoch=0):
    """DataLoader over a view, or over the images `subset` of it (indices, repeats allowed).

    Order and augmentations follow from (seed, epoch), see `Order`: give `epoch` where a run resumes
    or a new subset begins. drop_last drops nothing where that would leave no batch.
    """
    indices = range(len(dataset)) if subset is None else [int(i) for i in subset]
    order = Order(indices, shuffle, seed, epoch)
    return DataLoader(dataset, batch_size, sampler=order, num_workers=workers,
                      drop_last=drop_last and len(order) >= batch_size,
                      pin_memory=torch.device(device).type == "cuda",
                      persistent_workers=shuffle and workers > 0,
                      generator=torch.Generator().manual_seed(0))   # keeps the global one untouched


# ---- layouts ----

class Known(NamedTuple):
    """A public data set."""
    title: str
    folders: tuple              # its folder in CoOp, in torchvision
    split: str                  # CoOp's split file, beside
    images: str                 # the folder that the split's paths are relative to
    template: str
    annotations: tuple          # the data set's own files, train and test, without CoOp's split
    official: Callable          # their reader: root -> {part: [(path, label, class name), ...]}


class Found(NamedTuple):
    """What the reader of a layout returns. Paths are relative to the folder, labels int or None;
    class_names None: only --classes can tell."""
    layout: str
    train: list                 # [(path, label), ...]
    test: list
    class_names: list | None
    template: str = TEMPLATE


def coop_split(known, root):
    """split_zhou_*.json: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""
    try:
        split = json.loads((root / known.split).read_text(encoding="utf-8-sig"))
        parts = {part: split.get(part, []) for part in ("train", "val", "test")}
    except AttributeError:
        raise DataError(f'{known.split}: expected {{"train": [...], "test": [...]}}') from None
    except ValueError as e:                             # not JSON, not UTF-8: says line and column
        raise DataError(f"{known.split} is not valid JSON: {e}") from None
    for part, rows in parts.items():
        for k, row in enumerate(rows if isinstance(rows, list) else [rows]):
            if not (isinstance(row, list) and [type(x) for x in row] == [str, int, str]):
                raise DataError(f"{known.split}: {part}[{k}]: expected [path, label, class name], "
                                f"got {json.dumps(row)[:60]}")
        parts[part] = [(f"{known.images}/{path.lstrip('/')}", label, c) for path, label, c in rows]
    return parts


def pets_official(root):
    """annotations/{trainval,test}.txt: lines `Abyssinian_100 1 1 1` = image, class from 1, ..."""
    parts = {}
    for part, name in (("train", "trainval.txt"), ("test", "test.txt")):
        parts[part] = []
        lines = (root / "annotations" / name).read_text("utf-8", errors="replace").splitlines()
        for k, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                stem, label = (line.split() + ["", ""])[:2]
                if not ("_" in stem and label.isdecimal()):
                    raise DataError(f"annotations/{name} line {k}: "
                                    f"expected `Abyssinian_100 1 1 1`, got `{line[:40]}`")
                breed = stem.rpartition("_")[0].lower()
                parts[part].append((f"images/{stem}.jpg", int(label) - 1, breed))
    return parts


SETS = {
    "oxford_pets": Known("Oxford Pets", ("oxford_pets", "oxford-iiit-pet"),
                         "split_zhou_OxfordPets.json", "images", "a photo of a {}, a type of pet.",
                         ("annotations/trainval.txt", "annotations/test.txt"), pets_official),
}

EXPECTED = "Expected one of" + "".join(f"""
  {s.folders[0]}/ with {s.split} and {s.images}/
  {s.folders[1]}/ with {', '.join(s.annotations)} and {s.images}/""" for s in SETS.values()) + """
  DIR/train/CLASS/*.jpg and DIR/test/CLASS/*.jpg (or val)
  DIR/CLASS/*.jpg
  DIR/*.jpg and --classes FILE|a,b,c"""


def read_known(known, root, classes, ignored):
    """A data set of `SETS`. Class names and their order are those of its training part."""
    if (root / known.split).is_file():
        source, parts = known.split, coop_split(known, root)
        layout = f"{known.title}, CoOp layout, {source}, {len(parts['val'])} images of val not used"
    else:
        source, parts = ", ".join(known.annotations), known.official(root)
        layout = f"{known.title}, official split of {source}, no {known.split}"
    names = {}
    for _, label, name in parts["train"]:
        if names.setdefault(label, name) != name:
            raise DataError(f"{source}: label {label} is both {names[label]} and {name}")
    labels = sorted(names.keys() | {label for _, label, _ in parts["test"]})
    if not names or labels != list(range(len(names))):
        raise DataError(f"{source}: training labels must be 0, 1, 2, ... without a gap and test "
                        f"labels be among them; {len(names)} classes, labels {str(labels)[:60]}")
    train, test = ([row[:2] for row in parts[part]] for part in ("train", "test"))
    return Found(layout, train, test, [names[k] for k in labels], known.template)


def read_train_test(train, tests, root, classes, ignored):
    """train/ and test|val/, each with class folders or with unlabelled images."""
    listed = {d: _class_images(root / d, ignored) for d in (train, *tests)}
    test = ([d for d in tests if listed[d][0]] or tests)[0]   # rather a labelled val/
    names = listed[train][0] or listed[test][0] or classes
    extra = [c for c in listed[test][0] if c not in names]
    if extra:
        raise DataError(f"{test}/ has class folders that {train}/ lacks: {', '.join(extra[:5])}")
    label = {None: None, **{c: k for k, c in enumerate(names or [])}}
    parts = [[(f"{d}/{file}", label[c]) for file, c in listed[d][1]] for d in (train, test)]
    kinds = [d + ("/ labelled" if listed[d][0] else "/ unlabelled") for d in (train, test)]
    unused = "".join(f", {d}/ not used" for d in tests if d != test)
    return Found(" + ".join(kinds) + unused, *parts, names)


def read_class_folders(root, classes, ignored):
    """A folder per class and no split: layout 4 of this file's docstring."""
    names, files = _class_images(root, ignored)
    label = {c: k for k, c in enumerate(names)}
    parts = [], []                                      # train, test
    for file, c in files:
        digest = hashlib.sha256(file.encode("utf-8", "surrogateescape")).digest()
        parts[int.from_bytes(digest, "big") % 5 == 0].append((file, label[c]))
    if not all(parts):
        both = sum(parts, [])
        return Found("class folders, too few images for a split: train = test", both, both, names)
    return Found("class folders, split by a hash of the paths", *parts, names)


def read_flat(root, classes, ignored):
    """Images without labels: train = test = all."""
    files = [(file, None) for file in _list(root, ignored)]
    unused = [f", {d}/ not used" for d in _folders(root) if _has_images(root / d)]
    return Found("flat folder, unlabelled, train = test" + "".join(unused), files, files, None)


def recognise(root):
    """The reader of this folder's layout, called with (root, classes, ignored), or None."""
    for known in SETS.values():
        official = (*known.annotations, known.images)
        if (root / known.split).is_file() or all((root / name).exists() for name in official):
            return partial(read_known, known)
    for other in sorted(root.glob("split_zhou_*.json")):    # refuse, never invent another split
        raise DataError(f"{root} holds {other.name}; known data sets: {', '.join(SETS)}")
    folders = _folders(root)
    named = {d.lower(): d for d in folders}
    tests = [named[d] for d in ("test", "val", "valid", "validation") if d in named]
    if "train" in named and tests:
        return partial(read_train_test, named["train"], tests)
    if sum(_has_images(root / d) for d in folders) > 1:
        return read_class_folders
    return read_flat if _has_images(root) else None


# ---- load ----

def load(path, classes=None):
    """`Data` of a folder or of demo[:STYLE]. Reads every image once; prints a warning for bad ones.

    classes: None, a list of names, "a,b,c", or a file with one name per line. If the folder has
    class names of its own they must be the same in the same order (any case or underscores).
    Raises DataError.
    """
    path, classes = os.fspath(path), class_list(classes)
    if path == "demo" or path.startswith("demo:"):
        drawn = [demo_images(path[5:], part) for part in ("train", "test")]     # (images, y, names)
        sets = [Images([f"{part}/{i:05d}.png" for i in range(len(pictures))], y, pictures=pictures)
                for part, (pictures, y, _) in zip(("train", "test"), drawn)]
        return _data(f"{path}, drawn here", sets, check_classes(drawn[0][2], classes), TEMPLATE)
    root = Path(os.path.expanduser(path))
    if not path or not os.path.isdir(root):
        what = "is not a folder" if path and os.path.exists(root) else "no such folder"
        raise DataError(f"{path or '(empty path)'}: {what}. {EXPECTED}")
    ignored = Counter()
    try:
        reader, inside = recognise(root), ""
        if reader is None:
            readers = {d: reader for d in _folders(root) if (reader := recognise(root / d))}
            if len(readers) != 1:
                raise DataError(f"{path} holds several data sets, give one: {', '.join(readers)}"
                                if readers else f"{path}: no images in a known layout. {EXPECTED}")
            (folder, reader), = readers.items()
            inside = folder + "/"
        found = reader(root / inside, classes, ignored)
    except OSError as e:
        raise DataError(f"cannot read {e.filename or path}: {e.strerror or e}") from None
    if not (found.class_names or classes):
        raise DataError(f"{path} holds {len(found.train)} images without labels: name the classes "
                        f"with --classes FILE|a,b,c")
    names = check_classes(found.class_names or classes, classes)
    parts = [[(inside + file, label) for file, label in part] for part in (found.train, found.test)]
    bad = find_unreadable(root, sorted({file for part in parts for file, _ in part}))
    sets = []
    for which, part in zip(("training", "test"), parts):
        good = [row for row in part if row[0] not in bad]
        if not good:
            first = f": {_text(part[0][0])} {bad[part[0][0]]}, ..." if part else ""
            raise DataError(f"{path}: none of {len(part)} {which} images can be read{first}")
        files, labels = zip(*good)
        sets.append(Images(files, None if None in labels else labels, root))
    layout = (f"in {inside}: " if inside else "") + found.layout
    return _data(layout, sets, names, found.template, ignored)


def _data(layout, sets, names, template, ignored=()):
    line = (f"{layout}: {len(names)} classes, {len(sets[0])} training and {len(sets[1])} test "
            f'images, "{template}"')
    if ignored:
        line += "; ignored: " + ", ".join(f"{n} {kind}" for kind, n in sorted(ignored.items()))
    return Data(*sets, names, [template], line)


def class_list(classes):
    """--classes (see `load`) as a checked list of names, or None."""
    if classes is None:
        return None
    if isinstance(classes, (str, os.PathLike)):
        text = os.path.expanduser(classes)
        if os.path.isfile(text):
            try:
                classes = Path(text).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError):
                raise DataError(f"--classes {text}: cannot be read as UTF-8 text") from None
        elif "," in text or not text.strip():
            classes = text.split(",")
        else:
            raise DataError(f"--classes {text}: neither a file nor a list like a,b,c")
    return check_classes([c for c in classes if c.strip()])


def check_classes(names, wanted=None):
    """Class names as they go into the prompt: spaces for underscores, `wanted`'s spelling if given.
    DataError unless they are two or more, all different, and the same as `wanted` in its order."""
    names = [" ".join(_text(c).replace("_", " ").split()) for c in names]
    if len(names) < 2 or "" in names:
        raise DataError(f"at least two classes with a name are needed, got {names[:5]} "
                        f"(--classes a,b,c or a file with one name per line)")
    twice = [c for c, n in Counter(map(str.casefold, names)).items() if n > 1]
    if twice:
        raise DataError(f"class names must differ, whatever their case: {', '.join(twice[:5])}")
    for k, (a, b) in enumerate(zip_longest(wanted or names, names, fillvalue="missing"), 1):
        if a.casefold() != b.casefold():
            raise DataError(f"--classes must name the data's own {len(names)} classes in their "
                            f"order: number {k} is {a}, but in the data {b}")
    return wanted or names


def find_unreadable(root, files):
    """{file: reason} of those that do not decode, tried in threads; a warning line per kind."""
    def why(file):
        try:
            decode(os.path.join(root, file), draft=True)
        except FileNotFoundError:
            return "is missing"
        except Exception as e:                          # Pillow's plugins raise nearly anything
            return _reason(e)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # Pillow's, about odd but readable files
        bad = {file: reason for file, reason in zip(files, pool.map(why, files)) if reason}
    missing = [file for file in bad if bad[file] == "is missing"]
    for what, group in (("missing", missing), ("unreadable", sorted(bad.keys() - set(missing)))):
        if group and len(bad) < len(files):
            first = ", ".join(f"{_text(file)} ({bad[file]})" for file in group[:5])
            print(f"warning: {len(group)} of {len(files)} images {what}, skipped: {first}"
                  + (", ..." if len(group) > 5 else ""), file=sys.stderr)
    return bad


# ---- small helpers ----

def _text(name):
    """A file name as printable text: composed accents, undecodable bytes escaped."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "backslashreplace").decode())


def _reason(e):
    if isinstance(e, Image.UnidentifiedImageError):
        return "not an image"
    return " ".join(str(e).split())[:80] or type(e).__name__


def _folders(root):
    """Sorted names of the sub-folders, hidden ones left out."""
    return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))


def _has_images(folder):
    try:
        return any(_is_image(e) for e in os.scandir(folder))
    except PermissionError:
        return False


def _is_image(entry):
    """By the name; folders and devices are not, a broken link is (it will be reported missing)."""
    named = entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(".")
    return named and (entry.is_file() or not os.path.exists(entry.path))


def _list(folder, ignored, deep=False, seen=()):
    """Paths of the images, relative to folder, sorted; counts in `ignored` what it passes over."""
    files, here = [], os.path.realpath(folder)
    if here in seen:                                    # a link back to a folder above
        return files
    for e in sorted(os.scandir(folder), key=lambda e: e.name):
        if e.name.startswith("."):
            ignored["hidden"] += 1
        elif e.is_dir():
            if deep:
                files += [f"{e.name}/{f}" for f in _list(e.path, ignored, deep, (*seen, here))]
        elif _is_image(e):
            files.append(e.name)
        else:
            ignored[os.path.splitext(e.name)[1].lower() or "without extension"] += 1
    return files


def _class_images(folder, ignored):
    """(class names, [(path, class name), ...]), or ([], [(path, None), ...]) if there are no class
    folders. The order of the classes is that of torchvision's ImageFolder."""
    inside = {d: _list(os.path.join(folder, d), ignored, deep=True) for d in _folders(folder)}
    names = [d for d in inside if inside[d]]
    direct = _list(folder, ignored)
    if not names:
        return [], [(file, None) for file in direct]
    if direct:
        ignored["images outside the class folders"] += len(direct)
    return names, [(f"{d}/{file}", d) for d in names for file in inside[d]]


# ---- demo ----
# A small world of ten shapes. `clip/tiny.py` pretrains a tiny CLIP on the style "source"; the other
# styles draw the same shapes with a shift of domain that it has not seen.

SHAPES = ("circle", "square", "triangle", "star", "heart",
          "cross", "ring", "crescent", "arrow", "diamond")
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220),
           "yellow": (235, 210, 40), "orange": (240, 140, 30), "purple": (140, 50, 170),
           "pink": (245, 130, 180), "brown": (130, 80, 40), "black": (20, 20, 20),
           "white": (245, 245, 245), "gray": (128, 128, 128), "cyan": (50, 200, 220)}
PIXELS, OVERSAMPLE = 32, 3          # drawn three times as large, then averaged down
CANVAS = PIXELS * OVERSAMPLE


@dataclass(frozen=True)
class Style:
    """Ranges that one picture's looks are drawn from. Lengths are in pixels of the 32-pixel image
    unless said otherwise; fill and ground are {kind: weight}."""
    fill: dict                      # solid, textured, outline, dotted
    ground: dict                    # plain, gradient, stripes, checks, dots, clouds
    size: tuple = (0.55, 0.95)      # of half the image
    shift: float = 0.12             # of the centre, as a fraction of the image
    rotate: tuple = (-15, 15)       # degrees
    squeeze: tuple = (0.85, 1.15)   # factor on the width, before the rotation
    slant: tuple = (0.0, 0.0)       # sideways shear
    stroke: tuple = (2.0, 4.0)      # width of outlines and of dots
    contrast: tuple = (110, 500)    # sum of |difference| of the three channels, shape to ground
    noise: tuple = (0.0, 0.2)       # weight of uniform noise
    blur: tuple = (0.0, 0.7)
    clutter: tuple = (0, 1)         # number of stray lines
    jagged: float = 0.0             # displacement of the corners
    rarest: float = 1.0             # class frequencies fall geometrically to this one


SOURCE = Style({"solid": 5, "textured": 2, "outline": 3},
               {"plain": 45, "gradient": 20, "stripes": 8, "checks": 7, "dots": 8, "clouds": 12})
CLEAN = Style({"solid": 1}, {"plain": 2, "gradient": 1}, noise=(0.0, 0.08), blur=(0.0, 0.5),
              contrast=(200, 700))
NARROW = replace(CLEAN, squeeze=(0.57, 0.72))
STYLES = {
    "source": SOURCE,
    "narrow": NARROW,                                           # seen from the side; the default
    "slanted": replace(CLEAN, slant=(0.35, 0.6)),
    "turned": replace(CLEAN, rotate=(18, 32)),
    "quilt": replace(CLEAN, fill={"solid": 1, "textured": 1}, squeeze=(1.3, 1.55),
                     ground={"stripes": 1, "checks": 1, "dots": 1}),
    "beads": replace(CLEAN, fill={"dotted": 1}, stroke=(2.2, 3.0)),
    "neon": replace(CLEAN, fill={"outline": 1}, stroke=(1.6, 2.4), blur=(1.0, 1.4),
                    slant=(-0.5, -0.35)),
    "longtail": replace(NARROW, rarest=0.1),                    # ten circles for one diamond
}


def polar(radii, n):
    """Corners at n equal angles, clockwise from the top, the radii taken in turn."""
    turns = [2 * math.pi * i / n for i in range(n)]
    r = [radii[i % len(radii)] for i in range(n)]
    return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(r, turns)]


def polygons(shape, u):
    """Corners (x, y) of a shape in [-1, 1]^2, y down; a second polygon is a hole. u(a, b) is a
    random number: no two stars are the same."""
    if shape == "circle":
        return [polar([0.9], 36)]
    if shape == "square":
        return [[(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]]
    if shape == "triangle":
        w = u(0.8, 1.0)
        return [[(0, -0.9), (w, 0.75), (-w, 0.75)]]
    if shape == "star":
        return [polar([1.0, u(0.38, 0.5)], 10)]
    if shape == "heart":
        turns = [2 * math.pi * i / 40 for i in range(40)]
        return [[(math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)
                                      - math.cos(4 * t)) / 16) for t in turns]]
    if shape == "cross":
        a, b = u(0.22, 0.38), 0.95
        arm = [(-a, -b), (a, -b), (a, -a)]                      # one arm, then turned four times
        return [[p for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))
                 for p in [(c * x - s * y, s * x + c * y) for x, y in arm]]]
    if shape == "ring":
        return [polar([0.95], 36), polar([0.95 * u(0.4, 0.65)], 36)]
    if shape == "crescent":                     # the unit disc without a disc of radius r at (d, 0)
        d, r = u(0.4, 0.6), u(0.75, 0.85)
        x = (d * d + 1 - r * r) / (2 * d)                       # where the two circles meet
        a, b = math.acos(x), math.acos((x - d) / r)
        steps = [i / 30 for i in range(31)]
        outer = [a + (2 * math.pi - 2 * a) * s for s in steps]
        inner = [2 * math.pi - b - (2 * math.pi - 2 * b) * s for s in steps]
        return [[(math.cos(t) + 0.15, math.sin(t)) for t in outer]
                + [(d + r * math.cos(t) + 0.15, r * math.sin(t)) for t in inner]]
    if shape == "arrow":
        a, h = u(0.18, 0.3), u(0.6, 0.8)
        return [[(-0.95, -a), (0.1, -a), (0.1, -h), (1, 0), (0.1, h), (0.1, a), (-0.95, a)]]
    assert shape == "diamond", shape
    w = u(0.55, 0.85)
    return [[(0, -1), (w, 0), (0, 1), (-w, 0)]]


def texture(kind, a, b, rng):
    """A canvas in the colours a and b."""
    picture = Image.new("RGB", (CANVAS, CANVAS), a)
    if kind == "plain":
        return picture
    pen, p = ImageDraw.Draw(picture), int(rng.uniform(6, 15))   # period
    start = -rng.randrange(2 * p)
    cells = [start + p * i for i in range(CANVAS // p + 4)]
    if kind in ("gradient", "clouds"):
        n = rng.choice([4, 6, 9, 13])
        mask = (Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270]))
                if kind == "gradient" else Image.frombytes("L", (n, n), rng.randbytes(n * n)))
        mask = mask.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
        return Image.composite(Image.new("RGB", (CANVAS, CANVAS), b), picture, mask)
    if kind == "stripes":
        slope = math.tan(rng.uniform(-1, 1))
        for y in range(start - 2 * CANVAS, 3 * CANVAS, p):
            line = [(0, y), (CANVAS, y + slope * CANVAS)]
            pen.line([q[::-1] for q in line] if start % 2 else line, b, max(1, p // 2))
    elif kind == "checks":
        for i, x in enumerate(cells):
            for y in cells[i % 2::2]:
                pen.rectangle([x, y, x + p - 1, y + p - 1], b)
    else:
        for x in cells:
            for y in cells:
                pen.ellipse([x, y, x + 0.6 * p, y + 0.6 * p], b)
    return picture


def draw_dots(pen, corners, width, gap):
    """Dots along a closed polygon, `gap` apart."""
    ahead = 0.0                                                 # from here to the next dot
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        length = math.hypot(x1 - x0, y1 - y0)
        while ahead < length:
            x, y = x0 + (x1 - x0) * ahead / length, y0 + (y1 - y0) * ahead / length
            pen.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], 255)
            ahead += gap
        ahead -= length


def draw(shape, style, rng):
    """One shape: (PIL image of 32 x 32 pixels, what a caption could say of it)."""
    u = rng.uniform

    def colour(other=None):                                     # far enough from the colour `other`
        for _ in range(50):
            name = rng.choice(list(COLOURS))
            rgb = tuple(min(255, max(0, round(rng.gauss(v, 25)))) for v in COLOURS[name])
            far = other and sum(abs(v - w) for v, w in zip(rgb, other))
            if other is None or style.contrast[0] <= far <= style.contrast[1]:
                break
        return name, rgb

    def second(rgb, low, high):                                 # a colour between rgb and another
        t = u(low, high)
        return tuple(round(v + (w - v) * t) for v, w in zip(rgb, colour()[1]))

    def pick(table):
        return rng.choices(list(table), list(table.values()))[0]

    (ground_name, ground), fill, back = colour(), pick(style.fill), pick(style.ground)
    name, rgb = colour(ground)
    size = u(*style.size)
    radius, angle = size * CANVAS / 2, u(*style.rotate)
    if shape in ("arrow", "crescent") and rng.random() < 0.5:
        angle += rng.choice([90, 180, 270])
    if shape == "cross" and rng.random() < 0.25:
        angle += 45
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    wide, high, slant = u(*style.squeeze), u(0.85, 1.15), u(*style.slant)
    room = max(0.0, CANVAS / 2 - radius)
    cx, cy = (CANVAS / 2 + u(-1, 1) * min(style.shift * CANVAS, room) for _ in range(2))
    jag = style.jagged * OVERSAMPLE
    outline = [[(wide * x + slant * y, high * y) for x, y in p] for p in polygons(shape, u)]
    outline = [[(cx + radius * (x * c - y * s) + rng.gauss(0, jag),
                 cy + radius * (x * s + y * c) + rng.gauss(0, jag)) for x, y in p]
               for p in outline]
    mask = Image.new("L", (CANVAS, CANVAS))
    pen, width = ImageDraw.Draw(mask), max(2, round(u(*style.stroke) * OVERSAMPLE))
    for k, p in enumerate(outline):
        if fill == "outline":
            pen.line(p + p[:2], 255, width, joint="curve")
        elif fill == "dotted":
            draw_dots(pen, p, width, width * u(1.6, 2.2))
        else:
            pen.polygon(p, 0 if k else 255)
    picture = texture(back, ground, second(ground, 0.25, 0.6), rng)
    kinds = ["stripes", "checks", "dots", "clouds", "gradient"] if fill == "textured" else ["plain"]
    picture.paste(texture(rng.choice(kinds), rgb, second(rgb, 0.4, 0.8), rng), (0, 0), mask)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.randint(*style.clutter)):
        x, y, t, length = u(0, CANVAS), u(0, CANVAS), u(0, 2 * math.pi), u(0.1, 0.35) * CANVAS
        end = (x + length * math.cos(t), y + length * math.sin(t))
        pen.line([(x, y), end], colour()[1], rng.randint(OVERSAMPLE, 2 * OVERSAMPLE))
    picture = picture.reduce(OVERSAMPLE).filter(ImageFilter.GaussianBlur(u(*style.blur)))
    noise = Image.frombytes("RGB", picture.size, rng.randbytes(3 * PIXELS * PIXELS))
    picture = Image.blend(picture, noise, u(*style.noise))
    return picture, {"colour": name, "ground": ground_name, "fill": fill, "size": size}


def demo_images(name, split):
    """(PIL images, int labels, class names) of a style; "" is the default, "narrow". The pictures
    depend on style and split alone: about 2,000 to train, 1,000 to test."""
    name = name or "narrow"
    if name not in STYLES:
        raise DataError(f"demo:{name}: unknown style, expected one of {', '.join(STYLES)}")
    style, rng = STYLES[name], random.Random(f"{name} {split}")
    n, C = {"train": 2000, "test": 1000}[split], len(SHAPES)
    weights = [style.rarest ** (k / (C - 1)) for k in range(C)]
    y = [k for k in range(C) for _ in range(round(n * weights[k] / sum(weights)))]
    rng.shuffle(y)
    return [draw(SHAPES[k], style, rng)[0] for k in y], y, list(SHAPES)


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


def pick_device(name=None):
    """torch.device of --device; without a name CUDA, then MPS, then CPU. DataError if unusable."""
    name = name or ("cuda" if torch.cuda.is_available() else
                    "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as e:
        raise DataError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from None


def precision(amp, device):
    """(autocast, GradScaler) of --amp. Weights are fp32 throughout; fp16 needs its loss scaled."""
    if amp == "auto":
        bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        amp = "bf16" if bf16 else "fp16" if device.type == "cuda" else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16" and device.type == "cuda")
    return (lambda: torch.autocast(device.type, dtype) if dtype else nullcontext()), scaler


def auroc(score, right):
    """Probability that a right label scores above a wrong one, a tie counting half; None if there
    are no right or no wrong ones. score (N,), right (N,) bool."""
    values, rank = score.double().unique(return_inverse=True)
    n = torch.bincount(rank, minlength=len(values)).double()                    # images per value
    mean_rank = (n.cumsum(0) - (n - 1) / 2)[rank]                               # (N,)
    a, b = int(right.sum()), int((~right).sum())
    area = mean_rank[right].sum() - a * (a + 1) / 2
    return round(float(area / (a * b)), 4) if a and b else None


# ---- run folder ----

class Run:
    """The run folder (args.json, log.jsonl, last.pt) and the live line on the screen."""
    def __init__(self, out, args, resume=False, overwrite=False):
        self.out, self.start, self.shown, self.state = Path(out), time.time(), 0.0, None
        self.lines = [args]
        if resume:
            if not (self.out / "last.pt").is_file():
                raise DataError(f"--resume: no last.pt in {self.out}, nothing to continue")
            try:
                self.state = torch.load(self.out / "last.pt", map_location="cpu", weights_only=True)
                self.lines, self.start = self.state["log"], self.start - self.state["seconds"]
            except Exception as e:                      # torch.load raises nearly anything
                raise DataError(f"{self.out / 'last.pt'} is not a checkpoint of this script: "
                                f"{_reason(e)}") from None
            other = [k for k, v in self.lines[0].items()
                     if k not in ("resume", "overwrite", "out", "device", "workers")
                     and args.get(k) != v]
            if other:
                raise DataError(f"--resume: {self.out} was begun with other settings: "
                                     + ", ".join(f"{k} {self.lines[0][k]}" for k in other))
        elif (self.out / "last.pt").exists() and not overwrite:
            raise DataError(f"{self.out} already holds a run: give --resume to continue it, "
                                 f"--overwrite to replace it, or another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        for old in ("last.pt", "model.pt", "predictions.csv", "pseudo_labels.png"):
            if not resume:
                (self.out / old).unlink(missing_ok=True)
        self.write("args.json", json.dumps(self.lines[0], indent=2) + "\n")
        self.log()

    def write(self, name, text):
        (self.out / name).write_text(text, encoding="utf-8")

    def log(self, **line):
        self.lines += [line] if line else []
        self.write("log.jsonl", "".join(json.dumps(line) + "\n" for line in self.lines))

    def save(self, name, content):
        """Written beside, then moved: an interrupted write leaves the previous file intact."""
        torch.save(content, self.out / f"{name}.tmp")
        os.replace(self.out / f"{name}.tmp", self.out / name)

    def live(self, text):
        """A line that the next one overwrites; on a terminal only."""
        if sys.stdout.isatty() and time.time() - self.shown > 0.2:
            print(f"\r{text[:99]:<99}", end="", flush=True)
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
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "class", "confidence", "p_clean"])
        table.writerows((n, c, f"{a:.4f}", f"{b:.4f}") for n, c, a, b in rows)


def contact_sheet(path, images, class_names, p, p_clean, cell=56, columns=8):
    """pseudo_labels.png: a row per class (40 at most); left the labels with the highest p_clean,
    right the rejected ones (p_clean < 1/2), worst first. p, p_clean (N, C)."""
    y = p.argmax(dim=1)
    q = p_clean.gather(1, y[:, None])[:, 0]                                     # (N,)
    C, left, right = min(len(class_names), 40), 110, 110 + columns * cell + 10
    sheet = Image.new("RGB", (right + columns * cell, 18 + C * cell), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((left, 3), "accepted, cleanest first", "black")
    pen.text((right, 3), "rejected, worst first", "black")
    for k in range(C):
        top = 18 + k * cell
        pen.text((4, top + cell // 2 - 6), class_names[k][:17], "black")
        for x0, mine, sign in ((left, (y == k) & (q > 0.5), -1), (right, (y == k) & (q <= 0.5), 1)):
            mine = mine.nonzero()[:, 0]                                         # their indices
            for j, i in enumerate(mine[(sign * q[mine]).argsort()][:columns].tolist()):
                picture = ImageOps.fit(images.image(i), (cell - 2, cell - 2))
                sheet.paste(picture, (x0 + j * cell, top))
    sheet.save(path)


# ---- main ----

def main(argv=None):
    parser = argparse.ArgumentParser(description="Print what is found in a folder.")
    parser.add_argument("path", help="folder, or demo[:STYLE]")
    parser.add_argument("--classes", help="a,b,c or a file with one class name per line")
    args = parser.parse_args(argv)
    try:
        found = load(args.path, args.classes)
    except DataError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    print(found.description)
    print(f"classes: {', '.join(found.class_names)}")
    for name, images in (("train", found.train), ("test", found.test)):
        for i in torch.linspace(0, len(images) - 1, min(5, len(images))).long().tolist():
            label = "?" if images.y_true is None else found.class_names[images.y_true[i]]
            print(f"{name:5}  {label:20}  {images.names[i]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
