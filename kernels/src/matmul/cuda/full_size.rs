//! The products at the sizes of real models: elements that are drawn against f64, all of them written, and two runs with
//! the same bits. Each check runs in the emulation, too, at a size that it gets through.

use super::fused::{Weight, begin_added, nt_added};
use super::*;
use crate::cuda::Arena;
use crate::testing::{
    Endless, Real, assert_accurate, assert_accurate_bf16, assert_written, gpu, hopper_gpu, places,
    round,
};
use adapter::{
    Gradient, GradientOfA, GradientOfB, Input, Projected, Pulled, add_to_gradient_of_b,
    add_to_gradients, add_to_gradients_of_a, padded, project, workspace_of_a, workspace_of_b,
};

/// `left right`, an element at a time in some precision; `right` is stored as `nt` or as `nn` has it.
struct Sum<'a> {
    left: &'a Endless,
    right: &'a Endless,
    depth: usize,
    columns: usize,
    transposed: bool,
}

impl Sum<'_> {
    fn of<R: Real>(&self, row: usize, column: usize) -> R {
        let term = |l: usize| {
            let at =
                if self.transposed { column * self.depth + l } else { l * self.columns + column };
            R::of(self.left.at(row * self.depth + l).to_f64()) * R::of(self.right.at(at).to_f64())
        };
        (0..self.depth).fold(R::of(0.0), |sum, l| sum + term(l))
    }
}

/// y = x wᵀ + u bᵀ + bias and dx = dy w + du a, m rows, k inputs, n outputs.
fn check_products((m, k, n): (usize, usize, usize), rank: usize) {
    let gpu = gpu(1);
    let pitch = padded(rank);
    let [x, w, dy, u, b] = [1, 2, 3, 4, 5].map(Endless::new);
    let [on_x, on_w, on_dy] = [(&x, m * k), (&w, n * k), (&dy, m * n)]
        .map(|(numbers, len)| numbers.uploaded(&gpu, len).unwrap());
    // Every column of u counts, as at a rank that needs no filling up; b serves as a on the way back.
    assert_eq!(rank, pitch);
    let (on_u, on_b) = (u.uploaded(&gpu, m * pitch).unwrap(), b.uploaded(&gpu, n * pitch).unwrap());
    let on_a = b.uploaded(&gpu, pitch * k).unwrap();
    let bias = w.uploaded(&gpu, n).unwrap();
    let run = || {
        let (mut y, mut dx) = (gpu.alloc(m * n).unwrap(), gpu.alloc(m * k).unwrap());
        let part = Some(Adapter { left: &on_u, right: &on_b, rank });
        nt(&gpu, &on_x, &on_w, &mut y, m, k, n, 0.0, Some(&bias), part).unwrap();
        let part = Some(Adapter { left: &on_u, right: &on_a, rank });
        nn(&gpu, &on_dy, &on_w, &mut dx, m, n, k, 0.0, part).unwrap();
        [gpu.downloaded(&y).unwrap(), gpu.downloaded(&dx).unwrap()]
    };
    let [y, dx] = run();
    assert!(run() == [y.clone(), dx.clone()], "another run has other bits");

    let rows = places(m, 48, 6);
    for (name, out, left, depth, columns) in [("y", &y, &x, k, n), ("dx", &dx, &dy, n, k)] {
        assert_written(name, out);
        let forward = name == "y";
        let main = Sum { left, right: &w, depth, columns, transposed: forward };
        let low = Sum { left: &u, right: &b, depth: pitch, columns, transposed: forward };
        let added = |j: usize| if forward { w.at(j).to_f32() } else { 0.0 };
        let places: Vec<_> = pairs(&rows, &places(columns, 48, 7));
        let plain =
            places.iter().map(|&(i, j)| main.of::<f32>(i, j) + low.of::<f32>(i, j) + added(j));
        let exact = places
            .iter()
            .map(|&(i, j)| main.of::<f64>(i, j) + low.of::<f64>(i, j) + f64::from(added(j)));
        let found: Vec<bf16> = places.iter().map(|&(i, j)| out[i * columns + j]).collect();
        let (plain, exact): (Vec<f32>, Vec<f64>) = (plain.collect(), exact.collect());
        assert_accurate_bf16(&format!("{name}, {m} x {k} x {n}"), &found, &round(&plain), &exact);
    }
}

fn pairs(rows: &[usize], columns: &[usize]) -> Vec<(usize, usize)> {
    rows.iter().flat_map(|&i| columns.iter().map(move |&j| (i, j))).collect()
}

/// dA, dB, u and du of a layer with k inputs or outputs.
fn check_gradients((m, k): (usize, usize), rank: usize) {
    let gpu = gpu(2);
    let pitch = padded(rank);
    assert_eq!(rank, pitch);
    let [v, u, b] = [1, 2, 3].map(Endless::new);
    let on_v = v.uploaded(&gpu, m * k).unwrap();
    let (on_u, on_b) = (u.uploaded(&gpu, m * pitch).unwrap(), b.uploaded(&gpu, k * pitch).unwrap());
    // b serves as a, too.
    let on_a = b.uploaded(&gpu, pitch * k).unwrap();
    let run = || {
        let (mut da, mut db) = (gpu.alloc(rank * k).unwrap(), gpu.alloc(k * rank).unwrap());
        gpu.zero(&mut da).unwrap();
        gpu.zero(&mut db).unwrap();
        let mut du = gpu.alloc(m * pitch).unwrap();
        let mut room = gpu.alloc(workspace_of_a(m, k, &[rank])).unwrap();
        let of = &mut [GradientOfA { du: &on_u, da: &mut da, rank }];
        let input = Input { x: &on_v, norm: None };
        add_to_gradients_of_a(&gpu, input, of, m, k, &mut room).unwrap();
        let mut room = gpu.alloc(workspace_of_b(m, k, rank)).unwrap();
        let of_b = GradientOfB { dy: &on_v, u: &on_u, db: &mut db, rank, scale: 0.5 };
        add_to_gradient_of_b(&gpu, of_b, Some((&on_b, &mut du)), m, k, &mut room).unwrap();
        let mut low = gpu.alloc(m * pitch).unwrap();
        let sides = &mut [Projected { a: &on_a, u: &mut low, rank, b: None }];
        project(&gpu, &on_v, sides, m, k).unwrap();
        let [da, db] = [da, db].map(|x| gpu.downloaded(&x).unwrap());
        (da, db, [du, low].map(|x| gpu.downloaded(&x).unwrap()))
    };
    let (all_da, all_db, all_low) = run();
    assert!(
        run() == (all_da.clone(), all_db.clone(), all_low.clone()),
        "another run has other bits"
    );
    // As they wait for a product: on Hopper all rows are one task's.
    let waiting = || {
        let (gpu, arena) = (hopper_gpu(2), Arena::new(&hopper_gpu(2), 0).unwrap());
        let (on_v, on_u) = (v.uploaded(&gpu, m * k).unwrap(), u.uploaded(&gpu, m * pitch).unwrap());
        let [mut da, mut db] = [(); 2].map(|()| gpu.alloc(rank * k).unwrap());
        gpu.zero(&mut da).unwrap();
        gpu.zero(&mut db).unwrap();
        let adapters = vec![GradientOfA { du: &on_u, da: &mut da, rank }];
        let of_a = Gradient::A { input: Input { x: &on_v, norm: None }, k, adapters };
        let of_b = GradientOfB { dy: &on_v, u: &on_u, db: &mut db, rank, scale: 0.5 };
        add_to_gradients(&gpu, &arena, vec![of_a, Gradient::B(of_b)], m).unwrap();
        [da, db].map(|x| gpu.downloaded(&x).unwrap())
    };

    fn over_rows<R: Real>(m: usize, terms: impl Fn(usize) -> (bf16, bf16)) -> R {
        (0..m).fold(R::of(0.0), |sum, t| {
            let (a, b) = terms(t);
            sum + R::of(a.to_f64()) * R::of(b.to_f64())
        })
    }
    let (columns, ranks) = (places(k, 24, 4), places(rank, 8, 5));
    let at = pairs(&columns, &ranks);
    let terms = |p: usize, r: usize| {
        let (v, u) = (&v, &u);
        move |t: usize| (v.at(t * k + p), u.at(t * pitch + r))
    };
    let plain: Vec<f32> = at.iter().map(|&(p, r)| over_rows(m, terms(p, r))).collect();
    let exact: Vec<f64> = at.iter().map(|&(p, r)| over_rows(m, terms(p, r))).collect();
    for [all_da, all_db] in [[all_da, all_db], waiting()] {
        let da: Vec<f32> = at.iter().map(|&(p, r)| all_da[r * k + p]).collect();
        let db: Vec<f32> = at.iter().map(|&(p, r)| 2.0 * all_db[p * rank + r]).collect();
        assert_accurate(&format!("dA, {m} x {k}"), &da, &plain, &exact);
        assert_accurate(&format!("dB, {m} x {k}"), &db, &plain, &exact);
    }

    let rows = places(m, 24, 6);
    let at = pairs(&rows, &ranks);
    for (name, all, transposed) in [("du", &all_low[0], false), ("u", &all_low[1], true)] {
        assert_written(name, all);
        let sum = Sum { left: &v, right: &b, depth: k, columns: pitch, transposed };
        let plain: Vec<f32> = at.iter().map(|&(t, r)| sum.of(t, r)).collect();
        let exact: Vec<f64> = at.iter().map(|&(t, r)| sum.of(t, r)).collect();
        let found: Vec<bf16> = at.iter().map(|&(t, r)| all[t * pitch + r]).collect();
        assert_accurate_bf16(&format!("{name}, {m} x {k}"), &found, &round(&plain), &exact);
    }
}

/// On Hopper, u and du of a rank where products of n columns begin, and that these have the bits of products that do not.
fn check_begun((m, k, n): (usize, usize, usize), rank: usize) {
    let (gpu, pitch) = (hopper_gpu(2), padded(rank));
    let [x, w, short, long] = [1, 2, 3, 4].map(Endless::new);
    let (on_x, on_w) = (x.uploaded(&gpu, m * k).unwrap(), w.uploaded(&gpu, n * k).unwrap());
    let right = short.uploaded(&gpu, pitch * k).unwrap();
    let after = long.uploaded(&gpu, n * pitch).unwrap();
    let [mut u, mut du] = [(); 2].map(|()| gpu.alloc(m * pitch).unwrap());
    let [mut one, mut two] = [(); 2].map(|()| gpu.alloc(m * n).unwrap());
    let plain = Weight { w: &on_w, bias: None, adapter: None };
    let projected = Projected { a: &right, u: &mut u, rank, b: Some(&after) };
    let all = [Some(projected), None, None];
    let begun = begin_added(&gpu, &on_x, plain, all, None, &mut one, m, k, n).unwrap();
    assert!(begun.columns > 0);
    let weight = Weight { adapter: Some(Adapter { left: &u, right: &after, rank }), ..plain };
    nt_added(&gpu, &on_x, weight, None, &mut one, m, k, n, begun).unwrap();
    nt_added(&gpu, &on_x, weight, None, &mut two, m, k, n, Begun::default()).unwrap();
    assert!(gpu.downloaded(&one).unwrap() == gpu.downloaded(&two).unwrap(), "other bits of y");

    // Nor has u other bits beside that of others.
    let alone = gpu.downloaded(&u).unwrap();
    if 3 * rank <= 64 {
        let [mut second, mut third] = [(); 2].map(|()| gpu.alloc(m * pitch).unwrap());
        let all = [(&mut u, Some(&*after)), (&mut second, None), (&mut third, None)];
        let all = all.map(|(u, b)| Some(Projected { a: &right, u, rank, b }));
        let _ = begin_added(&gpu, &on_x, plain, all, None, &mut one, m, k, n).unwrap();
        for u in [&u, &second, &third] {
            assert!(gpu.downloaded(u).unwrap() == alone, "other bits of u in company");
        }
    }

    // The same numbers as dy [m, k], w [k, n], b [k, R] and a [R, n].
    let arena = Arena::new(&gpu, 0).unwrap();
    let layer = Layer { dy: &on_x, w: &on_w, n: k, adapter: None };
    let pulled = Pulled { b: &right, du: &mut du, rank, a: Some(&after) };
    let all = [Some(pulled), None, None];
    let begun = begin_together(&gpu, &[layer], all, &mut [], &mut one, m, n).unwrap();
    let adapter = Some(Adapter { left: &du, right: &after, rank });
    for (dx, begun) in [(&mut one, begun), (&mut two, Begun::default())] {
        let layers = [Layer { adapter, ..layer }];
        nn_together(&gpu, &arena, &layers, dx, Vec::new(), m, n, begun).unwrap();
    }
    assert!(gpu.downloaded(&one).unwrap() == gpu.downloaded(&two).unwrap(), "other bits of dx");

    let at = pairs(&places(m, 24, 6), &places(rank, 8, 5));
    for (name, made, transposed) in [("u", &u, true), ("du", &du, false)] {
        let all = gpu.downloaded(made).unwrap();
        assert_written(name, &all);
        let sum = Sum { left: &x, right: &short, depth: k, columns: pitch, transposed };
        let plain: Vec<f32> = at.iter().map(|&(t, r)| sum.of(t, r)).collect();
        let exact: Vec<f64> = at.iter().map(|&(t, r)| sum.of(t, r)).collect();
        let found: Vec<bf16> = at.iter().map(|&(t, r)| all[t * pitch + r]).collect();
        assert_accurate_bf16(&format!("{name}, {m} x {k}"), &found, &round(&plain), &exact);
    }
}

#[test]
fn drawn_elements_agree_with_f64() {
    check_products((130, 136, 264), 16);
    check_begun((70, 72, 1032), 16);
    check_gradients((130, 264), 16);
}

#[test]
#[ignore = "needs a GPU"]
fn products_of_mistral_7b_agree_with_f64() {
    check_products((16_384, 4096, 14_336), 16);
    check_products((16_384, 14_336, 4096), 64);
    check_products((32_768, 4096, 1024), 16);
}

#[test]
#[ignore = "needs a GPU"]
fn what_begins_products_of_mistral_7b_agrees_with_f64() {
    check_begun((16_384, 4096, 4096), 16);
    check_begun((32_768, 4096, 1024), 64);
    check_begun((1024, 4096, 4096), 32);
}

#[test]
#[ignore = "needs a GPU"]
fn gradients_of_mistral_7b_agree_with_f64() {
    check_gradients((16_384, 14_336), 16);
    check_gradients((32_768, 4096), 64);
}
