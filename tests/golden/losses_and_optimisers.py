"""Golden values of both losses and of the moving average, by PyTorch in f64.

Written with Python 3.11.7 and torch 2.15.0 on the CPU; the output states the version. All inputs come from formula.py, so there is no
seed. Run: python tests/golden/losses_and_optimisers.py > tests/golden/losses_and_optimisers.json
"""

import json

import torch
import torch.nn.functional as F

from formula import fingerprint, parameter, unit_rows, values

BATCH, WIDTH, QUEUE = 20, 32, 150
SHAPES = {"fc.weight": (6, 5), "fc.bias": (6,), "bn.weight": (7,), "bn.bias": (7,)}


def rows(name, count):
    return torch.from_numpy(unit_rows(name, count, WIDTH)).double()


def info_nce():
    q = rows("q", BATCH).requires_grad_()
    k, queue = rows("k", BATCH), rows("queue", QUEUE)
    k = F.normalize(k + 0.5 * q.detach(), dim=1).float().double()
    out = []
    for temperature in [0.2, 0.07]:
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.t()], dim=1) / temperature
        loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        (gradient,) = torch.autograd.grad(loss, q)
        top1 = 100.0 * (logits.argmax(1) == 0).double().mean().item()
        out.append({"temperature": temperature, "loss": loss.item(), "top1": top1, "gradient": fingerprint("q", gradient.numpy())})
    return out


def distillation():
    student = rows("q", BATCH).requires_grad_()
    loss = F.mse_loss(student, rows("k", BATCH), reduction="sum") / BATCH
    (gradient,) = torch.autograd.grad(loss, student)
    return {"loss": loss.item(), "gradient": fingerprint("q", gradient.numpy())}


def ema():
    """Ten steps of momentum 0.99 towards a fixed query."""
    out = {}
    for name, shape in SHAPES.items():
        key = torch.from_numpy(parameter(name, shape)).double()
        query = torch.from_numpy(values(f"query {name}", shape, -1.0, 1.0)).double()
        for _ in range(10):
            key = key * 0.99 + query * 0.01
        out[name] = fingerprint(name, key.numpy())
    return out


def main():
    golden = {
        "versions": {"torch": torch.__version__},
        "info_nce": info_nce(),
        "distillation": distillation(),
        "ema": ema(),
    }
    print(json.dumps(golden, indent=1))


if __name__ == "__main__":
    main()
