"""Golden values of the linear probe: three epochs of the official protocol's SGD, by PyTorch.

Written with Python 3.11.7, torch 2.15.0 (CPU, one thread), numpy; the output states the version of torch. Seed: the salts below.
No data is stored: features, labels, first weights and the order of samples come from the formula `value`, which the Rust test
repeats. Run: python tests/golden/linear_probe.py > tests/golden/linear_probe.json
"""

import json

import numpy as np
import torch

TRAIN, VAL, WIDTH, CLASSES, BATCH, EPOCHS = 200, 90, 24, 7, 64, 3
LRS = [3.0, 0.3]


def value(index, salt):
    """A pseudo-random number in [-0.5, 0.5) with 24 bits, exact in f32."""
    x = (np.asarray(index, dtype=np.uint64) + np.uint64(1)) * np.uint64(2654435761) + np.uint64(salt) * np.uint64(40503)
    x &= np.uint64(0xFFFFFFFF)
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    x = ((x ^ (x >> np.uint64(13))) * np.uint64(3266489917)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    return (x >> np.uint64(8)).astype(np.float64) / 2.0**24 - 0.5


def features(count, salt):
    labels = np.arange(count) % CLASSES
    noise = value(np.arange(count * WIDTH), salt).reshape(count, WIDTH)
    signal = (np.arange(WIDTH)[None, :] % CLASSES == labels[:, None]) * 0.5
    return torch.tensor(noise + signal, dtype=torch.float32), torch.tensor(labels)


def order(epoch):
    return torch.tensor(np.argsort(value(np.arange(TRAIN), 100 + epoch), kind="stable"))


def main():
    torch.set_num_threads(1)
    xs, ys = features(TRAIN, 1)
    val_xs, val_ys = features(VAL, 2)
    first = torch.tensor(value(np.arange(CLASSES * WIDTH), 3).reshape(CLASSES, WIDTH) * 0.02, dtype=torch.float32)
    heads = []
    for lr in LRS:
        fc = torch.nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            fc.weight.copy_(first)
            fc.bias.zero_()
        optimizer = torch.optim.SGD(fc.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        losses, logits = [], []
        for epoch in range(EPOCHS):
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.5**epoch
            total = 0.0
            for batch in order(epoch).split(BATCH):
                loss = torch.nn.functional.cross_entropy(fc(xs[batch]), ys[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.item() * len(batch)
            losses.append(total / TRAIN)
            with torch.no_grad():
                logits.append(fc(val_xs))
        top1 = [(100.0 * (out.argmax(1) == val_ys).double().mean()).item() for out in logits]
        top5 = [(100.0 * (out.topk(5).indices == val_ys[:, None]).any(1).double().mean()).item() for out in logits]
        heads.append(
            {
                "lr": lr,
                "train_loss": losses,
                "top1": top1,
                "top5": top5,
                "weight": fc.weight.flatten().tolist(),
                "bias": fc.bias.tolist(),
            }
        )
    print(json.dumps({"torch": torch.__version__, "heads": heads}))


if __name__ == "__main__":
    main()
