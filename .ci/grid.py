#!/usr/bin/env python
"""Small and odd worlds: does a run ever end below zero-shot? Not in CI's path; an hour on a laptop.

    python .ci/grid.py --out runs/grid                      # drawn shapes, clip/tiny.pt
    python .ci/grid.py --out runs/grid --glyphs glyphs      # and digits, letters: handwriting.py

2 to 300 classes, 3 to 700 training images per class, balanced or 10:1. The images are written as
folders, train/CLASS and test/CLASS. Further flags go to coft.py (or --script coft_plus.py). Runs
that are there are not repeated. At the end: each world's zero-shot and last accuracy, mean ±
standard deviation of the seeds, the worst and the mean difference.
"""
import argparse
import json
import math
import random
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from clip import shapes

COLOURED = [f"{c} {s}" for s in shapes.SHAPES for c in ("red", "green", "blue", "yellow", "orange",
                                                        "purple", "black", "white", "gray", "cyan")]
LOOKS = {"solid": "plain", "textured": "patterned", "outline": "outlined"}    # in captions
shapes.STYLES["three looks"] = replace(shapes.STYLES["slanted"], fill=dict.fromkeys(LOOKS, 1))
DRAWN = {   # name: (style, classes, training images of the first class, of the last one)
    "two": ("turned", ["circle", "heart"], 50, 50),
    "two alike": ("neon", ["circle", "ring"], 200, 200),
    "four, many": ("quilt", ["square", "star", "arrow", "cross"], 500, 500),
    "ten, five each": ("torn", list(shapes.SHAPES), 5, 5),
    "ten, twenty each": ("beads", list(shapes.SHAPES), 20, 20),
    "ten, 10:1": ("crowd", list(shapes.SHAPES), 200, 20),
    "coloured, 20": ("neon", [c for c in COLOURED if c.split()[0] in ("red", "blue")], 25, 25),
    "coloured, 100": ("slanted", COLOURED, 20, 20),
    "coloured, 100, 10:1": ("narrow", COLOURED, 40, 4),
    # after A5 was settled; nothing was chosen on these six
    "new: ten, ten each": ("quilt", list(shapes.SHAPES), 10, 10),
    "new: ten, 20 to 4": ("turned", list(shapes.SHAPES), 20, 4),
    "new: three": ("crowd", ["triangle", "arrow", "star"], 30, 30),
    "new: coloured, ten": ("slanted", [c for c in COLOURED if c.split()[0] == "green"], 12, 12),
    # after K was made a share of the class
    "new: two, many": ("turned", ["square", "ring"], 700, 700),
    "new: five, many": ("beads", ["circle", "triangle", "star", "heart", "cross"], 300, 300),
    # many classes of few images; nothing was chosen on those after the first three
    "coloured, 100, three each": ("slanted", COLOURED, 3, 3),
    "coloured, 50, five each": ("crowd", COLOURED[1::2], 5, 5),
    "coloured, 50, ten each": ("torn", COLOURED[::2], 10, 10),
    "new: coloured, 50, six each": ("quilt", COLOURED[::2], 6, 6),
    "new: coloured, 34, nine each": ("neon", COLOURED[::3], 9, 9),
    "new: coloured, 100, five each": ("beads", COLOURED, 5, 5),
    "new: three looks, 300": ("three looks", [" ".join(c.split()[:1] + [look] + c.split()[1:])
                                              for look in LOOKS.values() for c in COLOURED],
                              12, 12)}
GLYPHS = {  # name: (folder, classes or all, first, last, template)
    "digits, 3 and 8": ("mnist", ["three", "eight"], 100, 100, "a photo of the number {}."),
    "digits, five each": ("mnist", None, 5, 5, "a photo of the number {}."),
    "digits, 10:1": ("mnist", None, 300, 30, "a photo of the number {}."),
    "letters, ten each": ("letters", None, 10, 10, "the letter {}"),
    "letters, 10:1": ("letters", None, 50, 5, "the letter {}"),
    "new: digits, five": ("mnist", ["one", "two", "four", "seven", "nine"], 15, 15,
                          "a photo of the number {}."),
    "new: letters, a to m": ("letters", list("abcdefghijklm"), 20, 20, "the letter {}")}


def counts(C, first, last):
    """Images of each of C classes, falling geometrically."""
    return [round(first * (last / first) ** (k / max(1, C - 1))) for k in range(C)]


def draw_world(folder, style, classes, first, last):
    """Fills folder/train and folder/test (2,000 images or 20 of each class)."""
    rng, C = random.Random(folder.name), len(classes)
    for part, numbers in (("train", counts(C, first, last)),
                          ("test", [max(20, 2000 // C)] * C)):
        left = dict(zip(classes, numbers))
        while any(left.values()):
            shape = rng.choice(shapes.SHAPES)
            picture, facts = shapes.draw(shape, shapes.STYLES[style], rng)
            colour, look = facts["colour"], LOOKS.get(facts["fill"])
            for name in (shape, f"{colour} {shape}", f"{colour} {look} {shape}"):
                if left.get(name):
                    left[name] -= 1
                    path = folder / part / name / f"{left[name]:04d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    picture.save(path)


def pick_world(folder, source, classes, first, last):
    """The first images of each class of a folder with train/ and test/."""
    classes = classes or sorted(path.name for path in (source / "train").iterdir())
    for part, numbers in (("train", counts(len(classes), first, last)),
                          ("test", [math.inf] * len(classes))):
        for name, n in zip(classes, numbers):
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for k, path in enumerate(sorted((source / part / name).iterdir())):
                if k < n:
                    Image.open(path).save(folder / part / name / path.name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/grid"))
    parser.add_argument("--script", default="coft.py")
    parser.add_argument("--glyphs", type=Path, help="folder of .ci/handwriting.py")
    parser.add_argument("--seeds", default="0,1,2")
    args, more = parser.parse_known_args(argv)
    worlds = {name: ["--arch", "tiny"] for name in DRAWN}
    if args.glyphs:
        worlds |= {name: ["--weights", str(args.glyphs.absolute() / "glyph.pt"), "--template",
                          world[-1]] for name, world in GLYPHS.items()}
    print("| world | classes | training images | zero-shot | after | difference |")
    print("|---|---|---|---|---|---|")
    differences = []
    for name, flags in worlds.items():
        folder, out = (args.out.absolute() / kind / name.replace(" ", "_").replace(",", "")
                       .replace(":", "") for kind in ("images", Path(args.script).stem))
        if not folder.exists():
            if name in DRAWN:
                draw_world(folder, *DRAWN[name])
            else:
                source, classes, first, last, _ = GLYPHS[name]
                pick_world(folder, args.glyphs / source, classes, first, last)
        ends = []
        for seed in args.seeds.split(","):
            log = out / seed / "log.jsonl"
            if not log.exists() or '"zero_shot"' not in log.read_text():
                subprocess.run([sys.executable, str(ROOT / args.script), "--data", str(folder),
                                "--workers", "0", "--seed", seed, "--out", str(out / seed), *flags,
                                *more], check=True, stdout=subprocess.DEVNULL)
            ends.append(json.loads(log.read_text().splitlines()[-1]))
        after = [end["accuracy"] for end in ends]
        differences.append(statistics.mean(after) - ends[0]["zero_shot"])
        spread = f" ± {statistics.stdev(after):.1f}" if len(after) > 1 else ""
        print(f"| {name} | {len(list((folder / 'train').iterdir()))} | "
              f"{len(list((folder / 'train').glob('*/*')))} | {ends[0]['zero_shot']:.1f} | "
              f"{statistics.mean(after):.1f}{spread} | {differences[-1]:+.1f} |", flush=True)
    print(f"\nworst {min(differences):+.1f}, mean {statistics.mean(differences):+.1f}")


if __name__ == "__main__":
    main()
