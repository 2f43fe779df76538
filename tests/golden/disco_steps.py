"""Golden values of three whole DisCo steps and three of MoCo v2, by PyTorch in f64.

A step, with a query encoder, a key encoder, a queue, and the teacher's embeddings of both views:
  1. key = 0.999 key + 0.001 query, parameters only; the key encoder (training mode) embeds view k, whose samples were
     shuffled before they are cut into batch-norm groups, and are put back after;
  2. the query encoder (training mode) embeds view q, then view k;
  3. loss = InfoNCE(s_q; k, queue), mean over the batch, + 32 * (mean squared distance of s_q to t_q + that of s_k to t_k);
     without a teacher, InfoNCE alone, and the query encoder sees view q only;
  4. SGD on the query encoder, all parameters, momentum 0.9, weight decay 1e-4; the keys replace the queue's oldest.

Batch norm over groups: each group has its own statistics, as if each were on a device of its own; the running buffers take
one step per forward pass towards the mean over the groups.

The shifts of batch norm lie far from 0, so that no ReLU is near its kink. With shifts near 0 a few activations change sign between
f32 and f64, and PyTorch's own gradients in the two then differ by percents after three steps. All inputs come from formula.py; the orders of the shuffles are
in the output, for the other side to use. Written with Python 3.11.7, torch 2.15.0 and torchvision 0.29.2 on the CPU.
Run: python tests/golden/disco_steps.py > tests/golden/disco_steps.json
"""

import copy
import json

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from formula import fingerprint, load_into, unit, unit_rows, values

STEPS, BATCH, GROUPS, SIZE = 3, 8, 2, 64
HIDDEN, WIDTH, QUEUE = 64, 32, 20  # the queue is no multiple of the batch: the third step goes around its end
LR, MOMENTUM, WEIGHT_DECAY = 0.03, 0.9, 1e-4
TEMPERATURE, KEY_MOMENTUM, DISTILL_WEIGHT = 0.2, 0.999, 32.0
SHUFFLES = [[5, 2, 7, 0, 3, 6, 1, 4], [1, 0, 6, 3, 7, 4, 2, 5], [4, 7, 1, 6, 0, 2, 5, 3]]


class GroupedBatchNorm(nn.BatchNorm2d):
    def forward(self, xs):
        groups = xs.reshape(GROUPS, -1, *xs.shape[1:])
        mean = groups.mean(dim=(1, 3, 4))
        var = groups.var(dim=(1, 3, 4), unbiased=False)
        count = groups[:, :, 0].numel() / GROUPS
        with torch.no_grad():
            self.running_mean += self.momentum * (mean.mean(0) - self.running_mean)
            self.running_var += self.momentum * (var.mean(0) * count / (count - 1) - self.running_var)
            self.num_batches_tracked += 1
        normal = (groups - mean[:, None, :, None, None]) / (var[:, None, :, None, None] + self.eps).sqrt()
        return normal.reshape(xs.shape) * self.weight[:, None, None] + self.bias[:, None, None]


def encoder():
    model = torchvision.models.resnet18(norm_layer=GroupedBatchNorm)
    model.fc = nn.Sequential(nn.Linear(512, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    load_into(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".bias") and not name.startswith("fc."):
                p.copy_(torch.from_numpy(shift(name, p.numel())))
    return model.double().train()


def shift(name, count):
    """In 3..4; for a quarter of the channels inside a block in -4..-3, which its ReLU switches off."""
    u = unit(name, count)
    negative = (u < 0.25) & name.endswith("bn1.bias")
    return np.where(negative, -3.0 - 4.0 * u, 3.0 + u).astype(np.float32)


def view(name):
    return torch.from_numpy(values(name, (BATCH, SIZE, SIZE, 3), -2.0, 2.0)).double().permute(0, 3, 1, 2)


def rows(name, count):
    return torch.from_numpy(unit_rows(name, count, WIDTH)).double()


def embed(model, xs):
    return F.normalize(model(xs), dim=1)


def embed_keys(key, query, xs, step, embed=embed):
    """Moves the key encoder towards the query encoder, then embeds the key's view in shuffled order."""
    with torch.no_grad():
        for mine, theirs in zip(key.parameters(), query.parameters()):
            mine.mul_(KEY_MOMENTUM).add_(theirs, alpha=1.0 - KEY_MOMENTUM)
        shuffle = torch.tensor(SHUFFLES[step])
        keys = torch.empty(BATCH, WIDTH, dtype=torch.float64)
        keys[shuffle] = embed(key, xs[shuffle])
        return keys


def trace(distill):
    query = encoder()
    key = copy.deepcopy(query)
    queue, pointer = rows("queue", QUEUE), 0
    optimiser = torch.optim.SGD(query.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        view_q, view_k = view(f"view q {step}"), view(f"view k {step}")
        keys = embed_keys(key, query, view_k, step)
        s_q = embed(query, view_q)
        logits = torch.cat([(s_q * keys).sum(1, keepdim=True), s_q @ queue.t()], dim=1) / TEMPERATURE
        info_nce = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        line = {"info_nce": info_nce.item(), "top1": 100.0 * (logits.argmax(1) == 0).double().mean().item()}
        loss = info_nce
        if distill:
            s_k = embed(query, view_k)
            distill_q = (s_q - rows(f"teacher q {step}", BATCH)).square().sum(1).mean()
            distill_k = (s_k - rows(f"teacher k {step}", BATCH)).square().sum(1).mean()
            loss = info_nce + DISTILL_WEIGHT * (distill_q + distill_k)
            line |= {"distill_q": distill_q.item(), "distill_k": distill_k.item()}
        losses.append(line | {"loss": loss.item()})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        queue[(pointer + torch.arange(BATCH)) % QUEUE] = keys
        pointer = (pointer + BATCH) % QUEUE
    tensors = {f"query.{name}": x for name, x in query.state_dict().items()}
    tensors |= {f"key.{name}": x for name, x in key.state_dict().items()}
    tensors |= {f"sgd.{name}": optimiser.state[p]["momentum_buffer"] for name, p in query.named_parameters()}
    tensors["queue"] = queue
    return {
        "losses": losses,
        "pointer": pointer,
        "tensors": {name: fingerprint(name, x.numpy()) for name, x in sorted(tensors.items())},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = {
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "shuffles": SHUFFLES,
        "distill": trace(True),
        "pretrain": trace(False),
    }
    print(json.dumps(out, separators=(",", ":")).replace('],"', '],\n"'))
