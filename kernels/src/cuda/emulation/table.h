// The table of a source's kernels.
#pragma once
#include "memory.h"
#include <type_traits>
#include <utility>

namespace emulation {

// What Rust's `cuda::args` calls the types: 1 bf16, 2 f32, 3 i32, 4 u32, 5 i64, 6 u64, 7 u8, 8 f64, 9 a tensor map, 0
// anything else.
template <class T> constexpr uint8_t type_code() {
    if (std::is_class_v<T> && sizeof(T) == 128) return 9;
    if (std::is_same_v<T, float>) return 2;
    if (std::is_same_v<T, double>) return 8;
    if (!std::is_integral_v<T>) return sizeof(T) == 2 && std::is_class_v<T> ? 1 : 0;
    if (sizeof(T) == 8) return std::is_signed_v<T> ? 5 : 6;
    if (sizeof(T) == 4) return std::is_signed_v<T> ? 3 : 4;
    return sizeof(T) == 1 ? 7 : 0;
}

template <class T> constexpr Parameter parameter() {
    using Target = std::remove_pointer_t<T>;
    bool pointer = std::is_pointer_v<T>;
    return {sizeof(T), pointer, pointer && !std::is_const_v<Target>, type_code<std::remove_cv_t<Target>>()};
}

template <auto kernel> struct Emulated;
template <class... T, void (*kernel)(T...)> struct Emulated<kernel> {
    static constexpr Parameter parameters[sizeof...(T) + 1] = {parameter<T>()..., Parameter{}};
    template <size_t... I> static void apply(void** arguments, std::index_sequence<I...>) {
        kernel(*(std::remove_cv_t<T>*)arguments[I]...);
    }
    static void call(void** arguments) { apply(arguments, std::index_sequence_for<T...>()); }
    static constexpr Entry entry(const char* name, uint32_t threads, uint32_t cluster) {
        return {name, threads, cluster, sizeof...(T), parameters, call};
    }
};

} // namespace emulation

// Emulates `name`, a kernel of this file.
#define EMULATED(name, threads, cluster) emulation::Emulated<&name>::entry(#name, threads, cluster)

extern "C" __attribute__((visibility("default"), used)) inline void emulation_run(emulation::Launch* launch) {
    emulation::run(*launch);
}
