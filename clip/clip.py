"""Loading CLIP: checkpoints of five formats, verified downloads, tokens, preprocessing.

Nothing in a checkpoint is executed.  Archives of torch.save and of TorchScript are read without
torch.load: a restricted unpickler builds tensors and containers, and refuses everything else.
"""
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

import torch
from torchvision import transforms

from .model import CLIPError, build_model
from .simple_tokenizer import SimpleTokenizer

# name: (SHA-256 of the official file, Hugging Face repository with a copy of the weights)
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_MODELS = {
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
             "timm/resnet50_clip.openai"),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
              "timm/resnet101_clip.openai"),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
               "timm/resnet50x4_clip.openai"),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
                "timm/resnet50x16_clip.openai"),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
                "timm/resnet50x64_clip.openai"),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
                 "openai/clip-vit-base-patch32"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
                 "openai/clip-vit-base-patch16"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
                 "openai/clip-vit-large-patch14"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
                       "openai/clip-vit-large-patch14-336"),
}
_OFFICIAL = ("https://openaipublic.azureedge.net/clip/models",
             "https://openaipublic.blob.core.windows.net/clip/models")


def _urls(name):
    """[(url, SHA-256 or None)] in the order of trial; None: the reply itself must name it."""
    sha256, repo = _MODELS[name]
    files = (("open_clip_model.safetensors",) if repo.startswith("timm/") else
             ("model.safetensors", "pytorch_model.bin"))
    return ([(f"{host}/{sha256}/{re.sub('[/@]', '-', name)}.pt", sha256) for host in _OFFICIAL]
            + [(f"https://huggingface.co/{repo}/resolve/main/{file}", None) for file in files])


_SOURCES = {name: _urls(name) for name in _MODELS}
_TIMEOUT = 20  # seconds without a byte, or with fewer than 1000 bytes a second
_LARGEST = 4 * 10**9  # bytes; the largest of the files has 1.8 GB
_DIFFERS = ("{} is not the expected file (its SHA-256 differs): move it away to download it again, "
            "or pass it with --weights FILE if you trust it")
_tokenizer = SimpleTokenizer()


# ---------------------------------------------------------------------------------- public


def available_models():
    """Names that `load` knows: OpenAI's nine, and "tiny", which lies in this folder."""
    return [*_MODELS, "tiny"]


def load(name, device="cpu", download_root=None, jit=False, quick_gelu=None):
    """(model in eval() and fp32, preprocess) for a model's name or a checkpoint file.

    `name`: one of `available_models()`, downloaded on first use to `download_root` (default
    ~/.cache/clip), or a file: OpenAI's .pt, a plain state dict (also one under "state_dict" or
    "model"), Hugging Face's CLIPModel or open_clip's, as .pt, .bin or .safetensors.
    `quick_gelu`: None is what the file says, else True, which is right for OpenAI's weights; most
    open_clip weights trained on LAION need False, and their files do not say so.
    `preprocess`: PIL image of any mode and size -> (3, R, R), R = model.visual.input_resolution.
    Raises CLIPError, one line, when the name, the file, its contents or the network are at fault.
    """
    if jit or download_root is True:  # True: openai/CLIP has jit in the third place
        raise CLIPError("jit=True is not supported: TorchScript is deprecated, use jit=False")
    name = os.fspath(name)
    if name == "tiny":
        path = str(Path(__file__).with_name("tiny.pt"))
    elif name in _MODELS:
        path = _download(name, download_root or Path.home() / ".cache" / "clip")
    else:
        path = name
    if not os.path.isfile(path):
        raise CLIPError(f"no such model or file: {path} (models: {', '.join(available_models())})")
    weights, extra = _read_checkpoint(path)
    if quick_gelu is None:
        quick_gelu = extra.get("quick_gelu", True)
    try:
        model = build_model(weights, quick_gelu=bool(quick_gelu),
                            vision_heads=extra.get("vision_heads"),
                            transformer_heads=extra.get("transformer_heads"))
    except Exception as error:  # any shape may be in a file, 0 among them
        raise CLIPError(f"{path}: {_one_line(error)}") from None
    return model.to(device), _transform(model.visual.input_resolution)


# name: (resolution, embedding width, patch size, 0 for a ResNet)
_SHAPES = {"RN50": (224, 1024, 0), "RN101": (224, 512, 0), "RN50x4": (288, 640, 0),
           "RN50x16": (384, 768, 0), "RN50x64": (448, 1024, 0), "ViT-B/32": (224, 512, 32),
           "ViT-B/16": (224, 512, 16), "ViT-L/14": (224, 768, 14), "ViT-L/14@336px": (336, 768, 14),
           "tiny": (32, 64, 8)}


def check_architecture(model, name):
    """CLIPError unless `model` has the architecture `name`, one of `available_models()`."""
    visual = model.visual
    patch = visual.conv1.kernel_size[0] if hasattr(visual, "transformer") else 0
    if name not in _SHAPES:
        raise CLIPError(f"no such model: {name} (models: {', '.join(_SHAPES)})")
    found = (visual.input_resolution, visual.output_dim, patch)
    if found != _SHAPES[name]:
        raise CLIPError(f"the weights are not those of {name}: resolution {found[0]}, embedding "
                        f"{found[1]}, " + (f"patch {patch}" if patch else "a ResNet"))


def tokenize(texts, context_length=77, truncate=False):
    """A string or a list of n strings -> LongTensor (n, context_length): start, text, end, zeros.

    A text that does not fit raises CLIPError (a RuntimeError), or is cut when `truncate` is set.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    start, end = _tokenizer.encoder["<|startoftext|>"], _tokenizer.encoder["<|endoftext|>"]
    result = torch.zeros(len(texts), context_length, dtype=torch.long)  # (n, L)
    for row, text in zip(result, texts):
        ids = [start, *_tokenizer.encode(text), end]
        if len(ids) > context_length:
            if not truncate:
                raise CLIPError(f"{len(ids)} tokens are too long for context length "
                                f"{context_length}: {text[:60]!r}")
            ids = [*ids[:context_length - 1], end]
        row[:len(ids)] = torch.tensor(ids)
    return result


def _to_rgb(image):
    return image.convert("RGB")


def _transform(n_px):
    """CLIP's test transform.  Its order matters: palette images are resized before they are RGB."""
    return transforms.Compose([
        transforms.Resize(n_px, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(n_px),
        _to_rgb,
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])


# ---------------------------------------------------------------------------------- checkpoints


def _read_checkpoint(path):
    """(state dict with OpenAI's names, other entries such as quick_gelu) of any file."""
    try:
        data, extra = _read_file(path), {}
        if not isinstance(data, dict):
            raise ValueError("it holds no state dict")
        for key in ("state_dict", "model"):
            if isinstance(data.get(key), dict):
                extra, data = data, data[key]
                break
        weights = {key: value for key, value in data.items()
                   if isinstance(key, str) and isinstance(value, torch.Tensor)}
        if sum(value.numel() for value in weights.values()) > os.path.getsize(path):
            raise ValueError("its tensors have more elements than the file has bytes")
        weights = _openai_names(weights)
        rows = weights.get("token_embedding.weight")
        if extra.get("token_ids") is not None and len(rows) != extra["vocab_size"]:
            # the file holds only the rows of tokens that were trained: the others are zero
            if extra["vocab_size"] > len(_tokenizer.encoder):
                raise ValueError(f"a vocabulary of {extra['vocab_size']} tokens is not CLIP's")
            full = rows.new_zeros(extra["vocab_size"], rows.shape[1])
            full[extra["token_ids"]] = rows
            weights["token_embedding.weight"] = full
    except Exception as error:  # a damaged or hostile file may provoke any: one line
        raise CLIPError(f"cannot read {path} as a checkpoint: {_one_line(error)}") from error
    return weights, extra


def _one_line(error):
    text = " ".join(str(error).split())[:200]
    return "".join(c if c.isprintable() else "?" for c in text) or type(error).__name__


def _read_file(path):
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") < os.path.getsize(path):
        return _read_safetensors(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, os.path.getsize(path))
    raise ValueError("expected safetensors or a zip archive (a file that torch.save wrote before "
                     "1.6: torch.load it where you trust it, and torch.save it again)")


class Unpickler(pickle._Unpickler):
    """Builds containers, numbers and texts, and what a subclass's `find_class` knows; no sets.

    In Python: 20 bytes make the one in C ask for all memory.  Keys are texts or numbers: the hash
    of nested tuples may take for ever.  Only what has a __setstate__ is given a state.
    """
    dispatch = {code: pickle._Unpickler.dispatch[code] for code in pickle._Unpickler.dispatch if
                code not in b"".join((
                    pickle.DICT, pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4,
                    pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8))}

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")

    def set_items(self, *items):
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, (str, bytes, int)):
                raise pickle.UnpicklingError("a key is neither text nor a number")
            self.stack[-1][key] = value

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(key, value)

    def load_setitems(self):
        self.set_items(*self.pop_mark())

    def load_build(self):
        if type(self.stack[-2]) is dict:  # an OrderedDict's attributes: state_dict's _metadata
            self.stack.pop()
            return
        if not hasattr(type(self.stack[-2]), "__setstate__"):
            raise pickle.UnpicklingError("it gives a state to what has none")
        super().load_build()

    dispatch.update({pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
                     pickle.BUILD[0]: load_build})


_STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32,
             "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
             "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
             "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}


# Classes that stand in a training checkpoint beside its weights: nothing of them is kept.
_IGNORED = {("torch", "device"), ("torch", "Size"), ("argparse", "Namespace"),
            *(("torch", str(dtype)[len("torch."):]) for dtype in _STORAGES.values())}


def _read_archive(archive, size):
    """{name: tensor} of a zip that torch.jit.save wrote, whose code is not looked at; or the dict
    that torch.save wrote, with the tensors in it and in the dicts in it.

    data.pkl is a dict, or a tree of module objects whose attributes are tensors and modules.
    size: of the file, in bytes.
    """
    pickled = min((name for name in archive.namelist() if name.endswith("/data.pkl")), key=len,
                  default=None)
    if pickled is None or archive.getinfo(pickled).file_size > 2**26:
        raise ValueError("it holds no data.pkl, or one of more than 64 MB")
    root = pickled[:-len("data.pkl")]
    if sum(info.file_size for info in archive.infolist()
           if not info.filename.startswith(f"{root}code/")) > size:
        raise ValueError("its parts are larger than the file, but only code is compressed")
    storages = {}

    class Record:  # stands for a module, or for what is ignored: holds attributes, does nothing
        fields, tensor = {}, None

        def __new__(cls, *args, **kwargs):
            return object.__new__(cls)

        def __setstate__(self, state):
            self.fields = state if isinstance(state, dict) else {}

    def rebuild_tensor(storage, offset, size, stride, *_):
        dtype, key = storage
        if not all(type(n) is int and abs(n) < 2**63 for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor's size is not of numbers")
        record = Record()
        record.tensor = (dtype, key, offset, size, stride)  # a description; see `build`
        return record

    def ordered(*items):
        if items:  # Python 3 adds them one by one
            raise pickle.UnpicklingError("it fills an OrderedDict as it makes it")
        return {}

    class Reader(Unpickler):
        def find_class(self, module, name):
            if module == "torch" and name in _STORAGES:
                return _STORAGES[name]
            if (module.split(".")[0] == "__torch__" or module == "torch.jit._pickle"
                    or (module, name) in _IGNORED):
                return Record
            known = {"torch._utils _rebuild_tensor_v2": rebuild_tensor,
                     "torch._utils _rebuild_parameter": lambda data, *_: data,
                     "collections OrderedDict": ordered}
            return known.get(f"{module} {name}") or super().find_class(module, name)

        def persistent_load(self, pid):
            if not (isinstance(pid, tuple) and len(pid) > 2 and isinstance(pid[2], str)):
                raise pickle.UnpicklingError("a storage without a name")
            return pid[1], pid[2]  # dtype, name of the storage

    def build(dtype, key, offset, size, stride):
        if key not in storages:
            raw = bytearray(archive.read(f"{root}data/{key}"))
            storages[key] = (torch.frombuffer(raw, dtype=dtype) if raw else
                             torch.empty(0, dtype=dtype))
        if storages[key].dtype != dtype or math.prod(size) > storages[key].numel():
            raise ValueError(f"a tensor does not fit its storage {key}")
        return torch.as_strided(storages[key], size, stride, offset)  # checks the bounds

    weights, seen = {}, set()

    def walk(record, prefix):
        seen.add(id(record))
        for name, value in record.fields.items():
            if isinstance(value, Record) and value.tensor is not None:
                weights[prefix + name] = build(*value.tensor)
            elif isinstance(value, Record) and id(value) not in seen:
                walk(value, f"{prefix}{name}.")

    def tensors(table):
        return {key: build(*value.tensor) if isinstance(value, Record) and value.tensor else value
                for key, value in table.items()}

    found = Reader(io.BytesIO(archive.read(pickled))).load()
    if isinstance(found, Record):
        walk(found, "")
        return weights
    if not isinstance(found, dict):
        raise ValueError("it holds no state dict")
    return {key: tensors(value) if key in ("state_dict", "model") and type(value) is dict else value
            for key, value in tensors(found).items()}


def _read_safetensors(path):
    """{name: tensor}: a 64-bit little-endian length, a JSON header of that length, raw tensors."""
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
              "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
              "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
    weights = {}
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        room = left = os.path.getsize(path) - start
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape = dtypes[entry["dtype"]], entry["shape"]
            begin, end = entry["data_offsets"]
            if not (0 <= begin <= end <= room and all(n >= 0 for n in shape)
                    and end - begin == math.prod(shape) * dtype.itemsize):
                raise ValueError(f"the entry {name!r} of its header points outside of the file")
            left -= end - begin
            if left < 0:
                raise ValueError("the entries of its header overlap")
            file.seek(start + begin)
            raw = bytearray(file.read(end - begin))
            flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
            weights[name] = flat.reshape(shape)
    return weights


_HUGGING_FACE = (  # (their part of a name, OpenAI's)
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.final_layer_norm.", "ln_final."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # their spelling
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj.weight"),
    (".self_attn.", ".attn."), (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."))


def _openai_names(weights):
    """The state dict with OpenAI's names, from those of DDP, open_clip or Hugging Face."""
    if weights and all(key.startswith("module.") for key in weights):
        weights = {key[len("module."):]: value for key, value in weights.items()}
    if "text.token_embedding.weight" in weights:  # open_clip's CustomTextCLIP
        weights = {key.removeprefix("text."): value for key, value in weights.items()}
    if "text_model.embeddings.token_embedding.weight" in weights:
        renamed = {}
        for key, value in weights.items():
            for theirs, ours in _HUGGING_FACE:
                key = key.replace(theirs, ours)
            renamed[key] = value
        weights = renamed
        for key in [key for key in weights if ".attn.q_proj." in key]:
            parts = [weights.pop(key.replace(".q_proj.", f".{c}_proj.")) for c in "qkv"]
            weights[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    for key in ("text_projection", "visual.proj"):
        if f"{key}.weight" in weights:  # a Linear layer keeps the transpose
            weights[key] = weights.pop(f"{key}.weight").t()
    return weights


# ---------------------------------------------------------------------------------- download


class _SourceFailed(Exception):
    """One source cannot deliver; the message says why, and the next one is tried."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and remembers the SHA-256 that Hugging Face sends with the first reply."""

    def __init__(self, sha256):
        self.sha256, self.first = sha256, True

    def look(self, headers):
        etag = headers.get("X-Linked-Etag", "").strip('W/"').lower()
        if self.first and self.sha256 is None and re.fullmatch("[0-9a-f]{64}", etag):
            self.sha256 = etag
        self.first = False

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.look(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _say(text, end="\n"):
    print(text, end=end, file=sys.stderr, flush=True)


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(name, root):
    """Path of a named model's verified weights under `root`: from the cache, else the network."""
    stem, tried, sources = Path(root) / re.sub("[/@]", "-", name), [], []
    for url, sha256 in _SOURCES[name]:
        path = f"{stem}{Path(urllib.parse.urlsplit(url).path).suffix}"
        note = Path(path + ".sha256")  # beside a Hugging Face copy: the hash that was verified
        sources.append((url, path, note, sha256))
        known = sha256 or (note.read_text("latin-1").strip() if note.is_file() else None)
        if known and os.path.isfile(path):
            if _sha256(path) != known:
                raise CLIPError(_DIFFERS.format(path))
            return path
    for url, path, note, sha256 in sources:
        _say(f"downloading {name} from {url}")
        try:
            os.makedirs(root, exist_ok=True)
            found = _fetch(url, path, sha256)
            if sha256 is None:
                note.write_text(found + "\n")
            _say(f"{path}: SHA-256 verified")
            return path
        except _SourceFailed as reason:
            tried.append(f"{urllib.parse.urlsplit(url).netloc}: {reason}")
            _say(f"  failed: {reason}")
        except OSError as error:
            raise CLIPError(f"cannot write to {root}: {error.strerror or error}") from None
    raise CLIPError(f"cannot download {name} (tried {'; '.join(tried)}): get the file elsewhere "
                    f"and pass it with --weights FILE")


def _fetch(url, path, sha256):
    """Download one file through `path`.part, which is resumed, and move it to `path`; its SHA-256.

    Raises _SourceFailed; the part is kept for the next attempt unless its contents are wrong, and a
    file that lies at `path` is never replaced.
    """
    part = path + ".part"
    fresh = not os.path.exists(part)  # nothing of an earlier run, or of another host, is in it
    for _ in range(100):
        before = os.path.getsize(part) if os.path.exists(part) else 0
        redirects = _Redirects(sha256)
        request = urllib.request.Request(url, headers={"User-Agent": "clip"})
        if before:
            request.add_header("Range", f"bytes={before}-")
        try:
            with _open(urllib.request.build_opener(redirects), request) as reply:
                redirects.look(reply.headers)
                if redirects.sha256 is None:
                    raise _SourceFailed("the reply names no SHA-256 to verify the file with")
                if os.path.exists(path):  # not verified before, for want of a hash
                    if _sha256(path) != redirects.sha256:
                        raise CLIPError(_DIFFERS.format(path))
                    return redirects.sha256
                end = _receive(reply, part, before if reply.status == 206 else 0)
        except urllib.error.HTTPError as error:
            redirects.look(error.headers)
            end = "complete" if error.code == 416 and before else f"HTTP {error.code}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            end = _one_line(getattr(error, "reason", error))
        if end == "complete":
            if _sha256(part) == redirects.sha256:
                os.replace(part, path)
                return redirects.sha256
            os.remove(part)
            if fresh:
                raise _SourceFailed("wrong SHA-256")
            fresh, end = True, "wrong SHA-256 after resuming, again from the start"
        elif not os.path.exists(part) or os.path.getsize(part) <= before:
            raise _SourceFailed(end)  # no progress
        _say(f"  {end}")
    raise _SourceFailed("the connection broke off 100 times")


def _open(opener, request):
    """The reply, in 3 * _TIMEOUT seconds however slowly its head comes.  OSError."""
    result = []

    def work():
        try:
            result.append(opener.open(request, timeout=_TIMEOUT))
        except BaseException as error:  # raised in the thread that waits
            result.append(error)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(3 * _TIMEOUT)
    if not result:
        raise TimeoutError("no answer in time")
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def _receive(reply, part, before):
    """Write the reply's body to `part` from byte `before` on; "complete", or what went wrong."""
    length = reply.length or 0  # 0: not known
    tty, began = sys.stderr.isatty(), time.monotonic()
    done, shown, mark = before, began, (began, before)
    if before + length > _LARGEST:
        return f"{before + length} bytes cannot be right"
    try:
        file = open(part, "r+b" if before else "wb")
    except OSError as error:
        raise CLIPError(f"cannot write {part}: {error.strerror}") from None
    with file:
        file.seek(before)
        while block := reply.read1(1 << 18):
            if done + len(block) > _LARGEST:
                raise _SourceFailed("it sends without end")
            try:
                file.write(block)
                file.flush()
            except OSError as error:
                raise CLIPError(f"cannot write {part}: {error.strerror}") from None
            done += len(block)
            now = time.monotonic()
            if now - mark[0] > _TIMEOUT:
                if done - mark[1] < 1000 * _TIMEOUT:
                    raise _SourceFailed("fewer than 1000 bytes a second")
                mark = now, done
            if now - shown > (0.2 if tty else 10):
                shown = now
                rate = (done - before) / (now - began) / 1e6
                _say(f"  {done / 1e6:.1f} of {(before + length) / 1e6:.1f} MB, {rate:.1f} MB/s",
                     end="\r" if tty else "\n")
    return "complete" if done - before == length or not length else "the connection broke off"
