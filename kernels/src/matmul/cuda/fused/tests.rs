//! What is made in one kernel has the bits of what several make, which are tested against f64.

use super::super::adapter::{Gradient, GradientOfB, Pulled, add_to_gradients, padded};
use super::super::tests::{bits, random_padded, sum_of_products};
use super::super::{Way, adapter, nn_by, nt_by};
use super::swiglu::{activate_backward, activate_first, activate_rest};
use super::*;
use crate::cuda::{Arena, DeviceBuffer, Fault};
use crate::rope::Rope;
use crate::swiglu::cuda as activation;
use crate::testing::{
    HeldBack, assert_accurate_bf16, assert_faults_are_caught_holding_back, hopper_gpu as gpu,
    random_bf16, round,
};
use std::panic::{AssertUnwindSafe, catch_unwind};

mod begun;

const SEEDS: u64 = 4;

/// Of a product that has not begun.
fn whole() -> Begun {
    Begun::default()
}

/// On a device: u and b of a rank, or nothing for rank 0.
struct Factors(Option<[DeviceBuffer<bf16>; 2]>, usize);

impl Factors {
    /// `across`: b is `[R, columns]`, otherwise `[columns, R]`.
    fn new(gpu: &Gpu, m: usize, columns: usize, rank: usize, seed: u64, across: bool) -> Self {
        if rank == 0 {
            return Self(None, 0);
        }
        let u = random_padded(m, rank, seed);
        let b = match across {
            true => random_bf16(adapter::padded(rank) * columns, seed + 1),
            false => random_padded(columns, rank, seed + 1),
        };
        Self(Some([gpu.uploaded(&u).unwrap(), gpu.uploaded(&b).unwrap()]), rank)
    }

    fn adapter(&self) -> Option<Adapter<'_>> {
        self.0.as_ref().map(|[left, right]| Adapter { left, right, rank: self.1 })
    }
}

/// Whether one kernel's bits, if the device lets it pass, are those of several: (found, expected).
fn same(found: Result<Vec<Vec<bf16>>>, expected: Vec<Vec<bf16>>) -> bool {
    match found {
        Ok(found) => found.iter().map(|x| bits(x)).eq(expected.iter().map(|x| bits(x))),
        Err(error) => {
            assert!(error.to_string().starts_with("kernel "), "{error}");
            false
        }
    }
}

fn rotation_is_right(
    gpu: &Gpu,
    tile: Tile,
    head_dim: usize,
    [m, k, heads, rank]: [usize; 4],
    biased: bool,
) -> bool {
    let n = heads * head_dim;
    let rope = Rope::new((0..head_dim / 2).map(|i| 0.9f64.powi(i as i32)).collect(), 1.0);
    let table = rope::Table::new(gpu, &rope, 40).unwrap();
    // One position is unknown.
    let positions: Vec<u32> = (0..m as u32).map(|t| if t == 5 { 40 } else { t * 7 % 40 }).collect();
    let positions = gpu.uploaded(&positions).unwrap();
    let x = gpu.uploaded(&random_bf16(m * k, 1)).unwrap();
    let w = gpu.uploaded(&random_bf16(n * k, 2)).unwrap();
    let bias = gpu.uploaded(&random_bf16(n, 3)).unwrap();
    let bias = biased.then_some(&*bias);
    let factors = Factors::new(gpu, m, n, rank, 4, false);
    let adapter = factors.adapter();
    let (mut one, mut two) = (gpu.alloc(m * n).unwrap(), gpu.alloc(m * n).unwrap());
    let weight = Weight { w: &w, bias, adapter };
    let (columns, of_y) = (tile.whole(n), adapter.map(Into::into));
    let found = rotate(gpu, columns, &x, weight, of_y, &mut one, m, k, n, &table, &positions);
    let found = found.map(|()| vec![gpu.downloaded(&one).unwrap()]);
    let way = Way::Hopper(tile);
    nt_by(gpu, way, &x, &w, Before::Nothing, &mut two, m, k, n, bias, adapter, whole()).unwrap();
    rope::forward(gpu, &table, &mut two, heads, &positions).unwrap();
    same(found, vec![gpu.downloaded(&two).unwrap()])
}

fn rotations_are_right(gpu: &Gpu) -> bool {
    rotation_is_right(gpu, WIDE, 128, [300, 200, 5, 16], true)
        && rotation_is_right(gpu, NARROW, 64, [300, 72, 5, 0], false)
}

#[test]
fn a_rotated_product_has_the_bits_of_product_and_rotation() {
    for seed in 0..SEEDS {
        assert!(rotations_are_right(&gpu(seed)), "seed {seed}");
    }
    assert!(rotation_is_right(&gpu(1), WIDE, 64, [70, 136, 3, 80], true));
    assert!(rotation_is_right(&gpu(2), NARROW, 128, [130, 136, 3, 0], true));
}

fn activation_is_right(gpu: &Gpu, [m, k, n]: [usize; 3], ranks: [usize; 2]) -> bool {
    let x = gpu.uploaded(&random_bf16(m * k, 1)).unwrap();
    let w = [2, 3].map(|seed| gpu.uploaded(&random_bf16(n * k, seed)).unwrap());
    let factors = [0, 1].map(|i| Factors::new(gpu, m, n, ranks[i], 4 + 2 * i as u64, false));
    let weights = [0, 1].map(|i| Weight { w: &w[i], bias: None, adapter: factors[i].adapter() });
    let mut one = [(); 3].map(|()| gpu.alloc(m * n).unwrap());
    let mut two = [(); 3].map(|()| gpu.alloc(m * n).unwrap());
    let [gate, up, out] = &mut one;
    let arena = Arena::new(gpu, 0).unwrap();
    let next = Next::new(gpu, m, n, ranks[0]);
    let mut u = gpu.alloc(next.u_len(m)).unwrap();
    let (of_next, all) = (next.of(&mut u), Activating::default());
    let found = activate_rest(gpu, &arena, &x, weights, gate, up, out, of_next, m, k, n, all);
    let found: Result<Vec<_>> =
        found.map(|()| one.iter().map(|y| gpu.downloaded(y).unwrap()).collect());
    if let Ok(found) = &found {
        let u = gpu.downloaded(&u).unwrap();
        let accurate = || next.assert_accurate(&found[2], &u);
        if catch_unwind(AssertUnwindSafe(accurate)).is_err() {
            return false;
        }
    }
    let [gate, up, out] = &mut two;
    for (i, y) in [&mut *gate, &mut *up].into_iter().enumerate() {
        let adapter = weights[i].adapter;
        let way = Way::Hopper(WIDE);
        nt_by(gpu, way, &x, &w[i], Before::Nothing, y, m, k, n, None, adapter, whole()).unwrap();
    }
    activation::forward(gpu, gate, up, out).unwrap();
    same(found, two.iter().map(|y| gpu.downloaded(y).unwrap()).collect())
}

/// The adapter of what reads what was activated, `[m, n]`; for rank 0, none.
struct Next {
    a: Vec<bf16>,
    on: crate::cuda::DeviceBuffer<bf16>,
    rank: usize,
}

impl Next {
    fn new(gpu: &Gpu, m: usize, n: usize, rank: usize) -> Self {
        let mut a = random_bf16(rank * n, 90 + m as u64);
        a.resize(padded(rank) * n, bf16::ZERO);
        Self { on: gpu.uploaded(&a).unwrap(), a, rank }
    }

    fn u_len(&self, m: usize) -> usize {
        m * padded(self.rank)
    }

    fn of<'a>(&'a self, u: &'a mut DeviceSlice<bf16>) -> Option<Projected<'a>> {
        (self.rank > 0).then_some(Projected { a: &self.on, u, rank: self.rank, b: None })
    }

    fn assert_accurate(&self, out: &[bf16], u: &[bf16]) {
        if self.rank == 0 {
            return;
        }
        let (m, n) = (u.len() / padded(self.rank), self.a.len() / padded(self.rank));
        let sides = (m, n, padded(self.rank));
        let (of_out, of_a) = (|t, i| out[t * n + i], |i, r: usize| self.a[r * n + i]);
        let plain = round(&sum_of_products::<f32>(sides, of_out, of_a));
        let exact = sum_of_products::<f64>(sides, of_out, of_a);
        assert_accurate_bf16(&format!("u, rank {}", self.rank), u, &plain, &exact);
    }
}

fn activations_are_right(gpu: &Gpu) -> bool {
    // Three pieces and one of the second tile, so that the staged ones do not alternate from tile to tile.
    activation_is_right(gpu, [300, 328, 200], [16, 80])
        && activation_is_right(gpu, [600, 72, 136], [0, 8])
        && activation_is_right(gpu, [70, 8, 328], [20, 0])
}

/// A row of u has the same bits in any company, and in any order of threads.
#[test]
fn what_is_projected_does_not_depend_on_its_company() {
    let (k, n, rank) = (72, 328, 20);
    let run = |seed: u64, m: usize| {
        let gpu = gpu(seed);
        let arena = Arena::new(&gpu, 0).unwrap();
        let x = gpu.uploaded(&random_bf16(300 * k, 1)[..m * k]).unwrap();
        let w = [2, 3].map(|seed| gpu.uploaded(&random_bf16(n * k, seed)).unwrap());
        let weights = [0, 1].map(|i| Weight { w: &w[i], bias: None, adapter: None });
        let mut made = [(); 3].map(|()| gpu.alloc(m * n).unwrap());
        let [gate, up, out] = &mut made;
        let next = Next::new(&gpu, 0, n, rank);
        let mut u = gpu.alloc(next.u_len(m)).unwrap();
        let (of_next, all) = (next.of(&mut u), Activating::default());
        activate_rest(&gpu, &arena, &x, weights, gate, up, out, of_next, m, k, n, all).unwrap();
        bits(&gpu.downloaded(&u).unwrap())
    };
    let all = run(0, 300);
    for (m, seed) in [(300, 1), (129, 2), (64, 3), (1, 0)] {
        assert!(run(seed, m) == all[..m * padded(rank)], "{m} of 300 rows");
    }
}

#[test]
fn an_activated_product_has_the_bits_of_products_and_activation() {
    for seed in 0..SEEDS {
        assert!(activations_are_right(&gpu(seed)), "seed {seed}");
    }
    assert!(activation_is_right(&gpu(1), [1, 8, 8], [1, 0]));
}

/// An adapter of what made gate or up, `[m, i]`; for rank 0, none.
struct Previous {
    b: Vec<bf16>,
    on: crate::cuda::DeviceBuffer<bf16>,
    du: crate::cuda::DeviceBuffer<bf16>,
    rank: usize,
}

impl Previous {
    fn new(gpu: &Gpu, m: usize, i: usize, rank: usize, seed: u64) -> Self {
        let b = random_padded(i, rank, seed);
        let du = gpu.alloc(m * padded(rank)).unwrap();
        Self { on: gpu.uploaded(&b).unwrap(), b, du, rank }
    }

    fn pulled(&mut self) -> Option<Pulled<'_>> {
        let Self { on, du, rank, .. } = self;
        (*rank > 0).then_some(Pulled { b: on, du, rank: *rank, a: None })
    }

    fn assert_accurate(&self, gpu: &Gpu, dy: &[bf16]) {
        if self.rank == 0 {
            return;
        }
        let du = gpu.downloaded(&self.du).unwrap();
        let pitch = padded(self.rank);
        let (m, i) = (du.len() / pitch, self.b.len() / pitch);
        let (of_dy, of_b) = (|t, l| dy[t * i + l], |l, r: usize| self.b[l * pitch + r]);
        let plain = round(&sum_of_products::<f32>((m, i, pitch), of_dy, of_b));
        let exact = sum_of_products::<f64>((m, i, pitch), of_dy, of_b);
        assert_accurate_bf16(&format!("du, rank {}", self.rank), &du, &plain, &exact);
    }
}

/// `ranks`: of the adapter of what reads what was activated, and of those of gate and up.
fn backward_is_right(gpu: &Gpu, [m, n, i]: [usize; 3], [rank, ranks @ ..]: [usize; 3]) -> bool {
    let dy = gpu.uploaded(&random_bf16(m * n, 1)).unwrap();
    let w = gpu.uploaded(&random_bf16(n * i, 2)).unwrap();
    let factors = Factors::new(gpu, m, i, rank, 5, true);
    let adapter = factors.adapter();
    // gate, up and what is activated, which not everybody wants.
    let all = || [3, 4, 5].map(|seed| gpu.uploaded(&random_bf16(m * i, seed)).unwrap());
    let with_act = rank > 0;
    let (mut one, mut two) = (all(), all());
    let arena = Arena::new(gpu, 0).unwrap();
    let mut before = [0, 1].map(|at| Previous::new(gpu, m, i, ranks[at], 7 + at as u64));
    let pulled = before.each_mut().map(Previous::pulled);
    let [gate, up, act] = &mut one;
    let act = with_act.then_some(&mut **act);
    let (of_w, none) = (adapter, Vec::new());
    let found = activate_backward(gpu, &arena, &dy, &w, of_w, gate, up, act, pulled, none, m, n, i);
    let found: Result<Vec<_>> =
        found.map(|()| one.iter().map(|y| gpu.downloaded(y).unwrap()).collect());
    if let Ok(found) = &found {
        let accurate = || {
            for (before, dy) in before.iter().zip(found) {
                before.assert_accurate(gpu, dy);
            }
        };
        if catch_unwind(AssertUnwindSafe(accurate)).is_err() {
            return false;
        }
    }
    let mut dout = gpu.alloc(m * i).unwrap();
    nn_by(gpu, Way::Hopper(WIDE), &dy, &w, &mut dout, m, n, i, 0.0, adapter).unwrap();
    let [gate, up, act] = &mut two;
    activation::backward(gpu, &dout, gate, up, with_act.then_some(&mut **act)).unwrap();
    same(found, two.iter().map(|y| gpu.downloaded(y).unwrap()).collect())
}

fn backwards_are_right(gpu: &Gpu) -> bool {
    backward_is_right(gpu, [300, 264, 328], [16, 16, 9])
        && backward_is_right(gpu, [600, 72, 520], [0, 0, 16])
        && backward_is_right(gpu, [70, 8, 328], [0, 20, 32])
}

#[test]
fn an_activations_gradient_has_the_bits_of_product_and_slopes() {
    for seed in 0..SEEDS {
        assert!(backwards_are_right(&gpu(seed)), "seed {seed}");
    }
    assert!(backward_is_right(&gpu(1), [1, 8, 8], [80, 1, 0]));
}

/// A row of du has the same bits in any company, and in any order of threads.
#[test]
fn what_is_pulled_does_not_depend_on_its_company() {
    let (n, i, rank) = (72, 328, 20);
    let run = |seed: u64, m: usize| {
        let gpu = gpu(seed);
        let arena = Arena::new(&gpu, 0).unwrap();
        let rows = |width: usize, seed| gpu.uploaded(&random_bf16(300 * width, seed)[..m * width]);
        let (dy, w) = (rows(n, 1).unwrap(), gpu.uploaded(&random_bf16(n * i, 2)).unwrap());
        let (mut gate, mut up) = (rows(i, 3).unwrap(), rows(i, 4).unwrap());
        let mut before = [7, 8].map(|seed| Previous::new(&gpu, m, i, rank, seed));
        let pulled = before.each_mut().map(Previous::pulled);
        let (gate, up, none) = (&mut gate, &mut up, Vec::new());
        activate_backward(&gpu, &arena, &dy, &w, None, gate, up, None, pulled, none, m, n, i)
            .unwrap();
        before.map(|before| bits(&gpu.downloaded(&before.du).unwrap()))
    };
    let all = run(0, 300);
    for (m, seed) in [(300, 1), (129, 2), (64, 3), (1, 0)] {
        for (some, all) in run(seed, m).iter().zip(&all) {
            assert!(*some == all[..m * padded(rank)], "{m} of 300 rows");
        }
    }
}

/// Gradients `[72, 5]` that have waited.
fn waiting<'a>(
    dy: &'a DeviceSlice<bf16>,
    u: &'a DeviceSlice<bf16>,
    db: &'a mut [DeviceBuffer<f32>; 2],
) -> Vec<Gradient<'a>> {
    let each = db.iter_mut();
    each.map(|db| Gradient::B(GradientOfB { dy, u, db, rank: 5, scale: 2.0 })).collect()
}

#[test]
fn shapes_and_devices_choose_between_one_kernel_and_several() {
    let (m, k, n) = (3, 8, 1024);
    for (gpu, one) in [(Gpu::emulated_hopper(0).unwrap(), true), (Gpu::emulated(0).unwrap(), false)]
    {
        assert_eq!(Tile::of(&gpu, k, n) == Some(WIDE), one);
        let arena = Arena::new(&gpu, 1 << 20).unwrap();
        let [x, w, v] = [(m * k, 1), (n * k, 2), (n * k, 3)]
            .map(|(len, seed)| gpu.uploaded(&random_bf16(len, seed)).unwrap());
        let weights = [&w, &v].map(|w| Weight { w, bias: None, adapter: None });
        let mut made = [(); 6].map(|()| gpu.alloc(m * n).unwrap());
        let [gate, up, out, again, added, turned] = &mut made;
        let next = Next::new(&gpu, m, n, 16);
        let mut u = gpu.alloc(next.u_len(m)).unwrap();
        let of_next = next.of(&mut u);
        let all = Activating::default();
        nt_swiglu(&gpu, &arena, &x, weights, gate, up, out, of_next, m, k, n, all).unwrap();
        next.assert_accurate(&gpu.downloaded(out).unwrap(), &gpu.downloaded(&u).unwrap());
        nt_added(&gpu, &x, weights[0], Some(out), added, m, k, n, whole()).unwrap();
        // w as [k, n]. Of one adapter, du is made with its gradients where that is one kernel, of the other after it.
        let act = Some(&mut **again);
        let mut before = [16, 20].map(|rank| Previous::new(&gpu, m, n, rank, 6));
        let pulled = before.each_mut().map(Previous::pulled);
        // Of what has waited, more than the kernel takes.
        let dy = gpu.uploaded(&random_bf16(m * 72, 8)).unwrap();
        let u = gpu.uploaded(&random_padded(m, 5, 9)).unwrap();
        let zeros = [0.0f32; 72 * 5];
        let [mut db, mut alone] = [(); 2].map(|()| [(); 2].map(|()| gpu.uploaded(&zeros).unwrap()));
        let (of_b, none) = (waiting(&dy, &u, &mut db), None);
        nn_swiglu_backward(&gpu, &arena, &x, &w, none, gate, up, act, pulled, of_b, m, k, n)
            .unwrap();
        add_to_gradients(&gpu, &arena, waiting(&dy, &u, &mut alone), m).unwrap();
        for (db, alone) in db.iter().zip(&alone) {
            let db = gpu.downloaded(db).unwrap();
            assert!(db != zeros && db == gpu.downloaded(alone).unwrap());
        }
        for (before, dy) in before.iter().zip([&*gate, &*up]) {
            before.assert_accurate(&gpu, &gpu.downloaded(dy).unwrap());
        }
        assert_eq!(gpu.downloaded(again).unwrap(), gpu.downloaded(out).unwrap());
        let rope = Rope::new(vec![1.0; 32], 1.0);
        let table = rope::Table::new(&gpu, &rope, 4).unwrap();
        let positions = gpu.uploaded(&[0u32, 1, 2]).unwrap();
        nt_rope(&gpu, &x, weights[0], turned, m, k, n, &table, &positions, whole()).unwrap();
        assert!(made.iter().all(|y| gpu.downloaded(y).unwrap().iter().all(|y| y.is_finite())));
    }
}

fn assert_caught(
    right: impl Fn(&Gpu) -> bool,
    file: &'static str,
    faults: &[(&'static str, &'static str)],
) {
    for &(from, to) in faults {
        let faulty =
            |seed| Gpu::emulated_hopper_with_fault(seed, Fault { file, from, to }).unwrap();
        let caught = (0..SEEDS).any(|seed| !right(&faulty(seed)));
        assert!(caught, "{file}: nothing is wrong with {to:?} for {from:?}");
    }
}

#[test]
fn faults_in_rotations_are_caught() {
    let faults = [
        ("PIECES == 2 || head == 0", "false"),
        ("bool known = position < table_rows;", "bool known = position <= table_rows;"),
        ("part.thread % 4 * 4;", "part.thread % 4 * 2;"),
        ("sum + HALF / 2, bias_at + HALF", "sum + HALF / 2, bias_at"),
        ("start / 64 + piece) % 2, out", "piece) % 2, out"),
        ("at % 64 / 8)", "at % 32 / 8)"),
        ("sign[half] * two.w", "two.w"),
    ];
    assert_caught(rotations_are_right, "hopper_rope.cu", &faults);
}

#[test]
fn faults_in_activations_are_caught() {
    let faults = [
        ("of_x || up_half == of_up ? corner.y : columns", "corner.y"),
        ("up_half ? w_up : w_gate", "w_gate"),
        ("of_up ? u_up : u_gate", "u_gate"),
        ("make_int2(1, slice - of_gate)", "make_int2(1, slice)"),
        ("await_place(part, piece == 0);", "await_place(part, false);"),
        // u.
        ("if (pair < columns) right", "right"),
        ("if (at >= rows) continue;", ""),
        ("if (group >= groups) break;\n#pragma unroll\n            for (int half", "for (int half"),
        ("project(part, left, first + 4 * i, u);", "project(part, left, column + 4 * i, u);"),
        ("(size_t(at) * groups + group) * 16", "(size_t(at) + group) * 16"),
        (
            "float2 g = rounded(gates[i], gates[i + 1])",
            "float2 g = make_float2(gates[i], gates[i + 1])",
        ),
        (
            "            await_place(part, false);\n            fill_piece(staged_piece(shared, part, at)",
            "            fill_piece(staged_piece(shared, part, at)",
        ),
    ];
    assert_caught(activations_are_right, "hopper_swiglu.cu", &faults);
}

#[test]
fn faults_in_activations_gradients_are_caught() {
    let faults = [
        ("tma_store_wait<0>(); // or what comes next would land on it", ""),
        ("activated(upper, ups.y)", "activated(upper, ups.x)"),
        ("await_piece(shared, part, at + 1, parities);", ""),
        (
            "ask(shared, part, piece + 2, row, column);",
            "ask(shared, part, piece + 1, row, column);",
        ),
        (
            "float2 dout = rounded(sums[sum], sums[sum + 1])",
            "float2 dout = make_float2(sums[sum], sums[sum + 1])",
        ),
        ("u[i] = pack_bf16(low.y, high.y);", "u[i] = pack_bf16(low.x, high.y);"),
        ("if (column + 64 * piece < columns) ask", "ask"),
        // du.
        ("bool inside = b && column < columns;", "bool inside = b;"),
        ("if (at >= rows) break;", ""),
        (
            "of_up.load(part, first + 8 * group, columns, b_up);",
            "of_up.load(part, first, columns, b_up);",
        ),
        ("pair + 16 * (RANK_GROUPS + group)", "pair + 16 * group"),
        ("(first & 0xffff) | second << 16", "first"),
        ("of_up.add(u, b_up, du_up);", "of_up.add(u, b_gate, du_up);"),
        ("size_t(column / TILE_N) * rows * 16 * RANK_GROUPS;", "0;"),
        ("odd[2 * half], even[2 * half + 1]", "even[2 * half + 1], odd[2 * half]"),
    ];
    assert_caught(backwards_are_right, "hopper_swiglu.cu", &faults);
    // Down's input, over one that the first thread has not seen leave.
    let fault =
        [("hopper_swiglu.cu", "if (with_act) part.sync(); // nor on what is activated", "")];
    let check = |gpu: &Gpu| assert!(backwards_are_right(gpu));
    assert_faults_are_caught_holding_back(HeldBack::Warp(4), check, &fault);
}
