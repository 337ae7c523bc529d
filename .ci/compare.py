#!/usr/bin/env python
"""All methods on the same ground: the table of README. Not in CI's path; hours on a laptop.

    python .ci/compare.py --out runs/compare --worlds narrow,slanted --seeds 0,1,2
    python .ci/compare.py --out runs/compare --glyphs glyphs --worlds mnist,letters
    python .ci/compare.py softmax --data demo:torn          # coft.py with another filter, of four

Worlds are styles of the demo, and mnist, digits and letters as .ci/handwriting.py leaves them in
--glyphs. Every run is a command, printed before it runs and skipped if --out holds its result, so
that the script can be stopped, and started again with more methods, worlds and seeds. The table at
the end has the test accuracy at the end, of five crops, mean and standard deviation over the seeds.
"""
import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PEERS = ["upl", "grip", "cpl", "lafter", "fixmatch", "must", "deft"]
FILTERS = ["none", "perfect", "softmax", "self"]
PAPER = "--recipe", "paper+crops"
METHODS = {
    **{name: [".ci/peers.py", name] for name in PEERS},
    **{f"{name} filter": [".ci/compare.py", name] for name in FILTERS},
    "coft paper": ["coft.py", *PAPER], "coft ours": ["coft.py"],
    "coft_plus paper": ["coft_plus.py", *PAPER], "coft_plus ours": ["coft_plus.py"],
    "coft_plus paper without sentences": ["coft_plus.py", *PAPER, "--prompts", ""],
    "coft_plus ours without sentences": ["coft_plus.py", "--prompts", ""],
    "prompt_align q=0.3": ["prompt_align.py", "--q", "0.3"],
    "supervised": [".ci/peers.py", "supervised"]}
GLYPHS = {"mnist": "a photo of the number {}.", "digits": "a photo of the number {}.",
          "letters": "the letter {}"}


def with_filter(name, argv):
    """coft.py with another filter of phase 2's labels. "none": all are clean; "perfect": the right
    ones are; "softmax": the surest by the peer's softmax, as many of each student as p_clean would
    have kept; "self": each student judges itself. Flags are coft.py's."""
    import coft                         # before torch, see there
    import torch
    guess, select_clean, y_true = coft.guess, coft.select_clean, []

    def guess_and_look(job, table):
        y_true[:] = [job.dataset.train.y_true]                                  # (N,)
        return guess(job, table)

    def select(p, table):
        y, clean = select_clean(p, table)                                       # (2, N) each
        if name == "self":
            return y, coft.at(table.p_clean, table.index, y) > 0.5
        for me, peer in ((0, 1), (1, 0)):
            score = {"none": torch.ones(len(y[me])), "perfect": y[me] == y_true[0],
                     "softmax": coft.at(p[peer], table.index[peer], y[me])}[name]       # (N,)
            kept = clean[me].sum() if name == "softmax" else score.sum()
            clean[me] = False
            clean[me, score.float().topk(int(kept)).indices] = True
        return y, clean
    coft.guess, coft.select_clean = guess_and_look, select
    return coft.main(argv)


def flags_of(world, glyphs, with_sentences):
    """Which images, which CLIP, which sentences."""
    file = glyphs / f"{world}.json" if world in GLYPHS else "prompts/demo.json"
    flags = ["--prompts", str(file)] if with_sentences else []
    if world not in GLYPHS:
        return ["--data", f"demo:{world}", *flags]
    return ["--data", str(glyphs / world), "--weights", str(glyphs / "glyph.pt"), "--workers", "0",
            "--template", GLYPHS[world], *flags]


def result(command, out):
    """The last line of the run's log; runs it if there is none."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    if not lines or "zero_shot" not in json.loads(lines[-1]):
        print(shlex.join(command), flush=True)
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run([sys.executable, *command, "--out", str(out)], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
        lines = log.read_text().splitlines()
    return json.loads(lines[-1])


def cell(values):
    """Mean ± standard deviation; of a single run "(1)" behind it."""
    if len(values) < 2:
        return f"{values[0]:.1f} (1)" if values else "not run"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in FILTERS:
        return with_filter(argv[0], argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="for all runs")
    parser.add_argument("--worlds", default="narrow,slanted,torn,crowd,longtail")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--glyphs", type=Path, default=Path("glyphs"), help="of handwriting.py")
    args = parser.parse_args(argv)
    worlds, rows = args.worlds.split(","), {}
    for method in args.methods.split(","):
        for world in worlds:
            reads = method in ("lafter", "coft_plus paper", "coft_plus ours")
            flags = flags_of(world, args.glyphs.absolute(), reads)
            runs = [result([*METHODS[method], *flags, "--seed", seed],
                           args.out.absolute() / f"{method}-{world}-{seed}".replace(" ", "_"))
                    for seed in args.seeds.split(",")]
            rows.setdefault("zero-shot", {}).setdefault(world, [runs[0]["zero_shot"]])
            rows.setdefault(method, {})[world] = [run["accuracy"] for run in runs]
    print("| |", " | ".join(worlds), "|\n|---|" + "---|" * len(worlds))
    for method, found in rows.items():
        cells = [cell(found.get(world, [])) for world in worlds]
        if method == "zero-shot":                       # the same with every seed
            cells = [text.removesuffix(" (1)") for text in cells]
        print(f"| {method} |", " | ".join(cells), "|")


if __name__ == "__main__":
    sys.exit(main())
