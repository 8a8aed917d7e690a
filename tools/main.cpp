// quantal: the command-line tool. Exit codes: 0 done, 1 the work failed, 2 wrong usage, 128 + the
// number of the signal that ended it.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "commands.h"
#include "interrupt.h"

namespace {

constexpr int kFailed = 1;
constexpr int kWrongUsage = 2;
constexpr int kSignal = 128;

int finish() {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return 0;
  std::perror("quantal: error: cannot write to standard output");
  return kFailed;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("quantal: reads, writes and converts quantized models of every kind", "quantal");
  app.set_version_flag("--version", "quantal " QUANTAL_VERSION);
  app.require_subcommand(0, 1);
  app.footer("Run 'quantal COMMAND --help' for the options and examples of a command.");
  const auto inspect = quantal::tools::add_inspect(app);
  const auto convert = quantal::tools::add_convert(app);
  const auto plan = quantal::tools::add_plan(app);
  const auto formats = quantal::tools::add_formats(app);
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) {
      std::fputs(app.help().c_str(), stderr);
      return kWrongUsage;
    }
    return finish();
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? finish() : kWrongUsage;
  } catch (const quantal::tools::Interrupted& interrupted) {
    std::fprintf(stderr, "quantal: interrupted; nothing was written\n");
    return kSignal + interrupted.signal;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "quantal: error: %s\n", error.what());
    return kFailed;
  }
}
