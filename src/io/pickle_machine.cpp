// Opcodes of the pickle reader. Source: the table of opcodes in Python's pickletools, protocol 2.
#include "io/pickle_machine.h"

#include <algorithm>
#include <array>
#include <bit>

#include "io/utf8.h"

namespace quantal::io {
namespace {

constexpr std::size_t kMostShown = 100;

/// A name from a file for a message: printable and short.
std::string shown(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, kMostShown)) out += c >= 0x20 && c < 0x7F ? c : '?';
  return text.size() > kMostShown ? out + "..." : out;
}

/// Opcodes that torch.save does not write or that would run code.
std::string opcode_name(std::uint8_t opcode) {
  struct Named {
    char code;
    std::string_view name;
  };
  constexpr std::array kNames = {Named{'i', "INST"},
                                 Named{'o', "OBJ"},
                                 Named{'\x92', "NEWOBJ_EX"},
                                 Named{'\x93', "STACK_GLOBAL"},
                                 Named{'\x82', "EXT1"},
                                 Named{'\x83', "EXT2"},
                                 Named{'\x84', "EXT4"},
                                 Named{'P', "PERSID"},
                                 Named{'I', "INT"},
                                 Named{'L', "LONG"},
                                 Named{'F', "FLOAT"},
                                 Named{'S', "STRING"},
                                 Named{'V', "UNICODE"},
                                 Named{'T', "BINSTRING"},
                                 Named{'B', "BINBYTES"},
                                 Named{'C', "SHORT_BINBYTES"},
                                 Named{'\x8b', "LONG4"},
                                 Named{'0', "POP"},
                                 Named{'1', "POP_MARK"},
                                 Named{'2', "DUP"},
                                 Named{'d', "DICT"},
                                 Named{'l', "LIST"},
                                 Named{'g', "GET"},
                                 Named{'p', "PUT"},
                                 Named{'\x8c', "SHORT_BINUNICODE"},
                                 Named{'\x8d', "BINUNICODE8"},
                                 Named{'\x8e', "BINBYTES8"},
                                 Named{'\x90', "ADDITEMS"},
                                 Named{'\x91', "FROZENSET"},
                                 Named{'\x94', "MEMOIZE"},
                                 Named{'\x95', "FRAME"},
                                 Named{'\x96', "BYTEARRAY8"},
                                 Named{'\x97', "NEXT_BUFFER"},
                                 Named{'\x98', "READONLY_BUFFER"}};
  for (const Named& known : kNames) {
    if (static_cast<std::uint8_t>(known.code) == opcode) return std::string(known.name);
  }
  constexpr std::string_view kDigits = "0123456789abcdef";
  return std::string("0x") + kDigits[opcode >> 4] + kDigits[opcode & 15];
}

}  // namespace

std::string global_name(const TorchGlobal& global) {
  return std::string(global.module) + "." + std::string(global.name);
}

// ------------------------------------------------------------------ bytes

ErrorSite PickleMachine::site() const {
  return {.path = source_.path, .offset = source_.offset + static_cast<std::int64_t>(opcode_)};
}

void PickleMachine::corrupt(const std::string& message) const {
  fail(Errc::kCorrupt, "torch: pickle: " + message, site());
}

void PickleMachine::refuse(const std::string& message) const {
  fail(Errc::kUnsupported,
       "torch: pickle " + message + ", expected tensors and plain containers only", site());
}

std::span<const std::uint8_t> PickleMachine::take(std::uint64_t bytes) {
  if (bytes > source_.bytes.size() - at_) {
    corrupt("needs " + std::to_string(bytes) + " bytes, expected at most " +
            std::to_string(source_.bytes.size() - at_) + ", the rest of the pickle");
  }
  const auto out = source_.bytes.subspan(at_, static_cast<std::size_t>(bytes));
  at_ += static_cast<std::size_t>(bytes);
  return out;
}

std::uint64_t PickleMachine::little_endian(std::uint64_t bytes) {
  std::uint64_t value = 0;
  unsigned shift = 0;
  for (const std::uint8_t byte : take(bytes)) {
    value |= static_cast<std::uint64_t>(byte) << shift;
    shift += 8;
  }
  return value;
}

std::string_view PickleMachine::line() {
  const auto rest = source_.bytes.subspan(at_);
  const auto end = std::find(rest.begin(), rest.end(), std::uint8_t{'\n'});
  if (end == rest.end()) corrupt("name has no end");
  const auto bytes = take(static_cast<std::uint64_t>(end - rest.begin()));
  take(1);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

std::string_view PickleMachine::utf8(std::uint64_t bytes) {
  const auto found = take(bytes);
  const std::string_view out(reinterpret_cast<const char*>(found.data()), found.size());
  if (!is_utf8(out)) corrupt("string is not valid UTF-8");
  return out;
}

// ------------------------------------------------------------------ stack

PickleValue PickleMachine::pop() {
  if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) corrupt("stack is empty");
  const PickleValue out = stack_.back();
  stack_.pop_back();
  return out;
}

PickleMachine::Values PickleMachine::pop_mark() {
  if (marks_.empty()) corrupt("no mark is on the stack");
  const auto begin = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
  Values out(begin, stack_.end());
  stack_.erase(begin, stack_.end());
  marks_.pop_back();
  return out;
}

PickleMachine::Values PickleMachine::pop_many(std::size_t count) {
  Values out(count);
  for (std::size_t i = count; i-- > 0;) out[i] = pop();
  return out;
}

/// The list or dict on top of the stack.
PickleNode& PickleMachine::top_node(const char* opcode, bool dict) {
  if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) corrupt("stack is empty");
  const PickleValue top = stack_.back();
  if (top.tag == Tag::kNode) {
    PickleNode& node = tables_.nodes[top.index];
    const bool is_dict = node.kind == Kind::kDict || node.kind == Kind::kOrderedDict;
    if (dict ? is_dict : node.kind == Kind::kList) return node;
  }
  refuse(std::string("applies ") + opcode + " to " + describe(tables_, top));
}

void PickleMachine::push_node(Kind kind, Values items) {
  // Python spends two bytes and more on a container; a file of bare brackets is made to take
  // memory.
  constexpr std::size_t kAlwaysFine = 65536;
  if (tables_.nodes.size() > std::max(kAlwaysFine, source_.bytes.size() / 2)) {
    corrupt("has more containers than a file of its size can need");
  }
  push(PickleValue::at(Tag::kNode, tables_.nodes.size()));
  tables_.nodes.push_back({.kind = kind, .items = std::move(items)});
}

void PickleMachine::push_text(std::string_view text) {
  push(PickleValue::at(Tag::kText, tables_.texts.size()));
  tables_.texts.push_back(text);
}

// ------------------------------------------------------------------ opcodes

TorchValue PickleMachine::run() {
  while (!stopped_) {
    opcode_ = at_;
    const std::uint8_t opcode = take(1)[0];
    if (!step(opcode) && !step_number(opcode) && !step_container(opcode) && !step_memo(opcode)) {
      refuse("has opcode " + opcode_name(opcode) + ", which is not read");
    }
  }
  if (at_ != source_.bytes.size()) corrupt("bytes follow the end");
  if (stack_.size() != 1 || !marks_.empty()) {
    corrupt("leaves " + std::to_string(stack_.size()) + " values, expected 1");
  }
  return resolve_pickle(tables_, stack_.front(), site());
}

bool PickleMachine::step(std::uint8_t opcode) {
  switch (opcode) {
    case 0x80:  // PROTO
      set_protocol();
      return true;
    case 'c':  // GLOBAL
      push_global();
      return true;
    case 'Q':  // BINPERSID
      persistent_id();
      return true;
    case 'R':  // REDUCE
      call(false);
      return true;
    case 0x81:  // NEWOBJ
      call(true);
      return true;
    case 'b':  // BUILD
      build();
      return true;
    case '.':  // STOP
      stopped_ = true;
      return true;
    default:
      return false;
  }
}

bool PickleMachine::step_number(std::uint8_t opcode) {
  switch (opcode) {
    case 'N':  // NONE
      push({});
      return true;
    case 0x88:  // NEWTRUE
      push(PickleValue::boolean(true));
      return true;
    case 0x89:  // NEWFALSE
      push(PickleValue::boolean(false));
      return true;
    case 'J':  // BININT, signed
      push(PickleValue::of_integer(
          std::bit_cast<std::int32_t>(static_cast<std::uint32_t>(little_endian(4)))));
      return true;
    case 'K':  // BININT1
      push(PickleValue::of_integer(static_cast<std::int64_t>(little_endian(1))));
      return true;
    case 'M':  // BININT2
      push(PickleValue::of_integer(static_cast<std::int64_t>(little_endian(2))));
      return true;
    case 0x8a:  // LONG1
      push_long();
      return true;
    case 'G':  // BINFLOAT
      push_real();
      return true;
    default:
      return false;
  }
}

bool PickleMachine::step_container(std::uint8_t opcode) {
  switch (opcode) {
    case 'X':  // BINUNICODE
      push_text(utf8(little_endian(4)));
      return true;
    case 'U':  // SHORT_BINSTRING, a Python 2 string
      push_text(utf8(little_endian(1)));
      return true;
    case '(':  // MARK
      marks_.push_back(stack_.size());
      return true;
    case '}':  // EMPTY_DICT
      push_node(Kind::kDict);
      return true;
    case ']':  // EMPTY_LIST
      push_node(Kind::kList);
      return true;
    case ')':  // EMPTY_TUPLE
      push_node(Kind::kTuple);
      return true;
    case 0x8f:  // EMPTY_SET
      push_node(Kind::kSet);
      return true;
    case 't':  // TUPLE
      push_node(Kind::kTuple, pop_mark());
      return true;
    case 0x85:  // TUPLE1
    case 0x86:  // TUPLE2
    case 0x87:  // TUPLE3
      push_node(Kind::kTuple, pop_many(opcode - 0x84u));
      return true;
    case 'a':    // APPEND
    case 'e': {  // APPENDS
      const Values items = opcode == 'a' ? pop_many(1) : pop_mark();
      auto& list = top_node("APPENDS", false).items;
      list.insert(list.end(), items.begin(), items.end());
      return true;
    }
    case 's':  // SETITEM
      set_items(pop_many(2));
      return true;
    case 'u':  // SETITEMS
      set_items(pop_mark());
      return true;
    default:
      return false;
  }
}

bool PickleMachine::step_memo(std::uint8_t opcode) {
  switch (opcode) {
    case 'q':    // BINPUT
    case 'r': {  // LONG_BINPUT
      const std::uint64_t index = little_endian(opcode == 'q' ? 1 : 4);
      if (stack_.empty()) corrupt("stack is empty");
      memo_[index] = stack_.back();
      return true;
    }
    case 'h':  // BINGET
      memo_get(little_endian(1));
      return true;
    case 'j':  // LONG_BINGET
      memo_get(little_endian(4));
      return true;
    default:
      return false;
  }
}

void PickleMachine::set_protocol() {
  const std::uint64_t protocol = little_endian(1);
  if (protocol != 2) refuse("has protocol " + std::to_string(protocol) + " (only 2 is read)");
}

void PickleMachine::push_global() {
  const std::string_view module = line();
  const std::string_view name = line();
  for (std::size_t i = 0; i < kTorchGlobals.size(); ++i) {
    if (kTorchGlobals[i].module == module && kTorchGlobals[i].name == name) {
      push(PickleValue::at(Tag::kGlobal, i));
      return;
    }
  }
  refuse("asks for the global " + shown(module) + "." + shown(name) + ", which is not run");
}

/// Two's complement of 0 to 255 bytes; values beyond 64 bits are refused.
void PickleMachine::push_long() {
  const std::uint64_t bytes = little_endian(1);
  if (bytes > 8) refuse("has an integer of " + std::to_string(bytes) + " bytes (64 bits are read)");
  std::uint64_t value = little_endian(bytes);
  if (bytes > 0 && bytes < 8 && (value >> (8 * bytes - 1)) != 0) {
    value |= ~std::uint64_t{0} << (8 * bytes);
  }
  push(PickleValue::of_integer(std::bit_cast<std::int64_t>(value)));
}

/// Eight bytes, the most significant first.
void PickleMachine::push_real() {
  std::uint64_t bits = 0;
  for (const std::uint8_t byte : take(8)) bits = bits << 8 | byte;
  push(PickleValue::of_real(std::bit_cast<double>(bits)));
}

void PickleMachine::memo_get(std::uint64_t index) {
  const auto found = memo_.find(index);
  if (found == memo_.end()) corrupt("memo " + std::to_string(index) + " was never set");
  push(found->second);
}

void PickleMachine::set_items(const Values& items) {
  if (items.size() % 2 != 0) corrupt("a dict key has no value");
  auto& into = top_node("SETITEMS", true).items;
  into.insert(into.end(), items.begin(), items.end());
}

}  // namespace quantal::io
