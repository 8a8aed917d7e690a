#include "io/zip.h"

#include <gtest/gtest.h>

#include "io/archive_builder.h"
#include "io/read_error.h"
#include "support/golden.h"

namespace quantal {
namespace {

using testing::deflated_entry;
using testing::error_of;
using testing::expect_error;
using testing::le;
using testing::stored_entry;
using testing::TempFolder;
using testing::write_bytes;
using testing::zip_of;
using testing::ZipEnd;
using testing::ZipEntry;

constexpr std::size_t kAll = std::size_t{1} << 40;

class Zip : public ::testing::Test {
 protected:
  io::ZipArchive open(const std::string& bytes) {
    return io::ZipArchive(std::make_shared<MappedFile>(write_bytes(folder_, "x.zip", bytes)));
  }
  std::string text(const io::ZipArchive& zip, const std::string& name) {
    const auto bytes = zip.unpack(*zip.find(name));
    return {bytes.begin(), bytes.end()};
  }
  void refuses(const std::string& bytes, Errc code, const std::string& part) {
    expect_error([&] { open(bytes); }, code, part);
  }
  void refuses_entry(const ZipEntry& entry, Errc code, const std::string& part) {
    refuses(zip_of({stored_entry("good", "abc"), entry}), code, part);
  }
  TempFolder folder_;
};

TEST_F(Zip, ReadsStoredAndDeflated) {
  const std::string many(100000, 'q');
  const auto zip = open(zip_of(
      {stored_entry("a/b.txt", "hello"), deflated_entry("c", many), stored_entry("empty", ""),
       deflated_entry("also empty", ""), stored_entry("folder/", "")},
      {.comment = "a comment"}));
  EXPECT_EQ(zip.members().size(), 5u);
  EXPECT_EQ(zip.comment(), "a comment");
  EXPECT_EQ(text(zip, "a/b.txt"), "hello");
  EXPECT_EQ(text(zip, "c"), many);
  EXPECT_EQ(text(zip, "empty"), "");
  EXPECT_EQ(text(zip, "also empty"), "");
  EXPECT_EQ(zip.find("b.txt"), nullptr);
  const auto head = zip.unpack_head(*zip.find("c"), 10);
  EXPECT_EQ(std::string(head.begin(), head.end()), "qqqqqqqqqq");
  EXPECT_EQ(zip.unpack_head(*zip.find("c"), kAll).size(), many.size());
  EXPECT_EQ(open(zip_of({})).members().size(), 0u);
}

TEST_F(Zip, ReadsDescriptorsOfEveryForm) {
  const std::string data = "payload";
  for (const std::string& signature : {std::string("PK\x07\x08"), std::string()}) {
    for (const int width : {4, 8}) {
      ZipEntry entry = stored_entry("d", data);
      entry.flags = 8;
      entry.descriptor =
          signature + le(entry.crc, 4) + le(data.size(), width) + le(data.size(), width);
      EXPECT_EQ(text(open(zip_of({entry, stored_entry("e", "x")})), "d"), data);
      entry.descriptor[entry.descriptor.size() - 1] = 1;
      refuses(zip_of({entry}), Errc::kCorrupt, "data descriptor contradicts");
    }
  }
}

TEST_F(Zip, ReadsZip64Fields) {
  ZipEntry entry = stored_entry("d", "payload");
  entry.extra = le(1, 2) + le(16, 2) + le(7, 8) + le(7, 8);
  entry.local_extra = le(0x4246, 2) + le(3, 2) + "ZZZ" + entry.extra;
  entry.packed = entry.size = 0xFFFFFFFF;
  EXPECT_EQ(text(open(zip_of({entry})), "d"), "payload");
  entry.extra = le(1, 2) + le(8, 2) + le(7, 8);
  refuses(zip_of({entry}), Errc::kCorrupt, "packed size needs 8 bytes");
  entry.extra = le(1, 2) + le(16, 2) + le(~std::uint64_t{0}, 8) + le(~std::uint64_t{0}, 8);
  refuses(zip_of({entry}), Errc::kCorrupt, "local header contradicts");
  entry.extra = le(1, 2) + le(99, 2);
  refuses(zip_of({entry}), Errc::kCorrupt, "extra field is 99 bytes");
}

TEST_F(Zip, Zip64EndRecord) {
  const auto with_record = [](std::uint64_t entries, std::uint64_t bytes, std::uint64_t offset) {
    return "PK\x06\x06" + le(44, 8) + le(45, 2) + le(45, 2) + le(0, 4) + le(0, 4) + le(entries, 8) +
           le(entries, 8) + le(bytes, 8) + le(offset, 8) + "PK\x06\x07" + le(0, 4) +
           le(offset + bytes, 8) + le(1, 4);
  };
  const std::vector<ZipEntry> one = {stored_entry("d", "payload")};
  constexpr std::uint64_t kOffset = 30 + 1 + 7, kBytes = 46 + 1;
  const ZipEnd full{.entries = 0xFFFF, .bytes = 0xFFFFFFFF, .offset = 0xFFFFFFFF};
  ZipEnd end = full;
  end.before = with_record(1, kBytes, kOffset);
  EXPECT_EQ(text(open(zip_of(one, end)), "d"), "payload");
  end.before = with_record(2, kBytes, kOffset);
  refuses(zip_of(one, end), Errc::kCorrupt, "2 entries in 47 bytes");
  end.before = with_record(1, kBytes, kOffset);
  end.offset = 5;
  refuses(zip_of(one, end), Errc::kCorrupt, "directory offset is 38 in the zip64 record");
  end = full;
  end.before = with_record(1, kBytes, std::uint64_t{0} - 99);
  refuses(zip_of(one, end), Errc::kCorrupt, "no zip64 end record");
  refuses(zip_of(one, full), Errc::kCorrupt, "directory is 4294967295 bytes");
}

TEST_F(Zip, RefusesHostileEntries) {
  ZipEntry e = stored_entry("e", "payload");
  e.flags = 1;
  refuses_entry(e, Errc::kUnsupported, "encrypted");
  e = stored_entry("e", "payload");
  e.flags = 1 << 5;
  refuses_entry(e, Errc::kUnsupported, "patch");
  e = stored_entry("e", "payload");
  e.method = 14;
  refuses_entry(e, Errc::kUnsupported, "compression method is 14");
  e = stored_entry("e", "payload");
  e.disk = 2;
  refuses_entry(e, Errc::kUnsupported, "another disk");
  e = stored_entry("e", "payload");
  e.size = 8;
  refuses_entry(e, Errc::kCorrupt, "stored member is 7 bytes, expected 8");
  e = stored_entry("e", "payload");
  e.local_size = 6;
  refuses_entry(e, Errc::kCorrupt, "local header contradicts");
  e = stored_entry("e", "payload");
  e.local_name = "f";
  refuses_entry(e, Errc::kCorrupt, "local header contradicts");
  e = stored_entry("e", "payload");
  e.offset = 0;
  refuses_entry(e, Errc::kCorrupt, "local header contradicts");
  e = stored_entry("good", "abc");
  e.offset = 0;
  refuses_entry(e, Errc::kCorrupt, "overlaps");
  refuses_entry(stored_entry("good", "other"), Errc::kCorrupt, "stands twice");
  e = stored_entry("e", "payload");
  e.packed = e.size = 1000;
  refuses_entry(e, Errc::kCorrupt, "member needs 1000 bytes");
  e = stored_entry("e", "payload");
  e.packed = e.size = e.data.size() + 10;  // into the directory
  refuses_entry(e, Errc::kCorrupt, "overlaps another one or the directory");
  e.offset = 0x7FFFFFFF;
  refuses_entry(e, Errc::kCorrupt, "offset needs 2147483647 bytes");
}

TEST_F(Zip, RefusesNamesThatLeaveTheFolder) {
  for (const char* name : {"/abs", "../up", "a/../b", "a/./b", "a//b", "a\\b", "a\nb", "."}) {
    SCOPED_TRACE(name);
    refuses_entry(stored_entry(name, "x"), Errc::kCorrupt, "member name");
  }
  refuses_entry(stored_entry("", "x"), Errc::kCorrupt, "is empty");
  refuses_entry(stored_entry(std::string("a\0b", 3), "x"), Errc::kCorrupt, "control character");
  EXPECT_EQ(io::zip_name_fault("a/b..c/.d"), "");
}

TEST_F(Zip, RefusesBombsBeforeTakingMemory) {
  ZipEntry bomb = deflated_entry("bomb", std::string(1 << 20, '\0'));
  const std::size_t packed = bomb.data.size();
  EXPECT_NO_THROW(open(zip_of({bomb})));
  bomb.size = (packed + 2) * 1032;
  refuses(zip_of({bomb}), Errc::kCorrupt, "zip bomb");
  ZipEntry huge = bomb;
  huge.size = 0xFFFFFFFF;
  huge.extra = huge.local_extra = le(1, 2) + le(8, 2) + le(std::uint64_t{1} << 60, 8);
  refuses(zip_of({huge}), Errc::kCorrupt, "zip bomb");
}

TEST_F(Zip, RefusesDamagedStreamsAndSums) {
  const std::string data(5000, 'z');
  for (const std::int64_t claimed : {4999, 5001, 4000, 6000, 0}) {
    ZipEntry e = deflated_entry("d", data);
    e.size = static_cast<std::uint64_t>(claimed);
    const auto zip = open(zip_of({e}));
    expect_error([&] { zip.unpack(*zip.find("d")); }, Errc::kCorrupt, "damaged or not of its size");
  }
  ZipEntry broken = deflated_entry("d", data);
  broken.data[0] = '\x07';  // a block type that does not exist
  auto zip = open(zip_of({broken}));
  expect_error([&] { zip.unpack(*zip.find("d")); }, Errc::kCorrupt, "damaged");
  expect_error([&] { zip.unpack_head(*zip.find("d"), 100); }, Errc::kCorrupt, "damaged");
  ZipEntry tail = deflated_entry("d", data);
  tail.data += "more";
  tail.packed += 4;
  zip = open(zip_of({tail}));
  expect_error([&] { zip.unpack(*zip.find("d")); }, Errc::kCorrupt, "damaged or not of its size");
  for (const bool deflate : {false, true}) {
    ZipEntry e = deflate ? deflated_entry("d", data) : stored_entry("d", data);
    e.crc ^= 1;
    zip = open(zip_of({e}));
    expect_error([&] { zip.unpack(*zip.find("d")); }, Errc::kCorrupt, "CRC-32");
  }
}

TEST_F(Zip, RefusesDirectoriesThatLie) {
  const std::vector<ZipEntry> one = {stored_entry("d", "payload")};
  refuses("", Errc::kCorrupt, "expected at least 22");
  refuses(std::string(100, 'x'), Errc::kCorrupt, "no end record");
  refuses(zip_of(one) + "x", Errc::kCorrupt, "no end record");
  refuses("x" + zip_of(one), Errc::kCorrupt, "directory is 47 bytes");
  refuses(zip_of(one, {.before = "gap"}), Errc::kCorrupt, "directory is 47 bytes");
  refuses(zip_of(one, {.entries = 0}), Errc::kCorrupt, "directory ends at");
  refuses(zip_of(one, {.entries = 2}), Errc::kCorrupt, "at least 46 bytes for each");
  refuses(zip_of(one, {.bytes = 46, .offset = 39}), Errc::kCorrupt, "no directory entry");
  refuses(zip_of(one, {.disk = 1}), Errc::kUnsupported, "several disks");
}

TEST_F(Zip, WriterAlignsAndIsReadBack) {
  const std::string path = folder_.path("out.zip");
  const std::vector<std::uint8_t> body(100, 7);
  io::ZipWriter writer(path);
  writer.add("t", "some text");
  for (const std::uint64_t alignment : {1u, 8u, 64u}) {
    writer.add("a/" + std::to_string(alignment), body, body, alignment);
  }
  expect_error([&] { writer.add("t", "again"); }, Errc::kConfig, "given twice");
  expect_error([&] { writer.add("../t", "up"); }, Errc::kConfig, "member name");
  EXPECT_FALSE(std::filesystem::exists(path));
  writer.finish();
  const io::ZipArchive zip(std::make_shared<MappedFile>(path));
  EXPECT_EQ(text(zip, "t"), "some text");
  for (const std::uint64_t alignment : {1u, 8u, 64u}) {
    const io::ZipMember& member = *zip.find("a/" + std::to_string(alignment));
    EXPECT_EQ(member.data_offset % alignment, 0u);
    EXPECT_EQ(zip.unpack(member), std::vector<std::uint8_t>(200, 7));
  }
}

TEST_F(Zip, ManyMembersTakeZip64) {
  const std::string path = folder_.path("many.zip");
  io::ZipWriter writer(path);
  constexpr int kMany = 65600;
  for (int i = 0; i < kMany; ++i) writer.add(std::to_string(i), std::to_string(i));
  writer.finish();
  const io::ZipArchive zip(std::make_shared<MappedFile>(path));
  EXPECT_EQ(zip.members().size(), static_cast<std::size_t>(kMany));
  EXPECT_EQ(text(zip, "65599"), "65599");
}

}  // namespace
}  // namespace quantal
