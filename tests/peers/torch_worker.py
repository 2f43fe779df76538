"""PyTorch's side of `tests/peers/run.sh`: sets one row up, then makes a timed step for every line `step` on standard input.

    python tests/peers/torch_worker.py --versions
    python tests/peers/torch_worker.py --row resnet18-train [--threads 2] [--batch 32] [--size 224] [--fold] [--contiguous]

The first line of output is a JSON object: the number of trainable parameters, the shape of the result, the threads and the instruction
set that compute, the memory that the process held before the model was made. Every later line answers a `step` with its milliseconds. `quit` or the end of the input ends it.

All rows are eager PyTorch in f32, channels last unless `--contiguous` is given. `--fold` folds batch norms into the convolutions of
networks that only infer.
"""

import argparse
import json
import sys
import time

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.nn.utils.fusion import fuse_conv_bn_eval

EMBEDDING_DIM, HEAD_HIDDEN = 128, 2048
QUEUE_SIZE, TEMPERATURE = 65536, 0.2
DISTILL_WEIGHT, KEY_MOMENTUM = 32.0, 0.999
LR, MOMENTUM, WEIGHT_DECAY = 0.03, 0.9, 1e-4


def idle_mib():
    """Memory of this process, in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) / 1024


def images(options, batch=None, first=0):
    """The same values on both sides: the sine of the place in memory of channels last."""
    batch, size = batch or options.batch, options.size
    count = batch * size * size * 3
    values = torch.arange(first, first + count, dtype=torch.float32).sin_()
    values = values.view(batch, size, size, 3).permute(0, 3, 1, 2)  # channels last, without a copy
    return values.contiguous() if options.contiguous else values


def unit_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, EMBEDDING_DIM, generator=generator), dim=1)


def head(width):
    return nn.Sequential(nn.Linear(width, HEAD_HIDDEN), nn.ReLU(inplace=True), nn.Linear(HEAD_HIDDEN, EMBEDDING_DIM))


def laid_out(model, options):
    return model.to(memory_format=torch.contiguous_format if options.contiguous else torch.channels_last)


def rows_in_order(view, order):
    """The images of a batch in another order, in the memory format that they have."""
    if view.is_contiguous():
        return view.index_select(0, order)
    return view.permute(0, 2, 3, 1).index_select(0, order).permute(0, 3, 1, 2)


def trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def uneven(model):
    """Gives each batch norm statistics of its own, as training does: a fold into the wrong convolution would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            for values in (module.running_var, module.weight):
                values.uniform_(0.5, 1.5)
    return model


@torch.no_grad()
def fold(model, options):
    """Folds every batch norm into the convolution whose result it reads, as one forward pass shows; keeps fused activations."""
    names = {module: name for name, module in model.named_modules()}
    produced, pairs, hooks = {}, [], []

    def made(conv, _inputs, output):
        produced[id(output)] = (conv, output)

    def read(norm, inputs):
        if id(inputs[0]) in produced:
            pairs.append((produced[id(inputs[0])][0], norm))

    # XCiT's local patch interaction has an activation before its batch norm, which stays.
    norms = [m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not name.endswith("local_mp.bn")]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(made))
    hooks += [norm.register_forward_pre_hook(read) for norm in norms]
    probe = images(options, batch=1)
    before = model(probe)
    for hook in hooks:
        hook.remove()
    produced.clear()
    if len(pairs) != len(norms):
        sys.exit(f"error: {len(norms) - len(pairs)} of {len(norms)} batch norms follow no convolution")
    for conv, norm in pairs:
        model.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        model.set_submodule(names[norm], getattr(norm, "act", None) or nn.Identity())
    laid_out(model, options)
    error = ((model(probe) - before).abs().max() / before.abs().max()).item()
    if not error < 1e-3:
        sys.exit(f"error: folding batch norms changed the result by {error:.1e}")


def backbone(arch):
    return timm.create_model(arch, pretrained=False, num_classes=0)


def train_row(arch, options):
    """Forward and backward in training mode; the loss is the mean of the squared features."""
    model = laid_out(backbone(arch), options).train()
    xs = images(options)

    def step():
        model.zero_grad()
        features = model(xs)
        features.square().mean().backward()
        return features.shape

    return step, trainable(model)


def eval_row(arch, options):
    """Inference in evaluation mode, without gradients."""
    model = uneven(laid_out(backbone(arch), options)).eval()
    parameters = trainable(model)
    xs = images(options)
    if options.fold:
        fold(model, options)

    @torch.inference_mode()
    def step():
        return model(xs).shape

    return step, parameters


def live_teacher(options):
    """A frozen ResNet-50 with its running statistics, as a cache would have used it.

    The official script leaves it in training mode, which takes longer.
    """
    model = torchvision.models.resnet50(weights=None)
    model.fc = head(model.fc.in_features)
    model = uneven(laid_out(model, options)).eval().requires_grad_(False)
    if options.fold:
        fold(model, options)
    return model


def disco_row(options, live):
    """One step of DisCo, with the teacher's embeddings given or by a teacher that runs in the step.

    In the order of `student-train/src/step.rs`: the keys are embedded in shuffled order, and the graph of one view is freed before that of
    the other is built.
    """

    def encoder():
        model = backbone("efficientnet_b0")
        return laid_out(nn.Sequential(model, head(model.num_features)), options).train()

    query, key = encoder(), encoder().requires_grad_(False)
    key.load_state_dict(query.state_dict())
    query_parameters, key_parameters = list(query.parameters()), list(key.parameters())
    optimizer = torch.optim.SGD(query_parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    queue, pointer = unit_rows(QUEUE_SIZE, 0), 0
    query_view = images(options)
    key_view = images(options, first=query_view.numel())
    given = unit_rows(options.batch, 1), unit_rows(options.batch, 2)
    teacher = live_teacher(options) if live else None
    first = torch.zeros(options.batch, dtype=torch.long)

    def embed(model, view):
        return F.normalize(model(view), dim=1)

    def distance(embeddings, targets):
        return (embeddings - targets).square().sum(1).mean()

    def step():
        nonlocal pointer
        with torch.no_grad():
            torch._foreach_lerp_(key_parameters, query_parameters, 1 - KEY_MOMENTUM)
            order = torch.randperm(options.batch)
            keys = embed(key, rows_in_order(key_view, order)).index_select(0, order.argsort())
            query_target, key_target = [embed(teacher, view) for view in (query_view, key_view)] if live else given
        optimizer.zero_grad()

        queries = embed(query, query_view)
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ queue.T], dim=1) / TEMPERATURE
        loss = F.cross_entropy(logits, first) + DISTILL_WEIGHT * distance(queries, query_target)
        loss.backward()
        total, shape = loss.item(), queries.shape
        del positive, logits, loss, queries

        loss = DISTILL_WEIGHT * distance(embed(query, key_view), key_target)
        loss.backward()
        total += loss.item()
        if not torch.isfinite(torch.tensor(total)):
            sys.exit(f"error: the loss became {total}")
        optimizer.step()

        places = (torch.arange(options.batch) + pointer) % QUEUE_SIZE
        queue[places] = keys
        pointer = (pointer + options.batch) % QUEUE_SIZE
        return shape

    return step, trainable(query)


ROWS = {
    "efficientnet_b0-train": lambda options: train_row("efficientnet_b0", options),
    "mobilenetv3_large_100-train": lambda options: train_row("mobilenetv3_large_100", options),
    "resnet18-train": lambda options: train_row("resnet18", options),
    "resnet50-eval": lambda options: eval_row("resnet50", options),
    "efficientnet_b0-eval": lambda options: eval_row("efficientnet_b0", options),
    "vit_tiny_patch16_224-train": lambda options: train_row("vit_tiny_patch16_224", options),
    "vit_tiny_patch16_224-eval": lambda options: eval_row("vit_tiny_patch16_224", options),
    "xcit_tiny_12_p16_224-train": lambda options: train_row("xcit_tiny_12_p16_224", options),
    "xcit_tiny_12_p16_224-eval": lambda options: eval_row("xcit_tiny_12_p16_224", options),
    "disco-step": lambda options: disco_row(options, live=False),
    "disco-live": lambda options: disco_row(options, live=True),
}


def answer(value):
    print(value, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", action="store_true", help="print the versions as JSON and stop")
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--fold", action="store_true", help="fold batch norms where a network only infers")
    parser.add_argument("--contiguous", action="store_true", help="channels first instead of channels last")
    options = parser.parse_args()
    if options.versions:
        answer(json.dumps({module.__name__: module.__version__ for module in (torch, timm, torchvision)}))
        return
    if options.row is None:
        parser.error("--row is missing")
    before = idle_mib()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    step, parameters = ROWS[options.row](options)
    shape = list(step())
    about = {
        "parameters": parameters,
        "output": shape,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "idle_mib": round(before),
    }
    answer(json.dumps(about))
    for line in sys.stdin:
        if line.strip() == "quit":
            return
        if line.strip() != "step":
            sys.exit(f"error: `{line.strip()}` is no request: `step` or `quit`")
        start = time.perf_counter()
        step()
        answer((time.perf_counter() - start) * 1e3)


if __name__ == "__main__":
    main()
