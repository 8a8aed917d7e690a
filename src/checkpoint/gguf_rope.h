// The rotary scaling of llama 3.
#pragma once

namespace quantal::checkpoint {

struct Llama3Rope {
  double factor = 8, low = 1, high = 4, old_context = 8192;
};

/// What a wavelength is stretched by (transformers 4.57.6 modeling_rope_utils): those beyond
/// old_context / low by `factor`, those below old_context / high not at all, and between the two
/// the inverse frequencies are mixed.
inline double llama3_factor(double wavelength, const Llama3Rope& rule) {
  if (wavelength < rule.old_context / rule.high) return 1;
  if (wavelength > rule.old_context / rule.low) return rule.factor;
  const double smooth = (rule.old_context / wavelength - rule.low) / (rule.high - rule.low);
  return 1 / ((1 - smooth) / rule.factor + smooth);
}

}  // namespace quantal::checkpoint
