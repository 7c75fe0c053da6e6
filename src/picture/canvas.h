// Drawing inside the library: rectangles, antialiased strokes, text in any of two directions, axes.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tessera/picture.h"

namespace tessera::picture {

constexpr Rgb kInk{0x22, 0x26, 0x2c};
constexpr Rgb kFaint{0x6b, 0x72, 0x7c};
constexpr Rgb kFrame{0x9a, 0xa1, 0xab};
constexpr Rgb kGrid{0xe4, 0xe7, 0xeb};
constexpr int kPadding = 16;  // pixels between parts of a picture
constexpr int kTick = 5;      // length of a tick mark
constexpr int kTextScale = 2;

struct Box {
  int x = 0, y = 0, width = 0, height = 0;
  int right() const { return x + width; }
  int bottom() const { return y + height; }
};

Rgb mix(Rgb a, Rgb b, double share_of_b);  // share clamped to [0, 1]

void fill(Image& image, Box box, Rgb color);   // clips
void frame(Image& image, Box box, Rgb color);  // one pixel wide, around the box
void paste(Image& image, int x, int y, const Image& part);

// Antialiased. `phase` is the length drawn so far, for dashes; dash 0: solid.
void stroke(Image& image, double x0, double y0, double x1, double y1, double width, Rgb color, double dash = 0,
            double phase = 0);
void disc(Image& image, double x, double y, double radius, Rgb color);

// Text centred on x, ended at x, and upwards centred on y.
void text_centred(Image& image, int x, int y, std::string_view text, Rgb color = kInk);
void text_ended(Image& image, int x, int y, std::string_view text, Rgb color = kInk);
void text_upwards(Image& image, int x, int y_centre, std::string_view text, Rgb color = kInk);
// As much of the text as fits, with ".." where some is missing.
std::string fitted(std::string_view text, int width);

struct Tick {
  double value;
  std::string label;
};
std::vector<Tick> linear_ticks(double min, double max, int at_most);  // steps of 1, 2, 5 times a power of ten
std::vector<Tick> log_ticks(double min, double max);                  // 1, 2, 5 times powers of ten
std::vector<Tick> token_ticks(int64_t tokens, int at_most);           // steps of a power of two, from 0

}  // namespace tessera::picture
