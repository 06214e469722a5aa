//! The yardstick for a device that computes in bf16: a model in f32 that is a golden one once its weights are rounded to
//! bf16. How far apart the two compute is what the rounding of weights alone makes of a run.

use crate::golden;
use half::bf16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::path::Path;

/// A device's numbers may be so many times as far off.
pub const FACTOR: f64 = 3.0;

/// Makes it of a golden model in bf16, in a new folder.
pub fn unrounded(model: &str, to: &Path) {
    std::fs::create_dir(to).expect("a folder");
    let files = std::fs::read_dir(golden(&format!("models/{model}"))).expect("a golden model");
    for path in files.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_file()) {
        let copy = to.join(path.file_name().expect("a name"));
        match path.extension().is_some_and(|extension| extension == "safetensors") {
            true => unround(&path, &copy),
            false => drop(std::fs::copy(&path, &copy).expect("a copy")),
        }
    }
}

fn unround(from: &Path, to: &Path) {
    let bytes = std::fs::read(from).expect("weights");
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut number = |pair: &[u8]| {
        let value = bf16::from_le_bytes([pair[0], pair[1]]).to_f32();
        // From -1 to 1, by a linear congruence.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (seed >> 40) as f32 / (1 << 23) as f32 - 1.0;
        // Half a step of bf16 at this exponent, which is still rounded back; below a power of two steps are shorter.
        let half_step = f32::from_bits(value.to_bits() & 0x7f80_0000) / 256.0;
        let away = if value.abs() == 256.0 * half_step { uniform.abs() } else { uniform };
        let wide = value + 0.99 * away * half_step.copysign(value);
        assert_eq!(bf16::from_f32(wide).to_f32(), value);
        wide
    };
    let mut wide = Vec::new();
    let mut tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file").tensors();
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, tensor) in tensors {
        assert_eq!(tensor.dtype(), Dtype::BF16, "{name}");
        let numbers = tensor.data().chunks_exact(2).flat_map(|pair| number(pair).to_le_bytes());
        wide.push((name, tensor.shape().to_vec(), numbers.collect::<Vec<u8>>()));
    }
    let views = wide.iter().map(|(name, shape, bytes)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
        (name, view.expect("as many bytes as the shape says"))
    });
    safetensors::serialize_to_file(views, None, to).expect("written");
}

/// |a - b| / |b|.
pub fn relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let size = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|x| x * x).sum::<f64>();
    let difference = size(&mut a.iter().zip(b).map(|(a, b)| a - b));
    (difference / size(&mut b.iter().copied())).sqrt()
}

/// Whether a device's numbers are at most [`FACTOR`] times as far from the processor's as those of the unrounded model.
pub fn expect_rounded(what: &str, device: &[f64], unrounded: &[f64], cpu: &[f64]) {
    let (device, yardstick) = (relative(device, cpu), relative(unrounded, cpu));
    println!("{what}: {device:.2e}, rounding of weights {yardstick:.2e}");
    assert!(yardstick < 0.3, "{what}: the yardstick itself is off by {yardstick:e}");
    let most = FACTOR * yardstick;
    assert!(device <= most, "{what}: off by {device:e}, by rounding of weights {yardstick:e}");
}
