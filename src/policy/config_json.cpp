#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "policy/methods.h"
#include "policy/text.h"

namespace quantal {
namespace {

using Json = nlohmann::ordered_json;  // layer_configs keep the order in which they were given

constexpr std::array<std::string_view, 15> kMembers = {
    "method",          "bits",         "bits_set",   "group_size",   "compute_dtype",
    "storage_dtype",   "double_quant", "quant_type", "skip_modules", "layer_configs",
    "backend_options", "block_size",   "quant_zero", "quant_scale",  "double_quant_set"};
constexpr std::array<std::string_view, 8> kLayerMembers = {
    "method",       "bits",       "group_size", "compute_dtype",
    "double_quant", "quant_type", "skip",       "skip_reason"};

std::string dump(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

[[noreturn]] void bad_member(const std::string& where, const Json& value, const char* expected) {
  fail(Errc::kConfig, where + " is " + dump(value).substr(0, 80) + ", expected " + expected);
}

void check_members(const std::string& where, const Json& object,
                   std::span<const std::string_view> known) {
  if (!object.is_object()) bad_member(where, object, "an object");
  for (const auto& [key, value] : object.items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    fail(Errc::kConfig, where + ": '" + key + "' is not known, did you mean '" +
                            std::string(policy::nearest_name(key, known)) +
                            "'? Known: " + policy::join(known));
  }
}

std::int64_t read_int(const std::string& where, const Json& value) {
  if (!value.is_number_integer() ||
      (value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX)) {
    bad_member(where, value, "an integer");
  }
  return value.get<std::int64_t>();
}

[[noreturn]] void bad_bits(const std::string& bits) {
  fail(Errc::kConfig, "Unsupported bit width: " + bits + ". Supported: 2, 4, 8, 16");
}

int read_bits(const std::string& where, const Json& value) {
  constexpr double kBeyondJson = 9.2e18;  // integers that the parser could only keep as a double
  if (value.is_number_float() && std::abs(value.get<double>()) > kBeyondJson) bad_bits(dump(value));
  const std::int64_t bits = read_int(where, value);
  if (bits != static_cast<int>(bits)) bad_bits(std::to_string(bits));
  return static_cast<int>(bits);
}

bool read_bool(const std::string& where, const Json& value) {
  if (!value.is_boolean()) bad_member(where, value, "true or false");
  return value.get<bool>();
}

std::string read_string(const std::string& where, const Json& value) {
  if (!value.is_string()) bad_member(where, value, "a string");
  return value.get<std::string>();
}

DType read_dtype(const std::string& where, const Json& value) {
  try {
    return parse_dtype(read_string(where, value));
  } catch (const Error& error) {
    fail(Errc::kConfig, where + ": " + error.what());
  }
}

LayerOverride read_override(const std::string& where, const Json& value) {
  LayerOverride layer;
  if (value.is_null()) {
    layer.skip = true;
    return layer;
  }
  check_members(where, value, kLayerMembers);
  for (const auto& [key, member] : value.items()) {
    if (member.is_null()) continue;
    const std::string at = where + "." + key;
    if (key == "method") layer.method = parse_method(read_string(at, member));
    if (key == "bits") layer.bits = read_bits(at, member);
    if (key == "group_size") layer.group_size = read_int(at, member);
    if (key == "compute_dtype") layer.compute_dtype = read_dtype(at, member);
    if (key == "double_quant") layer.double_quant = read_bool(at, member);
    if (key == "quant_type") layer.quant_type = read_string(at, member);
    if (key == "skip") layer.skip = read_bool(at, member);
    if (key == "skip_reason") layer.skip_reason = read_string(at, member);
  }
  return layer;
}

void read_collections(const Json& object, QuantizationConfig& config) {
  if (object.contains("skip_modules") && !object.at("skip_modules").is_null()) {
    const Json& list = object.at("skip_modules");
    if (!list.is_array()) bad_member("config.skip_modules", list, "a list of strings");
    config.skip_modules.clear();
    for (const Json& item : list) {
      config.skip_modules.push_back(read_string("config.skip_modules", item));
    }
  }
  if (object.contains("layer_configs") && !object.at("layer_configs").is_null()) {
    const Json& layers = object.at("layer_configs");
    if (!layers.is_object()) bad_member("config.layer_configs", layers, "an object");
    for (const auto& [pattern, settings] : layers.items()) {
      config.layer_configs.emplace_back(
          pattern, read_override("config.layer_configs['" + pattern + "']", settings));
    }
  }
  if (object.contains("backend_options") && !object.at("backend_options").is_null()) {
    const Json& options = object.at("backend_options");
    if (!options.is_object()) bad_member("config.backend_options", options, "an object");
    for (const auto& [key, value] : options.items()) {
      config.backend_options[key] = value.is_string() ? value.get<std::string>() : dump(value);
    }
  }
}

/// Whether the user gave a member: it is there, and "<member>_set" does not deny it.
bool was_given(const Json& object, const std::string& member) {
  const bool there = object.contains(member) && !object.at(member).is_null();
  const std::string flag = member + "_set";
  if (!object.contains(flag) || object.at(flag).is_null()) return there;
  return read_bool("config." + flag, object.at(flag)) && there;
}

/// A built-in method, or a registered one.
void read_method(const std::string& name, QuantizationConfig& config) {
  const bool custom = is_custom_method(name);
  config.method = custom ? QuantizationMethod::NONE : parse_method(name);
  if (custom) config.custom_method = name;
}

/// Scalars with null as "keep the default".
void read_scalars(const Json& object, QuantizationConfig& config) {
  for (const auto& [key, value] : object.items()) {
    if (key == "group_size" && value.is_null()) config.group_size = 0;
    if (value.is_null()) continue;
    const std::string at = "config." + key;
    if (key == "method") read_method(read_string(at, value), config);
    if (key == "bits") config.bits = read_bits(at, value);
    if (key == "group_size") config.group_size = read_int(at, value);
    if (key == "compute_dtype") config.compute_dtype = read_dtype(at, value);
    if (key == "storage_dtype") config.storage_dtype = read_dtype(at, value);
    if (key == "double_quant") config.double_quant = read_bool(at, value);
    if (key == "quant_type") config.quant_type = read_string(at, value);
    if (key == "block_size") config.block_size = read_int(at, value);
    if (key == "quant_zero") config.quant_zero = read_bool(at, value);
    if (key == "quant_scale") config.quant_scale = read_bool(at, value);
  }
  config.bits_set = was_given(object, "bits");
  config.double_quant_set = was_given(object, "double_quant");
}

Json override_json(const LayerOverride& layer) {
  Json object = Json::object();
  if (layer.method) object["method"] = method_name(*layer.method);
  if (layer.bits) object["bits"] = *layer.bits;
  if (layer.group_size) object["group_size"] = *layer.group_size;
  if (layer.compute_dtype) object["compute_dtype"] = dtype_torch_name(*layer.compute_dtype);
  if (layer.double_quant) object["double_quant"] = *layer.double_quant;
  if (layer.quant_type) object["quant_type"] = *layer.quant_type;
  if (layer.skip) object["skip"] = true;
  if (!layer.skip_reason.empty()) object["skip_reason"] = layer.skip_reason;
  return object;
}

Json dtype_json(const std::optional<DType>& dtype) {
  return dtype ? Json(dtype_torch_name(*dtype)) : Json(nullptr);
}

}  // namespace

void check_config(const QuantizationConfig& config) {
  static constexpr std::array<int, 4> kAlways = {2, 4, 8, 16};
  const bool custom = !config.custom_method.empty() && config.bits >= 1 && config.bits <= 16;
  if (!custom && !policy::has_width(kAlways, config.bits) &&
      !policy::has_width(policy::upstream_bits(config.method), config.bits)) {
    bad_bits(std::to_string(config.bits));
  }
  if (config.group_size < 0) {
    fail(Errc::kConfig,
         "config: group_size is " + std::to_string(config.group_size) + ", expected >= 0");
  }
  if (config.block_size && *config.block_size <= 0) {
    fail(Errc::kConfig,
         "config: block_size is " + std::to_string(*config.block_size) + ", expected >= 1");
  }
}

QuantizationConfig config_from_json(const std::string& json) {
  // Settings are a few levels deep; the limit keeps recursion over hostile text bounded.
  constexpr int kMaxDepth = 16;
  bool too_deep = false;
  const auto keep = [&too_deep](int depth, Json::parse_event_t /*event*/, Json& /*value*/) {
    too_deep = too_deep || depth > kMaxDepth;
    return depth <= kMaxDepth;
  };
  const Json object = Json::parse(json, keep, /*allow_exceptions=*/false);
  if (too_deep) {
    fail(Errc::kConfig, "config: nesting is deeper than " + std::to_string(kMaxDepth) + " levels");
  }
  if (object.is_discarded()) fail(Errc::kConfig, "config: text is not JSON, expected an object");
  check_members("config", object, kMembers);
  QuantizationConfig config;
  read_scalars(object, config);
  read_collections(object, config);
  check_config(config);
  return config;
}

std::string config_to_json(const QuantizationConfig& config) {
  Json object = Json::object();
  object["method"] =
      config.custom_method.empty() ? method_name(config.method) : config.custom_method;
  object["bits"] = config.bits;
  object["bits_set"] = policy::bits_given(config);
  object["group_size"] = config.group_size;
  object["compute_dtype"] = dtype_json(config.compute_dtype);
  object["storage_dtype"] = dtype_json(config.storage_dtype);
  object["double_quant"] = config.double_quant;
  object["double_quant_set"] = config.double_quant_set || !config.double_quant;
  object["quant_type"] = config.quant_type;
  object["skip_modules"] = config.skip_modules;
  object["layer_configs"] = Json::object();
  for (const auto& [pattern, layer] : config.layer_configs) {
    object["layer_configs"][pattern] = override_json(layer);
  }
  object["backend_options"] = config.backend_options;
  object["block_size"] = config.block_size ? Json(*config.block_size) : Json(nullptr);
  object["quant_zero"] = config.quant_zero ? Json(*config.quant_zero) : Json(nullptr);
  object["quant_scale"] = config.quant_scale;
  return dump(object);
}

}  // namespace quantal
