"""Golden values of every optimiser, of clipping and of learning rates over time, by PyTorch and numpy in f64.

SGD and AdamW are torch.optim's. LARC is NVIDIA apex's `apex/parallel/LARC.py` with `clip=False`, written out around torch.optim.SGD;
LARS is `moco/optimizer.py` of facebookresearch/moco-v3, written out. Schedules are torch.optim.lr_scheduler's, and the numpy formulae
of facebookresearch/swav (`main_swav.py`) and facebookresearch/dino (`utils.py`, `cosine_scheduler`).

Written with Python 3.11.7, torch 2.15.0 and numpy 2 on the CPU; the output states the versions. All inputs come from formula.py, so
there is no seed. Run: python tests/golden/optimisers.py > tests/golden/optimisers.json
"""

import json
import math

import numpy as np
import torch
import torch.nn as nn

from formula import fingerprint, parameter, values

SHAPES = {"fc.weight": (6, 5), "fc.bias": (6,), "bn.weight": (7,), "bn.bias": (7,)}
STEPS = 5
MOMENTUM, DECAY, TRUST = 0.9, 1e-2, 0.02
CASES = [
    {"rule": "sgd"},
    {"rule": "sgd", "no_decay": True},
    {"rule": "sgd", "nesterov": True},
    {"rule": "sgd", "clip": 1.5},
    {"rule": "sgd", "clip": 50.0},
    {"rule": "lars", "no_decay": True},
    {"rule": "lars"},
    {"rule": "larc"},
    {"rule": "larc", "nesterov": True, "no_decay": True},
    {"rule": "adamw"},
    {"rule": "adamw", "no_decay": True, "clip": 1.5},
]


def lr_of(rule, step):
    return {"sgd": 0.1, "lars": 2.0, "larc": 2.0, "adamw": 0.01}[rule] / (1 + step)


def lars_step(p, lr, decay, spared, state):
    update = p.grad
    if not spared:
        update = update + decay * p
        length, norm = p.norm(), update.norm()
        one = torch.ones_like(length)
        update = update * torch.where(length > 0, torch.where(norm > 0, TRUST * length / norm, one), one)
    state["momentum_buffer"] = state.get("momentum_buffer", torch.zeros_like(p)) * MOMENTUM + update
    p -= lr * state["momentum_buffer"]


def larc_gradient(p, decay):
    length, norm = p.norm(), p.grad.norm()
    if length != 0 and norm != 0:
        rate = TRUST * length / (norm + length * decay + 1e-8)
        p.grad += decay * p
        p.grad *= rate


def optimise(case):
    rule, spare = case["rule"], case.get("no_decay", False)
    parameters = {n: nn.Parameter(torch.from_numpy(parameter(n, s)).double()) for n, s in SHAPES.items()}
    with torch.no_grad():
        parameters["bn.bias"].zero_()  # a norm of 0 in the first step
    spared = {n: spare and p.ndim <= 1 for n, p in parameters.items()}
    groups = [{"params": [p], "weight_decay": 0.0 if spared[n] or rule == "larc" else DECAY} for n, p in parameters.items()]
    if rule == "adamw":
        optimiser = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-3)
    else:
        optimiser = torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, nesterov=case.get("nesterov", False))
    norms = []
    for step in range(STEPS):
        lr = lr_of(rule, step)
        for group in optimiser.param_groups:
            group["lr"] = lr
        for name, p in parameters.items():
            p.grad = torch.from_numpy(values(f"gradient {step} {name}", SHAPES[name], -1.0, 1.0)).double()
        if "clip" in case:
            norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), case["clip"]).item())
        with torch.no_grad():
            if rule == "larc":
                for name, p in parameters.items():
                    larc_gradient(p, 0.0 if spared[name] else DECAY)
            if rule == "lars":
                for name, p in parameters.items():
                    lars_step(p, lr, DECAY, spared[name], optimiser.state[p])
            else:
                optimiser.step()
    state = {}
    for name, p in parameters.items():
        for key, prefix in [("momentum_buffer", ""), ("exp_avg", "exp_avg."), ("exp_avg_sq", "exp_avg_sq.")]:
            if key in optimiser.state[p]:
                state[prefix + name] = fingerprint(prefix + name, optimiser.state[p][key].numpy())
    return case | {
        "norms": norms,
        "parameters": {n: fingerprint(n, p.detach().numpy()) for n, p in parameters.items()},
        "state": state,
    }


def of_scheduler(make, count):
    parameter = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([parameter], lr=0.6)
    scheduler = make(optimiser)
    rates = []
    for _ in range(count):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return rates


def schedules():
    """Rates of every step of 8 epochs of 5 steps, from 0.6."""
    epochs, per_epoch, lr = 8, 5, 0.6
    lrs = torch.optim.lr_scheduler
    each = lambda rates: [rate for rate in rates for _ in range(per_epoch)]
    warm = 2
    rising = np.linspace(0.3, lr, per_epoch * warm)
    iterations = np.arange(per_epoch * (epochs - warm))
    swav = [0.006 + 0.5 * (lr - 0.006) * (1 + math.cos(math.pi * t / (per_epoch * (epochs - warm)))) for t in iterations]
    rising_dino = np.linspace(0.0, lr, warm * per_epoch)
    left = np.arange(epochs * per_epoch - warm * per_epoch)
    dino = 1e-3 + 0.5 * (lr - 1e-3) * (1 + np.cos(np.pi * left / len(left)))
    return {
        "epoch": each(of_scheduler(lambda o: lrs.CosineAnnealingLR(o, epochs), epochs)),
        "step": of_scheduler(lambda o: lrs.CosineAnnealingLR(o, epochs * per_epoch, eta_min=0.01), epochs * per_epoch),
        "steps": each(of_scheduler(lambda o: lrs.MultiStepLR(o, [3, 6], gamma=0.2), epochs)),
        "swav": np.concatenate([rising, swav]).tolist(),
        "dino": np.concatenate([rising_dino, dino]).tolist(),
    }


if __name__ == "__main__":
    out = {
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "optimisers": [optimise(case) for case in CASES],
        "schedules": schedules(),
    }
    print(json.dumps(out, separators=(",", ":")).replace('],"', '],\n"').replace("},{", "},\n{"))
