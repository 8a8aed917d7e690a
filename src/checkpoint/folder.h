// A folder that appears whole or not at all.
#pragma once

#include <string>

namespace quantal::checkpoint {

/// File inside every folder that quantal writes; it marks the folder as one that may be replaced.
inline constexpr const char* kMarker = "quantal.json";
/// Metadata key of a single safetensors file: JSON object of the texts that a folder would have. A
/// single npz file has the JSON object {key: texts} as the comment of its archive.
inline constexpr const char* kEmbeddedTexts = "quantal_texts";
/// Names in SideTexts of the settings inside a wrapped torch file, and of their key there.
inline constexpr const char* kEmbedded = "embedded";
inline constexpr const char* kEmbeddedKey = "embedded_key";

/// Collects files in a temporary folder beside `target`; `commit` puts it in the place of
/// `target`. A destructor without `commit` removes the temporary folder.
class AtomicFolder {
 public:
  /// Throws Error{kConfig} if `target` exists and is neither an empty folder nor one with the
  /// marker, unless `overwrite`; Error{kIo} for a file in its place or a missing parent.
  AtomicFolder(const std::string& target, bool overwrite);
  ~AtomicFolder();
  AtomicFolder(const AtomicFolder&) = delete;
  AtomicFolder& operator=(const AtomicFolder&) = delete;

  /// Where a file of this name is to be written.
  std::string path(const std::string& name) const { return temporary_ + "/" + name; }

  /// Swaps the folders. What stood in the old one and is not written anew (a tokenizer, a
  /// generation config) moves over, except weights: they would contradict the new ones.
  void commit();

 private:
  std::string target_;
  std::string temporary_;
};

}  // namespace quantal::checkpoint
