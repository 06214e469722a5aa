use super::*;

const WHOLE: &str = r#"
[model]
path = "base"
[plugins]
load = ["una-score"]
[[data]]
name = "rated"
files = ["rated.jsonl"]
adapter = { plugin = "scores", range = [0, 1] }
objective = { plugin = "una-score", beta = 0.1, loss = "mse" }
weight = 1.0
[train]
output = "out"
steps = 20
warmup = 0.0
schedule = "constant"
device = "cpu"
"#;

fn refused(text: &str, set: &[&str]) -> String {
    let set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
    Config::parse(text, &set).unwrap_err().message
}

#[test]
fn a_plugin_is_a_name_or_a_table() {
    let config = Config::parse(WHOLE, &[]).unwrap();
    let objective = &config.data[0].objective.terms[0].plugin;
    assert_eq!(objective.plugin, "una-score");
    assert_eq!(objective.params_json(), r#"{"beta":0.1,"loss":"mse"}"#);
    let config = Config::parse(WHOLE, &["data[rated].adapter=scores".into()]).unwrap();
    assert_eq!(
        config.data[0].adapter,
        PluginRef { plugin: "scores".into(), params: toml::Table::new() }
    );
}

#[test]
fn an_unknown_key_names_line_and_nearest_key() {
    let message = refused(&WHOLE.replace("steps = 20", "stepz = 20"), &[]);
    assert_eq!(message, "line 14 (`stepz = 20`): unknown key `stepz`; did you mean `steps`?");
    // The file's own mistake keeps its line beside an override; an override's is told as such.
    let mistaken = WHOLE.replace("steps = 20", "stepz = 20");
    assert_eq!(refused(&mistaken, &["train.lr=1"]), message);
    let message = refused(WHOLE, &["train.batchh=3"]);
    assert!(message.starts_with("with --set, ") && message.contains("did you mean `batch`?"));
    let message = refused(WHOLE, &["lora.targets=5"]);
    assert!(message.contains("expected \"all-linear\", a regular expression"), "{message}");
    assert!(refused("[modle]\npath = \"x\"", &[]).contains("did you mean `model`?"));
}

#[test]
fn a_wrong_word_lists_the_right_ones() {
    let message = refused(&WHOLE.replace("\"constant\"", "\"cosin\""), &[]);
    assert!(message.contains("line 16") && message.contains("cosine"), "{message}");
    let message = refused(WHOLE, &["train.without=[\"shared-prompt\"]"]);
    assert!(message.contains("did you mean `shared-prompts`?"), "{message}");
    assert!(message.contains("`fused-log-probs`"), "{message}");
}

#[test]
fn overrides_reach_sections_and_list_elements() {
    let set = [
        "train.lr=3e-5",
        "data[rated].weight=2",
        "data[0].objective.beta=0.5",
        "train.output=elsewhere",
    ];
    let config = Config::parse(WHOLE, &set.map(String::from)).unwrap();
    assert_eq!(config.train.lr, 3e-5);
    assert_eq!(config.data[0].weight, 2.0);
    assert_eq!(config.data[0].objective.terms[0].plugin.params["beta"].as_float(), Some(0.5));
    assert_eq!(config.train.output, "elsewhere");
    assert!(refused(WHOLE, &["data[nobody].weight=2"]).contains("no element `nobody`"));
    assert!(refused(WHOLE, &["data.weight=2"]).contains("data[NAME]"));
    assert!(refused(WHOLE, &["train.lr"]).contains("expected key=value"));
    assert!(refused(WHOLE, &["train[0].lr=1"]).contains("write train.KEY"));
    assert!(refused(WHOLE, &["stage[0].lr=1"]).contains("`stage` has no element `0`"));
}

#[test]
fn what_types_cannot_say_is_checked() {
    assert!(
        refused(&WHOLE.replace("name = \"rated\"", ""), &[])
            .contains("[[data]] number 1: name is missing")
    );
    assert!(refused(WHOLE, &["train.batch=0"]).contains("batch must be at least 1"));
    let seed = format!("{WHOLE}[eval]\nevery = 18446744073709551615\n");
    assert!(refused(&seed, &[]).contains("(`every = 18446744073709551615`)"));
    let deep = format!("{}=1", ["a"; 17].join("."));
    assert!(refused(WHOLE, &[&deep]).contains("a key of more than 16 parts"));
    let twice = format!(
        "{WHOLE}[[data]]\nname = \"rated\"\nfiles = [\"a\"]\nadapter = \"a\"\nobjective = \"b\"\n"
    );
    assert!(refused(&twice, &[]).contains("the name is taken"));
    let stage =
        format!("{WHOLE}[[stage]]\nname = \"one\"\ndata = [\"ratd\"]\nreference = \"base\"\n");
    assert!(refused(&stage, &[]).contains("no [[data]] is named `ratd`; did you mean `rated`?"));
    let stage = format!("{WHOLE}[[stage]]\nname = \"one\"\ndata = [\"rated\"]\n");
    assert!(refused(&stage, &[]).contains("reference is missing"));
}

#[test]
fn a_stage_overrides_and_inherits() {
    let config = Config::parse(WHOLE, &[]).unwrap();
    let stage = schema::StageSection { epochs: Some(2.0), lr: Some(1.0), ..Default::default() };
    let train = config.train.for_stage(&stage);
    assert_eq!((train.steps, train.epochs, train.lr, train.batch), (None, 2.0, 1.0, 8));
}

#[test]
fn the_annotated_defaults_are_the_defaults() {
    let annotated = docs::annotated();
    let parsed: Config = toml::from_str(&annotated).unwrap();
    assert_eq!(parsed, Config::default());
    for key in ["micro_tokens", "objective", "rslora", "template", "reference"] {
        assert!(annotated.contains(key), "{key}");
    }
}

#[test]
fn the_page_in_docs_is_current() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/config.md");
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        written == docs::page(),
        "docs/config.md is stale: uft config --markdown > docs/config.md"
    );
}
