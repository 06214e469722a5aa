//! The way back that has begun with du: du against f64, and all else has the bits of one that has not.

use super::*;
use crate::cuda::{DeviceBuffer, Fault};
use crate::matmul::cuda::tests::{bits, random_padded, sum_of_products};
use crate::testing::{assert_accurate_bf16, hopper_gpu, random, random_bf16, round};
use std::panic::{AssertUnwindSafe, catch_unwind};

const SCALE: f32 = 0.5;

/// Depths and ranks of layers with one input; of rank 0 are none.
struct Case {
    m: usize,
    k: usize,
    layers: &'static [(usize, usize)],
    clusters: u32,
    /// How many columns come first, and how many tasks at most with them.
    columns: usize,
    tasks: usize,
}

/// A layer's matrices.
struct Matrices {
    dy: Vec<bf16>,
    b: Vec<bf16>,
    on_dy: DeviceBuffer<bf16>,
    w: DeviceBuffer<bf16>,
    a: DeviceBuffer<bf16>,
    on_b: DeviceBuffer<bf16>,
    u: DeviceBuffer<bf16>,
}

/// The bits of dx and of all dB, and du.
type Made = (Vec<u16>, Vec<Vec<u32>>, Vec<Vec<bf16>>);

impl Case {
    fn matrices(&self, gpu: &Gpu) -> Result<Vec<Matrices>> {
        let (m, k) = (self.m, self.k);
        let each = self.layers.iter().zip((0..).step_by(10)).map(|(&(n, rank), seed)| {
            let mut a = random_bf16(rank * k, seed + 3);
            a.resize(padded(rank) * k, bf16::ZERO);
            let (dy, b) = (random_bf16(m * n, seed + 1), random_padded(n, rank, seed + 4));
            Ok(Matrices {
                on_dy: gpu.uploaded(&dy)?,
                w: gpu.uploaded(&random_bf16(n * k, seed + 2))?,
                a: gpu.uploaded(&a)?,
                on_b: gpu.uploaded(&b)?,
                u: gpu.uploaded(&random_padded(m, rank, seed + 5))?,
                dy,
                b,
            })
        });
        each.collect()
    }

    /// From this du in one launch, or where there is none in two, of which the first makes it.
    fn run(&self, gpu: &Gpu, given: Option<&[Vec<bf16>]>) -> Result<Made> {
        let (m, k) = (self.m, self.k);
        let of = self.matrices(gpu)?;
        let each = || of.iter().zip(self.layers.iter().copied());
        let (mut du, mut db) = (Vec::new(), Vec::new());
        for (i, &(n, rank)) in self.layers.iter().enumerate() {
            du.push(match given {
                Some(du) => gpu.uploaded(&du[i])?,
                None => gpu.alloc(m * padded(rank))?,
            });
            db.push(gpu.uploaded(&random(n * rank, 6))?);
        }
        let of_b = each().zip(&mut db).filter(|((_, (_, rank)), _)| *rank > 0);
        let of_b = of_b.map(|((Matrices { on_dy, u, .. }, (_, rank)), db)| GradientOfB {
            dy: on_dy,
            u,
            db,
            rank,
            scale: SCALE,
        });
        let mut of_b: Vec<GradientOfB> = of_b.collect();
        let plain = each().map(|(Matrices { on_dy, w, .. }, (n, _))| Layer {
            dy: on_dy,
            w,
            n,
            adapter: None,
        });
        let (mut layers, mut dx) = (plain.collect::<Vec<_>>(), gpu.alloc(m * k)?);
        let mut begun = Begun::default();
        if given.is_none() {
            let mut each = each().zip(&mut du);
            let pulled = [(); SHARING].map(|()| {
                let ((Matrices { a, on_b, .. }, (_, rank)), du) = each.next()?;
                (rank > 0).then_some(Pulled { b: on_b, du, rank, a: Some(a) })
            });
            let most = (self.clusters, self.tasks);
            begun = begin_by(gpu, most, &layers, pulled, &mut of_b, &mut dx, m, k)?;
            // Idle clusters take as many tasks as they may.
            assert_eq!((begun.columns, begun.tasks), (self.columns, self.tasks));
        }
        for ((layer, (Matrices { a, .. }, (_, rank))), left) in
            layers.iter_mut().zip(each()).zip(&du)
        {
            layer.adapter = (rank > 0).then_some(Adapter { left, right: a, rank });
        }
        let (arena, gradients) = (Arena::new(gpu, 0)?, of_b.into_iter().map(Gradient::B));
        let columns = Columns::rest(WIDE, 256, k, begun);
        let whole = Product::whole(WIDE, &layers, &mut dx, (m, k), false);
        let rest = (!columns.none()).then_some(Product { columns, ..whole });
        let gradients = gradients.collect();
        hopper::nn_with_gradients(gpu, &arena, WIDE, rest, gradients, m, begun.tasks)?;
        let bits_of = |db| Ok(gpu.downloaded(db)?.iter().map(|x: &f32| x.to_bits()).collect());
        let db = db.iter().map(|db| bits_of(db)).collect::<Result<_>>()?;
        let du = du.iter().map(|du| gpu.downloaded(du)).collect::<Result<_>>()?;
        Ok((bits(&gpu.downloaded(&dx)?), db, du))
    }

    fn is_right(&self, gpu: &Gpu) -> bool {
        let found = match catch_unwind(AssertUnwindSafe(|| self.run(gpu, None))) {
            Err(_) => return false,
            Ok(Err(error)) => {
                assert!(error.to_string().starts_with("kernel "), "{error}");
                return false;
            }
            Ok(Ok(found)) => found,
        };
        let sound = hopper_gpu(0);
        let of = self.matrices(&sound).unwrap();
        let accurate = || {
            for ((of, (n, rank)), du) in of.iter().zip(self.layers).zip(&found.2) {
                assert_du(&of.dy, &of.b, (self.m, *n, *rank), du);
            }
        };
        catch_unwind(AssertUnwindSafe(accurate)).is_ok()
            && self.run(&sound, Some(&found.2)).unwrap() == found
    }
}

/// du `[m, R]` of dy `[m, n]` and b `[n, R]`.
fn assert_du(dy: &[bf16], b: &[bf16], (m, n, rank): (usize, usize, usize), du: &[bf16]) {
    let pitch = padded(rank);
    let (of_dy, of_b) = (|t: usize, l: usize| dy[t * n + l], |l: usize, r: usize| b[l * pitch + r]);
    let plain = round(&sum_of_products::<f32>((m, n, pitch), of_dy, of_b));
    let exact = sum_of_products::<f64>((m, n, pitch), of_dy, of_b);
    assert_accurate_bf16("du", du, &plain, &exact);
}

/// Some columns first, with three clusters that have no tile and make four of nine tasks; all columns at once, without tasks; and all
/// with all tasks.
fn cases() -> [Case; 4] {
    let layers = &[(776, 16), (264, 16), (520, 5)];
    [
        Case { m: 300, k: 1288, layers, clusters: 5, columns: 256, tasks: 4 },
        Case { m: 270, k: 328, layers: &[(72, 0), (136, 20)], clusters: 1, columns: 328, tasks: 0 },
        Case {
            m: 70,
            k: 264,
            layers: &[(136, 16), (72, 16), (328, 0)],
            clusters: 2,
            columns: 264,
            tasks: 0,
        },
        Case { m: 70, k: 264, layers: &[(136, 16)], clusters: 5, columns: 264, tasks: 1 },
    ]
}

#[test]
fn a_way_back_that_has_begun_is_as_one_that_has_not() {
    for (seed, case) in cases().iter().enumerate() {
        for seed in [seed as u64, seed as u64 + 4] {
            assert!(case.is_right(&hopper_gpu(seed)), "{:?}, seed {seed}", case.layers);
        }
    }
}

/// Ranks that are too high for one kernel, narrow outputs, and other devices: du is made as by itself.
#[test]
fn ranks_and_devices_choose_where_du_is_made() {
    for (gpu, k, rank, beside) in [
        (Gpu::emulated_hopper(0).unwrap(), 1024, 16, true),
        (Gpu::emulated_hopper(0).unwrap(), 1024, 72, false),
        (Gpu::emulated_hopper(0).unwrap(), 512, 16, false),
        (Gpu::emulated(0).unwrap(), 1024, 16, false),
    ] {
        let (m, n) = (3, 72);
        let (dy, b) = (random_bf16(m * n, 1), random_padded(n, rank, 2));
        let (on_dy, on_b) = (gpu.uploaded(&dy).unwrap(), gpu.uploaded(&b).unwrap());
        let w = gpu.uploaded(&random_bf16(n * k, 3)).unwrap();
        let pitch = padded(rank);
        let (mut du, mut dx) = (gpu.alloc(m * pitch).unwrap(), gpu.alloc(m * k).unwrap());
        let layers = [Layer { dy: &on_dy, w: &w, n, adapter: None }];
        let a = gpu.uploaded(&vec![bf16::ONE; pitch * k]).unwrap();
        let pulled = [Some(Pulled { b: &on_b, du: &mut du, rank, a: Some(&a) }), None, None];
        let begun = begin_together(&gpu, &layers, pulled, &mut [], &mut dx, m, k).unwrap();
        assert_eq!(begun.columns > 0, beside);
        assert_du(&dy, &b, (m, n, rank), &gpu.downloaded(&du).unwrap());
    }
}

#[test]
fn faults_in_what_begins_are_caught() {
    let faults = [
        ("hopper_short.cuh", "full, -16 * begin, row, 3);", "full, 0, row, 3);"),
        ("hopper_short.cuh", "k + rank * half : OUTSIDE", "k : OUTSIDE"),
        ("hopper_short.cuh", "piece + rank * half * ROW_BYTES", "piece"),
        ("hopper_short.cuh", "right.length(place.x, groups) > 0 ?", "true ?"),
        (
            "hopper_product.cuh",
            "sides.load(stage, full, terms.place(slice));",
            "sides.load(stage, full, make_int2(0, slice));",
        ),
        (
            "hopper_gradients.cuh",
            "Share{task + cluster - busy, idle, border}",
            "Share{cluster - busy, idle, border}",
        ),
        ("hopper_gradients.cuh", "min(task + of_idle * idle, last)", "min(of_idle * idle, last)"),
    ];
    for (file, from, to) in faults {
        let faulty =
            |seed| Gpu::emulated_hopper_with_fault(seed, Fault { file, from, to }).unwrap();
        let caught = (0..4).any(|seed| !cases().iter().all(|case| case.is_right(&faulty(seed))));
        assert!(caught, "{file}: nothing is wrong with {to:?} for {from:?}");
    }
}
