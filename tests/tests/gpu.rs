//! The dry parts of tests/gpu: packing, command lines, the budget of time, what is left of a run that is cut off, the report, and
//! every part on the emulated device. What needs PyTorch is run by hand; here the table says that it is not there.

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
use uft_kernels::cuda::{HOPPER_KERNELS, KERNELS};
use uft_tests::mixed::temporary;
use uft_tests::scripts::{here, python, snippet, stdout};
use uft_tests::{json, root};

const UFT: &str = env!("CARGO_BIN_EXE_uft-under-test");
const GPU_KERNELS: &str = env!("CARGO_BIN_EXE_gpu-kernels");

/// A folder of what cargo builds beside this test.
fn deps() -> PathBuf {
    Path::new(UFT).parent().expect("a folder").join("deps")
}

/// The kernels' tests: the newest that were built, or built now, which takes a minute.
fn kernels_tests() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    let newest = || {
        let files = std::fs::read_dir(deps()).expect("deps").map(|entry| entry.expect("an entry"));
        let programs = files.filter(|file| {
            let name = file.file_name().to_string_lossy().into_owned();
            let mode = file.metadata().map_or(0, |metadata| metadata.permissions().mode());
            name.starts_with("uft_kernels-") && !name.contains('.') && mode & 0o100 != 0
        });
        let time = |file: &std::fs::DirEntry| file.metadata().and_then(|m| m.modified()).ok();
        programs.max_by_key(time).map(|file| file.path())
    };
    let build = || {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or(env!("CARGO").into()));
        cargo.args(["test", "-p", "uft-kernels", "--lib", "--no-run"]).current_dir(root());
        let status = cargo.status().expect("cargo runs");
        assert!(status.success(), "the kernels' tests do not build");
        newest().expect("the kernels' tests are built")
    };
    BUILT.get_or_init(|| newest().unwrap_or_else(build)).clone()
}

/// The file that pack.py takes for what cargo built.
fn artifacts(dir: &Path) -> PathBuf {
    let plugins = ["sft", "una_pairwise", "demonstrations", "preferences"];
    let plugins = plugins.map(|name| deps().join(format!("lib{name}.so")));
    let tests = kernels_tests();
    let all =
        json!({"uft": UFT, "gpu-kernels": GPU_KERNELS, "kernels-tests": tests, "plugins": plugins});
    let path = dir.join("artifacts.json");
    std::fs::write(&path, all.to_string()).expect("a file");
    path
}

fn pack(artifacts: &Path, out: &Path) -> Output {
    let mut command = python(&here("pack.py"));
    command.arg(out).arg("--artifacts").arg(artifacts).output().expect("pack.py runs")
}

/// A packed folder with stand-ins for the programs: shell scripts, so that what a GPU's machine may say can be made up.
fn stand_ins(dir: &Path, tests: &str) -> PathBuf {
    let write = |name: &str, text: &str| {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("a file");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("a mode");
        path
    };
    let uft = "echo 'driver: CUDA 13.0'; echo 'GPU 0: Made up, compute capability 8.0, 80.0 GiB'";
    let case = r#"{"case":"copy","flops":0,"bytes":8,"peer":null,"ms":2.0,"runs":9}"#;
    let all = json!({
        "uft": write("uft.sh", uft),
        "gpu-kernels": write("gpu-kernels.sh", &format!("echo '{case}'; echo 'no memory' >&2; exit 3")),
        "kernels-tests": write("kernels-tests.sh", tests),
        "plugins": [write("libplugin.so", "")],
    });
    write(
        "compute-sanitizer",
        "[ \"$2\" = racecheck ] && { echo '========= Race reported between thread 1 and 2'; \
         echo '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'; exit 77; }\n\
         echo 'test adamw::cuda::tests::right ... ok'; echo '========= ERROR SUMMARY: 0 errors'",
    );
    let path = dir.join("artifacts.json");
    std::fs::write(&path, all.to_string()).expect("a file");
    let packed = dir.join("packed");
    stdout(pack(&path, &packed));
    packed
}

/// Tests as libtest prints them: one that fails, one that ends the process, the rest right.
const TESTS: &str = r#"
if [ "$1" = --list ]; then
  for name in adamw::cuda::tests::right adamw::cuda::tests::planted_faults_are_caught matmul::cuda::tests::broken \
      matmul::cuda::tests::hopper_tile matmul::tests::cpu rope::cuda::tests::crashes cuda::hardware::holds; do echo "$name: test"; done
  exit 0
fi
shift
for name in "$@"; do
  case $name in
    --*) ;;
    *broken) echo "test $name ... FAILED"; echo "---- $name stdout ----"; echo "thread panicked: off by 3"; exit 101 ;;
    *crashes) kill -6 $$ ;;
    *) echo "test $name ... ok" ;;
  esac
done"#;

fn run(packed: &Path, out: &Path, arguments: &[&str]) -> Output {
    let mut command = python(&packed.join("run.py"));
    let kernels = concat!(env!("CARGO_TARGET_TMPDIR"), "/device");
    command.arg("--out").arg(out).args(arguments).env("UFT_CACHE_DIR", kernels);
    // A PyTorch that is installed here would make the table another.
    command.env("PYTHONPATH", packed.join("no-torch")).output().expect("run.py runs")
}

/// A Python that has no PyTorch, whatever is installed.
fn without_torch(packed: &Path) {
    let folder = packed.join("no-torch");
    std::fs::create_dir(&folder).expect("a folder");
    let hide = "import sys\nsys.modules['torch'] = None\n";
    std::fs::write(folder.join("sitecustomize.py"), hide).expect("a file");
}

/// Records of a part, and how it ended.
fn part<'a>(results: &'a Value, name: &str) -> (&'a str, &'a [Value]) {
    let parts = results["parts"].as_array().expect("parts");
    let part = parts.iter().find(|part| part["name"] == name).expect("the part is there");
    let records = part["records"].as_array().expect("records");
    (part["state"].as_str().expect("a state"), records)
}

#[test]
fn every_script_that_is_needed_there_is_packed() {
    let listed = stdout(python(&here("pack.py")).args(["out", "--list"]).output().expect("runs"));
    assert!(listed.contains("cargo build --release --locked"), "{listed}");
    for entry in std::fs::read_dir(here("")).expect("tests/gpu") {
        let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
        let needed = !["pack.py", "predict.py", "predict_32b.py"].contains(&name.as_str());
        assert!(listed.lines().any(|line| line == name) == needed, "{name}: {listed}");
    }
    // And imports nothing but each other, the standard library and, where they say so, PyTorch.
    let allowed = "import sys, ast, pathlib\n\
        own = {p.stem for p in pathlib.Path(sys.path[1]).glob('*.py')} | {'torch', 'transformers', 'peft'}\n\
        for p in pathlib.Path(sys.path[1]).glob('*.py'):\n\
        \x20   for node in ast.walk(ast.parse(p.read_text())):\n\
        \x20       names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []\n\
        \x20       for name in names:\n\
        \x20           top = name.split('.')[0]\n\
        \x20           if top not in own and top not in sys.stdlib_module_names: print(p.name, name)";
    assert_eq!(snippet(allowed), "");
}

#[test]
fn what_cargo_says_is_found_by_its_names() {
    let artifact = |name: &str, kind: &str, test: bool, executable: Value, files: Value| {
        json!({"reason": "compiler-artifact", "target": {"name": name, "kind": [kind]},
               "profile": {"test": test}, "executable": executable, "filenames": files})
        .to_string()
    };
    let messages = [
        artifact("uft", "bin", false, json!("/t/uft"), json!(["/t/uft"])),
        artifact("uft_kernels", "lib", false, json!(null), json!(["/t/libuft_kernels.rlib"])),
        artifact("uft_kernels", "lib", true, json!("/t/deps/uft_kernels-1"), json!([])),
        artifact("kto", "cdylib", false, json!(null), json!(["/t/libkto.so"])),
        "   Compiling something".to_owned(),
        json!({"reason": "build-finished", "success": true}).to_string(),
    ];
    let found = snippet(&format!("import pack, json; print(json.dumps(pack.built({messages:?})))"));
    let found: Value = serde_json::from_str(&found).expect("JSON");
    let expected = json!({"plugins": ["/t/libkto.so"], "uft": "/t/uft", "kernels-tests": "/t/deps/uft_kernels-1"});
    assert_eq!(found, expected);

    let (_guard, dir) = temporary();
    let path = dir.join("artifacts.json");
    std::fs::write(&path, json!({"uft": "/nowhere/uft"}).to_string()).expect("a file");
    let refused = pack(&path, &dir.join("out"));
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(said.trim(), "not built: kernels-tests, gpu-kernels, /nowhere/uft, plugins");
    std::fs::write(dir.join("mine"), "").expect("a file");
    let refused = pack(&artifacts(&dir), &dir);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("is not empty"), "{refused:?}");
}

/// The whole of it, packed and elsewhere, with small sizes.
#[test]
fn every_part_runs_on_the_emulated_device() {
    let (_guard, dir) = temporary();
    let (packed, out) = (dir.join("packed"), dir.join("results"));
    stdout(pack(&artifacts(&dir), &packed));
    let manifest = json(&packed.join("manifest.json"));
    assert!(manifest["files"]["bin/uft"]["bytes"].as_u64() > Some(1 << 20), "{manifest}");
    without_torch(&packed);
    let table = stdout(run(&packed, &out, &["--device", "emulated", "--only", "adamw"]));
    assert_eq!(
        table.trim(),
        std::fs::read_to_string(out.join("table.md")).expect("a table").trim()
    );
    let results = json(&out.join("results.json"));
    let (state, hardware) = part(&results, "hardware");
    let right = hardware.iter().filter(|record| record["state"] == "ok").count();
    assert!(state == "done" && right >= 17, "{hardware:?}");
    assert!(part(&results, "tests").1.iter().any(|record| record["state"] == "ok"));
    let cases = part(&results, "kernels").1;
    assert!(cases[0]["case"] == "adamw step" && cases[0]["ms"].is_null(), "{cases:?}");
    assert!(table.contains("PyTorch is not installed, so no kernel has a peer"), "{table}");
    let steps = part(&results, "steps").1;
    // Random weights know nothing: ln 320. A reward is 0 at first: ln 2.
    for (record, expected) in steps.iter().zip([320f64.ln(), 2f64.ln()]) {
        let loss = record["loss"].as_f64().expect("a loss");
        assert!((loss - expected).abs() < 0.02 && record["who"] == "uft", "{record}");
        assert!(record["tokens_per_second"].is_null(), "no time is told of an emulation: {record}");
    }
    assert!(table.contains("PyTorch is not installed, so whole steps have no peer"), "{table}");
    // What is kept changes no number, which the script itself checks, too.
    for (record, recompute) in steps[2..].iter().zip(["all", "offload"]) {
        let as_kept = record["recompute"] == recompute && record["loss"] == steps[0]["loss"];
        assert!(as_kept && record["error"].is_null() && record["steps"] == 3, "{record}");
    }
    assert_eq!(steps[3]["copied_each_way"], 2 * 2 * (4 * 47) * 64);
    assert!(table.contains("of these, hidden"), "{table}");
    assert_eq!(part(&results, "sanitizer").0, "missing");
}

/// Every case of gpu-kernels on an emulated device, checked for what each has to say.
fn cases(device: &str) -> Vec<Value> {
    let printed =
        stdout(Command::new(GPU_KERNELS).args(["--device", device]).output().expect("runs"));
    let (begun, cases): (Vec<Value>, Vec<Value>) =
        uft_tests::lines(&printed).into_iter().partition(|line| line["begins"].is_string());
    assert!(cases.len() > 40 && begun.len() == cases.len(), "{printed}");
    let peers = std::fs::read_to_string(here("peers.py")).expect("peers.py");
    for case in &cases {
        assert!(case["error"].is_null() && case["bytes"].as_u64() > Some(0), "{case}");
        // Every peer has a method of that name.
        let Some(op) = case["peer"]["op"].as_str() else { continue };
        assert!(peers.contains(&format!("    def {op}(self")), "peers.py has no {op}");
    }
    cases
}

/// Names of the kernels that a case launches.
fn launched(case: &Value) -> impl Iterator<Item = &str> {
    let launches = case["launches"].as_array().expect("launches").iter();
    launches.map(|launch| launch[0].as_str().expect("a name"))
}

#[test]
fn all_kernels_have_a_case_that_the_emulated_device_runs() {
    let cases = [cases("emulated"), cases("emulated-hopper")];
    let measured: BTreeSet<&str> = cases.iter().flatten().flat_map(launched).collect();
    let all = KERNELS.iter().chain(HOPPER_KERNELS).flat_map(|kernels| kernels.iter());
    let missing: BTreeSet<&str> =
        all.map(|kernel| kernel.name).filter(|name| !measured.contains(name)).collect();
    assert!(missing.is_empty(), "gpu-kernels has no case that launches {missing:?}");
    let refused = Command::new(GPU_KERNELS).args(["--device", "tpu"]).output().expect("runs");
    assert_eq!(refused.status.code(), Some(2));

    // The report has every line of the table that waits for measurements, from a case that is there.
    let (_guard, dir) = temporary();
    let results = json!({"device": "emulated", "date": "", "commit": "", "versions": "", "command": "", "uft": "",
                         "parts": [{"name": "kernels", "does": "", "state": "done", "seconds": 1.0, "records": cases[1]}]});
    let path = dir.join("results.json");
    std::fs::write(&path, results.to_string()).expect("a file");
    let table = stdout(python(&here("report.py")).arg(&path).output().expect("runs"));
    let documented = std::fs::read_to_string(root().join("docs/kernels.md")).expect("the docs");
    let first_cells = |text: &str| -> Vec<String> {
        let lines = text.lines().skip_while(|line| !line.starts_with("| on Hopper |")).skip(2);
        let cells =
            lines.map_while(|line| Some(line.strip_prefix("| ")?.split_once(" |")?.0.to_owned()));
        cells.collect()
    };
    assert_eq!(first_cells(&table), first_cells(&documented));
}

#[test]
fn wrong_arguments_are_refused() {
    let refused = |arguments: &[&str]| {
        let output = python(&here("run.py")).args(arguments).output().expect("run.py runs");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(
        refused(&["--parts", "tests,speed"]).contains("there is no speed, but hardware, tests")
    );
    assert!(refused(&["--parts", ""]).contains("--parts: none are named"));
    assert!(refused(&["--budget", "0"]).contains("it must be more than 0"));
    assert!(refused(&["--device", "tpu"]).contains("invalid choice"));
    let listed = stdout(python(&here("run.py")).arg("--list").output().expect("runs"));
    assert!(listed.starts_with("hardware") && listed.lines().count() == 5, "{listed}");
}

#[test]
fn a_part_gets_its_share_of_the_time() {
    let shares = "import run; print(run.shares(['hardware', 'tests'], 60.0), round(sum(s for _, _, s, _ in run.parts.PARTS), 9))";
    assert_eq!(snippet(shares).trim(), "{'hardware': 16.0, 'tests': 44.0} 1.0");
}

/// With stand-ins for the programs of a GPU's machine.
#[test]
fn what_goes_wrong_is_in_the_table_and_the_rest_goes_on() {
    let (_guard, dir) = temporary();
    let packed = stand_ins(&dir, TESTS);
    without_torch(&packed);
    let out = dir.join("results");
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").expect("a PATH"));
    let mut command = python(&packed.join("run.py"));
    command.arg("--out").arg(&out).args(["--parts", "hardware,tests,kernels,sanitizer"]);
    command.env("PATH", path).env("PYTHONPATH", packed.join("no-torch"));
    let output = command.output().expect("run.py runs");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let table = String::from_utf8(output.stdout).expect("text");
    for expected in [
        "| hardware | what the emulation assumes of the hardware | done | 1 ok",
        "matmul::cuda::tests::broken: thread panicked: off by 3",
        "rope::cuda::tests::crashes: its process ended with status -6",
        "1 left out: for compute capability 9.0, this is 8.0",
        "1 left out: of the processor or of the emulation",
        "1 left out: plants a fault, which is done in the emulation",
        "gpu-kernels: no memory",
        "| copy | 2 |",
        "racecheck: Race reported between thread 1 and 2",
        "0 errors",
        "| steps | whole training steps at Mistral-7B's shape beside PEFT | not asked for |",
    ] {
        assert!(table.contains(expected), "{expected}: {table}");
    }
    let results = json(&out.join("results.json"));
    let ok = part(&results, "tests").1.iter().filter(|record| record["state"] == "ok").count();
    assert_eq!(ok, 1, "what shares no process with a test that ends it");
}

/// A kernel of a GPU may never end, or end its process: each test and case that is left has another.
#[test]
fn what_never_ends_is_ended_and_the_rest_goes_on() {
    let (_guard, dir) = temporary();
    let waits = TESTS.replace("kill -6 $$", "sleep 60");
    let packed = stand_ins(
        &dir,
        &waits.replace("rope::cuda::tests::crashes", "matmul::cuda::tests::crashes"),
    );
    without_torch(&packed);
    let script = packed.join("parts.py");
    let text = std::fs::read_to_string(&script).expect("a script");
    let hasty =
        text.replace("GROUP, ALONE, CASE = 40.0, 12.0, 25.0", "GROUP, ALONE, CASE = 2.0, 2.0, 2.0");
    assert_ne!(text, hasty);
    std::fs::write(&script, hasty).expect("a script");
    let kernels = r#"#!/bin/sh
line() { echo "{\"begins\":\"$1\"}"; [ -z "$2" ] || echo "{\"case\":\"$1\",\"flops\":0,\"bytes\":8,\"peer\":null,$2}"; }
case "$*" in
  *--without\ faulty*) line right '"ms":2.0,"runs":9' ;;
  *--without\ slow*) line faulty '"error":"illegal address"'; line after '"error":"illegal address"' ;;
  *) line slow; sleep 60 ;;
esac
"#;
    std::fs::write(packed.join("bin/gpu-kernels"), kernels).expect("a script");
    let out = dir.join("results");
    let output = run(&packed, &out, &["--parts", "tests,kernels"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let table = String::from_utf8(output.stdout).expect("text");
    for expected in [
        "matmul::cuda::tests::crashes: it did not end in 2 s",
        "matmul::cuda::tests::broken: thread panicked: off by 3",
        "slow: it ended its process, or did not end in 2 s",
        "faulty: illegal address",
        "| right | 2 |",
    ] {
        assert!(table.contains(expected), "{expected}: {table}");
    }
    assert!(!table.contains("after"), "of a process that a kernel has spoilt: {table}");
}

#[test]
fn what_compute_sanitizer_runs_is_there() {
    let listed = Command::new(kernels_tests()).arg("--list").output().expect("it runs");
    let tests = stdout(listed);
    for part in snippet("import parts\nfor part in parts.SANITIZED: print(part)").lines() {
        assert!(tests.contains(part), "no test has {part} in its name");
    }
}

#[test]
fn without_time_nothing_is_done_and_the_table_says_so() {
    let (_guard, dir) = temporary();
    let packed = stand_ins(&dir, TESTS);
    without_torch(&packed);
    let arguments = ["--parts", "hardware,tests", "--budget", "0.001"];
    let table = stdout(run(&packed, &dir.join("results"), &arguments));
    assert_eq!(table.matches("its time was over before all was done").count(), 2, "{table}");
    assert!(table.contains("- tests: 3 not finished: its time was over"), "{table}");
}

#[test]
fn a_run_that_is_cut_off_leaves_a_table() {
    let (_guard, dir) = temporary();
    let slow = format!("[ \"$1\" = --list ] || case \"$*\" in *rope*) sleep 30 ;; esac\n{TESTS}");
    let packed = stand_ins(&dir, &slow);
    let out = dir.join("results");
    let mut command = python(&packed.join("run.py"));
    let mut child =
        command.arg("--out").arg(&out).args(["--parts", "tests"]).spawn().expect("runs");
    let (start, table) = (Instant::now(), out.join("table.md"));
    let written = || std::fs::read_to_string(&table).unwrap_or_default();
    while !written().contains("off by 3") {
        assert!(start.elapsed() < Duration::from_secs(60), "{}", written());
        std::thread::sleep(Duration::from_millis(50));
    }
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    assert!(written().contains("the run was cut off here"), "{}", written());
    let results = json(&out.join("results.json"));
    assert_eq!(part(&results, "tests").0, "cut off");
}

#[test]
fn the_report_has_every_kind_of_line() {
    let fixture = |name: &str| root().join("tests/fixtures/gpu").join(name);
    let results = fixture("results.json");
    assert!(json(&results)["made up"].is_string());
    let table = stdout(python(&here("report.py")).arg(&results).output().expect("runs"));
    if std::env::var_os("UFT_RECORD_TABLE").is_some() {
        std::fs::write(fixture("table.md"), &table).expect("a table");
    }
    assert_eq!(table, std::fs::read_to_string(fixture("table.md")).expect("a table"));
}

/// The first two steps warm up; of the others the median counts, over the tokens of all sequences.
#[test]
fn a_rate_is_that_of_the_steps_after_the_first_two() {
    let record = |seconds: &str| {
        let made = format!("w.record('texts', 'uft', '', {seconds}, 11.0, 'mistral-7b', 70.5)");
        let printed = snippet(&format!("import json, whole_steps as w; print(json.dumps({made}))"));
        serde_json::from_str::<Value>(&printed).expect("JSON")
    };
    let found = record("[9.0, 8.0, 2.0, 4.0, 1.0]");
    assert_eq!(found["task"], "texts, 16,384 tokens a step");
    let rate = [&found["steps"], &found["seconds_per_step"], &found["tokens_per_second"]];
    assert_eq!(rate, [&json!(5), &json!(2.0), &json!(8192.0)]);
    // Cut off before anything counts.
    let found = record("[9.0, 8.0]");
    assert!(found["tokens_per_second"].is_null() && found["steps"] == 2, "{found}");
}
