// Stack, memo and opcodes of the pickle reader.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "io/pickle_nodes.h"

namespace quantal::io {

class PickleMachine {
 public:
  explicit PickleMachine(const PickleSource& source) : source_(source) {}
  TorchValue run();

 private:
  using Tag = PickleValue::Tag;
  using Kind = TorchValue::Kind;
  using Values = std::vector<PickleValue>;

  ErrorSite site() const;
  [[noreturn]] void corrupt(const std::string& message) const;
  [[noreturn]] void refuse(const std::string& message) const;

  // --- bytes
  std::span<const std::uint8_t> take(std::uint64_t bytes);
  std::uint64_t little_endian(std::uint64_t bytes);
  std::string_view line();
  std::string_view utf8(std::uint64_t bytes);

  // --- stack
  PickleValue pop();
  Values pop_mark();
  Values pop_many(std::size_t count);
  PickleNode& top_node(const char* opcode, bool dict);
  void push(PickleValue value) { stack_.push_back(value); }
  void push_node(Kind kind, Values items = {});
  void push_text(std::string_view text);

  // --- opcodes
  bool step(std::uint8_t opcode);
  bool step_number(std::uint8_t opcode);
  bool step_container(std::uint8_t opcode);
  bool step_memo(std::uint8_t opcode);
  void set_protocol();
  void push_global();
  void push_long();
  void push_real();
  void memo_get(std::uint64_t index);
  void set_items(const Values& items);
  void call(bool new_object);
  void build();
  void persistent_id();

  // --- what globals mean
  const PickleNode* as_node(PickleValue value, Kind kind) const;
  std::int64_t integer(PickleValue value, const char* what) const;
  std::vector<std::int64_t> integers(PickleValue value, const char* what) const;
  std::string_view text(PickleValue value, const char* what) const;
  void check_count(const TorchGlobal& callee, const Values& args, std::size_t least,
                   std::size_t most) const;
  void make_size(const TorchGlobal& callee, const Values& args);
  void make_device(const TorchGlobal& callee, const Values& args);
  void make_set(const TorchGlobal& callee, const Values& args);
  void make_tensor(const TorchGlobal& callee, const Values& args);
  void make_parameter(const TorchGlobal& callee, const Values& args);
  void check_empty(PickleValue value, bool none_too, const char* what) const;

  const PickleSource& source_;
  std::size_t at_ = 0;      ///< next byte
  std::size_t opcode_ = 0;  ///< where the current opcode stands
  bool stopped_ = false;
  Values stack_;
  std::vector<std::size_t> marks_;
  std::unordered_map<std::uint64_t, PickleValue> memo_;
  PickleTables tables_;
  std::size_t in_sets_ = 0;  ///< items copied into sets
};

}  // namespace quantal::io
