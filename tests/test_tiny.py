"""The whole promise in seconds: exact, complete, and smaller than before."""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sbp_compile
from sbp_compile.nn import LogNormalNoise

ROOT = Path(__file__).parent.parent


def switch_off(noise: LogNormalNoise, share: float) -> None:
    """What training does to a feature that it has no use for: noise so wide that its SNR is below 1."""
    with torch.no_grad():
        count = int(share * noise.mu.numel())
        noise.log_sigma[:count] = 3.0
        noise.mu[:count] = -3.0


class TinyNetwork(nn.Module):
    """Noise before the bias (a removed channel leaves relu(bias) behind), padding, pooling, a flattened mask."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.noise = LogNormalNoise(16)
        self.bias = nn.Parameter(torch.randn(16, 1, 1))
        self.second = nn.Conv2d(16, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.flat_noise = LogNormalNoise(8 * 4 * 4)
        self.head = nn.Linear(8 * 4 * 4, 10)
        switch_off(self.noise, 0.75)
        switch_off(self.flat_noise, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.noise(self.first(x)) + self.bias), 2)
        x = F.max_pool2d(F.relu(self.norm(self.second(x))), 2)
        return self.head(self.flat_noise(x.flatten(1)))


def test_the_small_network_is_small_and_the_same_function(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = TinyNetwork().eval()
    compiled = sbp_compile.compile(module, torch.randn(4, 3, 16, 16))
    compiled.save(tmp_path / "small.onnx")

    assert [layer.masked for layer in compiled.report.layers] == [12, 4, 0]
    # One channel more than needed stands for the constants that meet the zero padding of the next layer.
    assert [layer.kept for layer in compiled.report.layers] == [5, 4, 10]
    assert compiled.report.before.macs > 3 * compiled.report.after.macs
    assert compiled.report.verification is not None
    assert compiled.report.verification.float64_error <= 1e-12

    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    for batch in (1, 7):
        x = torch.randn(batch, 3, 16, 16)
        wanted = module(x).detach()
        [result] = session.run(None, {"x": x.numpy()})
        assert np.abs(result - wanted.numpy()).max() <= 1e-5 * float(wanted.abs().max())


def test_the_bundled_network_keeps_its_predictions(tmp_path: Path) -> None:
    model = sbp_compile.load_model(ROOT / "models" / "lenet5-sbp-digits.pt")
    compiled = sbp_compile.compiler.compile_file(model)
    compiled.save(tmp_path / "small.onnx")
    assert compiled.report.before.macs >= 8 * compiled.report.after.macs

    with np.load(ROOT / "models" / "digits-test.npz") as data:
        images = data["images"].astype(np.float32)[:, None] / 255
    with torch.no_grad():
        wanted = model.exported_program.module()(torch.from_numpy(images))
    [result] = onnxruntime.InferenceSession(str(tmp_path / "small.onnx")).run(None, {"x": images})
    assert (result.argmax(1) == wanted.numpy().argmax(1)).all()
