"""Golden values of three whole steps of SwAV, alone and under a teacher, of three of MoCo v1, and of Sinkhorn-Knopp, by PyTorch in f64.

A step of SwAV, with an encoder, prototypes, and a queue of embeddings for each of the two global views:
  1. the prototypes are made unit length;
  2. the encoder (training mode) takes the crops of each size together through the backbone, then all through the head; statistics
     of batch norm are those of a device's own samples, all their crops of a size together;
  3. each global view's scores, behind those of its queue once that is full, become assignments by three turns of Sinkhorn-Knopp;
  4. loss = mean over the two of the mean, over all other crops, of the cross entropy of their predictions; under a teacher also
     DISTILL_WEIGHT * (mean squared distance of the first global view's embeddings to the teacher's + that of the second);
  5. SGD on encoder and prototypes, momentum 0.9, weight decay 1e-4; the prototypes have no gradient in the first step;
  6. from the second step on, the embeddings of the global views enter the queues, which hold one batch: the third step uses them.

The steps of MoCo v1 are those of disco_steps.py, with one linear layer as the head and temperature 0.07. Batch norm and its shifts
are as there, too. Written with Python 3.11.7, torch 2.15.0 and torchvision 0.29.2 on the CPU.
Run: python tests/golden/swav_steps.py > tests/golden/swav_steps.json
"""

import json

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import disco_steps
from disco_steps import BATCH, GROUPS, LR, MOMENTUM, SIZE, WEIGHT_DECAY, WIDTH, HIDDEN, STEPS, GroupedBatchNorm, rows, view
from formula import fingerprint, load_into, parameter, unit, values

LOCALS, LOCAL_SIZE = 3, 32
PROTOTYPES, TEMPERATURE, EPSILON, ITERATIONS = 24, 0.1, 0.05, 3
FROZEN_STEPS, QUEUE_FROM_STEP, DISTILL_WEIGHT = 1, 1, 4.0


class GroupedRowNorm(GroupedBatchNorm):
    """The same over rows: each is an image of one pixel."""

    def forward(self, xs):
        return super().forward(xs[:, :, None, None])[:, :, 0, 0]


def shift(name, count):
    u = unit(name, count)
    inside = name.endswith("bn1.bias") or name == "projection_head.1.bias"
    return np.where((u < 0.25) & inside, -3.0 - 4.0 * u, 3.0 + u).astype(np.float32)


def shifted(model, plain):
    load_into(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias") and not name.startswith(plain):
                p.copy_(torch.from_numpy(shift(name, p.numel())))
    return model.double().train()


def encoder():
    model = torchvision.models.resnet18(norm_layer=GroupedBatchNorm)
    model.fc = nn.Identity()
    model.projection_head = nn.Sequential(
        nn.Linear(512, HIDDEN), GroupedRowNorm(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)
    )
    return shifted(model, ("projection_head.0.", "projection_head.3."))


def moco_v1_encoder():
    model = torchvision.models.resnet18(norm_layer=GroupedBatchNorm)
    model.fc = nn.Linear(512, WIDTH)
    return shifted(model, ("fc.",))


def embed(model, sizes):
    """Embeddings of every crop, from the crops of every size: (crops, B, D)."""
    features = []
    for crops in sizes:
        devices = [torch.cat(crops_of_device) for crops_of_device in zip(*(crop.chunk(GROUPS) for crop in crops))]
        features.append(model(torch.cat(devices)).chunk(GROUPS))
    devices = [torch.cat(of_device) for of_device in zip(*features)]
    embeddings = F.normalize(model.projection_head(torch.cat(devices)), dim=1)
    crops = [of_device.chunk(sum(map(len, sizes))) for of_device in embeddings.chunk(GROUPS)]
    return [torch.cat(of_crop) for of_crop in zip(*crops)]


def sinkhorn(scores, count):
    q = torch.exp(scores / EPSILON).t()
    q /= q.sum()
    for _ in range(ITERATIONS):
        q *= (1.0 / q.shape[0] / q.sum(1)).unsqueeze(1)
        q *= (1.0 / q.shape[1] / q.sum(0)).unsqueeze(0)
    return (q / q.sum(0, keepdim=True)).t()[-count:]


def trace(distill):
    query = encoder()
    prototypes = nn.Linear(WIDTH, PROTOTYPES, bias=False)
    prototypes.weight = nn.Parameter(torch.from_numpy(parameter("prototypes.weight", (PROTOTYPES, WIDTH))).double())
    parameters = [*query.parameters(), prototypes.weight]
    optimiser = torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    queues = torch.zeros(2, BATCH, WIDTH, dtype=torch.float64)
    losses = []
    for step in range(STEPS):
        with torch.no_grad():
            prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))
        local = torch.from_numpy(values(f"locals {step}", (BATCH, LOCALS, LOCAL_SIZE, LOCAL_SIZE, 3), -2.0, 2.0)).double()
        local = [local[:, crop].permute(0, 3, 1, 2) for crop in range(LOCALS)]
        embeddings = embed(query, [[view(f"view q {step}"), view(f"view k {step}")], local])
        scores = [prototypes(rows) for rows in embeddings]
        swapped = 0.0
        for assigned in range(2):
            with torch.no_grad():
                known = scores[assigned]
                if queues[assigned, -1].any():
                    known = torch.cat([queues[assigned] @ prototypes.weight.t(), known])
                q = sinkhorn(known, BATCH)
                if step >= QUEUE_FROM_STEP:
                    queues[assigned] = embeddings[assigned]
            others = [crop for crop in range(len(scores)) if crop != assigned]
            terms = [-(q * F.log_softmax(scores[crop] / TEMPERATURE, dim=1)).sum(1).mean() for crop in others]
            swapped = swapped + sum(terms) / len(others) / 2.0
        line = {"swapped_prediction": swapped.item()}
        loss = swapped
        if distill:
            distances = [
                (embeddings[i] - rows(f"teacher {name} {step}", BATCH)).square().sum(1).mean() for i, name in enumerate("qk")
            ]
            loss = loss + DISTILL_WEIGHT * sum(distances)
            line |= {"distill_q": distances[0].item(), "distill_k": distances[1].item()}
        losses.append(line | {"loss": loss.item()})
        optimiser.zero_grad()
        loss.backward()
        if step < FROZEN_STEPS:
            prototypes.weight.grad = None
        optimiser.step()
    tensors = {f"query.{name}": x for name, x in query.state_dict().items()}
    tensors |= {f"sgd.{name}": optimiser.state[p]["momentum_buffer"] for name, p in query.named_parameters()}
    tensors["prototypes.weight"] = prototypes.weight.detach()
    tensors["sgd.prototypes.weight"] = optimiser.state[prototypes.weight]["momentum_buffer"]
    tensors |= {f"swav_queue.{i}": queue.detach() for i, queue in enumerate(queues)}
    return {
        "losses": losses,
        "pointer": (STEPS - QUEUE_FROM_STEP) * BATCH,
        "tensors": {name: fingerprint(name, x.numpy()) for name, x in sorted(tensors.items())},
    }


def moco_v1():
    disco_steps.encoder = moco_v1_encoder
    disco_steps.TEMPERATURE = 0.07
    return disco_steps.trace(False)


def assignments():
    scores = torch.from_numpy(values("sinkhorn scores", (200, PROTOTYPES), -1.0, 1.0)).double()
    return fingerprint("sinkhorn", sinkhorn(scores, 60).numpy())


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = {
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "shuffles": disco_steps.SHUFFLES,
        "distill": trace(True),
        "pretrain": trace(False),
        "moco_v1": moco_v1(),
        "sinkhorn": assignments(),
    }
    print(json.dumps(out, separators=(",", ":")).replace('],"', '],\n"'))
