// What the globals of a torch pickle mean: tensors, sizes, devices, sets.
#include <limits>

#include "io/pickle_machine.h"

namespace quantal::io {
namespace {

// A memoized argument can be used again for two bytes each time: what a call copies is short.
constexpr std::size_t kMostName = 256;
constexpr std::size_t kMostArguments = 8;

}  // namespace

// ------------------------------------------------------------------ arguments

const PickleNode* PickleMachine::as_node(PickleValue value, Kind kind) const {
  if (value.tag != Tag::kNode) return nullptr;
  const PickleNode& node = tables_.nodes[value.index];
  return node.kind == kind ? &node : nullptr;
}

std::int64_t PickleMachine::integer(PickleValue value, const char* what) const {
  if (value.tag != Tag::kInt || value.integer < 0) {
    corrupt(std::string(what) + " is " + describe(tables_, value) + ", expected an int >= 0");
  }
  return value.integer;
}

std::vector<std::int64_t> PickleMachine::integers(PickleValue value, const char* what) const {
  const PickleNode* node = as_node(value, Kind::kTuple);
  if (node == nullptr) node = as_node(value, Kind::kSize);
  if (node == nullptr) {
    corrupt(std::string(what) + " is " + describe(tables_, value) + ", expected a tuple of ints");
  }
  if (node->items.size() > kMostTorchDims) {
    corrupt(std::string(what) + " has " + std::to_string(node->items.size()) +
            " dimensions, expected at most " + std::to_string(kMostTorchDims));
  }
  std::vector<std::int64_t> out;
  out.reserve(node->items.size());
  for (const PickleValue item : node->items) out.push_back(integer(item, what));
  return out;
}

std::string_view PickleMachine::text(PickleValue value, const char* what) const {
  if (value.tag != Tag::kText) {
    corrupt(std::string(what) + " is " + describe(tables_, value) + ", expected a string");
  }
  const std::string_view found = tables_.texts[value.index];
  if (found.size() > kMostName) {
    corrupt(std::string(what) + " is " + std::to_string(found.size()) +
            " bytes long, expected at most " + std::to_string(kMostName));
  }
  return found;
}

void PickleMachine::check_count(const TorchGlobal& callee, const Values& args, std::size_t least,
                                std::size_t most) const {
  if (args.size() >= least && args.size() <= most) return;
  corrupt(global_name(callee) + " has " + std::to_string(args.size()) + " arguments, expected " +
          std::to_string(least) + " to " + std::to_string(most));
}

// ------------------------------------------------------------------ calls

void PickleMachine::call(bool new_object) {
  const PickleValue tuple = pop();
  const PickleValue callee = pop();
  const PickleNode* arguments = as_node(tuple, Kind::kTuple);
  if (arguments == nullptr) {
    corrupt("arguments of a call are " + describe(tables_, tuple) + ", expected a tuple");
  }
  if (callee.tag != Tag::kGlobal) refuse("calls " + describe(tables_, callee));
  const TorchGlobal& global = kTorchGlobals[callee.index];
  if (arguments->items.size() > kMostArguments) {
    corrupt(global_name(global) + " has " + std::to_string(arguments->items.size()) +
            " arguments, expected at most " + std::to_string(kMostArguments));
  }
  const Values args = arguments->items;
  const TorchSymbol symbol = global.symbol;
  if (symbol == TorchSymbol::kSize) return make_size(global, args);
  if (symbol == TorchSymbol::kOrderedDict) {
    check_count(global, args, 0, 0);
    return push_node(Kind::kOrderedDict);
  }
  if (!new_object) {
    if (symbol == TorchSymbol::kRebuildTensorV2 || symbol == TorchSymbol::kRebuildTensorV3) {
      return make_tensor(global, args);
    }
    if (symbol == TorchSymbol::kRebuildParameter) return make_parameter(global, args);
    if (symbol == TorchSymbol::kDevice) return make_device(global, args);
    if (symbol == TorchSymbol::kSet) return make_set(global, args);
  }
  refuse("calls " + global_name(global) + (new_object ? " by NEWOBJ" : ""));
}

void PickleMachine::make_size(const TorchGlobal& callee, const Values& args) {
  check_count(callee, args, 1, 1);
  integers(args[0], "torch.Size");
  push_node(Kind::kSize, tables_.nodes[args[0].index].items);
}

void PickleMachine::make_device(const TorchGlobal& callee, const Values& args) {
  check_count(callee, args, 1, 2);
  text(args[0], "device");
  if (args.size() == 2) integer(args[1], "device index");
  push_node(Kind::kDevice, args);
}

void PickleMachine::make_set(const TorchGlobal& callee, const Values& args) {
  check_count(callee, args, 1, 1);
  const PickleNode* list = as_node(args[0], Kind::kList);
  if (list == nullptr)
    corrupt("set is made of " + describe(tables_, args[0]) + ", expected a list");
  in_sets_ += list->items.size();
  if (in_sets_ > source_.bytes.size()) corrupt("the same list makes many sets");
  Values items = list->items;
  push_node(Kind::kSet, std::move(items));
}

/// Hooks and metadata carry code or meaning that is not read; torch.save writes them empty.
void PickleMachine::check_empty(PickleValue value, bool none_too, const char* what) const {
  if (none_too && value.tag == Tag::kNone) return;
  const PickleNode* node = as_node(value, Kind::kOrderedDict);
  if (node == nullptr) node = as_node(value, Kind::kDict);
  if (node == nullptr || !node->items.empty()) {
    refuse(std::string("has a tensor whose ") + what + " is " +
           (node == nullptr ? describe(tables_, value) : std::string("not empty")));
  }
}

// _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])
// _rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype[, metadata])
void PickleMachine::make_tensor(const TorchGlobal& callee, const Values& args) {
  const bool v3 = callee.symbol == TorchSymbol::kRebuildTensorV3;
  const std::size_t least = v3 ? 7 : 6;
  check_count(callee, args, least, least + 1);
  if (args[0].tag != Tag::kStorage) {
    corrupt("storage of a tensor is " + describe(tables_, args[0]) + ", expected a storage");
  }
  const PickleStorage& storage = tables_.storages[args[0].index];
  TorchTensor tensor;
  tensor.storage = std::string(storage.key);
  tensor.offset = integer(args[1], "offset of a tensor");
  tensor.shape = integers(args[2], "size of a tensor");
  tensor.strides = integers(args[3], "stride of a tensor");
  if (args[4].tag != Tag::kBool) corrupt("requires_grad is not a bool");
  tensor.requires_grad = args[4].integer != 0;
  check_empty(args[5], false, "list of hooks");
  if (args.size() > least) check_empty(args[least], true, "metadata");
  if (storage.untyped != v3) {
    corrupt(global_name(callee) + (v3 ? " has a typed storage, expected an untyped one"
                                      : " has an untyped storage, expected a typed one"));
  }
  tensor.dtype = storage.dtype;
  if (v3) {
    if (args[6].tag != Tag::kGlobal || kTorchGlobals[args[6].index].symbol != TorchSymbol::kDtype) {
      corrupt("dtype of a tensor is " + describe(tables_, args[6]) + ", expected a dtype");
    }
    tensor.dtype = kTorchGlobals[args[6].index].dtype;
  }
  source_.check_tensor(tensor, storage.bytes);
  push_node(Kind::kTensor);
  tables_.nodes.back().tensor = tables_.tensors.size();
  tables_.tensors.push_back(std::move(tensor));
}

// _rebuild_parameter(tensor, requires_grad, hooks)
void PickleMachine::make_parameter(const TorchGlobal& callee, const Values& args) {
  check_count(callee, args, 3, 3);
  const PickleNode* node = as_node(args[0], Kind::kTensor);
  if (node == nullptr) {
    corrupt("parameter is made of " + describe(tables_, args[0]) + ", expected a tensor");
  }
  if (args[1].tag != Tag::kBool) corrupt("requires_grad is not a bool");
  check_empty(args[2], false, "list of hooks");
  TorchTensor tensor = tables_.tensors[node->tensor];
  tensor.parameter = true;
  tensor.requires_grad = args[1].integer != 0;
  push_node(Kind::kTensor);
  tables_.nodes.back().tensor = tables_.tensors.size();
  tables_.tensors.push_back(std::move(tensor));
}

/// Attributes of an OrderedDict (a state dict's _metadata) are read and dropped.
void PickleMachine::build() {
  const PickleValue state = pop();
  if (stack_.empty()) corrupt("stack is empty");
  if (as_node(stack_.back(), Kind::kOrderedDict) == nullptr) {
    refuse("sets attributes of " + describe(tables_, stack_.back()));
  }
  if (as_node(state, Kind::kDict) == nullptr) {
    refuse("sets attributes from " + describe(tables_, state));
  }
}

/// ("storage", storage class, key, location, number of elements)
void PickleMachine::persistent_id() {
  const PickleValue id = pop();
  const PickleNode* tuple = as_node(id, Kind::kTuple);
  if (tuple == nullptr || tuple->items.size() != 5 || tuple->items[0].tag != Tag::kText ||
      tables_.texts[tuple->items[0].index] != "storage") {
    refuse("has a persistent id that is " + describe(tables_, id) + " and no storage");
  }
  const PickleValue type = tuple->items[1];
  const TorchGlobal* global = type.tag == Tag::kGlobal ? &kTorchGlobals[type.index] : nullptr;
  PickleStorage storage;
  if (global != nullptr && global->symbol == TorchSymbol::kUntypedStorage) {
    storage.untyped = true;
  } else if (global == nullptr || global->symbol != TorchSymbol::kStorage) {
    refuse("has a storage whose class is " + describe(tables_, type));
  }
  storage.dtype = global->dtype;
  storage.key = text(tuple->items[2], "key of a storage");
  text(tuple->items[3], "location of a storage");
  const std::int64_t numel = integer(tuple->items[4], "size of a storage");
  const auto itemsize = static_cast<std::int64_t>(dtype_size(storage.dtype));
  if (numel > std::numeric_limits<std::int64_t>::max() / itemsize) {
    corrupt("size of a storage is " + std::to_string(numel) + " elements, which overflows");
  }
  storage.bytes = numel * itemsize;
  push(PickleValue::at(Tag::kStorage, tables_.storages.size()));
  tables_.storages.push_back(storage);
}

}  // namespace quantal::io
