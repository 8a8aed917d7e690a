"""Every argument of every public function and class, tried with what it is not.

bad_input_cases.py has one valid call of each; bad_input_legal.txt says which of the wrong values
are right for a parameter. All others must raise a typed exception whose message says what to do.
"""

import importlib
import inspect
import pathlib
import warnings

import pytest

import quantal
from bad_input_cases import WRONG, cases
from conftest import GOLDEN, hqq, tiny_llama

MODULES = [
    "quantal",
    "quantization_wrapper",
    "backend_manager",
    "imports",
    "quantal.error_handling",
    "quantal.quantization_error_handler",
    "quantal.model_loader",
]
KINDS = (ValueError, TypeError, OSError, ImportError, quantal.Error)
REMEDIES = ("expected", "Supported:", "did you mean", "use ", "pass ", "install", "recommended")
REMEDIES += ("is missing", "No import registered")

#: Classes whose objects quantal makes; a user reads them.
RECORDS = """BackendCapabilities ConvertReport LoadReport LayerMerge LoftqLayer MergeReport Plan
ErrorContext ImportResult SafeQuantizationAdapter BaseIdentity BaseMatch Restored"""
#: Exceptions, abstract loaders, loaders of other devices. QLoRA and training have tests elsewhere.
OTHERS = """ConfigError CorruptError DeviceError DtypeError Error InternalError IoError
NotFoundError QuantalError ShapeError UnsupportedError BackendError ConfigurationError MemoryError
ModelLoader QuantizedModelLoader CUDAModelLoader MPSModelLoader MLXModelLoader ModelLoaderFactory
initialize_loftq merge_report merge_to_full_precision load_model_and_tokenizer
ImportRegistry suppress_output QuantizationErrorHandler functional registry fsdp
TrainingCheckpoints base_identity chunked_cross_entropy chunked_loss token_losses save_adapter
load_adapter compare_adapter_base read_adapter_base"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(a saved model, a GGUF file, a free path)"""
    folder = tmp_path_factory.mktemp("files")
    adapter = quantal.create_quantization_adapter("cpu", hqq())
    adapter.save_quantized_model(adapter.quantize_model(tiny_llama()), folder / "model")
    gguf = GOLDEN / "checkpoints" / "gguf" / "tiny-q4_0.gguf"
    return str(folder / "model"), str(gguf), str(folder / "free")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(quantal._custom, "_classes", {})


NAMES = list(cases("folder", "gguf", "free"))


def legal_kinds():
    lines = pathlib.Path(__file__).with_name("bad_input_legal.txt").read_text().splitlines()
    pairs = (line.split(": ") for line in lines if line and not line.startswith("#"))
    return {name: set(kinds.split()) for name, kinds in pairs}


LEGAL = legal_kinds()


@pytest.mark.parametrize("name", NAMES)
def test_wrong_arguments_are_typed_errors_that_say_what_to_do(name, files, capfd):
    case = cases(*files)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.run(**case.arguments())
        for parameter in case.arguments():
            for kind, make in WRONG.items():
                arguments = case.arguments() | {parameter: make()}
                where = f"{name}({parameter}={kind})"
                legal = kind in LEGAL.get(f"{name}.{parameter}", ())
                try:
                    case.run(**arguments)
                except KINDS as error:
                    assert not legal, f"{where} is legal: {error!r}"
                    assert any(
                        word in str(error).replace("Install", "install") for word in REMEDIES
                    ), f"{where}: {error!r}"
                except Exception as error:
                    pytest.fail(f"{where} raised {error!r}")
                else:
                    assert legal, f"{where} was accepted"
    out, err = capfd.readouterr()
    assert out == "" and (err == "" or err.startswith("\rquantizing:")), name


def public_names():
    for module in MODULES:
        found = importlib.import_module(module)
        for name in found.__all__:
            if callable(getattr(found, name)):
                yield name, getattr(found, name)


def test_every_public_name_is_tried():
    tried = {name.split(".")[0] for name in NAMES} | set(RECORDS.split()) | set(OTHERS.split())
    assert sorted({name for name, _ in public_names()} - tried) == []


def test_every_parameter_is_tried():
    absent = []
    made = cases("folder", "gguf", "free")
    for name, found in public_names():
        if name not in made or name in ("Backend", "QuantizationMethod", "LoadingStrategy"):
            continue
        try:
            parameters = inspect.signature(found).parameters.values()
        except ValueError:  # a function of the extension module
            continue
        wanted = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        left = wanted - set(made[name].arguments())
        absent += [f"{name}.{parameter}" for parameter in sorted(left)]
    assert absent == []


def test_the_table_names_real_parameters():
    made = cases("folder", "gguf", "free")
    for line in LEGAL:
        name, _, parameter = line.rpartition(".")
        assert parameter in made[name].arguments(), line


PUBLIC_CLASSES = [
    "BackendManager",
    "QuantizationConfig",
    "Report",
    "ImportRegistry",
    "QuantizationErrorHandler",
    "ResourceMonitor",
]


@pytest.mark.parametrize("name", PUBLIC_CLASSES)
def test_every_public_method_is_tried(name):
    cls = dict(public_names())[name]
    methods = [n for n, m in inspect.getmembers(cls, callable) if not n.startswith("_")]
    assert [m for m in methods if f"{name}.{m}" not in NAMES] == []
