"""Sharding quantized models with PyTorch's FSDP: docs/fsdp.md.

Packed codes and statistics are byte parameters, so ``fully_shard`` keeps their bits. What is here
chooses units, loads shards without ever holding the model, and checks what comes back.
"""

from ._blocks import decoder_blocks, wrap_policy
from ._gather import gathered, verify_gathers
from ._load import load_sharded
from ._shard import local_base_bytes, shard_model
from ._storage import convert_storage_
from ._traffic import GatherTraffic, count_gathers, unit_bytes

__all__ = [
    "GatherTraffic",
    "convert_storage_",
    "count_gathers",
    "decoder_blocks",
    "gathered",
    "load_sharded",
    "local_base_bytes",
    "shard_model",
    "unit_bytes",
    "verify_gathers",
    "wrap_policy",
]
