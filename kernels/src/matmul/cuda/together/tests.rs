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
    /// That come with the first columns.
    tasks: usize,
}

/// A layer's matrices on a device.
struct On {
    dy: DeviceBuffer<bf16>,
    w: DeviceBuffer<bf16>,
    a: DeviceBuffer<bf16>,
    b: DeviceBuffer<bf16>,
    u: DeviceBuffer<bf16>,
    du: DeviceBuffer<bf16>,
    db: DeviceBuffer<f32>,
}

/// dx, and du and dB of each layer.
type Made = (Vec<u16>, Vec<Vec<bf16>>, Vec<Vec<f32>>);

impl Case {
    fn on(&self, gpu: &Gpu) -> Result<Vec<On>> {
        let (m, k) = (self.m, self.k);
        let each = self.layers.iter().zip(0..).map(|(&(n, rank), i)| {
            let seed = 10 * i;
            let mut a = random_bf16(rank * k, seed + 3);
            a.resize(padded(rank) * k, bf16::ZERO);
            Ok(On {
                dy: gpu.uploaded(&random_bf16(m * n, seed + 1))?,
                w: gpu.uploaded(&random_bf16(n * k, seed + 2))?,
                a: gpu.uploaded(&a)?,
                b: gpu.uploaded(&random_padded(n, rank, seed + 4))?,
                u: gpu.uploaded(&random_padded(m, rank, seed + 5))?,
                du: gpu.alloc(m * padded(rank))?,
                db: gpu.uploaded(&random(n * rank, seed + 6))?,
            })
        });
        each.collect()
    }

    fn plain<'a>(&self, on: &'a [On]) -> Vec<Layer<'a>> {
        let each = on.iter().zip(self.layers);
        each.map(|(on, (n, _))| Layer { dy: &on.dy, w: &on.w, n: *n, adapter: None }).collect()
    }

    /// Everything in two steps, or du first and then all else in one.
    fn run(&self, gpu: &Gpu, begins: bool) -> Result<Made> {
        let (m, k) = (self.m, self.k);
        let arena = Arena::new(gpu, 1 << 20)?;
        let mut on = self.on(gpu)?;
        let mut dx = gpu.alloc(m * k)?;
        let (mut du, mut db) = (Vec::new(), Vec::new());
        for on in &mut on {
            du.push(std::mem::replace(&mut on.du, gpu.alloc(0)?));
            db.push(std::mem::replace(&mut on.db, gpu.alloc(0)?));
        }
        let adapted = || on.iter().zip(self.layers).filter(|(_, (_, rank))| *rank > 0);
        let mut of_b: Vec<GradientOfB> = adapted()
            .zip(db.iter_mut().filter(|db| db.len() > 0))
            .map(|((on, (_, rank)), db)| GradientOfB {
                dy: &on.dy,
                u: &on.u,
                db,
                rank: *rank,
                scale: SCALE,
            })
            .collect();
        let mut begun = Begun::default();
        if begins {
            let mut each = on.iter().zip(self.layers).zip(&mut du);
            let pulled = [(); SHARING].map(|()| {
                let ((on, (_, rank)), du) = each.next()?;
                (*rank > 0).then_some(Pulled { b: &on.b, du, rank: *rank, a: Some(&on.a) })
            });
            let (layers, most) = (self.plain(&on), (self.clusters, self.tasks));
            begun = begin_by(gpu, most, &layers, pulled, &mut of_b, &mut dx, m, k)?;
            // Not all columns at once, and idle clusters take as many tasks as they may.
            assert_eq!((begun.columns < k, begun.tasks), (self.tasks > 0, self.tasks));
        } else {
            for ((on, (n, rank)), du) in on.iter().zip(self.layers).zip(&mut du) {
                if *rank > 0 {
                    nn(gpu, &on.dy, &on.b, du, m, *n, padded(*rank), 0.0, None)?;
                }
            }
        }
        let made: Vec<Vec<bf16>> = du.iter().map(|du| gpu.downloaded(du)).collect::<Result<_>>()?;
        // The same du for both, so that what is made of it has the same bits.
        let exact = self.layers.iter().zip(&on).map(|((n, rank), on)| {
            let (dy, b) = (gpu.downloaded(&on.dy).unwrap(), gpu.downloaded(&on.b).unwrap());
            let pitch = padded(*rank);
            let (of_dy, of_b) =
                (|t: usize, l: usize| dy[t * n + l], |l: usize, r: usize| b[l * pitch + r]);
            let sides = (m, *n, pitch);
            (
                round(&sum_of_products::<f32>(sides, of_dy, of_b)),
                sum_of_products::<f64>(sides, of_dy, of_b),
            )
        });
        for ((plain, exact), du) in exact.zip(&made) {
            assert_accurate_bf16("du", du, &plain, &exact);
        }
        let layers: Vec<Layer> = on
            .iter()
            .zip(self.layers)
            .zip(&du)
            .map(|((on, &(n, rank)), left)| {
                let adapter = (rank > 0).then(|| Adapter { left, right: &on.a, rank });
                Layer { dy: &on.dy, w: &on.w, n, adapter }
            })
            .collect();
        let gradients = of_b.into_iter().map(Gradient::B).collect();
        let columns = Columns::rest(WIDE, 256, k, begun);
        let whole = Product::whole(WIDE, &layers, &mut dx, (m, k), false);
        let rest = (!columns.none()).then_some(Product { columns, ..whole });
        hopper::nn_with_gradients(gpu, &arena, WIDE, rest, gradients, m, begun.tasks)?;
        let db = db.iter().map(|db| gpu.downloaded(db)).collect::<Result<_>>()?;
        Ok((bits(&gpu.downloaded(&dx)?), made, db))
    }

    fn is_right(&self, gpu: &Gpu) -> bool {
        let run = || self.run(gpu, true);
        let found = match catch_unwind(AssertUnwindSafe(run)) {
            Err(_) => return false,
            Ok(Err(error)) => {
                assert!(error.to_string().starts_with("kernel "), "{error}");
                return false;
            }
            Ok(Ok(found)) => found,
        };
        let sound = hopper_gpu(0);
        let expected = self.run(&sound, false).unwrap();
        // du is summed in another order, and so the last bit of dx may differ where adapters are.
        let db = |made: &Made| made.2.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
        found.1.iter().map(Vec::len).eq(expected.1.iter().map(Vec::len))
            && db(&found) == db(&expected)
            && found.0 == self.with_du(&sound, &found.1).unwrap()
    }

    /// The bits of dx in one launch with this du.
    fn with_du(&self, gpu: &Gpu, du: &[Vec<bf16>]) -> Result<Vec<u16>> {
        let (m, k) = (self.m, self.k);
        let on = self.on(gpu)?;
        let du: Vec<_> = du.iter().map(|du| gpu.uploaded(du)).collect::<Result<_>>()?;
        let layers: Vec<Layer> = on
            .iter()
            .zip(self.layers)
            .zip(&du)
            .map(|((on, &(n, rank)), left)| {
                let adapter = (rank > 0).then(|| Adapter { left, right: &on.a, rank });
                Layer { dy: &on.dy, w: &on.w, n, adapter }
            })
            .collect();
        let mut dx = gpu.alloc(m * k)?;
        let whole = Product::whole(WIDE, &layers, &mut dx, (m, k), false);
        hopper::launch(gpu, WIDE, 1, Some(whole), &mut [], Tasks::From(0))?;
        Ok(bits(&gpu.downloaded(&dx)?))
    }
}

/// Some columns first, with three clusters that have no tile and make four of nine tasks; and all columns at once.
fn cases() -> [Case; 3] {
    let layers = &[(776, 16), (264, 16), (520, 5)];
    [
        Case { m: 300, k: 1288, layers, clusters: 5, tasks: 4 },
        Case { m: 270, k: 328, layers: &[(72, 0), (136, 20)], clusters: 1, tasks: 0 },
        Case { m: 70, k: 264, layers: &[(136, 16), (72, 16), (328, 0)], clusters: 2, tasks: 0 },
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
        let pulled = [Some(Pulled { b: &on_b, du: &mut du, rank, a: None }), None, None];
        let begun = begin_together(&gpu, &layers, pulled, &mut [], &mut dx, m, k).unwrap();
        assert_eq!(begun.columns > 0, beside);
        let (of_dy, of_b) =
            (|t: usize, l: usize| dy[t * n + l], |l: usize, r: usize| b[l * pitch + r]);
        let plain = round(&sum_of_products::<f32>((m, n, pitch), of_dy, of_b));
        let exact = sum_of_products::<f64>((m, n, pitch), of_dy, of_b);
        assert_accurate_bf16("du", &gpu.downloaded(&du).unwrap(), &plain, &exact);
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
