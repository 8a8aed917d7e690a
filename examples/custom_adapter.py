"""A quantization method of your own: a layer, an adapter, a name. Configs, the factory, saving and
loading then know it."""

import sys

import torch
from torch import nn

import quantal
from quantal import QuantizationAdapter, QuantizationConfig, QuantizedLinear


class TernaryLinear(QuantizedLinear):
    """Ternary weights: W = scale * code with codes -1, 0, 1 and one scale per row."""

    def __init__(self, in_features, out_features, bias=True, config=None):
        super().__init__(in_features, out_features, bias, config)
        codes = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.zeros(out_features, 1))

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize_weights().to(x.dtype), self.bias)

    def quantize_weights(self, weights):
        self.scales.copy_(weights.abs().mean(1, keepdim=True))
        self.codes.copy_((weights / self.scales).round().clamp(-1, 1))

    def dequantize_weights(self):
        return self.codes * self.scales


class TernaryAdapter(QuantizationAdapter):
    def create_quantized_linear(self, in_features, out_features, bias=True):
        return TernaryLinear(in_features, out_features, bias, self.config)

    def quantize_model(self, model, **kwargs):
        return quantal.replace_linear_with_quantized(model, self, **kwargs)


def net():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


folder = sys.argv[1] if len(sys.argv) > 1 else "build/custom-adapter-py"
torch.manual_seed(0)
quantal.register_adapter("ternary", TernaryAdapter)

config = QuantizationConfig(method="ternary", skip_modules=["2"])
adapter = quantal.create_quantization_adapter("cpu", config)
model = adapter.quantize_model(net())
print(adapter.report.to_text())

adapter.save_quantized_model(model, folder, overwrite=True)
# config.json names the adapter: any adapter loads the folder.
loaded = quantal.load_model(folder, model=net())
x = torch.randn(4, 64)
print("loaded model", "is the same" if torch.equal(model(x), loaded(x)) else "differs")
