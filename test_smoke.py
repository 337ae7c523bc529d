"""Tests of everything, on a CPU and without a network: python -m pytest -q test_smoke.py

clip/ against golden numbers, data.py against small data sets in their real formats, equations and
training against plain arithmetic, and whole runs on pieces of the demo.
"""
import copy
import csv
import hashlib
import http.server
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import coft                             # first: its setting for OpenMP comes before torch
import coft_plus
import prompt_align as pa
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import clip
import data
from clip import clip as clip_files
from clip import shapes
from clip.model import CLIP, QuickGELU

torch.set_num_threads(1)                # as the processes that tests start: the same last bits
coft.VIEWS = coft_plus.VIEWS = 2        # in place of 8: shorter runs, in those processes too
coft.WHOLE = coft_plus.WHOLE = 1        # in place of 300: what short runs learn counts in full


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


# ======== clip/: tokens and towers ========

VIT = dict(embed_dim=32, image_resolution=32, vision_layers=2, vision_width=128,
           vision_patch_size=8, context_length=77, vocab_size=49408, transformer_width=64,
           transformer_layers=2)
RESNET = VIT | dict(image_resolution=64, vision_layers=(1, 2, 1, 1), vision_width=16,
                    vision_patch_size=None)
TEXTS = ["a photo of a cat", "two blue stars, seen from the side", "x"]


def noise(n, seed):
    """n numbers in [-0.5, 0.5) from integer arithmetic: the same with every version of torch."""
    i = torch.arange(n, dtype=torch.int64)
    return ((i * i * 12345 + i * 54321 + seed * 7919 + 1) % 65521).double() / 65521 - 0.5


def golden_weights(shape):
    """A state dict whose values depend on names and shapes only."""
    with torch.device("meta"):
        reference = CLIP(**shape).state_dict()
    weights = {}
    for seed, (key, value) in enumerate(sorted(reference.items())):
        u = noise(value.numel(), seed).reshape(value.shape)
        if key == "logit_scale":
            u = u + 3.0
        elif "running_var" in key or (value.dim() == 1 and key.endswith("weight")):
            u = 1 + 0.3 * u
        else:
            u = 0.2 * u if value.dim() < 2 else u * 3 / value[0].numel() ** 0.5
        weights[key] = u.to(torch.int64 if "num_batches" in key else torch.float32)
    return weights


def golden_images(n, size):
    return 4 * noise(n * 3 * size * size, 99).reshape(n, 3, size, size).float()     # (n, 3, R, R)


@pytest.fixture(scope="module")
def vit():
    return clip.build_model(golden_weights(VIT))


@pytest.fixture(scope="module")
def resnet():
    return clip.build_model(golden_weights(RESNET))


GOLDEN_IDS = {                                          # of openai/CLIP's tokenizer
    'A Photo of the Hard-to-See GOLDEN RETRIEVER, a type of pet.':
        [320, 1125, 539, 518, 1626, 268, 531, 268, 862, 3878, 28394, 267, 320, 3877, 539, 3703,
         269],
    "don't we've I'LL 'S": [847, 713, 649, 1200, 328, 1342, 568],
    '&lt;b&gt; &amp;amp; caf&eacute;': [283, 321, 285, 261, 15304],
    'l\u2019\xe9t\xe9 \xc3\xa9t\xc3\xa9 na\xefve':
        [331, 262, 3459, 39694, 3459, 39694, 1097, 35689, 563],
    '\uff11\uff12\uff13 3.14 co2 \xbd \u21165':
        [272, 273, 274, 274, 269, 272, 275, 1320, 273, 33613, 8604, 500, 276],
    '\u65e5\u672c\u8a9e\u306e\u5199\u771f \u0444\u043e\u0442\u043e':
        [39121, 44353, 34002, 252, 21575, 44653, 33440, 509, 38981],
    '\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f':
        [26304, 26304, 964, 356, 21531, 1752],
    '<|startoftext|>x<|endoftext|>': [49406, 343, 49407],
    'e\u0301\xa0\u2028\u3000end\x00': [4166, 806],
    '_under-score__//\\#tag@me': [318, 1798, 268, 4431, 2355, 15348, 59, 258, 3640, 287, 614],
    "\u0130\u017f'\u017f stra\xdfe": [328, 16384, 129, 379, 6, 129, 379, 1894, 127, 253, 324]}


@pytest.mark.parametrize("text", GOLDEN_IDS)
def test_token_ids(text):
    assert clip_files._tokenizer.encode(text) == GOLDEN_IDS[text]


def test_tokenize():
    rows = clip.tokenize(["a photo of a cat", ""])
    assert rows.shape == (2, 77) and rows.dtype == torch.long
    assert rows[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert rows[1, :3].tolist() == [49406, 49407, 0] and clip.tokenize("cat").shape == (1, 77)
    with pytest.raises(RuntimeError, match="too long for context length 77"):
        clip.tokenize(["very " * 100])
    cut = clip.tokenize("very " * 100, truncate=True)
    assert cut[0, -1] == 49407 and cut[0, -2] == clip_files._tokenizer.encode("very")[0]
    assert clip_files._tokenizer.decode([320, 1125, 539, 320, 2368]) == "a photo of a cat "


@torch.no_grad()
def test_golden_logits(vit, resnet):                    # of openai/CLIP's code, same weights
    for model, golden in ((vit, [[0.6198, 0.17635, 2.73822], [0.97289, 1.47885, 3.32049]]),
                          (resnet, [[-1.14037, 3.91696, -2.80063], [-1.14539, 3.90924, -2.78879]])):
        images = golden_images(2, model.visual.input_resolution)
        logits, _ = model(images, clip.tokenize(TEXTS))                         # (2, 3)
        assert torch.allclose(logits, torch.tensor(golden), rtol=1e-4, atol=1e-4)


def test_architecture_is_inferred(vit, resnet):
    assert vit.visual.input_resolution == 32 and vit.visual.transformer.heads == 2
    assert vit.visual.adapter_widths == [128, 128] and vit.dtype == torch.float32
    assert resnet.visual.adapter_widths == [64, 128, 256, 512]
    assert vit.context_length == 77 and vit.vocab_size == 49408 and not vit.training
    weights = golden_weights(VIT)
    one, two = clip.build_model(weights), clip.build_model(weights, True, 4, 2)     # heads
    assert two.visual.transformer.heads == 4 and two.transformer.resblocks[0].attn.heads == 2
    one.logit_scale.data.zero_()                        # two models share nothing
    assert two.logit_scale != 0 and weights["logit_scale"] != 0


def test_shared_words_and_many_texts_are_exact(vit):
    tokens = clip.tokenize([f"a photo of a {'big ' * (i % 3)}cat" for i in range(300)])[:, :10]
    eot, sizes = tokens.argmax(-1), []                  # the longest text has 9 tokens
    ctx = torch.randn(2, 1, 4, 64).requires_grad_()     # two prompts
    emb = vit.token_embedding(tokens).detach().expand(2, -1, -1, -1)            # (2, 300, 10, W)
    emb = torch.cat([emb[:, :, :1], ctx.expand(-1, 300, -1, -1), emb[:, :, 5:]], dim=2)
    def with_gradients(f):
        return f, *torch.autograd.grad(f.square().sum(), [ctx, vit.text_projection])
    expected = with_gradients(torch.stack([torch.cat([
        vit.encode_text_embeddings(prompt[i:i + 60], eot[i:i + 60]) for i in range(0, 300, 60)])
        for prompt in emb]))
    handle = vit.transformer.resblocks[0].register_forward_pre_hook(
        lambda _, inputs: sizes.append(inputs[0].shape[0] * inputs[0].shape[1]))
    for shared, seen in ((0, 300 * 9), (1, 1 + 300 * 8), (5, 5 + 300 * 4)):
        found = with_gradients(vit.encode_text_embeddings(emb, eot, shared))    # (2, 300, D)
        for value, right in zip(found, expected):
            assert (value - right).abs().max() < 1e-5 * right.abs().max()
        assert sizes == 2 * [2 * seen]                  # tokens of a block, computed again
        sizes.clear()
    handle.remove()


def test_prompts(vit):
    x, prompts, visual = golden_images(2, 32), torch.randn(2, 5, 128).requires_grad_(), vit.visual
    deep = vit.encode_image(x, prompts=prompts)         # (2, 32)
    grad, = torch.autograd.grad(deep.sum(), prompts)
    assert (grad.abs().sum((1, 2)) > 0).all()
    t = visual.conv1(x).flatten(2).transpose(1, 2)      # written out: (2, 16, W)
    t = torch.cat([visual.class_embedding.expand(2, 1, -1), t], 1)
    t = visual.ln_pre(t + visual.positional_embedding)
    t = torch.cat([t[:, :1], prompts[0].expand(2, -1, -1), t[:, 1:]], 1)        # (2, 22, W)
    first = visual.transformer.resblocks[0](t)
    # deep: the second block sees the second row in place of the first; shallow: its result
    second = torch.cat([first[:, :1], prompts[1].expand(2, -1, -1), first[:, 6:]], 1)
    for seen, result in ((second, deep), (first, vit.encode_image(x, prompts=prompts[:1]))):
        out = visual.ln_post(visual.transformer.resblocks[1](seen)[:, 0]) @ visual.proj
        assert torch.allclose(result, out, atol=1e-4)
    with pytest.raises(ValueError, match=r"images must be \(B, 3, 32, 32\)"):
        vit.encode_image(golden_images(1, 40))


def test_blocks_computed_again(vit):
    """checkpointing: the same features and gradients, prompts and adapters among them."""
    visual, x = vit.visual, golden_images(2, vit.visual.input_resolution)
    layers, width, found = visual.transformer.layers, visual.transformer.width, []
    adapter = torch.nn.Linear(width, width)
    for visual.checkpointing in (False, True):
        prompts = torch.ones(layers, 2, width, requires_grad=True)
        f = visual(x, prompts, [lambda site, h: adapter(h) if site == "mlp" else None] * layers)
        found.append([f, *torch.autograd.grad(f.sum(), [prompts, adapter.weight])])
    visual.checkpointing = False
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_adapters_equal_merged_weights(vit, resnet):
    x, blocks = golden_images(2, 32), vit.visual.transformer.resblocks
    down, up = 0.1 * torch.randn(2, 128, 4), 0.1 * torch.randn(2, 4, 384)       # LoRA, rank 4
    lora = [lambda kind, h, i=i: h @ down[i] @ up[i] if kind == "qkv" else None for i in range(2)]
    double = [lambda kind, h, b=b: b.mlp(h) if kind == "mlp" else None for b in blocks]
    merged, doubled = (clip.build_model(vit.state_dict()) for _ in range(2))
    for i in range(2):
        merged.visual.transformer.resblocks[i].attn.in_proj_weight += (down[i] @ up[i]).t()
        doubled.visual.transformer.resblocks[i].mlp.c_proj.weight *= 2
        doubled.visual.transformer.resblocks[i].mlp.c_proj.bias *= 2
    for adapters, model in ((lora, merged), (double, doubled)):
        assert torch.allclose(vit.encode_image(x, adapters=adapters), model.encode_image(x),
                              rtol=1e-4, atol=1e-4)
    seen = []                                           # ResNet: each stage's output, channels last
    result = resnet.encode_image(golden_images(1, 64), adapters=[
        lambda kind, h: (seen.append((kind, tuple(h.shape))), -h)[1]] * 4)
    assert seen == [("stage", (1, 64 // s, 64 // s, c))
                    for s, c in ((4, 64), (8, 128), (16, 256), (32, 512))]
    assert torch.allclose(result, resnet.visual.attnpool(torch.zeros(1, 512, 2, 2)))


# ======== clip/: checkpoints ========

SMALL = golden_weights(VIT | {"vocab_size": 600})       # few tokens, so that files of it are small
HUGGING_FACE = (
    ("token_embedding", "embeddings.token_embedding"), ("conv1", "embeddings.patch_embedding"),
    ("class_embedding", "embeddings.class_embedding"), ("transformer.resblocks", "encoder.layers"),
    ("positional_embedding", "embeddings.position_embedding.weight"), ("attn", "self_attn"),
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("c_fc", "fc1"), ("c_proj", "fc2"),
    ("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm"), ("ln_final", "final_layer_norm"))


def hugging_face(weights):
    """A ViT CLIP's state dict under the names of Hugging Face's CLIPModel."""
    renamed = {"text_model.embeddings.position_ids": torch.arange(77)[None],
               "logit_scale": weights["logit_scale"],
               "text_projection.weight": weights["text_projection"].t().contiguous(),
               "visual_projection.weight": weights["visual.proj"].t().contiguous()}
    for key in weights.keys() - {"logit_scale", "text_projection", "visual.proj"}:
        tower, name = "text" if "visual" not in key else "vision", key.removeprefix("visual.")
        for ours, theirs in HUGGING_FACE:
            name = name.replace(ours, theirs)
        for c, part in zip("qkv", weights[key].chunk(3) if "in_proj" in key else [weights[key]]):
            renamed[f"{tower}_model.{name.replace('in_proj_', f'{c}_proj.')}"] = part
    return renamed


def refused(path, says):
    """Loading gives a CLIPError of one line that names the file and contains `says`."""
    with pytest.raises(clip.CLIPError, match=says) as error:
        clip.load(path)
    assert len(str(error.value).splitlines()) == 1 and str(path) in str(error.value)


@pytest.mark.parametrize("layout", [
    "plain", "half", "state_dict", "module.", "_orig_mod.", "text.", "HF"])
def test_checkpoint_formats(layout, tmp_path):
    path = tmp_path / "weights.bin"
    torch.save({
        "plain": clip.build_model(SMALL).state_dict(),  # an OrderedDict with _metadata
        "half": {k: v.half() for k, v in SMALL.items()},
        "state_dict": {"state_dict": SMALL, "epoch": 3, "quick_gelu": False},
        "module.": {"model": {"module." + k: v for k, v in SMALL.items()}},
        "_orig_mod.": {"model_state_dict": {"_orig_mod." + k: v for k, v in SMALL.items()}},
        "text.": {k if k.startswith(("visual", "logit")) else "text." + k: v
                  for k, v in SMALL.items()} | {"text.attn_mask": torch.zeros(77, 77)},
        "HF": hugging_face(SMALL)}[layout], path)
    model, preprocess = clip.load(str(path))
    for key, value in model.state_dict().items():
        assert torch.equal(value, SMALL[key].half().float() if layout == "half" else SMALL[key])
    assert preprocess(Image.new("L", (37, 53))).shape == (3, 32, 32) and not model.training
    for model, quick in ((model, layout != "state_dict"), (clip.load(path, quick_gelu=True)[0], 1)):
        assert isinstance(model.transformer.resblocks[0].mlp.gelu, QuickGELU) == quick


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    resnet, path = golden_weights(RESNET | {"vocab_size": 600}), tmp_path / "weights.pt"
    for weights, ours in ((hugging_face(SMALL), SMALL), (resnet, resnet)):
        save_file(weights, path)                        # whatever the file is called
        loaded, _ = clip.load(path)
        assert all(torch.equal(v, ours[k]) for k, v in loaded.state_dict().items())
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, "cannot read")


def test_only_some_token_rows_are_stored():
    stored = torch.load(Path(clip.__file__).with_name("tiny.pt"), weights_only=True)
    ids, rows = stored["token_ids"], stored["state_dict"]["token_embedding.weight"]
    model, _ = clip.load("tiny")
    embedding = model.token_embedding.weight            # (49408, W)
    assert len(embedding) == 49408 and torch.equal(embedding[ids], rows.float())
    assert embedding.any(dim=1).sum() == len(ids)       # the other rows are zero
    assert model.visual.transformer.heads == 4 and model.transformer.heads == 2
    clip.check_architecture(model, "tiny")


@pytest.mark.parametrize("shape", [VIT, RESNET])
@pytest.mark.filterwarnings("ignore")                   # torch.jit is deprecated, tracing warns
def test_torchscript_archive_is_read_without_torch_jit(shape, tmp_path, monkeypatch):
    path, model = tmp_path / "w.pt", clip.build_model(golden_weights(shape | {"vocab_size": 600}))
    model.register_buffer("input_resolution", torch.tensor(32))
    inputs = golden_images(1, model.visual.input_resolution), torch.tensor([[598, 5, 599]])
    traced = torch.jit.trace(model, inputs, check_trace=False)
    for name, parameter in traced.named_parameters():   # OpenAI's files: half precision but for
        if "ln_" not in name and "bn" not in name:      # the normalisation layers
            parameter.data = parameter.data.half()
    torch.jit.save(traced, str(path))
    expected = torch.jit.load(str(path)).state_dict()
    monkeypatch.setattr(torch.jit, "load", None)
    weights = clip_files._read_file(path)
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)       # dtypes are compared too
    assert "input_resolution" in weights
    for key, value in clip.load(path)[0].state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key


def test_nothing_in_a_file_is_executed(tmp_path):
    mark, path = tmp_path / "executed", tmp_path / "weights.pt"
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    evil, module = pickle.dumps({"w": Evil()}, protocol=2), b"\x80\x02c__torch__\nA\n)\x81%sb."
    pickle.loads(evil)
    mark.unlink()                                       # it is there: the attack does work
    for pickled in (evil, module % evil[2:-1]):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickled)
            archive.writestr("x/code/__torch__.py", "raise SystemExit")
        refused(path, r"asks for \w+.system, which is refused")
    for zipped, says in ((True, "torch.save its state dict alone"), (False, "wrote before 1.6")):
        torch.save(SMALL | {"x": Evil()}, path, _use_new_zipfile_serialization=zipped)
        refused(path, says)
    assert not mark.exists()


def test_bad_files_give_one_line(tmp_path, monkeypatch):
    path = tmp_path / "weights.pt"
    for content, says in (([1, 2], "no state dict"), ({"fc.weight": torch.zeros(2)}, "is missing"),
                          ({"model": SMALL, "out": Path("runs")}, "its state dict alone"),
                          (SMALL | {"x": torch.zeros(1).expand(2**40)}, "memory"),
                          ({k: v for k, v in SMALL.items() if k != "ln_final.bias"},
                           "do not fit a CLIP model: .*ln_final.bias")):
        torch.save(content, path)
        refused(path, says)
    for raw in (path.read_bytes()[:-100], b"", b"<html>not found</html>"):
        path.write_bytes(raw)
        refused(path, "cannot read .* as a checkpoint")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)     # as if not installed
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    refused(path, "pip install safetensors")
    for path in (tmp_path / "absent.pt", tmp_path):
        refused(path, "no such model or file")
    with pytest.raises(clip.CLIPError, match="jit"):
        clip.load("tiny", jit=True)


# ======== clip/: downloads, from a server on this machine ========

class Server(http.server.BaseHTTPRequestHandler):
    """/good, /wrong (empty), /stall, /missing, /nohash, /hub (redirects to /good, has a hash)."""
    payload, sha256, requests = b"weights", hashlib.sha256(b"weights").hexdigest(), []

    def do_GET(self):
        kind = self.path.split("/")[1]
        self.requests.append((self.command, kind))
        self.send_response({"missing": 404, "hub": 302}.get(kind, 200))
        if kind == "hub":
            self.send_header("Location", "/good/file.bin")
            self.send_header("X-Linked-Etag", f'"{self.sha256}"')
        self.end_headers()
        if kind == "stall":
            time.sleep(3)
        self.wfile.write(self.payload if kind == "good" else b"")

    do_HEAD = do_GET


@pytest.fixture
def download(monkeypatch, tmp_path):
    """Function that gets RN50 from these kinds of hosts in turn and returns the requests made."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(clip_files, "_TIMEOUT", 1)

    def source(kind):                                   # nobody listens at port 9
        url = f"http://127.0.0.1:{9 if kind == 'closed' else httpd.server_port}/{kind}/file"
        return (f"{url}.bin", None) if kind in ("hub", "nohash") else (f"{url}.pt", Server.sha256)
    def download(*kinds):
        monkeypatch.setattr(clip_files, "_sources", lambda name: [source(kind) for kind in kinds])
        Server.requests.clear()
        clip_files._download("RN50", tmp_path / "cache")
        return list(Server.requests)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield download
        httpd.shutdown()


def test_download_and_cache(download, capsys, tmp_path):
    kinds, file = ("missing", "wrong", "stall", "good"), tmp_path / "cache" / "RN50.pt"
    assert download(*kinds) == [("GET", kind) for kind in kinds]
    told = capsys.readouterr().err
    assert all(words in told for words in ("404", "invalid hash", "timed out", "/good/file.pt"))
    assert os.listdir(file.parent) == ["RN50.pt"] and file.read_bytes() == Server.payload
    assert download("missing", "good") == []            # a verified file needs no network
    file.write_bytes(b"mine")                           # a user's file is never replaced
    with pytest.raises(clip.CLIPError, match="SHA-256 differs"):
        download("good")
    assert file.read_bytes() == b"mine"
    file.unlink()
    tried = "cannot download RN50 .*invalid hash.*404.*no SHA-256.*refused.*--weights FILE"
    with pytest.raises(clip.CLIPError, match=tried) as error:
        download("wrong", "missing", "nohash", "closed")
    assert "\n" not in str(error.value) and os.listdir(file.parent) == []


def test_download_with_the_hash_of_the_reply(download, tmp_path):
    for name in clip.available_models()[:-1]:
        assert [url.split("/")[2] for url, _ in clip_files._sources(name)] == [
            "openaipublic.azureedge.net", "openaipublic.blob.core.windows.net", "huggingface.co"]
    file, note = tmp_path / "cache" / "RN50.bin", tmp_path / "cache" / "RN50.bin.sha256"
    assert download("missing", "hub")[1:] == [("HEAD", "hub"), ("GET", "hub"), ("GET", "good")]
    assert file.read_bytes() == Server.payload and note.read_text().strip() == Server.sha256
    assert download("missing", "hub") == [] and len(os.listdir(file.parent)) == 2
    note.unlink()
    file.write_bytes(b"mine")
    with pytest.raises(clip.CLIPError, match="SHA-256 differs"):
        download("hub")
    assert file.read_bytes() == b"mine"


# ======== data.py ========

def written(path, content):
    """path, with bytes or text in it, or a list of lines, or else JSON."""
    if isinstance(content, list) and all(isinstance(line, str) for line in content):
        content = "".join(f"{line}\n" for line in content)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def picture(path, k=0, size=(40, 30), mode="RGB", fmt=None):
    out, noise = io.BytesIO(), random.Random(k).randbytes(size[0] * size[1] * 3)
    fmt = fmt or ("PNG" if path.suffix == ".png" else "JPEG")
    Image.frombytes("RGB", size, noise).convert(mode).save(out, fmt)
    return written(path, out.getvalue())


def draw(root, files):
    for k, file in enumerate(files):
        picture(root / file, k)


def class_folders(root, n=4, names=("dog", "cat", "bear")):
    draw(root, [f"{c}/{k:03d}.png" for c in names for k in range(n)])


def refuses(*args, by=data.load):
    """The message of the DataError; one line, but for the list of what is expected."""
    with pytest.raises(data.DataError) as e:
        by(*args)
    message = str(e.value)
    assert len(message.split(" Expected one of\n")[0].splitlines()) == 1
    return message


def by_hash(base, classes):
    """Of {folder: class name}: names; train, test: {path: label}, split by a hash of the paths."""
    parts = {}, {}
    for file, y in [(f"{base}{c}/sun_{i}.jpg", y) for y, c in enumerate(classes) for i in range(8)]:
        parts[int(hashlib.sha256(file.encode()).hexdigest(), 16) % 5 == 0][file] = y
    return [*classes.values()], *parts


def finds(root, says, name, template, class_names, train, test):
    """`load` finds this, train and test as {path: label}."""
    d = data.load(root)
    assert (d.name, d.class_names, d.templates) == (name, class_names, [template])
    assert says in d.description and "\n" not in d.description
    for images, part in ((d.train, train), (d.test, test)):
        assert dict(zip(images.names, images.y_true.tolist(), strict=True)) == part
        assert images.image(0).size == (40, 30)         # the files are where it says


PHOTO, PET = "a photo of a {}.", "a photo of a {}, a type of pet."
# folder: {other file: content}; text, name, template, class names; {path: label} of train, of test
LAYOUTS = {
    "my pets": ({"split_zhou_OxfordPets.json": {        # CoOp's, told by the split's name
        "train": [["c1.jpg", 1, "bengal_cat"], ["b1.jpg", 0, "beagle"]],
        "val": [["b2.jpg", 0, "beagle"]], "test": [["c3.jpg", 1, "bengal_cat"]]}},
        f'2 classes (beagle, bengal cat), 2 training and 1 test images, "{PET}"', "oxford_pets",
        PET, ["beagle", "bengal cat"], {"images/c1.jpg": 1, "images/b1.jpg": 0},
        {"images/c3.jpg": 1}),
    "fgvc_aircraft": ({
        "variants.txt": ["707-32", "F-16 A"], "images_variant_train.txt": ["1 F-16 A", "2 707-32"],
        "images_variant_val.txt": ["3 707-32"], "images_variant_test.txt": ["4 F-16 A"]},
        "official", "fgvc_aircraft", "a photo of a {}, a type of aircraft.", ["707-32", "F-16 A"],
        {"images/1.jpg": 1, "images/2.jpg": 0}, {"images/4.jpg": 1}),
    "oxford-iiit-pet": ({                               # torchvision's, from here on
        "annotations/trainval.txt": ["Beagle_1 1 2 1", "bengal_cat_1 2 1 1"],
        "annotations/test.txt": ["bengal_cat_2 2 1 1", "Beagle_3 1 2 1"]},
        "torchvision's OxfordIIITPet", "oxford_pets", PET, ["beagle", "bengal cat"],
        {"images/Beagle_1.jpg": 0, "images/bengal_cat_1.jpg": 1},
        {"images/bengal_cat_2.jpg": 1, "images/Beagle_3.jpg": 0}),
    "food-101": ({
        "meta/train.json": {"apple_pie": ["apple_pie/1"], "flan": ["flan/1", "flan/2"]},
        "meta/test.json": {"apple_pie": ["apple_pie/3"], "flan": ["flan/3"]}},
        "Food101", "food-101", "a photo of {}, a type of food.", ["apple pie", "flan"],
        {"images/apple_pie/1.jpg": 0, "images/flan/1.jpg": 1, "images/flan/2.jpg": 1},
        {"images/apple_pie/3.jpg": 0, "images/flan/3.jpg": 1}),
    "dtd": ({
        "dtd/labels/train1.txt": ["lined/1.jpg", "polka-dotted/1.jpg"],
        "dtd/labels/val1.txt": ["lined/2.jpg"],
        "dtd/labels/test1.txt": ["polka-dotted/3.jpg", "lined/3.jpg"]},
        "torchvision's DTD", "dtd", "{} texture.", ["lined", "polka-dotted"],
        {"dtd/images/lined/1.jpg": 0, "dtd/images/polka-dotted/1.jpg": 1},
        {"dtd/images/polka-dotted/3.jpg": 1, "dtd/images/lined/3.jpg": 0}),
    "SUN397": ({"ClassName.txt": ["/a/abbey", "/b/bakery/shop", "/a/airfield"]},
               "hash", "sun397", PHOTO, *by_hash("", {
                   "a/abbey": "abbey", "b/bakery/shop": "shop bakery", "a/airfield": "airfield"})),
    "caltech101": ({"101_ObjectCategories/BACKGROUND_Google/1.jpg": "not a class",
                    "101_ObjectCategories/Faces_easy/1.jpg": "nor this"},
                   "hash", "caltech-101", PHOTO, *by_hash("101_ObjectCategories/", {
                       "Faces": "face", "accordion": "accordion", "yin_yang": "yin yang"})),
    "eurosat": ({}, "hash", "eurosat", "a centered satellite photo of {}.", *by_hash("2750/", {
        "AnnualCrop": "Annual Crop Land", "Forest": "Forest", "SeaLake": "Sea or Lake"})),
    "own": ({"notes.txt": "", "train/.x/1.jpg": "", "train/a/._1.jpg": ""},     # one's own
            "own: train/ + val/; 3 classes (B 1, a, b 2), 4", "", PHOTO, ["B 1", "a", "b 2"],
            {"train/B_1/1.jpg": 0, "train/a/1.jpg": 1, "train/a/b/2.jpg": 1, "train/b_2/1.png": 2},
            {"val/B_1/IMG 0.JPG": 0, "val/b_2/1.jpg": 2}),
    "classes": ({}, "hash", "", PHOTO, *by_hash("", {"dog": "dog", "é_a": "é a"}))}


def lay(root, folder):
    """root/folder, with that layout in it."""
    others, *_, train, test = LAYOUTS[folder]
    for file, content in others.items():
        written(root / folder / file, content)
    draw(root / folder, [*train, *test])
    return root / folder


@pytest.mark.parametrize("folder", LAYOUTS)
def test_layout(tmp_path, monkeypatch, capsys, folder):
    lay(tmp_path, folder)
    monkeypatch.chdir(tmp_path)
    finds(folder, *LAYOUTS[folder][1:])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text, says", [
    ("{", "is not valid JSON"), ("[]", "list indices"), ('{"train": [["a.jpg", 0]]}', "not enough"),
    ('{"train": []}', "'test'"), ('{"train": [["a.jpg", "a", "a"]], "test": []}', "'str'"),
    ('{"train": [["a.jpg", 1, "a"], ["b.jpg", 2, "b"]], "test": []}', "without a gap")])
def test_malformed_lists(tmp_path, text, says):
    file = written(lay(tmp_path, "my pets") / "split_zhou_OxfordPets.json", text)
    assert (message := refuses(file.parent)).startswith(str(file)) and says in message
    file = written(lay(tmp_path, "fgvc_aircraft") / "images_variant_test.txt", "4 F-17")
    assert refuses(file.parent).startswith(f"{file}: expected `1025794 707-320` ...")


@pytest.mark.parametrize("images", ["images/", ""])     # CoOp's, torchvision's
def test_imagenet(tmp_path, images):
    wnids = [f"n{1440764 + 977 * k:08d}" for k in range(1000)]
    train = {f"{images}train/{w}/{w}_1{y}.JPEG": y for y, w in enumerate(wnids)}
    test = {f"{images}val/{w}/ILSVRC2012_val_{y:08d}.JPEG": y for y, w in enumerate(wnids)}
    draw(tmp_path / "imagenet", [*train, *test])
    names = torchvision.models.ResNet50_Weights.DEFAULT.meta["categories"]
    if images:                                          # labels: sorted folders, not its lines
        names = [f"thing {k}" for k in range(1000)]
        names[657] = names[744] = "missile"             # twice in the real file, too
        lines = [f"{w} {c}" for w, c in zip(wnids, names)]
        written(tmp_path / "imagenet" / "classnames.txt", random.Random(3).sample(lines, 1000))
    finds(tmp_path / "imagenet", f"imagenet: {images}train/ + {images}val/; 1000 classes",
          "imagenet", PHOTO, names, train, test)


def test_wordnet_ids(tmp_path):
    class_folders(tmp_path, 2, ["n01443537", "n01629819"])
    written(tmp_path / "classnames.txt", ["n01443537 goldfish"])        # not all
    assert "n01443537, ...): put CoOp's classnames.txt" in refuses(tmp_path)
    assert "put CoOp's classnames.txt" in refuses(tmp_path, "fish,frog")        # in which order?
    written(tmp_path / "classnames.txt", ["n01440764 tench", "n01629819 newt", "n01443537 cod"])
    assert data.load(tmp_path).class_names == ["cod", "newt"]
    d = data.load(tmp_path, adapted=["newt", "cod"])
    assert d.test.y_true.tolist() == [int(name[:9] == "n01443537") for name in d.test.names]


@pytest.mark.parametrize("K", [10, 100])
def test_cifar(tmp_path, monkeypatch, K):
    cls = torchvision.datasets.CIFAR10 if K == 10 else torchvision.datasets.CIFAR100
    root, parts, key = tmp_path / cls.base_folder, [], "labels" if K == 10 else "fine_labels"
    names = pickle.dumps({cls.meta["key"]: [f"thing_{k}" for k in range(K)]}, 2)
    written(root / cls.meta["filename"], names)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    for which in ("train_list", "test_list"):
        files, rng = [file for file, _ in getattr(cls, which)], np.random.default_rng(len(parts))
        x = rng.integers(0, 256, (len(files), K, 3, 32, 32), dtype=np.uint8)
        y = [rng.permutation(K).tolist() for _ in files]
        for file, images, labels in zip(files, x.reshape(len(files), K, 3072), y):
            written(root / file, pickle.dumps({"data": images, key: labels}, 2))
        parts.append((sum(y, []), x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))
    d = data.load(root)
    assert d.class_names == [f"thing {k}" for k in range(K)] and d.name == f"cifar{K}"
    for images, (y, x) in zip((d.train, d.test), parts):
        assert images.y_true.tolist() == y and len(set(images.names)) == len(x)
        few = images.subset(torch.tensor([len(x) - 1, 7]))
        assert few.y_true.tolist() == [y[-1], y[7]]
        assert (few.view(data.transforms(32)[0])[1, 0][0].numpy() == x[7]).all()


def test_mnist(tmp_path):
    raw, parts = tmp_path / "MNIST" / "raw", []
    for part, n in (("train", 30), ("t10k", 20)):
        x = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        y, head = [k % 10 for k in range(n)], struct.pack(">4i", 2051, n, 28, 28)
        written(raw / f"{part}-images-idx3-ubyte", head + x.tobytes())
        written(raw / f"{part}-labels-idx1-ubyte", struct.pack(">2i", 2049, n) + bytes(y))
        parts.append((y, x))
    d = data.load(tmp_path / "MNIST")
    assert d.templates[0].format(d.class_names[9]) == 'a photo of the number: "nine".'
    for images, (y, x) in zip((d.train, d.test), parts):
        assert images.y_true.tolist() == y and (np.asarray(images.image(7))[..., 2] == x[7]).all()


def test_scipy(tmp_path, monkeypatch):
    root, files = tmp_path / "stanford_cars", [f"{k:05d}.jpg" for k in range(1, 5)]
    draw(root, [f"cars_{part}/{file}" for part in ("train", "test") for file in files])
    with monkeypatch.context() as m:
        m.setitem(sys.modules, "scipy", None)           # missing
        m.setitem(sys.modules, "scipy.io", None)
        assert "it needs scipy: pip install scipy. Expected one of\n" in refuses(root)
    savemat = pytest.importorskip("scipy.io").savemat
    (root / "devkit").mkdir()
    names = np.array(["Acura RL Sedan 2012", "Audi TT RS Coupe 2012"], object)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    rows = np.array([*zip((1, 2, 1, 2), files)], [("class", "u1"), ("fname", "O")])
    for file in ("devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
        savemat(root / file, {"annotations": rows})
    parts = [dict(zip([f"cars_{part}/{file}" for file in files], (0, 1, 0, 1)))
             for part in ("train", "test")]
    finds(root, "torchvision's StanfordCars", "stanford_cars", PHOTO,
          ["2012 Acura RL Sedan", "2012 Audi TT RS Coupe"], *parts)


def test_download(tmp_path, capsys, monkeypatch):
    class Fake(torchvision.datasets.OxfordIIITPet):
        def __init__(self, root, download=False, **how):
            if download:
                build(Path(root), "oxford-iiit-pet")
            super().__init__(root, **how)
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", Fake)
    def build(*_):
        raise OSError("no\nroute")
    assert ": no route. Expected one of\n" in refuses(tmp_path / "oxford_pets")
    build = lay
    for said in (2, 0):                                 # twice, also when it failed; no more
        finds(tmp_path / "oxford_pets", *LAYOUTS["oxford-iiit-pet"][1:])
        assert capsys.readouterr().out.count("downloading OxfordIIITPet") == said
    for path in ("typo/oxford_pets", "ucf101", "pets"):
        assert "no such folder" in refuses(tmp_path / path)


def test_folders(tmp_path, capsys):
    class_folders(own := tmp_path / "test")
    assert data.load(own, "Bear,cat,DOG").class_names == ["Bear", "cat", "DOG"]
    d = data.load(own, "dog,emu,cat,bear")              # any order, more of them
    assert d.class_names == ["dog", "emu", "cat", "bear"]
    assert [d.class_names[k] for k in d.test.y_true] == [n.split("/")[0] for n in d.test.names]
    assert "neither --classes nor a model has: cat, dog" in refuses(own, "bear,emu")
    class_folders(alike := tmp_path / "alike", 1, ("g_A+", "g_A", "caf\u00e9"))
    picture(alike / "loose.jpg")
    d = data.load(alike, "caf\u00e9,g A+,g_A")          # names that differ in a sign alone
    assert capsys.readouterr().err == f"warning: 1 other images in {alike} are left out\n"
    assert d.test.y_true.tolist() == [0, 2, 1]
    class_folders(accent := tmp_path / "accent", 1, ("cafe\u0301", "cat"))     # as macOS writes it
    assert data.load(accent, "cat,caf\u00e9").test.y_true.tolist() == [1, 0]
    class_folders(parts := tmp_path / "parts", 1, ("testing/1", "train/cat", "valid/cat"))
    assert data.load(parts).test.names == ["valid/cat/000.png"]
    for some in ("Test/cat more", "seg_train/cat unlabeled", "Training_set test_set"):
        class_folders(parts := tmp_path / some.replace("/", " "), 1, some.split())
        assert f"{some.replace('/cat', '').replace(' ', ', ')} are no classes (if" in refuses(parts)
    assert data.load(parts, "test set,training set").train.y_true is not None
    parts = tmp_path / "seg_train cat unlabeled" / "seg_train"
    assert data.load(parts, "dog,cat").train.y_true.tolist() == [1]
    draw(tmp_path / "flat", ["train/images/0.jpg", "test/images/0.jpg"])        # as YOLO has them
    assert "no names of classes: give --classes" in refuses(tmp_path / "flat")
    class_folders(alone := tmp_path / "alone", 5, ("train/cat", "train/dog"))
    (alone / "train" / "cat" / "thumbs.jpg").mkdir()    # is no picture
    d = data.load(alone)
    assert d.class_names == ["cat", "dog"] and len(d.train) + len(d.test) == 10
    (tmp_path / "train").mkdir()
    assert re.search("no images .*Expected one of\n.*, oxford_pets, ", refuses(tmp_path), re.S)
    picture(tmp_path / "train" / "1.jpg")               # unlabelled
    d = data.load(tmp_path)
    assert d.train.y_true is None and d.class_names == ["bear", "cat", "dog"]
    assert d.test.y_true.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    class_folders(tmp_path / "train", 1, ("cat",))
    assert "test/ has class folders that train/ lacks: bear, dog" in refuses(tmp_path)
    assert data.load(tmp_path / "train", "dog,cat").train.y_true is None        # 1.jpg has no class
    assert "no such folder or image. Expected one of\n  DIR/train/CLASS/*.jpg" in refuses(__file__)
    assert "demo:x: unknown style, expected one of source, narrow, " in refuses("demo:x")


def test_flat_folder(tmp_path):
    root, names = tmp_path / "photos", ["2023/01/a.jpg", "2024/c.jfif", "IMG 0.jpg", "x.jpg"]
    draw(root, [*names, "runs/1/pseudo_labels.png"])    # 2023/ and 2024/ are no classes
    written(root / "IMG_1.HEIC", "a phone's")
    written(root / "runs" / "1" / "args.json", "")      # and a run's own pictures no data
    written(file := tmp_path / "c.txt", "\ufefflong_haired cat\r\n\r\nhot dog\r\n")
    written(line := tmp_path / "line.txt", "cat, hot_dog\n")
    for classes, want in ((str(file), ["long haired cat", "hot dog"]), (" a, b,", ["a", "b"]),
                          (str(line), ["cat", "hot dog"])):
        d = data.load(root, classes)
        assert d.class_names == want and d.train is d.test
        assert d.train.names == names and d.train.y_true is None
    d = data.load(root / "IMG 0.jpg", "a,b")            # one photo
    assert d.train is d.test and d.train.names == ["IMG 0.jpg"] and d.train.y_true is None
    assert "IMG_1.HEIC (convert it to JPEG)" in refuses(root / "IMG_1.HEIC", "a,b")
    for classes, says in ((None, "give --classes"), ("clases.txt", "neither a file nor a list"),
                          ("", "give --classes"), (",", "all different, got none"),
                          ("z,a b,A_b", "all different, got a b, A b")):
        assert says in refuses(root / "2024", classes)


def test_unreadable_are_named_and_skipped(tmp_path, capsys):
    for k in range(5):
        picture(tmp_path / f"ok{k}.jpg", k, (200, 200))
    picture(tmp_path / "png_inside.jpg", 5, mode="RGBA", fmt="PNG")     # wrong extension: fine
    written(tmp_path / "bad_cut.jpg", (tmp_path / "ok0.jpg").read_bytes()[:-9999])
    written(tmp_path / "bad_eps.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bad_bomb.png")
    os.symlink(tmp_path / "nothing", tmp_path / "dangling.jpg")
    os.symlink(tmp_path, tmp_path / "above")
    names = data.load(tmp_path, "a,b").train.names
    assert names == [*(f"ok{k}.jpg" for k in range(5)), "png_inside.jpg"]
    err = capsys.readouterr().err
    assert err.startswith("warning: 4 of 10 images cannot be read: bad_bomb.png (")
    assert err.endswith("dangling.jpg (No such file or directory); skipped\n")
    assert "bad_eps.jpg (cannot identify" in err and err.count("\n") == 1   # no Ghostscript
    for name in names[1:4]:
        (tmp_path / name).unlink()
    assert "4 of 7 images cannot be read: bad_bomb.png" in refuses(tmp_path, "a,b")


def test_too_many_to_open(tmp_path, capsys, monkeypatch):
    draw(tmp_path, ["0.jpg", "2.jpg"])
    written(tmp_path / "1.jpg", b"x")
    with monkeypatch.context() as m:
        m.setattr(data, "MOST_OPENED", 2)
        m.setattr(data, "decode", None)                 # none is opened
        images = data.load(tmp_path, "a,b").train
    (x, _), = data.DeviceLoader(images.view(data.transforms(16)[0]), 3)
    grey = clip_files._transform(16)(Image.new("RGB", (16, 16), "grey"))
    assert torch.equal(x[1], grey) and not torch.equal(x[2], grey)
    assert capsys.readouterr().err.startswith("warning: grey instead of 1.jpg: cannot identify")


def test_templates_and_text_files(tmp_path):
    root = lay(tmp_path, "my pets")
    for template, want in (("ensemble", [PET, *data.ENSEMBLE]), ("his {}?", ["his {}?"])):
        assert data.load(root, None, template).templates == want
    for bad in ("no braces", "{} {}", "{x}", "{} {x}", ""):
        assert f"--template {bad!r}: expected `ensemble` or" in refuses(root, None, bad)
    for text in ('{"a": 1}', '```json\n{"a": 1}\n```\n', '\ufeff{"a": 1}'):
        assert data.read_json(written(tmp_path / "x.json", text)) == {"a": 1}
    message = refuses(written(tmp_path / "x.json", '{"a": 1\n "b": 2}'), by=data.read_json)
    assert "x.json is not valid JSON" in message and "line 2 column 2" in message
    for file in (written(tmp_path / "x.txt", b"one\ntw\xff\n"), tmp_path / "y.txt"):
        assert f"{file}: expected a file of UTF-8 text: " in refuses(file, by=data.read_text)


def epochs(view, n=2, **how):
    """[x1, x2, ..., index] of n epochs, one after the other."""
    loader = data.DeviceLoader(view, 2, **how)
    return [torch.cat(x) for _ in range(n) for x in zip(*loader)]


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_view_is_a_label_firewall(tmp_path):
    class_folders(tmp_path)
    train, (_, *augmented), decoded = data.load(tmp_path).train, data.transforms(16), []
    view, before = train.view(*augmented), epochs(train.view(*augmented))
    assert view.y_true is None and all(x is not train.y_true for x in vars(view).values())
    train.y_true = train.y_true.flip(0)
    assert equal(before, epochs(train.view(*augmented)))
    view.image = lambda i: decoded.append(i) or Image.new("RGB", (9, 9))
    *x, i = view[3, 0]
    assert decoded == [3] and i == 3 and all(v.shape == (16, 16, 3) for v in x)     # decoded once


def test_preprocessing_is_clips(tmp_path):
    for k, size in enumerate([(50, 37), (32, 32), (301, 23), (1, 7)]):
        for mode in ("RGB", "L", "RGBA", "P"):
            picture(tmp_path / "all" / f"{k}{mode}.png", k, size, mode)
    deep = torch.arange(0, 2**16, 64, dtype=torch.int32).view(32, 32).numpy()
    Image.fromarray(deep.astype("uint16")).save(tmp_path / "deep.png")          # 16 bits
    Image.fromarray(deep.astype(">u2")).save(tmp_path / "deep.tif")             # ImageJ's
    for image in (*(data.decode(tmp_path / f"deep.{kind}") for kind in ("png", "tif")), *(
            clip_files.to_rgb(Image.fromarray(v)) for v in (deep, deep // 16))):    # 12 bits
        assert image.getpixel((19, 16)) == (132, 132, 132)          # 33,984 / 256
    Image.new("F", (3, 3)).save(tmp_path / "deep.tif")
    assert "floats" in refuses(tmp_path / "deep.tif", by=data.decode)
    images, plain = data.load(tmp_path / "all", "a,b").train, data.transforms(32)[0]
    views = images.view(plain, data.Plain(plain.prepare, mirror=True))
    (x, mirrored, _), = data.DeviceLoader(views, 16)
    for name, ours in zip(images.names, x):
        rgb = Image.open(tmp_path / "all" / name).convert("RGB")
        assert torch.equal(ours, clip_files._transform(32)(rgb))
    assert torch.equal(mirrored, x.flip(3)) and x.is_contiguous(memory_format=torch.channels_last)


def test_no_flip():
    """A bright left half stays left in every view without --flip, and not in half of those with."""
    x = torch.zeros(64, 64, 3, dtype=torch.uint8)
    x[:, :32] = 255
    for flip in (True, False):
        for t in data.transforms(32, flip)[1:]:
            views = [t._replace(randaugment=False)(x).float() for _ in range(40)]
            lefts = sum(bool(v[:, :8].mean() > v[:, -8:].mean()) for v in views)
            assert 8 < lefts < 32 if flip else lefts == 40


def test_loader(tmp_path):
    draw(tmp_path, [f"{k}.png" for k in range(10)])
    images, (plain, weak, strong) = data.load(tmp_path, "a,b").train, data.transforms(16)
    run, state = partial(epochs, images.view(weak, strong), shuffle=True), torch.get_rng_state()
    x, _, index, *second = both = run()
    assert equal(both, run(workers=2)) and torch.equal(torch.get_rng_state(), state)
    assert equal(run(1, epoch=1), second) and sorted(index.tolist()) == [*range(10)]
    for other in (second, run(1, seed=1)):              # of each epoch and seed: order, crops
        assert not torch.equal(index, other[2])
        assert not torch.equal(x[index.argsort()], other[0][other[2].argsort()])
    for n, shuffle, sizes in ((4, False, [4, 4, 2]), (4, True, [4, 4]), (16, True, [10])):
        loader = data.DeviceLoader(images.view(plain), n, shuffle)
        batches = [index.tolist() for _, index in loader]
        assert len({*sum(batches, [])}) == sum(sizes) and [*map(len, batches)] == sizes
        assert len(loader) == len(sizes)                # at least one batch


@pytest.mark.parametrize("workers", [0, 2] if sys.platform == "linux" else [0])   # forked: shared
def test_cached_pixels(tmp_path, monkeypatch, workers):
    root, log, decode = tmp_path / "set", tmp_path / "log", data.decode
    for k, size in enumerate([(300, 100), (300, 200), (20, 15), (200, 3), (40, 64), (1, 1)]):
        picture(root / "train" / f"{k}.jpg", k, size)
        picture(root / "test" / "ab"[k % 2] / f"{k}.jpg", k + 5, size)
    def logged(path, draft=False):
        with open(log, "a") as file:
            file.write("" if draft else f"{path}\n")
        return decode(path, draft)
    monkeypatch.setattr(data, "decode", logged)
    (plain, *augmented), results = data.transforms(32), []
    for gb, says in ((0, "anew each time"), (1, "once")):
        written(log, "")
        d = data.load(root)
        assert f"images are decoded {says}" in data.cache_pixels(d, (plain, *augmented), gb)
        results.append(epochs(d.train.view(*augmented), shuffle=True, workers=workers))
        for images in (d.train, d.test):
            results[-1] += epochs(images.view(plain), workers=workers)
        # two epochs of six images for training, of two kinds, and six for the test: one is too wide
        assert log.read_text().count("\n") == (18 + 1 if gb else 2 * 18)
    assert equal(*results) and pickle.loads(pickle.dumps(d.train)).caches == {}      # if spawned


def test_predictions(tmp_path):
    p, path = torch.tensor([[0.25, 0.75], [0.9, 0.1]]), tmp_path / "p.csv"
    y = data.write_predictions(path, ["a,1.jpg", "é\udce9.jpg"], ["cat", "dog"], p, 1 - p,
                               all_classes(p))
    assert y.tolist() == [1, 0]
    assert path.read_text(encoding="utf-8").splitlines() == [
        "path,class,confidence,p_clean", '"a,1.jpg",dog,0.7500,0.2500',
        "é\\udce9.jpg,cat,0.9000,0.1000"]


@pytest.mark.skipif(os.name != "posix", reason="needs a timer's signal")
def test_ctrl_c_in_a_write(tmp_path):
    run, content = SimpleNamespace(out=tmp_path), [torch.rand(2**20) for _ in range(64)]
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02)          # of a tenth of a second and more
    with pytest.raises(KeyboardInterrupt):              # and no DataError of a disk that is full
        data.Run.save(run, "last.pt", content)
    signal.signal(signal.SIGALRM, before)
    assert not os.listdir(tmp_path)                     # nor is a part left


def test_pseudo_label_sheet(tmp_path):
    y, names = torch.arange(40) % 10, list("abcdefghij")
    images = data.Images([""] * 40, y, pictures=[Image.new("RGB", (9, 9), "red")] * 40)
    left, right = (110, 18, 550, 578), (570, 18, 1010, 578)
    score = torch.ones(40)
    for clean, full, empty in ((score > 0, left, right), (score < 0, right, left)):     # all; none
        data.pseudo_label_sheet(tmp_path / "x.png", images, names, y, clean, score)
        sheet = Image.open(tmp_path / "x.png").convert("L")
        assert sheet.crop(empty).getextrema() == (255, 255) > sheet.crop(full).getextrema()
    for name in ("Hütte", "Hutte", "猫", "class 0"):    # accents and signs are no boxes
        data.pseudo_label_sheet(tmp_path / f"{name}.png", images, [name], 0 * y, score > 0, score)
    assert len({sheet.read_bytes() for sheet in tmp_path.glob("[Hc猫]*.png")}) == 2


def test_command(tmp_path, monkeypatch):
    draw(tmp_path / "b", ["1.jpg", "2.jpg"])
    monkeypatch.chdir(tmp_path)
    out = subprocess.check_output([sys.executable, data.__file__, "b", "--classes=x,y"], text=True)
    assert out == ("b: unlabelled, train = test; 2 classes (x, y), 2 training and 2 test images, "
                   '"a photo of a {}."\n')
    monkeypatch.setattr(sys, "argv", ["data.py", "b"])
    with pytest.raises(SystemExit, match="^error: b: no names of classes: give --classes"):
        runpy.run_path(data.__file__, run_name="__main__")


# ======== coft.py: equations ========

def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_eq_1_5_logits_p_clean():
    f, t, t_neg, tau = unit(4, 8), unit(3, 8), unit(3, 8), torch.tensor(7.0)
    l_pos, l_neg = coft.logits(f, t, tau), coft.logits(f, t_neg, tau)
    for l, w in ((l_pos, t), (l_neg, t_neg)):
        torch.testing.assert_close(l, 7 * torch.einsum("bd,kd->bk", f, w))
    clean, unclean = coft.log_p_clean(l_pos, l_neg)
    torch.testing.assert_close(clean.exp(), torch.sigmoid(l_pos - l_neg))
    torch.testing.assert_close(unclean.exp(), 1 - torch.sigmoid(l_pos - l_neg))
    far = torch.tensor([[500.0]])                                   # no overflow
    assert coft.log_p_clean(-far, far)[0].item() == -1000


def all_classes(p):
    """The index of a table that holds all classes, p (..., C)."""
    return torch.arange(p.shape[-1], dtype=torch.int32).expand(p.shape)


def test_eq_1_pseudo_labels():
    def pseudo_labels(p0, K):
        return coft.pseudo_labels(p0, all_classes(p0), p0.shape[1], K)
    p0 = torch.tensor([[.9, .1, .0], [.6, .3, .1], [.7, .1, .2], [.2, .8, .0], [.1, .7, .2],
                       [.45, .15, .4]])
    y, confident = pseudo_labels(p0, 1)            # the surest image of each class
    assert y.tolist() == [0, 0, 0, 1, 1, 2]             # nobody's class 2 takes its likeliest image
    assert confident.tolist() == [True, False, False, True, False, True]
    y, confident = pseudo_labels(p0[:5, :2], 2)
    assert y.tolist() == [0, 0, 0, 1, 1] and confident.tolist() == [True, False, True, True, True]
    assert pseudo_labels(p0[:, :2], 3)[1].sum() == 5           # three of four, two of two
    assert pseudo_labels(p0, 16)[1].all()                      # fewer images than K
    y, _ = pseudo_labels(F.pad(p0, (0, 7)), 2)          # nobody's seven more: N / C = 0.6, p = 0
    assert y.tolist() == [0, 0, 0, 1, 1, 2]


def test_table_of_many_classes():
    """Of 40 classes a table holds 16 an image: what it says of these is as with all."""
    class Model:                                        # a student that says what it is told to
        def texts(self, clip_model):
            return torch.zeros(C, 1), None

        def __call__(self, clip_model, x, texts):
            return None, self.says[x].log(), torch.zeros(len(x), C)

    class Loader(list):
        N = 60
    N, C, model = 60, 40, Model()
    loader, table = Loader((i, i) for i in torch.arange(N).split(25)), None
    job = SimpleNamespace(autocast=nullcontext, clip_model=None, added={"balance"}, C=C)
    for n in range(3):                                  # a mean of three
        model.says = (2 * torch.randn(N, C)).softmax(dim=1)
        table = coft.predict(job, [model], loader, True, table, (1 / (n + 1), 1 / (n + 1)))
        p = model.says if n == 0 else p + (model.says - p) / (n + 1)            # (N, C)
        p = torch.where(p < p.topk(16).values[:, -1:], 0.0, p)
    index = table.index[0].long()
    assert index.shape == (N, 16) and (index.diff() > 0).all()
    torch.testing.assert_close(torch.zeros(N, C).scatter(1, index, table.p[0]), p)
    y = p.argmax(dim=1)
    assert torch.equal(coft.labels_of(table.p, table.index)[0], y)
    assert torch.equal(coft.at(table.p[0], table.index[0], y), table.p[0].max(dim=1).values)
    assert not coft.at(table.p[0], table.index[0], p.argmin(dim=1)).any()
    torch.testing.assert_close(torch.zeros(N, C).scatter(1, index, coft.guess(job, table)[0]),
                               coft.balanced(p, all_classes(p), C))
    assert equal(coft.pseudo_labels(table.p[0], table.index[0], C, 2),
                 coft.pseudo_labels(p, all_classes(p), C, 2))
    other = Model()                                     # the mean of two, whose 16 classes differ
    other.says = (2 * torch.randn(N, C)).softmax(dim=1)
    table, p = coft.predict(job, [model, other], loader, mean=True), (model.says + other.says) / 2
    assert torch.equal(coft.labels_of(table.p, table.index)[0], p.argmax(dim=1))
    torch.testing.assert_close(table.p[0].sort().values, p.sort().values[:, -16:])


def test_five_crops():                                  # (A6)
    x, model = golden_images(3, 32), clip.load("tiny")[0].requires_grad_(False)
    crops = [F.interpolate(x[..., i:i + 29, j:j + 29], (32, 32), mode="bicubic", antialias=True)
             for i, j in ((0, 0), (0, 3), (3, 0), (3, 3), (2, 2))]
    assert torch.equal(coft.with_crops(x, 1), torch.cat([x, *crops]))
    assert torch.equal(coft.with_crops(x, 0), x)

    class Loader(list):
        N = 3
    loader, zero = Loader([(x[:2], torch.tensor([0, 1])), (x[2:], torch.tensor([2]))]), (
        coft.ZeroShot(unit(10, 64)))
    job = SimpleNamespace(autocast=nullcontext, clip_model=model, C=10)
    p = [zero(model, view)[1].softmax(dim=1) for view in (x, *crops)]           # (3, 10) each
    for share in (0, 0.25, 1):
        table = coft.predict(job, [zero], loader, False, crops=share)
        torch.testing.assert_close(table.p[0], (1 - share) * p[0] + share * sum(p[1:]) / 5)


def test_crops_tell():                                  # (A6)
    """Three images of three classes: a posterior as sharp, or nearly, from a crop as from all."""
    images = data.Images(["a", "b", "c"], pictures=[Image.new("RGB", (9, 9))] * 3)
    plain, y = data.transforms(8)[0], torch.arange(3)
    job = SimpleNamespace(
        dataset=SimpleNamespace(train=images), C=3, clip_model=None, autocast=nullcontext,
        load=lambda view: data.DeviceLoader(view, 3),
        train=SimpleNamespace(dataset=images.view(plain)))
    for sharp, tells in ((5.0, True), (3.9, True), (3.5, False)):       # MI / 0.921: 0.985, 0.912
        l = torch.tensor([4.0, *[sharp] * 5])[:, None, None] * F.one_hot(y)         # (6, 3, 3)
        assert coft.crops_tell(job, lambda _, views: (None, l.flatten(0, 1), None)) is tells


def test_eq_4_6_losses():
    l_pos, l_neg = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y, y_bar, clean = torch.tensor([[0, 3, 1, 2, 2], [1, 0, 0, 3, 1], [1, 0, 1, 1, 0]])
    b, p_clean = range(5), torch.sigmoid(l_pos - l_neg)
    cls = -l_pos.softmax(dim=1)[b, y].log()
    neg = -p_clean[b, y].log() - (1 - p_clean[b, y_bar]).log()
    torch.testing.assert_close(coft.loss_cls(l_pos, y), cls)
    torch.testing.assert_close(coft.loss_neg(l_pos, l_neg, y, y_bar), neg)
    job = SimpleNamespace(args=SimpleNamespace(lam=0.3), added=set())
    for number, each in (1, cls + 0.3 * neg), (2, cls), (3, cls):
        loss = partial(coft.total_loss, job, number, l_pos, l_neg)
        torch.testing.assert_close(loss((y, clean, y_bar)), each[[0, 2, 3]].mean())
        nothing = loss((y, clean & False, y_bar))
        grad, = torch.autograd.grad(nothing, l_pos)
        assert nothing.item() == 0 and torch.equal(grad, torch.zeros(5, 4))


def test_complementary_labels():
    y_bar = coft.complementary_labels(torch.full((20_000,), 2), 4)
    share = torch.bincount(y_bar, minlength=4) / 20_000
    assert share[2] == 0 and torch.allclose(share[[0, 1, 3]], torch.tensor(1 / 3), atol=0.02)
    assert coft.complementary_labels(torch.zeros(3, dtype=torch.long), 1).tolist() == [0, 0, 0]


def test_balanced():
    p = q = torch.tensor([[.8, .2], [.4, .6], [.7, .3]])
    for _ in range(20):                                 # Sinkhorn's iteration, plainly
        p = F.normalize(p / p.mean(dim=0), p=1, dim=1)
    found = coft.balanced(q, all_classes(q), 2)
    torch.testing.assert_close(found, p)
    torch.testing.assert_close(found.mean(dim=0), torch.tensor([.5, .5]))
    job = SimpleNamespace(added={"balance"}, C=2)
    table = coft.Table(q[None], q[None], all_classes(q[None]))
    assert torch.equal(coft.guess(job, table)[0], found)
    job.added = set()
    assert torch.equal(coft.guess(job, table)[0], q)
    q = torch.tensor([[1.0, 0.0]])
    assert torch.isfinite(coft.balanced(q, all_classes(q), 2)).all()


def test_accuracy_and_auroc():
    assert data.accuracy(torch.arange(3), torch.tensor([0, 1, 1])) == 66.67
    assert data.accuracy(torch.arange(3), None) is None
    score, right = torch.randint(8, (60,)) / 8, torch.rand(60) < 0.6            # many ties
    pairs = [(a > b) + (a == b) / 2 for a in score[right] for b in score[~right]]
    assert data.auroc(score, right) == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-4)
    assert math.isnan(data.auroc(score, torch.ones(60, dtype=torch.bool)))


def test_diagnostics():
    p, p_clean = torch.rand(2, 2, 40, 3).softmax(dim=3)
    y, y_true, clean = torch.randint(3, (2, 40)), torch.randint(3, (40,)), torch.rand(2, 40) < 0.6
    table = coft.Table(p, p_clean, all_classes(p))
    found = coft.diagnostics(table, (y, clean), y_true)
    right, label = y == y_true, p.argmax(dim=2)                                 # (2, 40) each
    wrong = label[0] != y_true                                                  # (40,)
    want = {"kept": clean.sum() / 80, "unfiltered": right.sum() / 80,
            "precision": (right & clean).sum() / clean.sum(),
            "shared_errors": (wrong & (label[0] == label[1])).sum() / wrong.sum()}
    for key, values in (("auroc", p_clean), ("auroc_softmax", p)):      # the other one judges
        want[key] = sum(data.auroc(values[peer, range(40), label[me]], label[me] == y_true)
                        for me, peer in ((0, 1), (1, 0))) / 2
    assert found == pytest.approx({k: float(v) for k, v in want.items()}, abs=1e-4)
    assert coft.diagnostics(table, (y, clean), None).keys() == {"kept"}


def test_recipe():
    every = set(coft.ADDITIONS)
    assert data.recipe("paper", coft.ADDITIONS) == ("paper", set())
    assert data.recipe("ours", coft.ADDITIONS) == ("ours", every)
    assert data.recipe("ours-part-fresh", coft.ADDITIONS) == ("ours", every - {"part", "fresh"})
    assert data.recipe("paper+part", coft.ADDITIONS) == ("paper", {"part"})
    for text in ("theirs", "ours-", "paper+bananas", "ours+part", "paper-part", ""):
        message = refuses(text, coft.ADDITIONS, by=data.recipe)
        assert message.startswith(f"--recipe {text}: expected paper, then +NAME, or ours, ")
    assert set(coft_plus.ADDITIONS) > every
    for script in (coft, coft_plus):                    # each stands where the table says
        source = inspect.getsource(script)
        for name, line in script.ADDITIONS.items():
            assert f"({line.split()[0]})" in source, name                   # A1, A2, ...
            for place in line.split(": ")[-1].split(", "):
                assert hasattr(script, place), (name, place)


# ======== coft.py: modules ========

NAMES = ["cat", "golden retriever", "x"]


@pytest.fixture(scope="module")
def frozen():
    """The demo's CLIP, as coft.py has it."""
    return clip.load("tiny")[0].requires_grad_(False)


@pytest.mark.parametrize("template", ["a photo of a {}.", "a photo of a {}, a type of pet.",
                                      "itap of my {}", "{}", "{} in the wild."])
def test_prompt_starts_at_zero_shot(vit, template, monkeypatch):
    words = template if not template.startswith("{}") else "a photo of a " + template
    want = F.normalize(vit.encode_text(clip.tokenize([words.format(c) for c in NAMES])), dim=-1)
    args = SimpleNamespace(peft="vpt", peft_size=4, ctx=0)
    for noise, same in (torch.zeros, True), (lambda size: 30 * torch.randn(size), False):
        monkeypatch.setattr(torch, "randn_like", lambda v: noise(v.shape))
        for t in coft.Student(vit, NAMES, template, args).texts(vit):
            assert torch.allclose(t, want, atol=1e-5) == same
    monkeypatch.undo()
    prompts = partial(pa.Prompts, vit, NAMES, template)
    assert torch.allclose(prompts(0, [1.0])(vit), want, atol=1e-5)
    assert prompts(16, [1.0, 0.0]).ctx.shape == (2, 16, 64)
    args.ctx, words = 16, vit.token_embedding.weight    # random words, class, full stop: CoOp's
    student = coft.Student(vit, NAMES, template, args)
    ends = clip.tokenize([f"{'x ' * 16}{c}." for c in NAMES]).argmax(dim=1)
    assert equal([student.texts.eot, prompts(16, [1.0]).eot], [ends, ends])
    drawn = student.texts.pos.detach()                                          # (1, 16, W)
    assert drawn.shape == (1, 16, 64) and student.texts(vit)[1].shape == want.shape
    assert float(drawn.std()) == pytest.approx(float(words.detach().std()), rel=0.1)


def student_of(model, names=NAMES, peft="vpt"):
    args = SimpleNamespace(peft=peft, peft_size=4, ctx=0)
    return coft.Student(model, names, "a {}.", args)


def test_adapters_start_at_clip(vit, resnet):
    for model in (vit, resnet):
        x = golden_images(2, model.visual.input_resolution)
        student = student_of(model, peft="adapter")
        want = F.normalize(model.encode_image(x), dim=-1)
        f, *_ = student(model, x)
        assert torch.allclose(f, want, atol=1e-6)
        f[:, 0].sum().backward()
        assert any(v.grad is not None and v.grad.any() for v in student.adapters.parameters())


def test_full_model_is_an_fc_layer_on_a_fresh_encoder(frozen):    # Eq. (7)
    student, x, t0 = student_of(frozen), golden_images(2, 32), unit(3, 64)
    before = student(frozen, x)
    model, v = coft.FullModel(frozen, t0, student), frozen.encode_image(x)      # no visual prompts
    torch.testing.assert_close(model(frozen, x)[1], v @ t0.T)
    W, b = model.fc.weight.data, model.fc.bias.data
    W += 0.1 * torch.randn_like(W)
    b += 0.1 * torch.randn_like(b)
    torch.testing.assert_close(model(frozen, x), (v, v @ W.T + b, None))
    assert equal(model.judge(frozen, x), before)
    assert not any(v.requires_grad for v in model.judge.parameters())


@pytest.mark.parametrize("power", [2, 4])
def test_part_way(frozen, monkeypatch, capsys, power):  # (A5)
    t0, run = unit(3, 64), data.Run.__new__(data.Run)
    monkeypatch.setattr(coft, "WHOLE", 300)
    for steps, each, shots, learnt, share in (
            (30, 60, 0, 0.9, 0.1), (300, 6, 0, 0.5, 1.0), (900, 5, 0, 0.6, 0.5),
            (900, 4, 0, 1.0, 0.0), (900, 4, 1, 0.1, 0.5), (30, 60, 4, 0.5, 0.8),
            (270, 60, 1, 0.7, 0.9), (300, 60, 0, 0.25, 0.5 ** power), (150, 60, 0, 0.45, 0.5)):
        job = SimpleNamespace(full=frozen, W0=t0, run=run, C=3, known=range(3 * shots),
                              dataset=SimpleNamespace(train=range(3 * each)))
        model = coft.FullModel(frozen, t0, student_of(frozen))
        start = [v.clone() for v in model.state_dict().values()]
        for v in model.parameters():
            v.data += torch.randn_like(v) * v.requires_grad
        want = [a + share * (b - a) for a, b in zip(start, model.state_dict().values())]
        coft.part_way(job, [model], steps, -math.log(learnt), power)
        assert capsys.readouterr().out.strip().endswith(f"go {100 * share:.0f} % of the way")
        torch.testing.assert_close([*model.state_dict().values()], want)


def test_phase_2_starts_as_sharp_as_clip(frozen):       # (A10)
    v = frozen.encode_image(x := golden_images(4, 32))                          # (4, 64)
    train = type("Loader", (list,), {"N": 4})([(x, torch.arange(4))])
    for longer, scale in ((1, frozen.logit_scale.exp() / v.norm(dim=1).mean()), (9, 1.0)):
        job = SimpleNamespace(train=train, autocast=nullcontext, full=SimpleNamespace(
            encode_image=lambda x: longer * v, logit_scale=frozen.logit_scale))
        assert coft.clip_scale(job) == pytest.approx(float(scale))


# ======== coft.py: runs ========

SHORT = ["--device", "cpu", "--batch-size", "32", "--epochs1", "2", "--epochs2", "2", "--flip"]


def status(out, *args, script=coft):
    """Exit status of `python coft.py ARGS --out OUT`."""
    return script.main([*SCRIPTS[script.__name__], "--out", str(out), *map(str, args)])


def run(out, *args, script=coft):
    """Runs it to its end and returns what `read` finds."""
    assert status(out, *args, script=script) == 0
    return read(out)


def stops(capsys, says, out, *args, script=coft):
    """The run ends with status 2 and, but for the list of what is expected, one line."""
    capsys.readouterr()                                 # forget what earlier runs said
    assert status(out, *args, script=script) == 2, args
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said.splitlines()[0], said
    assert len(said.split(" Expected one of\n")[0].splitlines()) == 1, said


def rows_of(file):
    with open(file, newline="") as text:
        return list(csv.reader(text))


def read(out):
    """The lines of log.jsonl, the rows of predictions.csv, the contents of model.pt, if there."""
    log, model = (out / "log.jsonl").read_text(), out / "model.pt"
    assert "NaN" not in log                             # which is no JSON
    saved = torch.load(model, weights_only=True) if model.exists() else None
    return [json.loads(line) for line in log.splitlines()], rows_of(out / "predictions.csv"), saved


def same_result(a, b):
    (_, rows_a, a), (_, rows_b, b) = read(a), read(b)
    assert rows_a == rows_b and equal(a, b)


def epochs_of(out):
    """The lines of log.jsonl, without times and speeds."""
    free = ("seconds", "images_per_second", "peak_memory_gb", "out", "resume")
    return [{k: v for k, v in line.items() if k not in free} for line in read(out)[0]]


@pytest.fixture(scope="module")
def drawn():
    """{part: (pictures, labels)}: the first 100 and 50 pictures of the demo."""
    return {part: shapes.pictures("narrow", part, n) for part, n in (("train", 100), ("test", 50))}


@pytest.fixture
def little(drawn, monkeypatch):
    """The demo is its first 150 pictures."""
    monkeypatch.setattr(shapes, "pictures", lambda name, part: drawn[part])


@pytest.mark.parametrize("script", [coft, coft_plus])
def test_resnet(script, little, resnet, tmp_path, capsys):
    torch.save(resnet.state_dict(), tmp_path / "rn.pt")
    flags = ["--weights", tmp_path / "rn.pt", "--max-steps", 1]
    _, _, saved = run(tmp_path / "run", *flags, script=script)
    assert "adapter" in str(saved["light"])
    flags += ["--peft", "vpt"]
    stops(capsys, "--peft vpt needs a ViT", tmp_path / "vpt", *flags, script=script)


@pytest.mark.parametrize("recipe, peft", [("ours", "vpt"), ("ours", "adapter"), ("paper", "vpt")])
def test_run_folder(little, drawn, tmp_path, recipe, peft, capsys):
    (first, *epochs, last), (header, *rows), saved = run(
        tmp_path / "run", "--recipe", recipe, "--peft", peft, "--max-steps", 4)
    assert sorted(os.listdir(tmp_path / "run")) == [
        "args.json", "last.pt", "log.jsonl", "model.pt", "predictions.csv", "pseudo_labels.png",
        "report.html"]
    assert first == json.loads((tmp_path / "run" / "args.json").read_text())
    assert first["peft"] == peft and first["max_steps"] == 4 and first["seed"] == 0
    assert first["recipe"] == recipe and first["lr1"] == coft.SETTINGS[recipe]["lr1"][0]
    assert [(e["phase"], e["epoch"]) for e in epochs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for e in epochs:
        assert {"precision", "auroc", "images_per_second", "peak_memory_gb"} <= e.keys()
    assert last.keys() >= {"zero_shot", "accuracy", "seconds", "images_per_second",
                           "peak_memory_gb"}
    assert header == ["path", "class", "confidence", "p_clean"]
    assert [row[0] for row in rows] == [f"test/{i:05d}.png" for i in range(50)]
    right = [shapes.SHAPES[k] == row[1] for k, row in zip(drawn["test"][1], rows)]
    assert last["accuracy"] == pytest.approx(100 * sum(right) / 50)
    assert f"accuracy {last['accuracy']:.4g}" in capsys.readouterr().out.splitlines()[-1]
    model = coft.load(tmp_path / "run" / "model.pt")    # model.pt is what predicted, CLIP as it was
    for m in (0, 1):
        assert saved["models"][f"{m}.visual.proj"].dtype == torch.half  # encoders, not the rest
        assert saved["models"][f"{m}.fc.weight"].dtype == torch.float32
    test = data.load("demo").test
    p = model(torch.stack([model.preprocess(test.image(i)) for i in range(50)]))    # (50, C)
    assert [model.class_names[k] for k in p.argmax(dim=1)] == [row[1] for row in rows]
    assert p.max(dim=1).values.tolist() == pytest.approx([float(row[2]) for row in rows], abs=2e-4)


def all_differ(out, flags, variants, script=coft):
    """Each of the variants, flags more, predicts something else: none of them does nothing."""
    seen = []
    for k, variant in enumerate(variants):
        _, rows, _ = run(out / str(k), *flags, *variant.split(), script=script)
        assert len(rows) == 51 and rows not in seen, variant
        seen.append(rows)


def test_flags(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "pictures", lambda _, part: [v[:64] for v in drawn[part]])
    all_differ(tmp_path, ["--max-steps", 2], (
        "", "--seed 1", "--epochs2 0", "--epochs1 0", "--recipe paper", "--no-flip",
        "--no-quick-gelu", "--template {}.", "--lr1 0.01", "--lr2 0.01"))


def test_live_line(little, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(time, "time", partial(next, itertools.count()))         # whole seconds
    run(tmp_path / "run", "--max-steps", 2, "--epochs2", 0)
    shown = [line.rstrip() for line in capsys.readouterr().out.split("\r")]
    assert "looking at images, batch 4 of 4" in shown   # 100 of 32
    assert any(re.fullmatch(r"phase 1 epoch 1/1 step 2 loss \d\.\d+ \d+ img/s, 0 s left", line)
               for line in shown), shown


def test_batches_of_clean_images():
    view, seen = data.load("demo").train.subset(range(20)).view(data.transforms(32)[0]), []
    loader = data.DeviceLoader(view, 4, shuffle=True, seed=1)
    loader.batch_sampler.among = [3, 7, 11]
    for _ in range(8):
        seen.append([int(k) for *_, i in loader for k in i])
        times = sorted(seen[-1].count(k) for k in (3, 7, 11))
        assert times == [6, 7, 7]                       # as often as the others, or once more
    assert seen[0] != seen[1] and len({tuple(e.count(k) for k in (3, 7, 11)) for e in seen}) > 1


@pytest.mark.parametrize("script", [coft, coft_plus])
def test_the_sheet_shows_what_the_filter_says(script, little, tmp_path, monkeypatch):
    def every_third(p, table):
        y = coft.labels_of(p, table.index)                                      # (2, N)
        return y, (torch.arange(y.shape[1]) % 3 == 0).expand(y.shape)
    shown = []
    monkeypatch.setattr(script, "select_clean", every_third)
    monkeypatch.setattr(data, "pseudo_label_sheet", lambda *a: shown.append(a))
    run(tmp_path / "run", "--max-steps", 1, script=script)
    assert all(clean.equal(torch.arange(len(y)) % 3 == 0) for *_, y, clean, _ in shown)
    assert len(shown) > 1                               # after each phase


@pytest.mark.parametrize("script, recipe", [
    (coft, "paper"), (coft, "paper+views+balance+fresh"), (coft_plus, "paper+balance"),
    (coft_plus, "paper+views+balance+fresh+gauss")])
def test_a_run_is_this_plain_loop(script, recipe, little, tmp_path, monkeypatch):   # 3.2, 3.3
    """Phases of two epochs of three steps, CoFT+'s first in two rounds: same weights, same loss."""
    begun, queues, ended, start_phase, more = [], [], [], script.start_phase, "views" in recipe

    def spy(job, number, students, steps):
        begun.append(copy.deepcopy(students))
        phase = start_phase(job, number, students, steps)
        queues.extend(keys.queue.clone() for keys in getattr(phase, "keys", []))
        return phase
    monkeypatch.setattr(script, "start_phase", spy)
    monkeypatch.setattr(script, "finish", lambda *a: ended.append(a))
    monkeypatch.setattr(script, "complementary_labels", lambda y, C: (y + 1) % C)
    monkeypatch.setitem(script.SETTINGS["paper"], "k", (4, 4))
    flags = ["--epochs1", 2, "--epochs2", 2, "--recipe", recipe, "--seed", 5]
    assert status(tmp_path, *flags, script=script) == 0
    job, found, _ = ended[0]
    assert all(torch.allclose(queue.norm(dim=1), torch.ones(64)) for queue in queues)
    weak = job.dataset.train.view(data.transforms(32)[1])
    W0 = t0 = clip.zeroshot_classifier(job.clip_model, [[PHOTO.format(c)] for c in shapes.SHAPES])
    phases = [(1, 0), (2, 0)]                           # and their rounds
    if script is coft_plus:
        phases, folder = [(1, 0), (1, 1), (2, 0)], Path(coft_plus.__file__).with_name("prompts")
        sentences = json.loads((folder / "demo.json").read_text())
        t0 = clip.zeroshot_classifier(job.clip_model, [sentences[c] for c in shapes.SHAPES])

    def look(models, loader):                           # softmax, p_clean: (2, M, N, C)
        table = torch.zeros(2, len(models), 100, 10)
        for x, i in loader:
            for m, me in enumerate(models):
                _, l_pos, l_neg = me(job.clip_model, x)
                clean = l_pos if l_neg is None else (l_pos - l_neg).sigmoid()
                table[:, m, i] = torch.stack([l_pos.softmax(dim=1), clean]).detach()
        return table

    def ask(rate, nats):                                # (A9)
        table = coft_plus.Table(p, p_clean, all_classes(p))
        return coft_plus.ask_density(job, models, table, rate, coft_plus.NATS[nats])[0][:2]

    looks = job.load(weak, seed=5) if more else job.train
    p = sum(look(2 * [coft.ZeroShot(t0)], looks)[0] for _ in range(2)) / 2      # (A1) VIEWS
    balanced = lambda p: coft.guess(job, coft.Table(p, p, all_classes(p)))      # (A2)
    for number, round in phases:
        if number == 1:                                 # S* of each student
            models, rate = begun[round], job.args.lr1
            y, clean = map(torch.stack, zip(*(
                coft.pseudo_labels(v, all_classes(v), 10, 4) for v in balanced(p))))
        else:
            p, p_clean = ask(1 / 2, 0) if "gauss" in recipe else (p, p_clean)
            models = [script.FullModel(job.clip_model, W0, me) for me in models]
            rate = job.args.lr2
        slow = [copy.deepcopy(me.visual) for me in models] if queues and number == 2 else []
        weights = [v for me in models for v in me.parameters() if v.requires_grad]
        momentum, n = [torch.zeros_like(v) for v in weights], 0
        view = job.dataset.train.view(*weak.transforms, *weak.transforms) if slow else weak
        loaders = [job.load(view, shuffle=True, seed=20 + 2 * number + m + 1000 * round)
                   for m in (0, 1)]
        looks = job.load(weak, seed=20 + number + 1000 * round) if more else job.train
        for step in range(6):
            if step % 3 == 0:                           # an epoch begins
                if number == 2 and (more or step == 0):         # (A3)
                    y = balanced(p).argmax(dim=2)
                    clean = p_clean.flip(0).gather(2, y[..., None])[..., 0] > 0.5   # the peer's
                for loader, mine in zip(loaders, clean):
                    loader.batch_sampler.among = [] if slow else mine.nonzero()[:, 0].tolist()
                batches, losses, contrasts = zip(*loaders), 0, 0
            loss = 0
            for m, (x, *x_key, i) in enumerate(next(batches)):
                v, l_pos, l_neg = models[m](job.clip_model, x)
                of_each = coft.loss_cls(l_pos, y[m, i])
                if number == 1:
                    of_each += coft.loss_neg(l_pos, l_neg, y[m, i], (y[m, i] + 1) % 10)
                mean = of_each[clean[m, i]].mean()
                losses += float(mean.detach()) / 6      # of two students, three steps
                loss = loss + mean
                for x in x_key:                         # Eq. (8), (9)
                    q, k = F.normalize(v, dim=1), F.normalize(slow[m](x), dim=1).detach()
                    contrast = 0.1 * coft_plus.info_nce(q, k, queues[m])
                    contrasts += float(contrast.detach()) / 6
                    loss = loss + contrast
                    queues[m] = torch.cat([queues[m], k])[-64:]
            rate_now = rate * min((step + 1) / 1.6, 0.5 + 0.5 * math.cos(math.pi * step / 6))
            for v, u, g in zip(weights, momentum, torch.autograd.grad(loss, weights)):
                u.mul_(0.9).add_(g + 5e-4 * v.detach())
                v.data -= rate_now * u
            for keys, me in zip(slow, models):          # Eq. (10)
                for v, v_new in zip(keys.parameters(), me.visual.parameters()):
                    v.data.lerp_(v_new.data, 1 - (step + 1) / (step + 10))
            if (step, number, "gauss" in recipe) == (2, 2, True):       # a third of phase 2
                p, p_clean, n = *ask(1 / 2, 1), 1
            elif step % 3 == 2:                         # and ends: all images are looked at
                now, n = look(models, looks), n + 1
                p = (n * p + now[0]) / (n + 1) if more else now[0]              # (A1)
                if number == 1:                         # the verdict on all later labels
                    p_clean = ((n - 1) * p_clean + now[1]) / n if more and n > 1 else now[1]
    torch.testing.assert_close(found.state_dict(), torch.nn.ModuleList(models).state_dict())
    last = job.run.lines[-1]
    assert last["loss"] == last["nll"] == pytest.approx(losses, abs=1e-3)
    assert last.get("contrast", 0) == pytest.approx(contrasts, abs=1e-3)


def test_each_addition_alone(drawn, tmp_path, monkeypatch):
    """Every one can be left out, alone, and does something; third: see test_student."""
    monkeypatch.setattr(shapes, "pictures", lambda _, part: [v[:50] for v in drawn[part]])
    monkeypatch.setattr(coft_plus, "WHOLE", 8)
    without = [f"--recipe ours-{name}" for name in coft_plus.ADDITIONS if name != "third"]
    all_differ(tmp_path, ["--rounds", 1, "--gamma", 0, "--epochs2", 2, "--max-steps", 2],
               ["", *without], coft_plus)


def save_pictures(root, drawn, train="train/{c}/{i:03d}.png", test="test/{c}/{i:03d}.png"):
    for part, form in (("train", train), ("test", test)):
        for i, (picture, k) in enumerate(zip(*drawn.get(part, ()))):
            path = root / form.format(c=shapes.SHAPES[k], i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


FOLDER = ["--arch", "tiny", "--workers", 0, "--max-steps", 3]


@pytest.mark.parametrize("script", [coft, coft_plus])
def test_shuffled_labels_change_nothing(drawn, tmp_path, script):
    save_pictures(tmp_path / "pets", drawn, "images/train{i}.png", "images/test{i}.png")
    flags = [*FOLDER, *(["--prompts", ""] if script is coft_plus else [])]
    y_true = drawn["train"][1]
    for name, y in (("right", y_true), ("shuffled", random.Random(0).sample(y_true, 100))):
        split = {part: [[f"{part}{i}.png", k, shapes.SHAPES[k]] for i, k in enumerate(labels)]
                 for part, labels in (("train", y), ("test", drawn["test"][1]))}
        written(tmp_path / "pets" / "split_zhou_OxfordPets.json", split)
        run(tmp_path / name, "--data", tmp_path / "pets", *flags, script=script)
    same_result(tmp_path / "right", tmp_path / "shuffled")
    right, shuffled = (epochs_of(tmp_path / name) for name in ("right", "shuffled"))
    assert right[1]["precision"] != shuffled[1]["precision"]        # the labels did differ
    assert [e.get("loss") for e in right] == [e.get("loss") for e in shuffled]


def test_unlabelled_folder(drawn, tmp_path, capsys):
    save_pictures(tmp_path / "photos", drawn, "{i:03d}.png", "{i:03d}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"x")
    (tmp_path / "classes.txt").write_text("\n".join(shapes.SHAPES))
    flags = [*FOLDER, "--data", tmp_path / "photos", "--classes", tmp_path / "classes.txt"]
    lines, rows, _ = run(tmp_path / "out", *flags)
    said = capsys.readouterr()
    assert "1 of 101 images cannot be read: broken.png" in said.err
    assert "accuracy " not in said.out and "precision" not in said.out
    assert [row[0] for row in rows[1:]] == [f"{i:03d}.png" for i in range(100)]
    assert lines[-1]["accuracy"] is None and lines[-1]["zero_shot"] is None
    assert all("precision" not in line and "auroc" not in line for line in lines)
    (tmp_path / "photos" / "broken.png").unlink()
    (tmp_path / "photos" / "099.png").rename(first := tmp_path / "photos" / "00.png")
    stops(capsys, "begun with other images or classes: ", tmp_path / "out", *flags, "--resume")
    first.rename(tmp_path / "photos" / "099.png")       # as it was, but in another order:
    (tmp_path / "classes.txt").write_text("\n".join(shapes.SHAPES[::-1]))
    stops(capsys, "begun with other images or classes: ", tmp_path / "out", *flags, "--resume")
    for name, train in ("with", "train/{c}/{i:03d}.png"), ("without", "train/{c}_{i:03d}.png"):
        save_pictures(tmp_path / name, drawn, train)
        run(tmp_path / "labels" / name, "--data", tmp_path / name, *FOLDER)
    same_result(tmp_path / "labels" / "with", tmp_path / "labels" / "without")


def test_user_errors(drawn, little, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "photos", drawn, "{i:03d}.png", "{i:03d}.png")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    for args, says in (
            (["--data", "nowhere"], "nowhere: no such folder or image. Expected one of"),
            (["--weights", "other.pt"], "other.pt: not the weights of a CLIP"),
            (["--arch", "ViT-X/1"], "no such model or file: ViT-X/1 (models: RN50"),
            (["--weights", str(Path(clip.__file__).with_name("tiny.pt")), "--arch", "ViT-B/16"],
             "the weights are not those of ViT-B/16: resolution 32"),
            (["--device", "foo"], "--device foo cannot be used"),
            (["--template", "so " * 75 + "{}"], "78 tokens are too long for context length 77"),
            (["--recipe", "mine"], "--recipe mine: expected paper, then +NAME, or ours"),
            (["--batch-size", "0"], "--batch-size 0 is out of range"),
            (["--lr1", "nan"], "--lr1 nan is out of range"),
            (["--out", "other.pt/run"], "other.pt"), (["--resume"], "out holds no run to --resume"),
            (["--epochs2", "0", "--export", "x"], "--epochs2 0 leaves nothing to --student and "),
            (["--export", "photos"], "--export photos is a folder"),
            (["--student", "absent.pt"], "no such model or file: absent.pt")):
        stops(capsys, says, "out", *args)
        assert not (tmp_path / "out").exists()          # and nothing is left behind
    stops(capsys, "absent.pt", "photos", "--student", "absent.pt")  # nor what was there taken away
    stops(capsys, "--out photos is the folder of the images", "photos", "--data", "./photos",
          "--classes", "cat,dog", "--arch", "tiny")
    assert len(os.listdir("photos")) == 100
    (tmp_path / "runs" / "coft-1").mkdir(parents=True)
    assert data.free_folder("coft") == "runs/coft-2"    # never into a run that is there
    assert os.listdir("runs/coft-2") == [] and data.free_folder("coft") == "runs/coft-3"
    assert coft.main(["--resume"]) == 2 and "--out runs/coft-1" in capsys.readouterr().err
    assert coft.parse(["--out=~/run"]).out == os.path.expanduser("~/run")


def test_mirrored_or_not(little, tmp_path, capsys):
    """Without --flip and --no-flip the zero-shot posteriors of mirrored images decide."""
    assert coft.main(["--device", "cpu", "--max-steps", "1", "--out", str(tmp_path / "run")]) == 0
    assert "views are mirrored: " in capsys.readouterr().out
    model = SimpleNamespace(visual=SimpleNamespace(input_resolution=32))
    for p_mirrored, flip in ((0.2, False), (0.65, True)):
        def posterior(view):                            # of class 0: plain 0.7, cropped 0.6
            plain, = view.transforms
            p = 0.6 if isinstance(plain, data.Augment) else p_mirrored if plain.mirror else 0.7
            return torch.tensor([[p, 1 - p]]).repeat(len(view), 1)              # (n, 2)
        job = SimpleNamespace(clip_model=model, args=SimpleNamespace(flip=None),
                              dataset=data.load("demo"), run=SimpleNamespace(say=print))
        assert [view.flip for view in data.augmented_views(job, posterior)] == [flip] * 2
        job.args.flip = not flip                        # the flags win
        assert [view.flip for view in data.augmented_views(job, posterior)] == [not flip] * 2


def test_demo_gains(tmp_path, monkeypatch):
    draw = shapes.pictures
    monkeypatch.setattr(shapes, "pictures", lambda *a: draw(*a, 600))
    assert coft.main(["--device", "cpu", "--epochs1", "1", "--epochs2", "2",
                      "--out", str(tmp_path / "run")]) == 0
    *_, epoch, last = read(tmp_path / "run")[0]         # plain images; five crops
    assert 45 < last["zero_shot"] < 75, last
    assert last["accuracy"] >= epoch["accuracy"] >= last["zero_shot"] + 5, (epoch, last)


# ======== coft_plus.py ========

PLUS = [*SHORT, "--epochs1", "1", "--epochs2", "1", "--rounds", "2", "--gamma", "0.1"]


def test_info_nce():                                    # Eq. (8)
    q, k, queue, T = unit(4, 8), unit(4, 8), unit(6, 8), 0.2
    losses = [-(torch.stack([k[b], *queue]) @ q[b] / T).log_softmax(dim=0)[0] for b in range(4)]
    torch.testing.assert_close(coft_plus.info_nce(q, k, queue, T), sum(losses) / 4)


def test_texts_are_the_mean_of_the_sentences(frozen):  # section 3.3.3
    sentences = [["a red circle", "a ring without a hole", "a disc"], ["a square"]]
    t0 = clip.zeroshot_classifier(frozen, sentences)
    for row, some in zip(t0, sentences):
        t = F.normalize(frozen.encode_text(clip.tokenize(some)), dim=1).mean(dim=0)
        torch.testing.assert_close(row, F.normalize(t, dim=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("N, ball", [(40, 3 / 43), (8, 0.2)])
def test_log_density_is_the_normal_distributions(N, ball):      # (A9)
    f, q, C, D = torch.randn(N, 3), torch.rand(N, 5).softmax(dim=1), 5, 3
    mean = torch.stack([sum(q[i, k] * f[i] for i in range(N)) / q[:, k].sum() for k in range(C)])
    cov = sum(share.sum() * torch.cov(f.T, correction=0, aweights=share) for share in q.T) / N
    cov = (1 - ball) * cov + ball * cov.diagonal().mean() * torch.eye(D)
    naive = torch.stack([torch.distributions.MultivariateNormal(m, cov).log_prob(f) for m in mean])
    naive += D / 2 * math.log(2 * math.pi)              # it leaves that out
    every = all_classes(q)
    found = coft_plus.log_density(f, every, *coft_plus.gaussians(f, q, every, C))
    torch.testing.assert_close(found, naive.T)
    some = torch.tensor([[0, 2, 3], [1, 3, 4]] * (N // 2))              # of five classes, three
    fit = coft_plus.gaussians(f, q[:, :3], some, C)
    whole = torch.zeros(N, C).scatter(1, some, q[:, :3])
    torch.testing.assert_close(fit, coft_plus.gaussians(f, whole, every, C))
    found = coft_plus.log_density(f, every, *fit)
    torch.testing.assert_close(coft_plus.log_density(f, some, *fit), found.gather(1, some))
    q[:, 4] = 0                                         # a class without images
    W, _, root = coft_plus.gaussians(f, q, every, C)
    torch.testing.assert_close(W[4] @ root @ root.T, (q.T @ f).sum(dim=0) / N)


@pytest.mark.parametrize("sizes, fit", [((60, 60, 60), 1000), ((140, 30, 10), 1000),
                                        ((300, 300, 300), 300)])
def test_labels_by_density(sizes, fit, monkeypatch):    # (A9)
    """Clouds of images, a tenth of whose labels are wrong: they are found, and whether they are
    equally large. The third time the Gaussians are those of every third image."""
    monkeypatch.setattr(coft_plus, "FIT", fit)
    N = sum(sizes)
    y = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    f = 3 * torch.eye(3)[y] + 0.3 * torch.randn(N, 3)
    given = torch.where(torch.rand(N) < 0.1, (y + torch.randint(1, 3, (N,))) % 3, y)
    p = torch.full((N, 3), 0.1).scatter(1, given[:, None], 0.8)
    index = all_classes(p)
    q, even, (W, b) = coft_plus.by_density(p, index, p, f, 3, 1.0)
    assert even == (sizes[0] == sizes[1])
    assert ((f @ W.T + b).argmax(dim=1) == y).float().mean() > 0.99
    assert (given == y).float().mean() < 0.95
    assert (coft_plus.labels_of(q, index) == y).float().mean() > 0.99
    if even:
        torch.testing.assert_close(q.mean(dim=0), torch.full((3,), 1 / 3))
    assert not coft_plus.by_density(p, index, p, f, 3, -math.inf)[1]    # once found uneven: so
    for f in (torch.zeros(N, 3), 1e3 * f):              # all alike; far apart, and sure of it
        sure = F.one_hot(given, 3).float()
        q, *_ = coft_plus.by_density(p, index, sure, f, 3, 1.0)
        assert torch.isfinite(q).all()


def test_density_speaks_in_the_table(monkeypatch):      # (A9)
    """p moves towards the Gaussians' posterior, p_clean is it; even if both models say so; without
    A2 classes are never held."""
    p, q = torch.rand(2, 2, 6, 3).softmax(dim=-1)
    table, says = coft_plus.Table(p, torch.ones_like(p), torch.stack([all_classes(p[0])] * 2)), []
    monkeypatch.setattr(coft_plus, "features", lambda job, model, index: (model, None))
    monkeypatch.setattr(coft_plus, "by_density", lambda p, index, model, f, C, nats:
                        (model, says.append(nats) or nats > 0 and len(says) < 4, None))
    job = SimpleNamespace(added={"balance"}, C=3)
    found, even = coft_plus.ask_density(job, list(q), table, 1 / 4, 0.8)
    torch.testing.assert_close(found.p, 0.75 * p + 0.25 * q)
    assert found.p_clean.equal(q) and even
    assert not coft_plus.ask_density(job, list(q), table, 1 / 4, 0.8)[1]        # one says no
    job.added = set()
    coft_plus.ask_density(job, list(q), table, 1 / 4, 0.8)
    assert says == 4 * [0.8] + 2 * [-math.inf]


@pytest.mark.parametrize("even,steps", [(True, 6), (False, 6), (True, 7)])
def test_when_density_is_asked(even, steps, drawn, tmp_path, monkeypatch):      # (A9)
    """Before phase 2; then, if classes may be equally large and steps are not few, after the first
    two of six epochs, else after the second, and balance ends if they are not."""
    monkeypatch.setattr(coft_plus, "WHOLE", steps)      # there are six: 40 images, batches of 64
    asked, powers = [], []
    monkeypatch.setattr(shapes, "pictures", lambda _, part: [v[:40] for v in drawn[part]])
    monkeypatch.setattr(coft_plus, "ask_density", lambda job, models, table, rate, nats:
                        (table, asked.append((nats, rate, "balance" in job.added)) or even))
    monkeypatch.setattr(coft_plus, "part_way", lambda *a: powers.append(a[-1]) or 1.0)
    run(tmp_path / "run", "--epochs2", 6, script=coft_plus)
    first, later = coft_plus.NATS
    often = even and steps == 6
    want = [(first, 1 / 2, True), *often * [(later, 1 / 2, True)], (later, 1 / 3, True)]
    assert (asked, powers) == (want, [4])
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert ("balance" in state["added"]) == even


def test_density_predicts_too(frozen):                  # (A11)
    """Of two images and their five crops; before it is fitted it says nothing."""
    model = coft_plus.FullModel(frozen, unit(3, 64), student_of(frozen))
    v, l = torch.randn(12, 64), torch.randn(12, 3)
    p = coft_plus.over_views(l.softmax(dim=1), 2, 0.3)                          # (2, 3)
    torch.testing.assert_close(coft_plus.posterior(model, v, l, 2, 0.3), p)
    W, b = torch.randn(3, 64), torch.randn(3)
    model.gauss_W, model.gauss_b = W, b
    f = F.normalize(v, dim=1)[2:].unflatten(0, (5, 2)).mean(dim=0)
    torch.testing.assert_close(coft_plus.posterior(model, v, l, 2, 0.3),
                               F.normalize(p * (f @ W.T + b).exp(), p=1, dim=1))
    torch.testing.assert_close(coft_plus.posterior(model.judge, v, l, 2, 0.3), p)


@pytest.mark.parametrize("added, limit", [({"balance"}, coft_plus.NATS[1]), (set(), -math.inf)])
def test_fit_head(added, limit, frozen, monkeypatch):   # (A11)
    """Each model's EM begins with what it says of the training images; the root is taken."""
    job = SimpleNamespace(added=added, C=3)
    models = [coft_plus.FullModel(frozen, unit(3, 64), student_of(frozen)) for _ in range(2)]
    monkeypatch.setattr(coft_plus, "features", lambda job, me, index: (index + 1, index + 2))
    monkeypatch.setattr(coft_plus, "by_density", lambda q, index, p, f, C, nats: (None, None, (
        torch.full((C, 64), 8.0 * q), torch.full((C,), 8.0 * f)))
        if (q, C, nats) == (p, 3, limit) else None)
    coft_plus.fit_head(job, models, [10, 20])
    for me, (W, b) in zip(models, ((11, 12), (21, 22))):
        assert (me.gauss_W == W).all() and (me.gauss_b == b).all()


@pytest.mark.parametrize("few, shots, fitted", [(3, 0, 1), (4, 0, 0), (4, 1, 0)])
def test_no_head_from_few_images(few, shots, fitted, drawn, tmp_path, monkeypatch):  # (A11)
    asked = []
    monkeypatch.setattr(shapes, "pictures", lambda _, part: [v[:40] for v in drawn[part]])
    monkeypatch.setattr(coft_plus, "FEW", few)          # four images a class
    monkeypatch.setattr(coft_plus, "fit_head", lambda *a: asked.append(a))
    run(tmp_path / "run", "--max-steps", 2, "--shots", shots, script=coft_plus)
    assert len(asked) == fitted


def test_learning_rates(frozen):
    args = SimpleNamespace(peft="vpt", peft_size=2, ctx=0, lr1=0.1, lr2=0.01, compile=False)
    job = SimpleNamespace(args=args, added={"adam"}, full=frozen, W0=unit(10, 64),
                          device=torch.device("cpu"))
    students = torch.nn.ModuleList(student_of(frozen) for _ in range(2))
    word = 0.1 * float(students[0].texts.pos.detach().std()) / coft.WORD_STD
    def groups(number):
        found = coft.start_phase(job, number, students, 5).optimizer.param_groups
        return [(g["initial_lr"], g["weight_decay"]) for g in found]
    assert groups(1)[:3] == [(0.1, 0), (pytest.approx(word), 0), (pytest.approx(10 * word), 0)]
    assert groups(2) == 2 * [(0.1, 0), (0.01, 0.01)]    # W and b; the encoder


def test_load_prompts(tmp_path, capsys):
    names, path = ["hot dog", "Ice_cream", "apartment building outdoor", "yin yang"], tmp_path / "p"
    table = {"hot dog": ["h1", "a {}."], "ice-cream": ["i"], "apartment building (outdoor)": ["a"],
             "Yang-Yin": ["y"], "unused": ["u"]}
    path.write_text(json.dumps(table))
    assert coft_plus.load_prompts(path, names) == [["h1", "a hot dog."], ["i"], ["a"], ["y"]]
    assert capsys.readouterr().err == ""
    alike = written(tmp_path / "q", json.dumps({"grade_A": ["a"], "grade_A+": ["plus"]}))
    assert coft_plus.load_prompts(alike, ["grade A", "grade A+"]) == [["a"], ["plus"]]
    assert coft_plus.load_prompts(path, ["hot dog", "cat"]) == [["h1", "a hot dog."], []]
    assert "1 of 2 classes: cat; unused keys: ice-cream, apart" in capsys.readouterr().err
    for content, says in (("[]", "expected {"), ('{"cat": "x"}', "expected {"), ("{", "not valid"),
                          ("{\"dog\": [\"x\"]}", "1 of 1 classes: cat; unused keys: dog")):
        assert says in refuses(written(path, content), ["cat"], by=coft_plus.load_prompts)


def test_our_prompts_fit_their_data_sets():
    folder = Path(coft_plus.__file__).with_name("prompts")
    names = {known.folders[0] for known in data.SETS} | {"demo"}
    files = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    assert len(files) == 11 and files.keys() <= names
    assert sum(len(texts) for table in files.values() for texts in table.values()) == 4160
    assert files["demo"].keys() == set(shapes.SHAPES) and len(files["oxford_pets"]) == 37


def test_without_its_parts_it_is_coft(little, tmp_path, monkeypatch):
    monkeypatch.setattr(coft, "crops_tell", lambda *_: False)           # which only CoFT asks
    off = ["--rounds", 1, "--gamma", 0, "--prompts", "", "--max-steps", 2]
    _, plus, _ = run(tmp_path / "plus", *off, "--recipe", "ours-gauss-head", script=coft_plus)
    _, rows, _ = run(tmp_path / "coft", "--epochs1", 1, "--epochs2", 1, "--max-steps", 2)
    assert rows == plus


def test_plus_run_folder(little, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(coft_plus.SETTINGS["ours"], "k", (3, 3))
    monkeypatch.setitem(coft_plus.SETTINGS["ours"], "ctx", (4, 4))
    (_, *epochs, last), *_ = run(tmp_path / "run", "--max-steps", 2, script=coft_plus)
    assert [(e["phase"], e["round"]) for e in epochs] == [(1, 1), (1, 2), (2, 1)]
    assert epochs[0]["kept"] <= 0.35
    assert "demo.json" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    Path("mine.json").write_text(json.dumps({c: [f"a drawing of a {c}"] for c in shapes.SHAPES}))
    flags = ["--prompts", "mine.json", "--max-steps", 1]
    lines, *_ = run(tmp_path / "mine", *flags, script=coft_plus)
    assert lines[-1]["zero_shot"] != last["zero_shot"]
    stops(capsys, "gone.json", tmp_path / "gone", "--prompts", "gone.json", script=coft_plus)
    run(tmp_path / "ours", *flags, "--template", "ensemble", script=coft_plus)
    model = coft_plus.load(tmp_path / "ours" / "model.pt")              # (A8)
    texts = [[t.format(c) for t in (PHOTO, *data.ENSEMBLE, "a drawing of a {}")]
             for c in shapes.SHAPES]
    t0, start = (clip.zeroshot_classifier(model.clip_model, some)
                 for some in (texts, [row[:1] for row in texts]))       # prompts start at PHOTO's
    assert not model.models[0].judge.texts.shift.any()
    assert model.models[0].judge.texts.pos.shape == (1, 4, 64)          # ctx
    torch.testing.assert_close(model.models[1].judge.texts.shift, t0 - start)


# ======== prompt_align.py ========

CLASSES = ["abyssinian", "Bengal cat", "beagle"]


def aligned_batch(B=6, C=5, scale=3.0, views=()):
    """Logits (*views, B, C) that want a gradient, candidate sets, confidences; double."""
    l, c = scale * torch.randn(*views, B, C).double(), torch.rand(B, C).double()
    S = torch.rand(B, C) < 0.5
    S[torch.arange(B), torch.randint(C, (B,))] = True
    S[0], S[1] = torch.arange(C) == 2, True                             # a singleton, a full set
    return l.requires_grad_(True), S, c


def agree(a, b, x):
    """a and b are the same function of x: same value, same gradient."""
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    ga, gb = (torch.autograd.grad(v, x, retain_graph=True)[0] for v in (a, b))
    torch.testing.assert_close(ga, gb, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", [o for o in pa.OBJECTIVES if o != "crdpll"])
def test_align_pll_losses(objective):
    # CAVL: where |l - 1| l ranks otherwise than l; where all logits are negative
    for shift in (0, -20):
        l, S, c = aligned_batch(B=60, scale=1.0)
        l = (l + shift).detach().requires_grad_(True)
        if objective == "naive":                        # its table never moves
            c = pa.confidence(objective, torch.zeros_like(l)[None], S)
        p = l.softmax(dim=1)                                                    # (B, C)
        best = torch.where(S, (l - 1).abs() * l, -math.inf).argmax(dim=1)       # (B,)
        want = {"naive": -(S * p.log()).sum(dim=1) / S.sum(dim=1),
                "cc": -(S * p).sum(dim=1).log(),
                "lws": -(c * torch.where(S, p, 1 - p).log()).sum(dim=1),
                "cavl": -p[range(60), best].log()}
        weighted = -(c * p.log()).sum(dim=1)            # RC, PRODEN, PiCO
        views = torch.stack([l, -l])                    # they learn from the first one
        agree(pa.pll_loss(objective, views, S, c, 1.0), want.get(objective, weighted).mean(), l)
        rest = F.normalize(~S * p, p=1, dim=1) if objective == "lws" else 0.0
        row = F.normalize(S * p, p=1, dim=1) + rest
        torch.testing.assert_close(pa.confidence(objective, views, S), row.detach())


def test_align_crdpll():
    l, S, c = aligned_batch(views=(3,))
    c, p = F.normalize(c * S, p=1, dim=1), l.softmax(dim=2)
    kl = (torch.xlogy(c, c) - c * p.log()).sum() / 6                    # with zeros: 0 log 0 = 0
    negative = -(~S * (1 - p[0]).log()).sum() / 6
    for lam in (0.0, 0.4, 1.0):
        agree(pa.pll_loss("crdpll", l, S, c, lam), lam * kl + negative, l)
    row = pa.confidence("crdpll", l, S)                                 # geometric mean, in S
    torch.testing.assert_close(row, F.normalize(p.prod(dim=0) ** (1 / 3) * S, p=1, dim=1))


def test_align_contrastive():
    z, keys = torch.randn(4, 3).double().requires_grad_(True), torch.randn(5, 3).double()
    y, y_keys = [0, 1, 0, 2], [0, 1, 2, -1, 1]
    everyone, labels, b = torch.cat([z, keys]), torch.tensor(y + y_keys), 0
    for i in range(4):
        others = torch.arange(9) != i
        log_p = (everyone[others] @ z[i] / 0.5).log_softmax(dim=0)              # (8,)
        b = b - log_p[labels[others] == y[i]].mean() / 4
    agree(pa.loss_contrastive(z, torch.tensor(y), keys, torch.tensor(y_keys), 0.5), b, z)


def test_align_mixed_posterior_and_weight():
    (l, S, _), hand = aligned_batch(), aligned_batch()[0]
    q = pa.mixed_posterior(l, hand, S, 0.3)
    a, b = (F.normalize(S * x.softmax(dim=1), p=1, dim=1) for x in (hand, l))
    torch.testing.assert_close(q, 0.3 * a + 0.7 * b)
    assert not q.requires_grad
    x = torch.tensor([2.0, 0.5], requires_grad=True)
    w = pa.balance(x[0], x[1])
    assert float(w) == 4 and not w.requires_grad
    for pll, align in ((0.0, 0.0), (0.0, 1.0)):                         # no 0/0; never off
        assert float(pa.balance(torch.tensor(pll), torch.tensor(align))) == pytest.approx(0.03)
    assert math.isfinite(pa.balance(torch.tensor(1.0), torch.tensor(0.0)))


def test_align_extreme_logits():
    l = torch.tensor([[1e4, 0, -1e4, 5], [-1e4, 3, 3, 3], [0, 1e4, 0, 0]])
    S = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()  # no mass; singleton; full
    p = pa.masked_softmax(l, S)[:2]
    assert p.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert torch.equal(pa.masked_softmax(l, torch.zeros_like(S)), torch.zeros_like(l))
    for objective in pa.OBJECTIVES:
        views = torch.stack([l] * 3).requires_grad_(True)
        c = pa.confidence(objective, views, S)
        assert torch.isfinite(c).all() and (c >= 0).all()
        loss = pa.pll_loss(objective, views, S, c, 1.0)
        align = pa.loss_weighted(views[0], pa.mixed_posterior(views[0], l, S, 0.5))
        total = loss + pa.balance(loss, align) * align
        grad, = torch.autograd.grad(total, views)
        assert torch.isfinite(total) and torch.isfinite(grad).all(), objective
    one = torch.tensor([[50.0, 0, 0]], requires_grad=True)              # p_0 rounds to 1
    pa.log_one_minus(one)[0, 0].backward()
    assert one.grad[0].tolist() == pytest.approx([-1, 0.5, 0.5])


def flipped(y_true, C, q, seed):
    """Sets that wrong labels enter with chance q."""
    return pa.draw_candidates(torch.ones(len(y_true), C), y_true, q, seed)


@pytest.mark.parametrize("objective, teacher, weights", [
    ("cc", "evidence", [0.5, 0.5]), ("rc", "evidence", [1 / 3] * 3), ("cc", "evidence", [1.0, 0.0]),
    ("crdpll", "dynamic", [1.0]), ("naive", "dynamic", [1.0]), ("lws", "handcrafted", [1.0]),
    ("proden", None, [1.0])])
def test_align_a_run_is_this_plain_loop(objective, teacher, weights, little, tmp_path, monkeypatch):
    """Three epochs of three steps: same prompts, loss, confidences. Eq. (2), (10), (11)."""
    ended, train = [], pa.train
    if teacher == "evidence":                           # else the run's must be [1]
        monkeypatch.setattr(pa, "choose_weights", lambda *a: weights)
    monkeypatch.setattr(pa, "train", lambda *a: ended.append((*a, train(*a))) or ended[-1][-1])
    flags = ["--teacher", teacher] if teacher else ["--no-align"]
    flags += ["--objective", objective, "--passes", 2, "--seed", 5]
    assert status(tmp_path, *flags, script=pa) == 0
    job, passes, sets, _, learner = ended[0]
    weak = job.dataset.train.view(data.transforms(32)[1])
    for x, i in job.load(weak, seed=5, epoch=1):        # in the second epoch, others in the first
        f = F.normalize(job.clip_model.encode_image(x), dim=1)
        torch.testing.assert_close(passes[1][0, i], f, atol=1e-5, rtol=0)
    prompts = pa.Prompts(job.clip_model, shapes.SHAPES, PHOTO, 0, weights)
    table, momentum, step = F.normalize(sets.float(), p=1, dim=1), 0, 0         # 1 / |S| in S
    if objective == "lws":
        table = table + F.normalize(1.0 - sets.float(), p=1, dim=1)
    for epoch in range(3):
        rng, losses = torch.Generator().manual_seed(5 * 1_000_003 + epoch), 0
        torch.randint(2**62, (100,), generator=rng)
        for i in torch.randperm(100, generator=rng)[:96].split(32):
            f, S = passes[epoch % 2][:, i], sets[i]
            l = [job.tau * f @ t.T for t in prompts.each(job.clip_model)]       # (A, B, C) each
            loss = pa.pll_loss(objective, l[-1], S, table[i], min(2 * step / 9, 1))
            if teacher:
                alpha = 1 if teacher == "handcrafted" else 1 - step / 9
                l_hand = job.tau * f[0] @ job.t_hand.T
                q = pa.mixed_posterior(l[0][0], l_hand, S, alpha)
                align = pa.loss_weighted(l[0][0], q)
                w = 1 if teacher == "evidence" else float(loss.detach() / align.detach())
                loss = loss + w * align
            if any(weights[1:]):                        # the sets do not follow CLIP
                loss = loss + sum(pa.loss_cc(l_m[0], S) for l_m in l[:-1])
            grad, = torch.autograd.grad(loss, prompts.ctx)
            momentum = 0.9 * momentum + grad + 5e-4 * prompts.ctx.detach()
            rate = job.args.lr * (0.5 + 0.5 * math.cos(math.pi * step / 9))
            prompts.ctx.data -= rate * momentum
            if objective == "rc":                       # asks the prompt after the step
                l = [job.tau * f @ t.T for t in prompts.each(job.clip_model)]
            if objective != "naive":
                table[i] = pa.confidence(objective, l[-1].detach(), S)
            losses, step = losses + float(loss.detach()) / 3, step + 1
    torch.testing.assert_close(learner.prompts.state_dict(), prompts.state_dict())
    torch.testing.assert_close(learner.table, table)
    last = job.run.lines[-2]
    assert last["loss"] == pytest.approx(losses, abs=1e-3)
    want = {"evidence": 2 / 9, "dynamic": 2 / 9, "handcrafted": 1.0, None: 0.0}     # steps 6 to 8
    assert last.get("alpha", 0) == pytest.approx(want[teacher], abs=1e-3)


def test_align_evidence(frozen):
    l, S, _ = aligned_batch(scale=1.0, B=400)
    l = l.detach()
    right = 3 * S + l                                   # knows the sets, mostly
    for prompts, better in (([l, right], True), ([right, l], False), ([l, l, right], True),
                            ([right, right, 40 * l], False)):
        assert pa.helps(torch.stack(prompts), S) == better
    assert not pa.helps(torch.stack([l, right]), torch.ones_like(S))    # full sets say nothing
    prompts = pa.Prompts(frozen, shapes.SHAPES, PHOTO, 4, [0.5, 2.0])
    one, other = prompts.each(frozen)
    torch.testing.assert_close(prompts(frozen), 0.5 * one + 2 * other)
    y, p = torch.randint(10, (2000,)), torch.rand(2000, 10)
    p[torch.arange(2000), y] += 0.5                     # right for most
    p = (4 * p).softmax(dim=1)
    for q in (0.1, 0.5, 0.9, 1):
        assert not pa.follow_clip(p, flipped(y, 10, q, 0))
    for q in (0.1, 0.3, 0.5):
        sets = pa.draw_candidates(p, y, q, 0)
        assert pa.follow_clip(p, sets)
        sets[::2] = True                                # half of them have no entry
        assert pa.follow_clip(p, sets)


def test_held_out_sets_weigh_the_prompts(little, tmp_path, monkeypatch):
    train, seen = pa.train, []
    monkeypatch.setattr(pa, "train", lambda job, passes, sets, *a, **how: seen.append(
        (passes[0], sets)) or train(job, passes, sets, *a, **how))
    monkeypatch.setattr(pa, "helps", lambda *a: seen.append(a) or True)
    flags = ["--objective", "rc", "--teacher", "evidence"]
    lines, *_ = run(tmp_path / "run", *flags, script=pa)
    (f_some, some), (l, held), (f_all, every) = seen    # a trial, its judgement, the training
    assert l.shape == (3, 20, 10)
    last = torch.arange(100) % 5 == 4
    assert torch.equal(some, every[~last]) and torch.equal(held, every[last])
    assert torch.equal(f_some, f_all[:, ~last])
    assert sum("epoch" in line for line in lines) == 3  # the trial: none
    assert lines[-1]["weights"] == pytest.approx([1 / 3] * 3)


def test_align_pico_state():
    contrast = pa.Contrast(6, 3, d=4, queue=5)
    assert torch.allclose(contrast.keys.norm(dim=1), torch.ones(5))     # rows, not columns
    z, key = F.normalize(torch.randn(3, 4)), F.normalize(torch.randn(3, 4))
    y, old = torch.tensor([2, 0, 2]), contrast.keys.clone()
    contrast.update(z, key, y, m=0.5)
    assert torch.equal(contrast.keys, torch.cat([key, old[:2]]))
    assert contrast.y_keys.tolist() == [2, 0, 2, -1, -1]
    torch.testing.assert_close(contrast.prototypes[0], z[1])
    torch.testing.assert_close(contrast.prototypes[2], F.normalize(z[0] + z[2], dim=0))
    assert contrast.prototypes[1].abs().sum() == 0
    f, i, S = unit(3, 8, 64), torch.randperm(12)[:8], torch.ones(8, 10, dtype=torch.bool)
    learner = SimpleNamespace(contrast=pa.Contrast(64, 10), table=torch.full((12, 10), 0.1))
    z = F.normalize(learner.contrast.head(f[0]), dim=1)
    prototype = -F.normalize(z.detach().mean(dim=0), dim=0)     # the only one, behind every image
    learner.contrast.prototypes[3] = prototype
    pa.pico_step(learner, 1, 0.0, f, i, torch.zeros(3, 8, 10), S)
    assert (learner.table[i].argmax(dim=1) == 3).all()  # 0, of those without one, does not win


def test_drawn_candidates():
    N, C, q = 4000, 10, 0.3
    y, before = torch.arange(N) % C, torch.get_rng_state()
    sets = flipped(y, C, q, 1)
    assert sets.shape == (N, C) and sets.dtype == torch.bool and sets[torch.arange(N), y].all()
    wrong = torch.ones(N, C, dtype=torch.bool).scatter(1, y[:, None], False)
    assert abs(sets[wrong].float().mean() - q) < 0.01               # its deviation is 0.0024
    assert torch.equal(sets, flipped(y, C, q, 1))
    assert not torch.equal(sets, flipped(y, C, q, 2))
    assert flipped(y, C, 1, 0).all() and flipped(y, C, 0, 0).sum() == N
    for p in (torch.full((N, C), 0.1), F.one_hot(y, C).float()):    # no preference, nothing left
        assert torch.equal(sets, pa.draw_candidates(p, y, q, 1))
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).repeat(N, 1)             # y = 0: q (C-1) p / 0.6
    zeros = torch.zeros(N, dtype=torch.long)
    rate = pa.draw_candidates(p, zeros, 0.5, 0).float().mean(dim=0)
    assert rate[0] == 1 and (rate - torch.tensor([1, 0.75, 0.5, 0.25])).abs().max() < 0.035
    capped = pa.draw_candidates(p, zeros, 0.9, 0).float().mean(dim=0)
    assert capped[1] == 1 and abs(capped[2] - 0.9) < 0.03           # 1.35 is capped at 1
    assert torch.equal(before, torch.get_rng_state())
    three, y_true = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 0]]).bool(), torch.tensor([0, 2, 0])
    assert pa.describe_candidates(three, y_true) == (
        "1.7 candidate labels an image (1 to 3), the true one among them for 66.67 %")


def test_few_shot():
    y = torch.tensor([k % 3 for k in range(30)] + [3])
    few = data.few_shot(y, 4, 1)
    assert few.tolist() == sorted(set(few.tolist())) and y[few].bincount().tolist() == [4, 4, 4, 1]
    assert not torch.equal(few, data.few_shot(y, 4, 2)) and len(data.few_shot(y, 99, 1)) == 31
    assert "the training images have no labels" in refuses(None, 4, 1, by=data.few_shot)


PHOTOS = data.Images(["cat/1.jpg", "dog/1.jpg", "dog/2.jpg", "x/3.jpg"], [1, 0, 1, 0])
ROWS = "Image,labels\n./cat\\1.jpg,bengal_CAT|2\n\ndog/1.jpg,0,beagle,\n3.jpg,1;2;\n"


@pytest.mark.parametrize("content, classes, want, none", [
    (ROWS + "dog/9.jpg,0", CLASSES, "011 101 111 011", 1),              # dog/9.jpg is not here
    ("\ufeff" + ROWS.replace(",", ";"), CLASSES, "011 101 111 011", 1),
    ("path,classes\n1.jpg,0\ndog/2.jpg,Abyssinian", CLASSES, "111 111 100 111", 3),    # two 1.jpg
    ({"cat/1.jpg": [1, "beagle"], "dog/1.jpg": ["2", "ABYSSINIAN"], "3.jpg": [1, 2]}, CLASSES,
     "011 101 111 011", 1),
    ("dog/1.jpg,0\ndog/1.jpg,beagle\n", CLASSES, "111 101 111 111", 3),  # one class a line
    ("dog/1.jpg,2\n2.jpg,0\n,,", ["2", "1", "0"], "111 100 001 111", 2),    # names, before indices
    ("3.jpg,missile", ["missile", "a", "missile"], "111 111 111 101", 3),   # both of the name
    ("3.jpg,c\n2.jpg,C++|c#", ["c", "c++", "c#"], "111 111 011 100", 2),    # one's punctuation
    ('"dog/2.jpg","0;1"', CLASSES, "111 111 110 111", 3),
    ("dog/2.jpg\t0\tbengal cat", CLASSES, "111 111 110 111", 3),
    ("\nimage|labels (a, b)\ndog/2.jpg|0|bengal cat", CLASSES, "111 111 110 111", 3),
    ("cat/1.jpg,0\ndog/1.jpg,0\ndog/2.jpg,0\n3.jpg,0", CLASSES, "100 100 100 100", 0)])
def test_read_candidates(tmp_path, content, classes, want, none):
    path = tmp_path / ("f.csv" if isinstance(content, str) else "f.json")
    sets, line = pa.read_candidates(str(written(path, content)), PHOTOS, classes)
    assert " ".join("".join(map(str, row)) for row in sets.int().tolist()) == want
    assert line.startswith(f"; {none} have no entry") if none else line == ""


def test_a_path_says_which(tmp_path):
    file = written(tmp_path / "f.csv", "1.jpg,0\na/1.jpg,1\n\xe9.jpg,2")
    images = ["1.jpg", "a/1.jpg", "e\u0301.jpg"]        # an accent, as macOS writes it
    sets, _ = pa.read_candidates(str(file), data.Images(images, [0, 1, 2]), CLASSES)
    assert sets.int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    says = refuses(str(file), data.Images(images, [0, 1, 2]), ["1", "2"], by=pa.read_candidates)
    assert says.endswith("line 1: expected a class, got 0")         # 1 is no index here


@pytest.mark.parametrize("content, says", [
    ("cat/1.jpg,0\nd.jpg,beagel", "f.csv line 2: expected a class or 0 to 2, got beagel"),
    ("path,class\n\ncat/1.jpg, ", "f.csv line 3: expected at least one candidate class"),
    ("image,Beagle,bengal_cat\ncat/1.jpg,0,1", "f.csv: expected an image's classes, not a column "
     "per class"),
    ("file,is_cat,is_dog,is_fox\ncat/1.jpg,1,0,0", "f.csv line 2: expected an image's classes, not "
     "a column per class"),
    ("cat/1.jpg,3", "f.csv line 1: expected a class or 0 to 2, got 3"),
    ('cat/1.jpg,"x', "f.csv line 1: expected a class or 0 to 2, got x"),
    ("", "f.csv: expected images like cat/1.jpg, found none of them"),
    ({"cat/1.jpg": [-1]}, "f.json: cat/1.jpg: expected a class or 0 to 2, got -1"),
    ({"cat/1.jpg": "0"}, "f.json: expected {image: [class, ...], ...}"),
    ([[0]], "f.json: expected {image: [class, ...], ...}")])
def test_candidate_errors(tmp_path, content, says):
    path = tmp_path / ("f.csv" if isinstance(content, str) else "f.json")
    message = refuses(str(written(path, content)), PHOTOS, CLASSES, by=pa.read_candidates)
    assert message == f"{tmp_path}/{says}"


@pytest.mark.parametrize("objective", ["cc", "crdpll", "pico"])
def test_align_run_folder(little, tmp_path, objective):
    teacher = "dynamic" if objective == "pico" else "evidence"
    flags = ["--objective", objective, "--shots", 8, "--teacher", teacher, "--epochs", 2]
    (first, *epochs, last), predictions, saved = run(tmp_path / "run", *flags, script=pa)
    assert sorted(os.listdir(tmp_path / "run")) == [
        "args.json", "disambiguated.csv", "last.pt", "log.jsonl", "model.pt", "predictions.csv",
        "report.html"]
    table = rows_of(tmp_path / "run" / "disambiguated.csv")
    assert first["objective"] == objective and [e["epoch"] for e in epochs] == [1, 2]
    keys = {"loss", "pll", "accuracy", "disambiguation", "align", "w", "alpha"}
    assert all(keys <= e.keys() for e in epochs)
    assert {"zero_shot", "accuracy", "seconds", "images_per_second"} <= last.keys()
    assert predictions[0] == ["path", "class", "confidence", "p_clean"] and len(predictions) == 51
    assert table[0] == ["image", "candidates", "label", "confidence"]
    assert all(row[2] in row[1].split("|") and 0 <= float(row[3]) <= 1 for row in table[1:])
    prompts = pa.Prompts(clip.load("tiny")[0], shapes.SHAPES, "a photo of a {}.", saved["ctx"],
                         last["weights"])
    assert saved["models"]["weights"].tolist() == last["weights"]
    assert (saved["models"]["ctx"] != prompts.ctx).all(dim=2).any(dim=1).all()
    if objective == "pico":                             # two epochs of two steps
        learner = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["learner"]
        assert (learner["contrast.y_keys"] >= 0).sum() == 128


def test_align_flags(little, tmp_path):
    all_differ(tmp_path, [], (
        "", "--seed 1", "--q 0.9", "--no-align", "--ctx 4", "--shots 2", "--teacher handcrafted",
        "--candidates instance", "--lr 0.5", "--template {}.", "--amp bf16", "--max-steps 2",
        "--epochs 2", "--passes 1", "--no-flip", "--objective lws"), pa)
    for coop, flags in (("a", "--supervised"), ("b", "--objective naive --no-align --q 0")):
        run(tmp_path / coop, *flags.split(), script=pa)
    same_result(tmp_path / "a", tmp_path / "b")


def test_align_unlabelled_folder_with_candidates(drawn, tmp_path, capsys):
    save_pictures(tmp_path / "photos", {"train": drawn["train"]}, "{i:03d}.png")
    sets = {f"{i:03d}.png": [shapes.SHAPES[k], "star"] for i, k in enumerate(drawn["train"][1])}
    written(tmp_path / "sets.json", sets)
    folder = ["--data", tmp_path / "photos", "--classes", ",".join(shapes.SHAPES), "--arch", "tiny"]
    stops(capsys, "--candidates FILE", tmp_path / "a", *folder, script=pa)
    folder += ["--candidates", tmp_path / "sets.json"]
    lines, predictions, _ = run(tmp_path / "b", *folder, script=pa)
    assert lines[-1]["accuracy"] is None and lines[-1]["disambiguation"] is None
    assert len(predictions) == 101
    for row in rows_of(tmp_path / "b" / "disambiguated.csv")[1:]:
        assert set(row[1].split("|")) == set(sets[row[0]]) and row[2] in sets[row[0]]


def test_align_user_errors(little, tmp_path, capsys):
    bad = written(tmp_path / "bad.json", {"train/00000.png": ["dog"]})
    stops(capsys, f"{bad}: train/00000.png: expected a class or 0 to 9, got dog",
          tmp_path / "out", "--candidates", bad, script=pa)
    stops(capsys, "a lower --lr", tmp_path / "out", "--lr", 1e18, script=pa)
    stops(capsys, "--q 1.5 is out of range", tmp_path / "out", "--q", 1.5, script=pa)


@pytest.mark.parametrize("objective", ["rc", "cavl"])
def test_align_full_sets_fall_back_to_zero_shot(little, tmp_path, objective):
    flags = ["--q", 1, "--objective", objective, "--teacher", "evidence"]
    (*_, last), *_ = run(tmp_path / "run", *flags, script=pa)
    assert last["weights"] == [0.5, 0.5]
    assert abs(last["accuracy"] - last["zero_shot"]) <= 2, last     # one image of fifty


def test_align_demo_gains(tmp_path):
    assert pa.main(["--device", "cpu", "--objective", "rc", "--epochs", "8", "--passes", "2",
                    "--out", str(tmp_path / "run")]) == 0
    last = read(tmp_path / "run")[0][-1]
    assert last["accuracy"] >= last["zero_shot"] + 3, last


# ======== all scripts: after the run, resume, several processes, precision, odd data ========

SCRIPTS = {"coft": SHORT, "coft_plus": PLUS, "prompt_align": [
    "--device", "cpu", "--epochs", "3", "--flip", "--teacher", "dynamic"]}


@pytest.mark.parametrize("script", [coft, coft_plus, pa])
def test_load(little, drawn, tmp_path, capsys, monkeypatch, script):
    def go(out, *args):
        return run(tmp_path / out, *args, script=script)
    written(tmp_path / "tiny.pt", Path(clip.__file__).with_name("tiny.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    flags = ["--max-steps", 3, "--template", "a {}.", "--weights", "tiny.pt", "--no-quick-gelu"]
    with monkeypatch.context() as few:                  # bf16 is slow on most CPUs
        few.setattr(shapes, "pictures", lambda _, part: [v[:16] for v in drawn[part]])
        _, rows, _ = go("bf16", *flags, "--amp", "bf16")
        _, found, _ = go("amp", "--load", tmp_path / "bf16" / "model.pt", "--amp", "bf16")
        assert found == rows and len(rows) == 17
    lines, rows, saved = go("run", *flags, "--amp", "off")
    monkeypatch.chdir("/")                              # model.pt finds its CLIP from anywhere
    file, accuracy = tmp_path / "run" / "model.pt", lines[-1]["accuracy"]
    again, found, _ = go("again", "--load", file)
    assert found == rows and again[-1]["accuracy"] == accuracy
    assert sorted(os.listdir(tmp_path / "again")) == [
        "args.json", "log.jsonl", "predictions.csv", "report.html"]
    class_of = dict(row[:2] for row in rows)
    for form in ("flat/{i:05d}.png", "labelled/{c}/{i:05d}.png"):   # the same images elsewhere
        save_pictures(tmp_path, {"test": drawn["test"]}, test=form)
    for folder, percent in (("flat", None), ("labelled", accuracy)):
        lines, found, _ = go(f"of-{folder}", "--load", file, "--data", tmp_path / folder)
        assert len(found) == 51                         # all of them, without a split
        assert all(class_of[f"test/{row[0][-9:]}"] == row[1] for row in found[1:])
        assert lines[-1]["accuracy"] == percent
    go("of-photo", "--load", file, "--data", tmp_path / "flat" / "00000.png")
    assert f"\n00000.png: {class_of['test/00000.png']}\n" in capsys.readouterr().out
    torch.save({**saved, "script": "other"}, tmp_path / "other.pt")
    torch.save(golden_weights(VIT), tmp_path / "vit.pt")
    class_folders(tmp_path / "cats", 1, ("cat", "star"))
    torch.save({**saved, "clip": str(tmp_path / "gone.pt")}, tmp_path / "gone.model.pt")
    for args, says in (
            (["--load", tmp_path / "absent.pt"], "absent.pt is not a run's model.pt: No such file"),
            (["--load", tmp_path / "vit.pt"], "vit.pt is not a run's model.pt: without 'script'"),
            (["--load", tmp_path / "cats/cat/000.png"], "000.png is not a run's model.pt: damaged"),
            (["--load", tmp_path / "other.pt"], "other.pt was written by other.py"),
            (["--load", tmp_path / "gone.model.pt"], "gone.model.pt needs its CLIP, from -"),
            (["--load", file, "--weights", tmp_path / "vit.pt"], "adapted from another CLIP: "),
            (["--load", file, "--arch", "RN50"], "the weights are not those of RN50: resolution"),
            (["--load", file, "--data", tmp_path / "cats"], "nor a model has: cat"),
            (["--load", file, "--student", tmp_path / "vit.pt"], "--student is of another")):
        if "--student" not in args or script is not pa:
            stops(capsys, says, tmp_path / "out", *args, script=script)


def test_the_lines_of_the_readme(little, drawn, tmp_path, monkeypatch, capsys):
    _, rows, _ = run(tmp_path / "runs" / "coft-1", "--max-steps", 2)
    drawn["test"][0][7].save(tmp_path / "photo.jpg", quality=100, subsampling=0)
    text = (Path(coft.__file__).parent / "README.md").read_text()
    code, = [block for block in re.findall(r"```python\n(.*?)```", text, re.S)
             if "coft.load" in block]
    assert len(code.splitlines()) == 5
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    name, p = capsys.readouterr().out.rsplit(maxsplit=1)
    assert [name, float(p)] == [rows[8][1], pytest.approx(float(rows[8][2]), abs=0.05)]


def test_export(little, tmp_path, capsys):
    file = tmp_path / "plain.pt"
    run(tmp_path / "run", "--max-steps", 3, "--export", file)
    said = capsys.readouterr().out
    plain, model = clip.load(file)[0], coft.load(tmp_path / "run" / "model.pt")
    x, beside = golden_images(4, 32), torch.load(f"{file}.classes", weights_only=True)
    torch.testing.assert_close(plain.encode_image(x), model.models[0].visual(x))
    assert equal({k: v for k, v in plain.state_dict().items() if not k.startswith("visual.")},
                 {k: v for k, v in clip.load("tiny")[0].state_dict().items()
                  if not k.startswith("visual.")})
    assert beside["class_names"] == list(shapes.SHAPES) and beside["t"].shape == (10, 64)
    test = data.load("demo").test
    f = plain.encode_image(torch.stack([model.preprocess(test.image(i)) for i in range(50)]))
    y = (F.normalize(f, dim=1) @ beside["t"].T).argmax(dim=1)                   # (50,)
    assert f"accuracy {data.accuracy(y, test.y_true)}" in said
    run(tmp_path / "b", "--epochs2", 0, "--max-steps", 1)
    stops(capsys, "--export: without phase 2 CLIP's encoder", tmp_path / "c", "--load",
          tmp_path / "b" / "model.pt", "--export", file)
    torch.save(golden_weights(VIT), tmp_path / "vit.pt")    # heads as OpenAI's: a plain state dict
    run(tmp_path / "vit", "--weights", tmp_path / "vit.pt", "--max-steps", 1, "--export", file)
    weights, model = torch.load(file, weights_only=True), coft.load(tmp_path / "vit" / "model.pt")
    want = model.models[0].visual(x)
    torch.testing.assert_close(clip.build_model(weights).encode_image(x), want)
    open_clip = pytest.importorskip("open_clip")        # theirs reads it too
    theirs = open_clip.model.CLIP(embed_dim=32, quick_gelu=True, vision_cfg=dict(
        image_size=32, layers=2, width=128, patch_size=8), text_cfg=dict(
        context_length=77, vocab_size=49408, width=64, heads=1, layers=2))
    theirs.load_state_dict(weights)
    torch.testing.assert_close(theirs.encode_image(x), want, atol=1e-4, rtol=1e-4)


def test_little_accuracy_is_warned_of(capsys):
    job = SimpleNamespace(run=SimpleNamespace(say=print), args=SimpleNamespace(weights="x.pt"),
                          dataset=SimpleNamespace(name="", class_names=["a"] * 10))
    for accuracy, warned in ((34.0, True), (36.0, False), (None, False)):
        data.report_zero_shot(job, accuracy)
        assert ("--no-quick-gelu" in capsys.readouterr().err) == warned


def test_report(drawn, tmp_path):
    names = ["<b>&", *"bcdefghij"]
    test = data.Images([f'"{i}>.png' for i in range(50)], drawn["test"][1], None, drawn["test"][0])
    lines = [{"dataset": "a <folder>"},
             {"epoch": 1, "accuracy": 40.0, "kept": 0.2, "auroc": 0.5, "precision": None},
             {"epoch": 2, "accuracy": 60.0, "kept": 0.6, "auroc": 0.5, "precision": 0.5},
             {"accuracy": 60.0, "zero_shot": 20.0}]
    run_ = SimpleNamespace(lines=lines, out=tmp_path)
    p = F.one_hot(test.y_true, 10) * (0.9 - torch.rand(50, 1)) + 0.01 * torch.rand(50, 10)
    y = p.argmax(dim=1)                                                         # (50,)
    data.write_report(run_, test, names, p, all_classes(p))
    page = (tmp_path / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<b>&" not in page  # one file, escaped
    assert page.count("<figure") == page.count("data:image/png;base64") == 50
    assert page.count("<polyline") == 3 and "kept 60.0" in page
    assert "zero-shot accuracy 20.0 %" in page and "after the run 60.0 %" in page
    assert 'points="0,160 325,120 650,80"' in page      # 20, 40 and 60 percent
    assert 'points="650,100"' in page                   # nothing was clean in the first epoch
    counts = [[int(n or 0) for n in re.findall(r"<td[^>]*>(\d*)", row)]
              for row in re.findall(r"<tr><th>[^<].*", page)]
    assert page.count("<table>") == page.count("</table>") == 1
    assert counts == [[int(((test.y_true == a) & (y == b)).sum()) for b in range(10)]
                      for a in range(10)]
    least = int((p.topk(2).values @ torch.tensor([1.0, -1.0])).argmin())
    assert page.index(f'title="&quot;{least}&gt;.png"') == page.index('title="')
    test.y_true, run_.lines = None, [lines[0], {"accuracy": None, "zero_shot": None}]
    data.write_report(run_, test, names, p, all_classes(p))  # no labels, no epochs
    page = (tmp_path / "report.html").read_text()
    assert not re.search("<table|<svg|None", page) and page.count("<figure") == 50


def test_student(little, tmp_path, capsys):                         # section 4.5
    for name, shape in (("small", VIT), ("resnet", RESNET), ("resnet32", RESNET | dict(
            image_resolution=32))):
        torch.save(golden_weights(shape), tmp_path / f"{name}.pt")
    for name, script in ("small", coft_plus), ("resnet32", coft):
        out = tmp_path / script.__name__ / name
        flags = ["--export", tmp_path / "plain.pt"] if script is coft else []
        lines, rows, saved = run(out, "--student", tmp_path / f"{name}.pt", "--max-steps", 3,
                                 *flags, script=script)
        assert {line.get("phase"): line.get("kept") for line in lines}[3] == 1      # no filter (A7)
        model, start = script.load(out / "model.pt"), clip.load(
            tmp_path / f"{name}.pt")[0].visual.state_dict()
        learnt = model.models[0].visual.state_dict()
        assert learnt.keys() == start.keys() and not equal(learnt, start)
        assert model.models[0].judge.prompts.shape[-1] == 128       # of the teacher's width
        _, again, _ = run(tmp_path / "again" / out.parent.name / name, "--load", out / "model.pt",
                          script=script)
        assert rows == again
        if script is coft:
            assert equal(clip.load(tmp_path / "plain.pt")[0].visual.state_dict(), learnt)
    lines, *_ = run(tmp_path / "in 2", "--student", tmp_path / "small.pt", "--max-steps", 1,
                    "--recipe", "ours-third")
    assert {line.get("phase") for line in lines} == {None, 1, 2}
    stops(capsys, "takes images of 64 pixels, not 32", tmp_path / "x", "--student",
          tmp_path / "resnet.pt")
    (tmp_path / "resnet32.pt").rename(moved := tmp_path / "moved.pt")
    model = coft.load(tmp_path / "coft" / "resnet32" / "model.pt", student=moved)
    assert model.class_names == saved["class_names"]


@pytest.mark.parametrize("script, flags", [(coft, ()), (coft_plus, ("--gamma", 0.1))])
def test_shots(drawn, little, tmp_path, monkeypatch, script, flags):            # section 4.4
    seen, step, flags = [], script.train_step, ["--shots", 2, "--max-steps", 2, *flags]
    y_true, few_shot = torch.as_tensor(drawn["train"][1]), data.few_shot
    monkeypatch.setattr(data, "few_shot", lambda *a: few_shot(*a)[:4])  # or the 20 are a fifth
    known = data.few_shot(y_true, 2, 0)
    monkeypatch.setattr(script, "train_step", lambda job, phase, batches, y, clean: seen.append(
        (y.clone(), clean.clone(), phase.number, batches[0][-1])) or step(
            job, phase, batches, y, clean))
    run(tmp_path / "run", *flags, script=script)
    for y, clean, *_ in seen:                           # in both phases, for both students
        assert (y[:, known] == y_true[known]).all() and clean[:, known].all()
    share = [torch.isin(torch.cat([i for *_, n, i in seen if n == number]), known).float().mean()
             for number in (1, 2)]
    assert 0.4 < share[0] < 0.65 and 0.15 < share[1] < 0.35         # half; 7 times 4 beside 96
    assert any((y != y_true).any() for y, *_ in seen)
    shuffled = y_true.clone()                           # the labels of no other image are read
    others = ~torch.isin(torch.arange(100), known)
    shuffled[others] = y_true[others].roll(1)
    monkeypatch.setattr(data, "few_shot", lambda *_: known)
    monkeypatch.setattr(shapes, "pictures", lambda name, part: (
        (drawn["train"][0], shuffled) if part == "train" else drawn[part]))
    run(tmp_path / "other", *flags, script=script)
    same_result(tmp_path / "run", tmp_path / "other")


def test_copies_are_the_same():
    """What coft.py has, coft_plus.py has word for word, but for what its parts change."""
    changed = {"Prompts", "FullModel", "start_phase", "train_step", "train_phase", "predict",
               "Adapted", "load", "adapt", "parse", "crops_tell"}       # the last: not in it
    for name, one in vars(coft).items():
        if getattr(one, "__module__", "") == "coft" and name not in changed:
            assert inspect.getsource(one) == inspect.getsource(getattr(coft_plus, name)), name
    assert inspect.getsource(coft.main) == inspect.getsource(pa.main)


def child(script, argv, screen, env, spy, at, do):
    """In a process of its own: runs a script on little data, the screen a file. spy: a file for the
    gradients of the first step; at, do: what happens at step `at`."""
    for fd in (1, 2):
        os.dup2(os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout, sys.stderr = [open(fd, "w", buffering=1, closefd=False) for fd in (1, 2)]
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)        # `pytest &` ignores it
    torch.set_num_threads(1)
    draw, steps = shapes.pictures, []
    shapes.pictures = lambda name, part: draw(name, part, {"train": 100, "test": 50}[part])
    def spied(optimizer, *_):
        steps.append(optimizer)
        if spy and len(steps) == 1:
            torch.save([v.grad.clone() for group in optimizer.param_groups
                        for v in group["params"] if v.grad is not None], spy)
        if len(steps) == at:
            os.kill(os.getpid(), do)
    register_optimizer_step_pre_hook(spied)
    os._exit(sys.modules[script].main([*SCRIPTS[script], *argv]))


FORKS = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
FORKS.set_forkserver_preload(list(SCRIPTS))


def processes(n, script, out, *argv, spy=None, at=None, do=None):
    """Exit statuses of n processes and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    screens = [out.parent / f"{out.name}.{k}.txt" for k in range(n)]
    all_ = [FORKS.Process(target=child, daemon=True, args=(
        script.__name__, ["--out", str(out), *map(str, argv)], screens[k], {} if n == 1 else {
            "RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        spy and f"{spy}.{k}", at, do)) for k in range(n)]
    for p in all_:
        p.start()
    for p in all_:
        p.join(300)
        hangs = p.exitcode is None
        p.kill()
        assert not hangs, [s.read_text() for s in screens if s.exists()]
    return [p.exitcode for p in all_], [s.read_text() for s in screens]


@pytest.mark.parametrize("script, flags", [
    (coft, ["--epochs2", 0]), (coft, ["--epochs1", 0]), (coft_plus, ["--epochs1", 0]),
    (coft, ["--recipe", "paper"]), (coft_plus, ["--recipe", "paper", "--epochs1", 1]),
    (pa, ["--objective", "pico"]), (pa, ["--objective", "crdpll", "--passes", 1])])
def test_two_processes_are_one(tmp_path, script, flags):
    for n in (1, 2):
        status, screen = processes(n, script, tmp_path / f"{n}", *flags, "--max-steps", 2,
                                   spy=tmp_path / f"gradients{n}")
        assert status == [0] * n, screen
    assert "Traceback" not in screen[1] and "accuracy" not in screen[1]     # the first one speaks
    one, a, b = (torch.load(tmp_path / f"gradients{k}", weights_only=True)
                 for k in ("1.0", "2.0", "2.1"))
    assert any(g.abs().max() > 1e-3 for g in one)
    torch.testing.assert_close(a, one, atol=1e-5, rtol=1e-5)
    assert equal(a, b)                                              # the processes stay the same
    one, two = (epochs_of(tmp_path / f"{n}") for n in (1, 2))
    assert [e.get("loss") for e in two] == pytest.approx([e.get("loss") for e in one], abs=0.02)
    assert abs(one[-1]["accuracy"] - two[-1]["accuracy"]) <= 4      # two images of fifty


@pytest.mark.parametrize("script, flags, kills", [      # in the first epoch; in the last phase
    (coft, [], (2, 8)), (coft_plus, ["--recipe", "paper"], [8]),
    (coft_plus, ["--epochs2", "4"], (8, 17)),           # before and after A9's Gaussians
    (coft_plus, ["--student", "tiny"], [13]), (pa, ["--objective", "rc"], (2, 8)),
    (pa, ["--objective", "pico", "--teacher", "evidence"], [14])])      # 6 are a trial's
def test_kill_and_resume(little, tmp_path, script, flags, kills, capsys):
    """A killed run goes on to the same weights, tables and log, bit for bit."""
    run(whole := tmp_path / "whole", *flags, script=script)
    steps = 3                                           # of an epoch
    for step in kills:
        cut = tmp_path / f"cut{step}"
        status, screen = processes(1, script, cut, *flags, at=step, do=signal.SIGKILL)
        assert status == [-signal.SIGKILL], screen
        assert (cut / "last.pt").exists() == (step > steps)
        stops(capsys, "already holds a run", cut, *flags, script=script)
        again = [*flags, "--resume"]
        if step > steps:
            stops(capsys, "was begun with --seed 0", cut, *again, "--seed", 1, script=script)
        run(cut, *again, script=script)
        assert epochs_of(whole) == epochs_of(cut)
        for name in ("last.pt", "model.pt"):
            a, b = (torch.load(out / name, weights_only=True) for out in (whole, cut))
            assert equal({**a, "run": None}, {**b, "run": None}), name          # but for the clock
        for file in whole.glob("*.csv"):
            assert file.read_text() == (cut / file.name).read_text()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopped(tmp_path, stop):
    status, screen = processes(1, coft, tmp_path / "run", at=5, do=stop)
    assert status == [130]
    said = screen[0].splitlines()[-1]
    assert said == f"stopped; --resume --out {tmp_path / 'run'} goes on after the last epoch"
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1
    assert not (tmp_path / "run" / "model.pt").exists()


def test_processes_that_fail(tmp_path):
    status, screen = processes(2, coft, tmp_path / "b", "--batch-size", 31)
    assert status == [2, 2] and "--batch-size 31 cannot be divided by 2 processes" in screen[0]
    written(tmp_path / "c" / "args.json", "{}")         # what the first process alone finds
    for flags, says in ((["--data", "nowhere"], "no such folder"), ([], "already holds a run")):
        status, screen = processes(2, coft, tmp_path / "c", *flags)
        assert status == [2, 2] and all(says in text for text in screen)


def test_mixed_precision(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "pictures", lambda _, part: [v[:24] for v in drawn[part]])  # slow
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**18))
    found, few = {}, ["--batch-size", 4, "--epochs1", 1, "--epochs2", 0, "--max-steps", 6]
    run(tmp_path / "paper", "--recipe", "paper", "--amp", "bf16", "--max-steps", 1)
    for amp in ("off", "bf16", "fp16"):                 # fp16: its first steps overflow
        run(tmp_path / amp, "--amp", amp, *few)
        found[amp] = epochs_of(tmp_path / amp)[1]
    assert len({(epoch["loss"], epoch["nll"]) for epoch in found.values()}) == 3
    assert found["bf16"]["loss"] == pytest.approx(found["off"]["loss"], rel=0.02)
    assert found["fp16"]["loss"] == pytest.approx(found["off"]["loss"], rel=0.1)
    skipped = {amp: line["skipped"] for amp, line in found.items()}
    assert skipped["off"] == skipped["bf16"] == 0 < skipped["fp16"] < 6, skipped
    state = torch.load(tmp_path / "fp16" / "last.pt", weights_only=True)
    assert state["scaler"]["scale"] == 2.0**(18 - skipped["fp16"])
    assert int(state["optimizer"]["state"][0]["step"]) == 6 - skipped["fp16"]
    cpu, gpu = (torch.optim.AdamW([torch.ones(2)], fused=fused) for fused in (False, True))
    begun = SimpleNamespace(state={"optimizer": cpu.state_dict(), "rng": state["rng"]})
    data.Run.restore(begun, {"optimizer": gpu})
    assert gpu.param_groups[0]["fused"]                 # not as it was where the run began


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU, there also as CUDA graphs"))])
def test_compile(little, tmp_path, monkeypatch, device):
    real, used, losses = torch.compile, [], []
    monkeypatch.setattr(torch, "compile", lambda module: used.append(type(module).__name__) or real(
        module, backend="aot_eager"))
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        flags += ["--batch-size", 4, "--max-steps", 3, "--device", device, "--amp", "off"]
        (_, *epochs, _), *_ = run(tmp_path / name, *flags)
        losses.append([line["loss"] for line in epochs])
    assert used == 2 * ["Student"] + 2 * ["FullModel"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_runs_that_end(little, tmp_path, capsys, monkeypatch):
    stops(capsys, "the loss became nan in phase 2 epoch 1/1: begin anew with a lower --lr2",
          tmp_path / "run", "--max-steps", 3, "--lr2", 1e18)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["phase"] == 1
    monkeypatch.setattr(coft, "crops_tell", lambda *_: torch.empty(2**60))
    stops(capsys, "out of memory: begin anew with --batch-size < 32", tmp_path / "large")


def test_full_disk(little, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, before[1]))     # phase 2's is larger
    try:
        stops(capsys, "last.pt", tmp_path / "run", "--max-steps", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["phase"] == 1
    run(tmp_path / "run", "--max-steps", 1, "--resume")
    (tmp_path / "run" / "last.pt").write_bytes(b"cut")
    stops(capsys, "last.pt is not a checkpoint", tmp_path / "run", "--max-steps", 1, "--resume")


def test_odd_data(little, drawn, tmp_path, monkeypatch, capsys):
    for n in (60, 1):
        few = {"train": [v[:n] for v in drawn["train"]]}
        save_pictures(tmp_path / f"{n}", few, "{i:03d}.png")
    (tmp_path / "1000.txt").write_text("\n".join(f"thing {k}" for k in range(1000)))
    (tmp_path / "sets.csv").write_text("000.png,circle\n")
    for k, flags in enumerate((
            ["--classes", tmp_path / "1000.txt", "--epochs2", 0, "--batch-size", 4],
            ["--classes", "circle,"], ["--classes", ",".join([*shapes.SHAPES, "zebra"])],
            ["--data", tmp_path / "1", "--classes", "circle,star"])):
        run(tmp_path / f"out{k}", *FOLDER, "--data", tmp_path / "60", "--max-steps", 1, *flags)
    for objective, what, classes in (("lws", "60", "circle,"), ("pico", "1", "circle,star")):
        flags = [*FOLDER, "--data", tmp_path / what, "--classes", classes, "--candidates",
                 tmp_path / "sets.csv", "--objective", objective]
        run(tmp_path / objective, *flags, script=pa)
    written(tmp_path / "sets.csv", "000.png,star")
    stops(capsys, "begun with other", tmp_path / "pico", *flags, "--resume", script=pa)
    select = coft.select_clean
    monkeypatch.setattr(coft, "select_clean", lambda *a: (select(*a)[0], 0.0 * select(*a)[1]))
    lines, *_ = run(tmp_path / "none", "--max-steps", 1)            # nothing is called clean
    assert [line["kept"] for line in lines if line.get("phase") == 2] == [0]


def test_how_many_workers(drawn, tmp_path, monkeypatch):
    save_pictures(tmp_path / "data", drawn)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for free, workers in ((2**26, 0), (2**33, 4 * (sys.platform == "linux"))):  # Docker's /dev/shm
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        job = data.setup(coft.parse(["--data", str(tmp_path / "data"), "--arch", "tiny", "--out",
                                     str(tmp_path / str(free))]), coft.SETTINGS["ours"])
        assert job.train.num_workers == workers         # more of them would find no room in it
