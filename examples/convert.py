"""Converts a model to another dialect: first what would survive, then the conversion.

python examples/convert.py FROM TO [DIALECT]        DIALECT: bnb, hqq, mlx, quanto, gguf or dense
"""

import sys

import quantal

if len(sys.argv) < 3:
    sys.exit(__doc__)
source, target = sys.argv[1:3]
to = sys.argv[3] if len(sys.argv) > 3 else "hqq"
try:
    print(quantal.convert(source, target, to, plan=True).text)
    done = quantal.convert(source, target, to, overwrite=True)
except quantal.QuantalError as error:
    sys.exit(f"convert: {error}")
lost = "nothing was lost" if done.lossless else "see the table for what was lost"
print(f"wrote {target} ({done.layout}), {lost}")
