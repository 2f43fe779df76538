"""Golden values of three whole DisCo steps with AdamW, a warm-up, clipping, accumulation, spared norms and an average, by PyTorch in f64.

The steps are those of disco_steps.py, with these differences: the batch comes in two pieces, each one batch-norm group, one after the
other, whose gradients are averaged; torch.nn.utils.clip_grad_norm_ clips them; torch.optim.AdamW moves all parameters but decays
only those with more than one axis; the rate rises from 0.0002 to 0.001 over the three steps; timm's ModelEmaV3 with copied buffers
keeps an average of the query encoder.

Written with Python 3.11.7, torch 2.15.0, torchvision 0.29.2 and timm 1.0.31 on the CPU.
Run: python tests/golden/optimised_steps.py > tests/golden/optimised_steps.json
"""

import copy
import json

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.utils import ModelEmaV3

import disco_steps
from disco_steps import BATCH, DISTILL_WEIGHT, QUEUE, SHUFFLES, STEPS, TEMPERATURE, embed, embed_keys, encoder, rows, view
from formula import fingerprint

RATES = np.linspace(0.0002, 0.001, STEPS)
PIECES, CLIP, DECAY, EMA_DECAY = 2, 5.0, 0.05, 0.9


def main():
    torch.set_num_threads(1)
    query = encoder()
    key = copy.deepcopy(query)
    average = ModelEmaV3(query, decay=EMA_DECAY, exclude_buffers=True, foreach=False)
    queue, pointer = rows("queue", QUEUE), 0
    decayed = [p for p in query.parameters() if p.ndim > 1]
    spared = [p for p in query.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": spared, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-2)
    losses = []
    for step in range(STEPS):
        view_q, view_k = view(f"view q {step}"), view(f"view k {step}")
        disco_steps.GROUPS = 2
        keys = embed_keys(key, query, view_k, step)
        disco_steps.GROUPS = 1
        optimiser.zero_grad()
        line = dict.fromkeys(["info_nce", "top1", "distill_q", "distill_k", "loss"], 0.0)
        for piece in torch.arange(BATCH).chunk(PIECES):
            s_q, s_k = embed(query, view_q[piece]), embed(query, view_k[piece])
            logits = torch.cat([(s_q * keys[piece]).sum(1, keepdim=True), s_q @ queue.t()], dim=1) / TEMPERATURE
            info_nce = F.cross_entropy(logits, torch.zeros(len(piece), dtype=torch.long))
            distill_q = (s_q - rows(f"teacher q {step}", BATCH)[piece]).square().sum(1).mean()
            distill_k = (s_k - rows(f"teacher k {step}", BATCH)[piece]).square().sum(1).mean()
            loss = info_nce + DISTILL_WEIGHT * (distill_q + distill_k)
            (loss / PIECES).backward()
            top1 = 100.0 * (logits.argmax(1) == 0).double().mean()
            for name, value in [("info_nce", info_nce), ("top1", top1), ("distill_q", distill_q), ("distill_k", distill_k), ("loss", loss)]:
                line[name] += value.item() / PIECES
        line["grad_norm"] = torch.nn.utils.clip_grad_norm_(query.parameters(), CLIP).item()
        losses.append(line)
        for group in optimiser.param_groups:
            group["lr"] = float(RATES[step])
        optimiser.step()
        average.update(query)
        queue[(pointer + torch.arange(BATCH)) % QUEUE] = keys
        pointer = (pointer + BATCH) % QUEUE
    tensors = {f"query.{name}": x for name, x in query.state_dict().items()}
    tensors |= {f"ema.{name}": x for name, x in average.module.state_dict().items()}
    out = {
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__},
        "losses": losses,
        "tensors": {name: fingerprint(name, x.numpy()) for name, x in sorted(tensors.items())},
    }
    print(json.dumps(out, separators=(",", ":")).replace('],"', '],\n"'))


if __name__ == "__main__":
    main()
