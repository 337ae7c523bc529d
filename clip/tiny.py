"""How clip/tiny.pt, the CLIP of the demo, was pretrained: CLIP's own recipe at toy size.

    python -m clip.tiny                                             # writes clip/tiny.pt
    python -m clip.tiny --layers 2 --width 64 --out small.pt        # for coft.py --student small.pt

100,000 pictures of the demo world's style "source" (clip/shapes.py), each with the kind of caption
that people write on the web: sometimes the class name, sometimes another word or a description,
sometimes something wrong or empty. Two towers learn which caption belongs to which picture of the
batch (Radford et al. 2021, arXiv 2103.00020, figure 3); no class label is used.
"""
import argparse
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from clip import shapes
from clip.clip import MEAN, STD, tokenize
from clip.model import CLIP

OTHER_NAMES = {
    "circle": ("disc", "disk", "ball", "round dot", "coin", "bubble"),
    "square": ("box", "block", "tile", "cube"),
    "triangle": ("wedge", "pyramid", "tent", "cone"),
    "star": ("starfish", "sheriff badge", "asterisk", "sparkle"),
    "heart": ("love symbol", "valentine", "love sign"),
    "cross": ("plus sign", "x mark", "first aid sign", "plus"),
    "ring": ("hoop", "donut", "tyre", "wheel", "washer"),
    "crescent": ("moon", "half moon", "banana", "sickle"),
    "arrow": ("pointer", "direction sign", "dart", "road sign"),
    "diamond": ("rhombus", "lozenge", "gem", "kite"),
}
LOOKS = {
    "circle": ("a perfectly round shape without corners",
               "a round filled shape with a smooth curved edge",
               "something round like a ball"),
    "square": ("a shape with four equal sides and four right angles",
               "a flat box with straight edges and four corners",
               "four sides of the same length"),
    "triangle": ("a shape with three straight sides and three corners",
                 "a pointed top and a flat wide base",
                 "three sides meeting in three sharp corners"),
    "star": ("a shape with five sharp points around the centre",
             "five pointed arms that stick out",
             "points around a small body like in the night sky"),
    "heart": ("two round bumps on top and one point at the bottom",
              "two curved lobes above and a pointed bottom",
              "a symbol of love with two rounded lobes"),
    "cross": ("two bars of equal length that meet at right angles",
              "four arms of the same length",
              "a vertical bar and a horizontal bar crossing in the middle"),
    "ring": ("a round band with a hole in the middle",
             "a circle with an empty centre",
             "two round edges with a hole inside like a donut"),
    "crescent": ("a thin curved moon shape with two pointed tips",
                 "a curved shape with a bite taken out of one side",
                 "a moon with two sharp horns"),
    "arrow": ("a straight shaft with a triangular head that points to one side",
              "a pointed head on a long thin bar",
              "a sign that points in one direction"),
    "diamond": ("a tall shape with four sides standing on one corner",
                "a square stretched and standing on its point",
                "four slanted sides with a point at the top and bottom"),
}
FRAMES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "a drawing of a {}.",
          "a {}.", "the {}", "{}", "one {} in the picture", "this is a {}.", "a close up of a {}.",
          "my {}", "a photo of the {}.", "a cropped photo of a {}.")


MISTAKEN_FOR = {"circle": "ring", "ring": "circle", "square": "diamond", "diamond": "square",
                "triangle": "arrow", "arrow": "triangle", "star": "cross", "cross": "star",
                "heart": "triangle", "crescent": "circle"}


def caption(shape, about, rng):
    """What somebody might write below the picture. about: see `shapes.draw`.

    The class names are used loosely, other words with care. So the image features are good and
    the names are poorly aligned with them: what CLIP is like on a narrow domain.
    """
    kind = rng.choices(("name", "mistaken", "wrong", "other name", "looks", "empty"),
                       (16, 11, 6, 32, 25, 10))[0]
    if kind == "looks":
        looks = rng.choice(LOOKS[shape])
        return rng.choice((looks, f"{looks}.", f"a {about['colour']} shape, {looks}"))
    noun = {"name": shape, "mistaken": MISTAKEN_FOR[shape], "wrong": rng.choice(shapes.SHAPES),
            "other name": rng.choice(OTHER_NAMES[shape]),
            "empty": rng.choice(("shape", "thing", "symbol", "sign"))}[kind]
    if rng.random() < 0.2:
        look = {"outline": "outlined", "textured": "patterned"}.get(about["fill"], "plain")
        noun = f"{look} {noun}"
    if rng.random() < 0.35:
        noun = f"{about['colour']} {noun}"
    if rng.random() < 0.3:
        noun = f"{'small' if about['size'] < 0.75 else 'big'} {noun}"
    text = rng.choice(FRAMES).format(noun)
    if rng.random() < 0.12:
        text = text.rstrip(".") + f" on a {about['ground']} background"
    return text


def picture_caption_pairs(n, seed):
    """n pictures as a uint8 tensor (n, 3, 32, 32), each with four captions."""
    rng, pixels, texts = random.Random(f"source {seed}"), bytearray(), []
    for _ in range(n):
        shape = rng.choice(shapes.SHAPES)
        picture, about = shapes.draw(shape, shapes.STYLES["source"], rng)
        pixels += picture.tobytes()
        texts.append([caption(shape, about, rng) for _ in range(4)])
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(n, shapes.PIXELS, shapes.PIXELS, 3)
    return images.permute(0, 3, 1, 2).contiguous(), texts                   # (n, 3, 32, 32)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000, help="pictures to draw")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=4, help="blocks of the image tower")
    parser.add_argument("--width", type=int, default=128, help="of the image tower, 32 a head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(Path(__file__).with_name("tiny.pt")))
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    start, B = time.time(), args.batch_size

    with ProcessPoolExecutor() as pool:
        parts = list(pool.map(picture_caption_pairs, [args.images // 10] * 10,
                              range(10 * args.seed, 10 * args.seed + 10)))
    images = torch.cat([x for x, _ in parts])                               # (N, 3, 32, 32) uint8
    tokens = tokenize([t for _, texts in parts for four in texts for t in four])    # (4N, 77)
    # Only tokens that occur get a row of the embedding. The order is kept: <eot> stays the largest.
    token_ids, tokens = tokens.unique(return_inverse=True)                  # (V,), (4N, 77)
    tokens = tokens.view(len(images), 4, -1)[..., :int((tokens > 0).sum(-1).max())]
    print(f"{len(images)} pictures, {len(token_ids)} tokens, {time.time() - start:.0f} s")

    heads = {"vision_heads": args.width // 32, "transformer_heads": 2}
    model = CLIP(embed_dim=64, image_resolution=shapes.PIXELS, vision_layers=args.layers,
                 vision_width=args.width, vision_patch_size=8, context_length=77,
                 vocab_size=len(token_ids), transformer_width=64, transformer_layers=2, **heads)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.98), weight_decay=0.05)
    steps = args.epochs * (len(images) // B)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(
        1, (k + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * k / steps) if k > 200 else 1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    same = torch.arange(B)                                                  # caption i for image i
    for epoch in range(args.epochs):
        order, total = torch.randperm(len(images)), 0.0
        for batch in order[:len(order) // B * B].split(B):
            x = (images[batch].float() / 255 - mean) / std                  # (B, 3, 32, 32)
            x = torch.where(torch.rand(B, 1, 1, 1) < 0.5, x, x.flip(-1))
            logits, _ = model(x, tokens[batch, torch.randint(4, (B,))])     # (B, B)
            loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            total += loss.item()
        print(f"epoch {epoch + 1}/{args.epochs}  loss {total / (len(order) // B):.3f}  "
              f"scale {model.logit_scale.exp():.1f}  {time.time() - start:.0f} s", flush=True)
        state = {k: v.half() for k, v in model.state_dict().items()}
        torch.save({"state_dict": state, "token_ids": token_ids, "vocab_size": 49408,
                    "quick_gelu": True, **heads}, args.out)


if __name__ == "__main__":
    main()
