"""Tests of everything, on a CPU and without a network: python -m pytest -q test_smoke.py

clip/ against golden numbers and files made here, data.py against miniatures of the data sets in
their real file names and formats, coft.py's equations against naive loops, and whole runs on small
pieces of the demo.
"""
import base64
import copy
import csv
import hashlib
import http.server
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import struct
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import warnings
import zipfile
import zlib
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.models import ResNet50_Weights

import clip
import coft
import coft_plus
import data
import prompt_align as pa
from clip import clip as clip_files
from clip import shapes
from clip.model import CLIP, QuickGELU

torch.set_num_threads(1)                # as the processes that tests start: the same last bits

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


@torch.no_grad()
def logits_of(model):
    return model(golden_images(2, model.visual.input_resolution), clip.tokenize(TEXTS))[0]  # (2, 3)


@pytest.fixture(scope="module")
def vit():
    return clip.build_model(golden_weights(VIT))


@pytest.fixture(scope="module")
def resnet():
    return clip.build_model(golden_weights(RESNET))


GOLDEN_IDS = {                                          # of openai/CLIP's tokenizer
    ' \n\t ': [],
    'A Photo of the Hard-to-See GOLDEN RETRIEVER, a type of pet.':
        [320, 1125, 539, 518, 1626, 268, 531, 268, 862, 3878, 28394, 267, 320, 3877, 539, 3703,
         269],
    "don't we've I'LL 'S": [847, 713, 649, 1200, 328, 1342, 568],
    '&lt;b&gt; &amp;amp; caf&eacute;': [283, 321, 285, 261, 15304],
    'l\u2019\xe9t\xe9 \xc3\xa9t\xc3\xa9 na\xefve':
        [331, 262, 3459, 39694, 3459, 39694, 1097, 35689, 563],
    '\uff11\uff12\uff13 3.14 co2 \xbd \u21165':
        [272, 273, 274, 274, 269, 272, 275, 1320, 273, 33613, 8604, 500, 276],
    '\u65e5\u672c\u8a9e\u306e\u5199\u771f \u0444\u043e\u0442\u043e '
    '\u043a\u043e\u0442\u0430 \u0635\u0648\u0631\u0629':
        [39121, 44353, 34002, 252, 21575, 44653, 33440, 509, 38981, 27152, 28599, 27080, 27271,
         48242, 20915],
    '\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f':
        [26304, 26304, 964, 356, 21531, 1752],
    '<|startoftext|>x<|endoftext|>': [49406, 343, 49407],
    'e\u0301\xa0\u2028\u3000end\x00': [4166, 806],
    '_under-score__//\\#tag@me': [318, 1798, 268, 4431, 2355, 15348, 59, 258, 3640, 287, 614],
    "\u0130\u017f'\u017f stra\xdfe": [328, 16384, 129, 379, 6, 129, 379, 1894, 127, 253, 324],
}


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


def test_golden_logits(vit, resnet):                    # of openai/CLIP's code, same weights
    for model, golden in ((vit, [[0.6198, 0.17635, 2.73822], [0.97289, 1.47885, 3.32049]]),
                          (resnet, [[-1.14037, 3.91696, -2.80063], [-1.14539, 3.90924, -2.78879]])):
        assert torch.allclose(logits_of(model), torch.tensor(golden), rtol=1e-4, atol=1e-4)
    assert QuickGELU()(torch.tensor(2.0)).item() == pytest.approx(2 / (1 + math.exp(-3.404)))
    plain = clip.build_model(golden_weights(VIT), quick_gelu=False)
    assert not torch.allclose(logits_of(plain), logits_of(vit), atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = logits_of(vit).float()
    assert torch.allclose(low, logits_of(vit), atol=0.5)


def test_architecture_is_inferred(vit, resnet):
    assert clip.available_models()[-1] == "tiny" and len(clip.available_models()) == 10
    assert vit.visual.input_resolution == 32 and vit.visual.transformer.heads == 2
    assert vit.visual.adapter_widths == [128, 128]
    assert resnet.visual.adapter_widths == [64, 128, 256, 512]
    assert vit.context_length == 77 and vit.vocab_size == 49408 and vit.dtype == torch.float32
    assert not vit.training and all(p.requires_grad for p in vit.parameters())
    weights = golden_weights(VIT)
    one = clip.build_model(weights)
    two = clip.build_model(weights, vision_heads=4, transformer_heads=2)
    assert two.visual.transformer.heads == 4 and two.transformer.resblocks[0].attn.heads == 2
    one.logit_scale.data.zero_()                        # two models share nothing
    assert two.logit_scale != 0 and weights["logit_scale"] != 0
    with pytest.raises(clip.CLIPError, match="visual.conv1.weight"):
        clip.build_model({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(clip.CLIPError, match="heads"):
        clip.build_model(weights, vision_heads=3)
    del weights["ln_final.bias"]
    with pytest.raises(clip.CLIPError, match="ln_final.bias"):
        clip.build_model(weights)


def test_text_is_cut_after_the_last_end_of_text(vit):
    tokens = clip.tokenize(TEXTS)
    with torch.no_grad():
        short = vit.encode_text(tokens)
        x = vit.token_embedding(tokens) + vit.positional_embedding              # (3, 77, W)
        x = vit.ln_final(vit.transformer(x, causal=True))
        full = x[torch.arange(3), tokens.argmax(-1)] @ vit.text_projection      # (3, D)
        assert torch.allclose(short, full, rtol=1e-5, atol=1e-5)
        emb = vit.token_embedding(tokens)
        assert torch.equal(vit.encode_text_embeddings(emb, tokens.argmax(-1)), short)
        tokens[0, 10:] = 7                              # what comes after the end plays no part
        assert torch.allclose(vit.encode_text(tokens)[0], short[0], rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="context length"):
            vit.encode_text(torch.zeros(1, 78, dtype=torch.long))


def test_shared_words_are_computed_once_and_exact(vit):
    tokens = clip.tokenize([f"a photo of a {'big ' * (i % 3)}cat" for i in range(7)])[:, :10]
    eot, seen, results = tokens.argmax(-1), [], []
    handle = vit.transformer.resblocks[0].register_forward_hook(
        lambda *a: seen.append(a[2].shape[0] * a[2].shape[1]))
    for chunk, shared in ((None, 0), (None, 5), (None, 1), (3, 5)):
        V = vit.token_embedding(tokens[:1, 1:5]).detach().requires_grad_()      # (1, 4, W)
        emb = vit.token_embedding(tokens).detach()                              # (7, 10, W)
        emb = torch.cat([emb[:, :1], V.expand(7, -1, -1), emb[:, 5:]], dim=1)
        features = vit.encode_text_embeddings(emb, eot, chunk, shared)          # (7, D)
        results.append((features, *torch.autograd.grad(features.square().sum(), [V])))
    handle.remove()
    T = int(eot.max()) + 1
    assert seen[:4] == [7 * T, 5 + 7 * (T - 5), 1 + 7 * (T - 1), 5 + 3 * (T - 5)]
    for f, g in results[1:]:
        assert torch.allclose(f, results[0][0], rtol=1e-4, atol=1e-5)
        assert torch.allclose(g, results[0][1], rtol=1e-4, atol=1e-5 * float(g.abs().max()) + 1e-5)


def test_chunks_are_checkpointed_and_exact(vit):
    tokens = clip.tokenize([f"number {i} of many" + " and more" * (i % 3) for i in range(7)])
    eot, calls, results = tokens.argmax(-1), [], []
    handle = vit.transformer.resblocks[0].register_forward_hook(lambda *_: calls.append(1))
    for chunk in (None, 3):
        emb = vit.token_embedding(tokens).detach().requires_grad_()             # (7, 77, W)
        calls.clear()
        features = vit.encode_text_embeddings(emb, eot, chunk)
        grads = torch.autograd.grad(features.square().sum(), [emb, vit.text_projection])
        results.append((features, *grads, len(calls)))
    handle.remove()
    for whole, parts in zip(results[0][:3], results[1][:3]):
        assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-5)
    assert results[0][3] == 1 and results[1][3] == 6    # three chunks, forward, again in backward
    with torch.no_grad():
        assert torch.allclose(vit.encode_text(tokens, chunk=2), results[0][0], rtol=1e-4, atol=1e-5)


def test_hook_with_nothing_in_it_is_clip(vit, resnet):
    for model, layers in ((vit, 2), (resnet, 4)):
        x = golden_images(2, model.visual.input_resolution)
        plain = model.encode_image(x)
        zero = [lambda kind, h: torch.cat([0 * h] * (3 if kind == "qkv" else 1), dim=-1)]
        assert torch.equal(model.encode_image(x, adapters=[lambda kind, h: None] * layers), plain)
        assert torch.allclose(model.encode_image(x, adapters=zero * layers), plain, atol=1e-6)
        with pytest.raises(ValueError, match=f"{layers} adapters"):
            model.encode_image(x, adapters=zero)
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\)"):
        vit.encode_image(golden_images(1, 40))


def test_prompts(vit, resnet):
    x, prompts, visual = golden_images(2, 32), torch.randn(2, 5, 128).requires_grad_(), vit.visual
    deep = vit.encode_image(x, prompts=prompts)         # (2, 32)
    grad, = torch.autograd.grad(deep.sum(), prompts)
    assert (grad.abs().sum((1, 2)) > 0).all()
    t = visual.conv1(x).flatten(2).transpose(1, 2)      # written out: (2, 16, W)
    t = torch.cat([visual.class_embedding.expand(2, 1, -1), t], 1) + visual.positional_embedding
    t = visual.ln_pre(t)
    t = torch.cat([t[:, :1], prompts[0].expand(2, -1, -1), t[:, 1:]], 1)        # (2, 22, W)
    first = visual.transformer.resblocks[0](t)
    # deep: the second block sees the second row in place of the first; shallow: its result
    second = torch.cat([first[:, :1], prompts[1].expand(2, -1, -1), first[:, 6:]], 1)
    for seen, result in ((second, deep), (first, vit.encode_image(x, prompts=prompts[:1]))):
        out = visual.ln_post(visual.transformer.resblocks[1](seen)[:, 0]) @ visual.proj
        assert torch.allclose(result, out, atol=1e-4)
    with pytest.raises(ValueError, match="prompts must be"):
        vit.encode_image(x, prompts=torch.zeros(3, 5, 128))
    with pytest.raises(ValueError, match="no prompt tokens"):
        resnet.encode_image(golden_images(1, 64), prompts=prompts)


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
    shapes = []                                         # ResNet: each stage's output, channels last
    result = resnet.encode_image(golden_images(1, 64), adapters=[
        lambda kind, h: (shapes.append((kind, tuple(h.shape))), -h)[1]] * 4)
    assert shapes == [("stage", (1, 64 // s, 64 // s, c))
                      for s, c in ((4, 64), (8, 128), (16, 256), (32, 512))]
    assert torch.allclose(result, resnet.visual.attnpool(torch.zeros(1, 512, 2, 2)))


# ======== clip/: checkpoints ========


def hugging_face(weights):
    """Hugging Face's names for a ViT CLIP's state dict."""
    out = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    renamed = {"token_embedding.weight": "text_model.embeddings.token_embedding.weight",
               "positional_embedding": "text_model.embeddings.position_embedding.weight",
               "visual.class_embedding": "vision_model.embeddings.class_embedding",
               "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
               "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
               "visual.proj": "visual_projection.weight",
               "text_projection": "text_projection.weight"}
    for key, value in weights.items():
        tower, block, rest = key.partition("transformer.resblocks.")
        if block:
            index, _, rest = rest.partition(".")
            for ours, theirs in (("ln_", "layer_norm"), ("attn.", "self_attn."), ("c_fc", "fc1"),
                                 ("c_proj", "fc2")):
                rest = rest.replace(ours, theirs)
            prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{index}."
            for c, part in zip("qkv", value.chunk(3) if "in_proj_" in rest else [value]):
                out[prefix + rest.replace("in_proj_", f"{c}_proj.")] = part
        else:
            new = renamed.get(key) or (key.replace("visual.ln_pre", "vision_model.pre_layrnorm")
                                       .replace("visual.ln_post", "vision_model.post_layernorm")
                                       .replace("ln_final", "text_model.final_layer_norm"))
            out[new] = value.t() if new.endswith("projection.weight") else value
    return out


def save_safetensors(weights, path):
    names = {torch.float32: "F32", torch.int64: "I64"}
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for key, value in weights.items():
        raw = bytes(value.contiguous().flatten().view(torch.uint8).tolist())
        header[key] = {"dtype": names[value.dtype], "shape": list(value.shape),
                       "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + blob)


@pytest.fixture(scope="module")
def small():
    """A state dict with few tokens, so that files of it are small."""
    weights = golden_weights(VIT | {"vocab_size": 600})
    return weights | {"token_embedding.weight": weights["token_embedding.weight"][:600]}


@torch.no_grad()
def small_logits(model):
    tokens = torch.tensor([[598, 5, 9, 599, 0], [598, 44, 599, 0, 0]])
    return model(golden_images(2, 32), tokens)[0]       # (2, 2)


@pytest.mark.parametrize("layout", ["plain", "half", "state_dict", "module.", "text.",
                                    "hugging_face", "safetensors"])
def test_checkpoint_formats(layout, small, tmp_path):
    path = tmp_path / "weights.bin"
    if layout == "safetensors":
        save_safetensors(hugging_face(small), path)
    else:
        torch.save({
            "plain": small, "half": {k: v.half() for k, v in small.items()},
            "state_dict": {"state_dict": small, "epoch": 3, "quick_gelu": False},
            "module.": {"model": {"module." + k: v for k, v in small.items()}},
            "text.": {k if k.startswith(("visual", "logit")) else "text." + k: v
                      for k, v in small.items()} | {"text.attn_mask": torch.zeros(77, 77)},
            "hugging_face": hugging_face(small)}[layout], path)
    expected = small_logits(clip.build_model(small, quick_gelu=layout != "state_dict"))
    model, preprocess = clip.load(path)
    assert torch.allclose(small_logits(model), expected, atol=0.3 if layout == "half" else 1e-6)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert preprocess(Image.new("L", (37, 53))).shape == (3, 32, 32)
    if layout == "state_dict":                          # the argument beats the file
        model, _ = clip.load(path, quick_gelu=True)
        assert torch.allclose(small_logits(model), small_logits(clip.build_model(small)))


def test_resnet_safetensors(tmp_path):
    weights = golden_weights(RESNET | {"vocab_size": 50})
    save_safetensors(weights, tmp_path / "open_clip_model.safetensors")
    model, _ = clip.load(tmp_path / "open_clip_model.safetensors")
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_state_dict_as_torch_saves_it(small, tmp_path):
    model = clip.build_model(dict(small))
    assert hasattr(model.state_dict(), "_metadata")     # which the pickle then has too
    for content in (model.state_dict(), {"epoch": 3, "state_dict": model.state_dict()}):
        torch.save(content, tmp_path / "weights.pt")
        loaded, _ = clip.load(tmp_path / "weights.pt")
        assert torch.equal(small_logits(loaded), small_logits(model))


def test_only_some_token_rows(tmp_path, small):         # the format of tiny.pt
    ids = torch.tensor([5, 9, 44, 49406, 49407])
    rows = small["token_embedding.weight"][[5, 9, 44, 598, 599]].half()
    stored = small | {"token_embedding.weight": rows}
    torch.save({"state_dict": {k: v.half() for k, v in stored.items()}, "token_ids": ids,
                "vocab_size": 49408, "vision_heads": 4, "transformer_heads": 2, "quick_gelu": True},
               tmp_path / "some.pt")
    model, _ = clip.load(tmp_path / "some.pt")
    assert model.vocab_size == 49408 and model.token_embedding.weight[6].abs().sum() == 0
    assert torch.equal(model.token_embedding.weight[ids], rows.float())
    assert model.visual.transformer.heads == 4 and model.transformer.heads == 2


def save_torchscript(model, path):
    """Trace and save as OpenAI's files were: half precision but for the normalisation layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # torch.jit is deprecated, tracing warns
        model.register_buffer("input_resolution", torch.tensor(32))
        images = golden_images(1, model.visual.input_resolution)
        traced = torch.jit.trace(model, (images, torch.tensor([[598, 5, 599]])), check_trace=False)
        for name, parameter in traced.named_parameters():
            if "ln_" not in name and "bn" not in name:
                parameter.data = parameter.data.half()
        torch.jit.save(traced, str(path))
        return torch.jit.load(str(path)).state_dict()


@pytest.mark.parametrize("shape", [VIT, RESNET])
def test_torchscript_archive_is_read_without_torch_jit(shape, tmp_path, monkeypatch):
    model = clip.build_model(golden_weights(shape | {"vocab_size": 600}))
    expected = save_torchscript(model, tmp_path / "archive.pt")
    with zipfile.ZipFile(tmp_path / "archive.pt") as archive:
        weights = clip_files._read_archive(archive, 1 << 30)
    assert weights.keys() == expected.keys() and "input_resolution" in weights
    for key, value in expected.items():
        assert torch.equal(weights[key], value) and weights[key].dtype == value.dtype, key
    monkeypatch.setattr(torch.jit, "load", None)
    loaded, _ = clip.load(tmp_path / "archive.pt")
    assert loaded.logit_scale.dtype == torch.float32
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key


class Module:
    """Pickled in place of a torch module."""


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_nothing_in_a_file_is_executed(tmp_path, small):
    mark, module = tmp_path / "executed", Module()

    def archive(name, pickled, **files):
        with zipfile.ZipFile(tmp_path / name, "w") as out:
            out.writestr("x/data.pkl", pickled)
            out.writestr("x/code/__torch__.py", "raise SystemExit")
            for key, raw in files.items():
                out.writestr(f"x/data/{key}", raw)

    module.a, module.b, module.c = Evil(mark), [Evil(mark)], {1: Evil(mark)}
    archive("evil.pt", pickle.dumps(module, protocol=2))
    archive("root.pt", pickle.dumps(Evil(mark), protocol=2))
    # a tensor of 2**30 elements, stride 0, in a storage of one; a storage that is not there
    tensor = (b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
              b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00(J\x00\x00\x00\x40t(K\x00t"
              b"\x89NtR")
    pickled = b"\x80\x02c__torch__\nA\n)\x81}X\x01\x00\x00\x00w%ssb." % tensor
    archive("big.pt", pickled, **{"0": b"\0\0\0\0"})
    archive("hole.pt", pickled)
    torch.save({"state_dict": small, "evil": Evil(mark)}, tmp_path / "plain.pt")
    for name, reason in (("evil.pt", "asks for test_smoke.Module"), ("root.pt", ".system, which"),
                         ("big.pt", "does not fit its storage"), ("hole.pt", "x/data/0"),
                         ("plain.pt", ".system, which is refused")):
        with pytest.raises(clip.CLIPError, match=reason) as error:
            clip.load(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert not mark.exists()


def text_op(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def call_op(module, name, *args):
    return b"\x80\x04" + text_op(module) + text_op(name) + b"\x93(" + b"".join(args) + b"tR."


def attacks(mark):
    """{what: pickle} that runs code, opens a file, or asks for endless memory or time."""
    load = pickle.dumps(Evil(mark), 2)
    deep = b")q\0h\0\x86" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(1, 60))
    return {
        "system": call_op("os", "system", text_op(f"touch {mark}")),
        "eval": call_op("builtins", "eval", text_op(f"open({str(mark)!r}, 'w')")),
        "from_file": call_op("torch", "from_file", text_op(str(mark)), b"\x88K\x05"),
        "save": call_op("torch", "save", b"K\x01", text_op(str(mark))),
        "bytes": call_op("torch.storage", "_load_from_bytes", b"B", struct.pack("<I", len(load)),
                         load),
        "inst": b"(" + text_op(f"touch {mark}") + b"ios\nsystem\n.",
        "numpy": call_op("numpy", "memmap", text_op(str(mark)), text_op("uint8"), text_op("w+")),
        "hash": b"\x80\x02}(" + deep + b"K\x01u.", "set": b"\x80\x04\x8f(" + deep + b"\x90.",
        "depth": b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.",
        "memo": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        "bytes8": b"\x80\x04\x8e" + b"\xff" * 7 + b"\0."}


def test_hostile_weights(tmp_path, small):
    mark, path, out = tmp_path / "executed", tmp_path / "w.pt", io.BytesIO()
    torch.save(small, out)
    with zipfile.ZipFile(out) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    index = next(name for name in parts if name.endswith("data.pkl"))

    def refused(says="cannot read"):
        with pytest.raises(clip.CLIPError, match=says) as error:
            clip.load(path)
        assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500

    def zipped(method=zipfile.ZIP_STORED, **new):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, raw in (parts | {index: new.get("index", parts[index])}).items():
                archive.writestr(name, raw)

    for raw in attacks(mark).values():
        written(path, raw)                              # neither a zip nor safetensors
        refused("expected safetensors or a zip archive")
        zipped(index=raw)
        refused()
        with tarfile.open(path, "w") as tar:            # torch's first format, CVE-2025-32434
            for name in ("storages", "tensors", "pickle"):
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        refused("expected safetensors")
    zipped(index=parts[index][:-1] + text_op("x") + attacks(mark)["system"][2:-1] + b"s.")
    refused("asks for os.system")                       # beside good weights
    zipped(method=zipfile.ZIP_DEFLATED)
    parts["archive/zeros"] = bytes(2**24)
    zipped(method=zipfile.ZIP_DEFLATED)
    refused("parts are larger than the file")
    torch.save(small, path, _use_new_zipfile_serialization=False)
    refused("wrote before 1.6")
    torch.save(small | {"visual.class_embedding": torch.zeros(1).expand(2**40)}, path)
    refused("does not fit its storage")
    table = {f"x{i}": {"dtype": "F32", "shape": [2**18], "data_offsets": [0, 2**20]} for i in "ab"}
    head = json.dumps(table).encode()
    written(path, len(head).to_bytes(8, "little") + head + bytes(2**20))
    refused("overlap")
    whole, rng = out.getvalue(), random.Random(0)
    for raw in mutants(whole, 60):
        raw = bytearray(raw)
        if len(raw) > 99:                               # the directory of the zip is at its end
            raw[-rng.randrange(1, 99)] ^= 1 << rng.randrange(8)
        try:
            clip.load(written(path, bytes(raw)))
        except clip.CLIPError as error:
            assert len(str(error).splitlines()) == 1
    for shape in ((0, 3, 8, 8), (2,), ()):
        torch.save(small | {"visual.conv1.weight": torch.zeros(shape)}, path)
        refused(path.name)
    torch.save(small | {"visual.positional_embedding": torch.zeros(0, 64)}, path)
    refused(path.name)
    assert not mark.exists()


def test_bad_files_give_one_line(tmp_path, small):
    save_safetensors(small, tmp_path / "cut.safetensors")
    torch.save(small, tmp_path / "cut.pt")
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    (tmp_path / "empty.pt").write_text("")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pt")
    for name in ("cut.safetensors", "cut.pt", "page.pt", "empty.pt", "list.pt", "other.pt",
                 "absent.pt", "."):
        with pytest.raises(clip.CLIPError) as error:
            clip.load(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value), error.value
    with pytest.raises(clip.CLIPError, match="jit"):
        clip.load("tiny", jit=True)


# ======== clip/: downloads, from a server on this machine ========


class Server(http.server.BaseHTTPRequestHandler):
    """/good, /cut (breaks off twice), /norange, /wrong, /missing, /hub (redirects, has a hash)."""
    payload, requests = b"", []

    def do_GET(self):
        kind, body = self.path.split("/")[1], self.payload
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.requests.append((kind, start))
        if kind == "missing":
            return self.send_error(404)
        if kind in ("loop", "ipv6"):
            self.send_response(302)
            self.send_header("Location", "http://[::1" if kind == "ipv6" else self.path)
            return self.end_headers()
        if kind in ("drip", "drophead", "stall", "html", "long", "short", "odd"):
            return self.misbehave(kind, body)
        if kind == "hub":
            self.send_response(302)
            self.send_header("Location", "/good/file.pt")
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(body).hexdigest()}"')
            return self.end_headers()
        if start >= len(body):
            return self.send_error(416)
        body, start = body[::-1] if kind == "wrong" else body, 0 if kind == "norange" else start
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:start + len(body) // 3 if kind == "cut" else len(body)])

    def misbehave(self, kind, body):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if start >= len(body):
            return self.send_error(416)
        if kind == "drophead":                          # a byte of the head at a time
            self.wfile.write(b"HTTP/1.1 200 OK")
            while time.sleep(0.05) is None:
                self.wfile.write(b" ")
        body = b"<html>Log in first</html>" if kind == "html" else body
        says = {"long": len(body) + 9999, "short": len(body) - 9999, "odd": "many"}
        self.send_response(200)
        self.send_header("Content-Length", str(says.get(kind, len(body))))
        self.end_headers()
        if kind in ("drip", "stall"):
            while time.sleep(0.05 if kind == "drip" else 3) is None:
                self.wfile.write(b"x")
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path, small):
    torch.save(small, tmp_path / "served")
    Server.payload, Server.requests = (tmp_path / "served").read_bytes(), []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    httpd.handle_error = lambda *_: None                # a client that hangs up
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(clip_files, "_TIMEOUT", 5)
    host = f"http://127.0.0.1:{httpd.server_port}"
    sha256 = hashlib.sha256(Server.payload).hexdigest()

    def fetch(*kinds):
        """Load RN50 from these kinds of hosts in turn; the requests that it took."""
        hashed = [kind not in ("hub", "nohash") for kind in kinds]
        monkeypatch.setitem(clip_files._SOURCES, "RN50", [
            (f"{host}/{kind}/file{'.pt' if h else '.bin'}", sha256 if h else None)
            for kind, h in zip(kinds, hashed)])
        Server.requests.clear()
        clip.load("RN50", download_root=tmp_path / "cache")
        return list(Server.requests)

    yield fetch
    httpd.shutdown()
    httpd.server_close()


def test_download_and_cache(server, capsys, tmp_path):
    assert [kind for kind, _ in server("missing", "wrong", "good")] == ["missing", "wrong", "good"]
    told, file = capsys.readouterr().err, tmp_path / "cache" / "RN50.pt"
    assert all(words in told for words in ("HTTP 404", "wrong SHA-256", "/good/", "verified"))
    assert os.listdir(file.parent) == ["RN50.pt"]
    assert server("missing", "good") == []              # a verified file needs no network
    file.write_bytes(b"mine")                           # a user's file is never replaced
    with pytest.raises(clip.CLIPError, match="SHA-256 differs"):
        server("good")
    assert file.read_bytes() == b"mine"
    file.unlink()
    tried = "wrong SHA-256.*HTTP 404.*no SHA-256.*--weights"
    with pytest.raises(clip.CLIPError, match=tried) as error:
        server("wrong", "missing", "nohash")
    assert "\n" not in str(error.value) and os.listdir(file.parent) == []


def test_download_resumes(server, tmp_path):
    starts, root = [start for _, start in server("cut")], tmp_path / "cache"
    assert starts[0] == 0 and len(starts) >= 3 and starts == sorted(set(starts))
    whole, rubbish = Server.payload, b"rubbish" * 10
    for kind, part, tries in (("good", whole[:1000], 1), ("norange", whole[:1000], 1),
                              ("good", whole, 1), ("good", rubbish, 2)):    # of an earlier run
        (root / "RN50.pt").unlink()
        (root / "RN50.pt.part").write_bytes(part)
        assert server(kind) == [(kind, len(part)), (kind, 0)][:tries]
        assert os.listdir(root) == ["RN50.pt"] and (root / "RN50.pt").read_bytes() == whole


@pytest.mark.parametrize("kind, says", [
    ("drip", "fewer than 1000 bytes"), ("drophead", "no answer in time"), ("stall", "timed out"),
    ("html", "wrong SHA-256"), ("short", "wrong SHA-256"), ("loop", "HTTP 302"),
    ("ipv6", "Invalid IPv6"), ("long", ""), ("odd", "")])
def test_download_from_a_bad_host(server, kind, says, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(clip_files, "_TIMEOUT", 0.4)
    start = time.perf_counter()
    assert [k for k, _ in server(kind, "good")][0] == kind      # the next host is asked
    assert says in capsys.readouterr().err and time.perf_counter() - start < 30
    assert os.listdir(tmp_path / "cache") == ["RN50.pt"]
    if says:
        (tmp_path / "cache" / "RN50.pt").unlink()
        with pytest.raises(clip.CLIPError, match=says) as error:
            server(kind)
        assert len(str(error.value).splitlines()) == 1


def test_download_without_end(server, monkeypatch, tmp_path):
    monkeypatch.setattr(clip_files, "_LARGEST", 9999)
    with pytest.raises(clip.CLIPError, match="cannot be right"):
        server("good")
    with pytest.raises(clip.CLIPError, match="sends without end"):
        server("odd")
    assert (tmp_path / "cache" / "RN50.pt.part").stat().st_size < 9999
    written(tmp_path / "cache" / "RN50.bin.sha256", b"\xff")   # no hash: as if it were not there
    monkeypatch.setattr(clip_files, "_LARGEST", 10**9)
    assert server("hub")


def test_download_with_the_hash_of_the_reply(server, tmp_path):
    assert [kind for kind, _ in server("hub")] == ["hub", "good"]
    assert sorted(os.listdir(tmp_path / "cache")) == ["RN50.bin", "RN50.bin.sha256"]
    assert server("hub") == []


def test_no_network_is_one_line(monkeypatch, tmp_path):
    for name in clip.available_models()[:-1]:
        hosts = [url.split("/")[2] for url, _ in clip_files._SOURCES[name]]
        assert hosts[:3] == ["openaipublic.azureedge.net", "openaipublic.blob.core.windows.net",
                             "huggingface.co"]
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setitem(clip_files._SOURCES, "ViT-B/32", [("http://127.0.0.1:9/x.pt", "0" * 64)])
    line = r"cannot download ViT-B/32 \(tried 127.0.0.1:9: .*--weights"
    with pytest.raises(clip.CLIPError, match=line):
        clip.load("ViT-B/32", download_root=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(clip.CLIPError, match="cannot write"):
        clip.load("ViT-B/32", download_root=tmp_path / "file" / "folder")


# ======== data.py ========


@lru_cache(None)
def encoded(k, size, mode, fmt):
    out, noise = io.BytesIO(), random.Random(k).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, noise).convert(mode).save(out, fmt)
    return out.getvalue()


def written(path, content):
    """path, with bytes or text in it, or a list of lines, or else JSON."""
    if isinstance(content, list) and all(isinstance(line, str) for line in content):
        content = "".join(f"{line}\n" for line in content)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def picture(path, k=0, size=(40, 30), mode="RGB", fmt=None):
    fmt = fmt or ("PNG" if path.suffix == ".png" else "JPEG")
    return written(path, encoded(k % 16, size, mode, fmt))


def draw(root, *parts):
    for k, file in enumerate(file for part in parts for file in part):
        picture(root / file, k)


@pytest.fixture
def ram(tmp_path):
    """A folder in memory, where that can be had: on a disk, thousands of folders take seconds."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)


def class_folders(root, n=4, names=("dog", "cat", "bear")):
    draw(root, [f"{c}/{k:03d}.png" for c in names for k in range(n)])


def refuses(*args, by=data.load):
    """The message of the DataError; one line, but for the tree of what is expected."""
    with pytest.raises(data.DataError) as e:
        by(*args)
    message = str(e.value)
    assert len(message.split(" Expected one of")[0].splitlines()) == 1
    return message


# ======== data.py: every data set ========
# Miniatures of the field's data sets, in the real file names and formats. A builder writes one
# below `tmp` and returns its `Facts`.


class Facts(NamedTuple):
    """train, test: {path relative to home: label}; home: the data set's own folder in `tmp`."""
    home: str
    title: str                  # part of Data.title, letters and digits only
    names: list
    template: str
    train: dict
    test: dict
    says: tuple = ()            # in Data.description; without "hash" there it is not there


def by_hash(files, base=""):
    """{path: label} as (train, test), by a hash of the paths below base."""
    parts = {}, {}
    for file, y in files.items():
        digest = hashlib.sha256(file[len(base):].encode()).hexdigest()
        parts[int(digest, 16) % 5 == 0][file] = y
    assert all(parts)
    return parts


def spaces(names):
    return [c.replace("_", " ") for c in names]


CASES = {}


def case(*args):
    """Registers a builder, once per argument."""
    def register(build):
        CASES.update({f"{build.__name__} {a}": (build, a) for a in args})
        return build
    return register


def miniature(tmp, name):
    build, a = CASES[name]
    return build(tmp, a)


# ---- MATLAB 5 files, as MATLAB 7 writes them: compressed, doubles stored as small integers ----

def element(kind, raw):
    if 0 < len(raw) <= 4:                               # small data element
        return struct.pack("<HH", kind, len(raw)) + raw.ljust(4, b"\0")
    return struct.pack("<II", kind, len(raw)) + raw + bytes(-len(raw) % 8)


def array(name, kind, dims, content, flags=0):
    return element(14, element(6, bytes([kind, flags]) + bytes(6)) + element(
        5, struct.pack(f"<{len(dims)}I", *dims)) + element(1, name.encode()) + content)


def matrix(value, name=""):
    """A list of ints or of str (cell), a str, an int, or a list of dicts (struct array): 1 x n."""
    value = [value] if isinstance(value, int) else value
    n, one = len(value), value if isinstance(value, str) else value[0]
    if value is one:
        kind, body = 4, element(4, value.encode("utf-16-le")) if n % 2 else element(
            16, value.encode())
    elif isinstance(one, (int, float)):
        k = 9 if isinstance(one, float) else 2 if max(value) < 256 else 4
        kind, body = 6, element(k, struct.pack(f"<{n}{data.MAT_NUMBERS[k]}", *value))
    elif isinstance(one, str):
        kind, body = 1, b"".join(map(matrix, value))
    else:
        fields = b"".join(f.encode().ljust(32, b"\0") for f in one)
        kind, body = 2, element(5, struct.pack("<i", 32)) + element(1, fields) + b"".join(
            matrix(v) for row in value for v in row.values())
    return array(name, kind, (1, n), body)


def compressed(raw):
    raw = zlib.compress(raw)
    return struct.pack("<II", 15, len(raw)) + raw       # the one element that is not padded


def mat(*arrays, version=b"\0\1IM"):
    return b"MATLAB 5.0 MAT-file".ljust(124, b"\0") + version + b"".join(arrays)


def write_mat(path, pack=compressed, **variables):
    written(path, mat(*(pack(matrix(value, name)) for name, value in variables.items())))


# ---- Python 2 pickles, opcode for opcode like those of CIFAR ----

def py2(x, memo=None):
    memo = [] if memo is None else memo

    def put(raw, key=None):                             # BINPUT, LONG_BINPUT
        memo.append(key)
        k = len(memo) - 1
        return raw + (b"q" + bytes([k]) if k < 256 else b"r" + struct.pack("<I", k))

    if isinstance(x, int):
        return (b"K" + bytes([x]) if 0 <= x < 256 else b"M" + struct.pack("<H", x)
                if 0 <= x < 65536 else b"J" + struct.pack("<i", x))
    if isinstance(x, bytes):                            # a str of Python 2
        if x in memo[:256]:
            return b"h" + bytes([memo.index(x)])        # BINGET
        size = b"U" + bytes([len(x)]) if len(x) < 256 else b"T" + struct.pack("<i", len(x))
        return put(size + x, x)
    if isinstance(x, list):                             # in portions, as pickle does
        out = put(b"]")
        for k in range(0, len(x), 40):
            out += b"(" + b"".join(py2(v, memo) for v in x[k:k + 40]) + b"e"
        return out
    if isinstance(x, dict):
        return put(b"}") + b"(" + b"".join(py2(v, memo) for kv in x.items() for v in kv) + b"u"
    out = put(b"cnumpy.core.multiarray\n_reconstruct\n") + put(b"cnumpy\nndarray\n")
    out = put(put(put(out + b"K\0\x85") + py2(b"b", memo) + b"\x87") + b"R") + b"(K\x01"
    out = put(out + b"".join(py2(n, memo) for n in x.shape) + b"\x86") + put(b"cnumpy\ndtype\n")
    out = put(put(out + py2(b"u1", memo) + b"K\0K\x01\x87") + b"R") + b"(K\x03"
    out = put(out + py2(b"|", memo) + b"NNN" + py2(-1) * 2 + b"K\0t") + b"b\x89"
    return put(out + py2(x.tobytes(), memo) + b"t") + b"b"


# ---- CoOp's split files ----

FLOWERS = " ".join(data.FLOWERS.split()).split(", ")
CALTECH = {"Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike",
           "accordion": "accordion", "airplanes": "airplane", "anchor": "anchor",
           "car_side": "car_side", "yin_yang": "yin_yang"}      # case-sensitive order
CARS = {"AM General Hummer SUV 2000": "2000 AM General Hummer SUV",             # devkit order
        "Acura RL Sedan 2012": "2012 Acura RL Sedan",
        "Audi TT RS Coupe 2012": "2012 Audi TT RS Coupe",
        "Ram C/V Cargo Van Minivan 2012": "2012 Ram C/V Cargo Van Minivan",
        "smart fortwo Convertible 2012": "2012 smart fortwo Convertible"}
FOOD = ["apple_pie", "baby_back_ribs", "baklava"]
PETS = {"Abyssinian": "abyssinian", "american_bulldog": "american_bulldog", "Bengal": "bengal"}
SUN = {"/a/abbey": "abbey", "/b/bakery/shop": "shop bakery", "/a/airplane_cabin": "airplane cabin",
       "/a/apartment_building/outdoor": "outdoor apartment building"}   # not sorted: file order
TEXTURES = ["banded", "blotchy", "polka-dotted"]
EUROSAT = {"AnnualCrop": "Annual Crop Land", "Forest": "Forest",
           "HerbaceousVegetation": "Herbaceous Vegetation Land", "Highway": "Highway or Road",
           "Industrial": "Industrial Buildings", "Pasture": "Pasture Land",
           "PermanentCrop": "Permanent Crop Land", "Residential": "Residential Buildings",
           "River": "River", "SeaLake": "Sea or Lake"}
UCF = {"ApplyEyeMakeup": "Apply_Eye_Makeup", "Hammering": "Hammering",
       "HammerThrow": "Hammer_Throw", "HandstandPushups": "Handstand_Pushups",
       "TaiChi": "Tai_Chi", "YoYo": "Yo_Yo"}                    # classInd order, not sorted
PHOTO, PET = "a photo of a {}.", "a photo of a {}, a type of pet."
FLOWER, PLANE = "a photo of a {}, a type of flower.", "a photo of a {}, a type of aircraft."
DISH, SATELLITE = "a photo of {}, a type of food.", "a centered satellite photo of {}."
DOING = "a photo of a person doing {}."

COOP = {  # folder, split file, image folder, title, template, path of image i of class c, classes
    "caltech": ("caltech-101", "Caltech101", "101_ObjectCategories/", "caltech101", PHOTO,
                lambda c, i: f"{c}/image_{i + 1:04d}.jpg", CALTECH),
    "pets": ("oxford_pets", "OxfordPets", "images/", "pets", PET, lambda c, i: f"{c}_{i}.jpg",
             PETS),
    "cars": ("stanford_cars", "StanfordCars", "", "cars", PHOTO, lambda c, i:
             f"cars_{'test' if i > 2 else 'train'}/{[*CARS].index(c) * 9 + i:05d}.jpg", CARS),
    "flowers": ("oxford_flowers", "OxfordFlowers", "jpg/", "flowers", FLOWER,
                lambda c, i: f"image_{len(c) * 9 + i:05d}.jpg",
                {c: c for c in FLOWERS[:3]}),
    "food": ("food-101", "Food101", "images/", "food101", DISH,
             lambda c, i: f"{c}/{100 + i}.jpg", {c: c for c in FOOD}),
    "sun": ("sun397", "SUN397", "SUN397/", "sun397", PHOTO, lambda c, i: f"{c[1:]}/sun_a{i}.jpg",
            {c: " ".join(c.split("/")[:1:-1]) for c in SUN}),
    "dtd": ("dtd", "DescribableTextures", "images/", "dtd|texture", "{} texture.",
            lambda c, i: f"{c}/{c}_{i:04d}.jpg", {c: c for c in TEXTURES}),
    "eurosat": ("eurosat", "EuroSAT", "2750/", "eurosat", SATELLITE,
                lambda c, i: f"{c}/{c}_{i + 1}.jpg", EUROSAT),
    "ucf": ("ucf101", "UCF101", "UCF-101-midframes/", "ucf101", DOING,
            lambda c, i: f"{UCF[c]}/v_{c}_g08_c{i:02d}.jpg", UCF)}


@case(*COOP)
def coop(tmp, which):
    """train 0-1, val 2, test 3 of each class; beside it the official files with another split."""
    folder, split, images, title, template, path, classes = COOP[which]
    if which in ("food", "dtd", "pets"):
        {"food": food, "dtd": dtd, "pets": pets}[which](tmp, folder)
    root, rows = tmp / folder, {"train": [], "val": [], "test": []}
    for y, (c, name) in enumerate(classes.items()):
        for i, part in enumerate(("train", "train", "val", "test")):
            rows[part].append([path(c, i), y, name])
            picture(root / images / path(c, i), i)
    for part in rows.values():
        random.Random(1).shuffle(part)
    written(root / f"split_zhou_{split}.json", json.dumps(rows, indent=4))
    written(root / "split_fewshot" / "shot_1-seed_1.pkl", b"of Dassl, stale")
    parts = [{images + p: y for p, y, _ in rows[part]} for part in ("train", "test")]
    return Facts(folder, title, spaces(classes.values()), template, *parts,
                 ("CoOp layout", f"{len(classes)} images of val not used"))


# ---- official splits and layouts of torchvision ----

@case("oxford-iiit-pet", "oxford_pets")
def pets(tmp, folder):
    parts, lines = ({}, {}), ([], ["#Image CLASS-ID SPECIES BREED ID"])
    for y, breed in enumerate(PETS):
        for i in range(3):
            parts[i > 1][f"images/{breed}_{i}.jpg"] = y
            lines[i > 1].append(f"{breed}_{i} {y + 1} 1 1")
    draw(tmp / folder, *parts, ["images/unlisted_1.jpg"])
    for part, text in zip(("trainval", "test"), lines):
        written(tmp / folder / "annotations" / f"{part}.txt", text)
    return Facts(folder, "pets", spaces(PETS.values()), PET, *parts, ("official",))


@case("flowers-102", "oxford_flowers")
def flowers(tmp, folder):
    """Image i (from 1) is of class labels[i - 1] (from 1); 51 has a second training image."""
    labels = random.Random(2).sample([*range(1, 103)] * 3 + [51], 307)
    ids = {"trnid": [], "valid": [], "tstid": []}
    for i, y in enumerate(labels, 1):
        nth = labels[:i - 1].count(y)
        ids[["trnid", "tstid", "valid", "trnid"][nth]].append(i)
    write_mat(tmp / folder / "imagelabels.mat", labels=labels)
    write_mat(tmp / folder / "setid.mat", compressed if folder == "flowers-102" else bytes, **ids)
    parts = [{f"jpg/image_{i:05d}.jpg": labels[i - 1] - 1 for i in ids[part]}
             for part in ("trnid", "tstid")]
    draw(tmp / folder, [f"jpg/image_{i:05d}.jpg" for i in range(1, 308)])
    return Facts(folder, "flowers", [c for c in FLOWERS], FLOWER, *parts,
                 ("official", "not CoOp's"))


@case("food-101")
def food(tmp, folder):
    root, parts = tmp / folder, ({}, {})
    for y, c in enumerate(FOOD):
        for i in (1005649, 29109, 777):
            parts[i == 777][f"images/{c}/{i}.jpg"] = y
    for name, part in zip(("train", "test"), parts):
        stems = [p[len("images/"):-len(".jpg")] for p in part]
        written(root / "meta" / f"{name}.txt", stems)
        written(root / "meta" / f"{name}.json", json.dumps(
            {c: [s for s in stems if s.startswith(c + "/")] for c in FOOD}))
    written(root / "meta" / "classes.txt", FOOD)
    written(root / "meta" / "labels.txt", [c.replace("_", " ").capitalize() for c in FOOD])
    draw(root, *parts, ["images/baklava/unlisted.jpg"])
    return Facts(folder, "food101", spaces(FOOD), DISH, *parts, ("official", "not CoOp's"))


VARIANTS = ["707-320", "DR-400", "Boeing 717", "F-16A/B", "F/A-18", "Cessna 172"]   # file order


@case("fgvc_aircraft", "fgvc-aircraft-2013b/data")
def aircraft(tmp, folder):
    root, lists = tmp / folder, {"train": [], "val": [], "test": []}
    parts = {part: {} for part in lists}
    for y, variant in enumerate(VARIANTS):
        for i, part in enumerate(("train", "train", "val", "test")):
            lists[part].append(f"{y * 70 + i:07d} {variant}")
            parts[part][f"images/{y * 70 + i:07d}.jpg"] = y
    for part, text in (lists | {"trainval": lists["train"] + lists["val"]}).items():
        written(root / f"images_variant_{part}.txt", text)
        written(root / f"images_family_{part}.txt", [line.split()[0] + " Boeing" for line in text])
    written(root / "variants.txt", VARIANTS)
    written(root / "families.txt", ["Boeing"])
    written(root / "images_box.txt", ["0000000 1 1 8 8"])
    draw(root, *parts.values())
    return Facts(folder, "aircraft", VARIANTS, PLANE, parts["train"], parts["test"],
                 ("official", "which CoOp uses too"))


@case("dtd", "dtd/dtd")
def dtd(tmp, folder):
    """Partition 1 of 10: as many images in each of its parts. Partition 2 is another one."""
    root, parts = tmp / folder, {"train": {}, "val": {}, "test": {}}
    for y, c in enumerate(TEXTURES):
        for i, part in enumerate((*parts, *parts)):
            parts[part][f"images/{c}/{c}_{50 + i:04d}.jpg"] = y
    for k in (1, 2):
        for name, part in zip(parts, (*parts.values(), *parts.values())[k - 1:]):
            written(root / "labels" / f"{name}{k}.txt", [p[len("images/"):] for p in part])
    written(root / "labels" / "labels_joint_anno.txt", ["banded/banded_0050.jpg banded"])
    written(root / "imdb" / "imdb.mat", ["not read"])
    draw(root, *parts.values())
    return Facts(folder, "dtd|texture", TEXTURES, "{} texture.", parts["train"], parts["test"],
                 ("official", "not CoOp's"))


@case("eurosat")
def eurosat(tmp, folder):
    files = {f"2750/{c}/{c}_{i}.jpg": y for y, c in enumerate(EUROSAT) for i in range(1, 5)}
    draw(tmp / folder, files)
    return Facts(folder, "eurosat", list(EUROSAT.values()), SATELLITE,
                 *by_hash(files, "2750/"), ("hash",))


@case("caltech101", "caltech-101")
def caltech(tmp, folder):
    files = {f"101_ObjectCategories/{c}/image_{i:04d}.jpg": y for y, c in enumerate(CALTECH)
             for i in range(1, 6)}
    draw(tmp / folder, files, [f"101_ObjectCategories/{c}/image_0001.jpg"
                               for c in ("BACKGROUND_Google", "Faces_easy")])
    written(tmp / folder / "Annotations" / "Faces_2" / "annotation_0001.mat", ["not read"])
    return Facts(folder, "caltech101", spaces(CALTECH.values()), PHOTO,
                 *by_hash(files, "101_ObjectCategories/"), ("hash",))


@case("SUN397")
def sun(tmp, folder):                                   # torchvision's: no lists
    files = {f"{c[1:]}/sun_{i}bzqri.jpg": y for y, c in enumerate(SUN) for i in range(6)}
    draw(tmp / folder, files)
    written(tmp / folder / "ClassName.txt", [*SUN])
    written(tmp / folder / "README.txt", ["SUN Database"])
    return Facts(folder, "sun397", list(SUN.values()), PHOTO, *by_hash(files), ("hash",))


@case("sun397")
def sun_lists(tmp, folder):                             # CoOp's folder with Partitions.zip
    parts, root = ({}, {}), tmp / folder
    for y, c in enumerate(SUN):
        for i in range(3):
            parts[i > 1][f"SUN397{c}/sun_{i}bzqri.jpg"] = y
    for part, name in zip(parts, ("Training", "Testing")):
        written(root / f"{name}_01.txt", [p[len("SUN397"):] for p in part])
        written(root / f"{name}_02.txt", ["/a/abbey/sun_other.jpg"])
    for where in (root, root / "SUN397"):
        written(where / "ClassName.txt", [*SUN])
    draw(root, *parts, ["SUN397/a/abbey/sun_unlisted.jpg"])
    return Facts(folder, "sun397", list(SUN.values()), PHOTO, *parts, ("official",))


@case("stanford_cars")
def cars(tmp, folder):
    root, parts = tmp / folder, []
    write_mat(root / "devkit" / "cars_meta.mat", class_names=[*CARS])
    for part, place in (("train", "devkit/cars_train_annos.mat"),
                        ("test", "cars_test_annos_withlabels.mat")):
        rows = [{"bbox_x1": 39, "bbox_y1": 116, "bbox_x2": 569, "bbox_y2": 375,
                 "class": (i * 3) % len(CARS) + 1, "fname": f"{i:05d}.jpg"} for i in range(1, 11)]
        write_mat(root / place, annotations=rows)
        parts.append({f"cars_{part}/{row['fname']}": row["class"] - 1 for row in rows})
    rows = [{k: v for k, v in row.items() if k != "class"} for row in rows]
    write_mat(root / "devkit" / "cars_test_annos.mat", annotations=rows)      # without labels
    draw(root, *parts)
    return Facts(folder, "cars", list(CARS.values()), PHOTO, *parts, ("official",))


@case("HandstandPushups", "HandStandPushups")
def ucf(tmp, spelling):                                 # both spellings are in the wild
    root, parts, lists = tmp / "ucf101", ({}, {}), ([], [])
    actions = [spelling if c == "HandstandPushups" else c for c in UCF]
    for y, (c, action) in enumerate(zip(UCF, actions)):
        for i in range(3):
            video = f"v_{c.replace('Handstand', 'HandStand')}_g08_c{i:02d}"
            lists[i > 1].append(f"{action}/{video}.avi" + (f" {y + 1}" if i < 2 else ""))
            parts[i > 1][f"UCF-101-midframes/{UCF[c]}/{video}.jpg"] = y
    files = {f"{name}list0{k}.txt": text for k in (1, 2)
             for name, text in zip(("train", "test"), lists[::3 - 2 * k])}
    files["classInd.txt"] = [f"{y} {action}" for y, action in enumerate(actions, 1)]
    for name, text in files.items():
        written(root / "ucfTrainTestlist" / name, "\r\n".join(text) + "\r\n")
    draw(root, *parts)
    return Facts("ucf101", "ucf101", spaces(UCF.values()), DOING, *parts, ("official",))


# ---- ImageNet and its test sets ----

WNIDS = [f"n{1440764 + 977 * k:08d}" for k in range(1000)]
OPENAI = [f"thing {k}" for k in range(1000)]
OPENAI[657] = OPENAI[744] = "missile"                   # twice in the real file, too
OPENAI[836] = OPENAI[837] = "sunglasses"
LINES = [f"{w} {c}" for w, c in zip(WNIDS, OPENAI)]


def link(root, files):
    """Thousands of images in no time: hard links to one."""
    one = picture(root / ".one.jpg")
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        os.link(one, root / file)
    one.unlink()


@case("CoOp", "torchvision")
def imagenet(tmp, layout):
    images = "images/" if layout == "CoOp" else ""
    train = {f"{images}train/{w}/{w}_1{y}.JPEG": y for y, w in enumerate(WNIDS)}
    test = {f"{images}val/{w}/ILSVRC2012_val_{y:08d}.JPEG": y for y, w in enumerate(WNIDS)}
    link(tmp / "imagenet", [*train, *test])
    names = ResNet50_Weights.DEFAULT.meta["categories"]
    written(tmp / "imagenet" / "meta.bin", b"not read")
    if layout == "CoOp":                                # labels: sorted folders, not its lines
        names = OPENAI
        written(tmp / "imagenet" / "classnames.txt", random.Random(3).sample(LINES, 1000))
    return Facts("imagenet", "imagenet", names, PHOTO, train, test, ("train/ labelled + val/",))


@case("imagenetv2/imagenetv2-matched-frequency-format-val", "imagenet-sketch/images",
      "imagenet-adversarial/imagenet-a", "imagenet-rendition/imagenet-r")
def imagenet_test(tmp, folder):
    home, images = folder.split("/")
    kept = range(2, 1000, 5) if images in ("imagenet-a", "imagenet-r") else range(1000)
    end = {"imagenetv2": "jpeg", "imagenet-sketch": "JPEG"}.get(home, "jpg")
    files = {f"{images}/{k if home == 'imagenetv2' else WNIDS[k]}/{k}.{end}": y
             for y, k in enumerate(kept)}
    link(tmp / home, files)
    written(tmp / home / "classnames.txt", LINES)
    written(tmp / home / images / "README.txt", ["200 classes"])
    return Facts(home, "imagenet", [OPENAI[k] for k in kept], PHOTO, files, files, ("test only",))


# ---- every layout ----

def letters(text):
    return re.sub("[^a-z0-9]", "", text.lower())


@pytest.mark.parametrize("name", CASES)
def test_layout(ram, name):
    want = miniature(ram, name)
    home = ram / want.home
    for path, prefix in ((home, ""), (home.parent, home.name + "/")):   # itself; the only one in it
        d = data.load(path)
        names = [c.rstrip("?").replace("Hand Stand", "Handstand") for c in d.class_names]
        assert names == want.names and d.templates == [want.template]
        for images, part in ((d.train, want.train), (d.test, want.test)):
            assert dict(zip(images.names, images.y_true.tolist())) == {
                prefix + file: y for file, y in part.items()}
            assert len(images) == len(part) and images.image(0).size == (40, 30)
        assert (d.train is d.test) == ("test only" in want.says)
        assert re.search(want.title, letters(d.title)) and "\n" not in d.description
        assert all(text in d.description for text in (
            *want.says, f"{len(names)} classes", f"{len(want.train)} training and {len(want.test)} "
            f"test images", *[f"in {d.train.inside}"] * bool(d.train.inside))), d.description
        never = {"hash", "test only", "CoOp layout"} - set(want.says)
        assert not any(text in d.description for text in never), d.description


# ---- CIFAR ----

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
CIFAR100 = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab
crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout
tulip turtle wardrobe whale willow_tree wolf woman worm""".split()


def cifar(root, K):
    """[(labels, images (N, 32, 32, 3)) of train, of test], class names."""
    names, key = (CIFAR10, b"labels") if K == 10 else (CIFAR100, b"fine_labels")
    files = ([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"] if K == 10 else
             ["train", "test"])
    raw = [c.encode() for c in names]
    meta = ({b"num_cases_per_batch": 10, b"label_names": raw, b"num_vis": 3072} if K == 10 else
            {b"fine_label_names": raw, b"coarse_label_names": [b"fish", b"flowers"]})
    labels, images = [], []
    written(root / ("batches.meta" if K == 10 else "meta"), b"\x80\x02" + py2(meta) + b".")
    for k, file in enumerate(files):
        x = np.random.default_rng(k).integers(0, 256, (K, 3072), dtype=np.uint8)
        labels.append(random.Random(k).sample(range(K), K))
        images.append(x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        table = {b"batch_label": b"batch %d" % k, key: labels[k], b"data": x,
                 b"filenames": [b"img_s_%06d.png" % i for i in range(K)]}
        table |= {b"coarse_labels": [0, 1] * 50} if K == 100 else {}
        pickled = written(root / file, b"\x80\x02" + py2(table) + b".").read_bytes()
        assert (pickle.loads(pickled, encoding="bytes")[b"data"] == x).all()
    return [(sum(labels[:-1], []), np.concatenate(images[:-1])), (labels[-1], images[-1])], names


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar-100-python",      # torchvision
                                    "cifar-10", "cifar-100"])                       # DeFT
def test_cifar_pickles(tmp_path, folder):
    K = 100 if "100" in folder else 10
    parts, names = cifar(tmp_path / folder, K)
    written(tmp_path / folder / "readme.html", ["<html>"])
    for path in (tmp_path / folder, tmp_path):
        d = data.load(path)
        assert d.class_names == spaces(names) and d.templates == [PHOTO]
        assert letters(d.title) == f"cifar{K}"
        assert "official" in d.description and "hash" not in d.description
        for images, part, (labels, x) in zip((d.train, d.test), ("train", "test"), parts):
            assert images.y_true.tolist() == labels
            for i in (0, 27 % len(x), len(x) - 1):
                assert images.names[i].endswith(f"{part}/{i:05d}.png")
                assert (np.asarray(images.image(i)) == x[i]).all()
        few = d.train.subset([27, 3])
        assert few.y_true.tolist() == [parts[0][0][i] for i in (27, 3)]
        assert (few.view(data.transforms(32)[0])[1][0].numpy() == parts[0][1][3]).all()


@pytest.mark.parametrize("K", [10, 100])
def test_cifar_class_folders(tmp_path, K):              # LaFTer's: names with a space
    names = spaces(CIFAR10 if K == 10 else CIFAR100)
    root = tmp_path / f"cifar{K}"
    draw(root, [f"{part}/{c}/{i:04d}.png" for c in names for part, n in (("train", 2), ("test", 1))
                for i in range(n)])
    d = data.load(root)
    assert d.class_names == names and d.templates == [PHOTO] and "hash" not in d.description
    assert (len(d.train), len(d.test)) == (2 * K, K)
    for images in (d.train, d.test):
        for name, y in zip(images.names, images.y_true):
            assert name.split("/")[1] == names[y]


@pytest.mark.parametrize("file", ["data_batch_1", "batches.meta"])
@pytest.mark.parametrize("attack", ["os\nsystem", "posix\nsystem", "__builtin__\neval", "cut",
                                    "numpy.testing._private.utils\nrunstring", "wrong"])
def test_cifar_bad_pickle(tmp_path, file, attack):
    mark, root = tmp_path / "mark", tmp_path / "cifar-10-batches-py"
    cifar(root, 10)
    good = (root / file).read_bytes()
    code = f"touch {mark}" if "system" in attack else f"__import__('os').system('touch {mark}')"
    call = b"(" + py2(code.encode()) + (b"}" if "runstring" in attack else b"") + b"t"
    bad = {"cut": good[:len(good) // 2], "wrong": b"\x80\x02K\x01."}
    evil = b"\x80\x02c" + attack.encode() + b"\n" + call + b"R0" + good[2:]   # call, then the rest
    written(root / file, bad.get(attack, evil))
    assert file in refuses(root)
    assert not mark.exists()


def test_cifar_hostile_pickles(tmp_path):
    mark, root = tmp_path / "mark", tmp_path / "cifar-10-batches-py"
    cifar(root, 10)
    good = (root / "data_batch_1").read_bytes()
    for file in ("data_batch_1", "batches.meta"):
        for raw in (*attacks(mark).values(), b"\x80\x02}U\x0blabel_namesK\x01s."):
            written(root / file, raw)
            assert file in (message := refuses(root)) or "CIFAR-10" in message
        cifar(root, 10)
    for raw in mutants(good, 30):
        written(root / "data_batch_1", raw)
        try:
            data.load(root)
        except data.DataError as e:
            assert len(str(e).splitlines()) == 1
    assert not mark.exists()


# ---- errors in the data sets' own files ----

@pytest.mark.parametrize("name, file, line", [
    ("pets oxford_pets", "annotations/trainval.txt", "Abyssinian_1"),
    ("pets oxford_pets", "annotations/test.txt", "Abyssinian_1 one 1 1"),
    ("food food-101", "meta/train.txt", "apple_pie"),
    ("food food-101", "meta/test.txt", "no_such_dish/123"),
    ("aircraft fgvc_aircraft", "images_variant_train.txt", "0000001"),
    ("aircraft fgvc_aircraft", "images_variant_test.txt", "0000001 Concorde"),
    ("dtd dtd", "labels/train1.txt", "banded_0050.jpg"),
    ("sun_lists sun397", "Training_01.txt", "/x/no_such_scene/sun_a.jpg"),
    ("sun_lists sun397", "Testing_01.txt", "sun_a.jpg"),
    ("sun SUN397", "ClassName.txt", "abbey"),
    ("ucf HandstandPushups", "ucfTrainTestlist/classInd.txt", "two Hammering"),
    ("ucf HandstandPushups", "ucfTrainTestlist/trainlist01.txt", "NoSuchAction/v_x.avi 2"),
    ("ucf HandstandPushups", "ucfTrainTestlist/testlist01.txt", "v_x_g01_c01.avi"),
    ("imagenet_test imagenet-adversarial/imagenet-a", "classnames.txt", "tench")])
def test_malformed_line(ram, name, file, line):
    root = ram / miniature(ram, name).home
    lines = (root / file).read_text().splitlines()
    written(root / file, [lines[0], line, *lines[1:]])
    message = refuses(root)
    assert Path(file).name in message
    if not re.search("(?i)no_?such|concorde", line):    # those are unknown classes
        assert re.search(r"line 2\b", message)


@pytest.mark.parametrize("name, file", [
    ("flowers flowers-102", "imagelabels.mat"), ("flowers flowers-102", "setid.mat"),
    ("cars stanford_cars", "devkit/cars_meta.mat"),
    ("cars stanford_cars", "devkit/cars_train_annos.mat"),
    ("cars stanford_cars", "cars_test_annos_withlabels.mat")])
def test_malformed_mat(tmp_path, name, file):
    root = tmp_path / miniature(tmp_path, name).home
    raw, other = (root / file).read_bytes(), mat(matrix([1, 2], "something"))
    for bad in (raw[:len(raw) * 2 // 3], raw[:60], b"", b"<html>404</html>" * 20, other):
        written(root / file, bad)
        assert Path(file).name in refuses(root)
    (root / file).unlink()          # flowers: a flat folder then; cars: not two classes of folders
    message = refuses(root)
    assert Path(file).name in message or "flowers" in name and "--classes" in message


@pytest.mark.parametrize("folder, files, lists", [
    ("oxford_pets", ["images/Abyssinian_1.jpg", "images/Bengal_1.jpg"], "annotations"),
    ("oxford_flowers", ["jpg/image_00001.jpg"], "imagelabels.mat"),
    ("flowers-102", ["jpg/image_00001.jpg"], "imagelabels.mat"),
    ("fgvc_aircraft", ["images/0000001.jpg"], "variants.txt"),
    ("stanford_cars", ["cars_train/00001.jpg", "cars_test/00001.jpg"], "devkit")])
def test_known_set_without_any_list(tmp_path, folder, files, lists):
    draw(tmp_path / folder, files)                      # the images alone say no class
    for path in (tmp_path / folder, tmp_path):
        message = refuses(path)
        assert lists in message or "--classes" in message


@pytest.mark.parametrize("which", COOP)
def test_split_without_images(tmp_path, which):
    folder, split, images = COOP[which][:3]
    coop(tmp_path, which)
    for place in [images] if images else ["cars_train", "cars_test"]:
        (tmp_path / folder / place).rename(tmp_path / f".away_{place.strip('/')}")
    for path in (tmp_path / folder, tmp_path):
        message = refuses(path).split("Expected one of")[0]     # that part names every split file
        assert f"split_zhou_{split}.json" in message or "is missing" in message


@pytest.mark.parametrize("text, says", [
    ("{", "line 1 column 2"), ("[]", "expected {"), ('{"train": 3}', "train[0]"),
    ("{}", "0 classes"), ('{"train": [], "train": []}', "'train' is given twice"),
    ('{"train": [["a.jpg", 0, "a"], ["b.jpg", "1", "b"]]}', "train[1]: expected [path, label"),
    ('{"train": [["a.jpg", 0, "a"], ["b.jpg", 2, "b"]]}', "without a gap"),
    ('{"train": [["a.jpg", 0, "a"], ["b.jpg", 0, "b"]]}', "both a and b"),
    ('{"train": [["a.jpg", 0, "a"]], "test": [["c.jpg", 5, "c"]]}', "labels [0, 5]"),
])
def test_data_malformed_split(tmp_path, text, says):
    pets(tmp_path, "oxford_pets")
    written(tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json", text)
    message = refuses(tmp_path)
    assert message.startswith("split_zhou_OxfordPets.json") and says in message


def test_data_split_names_missing_files(tmp_path, capsys):
    coop(tmp_path, "pets")
    for k in range(2):
        (tmp_path / "oxford_pets" / "images" / f"Bengal_{k}.jpg").unlink()
    d = data.load(tmp_path / "oxford_pets")
    assert len(d.train) == 4 and len(d.class_names) == 3
    assert ("warning: 2 of 9 images missing, skipped: images/Bengal_0.jpg (is missing)"
            in capsys.readouterr().err)


def test_data_unknown_split_is_no_random_split(tmp_path):
    class_folders(tmp_path)
    written(tmp_path / "split_zhou_Unheard.json", "{}")
    assert "split_zhou_Unheard.json" in refuses(tmp_path)


def test_names_of_numbered_classes(tmp_path):
    root = tmp_path / flowers(tmp_path, "oxford_flowers").home
    names = {str(k): f"flower_{k}" for k in range(1, 103)}          # CoOp's: not 0, 1, 10, 100
    written(root / "cat_to_name.json", dict(sorted(names.items())))
    doubles = [float(k) for k in data.read_mat(root / "imagelabels.mat")["labels"]]
    write_mat(root / "imagelabels.mat", labels=doubles)
    d = data.load(root)
    assert d.class_names == [f"flower {k}" for k in range(1, 103)]
    assert d.train.y_true.tolist() == [doubles[int(name[-9:-4]) - 1] - 1 for name in d.train.names]
    written(root / "cat_to_name.json", {"1": "rose", "2": "lily"})
    assert "labels from 0 to 101, but there are 2 classes" in refuses(root)
    for bad in ({"0": "rose", "1": "lily"}, [["rose"]]):
        written(root / "cat_to_name.json", bad)
        assert refuses(root).startswith("cat_to_name.json: expected")
    cifar(tmp_path / "cifar10", 10)
    (tmp_path / "cifar10" / "batches.meta").unlink()
    assert "--classes" in refuses(tmp_path / "cifar10")
    assert data.load(tmp_path / "cifar10", CIFAR10).class_names == CIFAR10
    assert "labels from 0 to 9, but there are 2 classes" in refuses(tmp_path / "cifar10", "a,b")


def test_tiny_imagenet_as_it_comes(tmp_path):
    wnids, root = ["n01443537", "n01629819"], tmp_path / "tiny-imagenet-200"
    for w in wnids:
        picture(root / "train" / w / "images" / f"{w}_0.JPEG")
    for k in range(3):
        picture(root / "val" / "images" / f"val_{k}.JPEG")
        picture(root / "test" / "images" / f"test_{k}.JPEG")
    written(root / "wnids.txt", wnids[::-1])
    written(root / "words.txt", ["n01443537\tgoldfish, Carassius auratus", "n01629819\tsalamander"])
    written(root / "val" / "val_annotations.txt", [
        f"val_{k}.JPEG\t{w}\t0\t32\t44\t62" for k, w in enumerate([*wnids, wnids[0]])])
    d = data.load(tmp_path)
    assert d.class_names == ["goldfish", "salamander"] and d.title == "Tiny-ImageNet"
    assert d.train.y_true.tolist() == [0, 1] and d.test.y_true.tolist() == [0, 1, 0]
    assert d.test.names[2] == "tiny-imagenet-200/val/images/val_2.JPEG"
    written(root / "val" / "val_annotations.txt", ["val_0.JPEG\tn99999999\t0"])
    assert "labels from -1" in refuses(tmp_path)


def test_wordnet_ids(tmp_path):
    wnids = ["n01440764", "n02102040", "n02979186"]     # of Imagenette
    other = ["n01443537", "n01629819", "n01641577"]     # of Tiny-ImageNet
    for name, folders in (("imagenette2", wnids), ("tiny", other)):
        class_folders(tmp_path / name / "train", 2, folders)
        class_folders(tmp_path / name / "val", 1, folders[:2])
    d = data.load(tmp_path / "imagenette2")
    assert d.class_names == ["tench", "English springer", "cassette player"]
    assert d.title == "Imagenette" and d.test.y_true.tolist() == [0, 1]
    tiny, words = tmp_path / "tiny", tmp_path / "tiny" / "words.txt"
    for classes in (None, "a,b"):
        message = refuses(tiny, classes)
        assert "classnames.txt" in message and "n01443537" in message and "3 classes" in message
    assert data.load(tiny, "fish,amphibian,frog").class_names == ["fish", "amphibian", "frog"]
    written(words, ["n00001740\tentity", "n01443537\tgoldfish, Carassius auratus",
                    "n01629819\tEuropean fire salamander, Salamandra salamandra", "n01641577\tbull"
                    "frog, Rana catesbeiana"])
    names = ["goldfish", "European fire salamander", "bullfrog"]
    assert data.load(tiny).class_names == names
    written(tiny / "classnames.txt", ["n01443537 gold fish"])       # lacks two: not used
    assert data.load(tiny).class_names == names


# ======== data.py: own folders, loading ========


@pytest.mark.parametrize("test", ["test", "val"])
def test_data_imagefolder(tmp_path, test):
    from torchvision.datasets import ImageFolder
    names = ("b_2", "B_1", "a", "é x")
    class_folders(tmp_path / "train", 3, names)
    class_folders(tmp_path / test, 2, names)
    picture(tmp_path / "train" / "a" / "deeper" / "x.jpg")
    (tmp_path / test / "a" / "loop").symlink_to(tmp_path / test / "a")
    d, reference = data.load(tmp_path), ImageFolder(tmp_path / "train")
    assert d.class_names == [c.replace("_", " ") for c in reference.classes]
    want = [(Path(p).relative_to(tmp_path).as_posix(), y) for p, y in reference.samples]
    assert sorted(zip(d.train.names, d.train.y_true.tolist())) == sorted(want)
    assert len(d.test) == 8 and f"{test}/ labelled" in d.description
    assert d.templates == ["a photo of a {}."]
    class_folders(tmp_path / test, 1, ("extra",))
    assert "extra" in refuses(tmp_path)


def test_data_unlabelled_train_labelled_test(tmp_path):
    picture(tmp_path / "train" / "1.jpg")
    class_folders(tmp_path / "test")
    d = data.load(tmp_path)
    assert d.train.y_true is None and d.class_names == ["bear", "cat", "dog"]
    assert d.test.y_true.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    class_folders(tmp_path / "val", 1)
    assert len(data.load(tmp_path).test) == 12           # test/ before val/, if both are labelled
    for c in d.class_names:
        (tmp_path / "test" / c).rename(tmp_path / f".{c}")
    picture(tmp_path / "test" / "1.jpg")
    d = data.load(tmp_path)
    assert len(d.test) == 3 and "val/ labelled, test/ not used" in d.description


def test_data_class_folders_fixed_split(tmp_path):
    class_folders(tmp_path / "a", 60)
    first, again = data.load(tmp_path / "a"), data.load(tmp_path / "a")
    wrapped = data.load(tmp_path)
    assert first.test.names == again.test.names
    assert wrapped.test.names == [f"a/{n}" for n in first.test.names]
    assert not set(first.train.names) & set(first.test.names)
    assert len(first.train) + len(first.test) == 180 and 20 <= len(first.test) <= 52
    for name in first.test.names:
        assert int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0
    assert "hash" in first.description
    for images in (first.train, first.test):
        for name, y in zip(images.names, images.y_true):
            assert name.split("/")[0] == ["bear", "cat", "dog"][y]


def test_data_classes_must_agree_with_folders(tmp_path):
    class_folders(tmp_path)
    assert data.load(tmp_path, "Bear,cat,DOG").class_names == ["Bear", "cat", "DOG"]
    assert "number 1 is cat, but in the data bear" in refuses(tmp_path, "cat,bear,dog")
    assert "number 3 is missing, but in the data dog" in refuses(tmp_path, "bear,cat")
    assert "number 4 is emu, but in the data missing" in refuses(tmp_path, "bear,cat,dog,emu")


def test_data_flat_folder(tmp_path):
    photos = tmp_path / "photos"
    for k in range(5):
        picture(photos / f"IMG {k}.JPG", k, fmt="JPEG")
    (photos / ".DS_Store").write_text("x")
    (photos / "._IMG 0.JPG").write_text("x")
    (photos / "notes.txt").write_text("x")
    (photos / "x.jpg").mkdir()
    (tmp_path / "c.txt").write_bytes("\ufefflong_haired cat\r\n\r\nhot dog\r\n".encode())
    d = data.load(photos, tmp_path / "c.txt")
    assert d.class_names == ["long haired cat", "hot dog"]
    assert d.train.names == d.test.names == [f"IMG {k}.JPG" for k in range(5)]
    assert d.train.y_true is None and d.test.y_true is None
    assert "ignored: 1 .txt, 2 hidden" in d.description
    assert data.load(photos, ["a", "b"]).class_names == ["a", "b"]
    assert data.load(photos, " a, b,").class_names == ["a", "b"]
    assert "--classes FILE|a,b,c" in refuses(photos)
    assert "neither a file nor a list" in refuses(photos, "clases.txt")
    assert all("classes with a name are needed" in refuses(photos, c) for c in ("", []))
    assert "differ" in refuses(photos, "cat,dog,Cat") and "differ" in refuses(photos, "a b,a_b")


def test_data_nested_unlabelled_photos(tmp_path, capsys):
    for k, name in enumerate(("2023/01/a.jpg", "2023/02/b.jpg", "2024/c.jpg", "d.jpg")):
        picture(tmp_path / "photos" / name, k)
    (tmp_path / "photos" / "x.heic").write_bytes(b"x")
    d = data.load(tmp_path / "photos", "cat,dog")
    assert d.train.names == ["2023/01/a.jpg", "2023/02/b.jpg", "2024/c.jpg", "d.jpg"]
    assert d.train.y_true is None and d.test is d.train and "folders of images" in d.description
    (tmp_path / "photos" / "2024").rename(tmp_path / "photos" / "cat")  # called like a class
    os.symlink("me.jpg", tmp_path / "photos" / "me.jpg")                # a link to itself
    d = data.load(tmp_path / "photos", "cat,dog")
    assert d.train.names == ["d.jpg"] and "2023/ not used, cat/ not used" in d.description
    assert "1 of 2 images unreadable, skipped: me.jpg" in capsys.readouterr().err
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "x.heic").write_bytes(b"x")
    assert "no images in a known layout (not read: 1 .heic)" in refuses(tmp_path / "phone")


def test_data_missing_empty_unknown(tmp_path):
    for path in (tmp_path / "nowhere", "", "x" * 5000, "~nobody/x"):
        message = refuses(path)
        assert "no such folder. Expected one of" in message
        assert "oxford_pets, " in message
    assert "is not a folder" in refuses(__file__)
    assert "no images in a known layout" in refuses(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "no images in a known layout" in refuses(tmp_path, "a,b")
    for name in "pq":
        coop(tmp_path / name, "pets")
    assert "several data sets, give one: p/oxford_pets, q/oxford_pets" in refuses(tmp_path)


def test_data_unreadable_named_and_skipped(tmp_path, capsys):
    for k in range(5):
        picture(tmp_path / f"ok{k}.jpg", k, (200, 200))
    picture(tmp_path / "png_inside.jpg", 5, mode="RGBA", fmt="PNG")     # wrong extension: fine
    whole = (tmp_path / "ok0.jpg").read_bytes()
    (tmp_path / "bad_cut.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "bad_empty.png").write_bytes(b"")
    (tmp_path / "bad_text.jpg").write_text("<html>404</html>")
    (tmp_path / "bad_eps.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bad_bomb.png")
    os.symlink(tmp_path / "nothing", tmp_path / "dangling.jpg")
    d = data.load(tmp_path, "a,b")
    assert d.train.names == [*(f"ok{k}.jpg" for k in range(5)), "png_inside.jpg"]
    err = capsys.readouterr().err.splitlines()
    assert [line.split(", skipped")[0] for line in err] == [
        "warning: 1 of 12 images missing", "warning: 5 of 12 images unreadable"]
    assert all(f"bad_{x}" in err[1] for x in ("cut", "empty", "text", "eps", "bomb"))
    assert "bad_eps.jpg (not an image)" in err[1]        # Pillow would run Ghostscript
    assert d.train.image(5).mode == "RGB"
    (tmp_path / "ok4.jpg").unlink()
    (tmp_path / "ok3.jpg").unlink()
    assert "only 4 of 10 training images can be read: bad_bomb.png" in refuses(tmp_path, "a,b")
    for name in d.train.names:
        (tmp_path / name).unlink(missing_ok=True)
    capsys.readouterr()
    assert "none of 6 training images can be read: bad_bomb.png" in refuses(tmp_path, "a,b")
    assert not capsys.readouterr().err
    with pytest.raises(data.DataError, match="ok0.jpg"):
        d.train.image(0)


def test_data_what_is_no_image(tmp_path, capsys):
    """Pipes, devices, bombs, links in circles, odd names: refused by name, never waited for."""
    odd = ["a\nwarning: b.jpg", "\x1b[2J.jpg", 'quo"te, \U0001f600.jpg', "\u202egpj.jpg"]
    for k, name in enumerate([*odd, *(f"ok{k}.png" for k in range(12))]):
        picture(tmp_path / name, k)
    pipe, rng = tmp_path / "pipe.png", random.Random(0)
    os.mkfifo(pipe)
    (tmp_path / "folder.jpg").mkdir()
    os.symlink("circle.jpg", tmp_path / "circle.jpg")
    os.symlink("/dev/zero", tmp_path / "device.jpg")
    for k in range(8):                                  # each leads to all of the others: 8! ways
        os.mkdir(tmp_path / f"d{k}")
        for j in range(8):
            os.symlink(f"../d{j}", tmp_path / f"d{k}" / f"l{j}")
    written(tmp_path / "huge.webp", b"RIFF\0\0\0\0WEBPVP8L")
    os.truncate(tmp_path / "huge.webp", 2**31)
    Image.new("L", (9500, 9500)).save(tmp_path / "large.png")
    Image.new("L", (9000, 1)).save(tmp_path / "strip.png")
    written(tmp_path / "text.ppm", b"P3 9000 3000 255 " + b"1 2 3\n" * 99)
    Image.new("L", (40, 30)).save(tmp_path / "scans.jpg", progressive=True)
    scans = (tmp_path / "scans.jpg").read_bytes()
    written(tmp_path / "scans.jpg", scans[:-2] + scans[scans.rfind(b"\xff\xda"):-2] * 100)
    start = time.perf_counter()
    d = data.load(tmp_path, "a,b")
    assert time.perf_counter() - start < 30 and len(d.train) == 16
    assert sorted(d.train.names)[0] == odd[1] and d.description.isprintable()
    err = capsys.readouterr().err
    assert err.startswith("warning: 6 of 22 images unreadable, skipped: circle.jpg (Too many lev")
    assert err.count("\n") == 1
    for name, why in (("huge.webp", "larger than 1 GB"), ("large.png", "89 million"),
                      ("strip.png", "narrow"), ("text.ppm", "of text"), ("scans.jpg", "scans"),
                      ("pipe.png", "not a plain file"), ("device.jpg", "not a plain file")):
        for draft in (True, False):
            with pytest.raises((OSError, ValueError), match=why):
                data.decode(tmp_path / name, draft)
    data.write_predictions(tmp_path / "p.csv", d.train.names, ["a", "b"], torch.ones(16, 2),
                           torch.ones(16, 2))
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        assert [row[0] for row in csv.reader(file)][1:] == d.train.names
    for name in ("1.jpg", "2.png", "3.gif", "4.tif", "5.webp", "6.bmp", "7.ppm"):
        whole = encoded(1, (19, 23), "RGB", {".jpg": "JPEG", ".tif": "TIFF"}.get(
            name[1:], name[2:].upper()))
        for raw in mutants(whole, 60):
            raw = bytearray(raw)
            for _ in range(rng.randrange(4)):
                raw[rng.randrange(min(len(raw), 120)):][:1] = b"\xff" if raw else b""
            path = written(tmp_path / name, bytes(raw))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _, bad = data.check_files(tmp_path, [name], "")
                if not bad:                             # what is let through can be used
                    [prepare.prepare(data.decode(path)) for prepare in data.transforms(16)]
    capsys.readouterr()


def test_data_deep_folders(ram):
    picture(ram / "b.png")
    folder = f"{ram}/{'/'.join('d' * 1200)}"            # Python's own functions recurse
    os.system(f"mkdir -p {folder} && cp {ram}/b.png {folder}/a.png")
    names = data.load(ram, "a,b").train.names
    os.system(f"rm -r {ram}/d")
    assert names == ["b.png", f"{'d/' * 1200}a.png"]


def test_data_a_file_vanishes(tmp_path):
    draw(tmp_path, [f"{k}.jpg" for k in range(4)])
    d = data.load(tmp_path, "a,b")
    (tmp_path / "2.jpg").unlink()
    for workers in (0, 1):
        with pytest.raises(data.DataError) as e:
            list(data.loader(d.train.view(data.transforms(16)[0]), 2, workers=workers))
        assert str(e.value) == "cannot read 2.jpg any more: No such file or directory"


def test_data_view_is_a_label_firewall(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "test")
    train = data.load(tmp_path).train
    test, weak, strong = data.transforms(16)
    before = list(train.view(test))
    view = train.view(test)
    train.y_true = train.y_true.flip(0)
    for (x, i), (x0, i0) in zip(before, view):
        assert i == i0 and torch.equal(x, x0)
    assert view.images.y_true is None
    decoded = []
    view = train.view(test, weak, strong)
    view.images.image = lambda i: decoded.append(i) or Image.new("RGB", (9, 9))
    x_test, x_weak, x_strong, i = view[3]
    assert decoded == [3] and i == 3                                           # decoded once
    assert x_test.shape == x_weak.shape == x_strong.shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(50, 37), (32, 32), (301, 23), (1, 7)])
def test_preprocessing_is_clips(tmp_path, mode, size):
    picture(tmp_path / "x.png", 1, size, mode)
    n, image, (w, h) = 32, Image.open(tmp_path / "x.png"), size     # restated with Pillow
    short = (n, int(n * h / w)) if w <= h else (int(n * w / h), n)
    left, top = round((short[0] - n) / 2), round((short[1] - n) / 2)
    small = image if min(w, h) == n else image.resize(short, Image.Resampling.BICUBIC)
    rgb = small.crop((left, top, left + n, top + n)).convert("RGB")
    x = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(n, n, 3)
    x = x.permute(2, 0, 1).float() / 255                            # (3, n, n)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    x = (x - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    plain = data.transforms(n)[0]
    assert torch.equal(data.normalize(plain(plain.prepare(image))[None])[0], x)
    assert torch.equal(clip_files._transform(n)(image), x)


def test_data_decode_keeps_colours(tmp_path):
    gif = Image.new("P", (4, 4), 1)
    gif.putpalette([0, 0, 0, 200, 30, 60])
    gif.save(tmp_path / "p.png", transparency=b"\x00\x80")
    assert data.decode(tmp_path / "p.png").getpixel((2, 2)) == (200, 30, 60)
    exif = Image.Exif()
    exif[0x0112] = 6                                     # "rotate me": CLIP's preprocess does not
    Image.new("RGB", (40, 20)).save(tmp_path / "r.jpg", exif=exif)
    assert data.decode(tmp_path / "r.jpg").size == (40, 20)


def test_data_loader_is_the_same_for_any_number_of_workers(tmp_path):
    for k in range(10):
        picture(tmp_path / f"{k}.png", k)
    view = data.load(tmp_path, "a,b").train.view(*data.transforms(16)[1:])

    def epochs(workers, seed=0, start=0):
        loader = data.loader(view, 4, shuffle=True, seed=seed, workers=workers, epoch=start)
        return [[torch.cat(x) for x in zip(*loader)] for _ in range(2)]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, other = epochs(0), epochs(2)
    assert torch.equal(torch.get_rng_state(), state)     # the global random numbers are untouched
    for a, b in zip(one, other):
        assert all(map(torch.equal, a, b)) and sorted(a[2].tolist()) == list(range(10))
    assert not torch.equal(one[0][2], one[1][2])         # another order in each epoch
    resumed = epochs(0, start=1)[0]
    assert all(map(torch.equal, resumed, one[1]))
    assert not torch.equal(epochs(0, seed=1)[0][2], one[0][2])
    by_image = [x[0][x[2].argsort()] for x in one]
    assert not torch.equal(*by_image)                    # another crop in each epoch


def test_data_loader_batches(tmp_path):
    for k in range(10):
        picture(tmp_path / f"{k}.png", k)
    view = data.load(tmp_path, "a,b").train.view(data.transforms(16)[0])
    sizes = lambda **k: [len(i) for _, i in data.loader(view, **k)]      # noqa: E731
    assert sizes(batch_size=4) == [4, 4, 2] and sizes(batch_size=4, drop_last=True) == [4, 4]
    assert sizes(batch_size=16, drop_last=True) == [10]                  # never an empty epoch
    picked = [i for _, i in data.loader(view, 3, subset=torch.tensor([7, 1, 7]))]
    assert picked[0].tolist() == [7, 1, 7]


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_data_undecodable_file_name(tmp_path):
    Image.new("RGB", (8, 8)).save(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    d = data.load(tmp_path, "a,b")
    assert d.train.names == ["caf\\udce9.png"] and d.train.image(0).size == (8, 8)


def test_data_flat_folder_is_one_set(tmp_path):
    draw(tmp_path / "photos", [f"{k}.jpg" for k in range(5)])
    d = data.load(tmp_path, "a,b")                      # the only folder with images
    assert d.train is d.test and d.train.y_true is None
    assert d.train.names == [f"photos/{k}.jpg" for k in range(5)]
    assert "in photos/: flat folder, unlabelled, train = test" in d.description
    class_folders(tmp_path / "labelled")
    picture(tmp_path / "labelled" / "cat" / "000.png", size=(7, 9))
    train = data.load(tmp_path / "labelled").train
    want = [i for i, name in enumerate(train.names) if name.startswith(("dog", "cat/000"))][::-1]
    few = train.subset(want)
    assert few.names == [train.names[i] for i in want] and len(few) == 2
    assert few.y_true.tolist() == train.y_true[want].tolist() == [2, 1]
    assert few.sizes[-1] == (7, 9) and few.sizes == [few.image(i).size for i in range(len(few))]
    assert d.train.subset([3]).names == ["photos/3.jpg"] and d.train.subset([3]).y_true is None


@pytest.mark.parametrize("n", [1, 3])
def test_data_subset_by_a_tensor(n):
    images = data.Images(["a", "b", "c", "d"], [3, 2, 1, 0])
    few = images.subset(torch.tensor([2, 0, 1][:n]))
    assert few.names == ["c", "a", "b"][:n] and few.y_true.tolist() == [1, 3, 2][:n]


def test_data_too_many_to_open(tmp_path, capsys, monkeypatch):
    draw(tmp_path, [f"{k}.jpg" for k in range(5)])
    written(tmp_path / "3.jpg", b"x")
    monkeypatch.setattr(data, "CHECKED", 3)
    monkeypatch.setattr(data, "decode", None)
    d = data.load(tmp_path, "a,b")                      # opens none
    monkeypatch.undo()
    assert d.train.sizes is None and d.train.subset([1]).sizes is None
    views = data.transforms(16)
    assert "anew" in data.keep_decoded(d, views, 1)
    capsys.readouterr()
    batches, grey = data.loader(d.train.view(views[0]), 2), Image.new("RGB", (16, 16), "grey")
    x = torch.cat([x for x, _ in batches])
    assert torch.equal(x[3], clip_files._transform(16)(grey)) and not torch.equal(x[2], x[3])
    assert capsys.readouterr().err == "warning: grey instead of 3.jpg: not an image\n"
    list(batches)
    assert capsys.readouterr().err == ""                # once is enough
    for k in range(4):
        written(tmp_path / f"{k}.jpg", b"x")
    with pytest.raises(data.DataError, match="more than half of 5 images cannot be read"):
        list(batches), list(batches)


def test_data_lists_20_000_files_in_seconds(ram, monkeypatch):
    link(ram, [f"class {k % 100:02d}/{k}.jpg" for k in range(20_000)])
    monkeypatch.setattr(data, "CHECKED", 3)
    start = time.perf_counter()
    d = data.load(ram)
    assert time.perf_counter() - start < 30
    assert len(d.train) + len(d.test) == 20_000 and len(d.class_names) == 100
    for images in (d.train, d.test):
        assert all(int(Path(name).stem) % 100 == y and name.startswith(f"{d.class_names[y]}/")
                   for name, y in zip(images.names, images.y_true.tolist()))


def test_data_templates(tmp_path, drawn, capsys):
    coop(tmp_path, "pets")
    d = data.load(tmp_path, template="ensemble")
    assert len(set(d.templates)) == 8 and d.templates == [PET, *data.ENSEMBLE]
    assert d.description.endswith(f'"{PET}" and 7 more templates')
    d = data.load(tmp_path, template="a sketch of {}?")
    assert d.templates == ["a sketch of {}?"] and '"a sketch of {}?"' in d.description
    for bad in ("no braces", "{} {}", "{x}", "{} {x}", "{}}", "{0}", ""):
        message = refuses(tmp_path, None, bad)
        assert message.startswith(f"--template {bad!r}: expected `ensemble` or a text with one {{")
    save_pictures(tmp_path / "own", drawn)
    args = ["--data", tmp_path / "own", *FOLDER, "--max-steps", 1, "--epochs2", 0, "--template"]
    assert run(tmp_path / "one", *args, data.TEMPLATE) == 0
    assert run(tmp_path / "many", *args, "ensemble") == 0
    assert f'"{data.TEMPLATE}" and 7 more templates' in capsys.readouterr().out
    assert read(tmp_path / "many")[2]["templates"] == [data.TEMPLATE, *data.ENSEMBLE]
    assert read(tmp_path / "one")[1] != read(tmp_path / "many")[1]


def test_data_label_order(tmp_path, drawn, capsys):
    def warned(title, C, accuracy):
        data.check_label_order(data.Data(None, None, [""] * C, [], "", title), accuracy)
        return capsys.readouterr().err
    line = warned("Oxford Pets", 37, 3.0)
    assert line.startswith("warning: 3.0 % zero-shot on Oxford Pets is too little for 37 classes")
    assert line.count("\n") == 1 and not warned("Oxford Pets", 37, 15.0)
    assert not warned(None, 37, 3.0) and not warned("Oxford Pets", 37, None)
    assert not warned("EuroSAT", 10, 38.0) and warned("EuroSAT", 10, 20.0)
    save_pictures(tmp_path / "pets", drawn, "images/train{i}.png", "images/test{i}.png")
    for shift in (0, 1):                                # names of the next class
        names = shapes.SHAPES[shift:] + shapes.SHAPES[:shift]
        written(tmp_path / "pets" / "split_zhou_OxfordPets.json", {
            part: [[f"{part}{i}.png", k, names[k]] for i, k in enumerate(drawn[part][1])]
            for part in drawn})
        assert run(tmp_path / f"out{shift}", "--data", tmp_path / "pets", *FOLDER,
                   "--max-steps", 1, "--epochs2", 0) == 0
        err = capsys.readouterr().err
        assert ("warning: " in err and "zero-shot on Oxford Pets is too little" in err) == shift


# ---- downloads ----

def pets_class(build):
    class Fake:                                         # in place of torchvision's OxfordIIITPet
        def __init__(self, root, download=False):
            assert download and socket.getdefaulttimeout() == 60
            build(Path(root))
    return Fake


def test_data_download(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", pets_class(
        lambda root: pets(root, "oxford-iiit-pet")))
    (tmp_path / "new").mkdir()
    assert "no such folder" in refuses(tmp_path / "typo" / "oxford_pets")       # no folder for that
    assert not (tmp_path / "typo").exists()
    socket.setdefaulttimeout(77)
    try:
        for name, said in (("oxford_pets", 1), ("oxford_pets", 0), ("oxford-iiit-pet", 0)):
            d = data.load(tmp_path / "new" / name)
            assert (len(d.train), len(d.test)) == (6, 3) and d.title == "Oxford Pets"
            assert capsys.readouterr().out.count("downloading Oxford Pets") == said
            assert os.listdir(tmp_path / "new") == ["oxford-iiit-pet"]
        (tmp_path / "bad").mkdir()
        for kind in (urllib.error.URLError("no route"), RuntimeError("broken\narchive"),
                     KeyboardInterrupt()):
            for half in (False, True):
                def fails(root):
                    if half:
                        picture(root / "oxford-iiit-pet" / "images" / "a_1.jpg")
                    raise kind
                monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", pets_class(fails))
                if isinstance(kind, KeyboardInterrupt):
                    with pytest.raises(KeyboardInterrupt):
                        data.load(tmp_path / "bad" / "oxford_pets")
                else:
                    message = refuses(tmp_path / "bad" / "oxford_pets")
                    assert message.startswith("Oxford Pets could not be downloaded (")
                    assert "\n  oxford_pets/ with split_zhou_OxfordPets.json and images/" in message
                assert os.listdir(tmp_path / "bad") == []           # nothing is left behind
                assert socket.getdefaulttimeout() == 77
    finally:
        socket.setdefaulttimeout(None)
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", None)
    assert "no such folder" in refuses(tmp_path / "stanford_cars")  # nobody offers it any more


@pytest.mark.parametrize("attack", ["../out.txt", "/tmp/../{}/out.txt", "link"])
def test_data_download_stays_inside(tmp_path, monkeypatch, attack):
    (tmp_path / "x").mkdir()

    def build(root):
        with tarfile.open(root / "a.tar", "w") as tar:
            for name in (["link", "link/out.txt"] if attack == "link" else
                         [attack.format(tmp_path)]):
                info = tarfile.TarInfo(name)
                if name == "link":
                    info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path)
                tar.addfile(info)
        torchvision.datasets.utils.extract_archive(str(root / "a.tar"), str(root / "oxford"))
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", pets_class(build))
    before = vars(tarfile.TarFile).get("extraction_filter")
    refuses(tmp_path / "x" / "oxford_pets")
    assert not (tmp_path / "out.txt").exists() and len(list(tmp_path.glob("x/*/out.txt"))) == 0
    assert vars(tarfile.TarFile).get("extraction_filter") is before


def test_data_download_by_torchvision(tmp_path, monkeypatch, capsys):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    pets(tmp_path, "made")
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    resources = []
    for part in ("images", "annotations"):
        with tarfile.open(tmp_path / f"{part}.tar.gz", "w:gz") as tar:
            tar.add(tmp_path / "made" / part, part)
        resources.append([f"http://127.0.0.1:{httpd.server_port}/{part}.tar.gz", hashlib.md5(
            (tmp_path / f"{part}.tar.gz").read_bytes()).hexdigest()])
    monkeypatch.setenv("no_proxy", "*")
    kind = torchvision.datasets.OxfordIIITPet
    monkeypatch.setattr(kind, "_RESOURCES", [resources[0], [resources[1][0], "0" * 32]])
    (tmp_path / "x").mkdir()
    assert "could not be downloaded" in refuses(tmp_path / "x" / "oxford_pets")     # wrong MD5
    assert os.listdir(tmp_path / "x") == []
    monkeypatch.setattr(kind, "_RESOURCES", resources)
    d = data.load(tmp_path / "x" / "oxford_pets")
    httpd.shutdown()
    httpd.server_close()
    assert d.class_names == spaces(PETS.values()) and (len(d.train), len(d.test)) == (6, 3)
    assert os.listdir(tmp_path / "x") == ["oxford-iiit-pet"]


# ---- decoded images, kept; batches ----

SIZES = [(300, 200), (20, 15), (200, 3), (3, 200), (40, 64), (37, 37), (37, 90), (31, 32), (1, 1)]


@pytest.fixture
def odd_sizes(tmp_path):
    for k, size in enumerate(SIZES):
        picture(tmp_path / "odd" / "train" / f"{k}.jpg", k, size)
        picture(tmp_path / "odd" / "test" / "ab"[k % 2] / f"{k}.jpg", k + 5, size)
    return tmp_path / "odd"


def two_epochs(root, gb, workers=0):
    """(what `keep_decoded` says, all tensors of two epochs in order, the data)."""
    found = data.load(root)
    test, weak, strong = views = data.transforms(32)
    line, tensors = data.keep_decoded(found, views, gb), []
    for view, shuffle in ((found.test.view(test), False), (found.train.view(weak, strong), True),
                          (found.train.view(test), False)):
        batches = data.loader(view, 4, shuffle=shuffle, workers=workers)
        tensors += [x for _ in range(2) for batch in batches for x in batch]
    return line, tensors, found


def test_data_kept_pixels(odd_sizes, tmp_path, monkeypatch):
    decoded, decode, free = [], data.decode, data.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data, "decode", lambda path, draft=False: (
        draft or decoded.append(path), decode(path, draft))[1])
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    line, want, found = two_epochs(odd_sizes, 0)
    assert line == "images are decoded anew each time" and found.train.kept is None
    assert len(decoded) == 6 * len(SIZES)               # three views, two epochs
    for gb, disk, says in ((1, 1, "are kept: 0.0 GB in memory"),
                           (1e-9, 1, "are kept: 0.0 GB in a temporary file"),
                           (1e-9, 0, "are decoded anew each time")):
        monkeypatch.setattr(data.shutil, "disk_usage", lambda _: free._replace(free=disk << 30))
        for workers in (0, 2):
            decoded.clear()
            line, tensors, found = two_epochs(odd_sizes, gb, workers)
            assert says in line, line
            assert len(tensors) == len(want) and all(map(torch.equal, tensors, want))
            sent = pickle.loads(pickle.dumps(found.train))          # as to a spawned process
            assert sent.kept is None and sent.names == found.train.names
            if workers == 0 and "are kept" in line:     # each file once
                assert sorted(decoded) == sorted({*decoded}) and len(decoded) == 2 * len(SIZES)
                assert os.listdir(tmp_path / "temp") == []
    demo = data.load("demo")
    assert data.keep_decoded(demo, data.transforms(32), 1) == "the images are in memory"


def test_data_short_side_is_never_enlarged():
    short = data.transforms(32)[1].prepare              # 37 = 32 * 256 / 224
    for w, h in SIZES:
        x = short(Image.new("RGB", (w, h)))             # (H, W, 3)
        assert tuple(x.shape) == (*short.shape(w, h), 3) and min(x.shape[:2]) == min(w, h, 37)
        assert x.shape[0] / x.shape[1] == pytest.approx(h / w, rel=0.02)


@pytest.mark.parametrize("gb", [0, 1, 1e-9])
def test_data_test_tensors_are_clips(odd_sizes, gb):
    found, preprocess = data.load(odd_sizes), clip_files._transform(32)
    views = data.transforms(32)
    data.keep_decoded(found, views, gb)
    for images in (found.train, found.test):
        for _ in range(2):                              # decoded, then kept
            for x, index in data.loader(images.view(views[0]), 4):
                for k, i in enumerate(index):
                    assert torch.equal(x[k], preprocess(images.image(i))), images.names[i]


def test_data_batches_are_not_overwritten(tmp_path):
    draw(tmp_path, [f"{k}.png" for k in range(16)])
    view = data.load(tmp_path, "a,b").train.view(*data.transforms(16)[1:])
    loader = data.loader(view, 2, shuffle=True)
    for hold in (lambda x: x, lambda x: x[0], lambda x: x.numpy(), lambda x: x.flatten()[5:9],
                 lambda x: x[1:].permute(0, 2, 3, 1)):
        batches = iter(loader)
        held = [hold(x) for x in next(batches)[:2]]     # of both views, and nothing else
        before = [torch.as_tensor(x).clone() for x in held]
        for _ in range(5):
            x = next(batches)
        assert all(torch.equal(torch.as_tensor(x), y) for x, y in zip(held, before))
    w, batches = torch.ones(3, 1, 1, requires_grad=True), iter(loader)
    x = next(batches)[0]
    want, loss = x.sum(dim=(0, 2, 3)), (x * w).sum()    # autograd holds x
    del x
    assert len(list(batches)) == 7
    loss.backward()
    assert torch.allclose(w.grad.flatten(), want, atol=1e-4)
    loader = data.loader(view, 2, shuffle=True)
    for _ in range(3):                                  # the memory is used again
        for x_weak, x_strong, _ in loader:
            pass
    assert len(loader.memory) <= 4
    for _ in range(2):
        assert len({x.data_ptr() for x, *_ in list(loader)}) == 8


# ======== data.py: .mat files, LLM-written prompts, candidate labels ========


def mutants(raw, n):
    """n variants of the bytes: some cut short, some with up to eight other bytes."""
    rng = random.Random(0)
    for _ in range(n):
        new = bytearray(raw[:rng.randrange(len(raw))] if rng.random() < 0.3 else raw)
        for _ in range(rng.choice([0, 1, 1, 2, 8])):
            if new:
                at = rng.randrange(len(new))
                new[at:at + rng.randrange(2)] = rng.choice([b'"', b",", b"[", b"\n", b"\xff", b"9",
                                                            bytes([rng.randrange(256)])])
        yield bytes(new)


# scipy.io.savemat of labels, class_names, annotations and x below, compressed
GOLDEN_MAT = base64.b64decode(
    "TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IFN1biBOb3YgMjIgMDI6MDc6Mz"
    "kgMjAyNgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAALwAA"
    "AHic42NgYLAAYjYg5gBiTgYIYIXyGYGYGUqD1OQkJqXmFDMwMAFFfRnTGAA7fgOiDwAAAHYAAAB4nONjYGDgYGRgYA"
    "PRQAxkggErEp8ZSnMDcXJOYnFxfF5ibmoxWB0fEAcwIPSzYNEvhWSuAJTv6KvgnpqXWpSYo+BRmpubWqQQHBqmYGRg"
    "YMAAN9eAgLmMKOYyMRxeCdFnQUAfO5p7QPygxFwFZ/0wBgDFFBH1DwAAAI4AAAB4nONjYGB4wMjAwAakOYCYiQECWK"
    "F8RqgYiOYG4sS8vPySxJLM/LxiqDoWuDoJIE5Kyq+IrzBkSM5JLAapSMtLzE0F0nxAbMGAsIcPiz0wDAI8UHF1KB+k"
    "3gBJPycB/UxAFh9UnwOSPhYs+jiR9AlA+QZAYKiXVZCOZD857tdhJN/9zBS63wjJ/QC1lhToDwAAACwAAAB4nONjYG"
    "BwAGI2IOaA0iDACuUzAjETmGZkqADSnEAswAADP+yhjAMAOMUC/Q==")


def test_mat(tmp_path):
    found = data.read_mat(written(tmp_path / "f.mat", GOLDEN_MAT))
    assert found == {"labels": [77, 1, 102], "x": [1.5, -2.0],
                     "class_names": ["AM General Hummer SUV 2000", "é", "Ram C/V"],
                     "annotations": [{"bbox_x1": [39], "class": [14], "fname": "00001.jpg"},
                                     {"bbox_x1": [300], "class": [3], "fname": "00002.jpg"}]}
    assert all(type(k) is int for k in found["labels"])
    numbers = {1: (-1, 2), 2: (1, 255), 3: (-300, 2), 4: (1, 65535), 5: (-70000, 2),
               6: (1, 2**32 - 1), 7: (0.5, -2), 9: (0.1, 2), 12: (-2**40, 2), 13: (1, 2**64 - 1)}
    arrays = [array(f"v{k}", 6, (1, 2), element(k, struct.pack(f"<2{data.MAT_NUMBERS[k]}", *v)))
              for k, v in numbers.items()]
    texts = {16: "né".encode(), 17: "né".encode("utf-16-le"), 4: "né".encode("utf-16-le"),
             2: b"n\xe9"}
    arrays += [array(f"t{k}", 4, (1, 2), element(k, raw)) for k, raw in texts.items()]
    arrays += [array("none", 6, (0, 0), b""), array("cells", 1, (1, 2),
                                                    element(14, b"") + matrix([7, 200]))]
    for pack in (bytes, compressed):
        found = data.read_mat(written(tmp_path / "f.mat", mat(*map(pack, arrays))))
        assert all(found[f"v{k}"] == list(v) for k, v in numbers.items())
        assert all(found[f"t{k}"] == "né" for k in texts)
        assert found["none"] == [] and found["cells"] == [[], [7, 200]]


def test_mat_errors(tmp_path):
    path, deep, two = tmp_path / "f.mat", matrix(7), element(2, b"\7\7")
    for _ in range(1500):
        deep = array("", 1, (1, 1), deep)
    for raw, why in (
            (b"", "expected version 5 to 7"), (b"\x89HDF" * 99, "save with -v7"),
            (mat(version=b"\1\0MI"), "little-endian"), (mat(version=b"\0\2IM"), "version 5 to 7"),
            (mat(deep), "recursion"), (mat(compressed(bytes(70 << 20))), "more than 64 MB"),
            (mat(compressed(matrix([1] * 99))[:-9]), "more bytes, got"),
            (mat(array("x", 6, (1, 3), element(9, bytes(16)))), "expected 3 numbers, got 2"),
            (mat(array("x", 2, (2**30, 4), b"")), "with 4294967296 elements is not read"),
            (mat(array("x", 5, (1, 1), two)), "class 5"),           # sparse
            (mat(array("x", 6, (1, 2), two, flags=8)), "class 6"),  # complex
            (mat(array("x", 8, (2, 1), two))[:-9], "expected 48 more bytes, got 39"),
            (mat(array("x", 1, (1, 1), b"")), "ends too early"),
            (mat(element(9, bytes(8))), "expected an array (type 14), got type 9")):
        message = refuses(written(path, raw), by=data.read_mat)
        assert message.startswith("f.mat: not a readable .mat file: ") and why in message, message
    plain = mat(matrix([{"a": [7, 200], "b": "hi"}], "s"))
    assert data.read_mat(written(path, plain)) == {"s": [{"a": [7, 200], "b": "hi"}]}
    for raw in (*mutants(plain, 200), *mutants(GOLDEN_MAT, 200)):
        try:
            data.read_mat(written(path, raw))
        except data.DataError as e:
            assert len(str(e).splitlines()) == 1


CLASSES = ["abyssinian", "Bengal cat", "beagle"]


def test_match_keys():
    def match(names, *keys):
        return data.match_keys(names, dict.fromkeys(keys).keys(), "f")
    # the same string, then any case and _, then the same words, then an alias
    assert match(["a_b", "B a", "x"], "A b", "b_A", "a_b") == {"a_b": "a_b", "B a": "b_A"}
    assert match(["dog house", "house dog"], "dog house") == {"dog house": "dog house"}
    for a, b in (("outdoor apartment_building", "apartment building (outdoor)"),
                 ("2000 AM General Hummer SUV", "AM General Hummer SUV 2000"),
                 ("yin_yang", "yin and yang symbol"), ("Handstand_Pushups", "Hand Stand Pushups"),
                 ("face", "centered face"), ("Sea or Lake", "lake or sea"), ("e\u0301", "\xe9"),
                 ("Ram C/V Cargo Van Minivan 2012", "Ram CV Cargo Van Minivan 2012"),
                 ("Herbaceous Vegetation Land", "brushland or shrubland")):
        assert match([a], b) == {a: b} and match([b], a) == {b: a}
    assert match(["?"], "!") == {}                      # no word in common
    assert match(["missile", "missile"], "missile") == {"missile": "missile"}
    assert refuses(["a b"], {"a B": 0, "A b": 0}.keys(), "f", by=data.match_keys) == (
        "f: class 'a b' fits two keys: 'A b', 'a B'")
    assert refuses(["C++", "C#"], {"c": 0}.keys(), "f", by=data.match_keys) == (
        "f: key 'c' fits two classes: 'C#' and 'C++'")
    assert all(len(group) > 1 for group in data.ALIASES)
    assert sum(map(len, data.ALIASES)) == len(set().union(*data.ALIASES))


@pytest.mark.parametrize("name, classes, each", [
    ("demo", 10, 10), ("oxford_pets", 37, 10), ("eurosat", 10, 10), ("dtd", 47, 10),
    ("cifar10", 10, 10), ("cifar100", 100, 5), ("oxford_flowers", 102, 5), ("food-101", 101, 5),
    ("caltech-101", 100, 5), ("ucf101", 101, 5), ("fgvc_aircraft", 100, 5)])
def test_our_prompts(name, classes, each):
    table = json.loads((Path(data.__file__).parent / "prompts" / f"{name}.json").read_text())
    assert len(table) == classes and {len(texts) for texts in table.values()} == {each}
    texts = [text for group in table.values() for text in group]
    assert len({text.lower() for text in texts}) == len(texts)      # each written for its class
    clip.tokenize(texts)                                            # each fits into 77 tokens
    assert all(7 <= len(text.split()) <= 30 and text.endswith(".") for text in texts)
    openings = {tuple(text.lower().split()[:4]) for text in texts}
    assert len(openings) > 0.8 * len(texts)                         # no fill-in template
    if name in ("demo", "oxford_flowers"):
        assert list(table) == (FLOWERS if name == "oxford_flowers" else list(shapes.SHAPES))


def test_prompts_of_a_file(tmp_path, capsys):
    long = " ".join(f"word{k}" for k in range(60))      # two or three tokens each
    path = written(tmp_path / "f.json", "\ufeff" + json.dumps({
        "Abyssinian": ["  a\n slim  cat ", "", "a slim cat", "a \ud800 cat"],
        "bengal_cat": [long, f"{long} x"], "beagle": [" "], "poodle": ["x"]}))
    prompts, line = data.load_prompts(path, [*CLASSES, "abyssinian"], "a {}.")
    assert prompts[0] == prompts[3] == ["a slim cat", "a \\ud800 cat"]
    assert prompts[2] == ["a beagle."] and len(prompts[1]) == 1
    n = len(prompts[1][0].split())                      # as many words as fit into 77 tokens
    assert long.startswith(prompts[1][0]) and n > 20
    with pytest.raises(RuntimeError, match="too long"):
        clip.tokenize(" ".join(long.split()[:n + 1]))
    assert line == ("f.json: 1 to 2 sentences for 3 of 4 classes, 2 of them cut to 77 tokens, "
                    "1 of 4 keys fit no class")
    assert capsys.readouterr().err == (
        f'warning: {path} has no sentences for 1 of 4 classes, they get "a {{}}.": beagle\n')
    written(path, [["a"], ["b", "b", "c"], []])         # in label order
    prompts, line = data.load_prompts(path, CLASSES, "{}")
    assert prompts == [["a"], ["b", "c"], ["beagle"]]
    assert line == "f.json: 1 to 2 sentences for 2 of 3 classes"
    written(path, [["x" * 9000 + " y"], ["b"], ["c"]])  # nothing of it fits
    assert data.load_prompts(path, CLASSES, "{}")[0][0] == ["abyssinian"]


def test_prompt_errors(tmp_path):
    path = tmp_path / "f.json"
    for content, why in (
            (b'{"a": ["\xff"]}', "f.json: expected UTF-8 text"),
            ('{"a":\n [1 2]}', "f.json is not valid JSON: Expecting ',' delimiter: line 2 column"),
            ("[" * 99999, "f.json is not valid JSON: "), ("3", "f.json: expected {class name: "),
            ('{"a": ["x"], "a": ["y"]}', "f.json: key 'a' is given twice"),
            ({"a\n": "x"}, r"f.json: 'a\n': expected a list of strings, got "),
            ({"beagle": ["x", None]}, "f.json: 'beagle'[1]: expected a string, got null"),
            ([["x"], {}, []], "f.json: 1: expected a list of strings, got {}"),
            ([["x"], [True]], "f.json: 1[0]: expected a string, got true"),
            ([["x"]], "f.json: expected 3 lists, one for each class, got 1"),
            ({}, "f.json: no sentences for classes like 'abyssinian'; its keys: none"),
            ([[], [], [""]], "f.json: no sentences for classes like 'abyssinian'"),
            ({"x": ["y"]}, "f.json: no sentences for classes like 'abyssinian'; its keys: 'x'")):
        message = refuses(written(path, content), CLASSES, "{}", by=data.load_prompts)
        assert why in message, message
    assert "No such file" in refuses(tmp_path / "no", CLASSES, "{}", by=data.load_prompts)
    assert str(tmp_path) in refuses(tmp_path, CLASSES, "{}", by=data.load_prompts)


def test_drawn_candidates():
    N, C, q = 4000, 10, 0.3
    y, before = torch.arange(N) % C, torch.get_rng_state()
    sets = data.flip_candidates(y, C, q, 1)
    assert sets.shape == (N, C) and sets.dtype == torch.bool and sets[torch.arange(N), y].all()
    wrong = torch.ones(N, C, dtype=torch.bool).scatter(1, y[:, None], False)
    assert abs(sets[wrong].float().mean() - q) < 0.01               # its deviation is 0.0024
    assert torch.equal(sets, data.flip_candidates(y, C, q, 1))
    assert not torch.equal(sets, data.flip_candidates(y, C, q, 2))
    assert data.flip_candidates(y, C, 1, 0).all() and data.flip_candidates(y, C, 0, 0).sum() == N
    for p in (torch.full((N, C), 0.1), F.one_hot(y, C).float()):    # no preference, nothing left
        assert torch.equal(sets, data.hard_candidates(p, y, q, 1))
    p = torch.tensor([0.4, 0.3, 0.2, 0.1]).repeat(N, 1)             # y = 0: q (C-1) p / 0.6
    zeros = torch.zeros(N, dtype=torch.long)
    share = data.hard_candidates(p, zeros, 0.5, 0).float().mean(dim=0)
    assert share[0] == 1 and (share - torch.tensor([1, 0.75, 0.5, 0.25])).abs().max() < 0.035
    capped = data.hard_candidates(p, zeros, 0.9, 0).float().mean(dim=0)
    assert capped[1] == 1 and abs(capped[2] - 0.9) < 0.03           # 1.35 is capped at 1
    assert torch.equal(before, torch.get_rng_state())
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"q in \[0, 1\]"):
            data.flip_candidates(y, C, bad, 0)
    three = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 0]]).bool()
    assert data.describe_candidates(three) == "1.7 candidate labels an image (1 to 3)"
    assert data.describe_candidates(three, torch.tensor([0, 2, 0])).endswith(
        ", the true one among them for 66.67 %")


PHOTOS = data.Images(["cat/1.jpg", "dog/1.jpg", "dog/2.jpg", "x/3.jpg"], [1, 0, 1, 0])
CSV = ("\ufeffImage,labels\r\n./cat\\1.jpg,bengal_CAT|2\r\n\r\ndog/1.jpg,0,beagle,\r\n"
       '"far/x/3.jpg",1;2;\r\n')


@pytest.mark.parametrize("content, classes, want, says", [
    (CSV + "dog/9.jpg,0", CLASSES, "011 101 111 011", "; 1 of 4 images have no entry: all classes"
     "; entries of images not here: 1"),
    (CSV.replace(",", ";"), CLASSES, "011 101 111 011", "; 1 of 4 images have no entry"),
    ("path,Beagle,abyssinian,bengal cat\n1.jpg,1,1,1\ndog/2.jpg,0,1,0\n3.jpg,1,0,1", CLASSES,
     "111 111 100 011", "(1 to 3), the true one among them for 50.00 %; 2 of 4"),
    ({"cat/1.jpg": [1, "beagle"], "dog/1.jpg": ["2", "ABYSSINIAN"], "3.jpg": [1, 2],
      "./dog/2.jpg": [0, 1, 2]}, CLASSES, "011 101 111 011",
     "2.2 candidate labels an image (2 to 3), the true one among them for 75.00 %"),
    ("dog/1.jpg,2\n1.jpg,0", ["2", "1", "0"], "111 100 111 111", "entries of images not here: 1"),
    ("3.jpg,missile", ["missile", "a", "missile"], "111 111 111 101", ""),  # both of the name
    ({"dog/1.jpg": [0], "dog/2.jpg": ["1"], "x/3.jpg": [1]}, ["1", "a"], "11 10 10 01", ""),
    ("dog/1.jpg,a|b\nfile,0\nu/3.jpg,1\n1.jpg,a", ["a|b", "1", "a"], "111 100 111 111",
     "entries of images not here: 3"),               # `file` later is no header; two 1.jpg
    ("img_path\tlabels\ndog/1.jpg\t0|2", CLASSES, "111 101 111 111", "3 of 4 images"),
])
def test_read_candidates(tmp_path, content, classes, want, says):
    path = tmp_path / ("f.json" if isinstance(content, dict) else "f.csv")
    sets, line = data.read_candidates(written(path, content), PHOTOS, classes)
    assert sets.dtype == torch.bool and says in line and line.startswith(path.name), line
    assert " ".join("".join(map(str, row)) for row in sets.int().tolist()) == want


def test_candidate_errors(tmp_path):
    for content, why in (
            ("cat/1.jpg,0\ncat/1.jpg,1", "f.csv line 2: 'cat/1.jpg' occurs twice, with different"),
            ("path,class\n\ncat/1.jpg, ", "f.csv line 3: expected at least one candidate class"),
            ('a,0\n"b\nc",0\nd,beagel', "f.csv line 4: unknown class 'beagel', the closest is "
             "'beagle'"),
            ("cat/1.jpg,3", "f.csv line 1: expected class indices from 0 to 2, got 3"),
            ("cat/1.jpg,0,1,1", "f.csv line 1: rows of 0 and 1 need a first line `image,CLASS,CLA"),
            ("cat/1.jpg,0\n/y/cat/1.jpg,1", "f.csv: '/y/cat/1.jpg' and 'cat/1.jpg' are one image"),

            ("cat/1.jpg," + "9" * 5000, "f.csv line 1: unknown class '999"),
            ('cat/1.jpg,"x', "f.csv line 1: not a row of a CSV file"),
            ("path,beagle,abyssinian\n1.jpg,1", "f.csv line 2: expected 2 cells with 0 or 1"),
            ("path,beagle,abyssinian\n1.jpg,1,2", "f.csv line 2: expected 2 cells with 0 or 1"),
            ({"cat/1.jpg": [-1]}, "'cat/1.jpg': expected class indices from 0 to 2, got -1"),
            ({"cat/1.jpg": [True]}, "f.json: 'cat/1.jpg': unknown class True"),
            ({"cat/1.jpg": "0"}, "f.json: 'cat/1.jpg': expected a list of classes, got \"0\""),
            ({"cat/1.jpg": []}, "f.json: 'cat/1.jpg': expected at least one candidate class"),
            ([[0]], "f.json: expected {image: [class, ...]}, got [[0]]"),
            ({"1.jpg": [0]}, "f.json: none of its 1 images is among the 4 here; expected names "
             "like 'cat/1.jpg', got '1.jpg'"),
            ("", "f.csv: none of its 0 images"), (b"\xff,0", "f.csv: expected UTF-8 text")):
        path = tmp_path / ("f.csv" if isinstance(content, (str, bytes)) else "f.json")
        message = refuses(written(path, content), PHOTOS, CLASSES, by=data.read_candidates)
        assert message.startswith(str(tmp_path)) and why in message, message
    path = written(tmp_path / "f.json", '{"cat/1.jpg": [0], "cat/1.jpg": [1]}')
    assert "'cat/1.jpg' is given twice" in refuses(path, PHOTOS, CLASSES, by=data.read_candidates)


def test_mutated_text(tmp_path):
    prompts = {"beagle": ["one dog.", "two " * 90, "a \ud800"], "Bengal_cat": ["a cat"]}
    sets = {"cat/1.jpg": ["beagle", "Bengal\u2028cat"], "dog/2.jpg": [0, 1]}
    for content, name, read_file in (
            (json.dumps(prompts), "p.json", lambda p: data.load_prompts(p, CLASSES, "a {}.")),
            (json.dumps(sets), "c.json", lambda p: data.read_candidates(p, PHOTOS, CLASSES)),
            (CSV, "c.csv", lambda p: data.read_candidates(p, PHOTOS, CLASSES)),
            ("# x\nAbyssinian\nBengal_cat\nbeagle\n", "k.txt", lambda p: (data.class_list(p) * 2)[:2])):
        for raw in (*mutants(content.encode(), 200), content.encode("utf-16"), b"", b"\0" * 99,
                    content.encode("utf-16-le"), content.replace("\n", "\r\n").encode(),
                    *(content.replace("one dog.", x).replace("beagle", x).encode() for x in
                      ("x" * 10**5, "NaN", '"' + "[" * 500, "9" * 5000, "\x1b[2J", "\u202e"))):
            try:
                assert len(read_file(written(tmp_path / name, raw))) == 2
            except data.DataError as e:
                assert len(str(e).splitlines()) == 1 and name in str(e) and len(str(e)) < 3000
                assert str(e).isprintable()


def test_large_text(tmp_path):
    """Nothing is quadratic, or waits for a pipe."""
    rng, path, start = random.Random(0), tmp_path / "f.json", time.perf_counter()
    long = "".join(rng.choices("etaoinsrhldcum", k=10**6))
    assert data.load_prompts(written(path, {"a": [long, "x"]}), ["a"], "{}")[0] == [["x"]]
    written(path, {"a": ["x"], **{f"key {k}": ["x"] for k in range(10**4)}})
    assert data.load_prompts(path, ["a"], "{}")[0] == [["x"]]
    written(path, "\n```" * 10**5)
    refuses(path, ["a"], "{}", by=data.load_prompts)
    images = data.Images([f"scene{k}/frame.jpg" for k in range(3000)])      # one file name
    path = written(tmp_path / "f.csv", [f"/x/scene{k}/frame.jpg,1" for k in range(1, 3000)])
    assert data.read_candidates(path, images, ["a", "b"])[0].sum() == 3001
    refuses(written(path, "a/" * 10**6 + "x.jpg,0"), images, ["a", "b"], by=data.read_candidates)
    assert time.perf_counter() - start < 60
    os.mkfifo(tmp_path / "pipe")
    for by in (data.load_prompts, data.read_candidates):
        assert "is not a plain file" in refuses(tmp_path / "pipe", PHOTOS, ["a", "b"], by=by)


def test_mutated_lists(ram, capsys):
    for name, file in (("pets oxford_pets", "annotations/trainval.txt"),
                       ("food food-101", "meta/classes.txt"),
                       ("dtd dtd", "labels/train1.txt"),
                       ("flowers flowers-102", "setid.mat")):
        root = ram / letters(name) / miniature(ram / letters(name), name).home
        whole = (root / file).read_bytes()
        for raw in (*mutants(whole, 25), b"", b"\xef\xbb\xbf" + whole, whole + whole,
                    whole.replace(b"1", b"9" * 5000), whole.decode("latin-1").encode("utf-16")):
            written(root / file, raw)
            try:
                assert data.load(root).description.isprintable()
            except data.DataError as e:
                said = str(e).split("Expected one of")[0]
                assert len(said.splitlines()) == 1 and len(said) < 3000
    root = ram / "numbers" / miniature(ram / "numbers", "flowers flowers-102").home
    sets = data.read_mat(root / "setid.mat")
    for odd in (math.nan, math.inf, -1.0, 0.0, 1e300):
        rows = [[odd, *map(float, v[1:])] if k == "trnid" else v for k, v in sets.items()]
        arrays = [array(k, 6, (1, len(v)), element(9, struct.pack(f"<{len(v)}d", *v)))
                  for k, v in zip(sets, rows)]
        written(root / "setid.mat", mat(*arrays))
        assert "setid.mat: expected labels" in refuses(root)


def test_few_shot():
    names = [f"{k % 3}/{k}.jpg" for k in range(30)] + ["3/a.jpg"]
    y = torch.tensor([k % 3 for k in range(30)] + [3])
    images, before = data.Images(names, y), random.getstate()
    picked = data.few_shot(images, 4, 1)
    assert picked == sorted(set(picked)) and y[picked].bincount().tolist() == [4, 4, 4, 1]
    other = data.Images(names[::-1], y.flip(0))         # found in another order
    assert {other.names[i] for i in data.few_shot(other, 4, 1)} == {names[i] for i in picked}
    assert picked != data.few_shot(images, 4, 2) and data.few_shot(images, 99, 1) == [*range(31)]
    assert random.getstate() == before
    assert "no labels" in refuses(data.Images(names), 4, 1, by=data.few_shot)


# ======== data.py: python data.py ========


def test_data_main(tmp_path, capsys):
    class_folders(tmp_path / "a")
    sheet, names = tmp_path / "sheet.png", ["bear", "cat", "dog"]
    prompts = written(tmp_path / "p.json", {c: [f"the {c}"] for c in names})
    sets = written(tmp_path / "s.csv", "bear/000.png,cat|bear\n")
    args = [str(tmp_path / "a"), "--classes", "bear,cat,dog", "--sheet", str(sheet)]
    assert data.main(args) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("class folders") and out[1] == "classes: bear, cat, dog"
    assert out[2] == "prompts: a photo of a bear."
    assert len(out) == 16 and Image.open(sheet).size[1] == 18 + 3 * 56
    sheet.unlink()
    d = data.load(tmp_path / "a")
    assert "bear/000.png" in d.train.names
    assert data.main([*args, "--shots", "2", "--seed", "3", "--prompts", str(prompts),
                      "--candidates", str(sets), "--template", "ensemble"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[2].startswith("prompts: a photo of a bear. | itap of a bear. | ")
    assert out[3] == "p.json: 1 to 1 sentences for 3 of 3 classes"
    assert out[4].startswith("s.csv: ") and out[4].endswith(
        f"; {len(d.train) - 1} of {len(d.train)} images have no entry: all classes")
    few = d.train.subset(data.few_shot(d.train, 2, 3))
    assert out[5] == f"--shots 2 --seed 3: {len(few)} training images" and len(few) <= 6
    shown = [line.split()[1:] for line in out if re.match(r"train  (bear|cat|dog) ", line)]
    assert len(shown) == 5 and {name for _, name in shown} <= set(few.names)
    assert all(name.startswith(label) for label, name in shown)
    assert out[-1] == f"contact sheet: {sheet}" and Image.open(sheet).size[0] > 800
    for wrong in ([str(tmp_path / "nowhere")], [*args, "--prompts", str(sets)],
                  [*args, "--sheet", str(tmp_path / "no" / "x.png")]):
        assert data.main(wrong) == 2
        assert capsys.readouterr().err.startswith("error: ")


def test_data_main_of_unlabelled_images(tmp_path, capsys):
    draw(tmp_path, ["1.jpg", "2.jpg"])
    args = [str(tmp_path), "--classes", "a,b", "--sheet", str(tmp_path / "sheet.png")]
    assert data.main(args) == 0 and (tmp_path / "sheet.png").is_file()
    out = capsys.readouterr().out.splitlines()
    assert out[3:-1] == [f"train  ?                     {k}.jpg" for k in (1, 2)]
    assert data.main([*args, "--shots", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --shots: ")


def test_data_speed(tmp_path, capsys):
    class_folders(tmp_path, 8)
    assert data.main([str(tmp_path), "--speed"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch("test tensors of [0-9]+ images are bit for bit CLIP's: True", out[-1])
    assert [line.split(":")[0] for line in out[2:-1]] == [
        f"{name:5} epoch {k}" for name in ("plain", "here") for k in (1, 2, 3)]


# ======== the demo ========


def test_demo_pictures():
    images, y = shapes.pictures("narrow", "test")
    d = data.load("demo")                                           # that is the default style
    assert y == d.test.y_true.tolist()
    assert all(a.tobytes() == d.test.image(i).tobytes() for i, a in enumerate(images))
    assert d.class_names == list(shapes.SHAPES) and [y.count(k) for k in range(10)] == [100] * 10
    other, y_train = shapes.pictures("narrow", "train")
    assert len(other) == 2000 and y_train[:1000] != y
    assert not {im.tobytes() for im in images} & {im.tobytes() for im in other}
    _, y = shapes.pictures("longtail", "test")                      # ten circles for one diamond
    counts = [y.count(k) for k in range(10)]
    assert counts == sorted(counts)[::-1] and 9 < counts[0] / counts[9] < 11
    with pytest.raises(data.DataError, match="demo:nice: unknown style, expected one of source, "):
        data.load("demo:nice")


def test_every_style_draws_every_shape():
    for name, style in shapes.STYLES.items():
        drawn = [shapes.draw(shape, style, random.Random(0))[0] for shape in shapes.SHAPES]
        assert all(im.size == (32, 32) and im.mode == "RGB" for im in drawn)
        assert len({im.tobytes() for im in drawn}) == 10, name


@torch.no_grad()
def test_tiny_knows_the_source():
    model, preprocess = clip.load("tiny")
    images, y = shapes.pictures("source", "test")
    text = model.encode_text(clip.tokenize([f"a photo of a {c}." for c in shapes.SHAPES]))
    text = F.normalize(text, dim=1)
    f = model.encode_image(torch.stack([preprocess(im) for im in images[:300]]))
    right = (F.normalize(f, dim=1) @ text.T).argmax(1) == torch.tensor(y[:300])
    assert right.float().mean() > 0.8, right.float().mean()
    assert (Path(clip.__file__).parent / "tiny.pt").stat().st_size < 2e6


# ======== coft.py: equations ========


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def test_eq_1_3_4_posterior_logits_p_clean():
    torch.manual_seed(0)
    f, t, t_neg, tau = unit(4, 8), unit(3, 8), unit(3, 8), torch.tensor(7.0)
    p, (l_pos, l_neg) = coft.posterior(f, t, tau), coft.logits(f, t, t_neg, tau)
    clean, unclean = coft.log_p_clean(l_pos, l_neg)
    for b in range(4):
        e = [math.exp(7 * sum(f[b, d].item() * t[k, d].item() for d in range(8))) for k in range(3)]
        for k in range(3):
            a, n = (7 * float(f[b] @ w[k]) for w in (t, t_neg))
            assert p[b, k].item() == pytest.approx(e[k] / sum(e), rel=1e-4)
            assert (l_pos[b, k].item(), l_neg[b, k].item()) == pytest.approx((a, n), abs=1e-5)
            assert clean[b, k].exp().item() == pytest.approx(sigmoid(a - n), rel=1e-4)
            assert unclean[b, k].exp().item() == pytest.approx(1 - sigmoid(a - n), rel=1e-4)
    far = torch.tensor([[500.0]])                                   # no overflow
    assert coft.log_p_clean(-far, far)[0].item() == -1000


def test_eq_2_pseudo_labels():
    p0 = torch.tensor([[.9, .1, .0], [.6, .3, .1], [.7, .1, .2], [.2, .8, .0], [.1, .7, .2],
                       [.45, .15, .4]])
    y, high = coft.pseudo_labels(p0, 0.4)               # ceil(6 * .4 / 3) = 1 of each class
    assert y.tolist() == [0, 0, 0, 1, 1, 2]             # nobody's class 2 takes its likeliest image
    assert high.tolist() == [True, False, False, True, False, True]
    y, high = coft.pseudo_labels(p0[:5, :2], 0.7)       # ceil(5 * .7 / 2) = 2 of each class
    assert y.tolist() == [0, 0, 0, 1, 1] and high.tolist() == [True, False, True, True, True]
    assert coft.pseudo_labels(p0[:, :2], 1.0)[1].sum() == 5         # three of four, two of two
    p0 = torch.tensor([[.6, .1, .3], [.5, .1, .4], [.1, .5, .45], [.55, .2, .25]])
    y, high = coft.pseudo_labels(p0, 0.75)              # class 2 may not take class 1's only image
    assert set(y.tolist()) == {0, 1, 2} and set(y[high].tolist()) == {0, 1, 2}


def test_eq_5_6_losses():
    torch.manual_seed(0)
    l_pos, l_neg = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    y, keep = torch.tensor([0, 3, 1, 2, 2]), torch.tensor([True, False, True, True, False])
    a, n = l_pos.tolist(), l_neg.tolist()
    each = [math.log(sum(map(math.exp, a[b]))) - a[b][y[b]] for b in range(5)]
    assert coft.loss_cls(l_pos, y, keep).item() == pytest.approx((each[0] + each[2] + each[3]) / 3)
    nothing = coft.loss_cls(l_pos, y, torch.zeros(5, dtype=torch.bool))
    grad, = torch.autograd.grad(nothing, l_pos)
    assert nothing.item() == 0 and torch.equal(grad, torch.zeros(5, 4))
    y_bar = torch.tensor([1, 0, 0, 3, 1])
    each = [-math.log(sigmoid(a[b][y[b]] - n[b][y[b]]))
            - math.log(1 - sigmoid(a[b][y_bar[b]] - n[b][y_bar[b]])) for b in range(5)]
    assert coft.loss_neg(l_pos, l_neg, y, y_bar).item() == pytest.approx(sum(each) / 5, rel=1e-5)


def test_complementary_labels():
    torch.manual_seed(0)
    p = torch.tensor([[.5, .3, .2, .0]]).expand(20_000, -1)
    y = torch.zeros(20_000, dtype=torch.long)
    y_bar = coft.complementary_labels(p, y)
    share = torch.bincount(y_bar, minlength=4) / 20_000
    assert share[0] == 0 and torch.allclose(share, torch.tensor([0, .6, .4, .0]), atol=0.02)
    sure = F.one_hot(torch.arange(4)).float()                       # nothing left without y
    assert (coft.complementary_labels(sure, torch.arange(4)) != torch.arange(4)).all()


def test_eq_8_9_align_fairness_mean():
    p = torch.tensor([[.8, .2], [.4, .6]])                          # means .6, .4
    a, b = (.8 / .6, .2 / .4), (.4 / .6, .6 / .4)
    want = torch.tensor([[a[0] / sum(a), a[1] / sum(a)], [b[0] / sum(b), b[1] / sum(b)]])
    assert torch.allclose(coft.align(p), want) and torch.allclose(coft.align(p, 0.0), p)
    assert coft.fairness(p.log()).item() == pytest.approx(-(math.log(.6) + math.log(.4)) / 2)
    assert torch.isfinite(coft.fairness(torch.tensor([[1000.0, 0.0]])))
    assert torch.allclose(coft.mean_prediction(torch.stack([p, p.flip(1)])), torch.full((2, 2), .5))


def test_accuracy_and_auroc():
    p = torch.eye(3)
    assert coft.accuracy(p, torch.tensor([0, 1, 1])) == 66.67 and coft.accuracy(p, None) is None
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        score = torch.randint(8, (60,), generator=g) / 8            # many ties
        right = torch.rand(60, generator=g) < 0.6
        pairs = [(a > b) + (a == b) / 2
                 for a in score[right].tolist() for b in score[~right].tolist()]
        assert data.auroc(score, right) == pytest.approx(sum(pairs) / len(pairs), abs=1e-4)
    assert data.auroc(score, torch.ones(60, dtype=torch.bool)) is None


def test_verdicts_come_from_the_peer():
    p = torch.tensor([[[.9, .1], [.6, .4], [.3, .7]], [[.2, .8], [.7, .3], [.4, .6]]])
    p_clean = torch.tensor([[[.9, .9], [.2, .9], [.9, .4]], [[.1, .6], [.8, .1], [.9, .9]]])
    y0, high = torch.tensor([0, 0, 1]), torch.tensor([True, False, True])

    def verdict(*args, **how):
        y, keep = coft.verdicts(*args, **how)
        return y.tolist(), keep.int().tolist()
    assert verdict(1, p, p_clean, y0, high) == ([[0, 0, 1]] * 2, [[0, 0, 1], [1, 0, 0]])
    assert verdict(2, p, p_clean, y0, high) == ([[1, 0, 1], [0, 0, 1]], [[1, 1, 1], [1, 0, 0]])
    assert verdict(2, p, p_clean, y0, high, threshold=.65) == (
        [[1, 0, 1], [0, 0, 1]], [[1, 1, 0], [1, 0, 1]])
    assert verdict(2, p, p_clean, y0, high, peers=(0, 1)) == (
        [[0, 0, 1], [1, 0, 1]], [[1, 0, 0], [1, 1, 1]])


# ======== coft.py: modules and gradients ========

NAMES = ["cat", "golden retriever", "x"]


@pytest.fixture(scope="module")
def frozen():
    """The demo's CLIP, as coft.py has it."""
    return clip.load("tiny")[0].requires_grad_(False)


@pytest.mark.parametrize("template", ["a photo of a {}.", "a photo of a {}, a type of pet.",
                                      "itap of my {}", "{}", "{} in the wild."])
def test_prompt_starts_at_zero_shot(vit, template):
    words = template if not template.startswith("{}") else "a photo of a " + template
    want = F.normalize(vit.encode_text(clip.tokenize([words.format(c) for c in NAMES])), dim=-1)
    for own in (False, True):
        prompt = coft.Prompt(vit, NAMES, template, noise=0, of_its_own=own)
        assert prompt.V.shape[0] == (3 if own else 1)
        assert torch.allclose(prompt(vit), want, atol=1e-5)
        noisy = coft.Prompt(vit, NAMES, template, noise=0.1, of_its_own=own)
        assert not torch.allclose(noisy(vit), want, atol=1e-4)


@pytest.mark.parametrize("peft", ["lora", "adapter"])
def test_adapters_start_at_clip(vit, resnet, peft):
    for model in (vit, resnet) if peft == "adapter" else (vit,):
        x = golden_images(2, model.visual.input_resolution)
        me = coft.Model(model, NAMES, data.TEMPLATE, f"{peft}:4")
        assert torch.allclose(me.features(model, x), F.normalize(model.encode_image(x), dim=-1),
                              atol=1e-6)
        me.features(model, x)[:, 0].sum().backward()
        assert any(v.grad is not None and v.grad.any() for v in me.adapters.parameters())


@pytest.mark.parametrize("peft", ["vpt", "lora", "adapter"])
def test_unfreeze_keeps_features_and_classifier(frozen, peft):
    me, x = coft.Model(frozen, NAMES, data.TEMPLATE, f"{peft}:4"), golden_images(2, 32)
    for v in me.parameters():
        v.data += 0.01 * torch.randn_like(v)
    f, t = me.features(frozen, x), me.text(frozen)
    me.unfreeze(frozen)
    assert torch.equal(me.features(frozen, x), f)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(me.text(frozen), t))
    me.visual.proj.data.zero_()                                     # its own copy
    assert frozen.visual.proj.any()


def gradients(frozen, me, loss):
    """Which parts of the model this loss trains."""
    me.zero_grad()
    loss.backward()
    assert all(v.grad is None for v in frozen.parameters())         # CLIP itself is frozen
    parts = {"V+": [me.pos.V], "V-": [me.neg.V], "prompts": [me.prompts],
             "visual": (me.visual or torch.nn.Module()).parameters(), "classifier": [me.classifier]}
    return {name for name, values in parts.items()
            if any(v is not None and v.grad is not None and v.grad.any() for v in values)}


def test_gradients(frozen):
    torch.manual_seed(0)
    me, x = coft.Model(frozen, shapes.SHAPES, data.TEMPLATE, "vpt:4"), golden_images(6, 32)
    y, y_bar = torch.arange(6), torch.arange(1, 7)
    all_, none = torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)

    def phase1(keep, lam, balance=0.0):
        return coft.phase1_loss(frozen, me, x, y, keep, y, y_bar, lam, balance, nullcontext)

    def phase2(keep, balance):
        return coft.phase2_loss(frozen, me, x, y, keep, y, y_bar, 1.0, balance, nullcontext)
    l_cls, l_neg = phase1(all_, 0.0).item(), phase1(none, 1.0).item()
    assert phase1(all_, 0.5).item() == pytest.approx(l_cls + 0.5 * l_neg, rel=1e-5)      # Eq. 7
    assert gradients(frozen, me, phase1(all_, 0.0)) == {"V+", "prompts"}
    assert gradients(frozen, me, phase1(none, 1.0)) == {"V-", "prompts"}
    assert gradients(frozen, me, phase1(all_, 0.0, balance=1.0)) == {"V+", "prompts"}
    assert not gradients(frozen, me, phase1(none, 0.0, balance=1.0))    # fairness alone: left out
    me.unfreeze(frozen)
    for balance in (0.0, 1.0):                          # L_neg alone: a spectator, only t- learns
        assert gradients(frozen, me, phase2(none, balance)) == {"classifier"}
        grad_pos, grad_neg = me.classifier.grad
        assert not grad_pos.any() and grad_neg.any()
    assert gradients(frozen, me, phase2(all_, 0.0)) == {"visual", "classifier", "prompts"}
    assert me.classifier.grad[0].any()
    assert phase2(all_, 1.0) > phase2(all_, 0.0)


def test_ema_update():
    teacher, student = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    want = 0.9 * teacher.weight + 0.1 * student.weight
    coft.ema_update(teacher, student, 0.9)
    assert torch.allclose(teacher.weight, want)
    coft.ema_update(teacher, student, 0.0)
    assert torch.equal(teacher.weight, student.weight)


# ======== coft.py: runs ========

SHORT = ["--device", "cpu", "--batch-size", "32", "--epochs1", "2", "--epochs2", "2"]


def run(out, *args):
    """Exit status of `python coft.py ARGS --out OUT`."""
    return coft.main([*SHORT, "--out", str(out), *map(str, args)])


def read(out):
    """The lines of log.jsonl, the rows of predictions.csv, the contents of model.pt."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    with open(out / "predictions.csv", newline="") as file:
        rows = list(csv.reader(file))
    return lines, rows, torch.load(out / "model.pt", weights_only=True)


def same_result(a, b):
    (_, rows_a, a), (_, rows_b, b) = read(a), read(b)
    assert rows_a == rows_b and a["models"].keys() == b["models"].keys()
    assert all(torch.equal(v, b["models"][k]) for k, v in a["models"].items())


@pytest.fixture(scope="module")
def drawn():
    """{part: (pictures, labels, names)}: the first 100 and 50 pictures of the demo."""
    parts = {part: shapes.pictures("narrow", part) for part in ("train", "test")}
    return {part: (pictures[:n], y[:n])
            for (part, (pictures, y)), n in zip(parts.items(), (100, 50))}


@pytest.fixture
def little(drawn, monkeypatch):
    """The demo is its first 150 pictures."""
    monkeypatch.setattr(shapes, "pictures", lambda name, part: drawn[part])


@pytest.mark.parametrize("peft", ["vpt", "lora", "adapter"])
def test_run_folder(little, drawn, tmp_path, peft, monkeypatch, capsys):
    tiny, loaded, load = Path(clip.__file__).with_name("tiny.pt"), [], clip.load
    before = tiny.read_bytes()
    monkeypatch.setattr(clip, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0])
    assert run(tmp_path / "run", "--peft", peft, "--max-steps", 4) == 0
    assert sorted(os.listdir(tmp_path / "run")) == ["args.json", "last.pt", "log.jsonl", "model.pt",
                                                    "predictions.csv", "pseudo_labels.png"]
    (first, *epochs, last), (header, *rows), saved = read(tmp_path / "run")
    assert first == json.loads((tmp_path / "run" / "args.json").read_text())
    assert first["peft"].split(":")[0] == peft and first["max_steps"] == 4 and first["seed"] == 0
    assert [(e["phase"], e["epoch"]) for e in epochs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for e in epochs:
        assert math.isfinite(e["loss"]) and 0 <= e["kept"] <= 1 and 0 <= e["accuracy"] <= 100
        assert {"precision", "auroc", "images_per_second", "peak_memory_gb"} <= e.keys()
    assert last.keys() >= {"zero_shot", "accuracy", "seconds", "images_per_second",
                           "peak_memory_gb"}
    assert header == ["path", "class", "confidence", "p_clean"]
    assert [row[0] for row in rows] == [f"test/{i:05d}.png" for i in range(50)]
    assert all(row[1] in shapes.SHAPES and 0 <= float(v) <= 1 for row in rows for v in row[2:])
    right = [shapes.SHAPES[k] == row[1] for k, row in zip(drawn["test"][1], rows)]
    assert last["accuracy"] == pytest.approx(100 * sum(right) / 50)
    assert f"accuracy {last['accuracy']:.2f} %" in capsys.readouterr().out.splitlines()[-1]
    assert Image.open(tmp_path / "run" / "pseudo_labels.png").size[0] > 200
    assert saved["class_names"] == list(shapes.SHAPES)
    model, untouched = loaded[0][0], load("tiny")[0]                # CLIP is as it was
    assert tiny.read_bytes() == before
    assert all(torch.equal(v, untouched.state_dict()[k]) for k, v in model.state_dict().items())
    models = torch.nn.ModuleList(coft.Model(untouched, shapes.SHAPES, data.TEMPLATE, first["peft"])
                                 for _ in range(2))                 # model.pt is what predicted
    for me in models:
        me.unfreeze(untouched)
    fresh = {k: v.clone() for k, v in models.state_dict().items()}
    models.load_state_dict(saved["models"])
    moved = {k for k, v in fresh.items() if not torch.equal(v, saved["models"][k])}
    assert moved >= {f"{m}.{k}" for m in (0, 1) for k in ("pos.V", "neg.V", "visual.proj",
                                                          "classifier")}
    batches = [(torch.stack([loaded[0][1](im) for im in drawn["test"][0]]), torch.arange(50))]
    p, p_clean = coft.judge(untouched, models, batches, 50, nullcontext)
    p, p_clean = p.mean(0), p_clean.mean(0)
    for i, row in enumerate(rows):
        k = shapes.SHAPES.index(row[1])
        assert [p[i, k], p_clean[i, k]] == pytest.approx([float(v) for v in row[2:]], abs=2e-4)


def test_flags_and_seed(little, tmp_path):
    seen = []
    for k, flags in enumerate((
            [], ["--seed", 1], ["--judge", "self"], ["--judge", 0.95], ["--lam", 0.5],
            ["--epochs2", 0], ["--epochs1", 0], ["--balance", 0], ["--strong-view"],
            ["--amp", "bf16"], ["--peft", "vpt:1"], ["--template", "{}."], ["--rho", 0.9])):
        assert run(tmp_path / str(k), "--max-steps", 2, *flags) == 0
        lines, rows, _ = read(tmp_path / str(k))
        assert len(rows) == 51 and all(math.isfinite(line["loss"]) for line in lines[1:-1])
        assert "NaN" not in (tmp_path / str(k) / "log.jsonl").read_text()
        assert rows not in seen, flags                  # every flag does something
        seen.append(rows)
    assert run(tmp_path / "again", "--max-steps", 2) == 0
    same_result(tmp_path / "0", tmp_path / "again")


def save_pictures(root, drawn, train="train/{c}/{i:03d}.png", test="test/{c}/{i:03d}.png"):
    for part, form in (("train", train), ("test", test)):
        for i, (picture, k) in enumerate(zip(*drawn[part][:2])):
            path = root / form.format(c=shapes.SHAPES[k], i=i)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)


FOLDER = ["--arch", "tiny", "--workers", 0, "--max-steps", 3]


def test_shuffled_labels_change_nothing(drawn, tmp_path):
    save_pictures(tmp_path / "pets", drawn, "images/train{i}.png", "images/test{i}.png")
    for name in ("right", "shuffled"):
        split = {part: [[f"{part}{i}.png", k, shapes.SHAPES[k]] for i, k in enumerate(y)]
                 for part, (_, y) in drawn.items()}
        if name == "shuffled":
            labels = [row[1:] for row in split["train"]]
            random.Random(0).shuffle(labels)
            split["train"] = [row[:1] + label for row, label in zip(split["train"], labels)]
        (tmp_path / "pets" / "split_zhou_OxfordPets.json").write_text(json.dumps(split))
        assert run(tmp_path / name, "--data", tmp_path / "pets", *FOLDER) == 0
    same_result(tmp_path / "right", tmp_path / "shuffled")
    right, shuffled = (read(tmp_path / name)[0] for name in ("right", "shuffled"))
    assert right[1]["precision"] != shuffled[1]["precision"]        # the labels did differ
    assert [e.get("loss") for e in right] == [e.get("loss") for e in shuffled]
    assert right[-1]["accuracy"] == shuffled[-1]["accuracy"]        # of the test images


def test_taking_the_labels_away_changes_nothing(drawn, tmp_path):
    save_pictures(tmp_path / "labelled", drawn)                     # ImageFolder, same order
    save_pictures(tmp_path / "unlabelled", drawn, train="train/{c}_{i:03d}.png")
    for name in ("labelled", "unlabelled"):
        assert run(tmp_path / "out" / name, "--data", tmp_path / name, *FOLDER) == 0
    same_result(tmp_path / "out" / "labelled", tmp_path / "out" / "unlabelled")


@pytest.mark.parametrize("step", [4, 5, 8, 10])         # of three per epoch, two epochs per phase
def test_interrupt_and_resume(little, tmp_path, monkeypatch, capsys, step):
    assert run(tmp_path / "whole") == 0
    live, steps = data.Run.live, []
    signal.signal(signal.SIGINT, signal.default_int_handler)        # ignored after `pytest &`

    def interrupt(self, text):
        steps.append(live(self, text))
        if len(steps) == step:
            signal.raise_signal(signal.SIGTERM if step == 4 else signal.SIGINT)
    monkeypatch.setattr(data.Run, "live", interrupt)
    assert run(tmp_path / "cut") == 130 and "--resume" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "model.pt").exists()
    assert run(tmp_path / "cut") == 2 and "already holds a run" in capsys.readouterr().err
    assert run(tmp_path / "cut", "--resume", "--lr1", 1) == 2
    assert "begun with other settings: lr1 0.002" in capsys.readouterr().err
    assert run(tmp_path / "cut", "--resume") == 0
    same_result(tmp_path / "whole", tmp_path / "cut")
    whole, cut = (read(tmp_path / name)[0] for name in ("whole", "cut"))
    for key in ("phase", "epoch", "loss", "accuracy", "kept", "auroc"):
        assert [e.get(key) for e in whole] == [e.get(key) for e in cut], key
    if step == 4:
        assert run(tmp_path / "cut", "--overwrite", "--max-steps", 1) == 0
        assert len(read(tmp_path / "cut")[0]) == 4


def test_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    folder = data.Run(tmp_path, {})
    folder.save("last.pt", {"epoch": 1})

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(data.DataError, match="cannot write .*last.pt: No space left on device"):
        folder.save("last.pt", {"epoch": 2})
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"epoch": 1}
    assert sorted(os.listdir(tmp_path)) == ["args.json", "last.pt", "log.jsonl"]


def test_unlabelled_folder(drawn, tmp_path, capsys):
    save_pictures(tmp_path / "photos", drawn, "{i:03d}.png", "{i:03d}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"x")
    (tmp_path / "classes.txt").write_text("\n".join(shapes.SHAPES))
    assert run(tmp_path / "out", "--data", tmp_path / "photos", "--classes",
               tmp_path / "classes.txt", *FOLDER) == 0
    said = capsys.readouterr()
    assert "1 of 101 images unreadable, skipped: broken.png" in said.err
    assert "accuracy " not in said.out and "precision" not in said.out
    lines, rows, _ = read(tmp_path / "out")
    assert [row[0] for row in rows[1:]] == [f"{i:03d}.png" for i in range(100)]
    assert lines[-1]["accuracy"] is None and lines[-1]["zero_shot"] is None
    assert all("precision" not in line and "auroc" not in line for line in lines)


def test_user_errors(drawn, little, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "photos", drawn, "{i:03d}.png", "{i:03d}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.pt").write_text("<html>")
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    for args, says in (
            (["--data", "nowhere"], "nowhere: no such folder. Expected one of"),
            (["--data", "empty"], "no images in a known layout. Expected one of"),
            (["--data", "photos"], "--classes FILE|a,b,c"),
            (["--data", "photos", "--classes", "cat,dog,Cat"], "class names must differ"),
            (["--weights", "absent.pt"], "no such model or file: absent.pt"),
            (["--weights", "page.pt"], "cannot read page.pt"),
            (["--weights", "other.pt"], "other.pt: not the weights of a CLIP"),
            (["--arch", "ViT-X/1"], "no such model or file: ViT-X/1 (models: RN50"),
            (["--weights", str(Path(clip.__file__).with_name("tiny.pt")), "--arch", "ViT-B/16"],
             "the weights are not those of ViT-B/16: resolution 32"),
            (["--device", "foo"], "--device foo cannot be used"),
            (["--out", "page.pt/run"], "page.pt"),
            (["--resume"], "no args.json in out")):
        assert run("out", *args) == 2, args
        said = capsys.readouterr().err
        assert said.startswith("error: ") and says in said.splitlines()[0], said
        assert "Traceback" not in said
        assert not (tmp_path / "out").exists()          # and nothing is left behind
    assert coft.parse([]).out == "runs/coft-1"
    (tmp_path / "runs" / "coft-1").mkdir(parents=True)
    assert coft.parse([]).out == "runs/coft-2"          # never into a run that is there


def test_demo_gains(tmp_path, monkeypatch):
    draw = shapes.pictures                              # all of the demo but half of its tests

    def fewer_tests(name, part):
        pictures, y = draw(name, part)
        return (pictures, y) if part == "train" else (pictures[:500], y[:500])
    monkeypatch.setattr(shapes, "pictures", fewer_tests)
    assert coft.main(["--device", "cpu", "--epochs1", "2", "--epochs2", "2",
                      "--out", str(tmp_path)]) == 0
    last = read(tmp_path)[0][-1]
    assert 45 < last["zero_shot"] < 75 and last["accuracy"] >= last["zero_shot"] + 5, last


# ======== prompt_align.py ========


def test_copies_are_the_same():
    for name in ("posterior", "accuracy", "main"):
        assert inspect.getsource(getattr(pa, name)) == inspect.getsource(getattr(coft, name)), name



def aligned_batch(seed=0, B=6, C=5, scale=3.0, V=None):
    """Logits (B, C) or (V, B, C) that want a gradient, candidate sets, confidences; double."""
    g = torch.Generator().manual_seed(seed)
    l = scale * torch.randn(*([V] if V else []), B, C, generator=g, dtype=torch.double)
    S = torch.rand(B, C, generator=g) < 0.5
    S[torch.arange(B), torch.randint(C, (B,), generator=g)] = True
    S[0], S[1] = torch.arange(C) == 2, True                             # a singleton, a full set
    c = torch.rand(B, C, generator=g, dtype=torch.double)
    return l.requires_grad_(True), S, c


def p_of(row):
    """softmax with plain arithmetic on a row of scalars."""
    e = [torch.exp(v) for v in row]
    return [v / sum(e) for v in e]


def plainly_average(l, S, c):
    return sum(-sum(torch.log(p_of(r)[k]) for k in range(5) if s[k]) / int(s.sum())
               for r, s in zip(l, S)) / 6


def plainly_cc(l, S, c):
    return sum(-torch.log(sum(p_of(r)[k] for k in range(5) if s[k])) for r, s in zip(l, S)) / 6


def plainly_weighted(l, S, c):
    return sum(-sum(w[k] * torch.log(p_of(r)[k]) for k in range(5)) for r, w in zip(l, c)) / 6


def plainly_lws(l, S, c):
    return sum(-sum(w[k] * torch.log(p_of(r)[k] if s[k] else 1 - p_of(r)[k]) for k in range(5))
               for r, s, w in zip(l, S, c)) / 6


def plainly_cavl(l, S, c):
    total = 0
    for r, s in zip(l, S):
        v = r.tolist()
        best = max((k for k in range(5) if s[k]), key=lambda k: abs(v[k] - 1) * v[k])
        total = total - torch.log(p_of(r)[best])
    return total / 6


@pytest.mark.parametrize("name", ["average", "cc", "weighted", "lws", "cavl"])
def test_align_pll_losses(name):
    ours = {"average": lambda l, S, c: pa.loss_average(l, S), "lws": pa.loss_lws,
            "cc": lambda l, S, c: pa.loss_cc(l, S),
            "weighted": lambda l, S, c: pa.loss_weighted(l, c),
            "cavl": lambda l, S, c: pa.loss_cavl(l, S)}[name]
    for seed in range(3):
        l, S, c = aligned_batch(seed)
        a, b = ours(l, S, c), globals()[f"plainly_{name}"](l, S, c)
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        ga, gb = (torch.autograd.grad(v, l, retain_graph=True)[0] for v in (a, b))
        torch.testing.assert_close(ga, gb, atol=1e-6, rtol=0)


def test_align_crdpll():
    l, S, c = aligned_batch(3, V=3)
    c = (c * S) / (c * S).sum(dim=1, keepdim=True)                      # with zeros: 0 log 0 = 0
    kl = sum(float(w) * (math.log(w) - torch.log(p_of(r)[k])) for v in l for r, row in zip(v, c)
             for k, w in enumerate(row.tolist()) if w > 0) / 6
    negative = sum(-sum(torch.log(1 - p_of(r)[k]) for k in range(5) if not s[k])
                   for r, s in zip(l[0], S)) / 6
    for lam in (0.0, 0.4, 1.0):
        a, b = pa.loss_crdpll(l, S, c, lam), lam * kl + negative
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        ga, gb = (torch.autograd.grad(v, l, retain_graph=True)[0] for v in (a, b))
        torch.testing.assert_close(ga, gb, atol=1e-6, rtol=0)
    row = pa.confidence("crdpll", l, S)                                 # geometric mean, in S
    product = (l.softmax(dim=2).prod(dim=0) ** (1 / 3) * S).detach()
    torch.testing.assert_close(row, product / product.sum(dim=1, keepdim=True))


def test_align_contrastive():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(4, 3, generator=g, dtype=torch.double).requires_grad_(True)
    keys = torch.randn(5, 3, generator=g, dtype=torch.double)
    y, y_keys = [0, 1, 0, 2], [0, 1, 2, -1, 1]
    a = pa.loss_contrastive(z, torch.tensor(y), keys, torch.tensor(y_keys), T=0.5)
    everyone, labels, b = [*z, *keys], y + y_keys, 0
    for i in range(4):
        others = [j for j in range(9) if j != i]
        s = {j: torch.exp(z[i] @ everyone[j] / 0.5) for j in others}
        mine = [j for j in others if labels[j] == y[i]]
        b = b - sum(torch.log(s[j] / sum(s.values())) for j in mine) / len(mine) / 4
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    ga, gb = (torch.autograd.grad(v, z, retain_graph=True)[0] for v in (a, b))
    torch.testing.assert_close(ga, gb, atol=1e-6, rtol=0)


def test_align_mixed_posterior_and_weight():
    l, S, _ = aligned_batch(4)
    hand = aligned_batch(5)[0]
    q = pa.mixed_posterior(l, hand, S, 0.3)
    for r, h, s, row in zip(l, hand, S, q):
        a, b = ([v.item() if s[k] else 0.0 for k, v in enumerate(p_of(x))] for x in (h, r))
        want = [0.3 * u / sum(a) + 0.7 * v / sum(b) for u, v in zip(a, b)]
        assert row.tolist() == pytest.approx(want, abs=1e-6)
    assert not q.requires_grad
    x = torch.tensor([2.0, 0.5], requires_grad=True)
    w = pa.balance(x[0], x[1])
    assert float(w) == 4 and not w.requires_grad
    for pll, align in ((0.0, 0.0), (0.0, 1.0)):                         # no 0/0; never off
        assert float(pa.balance(torch.tensor(pll), torch.tensor(align))) == pytest.approx(pa.W_MIN)
    assert math.isfinite(pa.balance(torch.tensor(1.0), torch.tensor(0.0)))
    told = [1 - math.log(n) / math.log(5) for n in S.sum(dim=1).tolist()]
    assert told[:2] == [1, 0] and float(pa.information(S)) == pytest.approx(sum(told) / len(told))


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_align_extreme_logits(dtype):
    l = torch.tensor([[1e4, 0, -1e4, 5], [-1e4, 3, 3, 3], [0, 1e4, 0, 0]], dtype=dtype)
    S = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()  # no mass; singleton; full
    p = pa.masked_softmax(l, S)
    assert torch.equal(p[0], torch.tensor([0, 1, 0, 0], dtype=dtype))
    assert torch.equal(p[1], torch.tensor([1, 0, 0, 0], dtype=dtype))
    assert torch.equal(pa.masked_softmax(l, torch.zeros_like(S)), torch.zeros_like(l))
    for objective in pa.OBJECTIVES:
        views = torch.stack([l] * 3).requires_grad_(True)
        c = pa.confidence(objective, views, S)
        assert torch.isfinite(c).all() and (c[S.sum(1) > 0] >= 0).all()
        loss = pa.pll_loss(objective, views, S, c, 1.0)
        align = pa.loss_weighted(views[0], pa.mixed_posterior(views[0], l, S, 0.5))
        total = loss + pa.balance(loss, align) * align
        grad, = torch.autograd.grad(total, views)
        assert torch.isfinite(total) and torch.isfinite(grad).all(), objective
    one = torch.tensor([[50.0, 0, 0]], dtype=dtype, requires_grad=True)  # p_0 rounds to 1
    pa.log_one_minus(one)[0, 0].backward()
    assert one.grad[0].tolist() == pytest.approx([-1, 0.5, 0.5])


def test_align_cavl_never_picks_a_non_candidate():
    for seed in range(20):
        l, S, _ = aligned_batch(seed)
        l = -l.detach().abs() - 0.1                                     # all negative
        l.requires_grad_(True)
        grad, = torch.autograd.grad(pa.loss_cavl(l, S), l)
        assert ((grad < 0).sum(dim=1) == 1).all() and S[grad < 0].all()


@pytest.fixture(scope="module")
def tiny():
    return clip.load("tiny")[0].requires_grad_(False)


def one_step(model, objective, teacher, S, table, f, i, seed=0, progress=0.0, lr=0.1):
    """train_step on a fresh prompt: (prompt, gradient of V)."""
    torch.manual_seed(seed)
    prompt = pa.Prompt(model, shapes.SHAPES, data.TEMPLATE, 4)
    contrast = pa.Contrast(f.shape[-1], 10) if objective == "pico" else None
    optimizer = torch.optim.SGD(prompt.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    autocast = data.precision("off", f.device)[0]
    t_hand = pa.hand_crafted(model, shapes.SHAPES, [data.TEMPLATE], autocast)
    said = pa.train_step(objective, teacher, 1, progress, f, i, model, prompt, contrast,
                         (S, table, t_hand), (optimizer, schedule, scaler), autocast)
    return prompt, prompt.V.grad, said


@pytest.fixture
def random_features():
    g = torch.Generator().manual_seed(1)
    f = F.normalize(torch.randn(3, 8, 64, generator=g), dim=2)
    return f, torch.randperm(12, generator=g)[:8], torch.randint(10, (12,), generator=g)


def test_align_no_ambiguity_is_coop(tiny, random_features):
    f, i, y = random_features
    S = F.one_hot(y, 10).bool()
    torch.manual_seed(0)
    prompt = pa.Prompt(tiny, shapes.SHAPES, data.TEMPLATE, 4)
    F.cross_entropy(tiny.logit_scale.exp() * f[0] @ prompt(tiny).T, y[i]).backward()
    for objective in ("naive", "cc", "rc", "proden", "cavl", "pico"):
        table = pa.confidence(objective, torch.zeros(1, *S.shape), S)
        for teacher in (None, "mixed", "handcrafted"):
            _, grad, said = one_step(tiny, objective, teacher, S, table.clone(), f, i, progress=0.3)
            torch.testing.assert_close(grad, prompt.V.grad, atol=1e-6, rtol=1e-4)
            assert not teacher or float(said["w"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("objective", ["rc", "proden", "lws"])
def test_align_tables(tiny, random_features, objective):
    f, i, y = random_features
    S = data.flip_candidates(y, 10, 0.5, 0)
    first = pa.confidence(objective, torch.zeros(1, *S.shape), S)
    table = first.clone()
    torch.manual_seed(0)
    before = pa.Prompt(tiny, shapes.SHAPES, data.TEMPLATE, 4)
    after, _, _ = one_step(tiny, objective, "mixed", S, table, f, i)
    asked = after if objective == "rc" else before                      # RC after the step
    with torch.no_grad():
        t = asked(tiny)
    for n in range(12):
        uniform = [1 / int(S[n].sum()) if s else 0.0 for s in S[n]]
        rest = [0.0 if s else 1 / max(1, int((~S[n]).sum())) for s in S[n]]
        row = [a + b for a, b in zip(uniform, rest)] if objective == "lws" else uniform
        assert first[n].tolist() == pytest.approx(row, abs=1e-6)
        if n in i.tolist():                                             # only the batch's rows
            x = f[0, i.tolist().index(n)]
            e = [math.exp(float(tiny.logit_scale.exp() * x @ v)) for v in t]
            inside = sum(v for v, s in zip(e, S[n]) if s)
            outside = sum(v for v, s in zip(e, S[n]) if not s) or 1
            row = [v / inside if s else v / outside * (objective == "lws") for v, s in zip(e, S[n])]
        assert table[n].tolist() == pytest.approx(row, abs=1e-5)


def test_align_pico_state():
    torch.manual_seed(0)
    contrast = pa.Contrast(6, 3, d=4, queue=5)
    assert torch.allclose(contrast.keys.norm(dim=1), torch.ones(5))     # rows, not columns
    z, key = F.normalize(torch.randn(3, 4)), F.normalize(torch.randn(3, 4))
    y = torch.tensor([2, 0, 2])
    old = contrast.keys.clone()
    contrast.update(z, key, y, m=0.5)
    assert torch.equal(contrast.keys, torch.cat([key, old[:2]]))
    assert contrast.y_keys.tolist() == [2, 0, 2, -1, -1]
    torch.testing.assert_close(contrast.prototypes[0], z[1])
    torch.testing.assert_close(contrast.prototypes[2], F.normalize(z[0] + z[2], dim=0))
    assert contrast.prototypes[1].abs().sum() == 0


def test_align_prompt_starts_at_the_template(tiny):
    t = pa.hand_crafted(tiny, shapes.SHAPES, [data.TEMPLATE], nullcontext)
    torch.testing.assert_close(pa.Prompt(tiny, shapes.SHAPES, data.TEMPLATE, 0)(tiny).detach(), t)
    assert pa.nearest_words(tiny, pa.Prompt(tiny, shapes.SHAPES, data.TEMPLATE, 0).V) == [
        "a 0.00", "photo 0.00", "of 0.00", "a 0.00"]
    assert pa.Prompt(tiny, shapes.SHAPES, data.TEMPLATE, 16).V.shape == (16, 64)


def align_run(out, *args):
    return pa.main(["--device", "cpu", "--epochs", "2", "--out", str(out), *map(str, args)])


def align_read(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = [list(csv.reader((out / name).open(newline=""))) for name in (
        "predictions.csv", "disambiguated.csv")]
    return lines, rows, torch.load(out / "model.pt", weights_only=True)


@pytest.mark.parametrize("objective", pa.OBJECTIVES)
def test_align_run_folder(little, tmp_path, objective, monkeypatch, capsys):
    loaded, load = [], clip.load
    monkeypatch.setattr(clip, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0])
    assert align_run(tmp_path / "run", "--objective", objective, "--shots", 8) == 0
    assert sorted(os.listdir(tmp_path / "run")) == [
        "args.json", "disambiguated.csv", "last.pt", "log.jsonl", "model.pt", "predictions.csv"]
    (first, *epochs, last), (predictions, table), saved = align_read(tmp_path / "run")
    assert first["objective"] == objective and [e["epoch"] for e in epochs] == [1, 2]
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()
    for e in epochs:
        assert {"loss", "pll", "align", "w", "alpha", "accuracy", "disambiguation", "supervised",
                "images_per_second", "peak_memory_gb"} <= e.keys()
    assert last.keys() >= {"zero_shot", "accuracy", "supervised", "seconds", "images_per_second",
                           "peak_memory_gb"}
    assert predictions[0] == ["path", "class", "confidence", "p_clean"] and len(predictions) == 51
    assert table[0] == ["image", "candidates", "label", "confidence"]
    assert all(row[2] in row[1].split("|") and 0 <= float(row[3]) <= 1 for row in table[1:])
    assert (tmp_path / "run" / "model.pt").stat().st_size < 10_000
    fresh = load("tiny")[0]                                             # CLIP is as it was
    assert all(torch.equal(v, loaded[0][0].state_dict()[k]) for k, v in fresh.state_dict().items())
    prompt = pa.Prompt(fresh, saved["class_names"], saved["template"], saved["ctx"])
    start = prompt.V.clone()
    prompt.load_state_dict(saved["prompt"])
    assert not torch.equal(start, prompt.V)
    assert "nearest" in capsys.readouterr().out


def test_align_flags_and_seed(little, tmp_path):
    seen = []
    for k, flags in enumerate(([], ["--seed", 1], ["--q", 0.9], ["--no-align"], ["--ctx", 4],
                               ["--teacher", "handcrafted"], ["--candidates", "instance"],
                               ["--shots", 2], ["--lr", 0.5], ["--batch-size", 16],
                               ["--template", "{}."], ["--amp", "bf16"], ["--max-steps", 2],
                               ["--epochs", 12], ["--no-cache-features", "--epochs", 12],
                               ["--objective", "rc", "--amp", "bf16"], ["--objective", "lws"])):
        assert align_run(tmp_path / str(k), *flags) == 0
        found = align_read(tmp_path / str(k))[2]["prompt"]["V"].tolist()
        assert found not in seen, flags                                 # every flag does something
        seen.append(found)
    assert align_run(tmp_path / "again", "--no-supervised") == 0        # the reference is apart
    assert align_read(tmp_path / "again")[2]["prompt"]["V"].tolist() == seen[0]
    assert align_read(tmp_path / "again")[0][-1]["supervised"] is None
    assert align_run(tmp_path / "new", "--no-cache-features") == 0            # same augmentations
    a, b = (align_read(tmp_path / name)[2]["prompt"]["V"] for name in ("0", "new"))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_align_no_ambiguity_is_the_reference(little, tmp_path):
    assert align_run(tmp_path, "--q", 0) == 0
    lines, _, _ = align_read(tmp_path)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    torch.testing.assert_close(state["prompt"]["V"], state["reference"]["V"], atol=1e-4, rtol=0)
    assert lines[-1]["accuracy"] == lines[-1]["supervised"]


@pytest.mark.parametrize("objective", ["rc", "pico"])
@pytest.mark.parametrize("step", [4, 6])                                # of three per epoch
def test_align_interrupt_and_resume(little, tmp_path, monkeypatch, capsys, objective, step):
    flags = ["--objective", objective, "--epochs", 3]
    assert align_run(tmp_path / "whole", *flags) == 0
    live, steps = data.Run.live, []

    def interrupt(self, text):
        steps.append(live(self, text))
        if len(steps) == step:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(data.Run, "live", interrupt)
    assert align_run(tmp_path / "cut", *flags) == 130 and "--resume" in capsys.readouterr().err
    assert not (tmp_path / "cut" / "model.pt").exists()
    assert align_run(tmp_path / "cut", *flags) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert align_run(tmp_path / "cut", *flags, "--resume") == 0
    a, b = (align_read(tmp_path / name) for name in ("whole", "cut"))
    assert a[1] == b[1] and torch.equal(a[2]["prompt"]["V"], b[2]["prompt"]["V"])
    for key in ("epoch", "loss", "align", "alpha", "accuracy", "disambiguation", "supervised"):
        assert [e.get(key) for e in a[0]] == [e.get(key) for e in b[0]], key


def test_align_unlabelled_folder_with_candidates(drawn, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(drawn["train"][0]):
        picture.save(tmp_path / "photos" / f"{i:03d}.png")
    sets = {f"{i:03d}.png": [shapes.SHAPES[k], "star"] for i, k in enumerate(drawn["train"][1])}
    (tmp_path / "sets.json").write_text(json.dumps(sets))
    folder = ["--data", tmp_path / "photos", "--classes", ",".join(shapes.SHAPES), "--arch", "tiny"]
    assert align_run(tmp_path / "out", *folder) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "--candidates FILE" in said and said.count("\n") == 1
    assert align_run(tmp_path / "out", *folder, "--candidates", tmp_path / "sets.json") == 0
    lines, (predictions, table), _ = align_read(tmp_path / "out")
    assert lines[-1]["accuracy"] is None and lines[-1]["supervised"] is None
    assert all("disambiguation" not in line for line in lines) and len(predictions) == 101
    for row in table[1:]:
        assert set(row[1].split("|")) == set(sets[row[0]]) and row[2] in sets[row[0]]


def test_align_user_errors(little, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text('{"train/00000.png": ["dog"]}')
    for args, says in ((["--data", "nowhere"], "no such folder"),
                       (["--candidates", "absent.csv"], "absent.csv"),
                       (["--candidates", "bad.json"], "unknown class 'dog'"),
                       (["--lr", "1e30"], "lower --lr"),
                       (["--device", "foo"], "--device foo cannot be used")):
        assert align_run("out", *args) == 2, args
        said = capsys.readouterr().err
        assert said.startswith("error: ") and says in said.splitlines()[0], said
    for args in (["--q", "1.1"], ["--objective", "rcc"], ["--shots", "-1"]):
        with pytest.raises(SystemExit):
            align_run("out", *args)


def test_align_full_sets_fall_back_to_zero_shot(little, tmp_path):
    for objective in ("rc", "cavl"):
        assert align_run(tmp_path, "--q", 1, "--objective", objective, "--overwrite") == 0
        last = align_read(tmp_path)[0][-1]
        assert abs(last["accuracy"] - last["zero_shot"]) <= 2, last     # one image of fifty


def test_align_demo_gains(tmp_path):
    assert pa.main(["--device", "cpu", "--objective", "rc", "--epochs", "8", "--no-supervised",
                    "--out", str(tmp_path)]) == 0
    last = align_read(tmp_path)[0][-1]
    assert last["accuracy"] >= last["zero_shot"] + 3, last


# ======== coft_plus.py ========

PLUS = [*SHORT, "--epochs1", "1", "--epochs2", "1", "--rounds", "2"]


def plus_run(out, *args):
    """Exit status of `python coft_plus.py ARGS --out OUT`."""
    return coft_plus.main([*PLUS, "--out", str(out), *map(str, args)])


def units(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_info_nce_is_the_plain_loop():                  # Eq. (11)
    q, k, queue = units(4, 8, seed=0), units(4, 8, seed=1), units(6, 8, seed=2)
    y, y_queue, T = torch.tensor([2, -1, 0, 2]), torch.tensor([0, 2, -1, 2, -1, 1]), 0.2
    keys, labels, losses = [*k, *queue], [*y.tolist(), *y_queue.tolist()], []
    for b in range(4):
        each = [math.exp(float(q[b] @ key) / T) for key in keys]
        positive = [j for j in range(10) if j == b or labels[j] == y[b] != -1]
        losses.append(-sum(math.log(each[j] / sum(each)) for j in positive) / len(positive))
    assert [len([v for v in labels if v == y[b]]) for b in (0, 2)] == [4, 2]
    assert float(coft_plus.info_nce(q, k, y, queue, y_queue, T)) == pytest.approx(
        sum(losses) / 4, abs=1e-6)
    none = torch.full((4,), -1)                         # MoCo: cross-entropy to the own key
    moco = F.cross_entropy(q @ torch.cat([k, queue]).T / T, torch.arange(4))
    torch.testing.assert_close(coft_plus.info_nce(q, k, none, queue, y_queue, T), moco)


def test_queue_is_first_in_first_out():
    torch.manual_seed(0)
    queue, sent = coft_plus.Queue(6, 3), []
    torch.testing.assert_close(queue.k.norm(dim=1), torch.ones(6))      # rows, not columns
    assert (queue.y == -1).all()
    for step in range(5):
        k, y = units(4, 3, seed=step), torch.full((4,), step)
        queue.push(k, y)
        sent += list(zip(k, y))
        held = min(6, len(sent))
        order = [(int(queue.pointer) + j) % 6 for j in range(6)][-held:]        # oldest first
        for at, (k, y) in zip(order, sent[-held:]):
            assert torch.equal(queue.k[at], k) and queue.y[at] == y


def test_momentum_is_a_weighted_sum():
    """After s steps: m^s start + (1 - m) sum_r m^(s - r) student_r."""
    slow, m = torch.nn.Linear(3, 2).double(), 0.9
    start, students = slow.weight.detach().clone(), []
    for s in range(5):
        student = torch.nn.Linear(3, 2).double()
        coft_plus.ema_update(slow, student, m)
        students.append(student.weight.detach())
    closed = m**5 * start + (1 - m) * sum(m**(4 - r) * w for r, w in enumerate(students))
    torch.testing.assert_close(slow.weight.detach(), closed)


def test_classifier_is_the_mean_of_the_sentences():     # Eq. (12)
    model, _ = clip.load("tiny")
    sentences = [["a red circle", "a ring without a hole", "a disc"], ["a square"]]
    t0 = coft_plus.classifier(model, sentences, nullcontext)
    for row, some in zip(t0, sentences):
        with torch.no_grad():
            t = F.normalize(model.encode_text(clip.tokenize(some)), dim=1).mean(dim=0)
        torch.testing.assert_close(row, F.normalize(t, dim=0), atol=1e-5, rtol=0)


def test_next_labels_are_agreed_on():                   # Eq. (10)
    p = torch.tensor([[[.9, .1], [.8, .2], [.3, .7], [.1, .9]], [[.7, .3], [.3, .7], [.2, .8],
                                                                 [.4, .6]]])
    y, high = coft_plus.next_labels(p, rho=1.0)
    assert y.tolist() == [0, 0, 1, 1] and high.tolist() == [True, False, True, True]
    y, high = coft_plus.next_labels(p, rho=0.5)         # of each class the surer half
    assert high.tolist() == [True, False, True, False]
    assert [coft_plus.grown(0.25, part) for part in (0, 1 / 3, 1)] == [0.25, 0.5, 1]


def test_only_the_query_side_learns(little):
    torch.manual_seed(0)
    model, _ = clip.load("tiny")
    model.requires_grad_(False)
    me = coft_plus.Model(model, shapes.SHAPES, data.TEMPLATE, "vpt:2", None, 8)
    teacher, queue = copy.deepcopy(me).requires_grad_(False), coft_plus.Queue(16, 8)
    x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        k = teacher.project(teacher.features(model, x))
    none = torch.zeros(4, dtype=torch.bool)             # nothing is clean: InfoNCE learns alone
    before = [v.clone() for v in (k, queue.k)]
    loss = coft_plus.contrastive_loss(me, me.features(model, x), k, y, none, queue)
    loss.backward()
    assert all(v.grad is not None and v.grad.abs().max() > 0
               for v in (me.prompts, *me.head.parameters()))
    assert me.pos.V.grad is None and me.neg.V.grad is None
    assert all(v.grad is None for v in (*teacher.parameters(), *model.parameters()))
    assert torch.equal(k, before[0]) and torch.equal(queue.k, before[1])


def test_without_its_parts_it_is_coft(little, tmp_path):
    off = ["--rounds", 1, "--mu", 0, "--prompts", "", "--max-steps", 2]
    assert plus_run(tmp_path / "plus", *off) == 0
    assert run(tmp_path / "coft", "--epochs1", 1, "--epochs2", 1, "--max-steps", 2) == 0
    same_result(tmp_path / "plus", tmp_path / "coft")


def test_plus_run_folder(little, tmp_path, capsys, monkeypatch):
    assert plus_run(tmp_path / "run", "--max-steps", 2) == 0
    (first, *epochs, last), rows, saved = read(tmp_path / "run")
    assert [(e["phase"], e.get("round")) for e in epochs] == [(1, 1), (1, 2), (2, None)]
    assert epochs[0]["kept"] <= 0.35 and all(math.isfinite(e["loss"]) for e in epochs)
    assert "demo.json: 10 to 10 sentences for 10 of 10 classes" in capsys.readouterr().out
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    queue = state["queues"]                             # 100 images: two batches of 32
    assert queue["0.k"].shape == (64, 64) and int(queue["0.pointer"]) == 0
    assert not torch.equal(queue["0.k"], queue["1.k"])
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({c: [f"a drawing of a {c}"] for c in shapes.SHAPES}))
    monkeypatch.chdir(tmp_path)
    assert plus_run(tmp_path / "mine", "--prompts", mine, "--max-steps", 1) == 0
    assert "mine.json: 1 to 1 sentences" in capsys.readouterr().out
    assert plus_run(tmp_path / "gone", "--prompts", "gone.json") == 2
    assert "gone.json" in capsys.readouterr().err


def test_our_prompts_are_found():
    assert data.our_prompts("demo:slanted", None).endswith("demo.json")
    assert data.our_prompts("./photos", None) is None and data.our_prompts("x", "SUN397") is None
    found = {data.our_prompts("./x", known.title) for known in data.SETS} - {None}
    files = set(os.listdir(Path(data.__file__).parent / "prompts")) - {"demo.json"}
    assert {os.path.basename(f) for f in found} == files and len(files) == 10


# ======== all scripts: several processes, kills, precision, odd data ========

FORKS = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
FORKS.set_forkserver_preload(["coft", "coft_plus", "prompt_align"])
MAINS = {"coft": coft.main, "coft_plus": coft_plus.main, "prompt_align": pa.main}
SCRIPTS = {"coft": SHORT, "coft_plus": PLUS,
           "prompt_align": ["--device", "cpu", "--epochs", "3"]}


def child(script, argv, screen, env, spy, at, do):
    """In a process of its own: runs a script on little data, the screen a file. spy: a file for the
    gradients of the first step; at, do: what happens at step `at`."""
    for fd in (1, 2):
        os.dup2(os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__ = [
        open(fd, "w", buffering=1, closefd=False) for fd in (1, 2)]
    os.environ.update(env)
    torch.set_num_threads(1)
    draw, live, steps = shapes.pictures, data.Run.live, []
    n = {"train": 100, "test": 50}
    shapes.pictures = lambda name, part: tuple(x[:n[part]] for x in draw(name, part))
    ema, average, averaged = coft.ema_update, data.average_gradients, []    # same in coft_plus

    def note(params):
        if spy and not os.path.exists(spy):
            torch.save([v.grad.clone() for v in params if v.grad is not None], spy)

    def spied_ema(teacher, student, decay):
        note(student.parameters())
        ema(teacher, student, decay)

    def spied_average(optimizer):
        averaged.append(average(optimizer))
        note([v for group in optimizer.param_groups for v in group["params"]])

    def spied_live(self, text):
        steps.append(live(self, text))
        if len(steps) == at:
            if do == "raise":
                raise data.DataError("a mistake")
            os.kill(os.getpid(), do)
    coft.ema_update = coft_plus.ema_update = spied_ema
    data.average_gradients, data.Run.live = spied_average, spied_live
    os._exit(MAINS[script]([*SCRIPTS[script], *argv]))


def processes(n, script, out, *argv, spy=None, at=None, do=None, who=None):
    """Exit statuses of n processes (`who`: the one that `do` is for) and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    screens = [out.parent / f"{out.name}.{k}.txt" for k in range(n)]
    all_ = [FORKS.Process(target=child, args=(
        script, ["--out", str(out), *map(str, argv)], screens[k], {} if n == 1 else {
            "RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        spy and f"{spy}.{k}", at if who in (None, k) else None, do)) for k in range(n)]
    for p in all_:
        p.start()
    for p in all_:
        p.join(60)
        hangs = p.exitcode is None
        p.kill()
        assert not hangs, [s.read_text() for s in screens if s.exists()]
    return [p.exitcode for p in all_], [s.read_text() for s in screens]


def epochs_of(out):
    """The lines of log.jsonl, without times and speeds."""
    free = ("seconds", "images_per_second", "peak_memory_gb", "waiting", "out")
    return [{k: v for k, v in json.loads(line).items() if k not in (*free, "resume", "overwrite")}
            for line in (out / "log.jsonl").read_text().splitlines()]


def same_run(a, b):
    """Two run folders hold the same log, weights and tables, bit for bit."""
    assert epochs_of(a) == epochs_of(b)
    for name in ("last.pt", "model.pt"):
        x, y = (torch.load(out / name, weights_only=True) for out in (a, b))
        for key in x.keys() - {"seconds", "clock", "log"}:
            assert equal(x[key], y[key]), (name, key)


def equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("script, flags", [
    ("coft", ["--epochs2", 0]), ("coft", ["--epochs1", 0]), ("coft_plus", ["--epochs1", 0]),
    ("prompt_align", ["--objective", "pico"]),
    ("prompt_align", ["--objective", "crdpll", "--no-cache-features"])])
def test_two_processes_are_one(tmp_path, script, flags):
    for n in (1, 2):
        status, screen = processes(n, script, tmp_path / f"{n}", *flags, "--max-steps", 2,
                                   spy=tmp_path / f"gradients{n}")
        assert status == [0] * n, screen
    assert screen[1] == ""                                          # the first one speaks
    one, a, b = (torch.load(tmp_path / f"gradients{k}", weights_only=True)
                 for k in ("1.0", "2.0", "2.1"))
    assert len(one) == len(a) and any(g.abs().max() > 1e-3 for g in one)
    for g, x, y in zip(one, a, b):
        torch.testing.assert_close(x, g, atol=1e-5, rtol=1e-5)
        assert torch.equal(x, y)                                    # the processes stay the same
    one, two = (epochs_of(tmp_path / f"{n}") for n in (1, 2))
    assert [e.get("loss") for e in two] == pytest.approx([e.get("loss") for e in one], abs=0.02)
    assert abs(one[-1]["accuracy"] - two[-1]["accuracy"]) <= 4      # two images of fifty


def test_processes_that_fail(tmp_path):
    status, screen = processes(2, "coft", tmp_path / "a", at=2, do="raise", who=1)
    assert status[1] == 2 and screen[1] == "process 1: error: a mistake\n"
    assert status[0] and "another process has ended" in screen[0], screen
    status, screen = processes(2, "coft", tmp_path / "b", "--batch-size", 31)
    assert status == [2, 2] and "--batch-size 31 cannot be divided by 2 processes" in screen[0]
    status, screen = processes(2, "prompt_align", tmp_path / "c", at=2, do=signal.SIGTERM)
    assert status == [130, 130] and "no epoch is done yet" in screen[0] and not screen[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_kill_and_resume(little, tmp_path, script):
    flags = ["--objective", "pico"] if script == "prompt_align" else ["--epochs2", "1"]
    main, argv = MAINS[script], [*SCRIPTS[script], *flags, "--out"]
    assert main([*argv, str(tmp_path / "whole")]) == 0
    for step, do in ((2, signal.SIGKILL), (8, signal.SIGKILL)):     # three steps an epoch
        status, screen = processes(1, script, tmp_path / f"cut{step}", *flags, at=step, do=do)
        assert status == [-do], screen
        assert (tmp_path / f"cut{step}" / "last.pt").exists() == (step > 3)
        assert main([*argv, str(tmp_path / f"cut{step}")]) == 2     # holds a run
        assert main([*argv, str(tmp_path / f"cut{step}"), "--resume"]) == 0
        same_run(tmp_path / "whole", tmp_path / f"cut{step}")


def test_interrupted_while_it_waits(little, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a transform, whose random numbers are not the run's."""
    assert run(tmp_path / "whole", "--epochs2", 0) == 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    call, images = data.Augment.__call__, []

    def interrupt(self, x):
        images.append(x)
        if len(images) == 290:                          # of 192 in the first epoch
            signal.raise_signal(signal.SIGINT)
        return call(self, x)
    monkeypatch.setattr(data.Augment, "__call__", interrupt)
    assert run(tmp_path / "cut", "--epochs2", 0) == 130
    state = torch.load(tmp_path / "cut" / "last.pt", weights_only=True)
    assert state["epoch"] == 1 and len(state["rows"]) == 1
    assert run(tmp_path / "cut", "--epochs2", 0, "--resume") == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_mixed_precision(little, tmp_path, capsys):
    found, few = {}, ["--batch-size", 4, "--epochs1", 1, "--epochs2", 0, "--max-steps", 4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")                  # of a schedule before a step, for instance
        for amp in ("off", "bf16", "fp16"):             # fp16: its first steps overflow
            assert run(tmp_path / amp, "--amp", amp, *few) == 0
            found[amp] = epochs_of(tmp_path / amp)[1]
    assert found["off"]["loss"] != found["bf16"]["loss"] != found["fp16"]["loss"]
    assert found["bf16"]["loss"] == pytest.approx(found["off"]["loss"], rel=0.02)
    assert found["fp16"]["loss"] == pytest.approx(found["off"]["loss"], rel=0.1)
    skipped = {amp: line["skipped"] for amp, line in found.items()}
    assert skipped["off"] == skipped["bf16"] == 0 < skipped["fp16"] < 8, skipped
    said = re.findall("skipped [0-9]+", capsys.readouterr().out)
    assert said == [f"skipped {skipped['fp16']}"]
    state = torch.load(tmp_path / "fp16" / "last.pt", weights_only=True)
    assert state["scaler"]["scale"] <= 2.0**15 and state["schedule0"]["last_epoch"] == 4
    taken = sum(int(state[f"optimizer{m}"]["state"][0]["step"]) for m in (0, 1))
    assert taken == 8 - skipped["fp16"]


def test_skipped_steps_one_by_one():
    model, scaler = torch.nn.Linear(2, 1, bias=False), torch.amp.GradScaler("cpu", init_scale=4.0)
    other = torch.nn.Linear(2, 1, bias=False)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, other)]
    before = [m.weight.detach().clone() for m in (model, other)]
    skipped = []
    for m, optimizer, scale in zip((model, other), optimizers, (1e38, 1.0)):
        scaler.scale((m(torch.ones(1, 2)) * scale).sum() * 10).backward()
        scaler.step(optimizer)
        skipped.append(float(data.skipped(scaler, optimizer)))
    scaler.update()
    assert skipped == [1, 0] and scaler.get_scale() == 2
    assert torch.equal(model.weight, before[0]) and not torch.equal(other.weight, before[1])


def test_loss_that_is_not_finite(little, tmp_path, monkeypatch, capsys):
    loss, calls = coft.phase1_loss, []

    def bad(*args):
        calls.append(0)
        return loss(*args) * (math.nan if len(calls) == 2 * 4 else 1)   # one of step 4's two models
    monkeypatch.setattr(coft, "phase1_loss", bad)
    assert run(tmp_path / "coft") == 2
    assert capsys.readouterr().err == ("error: the loss became nan in phase 1, step 4: lower "
                                       "--lr1; last.pt holds the last good epoch\n")
    assert torch.load(tmp_path / "coft" / "last.pt", weights_only=True)["epoch"] == 1
    assert align_run(tmp_path / "pa", "--lr", "1e30") == 2
    assert "step 2: lower --lr; last.pt is absent" in capsys.readouterr().err


def test_full_disk(little, tmp_path, capsys):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, before[1]))     # phase 2's is larger
    try:
        assert run(tmp_path, "--max-steps", 1) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch("error: cannot write .*last.pt: File too large\n", capsys.readouterr().err)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["phase"] == 1
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert run(tmp_path, "--max-steps", 1, "--resume") == 0


def test_odd_data(little, drawn, tmp_path, capsys, monkeypatch):
    for n in (60, 1):
        photos = {"train": (drawn["train"][0][:n], drawn["train"][1][:n]), "test": ((), ())}
        save_pictures(tmp_path / f"{n}", photos, "{i:03d}.png")
    (tmp_path / "1000.txt").write_text("\n".join(f"thing {k}" for k in range(1000)))
    (tmp_path / "sets.csv").write_text("000.png,circle\n")
    for k, flags in enumerate((
            ["--classes", tmp_path / "1000.txt", "--epochs2", 0, "--batch-size", 4],
            ["--classes", "circle,"], ["--classes", ",".join([*shapes.SHAPES, "zebra"])],
            ["--data", tmp_path / "1", "--classes", "circle,star"])):
        assert run(tmp_path / f"out{k}", "--arch", "tiny", "--data", tmp_path / "60",
                   "--max-steps", 1, *flags) == 0
        assert "NaN" not in (tmp_path / f"out{k}" / "log.jsonl").read_text()
    for objective, what, classes in (("lws", "60", "circle,"), ("crdpll", "60", "circle,"),
                                     ("pico", "60", "circle,"), ("pico", "1", "circle,star")):
        out = tmp_path / f"{objective}{what}"
        assert align_run(out, "--arch", "tiny", "--data", tmp_path / what, "--classes", classes,
                         "--candidates", tmp_path / "sets.csv", "--max-steps", 2, "--objective",
                         objective) == 0
        assert "NaN" not in (out / "log.jsonl").read_text()
    assert "warning: circle is the only class" in capsys.readouterr().err
    verdicts = coft.verdicts
    monkeypatch.setattr(coft, "verdicts", lambda *a: (verdicts(*a)[0], verdicts(*a)[1] & False))
    assert run(tmp_path / "none", "--max-steps", 1) == 0            # nothing is called clean
    assert [e["kept"] for e in epochs_of(tmp_path / "none") if "kept" in e] == [0, 0]


def test_same_for_any_number_of_workers(drawn, tmp_path):
    save_pictures(tmp_path / "data", drawn)
    for workers in (0, 1, 2):
        assert run(tmp_path / f"{workers}", "--data", tmp_path / "data", "--arch", "tiny",
                   "--max-steps", 2, "--epochs2", 0, "--workers", workers) == 0
    same_result(tmp_path / "0", tmp_path / "1")
    same_result(tmp_path / "0", tmp_path / "2")
