"""QLoRA through TRL's SFTTrainer, transformers' Trainer and PEFT's own preparation, all unpatched,
with bitsandbytes installed beside them: nothing of theirs mistakes a quantized layer for one of its
own."""

import datasets
import pytest
import torch
import trl
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from quantal import (
    QuantizationConfig,
    create_quantization_adapter,
    merge_report,
    prepare_model_for_training,
)
from quantal._packed import PackedWeight

OPTIONS = {"support": "extended"}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "nf4": QuantizationConfig("bnb_nf4", compute_dtype=torch.float32, backend_options=OPTIONS),
    "int8-outliers": QuantizationConfig(
        "bnb_int8", compute_dtype=torch.float32, backend_options={**OPTIONS, "int8_threshold": 6.0}
    ),
    "hqq4": QuantizationConfig(
        "hqq", bits=4, group_size=64, compute_dtype=torch.float32, backend_options=OPTIONS
    ),
    "mlx4": QuantizationConfig("mlx_int4", compute_dtype=torch.float32, backend_options=OPTIONS),
    "quanto4": QuantizationConfig(
        "quanto_int4", group_size=32, compute_dtype=torch.float32, backend_options=OPTIONS
    ),
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pin_memory.*", "ignore:MLX quantization requires:UserWarning"
)


def quantized(name: str) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=128,
    )
    adapter = create_quantization_adapter("cpu", METHODS[name])
    return adapter.quantize_model(LlamaForCausalLM(config))


def packed_bytes(model) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, PackedWeight)]
    assert len(layers) == 14
    return [t.detach().clone() for m in layers for t in (m.codes, m.stats, m.shared)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM")


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(200)]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def settings(folder) -> dict:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "peft_model"])
def test_sft_trainer(name, wrapped, tmp_path):
    """TRL attaches the adapters itself, or gets a PeftModel."""
    base = prepare_model_for_training(quantized(name))
    texts = [" ".join(f"w{(i * 3 + j) % 50}" for j in range(20)) for i in range(16)]
    trainer = trl.SFTTrainer(
        model=get_peft_model(base, lora()) if wrapped else base,
        args=trl.SFTConfig(**settings(tmp_path), bf16=False, max_length=32),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(),
        peft_config=None if wrapped else lora(),
    )
    before = packed_bytes(trainer.model)
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    trainer.train()
    found = losses(trainer)
    assert len(found) == 5 and found[-1] < found[0] - 0.1
    assert same(packed_bytes(trainer.model), before)
    trainer.save_model(str(tmp_path / "out"))
    again = PeftModel.from_pretrained(quantized(name), tmp_path / "out").eval()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(ids).logits, trainer.model.eval()(ids).logits)
    trainer.model.merge_and_unload()
    assert len(merge_report(trainer.model.base_model.model).layers) == 14


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(12) * 7 + i % 4) % 256
        return {"input_ids": ids, "labels": ids}


def test_trainer_takes_the_flags_that_preparation_sets(tmp_path):
    """``is_loaded_in_4bit`` without a ``quantization_method``: Trainer looks for no quantizer."""
    base = prepare_model_for_training(quantized("nf4"))
    assert base.is_loaded_in_4bit and not base.is_loaded_in_8bit
    assert getattr(base, "quantization_method", None) is None
    model = get_peft_model(base, lora())
    trainer = Trainer(
        model=model, args=TrainingArguments(**settings(tmp_path)), train_dataset=Rows()
    )
    before = packed_bytes(model)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0] - 0.1 and same(packed_bytes(model), before)


@pytest.mark.parametrize("name", ["nf4", "int8-outliers"])
def test_prepare_of_peft_leaves_packed_bytes_alone(name, tmp_path):
    """Who calls PEFT's prepare_model_for_kbit_training, as with bitsandbytes, gets the same."""
    base = quantized(name)
    base.is_loaded_in_4bit = True
    before = packed_bytes(base)
    model = get_peft_model(prepare_model_for_kbit_training(base), lora()).train()
    assert same(packed_bytes(model), before)
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 28 and all(g is not None and g.isfinite().all() for g in grads)
    assert same(packed_bytes(model), before)
