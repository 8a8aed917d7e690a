// Which code runs a dialect here: one answer for reports, the cli and Python.
#include <algorithm>
#include <array>
#include <string>

#include "policy/text.h"
#include "quantal/backend.h"
#include "quantal/kernels.h"
#include "quantal/policy.h"

namespace quantal {
namespace {

/// Never throws: a forced kernel set that this machine lacks is what a report should show.
std::string cpu_engine() {
  try {
    return std::string(active_cpu_kernels()) + " kernels";
  } catch (const Error& error) {
    return error.what();
  }
}

std::string engine_of(Backend backend, const Machine& machine) {
  if (!backend_available(backend, machine)) return "no device";
  switch (backend) {
    case Backend::CUDA:
      return "own kernels where they are turned on, else torch's operators";
    case Backend::MPS:
      return "torch's operators";
    case Backend::MLX:  // tensors stay on the CPU
    case Backend::CPU:
      break;
  }
  return cpu_engine();
}

constexpr std::array<Backend, kNumBackends> kAll = {Backend::CUDA, Backend::MPS, Backend::MLX,
                                                    Backend::CPU};

/// "cuda: no device; mps: no device; ..."
std::string engines_line(const EngineStatus& status) {
  std::string text;
  for (std::size_t i = 0; i < status.engines.size(); ++i) {
    text += (i == 0 ? "" : "; ") + std::string(backend_name(kAll[i])) + ": " + status.engines[i];
  }
  return text;
}

/// At least one blank after the text.
std::string padded(const std::string& text, std::size_t width) {
  return text + std::string(text.size() < width ? width - text.size() : 1, ' ');
}

}  // namespace

std::vector<EngineStatus> engine_status(const Machine& machine) {
  std::vector<EngineStatus> out;
  for (const Dialect* dialect : dialects()) {
    EngineStatus status;
    status.dialect = dialect->name;
    status.title = dialect->title;
    for (const QuantizationMethod method : dialect->methods) {
      status.methods.emplace_back(method_name(method));
    }
    status.bits.assign(dialect->bits.begin(), dialect->bits.end());
    for (const Backend backend : kAll) status.engines.push_back(engine_of(backend, machine));
    out.push_back(std::move(status));
  }
  return out;
}

std::string engine_text(const Machine& machine) {
  const std::vector<EngineStatus> all = engine_status(machine);
  const bool alike = std::all_of(all.begin(), all.end(), [&](const EngineStatus& status) {
    return status.engines == all.front().engines;
  });
  std::string text = alike ? "  " + engines_line(all.front()) + "\n" : "";
  for (const EngineStatus& status : all) {
    std::string methods;
    for (const std::string& method : status.methods) {
      methods += (methods.empty() ? "" : ", ") + method;
    }
    if (methods.empty()) methods = "from and to files";
    text += "  " + padded(status.title, 14) + padded(methods, 40) + policy::join(status.bits) +
            " bits\n";
    if (!alike) text += "    " + engines_line(status) + "\n";
  }
  return text + "  kernel sets of this CPU, best first: " + policy::join(available_cpu_kernels()) +
         "\n";
}

std::string_view library_version() noexcept { return QUANTAL_VERSION; }

std::string report_import_status(std::optional<Backend> backend, const Machine& machine) {
  std::string built;
  for (const MethodInfo& method : methods()) {
    if (!method_built(method.method)) continue;
    built += (built.empty() ? "" : ", ") + std::string(method.name);
  }
  return "Import Status Report\n" + std::string(50, '=') +
         "\nBackend: " + std::string(backend ? backend_name(*backend) : "not specified") +
         "\n\nquantal " + std::string(library_version()) + "; its own engine:\n" +
         engine_text(machine) + "Methods of this build: " + built + "\n";
}

}  // namespace quantal
