"""Golden values of three whole steps of every objective of distillation, by PyTorch in f64.

The steps are those of disco_steps.py, with other terms of the teacher in place of the squared distance, or without contrast
(`contrast` false: no key encoder, no queue, and the query encoder sees only the views on which a term acts). The terms of a view:
  rkd      distances and angles between the samples of one batch-norm group (RKD, arXiv 1904.05068): each by smooth L1, means over
           pairs or triples, then over groups; weight of the angles twice that of the distances;
  seed     cross entropy of the softmax over [own teacher embedding, queue of teacher embeddings], temperatures 0.2 (student) and
           0.01 (teacher) (SEED, arXiv 2101.04731); after the step the teacher's embeddings of the term's views enter the queue;
  simreg   squared distance of the teacher's embeddings to what a predictor makes of the student's features: linear F to 2F, batch
           norm, ReLU, linear to F, linear to 2F, batch norm, ReLU, linear to D (SimReg, arXiv 2201.05131); it learns too;
  concat   squared distance to two teachers' embeddings side by side, at unit length;
  retro    as disco_steps.py, but the student's head is one linear layer before the frozen head of the teacher (Retro, arXiv 2405.15311),
           which has batch norm by running statistics, ReLU and GELU, for both encoders.

Shifts of batch norm lie far from 0, see disco_steps.py; all inputs come from formula.py. Written with Python 3.11.7, torch 2.15.0 and
torchvision 0.29.2 on the CPU. Run: python tests/golden/distill_steps.py > tests/golden/distill_steps.json
"""

import copy
import json

import torch
import torch.nn as nn
import torch.nn.functional as F

import disco_steps as disco
from disco_steps import BATCH, GROUPS, LR, MOMENTUM, QUEUE, SHUFFLES, STEPS, TEMPERATURE, WEIGHT_DECAY, WIDTH
from formula import fingerprint, load_into, unit_rows

FEATURES = 512
# Relations and predictions through four more layers magnify the rounding of every step before: their steps are shorter.
SHORT_STEPS, SHORT_LR = {"rkd", "rkd and mse", "simreg"}, LR / 10
SEED_QUEUE, SEED_TEMPERATURE, SEED_TEACHER_TEMPERATURE = 20, 0.2, 0.01

# Term: (weight, acts on the key's view too).
TRACES = {
    "rkd": ({"rkd": (1.0, False)}, True),
    "rkd and mse": ({"mse": (32.0, True), "rkd": (0.5, True)}, True),
    "seed": ({"seed": (1.0, True)}, True),
    "seed alone": ({"seed": (1.0, False)}, False),
    "simreg": ({"simreg": (2.0, True)}, True),
    "mse alone": ({"mse": (32.0, True)}, False),
    "concat": ({"mse": (32.0, True)}, False),
    "retro": ({"mse": (32.0, True)}, True),
}


class GroupedBatchNorm1d(disco.GroupedBatchNorm):
    def forward(self, xs):
        return super().forward(xs[:, :, None, None])[:, :, 0, 0]


def predictor():
    model = nn.Sequential(
        nn.Linear(FEATURES, 2 * FEATURES),
        GroupedBatchNorm1d(2 * FEATURES),
        nn.ReLU(),
        nn.Linear(2 * FEATURES, FEATURES),
        nn.Linear(FEATURES, 2 * FEATURES),
        GroupedBatchNorm1d(2 * FEATURES),
        nn.ReLU(),
        nn.Linear(2 * FEATURES, WIDTH),
    )
    model = nn.ModuleDict({"predictor": model})
    load_into(model)
    with torch.no_grad():
        for name in ["predictor.1.bias", "predictor.5.bias"]:
            p = dict(model.named_parameters())[name]
            p.copy_(torch.from_numpy(disco.shift(name, p.numel())))
    return model.double().train()


def teacher_head():
    layers = {"0": nn.Linear(48, 40), "bn1": nn.BatchNorm1d(40), "2": nn.ReLU()}
    layers |= {"3": nn.Linear(40, 36, bias=False), "4": nn.GELU(), "5": nn.Linear(36, WIDTH)}
    model = nn.ModuleDict({"head": nn.ModuleDict(layers)})
    load_into(model)
    with torch.no_grad():
        norm = model["head"]["bn1"]
        norm.bias.copy_(torch.from_numpy(disco.shift("head.bn1.bias", norm.bias.numel())))
    return nn.Sequential(*model["head"].values()).double().eval().requires_grad_(False)


def rows(name, count, width=WIDTH):
    return torch.from_numpy(unit_rows(name, count, width)).double()


def target(which, step, concat):
    if not concat:
        return rows(f"teacher {which} {step}", BATCH)
    parts = [rows(f"teacher a {which} {step}", BATCH, 20), rows(f"teacher b {which} {step}", BATCH, 12)]
    return F.normalize(torch.cat(parts, dim=1), dim=1)


def distances(xs):
    squared = (xs[:, None] - xs[None]).square().sum(2).clamp(min=1e-12)
    # The root of a row's distance to itself has no gradient.
    off = 1.0 - torch.eye(len(xs), dtype=xs.dtype)
    d = squared.sqrt() * off
    return d / (d.sum() / off.sum())


def angles(xs):
    directions = F.normalize(xs[None] - xs[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


def relational(relation, student, teacher):
    pairs = zip(student.chunk(GROUPS), teacher.chunk(GROUPS))
    return torch.stack([F.smooth_l1_loss(relation(s), relation(t)) for s, t in pairs]).mean()


def seed(student, teacher, queue):
    logits = lambda xs, t: torch.cat([(xs * teacher).sum(1, keepdim=True), xs @ queue.t()], dim=1) / t
    targets = logits(teacher, SEED_TEACHER_TEMPERATURE).softmax(1)
    return -(targets * logits(student, SEED_TEMPERATURE).log_softmax(1)).sum(1).mean()


def terms_of(terms, which, step, embeddings, features, teacher, seed_queue, simreg):
    """Pairs of a name and a term, and the weighted sum."""
    found, total = {}, 0.0
    for term, (weight, both) in terms.items():
        if which == "k" and not both:
            continue
        if term == "mse":
            values = {f"distill_{which}": (weight, (embeddings - teacher).square().sum(1).mean())}
        elif term == "rkd":
            values = {
                f"rkd_distance_{which}": (weight, relational(distances, embeddings, teacher)),
                f"rkd_angle_{which}": (2.0 * weight, relational(angles, embeddings, teacher)),
            }
        elif term == "seed":
            values = {f"seed_{which}": (weight, seed(embeddings, teacher, seed_queue))}
        else:
            predicted = F.normalize(simreg["predictor"](features), dim=1)
            values = {f"simreg_{which}": (weight, (predicted - teacher).square().sum(1).mean())}
        for name, (factor, value) in values.items():
            found[name] = value.item()
            total = total + factor * value
    return found, total


def trace(name, terms, contrast):
    query, head = disco.encoder(), nn.Identity()
    if name == "retro":
        query.fc, head = nn.Linear(FEATURES, 48), teacher_head()
        adapter = nn.ModuleDict({"fc": query.fc})
        load_into(adapter)
        query.double()
    embed = lambda model, xs: F.normalize(head(model(xs)), dim=1)
    features = {}
    query.avgpool.register_forward_hook(lambda module, xs, out: features.__setitem__("out", out.flatten(1)))
    key = copy.deepcopy(query) if contrast else None
    queue, pointer = rows("queue", QUEUE), 0
    seed_queue, seed_pointer = rows("seed queue", SEED_QUEUE), 0
    simreg = predictor() if "simreg" in terms else None
    networks = {"query": query} | ({"simreg": simreg} if simreg else {})
    parameters = [p for network in networks.values() for p in network.parameters()]
    lr = SHORT_LR if name in SHORT_STEPS else LR
    optimiser = torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(STEPS):
        views = {which: disco.view(f"view {which} {step}") for which in "qk"}
        line, loss = {}, 0.0
        if contrast:
            keys = disco.embed_keys(key, query, views["k"], step, embed)
        for which in "qk":
            acts = any(which == "q" or both for _, both in terms.values())
            if not acts and not (contrast and which == "q"):
                continue
            embeddings = embed(query, views[which])
            if contrast and which == "q":
                logits = torch.cat([(embeddings * keys).sum(1, keepdim=True), embeddings @ queue.t()], dim=1) / TEMPERATURE
                info_nce = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
                line |= {"info_nce": info_nce.item(), "top1": 100.0 * (logits.argmax(1) == 0).double().mean().item()}
                loss = loss + info_nce
            if acts:
                teacher = target(which, step, name == "concat")
                found, total = terms_of(terms, which, step, embeddings, features["out"], teacher, seed_queue, simreg)
                line |= found
                loss = loss + total
        losses.append(line | {"loss": loss.item()})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if contrast:
            queue[(pointer + torch.arange(BATCH)) % QUEUE] = keys
            pointer = (pointer + BATCH) % QUEUE
        for which in "qk":
            if "seed" in terms and (which == "q" or terms["seed"][1]):
                seed_queue[(seed_pointer + torch.arange(BATCH)) % SEED_QUEUE] = target(which, step, False)
                seed_pointer = (seed_pointer + BATCH) % SEED_QUEUE
    tensors = {f"{network}.{n}": x for network, model in networks.items() for n, x in model.state_dict().items()}
    counters = {}
    if contrast:
        tensors["queue"] = queue
        counters["queue_pointer"] = pointer
    if "seed" in terms:
        tensors["seed_queue"] = seed_queue
        counters["seed_queue_pointer"] = seed_pointer
    return {
        "losses": losses,
        "counters": counters,
        "tensors": {n: fingerprint(n, x.numpy()) for n, x in sorted(tensors.items())},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Key encoders and momenta are left to disco_steps.py.
    out = {"versions": {"torch": torch.__version__}, "shuffles": SHUFFLES}
    out["traces"] = {name: trace(name, *arguments) for name, arguments in TRACES.items()}
    print(json.dumps(out, separators=(",", ":")).replace('],"', '],\n"'))
