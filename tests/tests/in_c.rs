//! The example of an objective in C: it loads, is checked and trains like one in Rust, and its numbers are
//! those of the same formula in Rust.

use std::path::Path;
use uft::config::PluginRef;
use uft::plugins::Registry;
use uft_core::abi::ObjectiveObject;
use uft_core::check::Case;
use uft_core::sample::Feedback;
use uft_tests::{c, lines, root, succeed, tensors};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");
const DPO: &str = "examples/objective-in-c/dpo_in_c.c";

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn objective(registry: &mut Registry, name: &str, beta: f64) -> ObjectiveObject {
    let params = toml::Table::from_iter([("beta".to_owned(), beta.into())]);
    let plugin = PluginRef { plugin: name.into(), params };
    registry.objective(&plugin).expect("an objective").into_object()
}

/// Steps with pairs, responses in several pairs, and responses in none.
fn steps() -> Vec<Case> {
    let (chosen, rejected) = (Feedback::Chosen(None.into()), Feedback::Rejected(None.into()));
    let mut seed = 1u32;
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        -((seed >> 8) as f32) / 4.0e6
    };
    let groups = [vec![chosen, rejected], vec![rejected, chosen, rejected], vec![chosen, chosen]];
    let step = |index: usize| {
        let mut case = Case::new();
        for kinds in groups.iter().cycle().take(4 + index) {
            let responses: Vec<_> = kinds
                .iter()
                .enumerate()
                .map(|(place, kind)| {
                    let mut tokens = || (0..=place + index).map(|_| next()).collect::<Vec<f32>>();
                    (*kind, tokens(), tokens())
                })
                .collect();
            let seen: Vec<_> =
                responses.iter().map(|(f, l, r)| (*f, l.as_slice(), r.as_slice())).collect();
            case = case.group(&seen);
        }
        case
    };
    (0..8).map(step).collect()
}

#[test]
fn its_numbers_are_those_of_the_plugin_in_rust() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut registry = Registry::new([dir.path().to_owned()]);
    c::build(DPO, dir.path(), &[]);
    for beta in [0.03, 0.1, 2.0] {
        for (index, step) in steps().iter().enumerate() {
            let mut run =
                |name| step.run(&mut objective(&mut registry, name, beta)).expect("numbers");
            let (c, rust) = (run("dpo-in-c"), run("una-pairwise"));
            // A sum of some terms, each rounded a few times.
            let near = 64.0 * f64::EPSILON;
            let apart = (c.loss - rust.loss).abs();
            assert!(apart <= near * rust.loss, "step {index}: {} and {}", c.loss, rust.loss);
            let largest = rust.dlogp.iter().fold(0.0f32, |most, g| most.max(g.abs()));
            for (c, rust) in c.dlogp.iter().zip(&rust.dlogp) {
                // In f64 the two are equal to `near`; that may be on both sides of a border of f32.
                let ulp = f32::EPSILON * rust.abs() + (near as f32) * largest;
                assert!((c - rust).abs() <= ulp, "step {index}: {c} and {rust}");
            }
            for name in ["rewards/margins", "rewards/accuracies"] {
                let (c, rust) = (c.metric(name).expect(name), rust.metric(name).expect(name));
                assert!((c - rust).abs() <= near * rust.abs().max(1.0), "{name}: {c} and {rust}");
            }
        }
    }
}

#[test]
fn it_is_listed_and_checked_and_trains_the_quickstarts_model() {
    let dir = tempfile::tempdir().expect("a directory");
    let library = c::build(DPO, dir.path(), &[]);
    let listed = succeed(UFT, &["plugin", "list", text(&library)]);
    let expected = format!(
        "dpo-in-c (objective, {})\n  -log sigmoid(beta*(d_w - d_l)), d = log(pi/pi_ref) (DPO, arXiv 2305.18290, eq. 7)\n    \
         beta = 0.1  # a number above 0: scale of the implicit reward\n\n",
        library.canonicalize().expect("there").display()
    );
    assert_eq!(listed, expected);
    let report = succeed(UFT, &["plugin", "check", "dpo-in-c", "--plugin-dir", text(dir.path())]);
    assert_eq!(report.matches("  ok    ").count(), 10, "{report}");

    let run = |objective: &str| {
        let run = format!(
            "[model]\npath = \"{0}/base\"\n[plugins]\ndirs = [\"{1}\"]\n[[data]]\nname = \"pairs\"\n\
             files = [\"{0}/data/pairs.jsonl\"]\nadapter = \"preferences\"\n\
             objective = {{ plugin = \"{objective}\", beta = 0.05 }}\n\
             [train]\noutput = \"{1}/{objective}\"\nsteps = 12\nbatch = 8\nlr = 2e-3\nthreads = 2\n",
            root().join("examples").display(),
            dir.path().display(),
        );
        let path = dir.path().join(format!("{objective}.toml"));
        std::fs::write(&path, run).expect("written");
        path
    };
    succeed(UFT, &["train", text(&run("dpo-in-c"))]);
    let output = dir.path().join("dpo-in-c");
    let metrics = lines(&std::fs::read_to_string(output.join("metrics.jsonl")).expect("metrics"));
    assert_eq!(metrics.len(), 12);
    let loss = |step: usize| metrics[step]["loss"].as_f64().expect("a number");
    // Policy and reference are equal at first, so every pair's loss is log 2.
    assert!((loss(0) - std::f64::consts::LN_2).abs() <= 8.0 * f64::EPSILON, "{}", loss(0));
    assert!(loss(11) < 0.9 * loss(0), "it learns: {metrics:?}");
    assert!(output.join("adapter_model.safetensors").is_file());

    // The first step's gradient of the adapter: every slope is -beta/2 over the pairs, in both.
    let gradient = |objective: &str| {
        let out = dir.path().join(format!("{objective}.safetensors"));
        succeed(UFT, &["grad", text(&run(objective)), "--out", text(&out)]);
        tensors(&out)
    };
    assert_eq!(gradient("dpo-in-c"), gradient("una-pairwise"));
}
