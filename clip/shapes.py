"""The demo's world of ten drawn shapes. `clip/tiny.py` pretrains a tiny CLIP on the style "source";
the other styles draw the same shapes with a shift of domain that it has not seen.
"""
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFilter

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
    "torn": replace(CLEAN, fill={"solid": 1, "textured": 1}, jagged=1.2, rotate=(-26, -16)),
    "crowd": replace(CLEAN, clutter=(2, 4), size=(0.5, 0.75), slant=(-0.3, -0.15)),
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


def pictures(name, split, first=None):
    """(PIL images, int labels) of a style. They depend on style and split alone: about 2,000 to
    train, 1,000 to test, or the first ones of them."""
    style, rng = STYLES[name], random.Random(f"{name} {split}")
    n, C = {"train": 2000, "test": 1000}[split], len(SHAPES)
    weights = [style.rarest ** (k / (C - 1)) for k in range(C)]
    y = [k for k in range(C) for _ in range(round(n * weights[k] / sum(weights)))]
    rng.shuffle(y)
    return [draw(SHAPES[k], style, rng)[0] for k in y[:first]], y[:first]
