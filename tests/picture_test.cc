// Pictures: what is drawn is checked by pixels that must have a given colour, PNG by its first and last
// bytes; how it looks is for eyes. Small sizes, one of them with more blocks than pixels.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>

#include "io_files.h"
#include "picture/canvas.h"
#include "picture/font.h"
#include "tessera/patterns.h"
#include "tessera/picture.h"

namespace tessera {
namespace {

using test::expect_error;

constexpr Rgb kBlack{0, 0, 0};

int64_t count(const Image& image, Rgb color) { return std::count(image.pixels.begin(), image.pixels.end(), color); }

// rows x cols blocks of 16 x 16 tokens, those listed.
BlockPattern blocks(int64_t rows, int64_t cols, const std::vector<std::vector<int32_t>>& kept) {
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices;
  for (const auto& row : kept) {
    indices.insert(indices.end(), row.begin(), row.end());
    indptr.push_back(static_cast<int64_t>(indices.size()));
  }
  return BlockPattern::from_csr({rows * 16, cols * 16, 16, 16, 1, 1}, indptr, indices);
}

// Bytes as the PNG specification (section 5, 11.2.2) lays them out.
TEST(Png, WrittenWholeWithSizeAndChecksums) {
  test::TemporaryFolder folder;
  Image image(3, 2, {1, 2, 3});
  image.at(2, 1) = {200, 100, 50};
  write_png(folder / "x.png", image);
  EXPECT_EQ(folder.files(), 1u);
  const std::string file = test::file_content(folder / "x.png");
  // Signature, then IHDR: length 13, width 3, height 2, 8 bits, colour type 2 (RGB).
  EXPECT_EQ(file.substr(0, 26), std::string("\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x03\0\0\0\x02\x08\x02", 26));
  EXPECT_EQ(file.substr(file.size() - 12), std::string("\0\0\0\0IEND\xae\x42\x60\x82", 12));
  Image other = image;
  other.at(0, 0) = kBlack;
  EXPECT_NE(encode_png(other), encode_png(image));
  EXPECT_THROW(write_png(folder / "no/x.png", image), Error);
  EXPECT_THROW(encode_png(Image()), Error);
  image.pixels.pop_back();
  EXPECT_THROW(encode_png(image), Error);
  EXPECT_THROW(Image(0, 5), Error);
  EXPECT_THROW(Image(5, 100'000), Error);
}

TEST(Font, GlyphsDifferAndAreNotEmpty) {
  std::set<picture::Glyph> seen;
  for (const picture::Glyph& glyph : picture::kGlyphs) {
    EXPECT_TRUE(seen.insert(glyph).second);
    for (uint8_t row : glyph) EXPECT_LT(row, 32);
  }
  EXPECT_EQ(seen.size(), 95u);
  EXPECT_EQ(picture::kGlyphs[0], picture::Glyph{});
}

TEST(Font, TextHasTheSizeItSaysAndClips) {
  for (int scale : {1, 2, 3}) {
    const std::string text = "Mgj0|~";
    Image image(text_width(text, scale) + 2, text_height(scale) + 2);
    draw_text(image, 1, 1, text, kBlack, scale);
    EXPECT_GT(count(image, kBlack), 40 * scale * scale);
    for (int x = 0; x < image.width; ++x) {
      EXPECT_EQ(image.at(x, 0), Rgb{});
      EXPECT_EQ(image.at(x, image.height - 1), Rgb{});
    }
    for (int y = 0; y < image.height; ++y) EXPECT_EQ(image.at(image.width - 1, y), Rgb{});
  }
  EXPECT_EQ(text_width("", 2), 0);
  Image tiny(4, 4);
  draw_text(tiny, -7, -4, "TTTT\x01\xff", kBlack, 3);  // beyond every edge
  EXPECT_GT(count(tiny, kBlack), 0);
}

TEST(Colours, ViridisEndsAndMiddle) {
  EXPECT_EQ(viridis(0), (Rgb{0x44, 0x01, 0x54}));
  EXPECT_EQ(viridis(1), (Rgb{0xfd, 0xe7, 0x25}));
  EXPECT_EQ(viridis(0.5), (Rgb{0x21, 0x91, 0x8c}));
  EXPECT_EQ(viridis(-5), viridis(0));
  EXPECT_EQ(viridis(9), viridis(1));
  EXPECT_EQ(viridis(std::numeric_limits<double>::quiet_NaN()), viridis(0));
  EXPECT_EQ(viridis(std::numeric_limits<double>::infinity()), viridis(1));
}

// Pixels of the plot by colour, each block 16 px (64 px for 4 blocks), less the lines between blocks and the swatches.
TEST(PatternPicture, BlocksHaveTheirColours) {
  const BlockPattern p = blocks(4, 4, {{0}, {1}, {0, 2}, {3}});
  const Image plain = draw_pattern(p, {.size = 64, .legend = false});
  const Rgb full{0x1d, 0x5c, 0x96}, partial{0xf0, 0x8c, 0x2e}, skipped{0xec, 0xef, 0xf3}, future{0xd3, 0xd7, 0xdd};
  // A block of the first row or column has no line on that side.
  EXPECT_EQ(count(plain, full), 16 * 16 + 15 * 15 + 16 * 15 + 15 * 15 + 15 * 15);
  EXPECT_EQ(count(plain, partial), 0);
  EXPECT_EQ(count(plain, future), 0);

  const Image causal = draw_pattern(p, {.causal = true, .size = 64, .legend = false});
  EXPECT_EQ(count(causal, partial), 16 * 16 + 3 * 15 * 15);  // the diagonal
  EXPECT_EQ(count(causal, full), 16 * 15);
  EXPECT_EQ(count(causal, future), 3 * 16 * 15 + 3 * 15 * 15);
  EXPECT_GT(count(causal, skipped), 0);
}

TEST(PatternPicture, BitmapsArePartial) {
  const BlockPattern p =
      BlockPattern::from_csr({32, 32, 16, 16, 1, 1}, {0, 1, 2}, {0, 1}, {-1, 0}, std::vector<uint64_t>(16, 0xff));
  const Image image = draw_pattern(p, {.size = 64, .legend = false});
  EXPECT_EQ(count(image, {0x1d, 0x5c, 0x96}), 32 * 32);
  EXPECT_EQ(count(image, {0xf0, 0x8c, 0x2e}), 31 * 31);
}

TEST(PatternPicture, MoreBlocksThanPixelsAreAveraged) {
  // 512 x 512 blocks on 64 px: column 0 kept alone covers 1/8 of the first pixel column; shade sqrt(1/8).
  const BlockPattern p = blocks(512, 512, std::vector<std::vector<int32_t>>(512, {0}));
  const Image image = draw_pattern(p, {.size = 64, .legend = false});
  const Rgb shade = picture::mix({0xec, 0xef, 0xf3}, {0x1d, 0x5c, 0x96}, std::sqrt(1.0 / 8));
  EXPECT_EQ(count(image, shade), 64);
  EXPECT_EQ(count(image, {0xec, 0xef, 0xf3}), 63 * 64);
}

TEST(PatternPicture, OddSizesAndBadOptions) {
  EXPECT_NO_THROW(draw_pattern(BlockPattern()));
  EXPECT_NO_THROW(draw_pattern(blocks(1, 1, {{0}}), {.title = std::string(500, 'W'), .causal = true, .size = 64}));
  EXPECT_NO_THROW(draw_pattern(blocks(1, 3000, {{0, 2999}}), {.causal = true, .size = 64}));
  EXPECT_NO_THROW(draw_pattern(BlockPattern::from_csr({4096, 16, 256, 16, 1, 1}, std::vector<int64_t>(17, 0), {}),
                               {.causal = true, .size = 100}));
  expect_error([] { draw_pattern(blocks(1, 1, {{0}}), {.head = 1}); }, "head");
  expect_error([] { draw_pattern(blocks(1, 1, {{0}}), {.batch = -1}); }, "batch");
  expect_error([] { draw_pattern(blocks(1, 1, {{0}}), {.size = 1 << 20}); }, "size");
}

TEST(HeatMap, ColoursOfValues) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> values{0, 1, nan, 0.5f};
  const Image image = draw_heat_map(values, 2, 2, {.min = 0.0, .max = 1.0, .size = 64});
  EXPECT_GE(count(image, viridis(0)), 32 * 32);
  EXPECT_GE(count(image, viridis(1)), 32 * 32);
  EXPECT_GE(count(image, viridis(0.5)), 32 * 32);
  EXPECT_EQ(count(image, {0x9c, 0x9c, 0x9c}), 32 * 32);
  // Log: 0.01 of 1e-4..1 is the middle; zero the darkest.
  const std::vector<float> decades{1e-4f, 1e-2f, 1, 0};
  const Image log = draw_heat_map(decades, 2, 2, {.log_scale = true, .size = 64});
  EXPECT_GE(count(log, viridis(0.5)), 32 * 32);
  EXPECT_GE(count(log, viridis(0)), 2 * 32 * 32);
}

TEST(HeatMap, AveragesAndSurvivesAnything) {
  std::vector<float> values(256 * 256, 0.0f);
  for (size_t i = 0; i < values.size(); i += 2) values[i] = 1;  // stripes: every pixel averages to one half
  const Image image = draw_heat_map(values, 256, 256, {.min = 0.0, .max = 1.0, .size = 64});
  EXPECT_GE(count(image, viridis(0.5)), 64 * 64);
  const float infinity = std::numeric_limits<float>::infinity();
  for (float v : {0.0f, -1.0f, infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), 1e30f, 1e-40f}) {
    for (bool log : {false, true}) {
      EXPECT_NO_THROW(draw_heat_map(std::vector<float>(6, v), 2, 3, {.log_scale = log, .size = 64})) << v;
    }
  }
  expect_error([&] { draw_heat_map(values, 256, 255); }, "values");
  expect_error([&] { draw_heat_map({}, 0, 0); }, "values");
  expect_error([&] { draw_heat_map(values, 256, 256, {.min = -1.0, .log_scale = true}); }, "positive");
}

TEST(Sheet, PanelsStandInAGrid) {
  const std::vector<Image> panels{Image(10, 20, {1, 0, 0}), Image(15, 5, {2, 0, 0}), Image(8, 8, {3, 0, 0})};
  const Image sheet = draw_sheet(panels, 2);
  EXPECT_EQ(sheet.width, 30);
  EXPECT_EQ(sheet.height, 40);
  EXPECT_EQ(sheet.at(0, 0), (Rgb{1, 0, 0}));
  EXPECT_EQ(sheet.at(15, 0), (Rgb{2, 0, 0}));
  EXPECT_EQ(sheet.at(0, 20), (Rgb{3, 0, 0}));
  EXPECT_GT(draw_sheet(panels, 9, "title").height, 20);
  EXPECT_THROW(draw_sheet({}, 2), Error);
  EXPECT_THROW(draw_sheet(panels, 0), Error);
  EXPECT_THROW(draw_sheet(std::vector<Image>(5000, Image(10, 10)), 5000), Error);
}

TEST(Lines, PointsStandWhereTheyBelong) {
  // y_min..y_max 0..1: the point (5, 0.5) lies in the middle of the plot's height.
  const std::vector<Series> series{{"a", {0, 5, 10}, {0.5, 0.5, 0.5}, false}};
  const Image image = draw_lines(series, {.y_min = 0.0, .y_max = 1.0, .width = 400, .height = 300});
  const Rgb blue{0x00, 0x72, 0xb2};
  int top = image.height, bottom = 0;
  for (int x = 60; x < 300; ++x) {  // left of the legend
    for (int y = 0; y < image.height; ++y) {
      if (image.at(x, y) == blue) top = std::min(top, y), bottom = std::max(bottom, y);
    }
  }
  ASSERT_LT(top, bottom);
  EXPECT_LE(bottom - top, 9);  // a marker's height
  // Frame rows are grey over the whole width: the plot lies between them.
  std::vector<int> frame_rows;
  for (int y = 0; y < image.height; ++y) {
    if (image.at(200, y) == picture::kFrame && image.at(201, y) == picture::kFrame) frame_rows.push_back(y);
  }
  ASSERT_EQ(frame_rows.size(), 2u);
  EXPECT_NEAR((top + bottom) / 2.0, (frame_rows[0] + frame_rows[1]) / 2.0, 1.5);
}

TEST(Lines, EdgesAndErrors) {
  EXPECT_NO_THROW(draw_lines({}, {.title = "nothing"}));
  const std::vector<Series> one{{"one point", {1}, {1}, false}};
  for (bool log : {false, true}) EXPECT_NO_THROW(draw_lines(one, {.log_x = log, .log_y = log}));
  const std::vector<Series> apart = {{"far apart", {1, 2}, {1e-309, 1}}};  // their quotient is no number
  EXPECT_THROW(draw_lines(apart, {.log_y = true}), Error);
  const std::vector<Series> wild{{"wild", {1e-300, 1e300}, {-1e300, 1e300}, false}, {"", {1, 2}, {1e9, -1e9}, true}};
  EXPECT_NO_THROW(draw_lines(wild, {.y_min = 0.0, .y_max = 1.0}));
  const std::vector<Series> uneven{{"u", {1, 2}, {1}, false}};
  expect_error([&] { draw_lines(uneven); }, "as many x as y");
  const std::vector<Series> zero{{"z", {0}, {1}, false}};
  expect_error([&] { draw_lines(zero, {.log_x = true}); }, "1e-100 to 1e100");
  const std::vector<Series> nan{{"n", {1}, {std::numeric_limits<double>::quiet_NaN()}, false}};
  expect_error([&] { draw_lines(nan); }, "finite");
  expect_error([&] { draw_lines(std::vector<Series>(13)); }, "at most 12");
  expect_error([&] { draw_lines(one, {.y_min = 2.0, .y_max = 1.0}); }, "y_min");
  expect_error([&] { draw_lines(one, {.width = 10}); }, "200 to 8192");
}

// A million points are drawn column by column of pixels, in well under a second (a minute and more when every point
// was); what is seen is what they are: a curve between -1 and 1 fills the plot from edge to edge.
TEST(Lines, AMillionPoints) {
  Series s{"many", {}, {}, false};
  for (int i = 0; i < 1'000'000; ++i) {
    s.x.push_back(i);
    s.y.push_back(i % 2 == 0 ? -1 : 1);
  }
  Series few{"few", {0, 999'999, 0, 999'999}, {-1, 1, 1, -1}, false};
  const Image image = draw_lines(std::vector<Series>{s}, {});
  const Image of_few = draw_lines(std::vector<Series>{few}, {});
  int coloured = 0, of_the_few = 0;
  for (int y = 0; y < image.height; ++y) {
    for (int x = 0; x < image.width; ++x) {
      coloured += image.at(x, y) == of_few.at(x, y) ? 0 : 1;
      of_the_few += of_few.at(x, y) == Rgb{} ? 0 : 1;
    }
  }
  EXPECT_GT(coloured, image.width * image.height / 2);
  EXPECT_LT(of_the_few, image.width * image.height / 2);
}

TEST(Lines, TextsOfAMillionCharacters) {
  const std::string text(1'000'000, 'm');
  const Series s{text, {0, 1}, {0, 1}, false};
  const Image image = draw_lines(std::vector<Series>{s}, {.title = text, .x_label = text, .y_label = text});
  EXPECT_GT(image.width, 0);
  draw_pattern(make_pattern({.kind = PatternKind::dense, .seqlen_q = 64, .seqlen_k = 64}), {.title = text});
}

TEST(Ticks, RoundNumbers) {
  const auto labels = [](const std::vector<picture::Tick>& ticks) {
    std::string all;
    for (const picture::Tick& tick : ticks) all += tick.label + " ";
    return all;
  };
  EXPECT_EQ(labels(picture::linear_ticks(0, 1, 5)), "0 0.2 0.4 0.6 0.8 1 ");
  EXPECT_EQ(labels(picture::linear_ticks(-3, 17, 4)), "0 5 10 15 ");
  EXPECT_EQ(labels(picture::log_ticks(0.01, 1)), "0.01 0.02 0.05 0.1 0.2 0.5 1 ");
  EXPECT_EQ(labels(picture::log_ticks(1e-6, 10)), "1e-06 1e-05 0.0001 0.001 0.01 0.1 1 10 ");
  EXPECT_EQ(labels(picture::token_ticks(4096, 4)), "0 1024 2048 3072 4096 ");
  EXPECT_EQ(labels(picture::token_ticks(131072, 4)), "0 32k 64k 96k 128k ");
  EXPECT_EQ(labels(picture::token_ticks(0, 4)), "0 ");
}

}  // namespace
}  // namespace tessera
