"""How training programs lay out their checkpoints: one function for each, written after the official code.

A function gets `net`, which makes a backbone without a head (`net(numbered=True)`: a sequence of its layers), the backbone's feature
width, and the sizes of what belongs to the method. It returns a `Layout`: a tree of modules whose state dict has the true names, and how the embedding is computed.
"""

import dataclasses
from typing import Callable

import torch
import torch.nn as nn


@dataclasses.dataclass
class Sizes:
    hidden: int
    embedding: int
    prototypes: int
    queue: int


@dataclasses.dataclass
class Layout:
    method: str
    tree: nn.Module
    embed: Callable
    # Where backbones are, the one to be taken first: a prefix, and how the layers are named. "numbered": by the children of a residual
    # network; "official": as XCiT's own code names them, not as timm does.
    networks: list
    # What the method leaves over: its name in the description, and the beginnings of the names.
    left_over: dict = dataclasses.field(default_factory=dict)
    alike: list = dataclasses.field(default_factory=list)
    # How the names of the architectures begin that are laid out so.
    archs: str = ""


def tree(**children):
    """A module with these children; a tensor becomes a buffer."""
    made = nn.Module()
    for name, child in children.items():
        if isinstance(child, torch.Tensor):
            made.register_buffer(name, child)
        else:
            setattr(made, name, child)
    return made


def mlp(widths, bias, last_bias, norm, last_norm=None, act=nn.ReLU):
    """Linear layers with a batch norm and an activation after each but the last. `last_norm`: "affine" or "plain"."""
    layers = []
    for index, (a, b) in enumerate(zip(widths, widths[1:])):
        last = index == len(widths) - 2
        layers.append(nn.Linear(a, b, bias=last_bias if last else bias))
        if not last:
            layers += [nn.BatchNorm1d(b)] * norm + [act()]
        elif last_norm:
            layers.append(nn.BatchNorm1d(b, affine=last_norm == "affine"))
    return nn.Sequential(*layers)


def with_head(net, **head):
    """A backbone with a head as one of its own layers."""
    made = net()
    for name, layer in head.items():
        setattr(made, name, layer)
    return made


def moco(net, width, s, v2, prefix="module."):
    fc = lambda: mlp([width, width, s.embedding], True, True, False) if v2 else nn.Linear(width, s.embedding)
    q, k = with_head(net, fc=fc()), with_head(net, fc=fc())
    queue = {"queue": torch.zeros(s.embedding, s.queue), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    left = {"key encoder": ["module.encoder_k."], "queue of negatives": ["module.queue"]}
    networks = [("module.encoder_q.", "usual"), ("module.encoder_k.", "usual")]
    top = tree(module=tree(encoder_q=q, encoder_k=k, **queue))
    return Layout("moco-v2" if v2 else "moco-v1", top, lambda f: q.fc(f), networks, left)


def moco_v1(net, width, s):
    return moco(net, width, s, False)


def moco_v2(net, width, s):
    return moco(net, width, s, True)


def moco_v3(net, width, s):
    fc = lambda: mlp([width, s.hidden, s.embedding], False, False, True, "plain")
    base, momentum = with_head(net, fc=fc()), with_head(net, fc=fc())
    predictor = mlp([s.embedding, s.hidden, s.embedding], False, False, True, "plain")
    top = tree(module=tree(base_encoder=base, momentum_encoder=momentum, predictor=predictor))
    left = {"momentum encoder": ["module.momentum_encoder."], "predictor": ["module.predictor."]}
    networks = [("module.base_encoder.", "usual"), ("module.momentum_encoder.", "usual")]
    return Layout("moco-v3", top, lambda f: base.fc(f), networks, left)


def moco_v3_transformer(net, width, s):
    head = lambda: mlp([width, s.hidden, s.hidden, s.embedding], False, False, True, "plain")
    base, momentum = with_head(net, head=head()), with_head(net, head=head())
    predictor = mlp([s.embedding, s.hidden, s.embedding], False, False, True, "plain")
    top = tree(module=tree(base_encoder=base, momentum_encoder=momentum, predictor=predictor))
    left = {"momentum encoder": ["module.momentum_encoder."], "predictor": ["module.predictor."]}
    networks = [("module.base_encoder.", "usual"), ("module.momentum_encoder.", "usual")]
    return Layout("moco-v3", top, lambda f: base.head(f), networks, left, archs="vit")


def clusters(net, width, s, method, prototypes):
    head = mlp([width, s.hidden, s.embedding], True, True, True)
    inner = with_head(net, projection_head=head, prototypes=prototypes)
    left = {"prototypes": ["module.prototypes."]}
    return Layout(method, tree(module=inner), head, [("module.", "usual")], left)


def swav(net, width, s):
    return clusters(net, width, s, "swav", nn.Linear(s.embedding, s.prototypes, bias=False))


def deepcluster_v2(net, width, s):
    heads = {f"prototypes{i}": nn.Linear(s.embedding, s.prototypes, bias=False) for i in range(3)}
    layout = clusters(net, width, s, "deepcluster-v2", tree(**heads))
    layout.alike = ["sela-v2"]
    return layout


def swav_without_prototypes(net, width, s):
    layout = clusters(net, width, s, "swav", None)
    layout.left_over, layout.alike = {}, ["deepcluster-v2", "sela-v2"]
    return layout


def dino_head(width, s, norm):
    head = tree(
        mlp=mlp([width, s.hidden, s.hidden, s.embedding], True, True, norm, act=nn.GELU),
        last_layer=tree(weight_g=torch.ones(s.prototypes, 1), weight_v=torch.zeros(s.prototypes, s.embedding)),
    )
    return head


def dino(net, width, s, norm=False):
    head = dino_head(width, s, norm)
    left = {"last layer of the head": ["head.last_layer."]}
    return Layout("dino", tree(backbone=net(), head=head), head.mlp, [("backbone.", "usual")], left)


def dino_with_batch_norm(net, width, s):
    return dino(net, width, s, True)


def dino_official(net, width, s):
    """DINO's XCiT, which is the official code's."""
    layout = dino(net, width, s)
    layout.networks, layout.archs = [("backbone.", "official")], "xcit"
    return layout


def dino_both(net, width, s):
    """Student and teacher in one state dict."""
    heads = {name: dino_head(width, s, False) for name in ("student", "teacher")}
    top = tree(**{name: tree(backbone=net(), head=head) for name, head in heads.items()})
    left = {"last layer of the head": ["teacher.head.last_layer."], "student": ["student."]}
    networks = [("teacher.backbone.", "usual"), ("student.backbone.", "usual")]
    return Layout("dino", top, heads["teacher"].mlp, networks, left)


def simclr(net, width, s):
    """sthalles/SimCLR: a head like MoCo v2's."""
    backbone = with_head(net, fc=mlp([width, width, s.embedding], True, True, False))
    layout = Layout("simclr", tree(backbone=backbone), lambda f: backbone.fc(f), [("backbone.", "usual")])
    layout.alike = ["moco-v2"]
    return layout


def simclr_beside(net, width, s):
    """Spijkervet/SimCLR: no bias."""
    head = mlp([width, width, s.embedding], False, False, False)
    return Layout("simclr", tree(encoder=net(), projector=head), head, [("encoder.", "usual")])


def simclr_lightly(net, width, s):
    head = mlp([width, s.hidden, s.embedding], False, False, True, "affine")
    top = tree(backbone=net(numbered=True), projection_head=tree(layers=head))
    return Layout("simclr", top, head, [("backbone.", "numbered")], alike=["byol"], archs="resnet")


def byol(net, width, s):
    """sthalles/PyTorch-BYOL: the online network, as it is saved."""
    head = mlp([width, s.hidden, s.embedding], True, True, True)
    top = tree(encoder=net(numbered=True), projetion=tree(net=head))
    return Layout("byol", top, head, [("encoder.", "numbered")], archs="resnet")


def byol_whole(net, width, s):
    """lucidrains/byol-pytorch: the network bears two names."""
    shared, head = with_head(net, fc=nn.Linear(width, s.prototypes)), mlp([width, s.hidden, s.embedding], True, True, True)
    target = tree(
        net=with_head(net, fc=nn.Linear(width, s.prototypes)),
        projector=mlp([width, s.hidden, s.embedding], True, True, True),
    )
    predictor = mlp([s.embedding, s.hidden, s.embedding], True, True, True)
    top = tree(net=shared, online_encoder=tree(net=shared, projector=head), target_encoder=target, online_predictor=predictor)
    left = {
        "another network": ["net."], "target network": ["target_encoder."], "predictor": ["online_predictor."],
        "head that the embedding does not use": ["online_encoder.net.fc."],
    }
    networks = [("online_encoder.net.", "usual"), ("net.", "usual"), ("target_encoder.net.", "usual")]
    return Layout("byol", top, head, networks, left)


def barlow_twins(net, width, s):
    head = mlp([width, s.hidden, s.hidden, s.embedding], False, False, True)
    inner = tree(backbone=net(), projector=head, bn=nn.BatchNorm1d(s.embedding, affine=False))
    left = {"batch norm of the loss": ["module.bn."]}
    return Layout("barlow-twins", tree(module=inner), head, [("module.backbone.", "usual")], left)


def barlow_twins_lightly(net, width, s):
    head = mlp([width, s.hidden, s.hidden, s.embedding], False, True, True)
    top = tree(backbone=net(numbered=True), projection_head=tree(layers=head))
    return Layout("barlow-twins", top, head, [("backbone.", "numbered")], alike=["vicreg"], archs="resnet")


def vicreg(net, width, s):
    head = mlp([width, s.hidden, s.hidden, s.embedding], True, False, True)
    return Layout("vicreg", tree(module=tree(backbone=net(), projector=head)), head, [("module.backbone.", "usual")])


def supervised(net, width, s):
    top = with_head(net, fc=nn.Linear(width, s.prototypes))
    return Layout("supervised", top, lambda f: f, [("", "usual")], {"head that the embedding does not use": ["fc."]})


def supervised_transformer(net, width, s):
    top = with_head(net, head=nn.Linear(width, s.prototypes))
    return Layout("supervised", top, lambda f: f, [("", "usual")], {"head that the embedding does not use": ["head."]}, archs="vit")


def backbone(net, width, s):
    return Layout("backbone", net(), lambda f: f, [("", "usual")])


def vissl(net, width, s):
    """VISSL: the trunk alone."""
    top = tree(trunk=tree(_feature_blocks=net()))
    return Layout("backbone", top, lambda f: f, [("trunk._feature_blocks.", "usual")])


LAYOUTS = [
    moco_v1, moco_v2, moco_v3, moco_v3_transformer, swav, deepcluster_v2, swav_without_prototypes, dino, dino_with_batch_norm,
    dino_official, dino_both, simclr, simclr_beside, simclr_lightly, byol, byol_whole, barlow_twins, barlow_twins_lightly, vicreg,
    supervised, supervised_transformer, backbone, vissl,
]
