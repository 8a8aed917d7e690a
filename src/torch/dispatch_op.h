// How C++ finds the ops that it shares with Python.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "torch/ops_link.h"

namespace quantal {

/// The dispatcher's op `name`, of that signature; looked up once by who calls it (`static const`).
template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  link_torch_ops();
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace quantal
