use super::super::tests::{reference_backward, reference_forward};
use super::*;
use crate::testing::{
    SEEDS, assert_accurate_bf16, assert_faults_are_caught, cast, gpu, random, round, widen,
};

/// Within a thread's eight, with and without a rest, more than a block.
const LENGTHS: [usize; 6] = [1, 7, 8, 61, 2048, 2 * 2048 + 13];

/// Gate, up and dout; some gates are far out.
fn inputs(n: usize) -> [Vec<bf16>; 3] {
    let gate: Vec<f32> = random(n, 1).iter().map(|x| 5.0 * x).collect();
    [round(&gate), round(&random(n, 2)), round(&random(n, 3))]
}

fn run(gpu: &Gpu, [gate, up, dout]: &[Vec<bf16>; 3]) -> Result<[Vec<bf16>; 3]> {
    let n = gate.len();
    let (mut gate, mut up, dout) = (gpu.uploaded(gate)?, gpu.uploaded(up)?, gpu.uploaded(dout)?);
    let (mut alone_gate, mut alone_up) = (gpu.alloc(n)?, gpu.alloc(n)?);
    gpu.copy(&gate, &mut alone_gate)?;
    gpu.copy(&up, &mut alone_up)?;
    let (mut out, mut again) = (gpu.alloc(n)?, gpu.alloc(n)?);
    forward(gpu, &gate, &up, &mut out)?;
    backward(gpu, &dout, &mut gate, &mut up, Some(&mut again))?;
    backward(gpu, &dout, &mut alone_gate, &mut alone_up, None)?;
    let [out, again, dgate, dup, alone_gate, alone_up] =
        [&out, &again, &gate, &up, &alone_gate, &alone_up].map(|x| gpu.downloaded(x));
    let (out, dgate, dup) = (out?, dgate?, dup?);
    assert!(again? == out, "out once more has other bits");
    assert!((alone_gate?, alone_up?) == (dgate.clone(), dup.clone()), "without out, other bits");
    Ok([out, dgate, dup])
}

fn check(gpu: &Gpu, n: usize) {
    let inputs = inputs(n);
    let [out, dgate, dup] = run(gpu, &inputs).unwrap_or_else(|error| panic!("{error}"));
    let [gate, up, dout] = inputs.map(|x| widen(&x));
    let exact = reference_forward::<f64>(&cast(&gate), &cast(&up));
    assert_accurate_bf16("out", &out, &round(&reference_forward(&gate, &up)), &exact);
    let plain = reference_backward::<f32>(&dout, &gate, &up);
    let exact = reference_backward::<f64>(&cast(&dout), &cast(&gate), &cast(&up));
    assert_accurate_bf16("dgate", &dgate, &round(&plain.0), &exact.0);
    assert_accurate_bf16("dup", &dup, &round(&plain.1), &exact.1);
}

#[test]
fn both_directions_agree_with_f64_whatever_the_order() {
    for seed in SEEDS {
        LENGTHS.into_iter().for_each(|n| check(&gpu(seed), n));
    }
    check(&gpu(0), 0);
}

#[test]
fn extreme_gates_stay_finite() {
    let gate = round(&[-1e4, -100.0, -88.5, 88.5, 100.0, 1e4, 0.0, 1.0]);
    let ones = round(&[1.0; 8]);
    let [out, dgate, dup] = run(&gpu(0), &[gate.clone(), ones.clone(), ones]).unwrap();
    for i in 0..6 {
        let (value, slope) =
            if gate[i].to_f32() < 0.0 { (0.0, 0.0) } else { (gate[i].to_f32(), 1.0) };
        assert!((out[i].to_f32() - value).abs() < 1e-30 && (dup[i].to_f32() - value).abs() < 1e-30);
        assert!((dgate[i].to_f32() - slope).abs() < 1e-30);
    }
}

#[test]
fn planted_faults_are_caught() {
    let all = |gpu: &Gpu| LENGTHS.into_iter().for_each(|n| check(gpu, n));
    let faults = [
        ("swiglu.cu", "for (; i < n; i++) out[i]", "for (; i + 1 < n; i++) out[i]"),
        ("swiglu.cu", "for (; i < n; i++) out[i]", "for (; i <= n; i++) out[i]"),
        ("swiglu.cu", "store16(up + i, pack8(u));", ""),
        ("swiglu.cu", "if (out) store16(out + i, pack8(o));", ""),
        (
            "swiglu.cuh",
            "fmaf(gate.silu, 1.0f - gate.sigma, gate.sigma)",
            "fmaf(gate.silu, 1.0f + gate.sigma, gate.sigma)",
        ),
        ("swiglu.cu", "j++) o[j] = activated", "j++) o[j] += activated"),
    ];
    assert_faults_are_caught(all, &faults);
}

#[test]
#[should_panic(expected = "swiglu: a slice on the device begins at")]
fn a_slice_within_16_bytes_is_refused() {
    let gpu = gpu(0);
    let (gate, up) = (gpu.alloc(9).unwrap(), gpu.alloc(8).unwrap());
    let _ = forward(&gpu, &gate[1..], &up, &mut gpu.alloc(8).unwrap());
}
