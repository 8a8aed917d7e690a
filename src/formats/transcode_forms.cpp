// Public names of forms and of what a conversion makes of them.
#include "formats/transcode_rules.h"
#include "quantal/transcode.h"

namespace quantal {

PackedSpec transcoded_spec(const PackedSpec& from, const TranscodeTarget& to) {
  return transcoding::target_spec(from, to);
}

std::string describe_form(const PackedSpec& spec) { return transcoding::form_name(spec); }

}  // namespace quantal
