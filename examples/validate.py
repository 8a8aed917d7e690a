"""What is wrong with a configuration, what to take instead, and what this machine runs."""

from quantal import (
    Backend,
    QuantizationConfig,
    get_recommended_config,
    report_import_status,
    validate_quantization_config,
)

config = QuantizationConfig(
    method="hqq",
    group_size=48,  # no divisor of the layers below
    compute_dtype="bfloat16",
    layer_configs={"model.layers.9": {"bits": 8}},
)

# With the linear layers of a model, group sizes and patterns are tried on them; the model itself
# may be given instead of its shapes.
layers = {"model.layers.0.mlp.up_proj": (128, 64), "model.layers.0.mlp.down_proj": (64, 128)}
for issue in validate_quantization_config(config, Backend.MPS, layers):
    print(f"{issue.severity} {issue.id}: {issue} ({issue.remedy})")

# A 7B model on a laptop with 16 GB that the system shares.
recommended = get_recommended_config(Backend.MPS, 7.0, 16.0)
print(f"recommended: {recommended.method}\n")

print(report_import_status(Backend.CPU))
