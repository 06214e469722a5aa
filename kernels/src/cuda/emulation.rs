//! What device.cuh and hopper.cuh include where the system's C++ compiler compiles them: begin with emulation.h.

/// Name and text.
pub(super) const FILES: [(&str, &str); 14] = [
    ("cuda.h", include_str!("emulation/cuda.h")),
    ("device.h", include_str!("emulation/device.h")),
    ("emulation.h", include_str!("emulation/emulation.h")),
    ("fibers.h", include_str!("emulation/fibers.h")),
    ("hopper.h", include_str!("emulation/hopper.h")),
    ("hopper_barriers.h", include_str!("emulation/hopper_barriers.h")),
    ("hopper_copies.h", include_str!("emulation/hopper_copies.h")),
    ("hopper_products.h", include_str!("emulation/hopper_products.h")),
    ("hopper_state.h", include_str!("emulation/hopper_state.h")),
    ("hopper_words.h", include_str!("emulation/hopper_words.h")),
    ("launch.h", include_str!("emulation/launch.h")),
    ("memory.h", include_str!("emulation/memory.h")),
    ("table.h", include_str!("emulation/table.h")),
    ("types.h", include_str!("emulation/types.h")),
];
