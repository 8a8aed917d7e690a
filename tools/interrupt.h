// Ctrl-C ends the work between two layers, so that unfinished files are removed.
#pragma once

namespace quantal::tools {

/// Thrown by stop_if_interrupted.
struct Interrupted {
  int signal;
};

/// From now on the first SIGINT, SIGTERM or SIGHUP is only noted; the second ends the process.
void note_interrupts();
/// Throws Interrupted if one was noted.
void stop_if_interrupted();

}  // namespace quantal::tools
