// The Quanto dialect.
#pragma once

#include "quantal/formats.h"

namespace quantal::quanto {

/// qint2, qint4 and qint8 as optimum-quanto 0.2.7 on the CPU; float8 is read and written back.
extern const Dialect kDialect;

}  // namespace quantal::quanto
