//! Products that have begun with u of adapters: u against f64, and the product has the bits of one that has not.

use super::*;

/// Adapters of layers that read x `[m, k]`, and b `[n, R]` of the first.
struct Readers {
    ranks: [usize; 3],
    a: Vec<Vec<bf16>>,
    on: Vec<DeviceBuffer<bf16>>,
    b: DeviceBuffer<bf16>,
    made: Vec<DeviceBuffer<bf16>>,
}

impl Readers {
    /// Of rank 0 are none.
    fn new(gpu: &Gpu, [m, k, n]: [usize; 3], ranks: [usize; 3]) -> Self {
        let a = [0, 1, 2].map(|i| {
            let mut a = random_bf16(ranks[i] * k, 50 + i as u64);
            a.resize(padded(ranks[i]) * k, bf16::ZERO);
            a
        });
        let on = a.iter().map(|a| gpu.uploaded(a).unwrap()).collect();
        let made = ranks.iter().map(|rank| gpu.alloc(m * padded(*rank)).unwrap()).collect();
        let b = gpu.uploaded(&random_padded(n, ranks[0], 60)).unwrap();
        Self { ranks, a: a.into(), on, b, made }
    }

    /// `longs`: b of which of them are the product's own.
    fn projected<'a>(&'a mut self, longs: [Option<&'a DeviceSlice<bf16>>; 3]) -> Projections<'a> {
        let Self { ranks, on, made, .. } = self;
        let mut each = made.iter_mut().zip(on.iter()).zip(ranks.iter()).zip(longs);
        [(); 3].map(|()| {
            let (((u, a), rank), b) = each.next()?;
            (*rank > 0).then_some(Projected { a, u, rank: *rank, b })
        })
    }

    fn assert_accurate(&self, gpu: &Gpu, x: &[bf16], k: usize) {
        for ((rank, a), u) in self.ranks.iter().zip(&self.a).zip(&self.made) {
            let (u, pitch) = (gpu.downloaded(u).unwrap(), padded(*rank));
            let sides = (u.len() / pitch.max(1), k, pitch);
            let of_x = |t: usize, l: usize| x[t * k + l];
            let of_a = |l: usize, r: usize| a[r * k + l];
            let plain = round(&sum_of_products::<f32>(sides, of_x, of_a));
            assert_accurate_bf16("u", &u, &plain, &sum_of_products::<f64>(sides, of_x, of_a));
        }
    }

    /// The first's part in a product.
    fn own(&self) -> Option<Adapter<'_>> {
        let [rank, ..] = self.ranks;
        (rank > 0).then(|| Adapter { left: &self.made[0], right: &self.b, rank })
    }
}

fn accurate(readers: &Readers, gpu: &Gpu, x: &[bf16], k: usize) -> bool {
    catch_unwind(AssertUnwindSafe(|| readers.assert_accurate(gpu, x, k))).is_ok()
}

/// Whether a run that may have failed was right.
fn is_right(found: Result<bool>) -> bool {
    found.unwrap_or_else(|error| {
        assert!(error.to_string().starts_with("kernel "), "{error}");
        false
    })
}

/// `nt` with a bias and what is added to.
fn sum_is_right(gpu: &Gpu, sides: [usize; 3], ranks: [usize; 3]) -> bool {
    let [m, k, n] = sides;
    let x = random_bf16(m * k, 1);
    let on_x = gpu.uploaded(&x).unwrap();
    let w = gpu.uploaded(&random_bf16(n * k, 2)).unwrap();
    let (bias, before) = (random_bf16(n, 3), random_bf16(m * n, 4));
    let (bias, before) = (gpu.uploaded(&bias).unwrap(), gpu.uploaded(&before).unwrap());
    let (bias, before) = (Some(&*bias), Some(&*before));
    let mut readers = Readers::new(gpu, sides, ranks);
    let b = gpu.uploaded(&gpu.downloaded(&readers.b).unwrap()).unwrap();
    let (mut one, mut two) = (gpu.alloc(m * n).unwrap(), gpu.alloc(m * n).unwrap());
    let projected = readers.projected([Some(&b), None, None]);
    let begun = add_first(gpu, &on_x, (&w, bias), projected, before, &mut one, m, k, n);
    is_right(begun.and_then(|begun| {
        assert!(begun.columns > 0);
        let (way, adapter) = (Way::Hopper(WIDE), readers.own());
        let old = Before::Other(before.unwrap());
        nt_by(gpu, way, &on_x, &w, old, &mut one, m, k, n, bias, adapter, begun)?;
        nt_by(gpu, way, &on_x, &w, old, &mut two, m, k, n, bias, adapter, whole())?;
        Ok(accurate(&readers, gpu, &x, k)
            && bits(&gpu.downloaded(&one)?) == bits(&gpu.downloaded(&two)?))
    }))
}

fn rotation_is_right(gpu: &Gpu, [m, k, heads]: [usize; 3], ranks: [usize; 3]) -> bool {
    let (head_dim, n) = (128, heads * 128);
    let rope = Rope::new((0..head_dim / 2).map(|i| 0.9f64.powi(i)).collect(), 1.0);
    let table = rope::Table::new(gpu, &rope, 40).unwrap();
    let positions: Vec<u32> = (0..m as u32).map(|t| t * 7 % 40).collect();
    let positions = gpu.uploaded(&positions).unwrap();
    let x = random_bf16(m * k, 1);
    let on_x = gpu.uploaded(&x).unwrap();
    let w = gpu.uploaded(&random_bf16(n * k, 2)).unwrap();
    let mut readers = Readers::new(gpu, [m, k, n], ranks);
    let b = gpu.uploaded(&gpu.downloaded(&readers.b).unwrap()).unwrap();
    let (mut one, mut two) = (gpu.alloc(m * n).unwrap(), gpu.alloc(m * n).unwrap());
    let weight = Weight { w: &w, bias: None, adapter: None };
    let projected = readers.projected([Some(&b), None, None]);
    let begun = rotate_first(gpu, &on_x, weight, projected, &mut one, m, k, n, &table, &positions);
    is_right(begun.and_then(|begun| {
        let own = readers.own().map(Into::into);
        let rest = Columns::rest(WIDE, 256, n, begun);
        rotate(gpu, rest, &on_x, weight, own, &mut one, m, k, n, &table, &positions)?;
        let all = WIDE.whole(n);
        rotate(gpu, all, &on_x, weight, own, &mut two, m, k, n, &table, &positions)?;
        Ok(accurate(&readers, gpu, &x, k)
            && bits(&gpu.downloaded(&one)?) == bits(&gpu.downloaded(&two)?))
    }))
}

/// `ranks`: gate's, up's, and that of what reads what is activated.
fn activation_is_right(
    gpu: &Gpu,
    [m, k, n]: [usize; 3],
    [of_gate, of_up, next]: [usize; 3],
) -> bool {
    let x = random_bf16(m * k, 1);
    let on_x = gpu.uploaded(&x).unwrap();
    let w = [2, 3].map(|seed| gpu.uploaded(&random_bf16(n * k, seed)).unwrap());
    let mut readers = Readers::new(gpu, [m, k, n], [of_gate, of_up, 0]);
    let b_gate = gpu.uploaded(&gpu.downloaded(&readers.b).unwrap()).unwrap();
    let b_up = gpu.uploaded(&random_padded(n, of_up, 61)).unwrap();
    let plain = [0, 1].map(|i| Weight { w: &w[i], bias: None, adapter: None });
    let next = Next::new(gpu, m, n, next);
    let arena = Arena::new(gpu, 1 << 20).unwrap();
    let mut one = [(); 3].map(|()| gpu.alloc(m * n).unwrap());
    let mut two = [(); 3].map(|()| gpu.alloc(m * n).unwrap());
    let mut u = [(); 2].map(|()| gpu.alloc(next.u_len(m)).unwrap());
    let [gate, up, out] = &mut one;
    let projected = readers.projected([Some(&b_gate), Some(&b_up), None]);
    let of_next = (next.rank > 0).then_some((&*next.on, next.rank));
    let begun =
        activate_first(gpu, &arena, &on_x, plain, projected, gate, up, out, of_next, m, k, n);
    is_right(begun.and_then(|begun| {
        let of = |i: usize, b, rank| Adapter { left: &readers.made[i], right: b, rank };
        let adapters = [(0, &b_gate, of_gate), (1, &b_up, of_up)]
            .map(|(i, b, rank)| (rank > 0).then(|| of(i, b, rank)));
        let weights = [0, 1].map(|i| Weight { adapter: adapters[i], ..plain[i] });
        let ([gate, up, out], [first, second]) = (&mut one, &mut u);
        let now = next.of(first);
        activate_rest(gpu, &arena, &on_x, weights, gate, up, out, now, m, k, n, begun)?;
        let ([gate, up, out], now) = (&mut two, next.of(second));
        let all = Activating::default();
        activate_rest(gpu, &arena, &on_x, weights, gate, up, out, now, m, k, n, all)?;
        let bits = |y: &DeviceBuffer<bf16>| Ok(bits(&gpu.downloaded(y)?));
        let all = one.iter().zip(&two).chain([(&u[0], &u[1])]);
        let same: Result<Vec<bool>> = all.map(|(one, two)| Ok(bits(one)? == bits(two)?)).collect();
        Ok(same?.into_iter().all(|same| same) && accurate(&readers, gpu, &x, k))
    }))
}

fn sums_are_right(gpu: &Gpu) -> bool {
    // A launch for the first columns and one for the rest, both of more tiles than clusters.
    sum_is_right(gpu, [300, 1096, 600], [16, 5, 16])
        // All in one, whose ring goes round.
        && sum_is_right(gpu, [270, 328, 296], [20, 0, 30])
        && sum_is_right(gpu, [70, 72, 264], [0, 16, 0])
}

fn rotations_are_right(gpu: &Gpu) -> bool {
    rotation_is_right(gpu, [300, 1096, 5], [16, 16, 16])
        && rotation_is_right(gpu, [65, 136, 3], [8, 0, 0])
}

fn activations_are_right(gpu: &Gpu) -> bool {
    activation_is_right(gpu, [300, 1096, 328], [16, 20, 16])
        && activation_is_right(gpu, [130, 72, 200], [0, 64, 0])
        && activation_is_right(gpu, [70, 136, 136], [16, 0, 20])
}

#[test]
fn a_sum_that_has_begun_has_the_bits_of_one_that_has_not() {
    (0..SEEDS).for_each(|seed| assert!(sums_are_right(&gpu(seed)), "seed {seed}"));
}

#[test]
fn a_rotation_that_has_begun_has_the_bits_of_one_that_has_not() {
    (0..SEEDS).for_each(|seed| assert!(rotations_are_right(&gpu(seed)), "seed {seed}"));
}

#[test]
fn an_activation_that_has_begun_has_the_bits_of_one_that_has_not() {
    (0..SEEDS).for_each(|seed| assert!(activations_are_right(&gpu(seed)), "seed {seed}"));
}

/// A row of u has the same bits in any company, and in any order of threads.
#[test]
fn what_begins_a_product_does_not_depend_on_its_company() {
    let (k, n) = (136, 264);
    let run = |seed: u64, m: usize| {
        let gpu = gpu(seed);
        let x = gpu.uploaded(&random_bf16(300 * k, 1)[..m * k]).unwrap();
        let w = gpu.uploaded(&random_bf16(n * k, 2)).unwrap();
        let mut readers = Readers::new(&gpu, [m, k, n], [16, 8, 0]);
        let b = gpu.uploaded(&random_padded(n, 16, 60)).unwrap();
        let (mut y, projected) =
            (gpu.alloc(m * n).unwrap(), readers.projected([Some(&b), None, None]));
        let _ = add_first(&gpu, &x, (&w, None), projected, None, &mut y, m, k, n).unwrap();
        readers.made.iter().map(|u| bits(&gpu.downloaded(u).unwrap())).collect::<Vec<_>>()
    };
    let all = run(0, 300);
    for (m, seed) in [(300, 1), (129, 2), (64, 3), (1, 0)] {
        for (some, all) in run(seed, m).iter().zip(&all) {
            assert!(*some == all[..m * all.len() / 300], "{m} of 300 rows");
        }
    }
}

/// Whether a product has the bits that it has alone where another reader's u is infinite.
fn company_is_kept_out(gpu: &Gpu) -> bool {
    let (m, k, n) = (70, 72, 264);
    let x = gpu.uploaded(&random_bf16(m * k, 1)).unwrap();
    let w = gpu.uploaded(&random_bf16(n * k, 2)).unwrap();
    let [alone, beside] = [0, 16].map(|second| {
        let mut readers = Readers::new(gpu, [m, k, n], [16, second, 0]);
        readers.on[1] = gpu.uploaded(&vec![bf16::INFINITY; padded(second) * k]).unwrap();
        let b = gpu.uploaded(&random_padded(n, 16, 60)).unwrap();
        let (mut y, of) = (gpu.alloc(m * n).unwrap(), readers.projected([Some(&b), None, None]));
        let begun = add_first(gpu, &x, (&w, None), of, None, &mut y, m, k, n).unwrap();
        assert_eq!(begun.columns, n);
        bits(&gpu.downloaded(&y).unwrap())
    });
    alone == beside
}

#[test]
fn what_is_infinite_beside_a_product_stays_there() {
    assert!(company_is_kept_out(&gpu(0)));
    assert_caught(company_is_kept_out, "hopper_short.cuh", &[("k < length && ", "")]);
}

#[test]
fn ranks_and_weights_choose_where_u_is_made() {
    let gpu = Gpu::emulated_hopper(0).unwrap();
    let (m, k) = (3, 8);
    for (n, ranks, beside) in [
        (1024, [16, 16, 16], true),
        (1024, [32, 32, 0], true),
        // More than a kernel takes, tiles of another kind, and nothing to be made.
        (1024, [64, 1, 0], false),
        (512, [16, 0, 0], false),
        (1024, [0, 0, 0], false),
    ] {
        let x = random_bf16(m * k, 1);
        let on_x = gpu.uploaded(&x).unwrap();
        let w = gpu.uploaded(&random_bf16(n * k, 2)).unwrap();
        let mut readers = Readers::new(&gpu, [m, k, n], ranks);
        let b = gpu.uploaded(&random_padded(n, ranks[0], 60)).unwrap();
        let (mut y, projected) =
            (gpu.alloc(m * n).unwrap(), readers.projected([Some(&b), None, None]));
        let weight = Weight { w: &w, bias: None, adapter: None };
        let begun = begin_added(&gpu, &on_x, weight, projected, None, &mut y, m, k, n).unwrap();
        assert_eq!(begun.columns > 0, beside, "{n} columns, ranks {ranks:?}");
        readers.assert_accurate(&gpu, &x, k);
    }
}

#[test]
fn faults_in_short_sides_are_caught() {
    let faults = [
        // Boxes.
        ("*a, full, k, 16 * inside, 3);", "*a, full, k, 0, 3);"),
        ("piece + group * 16 * ROW_BYTES", "piece"),
        ("group += CLUSTER) {", "group += 1) {"),
        // Fragments.
        ("sums[8 * group + 2 * i + 1])", "sums[8 * group + 2 * i])"),
        ("group == begin + k)", "group == k)"),
        // What is written.
        ("if (corner.y > 0) return;", "if (corner.y == 0) return;"),
        ("if (group >= groups) break;", ""),
        ("if (row >= rows) continue;", ""),
        ("made.length(made.index(group), groups)", "groups"),
        ("packed[group][2 * j + half]", "packed[group][2 * half + j]"),
    ];
    let right = |gpu: &Gpu| sums_are_right(gpu) && activations_are_right(gpu);
    assert_caught(right, "hopper_short.cuh", &faults);
    let faults = [
        ("RIGHT_BYTES + (of_weight ? LEFT_BYTES + Short::BYTES : 0)", "STAGE_BYTES"),
        ("if (of_weight) sides.load", "if (slice > 0 && of_weight) sides.load"),
        (
            "stage() + LEFT_BYTES + RIGHT_BYTES, k), add)",
            "stage() + LEFT_BYTES + RIGHT_BYTES, k), true)",
        ),
        (
            "            wgmma_commit();\n            wgmma_wait<0>();\n",
            "            wgmma_commit();\n",
        ),
        ("            release(shared, turn.stage, part.thread);\n", ""),
        ("            wgmma_fence();\n#pragma unroll", "#pragma unroll"),
        (
            "terms.place(slice).x, left);\n            barrier_wait(shared.full + turn.stage, turn.parity);",
            "terms.place(slice).x, left);",
        ),
        ("first + inside / height * width", "inside / height * width"),
    ];
    assert_caught(right, "hopper_product.cuh", &faults);
}
