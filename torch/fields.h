// How arguments and results cross into operators: values, and groups of them. A group is a struct whose fields are
// listed once, with their text in schemas; the schema of an operator, what its kernel reads and what a caller in C++
// passes all come from that list (arguments.h). A kernel is an ordinary function of values and groups.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <concepts>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "convert.h"

namespace tessera::ops {

using torch::jit::Stack;

// A field of a struct: its text in schemas ("int? stride=None"), and where it is kept.
template <class T, class M>
struct Field {
  const char* schema;
  M T::*member;

  constexpr std::string_view name() const {
    std::string_view text = schema;
    text = text.substr(0, text.find('='));
    return text.substr(text.rfind(' ') + 1);
  }
};
template <class T, class M>
Field(const char*, M T::*) -> Field<T, M>;

// Fields<T>::list, a tuple of Field: T is a group.
template <class T>
struct Fields {};
template <class T>
concept Group = requires { Fields<T>::list; };

template <Group T, class F>
void for_each_field(F f) {
  std::apply([&](const auto&... field) { (f(field), ...); }, Fields<T>::list);
}

// Reads a value of an argument list and moves on; writes one to a result list.
template <class T>
struct Value {
  static T take(const c10::IValue*& at) { return (at++)->to<T>(); }
  static void put(Stack& stack, T value) { stack.emplace_back(std::move(value)); }
};

template <class T>
T take(const c10::IValue*& at) {
  return Value<T>::take(at);
}
template <class T>
void put(Stack& stack, T&& value) {
  Value<std::decay_t<T>>::put(stack, std::forward<T>(value));
}

template <Group T>
struct Value<T> {
  static T take(const c10::IValue*& at) {
    T value;
    for_each_field<T>([&]<class O, class M>(const Field<O, M>& field) { value.*field.member = ops::take<M>(at); });
    return value;
  }
  static void put(Stack& stack, const T& value) {
    for_each_field<T>([&](const auto& field) { ops::put(stack, value.*field.member); });
  }
};

// A group from a dict; fields that are not in it stay as they are.
template <Group T>
T of_names(const c10::Dict<std::string, c10::IValue>& named) {
  T value;
  for_each_field<T>([&]<class O, class M>(const Field<O, M>& field) {
    const auto found = named.find(std::string(field.name()));
    if (found == named.end()) return;
    const c10::IValue given = found->value();
    const c10::IValue* at = &given;
    value.*field.member = ops::take<M>(at);
  });
  return value;
}

// Numbers of a caller in Python may be symbols that stand for numbers.
template <>
struct Value<std::vector<int64_t>> {
  static std::vector<int64_t> take(const c10::IValue*& at) {
    const c10::IValue& list = *at++;
    if (list.isIntList()) return list.toIntVector();
    std::vector<int64_t> numbers;
    for (const c10::IValue& n : list.toListRef()) numbers.push_back(n.toInt());
    return numbers;
  }
  static void put(Stack& stack, std::vector<int64_t> value) { stack.emplace_back(std::move(value)); }
};
template <>
struct Value<int64_t> {
  static int64_t take(const c10::IValue*& at) { return (at++)->toInt(); }
  static void put(Stack& stack, int64_t value) { stack.emplace_back(value); }
};
template <>
struct Value<int> {
  static int take(const c10::IValue*& at) { return narrow((at++)->toInt()); }
  static void put(Stack& stack, int value) { stack.emplace_back(int64_t{value}); }
};
template <>
struct Value<uint64_t> {
  static uint64_t take(const c10::IValue*& at) { return static_cast<uint64_t>((at++)->toInt()); }
  static void put(Stack& stack, uint64_t value) { stack.emplace_back(static_cast<int64_t>(value)); }
};
template <class T>
struct Value<std::optional<T>> {
  static std::optional<T> take(const c10::IValue*& at) {
    if (at->isNone()) return ++at, std::nullopt;
    return ops::take<T>(at);
  }
  static void put(Stack& stack, const std::optional<T>& value) {
    if (value) return ops::put(stack, *value);
    stack.emplace_back();
  }
};
template <class... T>
struct Value<std::tuple<T...>> {
  static void put(Stack& stack, std::tuple<T...>&& values) {
    std::apply([&](T&... value) { (ops::put(stack, std::move(value)), ...); }, values);
  }
};

// Figures with their names: a dict in Python.
using Named = std::vector<std::pair<std::string, double>>;
template <>
struct Value<Named> {
  static void put(Stack& stack, const Named& figures) {
    c10::Dict<std::string, double> dict;
    for (const auto& [name, value] : figures) dict.insert(name, value);
    stack.emplace_back(std::move(dict));
  }
};

// What a kernel's parameter is kept in while the kernel runs.
template <class T>
struct Held {
  using type = std::decay_t<T>;
};
template <>
struct Held<std::string_view> {
  using type = std::string;
};
template <class T>
struct Held<std::span<const T>> {
  using type = std::vector<T>;
};

template <auto kernel>
struct Boxed;
template <class R, class... Parameters, R (*kernel)(Parameters...)>
struct Boxed<kernel> {
  static void run(const c10::OperatorHandle& op, Stack* stack) {
    translate_errors([&] {
      const size_t count = op.schema().arguments().size();
      const c10::IValue* at = torch::jit::last(*stack, count).data();
      std::tuple<typename Held<Parameters>::type...> values{take<typename Held<Parameters>::type>(at)...};
      if constexpr (std::is_void_v<R>) {
        std::apply(kernel, values);
        torch::jit::drop(*stack, count);
      } else {
        R result = std::apply(kernel, values);
        torch::jit::drop(*stack, count);
        put(*stack, std::move(result));
      }
    });
  }
};

// A schema in which "{options}", "{pattern}", ... stand for groups (arguments.cc).
std::string schema_of(std::string_view text);

// Defines an operator and its kernel.
template <auto kernel>
void define(torch::Library& m, std::string_view schema, c10::DispatchKey key = c10::DispatchKey::CPU) {
  m.def(schema_of(schema).c_str(),
        torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<&Boxed<kernel>::run>()));
}

// Calls an operator as Python does; what it returns.
template <class... Arguments>
Stack call(const char* name, const Arguments&... arguments) {
  Stack stack;
  (put(stack, arguments), ...);
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
  return stack;
}

}  // namespace tessera::ops
