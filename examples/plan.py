"""How much memory a model needs, from the headers of its files alone.

python examples/plan.py MODEL [MEMORY_GB [RANKS]]
"""

import sys

import quantal

if len(sys.argv) < 2:
    sys.exit(__doc__)
try:
    memory_gb = float(sys.argv[2]) if len(sys.argv) > 2 else 24
    ranks = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    print(quantal.plan(sys.argv[1], "cuda", memory_gb, world_size=ranks, mode="qlora").to_text())
except (ValueError, OSError, quantal.QuantalError) as error:
    sys.exit(f"plan: {error}")
