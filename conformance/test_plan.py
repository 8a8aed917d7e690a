"""The planner on the real model: memory is what was planned, and per parameter what the document
says, with the statistics on top."""

import pytest
from transformers import AutoModelForCausalLM

import quantal
from quantal import QuantizationConfig, create_quantization_adapter

EXTENDED = {"support": "extended"}
#: bytes per parameter of the documentation, and what statistics may add: the model is float32, so
#: two of them in a group of 64 take 8 bytes
METHODS = [
    ("bnb_int8", 8, 1, 0.02),
    ("bnb_nf4", 4, 0.5, 0.05),
    ("hqq", 8, 1, 0.126),
    ("hqq", 4, 0.5, 0.126),
    ("hqq", 2, 0.25, 0.126),
    ("mlx_int8", 8, 1, 0.126),
    ("mlx_int4", 4, 0.5, 0.126),
    ("quanto_int2", 2, 0.25, 0.08),
]


def real_bytes(model) -> int:
    """Of all tensors that a file holds."""
    made = {id(b) for name, b in model.named_buffers() if "inv_freq" in name}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for key, t in tensors.items() if key not in made)


@pytest.mark.parametrize(("method", "bits", "per_parameter", "statistics"), METHODS)
def test_memory_of_the_quantized_model(smollm2_dense, method, bits, per_parameter, statistics):
    config = QuantizationConfig(
        method, bits=bits, compute_dtype="float32", backend_options=EXTENDED
    )
    plan = quantal.plan(smollm2_dense, "cpu", config=config)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dense)
    model = create_quantization_adapter("cpu", config).quantize_model(model)
    assert plan.resident_bytes == real_bytes(model)
    layers = [m for m in model.modules() if isinstance(m, quantal.PackedLinear)]
    assert len(layers) == 210
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    packed = sum(layer.packed_bytes() for layer in layers)
    assert per_parameter <= packed / weights <= per_parameter + statistics


def test_memory_of_the_file_as_it_is(smollm2):
    plan = quantal.plan(smollm2, "cpu", memory_gb=4, mode="qlora")
    assert plan.label == "as stored"
    assert plan.fits
    assert plan.resident_bytes == real_bytes(quantal.load_model(smollm2))
