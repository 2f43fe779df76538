"""Writes the tiny checkpoints under `weights/` and what they hold, `weights/expected.json`.

Made with PyTorch 2.15.0, NumPy 2.4.6, Python 3.11.7; every number follows from a formula, so no seed is needed. Run it from
this folder: `python weights.py`. The `hostile_*` files ask Python to run something when they are unpickled: do not load
them with `torch.load(weights_only=False)`.
"""

import argparse
import collections
import io
import json
import os
import pathlib
import zipfile

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent / "weights"
EXPECTED = {}
NAMES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}


def wave(*shape):
    """Numbers that differ from each other, with signs, exact in no short decimal."""
    count = int(np.prod(shape))
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + 0.1).reshape(shape).float()


def save(name, value, state, key, metadata=None, legacy=False, protocol=2):
    path = HERE / name
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    expect(name, state, key, metadata, "PyTorch (legacy)" if legacy else "PyTorch (zip)")


def expect(name, state, key, metadata, form):
    tensors = {
        k: {"dtype": NAMES[v.dtype], "shape": list(v.shape), "values": v.detach().float().flatten().double().tolist()}
        for k, v in state.items() if isinstance(v, torch.Tensor) and v.dtype in NAMES
    }
    EXPECTED[name] = {"format": form, "state_key": key, "metadata": metadata or {}, "tensors": tensors}


def moco(legacy, name):
    state = collections.OrderedDict()
    for encoder in ("encoder_q", "encoder_k"):
        state[f"module.{encoder}.conv1.weight"] = wave(4, 3, 2, 2)
        state[f"module.{encoder}.bn1.weight"] = wave(4)
        state[f"module.{encoder}.bn1.num_batches_tracked"] = torch.tensor(4003)
        state[f"module.{encoder}.fc.0.weight"] = wave(3, 4).half()
    state["module.queue"] = wave(3, 5)
    state["module.queue_ptr"] = torch.tensor([2])
    state._metadata = collections.OrderedDict([("", {"version": 1}), ("module", {"version": 1})])
    weight = torch.nn.Parameter(wave(2))
    optimizer = torch.optim.SGD([weight], lr=0.03, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    value = {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": optimizer.state_dict()}
    save(name, value, state, "state_dict", {"epoch": 200, "arch": "resnet18"}, legacy)


def dtypes(legacy, name, protocol):
    values = wave(2, 3) * 5
    state = {kind: (values * 50 if not dtype.is_floating_point else values).to(dtype) for dtype, kind in NAMES.items()
             if kind not in ("u8", "bool")}
    state["u8"] = torch.tensor([0, 7, 255], dtype=torch.uint8)
    state["bool"] = torch.tensor([True, False, True])
    state["scalar"] = torch.tensor(-(2**33))
    state["empty"] = torch.zeros(0, 3)
    state["complex"] = torch.tensor([1 + 2j])
    save(name, state, state, "", None, legacy, protocol)


def views(legacy, name):
    base = wave(6, 4)
    state = {
        "base": base, "transposed": base.t(), "rows": base[2:4], "columns": base[:, 1:3], "steps": base[::2, ::3],
        "expanded": base[1:2, :1].expand(5, 3), "permuted": base.reshape(2, 3, 4).permute(2, 0, 1), "alias": base,
    }
    save(name, state, state, "", None, legacy)


def objects(legacy, name):
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(wave(*value.shape) if value.is_floating_point() else torch.tensor(17))
    state = network.state_dict(keep_vars=True)
    tagged = torch.nn.Parameter(wave(2))
    tagged.note = "an attribute"
    state["tagged"] = tagged
    settings = argparse.Namespace(arch="resnet50", lr=0.03, cos=True, schedule=[120, 160], size=torch.Size([3]))
    value = {
        "model": {"inner": {"unrelated": 1}, "state_dict": state}, "args": settings, "best_acc1": np.float64(12.5),
        "scores": np.arange(3), "device": torch.device("cpu"), "when": None, "path": pathlib.PurePosixPath("a/b"),
        "table": collections.defaultdict(list, {"a": [1]}), "tags": {"x", "y"}, "huge": 1 << 80, "version": "1.0",
    }
    metadata = {"args.arch": "resnet50", "args.lr": 0.03, "args.cos": True, "version": "1.0"}
    save(name, value, state, "model.state_dict", metadata, legacy)


def two_networks():
    value = {"student": {"w": wave(2)}, "teacher": {"w": wave(3), "b": wave(1)}, "epoch": 5}
    save("two_networks.pth", value, value["teacher"], "teacher", {"epoch": 5})


def long_name():
    """PyTorch names the folder in the archive after the file. Here the central directory's first header, 46 bytes and a name of 30, is
    as long as what PyTorch writes between the directory and its end: readers that guess where an archive begins are led astray."""
    state = {"w": wave(2), "b": wave(3)}
    save("mobilenetv3_large_100.pth", state, state, "")


def rezip():
    """The same records compressed, and in the other byte order."""
    state = {"w": wave(3, 5), "h": wave(4).half(), "n": torch.tensor([258, -3])}
    for name, order in (("deflated.pth", "little"), ("big_endian.pth", "big")):
        plain = io.BytesIO()
        torch.save(state, plain)
        packing = zipfile.ZIP_DEFLATED if order == "little" else zipfile.ZIP_STORED
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(HERE / name, "w", packing) as target:
            for member in source.namelist():
                data = source.read(member)
                if member.endswith("byteorder"):
                    data = order.encode()
                elif "/data/" in member and order == "big":
                    size = list(state.values())[int(member.rsplit("/", 1)[1])].element_size()
                    data = b"".join(data[i:i + size][::-1] for i in range(0, len(data), size))
                target.writestr(zipfile.ZipInfo(member), data, packing)
        expect(name, state, "", None, "PyTorch (zip)")


class Hostile:
    def __init__(self, function, argument):
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


def hostile():
    payload = "open('hostile_ran', 'w').close()"
    for name, call in (("system", Hostile(os.system, "touch hostile_ran")), ("eval", Hostile(eval, payload))):
        for legacy in (False, True):
            state = {"w": wave(2)}
            value = {"state_dict": state, "epoch": call}
            save(f"hostile_{name}{'_legacy' if legacy else ''}.pth", value, state, "state_dict", None, legacy)


def main():
    HERE.mkdir(exist_ok=True)
    moco(False, "moco_zip.pth.tar")
    moco(True, "moco_legacy.pth.tar")
    dtypes(False, "dtypes_zip.pth", 2)
    dtypes(False, "dtypes_protocol_4.pth", 4)
    dtypes(False, "dtypes_protocol_5.pth", 5)
    dtypes(True, "dtypes_legacy.pth", 2)
    views(False, "views_zip.pth")
    views(True, "views_legacy.pth")
    objects(False, "objects_zip.pth")
    objects(True, "objects_legacy.pth")
    two_networks()
    long_name()
    rezip()
    hostile()
    text = json.dumps(EXPECTED, indent=None, separators=(",", ":"), sort_keys=True)
    (HERE / "expected.json").write_text(text.replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
