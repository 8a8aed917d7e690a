"""Fine-tunes a quantized model with FSDP. docs/training.md is the guide.

torchrun --nproc_per_node 2 train.py --model DIR --data FILE --quantize hqq --q_bits 4
"""

from quantal_train import program

if __name__ == "__main__":
    program()
