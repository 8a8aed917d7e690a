#include <gtest/gtest.h>

#include "quantal/policy.h"

namespace quantal {
namespace {

bool prefix(const std::string& pattern, const std::string& name) {
  return NamePattern(pattern, NamePattern::Plain::kPrefix).matches(name);
}
bool anywhere(const std::string& pattern, const std::string& name) {
  return NamePattern(pattern, NamePattern::Plain::kAnywhere).matches(name);
}

TEST(NamePattern, PlainPrefixMatchesWholeComponents) {
  EXPECT_TRUE(prefix("layers.2", "layers.2"));
  EXPECT_TRUE(prefix("layers.2", "layers.2.q_proj"));
  EXPECT_FALSE(prefix("layers.2", "layers.23"));
  EXPECT_FALSE(prefix("layers.2", "layers.23.q_proj"));
  EXPECT_FALSE(prefix("layers.2", "model.layers.2"));
  EXPECT_FALSE(prefix("layers.2.q_proj", "layers.2"));
}

TEST(NamePattern, PlainAnywhereMatchesConsecutiveComponents) {
  EXPECT_TRUE(anywhere("lm_head", "lm_head"));
  EXPECT_TRUE(anywhere("lm_head", "model.lm_head"));
  EXPECT_TRUE(anywhere("self_attn.q_proj", "m.0.self_attn.q_proj.base"));
  EXPECT_FALSE(anywhere("head", "lm_head"));
  EXPECT_FALSE(anywhere("head", "head_proj"));
  EXPECT_FALSE(anywhere("o", "model.o_proj"));
  EXPECT_TRUE(anywhere("a", "aa.a")) << "a first miss must not end the search";
}

TEST(NamePattern, GlobsCoverTheWholeName) {
  EXPECT_TRUE(prefix("*.q_proj", "model.layers.0.q_proj"));
  EXPECT_FALSE(prefix("*.q_proj", "model.layers.0.q_proj.base"));
  EXPECT_TRUE(prefix("model.layers.?.mlp.*", "model.layers.7.mlp.up"));
  EXPECT_FALSE(prefix("model.layers.?.mlp.*", "model.layers.17.mlp.up"));
  EXPECT_TRUE(prefix("*.[qkv]_proj", "a.k_proj"));
  EXPECT_FALSE(prefix("*.[!qkv]_proj", "a.k_proj"));
  EXPECT_TRUE(prefix("*.[0-3].w", "m.2.w"));
  EXPECT_FALSE(prefix("*.[0-3].w", "m.4.w"));
  EXPECT_TRUE(prefix("*", ""));
  EXPECT_TRUE(prefix("a*b*c", "a.b.b.c"));
  EXPECT_FALSE(prefix("a*b*c", "a.b.b.c.d"));
  EXPECT_TRUE(prefix("a[b", "a[b")) << "an open bracket stands for itself";
  EXPECT_TRUE(prefix("x[]]y", "x]y"));
}

TEST(NamePattern, GlobIsNotExponential) {
  std::string stars, name(2000, 'a');
  for (int i = 0; i < 200; ++i) stars += "*a";
  EXPECT_FALSE(prefix(stars + "*b", name));
}

TEST(NamePattern, RegexMatchesTheWholeName) {
  EXPECT_TRUE(prefix(R"(re:model\.layers\.\d+\.(q|v)_proj)", "model.layers.12.v_proj"));
  EXPECT_FALSE(prefix(R"(re:layers)", "model.layers.12"));
  EXPECT_FALSE(prefix("re:.*", std::string(100000, 'a'))) << "far too long for a module name";
}

TEST(NamePattern, BadPatternsAreTypedErrors) {
  for (const char* text : {"", "re:(", "re:[z-a]", "re:*"}) {
    try {
      NamePattern(text, NamePattern::Plain::kPrefix);
      ADD_FAILURE() << "'" << text << "' was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Errc::kConfig);
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(NamePattern(std::string(5000, 'a'), NamePattern::Plain::kPrefix), Error);
}

TEST(NamePattern, SpecificityCountsLiterals) {
  const auto of = [](const char* text) {
    return NamePattern(text, NamePattern::Plain::kPrefix).specificity();
  };
  EXPECT_EQ(of("layers.2"), 8u);
  EXPECT_EQ(of("*.[qkv]_proj"), 6u);
  EXPECT_EQ(of("re:.*q_proj"), 6u);
  EXPECT_EQ(of("*"), 0u);
}

}  // namespace
}  // namespace quantal
