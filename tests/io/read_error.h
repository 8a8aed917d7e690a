// What a reader says to a file.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

#include "io/temp_folder.h"
#include "quantal/core.h"

namespace quantal::testing {

inline std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline std::string write_bytes(const TempFolder& folder, const std::string& name,
                               const std::string& bytes) {
  const std::string path = folder.path(name);
  std::filesystem::remove(path);  // a file that is cut and written again is flushed to the disk
  std::ofstream(path, std::ios::binary) << bytes;
  return path;
}

/// The error that `read` throws; a test failure if it throws none.
inline Error error_of(const std::function<void()>& read) {
  try {
    read();
  } catch (const Error& e) {
    return e;
  }
  ADD_FAILURE() << "was accepted";
  return Error(Errc::kInternal, "accepted");
}

/// Expects an error of a kind whose message has `part`.
inline void expect_error(const std::function<void()>& read, Errc code, const std::string& part) {
  const Error e = error_of(read);
  EXPECT_EQ(errc_name(e.code()), errc_name(code)) << e.what();
  EXPECT_NE(std::string(e.what()).find(part), std::string::npos)
      << "\"" << e.what() << "\" lacks \"" << part << "\"";
}

}  // namespace quantal::testing
