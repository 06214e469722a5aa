//! The chat templates of a model directory.

use super::clock;
use super::template::Template;
use crate::{Error, Result};
use minijinja::Value;
use serde_json::{Map, Value as Json};
use std::path::Path;

/// A model's chat templates by their use.
#[derive(Default)]
pub struct Templates {
    default: Option<Template>,
    /// Used instead when there are tools.
    tool_use: Option<Template>,
    /// Names of the templates that there are, if none of them is the default one.
    others: Vec<String>,
}

impl Templates {
    /// One template for everything.
    ///
    /// # Errors
    /// Broken syntax.
    pub fn of(source: &str, origin: &str) -> Result<Self> {
        let default = Some(Template::new(source, origin, clock::now())?);
        Ok(Self { default, ..Self::default() })
    }

    /// Reads `chat_template.jinja` and `additional_chat_templates/tool_use.jinja`, or, without
    /// them, `chat_template` of tokenizer_config.json: one template or a list of named ones.
    ///
    /// # Errors
    /// A file that cannot be read; broken syntax.
    pub fn load(dir: &Path, config: &Map<String, Json>) -> Result<Self> {
        let mut templates = Self::default();
        let files = [
            ("default", "chat_template.jinja"),
            ("tool_use", "additional_chat_templates/tool_use.jinja"),
        ];
        for (name, file) in files {
            let path = dir.join(file);
            if path.exists() {
                let origin = path.display().to_string();
                let source = std::fs::read_to_string(&path)
                    .map_err(|e| Error::data(e.to_string()).at(&origin))?;
                templates.add(name, &source, &origin)?;
            }
        }
        if templates.exists() {
            return Ok(templates);
        }
        let origin = format!("chat_template in {}", dir.join("tokenizer_config.json").display());
        match config.get("chat_template") {
            None | Some(Json::Null) => {}
            Some(Json::String(source)) => templates.add("default", source, &origin)?,
            Some(Json::Array(named)) => {
                for entry in named {
                    let field = |key| entry.get(key).and_then(Json::as_str);
                    let (Some(name), Some(source)) = (field("name"), field("template")) else {
                        return Err(Error::data(format!("{origin}: expected name and template")));
                    };
                    templates.add(name, source, &format!("{origin}, {name:?}"))?;
                }
            }
            Some(_) => return Err(Error::data(format!("{origin} is neither a text nor a list"))),
        }
        Ok(templates)
    }

    fn add(&mut self, name: &str, source: &str, origin: &str) -> Result<()> {
        match name {
            "default" => self.default = Some(Template::new(source, origin, clock::now())?),
            "tool_use" => self.tool_use = Some(Template::new(source, origin, clock::now())?),
            other => self.others.push(other.to_owned()),
        }
        Ok(())
    }

    pub fn exists(&self) -> bool {
        self.default.is_some() || self.tool_use.is_some() || !self.others.is_empty()
    }

    pub fn uses_clock(&self) -> bool {
        self.default.iter().chain(&self.tool_use).any(Template::uses_clock)
    }

    /// The template for messages with these variables: the one for tools if there are tools.
    ///
    /// # Errors
    /// No template.
    pub fn choose(&self, variables: &[(String, Value)]) -> Result<&Template> {
        let tools = variables.iter().any(|(name, value)| name == "tools" && !value.is_none());
        let template = self.tool_use.as_ref().filter(|_| tools).or(self.default.as_ref());
        template.ok_or_else(|| {
            Error::data(if self.exists() {
                format!(
                    "the model has no default chat template, only {:?}; \
                     save the right one to a file and name it in [text] template",
                    self.others
                )
            } else {
                "the model has no chat template, so rows cannot be messages; name a file with one \
                 in [text] template, or use rows of plain text"
                    .to_owned()
            })
        })
    }
}
