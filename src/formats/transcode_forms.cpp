// Public names of forms and of what a conversion makes of them.
#include "formats/transcode_rules.h"
#include "quantal/transcode.h"

namespace quantal {

PackedSpec transcoded_spec(const PackedSpec& from, const TranscodeTarget& to) {
  return transcoding::target_spec(from, to);
}

std::string describe_form(const PackedSpec& spec) { return transcoding::form_name(spec); }

QuantizeOptions options_of(const PackedSpec& spec) {
  TranscodeTarget same{.dialect = &dialect_by_id(spec.dialect), .options = {}};
  same.options.bits = 0;  // these four follow the form
  same.options.group_size = 0;
  same.options.quant_type.clear();
  QuantizeOptions out = transcoding::target_options(spec, same);
  out.value_dtype = spec.value_dtype;
  out.double_quant = spec.scale == ScaleSource::kNestedU8;
  out.axis = spec.group_map == GroupMap::kRowRuns ? 1 : 0;
  return out;
}

}  // namespace quantal
