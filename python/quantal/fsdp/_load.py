"""Shard-direct loading: each rank reads its rows, packed or to be quantized, and holds nothing
else."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .. import _check, _core
from .._dtypes import _BY_NAME, bytes_of
from .._errors import ConfigError, UnsupportedError
from .._loading import (
    _declared_dtype,
    _keeps_dtype,
    _stored_ties,
    build_model,
    set_module,
)
from .._model_attention import AUTO, set_attention
from .._packed import PackedWeight
from .._parts import model_parts, module_names, packable_shape, split_name, weight_shapes
from ..adapters import QuantizationAdapter, create_quantization_adapter
from ..backend import Backend
from ..config import QuantizationConfig
from ..embedding import QuantizedEmbedding
from ..linear import PackedLinear
from ..replace import _return_free_memory
from ._agree import Agreement
from ._rows import RowQuantizer, local_rows
from ._shard import (
    default_mesh,
    is_mesh,
    mixed_precision_policy,
    shard_group,
    shard_model,
)
from ._storage import convert_storage_

#: Elements of a dense tensor that are read at a time.
PANEL_ELEMENTS = 8 << 20
#: Bytes that were read after which freed memory is given back.
TRIM_BYTES = 32 << 20
Attach = Callable[[nn.Module], nn.Module]


@_check.arguments(
    mesh=_check.optional(is_mesh),
    attach=_check.optional(_check.function),
    storage_dtype=_check.optional(_check.dtype),
    attn_implementation=_check.text,
)
def load_sharded(
    path: str | os.PathLike,
    model: Any = None,
    config: QuantizationConfig | QuantizationAdapter | None = None,
    mesh: Any = None,
    *,
    attach: Attach | None = None,
    mixed_precision: Any = None,
    offload: Any = None,
    reshard_after_forward: bool | int | None = None,
    blocks: Iterable[nn.Module] | None = None,
    storage_dtype: torch.dtype | None = None,
    attn_implementation: str = AUTO,
) -> nn.Module:
    """A sharded model from a folder or file, without any rank ever holding the whole.

    path      what ``load_model`` reads: dense weights, which each rank quantizes as `config` says,
              or a model that any supported tool quantized already
    model     a module, whose parameters may be on the meta device; a transformers config, its
              dictionary or a path to one; None: as the folder's config.json says
    config    a QuantizationConfig or an adapter for dense weights; None: layers stay as they are
    mesh      a DeviceMesh as for ``shard_model``; None: all ranks
    attach    called with the model before it is sharded, returns what is trained:
              ``lambda m: get_peft_model(prepare_model_for_training(m), LoraConfig(...))``. Weights
              read as zeros meanwhile. Seed every rank alike, or rank 0's adapters are taken
    mixed_precision, offload, reshard_after_forward, blocks    as in ``shard_model``
    storage_dtype    dtype that packed bytes are viewed as; see ``convert_storage_``
    attn_implementation    as in ``load_model``; "auto" asks what a step gains on this CPU where
              there is something to `attach`

    Collective: all ranks call it with the same arguments. Each reads its rows only, and quantizes
    those of dense weights; the bytes are those of the whole model, cut afterwards. An error on one
    rank is raised on all of them.
    """
    mesh = default_mesh() if mesh is None else mesh
    everyone = dist.group.WORLD if mesh.size() == dist.get_world_size() else None
    agreement = Agreement(shard_group(mesh), mesh.device_type, everyone)
    error: BaseException | None = None
    try:
        loading = _Loading(path, model, config)
        if not isinstance(model, nn.Module) or attn_implementation != AUTO:
            set_attention(
                "load_sharded",
                loading.model,
                attn_implementation,
                dtype=mixed_precision_policy(mixed_precision).param_dtype,
                training=attach is not None,
            )
        loaded = loading.attach(attach)
        if storage_dtype is not None:
            convert_storage_(loaded, storage_dtype)
    except Exception as e:
        error = e
    agreement.check(error)
    loaded = shard_model(
        loaded,
        mesh,
        mixed_precision=mixed_precision,
        offload=offload,
        reshard_after_forward=reshard_after_forward,
        blocks=blocks,
    )
    _materialize(loaded, "cpu" if offload else mesh.device_type)
    loading.fill(loaded, agreement)
    return loaded


# ---------------------------------------------------------------------- without memory


def _on_meta(model: nn.Module) -> None:
    """Puts every parameter on the meta device; tied ones stay one."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in known:
                known[id(p)] = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
                known[id(known[id(p)])] = known[id(p)]
            module._parameters[name] = known[id(p)]


def _placeholders(model: nn.Module) -> dict[int, nn.Parameter]:
    """Gives every parameter without memory one element of it, seen in the whole shape, so that
    adapters are made on a device. Returns the new ones by id."""
    known: dict[int, nn.Parameter] = {}
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not p.is_meta:
                continue
            if id(p) not in known:
                data = torch.zeros(1, dtype=p.dtype).expand(p.shape)
                known[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad)
                made[id(known[id(p)])] = known[id(p)]
            module._parameters[name] = known[id(p)]
    return made


def _is_placeholder(p: torch.Tensor) -> bool:
    return p.numel() > 1 and not any(p.stride()) and not p.is_meta


def _forget_placeholders(model: nn.Module) -> None:
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or not _is_placeholder(p):
                continue
            if id(p) not in known:
                data = torch.empty(p.shape, dtype=p.dtype, device="meta")
                known[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad)
            module._parameters[name] = known[id(p)]


def _materialize(model: nn.Module, device: str) -> None:
    """Memory for this rank's share of every parameter; what has some already keeps its values."""

    placed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def place(t: torch.Tensor) -> torch.Tensor:
        if not t.is_meta:
            return t
        if id(t) not in placed:  # tied ones stay one
            placed[id(t)] = t, torch.zeros_like(t, device=device)
        return placed[id(t)][1]

    model._apply(place)


# ---------------------------------------------------------------------- one file, one model


class _Loading:
    """What is in the file, and where it goes."""

    def __init__(self, path: Any, model: Any, config: Any) -> None:
        self.path = _check.path("load_sharded", "path", path)
        _check.source("load_sharded", "path", path)
        stored = json.loads(_core.read_config(self.path))
        dtype = None
        if not isinstance(model, nn.Module):
            model = build_model(model, stored)
            dtype = _declared_dtype(stored)
        else:
            _on_meta(model)
        self.reader = _core.CheckpointReader(self.path, weight_shapes(model))
        self.layers = set(self.reader.layer_names)
        self.model = self._packed(model, config)
        ties = _stored_ties(self.reader.config_json)
        self.parts = model_parts(self.model, ties)
        self._require_fit()
        self.targets = self._targets()
        self._set_dtypes(dtype)

    def _packed(self, model: nn.Module, config: Any) -> nn.Module:
        """The model with packed layers, without memory, where they will be."""
        if not self.layers:
            return model if config is None else _adapter_of(config).quantize_model(model)
        compute = None
        if config is not None:
            compute = (
                config.config if isinstance(config, QuantizationAdapter) else config
            ).compute_dtype
        modules = module_names(model)
        tied: dict[int, list[str]] = {}
        for name, module in modules.items():
            weight = module._parameters.get("weight")
            tied.setdefault(id(module if weight is None else weight), []).append(name)
        for name in sorted(self.layers & modules.keys()):
            old: Any = modules[name]
            if packable_shape(old) is None:
                raise UnsupportedError(
                    f"load_sharded: {name} is packed in the file and a {type(old).__name__} in the "
                    "model, expected a linear layer or an embedding"
                )
            made: dict[int, PackedWeight] = {}
            for each in [name, *tied[id(old.weight)]]:
                module = modules[each]
                if module is not old and each in self.layers:
                    continue  # the file has bytes of its own for it
                if id(module) not in made:
                    layer = _meta_layer(module, self.reader.layer_spec(name), compute)
                    if made:  # an embedding and the output layer: two modules, one weight
                        first = made[id(old)]
                        layer._set_buffers(first.codes, first.stats, first.shared)
                    made[id(module)] = layer
                model = set_module(model, each, made[id(module)])
        return model

    def _require_fit(self) -> None:
        reader = self.reader
        report = _core.compare_model(
            {name: reader.layer_spec(name) for name in reader.layer_names},
            {name: reader.describe_tensor(name)[1] for name in reader.tensor_names},
            self.parts,
            None,
        )
        report.layout = reader.layout
        report.require_fit(self.path)

    def _targets(self) -> list[tuple[str, nn.Module, str]]:
        """(name in the file, module, field) of everything that is filled, tied tensors once."""
        tied = self.parts.tied
        out: list[tuple[str, nn.Module, str]] = []
        groups: dict[str, list[str]] = {}
        for name in self.parts.tensors:
            groups.setdefault(tied.get(name, name), []).append(name)
        present = set(self.reader.tensor_names) | {f"{n}.weight" for n in self.layers}
        for root, names in groups.items():
            names = [root, *(n for n in names if n != root)]
            source = next((n for n in names if n in present), None)
            if source is None:
                continue
            module, field = split_name(root)
            out.append((source, self.model.get_submodule(module), field))
        return out

    def _set_dtypes(self, declared: torch.dtype | None) -> None:
        """Parameters without memory in the dtype that the file (or its config.json) gives them."""
        dense = set(self.reader.tensor_names)
        for name, module, field in self.targets:
            p = module._parameters.get(field)
            if p is None or isinstance(module, PackedWeight) and field == "weight":
                continue
            if name not in dense:
                continue
            dtype = _BY_NAME[self.reader.describe_tensor(name)[0]]
            value = torch.empty(0, dtype=dtype)
            if declared is not None and not _keeps_dtype(self.model, name, value):
                dtype = declared
            if p.dtype != dtype:
                p.data = p.data.to(dtype)

    def attach(self, attach: Attach | None) -> nn.Module:
        """The model with its adapters, again without memory for the base."""
        self.model.eval()
        if attach is None:
            return self.model
        _placeholders(self.model)
        packed = [m for m in self.model.modules() if isinstance(m, PackedWeight)]
        for layer in packed:
            layer._awaits_weights = True
        try:
            model = attach(self.model)
        finally:
            for layer in packed:
                layer._awaits_weights = False
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"load_sharded: attach returned {type(model).__name__}, expected the model"
            )
        if "peft" in sys.modules:
            from ._dora import refuse_inits

            refuse_inits(model)
        self._find_copies(model)
        _forget_placeholders(model)
        return model

    def _find_copies(self, model: nn.Module) -> None:
        """PEFT's ``modules_to_save`` trains copies: they are filled from the same tensors."""
        for wrapper in model.modules():
            copies = getattr(wrapper, "modules_to_save", None)
            if not isinstance(copies, nn.ModuleDict):
                continue
            original: Any = wrapper.original_module
            for copy in copies.values():
                pairs = dict(zip(original.modules(), copy.modules(), strict=False))
                for name, module, field in list(self.targets):
                    if module in pairs and not isinstance(module, PackedWeight):
                        self.targets.append((name, pairs[module], field))
                    elif module in pairs:
                        raise UnsupportedError(
                            f"load_sharded: modules_to_save names {name}, which is quantized; "
                            "expected dense modules (add it to skip_modules)"
                        )

    # ------------------------------------------------------------------ bytes

    def fill(self, loaded: nn.Module, agreement: Agreement) -> None:
        """Reads this rank's part of everything into `loaded`."""
        rows = RowQuantizer(self.reader, agreement)
        freed = 0
        for name, module, field in self.targets:
            error: BaseException | None = None
            try:
                if isinstance(module, PackedWeight) and field == "weight":
                    packed = split_name(name)[0]
                    if packed in self.layers:
                        rows.read_packed(packed, module)
                    else:
                        rows.quantize(name, module)
                else:
                    _fill_dense(self.reader, name, module, field)
            except Exception as e:
                error = e
            agreement.check(error)
            freed += _local_bytes(module)
            if freed >= TRIM_BYTES:
                freed = _return_free_memory()
        _return_free_memory()
        _finish_adapters(loaded)


def _adapter_of(config: Any) -> QuantizationAdapter:
    if isinstance(config, QuantizationAdapter):
        return config
    if isinstance(config, QuantizationConfig):
        support = config.backend_options.get("support", "extended")
        return create_quantization_adapter(Backend.CPU, config, support=support)
    raise ConfigError(
        f"load_sharded: config is a {type(config).__name__}, expected a QuantizationConfig, an "
        "adapter or None"
    )


def _meta_layer(old: Any, spec: list[int], compute: torch.dtype | None) -> PackedWeight:
    if isinstance(old, nn.Embedding):
        return QuantizedEmbedding(
            old.num_embeddings,
            old.embedding_dim,
            spec=spec,
            padding_idx=old.padding_idx,
            compute_dtype=compute,
            device="meta",
        )
    layer = PackedLinear(
        old.in_features, old.out_features, False, spec=spec, compute_dtype=compute, device="meta"
    )
    layer.bias = old.bias
    return layer.train(old.training)


def _fill_dense(reader: Any, name: str, module: nn.Module, field: str) -> None:
    """This rank's rows of a dense tensor."""
    target: Any = module._parameters.get(field)
    if target is None:
        target = module._buffers.get(field)
    local, begin, end = local_rows(target)
    dtype, shape = reader.describe_tensor(name)
    row = max(1, math.prod(shape[1:]))
    step = max(1, PANEL_ELEMENTS // row)
    for at in range(begin, end, step):
        stop = min(end, at + step)
        piece = torch.empty([stop - at, *shape[1:]], dtype=_BY_NAME[dtype])
        if piece.numel():
            reader.read_rows(name, at, stop, bytes_of(piece))
        with torch.no_grad():
            local[at - begin : stop - begin].copy_(piece) if shape else local.copy_(piece[0])


def _local_bytes(module: nn.Module) -> int:
    """About what reading the parameters of a module took."""
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))


def _finish_adapters(model: nn.Module) -> None:
    """What adapters take from weights: the magnitudes of DoRA."""
    if "peft" not in sys.modules:
        return
    from ._dora import set_magnitudes

    set_magnitudes(model)
