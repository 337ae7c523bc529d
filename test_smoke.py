"""Tests of everything, on a CPU and without a network: python -m pytest -q test_smoke.py

clip/ against golden numbers and files made here, data.py against folders made here, coft.py's
equations against naive loops, and whole runs on small pieces of the demo.
"""
import csv
import hashlib
import http.server
import json
import math
import os
import pickle
import random
import signal
import struct
import sys
import threading
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import coft
import data
from clip import clip as clip_files
from clip import shapes
from clip.model import CLIP, QuickGELU

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


@pytest.mark.parametrize("layout", ["plain", "legacy", "half", "state_dict", "module.", "text.",
                                    "hugging_face", "safetensors"])
def test_checkpoint_formats(layout, small, tmp_path):
    path = tmp_path / "weights.bin"
    if layout == "safetensors":
        save_safetensors(hugging_face(small), path)
    else:
        torch.save({
            "plain": small, "legacy": small, "half": {k: v.half() for k, v in small.items()},
            "state_dict": {"state_dict": small, "epoch": 3, "quick_gelu": False},
            "module.": {"model": {"module." + k: v for k, v in small.items()}},
            "text.": {k if k.startswith(("visual", "logit")) else "text." + k: v
                      for k, v in small.items()} | {"text.attn_mask": torch.zeros(77, 77)},
            "hugging_face": hugging_face(small)}[layout], path,
            _use_new_zipfile_serialization=layout != "legacy")
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
        weights = clip_files._read_torchscript(archive)
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
    for name, reason in (("evil.pt", "visual.conv1.weight"), ("root.pt", "visual.conv1.weight"),
                         ("big.pt", "does not fit its storage"), ("hole.pt", "x/data/0"),
                         ("plain.pt", "cannot read")):
        with pytest.raises(clip.CLIPError, match=reason) as error:
            clip.load(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
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

PETS = [("Abyssinian", 1), ("american_bulldog", 2), ("Bengal", 3)]     # official ids; Bengal is cat


def picture(path, k=0, size=(40, 30), mode="RGB", fmt=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = random.Random(k).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, noise).convert(mode).save(path, fmt)


def class_folders(root, n=4, names=("dog", "cat", "bear")):
    for c in names:
        for k in range(n):
            picture(root / c / f"{k:03d}.png", k)


def pets(root, split=True, official=True):
    rows = {"train": [], "val": [], "test": []}
    lines = {"trainval": ["#Image CLASS-ID SPECIES BREED ID"], "test": []}
    for name, label in PETS:
        for k in range(6):
            part = "test" if k > 3 else "val" if k == 3 else "train"
            picture(root / "images" / f"{name}_{k}.jpg", k)
            rows[part].append([f"{name}_{k}.jpg", label - 1, name.lower()])
            lines["test" if k > 3 else "trainval"].append(f"{name}_{k} {label} 1 1")
    picture(root / "images" / "not_in_any_split_1.jpg")
    if split:
        random.Random(0).shuffle(rows["train"])
        (root / "split_zhou_OxfordPets.json").write_text(json.dumps(rows, indent=4))
    if official:
        (root / "annotations").mkdir()
        for part, text in lines.items():
            (root / "annotations" / f"{part}.txt").write_text("\n".join(text) + "\n")
    return root


def refuses(*args, **kwargs):
    with pytest.raises(data.DataError) as e:
        data.load(*args, **kwargs)
    return str(e.value)


@pytest.mark.parametrize("wrapped", [False, True])
def test_data_coop_pets(tmp_path, wrapped):
    pets(tmp_path / "oxford_pets")
    inside = "oxford_pets/" if wrapped else ""
    d = data.load(tmp_path if wrapped else tmp_path / "oxford_pets")
    assert d.class_names == ["abyssinian", "american bulldog", "bengal"]
    assert d.templates == ["a photo of a {}, a type of pet."]
    assert (len(d.train), len(d.test)) == (9, 6) and "CoOp" in d.description
    assert "9 training and 6 test" in d.description and "3 images of val" in d.description
    assert ("in oxford_pets/" in d.description) == wrapped and "\n" not in d.description
    for images in (d.train, d.test):
        for name, y in zip(images.names, images.y_true.tolist()):
            assert name.startswith(inside + "images/")
            assert Path(name).name.rsplit("_", 1)[0].lower() == d.class_names[y].replace(" ", "_")


@pytest.mark.parametrize("folder", ["oxford-iiit-pet", "oxford_pets"])
def test_data_official_pets(tmp_path, folder):
    pets(tmp_path / folder, split=False)
    d = data.load(tmp_path / folder)
    assert d.class_names == ["abyssinian", "american bulldog", "bengal"]
    assert (len(d.train), len(d.test)) == (12, 6) and "official split" in d.description
    assert d.test.y_true.tolist() == [0, 0, 1, 1, 2, 2]
    assert d.test.names[0] == "images/Abyssinian_4.jpg"
    (tmp_path / folder / "annotations" / "test.txt").write_text("Abyssinian 1\nwhat\n")
    assert "annotations/test.txt line 1" in refuses(tmp_path / folder)


@pytest.mark.parametrize("text, says", [
    ("{", "line 1 column 2"), ("[]", "expected {"), ('{"train": 3}', "train[0]"),
    ("{}", "0 classes"),
    ('{"train": [["a.jpg", 0, "a"], ["b.jpg", "1", "b"]]}', "train[1]: expected [path, label"),
    ('{"train": [["a.jpg", 0, "a"], ["b.jpg", 2, "b"]]}', "without a gap"),
    ('{"train": [["a.jpg", 0, "a"], ["b.jpg", 0, "b"]]}', "both a and b"),
    ('{"train": [["a.jpg", 0, "a"]], "test": [["c.jpg", 5, "c"]]}', "labels [0, 5]"),
])
def test_data_malformed_split(tmp_path, text, says):
    pets(tmp_path, split=False)
    (tmp_path / "split_zhou_OxfordPets.json").write_text(text)
    message = refuses(tmp_path)
    assert message.startswith("split_zhou_OxfordPets.json") and says in message
    assert "\n" not in message


def test_data_split_names_missing_files(tmp_path, capsys):
    pets(tmp_path)
    for k in range(2):
        (tmp_path / "images" / f"Bengal_{k}.jpg").unlink()
    d = data.load(tmp_path)
    assert len(d.train) == 7 and len(d.class_names) == 3
    err = capsys.readouterr().err
    assert "warning: 2 of 15 images missing, skipped: images/Bengal_0.jpg" in err
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    assert "none of 9 training images can be read: images/" in refuses(tmp_path)
    assert "is missing" in refuses(tmp_path)


def test_data_unknown_split_is_no_random_split(tmp_path):
    class_folders(tmp_path)
    (tmp_path / "split_zhou_Unheard.json").write_text("{}")
    assert "split_zhou_Unheard.json" in refuses(tmp_path)


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
    assert "at least two" in refuses(photos, "") and "at least two" in refuses(photos, [])
    assert "differ" in refuses(photos, "cat,dog,Cat") and "differ" in refuses(photos, "a b,a_b")


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
        pets(tmp_path / name)
    assert "several data sets, give one: p, q" in refuses(tmp_path)


def test_data_unreadable_named_and_skipped(tmp_path, capsys):
    for k in range(3):
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
    assert d.train.names == ["ok0.jpg", "ok1.jpg", "ok2.jpg", "png_inside.jpg"]
    err = capsys.readouterr().err.splitlines()
    assert [line.split(", skipped")[0] for line in err] == [
        "warning: 1 of 10 images missing", "warning: 5 of 10 images unreadable"]
    assert all(f"bad_{x}" in err[1] for x in ("cut", "empty", "text", "eps", "bomb"))
    assert "bad_eps.jpg (not an image)" in err[1]        # Pillow would run Ghostscript
    assert d.train.image(3).mode == "RGB"
    for name in d.train.names:
        (tmp_path / name).unlink()
    assert "none of 6 training images can be read: bad_bomb.png" in refuses(tmp_path, "a,b")
    assert not capsys.readouterr().err
    with pytest.raises(data.DataError, match="ok0.jpg"):
        d.train.image(0)


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


def test_data_main(tmp_path, capsys):
    class_folders(tmp_path)
    sheet = tmp_path / "sheet.png"
    assert data.main([str(tmp_path), "--classes", "bear,cat,dog", "--sheet", str(sheet)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("class folders") and out[1] == "classes: bear, cat, dog"
    assert len(out) == 16 and Image.open(sheet).size[1] == 18 + 3 * 56
    assert data.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


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
    assert verdict(2, p, p_clean, y0, high, single=True) == (
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
    assert torch.equal(me.features(frozen, x), f) and torch.allclose(me.text(frozen), t, atol=1e-6)
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

    def phase1(keep, lam, neg_grad=True, gamma=0.0):
        return coft.phase1_loss(frozen, me, x, y, keep, y, y_bar, lam, gamma, neg_grad, nullcontext)

    def phase2(keep, gamma):
        return coft.phase2_loss(frozen, me, x, y, keep, y, y_bar, gamma, nullcontext)
    l_cls, l_neg = phase1(all_, 0.0).item(), phase1(none, 1.0).item()
    assert phase1(all_, 0.5).item() == pytest.approx(l_cls + 0.5 * l_neg, rel=1e-5)      # Eq. 7
    assert gradients(frozen, me, phase1(all_, 0.0)) == {"V+", "prompts"}
    assert gradients(frozen, me, phase1(none, 1.0)) == {"V-", "prompts"}
    assert gradients(frozen, me, phase1(none, 1.0, neg_grad=False)) == {"V-"}
    assert gradients(frozen, me, phase1(all_, 0.0, gamma=1.0)) == {"V+", "prompts"}
    assert not gradients(frozen, me, phase1(none, 0.0, gamma=1.0))  # fairness alone: left out
    me.unfreeze(frozen)
    assert gradients(frozen, me, phase2(none, 0.0)) <= {"V-"}       # L_neg alone, as a spectator
    assert gradients(frozen, me, phase2(all_, 0.0)) >= {"visual", "classifier", "prompts"}
    assert gradients(frozen, me, phase2(none, 1.0)) <= {"V-"}
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
            [], ["--seed", 1], ["--single"], ["--threshold", 0.95], ["--no-neg-grad"],
            ["--lam", 0.5], ["--epochs2", 0], ["--epochs1", 0], ["--align", 0], ["--gamma", 0],
            ["--strong-view"],
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
        split = {part: [[f"{part}{i}.png", k, shapes.SHAPES[k]] for i, k in enumerate(drawn[part][1])]
                 for part in drawn}
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

    def full(content, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        folder.save("last.pt", {"epoch": 2})
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"epoch": 1}


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
            (["--resume"], "no last.pt in out")):
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
