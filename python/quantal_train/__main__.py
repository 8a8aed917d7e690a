"""``python -m quantal_train`` and ``torchrun -m quantal_train``."""

from . import program

if __name__ == "__main__":
    program()
