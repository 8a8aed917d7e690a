"""``python -m quantal_train`` and ``torchrun -m quantal_train``."""

from .cli import main

if __name__ == "__main__":
    main()
