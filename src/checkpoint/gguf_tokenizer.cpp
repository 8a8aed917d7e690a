// Tokenizers of the Hugging Face world as tokenizer.* pairs of a GGUF file.
#include <algorithm>
#include <array>
#include <charconv>
#include <map>

#include "checkpoint/gguf.h"
#include "core/json_text.h"

namespace quantal::checkpoint {
namespace {

using Json = nlohmann::json;  // sorted: vocabularies have 100,000 keys and more

constexpr const char* kTokenizer = "tokenizer.json";
constexpr const char* kSettings = "tokenizer_config.json";
constexpr const char* kTemplate = "chat_template.jinja";

/// Values of tokenizer.ggml.token_type.
enum TokenType : std::int64_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUser = 4,
  kUnused = 5,
  kByte = 6
};

[[noreturn]] void refuse(Errc code, const std::string& key, const std::string& what) {
  fail(code, "gguf: tokenizer " + what, {.path = kTokenizer, .tensor = key});
}

/// object[key], or null.
const Json& member(const Json& object, const char* key) {
  static const Json kNull;
  if (!object.is_object()) return kNull;
  const auto found = object.find(key);
  return found == object.end() ? kNull : *found;
}

std::string text_or(const Json& value, const std::string& fallback) {
  return value.is_string() ? value.get<std::string>() : fallback;
}

GgufPair pair_text(const std::string& key, const std::string& value) {
  return {key, GgufType::kString, value};
}
GgufPair pair_bool(const std::string& key, bool value) { return {key, GgufType::kBool, value}; }
GgufPair pair_array(const std::string& key, GgufType type, std::vector<GgufValue> values) {
  auto array = std::make_shared<GgufArray>();
  array->element_type = static_cast<std::uint32_t>(type);
  array->values = std::move(values);
  return {key, GgufType::kArray, std::move(array)};
}

/// Tokens by id.
struct Vocabulary {
  std::vector<std::string> tokens;
  std::vector<std::int64_t> types;
  std::map<std::string, std::int64_t> ids;
};

void put_token(Vocabulary& v, const std::string& token, const Json& id, std::int64_t type) {
  if (!id.is_number_integer() || id.get<std::int64_t>() < 0 ||
      id.get<std::int64_t>() >= std::ssize(v.tokens)) {
    refuse(Errc::kCorrupt, "vocab",
           "id of a token is " + id.dump() + ", expected below " + std::to_string(v.tokens.size()) +
               ", the rows of the embedding");
  }
  const auto at = static_cast<std::size_t>(id.get<std::int64_t>());
  v.tokens[at] = token;
  v.types[at] = type;
  v.ids[token] = static_cast<std::int64_t>(at);
}

bool is_byte_token(const std::string& token) {
  return token.size() == 6 && token.starts_with("<0x") && token.back() == '>';
}

Vocabulary read_vocabulary(const Json& tokenizer, std::int64_t size, bool byte_fallback) {
  Vocabulary v;
  v.tokens.resize(static_cast<std::size_t>(size));
  v.types.assign(static_cast<std::size_t>(size), kUnused);
  for (std::size_t i = 0; i < v.tokens.size(); ++i) v.tokens[i] = "[PAD" + std::to_string(i) + "]";
  const Json& model = member(tokenizer, "model");
  const Json& vocab = member(model, "vocab");
  if (!vocab.is_object()) refuse(Errc::kUnsupported, "model.vocab", "has no vocabulary by token");
  const std::string unknown = text_or(member(model, "unk_token"), "");
  for (const auto& [token, id] : vocab.items()) {
    const bool byte = byte_fallback && is_byte_token(token);
    put_token(v, token, id, byte ? kByte : kNormal);
  }
  for (const Json& added : member(tokenizer, "added_tokens")) {
    const Json& special = member(added, "special");
    const bool control = special.is_boolean() && special.get<bool>();
    put_token(v, text_or(member(added, "content"), ""), member(added, "id"),
              control ? kControl : kUser);
  }
  if (const auto found = v.ids.find(unknown); byte_fallback && found != v.ids.end()) {
    v.types[static_cast<std::size_t>(found->second)] = kUnknown;
  }
  return v;
}

/// Merges as pairs of strings, from either spelling.
std::vector<std::pair<std::string, std::string>> read_merges(const Json& tokenizer) {
  const Json& merges = member(member(tokenizer, "model"), "merges");
  if (!merges.is_array()) refuse(Errc::kUnsupported, "model.merges", "has no list of merges");
  std::vector<std::pair<std::string, std::string>> out;
  for (const Json& merge : merges) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      out.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      continue;
    }
    const std::string text = text_or(merge, "");
    const std::size_t space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) {
      refuse(Errc::kCorrupt, "model.merges",
             "merge is " + merge.dump(-1, ' ', false, Json::error_handler_t::replace) +
                 ", expected two tokens");
    }
    out.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
  return out;
}

/// The steps of a pre-tokenizer, a sequence or a single one.
std::vector<Json> steps_of(const Json& part, const char* list) {
  if (part.is_null()) return {};
  if (text_or(member(part, "type"), "") != "Sequence") return {part};
  const Json& steps = member(part, list);
  return {steps.begin(), steps.end()};
}

/// The pre-tokenizers that llama.cpp knows by name, as the steps of tokenizer.json.
struct KnownPre {
  std::string_view name;
  bool digits;             ///< a step that cuts off every digit
  bool byte_level_regex;   ///< ByteLevel splits with GPT-2's expression
  std::string_view split;  ///< expression of a Split step, or ""
};

constexpr std::string_view kLlama3Split =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
constexpr std::string_view kQwen2Split =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

constexpr std::array<KnownPre, 4> kKnown = {{
    {"gpt-2", false, true, ""},
    {"smollm", true, true, ""},
    {"llama-bpe", false, false, kLlama3Split},
    {"qwen2", false, false, kQwen2Split},
}};

std::string pre_tokenizer_name(const Json& tokenizer) {
  bool digits = false, regex = false, other = false;
  std::string split;
  for (const Json& step : steps_of(member(tokenizer, "pre_tokenizer"), "pretokenizers")) {
    const std::string type = text_or(member(step, "type"), "");
    if (type == "Digits") {
      digits = member(step, "individual_digits") == Json(true);
      other = other || !digits;
    } else if (type == "Split") {
      split = text_or(member(member(step, "pattern"), "Regex"), "?");
    } else if (type == "ByteLevel") {
      regex = member(step, "use_regex") != Json(false);
      other = other || member(step, "add_prefix_space") == Json(true);
    } else {
      other = true;
    }
  }
  for (const KnownPre& known : kKnown) {
    if (!other && known.digits == digits && known.byte_level_regex == regex &&
        known.split == split) {
      return std::string(known.name);
    }
  }
  refuse(Errc::kUnsupported, "pre_tokenizer",
         "splits text in a way that has no name in GGUF, expected that of gpt-2, smollm, llama-bpe "
         "or qwen2 (or a tokenizer.gguf beside it)");
}

bool is_byte_level(const Json& tokenizer) {
  for (const Json& step : steps_of(member(tokenizer, "pre_tokenizer"), "pretokenizers")) {
    if (text_or(member(step, "type"), "") == "ByteLevel") return true;
  }
  return false;
}

/// True where text gets a space in front before it is split (SentencePiece).
bool adds_space_prefix(const Json& tokenizer) {
  for (const Json& step : steps_of(member(tokenizer, "normalizer"), "normalizers")) {
    if (text_or(member(step, "type"), "") == "Prepend") return true;
  }
  for (const Json& step : steps_of(member(tokenizer, "pre_tokenizer"), "pretokenizers")) {
    if (text_or(member(step, "type"), "") != "Metaspace") continue;
    const std::string scheme = text_or(member(step, "prepend_scheme"), "always");
    return scheme != "never" && member(step, "add_prefix_space") != Json(false);
  }
  return false;
}

/// SentencePiece joins the pair whose piece has the highest score, tokenizer.json the pair that
/// stands first: the negated place of the first merge that makes a piece gives the same order.
/// Pieces that no merge makes come last.
std::vector<GgufValue> merge_scores(
    const Vocabulary& v, const std::vector<std::pair<std::string, std::string>>& merges) {
  constexpr double kNever = -1e6;
  std::vector<GgufValue> scores(v.tokens.size(), GgufValue(0.0));
  for (std::size_t i = 0; i < scores.size(); ++i) {
    if (v.types[i] == kNormal) scores[i] = kNever;
  }
  for (std::size_t m = merges.size(); m-- > 0;) {
    const auto found = v.ids.find(merges[m].first + merges[m].second);
    if (found == v.ids.end()) continue;
    scores[static_cast<std::size_t>(found->second)] = -static_cast<double>(m);
  }
  return scores;
}

/// Id of a token named in tokenizer_config.json as text or as {"content": text}; else the id of
/// config.json, of a list the first.
std::int64_t token_id(const Vocabulary& v, const Json& settings, const Json& config,
                      const std::string& name) {
  const Json& named = member(settings, name.c_str());
  const std::string text = text_or(named, text_or(member(named, "content"), ""));
  if (const auto found = v.ids.find(text); !text.empty() && found != v.ids.end()) {
    return found->second;
  }
  const Json& value = member(config, (name + "_id").c_str());
  const Json& id = value.is_array() && !value.empty() ? value[0] : value;
  return id.is_number_integer() ? id.get<std::int64_t>() : -1;
}

/// True if the template of single texts begins (or ends) with a special token.
bool template_adds(const Json& tokenizer, bool at_begin) {
  for (const Json& step : steps_of(member(tokenizer, "post_processor"), "processors")) {
    const Json& single = member(step, "single");
    if (!single.is_array() || single.empty()) continue;
    return member(at_begin ? single.front() : single.back(), "SpecialToken").is_object();
  }
  return false;
}

bool adds_token(const Json& tokenizer, const Json& settings, const char* key, bool at_begin) {
  const Json& value = member(settings, key);
  return value.is_boolean() ? value.get<bool>() : template_adds(tokenizer, at_begin);
}

std::string chat_template(const SideTexts& texts, const Json& settings) {
  if (const auto file = texts.find(kTemplate); file != texts.end()) return file->second;
  const Json& value = member(settings, "chat_template");
  if (!value.is_array()) return text_or(value, "");
  for (const Json& one : value) {
    if (text_or(member(one, "name"), "") == "default") return text_or(member(one, "template"), "");
  }
  return {};
}

void append_ids(const Vocabulary& v, const Json& settings, const Json& config,
                std::vector<GgufPair>& out) {
  constexpr std::array<std::pair<const char*, const char*>, 4> kIds = {{
      {"bos_token", "tokenizer.ggml.bos_token_id"},
      {"eos_token", "tokenizer.ggml.eos_token_id"},
      {"unk_token", "tokenizer.ggml.unknown_token_id"},
      {"pad_token", "tokenizer.ggml.padding_token_id"},
  }};
  for (const auto& [name, key] : kIds) {
    const std::int64_t id = token_id(v, settings, config, name);
    if (id < 0 || id >= std::ssize(v.tokens)) continue;
    out.push_back({key, GgufType::kU32, static_cast<std::uint64_t>(id)});
  }
}

std::vector<GgufPair> hugging_face_pairs(const SideTexts& texts, const std::string& config_json,
                                         std::int64_t vocab) {
  const Json tokenizer = parse_json_object(texts.at(kTokenizer), kTokenizer);
  const auto file = texts.find(kSettings);
  const Json settings =
      file == texts.end() ? Json::object() : parse_json_object(file->second, kSettings);
  const Json config = parse_json_object(config_json, "config.json");
  const Json& model = member(tokenizer, "model");
  const bool byte_level = is_byte_level(tokenizer);
  const bool fallback = member(model, "byte_fallback") == Json(true);
  if (text_or(member(model, "type"), "BPE") != "BPE" || byte_level == fallback) {
    refuse(Errc::kUnsupported, "model.type",
           "model is " + text_or(member(model, "type"), "?") +
               ", expected a byte-level BPE or a BPE with byte_fallback");
  }
  const Vocabulary v = read_vocabulary(tokenizer, vocab, fallback);
  const auto merges = read_merges(tokenizer);
  std::vector<GgufPair> out;
  out.push_back(pair_text("tokenizer.ggml.model", byte_level ? "gpt2" : "llama"));
  out.push_back(
      pair_text("tokenizer.ggml.pre", byte_level ? pre_tokenizer_name(tokenizer) : "default"));
  out.push_back(
      pair_array("tokenizer.ggml.tokens", GgufType::kString, {v.tokens.begin(), v.tokens.end()}));
  if (!byte_level) {
    out.push_back(pair_array("tokenizer.ggml.scores", GgufType::kF32, merge_scores(v, merges)));
  }
  out.push_back(
      pair_array("tokenizer.ggml.token_type", GgufType::kI32, {v.types.begin(), v.types.end()}));
  if (byte_level) {
    std::vector<GgufValue> joined;
    for (const auto& [left, right] : merges) {
      if ((left + right).find(' ') != std::string::npos) {
        refuse(Errc::kUnsupported, "model.merges", "merges tokens with spaces, GGUF cannot");
      }
      joined.emplace_back(left + " " + right);
    }
    out.push_back(pair_array("tokenizer.ggml.merges", GgufType::kString, std::move(joined)));
  }
  append_ids(v, settings, config, out);
  out.push_back(pair_bool("tokenizer.ggml.add_bos_token",
                          adds_token(tokenizer, settings, "add_bos_token", true)));
  out.push_back(pair_bool("tokenizer.ggml.add_eos_token",
                          adds_token(tokenizer, settings, "add_eos_token", false)));
  out.push_back(
      pair_bool("tokenizer.ggml.add_space_prefix", !byte_level && adds_space_prefix(tokenizer)));
  const std::string chat = chat_template(texts, settings);
  if (!chat.empty()) out.push_back(pair_text("tokenizer.chat_template", chat));
  return out;
}

/// Keys of a source that describe that file, not the model.
bool describes_file(const std::string& key) {
  return key == "general.architecture" || key == "general.file_type" ||
         key == "general.quantization_version" || key == "general.alignment";
}

}  // namespace

std::vector<GgufPair> gguf_tokenizer_pairs(const SideTexts& texts, const std::string& config_json,
                                           std::int64_t vocab) {
  if (const auto source = texts.find(kTokenizerGguf); source != texts.end()) {
    std::vector<GgufPair> out;
    for (GgufPair& pair : parse_gguf_metadata(source->second, kTokenizerGguf)) {
      const bool kept = pair.key.starts_with("tokenizer.") ||
                        (pair.key.starts_with("general.") && !describes_file(pair.key));
      if (kept) out.push_back(std::move(pair));
    }
    return out;
  }
  if (texts.find(kTokenizer) != texts.end()) return hugging_face_pairs(texts, config_json, vocab);
  return {pair_text("tokenizer.ggml.model", "none")};
}

}  // namespace quantal::checkpoint
