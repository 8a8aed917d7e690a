"""Filling a torch model from a file: built without memory, compared first, then filled."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from . import _check, _core
from ._custom import ADAPTER_KEY, adapter_of_file
from ._dtypes import _BY_NAME, bytes_of, parse_dtype, tensor_from
from ._errors import ConfigError, CorruptError, UnsupportedError
from ._model_attention import AUTO, set_attention
from ._packed import BUFFERS, PackedWeight
from ._parts import model_parts, module_names, packable_shape, split_name, weight_shapes
from .config import QuantizationConfig
from .embedding import QuantizedEmbedding
from .linear import PackedLinear

#: Key of config.json under which tied tensor names of a model that is not transformers' are kept.
TIED_KEY = "quantal_tied"
#: Attribute of a loaded model that keeps the tokenizer and other small files of its folder.
TEXTS_KEY = "_quantal_texts"

_log = logging.getLogger("quantal")
#: Makes the layer of an adapter of one's own in the place of a dense one of this name.
MakeLinear = Callable[[str, nn.Linear], nn.Module]


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What a file and a model have in common, key by key.

    layout      of the file: "hqq transformers", "gguf gguf" ...
    missing     tensors of the model that the file lacks
    unexpected  tensors and packed layers that the model lacks
    misshapen   (name, shape in the file, shape in the model)
    decoded     packed in the file, in a module that cannot hold it packed
    settings    where the file overrules the config: what, asked, used, reason
    notes       what was ignored or chosen while reading
    """

    layout: str
    missing: list[str]
    unexpected: list[str]
    misshapen: list[tuple[str, list[int], list[int]]]
    decoded: list[str]
    settings: list[dict[str, str]]
    notes: list[str]
    text: str
    settings_text: str

    @property
    def fits(self) -> bool:
        """Whether the file has the model's tensors, all of them and no others."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        return self.text


# ---------------------------------------------------------------------- building


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters created inside have shapes but no memory; buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None and value.device.type != "meta":
            value = nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)
        register(module, name, value)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "load: transformers is not installed, expected it for building the model from its "
            "config (or pass model=, a module to load into)"
        ) from error
    return transformers


def dtype_keyword(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """How this version of transformers calls the dtype of a model; the older name warns."""
    version = _transformers().__version__.split(".")
    new = (int(version[0]), int(version[1])) >= (4, 56)
    return {"dtype" if new else "torch_dtype": dtype}


def _config_of_path(transformers: Any, path: str | os.PathLike) -> Any:
    text = _check.path("load", "model_config", path)
    try:
        return transformers.AutoConfig.from_pretrained(text)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"load: model_config is '{text}', expected a folder or hub name with a config.json of "
            f"transformers ({error})"
        ) from error


def _config_object(model_config: Any, stored: dict[str, Any]) -> Any:
    """A transformers config of one's own, without the quantization of the file."""
    transformers = _transformers()
    if isinstance(model_config, str | os.PathLike):
        model_config = _config_of_path(transformers, model_config)
    if isinstance(model_config, transformers.PretrainedConfig):
        config = type(model_config).from_dict(model_config.to_dict())
    elif model_config is None or isinstance(model_config, dict):
        values = dict(stored if model_config is None else model_config)
        if "model_type" not in values:
            raise ConfigError(
                "load: config has no model_type, expected that of a transformers model (pass "
                "model_config, or model= to load into a module of your own)"
            )
        for key in ("quantization_config", "quantization", TIED_KEY, ADAPTER_KEY):
            values.pop(key, None)
        config = transformers.AutoConfig.for_model(**values)
    else:
        raise ConfigError(
            f"load: model_config is a {type(model_config).__name__}, expected a transformers "
            "config, a dictionary, a path or None"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def build_model(model_config: Any, stored: dict[str, Any]) -> nn.Module:
    """The model of a config, its parameters without memory: of the class that the config names
    among its architectures, else a causal language model."""
    config = _config_object(model_config, stored)
    transformers = _transformers()
    cls: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    own = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    with parameters_on_meta():
        if own and cls.config_class is type(config):
            return cls._from_config(config)
        return transformers.AutoModelForCausalLM.from_config(config)


# ---------------------------------------------------------------------- filling


def set_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Puts a module in the place of another one; returns the model, which may be the module."""
    if not name:
        return module
    parent, child = split_name(name)
    setattr(model.get_submodule(parent), child, module)
    return model


def _set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a tensor in the place of a parameter or buffer, without a copy."""
    parent, child = split_name(name)
    module = model.get_submodule(parent)
    if child in module._parameters:
        module._parameters[child] = value  # type: ignore[assignment]
    else:
        module._buffers[child] = value


def _parameter_like(old: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """`value` where `old` was: on its device unless that is meta, trained as it was."""
    if old is not None and old.device.type != "meta":
        value = value.to(old.device)
    if not isinstance(old, nn.Parameter):
        return value
    return nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())


def assign_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a tensor in the place of the parameter or buffer of this name, without a copy."""
    parent, child = split_name(name)
    module = model.get_submodule(parent)
    old = module._parameters.get(child, module._buffers.get(child))
    _set_tensor(model, name, _parameter_like(old, value))


def read_tensor(stored: _core.MappedTensor) -> torch.Tensor:
    """A copy of a tensor in a mapped file."""
    tensor = torch.empty(stored.shape, dtype=_BY_NAME[stored.dtype])
    if tensor.numel():
        stored.copy_into(bytes_of(tensor))
    return tensor


def _settings_of(config: QuantizationConfig | None, spec: list[int]) -> QuantizationConfig | None:
    """The config with what a file says about a layer; None without a config."""
    if config is None:
        return None
    form = _core.describe(spec)
    changes = {"method": form["method"], "group_size": form["group_size"], "layer_configs": {}}
    if form["method"] != "none":
        changes["bits"] = form["bits"]
    if form["dialect"] == "bnb":
        changes |= {name: form[name] for name in ("quant_type", "double_quant")}
    return dataclasses.replace(config, block_size=None, **changes)


class _Filler:
    """Puts the content of one file into one model."""

    def __init__(
        self, model: nn.Module, loaded: dict[str, Any], config: Any, dtype: torch.dtype | None
    ) -> None:
        self.model, self.config, self.dtype = model, config, dtype
        self.layers, self.tensors = loaded["layers"], loaded["tensors"]
        self.names: dict[int, list[str]] = {}
        for name, module in module_names(model).items():
            self.names.setdefault(id(module), []).append(name)
        self.forms: dict[tuple[int, ...], QuantizationConfig | None] = {}

    def fill(self, parts: _core.ModelParts, wrong: set[str]) -> nn.Module:
        """`wrong` are names that do not fit; they are left out."""
        groups: dict[str, list[str]] = {}
        tied = parts.tied
        for name in parts.tensors:
            groups.setdefault(tied.get(name, name), []).append(name)
        for root, names in groups.items():
            self._fill_group([root, *(name for name in names if name != root)], wrong)
        return self.model

    def _fill_group(self, names: list[str], wrong: set[str]) -> None:
        """One tensor under all its names. A packed one has its bytes for itself where the file
        gives another name bytes of its own."""
        source = {n: self._source(n, wrong) for n in names}
        present = [n for n in names if source[n]]
        packed = [n for n in present if source[n] == "packed"]
        for name in packed:
            others = [n for n in names if n == name or not source[n]]
            self._put_packed(name, others if name == packed[0] else [name])
        dense = [n for n in present if source[n] == "dense"]
        if dense:
            rest = [n for n in names if n not in packed]
            self._put_dense(dense[0], rest if not packed else dense)

    def _source(self, name: str, wrong: set[str]) -> str:
        module, field = split_name(name)
        if field == "weight" and module in self.layers and module not in wrong:
            return "packed"
        return "dense" if name in self.tensors and name not in wrong else ""

    def _put_packed(self, name: str, names: list[str]) -> None:
        spec, *buffers = self.layers.pop(split_name(name)[0])
        layout = _core.layout(spec)
        tensors = [
            tensor_from(b, "u8", list(layout[part]))
            for part, b in zip(BUFFERS, buffers, strict=False)
        ]
        for each in names:
            module = split_name(each)[0]
            old = self.model.get_submodule(module)
            if packable_shape(old) is None:
                values = PackedLinear.from_packed(spec, *tensors).dequantize_weights()
                assign_tensor(self.model, each, values)
                continue
            device = _device_of(old)
            tensors = [t if device is None else t.to(device) for t in tensors]
            layer = self._packed_module(old, spec, tensors)
            tensors = [layer.codes, layer.stats, layer.shared]  # the same objects from now on
            self._replace(module, old, layer)

    def _packed_module(
        self, old: Any, spec: list[int], tensors: list[torch.Tensor]
    ) -> PackedWeight:
        compute = self.config.compute_dtype if self.config is not None else None
        if isinstance(old, nn.Embedding):
            padding = old.padding_idx
            return QuantizedEmbedding.from_packed(
                spec, *tensors, padding_idx=padding, compute_dtype=compute
            )
        key = tuple(spec[3:])  # the form without its size
        if key not in self.forms:
            self.forms[key] = _settings_of(self.config, spec)
        layer = PackedLinear.from_packed(
            spec, *tensors, config=self.forms[key], compute_dtype=compute
        )
        layer.bias = old.bias  # filled as a tensor of its own
        return layer.train(old.training)

    def _put_dense(self, name: str, names: list[str]) -> None:
        value = read_tensor(self.tensors[name])
        shared: torch.Tensor | None = None
        for each in names:
            parent, child = split_name(each)
            module = self.model.get_submodule(parent)
            if isinstance(module, PackedWeight) and child == "weight":
                module = self._dense_module(parent, module)
            old = module._parameters.get(child, module._buffers.get(child))
            if shared is None:
                if self.dtype is not None and isinstance(old, nn.Parameter):
                    if not _keeps_dtype(self.model, each, value):
                        value = value.to(self.dtype)
                shared = _parameter_like(old, value)
            _set_tensor(self.model, each, shared)

    def _dense_module(self, name: str, old: Any) -> nn.Module:
        """A plain module in the place of a packed one."""
        if isinstance(old, nn.Embedding):
            new: Any = nn.Embedding(
                old.num_embeddings, old.embedding_dim, old.padding_idx, device="meta"
            )
        else:
            new = nn.Linear(old.in_features, old.out_features, old.bias is not None, device="meta")
            new.bias = old.bias
        new.weight.requires_grad_(False)
        self._replace(name, old, new)
        return new

    def _replace(self, name: str, old: nn.Module, new: nn.Module) -> None:
        for each in self.names.get(id(old), [name]):
            self.model = set_module(self.model, each, new)
        self.names[id(new)] = self.names.get(id(old), [name])


#: Types that a model's dtype applies to.
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _declared_dtype(stored: dict[str, Any]) -> torch.dtype | None:
    """The dtype of the model that a config.json names."""
    dtype = stored.get("dtype") or stored.get("torch_dtype")
    return parse_dtype(dtype) if isinstance(dtype, str) and dtype != "auto" else None


def _keeps_dtype(model: nn.Module, name: str, value: torch.Tensor) -> bool:
    """Whether transformers too would leave a parameter in the dtype of its file."""
    kept = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    return value.dtype not in _FLOATS or any(part in kept for part in name.split("."))


def _device_of(module: nn.Module) -> torch.device | None:
    """Where a module lies; None if it has no memory yet."""
    parameter = next(module.parameters(recurse=False), None)
    return None if parameter is None or parameter.device.type == "meta" else parameter.device


# ---------------------------------------------------------------------- what the file lacks


def _initialize_missing(model: nn.Module) -> None:
    """Gives parameters that are still without memory the values of a new module."""
    initialize = getattr(model, "_init_weights", None)
    for module in model.modules():
        absent = [n for n, p in module._parameters.items() if p is not None and p.is_meta]
        if not absent:
            continue
        kept = dict(module._parameters)
        for name, old in kept.items():
            if old is not None:
                module._parameters[name] = nn.Parameter(
                    torch.zeros(old.shape, dtype=old.dtype), requires_grad=old.requires_grad
                )
        if not isinstance(module, PackedWeight):
            if initialize is not None:
                initialize(module)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
        for name, old in kept.items():
            if name not in absent:
                module._parameters[name] = old


def _tie(model: nn.Module) -> None:
    """Ties what transformers ties and the file did not have."""
    if hasattr(model, "tie_weights") and any(p.is_meta for p in model.parameters()):
        model.tie_weights()  # type: ignore[operator]


# ---------------------------------------------------------------------- the whole


def _custom_layers(model: nn.Module, loaded: dict[str, Any], make: MakeLinear) -> None:
    """Layers of a custom adapter: linear modules whose weight the file has in other tensors."""
    fields: dict[str, set[str]] = {}
    for name in loaded["tensors"]:
        module, field = split_name(name)
        fields.setdefault(module, set()).add(field)
    for name, linear in module_names(model).items():
        own = fields.get(name, set())
        if type(linear) is not nn.Linear or "weight" in own or not own - {"bias"}:
            continue
        set_module(model, name, make(name, linear).train(linear.training))


def _writer(config_json: str, path: str, make_linear: MakeLinear | None) -> Any:
    """The registered adapter that wrote a file; an adapter of one's own may read without it."""
    try:
        return adapter_of_file(json.loads(config_json), path)
    except UnsupportedError:
        if make_linear is None:
            raise
        return None


def _stored_ties(config_json: str) -> dict[str, str]:
    ties = json.loads(config_json).get(TIED_KEY, {})
    return ties if isinstance(ties, dict) else {}


def _report(native: _core.LoadReport, loaded: dict[str, Any]) -> LoadReport:
    native.layout, native.notes = loaded["layout"], loaded["notes"]
    return LoadReport(
        layout=native.layout,
        missing=native.missing,
        unexpected=native.unexpected,
        misshapen=native.misshapen,
        decoded=native.decoded,
        settings=native.settings,
        notes=native.notes,
        text=native.text(),
        settings_text=native.settings_text,
    )


def load(
    path: str | os.PathLike,
    model_config: Any = None,
    config: QuantizationConfig | None = None,
    *,
    model: nn.Module | None = None,
    strict: bool = True,
    make_linear: MakeLinear | None = None,
    attn_implementation: str = AUTO,
) -> tuple[nn.Module, LoadReport]:
    """The loaded model and what was found out; ``load_model`` says the rest.

    make_linear  layers of a custom adapter, for linear modules whose weight the file has in
                 tensors of its own kind
    """
    _check.flag("load", "strict", strict)
    _check.text("load", "attn_implementation", attn_implementation)
    _check.optional(_check.module)("load", "model", model)
    expected = "a QuantizationConfig or None"
    _check.optional(_check.is_a(QuantizationConfig, expected))("load", "config", config)
    path = os.fspath(path)
    dtype = None  # a module of the caller's takes what is there
    own = model is not None
    if model is None:
        stored = json.loads(_core.read_config(path))
        model = build_model(model_config, stored)
        dtype = _declared_dtype(stored)
    loaded = _core.load_checkpoint(path, weight_shapes(model))
    writer = _writer(loaded["config_json"], path, make_linear)
    if writer is not None:  # what was saved wins over the config of who loads
        make_linear = writer._make_linear()
    if make_linear is not None:
        _custom_layers(model, loaded, make_linear)
    parts = model_parts(model, _stored_ties(loaded["config_json"]))
    native = _core.compare_model(
        {name: layer[0] for name, layer in loaded["layers"].items()},
        {name: tensor.shape for name, tensor in loaded["tensors"].items()},
        parts,
        None if config is None else config.to_json(),
    )
    report = _report(native, loaded)
    if strict:
        try:
            native.require_fit(path)
        except CorruptError as error:
            error.report = report  # type: ignore[attr-defined]
            raise
    elif not report.fits:
        _check.warn(f"load: {native.summary()} (file={path})")
    for line in report.text.splitlines():
        _log.info("%s: %s", path, line)
    wrong = {*report.unexpected, *(name for name, _, _ in report.misshapen)}
    model = _Filler(model, loaded, config, dtype).fill(parts, wrong)
    _tie(model)
    _initialize_missing(model)
    if not own or attn_implementation != AUTO:
        set_attention("load", model, attn_implementation)
    model.__dict__[TEXTS_KEY] = {n: t for n, t in loaded["texts"].items() if n != "config.json"}
    return model.eval(), report
