"""Networks by name, or by the user's factory, dense and with noise layers."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor, nn

from sbp_compile.capture.architecture import build, importing_from_here
from sbp_compile.errors import UsageError
from sbp_compile.nn import CONVOLUTIONS, NORMS, hidden_linears, insert_noise, noise_layers
from sbp_compile.training.models import LeNet5, LeNet500300, VGGLike
from sbp_compile.training.resnet import ResNet20

CLASSES: dict[str, type[nn.Module]] = {
    "lenet5": LeNet5,
    "lenet500300": LeNet500300,
    "vgg-like": VGGLike,
    "resnet20": ResNet20,
}
OF_THE_PAPER = (LeNet5, LeNet500300, VGGLike)  # the noise is part of their code


def dense_network(name: str, example: Tensor) -> nn.Module:
    """Build the network that `name` says, `package.module:factory` included, without noise of ours.

    `example`: an input (N, C, H, W). Raises UsageError where it does not fit the network, or the factory fails.
    """
    if ":" in name:
        with importing_from_here():
            network = build(name)
    else:
        network = _build(CLASSES[name], noise=False)
    expected = getattr(network, "input_shape", None)
    if expected is not None and tuple(expected) != tuple(example.shape[1:]):
        raise UsageError(
            f"{name} takes images of shape {tuple(expected)}, the data set has {tuple(example.shape[1:])}: "
            "choose another data set or network"
        )
    return network


def noisy_network(dense: nn.Module, example: Tensor, init_log_sigma: float) -> nn.Module:
    """Build the network with noise layers that start at `init_log_sigma`, and the weights of `dense`.

    The paper's networks have their noise where its authors put it. Others get it behind every norm, or behind every
    convolution where there is no norm, and behind hidden linear layers; a network with noise layers keeps those.
    """
    if isinstance(dense, OF_THE_PAPER):
        model: nn.Module = _build(type(dense), noise=True).to(example.device)
        model.load_state_dict(model.state_dict() | dense.state_dict())
    else:
        model = copy.deepcopy(dense)
        if not noise_layers(model):
            insert_noise(model, _places(model, example), example_inputs=example)
    for layer in noise_layers(model):
        nn.init.constant_(layer.log_sigma, init_log_sigma)
    return model


def _places(model: nn.Module, example: Tensor) -> list[Any]:
    kinds = NORMS if any(isinstance(part, NORMS) for part in model.modules()) else CONVOLUTIONS
    return [
        *(kind for kind in kinds if any(isinstance(part, kind) for part in model.modules())),
        *hidden_linears(model, example),
    ]


def _build(kind: type[nn.Module], *, noise: bool) -> nn.Module:
    return kind(noise=noise) if "noise" in inspect.signature(kind).parameters else kind()
